"""What is read back from a run folder: a file that is missing, damaged or of another network is named."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from unroll.errors import SpecError, UnrollError, quote

AGAIN = "bring it back, or train anew"


@contextmanager
def reading(path: Path, hint: str = AGAIN) -> Generator[None]:
    """Raises SpecError E510 where what is done inside, which is to read the file, does not work."""
    try:
        yield
    except UnrollError:
        raise
    except Exception as e:  # whatever the libraries say of a file that is not what they wrote
        raise SpecError("E510", f"'{path}' cannot be read: {_reason(e)}", hint=hint) from None


def _reason(e: Exception) -> str:
    match e:
        case FileNotFoundError():
            return "there is no such file"
        case OSError() if e.strerror:
            return e.strerror
        case KeyError():
            return f"it says nothing of {e}"
        case _:
            return quote(str(e) or type(e).__name__, 120)


def read_json(path: Path) -> Any:
    """A JSON file. Raises SpecError E510."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(path: Path, hint: str = AGAIN) -> dict[str, Tensor]:
    """A safetensors file. Raises SpecError E510."""
    with reading(path, hint):
        return load_file(path)
