"""Proximal steps of entropy: argmin over x >= 0 of t g(x) + sum(x log(x/v) - x + v), v > 0.

    linear, |x| on x >= 0      v exp(-t c)
    bounds                     clipped: the minimiser of a convex function of one number
    c z log z                  a power of that
    simplex, sums of columns   each column divided by its sum, and times what it is to be

Source: Beck & Teboulle 2003, doi:10.1016/S0167-6377(02)00231-6.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.prox import Parts, turned
from unroll.calculus.torch_text import log_of_mass, reciprocal
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    as_constant,
    constant,
    elementwise,
    logsumexp,
    scale,
    softmax,
    swap,
    times,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import Add, Expr, Sym, slot
from unroll.language.show import text
from unroll.language.traversal import expand


def entropic(term: Expr, z: Sym, t: sp.Expr, v: Expr, logs: bool = False) -> Expr:
    """The minimiser, as an expression in v; t = inf: of the term alone. logs: its logarithm, v that of the point.

    Raises DeriveError E302 where no rule gives it.
    """
    try:
        return _entropic(term, z, t, v, logs)
    except DeriveError as refused:
        if (other := turned(term, z)) is None:
            raise
        try:  # of the transpose, the transpose
            return transpose(_entropic(*other, t, transpose(v), logs))
        except DeriveError:
            raise refused from None


def _entropic(term: Expr, z: Sym, t: sp.Expr, v: Expr, logs: bool) -> Expr:
    p = Parts.of(term, z)
    known = _entropy_and_slope(sp.Add(*p.entries))
    others = replace(p, tilt=(), entries=(), others=(), domain=(), sets=()) != Parts()
    sums = _sums(p, z)
    if others or known is None or len(p.sets) > 1 or (p.sets and (sums is None or p.domain)):
        raise DeriveError(
            "E302",
            f"no proximal step of entropy is known for {text(term)}",
            hint="linear terms, c |z|, c z log z and sets of bounds have one, the simplex, and sums that are not negative",
        )
    entropy, slope = known
    lo = sp.Max(0, *(d[0] for d in p.domain))
    hi = sp.Min(sp.oo, *(d[1] for d in p.domain))
    simplex = [name for name, _ in p.sets] == ["simplex"]
    allowed = "positive" in z.props or any(d[0].is_nonnegative for d in p.domain)
    if not simplex and entropy == 0 and not allowed:
        raise DeriveError(
            "E302",
            f"{text(term)} allows entries below 0, which have no entropy",
            hint=f"declare {z.name} `positive: true`, or constrain it: {z.name} in nonneg",
        )
    if t.is_infinite and not entropy.is_positive:
        raise DeriveError(
            "E302", f"{text(term)} has no least point by itself that is known", hint="a term c z log z, c > 0"
        )
    whole = add(elementwise(slope, *p.others) if p.others else constant(slope, *z.shape), *p.tilt)
    if t.is_infinite:
        t, v, shrink = sp.S.One, constant(0 if logs else 1, *z.shape), entropy
    else:
        shrink = 1 + t * entropy
    pull = add(whole, constant(entropy, *z.shape))
    if logs:
        free = scale(1 / shrink, add(v, scale(-t, pull)))
        if sums is not None:
            return elementwise(
                slot(0) + slot(1) - slot(2), free, elementwise(log_of_mass(slot(0)), sums), logsumexp(free, 0)
            )
        ends = (log_of_mass(lo), log_of_mass(hi))
        return elementwise(sp.Max(ends[0], sp.Min(ends[1], slot(0))), free) if p.domain else free
    if simplex and sums is not None:  # by logarithms, which do not overflow
        return times(sums, softmax(scale(1 / shrink, add(elementwise(sp.log(slot(0)), v), scale(-t, whole))), 0))
    if entropy == 0:
        free = elementwise(slot(0) * sp.exp(-t * slot(1)), v, pull)
    else:
        free = elementwise(sp.exp((sp.log(slot(0)) - t * slot(1)) / shrink), v, pull)
    if sums is not None:
        return elementwise(slot(0) * slot(1) * reciprocal(slot(2)), free, sums, total(free, 0))
    return elementwise(sp.Max(lo, sp.Min(hi, slot(0))), free) if p.domain else free


def _entropy_and_slope(f: sp.Expr) -> tuple[sp.Expr, sp.Expr] | None:
    """(c, k) with f(u) = c u log u + k u, or k |u|, for u > 0, c the same for every entry."""
    u, f = sp.Symbol("u", positive=True), cast(Any, sp.expand(sp.expand_log(f, force=True)))
    c = cast(Any, f.coeff(slot(0) * sp.log(slot(0))))
    k = cast(Any, sp.cancel(swap(sp.expand(f - c * slot(0) * sp.log(slot(0))), {slot(0): u}) / u))
    return None if k.has(u) or any(str(s).startswith("_") for s in c.free_symbols) else (c, k)


def _sums(p: Parts, z: Sym) -> Expr | None:
    """What each column sums to, if that is all that a set says."""
    match p.sets:
        case (("simplex", params),):
            return constant(params[0] if params else 1)
        case (("affine", (Expr() as a, Expr() as s)),) if a.rows == 1 and as_constant(a) == 1 and nonnegative(s):
            return s
        case _:
            return None


def signed_parts(e: Expr) -> tuple[Expr, Expr]:
    """(p, m) with e = p - m, both without a negative entry, term by term. Raises DeriveError E302 for a term whose sign is open."""
    e = expand(e)
    plus, minus = [zeros(*e.shape)], [zeros(*e.shape)]
    for t in e.terms if isinstance(e, Add) else (e,):
        if nonnegative(t):
            plus.append(t)
        elif nonnegative(scale(-1, t)):
            minus.append(scale(-1, t))
        else:
            raise DeriveError(
                "E302", f"the sign of {text(t)} is not known", hint="declare what it is made of `positive: true`"
            )
    return add(*plus), add(*minus)
