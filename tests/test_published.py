"""The published networks: as many parameters as the papers say, and the outputs of modules written by hand for their weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from released_counts import PUBLISHED
from torch import Tensor

import unroll

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _experts

EXACT = 1e-10
SMALL = ["model.embed.image=[3, 32, 32]", "model.head.classes=7", "unroll.layers=2"]


def count(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())


def expert(**sizes: int) -> _experts.Crate:
    """A module written by hand, every weight of it drawn: norms and biases too."""
    made = _experts.Crate(side=32, classes=7, layers=2, **sizes).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype) + ("norm.weight" in name))
    return made


def pictures(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_crate_has_as_many_parameters_as_published(size: str) -> None:
    shapes, exactly, millions = PUBLISHED[f"crate {size}"]
    assert count(unroll.compile(f"crate_{size}")) == exactly == sum(torch.Size(s).numel() for s in shapes.values())
    assert round(exactly / 1e6, 2) == millions


@pytest.mark.parametrize(("size", "d", "K"), [("tiny", 384, 6), ("small", 576, 12)])
def test_released_weights_of_crate_give_the_released_answer(size: str, d: int, K: int) -> None:
    net, by_hand, x = unroll.compile(f"crate_{size}", dtype=torch.float64, overrides=SMALL), expert(d=d, K=K), pictures()
    before = net(x)
    assert unroll.restore_weights(net, {"state_dict": {f"module.{k}": v for k, v in by_hand.state_dict().items()}}).ok
    assert (net(x) - by_hand(x)).abs().max() <= EXACT < (net(x) - before).abs().max()
    again = unroll.release_weights(net)
    assert again.keys() == by_hand.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in by_hand.state_dict().items())
