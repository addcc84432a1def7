"""A graph to be looked at: text, Mermaid, SVG."""

from __future__ import annotations

from html import escape

import sympy as sp

from unroll.lower.graph import Graph, axes_text
from unroll.lower.operations import LEAVES, Node, Ref, Stage

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
            terms = zip(node.attrs[0], operands, strict=True)
            signed = " + ".join(w if c == 1 else f"-{w}" if c == -1 else f"{c} {w}" for c, w in terms)
            return signed.replace("+ -", "- ")
        case "matmul" | "contract":
            return " @ ".join(operands)
        case "scale":
            return " * ".join(operands)
        case "project":
            return f"nearest in {node.attrs[0]}({', '.join(operands)})"
        case _:
            return f"{node.op}({', '.join(operands)})"


def _word(graph: Graph, ref: Ref) -> str:
    node = graph.nodes[ref.node]
    if node.op == "number":
        return str(node.attrs[0])
    own = str(node.attrs[0]) if node.op in LEAVES else graph.names.get(ref.node) or f"%{ref.node}"
    return f"{own}'" if ref.flip and len(node.tags) > 1 else own


def _label(graph: Graph, i: int, name: str, operation: str) -> str:
    """What a box says: its name too, or the number by which others call it."""
    return operation if graph.nodes[i].op in LEAVES else f"{name or f'%{i}'} = {operation}"


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
        members = [(i, _label(graph, i, name, operation)) for s, i, name, operation, _ in rows(graph) if s == stage]
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
    shown = {i: (stage, _label(graph, i, name, operation), axes) for stage, i, name, operation, axes in rows(graph)}
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
