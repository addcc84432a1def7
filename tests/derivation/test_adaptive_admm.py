"""ADMM whose rho follows the residuals of each sample: against a loop by hand, CVXPY, and itself in other units."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import unroll

Spec = dict[str, Any]
M, N, LAM, MU = 9, 6, 0.3, 0.2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, X = drawn(M, N), drawn(3, M, seed=1) * torch.tensor([[1.0], [30.0], [0.0]], dtype=torch.float64)
D = torch.eye(N, dtype=torch.float64)[1:] - torch.eye(N, dtype=torch.float64)[:-1]
UNIT = float(torch.linalg.matrix_norm(A, 2) ** 2) / 5


def spec(algorithm: str = "adaptive_admm", scale: float = 1.0, **numbers: float) -> Spec:
    """scale: of the weights, as that of data is."""
    return {
        "dims": {"m": M, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": LAM * scale, "mu": MU * scale},
        "minimize": {"fit": "1/2*sumsq(x - A @ z)", "s": "lam*norm1(z)", "t": "mu*tv(z)"},
        "unroll": {"algorithm": algorithm, "layers": 30, "numbers": {k: repr(v) for k, v in numbers.items()}},
    }  # fmt: skip


def compiled(**numbers: float) -> Any:
    return unroll.compile(spec(**numbers), parameters={"A": A}, dtype=torch.float64)


def by_hand(x: Tensor, layers: int, first: float, settle: int = 100) -> tuple[Tensor, list[float]]:
    """One sample; both residuals as the gradient: a step rho |K'(w - w before)|, a gap |A|^2 |K z - w| / |K|, |K| <= sqrt(5)."""
    k = torch.cat([torch.eye(N, dtype=torch.float64), D])
    cost = torch.tensor([LAM] * N + [MU] * (N - 1), dtype=torch.float64)
    z, w, y, rho, rhos = *(torch.zeros(len(e), dtype=torch.float64) for e in (k.T, k, k)), first, []
    for layer in range(layers):
        z = torch.linalg.solve(A.T @ A + rho * k.T @ k, x @ A + (rho * w - y) @ k)
        v, before = k @ z + y / rho, w
        w = v.sign() * (v.abs() - cost / rho).clamp_min(0)
        y = rho * (v - w)
        primal, dual = UNIT * 5**0.5 * float((k @ z - w).norm()), rho * float((k.T @ (w - before)).norm())
        rhos.append(rho)
        if layer < settle:
            rho *= 2 if primal > 10 * dual else 0.5 if dual > 10 * primal else 1
    return z, rhos


@pytest.mark.parametrize("first", [UNIT * 400, UNIT / 400])
def test_each_sample_has_a_rho_of_its_own(first: float) -> None:
    net, brief = compiled(first=first), compiled(first=first, settle=3)
    found, settled = net(X), brief(X)
    loops = [by_hand(x, 30, first) for x in X]
    for i, (z, _) in enumerate(loops):
        assert (found[i] - z).abs().max() < 1e-10 * (1 + z.abs().max())
        z, rhos = by_hand(X[i], 30, first, settle=3)
        assert (settled[i] - z).abs().max() < 1e-10 * (1 + z.abs().max())
        assert rhos[4:] == rhos[3:-1]
        assert torch.allclose(net(X[i]), found[i], rtol=1e-12, atol=1e-14)
    ends = [rhos[-1] for _, rhos in loops]
    assert ends[2] == first  # a blank sample: neither residual is larger
    assert ends[0] != first
    assert ends[1] != first
    assert net(X[:0]).shape == (0, N)
    assert len({tuple(np.sign(np.diff(rhos))) for _, rhos in loops}) == 3


def test_where_it_ends_is_an_optimum() -> None:
    z = cp.Variable(N)
    cost = cp.sum_squares(X[1].numpy() - A.numpy() @ z) / 2 + LAM * cp.norm1(z) + MU * cp.tv(z)
    cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    net = compiled(first=UNIT * 400)
    assert np.abs(net(X[1], layers=400).numpy() - z.value).max() < 1e-6
    assert [c.name for c in net.derivation.exact.claims if c.holds] == ["optimum"]
    low = unroll.compile(spec(first=UNIT * 400), parameters={"A": A.float()})
    assert np.abs(low(X[1].float(), layers=400).numpy() - z.value).max() < 1e-4


def iterations(algorithm: str, data: float = 1.0, rows: float = 1.0, **numbers: float) -> int:
    whole = spec(algorithm, data * rows, **numbers)
    whole["minimize"] = {k: v for k, v in whole["minimize"].items() if k != "t"}
    whole["scalars"] = {"lam": whole["scalars"]["lam"]}
    a = {"A": A * rows}
    return unroll.solve(whole, X[:2] * data, parameters=a, algorithm=algorithm, tol=1e-5, max_iterations=600).iterations


def test_units_of_data_and_a_bad_start_cost_little() -> None:
    """ADMM with the same rho takes as long as it is given."""
    usual = iterations("adaptive_admm")
    assert iterations("adaptive_admm", data=1e3) == iterations("adaptive_admm", rows=1e-3) == usual
    for factor in (1e-3, 1e3):
        assert iterations("adaptive_admm", first=5 * UNIT * factor) <= 2 * usual < 100
    assert iterations("admm", rho=5 * UNIT * 1e3) == 600


def test_where_nothing_holds_rho_stays_within_bounds() -> None:
    """No point of the box is at its end: one residual is 0 from the start, and rho would fall until the system is singular."""
    wide: Spec = {
        "dims": {"m": 3, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "minimize": {"fit": "1/2*sumsq(x - A @ z)"}, "constraints": ["-1000 <= z <= 1000"],
        "unroll": {"algorithm": "adaptive_admm", "layers": 90},
    }  # fmt: skip
    a, x = drawn(3, N), drawn(2, 3, seed=1)
    z = unroll.compile(wide, parameters={"A": a}, dtype=torch.float64)(x)
    assert (z @ a.T - x).abs().max() < 1e-9
    assert (z - x @ torch.linalg.pinv(a).T).abs().max() < 1e-9
