"""Majorants: what lies above a term everywhere, touches it at one point, and is simpler.

    in |z|    sum of f(|z_i|), f concave on [0, oo):     sum of f'(|p_i|) |z_i|        reweighted 1-norms
    in z^2    sum of f(z_i^2), f concave on [0, oo):     sum of f'(p_i^2) z_i^2        reweighted least squares

Both at the point p, which is held, and up to a constant. Of groups, |z_g| stands in the place of |z_i|.
Source: Hunter & Lange 2004, doi:10.1198/0003130042836; Candes, Wakin & Boyd 2008, doi:10.1007/s00041-008-9045-x.
"""

from __future__ import annotations

from typing import Literal, cast

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.scalar import curvature
from unroll.errors import DeriveError
from unroll.language.constructors import add, elementwise, hold, split, swap, total, zeros
from unroll.language.nodes import Add, Expr, Map, Sum, Sym, depends, slot
from unroll.language.show import text
from unroll.language.traversal import substitute

Of = Literal["abs", "square"]
NAMES = {"abs": "|z|", "square": "z^2"}
S, U = sp.Symbol("s", nonnegative=True), sp.Symbol("u", real=True)


def tangent(e: Expr, z: Sym, at: Expr, of: Of) -> Expr:
    """What lies above e(z), less a constant: linear in |z| or in z^2, with the slope of e at `at`. Raises DeriveError E302."""
    terms = [t for t in (e.terms if isinstance(e, Add) else (e,)) if depends(t, z)]
    return add(zeros(1, 1), *(_of_term(t, z, at, of) for t in terms))


def _of_term(e: Expr, z: Sym, at: Expr, of: Of) -> Expr:
    size, profile, others = _taken_apart(e, z, of)
    signs = {slot(i + 1): sp.Symbol(f"_w{i}", positive=True) for i, a in enumerate(others) if nonnegative(a)}
    grown = cast(sp.Expr, profile.xreplace(signs))
    try:
        concave = curvature(grown, S, (sp.S.Zero, sp.oo)).L.is_nonpositive
    except DeriveError as refused:
        raise _refused(e, z, refused.message) from None
    if not concave:
        raise _refused(e, z, f"it is not known to be concave in {NAMES[of]}")
    slope = cast(sp.Expr, sp.factor(sp.diff(grown, S)))
    if of == "square" and not slope.is_nonnegative:  # what is least of it would be a saddle
        raise _refused(e, z, "it is not known to grow in z^2")
    if sp.limit(slope, S, 0, "+").is_infinite:
        raise _refused(e, z, "its slope at 0 is infinite: add a small number to what is under it")
    slope = slope.xreplace({S: slot(0), **{s: o for o, s in signs.items()}})
    weight = hold(elementwise(slope, substitute(size, {z: at}), *others))
    return total(elementwise(slot(0) * slot(1), weight, size))


def _taken_apart(e: Expr, z: Sym, of: Of) -> tuple[Expr, sp.Expr, list[Expr]]:
    """(|z| or z^2 of each entry or group, the term as a function of it in S, what else it reads in slots 1, 2, ..)."""
    c, body = split(e)
    inner = body.x if isinstance(body, Sum) and body.axis is None else body
    moving = [i for i, a in enumerate(inner.args) if depends(a, z)] if isinstance(inner, Map) else []
    if not isinstance(inner, Map) or len(moving) != 1:
        raise _refused(e, z, "it is no sum of a function of each entry, or of the length of each group")
    (i,) = moving
    x, others = inner.args[i], [a for k, a in enumerate(inner.args) if k != i]
    names = {slot(k): slot(1 + others.index(a)) for k, a in enumerate(inner.args) if k != i}
    profile = c * swap(inner.profile, {slot(i): U, **names})
    match x:
        case Sum(Map(q, (_,)), _) if q == slot(0) ** 2:  # of the square of a length
            length = x if of == "square" else elementwise(sp.sqrt(slot(0)), x)
            return length, cast(sp.Expr, profile.xreplace({U: S if of == "square" else S**2})), others
        case _:
            if sp.simplify(profile - profile.xreplace({U: -U})) != 0:
                raise _refused(e, z, "it is not the same for z and -z")
            length = elementwise(slot(0) ** 2 if of == "square" else sp.Abs(slot(0)), x)
            grown = profile.xreplace({U: sp.sqrt(S) if of == "square" else S})
            grown = grown.replace(sp.Abs, lambda p: p if p.is_nonnegative else sp.Abs(p))
            return length, cast(sp.Expr, grown), others


def _refused(e: Expr, z: Sym, why: str) -> DeriveError:
    hint = f"tangent(g, {z.name}, abs) needs what is concave in |{z.name}|, tangent(g, {z.name}, square) in {z.name}^2"
    return DeriveError("E302", f"no majorant of {text(e)} is known: {why}", hint=hint)
