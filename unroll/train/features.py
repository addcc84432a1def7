"""What a network makes of a sample for others to read, and how much room that takes.

Legend: B samples, N tokens, d numbers of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unroll.model.module import Model
from unroll.spec.schema import PooledHead
from unroll.train import losses
from unroll.train.losses import Net
from unroll.train.samples import Held, Split, Tensors
from unroll.train.table import evaluating

SHARE = 0.01
"""Singular values below this share of the largest do not count."""
ALIKE = 0.99
"""The mean square of the cosine with one direction from which on samples are said to be alike."""
At = Literal["features", "answer"]


# --- what is read -----------------------------------------------------------------------------------------------------


def answer(net: Net, inputs: Tensors) -> Tensor:
    """What the network answers, one row per sample: (B, d). The mean over tokens, where there are any; codes side by side."""
    return one_row(net(*losses.arguments(net, inputs)))


def features(net: Net, inputs: Tensors) -> Tensor:
    """What the linear map of the head reads: (B, d), the mean over tokens where it reads several.

    Without such a map: of a model with a decoder, or whose words are tied to its answer, the mean of the tokens as they leave the layers
    (nothing is hidden); of layers alone, the answer.
    """
    module = losses.module(net)
    if not isinstance(module, Model):
        return answer(net, inputs)
    if isinstance(head := getattr(module, "head", None), nn.Module):
        return _read_by(head, lambda: net(*losses.arguments(net, inputs)))
    if isinstance(module.wrapped.model.head, PooledHead):
        return answer(net, inputs)
    tokens = module.body(embedded(module, inputs))
    return tokens[:, int(module.wrapped.model.class_token is not None) :].mean(1)


READ: Mapping[At, Callable[[Net, Tensors], Tensor]] = {"features": features, "answer": answer}


def _read_by(part: nn.Module, call: Callable[[], Any]) -> Tensor:
    kept: list[Tensor] = []
    handle = part.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        call()
    finally:
        handle.remove()
    return one_row(kept[0])


def embedded(net: Model, inputs: Tensors) -> Tensor:
    """The tokens that go into the layers; nothing is hidden."""
    x, made = inputs[net.inputs[0]], cast(Any, net)
    if net.wrapped.model.mask is None:
        return made.embedding(x)
    return made.embedding(x, torch.zeros(len(x), net.wrapped.tokens or 0, dtype=torch.bool, device=x.device))


def one_row(value: Any) -> Tensor:
    """(B, d), or the mean over tokens of (B, .., d); several values side by side."""
    if isinstance(value, Tensor):
        return value.flatten(1, -2).mean(1) if value.ndim > 2 else value
    named = cast("Mapping[str, Tensor]", value)
    values = [named[k] for k in sorted(named)] if isinstance(value, Mapping) else list(value)
    return torch.cat([one_row(v) for v in values], 1)


@torch.no_grad()
def all_of(net: Net, batches: Iterable[Split], at: At) -> tuple[Tensor, Tensor | None]:
    """Of all samples, of a network in evaluation: (n, d), float64, and their labels."""
    like = next(losses.module(net).parameters())
    with evaluating(net):
        return together((READ[at](net, batch.to(like).inputs), batch.labels) for batch in batches)


def together(rows: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Rows of several batches, float64, and their labels where all have them."""
    z, labels = zip(*rows, strict=True)
    own = [part.cpu() for part in labels if part is not None]
    return torch.cat([part.double().cpu() for part in z]), torch.cat(own) if len(own) == len(z) else None


# --- how much room it takes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """rank: of `most` singular values, those above SHARE of the largest.  rate: in nats.  first: the share of the largest in the sum of squares.

    Of features that are not finite these are nan; of no features at all, 0.
    """

    rank: float
    most: int
    rate: float
    first: float

    @property
    def collapsed(self) -> bool:
        """Are they one direction, but for a hundredth of their squares, or nothing at all?"""
        return self.most > 0 and (self.rank == 0 or self.first > ALIKE)


def room(z: Tensor, eps2: float) -> Room:
    """How much room the rows of z: (n, d) take at length one: rank, and rate 1/2 log det (I + d/(n eps2) Z'Z).

    Rows of zeros stay so, and take none.  Source of the rate: Ma, Derksen, Hong & Wright 2007, doi:10.1109/TPAMI.2007.1085.
    """
    n, d = z.shape
    if not z.numel():
        return Room(0, 0, 0.0, 0.0)
    if not bool(z.isfinite().all()):
        return Room(math.nan, min(n, d), math.nan, math.nan)
    s = torch.linalg.svdvals(unit(z.double()))
    rate = 0.5 * torch.log1p(d / (n * eps2) * s.square()).sum()
    first = s[0] ** 2 / s.square().sum() if s[0] > 0 else s[0]
    return Room(int((s > SHARE * s[0]).sum()), len(s), float(rate), float(first))


def unit(z: Tensor) -> Tensor:
    """Rows at length one, in any units; rows of zeros stay so."""
    most = z.abs().amax(-1, keepdim=True)
    return nn.functional.normalize(z / torch.where(most > 0, most, 1), dim=-1)


@torch.no_grad()
def rooms(net: Net, samples: Held, size: int, eps2: float) -> dict[str, Room]:
    """Of the tokens after each layer (as the head reads them), of what the head reads, and of the answer, in this order."""
    found: dict[str, list[Tensor]] = {}
    like, module = next(losses.module(net).parameters()), losses.module(net)
    with evaluating(net):
        for batch in samples.batches(size):
            inputs = batch.to(like).inputs
            for k, tokens in enumerate(_by_layer(module, inputs)):
                found.setdefault(f"after layer {k}", []).append(tokens)
            found.setdefault("what the head reads", []).append(features(net, inputs))
            if not hides(module):
                found.setdefault("the answer", []).append(answer(net, inputs))
    return {place: room(torch.cat(rows).double().cpu(), eps2) for place, rows in found.items()}


def hides(net: nn.Module) -> bool:
    """Does it answer with patches and a mask?"""
    return isinstance(net, Model) and net.wrapped.model.mask is not None


def _by_layer(net: nn.Module, inputs: Tensors) -> list[Tensor]:
    """The tokens after layers 0 (what goes in) .. L, one row per sample."""
    if not isinstance(net, Model):
        return []
    states: list[Tensor] = net.body.trace(embedded(net, inputs)).iterates[net.body.program.step.output[0].name]
    head, token = net.wrapped.model.head, net.wrapped.model.class_token
    if isinstance(head, PooledHead) and head.kind == "class_token":
        return [z[:, 0] for z in states]
    return [one_row(z if token is None else z[:, 1:]) for z in states]


def said(found: Mapping[str, Room]) -> str:
    """Where features have collapsed, "" if nowhere that counts: the last places in a row, up to the last of all."""
    places = list(found)
    first = next((k for k in range(len(places)) if all(found[p].collapsed for p in places[k:])), None)
    if first is None:
        return ""
    last, since = found[places[-1]], "everywhere" if first == 0 else f"from {places[first]} on"
    if last.rank == 0:
        return f"features have collapsed {since}: {places[-1]} is zero for every sample"
    same = f"{last.first:.2%} of it is one direction, for all samples"
    return f"features have collapsed {since}: {places[-1]} has rank {last.rank} of {last.most}, rate {last.rate:.3g}: {same}"
