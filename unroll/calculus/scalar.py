"""Curvature of a scalar profile: the range of f'' on its domain, with what was proved and what was only sampled."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportReturnType=false, reportAssignmentType=false, reportArgumentType=false
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import sympy as sp

from unroll.calculus.factored import factored
from unroll.calculus.pieces import Piece, Profile, limit, roots_of, split
from unroll.calculus.signs import SLOW, Signs, Undecided
from unroll.errors import DeriveError

REALS = (-sp.oo, sp.oo)
GRID = 4001


@dataclass(frozen=True)
class Curvature:
    """mu ≤ f'' ≤ L between kinks; mu = −oo at a downward kink or jump, L = oo at any kink.

    proof: "proved" by assumptions, critical points and limits; "bounded" by adding the ranges of terms; "sampled" if a
    grid or draws of the scalars were needed.
    """

    mu: sp.Expr
    L: sp.Expr
    proof: str
    reason: str

    @property
    def rho(self) -> sp.Expr:
        """The least r found such that f + r u²/2 is convex; oo if none."""
        return sp.S.Zero if self.convex else -self.mu

    @property
    def convex(self) -> bool:
        return bool(self.mu.is_nonnegative)

    @property
    def surely_not_convex(self) -> bool:
        """Has f'' a proved value below 0, or f a kink or jump downward?"""
        return self.proof == "proved" and self.mu.is_negative is True

    @property
    def smooth(self) -> bool:
        """f' is Lipschitz, with constant max(L, rho)."""
        return not self.L.is_infinite and not self.mu.is_infinite

    def __str__(self) -> str:
        shape = "convex" if self.convex else "not convex" if self.rho.is_infinite else f"{self.rho}-weakly convex"
        bound = f", L = {self.L}" if self.smooth else ", not smooth"
        return f"{shape}{bound} ({self.proof}: {self.reason})"


@dataclass(frozen=True)
class Range:
    """lo ≤ h ≤ hi on a piece, and how that is known."""

    lo: sp.Expr
    hi: sp.Expr
    proof: str
    reason: str


def curvature(
    f: sp.Expr,
    u: sp.Symbol,
    domain: tuple[sp.Expr, sp.Expr] | sp.Interval = REALS,
    assume: Iterable[sp.Basic] = (),
) -> Curvature:
    """Range of f'' on `domain`; every scalar in f is a symbol with assumptions, every fact of `assume` holds.

    Raises DeriveError E302 where f cannot be split into smooth pieces.
    """
    return _curvature(sp.sympify(f), u, as_ends(domain), tuple(assume))


@cache
def _curvature(f: sp.Expr, u: sp.Symbol, domain: tuple[sp.Expr, sp.Expr], assume: tuple[sp.Basic, ...]) -> Curvature:
    try:
        signs = Signs(scalars(f, u, domain), with_order(domain, assume))
        return curvature_of(split(f, u, domain, signs), signs)
    except Undecided as e:
        raise undecided(f, e) from e


def undecided(f: sp.Expr, e: Undecided) -> DeriveError:
    return DeriveError("E302", f"the pieces of {f} cannot be put in order: {e}", hint=f"declare the sign of {e.expr}")


def as_ends(domain: tuple[sp.Expr, sp.Expr] | sp.Interval) -> tuple[sp.Expr, sp.Expr]:
    lo, hi = (domain.start, domain.end) if isinstance(domain, sp.Interval) else domain
    return sp.sympify(lo), sp.sympify(hi)


def scalars(f: sp.Expr, u: sp.Symbol, domain: tuple[sp.Expr, sp.Expr]) -> tuple[sp.Symbol, ...]:
    """Every symbol but u, by name."""
    found = f.free_symbols | domain[0].free_symbols | domain[1].free_symbols
    return tuple(sorted(found - {u}, key=str))


def with_order(domain: tuple[sp.Expr, sp.Expr], assume: tuple[sp.Basic, ...]) -> tuple[sp.Basic, ...]:
    """lo < hi belongs to the facts when an end is symbolic."""
    gap = domain[1] - domain[0]
    return (*assume, gap) if gap.free_symbols and gap not in assume else assume


def curvature_of(profile: Profile, signs: Signs) -> Curvature:
    """Second derivatives of the pieces, and the jumps of f and f' between them."""
    u, sampled = profile.u, len(signs.sampled)
    ranges = [extremes(sp.diff(p.f, u, 2), p, u, signs) for p in profile.pieces]
    mu, top = _least([r.lo for r in ranges], signs), -_least([-r.hi for r in ranges], signs)
    jumps = [_jump(profile, i, signs) for i in range(len(profile.pieces) - 1)] + [*_end_jumps(profile, signs)]
    mu = -sp.oo if min(jumps, default=0) < 0 else mu
    top = sp.oo if any(jumps) else top
    grades = {r.proof for r in ranges} | ({"sampled"} if len(signs.sampled) > sampled else set())
    proof = next(grade for grade in ("sampled", "bounded", "proved") if grade in grades)
    reason = " or ".join(dict.fromkeys(r.reason for r in ranges)) + (" on each piece" if len(ranges) > 1 else "")
    return Curvature(_convex_mark(mu, signs), top, proof, reason)


def _settled(e: sp.Expr, signs: Signs) -> int:
    """The sign of e; −2 if it depends on the scalars."""
    if e.is_infinite:
        return 1 if e == sp.oo else -1
    sign = signs.known(e)
    return -2 if sign is None else sign


def _convex_mark(mu: sp.Expr, signs: Signs) -> sp.Expr:
    """mu if its sign shows; 0 where it is nonnegative by draws only; min(0, mu) where it depends on the scalars."""
    if mu.is_nonnegative or mu.is_infinite:
        return mu
    return {1: sp.S.Zero, 0: sp.S.Zero, -1: mu}.get(_settled(mu, signs), sp.Min(0, mu))


def _jump(profile: Profile, i: int, signs: Signs) -> int:
    """At the end of piece i: 0 smooth, 1 kink upward, −1 kink downward, −2 f itself jumps."""
    left, right, u = profile.pieces[i], profile.pieces[i + 1], profile.u
    values = [limit(left.f, u, left.hi, "-"), dict(profile.at)[right.lo], limit(right.f, u, right.lo, "+")]
    steps = [values[1] - values[0], values[2] - values[1]]
    if any(v.is_infinite for v in values) or any(signs.of(sp.expand(s)) != 0 for s in steps):
        return -2
    up, down = limit(sp.diff(right.f, u), u, right.lo, "+"), limit(sp.diff(left.f, u), u, left.hi, "-")
    rise = up - down
    if rise.is_infinite:
        return 1 if rise == sp.oo else -1
    return signs.of(sp.expand(rise))


def _end_jumps(profile: Profile, signs: Signs) -> Iterator[int]:
    """−2 at a closed end where f is not the limit from inside, as 1[z ≠ 0] at 0 on z ≥ 0."""
    at, u = dict(profile.at), profile.u
    for end, piece, side in ((profile.lo, profile.pieces[0], "+"), (profile.hi, profile.pieces[-1], "-")):
        if end in at and not at[end].is_infinite:
            step = sp.expand(limit(piece.f, u, end, side) - at[end])
            yield -2 if step.is_infinite or signs.of(step) != 0 else 0


def extremes(h: sp.Expr, piece: Piece, u: sp.Symbol, signs: Signs) -> Range:
    """Infimum and supremum of a smooth h on a piece, from its critical points and its limits at the ends; on a grid once the budget is spent."""
    if h.has(sp.DiracDelta):
        return Range(-sp.oo, sp.oo, "sampled", "f'' of a sign")
    if not signs.afford(h):
        return _sampled(h, piece, u, signs)
    whole = factored(h.rewrite([sp.cosh, sp.sinh, sp.tanh], sp.exp))
    if not whole.has(u):
        return Range(whole, whole, "proved", "f'' constant")
    try:
        points = [b for b in roots_of(sp.diff(whole, u), u, signs) if inside(b, piece, signs)]
        if (piece.lo.is_infinite or piece.hi.is_infinite) and not signs.afford(whole, SLOW):
            return _sampled(h, piece, u, signs)
        ends = limit(whole, u, piece.lo, "+"), limit(whole, u, piece.hi, "-")
        values = [*ends, *(_shortened(whole.subs(u, b), signs) for b in points)]
    except (DeriveError, Undecided):
        return _bounded(h, piece, u, signs)
    way = ["f'' monotone", "f'' monotone on both sides of one critical point"]
    way = way[len(points)] if len(points) < 2 else f"f'' monotone between {len(points)} critical points"
    return Range(_least(values, signs), -_least([-x for x in values], signs), "proved", way)


def _shortened(e: sp.Expr, signs: Signs) -> sp.Expr:
    return sp.simplify(e) if signs.afford(e, SLOW) else e


def inside(b: sp.Expr, piece: Piece, signs: Signs) -> bool:
    if any(abs(x.imag) > 1e-12 * (1 + abs(x)) for x in signs.values(b)):
        return False
    above = piece.lo == -sp.oo or signs.of(b - piece.lo) > 0
    return above and (piece.hi == sp.oo or signs.of(piece.hi - b) > 0)


def _least(values: list[sp.Expr], signs: Signs) -> sp.Expr:
    """The least of the values; Min(...) of those whose order depends on the scalars."""
    if -sp.oo in values:
        return -sp.oo
    kept: list[sp.Expr] = []
    for value in (x for x in values if x != sp.oo):
        if not any(_settled(value - other, signs) in (0, 1) for other in kept):
            kept = [other for other in kept if _settled(other - value, signs) not in (0, 1)] + [value]
    return sp.Min(*kept) if kept else sp.oo


def _bounded(h: sp.Expr, piece: Piece, u: sp.Symbol, signs: Signs) -> Range:
    """Term by term: a sum lies between the sum of its terms' infima and that of their suprema.  Else a grid."""
    if h.has(sp.sin, sp.cos) and isinstance(box := h.subs(u, sp.AccumBounds(-sp.oo, sp.oo)), sp.AccumBounds):
        return Range(box.min, box.max, "bounded", "f'' by interval arithmetic")
    terms = sp.Add.make_args(sp.expand(h))
    if len(terms) == 1:
        return _sampled(h, piece, u, signs)
    ranges = list[Range]()
    for term in terms:
        ranges.append(extremes(term, piece, u, signs))
        if ranges[-1].proof == "sampled":
            return _sampled(h, piece, u, signs)
    lo, hi = sp.Add(*(r.lo for r in ranges)), sp.Add(*(r.hi for r in ranges))
    if lo in (sp.nan, -sp.oo) or hi is sp.nan:
        return _sampled(h, piece, u, signs)
    return Range(lo, hi, "bounded", "f'' bounded term by term")


def _sampled(h: sp.Expr, piece: Piece, u: sp.Symbol, signs: Signs) -> Range:
    """A grid on the piece: numbers if h has no scalars, else only whether h ≥ 0 at every draw."""
    runs = _values(h, piece, u, signs)
    if any(r.size == 0 for r in runs):
        return Range(-sp.oo, sp.oo, "sampled", "f'' has no value on a grid")
    if not signs.symbols:
        lo, hi = float(runs[0].min()), float(runs[0].max())
        lo = 0.0 if lo >= -1e-12 * hi else lo  # rounding
        return Range(sp.Float(lo), sp.Float(hi), "sampled", f"f'' on {GRID} points in [{lo:.4g}, {hi:.4g}]")
    lo = sp.S.Zero if all((r >= -1e-12 * np.abs(r).max()).all() for r in runs) else -sp.oo
    return Range(lo, sp.oo, "sampled", f"sign of f'' on {GRID} points for {len(runs)} draws of the scalars")


NUMPY = [{f.__name__: np.vectorize(f, otypes=[float]) for f in (math.erf, math.erfc)}, "numpy"]
"""Modules of a formula as a function of arrays; NumPy has no error function."""


def _values(h: sp.Expr, piece: Piece, u: sp.Symbol, signs: Signs) -> list[np.ndarray]:
    """h on a grid of the piece, where it is finite, at each draw of the scalars."""
    value = sp.lambdify((u, *signs.symbols), h, NUMPY)
    out: list[np.ndarray] = []
    for draw in signs.draws:
        x = _grid(*(float(e.xreplace(draw)) for e in (piece.lo, piece.hi)))
        with np.errstate(all="ignore"):
            y = np.asarray(value(x, *(float(draw[s]) for s in signs.symbols)), dtype=float) * np.ones_like(x)
        out.append(y[np.isfinite(y)])
    return out


def _grid(lo: float, hi: float) -> np.ndarray:
    """Points of an interval, close to one another near a finite end or near 0."""
    grid = np.linspace(0, 1, GRID + 2)[1:-1]
    if np.isfinite(lo) and np.isfinite(hi):
        return lo + (hi - lo) * grid
    if np.isfinite(lo) or np.isfinite(hi):
        return lo + grid / (1 - grid) if np.isfinite(lo) else hi - grid / (1 - grid)
    return (2 * grid - 1) / (1 - (2 * grid - 1) ** 2) * 2
