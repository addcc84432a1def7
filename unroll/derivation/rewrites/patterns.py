"""Pieces of pictures: what rules look for in a product or a sum."""

from __future__ import annotations

import sympy as sp

from unroll.derivation.rewrites.record import Rule, Site
from unroll.language.constructors import add, common_powers, eye, matmul, prox, rebuild, scale, split, transpose
from unroll.language.nodes import Add, Expr, Eye, Member, Mul, Prox, ShapeError, Sym


def factors_of(e: Expr) -> tuple[sp.Expr, tuple[Expr, ...]]:
    """e = c * F1 @ F2 @ ..."""
    c, body = split(e)
    return c, body.factors if isinstance(body, Mul) else (body,)


def shifted_identity(x: Expr) -> tuple[sp.Expr, Expr] | None:
    """(a, M) with x = a I + M."""
    if not isinstance(x, Add):
        return None
    found = [split(t)[0] for t in x.terms if isinstance(split(t)[1], Eye)]
    if len(found) != 1:
        return None
    return found[0], add(x, scale(-found[0], eye(x.rows)))


def turned(factors: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The factors of the transposed product."""
    return tuple(transpose(f) for f in reversed(factors))


def stacked(n: sp.Expr, *parts: Expr) -> Expr:
    return matmul(eye(n), *parts)


def orthonormal_columns(u: Expr) -> bool:
    """U' U = I, as declared."""
    own = u.of if isinstance(u, Member) else u
    return isinstance(own, Sym) and "orthonormal" in own.props


def terms_of(e: Expr) -> tuple[Expr, ...]:
    return e.terms if isinstance(e, Add) else (e,)


def common_factor(coefs: list[sp.Expr]) -> sp.Expr:
    """What all coefficients share; with the sign of the first."""
    return coefs[0].as_coeff_Mul()[0] * common_powers(coefs)


MOST = 100_000  # steps of one rule at one place


def descend(e: Expr, rule: Rule, sites: list[Site]) -> Expr:
    for _ in range(MOST):
        found = rule(e)
        if found is None or found.after is e:
            break
        sites.append(found)
        e = found.after
    if isinstance(e, Prox):  # what is fed to the prox; the term it belongs to is a definition
        return prox(e.term, e.variable, e.t, descend(e.at, rule, sites), e.swaps)
    before = len(sites)
    try:
        return rebuild(e, tuple(descend(c, rule, sites) for c in e.children))
    except ShapeError:  # the new form does not show that the matrix of a logdet is symmetric: as written, then
        del sites[before:]
        return e
