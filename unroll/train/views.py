"""Views: copies of samples that are changed at random, by plain operations.

Legend: B samples, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from unroll.spec.schema import View
from unroll.train.samples import generator


def views(x: Tensor, wanted: View, draw: torch.Generator) -> list[Tensor]:
    """`count` copies of x: (B, ...), each sample of each changed by numbers of its own. draw: on the processor."""
    return [changed(x, wanted, draw) for _ in range(wanted.count)]


def changed(x: Tensor, wanted: View, draw: torch.Generator) -> Tensor:
    """First what is cut out of an image, then its light, then noise, then what is hidden."""
    if not x.numel():
        return x
    if wanted.of_images:
        x = cut(x, wanted, draw)
    if wanted.contrast or wanted.brightness:
        around = [1, *[1] * (x.ndim - 1)]
        low, high = (_within(len(x), v, draw).view(-1, *around[1:]).to(x) for v in (wanted.contrast, wanted.brightness))
        middle = x.flatten(1).mean(1).view(-1, *around[1:])
        x = middle + (1 + low) * (x - middle) + high
    if wanted.noise:
        x = x + wanted.noise * torch.randn(x.shape, generator=draw).to(x)
    if wanted.hide:
        x = torch.where((torch.rand(x.shape, generator=draw) < wanted.hide).to(x.device), 0, x)
    return x


def cut(image: Tensor, wanted: View, draw: torch.Generator) -> Tensor:
    """Of every image (B, C, H, W) a rectangle of a random share of its area, turned and mirrored, at the size of the image.

    Values between pixels are bilinear; beyond the border is the pixel at the border.
    """
    b, _, height, width = image.shape
    area = _between(b, *wanted.area, draw)
    shape = _between(b, math.log(wanted.aspect[0]), math.log(wanted.aspect[1]), draw).exp()
    high, wide = ((area * s).sqrt().clamp(max=1) for s in (1 / shape, shape))
    down, right = (_within(b, 1, draw) * (1 - side) for side in (high, wide))
    angle = _within(b, math.radians(wanted.turn), draw)
    mirror = torch.where(torch.rand(b, generator=draw) < 0.5, -1.0, 1.0) if wanted.flip else torch.ones(b)
    cos, sin = angle.cos(), angle.sin()
    # from places in the view to places in the image, both -1 .. 1; a turn is one of pixels, which need not be square there
    rows = [
        torch.stack([mirror * wide * cos, -high * sin * height / width, right], 1),
        torch.stack([mirror * wide * sin * width / height, high * cos, down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(image), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def _between(count: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=draw)


def _within(count: int, most: float, draw: torch.Generator) -> Tensor:
    return _between(count, -most, most, draw)


def draws(seed: int, step: int) -> torch.Generator:
    """The random numbers of views of a step: a function of both alone."""
    return generator((seed * 1_000_003 + step) * 2 + 1)
