"""A learned number of each group: the layer by hand, with every number moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll

D = torch.float64


def spec(penalty: str, learn: dict[str, Any], variable: Any = "z", **more: Any) -> dict[str, Any]:
    one = variable == "z"
    return {
        "objective": "groups",
        "dims": {"m": 6, "s": 2, "g": 4},
        "variables": {"z": ["g*s"]} if one else {"Z": ["s", "g"]},
        "inputs": {"x": ["m"]} if one else {"X": ["m", "g"]},
        "parameters": {"A": ["m", "g*s"]} if one else {"A": ["m", "s"]},
        "scalars": {"lam": 0.1, "mu": 0.05},
        "minimize": {"fit": "1/2 * sumsq(x - A @ z)" if one else "1/2 * sumsq(X - A @ Z)", "penalty": penalty},
        "unroll": {"layers": 2, "algorithm": "proximal_gradient", "learn": learn},
        **more,
    }


def moved(document: dict[str, Any]) -> tuple[Any, Tensor]:
    """The network, and its thresholds of each layer and group, all of them moved."""
    net: Any = unroll.compile(document, seed=0, dtype=D)
    torch.manual_seed(0)
    with torch.no_grad():
        net.theta.add_(torch.rand_like(net.theta))
    return net, torch.nn.functional.softplus(net.theta)


def shrunk(v: Tensor, by: Tensor) -> Tensor:
    """Columns (..., groups, size), each shorter by a number of its own."""
    length = v.norm(dim=-1, keepdim=True)
    return v * (1 - by[..., None] / length.clamp_min(1e-300)).clamp_min(0)


X = torch.cat([torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=D), torch.zeros(1, 6, dtype=D)])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_groups_of_a_vector(sparse: bool, unit: float, tmp_path: Path) -> None:
    penalty = "lam * group_norm(groups(z, s), 0)" + (" + mu * norm1(z)" if sparse else "")
    net, theta = moved(spec(penalty, {"theta": {"replaces": "lam", "shape": ["g"]}}))
    A, z, x = net.given["A"], torch.zeros(4, 8, dtype=D), X * unit
    step = 1 / torch.linalg.matrix_norm(A, 2) ** 2
    for t in theta:
        v = z - step * (z @ A.T - x) @ A
        v = v.sign() * (v.abs() - 0.05 * step).clamp_min(0) if sparse else v
        z = shrunk(v.unflatten(-1, (4, 2)), step * t).flatten(-2)
    torch.testing.assert_close(net(x), z, rtol=1e-11, atol=1e-12 * unit)
    (mine,) = torch.autograd.grad(net(x).square().sum(), net.theta)
    (theirs,) = torch.autograd.grad(z.square().sum(), net.theta)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert theta.shape == (2, 4) and mine.isfinite().all()
    net.save(tmp_path)
    assert torch.equal(unroll.restore(tmp_path)(x), net(x))


def test_columns_of_a_matrix() -> None:
    net, theta = moved(spec("lam * group_norm(Z, 0)", {"theta": {"replaces": "lam", "shape": ["g"]}}, "Z"))
    A, x = net.given["A"], torch.randn(3, 4, 6, dtype=D)
    z, step = torch.zeros(3, 4, 2, dtype=D), 1 / torch.linalg.matrix_norm(A, 2) ** 2
    for t in theta:
        z = shrunk(z - step * (z @ A.T - x) @ A, step * t)
    torch.testing.assert_close(net(x), z, rtol=1e-12, atol=1e-13)


def test_untrained_it_is_the_algorithm() -> None:
    document = spec("lam * group_norm(groups(z, s), 0)", {"theta": {"replaces": "lam", "shape": ["g"]}})
    plain = spec("lam * group_norm(groups(z, s), 0)", {})
    torch.testing.assert_close(unroll.compile(document, seed=0, dtype=D)(X), unroll.compile(plain, seed=0, dtype=D)(X))
    assert "BROKEN" not in str(unroll.check(document))


@pytest.mark.parametrize(
    ("penalty", "shape", "said"),
    [
        ("lam * group_norm(groups(z, s), 0)", ["m"], "shape of theta is not that of z"),
        ("lam * group_norm(groups(z, s), 0)", ["g", "s"], "shape of theta is not that of z"),
        ("lam * group_norm(groups(z, s), 0)", ["g*s"], "give each group its own"),
        ("lam * norm1(z)", ["g"], "shape of theta is not that of z"),
        ("lam * group_norm(groups(z, s), 0) + lam * norm1(z)", ["g"], "theta"),
        ("lam * group_norm(groups(z, s), 0) + lam * sum(sqrt(1 + z**2))", ["g"], "stands outside a proximal step too"),
    ],
)
def test_what_is_not_of_each_group_is_refused(penalty: str, shape: list[str], said: str) -> None:
    with pytest.raises(unroll.UnrollError, match=said):
        unroll.compile(spec(penalty, {"theta": {"replaces": "lam", "shape": shape}}))


def test_a_number_that_is_fixed_has_no_shape_of_another_kind() -> None:
    with pytest.raises(unroll.UnrollError, match="shape of theta is not that of z"):
        unroll.compile(
            spec("lam * norm1(z)", {"theta": {"replaces": "lam", "shape": ["m"], "fixed": True, "start": "0.2"}})
        )
