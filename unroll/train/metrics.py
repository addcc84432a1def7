"""How far codes are from a reference. All take (B, n): one row per sample, its variables side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """All variables of a sample in one row, in the order of their names. {name: (B, ...)} -> (B, n)."""
    return torch.cat([values[name].flatten(1) for name in sorted(values)], dim=1)


def nmse(z: Tensor, ref: Tensor) -> Tensor:
    """NMSE (sum ratio): Σᵢ‖zᵢ − rᵢ‖² / Σᵢ‖rᵢ‖².  0 where both are zero; inf where only the reference is."""
    error, size = (z - ref).square().sum(), ref.square().sum()
    return torch.where(error == 0, error, error / size)


def nmse_mean_db(z: Tensor, ref: Tensor) -> Tensor:
    """NMSE (mean dB): the mean over i of 10 log₁₀(‖zᵢ − rᵢ‖² / ‖rᵢ‖²).

    Samples whose reference is zero have no such ratio and are left out (nan if none remains). A ratio below the square
    of the dtype's resolution counts as that, so that an exact sample does not make the mean -inf.
    """
    error, size = (z - ref).square().sum(-1), ref.square().sum(-1)
    ratio = error[size > 0] / size[size > 0]
    return 10 * ratio.clamp_min(torch.finfo(z.dtype).eps ** 2).log10().mean()


def objective_gap(value: Tensor, best: Tensor) -> Tensor:
    """Objective gap: the mean over i of F(zᵢ) − F(z*ᵢ).  value, best: (B,)."""
    return (value - best).mean()


def support_f1(z: Tensor, ref: Tensor, tol: float = 1e-6) -> Tensor:
    """Support F1: 2 TP / (2 TP + FP + FN) over all entries of all samples; 1 where both supports are empty.

    An entry is in the support if |z| > tol · max|r|, with the maximum over the whole reference.
    """
    level = tol * ref.abs().max()
    found, true = z.abs() > level, ref.abs() > level
    hits = (found & true).sum()
    total = found.sum() + true.sum()
    return torch.where(total == 0, 1.0, 2 * hits.double() / total.clamp_min(1))
