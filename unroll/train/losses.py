"""What training minimises: one record per loss, and weights over layers.

A network is seen here only through `Net`: call it, ask for its iterates, ask for the value of its objective.
Legend: B batch, T tokens, K classes, N patches, P entries of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from unroll.errors import SpecError, did_you_mean, quote
from unroll.spec.schema import Declared, Train
from unroll.train.metrics import flat, nmse
from unroll.train.samples import Split, Tensors


class Net(Protocol):
    """What training needs of a network; a compiled `Network` is one, and so is any module with these members.

    A model needs no `objective`; its `learned` is what its layers learn. Labels ask of it an answer of (B, K) or
    (B, T, K); hidden patches ask for (predicted (B, N, P), mask (B, N) with True where hidden), for `patches`, and for
    `mask` as an argument.
    """

    layers: int

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def variables(self) -> tuple[str, ...]: ...
    @property
    def given(self) -> Mapping[str, Tensor]: ...  # values of the problem's parameters
    @property
    def learned(
        self,
    ) -> tuple[Any, ...]: ...  # one with .kind, "matrix", "vector" or "scalar", for each parameter, in their order
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
    """value(net, batch, answer, settings) -> scalar.

    by_layer: the answer is variables by name, and there is one after each layer; else it is what the network returns.
    needs: what the batch must hold beside inputs, "" if nothing.
    misfit(samples, answer, most): why the answer to a few samples cannot be compared with them, "" if it can; most: the
    highest label of all samples, -1 without labels.
    mixes: does it know labels in shares, `batch.mixed`?  weight: how much counts in a batch, where the value is a mean of that.
    """

    name: str
    by_layer: bool
    needs: Literal["", "targets", "labels"]
    value: Callable[[Net, Split, Any, Train], Tensor]
    misfit: Callable[[Split, Any, int], str]
    mixes: bool = False
    weight: Callable[[Split], float] | None = None


def arguments(net: Net, inputs: Tensors) -> list[Tensor]:
    """The inputs in the order in which the network takes them."""
    return [inputs[name] for name in net.inputs]


def run(net: Net, inputs: Tensors, **more: Any) -> Tensors:
    """The network's answer by variable: {name: (B, ...)}. more: `layers`, where its depth is free."""
    return _named(net, net(*arguments(net, inputs), **more))


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


def _objective(net: Net, batch: Split, z: Tensors, settings: Train) -> Tensor:
    """mean over samples of F(z): needs no target."""
    del settings
    return objective(net, batch.inputs, z).mean()


def known(z: Tensors, targets: Tensors) -> Tensors:
    """Of an answer the variables that have targets, and `L @ R.T` of two: others are the network's own, such as a residual that it carries along."""
    return {name: _of_answer(z, name) for name in targets}


def _of_answer(z: Tensors, name: str) -> Tensor:
    """A variable (B, ...), or the product L R' of two factors as an input is stored: (B, n, m), of L (B, r, m) and R (B, r, n)."""
    left, product, right = name.partition(" @ ")
    return z[right.removesuffix(".T")].mT @ z[left] if product else z[name]


def _mse(net: Net, batch: Split, z: Tensors, settings: Train) -> Tensor:
    """mean over samples and entries of (z − target)²."""
    del net, settings
    return (flat(known(z, batch.targets)) - flat(batch.targets)).square().mean()


def _nmse(net: Net, batch: Split, z: Tensors, settings: Train) -> Tensor:
    """Σ‖z − target‖² / Σ‖target‖² over the batch: its gradient does not depend on the scale of the data."""
    del net, settings
    return nmse(flat(known(z, batch.targets)), flat(batch.targets))


def _cross_entropy(net: Net, batch: Split, logits: Tensor, settings: Train) -> Tensor:
    """mean over labels y ≥ 0 of −Σₖ qₖ log softmax(logits)ₖ, q = (1 − s)·[k = y] + s/K with s = label_smoothing; 0 if there are none."""
    del net
    assert batch.labels is not None
    if batch.mixed is None:
        return cross_entropy(logits, batch.labels, settings.label_smoothing) / (batch.labels >= 0).sum().clamp_min(1)
    other, share = batch.mixed  # −Σ (s·q + (1 − s)·q')ₖ log pₖ
    value = weight = torch.zeros(()).to(logits)
    for labels, s in ((batch.labels, share.to(logits)), (other, 1 - share.to(logits))):
        each = nn.functional.cross_entropy(
            logits, labels.clamp_min(-1), reduction="none", ignore_index=-1, label_smoothing=settings.label_smoothing
        )
        value, weight = value + (s * each).sum(), weight + (s * (labels >= 0)).sum()
    return value / torch.where(weight > 0, weight, 1)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum over labels that are not below 0."""
    rows, known = logits.flatten(0, -2), labels.flatten().clamp_min(-1)
    return nn.functional.cross_entropy(rows, known, reduction="sum", ignore_index=-1, label_smoothing=smoothing)


def _masked_mse(net: Net, batch: Split, answer: tuple[Tensor, Tensor], settings: Train) -> Tensor:
    """mean over hidden patches and their entries of (predicted − patch)². nan if nothing is hidden.

    Source: He, Chen, Xie, Li, Dollár & Girshick 2022, arXiv:2111.06377, section 3.
    """
    del settings
    predicted, mask = answer
    return torch.where(mask, patch_errors(net, batch, predicted), 0).sum() / mask.sum()


def patch_errors(net: Net, batch: Split, predicted: Tensor) -> Tensor:
    """mean over entries of (predicted − patch)²: (B, N). predicted: (B, N, P), or what broadcasts to it."""
    return (predicted - cast(Any, net).patches(*arguments(net, batch.inputs))).square().mean(-1)


def _fits(samples: Split, answer: Any, most: int) -> str:
    """Codes have the shape of their variable: the network saw to it."""
    del samples, answer, most
    return ""


def _no_logits(samples: Split, answer: Any, most: int) -> str:
    assert samples.labels is not None
    if not isinstance(answer, Tensor):
        return f"cross_entropy needs one tensor of logits, the network answers with {_kind(answer)}"
    labels = samples.labels
    if answer.ndim != labels.ndim + 1 or answer.shape[1:-1] != labels.shape[1:]:
        shapes = [tuple(v.shape[1:]) for v in (labels, answer)]
        return f"per sample the labels are {shapes[0]} and the answer is {shapes[1]}, not {(*shapes[0], 'classes')}"
    known = answer.shape[-1]
    return "" if most < known else f"labels go up to {most}, the network tells {known} classes apart: 0 to {known - 1}"


def _no_patches(samples: Split, answer: Any, most: int) -> str:
    del samples, most
    pair = isinstance(answer, tuple) and len(cast("tuple[Any, ...]", answer)) == 2
    if not pair or not all(isinstance(v, Tensor) for v in answer) or answer[1].dtype != torch.bool:
        return f"masked_mse needs (predicted patches, mask), the network answers with {_kind(answer)}"
    predicted, mask = answer
    if predicted.ndim != 3 or mask.shape != predicted.shape[:2]:
        return f"the mask is {tuple(mask.shape)}, predicted patches are {tuple(predicted.shape)}"
    return "" if mask.any() else "no patch is hidden in training, so there is nothing to learn from"


def _kind(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    return f"{len(answer)} values" if isinstance(answer, tuple | list | Mapping) else type(answer).__name__


def _labelled(batch: Split) -> float:
    assert batch.labels is not None
    if batch.mixed is None:
        return float((batch.labels >= 0).sum())
    other, share = batch.mixed
    return float((share * (batch.labels >= 0) + (1 - share) * (other >= 0)).sum())


DECLARED = "{objective: ..}"
"""The name of a loss that is declared."""
LOSSES: tuple[Loss, ...] = (
    Loss("objective", True, "", _objective, _fits, weight=len),
    Loss("mse", True, "targets", _mse, _fits, weight=len),
    Loss("nmse", True, "targets", _nmse, _fits),
    Loss("cross_entropy", False, "labels", _cross_entropy, _no_logits, mixes=True, weight=_labelled),
    Loss("masked_mse", False, "", _masked_mse, _no_patches, weight=len),
)


def _of_a_batch(net: Net, batch: Split, answer: Any, settings: Train) -> Tensor:
    raise AssertionError("internal error, please report: a declared loss is of all views of a batch")


def find_loss(name: str | Declared) -> Loss:
    """The record of a loss. Raises SpecError E511."""
    if isinstance(name, Declared):
        needs = "labels" if any(taken.of == "labels" for taken in name.takes.values()) else ""
        return Loss(DECLARED, False, needs, _of_a_batch, _fits)
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


def total(loss: Loss, net: Net, batch: Split, weights: Sequence[float], settings: Train) -> Tensor:
    """Σ_k w_k loss(iterate k), k = 1 .. len(weights): a shorter list of weights trains a shallower network.

    A loss that is not by layer sees the network's answer, which weights that are 0 but for the last stand for.
    """
    last = len(weights) == net.layers and not any(weights[:-1])
    if not loss.by_layer:
        assert last, "internal error, please report: weights by layer for a loss of the answer alone"
        states = {net.layers: net(*arguments(net, batch.inputs))}
    elif last:
        states = {net.layers: run(net, batch.inputs)}
    else:
        states = dict(enumerate(iterates(net, batch.inputs)))
    with torch.autocast(next(iter(batch.inputs.values())).device.type, enabled=False):  # sums need float32
        parts = [w * loss.value(net, batch, _full(states[k]), settings) for k, w in enumerate(weights, start=1) if w]
        return torch.stack(parts).sum()


def _full(answer: Any) -> Any:
    """The same tensors, those with a fraction in float32 or better."""
    match answer:
        case Tensor():
            return answer.float() if answer.is_floating_point() and answer.dtype != torch.float64 else answer
        case Mapping():
            return {name: _full(z) for name, z in cast("Mapping[str, Tensor]", answer).items()}
        case _:
            return tuple(_full(z) for z in answer)


def module(net: Net) -> nn.Module:
    """The network as the nn.Module that it is."""
    assert isinstance(net, nn.Module), "internal error, please report: a network that is no nn.Module"
    return net
