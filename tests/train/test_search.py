"""Grid search: the best point of the grid, against all of its points by hand; refused where there is no such number."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import unroll
from unroll.errors import SpecError
from unroll.network.network import Network
from unroll.spec.schema import Search, Train
from unroll.train import search
from unroll.train.samples import Data, Split

D = torch.float64
GRID = {"c1": (0.002, 0.01, 0.05), "c3": (0.5, 2.0)}
SMALL = ["dims.m=10", "dims.n=20", "unroll.layers=3"]


def problem(**more: Any) -> tuple[Network, Data, Train]:
    net: Any = unroll.compile("hyper_lista", overrides=SMALL, dtype=D, seed=0)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, 20, generator=g, dtype=D) * (torch.rand(40, 20, generator=g, dtype=D) < 0.1)
    samples = Split({"x": z @ net.given["A"].T}, {"z": z})
    settings = Train.model_validate({"search": {"grid": GRID, "rounds": 1, "samples": 30, **more}})
    return net, Data("synthetic", samples, samples[30:], {}), settings


def loss(net: Any, data: Data, c1: float, c3: float) -> float:
    with torch.no_grad():
        net.c1.fill_(torch.tensor(c1, dtype=D).expm1().log())
        net.c3.fill_(c3)
        z, x = data.train.targets["z"][:30], data.train.inputs["x"][:30]
        return float((net(x) - z).square().sum() / z.square().sum())


def test_the_best_of_all_points_is_kept(tmp_path: Path) -> None:
    net, data, settings = problem()
    found = search.find(net, data, settings, tmp_path)
    at = (float(torch.nn.functional.softplus(net.c1.detach())), float(net.c3.detach()))
    tried = {p: loss(net, data, *p) for p in itertools.product(GRID["c1"], GRID["c3"])}
    best = min(tried, key=lambda p: tried[p])
    assert found.best == pytest.approx(tried[best], rel=1e-9) and found.steps == len(tried)
    assert at == pytest.approx(best, rel=1e-9)
    assert (tmp_path / "search.csv").read_text().startswith("tried,loss,c1,c3\n")


def test_finer_rounds_are_no_worse(tmp_path: Path) -> None:
    wide = {"c1": (0.001, 0.2, 2.0), "c3": (0.1, 4.0)}
    net, data, settings = problem(grid=wide)
    first = search.find(net, data, settings, tmp_path).best
    net, data, settings = problem(grid=wide, rounds=3)
    last = search.find(net, data, settings, tmp_path)
    assert last.best < first and last.steps <= 3 * 6


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_do_not_matter(unit: float, tmp_path: Path) -> None:
    net, data, settings = problem()
    want = search.find(net, data, settings, tmp_path).best
    scaled = Split({"x": unit * data.train.inputs["x"]}, {"z": unit * data.train.targets["z"]})
    assert search.find(net, Data("synthetic", scaled, scaled, {}), settings, tmp_path).best == pytest.approx(want)


@pytest.mark.parametrize(
    "grid, says",
    [
        ({"c4": (1.0,)}, "'c4' is no learned number"),
        ({"A": (1.0,)}, "'A' is no learned number"),
        ({"c1": (0.0, 1.0)}, "c1 is kept away from 0"),
        ({"c1": tuple(range(1, 400)), "c3": tuple(range(1, 400))}, "points; at most"),
    ],
)
def test_what_cannot_be_searched_is_refused(grid: dict[str, tuple[float, ...]], says: str, tmp_path: Path) -> None:
    net, data, _ = problem()
    settings = Train(search=Search(grid=grid))
    with pytest.raises(SpecError, match=says):
        search.find(net, data, settings, tmp_path)
