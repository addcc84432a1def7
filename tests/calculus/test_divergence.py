"""Divergences and second derivatives against those of automatic differentiation."""

from __future__ import annotations

from typing import Any, cast

import pytest
import sympy as sp
import torch

import unroll
from unroll.calculus.divergence import divergence, planned
from unroll.calculus.linear import hessian
from unroll.errors import DeriveError
from unroll.language.constructors import add, prox, symbol
from unroll.language.functions import as_expr
from unroll.language.nodes import Expr, Sym, scalar
from unroll.language.parse import Scope, nowhere, parse, parse_constraint
from unroll.network.evaluate import Evaluator

n, m, k = (sp.Symbol(s, integer=True, positive=True) for s in "nmk")
lam, t, rho = scalar("lam", positive=True), scalar("t", positive=True), scalar("rho", positive=True)
z, Z = symbol("z", n, 1, "variable"), symbol("Z", n, k, "variable", 2)
r, R = symbol("r", n, 1, "state"), symbol("R", n, k, "state", 2)
V, Q = symbol("V", n, n, "variable", 2), symbol("Q", n, n, "state", 2)
A, S, x, w = symbol("A", m, n), symbol("S", n, n), symbol("x", m, 1, "input"), symbol("w", n, 1, props=["positive"])
p = symbol("p", n, 1, props=["positive"])
SCOPE = Scope(
    {"z": z, "Z": Z, "r": r, "R": R, "V": V, "A": A, "S": S, "x": x, "w": w, "p": p, "lam": lam, "t": t, "rho": rho}
)
SIZES: dict[sp.Symbol, Any] = {n: 5, m: 4, k: 3, lam: 0.4, t: 0.7, rho: 0.3}
Given = dict[Sym, torch.Tensor]


def read(formula: str) -> Expr:
    return as_expr(parse(formula, SCOPE, nowhere))


def values(seed: int = 0) -> Given:
    torch.manual_seed(seed)
    size = lambda d: SIZES[d] if d in SIZES else int(d)
    made: Given = {v: torch.randn(*map(size, v.shape), dtype=torch.float64) for v in (r, R, A, S, x, w, z)}
    return {**made, w: made[w].abs() + 0.1, p: torch.linspace(0.9, 0.1, 5, dtype=torch.float64)[:, None]}


def value(e: Expr, given: Given, **sizes: int) -> torch.Tensor:
    return Evaluator(given, {**SIZES, **{sp.Symbol(s, integer=True, positive=True): d for s, d in sizes.items()}}, {})(
        e
    )


def trace_of_jacobian(e: Expr, at: Sym, given: Given, width: float = 1e-6, **sizes: int) -> torch.Tensor:
    """By central differences."""
    run = lambda v: value(e, {**given, at: v}, **sizes).flatten()
    point, found = given[at], torch.zeros((), dtype=torch.float64)
    for i in range(point.numel()):
        d = torch.zeros_like(point).flatten()
        d[i] = width
        d = d.reshape(point.shape)
        found = found + (run(point + d)[i] - run(point - d)[i]) / (2 * width)
    return found


MAPS = [
    "r - rho * A.T @ (A @ r - x)", "tanh(r) * w", "maximum(r, 0)", "r * norm2(r)", "S @ r / 2 + sumsq(r) * w", "r / (1 + sumsq(r)) ",
    "where(r > 1, r - 1, 0)", "r * dot(w, r)", "hold(r) * r" , "softplus(r) - 2 * r",
]  # fmt: skip


@pytest.mark.parametrize("formula", MAPS)
def test_the_divergence_of_a_map_is_the_trace_of_its_jacobian(formula: str) -> None:
    e, given = read(formula.replace("hold", "stop_gradient")), values()
    wanted = trace_of_jacobian(e, r, given) if "hold" not in formula else given[r].sum()
    torch.testing.assert_close(value(divergence(e, r), given).reshape(()), wanted, rtol=1e-7, atol=1e-7)


TERMS = [
    "lam * norm1(z)", "lam * norm1(z) + 1/2 * sumsq(z)", "norm2(z)", "lam * sumsq(z - w)", "1/2 * sumsq(x - A @ z)", "sum(softplus(z))",
    "tv(z)", "lam * tv(z) + 0.1 * norm1(z)", "sorted_l1(z, p)", "tv(z) + lam * sumsq(z)", "norm_inf(z)", "lam * norm1(w * z)", "sum(huber(z, 1))", "norm1(z) + norm2(z)",
]  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0])
@pytest.mark.parametrize("term", TERMS)
def test_the_divergence_of_a_proximal_step_is_the_trace_of_its_jacobian(term: str, scale: float) -> None:
    e, given = planned(prox(read(term), z, t, r)), values(1)
    given[r] *= scale
    found = value(divergence(e, r), given).reshape(())
    torch.testing.assert_close(found, trace_of_jacobian(e, r, given), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(
    "sets", [("z in simplex", "z <= lam"), ("dot(w, z) == 1", "z >= 0"), ("z in simplex",), ("z in simplex(2)",)]
)
def test_the_divergence_of_one_equation_is_the_trace_of_its_jacobian(sets: tuple[str, ...], scale: float) -> None:
    term = add(*(parse_constraint(s, SCOPE) for s in sets), read("lam * norm1(z)" if len(sets) > 1 else "0 * sum(z)"))
    e, given = planned(prox(term, z, t, r)), values(1)
    given[r] *= scale
    torch.testing.assert_close(
        value(divergence(e, r), given).reshape(()), trace_of_jacobian(e, r, given), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("term", ["group_norm(Z, axis=1)", "norm_fro(Z)", "norm1(Z)"])
def test_the_divergence_of_groups_is_the_trace_of_their_jacobian(term: str) -> None:
    e, given = planned(prox(read(term), Z, t, R)), values(2)
    given[R][1] = 1e-3
    found = value(divergence(e, R), given).reshape(())
    torch.testing.assert_close(found, trace_of_jacobian(e, R, given), rtol=1e-7, atol=1e-7)


def test_a_ball_without_radius_takes_nothing_from_the_trace() -> None:
    """The step of norm_inf of strength 0 is the identity; of equal entries, the projection on the ball is exactly 0."""
    e, given = planned(prox(read("norm_inf(z)"), z, t, r)), {**values(), r: torch.ones(5, 1, dtype=torch.float64)}
    found = Evaluator(given, {**SIZES, t: 0.0}, {})(divergence(e, r))
    assert found.item() == 5


def test_a_zero_argument_has_the_divergence_of_what_it_is_shrunk_to() -> None:
    given = {**values(), r: torch.zeros(5, 1, dtype=torch.float64)}
    for term in ("lam * norm1(z)", "norm2(z)", "norm1(z) + norm2(z)"):
        e = planned(prox(read(term), z, t, r))
        assert value(divergence(e, r), given).item() == 0


# --- functions of singular values and of eigenvalues ---

SINGULAR = ["lam * nuclear(Z)", "lam * nuclear(Z) + rho/2 * sumsq(Z)", "nuclear(Z.T)", "lam * spectral_sum(s**3, Z)"]
EIGEN = ["V in psd", "-lam * logdet((V + V.T) / 2)", "-lam * logdet((V + V.T) / 2) + rho/2 * sumsq(V)"]


def with_values(rows: int, cols: int, values: list[float], symmetric: bool = False) -> torch.Tensor:
    """A matrix with these singular values, or a symmetric one with these eigenvalues."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(i, i, dtype=torch.float64)).Q for i in (rows, cols))
    d = torch.zeros(rows, cols, dtype=torch.float64)
    d.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return u @ d @ (u.T if symmetric else v)


MATRICES: dict[str, tuple[int, int, list[float]]] = {
    "tall": (5, 3, [3, 2, 0.1]), "wide": (2, 5, [3, 0.5]), "square": (4, 4, [3, 2, 1, 0.1]), "one row": (1, 5, [2]),
    "one column": (5, 1, [2]), "one column, lost": (5, 1, [0.01]), "ties": (4, 3, [2, 2, 2]), "near a tie": (3, 3, [2, 2 + 1e-9, 1]),
    "a tie of what is lost": (4, 4, [2, 2, 0.01, 0.01]), "rank 1": (4, 3, [2]), "zero": (4, 3, []), "one entry": (1, 1, [2]), "large": (3, 2, [1e6, 2e6]),
}  # fmt: skip


@pytest.mark.parametrize("which", MATRICES)
@pytest.mark.parametrize("term", SINGULAR)
def test_the_divergence_of_a_spectral_step_is_the_trace_of_its_jacobian(term: str, which: str) -> None:
    rows, cols, s = MATRICES[which]
    e, given = planned(prox(read(term), Z, t, R)), {R: with_values(rows, cols, s)}
    width = 1e-6 * max(1, given[R].abs().max().item())
    wanted = trace_of_jacobian(e, R, given, width, n=rows, k=cols)
    torch.testing.assert_close(value(divergence(e, R), given, n=rows, k=cols).reshape(()), wanted, rtol=1e-6, atol=1e-6)


SYMMETRIC = {
    "distinct": [3, 1, -2],
    "ties": [2, 2, -1, -1],
    "of one sign": [-1, -2, -3],
    "near a tie": [1, 1 + 1e-9],
    "one": [0.5],
}


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("which", SYMMETRIC)
@pytest.mark.parametrize("term", EIGEN)
def test_the_divergence_of_a_step_of_eigenvalues_counts_all_entries(term: str, which: str, skew: float) -> None:
    w = SYMMETRIC[which]
    m = with_values(len(w), len(w), w, symmetric=True)
    given = {Q: m + skew * (m @ torch.ones_like(m).triu() - (m @ torch.ones_like(m).triu()).T)}
    e = planned(prox(parse_constraint(term, SCOPE) if " in " in term else read(term), V, t, Q))
    found = value(divergence(e, Q), given, n=len(w)).reshape(())
    torch.testing.assert_close(found, trace_of_jacobian(e, Q, given, n=len(w)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("term", [SINGULAR[0], *EIGEN[:2]])
def test_a_network_works_out_the_same_divergence(term: str, dtype: torch.dtype) -> None:
    """Of a batch with a blank sample and one of ties, against automatic differentiation of the step alone."""
    symmetric, a_set = term in EIGEN, " in " in term
    rows, cols = (3, 3) if symmetric else (4, 3)
    size = ["a", "a" if symmetric else "b"]
    told = {"y": "prox(g, r)", "d": "div(y, r)", "z": "d * y", "r": "z"}
    texts = {
        name: {"algorithm": name, "solves": "g(z)", "states": {"r": "z"}, "updates": updates}
        for name, updates in (("plain", {"z": "prox(g, r)", "r": "z"}), ("weighed", told))
    }
    spec = {
        "dims": {"a": rows, "b": cols}, "variables": {"Z": size}, "inputs": {"x": ["a"]}, "scalars": {"lam": 0.4},
        "minimize": {"term": "0 * sum(x)" if a_set else term.replace("V", "Z")}, "constraints": ["Z in psd"] if a_set else [],
        "algorithms": texts,
    }  # fmt: skip
    plain, weighed = (unroll.compile({**spec, "unroll": {"algorithm": k, "layers": 1}}, dtype=dtype) for k in texts)
    values = [[3, 2, 0.1], [], [2, 2, 2]]
    z = torch.stack([with_values(rows, cols, v, symmetric) for v in values]).mT.to(dtype).requires_grad_()
    x = torch.zeros(3, rows, dtype=dtype)
    jacobians = [torch.autograd.functional.jacobian(lambda v: plain(x[:1], Z=v[None])[0], v) for v in z]
    d = torch.stack([cast(torch.Tensor, j).reshape(rows * cols, -1).trace() for j in jacobians])
    out = weighed(x, Z=z)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out, d[:, None, None] * plain(x, Z=z), **close)
    (slope,) = torch.autograd.grad(out.sum(), z)
    assert slope.isfinite().all()  # ties and zeros have one too


@pytest.mark.parametrize("term", ["lam * norm0(z)", "lam * norm1(S @ z)", "lam * rank(Z)"])
def test_a_map_that_jumps_has_no_divergence(term: str) -> None:
    of, at = (Z, R) if "Z" in term else (z, r)
    with pytest.raises(DeriveError):
        divergence(planned(prox(read(term), of, t, at)), at)


CURVED = [
    "1/2*sumsq(x - A @ z)", "sum(logistic(A @ z)) + lam/2 * sumsq(z)", "sum((x - A @ z)**4)", "logsumexp(A @ z)", "sum(sqrt(1 + z**2))",
    "log(1 + sumsq(z))", "sqrt(1 + sumsq(A @ z))", "dot(w, z)**2 / 2", "sum(w * exp(z))", "logsumexp(z) + dot(z, S @ z)",
]  # fmt: skip


@pytest.mark.parametrize("formula", CURVED)
def test_second_derivatives_are_those_of_automatic_differentiation(formula: str) -> None:
    e, given = read(formula), values(3)
    run = lambda v: value(e, {**given, z: v}).sum()
    wanted = cast(torch.Tensor, torch.autograd.functional.hessian(run, given[z])).reshape(5, 5)
    torch.testing.assert_close(value(hessian(e, z), given), wanted, rtol=1e-9, atol=1e-9)
