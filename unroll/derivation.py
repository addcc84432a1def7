"""The derivation of a network, to be read: objective -> gradient, prox, L -> step -> what is learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from unroll import algorithms, html
from unroll.algorithms import Part
from unroll.calculus import prox as proximal
from unroll.calculus.curvature import bounds
from unroll.calculus.gradient import gradient
from unroll.expr import Expr, Prox, Sym, add, walk
from unroll.parametrise import parametrise
from unroll.problem import Problem, from_spec
from unroll.show import latex, pretty
from unroll.spec import Spec
from unroll.step import Assign, Learned, Step


@dataclass(frozen=True)
class Derivation:
    """All stages of one spec. `exact`: one iteration of the algorithm; `step`: the same with parameters in place."""

    spec: Spec
    problem: Problem
    parts: tuple[Part, ...]
    exact: Step
    step: Step

    @cached_property
    def variable(self) -> Sym:
        return self.problem.variables[0]

    @cached_property
    def gradient(self) -> Expr | None:
        """Gradient of the smooth part."""
        smooth = [p.e for p in self.parts if p.descended or not self.proximal]
        return gradient(add(*smooth), self.variable) if smooth else None

    @property
    def proximal(self) -> bool:
        """Does the step have a prox?"""
        return any(isinstance(n, Prox) for a in self.exact.assigns if isinstance(a.value, Expr) for n in walk(a.value))

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
        if self.gradient is not None:
            rows.append(("gradient", rf"\nabla f({z})", f"= {latex(self.gradient)}"))
        for record in proxes(self.exact):
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


def derive(spec: Spec, dims: dict[str, int] | None = None) -> Derivation:
    """Every stage above the graph. Raises SpecError E1xx (formulas), E3xx (what cannot be derived)."""
    problem = from_spec(spec, dims)
    exact = algorithms.derive(problem, spec)
    return Derivation(spec, problem, algorithms.classify(problem), exact, parametrise(exact, problem, spec))


def proxes(step: Step) -> Iterable[proximal.ScalarProx]:
    """The scalar proxes of a step, each once."""
    found: dict[int, proximal.ScalarProx] = {}
    for a in step.assigns:
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
    yield from _algorithm(d)
    if d.step.learned:
        yield ""
        yield from _learned(d)
    yield ""
    yield "not exact         nothing: no approximation was used"


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
    for p in (p for p in d.parts if p.term == name):
        if p.smooth is not None and p.descended:
            found = bounds(p.e, d.variable)
            constant = f", L = {pretty(found.lipschitz)}" if found is not None and found.smooth else ", no Lipschitz constant"
            convex = ", convex" if found is not None and found.convex else ", not known to be convex"
            kinds.append(f"smooth{convex}{constant}  ({p.smooth.proof}: {p.smooth.reason})")
        elif p.proximal is not None:
            convex = "convex" if p.proximal.convex else "not convex"
            kinds.append(f"{'constraint' if p.is_set else 'proximable'}, {convex}  ({p.proximal.rule})")
    return "; ".join(kinds) or "constant"


def _algorithm(d: Derivation) -> Iterable[str]:
    rows: list[tuple[str, ...]] = []
    if d.gradient is not None:
        rows.append(("gradient", f"∇f({d.variable.name}) = {pretty(d.gradient)}"))
    for record in proxes(d.exact):
        rows.append(("prox", f"{_tidy(record.text())}   derived; {record.proof}"))
    for a in d.exact.definitions:
        rows.append(("", f"{a.target.name} = {pretty(a.value)}"))
    for i, a in enumerate(d.exact.assigns):
        rows.append(("step" if i == 0 else "", f"{a.target.name} ← {pretty(a.value)}"))
    rows += [("", note) for note in d.exact.notes]
    yield from _table([(head.ljust(15), body) for head, body in rows])


def _tidy(text: str) -> str:
    return text.replace("**", "^").replace("*", " ").replace("Abs(v)", "|v|").replace("Max", "max").replace("Min", "min")


def _learned(d: Derivation) -> Iterable[str]:
    rows = [("learned" if i == 0 else "", *_parameter(p)) for i, p in enumerate(d.step.learned)]
    yield from _table([(r[0].ljust(15), *r[1:]) for r in rows])
    for i, a in enumerate(a for a in d.step.assigns if isinstance(a.value, Expr)):
        yield f"{'so' if i == 0 else '':15}   {a.target.name} ← {pretty(a.value)}"
    for record in proxes(d.step):
        yield f"{'':15}   {_tidy(record.text())}"


def _parameter(p: Learned) -> tuple[str, ...]:
    kept = {"none": "", "positive": ", > 0", "symmetric": ", symmetric", "unit_columns": ", unit columns"}[p.constraint]
    shape = " × ".join(map(str, p.shape)) or "scalar"
    return p.name, "for", pretty(p.replaces), f"{'one per layer' if p.per_layer else 'shared by layers'}{kept}", shape

