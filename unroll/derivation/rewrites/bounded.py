"""Approximations with a stated error under a stated assumption."""

from __future__ import annotations

from typing import Any

import sympy as sp

from unroll.derivation.rewrites.patterns import factors_of, shifted_identity, stacked
from unroll.derivation.rewrites.record import Rule, Site
from unroll.language.constructors import (
    add,
    constant,
    diagonal,
    elementwise,
    eye,
    family_sum,
    matmul,
    member,
    scale,
    spectral_norm,
    total,
    transpose,
)
from unroll.language.nodes import Expr, FamilySum, Inverse, LogDet, Mul, Sym, free_indices, mentions, same, slot


def neumann(order: sp.Expr) -> Rule:
    """(a I + M)⁻¹ → (I − M/a + ... ± (M/a)^order)/a."""

    def rule(e: Expr) -> Site | None:
        c, factors = factors_of(e)
        for i, f in enumerate(factors):
            shifted = shifted_identity(f.x) if isinstance(f, Inverse) else None
            if shifted is not None:
                a, m = shifted
                ratio = scale(-1 / a, m)
                powers = [stacked(f.rows, *[ratio] * k) for k in range(int(order) + 1)]
                terms = [scale(c / a, stacked(e.rows, *factors[:i], p, *factors[i + 1 :])) for p in powers]
                return Site(e, add(*terms), spectral_norm(ratio), (f, scale(1 / a, add(*powers))))
        return None

    return rule


def tight_frame(of: Sym) -> Rule:
    """Σ_k A U_k U_kᵀ B → A B."""

    def rule(e: Expr) -> Site | None:
        match e:
            case FamilySum(k, n, body) if of.family is not None:
                c, factors = factors_of(body)
                u = member(of, k)
                for i in range(len(factors) - 1):
                    rest = (*factors[:i], *factors[i + 2 :])
                    if factors[i] is u and factors[i + 1] is transpose(u) and not any(mentions(f, k) for f in rest):
                        frame = family_sum(k, n, matmul(u, transpose(u)))
                        gap = spectral_norm(add(frame, scale(-1, eye(u.rows))))
                        return Site(e, scale(c, stacked(e.rows, *rest)), gap)
                return None
            case _:
                return None

    return rule


def incoherent(of: Sym) -> Rule:
    """Dᵀ D → I."""

    def rule(e: Expr) -> Site | None:
        if not isinstance(e, Mul):
            return None
        for i in range(len(e.factors) - 1):
            if e.factors[i] is transpose(of) and e.factors[i + 1] is of:
                rest = (*e.factors[:i], *e.factors[i + 2 :])
                return Site(e, scale(e.coef, stacked(e.rows, *rest)), incoherence(of))
        return None

    return rule


def incoherence(d: Expr) -> Expr:
    """|D' D - I|."""
    return spectral_norm(add(matmul(transpose(d), d), scale(-1, eye(d.cols))))


def spectral_bound(by: Sym) -> Rule:
    """log det(a I + c M) → n log a + Σ_i log(1 + c/a (Qᵀ M Q)_ii): an upper bound where Q Qᵀ = I, tight where Q diagonalises M.

    With Qᵀ Q = I alone, Q tall, what M does outside the span of Q is lost.
    """

    def rule(e: Expr) -> Site | None:
        shifted = shifted_identity(e.x) if isinstance(e, LogDet) else None
        if shifted is None or not isinstance(e, LogDet):
            return None
        a, m = shifted
        free = sorted(free_indices(e))
        if by.family is not None and not free:
            return None
        q = by if by.family is None else member(by, free[0])
        if not same(q.rows, e.x.rows):
            return None
        energies = diagonal(matmul(transpose(q), scale(1 / a, m), q))
        value = total(elementwise(sp.log(1 + slot(0)), energies))
        gap = spectral_norm(add(matmul(q, transpose(q)), scale(-1, eye(q.rows))))
        return Site(e, add(value, constant(e.x.rows * sp.log(a))), gap)

    return rule


def neumann_limit(rho: float, order: Any) -> float:
    """What is left out is (I + R)⁻¹ (−R)^(order+1), R = M/a."""
    return rho ** (int(order) + 1) if rho < 1 else float("inf")
