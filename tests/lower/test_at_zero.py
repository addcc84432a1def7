"""Norms, their powers, and unit vectors at 0: slope 0, where autograd of the written formula gives nan; elsewhere autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll

D = torch.float64
X0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=D)  # tokens by features: X is 3 x 4


def root(x: Tensor, p: float) -> Tensor:
    return x**p


TERMS: dict[str, Any] = {
    "norm_fro(X)": lambda x: x.norm(),
    "norm_fro(X)**1.5": lambda x: x.norm() ** 1.5,
    "norm_fro(X)**0.5": lambda x: x.norm() ** 0.5,
    "norm_fro(X)**3 + norm_fro(X)": lambda x: x.norm() ** 3 + x.norm(),
    "sqrt(norm1(X))": lambda x: x.abs().sum() ** 0.5,
    "norm4(X)": lambda x: (x**4).sum() ** 0.25,
    "sqrt(trace(X.T @ X))": lambda x: x.norm(),
    "sqrt(trace(X @ X.T))**3": lambda x: x.norm() ** 3,
    "sum(sqrt(abs(X)))": lambda x: x.abs().sqrt().sum(),
    "sum(sqrt(sum(X**2 + abs(X), axis=0)))": lambda x: (x**2 + x.abs()).sum(1).sqrt().sum(),
    "group_norm(X, axis=0)": lambda x: x.norm(dim=1).sum(),
    "sum(sqrt(sum(X**2, axis=1))**1.5)": lambda x: (x.norm(dim=0) ** 1.5).sum(),
    "spectral(X)": lambda x: torch.linalg.matrix_norm(x, 2),
    "spectral(X)**1.5": lambda x: torch.linalg.matrix_norm(x, 2) ** 1.5,
    "nuclear(X)": lambda x: torch.linalg.matrix_norm(x, "nuc"),
    "spectral_sum(sqrt(s), X)": lambda x: torch.linalg.svdvals(x).sqrt().sum(),
    "sum(normalize(X, axis=0)**3)": lambda x: ((x / x.norm(dim=1, keepdim=True)) ** 3).sum(),
    "sum(normalize(X, axis=1)**3)": lambda x: ((x / x.norm(dim=0)) ** 3).sum(),
    "sum((X / norm_fro(X))**3)": lambda x: ((x / x.norm()) ** 3).sum(),
    "sum(unit_norm(X, axis=0, eps=0.001)**3)": lambda x: (torch.nn.functional.normalize(x, dim=1, eps=0.001) ** 3).sum(),
}  # fmt: skip


def loss_of(term: str) -> Any:
    return unroll.loss({"dims": {"a": 3, "b": 4}, "variables": {"X": ["a", "b"]}, "minimize": {"f": term}})


@pytest.mark.parametrize("term", TERMS)
def test_the_slope_is_that_of_autograd_and_zero_at_zero(term: str) -> None:
    net = loss_of(term)
    x = X0.clone().requires_grad_()
    value = net(x)
    assert torch.allclose(value, TERMS[term](x))
    want = torch.autograd.grad(TERMS[term](x), x)[0]
    assert torch.allclose(torch.autograd.grad(value, x)[0], want, atol=1e-10)
    zero = torch.zeros_like(X0, requires_grad=True)
    at_zero = net(zero)
    assert at_zero.item() == 0
    assert (torch.autograd.grad(at_zero, zero)[0] == 0).all()


@pytest.mark.parametrize(
    "term", ["group_norm(X, axis=0)", "sum(normalize(X, axis=0)**3)", "sum(sqrt(sum(X**2 + abs(X), axis=0)))"]
)
def test_a_token_of_zeros_leaves_the_slopes_of_the_others_alone(term: str) -> None:
    net = loss_of(term)
    x = X0.clone()
    x[1] = 0
    x.requires_grad_()
    slope = torch.autograd.grad(net(x), x)[0]
    kept = X0[[0, 2, 3]].clone().requires_grad_()
    want = torch.autograd.grad(TERMS[term](kept), kept)[0]
    assert torch.allclose(slope[[0, 2, 3]], want, atol=1e-10) and (slope[1] == 0).all()


def test_a_nan_stays_one() -> None:
    for term in TERMS:
        if "spectral" not in term and "nuclear" not in term:
            assert loss_of(term)(torch.full_like(X0, torch.nan)).isnan()


def test_a_root_at_the_edge_of_its_domain_keeps_its_infinite_slope() -> None:
    """sqrt(z) itself has no least value but an edge there: no slope is made up."""
    spec = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "minimize": {"f": "sum(sqrt(z))"}}
    z = torch.zeros(3, dtype=D, requires_grad=True)
    assert torch.autograd.grad(unroll.loss(spec)(z), z)[0].isinf().all()


@pytest.mark.parametrize("size", ["sumsq", "norm_inf", "norm2"])
def test_a_root_of_a_difference_of_sizes_keeps_its_infinite_slope(size: str) -> None:
    """What is under it is 0 where the sizes are equal, and less beyond: an edge too."""
    spec = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"y": ["n"]}, "minimize": {"f": f"sqrt({size}(y) - {size}(z))"}}  # fmt: skip
    z = torch.full((3,), 2.0, dtype=D, requires_grad=True)
    assert torch.autograd.grad(unroll.loss(spec)(z, z.detach()), z)[0].isinf().any()


def on_the_sphere(**unrolled: Any) -> dict[str, Any]:
    return {
        "dims": {"d": 3, "N": 4}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]}, "parameters": {"A": ["d", "d"]},
        "minimize": "1/2*sumsq(Z - A @ X)", "constraints": ["Z in sphere"],
        "unroll": {"algorithm": "projected_gradient", "layers": 2, "step": 0.5, "learn": {"W": {"replaces": "A"}}, **unrolled},
    }  # fmt: skip


def test_zero_stays_zero_on_the_sphere_and_nobody_else_is_touched() -> None:
    net = unroll.compile(on_the_sphere(), dtype=D, seed=0)
    x = X0.clone()
    x[1] = 0
    found = net(x)
    assert (found[1] == 0).all() and torch.allclose(found[[0, 2, 3]].norm(dim=1), torch.ones(3, dtype=D))
    assert torch.allclose(found[[0, 2, 3]], net(X0)[[0, 2, 3]])
    slope = torch.autograd.grad(found.pow(3).sum(), net.W)[0]
    assert torch.allclose(slope, torch.autograd.grad(net(X0)[[0, 2, 3]].pow(3).sum(), net.W)[0])
    assert sum(net.objective(Z=found, X=x).values()).isinf(), "0 is not on the sphere, and the objective says so"


@pytest.mark.parametrize("term", ["group_norm(normalize(X, axis=0), axis=1)", "group_norm(X / (2*norm1(X)), axis=1)"])
def test_a_row_of_zeros_leaves_the_slopes_of_the_others_alone(term: str) -> None:
    """Squares over a sum of squares, which may be 0: under the root they are not less than 0."""
    x = X0.clone()
    x[:, 1] = 0
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(term)(x), x)
    kept = X0[:, [0, 2]].clone().requires_grad_()
    y = kept / kept.norm(dim=1, keepdim=True) if "normalize" in term else kept / (2 * kept.abs().sum())
    (want,) = torch.autograd.grad(y.norm(dim=0).sum(), kept)
    assert torch.allclose(slope[:, [0, 2]], want, atol=1e-10) and slope[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("formula", "there", "elsewhere"),
    [
        ("where(norm2(z) == 0, 5, 1)", 5, 1),
        ("where(norm2(z) <= 0, 5, norm2(z))", 5, 2),
        ("where(norm2(z) > 0, 3, 7) + norm2(z)", 7, 5),
        ("rank(z)", 0, 1),
    ],
)
def test_whether_a_length_is_zero_is_asked(formula: str, there: float, elsewhere: float) -> None:
    """It was taken for positive, and the question left out."""
    loss = unroll.loss({"dims": {"m": 4}, "variables": {"z": ["m"]}, "minimize": {"f": formula}})
    found = [float(loss(x * torch.ones(4, dtype=torch.float64))) for x in (0, 1)]
    assert found == [there, elsewhere]
