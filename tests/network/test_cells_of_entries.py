"""A recurrent cell for each entry: MS4L2O as its paper writes it, where it starts, that it learns, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

D = torch.float64
SMALL = ["dims.m=6", "dims.n=9", "unroll.layers=3", "unroll.control.hidden=4"]


def network(*more: str, **how: Any) -> Any:
    return unroll.compile("ms4l2o", overrides=[*SMALL, *more], dtype=D, seed=0, **how)


def samples(count: int = 4) -> Tensor:
    """A blank one among others."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0), dtype=D)
    x[1] = 0
    return x


def by_hand(net: Any, x: Tensor, layers: int, lam: float) -> Tensor:
    """Liu et al. 2023, sample by sample and entry by entry; the cell is torch's."""
    a, p = net.given["A"], dict(net.named_parameters())
    step = 1 / torch.linalg.matrix_norm(a, 2) ** 2
    cell = torch.nn.LSTMCell(2, 4, dtype=D)
    with torch.no_grad():
        for gate, rows in zip("ifgo", torch.arange(16).reshape(4, 4), strict=True):
            cell.weight_ih[rows] = torch.stack([p[f"control_{gate}_1"], p[f"control_{gate}_2"]], 1)
            cell.weight_hh[rows] = p[f"control_{gate}_hidden"]
            cell.bias_ih[rows] = p[f"control_{gate}_bias"]
        cell.bias_hh.zero_()
    found: list[Tensor] = []
    slope = lambda z, one: (a @ z - one) @ a
    for one in x:
        z = y = torch.zeros(9, dtype=D)
        h, c = (p[f"control_{s}_start"].expand(9, 4) for s in ("hidden", "cell"))
        for _ in range(layers):
            h, c = cell(torch.stack([z, slope(z, one)], 1), (h, c))
            o = (c @ p["control_out"].T + p["control_out_bias"]).clamp_min(0)
            given = [
                o @ p[f"{s}_weight"] + p[f"{s}_bias"] for s in ("metric", "mixture", "inertia", "shift", "shift_after")
            ]
            metric, b, momentum, b1, b2 = step * 2 * given[0].sigmoid(), *given[1:]
            v = (1 - b) * (z - metric * slope(z, one)) + b * (y - metric * slope(y, one)) - b1
            before, z = z, v.sign() * (v.abs() - lam * metric).clamp_min(0)
            y = z + momentum * (z - before) + b2
        found.append(z)
    return torch.stack(found)


def moved(net: Any) -> Any:
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel()), dtype=D))
    return net


def test_it_is_the_scheme_of_its_paper() -> None:
    net, x = moved(network()), samples()
    wanted = by_hand(net, x, 3, 0.1)
    torch.testing.assert_close(net(x), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=1e-12, atol=1e-12)
    assert wanted.abs().max() > 0.1 and net(x[:0]).shape == (0, 9)


def test_it_starts_as_proximal_gradient_whatever_the_cell_reads() -> None:
    x, net = samples(), network()
    spec = {"use": "lasso", "dims": {"m": 6, "n": 9}, "unroll": {"algorithm": "proximal_gradient", "layers": 3}}
    plain = unroll.compile(spec, parameters=dict(net.given), dtype=D)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-12)


def test_it_learns_the_objective_without_targets() -> None:
    """On what `source: synthetic` makes: in 40 steps of Adam the objective is below that of as many layers of FISTA."""
    from unroll.spec.schema import Synthetic
    from unroll.train.data import synthetic
    from unroll.train.samples import Shapes

    shapes = Shapes({"x": (10,)}, {"z": (20,)}, {"A": (10, 20)})
    data = synthetic(Synthetic(source="synthetic", train=256, validation=256), shapes, {})
    x, held, given = data.train.whole().inputs["x"], data.validation.inputs["x"], dict(data.parameters)
    sizes = ["dims.m=10", "dims.n=20", "unroll.layers=3"]
    net = unroll.compile("ms4l2o", overrides=[*sizes, "unroll.control.hidden=8"], parameters=given, dtype=D, seed=0)
    fista = unroll.compile("fista", overrides=sizes, parameters=given, dtype=D)
    value = lambda net, x: net.objective(x, z=net(x))["total"].mean()
    before, optimiser = float(value(net, held).detach()), torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        value(net, x).backward()
        optimiser.step()
    assert float(value(net, held).detach()) < min(float(value(fista, held)), 0.9 * before)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("unroll.control.reads=['A @ z']", "E131"),
        ("unroll.control.gives.mixture.replaces=step", "E306"),
        ("unroll.control.gives.mixture.in=y", "E101"),
        ("algorithms.metric_and_momentum.updates.b=grad(f, z)", "E306"),
        ("unroll.control.gives.mixture.replaces=nothing", "E101"),
    ],
)
def test_what_is_not_one_number_in_every_entry_is_not_given(change: str, code: str) -> None:
    with pytest.raises(UnrollError, match=code):
        network(change)


def test_numbers_may_be_read_beside_entries() -> None:
    """A number of the sample is the same for each of its entries."""
    net, x = moved(network("unroll.control.reads=[z, 'norm1(A @ z - x)']")), samples()
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=1e-12, atol=1e-12)
    assert net(x).isfinite().all()
