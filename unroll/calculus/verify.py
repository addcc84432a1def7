"""Brute force against a derived proximal step: no point of a grid may do better."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportArgumentType=false
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy as sp

from unroll.calculus.signs import Signs
from unroll.errors import DeriveError

if TYPE_CHECKING:
    from unroll.calculus.prox_scalar import ScalarProx

POINTS, GRID, DRAWS = 48, 1601, 3
TOLERANCE = 1e-9


def verified(prox: ScalarProx, signs: Signs) -> ScalarProx:
    """The prox, with the worst excess over a grid added to its proof.  Raises DeriveError E302 if the grid wins."""
    runs = [excess(prox, draw, t) for draw, t in zip(signs.draws[:DRAWS] * DRAWS, _steps(prox), strict=False)]
    worst = max(runs)
    if not worst <= TOLERANCE:
        raise DeriveError(
            "E302",
            f"the derived proximal step of {prox.f} is beaten by a grid, by {worst:.2g}",
            hint="please report this function: its derivation is wrong, so no step is emitted",
        )
    told = f"verified: {len(runs)} x {POINTS} points against a grid of {GRID}, worst excess {max(worst, 0.0):.1e}"
    return replace(prox, proof=f"{prox.proof}; {told}")


def _steps(prox: ScalarProx) -> list[float]:
    return [0.3, 1.1, 4.0]


def excess(prox: ScalarProx, draw: dict[sp.Basic, sp.Expr], t: float) -> float:
    """Most by which a grid point, or a neighbour, beats the prox; relative to 1 + its value. NaN counts as infinite."""
    import torch

    if prox.mode == "threshold" and not prox.curvature.convex:
        t = min(t, 0.9 / float(prox.curvature.rho.xreplace(draw)))
    lo, hi = (float(e.xreplace(draw)) for e in prox.domain)
    f = objective(prox.f.xreplace(draw), prox.u, lo, hi)
    spread = 3.0 * max([1.0, *(abs(float(k.at.xreplace(draw))) for k in prox.knots if k is not None)])
    v = np.linspace(-spread - 0.013, spread, POINTS)
    scalars = {str(s): float(draw[s]) for s in prox.scalars if s != prox.t}
    z = (
        prox(torch.from_numpy(v), t, **scalars).numpy()
        if prox.t in prox.scalars
        else prox(torch.from_numpy(v), **scalars).numpy()
    )
    if not np.isfinite(z).all() or (z < lo).any() or (z > hi).any():
        return float("inf")
    knots = np.array([float(k.at.xreplace(draw)) for k in prox.knots if k is not None])
    reach = np.linspace(-2 * spread, 2 * spread, GRID)
    grid = np.unique(np.concatenate([reach, knots, -knots, np.geomspace(1e-6, spread, 64)]))
    rivals = np.concatenate(
        [np.broadcast_to(grid, (POINTS, grid.size)), z[:, None] + np.array([-1e-4, -1e-6, 1e-6, 1e-4])], axis=1
    )
    found = t * f(z) + (z - v) ** 2 / 2
    best = (t * f(rivals) + (rivals - v[:, None]) ** 2 / 2).min(axis=1)
    gap = (found - best) / (1 + np.abs(best))
    return float("inf") if np.isnan(gap).any() else float(gap.max())


def objective(f: sp.Expr, u: sp.Symbol, lo: float, hi: float) -> Any:
    """f as a numpy function, +inf outside [lo, hi]; where the formula has no value at a point, a value next to it."""
    raw = sp.lambdify(u, f, "numpy")

    def value(z: np.ndarray) -> np.ndarray:
        z = np.asarray(z, dtype=float)
        with np.errstate(all="ignore"):
            y = np.asarray(raw(z), dtype=float) + np.zeros_like(z)
            near = np.clip(z, lo + 1e-300 if lo == 0 else lo + 1e-12, hi - 1e-12)
            y = np.where(np.isnan(y), np.asarray(raw(near), dtype=float) + np.zeros_like(z), y)
        return np.where((z < lo) | (z > hi) | np.isnan(y), np.inf, y)

    return value
