"""Words: text -> whole numbers and back, kept in the folder of a network that was trained on them.

Characters   a list of them; number 0 stands for any other
Bytes        the 256 of UTF-8
Tokenizer    what a file of the library `tokenizers` says; or one of ranks of byte strings, as tiktoken has them
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import isfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unroll.errors import SpecError, UnrollError, quote
from unroll.spec import Spec
from unroll.spec.schema import TokenEmbed

UNKNOWN = "\ufffd"
"""Character 0 of `Characters`, and what undecodable bytes become."""
CHARACTERS, BYTES = "characters", "bytes"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Where a text is cut before pairs are joined; a file of ranks does not say. Radford et al. 2019 (GPT-2)."""


class Words(Protocol):
    """size: numbers go from 0 to size - 1.  record: what `read_record` makes them from again, for JSON."""

    @property
    def size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Characters:
    """characters[0] is UNKNOWN; the others in the order of their code points."""

    characters: tuple[str, ...]

    @staticmethod
    def of(text: str) -> Characters:
        """Those of a text."""
        return Characters((UNKNOWN, *sorted(set(text) - {UNKNOWN})))

    @property
    def size(self) -> int:
        return len(self.characters)

    @cached_property
    def _points(self) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.array([ord(c) for c in self.characters[1:]], dtype=np.uint32)

    def encode(self, text: str) -> list[int]:
        return self.numbers(text).tolist()

    def numbers(self, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of every character: (L,)."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        if not len(self._points):
            return np.zeros(len(points), np.int64)
        places = np.searchsorted(self._points, points).clip(max=len(self._points) - 1)
        return np.where(self._points[places] == points, places + 1, 0).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[k] for k in tokens)

    def record(self) -> dict[str, Any]:
        return {"vocabulary": list(self.characters)}


@dataclass(frozen=True)
class Bytes:
    """Token k is byte k."""

    @property
    def size(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def record(self) -> dict[str, Any]:
        return {"words": BYTES}


@dataclass(frozen=True)
class Tokenizer:
    """text: the JSON that the library `tokenizers` reads. Raises SpecError E501 (no such library), E503 (the text) where it is used."""

    text: str

    @cached_property
    def _held(self) -> Any:
        try:
            return _library().Tokenizer.from_str(self.text)
        except UnrollError:
            raise
        except Exception as e:  # the library raises nothing more special
            raise SpecError("E503", f"this is no file of the library tokenizers: {quote(str(e), 120)}") from None

    def __getstate__(self) -> dict[str, str]:
        return {"text": self.text}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "text", state["text"])

    @property
    def size(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return 1 + max(self._held.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        return self._held.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._held.decode(list(tokens), skip_special_tokens=False)

    def record(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self.text)}


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as e:
        if e.name != "tokenizers":
            raise
        message = "words of a tokenizer need the package tokenizers, which is not installed"
        raise SpecError("E501", message, hint="pip install 'unroll-compiler[text]'") from None


# --- from files -------------------------------------------------------------------------------------------------------


def words(source: str | Path, pattern: str = PATTERN) -> Words:
    """The words of a file: JSON of the library `tokenizers`, lines `base64 rank`, or what is kept with a network (words.json of a saved
    one, data.json of a run); or `bytes`.

    pattern: where a text is cut before the pairs of a file of ranks are joined, in the regular expressions of that library.
    Raises SpecError E501 (the library is missing), E502 (no such file), E503 (neither kind).
    """
    if source == BYTES:
        return Bytes()
    path = Path(source)
    if not isfile(path):
        hint = f"a path, relative to where you run unroll, or {BYTES}"
        raise SpecError("E502", f"words: there is no file '{quote(str(source))}'", hint=hint)
    raw = path.read_bytes()
    if (kept := _kept(raw)) is not None:
        return kept
    ranks = None if raw.lstrip().startswith(b"{") else read_ranks(raw)
    try:
        found = Tokenizer(raw.decode() if ranks is None else of_ranks(ranks, pattern))
        assert found.size
    except (SpecError, UnicodeDecodeError, AssertionError) as e:
        if isinstance(e, SpecError) and e.code == "E501":
            raise
        hint = "a tokenizer.json of the library tokenizers, or lines `base64 rank` as tiktoken has them"
        raise SpecError("E503", f"words: '{path}' is no file of words", hint=hint) from None
    return found


def _kept(raw: bytes) -> Words | None:
    """What a folder keeps, if it is that."""
    try:
        found = json.loads(raw)
        return read_record(found) if isinstance(found, dict) else None
    except (ValueError, TypeError):
        return None


def read_ranks(raw: bytes) -> dict[bytes, int] | None:
    """Byte strings by rank, of lines `base64 rank`; None where a line is none."""
    try:
        pairs = [line.split() for line in raw.splitlines() if line.strip()]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        return None


def of_ranks(ranks: Mapping[bytes, int], pattern: str = PATTERN) -> str:
    """The JSON of the tokenizer that joins, of all neighbours, the pair with the lowest rank, the first of equals, until none is left.

    A byte is written as the printable character that the library has for it.
    """
    letters = _letters()
    word = lambda token: "".join(letters[b] for b in token)
    cuts = ((t[:k], t[k:]) for t in sorted(ranks, key=ranks.__getitem__) for k in range(1, len(t)))
    merges = [(word(a), word(b)) for a, b in cuts if a in ranks and b in ranks]
    library = _library()
    held = library.Tokenizer(library.models.BPE({word(t): n for t, n in ranks.items()}, merges))
    parts, cut = library.pre_tokenizers, library.Regex(pattern)
    byte_level = parts.ByteLevel(add_prefix_space=False, use_regex=False)
    held.pre_tokenizer = parts.Sequence([parts.Split(cut, "isolated"), byte_level])
    held.decoder = library.decoders.ByteLevel()
    return held.to_str()


def _letters() -> list[str]:
    """A printable character for each byte: itself, or one from 256 on. Radford et al. 2019 (GPT-2)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in own else chr(next(others)) for b in range(256)]


def read_record(kept: Mapping[str, Any]) -> Words | None:
    """What `record` wrote, among other things; None where it is not there. Raises KeyError, TypeError for what it never wrote."""
    if "vocabulary" in kept:
        return Characters(tuple(kept["vocabulary"]))
    if "tokenizer" in kept:
        return Tokenizer(json.dumps(kept["tokenizer"]))
    return Bytes() if kept.get("words") == BYTES else None


# --- with a model -----------------------------------------------------------------------------------------------------


def agree(known: Words, spec: Spec) -> None:
    """Raises SpecError E420 where a model has no row for every word."""
    embed = spec.model.embed if spec.model is not None else None
    if not isinstance(embed, TokenEmbed):
        raise SpecError("E420", f"{spec.title} reads no tokens, so it has no words", hint="model.embed: {kind: tokens}")
    if known.size > embed.vocabulary:
        message = f"there are {known.size:,} words, and the table of the model has {embed.vocabulary:,} rows"
        where = spec.origin("model", "embed", "vocabulary").where()
        raise SpecError("E420", message, where, f"model.embed.vocabulary={known.size}")


def pieces(known: Words, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
    """A text after some tokens, token by token: together what `decode` makes of it. What ends within a character waits for its end."""
    done, waiting = list(after), list[int]()
    for token in tokens:
        waiting.append(token)
        text = known.decode([*done, *waiting])
        if not text.endswith(UNKNOWN) or len(waiting) > 4:  # no character has more bytes
            yield text[len(known.decode(done)) :]
            done, waiting = waiting, []
    if waiting:
        yield known.decode([*done, *waiting])[len(known.decode(done)) :]
