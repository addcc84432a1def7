"""Lines of a section: a value read once is written inside the line that reads it; one that is read more often, or that the
algorithm names, has a line of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy as sp

from unroll.emit.names import remark
from unroll.language.nodes import slot
from unroll.lower.graph import Graph
from unroll.lower.operations import BY_NAME, Context, Operand, Ref, helpers_of
from unroll.lower.scalar_text import POSTFIX, Text

WIDTH = 110


LONG = 60
"""An expression longer than this gets a line of its own."""


@dataclass
class Section:
    """Lines that compute some values, given the text of others."""

    graph: Graph
    known: dict[int, Text]
    fresh: Callable[[str], str]
    size: Callable[[sp.Expr], str]
    function: Callable[[Any], str]
    like: str = "x"
    used_ops: set[str] = field(default_factory=set[str])

    def branch(self) -> Section:
        """Lines within these, whose names are theirs alone."""
        return replace(self, known=dict(self.known))

    def operand(self, ref: Ref) -> Operand:
        return Operand(self.graph.nodes[ref.node], ref.flip, self.text(ref.node))

    def text(self, i: int) -> Text:
        """The expression of a node, operands that have no name written inside it."""
        if i in self.known:
            return self.known[i]
        node = self.graph.nodes[i]
        op = BY_NAME[node.op]
        self.used_ops.update(helpers_of(node))
        out = op.text(node, [self.operand(r) for r in node.inputs], Context(self.size, self.like, self.function))
        return Text(out.code, out.level, not node.plain)

    def stored(self, ref: Ref) -> Text:
        """The expression of a ref in the order in which its own value would be stored."""
        node = self.graph.nodes[ref.node]
        return self.operand(ref).ordered("cr" if node.batched else "rc")

    def lines_for(self, roots: Iterable[Ref], keep: Iterable[int] = ()) -> list[int]:
        """Nodes that deserve a line, operands first."""
        roots = list(roots)
        reads: dict[int, int] = {}
        pending = [r.node for r in roots]
        order: set[int] = set()
        for i in pending:
            reads[i] = reads.get(i, 0) + 1
        while pending:
            i = pending.pop()
            if i in order or i in self.known:
                continue
            order.add(i)
            for k, r in enumerate(self.graph.nodes[i].inputs):
                reads[r.node] = reads.get(r.node, 0) + self._occurrences(i, k)
                pending.append(r.node)
        kept, rows = set(keep), list[int]()
        for i in sorted(order):
            if i in kept or self._deserves(i, reads[i]):
                rows.append(i)
                self.known[i] = Text("name")  # for the length of what reads it
        for i in rows:
            del self.known[i]
        return rows

    def _occurrences(self, i: int, k: int) -> int:
        """How often the text of node i writes its k-th operand."""
        node = self.graph.nodes[i]
        if node.op == "attention":
            return 3 if k == 0 else 1
        if node.op == "difference":
            return 2 if node.attrs[1] else 1
        return max(node.attrs[0].count(slot(k)), 1) if node.op == "map" else 1

    def _deserves(self, i: int, reads: int) -> bool:
        node = self.graph.nodes[i]
        if node.op in ("keep", "running_sum_so_far"):  # once in a call, and in this order
            return True
        if node.op in ("number", "full", "eye") or not node.inputs:
            return node.op == "eye" and reads > 1
        return reads > 1 or i in self.graph.names or len(self.text(i).code) > LONG

    def assign(self, i: int, name: str | None = None) -> str:
        """The line of a node, which is known by its name from here on."""
        text = self.text(i)
        name = name or self.fresh(self.graph.names.get(i) or hint(self.graph, i))
        self.known[i] = Text(name, POSTFIX, text.tensor)
        return commented(f"{name} = {text.code}", self.graph.notes.get(i, ""))


def commented(line: str, note: str) -> str:
    note = remark(note)
    if not note:
        return line
    return f"{line}  # {note}" if len(line) + len(note) < WIDTH - 12 else f"# {note}\n{line}"


def hint(graph: Graph, i: int) -> str:
    """A name that says what a value is: A.T @ A -> AtA, step * A.T -> step_At."""

    def word(ref: Ref) -> str:
        node = graph.nodes[ref.node]
        own = graph.names.get(ref.node) or (
            str(node.attrs[0])
            if not node.inputs and node.op not in ("number", "eye", "full")
            else hint(graph, ref.node)
        )
        return f"{own}t" if ref.flip and {"r", "c"} <= {*node.tags} else own

    node = graph.nodes[i]
    match node.op:
        case "matmul" | "contract":
            joined = "".join(map(word, node.inputs))
        case "scale":
            joined = _joined(map(word, node.inputs))
        case "map":
            joined = _of_formula(node.attrs[0], [word(r) for r in node.inputs])
        case "weighed_product":
            joined = f"{''.join(map(word, node.inputs))}t"
        case "factor":
            joined = node.attrs[0]
        case "detach":
            joined = word(node.inputs[0])
        case "spectrum":
            joined = f"{word(node.inputs[0])}_hat"
        case "conjugate":
            joined = f"{word(node.inputs[0])}_conj"
        case "family_softmax":
            joined = "shares"
        case "cholesky" | "cholesky_inverse" | "inverse":
            joined = "chol" if node.op == "cholesky" else "inv"
        case _:
            joined = {"add": "t", "number": "t", "sum": "total"}.get(node.op, node.op)
    return joined if len(joined) <= 12 else {"matmul": "p", "scale": "q"}.get(node.op, "t")


def _joined(words: Iterable[str]) -> str:
    """Words that say something, each once."""
    return "_".join(dict.fromkeys(w for w in words if w != "t")) or "t"


def _of_formula(profile: sp.Expr, words: Sequence[str]) -> str:
    """x**2 -> x_sq, sqrt(x) -> x_root, exp(x) -> x_exp, x * y -> x_y; else t."""
    core = profile.as_coeff_Mul()[1]
    match core:
        case sp.Pow(base=sp.Symbol(), exp=power) if power in (2, sp.Rational(1, 2)):
            kind = "sq" if power == 2 else "root"
        case sp.Function(args=(sp.Symbol(),)) | sp.exp(args=(sp.Symbol(),)):
            kind = type(core).__name__.lower()
        case sp.Mul() if all(x.is_Symbol for x in core.args):
            return _joined(words)
        case _:
            return "t"
    return f"{words[0]}_{kind}" if words[0] != "t" else kind
