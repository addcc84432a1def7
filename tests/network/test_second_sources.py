"""Objectives of the library against programs of others."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.svm import OneClassSVM

import unroll

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

D = torch.float64


@pytest.mark.parametrize("nu", [0.5, 0.8])
def test_one_class_is_that_of_scikit_learn(nu: float) -> None:
    """Its weights sum to nu n, ours to 1."""
    n = 30
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=D) + 1
    ours = unroll.solve({"use": "one_class", "dims": {"d": 2, "n": n}}, x, scalars={"nu": nu}).z
    theirs = OneClassSVM(kernel="linear", nu=nu, tol=1e-10).fit(x.numpy())
    weights = np.zeros(n)
    weights[theirs.support_] = theirs.dual_coef_[0] / (nu * n)
    assert abs(float(ours.sum()) - 1) < 1e-12 and float(ours.max()) <= 1 / (nu * n) + 1e-12
    cost = lambda a: float((x.T @ torch.as_tensor(a)).square().sum() / 2)
    assert abs(cost(ours) - cost(weights)) < 1e-8
    torch.testing.assert_close(x.T @ ours, x.T @ torch.as_tensor(weights), rtol=1e-4, atol=1e-4)


def transported(layers: int | None) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    price, a, b = (torch.rand(*s, generator=g, dtype=D) for s in ((6, 4), (3, 6), (3, 4)))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    spec = {"use": "entropic_transport", "dims": {"n": 6, "m": 4}}
    if layers is None:
        return (
            price,
            a,
            b,
            unroll.solve(spec, a, b, parameters={"C": price}, algorithm="bregman_projections").values["P"],
        )
    unrolled = {**spec, "unroll": {"algorithm": "bregman_projections", "layers": layers}}
    return price, a, b, unroll.compile(unrolled, parameters={"C": price}, dtype=D)(a, b)


def test_bregman_projections_of_two_marginals_are_the_loop_of_sinkhorn() -> None:
    price, a, b, found = transported(3)
    kernel, u = torch.exp(-price / 0.1), 1 / torch.exp(-price / 0.1).sum(-1) * a
    for _ in range(2):
        u = a / (b / (u @ kernel) @ kernel.T)
    plan = u[..., None] * kernel * (b / (u @ kernel))[..., None, :]
    torch.testing.assert_close(found.mT, plan, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("dtype", "close"), [(D, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("eps", [0.1, 0.005, 0.0005])
def test_little_entropy_does_not_underflow(eps: float, dtype: torch.dtype, close: float) -> None:
    """exp(-C / eps) is 0 in float32 from C = 88 eps on, in float64 from 745 eps: held against potentials and their logarithms."""
    g = torch.Generator().manual_seed(1)
    price, a, b = (torch.rand(*s, generator=g, dtype=D) for s in ((6, 4), (3, 6), (3, 4)))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    spec = {
        "use": "entropic_transport", "dims": {"n": 6, "m": 4}, "scalars": {"eps": eps},
        "unroll": {"algorithm": "bregman_projections", "layers": 100},
    }  # fmt: skip
    found = unroll.compile(spec, parameters={"C": price}, dtype=dtype)(a.to(dtype), b.to(dtype)).to(D)
    left, right = torch.zeros(3, 6, dtype=D), torch.zeros(3, 4, dtype=D)
    for _ in range(100):
        left = eps * (a.log() - ((right[:, None] - price) / eps).logsumexp(-1))
        right = eps * (b.log() - ((left[..., None] - price) / eps).logsumexp(-2))
    plan = ((left[..., None] + right[:, None] - price) / eps).exp()
    torch.testing.assert_close(found.mT, plan, rtol=0, atol=close)
    torch.testing.assert_close(found.sum(-1), b, rtol=0, atol=close)  # P is stored columns first


def test_entropic_transport_is_that_of_cvxpy() -> None:
    price, a, b, found = transported(None)
    for p, q, plan in zip(a.numpy(), b.numpy(), found.mT, strict=True):
        z = cp.Variable((6, 4))
        cost = cp.sum(cp.multiply(price.numpy(), z)) - 0.1 * cp.sum(cp.entr(z))
        cp.Problem(cp.Minimize(cost), [cp.sum(z, axis=1) == p, cp.sum(z, axis=0) == q]).solve(solver=cp.CLARABEL)
        assert np.abs(z.value - plan.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "close"), [(D, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_a_bin_without_mass_moves_nothing_and_has_a_slope(dtype: torch.dtype, close: float) -> None:
    spec = {
        "use": "entropic_transport", "dims": {"n": 2, "m": 2}, "unroll": {"algorithm": "bregman_projections", "layers": 4},
    }  # fmt: skip
    net = unroll.compile(spec, parameters={"C": torch.tensor([[0.1, 0.9], [0.4, 0.2]])}, dtype=dtype)
    a = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    b = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0]], dtype=dtype)
    found = net(a, b)  # P is stored columns first
    assert (found[0, :, 0] == 0).all() and (found[2] == 0).all()
    forced = torch.tensor([[[0, 0.5], [0, 0.5]], [[0, 0], [0, 0]], [[0, 0], [1, 0]]], dtype=dtype)
    torch.testing.assert_close(found[[0, 2, 3]], forced, rtol=0, atol=close)
    torch.testing.assert_close(found.sum(-1), b, rtol=0, atol=close)
    assert torch.autograd.grad(found.square().sum(), a)[0].isfinite().all()


@pytest.mark.parametrize("sets", [["P <= 1", "sum(P, axis=0) == b"], ["sum(P, axis=0) == b"]])
def test_bregman_projections_refuse_what_is_no_pair_of_sums(sets: list[str]) -> None:
    spec = {
        "use": "entropic_transport",
        "constraints": sets,
        "unroll": {"algorithm": "bregman_projections", "layers": 1},
    }
    with pytest.raises(unroll.UnrollError, match="E303|E1"):
        unroll.derive(spec)
