"""Groups of entries of a vector: proximal steps against CVXPY and brute force, slopes, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from torch import Tensor

import unroll
from unroll.calculus.divergence import divergence, planned
from unroll.errors import DeriveError, SpecError
from unroll.language.constructors import add, prox, symbol
from unroll.language.constructors import scale as multiple
from unroll.language.functions import as_expr
from unroll.language.nodes import dim
from unroll.language.parse import Scope, nowhere, parse
from unroll.language.problem import from_spec
from unroll.network.evaluate import Evaluator
from unroll.spec import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

D = torch.float64
S, G = 3, 4
CVXPY: dict[str, Any] = {
    "group_norm(groups(z, s), 0)": lambda z, w: cp.sum([cp.norm(z[i * S : i * S + S], 2) for i in range(G)]),
    "sqrt(3) * group_norm(groups(z, s), 0) + 0.3 * norm1(z)": lambda z, w: (
        3**0.5 * cp.sum([cp.norm(z[i * S : i * S + S], 2) for i in range(G)]) + 0.3 * cp.norm1(z)
    ),
    "norm1(groups(w, s) * groups(z, s))": lambda z, w: cp.norm1(cp.multiply(w, z)),
    "sum(max_entry(abs(groups(z, s)), axis=0))": lambda z, w: cp.sum(
        [cp.norm_inf(z[i * S : i * S + S]) for i in range(G)]
    ),
    "group_norm(groups(z, s), 1)": lambda z, w: cp.sum([cp.norm(z[i::S], 2) for i in range(S)]),
    "tv(groups(z, s))": lambda z, w: cp.sum([cp.tv(z[i * S : i * S + S]) for i in range(G)]),
    "group_norm(groups(P @ z, s), 0)": None,
}


def spec(term: str, constraints: tuple[str, ...] = (), sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """z <- the proximal step at x, at once: the step of 1/2 |z - x|^2 + 0.4 f from anywhere."""
    return {"dims": sizes or {"s": S, "g": G}, "variables": {"z": ["g*s"]}, "inputs": {"x": ["g*s"]},
            "parameters": {"w": {"shape": ["g*s"], "positive": True}, "P": {"shape": ["g*s", "g*s"], "orthonormal": True}},
            "minimize": {"fit": "1/2 * sumsq(z - x)", "f": f"0.4 * ({term})"}, "constraints": list(constraints),
            "unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": 1}}  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize(
    ("term", "constraints"), [*((term, ()) for term in CVXPY), *((term, ("z >= 0",)) for term in list(CVXPY)[:3])]
)
def test_the_step_is_that_of_cvxpy(term: str, constraints: tuple[str, ...]) -> None:
    net: Any = unroll.compile(spec(term, constraints), dtype=D, seed=0)
    x = drawn(5, S * G)
    x[1], x[2, :S] = 0, 0.01  # blank; a group that becomes 0
    w, turn = (net.given[n].numpy() for n in ("w", "P"))
    for v, found in zip(x.numpy(), net(x).detach().numpy(), strict=True):
        z = cp.Variable(S * G)
        f = CVXPY[term](z, w) if CVXPY[term] else CVXPY["group_norm(groups(z, s), 0)"](turn @ z, w)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(z - v) / 2 + 0.4 * f), [z >= 0] if constraints else [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        np.testing.assert_allclose(found, z.value, atol=1e-4)  # its own tolerance is one of costs
        theirs, z.value = problem.value, found
        assert problem.objective.value <= theirs + 1e-9


def test_no_point_near_it_is_better_and_groups_are_cut_off_whole() -> None:
    net: Any = unroll.compile(spec("group_norm(groups(z, s), 0)"), dtype=D)
    x = drawn(3, S * G) / 3
    z = net(x)
    cost = lambda z: 0.4 * z.unflatten(-1, (G, S)).norm(dim=-1).sum(-1) + (z - x).square().sum(-1) / 2
    for size in (1e-3, 1e-2, 0.1, 1):
        for seed in range(20):
            assert bool((cost(z) <= cost(z + size * drawn(3, S * G, seed=seed)) + 1e-12).all())
    zero = z.unflatten(-1, (G, S)) == 0
    assert bool((zero.all(-1) == zero.any(-1)).all()) and 0 < int(zero.sum()) < zero.numel()
    lengths = x.unflatten(-1, (G, S)).norm(dim=-1, keepdim=True)
    want = x.unflatten(-1, (G, S)) * (1 - 0.4 / lengths).clamp_min(0)
    assert torch.allclose(z, want.flatten(-2), atol=1e-12)


def test_slopes_are_0_at_a_group_of_zeros_and_right_elsewhere() -> None:
    x = drawn(3, S * G).requires_grad_()
    net: Any = unroll.compile(spec("group_norm(groups(z, s), 0)"), dtype=D)
    assert torch.autograd.gradcheck(lambda x: net(x), (x,))
    z = drawn(S * G)
    z[:S] = 0
    z.requires_grad_()
    (slope,) = torch.autograd.grad(net.objective(z=z, x=0 * z.detach())["f"], z)
    assert torch.equal(slope[:S], torch.zeros(S, dtype=D))
    rest = z.detach()[S:].unflatten(-1, (G - 1, S))
    assert torch.allclose(slope[S:], 0.4 * (rest / rest.norm(dim=-1, keepdim=True)).flatten())


@pytest.mark.parametrize(("s", "g"), [(1, 4), (4, 1), (1, 1), (2, 3)])
def test_groups_of_one_entry_and_one_group(s: int, g: int) -> None:
    net: Any = unroll.compile(spec("group_norm(groups(z, s), 0)", sizes={"s": s, "g": g}), dtype=torch.float32)
    x = drawn(5, s * g).float()
    x[1] = 0
    for unit in (1e-6, 1.0, 1e6):
        v = (unit * x).requires_grad_()
        lengths = v.unflatten(-1, (g, s)).norm(dim=-1, keepdim=True)
        want = v.unflatten(-1, (g, s)) * (1 - 0.4 / torch.where(lengths == 0, 1, lengths)).clamp_min(0)
        assert torch.allclose(net(v), want.flatten(-2), rtol=1e-5, atol=1e-6 * unit)
        (slope,) = torch.autograd.grad(net(v).sum(), v)
        assert bool(slope.isfinite().all())
    assert net(x[:0]).shape == (0, s * g)


def test_the_adjoint_undoes_it() -> None:
    s = spec("1/2 * sumsq(groups_T(groups(z, s), s) - z) + 1/2 * sumsq(groups(z, s) - groups(x, s))")
    s["unroll"] = {"algorithm": "gradient_descent", "layers": 1}
    net: Any = unroll.compile(s, dtype=D)
    assert torch.allclose(
        net(drawn(2, S * G)), drawn(2, S * G), atol=1e-12
    )  # the Hessian is (1 + 0.4) I, and the least at x
    assert unroll.check(spec("group_norm(groups(z, s), 0) + norm1(z)")).ok
    s = spec("group_norm(groups(z, s), 0)")
    s["unroll"] = {"algorithm": "admm", "layers": 3}
    assert unroll.check(s).ok


def test_what_is_no_cut_is_refused() -> None:
    with pytest.raises((DeriveError, SpecError), match="overlap"):
        unroll.compile(spec("group_norm(groups(z, s), 0) + group_norm(groups(z, g), 0)"))
    with pytest.raises(SpecError, match="not a multiple"):
        unroll.compile({**spec("group_norm(groups(z, s), 0)"), "variables": {"z": ["n"]}, "inputs": {"x": ["n"]},
                        "parameters": {}, "dims": {"s": 3, "n": 12}})  # fmt: skip
    swept = spec("group_norm(groups(z, s), 0)")
    swept["unroll"] = {"algorithm": "coordinate_descent", "layers": 1}
    with pytest.raises(SpecError, match="joins entries of z to groups"):
        unroll.compile(swept)
    with pytest.raises(SpecError, match="vector is needed"):
        unroll.compile(spec("group_norm(groups(P, s), 0) + norm1(z)"))


@pytest.mark.parametrize(
    ("term", "same"),
    [
        ("norm1(groups(z, s))", "norm1(z)"),
        ("sum(huber(groups(z - w, s), 1))", "sum(huber(z - w, 1))"),
        ("norm1(groups(w, s) * groups(z, s))", "norm1(w * z)"),
        ("norm1(groups_T(groups(z, s) + ones(s, g), s))", "norm1(groups(z, s) + ones(s, g))"),
        ("norm_inf(groups(z, s))", "norm_inf(z)"),
        ("group_norm(groups(z, g*s), 0)", "norm2(z)"),
        ("group_norm(groups(z, 1), 1)", "norm2(z)"),
        ("sumsq(groups(z, s)) + logsumexp(groups(z, s))", "sumsq(z) + logsumexp(z)"),
    ],
)
def test_what_does_not_ask_where_an_entry_stands_sees_through(term: str, same: str) -> None:
    found, wanted = (from_spec(load(spec(t))).terms["f"] for t in (term, same))
    assert found is wanted


def test_entries_of_groups_are_entries_for_a_function_and_for_a_sweep() -> None:
    s = spec("norm1(groups(z, s))")
    s["unroll"]["learn"] = {"phi": {"replaces": "prox", "function": {"knots": 11, "range": [-1, 1]}}}
    assert "phi(step" in str(unroll.derive(s).step.assigns[0].value)
    s["unroll"]["algorithm"] = "coordinate_descent"
    del s["unroll"]["learn"], s["unroll"]["step"]
    net: Any = unroll.compile(s, dtype=D, seed=0)
    x = drawn(5, S * G)
    assert torch.allclose(net(x), x.sign() * (x.abs() - 0.4).clamp_min(0))


def test_numbers_of_entries_are_of_a_size_that_is_a_product_and_none_of_groups() -> None:
    s = spec("norm1(groups(z, s))")
    learned: dict[str, Any] = {"replaces": "step", "shape": ["g*s"], "where": "prox"}
    s["unroll"]["learn"] = {"th": learned}
    net: Any = unroll.compile(s, dtype=D, seed=0)
    x = drawn(5, S * G)
    assert net.th.shape == (1, S * G)
    assert torch.allclose(net(x), x.sign() * (x.abs() - 0.4).clamp_min(0))
    s["unroll"]["learn"] = {"phi": {"replaces": "prox", "shape": ["g*s"], "function": {"knots": 5, "range": [-1, 1]}}}
    assert unroll.compile(s, dtype=D, seed=0)(x).shape == x.shape  # type: ignore[operator]
    for term in ("group_norm(groups(z, s), 0)", "norm2(z)"):
        s = spec(term)
        s["unroll"]["learn"] = {"th": learned}
        with pytest.raises(SpecError, match="several entries share one"):
            unroll.compile(s)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("term", ["group_norm(groups(z, s), 0)", "tv(groups(z, s))", "group_norm(groups(z, s), 1)"])
def test_the_divergence_of_a_step_is_the_trace_of_its_jacobian(term: str, scale: float) -> None:
    """The step of 0.4 f at 2 r + x, against automatic differentiation."""
    size, groups = dim("s"), dim("g")
    z, r, x = (symbol(name, groups * size, 1, "state") for name in ("z", "r", "x"))
    f = as_expr(parse(term, Scope({"z": z, "s": size, "g": groups}), nowhere))
    e = planned(prox(f, z, sp.Rational(2, 5), add(multiple(2, r), x)))
    point, shift = scale * drawn(S * G, 1), scale * drawn(S * G, 1, seed=1)
    value = lambda e, v: Evaluator({r: v, x: shift}, {size: S, groups: G}, {})(e)
    jacobian = torch.autograd.functional.jacobian(lambda v: value(e, v), point).squeeze()
    found = value(divergence(e, r), point).squeeze()
    torch.testing.assert_close(found, jacobian.trace(), rtol=1e-9, atol=1e-9)
    assert abs(float(found)) > 0.1 or scale < 1


def test_a_text_with_onsagers_term_takes_groups() -> None:
    s = spec("group_norm(groups(z, s), 0)")
    s |= {"parameters": {"A": ["m", "g*s"]}, "inputs": {"x": ["m"]}, "dims": {"m": 8, "s": S, "g": G}}
    s["minimize"]["fit"] = "1/2 * sumsq(x - A @ z)"
    s["unroll"] = {"algorithm": "amp", "layers": 2}
    net: Any = unroll.compile(s, dtype=D, seed=0)
    assert bool(net(drawn(3, 8)).isfinite().all())
