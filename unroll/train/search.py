"""Grid search: numbers that all layers share are tried out, and the best are kept; no slope is taken."""

from __future__ import annotations

import csv
import itertools
import math
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from unroll.errors import SpecError, did_you_mean
from unroll.model.weights import inside
from unroll.network.network import Network
from unroll.spec.schema import Search, Train
from unroll.train import losses
from unroll.train.losses import Net, Outcome
from unroll.train.samples import Data, Split

MOST = 100_000
"""Points that a search may try out, all rounds together."""


def find(net: Net, data: Data, settings: Train, folder: Path) -> Outcome:
    """Set the parameters that `settings.search` names to the best of its grid, and then of finer ones around it.

    A round after the first puts as many values between the neighbours of the best one. The loss is that of the first `samples` of the
    training data; the held-out data are not looked at. Raises SpecError E511.
    """
    search = cast(Search, settings.search)
    begun, places = time.monotonic(), _places(net, search)
    samples = data.train[torch.arange(min(search.samples, len(data.train)))].to(next(iter(places.values())).dtype)
    grid = {name: sorted(values) for name, values in search.grid.items()}
    best, chosen, tried = math.inf, {name: values[0] for name, values in grid.items()}, 0
    for _ in range(search.rounds):
        for point in itertools.product(*grid.values()):
            found = _loss(net, samples, settings, places, dict(zip(grid, point, strict=True)))
            tried += 1
            if found < best:
                best, chosen = found, dict(zip(grid, point, strict=True))
                _write(folder / "search.csv", tried, found, chosen)
        grid = {name: _finer(values, chosen[name]) for name, values in grid.items()}
    if not math.isfinite(best):
        raise SpecError("E509", "train: search: no point of the grid has a loss that is finite", hint="other values")
    _set(net, places, chosen)
    return Outcome("done", tried, time.monotonic() - begun, best)


def _places(net: Net, search: Search) -> dict[str, nn.Parameter]:
    """The parameters by their names. Raises SpecError E511 for what is no number that all layers share."""
    layers = [cast(Net, m) for m in losses.module(net).modules() if isinstance(m, Network)]
    pairs = [pair for n in layers for pair in zip(n.learned, losses.module(n).parameters(), strict=True)]
    known = {item.name: p for item, p in pairs if p.ndim == 0}
    for name in search.grid:
        if name not in known:
            hint = did_you_mean(name, known) or f"there are: {', '.join(known) or 'none'}; share: layers makes one"
            raise SpecError("E511", f"train: search: '{name}' is no learned number that all layers share", hint=hint)
    if (points := math.prod(map(len, search.grid.values())) * search.rounds) > MOST:
        raise SpecError("E511", f"train: search: {points:,} points; at most {MOST:,}", hint="fewer values, more rounds")
    return {name: known[name] for name in search.grid}


@torch.no_grad()
def _loss(net: Net, samples: Split, settings: Train, places: dict[str, nn.Parameter], point: dict[str, float]) -> float:
    _set(net, places, point)
    loss = losses.find_loss(settings.loss)
    value = float(loss.value(net, samples, losses.run(net, samples.inputs), settings))
    return value if math.isfinite(value) else math.inf


@torch.no_grad()
def _set(net: Net, places: dict[str, nn.Parameter], point: dict[str, float]) -> None:
    """Values, as they stand in the layers: what is stored of a positive one is another number."""
    layers = [cast(Net, m) for m in losses.module(net).modules() if isinstance(m, Network)]
    known = {p.name: p for n in layers for p in n.learned}
    for name, value in point.items():
        stored = inside(known[name], torch.tensor(value, dtype=torch.float64))
        if not bool(stored.isfinite()):
            raise SpecError("E511", f"train: search: {name} is kept away from {value:g}", hint="other values")
        places[name].copy_(stored)


def _finer(values: list[float], best: float) -> list[float]:
    """As many values between the neighbours of the best one; of positive ones evenly on a scale of factors."""
    i, n = values.index(best), len(values)
    low, high = values[max(i - 1, 0)], values[min(i + 1, n - 1)]
    if n == 1 or low == high:
        return [best]
    grow: Tensor = torch.linspace(0, 1, n + 1, dtype=torch.float64)[1:-1]  # with the best one, n
    between = low * (high / low) ** grow if low > 0 else low + (high - low) * grow
    return sorted({best, *map(float, between)})


def _write(path: Path, tried: int, loss: float, point: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["tried", "loss", *point])
        writer.writerow([tried, f"{loss:.9g}", *(f"{v:.9g}" for v in point.values())])
