"""Proximal steps of entries that one equation joins: against CVXPY, their optimality conditions, closed forms, and with all derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unroll

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself
LAM, LOW, HIGH = 0.3, -0.5, 0.7


def step(term: str, *constraints: str, n: int = 5, learn: str = "", dtype: torch.dtype = D, **numbers: float) -> Any:
    """argmin over z of term + |z - x|^2 / 2: one layer with a step of 1."""
    spec = {
        "dims": {"n": n}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"], "w": ["n"], "p": {"shape": ["n"], "positive": True}},
        "scalars": {"lam": {"default": LAM, "positive": True}, "low": LOW, "high": HIGH},
        "minimize": {"f": "1/2*sumsq(z - x)", **({"g": term} if term else {})},
        "constraints": list(constraints),
        "unroll": {
            "algorithm": "proximal_gradient", "layers": 1, "step": 1, **({"split": {"g": ["g"]}} if term else {}),
            **({"learn": {f"learned_{learn}": {"replaces": learn}}} if learn else {}),
        },
    }  # fmt: skip
    net = unroll.compile(spec, dtype=dtype, scalars=numbers)
    return partial(_run, net=net)


def _run(x: Tensor, w: Tensor, p: Tensor, net: Any) -> Tensor:
    return net(x=x, w=w, p=p)


Case = tuple[tuple[str, ...], Callable[..., Any], Callable[..., list[Any]]]
CASES: dict[str, Case] = {
    "capped simplex": (("", "z in simplex", "z <= high"), lambda z, w, p: 0, lambda z, w, p: [z >= 0, z <= HIGH, cp.sum(z) == 1]),
    "simplex(2)": (("", "z in simplex(2)"), lambda z, w, p: 0, lambda z, w, p: [z >= 0, cp.sum(z) == 2]),
    "1-norm on the simplex": (("lam*norm1(z)", "z in simplex"), lambda z, w, p: LAM * cp.norm1(z), lambda z, w, p: [z >= 0, cp.sum(z) == 1]),
    "squares on the simplex": (("sum(p*(z - w)**2)", "z in simplex"), lambda z, w, p: cp.sum(cp.multiply(p, cp.square(z - w))), lambda z, w, p: [z >= 0, cp.sum(z) == 1]),
    "box and plane": (("", "low <= z <= high", "dot(w, z) == lam"), lambda z, w, p: 0, lambda z, w, p: [z >= LOW, z <= HIGH, w @ z == LAM]),
    "half line and plane": (("", "z >= low", "dot(w, z) == lam"), lambda z, w, p: 0, lambda z, w, p: [z >= LOW, w @ z == LAM]),
    "other half line and plane": (("", "z <= high", "dot(w, z) == lam"), lambda z, w, p: 0, lambda z, w, p: [z <= HIGH, w @ z == LAM]),
    "weighted": (("lam*norm1(z)", "z >= 0", "dot(p, z) == 2"), lambda z, w, p: LAM * cp.norm1(z), lambda z, w, p: [z >= 0, p @ z == 2]),
    "1-norm and plane": (("lam*norm1(z - w)", "sum(z) == 2"), lambda z, w, p: LAM * cp.norm1(z - w), lambda z, w, p: [cp.sum(z) == 2]),
    "huber and plane": (("sum(huber(z, lam))", "dot(w, z) == -1"), lambda z, w, p: cp.sum(cp.huber(z, LAM)) / 2, lambda z, w, p: [w @ z == -1]),
    "tilt": (("dot(w, z)", "z in simplex", "z <= high"), lambda z, w, p: w @ z, lambda z, w, p: [z >= 0, z <= HIGH, cp.sum(z) == 1]),
    "entropy": (("lam*sum(z*log(z))", "z in simplex"), lambda z, w, p: -LAM * cp.sum(cp.entr(z)), lambda z, w, p: [cp.sum(z) == 1]),
    "1-norm ball, no entry below 0": (("", "z in ball1(1)", "z >= 0"), lambda z, w, p: 0, lambda z, w, p: [z >= 0, cp.sum(z) <= 1]),
    "1-norm ball in a box": (("", "z in ball1(1)", "0 <= z <= high"), lambda z, w, p: 0, lambda z, w, p: [z >= 0, z <= HIGH, cp.sum(z) <= 1]),
    "ball, no entry below 0": (("lam*norm1(z)", "z in ball2(1)", "z >= 0"), lambda z, w, p: LAM * cp.norm1(z), lambda z, w, p: [z >= 0, cp.norm(z) <= 1]),
}  # fmt: skip
INACCURATE = {"entropy": 1e-4, "ball, no entry below 0": 1e-5}


def drawn(seed: int = 0, batch: int = 4, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w, p = (torch.randn(batch, n, generator=g, dtype=D) for _ in range(3))
    w[:, 0], w[:, 1] = w[:, 0].abs() + 0.5, -w[:, 1].abs() - 0.5  # so that every equation can be met
    return 2 * x, w, p.abs() + 0.1


@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_cvxpy(name: str) -> None:
    formulas, cost, sets = CASES[name]
    given = drawn()
    for found, *sample in zip(step(*formulas)(*given), *given, strict=True):
        x, w, p = (s.numpy() for s in sample)
        z = cp.Variable(5)
        problem = cp.Problem(cp.Minimize(cost(z, w, p) + cp.sum_squares(z - x) / 2), sets(z, w, p))
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        assert np.abs(z.value - found.numpy()).max() < INACCURATE.get(name, 1e-6)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["usual", "ties", "zero"])
def test_the_capped_simplex_is_exact_to_rounding(kind: str, unit: float, dtype: torch.dtype) -> None:
    """All free entries have moved by one number, those at a bound by at least that much or at most; and the sum is right."""
    x = (
        unit
        * {"usual": drawn(1, n=40)[0], "ties": drawn(1, n=40)[0].round(), "zero": torch.zeros(4, 40, dtype=D)}[kind]
    )
    high = 0.07
    z = step("", "z in simplex", "z <= high", n=40, dtype=dtype, high=high)(x.to(dtype), x.to(dtype), x.to(dtype))
    tol = 64 * torch.finfo(dtype).eps * max(1, unit)
    high, moved = z.new_tensor(high), x - z.to(D)
    low_end, high_end = z == 0, z == high
    free = ~(low_end | high_end)
    assert (z >= 0).all() and (z <= high).all() and ((z.to(D).sum(-1) - 1).abs() <= 40 * tol).all()
    for m, a, b, c in zip(moved, free, low_end, high_end, strict=True):
        least, most = (m[a].min(), m[a].max()) if a.any() else (m[c].min(), m[b].max())
        assert most - least <= tol or not a.any()
        assert (m[b] <= least + tol).all() and (m[c] >= most - tol).all()


def test_entropy_on_the_simplex_is_softmax_where_the_square_does_not_count() -> None:
    """argmin of <c, z> + sum(z log z) on the simplex is softmax(-c)."""
    c, _, p = drawn(2)
    much = 1e9
    found = step("lam*sum(z*log(z)) + lam*dot(w, z)", "z in simplex", lam=much)(torch.zeros_like(c), c, p)
    torch.testing.assert_close(found, (-c).softmax(-1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    ["capped simplex", "weighted", "huber and plane", "entropy"],
)
def test_its_derivatives_are_those_of_differences_twice_and_in_forward_mode(name: str) -> None:
    run = step(*CASES[name][0], n=4)
    given = tuple(s.requires_grad_() for s in drawn(3, batch=1, n=4))
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, atol=1e-5, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", ["capped simplex"])
def test_mapped_and_compiled_it_is_the_same(name: str) -> None:
    run, given = step(*CASES[name][0]), drawn(4)
    torch.testing.assert_close(torch.func.vmap(run)(*given), run(*given))
    slope = lambda x, w, p: torch.func.grad(lambda x: run(x, w, p).square().sum())(x)
    torch.testing.assert_close(torch.func.vmap(slope)(*given), slope(*given))
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), run(*given))


def test_a_cap_that_is_learned_has_the_slope_of_differences() -> None:
    x = drawn(5)[0]
    run = lambda high: step("", "z in simplex", "z <= high", high=high)(x, x, x).square().sum()
    learned = step("", "z in simplex", "z <= high", learn="high")
    learned(x, x, x).square().sum().backward()
    (slope,) = (p.grad for p in learned.keywords["net"].parameters())
    wanted = float(run(HIGH + 1e-6) - run(HIGH - 1e-6)) / 2e-6
    assert slope is not None and abs(float(slope) - wanted) < 1e-6


@pytest.mark.parametrize(
    ("constraints", "why"),
    [
        (("z in simplex", "z <= 0.1"), "sums to 0 to 0.5"), (("z in simplex(6)", "z <= 1"), "sums to 0 to 5"), (("z in simplex(-1)",), "cannot sum to -1"),
        (("sum(z) == -3", "z >= low"), "sums to -2.5 to inf"), (("sum(z) == 1", "2 <= z <= 3"), "sums to 10 to 15"),
    ],
)  # fmt: skip
def test_what_no_point_fulfils_is_refused(constraints: tuple[str, ...], why: str) -> None:
    with pytest.raises(unroll.UnrollError, match=why):
        step("", *constraints)


@pytest.mark.parametrize("term", ["lam*norm0(z)", "sum(log(1 + abs(z)))"])
def test_an_equation_with_what_is_not_convex_is_refused(term: str) -> None:
    with pytest.raises(unroll.UnrollError, match="not convex"):
        step(term, "sum(z) == 1")


def test_weights_of_both_signs_with_what_has_no_slope_at_its_end_are_refused() -> None:
    with pytest.raises(unroll.UnrollError, match="both signs"):
        step("sum(z*log(z))", "dot(w, z) == 1")


def test_each_column_of_a_matrix_fulfils_the_equation_by_itself() -> None:
    spec = {
        "dims": {"n": 5, "T": 3}, "variables": {"Z": ["n", "T"]}, "inputs": {"X": ["n", "T"]}, "minimize": {"f": "1/2*sumsq(Z - X)"},
        "constraints": ["Z in simplex(2)", "Z <= 0.7"], "unroll": {"algorithm": "projected_gradient", "layers": 1, "step": 1},
    }  # fmt: skip
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    alone = step("", "z in simplex(2)", "z <= high")
    torch.testing.assert_close(unroll.compile(spec, dtype=D)(x), alone(x, x, x))


@pytest.mark.parametrize("base", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("term", ["", "lam*norm1(z)", "lam*sum(z*log(z))"])
def test_what_all_entries_share_costs_no_digits(term: str, base: float) -> None:
    """Of float32: a point far from the set has the answer that it has near it."""
    near = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0]])
    run = step(term, "z in simplex", "z <= 0.9", dtype=torch.float32)
    w = torch.ones_like(near)
    torch.testing.assert_close(run(near + base, w, w), run(near, w, w), rtol=0, atol=1e-5)
    assert abs(float(run(near + base, w, w).sum()) - 1) < 1e-5


def test_a_ball_that_the_bounds_leave_no_point_of_is_refused() -> None:
    with pytest.raises(unroll.UnrollError, match="sums to 1.5 to 2"):
        step("", "z in ball1(1)", "0.3 <= z <= 0.4")
    z = step("", "z in ball1(1.6)", "0.3 <= z <= 0.4")(*drawn())
    assert (z >= 0.3).all() and (z <= 0.4).all() and (z.sum(-1) <= 1.6 + 1e-12).all() and (z.sum(-1) > 1.5).any()


def test_sums_of_rows_with_bounds_are_those_of_columns_of_the_transpose() -> None:
    def net(sets: list[str], n: int, T: int) -> Any:
        spec = {
            "dims": {"n": n, "T": T},
            "variables": {"Z": ["n", "T"]},
            "inputs": {"X": ["n", "T"]},
            "minimize": {"f": "1/2*sumsq(Z - X)"},
        }
        return unroll.compile({**spec, "constraints": sets, "unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": 1}}, dtype=D)  # fmt: skip

    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    columns = net(["sum(Z, axis=0) == 1", "Z >= 0", "Z <= 0.6"], 4, 4)(x)
    rows = net(["sum(Z, axis=1) == 1", "Z >= 0", "Z <= 0.6"], 4, 4)(x.mT).mT
    torch.testing.assert_close(rows, columns)
    assert torch.allclose(columns.sum(-1), torch.ones(2, 4, dtype=D)) and (columns <= 0.6).all()
