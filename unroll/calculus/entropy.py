"""Proximal steps of entropy: argmin over x >= 0 of t g(x) + sum(x log(x/v) - x + v), v > 0.

    linear, |x| on x >= 0      v exp(-t c)
    bounds                     clipped: the minimiser of a convex function of one number
    simplex                    each column divided by its sum

Source: Beck & Teboulle 2003, doi:10.1016/S0167-6377(02)00231-6.
"""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.prox import Parts, slope_of_abs
from unroll.errors import DeriveError
from unroll.language.constructors import add, constant, elementwise, scale, softmax, zeros
from unroll.language.nodes import Add, Expr, Sym, slot
from unroll.language.show import text
from unroll.language.traversal import expand


def entropic(term: Expr, z: Sym, t: sp.Expr, v: Expr) -> Expr:
    """The minimiser, as an expression in v. Raises DeriveError E302 where no rule gives it."""
    p = Parts.of(term, z)
    slope = slope_of_abs(sp.Add(*p.entries)) if p.entries else sp.S.Zero
    others = replace(p, tilt=(), entries=(), others=(), domain=(), sets=()) != Parts()
    sets = [name for name, _ in p.sets]
    if others or slope is None or sets not in ([], ["simplex"]) or (sets and p.domain):
        raise DeriveError(
            "E302",
            f"no proximal step of entropy is known for {text(term)}",
            hint="linear terms, c |z| and sets of bounds have one, and the simplex",
        )
    lo = sp.Max(*(d[0] for d in p.domain)) if p.domain else -sp.oo
    if not sets and "positive" not in z.props and not lo.is_nonnegative:
        raise DeriveError(
            "E302",
            f"{text(term)} allows entries below 0, which have no entropy",
            hint=f"declare {z.name} `positive: true`, or constrain it: {z.name} in nonneg",
        )
    pull = add(elementwise(slope, *p.others) if p.others else constant(slope, *z.shape), *p.tilt)
    if sets:  # by logarithms, which do not overflow
        ((_, params),) = p.sets
        return scale(params[0] if params else 1, softmax(add(elementwise(sp.log(slot(0)), v), scale(-t, pull)), 0))
    free = elementwise(slot(0) * sp.exp(-t * slot(1)), v, pull)
    hi = sp.Min(sp.oo, *(d[1] for d in p.domain))
    return elementwise(sp.Max(sp.Max(0, lo), sp.Min(hi, slot(0))), free) if p.domain else free


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
