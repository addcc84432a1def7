"""Circulant matrices per frequency: block-diagonal there, so that an inverse of all is an inverse of each."""

from __future__ import annotations

import sympy as sp

from unroll.derivation.rewrites.patterns import descend
from unroll.derivation.rewrites.record import Rule, Site
from unroll.language.constructors import (
    conjugated,
    diag,
    elementwise,
    eye,
    family_sum,
    fresh_index,
    is_symmetric,
    logdet,
    matmul,
    operator,
    rebuild,
    scale,
    signal,
    spectrum,
    transpose,
)
from unroll.language.nodes import (
    Add,
    Diag,
    Expr,
    Eye,
    FamilySum,
    Hold,
    Inverse,
    LogDet,
    Map,
    Mul,
    Op,
    ShapeError,
    Transpose,
    bound_indices,
    free_indices,
    mentions,
    multiple,
    same,
    slot,
    walk,
)

FREQUENCY = "w"
"""Index of frequencies."""


def circulant_to_fft() -> Rule:
    """f(X) Y → the inverse transform of f(X̂) Ŷ for f(X) made of shifts(X): sums, products, inverses; log det f(X) → Σ log det f(X̂)."""

    def rule(e: Expr) -> Site | None:
        sizes = next((x.sizes for x in walk(e) if isinstance(x, Op) and x.name == "shifts"), None)
        if sizes is None:
            return None
        found = _per_frequency(e, sizes, fresh_index(FREQUENCY, bound_indices(e) | free_indices(e)))
        return None if found is None else Site(e, found)

    return rule


def per_frequency(e: Expr) -> Expr:
    """e with circulant_to_fft wherever it applies: an exact rewrite that is never dearer."""
    return descend(e, circulant_to_fft(), []) if any(isinstance(x, Op) and x.name == "shifts" for x in walk(e)) else e


def _per_frequency(e: Expr, sizes: tuple[sp.Expr, ...], w: str) -> Expr | None:
    places = sp.Mul(*sizes)
    match e:
        case LogDet(x) if (b := circulant_block(x, sizes, w)) is not None:
            return family_sum(w, places, logdet(b))
        case Inverse() if (b := circulant_block(e, sizes, w)) is not None:
            return circulant(b, sizes, w)
        case Op("shifts", x, True, s) if (
            s == sizes and (b := circulant_block(x, sizes, w)) is not None and mentions(b, w)
        ):
            return scale(sp.sqrt(places), signal(w, sizes, b))
        case Mul() if (found := _product_per_frequency(e, sizes, w)) is not None:
            return found
        case Mul() if (
            isinstance(turned := transpose(e), Mul) and (found := _product_per_frequency(turned, sizes, w)) is not None
        ):
            return transpose(found)
        case _:
            return None


def _product_per_frequency(e: Mul, sizes: tuple[sp.Expr, ...], w: str) -> Expr | None:
    """A @ Y with A of cyclic shifts: the run of such factors that ends farthest to the right, and what follows it.

    Not of a product that is symmetric by its form, which would lose that.
    """
    if is_symmetric(e):
        return None
    blocks = [circulant_block(f, sizes, w) for f in e.factors]
    for j in range(len(blocks) - 1, 0, -1):
        i = next((i for i in range(j) if None not in blocks[i:j]), j)
        run = [b for b in blocks[i:j] if b is not None]
        if blocks[j] is None and any(mentions(b, w) for b in run) and _places(e.factors[j], sizes):
            end = len(blocks) if e.cols == 1 or isinstance(e.factors[j], Diag) else j + 1  # the narrow side first
            y = signal(w, sizes, matmul(*run, spectrum(w, sizes, matmul(*e.factors[j:end]))))
            return matmul(*e.factors[:i], y, *e.factors[end:], coef=e.coef)
    return None


def _places(e: Expr, sizes: tuple[sp.Expr, ...]) -> bool:
    """Are the rows of e channels by places?"""
    try:
        return bool(multiple(e.rows, sizes))
    except ShapeError:
        return False


def circulant(block: Expr, sizes: tuple[sp.Expr, ...], w: str) -> Expr:
    """The matrix that commutes with cyclic shifts and has this block at every frequency: the shifts of its first columns."""
    return operator("shifts", signal(w, sizes, scale(1 / sp.sqrt(sp.Mul(*sizes)), block)), sizes=sizes)


def circulant_block(e: Expr, sizes: tuple[sp.Expr, ...], w: str) -> Expr | None:
    """The block at frequency w of a matrix that commutes with cyclic shifts by its form, else None: Fᴴ e F is block diagonal.

    e: c T × c' T, made of shifts(X), X: c T × c'.  Returns c × c'; products, inverses and transposes of matrices are those of blocks.
    Source: Davis 1979, Circulant Matrices; Chan et al. 2022, arXiv:2105.10446.
    """
    if not (_places(e, sizes) and _places(transpose(e), sizes)):
        return None
    match e:
        case Eye(n):
            return eye(multiple(n, sizes))
        case Op("shifts", x, False, s) if s == sizes:
            return scale(sp.sqrt(sp.Mul(*sizes)), spectrum(w, sizes, x))
        case Transpose(x):
            b = circulant_block(x, sizes, w)
            return None if b is None else transpose(conjugated(b))
        case Diag(Op("repeat", v, False, (n,))) if same(n, sp.Mul(*sizes)):
            return diag(v)
        case Diag(Map(profile, args)) if all(
            a.is_scalar or (isinstance(a, Op) and a.name == "repeat" and not a.adjoint) for a in args
        ):
            return _repeated(profile, args, sizes)
        case Inverse() | Hold() | FamilySum() | Add() | Mul():
            blocks = [circulant_block(c, sizes, w) for c in e.children]
            return None if None in blocks else rebuild(e, tuple(b for b in blocks if b is not None))
        case Map(profile, args):  # scalars times a matrix
            wide = [i for i, a in enumerate(args) if not a.is_scalar]
            if len(wide) != 1 or (profile / slot(wide[0])).has(slot(wide[0])):
                return None
            b = circulant_block(args[wide[0]], sizes, w)
            return None if b is None else elementwise(profile, *(b if i == wide[0] else a for i, a in enumerate(args)))
        case _:
            return None


def _repeated(profile: sp.Expr, args: tuple[Expr, ...], sizes: tuple[sp.Expr, ...]) -> Expr | None:
    """diag(h(repeat(v))) has the block diag(h(v))."""
    short = [a.x if isinstance(a, Op) and same(sp.Mul(*a.sizes), sp.Mul(*sizes)) else a for a in args]
    fits = all(a.is_scalar or a is not b for a, b in zip(args, short, strict=True))
    return diag(elementwise(profile, *short)) if fits else None
