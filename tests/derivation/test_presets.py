"""Presets work wherever what they replace occurs, under whatever name; where it does not, the message says what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unroll
from unroll.errors import SpecError

D = torch.float64
PRESETS = sorted(p.stem for p in Path("specs/presets").glob("*.yaml"))
OBJECTIVES: dict[str, dict[str, Any]] = {
    "nonnegative": {"use": "nonnegative_lasso", "dims": {"m": 6, "n": 9}},
    "group": {"dims": {"m": 6, "n": 9, "N": 2}, "variables": {"z": ["n", "N"]}, "inputs": {"x": ["m", "N"]}, "parameters": {"A": ["m", "n"]},
              "scalars": {"lam": 0.1}, "minimize": {"fit": "1/2 * sumsq(x - A @ z)", "groups": "lam * group_norm(z, axis=1)"}},
    "elastic": {"dims": {"m": 6, "n": 9}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
                "scalars": {"lam": 0.1}, "minimize": {"fit": "1/2 * sumsq(x - A @ z)", "mcp": "sum(lam * abs(z) + 0.05 * z**2)"}},
}  # fmt: skip


def spec(objective: dict[str, Any], preset: str) -> dict[str, Any]:
    return {**objective, "unroll": {"algorithm": "proximal_gradient", "layers": 3, "parametrisation": preset}}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_preset_works_on_any_objective_that_has_the_occurrences(objective: str, preset: str) -> None:
    net: Any = unroll.compile(spec(OBJECTIVES[objective], preset), dtype=D, seed=0)
    x = torch.randn(4, *((2, 6) if objective == "group" else (6,)), generator=torch.Generator().manual_seed(0), dtype=D)
    x[1] = 0
    z = net(x)
    assert z.isfinite().all() and (z[1] == 0).all() and (z[0] != 0).any()
    slopes = torch.autograd.grad(z.square().sum(), list(net.parameters()), allow_unused=True)
    assert any(s is not None and (s != 0).any() for s in slopes)
    assert all(s is None or s.isfinite().all() for s in slopes)
    if preset in ("lista", "lista_cp", "step", "tied", "hessian"):  # these start at the algorithm itself
        plain = {**OBJECTIVES[objective], "unroll": {"algorithm": "proximal_gradient", "layers": 3}}
        assert torch.allclose(z, unroll.compile(plain, parameters=dict(net.given), dtype=D)(x), atol=1e-12)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("step", "momentum")])
def test_a_preset_says_its_names_as_they_are_here(preset: str) -> None:
    """Another dictionary, weight and signal: the same numbers."""
    there = {"dims": {"rows_": 6, "atoms": 9}, "variables": {"c": ["atoms"]}, "inputs": {"y": ["rows_"]}, "parameters": {"B": ["rows_", "atoms"]},
             "scalars": {"mu": 0.1}, "minimize": {"fit": "1/2 * sumsq(y - B @ c)", "sparsity": "mu * norm1(c)"}}  # fmt: skip
    here = {"use": "lasso", "dims": {"m": 6, "n": 9}}
    called = {"hyper": "A=B, lam=mu, x=y", "lista": "A=B, lam=mu, n=atoms", "hessian": "A=B, lam=mu, n=atoms"}
    A = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=D)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=D)
    one = unroll.compile(spec(here, preset), parameters={"A": A}, dtype=D)
    other = unroll.compile(spec(there, f"{preset}({called.get(preset, 'A=B, lam=mu')})"), parameters={"B": A}, dtype=D)
    assert torch.equal(one(x), other(x))
    with pytest.raises(SpecError, match=rf"the preset {preset} reads 'A', and there is no 'A' here"):
        unroll.compile(spec(there, preset))


@pytest.mark.parametrize(
    "objective, preset, says",
    [
        ("huber", "lista", r"I\(n\) - step \* A.T @ A does not occur in the step"),
        ("nonnegative_least_squares", "cpss", "reads 'lam', and there is no 'lam' here"),
        ("lasso", "lista_cp(B=A)", "the preset lista_cp reads no 'B'"),
        ("lasso", "lista_cpp", "lista_cp"),
    ],
)
def test_what_is_missing_is_said(objective: str, preset: str, says: str) -> None:
    written = (
        {"minimize": {"fit": "sum(huber(x - A @ z, 1))", "sparsity": "lam * norm1(z)"}} if objective == "huber" else {}
    )
    use = "lasso" if objective == "huber" else objective
    with pytest.raises(SpecError, match=says):
        unroll.compile(spec({"use": use, "dims": {"m": 6, "n": 9}, **written}, preset))


def test_momentum_is_heavy_ball_at_a_moved_point() -> None:
    net: Any = unroll.compile(spec({"use": "lasso", "dims": {"m": 6, "n": 9}}, "momentum"), dtype=D, seed=0)
    A, x = net.given["A"], torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=D)
    with torch.no_grad():
        net.beta_k.copy_(torch.tensor([0.3, -0.2, 0.8]))
    z = before = torch.zeros(3, 9, dtype=D)
    for beta, gamma in zip(net.beta_k, torch.nn.functional.softplus(net.gamma), strict=True):
        q, before = z + beta * (z - before), z
        v = q - gamma * (q @ A.T - x) @ A
        z = v.sign() * (v.abs() - 0.1 * gamma).clamp_min(0)
    assert (net(x) - z).abs().max() < 1e-12
