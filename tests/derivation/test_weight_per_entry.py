"""A step for each entry in front of a letter: against the step by hand, against a grid, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

D = torch.float64
FIT = "1/2*sumsq(x - A @ z)"


def network(term: str, z: str, weights: str = "1 / (1 + abs(grad(f, z)))", dtype: torch.dtype = D, **more: Any) -> Any:
    text = {
        "algorithm": "own", "solves": "f(z) + g(z)", "scalars": {"step": "1 / L(f)"}, "updates": {"q": weights, "z": z}
    }  # fmt: skip
    spec = {
        "dims": {"m": 6, "n": 9}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": 0.1}, "minimize": {"fit": FIT, "term": term}, "algorithms": {"own": text},
        "unroll": {"algorithm": "own", "layers": 3, "split": {"g": ["term", *(["constraint"] if "constraints" in more else [])]}}, **more,
    }  # fmt: skip
    return unroll.compile(spec, parameters={"A": matrix().to(dtype)}, dtype=dtype)


def matrix() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 9, dtype=D)


def samples() -> Tensor:
    """A blank one among others."""
    torch.manual_seed(1)
    x = torch.randn(4, 6, dtype=D)
    x[1] = 0
    return x


SHRINK = lambda v, t: v.sign() * (v.abs() - 0.1 * t).clamp_min(0)
TERMS: dict[str, Any] = {
    "lam*norm1(z)": SHRINK,
    "lam*sumsq(z)": lambda v, t: v / (1 + 0.2 * t),
    "lam*norm1(z) + 1/2*sumsq(z)": lambda v, t: SHRINK(v, t) / (1 + t),
    "lam*norm1(z) - 0.3*sum(z)": lambda v, t: SHRINK(v + 0.3 * t, t),
    "lam*sum(sqrt(1 + z**2))": None,
}


def by_search(v: Tensor, t: Tensor) -> Tensor:
    """argmin of t lam sqrt(1 + u^2) + (u - v)^2 / 2, by bisection of its slope."""
    low, high = v - t, v + t
    for _ in range(80):
        middle = (low + high) / 2
        above = 0.1 * t * middle / (1 + middle**2).sqrt() + middle - v > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


@pytest.mark.parametrize("term", TERMS)
def test_a_step_for_each_entry_is_the_scalar_step_of_each(term: str) -> None:
    net, x, a = network(term, "prox(step * q * g, z - step * q * grad(f, z))"), samples(), matrix()
    step, prox = 1 / torch.linalg.matrix_norm(a, 2) ** 2, TERMS[term] or by_search
    z = torch.zeros(4, 9, dtype=D)
    for _ in range(3):
        slope = (z @ a.T - x) @ a
        t = step / (1 + slope.abs())
        z = prox(z - t * slope, t)
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-10)
    assert net(x)[0].abs().max() > 0 and net(x[:0]).shape == (0, 9)


def test_bounds_are_kept_and_division_is_by_each_entry() -> None:
    z = "prox(g / q, z - step * grad(f, z))"
    net, x, a = network("lam*norm1(z)", z, "1 + abs(grad(f, z))", constraints=["z >= 0"]), samples(), matrix()
    step, found = 1 / torch.linalg.matrix_norm(a, 2) ** 2, torch.zeros(4, 9, dtype=D)
    for _ in range(3):
        slope = (found @ a.T - x) @ a
        found = (found - step * slope - 0.1 / (1 + slope.abs())).clamp_min(0)
    torch.testing.assert_close(net(x), found, rtol=1e-10, atol=1e-10)
    assert (found > 0).any()


def test_equal_weights_are_one_number() -> None:
    x = samples()
    one = network("lam*norm1(z)", "prox(2 * step * g, z - step * grad(f, z))")(x)
    each = network("lam*norm1(z)", "prox(step * q * g, z - step * grad(f, z))", "2 + 0 * z")
    torch.testing.assert_close(each(x), one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("term", ["norm2(z)", "1/2*sumsq(A @ z)", "tv(z)", "norm_inf(z)"])
def test_a_term_that_joins_entries_takes_none(term: str) -> None:
    with pytest.raises(UnrollError, match="joins entries"):
        network(term, "prox(step * q * g, z)")


@pytest.mark.parametrize(
    ("z", "code"), [("prox(grad(f, z) @ grad(f, z).T * g, z)", "E131"), ("prox(q * conj(g), z)", "E131")]
)
def test_what_is_no_weight_of_entries_is_refused(z: str, code: str) -> None:
    with pytest.raises(UnrollError, match=code):
        network("lam*norm1(z)", z)


@pytest.mark.parametrize(
    ("size", "shape", "says"), [(["n"], ["m"], "every entry of Z"), (["n", "m"], ["n", "m"], "every row of Z")]
)
def test_a_learned_threshold_of_another_shape_is_told_what_there_is(
    size: list[str], shape: list[str], says: str
) -> None:
    spec = {
        "dims": {"m": 6, "n": 9}, "variables": {"Z": size}, "inputs": {"x": size}, "minimize": {"fit": "1/2*sumsq(x - Z)", "term": "lam*norm1(Z)"},
        "scalars": {"lam": 0.1}, "unroll": {"algorithm": "proximal_gradient", "layers": 2, "learn": {"theta": {"replaces": "lam", "shape": shape}}},
    }  # fmt: skip
    with pytest.raises(UnrollError, match=rf"E306(.|\n)*shape: \[n\] gives {says} its own"):
        unroll.compile(spec)
