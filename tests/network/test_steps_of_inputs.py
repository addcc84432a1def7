"""A step 1/L whose L is worked out from an input: where a sample makes L 0 its smooth part is constant, and any step does."""

import copy
from typing import Any

import pytest
import torch

import unroll

SOFT = {"sparsity": "lam * norm1(z)"}
MASK: dict[str, Any] = {
    "dims": {"n": 4}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"], "w": ["n"]}, "scalars": {"lam": 0.3},
    "minimize": {"fit": "1/2 * sumsq(w * (x - z))", **SOFT},
}  # fmt: skip
OPERATOR: dict[str, Any] = {
    "dims": {"n": 4, "m": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"], "w": ["m", "n"]}, "scalars": {"lam": 0.3},
    "minimize": {"fit": "1/2 * sumsq(x - w @ z)", **SOFT},
}  # fmt: skip
CURVED = {**OPERATOR, "minimize": {"fit": "sum(huber(x - w @ z, 1))", **SOFT}}


def drawn(spec: dict[str, Any], dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Three samples; of the second nothing is seen."""
    g = torch.Generator().manual_seed(0)
    sizes = [tuple(spec["dims"][d] for d in axes) for axes in spec["inputs"].values()]
    x, w = (torch.randn(3, *shape, generator=g, dtype=torch.float64) for shape in (sizes[0], sizes[1][::-1]))
    w[1] *= scale
    return x.to(dtype), w.to(dtype)


@pytest.mark.parametrize("algorithm", ["proximal_gradient", "fista"])
@pytest.mark.parametrize("spec", [MASK, OPERATOR, CURVED], ids=["mask", "operator", "curved"])
def test_a_sample_of_which_nothing_is_seen_takes_the_prox_alone_and_the_others_do_not_notice(spec, algorithm):
    net = unroll.compile({**spec, "unroll": {"algorithm": algorithm, "layers": 4, "step": "1.5/L"}})
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for scale in (0.0, 0.02 * torch.finfo(dtype).tiny ** 0.5):  # whose square is too small to divide by
            x, w = drawn(spec, dtype, scale)
            x.requires_grad_()
            own = copy.deepcopy(net).to(dtype)
            start = torch.full((3, 4), 2.0, dtype=dtype)
            z = own(x, w, z=start)
            assert z.isfinite().all() and (z[1].abs() <= start[1]).all()
            assert (own(x, w)[1] == 0).all()
            alone = own(x[::2], w[::2], z=start[::2])
            assert torch.allclose(z[::2], alone, atol=50 * torch.finfo(dtype).eps)
            z.sum().backward()
            assert x.grad is not None and x.grad.isfinite().all()
            trace = own.trace(x, w)
            assert all(t.isfinite().all() for t in trace.terms.values())


@pytest.mark.parametrize("spec", [MASK, OPERATOR, CURVED], ids=["mask", "operator", "curved"])
def test_solve_finds_0_where_nothing_is_seen(spec):
    x, w = drawn(spec, torch.float64, 0.0)
    found = unroll.solve(spec, x, w)
    assert found.converged.all() and found.error[1] == 0 and (found.z[1] == 0).all() and (found.z[0] != 0).any()


def test_a_step_that_no_input_decides_is_written_as_before():
    assert "nonzero" not in str(unroll.derive("lista")) and "finfo" not in unroll.compile("lista").source
    text = str(unroll.derive({**MASK, "unroll": {"algorithm": "fista", "layers": 1}}))
    assert "step = 1/nonzero(L)" in text


def test_a_variable_that_starts_at_0_makes_no_step_infinite():
    """L of one variable is decided by the other in alternating minimisation."""
    spec = {
        "dims": {"n": 4, "m": 3, "T": 5}, "variables": {"Z": ["n", "T"], "D": ["m", "n"]}, "inputs": {"X": ["m", "T"]},
        "scalars": {"lam": 0.3, "mu": 0.1}, "minimize": {"fit": "1/2 * sumsq(X - D @ Z)", "a": "lam * norm1(Z)", "b": "mu * norm1(D)"},
        "unroll": {"layers": 3, "blocks": [
            {"block": "code", "over": "Z", "terms": ["fit", "a"], "algorithm": "proximal_gradient"},
            {"block": "atoms", "over": "D", "terms": ["fit", "b"], "algorithm": "proximal_gradient"},
        ]},
    }  # fmt: skip
    found = unroll.compile(spec)(torch.randn(2, 5, 3))
    assert all((z == 0).all() for z in found)
