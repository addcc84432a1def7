"""One iteration of an algorithm, and what of it is learned: the record that passes from the mathematics to the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy as sp

from unroll.language.constructors import scale
from unroll.language.nodes import Expr, Grid, Sym
from unroll.language.problem import Problem

Constraint = Literal["none", "positive", "symmetric", "unit_columns", "exp", "sigmoid", "clamp", "rising"]
LAYER = sp.Symbol("layer", integer=True, nonnegative=True)
"""Index of the layer, from 0, in schedules."""


@dataclass(frozen=True)
class State:
    """A quantity carried from layer to layer. A SymPy symbol is a plain number without batch axes (a momentum counter).

    scale: numbers that it is a multiple of. Where they change, the other factor stays (`settled`).
    """

    symbol: Sym | sp.Symbol
    start: Expr | sp.Expr
    scale: sp.Expr = sp.S.One


@dataclass(frozen=True)
class Assign:
    """target <- value. In a step, assignments run in order; later ones see the new value of a target.

    block: the part of the layer that it belongs to; "" where a layer has one part.  update: that of the algorithm's text.
    """

    target: Sym | sp.Symbol
    value: Expr | sp.Expr
    note: str
    block: str = ""
    update: str = ""


def rescaled(
    assigns: Sequence[Assign], states: Iterable[State], opens: bool = True, closes: bool = True
) -> list[Assign]:
    """An iteration whose numbers are others than those of the one before: each of these states is taken up times its scale before it is
    read (opens), and left without it at the end (closes)."""
    out = list(assigns)
    for s in states:
        u = s.symbol
        assert isinstance(u, Sym)
        own = [i for i, a in enumerate(out) if a.target is u or (isinstance(a.value, Expr) and u in a.value.symbols)]
        first, last = out[own[0]], out[own[-1]]
        if closes:
            out.insert(own[-1] + 1, Assign(u, scale(1 / s.scale, u), "", last.block))
        if opens:
            out.insert(own[0], Assign(u, scale(s.scale, u), f"kept without {s.scale}, which changes", first.block))
    return out


@dataclass(frozen=True)
class Departure:
    """What a spec asked for that is not the algorithm on the objective: named, with what it assumes and how far it may be off."""

    name: str
    block: str
    kind: Literal["exact", "bounded", "heuristic", "choice"]
    says: str
    applied: Any = None


@dataclass(frozen=True)
class Hand:
    """What a letter of an algorithm stands for: e, the sum of some terms as a function of `variable`; K z where there is an operator.

    use: what the algorithm does with it.
    """

    letter: str
    use: Literal["gradient", "prox", "argmin", "sweep", "majorant", "entropy"]
    terms: tuple[str, ...]
    e: Expr
    variable: Sym
    operator: Expr | None = None
    block: str = ""


DRAWN = ("gaussian", "uniform")


@dataclass(frozen=True)
class Learned:
    """A free parameter in the place of a derived sub-expression; it starts at the value of `replaces`.

    symbol: a matrix symbol (or a family), or a SymPy scalar.  shape: () for a scalar, one axis to repeat it per entry, or that of the
    matrix.  init, scale, fan_in: "value", or how its start is drawn, of variance scale^2 / fan_in.  constructed: its value depends on the state, and is computed from data.
    where: "output", "gradient" or "prox" if it was asked for at such places only, or the update.  own_start: what it starts at instead.  limits: of sigmoid and clamp; of rising, how much a value may be above the one before it.
    cell: of a weight of a controller, what is said of all of these.  grid: of the values of a function, their places.
    across: of a number that is repeated, whether over the groups that are columns of a matrix, not over its rows.
    held: it stays as it starts, or as it is loaded, and a change of low rank is learned beside it.
    """

    name: str
    symbol: Sym | sp.Symbol
    replaces: Expr | sp.Expr
    shape: tuple[sp.Expr, ...]
    per_layer: bool
    constraint: Constraint = "none"
    text: str = ""
    init: str = "value"
    scale: float = 1.0
    constructed: bool = False
    where: str = ""
    own_start: Expr | sp.Expr | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    cell: str = ""
    grid: Grid | None = None
    held: bool = False
    across: bool = False
    fan_in: sp.Expr | None = None

    @property
    def starts_at(self) -> Expr | sp.Expr:
        return self.replaces if self.own_start is None else self.own_start

    @property
    def kind(self) -> Literal["scalar", "vector", "matrix"]:
        """scalar: a number of the algorithm, per entry too, or a parameter of no axis."""
        if not isinstance(self.symbol, Sym) or not self.shape:
            return "scalar"
        if self.grid is not None:
            return "vector"
        return "matrix" if len(self.shape) == 2 else "vector"

    @property
    def column_axis(self) -> int:
        """The axis of what is stored that runs down a column."""
        return -2 if self.kind == "matrix" else -1

    @property
    def family(self) -> sp.Expr | None:
        """How many of them there are, where it takes the place of a family."""
        return self.symbol.family if isinstance(self.symbol, Sym) else None


@dataclass(frozen=True)
class Condition:
    """left relation right, in numbers of the text and constants; room: how far it holds, strict: whether by more than 0.

    holds: None where that depends on values which are not known.
    """

    text: str
    left: sp.Expr
    right: sp.Expr
    room: sp.Expr
    strict: bool

    @property
    def holds(self) -> bool | None:
        met, missed = self.room.is_positive, self.room.is_nonpositive
        if not self.strict:
            met, missed = self.room.is_nonnegative, self.room.is_negative
        return True if met else False if missed else None


@dataclass(frozen=True)
class Claim:
    """What an algorithm says of a problem under conditions on its numbers. definitions: of what stands in them, in order."""

    name: str
    conditions: tuple[Condition, ...]
    definitions: tuple[Assign, ...] = ()

    @property
    def holds(self) -> bool | None:
        found = {c.holds for c in self.conditions}
        return False if False in found else None if None in found else True

    def says(self) -> Iterator[str]:
        """Nothing of an optimum that is claimed of all that is convex."""
        said = CLAIMS[self.name]
        for c in (c for c in self.conditions if c.holds is False):
            yield f"not claimed, {said}: {c.text} does not hold, {c.left} against {c.right}"
        if self.holds is None:
            yield f"claimed if {' and '.join(c.text for c in self.conditions if c.holds is None)}: {said}"
        if self.holds and self.name == "monotone":
            yield f"monotone: {said}"


CLAIMS = {"monotone": "no step raises the objective", "optimum": "the limit is an optimum"}


def is_claim(note: str) -> bool:
    return note.startswith("monotone")


@dataclass(frozen=True)
class Residuals:
    """What is 0 at a solution. before: states as they were, kept before a layer.  after: each residual, worked out at its end."""

    before: tuple[Assign, ...] = ()
    after: tuple[Assign, ...] = ()


@dataclass(frozen=True)
class Step:
    """One iteration.

    definitions: scalars with a derived value, such as step = 1 / |A|^2, in order; they depend on no state.
    states: start values.  assigns: the body of a layer.  output: the states that are the answer, one per variable.
    blocks: names of the parts of a layer, in order; none where it has one part.  estimated: inputs that a formula
    has taken the place of.  departures: what is not the exact algorithm.  subproblems: what each block minimises, in one variable.
    hands: how the terms were dealt out to the letters of the algorithm.  residuals: what tells a solution, for who runs it to the end.
    claimed: what the algorithm says of the problem, worked out when it is asked for.  chosen: where a spec leaves its algorithm open -> the one that was taken.
    """

    algorithm: str
    definitions: tuple[Assign, ...]
    states: tuple[State, ...]
    assigns: tuple[Assign, ...]
    output: tuple[Sym, ...]
    learned: tuple[Learned, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    estimated: tuple[str, ...] = ()
    departures: tuple[Departure, ...] = ()
    subproblems: tuple[tuple[str, Problem], ...] = ()
    hands: tuple[Hand, ...] = ()
    residuals: Residuals = Residuals()
    claimed: Callable[[], tuple[Claim, ...]] = field(default=tuple, compare=False, repr=False)
    chosen: Mapping[tuple[str | int, ...], str] = field(default_factory=dict[tuple[str | int, ...], str])

    @property
    def claims(self) -> tuple[Claim, ...]:
        return self.claimed()

    def broken(self, claim: str) -> bool:
        """Is a claim not made with the numbers that were given?"""
        return any(c.name == claim and c.holds is False for c in self.claims)


def settled(step: Step) -> Step:
    """The step with every state that is a multiple of numbers which change from layer to layer kept without them."""
    changing = {a.target for a in step.assigns} | {p.symbol for p in step.learned if p.per_layer} | {LAYER}
    moving = [s for s in step.states if s.scale.free_symbols & changing]
    return replace(step, assigns=tuple(rescaled(step.assigns, moving))) if moving else step
