"""What a network did, block by block, and what that did to the objective.

What is measured is a problem of its own: the objective at the iterate or at a normalised form of it, with the parameters
that were given or those that the layers have in their place, and any further formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unroll.derivation.step import Learned, Step
from unroll.errors import UnrollError
from unroll.language.constructors import member, normalise, symbol
from unroll.language.nodes import Expr, Indicator, Member, Sym, walk
from unroll.language.parse import parse_matrix
from unroll.language.problem import Problem
from unroll.language.traversal import substitute, transform
from unroll.network.stepwise import AttentionMap

NORMS = ("layer_norm", "rms_norm", "sphere")
EPS = 1e-5
"""Of the norms that terms are evaluated at; what layers have if nothing else is said."""


@dataclass(frozen=True)
class Measure:
    """What a trace evaluates. own: parameter of the objective -> the learned one of each layer that stands in for it.

    reads: learned parameters that the formulas read; they are parameters of `problem`.
    """

    problem: Problem
    own: dict[str, str] = field(default_factory=dict[str, str])
    reads: tuple[Learned, ...] = ()


def measure(problem: Problem, step: Step, at: str, parameters: str, terms: Mapping[str, str]) -> Measure:
    """The objective, and formulas beside it, as a trace is asked to see them. Raises UnrollError E404; SpecError E1xx for a formula."""
    check_form(at, "at=")
    if parameters not in ("given", "layers"):
        raise UnrollError("E404", f"there are no parameters '{parameters}'", hint="parameters= is given or layers")
    for name in terms:
        if name in problem.terms or name == "total":
            raise UnrollError("E404", f"'{name}' is a term of the objective", hint="give the formula another name")
    known = {p: s for p in step.learned if (s := _as_parameter(p)) is not None}
    chosen = _stand_ins(step, known) if parameters == "layers" else {}
    names = {**problem.scope.names, **{s.name: s for s in known.values() if s.name not in problem.scope.names}}
    scope = replace(problem.scope, names=names)
    formulas = {name: parse_matrix(written, scope) for name, written in terms.items()}
    for name, e in formulas.items():
        if not e.is_scalar:
            raise UnrollError("E404", f"the formula '{name}' is not a number: {terms[name]}")
    found = {name: seen(_owned(e, chosen, known), problem, at) for name, e in {**problem.terms, **formulas}.items()}
    used = {s for e in found.values() for s in e.symbols}
    reads = tuple(p for p, s in known.items() if s in used)
    inner = replace(problem, terms=found, parameters=(*problem.parameters, *(known[p] for p in reads)))
    return Measure(inner, {s.name: p.name for s, p in chosen.items() if p in reads}, reads)


def check_form(form: str, option: str) -> None:
    """Raises UnrollError E404 where terms cannot be taken at this form of the variables."""
    if form not in ("iterate", *NORMS):
        raise UnrollError("E404", f"terms cannot be taken at '{form}'", hint=f"{option} is iterate, {', '.join(NORMS)}")


def _as_parameter(p: Learned) -> Sym | None:
    """A learned matrix or vector as a symbol that formulas of an objective may read."""
    s = p.symbol
    return symbol(s.name, s.nrows, s.ncols, "parameter", s.rank, s.family) if isinstance(s, Sym) else None


def _stand_ins(step: Step, known: Mapping[Learned, Sym]) -> dict[Sym, Learned]:
    """What takes the place of a whole parameter of the problem; what does so on the way out only does not count.

    Where several do, none is chosen: the objective is not about one of them.
    """
    found: dict[Sym, list[Learned]] = {}
    for p in known:
        of = p.replaces.of if isinstance(p.replaces, Member) else p.replaces
        if isinstance(of, Sym) and of.role == "parameter" and p.where != "output":
            found.setdefault(of, []).append(p)
    return {s: ps[0] for s, ps in found.items() if len(ps) == 1}


def _owned(e: Expr, chosen: Mapping[Sym, Learned], known: Mapping[Learned, Sym]) -> Expr:
    def rule(x: Expr) -> Expr | None:
        match x:
            case Member(of, index) if of in chosen:
                return member(known[chosen[of]], index)
            case Sym() if x in chosen:
                return known[chosen[x]]
            case _:
                return None

    return transform(e, rule) if chosen else e


def seen(e: Expr, problem: Problem, at: str) -> Expr:
    """e at the normalised columns of every variable."""
    if at == "iterate":
        return e
    return substitute(e, {z: normalise(at, 0, EPS, z) for z in problem.variables if z.rank > 0})


def is_constraint(e: Expr) -> bool:
    """0 or infinite: no term whose changes can be added up."""
    return any(isinstance(x, Indicator) for x in walk(e))


@dataclass(frozen=True)
class Trace:
    """What a network did, block by block, and what that did to the objective; worked out when asked for.

    iterates[z]: layers + 1 tensors, the start first.  steps[z]: the same with what every block of a layer left in between.
    blocks: names of the parts of a layer; one, "step", where a layer has one part.
    terms[name]: (layers + 1, ...) values.  entering[name], leaving[name]: (steps, ...), a term of what a step takes and of what it
    leaves, both by the parameters of that step's layer; terms have those of the layer before, and the first layer's at the start. Papers
    that plot a layer's rate by its own matrices plot `entering`.  predicted[name], actual[name]: (steps, ...), the change of a term in each step to first
    order, and the change that came.  cosine[name]: of the step and the gradient of the term, 0 where either is 0.
    zeros[z]: (layers + 1, ...), the share of entries that are zero.  maps: the values of every softmax in the layers.
    own: parameters of the objective in whose place the terms of each step have those of its layer.
    left[z]: what each step left, where the next one does not take just that.
    """

    steps: dict[str, list[Tensor]]
    blocks: tuple[str, ...]
    evaluate: Callable[[dict[str, Tensor], str, int], dict[str, Tensor]] = field(repr=False)
    """(values, place in words, layer from 0) -> every term."""
    replay: Callable[[int | None], tuple[AttentionMap, ...]] = field(repr=False)
    own: dict[str, str] = field(default_factory=dict[str, str])
    by_layer: bool = False
    """Do the terms read parameters of the layers?"""
    left: Mapping[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])

    @property
    def iterates(self) -> dict[str, list[Tensor]]:
        return {name: found[:: len(self.blocks)] for name, found in self.steps.items()}

    @property
    def labels(self) -> tuple[tuple[int, str], ...]:
        """(layer, block) of every step, layers from 1."""
        count = len(next(iter(self.steps.values()))) - 1
        return tuple((k // len(self.blocks) + 1, self.blocks[k % len(self.blocks)]) for k in range(count))

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        return {name: value[:: len(self.blocks)] for name, value in self.all_terms.items()}

    @cached_property
    def all_terms(self) -> dict[str, Tensor]:
        """Every term at the start and after every step: (steps + 1, ...), by the parameters of the layer that left it."""
        return _stacked(
            [self._before[0], *self._after] if self.labels else [self.evaluate(self._at(0), self._place(0), 0)]
        )

    @cached_property
    def entering(self) -> dict[str, Tensor]:
        """Every term of what enters each step, by the parameters of the step's own layer: (steps, ...)."""
        return _stacked(self._before)

    @cached_property
    def leaving(self) -> dict[str, Tensor]:
        """Every term of what each step leaves, by the parameters of the step's own layer: (steps, ...)."""
        return _stacked(self._after)

    @cached_property
    def actual(self) -> dict[str, Tensor]:
        return {name: self.leaving[name] - self.entering[name] for name in self.leaving}

    @property
    def predicted(self) -> dict[str, Tensor]:
        """<gradient of the term at the state before, what the step added>, by autograd on the objective."""
        return self._first_order[0]

    @property
    def cosine(self) -> dict[str, Tensor]:
        return self._first_order[1]

    @property
    def zeros(self) -> dict[str, Tensor]:
        return {name: value[:: len(self.blocks)] for name, value in self.all_zeros.items()}

    @cached_property
    def all_zeros(self) -> dict[str, Tensor]:
        """At the start and after every step: (steps + 1, ...)."""
        kept = next(iter(self.all_terms.values())).ndim - 1

        def share(z: Tensor) -> Tensor:
            return (z == 0).to(z.dtype).flatten(kept).mean(-1) if z.ndim > kept else (z == 0).to(z.dtype)

        return {name: torch.stack([share(z) for z in found]) for name, found in self.steps.items()}

    @cached_property
    def maps(self) -> tuple[AttentionMap, ...]:
        """Every softmax of every step, worked out from the step as it was derived, in the network's own precision: for a few samples."""
        return self.replay(None)

    def maps_of(self, layer: int) -> tuple[AttentionMap, ...]:
        """Those of one layer (from 1, or from the last: -1), and nothing else. Raises UnrollError E404."""
        return self.replay(self._layer(layer))

    def step_of(self, layer: int, block: str | None = None) -> int:
        """Where in `steps` stands what a layer, or a block of it, left. Raises UnrollError E404."""
        if block is not None and block not in self.blocks:
            raise UnrollError("E404", f"a layer has no block '{block}'", hint=f"its blocks: {', '.join(self.blocks)}")
        within = len(self.blocks) if block is None else self.blocks.index(block) + 1
        return self._layer(layer) * len(self.blocks) + within

    def _layer(self, layer: int) -> int:
        """From 0."""
        count = len(self.labels) // len(self.blocks)
        if type(layer) is not int or not (1 <= layer <= count or -count <= layer <= -1):
            raise UnrollError("E404", f"there is no layer {layer!r}", hint=f"layers are 1 to {count}; -1 is the last")
        return layer - 1 if layer > 0 else layer + count

    # Values of the terms.

    def _at(self, k: int) -> dict[str, Tensor]:
        return {name: found[k] for name, found in self.steps.items()}

    def _left(self, k: int) -> dict[str, Tensor]:
        return {name: found[k] for name, found in self.left.items()} if self.left else self._at(k + 1)

    def _place(self, k: int) -> str:
        return "before the first layer" if k == 0 else f"after {self.labels[k - 1][1]} of layer {self.labels[k - 1][0]}"

    @cached_property
    def _after(self) -> list[dict[str, Tensor]]:
        """After every step, by the parameters of its layer."""
        return [self.evaluate(self._left(k), self._place(k + 1), layer - 1) for k, (layer, _) in enumerate(self.labels)]

    @cached_property
    def _before(self) -> list[dict[str, Tensor]]:
        """Before every step, by the parameters of its layer; what is known already is not worked out again."""
        out: list[dict[str, Tensor]] = []
        for k, (layer, _) in enumerate(self.labels):
            known = k > 0 and not self.left and (not self.by_layer or self.labels[k - 1][0] == layer)
            out.append(self._after[k - 1] if known else self.evaluate(self._at(k), self._place(k), layer - 1))
        return out

    @cached_property
    def _first_order(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(predicted, cosine) of every term in every step."""
        rows = [self._slopes(k) for k in range(len(self.labels))]
        return _stacked([r[0] for r in rows]), _stacked([r[1] for r in rows])

    def _slopes(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        before, after = self._at(k), self._left(k)
        with torch.enable_grad():
            at = {name: z.detach().requires_grad_() for name, z in before.items()}
            values = self.evaluate(at, self._place(k), self.labels[k][0] - 1)
            moves = {name: (after[name] - before[name]).detach() for name in at}
            inner: dict[str, Tensor] = {}
            cosine: dict[str, Tensor] = {}
            for term, value in values.items():
                slopes = _gradients(value, list(at.values()))
                pairs = [(g.flatten(value.ndim), moves[n].flatten(value.ndim)) for g, n in zip(slopes, at, strict=True)]
                inner[term] = _sum((g * m).sum(-1) for g, m in pairs)
                size = _sum(g.square().sum(-1) for g, _ in pairs) * _sum(m.square().sum(-1) for _, m in pairs)
                cosine[term] = torch.where(size > 0, inner[term] / size.sqrt().where(size > 0, 1), 0.0)
        return inner, cosine


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name] for r in rows]) for name in rows[0]} if rows else {}


def _gradients(value: Tensor, at: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(z) for z in at]
    return list(torch.autograd.grad(value.sum(), at, retain_graph=True, materialize_grads=True, allow_unused=True))


def _sum(values: Any) -> Tensor:
    return sum(values)  # type: ignore[return-value]
