"""Curvature of matrix expressions: bounds low <= Hessian <= high in one variable, as expressions that a network can compute.

The scalar questions (range of f'') are answered by `scalar.curvature`; this file lifts the answers through affine maps,
singular values and families. What no rule covers is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import sympy as sp

from unroll.calculus.cones import nonnegative, square_root
from unroll.calculus.gradient import gradient
from unroll.calculus.scalar import curvature as scalar_curvature
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    constant,
    elementwise,
    eye,
    family_sum,
    largest,
    matmul,
    scalar_factor,
    scale,
    spectral_norm,
    split,
    swap,
    times,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Diag,
    Diagonal,
    Expr,
    Eye,
    FamilySum,
    Hold,
    LogDet,
    LogSumExp,
    Map,
    Mul,
    Op,
    Spectral,
    Sum,
    Sym,
    Trace,
    Transpose,
    depends,
    mentions,
    slot,
    walk,
)
from unroll.language.show import text
from unroll.language.traversal import expand

NOTHING = zeros(1, 1)


@dataclass(frozen=True)
class Bounds:
    """low <= Hessian <= high, both 1 × 1 expressions.  proof: "proved", "bounded" or "sampled"; reason: which rule."""

    low: Expr
    high: Expr
    proof: str
    reason: str

    @property
    def smooth(self) -> bool:
        """Are both bounds finite?"""
        return not any(
            split(t)[0].has(sp.oo, -sp.oo, sp.nan)
            for b in (self.low, self.high)
            for t in (b.terms if isinstance(b, Add) else (b,))
        )

    @property
    def convex(self) -> bool:
        """Is low >= 0 certain?"""
        return nonnegative(self.low)

    @property
    def concave(self) -> bool:
        """Is high <= 0 certain?"""
        return nonnegative(scale(-1, self.high))

    @property
    def lipschitz(self) -> Expr:
        """Lipschitz constant of the gradient: the larger of -low and high."""
        if self.convex:
            return self.high
        return elementwise(sp.Max(slot(0), -slot(1)), self.high, self.low)


@cache
def bounds(e: Expr, z: Sym) -> Bounds | None:
    """Hessian bounds of the scalar e in z, or None where no rule applies."""
    if not depends(e, z):
        return Bounds(NOTHING, NOTHING, "proved", "constant")
    c, body = split(e)
    if c != 1:
        found = bounds(body, z)
        return None if found is None else _scaled(c, found)
    match e:
        case Add(terms):
            entries = {t: inner for t in terms if (inner := entrywise(t, z)) is not None}
            groups: dict[tuple[Expr, ...], list[tuple[sp.Expr, Map]]] = {}
            for c, inner in entries.values():
                groups.setdefault(inner.args, []).append((c, inner))
            together = [
                _elementwise(sp.Add(*(c * m.profile for c, m in g)), g[0][1], z) for g in groups.values() if len(g) > 1
            ]
            alone = [t for t in terms if t not in entries or len(groups[entries[t][1].args]) == 1]
            return _together([*together, *(bounds(t, z) for t in alone)])
        case FamilySum(i, n, body) if (
            weighed := _weighed(body, z, i)
        ) is not None:  # members that share the columns of z
            low, high = (family_sum(i, n, times(w, weighed.columns)) for w in (weighed.low, weighed.high))
            return Bounds(scale(-1, largest(scale(-1, low))), largest(high), weighed.proof, weighed.reason)
        case FamilySum(i, n, body):
            inner = bounds(body, z)
            return (
                None
                if inner is None
                else Bounds(family_sum(i, n, inner.low), family_sum(i, n, inner.high), inner.proof, inner.reason)
            )
        case Sum(Map() as inner, None):
            return _elementwise(inner.profile, inner, z) or _quadratic(e, z)
        case Map() if e.is_scalar:
            return _elementwise(e.profile, e, z) or _radial(e, z) or _over_columns(e, z) or _times_data(e, z)
        case LogSumExp(x, None) | Sum(LogSumExp(x, _), None):
            norm = operator_norm(x, z)  # diag(p) - p p' <= 1/2 by Gershgorin
            return (
                None
                if norm is None
                else Bounds(NOTHING, scale(sp.Rational(1, 2), _square(norm)), "proved", "log-sum-exp")
            )
        case Spectral(h, x):
            return _spectral(h, x, z)
        case LogDet(Add((Eye(), m))) if (
            root := square_root(m)
        ) is not None:  # log det(I + c B B') = sum log(1 + c s^2)
            return _spectral(sp.log(1 + root[0] * slot(0) ** 2), root[1], z)
        case LogDet():
            return _over_columns(e, z)
        case _:
            return _quadratic(e, z)


def smoothness(e: Expr, z: Sym) -> Bounds:
    """As `bounds`. Raises DeriveError E304 where there is no finite bound."""
    found = bounds(e, z)
    if found is None or not found.smooth:
        raise DeriveError(
            "E304",
            f"no Lipschitz constant is known for the gradient of {text(e)}",
            hint="give the step size yourself: step: 0.01",
        )
    return found


# --- rules ------------------------------------------------------------------------------------------------------------


def _scaled(c: sp.Expr, b: Bounds) -> Bounds:
    if c.is_nonnegative:
        return Bounds(scale(c, b.low), scale(c, b.high), b.proof, b.reason)
    if c.is_nonpositive:
        return Bounds(scale(c, b.high), scale(c, b.low), b.proof, b.reason)
    widest = scale(sp.Abs(c), b.lipschitz)
    return Bounds(scale(-1, widest), widest, b.proof, f"{b.reason}, sign of {c} unknown")


def _times_data(e: Map, z: Sym) -> Bounds | None:
    """w f(z), w a number made of data."""
    w, inner = scalar_factor(e, lambda a: depends(a, z))
    found = bounds(inner, z) if inner is not e and not depends(w, z) else None
    if found is None:
        return None
    if nonnegative(w):
        return Bounds(times(w, found.low), times(w, found.high), found.proof, found.reason)
    widest = times(elementwise(sp.Abs(slot(0)), w), found.lipschitz)
    return Bounds(scale(-1, widest), widest, found.proof, f"{found.reason}, sign of {text(w)} unknown")


def _together(parts: list[Bounds | None]) -> Bounds | None:
    known = [p for p in parts if p is not None]
    if len(known) < len(parts):
        return None
    grades = ("proved", "bounded", "sampled")
    return Bounds(
        add(*(p.low for p in known)), add(*(p.high for p in known)), max((p.proof for p in known), key=grades.index),
        " + ".join(dict.fromkeys(p.reason for p in known if p.reason != "constant")),
    )  # fmt: skip


def _square(e: Expr) -> Expr:
    return elementwise(slot(0) ** 2, e)


def _lift(mu: Expr, high: Expr, norm: Expr, exact: bool) -> tuple[Expr, Expr]:
    """Curvature of f(M z) from that of f: times |M|^2, except that a positive lower bound survives only M = identity."""
    if not exact:
        mu = NOTHING if nonnegative(mu) else elementwise(sp.Min(0, slot(0)), mu)
    return times(mu, _square(norm)), times(high, _square(norm))


def entrywise(e: Expr, z: Sym) -> tuple[sp.Expr, Map] | None:
    """(c, map) for a term c * sum(map) that depends on z."""
    c, body = split(e)
    match body:
        case Sum(Map() as inner, None) if depends(inner, z):
            return c, inner
        case _:
            return None


def _elementwise(profile: sp.Expr, e: Map, z: Sym) -> Bounds | None:
    """sum of profile(M z + b, ...) at the arguments of e: the range of the second derivative there, times |M|^2."""
    moving = [i for i, a in enumerate(e.args) if depends(a, z)]
    if len(moving) != 1:
        return None
    i = moving[0]
    norm = operator_norm(e.args[i], z)
    if norm is None:
        return None
    norm = scale(sp.sqrt(_repeats(e, i)), norm)
    profile, factor = _unscaled(_unshifted(profile, i, len(e.args)), i, len(e.args))
    try:
        found = scalar_curvature(profile, slot(i))
    except DeriveError:
        return None  # the pieces of the profile cannot be ordered, so no bound: the caller reports E304
    others = [a for j, a in enumerate(e.args) if j != i]
    low, high = (
        _over_entries(c * factor**2, i, others, smallest) for c, smallest in ((found.mu, True), (found.L, False))
    )
    if low is None or high is None:
        return None
    low, high = _lift(low, high, norm, e.args[i] is z and z.shape == e.shape)
    return Bounds(low, high, found.proof, found.reason)


def jointly_convex(e: Expr, variables: Sequence[Sym]) -> bool:
    """Is e known to be convex in all of these together: a sum of f(u + v ..), f convex, every argument affine in them?"""
    c, body = split(e)
    inner = body.x if isinstance(body, Sum) and body.axis is None else body
    if not isinstance(inner, Map) or not (isinstance(body, Sum) or e.is_scalar) or c.is_nonnegative is not True:
        return False
    moving = [i for i, a in enumerate(inner.args) if any(depends(a, z) for z in variables)]
    if not moving or not all(_jointly_affine(inner.args[i], variables) for i in moving):
        return False
    profile, (first, *others) = inner.profile, moving
    for i in others:
        ratio = _ratio(profile, i, first)
        if ratio is None or any(ratio.has(slot(j)) for j in moving):
            return False
        profile = profile.subs(slot(i), 0)
    z = next(z for z in variables if depends(inner.args[first], z))
    found = bounds(total(elementwise(profile, *inner.args)), z)
    return found is not None and found.convex


def _jointly_affine(e: Expr, variables: Sequence[Sym]) -> bool:
    """A sum of terms that read one of the variables each."""
    e = expand(e)
    for t in e.terms if isinstance(e, Add) else (e,):
        read = [z for z in variables if depends(t, z)]
        if len(read) > 1 or any(operator_norm(t, z) is None for z in read):
            return False
    return True


def _repeats(e: Map, i: int) -> sp.Expr:
    """How often an entry of the argument i is read."""
    return sp.Mul(*(e.shape[k] for k in (0, 1) if e.args[i].shape[k] == 1 and e.shape[k] != 1))


def _ratio(f: sp.Expr, j: int, i: int) -> sp.Expr | None:
    """df/dslot(j) over df/dslot(i): where it reads neither, f reads both in one sum alone."""
    own = sp.diff(f, slot(i))
    if own == 0:
        return None
    ratio = sp.powsimp(sp.diff(f, slot(j)) / own)
    return cast(sp.Expr, sp.cancel(ratio) if ratio.is_rational_function() else ratio)


def _unshifted(profile: sp.Expr, i: int, count: int) -> sp.Expr:
    """Without the arguments that only shift what is read of the argument i, in the profile or in its second derivative."""
    for j in (j for j in range(count) if j != i and profile.has(slot(j))):
        ratios = (_ratio(f, j, i) for f in (profile, sp.diff(profile, slot(i), 2)))
        if any(r is not None and not r.has(slot(i)) for r in ratios):
            profile = profile.subs(slot(j), 0)
    return profile


def _unscaled(profile: sp.Expr, i: int, count: int) -> tuple[sp.Expr, sp.Expr]:
    """(g, w) with profile(u) = g(w u), w a product of the other arguments, if g is then free of them; else (profile, 1)."""
    w = sp.Mul(*(slot(j) for j in range(count) if j != i and slot(j) in profile.free_symbols))
    try:
        g = sp.simplify(profile.subs(slot(i), slot(i) / w)) if w != 1 else profile
    except ValueError:  # SymPy compares cases that are then nothing
        return profile, sp.Integer(1)
    return (g, w) if not (g.free_symbols & w.free_symbols) else (profile, sp.Integer(1))


def _over_entries(c: sp.Expr, i: int, others: list[Expr], smallest: bool) -> Expr | None:
    """Extreme over all entries of a curvature that depends on the other arguments."""
    if c.is_infinite or c.has(sp.oo):
        return None if smallest else constant(sp.oo)
    names = [s for s in sorted(c.free_symbols, key=str) if isinstance(s, sp.Symbol) and s.name.startswith("_")]
    if not names:
        return constant(c)
    index = {slot(j): slot(k) for k, j in enumerate(j for j in range(len(others) + 1) if j != i)}
    values = elementwise(swap(c, index), *others)
    return scale(-1, largest(scale(-1, values))) if smallest else largest(values)


def _radial(e: Map, z: Sym) -> Bounds | None:
    """p(|X|^2) with X affine: the curvature of s -> p(s^2), an even function of the norm."""
    match e:
        case Map(p, (Sum(Map(q, (x,)), None),)) if q == slot(0) ** 2:
            return _spectral(p.subs(slot(0), slot(0) ** 2), x, z)
        case _:
            return None


def _spectral(h: sp.Expr, x: Expr, z: Sym) -> Bounds | None:
    """Sum of h over singular values of an affine X, h even: the range of h'' transfers. Source: Lewis & Sendov 2001, doi:10.1137/S089547980036838X."""
    norm = operator_norm(x, z)
    if norm is None or sp.simplify(h - h.subs(slot(0), -slot(0))) != 0:
        return None
    found = scalar_curvature(h, slot(0))
    if found.L.is_infinite or found.mu.is_infinite:
        return None
    low, high = _lift(constant(found.mu), constant(found.L), norm, x is z)
    return Bounds(low, high, found.proof, found.reason)


@dataclass(frozen=True)
class _Weighed:
    """low, high: curvature of w log det(I + s B diag(v) B') in z for every unit of v; columns: v >= 0."""

    low: Expr
    high: Expr
    columns: Expr
    proof: str
    reason: str


def _over_columns(e: Expr, z: Sym) -> Bounds | None:
    found = _weighed(e, z)
    if found is None:
        return None
    most = largest(found.columns)
    return Bounds(times(found.low, most), times(found.high, most), found.proof, found.reason)


def _weighed(e: Expr, z: Sym, member: str = "") -> _Weighed | None:
    """w log det(I + s B diag(v) B'), B affine in z: sum of log(1 + s t^2) over the singular values t of B diag(v)^(1/2).

    member: an index that nothing from z on to the right in B may depend on, so that units of v are the same columns for every member.
    """
    c, body = split(e)
    w, inner = scalar_factor(body, lambda a: isinstance(a, LogDet))
    match inner:
        case LogDet(Add((Eye(), m))):
            pass
        case _:
            return None
    k, core = split(m)
    s, product = scalar_factor(core)
    w, s = scale(c, w), scale(k, s)
    factors = product.factors if isinstance(product, Mul) else ()
    half = len(factors) // 2
    if (
        len(factors) % 2 == 0
        or not isinstance(middle := factors[half], Diag)
        or transpose(matmul(*factors[:half])) is not matmul(*factors[half + 1 :])
    ):
        return None
    at = next((i for i, f in enumerate(factors[:half]) if depends(f, z)), half)
    if member and any(mentions(f, member) for f in factors[at:half]):
        return None
    v, norm = middle.x, operator_norm(matmul(*factors[:half]), z)
    if norm is None or not all(map(nonnegative, (w, s, v))) or any(depends(x, z) for x in (w, s, v)):
        return None
    free = sp.Symbol("s", positive=True)
    found = scalar_curvature(sp.log(1 + free * slot(0) ** 2), slot(0))
    low, high = (times(times(elementwise(x.subs(free, slot(0)), s), w), _square(norm)) for x in (found.mu, found.L))
    return _Weighed(low, high, v, found.proof, found.reason)


def _quadratic(e: Expr, z: Sym) -> Bounds | None:
    """An affine gradient sum c L z R + b: the Hessian is that linear map, at most sum |c| |L| |R|; each term with L and R both
    squares is of one sign."""
    if any(isinstance(x, Map) and depends(x, z) and not _polynomial(x, z) for x in walk(e)):
        return None
    try:
        slope = expand(gradient(e, z))
    except DeriveError:
        return None  # no gradient, so no bound: the caller reports E304 for the whole term
    low, high = list[Expr](), list[Expr]()
    for term in slope.terms if isinstance(slope, Add) else (slope,):
        if not depends(term, z):
            continue
        c, body = split(term)
        factors = body.factors if isinstance(body, Mul) else (body,)
        if factors.count(z) != 1 or any(depends(f, z) for f in factors if f is not z):
            return None
        at = factors.index(z)
        left, right = (matmul(eye(n), *side) for n, side in ((z.rows, factors[:at]), (z.cols, factors[at + 1 :])))
        size = scale(sp.Abs(c), times(spectral_norm(left), spectral_norm(right)))
        definite = _is_square(left) and _is_square(right) and c.is_extended_nonzero is not False
        identity = isinstance(left, Eye) and isinstance(right, Eye)
        if definite and c.is_positive:
            low.append(size if identity else NOTHING)
            high.append(size)
        elif definite and c.is_negative:
            low.append(scale(-1, size))
            high.append(scale(-1, size) if identity else NOTHING)
        else:
            low.append(scale(-1, size))
            high.append(size)
    return Bounds(add(NOTHING, *low), add(NOTHING, *high), "proved", "quadratic")


def _polynomial(e: Map, z: Sym) -> bool:
    return all(e.profile.is_polynomial(slot(i)) for i, a in enumerate(e.args) if depends(a, z))


def _is_square(m: Expr) -> bool:
    return isinstance(m, Eye) or square_root(m) is not None


# --- norms of affine maps ---------------------------------------------------------------------------------------------


def operator_norm(e: Expr, z: Sym) -> Expr | None:
    """A bound on |M|_2 for e = M z + b, as a 1 × 1 expression; None where e is not affine in z by its form."""
    if not depends(e, z):
        return NOTHING
    if e is z:
        return eye(1)
    match e:
        case Add(terms):
            return _norm_of_sum([t for t in terms if depends(t, z)], z)
        case Mul(c, factors):
            moving = [f for f in factors if depends(f, z)]
            if len(moving) != 1:
                return None
            at = factors.index(moving[0])
            inner = operator_norm(moving[0], z)
            sides = [matmul(*side) for side in (factors[:at], factors[at + 1 :]) if side]
            return None if inner is None else scale(sp.Abs(c), _product(inner, *map(spectral_norm, sides)))
        case Transpose(x) | Diag(x) | Diagonal(x):
            return operator_norm(x, z)
        case Hold():
            return NOTHING
        case Op("difference", x, _):
            inner = operator_norm(x, z)
            return None if inner is None else scale(2, inner)
        case Op("first" | "groups", x):
            return operator_norm(x, z)
        case Op("shifts" | "repeat", x, _, sizes):
            inner = operator_norm(x, z)
            return None if inner is None else scale(sp.sqrt(sp.Mul(*sizes)), inner)
        case Sum(x, axis):
            inner = operator_norm(x, z)
            count = x.rows * x.cols if axis is None else x.shape[axis]
            return None if inner is None else scale(sp.sqrt(count), inner)
        case Trace(x):
            inner = operator_norm(x, z)
            return None if inner is None else scale(sp.sqrt(x.rows), inner)
        case Map():
            return _norm_of_map(e, z)
        case FamilySum(i, n, body):
            inner = operator_norm(body, z)
            return None if inner is None else family_sum(i, n, inner)
        case _:
            return None


def _product(*norms: Expr) -> Expr:
    out = eye(1)
    for n in norms:
        out = times(out, n)
    return out


def _norm_of_sum(terms: list[Expr], z: Sym) -> Expr | None:
    """|sum of c L z R|: terms that share z R are added before the norm is taken."""
    tails: dict[tuple[Expr, ...], list[Expr]] = {}
    loose: list[Expr] = []
    for t in terms:
        c, body = split(t)
        factors = body.factors if isinstance(body, Mul) else (body,)
        at = next((i for i, f in enumerate(factors) if f is z), None)
        if at is None or any(depends(f, z) for f in (*factors[:at], *factors[at + 1 :])):
            loose.append(t)
        else:
            tails.setdefault(factors[at:], []).append(scale(c, matmul(*factors[:at]) if at else eye(z.rows)))
    sizes = [
        _product(spectral_norm(add(*fronts)), *(spectral_norm(matmul(*tail[1:])) for _ in [0] if len(tail) > 1))
        for tail, fronts in tails.items()
    ]
    rest = [operator_norm(t, z) for t in loose]
    if any(r is None for r in rest):
        return None
    return add(NOTHING, *sizes, *cast(list[Expr], rest))


def _norm_of_map(e: Map, z: Sym) -> Expr | None:
    """An elementwise product with fixed entries: at most the largest of them."""
    moving = [i for i, a in enumerate(e.args) if depends(a, z)]
    if len(moving) != 1:
        return None
    i = moving[0]
    factor = sp.diff(e.profile, slot(i))
    if factor.has(slot(i)):
        return None
    inner = operator_norm(e.args[i], z)
    if inner is None:
        return None
    weights = elementwise(sp.Abs(factor), *e.args)
    return scale(sp.sqrt(_repeats(e, i)), times(inner, largest(weights)))
