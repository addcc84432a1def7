"""What is to be written of one network: what its class holds and computes, and the identifiers of its text."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy as sp
from torch import nn

from unroll.calculus.prox_function import ScalarProx
from unroll.derivation.step import Learned, Step
from unroll.emit.names import MEMBERS, Names, identifier
from unroll.emit.section import Section, hint
from unroll.language.nodes import Sym
from unroll.language.problem import Problem
from unroll.lower.graph import Graph
from unroll.lower.operations import Stage
from unroll.lower.scalar_text import Text, formula
from unroll.lower.sums_over_samples import sums_over


@dataclass(frozen=True)
class Module:
    """What is to be written: what the class holds and computes, and the identifiers of its text.

    free: how many layers have numbers of their own, where those after them share one set.
    """

    problem: Problem
    step: Step
    graph: Graph
    layers: int
    dims: dict[str, int]
    name: str
    origin: str
    sha: str
    free: int | None = None

    @cached_property
    def class_name(self) -> str:
        word = "".join(p[:1].upper() + p[1:] for p in identifier(self.name).split("_") if p)
        return Names().fresh(word or "Net")

    @cached_property
    def forward_nodes(self) -> list[int]:
        """Nodes computed in a call."""
        return self._computed("start", "next", "block")

    @cached_property
    def construct_nodes(self) -> list[int]:
        """Nodes computed while parameters are worked out on data; none if there are no such parameters."""
        return self._computed("start", "next", "block", "learned") if self.constructed else []

    def _computed(self, *kinds: str) -> list[int]:
        """What a call computes for these roots."""
        own = {p.name for p in self.constructed}
        roots = [
            r.node
            for (kind, name), r in self.graph.roots.items()
            if kind in kinds and (kind != "learned" or name in own)
        ]
        reached = self.graph.reached(roots)
        return [i for i, n in self.graph.nodes.items() if i in reached and n.stage > Stage.SETUP and n.inputs]

    @cached_property
    def constructed(self) -> list[Learned]:
        """Parameters that are worked out on data."""
        return [p for p in self.learned if p.constructed]

    @cached_property
    def samples(self) -> tuple[sp.Symbol, tuple[int, ...]] | None:
        """The open size along which such data may come in batches, and the nodes that are sums over it."""
        for d, n in self.problem.dims.items():
            sums = sums_over(self.graph, d, [p.name for p in self.constructed]) if n == "dynamic" else None
            if sums:
                return d, sums
        return None

    @cached_property
    def inputs(self) -> list[Sym]:
        """What a call takes: not what is estimated."""
        return [s for s in self.problem.inputs if s.name not in self.step.estimated]

    @cached_property
    def _buffered(self) -> list[int]:
        """Values of set-up time that a call reads."""
        computed = {*self.forward_nodes, *self.construct_nodes}
        reads = [r.node for i in self.graph.nodes if i in computed for r in self.graph.nodes[i].inputs]
        reads += [r.node for (kind, _), r in self.graph.roots.items() if kind in ("start", "next")]
        return [i for i in dict.fromkeys(reads) if self.graph.nodes[i].stage == Stage.SETUP]

    @cached_property
    def learned(self) -> list[Learned]:
        """Parameters that a call reads; others are not in the module."""
        names = {n.attrs[0] for n in self.graph.nodes.values() if n.op == "learned"}
        return [p for p in self.step.learned if p.name in names]

    @cached_property
    def starts(self) -> list[str]:
        """States that can be started at a value given by the caller: the variables."""
        states = {s.symbol.name for s in self.step.states}
        return [v.name for v in self.problem.variables if v.name in states]

    @property
    def counts_layers(self) -> bool:
        """Is the number of layers an attribute? Elsewhere it is the length of a stack of parameters."""
        return self.free is not None or not any(p.per_layer for p in self.learned)

    # Words.

    @cached_property
    def attributes(self) -> Names:
        """Of what the module holds: learned parameters, values worked out once, sizes."""
        names = Names(frozenset(dir(nn.Module())) | MEMBERS)
        for p in self.learned:
            names("learned", p.name)
        for i in self._buffered:
            self._buffer_name(names, i)
        for d in self.problem.dims:
            names("dim", d.name)
        return names

    @cached_property
    def locals(self) -> Names:
        """Of what its methods read and make."""
        names = Names()
        for s in (*self.problem.inputs, *self.problem.variables, *self.problem.parameters, *self.problem.scalars):
            names("symbol", s.name)
        for d in self.problem.dims:
            names("dim", d.name)
        for p in self.learned:
            names("learned", p.name)
        for s in self.step.states:
            names("symbol" if s.symbol.name in self.starts else "state", s.symbol.name)
        return names

    @cached_property
    def buffers(self) -> dict[int, str]:
        """Values of set-up time that a call reads, and their attributes."""
        return {i: self._buffer_name(self.attributes, i) for i in self._buffered}

    def _buffer_name(self, names: Names, i: int) -> str:
        node = self.graph.nodes[i]
        if node.op in ("given", "scalar"):
            return names("symbol", str(node.attrs[0]))
        word = self.graph.names.get(i) or hint(self.graph, i)
        return names("buffer", f"{i}", "constant" if word == "t" else word)

    @cached_property
    def words(self) -> dict[tuple[str, str], str]:
        """What the user's words became."""
        learned = {("learned", p.name): self.attributes("learned", p.name) for p in self.learned}
        local = {(kind, word): name for (kind, word), name in self.locals.given.items() if kind in ("symbol", "dim")}
        return {**local, **learned}

    @cached_property
    def proxes(self) -> list[tuple[str, ScalarProx]]:
        """The module-level functions: one for each text of a scalar prox that a method calls."""
        found: list[tuple[str, ScalarProx]] = []
        for record in self._records:
            if all(known.source("prox") != record.source("prox") for _, known in found):
                found.append((self.locals.fresh("prox" if not found else f"prox_{len(found) + 1}"), record))
        return found

    @property
    def _records(self) -> list[ScalarProx]:
        nodes = self.graph.nodes
        roots = [r.node for (kind, _), r in self.graph.roots.items() if kind in ("start", "next", "block")]
        first = self.graph.reached(roots)
        order = [*(i for i in nodes if i in first), *(i for i in nodes if i not in first)]
        called = ("prox", "spectral_prox", "spectral_divergence", "multiplier", "sweep")
        return [nodes[i].attrs[0] for i in order if nodes[i].op in called and nodes[i].attrs[0] is not None]

    @cached_property
    def slopes(self) -> dict[str, ScalarProx]:
        """Those of which a method needs the slope too."""
        found = [n.attrs[0] for n in self.graph.nodes.values() if n.op == "multiplier"]
        return {f"{self.function(record)}_slope": record for record in found}

    def function(self, record: ScalarProx) -> str:
        """The module-level function of a scalar prox."""
        return next(name for name, known in self.proxes if known.source("prox") == record.source("prox"))

    def size(self, n: sp.Expr, prefix: str = "self.") -> Text:
        """A size as text: open ones are read off the inputs, others are attributes."""
        names: dict[sp.Symbol, Text] = {}
        for d in n.free_symbols:
            assert isinstance(d, sp.Symbol)
            if prefix and self.problem.dims.get(d) != "dynamic":
                names[d] = Text(prefix + self.attributes("dim", d.name), tensor=False)
            else:
                names[d] = Text(self.locals("dim", d.name), tensor=False)
        return formula(n, names)

    def section(self, known: dict[int, Text], like: str, used: set[str]) -> Section:
        """Lines that may use every name but those that are taken."""
        local = Names()
        local.used |= used | self.locals.used | {name for name, _ in self.proxes} | set(self.slopes)
        return Section(self.graph, known, local.fresh, lambda n: self.size(n).code, self.function, like)


@dataclass(frozen=True)
class Method:
    """The text of a method, and the helpers that it calls."""

    text: str
    helpers: frozenset[str]

    @staticmethod
    def of(head: str, lines: Sequence[str], helpers: Collection[str]) -> Method:
        body = textwrap.indent("\n".join(lines), "    ")
        return Method(f"{head}\n{body}", frozenset(helpers))
