"""Pictures as samples: they stay where they are, and each is read when a batch needs it.

Legend: B batch, C channels, H height, W width.  image: (B, C, H, W), 0 .. 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import isdir, realpath
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError, quote
from unroll.spec.schema import Augment, Images, Scaling
from unroll.train.ahead import ahead
from unroll.train.augment import crops, erased, flipped, mixed, pasted, rand_augmented, shifted
from unroll.train.samples import Change, Data, Place, Samples, Shapes, Split, Tensors, moved, shuffled
from unroll.train.shelves import (
    Arrays,
    Shards,
    Shelf,
    Size,
    View,
    at_hand,
    folders,
    left_out,
    middle,
    open_arrays,
    open_folder,
    open_shards,
    part_of,
)

AXES = ("channels", "height", "width")
PARTS = ("train", "val")
SHOWN = 1 << 20
"""Numbers that `whole` answers with at most."""
MEASURED = 4096
"""Pictures of which mean and standard deviation are taken."""


@dataclass(frozen=True)
class Scale:
    """(x - mean) / std; each () or (C,)."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=image.dtype)[:, None, None] for v in (self.mean, self.std))
        return (image - mean) / std


@dataclass(frozen=True)
class Pictures:
    """Some pictures of a shelf, by their places on it (N,), scaled to (height, width), then in the scale of the network."""

    name: str
    shelf: Shelf
    places: Tensor
    size: Size
    workers: int
    bytes: None = None
    scale: Scale | None = None
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
        return self.finished(self.seen(places, [middle(self.size)] * len(places)), places)

    def seen(self, places: Tensor, views: Sequence[View]) -> Tensor:
        """Parts of pictures as they lie there: (B, C, H, W), float32."""
        return torch.stack([self.shelf.read(int(k), self.size, v) for k, v in zip(places, views, strict=True)])

    def finished(self, image: Tensor, places: Tensor) -> Split:
        """Images in the scale of the network, with their labels."""
        image = image if self.scale is None else self.scale(image)
        return self._moved(Split({self.name: image}, labels=torch.from_numpy(self.shelf.labels)[places]))

    def whole(self) -> Split:
        """All that memory has room for, at equal distances."""
        return self[_spread(len(self), max(SHOWN // self[:1].inputs[self.name].numel(), 2))]

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


@dataclass(frozen=True)
class Changed:
    """What `augment:` does to the input `name` of a batch."""

    settings: Augment
    name: str

    def __call__(self, samples: Samples, places: Tensor, draw: torch.Generator) -> Split:
        do = self.settings
        if isinstance(samples, Pictures):
            own = samples.places[places]
            image = self._image(samples.seen(own, crops(do, samples.size, len(own), draw)), draw)
            batch = samples.finished(image, own)
        else:
            batch = samples[places]
            image = batch.inputs[self.name]
            if do.crop is not None:
                size = (image.shape[2], image.shape[3])
                views = crops(do, size, len(image), draw)
                image = torch.stack([part_of(x, size, view) for x, view in zip(image, views, strict=True)])
            batch = self._with(batch, self._image(image, draw))
        if do.erase is not None:
            batch = self._with(batch, erased(batch.inputs[self.name], do.erase, draw))
        return self._mixed(batch, draw) if mixes(do) else batch

    def _image(self, image: Tensor, draw: torch.Generator) -> Tensor:
        image = shifted(image, self.settings.shift, draw)
        image = flipped(image, draw) if self.settings.flip else image
        return image if self.settings.rand_augment is None else rand_augmented(image, self.settings.rand_augment, draw)

    def _mixed(self, batch: Split, draw: torch.Generator) -> Split:
        ways = [(way, alpha) for way, alpha in ((mixed, self.settings.mixup), (pasted, self.settings.cutmix)) if alpha]
        way, alpha = ways[int(torch.randint(len(ways), (), generator=draw))]
        image, other, share = way(batch.inputs[self.name], alpha, draw)
        assert batch.labels is not None
        return replace(self._with(batch, image), mixed=(batch.labels[other], share.float()))

    def _with(self, batch: Split, image: Tensor) -> Split:
        return replace(batch, inputs={**batch.inputs, self.name: image})


def change_of(settings: Augment | None, name: str, channels: int) -> Change | None:
    """None if nothing is changed. Raises SpecError E511 for settings that do not fit."""
    if settings is None:
        return None
    if settings.rand_augment is not None and channels not in (1, 3):
        message = f"data: augment: rand_augment: is for images of 1 or 3 channels, these have {channels}"
        raise SpecError("E511", message, hint="leave it out")
    if settings.crop is not None and settings.crop[0] > settings.crop[1]:
        raise SpecError("E511", "data: augment: crop: the smaller share comes first", hint="crop: [0.08, 1.0]")
    return Changed(settings, name)


def mixes(settings: Augment | None) -> bool:
    return settings is not None and bool(settings.mixup or settings.cutmix)


def scale_of(settings: Scaling | Literal["data"] | None, train: Pictures, channels: int) -> Scale | None:
    """What `normalise:` says, or what the training pictures have. Raises SpecError E504, E511."""
    if settings is None:
        return None
    if settings == "data":
        return _measured(train)
    for word, values in (("mean", settings.mean), ("std", settings.std)):
        if len(values) not in (1, channels):
            message = f"data: normalise: {word}: {len(values)} numbers for {channels} channels"
            raise SpecError("E511", message, hint="one for each channel, or one for all")
    return Scale(settings.mean, settings.std)


def _measured(train: Pictures) -> Scale:
    """Mean and standard deviation of each channel, of at most MEASURED training pictures at equal distances."""
    chosen, sums, count = replace(train, places=train.places[_spread(len(train), MEASURED)]), torch.zeros(()), 0
    for batch in chosen.batches(64):
        image = batch.inputs[train.name].double()
        sums = sums + torch.stack([image.sum((0, 2, 3)), image.square().sum((0, 2, 3))])
        count += image[:, 0].numel()
    mean, square = sums / count
    std = (square - mean.square()).clamp_min(0).sqrt()
    if bool((std <= 1e-6 * mean.abs().clamp_min(1e-30)).any()):
        channel = int(std.argmin())
        message = f"data: normalise: data: all pictures have the same value in channel {channel}"
        raise SpecError("E504", message, hint="normalise: {mean: [..], std: [..]}")
    return Scale(tuple(mean.tolist()), tuple(std.tolist()))


def _spread(count: int, most: int) -> Tensor:
    """At most so many of the numbers below count, at equal distances."""
    return torch.from_numpy(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def read_pictures(settings: Images, shapes: Shapes, given: Tensors) -> Data:
    """image: (B, C, height, width) and labels of pictures in folders, tar files or arrays.

    Raises SpecError E502 (nothing there), E503 (a damaged file), E504 (no pictures), E505, E506 (labels, numbers), E507 (classes),
    E511 (settings, the same pictures twice), E513 (a file that is no picture).
    """
    del shapes, given
    shelves, notes = _shelves(settings)
    sizes, size = _sizes(settings, shelves)
    classes, parts = _classes(shelves), _parts(settings, shelves)
    name = settings.input or "image"
    train, held = (Pictures(name, shelf, places, size, settings.workers) for shelf, places in parts)
    scale = scale_of(settings.normalise, train, sizes["channels"])
    train, held = replace(train, scale=scale), replace(held, scale=scale)
    return Data(
        "images",
        train,
        held,
        notes=notes,
        sizes={"classes": len(classes), **sizes},
        kept={
            "classes": classes,
            "pictures": _seal(shelves),
            **({} if scale is None else {"normalise": {"mean": list(scale.mean), "std": list(scale.std)}}),
        },
        change=change_of(settings.augment, name, sizes["channels"]),
        workers=settings.workers,
        mixes=mixes(settings.augment),
    )


def _parts(settings: Images, shelves: Sequence[Shelf]) -> list[tuple[Shelf, Tensor]]:
    """What is trained on and what is held out: a shelf, and places on it."""
    if len(shelves) == 2:
        return [(shelf, torch.arange(len(shelf.labels))) for shelf in shelves]
    return [(shelves[0], p) for p in shuffled(len(shelves[0].labels), settings.validation, settings.seed)]


def _seal(shelves: Sequence[Shelf]) -> str:
    return hashlib.sha256("".join(shelf.seal for shelf in shelves).encode()).hexdigest()


def _shelves(settings: Images) -> tuple[list[Shelf], tuple[str, ...]]:
    """One shelf, or one to train on and one held out; and what to say of them."""
    given = {"folder": settings.folder, "shards": settings.shards, "arrays": settings.arrays}
    named = [name for name, value in given.items() if value]
    if len(named) != 1:
        message = (
            f"data: source: images needs one of folder:, shards: and arrays:, and has {' and '.join(named) or 'none'}"
        )
        raise SpecError("E511", message)
    if settings.arrays and settings.held and len(settings.held) != 2:
        raise SpecError("E511", f"data: held: {len(settings.held)} files", hint="of arrays: [IMAGES, LABELS]")
    _refuse_twice(_lie(settings))
    channels = settings.channels or 3
    if settings.folder is not None:
        tops = _tops(Path(settings.folder), settings.held)
        return [open_folder(top, channels) for top in tops], left_out(tops)
    if settings.shards:
        groups = [settings.shards, *([settings.held] if settings.held else [])]
        return [open_shards(paths, channels) for paths in groups], ()
    assert settings.arrays is not None
    first = settings.order == "channels_first"
    pairs = [settings.arrays, *([settings.held] if settings.held else [])]
    return [open_arrays(pair[0], pair[1], first=first) for pair in pairs], ()


def _lie(settings: Images) -> list[list[str]]:
    """Of each part the folders of its classes, its tar files, or its array of images, by their own paths; what is not there is left out."""
    if settings.folder is not None:
        found = [folders(top) if isdir(top) else [] for top in _tops(Path(settings.folder), settings.held)]
    elif settings.shards:
        found = [[p for word in part for p in at_hand(word)] for part in (settings.shards, settings.held)]
    else:
        found = [pair[:1] for pair in (settings.arrays or (), settings.held)]
    return [[realpath(path) for path in part] for part in found]


def _refuse_twice(parts: Sequence[Sequence[str]]) -> None:
    """Raises SpecError E511 for pictures that are given twice, within a part or in both."""
    every = [path for part in parts for path in part]
    for path in every:
        if every.count(path) > 1:
            both = all(path in part for part in parts)
            message = "is trained on, and held out" if both and len(parts) > 1 else "is given twice"
            raise SpecError("E511", f"data: '{quote(path, 200)}' {message}", hint="name it once")


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


WHERE = ("folder", "shards", "arrays")


def asked_for(settings: Mapping[str, Any], asked: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Settings of a run without what does not hold for pictures elsewhere, if these are asked for. sizes: what its network takes."""
    places = [word for word in WHERE if word in asked]
    if not places:
        return dict(settings)
    gone = {*WHERE, "held", "order"} - set(asked)
    kept = {word: value for word, value in settings.items() if word not in gone}
    if "arrays" in places:
        return {word: value for word, value in kept.items() if word not in ("size", "channels")}
    return {"size": [sizes["height"], sizes["width"]], "channels": sizes["channels"], **kept}


def read_elsewhere(settings: Images, means: Mapping[str, Any], trained: Images) -> Data:
    """What is held out of other pictures, or all of them where nothing is set apart; numbered, and in the scale, as in a run.

    Of the pictures of the run, trained, those that it held out.  means: data.json of the run.
    Raises SpecError as `read_pictures` does, E507 for classes that the run does not know, E511 for pictures that it was trained on, E514 where its own
    are not what they were.
    """
    shelves, notes = _shelves(settings)
    sizes, size = _sizes(settings, shelves)
    (shelf, places), known = _held_out(settings, shelves, means, trained), list[str](means["classes"])
    scale = Scale(*(tuple(means["normalise"][word]) for word in ("mean", "std"))) if "normalise" in means else None
    shelf = _numbered(shelf, known)
    name = settings.input or "image"
    held = Pictures(name, shelf, places, size, settings.workers, scale=scale)
    sizes = {"classes": len(known), **sizes}
    return Data("images", held, held, notes=notes, sizes=sizes, kept={"classes": known}, workers=settings.workers)


def _held_out(
    settings: Images, shelves: Sequence[Shelf], means: Mapping[str, Any], trained: Images
) -> tuple[Shelf, Tensor]:
    """The shelf, and places on it, of pictures that a run was not trained on."""
    if all(getattr(settings, word) == getattr(trained, word) for word in (*WHERE, "held")):
        if _seal(shelves) != means["pictures"]:
            raise SpecError("E514", "the pictures are not those that the run began with", hint="bring them back")
        return _parts(settings, shelves)[-1]
    known = _lie(trained)[0]
    for path in _lie(settings)[len(shelves) - 1]:
        if path in known:
            message = f"data: '{quote(path, 200)}' has pictures that the run was trained on"
            raise SpecError("E511", message, hint="leave it out: what the run held out is measured")
    return shelves[-1], torch.arange(len(shelves[-1].labels))


def _numbered(shelf: Shelf, known: Sequence[str]) -> Shelf:
    """The same pictures, their classes numbered as these names are; numbers without names are what they are."""
    names = list(shelf.classes)
    if not set(names) <= set(known):
        if names == list(map(str, range(len(names)))) and len(names) <= len(known):
            return shelf
        odd = [name for name in names if name not in known]
        message = f"data: the network knows no class {', '.join(map(quote, odd[:5]))}"
        raise SpecError("E507", message, hint=f"it tells apart: {', '.join(known[:20])}")
    place = np.array([known.index(name) for name in names], dtype=np.int64)
    labels = np.where(shelf.labels >= 0, place[shelf.labels], shelf.labels) if len(place) else shelf.labels
    return replace(cast(Any, shelf), labels=labels)


def image_sizes(image: Tensor, classes: int) -> dict[str, int]:
    """What images say about a model."""
    return {"classes": classes, **dict(zip(AXES, image.shape[1:], strict=True))}
