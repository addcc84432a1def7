"""The function `grow`: a call that reads the next tokens of a text alone, and keeps what later ones need of them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy as sp

from unroll.emit.layer import layer_lines, loop_head, opening, output, per_layer, read_sizes
from unroll.emit.module import Module
from unroll.emit.text import helper, imports, needed
from unroll.lower.growing import Unkept, growing


@dataclass(frozen=True)
class Growth:
    """source: of the function grow(self, X, kept), "" where there is none, and then why: the operation without a rule."""

    source: str
    why: str = ""


@dataclass(frozen=True)
class _Growing(Module):
    """A module whose call has another graph, with values of set-up time that are there already."""

    held: dict[int, str] = field(default_factory=dict[int, str])

    @cached_property
    def buffers(self) -> dict[int, str]:
        return {i: self.held[i] for i in self._buffered}


def growth(m: Module) -> Growth:
    """The text for one input [d, N] with an open N, whose columns are tokens."""
    tokens = m.inputs[0].shape[1] if len(m.inputs) == 1 and m.inputs[0].rank == 2 else None
    if not isinstance(tokens, sp.Symbol) or m.problem.dims.get(tokens) != "dynamic":
        return Growth("", "an input that is no row of tokens")
    if m.constructed:
        return Growth("", "a parameter that data decide")
    so_far = sp.Symbol(f"{tokens.name} so far", integer=True, positive=True)
    try:
        graph, was = growing(m.graph, tokens, so_far)
    except Unkept as e:
        return Growth("", str(e))
    problem = replace(m.problem, dims={**m.problem.dims, so_far: "dynamic"})
    held = {new: m.buffers[old] for new, old in was.items() if old in m.buffers}
    grown = _Growing(problem, m.step, graph, m.layers, m.dims, m.name, m.origin, m.sha, m.free, held)
    return Growth(_source(m, grown, tokens, so_far))


def _source(m: Module, grown: _Growing, tokens: sp.Symbol, so_far: sp.Symbol) -> str:
    lines, sec, states = opening(grown, grown.inputs, grown.forward_nodes, start=False)
    lines += loop_head(grown, per_layer(grown), sec.fresh)
    lines += textwrap.indent("\n".join(layer_lines(grown, sec, states)), "    ").split("\n")
    lines.append(f"return {output(grown, states)}")
    n, everything = grown.locals("dim", tokens.name), grown.locals("dim", so_far.name)
    if any(everything in line for line in lines):
        lines.insert(0, f"{everything} = kept.seen + {n}")
    word = grown.locals("symbol", grown.inputs[0].name)
    body = textwrap.indent("\n".join(read_sizes(m, m.inputs, lines)), "    ")
    depth = ", layers=None" if grown.counts_layers else ""
    doc = f'    """{word}: (..., {n}, ..), the next tokens of a text -> what the layers make of them; kept: what they read before."""'
    text = f"def grow(self, {word}, kept{depth}):\n{doc}\n{body}\n"
    used = set(sec.used_ops).union(*(p.runtime for _, p in grown.proxes))
    functions = [*map(helper, needed(used)), *(p.source(name) for name, p in grown.proxes)]
    functions += [p.slope_source(name) for name, p in grown.slopes.items()]
    whole = "\n\n".join([*(f.strip("\n") + "\n" for f in functions), text])
    return f"{imports(whole)}\n\n{whole}"
