"""Iterations run until every problem of a batch is solved, each with its own stop.

    accelerated     y = z + beta (z - z_before);  z <- T(y)      T: a layer that is a map of the variable alone
    Machine         one layer of any text as a map of all that it keeps: z, w, u, ... -> z, w, u, ...

Sources: Beck & Teboulle 2009, doi:10.1137/080716542; O'Donoghue & Candes 2015, doi:10.1007/s10208-013-9150-3 (restart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import sympy as sp
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from unroll.api import build, network_of
from unroll.derivation.derive import Derivation
from unroll.derivation.step import LAYER, Assign, State, Step
from unroll.language.constructors import constant, symbol, zeros
from unroll.language.nodes import Sym
from unroll.language.problem import Problem
from unroll.network.network import Network

CHECK = 10
"""Iterations between two looks at who has converged."""

States = dict[str, Tensor]
"""What an iteration keeps, by name; the first axis counts problems."""
Map = Callable[[Tensor, Tensor], Tensor]
Error = Callable[[Tensor, Tensor, Tensor], Tensor]
Advance = Callable[[States, Tensor, int], States]
"""(states of some problems, which problems these are, how many iterations) -> their states after them."""
Judge = Callable[[States, States, Tensor], tuple[Tensor, Tensor]]
"""(states before the last iteration, after it, which problems these are) -> (answers, errors)."""


@dataclass(frozen=True)
class Found:
    """Answers and their errors, the states that they came from, and how many iterations were done."""

    answer: Tensor
    errors: Tensor
    states: States
    iterations: int


def run(
    advance: Advance,
    states: States,
    judge: Judge,
    tol: float,
    iterations: int,
    console: Console | None = None,
    label: str = "",
) -> Found:
    """Iterate until each problem has an error of at most tol, or is no number any more; what is done is not touched again."""
    some = next(iter(states.values()))
    count, k = len(some), 0
    active = torch.arange(count, device=some.device)
    left, final = states, {n: s.clone() for n, s in states.items()}
    answer, errors = torch.empty(0), some.new_full((count,), torch.inf)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task(label, total=count, note="")
        while k < iterations:
            ahead = min(CHECK, iterations - k)
            before = advance(left, active, ahead - 1) if ahead > 1 else left
            left = advance(before, active, 1)
            point, found = judge(before, left, active)
            answer = torch.empty_like(point) if k == 0 else answer
            k += ahead
            answer[active], errors[active] = point, found.to(errors)
            left = {n: left[n] for n in final}
            for name, s in final.items():
                s[active] = left[name]
            going = ~(found <= tol) & flattened(point).isfinite().all(1)
            active, left = active[going], {n: s[going] for n, s in left.items()}
            bar.update(task, completed=count - len(active), note=f"iteration {k:,}, {len(active):,} left")
            if not len(active):
                break
    return Found(answer, errors, final, k)


# --- a map of the variable alone --------------------------------------------------------------------------------------


def accelerated(step: Map, restart: bool = True) -> Advance:
    """z = step(z, rows) with momentum; restart: it is forgotten where it points uphill."""

    def advance(s: States, rows: Tensor, count: int) -> States:
        y, before, t = s["ahead"], s["answer"], s["momentum"]
        for _ in range(count):
            new = step(y, rows)
            moved, change = y - new, new - before
            if restart:
                t = torch.where(dot(moved, change) > 0, torch.ones_like(t), t)
            t_new = (1 + (1 + 4 * t * t).sqrt()) / 2
            y, before, t = new + (t - 1) / t_new * change, new, t_new
        return {"answer": before, "ahead": y, "momentum": t}

    return advance


def at_rest(z: Tensor) -> States:
    """Where `accelerated` begins."""
    return {"answer": z, "ahead": z, "momentum": z.new_ones(len(z), *[1] * (z.ndim - 1))}


def by_its_map(error: Error) -> Judge:
    """The last answer of `accelerated`, by its distance to the point that it came from."""
    return lambda before, after, rows: (
        after["answer"],
        error(after["answer"], before["ahead"] - after["answer"], rows),
    )


def iterate(
    step: Map, z: Tensor, error: Error, tol: float, iterations: int, restart: bool = True
) -> tuple[Tensor, Tensor, int]:
    """(fixed points, errors, iterations done) of z = step(z, rows), row by row of z, accelerated with restarts.

    step(z, rows) maps the rows of z that belong to the problems `rows`.  error(z, moved, rows): that of z, reached from the
    extrapolated point z + moved.
    """
    found = run(accelerated(step, restart), at_rest(z), by_its_map(error), tol, iterations)
    return found.answer, found.errors, found.iterations


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product row by row, kept as a column that scales rows: (B, ...), (B, ...) -> (B, 1, ...)."""
    return flattened(a * b).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def length(x: Tensor) -> Tensor:
    """Of every row."""
    return flattened(x).norm(dim=1)


def flattened(x: Tensor) -> Tensor:
    """The entries of every row; of a number, that."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


# --- any text ---------------------------------------------------------------------------------------------------------


def opened(problem: Problem, step: Step, residuals: bool) -> tuple[Problem, Step]:
    """The iteration as a map of all its states: each can be given, and each is an answer. residuals: so are these.

    Numbers that it keeps, and the count of iterations, become numbers per sample: problems may be at different ones.
    """
    states, before, after = list[State](), list[Assign](), list[Assign]()
    for s in (*step.states, State(LAYER, sp.Integer(0))):
        if isinstance(s.symbol, Sym):
            states.append(s)
            continue
        own = symbol(s.symbol.name, 1, 1, "state", 0)
        states.append(State(own, constant(s.start)))
        before.append(Assign(s.symbol, own, ""))
        after.append(Assign(own, constant(LAYER + 1 if s.symbol is LAYER else s.symbol), ""))
    if residuals:
        before += step.residuals.before
        after += step.residuals.after
        states += [State(a.target, zeros(*a.target.shape)) for a in step.residuals.after if isinstance(a.target, Sym)]
    out = tuple(s.symbol for s in states if isinstance(s.symbol, Sym))
    whole = replace(step, states=tuple(states), assigns=(*before, *step.assigns, *after), output=out)
    return replace(problem, variables=(*problem.variables, *(s for s in out if s.name not in problem.symbols))), whole


@dataclass(frozen=True)
class Machine:
    """A text's iteration on `count` problems, whose data are (count, ...) each. measured: the same with its residuals, where it has some."""

    net: Network
    measured: Network | None
    data: Mapping[str, Tensor]
    count: int

    @property
    def named(self) -> tuple[str, ...]:
        """Its residuals."""
        return () if self.measured is None else self.measured.variables[len(self.net.variables) :]

    @cached_property
    def like(self) -> Tensor:
        return next(iter(self.start().values()))

    def start(self, begun: Mapping[str, Tensor] | None = None) -> States:
        """All states where they begin; begun: where variables do."""
        found = self._call(self.net, self.data, dict(begun or {}), 0)
        axes = {s.name: len(self.net.program.axes(s)) for s in self.net.program.step.output}
        return {n: x.expand(self.count, *x.shape[x.ndim - axes[n] :]) for n, x in found.items()}

    def __call__(self, states: States, rows: Tensor, count: int) -> States:
        data = self.data if len(rows) == self.count else {n: x[rows] for n, x in self.data.items()}
        net = self.measured if count == 1 and self.measured is not None else self.net
        return self._call(net, data, {n: states[n] for n in self.net.variables}, count)

    def _call(self, net: Network, data: Mapping[str, Tensor], states: States, layers: int) -> States:
        found = net(**data, **states, layers=layers)
        return dict(zip(net.variables, found, strict=True))

    def residuals(self, before: States, after: States, rows: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """name -> (what is 0 at a solution, and the state that it is the change of, where it is one)."""
        del rows
        if self.measured is not None:
            return {n: (after[n], None) for n in self.named}
        moving = [s.symbol.name for s in self.net.derivation.exact.states if isinstance(s.symbol, Sym)]
        return {n: (after[n] - before[n], after[n]) for n in moving}


def iterations(
    d: Derivation, given: Mapping[str, Tensor], scalars: Mapping[str, float] | None, like: Tensor
) -> tuple[Network, Network | None]:
    """The iteration of a derivation as a map of all its states, and the same with residuals, where its text has some. Raises UnrollError E4xx."""

    def made(residuals: bool) -> Network:
        problem, step = opened(d.problem, d.exact, residuals)
        program = build(replace(d, problem=problem, exact=step, step=step))
        return network_of(d, program, given, scalars, dtype=like.dtype, device=like.device)

    return made(False), made(True) if d.exact.residuals.after else None
