"""A text read for one problem: what its names mean so far, and the assignments that they make."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.cones import nonnegative
from unroll.calculus.divergence import divergence, planned
from unroll.calculus.entropy import entropic, signed_parts
from unroll.calculus.gradient import gradient
from unroll.calculus.linear import Linear, hessian, least, square_of_norm
from unroll.calculus.majorise import tangent
from unroll.calculus.prox import conjugate_of_abs
from unroll.calculus.torch_text import above_zero, nonzero
from unroll.derivation.dealing import ARGMIN, ENTROPY, GRADIENT, MAJORANTS, PROX, USES, Dealt, Share, letters, placed
from unroll.derivation.parts import Part
from unroll.derivation.step import LAYER, Assign, Departure, Hand, Residuals, State, Step
from unroll.errors import DeriveError, SpecError, did_you_mean
from unroll.language.constructors import add, as_constant, constant, elementwise, hold, prox, scale, symbol, zeros
from unroll.language.functions import Value, as_expr
from unroll.language.nodes import Expr, Hold, Sym, depends, scalar, show_shape, slot
from unroll.language.parse import Condition, Place, Reader, Scope, nowhere, parse
from unroll.language.problem import Problem
from unroll.language.show import text as shown
from unroll.language.traversal import held_at, substitute, transform
from unroll.spec.schema import Free, Rule, Start
from unroll.spec.texts import Text

STEP, LIPSCHITZ = scalar("step", positive=True), scalar("L", positive=True)
MOMENTUM = scalar("momentum")
OWN_STEP = "1/L"


@dataclass(frozen=True)
class Options:
    """What a spec may ask of an algorithm; None, and what is not there, is the algorithm's own.

    split: letter -> terms.  numbers, updates, states: name -> formula, each at the place that `at` gives for (section, name).
    apart: updates that keep a line of their own, and a parameter that is put into them.
    """

    step: str = OWN_STEP
    momentum: str | None = None
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    numbers: Mapping[str, str] = field(default_factory=dict[str, str])
    updates: Mapping[str, str] = field(default_factory=dict[str, str])
    states: Mapping[str, Start] = field(default_factory=dict[str, Start])
    apart: Mapping[str, str] = field(default_factory=dict[str, str])
    place: Callable[..., Place] | None = None

    def at(self, *key: str) -> Place:
        return self.place(*key) if self.place is not None else nowhere


@dataclass(frozen=True)
class _Update:
    """One update as it will be read: its formula, and where that stands. own: it is the spec's; replaces: what it stands in the place of."""

    name: str
    formula: str
    place: Place
    replaces: _Update | None = None
    own: bool = False


class Reading:
    """A text read for a problem: what its names mean so far, and the assignments that they make."""

    def __init__(self, text: Text, problem: Problem, dealt: Dealt, options: Options) -> None:
        self.text, self.problem, self.dealt, self.options = text, problem, dealt, options
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
        self.states: list[State] = []
        self.assigns: list[Assign] = []
        self.last: dict[str, Sym | sp.Symbol] = {}
        self.written: set[str] = set()
        self.target = ""
        """The update that is being read."""
        self.rule, self.argument_of_rule = self._rule()

    # --- what a spec asks for ---

    def _rule(self) -> tuple[Rule | None, str]:
        """The rule of its momentum, and what stands in its brackets."""
        record = self.text.record
        if not record.momenta:
            return None, ""
        name = self.options.momentum or record.updates["momentum"]
        rule = record.momenta[name.split("(")[0]]
        if "(" not in name:
            return rule, ""
        if not rule.scalars:
            with_one = next((f"{k}(a)" for k, r in record.momenta.items() if r.scalars), "")
            hint = f"{with_one} has one" if with_one else ""
            raise DeriveError("E303", f"{name}: this momentum has no parameter", hint=hint)
        if not name.endswith(")"):
            raise DeriveError("E303", f"{name}: the bracket is not closed")
        return rule, name.split("(", 1)[1].removesuffix(")")

    def step(self) -> Step:
        record = self.text.record
        self._scalars_of_rule()
        for name, free in record.scalars.items():
            self._declare(name, free)
        for a, z in self.places.items():
            if a not in record.states:
                self.states.append(State(self.running[a], zeros(*z.shape)))
        for name, start in [*record.states.items(), *(self.rule.states.items() if self.rule else ())]:
            self._start(name, start)
        for name, start in self.options.states.items():
            self._start(name, start, own=False)
        for update in self._updates():
            self._update(update)
        residuals = self._residuals()
        values = [self._number(name, free) for name, free in record.scalars.items()]
        weights = tuple(
            Assign(name, substitute(w, {p.variable: self.at}), "weight") for p, (name, w) in self._weights()
        )
        assigns = self._tagged(tuple(self._short()))
        return Step(
            self.text.name,
            (*weights, *self.derived, *values),
            tuple(self.states),
            assigns,
            tuple(state_of(z) for z in self.problem.variables),
            (),
            tuple((*self.notes, *self._claims(), *self._said())),
            departures=tuple(self._departures()),
            blocks=tuple(dict.fromkeys(a.block for a in assigns if a.block)),
            hands=tuple(self._hands()),
            residuals=residuals,
        )

    def _tagged(self, assigns: tuple[Assign, ...]) -> tuple[Assign, ...]:
        """Of several variables: each assignment with the variable that it leads to, as if that were a block."""
        if len(self.places) == 1:
            return assigns
        names: dict[Sym | sp.Symbol, str] = {self.running[a]: z.name for a, z in self.places.items()}
        block = next(names[a.target] for a in reversed(assigns) if a.target in names)
        tagged: list[Assign] = []
        for a in reversed(assigns):
            block = names.get(a.target, block)
            tagged.append(replace(a, block=block))
        return tuple(reversed(tagged))

    def _weights(self) -> Iterable[tuple[Part, tuple[sp.Symbol, Expr]]]:
        for shares in self.dealt.values():
            for p in (p for s in shares if GRADIENT not in s.letter.uses for p in s.parts):
                if p.weight is not None:
                    yield p, p.weight

    def _hands(self) -> Iterable[Hand]:
        for share in (s for shares in self.dealt.values() for s in shares if s.e is not None):
            uses = share.letter.uses
            use = cast(Any, next((u for u in (GRADIENT, ARGMIN, PROX, ENTROPY) if u in uses), "majorant"))
            terms = tuple(dict.fromkeys(p.term for p in share.parts))
            e = add(*(p.e for p in share.parts)) if use == "gradient" else cast(Expr, share.e)
            operator = share.linear.e if share.linear is not None and not share.linear.is_identity else None
            for z in (v for _, v in share.places) if use == GRADIENT and operator is None else (share.variable,):
                block = "" if len(self.places) == 1 else z.name if operator is None else share.places[0][1].name
                yield Hand(share.letter.name, use, terms, e, z, operator, block)

    def _claims(self) -> Iterable[str]:
        parts = [p for shares in self.dealt.values() for s in shares for p in s.parts]
        majorised = [
            p for shares in self.dealt.values() for s in shares if s.letter.uses & {*MAJORANTS} for p in s.parts
        ]
        if (
            "monotone" in self.text.record.claims
            and self.options.step == OWN_STEP
            and not self.options.numbers
            and not self.options.updates
            and all(p in majorised or p.descended or p.is_set or (p.proximal and p.proximal.convex) for p in parts)
            and not any(p.holds for p in parts)
        ):
            yield "monotone: no step raises the objective"

    def _said(self) -> Iterable[str]:
        """How the terms were dealt out, where they could have been otherwise."""
        others = [x for x in self.letters.values() if GRADIENT not in x.uses]
        if len(others) < 2 and not any(x.operator for x in others):
            return
        for name, shares in self.dealt.items():
            terms = ", ".join(dict.fromkeys(p.term for s in shares for p in s.parts)) or "nothing"
            ks = [
                f"{member(s.letter.operator, i, shares)} z = {shown(s.linear.e)}"
                for i, s in enumerate(shares)
                if s.linear
            ]
            yield f"{name}: {terms}" + (f"; {', '.join(ks)}" if ks else "")

    def _departures(self) -> Iterable[Departure]:
        for name, formula in self.options.updates.items():
            yield Departure(
                "update", "", "choice", f"{name} becomes {' '.join(formula.split())}: not derived from the objective"
            )

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

    def _declare(self, name: str, free: Free) -> None:
        self.names[name] = scalar(self._numbered(name), positive=free.above is not None and free.above >= 0)

    def _scalars_of_rule(self) -> None:
        if self.rule is None:
            return
        for name, free in self.rule.scalars.items():
            written = self.argument_of_rule or free.start
            value = parse(written, Scope(), nowhere)
            if isinstance(value, Expr) or not value.is_number or (free.above is not None and value <= free.above):
                raise DeriveError(
                    "E303", f"{self.options.momentum}: the parameter must be a number larger than {free.above:g}"
                )
            self.names[name] = value

    def scope(
        self, own: bool = True, index: Mapping[str, int] | None = None, more: Mapping[str, Value] | None = None
    ) -> TextScope:
        """The names of the text; own=False: those of the problem before them."""
        of_spec = (
            {} if own else {**self.problem.scope.names, **{z.name: self.running[a] for a, z in self.places.items()}}
        )
        names = {**self.names, **of_spec, **(more or {})}
        base = Scope() if own else self.problem.scope
        return TextScope(names, base.macros, base.declared, base.sizes, True, self, dict(index or {}))

    # --- states, numbers, updates ---

    def _start(self, key: str, start: Start, own: bool = True) -> None:
        """A state of the text; own=False: of the spec."""
        place = self.text.place("states", key) if own else self.options.at("states", key)
        if not own and key in self.names:
            raise SpecError("E320", f"{self.text.name} has a '{key}' already", place(0, 1), "choose another name")
        read: Callable[[str, Mapping[str, int]], Value] = lambda formula, index: _Formula(
            formula, self.scope(own, index), place
        ).read()
        name, _, index = key.removesuffix("]").partition("[")
        for called, indices in self._members(name, index):
            if called in self.places:
                value = self._first(key, start, place, read, indices)
                nowhere_yet = {s: zeros(*s.shape) for s in self.running.values()}
                self.states.append(State(self.running[called], substitute(value, {**nowhere_yet})))
                continue
            if start.number is not None:
                first = read(start.number, indices)
                if isinstance(first, Expr) or first.is_nonpositive:
                    raise SpecError("E132", f"{key} is one positive number; {start.number} is not", place(0, 1))
                s = scalar(self.fresh(called), positive=True)
                self.states.append(State(s, first))
                self.names[called] = s
                continue
            value = self._first(key, start, place, read, indices)
            sized = next((z for z in self.places.values() if z.shape == value.shape), None)
            s = state_of(sized, self.fresh(called)) if sized is not None else _vector(self.fresh(called), value)
            self.states.append(State(s, value))
            self.names[called] = s

    def _first(
        self,
        key: str,
        start: Start,
        place: Place,
        read: Callable[[str, Mapping[str, int]], Value],
        index: Mapping[str, int],
    ) -> Expr:
        """The first value of a state that is no number. Raises SpecError E131, E320."""
        if start.like is None and start.start is None:
            hint = "its first value, s: z, or {like: K @ z}, or {number: 1}"
            raise SpecError("E320", f"the state {key} has no start", place(0, 1), hint)
        like = as_expr(read(start.like, index)) if start.like is not None else None
        if start.start is None:
            return zeros(*cast(Expr, like).shape)
        value = as_expr(read(start.start, index))
        if like is not None and value.shape != like.shape:
            c = as_constant(value)
            if c is None:
                message = f"the start of {key} is {show_shape(value.shape)}, it is like {show_shape(like.shape)}"
                raise SpecError("E131", message, place(0, 1))
            return constant(c, *like.shape)
        return value

    def _members(self, name: str, index: str) -> Iterable[tuple[str, dict[str, int]]]:
        if not index:
            yield name, {}
            return
        among = self.indexed(index)
        for i in range(len(among)):
            yield member(name, i, among), {index: i}

    def _read(self, formula: str, place: Place, index: Mapping[str, int] | None = None) -> Value:
        return _Formula(formula, self.scope(index=index), place).read()

    def _number(self, name: str, free: Free) -> Assign:
        """A number of the algorithm, as the spec or the text says it. Raises SpecError E132, DeriveError E304."""
        options = self.options
        given = options.numbers.get(name)
        place = options.at("numbers", name) if given is not None else self._of_scalar(name)
        if given is None and name == STEP.name and options.step != OWN_STEP:
            given, place = options.step, options.at("step")
        if given is None:
            try:
                value = self._read(free.start, place)
            except DeriveError as e:
                hint = e.hint if name == STEP.name else f"give it yourself: numbers: {{{name}: 1}}"
                raise DeriveError(e.code, e.message, hint=hint, notes=e.notes) from None
        else:
            first = next((x for x in self.letters.values() if GRADIENT in x.uses), None)
            l = {"L": _Later(self, first.name)} if first is not None else {}
            value = _Formula(given, self.scope(own=False, more=cast(Any, l)), place).read()
        what = "a step size" if name == STEP.name else name
        length = free.start if given is None else given
        at = place(0, len(length))
        if isinstance(value, Expr):
            raise SpecError("E132", f"{what} is a number; {length} is {show_shape(value.shape)}", at)
        if free.above == 0 and value.is_nonpositive:
            raise SpecError("E132", f"{what} is positive; {length} is not", at)
        for bound, word, wrong in (
            (free.above, "above", lambda b: value <= b),
            (free.below, "below", lambda b: value >= b),
        ):
            if bound is not None and value.is_number and wrong(bound):
                raise SpecError("E132", f"{what} is {word} {bound:g}; {length} is not", at)
        later = list(self.text.record.scalars)[list(self.text.record.scalars).index(name) :]
        if below := next((n for n in later if self.names[n] in value.free_symbols), None):
            raise SpecError("E320", f"{name} reads {below}, which stands below it", at, f"write {name} after {below}")
        if name == STEP.name and given is not None and not any(a.target in value.free_symbols for a in self.derived):
            self.notes.append("step size given, not derived")
        return Assign(cast(sp.Symbol, self.names[name]), value, "step size" if name == STEP.name else free.about)

    def _of_scalar(self, name: str) -> Place:
        """Where the text says the start of a number."""
        short = self.text.place("scalars", name)
        return short if self.text.is_leaf("scalars", name) else self.text.place("scalars", name, "start")

    def _updates(self) -> Iterable[_Update]:
        """The updates of the text, some of them replaced, and those of the spec's own before the next that it names."""
        derived, asked = list(self._of_text()), self.options.updates
        known = {u.name for u in derived}
        self._known_updates(known)
        before, waiting = dict[str, list[_Update]](), list[_Update]()
        for name, formula in asked.items():
            if name in known:
                before[name], waiting = waiting, []
            else:
                waiting.append(_Update(name, formula, self.options.at("updates", name), own=True))
        for u in derived:
            yield from before.get(u.name, ())
            yield _Update(u.name, asked[u.name], self.options.at("updates", u.name), u, True) if u.name in asked else u
        yield from waiting

    def _of_text(self) -> Iterable[_Update]:
        record = self.text.record
        for key, formula in record.updates.items():
            if key == "momentum" and self.rule is not None:
                path = ("momenta", next(k for k, r in record.momenta.items() if r is self.rule))
                yield from (_Update(k, f, self.text.place(*path, "updates", k)) for k, f in self.rule.updates.items())
            else:
                yield _Update(key, formula, self.text.place("updates", key))

    def _known_updates(self, known: set[str]) -> None:
        """An update that neither the text has nor anything of the spec reads is a slip. Raises SpecError E320."""
        formulas = list(self.options.updates.values())
        read = {x.id for f in formulas for x in ast.walk(_tree(f)) if isinstance(x, ast.Name)}
        for name in self.options.updates:
            if name not in known and name not in read and name not in self.options.states:
                hint = did_you_mean(name, known) or f"its updates: {', '.join(known)}"
                raise SpecError(
                    "E320", f"{self.text.name} has no update '{name}'", self.options.at("updates", name)(0, 1), hint
                )
        for name in self.options.states:
            if name not in self.options.updates:
                where = self.options.at("states", name)(0, 1)
                raise SpecError("E320", f"nothing updates the state '{name}'", where, f"updates: {{{name}: z}}")
        for name, learned in self.options.apart.items():
            if name not in (*known, *self.options.updates, "start"):
                hint = did_you_mean(name, known) or f"its updates: {', '.join(known)}; or start"
                where = self.options.at("learn", learned, "in")(0, 1)
                raise SpecError("E320", f"{self.text.name} has no update '{name}'", where, hint)

    def _update(self, u: _Update) -> None:
        name, _, index = u.name.removesuffix("]").partition("[")
        for own, indices in self._members(name, index):
            value = self._value(u, own, indices)
            note = {**self.text.record.notes, **(self.rule.notes if self.rule else {})}.get(name)
            self._assign(own, value, note, u)

    def _value(self, u: _Update, member: str, indices: Mapping[str, int]) -> Value:
        self.target = member
        if not u.own:
            return _Formula(u.formula, self.scope(index=indices), u.place).read()
        more = {"derived": self._value(u.replaces, member, indices)} if u.replaces is not None else None
        return _Formula(u.formula, self.scope(False, indices, more), u.place).read()

    def _assign(self, name: str, value: Value, note: str | None, u: _Update) -> None:
        old = self.names.get(name)
        if isinstance(value, Expr) and isinstance(old, Sym) and value.shape != old.shape:
            value = constant(c, *old.shape) if (c := as_constant(value)) is not None else value
            if value.shape != old.shape:
                raise SpecError(
                    "E131",
                    f"the update of {name} is {show_shape(value.shape)}, {name} is {show_shape(old.shape)}",
                    u.place(0, len(u.formula)),
                )
        if isinstance(old, Sym) and not isinstance(value, Expr):
            value = constant(value, *old.shape)
        if old is None:
            if isinstance(value, Expr) and (any(z.is_scalar for z in self.places.values()) or not value.is_scalar):
                old = _vector(self.fresh(name), value)
            else:
                old = scalar(self._numbered(name), positive=_positive(value))
        target = cast("Sym | sp.Symbol", old)
        if note is None:
            note = f"{target.name} <- {shown(value)}" if isinstance(value, Expr) and _derived(u.formula) else ""
        self.names[name] = target
        self.written.add(name)
        self.assigns.append(Assign(target, cast(Any, value), note, update=u.name.partition("[")[0]))

    def _residuals(self) -> Residuals:
        """What the text says is 0 at a solution; of the updates nothing changes."""
        kept, at, names = dict(self.last), self.at, dict(self.names)
        known = {s.symbol for s in self.states}
        numbers = {*self.text.record.scalars, *(self.rule.scalars if self.rule else ())}
        self.names = {n: v for n, v in names.items() if n in numbers or v in known or n == "layer"}
        found: list[Assign] = []
        for key, formula in self.text.record.residuals.items():
            name, _, index = key.removesuffix("]").partition("[")
            for own, indices in self._members(name, index):
                self.target = own
                value = as_expr(self._read(formula, self.text.place("residuals", key), indices))
                found.append(Assign(_vector(self.fresh(own), value), value, f"{own}: 0 at a solution"))
        before = tuple(
            Assign(s, cast(Any, names[n]), f"{n} where the layer began") for n, s in self.last.items() if n not in kept
        )
        self.last, self.at, self.names = kept, at, names
        return Residuals(before, tuple(found))

    def _numbered(self, name: str) -> str:
        """The name of a number: its own, or a free one. Those that specs write (`step`) are not given away: E213."""
        return name if name in (STEP.name, MOMENTUM.name) else self.fresh(name)

    def _short(self) -> Iterable[Assign]:
        """The assignments, what lives for one layer and is read once put in where it is read."""
        states = {s.symbol for s in self.states}
        saved = [Assign(s, cast(Any, self.names[n]), f"{n} where the layer began") for n, s in self.last.items()]
        left = list(self.assigns)
        while True:
            for i, a in enumerate(left):
                if a.target in states or not isinstance(a.target, Sym) or a.update in self.options.apart:
                    continue
                if sum(b.target is a.target for b in left) > 1:
                    continue
                readers = [j for j, b in enumerate(left) if isinstance(b.value, Expr) and a.target in b.value.symbols]
                if len(readers) != 1 or readers[0] < i or left[readers[0]].update in self.options.apart:
                    continue
                (j,) = readers
                moved = {b.target for b in left[i + 1 : j]}
                reads = {*cast(Expr, a.value).symbols, *cast(Expr, a.value).scalars}
                if moved & reads:
                    continue
                b = left[j]
                value = substitute(cast(Expr, b.value), {a.target: cast(Expr, a.value)})
                note = f"{b.target.name} <- {shown(value)}" if b.note.startswith(f"{b.target.name} <- ") else b.note
                left[j] = replace(b, value=value, note=note)
                del left[i]
                break
            else:
                return [*saved, *left]

    # --- what can be done with a letter ---

    def lipschitz(self, name: str) -> sp.Expr:
        """The Lipschitz constant of the gradient of a letter. Raises DeriveError E304."""
        (share,) = self.dealt[name]
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
        """The Lipschitz constant of the gradient in one of several variables: a number per sample, by what the others are."""
        found = curvature.smoothness(self._smooth(share), z)
        note = f"L_{z.name}: {found.proof}, {found.reason}"
        self.notes += [] if note in self.notes else [note]
        if (c := as_constant(found.lipschitz)) is not None and c.is_positive:
            return c
        name = self.fresh(f"L_{z.name}")
        while any(a.target.name == name for a in self.assigns):
            name += "_"
        target = scalar(name, positive=True)
        value = substitute(found.lipschitz, {**self.others(at), **at})
        self.assigns.append(Assign(target, value, f"Lipschitz constant of the gradient in {z.name}"))
        return cast(sp.Expr, nonzero(target))

    def named(self, value: Expr) -> sp.Expr:
        """A number per sample that a formula works out, as an assignment of its own."""
        known = next((a.target for a in self.assigns if a.value is value and isinstance(a.target, sp.Symbol)), None)
        if known is not None and not any(isinstance(a.target, Sym) and a.target in value.symbols for a in self.assigns):
            return known
        name = self.fresh(value.name if isinstance(value, Sym) else "strength")
        taken = {a.target.name for a in self.assigns} | {s.symbol.name for s in self.states}
        while name in taken:
            name += "_"
        target = scalar(name, positive=True)
        self.assigns.append(Assign(target, value, ""))
        return target

    def divergence(self, value: Expr, r: Sym) -> tuple[Expr, Expr]:
        """Of what was assigned to a name, in the name of what it was read at."""
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
        return divergence(formula, r), formula

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


# --- formulas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Later:
    """L, in a step size that a spec writes: asked for when it is read."""

    reading: Reading
    letter: str


@dataclass(frozen=True)
class TextScope(Scope):
    """What names mean in an update; index: the member that is being read."""

    reading: Any = None
    index: Mapping[str, int] = field(default_factory=dict[str, int])


class _Formula(Reader):
    """A formula of an algorithm: those of the language, and what is done with letters."""

    @property
    def reading(self) -> Reading:
        return cast(TextScope, self.scope).reading

    @property
    def index(self) -> Mapping[str, int]:
        return cast(TextScope, self.scope).index

    def visit(self, node: ast.expr) -> Value | Condition:
        match node:
            case ast.BinOp(op=ast.MatMult()) if (chain := self._chain(node)) is not None:
                return chain
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if i in self.index:
                return self._name(cast(Any, node), member(name, self.index[i], self.reading.indexed(i)))
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name)) as letter, args=args) if (
                name in self.reading.letters
            ):
                return self._value_of(node, self.share(letter), args)
            case ast.Name(id=name) if isinstance(self.scope.names.get(name), _Later):
                later = cast(_Later, self.scope.names[name])
                return later.reading.lipschitz(later.letter)
            case ast.Name(id=name) if name in self.reading.letters and name not in self.scope.names:
                self.fail(
                    node,
                    "E320",
                    f"{name} is a letter: it is taken by grad, prox, argmin",
                    f"grad({name}, z), prox(t * {name}, v)",
                )
            case ast.Attribute(value=ast.Name(id="algorithm"), attr=name):
                value = self.reading.names.get(name)
                if value is None:
                    known = list(self.reading.names)
                    self.fail(
                        node,
                        "E101",
                        f"the algorithm has no '{name}'",
                        did_you_mean(name, known) or f"there are: {', '.join(known)}",
                    )
                return value
            case _:
                return super().visit(node)

    def operator_of(self, node: ast.expr) -> tuple[str, Linear, bool] | None:
        """(name, K, is it transposed?) of K, K.T, K[j], K[j].T."""
        match node:
            case ast.Attribute(value=x, attr="T") if (found := self.operator_of(x)) is not None:
                return found[0], found[1], not found[2]
            case ast.Name(id=name) if (shares := self.with_operator(name)) and not shares[0].letter.index:
                return name, cast(Linear, shares[0].linear), False
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if i in self.index and (
                shares := self.with_operator(name)
            ):
                return member(name, self.index[i], shares), cast(Linear, shares[self.index[i]].linear), False
            case _:
                return None

    def with_operator(self, name: str) -> tuple[Share, ...]:
        r = self.reading
        return next((r.dealt[x.name] for x in r.letters.values() if x.operator == name), ())

    def _chain(self, node: ast.BinOp) -> Expr | None:
        """K.T @ K @ z: operators applied from the right."""
        factors: list[ast.expr] = []
        at: ast.expr = node
        while isinstance(at, ast.BinOp) and isinstance(at.op, ast.MatMult):
            factors.append(at.right)
            at = at.left
        weight: list[ast.expr] = []  # of `a * K @ z`, which Python reads as (a * K) @ z
        negative = False
        while True:
            match at:
                case ast.BinOp(left=c, op=ast.Mult(), right=inner) if self.operator_of(inner) is not None:
                    weight.append(c)
                    at = inner
                case ast.UnaryOp(op=ast.USub(), operand=inner) if self.operator_of(inner) is not None:
                    negative = not negative
                    at = inner
                case _:
                    break
        found = [self.operator_of(x) for x in (*factors[1:], at)]
        if not any(x is not None for x in found):
            return None
        value = self.matrix(factors[0])
        for x, k in zip((*factors[1:], at), found, strict=True):
            if k is None:
                self.fail(
                    x, "E320", f"{self.source(x)} stands before an operator", "apply it to the result: name that first"
                )
            _, linear, transposed = k
            want = linear.e.shape if transposed else linear.z.shape
            if value.shape != want:
                self.fail(
                    node,
                    "E131",
                    f"{self.source(node)} does not fit: {self.source(x)} takes {show_shape(want)}, this is {self.shape(value)}",
                )
            value = linear.adjoint(value) if transposed else linear(value)
        for c in weight:
            w = self.value(c)
            value = elementwise(slot(0) * slot(1), w, value) if isinstance(w, Expr) else scale(w, value)
        return scale(-1, value) if negative else value

    def _call(self, node: ast.Call, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        r = self.reading
        if name == "derived" and isinstance(self.scope.names.get("derived"), Expr):
            return self._derived(node, args, keywords)
        if name in r.letters:
            return self._value_of(node, self.share(node.func), args)
        if name in ("rows", "cols") and len(args) == 1 and (k := self.operator_of(args[0])) is not None:
            _, linear, transposed = k
            tall, wide = linear.e, linear.z
            x = wide if transposed == (name == "rows") else tall
            return x.rows * x.cols
        operation = OPERATIONS.get(name)
        if operation is None:
            if (
                name == "sum"
                and len(args) == 1
                and isinstance(args[0], ast.GeneratorExp)
                and (e := self._over(args[0])) is not None
            ):
                return e
            return super()._call(node, name, args, keywords)
        if (keywords and not operation.at) or len(args) not in operation.counts:
            self.fail(
                node,
                "E105",
                f"{name} takes {' or '.join(map(str, operation.counts))} arguments, not {len(args) + len(keywords)}",
                f"it is called as {operation.signature}",
            )
        try:
            return operation.build(self, node, args)
        except DeriveError as e:
            raise e.located(self.place(*self.span(node))) if e.code not in ("E304",) else e from None

    def _over(self, node: ast.GeneratorExp) -> Expr | None:
        """sum(... for j in J), J what an index of the text runs over."""
        match node.generators:
            case [ast.comprehension(target=ast.Name(id=j), iter=ast.Name(id=over), ifs=[])] if self.reading.indexed(
                over
            ):
                pass
            case _:
                return None
        shares = self.reading.indexed(over)
        terms: list[Expr] = []
        for i in range(len(shares)):
            scope = replace(cast(TextScope, self.scope), index={**self.index, j: i})
            terms.append(type(self)(self.text, scope, self.place, self.active).matrix(node.elt))
        return add(*terms)

    def _derived(self, node: ast.Call, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        """derived(z=q): what was there, at another point."""
        if args or not keywords:
            self.fail(node, "E105", "derived takes the names that change, derived(z=q)", "derived, or derived(z=q)")
        put: dict[Expr, Expr] = {}
        for k in keywords:
            s = self.reading.names.get(str(k.arg))
            if not isinstance(s, Sym):
                self.fail(node, "E101", f"the algorithm has no state '{k.arg}'")
            put[s] = self.matrix(k.value)
            if put[s].shape != s.shape:
                self.fail(
                    k.value, "E131", f"{self.source(k.value)} is {self.shape(put[s])}; {k.arg} is {self.shape(s)}"
                )
        value, states = cast(Expr, self.scope.names["derived"]), {s.symbol for s in self.reading.states}
        for a in reversed(self.reading.assigns):  # what was read through an update above
            if (
                isinstance(a.target, Sym)
                and isinstance(a.value, Expr)
                and a.target not in states
                and a.target not in put
            ):
                value = substitute(value, {a.target: a.value})
        return substitute(value, put)

    def share(self, node: ast.expr) -> Share:
        """The letter that stands here."""
        match node:
            case ast.Name(id=name) if name in self.reading.letters:
                shares = self.reading.dealt[name]
                letter = self.reading.letters[name]
                if letter.index:
                    self.fail(node, "E320", f"{name} has a member for each {letter.index}", f"{name}[{letter.index}]")
                return shares[0]
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if (
                name in self.reading.letters and i in self.index
            ):
                return self.reading.dealt[name][self.index[i]]
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if self.reading.letters.get(name):
                hint = f"sum(... for {i} in {self.reading.letters[name].over or 'J'}), or an update of its own: v[{i}]"
                self.fail(node, "E320", f"no member {i} is meant here", hint)
            case _:
                known = ", ".join(self.reading.letters)
                self.fail(
                    node, "E320", f"{self.source(node)} is not a letter of the algorithm", f"its letters: {known}"
                )

    def majorant(self, node: ast.Call) -> Share:
        """The letter of tangent(g, p, abs), with what lies above it."""
        match node.args:
            case [letter, at, ast.Name(id="abs" | "square" as of)]:
                share, point = self.share(letter), self.matrix(at)
            case _:
                self.fail(node, "E105", "tangent takes a letter, a point, and abs or square", "tangent(g, z, abs)")
        if share.e is None:
            return share
        point = substitute(
            point, {z: self.reading.running[a] for a, z in self.reading.places.items()}
        )  # inside argmin, z is what is minimised over
        return replace(share, e=tangent(share.e, share.variable, point, of))

    def _value_of(self, node: ast.Call, share: Share, args: list[ast.expr]) -> Expr:
        """f(z): the value of a letter."""
        count = len(share.places)
        if len(args) != count:
            self.fail(
                node, "E105", f"{share.letter.name} takes {count} argument{'s' if count > 1 else ''}, not {len(args)}"
            )
        variables = [share.variable] if count == 1 else [z for _, z in share.places]
        at = [self.matrix(a) for a in args]
        for a, e, z in zip(args, at, variables, strict=True):
            if (share.linear is not None or count > 1) and e.shape != z.shape:
                message = f"{self.source(a)} is {self.shape(e)}; {share.letter.name} takes {self.shape(z)}"
                self.fail(a, "E131", message)
        return zeros(1, 1) if share.e is None else substitute(share.e, dict(zip(variables, at, strict=True)))

    def scaled(self, node: ast.expr) -> tuple[sp.Expr, Share, bool]:
        """(t, g, is it the conjugate?) of t * g, g / t, t * conj(g)."""
        match node:
            case ast.BinOp(left=t, op=ast.Mult(), right=g):
                c, share, conjugate = self.scaled(g)
                return c * self.strength(t), share, conjugate
            case ast.BinOp(left=g, op=ast.Div(), right=t):
                c, share, conjugate = self.scaled(g)
                return c / self.strength(t), share, conjugate
            case ast.Call(func=ast.Name(id="conj"), args=[g], keywords=[]):
                return sp.S.One, self.share(g), True
            case ast.Call(func=ast.Name(id="tangent")):
                return sp.S.One, self.majorant(node), False
            case _:
                return sp.S.One, self.share(node), False

    def strength(self, node: ast.expr) -> sp.Expr:
        """A number before a letter. One of each sample gets a name, as the prox takes numbers."""
        value = self.value(node)
        if not isinstance(value, Expr):
            return value
        if not value.is_scalar:
            self.fail(
                node,
                "E131",
                f"{self.source(node)} is {self.shape(value)}; before a letter stands a number",
                "one number, or one per sample",
            )
        return self.reading.named(value)


def _grad(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return r.reading.grad(*_letter_at(r, args, node.keywords))


def _hess(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return r.reading.hessian(*_letter_at(r, args, node.keywords))


def _letter_at(r: _Formula, args: list[ast.expr], keywords: list[ast.keyword]) -> tuple[Share, Sym, dict[Sym, Expr]]:
    """A letter, the variable that is meant, and the point; of g(K z), a value of K z. Of H(x, y), grad(H, x, y=last(y))."""
    share = r.share(args[0])
    places = dict(share.places)
    if len(places) == 1:
        z, put = share.variable, {share.variable: args[1]}
    else:
        name = args[1].id if isinstance(args[1], ast.Name) else ""
        if name not in places:
            hint = f"grad({share.letter.name}, {share.letter.argument}); at another point, grad(.., {share.letter.argument}=..)"
            r.fail(args[1], "E320", f"{r.source(args[1])} is none of the variables of {share.letter.name}", hint)
        z, put = places[name], {places[name]: args[1]}
    for k in keywords:
        if str(k.arg) not in places or len(places) == 1:
            r.fail(k.value, "E320", f"{share.letter.name} has no variable '{k.arg}' beside that one")
        put[places[str(k.arg)]] = k.value
    at = {v: r.matrix(e) for v, e in put.items()}
    for v, e in put.items():
        if at[v].shape != v.shape:
            what = (
                v.name
                if len(places) > 1
                else "the variable"
                if share.linear is None
                else f"{share.letter.operator} {r.reading.argument}"
            )
            r.fail(e, "E131", f"{r.source(e)} is {r.shape(at[v])}; {what} is {r.shape(v)}")
    return share, z, at


def _prox(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    v = r.matrix(args[1])
    t, share, conjugate = r.scaled(args[0])
    if share.e is not None and v.shape != share.variable.shape:
        r.fail(
            args[1], "E131", f"{r.source(args[1])} is {r.shape(v)}; {share.letter.name} takes {r.shape(share.variable)}"
        )
    if t.is_nonpositive:
        r.fail(args[0], "E132", f"the step of a prox is positive; {r.source(args[0])} has {t}")
    if not conjugate:
        return r.reading.prox(share, t, v)
    if not share.convex:
        r.fail(
            args[0],
            "E303",
            f"conj({share.letter.name}) needs what is convex, and {shown(cast(Expr, share.e))} is not known to be",
        )
    known = None if share.e is None else conjugate_of_abs(share.e, share.variable)
    if known is not None:
        return r.reading.prox(replace(share, e=known), t, v)
    t = r.reading.above_zero(t)
    return add(v, scale(-t, r.reading.prox(share, 1 / t, scale(1 / t, v))))  # Moreau


def _tangent(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    """The majorant of a letter, as a value: at the variable in argmin, through `scaled` in a prox."""
    share = r.majorant(node)
    z = cast(Expr, r.scope.names[share.letter.argument])
    if share.e is None:
        return zeros(1, 1)
    return substitute(share.e, {share.variable: z if share.linear is None else share.linear(z)})


def _div(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    reading = r.reading
    names = [a.id if isinstance(a, ast.Name) else "" for a in args]
    targets = [b.target for b in reading.assigns]
    last: Callable[[Any], int] = lambda s: max((i for i, t in enumerate(targets) if t is s), default=-1)
    z, at = (reading.names.get(n) for n in names)
    for a, s, known in zip(args, (z, at), (False, any(s.symbol is at for s in reading.states)), strict=True):
        if not isinstance(s, Sym) or (last(s) < 0 and not known):
            hint = "div(z, r): of the update of z, in r, from which it was worked out"
            r.fail(a, "E320", f"{r.source(a)} is no update above", hint)
    z, at = cast(Sym, z), cast(Sym, at)
    if last(z) < last(at):
        hint = f"div above the update of {names[1]}"
        r.fail(args[1], "E320", f"{names[1]} changes after {names[0]} was worked out", hint)
    value = cast(Expr, reading.assigns[last(z)].value)
    if not depends(value, at):
        r.fail(node, "E320", f"{names[0]} was not worked out from {names[1]}")
    if value.shape != at.shape:
        message = f"{names[0]} is {r.shape(value)}, {names[1]} is {r.shape(at)}: a divergence needs one shape"
        r.fail(node, "E131", message)
    e, formula = reading.divergence(value, at)
    return substitute(e, {formula: z})


def _bregman(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    v = r.matrix(args[1])
    t, share, conjugate = r.scaled(args[0])
    if conjugate:
        r.fail(args[0], "E320", "bregman takes a letter, not its conjugate", "bregman(t * g, v)")
    return v if share.e is None else entropic(share.e, share.variable, t, v)


def _plus(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return signed_parts(r.matrix(args[0]))[0]


def _minus(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return signed_parts(r.matrix(args[0]))[1]


def _mu(r: _Formula, node: ast.Call, args: list[ast.expr]) -> sp.Expr:
    return r.reading.convexity(r.share(args[0]).letter.name)


def _lipschitz(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Value:
    share = r.share(args[0])
    if len(share.places) > 1:
        if len(args) == 1:
            hint = f"L({share.letter.name}, {share.letter.argument}): in one of its variables"
            r.fail(node, "E105", f"{share.letter.name} is of several variables", hint)
        return r.reading.partial(*_letter_at(r, args, node.keywords))
    if len(args) > 1 or node.keywords:
        r.fail(node, "E105", f"{share.letter.name} is of one variable", f"L({share.letter.name})")
    return r.reading.lipschitz(share.letter.name)


def _norm(r: _Formula, node: ast.Call, args: list[ast.expr]) -> sp.Expr:
    match args[0]:
        case ast.Call(func=ast.Name(id="stack"), args=[ast.Name(id=name)]) if shares := r.with_operator(name):
            found = [(member(name, i, shares), cast(Linear, s.linear)) for i, s in enumerate(shares)]
        case _:
            one = r.operator_of(args[0])
            if one is None:
                r.fail(
                    args[0],
                    "E320",
                    f"{r.source(args[0])} is not an operator of the algorithm",
                    "norm(K), norm(stack(K))",
                )
            found = [(one[0], one[1])]
    return r.reading.norm(found)


def _argmin(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    """argmin over the update that it is the value of."""
    reading = r.reading
    z = reading.places.get(reading.target)
    if z is None:
        r.fail(
            node,
            "E320",
            f"argmin is over the update it stands in, and {reading.target} is not a variable",
            f"{reading.argument}: argmin(...)",
        )
    names = {**r.scope.names, reading.target: z}
    inner = _Formula(r.text, replace(cast(TextScope, r.scope), names=names), r.place, r.active)
    return least(inner.matrix(args[0]), z)


def _hold(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return hold(r.matrix(args[0]))


def _last(r: _Formula, node: ast.Call, args: list[ast.expr]) -> Value:
    reading = r.reading
    match args[0]:
        case ast.Name(id=name):
            pass
        case ast.Subscript(value=ast.Name(id=family), slice=ast.Name(id=i)) if i in r.index:
            name = member(family, r.index[i], reading.indexed(i))
        case _:
            name = ""
    if not any(s.symbol is reading.names.get(name) for s in reading.states):
        r.fail(args[0], "E320", f"{r.source(args[0])} is not a state", "last(z) is z where the layer began")
    now = cast("Sym | sp.Symbol", reading.names[name])
    if name not in reading.written:
        if name == reading.target:
            r.fail(
                node,
                "E320",
                f"last({name}) in the update of {name} is {name} itself: nothing has changed it yet",
                f"keep the one before as a state: {name}_before",
            )
        return now
    if name not in reading.last:
        fresh = reading.fresh(f"{name}_last")
        reading.last[name] = (
            state_of(now, fresh) if isinstance(now, Sym) else scalar(fresh, positive=bool(now.is_positive))
        )
    return cast(Value, reading.last[name])


@dataclass(frozen=True)
class Operation:
    """Something that is done with letters: how it is called, with how many arguments, what it gives; at: may a point be given by names?"""

    signature: str
    counts: tuple[int, ...]
    build: Callable[[_Formula, ast.Call, list[ast.expr]], Value]
    at: bool = False


OPERATIONS = {
    "grad": Operation("grad(f, z): the gradient of f at z; of H(x, y), grad(H, x, y=..)", (2,), _grad, at=True),
    "prox": Operation("prox(t * g, v): argmin of t g(x) + |x - v|^2 / 2; of t * conj(g) too", (2,), _prox),
    "hess": Operation("hess(f, z): the matrix of second derivatives of f at a vector z", (2,), _hess, at=True),
    "tangent": Operation("tangent(g, p, abs): above g, linear in |z|, and equal at p; square: in z^2", (3,), _tangent),
    "bregman": Operation("bregman(t * g, v): argmin of t g(x) + sum(x log(x/v) - x + v)", (2,), _bregman),
    "plus": Operation("plus(e): the terms of e without a negative entry", (1,), _plus),
    "minus": Operation("minus(e): minus the others", (1,), _minus),
    "div": Operation("div(z, r): the divergence of the update of z in r", (2,), _div),
    "mu": Operation("mu(f): a constant of strong convexity of f", (1,), _mu),
    "L": Operation("L(f): the Lipschitz constant of grad f; of H(x, y), L(H, x)", (1, 2), _lipschitz, at=True),
    "norm": Operation("norm(K), norm(stack(K)): the largest singular value", (1,), _norm),
    "argmin": Operation("argmin(f(z) + ...), over the update it stands in", (1,), _argmin),
    "hold": Operation("hold(e): a constant for every derivation", (1,), _hold),
    "last": Operation("last(z): z where the layer began", (1,), _last),
}


# --- pieces -----------------------------------------------------------------------------------------------------------


def _follows(a: Assign, r: Sym) -> bool:
    """Is it a number that changes with r?"""
    return not isinstance(a.target, Sym) and isinstance(a.value, Expr) and depends(transform(a.value, _held), r)


def _held(e: Expr) -> Expr | None:
    return zeros(*e.shape) if isinstance(e, Hold) else None


def state_of(z: Sym, name: str | None = None) -> Sym:
    """The running value of a variable."""
    return symbol(name or z.name, z.nrows, z.ncols, "state", z.rank, z.family, z.props)


def _vector(name: str, value: Expr) -> Sym:
    """A state, or what lives for one layer, as large as a value."""
    return symbol(name, *value.shape, "state", 2 if 1 not in value.shape[1:] else 1)


def _positive(value: Value) -> bool:
    return bool(value.is_positive) if not isinstance(value, Expr) else False


def _tree(formula: str) -> ast.AST:
    """Its tree; that of nothing where it is none, which is said when it is read."""
    try:
        return ast.parse(formula.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _derived(formula: str) -> bool:
    """Is something derived in it?"""
    return any(
        isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id in USES for x in ast.walk(_tree(formula))
    )


def member(name: str, i: int, among: tuple[Any, ...]) -> str:
    """The name of a member: without a number where there is one."""
    return name if len(among) == 1 else f"{name}_{i + 1}"
