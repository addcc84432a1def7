"""Decide the sign of an expression in the declared scalars: by assumptions first, by draws second, and say which."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import random
from collections.abc import Iterable

import sympy as sp
from sympy.core.relational import Relational

from unroll.calculus.factored import factored

DRAWS = 12
TRIES = 4000
BUDGET = 2000
"""Operations that the expressions of one derivation may have together when they are factored, solved or put in order."""
SLOW = 10
"""What simplifying an expression, or taking its limit, costs: as much as factoring one that is so many times as long."""

ASKED = 128
"""Operations of an expression whose sign SymPy is asked for: of nested sums it tries every way, half a minute for 300."""


class Undecided(Exception):
    """The sign of an expression depends on the values of the scalars."""

    def __init__(self, expr: sp.Expr):
        super().__init__(f"the sign of {expr} depends on the values of {names(expr.free_symbols)}")
        self.expr = expr


def names(symbols: Iterable[sp.Basic]) -> str:
    return ", ".join(sorted(str(s) for s in symbols))


def as_positive(fact: sp.Basic) -> sp.Expr:
    """a > b, a >= b -> a − b, read as positive."""
    if isinstance(fact, Relational):
        return fact.gts - fact.lts
    assert isinstance(fact, sp.Expr)
    return fact


class Signs:
    """Signs of expressions in `symbols`, given that every expression of `assume` is positive.

    `sampled` lists, in words, each sign that no assumption settled and that draws of the scalars agreed on.
    """

    def __init__(self, symbols: Iterable[sp.Symbol], assume: Iterable[sp.Basic] = ()):
        self.assume = tuple(as_positive(a) for a in assume)
        self.symbols = tuple(sorted(set(symbols).union(*(a.free_symbols for a in self.assume)), key=str))
        self.swap = _swaps(self.assume)
        self.draws = self._draw()
        self.sampled: list[str] = []
        self.left = BUDGET
        self._known: dict[sp.Expr, int] = {}

    def afford(self, expr: sp.Expr, times: int = 1) -> bool:
        """Pay for work on expr; False once the budget is spent. Counted in operations, so that all machines decide alike."""
        self.left -= times * int(sp.count_ops(expr))
        return self.left >= 0

    def of(self, expr: sp.Expr) -> int:
        """−1, 0 or 1.  Raises Undecided where the draws disagree."""
        if expr not in self._known:
            self._known[expr] = self._settle(expr)
        return self._known[expr]

    def known(self, expr: sp.Expr) -> int | None:
        """The sign, or None if it depends on the scalars."""
        try:
            return self.of(expr)
        except Undecided:
            return None

    def values(self, expr: sp.Expr) -> list[complex]:
        """The value of expr at every draw. Raises Undecided where SymPy cannot compare what is under a max or a min."""
        try:
            return [complex(expr.xreplace(draw)) for draw in self.draws]
        except ValueError:
            raise Undecided(expr) from None

    def ordered(self, points: Iterable[sp.Expr]) -> list[sp.Expr]:
        """Distinct points, ascending."""
        out: list[sp.Expr] = []
        for point in points:
            place = 0
            for other in out:
                sign = self.of(point - other)
                if sign == 0:
                    break
                place += sign > 0
            else:
                out.insert(place, point)
        return out

    def _settle(self, expr: sp.Expr) -> int:
        e = expr.xreplace(self.swap)
        proved = _by_assumption(e)
        for form in (sp.expand, factored):
            if proved is None and self.afford(e):
                proved = _by_assumption(form(e))
        if proved is not None:
            return proved
        values = self.values(expr)
        if any(abs(x.imag) > 1e-9 * (1 + abs(x)) or x != x for x in values):
            raise Undecided(expr)
        tiny = [abs(x) <= 1e-9 for x in values]
        if all(tiny) and sp.simplify(expr) == 0:
            return 0
        positive = {x.real > 0 for x in values}
        if any(tiny) or len(positive) > 1:
            raise Undecided(expr)
        self.sampled.append(f"{expr} {'>' if positive == {True} else '<'} 0")
        return 1 if positive == {True} else -1

    def _draw(self) -> list[dict[sp.Basic, sp.Expr]]:
        rng = random.Random(0)
        out: list[dict[sp.Basic, sp.Expr]] = []
        for _ in range(TRIES):
            draw: dict[sp.Basic, sp.Expr] = {s: sp.Float(_value(s, rng)) for s in self.symbols}
            if all(a.xreplace(draw) > 0 for a in self.assume):
                out.append(draw)
            if len(out) == (DRAWS if self.symbols else 1):
                return out
        raise Undecided(self.assume[0])


def _value(symbol: sp.Symbol, rng: random.Random) -> float:
    size = rng.lognormvariate(0, 0.8)
    if symbol.is_nonnegative:
        return size
    return -size if symbol.is_nonpositive else 2 * rng.gauss(0, 1)


def _swaps(assume: tuple[sp.Expr, ...]) -> dict[sp.Basic, sp.Expr]:
    """a − 2 > 0 -> {a: 2 + p}, p > 0: what SymPy can then decide."""
    swap: dict[sp.Basic, sp.Expr] = {}
    for fact in assume:
        for s in sorted(fact.free_symbols, key=str, reverse=True):
            slope = fact.diff(s)
            if slope.is_number and slope != 0 and s not in swap:
                rest = (fact - slope * s).expand().xreplace(swap)
                swap[s] = (sp.Dummy("p", positive=True) - rest) / slope
                break
    return swap


def _by_assumption(e: sp.Expr) -> int | None:
    if sp.count_ops(e) > ASKED:
        return None
    return 0 if e.is_zero else 1 if e.is_extended_positive else -1 if e.is_extended_negative else None
