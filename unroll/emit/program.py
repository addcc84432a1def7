"""Problem and step -> Program: the optimised graph of one layer, and the text that computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from unroll.derivation.step import DRAWN, Step
from unroll.emit.axes import stored_axes, stored_sizes
from unroll.emit.growing import Growth, growth
from unroll.emit.initialise import initialise_arguments
from unroll.emit.module import Module
from unroll.emit.objective import term_source
from unroll.emit.text import source
from unroll.errors import UnrollError
from unroll.language.constructors import swap
from unroll.language.nodes import ONE, Sym
from unroll.language.problem import Problem
from unroll.lower.graph import Graph, lower_step
from unroll.lower.padding import padded
from unroll.lower.passes import Sizes, optimise


@dataclass(frozen=True)
class Program:
    """What a network is made from: the optimised graph of one layer, what the passes did, and the text."""

    problem: Problem
    step: Step
    layers: int
    free: int | None
    """How many of them have numbers of their own, where those after them share one set."""
    dims: dict[str, int]
    class_name: str
    graph: Graph
    log: tuple[str, ...]
    source: str
    objective_source: str
    words: Mapping[tuple[str, str], str]
    """("symbol" or "learned" or "dim", the user's word) -> identifier in the text: argument, attribute, argument."""
    initialise_arguments: tuple[str, ...]
    """Parameters and scalars, in the user's words, that `initialise` takes."""
    inputs: tuple[str, ...]
    """What a call takes, in the user's words; an input that only the objective reads is not among them."""
    construct_inputs: tuple[str, ...]
    """What `construct` takes; nothing where no parameter is worked out on data."""
    samples: sp.Symbol | None
    """The size along which `construct` takes batches; None: all at once."""

    @property
    def drawn(self) -> bool:
        """Does `initialise` draw the start of a parameter?"""
        return any(p.init in DRAWN and ("learned", p.name) in self.words for p in self.step.learned)

    @cached_property
    def growth(self) -> Growth:
        """The text that reads the next tokens of a text alone, or why there is none."""
        return growth(
            Module(self.problem, self.step, self.graph, self.layers, self.dims, self.class_name, "", "", self.free)
        )

    @property
    def any_depth(self) -> bool:
        """May the number of layers differ from call to call?"""
        return self.free is not None or all(
            ("learned", p.name) not in self.words or not p.per_layer for p in self.step.learned
        )

    @property
    def sets(self) -> int:
        """How many there are of a number that is not shared by all layers."""
        return self.layers if self.free is None else self.free + 1

    @property
    def init_arguments(self) -> dict[str, int]:
        return {**{self.words["dim", d]: n for d, n in self.dims.items()}, "layers": self.layers}

    @cached_property
    def masks(self) -> tuple[str, ...]:
        """The inputs that say what is padding."""
        return tuple(s.name for s in self.problem.inputs if "mask" in s.props)

    def axes(self, s: Sym) -> tuple[str, ...]:
        """Names of the axes of the tensor a user gives, after the batch axes."""
        return stored_sizes(s)

    def tensor_sizes(self, s: Sym) -> tuple[int | None, ...]:
        """Numbers for `axes`; None is open."""
        return self._sizes[s.name]

    @cached_property
    def _sizes(self) -> dict[str, tuple[int | None, ...]]:
        values = {d: self.dims[d.name] for d in self.problem.dims if d.name in self.dims}
        numbers = {s.name: [swap(n, values) for n in stored_axes(s)] for s in self.problem.symbols.values()}
        return {name: tuple(int(n) if n.is_Integer else None for n in sizes) for name, sizes in numbers.items()}


def build(
    problem: Problem,
    step: Step,
    *,
    layers: int,
    dims: Mapping[str, int],
    name: str,
    origin: str = "",
    sha: str = "",
    free: int | None = None,
) -> Program:
    """Graph, passes and source of a network. Raises UnrollError E402 where a size has no value."""
    for d, n in problem.dims.items():
        if n != "dynamic" and d.name not in dims and _mentioned(d, problem):
            raise UnrollError("E402", f"the size '{d.name}' has no value", hint=f"give it: dims: {{{d.name}: ...}}")
    sizes = Sizes({d: dims[d.name] for d in problem.dims if d.name in dims}, layers)
    optimised = optimise(padded(lower_step(problem, step), problem), sizes)
    module = Module(problem, step, optimised.graph, layers, dict(dims), name, origin, sha, free)
    return Program(
        problem, step, layers, free, dict(dims), module.class_name, optimised.graph, optimised.log,
        source(module),
        term_source(problem, dims),
        module.words, tuple(initialise_arguments(module)),
        tuple(s.name for s in module.inputs),
        tuple(s.name for s in problem.inputs) if module.constructed else (),
        module.samples[0] if module.samples is not None else None,
    )  # fmt: skip


def _mentioned(d: sp.Symbol, problem: Problem) -> bool:
    symbols = problem.symbols.values()
    return any(d in n.free_symbols for s in symbols for n in (s.nrows, s.ncols, s.family or ONE))
