"""Stated curvature against Hessians: low <= eigenvalues <= high at sampled points, norms of affine maps against Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
import torch
from library_objectives import NAMES, drawn
from random_expressions import DIMS, LAM, SYMBOLS, A, K, M, N, Q, T, Y, Z, values
from torch import Tensor

import unroll
from unroll.calculus.curvature import Bounds, bounds, jointly_convex, operator_norm, smoothness
from unroll.errors import DeriveError
from unroll.language.constructors import elementwise, ones, symbol
from unroll.language.nodes import Expr, Sym, slot
from unroll.language.parse import Scope, parse_matrix
from unroll.language.traversal import substitute
from unroll.network.evaluate import evaluate

SIZES = {"m": 4, "n": 3, "T": 2, "K": 2}
SCALARS: dict[sp.Symbol, Any] = {LAM: 0.7} | {d: SIZES[d.name] for d in DIMS}
B = symbol("B", N, M)
S = symbol("S", N, N, props={"symmetric"})
V = symbol("V", N, N, "variable", 2)
SHIFT = symbol("b", 1, 1, "variable", 0)
PROPS: tuple[Sym, ...] = (B, S, V)
SCOPE = Scope({s.name: s for s in (*SYMBOLS, *PROPS)} | {d.name: d for d in DIMS} | {"lam": LAM})
REACH = (0.05, 0.5, 3.0)
"""How far from 0 the points lie at which Hessians are taken."""


def given(seed: int) -> dict[Sym, Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = values(SIZES, (), seed)
    found[B] = torch.randn(3, 4, generator=g, dtype=torch.float64)
    s = torch.randn(3, 3, generator=g, dtype=torch.float64)
    return {**found, S: s + s.T, V: torch.randn(3, 3, generator=g, dtype=torch.float64)}


def eigenvalues(e: Expr, z: Sym, at: dict[Sym, Tensor], scalars: dict[sp.Symbol, Any]) -> Tensor:
    """Of the Hessian of e in z, by autograd."""
    x = at[z]
    h = torch.autograd.functional.hessian(
        lambda v: evaluate(e, {**at, z: v.reshape(x.shape)}, scalars).sum(), x.flatten()
    )
    return torch.linalg.eigvalsh(h)  # type: ignore[arg-type]


def inside(found: Bounds, e: Expr, z: Sym, at: dict[Sym, Tensor], scalars: dict[sp.Symbol, Any]) -> tuple[float, float]:
    """Check the bounds at one point; how much of them the Hessian uses: (lowest / low or 0, highest / high)."""
    low, high = (evaluate(x, at, scalars).item() for x in (found.low, found.high))
    seen = eigenvalues(e, z, at, scalars)
    slack = 1e-8 * (1 + abs(high) + abs(low))
    assert low - slack <= seen.min() and seen.max() <= high + slack, (
        f"{e}: Hessian in [{seen.min():.4g}, {seen.max():.4g}], stated [{low:.4g}, {high:.4g}]"
    )
    assert seen.abs().max() <= evaluate(found.lipschitz, at, scalars).item() + slack
    return seen.min().item(), seen.max().item()


VECTOR = {
    "least squares": "1/2 * sumsq(y - A @ q)",
    "two least squares": "1/2 * sumsq(y - A @ q) + lam/2 * sumsq(q - w)",
    "a difference of squares": "1/2 * sumsq(y - A @ q) - lam * sumsq(G @ q)",
    "minus least squares": "-3 * sumsq(A @ q)",
    "a quadratic form": "q.T @ S @ q - 2 * w.T @ q",
    "a form that is not symmetric": "q.T @ G @ q",
    "weighted squares": "1/2 * sum(w**2 * (q - v)**2)",
    "weighted residuals": "1/2 * sumsq(y * (A @ q))",
    "logistic": "sum(logistic(y * (A @ q)))",
    "softplus": "sum(softplus(A @ q - y))",
    "huber": "sum(huber(y - A @ q, lam))",
    "pseudo huber": "sum(sqrt(1 + (y - A @ q)**2))",
    "log cosh": "sum(log(cosh(A @ q)))",
    "cauchy": "sum(log(1 + (y - A @ q)**2))",
    "welsch": "lam * sum(1 - exp(-(A @ q)**2))",
    "geman": "sum(q**2 / (1 + q**2))",
    "fair": "sum(abs(q) - log(1 + abs(q)))",
    "fair of an affine map": "sum(abs(A @ q) - log(1 + abs(A @ q)))",
    "bumps": "sum(exp(-(A @ q)**2))",
    "sine": "sum(sin(A @ q))",
    "tanh": "sum(tanh(2 * A @ q))",
    "scaled inside": "sum(log(1 + (3*q - v)**2))",
    "log-sum-exp": "logsumexp(A @ q)",
    "log-sum-exp minus": "logsumexp(A @ q) - lam * logsumexp(w * q)",
    "a norm, smoothed": "sqrt(1 + sumsq(A @ q - y))",
    "log of a norm": "log(1 + sumsq(A @ q))",
    "differences": "sumsq(difference(q))",
    "smooth total variation": "sum(sqrt(lam + difference(q)**2))",
    "mean": "(sum(q) - 1)**2",
    "dot with itself": "dot(q, S @ q)",
    "a family": "sum(sumsq(U[k] @ q - y) for k in K)",
    "a concave family": "-sum(sum(log(1 + (U[k] @ q)**2)) for k in K)",
    "data in front, of any sign": "sum(w) * logsumexp(A @ q)",
    "data in front, positive": "sumsq(w) * logsumexp(A @ q)",
    "a weighed family": "sum(sum(w) * sumsq(U[k] @ q - y) for k in K)",
    "linear": "dot(q, w)",
    "logistic and ridge": "sum(logistic(A @ q)) + lam/2 * sumsq(q)",
    "a constant inside": "sumsq(y - A @ q + ones(m, 1))",
    "diagonal weights": "sumsq(diag(w) @ q)",
    "held": "sumsq(A @ (q - stop_gradient(q)))",
}
SHIFTED = {
    "logistic": "sum(logistic(y * (A @ q + b)))",
    "two shifts": "sum(sqrt(1 + (lam * (A @ q + b) - sumsq(A) * y)**2))",
    "tilted": "sum(log(1 + exp(b + A @ q)) - y * (A @ q + b))",
    "weights and shift": "sum(y**2 * log(1 + (3 * b - 3 * (A @ q))**2))",
    "cut off": "sum(where(abs(A @ q + b) <= 1, (A @ q + b)**2 / 2, abs(A @ q + b) - 1/2))",
}
"""Of a vector q and a number b that is added to each entry."""
MATRIX = {
    "matrix least squares": "1/2 * sumsq(X - A @ Z)",
    "both sides": "sumsq(A @ Z @ X.T)",
    "graph smoothness": "trace(Z.T @ G @ G.T @ Z)",
    "minus graph smoothness": "-trace(Z.T @ G @ G.T @ Z)",
    "columns": "sumsq(Z @ ones(T, 1))",
    "coding rate": "1/2 * logdet(I(n) + lam * Z @ Z.T)",
    "coding rate of the other side": "1/2 * logdet(I(T) + lam * Z.T @ Z)",
    "coding rate of a map": "1/2 * logdet(I(m) + lam * A @ Z @ Z.T @ A.T)",
    "minus coding rate": "-lam * logdet(I(n) + 2 * Z @ Z.T)",
    "compression": "sum(logdet(I(n) + lam * U[k].T @ A @ Z @ Z.T @ A.T @ U[k]) for k in K)",
    "rate reduction": "logdet(I(n) + lam * Z @ Z.T) - sum(logdet(I(n) + lam * U[k].T @ A @ Z @ Z.T @ A.T @ U[k]) for k in K)",
    "singular values": "spectral_sum(log(1 + s**2), Z)",
    "smooth nuclear": "spectral_sum(sqrt(1 + s**2), A @ Z)",
    "singular values, concave": "-spectral_sum(s**2 / (1 + s**2), Z)",
    "row softmax": "sum(logsumexp(Z, axis=1))",
    "column log-sum-exp": "sum(logsumexp(A @ Z, axis=0))",
    "entries": "sum(log(1 + Z**2))",
    "transposed": "sumsq(Z.T @ A.T - X.T)",
    "radial": "log(1 + sumsq(Z))",
}
FORMULAS = {**VECTOR, **MATRIX}


def formula(name: str) -> tuple[Expr, Sym]:
    return parse_matrix(FORMULAS[name], SCOPE), (Z if name in MATRIX else Q)


@pytest.mark.parametrize("name", FORMULAS)
def test_hessians_lie_within_the_stated_bounds(name: str) -> None:
    e, z = formula(name)
    found = bounds(e, z)
    assert found is not None and found.smooth
    for seed in range(4):
        at = given(seed)
        for reach in REACH:
            inside(found, e, z, {**at, z: reach * at[z]}, SCALARS)


@pytest.mark.parametrize("name", SHIFTED)
def test_a_number_that_shifts_an_argument_changes_no_bound_and_has_its_own(name: str) -> None:
    e = parse_matrix(SHIFTED[name], Scope({**SCOPE.names, "b": SHIFT}))
    for z in (Q, SHIFT):
        found = bounds(e, z)
        assert found is not None and found.smooth
        for seed in range(3):
            at = given(seed)
            for shift in (0.0, 0.3, -2.0, 40.0):
                inside(found, e, z, {**at, SHIFT: torch.tensor([[shift]], dtype=torch.float64)}, SCALARS)


JOINT = {
    "sum(logistic(y * (A @ q + b)))": True,
    "sum(abs(A @ q - b))": True,
    "2 * sumsq(A @ q + b - y)": True,
    "sum(exp(A @ q) * exp(b))": True,
    "sum((A @ q) * b)": False,
    "sum((A @ q - b**2)**2)": False,
    "sum(cos(A @ q + b))": False,
    "-sum(logistic(A @ q + b))": False,
    "sum((A @ q)**2 - b**2)": False,
    "sum((A @ (b * q))**2)": False,
    "sum(log(1 + exp(A @ q)) + 3 * b * (A @ q))": False,
}


@pytest.mark.parametrize("written", JOINT)
def test_what_is_convex_in_a_vector_and_a_number_together(written: str) -> None:
    e = parse_matrix(written, Scope({**SCOPE.names, "b": SHIFT}))
    assert jointly_convex(e, (Q, SHIFT)) == JOINT[written] == jointly_convex(e, (SHIFT, Q))


TIGHT = (
    "least squares", "two least squares", "minus least squares", "coding rate", "differences", "graph smoothness", "weighted squares", "minus coding rate",
)  # fmt: skip


@pytest.mark.parametrize("name", TIGHT)
def test_bounds_that_can_be_met_are_met(name: str) -> None:
    """The larger bound is attained, near 0 for the nonlinear ones, so a constant that is too large is caught too."""
    e, z = formula(name)
    found = bounds(e, z)
    assert found is not None
    at = given(0)
    lowest, highest = inside(found, e, z, {**at, z: 1e-4 * at[z]}, SCALARS)
    met = 0.7 if name == "differences" else 0.99  # 2 is the norm for many entries; here there are three
    assert max(abs(lowest), abs(highest)) >= met * evaluate(found.lipschitz, at, SCALARS).item()


def test_the_bound_of_a_log_sum_exp_is_met_where_two_are_the_largest() -> None:
    """log 2 cosh(a'q) bends by |a|^2 at 0, half the squared norm of the rows a and -a; the others are far below."""
    e = parse_matrix("logsumexp(A @ q - y)", SCOPE)
    found, at, a = bounds(e, Q), given(0), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    far = torch.tensor([0.0, 0.0, 60.0, 60.0], dtype=torch.float64)
    at = {**at, A: torch.stack([a, -a, 0 * a, 0 * a]), Y: far[:, None], Q: 0 * at[Q]}
    assert found is not None
    _, highest = inside(found, e, Q, at, SCALARS)
    assert highest == pytest.approx(float(a @ a))
    assert evaluate(found.high, at, SCALARS).item() == pytest.approx(float(a @ a))


CONVEX = (
    "least squares",
    "two least squares",
    "logistic",
    "huber",
    "pseudo huber",
    "fair",
    "log-sum-exp",
    "graph smoothness",
    "softplus",
    "a norm, smoothed",
)
NOT_CONVEX = (
    "a difference of squares",
    "minus least squares",
    "cauchy",
    "geman",
    "welsch",
    "coding rate",
    "rate reduction",
    "sine",
    "a quadratic form",
)


@pytest.mark.parametrize("name", CONVEX)
def test_convex_terms_are_known_to_be_convex(name: str) -> None:
    found = bounds(*formula(name))
    assert found is not None and found.convex


@pytest.mark.parametrize("name", NOT_CONVEX)
def test_terms_that_are_not_convex_are_never_called_convex(name: str) -> None:
    found = bounds(*formula(name))
    assert found is not None and not found.convex


def test_strong_convexity_is_kept_by_a_ridge() -> None:
    found = bounds(parse_matrix("sumsq(A @ q) + 3/2 * sumsq(q)", SCOPE), Q)
    assert found is not None and evaluate(found.low, given(0), SCALARS).item() == pytest.approx(3)


@pytest.mark.parametrize("name", NAMES)
def test_hessians_of_the_library_lie_within_the_stated_bounds(name: str) -> None:
    problem, at, scalars = drawn(name)
    at = {s: v.abs() if "positive" in s.props else v for s, v in at.items()}
    for z in problem.variables:
        for e in problem.costs.values():
            found = bounds(e, z) if not e.symbols.isdisjoint(problem.inputs) else None
            if found is not None and found.smooth:
                for reach in REACH:
                    inside(found, e, z, {**at, z: reach * at[z]}, scalars)


# --- norms of affine maps ---------------------------------------------------------------------------------------------

MAPS = {
    "product": "A @ q",
    "sum": "A @ q - 2 * y + B.T @ q",
    "nested": "B @ (A @ q - y) + lam * q",
    "transpose": "q.T @ G",
    "diag": "diag(G @ q)",
    "diagonal": "diagonal(q @ w.T)",
    "weights": "w * (G @ q)",
    "weights of both kinds": "w * q / (1 + v**2)",
    "repeat": "q @ ones(1, T)",
    "difference": "difference(G @ q)",
    "first": "first(A @ q, 2)",
    "groups": "groups(repeat(q, T), T)",
    "entries repeated": "repeat(q, T)",
    "sums of what is repeated": "repeat_T(repeat(G @ q, T), T)",
    "all shifts": "shifts(repeat(q, T), T)",
    "all shifts, moved back": "shifts_T(shifts(repeat(q, T), T), T)",
    "difference adjoint": "difference_T(difference(q))",
    "row sums": "sum(w @ q.T, axis=1)",
    "total": "sum(A @ q)",
    "trace of a variable": "trace(V) * w",
    "repeated by weights": "q * A.T",
    "trace": "trace(q @ w.T)",
    "family": "sum(U[k] @ q for k in K)",
    "matrix": "A @ Z @ X.T",
    "matrix sum": "A @ Z + X + B.T @ Z",
    "two sides": "G @ Z - Z",
    "hold": "q + stop_gradient(q)",
}


@pytest.mark.parametrize("name", MAPS)
def test_norms_of_affine_maps_bound_their_jacobians(name: str) -> None:
    e = parse_matrix(MAPS[name], Scope(SCOPE.names, broadcast=True))
    z = next(s for s in (Z, V, Q) if s in e.symbols)
    norm = operator_norm(e, z)
    assert norm is not None
    for seed in range(3):
        at = given(seed)
        jacobian = torch.autograd.functional.jacobian(lambda v, at=at: evaluate(e, {**at, z: v}, SCALARS), at[z])
        size = torch.linalg.matrix_norm(jacobian.reshape(-1, at[z].numel()), 2).item()  # type: ignore[union-attr]
        bound = evaluate(norm, at, SCALARS).item()
        assert size <= bound * (1 + 1e-9)
        assert name not in ("product", "two sides", "repeat", "transpose", "matrix") or bound <= size * (1 + 1e-9)


def test_a_vector_repeated_counts_every_time() -> None:
    e = elementwise(slot(0) * slot(1), Q, ones(N, T))
    norm = operator_norm(e, Q)
    assert norm is not None and evaluate(norm, given(0), SCALARS).item() == pytest.approx(2**0.5)


NOT_AFFINE = ("q * q", "tanh(q)", "A @ q @ q.T", "inv(I(n) + q @ q.T)", "softmax(q, axis=0)")


@pytest.mark.parametrize("written", NOT_AFFINE)
def test_what_is_not_affine_has_no_norm(written: str) -> None:
    assert operator_norm(parse_matrix(written, SCOPE), Q) is None


REFUSED = (
    "sum(exp(A @ q))",
    "sum(q**4)",
    "sum(abs(A @ q))",
    "norm_inf(q)",
    "sum(q * q * q)",
    "sumsq(q * (A.T @ A @ q))",
    "norm2(q)",
    "sum(log(abs(q)))",
    "trace(Z @ Z.T @ Z @ Z.T)",
    "-norm1(q)",
    "sumsq(q) - lam * norm1(q)",
    "-sum(exp(q))",
)


@pytest.mark.parametrize("written", REFUSED)
def test_no_constant_is_invented(written: str) -> None:
    e = parse_matrix(written, SCOPE)
    with pytest.raises(DeriveError) as refusal:
        smoothness(e, Z if Z in e.symbols else Q)
    assert refusal.value.code == "E304"


def test_a_term_without_the_variable_has_no_curvature() -> None:
    found = bounds(parse_matrix("sumsq(y)", SCOPE), Q)
    assert found is not None and found.convex and evaluate(found.high, given(0), SCALARS) == 0


def test_an_unknown_sign_is_bounded_both_ways() -> None:
    a = sp.Symbol("a", real=True)
    e = parse_matrix("a * sumsq(A @ q)", Scope({**SCOPE.names, "a": a}))
    found = bounds(e, Q)
    assert found is not None
    for sign in (-1.0, 1.0):
        inside(found, e, Q, given(0), {**SCALARS, a: sign})
    bumps = parse_matrix("a * sum(exp(-(A @ q)**2))", Scope({**SCOPE.names, "a": a}))
    found = bounds(bumps, Q)
    assert found is not None
    for sign in (-1.0, 1.0):
        inside(found, bumps, Q, {**given(0), Q: 0 * given(0)[Q]}, {**SCALARS, a: sign})
    assert substitute(e, {Q: Q}) is e and {K, M} <= set(DIMS)


def test_members_that_mix_the_columns_differently_do_not_share_them() -> None:
    """Weights of different columns, moved to the same one by each member's own matrix: the curvatures add up."""
    written = """
    dims: {d: 4, N: 2, K: 2}
    variables: {Z: [d, N]}
    inputs: {X: [d, N]}
    parameters: {P: [K, N, N], v: {family: K, shape: [N], positive: true}}
    minimize: {rates: "1/2 * sum(logdet(I(d) + Z @ P[k] @ diag(v[k]) @ P[k].T @ Z.T) for k in K)", fit: 1/2 * sumsq(X - Z)}
    unroll: {algorithm: gradient_descent, layers: 1}
    """
    eye = torch.eye(2, dtype=torch.float64)
    net = unroll.compile(written, parameters={"P": torch.stack([eye, eye.flip(0)]), "v": eye}, dtype=torch.float64)
    zero = torch.zeros(2, 4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda z: net.objective(X=zero, Z=z)["total"], zero).reshape(8, 8)
    largest = float(torch.linalg.eigvalsh(hessian).max())  # type: ignore[arg-type]
    assert largest == pytest.approx(3)  # 1 of the fit, 1 of each rate: both see the first column
    assert float(net.get_buffer("step")) <= 1 / largest + 1e-12
