"""Prox of vector and matrix terms: against CVXPY where convex, against feasible samples where not; finite at 0; refusals with a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from torch import Tensor

from unroll.calculus.prox import plan, proximable
from unroll.errors import DeriveError
from unroll.language.constructors import add, prox, symbol
from unroll.language.nodes import Expr, Prox, Sym, dim, scalar
from unroll.language.parse import Scope, parse_constraint, parse_matrix
from unroll.network.evaluate import evaluate, project

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

M, N, T = dim("m"), dim("n"), dim("T")
LAM, MU, R, LO, HI = (
    scalar(n, positive=p) for n, p in (("lam", True), ("mu", True), ("r", True), ("lo", False), ("hi", False))
)
STEP = scalar("t", positive=True)
A, B, H = symbol("A", M, N), symbol("B", N, M), symbol("H", N, N)
O = symbol("O", N, M, props={"orthonormal"})
E = symbol("E", M, N, props={"orthonormal"})
F = symbol("F", N, N, props={"orthonormal"})
W, Y, P = symbol("w", N), symbol("y", M), symbol("p", N, props={"positive"})
C = symbol("C", N, T)
q, Z, X = symbol("q", N, 1, "variable"), symbol("Z", N, T, "variable", 2), symbol("X", N, N, "variable", 2)
SCOPE = Scope(
    {s.name: s for s in (A, B, H, O, E, F, W, Y, P, C, q, Z, X)}
    | {d.name: d for d in (M, N, T)}
    | {s.name: s for s in (LAM, MU, R, LO, HI)}
)
NUMBERS = {"lam": 0.3, "mu": 0.4, "r": 0.8, "lo": -0.5, "hi": 0.7, "t": 0.6}
SHAPES = {"usual": (2, 5, 3), "one column": (3, 5, 1), "one row": (1, 1, 4), "one entry": (1, 1, 1)}


def read(text: str) -> Expr:
    """A sum of terms and constraints: `lam*norm1(q); q >= 0`."""
    first, *rest = (t.strip() for t in text.split(";"))
    one = lambda t: (
        parse_constraint(t, SCOPE) if " in " in t or ">=" in t or "<=" in t or "==" in t else parse_matrix(t, SCOPE)
    )
    return add(one(first), *map(one, rest))


def sizes(shape: str) -> dict[sp.Symbol, int]:
    return dict(zip((M, N, T), SHAPES[shape], strict=True))


def drawn(shape: str, seed: int) -> dict[Sym, Tensor]:
    g, n = torch.Generator().manual_seed(seed), sizes(shape)
    found = {
        s: torch.randn(int(s.rows.subs(n)), int(s.cols.subs(n)), generator=g, dtype=torch.float64)
        for s in (A, B, H, W, Y, P, C, q, Z, X)
    }
    found[P] = found[P].abs() + 0.1
    found[O] = (
        torch.linalg.qr(torch.randn(n[N], n[M], generator=g, dtype=torch.float64)).Q
        if n[M] <= n[N]
        else torch.zeros(n[N], n[M], dtype=torch.float64)
    )
    found[F] = torch.linalg.qr(found[H]).Q
    found[E] = found[O].mT.contiguous()
    return found


def variable(term: Expr) -> Sym:
    return next(s for s in term.symbols if s.role == "variable")


def applied(term: Expr, v: Tensor, given: dict[Sym, Tensor], shape: str) -> Tensor:
    z = variable(term)
    at = symbol("v", z.rows, z.cols, "state", z.rank)
    node = prox(term, z, STEP, at)
    assert isinstance(node, Prox)
    return evaluate(plan(node), {**given, at: v}, scalars(shape))


def scalars(shape: str) -> dict[sp.Symbol, Any]:
    return {s: NUMBERS[s.name] for s in (LAM, MU, R, LO, HI, STEP)} | sizes(shape)


def text_of_rank(term: Expr) -> bool:
    return "rank" in repr(term)


def cost(term: Expr, x: Tensor, v: Tensor, given: dict[Sym, Tensor], shape: str) -> float:
    """t f(x) + |x - v|^2 / 2."""
    if text_of_rank(term):
        value = NUMBERS["lam"] * torch.linalg.matrix_rank(x)  # the definition counts singular values of 1e-17 too
    else:
        value = evaluate(term, {**given, variable(term): x}, scalars(shape))
    return float(NUMBERS["t"] * value + (x - v).square().sum() / 2)


def tv(z: Any) -> Any:
    return cp.sum(cp.abs(z[1:] - z[:-1])) if z.shape[0] > 1 else 0


Case = Callable[[Any, dict[str, np.ndarray]], Any]
lam, mu, r, lo, hi, t = (NUMBERS[k] for k in ("lam", "mu", "r", "lo", "hi", "t"))
CONVEX: dict[str, tuple[Case, list[Case]]] = {
    "lam*norm1(q)": (lambda z, a: lam * cp.norm1(z), []),
    "lam*norm1(q - w)": (lambda z, a: lam * cp.norm1(z - a["w"]), []),
    "lam*norm1(2*q - w)": (lambda z, a: lam * cp.norm1(2 * z - a["w"]), []),
    "sum(p * abs(q))": (lambda z, a: cp.sum(cp.multiply(a["p"], cp.abs(z))), []),
    "sum(p * abs(q - w))": (lambda z, a: cp.sum(cp.multiply(a["p"], cp.abs(z - a["w"]))), []),
    "sum(huber(q - w, lam))": (lambda z, a: cp.sum(cp.huber(z - a["w"], lam)) / 2, []),
    "sum(p * (q - w)**2)": (lambda z, a: cp.sum(cp.multiply(a["p"], cp.square(z - a["w"]))), []),
    "sum(maximum(q, w))": (lambda z, a: cp.sum(cp.maximum(z, a["w"])), []),
    "lam*norm1(q) + dot(q, w)": (lambda z, a: lam * cp.norm1(z) + cp.sum(cp.multiply(z, a["w"])), []),
    "lam*norm1(q) + dot(w, A.T @ A @ q)": (lambda z, a: lam * cp.norm1(z) + cp.sum(cp.multiply(a["A"].T @ a["A"] @ a["w"], z)), []),
    "lam*norm1(q) + mu/2*sumsq(q - w)": (lambda z, a: lam * cp.norm1(z) + mu / 2 * cp.sum_squares(z - a["w"]), []),
    "lam*norm1(q) + sum(q)": (lambda z, a: lam * cp.norm1(z) + cp.sum(z), []),
    "lam*norm1(Z - C)": (lambda z, a: lam * cp.norm1(cp.vec(z - a["C"], order="F")), []),
    "lam*norm1(q); q >= 0": (lambda z, a: lam * cp.norm1(z), [lambda z, a: z >= 0]),
    "lam*norm1(q); q in box(lo, hi)": (lambda z, a: lam * cp.norm1(z), [lambda z, a: z >= lo, lambda z, a: z <= hi]),
    "lam*norm1(q - w); q in ball_inf(r)": (lambda z, a: lam * cp.norm1(z - a["w"]), [lambda z, a: cp.abs(z) <= r]),
    "mu/2*sumsq(q) + dot(q, w); q >= 0; q in box(lo, hi)": (lambda z, a: mu / 2 * cp.sum_squares(z) + cp.sum(cp.multiply(z, a["w"])), [lambda z, a: z >= 0, lambda z, a: z <= hi]),
    "lam*norm2(q)": (lambda z, a: lam * cp.norm(z), []),
    "lam*norm2(q - w)": (lambda z, a: lam * cp.norm(z - a["w"]), []),
    "lam*norm2(w - q) + dot(q, w)": (lambda z, a: lam * cp.norm(z - a["w"]) + cp.sum(cp.multiply(z, a["w"])), []),
    "lam*norm2(q) + mu/2*sumsq(q)": (lambda z, a: lam * cp.norm(z) + mu / 2 * cp.sum_squares(z), []),
    "lam*norm2(q - w) + mu/2*sumsq(q)": (lambda z, a: lam * cp.norm(z - a["w"]) + mu / 2 * cp.sum_squares(z), []),
    "lam*norm2(2*q - w)": (lambda z, a: lam * cp.norm(2 * z - a["w"]), []),
    "lam*norm_fro(Z)": (lambda z, a: lam * cp.norm(z, "fro"), []),
    "lam*norm1(q) + mu*norm2(q)": (lambda z, a: lam * cp.norm1(z) + mu * cp.norm(z), []),
    "sum(p * abs(q)) + mu*norm2(q)": (lambda z, a: cp.sum(cp.multiply(a["p"], cp.abs(z))) + mu * cp.norm(z), []),
    "sum(p * abs(q)) + mu*norm2(q); q >= 0": (lambda z, a: cp.sum(cp.multiply(a["p"], cp.abs(z))) + mu * cp.norm(z), [lambda z, a: z >= 0]),
    "lam*group_norm(Z, axis=0) + sum(abs(C) * abs(Z))": (lambda z, a: lam * cp.sum(cp.norm(z, 2, axis=0)) + cp.sum(cp.multiply(np.abs(a["C"]), cp.abs(z))), []),
    "mu*norm2(q); q >= 0": (lambda z, a: mu * cp.norm(z), [lambda z, a: z >= 0]),
    "lam*norm1(q) + mu*norm2(q) + dot(q, w); q >= 0": (lambda z, a: lam * cp.norm1(z) + mu * cp.norm(z) + cp.sum(cp.multiply(z, a["w"])), [lambda z, a: z >= 0]),
    "lam*norm1(q) + mu*norm2(q) + r/2*sumsq(q)": (lambda z, a: lam * cp.norm1(z) + mu * cp.norm(z) + r / 2 * cp.sum_squares(z), []),
    "lam*group_norm(Z, axis=1)": (lambda z, a: lam * cp.sum(cp.norm(z, 2, axis=1)), []),
    "lam*group_norm(Z, axis=0)": (lambda z, a: lam * cp.sum(cp.norm(z, 2, axis=0)), []),
    "lam*group_norm(Z - C, axis=1)": (lambda z, a: lam * cp.sum(cp.norm(z - a["C"], 2, axis=1)), []),
    "lam*group_norm(C - 2*Z, axis=0) + mu/2*sumsq(Z)": (lambda z, a: lam * cp.sum(cp.norm(a["C"] - 2 * z, 2, axis=0)) + mu / 2 * cp.sum_squares(z), []),
    "lam*group_norm(Z, axis=1) + mu*norm1(Z)": (lambda z, a: lam * cp.sum(cp.norm(z, 2, axis=1)) + mu * cp.sum(cp.abs(z)), []),
    "lam*group_norm(Z, axis=0); Z >= 0": (lambda z, a: lam * cp.sum(cp.norm(z, 2, axis=0)), [lambda z, a: z >= 0]),
    "lam*norm_inf(q)": (lambda z, a: lam * cp.norm_inf(z), []),
    "lam*norm_inf(q) + dot(q, w)": (lambda z, a: lam * cp.norm_inf(z) + cp.sum(cp.multiply(z, a["w"])), []),
    "lam*norm_inf(q) + mu/2*sumsq(q)": (lambda z, a: lam * cp.norm_inf(z) + mu / 2 * cp.sum_squares(z), []),
    "lam*sum(max_entry(abs(Z), axis=1)) + dot(C, Z)": (lambda z, a: lam * cp.sum(cp.max(cp.abs(z), axis=1)) + cp.sum(cp.multiply(z, a["C"])), []),
    "lam*sum(max_entry(abs(2*Z), axis=0)) + mu/2*sumsq(Z)": (lambda z, a: 2 * lam * cp.sum(cp.max(cp.abs(z), axis=0)) + mu / 2 * cp.sum_squares(z), []),
    "dot(H, X) - lam*logdet((X + X.T)/2) + mu/2*sumsq(X)": (lambda z, a: cp.sum(cp.multiply(a["H"], z)) - lam * cp.log_det((z + z.T) / 2) + mu / 2 * cp.sum_squares(z), []),
    "lam*norm_inf(Z)": (lambda z, a: lam * cp.max(cp.abs(z)), []),
    "lam*nuclear(Z)": (lambda z, a: lam * cp.normNuc(z), []),
    "lam*nuclear(Z) + dot(C, Z)": (lambda z, a: lam * cp.normNuc(z) + cp.sum(cp.multiply(z, a["C"])), []),
    "lam*nuclear(Z) + mu/2*sumsq(Z)": (lambda z, a: lam * cp.normNuc(z) + mu / 2 * cp.sum_squares(z), []),
    "lam*tv(q)": (lambda z, a: lam * tv(z), []),
    "lam*tv(w - 2*q) + dot(q, w)": (lambda z, a: lam * tv(a["w"] - 2 * z) + cp.sum(cp.multiply(z, a["w"])), []),
    "lam*tv(Z)": (lambda z, a: lam * tv(z), []),
    "sum(abs(difference(w)) * abs(difference(q)))": (lambda z, a: cp.sum(cp.multiply(np.abs(np.diff(a["w"], axis=0)), cp.abs(z[1:] - z[:-1]))), []),
    "lam*norm1(q) + mu*tv(q)": (lambda z, a: lam * cp.norm1(z) + mu * tv(z), []),
    "lam*norm1(Z) + mu*tv(Z) + mu/2*sumsq(Z); Z >= 0": (lambda z, a: lam * cp.sum(cp.abs(z)) + mu * tv(z) + mu / 2 * cp.sum_squares(z), [lambda z, a: z >= 0]),
    "mu*tv(q); q in box(lo, hi)": (lambda z, a: mu * tv(z), [lambda z, a: z >= lo, lambda z, a: z <= hi]),
    "sum(huber(q, lam)) + mu*tv(q)": (lambda z, a: cp.sum(cp.huber(z, lam)) / 2 + mu * tv(z), []),
    "lam*norm1(q) + mu*tv(q) + r*norm2(q)": (lambda z, a: lam * cp.norm1(z) + mu * tv(z) + r * cp.norm(z), []),
    "mu*tv(Z) + r*group_norm(Z, axis=0)": (lambda z, a: mu * tv(z) + r * cp.sum(cp.norm(z, 2, axis=0)), []),
    "1/2*sumsq(A @ q - y)": (lambda z, a: cp.sum_squares(a["A"] @ z - a["y"]) / 2, []),
    "1/2*sumsq(A @ q - y) + mu/2*sumsq(H @ q) + dot(q, w)": (lambda z, a: cp.sum_squares(a["A"] @ z - a["y"]) / 2 + mu / 2 * cp.sum_squares(a["H"] @ z) + cp.sum(cp.multiply(z, a["w"])), []),
    "1/2*sumsq(H @ Z - C)": (lambda z, a: cp.sum_squares(a["H"] @ z - a["C"]) / 2, []),
    "q >= 0": (lambda z, a: 0, [lambda z, a: z >= 0]),
    "q in ball1(r)": (lambda z, a: 0, [lambda z, a: cp.norm1(z) <= r]),
    "q in ball2(r)": (lambda z, a: 0, [lambda z, a: cp.norm(z) <= r]),
    "Z in ball2(r)": (lambda z, a: 0, [lambda z, a: cp.norm(z, "fro") <= r]),
    "Z in ball1(r)": (lambda z, a: 0, [lambda z, a: cp.sum(cp.abs(z)) <= r]),
    "q in simplex": (lambda z, a: 0, [lambda z, a: z >= 0, lambda z, a: cp.sum(z) == 1]),
    "dot(q, w) + mu/2*sumsq(q); q in simplex": (lambda z, a: cp.sum(cp.multiply(z, a["w"])) + mu / 2 * cp.sum_squares(z), [lambda z, a: z >= 0, lambda z, a: cp.sum(z) == 1]),
    "Z in simplex": (lambda z, a: 0, [lambda z, a: z >= 0, lambda z, a: cp.sum(z, axis=0) == 1]),
    "A @ q == y": (lambda z, a: 0, [lambda z, a: a["A"] @ z == a["y"]]),
    "dot(q, w) + mu/2*sumsq(q); A @ q == y": (lambda z, a: cp.sum(cp.multiply(z, a["w"])) + mu / 2 * cp.sum_squares(z), [lambda z, a: a["A"] @ z == a["y"]]),
    "lam*norm1(q); q in simplex(mu); q <= hi": (lambda z, a: lam * cp.norm1(z), [lambda z, a: z >= 0, lambda z, a: z <= hi, lambda z, a: cp.sum(z) == mu]),
    "mu/2*sumsq(q) + dot(q, w); sum(q) == lam; q <= hi": (lambda z, a: mu / 2 * cp.sum_squares(z) + cp.sum(cp.multiply(z, a["w"])), [lambda z, a: z <= hi, lambda z, a: cp.sum(z) == lam]),
    "Z in unit_columns": (lambda z, a: 0, [lambda z, a: cp.norm(z, 2, axis=0) <= 1]),
    "X in psd": (lambda z, a: 0, [lambda z, a: z >> 0]),
    "lam*norm1(O.T @ q)": (lambda z, a: lam * cp.norm1(a["O"].T @ z), []),
    "lam*norm1(y - 2*O.T @ q) + mu/2*sumsq(q)": (lambda z, a: lam * cp.norm1(a["y"] - 2 * a["O"].T @ z) + mu / 2 * cp.sum_squares(z), []),
    "sum(huber(F @ q, lam)) + dot(q, w)": (lambda z, a: cp.sum(cp.huber(a["F"] @ z, lam)) / 2 + cp.sum(cp.multiply(z, a["w"])), []),
    "lam*norm1(O.T @ q - y)": (lambda z, a: lam * cp.norm1(a["O"].T @ z - a["y"]), []),
    "lam*norm2(O.T @ q)": (lambda z, a: lam * cp.norm(a["O"].T @ z), []),
    "lam*norm_inf(2*O.T @ q) + dot(q, w)": (lambda z, a: lam * cp.norm_inf(2 * a["O"].T @ z) + cp.sum(cp.multiply(z, a["w"])), []),
    "lam*nuclear(F @ Z)": (lambda z, a: lam * cp.normNuc(a["F"] @ z), []),
    "lam*group_norm(F @ Z - C, axis=0) + mu/2*sumsq(Z)": (lambda z, a: lam * cp.sum(cp.norm(a["F"] @ z - a["C"], 2, axis=0)) + mu / 2 * cp.sum_squares(z), []),
    "lam*nuclear(X @ F)": (lambda z, a: lam * cp.normNuc(z @ a["F"]), []),
    "lam*norm_fro(X @ O)": (lambda z, a: lam * cp.norm(z @ a["O"], "fro"), []),
}  # fmt: skip
SMALL = {
    "lam*norm1(O.T @ q)",
    "lam*norm1(y - 2*O.T @ q) + mu/2*sumsq(q)",
    "lam*norm1(O.T @ q - y)",
    "lam*norm2(O.T @ q)",
    "lam*norm_inf(2*O.T @ q) + dot(q, w)",
    "lam*norm_fro(X @ O)",
    "A @ q == y",
    "dot(q, w) + mu/2*sumsq(q); A @ q == y",
}
"""Need m <= n."""


def by_cvxpy(text: str, v: Tensor, given: dict[Sym, Tensor]) -> np.ndarray:
    f, constraints = CONVEX[text]
    arrays = {s.name: x.numpy() for s, x in given.items()}
    symmetric = text == "X in psd"
    z = cp.Variable(tuple(v.shape), symmetric=symmetric)
    target = (v + v.T) / 2 if symmetric else v
    objective = cp.Minimize(t * f(z, arrays) + cp.sum_squares(z - target.numpy()) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp.Problem(objective, [c(z, arrays) for c in constraints]).solve(
            solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
        )
    return np.asarray(z.value)


def far(term: Expr, shape: str, seed: int) -> Tensor:
    """A point, near or far from 0."""
    return drawn(shape, seed + 100)[variable(term)] * (0.3, 1.5)[seed % 2]


def shapes_of(text: str) -> list[str]:
    found = ["usual", "one column", "one row", "one entry"] if "Z" in text else ["usual", "one entry"]
    return [s for s in found if not (text in SMALL and SHAPES[s][0] > SHAPES[s][1])]


@pytest.mark.parametrize(("text", "shape"), [(text, shape) for text in CONVEX for shape in shapes_of(text)])
def test_the_prox_of_a_convex_term_is_that_of_cvxpy(text: str, shape: str) -> None:
    term = read(text)
    for seed in range(2 if shape == "usual" else 1):
        given = drawn(shape, seed)
        v = far(term, shape, seed)
        found = applied(term, v, given, shape)
        want = by_cvxpy(text, v, given)
        assert found.shape == v.shape
        assert np.abs(found.numpy() - want).max() < 2e-5, f"{found.numpy()} against {want}"


@pytest.mark.parametrize("text", CONVEX)
def test_no_point_near_it_is_better_than_the_prox(text: str) -> None:
    """Sharper than a solver: steps of all sizes along entries, random directions, and towards v and 0."""
    term = read(text)
    given, g = drawn("usual", 5), torch.Generator().manual_seed(5)
    v = far(term, "usual", 5)
    x = applied(term, v, given, "usual")
    finite = not any(c in text for c in (" in ", ">=", "==", "logdet"))
    smooth = term if finite else None
    if smooth is None:
        return
    best = cost(smooth, x, v, given, "usual")
    n = x.numel()
    ways = torch.cat(
        [
            torch.eye(n, dtype=torch.float64),
            torch.randn(10, n, generator=g, dtype=torch.float64),
            (v - x).flatten()[None],
            x.flatten()[None],
        ]
    )
    for size in (1e-4, 0.1):
        for way in (*ways, *-ways):
            assert cost(smooth, x + size * way.reshape(x.shape), v, given, "usual") >= best - 1e-12 * (1 + abs(best))


@pytest.mark.parametrize("text", CONVEX)
def test_a_convex_prox_is_firmly_nonexpansive(text: str) -> None:
    """|prox(a) - prox(b)|^2 <= <prox(a) - prox(b), a - b>."""
    term, given = read(text), drawn("usual", 6)
    for seed in range(3):
        a, b = far(term, "usual", 2 * seed), far(term, "usual", 2 * seed + 1)
        d = applied(term, a, given, "usual") - applied(term, b, given, "usual")
        assert (d * d).sum() <= (d * (a - b)).sum() + 1e-10


# --- sets that are not convex ---------------------------------------------------------------------------------------------

SETS: dict[str, Callable[[Tensor], Tensor]] = {
    "Z in sphere": lambda x: x / x.norm(dim=0),
    "Z in rank_at_most(2)": lambda x: x[:, :2] @ x[:2, :],
    "Z in sparse(3)": lambda x: x * (x.abs() >= x.abs().flatten().sort(descending=True).values[2]),
    "X in orthogonal": lambda x: torch.linalg.qr(x).Q,
    "Z in stiefel": lambda x: torch.linalg.qr(x).Q,
}  # fmt: skip


@pytest.mark.parametrize("text", SETS)
def test_a_projection_is_feasible_and_no_feasible_sample_is_nearer(text: str) -> None:
    term, g = read(text), torch.Generator().manual_seed(0)
    for seed in range(3):
        v = far(term, "usual", seed)
        x = applied(term, v, drawn("usual", seed), "usual")
        assert torch.allclose(SETS[text](x), x, atol=1e-8) or text in (
            "Z in rank_at_most(2)",
            "X in orthogonal",
            "Z in stiefel",
        )
        if "rank" in text:
            assert torch.linalg.matrix_rank(x) <= 2
        if text in ("X in orthogonal", "Z in stiefel"):
            assert torch.allclose(x.mT @ x, torch.eye(x.shape[1], dtype=x.dtype), atol=1e-8)
        gap = (x - v).norm()
        for size in (0.01, 0.1, 1.0, 10.0):
            for _ in range(20):
                sample = SETS[text](x + size * torch.randn(*v.shape, generator=g, dtype=v.dtype))
                signed = sample * torch.sign((sample * v).sum(0)) if text == "Z in stiefel" else sample
                assert (signed - v).norm() >= gap - 1e-9
        again = applied(term, x, drawn("usual", seed), "usual")
        assert torch.allclose(again, x, atol=1e-8)


NOT_CONVEX = (
    "lam*norm0(q)",
    "lam*norm0(Z) + mu/2*sumsq(Z)",
    "lam*rank(Z)",
    "lam*spectral_sum(log(1 + s), Z)",
    "sum(log(1 + abs(q)))",
    "lam*sum(minimum(abs(q), 1))",
    "lam*sum(sqrt(abs(q)))",
    "abs(norm2(q) - lam)",
    "(sumsq(Z) - 1)**2",
    "-lam*group_norm(Z, axis=0)",
    "-lam*group_norm(Z, axis=1) + mu*sumsq(Z)",
    "-lam*nuclear(Z)",
)


@pytest.mark.parametrize("text", NOT_CONVEX)
def test_the_prox_of_what_is_not_convex_beats_all_samples(text: str) -> None:
    term, g = read(text), torch.Generator().manual_seed(1)
    for seed in range(6):
        given, v = drawn("usual", seed), far(term, "usual", seed)
        v = v * 0 if seed == 4 else v
        v[:, 0] = v[:, 0] * (seed != 5)  # a blank sample, and a blank column among others
        x = applied(term, v, given, "usual")
        best = cost(term, x, v, given, "usual")
        candidates = [torch.zeros_like(v), v, v * (v.abs() > 0.5), v * (v.abs() > 1), -x, 0.9 * x, 1.1 * x]
        if v.shape[1] > 1:
            u, s, w = torch.linalg.svd(v, full_matrices=False)
            candidates += [u[:, :k] @ torch.diag(s[:k]) @ w[:k] for k in range(1, 4)]
        for c in [
            *candidates,
            *(
                x + size * torch.randn(*v.shape, generator=g, dtype=v.dtype)
                for size in (1e-3, 0.1, 1.0)
                for _ in range(8)
            ),
        ]:
            assert cost(term, c, v, given, "usual") >= best - 1e-10


# --- at 0, and derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*CONVEX, *NOT_CONVEX, "Z in rank_at_most(2)", "Z in sparse(3)"])
def test_a_prox_at_zero_is_finite(text: str) -> None:
    term, given = read(text), drawn("usual", 1)
    x = applied(term, torch.zeros_like(given[variable(term)]), given, "usual")
    assert x.isfinite().all()


VANISH = (
    "lam*norm1(q)",
    "lam*norm2(q)",
    "lam*group_norm(Z, axis=1)",
    "lam*norm1(q) + mu*norm2(q)",
    "q in ball2(r)",
    "lam*norm_fro(Z)",
    "lam*norm0(q)",
    "lam*norm_inf(q)",
)


@pytest.mark.parametrize("text", VANISH)
def test_zero_stays_zero_and_has_a_finite_derivative(text: str) -> None:
    term, given = read(text), drawn("usual", 1)
    v = torch.zeros_like(given[variable(term)]).requires_grad_()
    x = applied(term, v, given, "usual")
    (slope,) = torch.autograd.grad(x.sum(), v)
    assert (x == 0).all() and slope.isfinite().all()


@pytest.mark.parametrize(
    "text",
    [
        "lam*norm1(q - w)",
        "lam*norm2(q)",
        "lam*group_norm(Z, axis=1)",
        "sum(huber(q - w, lam))",
        "1/2*sumsq(A @ q - y)",
        "q in ball2(r)",
        "lam*norm1(q) + mu*norm2(q)",
    ],
)
def test_derivatives_of_a_prox_are_those_of_differences(text: str) -> None:
    term, given = read(text), drawn("usual", 3)
    v = far(term, "usual", 3)
    got = torch.autograd.functional.jacobian(lambda x: applied(term, x, given, "usual"), v).reshape(v.numel(), -1)  # type: ignore[union-attr]
    h = 1e-6
    ways = torch.eye(v.numel(), dtype=v.dtype).reshape(-1, *v.shape)
    want = torch.stack(
        [
            (applied(term, v + h * d, given, "usual") - applied(term, v - h * d, given, "usual")).flatten() / (2 * h)
            for d in ways
        ],
        1,
    )
    assert torch.allclose(got, want, atol=1e-5)


def test_the_step_scales_the_term() -> None:
    """prox of t (c f) is prox of (t c) f."""
    given, v = drawn("usual", 0), drawn("usual", 1)[q]
    at = symbol("v", N, 1, "state")
    for text in ("norm1(q)", "norm2(q)", "norm_inf(q)"):
        f = parse_matrix(text, SCOPE)
        one, two = (plan(prox(c * f, q, s, at)) for c, s in ((LAM, STEP), (sp.Integer(1), STEP * LAM)))  # type: ignore[arg-type]
        assert torch.allclose(*(evaluate(p, {**given, at: v}, scalars("usual")) for p in (one, two)))


def test_the_divergence_from_counts_has_its_prox_where_a_count_is_zero_too() -> None:
    counts = torch.tensor([[0.0], [0.5], [3.0], [0.0]], dtype=torch.float64)
    v = torch.tensor([[1.5], [-2.0], [0.3], [0.2]], dtype=torch.float64)
    node = prox(read("kl(p, q)"), q, STEP, symbol("v", N, 1, "state"))
    assert isinstance(node, Prox)
    found = evaluate(plan(node), {P: counts, symbol("v", N, 1, "state"): v}, {STEP: t, N: 4})
    assert torch.allclose(found, (v - t + ((v - t) ** 2 + 4 * t * counts).sqrt()) / 2)  # z - t count / z = v - t


def test_projections_of_the_oracle_are_idempotent() -> None:
    g = torch.Generator().manual_seed(0)
    for name, params in (("simplex", []), ("ball1", [torch.tensor(0.7)]), ("unit_columns", []), ("sphere", [])):
        x = project(name, torch.randn(4, 3, generator=g, dtype=torch.float64), params)  # type: ignore[arg-type]
        assert torch.allclose(project(name, x, params), x, atol=1e-9)  # type: ignore[arg-type]


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "lam*norm1(A @ q)": "not declared orthonormal",
    "lam*norm1(H.T @ q)": "not declared orthonormal",
    "lam*norm1(E @ q)": "not declared orthonormal",
    "sumsq(difference(q))": "",
    "lam*norm1(O @ y * dot(q, w))": "",
    "lam*norm2(A @ q)": "not declared orthonormal",
    "lam*norm1(q) + mu*norm_inf(q)": "no rule joins them",
    "lam*nuclear(Z) + mu*norm1(Z)": "no rule joins them",
    "lam*logdet((X + X.T)/2)": "",
    "norm1(X) - logdet((X + X.T)/2)": "no rule joins them",
    "lam*nuclear(Z); Z >= 0": "no rule joins them",
    "q in ball1(r); q in ball2(r)": "no rule joins them",
    "sum(q**2*atan(q)**2) + norm2(q)": "no rule joins them",
    "lam*norm2(q); q in box(lo, hi)": "no rule joins them",
    "lam*norm2(q - w) + mu*norm1(q)": "no rule joins them",
    "lam*norm2(q) - mu*norm1(q)": "no rule joins them",
    "sum(w * abs(q)) + mu*norm2(q)": "",
    "abs(norm2(q) - 1) + mu*norm1(q)": "no rule joins them",
    "-lam*group_norm(Z, axis=0); Z >= 0": "no rule joins them",
    "1/2*sumsq(A @ q - y); q >= 0": "no rule joins them",
    "-lam*tv(q)": "",
    "sum(difference(w) * abs(difference(q)))": "",
    "tv(q) + tv(q - w)": "no rule joins them",
    "tv(q) + sum(p * abs(q))": "no rule joins them",
    "tv(q - w) + norm1(q)": "no rule joins them",
    "tv(q) + norm2(q - w)": "no rule joins them",
    "tv(q); q in simplex": "no rule joins them",
    "tv(Z) + group_norm(Z, axis=1)": "no rule joins them",
    "norm1(difference(q) - difference(w) * 2 + 1)": "",
    "-lam*norm_inf(q)": "",
    "sum(q**3)": "",
    "-sumsq(q) * sumsq(q)": "",
    "lam*norm1(Z @ C.T)": "",
    "spectral(F @ Z)": "no rule gives its prox",
    "q >= 1; q <= 0": "no entry is at least 1 and at most 0",
    "q in box(r, 0)": "its lower bound r is above its upper bound 0",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_no_rule_covers_is_refused_with_the_reason(text: str) -> None:
    term = read(text)
    with pytest.raises(DeriveError) as refused:
        proximable(term, variable(term))
    assert refused.value.code == "E302"
    assert REFUSED[text] in refused.value.message


def test_a_term_that_is_refused_is_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[sp.Expr] = []

    def refuse(f: sp.Expr, *_: object) -> None:
        asked.append(f)
        raise DeriveError("E302", "not this one")

    monkeypatch.setattr("unroll.calculus.prox.derive_prox", refuse)
    with pytest.raises(DeriveError, match="not this one"):
        proximable(read("sum(cosh(sinh(q)))"), q)
    assert len(asked) == 1
