"""Which parameters learn at which rate, and which of them decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from unroll.spec.schema import Rates, Train
from unroll.train import losses
from unroll.train.losses import Net

VECTORS = ("bias", "norm", "position", "token", "scale")
RULE = (
    "a matrix decays: a parameter with two axes longer than 1, not a learned step size or threshold, "
    f"and without {', '.join(VECTORS)} in its name; what is called embedding is a matrix"
)


def rates(settings: Train) -> Rates:
    """Learning rates by kind of parameter; where one number is given, learned scalars learn ten times as fast."""
    lr = settings.lr
    return lr if isinstance(lr, Rates) else Rates(matrices=lr, scalars=10 * lr)


def kind_of(name: str, p: nn.Parameter, learned: str) -> str:
    """scalar: learned step sizes and thresholds; vector: biases, norms, positions, single tokens; else matrix."""
    if learned == "scalar":
        return "scalar"
    words = name.lower()
    named = any(word in words for word in VECTORS) and "embedding" not in words
    return "vector" if named or sum(n > 1 for n in p.shape) < 2 else "matrix"


def by_kind(net: Net) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Names and parameters of each kind, in the order of the network."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "vector": [], "scalar": []}
    for item, (name, p) in zip(net.learned, losses.module(net).named_parameters(), strict=True):
        found[kind_of(name, p, item.kind)].append((name, p))
    return found


def parameter_groups(net: Net, settings: Train) -> list[dict[str, Any]]:
    """One group per kind that there is, with its learning rate and weight decay."""
    lr, decay = rates(settings), settings.weight_decay
    groups = {"matrix": (lr.matrices, decay), "vector": (lr.matrices, 0.0), "scalar": (lr.scalars, 0.0)}
    return [
        {"params": [p for _, p in named], "lr": rate, "base_lr": rate, "weight_decay": wd, "kind": kind}
        for kind, named in by_kind(net).items()
        for rate, wd in [groups[kind]]
        if named
    ]


def record(net: Net, settings: Train) -> dict[str, Any]:
    """What run.json says about the groups."""
    names = {kind: [name for name, _ in named] for kind, named in by_kind(net).items()}
    decaying = names["matrix"] if settings.weight_decay else []
    return {"rule": RULE, "kinds": names, "weight_decay": settings.weight_decay, "decay": decaying}
