"""Run a graph node by node, as it stands: what a pass may not change. And how a graph is shown: text, Mermaid, SVG."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from functools import reduce
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from unroll.calculus import torch_functions as runtime
from unroll.emit.section import Section
from unroll.lower.graph import Builder, Graph, Root
from unroll.lower.operations import HELPERS, LEAVES, Node, Ref
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
        exec(record.slope_source(f"{name}_slope"), space)
    return name


def _binary(graph: Graph) -> Graph:
    """Products of many factors as products of two, from the left."""

    def rule(b: Builder, node: Node, inputs: tuple[Ref, ...]) -> Ref | None:
        return b.scaled(inputs[0], reduce(lambda left, right: b.add("matmul", (left, right)), inputs[1:]))

    return rewrite(graph, rule, "product")


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
