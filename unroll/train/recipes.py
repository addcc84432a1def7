"""What papers train with beside losses and optimisers of torch: Lion, steps in parts, a weight decay that changes, layers that keep nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from unroll.errors import SpecError
from unroll.network.recomputed import recomputing
from unroll.spec.schema import Declared, Train
from unroll.train.losses import Loss
from unroll.train.samples import Split

BETAS = {"adam": (0.9, 0.999), "adamw": (0.9, 0.999), "lion": (0.9, 0.99)}
"""Of the optimisers that have them: shares of what was that the means of slopes and of their squares keep; of lion, of the step and of the mean."""


class Lion(torch.optim.Optimizer):
    """p ← p − lr (sign(β₁ m + (1 − β₁) g) + λ p), then m ← β₂ m + (1 − β₂) g; λ: weight_decay.

    Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.lerp(p.grad, m, first).sign())
                m.lerp_(p.grad, 1 - second)
        return loss


def optimizer(groups: list[dict[str, Any]], settings: Train) -> torch.optim.Optimizer:
    """The optimiser that `train:` names, of groups of parameters."""
    betas = settings.betas or BETAS.get(settings.optimizer, (0.0, 0.0))
    match settings.optimizer:
        case "adam":
            return torch.optim.Adam(groups, betas=betas, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, betas=betas, fused=True)
        case "lion":
            return Lion(groups, betas)
        case "sgd":
            return torch.optim.SGD(groups, momentum=settings.momentum)


def decay(settings: Train, share: float) -> float:
    """Weight decay after this share of the training: by a cosine from `weight_decay` to `final_weight_decay`, where that is said."""
    first, last = settings.weight_decay, settings.final_weight_decay
    if last is None:
        return first
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def in_parts(
    value: Callable[[Split], Tensor],
    weight: Callable[[Split], float],
    batch: Split,
    parts: int,
    parameters: Iterable[nn.Parameter],
) -> Tensor:
    """A number with the value and the slopes of a loss over a batch, of which one part at a time is worked out.

    value: the mean of what counts, over the samples of a part; weight: how much counts in it.
    The slopes g of the parts are summed, and the answer is the loss plus <p − p, g>: what follows sees one loss.
    """
    own = [p for p in parameters if p.requires_grad]
    slopes: dict[int, Tensor] = {}
    loss, whole, size = torch.zeros(()), weight(batch) or 1, -(-len(batch) // parts)
    for k in range(0, len(batch), size):
        part = batch[k : k + size]
        share = value(part) * (weight(part) / whole)
        for i, g in enumerate(torch.autograd.grad(share, own, allow_unused=True)):
            if cast("Tensor | None", g) is not None:
                slopes[i] = slopes[i] + g if i in slopes else g
        loss = share.detach() + loss.to(share)
    linear = torch.stack([(own[i] * g).sum() for i, g in slopes.items()]).sum()
    return loss + (linear - linear.detach())


@contextmanager
def prepared(module: nn.Module, settings: Train) -> Generator[None]:
    """Inside, layers keep nothing for the derivative, and calls are compiled, where that is asked for."""
    with ExitStack() as stack:
        if settings.checkpoint:
            stack.enter_context(recomputing(module))
        if settings.compile:
            module.compile()
            stack.callback(setattr, module, "_compiled_call_impl", None)  # as it was; torch has no word for it
        yield


def check(module: nn.Module, loss: Loss, settings: Train) -> None:
    """Raises SpecError E511 for settings that do not fit the loss or the network."""
    by_layer = loss.by_layer and (settings.stages != "end_to_end" or settings.layer_weights != "last")
    for word in ("checkpoint", "compile"):
        if getattr(settings, word) and by_layer:
            message = f"train: {word}: what each layer says is asked for, by layer_weights: or stages:"
            raise SpecError("E511", message, hint="leave one of them out")
    if settings.compile and isinstance(settings.loss, Declared):
        raise SpecError(
            "E511", "train: compile: a declared loss reads what stands within the network", hint="leave it out"
        )
    if settings.accumulate == 1:
        return
    if loss.weight is None:
        message = f"train: accumulate: loss: {loss.name} is no mean over samples, parts of a batch do not add up to it"
        raise SpecError("E511", message, hint="a larger batch:")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):  # pyright: ignore[reportPrivateUsage]
        message = "train: accumulate: the network has batch norms, which would see a part of a batch"
        raise SpecError("E511", message, hint="a larger batch:")
