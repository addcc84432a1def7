"""The derivation of a network, to be read: objective -> gradient, prox, L -> step -> what is learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from unroll import html
from unroll.calculus import prox as proximal
from unroll.calculus.curvature import bounds
from unroll.calculus.gradient import gradient
from unroll.derivation import algorithms, blocks
from unroll.derivation.algorithms import Part
from unroll.derivation.learning import parametrise, used_scalars
from unroll.derivation.step import Assign, Departure, Learned, Step
from unroll.errors import SpecError
from unroll.language.constructors import add
from unroll.language.nodes import Expr, Prox, Sym, walk
from unroll.language.problem import Problem, from_spec
from unroll.language.show import latex, pretty
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
        return tuple(Half(name, p, algorithms.classify(p) if p.terms else ()) for name, p in self.exact.subproblems)

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

    def __str__(self) -> str:
        return "\n".join(_page(self))

    def equations(self) -> list[tuple[str, str, str]]:
        """(what it is, left side, right side with its relation), both sides in LaTeX."""
        z = latex(self.variable)
        goal = r"\min" if self.problem.sign > 0 else r"\max"
        rows = [("objective", rf"{goal}_{{{z}}}", " + ".join(latex(e) for e in self.problem.terms.values()))]
        rows += [
            ("gradient", rf"\nabla f({latex(h.variable)})", f"= {latex(h.gradient)}")
            for h in self.halves
            if h.gradient is not None
        ]
        for record in proxes(self.exact.assigns):
            left, right = record.latex().split(" = ", 1)
            rows.append(("prox", left, f"= {right}"))
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

    @property
    def variable(self) -> Sym:
        return self.problem.variables[0]

    @property
    def proximal(self) -> bool:
        """Is there a term that is taken through its prox?"""
        return any(not p.descended for p in self.parts)

    @cached_property
    def gradient(self) -> Expr | None:
        """Gradient of the smooth part."""
        smooth = [p.e for p in self.parts if p.descended or not self.proximal]
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
    return Derivation(spec, problem, exact, parametrise(exact, problem, spec))


def proxes(assigns: Iterable[Assign]) -> Iterable[proximal.ScalarProx]:
    """The scalar proxes of a step, each once."""
    found: dict[int, proximal.ScalarProx] = {}
    for a in assigns:
        if isinstance(a.value, Expr):
            for node in walk(a.value):
                if isinstance(node, Prox):
                    done = proximal.derive(node.term, node.variable, node.t, node.at, node.swaps)
                    if done.scalar is not None:
                        found[id(done.scalar)] = done.scalar
    return found.values()


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(d: Derivation) -> Iterable[str]:
    learned = "learned" if d.step.learned else "nothing learned"
    yield f"{d.spec.title}: {d.step.algorithm.replace('_', ' ')} on {d.spec.objective or d.problem.name}, {d.layers} layers, {learned}"
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
        terms = " + ".join(pretty(e) for e in half.problem.terms.values())
        yield f"{'':15}   {f'minimise over {half.variable.name}   {terms}' if terms else 'not derived: as the spec says'}"
    yield from _algorithm(d, half)
    learned = [p for p in d.step.learned if _belongs(p, half, d)]
    if learned:
        yield ""
        yield from _learned(d, half, learned)


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
    rows = [
        ((head if i == 0 else "").ljust(15), f"{x.block}: {x.name}" if x.block else x.name, _tidy_says(x))
        for head, kind in (("not exact", False), ("exact rewrites", True))
        for i, x in enumerate(x for x in d.step.departures if (x.kind == "exact") == kind)
    ]
    yield from _table(rows)


def _tidy_says(x: Departure) -> str:
    return x.says if x.kind != "exact" else "changes no value"


def _table(rows: list[tuple[str, ...]], indent: str = "") -> Iterable[str]:
    """Columns as wide as their widest cell."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for r in rows:
        yield (indent + "   ".join(c.ljust(w) for c, w in zip(r, widths, strict=True))).rstrip()


def _objective(d: Derivation) -> Iterable[str]:
    goal = "minimise" if d.problem.sign > 0 else "maximise"
    rows: list[tuple[str, ...]] = []
    for i, (name, e) in enumerate(d.problem.terms.items()):
        front = f"{goal} over {', '.join(v.name for v in d.problem.variables)}" if i == 0 else "+"
        rows.append((front.rjust(len(goal) + 8), pretty(e), name, _kind(d, name)))
    yield from _table(rows)


def _kind(d: Derivation, name: str) -> str:
    """What is known of a term: smooth or proximable, convex or not, and how that was proved."""
    kinds: list[str] = []
    seen = [(h, p) for h in d.halves for p in h.parts if p.term == name]
    for half, p in seen:
        if p.smooth is not None and p.descended:
            found = bounds(p.e, half.variable)
            constant = (
                f", L = {pretty(found.lipschitz)}" if found is not None and found.smooth else ", no Lipschitz constant"
            )
            convex = ", convex" if found is not None and found.convex else ", not known to be convex"
            kinds.append(f"smooth{convex}{constant}  ({p.smooth.proof}: {p.smooth.reason})")
        elif p.proximal is not None:
            convex = "convex" if p.proximal.convex else "not convex"
            kinds.append(f"{'constraint' if p.is_set else 'proximable'}, {convex}  ({p.proximal.rule})")
    return "; ".join(kinds) or "constant"


def _algorithm(d: Derivation, half: Half) -> Iterable[str]:
    rows: list[tuple[str, ...]] = []
    mine = [a for a in d.exact.assigns if a.block == half.name]
    if half.gradient is not None:
        rows.append(("gradient", f"∇f({half.variable.name}) = {pretty(half.gradient)}"))
    for record in proxes(mine):
        rows.append(("prox", f"{_tidy(record.text())}   derived; {record.proof}"))
    suffix = f"_{half.name}" if half.name else ""
    for a in d.exact.definitions:
        if not suffix or a.target.name.endswith(suffix):
            rows.append(("", f"{a.target.name} = {pretty(a.value)}"))
    for i, a in enumerate(mine):
        rows.append(("step" if i == 0 else "", f"{a.target.name} ← {pretty(a.value)}"))
    prefix = f"{half.name}: " if half.name else ""
    rows += [("", note.removeprefix(prefix)) for note in d.exact.notes if note.startswith(prefix)]
    yield from _table([(head.ljust(15), body) for head, body in rows])


def _tidy(text: str) -> str:
    return (
        text.replace("**", "^").replace("*", " ").replace("Abs(v)", "|v|").replace("Max", "max").replace("Min", "min")
    )


def _learned(d: Derivation, half: Half, learned: list[Learned]) -> Iterable[str]:
    rows = [("learned" if i == 0 else "", *_parameter(p)) for i, p in enumerate(learned)]
    yield from _table([(r[0].ljust(15), *r[1:]) for r in rows])
    mine = [a for a in d.step.assigns if a.block == half.name]
    for i, a in enumerate(a for a in mine if isinstance(a.value, Expr)):
        yield f"{'so' if i == 0 else '':15}   {a.target.name} ← {pretty(a.value)}"
    for record in proxes(mine):
        yield f"{'':15}   {_tidy(record.text())}"


def _parameter(p: Learned) -> tuple[str, ...]:
    kept = {"none": "", "positive": ", > 0", "symmetric": ", symmetric", "unit_columns": ", unit columns"}[p.constraint]
    shape = " × ".join(map(str, p.shape)) or "scalar"
    shape = f"{p.family} of {shape}" if p.family is not None else shape
    kept += {"value": "", "data": ", worked out on data"}.get(p.init, f", starts {p.init}")
    return p.name, "for", pretty(p.replaces), f"{'one per layer' if p.per_layer else 'shared by layers'}{kept}", shape
