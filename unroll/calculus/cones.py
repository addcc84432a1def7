"""What the form of an expression and what is declared of its symbols show of it: no negative entry, positive (semi)definite.

True means proved; False, or 0, only that nothing shows it.
"""

from __future__ import annotations

from typing import cast

import sympy as sp
from sympy.core.relational import Relational

from unroll.language.constructors import as_constant, conjugated, elementwise, matmul, scalar_factor, scale, transpose
from unroll.language.nodes import (
    Add,
    Diag,
    Diagonal,
    Expr,
    Eye,
    FamilySoftmax,
    FamilySum,
    Hold,
    Inverse,
    Map,
    Max,
    Member,
    Mul,
    Op,
    Softmax,
    Sorted,
    SpectralNorm,
    Sum,
    Sym,
    Transpose,
    Worked,
    slot,
)


def nonnegative(e: Expr) -> bool:
    """Has e no negative entry?"""
    value = as_constant(e)
    if value is not None:
        return value.is_nonnegative is True
    match e:
        case Sym(props=props):
            return "positive" in props
        case Member(of, _) | Transpose(of) | Hold(of) | Diag(of) | Diagonal(of) | Sum(of, _) | Max(of, _) | Sorted(of):
            return nonnegative(of)
        case FamilySum(_, _, body):
            return nonnegative(body)
        case Softmax() | FamilySoftmax() | SpectralNorm() | Worked("top", _):
            return True
        case Op(name, x) if name != "difference":  # sums and repetitions
            return nonnegative(x)
        case Add(terms):
            return all(map(nonnegative, terms))
        case Mul(c, (Max(x, _),)) if c.is_negative:  # c times the largest entry of x is the smallest of c x
            return nonnegative(scale(c, x))
        case Mul(c, factors):
            return c.is_nonnegative is True and all(map(nonnegative, factors))
        case Map(profile, args):
            sign = "nonnegative" if profile.has(Relational, sp.sign) else "positive"  # at 0, with no jump: the limit
            signs = {slot(i): sp.Symbol(f"_{i}", **{sign: True}) for i, a in enumerate(args) if nonnegative(a)}
            if profile.xreplace(signs).is_nonnegative is True:
                return True
            cases = profile.atoms(sp.Piecewise)  # whichever of them is taken
            options = [profile.xreplace({p: pair.args[0]}) for p in cases for pair in p.args]
            return len(cases) == 1 and all(nonnegative(elementwise(o, *args)) for o in options)
        case _:
            return False


def signed(profile: sp.Expr, args: tuple[Expr, ...]) -> sp.Expr:
    """The profile of a map with |p| written p where p has no negative value at these arguments: |√u| → √u, u a sum of squares."""
    known = {slot(i): sp.Symbol(f"_{i}", nonnegative=True) for i, a in enumerate(args) if nonnegative(a)}
    return cast(sp.Expr, profile.replace(sp.Abs, lambda p: p if p.xreplace(known).is_nonnegative else sp.Abs(p)))


def is_hermitian(e: Expr) -> bool:
    """Is e its conjugate transpose? Where no frequency is in it: symmetric."""
    return transpose(conjugated(e)) is e


def definite(e: Expr) -> int:
    """2: positive definite whatever the values of its symbols, 1: semidefinite, 0: not known. For e that is Hermitian."""
    match e:
        case Eye():
            return 2
        case Sym(props=props):
            return 2 if "positive_definite" in props else 1 if "psd" in props else 0
        case Member(of, _) | Hold(of):
            return definite(of)
        case Inverse(x):
            return 2 * (definite(x) == 2)
        case Add(terms):
            grades = [definite(t) for t in terms]
            return 0 if 0 in grades else max(grades)
        case Mul(coef, factors):
            if not coef.is_nonnegative:
                return 0
            core = definite(factors[0]) if len(factors) == 1 else _congruence(factors)
            return core if coef.is_positive else min(core, 1)
        case FamilySum(_, _, body):
            return min(definite(body), 1)
        case Diag(Map(profile, _)) if profile.is_positive:
            return 2
        case Diag(x):
            return int(nonnegative(x))
        case Map():
            weight, core = scalar_factor(e)
            return min(definite(core), 1) if core is not e and nonnegative(weight) else 0
        case _:
            return 0


def _congruence(factors: tuple[Expr, ...]) -> int:
    """M S M*, M* the conjugate transpose, is semidefinite if S is (or is absent)."""
    if not all(conjugated(a.T) is b for a, b in zip(factors, reversed(factors), strict=True)):
        return 0
    middle = factors[len(factors) // 2] if len(factors) % 2 else None
    return 1 if middle is None or definite(middle) >= 1 else 0


def square_root(m: Expr) -> tuple[sp.Expr, Expr] | None:
    """(c, B) with m = c B B', c > 0, from the form of a product that reads the same transposed."""
    match m:
        case Mul(c, factors) if c.is_positive and len(factors) % 2 == 0:
            half = len(factors) // 2
            left, right = matmul(*factors[:half]), matmul(*factors[half:])
            return (c, left) if transpose(right) is left else None
        case _:
            return None
