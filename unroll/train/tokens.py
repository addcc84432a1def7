"""Tokens in files: arrays of whole numbers that stay on disk, cut into windows; the label of each token is the next one.

Files and, where a separator is named, documents are never crossed: what is left of one at its end is filled up, and the filling has label -1,
which counts in no loss. A document ends with its separator, which is the label of its last token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError, quote
from unroll.model.words import Words, words
from unroll.spec.schema import TokenArrays
from unroll.train.samples import Data, Place, Shapes, Split, Tensors

Numbers = np.ndarray[Any, np.dtype[Any]]
AT_ONCE = 1 << 22
"""Numbers read at a time while a file is looked through."""
SHOWN = 1 << 20
"""Tokens that `whole` answers with at most."""


@dataclass(frozen=True)
class TokenWindows:
    """Windows of `length` tokens within stretches [begin, end) of some arrays laid end to end.

    apart: stretches are documents, and an epoch has every token of them; else it begins in each stretch at a random place below `length`, and
    has windows that are full. fill: the token that fills up a window whose stretch ends; its label is -1.
    """

    name: str
    arrays: tuple[Numbers, ...]
    begins: Numbers
    ends: Numbers
    length: int
    apart: bool
    fill: int

    @property
    def _counts(self) -> Numbers:
        """Windows of each stretch."""
        pairs = self.ends - self.begins - 1
        return -(-pairs // self.length) if self.apart else np.where(self._moves, (pairs + 1) // self.length - 1, 1)

    @property
    def _moves(self) -> Numbers:
        """Is there room for a random start?"""
        return (self.ends - self.begins >= 2 * self.length) & (not self.apart)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def order(self, draw: torch.Generator) -> Tensor:
        """The first places of the windows of one epoch, shuffled."""
        start = int(torch.randint(self.length, (), generator=draw))
        places = torch.from_numpy(self._places(start))
        return places[torch.randperm(len(places), generator=draw)]

    def _places(self, start: int) -> Numbers:
        counts = self._counts
        own = np.repeat(np.arange(len(counts)), counts)
        k = np.arange(len(own)) - np.repeat(counts.cumsum() - counts, counts)
        return (self.begins + start * self._moves)[own] + k * self.length

    def __getitem__(self, index: Tensor) -> Split:
        rows = [self._window(int(place)) for place in index]
        tokens = np.full((len(rows), self.length), self.fill, np.int64)
        labels = np.full((len(rows), self.length), -1, np.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row) - 1], labels[i, : len(row) - 1] = row[:-1], row[1:]
        return Split({self.name: torch.from_numpy(tokens)}, labels=torch.from_numpy(labels))

    def _window(self, place: int) -> Numbers:
        """The tokens of a window and the label of the last one."""
        stretch = int(np.searchsorted(self.begins, place, side="right")) - 1
        stop = min(place + self.length + 1, int(self.ends[stretch]))
        for array in self.arrays:
            if place < len(array):
                return array[place:stop]
            place, stop = place - len(array), stop - len(array)
        raise AssertionError("internal error, please report: a window beyond the last file")

    def spread(self, most: int) -> Split:
        """At most so many windows, at equal distances."""
        places = self._places(0)
        chosen = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(np.int64))
        return self[torch.from_numpy(places[chosen])]

    @property
    def labels(self) -> Tensor | None:
        return self.whole().labels

    def whole(self) -> Split:
        """Windows at equal distances, as many as memory has room for."""
        return self.spread(max(SHOWN // self.length, 2))

    def to(self, like: Place) -> TokenWindows:
        """Itself: what is on disk has no place; batches are moved."""
        del like
        return self


def read_tokens(settings: TokenArrays, shapes: Shapes, given: Tensors) -> Data:
    """tokens: (B, T) and labels (B, T), trained on some files, or on all but their end, measured on others, or on that end.

    Raises SpecError E501, E502, E503 (files), E504 (too few tokens), E505 (a token below 0), E506 (no whole numbers).
    """
    del shapes, given
    known = None if settings.words is None else words(settings.words)
    arrays = tuple(open_array(Path(path), settings.kind) for path in settings.files)
    own = tuple(open_array(Path(path), settings.kind) for path in settings.held)
    highest = max(map(_highest, settings.files + settings.held, arrays + own))
    begins, ends = stretches(arrays, settings.separator)
    if len(begins) == len(arrays) and settings.separator is not None and not _holds(arrays, settings.separator):
        message = f"data: no document ends: the separator {settings.separator} is in none of the files"
        raise SpecError("E504", message, hint="separator: the token that ends a document, or leave it out")
    if settings.held:
        train, held = (arrays, begins, ends), (own, *stretches(own, settings.separator))
    else:
        train, held = (
            (arrays, *found)
            for found in parted(begins, ends, 1 - settings.validation, whole=settings.separator is not None)
        )
    name, apart, fill = settings.input or "tokens", settings.separator is not None, settings.separator or 0
    parts = [TokenWindows(name, *_kept(*part), settings.length, apart, fill) for part in (train, held)]
    if not all(map(len, parts)):
        message = (
            f"data: {sum(map(len, arrays + own)):,} tokens are too few for samples of {settings.length:,} in both parts"
        )
        raise SpecError("E504", message, hint="more files, another validation:, or held: [FILE]")
    shown = parts[1].spread(settings.samples)
    assert shown.labels is not None
    return Data(
        "tokens",
        parts[0],
        Split(shown.inputs, labels=shown.labels, bytes=None if known is None else bytes_of(known, shown.labels)),
        notes=tuple(_said(parts[0], apart)),
        sizes={"vocabulary": highest + 1 if known is None else max(known.size, highest + 1), "tokens": settings.length},
        kept={
            **({} if known is None else known.record()),
            "tokens": {
                path: digest(array) for path, array in zip(settings.files + settings.held, arrays + own, strict=True)
            },
        },
        words=known,
    )


def _said(train: TokenWindows, apart: bool) -> Iterator[str]:
    if apart:
        tokens = int((train.ends - train.begins - 1).sum())
        filled = 1 - tokens / (len(train) * train.length)
        yield f"{len(train.begins):,} documents in {len(train):,} windows, {100 * filled:.0f} % of them filled up"


def _kept(arrays: tuple[Numbers, ...], begins: Numbers, ends: Numbers) -> tuple[tuple[Numbers, ...], Numbers, Numbers]:
    """Without stretches that have no token with a label."""
    some = ends - begins > 1
    return arrays, begins[some], ends[some]


def open_array(path: Path, kind: str) -> Numbers:
    """One row of whole numbers, on disk: .npy, or the bare numbers of a .bin. A matrix is its rows, one after another.

    Raises SpecError E502, E503, E506.
    """
    if not isfile(path):
        hint = "a path is relative to where you run unroll"
        raise SpecError("E502", f"data: there is no file '{quote(str(path))}'", hint=hint)
    try:
        array: Numbers = (
            np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else _bare(path, kind)
        )
    except (ValueError, EOFError) as e:
        raise SpecError("E503", f"data: '{path}' is no array of tokens: {quote(str(e), 120)}") from None
    if array.dtype.kind not in "iu":
        raise SpecError("E506", f"data: '{path}' holds {array.dtype} values, tokens are whole numbers")
    return array.reshape(-1)


def _bare(path: Path, kind: str) -> Numbers:
    size = path.stat().st_size
    if size == 0 or size % np.dtype(kind).itemsize:
        raise ValueError(f"{size:,} bytes are not numbers of {kind}")
    return np.memmap(path, dtype=f"<{kind.removeprefix('uint').replace('16', 'u2').replace('32', 'u4')}", mode="r")


def _chunks(array: Numbers) -> Iterator[tuple[int, Numbers]]:
    return ((k, np.asarray(array[k : k + AT_ONCE])) for k in range(0, len(array), AT_ONCE))


def _highest(path: str, array: Numbers) -> int:
    """Raises SpecError E505 for a token below 0."""
    ends = [(int(part.min()), int(part.max())) for _, part in _chunks(array)]
    if min((low for low, _ in ends), default=0) < 0:
        hint = "labels below 0 belong in source: file, with files: {tokens: .., labels: ..}"
        raise SpecError("E505", f"data: '{path}' has tokens below 0", hint=hint)
    return max((high for _, high in ends), default=-1)


def stretches(arrays: Sequence[Numbers], separator: int | None) -> tuple[Numbers, Numbers]:
    """[begin, end) of files, or of documents that end with their separator, in the arrays laid end to end."""
    offset, cuts = 0, [0]
    for array in arrays:
        if separator is not None:
            cuts += [offset + k + 1 + int(i) for k, part in _chunks(array) for i in np.flatnonzero(part == separator)]
        offset += len(array)
        cuts.append(offset)
    edges = np.unique(np.array(cuts, np.int64))
    return edges[:-1], edges[1:]


def _holds(arrays: Sequence[Numbers], token: int) -> bool:
    return any(bool((part == token).any()) for array in arrays for _, part in _chunks(array))


def parted(
    begins: Numbers, ends: Numbers, share: float, *, whole: bool
) -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """What is before and what is after this share of all tokens; or, of whole stretches, those that end before it, one at least."""
    if not len(begins):
        return (begins, ends), (begins, ends)
    cut = int(begins[0] + round(share * (ends[-1] - begins[0])))
    if whole:
        own = int(np.searchsorted(begins, cut, side="right")) - 1
        cut = int(begins[own] if own > 0 else ends[0])
    before, after = begins < cut, ends > cut
    return (begins[before], np.minimum(ends[before], cut)), (np.maximum(begins[after], cut), ends[after])


def bytes_of(known: Words, labels: Tensor) -> int:
    """Bytes of the text that labels (B, T) stand for; those below 0 stand for none."""
    return sum(len(known.decode([t for t in row if t >= 0]).encode()) for row in labels.tolist())


def digest(array: Numbers) -> str:
    """Of the size, and of 64 parts at equal distances: a file may be larger than one wants to read."""
    found = hashlib.sha256(f"{array.dtype} {len(array)}".encode())
    for k in np.linspace(0, max(len(array) - 1024, 0), 64).astype(np.int64):
        found.update(np.ascontiguousarray(array[k : k + 1024]).tobytes())
    return found.hexdigest()
