"""Proximal step of a scalar profile, derived: argmin over z of t f(z) + (z − v)²/2.

f is split where it switches; on each piece z + t f'(z) = v is solved. If t f is convex, or weakly convex with t ρ < 1,
pieces follow one another in v and thresholds b + t f'(b∓) tell which is active; else candidates are compared by value.
"""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import sympy as sp

from unroll.calculus.pieces import Piece, Profile, limit, split
from unroll.calculus.prox_function import ScalarProx
from unroll.calculus.prox_pieces import Knot, Part
from unroll.calculus.roots import stationary
from unroll.calculus.scalar import REALS, Curvature, as_ends, curvature_of, extremes, scalars, undecided, with_order
from unroll.calculus.signs import Signs, Undecided
from unroll.calculus.stable import stable
from unroll.calculus.verify import verified
from unroll.errors import DeriveError

if TYPE_CHECKING:
    pass


ROUNDING = sp.Float("1e-12")


def derive_prox(
    f: sp.Expr,
    u: sp.Symbol,
    domain: tuple[Any, Any] | sp.Interval = REALS,
    *,
    assume: Iterable[sp.Basic] = (),
    small_step: bool = False,
    verify: bool = True,
) -> ScalarProx:
    """The proximal step of f on `domain`; scalars of f are symbols with assumptions, facts of `assume` hold.

    small_step: t ρ < 1 is promised, so a ρ-weakly convex f gets its threshold form. Else, if f is not convex,
    candidates are compared by value, which is right for every t.
    Raises DeriveError E302 with the reason, also when brute force beats the derived formula.
    """
    return _derive(_logs_apart(sp.sympify(f), u), u, as_ends(domain), tuple(assume), small_step, verify)


def _logs_apart(f: sp.Expr, u: sp.Symbol) -> sp.Expr:
    """log(w / u) as log w - log u, w > 0: both have a value for the same u."""

    def apart(x: sp.log) -> sp.Expr:
        c, rest = x.args[0].as_independent(u, as_Add=False)
        base, power = rest.as_base_exp()
        return sp.log(c) + power * sp.log(base) if c.is_positive and power in (1, -1) and rest != 1 else x

    return f.replace(lambda x: isinstance(x, sp.log) and x.has(u), apart)


@cache
def _derive(
    f: sp.Expr,
    u: sp.Symbol,
    domain: tuple[sp.Expr, sp.Expr],
    assume: tuple[sp.Basic, ...],
    small_step: bool,
    verify: bool,
) -> ScalarProx:
    try:
        signs = Signs(scalars(f, u, domain), with_order(domain, assume))
        profile = split(f, u, domain, signs)
        prox = assemble(f, profile, curvature_of(profile, signs), small_step, signs)
    except Undecided as e:
        raise undecided(f, e) from e
    if not verify:
        return prox
    return verified(prox, signs)


def assemble(f: sp.Expr, profile: Profile, curved: Curvature, small_step: bool, signs: Signs) -> ScalarProx:
    """Thresholds and roots of every piece."""
    if small_step and not curved.convex and curved.rho.is_infinite:
        raise DeriveError("E302", f"{f} is not weakly convex: no step is small enough for a threshold form")
    threshold = curved.convex or small_step
    _refuse_unbounded(f, profile, threshold, signs)
    _refuse_unattained(f, profile, signs)
    t, v = _fresh("t", f, profile.u, positive=True), _fresh("v", f, profile.u, real=True)
    steps = Signs({*signs.symbols, t}, (*signs.assume, *_small(t, curved, small_step)))
    steps.sampled, steps.left = signs.sampled, signs.left
    even = _is_even(profile, steps) and (len(profile.pieces) > 1 or not threshold)
    x = _fresh("x", f, profile.u, nonnegative=True) if even else v
    half = _half(profile, steps) if even else profile
    floor = sp.S.One if curved.convex else 1 - t * curved.rho
    parts = tuple(_part(p, profile.u, t, x, steps, floor if threshold else None) for p in half.pieces)
    knots = tuple(_knots(half, parts, t, even, threshold, steps))
    centred = even and (threshold or _least_at_0(half, steps))
    domain = (profile.lo, profile.hi)
    proof = f"{curved.proof}: {curved.reason}"
    if steps.sampled:
        proof += f"; signs sampled at {len(steps.draws)} draws: {', '.join(dict.fromkeys(steps.sampled))}"
    if small_step and not curved.convex:
        proof += f"; for t < {1 / curved.rho}"
    mode = "threshold" if threshold else "candidates"
    return ScalarProx(f, profile.u, v, t, x, domain, curved, mode, even, centred, t * stable(f), parts, knots, proof)


def _refuse_unbounded(f: sp.Expr, profile: Profile, threshold: bool, signs: Signs) -> None:
    """Raise where t f(z) + (z − v)²/2 has no minimum for some t: f falls without end at a point, or as −z² far away."""
    u = profile.u
    for piece in profile.pieces:
        for end, side in ((piece.lo, "+"), (piece.hi, "-")):
            if end.is_infinite and threshold:
                continue
            what = sp.diff(piece.f, u, 2) if end.is_infinite else piece.f
            value = limit(what, u, end, side)
            if value == -sp.oo or (end.is_infinite and signs.known(value) == -1):
                raise DeriveError(
                    "E302", f"{f} has no proximal step: it is not bounded below {_near(end)}", _way_out(end)
                )


def _refuse_unattained(f: sp.Expr, profile: Profile, signs: Signs) -> None:
    """Raise where f jumps up at a point that it reaches from the side: the infimum of t f(z) + (z − v)²/2 is then no minimum for some v."""
    at, u = dict(profile.at), profile.u
    for piece in profile.pieces:
        for end, side in ((piece.lo, "+"), (piece.hi, "-")):
            inside = limit(piece.f, u, end, side) if end in at else sp.oo
            if inside != sp.oo and (at[end] == sp.oo or _jumps(sp.expand(at[end] - inside), inside, signs)):
                raise DeriveError(
                    "E302",
                    f"{f} has no proximal step: its value at {u} = {end} is above its limit from the side, so a minimum need not exist",
                    "write <= in the place of <, or the reverse, so that the lower value holds at the jump",
                )


def _least_at_0(half: Profile, signs: Signs) -> bool:
    """Is f(u) ≥ f(0) shown for all u ≥ 0?"""
    least = dict(half.at)[sp.S.Zero]
    if least.is_infinite:
        return False
    try:
        ranges = [extremes(p.f - least, p, half.u, signs) for p in half.pieces]
        return all(r.proof != "sampled" and signs.known(r.lo) in (0, 1) for r in ranges)
    except (DeriveError, Undecided):
        return False


def _jumps(gap: sp.Expr, inside: sp.Expr, signs: Signs) -> bool:
    """Is the gap above 0? Constants written as decimals meet in all but their last digits."""
    if gap.is_number and inside.is_number:
        return bool(gap > ROUNDING * (1 + abs(inside)))
    return signs.of(gap) > 0


def _near(end: sp.Expr) -> str:
    return "by −u² times any constant" if end.is_infinite else f"near {end}"


def _way_out(end: sp.Expr) -> str:
    if end.is_infinite:
        return "add a term that grows at least as fast, or a constraint"
    return "restrict the domain to one side of that point" if end.is_number else ""


def _fresh(word: str, f: sp.Expr, u: sp.Symbol, **assumptions: bool) -> sp.Symbol:
    taken = {str(s) for s in f.free_symbols | {u}}
    while word in taken:
        word += "_"
    return sp.Symbol(word, **assumptions)


def _small(t: sp.Symbol, curved: Curvature, small_step: bool) -> tuple[sp.Expr, ...]:
    return (1 / curved.rho - t,) if small_step and not curved.convex else ()


def _part(piece: Piece, u: sp.Symbol, t: sp.Symbol, x: sp.Symbol, signs: Signs, floor: sp.Expr | None) -> Part:
    f = stable(piece.f)
    F, G = _expanded(t * f), _expanded(t * sp.diff(f, u))
    plain = _expanded(t * sp.diff(piece.f, u))
    roots = stationary(plain, G, piece, u, x, signs, floor)
    return Part(u, piece.lo, piece.hi, F, G, roots)


def _expanded(e: sp.Expr) -> sp.Expr:
    """e as a sum, unless that is far longer: what is evaluated entry by entry is short."""
    longer = sp.expand(e)
    return e if sp.count_ops(longer) > 2 * sp.count_ops(e) else longer


def _knots(
    half: Profile, parts: tuple[Part, ...], t: sp.Symbol, even: bool, threshold: bool, signs: Signs
) -> Iterable[Knot | None]:
    u, at = half.u, dict(half.at)
    for i in range(len(parts) + 1):
        b = parts[i].lo if i < len(parts) else parts[-1].hi
        if b.is_infinite:
            yield None
            continue
        value = t * at[b] if b in at else limit(parts[0].F, u, b, "+")
        if value.is_infinite:
            below, above = -sp.oo if i == 0 else b, b if i == 0 else sp.oo
            yield Knot(b, value, below, above, flat=False)
            continue
        below = b + limit(parts[i - 1].G, u, b, "-") if i > 0 else -sp.oo
        above = b + limit(parts[i].G, u, b, "+") if i < len(parts) else sp.oo
        centre, end = even and i == 0, i in (0, len(parts))
        if threshold:
            flat = _flat(b, below, above, centre, end, signs)
        else:  # a candidate unless f goes on smoothly or bends down there: then the zeros beside it are enough
            sides = [(parts[k].F, side) for k, side in ((i - 1, "-"), (i, "+")) if 0 <= k < len(parts)]
            jumps = any(signs.known(sp.expand(limit(F, u, b, side) - value)) != 0 for F, side in sides)
            width = sp.expand(above - b if centre else above - below)
            flat = jumps or (end and not centre) or width is sp.nan or signs.known(width) not in (0, -1)
        yield Knot(b, value, below, above, flat)


def _flat(b: sp.Expr, below: sp.Expr, above: sp.Expr, centre: bool, end: bool, signs: Signs) -> bool:
    """Whether b is returned for a whole interval of x: a kink upward or a finite slope at an end of the domain."""
    if above == -sp.oo or below == sp.oo:
        return False
    if centre:
        return above == sp.oo or signs.of(above - b) > 0
    return end or below == -sp.oo or above == sp.oo or signs.of(sp.expand(above - below)) > 0


def _is_even(profile: Profile, signs: Signs) -> bool:
    pieces, u, at = profile.pieces, profile.u, dict(profile.at)
    knots = [p.lo for p in pieces] + [pieces[-1].hi]
    if any(a + b != 0 for a, b in zip(knots, reversed(knots), strict=True) if a.is_finite or b.is_finite):
        return False
    if any(sp.expand(p.f - q.f.subs(u, -u)) != 0 for p, q in zip(pieces, reversed(pieces), strict=True)):
        return False
    del signs
    return all(value == at[-b] or sp.expand(value - at[-b]) == 0 for b, value in at.items())


def _half(profile: Profile, signs: Signs) -> Profile:
    """The part of an even profile on u ≥ 0."""
    kept = [p for p in profile.pieces if p.hi == sp.oo or signs.of(p.hi) > 0]
    pieces = (replace(kept[0], lo=sp.S.Zero), *kept[1:])
    at = dict(profile.at)
    at.setdefault(sp.S.Zero, kept[0].f.subs(profile.u, 0))
    return replace(profile, pieces=pieces, at=tuple(at.items()))
