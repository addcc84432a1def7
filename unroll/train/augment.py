"""What training may change about images, as functions of random numbers that are given: never of the process that draws them.

Legend: B batch, C channels, H height, W width.  image: (B, C, H, W), 0 .. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError
from unroll.spec.schema import Augment, RandAugment
from unroll.train.samples import package
from unroll.train.shelves import Size, View, middle

TRIES = 10
"""Proportions that are drawn for a crop; where none fits, the middle is taken."""
PROPORTIONS = (3 / 4, 4 / 3)
ERASED = (0.3, 10 / 3)
"""Height to width of a crop, and of what is erased."""


def crops(settings: Augment, size: Size, count: int, draw: torch.Generator) -> list[View]:
    """Parts of pictures: without `crop`, their middle; else of an area that is uniform between two shares, and of proportions whose logarithm is.

    Source: Szegedy et al. 2015, arXiv:1409.4842, section 6.
    """
    if settings.crop is None:
        return [middle(size)] * count
    numbers = torch.rand(count, TRIES, 4, generator=draw, dtype=torch.float64)
    return [_crop(row.tolist(), settings.crop, size) for row in numbers]


def _crop(rows: list[list[float]], shares: tuple[float, float], size: Size) -> View:
    def view(width: int, height: int) -> tuple[int, int, int, int]:
        for u in rows:
            area, shape = width * height * _between(shares, u[0]), _proportion(PROPORTIONS, u[1])
            w, h = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
                return left, top, left + w, top + h
        return middle(size)(width, height)

    return view


def _between(ends: tuple[float, float], u: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * u


def _proportion(ends: tuple[float, float], u: float) -> float:
    return math.exp(_between((math.log(ends[0]), math.log(ends[1])), u))


def shifted(image: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Every image moved by -most .. most pixels along each axis; zeros come in."""
    padded = torch.nn.functional.pad(image, (most, most, most, most)).permute(0, 2, 3, 1)
    b, _, h, w = image.shape
    top, left = torch.randint(2 * most + 1, (2, b, 1), generator=draw)
    rows, columns = top + torch.arange(h), left + torch.arange(w)
    return padded[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flipped(image: Tensor, draw: torch.Generator) -> Tensor:
    """Every image with probability 1/2 left to right."""
    turn = torch.rand(len(image), generator=draw) < 0.5
    return torch.where(turn[:, None, None, None], image.flip(-1), image)


def erased(image: Tensor, probability: float, draw: torch.Generator) -> Tensor:
    """Every image with this probability 0 in a rectangle, of 2 to 33 % of its area.

    Source: Zhong, Zheng, Kang, Li & Yang 2017, arXiv:1708.04896.
    """
    b, _, h, w = image.shape
    u = torch.rand(b, 5, generator=draw, dtype=torch.float64)
    area, shape = h * w * (0.02 + 0.31 * u[:, 1]), torch.tensor([_proportion(ERASED, x) for x in u[:, 2].tolist()])
    high, wide = (area * shape).sqrt().round().clamp(1, h), (area / shape).sqrt().round().clamp(1, w)
    box = _boxes((u[:, 3] * (h - high + 1)).floor(), (u[:, 4] * (w - wide + 1)).floor(), high, wide, (h, w))
    return image.masked_fill(box & (u[:, 0] < probability)[:, None, None, None], 0)


def _boxes(top: Tensor, left: Tensor, high: Tensor, wide: Tensor, size: Size) -> Tensor:
    """True inside rectangles; what is outside of the image is cut off: (B, 1, H, W). All (B,)."""
    rows, columns = (torch.arange(n) for n in size)
    down = (rows >= top[:, None]) & (rows < (top + high)[:, None])
    along = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return (down[:, :, None] & along[:, None, :])[:, None]


def mixed(image: Tensor, alpha: float, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """s x + (1 - s) x' of every image x and another one x' of the batch, s of Beta(alpha, alpha): mixtures, places of x', s: (B,).

    Source: Zhang, Cisse, Dauphin & Lopez-Paz 2017, arXiv:1710.09412.
    """
    share, other = _beta(len(image), alpha, draw), torch.randperm(len(image), generator=draw)
    s = share.to(image)[:, None, None, None]
    return s * image + (1 - s) * image[other], other, share


def pasted(image: Tensor, alpha: float, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Every image with a rectangle of another one of the batch: pictures, places of the others, share of area that is its own: (B,).

    The rectangle has the proportions of the image and a middle anywhere, and what is outside of the image is cut off.
    Source: Yun, Han, Oh, Chun, Choe & Yoo 2019, arXiv:1905.04899.
    """
    b, _, h, w = image.shape
    side, other = (1 - _beta(b, alpha, draw)).sqrt(), torch.randperm(b, generator=draw)
    middles = torch.rand(2, b, generator=draw, dtype=torch.float64)
    high, wide = (side * h).round(), (side * w).round()
    box = _boxes((middles[0] * h - high / 2).round(), (middles[1] * w - wide / 2).round(), high, wide, (h, w))
    return torch.where(box, image[other], image), other, 1 - box.double().mean((1, 2, 3))


def _beta(count: int, alpha: float, draw: torch.Generator) -> Tensor:
    seed = int(torch.randint(2**62, (), generator=draw))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count))


# --- RandAugment -----------------------------------------------------------------------------------------------------


def operations() -> dict[str, Callable[[Any, float], Any]]:
    """Fourteen operations on a picture of Pillow, with a strength m from -1 to 1; of some, its size counts."""
    pillow, ops, enhance = (package(f"PIL.{name}", "data: augment:") for name in ("Image", "ImageOps", "ImageEnhance"))

    def moved(picture: Any, a: float, b: float, c: float, d: float, e: float, f: float) -> Any:
        return picture.transform(picture.size, pillow.Transform.AFFINE, (a, b, c, d, e, f))

    return {
        "identity": lambda x, m: x,
        "shear_x": lambda x, m: moved(x, 1, 0.3 * m, 0, 0, 1, 0),
        "shear_y": lambda x, m: moved(x, 1, 0, 0, 0.3 * m, 1, 0),
        "translate_x": lambda x, m: moved(x, 1, 0, round(0.45 * m * x.size[0]), 0, 1, 0),
        "translate_y": lambda x, m: moved(x, 1, 0, 0, 0, 1, round(0.45 * m * x.size[1])),
        "rotate": lambda x, m: x.rotate(30 * m),
        "brightness": lambda x, m: enhance.Brightness(x).enhance(1 + 0.9 * m),
        "color": lambda x, m: enhance.Color(x).enhance(1 + 0.9 * m),
        "contrast": lambda x, m: enhance.Contrast(x).enhance(1 + 0.9 * m),
        "sharpness": lambda x, m: enhance.Sharpness(x).enhance(1 + 0.9 * m),
        "posterize": lambda x, m: ops.posterize(x, 8 - round(4 * abs(m))),
        "solarize": lambda x, m: ops.solarize(x, 256 * (1 - abs(m))),
        "autocontrast": lambda x, m: ops.autocontrast(x),
        "equalize": lambda x, m: ops.equalize(x),
    }


def rand_augmented(image: Tensor, settings: RandAugment, draw: torch.Generator) -> Tensor:
    """Every image, as one of 8 bits, after some operations drawn among fourteen, each at the same strength, forwards or backwards.

    image: one or three channels.  Raises SpecError E505 for values that are not 0 .. 1.
    Source: Cubuk, Zoph, Shlens & Le 2019, arXiv:1909.13719; ranges are those of the paper's table, at strength 1.
    """
    if image.numel() and (float(image.min()) < 0 or float(image.max()) > 1):
        span = f"{float(image.min()):.3g} .. {float(image.max()):.3g}"
        raise SpecError("E505", f"data: augment: rand_augment: is for images of 0 .. 1, these are {span}")
    pillow, known = package("PIL.Image", "data: augment:"), list(operations().values())
    which = torch.randint(len(known), (len(image), settings.operations), generator=draw).tolist()
    signs = (2 * torch.randint(2, (len(image), settings.operations), generator=draw) - 1).tolist()
    found = np.empty((len(image), *image.shape[2:], image.shape[1]), dtype=np.uint8)
    for k, pixels in enumerate((image * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        picture = pillow.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        for operation, sign in zip(which[k], signs[k], strict=True):
            picture = known[operation](picture, sign * settings.strength)
        found[k] = np.asarray(picture).reshape(found.shape[1:])
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(image) / 255
