"""The sorted 1-norm: its prox against CVXPY, an oracle that pools pair by pair, and differences; its value, its weights, its kin."""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unroll
from unroll.emit.text import helper, imports, needed
from unroll.network.evaluate import project

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself


def emitted(name: str) -> Any:
    text = "\n\n".join(map(helper, needed([name])))
    module: dict[str, Any] = {}
    exec(f"{imports(text)}\n\n{text}", module)
    return module[name]


prox = emitted("prox_sorted_l1")


def drawn(kind: str = "usual", n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    v, w = 2 * torch.randn(6, n, generator=g, dtype=D), torch.rand(n, generator=g, dtype=D).sort(descending=True).values
    if kind == "ties":
        v, w = v.round(), w.round(decimals=1)
    if kind == "steep":  # pooled one after the other
        v, w = torch.arange(n, 0, -1, dtype=D).expand(6, n) / n, 4 * torch.arange(n, 0, -1, dtype=D).square() / n**2
    v = v * {"tiny": 1e-6, "large": 1e6}.get(kind, 1)
    w = w * {"tiny": 1e-6, "large": 1e6}.get(kind, 1)
    v = v.clone()
    v[1] = 0
    return v, w


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 12, 60])
@pytest.mark.parametrize("kind", ["usual", "ties", "steep", "tiny", "large"])
def test_it_is_what_pooling_pair_by_pair_gives(kind: str, n: int, dtype: torch.dtype) -> None:
    v, w = drawn(kind, n)
    found = prox(v.to(dtype), w.to(dtype))
    want = project("sorted_l1", v.to(dtype).to(D).T, [w.to(dtype).to(D)[:, None]]).T
    assert found.dtype == dtype and (found[1] == 0).all()
    assert (found.to(D) - want).abs().max() <= 32 * torch.finfo(dtype).eps * float(v.abs().max() + w.max())


def test_it_is_that_of_cvxpy() -> None:
    v, w = drawn()
    fall = np.append(-np.diff(w.numpy()), w[-1].item())
    for sample, found in zip(v[2:5], prox(v, w)[2:5], strict=True):
        z = cp.Variable(12)
        cost = (
            sum(fall[k] * cp.sum_largest(cp.abs(z), k + 1) for k in range(12)) + cp.sum_squares(z - sample.numpy()) / 2
        )
        cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10)
        assert np.abs(z.value - found.numpy()).max() < 1e-5


def test_derivatives_are_those_of_differences_twice_and_in_forward_mode() -> None:
    v, w = drawn(n=5)
    given = (v[2:4].requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(prox, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(prox, given)


def test_magnitudes_that_meet_move_as_one() -> None:
    slope = torch.autograd.functional.jacobian(
        lambda v: prox(v, torch.tensor([2.0, 0.0], dtype=D)), torch.tensor([3.0, -2.0], dtype=D)
    )
    assert torch.equal(slope, torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=D))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["usual", "ties", "steep"])
def test_compiled_and_mapped_it_is_the_same_to_rounding(kind: str) -> None:
    v, w = drawn(kind)
    torch.testing.assert_close(torch.func.vmap(prox, in_dims=(0, None))(v, w), prox(v, w), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.compile(prox, fullgraph=True, backend="eager")(v, w), prox(v, w), rtol=1e-12, atol=1e-12
    )


def test_oscar_weighs_the_larger_of_each_pair() -> None:
    z = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=D)
    loss = unroll.loss({"dims": {"n": 7}, "variables": {"z": ["n"]}, "minimize": {"f": "oscar(z, 0.3, 0.2)"}})
    want = 0.3 * z.abs().sum(-1) + 0.2 * sum(
        torch.maximum(z[:, i].abs(), z[:, j].abs()) for i, j in combinations(range(7), 2)
    )
    torch.testing.assert_close(loss.terms(z)["f"], want)


def test_slope_is_solved_to_a_certified_gap_and_oscar_is_slope_with_its_weights() -> None:
    g = torch.Generator().manual_seed(0)
    a, x = torch.randn(10, 7, generator=g, dtype=D), torch.randn(3, 10, generator=g, dtype=D)
    w = 0.3 + 0.2 * torch.arange(6, -1, -1, dtype=D)
    ours = unroll.solve({"use": "slope", "dims": {"m": 10, "n": 7}}, x, parameters={"A": a, "w": w}, tol=1e-10)
    assert ours.certified and ours.converged.all()
    spec = {
        "dims": {"m": 10, "n": 7}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "oscar(z, 0.3, 0.2)"},
    }  # fmt: skip
    torch.testing.assert_close(unroll.solve(spec, x, parameters={"A": a}, tol=1e-10).z, ours.z, rtol=1e-4, atol=1e-4)
    fall = np.append(-np.diff(w.numpy()), w[-1].item())
    for sample, found in zip(x.numpy(), ours.objective, strict=True):
        z = cp.Variable(7)
        cost = (
            sum(fall[k] * cp.sum_largest(cp.abs(z), k + 1) for k in range(7))
            + cp.sum_squares(a.numpy() @ z - sample) / 2
        )
        assert abs(cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL) - found) < 1e-6


def slope(w: Tensor) -> Any:
    parts = {"use": "slope", "dims": {"m": 3, "n": 4}, "unroll": {"algorithm": "fista", "layers": 1}}
    return unroll.compile(parts, parameters={"A": torch.ones(3, 4), "w": w})


@pytest.mark.parametrize(("weights", "why"), [([1.0, 2, 3, 4], "rise"), ([1.0, 1, 0, -1], "declared positive")])
def test_weights_that_rise_or_are_negative_are_refused(weights: list[float], why: str) -> None:
    slope(torch.tensor([4.0, 3, 3, 0]))
    with pytest.raises(unroll.UnrollError, match=why):
        slope(torch.tensor(weights))


@pytest.mark.parametrize(
    "term", ["sorted_l1(z, w)", "-sorted_l1(z, p)", "sorted_l1(z, 1 / p)", "sorted_l1(z - p, p)", "sum(sort(z) * p)"]
)
def test_what_is_not_known_to_be_convex_is_refused(term: str) -> None:
    spec = {
        "dims": {"n": 4}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "parameters": {"w": ["n"], "p": {"shape": ["n"], "positive": True}},
        "minimize": {"f": "1/2*sumsq(x - z)", "g": term}, "unroll": {"algorithm": "proximal_gradient", "layers": 1},
    }  # fmt: skip
    with pytest.raises(unroll.UnrollError, match="E30"):
        unroll.derive(spec)
