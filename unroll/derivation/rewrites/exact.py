"""Rewrites that change no value: sides of determinants and inverses, products expanded and collected, shares."""

from __future__ import annotations

import sympy as sp

from unroll.derivation.rewrites.patterns import descend, factors_of, orthonormal_columns, shifted_identity
from unroll.derivation.rewrites.record import Rule, Site
from unroll.language.constructors import (
    add,
    constant,
    elementwise,
    eye,
    family_softmax,
    inverse,
    logdet,
    matmul,
    ones,
    scale,
    split,
    swap,
    transpose,
)
from unroll.language.nodes import (
    Add,
    Expr,
    FamilySoftmax,
    FamilySum,
    Inverse,
    LogDet,
    Map,
    Mul,
    Sym,
    mentions,
    same,
    slot,
)
from unroll.language.traversal import expand


def push_through(to: sp.Expr | None = None) -> Rule:
    """(a I + c X Y)⁻¹ X → X (a I + c Y X)⁻¹, its transposed, and log det(a I + c X Y) → log det(a I + c Y X) + (n − p) log a."""

    def inner(x: Expr) -> list[tuple[sp.Expr, sp.Expr, tuple[Expr, ...], tuple[Expr, ...]]]:
        """(a, c, X, Y) for the ways to cut the product, the new side as asked."""
        shifted = shifted_identity(x)
        if shifted is None:
            return []
        c, factors = factors_of(shifted[1])
        cuts = [(shifted[0], c, factors[:i], factors[i:]) for i in range(1, len(factors))]
        return [cut for cut in cuts if _wanted(cut[3][0].rows, x.rows, to)]

    def other(a: sp.Expr, c: sp.Expr, x: tuple[Expr, ...], y: tuple[Expr, ...]) -> Expr:
        return add(scale(a, eye(y[0].rows)), matmul(*y, *x, coef=c))

    def rule(e: Expr) -> Site | None:
        match e:
            case Mul(coef, factors):
                for i, f in enumerate(factors):
                    for a, c, x, y in inner(f.x) if isinstance(f, Inverse) else []:
                        before, after = factors[:i], factors[i + 1 :]
                        turned_around = inverse(other(a, c, x, y))
                        if after[: len(x)] == x:
                            return Site(e, matmul(*before, *x, turned_around, *after[len(x) :], coef=coef))
                        if before[len(before) - len(y) :] == y:
                            return Site(
                                e, matmul(*before[: len(before) - len(y)], turned_around, *y, *after, coef=coef)
                            )
                return None
            case LogDet(arg):
                for a, c, x, y in inner(arg):
                    small = other(a, c, x, y)
                    if transpose(small) is small:
                        return Site(e, add(logdet(small), constant((arg.rows - small.rows) * sp.log(a))))
                return None
            case _:
                return None

    return rule


def _wanted(new: sp.Expr, old: sp.Expr, to: sp.Expr | None) -> bool:
    """Is the new side the one asked for, or surely the smaller one?"""
    return same(new, to) and not same(old, to) if to is not None else (old - new).is_positive is True


def smaller_side(e: Expr, sizes: dict[sp.Symbol, int]) -> Expr:
    """Inverses and determinants on their smaller side, where the sizes are known: an exact rewrite that cost decides."""

    def known(n: sp.Expr) -> int | None:
        found = swap(n, sizes)
        return int(found) if found.is_number else None

    def rule(x: Expr) -> Site | None:
        sides = {n: size for f in _inverted(x) for n in _sides(f) if (size := known(n)) is not None}
        for n, size in sorted(sides.items(), key=lambda side: side[1]):
            found = push_through(n)(x)
            if found is not None and all(size < old for f in _inverted(x) if (old := known(f.rows)) is not None):
                return found
        return None

    return descend(e, rule, [])


def _inverted(e: Expr) -> list[Expr]:
    match e:
        case LogDet(x):
            return [x]
        case Mul(_, factors):
            return [f.x for f in factors if isinstance(f, Inverse)]
        case _:
            return []


def _sides(x: Expr) -> set[sp.Expr]:
    """Sizes at which the product inside a I + c X Y can be cut."""
    shifted = shifted_identity(x)
    return {f.rows for f in factors_of(shifted[1])[1][1:]} if shifted is not None else set()


def woodbury() -> Rule:
    """(a I + c U Uᵀ)⁻¹ → (I − c/(a + c) U Uᵀ)/a for U with orthonormal columns."""

    def rule(e: Expr) -> Site | None:
        shifted = shifted_identity(e.x) if isinstance(e, Inverse) else None
        if shifted is None:
            return None
        a, (c, factors) = shifted[0], factors_of(shifted[1])
        if len(factors) == 2 and factors[1] is transpose(factors[0]) and orthonormal_columns(factors[0]):
            return Site(e, scale(1 / a, add(eye(e.rows), scale(-c / (a + c), matmul(*factors)))))
        return None

    return rule


def expanded() -> Rule:
    """A (B + C) D → A B D + A C D, and (B + C) * r → B * r + C * r for a row r."""

    def rule(e: Expr) -> Site | None:
        match e:
            case Mul() if (out := expand(e)) is not e:
                return Site(e, out)
            case Map(profile, args):
                wide = [
                    i
                    for i, a in enumerate(args)
                    if isinstance(a, Add | Mul) and a.rows != 1 and not sp.diff(profile, slot(i)).has(slot(i))
                ]
                for i in wide:
                    out = expand(args[i])
                    if isinstance(out, Add) and profile.subs(slot(i), 0) == 0:
                        return Site(e, add(*(elementwise(profile, *args[:i], t, *args[i + 1 :]) for t in out.terms)))
                return None
            case _:
                return None

    return rule


def collected(on: Sym) -> Rule:
    """A X + B X → (A + B) X."""

    def rule(e: Expr) -> Site | None:
        if not isinstance(e, Add):
            return None
        tails: dict[tuple[Expr, ...], list[Expr]] = {}
        for t in e.terms:
            c, factors = factors_of(t)
            at = next((i for i, f in enumerate(factors) if f is on or (isinstance(f, Sym) and f.name == on.name)), None)
            key = () if at is None else factors[at:]
            front = matmul(*factors[:at]) if at else eye(e.rows)  # what stands before it need not be square
            tails.setdefault(key, []).append(t if at is None else scale(c, front))
        if all(len(fronts) < 2 for key, fronts in tails.items() if key):
            return None
        return Site(e, add(*(add(*fronts) if not key else matmul(add(*fronts), *key) for key, fronts in tails.items())))

    return rule


def shares() -> Rule:
    """softmax_k(a + b_k) → softmax_k(b_k), and Σ_k softmax_k(b_k) * A → A, A and a the same for every k."""

    def rule(e: Expr) -> Site | None:
        match e:
            case FamilySoftmax(k, n, x) if isinstance(x, Add):
                kept = [t for t in x.terms if mentions(t, k)]
                return Site(e, family_softmax(k, n, add(*kept))) if 0 < len(kept) < len(x.terms) else None
            case FamilySum(k, _, body):
                c, inner = split(body)
                match inner:
                    case FamilySoftmax(i, _, _) if i == k:
                        return Site(e, constant(c, *inner.shape))
                    case Map(profile, args):
                        own = [j for j, a in enumerate(args) if isinstance(a, FamilySoftmax) and a.index == k]
                        rest = profile / slot(own[0]) if len(own) == 1 else profile
                        if (
                            len(own) != 1
                            or rest.has(slot(own[0]))
                            or any(mentions(a, k) for j, a in enumerate(args) if j != own[0])
                        ):
                            return None
                        shape = args[own[0]].shape
                        return Site(
                            e,
                            scale(
                                c,
                                elementwise(
                                    profile.subs(slot(own[0]), 1),
                                    *(ones(*shape) if j == own[0] else a for j, a in enumerate(args)),
                                ),
                            ),
                        )
                    case _:
                        return None
            case _:
                return None

    return rule
