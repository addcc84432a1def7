"""Sweeps over entries: against scikit-learn's coordinate descent, loops by hand and CVXPY; where the quadratic reads nothing; what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet
from torch import Tensor

import unroll
from unroll.errors import UnrollError

Spec = dict[str, Any]
M, N = 6, 4
FIT = "1/2*sumsq(x - A @ z)"
L1 = {"fit": FIT, "s": "lam*norm1(z)"}
LAM, MU = 0.3, 0.2


def spec(minimize: dict[str, str], **more: Any) -> Spec:
    whole: Spec = {
        "dims": {"m": M, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": LAM, "mu": MU}, "minimize": minimize, "unroll": {"algorithm": "coordinate_descent", "layers": 3},
    }  # fmt: skip
    return {**whole, **more}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(minimize: dict[str, str], a: Tensor | None = None, **more: Any) -> Any:
    given = {"A": drawn(M, N) if a is None else a, **more.pop("given", {})}
    return unroll.compile(spec(minimize, **more), parameters=given, dtype=torch.float64)


# --- the iterates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2, 7])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_each_pass_is_that_of_scikit_learn(mu: float, positive: bool, passes: int) -> None:
    m, n = 12, 9
    a, x = drawn(m, n), drawn(m, seed=1)
    ridge = {"r": "mu/2*sumsq(z)"} if mu else {}
    net = network(
        {**L1, **ridge},
        a,
        dims={"m": m, "n": n},
        scalars={"lam": LAM, "mu": mu},
        constraints=["z >= 0"] if positive else [],
    )
    alpha = (LAM + mu) / m
    other = ElasticNet(alpha, l1_ratio=LAM / (LAM + mu), fit_intercept=False, positive=positive, max_iter=passes, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        other.fit(a.numpy(), x.numpy())
    assert np.abs(net(x, layers=passes).numpy() - other.coef_).max() < 1e-10
    assert np.abs(other.coef_).max() > 0.1


Cost = Callable[[float, int], float]
W = drawn(N, seed=5).abs()
COSTS: dict[str, tuple[Spec, Cost, tuple[float, float]]] = {
    "nothing": ({"minimize": {"fit": FIT}}, lambda u, i: 0.0, (-9, 9)),
    "elastic net": ({"minimize": {**L1, "r": "mu/2*sumsq(z)"}}, lambda u, i: LAM * abs(u) + MU / 2 * u * u, (-9, 9)),
    "box": ({"minimize": {"fit": FIT}, "constraints": ["-1/2 <= z <= 1/3"]}, lambda u, i: 0.0, (-0.5, 1 / 3)),
    "box and 1-norm": (
        {"minimize": L1, "scalars": {"lam": LAM, "lo": -0.1, "hi": 0.4}, "constraints": ["z in box(lo, hi)"]},
        lambda u, i: LAM * abs(u),
        (-0.1, 0.4),
    ),
    "not negative": ({"minimize": L1, "constraints": ["z >= 0"]}, lambda u, i: LAM * u, (0, 9)),
    "logarithm": (
        {"minimize": {"fit": FIT, "s": "lam*sum(log(1 + abs(z)/mu))"}},
        lambda u, i: LAM * float(np.log1p(abs(u) / MU)),
        (-9, 9),
    ),
    "of one's own": (
        {"minimize": {"fit": FIT, "s": "lam*sum(z**4) + mu*norm1(z)"}},
        lambda u, i: LAM * u**4 + MU * abs(u),
        (-9, 9),
    ),
    "weights": (
        {
            "minimize": {"fit": FIT, "s": "sum(w*abs(z))"},
            "parameters": {"A": ["m", "n"], "w": {"shape": ["n"], "positive": True}},
            "given": {"w": W},
        },
        lambda u, i: float(W[i]) * abs(u),
        (-9, 9),
    ),
}  # fmt: skip


def least(cost: Callable[[float], float], low: float, high: float) -> float:
    """By a grid, then golden section; the ends and 0, where kinks are, by themselves."""
    grid = np.linspace(low, high, 2001)
    k = int(np.argmin([cost(float(u)) for u in grid]))
    near = grid[max(k - 1, 0)], grid[min(k + 1, len(grid) - 1)]
    found = minimize_scalar(cost, bounds=near, method="bounded", options={"xatol": 1e-12}).x
    return min((float(found), *map(float, near), *([0.0] if low <= 0 <= high else [])), key=cost)


@pytest.mark.parametrize("name", COSTS)
def test_each_entry_goes_to_where_it_is_least_the_others_as_they_are_by_then(name: str) -> None:
    more, cost, ends = COSTS[name]
    more = dict(more)
    a, x, z = drawn(M, N), drawn(2, M, seed=1), drawn(2, N, seed=2).clamp(*ends)
    net = network(more.pop("minimize"), a, **more)
    want = z.clone()
    for sample in range(2):
        for i in range(N):
            rest = x[sample] - a @ want[sample] + a[:, i] * want[sample, i]
            whole = lambda u, i=i, rest=rest: float((rest - a[:, i] * u).square().sum()) / 2 + cost(u, i)
            want[sample, i] = least(whole, *ends)
    assert (net(x, z=z, layers=1) - want).abs().max() < 1e-7
    assert (want - z).abs().min() > 1e-4 or name in ("box", "box and 1-norm", "not negative")


def test_the_columns_of_a_matrix_are_swept_side_by_side_and_so_are_rows_from_the_other_side() -> None:
    a, x = drawn(M, N), drawn(3, 5, M, seed=1)
    alone = network(L1, a)
    columns = {"dims": {"m": M, "n": N, "k": 5}, "variables": {"z": ["n", "k"]}, "inputs": {"x": ["m", "k"]}}
    z = network(L1, a, **columns)(x)
    assert torch.allclose(z, alone(x), rtol=0, atol=1e-12)
    rows = {"dims": {"m": M, "n": N, "k": 5}, "variables": {"z": ["k", "n"]}, "inputs": {"x": ["k", "m"]}}
    turned = network({**L1, "fit": "1/2*sumsq(x - z @ A.T)"}, a, **rows)(x.mT)
    assert torch.allclose(turned.mT, alone(x), rtol=0, atol=1e-12)
    assert z.shape == (3, 5, N)


def test_an_operator_for_each_sample_and_a_square_one() -> None:
    a, x = drawn(3, 4, 4), drawn(3, 4, seed=1)
    more = {
        "dims": {"m": 4, "n": 4},
        "inputs": {"x": ["m"], "A": {"shape": ["m", "n"], "stored": "as_written"}},
        "parameters": {},
    }
    net = unroll.compile(spec(L1, **more), dtype=torch.float64)
    for i in range(3):
        want = network(L1, a[i], dims={"m": 4, "n": 4})(x[i])
        assert torch.allclose(net(x, a)[i], want, rtol=0, atol=1e-12)


def test_an_operator_for_each_sample_sweeps_the_columns_of_a_matrix() -> None:
    a, x = drawn(3, M, N), drawn(3, 5, M, seed=1)
    more: Spec = {"dims": {"m": M, "n": N, "k": 5}, "variables": {"z": ["n", "k"]}, "parameters": {}}
    more["inputs"] = {"x": ["m", "k"], "A": {"shape": ["m", "n"], "stored": "as_written"}}
    net = unroll.compile(spec(L1, **more), dtype=torch.float64)
    for i in range(3):
        assert torch.allclose(net(x, a)[i], network(L1, a[i])(x[i]), rtol=0, atol=1e-12)


def test_the_limit_is_an_optimum_and_no_pass_raises_the_objective() -> None:
    a, x = drawn(M, 9), drawn(M, seed=1)
    net = network({**L1, "r": "mu/2*sumsq(z)"}, a, dims={"m": M, "n": 9}, constraints=["-1 <= z <= 2"])
    z = cp.Variable(9)
    cost = cp.sum_squares(x.numpy() - a.numpy() @ z) / 2 + LAM * cp.norm1(z) + MU / 2 * cp.sum_squares(z)
    cp.Problem(cp.Minimize(cost), [z >= -1, z <= 2]).solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    assert np.abs(net(x, layers=200).numpy() - z.value).max() < 1e-6
    assert (net.trace(x, layers=20).terms["total"].diff() <= 1e-14).all()
    found = unroll.solve(spec({**L1, "r": "mu/2*sumsq(z)"}, dims={"m": M, "n": 9}, constraints=["-1 <= z <= 2"]), x,
                         parameters={"A": a}, algorithm="coordinate_descent")  # fmt: skip
    assert np.abs(found.z.numpy() - z.value).max() < 1e-6


# --- derivatives ------------------------------------------------------------------------------------------------------


def test_training_sees_through_a_sweep() -> None:
    """Second derivatives too; in what is given, and in what is learned."""
    net = network(L1, unroll={"algorithm": "coordinate_descent", "layers": 2, "learn": {"W": {"replaces": "A"}, "theta": {"replaces": "lam", "positive": True}}})  # fmt: skip
    x = drawn(1, M, seed=1).requires_grad_()
    weights = dict(net.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(weights, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in weights.values()]
    assert len(values) == 2
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


# --- what is degenerate -----------------------------------------------------------------------------------------------


def with_a_blank_column() -> Tensor:
    a = drawn(M, N)
    a[:, 1] = 0
    return a


def test_an_entry_that_the_quadratic_does_not_read_goes_to_the_least_of_the_rest() -> None:
    a, x = with_a_blank_column(), drawn(2, M, seed=1)
    start = torch.full((2, N), 0.8, dtype=torch.float64)
    z = network(L1, a)(x, z=start, layers=1)
    assert (z[:, 1] == 0).all()
    assert (z[:, 0] != 0.8).all()
    z = network({"fit": FIT, "s": "lam*sum((z - 2)**4)"}, a)(x, z=start, layers=20)
    assert (z[:, 1] - 2).abs().max() < 1e-5  # of a cost that is flat near its least: no nearer than its slope tells
    z = network({"fit": FIT}, a)(x, z=start, layers=1)
    assert (z[:, 1] == 0.8).all()  # where there is no rest, it stays
    z = network({"fit": FIT}, a, constraints=["1 <= z <= 2"])(x, z=start, layers=1)
    assert (z[:, 1] == 1).all()  # nearest among those that cost the same
    net = network(L1, a)
    slopes = torch.autograd.grad(net(x.requires_grad_(), z=start).sum(), x)[0]
    assert slopes.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_change_nothing(scale: float, dtype: torch.dtype) -> None:
    """z of x and A in other units is the same: lam in theirs, squared."""
    a, x = with_a_blank_column(), drawn(2, M, seed=1)
    want = network(L1, a)(x)
    other = unroll.compile(
        spec(L1, scalars={"lam": LAM * scale**2}), parameters={"A": (a * scale).to(dtype)}, dtype=dtype
    )
    z = other((x * scale).to(dtype))
    assert z.dtype == dtype
    assert (z - want).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("m", "n"), [(1, 4), (4, 1), (1, 1), (4, 4)])
def test_one_row_one_column_no_sample_and_blank_ones(m: int, n: int) -> None:
    a, x = drawn(m, n), drawn(3, m, seed=1)
    x[1] = 0
    net = network(L1, a, dims={"m": m, "n": n})
    z = net(x)
    assert (z[1] == 0).all()
    assert torch.equal(z[0], net(x[0]))
    assert net(x[:0]).shape == (0, n)
    if n == 1:
        b, t = a[:, 0] @ x[0], LAM
        assert torch.allclose(z[0], b.sign() * (b.abs() - t).clamp_min(0) / a.square().sum(), rtol=0, atol=1e-14)
    assert (network(L1, 0 * a, dims={"m": m, "n": n})(x, z=torch.ones(3, n, dtype=torch.float64)) == 0).all()


def test_a_number_and_an_empty_batch_of_matrices() -> None:
    a, x = drawn(M), drawn(3, M, seed=1)
    net = network({"fit": "1/2*sumsq(x - z*A)", "s": "lam*abs(z)"}, a, variables={"z": []}, parameters={"A": ["m"]}, dims={"m": M})  # fmt: skip
    b = x @ a
    assert torch.allclose(net(x).flatten(), b.sign() * (b.abs() - LAM).clamp_min(0) / (a @ a), rtol=0, atol=1e-14)
    columns = {"dims": {"m": M, "n": N, "k": 5}, "variables": {"z": ["n", "k"]}, "inputs": {"x": ["m", "k"]}}
    assert network(L1, **columns)(x.new_zeros(0, 5, M)).shape == (0, 5, N)


# --- where else it stands ---------------------------------------------------------------------------------------------


def test_states_of_a_block_steps_and_depth_go_on(tmp_path: Path) -> None:
    x = drawn(2, M, seed=1)
    net = network(L1)
    one = {"layers": 2, "blocks": [{"block": "a", "over": "z", "algorithm": "coordinate_descent", "steps": 2}]}
    assert torch.equal(network(L1, unroll=one)(x), net(x, layers=4))
    assert torch.equal(net(x, z=net(x, layers=1), layers=2), net(x))
    net.save(tmp_path)
    assert torch.equal(unroll.restore(tmp_path)(x), net(x))


ONE_OF_ONES_OWN: Spec = {
    "algorithm": "swept_admm",
    "solves": "f(z) + g(K @ z)",
    "scalars": {"rho": 1},
    "states": {"w": "K @ z", "u": {"like": "w"}},
    "updates": {
        "z": "sweep(f(z) + rho/2 * sumsq(K @ z - w + u))",
        "w": "prox(g / rho, K @ z + u)",
        "u": "u + K @ z - w",
    },
}


def test_a_text_of_ones_own_sweeps_what_it_writes() -> None:
    """ADMM with one pass in the place of the minimiser: its limit is the optimum all the same."""
    a, x = drawn(M, N), drawn(M, seed=1)
    net = network({**L1, "t": "mu*tv(z)"}, a, algorithms={"swept_admm": ONE_OF_ONES_OWN},
                  unroll={"algorithm": "swept_admm", "layers": 3, "split": {"g": ["t"]}})  # fmt: skip
    z = cp.Variable(N)
    cost = cp.sum_squares(x.numpy() - a.numpy() @ z) / 2 + LAM * cp.norm1(z) + MU * cp.tv(z)
    cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    assert np.abs(net(x, layers=300).numpy() - z.value).max() < 1e-6


def test_auto_takes_what_needs_no_sweep_first() -> None:
    chosen = unroll.derive(spec(L1, unroll={"algorithm": "auto", "layers": 2}))
    assert chosen.step.algorithm == "proximal_gradient"
    assert any("coordinate_descent" in n for n in chosen.step.notes)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Spec, str, str]] = {
    "neighbours": ({"minimize": {"fit": FIT, "s": "lam*tv(z)"}}, "E303", "lam * tv(z) joins entries of z"),
    "groups": ({"minimize": {"fit": FIT, "s": "lam*norm2(z)"}}, "E303", "joins entries of z"),
    "sets": ({"minimize": {"fit": FIT}, "constraints": ["z in simplex"]}, "E303", "joins entries of z"),
    "not quadratic": ({"minimize": {"fit": "sum(logistic(x*(A @ z)))", "s": "lam*norm1(z)"}}, "E303", "is not quadratic"),
    "not convex": ({"minimize": {"fit": FIT, "r": "-mu*sumsq(z)"}}, "E302", "is not known to be convex"),
    "no quadratic": ({"minimize": {"s": "lam*norm1(z)"}}, "E302", "has no quadratic term"),
    "both sides": (
        {"minimize": {"fit": "1/2*sumsq(x - A @ z @ A.T)"}, "variables": {"z": ["n", "n"]}, "inputs": {"x": ["m", "m"]}},
        "E302",
        "as one matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_sweep_is_known_for_is_refused(name: str) -> None:
    more, code, says = REFUSED[name]
    more = dict(more)
    with pytest.raises(UnrollError) as refused:
        network(more.pop("minimize"), **more)
    assert refused.value.code == code
    assert says in refused.value.message
    assert refused.value.where is not None
    assert refused.value.hint or name == "not convex"
