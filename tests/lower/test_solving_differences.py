"""(a I + b D'D)^-1 by Fourier transforms, D the differences of neighbours: against dense solves, alone and in networks that learn b."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import unroll
from unroll.emit.text import helper, imports, needed

D = torch.float64
CALLS: dict[str, Any] = {}
TEXT = "\n\n".join(map(helper, needed(["solve_differences"])))
exec(f"{imports(TEXT)}\n\n{TEXT}", CALLS)
solve = CALLS["solve_differences"]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=D)


def matrix(n: int, a: float, b: float) -> Tensor:
    d = torch.eye(n, dtype=D).diff(dim=0)
    return a * torch.eye(n, dtype=D) + b * d.T @ d


@pytest.mark.parametrize("n", [1, 2, 3, 8, 101])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 0), (1e-3, 1e3), (1e6, 1e-6)])
def test_it_is_a_dense_solve(n: int, a: float, b: float) -> None:
    v = drawn(4, n)
    v[1] = 0
    want = torch.linalg.solve(matrix(n, a, b), v.mT).mT
    found = solve(v, a, b)
    assert torch.allclose(found, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))
    assert torch.allclose(solve(v.float(), a, b).to(D), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert solve(v.half(), a, b).dtype == torch.float16
    assert torch.equal(found[1], v[1]) and solve(v[:0], a, b).shape == (0, n)


def test_slopes_in_all_that_it_reads() -> None:
    v, a, b = (
        drawn(2, 5).requires_grad_(),
        torch.tensor(0.7, dtype=D, requires_grad=True),
        torch.tensor(1.3, dtype=D, requires_grad=True),
    )
    assert torch.autograd.gradcheck(solve, (v, a, b)) and torch.autograd.gradgradcheck(solve, (v, a, b))


SPEC: dict[str, Any] = {
    "dims": {"n": 9}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "scalars": {"mu": 0.3, "lam": 0.1},
    "minimize": {"fit": "1/2 * sumsq(x - z)", "jumps": "mu * norm1(difference(z))", "sparse": "lam * norm1(z)"},
    "unroll": {"algorithm": "admm", "layers": 4, "learn": {"weight": {"replaces": "rho", "positive": True}}},
}  # fmt: skip


def shrink(v: Tensor, t: Tensor) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def by_hand(x: Tensor, weights: Tensor) -> Tensor:
    """Rows are signals."""
    d = torch.eye(x.shape[-1], dtype=D).diff(dim=0)
    w1, u1, w2, u2 = (torch.zeros(*x.shape[:-1], n, dtype=D) for n in (len(d), len(d), len(d) + 1, len(d) + 1))
    z, before = x, weights[0]
    for rho in weights:
        u1, u2, before = u1 * before / rho, u2 * before / rho, rho  # what the multipliers are stays
        right = x + rho * (w1 - u1) @ d + rho * (w2 - u2)
        z = torch.linalg.solve(matrix(x.shape[-1], 1 + rho, rho), right.mT).mT
        v1, v2 = z @ d.T + u1, z + u2
        w1, w2 = shrink(v1, 0.3 / rho), shrink(v2, 0.1 / rho)
        u1, u2 = v1 - w1, v2 - w2
    return z


@pytest.mark.parametrize("share", ["none", "layers"])
def test_a_network_that_learns_the_weight_of_its_splitting(share: str) -> None:
    spec = {
        **SPEC,
        "unroll": {**SPEC["unroll"], "learn": {"weight": {"replaces": "rho", "positive": True, "share": share}}},
    }
    net: Any = unroll.compile(spec, dtype=D)
    with torch.no_grad():
        net.weight.add_(drawn(*net.weight.shape) / 3)
    assert "solve_differences(" in net.source and "torch.linalg.solve" not in net.source
    x = drawn(3, 9)
    assert torch.allclose(net(x), by_hand(x, softplus(net.weight).expand(4)), atol=1e-10)
    matrices = {**spec, "dims": {"n": 9, "T": 2}, "variables": {"z": ["n", "T"]}, "inputs": {"x": ["n", "T"]}}
    wide: Any = unroll.compile(matrices, dtype=D)
    wide.load_state_dict(net.state_dict())
    x = drawn(3, 2, 9)
    assert "solve_differences(" in wide.source
    assert torch.allclose(wide(x), by_hand(x, softplus(net.weight).expand(4)), atol=1e-10)


def test_what_does_not_move_is_worked_out_once() -> None:
    spec = {**SPEC, "unroll": {"algorithm": "admm", "layers": 4}}
    net: Any = unroll.compile(spec, dtype=D)
    assert "solve_differences" not in net.source
    rho = 1 / 5**0.5 / 5**0.5  # L(f) = 1, |stack(K)|^2 = 4 + 1
    assert torch.allclose(net(drawn(3, 9)), by_hand(drawn(3, 9), torch.full((4,), rho, dtype=D)), atol=1e-10)


def test_laws_hold() -> None:
    assert unroll.check(SPEC).ok
