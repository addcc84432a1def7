"""A learned number is kept positive where the step is right for positive ones alone; elsewhere it is free."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError

D = torch.float64
PROX = {"z": "prox(c * g / lam, v)"}
FOLLOWED = {"theta": "c * norm1(A @ z - x)", "half": "theta / 2", "z": "prox(half * g / lam, v)"}


def lasso(learn: dict[str, Any], updates: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    unrolled = {"algorithm": "proximal_gradient", "layers": 2, "learn": {"q": learn}, "updates": updates or {}}
    return {"use": "lasso", "dims": {"m": 6, "n": 9}, "scalars": {"c": 0.05, "lam": 0.1}, "unroll": unrolled, **more}


def moved(spec: dict[str, Any], to: float) -> tuple[Any, Tensor]:
    net: Any = unroll.compile(spec, dtype=D, seed=0)
    with torch.no_grad():
        net.q.fill_(to)
    return net, torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=D)


NEEDED: list[tuple[str, dict[str, str] | None]] = [
    ("step * lam", None), ("lam", None), ("step", None), ("c", PROX), ("c", FOLLOWED),
    ("step * c", {"z": "prox(step * c * g, v)"}),
]  # fmt: skip


@pytest.mark.parametrize(("replaces", "updates"), NEEDED)
def test_the_strength_of_a_proximal_step_is_kept_positive(replaces: str, updates: dict[str, str] | None) -> None:
    """Far below 0, the number is nearly 0, and what the network gives is that with a small one."""
    spec = lasso({"replaces": replaces}, updates)
    assert "> 0" in str(unroll.derive(spec))
    below, x = moved(spec, -20.0)
    small, _ = moved(lasso({"replaces": replaces, "bounds": "clamp(0)"}, updates), math.log1p(math.exp(-20)))
    assert torch.allclose(below(x), small(x), atol=1e-9, rtol=0) and below(x).isfinite().all()


@pytest.mark.parametrize(
    ("replaces", "updates", "says"),
    [*((*n, {"positive": False}) for n in NEEDED), (*NEEDED[0], {"bounds": "box(-1, 2)"})],
)
def test_a_sign_that_is_needed_is_not_given_away(replaces: str, updates: Any, says: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="E306: q may be negative, and the proximal step of") as e:
        unroll.derive(lasso({"replaces": replaces, **says}, updates))
    assert "in the update of z" in str(e.value) and "leave out" in str(e.value)


@pytest.mark.parametrize(
    "updates",
    [
        {"v": "derived + c * z"},
        {"theta": "exp(c) * norm1(A @ z - x)", "z": "prox(theta * g, v)"},
        {"z": "prox(c**2 * g, v)"},
        {"z": "where(abs(v) >= c, v, derived)"},
    ],
)
def test_a_number_whose_sign_is_not_used_is_free(updates: dict[str, str]) -> None:
    spec = lasso({"replaces": "c"}, updates)
    assert "> 0" not in str(unroll.derive(spec))
    net, x = moved(spec, -0.3)
    assert torch.equal(net(x), moved(lasso({"replaces": "c", "positive": False}, updates), -0.3)[0](x))
    fixed = {**spec, "scalars": {"c": {"default": -0.3}, "lam": 0.1}}
    fixed["unroll"] = {**spec["unroll"], "learn": {}}
    assert torch.allclose(net(x), unroll.compile(fixed, dtype=D, seed=0)(x), atol=1e-12)


def test_a_negative_threshold_over_nonnegative_codes_is_that_of_the_term() -> None:
    """theta z over z >= 0 has max(v - theta, 0), also for theta < 0: against a grid."""
    spec = lasso({"replaces": "step * lam"}, constraints=["z >= 0"])
    spec["unroll"]["layers"] = 1
    net, x = moved(spec, -0.2)
    step = 1 / torch.linalg.matrix_norm(net.given["A"], 2) ** 2
    v = step * x @ net.given["A"]
    grid = torch.linspace(0, 8, 80_001, dtype=D)
    cost = -0.2 * grid[:, None] + (grid[:, None] - v.reshape(1, -1)).square() / 2
    assert (net(x).reshape(-1) - grid[cost.argmin(0)]).abs().max() < 1e-4
    assert (v < 0).any()


def test_glista_keeps_its_threshold_positive_by_itself() -> None:
    """With a negative one, shrinking would be growing, and the overshoot would turn round."""
    small = ["dims.m=6", "dims.n=9", "unroll.layers=2"]
    said = unroll.compile("glista", overrides=small, dtype=D, seed=0)
    own: Any = unroll.compile(
        "glista", overrides=[*small, "unroll.learn.theta={replaces: step * lam}"], dtype=D, seed=0
    )
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=D)
    with torch.no_grad():
        own.theta.fill_(-5.0)
        said.theta.fill_(-5.0)  # type: ignore[operator, union-attr]
    assert torch.equal(own(x), said(x))
    with pytest.raises(SpecError, match="E306: theta may be negative"):
        unroll.compile("glista", overrides=[*small, "unroll.learn.theta={replaces: step * lam, positive: false}"])


@pytest.mark.parametrize("held", ["z in ball2(c)", "z in ball1(c)", "z in box(0, c)", "z in box(-c, c)"])
def test_a_ball_keeps_its_radius(held: str) -> None:
    spec = lasso({"replaces": "c"}, minimize={"fidelity": "1/2 * sumsq(x - A @ z)"}, constraints=[held])
    spec["unroll"]["algorithm"] = "projected_gradient"
    net, x = moved(spec, -20.0)
    assert net(x).abs().max() < 1e-8


def test_a_number_is_kept_positive_only_where_that_makes_the_strength_so() -> None:
    """theta = lam - c |r| falls with c: c > 0 would be the wrong sign.  A box may have a lower end below 0."""
    fall = {"theta": "lam - c*norm1(A @ z - x)", "z": "prox(theta*g/lam, v)"}
    spec = {"use": "lasso", "dims": {"m": 4, "n": 6}, "scalars": {"lam": 0.1, "c": 0.05}}
    how = {"algorithm": "proximal_gradient", "layers": 2, "updates": fall, "learn": {"cc": {"replaces": "c"}}}
    assert "cc" in str(unroll.derive({**spec, "unroll": how})) and "> 0" not in str(
        unroll.derive({**spec, "unroll": how})
    )
    box = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "scalars": {"low": -1, "high": 1},
        "minimize": {"f": "1/2*sumsq(x - z)"}, "constraints": ["z in box(low, high)"],
        "unroll": {"algorithm": "projected_gradient", "layers": 1, "step": 1, "learn": {"l": {"replaces": "low"}}},
    }  # fmt: skip
    x = torch.tensor([[-3.0, 0.5, 2.0]])
    assert torch.equal(unroll.compile(box)(x), x.clamp(-1, 1))
