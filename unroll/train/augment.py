"""What training may change about the images of a batch. Random numbers are those of a step: never of the process that draws them.

Legend: B batch, C channels, H height, W width.  image: (B, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unroll.spec.schema import Augment
from unroll.train.samples import Change, Split


@dataclass(frozen=True)
class Changed:
    """What `augment:` does to the input `name` of a batch."""

    settings: Augment
    name: str

    def __call__(self, batch: Split, draw: torch.Generator) -> Split:
        image = shifted(batch.inputs[self.name], self.settings.shift, draw)
        image = flipped(image, draw) if self.settings.flip else image
        return replace(batch, inputs={**batch.inputs, self.name: image})


def change_of(settings: Augment | None, name: str) -> Change | None:
    """None if nothing is changed."""
    return None if settings is None else Changed(settings, name)


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
