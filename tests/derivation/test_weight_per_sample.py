"""A number of each sample in front of a prox: every sample is solved as if that number were a scalar of its spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unroll
from unroll.errors import SpecError

S = torch.tensor([[0.05], [0.4], [1.5]], dtype=torch.float64)
TERMS = (
    "s * norm1(z)", "s * norm2(z)", "s * norm_inf(z)", "s * sum(huber(z, 1))", "s * norm1(z) + 0.1 * norm2(z)", "s * norm1(z) + s * norm2(z)",
    "abs(s) * sum(maximum(z, -2*z))", "exp(s) * norm1(z)", "s**2 * norm1(z - x)", "sum(s * abs(z))",
)  # fmt: skip
OF_MATRICES = ("s * nuclear(z)", "s * group_norm(z, axis=0)", "s * norm1(z)")


def spec(term: str, shape: list[str], **inputs: Any) -> dict[str, Any]:
    return {
        "dims": {"n": 4, "T": 3}, "variables": {"z": shape}, "inputs": {"x": shape, **inputs},
        "minimize": {"f": "1/2*sumsq(x - z)", "g": term}, "unroll": {"algorithm": "proximal_gradient", "layers": 2, "step": 0.7},
    }  # fmt: skip


@pytest.mark.parametrize(("term", "shape"), [*((t, ["n"]) for t in TERMS), *((t, ["n", "T"]) for t in OF_MATRICES)])
def test_a_number_of_each_sample_weighs_as_a_scalar_of_its_own(term: str, shape: list[str]) -> None:
    x = 2 * torch.randn(
        3, *((4,) if len(shape) == 1 else (3, 4)), generator=torch.Generator().manual_seed(0), dtype=S.dtype
    )
    together = unroll.compile(spec(term, shape, s={"shape": [1], "positive": True}), dtype=S.dtype)(x, S)
    for k, s in enumerate(S):
        alone = spec(term, shape) | {"scalars": {"s": {"default": float(s), "positive": True}}}
        assert (together[k] - unroll.compile(alone, dtype=S.dtype)(x[k])).abs().max() < 1e-12
    assert together.abs().max() > 0.01


@pytest.mark.parametrize("term", ["r * norm1(z)", "r * norm2(z)", "sum(r * abs(z))", "r * norm_inf(z)"])
def test_a_weight_that_may_be_negative_is_refused_with_its_remedy(term: str) -> None:
    with pytest.raises(
        SpecError, match=r"r may be negative: declare r: \{shape: \[..\], positive: true\}, or write abs\(r\)"
    ):
        unroll.derive(spec(term, ["n"], r=[1]))


@pytest.mark.parametrize("bound", ["ball2(s)", "ball1(s)", "ball_inf(s)", "box(-s, s)"])
def test_a_set_of_each_sample_is_refused_in_words(bound: str) -> None:
    with pytest.raises(SpecError, match="a number that every sample shares is needed here"):
        unroll.derive(spec("norm1(z)", ["n"], s={"shape": [1], "positive": True}) | {"constraints": [f"z in {bound}"]})
