"""What training minimises: one record per loss, and weights over layers.

A network is seen here only through `Net`: call it, ask for its iterates, ask for the value of its objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from unroll.errors import SpecError, did_you_mean, quote
from unroll.train.data import Tensors
from unroll.train.metrics import flat, nmse


class Net(Protocol):
    """What training needs of a network; a compiled `Network` is one, and so is any module with these members."""

    layers: int

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def variables(self) -> tuple[str, ...]: ...
    @property
    def learned(
        self,
    ) -> tuple[Any, ...]: ...  # one with .kind, "matrix" or "scalar", for each parameter, in their order
    def __call__(self, *args: Tensor, **start: Tensor) -> Any: ...
    def trace(self, *args: Tensor, **start: Tensor) -> Any: ...
    def objective(self, *args: Tensor, **values: Tensor) -> Mapping[str, Tensor]: ...


Status = Literal["done", "time", "patience", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """What a training came to. best: the lowest held-out loss; seconds: over all sessions."""

    status: Status
    steps: int
    seconds: float
    best: float


@dataclass(frozen=True)
class Loss:
    """value(net, inputs, z, target) -> scalar. supervised: it needs a target for every variable."""

    name: str
    supervised: bool
    value: Callable[[Net, Tensors, Tensors, Tensors], Tensor]


def arguments(net: Net, inputs: Tensors) -> list[Tensor]:
    """The inputs in the order in which the network takes them."""
    return [inputs[name] for name in net.inputs]


def run(net: Net, inputs: Tensors) -> Tensors:
    """The network's answer by variable: {name: (B, ...)}."""
    return _named(net, net(*arguments(net, inputs)))


def iterates(net: Net, inputs: Tensors) -> list[Tensors]:
    """All iterates, the start first: layers + 1 mappings {name: (B, ...)}, with gradients."""
    found = net.trace(*arguments(net, inputs)).iterates
    return [{name: found[name][k] for name in net.variables} for k in range(net.layers + 1)]


def objective(net: Net, inputs: Tensors, z: Tensors) -> Tensor:
    """The total of the objective for every sample: (B,)."""
    return net.objective(*arguments(net, inputs), **z)["total"]


def _named(net: Net, answer: Any) -> Tensors:
    if isinstance(answer, Tensor):
        return {net.variables[0]: answer}
    if isinstance(answer, Mapping):
        return dict(cast("Mapping[str, Tensor]", answer))
    return dict(zip(net.variables, answer, strict=True))


def _objective(net: Net, inputs: Tensors, z: Tensors, target: Tensors) -> Tensor:
    """mean over samples of F(z): needs no target."""
    del target
    return objective(net, inputs, z).mean()


def _mse(net: Net, inputs: Tensors, z: Tensors, target: Tensors) -> Tensor:
    """mean over samples and entries of (z − target)²."""
    del net, inputs
    return (flat(z) - flat(target)).square().mean()


def _nmse(net: Net, inputs: Tensors, z: Tensors, target: Tensors) -> Tensor:
    """Σ‖z − target‖² / Σ‖target‖² over the batch: its gradient does not depend on the scale of the data."""
    del net, inputs
    return nmse(flat(z), flat(target))


LOSSES: tuple[Loss, ...] = (
    Loss("objective", False, _objective),
    Loss("mse", True, _mse),
    Loss("nmse", True, _nmse),
)


def find_loss(name: str) -> Loss:
    """The record of a loss. Raises SpecError E511."""
    for record in LOSSES:
        if record.name == name:
            return record
    names = [record.name for record in LOSSES]
    hint = did_you_mean(name, names) or f"there are {', '.join(names)}"
    raise SpecError("E511", f"train: there is no loss '{quote(name)}'", hint=hint)


def layer_weights(given: str | Sequence[float], layers: int) -> tuple[float, ...]:
    """Weights of the loss of iterates 1 .. layers, summing to 1.

    last: 0 but for the last; uniform: 1/layers each; linear: growing as 1, 2, .., layers; or a list of numbers.
    Raises SpecError E511.
    """
    match given:
        case "last":
            raw = [0.0] * (layers - 1) + [1.0]
        case "uniform":
            raw = [1.0] * layers
        case "linear":
            raw = [float(k) for k in range(1, layers + 1)]
        case str():
            hint = did_you_mean(given, ["last", "uniform", "linear"])
            raise SpecError("E511", f"train: layer_weights: '{quote(given)}' is not last, uniform or linear", hint=hint)
        case _:
            raw = [float(w) for w in given]
    if len(raw) != layers or min(raw) < 0 or sum(raw) <= 0:
        message = f"train: layer_weights: {len(raw)} numbers for {layers} layers; all >= 0 and not all zero are needed"
        raise SpecError("E511", message)
    return tuple(w / sum(raw) for w in raw)


def total(loss: Loss, net: Net, inputs: Tensors, target: Tensors, weights: Sequence[float]) -> Tensor:
    """Σ_k w_k loss(iterate k), k = 1 .. len(weights): a shorter list of weights trains a shallower network."""
    if len(weights) == net.layers and not any(weights[:-1]):
        states = {net.layers: run(net, inputs)}
    else:
        states = dict(enumerate(iterates(net, inputs)))
    with torch.autocast(next(iter(inputs.values())).device.type, enabled=False):  # sums of squares need float32
        parts = [
            w * loss.value(net, inputs, {name: _full(z) for name, z in states[k].items()}, target)
            for k, w in enumerate(weights, start=1)
            if w
        ]
        return torch.stack(parts).sum()


def _full(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def module(net: Net) -> nn.Module:
    """The network as the nn.Module that it is."""
    assert isinstance(net, nn.Module), "internal error, please report: a network that is no nn.Module"
    return net
