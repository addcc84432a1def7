"""Solve z + G(z) = x on a piece, G = t f', by kind: linear, quadratic, cubic, power, Lambert, else a bracket."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false
from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import sympy as sp

from unroll.calculus.pieces import Piece, limit, midpoint, roots_of
from unroll.calculus.scalar import extremes, inside
from unroll.calculus.signs import Signs
from unroll.calculus.torch_text import cubic_root, quadratic_root, wright_omega
from unroll.errors import DeriveError

LONGEST = 64
"""Operations of a slope whose zeros are found by bisection, every one of them evaluated some forty times."""
MOST = 8 * LONGEST
"""Operations of all slopes of a piece with their derivatives: one for every stretch on which the slope bends to one side."""


@dataclass(frozen=True)
class Root:
    """Where z + G(z) = x and the left side increases: z in closed form, or the only one in [lo, hi] up to `turn`."""

    kind: str
    z: sp.Expr | None
    lo: sp.Expr = sp.S.Zero
    hi: sp.Expr = sp.S.Zero
    turn: int = 0  # 1: the bracket starts where 1 + G' becomes positive, −1: it ends where it becomes negative


def stationary(
    G: sp.Expr, named: sp.Expr, piece: Piece, u: sp.Symbol, x: sp.Symbol, signs: Signs, floor: sp.Expr | None
) -> tuple[Root, ...]:
    """Every local minimiser of F(z) + (z − x)²/2 inside the piece, F' = G.

    named: G in stable primitives, the form that is evaluated.  floor: a positive lower bound of 1 + G' if there is one
    (then there is one root), None if not.
    """
    convex = floor is not None
    if piece.hi != sp.oo and signs.known(piece.hi) in (-1, 0):
        mirror = Piece(-piece.hi, -piece.lo, piece.f.subs(u, -u))
        closed = _closed(-G.subs(u, -u), mirror, u, x, signs, convex)
        found = tuple(Root(r.kind, -r.z.subs(x, -x)) for r in closed if r.z is not None)
    else:
        found = _closed(G, piece, u, x, signs, convex)
    return found or _bracketed(G, named, piece, u, x, signs, floor)


def _closed(G: sp.Expr, piece: Piece, u: sp.Symbol, x: sp.Symbol, signs: Signs, convex: bool) -> tuple[Root, ...]:
    top, bottom = _fraction(u + G - x, u)
    at = midpoint(piece.lo, piece.hi)
    if top.is_polynomial(u):
        top = sp.expand(top * signs.of(bottom.subs(u, at)))
        return _polynomial(sp.Poly(top, u), piece, signs, convex)
    return _power(top, bottom, piece, u, signs, convex) or _lambert(sp.expand(u + G - x), u, signs)


def _fraction(e: sp.Expr, u: sp.Symbol) -> tuple[sp.Expr, sp.Expr]:
    return sp.fraction(sp.cancel(e) if e.is_rational_function(u) else sp.together(e))


def _polynomial(poly: sp.Poly, piece: Piece, signs: Signs, convex: bool) -> tuple[Root, ...]:
    """Zeros at which the polynomial increases."""
    match poly.degree(), poly.all_coeffs():
        case 1, [a, b]:
            return (Root("linear", sp.cancel(-b / a)),)
        case 2, [a, b, c]:
            return (Root("quadratic", quadratic_root(a, b, c)),)
        case 3, coefficients:
            return tuple(
                Root("cubic", cubic_root(k, *coefficients)) for k in _which(coefficients[0], piece, signs, convex)
            )
        case _:
            return ()


def _which(lead: sp.Expr, piece: Piece, signs: Signs, convex: bool) -> tuple[int, ...]:
    """A cubic that ends upward increases at its outer zeros, else at its middle one."""
    if signs.of(lead) < 0:
        return (0,)
    if convex and (piece.hi == sp.oo or piece.lo == -sp.oo):
        return (1,) if piece.hi == sp.oo else (-1,)
    return (-1, 1)


def _power(top: sp.Expr, bottom: sp.Expr, piece: Piece, u: sp.Symbol, signs: Signs, convex: bool) -> tuple[Root, ...]:
    """z = s^q turns fractional powers of z into a polynomial in s."""
    powers = {n.exp for n in (top / bottom).atoms(sp.Pow) if n.base == u}
    if (
        piece.lo == -sp.oo
        or signs.known(piece.lo) not in (0, 1)
        or not powers
        or not all(p.is_Rational for p in powers)
    ):
        return ()
    q, s = sp.ilcm(1, *[p.q for p in powers]), sp.Symbol("s", positive=True)
    top, bottom = _fraction((top / bottom).subs(u, s**q), s)
    top = sp.expand(top * signs.of(bottom.subs(s, 1)))
    if not top.is_polynomial(s):
        return ()
    ends = Piece(piece.lo ** sp.Rational(1, q), piece.hi ** sp.Rational(1, q), piece.f)
    found = _polynomial(sp.Poly(top, s), ends, signs, convex)
    return tuple(Root("power", sp.Max(r.z, 0) ** q) for r in found if r.z is not None)


def _lambert(h: sp.Expr, u: sp.Symbol, signs: Signs) -> tuple[Root, ...]:
    """A log z + B z + C = 0 and A e^{kz} + B z + C = 0, where they increase, by Wright's omega."""
    log_part, slope = h.coeff(sp.log(u)), h.coeff(u)
    rest = sp.expand(h - log_part * sp.log(u) - slope * u)
    if slope.has(u):
        return ()
    if log_part != 0 and not (log_part.has(u) or rest.has(u)) and signs.of(log_part) > 0:
        ratio = log_part / slope
        return (Root("Lambert", ratio * wright_omega(-rest / log_part - sp.log(ratio))),)
    exps = [n for n in sp.expand(h, power_exp=False).atoms(sp.exp) if n.has(u)]
    if len(exps) != 1:
        return ()
    k, weight = sp.expand(exps[0].exp).coeff(u), h.coeff(exps[0])
    shift = sp.expand(exps[0].exp - k * u)
    rest = sp.expand(h - weight * exps[0] - slope * u)
    if any(e.has(u) for e in (k, shift, rest, weight)) or k == 0 or signs.of(k * weight) <= 0:
        return ()
    return (Root("Lambert", -rest / slope - wright_omega(sp.log(k * weight / slope) + shift - k * rest / slope) / k),)


def _bracketed(
    G: sp.Expr, named: sp.Expr, piece: Piece, u: sp.Symbol, x: sp.Symbol, signs: Signs, floor: sp.Expr | None
) -> tuple[Root, ...]:
    if (longer := int(sp.count_ops(named))) > LONGEST:
        raise DeriveError(
            "E302",
            f"the slope of {piece.f} has {longer} operations as it would be evaluated: a step with it is not written",
            hint="write the term in fewer functions of the variable, or use a smooth algorithm",
        )
    if floor is not None:
        return (Root("bracket", None, *_monotone_bracket(named, piece, u, x, floor)),)
    bend = sp.diff(G, u, 2)
    bends = [b for b in roots_of(bend, u, signs) if inside(b, piece, signs)]
    if (all_of := (1 + len(bends)) * (longer + int(sp.count_ops(sp.diff(named, u))))) > MOST:
        raise DeriveError(
            "E302",
            f"the slope of {piece.f} bends {len(bends)} times: to find its zeros takes {all_of} operations, forty times over",
            hint="write the term in fewer functions of the variable, or use a smooth algorithm",
        )
    knots = [piece.lo, *signs.ordered(bends), piece.hi]
    try:
        lo, hi = _reach(G, piece, u, x, signs)
    except DeriveError:
        rise = extremes(sp.diff(G, u), piece, u, signs)
        if rise.proof == "sampled" or signs.known(rise.lo) not in (0, 1):
            raise
        return (Root("bracket", None, *_monotone_bracket(named, piece, u, x, sp.S.One)),)  # convex on this piece
    out: list[Root] = []
    for start, stop in pairwise(knots):
        turn = signs.of(bend.subs(u, midpoint(start, stop)))
        ends = (lo if start == -sp.oo else start, hi if stop == sp.oo else stop)
        out.append(Root("bracket", None, *ends, turn))
    return tuple(out)


def _reach(G: sp.Expr, piece: Piece, u: sp.Symbol, x: sp.Symbol, signs: Signs) -> tuple[sp.Expr, sp.Expr]:
    """x − sup G ≤ z ≤ x − inf G for every zero, kept within the piece; only the sides that are needed."""
    spread = extremes(G, piece, u, signs)
    if (piece.lo == -sp.oo and spread.hi == sp.oo) or (piece.hi == sp.oo and spread.lo == -sp.oo):
        raise DeriveError("E302", f"no interval is known to hold the zeros of u + {G} = {x}")
    lo = x - spread.hi if piece.hi == sp.oo else sp.Min(x - spread.hi, piece.hi)
    hi = x - spread.lo if piece.lo == -sp.oo else sp.Max(x - spread.lo, piece.lo)
    return lo, hi


def _monotone_bracket(G: sp.Expr, piece: Piece, u: sp.Symbol, x: sp.Symbol, floor: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """z + G(z) grows at rate `floor` or more, so a zero is not far from a known point: (x − value) / floor."""
    if not piece.lo.is_infinite and not piece.hi.is_infinite:
        return piece.lo, piece.hi
    at = midpoint(piece.lo, piece.hi)
    gap = x - at - G.subs(u, at)
    for end, side in ((piece.lo, "+"), (piece.hi, "-")):
        if not end.is_infinite and not limit(G, u, end, side).is_infinite:
            at, gap = end, x - end - limit(G, u, end, side)
    lo, hi = at + sp.Min(gap / floor, 0), at + sp.Max(gap / floor, 0)
    return (lo if piece.lo == -sp.oo else piece.lo), (hi if piece.hi == sp.oo else piece.hi)
