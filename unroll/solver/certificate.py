"""Duality gaps, derived: a bound on how far a point is from the optimum, from the point alone.

    gauges          least squares F plus g that is positively homogeneous (any norm, |z|_1 with z >= 0, ...):
                    u = -s (residual) with the largest s that keeps the polar of g at -s grad F below 1
                    gap = F + g - s (2 F - <z, grad F>) + s^2 F
    compact sets    any convex smooth F over a set with a support function: <grad F, z> + support(-grad F)

Where neither applies there is no gap, and the optimality residual has to do.
Source: Boyd & Vandenberghe 2004, ch. 5; Kim et al. 2007, doi:10.1109/JSTSP.2007.910971; Jaggi 2013 (Frank-Wolfe gap).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.curvature import operator_norm
from unroll.calculus.gradient import gradient
from unroll.calculus.prox import Parts, slope_of_abs
from unroll.derivation.parts import Part
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    as_constant,
    elementwise,
    largest,
    operator,
    scalar_factor,
    scale,
    sort,
    spectral_norm,
    split,
    times,
    total,
    transpose,
)
from unroll.language.nodes import Add, Expr, Indicator, Map, Sum, Sym, depends, slot

u, w = slot(0), slot(1)


def duality_gap(parts: tuple[Part, ...], z: Sym) -> Expr | None:
    """An upper bound on objective(z) - optimum for a feasible z, as a 1 × 1 expression; None where no rule gives one."""
    smooth = [p for p in parts if p.descended]
    rest = [p.e for p in parts if not p.descended]
    if not smooth or not rest or any(p.smooth is None or not p.smooth.convex for p in smooth):
        return None
    if any(p.holds for p in parts):  # its fixed point is no minimum of the objective
        return None
    f = add(*(p.e for p in smooth))
    slope, away = gradient(f, z), scale(-1, gradient(f, z))
    try:
        g = Parts.of(add(*rest), z)
    except DeriveError:
        return None  # a part without a known form has no gap either; its prox was refused before
    reach = support(g, away, z)
    if reach is not None:
        return add(total(times(slope, z)), reach)
    outside = polar(g, away)
    if outside is None or not all(_is_square(t, z) for t in (f.terms if isinstance(f, Add) else (f,))):
        return None
    inner = add(scale(2, f), scale(-1, total(times(slope, z))))
    largest_s = sp.Max(0, u) / sp.Max(2 * w, u * slot(2))  # min(u / 2w, 1 / polar), of which one may be 1/0
    s = elementwise(sp.Piecewise((largest_s, w > 0), (0, True)), inner, f, outside)
    return add(f, *values_of(rest), scale(-1, times(s, inner)), times(elementwise(u**2, s), f))


def values_of(terms: Iterable[Expr]) -> list[Expr]:
    """The terms that are numbers; constraints are 0 where they hold."""
    return [
        e for t in terms for e in (t.terms if isinstance(t, Add) else (t,)) if not isinstance(split(e)[1], Indicator)
    ]


def _is_square(e: Expr, z: Sym) -> bool:
    """c times the sum of w (M z + b)^2 entry by entry, c > 0, w >= 0 data."""
    c, body = split(e)
    weight, inner = scalar_factor(body, lambda a: depends(a, z))
    match inner:
        case Sum(Map(p, args), None) if c.is_positive and nonnegative(weight):
            moving = [i for i, a in enumerate(args) if depends(a, z)]
            weights = sp.cancel(p / slot(moving[0]) ** 2)
            return (
                len(moving) == 1
                and not weights.has(slot(moving[0]))
                and nonnegative(elementwise(weights, *args))
                and operator_norm(args[moving[0]], z) is not None
            )
        case _:
            return False


def polar(g: Parts, at: Expr) -> Expr | None:
    """sup of <at, z> over g(z) <= 1, for a gauge g."""
    kinds = (
        g.radial, g.spectral, g.peak, g.sorted, g.walks, g.volumes, g.entries or g.domain, g.sets, g.mapped, g.lifted, g.quadratic, g.tilt
    )  # fmt: skip
    if sum(map(bool, kinds)) != 1:
        return None
    if g.entries and not g.others:
        return _entry_polar(g, at)
    if len(g.radial) == 1 and (c := _slope(g.radial[0][0])) is not None and as_constant(g.radial[0][2]) == 0:
        return scale(1 / c, largest(elementwise(sp.sqrt(u), total(elementwise(u**2, at), g.radial[0][1]))))
    if len(g.spectral) == 1 and g.spectral[0][1] == u:
        return scale(1 / g.spectral[0][0], spectral_norm(at))
    if len(g.peak) == 1:
        ((c, axis),) = g.peak
        return scale(1 / c, largest(total(elementwise(sp.Abs(u), at), axis)))
    if len(g.sorted) == 1 and at.cols == 1:  # the largest share of a sum of the k largest in that of their weights
        sums = [operator("running_sum", transpose(x)) for x in (sort(elementwise(sp.Abs(u), at)), g.sorted[0])]
        return largest(elementwise(sp.Piecewise((u / w, w > 0), (0, True)), *sums))
    return None


def _entry_polar(g: Parts, at: Expr) -> Expr | None:
    """max over entries of at / f(1) and -at / f(-1), for f(k u) = k f(u)."""
    f = sp.Add(*g.entries)
    k = sp.Symbol("k", positive=True)
    if any(sp.simplify(f.subs(u, side * k) - k * f.subs(u, side)) != 0 for side in (1, -1)) or any(
        set(d) - {sp.Integer(0), sp.oo, -sp.oo} for d in g.domain
    ):
        return None
    sides: list[sp.Expr] = []
    for sign in (1, -1):
        inside = all(d[0] <= sign <= d[1] for d in g.domain)
        price = f.subs(u, sign)
        if inside and price.is_positive is not True:
            return None
        sides += [sign * u / price] if inside else []
    return largest(elementwise(sp.Max(0, *sides), at))


def _slope(h: sp.Expr) -> sp.Expr | None:
    """c > 0 with h(s) = c |s|."""
    c = slope_of_abs(h)
    return c if c is not None and c.is_positive else None


def support(g: Parts, at: Expr, z: Sym) -> Expr | None:
    """sup of <at, z> over a compact set."""
    if replace(g, sets=(), domain=()) != Parts():
        return None
    if len(g.sets) == 1 and not g.domain:
        match g.sets[0]:
            case "simplex", params:
                return scale(params[0] if params else 1, total(largest(at, 0)))
            case "ball1", (r,) if isinstance(r, sp.Expr):
                return scale(r, largest(elementwise(sp.Abs(u), at)))
            case "ball2", (r,) if isinstance(r, sp.Expr):
                return scale(r, elementwise(sp.sqrt(u), total(elementwise(u**2, at))))
            case _:
                return None
    if len(g.domain) == 1 and not any(end.is_infinite for end in g.domain[0]):
        lo, hi = g.domain[0]
        return total(elementwise(sp.Max(lo * u, hi * u), at))
    return None
