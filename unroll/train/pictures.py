"""Pictures as samples: a folder of them, read with Pillow, and what training may change about an image.

Legend: B batch, C channels, H height, W width.  image: (B, C, H, W), 0 .. 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError
from unroll.spec.schema import Augment, Images
from unroll.train.samples import Change, Data, Shapes, Split, Tensors, divide, package

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel: others lose values in `convert`
PARTS = ("train", "val")


def read_folder(settings: Images, shapes: Shapes, given: Tensors) -> Data:
    """image: (B, C, size, size) of every picture in FOLDER/CLASS; classes are numbered in the order of their names.

    Raises SpecError E502 (no such folder), E504 (no pictures), E507 (classes), E513 (a file that is no picture).
    """
    del shapes, given
    top = Path(settings.folder)
    if not isdir(top):
        raise SpecError("E502", f"there is no folder '{top}'", hint="paths are relative to where you run unroll")
    parts = tuple(p.name for p in _folders(top)) == PARTS and all(map(_folders, (top / part for part in PARTS)))
    tops = [top / part for part in PARTS] if parts else [top]
    classes = _classes(tops)
    read = [_labelled(place, classes, settings) for place in tops]
    train, held = read if parts else divide(read[0], settings.validation, settings.seed)
    name = settings.input or "image"
    return Data(
        "images",
        train,
        held,
        notes=_left_out(tops),
        sizes=image_sizes(train.inputs[name], len(classes)),
        kept={"classes": classes},
        change=change_of(settings.augment, name),
    )


def image_sizes(image: Tensor, classes: int) -> dict[str, int]:
    """What images say about a model."""
    return {"classes": classes, **dict(zip(("channels", "height", "width"), image.shape[1:], strict=True))}


def _folders(top: Path) -> list[Path]:
    return sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(tops: Sequence[Path]) -> list[str]:
    """The names of the classes, the same in every part. Raises SpecError E507."""
    names = [[p.name for p in _folders(top)] for top in tops]
    for top, found in zip(tops, names, strict=True):
        if len(found) < 2:
            hint = "pictures lie in a folder per class: FOLDER/cats/1.png, FOLDER/dogs/1.png"
            raise SpecError("E507", f"data: '{top}' holds {len(found)} folders, one per class is needed", hint=hint)
        if odd := sorted(set(found) ^ set(names[0])):
            raise SpecError("E507", f"data: '{tops[0]}' and '{top}' differ in their classes: {', '.join(odd)}")
    return names[0]


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(pictures, other files) of a folder, in the order of their names; hidden files do not count."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return [p for p in files if p.suffix.lower() in SUFFIXES], [p for p in files if p.suffix.lower() not in SUFFIXES]


def _left_out(tops: Sequence[Path]) -> tuple[str, ...]:
    others = [p for top in tops for folder in _folders(top) for p in _files(folder)[1]]
    if not others:
        return ()
    return (f"{len(others):,} files are no pictures by their names and were left out, the first is {others[0]}",)


def _labelled(top: Path, classes: Sequence[str], settings: Images) -> Split:
    """The pictures of all classes. Raises SpecError E504 for a class without any."""
    images, labels = list[Tensor](), list[int]()
    for number, name in enumerate(classes):
        pictures = _files(top / name)[0]
        if not pictures:
            raise SpecError("E504", f"data: '{top / name}' holds no picture", hint=f"pictures are {' '.join(SUFFIXES)}")
        images += [read_picture(path, settings.size, settings.channels) for path in pictures]
        labels += [number] * len(pictures)
    return Split({settings.input or "image": torch.stack(images)}, labels=torch.tensor(labels))


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """The middle square of a picture, scaled: (channels, size, size), float32, 0 .. 1. Raises SpecError E513."""
    pillow: Any = package("PIL.Image", "data: source: images")
    ops: Any = package("PIL.ImageOps", "data: source: images")
    try:
        with warnings.catch_warnings(), pillow.open(path) as opened:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            if opened.mode not in MODES:
                hint = "save it with 8 bits per channel"
                raise SpecError("E513", f"data: '{path}' is a picture of mode {opened.mode}", hint=hint)
            upright = ops.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
            square = _middle(upright).resize((size, size), pillow.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise SpecError("E513", f"data: '{path}' cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(np.array(square)).reshape(size, size, channels)
    return pixels.permute(2, 0, 1).float() / 255


def _middle(picture: Any) -> Any:
    """The largest square in the middle of a picture."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))


# --- changes in training -------------------------------------------------------------------------------------------


def change_of(settings: Augment | None, name: str) -> Change | None:
    """What `augment:` does to the input `name` of a batch; None if nothing."""
    if settings is None:
        return None

    def change(batch: Split, draw: torch.Generator) -> Split:
        image = shifted(batch.inputs[name], settings.shift, draw)
        image = flipped(image, draw) if settings.flip else image
        return Split({**batch.inputs, name: image}, batch.targets, batch.labels)

    return change


def shifted(image: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Every image of (B, C, H, W) moved by -most .. most pixels along each axis; zeros come in."""
    padded = torch.nn.functional.pad(image, (most, most, most, most)).permute(0, 2, 3, 1)
    b, _, h, w = image.shape
    top, left = torch.randint(2 * most + 1, (2, b, 1), generator=draw)
    rows, columns = top + torch.arange(h), left + torch.arange(w)
    return padded[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flipped(image: Tensor, draw: torch.Generator) -> Tensor:
    """Every image of (B, C, H, W) with probability 1/2 left to right."""
    turn = torch.rand(len(image), generator=draw) < 0.5
    return torch.where(turn[:, None, None, None], image.flip(-1), image)
