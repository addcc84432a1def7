"""The derivation of a network, to be read: objective -> gradient, prox, L -> step -> what is learned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from unroll import html
from unroll.calculus import prox as proximal
from unroll.calculus.curvature import bounds
from unroll.calculus.gradient import gradient
from unroll.derivation import blocks
from unroll.derivation.control import controlled
from unroll.derivation.learning import parametrise, used_scalars
from unroll.derivation.parts import Part, classify
from unroll.derivation.step import Assign, Departure, Hand, Learned, Step, settled
from unroll.errors import SpecError
from unroll.language.columns import WIDTH, counted, table, wrapped
from unroll.language.constructors import add, split
from unroll.language.nodes import Expr, Indicator, Normalise, Prox, Sym, Zero, depends, walk
from unroll.language.problem import Problem, from_spec
from unroll.language.show import joined, latex, pretty
from unroll.spec import Spec


@dataclass(frozen=True)
class Derivation:
    """All stages of one spec. `exact`: one layer with nothing learned; `step`: the same with parameters in place."""

    spec: Spec
    problem: Problem
    exact: Step
    step: Step

    @cached_property
    def halves(self) -> tuple[Half, ...]:
        """What each block of a layer minimises, and what is known of its terms."""
        return tuple(
            Half(name, p, classify(p) if p.terms else (), tuple(h for h in self.exact.hands if h.block == name))
            for name, p in self.exact.subproblems
        )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The summands of the objective, of a layer with one part."""
        return tuple(p for h in self.halves for p in h.parts)

    @cached_property
    def variable(self) -> Sym:
        return self.problem.variables[0]

    @cached_property
    def gradient(self) -> Expr | None:
        """Gradient of the smooth part, of a layer with one part."""
        return self.halves[0].gradient

    @property
    def layers(self) -> int:
        assert self.spec.unroll is not None
        return int(self.spec.unroll.layers)

    @property
    def free(self) -> int | None:
        """How many layers have numbers of their own, where others share one set."""
        return None if self.spec.unroll is None else self.spec.unroll.free

    def __str__(self) -> str:
        return "\n".join(_page(self))

    def equations(self) -> list[tuple[str, str, str]]:
        """(what it is, left side, right side with its relation), both sides in LaTeX."""
        goal = r"\min" if self.problem.sign > 0 else r"\max"
        names = ", ".join(latex(v) for v in self.problem.variables)
        terms = joined([latex(e) for e in self.problem.penalties])
        sets = ", ".join(latex(e) for e in self.problem.sets)
        within = rf" \quad \text{{subject to }} {sets}" if sets else ""
        rows = [("objective", rf"{goal}_{{{names}}}", terms + within)]
        rows += [
            ("gradient", rf"\nabla f({latex(h.variable)})", f"= {latex(h.gradient)}")
            for h in self.halves
            if h.gradient is not None
        ]
        for found in proxes(self.exact.assigns):
            assert found.scalar is not None
            rows.append(("prox", "v", rf"\mapsto {found.scalar.latex()} \quad \text{{{found.rule}}}"))
        rows += [("step", *_assignment(a)) for a in (*self.exact.definitions, *self.exact.assigns)]
        for p in self.step.learned:
            rows.append(("learned", latex(sp.Symbol(p.name)), rf"\text{{ for }} {latex(p.replaces)}"))
        if self.step.learned:
            rows += [("layer", *_assignment(a)) for a in self.step.assigns]
        return rows

    def to_latex(self) -> str:
        """The derivation as aligned LaTeX equations."""
        rows = [rf"{left} &{right} \\" for _, left, right in self.equations()]
        return "\\begin{aligned}\n" + "\n".join(rows) + "\n\\end{aligned}"

    def _repr_latex_(self) -> str:
        return f"$${self.to_latex()}$$"

    def _repr_html_(self) -> str:
        return html.equations(self.equations())


def _assignment(a: Assign) -> tuple[str, str]:
    return latex(a.target), rf"\leftarrow {latex(a.value)}"


@dataclass(frozen=True)
class Half:
    """One block: what it minimises over its variable, term by term."""

    name: str
    problem: Problem
    parts: tuple[Part, ...]
    hands: tuple[Hand, ...]

    @property
    def variable(self) -> Sym:
        return self.problem.variables[0]

    @cached_property
    def gradient(self) -> Expr | None:
        """Gradient of what the algorithm takes through its gradient."""
        smooth = [h.e for h in self.hands if h.use == "gradient"]
        return gradient(add(*smooth), self.variable) if smooth else None


def derive(spec: Spec, dims: dict[str, int] | None = None) -> Derivation:
    """Every stage above the graph. Raises SpecError E1xx (formulas), E3xx (what cannot be derived)."""
    problem = from_spec(spec, dims)
    for v in problem.variables:
        if v.family is not None:
            where = spec.key_where("variables", v.name)
            raise SpecError(
                "E132",
                f"{v.name} is a family; what is unrolled is one matrix",
                where,
                "unroll.loss takes families; or give it its sizes: Z: [n, N]",
            )
    exact = blocks.derive(problem, spec)
    spec = spec.naming(exact.chosen)
    step = controlled(parametrise(exact, problem, spec), problem, spec)
    return Derivation(spec, problem, settled(exact), settled(step))


def proxes(assigns: Iterable[Assign]) -> Iterable[proximal.Proximal]:
    """The proxes of a step that rest on a scalar one, each formula once."""
    found: dict[tuple[str, str], proximal.Proximal] = {}
    for a in assigns:
        if isinstance(a.value, Expr):
            for node in walk(a.value):
                if isinstance(node, Prox):
                    done = proximal.derive(node.term, node.variable, node.t, node.at, node.swaps)
                    if done.scalar is not None:
                        found[done.scalar.formula_text(), done.rule] = done
    return found.values()


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(d: Derivation) -> Iterable[str]:
    learned = "learned" if d.step.learned else "nothing learned"
    yield f"{d.spec.title}: {d.step.algorithm.replace('_', ' ')} on {d.spec.objective or d.problem.name}, {counted(d.layers, 'layer')}, {learned}{'' if d.free is None else f', those after layer {d.free} the same'}"
    if d.problem.about:
        yield d.problem.about
    yield ""
    yield from _objective(d)
    yield ""
    for half in d.halves:
        yield from _block(d, half)
        yield ""
    yield from _not_exact(d)


def _block(d: Derivation, half: Half) -> Iterable[str]:
    """One part of a layer: what it minimises (where that is not the objective), its step, what is learned."""
    if half.name:
        yield f"block {half.name}"
        yield from _row("", _minimised(half) if half.problem.terms else "not derived: as the spec says")
    yield from _algorithm(d, half)
    learned = [p for p in d.step.learned if _belongs(p, half, d)]
    if learned:
        yield ""
        yield from _learned(d, half, learned)


def _minimised(half: Half) -> str:
    sets = ", ".join(pretty(e) for e in half.problem.sets)
    terms = joined([pretty(e) for e in half.problem.penalties])
    return f"minimise over {half.variable.name}   {terms}{f'   subject to {sets}' if sets else ''}"


def _row(head: str, body: str) -> list[str]:
    """A line of the page, or as many as the terminal asks for."""
    return [f"{head if i == 0 else '':15}   {line}" for i, line in enumerate(wrapped(body, WIDTH - 18))]


def _belongs(p: Learned, half: Half, d: Derivation) -> bool:
    """Does a parameter stand in the assignments of a block?"""
    symbols = {
        s
        for a in d.step.assigns
        if a.block == half.name and isinstance(a.value, Expr)
        for s in (*a.value.symbols, *used_scalars(a.value))
    }
    return p.symbol in symbols or (not half.name and len(d.halves) == 1)


def _not_exact(d: Derivation) -> Iterable[str]:
    """Everything that was asked for beyond the exact algorithm."""
    if not d.step.departures:
        yield "not exact         nothing: no approximation was used"
        return
    for head, kind in (("not exact", False), ("exact rewrites", True)):
        found = [x for x in d.step.departures if (x.kind == "exact") == kind]
        yield from _named(head, [(f"{x.block}: {x.name}" if x.block else x.name, _tidy_says(x)) for x in found])


def _named(head: str, rows: list[tuple[str, str]]) -> Iterable[str]:
    """Names and what is said of them, beside each other or, where that is too wide, below."""
    wide = max((len(name) for name, _ in rows), default=0)
    fits = all(18 + wide + 3 + len(says) <= WIDTH for _, says in rows)
    for i, (name, says) in enumerate(rows):
        front = f"{head if i == 0 else '':15}   {name}"
        if fits:
            yield f"{front.ljust(18 + wide)}   {says}"
            continue
        yield front
        yield from (" " * 20 + line for line in wrapped(says, WIDTH - 20))


def _tidy_says(x: Departure) -> str:
    return x.says if x.kind != "exact" else "changes no value"


def _objective(d: Derivation) -> Iterable[str]:
    goal = "minimise" if d.problem.sign > 0 else "maximise"
    front = f"{goal} over {', '.join(v.name for v in d.problem.variables)}"
    rows: list[tuple[str, ...]] = []
    for name, e in d.problem.terms.items():
        is_set = isinstance(split(e)[1], Indicator)
        shown = pretty(split(e)[1] if is_set else e)
        head = front if not rows else "subject to" if is_set else "+"
        rows.append((head.rjust(max(len(goal) + 8, len("subject to"))), shown, name, _kind(d, name)))
    if sum(max(len(r[i]) for r in rows) for i in range(4)) + 9 <= WIDTH:
        yield from table(rows)
        rows = []
    for head, shown, name, kind in rows:  # what is known of a term, below it
        first, *more = wrapped(shown, WIDTH - len(head) - 3)
        yield f"{head}   {first}"
        indent = " " * (len(head) + 3)
        yield from (indent + line for line in more)
        yield from (f"{indent}  {line}" for line in wrapped(f"{name}: {kind}", WIDTH - len(indent) - 2))
    for said in (*d.spec.left, *d.spec.idle):
        yield from _row("", str(said))


def _kind(d: Derivation, name: str) -> str:
    """What is known of a term: smooth or proximable, convex or not, and how that was proved."""
    seen = [(h, p) for h in d.halves for p in h.parts if p.term == name]
    several = len({h.variable for h, _ in seen}) > 1
    kinds = [
        f"in {h.variable.name}: {_of_part(p, h, d.problem.sign)}" if several else _of_part(p, h, d.problem.sign)
        for h, p in seen
    ]
    if kinds:
        return "; ".join(dict.fromkeys(kinds))
    blocks = d.spec.unroll.blocks if d.spec.unroll is not None else ()
    places = [b.block for b in blocks if b.surrogate is not None and name in b.surrogate.replaces]
    if places:
        return f"in its place block {' and block '.join(places)} has a surrogate"
    moving = any(depends(d.problem.terms[name], z) for z in d.problem.variables)
    return "no block takes it" if moving else "constant"


def _of_part(p: Part, half: Half, sign: int) -> str:
    """Of a summand as it is written; sign: -1 where that is maximised, and p.e is what is minimised in its place."""
    if p.smooth is not None and p.descended:
        found = bounds(p.e, half.variable)
        known = found is not None and found.smooth
        constant = f"L = {pretty(found.lipschitz)}" if found is not None and known else "no Lipschitz constant is known"
        up, down = (found.convex, found.concave) if found is not None else (False, False)
        if sign < 0:
            up, down = down, up
        good = "convex" if sign > 0 else "concave"
        curved = "affine" if up and down else "convex" if up else "concave" if down else f"not known to be {good}"
        return f"smooth, {curved}, {constant}  ({p.smooth.proof}: {p.smooth.reason})"
    if p.proximal is None:
        assert p.inner is not None
        g, w, k = p.inner
        found = proximal.proximable(g, w)
        curved = "convex" if found.convex else "not known to be convex"
        return (
            f"g(K {half.variable.name}), K {half.variable.name} = {pretty(k.e)}, g proximable, {curved}  ({found.rule})"
        )
    if p.is_set:
        return f"{'convex set' if p.proximal.convex else 'set that is not convex'}  ({p.proximal.rule})"
    surely = p.proximal.scalar is not None and p.proximal.scalar.curvature.surely_not_convex
    curved = "convex" if p.proximal.convex else "not convex" if surely else "not known to be convex"
    return f"{'proximable' if sign > 0 else 'its negative is proximable'}, {curved}  ({p.proximal.rule})"


def _algorithm(d: Derivation, half: Half) -> Iterable[str]:
    rows: list[tuple[str, str]] = []
    mine = [a for a in d.exact.assigns if a.block == half.name]
    if half.gradient is not None:
        rows.append(("gradient", f"∇f({half.variable.name}) = {pretty(half.gradient)}"))
        if half.problem.sign < 0:
            rows.append(("", "f is minus the smooth terms: what is minimised"))
    for found in proxes(mine):
        rows += _prox_rows(found)
    suffix = f"_{half.name}" if half.name else ""
    whole = d.spec.unroll is not None and not d.spec.unroll.blocks
    for a in d.exact.definitions:  # of a text in several variables, all before the first
        if not suffix or a.target.name.endswith(suffix) or (whole and half is d.halves[0]):
            rows.append(("", f"{a.target.name} = {pretty(a.value)}"))
    for i, a in enumerate(mine):
        rows.append(("step" if i == 0 else "", f"{a.target.name} ← {pretty(a.value)}"))
    prefix = f"{half.name}: " if half.name and not whole else ""
    if half is d.halves[-1] or not whole:  # of a text in several variables, after the last
        rows += [("", note.removeprefix(prefix)) for note in d.exact.notes if note.startswith(prefix)]
    if half is d.halves[-1]:
        rows += [("", n) for c in d.exact.claims for n in c.says() if n not in d.exact.notes]
    for head, body in rows:
        yield from _row(head, body)


def _prox_rows(found: proximal.Proximal) -> list[tuple[str, str]]:
    assert found.scalar is not None
    return [
        ("prox", f"v ↦ {found.scalar.formula_text()}   ({found.rule})"),
        ("", f"derived; {found.scalar.proof}"),
    ]


def _learned(d: Derivation, half: Half, learned: list[Learned]) -> Iterable[str]:
    said = [_parameter(p, d) for p in learned if not p.cell]
    said += [(says, "", "shared by layers", "") for says in dict.fromkeys(p.cell for p in learned if p.cell)]
    rows = [("learned" if i == 0 else "", *row) for i, row in enumerate(said)]
    if sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 20 <= WIDTH:
        yield from table([(r[0].ljust(15), *r[1:]) for r in rows])
    else:  # what each is for, below it
        fronts = table([(r[0].ljust(15), r[1], *r[3:]) for r in rows], width=200)
        for front, row in zip(fronts, rows, strict=True):
            yield front
            yield from (" " * 20 + line for line in wrapped(row[2], WIDTH - 20))
    mine = [a for a in d.step.assigns if a.block == half.name]
    for i, a in enumerate(a for a in mine if isinstance(a.value, Expr)):
        yield from _row("so" if i == 0 else "", f"{a.target.name} ← {pretty(a.value)}")
    for found in proxes(mine):
        (head, body), _ = _prox_rows(found)
        yield from _row(head, body)


def _parameter(p: Learned, d: Derivation) -> tuple[str, ...]:
    low, high = p.limits
    within = f", ≥ {low:g}" if math.isinf(high) else f", {low:g} to {high:g}"
    if p.grid is not None:
        within = ", rising" if math.isinf(high) else ", slopes between 0 and 1"
    said = {"positive": ", > 0", "exp": ", > 0", "symmetric": ", symmetric", "unit_columns": ", unit columns"}
    kept = "" if p.constraint == "none" else said.get(p.constraint, within)
    shape = " × ".join(map(str, p.shape)) or "scalar"
    shape += f" values on [{p.grid.low:g}, {p.grid.high:g}]" if p.grid is not None else ""
    shape = f"{p.family} of {shape}" if p.family is not None else shape
    kept += {"value": "", "data": ", worked out on data"}.get(p.init, f", starts {p.init}")
    kept += ", odd" if p.grid is not None and p.grid.odd else ""
    kept += "" if p.own_start is None or p.grid is not None else f", starts at {pretty(p.own_start)}"
    kept += ", stays as it starts" if p.held else ""
    what = f"for {pretty(p.replaces)}{_place(p, d)}"
    each = "one per layer" if d.free is None else f"one for each of {counted(d.free, 'layer')}, one for those after"
    return p.name, what, f"{each if p.per_layer else 'shared by layers'}{kept}", shape


def _place(p: Learned, d: Derivation) -> str:
    """Which occurrences a parameter takes the place of, where those are not all."""
    for a in d.step.assigns:
        for node in walk(a.value) if isinstance(a.value, Expr) else ():
            if isinstance(node, Normalise) and p.symbol in (*node.weight.symbols, *node.bias.symbols):
                return f", {'weight' if p.symbol in node.weight.symbols else 'bias'} of the norm"
    if isinstance(p.replaces, Zero):
        return ", added"
    if p.where:
        said = {"output": ", on the way out", "gradient": ", in the gradient", "prox": ", in the prox"}
        return said.get(p.where, f", in {p.where}")
    others = [q for q in d.step.learned if q is not p and q.where and q.replaces == p.replaces]
    return ", elsewhere" if others else ""
