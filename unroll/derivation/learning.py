"""Learning: a free parameter takes the place of a derived sub-expression and starts at its value.

    structural   the sub-expression stands in the step as it is (its transpose too): step * A.T in z + step * A.T @ (x - A @ z)
    algebraic    it is there once products are expanded: I - step * A.T @ A in z - step * A.T @ A @ z + step * A.T @ x
    scalar       a product of scalars in a coefficient or in the derived prox: step * lam in the threshold

What is not found is an error that shows the step, never a parameter that does nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import sympy as sp

from unroll.calculus.prox import derive as derive_prox
from unroll.derivation import learned_functions
from unroll.derivation.algorithms import LIPSCHITZ, MOMENTUM, STEP, state_of
from unroll.derivation.blocks import affine_norms
from unroll.derivation.rewrites.frequencies import circulant_block
from unroll.derivation.rewrites.record import Applied
from unroll.derivation.rewrites.rewriting import rewritten
from unroll.derivation.signs import needs_sign
from unroll.derivation.step import DRAWN, LAYER, Assign, Constraint, Departure, Learned, Step
from unroll.errors import DeriveError, SpecError, Where, did_you_mean
from unroll.language.constructors import (
    add,
    as_constant,
    constant,
    elementwise,
    eye,
    family_sum,
    is_symmetric,
    matmul,
    member,
    normalise,
    ones,
    operator,
    prox,
    rebuild,
    rename_index,
    scale,
    split,
    swap,
    symbol,
    transpose,
    zeros,
)
from unroll.language.functions import Value, as_expr
from unroll.language.nodes import (
    ONE,
    STEP_OF_ENTRY,
    Add,
    Expr,
    Eye,
    FamilySum,
    Map,
    Mul,
    Noise,
    Normalise,
    Op,
    Project,
    Prox,
    ProxMap,
    Signal,
    Sym,
    bound_indices,
    free_indices,
    scalar,
    show_shape,
    walk,
)
from unroll.language.parse import Place, Scope, parse, parse_member
from unroll.language.problem import Problem, place_of
from unroll.language.show import text
from unroll.language.traversal import expand, substitute, substitute_scalars, transform
from unroll.spec import Spec
from unroll.spec.schema import Learn, Rank

PLACES = ("gradient", "prox", "output")
"""Where an occurrence may be: in the gradient step (all that is fed to the prox), in the prox itself, or first of all factors."""

Word = tuple[Expr, ...]
ANY = "*"
"""Index of frequencies in a pattern: no name that a spec can write."""


@dataclass(frozen=True)
class Wanted:
    """One entry of `learn:`, read. index, size: of a family, of which `value` is the member `index`.

    rewrites: the exact ones of its block.  sizes: where `value` is the block at one frequency, an index of its own, of a matrix that
    commutes with cyclic shifts: its axes of places. The parameter is then `kernel`, the first columns of that matrix, real.
    start: what it starts at instead.  fan_in: of a draw.  rows: how many there are of a number that is repeated.  variable: of its block.
    """

    name: str
    record: Learn
    value: Value
    where: Where
    block: str
    index: str = ""
    size: sp.Expr | None = None
    rewrites: tuple[Applied, ...] = ()
    sizes: tuple[sp.Expr, ...] = ()
    kernel: Expr | None = None
    start: Value | None = None
    fan_in: sp.Expr | None = None
    rows: sp.Expr | None = None
    variable: Sym | None = None

    def rewritten(self) -> Wanted:
        """The entry as the exact rewrites of its block make it, if they do."""
        if not isinstance(self.value, Expr):
            return self
        value = rewritten(self.value, self.rewrites)
        c, body = split(value)
        match body:
            case Op("shifts", kernel, False, sizes) if (block := circulant_block(body, sizes, ANY)) is not None:
                return replace(self, value=scale(c, block), sizes=sizes, kernel=scale(c, kernel))
            case _:
                return self if value is self.value else replace(self, value=value)

    @property
    def low_rank(self) -> int | None:
        """Of the change that is learned, where the rest stays."""
        return self.record.shape.rank if isinstance(self.record.shape, Rank) else None

    def at(self, index: str, frequency: str) -> Expr:
        """The pattern for other names of its indices."""
        assert isinstance(self.value, Expr)
        e = rename_index(self.value, self.index, index) if self.index else self.value
        return rename_index(e, ANY, frequency)

    def parameter(self, s: Sym, index: str, frequency: str) -> Expr:
        """What takes its place, s the parameter."""
        own = member(s, index) if self.index else s
        if self.low_rank is not None:
            factors = (f if f.family is None else member(f, index) for f in _factors(self, s))
            own = add(own, matmul(*factors))
        block = circulant_block(operator("shifts", own, sizes=self.sizes), self.sizes, frequency) if self.sizes else own
        assert block is not None
        return block


def parametrise(step: Step, problem: Problem, spec: Spec) -> Step:
    """The step with learned parameters in place. Raises SpecError E305 (not found), E306 (a constraint that does not apply)."""
    unrolled = spec.unroll
    assert unrolled is not None
    schemes = [
        ("", ("unroll",), unrolled),
        *((b.block, ("unroll", "blocks", i), b) for i, b in enumerate(unrolled.blocks)),
    ]
    entries = [
        (name, record, block, (*path, "learn", name))
        for block, path, scheme in schemes
        for name, record in scheme.learn.items()
    ]
    asked = [_function(*entry, step, problem, spec) for entry in entries if entry[1].function is not None]
    wanted = [read(n, r, step, problem, spec, block, path) for n, r, block, path in entries if r.function is None]
    _once([*asked, *wanted], step, spec)
    for f in asked:  # what starts at derived steps takes them whole
        step = learned_functions.put(step, f)
        _has_start(f.name, f.record, step.learned[-1].starts_at, step, f.where)
    for w in sorted(
        wanted, key=lambda w: (w.record.where is not None, _size(w)), reverse=True
    ):  # what is larger takes its words first
        step = put(step, w)
    step = _affine(step, spec)
    for block, path, scheme in schemes:
        for name in scheme.keep:
            step = replace(
                step, learned=(*step.learned, _kept(name, step, problem, spec, block, (*path, "keep", name)))
            )
    for block, path, scheme in schemes:
        for name in scheme.estimate:
            step = _estimated(step, problem, spec, block, (*path, "estimate", name))
    order = [name for name, *_ in entries]
    rank = {name: i for i, name in enumerate(order)}
    _refuse_idle_sharing(step, spec)
    learned = tuple(sorted(step.learned, key=lambda p: rank.get(p.name.removesuffix("_bias"), len(order))))
    return without_unused(replace(step, learned=learned))


def _refuse_idle_sharing(step: Step, spec: Spec) -> None:
    """Raises SpecError E306 where no layer is left to share what others have of their own, or nothing to share."""
    unrolled = spec.unroll
    if unrolled is None or unrolled.free is None:
        return
    where, own = spec.key_where("unroll", "free"), [p for p in step.learned if p.per_layer]
    if isinstance(unrolled.layers, int) and unrolled.free >= unrolled.layers:
        hint = f"layers: {unrolled.free + 1} or more, or leave out free"
        raise SpecError(
            "E306", f"{unrolled.free} of {unrolled.layers} layers are free: none is left that shares", where, hint
        )
    if not own:
        raise SpecError("E306", "no layer has learned numbers of its own", where, "leave out free, or share: layers")
    if any(p.constructed for p in own):
        raise SpecError(
            "E306", "what data decide is worked out layer by layer: no layers share it", where, "leave out free"
        )


def _once(wanted: list[Wanted | learned_functions.Asked], step: Step, spec: Spec) -> None:
    """Every parameter has a name of its own: not that of another, of a weight of a norm, or of what any block works out."""
    taken = {a.target.name for a in (*step.definitions, *step.assigns)} | {s.symbol.name for s in step.states}
    taken |= {
        f"{block}_norm_{part}".removeprefix("_")
        for block, has in affine_norms(spec).items()
        if has
        for part in ("weight", "bias")
    }
    for w in wanted:
        own = {w.name, *([f"{w.name}_bias"] if w.record.bias else [])}
        own |= {f"{w.name}_{end}" for end in UP_AND_DOWN} if isinstance(w.record.shape, Rank) else set()
        if own & taken:
            raise SpecError(
                "E306",
                f"'{min(own & taken)}' is already the name of something else",
                w.where,
                "choose another name for the parameter",
            )
        taken |= own


def _affine(step: Step, spec: Spec) -> Step:
    """Weight and bias of every norm that has them, starting at 1 and 0."""
    affine, learned = affine_norms(spec), list(step.learned)

    def freed(a: Assign) -> Assign:
        if not affine.get(a.block) or not isinstance(a.value, Expr):
            return a
        prefix = f"{a.block}_norm" if a.block else "norm"

        def rule(e: Expr) -> Expr | None:
            if not isinstance(e, Normalise):
                return None
            n = e.shape[e.axis]
            free = [symbol(f"{prefix}_{part}", n, 1, "learned") for part in ("weight", "bias")]
            starts = (ones(n), zeros(n))
            known = {p.name for p in learned}
            learned.extend(
                Learned(s.name, s, v, (n,), True, text=text(v))
                for s, v in zip(free, starts, strict=True)
                if s.name not in known
            )
            weight, bias = free if e.axis == 0 else map(transpose, free)
            return normalise(e.kind, e.axis, e.eps, e.x, weight, bias)

        value = transform(a.value, rule)
        return a if value is a.value else replace(a, value=value, note=_note(replace(a, value=value)))

    assigns = tuple(map(freed, step.assigns))
    return replace(step, assigns=assigns, learned=tuple(learned))


def _estimated(step: Step, problem: Problem, spec: Spec, block: str, path: tuple[str | int, ...]) -> Step:
    """An input that is not known when the network runs, replaced by a formula of what is."""
    name, where = str(path[-1]), spec.key_where(*path)
    given = next((s for s in problem.inputs if s.name == name), None)
    if given is None:
        raise SpecError(
            "E306", f"'{name}' is not an input", where, did_you_mean(name, [s.name for s in problem.inputs])
        )
    scope = replace(problem.scope, names={**names_in(step, problem, block), **{p.name: p.symbol for p in step.learned}})
    written = cast(str, spec.at(*path))
    value, index, size = parse_member(written, scope, place_of(spec, *path))
    e = rewritten(as_expr(value), _exact(step, block))
    if e.shape != given.shape or size != given.family:
        hint = "a family is estimated member by member: f(C[k]) for k in K" if given.family is not None else ""
        raise SpecError(
            "E131", f"the estimate of {name} is {show_shape(e.shape)}, {name} is {show_shape(given.shape)}", where, hint
        )

    def put(a: Assign) -> Assign:
        if not isinstance(a.value, Expr) or (block and a.block != block) or given not in a.value.symbols:
            return a
        swaps: dict[Expr, Expr] = (
            {member(given, i): rename_index(e, index, i) for i in _indices(a.value)}
            if given.family is not None
            else {given: e}
        )
        fresh = substitute(a.value, swaps)
        return replace(a, value=fresh, note=_note(replace(a, value=fresh)))

    early = [a.value for a in step.definitions] + [s.start for s in step.states]
    if any(isinstance(e, Expr) and given in e.symbols for e in early):
        hint = "an estimate is made anew in each layer, from the state"
        raise SpecError("E306", f"{name} cannot be estimated: it is read before the first layer", where, hint)
    assigns = tuple(map(put, step.assigns))
    if assigns == step.assigns:
        raise SpecError("E305", f"the step does not read {name}, so there is nothing to estimate", where)
    said = Departure("estimate", block, "heuristic", f"{name} is estimated by {written.strip()}")
    return replace(step, assigns=assigns, departures=(*step.departures, said), estimated=(*step.estimated, name))


def _kept(name: str, step: Step, problem: Problem, spec: Spec, block: str, path: tuple[str | int, ...]) -> Learned:
    """A quantity that takes the place of nothing: it is worked out on data, for estimates."""
    names, written = names_in(step, problem, block), cast(str, spec.at(*path))
    if name in names or name in {p.name for p in step.learned}:
        raise SpecError(
            "E306", f"'{name}' is already the name of something else", spec.key_where(*path), "choose another name"
        )
    value, _, size = parse_member(written, replace(problem.scope, names=names), place_of(spec, *path))
    e = as_expr(value)
    rank = 0 if e.is_scalar else 1 if e.cols == 1 else 2
    return Learned(
        name,
        symbol(name, *e.shape, "learned", rank, size),
        e,
        e.shape[:rank],
        True,
        "none",
        written,
        "data",
        constructed=True,
    )


def _indices(e: Expr) -> list[str]:
    """All indices of families in e, bound or free."""
    return sorted(bound_indices(e) | free_indices(e))


def _repeated(name: str, record: Learn, problem: Problem, z: Sym, where: Where) -> sp.Expr | None:
    """How often a number is repeated, over the entries of the variable of its block or over groups of them. Raises SpecError E306."""
    sizes = {**{d.name: d for d in problem.dims}, **{str(d): d for d in z.shape}}
    if isinstance(record.shape, Rank) or not record.shape:
        return None
    shape = [sizes.get(str(n), sp.Integer(n) if isinstance(n, int) else None) for n in record.shape]
    if len(shape) != 1 or shape[0] is None or (record.fixed and shape != [z.rows]):
        raise _another_shape(name, z, where)
    return shape[0]


def _another_shape(name: str, z: Sym, where: Where) -> SpecError:
    entry = "entry" if z.cols == 1 else "row"
    hint = f"shape: [{z.rows}] gives every {entry} of {z.name} its own; the number of groups, where it weighs the lengths of groups, each group"
    return SpecError("E306", f"the shape of {name} is not that of {z.name}", where, hint)


def names_in(step: Step, problem: Problem, block: str) -> dict[str, Value]:
    """What names mean in a block: states in the place of variables, the numbers of its algorithm, what it defines."""
    own = {
        s.name: s
        for a in step.assigns
        if a.block == block and isinstance(a.value, Expr)
        for s in (a.target, *a.value.symbols)
        if isinstance(s, Sym)
    }
    states = {s.name: s for z in problem.variables for s in [state_of(z)]}
    suffix = f"_{block}" if block else ""
    numbers = {s.name: scalar(s.name + suffix, positive=True) for s in (STEP, LIPSCHITZ)}
    momentum = {MOMENTUM.name: scalar(MOMENTUM.name + suffix)}
    worked_out = {
        a.target.name.removesuffix(suffix): a.target
        for a in (*(d for d in step.definitions if d.target.name.endswith(suffix)), *step.assigns)
        if isinstance(a.target, sp.Symbol) and a.block in ("", block)
    }
    return {**own, **worked_out, **problem.scope.names, **states, **numbers, **momentum, "layer": LAYER}


def read(
    name: str, record: Learn, step: Step, problem: Problem, spec: Spec, block: str, path: tuple[str | int, ...]
) -> Wanted:
    """An entry of `learn:`; path: where it stands in the spec. Raises SpecError E306, E307."""
    names = names_in(step, problem, block)
    where = spec.key_where(*path)
    z = next((p.variables[0] for b, p in step.subproblems if b == block), problem.variables[0])
    rows = _repeated(name, record, problem, z, where)
    if name in names:
        raise SpecError(
            "E306", f"'{name}' is already the name of something else", where, "choose another name for the parameter"
        )
    scope, place = replace(problem.scope, names=names), place_of(spec, *path, "replaces")
    family = names.get(record.replaces.strip())
    index, size = "", None
    if isinstance(family, Sym) and family.family is not None:  # the whole family by its name
        value, index, size = cast(Value, member(family, "k")), "k", family.family
    else:
        value, index, size = parse_member(record.replaces, scope, place)
        value = as_expr(value) if size is not None else value
    if isinstance(value, Expr) and (c := as_constant(value)) is not None and value.is_scalar:
        value = c
    if not isinstance(value, Expr) and value.is_number:
        raise SpecError(
            "E306",
            f"{name} takes the place of a number, {value}, which has no place of its own in a step",
            where,
            "name the scalar or the product that it belongs to",
        )
    momentum = names[MOMENTUM.name]
    if momentum in (value.scalars if isinstance(value, Expr) else value.free_symbols) and any(
        a.target == momentum for a in step.assigns
    ):
        hint = "learn the step or a matrix; momentum follows its schedule"
        raise SpecError(
            "E307", "learning the momentum is not built yet: it starts at another value in each layer", where, hint
        )
    if record.where is not None and record.where not in PLACES:
        raise SpecError(
            "E306",
            f"'{record.where}' is not a place in a step",
            spec.key_where(*path, "where"),
            f"places: {', '.join(PLACES)}",
        )
    if record.in_ is not None and record.where is not None and record.where != "output":
        raise SpecError(
            "E306", f"{name} says twice where it stands", spec.key_where(*path, "where"), "leave out 'where'"
        )
    if record.fixed and record.start is None:
        raise SpecError(
            "E306",
            f"{name} is fixed at what it replaces: nothing changes",
            spec.key_where(*path, "fixed"),
            "say its start",
        )
    start = _own_start(name, record, as_expr(value), scope, place_of(spec, *path, "start"))
    fan_in = _fan_in(name, record, problem, place_of(spec, *path, "fan_in"), where)
    if record.bias and record.where != "output":
        raise SpecError(
            "E306",
            f"{name} can have a bias only where it is the first factor",
            spec.key_where(*path, "bias"),
            "add where: output, or put a vector into the objective",
        )
    at_value = spec.origin(*path, "replaces").where()
    found = Wanted(
        name,
        record,
        value,
        at_value,
        block,
        index,
        size,
        _exact(step, block),
        start=start,
        fan_in=fan_in,
        rows=rows,
        variable=z,
    )
    if found.low_rank is not None:
        _refuse_rank(found, problem, spec.key_where(*path, "shape"))
    return found


UP_AND_DOWN = ("up", "down")
NOT_OF_A_RANK = ("positive", "bounds", "symmetric", "columns", "fixed")


def _refuse_rank(w: Wanted, problem: Problem, where: Where) -> None:
    """Raises SpecError E306 for what has no change of low rank: numbers, vectors, what is kept within bounds, and what has no more rank."""
    if not isinstance(w.value, Expr) or 1 in w.value.shape:
        raise SpecError("E306", f"{w.name} is no matrix: it has no rank", where, "leave out shape")
    most = min(
        (int(n) for n in (swap(n, _known_sizes(problem)) for n in w.value.shape) if n.is_Integer), default=math.inf
    )
    if w.low_rank is not None and w.low_rank >= most:
        message = f"a change of {w.name} of rank {w.low_rank} is any change: its rank is {most} at most"
        raise SpecError("E306", message, where, "leave out shape, or say a lower rank")
    said = [word for word in NOT_OF_A_RANK if getattr(w.record, word)]
    said += ["init"] if w.record.init == "data" else []
    if said:
        message = f"a change of low rank keeps nothing of what '{said[0]}' says of {w.name}"
        raise SpecError("E306", message, where, f"leave out shape, or {said[0]}")


def _known_sizes(problem: Problem) -> dict[sp.Symbol, sp.Integer]:
    return {d: sp.Integer(n) for d, n in problem.dims.items() if isinstance(n, int)}


def _factors(w: Wanted, s: Sym) -> tuple[Sym, Sym]:
    """Up and down: (rows, r) and (r, columns), of each member of a family."""
    r = sp.Integer(w.low_rank or 0)
    up, down = (f"{w.name}_{end}" for end in UP_AND_DOWN)
    return symbol(up, s.rows, r, "learned", 2, w.size), symbol(down, r, s.cols, "learned", 2, w.size)


NOT_OF_FUNCTIONS = (
    "start",
    "positive",
    "bounds",
    "init",
    "fixed",
    "symmetric",
    "columns",
    "bias",
    "transposed",
    "where",
)
"""What may not be said of a function."""


def _function(
    name: str, record: Learn, block: str, path: tuple[str | int, ...], step: Step, problem: Problem, spec: Spec
) -> learned_functions.Asked:
    """An entry of `learn:` with a function. Raises SpecError E306."""
    names, where = names_in(step, problem, block), spec.key_where(*path)
    if name in names:
        raise SpecError(
            "E306", f"'{name}' is already the name of something else", where, "choose another name for the parameter"
        )
    said = [word for word in NOT_OF_FUNCTIONS if word in record.model_fields_set]
    if said:
        raise SpecError("E306", f"{name} is a function, of which '{said[0]}' says nothing", where, "leave it out")
    pattern = None
    if record.replaces.strip() != "prox":
        scope = replace(problem.scope, names={"u": learned_functions.ENTRY, **names})
        pattern = parse(record.replaces, scope, place_of(spec, *path, "replaces"))
        if not (isinstance(pattern, Map) and len(pattern.args) == 1):
            hint = "prox, or a formula of one number: tanh(u)"
            raise SpecError(
                "E306", f"{name} cannot be a function in the place of {record.replaces.strip()}", where, hint
            )
    return learned_functions.Asked(name, record, pattern, spec.origin(*path, "replaces").where(), block)


def _own_start(name: str, record: Learn, value: Expr, scope: Scope, place: Place) -> Value | None:
    """What a parameter starts at instead of what it replaces. Raises SpecError E131, E306."""
    if record.start is None:
        return None
    if record.init != "value":
        raise SpecError("E306", f"{name} has two starts, start: and init:", place(0, 1), "leave out one of them")
    found = parse(record.start, scope, place)
    moving = sorted(s.name for s in as_expr(found).symbols if s.role != "parameter")
    if moving:
        raise SpecError(
            "E306", f"the start of {name} depends on {moving[0]}: it has no value before the network runs", place(0, 1)
        )
    c = as_constant(as_expr(found))
    if c is not None and not value.is_scalar:
        return constant(c, *value.shape)
    if as_expr(found).shape != value.shape:
        raise SpecError(
            "E131",
            f"the start of {name} is {show_shape(as_expr(found).shape)}, what it replaces is {show_shape(value.shape)}",
            place(0, len(record.start)),
        )
    return c if c is not None else found


def _fan_in(name: str, record: Learn, problem: Problem, place: Place, where: Where) -> sp.Expr | None:
    """How many numbers an output of a drawn map adds: a formula of sizes. Raises SpecError E306."""
    if record.fan_in is None:
        return None
    if record.init not in DRAWN:
        raise SpecError("E306", f"fan_in is of a draw, and {name} is not drawn", where, "init: uniform, or gaussian")
    sizes = {d.name: d for d, n in problem.dims.items() if n != "dynamic"}
    found = as_constant(as_expr(parse(record.fan_in, problem.scope, place)))
    if (
        found is None
        or not {str(s) for s in found.free_symbols} <= sizes.keys()
        or swap(found, _known_sizes(problem)).is_positive is False
    ):
        hint = f"sizes: {', '.join(sizes)}" if sizes else "there is no size that is a number"
        raise SpecError("E306", f"the fan_in of {name} is a number of entries: a formula of sizes", place(0, 1), hint)
    return found


def _exact(step: Step, block: str) -> tuple[Applied, ...]:
    """The exact rewrites of a block, through which entries and estimates are read too."""
    found = (d.applied for d in step.departures if d.block == block and d.kind == "exact")
    return tuple(a for a in found if a is not None and a.rewrite.stage == "step")


def _size(w: Wanted) -> tuple[int, int]:
    if not isinstance(w.value, Expr):
        return (0, len(w.value.free_symbols))
    words = _words(w.value)
    return (len(words), max(len(f) for _, f in words))


def put(step: Step, w: Wanted) -> Step:
    """The step with the parameter in place, last of `learned`. Raises SpecError E305 where neither the entry as written nor as rewritten occurs."""
    other = w.rewritten()
    found = _replaced(step, w) or (_replaced(step, other) if other is not w else None)
    if found is None:
        body = "; ".join(
            f"{_name(a.target)} = {text(expand(a.value) if isinstance(a.value, Expr) else a.value)}"
            for a in step.assigns
            if not w.block or a.block == w.block
        )
        raise SpecError(
            "E305", f"{w.record.replaces.strip()} does not occur in the step" + (f" ({w.record.where})" if w.record.where else ""), w.where,
            "it must be a sub-expression of the step, up to expanding products", (f"the step: {body}",),
        )  # fmt: skip
    return found


def _replaced(step: Step, w: Wanted) -> Step | None:
    """The step with the parameter in place; a number is kept positive where that needs its sign. Raises SpecError E306."""
    found = _swapped(step, w)
    s = found.learned[-1].symbol if found is not None and not w.record.fixed and not isinstance(w.value, Expr) else None
    needed = needs_sign(found, s) if found is not None and isinstance(s, sp.Symbol) and not s.is_positive else None
    if needed is not None:
        if w.record.positive is not None or w.record.bounds is not None:
            a, e = needed
            raise SpecError(
                "E306",
                f"{w.name} may be negative, and the proximal step of {text(e.term)} in the update of {_name(a.target)} is right for positive ones alone",
                w.where,
                f"leave out {'positive: false' if w.record.bounds is None else 'bounds'}: it is then kept positive; or bounds: clamp(0)",
            )
        found = _swapped(step, replace(w, record=w.record.model_copy(update={"positive": True})))
    if found is not None and w.rows is not None and not w.record.fixed:
        return _placed(found, w)
    return found


def _placed(step: Step, w: Wanted) -> Step:
    """The step, a repeated number being one of each entry, or of each group where it stands before lengths of groups alone.

    Raises SpecError E306 where a number of each entry would be that of what several entries share, or one of each group would stand elsewhere.
    """
    assert w.variable is not None and w.rows is not None
    s = step.learned[-1].symbol
    steps = [e for a in step.assigns if isinstance(a.value, Expr) for e in walk(a.value) if isinstance(e, Prox)]
    found = [(e, x) for e in steps for x in walk(_derived(e)) if isinstance(x, ProxMap) and s in x.prox.scalars]
    shared = [e for e, x in found if x.rows != w.rows]
    if shared and len(shared) == len(found) and all(x.shape == (ONE, w.rows) for _, x in found):
        if any(s in _numbers_outside(a.value) for a in step.assigns):
            hint = "leave out shape, or name the update of the proximal step: in"
            raise SpecError(
                "E306", f"{w.name} cannot be of each group: it stands outside a proximal step too", w.where, hint
            )
        return replace(step, learned=(*step.learned[:-1], replace(step.learned[-1], across=True)))
    if w.rows != w.variable.rows:
        raise _another_shape(w.name, w.variable, w.where)
    if shared:
        what = f"in the proximal step of {text(shared[0].term)} several entries share one"
        raise SpecError(
            "E306", f"{w.name} cannot be of each entry: {what}", w.where, "leave out shape, or give each group its own"
        )
    return step


def _numbers_outside(value: Expr | sp.Expr) -> set[sp.Basic]:
    """The numbers that a value reads, but for those that only proximal steps in it read."""
    if not isinstance(value, Expr):
        return {*value.free_symbols}
    plain = transform(value, lambda e: e.at if isinstance(e, Prox) else None)
    return {s for x in walk(plain) for s in _scalars(x)}


def _swapped(step: Step, w: Wanted) -> Step | None:
    learned = _learned(w)

    def swap(value: Expr | sp.Expr) -> Expr | sp.Expr:
        if not isinstance(w.value, Expr):
            return _swap_scalar(value, w, learned[0])
        found = _swap_matrix(value, w, learned[0])
        if not w.record.fixed or not isinstance(found, Expr):
            return found
        return substitute(found, {cast(Sym, learned[0].symbol): as_expr(cast(Value, w.start))})

    mine: Callable[[Assign], bool] = lambda a: (not w.block or a.block == w.block) and w.record.in_ in (None, a.update)
    assigns = tuple(replace(a, value=swap(a.value)) if mine(a) else a for a in step.assigns)
    at_start = w.record.in_ == "start"
    states = tuple(replace(s, start=swap(s.start)) if at_start else s for s in step.states)
    if w.record.in_ is None and w.record.where is None and not isinstance(w.value, Expr):
        own = {a.target for a in step.assigns if mine(a)}
        states = tuple(replace(s, scale=swap(s.scale)) if s.symbol in own else s for s in states)
    before, after = (
        [*(a.value for a in step.assigns), *(s.start for s in step.states)],
        [*(a.value for a in assigns), *(s.start for s in states)],
    )
    if all(x is y or x == y for x, y in zip(before, after, strict=True)):
        return None
    _has_start(w.name, w.record, w.value, step, w.where)
    assigns = tuple(replace(a, note=_note(a)) for a in assigns)
    kept = () if w.record.fixed else learned
    return replace(
        step, assigns=assigns, states=states, learned=(*step.learned, *kept), departures=(*step.departures, *_said(w))
    )


def _said(w: Wanted) -> Iterable[Departure]:
    """A start of its own is a choice."""
    if w.record.start is not None:
        what = f"{w.record.replaces.strip()} becomes" if w.record.fixed else f"{w.name} starts at"
        yield Departure(
            "start", w.block, "choice", f"{what} {' '.join(w.record.start.split())}: not derived from the objective"
        )


def _name(target: Sym | sp.Symbol) -> str:
    return target.name


def _note(a: Assign) -> str:
    return f"{_name(a.target)} <- {text(a.value)}" if a.note and isinstance(a.value, Expr) else a.note


def _read_by(value: Value, step: Step) -> set[Sym | sp.Basic]:
    """Every symbol that a value is made of, those of the numbers it reads among them: of a step 1/L, what L is made of."""
    numbers = (a for a in step.assigns if not isinstance(a.target, Sym))
    defined = {_name(a.target): a.value for a in (*step.definitions, *numbers)}
    found, todo = set[Sym | sp.Basic](), [value]
    while todo:
        e = todo.pop()
        numbers_of = set[sp.Symbol]().union(*map(_scalars, walk(e))) if isinstance(e, Expr) else e.free_symbols
        new = {*(e.symbols if isinstance(e, Expr) else ()), *numbers_of} - found
        found |= new
        todo += [defined[name] for s in new if (name := str(getattr(s, "name", s))) in defined]
    return found


def _has_start(name: str, record: Learn, value: Value, step: Step, where: Where) -> None:
    """What a parameter takes the place of has a value before the network runs, or the spec says where its start comes from."""
    moving = {s.symbol.name for s in step.states} | {a.target.name for a in step.assigns if isinstance(a.target, Sym)}
    numbers = {s: _name(s) for s in (x.target for x in step.assigns) if isinstance(s, sp.Symbol)}
    numbers |= {STEP_OF_ENTRY: "the step of each entry"}
    read = _read_by(value, step)
    vectors = [s for s in read if isinstance(s, Sym)]
    depends_on = sorted(s.name for s in vectors if (s.role == "state" and s.name in moving) or s.role == "input")
    depends_on += sorted(said for s, said in numbers.items() if s in read)
    if depends_on and record.init == "value" and record.start is None:
        hint = "init: data works it out on data, layer by layer; or draw its start, as init: gaussian"
        if record.function is not None:
            hint = (
                "a function starts at what it replaces: all that is in that has to be known when the network is set up"
            )
        raise SpecError(
            "E306",
            f"{name} takes the place of something that depends on {depends_on[0]}: it has no value to start at",
            where,
            hint,
        )
    if record.init == "data" and record.share != "none":
        raise SpecError(
            "E306", f"{name} is worked out layer by layer, so layers cannot share it", where, "leave out 'share'"
        )


def number_of(w: Wanted) -> Learned:
    """The number that an entry is about, with its bounds."""
    return _learned(w)[0]


def _learned(w: Wanted) -> tuple[Learned, ...]:
    """The parameter, and its bias if it has one."""
    record, value = w.record, w.value if w.kernel is None else w.kernel
    per_layer = record.share == "none" and record.in_ != "start"
    if not isinstance(value, Expr):
        shape = () if w.rows is None else (w.rows,)
        s = scalar(w.name, positive=record.positive or _limits(w)[0] >= 0)
        return (
            Learned(
                w.name,
                s,
                value,
                shape,
                per_layer,
                _constraint(w),
                record.replaces,
                record.init,
                record.scale,
                where=record.where or record.in_ or "",
                own_start=w.start,
                limits=_limits(w),
                fan_in=w.fan_in,
            ),
        )
    if record.shape is not None and w.low_rank is None:
        raise SpecError(
            "E306", f"{w.name} takes the place of a matrix; its shape is that matrix's", w.where, "leave out 'shape'"
        )
    rank = 0 if value.is_scalar else 1 if value.cols == 1 else 2
    known = (
        {"positive"} if record.positive or _limits(w)[0] >= 0 else set[str]()
    )  # a weight in a prox has to have a sign
    s = symbol(w.name, *value.shape, "learned", rank, w.size, known)
    found = Learned(
        w.name,
        s,
        value,
        value.shape[:rank],
        per_layer,
        _constraint(w),
        record.replaces,
        record.init,
        record.scale,
        record.init == "data",
        record.where or record.in_ or "",
        w.start,
        _limits(w),
        held=w.low_rank is not None,
        fan_in=w.fan_in,
    )
    if w.low_rank is not None:
        if w.kernel is not None:
            raise SpecError("E306", f"{w.name} is one filter: it has no rank", w.where, "leave out shape")
        up, down = _factors(w, s)
        about = f"a change of rank {w.low_rank} of {w.name}"
        found = (
            found,
            Learned(
                up.name, up, zeros(*up.shape), up.shape, per_layer, text=f"{about}, its first factor", init="zeros"
            ),
            Learned(
                down.name,
                down,
                zeros(*down.shape),
                down.shape,
                per_layer,
                text=f"{about}, its second factor",
                init="gaussian",
            ),
        )
    else:
        found = (found,)
    if not record.bias:
        return found
    n = value.rows
    return *found, Learned(
        f"{w.name}_bias", symbol(f"{w.name}_bias", n, 1, "learned"), zeros(n), (n,), per_layer, text=f"zeros({n})"
    )


BOUNDS = re.compile(r"\s*(softplus|exp|sigmoid|clamp|box)\s*(?:\(([^()]*)\))?\s*")
COUNTS = {"softplus": 0, "exp": 0, "sigmoid": 2, "clamp": 1, "box": 2}


def _bounded(w: Wanted) -> tuple[Constraint, tuple[float, float]]:
    """`bounds:` read: what keeps the parameter, and between which numbers. Raises SpecError E306."""
    written = str(w.record.bounds)
    found = BOUNDS.fullmatch(written)
    hint = "softplus, exp, sigmoid(0, 2), clamp(0), box(0, 1)"
    try:
        numbers = [float(x) for x in (found[2] or "").split(",") if x.strip()] if found else []
    except ValueError:
        found, numbers = None, []
    if found is None or len(numbers) != COUNTS[found[1]] or any(math.isnan(x) for x in numbers):
        raise SpecError("E306", f"'{written}' is no bound of {w.name}", w.where, hint)
    low, high = numbers[0] if numbers else 0.0, numbers[1] if len(numbers) > 1 else math.inf
    if low >= high or (found[1] == "sigmoid" and not math.isfinite(high - low)):
        raise SpecError("E306", f"{w.name} has no room between {low:g} and {high:g}", w.where, hint)
    kind: dict[str, Constraint] = {"softplus": "positive", "exp": "exp", "sigmoid": "sigmoid"}
    return kind.get(found[1], "clamp"), (low, high)


def _limits(w: Wanted) -> tuple[float, float]:
    return _bounded(w)[1] if w.record.bounds is not None else (-math.inf, math.inf)


def _constraint(w: Wanted) -> Constraint:
    record, value = w.record, w.value
    said: dict[Constraint, bool] = {
        "positive": bool(record.positive),
        "symmetric": record.symmetric,
        "unit_columns": record.columns == "unit",
    }
    asked: list[Constraint] = [constraint for constraint, holds in said.items() if holds]
    if record.bounds is not None:
        asked.append(_bounded(w)[0])
    if asked and asked[-1] in ("exp", "sigmoid", "clamp") and record.init != "value":
        raise SpecError("E306", f"{w.name} has bounds, and a start that is drawn", w.where, "say its start: start: 0.1")
    if len(asked) > 1:
        raise SpecError("E306", f"{w.name} has two constraints, {' and '.join(asked)}; one can be kept", w.where)
    match asked:
        case ["symmetric"] if not isinstance(value, Expr) or value.rows != value.cols or value.is_scalar:
            raise SpecError("E306", f"{w.name} cannot be symmetric: it is not a square matrix", w.where)
        case ["unit_columns"] if not isinstance(value, Expr) or value.rows == 1:
            raise SpecError("E306", f"{w.name} has no columns: it is a number or a row", w.where)
        case ["positive"] if record.init == "zeros":
            raise SpecError("E306", f"{w.name} cannot be positive: it starts at 0", w.where)
        case ["positive"] if not isinstance(value, Expr) and value.is_nonpositive:
            raise SpecError("E306", f"{w.name} cannot be positive: it starts at {value}", w.where)
        case _:
            return asked[0] if asked else "none"


# --- matrices ---------------------------------------------------------------------------------------------------------


def _swap_matrix(value: Expr | sp.Expr, w: Wanted, learned: Learned) -> Expr | sp.Expr:
    assert isinstance(w.value, Expr) and isinstance(learned.symbol, Sym)
    if not isinstance(value, Expr):
        return value
    into, place, both = learned.symbol, w.record.where, w.record.transposed

    def pairs(e: Expr) -> list[tuple[Expr, Expr]]:
        """(pattern, parameter), for every name that the index of a family, or that of frequencies, has in e."""
        names = _indices(e) if w.index else [""]
        frequencies = sorted({x.index for x in walk(e) if isinstance(x, Signal)}) if w.sizes else [""]
        return [(w.at(i, f), w.parameter(into, i, f)) for i in names for f in frequencies if i != f or not i]

    def taken(e: Prox) -> Expr:
        """What is fed to the prox, up to algebra; in the term that the prox belongs to, as it stands there."""
        at, term = inside(e.at), e.term
        for pattern, parameter in pairs(term) if place in (None, "prox") else ():
            term = structural(term, pattern, parameter, both)
        return prox(term, e.variable, e.t, at, e.swaps) if term is e.term else _derivable(e, term, at, w)

    def around(e: Expr) -> Expr:
        if place == "prox":
            return e
        if place == "output":
            return outermost(e, pairs(e), symbol(f"{w.name}_bias", into.rows, 1, "learned") if w.record.bias else None)
        for pattern, parameter in pairs(e):
            found = structural(e, pattern, parameter, both)
            e = algebraic_within(e, pattern, parameter, both) if found is e and not w.index else found
        return e

    def inside(e: Expr) -> Expr:
        return _apart(e, around, taken)

    return inside(value)


def _apart(e: Expr, around: Callable[[Expr], Expr], taken: Callable[[Prox], Expr]) -> Expr:
    """e with its outermost proximal steps changed by `taken`, and by `around` what they stand in."""
    names = dict[Prox, Sym]()
    memo = dict[Expr, Expr]()

    def cut(x: Expr) -> Expr:
        if isinstance(x, Prox):
            return names.setdefault(x, symbol(f"_prox{len(names)}", *x.shape, "state"))
        if x not in memo:
            memo[x] = rebuild(x, tuple(map(cut, x.children)))
        return memo[x]

    left = around(cut(e))
    return substitute(left, {s: taken(p) for p, s in names.items()})


def _derivable(e: Prox, term: Expr, at: Expr, w: Wanted) -> Expr:
    """The prox of the term with a parameter in it. Raises SpecError E306 where the step of that prox cannot be derived."""
    try:
        derive_prox(term, e.variable, e.t, at, e.swaps)
    except DeriveError as failed:
        signs = "" if w.record.positive else "positive: true keeps its entries above 0; "
        raise SpecError(
            "E306",
            f"with {w.name} in the place of {w.record.replaces.strip()} the prox of {text(e.term)} cannot be derived: {failed.message}",
            w.where,
            f"{signs}where: gradient, if it occurs there, leaves the prox as it is",
        ) from None
    return prox(term, e.variable, e.t, at, e.swaps)


def outermost(e: Expr, pairs: list[tuple[Expr, Expr]], bias: Sym | None) -> Expr:
    """The pattern replaced where it is the first factor of a term; `bias` is added there, once for a whole family."""
    match e:
        case Add(terms):
            return add(*(outermost(t, pairs, bias) for t in terms))
        case FamilySum(i, n, body):
            inner = outermost(body, pairs, None)
            return e if inner is body else _biased(family_sum(i, n, inner), bias)
        case Map() | Noise():
            return rebuild(e, tuple(outermost(a, pairs, bias) for a in e.children))
        case Mul(c, (first, *rest)):
            for pattern, into in pairs:
                k, body = split(pattern)
                factors = body.factors if isinstance(body, Mul) else (body,)
                if e.factors[: len(factors)] == factors and _divides(k, c):
                    return _biased(scale(c / k, matmul(into, *e.factors[len(factors) :])), bias)
            if not rest or first.is_scalar:
                return scale(c, outermost(first, pairs, bias)) if not rest else e
            return e
        case _:
            return next((_biased(into, bias) for pattern, into in pairs if e is pattern), e)


def _biased(e: Expr, bias: Sym | None) -> Expr:
    """A x + b in every column."""
    return e if bias is None else add(e, matmul(bias, ones(1, e.cols)))


def structural(e: Expr, pattern: Expr, into: Expr, both: bool = True) -> Expr:
    """Every occurrence of `pattern` as it is written, and (both) transposed, replaced by `into`."""
    swaps = [(pattern, into)] + ([] if is_symmetric(pattern) or not both else [(transpose(pattern), transpose(into))])

    def rule(node: Expr) -> Expr | None:
        for p, x in swaps:
            if node is p:
                return x
            if isinstance(node, Mul) and (found := _in_product(node, p, x)) is not None:
                return rule(found) or found
        return None

    return transform(e, rule)


def _in_product(node: Mul, pattern: Expr, into: Expr) -> Expr | None:
    """c * ... F1 F2 ... with the factors of the pattern in a row, and its coefficient in c."""
    c, body = split(pattern)
    factors = body.factors if isinstance(body, Mul) else (body,)
    if c != 1 and _divides(c, node.coef):  # its coefficient stands before a linear map
        for i, f in enumerate(node.factors):
            inner = scale(node.coef, f.children[0]) if isinstance(f, FamilySum | Signal | Op) else None
            found = _in_product(inner, pattern, into) if isinstance(inner, Mul) else None
            if found is not None:
                return matmul(*node.factors[:i], rebuild(f, (found,)), *node.factors[i + 1 :])
    if isinstance(body, Eye):
        if c == 1 or not _divides(c, node.coef) or node.rows != body.n:
            return None
        return matmul(into, *node.factors, coef=node.coef / c)
    if not _divides(c, node.coef):
        return None
    n = len(factors)
    for i in range(len(node.factors) - n + 1):
        if node.factors[i : i + n] == factors:
            return matmul(eye(node.rows), *node.factors[:i], into, *node.factors[i + n :], coef=node.coef / c)
    return None


def _divides(c: sp.Expr, coef: sp.Expr) -> bool:
    """Is coef = c * (something without the symbols of c)?"""
    return not cast(sp.Expr, sp.cancel(coef / c)).free_symbols & c.free_symbols


def _words(e: Expr) -> list[tuple[sp.Expr, Word]]:
    """The terms of an expanded matrix polynomial: coefficient and factors; the identity is the empty word."""
    out: list[tuple[sp.Expr, Word]] = []
    whole = expand(e)
    for t in whole.terms if isinstance(whole, Add) else (whole,):
        c, body = split(t)
        out.append((c, () if isinstance(body, Eye) else body.factors if isinstance(body, Mul) else (body,)))
    return out


def algebraic(e: Expr, pattern: Expr, into: Expr, both: bool = True) -> Expr:
    """Division of matrix polynomials: sum of a * P w_i S over the words w_i of the pattern becomes a * P @ into @ S."""
    words = _words(pattern)
    if len(words) < 2:  # one product: it is there once e is expanded, or not at all
        flat = expand(e)
        found_in = structural(flat, pattern, into, both)
        return e if found_in is flat else found_in
    lead_c, lead = max(words, key=lambda cw: len(cw[1]))
    terms = dict((f, c) for c, f in _words(e))
    found = list[Expr]()
    for whole, c in list(terms.items()):
        for i in range(len(whole) - len(lead) + 1):
            if whole[i : i + len(lead)] != lead or whole not in terms:
                continue
            a, before, after = cast(sp.Expr, sp.cancel(c / lead_c)), whole[:i], whole[i + len(lead) :]
            if not _divides(lead_c, c):
                continue
            needed = {(*before, *w, *after): a * k for k, w in words}
            if all(sp.expand(terms.get(f, sp.Integer(0)) - k) == 0 for f, k in needed.items()):
                for f in needed:
                    del terms[f]
                found.append(matmul(eye(e.rows), *before, into, *after, coef=a))
    if not found:
        return e
    rest = [scale(c, matmul(*f) if f else eye(e.rows)) for f, c in terms.items()]
    return add(*found, *rest)


def algebraic_within(e: Expr, pattern: Expr, into: Expr, both: bool = True) -> Expr:
    """`algebraic` of e as a whole, and of every whole polynomial inside its functions: pos(z - A @ z) becomes pos(W @ z)."""

    def functions(x: Expr) -> Expr:
        inner = functions if isinstance(x, Add | Mul) else lambda a: algebraic_within(a, pattern, into, both)
        return rebuild(x, tuple(map(inner, x.children)))

    return algebraic(functions(e), pattern, into, both)


# --- scalars ----------------------------------------------------------------------------------------------------------


def _swap_scalar(value: Expr | sp.Expr, w: Wanted, learned: Learned) -> Expr | sp.Expr:
    assert isinstance(w.value, sp.Expr) and isinstance(learned.symbol, sp.Symbol)
    old, place = w.value, w.record.where
    new = cast(sp.Symbol, w.start) if w.record.fixed else learned.symbol
    if not isinstance(value, Expr):
        return value.subs(old, new)

    def coefficient(c: sp.Expr) -> sp.Expr:
        if isinstance(c, sp.Add):
            return sp.Add(*map(coefficient, c.args))
        return (
            c.subs(old, new)
            if old.is_Symbol
            else c / old * new
            if _divides(old, c) and old.free_symbols <= c.free_symbols
            else c
        )

    def rule(node: Expr) -> Expr | None:
        match node:
            case Mul(c, factors) if place != "prox":
                return matmul(*factors, coef=coefficient(c))
            case Map(profile, args) if place != "prox":
                return elementwise(profile.subs(old, new), *args)
            case _:
                return None

    def taken(e: Prox) -> Expr:
        found = prox(e.term, e.variable, e.t, inside(e.at), e.swaps)
        return _swap_in_prox(found, old, new) if place != "gradient" else found

    def inside(e: Expr) -> Expr:
        return _apart(e, lambda x: transform(x, rule), taken)

    return inside(value)


def _swap_in_prox(e: Expr, old: sp.Expr, new: sp.Symbol) -> Expr:
    """The scalar replaced in the derived formula, if it is there: `step * lam` is the threshold of prox of step * lam * |.|_1."""
    assert isinstance(e, Prox)
    if old.is_Symbol:
        swaps = tuple((a.subs(old, new), b) for a, b in e.swaps)
        return prox(substitute_scalars(e.term, {old: new}), e.variable, e.t.subs(old, new), e.at, swaps)
    fresh = prox(e.term, e.variable, e.t, e.at, (*e.swaps, (old, new)))
    assert isinstance(fresh, Prox)
    if not any(_occurs(old, x) for x in walk(_derived(e))):
        return e
    return fresh if any(new in _scalars(x) for x in walk(_derived(fresh))) else e


def _derived(e: Prox) -> Expr:
    return derive_prox(e.term, e.variable, e.t, e.at, e.swaps).step


def _occurs(product: sp.Expr, e: Expr) -> bool:
    """Is the product a part of a product in the derived scalar prox of e, or among the numbers of a prox of the runtime?"""
    found = getattr(e, "prox", None)
    wanted = product.as_powers_dict()
    numbers = [split(p)[0] if isinstance(p, Expr) else p for p in e.params] if isinstance(e, Project) else []
    formulas = [*numbers, *(found.expressions() if found is not None else ())]
    factors = [m.as_powers_dict() for x in formulas for m in x.atoms(sp.Mul)]
    return any(all(f.get(base, 0) / power >= 1 for base, power in wanted.items()) for f in factors)


def _scalars(e: Expr) -> set[sp.Symbol]:
    found = getattr(e, "prox", None)
    return set(e.scalars) | (set(found.scalars) if found is not None else set())


# --- what is no longer needed -----------------------------------------------------------------------------------------


def used_scalars(e: Expr) -> set[sp.Symbol]:
    """Scalars of an expression, those of derived proxes in it included."""
    out: set[sp.Symbol] = set(e.scalars)
    for node in walk(e):
        if isinstance(node, Prox):
            step = derive_prox(node.term, node.variable, node.t, node.at, node.swaps).step
            own = set().union(*(_scalars(x) for x in walk(step)))
            out = (out - set(node.term.scalars) - node.t.free_symbols) | own | set(node.at.scalars)
    return out


def without_unused(step: Step) -> Step:
    """Assignments to numbers that nothing reads any more (a momentum counter once momentum is learned) are dropped."""
    read = set[sp.Basic]().union(*(used_scalars(a.value) for a in step.assigns if isinstance(a.value, Expr)))
    numbers = [a for a in step.assigns if isinstance(a.target, sp.Symbol)]
    for _ in numbers:  # what a number that is read needs is read too
        values = [a.value for a in numbers if a.target in read]
        read |= set[sp.Basic]().union(*(used_scalars(v) if isinstance(v, Expr) else v.free_symbols for v in values))
    kept = [a for a in step.assigns if isinstance(a.target, Sym) or a.target in read]
    targets = {a.target for a in kept}
    return replace(
        step,
        assigns=tuple(kept),
        states=tuple(s for s in step.states if isinstance(s.symbol, Sym) or s.symbol in targets),
    )
