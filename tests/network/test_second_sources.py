"""Objectives of the library against programs of others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.svm import OneClassSVM

import unroll

D = torch.float64


@pytest.mark.parametrize("nu", [0.3, 0.8])
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
