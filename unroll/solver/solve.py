"""Solve problems to convergence, many at once: an algorithm is chosen, or named, and run with all that it keeps.

    a map of the variable alone    accelerated and restarted, problem by problem (iteration.py)
    any other text                 as it is written, problem by problem

How far an answer is from the optimum is said by a duality gap where one is derived, else by a residual: see `Solution`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from unroll.api import Source, build, network_of, read
from unroll.calculus.gradient import gradient
from unroll.derivation.algorithms import LIPSCHITZ, NONE_FITS, Algorithm, Options, by_simplicity
from unroll.derivation.algorithms import find as find_named
from unroll.derivation.choosing import Tried, choose, tried
from unroll.derivation.dealing import GRADIENT, PROX, arguments_of, convex, letters
from unroll.derivation.derive import Derivation
from unroll.derivation.derive import derive as derive_spec
from unroll.derivation.parts import Part, classify, unsigned
from unroll.errors import SpecError, UnrollError
from unroll.language.constructors import add, elementwise, total
from unroll.language.constructors import split as unscaled
from unroll.language.nodes import Expr, Indicator, depends, slot
from unroll.language.problem import Problem, from_spec
from unroll.language.show import pretty
from unroll.network import values as given_values
from unroll.network.kinds import check_kind
from unroll.network.network import Network, check_shape, finite
from unroll.network.values import refuse_undeclared
from unroll.solver.certificate import duality_gap, values_of
from unroll.solver.iteration import (
    CHECK,
    Advance,
    Error,
    Judge,
    Machine,
    Map,
    States,
    accelerated,
    at_rest,
    by_its_map,
    flattened,
    iterations,
    length,
    run,
)
from unroll.spec import Spec, load, texts
from unroll.spec.nodes import plain
from unroll.spec.texts import AUTO

DEFAULTS = {torch.float64: 1e-8, torch.float32: 1e-5}
"""Tolerances where none is asked for, of the types that can certify a solution."""
OF_SPEC = ("step", "momentum", "split", "numbers", "updates", "start")
"""What a spec says of its algorithm, and `solve` too."""


@dataclass(frozen=True)
class Solution:
    """values: {variable: (..., n)}, of each variable.  objective (its terms that are no constraints), error: (...), one per problem.

    error has no unit; `measure` says what it is:
      - certified: the duality gap, divided by the objective at 0 (|x|^2/2 of least squares) or at the start, the larger;
      - else, where a proximal gradient step is known: z - prox(z - step grad), divided by the length of the first such step; of
        several variables that of each by itself, the others as they are, in parts of the largest that it has been; the largest of them;
      - else the residuals that the algorithm names, or the change of each of its states in one iteration, each divided by the
        largest that it has been in the first 10 iterations from the algorithm's own start, or later; the largest of them.
    convex: is the objective known to be? Where it is not, a point that no step moves need not be the optimum.
    algorithm: what was run.  claims: does its text claim optima? states: all that it kept, to go on from.
    """

    values: dict[str, Tensor]
    objective: Tensor
    error: Tensor
    certified: bool
    iterations: int
    converged: Tensor
    convex: bool
    algorithm: str = ""
    measure: str = "certified duality gap"
    claims: bool = True
    states: States = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def z(self) -> Tensor:
        """The solution of a problem in one variable."""
        (value,) = self.values.values()
        return value

    @property
    def residual(self) -> Tensor:
        return self.error

    def __str__(self) -> str:
        done, count = int(self.converged.sum()), self.converged.numel()
        worst = float(self.error.max()) if count else 0.0
        mean = float(self.objective.mean()) if count else 0.0
        why = (
            "not known to be convex" if not self.convex else "" if self.claims else f"{self.algorithm} claims no optima"
        )
        solved = f"points found that no step moves ({why})," if why and not self.certified else "problems solved"
        return f"{done} of {count} {solved} in {self.iterations} iterations: {self.measure} <= {worst:.1e}, mean objective {mean:.10g}"


@torch.no_grad()
def solve(
    source: Source,
    *inputs: Tensor,
    algorithm: str | None = None,
    start: Tensor | Mapping[str, Tensor] | Solution | None = None,
    dims: Mapping[str, int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float] | None = None,
    overrides: Sequence[str] = (),
    tol: float | None = None,
    max_iterations: int = 100_000,
    restart: bool = True,
    console: Console | None = None,
    label: str = "solve",
) -> Solution:
    """The optimum for every sample of `inputs`, each (..., n): certified gap (else residual) at most `tol`, see `Solution`.

    Of several variables a text of as many is run; where the objective is not known to be convex in all of them together, what is
    found is a point that no step moves.

    algorithm: None or "auto" takes a proximal gradient method, accelerated, where one fits, else the first text that fits, its
    constants being known, and claims optima of what is convex; else a text by its name, a path, or a name of the spec's own,
    run as it is written.  Of the algorithm that the spec itself names, `split`, `numbers`, `updates`, `step`, `momentum` and
    `start` hold too; schedules and what is learned do not.
    start: a tensor like the answer; of several variables, tensors by name; or a Solution, gone on from with all its states where it is of the same algorithm, else from
    its answer.  Samples that come in other units, c x in the place of x, are solved to the same share.  restart: forget the
    momentum of a problem where it points uphill (where a method was chosen).  tol: 1e-8 in float64 and 1e-5 in float32, if left
    out. Works in the dtype (float32 or float64) and on the device of the inputs.  console: where a progress bar is drawn.
    Raises SpecError E303 if no algorithm fits, UnrollError E402 for a parameter without a value, E403 for an input that is not
    what it is declared to be, E404 for inputs, or a start, of another kind or shape, E407 for a tol below the precision of the
    inputs.
    """
    spec = read(source, overrides)
    missing = [name for name in spec.parameters if name not in (parameters or {})]
    if missing:
        raise UnrollError(
            "E402", f"the parameter '{missing[0]}' has no value", hint=f"give it: parameters={{'{missing[0]}': ...}}"
        )
    if len(inputs) != len(spec.inputs):
        raise UnrollError(
            "E404", f"{spec.title} has {len(spec.inputs)} inputs ({', '.join(spec.inputs)}); {len(inputs)} were given"
        )
    data = dict(zip(spec.inputs, inputs, strict=True))
    like = _refuse_other_kinds(data)
    tol = _tolerance(tol, like.dtype)
    _refuse_none(max_iterations)
    given = {name: given_values.as_tensor(name, value) for name, value in (parameters or {}).items()}
    sizes = given_values.sizes_of(spec, dims or {}, given)
    chosen = _chosen(spec, algorithm, sizes)

    def made(d: Derivation) -> Network:
        return network_of(d, build(d), given, scalars, dtype=like.dtype, device=like.device)

    mapped = made(chosen.map) if chosen.map is not None else None
    nets = iterations(chosen.text, given, scalars, like) if chosen.text is not None else None
    net = nets[0] if nets is not None else mapped
    assert net is not None
    refuse_undeclared(net.derivation.problem.inputs, data)
    shape, data = _flat(net, data)
    count, names = shape.numel(), [z.name for z in net.derivation.problem.variables[: chosen.variables]]
    name = names[0]
    begun = None if start is None else _start(start, net, names, shape, like)
    method = f"{chosen.name}, accelerated" if nets is None else chosen.name
    judge, certified, measure = None, False, "change in one iteration"
    advance: Advance | None = None
    states: States = {}
    if mapped is not None:
        step, first = _map(mapped, data, name, count)
        error, certified = error_of(mapped, data, first)
        measure = "certified duality gap" if certified else "residual |z - prox(z - step grad)|"
        judge = by_its_map(error) if nets is None else _one_step_on(step, error, name)
        advance, states = accelerated(step, restart), at_rest(first if begun is None else begun[name])
    if nets is not None:
        advance = m = Machine(*nets, {n: x for n, x in data.items() if n in net.inputs}, count)
        states = m.start(begun)
        own = {z: made(d) for z, d in chosen.each.items()}
        if own:
            judge = _at_rest(m, data, names, _moves(own, data, count))
            measure = f"residual |z - prox(z - step grad)| of {' and '.join(names)}"
        elif judge is None:
            judge = _at_rest(m, data, names, m.residuals)
            measure = f"residuals {', '.join(m.named)}" if m.named else measure
    if isinstance(start, Solution) and start.algorithm == method:
        states = {n: s.reshape(count, *s.shape[len(shape) :]) for n, s in start.states.items()}
    assert judge is not None and advance is not None
    found = run(advance, states, judge, tol, max_iterations, console, label)
    goal = net.derivation.problem
    costs = {n: e for n, e in goal.terms.items() if not isinstance(unscaled(e)[1], Indicator)}
    answers = {name: found.answer} if len(names) == 1 else {z: found.states[z] for z in names}
    terms = net.terms_of(replace(goal, terms=costs))({**data, **answers})
    errors = found.errors.reshape(shape)
    back: Callable[[Tensor], Tensor] = lambda x: x.reshape((*shape, *x.shape[1:]))
    return Solution(
        {z: back(x) for z, x in answers.items()},
        sum(terms.values(), like.new_zeros(count)).reshape(shape),
        errors,
        certified,
        found.iterations,
        errors <= tol,
        chosen.convex,
        method,
        measure,
        chosen.claims,
        {n: back(s) for n, s in found.states.items()},
    )


# --- which algorithm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """text: what is run as it is written; None where the map is accelerated.  map: a plain map that fits, by which errors are measured.

    variables: how many; each: of several, a plain map in each of them, where there is one for all.  convex: in all of them together?
    """

    name: str
    text: Derivation | None
    map: Derivation | None
    claims: bool
    convex: bool
    variables: int = 1
    each: Mapping[str, Derivation] = field(default_factory=dict[str, Derivation])


def _chosen(spec: Spec, algorithm: str | None, sizes: Mapping[str, int]) -> Choice:
    """Raises SpecError E303 where nothing fits, E3xx where what is named does not."""
    problem = from_spec(spec, dict(sizes))
    loose = next((z for z in problem.variables if not any(depends(e, z) for e in problem.terms.values())), None)
    if loose is not None:
        raise SpecError("E303", f"the objective of {spec.title} does not depend on {loose.name}", hint="leave it out")
    count, proved = len(problem.variables), all(convex(p) and not p.holds for p in classify(problem))
    own = [find_named(name, spec) for name in spec.algorithms]
    if algorithm is not None and algorithm != AUTO:
        named = _named(spec, algorithm)
        maps = tried(problem, filter(is_map, by_simplicity(own)))
        mapped = next((_derived(spec, t.algorithm, sizes) for t in maps if t.step is not None), None)
        try:
            found = derive_spec(_alone(spec, named), dict(sizes))
        except SpecError as e:  # its place is in no text of the user's
            raise SpecError(e.code, e.message, None, e.hint, e.notes) from None
        claims = "optimum" in named.text.record.claimed and not (
            found.exact.departures or found.exact.broken("optimum")
        )
        return Choice(named.name, found, mapped, claims, proved, count, _in_each(spec, problem, sizes))
    choice = choose(problem, Options(), own)
    if choice.taken is None:
        raise _unsolved(spec, problem, choice.before)
    taken = choice.taken.algorithm
    found = _derived(spec, taken, sizes)
    text, mapped = (None, found) if is_map(taken) else (found, None)
    claims = "optimum" in taken.text.record.claimed
    return Choice(taken.name, text, mapped, claims, proved, count, _in_each(spec, problem, sizes))


def _derived(spec: Spec, a: Algorithm, sizes: Mapping[str, int]) -> Derivation:
    return derive_spec(_alone(spec, a, own=False), dict(sizes))


def _unsolved(spec: Spec, problem: Problem, refused: Sequence[Tried]) -> SpecError:
    """Why nothing solves it, and what would."""
    parts = classify(problem)
    if open_step := next((t for t in refused if t.needs_a_number), None):
        hint = "layers with steps of a size of your own, by unroll.compile, as unroll: {algorithm: gradient_descent, layers: 100, step: 0.01}"
        message = f"no algorithm here solves {spec.title}: {open_step.reason}, so no step is known to be short enough"
        return SpecError("E303", message, hint=hint)
    fits = next((t.algorithm.name for t in refused if t.step is not None), None)
    named = f"it is not known to be convex; {fits} fits, algorithm='{fits}', without a claim" if fits else ""
    why = next((t.reason for t in reversed(refused) if is_map(t.algorithm)), NONE_FITS)
    if not fits and len(problem.variables) > 1:
        named = f"a text of your own in as many variables: solves: H({', '.join(z.name for z in problem.variables)})"
    return SpecError(
        "E303",
        f"no algorithm here solves {spec.title}: {why}",
        hint=unsigned(parts) or named or _remedy(parts),
        notes=tuple(p.show() for p in parts),
    )


def is_map(a: Algorithm) -> bool:
    """Is it a descent by gradients and proxes that keeps nothing but the variable? Then momentum and restarts speed it up."""
    record = a.text.record
    uses = [x.uses for x in letters(a.text)]
    return (
        {"monotone", "optimum"} <= record.claimed
        and not record.states
        and set(record.scalars) == {"step"}
        and sum(GRADIENT in u for u in uses) == 1
        and all(u <= {GRADIENT} or u <= {PROX} for u in uses)
        and len(arguments_of(letters(a.text))) == 1
        and not any(x.operator for x in letters(a.text))
    )


def _in_each(spec: Spec, problem: Problem, sizes: Mapping[str, int]) -> dict[str, Derivation]:
    """Of several variables: a plain map in each of them, the others being data; of none where one has no such map."""
    found: dict[str, Derivation] = {}
    maps = [a for a in by_simplicity() if is_map(a)]
    for z in problem.variables if len(problem.variables) > 1 else ():
        for a in maps:
            block = {"block": z.name, "over": z.name, "algorithm": a.name}
            try:
                found[z.name] = derive_spec(_with(spec, {"layers": 1, "blocks": [block]}), dict(sizes))
            except SpecError as e:
                if e.code not in ("E302", "E303", "E304"):
                    raise
                continue
            break
        else:
            return {}
    return found


def _named(spec: Spec, name: str) -> Algorithm:
    """The text that a name, or a path, means. Raises SpecError E001, E303."""
    known = name in spec.algorithms or name.endswith((".yaml", ".yml"))
    return Algorithm(texts.find(name, spec)) if known else find_named(name)


def _alone(spec: Spec, a: Algorithm, own: bool = True) -> Spec:
    """The spec's problem with one layer of an algorithm. own: where the spec names it, with what it says of it."""
    said: Any = spec.to_dict().get("unroll") or {}
    own = own and said.get("algorithm") == a.name
    kept = {k: said[k] for k in OF_SPEC if k in said} if own else {}
    known = a.name in spec.algorithms or any(a.text is t for t in texts.every())
    texts_of_user = {} if known else {a.name: plain(a.text.root)}  # a file of the user's
    return _with(spec, {**kept, "algorithm": a.name, "layers": 1}, texts_of_user)


def _with(spec: Spec, unrolled: dict[str, Any], algorithms: Mapping[str, Any] | None = None) -> Spec:
    """The problem of a spec, unrolled in another way."""
    document: dict[str, Any] = {
        k: v for k, v in spec.to_dict().items() if k not in ("data", "train", "model", "weights")
    }
    if algorithms:
        document["algorithms"] = {**document.get("algorithms", {}), **algorithms}
    return load({**document, "unroll": unrolled})


def _refuse_other_kinds(data: Mapping[str, Any]) -> Tensor:
    """The first input, whose type and place are those of all. Raises UnrollError E404."""
    first = next((x for x in data.values() if isinstance(x, Tensor)), torch.empty(()))
    for name, x in data.items():
        check_kind(name, x, first, "the first input")
        if x.dtype not in DEFAULTS:
            hint = f"{name}.float(), or {name}.double()"
            raise UnrollError("E404", f"{name} is a tensor of {x.dtype}, too coarse to certify a solution", hint=hint)
        if not finite(x):
            message = f"{int((~x.isfinite()).sum()):,} of {x.numel():,} entries of {name} are not finite"
            raise UnrollError("E404", message)
    return first


def _flat(net: Network, data: dict[str, Tensor]) -> tuple[torch.Size, dict[str, Tensor]]:
    """(batch axes, the inputs with one batch axis). Raises UnrollError E404."""
    lead: dict[str, torch.Size] = {}
    for name, x in data.items():
        check_shape(net.program, name, x)
        lead[name] = x.shape[: x.ndim - len(net.program.tensor_sizes(net.program.problem.symbols[name]))]
    try:
        shape = torch.broadcast_shapes(*lead.values())
    except RuntimeError:
        found = ", ".join(f"{name} {tuple(axes)}" for name, axes in lead.items())
        raise UnrollError("E404", f"the batch axes of the inputs do not fit: {found}") from None
    core = {name: x.shape[len(lead[name]) :] for name, x in data.items()}
    return shape, {n: x.expand(*shape, *core[n]).reshape(shape.numel(), *core[n]) for n, x in data.items()}


def least_tolerance(dtype: torch.dtype) -> float:
    """What a dtype can tell from 0, beside 1."""
    return 50 * torch.finfo(dtype).eps


def _refuse_none(iterations: Any) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise UnrollError("E407", f"max_iterations={iterations!r} is not a number of iterations, 1 or more")


def _tolerance(tol: Any, dtype: torch.dtype) -> float:
    """The default of a dtype, or what was asked for. Raises UnrollError E407 for what the dtype cannot tell from 0."""
    if tol is None:
        return DEFAULTS[dtype]
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 < tol < 1:  # nan too
        hint = f"{DEFAULTS[dtype]:g}, say, of the objective at the start"
        raise UnrollError("E407", f"tol={tol!r} is not a number between 0 and 1", hint=hint)
    least = least_tolerance(dtype)
    if tol < least:
        raise UnrollError(
            "E407",
            f"tol={tol:g} is below what {dtype} can certify, about {least:.0e}",
            hint="" if dtype == torch.float64 else "give inputs in float64",
        )
    return tol


# --- what an error is measured against --------------------------------------------------------------------------------


def _map(net: Network, data: Mapping[str, Tensor], name: str, count: int) -> tuple[Map, Tensor]:
    """One layer as a map of the variable, and where it leads from the start."""
    read = {n: x for n, x in data.items() if n in net.inputs}

    def step(z: Tensor, rows: Tensor) -> Tensor:
        return net(**(read if len(rows) == count else {n: x[rows] for n, x in read.items()}), **{name: z})

    first = net(**read)
    axes = len(net.program.axes(net.program.problem.symbols[name]))
    return step, first.expand(count, *first.shape[first.ndim - axes :])


def _start(
    start: Tensor | Mapping[str, Tensor] | Solution, net: Network, names: Sequence[str], shape: torch.Size, like: Tensor
) -> dict[str, Tensor]:
    """Where variables begin, with one batch axis. Raises UnrollError E404."""
    if isinstance(start, Solution) and not {*names} <= {*start.values}:
        are = "variable is" if len(names) == 1 else "variables are"
        raise UnrollError("E404", f"the start is a solution in {', '.join(start.values)}; the {are} {', '.join(names)}")
    if isinstance(start, Mapping) and not {*start} <= {*names}:
        raise UnrollError("E404", f"the start has {', '.join(start)}; there are {', '.join(names)}")
    if isinstance(start, Solution | Mapping):
        values = start.values if isinstance(start, Solution) else start
        return {n: _begun(values[n], net, n, shape, like) for n in names if n in values}
    if len(names) > 1:
        hint = f"start={{'{names[0]}': ...}}, or a Solution"
        raise UnrollError("E404", f"there are {len(names)} variables, {', '.join(names)}, and the start is one tensor", hint=hint)  # fmt: skip
    return {names[0]: _begun(start, net, names[0], shape, like)}


def _begun(z: Tensor, net: Network, name: str, shape: torch.Size, like: Tensor) -> Tensor:
    """Where one variable begins, with one batch axis. Raises UnrollError E404."""
    check_kind("start", z, like, "the inputs")
    check_shape(net.program, name, z)
    lead = z.shape[: z.ndim - len(net.program.axes(net.program.problem.symbols[name]))]
    if lead != shape:
        raise UnrollError("E404", f"the start has batch axes {tuple(lead)}, the inputs have {tuple(shape)}")
    if not finite(z):
        raise UnrollError("E404", "the start has entries that are not finite")
    return z.reshape(shape.numel(), *z.shape[len(shape) :])


def _one_step_on(step: Map, error: Error, name: str) -> Judge:
    """Of a text whose problem a plain map solves too: the answer is where that leads, which meets the constraints."""

    def judge(before: States, after: States, rows: Tensor) -> tuple[Tensor, Tensor]:
        new = step(after[name], rows)
        return new, error(new, after[name] - new, rows)

    return judge


Residual = Callable[[States, States, Tensor], Mapping[str, tuple[Tensor, Tensor | None]]]
"""(states before an iteration, after it, which problems) -> name: (what is 0 at a solution, and the state that it is the change of)."""


def _moves(own: Mapping[str, Network], data: Mapping[str, Tensor], count: int) -> Residual:
    """How far a plain map of each variable, the others being as they are, moves it."""

    def residuals(before: States, after: States, rows: Tensor) -> Mapping[str, tuple[Tensor, Tensor | None]]:
        del before
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for z, net in own.items():
            read = {n: x if len(rows) == count else x[rows] for n, x in data.items() if n in net.inputs}
            new = dict(zip(net.variables, net(**read, **{n: after[n] for n in net.variables}), strict=True))
            found[z] = new[z] - after[z], after[z]
        return found

    return residuals


def _at_rest(m: Machine, data: Mapping[str, Tensor], names: Sequence[str], residuals: Residual) -> Judge:
    """The residuals of a text, or the changes of its states, or of each variable, against the largest that they have been."""
    seen: dict[str, Tensor] = {}
    states, every = m.start(), torch.arange(m.count, device=m.like.device)
    for _ in range(CHECK):
        before, states = states, m(states, every, 1)
        for name, (r, _) in residuals(before, states, every).items():
            seen[name] = torch.maximum(seen[name], length(r)) if name in seen else length(r)
    _refuse_tiny(_largest(seen.values()), data)
    dtype = m.like.dtype
    rounding = least_tolerance(dtype) / DEFAULTS[dtype]

    def judge(before: States, after: States, rows: Tensor) -> tuple[Tensor, Tensor]:
        errors: list[Tensor] = []
        for name, (r, state) in residuals(before, after, rows).items():
            found = length(r)
            seen[name][rows] = torch.maximum(seen[name][rows], found)
            scale = seen[name][rows] if state is None else torch.maximum(seen[name][rows], rounding * length(state))
            errors.append(relative(found, scale, r))
        answer = after[names[0]] if len(names) == 1 else torch.cat([flattened(after[n]) for n in names], 1)
        return answer, torch.stack(errors).amax(0)

    return judge


def error_of(net: Network, data: Mapping[str, Tensor], start: Tensor) -> tuple[Error, bool]:
    """(the error of points, as `Solution` says it; is it a certified gap?), for the problems of these data.

    A gap is divided by the larger of the objective at 0 and at the start; a residual by the longer of the gradient steps
    there. What may vanish at the answer is left out, but for the rounding of the answer itself.
    """
    parts, z = net.derivation.parts, net.derivation.variable
    points = (torch.zeros_like(start), start)

    def values(**terms: Expr) -> Callable[[Tensor, Any], dict[str, Tensor]]:
        run = net.terms_of(replace(net.program.problem, terms=terms))
        return lambda point, rows: run({**{name: x[rows] for name, x in data.items()}, z.name: point})

    gap = duality_gap(parts, z)
    if gap is not None:
        objective = values(f=add(*values_of(p.e for p in parts)))
        scale = _largest(objective(p, slice(None))["f"] for p in points)
        _refuse_tiny(scale, data)
        gap_at = values(gap=gap)
        return lambda new, moved, rows: relative(gap_at(new, rows)["gap"].abs(), scale[rows], moved), True
    slope = gradient(add(*(p.e for p in parts if p.descended)), z)
    (lipschitz,) = (a.value for a in net.derivation.exact.definitions if a.target == LIPSCHITZ)
    steep = values(slope=total(elementwise(slot(0) ** 2, slope)), L=lipschitz)
    first = _largest(found["slope"].sqrt() / found["L"] for found in (steep(p, slice(None)) for p in points))
    _refuse_tiny(first, data)
    rounding = least_tolerance(start.dtype) / DEFAULTS[start.dtype]

    def residual(new: Tensor, moved: Tensor, rows: Tensor) -> Tensor:
        return relative(length(moved), torch.maximum(first[rows], rounding * length(new)), moved)

    return residual, False


def _largest(values: Iterable[Tensor]) -> Tensor:
    """Row by row, of what is finite. Raises UnrollError E404 where all is beyond the largest number of the type."""
    found = torch.stack([v.abs() for v in values])
    beyond = found.isinf().any(0) & ~found.isfinite().any(0)
    if beyond.any():
        message = f"{int(beyond.sum()):,} of {beyond.numel():,} problems have an objective, or a slope, beyond what {found.dtype} can hold"
        raise UnrollError(
            "E404", message, hint="other units" + ("" if found.dtype == torch.float64 else ", or float64")
        )
    return found.nan_to_num(0, 0, 0).amax(0)


def _refuse_tiny(scale: Tensor, data: Mapping[str, Tensor]) -> None:
    """Data whose squares are lost, so that no error can be measured against them. Raises UnrollError E404."""
    info = torch.finfo(scale.dtype)
    least = 2 * (info.tiny * info.eps) ** 0.5  # gaps have products of two objectives
    entries = torch.stack([flattened(x.abs()).amax(1) for x in data.values() if x.numel()], 1) if len(scale) else None
    if entries is None:
        return
    top = entries.amax(1)
    lost = (scale < least) & (top > 0) & (top < (1e3 * least) ** 0.5)
    if lost.any():
        message = f"{int(lost.sum()):,} of {lost.numel():,} problems have values whose squares are too near 0 for {scale.dtype} to measure an error by"
        raise UnrollError(
            "E404", message, hint="other units" + ("" if scale.dtype == torch.float64 else ", or float64")
        )


def relative(x: Tensor, scale: Tensor, moved: Tensor) -> Tensor:
    """x / scale; where the scale is too small to divide by, 0 for a point that no longer moves, else infinite."""
    info = torch.finfo(scale.dtype)
    still = (flattened(moved) == 0).all(1) & x.isfinite()
    return torch.where(scale >= info.tiny / info.eps, x / scale, torch.where(still, 0.0, torch.inf).to(scale))


def _remedy(parts: Sequence[Part]) -> str:
    """What to change in the objective."""
    stuck = [p for p in parts if not p.descended and p.proximal is None]
    if stuck:
        return f"leave out, or write in another way, what has neither a gradient nor a prox: {pretty(stuck[0].e)}"
    return "of the terms without a gradient keep one, or give the others one: huber(z, 0.1) in the place of abs(z)"
