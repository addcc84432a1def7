"""Solving to convergence: the answer of other people's solvers, problem by problem of a batch."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import Lasso, Ridge
from torch import nn

import unroll
from unroll.errors import UnrollError
from unroll.solver.iteration import iterate, length
from unroll.solver.solve import DEFAULTS, least_tolerance, solve


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
    start = torch.zeros(5, 6, dtype=torch.float64)
    z, error, count = iterate(
        lambda z, rows: z @ M + c[rows], start, lambda z, moved, rows: length(moved), 1e-12, 10_000
    )
    assert torch.allclose(z, torch.linalg.solve(torch.eye(6) - M, c.mT).mT, atol=1e-9)
    assert error.max() <= 1e-12 and count < 10_000


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


def test_momentum_is_forgotten_where_it_points_uphill():
    """Of condition 1e4, restarts take 2,080 iterations, no restarts 41,230, restarts at the wrong places more than 50,000."""
    h = torch.logspace(-4, 0, 20, dtype=torch.float64)
    start = torch.zeros(2, 20, dtype=torch.float64)
    z, error, count = iterate(
        lambda z, rows: z - h * (z - 1), start, lambda z, moved, rows: length(moved), 1e-10, 4_000
    )
    assert error.max() <= 1e-10 and count < 4_000 and (z - 1).abs().max() < 1e-5


def test_every_problem_keeps_its_own_momentum_when_others_are_done():
    """Of conditions 10 to 1e3, each restarts and stops at a time of its own: together they take the steps that they take alone."""
    h = torch.stack([torch.logspace(-k, 0, 20, dtype=torch.float64) for k in (1, 3, 2)])

    def solved(which):
        step = lambda z, rows: z - h[which][rows] * (z - 1)
        error = lambda z, moved, rows: length(moved)
        return iterate(step, torch.zeros(len(which), 20, dtype=torch.float64), error, 1e-8, 4_000)

    z, error, count = solved([0, 1, 2])
    alone = [solved([k]) for k in range(3)]
    assert count == max(n for _, _, n in alone) and len({n for _, _, n in alone}) == 3
    for k, (one, off, _) in enumerate(alone):
        assert torch.allclose(z[k], one[0], rtol=1e-9) and error[k] == pytest.approx(float(off[0]), rel=1e-3)


@pytest.mark.parametrize("iterations", [1, 5, 40])
def test_the_error_of_a_lasso_is_its_gap_in_parts_of_half_the_squared_data(iterations):
    """F(z) - D(s r) over |x|^2 / 2, r = x - A z, D(u) = <x, u> - |u|^2 / 2 at the best s with |A' s r| <= lam."""
    A, x = draw(20, 40, 3)
    found = solve("lasso", x, parameters={"A": A}, scalars={"lam": 0.1}, tol=1e-13, max_iterations=iterations)
    r = x - found.z @ A.mT
    value = r.square().sum(-1) / 2 + 0.1 * found.z.abs().sum(-1)
    along, size = (x * r).sum(-1), r.square().sum(-1)
    s = torch.minimum(along / size, 0.1 / (r @ A).abs().amax(-1)).clamp_min(0)
    gap = value - (s * along - s.square() * size / 2)
    assert torch.allclose(found.error, gap / (x.square().sum(-1) / 2), rtol=1e-9, atol=1e-14)
    assert torch.allclose(found.objective, value, rtol=1e-12)


# --- tolerances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DEFAULTS)
def test_the_least_tolerance_can_be_met_and_nothing_below_it_is_taken(dtype):
    A, x = draw(20, 40, 3)
    data, least = {"parameters": {"A": A.to(dtype)}, "scalars": {"lam": 0.1}}, least_tolerance(dtype)
    found = solve("lasso", x.to(dtype), **data, tol=least, max_iterations=5_000)
    assert found.converged.all() and found.error.max() <= least < DEFAULTS[dtype]
    assert least == 50 * float(np.finfo(str(dtype).split(".")[1]).eps)
    with pytest.raises(UnrollError, match="E407.*can certify"):
        solve("lasso", x.to(dtype), **data, tol=0.99 * least)


@pytest.mark.parametrize("tol", [0, -1e-3, 1, 2.0, float("nan"), float("inf"), "1e-3", True])
def test_a_tolerance_that_is_no_share_is_refused(tol):
    with pytest.raises(UnrollError, match="E407.*not a number between 0 and 1"):
        solve("lasso", torch.ones(2, 3), parameters={"A": torch.eye(3)}, tol=tol)


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_number_of_iterations_that_is_none_is_refused(count):
    with pytest.raises(UnrollError, match="E407.*1 or more"):
        solve("lasso", torch.ones(2, 3), parameters={"A": torch.eye(3)}, max_iterations=count)


def test_a_tolerance_that_float32_cannot_certify_is_refused():
    A, x = draw(20, 40, 3)
    with pytest.raises(UnrollError, match="E407"):
        solve("lasso", x.float(), parameters={"A": A}, tol=1e-10)
    found = solve("lasso", x.float(), parameters={"A": A})
    exact = solve("lasso", x, parameters={"A": A})
    assert found.converged.all() and (found.z - exact.z).abs().max() < 1e-2


# --- units: scaling the data scales the answer, and nothing else -----------------------------------------------------


def problem(minimize, constraints=(), **scalars):
    """Least squares in A and what is added to it."""
    return {
        "dims": {"m": 12, "n": 8}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {n: {"default": v, "positive": True} for n, v in scalars.items()},
        "minimize": {"fit": "1/2 * sumsq(x - A @ z)", **minimize}, "constraints": list(constraints),
    }  # fmt: skip


def conic(A, x, term):
    z = cp.Variable(A.shape[1])
    cp.Problem(cp.Minimize(cp.sum_squares(x - A @ z) / 2 + term(z))).solve(solver=cp.CLARABEL)
    return z.value


def counts_by_newton(x, mu):
    """argmin mu/2 |differences|^2 + sum(z - x log z)."""
    D = np.diff(np.eye(len(x)), axis=0)
    z = x.copy()
    for _ in range(100):
        step = np.linalg.solve(mu * D.T @ D + np.diag(x / z**2), mu * D.T @ D @ z + 1 - x / z)
        z = np.maximum(z - step, z / 2)
    return z


COUNTS = {
    "dims": {"n": 8}, "variables": {"z": ["n"]}, "inputs": {"x": {"shape": ["n"], "positive": True}},
    "scalars": {"mu": {"default": 0.3, "positive": True}},
    "minimize": {"smooth": "mu/2 * sumsq(difference(z))", "counts": "sum(z - x * log(z))"},
}  # fmt: skip
UNITS = {
    "lasso": (problem({"g": "lam*norm1(z)"}, lam=0.5), {"lam": 1}, lambda A, x: sklearn_lasso(torch.from_numpy(A), torch.from_numpy(x), 0.5).numpy()),
    "ridge": (problem({"g": "mu/2*sumsq(z)"}, mu=0.3), {"mu": 0}, lambda A, x: Ridge(alpha=0.3, fit_intercept=False).fit(A, x).coef_),
    "nonnegative": (problem({}, ["z >= 0"]), {}, lambda A, x: nnls(A, x)[0]),
    "one group": (problem({"g": "lam*norm2(z)"}, lam=0.5), {"lam": 1}, lambda A, x: conic(A, x, lambda z: 0.5 * cp.norm2(z))),
    "counts": (COUNTS, {"mu": -1}, lambda A, x: counts_by_newton(x, 0.3)),
}  # fmt: skip
"""Spec, power of the unit in each scalar, the answer of others in units of 1."""


@pytest.mark.parametrize("name", UNITS)
def test_scaled_data_scale_the_answer_and_nothing_else(name):
    """By a power of 2, to the bit: iterations, errors and digits are the same in units of a millionth and of a million."""
    spec, powers, reference = UNITS[name]
    A, x = draw(12, 8, 3)
    x = x + torch.linspace(-1, 1, 12, dtype=torch.float64)
    given = {} if spec is COUNTS else {"A": A}
    x = x[:, :8].abs() + 0.1 if spec is COUNTS else x
    scalars = {n: spec["scalars"][n]["default"] for n in powers}

    def at(unit, dtype):
        return solve(
            spec, x.to(dtype) * unit, parameters=given, scalars={n: v * unit ** powers[n] for n, v in scalars.items()}
        )

    best = torch.from_numpy(np.stack([reference(A.numpy(), row) for row in x.numpy()]))
    for dtype, units in ((torch.float64, [2.0**-20]), (torch.float32, [2.0**-20, 2.0**20])):
        one = at(1.0, dtype)
        assert one.converged.all() and (one.z - best).norm() < 3 * DEFAULTS[dtype] ** 0.5 * best.norm()
        for unit in units:
            found = at(unit, dtype)
            assert torch.equal(found.z / unit, one.z) and torch.equal(found.error, one.error)
            assert found.iterations == one.iterations


@pytest.mark.parametrize("dtype", DEFAULTS)
@pytest.mark.parametrize("name", [n for n in UNITS if n != "counts"])
def test_a_zero_sample_among_others_is_solved_and_its_answer_is_0(name, dtype):
    spec, _, _ = UNITS[name]
    A, x = draw(12, 8, 3)
    x[1] = 0
    found = solve(spec, x.to(dtype), parameters={"A": A})
    assert found.converged.all() and found.error[1] == 0 and bool((found.z[1] == 0).all())


def test_what_underflows_is_not_called_solved():
    A, x = draw(20, 40, 2)
    with pytest.raises(UnrollError, match="2 of 2 problems have values whose squares are too near 0"):
        solve("lasso", x.float() * 1e-22, parameters={"A": A}, scalars={"lam": 1e-24}, max_iterations=30)


# --- degenerate problems ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DEFAULTS)
@pytest.mark.parametrize(("m", "n"), [(1, 5), (5, 1), (1, 1), (6, 6)])
def test_one_row_one_column_and_twin_columns_are_solved_as_by_scikit_learn(m, n, dtype):
    A, x = draw(m, n, 3, seed=m + n)
    A[:, -1] = A[:, 0]
    x = x + 1
    found = solve("lasso", x.to(dtype), parameters={"A": A}, scalars={"lam": 0.1})
    best = torch.stack([sklearn_lasso(A, row, 0.1) for row in x])
    value = (x - best @ A.mT).square().sum(-1) / 2 + 0.1 * best.abs().sum(-1)
    assert found.converged.all() and torch.allclose(found.objective.double(), value, rtol=2 * DEFAULTS[dtype], atol=0)


def test_a_batch_of_none_has_as_many_answers():
    A, x = draw(20, 40, 0)
    found = solve("lasso", x.reshape(0, 2, 20), parameters={"A": A})
    assert found.z.shape == (0, 2, 40) and found.error.shape == (0, 2) and "0 of 0" in str(found)


def test_a_matrix_of_zeros_is_refused_in_words():
    with pytest.raises(UnrollError, match="E403.*not finite(.|\n)*a matrix of zeros"):
        solve("lasso", torch.ones(2, 3), parameters={"A": torch.zeros(3, 3)})


MASKED = {
    "dims": {"n": 6}, "variables": {"z": ["n"]}, "inputs": {"w": ["n"], "x": ["n"]}, "scalars": {"lam": 0.2},
    "minimize": {"fit": "1/2 * sumsq(w * (x - z))", "sparsity": "lam * norm1(z)"},
}  # fmt: skip


def test_inputs_share_their_batch_axes_and_what_was_not_seen_is_0():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 6, generator=g), torch.tensor([[1.0] * 6, [1, 0, 1, 0, 1, 0], [0] * 6])
    found = solve(MASKED, w, x)
    soft = x.sign() * (x.abs() - 0.2).clamp_min(0)
    assert found.converged.all() and torch.allclose(found.z, torch.where(w > 0, soft, 0), atol=1e-5)
    with pytest.raises(UnrollError, match=r"E404.*batch axes of the inputs do not fit: w \(3,\), x \(2,\)"):
        solve(MASKED, w, x[:, 0])


def test_a_family_comes_before_its_axes():
    spec = {
        "dims": {"n": 4, "K": 2}, "variables": {"z": ["n"]}, "inputs": {"C": {"family": "K", "shape": ["n"]}},
        "minimize": {"fit": "sum(sumsq(z - C[k]) for k in K)"},
    }  # fmt: skip
    C = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = solve(spec, C)
    assert found.converged.all() and found.z.shape == (3, 4) and torch.allclose(found.z, C.mean(1), atol=1e-7)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), r"torch.int64.*(\n.*)*x.to\("),
        (torch.ones(2, 3, dtype=torch.complex64), r"torch.complex64.*(\n.*)*x.real"),
        (torch.ones(2, 3, dtype=torch.float16), r"torch.float16(.|\n)*x.float\(\)"),
        (torch.ones(2, 3, dtype=torch.bfloat16), r"torch.bfloat16(.|\n)*x.float\(\)"),
        (np.ones((2, 3)), r"type ndarray(.|\n)*from_numpy"),
        ([[1.0, 2, 3]], r"type list(.|\n)*as_tensor"),
        (torch.ones(2, 4), r"shape \(2, 4\)"),
        (torch.tensor(1.0), r"shape \(\)"),
    ],
)
def test_what_solve_does_not_take_is_refused_with_the_remedy(x, message):
    with pytest.raises(UnrollError, match=f"E404(.|\\n)*{message}"):
        solve("lasso", x, parameters={"A": torch.eye(3)})


def test_an_input_that_is_not_what_it_is_declared_to_be_is_refused():
    spec = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"], "w": {"shape": ["n"], "positive": True}},
        "minimize": {"fit": "1/2 * sumsq(x - z)", "sparsity": "dot(w, abs(z))"},
    }  # fmt: skip
    x, w = torch.tensor([[1.0, -2.0, 3.0]] * 2), torch.tensor([[0.0, 1.0, 0.5]] * 2)
    assert torch.allclose(solve(spec, x, w).z, torch.tensor([[1.0, -1.0, 2.5]] * 2))
    w[1, 2] = -0.5
    with pytest.raises(UnrollError, match="E403.*'w' is declared positive"):
        solve(spec, x, w)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e30), (torch.float64, 1e200)])
@pytest.mark.parametrize("fit", ["1/2 * sumsq(x - A @ z)", "sum(huber(x - A @ z, lam))"])
def test_units_in_which_the_objective_overflows_are_refused(dtype, unit, fit):
    A, x = draw(6, 9, 3)
    spec = {
        "dims": {"m": 6, "n": 9}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": 0.1}, "minimize": {"fit": fit, "sparsity": "lam * norm1(z)"},
    }  # fmt: skip
    x[1] *= unit
    with pytest.raises(UnrollError, match=f"E404.*1 of 3 problems .*beyond what {dtype} can hold"):
        solve(spec, x.to(dtype), parameters={"A": A}, scalars={"lam": 0.1 * unit})
    assert solve(spec, x[::2].to(dtype), parameters={"A": A}).converged.all()


@pytest.mark.parametrize(
    ("objective", "constraints", "convex"),
    [
        ("1/2*sumsq(x - A @ z)", [], True),
        ("1/2*sumsq(x - A @ z) + lam*norm1(z)", [], True),
        ("1/2*sumsq(x - A @ z)", ["z in simplex"], True),
        ("sum(logistic(A @ z)) + 1/2*sumsq(z - 1)", ["z >= 0"], True),
        ("-1/2*sumsq(A @ z)", ["z in box(-1, 1)"], False),
        ("1/2*sumsq(x - A @ z)", ["z in sphere"], False),
        ("1/2*sumsq(x - A @ z) + lam*norm0(z)", [], False),
        ("1/2*sumsq(x - A @ z) - lam*sumsq(z)", [], False),
    ],
)
def test_only_of_what_is_known_to_be_convex_is_a_fixed_point_called_solved(objective, constraints, convex):
    spec = {
        "dims": {"m": 4, "n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": 0.1}, "minimize": objective, "constraints": constraints,
    }  # fmt: skip
    A, x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    found = solve(spec, x, parameters={"A": A}, max_iterations=20)
    assert found.convex is convex and ("problems solved" in str(found)) is convex


def refusal(minimize, inputs=("x",)):
    spec = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {i: ["n"] for i in inputs}, "minimize": minimize}
    with pytest.raises(UnrollError) as caught:
        solve(spec, *(torch.ones(2, 3) for _ in inputs))
    assert caught.value.code == "E303"
    return spec, str(caught.value)


@pytest.mark.parametrize(
    ("terms", "word", "culprit"),
    [
        ({"fit": "sumsq(x - z)", "odd": "norm1(z)**2"}, "no rule gives its prox", "odd"),
        ({"fit": "norm1(x - z)", "odd": "norm1(z)**2"}, "no rule gives its prox", "fit"),
        ({"fit": "1/2*sumsq(x - z)", "a": "norm0(z)", "b": "tv(z)**2"}, "prox", "b"),
    ],
)
def test_what_no_algorithm_solves_is_refused_with_what_is_known_of_each_term(terms, word, culprit):
    _, message = refusal(terms)
    assert word in message
    assert f"= {culprit}: " in message


def test_the_hint_where_no_step_is_known_works_as_it_stands():
    spec, message = refusal("(sumsq(x - z) + sum(log(1 + (x - z)**2)))**2")
    assert "no Lipschitz constant is known" in message
    unrolled = {"algorithm": "gradient_descent", "layers": 100, "step": 0.01}
    assert ", ".join(f"{k}: {v}" for k, v in unrolled.items()) in message
    x = torch.linspace(-1, 1, 3)[None]
    found = unroll.compile({**spec, "unroll": unrolled})(x)
    assert (found - x).abs().max() < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_too_small_for_their_type_are_refused_and_zeros_are_solved(dtype):
    """Powers of ten down to the smallest number: solved, or refused at once; never run to the end for nothing."""
    A, x = draw(6, 8, 2)
    least = -50 if dtype == torch.float32 else -330
    refused = []
    for power in range(-8, least, -7 if dtype == torch.float32 else -23):
        c = 10.0**power
        small = (x * c).to(dtype)
        try:
            found = solve(
                "lasso", small, parameters={"A": A}, scalars={"lam": max(0.1 * c, 5e-324)}, max_iterations=2000
            )
        except UnrollError as error:
            assert error.code == "E404" and "too near 0" in str(error)
            refused.append(power)
        else:
            assert found.converged.all(), power
    assert refused and min(refused) < -20
    zeros = solve("lasso", torch.zeros(2, 6, dtype=dtype), parameters={"A": A}, scalars={"lam": 0.1})
    assert zeros.converged.all() and not zeros.z.any()
