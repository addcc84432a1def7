"""Sets with dependent equations have a projection; sets without a point are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unroll

D = torch.float64


def spec(constraint: str, n: int = 4, **parts: Any) -> dict[str, Any]:
    return {
        "dims": {"n": n, "k": 3, "m": 2}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": {"f": "1/2*sumsq(x - z)"},
        "constraints": [constraint], "unroll": {"algorithm": "projected_gradient", "layers": 1, "step": 1}, **parts,
    }  # fmt: skip


def on_rows(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = D) -> Any:
    parts = {"parameters": {"A": ["k", "n"], "b": ["k"]}}
    return unroll.compile(spec("z in affine(A, b)", **parts), parameters={"A": a, "b": b}, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_projection_on_dependent_equations_is_that_of_the_independent_ones(
    scale: float, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    a, x = torch.randn(2, 4, generator=g, dtype=D), torch.randn(5, 4, generator=g, dtype=D)
    b = torch.randn(2, generator=g, dtype=D)
    mix = torch.tensor([[1.0, 0], [0, 1], [2, -1]], dtype=D)
    right = x - (x @ a.mT - b) @ torch.linalg.inv(a @ a.mT) @ a
    found = on_rows((scale * mix @ a).to(dtype), (scale * mix @ b).to(dtype), dtype)(x.to(dtype))
    assert torch.allclose(found.double(), right, atol=1e-9 if dtype == D else 1e-4)


def test_equations_of_zeros_leave_everything_as_it_is() -> None:
    x = torch.randn(5, 4, dtype=D)
    assert torch.equal(on_rows(torch.zeros(3, 4, dtype=D), torch.zeros(3, dtype=D))(x), x)


def test_a_system_given_with_each_sample_has_a_gradient_where_rows_depend() -> None:
    parts = {"inputs": {"x": ["n"], "A": ["k", "n"], "b": ["k"]}}
    net = unroll.compile(spec("z in affine(A, b)", **parts), dtype=D)
    a = torch.ones(2, 4, 3, dtype=D, requires_grad=True)
    found = net(torch.ones(2, 4, dtype=D), a, torch.ones(2, 3, dtype=D))
    assert torch.allclose(found.sum(-1), torch.ones(2, dtype=D))
    assert torch.autograd.grad(found.square().sum(), a)[0].isfinite().all()


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        ("z in box(1, 0)", "lower bound 1 is above its upper bound 0"),
        ("z in ball1(-1)", "radius -1 is negative"),
        ("z in ball2(-1)", "radius -1 is negative"),
        ("z in ball_inf(-1)", "radius -1 is negative"),
        ("z in ball2(r)", "radius -2 is negative"),
        ("z in box(0, r)", "lower bound 0 is above its upper bound -2"),
        ("z in box(q, 0)", "lower bound q is above its upper bound 0"),
    ],
)
def test_a_set_without_a_point_is_refused(constraint: str, why: str) -> None:
    with pytest.raises(unroll.UnrollError, match=why):
        unroll.compile(spec(constraint, scalars={"r": -2, "q": 3}))


@pytest.mark.parametrize(
    "together",
    [("z >= 1", "z <= 0"), ("z >= a", "z <= 1"), ("z in box(1/2, 1)", "z in ball_inf(0.2)"), ("z >= 0", "z <= -1"), ("z >= 0", "z in box(-a, -1)"), ("z >= a", "z <= 0")],
)  # fmt: skip
def test_bounds_that_no_point_keeps_together_are_refused(together: tuple[str, str]) -> None:
    for constraints in (together, together[::-1]):
        with pytest.raises(unroll.UnrollError, match="no entry(.|\n)* is at least(.|\n)* and at most"):
            unroll.compile(spec("", constraints=list(constraints), scalars={"a": 2}))


def test_bounds_that_meet_in_a_point_are_a_set() -> None:
    net = unroll.compile(spec("", constraints=["z >= 1", "z <= a"], scalars={"a": 1}), dtype=D)
    assert torch.equal(net(torch.randn(5, 4, dtype=D)), torch.ones(5, 4, dtype=D))


def test_equations_that_contradict_one_another_are_refused() -> None:
    a = torch.ones(3, 4, dtype=D)
    with pytest.raises(unroll.UnrollError, match="no point fulfils .*contradict one another"):
        on_rows(a, torch.tensor([1.0, 1, 2], dtype=D))
    on_rows(a, torch.ones(3, dtype=D))


def test_wide_matrices_are_on_no_stiefel_manifold() -> None:
    wide = {
        "dims": {"n": 2, "N": 3}, "variables": {"Z": ["n", "N"]}, "inputs": {"X": ["n", "N"]}, "minimize": {"f": "1/2*sumsq(X - Z)"},
        "constraints": ["Z in stiefel"], "unroll": {"algorithm": "projected_gradient", "layers": 1, "step": 1},
    }  # fmt: skip
    with pytest.raises(unroll.UnrollError, match="cannot be orthonormal"):
        unroll.compile(wide)


@pytest.mark.parametrize(
    ("constraint", "kept"), [("z in ball1(0)", 0), ("z in ball2(0)", 0), ("z in sparse(9)", 4), ("z in box(0, 0)", 0)]
)
def test_the_smallest_and_the_largest_sets_are_no_special_case(constraint: str, kept: int) -> None:
    net = unroll.compile(spec(constraint), dtype=D)
    found = net(torch.ones(2, 4, dtype=D))
    assert int((found != 0).sum()) == 2 * kept


def test_equations_over_a_size_that_only_the_samples_say() -> None:
    spec = {
        "objective": "own", "dims": {"N": "dynamic"}, "variables": {"w": ["N"]}, "inputs": {"y": ["N"]},
        "minimize": "1/2 * sumsq(w - y)", "constraints": ["sum(w) == 1"], "unroll": {"algorithm": "projected_gradient", "layers": 1},
    }  # fmt: skip
    y = torch.randn(2, 5)
    torch.testing.assert_close(unroll.compile(spec)(y), y + (1 - y.sum(-1, keepdim=True)) / 5)
