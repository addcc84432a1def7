"""Pictures as samples: they stay where they are, and each is read when a batch needs it.

Legend: B batch, C channels, H height, W width.  image: (B, C, H, W), 0 .. 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import isdir
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError
from unroll.spec.schema import Images
from unroll.train.ahead import ahead
from unroll.train.augment import change_of
from unroll.train.samples import Data, Place, Shapes, Split, Tensors, moved, shuffled
from unroll.train.shelves import (
    Arrays,
    Shards,
    Shelf,
    Size,
    folders,
    left_out,
    middle,
    open_arrays,
    open_folder,
    open_shards,
)

AXES = ("channels", "height", "width")
PARTS = ("train", "val")
SHOWN = 1 << 20
"""Numbers that `whole` answers with at most."""


@dataclass(frozen=True)
class Pictures:
    """Some pictures of a shelf, by their places on it (N,), scaled to (height, width)."""

    name: str
    shelf: Shelf
    places: Tensor
    size: Size
    workers: int
    bytes: None = None
    like: tuple[Place, ...] = ()

    @property
    def labels(self) -> Tensor:
        return self._at(torch.from_numpy(self.shelf.labels)[self.places])

    def __len__(self) -> int:
        return len(self.places)

    def order(self, draw: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=draw)

    def __getitem__(self, index: Tensor | slice) -> Split:
        places = self.places[index]
        images = torch.stack([self.shelf.read(int(k), self.size, middle(self.size)) for k in places])
        return self._moved(Split({self.name: images}, labels=torch.from_numpy(self.shelf.labels)[places]))

    def whole(self) -> Split:
        """All that memory has room for, at equal distances."""
        one = self[:1].inputs[self.name].numel()
        most = min(max(SHOWN // one, 2), len(self))
        return self[torch.from_numpy(np.linspace(0, len(self) - 1, most).round().astype(np.int64))]

    def to(self, like: Place) -> Pictures:
        return replace(self, like=(*self.like, like))

    def batches(self, size: int) -> Iterator[Split]:
        make = _Slices(replace(self, like=()), size)
        return map(self._moved, ahead(make, range(-(-len(self) // size)), self.workers))

    def _moved(self, batch: Split) -> Split:
        for like in self.like:
            batch = batch.to(like)
        return batch

    def _at(self, labels: Tensor) -> Tensor:
        for like in self.like:
            labels = moved(labels, like)
        return labels


@dataclass(frozen=True)
class _Slices:
    pictures: Pictures
    size: int

    def __call__(self, k: int) -> Split:
        return self.pictures[slice(k * self.size, (k + 1) * self.size)]


def read_pictures(settings: Images, shapes: Shapes, given: Tensors) -> Data:
    """image: (B, C, height, width) and labels of pictures in folders, tar files or arrays.

    Raises SpecError E502 (nothing there), E503 (a damaged file), E504 (no pictures), E505, E506 (labels, numbers), E507 (classes),
    E511 (settings), E513 (a file that is no picture).
    """
    del shapes, given
    shelves, notes = _shelves(settings)
    sizes, size = _sizes(settings, shelves)
    classes = _classes(shelves)
    if len(shelves) == 2:
        parts = [(shelf, torch.arange(len(shelf.labels))) for shelf in shelves]
    else:
        places = shuffled(len(shelves[0].labels), settings.validation, settings.seed)
        parts = [(shelves[0], p) for p in places]
    name = settings.input or "image"
    train, held = (Pictures(name, shelf, places, size, settings.workers) for shelf, places in parts)
    seals = "".join(shelf.seal for shelf in shelves)
    return Data(
        "images",
        train,
        held,
        notes=notes,
        sizes={"classes": len(classes), **sizes},
        kept={"classes": classes, "pictures": hashlib.sha256(seals.encode()).hexdigest()},
        change=change_of(settings.augment, name),
        workers=settings.workers,
    )


def _shelves(settings: Images) -> tuple[list[Shelf], tuple[str, ...]]:
    """One shelf, or one to train on and one held out; and what to say of them."""
    given = {"folder": settings.folder, "shards": settings.shards, "arrays": settings.arrays}
    named = [name for name, value in given.items() if value]
    if len(named) != 1:
        message = (
            f"data: source: images needs one of folder:, shards: and arrays:, and has {' and '.join(named) or 'none'}"
        )
        raise SpecError("E511", message)
    channels = settings.channels or 3
    if settings.folder is not None:
        tops = _tops(Path(settings.folder), settings.held)
        return [open_folder(top, channels) for top in tops], left_out(tops)
    if settings.shards:
        groups = [settings.shards, *([settings.held] if settings.held else [])]
        return [open_shards(paths, channels) for paths in groups], ()
    assert settings.arrays is not None
    if settings.held and len(settings.held) != 2:
        raise SpecError("E511", f"data: held: {len(settings.held)} files", hint="of arrays: [IMAGES, LABELS]")
    first = settings.order == "channels_first"
    pairs = [settings.arrays, *([settings.held] if settings.held else [])]
    return [open_arrays(pair[0], pair[1], first=first) for pair in pairs], ()


def _tops(top: Path, held: Sequence[str]) -> list[Path]:
    """Folders of classes: TOP, or TOP/train and TOP/val; or TOP and what is held out."""
    parts = isdir(top) and tuple(p.name for p in folders(top)) == PARTS and all(folders(top / part) for part in PARTS)
    if parts and held:
        raise SpecError("E511", f"data: held: '{top}' has a folder val already", hint=f"data.folder={top / PARTS[0]}")
    if len(held) > 1:
        raise SpecError("E511", f"data: held: {len(held)} folders", hint="of pictures in folders: [FOLDER]")
    return [top / part for part in PARTS] if parts else [top, *map(Path, held)]


def _sizes(settings: Images, shelves: Sequence[Shelf]) -> tuple[dict[str, int], Size]:
    """Channels, height and width. Raises SpecError E511 for settings that do not fit where pictures lie, E504."""
    arrays = [shelf for shelf in shelves if isinstance(shelf, Arrays)]
    if not arrays:
        if settings.size is None or settings.order != "channels_last":
            word, hint = (
                ("size", "size: 64, or [height, width]") if settings.size is None else ("order", "leave it out")
            )
            raise SpecError("E511", f"data: {word}: {'is needed' if word == 'size' else 'is for arrays'}", hint=hint)
        size = (settings.size, settings.size) if isinstance(settings.size, int) else settings.size
        return dict(zip(AXES, (settings.channels or 3, *size), strict=True)), size
    for word in ("size", "channels"):
        if getattr(settings, word) is not None:
            raise SpecError("E511", f"data: {word}: arrays are as they are", hint="leave it out")
    if arrays[-1].sizes != arrays[0].sizes:
        raise SpecError("E504", f"data: '{arrays[0].path}' and '{arrays[-1].path}' differ in the shape of their images")
    return dict(zip(AXES, arrays[0].sizes, strict=True)), arrays[0].sizes[1:]


def _classes(shelves: Sequence[Shelf]) -> list[str]:
    """What classes are called, the same in both parts. Raises SpecError E507."""
    first, *others = (list(shelf.classes) for shelf in shelves)
    numbers = all(name.isdigit() for names in (first, *others) for name in names)
    for found in others:
        odd = sorted(set(found) ^ set(first))
        if odd and not (numbers and all(isinstance(shelf, Arrays | Shards) for shelf in shelves)):
            raise SpecError("E507", f"data: what is held out differs in its classes: {', '.join(odd)}")
        first = max(first, found, key=len)
    return first


def image_sizes(image: Tensor, classes: int) -> dict[str, int]:
    """What images say about a model."""
    return {"classes": classes, **dict(zip(AXES, image.shape[1:], strict=True))}
