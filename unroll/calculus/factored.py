"""Factors of a formula with exponentials, whatever numbers stand in them."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterable

import sympy as sp

HIGHEST = 24
"""Power up to which one exponential is read as that of another."""


def factored(e: sp.Expr) -> sp.Expr:
    """e as a product, exponentials as powers of one another where their rates are small multiples of one rate.

    SymPy's own factoring reads exp(3.85 u) as the 77th power of exp(u / 20), and exp(0.9000000000000001) as some 10^16th.
    """
    split = sp.expand_power_exp(e)
    rates: dict[sp.Expr, dict[sp.Expr, sp.Expr]] = {}
    for n in split.atoms(sp.exp):
        c, rest = n.exp.as_coeff_Mul()
        rates.setdefault(rest, {})[c] = n
    into, back = dict[sp.Basic, sp.Expr](), dict[sp.Basic, sp.Expr]()
    for rest, powers in rates.items():
        shared = _shared(powers)
        alike = sp.Dummy("y", positive=rest.is_extended_real)
        for c, n in powers.items():
            name = alike if shared else sp.Dummy("y", positive=rest.is_extended_real)
            into[n] = name ** (c / shared) if shared else name
            back[name] = sp.exp(shared * rest) if shared else n
    return sp.factor(split.xreplace(into)).xreplace(back)


def _shared(rates: Iterable[sp.Expr]) -> sp.Rational | None:
    """The rate that all are small multiples of."""
    if not all(r.is_Rational for r in rates):
        return None
    base = sp.Rational(sp.igcd(0, *(r.p for r in rates)), sp.ilcm(1, *(r.q for r in rates)))
    return base if all(abs(r / base) <= HIGHEST for r in rates) else None
