"""A text read for one problem: its numbers, states and updates from top to bottom, as the assignments of one step."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import sympy as sp

from unroll.derivation.dealing import (
    ARGMIN,
    ENTROPY,
    GRADIENT,
    MAJORANTS,
    PROX,
    SWEEP,
    USES,
    Dealt,
    convex,
    has_a_choice,
    meets,
    requirement,
)
from unroll.derivation.formulas import Formula, Later, TextScope
from unroll.derivation.known import Known, member, state_of
from unroll.derivation.operations import OPERATIONS
from unroll.derivation.parts import Part
from unroll.derivation.step import CLAIMS, Assign, Claim, Condition, Departure, Hand, Residuals, State, Step
from unroll.errors import DeriveError, SpecError, did_you_mean
from unroll.language.constructors import add, as_constant, constant, swap, symbol, zeros
from unroll.language.functions import Value, as_expr
from unroll.language.nodes import Expr, Sym, scalar, show_shape
from unroll.language.parse import Place, Scope, nowhere, parse
from unroll.language.problem import Problem
from unroll.language.show import text as shown
from unroll.language.traversal import substitute
from unroll.spec.schema import Free, Rule, Start
from unroll.spec.texts import Text

STEP, MOMENTUM = scalar("step", positive=True), scalar("momentum")
OWN_STEP = "1/L"
Numbers = list[tuple[sp.Symbol, sp.Expr]]


@dataclass(frozen=True)
class Options:
    """What a spec may ask of an algorithm; None, and what is not there, is the algorithm's own.

    split: letter -> terms.  numbers, updates, states: name -> formula, each at the place that `at` gives for (section, name).
    apart: updates that keep a line of their own, and where the spec says of a parameter that is put into them.
    """

    step: str = OWN_STEP
    momentum: str | None = None
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    numbers: Mapping[str, str] = field(default_factory=dict[str, str])
    updates: Mapping[str, str] = field(default_factory=dict[str, str])
    states: Mapping[str, Start] = field(default_factory=dict[str, Start])
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
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


class Reading(Known):
    """A text read for a problem, with what a spec asks of it."""

    def __init__(self, text: Text, problem: Problem, dealt: Dealt, options: Options) -> None:
        super().__init__(text, problem, dealt)
        self.options = options
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
        own = self.options.step == OWN_STEP and not self.options.numbers
        descends = (n for c in self._claims(values, ("monotone",)) for n in c.says()) if own else ()
        return Step(
            self.text.name,
            (*weights, *self.derived, *values),
            tuple(self.states),
            assigns,
            tuple(state_of(z) for z in self.problem.variables),
            (),
            tuple((*self.notes, *descends, *self._said())),
            departures=tuple(self._departures()),
            blocks=tuple(dict.fromkeys(a.block for a in assigns if a.block)),
            hands=tuple(self._hands()),
            residuals=residuals,
            claimed=cache(lambda: tuple(self._claims(values))),
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
            use = cast(Any, next((u for u in (GRADIENT, ARGMIN, SWEEP, PROX, ENTROPY) if u in uses), "majorant"))
            terms = tuple(dict.fromkeys(p.term for p in share.parts))
            e = add(*(p.e for p in share.parts)) if use == "gradient" else cast(Expr, share.e)
            operator = share.linear.e if share.linear is not None and not share.linear.is_identity else None
            for z in (v for _, v in share.places) if use == GRADIENT and operator is None else (share.variable,):
                block = "" if len(self.places) == 1 else z.name if operator is None else share.places[0][1].name
                yield Hand(share.letter.name, use, terms, e, z, operator, block)

    # --- what is claimed of the problem ---

    def _claims(self, values: Iterable[Assign], names: Collection[str] = CLAIMS) -> Iterable[Claim]:
        """What the text says of this problem, with these numbers: not of what is held, nor where an update is replaced."""
        shares = [s for shares in self.dealt.values() for s in shares]
        parts = [p for s in shares for p in s.parts]
        majorised = [p for s in shares if s.letter.uses & {*MAJORANTS} for p in s.parts]
        if self.options.updates or any(p.holds for p in parts):
            return
        covered: dict[str, Callable[[], bool]] = {
            "monotone": lambda: all(
                p in majorised or p.descended or p.is_set or bool(p.proximal and p.proximal.convex) for p in parts
            ),
            "optimum": lambda: all(map(convex, parts)),
        }
        given = self.options.step != OWN_STEP or bool(self.options.numbers)
        known = [(cast(sp.Symbol, a.target), a.value) for a in values if not isinstance(a.value, Expr)]
        for i, claim in enumerate(self.text.record.claims):
            if claim.claim not in names or not covered[claim.claim]():
                continue
            needs = [w for w in claim.when if requirement(w)]
            met = all(meets(w, {x: [p for s in of for p in s.parts] for x, of in self.dealt.items()}) for w in needs)
            if met and (claim.when or not given):
                try:
                    yield self._claim(claim.claim, [w for w in claim.when if w not in needs], known, ("claims", i))
                except DeriveError as e:
                    if e.code != "E304":  # else a constant is not known, and nothing is claimed
                        raise

    def _claim(self, name: str, when: list[str], known: Numbers, path: tuple[str | int, ...]) -> Claim:
        """With constants that stand in its conditions alone; of the step nothing changes."""
        derived, notes = list(self.derived), list(self.notes)
        try:
            conditions = tuple(self._condition(w, known, path) for w in when)
            return Claim(name, conditions, tuple(self.derived))
        finally:
            self.derived, self.notes = derived, notes

    def _condition(self, written: str, known: Numbers, path: tuple[str | int, ...]) -> Condition:
        """Raises SpecError E320 for what is no comparison of two numbers."""
        match _tree(written):
            case ast.Expression(ast.Compare(left, [ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE() as op], [right])):
                a, b = (self._read(ast.unparse(x), lambda *_: self.text.where(*path)) for x in (left, right))
            case _:
                a = b = zeros(1, 1)
                op = ast.Lt()
        if isinstance(a, Expr) or isinstance(b, Expr):
            hint = "step * L(f) < 2, or what requires: may say, f quadratic"
            raise SpecError("E320", f"'{written}' compares no two numbers", self.text.where(*path), hint)
        constants = [
            (cast(sp.Symbol, a.target), c) for a in self.derived if (c := as_constant(as_expr(a.value))) is not None
        ]
        for name, value in reversed([*constants, *known]):
            a, b = swap(a, {name: value}), swap(b, {name: value})
        a, b = sp.simplify(a), sp.simplify(b)
        room = sp.simplify(b - a if isinstance(op, ast.Lt | ast.LtE) else a - b)
        return Condition(written, a, b, room, isinstance(op, ast.Lt | ast.Gt))

    def _said(self) -> Iterable[str]:
        """How the terms were dealt out, where they could have been otherwise."""
        if not has_a_choice(self.letters.values()):
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
        yield from self.estimates
        for name, formula in self.options.updates.items():
            yield Departure(
                "update", "", "choice", f"{name} becomes {' '.join(formula.split())}: not derived from the objective"
            )

    # --- names ---

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
        return TextScope(names, base.macros, base.declared, base.sizes, True, self, dict(index or {}), OPERATIONS)

    # --- states, numbers, updates ---

    def _start(self, key: str, start: Start, own: bool = True) -> None:
        """A state of the text; own=False: of the spec."""
        place = self.text.place("states", key) if own else self.options.at("states", key)
        if not own and key in self.names:
            raise SpecError("E320", f"{self.text.name} has a '{key}' already", place(0, 1), "choose another name")
        read: Callable[[str, Mapping[str, int]], Value] = lambda formula, index: Formula(
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
                if start.scaled_by is not None:
                    hint = f"write the change where {key} is updated"
                    raise SpecError("E320", f"{key} is a number, and scaled_by is of vectors", place(0, 1), hint)
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
            self.states.append(State(s, value, self._scale(key, start, place, value, read, indices)))
            self.names[called] = s

    def _scale(
        self,
        key: str,
        start: Start,
        place: Place,
        first: Expr,
        read: Callable[[str, Mapping[str, int]], Value],
        index: Mapping[str, int],
    ) -> sp.Expr:
        """The numbers that a state is a multiple of. Raises SpecError E132, E320."""
        if start.scaled_by is None:
            return sp.S.One
        value = read(start.scaled_by, index)
        numbers = {cast(sp.Symbol, self.names[n]) for n in self.text.record.scalars}
        if isinstance(value, Expr) or not value.is_positive or value.free_symbols - numbers:
            what = f"{key} is a multiple of positive numbers under scalars; {start.scaled_by} is none"
            raise SpecError("E132", what, place(0, 1))
        if as_constant(first) != 0:
            raise SpecError(
                "E320", f"{key} is scaled by {start.scaled_by} and starts at 0", place(0, 1), "leave out start:"
            )
        return value

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
        return Formula(formula, self.scope(index=index), place).read()

    def _number(self, name: str, free: Free) -> Assign:
        """A number of the algorithm, as the spec or the text says it. Raises SpecError E132, DeriveError E304."""
        options, self.target = self.options, ""
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
            l = {"L": Later(self, first.name)} if first is not None else {}
            value = Formula(given, self.scope(own=False, more=cast(Any, l)), place).read()
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
                where = self.options.at(*learned, "in")(0, 1)
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
            try:
                return Formula(u.formula, self.scope(index=indices), u.place).read()
            except DeriveError as e:
                if e.code != "E304":
                    raise
                hint = f"give the update yourself: updates: {{{u.name}: 0.01}}" if "L(" in u.formula else e.hint
                raise DeriveError(e.code, e.message, hint=hint, notes=e.notes) from None
        asked = u.replaces is not None and "derived" in u.formula  # what is not asked for need not be known
        more = {"derived": self._value(u.replaces, member, indices)} if asked and u.replaces is not None else None
        return Formula(u.formula, self.scope(False, indices, more), u.place).read()

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
        self.assigns.append(Assign(target, cast(Any, value), note, update=u.name))

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
                if sum(b.target is a.target for b in left) > 1 or "positive" in a.target.props:
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


# --- pieces ---


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
