"""A function of one number that is learned: it takes the place of a proximal step of entries, or of an elementwise formula.

It starts at the values that what it replaces has at the knots; between them it is straight, or a spline. Of what rises by 0 to 1,
as the proximal step of a convex function does (Moreau 1965), it is then off by a known share of the distance of two knots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import sympy as sp

from unroll.calculus.prox import derive
from unroll.derivation.step import Assign, Departure, Learned, Step
from unroll.errors import DeriveError, SpecError, Where
from unroll.language.constructors import (
    curve,
    elementwise,
    matmul,
    ones,
    places,
    prox_map,
    symbol,
    transpose,
)
from unroll.language.nodes import Expr, Grid, Map, Prox, ProxMap, Sym, show_shape, slot
from unroll.language.show import text
from unroll.language.traversal import transform
from unroll.spec.schema import Function, Learn, Rank

SHARE = {1: sp.Rational(1, 4), 3: sp.Rational(13, 48)}
"""By the degree: how far, in distances of two knots, a function may be from one whose slopes are between 0 and 1, and whose values at
the knots it is made of: half the mean distance of the knots that count, weighed as they count, at its largest, in the middle."""


ENTRY = symbol("u", 1, 1, "state", 0)
"""Any entry, in the formula that a function takes the place of."""


@dataclass(frozen=True)
class Asked:
    """One entry of `learn:` with a function. pattern: the formula that it takes the place of, of `ENTRY` or another; None: proximal steps."""

    name: str
    record: Learn
    pattern: Map | None
    where: Where
    block: str

    @property
    def function(self) -> Function:
        assert self.record.function is not None
        return self.record.function


@dataclass(frozen=True)
class Replaced:
    """What a function takes the place of: of(v, *others), of each entry. convex: known to rise by 0 to 1."""

    e: Expr
    x: Expr
    of: Callable[..., Expr]
    others: tuple[Expr, ...]
    odd: bool
    convex: bool


def put(step: Step, f: Asked) -> Step:
    """The step with the function in place, last of `learned`. Raises SpecError E305 where there is none, E306."""
    grid, found = grid_of(f), list[Replaced]()
    memo = dict[Expr, Expr]()

    def rule(e: Expr) -> Expr | None:
        if not (isinstance(e, Prox) if f.pattern is None else _is(e, f.pattern)):
            return None
        found.append(_replaced(cast(Prox | Map, e), f))
        return curve(_symbol(f, grid, found[-1].x), found[-1].x, grid)

    def swap(a: Assign) -> Assign:
        mine = (not f.block or a.block == f.block) and f.record.in_ in (None, a.update)
        if not mine or not isinstance(a.value, Expr):
            return a
        value = transform(a.value, rule, memo)
        return replace(a, value=value, note=f"{a.target.name} <- {text(value)}" if a.note else "")

    assigns = tuple(map(swap, step.assigns))
    if not found:
        what = "no proximal step" if f.pattern is None else f"no {f.record.replaces.strip()}"
        where = "the step" if f.record.in_ is None else f"the update of {f.record.in_}"
        body = "; ".join(f"{a.target.name} = {text(a.value)}" for a in step.assigns if isinstance(a.value, Expr))
        raise SpecError("E305", f"there is {what} in {where}", f.where, "", (f"the step: {body}",))
    starts = {_start(r, f, grid) for r in found}
    if len(starts) > 1:
        hint = f"in: {next(a.update for a in step.assigns if a.update)}, say, takes those of one update"
        raise SpecError("E306", f"{f.name} would take the place of {len(starts)} functions", f.where, hint)
    (start,) = starts
    _refuse_unfit(found[0], f)
    s = cast(Sym, _symbol(f, grid, found[0].x))
    learned = Learned(
        f.name, s, found[0].e, s.shape[: s.rank], f.record.share == "none", "none", f.record.replaces.strip(),
        where=f.record.in_ or "", own_start=start, grid=grid,
    )  # fmt: skip
    if f.function.monotone or f.function.nonexpansive:
        most = grid.width if f.function.nonexpansive else math.inf
        learned = replace(learned, constraint="rising", limits=(0.0, most))
    said = Departure("function", f.block, "bounded" if found[0].convex else "choice", _says(f, grid, found[0].convex))
    return replace(step, assigns=assigns, learned=(*step.learned, learned), departures=(*step.departures, said))


def _is(e: Expr, pattern: Map) -> bool:
    return isinstance(e, Map) and e.profile == pattern.profile and pattern.args in ((ENTRY,), e.args)


def grid_of(f: Asked) -> Grid:
    """The knots. Raises SpecError E306."""
    low, high = map(float, f.function.range)
    found = Grid(f.function.knots, low, high, f.function.degree, f.function.odd)
    if not (math.isfinite(high - low) and low < high):
        raise SpecError("E306", f"the range of {f.name} is empty: {low:g} to {high:g}", f.where, "range: [-1, 1]")
    if found.odd and (low != -high or found.knots % 2 == 0 or found.knots < 5):
        hint = "knots: 101, range: [-1, 1]"
        raise SpecError("E306", f"the knots of an odd function are an odd number, 5 at least, around 0: those of {f.name} are not", f.where, hint)  # fmt: skip
    return found


def _symbol(f: Asked, grid: Grid, x: Expr) -> Expr:
    """Its values: a column, or a row for each row of x. Raises SpecError E306."""
    count = sp.Integer(grid.stored)
    if isinstance(f.record.shape, Rank):
        raise SpecError(
            "E306", f"{f.name} is a function: it has no rank", f.where, f"shape: [{x.rows}] gives each row its own"
        )
    if f.record.shape is None:
        return symbol(f.name, count, 1, "learned", 1)
    if [str(n) for n in f.record.shape] != [str(x.rows)]:
        raise SpecError("E306", f"the shape of {f.name} is not that of the rows of {show_shape(x.shape)}", f.where, f"shape: [{x.rows}] gives each row its own")  # fmt: skip
    return symbol(f.name, x.rows, count, "learned", 2)


def _replaced(e: Prox | Map, f: Asked) -> Replaced:
    """Raises SpecError E306 for what is not a function of each entry."""
    if isinstance(e, Map):
        odd = sp.simplify(e.profile + e.profile.subs(slot(0), -slot(0))) == 0
        return Replaced(e, e.args[0], lambda v: elementwise(e.profile, v), (), odd, False)
    try:
        found = derive(e.term, e.variable, e.t, e.at, e.swaps)
    except DeriveError as failed:
        raise SpecError("E306", f"{f.name}: {failed.message}", f.where) from None
    odd = found.scalar is not None and found.scalar.even
    match found.step:
        case ProxMap(p, (x, *others), slots):
            of: Callable[..., Expr] = lambda v, *data: prox_map(p, slots, v, *data)
            return Replaced(e, x, of, tuple(others), odd, found.convex)
        case Map(profile, (ProxMap(p, (x, *others), slots),)):
            clipped: Callable[..., Expr] = lambda v, *data: elementwise(profile, prox_map(p, slots, v, *data))
            return Replaced(e, x, clipped, tuple(others), False, found.convex)
        case _:
            hint = "a sum of functions of entries has one: norm1(z)"
            raise SpecError("E306", f"the proximal step of {text(e.term)} is no function of each entry", f.where, hint)


def _start(r: Replaced, f: Asked, grid: Grid) -> Expr:
    """Its values at the knots. Raises SpecError E306 where they differ from entry to entry."""
    at = places(grid)
    if f.record.shape is not None:
        return r.of(matmul(ones(r.x.rows, 1), transpose(at)), *r.others)
    if any(not o.is_scalar for o in r.others):
        hint = f"shape: [{r.x.rows}] gives each row its own"
        raise SpecError("E306", f"{f.name} takes the place of another function in each entry", f.where, hint)
    return r.of(at, *r.others)


def _refuse_unfit(r: Replaced, f: Asked) -> None:
    """Raises SpecError E306 where what is replaced is known not to be what is asked for."""
    if f.function.odd and not r.odd:
        raise SpecError(
            "E306", f"{f.name} cannot be odd: what it replaces is not known to be", f.where, "leave out odd"
        )
    if f.function.nonexpansive and not r.convex and f.pattern is None:
        hint = "monotone: true holds for every proximal step"
        raise SpecError("E306", f"{f.name} cannot be nonexpansive: {text(cast(Prox, r.e).term)} is not known to be convex", f.where, hint)  # fmt: skip


def _says(f: Asked, grid: Grid, convex: bool) -> str:
    """What it is before training, and how far from what it replaces."""
    kind = "straight between" if grid.degree == 1 else "a cubic spline of"
    off = f"off by at most {float(SHARE[grid.degree] * grid.width):.3g} there" if convex else "no bound is known"
    return f"{f.name} is {kind} {grid.knots} knots on [{grid.low:g}, {grid.high:g}], and straight on: {off}, before training"
