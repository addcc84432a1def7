"""Spec -> Step: the parts of a layer, one after the other.

    block = terms of the objective, one variable, an algorithm       -> its iteration (algorithms.py)
            surrogate, rewrites, gauge, norm                          -> declared departures from it
            steps, start, output                                      -> how often it runs, from where, and what it leaves

A spec without `blocks:` is one block. Every departure is kept in `Step.departures`, with the places where it applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import sympy as sp

from unroll.derivation import algorithms
from unroll.derivation.algorithms import LIPSCHITZ, STEP, Options, state_of
from unroll.derivation.choosing import choose
from unroll.derivation.rewrites import rewriting
from unroll.derivation.rewrites.patterns import common_factor
from unroll.derivation.rewrites.record import Applied, Call, Site
from unroll.derivation.step import LAYER, Assign, Departure, Hand, State, Step, is_claim, rescaled
from unroll.errors import DeriveError, SpecError, Where, did_you_mean
from unroll.language.constructors import (
    add,
    constant,
    elementwise,
    noise,
    normalise,
    prox,
    scale,
    split,
    swap,
    symbol,
    zeros,
)
from unroll.language.functions import Value, as_expr
from unroll.language.nodes import Add, Expr, Prox, Sym, Zero, depends, scalar, show_shape, slot
from unroll.language.parse import Place, Scope, parse, parse_constraint
from unroll.language.problem import Problem, place_of, tensor
from unroll.language.show import text
from unroll.language.traversal import substitute, substitute_scalars
from unroll.spec import Spec
from unroll.spec.schema import Block, Gauge, Normalise, Scheme, Unroll
from unroll.spec.texts import AUTO

LAYERS = sp.Symbol("layers", integer=True, positive=True)
"""How many layers there are, in schedules."""
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Half:
    """One block as a spec writes it. path: where in the spec."""

    name: str
    path: Path
    scheme: Scheme
    spec: Spec
    problem: Problem

    @property
    def block(self) -> Block | None:
        return self.scheme if isinstance(self.scheme, Block) else None

    @property
    def algorithm(self) -> str:
        return (self.block.algorithm if self.block else cast(Unroll, self.scheme).algorithm) or ""

    def calls(self, scope: Scope) -> list[Call]:
        """Its rewrites, read."""
        return [rewriting.read(t, scope, self.place("rewrites", i)) for i, t in enumerate(self.scheme.rewrites)]

    def place(self, *key: str | int) -> Place:
        return place_of(self.spec, *self.path, *key)

    def where(self, *key: str | int) -> Where:
        return self.spec.origin(*self.path, *key).where()

    def named(self, s: sp.Symbol) -> sp.Symbol:
        """The scalar `step` or `L` of this block."""
        return scalar(f"{s.name}_{self.name}", positive=True) if self.name else s


def derive(problem: Problem, spec: Spec) -> Step:
    """One layer as the spec describes it. Raises SpecError E303 (does not fit), E304 (no step size), E308 to E310 (blocks, rewrites)."""
    unrolled = spec.unroll
    if unrolled is None:
        hint = "add a section 'unroll:' with algorithm and layers, or unroll.solve it"
        raise SpecError("E303", f"{spec.title} says what to minimise, not how", hint=hint)
    if unrolled.blocks and unrolled.algorithm is not None:
        hint = "each block has its own algorithm"
        raise SpecError(
            "E310", "the spec names an algorithm beside its blocks", spec.key_where("unroll", "algorithm"), hint
        )
    starts = {name: algorithms.parse_start(problem, spec, name) for name in unrolled.start}
    step = _alternating(problem, spec, unrolled) if unrolled.blocks else _single(problem, spec, unrolled)
    _own_scalars(step, problem, spec)
    step = replace(step, states=tuple(_started(s, starts) for s in step.states))
    return _scheduled(step, problem, spec, unrolled)


def _own_scalars(step: Step, problem: Problem, spec: Spec) -> None:
    """Numbers that the algorithm works out (a step size, a momentum) are not named as a scalar of the problem is."""
    made = {
        s.name
        for s in (*(a.target for a in (*step.definitions, *step.assigns)), *(s.symbol for s in step.states))
        if isinstance(s, sp.Symbol)
    }
    for s in problem.scalars:
        if s.name in made:
            hint = "every name means one thing: choose another one"
            raise SpecError(
                "E213", f"'{s.name}' is a number that the algorithm works out", spec.key_where("scalars", s.name), hint
            )


def _started(s: State, starts: dict[str, Expr]) -> State:
    return replace(s, start=starts[s.symbol.name]) if s.symbol.name in starts else s


# --- one part ---------------------------------------------------------------------------------------------------------


def _single(problem: Problem, spec: Spec, unrolled: Unroll) -> Step:
    """The whole objective by one algorithm; what it carries besides the variable goes from layer to layer."""
    half = Half("", ("unroll",), unrolled, spec, problem)
    step, found, problem = _iteration(half, problem, problem.scope)
    step = replace(step, subproblems=tuple(_one_by_one(problem, step)), departures=tuple(found))
    if not (unrolled.gauge or unrolled.normalise):
        return step
    variables = problem.variables
    if len(variables) > 1:
        key = "gauge" if unrolled.gauge else "normalise"
        where = spec.key_where("unroll", key)
        raise SpecError("E310", f"{key} is of one variable; this problem has {len(variables)}", where, "write blocks")
    z = next(iter(variables))
    step, more = _framed(half, step, z, z, problem.scope, None)
    return _without_descent(replace(step, departures=(*found, *more)))


def _one_by_one(problem: Problem, step: Step) -> Iterator[tuple[str, Problem]]:
    """What each part of a layer minimises: the whole, or of several variables, in each with the others held."""
    if len(problem.variables) == 1:
        yield "", problem
        return
    for name in step.blocks:
        z = next(v for v in problem.variables if v.name == name)
        others = (v for v in problem.variables if v is not z)
        terms = {n: e for n, e in problem.terms.items() if depends(e, z)}
        yield name, replace(problem, variables=(z,), inputs=(*problem.inputs, *others), terms=terms)


def _iteration(half: Half, problem: Problem, scope: Scope) -> tuple[Step, list[Departure], Problem]:
    """The algorithm on a problem in one variable, rewritten as asked; and that problem."""
    calls = half.calls(scope)
    departures: list[Departure] = []
    for call in (c for c in calls if c.rewrite.stage == "objective"):
        problem = _rewritten_objective(half, problem, call, departures)
    scheme = half.scheme
    apart = {r.in_: ("learn", name) for name, r in scheme.learn.items() if r.in_ is not None}
    given = scheme.control.gives if scheme.control is not None else {}
    apart |= {r.in_: ("control", "gives", name) for name, r in given.items() if r.in_ is not None}
    options = Options(
        scheme.step, scheme.momentum, scheme.split, scheme.numbers, scheme.updates, scheme.states, apart, half.place
    )
    try:
        step = _chosen(half, problem, options) if half.algorithm == AUTO else _named(half, problem, options)
    except DeriveError as e:
        raise e.located(half.where("step" if e.code == "E304" else "algorithm")) from None
    departures += (replace(d, block=half.name) for d in step.departures)
    for call in (c for c in calls if c.rewrite.stage == "step"):
        step = _rewritten_step(half, step, call, departures)
    if half.scheme.gauge is None or half.scheme.gauge.update is None:  # else that stands in front of the step
        step = _counted(step, calls)
    for call in calls:
        left = call.rewrite.left
        for a in step.assigns:
            if left is not None and isinstance(a.value, Expr) and (found := left(a.value, **call.values)) is not None:
                raise rewriting.unfinished(call, found)
    return step, departures, problem


def _named(half: Half, problem: Problem, options: Options) -> Step:
    algorithm = algorithms.find(half.algorithm, half.spec, (*half.path, "algorithm"))
    step = algorithms.build(algorithm, problem, options)
    return replace(step, notes=(*step.notes, *algorithms.otherwise(algorithm, problem, options)))


def _chosen(half: Half, problem: Problem, options: Options) -> Step:
    """The step of the text that is taken where none is named, and what is said of the choice."""
    own = [algorithms.find(name, half.spec) for name in half.spec.algorithms]
    choice = choose(problem, options, own)
    said = tuple(choice.says())
    assert choice.taken is not None and choice.taken.step is not None
    algorithm, step = choice.taken.algorithm, choice.taken.step
    notes = (*step.notes, *algorithms.otherwise(algorithm, problem, options), *said)
    return replace(step, notes=notes, chosen={(*half.path, "algorithm"): algorithm.name})


def _rewritten_objective(half: Half, problem: Problem, call: Call, departures: list[Departure]) -> Problem:
    terms: dict[str, Expr] = {}
    sites: list[Applied] = []
    for name, e in problem.terms.items():
        terms[name], applied = rewriting.apply(call, e, half.name)
        sites += [applied] if applied.sites else []
    if not sites:
        raise rewriting.missed(call, add(*problem.terms.values()))
    joined = replace(sites[0], sites=tuple(s for a in sites for s in a.sites))
    departures.append(_departure(joined))
    return replace(problem, terms=terms)


def _rewritten_step(half: Half, step: Step, call: Call, departures: list[Departure]) -> Step:
    found = [rewriting.apply(call, a.value, half.name) if isinstance(a.value, Expr) else None for a in step.assigns]
    sites = tuple(s for f in found if f is not None for s in f[1].sites)
    if not sites:
        raise rewriting.missed(call, next(a.value for a in step.assigns if isinstance(a.value, Expr)))
    applied = next(f[1] for f in found if f is not None)
    departures.append(_departure(replace(applied, sites=tuple(dict.fromkeys(sites)))))
    assigns = tuple(
        a if f is None else _renoted(replace(a, value=f[0])) for a, f in zip(step.assigns, found, strict=True)
    )
    step = step if call.rewrite.kind == "exact" else _without_descent(step)
    return replace(step, assigns=assigns)


def _without_descent(step: Step) -> Step:
    """The step is no longer that of the algorithm: what the algorithm claims of the objective is not claimed of it."""
    return replace(step, notes=tuple(n for n in step.notes if not is_claim(n)), claimed=tuple)


def _counted(step: Step, calls: list[Call]) -> Step:
    """What is in front of the terms of a step, a step size that is a formula included, as the rewrites make it."""
    values: dict[sp.Symbol, sp.Expr] = {}
    for a in step.definitions:
        if isinstance(a.target, sp.Symbol) and not isinstance(a.value, Expr):
            values[a.target] = swap(a.value, values)
    for call in (c for c in calls if c.rewrite.rest is not None):
        rest = cast(Callable[..., Expr], call.rewrite.rest)
        assigns = (
            (a, rest(a.value, **call.values, values=values) if isinstance(a.value, Expr) else a.value)
            for a in step.assigns
        )
        step = replace(step, assigns=tuple(a if e is a.value else _renoted(replace(a, value=e)) for a, e in assigns))
    return step


def _departure(applied: Applied) -> Departure:
    record = applied.rewrite
    says = {
        "exact": "exact",
        "bounded": f"assumes {record.assumes}; {record.error}",
        "heuristic": f"heuristic: {record.error}",
    }[record.kind]
    return Departure(applied.title, applied.block, record.kind, says, applied)


def _renoted(a: Assign) -> Assign:
    return replace(a, note=f"{a.target.name} <- {text(a.value)}") if a.note and isinstance(a.value, Expr) else a


# --- several parts ----------------------------------------------------------------------------------------------------


def _alternating(problem: Problem, spec: Spec, unrolled: Unroll) -> Step:
    halves = [Half(b.block, ("unroll", "blocks", i), b, spec, problem) for i, b in enumerate(unrolled.blocks)]
    _whole(halves, problem, spec)
    states = {z: state_of(z) for z in problem.variables}
    definitions: list[Assign] = []
    assigns: list[Assign] = []
    departures: list[Departure] = []
    notes: list[str] = []
    subproblems: list[tuple[str, Problem]] = []
    hidden: list[State] = []
    hands: list[Hand] = []
    chosen: dict[Path, str] = {}
    names: list[str] = []
    about = [_about(h, cast(Block, h.block)) for h in halves]
    for half, v in zip(halves, about, strict=True):
        part = _part(half, v, alone=about.count(v) == 1)
        hidden += part.states
        definitions += part.definitions
        assigns += part.assigns
        departures += part.departures
        notes += [f"{half.name}: {n}" for n in part.notes if not is_claim(n)]
        subproblems += part.subproblems
        hands += part.hands
        chosen |= part.chosen
        names += [part.algorithm] if half.algorithm else []
    said = {
        s.symbol: s for s in reversed(hidden) if not isinstance(s.start, Zero)
    }  # by the first algorithm that says it
    first = [said.get(s, State(s, zeros(*z.shape))) for z, s in states.items()]
    hidden = [s for s in hidden if s.symbol not in states.values()]
    return Step(
        " and ".join(dict.fromkeys(names)) or "declared blocks", tuple(definitions), (*first, *hidden), tuple(assigns), tuple(states.values()),
        notes=tuple(notes), blocks=tuple(h.name for h in halves), departures=tuple(departures), subproblems=tuple(subproblems), hands=tuple(hands),
        chosen=chosen,
    )  # fmt: skip


def _whole(halves: list[Half], problem: Problem, spec: Spec) -> None:
    """Every block has a name of its own, every term of the objective a block."""
    names = [h.name for h in halves]
    for h in halves:
        if names.count(h.name) > 1:
            raise SpecError(
                "E310", f"two blocks are called '{h.name}'", h.where("block"), "every block has a name of its own"
            )
        taken = [
            *(h.block.terms if h.block else ()),
            *(h.block.surrogate.replaces if h.block and h.block.surrogate else ()),
        ]
        for name in taken:
            if name not in problem.terms:
                hint = did_you_mean(name, problem.terms) or f"terms: {', '.join(problem.terms)}"
                raise SpecError("E310", f"the objective has no term '{name}'", h.where("block"), hint)
    named = {
        t
        for h in halves
        if h.block
        for t in (*h.block.terms, *(h.block.surrogate.replaces if h.block.surrogate else ()))
    }
    derived = [h for h in halves if h.algorithm]  # of blocks that are all declared, the objective only measures
    if derived and all(h.block and h.block.terms for h in derived):
        for name in problem.terms:
            if name not in named:
                hint = f"add terms: [{name}] to one of them"
                raise SpecError("E310", f"no block takes the term '{name}'", spec.key_where("unroll", "blocks"), hint)


def _part(half: Half, v: Sym, alone: bool) -> Step:
    """One block about the variable v, as a step whose assignments carry its name; states: those that it keeps, and where v starts.

    alone: does no other block change v?
    """
    problem, block = half.problem, half.block
    assert block is not None
    if block.algorithm is None:
        return _declared(half, block, v)
    own = _own_variable(half, block)
    z = own or v
    entry = symbol(_free_name(problem, f"{v.name}0"), v.nrows, v.ncols, "state", v.rank)
    scope = replace(problem.scope, names={**problem.scope.names, entry.name: entry, **({own.name: own} if own else {})})
    sub, departures = _subproblem(half, block, z, v, scope)
    step, found, sub = _iteration(half, sub, scope)
    step = _renamed(step, half, state_of(z))
    step, more = _framed(half, step, z, v, scope, entry, alone)
    tied, definitions = algorithms.where_known(step.definitions, {s.name for s in (*problem.variables, entry)})
    others: dict[Expr, Expr] = {s: state_of(s) for s in problem.variables if s is not z}
    parts = [replace(_held(a, others), block=half.name) for a in (*tied, *step.assigns)]
    return replace(
        step,
        definitions=tuple(definitions),
        states=tuple(s for s in step.states if z is v or s.symbol is not state_of(z)),
        assigns=tuple(parts),
        departures=(*departures, *found, *more),
        subproblems=((half.name, sub),),
        hands=tuple(replace(h, block=half.name) for h in step.hands),
    )


def _declared(half: Half, block: Block, v: Sym) -> Step:
    """A block that no objective gives: norm and output, as they are written. Raises SpecError E310 for what is of an algorithm."""
    if block.output is None:
        hint = "name its algorithm, or write what it leaves: output: Z + D @ Z0"
        raise SpecError(
            "E310", f"the block '{half.name}' has neither an algorithm nor an output", half.where("block"), hint
        )
    problem = half.problem
    for key in ("terms", "variable", "surrogate", "constraint", "start", "gauge", "rewrites", "momentum"):
        if getattr(block, key):
            raise SpecError(
                "E310",
                f"{key}: is of an algorithm, and the block '{half.name}' has none",
                half.spec.key_where(*half.path, key),
                "leave it out",
            )
    entry = symbol(_free_name(problem, f"{v.name}0"), v.nrows, v.ncols, "state", v.rank)
    scope = replace(problem.scope, names={**problem.scope.names, entry.name: entry})
    raw = state_of(v)
    empty, found = _framed(half, Step("", (), (), (), (raw,)), v, v, scope, entry)
    others: dict[Expr, Expr] = {s: state_of(s) for s in problem.variables if s is not v}
    said = Departure(
        "output",
        half.name,
        "choice",
        f"{v.name} becomes {' '.join(block.output.split())}: not derived from the objective",
    )
    sub = replace(
        problem,
        variables=(v,),
        inputs=(*problem.inputs, *(s for s in problem.variables if s is not v)),
        terms={},
        scope=scope,
    )
    parts = tuple(replace(_held(a, others), block=half.name) for a in empty.assigns)
    return replace(empty, assigns=parts, departures=(*found, said), subproblems=((half.name, sub),))


def _held(a: Assign, others: Mapping[Expr, Expr]) -> Assign:
    """Other variables at the value that they have now."""
    return _renoted(replace(a, value=substitute(a.value, others))) if isinstance(a.value, Expr) else a


def _about(half: Half, block: Block) -> Sym:
    """The variable of the problem that the block changes."""
    problem = half.problem
    if block.over is not None:
        found = next((z for z in problem.variables if z.name == block.over), None)
        if found is None:
            raise SpecError(
                "E310",
                f"'{block.over}' is not a variable",
                half.where("over"),
                did_you_mean(block.over, [z.name for z in problem.variables]),
            )
        return found
    variable, *others = problem.variables
    if others:
        hint = f"add over: {variable.name}"
        raise SpecError(
            "E310", f"the block '{half.name}' does not say which variable it is about", half.where("block"), hint
        )
    return variable


def _own_variable(half: Half, block: Block) -> Sym | None:
    if not block.variable:
        if block.output is not None:
            hint = "leave it out, or give the block a variable of its own"
            raise SpecError(
                "E310",
                f"the block '{half.name}' leaves its variable; it has no other output",
                half.where("output"),
                hint,
            )
        return None
    if len(block.variable) > 1 or block.output is None:
        what = (
            "one variable of its own"
            if len(block.variable) > 1
            else "an output: what becomes of the problem's variable"
        )
        raise SpecError(
            "E310",
            f"the block '{half.name}' needs {what}",
            half.spec.key_where(*half.path, "variable"),
            "output: D @ A",
        )
    ((name, record),) = block.variable.items()
    where = half.spec.key_where(*half.path, "variable", name)
    if name in half.problem.scope.names:
        raise SpecError("E213", f"'{name}' is already declared", where, "every name means one thing")
    return tensor(name, record, "variable", half.problem.scope.names, where)


def _free_name(problem: Problem, name: str) -> str:
    return name if name not in problem.scope.names else _free_name(problem, name + "_")


def _subproblem(half: Half, block: Block, z: Sym, v: Sym, scope: Scope) -> tuple[Problem, list[Departure]]:
    """minimise over z the terms that the block takes, all else held as it is."""
    problem, costs = half.problem, dict[str, Expr]()
    replaced = block.surrogate.replaces if block.surrogate else ()
    for name, e in problem.costs.items():
        wanted = name in block.terms if block.terms else depends(e, z)
        if not wanted or name in replaced:
            continue
        if not depends(e, z):
            raise SpecError(
                "E310",
                f"the term '{name}' does not depend on {z.name}",
                half.where("terms"),
                f"leave it to a block over another variable than {z.name}",
            )
        costs[name] = e
    departures: list[Departure] = []
    if block.surrogate is not None:
        costs["surrogate"], departures = _surrogate(half, block, scope)
    if block.constraint is not None:
        costs["constraint"] = parse_constraint(block.constraint, scope, half.place("constraint"))
        if z is v:
            departures.append(
                Departure("constraint", half.name, "choice", f"{block.constraint} is added to the objective")
            )
    others = tuple(s for s in problem.variables if s is not z)
    return replace(
        problem, variables=(z,), inputs=(*problem.inputs, *others), terms=costs, sign=1, scope=scope
    ), departures


def _surrogate(half: Half, block: Block, scope: Scope) -> tuple[Expr, list[Departure]]:
    written = block.surrogate
    assert written is not None
    place = half.place("surrogate", "by")
    e = as_expr(parse(written.by, scope, place))
    if not e.is_scalar:
        raise SpecError(
            "E133", f"the surrogate is {show_shape(e.shape)}; an objective is a scalar", place(0, len(written.by))
        )
    assumes = rewriting.read(written.assumes, scope, half.place("surrogate", "assumes"))
    assumption = rewriting.assumption(assumes)
    site = Site(e, e, assumption)
    applied = Applied(assumes.rewrite, assumes.values, half.name, (site,))
    said = f"{' and '.join(written.replaces)} replaced by {written.by.strip()}; assumes {assumes.text}, {assumes.rewrite.assumes}"
    return scale(half.problem.sign, e), [Departure("surrogate", half.name, "heuristic", said, applied)]


def _renamed(step: Step, half: Half, variable: Sym) -> Step:
    """Everything but the variable gets the name of its block: step -> step_compress."""
    numbers = {s: half.named(s) for s in (STEP, LIPSCHITZ)}
    made = [s.symbol for s in step.states] + [a.target for a in (*step.definitions, *step.assigns)]
    local = [s for s in made if s is not variable and s not in numbers]
    numbers |= {s: sp.Symbol(f"{s.name}_{half.name}", **s.assumptions0) for s in local if isinstance(s, sp.Symbol)}
    tensors: dict[Expr, Expr] = {
        s: symbol(f"{s.name}_{half.name}", s.nrows, s.ncols, s.role, s.rank, s.family, s.props)
        for s in local
        if isinstance(s, Sym)
    }

    def moved(value: Expr | sp.Expr) -> Expr | sp.Expr:
        if isinstance(value, Expr):
            return substitute(substitute_scalars(value, numbers), tensors)
        return swap(value, numbers)

    def target(s: Sym | sp.Symbol) -> Sym | sp.Symbol:
        return cast(Sym, tensors.get(s, s)) if isinstance(s, Sym) else numbers.get(s, s)

    def assign(a: Assign) -> Assign:
        return _renoted(replace(a, target=target(a.target), value=moved(a.value)))

    return replace(
        step,
        definitions=tuple(map(assign, step.definitions)),
        states=tuple(State(target(s.symbol), moved(s.start), swap(s.scale, numbers)) for s in step.states),
        assigns=tuple(map(assign, step.assigns)),
    )


# --- the frame of an iteration: norm, start, repetitions, gauge, output -----------------------------------------------


def _framed(
    half: Half, step: Step, z: Sym, v: Sym, scope: Scope, entry: Sym | None, alone: bool = True
) -> tuple[Step, list[Departure]]:
    """The iteration with what comes before and after it. z: the block's variable, v: the problem's; alone: as in `_part`."""
    block, record = half.block, half.scheme.normalise
    raw, inner = state_of(v), state_of(z)
    departures: list[Departure] = []
    assigns: list[Assign] = []
    entered: Expr = raw
    if record is not None and record.when == "before":
        entered = normalised(record, raw)
        departures.append(_norm_departure(half, record, v))
    if entry is not None:
        assigns.append(Assign(entry, entered, "" if entered is raw else f"{entry.name} <- {text(entered)}"))
        entered = entry
    own = next((s.start for s in step.states if s.symbol is inner), zeros(*z.shape))  # a declared block has no states
    start = _start(half, z, v, entered, as_expr(own), scope) if block is not None else entered
    if half.scheme.gauge is not None:
        _one_assignment(half, step, block.steps if block is not None else 1)
    goes_on = z is v and start in (entered, raw)
    numbers = {a.target for a in step.assigns}
    scaled = [s for s in step.states if s.scale.free_symbols & numbers]
    step, now, opening, closing = _carried(step, inner, start, goes_on, still=alone and record is None)
    assigns += opening
    repeated, said = _repeated(half, step, scaled, now, start, raw, scope, goes_on)
    assigns += [*repeated, *closing]
    departures += said
    if block is not None and block.output is not None:
        place = half.place("output")
        value = as_expr(parse(block.output, scope, place))
        if value.shape != v.shape:
            raise SpecError(
                "E131",
                f"the output is {show_shape(value.shape)}, {v.name} is {show_shape(v.shape)}",
                place(0, len(block.output)),
            )
        value = substitute(value, {z: inner, v: raw})
        assigns.append(Assign(raw, value, f"{v.name} <- {text(value)}"))
    assigns, noted = _with_noise(half, assigns, raw)
    departures += noted
    if record is not None and record.when == "after":
        value = normalised(record, raw)
        departures.append(_norm_departure(half, record, v))
        assigns.append(Assign(raw, value, f"{v.name} <- {text(value)}"))
    return replace(step, assigns=tuple(assigns)), departures


def _carried(
    step: Step, inner: Sym, start: Expr, goes_on: bool, still: bool
) -> tuple[Step, dict[Expr, Expr], list[Assign], list[Assign]]:
    """(the step with the states that it keeps from layer to layer, what others are read as at first, assignments before and after).

    inner: the variable, which begins at `start`.  goes_on: its iteration goes on where the layer before left it; else all starts
    anew, as the variable does.  still: nothing changes the variable in between; else a state that started at the variable moves
    with it: what is kept is how far it is ahead.
    """
    before: list[Assign] = []
    after: list[Assign] = []
    kept: list[State] = []
    now: dict[Expr, Expr] = {inner: start}
    hidden = [s for s in step.states if s.symbol is not inner]
    for s in hidden:
        if goes_on and (still or s.start is not inner or not isinstance(s.symbol, Sym)):
            kept.append(s)
        elif goes_on:
            y, ahead = cast(Sym, s.symbol), state_of(inner, f"{s.symbol.name}_ahead")
            kept.append(State(ahead, zeros(*inner.shape)))
            before.append(Assign(y, add(start, ahead), f"moves with {inner.name}"))
            after.append(Assign(ahead, add(y, scale(-1, inner)), ""))
        elif isinstance(s.symbol, Sym):
            now[s.symbol] = substitute(as_expr(s.start), {inner: start})
        else:
            before.append(Assign(s.symbol, s.start, ""))
    names = ", ".join(s.symbol.name for s in hidden)
    notes = (f"{names}: {'kept from layer to layer' if kept else 'anew in every layer'}",) if hidden else ()
    own = tuple(s for s in step.states if s.symbol is inner)
    return replace(step, states=(*own, *kept), notes=(*step.notes, *notes)), now, before, after


def _repeated(
    half: Half,
    step: Step,
    scaled: list[State],
    now: dict[Expr, Expr],
    start: Expr,
    raw: Sym,
    scope: Scope,
    goes_on: bool,
) -> tuple[list[Assign], list[Departure]]:
    """The assignments of a step as often as its block takes it. scaled: states that are multiples of numbers which change from one to the
    next.  now: what states are read as until they are assigned."""
    count = half.block.steps if half.block is not None else 1
    assigns: list[Assign] = []
    departures: list[Departure] = []
    for k in range(count):
        iteration = {LAYER: count * LAYER + k if goes_on else sp.Integer(k)}
        for a in rescaled(step.assigns, scaled, opens=k > 0, closes=k < count - 1):
            if isinstance(a.value, Expr):
                value = substitute(substitute_scalars(a.value, iteration), now)
            else:
                value = swap(a.value, iteration)
            if half.scheme.gauge is not None and isinstance(value, Expr) and isinstance(a.target, Sym):
                value, said = _gauged(half, half.scheme.gauge, value, start, raw, scope)
                departures += said if k == 0 else []
            assigns.append(_renoted(replace(a, value=value)))
            if isinstance(a.target, Sym):
                now.pop(a.target, None)
    return assigns, departures


def _with_noise(half: Half, assigns: list[Assign], raw: Sym) -> tuple[list[Assign], list[Departure]]:
    """Dropout and drop path on what the block adds to the variable."""
    written = [(kind, getattr(half.scheme, kind)) for kind in ("dropout", "drop_path")]
    asked = [(kind, text, _rate(half, kind)) for kind, text in written if text.strip() != "0"]
    if not asked:
        return assigns, []
    at = max(i for i, a in enumerate(assigns) if a.target is raw)
    value = as_expr(assigns[at].value)
    terms = value.terms if isinstance(value, Add) else (value,)
    carried, moved = [t for t in terms if split(t)[1] is raw], [t for t in terms if split(t)[1] is not raw]
    if not carried or not moved:
        kind = asked[0][0]
        raise SpecError(
            "E310",
            f"{kind} leaves out what a block adds to its variable; this block carries nothing over",
            half.spec.key_where(*half.path, kind),
            "gauge: {residual: 1}, or an output such as Z + D @ A",
        )
    update = add(*moved)
    for kind, _, rate in asked:
        update = noise(kind, rate, update)
    fresh = _renoted(replace(assigns[at], value=add(*carried, update)))
    said = [
        Departure(kind, half.name, "choice", f"{text.strip()} of the update, while training") for kind, text, _ in asked
    ]
    return [*assigns[:at], fresh, *assigns[at + 1 :]], said


def _rate(half: Half, kind: str) -> sp.Expr:
    place, scope = half.place(kind), half.problem.scope
    layers = cast(int, cast(Unroll, half.spec.unroll).layers)
    value = parse(
        getattr(half.scheme, kind), replace(scope, names={**scope.names, "layer": LAYER, "layers": LAYERS}), place
    )
    value = value.subs(LAYERS, layers) if not isinstance(value, Expr) else value
    most = None if isinstance(value, Expr) or value.free_symbols - {LAYER} else value.subs(LAYER, layers - 1)
    if most is None or not 0 <= most < 1:
        raise SpecError(
            "E205",
            f"{kind} is a share from 0 up to but not including 1, a function of the layer at most",
            place(0, 1),
            "drop_path: 0.1 * layer / layers",
        )
    return cast(sp.Expr, value)


def normalised(record: Normalise, e: Expr) -> Expr:
    return normalise(record.kind, 0 if record.axis == "columns" else 1, record.eps, e)


def _norm_departure(half: Half, record: Normalise, v: Sym) -> Departure:
    what = "columns" if record.axis == "columns" else "rows"
    return Departure(
        "normalise", half.name, "choice", f"{record.kind} of the {what} of {v.name} {record.when} the step"
    )


def _start(half: Half, z: Sym, v: Sym, entered: Expr, own: Expr, scope: Scope) -> Expr:
    """Where the iteration of a block begins. own: where its algorithm does, by itself."""
    block = half.block
    assert block is not None
    if block.start is None:
        return entered if z is v else own
    place = half.place("start")
    value = parse(block.start, scope, place)
    e = constant(value, *z.shape) if not isinstance(value, Expr) else value
    if e.shape != z.shape:
        raise SpecError(
            "E131", f"the start is {show_shape(e.shape)}, {z.name} is {show_shape(z.shape)}", place(0, len(block.start))
        )
    if z in e.symbols and z is not v:
        raise SpecError("E310", f"the start of {z.name} depends on {z.name}", place(0, len(block.start)))
    return substitute(e, {v: state_of(v)})


def _one_assignment(half: Half, step: Step, count: int) -> None:
    if count > 1 or sum(isinstance(a.target, Sym) for a in step.assigns) > 1:
        raise SpecError(
            "E310",
            "a gauge weighs the parts of one step; this block takes several",
            half.spec.key_where(*half.path, "gauge"),
            "gauge needs steps: 1 and an algorithm without memory",
        )


def _gauged(half: Half, gauge: Gauge, value: Expr, start: Expr, raw: Sym, scope: Scope) -> tuple[Expr, list[Departure]]:
    """a z + c B -> residual z + update B, inside the prox where there is one."""
    if isinstance(value, Prox):
        inside, said = _gauged(half, gauge, value.at, start, raw, scope)
        return prox(value.term, value.variable, value.t, inside, value.swaps), said
    terms = value.terms if isinstance(value, Add) else (value,)
    carried = [t for t in terms if split(t)[1] is start]
    rest = [t for t in terms if split(t)[1] is not start]
    said: list[Departure] = []
    kept: list[Expr] = list(carried)
    moved = add(zeros(*value.shape), *rest)
    if gauge.residual is not None:
        weight = _weight(half, "residual", gauge.residual, scope, raw)
        kept = [_weighed(weight, raw)]
        was = text(add(zeros(*value.shape), *carried))
        said.append(Departure("gauge", half.name, "choice", f"residual: {text(kept[0])} in place of {was}"))
    if gauge.update is not None:
        c, body = _common(moved)
        moved = _weighed(_weight(half, "update", gauge.update, scope, raw), body)
        said.append(Departure("gauge", half.name, "choice", f"update: {gauge.update} in place of {c}"))
    return add(zeros(*value.shape), *kept, moved), said


def _weight(half: Half, key: str, written: str, scope: Scope, like: Sym) -> Value:
    place = half.place("gauge", key)
    value = parse(written, scope, place)
    if isinstance(value, Expr) and value.shape not in ((like.rows, sp.Integer(1)), (sp.Integer(1), sp.Integer(1))):
        hint = f"a number, or a vector of {like.rows} entries"
        raise SpecError("E131", f"{key}: {written} is {show_shape(value.shape)}", place(0, len(written)), hint)
    weighed = _weighed(value, like)
    for call in half.calls(scope):
        if call.rewrite.rest is not None and call.rewrite.rest(weighed, **call.values, values={}) is not weighed:
            hint = "put it into step: , where the rewrite sees it"
            raise SpecError("E309", f"{key}: {written} is not what {call.text} leaves", place(0, len(written)), hint)
    return value


def _weighed(weight: Value, e: Expr) -> Expr:
    return elementwise(slot(0) * slot(1), weight, e) if isinstance(weight, Expr) else scale(weight, e)


def _common(e: Expr) -> tuple[sp.Expr, Expr]:
    """(c, B) with e = c B: the coefficient of its only term, or what all of its terms share."""
    if not isinstance(e, Add):
        return split(e)
    coefs = [split(t)[0] for t in e.terms]
    c = coefs[0]
    if not all((k / c).is_number for k in coefs):
        c = common_factor(coefs)
    return c, scale(1 / c, e)


# --- schedules --------------------------------------------------------------------------------------------------------


def _scheduled(step: Step, problem: Problem, spec: Spec, unrolled: Unroll) -> Step:
    """Scalars that are functions of the layer, put in."""
    if not unrolled.schedule:
        return step
    values: dict[sp.Symbol, sp.Expr] = {}
    known = {s.name: s for s in problem.scalars}
    for name, written in unrolled.schedule.items():
        place = place_of(spec, "unroll", "schedule", name)
        if name not in known:
            raise SpecError(
                "E310",
                f"'{name}' is not a scalar",
                spec.key_where("unroll", "schedule", name),
                did_you_mean(name, known),
            )
        value = parse(
            written, replace(problem.scope, names={**problem.scope.names, "layer": LAYER, "layers": LAYERS}), place
        )
        if isinstance(value, Expr):
            raise SpecError(
                "E132",
                f"a schedule is a number in each layer; {written} is {show_shape(value.shape)}",
                place(0, len(written)),
            )
        values[known[name]] = value.subs(LAYERS, unrolled.layers) if isinstance(unrolled.layers, int) else value

    def put(a: Assign) -> Assign:
        value = substitute_scalars(a.value, values) if isinstance(a.value, Expr) else swap(a.value, values)
        return _renoted(replace(a, value=value))

    inside, once = algorithms.where_known([put(a) for a in step.definitions], set())
    step = replace(step, definitions=tuple(once), assigns=(*inside, *map(put, step.assigns)))
    return _without_descent(step)  # every layer has an objective of its own


def affine_norms(spec: Spec) -> dict[str, bool]:
    """Block -> has its norm a weight and bias to learn?"""
    unrolled = spec.unroll
    assert unrolled is not None
    schemes = {b.block: b.normalise for b in unrolled.blocks} if unrolled.blocks else {"": unrolled.normalise}
    return {name: record is not None and record.affine and record.kind != "sphere" for name, record in schemes.items()}
