"""A step run as it is written, assignment by assignment: the slow twin of the emitted module, for what only it can see.

Values are in mathematical layout, (..., rows, cols), a family (K, ..., rows, cols).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, Protocol, cast

import sympy as sp
import torch
from torch import Tensor

from unroll.derivation.step import LAYER, Assign, Learned, Step
from unroll.emit.axes import axes_of, stored_axes
from unroll.language.nodes import Expr, FamilySoftmax, FamilySum, Softmax, Sym, free_indices, walk
from unroll.language.problem import Problem
from unroll.network.evaluate import Evaluator

Names = set[Sym | sp.Symbol]
"""Of tensors and of numbers."""


class Holder(Protocol):
    """What holds the parameters of a network."""

    def get_parameter(self, target: str, /) -> torch.nn.Parameter: ...


# --- layouts ----------------------------------------------------------------------------------------------------------


def as_matrix(value: Tensor, s: Sym) -> Tensor:
    """A tensor as a network takes it -> (family, rows, cols) as in formulas."""
    if s.rank == 2 and s.role == "learned" and s.nrows == 1:
        return value.unsqueeze(-2)
    if s.rank == 2:
        return value if s.role == "learned" or s.as_written else value.mT
    return value.unsqueeze(-1) if s.rank == 1 else value[..., None, None]


def as_stored(value: Tensor, s: Sym) -> Tensor:
    """The inverse of `as_matrix`, of a variable."""
    return (
        value
        if s.rank == 2 and s.as_written
        else value.mT
        if s.rank == 2
        else value.squeeze(-1)
        if s.rank == 1
        else value[..., 0, 0]
    )


def learned_value(net: Holder, words: Mapping[tuple[str, str], str], p: Learned, layer: int) -> Tensor:
    """The value of a parameter in a layer (from 0), its constraint applied; after all that have their own, that of the last."""
    stored = net.get_parameter(words["learned", p.name]).detach()
    value = stored[min(layer, len(stored) - 1)] if p.per_layer else stored
    match p.constraint:
        case "none":
            return value
        case "positive":
            return torch.nn.functional.softplus(value)
        case "symmetric":
            return (value + value.mT) / 2
        case "unit_columns":
            return torch.nn.functional.normalize(value, dim=p.column_axis)
        case "exp":
            return value.exp()
        case "sigmoid":
            return p.limits[0] + (p.limits[1] - p.limits[0]) * torch.sigmoid(value)
        case "clamp":
            return value.clamp(*p.limits)
        case "rising":
            return rising(p, value)


def rising(p: Learned, value: Tensor) -> Tensor:
    """Values of a function, none of them below the one before it, or above it by more than the limit."""
    assert p.grid is not None
    out = [torch.zeros_like(value[..., 0]) if p.grid.odd else value[..., 0]]
    before = torch.cat([torch.zeros_like(value[..., :1]), value], -1) if p.grid.odd else value
    for k in range(before.shape[-1] - 1):
        out.append(out[-1] + (before[..., k + 1] - before[..., k]).clamp(*p.limits))
    return torch.stack(out[1:] if p.grid.odd else out, -1)


class State:
    """Values of symbols while a step is run by hand."""

    def __init__(
        self, values: dict[Sym, Tensor], numbers: dict[sp.Symbol, Any], dtype: torch.dtype = torch.float64
    ) -> None:
        self.values, self.numbers, self.dtype = values, numbers, dtype

    def assign(self, a: Assign) -> None:
        if isinstance(a.value, Expr):
            value: Any = Evaluator(self.values, self.numbers, {}, self.dtype)(a.value)
        else:
            value = _number(a.value, self.numbers)
        if isinstance(a.target, Sym):
            whole = isinstance(value, Tensor)
            self.values[a.target] = value if whole else torch.as_tensor(float(value), dtype=self.dtype)
        else:
            self.numbers[a.target] = value

    def put(self, p: Learned, value: Tensor) -> None:
        if isinstance(p.symbol, Sym):
            self.values[p.symbol] = as_matrix(value, p.symbol)
        else:
            value = value[None] if p.across else value
            self.numbers[p.symbol] = value.reshape(*value.shape, *[1] * (2 - value.ndim)) if value.ndim else value


def _number(value: sp.Expr, numbers: dict[sp.Symbol, Any]) -> Any:
    symbols = sorted(value.free_symbols, key=str)
    if not symbols:
        return float(value)
    if any(isinstance(numbers[s], Tensor) for s in symbols):  # type: ignore[index]
        return Evaluator({}, numbers, {}).number(value)
    return sp.lambdify(symbols, value, modules=["math"])(*(numbers[s] for s in symbols))  # type: ignore[index]


# --- attention maps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionMap:
    """The values of one softmax within a layer (from 1).

    over "tokens": weights (..., K, N, M), row i of head k says how much token i takes from each of M, and sums to 1.
    over "members": (..., K, rows, cols), the share of each member of a family, which sum to 1 over K.
    K is 1 outside a family.
    """

    layer: int
    block: str
    over: Literal["tokens", "members"]
    weights: Tensor


@dataclass(frozen=True)
class Replay:
    """What is needed to run a network's step by hand. parameters, inputs: as stored.  steps[z]: what every block left."""

    problem: Problem
    step: Step
    net: Holder
    words: Mapping[tuple[str, str], str]
    parameters: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    scalars: Mapping[str, float]
    steps: Mapping[str, list[Tensor]]

    def maps(self, layer: int | None = None) -> Iterator[AttentionMap]:
        """Every softmax in a layer (from 0; None: in all), at the values that the network's own blocks left, in their precision.

        Only what these softmaxes read is worked out. Padding has no share: a padded batch is its samples alone, 0 where nothing is.
        """
        masks = [s for s in self.problem.inputs if "mask" in s.props and s.name in self.inputs]
        if all(bool(self.inputs[s.name].all()) for s in masks):
            yield from (m for m, _ in self._maps(layer))
            return
        lead = self._lead()
        alone = [self._alone(place, masks, lead) for place in product(*map(range, lead))]
        for parts in zip(*(list(replay._maps(layer)) for replay, _ in alone), strict=True):
            whole = torch.stack([_placed(m.weights, shape, there) for (m, shape), (_, there) in zip(parts, alone, strict=True)])  # fmt: skip
            yield replace(parts[0][0], weights=whole.unflatten(0, lead))

    def _lead(self) -> torch.Size:
        """The batch axes."""
        s = self.problem.variables[0]
        x = self.steps[s.name][0]
        return x.shape[: x.ndim - len(stored_axes(s))]

    def _alone(
        self, place: tuple[int, ...], masks: list[Sym], lead: torch.Size
    ) -> tuple[Replay, dict[sp.Expr, Tensor]]:
        """One sample without its padding, and by size which of its columns are there."""
        own = lambda s, x: x[place] if x.ndim > len(stored_axes(s)) else x
        there = {s.nrows: own(s, self.inputs[s.name].expand(*lead, -1)) != 0 for s in masks}

        def cut(s: Sym, x: Tensor) -> Tensor:
            x = own(s, x)
            for size, marks in there.items():
                for axis in axes_of(s, cast(sp.Symbol, size)):
                    x = x.index_select(axis, marks.nonzero().flatten())
            return x

        symbols = self.problem.symbols
        inputs = {n: cut(symbols[n], x) for n, x in self.inputs.items()}
        steps = {n: [cut(symbols[n], x) for x in found] for n, found in self.steps.items()}
        return replace(self, inputs=inputs, steps=steps), there

    def _maps(self, layer: int | None) -> Iterator[tuple[AttentionMap, tuple[sp.Expr, sp.Expr]]]:
        """The maps, and the sizes of their rows and columns, where nothing is padding."""
        blocks = self.step.blocks or ("step",)
        count = len(next(iter(self.steps.values()))) - 1
        runs = [
            (
                *divmod(k, len(blocks)),
                [a for a in self.step.assigns if not a.block or a.block == blocks[k % len(blocks)]],
            )
            for k in range(count)
        ]
        seen = [layer in (None, run[0]) for run in runs]
        opening, read = self._read([run[2] for run in runs], seen)
        with torch.device(next(iter(self.steps.values()))[0].device):
            state = self._opening(opening)
            for k, (at, block, assigns) in enumerate(runs):
                self._enter(state, k, at)
                for a, needed in zip(assigns, read[k], strict=True):
                    for node in _softmaxes(a.value) if seen[k] else ():
                        turned = isinstance(node, Softmax) and node.axis == 0
                        shape = (node.cols, node.rows) if turned else (node.rows, node.cols)
                        yield AttentionMap(at + 1, blocks[block], *self._weights(node, state)), shape
                    if needed:
                        state.assign(a)

    def _read(self, runs: list[list[Assign]], seen: list[bool]) -> tuple[Names, list[list[bool]]]:
        """(what the softmaxes of the runs that are seen read from before the first layer, whether each assignment is needed)."""
        given = {*self.step.output, *(p.symbol for p in self.step.learned)}
        names: Names = set()
        needed: list[list[bool]] = []
        for assigns, wanted in zip(reversed(runs), reversed(seen), strict=True):
            row: list[bool] = []
            for a in reversed(assigns):
                row.append(a.target in names)
                names = _before(a, names)
                for node in _softmaxes(a.value) if wanted else ():
                    names |= _names(node)
            names -= given
            needed.append(row[::-1])
        return names, needed[::-1]

    def _enter(self, state: State, k: int, layer: int) -> None:
        """What block k takes, and the parameters of its layer."""
        state.numbers[LAYER] = layer
        for p in self.step.learned:
            if ("learned", p.name) in self.words:
                state.put(p, learned_value(self.net, self.words, p, layer))
        for z in self.step.output:
            state.values[z] = as_matrix(self.steps[z.name][k].detach(), z)

    def _opening(self, names: Names) -> State:
        """Everything before the first layer that is read by these names."""
        p = self.problem
        values = {s: as_matrix(self.parameters[s.name].detach(), s) for s in p.parameters}
        values |= {s: self._input(s) for s in p.inputs if s.name in self.inputs}
        numbers: dict[sp.Symbol, Any] = {s: self.scalars[s.name] for s in p.scalars}
        like = next(iter(self.steps.values()))[0]
        state = State(values, numbers | self._sizes(), like.dtype)
        for q in self.step.learned:  # of the start, too
            if not q.per_layer and ("learned", q.name) in self.words:
                state.put(q, learned_value(self.net, self.words, q, 0))
        said = [*self.step.definitions, *(Assign(s.symbol, s.start, "") for s in self.step.states)]
        row: list[bool] = []
        for a in reversed(said):
            row.append(a.target in names)
            names = _before(a, names)
        for a, needed in zip(said, row[::-1], strict=True):
            if needed:
                state.assign(a)
        return state

    def _input(self, s: Sym) -> Tensor:
        """In mathematical layout; the axis of a family goes before those of the batch."""
        value = as_matrix(self.inputs[s.name].detach(), s)
        return value if s.family is None else value.movedim(-3, 0)

    def _sizes(self) -> dict[sp.Symbol, int]:
        known = {d: n for d, n in self.problem.dims.items() if isinstance(n, int)}
        held = {**self.inputs, **{name: found[0] for name, found in self.steps.items()}}
        for s in (*self.problem.inputs, *self.problem.variables):
            if s.name in held and s.rank > 0:
                value = as_matrix(held[s.name], s)
                for n, size in zip(s.shape, value.shape[-2:], strict=True):
                    known |= {n: int(size)} if isinstance(n, sp.Symbol) else {}
        return known

    def _weights(self, node: Softmax | FamilySoftmax, state: State) -> tuple[Literal["tokens", "members"], Tensor]:
        sizes = {index: n for a in self.step.assigns for index, n in _families(a.value)}
        free = sorted(free_indices(node) | ({node.index} if isinstance(node, FamilySoftmax) else set()))
        counts = [Evaluator({}, state.numbers, {}).size(sizes[i]) for i in free]
        places = (
            torch.cartesian_prod(*(torch.arange(n) for n in counts)).reshape(-1, len(free)).tolist() if free else [[]]
        )
        found = [
            Evaluator(state.values, state.numbers, dict(zip(free, place, strict=True)), state.dtype)(node)
            for place in places
        ]
        weights = torch.stack(torch.broadcast_tensors(*found), -3)
        if isinstance(node, FamilySoftmax):
            return "members", weights
        return "tokens", weights.mT if node.axis == 0 else weights


def _names(value: Expr | sp.Expr) -> Names:
    """What a formula reads."""
    if isinstance(value, Expr):
        return {*value.symbols, *value.scalars}
    return {s for s in value.free_symbols if isinstance(s, sp.Symbol)}


def _before(a: Assign, names: Names) -> Names:
    """What has to be known before an assignment so that these are known after it."""
    return (names - {a.target}) | _names(a.value) if a.target in names else names


def _placed(weights: Tensor, shape: tuple[sp.Expr, sp.Expr], there: Mapping[sp.Expr, Tensor]) -> Tensor:
    """(..., rows, columns) of what is there -> of all, 0 elsewhere."""
    for axis, size in zip((-2, -1), shape, strict=True):
        if size in there:
            marks = there[size]
            wide = list(weights.shape)
            wide[axis] = len(marks)
            weights = weights.new_zeros(wide).index_copy(axis, marks.nonzero().flatten(), weights)
    return weights


def _softmaxes(value: Expr | sp.Expr) -> list[Softmax | FamilySoftmax]:
    """Each once, in the order in which the formula shows them."""
    found = [x for x in walk(value) if isinstance(x, Softmax | FamilySoftmax)] if isinstance(value, Expr) else []
    return list(dict.fromkeys(found))


def _families(value: Expr | sp.Expr) -> Iterator[tuple[str, sp.Expr]]:
    """(index, how many) of what adds over families."""
    for x in walk(value) if isinstance(value, Expr) else ():
        if isinstance(x, FamilySum | FamilySoftmax):
            yield x.index, x.size
