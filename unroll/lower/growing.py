"""Graph -> Graph that reads the next tokens of a text alone: each operation over tokens keeps what it needs of those before.

A token sees the tokens up to it, so nothing that was worked out of earlier ones ever changes. Of n new tokens among m so far, the last ones:

    pointwise            f(x)                        the same, of the new tokens
    running_sum          cumsum over tokens          the sum so far is kept, and added
    attention            V softmax(c V'V), causal    V of all tokens is kept: queries of n, keys and values of m
    softmax, causal      of n x n scores             scores of m x n, made of what is kept; so is what they weigh
    first                of as many as tokens        its last n of m

An operation over tokens that is not among these, or sees later tokens, has no such rule, and the answer says which it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy as sp

from unroll.language.nodes import same, slot
from unroll.lower.graph import ALONG, Builder, Graph
from unroll.lower.operations import COLUMNWISE, SETS_OF_ENTRIES, Node, Ref

POINTWISE = ("map", "add", "scale", "prox", "detach", "dropout", "drop_path", "conjugate", "curve")
OVER_FAMILIES = ("family_sum", "family_logsumexp", "family_softmax")
OF_COLUMNS = ("first", "repeat", "difference", "shifts", "energy")
ABOUT = {
    "dim": "the number of tokens",
    "matmul": "a sum over all tokens",
    "contract": "a sum over all tokens",
    "sum": "a sum over all tokens",
    "softmax": "a softmax over all tokens",
    "attention": "attention to later tokens",
    "norm": "a norm over all tokens",
    "running_sum": "sums to the last token",
}


class Unkept(Exception):
    """An operation over tokens of which nothing is known that could be kept."""


def growing(graph: Graph, tokens: sp.Symbol, so_far: sp.Symbol) -> tuple[Graph, dict[int, int]]:
    """The graph of the new tokens, and for what it has in common with the other which node it was there.

    tokens: the size n of the axis of new tokens; so_far: m, which a call says.  Raises Unkept.
    """
    g = _Growth(graph, tokens, so_far, Builder(graph.open | {so_far}))
    wanted = {root: ref for root, ref in graph.roots.items() if root[0] in ("start", "next", "block")}
    grown = g.b.graph({root: g.ref(ref, False, False) for root, ref in wanted.items()})
    return grown, {ref.node: i for (i, *_), ref in g.made.items() if not ref.flip and not g.across(graph.nodes[i])}


@dataclass
class _Growth:
    """rows, cols of a request: are the rows (columns), where they are tokens, all of them, or the new ones?"""

    graph: Graph
    n: sp.Symbol
    m: sp.Symbol
    b: Builder
    made: dict[tuple[int, bool, bool], Ref] = field(default_factory=dict[tuple[int, bool, bool], Ref])

    def across(self, node: Node) -> tuple[int, ...]:
        """The axes of a node that are tokens."""
        return tuple(i for i in (0, 1) if same(node.shape[i], self.n))

    def is_tokens(self, ref: Ref, axis: int) -> bool:
        return same(self.graph.view(ref).shape[axis], self.n)

    def ref(self, ref: Ref, rows: bool, cols: bool) -> Ref:
        return self.b.flip(self.node(ref.node, cols, rows)) if ref.flip else self.node(ref.node, rows, cols)

    def node(self, i: int, rows: bool, cols: bool) -> Ref:
        node = self.graph.nodes[i]
        across = self.across(node)
        rows, cols = rows and 0 in across, cols and 1 in across
        key = (i, rows, cols)
        if key not in self.made:
            if len(across) == 2 and rows == cols:
                raise Unkept(_about(node))
            if len(across) == 1 and (rows or cols) and node.op not in ("full", "first"):
                self.made[key] = self.along("keep", self.node(i, False, False), across[0], self.m)
            else:
                self.made[key] = ref = self.make(node, rows, cols)
                if not ref.flip:
                    self.b.carry(ref.node, self.graph.names.get(i), self.graph.notes.get(i))
        return self.made[key]

    def along(self, op: str, x: Ref, axis: int, *attrs: sp.Expr) -> Ref:
        """An operation along an axis, of a value as it is stored."""
        return self.b.flip(self.b.add(op, (x.T,), 1 - axis, *attrs)) if x.flip else self.b.add(op, (x,), axis, *attrs)

    def make(self, node: Node, rows: bool, cols: bool) -> Ref:
        b, across, of_tokens = self.b, self.across(node), [self.across(self.graph.nodes[r.node]) for r in node.inputs]
        if node.op == "full":
            high, wide = node.shape
            return b.constant("full", self.m if rows else high, self.m if cols else wide, node.attrs[0])
        if not node.inputs:
            if (node.op == "dim" and node.attrs[0] == self.n.name) or (
                across and node.op not in ("input", "state", "start")
            ):
                raise Unkept(_about(node))
            return b.copy(node)
        if not across and not any(of_tokens) and node.op != "first":
            return b.add(node.op, [self.ref(r, False, False) for r in node.inputs], *node.attrs)
        return self.over_tokens(node, rows, cols)

    def over_tokens(self, node: Node, rows: bool, cols: bool) -> Ref:
        b, args, attrs = self.b, node.inputs, node.attrs
        match node.op:
            case op if op in POINTWISE or op in OVER_FAMILIES:
                return b.add(op, [self.ref(r, rows, cols) for r in args], *attrs)
            case op if op in ALONG and op not in ("softmax", "running_sum"):
                if any(self.is_tokens(args[0], i) for i in (0, 1) if attrs[0] in (None, i)):
                    raise Unkept(_about(node))
                return b.add(op, [self.ref(r, rows, cols) for r in args], *attrs)
            case "norm" if not self.is_tokens(args[0], attrs[1]):
                weights = [self.ref(r, False, False) for r in args[1:]]
                return b.add("norm", (self.ref(args[0], rows, cols), *weights), *attrs)
            case "softmax" if not self.is_tokens(args[0], attrs[0]):
                return b.add("softmax", (self.ref(args[0], rows, cols),), *attrs)
            case "softmax" if attrs[1] and (rows, cols) == (attrs[0] == 0, attrs[0] == 1):
                return self.along("softmax_so_far", self.ref(args[0], rows, cols), attrs[0])
            case "running_sum" if not self.is_tokens(args[0], attrs[0]):
                return b.add("running_sum", (self.ref(args[0], rows, cols),), *attrs)
            case "running_sum" if not attrs[1] and not (rows or cols):
                return self.along("running_sum_so_far", self.ref(args[0], False, False), attrs[0])
            case "attention" if attrs[0] and self.is_tokens(args[0], 1):
                v, scale = args
                return b.add(
                    "attend", (self.ref(v, False, False), self.ref(v, False, True), self.ref(scale, False, False))
                )
            case "matmul" | "contract":
                return self.product(node, rows, cols)
            case "first" if not any(self.across(self.graph.nodes[args[0].node])) and not attrs[0]:
                whole = b.add("first", (self.ref(args[0], False, False),), False, (self.m,))
                return whole if rows else self.along("latest", whole, 0, self.n)
            case op if (
                op in OF_COLUMNS and not self.is_tokens(args[0], 0) and not any(n.has(self.n) for n in node.shape[:1])
            ):
                return b.add(op, [self.ref(r, rows, cols) for r in args], *attrs)
            case "solve" | "cholesky_solve" if not self.across(self.graph.nodes[args[0].node]) and not self.is_tokens(
                args[1], 0
            ):
                return b.add(node.op, (self.ref(args[0], False, False), self.ref(args[1], rows, cols)), *attrs)
            case "project" if attrs[0] in SETS_OF_ENTRIES or (
                attrs[0] in COLUMNWISE and not self.is_tokens(args[0], 0)
            ):
                return b.add("project", [self.ref(r, rows, cols) for r in args], *attrs)
            case _:
                raise Unkept(_about(node))

    def product(self, node: Node, rows: bool, cols: bool) -> Ref:
        """A product; over tokens where one factor is 0 for what comes later."""
        x, y = node.inputs
        if not self.is_tokens(x, 1):
            return self.b.add(node.op, (self.ref(x, rows, False), self.ref(y, False, cols)), *node.attrs)
        if self.masked(y, 0) and not cols:  # columns look back
            return self.b.add(node.op, (self.ref(x, rows, True), self.ref(y, True, False)), *node.attrs)
        if self.masked(x, 1) and not rows:  # rows look back
            return self.b.add(node.op, (self.ref(x, False, True), self.ref(y, True, cols)), *node.attrs)
        raise Unkept(_about(node))

    def masked(self, ref: Ref, axis: int) -> bool:
        """Is an entry 0 where its place on this axis, of tokens that are seen, comes after that on the other, of tokens that see?"""
        node, axis = self.graph.nodes[ref.node], 1 - axis if ref.flip else axis
        match node.op:
            case "softmax":
                return node.attrs == (axis, True) and len(self.across(node)) == 2
            case "scale":
                return self.masked(node.inputs[1], axis)
            case "detach" | "dropout":
                return self.masked(node.inputs[0], axis)
            case "map":
                return any(
                    self.masked(r, axis) and node.attrs[0].subs(slot(i), 0) == 0 for i, r in enumerate(node.inputs)
                )
            case _:
                return False


def _about(node: Node) -> str:
    return ABOUT.get(node.op, f"the operation '{node.op}' over tokens")
