"""Source of the terms of an objective, per sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy as sp

from unroll.derivation.rewrites.exact import smaller_side
from unroll.emit.axes import axes_of, stored_sizes, unit_axes
from unroll.emit.layer import axes_tuple
from unroll.emit.names import Names
from unroll.emit.section import Section
from unroll.emit.text import helper, imports, needed
from unroll.language.nodes import Sym
from unroll.language.problem import Problem
from unroll.lower.graph import Graph, lower_terms
from unroll.lower.padding import padded
from unroll.lower.passes import Sizes, optimise
from unroll.lower.scalar_text import Text, formula


def term_source(problem: Problem, dims: Mapping[str, int], otherwise: str = "") -> str:
    """Source of the terms of a problem (see `objective`), its graph optimised for the sizes that are known.

    Determinants are taken on the smaller side.  otherwise: what to give where the sizes turn none of them.
    """
    small = _on_smaller_side(problem, dims)
    if otherwise and small is problem:
        return otherwise
    sizes = Sizes({d: dims[d.name] for d in problem.dims if d.name in dims}, 1)
    return objective(small, optimise(padded(lower_terms(small), small), sizes).graph, dims)


def _on_smaller_side(problem: Problem, dims: Mapping[str, int]) -> Problem:
    """The problem itself where nothing changes."""
    known = {d: dims[d.name] for d in problem.dims if d.name in dims}
    terms = {name: smaller_side(e, known) for name, e in problem.terms.items()}
    return problem if all(terms[n] is e for n, e in problem.terms.items()) else replace(problem, terms=terms)


def term_symbols(problem: Problem) -> list[Sym]:
    """What the terms are functions of: all variables, then the inputs and parameters that occur."""
    read = {s for e in problem.terms.values() for s in e.symbols}
    return [*problem.variables, *(s for s in (*problem.inputs, *problem.parameters) if s in read or "mask" in s.props)]


def objective(problem: Problem, graph: Graph, dims: Mapping[str, int] | None = None) -> str:
    """Source of a function of variables, inputs, parameters and scalars: the value of every term, per sample.

    dims: numbers for sizes that are no axis of a tensor.
    """
    names, lines = Names(), list[str]()
    symbols = [*problem.variables, *problem.inputs, *problem.parameters]
    read = [*(known := term_symbols(problem)), *(s for s in symbols if s not in known)]
    args = [names("symbol", s.name) for s in symbols] + [names("symbol", s.name) for s in problem.scalars]
    sizes = {d: names("dim", d.name) for d in problem.dims}
    for s in read:
        for d, word in sizes.items():
            family = [(-len(stored_sizes(s)))] if s.family == d else []
            axes = axes_of(s, d)
            line = f"{word} = {names('symbol', s.name)}.shape[{(family or axes)[0]}]" if family or axes else ""
            if line and not any(x.startswith(f"{word} = ") for x in lines):
                lines.append(line)
    known_sizes = dims or {}
    lines += [
        f"{word} = {known_sizes[d.name]}"
        for d, word in sizes.items()
        if d.name in known_sizes and not any(x.startswith(f"{word} = ") for x in lines)
    ]
    for s in known:
        if dropped := unit_axes(s):
            lines.append(f"{names('symbol', s.name)} = {names('symbol', s.name)}.squeeze({axes_tuple(dropped)})")
    counted = {str(n.attrs[0]) for n in graph.nodes.values() if n.op == "scalar"}
    numbers = [names("symbol", s.name) for s in problem.scalars if s.name in counted]
    lines += [f"{w} = torch.as_tensor({w}, dtype=torch.float64)" for w in numbers]
    texts: dict[int, Text] = {}
    for i, node in graph.nodes.items():
        if node.op in ("input", "given", "scalar"):
            texts[i] = Text(names("symbol", str(node.attrs[0])))
        elif node.op == "dim":
            texts[i] = Text(names("dim", str(node.attrs[0])), tensor=False)
    size: Callable[[sp.Expr], str] = lambda n: formula(n, {d: Text(w, tensor=False) for d, w in sizes.items()}).code

    def no_prox(record: Any) -> str:
        raise AssertionError(f"internal error, please report: a proximal step within an objective: {record}")

    sec = Section(graph, texts, names.fresh, size, no_prox, args[0])
    goals = {name: graph.roots["term", name] for name in problem.terms}
    computed = [sec.assign(i) for i in sec.lines_for(goals.values())]
    body = [f"    {name!r}: {sec.text(ref.node).code}," for name, ref in goals.items()]
    used = "\n".join([*computed, *body])
    lines = [
        x
        for x in lines
        if not (m := re.match(r"(\w+) = (?:\w+\.shape|\d+$)", x)) or re.search(rf"(?<![\w.]){m[1]}\b", used)
    ] + computed
    code = (
        "\n".join(["def objective(" + ", ".join(args) + "):", *(f"    {x}" for x in [*lines, "return {", *body, "}"])])
        + "\n"
    )
    whole = "\n\n".join([*(helper(h) for h in needed(sec.used_ops)), code])
    return f"{imports(whole)}\n\n{whole}"
