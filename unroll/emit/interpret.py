"""Run a graph node by node, as it stands: what a pass may not change. And how a graph is shown: text, Mermaid, SVG."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from functools import reduce
from html import escape
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from unroll.calculus import torch_functions as runtime
from unroll.emit.section import Section
from unroll.lower.graph import Builder, Graph, Root, axes_text
from unroll.lower.operations import HELPERS, LEAVES, Node, Ref, Stage
from unroll.lower.passes import rewrite
from unroll.lower.scalar_text import Text, formula

Leaf = tuple[str, str]
"""(operation, name), as ("given", "A")."""


def leaves(graph: Graph) -> dict[Leaf, Node]:
    """What a graph reads."""
    return {(n.op, str(n.attrs[0])): n for n in graph.nodes.values() if n.op in LEAVES}


def interpret(graph: Graph, values: Mapping[Leaf, Any], sizes: Mapping[str, int]) -> dict[Root, Tensor]:
    """The value of every root for given values of the leaves, as stored; one layer, products from left to right."""
    graph = _binary(graph)
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "math": math, "functools": functools}
    for source in (*(h.source for h in HELPERS.values()), *(op.source for op in runtime.RUNTIME)):
        exec(source, space)
    space["like"] = torch.zeros((), dtype=torch.float64)
    known: dict[int, Text] = {}
    section = Section(graph, known, str, lambda n: _size(n, sizes), lambda record: _prox(record, space), "like")
    for i, node in graph.nodes.items():
        leaf = (node.op, str(node.attrs[0])) if node.attrs else ("", "")
        space[f"v{i}"] = values[leaf] if leaf in values else eval(section.text(i).code, space)
        known[i] = Text(f"v{i}", tensor=not node.plain)
    return {root: torch.as_tensor(eval(section.stored(ref).code, space)) for root, ref in graph.roots.items()}


def _size(n: sp.Expr, sizes: Mapping[str, int]) -> str:
    return formula(
        n, {s: Text(str(sizes[s.name]), tensor=False) for s in n.free_symbols if isinstance(s, sp.Symbol)}
    ).code


def _prox(record: Any, space: dict[str, Any]) -> str:
    name = f"prox{id(record)}"
    if name not in space:
        exec(record.source(name), space)
    return name


def _binary(graph: Graph) -> Graph:
    """Products of many factors as products of two, from the left."""

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        if node.op != "product":
            return None
        return b.scaled(inputs[0], reduce(lambda left, right: b.add("matmul", (left, right)), inputs[1:]))

    return rewrite(graph, rule)


def sample(graph: Graph, sizes: Mapping[str, int], seed: int = 0, batch: int = 2) -> dict[Leaf, Any]:
    """Random values for the leaves of a graph: scalars in (1/2, 3/2), tensors Gaussian, float64."""
    g = torch.Generator().manual_seed(seed)
    out: dict[Leaf, Any] = {}
    for leaf, node in leaves(graph).items():
        by_tag = {"*": batch, "r": node.shape[0], "c": node.shape[1], **dict(node.families)}
        shape = [
            int(sp.sympify(by_tag[t]).subs({sp.Symbol(d, integer=True, positive=True): n for d, n in sizes.items()}))
            for t in node.tags
        ]
        if leaf[0] == "dim":
            out[leaf] = sizes[leaf[1]]
        elif node.plain:
            out[leaf] = 2
        elif node.tags:
            value = torch.randn(shape, generator=g, dtype=torch.float64)
            out[leaf] = (value + value.mT) / 2 if node.symmetric else value
        else:
            out[leaf] = 0.5 + torch.rand((), generator=g, dtype=torch.float64)
    return out


def difference(
    before: Graph, after: Graph, sizes: Mapping[str, int], seed: int = 0, *, positive: Collection[str] = ()
) -> float:
    """Largest relative difference of any root between two graphs on random leaves, those named here without a negative entry."""
    values = sample(before, sizes, seed)
    values |= {leaf: value.abs() for leaf, value in values.items() if leaf[1] in positive}
    a, b = interpret(before, values, sizes), interpret(after, values, sizes)
    gaps = [float((a[r] - b[r]).abs().max()) / max(1.0, float(a[r].abs().max())) for r in a if a[r].numel()]
    return max(gaps, default=0.0)


# --- pictures ---------------------------------------------------------------------------------------------------------

_SECTIONS = {Stage.SETUP: "set up once", Stage.PROLOGUE: "once per call", Stage.BODY: "every layer"}


def rows(graph: Graph) -> list[tuple[Stage, int, str, str, str]]:
    """(stage, node, result, operation, axes) of every node but constants, in order."""
    out: list[tuple[Stage, int, str, str, str]] = []
    for i, node in graph.nodes.items():
        if node.stage != Stage.CONSTANT:
            out.append((node.stage, i, graph.names.get(i, ""), _operation(graph, node), axes_text(node) or "scalar"))
    return sorted(out, key=lambda row: (row[0], row[1]))


def _operation(graph: Graph, node: Node) -> str:
    if node.op in LEAVES:
        return f"{node.op} {node.attrs[0]}"
    operands = [_word(graph, r) for r in node.inputs]
    match node.op:
        case "map":
            return str(
                node.attrs[0].subs({sp.Symbol(f"_{k}", real=True): sp.Symbol(w) for k, w in enumerate(operands)})
            )
        case "add":
            return " + ".join(
                w if c == 1 else f"{c} {w}" for c, w in zip(node.attrs[0], operands, strict=True)
            ).replace("+ -1 ", "- ")
        case "matmul" | "contract":
            return " @ ".join(operands)
        case "scale":
            return " * ".join(operands)
        case _:
            return f"{node.op}({', '.join(operands)})"


def _word(graph: Graph, ref: Ref) -> str:
    node = graph.nodes[ref.node]
    if node.op == "number":
        return str(node.attrs[0])
    own = str(node.attrs[0]) if node.op in LEAVES else graph.names.get(ref.node) or f"%{ref.node}"
    return f"{own}'" if ref.flip and len(node.tags) > 1 else own


def graph_text(graph: Graph) -> str:
    """One line per tensor operation, by stage, with its axes as stored; then what becomes of each state."""
    lines: list[str] = []
    last: Stage | None = None
    for stage, i, name, operation, axes in rows(graph):
        if stage != last:
            lines += ([""] if lines else []) + [_SECTIONS[stage]]
            last = stage
        lines.append(f"  {name or f'%{i}':10s} = {operation:52s} {axes}")
    ends = [f"  {kind:8s} {name:8s} {_word(graph, ref)}" for (kind, name), ref in graph.roots.items()]
    return "\n".join([*lines, "", "roots", *ends])


def mermaid(graph: Graph) -> str:
    """The graph for Markdown viewers."""
    lines = ["flowchart TD"]
    for stage, title in _SECTIONS.items():
        members = [
            (i, f"{name + ' = ' if name else ''}{operation}") for s, i, name, operation, _ in rows(graph) if s == stage
        ]
        if members:
            lines += [f'  subgraph {stage.name.lower()} ["{title}"]']
            lines += [f'    n{i}["{escape(label, quote=True)}"]' for i, label in members] + ["  end"]
    shown = {i for _, i, *_ in rows(graph)}
    lines += [f"  n{r.node} --> n{i}" for i in shown for r in graph.nodes[i].inputs if r.node in shown]
    ends = [(kind, name, ref) for (kind, name), ref in graph.roots.items() if ref.node in shown]
    lines += [
        f'  n{ref.node} --> {kind}_{k}(["{escape(f"{kind} {name}", quote=True)}"])'
        for k, (kind, name, ref) in enumerate(ends)
    ]
    return "\n".join(lines) + "\n"


def svg(graph: Graph) -> str:
    """The graph as a drawing: a row per depth, boxes coloured by stage, an edge per operand."""
    shown = {
        i: (stage, f"{name + ' = ' if name else ''}{operation}", axes)
        for stage, i, name, operation, axes in rows(graph)
    }
    depth: dict[int, int] = {}
    for i in sorted(shown):
        depth[i] = 1 + max((depth[r.node] for r in graph.nodes[i].inputs if r.node in depth), default=-1)
    place: dict[int, tuple[int, int]] = {}
    by_row: dict[int, list[int]] = {}
    for i, d in depth.items():
        by_row.setdefault(d, []).append(i)
    wide = 12 + 7 * max((len(label) for _, label, _ in shown.values()), default=10)
    for d, members in by_row.items():
        for k, i in enumerate(members):
            place[i] = (20 + k * (wide + 24), 20 + d * 78)
    width = 40 + (wide + 24) * max((len(m) for m in by_row.values()), default=1)
    height = 60 + 78 * len(by_row)
    colour = {Stage.SETUP: "#e8eef7", Stage.PROLOGUE: "#eaf5ea", Stage.BODY: "#fdf1e0"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="monospace" font-size="11">'
    ]
    for i, (x, y) in place.items():
        for r in graph.nodes[i].inputs:
            if r.node in place:
                a, b = place[r.node]
                parts.append(f'<line x1="{a + wide / 2}" y1="{b + 40}" x2="{x + wide / 2}" y2="{y}" stroke="#888"/>')
    for i, (x, y) in place.items():
        stage, label, axes = shown[i]
        parts.append(f'<rect x="{x}" y="{y}" width="{wide}" height="40" rx="5" fill="{colour[stage]}" stroke="#555"/>')
        parts.append(f'<text x="{x + 6}" y="{y + 16}">{escape(label)}</text>')
        parts.append(f'<text x="{x + 6}" y="{y + 32}" fill="#666">{escape(axes)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
