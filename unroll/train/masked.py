"""The task of hidden patches: a network sees some patches of an image and predicts the others.

Legend: B batch, N patches, P entries of a patch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from unroll.spec.schema import Train
from unroll.train import losses
from unroll.train.losses import Net
from unroll.train.samples import Data, Held, Split
from unroll.train.table import Score, evaluating


@contextmanager
def aside(device: torch.device, seed: int) -> Generator[None]:
    """Inside, the global random numbers start from `seed`; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def as_in_training(net: Net, device: torch.device, seed: int) -> Generator[None]:
    """Inside, the network trains, with random numbers from `seed`; afterwards it is as it was, its statistics too."""
    module = losses.module(net)
    was_training, before = module.training, [b.clone() for b in module.buffers()]
    module.train()
    try:
        with aside(device, seed):
            yield
    finally:
        module.train(was_training)
        for b, value in zip(module.buffers(), before, strict=True):
            b.copy_(value)


@torch.no_grad()
def masks(net: Net, held: Held, settings: Train) -> Iterator[tuple[Split, Tensor]]:
    """Batches with the mask (B, N) that the network draws for each in training; the same ones every time."""
    module: Any = losses.module(net)
    for k, batch in enumerate(held.batches(settings.batch)):
        with as_in_training(net, next(iter(batch.inputs.values())).device, settings.seed + k):
            _, mask = module(*losses.arguments(net, batch.inputs))
        yield batch, mask


def predict(net: Net, batch: Split, mask: Tensor) -> Tensor:
    """The patches (B, N, P) that the network predicts for a given mask."""
    return cast(Any, net)(*losses.arguments(net, batch.inputs), mask=mask)[0]


@torch.no_grad()
def held_out(net: Net, held: Held, settings: Train) -> dict[str, float]:
    """Mean over hidden patches and their entries of (predicted − patch)²."""

    def guess(batch: Split, mask: Tensor) -> Tensor:
        with evaluating(net):
            return predict(net, batch, mask)

    return _mean([_errors(net, batch, mask, guess(batch, mask)) for batch, mask in masks(net, held, settings)])


def _errors(net: Net, batch: Split, mask: Tensor, predicted: Tensor) -> Tensor:
    return losses.patch_errors(net, batch, predicted)[mask].double()


def _mean(errors: list[Tensor]) -> dict[str, float]:
    value = float(torch.cat(errors).mean())
    return {"held_out": value, "masked_mse": value}


@torch.no_grad()
def mean_patches(net: Net, data: Data, settings: Train) -> list[Score]:
    """The mean of all training patches, and the mean of those at the same place of their image."""
    train = data.train.whole()
    sums = sum(_patches(net, batch).double().sum(0) for batch in train.batches(settings.batch))
    here = cast(Tensor, sums) / len(train)
    return [
        Score(name, _mean([_errors(net, b, mask, value) for b, mask in masks(net, data.validation, settings)]))
        for name, value in (("mean patch", here.mean(0)), ("mean patch of the same place", here))
    ]


def _patches(net: Net, batch: Split) -> Tensor:
    return cast(Any, net).patches(*losses.arguments(net, batch.inputs))
