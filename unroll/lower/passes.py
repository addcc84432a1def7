"""Graph -> Graph: exact passes. Each says in one line what it did, and the graph is verified before and after.

smaller     inv(a I + c M' M) @ B is worked out by the inverse of a I + c M M' where M has few rows
solves      inv(S) @ B becomes a solve; by Cholesky where S is positive definite
attention   V softmax(scale V' V) is one fused operation
gram        products distribute over sums where that is cheaper: A'(A z - x) -> (A'A) z - A'x
order       the order of multiplication with the least work, given sizes, depth and what can be done once
collect     what stands in front of several terms of a sum is applied once: c x + c D' y -> c (x + D' y)
contract    a sum over a family of products is one contraction
parseval    lengths of signals, and their weighed sums over a family, are taken per frequency: no signal is needed then
outer       a column times a row is an elementwise product, each repeated along the other
shared      a formula that contains another one reads its value
lengths     roots of sums of squares are lengths, x over its length is a unit vector
roots       other roots of what is 0 where it is least have slope 0 there
hoist       what does not depend on the layer leaves the loop (read off the stages)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import sympy as sp
from sympy.core.relational import Relational

from unroll.calculus.torch_text import log_of_mass, power
from unroll.language.constructors import swap
from unroll.language.nodes import ONE, same, slot
from unroll.lower.graph import Builder, Graph
from unroll.lower.operations import BY_NAME, Node, Ref, Stage, View, shape_of

Rule = Callable[[Builder, Node, tuple[Ref, ...]], Ref | None]
BATCH = 64
"""Samples that share work done once per call, when costs are compared."""


@dataclass(frozen=True)
class Sizes:
    """Numbers for every size, an open one counted as `BATCH`; depth of the network."""

    dims: Mapping[sp.Symbol, int]
    layers: int

    def __call__(self, n: sp.Expr) -> int:
        return _size(n, self._given)

    @cached_property
    def _given(self) -> tuple[tuple[sp.Symbol, int], ...]:
        return tuple(sorted(self.dims.items(), key=str))

    def weight(self, node: Node | Stage, batched: bool = True) -> float:
        """How often a value is computed per sample."""
        stage, batched = (node.stage, node.batched) if isinstance(node, Node) else (node, batched)
        once = 1.0 if batched else 1 / BATCH
        return {Stage.CONSTANT: 0.0, Stage.SETUP: 1e-6, Stage.PROLOGUE: once, Stage.BODY: self.layers * once}[stage]


@cache
def _size(n: sp.Expr, dims: tuple[tuple[sp.Symbol, int], ...]) -> int:
    still_open = {s: BATCH for s in n.free_symbols - {d for d, _ in dims}}
    return int(swap(n, {**dict(dims), **still_open}))


@dataclass(frozen=True)
class Optimised:
    """A graph and what each pass did to it."""

    graph: Graph
    log: tuple[str, ...]


def optimise(graph: Graph, sizes: Sizes, check: Callable[[Graph, Graph], None] | None = None) -> Optimised:
    """All passes in order. check(before, after) is called after each that changed it, to compare values."""
    verify(graph)
    log = [f"value numbering: {len(graph.nodes)} distinct values"]
    for name, run in PASSES:
        before = graph
        graph, did = run(graph, sizes)
        if graph is not before:
            verify(graph, like=before)
            if check is not None:
                check(before, graph)
        if not did.startswith("0 "):
            log.append(f"{name}: {did}")
    log.append(f"hoist: {_hoisted(graph)}")
    log.append(f"cost: {work(graph, sizes):,} floating-point operations per layer and sample")
    return Optimised(graph, tuple(log))


# --- frame ------------------------------------------------------------------------------------------------------------


def rewrite(graph: Graph, rule: Rule, *ops: str, needs: str = "") -> Graph:
    """Rebuild every node on its new operands, those of these operations as `rule` says. Equal values meet, unused ones go.

    needs: an operation without which there is nothing to do.
    """
    there = {node.op for node in graph.nodes.values()}
    if there.isdisjoint(ops) or (needs and needs not in there):
        return graph
    b, new = Builder(graph.open), dict[int, Ref]()
    move: Callable[[Ref], Ref] = lambda r: b.flip(new[r.node]) if r.flip else new[r.node]
    for i, node in graph.nodes.items():
        inputs = tuple(map(move, node.inputs))
        ref = rule(b, node, inputs) if node.op in ops else None
        new[i] = (b.add(node.op, inputs, *node.attrs) if inputs else b.copy(node)) if ref is None else ref
        if not new[i].flip:
            b.carry(new[i].node, graph.names.get(i), graph.notes.get(i))
    return b.graph({root: move(ref) for root, ref in graph.roots.items()})


def verify(graph: Graph, like: Graph | None = None) -> None:
    """Operands before results (so no cycles), axes as the records say, roots as they were. Else it is our own bug."""
    seen: set[int] = set()
    for i, node in graph.nodes.items():
        assert all(r.node in seen for r in node.inputs), f"internal error, please report: operand of {i} is missing"
        seen.add(i)
        if node.inputs:
            shape = shape_of(node.op, tuple(v.shape for v in graph.views(node)), node.attrs)
            assert all(map(same, shape, node.shape)), f"internal error, please report: {node.op} has axes {node.shape}"
    if like is not None:
        assert graph.roots.keys() == like.roots.keys(), "internal error, please report: a pass lost a root"
        for root, ref in graph.roots.items():
            now, was = graph.view(ref), like.view(like.roots[root])
            assert all(map(same, now.shape, was.shape)), f"internal error, please report: {root} changed axes"


def cost(graph: Graph, sizes: Sizes) -> float:
    """Work per sample over the whole depth."""
    return sum(sizes.weight(n) * BY_NAME[n.op].cost(n, graph.views(n), sizes) for n in graph.nodes.values())


def work(graph: Graph, sizes: Sizes) -> int:
    """Floating-point operations of one layer on one sample."""
    body = (n for n in graph.nodes.values() if n.stage == Stage.BODY)
    return sum(BY_NAME[n.op].cost(n, graph.views(n), sizes) for n in body)


def _hoisted(graph: Graph) -> str:
    ahead = [n for n in graph.nodes.values() if n.inputs and not n.plain and Stage.CONSTANT < n.stage < Stage.BODY]
    setup = sum(n.stage == Stage.SETUP for n in ahead)
    return f"{setup} values computed once when set up, {len(ahead) - setup} once per call"


# --- passes -----------------------------------------------------------------------------------------------------------


def smaller(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """inv(a I + c M' M) B = (B - c M' inv(a I + c M M') M B) / a, where M has less than half as many rows as columns (Woodbury 1950)."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        if len(inputs) != 3 or b.nodes[inputs[1].node].op != "inverse":
            return None
        coef, inner, right = inputs[0], b.nodes[inputs[1].node], inputs[2]
        found = _gram_beside_identity(b, inner.inputs[0]) if inner.attrs[0] == "symmetric" else None
        if found is None:
            return None
        a, c, m = found
        rows, cols = b.view(m).shape
        if rows == 1 or 2 * sizes(rows) > sizes(cols):
            return None
        count += 1
        one, back = b.number(ONE), b.flip(m)
        square = b.product(c, (m, back))
        least = b.add(
            "inverse", (b.add("add", (b.scaled(a, b.constant("eye", rows, rows)), square), (ONE, ONE)),), *inner.attrs
        )
        less = b.product(c, (back, least, m, right))
        share = b.map(slot(0) / slot(1), (coef, a))
        return b.scaled(share, b.add("add", (b.scaled(one, right), less), (ONE, -ONE)))

    return rewrite(graph, rule, "product", needs="inverse"), f"{count} inverses taken on the smaller side"


def _gram_beside_identity(b: Builder, ref: Ref) -> tuple[Ref, Ref, Ref] | None:
    """(a, c, M) of a I + c M' M, a sum of these two alone."""
    node = b.nodes[ref.node]
    if node.op != "add" or len(node.inputs) != 2:
        return None
    a = c = m = None
    for number, term in zip(node.attrs[0], node.inputs, strict=True):
        part, scaled = b.nodes[term.node], b.number(number)
        if part.op == "scale" and b.nodes[part.inputs[0].node].shape == (ONE, ONE):
            scaled, part = b.map(slot(0) * number, (part.inputs[0],)), b.nodes[part.inputs[1].node]
        elif part.op == "add" and len(part.inputs) == 1:
            scaled, part = b.number(number * part.attrs[0][0]), b.nodes[part.inputs[0].node]
        if part.op == "eye":
            a = scaled
        elif part.op == "product" and len(part.inputs) == 3 and b.flip(part.inputs[1]) == part.inputs[2]:
            c, m = b.map(slot(0) * slot(1), (scaled, part.inputs[0])), part.inputs[2]
    return (a, c, m) if a is not None and c is not None and m is not None else None


def solves(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """inv(S) @ B -> solve(S, B), and what stays an inverse of something definite, by its Cholesky factor.

    An inverse of something else that the loop reuses stays: it is computed once.
    """
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        if len(inputs) < 3:
            return None
        coef, *factors = inputs
        for i, f in enumerate(factors):
            inner = b.nodes[f.node]
            if inner.op != "inverse" or (inner.attrs[0] != "symmetric" and inner.stage < node.stage):
                continue
            count += 1
            matrix = b.flip(inner.inputs[0]) if f.flip else inner.inputs[0]
            before, after = factors[:i], factors[i + 1 :]
            if after:
                return b.product(coef, (*before, _solve(b, inner.attrs[0], matrix, after)))
            turned = [b.flip(x) for x in reversed(before)]
            return b.scaled(coef, b.flip(_solve(b, inner.attrs[0], b.flip(matrix), turned)))
        return None

    def left(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        if not node.attrs[0]:
            return None
        return b.add("cholesky_inverse", (b.add("cholesky", inputs),), *node.attrs)

    out = rewrite(rewrite(graph, rule, "product", needs="inverse"), left, "inverse")
    return out, f"{count} inverses times a matrix became solves"


def _solve(b: Builder, kind: str, matrix: Ref, factors: list[Ref]) -> Ref:
    side = b.product(b.number(ONE), factors)
    if kind == "symmetric":
        return b.add("cholesky_solve", (b.add("cholesky", (matrix,)), side))
    return b.add("solve", (matrix, side))


def gram(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """Distribute a product over one sum at a time, as long as the whole becomes cheaper."""
    done, best = 0, cost(order(graph, sizes)[0], sizes)
    improved = True
    while improved:
        improved = False
        for trial in _distributed(graph):
            price = cost(order(trial, sizes)[0], sizes)
            if price < best:
                graph, best, done, improved = trial, price, done + 1, True
                break
    return graph, f"{done} products distributed over sums, cheaper at these sizes and depth"


def _distributed(graph: Graph) -> Iterator[Graph]:
    """The graphs in which one product of the layer is distributed over a sum that nothing else reads."""
    for node in graph.nodes.values():
        if node.op == "product" and node.stage == Stage.BODY:
            for j, ref in enumerate(node.inputs[1:], start=1):
                inner = graph.nodes[ref.node]
                repeats = any(v.shape != inner.shape for v in graph.views(inner))  # a vector that stands for its copies
                if inner.op == "add" and not repeats and len(graph.users[ref.node]) == 1:
                    yield flatten(rewrite(graph, _distribute(node, j), "product"))


def _distribute(target: Node, j: int) -> Rule:
    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        if node is not target:
            return None
        inner = b.nodes[inputs[j].node]
        turn: Callable[[Ref], Ref] = b.flip if inputs[j].flip else lambda r: r
        parts = [_flat(b, inputs[0], inputs[1:j], turn(term), inputs[j + 1 :]) for term in inner.inputs]
        return b.add("add", parts, inner.attrs[0])

    return rule


def _flat(b: Builder, coef: Ref, before: tuple[Ref, ...], term: Ref, after: tuple[Ref, ...]) -> Ref:
    """coef * before @ term @ after, products in the term opened."""
    node = b.nodes[term.node]
    middle = (term,)
    if node.op == "product":
        coef = b.map(slot(0) * slot(1), (coef, node.inputs[0]))
        middle = tuple(b.flip(r) for r in reversed(node.inputs[1:])) if term.flip else node.inputs[1:]
    return b.product(coef, (*before, *middle, *after))


def flatten(graph: Graph) -> Graph:
    """Sums of sums that nobody else reads are one sum."""
    users = graph.users
    rooted = {r.node for r in graph.roots.values()}
    once = {graph.nodes[i] for i, who in users.items() if len(who) == 1 and i not in rooted}

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        coefs, refs = list[sp.Expr](), list[Ref]()
        for old, ref, c in zip(node.inputs, inputs, node.attrs[0], strict=True):
            inner = b.nodes[ref.node]
            if inner.op == "add" and graph.nodes[old.node] in once:
                coefs += [c * d for d in inner.attrs[0]]
                refs += [b.flip(r) for r in inner.inputs] if ref.flip else inner.inputs
            else:
                coefs.append(c)
                refs.append(ref)
        return b.add("add", refs, tuple(coefs))

    return rewrite(graph, rule, "add")


def order(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """Matrix-chain order by dynamic programming; a coefficient goes to the factor that is known first."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        coef, *factors = inputs
        count += len(factors) > 2
        if b.nodes[coef.node].attrs == (-1,):
            coef, factors = _signed_sum(b, coef, factors)
        return _multiply(b, coef, tuple(factors), sizes)

    out = rewrite(graph, rule, "product")
    return out, f"{count} chains of three or more factors put in the cheapest order"


def _multiply(b: Builder, coef: Ref, factors: tuple[Ref, ...], sizes: Sizes) -> Ref:
    """coef * the product, as binary products."""
    views = [b.view(f) for f in factors]
    n = len(views)
    best: dict[tuple[int, int], tuple[float, int]] = {(i, i): (0.0, i) for i in range(n)}
    for length in range(2, n + 1):
        for i in range(n - length + 1):
            j = i + length - 1
            here = sizes.weight(
                max(v.node.stage for v in views[i : j + 1]), any(v.node.batched for v in views[i : j + 1])
            )
            families = {k: sizes(m) for v in views[i : j + 1] for k, m in v.node.families}
            once = here * sp.prod(list(families.values())) if families else here
            options = [
                (best[i, k][0] + best[k + 1, j][0] + float(once) * _flops(views[i], views[k], views[j], sizes), -k)
                for k in range(i, j)
            ]
            price, k = min(options)
            best[i, j] = price, -k

    def build(i: int, j: int) -> Ref:
        if i == j:
            return factors[i]
        k = best[i, j][1]
        return b.add("matmul", (build(i, k), build(k + 1, j)))

    c = b.nodes[coef.node]
    if c.op == "number" or c.shape != (ONE, ONE):
        return b.scaled(coef, build(0, n - 1))

    def weighted(i: int, j: int) -> Ref:
        """The coefficient goes down to the side that is known earlier, if the coefficient is known by then."""
        whole = max(v.node.stage for v in views[i : j + 1])
        if i < j:
            k = best[i, j][1]
            left, right = (max(v.node.stage for v in views[p : q + 1]) for p, q in ((i, k), (k + 1, j)))
            if max(min(left, right), c.stage) < whole and not c.batched:
                if left <= right:
                    return b.add("matmul", (weighted(i, k), build(k + 1, j)))
                return b.add("matmul", (build(i, k), weighted(k + 1, j)))
        return b.scaled(coef, build(i, j))

    return weighted(0, n - 1)


def _signed_sum(b: Builder, minus: Ref, factors: list[Ref]) -> tuple[Ref, list[Ref]]:
    """A sign in front of a product goes into the first sum in it that each layer works out."""
    for i, ref in enumerate(factors):
        node = b.nodes[ref.node]
        if node.op == "add" and node.stage == Stage.BODY:
            turned = b.add("add", node.inputs, tuple(-c for c in node.attrs[0]))
            return b.number(ONE), [*factors[:i], b.flip(turned) if ref.flip else turned, *factors[i + 1 :]]
    return minus, factors


def _flops(left: View, inner: View, right: View, sizes: Sizes) -> int:
    return 2 * sizes(left.shape[0]) * sizes(inner.shape[1]) * sizes(right.shape[1])


def collect(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """A number or linear map in front of several terms of a layer's sum is applied once, to their sum."""
    total, count = 0, 1
    while count:
        graph, count = _collected(graph)
        total += count
    return graph, f"{total} numbers and maps applied to a sum, not to its terms"


def _collected(graph: Graph) -> tuple[Graph, int]:
    """One step, from the outermost: what is taken out of a sum can stand in the next one."""
    count = 0
    rooted = {r.node for r in graph.roots.values()}
    alone = {i for i, who in graph.users.items() if len(who) == 1 and i not in rooted}

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        if node.stage != Stage.BODY:
            return None
        own = [graph.nodes[r.node].stage == Stage.BODY and r.node in alone for r in node.inputs]
        heads = dict[_Head, dict[int, Ref]]()
        for i, ref in enumerate(inputs):
            for head, inner in _heads(b, ref) if own[i] else ():
                heads.setdefault(head, {})[i] = inner
        head, among = max(heads.items(), key=lambda h: len(h[1]), default=(None, {}))
        if head is None or len(among) < 2:
            return None
        count += 1
        coefs: tuple[sp.Expr, ...] = node.attrs[0]
        one = head.of(b, b.add("add", among.values(), tuple(coefs[i] for i in among)))
        rest = [i for i in range(len(inputs)) if i not in among]
        return b.add("add", (*(inputs[i] for i in rest), one), (*(coefs[i] for i in rest), ONE))

    return rewrite(graph, rule, "add"), count


@dataclass(frozen=True)
class _Head:
    """A linear operation, all but its operand `at`: what is alike in terms that can be added before it is done."""

    op: str
    attrs: tuple[Any, ...]
    at: int
    others: tuple[Ref, ...]
    flip: bool
    kind: tuple[Any, ...]

    def of(self, b: Builder, x: Ref) -> Ref:
        ref = b.add(self.op, (*self.others[: self.at], x, *self.others[self.at :]), *self.attrs)
        return b.flip(ref) if self.flip else ref


def _heads(b: Builder, term: Ref) -> Iterator[tuple[_Head, Ref]]:
    node = b.nodes[term.node]
    for at in LINEAR.get(node.op, ()):
        x, others, flip = node.inputs[at], node.inputs[:at] + node.inputs[at + 1 :], term.flip
        if node.op == "scale" and b.view(others[0]).shape == (ONE, ONE):
            x, flip = b.flip(x) if flip else x, False
        kind = (b.view(x).shape, b.nodes[x.node].families, b.nodes[x.node].batched)
        yield _Head(node.op, node.attrs, at, others, flip, kind), x


LINEAR = {
    "scale": (1,),
    "matmul": (0, 1),
    "difference": (0,),
    "shifts": (0,),
    "repeat": (0,),
    "first": (0,),
    "groups": (0,),
}
"""Operation -> operands in which it is linear, the others held."""


def contract(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """sum over k of A[k] @ B[k]: one contraction over k and the inner axis."""
    count = 0
    single = {id(graph.nodes[i]) for i, users in graph.users.items() if len(users) == 1}

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        (ref,) = inputs
        inner = b.nodes[ref.node]
        if inner.op != "matmul" or id(graph.nodes[node.inputs[0].node]) not in single:
            return None
        count += 1
        out = b.add("contract", inner.inputs, node.attrs[0])
        return b.flip(out) if ref.flip else out

    out = rewrite(graph, rule, "family_sum")
    return out, f"{count} family sums fused with their product"


def attention(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """V softmax(scale V' V) -> one fused operation, which never holds the scores, however V is a product."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        coef, *factors = inputs
        for turned in (False, True):
            *before, weights = [b.flip(f) for f in reversed(factors)] if turned else factors
            shares = b.nodes[weights.node]
            if shares.op != "softmax" or shares.attrs[0] != (1 if weights.flip else 0):
                continue
            scores, keep = _without_padding(b, shares.inputs[0])
            scale, half = _scores(b, scores)
            before, after = before[: -len(half)], before[-len(half) :]
            if not half or after != half or (keep and shares.attrs[1]):
                continue
            v = half[0] if len(half) == 1 else b.product(b.number(ONE), half)
            if b.nodes[v.node].batched:
                count += 1
                out = b.product(coef, (*before, b.add("attention", (v, scale, *keep), shares.attrs[1])))
                return b.flip(out) if turned else out
        return None

    out = rewrite(graph, rule, "product", needs="softmax")
    return out, f"{count} products V softmax(V'V) fused"


def _without_padding(b: Builder, scores: Ref) -> tuple[Ref, tuple[Ref, ...]]:
    """(scores, the mask of their rows) where log 0 was added at padding."""
    node = b.nodes[scores.node]
    if node.op == "add" and len(node.inputs) == 2 and node.attrs[0] == (1, 1):
        inner, logs = node.inputs
        said = b.nodes[logs.node]
        if said.op == "map" and said.attrs[0] == log_of_mass(slot(0)) and logs.flip == scores.flip:
            return inner, said.inputs
    return scores, ()


def _scores(b: Builder, scores: Ref) -> tuple[Ref, list[Ref]]:
    """(scale, the factors of V) of scores = scale * V' V; no factors where they are none."""
    node = b.nodes[scores.node]
    if node.op != "product" or len(node.inputs) % 2 == 0:
        return b.number(ONE), []
    scale, *factors = node.inputs
    half = factors[len(factors) // 2 :]
    return scale, half if factors == [b.flip(f) for f in reversed(factors)] else []


def parseval(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """Signals of which only lengths and weighed sums over a family are read stay spectra: |F x| = |x|, and F is linear."""
    lengths, sums, count = set[int](), set[int](), 0
    rooted = {r.node for r in graph.roots.values()}
    for i, node in graph.nodes.items():
        readers = graph.users[i]
        if node.op != "signal" or i in rooted or not readers:
            continue
        ends = [_length_of(graph, i, j) or _sum_of(graph, i, j) for j in readers]
        if all(ends) and any(graph.nodes[j].op == "family_sum" for j in ends if j):
            count += 1
            lengths |= {id(graph.nodes[j]) for j in ends if j and graph.nodes[j].op == "sum"}
            sums |= {id(graph.nodes[j]) for j in ends if j and graph.nodes[j].op == "family_sum"}

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        if id(node) in lengths:
            squares = b.nodes[inputs[0].node]
            found = b.nodes[squares.inputs[0].node]
            return b.add("frequency_sum", (b.add("energy", found.inputs),), *found.attrs)
        if id(node) in sums:
            weighed = b.nodes[inputs[0].node]
            k = next(k for k, r in enumerate(weighed.inputs) if b.nodes[r.node].op == "signal")
            found = b.nodes[weighed.inputs[k].node]
            parts = (*weighed.inputs[:k], found.inputs[0], *weighed.inputs[k + 1 :])
            total = b.add("family_sum", (b.add("map", parts, *weighed.attrs),), *node.attrs)
            return b.add("signal", (total,), *found.attrs)
        return None

    return rewrite(
        graph, rule, "sum", "family_sum", needs="signal"
    ), f"{count} signals stay spectra, their lengths and sums taken there"


def _length_of(graph: Graph, signal: int, reader: int) -> int | None:
    """The sum over rows of the squares of a signal, the reader."""
    node, after = graph.nodes[reader], graph.users[reader]
    if node.op != "map" or node.attrs[0] != slot(0) ** 2 or node.inputs != (Ref(signal),) or len(after) != 1:
        return None
    end = graph.nodes[after[0]]
    return after[0] if end.op == "sum" and end.attrs[0] == 0 and end.inputs == (Ref(reader),) else None


def _sum_of(graph: Graph, signal: int, reader: int) -> int | None:
    """The sum over a family of a signal whose columns are weighed, the reader."""
    node, after = graph.nodes[reader], graph.users[reader]
    if node.op != "map" or node.attrs[0] != slot(0) * slot(1) or node.inputs.count(Ref(signal)) != 1 or len(after) != 1:
        return None
    weights = graph.view(next(r for r in node.inputs if r != Ref(signal)))
    end = graph.nodes[after[0]]
    plain = (
        end.op == "family_sum"
        and end.inputs == (Ref(reader),)
        and not (weights.node.op == "signal" or weights.shape[0] != 1)
    )
    return after[0] if plain else None


def weighed(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """A diag(w) B' for all members w of a family of data, in an objective or where parameters are worked out on data: what weighs 0 is left out.

    Memberships that are labels are 0 for all classes but one, so the work for all classes is that for one.
    """
    called = graph.reached(r.node for (kind, _), r in graph.roots.items() if kind not in ("learned", "term"))
    terms = graph.reached(r.node for (kind, _), r in graph.roots.items() if kind == "term")
    apart = {id(n) for i, n in graph.nodes.items() if i not in called and (n.stage == Stage.BODY or i in terms)}
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        if id(node) not in apart:
            return None
        left, right = inputs[0], b.flip(inputs[1])  # both with their samples in columns
        for ref in (left, right):
            found = _weighed(b, ref)
            other = right if ref is left else left
            if found is not None and not b.nodes[other.node].families and node.families == b.nodes[ref.node].families:
                count += 1
                w, x = found
                return b.add("weighed_product", (x, w, other) if ref is left else (other, w, x))
        return None

    out = _determinants_of_members(rewrite(graph, rule, "matmul"))
    return out, f"{count} products over data leave out what weighs nothing"


def _determinants_of_members(graph: Graph) -> Graph:
    """log det(I + t X diag(w) X') for all members w: of the side of the samples that weigh something, where that is the smaller one."""
    read = {i for i, node in graph.nodes.items() if node.op == "logdet_cholesky"}
    alone = {id(graph.nodes[i]) for i, users in graph.users.items() if users and read >= {*users}}

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        whole = b.nodes[inputs[0].node]
        if id(node) not in alone or whole.op != "add" or whole.attrs[0] != (1, 1):
            return None
        for one, rest in (whole.inputs, whole.inputs[::-1]):
            found = _times_weighed(b, rest) if b.nodes[one.node].op == "eye" else None
            if found is not None:
                return b.add("cholesky", (b.add("identity_and_members", found),))
        return None

    return rewrite(graph, rule, "cholesky", needs="weighed_product")


def _times_weighed(b: Builder, ref: Ref) -> tuple[Ref, Ref, Ref] | None:
    """(X, w, t) of t X diag(w) X'."""
    node = b.nodes[ref.node]
    match node.op:
        case "weighed_product":
            x, w, y = node.inputs
            return (x, w, b.number(ONE)) if x == y else None
        case "add" if len(node.inputs) == 1:
            coef, inner = b.number(node.attrs[0][0]), node.inputs[0]
        case "scale":
            coef, inner = node.inputs
        case "map":
            matrices = [i for i, r in enumerate(node.inputs) if b.view(r).shape != (ONE, ONE)]
            factor = sp.cancel(node.attrs[0] / slot(matrices[0])) if len(matrices) == 1 else slot(0)
            if not matrices or factor.has(slot(matrices[0])):
                return None
            rest = [i for i in range(len(node.inputs)) if i != matrices[0]]
            coef = b.map(swap(factor, {slot(i): slot(j) for j, i in enumerate(rest)}), [node.inputs[i] for i in rest])
            inner = node.inputs[matrices[0]]
        case _:
            return None
    found = _times_weighed(b, inner)
    return None if found is None else (found[0], found[1], b.map(slot(0) * slot(1), (coef, found[2])))


def _weighed(b: Builder, ref: Ref) -> tuple[Ref, Ref] | None:
    """(w, X) for w * X, the columns of X weighed by the members of an input."""
    node = b.nodes[ref.node]
    if node.op != "map" or node.attrs[0] != slot(0) * slot(1):
        return None
    w, x = sorted(node.inputs, key=lambda r: b.nodes[r.node].op != "input")
    weights, matrix = b.view(w), b.view(x)
    fits = weights.shape[1 if ref.flip else 0] == 1 and matrix.shape == node.shape and not matrix.node.families
    return (w, b.flip(x) if ref.flip else x) if fits and weights.node.op == "input" and weights.node.families else None


def outer(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """u v' -> u * v': a broadcast, where a product of matrices would be called for every one of a batch."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        if node.symmetric or b.view(inputs[0]).shape[1] != 1:
            return None
        count += 1
        return b.map(slot(0) * slot(1), inputs)

    out = rewrite(graph, rule, "matmul")
    return out, f"{count} products of a column and a row became broadcasts"


def spread(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """x + r 1' -> x + r, where x has all axes of the sum: rows and columns are repeated by the sum itself."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        short = [_repeated(b, ref) for ref in inputs]
        if not any(short) or all(s or b.view(r).shape != node.shape for s, r in zip(short, inputs, strict=True)):
            return None
        count += sum(map(bool, short))
        return b.add("add", (s or r for s, r in zip(short, inputs, strict=True)), *node.attrs)

    out = rewrite(graph, rule, "add", needs="full")
    return out, f"{count} rows and columns are repeated by sums"


def _repeated(b: Builder, ref: Ref) -> Ref | None:
    """r, of a row or column r times a matrix of ones."""
    node = b.nodes[ref.node]
    if node.op != "map" or node.attrs[0] != slot(0) * slot(1):
        return None
    whole = [b.nodes[r.node].op == "full" and b.nodes[r.node].attrs[0] == 1 for r in node.inputs]
    if whole[0] == whole[1]:
        return None
    short = node.inputs[whole.index(False)]
    return b.flip(short) if ref.flip else short


def shared(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """f(x) beside g(f(x), y) is computed once: value numbering of formulas within formulas."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        for i, other in b.nodes.items():
            found = _within(other, node, inputs) if other.op == "map" and other.shape != (ONE, ONE) else None
            if found is not None:
                count += 1
                return b.map(*_pruned(found, (*inputs, Ref(i))))
        return None

    out = rewrite(graph, rule, "map")
    return out, f"{count} formulas read one that is known"


def _within(part: Node, whole: Node, inputs: tuple[Ref, ...]) -> sp.Expr | None:
    """The formula of `whole`, a function of `inputs`, with a further slot for `part`, if it contains that."""
    if not set(part.inputs) <= set(inputs):
        return None
    inner = swap(part.attrs[0], {slot(k): slot(inputs.index(r)) for k, r in enumerate(part.inputs)})
    outer: sp.Expr = whole.attrs[0]
    found = cast(sp.Expr, outer.xreplace({inner: slot(len(inputs))}))
    return None if found == outer or inner == outer else found


def _pruned(profile: sp.Expr, refs: tuple[Ref, ...]) -> tuple[sp.Expr, tuple[Ref, ...]]:
    """A formula without the slots that it does not read."""
    kept = [i for i in range(len(refs)) if profile.has(slot(i))]
    return swap(profile, {slot(i): slot(j) for j, i in enumerate(kept)}), tuple(refs[i] for i in kept)


def lengths(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """sqrt(sum(x**2)) and other roots of it, of which nothing else reads the sum -> the length of x, whose slope at 0 is 0.

    x over its length is the unit vector of x, which is 0 for 0.
    """
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        for i, ref in enumerate(node.inputs):
            profile = _of_length(node.attrs[0], slot(i)) if _adds_squares(graph, ref) else None
            if profile is None:
                continue
            count += 1
            summed = b.nodes[inputs[i].node]
            (x,), flip = b.nodes[summed.inputs[0].node].inputs, inputs[i].flip
            for j, whole in enumerate(inputs):
                over = swap(profile, {slot(j): slot(j) * LENGTH}) if whole == (b.flip(x) if flip else x) else LENGTH
                if not over.has(LENGTH):
                    unit = b.add("unit", (x,), *summed.attrs)
                    return b.map(*_pruned(over, (*inputs[:j], b.flip(unit) if flip else unit, *inputs[j + 1 :])))
            length = b.add("length", (x,), *summed.attrs)
            return b.map(
                swap(profile, {LENGTH: slot(i)}), (*inputs[:i], b.flip(length) if flip else length, *inputs[i + 1 :])
            )
        return None

    out = rewrite(graph, rule, "map", needs="sum")
    return out, f"{count} roots of sums of squares became lengths"


LENGTH = sp.Dummy("length", positive=True)


def _of_length(profile: sp.Expr, s: sp.Symbol) -> sp.Expr | None:
    """A formula with a root of s, as one of the length sqrt(s); not where it asks whether that is 0, which LENGTH never is."""
    powers = {p: LENGTH ** (2 * p.exp) for p in profile.atoms(sp.Pow) if p.base == s and not p.exp.is_integer}
    put = {**powers, s: LENGTH**2}
    decided = any(r.xreplace(put) in (sp.true, sp.false) for r in profile.atoms(Relational))
    return swap(cast(sp.Expr, profile.xreplace(powers)), {s: LENGTH**2}) if powers and not decided else None


def _adds_squares(graph: Graph, ref: Ref) -> bool:
    """Is it a sum of x**2 that has one reader?"""
    node = graph.nodes[ref.node]
    if node.op != "sum" or len(graph.users[ref.node]) != 1 or node.inputs[0].flip:
        return False
    square = graph.nodes[node.inputs[0].node]
    return square.op == "map" and square.attrs[0] == slot(0) ** 2


def roots(graph: Graph, sizes: Sizes) -> tuple[Graph, str]:
    """x**p, 0 < p < 1, of what is 0 where it is least -> the same with slope 0 there, where that of the power is 0 * inf."""
    count = 0

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        nonlocal count
        under = [p for p in node.attrs[0].atoms(sp.Pow) if p.exp.is_Rational and 0 < p.exp < 1]
        known = {slot(i): _signed(b, r) for i, r in enumerate(inputs)} if under else {}
        found = {p: power(p.base, p.exp) for p in under if _ends_at_zero(p, known)}
        if not found:
            return None
        count += len(found)
        return b.map(node.attrs[0].xreplace(found), inputs)

    out = rewrite(graph, rule, "map")
    return out, f"{count} roots have slope 0 where what is under them is 0"


def _ends_at_zero(p: sp.Pow, known: Mapping[sp.Symbol, sp.Dummy]) -> bool:
    """Is it of what can be 0 but not less, within the values that its symbols may have?"""
    base = _finite(swap(p.base, known))
    return bool(base.is_nonnegative and not base.is_positive)


def _finite(e: sp.Expr) -> sp.Expr:
    """e where it has a value: there 1 over what is not negative is not, which SymPy leaves open for what may be 0."""
    over = {p for p in e.atoms(sp.Pow) if p.exp.is_negative and p.base.is_nonnegative and not p.base.is_positive}
    return cast(sp.Expr, e.xreplace({p: sp.Dummy(nonnegative=True) for p in over}))


def _signed(b: Builder, ref: Ref) -> sp.Dummy:
    """A symbol with the sign that is known of a value."""
    if b.nodes[ref.node].positive:
        return sp.Dummy(positive=True)
    return sp.Dummy(nonnegative=_nonnegative(b, ref) or None, real=True)


def _nonnegative(b: Builder, ref: Ref) -> bool:
    """Is a value at least 0 by the way it is made?"""
    node = b.nodes[ref.node]
    match node.op:
        case "length" | "energy" | "spectral_norm" | "softmax":
            return True
        case "sum" | "family_sum" | "frequency_sum" | "max":
            return _nonnegative(b, node.inputs[0])
        case "matmul" | "trace_product" if node.shape == (ONE, ONE):
            return node.inputs[0] == b.flip(node.inputs[1])
        case "add":
            return all(c > 0 for c in node.attrs[0]) and all(_nonnegative(b, r) for r in node.inputs)
        case "map":
            known = {slot(i): _signed(b, r) for i, r in enumerate(node.inputs)}
            return bool(_finite(node.attrs[0].xreplace(known)).is_nonnegative)
        case _:
            return False


Pass = Callable[[Graph, Sizes], tuple[Graph, str]]
PASSES: tuple[tuple[str, Pass], ...] = (
    ("smaller", smaller),
    ("solves", solves),
    ("attention", attention),
    ("gram", gram),
    ("order", order),
    ("collect", collect),
    ("contract", contract),
    ("parseval", parseval),
    ("weighed", weighed),
    ("outer", outer),
    ("spread", spread),
    ("shared", shared),
    ("lengths", lengths),
    ("roots", roots),
)
