"""Objectives of the library with an algorithm that fits: the optimum is that of CVXPY, of scikit-learn, or of a formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unroll

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp
    from sklearn.covariance import graphical_lasso
    from sklearn.svm import SVC

D = torch.float64
EXACT = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def net(name: str, algorithm: str, layers: int, *more: str, **given: Any) -> Any:
    ways = [f"unroll.algorithm={algorithm}", f"unroll.layers={layers}", *more]
    return unroll.compile(name, overrides=ways, dtype=D, **given)


def test_total_variation_denoising_is_exact_in_one_layer() -> None:
    x = draw(2, 40).cumsum(-1)
    found = net("total_variation_denoising", "proximal_gradient", 1, "unroll.step=1", dims={"n": 40})(x)
    z = cp.Variable(40)
    for sample, own in zip(x, found, strict=True):
        cp.Problem(cp.Minimize(cp.sum_squares(z - sample.numpy()) / 2 + 0.5 * cp.tv(z))).solve(**EXACT)
        assert np.abs(z.value - own.numpy()).max() < 1e-6


def test_graph_smoothing_solves_its_linear_system() -> None:
    x, nodes = draw(3, 6), torch.eye(6, dtype=D)
    edges = torch.stack([nodes[a] - nodes[b] for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5))])
    found = net("graph_smoothing", "gradient_descent", 150, parameters={"B": edges})(x)
    assert torch.allclose(found, torch.linalg.solve(nodes + edges.T @ edges, x.T).T, atol=1e-10)


Convex = tuple[dict[str, Any], dict[str, Tensor], tuple[int, int], Callable[..., Any]]
a = draw(6, 9, seed=1) / 2
CONVEX: dict[str, tuple[str, str, int, Convex]] = {
    "matrix_completion": ("matrix_completion", "proximal_gradient", 600, (
        {"dims": {"m": 5, "n": 4}}, {"X": draw(1, 4, 5), "M": (draw(1, 4, 5, seed=2) > -0.3).to(D)}, (5, 4),
        lambda z, X, M: cp.sum_squares(cp.multiply(M.T, X.T - z)) / 2 + 0.1 * cp.normNuc(z),
    )),
    "matrix_completion, split": ("matrix_completion", "admm", 600, (
        {"dims": {"m": 5, "n": 4}}, {"X": draw(1, 4, 5), "M": (draw(1, 4, 5, seed=2) > -0.3).to(D)}, (5, 4),
        lambda z, X, M: cp.sum_squares(cp.multiply(M.T, X.T - z)) / 2 + 0.1 * cp.normNuc(z),
    )),
    "group_infinity": ("group_infinity", "fista", 600, (
        {"dims": {"T": 3}, "parameters": {"A": a}}, {"X": draw(1, 3, 6)}, (9, 3),
        lambda z, X: cp.sum_squares(X.T - a.numpy() @ z) / 2 + 0.1 * cp.sum(cp.max(cp.abs(z), axis=1)),
    )),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVEX)
def test_a_convex_objective_comes_to_the_optimum_of_cvxpy(case: str) -> None:
    name, algorithm, layers, (given, inputs, shape, cost) = CONVEX[case]
    made = net(name, algorithm, layers, **given)
    found = made(*inputs.values())
    z = cp.Variable(shape)
    best = cp.Problem(cp.Minimize(cost(z, **{k: v[0].numpy() for k, v in inputs.items()}))).solve(**EXACT)
    assert float(made.objective(*inputs.values(), Z=found)["total"]) - best <= 1e-6 * abs(best)


@pytest.mark.parametrize("algorithm", ["davis_yin"])
def test_the_dual_of_a_support_vector_machine_is_that_of_scikit_learn(algorithm: str) -> None:
    features = draw(24, 2)
    labels = torch.where(features[:, 0] + 0.4 * draw(24, seed=1) > 0, 1.0, -1.0).to(D)
    made = net("svm_dual", algorithm, 3000, "unroll.split={f: [constraint]}", dims={"n": 24, "d": 2})
    alpha = made(features[None], labels[None])[0]
    machine = SVC(kernel="linear", C=1.0, tol=1e-10).fit(features.numpy(), labels.numpy())
    normal = (alpha * labels) @ features
    assert np.abs(normal.numpy() - machine.coef_[0]).max() < 1e-5
    assert alpha.min() >= -1e-9 and alpha.max() <= 1 + 1e-9 and abs(alpha @ labels) < 1e-7


def test_a_sparse_inverse_covariance_is_that_of_scikit_learn() -> None:
    samples = draw(60, 5) @ draw(5, 5, seed=1) / 2
    cov = samples.T.cov()
    start = "unroll.start={X: I(n)}"
    found = net("sparse_inverse_covariance", "douglas_rachford", 600, start, dims={"n": 5})(cov[None])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own gap counts the diagonal, of which it takes no absolute value
        _, want = graphical_lasso(cov.numpy() + 0.1 * np.eye(5), 0.1, mode="lars", max_iter=50)
    assert np.abs(found.numpy() - want).max() < 1e-8
    assert torch.equal(found, found.T) or torch.allclose(found, found.T, atol=1e-12)


def test_phase_retrieval_finds_the_signal_or_its_negative() -> None:
    m, truth = draw(60, 6, seed=3), draw(1, 6, seed=4)
    x = (truth @ m.T).square()
    made = net("phase_retrieval", "gradient_descent", 1500, "unroll.step=0.0002", parameters={"A": m})
    top = torch.linalg.eigh(m.T @ (x[0][:, None] * m)).eigenvectors[:, -1] * (x.mean() ** 0.5)  # the spectral start
    found = made(x, z=top[None])
    assert min((found - truth).norm(), (found + truth).norm()) < 1e-8
