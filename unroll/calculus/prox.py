"""Prox of matrix terms: lifts and calculus rules on top of the derived scalar proxes.

    separable            sum of f(z_ij), with tilt, ridge, translation, box:   the scalar prox of each entry
    radial, groups       f(|z|), sum of f(|z_g|):                              z / |z| times the scalar prox of |z|
    sparse groups        sum of f(|z_g|) + c |z|_1 (and z >= 0):               groups after entries (Yu 2013)
    spectral             sum of f(singular values):                            the scalar prox of each singular value
    largest entry        c |z|_inf, or c sum of |z_g|_inf:                     Moreau, v - P(v) on the 1-norm ball, of each group
    log determinant      -c log det (z + z')/2:                                the prox of -c log of each eigenvalue
    sorted 1-norm        c sum of w_i |z|_(i), w falling:                       exact, by sorting and means
    total variation      sum of w |differences of neighbours|, down columns:   exact, by levels
    ... and entries      the same + sum of f(z_ij), one f, or f(|z|):          their prox after its prox (below)
    semi-orthogonal      f(M z + b) with M M' = I:                             v + M' (prox(y) - y), y = M v + b; so for f(z M), M' M = I
    quadratic            an affine gradient H z + b:                           solve (I + t H) z = v - t b
    one equation         any of the entries, f convex, with <a, z> = s down each column, or with the simplex:
                                                                                    the scalar prox of v - m a, m where the equation holds
    balls with z >= 0    c |z|_1 and z >= 0 on the entries first; of the 1-norm ball, one equation if it is left
    sets                 projections
    of z' alone          any of these:                                         the transpose of its prox at the transpose
    of groups of z       any of these of the matrix of groups:                 its prox at the groups, which are below one another again

Each rule checks its side condition; a term that none covers is refused with the reason.
Source: Combettes & Pesquet 2011, doi:10.1007/978-1-4419-9569-8_10; Beck 2017, First-Order Methods in Optimization, ch. 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.gradient import gradient
from unroll.calculus.prox_function import ScalarProx
from unroll.calculus.prox_pieces import eliminations
from unroll.calculus.prox_scalar import derive_prox
from unroll.calculus.stable import Primitive
from unroll.calculus.torch_text import reciprocal
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    as_constant,
    constant,
    elementwise,
    eye,
    hold,
    indicator,
    inverse,
    largest,
    matmul,
    multiplier,
    ones,
    operator,
    project,
    prox,
    prox_map,
    scale,
    spectral_map,
    spectral_prox,
    split,
    swap,
    symbol,
    times,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import (
    STEP_OF_ENTRY,
    Add,
    Axis,
    Expr,
    Indicator,
    LogDet,
    Map,
    Max,
    Mul,
    Op,
    Prox,
    Sorted,
    Spectral,
    Sum,
    Sym,
    Transpose,
    depends,
    entry,
    operator_shape,
    scalar,
    slot,
    walk,
)
from unroll.language.show import pretty, text
from unroll.language.traversal import expand, substitute, transform

U = sp.Symbol("u", real=True)
S = slot(0)
PROJECTED = ("simplex", "ball1", "sphere", "psd", "orthogonal", "stiefel", "unit_columns", "sparse", "rank_at_most")
CONVEX_SETS = ("nonneg", "box", "simplex", "ball1", "ball2", "ball_inf", "psd", "unit_columns", "affine")
"""Sets whose nearest point is an operation of the runtime; the others are scalar proxes or linear solves."""


TV = "total variation, exactly: the jumps by levels, then means"


@dataclass(frozen=True)
class Proximal:
    """A derived proximal step: `at` -> the minimiser. scalar: the scalar prox inside, if any. rule: which rule gave it."""

    step: Expr
    rule: str
    convex: bool
    scalar: ScalarProx | None = None


def plan(node: Prox) -> Expr:
    """The derived form of a `Prox` node, as an expression in `node.at`. Raises DeriveError E302."""
    return derive(node.term, node.variable, node.t, node.at, node.swaps).step


def proximable(term: Expr, z: Sym) -> Proximal:
    """The prox of a term with a symbolic step at a symbolic point. Raises DeriveError E302 with the reason."""
    return derive(term, z, scalar("step", positive=True), replace_role(z), ())


def separable(term: Expr, z: Sym) -> Expr:
    """The prox of each entry by itself, at `entry` with STEP_OF_ENTRY. Raises DeriveError E302 where the term joins entries."""
    if in_groups(term, z) is not None:
        raise DeriveError("E302", f"{text(term)} joins entries of {z.name} to groups")
    parts = Parts.of(term, z)
    if replace(parts, tilt=(), entries=(), others=(), domain=()) != Parts():
        raise DeriveError("E302", f"{text(term)} joins entries of {z.name}")
    derive(term, z, STEP_OF_ENTRY, entry(z))
    return prox(term, z, STEP_OF_ENTRY, entry(z))


def replace_role(z: Sym) -> Sym:
    return symbol(z.name, z.nrows, z.ncols, "state", z.rank, z.family, z.props)


def derive(term: Expr, z: Sym, t: sp.Expr, at: Expr, swaps: tuple[tuple[sp.Expr, sp.Expr], ...] = ()) -> Proximal:
    """argmin over z of t * term + |z - at|^2 / 2. `swaps`: products of scalars that a symbol has taken the place of."""
    found = _found(term, z, t, at, swaps)
    if isinstance(found, DeriveError):
        raise DeriveError(*found.args)
    return found


@cache
def _found(term: Expr, z: Sym, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal | DeriveError:
    """What is derived, or why nothing is: that is not worked out again either."""
    try:
        return _derived(term, z, t, at, swaps)
    except DeriveError as refused:
        if (cut := in_groups(term, z)) is not None:  # neither does a cut into groups
            inner = _found(cut[0], cut[1], t, operator("groups", at, sizes=cut[2]), swaps)
            return (
                inner
                if isinstance(inner, DeriveError)
                else replace(inner, step=operator("groups", inner.step, True, cut[2]))
            )
        if (other := turned(term, z)) is None:
            return refused
        try:  # a transposition changes no length
            found = _derived(*other, t, transpose(at), swaps)
        except DeriveError:
            return refused
        return replace(found, step=transpose(found.step))


def in_groups(term: Expr, z: Sym) -> tuple[Expr, Sym, tuple[sp.Expr, ...]] | None:
    """The term as one of the matrix whose columns are groups of entries of z, that matrix, and the size of a group; None without groups, or
    where those of two sizes overlap."""
    sizes = {x.sizes for x in walk(term) if isinstance(x, Op) and x.name == "groups" and depends(x, z)}
    if len(sizes) != 1 or z.ncols != 1:
        return None
    (size,) = sizes
    rows, cols = operator_shape("groups", z.shape, sizes=size)
    y = symbol(text(operator("groups", z, sizes=size)), rows, cols, z.role, 2, None, z.props)

    def cut(e: Expr) -> Expr:
        return e if e.is_scalar else operator("groups", e, sizes=size)

    def is_column(e: Expr) -> bool:
        return isinstance(e, Op) and e.name == "groups" and e.adjoint

    def rule(e: Expr) -> Expr | None:
        match e:
            case Map(profile, args) if any(map(is_column, args)):
                return operator("groups", elementwise(profile, *map(cut, args)), True, size)
            case Indicator("nonneg" | "box" as name, params, Op("groups", x, True)) if not any(
                isinstance(p, Expr) for p in params
            ):
                return indicator(name, x, *params)
            case _:
                return None

    found = transform(substitute(term, {z: operator("groups", y, True, size)}), rule)
    return (found, y, size) if not any(map(is_column, walk(found))) else None


def turned(term: Expr, z: Sym) -> tuple[Expr, Sym] | None:
    """The term as one of the transpose of z, where z is a matrix, and that."""
    if 1 in z.shape:
        return None
    y = symbol(f"{z.name}_T", z.ncols, z.nrows, z.role, z.rank, z.family, z.props)
    return transform(substitute(term, {z: transpose(y)}), _turned_set), y


def _turned_set(e: Expr) -> Expr | None:
    """What all entries of a transpose are between, those of the matrix are."""
    match e:
        case Indicator("nonneg" | "box" as name, params, Transpose(x)) if not any(isinstance(p, Expr) for p in params):
            return indicator(name, x, *params)
        case _:
            return None


def _derived(term: Expr, z: Sym, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal:
    parts = Parts.of(term, z)
    if parts.tilt:
        at = add(at, scale(-t, add(*parts.tilt)))
    found = _rest(replace(parts, tilt=()), z, t, at, swaps)
    if found is None:
        raise _refused(term, z, parts)
    return found


def _rest(p: Parts, z: Sym, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal | None:
    """The first rule that covers the kinds of parts that are there."""
    if p.walks:
        return _walk(p, z, t, at, swaps)
    others = (p.radial, p.spectral, p.peak, p.sorted, p.volumes, p.sets, p.mapped, p.lifted)
    kinds = [*map(bool, others), bool(p.quadratic)]
    if not any(kinds):
        return _separable(p, t, at, swaps)
    if p.quadratic or sum(kinds) > 1 or sum(map(len, others)) > 1:
        return _solve(p, z, t, at) if not any(kinds[:-1]) and not p.domain and not p.entries else None
    if p.ridge != 0:  # prox_t of f + rho/2 |z|^2 at v is prox_{t/(1 + t rho)} of f at v/(1 + t rho)
        ridge = p.ridge
        t, at, p = t / (1 + t * ridge), scale(1 / (1 + t * ridge), at), p.without_ridge()
    if p.radial:
        return _radial(p, z, t, at, swaps)
    if p.sets and (p.entries or p.domain):
        return _set_of_entries(p, t, at, swaps)
    if p.entries or p.domain:
        return None
    if p.spectral:
        ((c, h),) = p.spectral
        found = _scalar(c * h.subs(slot(0), sp.Abs(slot(0))), t, swaps)
        return Proximal(
            spectral_prox(found, at), "the scalar prox of each singular value", found.curvature.convex, found
        )
    if p.peak:  # Moreau: the conjugate of c max|z| is the indicator of the 1-norm ball of radius c
        ((c, axis),) = p.peak
        radius, turned = _learned(t * c, swaps), at if axis != 1 else transpose(at)
        nearest = project("ball1" if axis is None else "columns_ball1", turned, radius)
        nearest = nearest if axis != 1 else transpose(nearest)
        rule = f"Moreau: v minus {'its projection' if axis is None else 'projections of its groups'} on a 1-norm ball"
        return Proximal(add(at, scale(-1, nearest)), rule, True)
    if p.sorted:
        number, w = split(scale(t, p.sorted[0]))
        shrunk = project("sorted_l1", at, scale(_learned(number, swaps), w))
        return Proximal(shrunk, "the magnitudes, sorted, less their weights; those that meet are pooled", True)
    if p.volumes:
        (c,) = p.volumes
        even = scale(sp.Rational(1, 2), add(at, transpose(at)))
        step = add(at, scale(-1, even), project("volume", even, _learned(t * c, swaps)))
        return Proximal(step, "the prox of -log of each eigenvalue of the symmetric part", True)
    if p.sets:
        ((name, params),) = p.sets
        return _projection(name, params, at)
    if p.lifted:
        (f,) = p.lifted
        y = f.onto(at)
        found = derive(f.term, f.y, t, y, swaps)
        return Proximal(
            add(at, f.back(add(found.step, scale(-1, y)))), f"semi-orthogonal map: {found.rule}", found.convex
        )
    ((c, h, m, b),) = p.mapped
    y = add(matmul(m, at), b)
    found = _scalar(c * h, t, swaps)
    step = add(at, matmul(transpose(m), add(prox_map(found, (), y), scale(-1, y))))
    return Proximal(step, "semi-orthogonal map", found.curvature.convex, found)


Swaps = tuple[tuple[sp.Expr, sp.Expr], ...]


def _scalar(f: sp.Expr, t: sp.Expr, swaps: Swaps, domain: tuple[sp.Expr, sp.Expr] = (-sp.oo, sp.oo)) -> ScalarProx:
    """The derived prox of a profile in slot(0), with the step and the learned products in place."""
    found = derive_prox(f.subs(slot(0), U), U, domain)
    found = found.substitute({found.t: t})
    for product, learned in swaps:
        if product.free_symbols <= set(found.scalars):  # the product belongs to another scalar prox of the step
            found = found.replace(product, learned)
    return found


def scalar_of(name: str, t: sp.Expr = sp.S.One) -> ScalarProx:
    """What the runtime's step "psd" or "volume" does to each eigenvalue."""
    return _scalar(sp.S.Zero, sp.S.One, (), (sp.S.Zero, sp.oo)) if name == "psd" else _scalar(-sp.log(slot(0)), t, ())


def _learned(number: sp.Expr, swaps: Swaps) -> sp.Expr:
    """A number of the step with what was learned in the place of its products: step * lam * 2 -> 2 * theta."""
    for product, learned in swaps:
        if product.free_symbols <= number.free_symbols:
            number = min((sp.cancel(number.subs(s, e)) for s, e in eliminations(product, learned)), key=sp.count_ops)
    return number


# --- taking a term apart ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lifted:
    """term: f(y), for f(M z), or f(z M) where `right`; the rows of M, or then its columns, are orthonormal."""

    term: Expr
    y: Sym
    m: Expr
    right: bool

    def onto(self, v: Expr) -> Expr:
        return matmul(v, self.m) if self.right else matmul(self.m, v)

    def back(self, y: Expr) -> Expr:
        return matmul(y, transpose(self.m)) if self.right else matmul(transpose(self.m), y)


@dataclass(frozen=True)
class Parts:
    """A term by what its summands are in z. Profiles are in slot(0); further slots of `entries` stand for `others`.

    sorted: w for w times the magnitudes, the largest first, w >= 0 and falling.  walks: (c, w, b) for c sum(w |differences of z + b|), c >= 0 and w >= 0.  volumes: c for -c log det (z + z') / 2, c >= 0.
    """

    tilt: tuple[Expr, ...] = ()
    entries: tuple[sp.Expr, ...] = ()
    others: tuple[Expr, ...] = ()
    domain: tuple[tuple[sp.Expr, sp.Expr], ...] = ()
    radial: tuple[tuple[sp.Expr, Axis, Expr], ...] = ()
    spectral: tuple[tuple[sp.Expr, sp.Expr], ...] = ()
    peak: tuple[tuple[sp.Expr, Axis], ...] = ()
    walks: tuple[tuple[sp.Expr, Expr, Expr], ...] = ()
    sorted: tuple[Expr, ...] = ()
    volumes: tuple[sp.Expr, ...] = ()
    sets: tuple[tuple[str, tuple[sp.Expr | Expr, ...]], ...] = ()
    mapped: tuple[tuple[sp.Expr, sp.Expr, Expr, Expr], ...] = ()
    lifted: tuple[Lifted, ...] = ()
    quadratic: tuple[Expr, ...] = ()
    unknown: tuple[Expr, ...] = field(default=())

    @staticmethod
    def of(term: Expr, z: Sym) -> Parts:
        parts = Parts()
        for summand in term.terms if isinstance(term, Add) else (term,):
            if depends(summand, z):
                parts = parts.with_summand(summand, z)
        if parts.unknown:
            raise _refused(term, z, parts)
        return parts

    @property
    def ridge(self) -> sp.Expr:
        """rho if rho/2 z^2 is in the separable part, the same for every entry and every z; else 0."""
        rho = sp.expand(sp.Add(*self.entries)).coeff(slot(0), 2) * 2
        return rho if not any(rho.has(slot(i)) for i in range(1 + len(self.others))) else sp.Integer(0)

    def without_ridge(self) -> Parts:
        rest = sp.expand(sp.Add(*self.entries) - self.ridge * slot(0) ** 2 / 2)
        return replace(self, entries=() if rest == 0 else (rest,))

    def with_summand(self, e: Expr, z: Sym) -> Parts:
        c, body = split(e)
        match body:
            case Indicator(name, params, x) if x is z:
                return self._with_set(name, params)
            case Indicator("affine", (a, b), x) if isinstance(a, Expr) and x is z:
                return replace(self, sets=(*self.sets, ("affine", (a, b))))
            case Sum(Map(p, (Sum(Map(q, (x,)), axis),)), None) if q == slot(0) ** 2 and _scaled(x, z):
                return self._with_length(c * _root(p), axis, x, z)
            case Map(p, (Sum(Map(q, (x,)), None),)) if q == slot(0) ** 2 and _scaled(x, z):
                return self._with_length(c * _root(p), None, x, z)
            case Sum(Map() as inner, None) if (walk_ := _neighbours(c, inner, z)) is not None:
                return replace(self, walks=(*self.walks, walk_))
            case Sum(Map() as inner, None) if (weights := sorted_weights(scale(c, body), z)) is not None:
                if not (nonnegative(weights) and _falls(weights)):
                    return replace(self, unknown=(*self.unknown, e))
                return replace(self, sorted=(*self.sorted, weights))
            case Sum(Map() as inner, None):
                return self._with_entries(c, inner, e, z)
            case Map() if z.is_scalar:
                return self._with_entries(c, body, e, z)
            case Sum(x, None) if x is z:
                return replace(self, tilt=(*self.tilt, gradient(e, z)))
            case Spectral(h, x) if x is z:
                return replace(self, spectral=(*self.spectral, (c, h)))
            case LogDet(x) if (-c).is_nonnegative and z.rows == z.cols and x is _symmetric_part(z):
                return replace(self, volumes=(*self.volumes, -c))
            case Max(inner, None) if (k := _times_abs(inner, z)) is not None and k.is_positive and c.is_nonnegative:
                return replace(self, peak=(*self.peak, (c * k, None)))
            case Sum(Max(inner, axis), None) if (k := _times_abs(inner, z)) is not None and (c * k).is_nonnegative:
                return replace(self, peak=(*self.peak, (c * k, axis)))
            case _:
                return self._with_smooth(e, z)

    def _with_length(self, h: sp.Expr, axis: Axis, x: Expr, z: Sym) -> Parts:
        """h of the length of x = k z + b: that of |k| |z + b/k|."""
        at = _affine_entry(x, z)
        assert at is not None
        k, rest = at
        shift = zeros(*z.shape) if rest is None else scale(1 / k, rest)
        return replace(self, radial=(*self.radial, (swap(h, {slot(0): sp.Abs(k) * slot(0)}), axis, shift)))

    def _with_set(self, name: str, params: tuple[sp.Expr | Expr, ...]) -> Parts:
        if (why := why_empty(name, [p for p in params if not isinstance(p, Expr)])) is not None:
            raise DeriveError("E302", f"the set {name} has no point: {why}")
        if (ends := interval(name, params)) is not None:
            return replace(self, domain=(*self.domain, ends))
        return replace(self, sets=(*self.sets, (name, params)))

    def _with_entries(self, c: sp.Expr, inner: Map, e: Expr, z: Sym) -> Parts:
        """sum of profile(a z + b, data): profile in slot(0) = z, data as further slots."""
        profile, others, shift = inner.profile, list(self.others), dict[sp.Symbol, sp.Expr]()
        for i, a in enumerate(inner.args):
            if not depends(a, z):
                shift[slot(i)] = _named(others, a)
                continue
            at = _affine_entry(a, z)
            if at is None:
                return self._with_mapped(c, inner, e, z)
            k, rest = at
            shift[slot(i)] = k * slot(0) + (_named(others, rest) if rest is not None else 0)
        profile = c * swap(profile, shift)
        if profile.is_polynomial(slot(0)) and sp.Poly(profile, slot(0)).degree() == 1:
            return replace(self, tilt=(*self.tilt, gradient(e, z)))
        return replace(self, entries=(*self.entries, profile), others=tuple(others))

    def _with_mapped(self, c: sp.Expr, inner: Map, e: Expr, z: Sym) -> Parts:
        """f(k M z + b) with M M' = I declared (orthonormal columns, transposed or square)."""
        if len(inner.args) == 1:
            linear, rest = _split_terms(inner.args[0], z)
            match linear:
                case Mul(k, (m, x)) if x is z and _orthonormal_rows(m):
                    profile = inner.profile.subs(slot(0), k * slot(0))
                    return replace(self, mapped=(*self.mapped, (c, profile, m, scale(1 / k, rest))))
                case _:
                    pass
        return self._with_smooth(e, z)

    def _with_smooth(self, e: Expr, z: Sym) -> Parts:
        try:
            slope = expand(gradient(e, z))
        except DeriveError:
            return self._with_lifted(e, z)
        if not depends(slope, z):
            return replace(self, tilt=(*self.tilt, slope))
        terms = [t for t in (slope.terms if isinstance(slope, Add) else (slope,)) if depends(t, z)]
        if all(factor_before(t, z) is not None for t in terms):
            return replace(self, quadratic=(*self.quadratic, slope))
        return self._with_lifted(e, z)

    def _with_lifted(self, e: Expr, z: Sym) -> Parts:
        found = _lifted(e, z)
        return (
            replace(self, unknown=(*self.unknown, e)) if found is None else replace(self, lifted=(*self.lifted, found))
        )


def weighed(term: Expr, z: Sym, by: Expr) -> Expr:
    """The term with a weight for each entry of z. Raises DeriveError E302 where it is no sum over entries."""
    p = Parts.of(term, z)
    if any((p.radial, p.spectral, p.peak, p.walks, p.sorted, p.volumes, p.sets, p.mapped, p.lifted, p.quadratic)):
        hint = "a number, or a number per sample, may stand before any term"
        raise DeriveError("E302", f"{text(term)} joins entries, and takes no weight of each of them", hint=hint)
    weight = slot(len(p.others) + 1)
    entries = [total(elementwise(weight * f, z, *p.others, by)) for f in p.entries]
    tilts = [total(elementwise(slot(0) * slot(1) * slot(2), z, a, by)) for a in p.tilt]
    sets = [e for e in (term.terms if isinstance(term, Add) else (term,)) if isinstance(split(e)[1], Indicator)]
    return add(zeros(1, 1), *entries, *tilts, *sets)


def interval(name: str, params: Sequence[sp.Expr | Expr]) -> tuple[sp.Expr, sp.Expr] | None:
    """(lo, hi) of a set that holds each entry between two numbers."""
    match name, params:
        case "nonneg", ():
            return sp.S.Zero, sp.oo
        case "box", (sp.Expr() as lo, sp.Expr() as hi):
            return lo, hi
        case "ball_inf", (sp.Expr() as r,):
            return -r, r
        case _:
            return None


def why_empty(name: str, numbers: Sequence[sp.Expr]) -> str | None:
    """Why a set has no point at these numbers, if that is known."""
    match name, numbers:
        case "box", [low, high] if (low - high).is_positive:
            return f"its lower bound {_shown(low)} is above its upper bound {_shown(high)}"
        case "ball1" | "ball2" | "ball_inf", [r] if r.is_negative:
            return f"its radius {_shown(r)} is negative"
        case "simplex", [s] if s.is_negative:
            return f"entries that are not negative cannot sum to {_shown(s)}"
        case _:
            return None


def _shown(number: sp.Expr) -> str:
    return f"{float(number):g}" if number.is_number else str(number)


def _root(p: sp.Expr) -> sp.Expr:
    """p(|x|^2) as a profile of |x| >= 0, written so that it is even."""
    s = sp.Symbol("s", nonnegative=True)
    return p.subs(slot(0), s**2).subs(s, sp.Abs(slot(0)))


def _named(others: list[Expr], e: Expr) -> sp.Symbol:
    if e not in others:
        others.append(e)
    return slot(1 + others.index(e))


def _split_terms(e: Expr, z: Sym) -> tuple[Expr, Expr]:
    terms = e.terms if isinstance(e, Add) else (e,)
    nothing = zeros(*e.shape)
    return add(nothing, *(t for t in terms if depends(t, z))), add(nothing, *(t for t in terms if not depends(t, z)))


def _affine_entry(a: Expr, z: Sym) -> tuple[sp.Expr, Expr | None] | None:
    """(k, b) with a = k z + b entry by entry."""
    moving, rest = _split_terms(a, z)
    k, body = split(moving)
    return (k, rest if as_constant(rest) != 0 else None) if body is z else None


def _orthonormal_rows(m: Expr) -> bool:
    """M M' = I, as declared."""
    match m:
        case Transpose(Sym(props=props)):
            return "orthonormal" in props
        case Sym(props=props):
            return "orthonormal" in props and m.rows == m.cols
        case _:
            return False


def _lifted(e: Expr, z: Sym) -> Lifted | None:
    """e as a function of the product of z and one orthonormal map."""
    for product in (x for x in walk(e) if isinstance(x, Mul)):
        if (found := _orthonormal(product, z)) is not None:
            m, right = found
            y = symbol("y", *product.shape, "state")
            term = substitute(e, {product: scale(split(product)[0], y)})
            return Lifted(term, y, m, right) if not depends(term, z) and _is_proximable(term, y) else None
    return None


def _orthonormal(product: Mul, z: Sym) -> tuple[Expr, bool] | None:
    """M of M z, whose rows are orthonormal, or of z M, whose columns are; and whether it stands on the right."""
    match product.factors:
        case (m, x) if x is z and _orthonormal_rows(m):
            return m, False
        case (x, m) if x is z and _orthonormal_rows(transpose(m)):
            return m, True
        case _:
            return None


def _is_proximable(term: Expr, y: Sym) -> bool:
    try:
        proximable(term, y)
    except DeriveError:
        return False
    return True


def _neighbours(c: sp.Expr, inner: Map, z: Sym) -> tuple[sp.Expr, Expr, Expr] | None:
    """(c, w, b) with c sum(inner) = c sum(w |differences of z + b|), c and w with no negative value."""
    moving = [i for i, a in enumerate(inner.args) if depends(a, z)]
    if len(moving) != 1:
        return None
    (i,) = moving
    x = _summed(inner.args[i])
    at = None if x is None else _affine_entry(x, z)
    weight = slope_of_abs(inner.profile, slot(i))
    if at is None or at[0].is_zero is not False or weight is None:
        return None
    k, rest = at
    number, w = split(elementwise(weight, *inner.args))
    c = c * sp.Abs(k) * number
    if not (c.is_nonnegative and nonnegative(w)):
        return None
    return c, eye(1) if as_constant(w) == 1 else w, zeros(*z.shape) if rest is None else scale(1 / k, rest)


def _summed(e: Expr) -> Expr | None:
    """x with e the differences of x."""
    found = [split(t) for t in (e.terms if isinstance(e, Add) else (e,))]
    if not all(isinstance(x, Op) and x.name == "difference" and not x.adjoint for _, x in found):
        return None
    return add(*(scale(c, x.x) for c, x in found if isinstance(x, Op)))


def _scaled(x: Expr, z: Sym) -> bool:
    """Is x = k z + b, k a number that is not 0?"""
    at = _affine_entry(x, z)
    return at is not None and at[0].is_zero is False


def factor_before(term: Expr, z: Sym) -> Expr | None:
    """M with term = M z."""
    c, body = split(term)
    factors = body.factors if isinstance(body, Mul) else (body,)
    if factors[-1] is not z or any(depends(f, z) for f in factors[:-1]):
        return None
    return scale(c, matmul(eye(z.rows), *factors[:-1]))


# --- rules ------------------------------------------------------------------------------------------------------------


def _separable(p: Parts, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal:
    lo, hi = _ends(p)
    if not p.entries and not p.domain:
        return Proximal(at, "linear", True)
    try:
        (found, slots, others), clipped = _scalar_of(p, t, swaps, (lo, hi)), False
    except DeriveError:  # ends that cannot be ordered among the pieces: of a convex f, clip the free minimiser
        if not p.domain:
            raise
        (found, slots, others), clipped = _scalar_of(p, t, swaps), True
        if not found.curvature.convex:
            raise
    step = prox_map(found, slots, at, *others)
    if clipped:
        step = elementwise(sp.Max(lo, sp.Min(hi, slot(0))), step)
    rule = "the scalar prox of each entry" + (", clipped" if clipped else "")
    return Proximal(step, rule, found.curvature.convex, found)


def _ends(p: Parts) -> tuple[sp.Expr, sp.Expr]:
    """Between what all entries are. Raises DeriveError E302 where that is nothing."""
    lo, hi = sp.Max(-sp.oo, *(d[0] for d in p.domain)), sp.Min(sp.oo, *(d[1] for d in p.domain))
    if (lo - hi).is_positive:
        raise DeriveError("E302", f"no entry is at least {_shown(lo)} and at most {_shown(hi)}")
    return lo, hi


def _scalar_of(
    p: Parts, t: sp.Expr, swaps: Swaps, ends: tuple[sp.Expr, sp.Expr] = (-sp.oo, sp.oo)
) -> tuple[ScalarProx, tuple[sp.Symbol, ...], tuple[Expr, ...]]:
    """The scalar prox of the entries, the names of data in it, and those data."""
    names = [_symbol_of(e, i) for i, e in enumerate(p.others)]
    found = _scalar(swap(sp.Add(*p.entries), {slot(i + 1): s for i, s in enumerate(names)}), t, swaps, ends)
    used = [(s, e) for s, e in zip(names, p.others, strict=True) if s in found.scalars]
    return found, tuple(s for s, _ in used), tuple(e for _, e in used)


def _set_of_entries(p: Parts, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal | None:
    """A set that joins entries, and what is known of each of them."""
    ((name, params),) = p.sets
    rest = replace(p, sets=())
    match name, params:
        case "affine", (a, b) if isinstance(a, Expr) and isinstance(b, Expr) and a.rows == 1:
            return _with_equation(rest, transpose(a), b, t, at, swaps)
        case "simplex", _:
            return _with_equation(_bounded(rest, sp.S.Zero, sp.oo), ones(at.rows), _sums(params, at), t, at, swaps)
        case "ball1", (r,) if isinstance(r, sp.Expr) and _ends(p)[0].is_nonnegative and at.cols == 1:
            return _with_equation(rest, ones(at.rows), constant(r), t, at, swaps, at_most=True)
        case "ball2", _ if _sign_homogeneous(p):
            first = _separable(rest, t, at, swaps)
            found = _projection(name, params, first.step)
            return found and replace(found, rule=f"{first.rule}, then {found.rule}")
        case _:
            return None


def _bounded(p: Parts, lo: sp.Expr, hi: sp.Expr) -> Parts:
    return replace(p, domain=(*p.domain, (lo, hi)))


def _sums(params: tuple[sp.Expr | Expr, ...], at: Expr) -> Expr:
    """What the columns of a point of the simplex sum to."""
    return constant(params[0] if params else 1, 1, at.cols)


def _with_equation(p: Parts, a: Expr, s: Expr, t: sp.Expr, at: Expr, swaps: Swaps, at_most: bool = False) -> Proximal:
    """z = prox_f(v - m a), m the multiplier of <a, z> = s: by convexity <a, z> falls in m, and m is found. at_most: of <a, z> <= s, a >= 0.

    Between which numbers: where z' fulfils the equation, z is z' in every entry but for m; so m lies between the least and the largest of
    (v - z' - t f'(z')) / a.
    """
    found, slots, others = _scalar_of(p, t, swaps, _ends(p))
    if not found.curvature.convex:
        raise DeriveError(
            "E302",
            f"an equation of all entries holds together with a cost that is not convex, {pretty(found.f)}: no rule gives its prox",
            hint="split it: an algorithm with two proximal steps, such as douglas_rachford, takes both",
        )
    meets, weight = _a_point(a, s, found), eye(1) if as_constant(a) == 1 else a
    if as_constant(a) == 1 and not at_most:  # what all entries share is in m, and would cost digits
        at = elementwise(slot(0) - slot(1), at, hold(largest(at, 0)))
    names = {found.u: slot(2), **{n: slot(i + 3) for i, n in enumerate(slots)}}
    reach = elementwise(_over(slot(0) - swap(_rise(found), names)), at, weight, meets, *others)
    m = multiplier(found, slots, at, weight, s, reach, *others)
    pull = slot(1) * (sp.Max(0, slot(2)) if at_most else slot(2))
    step = prox_map(found, slots, elementwise(slot(0) - pull, at, weight, m), *others)
    return Proximal(step, "the scalar prox of each entry, all moved until they fulfil the equation", True, found)


def _a_point(a: Expr, s: Expr, found: ScalarProx) -> Expr:
    """A point of the domain with <a, z> = s down each column, inside of it if there is one."""
    lo, hi = found.domain
    if nonnegative(a):
        return elementwise(sp.Max(lo, sp.Min(hi, slot(0) / slot(1))), s, total(a, 0))
    size = total(elementwise(sp.Abs(slot(0)), a), 0)
    if lo.is_infinite == hi.is_infinite:  # from the middle, all by the same amount
        c = sp.S.Zero if lo.is_infinite else (lo + hi) / 2
        moved = c + sp.sign(slot(0)) * (slot(1) - c * slot(2)) / slot(3)
        return elementwise(sp.Max(lo, sp.Min(hi, moved)), a, s, total(a, 0), size)
    end, knot, way = (lo, found.knots[0], 1) if hi.is_infinite else (hi, found.knots[-1], -1)
    if knot is None or not knot.flat or (knot.above.is_infinite and knot.below.is_infinite):
        raise DeriveError(
            "E302",
            f"{text(a)} may have entries of both signs, and {pretty(found.f)} falls or grows without end near {_shown(end)}: no rule gives its prox",
            hint="declare it `positive: true`",
        )
    up, down = (elementwise(sp.Max(0, c * way * slot(0)), a) for c in (1, -1))
    gap = elementwise(slot(0) - end * slot(1), s, total(a, 0))
    shares = [
        elementwise(slot(0) / sp.Max(slot(1), sp.Float("1e-30")), x, total(elementwise(slot(0) ** 2, x), 0))
        for x in (up, down)
    ]
    return elementwise(end + way * (sp.Max(0, slot(0)) * slot(1) + sp.Max(0, -slot(0)) * slot(2)), gap, *shares)


def _rise(found: ScalarProx) -> sp.Expr:
    """u + t f'(u), at a kink one of its values: prox of it is u."""
    y = sp.Abs(found.u) if found.even else found.u
    side = sp.sign(found.u) if found.even else sp.S.One
    ends = [*(y < k.at for k in found.knots[1:-1] if k is not None), True]
    slope = sp.Piecewise(*((part.G.xreplace({found.u: y}), end) for part, end in zip(found.parts, ends, strict=True)))
    plain = slope.replace(lambda x: isinstance(x, Primitive), lambda x: x.textbook())
    return found.u + side * plain


def _over(e: sp.Expr) -> sp.Expr:
    """e / a, a in slot(1); 0 where a is 0, which only widens an interval."""
    return sp.Piecewise((0, sp.Eq(slot(1), 0)), (e / slot(1), True))


def _symbol_of(e: Expr, i: int) -> sp.Symbol:
    """A scalar that stands for the entries of data, with the sign that is known."""
    return scalar(e.name if isinstance(e, Sym) else f"b{i}", positive=nonnegative(e))


def _radial(p: Parts, z: Sym, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal | None:
    """z = b + (v - b)/|v - b| * prox_h(|v - b|); with c |z|_1 and z >= 0 on the entries first, if 0 is then the best of what they make 0."""
    ((h, axis, shift),) = p.radial
    found = _scalar(h, t, swaps)
    keeps_0 = found.centred or found.mode == "threshold"
    if p.entries or p.domain:
        if not _sign_homogeneous(p) or as_constant(shift) != 0 or not keeps_0:
            return None
        at = _separable(replace(p, radial=()), t, at, swaps).step
    at = add(at, shift)
    step = _lengthened(at, axis, found, keeps_0)
    rule = "the scalar prox of the length" if axis is None else "the scalar prox of each group's length"
    rule += "" if keeps_0 else "; at 0, where no direction is better than another, all entries equal"
    return Proximal(add(step, scale(-1, shift)), rule, found.curvature.convex, found)


def _lengthened(x: Expr, axis: Axis, found: ScalarProx, keeps_0: bool = True) -> Expr:
    """x / |x| times the scalar prox of |x|; of x = 0: 0, or the prox of 0 in the direction of ones."""
    length = _length(x, axis)
    turned = slot(0) * (slot(1) / slot(2))
    if not keeps_0:
        count = x.rows * x.cols if axis is None else x.shape[axis]
        turned = sp.Piecewise((slot(1) / sp.sqrt(count), slot(2) <= sp.Float("1.5e-15")), (turned, True))
    return elementwise(turned, x, prox_map(found, (), length), length)


def _length(x: Expr, axis: Axis) -> Expr:
    """|x|, at least 1e-15: a zero vector has a gradient."""
    return elementwise(sp.sqrt(sp.Max(slot(0), sp.Float("1e-30"))), total(elementwise(slot(0) ** 2, x), axis))


def _sign_homogeneous(p: Parts) -> bool:
    """Is the separable part w |z|, w >= 0 by entry, with or without z >= 0? Then radial after separable is the prox of the sum.

    Of all z of one length the best is along the shrunk v, whatever the weights: <w, |z|> - <z, v> >= -|z| |shrunk v|.
    """
    c = slope_of_abs(sp.Add(*p.entries))
    known = {slot(i + 1): sp.Symbol(f"_w{i}", nonnegative=True) for i, e in enumerate(p.others) if nonnegative(e)}
    return bool(c is not None and c.xreplace(known).is_nonnegative and all(d == (0, sp.oo) for d in p.domain))


def slope_of_abs(f: sp.Expr, s: sp.Symbol = S) -> sp.Expr | None:
    """c with f(s) = c |s|."""
    c = swap(f, {s: 1})
    return c if sp.expand(f - c * sp.Abs(s)) == 0 else None


def conjugate_of_abs(term: Expr, z: Sym) -> Expr | None:
    """The conjugate of sum of c |z_ij|: the set of entries from -c to c. None for other terms."""
    p = Parts.of(term, z)
    c = slope_of_abs(sp.Add(*p.entries)) if p.entries else None
    return None if c is None or p.others or replace(p, entries=()) != Parts() else indicator("ball_inf", z, c)


def _walk(p: Parts, z: Sym, t: sp.Expr, at: Expr, swaps: Swaps) -> Proximal | None:
    """The prox of a sum over differences of neighbours, then that of f(z_ij), the same f everywhere, or of h(|z|).

    Why: such a step keeps the order of neighbours, or scales all of z, so what is a subgradient of the first at x still is one there;
    <v - x, .> bounds the first from below, and what is left to minimise is the prox of the second at x, convex or not.
    """
    c, w, b = p.walks[0]
    if any(walk_[1:] != (w, b) for walk_ in p.walks[1:]):
        return None
    c = _learned(t * sp.Add(*(walk_[0] for walk_ in p.walks)), swaps)
    rest = replace(p, walks=())
    alone = rest == Parts()
    alike = replace(rest, radial=(), entries=(), domain=()) == Parts()
    whole = all(axis in (None, 0) and as_constant(shift) == 0 for _, axis, shift in p.radial)
    if not alone and not (alike and whole and as_constant(b) == 0):
        return None
    at = add(project("tv", add(at, b), c if as_constant(w) == 1 else scale(c, w)), scale(-1, b))
    if alone:
        return Proximal(at, TV, True)
    found = _rest(rest, z, t, at, swaps)
    return None if found is None else replace(found, rule=f"{TV}; then {found.rule}")


def sorted_weights(e: Expr, z: Sym) -> Expr | None:
    """w with e = w times the magnitudes of k z, the largest first, added up."""
    c, body = split(e)
    if not (isinstance(body, Sum) and body.axis is None and isinstance(body.x, Map)):
        return None
    profile, args = body.x.profile, body.x.args
    moving = [i for i, a in enumerate(args) if depends(a, z)]
    if len(moving) != 1 or not isinstance(at := args[moving[0]], Sorted) or at.shape != z.shape:
        return None
    k, rate = _times_abs(at.x, z), sp.diff(profile, slot(moving[0]))
    if k is None or rate.has(slot(moving[0])) or sp.expand(profile - rate * slot(moving[0])) != 0:
        return None
    w = elementwise(c * k * rate, *args)
    return w if w.cols == 1 else None


def _falls(w: Expr) -> bool:
    """Is no entry of a column above the one before? Of a parameter that is looked at where its values are known."""
    c, body = split(w)
    match body:
        case Sym():
            return c.is_nonnegative is True
        case Transpose(Op("running_sum", x, True)) if nonnegative(x):
            return c.is_nonnegative is True
        case Op("first", x) if nonnegative(x):
            return c.is_nonnegative is True and _falls(x)
        case Add(terms):
            return all(map(_falls, terms)) and c.is_nonnegative is True
        case Map(profile, (x,)) if x.shape == w.shape:
            return (c * sp.diff(profile, slot(0))).is_nonnegative is True and _falls(x)
        case _:
            return as_constant(w) is not None


def _symmetric_part(z: Sym) -> Expr:
    return scale(sp.Rational(1, 2), add(z, transpose(z)))


def _times_abs(e: Expr, z: Sym) -> sp.Expr | None:
    """k with e = k |z|, entry by entry."""
    k, body = split(e)
    match body:
        case Map(p, (x,)) if x is z and (c := slope_of_abs(p)) is not None:
            return k * c
        case _:
            return None


def _projection(name: str, params: tuple[sp.Expr | Expr, ...], at: Expr) -> Proximal | None:
    convex = name in CONVEX_SETS
    match name, params:
        case "ball2", (r,):
            found = derive_prox(sp.Integer(0), U, (-r, r))
            return Proximal(_lengthened(at, None, found), "the length clipped at the radius", True, found)
        case "affine", (a, b) if isinstance(a, Expr) and isinstance(b, Expr):  # v - A^+ (A v - b)
            gap = add(matmul(a, at), scale(-1, b))
            if a.rows == 1:  # A^+ = A' / |A|^2
                size = total(elementwise(slot(0) ** 2, a))
                share = elementwise(reciprocal(slot(0)), size) if (n := as_constant(size)) is None else constant(1 / n)
                return Proximal(
                    add(at, matmul(transpose(a), times(share, gap), coef=-1)), "projection on a plane", True
                )
            step = add(at, matmul(transpose(spectral_map(reciprocal(slot(0)), a)), gap, coef=-1))
            return Proximal(step, "projection on an affine set", True)
        case "simplex", (s,) if isinstance(s, sp.Expr):
            return Proximal(project(name, at, s), "projection on the simplex", True)
        case _ if name in PROJECTED:
            return Proximal(project(name, at, *params), f"projection on {name}", convex)
        case _:
            return None


def _solve(p: Parts, z: Sym, t: sp.Expr, at: Expr) -> Proximal:
    """0 = t (H z + b) + z - v."""
    slope = add(*p.quadratic)
    terms = slope.terms if isinstance(slope, Add) else (slope,)
    h = add(*(m for x in terms if (m := factor_before(x, z)) is not None and depends(x, z)))
    b = substitute(slope, {z: zeros(*z.shape)})
    return Proximal(matmul(inverse(add(eye(z.rows), scale(t, h))), add(at, scale(-t, b))), "a linear system", True)


def _refused(term: Expr, z: Sym, parts: Parts) -> DeriveError:
    if not parts.unknown:
        why = "each of its parts has a prox, and no rule joins them"
        return DeriveError(
            "E302",
            f"{text(term)} is not proximable in {z.name}: {why}",
            hint="put all parts but one under smooth terms, or split the variable",
        )
    bad = parts.unknown[0]
    why = "no rule gives its prox in closed form"
    hint = "split it: introduce a variable for the inner part, or use a smooth approximation such as huber with gradient_descent"
    if len({x.sizes for x in walk(term) if isinstance(x, Op) and x.name == "groups" and depends(x, z)}) > 1:
        why, hint = "groups of several sizes overlap", "an algorithm that splits, such as ADMM, takes each by itself"
        return DeriveError("E302", f"{text(term)} is not proximable in {z.name}: {why}", hint=hint)
    linear = next(
        (x for x in walk(bad) if isinstance(x, Mul) and len(x.factors) > 1 and not x.is_scalar and depends(x, z)), None
    )
    if linear is not None:
        why = f"{text(linear)} stands inside a function that is not smooth, and "
        if _orthonormal(linear, z):
            return DeriveError(
                "E302", f"{text(bad)} is not proximable in {z.name}: {why}no rule gives its prox", hint=hint
            )
        why += "the rows of its matrix are not declared orthonormal"
        hint = "if its rows are orthonormal, write it O.T with O declared `orthonormal: true`; else an algorithm that splits is needed, such as ADMM"
    return DeriveError("E302", f"{text(bad)} is not proximable in {z.name}: {why}", hint=hint)
