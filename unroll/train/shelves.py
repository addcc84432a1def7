"""Where pictures lie: folders of classes, tar files, arrays. Only places are held; a picture is read when a batch asks for it.

Legend: N pictures, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError, quote
from unroll.train.samples import package
from unroll.train.tokens import digest

Numbers = np.ndarray[Any, np.dtype[Any]]
Size = tuple[int, int]
View = Callable[[int, int], tuple[int, int, int, int]]
"""(width, height) of a picture -> (left, top, right, bottom) of the part of it that is shown."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel: others lose values in `convert`
TOP = {"u1": 255.0, "u2": 65535.0, "b1": 1.0}
"""What white is, in arrays of whole numbers."""
HIGHEST = 100_000
"""A label above it, and above the number of pictures, is taken for a name of something else than a class."""


class Shelf(Protocol):
    """N pictures by their numbers, with their labels (N,) and what the classes are called.

    read: (C, height, width), float32, of the part that `view` shows.  seal: a digest of what is there.
    """

    @property
    def labels(self) -> Numbers: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def seal(self) -> str: ...
    def read(self, k: int, size: Size, view: View) -> Tensor: ...


# --- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """TOP/CLASS/FILE; classes are numbered in the order of their names. files: CLASS/FILE in bytes, (N,)."""

    top: str
    classes: tuple[str, ...]
    files: Numbers
    labels: Numbers
    channels: int

    @property
    def seal(self) -> str:
        return hashlib.sha256(self.files.tobytes()).hexdigest()

    def read(self, k: int, size: Size, view: View) -> Tensor:
        path = os.path.join(self.top, os.fsdecode(self.files[k]))
        return read_picture(path, path, size, self.channels, view)


def folders(top: Path) -> list[Path]:
    return sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))


def open_folder(top: Path, channels: int) -> Folder:
    """Raises SpecError E502 (no such folder), E504 (a class without pictures), E507 (no classes)."""
    if not isdir(top):
        hint = "paths are relative to where you run unroll"
        raise SpecError("E502", f"there is no folder '{quote(str(top), 200)}'", hint=hint)
    classes = tuple(p.name for p in folders(top))
    if len(classes) < 2:
        hint = "pictures lie in a folder per class: FOLDER/cats/1.png, FOLDER/dogs/1.png"
        raise SpecError("E507", f"data: '{top}' holds {len(classes)} folders, one per class is needed", hint=hint)
    found, labels = list[bytes](), list[int]()
    for number, name in enumerate(classes):
        pictures = [n for n in _names(top / name) if is_picture(n)]
        if not pictures:
            raise SpecError("E504", f"data: '{top / name}' holds no picture", hint=f"pictures are {' '.join(SUFFIXES)}")
        found += [os.fsencode(f"{name}/{picture}") for picture in pictures]
        labels += [number] * len(pictures)
    return Folder(str(top), classes, np.array(found), np.array(labels), channels)


def _names(folder: Path) -> list[str]:
    """Names of the files of a folder, in their order; hidden ones do not count."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_file())


def is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def left_out(tops: Sequence[Path]) -> tuple[str, ...]:
    """What to say of files that are not read."""
    others = [f / name for top in tops for f in folders(top) for name in _names(f) if not is_picture(name)]
    if not others:
        return ()
    return (f"{len(others):,} files are no pictures by their names and were left out, the first is {others[0]}",)


# --- tar files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """Tar files of NAME.png and the like, each with a NAME.cls that has its number, or else in a folder with the name of its class.

    names: of members, in bytes.  of, starts, sizes: in which file a member is, and where in it.  All (N,).
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    names: Numbers
    of: Numbers
    starts: Numbers
    sizes: Numbers
    labels: Numbers
    channels: int

    @property
    def seal(self) -> str:
        parts = (self.names, self.of, self.starts, self.sizes, self.labels)
        return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()

    def read(self, k: int, size: Size, view: View) -> Tensor:
        path = self.paths[self.of[k]]
        with open(path, "rb") as file:
            file.seek(int(self.starts[k]))
            body = file.read(int(self.sizes[k]))
        return read_picture(io.BytesIO(body), f"{path}: {os.fsdecode(self.names[k])}", size, self.channels, view)


@dataclass
class _Index:
    """Columns of the table of pictures while tar files are read; label: None until it is known."""

    names: list[bytes] = field(default_factory=list[bytes])
    of: list[int] = field(default_factory=list[int])
    starts: list[int] = field(default_factory=list[int])
    sizes: list[int] = field(default_factory=list[int])
    numbers: list[int | None] = field(default_factory=list["int | None"])


def open_shards(patterns: Sequence[str], channels: int) -> Shards:
    """Raises SpecError E502 (no such file), E503 (no tar file), E504 (no pictures), E506 (a label that is no number), E507 (no class)."""
    paths, index = files_of(patterns), _Index()
    for shard, path in enumerate(paths):
        _look_through(path, shard, index)
    if not index.names:
        message = f"data: {', '.join(paths[:3])}: no picture in {len(paths)} tar files"
        raise SpecError("E504", message, hint=f"pictures are {' '.join(SUFFIXES)}")
    classes, labels = _classes_of(index, paths)
    of, starts, sizes, numbers = (np.array(c, np.int64) for c in (index.of, index.starts, index.sizes, labels))
    return Shards(tuple(paths), classes, np.array(index.names), of, starts, sizes, numbers, channels)


def files_of(patterns: Sequence[str]) -> list[str]:
    """Paths, each as it is or as a pattern with * stands for, in order. Raises SpecError E502."""
    found = list[str]()
    for pattern in patterns:
        here = at_hand(pattern)
        if not here:
            hint = "paths are relative to where you run unroll; * stands for any part of a name"
            raise SpecError("E502", f"data: there is no file '{quote(pattern, 200)}'", hint=hint)
        found += here
    return found


def at_hand(pattern: str) -> list[str]:
    """The files that a path, or a pattern with *, stands for, in order."""
    return [pattern] if isfile(pattern) else sorted(glob(pattern))


def _look_through(path: str, shard: int, index: _Index) -> None:
    """Put the pictures of a tar file into the index: one after another, none is read."""
    numbers, members, begin = dict[str, int](), dict[str, str](), len(index.names)
    try:
        with tarfile.open(path, "r:") as tar:
            kept: list[Any] = cast(Any, tar).members
            while (member := tar.next()) is not None:
                kept.clear()  # all of them, otherwise
                if member.isfile() and member.name.lower().endswith(".cls"):
                    body = tar.extractfile(member)
                    assert body is not None
                    if _key(member.name) in numbers:
                        hint = "NAME.cls is one for each NAME, which is what stands before the first dot"
                        message = f"data: '{path}' holds a second label for one picture, {member.name}"
                        raise SpecError("E506", message, hint=hint)
                    numbers[_key(member.name)] = _number(body.read(), f"{path}: {member.name}")
                elif member.isfile() and is_picture(member.name):
                    index.names.append(os.fsencode(member.name))
                    index.of.append(shard)
                    index.starts.append(member.offset_data)
                    index.sizes.append(member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        hint = "an archive that is not compressed: a picture is read from its place in it"
        raise SpecError("E503", f"data: '{path}' cannot be read as a tar file: {error}", hint=hint) from None
    for name in map(os.fsdecode, index.names[begin:]):
        key = _key(name)
        if key in numbers and (other := members.setdefault(key, name)) is not name:
            message = f"data: '{path}' holds {other} and {name}, with one label for both"
            raise SpecError(
                "E507", message, hint="of each NAME one picture, and one NAME.cls; leave others out, as masks"
            )
        index.numbers.append(numbers.get(key))


def _key(member: str) -> str:
    """What a picture and its label have in common: the name up to its first dot."""
    folder, name = os.path.split(member)
    return os.path.join(folder, name.partition(".")[0])


def _number(body: bytes, name: str) -> int:
    try:
        value = int(body)
    except ValueError:
        value = -1
    if value < 0:
        text = quote(body.decode("ascii", "replace"), 20)
        raise SpecError("E506", f"data: '{name}' holds '{text}', and labels are whole numbers from 0")
    return value


def _classes_of(index: _Index, paths: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Names of classes, and the label of each picture: numbers that stand beside all of them, or the folders that they are in."""
    if None not in index.numbers:
        labels = [n for n in index.numbers if n is not None]
        _refuse_numbers(paths[0], max(labels), len(labels))
        return tuple(map(str, range(max(labels) + 1))), labels
    own = [os.path.basename(os.path.dirname(os.fsdecode(name))) for name in index.names]
    mixed = any(n is not None for n in index.numbers)
    for k, (name, number) in enumerate(zip(own, index.numbers, strict=True)):
        if number is None if mixed else not name:
            member = f"{paths[index.of[k]]}: {os.fsdecode(index.names[k])}"
            hint = "NAME.png with NAME.cls beside it, for all; or CLASS/NAME.png"
            raise SpecError("E507", f"data: '{member}' has no class", hint=hint)
    classes = sorted(set(own))
    place = {name: k for k, name in enumerate(classes)}
    return tuple(classes), [place[name] for name in own]


def _refuse_numbers(path: str, highest: int, count: int) -> None:
    """Raises SpecError E506 for labels that are no numbers of classes, E507 where no picture has a class."""
    if highest < 0:
        message = f"data: '{path}': all labels are below 0, which is no class"
        raise SpecError("E507", message, hint="classes are numbered from 0")
    if highest >= max(HIGHEST, count):
        message = f"data: '{path}': a label is {highest:,}, and there are {count:,} pictures"
        raise SpecError("E506", message, hint="number the classes from 0, one after another")


# --- arrays ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """An array of images, on disk where it is a .npy: (N, H, W), or with channels last or first. Whole numbers become 0 .. 1."""

    path: str
    shape: tuple[int, ...]
    labels: Numbers
    first: bool
    kept: Numbers | None = None
    """the images themselves, where they cannot stay on disk"""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(int(self.labels.max(initial=-1)) + 1)))

    @property
    def images(self) -> Numbers:
        return _mapped(self.path) if self.kept is None else self.kept

    @property
    def seal(self) -> str:
        return digest(self.images.reshape(-1)) + digest(self.labels)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """C, H, W."""
        c, h, w = (1, *self.shape[1:]) if len(self.shape) == 3 else self.shape[1:]
        return (c, h, w) if self.first or len(self.shape) == 3 else (w, c, h)

    def read(self, k: int, size: Size, view: View) -> Tensor:
        own = self.images[k]
        image = torch.from_numpy(own.astype(np.float32))  # a copy: what is on disk cannot be written
        image = image.reshape(self.sizes) if own.ndim == 2 or self.first else image.permute(2, 0, 1)
        if not bool(image.isfinite().all()):
            raise SpecError("E505", f"data: '{self.path}' has values that are not finite in picture {k}")
        return part_of(image / TOP.get(own.dtype.str[1:], 1.0), size, view)


def open_arrays(images: str, labels: str, *, first: bool) -> Arrays:
    """Raises SpecError E502, E503 (files), E504 (shapes), E506 (kinds of numbers), E507 (which array of a file)."""
    array, numbers = _array(images, "image"), _array(labels, "labels")
    if array.ndim not in (3, 4) or 0 in array.shape:
        message = f"data: '{images}' is {' × '.join(map(str, array.shape)) or 'one number'}"
        raise SpecError(
            "E504", message, hint="images are N × H × W, or N × H × W × C, with order: channels_first N × C × H × W"
        )
    if array.dtype.kind != "f" and array.dtype.str[1:] not in TOP:
        hint = "uint8 and uint16, which become 0 .. 1, or numbers with a fraction, which stay as they are"
        raise SpecError("E506", f"data: '{images}' holds {array.dtype} values", hint=hint)
    if numbers.shape != array.shape[:1] and numbers.shape != (len(array), 1):
        message = f"data: '{labels}' is {' × '.join(map(str, numbers.shape))}, and there are {len(array):,} images"
        raise SpecError("E504", message, hint="one label for each image")
    if numbers.dtype.kind not in "iu":
        raise SpecError("E506", f"data: '{labels}' holds {numbers.dtype} values, and labels are whole numbers")
    _refuse_numbers(labels, int(numbers.max()), len(array))
    kept = None if isinstance(array, np.memmap) else array
    return Arrays(images, array.shape, np.array(numbers).reshape(-1).astype(np.int64), first, kept)


@lru_cache(maxsize=8)
def _mapped(path: str) -> Numbers:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _array(path: str, name: str) -> Numbers:
    """An array of a .npy, on disk, or of a .npz: the one of this name, or the only one."""
    if not isfile(path):
        hint = "paths are relative to where you run unroll"
        raise SpecError("E502", f"data: there is no file '{quote(path, 200)}'", hint=hint)
    try:
        loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = list(loaded.files)
            if name not in names and len(names) != 1:
                hint = f"it holds {', '.join(names) or 'nothing'}"
                raise SpecError("E507", f"data: '{path}' holds no array '{name}'", hint=hint)
            return loaded[name if name in names else names[0]]
    except SpecError:
        raise
    except Exception as error:  # whatever NumPy says of a file that is not what it wrote
        reason = quote(str(error), 120)
        raise SpecError(
            "E503", f"data: '{path}' is no array of numbers: {reason}", hint="np.save(path, array)"
        ) from None


# --- one picture -----------------------------------------------------------------------------------------------------


def middle(size: Size) -> View:
    """The largest part in the middle of a picture that has the proportions of (height, width)."""

    def view(width: int, height: int) -> tuple[int, int, int, int]:
        h, w = size
        if width * h >= height * w:
            wide, high = min(max(round(height * w / h), 1), width), height
        else:
            wide, high = width, min(max(round(width * h / w), 1), height)
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high

    return view


def read_picture(source: Any, name: str, size: Size, channels: int, view: View) -> Tensor:
    """A part of a picture, scaled: (channels, height, width), float32, 0 .. 1. source: a path, or bytes as a file. Raises SpecError E513."""
    pillow: Any = package("PIL.Image", "data: source: images")
    ops: Any = package("PIL.ImageOps", "data: source: images")
    try:
        with warnings.catch_warnings(), pillow.open(source) as opened:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            if opened.mode not in MODES:
                hint = "save it with 8 bits per channel"
                raise SpecError("E513", f"data: '{name}' is a picture of mode {opened.mode}", hint=hint)
            upright = ops.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
            shown = upright.crop(view(*upright.size)).resize(size[::-1], pillow.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise SpecError("E513", f"data: '{name}' cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(np.array(shown)).reshape(*size, channels)
    return pixels.permute(2, 0, 1).float() / 255


def part_of(image: Tensor, size: Size, view: View) -> Tensor:
    """A part of an image (C, H, W), scaled to (C, *size); as it is where that is all of it."""
    left, top, right, bottom = view(image.shape[2], image.shape[1])
    shown = image[:, top:bottom, left:right]
    if shown.shape[1:] == size:
        return shown.contiguous()
    scaled = torch.nn.functional.interpolate(shown[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
    return scaled.clamp(shown.amin(), shown.amax())  # the polynomials go beyond
