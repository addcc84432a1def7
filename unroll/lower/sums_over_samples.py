"""Which values of a layer are sums over samples: what data give in batches is their sum, whatever the batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sympy as sp

from unroll.language.nodes import ONE
from unroll.lower.graph import ELEMENTWISE, Graph
from unroll.lower.operations import COLUMNWISE, Node, Stage, View

_EACH = (*ELEMENTWISE, "detach", "curve", "conjugate", "family_sum", "family_logsumexp", "family_softmax")
_ALONG = ("sum", "length", "max", "logsumexp", "softmax", "running_sum", "norm")
_COLUMNS = ("project", "spectrum", "signal", "energy", "frequency_sum", "solve", "cholesky_solve")


def sums_over(graph: Graph, samples: sp.Symbol, worked_out: Collection[str]) -> tuple[int, ...] | None:
    """The nodes that add over the axis `samples` what the parameters that are `worked_out` on data, and the new states, read.

    None where one pass over the samples is not enough for a layer: they are mixed otherwise, or a sum needs another one.
    """
    sums: list[int] = []
    learned = {r.node for (kind, name), r in graph.roots.items() if kind == "learned" and name in worked_out}
    states = {r.node for (kind, _), r in graph.roots.items() if kind in ("start", "next")}
    behind: dict[int, set[int]] = {}  # sums, and parameters worked out, that a node reads
    for i in sorted(graph.reached([*learned, *states])):
        node = graph.nodes[i]
        views = graph.views(node)
        behind[i] = {i} if node.op == "learned" and node.attrs[0] in worked_out else set()
        behind[i] |= {j for r in node.inputs for j in behind[r.node]}
        axes, read = _axes(node, samples), any(_axes(v.node, samples) for v in views)
        if node.plain or (node.stage == Stage.CONSTANT and not axes):
            continue
        if axes and (
            axes != [samples]
            or samples not in node.shape
            or not (node.op in ("input", "state", "start") or _apart(node, views, samples))
        ):
            return None
        if read and not axes:
            if behind[i] or not _adds(node, views, samples):
                return None
            sums.append(i)
            behind[i] = {i}
    carried = all(_axes(graph.nodes[i], samples) or graph.nodes[i].plain for i in states)
    return tuple(sums) if carried and not any(_axes(graph.nodes[i], samples) for i in learned) else None


def _axes(node: Node, samples: sp.Symbol) -> list[sp.Expr]:
    """The sizes of a node, those of families too, that depend on the number of samples."""
    return [n for n in (*node.shape, *(n for _, n in node.families)) if samples in n.free_symbols]


def _apart(node: Node, views: Sequence[View], samples: sp.Symbol) -> bool:
    """Does each sample of the value depend on that sample only?"""
    match node.op:
        case op if op in _EACH:
            return True
        case "matmul" | "contract":
            return views[0].shape[1] != samples
        case op if op in _ALONG:
            axis = node.attrs[1] if op == "norm" else node.attrs[0]
            return axis is not None and views[0].shape[axis] != samples
        case "project" if node.attrs[0] not in COLUMNWISE:
            return False
        case op if op in _COLUMNS:
            return node.shape[1] == samples and all(v.shape[1] == samples or not _axes(v.node, samples) for v in views)
        case _:
            return False


def _adds(node: Node, views: Sequence[View], samples: sp.Symbol) -> bool:
    """Is the value a sum over samples?"""
    match node.op:
        case "matmul" | "contract":
            return views[0].shape[1] == samples and all(_axes(v.node, samples) == [samples] for v in views)
        case "weighed_product":
            return all(_axes(v.node, samples) == [samples] for v in views) and views[0].shape[1] == samples
        case "sum":
            others = [n for n in views[0].shape if n != samples]
            return node.attrs[0] is None or views[0].shape[node.attrs[0]] == samples or others == [ONE]
        case _:
            return False
