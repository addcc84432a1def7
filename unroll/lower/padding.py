"""Graph -> Graph: what is worked out over a size leaves out what a mask says is padding, so that samples of several lengths share a batch.

    sums, lengths, products over it    of what is 0 at padding
    softmax, max, logsumexp over it    log 0 is added there
    the size itself                    the count of each sample
    inverses and determinants          the rows and columns of padding are those of the identity
    singular values                    of a matrix that is 0 at padding
    what has no value or slope at 0    of what is 1 at padding
    what a layer leaves                is 0 there

An operation along the size without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import sympy as sp

from unroll.calculus.torch_text import log_of_mass
from unroll.errors import DeriveError
from unroll.language.nodes import ONE, Sym, same, slot
from unroll.language.problem import Problem
from unroll.lower.graph import Builder, Graph
from unroll.lower.operations import COLUMNWISE, SETS_OF_ENTRIES, Node, Ref, Stage

PRODUCTS = ("product", "matmul", "contract", "weighed_product", "trace_product")
ALONG = ("sum", "length", "unit", "max", "logsumexp", "softmax", "running_sum", "norm")
"""attrs[0], or of a norm attrs[1], is the axis."""
LOGS = ("softmax", "max", "logsumexp")
SQUARE = ("inverse", "cholesky", "logdet_hermitian", "spectral_sum")
"""Of a matrix whose rows and columns are both those of the size: padding is the identity."""
SPECTRAL = ("spectral_sum", "spectral_map", "spectral_prox", "spectral_norm")
FACTORED = ("cholesky_inverse", "cholesky_solve", "logdet_cholesky")
"""Of a factor, in which padding is the identity already."""
EACH = (
    "map", "add", "scale", "prox", "detach", "dropout", "drop_path", "family_sum", "family_softmax", "family_logsumexp", "curve",
    "energy", "frequency_sum", "diagonal",
)  # fmt: skip
"""What is done entry by entry, or along other axes."""
HINT = "leave out the mask, and give samples of one length together"


def padded(graph: Graph, problem: Problem) -> Graph:
    """The graph in which every size that has a mask leaves padding out. Raises DeriveError E311 for an operation without a rule."""
    for mask in (s for s in problem.inputs if "mask" in s.props):
        graph = _Padding(graph, mask).graph()
    return graph


class _Padding:
    """Rebuilds a graph for one mask. clean: (node, axis) that is 0 at padding already; axis 0 is that of rows, as stored."""

    def __init__(self, graph: Graph, mask: Sym) -> None:
        self.old, self.size, self.mask_name = graph, mask.nrows, mask.name
        self.b, self.clean = Builder(graph.open), set[tuple[int, int]]()
        self.mask = self.b.leaf("input", mask.name, (mask.nrows, ONE), Stage.PROLOGUE, batched=True)
        self.clean.add((self.mask.node, 0))

    def graph(self) -> Graph:
        b, new = self.b, dict[int, Ref]()
        move: Callable[[Ref], Ref] = lambda r: b.flip(new[r.node]) if r.flip else new[r.node]
        for i, node in self.old.nodes.items():
            new[i] = self._rebuilt(node, tuple(map(move, node.inputs)))
            if not new[i].flip:
                b.carry(new[i].node, self.old.names.get(i), self.old.notes.get(i))
        roots = {root: self._zeroed(move(ref)) for root, ref in self.old.roots.items()}
        return b.graph(roots)

    def _rebuilt(self, node: Node, inputs: tuple[Ref, ...]) -> Ref:
        b = self.b
        if not inputs:
            return self._leaf(node)
        if not any(self._axes(r) for r in inputs):
            return b.add(node.op, inputs, *node.attrs)
        if node.op in PRODUCTS:
            return self._product(node, inputs)
        if node.op in ALONG:
            axis = node.attrs[1] if node.op == "norm" else node.attrs[0]
            along = [a for a in self._axes(inputs[0]) if axis in (None, a)]
            if node.op == "norm" and along:
                raise self._refused(node)
            ready = inputs[0]
            for a in along:
                ready = self._logged(ready, a) if node.op in LOGS else self._zeroed(ready, (a,))
            out = b.add(node.op, (ready, *inputs[1:]), *node.attrs)
            if node.op == "softmax" and along:
                self._now_clean(out, along)
            return out
        if node.op in SPECTRAL and self._axes(inputs[0]) and self._nothing_of(0, node):
            return b.add(node.op, (self._zeroed(inputs[0]), *inputs[1:]), *node.attrs)
        if node.op in SQUARE and {*self._axes(inputs[0])} == {0, 1} and self._nothing_of(1, node):
            return b.add(node.op, (self._beside_identity(inputs[0]), *inputs[1:]), *node.attrs)
        if node.op == "trace":
            return b.add(node.op, (self._zeroed(inputs[0], (0,)),), *node.attrs)
        if node.op in EACH:
            if node.op == "map" and self._breaks_at_zero(node.attrs[0], inputs):
                inputs = tuple(self._filled(r) for r in inputs)
            out = b.add(node.op, inputs, *node.attrs)
            self._now_clean(out, [a for a in self._axes(out) if self._stays_zero(node, inputs, a)])
            return out
        if node.op == "solve" and {*self._axes(inputs[0])} == {0, 1}:
            return b.add(node.op, (self._beside_identity(inputs[0]), *inputs[1:]), *node.attrs)
        if node.op in FACTORED or (node.op == "solve" and not self._axes(inputs[0])):
            return b.add(node.op, inputs, *node.attrs)
        if node.op in ("project", "indicator") and self._by_column(node, inputs):
            return self._in_set(node, inputs)
        raise self._refused(node)

    def _leaf(self, node: Node) -> Ref:
        """What comes in is 0 at padding, whatever stands there, a start that a call gives too; the size is the count of the sample."""
        b = self.b
        if node.op == "dim" and node.attrs[0] == str(self.size):
            return b.add("sum", (self.mask,), None)
        if other := [n for n in node.shape if not same(n, self.size) and self.size in n.free_symbols]:
            what = f"the mask {self.mask_name} says which of {self.size} are there, and not which of {other[0]}"
            raise DeriveError("E311", what, hint=HINT)
        ref = b.copy(node)
        if node.op not in ("input", "start", "state") or ref == self.mask:
            return ref
        for a in self._axes(ref):
            there = self.mask if a == 0 else b.flip(self.mask)
            ref = b.map(sp.Piecewise((slot(0), slot(1) > 0), (0, True)), (ref, there))
        self._now_clean(ref, self._axes(ref))
        return ref

    def _product(self, node: Node, inputs: tuple[Ref, ...]) -> Ref:
        """Where the size is summed over, one factor is 0 at padding; where rows and columns of the result have it, both ends are."""
        head, factors = (inputs[:1], list(inputs[1:])) if node.op == "product" else ((), list(inputs))
        if node.op == "weighed_product":
            raise self._refused(node)
        inner = range(len(factors) - 1) if node.op != "trace_product" else range(len(factors))
        for i in inner:
            left, right = factors[i], factors[(i + 1) % len(factors)]
            if 1 in self._axes(left) and not (self._is_clean(left, 1) or self._is_clean(right, 0)):
                factors[i] = self._zeroed(left, (1,))
        out = self.b.add(node.op, (*head, *factors), *node.attrs)
        ends = [a for a, f in ((0, factors[0]), (1, factors[-1])) if self._is_clean(f, a)]
        self._now_clean(out, [a for a in ends if a in self._axes(out)])
        return out

    def _nothing_of(self, value: int, node: Node) -> bool:
        """Are singular values of 0, or those of an identity, worth 0? A proximal step of singular values leaves them at 0."""
        return node.op not in ("spectral_sum", "spectral_map") or node.attrs[0].subs(slot(0), value) == 0

    def _breaks_at_zero(self, formula: sp.Expr, inputs: tuple[Ref, ...]) -> bool:
        """Is a formula, or its slope, without a number where what has the size is 0, as log and 1/z are?"""
        sized = [slot(i) for i, r in enumerate(inputs) if self._axes(r)]
        found = (f.subs(dict.fromkeys(sized, 0)) for f in (formula, *map(formula.diff, sized)))
        return any(f.has(sp.nan, sp.zoo, sp.oo, -sp.oo) for f in found)

    def _filled(self, ref: Ref, other: Ref | None = None) -> Ref:
        """The value, at padding that of another, or 1."""
        by, more = (sp.Integer(1), ()) if other is None else (slot(2), (other,))
        for a in self._axes(ref):
            there = self.mask if a == 0 else self.b.flip(self.mask)
            ref = self.b.map(sp.Piecewise((slot(0), slot(1) > 0), (by, True)), (ref, there, *more))
        return ref

    def _by_column(self, node: Node, inputs: tuple[Ref, ...]) -> bool:
        """Is each entry of its own in the set, or each column, tokens being the columns?"""
        name, axes = node.attrs[0], self._axes(inputs[0])
        return name in SETS_OF_ENTRIES or (name in COLUMNWISE and axes == [1])

    def _in_set(self, node: Node, inputs: tuple[Ref, ...]) -> Ref:
        """Columns that are padding are in it."""
        if node.op == "indicator":
            b, (x, *params) = self.b, inputs
            nearest = b.add("project", (self._filled(x), *params), *node.attrs)  # of 0 some sets have no nearest point
            inputs = (self._filled(x, nearest), *params)
        return self.b.add(node.op, inputs, *node.attrs)

    def _axes(self, ref: Ref) -> list[int]:
        """The axes of a value that have the size."""
        return [a for a, n in enumerate(self.b.view(ref).shape) if same(n, self.size)]

    def _is_clean(self, ref: Ref, axis: int) -> bool:
        return (ref.node, 1 - axis if ref.flip else axis) in self.clean

    def _now_clean(self, ref: Ref, axes: Iterable[int]) -> None:
        self.clean |= {(ref.node, 1 - a if ref.flip else a) for a in axes}

    def _stays_zero(self, node: Node, inputs: tuple[Ref, ...], axis: int) -> bool:
        """Is it 0 where some of what it is made of is?"""
        zero = [self._is_clean(r, axis) for r in inputs]
        match node.op:
            case "add" | "detach" | "family_sum" | "dropout" | "drop_path":
                return all(zero[: 1 if node.op in ("dropout", "drop_path") else None])
            case "scale":
                return any(zero)
            case "map":
                at = {slot(i): 0 for i, z in enumerate(zero) if z}
                return bool(at) and node.attrs[0].subs(at) == 0
            case _:
                return False

    def _zeroed(self, ref: Ref, axes: Iterable[int] | None = None) -> Ref:
        """The value, 0 at padding along these axes, or all that have the size."""
        for a in self._axes(ref) if axes is None else axes:
            if not self._is_clean(ref, a):
                kept = {x for x in self._axes(ref) if self._is_clean(ref, x)}
                ref = self.b.map(slot(0) * slot(1), (ref, self.mask if a == 0 else self.b.flip(self.mask)))
                self._now_clean(ref, {*kept, a})
        return ref

    def _logged(self, ref: Ref, axis: int) -> Ref:
        """The value, far below all others at padding."""
        there = self.mask if axis == 0 else self.b.flip(self.mask)
        return self.b.add("add", (ref, self.b.map(cast(sp.Expr, log_of_mass(slot(0))), (there,))), (ONE, ONE))

    def _beside_identity(self, ref: Ref) -> Ref:
        """The matrix, with rows and columns of the identity at padding."""
        b, rows = self.b, self.b.view(ref).shape[0]
        inside = self._zeroed(ref)
        gone = b.map(1 - slot(0), (self.mask,))
        rest = b.map(slot(0) * slot(1), (b.constant("eye", rows, rows), gone))
        return b.add("add", (inside, rest), (ONE, ONE))

    def _refused(self, node: Node) -> DeriveError:
        what = f"{node.op.replace('_', ' ')} works along {self.size}, and has no rule for padding"
        return DeriveError("E311", what, hint=HINT)
