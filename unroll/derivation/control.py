"""Controllers: a recurrent cell that gives numbers of the step for each sample, from other numbers, anew in each layer.

    lstm    i, f, o: sigmoid, g: tanh of  sum of w_r r over what it reads + U h + b;   c <- f c + i g,   h <- o tanh(c)
    gives   link(dot(w, relu(V c + v)) + b), link as the number is kept in bounds; w starts at 0, b where the link gives what is replaced

A cell that reads vectors as large as the variable is one for each entry: its state is a column for each, its weights are those of all entries, and what it
gives stands in the place of updates that are one number in every entry.

All of it is said in formulas, so that what is derived, emitted and traced is one step as any other. Weights are shared by all layers.
Source: Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, gates as in PyTorch; the way out: Behrens et al. 2021, arXiv:2010.15440.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import sympy as sp

from unroll.calculus.cones import nonnegative
from unroll.calculus.torch_text import nonzero
from unroll.derivation.learning import Wanted, names_in, number_of, put, read, without_unused
from unroll.derivation.step import Assign, Learned, State, Step
from unroll.errors import SpecError
from unroll.language.constructors import as_constant, elementwise, matmul, ones, symbol, transpose, zeros
from unroll.language.functions import Value, as_expr
from unroll.language.nodes import Expr, Map, Sym, scalar, show_shape, slot
from unroll.language.parse import Scope, parse
from unroll.language.problem import Problem, place_of
from unroll.language.traversal import transform
from unroll.spec import Spec
from unroll.spec.schema import Block, Control, Learn

CELLS: dict[str, dict[str, str]] = {
    "lstm": {"cell": "sigmoid(f) * cell + sigmoid(i) * tanh(g)", "hidden": "sigmoid(o) * tanh(cell)"},
}
"""Cell -> its states, each with its update, from top to bottom; other names are gates. What it gives is read off the first."""
UNIFORM = 1 / math.sqrt(3)
"""Of a uniform draw between -1/sqrt(hidden) and 1/sqrt(hidden), in parts of a standard deviation 1/sqrt(hidden)."""


def controlled(step: Step, problem: Problem, spec: Spec) -> Step:
    """The step with the cells of its controllers in it. Raises SpecError E305, E306 (what is read or given), E310."""
    unrolled = spec.unroll
    assert unrolled is not None
    blocks = ((b.block, ("unroll", "blocks", i), b) for i, b in enumerate(unrolled.blocks))
    for block, path, scheme in (("", ("unroll",), unrolled), *blocks):
        if scheme.control is not None:
            at = (*path, "control")
            if isinstance(scheme, Block) and scheme.steps > 1:
                hint = "leave out steps:, or take more layers"
                raise SpecError("E310", "a controller gives its numbers once in a layer", spec.key_where(*at), hint)
            step = _Cell(scheme.control, step, problem, spec, block, at).into()
    return step


@dataclass
class _Cell:
    """One controller. names: what its own words mean.  made: its assignments.  learned, states: what it adds.  entries: how many cells there are."""

    record: Control
    step: Step
    problem: Problem
    spec: Spec
    block: str
    path: tuple[str | int, ...]
    names: dict[str, Value] = field(default_factory=dict[str, Value])
    made: list[Assign] = field(default_factory=list[Assign])
    learned: list[Learned] = field(default_factory=list[Learned])
    states: list[State] = field(default_factory=list[State])
    entries: sp.Expr = sp.S.One

    def into(self) -> Step:
        record, cell = self.record, CELLS[self.record.cell]
        size = sp.Integer(record.hidden)
        reads = [self._value(i) for i in range(len(record.reads))]
        self.entries = next((e.rows for e in reads if not e.is_scalar), sp.S.One)
        for i, e in enumerate(reads):
            self._read(i, e)
        for name in cell:
            start = self._free(f"{name}_start", size, init="value")
            self.states.append(State(self._vector(name), matmul(start, ones(1, self.entries))))
        gates = sorted({str(s) for f in cell.values() for s in _words(f)} - {*cell})
        for gate in gates:
            for k in range(len(reads)):
                self._free(f"{gate}_{k + 1}", size)
            self._free(f"{gate}_hidden", size, size)
            self._free(f"{gate}_bias", size)
        sums = {g: " + ".join(f"{g}_{k + 1} * read_{k + 1}" for k in range(len(reads))) for g in gates}
        for gate in gates:
            self._assign(gate, f"{sums[gate]} + {gate}_hidden @ hidden + {gate}_bias")
        for name, formula in cell.items():
            self._assign(name, formula)
        self._free("out", size, size)
        self._free("out_bias", size)
        self._assign("way_out", f"pos(out @ {next(iter(cell))} + out_bias)")
        step = self.step
        for name in record.gives:
            step = self._gives(name, step, size)
        says = f"{', '.join(record.gives)} given by {record.cell} of {size}"
        self.learned = [replace(p, cell=says) for p in self.learned]
        first = next(i for i, a in enumerate(step.assigns) if a.block == self.block or not self.block)
        made = tuple(replace(a, block=step.assigns[first].block) for a in self.made)
        return without_unused(
            replace(
                step,
                states=(*step.states, *self.states),
                assigns=(*step.assigns[:first], *made, *step.assigns[first:]),
                learned=(*step.learned, *self.learned),
            )
        )

    def _called(self, word: str) -> str:
        """The name of a word of the cell in the step. Raises SpecError E306 where it is taken."""
        name = f"control_{self.block}_{word}" if self.block else f"control_{word}"
        if name in self.problem.scope.names or any(p.name == name for p in self.step.learned):
            where = self.spec.key_where(*self.path)
            raise SpecError("E306", f"'{name}' is a name of the controller", where, "choose another name for yours")
        return name

    def _vector(self, word: str) -> Sym:
        s = symbol(self._called(word), self.record.hidden, self.entries, "state", 1 if self.entries == 1 else 2)
        self.names[word] = s
        return s

    def _free(self, word: str, *shape: sp.Expr, init: str = "uniform") -> Sym:
        """A weight that all layers share: drawn as those of torch.nn.LSTMCell and Linear are, or 0."""
        name = self._called(word)
        e = zeros(*shape, *([sp.Integer(1)] * (2 - len(shape))))
        s = symbol(name, *e.shape, "learned", len(shape))
        self.learned.append(Learned(name, s, e, shape, False, init=init, scale=UNIFORM))
        self.names[word] = s
        return s

    def _assign(self, word: str, formula: str) -> None:
        """A line of the cell: a state gets its new value, another word lives for the layer."""
        value = as_expr(parse(formula, Scope(self.names, broadcast=True)))
        kept = self.names.get(word) if word in CELLS[self.record.cell] else None
        self.made.append(Assign(kept if isinstance(kept, Sym) else self._vector(word), value, ""))

    def _value(self, i: int) -> Expr:
        """What the cell reads: a number, or one for each entry. Raises SpecError E131, E306."""
        written, place = self.record.reads[i], place_of(self.spec, *self.path, "reads", i)
        scope = replace(self.problem.scope, names=names_in(self.step, self.problem, self.block))
        e = as_expr(parse(written, scope, place))
        if not e.is_scalar and e.shape not in {(z.rows, sp.S.One) for z in self.problem.variables}:
            raise SpecError(
                "E131",
                f"a controller reads numbers, or vectors as large as the variable; {written.strip()} is {show_shape(e.shape)}",
                place(0, len(written)),
            )
        late = {a.target for a in self.step.assigns} - {s.symbol for s in self.step.states}
        if found := sorted(str(getattr(s, "name", s)) for s in (*e.symbols, *e.scalars) if s in late):
            hint = "write out what it stands for, in the variable as it comes in"
            raise SpecError(
                "E306", f"{found[0]} is worked out after the controller has read", place(0, len(written)), hint
            )
        return transform(e, _divided)

    def _read(self, i: int, e: Expr) -> None:
        name = self._called(f"read_{i + 1}")
        s = scalar(name) if e.is_scalar else symbol(name, *e.shape, "state", 1)
        self.names[f"read_{i + 1}"] = transpose(s) if isinstance(s, Sym) else s
        self.made.append(Assign(s, e, ""))

    def _gives(self, name: str, step: Step, size: sp.Expr) -> Step:
        """The number of that name in its place. Raises SpecError E305, E306."""
        record = self.record.gives[name]
        path = (*self.path, "gives", name)
        taken = {p.name for p in (*step.learned, *self.learned)} | {*self.problem.scope.names}
        if double := next((n for n in (name, f"{name}_weight", f"{name}_bias") if n in taken), None):
            where = self.spec.key_where(*path)
            raise SpecError(
                "E306", f"'{double}' is already the name of something else", where, "choose another name for the number"
            )
        as_learned = Learn.model_validate({**record.model_dump(by_alias=True, exclude_none=True), "share": "layers"})
        wanted = read(name, as_learned, self.step, self.problem, self.spec, self.block, path)
        if self.entries != 1:
            return self._gives_entries(wanted, step, size)
        if isinstance(wanted.value, Expr):
            hint = "learn it; a controller gives step sizes, thresholds and other numbers"
            raise SpecError("E306", f"{name} takes the place of a matrix", wanted.where, hint)
        step = put(step, wanted)
        p, kept = step.learned[-1], step.learned[:-1]
        assert isinstance(p.symbol, sp.Symbol)
        value = self._way_out(p, size)
        self.made.append(Assign(p.symbol, value, f"{name}: for {p.text.strip()}"))
        return replace(step, learned=kept)

    def _gives_entries(self, wanted: Wanted, step: Step, size: sp.Expr) -> Step:
        """The update of that name with the value of each entry. Raises SpecError E306."""
        named, within = wanted.record.replaces.strip(), wanted.record.in_
        places = [i for i, a in enumerate(step.assigns) if a.update == named == within and a.block in ("", self.block)]
        a = step.assigns[places[0]] if len(places) == 1 else None
        number = as_constant(a.value) if a is not None and isinstance(a.value, Expr) else None
        if a is None or number is None or not isinstance(a.target, Sym) or a.target.shape != (self.entries, 1):
            hint = f"an update p: 1 + 0 * z of the text, and {wanted.name}: {{replaces: p, in: p}}"
            says = f"{wanted.name} takes the place of no update that is one number in every entry"
            raise SpecError("E306", says, wanted.where, hint)
        p = number_of(replace(wanted, value=number, start=None))
        value = transpose(self._way_out(p, size))
        fresh = replace(a, value=value, note=f"{wanted.name}: for {named}, in each entry")
        return replace(step, assigns=(*step.assigns[: places[0]], fresh, *step.assigns[places[0] + 1 :]))

    def _way_out(self, p: Learned, size: sp.Expr) -> Expr:
        """The link of a free combination of what leaves the cell: a number, or a row of one for each entry."""
        name = p.name
        weight = Learned(
            f"{name}_weight", symbol(f"{name}_weight", size, 1, "learned", 1), zeros(size, 1), (size,), False
        )
        bias = scalar(f"{name}_bias")
        start = _unlinked(p, p.starts_at)
        self.learned += [weight, Learned(bias.name, bias, start, (), False, text=f"{p.text}, before its link")]
        out = f"dot({weight.name}, way_out)" if self.entries == 1 else f"{weight.name}.T @ way_out"
        words = Scope({**self.names, weight.name: weight.symbol, "bias": bias}, broadcast=True)
        return elementwise(_link(p), as_expr(parse(f"{out} + bias", words)))


def _divided(e: Expr) -> Expr | None:
    """A size divided by is 1 where it is 0: what a sample that is blank gives is a number then."""
    if not isinstance(e, Map):
        return None
    sizes = {
        p: elementwise(p.base, *e.args) for p in e.profile.atoms(sp.Pow) if p.exp.is_negative and p.base.free_symbols
    }
    guarded = {p: nonzero(p.base) ** p.exp for p, size in sizes.items() if nonnegative(size)}
    return elementwise(e.profile.xreplace(guarded), *e.args) if guarded else None


def _words(formula: str) -> set[str]:
    """The names in a formula that are no functions."""
    tree = ast.parse(formula, mode="eval")
    calls = {x.func.id for x in ast.walk(tree) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)}
    return {x.id for x in ast.walk(tree) if isinstance(x, ast.Name)} - calls


def _link(p: Learned) -> sp.Expr:
    """From any number to one within the bounds."""
    u, low, high = slot(0), *map(sp.nsimplify, p.limits)
    match p.constraint:
        case "positive":
            return sp.log(1 + sp.exp(u))
        case "exp":
            return sp.exp(u)
        case "sigmoid":
            return low + (high - low) / (1 + sp.exp(-u))
        case "clamp":
            return sp.Max(u, low) if high.is_infinite else sp.Min(sp.Max(u, low), high)
        case _:
            return u


def _unlinked(p: Learned, value: Expr | sp.Expr) -> Expr | sp.Expr:
    """What the link makes `value` of."""
    u, low, high = slot(0), *map(sp.nsimplify, p.limits)
    inverse: Mapping[str, sp.Expr] = {
        "positive": u + sp.log(1 - sp.exp(-u)),
        "exp": sp.log(u),
        "sigmoid": sp.log((u - low) / (high - u)),
    }
    f = inverse.get(p.constraint, u)
    return elementwise(f, value) if isinstance(value, Expr) else f.subs(u, value)
