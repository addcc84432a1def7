"""What is known while a text is read for one problem: its names so far, its assignments, and what can be done with its letters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.cones import nonnegative
from unroll.calculus.divergence import divergence, planned, probed, width
from unroll.calculus.gradient import gradient
from unroll.calculus.linear import Linear, hessian, square_of_norm
from unroll.calculus.torch_text import above_zero, nonzero
from unroll.derivation.dealing import GRADIENT, Dealt, Share, letters, placed
from unroll.derivation.step import LAYER, Assign, Departure, State
from unroll.errors import DeriveError
from unroll.language.constructors import add, as_constant, constant, elementwise, prox, symbol, zeros
from unroll.language.functions import Value
from unroll.language.nodes import Expr, Hold, Sym, depends, scalar, slot
from unroll.language.problem import Problem
from unroll.language.traversal import held_at, substitute, transform
from unroll.spec.texts import Text

LIPSCHITZ = scalar("L", positive=True)


class Known:
    """What the names of a text mean so far, the assignments that it made, and what can be done with its letters."""

    def __init__(self, text: Text, problem: Problem, dealt: Dealt) -> None:
        self.text, self.problem, self.dealt = text, problem, dealt
        self.letters = {x.name: x for x in letters(text)}
        self.places = placed(text, problem.variables)
        """The variables of the problem that the arguments of the text are."""
        self.running = {a: state_of(z) for a, z in self.places.items()}
        self.argument, self.z = next(iter(self.places.items()))
        self.at = self.running[self.argument]
        """Where the step is taken: what is held in a prox is worked out there."""
        self.names: dict[str, Value] = {**self.running, "layer": LAYER}
        self.derived: list[Assign] = []
        """Lipschitz constants and norms, in the order in which they were asked for."""
        self.notes: list[str] = []
        self.estimates: list[Departure] = []
        self.states: list[State] = []
        self.assigns: list[Assign] = []
        self.last: dict[str, Sym | sp.Symbol] = {}
        self.written: set[str] = set()
        self.target = ""
        """The update that is being read; "" where it is a number of the text."""

    # --- names ---

    def fresh(self, name: str) -> str:
        """The name of a state or an update in the emitted module: after the variable where it begins with it."""
        for a, z in self.places.items():
            if name.startswith(f"{a}_"):
                name = z.name + name[len(a) :]
                break
        while name in self.problem.scope.names:
            name += "_"
        return name

    def indexed(self, index: str) -> tuple[Share, ...]:
        """What an index, or the set that it runs over, counts."""
        return next((self.dealt[x.name] for x in self.letters.values() if index in (x.index, x.over)), ())

    # --- what can be done with a letter ---

    def lipschitz(self, name: str) -> sp.Expr:
        """The Lipschitz constant of the gradient of a letter. Raises DeriveError E304."""
        (share,) = self.dealt[name]
        if len(share.places) > 1:
            raise DeriveError("E304", f"{name} is of several variables, and L of one", hint="a number: step: 0.1")
        first = next((x.name for x in self.letters.values() if GRADIENT in x.uses), name)
        target = LIPSCHITZ if name == first else scalar(f"L_{name}", positive=True)
        if not any(a.target == target for a in self.derived):
            found = curvature.smoothness(self._smooth(share), share.variable)
            value = substitute(found.lipschitz, {share.variable: self.at})
            if as_constant(value) == 0:
                raise DeriveError(
                    "E304",
                    "the smooth part is linear: L is 0, so 1/L is no step size",
                    hint="give the step size yourself: step: 0.1",
                )
            self.derived.append(Assign(target, value, "Lipschitz constant of the gradient"))
            self.notes.append(f"{target.name}: {found.proof}, {found.reason}")
        (value,) = (a.value for a in self.derived if a.target == target)
        # L may be 0 for one sample: its smooth part is constant there, and every number is a bound
        moving = isinstance(value, Expr) and any(s.role != "parameter" for s in value.symbols)
        return cast(sp.Expr, nonzero(target)) if moving else target

    def convexity(self, name: str) -> sp.Expr:
        """A constant of strong convexity of a letter. Raises DeriveError E304."""
        (share,) = self.dealt[name]
        target = scalar(f"mu_{name}", positive=True)
        if not any(a.target == target for a in self.derived):
            found = curvature.bounds(self._smooth(share), share.variable)
            value = zeros(1, 1) if found is None else substitute(found.low, {share.variable: self.at})
            if as_constant(value) == 0 or not nonnegative(value):
                raise DeriveError(
                    "E304",
                    f"{name} is not known to be strongly convex",
                    hint="a ridge makes it so: gamma/2 * sumsq(z) beside its terms",
                )
            self.derived.append(Assign(target, value, "constant of strong convexity"))
        return target

    def _smooth(self, share: Share) -> Expr:
        """The sum of the terms of a letter that is taken through its gradient; of g(K z), as a function of K z."""
        if share.linear is not None:
            return cast(Expr, share.e)
        return add(zeros(1, 1), *(p.e for p in share.parts))

    def norm(self, operators: list[tuple[str, Linear]]) -> sp.Expr:
        name = "norm_" + "_".join(dict.fromkeys(n for n, _ in operators))
        target = scalar(name, positive=True)
        if all(k.is_identity for _, k in operators):
            return sp.sqrt(len(operators))
        if not any(a.target == target for a in self.derived):
            square = square_of_norm([k for _, k in operators])
            c = as_constant(square)
            value = sp.sqrt(c) if c is not None else elementwise(sp.sqrt(slot(0)), square)
            self.derived.append(Assign(target, value, "largest singular value, or a bound"))
        return target

    def grad(self, share: Share, z: Sym, at: Mapping[Sym, Expr]) -> Expr:
        """In z, at a point; of what the letter reads besides, at what that is now."""
        slope = gradient(self._smooth(share), z)
        if isinstance(at[z], Sym) and cast(Sym, at[z]).role == "state":
            self.at = cast(Sym, at[z])
        return substitute(slope, {**self.others(at), **at})

    def hessian(self, share: Share, z: Sym, at: Mapping[Sym, Expr]) -> Expr:
        return substitute(hessian(self._smooth(share), z), {**self.others(at), **at})

    def others(self, but: Iterable[Sym]) -> dict[Expr, Expr]:
        """What the variables are now."""
        return {z: self.running[a] for a, z in self.places.items() if z not in set(but)}

    def partial(self, share: Share, z: Sym, at: Mapping[Sym, Expr]) -> sp.Expr:
        """The Lipschitz constant of the gradient in one of several variables: a number per sample, by what the others are.

        It is worked out where it stands, and where it changes with nothing, or a number reads it, above all updates.
        """
        found = curvature.smoothness(self._smooth(share), z)
        note = f"L_{z.name}: {found.proof}, {found.reason}"
        self.notes += [] if note in self.notes else [note]
        if (c := as_constant(found.lipschitz)) is not None and c.is_positive:
            return c
        value = substitute(found.lipschitz, {**self.others(at), **at})
        above = not self.target or not value.symbols & {s.symbol for s in self.states}
        known = next((a.target for a in self.derived if above and a.value is value), None)
        if known is not None:
            return cast(sp.Expr, nonzero(known))
        name = self.fresh(f"L_{z.name}")
        while any(a.target.name == name for a in (*self.derived, *self.assigns)):
            name += "_"
        target = scalar(name, positive=True)
        made = Assign(target, value, f"Lipschitz constant of the gradient in {z.name}")
        (self.derived if above else self.assigns).append(made)
        return cast(sp.Expr, nonzero(target))

    def named(self, value: Expr, called: str = "strength") -> sp.Expr:
        """A number per sample that a formula works out, as an assignment of its own."""
        known = next((a.target for a in self.assigns if a.value is value and isinstance(a.target, sp.Symbol)), None)
        if known is not None and not any(isinstance(a.target, Sym) and a.target in value.symbols for a in self.assigns):
            return known
        name = self.fresh(value.name if isinstance(value, Sym) else called)
        taken = {a.target.name for a in self.assigns} | {s.symbol.name for s in self.states}
        while name in taken:
            name += "_"
        target = scalar(name, positive=True)
        self.assigns.append(Assign(target, value, ""))
        return target

    def weights(self, value: Expr) -> Sym:
        """A weight for each entry, as an assignment of its own: above 0, as steps are."""
        if isinstance(value, Sym) and "positive" in value.props:
            return value
        name, taken = self.fresh("weights"), {a.target.name for a in self.assigns}
        while name in taken:
            name += "_"
        target = symbol(name, *value.shape, "state", 2 if 1 not in value.shape else 1, None, {"positive"})
        self.assigns.append(Assign(target, value, ""))
        return target

    def divergence(self, z: Sym, value: Expr, r: Sym, probes: int, seed: int) -> Expr:
        """Of the value that was assigned to z, in the name of what it was read at; in closed form, or by so many probes."""
        formula = planned(value)
        for a in reversed(self.assigns):  # what was read through an update between them
            if a.target is r:
                break
            if isinstance(a.target, Sym) and isinstance(a.value, Expr) and depends(a.value, r):
                formula = substitute(formula, {a.target: a.value})
        loose = next((a for a in self.assigns if _follows(a, r) and a.target in formula.scalars), None)
        if loose is not None:
            raise DeriveError(
                "E301",
                f"{loose.target.name} changes with {r.name}, in which the divergence is taken",
                hint=f"{loose.target.name}: hold(..)",
            )
        if not probes:
            return substitute(divergence(formula, r), {formula: z})
        says = f"of {z.name} in {r.name}, by {probes} of random signs, seed {seed}: an estimate"
        self.estimates.append(Departure("probes", "", "heuristic", says))
        return probed(formula, r, self.named(width(z, r), "width"), probes, seed)

    def above_zero(self, t: sp.Expr) -> sp.Expr:
        """t, and its limit where a number of some sample makes it 0: to divide by."""
        put = dict[sp.Symbol, sp.Symbol]()
        for s in (a.target for a in self.assigns if isinstance(a.value, Expr)):
            if isinstance(s, sp.Symbol) and s in t.free_symbols and s not in put:
                put[s] = scalar(self.fresh(f"{s.name}_above_0"), positive=True)
        self.assigns += [Assign(new, constant(above_zero(s)), f"{s.name}, to divide by") for s, new in put.items()]
        return cast(sp.Expr, t.xreplace(put))

    def prox(self, share: Share, t: sp.Expr, v: Expr) -> Expr:
        if share.e is None:
            return v
        held = held_at(share.e, {self.z: self.at} if len(self.places) == 1 else {**self.others(())})
        return prox(held, share.variable, t, v)


# --- pieces ---


def _follows(a: Assign, r: Sym) -> bool:
    """Is it a number that changes with r?"""
    return not isinstance(a.target, Sym) and isinstance(a.value, Expr) and depends(transform(a.value, _held), r)


def _held(e: Expr) -> Expr | None:
    return zeros(*e.shape) if isinstance(e, Hold) else None


def state_of(z: Sym, name: str | None = None) -> Sym:
    """The running value of a variable."""
    return symbol(name or z.name, z.nrows, z.ncols, "state", z.rank, z.family, z.props)


def member(name: str, i: int, among: tuple[Any, ...]) -> str:
    """The name of a member: without a number where there is one."""
    return name if len(among) == 1 else f"{name}_{i + 1}"
