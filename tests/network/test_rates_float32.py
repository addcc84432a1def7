"""Coding rates of features of any size in float32, against float64: beside a large a X X' the I of I + a X X' must not be lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself
SHAPES = {"fewer samples than features": (20, 32), "fewer in a class": (60, 32), "more": (120, 16)}


def rate(z: Tensor, w: Tensor) -> Tensor:
    """log det(I + d / (eps2 sum w) Z diag(w) Z')."""
    d = z.shape[-1]
    return torch.logdet(torch.eye(d, dtype=D) + d / (0.5 * w.sum()) * z.mT @ (w[:, None] * z))


def by_hand(z: Tensor, members: Tensor) -> Tensor:
    n = len(z)
    return -rate(z, torch.ones(n, dtype=D)) / 2 + sum(w.sum() / (2 * n) * rate(z, w) for w in members)  # type: ignore[return-value]


def drawn(shape: str, memberships: str) -> tuple[Tensor, Tensor]:
    g, (n, d) = torch.Generator().manual_seed(1), SHAPES[shape]
    z = torch.randn(n, d, generator=g)
    if shape == "more":  # features that collapsed to a plane for each class
        z = torch.cat([torch.randn(n // 4, 2, generator=g) @ torch.randn(2, d, generator=g) for _ in range(4)])
    labels = torch.nn.functional.one_hot(torch.arange(n) * 4 // n, 4).T.float()
    return z, labels if memberships == "labels" else torch.rand(4, n, generator=g)


SQUARE_ROOT = {
    "dims": {"d": "features", "N": "samples", "K": "classes"}, "variables": {"Z": ["d", "N"]},
    "inputs": {"Pi": {"family": "K", "shape": ["N"], "positive": True}},
    "maximize": "1/2 * logdet(I(d) + d/(N*0.5) * Z @ Z.T) - sum(sum(Pi[k])/(2*N) * logdet(I(d) + d/0.5 / sum(Pi[k]) * (Z @ diag(sqrt(Pi[k])) @ diag(sqrt(Pi[k])) @ Z.T)) for k in K)",
}  # fmt: skip


@pytest.mark.parametrize("spec", ["mcr2", "rate_reduction", SQUARE_ROOT], ids=["mcr2", "rate_reduction", "sqrt"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memberships", ["labels", "soft"])
def test_value_and_gradient_in_float32_are_those_of_float64(spec: Any, shape: str, memberships: str) -> None:
    loss = unroll.loss(spec, scalars={} if spec is SQUARE_ROOT else {"eps2": 0.5})
    z, members = drawn(shape, memberships)
    for scale in (1e-3, 1.0, 100.0, 1e4):
        ours, theirs = (scale * z).requires_grad_(), (scale * z).double().requires_grad_()
        value, want = loss(ours, members), by_hand(theirs, members.double())
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), want, rtol=1e-5, atol=1e-6)
        a, b = torch.autograd.grad(value, ours)[0].double(), torch.autograd.grad(want, theirs)[0]
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_what_weighs_nothing_still_has_a_slope() -> None:
    """Samples that a class leaves out are not computed with, unless the memberships themselves are differentiated."""
    loss, (z, members) = unroll.loss("mcr2"), drawn("fewer in a class", "labels")
    z, members = z.double(), members.double()
    f = lambda m: loss(z, m)
    want = torch.autograd.grad(by_hand(z, p := members.clone().requires_grad_()), p)[0]
    assert torch.allclose(torch.func.grad(f)(members), want, atol=1e-9)
    way = torch.randn(members.shape, generator=torch.Generator().manual_seed(0), dtype=D)
    assert torch.allclose(torch.func.jvp(f, (members,), (way,))[1], (want * way).sum(), atol=1e-9)
    mapped = torch.func.vmap(loss)(z.expand(2, -1, -1), members.expand(2, -1, -1))
    assert torch.allclose(mapped, loss(z, members).expand(2))


def test_the_objective_of_a_network_is_worked_out_as_well() -> None:
    net = unroll.compile("crate_exact", dims={"d": 16, "K": 2, "p": 8}, overrides=["unroll.layers=1"])
    z = 1e3 * torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 16)
    terms, wide = net.objective(Z=z, X=z), net.to(D).objective(Z=z.double(), X=z.double())
    assert terms["compression"].dtype == torch.float32
    assert torch.allclose(terms["compression"].double(), wide["compression"], rtol=1e-5)
