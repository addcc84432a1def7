"""Scalar profiles with their proximal steps in closed form, written down from the literature as a second oracle.

Each row: profile in u with scalars as symbols, domain, `closed(v, t, s)` in numpy (None where there is only a root).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp

u = sp.Symbol("u", real=True)
lam, al, w, eps, gam, kap, y = sp.symbols("lam al w eps gam kap y", positive=True)
a = sp.Symbol("a", positive=True)
lo, hi = sp.symbols("lo hi", real=True)
abs_u, third = sp.Abs(u), sp.Rational(1, 3)
NONZERO = sp.Piecewise((0, sp.Eq(u, 0)), (1, True))


@dataclass(frozen=True)
class Row:
    name: str
    f: sp.Expr
    domain: tuple[Any, Any] = (-sp.oo, sp.oo)
    closed: Callable[[np.ndarray, float, dict[str, float]], np.ndarray] | None = None
    assume: tuple[sp.Basic, ...] = ()
    convex: bool = True


def soft(v: np.ndarray, c: float) -> np.ndarray:
    return np.sign(v) * np.maximum(np.abs(v) - c, 0)


def huber() -> sp.Expr:
    return sp.Piecewise((u**2 / (2 * al), abs_u <= al), (abs_u - al / 2, True))


def mcp() -> sp.Expr:
    return sp.Piecewise((lam * abs_u - u**2 / (2 * gam), abs_u <= gam * lam), (gam * lam**2 / 2, True))


def scad() -> sp.Expr:
    middle = (2 * a * lam * abs_u - u**2 - lam**2) / (2 * (a - 1))
    return sp.Piecewise((lam * abs_u, abs_u <= lam), (middle, abs_u <= a * lam), (lam**2 * (a + 1) / 2, True))


def closed_mcp(v: np.ndarray, t: float, s: dict[str, float]) -> np.ndarray:
    if t >= s["gam"]:
        return v * (np.abs(v) > s["lam"] * np.sqrt(t * s["gam"]))
    inside = soft(v, t * s["lam"]) / (1 - t / s["gam"])
    return np.where(np.abs(v) <= s["gam"] * s["lam"], inside, v)


def closed_half(v: np.ndarray, t: float, s: dict[str, float]) -> np.ndarray:
    c = t * s["lam"]
    with np.errstate(all="ignore"):
        inner = np.clip(-(3 * np.sqrt(3) / 4) * c * np.abs(v) ** -1.5, -1, 1)
        return np.where(np.abs(v) <= 1.5 * c ** (2 / 3), 0, 2 / 3 * v * (1 + np.cos(2 / 3 * np.arccos(inner))))


def closed_truncated(v: np.ndarray, t: float, s: dict[str, float]) -> np.ndarray:
    c = 1 + 2 * t * s["lam"]
    return np.where(np.abs(v) < np.sqrt(s["kap"] * c / s["lam"]), v / c, v)


def closed_scad(v: np.ndarray, t: float, s: dict[str, float]) -> np.ndarray | None:
    a_, l = s["a"], s["lam"]
    if t >= a_ - 1:
        return None
    x = np.abs(v)
    middle = ((a_ - 1) * v - np.sign(v) * a_ * l * t) / (a_ - 1 - t)
    return np.where(x <= (1 + t) * l, soft(v, l * t), np.where(x <= a_ * l, middle, v))


ROWS: tuple[Row, ...] = (
    Row("abs", lam * abs_u, closed=lambda v, t, s: soft(v, t * s["lam"])),
    Row("square", lam * u**2 / 2, closed=lambda v, t, s: v / (1 + t * s["lam"])),
    Row(
        "elastic net",
        lam * abs_u + al * u**2 / 2,
        closed=lambda v, t, s: soft(v, t * s["lam"]) / (1 + t * s["al"]),
    ),
    Row("Huber", huber(), closed=lambda v, t, s: v * (1 - t / np.maximum(np.abs(v), t + s["al"]))),
    Row(
        "berHu",
        sp.Piecewise((abs_u, abs_u <= w), ((u**2 + w**2) / (2 * w), True)),
        closed=lambda v, t, s: np.where(np.abs(v) <= s["w"] + t, soft(v, t), v * s["w"] / (s["w"] + t)),
    ),
    Row("relu", lam * sp.Max(0, u), closed=lambda v, t, s: np.where(v > 0, np.maximum(v - t * s["lam"], 0), v)),
    Row("hinge", lam * sp.Max(0, 1 - u), closed=lambda v, t, s: np.where(v > 1, v, np.minimum(v + t * s["lam"], 1))),
    Row(
        "squared hinge",
        lam * sp.Max(0, 1 - u) ** 2,
        closed=lambda v, t, s: np.where(v >= 1, v, (v + 2 * t * s["lam"]) / (1 + 2 * t * s["lam"])),
    ),
    Row(
        "insensitive",
        lam * sp.Max(0, abs_u - eps),
        closed=lambda v, t, s: np.where(
            np.abs(v) < s["eps"], v, np.sign(v) * np.maximum(s["eps"], np.abs(v) - t * s["lam"])
        ),
    ),
    Row(
        "squared insensitive",
        sp.Max(abs_u - w, 0) ** 2,
        closed=lambda v, t, s: np.where(np.abs(v) < s["w"], v, np.sign(v) * (np.abs(v) + 2 * t * s["w"]) / (1 + 2 * t)),
    ),
    Row(
        "pinball",
        sp.Max(al * u, -lam * u),
        closed=lambda v, t, s: np.maximum(v - t * s["al"], 0) + np.minimum(v + t * s["lam"], 0),
    ),
    Row("box", sp.S.Zero, (lo, hi), closed=lambda v, t, s: np.clip(v, s["lo"], s["hi"])),
    Row("nonneg", sp.S.Zero, (0, sp.oo), closed=lambda v, t, s: np.maximum(v, 0)),
    Row("nonneg linear", lam * u, (0, sp.oo), closed=lambda v, t, s: np.maximum(v - t * s["lam"], 0)),
    Row("abs in a box", lam * abs_u, (-2, 3), closed=lambda v, t, s: np.clip(soft(v, t * s["lam"]), -2, 3)),
    Row("-log", -lam * sp.log(u), closed=lambda v, t, s: (v + np.sqrt(v**2 + 4 * t * s["lam"])) / 2),
    Row("Poisson", u - y * sp.log(u), closed=lambda v, t, s: (v - t + np.sqrt((v - t) ** 2 + 4 * t * s["y"])) / 2),
    Row("log barrier", -lam * (sp.log(u) + sp.log(1 - u))),
    Row("entropy", lam * u * sp.log(u)),
    Row("exp", lam * sp.exp(u)),
    Row("1/z", lam / u, (0, sp.oo)),
    Row("-sqrt", -lam * sp.sqrt(u)),
    Row("power 4/3", lam * abs_u ** sp.Rational(4, 3)),
    Row(
        "power 3/2",
        lam * abs_u ** sp.Rational(3, 2),
        closed=lambda v, t, s: (
            v + 9 * (t * s["lam"]) ** 2 * np.sign(v) / 8 * (1 - np.sqrt(1 + 16 * np.abs(v) / (9 * (t * s["lam"]) ** 2)))
        ),
    ),
    Row(
        "power 3",
        lam * abs_u**3,
        closed=lambda v, t, s: np.sign(v) * (np.sqrt(1 + 12 * t * s["lam"] * np.abs(v)) - 1) / (6 * t * s["lam"]),
    ),
    Row("power 4", lam * u**4),
    Row(
        "Fair",
        abs_u - sp.log(1 + abs_u),
        closed=lambda v, t, s: np.sign(v) * (np.abs(v) - t - 1 + np.sqrt((np.abs(v) - t - 1) ** 2 + 4 * np.abs(v))) / 2,
    ),
    Row("logistic", lam * sp.log(1 + sp.exp(u))),
    Row("pseudo-Huber", lam * sp.sqrt(1 + u**2)),
    Row("log cosh", lam * sp.log(sp.cosh(u))),
    Row("Fermi-Dirac", lam * (u * sp.log(u) + (1 - u) * sp.log(1 - u))),
    Row(
        "L0",
        lam * NONZERO,
        closed=lambda v, t, s: v * (np.abs(v) > np.sqrt(2 * t * s["lam"])),
        convex=False,
    ),
    Row("L0 nonneg", lam * NONZERO, (0, sp.oo), lambda v, t, s: v * (v > np.sqrt(2 * t * s["lam"])), convex=False),
    Row(
        "L0 ridge",
        lam * NONZERO + al * u**2 / 2,
        closed=lambda v, t, s: v / (1 + t * s["al"]) * (np.abs(v) > np.sqrt(2 * t * s["lam"] * (1 + t * s["al"]))),
        convex=False,
    ),
    Row("power 1/2", lam * sp.sqrt(abs_u), closed=closed_half, convex=False),
    Row("power 2/3", lam * abs_u ** sp.Rational(2, 3), convex=False),
    Row("MCP", mcp(), closed=closed_mcp, convex=False),
    Row("SCAD", scad(), closed=closed_scad, assume=(a > 2,), convex=False),
    Row("capped abs", lam * sp.Min(abs_u, w), convex=False),
    Row("truncated square", sp.Min(lam * u**2, kap), closed=closed_truncated, convex=False),
    Row("log-sum", lam * sp.log(1 + abs_u / eps), convex=False),
    Row("Cauchy", lam * sp.log(1 + u**2), convex=False),
    Row("Geman abs", lam * abs_u / (abs_u + gam), convex=False),
    Row("exponential", lam * (1 - sp.exp(-gam * abs_u)), convex=False),
    Row("Welsch", lam * (1 - sp.exp(-(u**2) / 2)), convex=False),
    Row("double well", lam * (u**2 - 1) ** 2, convex=False),
)

UNSEEN: tuple[Row, ...] = (
    Row("l1 + Cauchy", lam * abs_u + al * sp.log(1 + u**2), convex=False),
    Row("power 0.3", lam * abs_u ** sp.Rational(3, 10), convex=False),
    Row("entropy to 1", lam * u * sp.log(u), (0, 1)),
    Row("Poisson + barrier", u - y * sp.log(u) - lam * sp.log(2 - u)),
    Row("four lines", sp.Max(-2 * u - 1, -u, u / 2, 3 * u - 4)),
    Row("exp abs", lam * sp.exp(abs_u)),
    Row("|z^2 - 1|", lam * sp.Abs(u**2 - 1), convex=False),
    Row("min of abs", sp.Min(abs_u, sp.Abs(u - 2)), convex=False),
    Row("shifted abs", lam * sp.Abs(u - al)),
    Row("two abs", lam * abs_u + sp.Abs(u - 1)),
    Row("asymmetric Huber", sp.Piecewise((u**2 / 2, u < 1), (u - sp.Rational(1, 2), True))),
    Row("sinh-like", lam * sp.cosh(u)),
    Row("softplus + l1", sp.log(1 + sp.exp(u)) + lam * abs_u),
    Row("nonneg logistic", lam * sp.log(1 + sp.exp(u)), (0, sp.oo)),
    Row("power 5/4", lam * abs_u ** sp.Rational(5, 4)),
    Row("power 6", lam * u**6),
    Row("log cosh + barrier", sp.log(sp.cosh(u)) - lam * sp.log(u)),
    Row("inverse square", lam / u**2, (0, sp.oo)),
    Row("tilted elastic net in a box", lam * abs_u + al * u**2 / 2 - u / 3, (-1, 2)),
    Row("Geman-McClure", lam * u**2 / (1 + u**2), convex=False),
    Row("L0 in a box", lam * NONZERO, (-1, 2), convex=False),
    Row("deadzone quartic", sp.Max(abs_u - 1, 0) ** 4),
    Row("-log |u|", -lam * sp.log(abs_u), convex=False),
    Row("1/|u|", lam / abs_u, convex=False),
    Row("1/u^2", lam / u**2, convex=False),
)

PEAKED: tuple[sp.Expr, ...] = (
    -lam * abs_u,
    u**2 / 5 - abs_u,
    (u**2 - 1) ** 2,
    sp.Abs(abs_u - 1),
    sp.Abs(u**2 - 1) ** 3,
    -lam * sp.log(abs_u),
    lam / abs_u,
    1 / u**2,
    lam * sp.exp(-abs_u),
    sp.log(1 + u**2) - abs_u,
    sp.Min(sp.Abs(u - 1), sp.Abs(u + 1)),
    sp.Piecewise((2, abs_u < 1), (u**2, True)),
)
"""Even profiles of which 0 is no minimum: the prox of 0 is not 0 for some steps."""
