"""Where a step is right only while a learned number is positive.

The strength of a proximal step is positive; so is a scalar of a term whose prox is derived under that sign: sign(v) max(|v| - theta, 0) is
no proximal step for theta < 0, max(v - theta, 0), that of theta z over z >= 0, is one whatever theta is. A ball has a radius, a box a width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.prox import derive as derive_prox
from unroll.derivation.step import Assign, Step
from unroll.errors import DeriveError
from unroll.language.functions import Value
from unroll.language.nodes import Expr, Indicator, Prox, scalar, walk
from unroll.language.show import text
from unroll.language.traversal import substitute_scalars


def needs_sign(step: Step, s: sp.Symbol) -> tuple[Assign, Prox] | None:
    """The first proximal step, and the assignment it is in, that is right for s > 0 alone, s of no known sign."""
    numbers: dict[sp.Basic, Value] = {a.target: a.value for a in step.assigns if isinstance(a.target, sp.Symbol)}
    for a in step.assigns:
        for e in walk(a.value) if isinstance(a.value, Expr) else ():
            if isinstance(e, Prox) and (_moves(e.t, s, numbers) or _derived_by_sign(e, s)):
                return a, e
    return None


def _moves(value: Value, s: sp.Symbol, numbers: Mapping[sp.Basic, Value]) -> bool:
    """May the value of s make this less than 0, through numbers that the step works out, and would s > 0 keep it from that?"""
    read = value.scalars if isinstance(value, Expr) else value.free_symbols
    rest = {x: v for x, v in numbers.items() if x not in read}
    if s in read and not _nonnegative(value) and _nonnegative(_with_positive(value, [s])):
        return True
    return any(_moves(numbers[x], s, rest) for x in read if x in numbers)


def _nonnegative(value: Value) -> bool:
    return nonnegative(value) if isinstance(value, Expr) else value.is_nonnegative is True


def _with_positive(value: Value, names: Iterable[sp.Basic]) -> Value:
    known = {x: scalar(str(x), positive=True) for x in names}
    return substitute_scalars(value, known) if isinstance(value, Expr) else cast(sp.Expr, value.xreplace(known))


def _derived_by_sign(e: Prox, s: sp.Symbol) -> bool:
    """Is the prox of the term another one, or none, where the sign of what s stands for is not known?"""
    replaced = [a for a, b in e.swaps if b == s]
    if not replaced and s not in e.term.scalars:
        return False
    signed = set[sp.Basic]().union(*(a.free_symbols for a in replaced)) & e.term.scalars
    if replaced and not signed:  # the strength itself
        return True
    term = substitute_scalars(e.term, {x: scalar(str(x)) for x in signed})
    names = {s, *(scalar(str(x)) for x in signed)}
    if any(_empty(x, names) for x in walk(term) if isinstance(x, Indicator)):
        return True
    try:
        return _formulas(term, e) != _formulas(e.term, e)
    except DeriveError:
        return True


def _empty(e: Indicator, names: Iterable[sp.Basic]) -> bool:
    """Is there no point in the set for some of these numbers, and one where they are > 0? Of a ball its radius, of a box its width."""
    sizes = [p for p in e.params if not isinstance(p, Expr)]
    size = sizes[-1] - sizes[0] if len(sizes) == 2 else sizes[0] if len(sizes) == 1 else sp.Integer(0)
    return size.is_nonnegative is not True and _nonnegative(_with_positive(size, names))


def _formulas(term: Expr, e: Prox) -> list[str]:
    """What is worked out for the prox of a term, in words without assumptions."""
    found = derive_prox(term, e.variable, e.t, e.at)
    inner = [found.scalar.expressions()] if found.scalar is not None else []
    return [text(found.step), *(str(x) for xs in inner for x in xs)]
