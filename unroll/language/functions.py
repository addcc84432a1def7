"""The functions of the language: one record each. Adding one is one entry in FUNCTIONS (or SETS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import sympy as sp

from unroll.language.constructors import (
    answer_divergence,
    constant,
    diag,
    diagonal,
    elementwise,
    eye,
    factored,
    hold,
    indicator,
    inverse,
    largest,
    logdet,
    logsumexp,
    normalise,
    ones,
    operator,
    scale,
    softmax,
    sort,
    spectral,
    spectral_norm,
    top,
    total,
    trace,
    transpose,
    zeros,
)
from unroll.language.nodes import ONE, Expr, ShapeError, same, show_shape, slot

Kind = Literal["matrix", "vector", "number", "size", "axis", "eps", "weight", "bias", "share", "probes"]
Value = Expr | sp.Expr
u, w = slot(0), slot(1)


@dataclass(frozen=True)
class Function:
    """`kinds`: what each argument must be; the last `optional` ones may be left out. Matrix arguments arrive as `Expr`,
    numbers and sizes as SymPy expressions, an axis as 0 or 1."""

    name: str
    kinds: tuple[Kind, ...]
    build: Callable[..., Value]
    about: str
    optional: int = 0

    @property
    def signature(self) -> str:
        names = {
            "matrix": "M",
            "vector": "v",
            "number": "a",
            "size": "n",
            "axis": "axis",
            "eps": "eps",
            "weight": "weight",
            "bias": "bias",
            "share": "p",
            "probes": "probes",
        }
        shown = [names[k] for k in self.kinds]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class Elementwise:
    """A scalar formula in _0, _1, ... applied to every entry; the derivative, curvature and prox are derived from it."""

    name: str
    arity: int
    profile: sp.Expr
    about: str


def _huber() -> sp.Expr:
    return sp.Piecewise((u**2 / 2, sp.Abs(u) <= w), (w * (sp.Abs(u) - w / 2), True))


ELEMENTWISE: tuple[Elementwise, ...] = (
    Elementwise("abs", 1, sp.Abs(u), "|u|"),
    Elementwise("exp", 1, sp.exp(u), "e^u"),
    Elementwise("log", 1, sp.log(u), "natural logarithm"),
    Elementwise("sqrt", 1, sp.sqrt(u), "square root"),
    Elementwise("tanh", 1, sp.tanh(u), "hyperbolic tangent"),
    Elementwise("sinh", 1, sp.sinh(u), "hyperbolic sine"),
    Elementwise("cosh", 1, sp.cosh(u), "hyperbolic cosine"),
    Elementwise("atan", 1, sp.atan(u), "arc tangent"),
    Elementwise("erf", 1, sp.erf(u), "error function, 2/sqrt(pi) times the integral of e^(-t^2) from 0 to u"),
    Elementwise("sin", 1, sp.sin(u), "sine"),
    Elementwise("cos", 1, sp.cos(u), "cosine"),
    Elementwise("sign", 1, sp.sign(u), "-1, 0 or 1"),
    Elementwise("maximum", 2, sp.Max(u, w), "the larger of two"),
    Elementwise("minimum", 2, sp.Min(u, w), "the smaller of two"),
    Elementwise("sigmoid", 1, 1 / (1 + sp.exp(-u)), "1 / (1 + e^-u)"),
    Elementwise("softplus", 1, sp.log(1 + sp.exp(u)), "log(1 + e^u)"),
    Elementwise("logistic", 1, sp.log(1 + sp.exp(-u)), "the logistic loss log(1 + e^-u)"),
    Elementwise("huber", 2, _huber(), "u^2/2 up to delta, then delta (|u| - delta/2)"),
    Elementwise("pos", 1, sp.Max(u, 0), "the positive part max(u, 0)"),
)


def of(profile: sp.Expr, *args: Expr) -> Expr:
    return elementwise(profile, *args)


def sumsq(x: Expr) -> Expr:
    return total(of(u**2, x))


def norm1(x: Expr) -> Expr:
    return total(of(sp.Abs(u), x))


def norm_fro(x: Expr) -> Expr:
    return of(sp.sqrt(u), sumsq(x))


def dot(x: Expr, y: Expr) -> Expr:
    _equal(x, y, "dot")
    return total(of(u * w, x, y))


def group_norm(x: Expr, axis: int) -> Expr:
    """Sum of the Euclidean norms of the columns (axis 0) or rows (axis 1)."""
    return total(of(sp.sqrt(u), total(of(u**2, x), cast(Any, axis))))


def normalize(x: Expr, axis: int) -> Expr:
    return of(u / sp.sqrt(w), x, total(of(u**2, x), cast(Any, axis)))


def kl(x: Expr, y: Expr) -> Expr:
    _equal(x, y, "kl")
    return total(of(u * sp.log(u / w) - u + w, x, y))


def sorted_l1(x: Expr, weights: Expr) -> Expr:
    """The weights times the magnitudes of x, the largest first, added up: of each column."""
    if weights.cols != 1 or not same(weights.rows, x.rows):
        raise ShapeError(f"sorted_l1 needs a weight for each of {x.rows} rows, not {show_shape(weights.shape)}")
    return total(of(u * w, weights, sort(of(sp.Abs(u), x))))


def oscar(x: Expr, a: sp.Expr, b: sp.Expr) -> Expr:
    """a |x|_1 + b times the larger magnitude of each pair: sorted, with weights a + b (n - 1), .., a + b, a."""
    if x.rows == 1:
        return scale(a, norm1(x))
    ahead = transpose(operator("running_sum", ones(1, x.rows - 1), adjoint=True))
    return sorted_l1(x, of(a + b * u, operator("first", ahead, sizes=(x.rows,))))


def _equal(x: Expr, y: Expr, who: str) -> None:
    if x.shape != y.shape:
        raise ShapeError(f"{who} needs two of one shape, not {show_shape(x.shape)} and {show_shape(y.shape)}")


def _nonzero() -> sp.Expr:
    return sp.Piecewise((0, sp.Eq(u, 0)), (1, True))


def _norm(kind: str) -> Callable[..., Expr]:
    def build(x: Expr, axis: int = 0, eps: sp.Expr = EPS, weight: Expr | None = None, bias: Expr | None = None) -> Expr:
        return normalise(kind, axis, eps, x, weight, bias)

    return build


def _shifts(adjoint: bool = False) -> Callable[..., Expr]:
    return lambda x, *sizes: operator("shifts", x, adjoint, sizes)


EPS = sp.Rational(1, 100_000)
NORMS = (
    ("layer_norm", "layer_norm", "columns (axis=0) with mean 0 and variance 1, then weight and bias"),
    ("rms_norm", "rms_norm", "columns with mean square 1, then weight and bias"),
    ("unit_norm", "sphere", "columns with Euclidean norm 1 (or less, below eps), then weight and bias"),
)


FACTORS = (
    ("pinv", "pseudoinverse"),
    (
        "svd_u",
        "this and what follows up to eigh_vectors: of parameters and inputs, worked out once, constants for slopes; left singular vectors, those of the largest values first; the largest entry of each is positive",
    ),
    ("svd_s", "singular values, the largest first"),
    ("svd_v", "right singular vectors, M = svd_u(M) @ diag(svd_s(M)) @ svd_v(M).T"),
    ("qr_q", "orthonormal factor Q of M = Q R"),
    ("qr_r", "upper triangular factor R of M = Q R, its diagonal not negative"),
    ("eigh_values", "eigenvalues of a symmetric matrix, the smallest first"),
    ("eigh_vectors", "its eigenvectors; the largest entry of each is positive"),
)


def _factored(name: str) -> Callable[..., Expr]:
    return lambda x: factored(name, x)


FUNCTIONS: tuple[Function, ...] = (
    Function("I", ("size",), eye, "identity matrix"),
    Function("ones", ("size", "size"), lambda m, n=ONE: ones(m, n), "matrix (or vector) of ones", optional=1),
    Function("zeros", ("size", "size"), lambda m, n=ONE: zeros(m, n), "matrix (or vector) of zeros", optional=1),
    Function("inv", ("matrix",), inverse, "matrix inverse"),
    Function("diag", ("vector",), diag, "diagonal matrix of a vector"),
    Function("diagonal", ("matrix",), diagonal, "diagonal of a square matrix, as a vector"),
    Function("transpose", ("matrix",), transpose, "the same as M.T"),
    Function("rows", ("matrix",), lambda x: x.rows, "number of rows"),
    Function("cols", ("matrix",), lambda x: x.cols, "number of columns"),
    Function("sum", ("matrix", "axis"), total, "sum of entries, or along an axis; also sum(f(U[k]) for k in K)", optional=1),
    Function("dot", ("matrix", "matrix"), dot, "sum of entrywise products"),
    Function("trace", ("matrix",), trace, "sum of the diagonal"),
    Function("logdet", ("matrix",), logdet, "log determinant of a symmetric positive definite matrix"),
    Function("det", ("matrix",), lambda x: of(sp.exp(u), logdet(x)), "determinant of a symmetric positive definite matrix"),
    Function("sumsq", ("matrix",), sumsq, "sum of squares (squared Frobenius norm)"),
    Function("norm1", ("matrix",), norm1, "sum of absolute values"),
    Function("norm2", ("vector",), norm_fro, "Euclidean norm of a vector"),
    Function("norm_fro", ("matrix",), norm_fro, "Frobenius norm"),
    Function("norm_inf", ("matrix",), lambda x: largest(of(sp.Abs(u), x)), "largest absolute value"),
    Function("norm0", ("matrix",), lambda x: total(of(_nonzero(), x)), "number of nonzero entries"),
    Function("norm4", ("matrix",), lambda x: of(u ** sp.Rational(1, 4), total(of(u**4, x))), "fourth root of the sum of fourth powers"),
    Function("group_norm", ("matrix", "axis"), group_norm, "sum of the norms of the columns (axis=0) or rows (axis=1)"),
    Function("nuclear", ("matrix",), lambda x: spectral(u, x), "sum of singular values"),
    Function("spectral", ("matrix",), spectral_norm, "largest singular value"),
    Function("rank", ("matrix",), lambda x: spectral(_nonzero(), x), "number of nonzero singular values"),
    Function("tv", ("matrix",), lambda x: norm1(operator("difference", x)), "total variation: sum of |differences of neighbours|, down each column"),
    Function("sort", ("matrix",), sort, "entries of each column, the largest first"),
    Function("sorted_l1", ("matrix", "vector"), sorted_l1, "sorted 1-norm (SLOPE): weights v, which fall, times the magnitudes, the largest first, of each column"),
    Function("oscar", ("matrix", "number", "number"), oscar, "a |M|_1 + b times the larger magnitude of each pair of entries, of each column"),
    Function("difference", ("matrix",), lambda x: operator("difference", x), "differences of neighbours, n - 1 of them, down each column"),
    Function("difference_T", ("matrix",), lambda x: operator("difference", x, adjoint=True), "adjoint of difference"),
    Function("logsumexp", ("matrix", "axis"), logsumexp, "log of the sum of exponentials", optional=1),
    Function("softmax", ("matrix", "axis"), softmax, "exponentials, normalised along an axis"),
    Function("normalize", ("matrix", "axis"), normalize, "columns (axis=0) or rows (axis=1) scaled to unit norm"),
    Function("entropy", ("matrix",), lambda p: total(of(-u * sp.log(u), p)), "-sum p log p"),
    Function("kl", ("matrix", "matrix"), kl, "sum x log(x/y) - x + y"),
    Function("max_entry", ("matrix", "axis"), largest, "largest entry", optional=1),
    Function("causal_softmax", ("matrix", "axis"), lambda x, axis: softmax(x, axis, causal=True), "softmax of a square matrix: entry i of column j counts for i <= j"),
    *(Function(name, ("matrix", "axis", "eps", "weight", "bias"), _norm(kind), about, optional=4) for name, kind, about in NORMS),
    Function("running_sum", ("matrix",), lambda x: operator("running_sum", x), "sums of each row from its start"),
    Function("running_sum_T", ("matrix",), lambda x: operator("running_sum", x, adjoint=True), "sums of each row to its end"),
    Function("shifts", ("matrix", "size", "size"), _shifts(), "all cyclic shifts of each column, channels by n places (or n by m)", optional=1),
    Function("shifts_T", ("matrix", "size", "size"), _shifts(adjoint=True), "adjoint of shifts", optional=1),
    Function("repeat", ("vector", "size"), lambda x, n: operator("repeat", x, sizes=(n,)), "each entry n times"),
    Function("repeat_T", ("vector", "size"), lambda x, n: operator("repeat", x, adjoint=True, sizes=(n,)), "adjoint of repeat: sums of n entries"),
    Function("groups", ("vector", "size"), lambda x, n: operator("groups", x, sizes=(n,)), "groups of n entries that follow one another, each a column"),
    Function("groups_T", ("matrix", "size"), lambda x, n: operator("groups", x, adjoint=True, sizes=(n,)), "adjoint of groups: columns below one another"),
    Function("first", ("matrix", "size"), lambda x, n: operator("first", x, sizes=(n,)), "the first n entries, 0 after the last, of each column"),
    Function("top", ("matrix", "share"), top, "1 where an entry is among the share p (0 to 1) of largest magnitudes of its sample, else 0; a condition of where too"),
    *(Function(name, ("matrix",), _factored(name), about) for name, about in FACTORS),
    Function("div", ("matrix", "matrix", "probes"), answer_divergence, "of a [loss](losses.md#without-clean-targets) alone: the divergence of what a network made of an input, in that; exact, or estimated along random signs", optional=1),
    Function("stop_gradient", ("matrix",), hold, "a constant for every derivation: gradient, curvature, prox"),
)  # fmt: skip


@dataclass(frozen=True)
class Set:
    """A constraint set: `kinds` of its parameters; the last `optional` ones may be left out."""

    name: str
    kinds: tuple[Kind, ...]
    about: str
    optional: int = 0

    def indicator(self, x: Expr, *params: Any) -> Expr:
        """Raises ShapeError where A, x and b of A @ x = b do not fit."""
        if self.name == "affine":
            a, b = params
            if not (same(a.cols, x.rows) and same(b.rows, a.rows) and same(b.cols, x.cols)):
                raise ShapeError(f"{show_shape(a.shape)} times {show_shape(x.shape)} is not {show_shape(b.shape)}")
        return indicator(self.name, x, *params)


SETS: tuple[Set, ...] = (
    Set("nonneg", (), "all entries >= 0"),
    Set("box", ("number", "number"), "all entries between a and b"),
    Set("simplex", ("number",), "entries >= 0 that sum to a, or to 1: `simplex` (each column of a matrix)", optional=1),
    Set("ball1", ("number",), "sum of absolute values at most r"),
    Set("ball2", ("number",), "Euclidean (Frobenius) norm at most r"),
    Set("ball_inf", ("number",), "every entry at most r in absolute value"),
    Set("sphere", (), "Euclidean norm 1 (each column of a matrix)"),
    Set("psd", (), "symmetric positive semidefinite"),
    Set("orthogonal", (), "square with M.T @ M = I"),
    Set("stiefel", (), "M.T @ M = I"),
    Set("unit_columns", (), "every column of norm at most 1"),
    Set("affine", ("matrix", "matrix"), "A @ x = b"),
    Set("sparse", ("size",), "at most s nonzero entries"),
    Set("rank_at_most", ("size",), "rank at most r"),
)

BY_NAME: dict[str, Function] = {f.name: f for f in FUNCTIONS}
ELEMENTWISE_BY_NAME: dict[str, Elementwise] = {f.name: f for f in ELEMENTWISE}
SETS_BY_NAME: dict[str, Set] = {s.name: s for s in SETS}


def as_expr(value: Value) -> Expr:
    """A SymPy scalar as a 1 × 1 expression."""
    return value if isinstance(value, Expr) else constant(value)
