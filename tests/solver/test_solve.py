"""Solving to convergence: the answer of other people's solvers, problem by problem of a batch."""

import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

from unroll.errors import UnrollError
from unroll.solver.solve import iterate, solve


def draw(m, n, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = nn.functional.normalize(torch.randn(m, n, generator=g, dtype=torch.float64), dim=0)
    z = torch.randn(count, n, generator=g, dtype=torch.float64) * (torch.rand(count, n, generator=g) < 0.1)
    return A, z @ A.mT + 0.01 * torch.randn(count, m, generator=g, dtype=torch.float64)


def sklearn_lasso(A, x, lam):
    model = Lasso(alpha=lam / len(x), fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.from_numpy(model.fit(A.numpy(), x.numpy()).coef_)


def test_the_fixed_point_of_a_linear_map_is_found_row_by_row():
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    M = (Q * torch.linspace(0, 0.99, 6)) @ Q.mT  # as a gradient step with step 1/L: symmetric, eigenvalues in 0 .. 1
    c = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z, residual, count = iterate(lambda z, rows: z @ M + c[rows], torch.zeros(5, 6, dtype=torch.float64), 1e-12, 10_000)
    assert torch.allclose(z, torch.linalg.solve(torch.eye(6) - M, c.mT).mT, atol=1e-9)
    assert residual.max() <= 1e-12 and count < 10_000


def test_rows_do_not_disturb_each_other():
    A, x = draw(20, 40, 6)
    alone = torch.stack([solve("lasso", row, parameters={"A": A}, scalars={"lam": 0.1}, tol=1e-12).z for row in x])
    together = solve("lasso", x, parameters={"A": A}, scalars={"lam": 0.1}, tol=1e-12)
    assert torch.allclose(alone, together.z, atol=1e-9) and bool(together.converged.all())
    assert together.objective.shape == together.residual.shape == (6,)


def test_a_lasso_of_250_by_500_is_solved_to_the_answer_of_scikit_learn():
    A, x = draw(250, 500, 2)
    found = solve("lasso", x, parameters={"A": A}, scalars={"lam": 0.1}, tol=1e-12)
    reference = torch.stack([sklearn_lasso(A, row, 0.1) for row in x])
    assert (found.z - reference).abs().max() < 1e-7


def test_a_solution_is_no_worse_than_its_neighbours():
    A, x = draw(20, 40, 3)
    found = solve("nonnegative_lasso", x, parameters={"A": A}, scalars={"lam": 0.05}, tol=1e-12)
    z = found.z
    noise = torch.randn(50, *z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for near in (z + 1e-3 * noise).clamp_min(0):
        value = (x - near @ A.mT).square().sum(-1) / 2 + 0.05 * near.sum(-1)
        assert (value >= found.objective - 1e-12).all()


@pytest.mark.parametrize("iterations", [1, 25])
def test_what_has_not_converged_says_so(iterations):
    A, x = draw(20, 40, 3)
    found = solve("lasso", x, parameters={"A": A}, scalars={"lam": 0.01}, tol=1e-13, max_iterations=iterations)
    assert found.iterations == iterations and not bool(found.converged.any())
    assert found.residual.isfinite().all()


def test_any_leading_axes_come_back():
    A, x = draw(20, 40, 6)
    found = solve("lasso", x.reshape(2, 3, 20), parameters={"A": A}, scalars={"lam": 0.1}, tol=1e-10)
    assert found.z.shape == (2, 3, 40) and found.objective.shape == (2, 3)


def test_inputs_that_are_no_numbers_are_named() -> None:
    x = torch.ones(3, 16, dtype=torch.float64)
    x[1, 2] = torch.nan
    with pytest.raises(UnrollError, match="E404.*1 of 48 entries of x are not finite"):
        solve("lasso", x, dims={"m": 16, "n": 8}, parameters={"A": torch.eye(16, 8, dtype=torch.float64)})


def test_a_tolerance_that_float32_cannot_certify_is_refused():
    A, x = draw(20, 40, 3)
    with pytest.raises(UnrollError, match="E407"):
        solve("lasso", x.float(), parameters={"A": A}, tol=1e-10)
    found = solve("lasso", x.float(), parameters={"A": A})
    exact = solve("lasso", x, parameters={"A": A})
    assert found.converged.all() and (found.z - exact.z).abs().max() < 1e-2
