"""One iteration of an algorithm, and what of it is learned: the record that passes from the mathematics to the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy as sp

from unroll.expr import Expr, Sym

Constraint = Literal["none", "positive", "symmetric", "unit_columns"]
LAYER = sp.Symbol("layer", integer=True, nonnegative=True)
"""Index of the layer, from 0, in schedules."""


@dataclass(frozen=True)
class State:
    """A quantity carried from layer to layer. A SymPy symbol is a plain number without batch axes (a momentum counter)."""

    symbol: Sym | sp.Symbol
    start: Expr | sp.Expr


@dataclass(frozen=True)
class Assign:
    """target <- value. In a step, assignments run in order; later ones see the new value of a target."""

    target: Sym | sp.Symbol
    value: Expr | sp.Expr
    note: str


@dataclass(frozen=True)
class Learned:
    """A free parameter in the place of a derived sub-expression; it starts at the value of `replaces`.

    symbol: a matrix symbol, or a SymPy scalar.  shape: () for a scalar, one axis to repeat it per entry, or that of the matrix.
    """

    name: str
    symbol: Sym | sp.Symbol
    replaces: Expr | sp.Expr
    shape: tuple[sp.Expr, ...]
    per_layer: bool
    constraint: Constraint = "none"
    text: str = ""

    @property
    def kind(self) -> Literal["scalar", "matrix"]:
        return "matrix" if len(self.shape) == 2 else "scalar"


@dataclass(frozen=True)
class Step:
    """One iteration.

    definitions: scalars with a derived value, such as step = 1 / |A|^2, in order; they depend on no state.
    states: start values.  assigns: the body of a layer.  output: the states that are the answer, one per variable.
    """

    algorithm: str
    definitions: tuple[Assign, ...]
    states: tuple[State, ...]
    assigns: tuple[Assign, ...]
    output: tuple[Sym, ...]
    learned: tuple[Learned, ...] = ()
    notes: tuple[str, ...] = ()
