"""Each token from those up to it: sums over tokens as running sums, Gram matrices through a mask."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise

import sympy as sp

from unroll.derivation.rewrites.patterns import stacked, terms_of, turned
from unroll.derivation.rewrites.record import Rule, Site
from unroll.language.constructors import (
    add,
    elementwise,
    matmul,
    ones,
    operator,
    prox,
    rebuild,
    scale,
    softmax,
    split,
    swap,
    total,
    transpose,
)
from unroll.language.nodes import (
    Add,
    Expr,
    FamilySoftmax,
    FamilySum,
    Hold,
    Inverse,
    LogDet,
    LogSumExp,
    Map,
    Max,
    Mul,
    Normalise,
    Prox,
    ShapeError,
    Softmax,
    Spectral,
    SpectralDivergence,
    SpectralMap,
    SpectralNorm,
    Sum,
    Sym,
    Trace,
    Transpose,
    Worked,
    same,
    slot,
)


def gram_to_softmax(scale: sp.Expr, causal: bool = False) -> Rule:
    """V Vᵀ V → V softmax(scale Vᵀ V), down the columns."""

    def rule(e: Expr) -> Site | None:
        if not isinstance(e, Mul):
            return None
        fs = e.factors
        for length in range(len(fs) // 3, 0, -1):
            for i in range(len(fs) - 3 * length + 1):
                v = fs[i : i + length]
                if fs[i + length : i + 2 * length] == turned(v) and fs[i + 2 * length : i + 3 * length] == v:
                    weights = softmax(matmul(*turned(v), *v, coef=scale), 0, causal)
                    return Site(e, matmul(*fs[: i + length], weights, *fs[i + 3 * length :], coef=e.coef))
        return None

    return rule


def causal_tokens(over: sp.Expr) -> Rule:
    """Sums over tokens become running sums: token j sees the tokens up to j. What is in front of terms stays: see `counted`."""

    def rule(e: Expr) -> Site | None:
        with suppress(ShapeError):  # no form that it knows: what is left is refused
            out = _sum_repeated([scale(c, _running(x, over)) for c, x in map(split, terms_of(e))])
            return Site(e, out) if out is not e else None
        return None

    return rule


def counted(e: Expr, over: sp.Expr, values: Mapping[sp.Symbol, sp.Expr]) -> Expr:
    """The number of tokens in front of the terms of e becomes that of the tokens up to each. values: of scalars in their place."""
    if isinstance(e, Prox):
        return prox(e.term, e.variable, e.t, counted(e.at, over, values), e.swaps)
    terms = [(c, x, sp.cancel(swap(c, dict(values)))) for c, x in map(split, terms_of(e))]
    if not any(number.has(over) for _, _, number in terms):
        return e
    return _sum_repeated([_counted(number, x, over) if number.has(over) else scale(c, x) for c, x, number in terms])


def _counted(c: sp.Expr, e: Expr, n: sp.Expr) -> Expr:
    """c e with n in c the number of tokens so far, a row."""
    return elementwise(c.subs(n, slot(0)) * slot(1), _counts(n), e) if c.has(n) else scale(c, e)


def _counts(n: sp.Expr) -> Expr:
    """1, 2, .. n: how many tokens there are up to each."""
    return operator("running_sum", ones(1, n))


def _running(e: Expr, n: sp.Expr) -> Expr:
    """e with every sum over the n tokens replaced by the sums up to each token: what was one value is a row of n values."""
    if same(e.rows, n) and not same(e.cols, n):  # tokens as rows
        return transpose(_running(transpose(e), n)) if not isinstance(e, Transpose | Sym) else e
    match e:
        case Sum(x, None | 1) if same(x.cols, n) or (same(x.rows, n) and x.cols == 1):
            inner = _running(x if same(x.cols, n) else transpose(x), n)
            return operator("running_sum", inner if e.axis == 1 else total(inner, 0))
        case Sum(x, 0) if same(x.rows, n):
            return transpose(operator("running_sum", _running(transpose(x), n)))
        case Mul(c, factors):
            return _running_product(c, factors, n)
        case Softmax(x, axis, False) if same(x.rows, n) and same(x.cols, n):
            return softmax(x, axis, True)
        case Map(profile, args) if profile.has(n):
            return elementwise(profile.subs(n, slot(len(args))), *(_running(a, n) for a in args), _counts(n))
        case Map(profile, args):
            return elementwise(profile, *(_running(a, n) for a in args))
        case Add(terms):
            parts = [_running(t, n) for t in terms]
            return _sum_repeated(parts)
        case FamilySum() | FamilySoftmax() | Hold():
            return rebuild(e, tuple(_running(c, n) for c in e.children))
        case Sum():
            return rebuild(e, (_running(e.x, n),))
        case _:
            return e


def looks_ahead(e: Expr, over: sp.Expr) -> Expr | None:
    """A part of e in which a token sees later ones: a sum over tokens that is neither running nor weighed by causal shares, or
    their number. What is in front of terms is not looked at: see `counted`."""
    return next((x for t in terms_of(e) if (x := _ahead(split(t)[1], over)) is not None), None)


def _ahead(e: Expr, over: sp.Expr) -> Expr | None:
    across: list[sp.Expr]
    match e:
        case Prox():  # its term is a definition
            return looks_ahead(e.at, over)
        case Mul(c, _) if c.has(over):
            across = [over]
        case Sum(x, axis) | LogSumExp(x, axis) | Max(x, axis):
            across = [n for n, a in zip(x.shape, (0, 1), strict=True) if axis in (None, a)]
        case Normalise() | Softmax(causal=False):
            across = [e.shape[e.axis]]
        case (
            Inverse()
            | LogDet()
            | Trace()
            | Spectral()
            | SpectralMap()
            | SpectralNorm()
            | SpectralDivergence()
            | Worked()
        ):
            across = list(e.children[0].shape)
        case Mul(_, factors):
            across = [a.cols for a, b in pairwise(factors) if not (_upper(b) or _upper(transpose(a)))]
        case Map(profile, _) if profile.has(over):
            across = [over]
        case _:
            across = []
    if any(same(n, over) for n in across):
        return e
    return next((found for c in e.children if (found := _ahead(c, over)) is not None), None)


def _upper(e: Expr) -> bool:
    """Is entry (i, j) 0 for i > j?"""
    match e:
        case Softmax(axis=0, causal=True):
            return True
        case Map(profile, args):
            return any(_upper(a) and profile.subs(slot(i), 0) == 0 for i, a in enumerate(args))
        case _:
            return False


def _sum_repeated(parts: list[Expr]) -> Expr:
    """The sum of terms, of which some were one value and are a row now."""
    shapes = {p.shape for p in parts}
    return add(*parts) if len(shapes) == 1 else elementwise(sp.Add(*(slot(i) for i in range(len(parts)))), *parts)


def _running_product(c: sp.Expr, factors: tuple[Expr, ...], n: sp.Expr) -> Expr:
    """A @ b with b a column over tokens: the running sum of A * b'.  a @ r with a worked out over tokens, r a row: a * r.
    A @ (w * B) @ C with w a column: A @ (w * (B @ C))."""
    for i, f in enumerate(factors[1:-1], 1):
        if isinstance(f, Map) and not same(f.rows, n) and isinstance(tail := matmul(*factors[i:]), Map):
            return _counted(c, matmul(*factors[:i], _running(tail, n)), n)
    parts = [_running(f, n) for f in factors]
    if len(factors) >= 2 and same(factors[-1].rows, n) and factors[-1].cols == 1 and same(factors[-2].cols, n):
        weighed = operator("running_sum", elementwise(slot(0) * slot(1), parts[-2], transpose(parts[-1])))
        return _counted(c, stacked(factors[0].rows, *parts[:-2], weighed), n)
    if len(factors) > 1 and factors[-1].rows == 1 and same((front := _running(matmul(*factors[:-1]), n)).cols, n):
        return _counted(c, elementwise(slot(0) * slot(1), front, parts[-1]), n)
    return _counted(c, matmul(*parts), n)
