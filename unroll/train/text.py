"""Text as samples: one token per character, or as words say; the label of each is the next one."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from os.path import isfile
from pathlib import Path

import torch
from torch import Tensor

from unroll.errors import SpecError, quote
from unroll.model.words import CHARACTERS, Words, words
from unroll.model.words import Characters as WordsOfText
from unroll.spec.schema import Characters
from unroll.train.samples import Data, Shapes, Split, Tensors, Windows
from unroll.train.tokens import bytes_of


def read_text(settings: Characters, shapes: Shapes, given: Tensors) -> Data:
    """tokens: (B, T) and labels (B, T), the token after each; trained on the start of a text, measured on its end.

    Words are the characters of the training part, or what `words:` says. Raises SpecError E501, E502, E503, E504.
    """
    del shapes, given
    text = _text(settings.text)[: settings.characters]
    cut = len(text) - round(settings.validation * len(text))
    known = words_of(text[:cut], settings.words)
    train, held = (torch.tensor(known.encode(part), dtype=torch.int64) for part in (text[:cut], text[cut:]))
    if len(train) < 2 * settings.length or len(held) <= settings.length:
        few = "characters" if settings.words == CHARACTERS else f"characters in {len(train) + len(held):,} tokens"
        message = f"data: {len(text):,} {few} are too few for samples of {settings.length:,} in both parts"
        raise SpecError("E504", message, hint="set length: lower, or validation: higher")
    unknown, name = int((held == 0).sum()) if settings.words == CHARACTERS else 0, settings.input or "tokens"
    return Data(
        "text",
        Windows(name, train, settings.length),
        with_bytes(consecutive(name, held, settings.length), known),
        notes=(f"{unknown:,} characters that are held out do not occur in training",) if unknown else (),
        sizes={"vocabulary": known.size, "tokens": settings.length},
        kept={**known.record(), "text_sha256": hashlib.sha256(text.encode()).hexdigest()},
        words=known,
    )


def with_bytes(held: Split, known: Words) -> Split:
    """Held-out samples that know how many bytes their labels stand for."""
    assert held.labels is not None
    return replace(held, bytes=bytes_of(known, held.labels))


def words_of(text: str, kind: str) -> Words:
    """The characters of a text, or words that are there. Raises SpecError E501, E502, E503."""
    return WordsOfText.of(text) if kind == CHARACTERS else words(kind)


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
