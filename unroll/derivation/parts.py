"""Parts: the summands of an objective, and what is known of each of them, derived when it is first read.

Every part is smooth (its gradient has a derived Lipschitz constant, or a step size was given), proximable (its prox was derived), or
a function g(K z + b) of something linear in the variable, and g is proximable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.cones import nonnegative
from unroll.calculus.curvature import Bounds
from unroll.calculus.gradient import gradient, kinked
from unroll.calculus.linear import Linear, inside
from unroll.calculus.prox import Proximal, proximable
from unroll.errors import DeriveError
from unroll.language.constructors import add, as_constant, constant, elementwise, eye, scale, split, symbol
from unroll.language.nodes import Add, Expr, Hold, Indicator, Map, Sym, depends, scalar, slot, walk
from unroll.language.problem import Problem
from unroll.language.show import pretty
from unroll.language.traversal import substitute


@dataclass(frozen=True)
class Part:
    """One summand of the objective and what is known of it, derived when it is first read.

    weight_name: what a number in front of it is called.  given: is it taken through its gradient, whatever else is known?
    also: the same summand in the other variables that it reads, of those `among` which the problem minimises.
    """

    term: str
    e: Expr
    variable: Sym
    weight_name: str = "weight"
    given: bool = False
    also: tuple[Part, ...] = ()
    among: tuple[Sym, ...] = ()

    @cached_property
    def differentiable(self) -> bool:
        """Has it a gradient? Curvature is asked only where the formula leaves that open: |u| - log(1 + |u|)."""
        return _differentiable(self.e, self.variable) or self._finite is not None

    @cached_property
    def smooth(self) -> Bounds | None:
        """Hessian bounds, infinite where it is differentiable and no more."""
        rough = Bounds(constant(-sp.oo), constant(sp.oo), "proved", "differentiable")
        return self._finite or (rough if self.differentiable else None)

    @cached_property
    def _finite(self) -> Bounds | None:
        found = None if self.is_set else curvature.bounds(self.e, self.variable)
        return found if found is not None and found.smooth else None

    @property
    def proximal(self) -> Proximal | None:
        """Its prox, where it is not smooth."""
        return self._prox[0]

    @property
    def reason(self) -> str:
        """Why it has no prox."""
        return self._prox[1]

    @property
    def weight(self) -> tuple[sp.Symbol, Expr] | None:
        """A number made of data, or held, that stands before a term which has a prox, and its name in that prox."""
        return self._prox[2]

    @cached_property
    def _prox(self) -> tuple[Proximal | None, str, tuple[sp.Symbol, Expr] | None]:
        if self.given or self._finite is not None:
            return None, "", None
        try:
            return proximable(self.e, self.variable), "", None
        except DeriveError as refused:
            w, own = _unweighed(self.e, self.variable)
            if as_constant(w) is None:
                name = scalar(self.weight_name, positive=nonnegative(w))
                try:
                    return proximable(scale(name, own), self.variable), "", (name, w)
                except DeriveError:
                    pass
            return None, refused.message, None

    @cached_property
    def own_prox(self) -> Proximal | None:
        """Its prox, whether or not it is smooth."""
        if self.proximal is not None:
            return self.proximal
        return self._own[0]

    @property
    def own_reason(self) -> str:
        """Why it has no prox, whether or not it is smooth."""
        return self.reason or self._own[1]

    @cached_property
    def _own(self) -> tuple[Proximal | None, str]:
        try:
            return proximable(self.e, self.variable), ""
        except DeriveError as refused:
            return None, refused.message

    @cached_property
    def inner(self) -> tuple[Expr, Sym, Linear] | None:
        """(g, w, K) with e = g(w) at w = K z, where all of z that e reads is K z + b."""
        return inside(self.e, self.variable)

    @property
    def holds(self) -> bool:
        """Is something that changes with the variable held constant in it?"""
        return any(isinstance(x, Hold) and self.variable in x.symbols for x in walk(self.e))

    @property
    def weighed(self) -> Expr:
        """The term as its prox takes it: with the name of its weight."""
        if self.weight is None:
            return self.e
        return scale(self.weight[0], _unweighed(self.e, self.variable)[1])

    @property
    def descended(self) -> bool:
        """Is it taken through its gradient, where both ways are open?"""
        return self.given or (self.differentiable and self.proximal is None)

    @property
    def is_set(self) -> bool:
        return isinstance(split(self.e)[1], Indicator)

    def show(self) -> str:
        found = (
            []
            if self.smooth is None
            else ["smooth" if self.smooth.smooth else "differentiable (no Lipschitz constant is known)"]
        )
        found += [] if self.proximal is None else ["constraint with a projection" if self.is_set else "proximable"]
        return f"{self.term}: {pretty(self.e)} is {' and '.join(found) or f'neither smooth nor proximable ({self.reason})'}"


def unsigned(parts: tuple[Part, ...]) -> str:
    """A hint where terms have no prox because the sign of a scalar, or of data, is open."""
    refused = [p for p in parts if p.smooth is None and p.proximal is None]
    open_signs = sorted({s.name for p in refused for s in p.e.scalars if s.is_positive is None and not s.is_integer})
    if open_signs:
        return f"declare its sign: {open_signs[0]}: {{default: .., positive: true}}, under scalars"
    names = [s.name for p in refused for s in sorted(p.e.symbols, key=lambda s: s.name) if _fits_if_positive(p, s)]
    return (
        f"{names[0]} may be negative: declare {names[0]}: {{shape: [..], positive: true}}, or write abs({names[0]}) or exp({names[0]})"
        if names
        else ""
    )


def _fits_if_positive(p: Part, data: Sym) -> bool:
    if data is p.variable or "positive" in data.props:
        return False
    s = symbol(data.name, data.nrows, data.ncols, data.role, data.rank, data.family, {*data.props, "positive"})
    known = Part(p.term, substitute(p.e, {data: s}), p.variable, f"weight_{p.term}")
    return known.smooth is not None or known.proximal is not None


def classify(problem: Problem) -> tuple[Part, ...]:
    """Every summand of every term; what is known of it is derived when it is read."""
    parts: list[Part] = []
    for name, cost in problem.costs.items():
        for i, (e, reads) in enumerate(_summands(cost, problem.variables)):
            of = [Part(name, e, z, f"weight_{name}{i or ''}") for z in reads]
            parts.append(replace(of[0], also=tuple(of[1:]), among=problem.variables))
    if not parts:
        raise DeriveError("E303", f"the objective does not depend on {problem.variables[0].name}")
    return tuple(parts)


def _summands(cost: Expr, variables: tuple[Sym, ...]) -> list[tuple[Expr, tuple[Sym, ...]]]:
    """The terms of a sum, and the variables that they read; entrywise ones of the same argument stay together: |u| - log(1 + |u|) is smooth."""
    groups: dict[object, list[Expr]] = {}
    for e in cost.terms if isinstance(cost, Add) else (cost,):
        for z in (z for z in variables[:1] if depends(e, z)):
            inner = curvature.entrywise(e, z)
            groups.setdefault(e if inner is None else tuple(a for a in inner[1].args if depends(a, z)), []).append(e)
            break
        else:
            groups.setdefault(e, []).append(e)
    found = [(add(*g), tuple(z for z in variables if any(depends(e, z) for e in g))) for g in groups.values()]
    return [(e, reads) for e, reads in found if reads]


def _unweighed(e: Expr, z: Sym) -> tuple[Expr, Expr]:
    """(w, x) with e = w x, w a number made of data, or held; (1, e) where there is none."""
    c, body = split(e)
    moving = [i for i, a in enumerate(body.args) if depends(a, z)] if isinstance(body, Map) else []
    if not isinstance(body, Map) or not e.is_scalar or len(moving) != 1 or len(body.args) == 1:
        return eye(1), e
    w, own = body.profile.as_independent(slot(moving[0]), as_Add=False)
    return elementwise(w, *body.args), scale(c, elementwise(own, *body.args))


def _differentiable(e: Expr, z: Sym) -> bool:
    """Has e a gradient everywhere (in its domain), though no Lipschitz constant is known for it?"""
    for x in walk(e, within=lambda x: not isinstance(x, Hold)):  # what is held is a constant, whatever is in it
        if isinstance(x, Map) and depends(x, z):
            signed = {slot(i): sp.Symbol(f"_{i}", nonnegative=True) for i, a in enumerate(x.args) if nonnegative(a)}
            moving = [slot(i) for i, a in enumerate(x.args) if depends(a, z)]
            if kinked(x.profile.xreplace(signed), frozenset(signed.get(s, s) for s in moving)):
                return False
    try:
        gradient(e, z)
    except DeriveError:
        return False
    return True
