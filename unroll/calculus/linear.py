"""What is linear in a variable: the K of g(K z + b), found inside a term, with its adjoint and its norm; minima of quadratics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.gradient import gradient
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    diag,
    elementwise,
    eye,
    inverse,
    matmul,
    ones,
    operator,
    prox,
    scale,
    split,
    symbol,
    total,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Diagonal,
    Expr,
    Eye,
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
    w = z if k.is_identity else symbol(f"{z.name}_K", *x.shape, "variable", 1 if x.cols == 1 else 2)
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
    smooth: list[Expr] = []
    rest: list[Expr] = []
    for term in e.terms if isinstance(e, Add) else (e,):
        if depends(term, z):
            (smooth if quadratic(term, z) else rest).append(term)
    slope = expand(gradient(add(*smooth), z)) if smooth else zeros(*z.shape)
    terms = slope.terms if isinstance(slope, Add) else (slope,)
    moving = [t for t in terms if depends(t, z)]
    factors = [_matrix(t, z) for t in moving]
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
    if not moving or any(f is None for f in factors):
        why = "it is not bounded below" if not moving else f"no rule solves {text(slope)} = 0"
        raise DeriveError("E302", f"no closed form is known for the minimiser over {z.name} of {text(e)}: {why}")
    h = add(*(f for f in factors if f is not None))
    c, body = split(h)
    if isinstance(body, Eye):
        return scale(-1 / c, b)
    return matmul(inverse(h), scale(-1, b))


def _matrix(e: Expr, z: Sym) -> Expr | None:
    """M with e = M z, for what acts on columns from the left."""
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
            products = [_weighed(elementwise(w, *args), _matrix(args[i], z)) for i, w in weights.items()]
            return None if any(m is None for m in products) else scale(c, add(*(m for m in products if m is not None)))
        case Sum(x, axis) if x.cols == 1 and axis in (None, 0) and (inner := _matrix(x, z)) is not None:
            return matmul(ones(1, x.rows), inner, coef=c)
        case Add(terms):
            found = [_matrix(t, z) for t in terms]
            return None if any(m is None for m in found) else scale(c, add(*(m for m in found if m is not None)))
        case _:
            return None


def _weights(profile: sp.Expr, args: tuple[Expr, ...], z: Sym) -> dict[int, sp.Expr] | None:
    """The factor of each argument that reads z, of a profile that is linear in them."""
    moving = [i for i, a in enumerate(args) if depends(a, z)]
    slots = {slot(i) for i in moving}
    factors: dict[int, sp.Expr] = {
        i: sp.factor(sp.diff(profile, slot(i))) for i in moving
    }  # one product: no sum of two diagonals
    if any(w.free_symbols & slots for w in factors.values()) or profile.subs(dict.fromkeys(slots, 0)) != 0:
        return None
    return factors


def _weighed(w: Expr, m: Expr | None) -> Expr | None:
    """w * (M z) as a matrix before z, w a number or a vector."""
    if m is None or w.cols != 1:
        return None
    if w.is_scalar:
        return elementwise(slot(0) * slot(1), w, m)
    return matmul(w if m.rows == 1 else diag(w), m)
