"""Text as samples: one token per character, the label of each is the next one."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from os.path import isfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError, quote
from unroll.spec.schema import Characters
from unroll.train.samples import Data, Shapes, Split, Tensors, Windows

UNKNOWN = "\ufffd"  # code 0: what is held out may hold characters that training never saw


def read_text(settings: Characters, shapes: Shapes, given: Tensors) -> Data:
    """tokens: (B, T) and labels (B, T), the token after each; trained on the start of a text, measured on its end.

    The characters are those of the training part, sorted, after UNKNOWN.  Raises SpecError E502, E503, E504.
    """
    del shapes, given
    text = _text(settings.text)[: settings.characters]
    cut = len(text) - round(settings.validation * len(text))
    if cut < 2 * settings.length or len(text) - cut <= settings.length:
        message = f"data: {len(text):,} characters are too few for samples of {settings.length:,} in both parts"
        raise SpecError("E504", message, hint="set length: lower, or validation: higher")
    characters = [UNKNOWN, *sorted(set(text[:cut]) - {UNKNOWN})]
    codes, name = encode(text, characters), settings.input or "tokens"
    unknown = int((codes[cut:] == 0).sum())
    return Data(
        "text",
        Windows(name, codes[:cut], settings.length),
        consecutive(name, codes[cut:], settings.length),
        notes=(f"{unknown:,} characters that are held out do not occur in training",) if unknown else (),
        sizes={"vocabulary": len(characters), "tokens": settings.length},
        kept={"vocabulary": characters, "text_sha256": hashlib.sha256(text.encode()).hexdigest()},
    )


def encode(text: str, characters: list[str]) -> Tensor:
    """The place of each character in the sorted list `characters[1:]`, from 1; 0 where it is not in it. (L,) int64."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.array([ord(c) for c in characters[1:]], dtype=np.uint32)
    places = np.searchsorted(known, points).clip(max=len(known) - 1)
    return torch.from_numpy(np.where(known[places] == points, places + 1, 0).astype(np.int64))


def consecutive(name: str, codes: Tensor, length: int) -> Split:
    """Windows that follow one another, each token once; the last ones that fill no window are left out."""
    count = (len(codes) - 1) // length
    tokens, labels = (codes[k : k + count * length].reshape(count, length) for k in (0, 1))
    return Split({name: tokens}, labels=labels)


def documentation() -> str:
    """The texts of Python's `help`: language reference and built-in types."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def library() -> str:
    """The source of the top-level modules of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


NAMED: dict[str, Callable[[], str]] = {"python documentation": documentation, "python library": library}


def _text(source: str) -> str:
    if source in NAMED:
        return NAMED[source]()
    path = Path(source)
    if not isfile(path):
        hint = f"a path is relative to where you run unroll; without a file there are: {', '.join(NAMED)}"
        raise SpecError("E502", f"data: there is no file '{quote(source)}'", hint=hint)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError("E503", f"data: '{path}' is not text in UTF-8: {error}") from error
