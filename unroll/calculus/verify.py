"""Brute force against a derived proximal step: no point of a grid may do better.

Drawn are points all over, and those that matter: 0, the breakpoints, the switches of the derived chain and the points at which one candidate
takes over from another, each with its neighbours; steps on both sides of 1/rho, where f is weakly convex.
"""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import sympy as sp

from unroll.calculus.prox_function import ScalarProx
from unroll.calculus.scalar import NUMPY
from unroll.calculus.signs import Signs
from unroll.errors import DeriveError

POINTS, GRID, DRAWS = 48, 1601, 3
ROUNDS, PARTS = 3, 16
STEPS = (0.3, 1.1, 4.0)
TOLERANCE = 1e-9


def verified(prox: ScalarProx, signs: Signs) -> ScalarProx:
    """The prox, with the worst excess over a grid added to its proof.  Raises DeriveError E302 if the grid wins."""
    draws = signs.draws[:DRAWS]
    runs = [(draw, t) for draw, t in zip(draws * len(STEPS), STEPS, strict=False)]
    runs += [(draw, t) for draw in draws[:1] for t in _both_sides(prox, draw)]
    worst = max(excess(prox, draw, t) for draw, t in runs)
    if not worst <= TOLERANCE:
        raise DeriveError(
            "E302",
            f"the derived proximal step of {prox.f} is beaten by a grid, by {worst:.2g}",
            hint="please report this function: its derivation is wrong, so no step is emitted",
        )
    worst = worst if worst > 1e-12 else 0.0  # rounding, which differs from machine to machine
    told = f"verified: {len(runs)} x {POINTS} points against a grid of {GRID}, worst excess {worst:.1e}"
    return replace(prox, proof=f"{prox.proof}; {told}")


def _both_sides(prox: ScalarProx, draw: dict[sp.Basic, sp.Expr]) -> list[float]:
    """Steps below and above 1/rho, for candidates; a threshold form is for steps below it alone."""
    rho = float(prox.curvature.rho.xreplace(draw)) if prox.mode == "candidates" else 0.0
    return [0.9 / rho, 1.2 / rho] if 0 < rho < np.inf else []


def excess(prox: ScalarProx, draw: dict[sp.Basic, sp.Expr], t: float) -> float:
    """Most by which a grid point, or a neighbour, beats the prox; relative to 1 + its value. NaN counts as infinite."""
    if prox.mode == "threshold" and not prox.curvature.convex:
        t = min(t, 0.9 / float(prox.curvature.rho.xreplace(draw)))
    lo, hi = (float(e.xreplace(draw)) for e in prox.domain)
    f = objective(prox.f.xreplace(draw), prox.u, lo, hi)
    run = _evaluated(prox, draw, t)
    knots = np.array([float(k.at.xreplace(draw)) for k in prox.knots if k is not None])
    spread = 3.0 * max([1.0, *np.abs(knots)])
    v = np.linspace(-spread - 0.013, spread, POINTS)
    v = np.concatenate([v, _that_matter(prox, draw, t, knots), _takeovers(run, v)])
    z = run(v)
    inside = np.clip(z, lo, hi)  # an end of a box may be missed by rounding
    if not (np.abs(z - inside) <= 1e-12 * (1 + np.abs(v))).all():
        return float("inf")
    z = inside
    reach = np.linspace(-2 * spread, 2 * spread, GRID)
    grid = np.unique(np.concatenate([reach, knots, -knots, np.geomspace(1e-6, spread, 64)]))
    near = z[:, None] + np.array([-1e-4, -1e-6, 1e-6, 1e-4])
    rivals = np.concatenate([np.broadcast_to(grid, (v.size, grid.size)), near, -z[:, None]], axis=1)
    found = t * f(z) + (z - v) ** 2 / 2
    best = (t * f(rivals) + (rivals - v[:, None]) ** 2 / 2).min(axis=1)
    gap = (found - best) / (1 + np.abs(best))
    return float("inf") if np.isnan(gap).any() else float(gap.max())


def _evaluated(prox: ScalarProx, draw: dict[sp.Basic, sp.Expr], t: float) -> Callable[[np.ndarray], np.ndarray]:
    """The emitted source at a draw of the scalars."""
    import torch

    step = (t,) if prox.t in prox.scalars else ()
    scalars = {str(s): float(draw[s]) for s in prox.scalars if s != prox.t}
    return lambda v: prox(torch.from_numpy(v), *step, **scalars).numpy()


def _that_matter(prox: ScalarProx, draw: dict[sp.Basic, sp.Expr], t: float, knots: np.ndarray) -> np.ndarray:
    """0, the breakpoints and the ends of the stretches of v for which a breakpoint is returned; both signs, and beside each."""
    values = {**draw, prox.t: sp.Float(t)}
    switches = [e.xreplace(values) for k in prox.knots if k is not None for e in (k.below, k.above)]
    ends = [float(e) for e in switches if e.is_number and e.is_finite]
    points = np.unique(np.concatenate([[0.0], knots, ends]))
    points = np.concatenate([points, -points])
    return np.concatenate([points, points - 1e-7, points + 1e-7])


def _takeovers(run: Callable[[np.ndarray], np.ndarray], v: np.ndarray) -> np.ndarray:
    """Both sides of the points between neighbours of v at which the prox jumps: the widest step of parts of parts."""
    z = run(v)
    jump = np.flatnonzero(np.abs(np.diff(z)) > 4 * np.diff(v))
    left, right = v[jump], v[jump + 1]
    for _ in range(ROUNDS if jump.size else 0):
        points = np.linspace(left, right, PARTS + 1, axis=1)
        steps = np.abs(np.diff(run(points.ravel()).reshape(points.shape), axis=1))
        at = steps.argmax(axis=1)[:, None]
        left, right = (np.take_along_axis(points, at + k, axis=1)[:, 0] for k in (0, 1))
    return np.concatenate([left, right])


def objective(f: sp.Expr, u: sp.Symbol, lo: float, hi: float) -> Any:
    """f as a numpy function, +inf outside [lo, hi]; where the formula has no value at a point, a value next to it."""
    raw = sp.lambdify(u, f, NUMPY)

    def value(z: np.ndarray) -> np.ndarray:
        z = np.asarray(z, dtype=float)
        with np.errstate(all="ignore"):
            y = np.asarray(raw(z), dtype=float) + np.zeros_like(z)
            near = np.clip(z, lo + 1e-300 if lo == 0 else lo + 1e-12, hi - 1e-12)
            y = np.where(np.isnan(y), np.asarray(raw(near), dtype=float) + np.zeros_like(z), y)
        return np.where((z < lo) | (z > hi) | np.isnan(y), np.inf, y)

    return value
