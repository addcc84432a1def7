"""What is linear in a variable: the K of g(K z + b), found inside a term, with its adjoint and its norm; minima of quadratics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.cones import nonnegative
from unroll.calculus.gradient import gradient
from unroll.calculus.prox import separable, turned
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    as_constant,
    constant,
    diag,
    elementwise,
    eye,
    inverse,
    is_symmetric,
    matmul,
    ones,
    operator,
    prox,
    scale,
    split,
    sweep,
    symbol,
    times,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Diagonal,
    Expr,
    FamilySum,
    Hold,
    Indicator,
    Map,
    Mul,
    Op,
    Sum,
    Sym,
    Trace,
    Transpose,
    depends,
    entry,
    slot,
)
from unroll.language.show import text
from unroll.language.traversal import expand, substitute

COLUMNWISE = ("difference", "repeat", "first")
"""Operators that do with a matrix what they do with each of its columns: they are products from the left."""


@dataclass(frozen=True)
class Linear:
    """K: z -> e, linear in z."""

    e: Expr
    z: Sym

    @property
    def is_identity(self) -> bool:
        return self.e is self.z

    def __call__(self, at: Expr) -> Expr:
        """K at."""
        return substitute(self.e, {self.z: at})

    def adjoint(self, y: Expr) -> Expr:
        """K' y: the slope of <y, K z> in z."""
        if self.is_identity:
            return y
        name = symbol("_y", *self.e.shape, "variable", 2)
        slope = gradient(total(elementwise(slot(0) * slot(1), name, self.e)), self.z)
        return substitute(slope, {name: y})


def square_of_norm(operators: list[Linear]) -> Expr:
    """An upper bound, often exact, of the largest singular value of all of them stacked, squared."""
    (z,) = {k.z for k in operators}
    return curvature.smoothness(add(*(scale(sp.Rational(1, 2), _sumsq(k.e)) for k in operators)), z).lipschitz


def _sumsq(e: Expr) -> Expr:
    return total(elementwise(slot(0) ** 2, e))


def inside(e: Expr, z: Sym) -> tuple[Expr, Sym, Linear] | None:
    """(g, w, K) with e = g(K z): all of z that e reads stands in one K z + b, and b belongs to g. None where there are several."""
    found = set(_affine_parts(e, z))
    if len(found) != 1:
        return None
    (x,) = found
    b = substitute(x, {z: zeros(*z.shape)})
    k = Linear(expand(add(x, scale(-1, b))), z)
    props = ("symmetric",) if x.cols != 1 and is_symmetric(x) else ()
    w = z if k.is_identity else symbol(f"{z.name}_K", *x.shape, "variable", 1 if x.cols == 1 else 2, props=props)
    return substitute(e, {x: add(w, b)}), w, k


def _affine_parts(e: Expr, z: Sym) -> Iterator[Expr]:
    """The largest sub-expressions that are affine in z."""
    if not depends(e, z) or isinstance(e, Hold):
        return
    if affine(e, z):
        yield e
        return
    for x in e.children:
        yield from _affine_parts(x, z)


def affine(e: Expr, z: Sym) -> bool:
    """Is e = K z + b? By its form; False where that is not seen."""
    if not depends(e, z):
        return True
    match e:
        case Sym():
            return True
        case Add(terms):
            return all(affine(t, z) for t in terms)
        case Mul(_, factors):
            moving = [f for f in factors if depends(f, z)]
            return len(moving) == 1 and affine(moving[0], z)
        case Transpose(x) | Sum(x) | Trace(x) | Op(_, x) | Diagonal(x) | FamilySum(_, _, x):
            return affine(x, z)
        case Map(profile, args):
            moving = [(slot(i), a) for i, a in enumerate(args) if depends(a, z)]
            if not profile.is_polynomial(*(t for t, _ in moving)):  # where(z == 0, 0, 1) has a slope of 0, and jumps
                return False
            return all(affine(a, z) for _, a in moving) and not any(
                sp.diff(profile, s).has(*(t for t, _ in moving)) for s, _ in moving
            )
        case _:
            return False


def quadratic(e: Expr, z: Sym) -> bool:
    """Has e a gradient that is affine in z?"""
    if any(isinstance(x, Indicator) for x in (e, split(e)[1])):
        return False
    try:
        return affine(expand(gradient(e, z)), z)
    except DeriveError:
        return False


def hessian(e: Expr, z: Sym) -> Expr:
    """The matrix of second derivatives of e in a vector z. Raises DeriveError E301 where it is not seen as one."""
    if z.cols != 1:
        raise DeriveError(
            "E301",
            f"{z.name} is a matrix: second derivatives in it have four axes",
            hint="a vector has a matrix of them",
        )
    d = symbol("_d", *z.shape, "variable")
    along = gradient(total(elementwise(slot(0) * slot(1), gradient(e, z), d)), z)
    found = _matrix(along, d) if depends(along, d) else zeros(z.rows, z.rows)
    if found is None:
        raise DeriveError("E301", f"no rule writes the second derivatives of {text(e)} as a matrix")
    return found


def least(e: Expr, z: Sym) -> Expr:
    """argmin of e over z: a linear system where all of e is quadratic, a prox where the quadratic is c |z - v|^2 / 2 beside other terms.

    Raises DeriveError E302 where neither holds.
    """
    smooth, rest = _by_form(e, z)
    slope = expand(gradient(add(*smooth), z)) if smooth else zeros(*z.shape)
    terms = slope.terms if isinstance(slope, Add) else (slope,)
    moving = [t for t in terms if depends(t, z)]
    b = substitute(slope, {z: zeros(*z.shape)})
    if rest:
        c = sp.Add(*(split(t)[0] for t in moving))
        if any(split(t)[1] is not z for t in moving) or not moving:
            raise DeriveError(
                "E302",
                f"no closed form is known for the minimiser over {z.name} of {text(e)}",
                hint=f"{text(add(*rest))} is not quadratic: it has to stand beside c*sumsq({z.name} - v), or in another letter",
            )
        return prox(add(*rest), z, 1 / c, scale(-1 / c, b))
    found = _solved(moving, b, z)
    if found is None:
        why = "it is not bounded below" if not moving else f"no rule solves {text(slope)} = 0"
        if any(isinstance(body, Mul) and z in body.factors[:-1] for _, body in map(split, moving)):
            why += f", where matrices stand on both sides of {z.name}: a Sylvester equation"
        raise DeriveError("E302", f"no closed form is known for the minimiser over {z.name} of {text(e)}: {why}")
    return found


def swept(e: Expr, z: Sym, at: Expr) -> Expr:
    """One pass over the entries of z from `at`, each to the least of e, the others as they are by then.

    Raises DeriveError E302 where e is no convex quadratic with a sum over the entries of z, or no matrix stands before z in its slope.
    """
    smooth, rest = _by_form(e, z)
    slope = gradient(add(*smooth), z) if smooth else zeros(*z.shape)
    moving = _parts(expand(slope), z) if smooth else []
    if not moving:
        raise DeriveError(
            "E302", f"{text(e)} has no quadratic term", hint=f"sumsq(x - A @ {z.name}), or another step: prox"
        )
    q = _all(_matrix(t, z) for t in moving)
    if q is None and (other := turned(e, z)) is not None and _all(_right(t, z) for t in moving) is not None:
        return transpose(swept(*other, transpose(at)))
    if q is None:
        what = f"the second derivatives of {text(add(*smooth))} in {z.name}"
        raise DeriveError("E302", f"no rule writes {what} as one matrix", hint=f"sumsq(x - A @ {z.name})")
    if (known := curvature.bounds(add(*smooth), z)) is None or not known.convex:
        raise DeriveError(
            "E302", f"{text(add(*smooth))} is not known to be convex, and an entry may have no least value"
        )
    step = separable(add(*rest), z) if rest else entry(z)
    return sweep(q, substitute(scale(-1, slope), {z: at}), at, step)


def _by_form(e: Expr, z: Sym) -> tuple[list[Expr], list[Expr]]:
    """The terms of e in z that are quadratic, and the others."""
    smooth: list[Expr] = []
    rest: list[Expr] = []
    for term in e.terms if isinstance(e, Add) else (e,):
        if depends(term, z):
            (smooth if quadratic(term, z) else rest).append(term)
    return smooth, rest


def _solved(moving: list[Expr], b: Expr, z: Sym) -> Expr | None:
    """z with sum(moving) + b = 0: entry by entry, by a matrix on the left, or by one on the right."""
    if not moving:
        return None
    weights = _all(_weight(t, z) for t in moving)
    if weights is not None and (as_constant(weights) is not None or _above_zero(weights)):
        c = as_constant(weights)
        return scale(-1 / c, b) if c is not None else elementwise(-slot(0) / slot(1), b, weights)
    others = [t for t in moving if split(t)[1] is not z]
    if len(others) == 1 < len(moving) and (outer := _outer(others[0], z)) is not None:  # Sherman & Morrison
        c, (v, g) = sp.Add(*(split(t)[0] for t in moving if t is not others[0])), outer
        share = elementwise(slot(0) / (c + slot(1)), total(times(g, b)), total(times(g, v)))
        return scale(1 / c, add(elementwise(slot(0) * slot(1), v, share), scale(-1, b)))
    if (left := _all(_matrix(t, z) for t in moving)) is not None:
        return matmul(inverse(left), scale(-1, b))
    right = _all(_right(t, z) for t in moving)
    return None if right is None else matmul(scale(-1, b), inverse(right))


def _all(parts: Iterable[Expr | None]) -> Expr | None:
    found = list(parts)
    known = [p for p in found if p is not None]
    return add(*known) if len(known) == len(found) else None


def _above_zero(weights: Expr) -> bool:
    """Has a sum no entry that is 0 or less?"""
    terms = weights.terms if isinstance(weights, Add) else (weights,)
    return all(map(nonnegative, terms)) and any((c := as_constant(t)) is not None and c.is_positive for t in terms)


def _factor(e: Map, z: Sym) -> tuple[Expr, Expr] | None:
    """(w, x) with e = w * x + data, x what changes with z, w as large as e."""
    moving = [i for i, a in enumerate(e.args) if depends(a, z)]
    if len(moving) != 1:
        return None
    (i,) = moving
    w = sp.diff(e.profile, slot(i))
    return None if w.has(slot(i)) else (elementwise(w * slot(len(e.args)), *e.args, ones(*e.shape)), e.args[i])


def _parts(e: Expr, z: Sym) -> list[Expr]:
    """The terms that change with z."""
    return [t for t in (e.terms if isinstance(e, Add) else (e,)) if depends(t, z)]


def _weight(e: Expr, z: Sym) -> Expr | None:
    """w with e = w * z + data, entry by entry, as large as z."""
    c, body = split(e)
    if body is z:
        return constant(c, *z.shape)
    if isinstance(body, Map) and (found := _factor(body, z)) is not None and found[1].shape == z.shape:
        inner = _all(_weight(t, z) for t in _parts(found[1], z))
        return None if inner is None else elementwise(c * slot(0) * slot(1), found[0], inner)
    return None


def _outer(e: Expr, z: Sym) -> tuple[Expr, Expr] | None:
    """(V, G) with e = V <G, z> + data."""
    c, body = split(e)
    if not isinstance(body, Map) or (found := _factor(body, z)) is None or not found[1].is_scalar:
        return None
    slope = gradient(found[1], z)
    return None if depends(slope, z) else (scale(c, found[0]), slope)


def _right(e: Expr, z: Sym) -> Expr | None:
    """M with e = z M."""
    c, body = split(e)
    if body is z:
        return scale(c, eye(z.cols))
    match body:
        case Mul(_, (x, *rest)) if x is z and not any(depends(f, z) for f in rest):
            return matmul(*rest, coef=c)
        case _:
            return None


def _matrix(e: Expr, z: Sym) -> Expr | None:
    """M with e = M z + data, for what acts on columns from the left."""
    c, body = split(e)
    if body is z:
        return scale(c, eye(z.rows))
    match body:
        case Mul(_, (*front, x)) if depends(x, z) and not any(depends(f, z) for f in front):
            inner = _matrix(x, z)
            return None if inner is None else matmul(*front, inner, coef=c)
        case Op(name, x, adjoint, sizes) if name in COLUMNWISE and (inner := _matrix(x, z)) is not None:
            return scale(c, operator(name, inner, adjoint, sizes))
        case Map(profile, args) if (weights := _weights(profile, args, z)) is not None:  # sum of w * (M z), w (m' z)
            repeated = lambda i: () if args[i].shape == body.shape else (ones(*body.shape),)
            products = [
                _weighed(
                    elementwise(w * sp.Mul(*(slot(len(args)) for _ in repeated(i))), *args, *repeated(i)),
                    _matrix(args[i], z),
                )
                for i, w in weights.items()
            ]
            found = _all(products)
            return None if found is None else scale(c, found)
        case Sum(x, axis) if x.cols == 1 and axis in (None, 0) and (inner := _matrix(x, z)) is not None:
            return matmul(ones(1, x.rows), inner, coef=c)
        case Add(terms):
            found = _all(_matrix(t, z) for t in terms if depends(t, z))
            return None if found is None else scale(c, found)
        case _:
            return None


def _weights(profile: sp.Expr, args: tuple[Expr, ...], z: Sym) -> dict[int, sp.Expr] | None:
    """The factor of each argument that reads z, of a profile that is linear in them."""
    moving = [i for i, a in enumerate(args) if depends(a, z)]
    slots = {slot(i) for i in moving}
    factors = {
        i: cast(sp.Expr, sp.factor(sp.diff(profile, slot(i)))) for i in moving
    }  # one product: no sum of two diagonals
    return None if any(w.free_symbols & slots for w in factors.values()) else factors


def _weighed(w: Expr, m: Expr | None) -> Expr | None:
    """w * (M z) as a matrix before z, w a number or a vector."""
    if m is None or w.cols != 1:
        return None
    if w.is_scalar:
        return elementwise(slot(0) * slot(1), w, m)
    return matmul(w if m.rows == 1 else diag(w), m)
