"""Step -> Graph: tensor operations with named axes, one node per distinct value.

A graph has three kinds of root: what parameters start at, what states start at, and what they become in one layer.
Nodes know from their leaves when they can be computed (`Stage`), so hoisting is reading off, and value numbering
(equal operations on equal operands are one node, transposes included) makes common sub-expressions one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, assert_never, cast

import networkx as nx
import sympy as sp

from unroll.calculus.cones import definite, is_hermitian
from unroll.calculus.stable import stable
from unroll.derivation.rewrites.frequencies import per_frequency
from unroll.derivation.step import LAYER, Learned, Step
from unroll.errors import UnrollError
from unroll.language.constructors import as_constant, eye, is_symmetric, matmul, operator, scale, split, swap
from unroll.language.naming import InParts, in_parts
from unroll.language.nodes import (
    ONE,
    STEP_OF_ENTRY,
    Add,
    Curve,
    Diag,
    Diagonal,
    Expr,
    Eye,
    FamilyLogSumExp,
    FamilySoftmax,
    FamilySum,
    Hold,
    Indicator,
    Inverse,
    LogDet,
    LogSumExp,
    Map,
    Max,
    Member,
    Mul,
    Multiplier,
    Noise,
    Normalise,
    Ones,
    Op,
    Project,
    Prox,
    ProxMap,
    Shape,
    Signal,
    Softmax,
    Sorted,
    Spectral,
    SpectralDivergence,
    SpectralMap,
    SpectralNorm,
    SpectralProx,
    Spectrum,
    Sum,
    Sweep,
    Sym,
    Trace,
    Transpose,
    Worked,
    Zero,
    complex_valued,
    entry,
    same,
    slot,
    walk,
)
from unroll.language.nodes import Node as Formula
from unroll.language.problem import Problem
from unroll.language.show import text
from unroll.lower.operations import Node, Ref, Stage, View, shape_of

Root = tuple[str, str]
"""("learned", W) start value of a parameter, ("start", z), ("next", z), ("block", name) its result, ("term", name)."""


@dataclass(frozen=True)
class Graph:
    """nodes in topological order.  names, notes: for readers, by node.  open: sizes that each call says."""

    nodes: Mapping[int, Node]
    roots: Mapping[Root, Ref]
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    notes: Mapping[int, str] = field(default_factory=dict[int, str])
    open: frozenset[sp.Symbol] = frozenset()

    @cached_property
    def digraph(self) -> nx.DiGraph[int]:
        """One networkx node per tensor operation, an edge from operand to result."""
        g = nx.DiGraph()
        for i, node in self.nodes.items():
            g.add_node(
                i,
                op=node.op,
                axes=axes_text(node),
                stage=node.stage.name.lower(),
                node=node,
                name=self.names.get(i, ""),
            )
        for i, node in self.nodes.items():
            for position, ref in enumerate(node.inputs):
                g.add_edge(ref.node, i, position=position, transposed=ref.flip)
        return g

    def view(self, ref: Ref) -> View:
        return View(self.nodes[ref.node], ref.flip)

    def views(self, node: Node) -> tuple[View, ...]:
        return tuple(map(self.view, node.inputs))

    def reached(self, nodes: Iterable[int]) -> set[int]:
        """Nodes and all that they are computed from."""
        seen: set[int] = set()
        stack = list(nodes)
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack += [r.node for r in self.nodes[i].inputs]
        return seen

    @cached_property
    def users(self) -> dict[int, list[int]]:
        """Who reads each node, roots not counted."""
        out: dict[int, list[int]] = {i: [] for i in self.nodes}
        for i, node in self.nodes.items():
            for ref in node.inputs:
                out[ref.node].append(i)
        return out


def axes_text(node: Node) -> str:
    """Named axes as stored: `... N d`."""
    names = {"*": "...", "r": str(node.shape[0]), "c": str(node.shape[1]), **{k: f"{k}:{n}" for k, n in node.families}}
    return " ".join(names[t] for t in node.tags)


@lru_cache(2**16)
def _has(sized: tuple[tuple[sp.Expr, ...], ...], symbols: frozenset[sp.Symbol]) -> bool:
    return any(n.free_symbols & symbols for sizes in sized for n in sizes)


# --- building with value numbering ------------------------------------------------------------------------------------


class Builder:
    """Makes nodes, each distinct value once.  open: sizes that each call says."""

    def __init__(self, open: Iterable[sp.Symbol] = ()) -> None:
        self.open = frozenset(open)
        self.nodes: dict[int, Node] = {}
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.names: dict[int, str] = {}
        self.notes: dict[int, str] = {}

    def view(self, ref: Ref) -> View:
        return View(self.nodes[ref.node], ref.flip)

    def flip(self, ref: Ref) -> Ref:
        """The transpose; of a scalar or symmetric matrix, itself."""
        node = self.nodes[ref.node]
        return ref if node.symmetric or node.shape == (ONE, ONE) else ref.T

    def leaf(
        self,
        op: str,
        name: str,
        shape: Shape,
        stage: Stage,
        *,
        batched: bool = False,
        families: tuple[tuple[str, sp.Expr], ...] = (),
        plain: bool = False,
        symmetric: bool = False,
        positive: bool = False,
    ) -> Ref:
        node = Node(op, (), (name, *shape), shape, batched, families, stage, plain, symmetric, positive)
        return self._intern(node)

    def copy(self, node: Node) -> Ref:
        """A leaf of another graph."""
        return self._intern(node)

    def carry(self, i: int, name: str | None, note: str | None) -> None:
        """Keep the name and note of a node that stands for another now."""
        if name:
            self.names.setdefault(i, name)
        if note:
            self.notes.setdefault(i, note)

    def number(self, value: sp.Expr) -> Ref:
        return self._intern(Node("number", (), (value,), (ONE, ONE), plain=True))

    def constant(self, op: str, rows: sp.Expr, cols: sp.Expr, value: int = 1) -> Ref:
        """An identity ("eye") or a matrix of one value ("full")."""
        sizes = (value, rows, cols) if op == "full" else (rows, cols)
        return self._intern(Node(op, (), sizes, (rows, cols), symmetric=same(rows, cols)))

    def add(self, op: str, inputs: Iterable[Ref], *attrs: Any) -> Ref:
        """A node for op(inputs), brought to one of its two orientations."""
        refs = tuple(inputs)
        if op in PRODUCTS:
            return self._product(op, refs, attrs)
        if op in ELEMENTWISE:
            lead = next((r for r in refs if 1 not in self.view(r).shape), None) or next(
                (r for r in refs if self.view(r).shape != (ONE, ONE)), None
            )
            if lead is not None and lead.flip:
                return self.flip(self._make(op, tuple(self.flip(r) for r in refs), attrs))
        elif op == "norm" and refs[0].flip:
            kind, axis, eps, affine = attrs
            return self.flip(self._make(op, tuple(self.flip(r) for r in refs), (kind, 1 - axis, eps, affine)))
        elif op in UNARY and refs[0].flip:
            turned = (1 - attrs[0], *attrs[1:]) if op in ALONG and attrs[0] is not None else attrs
            out = self._make(op, (refs[0].T, *refs[1:]), turned)
            return out if op == "diagonal" else self.flip(out)
        return self._make(op, refs, attrs)

    def _product(self, op: str, refs: tuple[Ref, ...], attrs: tuple[Any, ...]) -> Ref:
        """A product and the transposed product of its transposes are one value: the smaller writing is kept."""
        head, factors = (refs[:1], refs[1:]) if op == "product" else ((), refs)
        turned = tuple(self.flip(r) for r in reversed(factors))
        if turned == factors:
            return self._make(op, refs, attrs, symmetric=True)
        if op == "matmul" and not straight_first(
            self.nodes, factors
        ):  # the parameter to the left: tokens stay before features
            return self.flip(self._make(op, turned, attrs))
        as_key: Callable[[tuple[Ref, ...]], Any] = lambda fs: [(r.node, r.flip) for r in fs]
        known = (op, (*head, *turned), attrs, ()) in self.numbers
        straight = (op, refs, attrs, ()) in self.numbers
        if known or (not straight and as_key(turned) < as_key(factors) and not self._batched(factors)):
            return self.flip(self._make(op, (*head, *turned), attrs))
        return self._make(op, refs, attrs)

    def _batched(self, refs: Iterable[Ref]) -> bool:
        return any(self.nodes[r.node].batched for r in refs)

    def _make(self, op: str, refs: tuple[Ref, ...], attrs: tuple[Any, ...], symmetric: bool = False) -> Ref:
        views = [self.view(r) for r in refs]
        families = dict(f for v in views for f in v.node.families)
        if op in ("family_sum", "family_logsumexp", "contract", "signal", "frequency_sum"):
            families.pop(attrs[0])
        if op == "spectrum":
            families[attrs[0]] = half_spectrum(attrs[1])
        shape = shape_of(op, tuple(v.shape for v in views), attrs)
        sized = (*(v.shape for v in views), shape, tuple(families.values()))
        late = op == "spectrum" or _has(sized, self.open)
        least = (
            Stage.PROLOGUE if late else Stage.SETUP if op == "signs" else Stage.CONSTANT
        )  # no buffer is complex, or as large as a call says
        keeps = op in ELEMENTWISE or op in ("inverse", "detach")
        even = all(v.node.symmetric or v.shape == (ONE, ONE) for v in views)
        symmetric = symmetric or op in OPAQUE or (keeps and even) or attrs[:1] == ("symmetric",)
        symmetric = symmetric or (op == "difference" and attrs[1] and self._is_difference_matrix(refs[0]))
        return self._intern(
            Node(
                op,
                refs,
                attrs,
                shape,
                any(v.node.batched for v in views),
                tuple(sorted(families.items())),
                max((least, *(v.node.stage for v in views))),
                shape == (ONE, ONE) and bool(views) and all(v.node.plain for v in views),
                symmetric,
            )
        )

    def _is_difference_matrix(self, ref: Ref) -> bool:
        node = self.nodes[ref.node]
        return (
            not ref.flip
            and node.op == "difference"
            and not node.attrs[1]
            and self.nodes[node.inputs[0].node].op == "eye"
        )

    def _intern(self, node: Node) -> Ref:
        key = (node.op, node.inputs, node.attrs, node.families if not node.inputs else ())
        if key not in self.numbers:
            self.numbers[key] = len(self.nodes)
            self.nodes[len(self.nodes)] = node
        return Ref(self.numbers[key])

    # Products and sums, with the trivial cases gone.

    def scaled(self, coef: Ref, x: Ref) -> Ref:
        c = self.nodes[coef.node]
        if c.op == "number" and c.attrs[0] == 1:
            return x
        if c.op == "number":
            return self.add("add", (x,), (c.attrs[0],))
        return self.add("scale", (coef, x))

    def product(self, coef: Ref, factors: Iterable[Ref]) -> Ref:
        parts = tuple(factors)
        return self.scaled(coef, parts[0]) if len(parts) == 1 else self.add("product", (coef, *parts))

    def map(self, profile: sp.Expr, args: Iterable[Ref]) -> Ref:
        refs = tuple(args)
        plain = {slot(i): n.attrs[0] for i, r in enumerate(refs) if (n := self.nodes[r.node]).op == "number"}
        kept = [i for i in range(len(refs)) if slot(i) not in plain]
        profile = swap(profile, {**plain, **{slot(i): slot(j) for j, i in enumerate(kept)}})
        refs = tuple(refs[i] for i in kept)
        if profile.is_number and all(self.view(r).shape == (ONE, ONE) for r in refs):
            return self.number(profile)
        return refs[0] if profile == slot(0) and len(refs) == 1 else self.add("map", refs, profile)

    def graph(self, roots: Mapping[Root, Ref]) -> Graph:
        """The nodes that the roots reach."""
        seen: set[int] = set()
        stack = [r.node for r in roots.values()]
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack.extend(r.node for r in self.nodes[i].inputs)
        nodes = {i: self.nodes[i] for i in sorted(seen)}
        pick: Callable[[dict[int, str]], dict[int, str]] = lambda d: {i: v for i, v in d.items() if i in nodes}
        return Graph(nodes, dict(roots), pick(self.names), pick(self.notes), self.open)


def straight_first(nodes: Mapping[int, Node], factors: tuple[Ref, ...]) -> bool:
    """Is a product of two matrices, one with batch axes, written with the other one first?"""
    a, b = (nodes[r.node] for r in factors)
    thin = 1 in (*a.shape, *b.shape)
    return thin or not (a.batched and not b.batched)


ELEMENTWISE = ("map", "add", "scale", "prox")
UNARY = (
    "detach", "sum", "length", "unit", "logsumexp", "max", "softmax", "inverse", "family_sum", "family_logsumexp", "family_softmax", "spectral_norm", "spectral_sum",
    "spectral_map", "spectral_prox", "spectral_divergence", "trace", "diagonal", "running_sum", "dropout", "drop_path", "top", "sort",
)  # fmt: skip
OPAQUE = ("diag", "cholesky")
"""Symmetric, or a factor that only stands for its symmetric product."""
PRODUCTS = ("product", "matmul", "contract")
ALONG = ("sum", "length", "unit", "logsumexp", "max", "softmax", "running_sum", "sort")


# --- lowering ---------------------------------------------------------------------------------------------------------


@dataclass
class Lowering:
    """Expressions -> nodes, under an environment that says which node a symbol is now.

    detach: what stop_gradient holds is held in training too (in the value of an objective); in a layer it was held while the layer
    was derived, and training sees through it.
    """

    builder: Builder
    env: dict[Sym | sp.Symbol, Ref]
    detach: bool = False
    memo: dict[Expr, Ref] = field(default_factory=dict[Expr, Ref])

    def bind(self, symbol: Sym | sp.Symbol, ref: Ref) -> None:
        self.env[symbol] = ref
        self.memo.clear()

    def value(self, e: Expr | sp.Expr) -> Ref:
        return self.lower(e) if isinstance(e, Expr) else self.scalar(e)

    def scalar(self, e: sp.Expr) -> Ref:
        """A SymPy scalar: a formula of the nodes of its symbols."""
        return self._map(e, ())

    def _map(self, profile: sp.Expr, args: tuple[Expr, ...]) -> Ref:
        """A profile in slots, with its scalar symbols as further arguments."""
        profile, args = _above(profile, args)
        refs = dict[sp.Symbol, Ref]()
        for i, a in enumerate(args):
            profile, refs[slot(i)] = self._argument(profile, slot(i), a)
        profile = stable(profile)
        free = sorted((s for s in profile.free_symbols if s not in refs), key=str)
        refs |= {cast(sp.Symbol, s): self._symbol(cast(sp.Symbol, s)) for s in free}
        used = {s: r for s, r in refs.items() if s in profile.free_symbols}
        shaped = [r for s, r in refs.items() if s not in used]
        order = list(dict.fromkeys(used.values()))
        names = {s: slot(order.index(r)) for s, r in used.items()}
        out = self.builder.map(swap(profile, names) if names else profile, order)
        for r in shaped:  # an argument of which only the shape counts: ones
            out = self.builder.add("map", (out, r), slot(0) * slot(1))
        return out

    def _argument(self, profile: sp.Expr, s: sp.Symbol, a: Expr) -> tuple[sp.Expr, Ref]:
        """A profile and the argument s of it; √(Σ f(x) − n f(0)) is √s, s = Σ (f(x) − f(0))."""
        if (at_zero := _at_zero(a)) is not None:
            m = cast(Sum, a).x
            for sign in (1, -1):  # n - sum(cos(z)) is the sum of 1 - cos(z)
                shifted = profile.xreplace({s: sign * s + at_zero * m.rows * m.cols})
                above = cast(sp.Expr, shifted.replace(lambda x: isinstance(x, sp.Add), sp.expand))
                if above.count_ops() < profile.count_ops():
                    return above, self._above_zero(cast(Sum, a), at_zero, sign)
        return profile, self.lower(a)

    def _above_zero(self, e: Sum, at_zero: sp.Expr, sign: int = 1) -> Ref:
        """± Σ (f(x) − f(0)): what cancels does so in each entry, before rounding adds up."""
        each = cast(Map, e.x)
        return self.builder.add("sum", (self._map(sign * (each.profile - at_zero), each.args),), None)

    def _symbol(self, s: sp.Symbol) -> Ref:
        if s not in self.env:
            raise UnrollError("E402", f"the size or scalar '{s}' has no value here")
        return self.env[s]

    def lower(self, e: Expr) -> Ref:
        if e not in self.memo:
            self.memo[e] = self._lower(cast(Formula, e))
        return self.memo[e]

    def _lower(self, e: Formula) -> Ref:
        b = self.builder
        match e:
            case Sym():
                return self.env[e]
            case Member(of, index):
                leaf = self.env[of]
                node = b.nodes[leaf.node]
                assert not node.inputs, "a family is a leaf"
                assert of.family is not None
                own = b.leaf(
                    node.op, node.attrs[0], node.shape, node.stage, batched=node.batched, families=((index, of.family),)
                )
                return b.flip(own) if leaf.flip else own
            case Eye(n):
                return b.number(ONE) if n == 1 else b.constant("eye", n, n)
            case Ones(rows, cols):
                return b.constant("full", rows, cols)
            case Zero(rows, cols):
                return b.number(sp.Integer(0)) if e.is_scalar else b.constant("full", rows, cols, 0)
            case Add(terms):
                return self._add(terms)
            case Mul(coef, factors):
                return self._mul(coef, factors)
            case Transpose(x):
                return b.flip(self.lower(x))
            case Inverse(x):
                return self._inverse(x)
            case Map(profile, args):
                return self._map(profile, args)
            case Diag(x):
                return b.add("diag", (self.lower(x),))
            case Diagonal(x):
                return b.add("diagonal", (self.lower(x),))
            case Softmax(x, axis, causal):
                return b.add("softmax", (self.lower(x),), axis, causal)
            case FamilySoftmax(index, _, x):
                return b.add("family_softmax", (self.lower(x),), index)
            case FamilyLogSumExp(index, _, body):
                return b.add("family_logsumexp", (self.lower(body),), index)
            case Noise(kind, rate, x):
                return b.add(kind, (self.lower(x), self.scalar(rate)))
            case Normalise(kind, axis, eps, x, weight, bias):
                return self._norm(kind, axis, eps, self.lower(x), weight, bias)
            case Op("running_sum", x, adjoint):
                return b.add("running_sum", (self.lower(x),), 1, adjoint)
            case Op("shifts" | "repeat" | "first" | "groups", x, adjoint, sizes):
                return b.add(e.name, (self.lower(x),), adjoint, sizes)
            case Spectrum(index, sizes, x, conjugate):
                ref = b.add("spectrum", (self.lower(x),), index, sizes)
                return b.add("conjugate", (ref,)) if conjugate else ref
            case Signal(index, sizes, body):
                return b.add("signal", (self.lower(body),), index, sizes)
            case SpectralMap(h, x):
                return self._spectral("spectral_map", h, x)
            case Spectral(h, x):
                return self._spectral("spectral_sum", h, x)
            case SpectralNorm(x):
                return b.add("spectral_norm", (self.lower(x),))
            case Op(name, x, adjoint):
                assert name == "difference", name
                return b.add("difference", (self.lower(x),), name, adjoint)
            case Hold(x):
                return b.add("detach", (self.lower(x),)) if self.detach else self.lower(x)
            case Prox():
                from unroll.calculus.prox import plan

                return self.lower(plan(e))
            case ProxMap():
                return self._prox(e, 1)
            case Multiplier():
                return self._prox(e, 4)
            case Sweep():
                return self._sweep(e)
            case FamilySum(index, _, body) if (sizes := _frequencies(body, index)) is not None:
                return b.add("frequency_sum", (self.lower(body),), index, sizes)
            case FamilySum(index, _, body):
                return b.add("family_sum", (self.lower(body),), index)
            case Sum(x, axis):
                return b.add("sum", (self.lower(x),), axis)
            case LogSumExp(x, axis):
                return b.add("logsumexp", (self.lower(x),), axis)
            case Max(x, axis):
                return b.add("max", (self.lower(x),), axis)
            case Trace(x):
                return self._trace(x)
            case LogDet(x) if complex_valued(x):
                return b.add("logdet_hermitian", (self.lower(x),))
            case LogDet(x):
                return b.add("logdet_cholesky", (b.add("cholesky", (self.lower(x),)),))
            case SpectralProx(prox, x):
                record = self._at_numbers(prox, {s: self._symbol(s) for s in prox.scalars})
                return b.add("spectral_prox", (self.lower(x), *map(self._symbol, record.scalars)), record)
            case SpectralDivergence(prox, symmetric, x):
                record = self._at_numbers(prox, {s: self._symbol(s) for s in prox.scalars})
                scalars = map(self._symbol, record.scalars)
                return b.add("spectral_divergence", (self.lower(x), *scalars), record, symmetric)
            case Sorted(x):
                return b.add("sort", (self.lower(x),), 0)
            case Worked("top", (x, share)):
                c = as_constant(share)
                p = self.lower(share) if c is None else self.scalar(c)
                return b.add("top", (self.lower(x), p), b.nodes[p.node].plain)
            case Worked("div", (of, x, probes)):
                return b.add("div", (self.lower(of), self.lower(x)), int(as_constant(probes) or 0))
            case Worked("signs", (x, seed)):
                return b.add("signs", (self.scalar(as_constant(seed) or sp.S.Zero),), *x.shape)
            case Worked(name, (x,)):
                ref = self.lower(x)
                if b.nodes[ref.node].stage > Stage.PROLOGUE:
                    raise UnrollError(
                        "E403",
                        f"{e} is worked out once, and what is in it changes",
                        hint="leave what is in it as it is",
                    )
                return b.add("factor", (ref,), name)
            case Worked():
                raise AssertionError(f"internal error, please report: no {e.name}")
            case Curve(points, x, grid):
                return b.add("curve", (self.lower(x), self.lower(points)), grid)
            case Project(name, params, x):
                return b.add("project", (self.lower(x), *map(self.value, params)), name)
            case Indicator("affine", (a, c), x) if isinstance(a, Expr) and isinstance(c, Expr):
                return b.add("indicator", (self.lower(matmul(a, x)), self.lower(c)), "affine")
            case Indicator(name, params, x):
                return b.add("indicator", (self.lower(x), *map(self.value, params)), name)
            case _ as never:
                assert_never(never)

    def _add(self, terms: tuple[Expr, ...]) -> Ref:
        """Numbers in front of terms belong to the sum."""
        coefs, refs = list[sp.Expr](), list[Ref]()
        if (joined := _joined(terms)) is not None:
            t, at_zero, terms = joined
            c, body = split(t)
            first = self.builder.scaled(self.scalar(c), self._above_zero(cast(Sum, body), at_zero))
            return self.builder.add("add", (first, self._add(terms)), (ONE, ONE)) if terms else first
        left = tuple(t for t in terms if not self._vanishes(split(t)[0].as_coeff_Mul()[1]))
        for term in _unrepeated(left or terms):
            c, body = split(term)
            value, rest = c.as_coeff_Mul()
            coefs.append(cast(sp.Expr, value))
            refs.append(self._mul(rest, body.factors if isinstance(body, Mul) else (body,)))
        return self.builder.add("add", refs, tuple(coefs))

    def _vanishes(self, coef: sp.Expr) -> bool:
        """Is a coefficient 0 at the numbers that are known, as 1 - step is for the step 1?"""
        node = self.builder.nodes[self.scalar(coef).node] if coef.free_symbols else None
        return node is not None and node.op == "number" and node.attrs[0] == 0

    def _mul(self, coef: sp.Expr, factors: tuple[Expr, ...]) -> Ref:
        b = self.builder
        head = self.scalar(coef)
        if len(factors) > 2 and isinstance(factors[-1], Diag):  # the columns of the whole product are weighed
            return b.map(slot(0) * slot(1), (self._mul(coef, factors[:-1]), b.flip(self.lower(factors[-1].x))))
        for i, f in enumerate(factors[:-1]):
            if (weights := self._of_differences(f)) is not None:
                solved = b.add("solve_differences", (self._mul(ONE, factors[i + 1 :]), *weights))
                return b.product(head, [*self._diagonals(factors[:i]), solved])
        if len(factors) > 1 and all(f.is_scalar for f in factors):
            product = sp.Mul(*(slot(i) for i in range(len(factors) + 1)))
            return b.map(product, (head, *map(self.lower, factors)))
        return b.product(head, self._diagonals(factors))

    def _diagonals(self, factors: tuple[Expr, ...]) -> list[Ref]:
        """diag(v) @ M scales the rows of M, M @ diag(v) its columns: none is built beside another factor."""
        b = self.builder
        parts: list[Expr | Ref] = list(factors)
        for i in reversed(range(len(parts))):
            part = parts[i]
            if isinstance(part, Diag) and len(parts) > 1:
                v = self.lower(part.x)
                j = i + 1 if i + 1 < len(parts) else i - 1
                other = parts[j]
                m = other if isinstance(other, Ref) else self.lower(other)
                parts[j] = b.add("map", (v if j > i else b.flip(v), m), slot(0) * slot(1))
                del parts[i]
        return [p if isinstance(p, Ref) else self.lower(p) for p in parts]

    def _inverse(self, x: Expr) -> Ref:
        definite_as = "symmetric" if is_symmetric(x) else "hermitian" if is_hermitian(x) else ""
        return self.builder.add("inverse", (self.lower(x),), definite_as if definite(x) == 2 else "")

    def _of_differences(self, e: Expr) -> tuple[Ref, Ref] | None:
        """a, b of (a I + b D'D)^-1, positive definite, D the differences of neighbours, where that moves: what does not is worked out once."""
        if not isinstance(e, Inverse) or not isinstance(e.x, Add) or e.rows == 1:
            return None
        twice = operator("difference", operator("difference", eye(e.rows)), adjoint=True)
        weights = {body: c for c, body in map(split, e.x.terms)}
        if set(weights) != {eye(e.rows), twice}:
            return None
        a, b = weights[eye(e.rows)], weights[twice]
        if not (a.is_positive and b.is_positive):
            return None
        refs = self.scalar(a), self.scalar(b)
        return refs if any(self.builder.nodes[r.node].stage > Stage.SETUP for r in refs) else None

    def _norm(self, kind: str, axis: int, eps: sp.Expr, x: Ref, weight: Expr, bias: Expr) -> Ref:
        """Weight and bias within the operation where they are vectors of the network, else around it."""
        b = self.builder
        if as_constant(weight) == 1 and as_constant(bias) == 0:
            return b.add("norm", (x,), kind, axis, eps, False)
        affine = (self.lower(weight), self.lower(bias))
        nodes = [b.nodes[r.node] for r in affine]
        if all(not (n.batched or n.families or n.inputs) for n in nodes):
            return b.add("norm", (x, *affine), kind, axis, eps, True)
        return b.map(slot(0) * slot(1) + slot(2), (b.add("norm", (x,), kind, axis, eps, False), *affine))

    def _spectral(self, op: str, profile: sp.Expr, x: Expr) -> Ref:
        free = sorted((cast(sp.Symbol, s) for s in profile.free_symbols if s != slot(0)), key=str)
        core = stable(swap(profile, {s: slot(i + 1) for i, s in enumerate(free)}))
        return self.builder.add(op, (self.lower(x), *map(self._symbol, free)), core)

    def _prox(self, e: ProxMap | Multiplier, own: int) -> Ref:
        """own: how many arguments stand before those of the scalars."""
        found = {
            s: self.lower(e.args[own + e.slots.index(s)]) if s in e.slots else self._symbol(s) for s in e.prox.scalars
        }
        record = self._at_numbers(e.prox, found)
        op = "prox" if isinstance(e, ProxMap) else "multiplier"
        return self.builder.add(op, (*map(self.lower, e.args[:own]), *(found[s] for s in record.scalars)), record)

    def _sweep(self, e: Sweep) -> Ref:
        """Operands: q, fall, at, the scalars of the prox but for its step, and those of what clips it. attrs: the prox and what clips it."""
        from unroll.calculus.prox import plan

        point, found, clip, ends = entry(e.at), plan(e.step) if isinstance(e.step, Prox) else e.step, None, list[Ref]()
        if isinstance(found, Map):
            free = sorted((cast(sp.Symbol, s) for s in found.profile.free_symbols if s != slot(0)), key=str)
            clip, ends = (
                swap(found.profile, {s: slot(i + 1) for i, s in enumerate(free)}),
                [self._symbol(s) for s in free],
            )
            (found,) = found.args
        record, scalars = None, list[Ref]()
        if found is not point:
            assert isinstance(found, ProxMap) and found.args[0] is point, "a step of entries"
            given = dict(zip(found.slots, map(self.lower, found.args[1:]), strict=True))
            given |= {s: self._symbol(s) for s in found.prox.scalars if s not in given and s != STEP_OF_ENTRY}
            record = self._at_numbers(found.prox, given)
            scalars = [given[s] for s in record.scalars if s != STEP_OF_ENTRY]
        return self.builder.add("sweep", (*map(self.lower, (e.q, e.fall, e.at)), *scalars, *ends), record, clip)

    def _at_numbers(self, record: Any, found: Mapping[sp.Symbol, Ref]) -> Any:
        """A scalar prox with the scalars that are plain numbers here put in."""
        nodes = {s: self.builder.nodes[r.node] for s, r in found.items()}
        known = {s: n.attrs[0] for s, n in nodes.items() if n.op == "number"}
        return record.substitute(known) if known else record

    def _trace(self, x: Expr) -> Ref:
        b = self.builder
        match x:
            case Mul(coef, factors) if len(factors) > 1:
                a, c = self._mul(ONE, factors[:-1]), self._mul(ONE, factors[-1:])
                return b.scaled(self.scalar(coef), b.add("trace_product", (a, c)))
            case _:
                return b.add("trace", (self.lower(x),))


def _above(profile: sp.Expr, args: tuple[Expr, ...]) -> tuple[sp.Expr, tuple[Expr, ...]]:
    """√(−u), u = y − x → √u, u = x − y: where they are equal, −u is −0, and the slope there −∞ in the place of ∞."""
    under = [p.base for p in profile.atoms(sp.Pow) if not (p.exp.is_integer and p.exp.is_nonnegative)]
    under += [x.args[0] for x in profile.atoms(sp.log)]
    for i, a in enumerate(args):
        if isinstance(a, Add) and any(u.as_coeff_Mul()[0].is_negative and u.has(slot(i)) for u in under):
            profile = swap(profile, {slot(i): -slot(i)})
            args = (*args[:i], scale(-1, a), *args[i + 1 :])
    return profile, args


def _at_zero(e: Expr) -> sp.Expr | None:
    """f(0) of Σ f(x), where it is a number other than 0."""
    match e:
        case Sum(Map(profile, args) as m, None) if all(a.shape == m.shape for a in args):
            value: Any = profile.xreplace({slot(i): sp.S.Zero for i in range(len(args))})
            return value if value.is_finite and value != 0 else None
        case _:
            return None


def _joined(terms: tuple[Expr, ...]) -> tuple[Expr, sp.Expr, tuple[Expr, ...]] | None:
    """(c Σ f(x), f(0), the others) of terms with c Σ f(x) and −c n f(0)."""
    for number in terms:
        value = as_constant(number)
        for t in terms if value is not None else ():
            c, body = split(t)
            at_zero = _at_zero(body)
            if (
                at_zero is not None
                and sp.cancel(c * at_zero * cast(Sum, body).x.rows * cast(Sum, body).x.cols + value) == 0
            ):
                return t, at_zero, tuple(x for x in terms if x not in (t, number))
    return None


def half_spectrum(sizes: tuple[sp.Expr, ...]) -> sp.Expr:
    """How many frequencies are kept: those of real signals come in conjugate pairs."""
    return sp.Mul(*sizes[:-1]) * (sp.floor(sizes[-1] / 2) + 1)


def _frequencies(e: Expr, index: str) -> tuple[sp.Expr, ...] | None:
    """The sizes of the axes of places, where the index is one of frequencies."""
    return next((x.sizes for x in walk(e) if isinstance(x, Spectrum) and x.index == index), None)


def _unrepeated(terms: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """b @ ones(1, n) beside a term of the full shape is b: addition repeats it."""
    columns = {t: _column(t) for t in terms}
    full = any(c is None for c in columns.values())
    return tuple(c if full and c is not None else t for t, c in columns.items())


def _column(e: Expr) -> Expr | None:
    """b for c * b @ ones(1, n), b a column; and for its transpose."""
    c, body = split(e)
    match body:
        case Mul(_, (*front, Ones(one, _))) if one == 1 and front:
            return matmul(*front, coef=c)
        case Mul(_, (Ones(_, one), *rest)) if one == 1 and rest:
            return matmul(*rest, coef=c)
        case _:
            return None


def in_named_parts(problem: Problem, step: Step) -> tuple[tuple[InParts, ...], tuple[InParts, ...]]:
    """The terms of the objective and the lines of a layer, long ones in parts; no name of a part is another thing in any of them."""
    terms = tuple(problem.penalties)
    found = in_parts((*terms, *(a.value for a in step.assigns)))
    return found[: len(terms)], found[len(terms) :]


# --- Step -> Graph ----------------------------------------------------------------------------------------------------


def lower_step(problem: Problem, step: Step) -> Graph:
    """The whole of a network: start values of parameters and states, one layer, the answer."""
    b = Builder(d for d, n in problem.dims.items() if n == "dynamic")
    low = Lowering(b, _leaves(problem, b))
    for a in step.definitions:
        ref = low.value(a.value)
        _name(b, ref, a.target.name, a.note)
        low.bind(a.target, ref)
    low.bind(LAYER, b.leaf("layer", "of_start", (ONE, ONE), Stage.SETUP, plain=True))
    roots: dict[Root, Ref] = {("learned", p.name): low.value(p.starts_at) for p in step.learned if not p.constructed}
    for p in step.learned:
        low.bind(p.symbol, _learned(b, p))
    for s in step.states:
        ref = low.value(s.start)
        roots["start", s.symbol.name] = _turned(b, s.symbol, ref)
        low.bind(s.symbol, _state(b, s.symbol, start=True))
    low.bind(LAYER, b.leaf("layer", "layer", (ONE, ONE), Stage.BODY, plain=True))
    for s in step.states:
        low.bind(s.symbol, _state(b, s.symbol))
    roots |= {("learned", p.name): low.value(p.starts_at) for p in step.learned if p.constructed}
    _, parted = in_named_parts(problem, step)
    for a, shown in zip(step.assigns, parted, strict=True):
        ref = low.value(a.value)
        says = f"{a.target.name} <- "  # what it is, in names of parts where that is long
        _name(b, ref, a.target.name, says + text(shown.whole) if a.note.startswith(says) else a.note)
        low.bind(a.target, ref)
        if a.block and isinstance(a.target, Sym) and a.target in step.output:
            roots["block", a.block] = _turned(b, a.target, ref)
    roots |= {("next", s.symbol.name): _turned(b, s.symbol, low.env[s.symbol]) for s in step.states}
    return b.graph(roots)


def lower_terms(problem: Problem) -> Graph:
    """The objective: one value per term, as a function of variables, inputs, parameters and scalars; per frequency where it can be."""
    b = Builder()
    env = _leaves(problem, b)
    for v in problem.variables:
        env[v] = _tokens(b, "input", v, Stage.PROLOGUE, _family(v))
    low = Lowering(b, env, detach=True)
    return b.graph({("term", name): low.lower(per_frequency(e)) for name, e in problem.terms.items()})


def _leaves(problem: Problem, b: Builder) -> dict[Sym | sp.Symbol, Ref]:
    env: dict[Sym | sp.Symbol, Ref] = {}
    for s in problem.parameters:
        env[s] = b.leaf("given", s.name, s.shape, Stage.SETUP, families=_family(s), symmetric="symmetric" in s.props)
    for s in problem.inputs:
        env[s] = _tokens(b, "input", s, Stage.PROLOGUE, _family(s))
    for s in problem.scalars:
        env[s] = b.leaf("scalar", s.name, (ONE, ONE), Stage.SETUP, positive=bool(s.is_positive))
    for s, n in problem.dims.items():
        dynamic = n == "dynamic"
        env[s] = b.leaf("dim", s.name, (ONE, ONE), Stage.PROLOGUE if dynamic else Stage.CONSTANT, plain=True)
    return env


def _family(s: Sym) -> tuple[tuple[str, sp.Expr], ...]:
    return () if s.family is None else (("k", s.family),)


def _learned(b: Builder, p: Learned) -> Ref:
    stage = Stage.BODY if p.per_layer else Stage.PROLOGUE
    match p.symbol:
        case Sym() as s:
            return b.leaf("learned", p.name, s.shape, stage, families=_family(s), symmetric=p.constraint == "symmetric")
        case _:
            rows = p.shape[0] if p.shape else ONE
            return b.leaf("learned", p.name, (ONE, rows) if p.across else (rows, ONE), stage)


def _state(b: Builder, symbol: Sym | sp.Symbol, start: bool = False) -> Ref:
    stage = Stage.PROLOGUE if start else Stage.BODY
    if isinstance(symbol, Sym):
        return _tokens(b, "start" if start else "state", symbol, stage)
    return b.leaf("start" if start else "counter", symbol.name, (ONE, ONE), stage, plain=True)


def _tokens(b: Builder, op: str, s: Sym, stage: Stage, families: tuple[tuple[str, sp.Expr], ...] = ()) -> Ref:
    """A leaf of every sample. Leaves are stored columns first: what is stored as it is written is the transpose of one."""
    if not s.as_written:
        return b.leaf(op, s.name, s.shape, stage, batched=True, families=families)
    return b.flip(b.leaf(op, s.name, (s.ncols, s.nrows), stage, batched=True, families=families))


def _turned(b: Builder, s: Sym | sp.Symbol, ref: Ref) -> Ref:
    """A value as the leaf of its state is stored."""
    return b.flip(ref) if isinstance(s, Sym) and s.as_written else ref


def _name(b: Builder, ref: Ref, name: str, note: str) -> None:
    if b.nodes[ref.node].inputs and not ref.flip:
        b.names.setdefault(ref.node, name)
    if note:
        b.notes.setdefault(ref.node, note)
