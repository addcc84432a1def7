"""Which parameters learn, at which rate, and which of them decay."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from unroll.errors import SpecError, quote
from unroll.model.module import Model
from unroll.model.transfer import Layers, axes_of, matching, near
from unroll.model.weights import networks_of
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
    """One group per kind, and share of the rate, that there is, with its learning rate and weight decay."""
    lr, decay, share = rates(settings), settings.weight_decay, shares(net, settings)
    groups = {"matrix": (lr.matrices, decay), "vector": (lr.matrices, 0.0), "scalar": (lr.scalars, 0.0)}
    found: dict[tuple[str, float], list[nn.Parameter]] = {}
    for kind, named in by_kind(net).items():
        for name, p in named:
            if most := float(share[name].max()):
                found.setdefault((kind, most), []).append(p)
    return [
        {"params": own, "lr": rate * most, "base_lr": rate * most, "weight_decay": wd, "kind": kind}
        for (kind, most), own in found.items()
        for rate, wd in [groups[kind]]
    ]


def record(net: Net, settings: Train) -> dict[str, Any]:
    """What run.json says about the groups."""
    share = shares(net, settings)
    names = {kind: [name for name, _ in named] for kind, named in by_kind(net).items()}
    last = settings.final_weight_decay
    decaying = [n for n in names["matrix"] if (settings.weight_decay or last) and share[n].any()]
    found = {"rule": RULE, "kinds": names, "weight_decay": settings.weight_decay, "decay": decaying}
    found |= {} if last is None else {"final_weight_decay": last}
    others = {n: value.tolist() for n, value in share.items() if bool((value != 1).any())}
    return {**found, **({"share_of_the_rate": others} if others else {})}


# --- what does not learn ----------------------------------------------------------------------------------------------

ENTRY = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")


def shares(net: Net, settings: Train) -> dict[str, Tensor]:
    """Of every parameter the share of the learning rate at which it learns, 0 where it is frozen: (), or (layers,) by layer.

    Raises SpecError E511 for names that are not there, layers of what has none, or where nothing is left to learn.
    """
    stacks = _stacks(net)
    names = [name for name, _ in losses.module(net).named_parameters()]
    found = {name: torch.ones(stacks.get(name, ())) for name in names}
    for name in names if settings.only else ():
        found[name].zero_()
    for key, entries, value in (("freeze", settings.freeze, 0.0), ("only", settings.only, 1.0)):
        for entry in entries:
            for name, rows in _meant(key, entry, names, stacks):
                found[name][rows] = value
    for name, depth in from_the_end(net).items() if settings.layer_decay != 1 else ():
        found[name] = found[name] * settings.layer_decay ** torch.tensor(depth)
    for name, p in losses.module(net).named_parameters():
        if not p.requires_grad:  # low-rank changes are learned beside it
            found[name].zero_()
    if names and not any(bool(share.any()) for share in found.values()):
        raise SpecError("E511", "train: freeze: nothing is left to learn", hint="leave something out of it")
    return found


def from_the_end(net: Net) -> dict[str, float | list[float]]:
    """How many layers come after each parameter, by layer where it has a row for each; what follows the layers is one more.

    What several layers share counts as the last of them; what stands between layers and those of a decoder as the first of these.
    Source: Clark et al. 2020 (ELECTRA), arXiv:2003.10555, section 3.1; Bao et al. 2022 (BEiT), arXiv:2106.08254.
    Raises SpecError E511 for a network whose layers are not known.
    """
    if not isinstance(net, Network | Model):
        raise SpecError("E511", "train: layer_decay: this network says nothing of its layers", hint="leave it out")
    stacks, place = _stacks(net), dict[str, float | list[float]]()
    before, between, after = net.wrapped.order if isinstance(net, Model) else ((), (), ())
    end = 0
    for prefix, inner in networks_of(net).items():
        first, end = end + 1, end + inner.layers
        for name, _ in inner.named_parameters():
            rows = stacks.get(prefix + name)
            place[prefix + name] = end if rows is None else [*range(first, first + rows[0] - 1), end]
    parts = {**dict.fromkeys(before, 0), **dict.fromkeys(between, net.layers + 1), **dict.fromkeys(after, end + 1)}
    place |= {n: parts[n.split(".")[0]] for n, _ in net.named_parameters() if n.split(".")[0] in parts}
    last = max((max(p) if isinstance(p, list) else p for p in place.values()), default=0)
    return {n: [last - k for k in p] if isinstance(p, list) else last - p for n, p in place.items()}


def _stacks(net: Net) -> dict[str, tuple[int, ...]]:
    """Parameters with a row for each layer -> how many."""
    if not isinstance(net, Network | Model):
        return {}
    return {name: (axes[0].count,) for name, axes in axes_of(net).items() if isinstance(axes[0], Layers)}


def _meant(key: str, entry: str, names: list[str], stacks: dict[str, tuple[int, ...]]) -> list[tuple[str, Any]]:
    """The parameters of an entry, and which of their rows. Raises SpecError E511."""
    match = ENTRY.fullmatch(entry)
    if match is None:
        raise SpecError("E511", f"train: {key}: '{quote(entry)}' is no name", hint="head, body.W, body[:2], *norm*")
    found = matching(match["name"], names)
    if not found:
        message = f"train: {key}: there is no parameter '{quote(match['name'])}'"
        raise SpecError("E511", message, hint=near(match["name"], names))
    if match[2] is None:
        return [(name, ...) for name in found]
    rows = slice(*(int(match[end]) if match[end] else None for end in ("start", "stop")))
    for name in found:
        if name not in stacks:
            message = f"train: {key}: '{quote(entry)}' means layers, and {name} is not one for each"
            raise SpecError("E511", message, hint=f"name those that are: {', '.join(n for n in found if n in stacks)}")
        if not range(*stacks[name])[rows]:
            raise SpecError("E511", f"train: {key}: '{quote(entry)}' are no layers", hint=f"0 to {stacks[name][0] - 1}")
    return [(name, rows) for name in found]


@contextmanager
def learning(net: Net, settings: Train) -> Generator[None]:
    """Inside, what is frozen as a whole takes no gradient."""
    share = shares(net, settings)
    frozen = [p for n, p in losses.module(net).named_parameters() if p.requires_grad and not share[n].any()]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def by_rows(net: Net, settings: Train) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters of which some layers learn more slowly than others, with shares of the fastest, as wide as they are."""
    share = shares(net, settings)
    return [
        (p, (s / s.max()).view(-1, *[1] * (p.ndim - 1)))
        for n, p in losses.module(net).named_parameters()
        if (s := share[n]).any() and not bool((s == s.max()).all())
    ]
