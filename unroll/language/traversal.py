"""Expressions with parts exchanged: one memoised walk from the leaves up, through the constructors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import sympy as sp

from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    elementwise,
    eye,
    family_logsumexp,
    family_softmax,
    family_sum,
    hold,
    indicator,
    matmul,
    noise,
    normalise,
    number,
    ones,
    operator,
    prox,
    rebuild,
    signal,
    spectral,
    spectral_map,
    spectrum,
    split,
    swap,
    symbol,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Expr,
    Eye,
    FamilyLogSumExp,
    FamilySoftmax,
    FamilySum,
    Hold,
    Indicator,
    Map,
    Mul,
    Noise,
    Normalise,
    Ones,
    Op,
    Prox,
    Signal,
    Spectral,
    SpectralMap,
    Spectrum,
    Sym,
    Zero,
    show_shape,
)

E = TypeVar("E", bound=Expr)


def transform(e: Expr, rule: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Rewrite bottom-up: children first, then `rule` on the rebuilt node (None: leave it)."""
    memo = {} if memo is None else memo
    if e not in memo:
        fresh = rebuild(e, tuple(transform(c, rule, memo) for c in e.children))
        changed = rule(fresh)
        memo[e] = fresh if changed is None else changed
    return memo[e]


def substitute(e: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace whole nodes (symbols, usually) by expressions."""
    return transform(e, mapping.get)


def held_at(e: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """What is held constant worked out at a point; all else as it is."""
    return transform(e, lambda x: hold(substitute(x.x, mapping)) if isinstance(x, Hold) else None)


def substitute_scalars(e: Expr, mapping: Mapping[Any, Any]) -> Expr:
    """Replace SymPy symbols in coefficients, profiles, parameters and sizes."""
    if not mapping:
        return e
    put: Callable[[Any], sp.Expr] = lambda x: swap(number(x), mapping)

    def rule(node: Expr) -> Expr | None:
        match node:
            case Mul(c, factors):
                return matmul(*factors, coef=put(c))
            case Map(profile, args):
                return elementwise(put(profile), *args)
            case SpectralMap(h, x):
                return spectral_map(put(h), x)
            case Spectral(h, x):
                return spectral(put(h), x)
            case Eye(n):
                return eye(put(n))
            case Ones(r, c):
                return ones(put(r), put(c))
            case Zero(r, c):
                return zeros(put(r), put(c))
            case Sym():
                return symbol(
                    node.name, put(node.nrows), put(node.ncols), node.role, node.rank,
                    None if node.family is None else put(node.family), node.props,
                )  # fmt: skip
            case FamilySum(i, n, body):
                return family_sum(i, put(n), body)
            case FamilyLogSumExp(i, n, body):
                return family_logsumexp(i, put(n), body)
            case FamilySoftmax(i, n, x):
                return family_softmax(i, put(n), x)
            case Noise(kind, rate, x):
                return noise(kind, put(rate), x)
            case Op(name, x, adjoint, sizes) if sizes:
                return operator(name, x, adjoint, tuple(map(put, sizes)))
            case Spectrum(i, sizes, x, conjugate):
                return spectrum(i, tuple(map(put, sizes)), x, conjugate)
            case Signal(i, sizes, body):
                return signal(i, tuple(map(put, sizes)), body)
            case Normalise(kind, axis, eps, x, weight, bias):
                return normalise(kind, axis, put(eps), x, weight, bias)
            case Indicator(name, params, x):
                return indicator(name, x, *(p if isinstance(p, Expr) else put(p) for p in params))
            case Prox(term, variable, t, at, swaps):
                return prox(term, variable, put(t), at, tuple((put(a), b) for a, b in swaps))
            case _:
                return None

    return transform(e, rule)


def expand(e: Expr) -> Expr:
    """Products distributed over sums, everywhere outside nonlinear nodes: equal matrix polynomials become one object."""
    match e:
        case Add(terms):
            return add(*map(expand, terms))
        case Mul(c, factors):
            words: list[tuple[sp.Expr, tuple[Expr, ...]]] = [(c, ())]
            for f in factors:
                f = expand(f)
                options = [split(t) for t in (f.terms if isinstance(f, Add) else (f,))]
                words = [(a * b, (*w, x)) for a, w in words for b, x in options]
            return add(*(matmul(*w, coef=a) for a, w in words))
        case _:
            return e


def require_scalar(e: Expr) -> None:
    if not e.is_scalar:
        raise DeriveError(
            "E133",
            f"an objective must be a scalar, this is {show_shape(e.shape)}",
            hint="sum(...) or sumsq(...) makes a scalar",
        )
