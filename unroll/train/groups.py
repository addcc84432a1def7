"""Which parameters learn at which rate, and which of them decay."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from unroll.network.network import Network
from unroll.spec.schema import Rates, Train
from unroll.train import losses
from unroll.train.losses import Net

VECTORS = ("bias", "norm", "position", "scale")
RULE = (
    "a matrix decays: of the layers, what takes the place of a matrix of more than one row and column; around them, a parameter "
    f"with two axes longer than 1, without {', '.join(VECTORS)} in its name"
)


def rates(settings: Train) -> Rates:
    """Learning rates by kind of parameter; where one number is given, learned scalars learn ten times as fast."""
    lr = settings.lr
    return lr if isinstance(lr, Rates) else Rates(matrices=lr, scalars=10 * lr)


def kind_of(name: str, p: nn.Parameter, derived: str | None) -> str:
    """vector: biases, norms, positions, single tokens; scalar: learned step sizes and thresholds; else matrix.

    derived: what the derivation says of a parameter of the layers, which has axes for them and for the members of a family too.
    """
    if derived is None:
        vector = any(word in name.lower() for word in VECTORS) or sum(n > 1 for n in p.shape) < 2
        return "vector" if vector else "matrix"
    return "vector" if derived == "matrix" and 1 in p.shape[-2:] else derived


def by_kind(net: Net) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Names and parameters of each kind, in the order of the network."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "vector": [], "scalar": []}
    layers = [cast(Net, m) for m in losses.module(net).modules() if isinstance(m, Network)] or [net]
    pairs = (pair for n in layers for pair in zip(n.learned, losses.module(n).parameters(), strict=True))
    derived = {id(p): item.kind for item, p in pairs}
    for name, p in losses.module(net).named_parameters():
        found[kind_of(name, p, derived.get(id(p)))].append((name, p))
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
