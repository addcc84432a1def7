"""What is derived of a scalar prox: its pieces, where they end, and what z is on each. Sources and texts are written from it."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import sympy as sp

from unroll.calculus.roots import Root
from unroll.calculus.scalar import Curvature
from unroll.calculus.stable import xlogy
from unroll.errors import DeriveError


@dataclass(frozen=True)
class Part:
    """One smooth piece: F = t f and G = F' on (lo, hi) in u, and where z + G(z) = x there."""

    u: sp.Symbol
    lo: sp.Expr
    hi: sp.Expr
    F: sp.Expr
    G: sp.Expr
    roots: tuple[Root, ...]


@dataclass(frozen=True)
class Knot:
    """A breakpoint or finite end: F there, and the x from `below` to `above` that it is returned for, if flat."""

    at: sp.Expr
    value: sp.Expr
    below: sp.Expr
    above: sp.Expr
    flat: bool


@dataclass(frozen=True)
class Pieces:
    """prox of t f at v. mode: "threshold" or "candidates". even: parts and knots are of z ≥ 0, for x = |v|.

    centred: shown that the prox of an even f is 0 at 0. Where it is not, z and −z are as good at v = 0, and z ≥ 0 is returned, the
    limit from v > 0. Of other ties the first candidate wins: breakpoints before zeros of z + t f'(z) − v, small before large.
    """

    f: sp.Expr
    u: sp.Symbol
    v: sp.Symbol
    t: sp.Symbol
    x: sp.Symbol
    domain: tuple[sp.Expr, sp.Expr]
    curvature: Curvature
    mode: str
    even: bool
    centred: bool
    objective: sp.Expr
    parts: tuple[Part, ...]
    knots: tuple[Knot | None, ...]
    proof: str

    @cached_property
    def scalars(self) -> tuple[sp.Symbol, ...]:
        """Arguments after v, in order: t first if it is one, then by name."""
        found: set[sp.Basic] = set()
        for e in self.expressions():
            found |= e.free_symbols
        return tuple(sorted(found - {self.u, self.v, self.x}, key=lambda s: (s != self.t, str(s))))

    def expressions(self) -> Iterable[sp.Expr]:
        """Every formula of the parts and knots."""
        for p in self.parts:
            yield from (e for e in (p.lo, p.hi, p.F, p.G, *(r.z for r in p.roots if r.z is not None)))
        for k in self.knots:
            if k is not None:
                yield from (k.at, k.value, k.below, k.above)

    def map(self, change: Callable[[sp.Expr], sp.Expr]) -> Self:
        """The same prox with every expression changed by an exact identity or substitution."""

        def of_root(r: Root) -> Root:
            return replace(r, z=None if r.z is None else change(r.z), lo=change(r.lo), hi=change(r.hi))

        def of_part(p: Part) -> Part:
            mapped = [change(e) for e in (p.lo, p.hi, p.F, p.G)]
            return Part(p.u, *mapped, tuple(of_root(r) for r in p.roots))

        knots = [
            k and replace(k, at=change(k.at), value=change(k.value), below=change(k.below), above=change(k.above))
            for k in self.knots
        ]
        parts = tuple(of_part(p) for p in self.parts)
        domain = (change(self.domain[0]), change(self.domain[1]))
        return replace(self, parts=parts, knots=tuple(knots), objective=change(self.objective), domain=domain)

    def substitute(self, values: Mapping[sp.Basic, Any]) -> Self:
        """Scalars given other expressions or numbers, e.g. {t: step}."""
        swap = {k: sp.sympify(e) for k, e in values.items()}
        return self.map(lambda e: e.subs(swap, simultaneous=True))

    def replace(self, product: sp.Expr, symbol: sp.Expr) -> Self:
        """`symbol` in the place of a product of scalars, as theta for step*lam; exact wherever else they occur."""
        choices = [self.substitute_identity(s, e) for s, e in eliminations(product, symbol)]
        if not choices:
            raise DeriveError("E305", f"{product} is not a product of scalars of this proximal step")
        return min(choices, key=lambda p: (len(p.scalars), sum(e.count_ops() for e in p.expressions())))

    def substitute_identity(self, s: sp.Symbol, e: sp.Expr) -> Self:
        """s = e everywhere, simplified."""
        return self.map(lambda x: _tidy(x.subs(s, e)) if x.has(s) else x)

    @property
    def tie(self) -> str:
        """Words for what is returned where two points are as good, at v = 0 of an even f that is not least there."""
        return ", sign(0) = 1" if self.even and not self.centred else ""

    @property
    def slope(self) -> sp.Expr:
        """d prox / dv as an expression in the output u (|u| for an even profile): 1/(1 + t f''(u)), 0 at knots."""
        cases: list[tuple[sp.Expr, Any]] = []
        last = self.knots[-1]
        for part, after in zip(self.parts, self.knots[1:], strict=True):
            inside = 1 / (1 + sp.diff(part.G, self.u))
            below = True if after is None or (after is last and not after.flat) else self.u < after.at
            cases.append((inside, below))
            if after is not None and after.flat:
                cases.append((sp.S.Zero, True if after is last else sp.Eq(self.u, after.at)))
        first = self.knots[0]
        head = [(sp.S.Zero, sp.Eq(self.u, first.at))] if first is not None and first.flat else []
        return sp.Piecewise(*head, *cases)


def _tidy(e: sp.Expr) -> sp.Expr:
    """step * (theta / step) -> theta, under roots and inside arguments too."""
    if e.is_Atom:
        return e
    inner = e.func(*[_tidy(a) for a in e.args])
    if isinstance(inner, sp.Mul) and len(logs := [a for a in inner.args if isinstance(a, xlogy)]) == 1:
        c, x = logs[0].args
        return xlogy(sp.cancel(inner / logs[0] * c), x)
    return sp.cancel(inner) if isinstance(inner, (sp.Mul, sp.Add)) and not inner.is_number else inner


def eliminations(product: sp.Expr, symbol: sp.Expr) -> list[tuple[sp.Symbol, sp.Expr]]:
    """s = ... for each scalar that `symbol` = product can be solved for."""
    out: list[tuple[sp.Symbol, sp.Expr]] = []
    for s in sorted(product.free_symbols, key=str):
        power = sp.degree(product, s) if product.is_polynomial(s) else product.as_powers_dict().get(s, 0)
        rest = sp.cancel(product / s**power)
        if power != 0 and not rest.has(s):
            out.append((s, (symbol / rest) ** (sp.S.One / power)))
    return out
