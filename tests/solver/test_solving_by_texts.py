"""`solve` takes every text that claims optima: the answers of CVXPY, residuals, warm starts, units."""

from functools import cache

import cvxpy as cp
import numpy as np
import pytest
import torch

import unroll
from unroll.derivation.algorithms import by_simplicity
from unroll.derivation.parts import classify
from unroll.errors import UnrollError
from unroll.language.problem import from_spec
from unroll.solver.solve import is_map, solve
from unroll.spec import load

M, N = 15, 10
LAM = 0.1


def draw(condition):
    """(A, x): A with A'A of this condition, three samples in units of 1, 100 and 1/100."""
    g = np.random.default_rng(0)
    left, right = (np.linalg.qr(g.normal(size=(n, N)))[0] for n in (M, N))
    A = (left * np.logspace(0, -np.log10(condition) / 2, N)) @ right
    return A, g.normal(size=(3, M)) * np.array([[1], [100], [0.01]])


def spec(minimize, constraints=()):
    return {
        "dims": {"m": M, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": LAM}, "minimize": minimize, "constraints": list(constraints),
    }  # fmt: skip


FIT = "1/2 * sumsq(x - A @ z)"
least = lambda A, x, z: cp.sum_squares(x - A @ z) / 2
bends = lambda z: cp.norm1(cp.diff(z, 2))
PROBLEMS = {
    "least squares": (spec({"fit": FIT}), 10, least, None),
    "lasso": (spec({"fit": FIT, "g": "lam*norm1(z)"}), 10, lambda A, x, z: least(A, x, z) + LAM * cp.norm1(z), None),
    "bends": (spec({"fit": FIT, "g": "lam*norm1(z)", "t": "lam*norm1(difference(difference(z)))"}), 10, lambda A, x, z: least(A, x, z) + LAM * (cp.norm1(z) + bends(z)), None),
    "simplex": (spec({"fit": FIT}, ["z in simplex"]), 10, least, lambda z: [z >= 0, cp.sum(z) == 1]),
    "nonnegative bends": (spec({"fit": FIT, "t": "lam*norm1(difference(difference(z)))"}, ["z >= 0"]), 10, lambda A, x, z: least(A, x, z) + LAM * bends(z), lambda z: [z >= 0]),
    "ridge": (spec({"fit": FIT, "r": "lam/2*sumsq(z)"}), 1e3, lambda A, x, z: least(A, x, z) + LAM / 2 * cp.sum_squares(z), None),
    "nonnegative ridge": (spec({"fit": FIT, "r": "lam/2*sumsq(z)"}, ["z >= 0"]), 1e3, lambda A, x, z: least(A, x, z) + LAM / 2 * cp.sum_squares(z), lambda z: [z >= 0]),
    "huber": (spec({"fit": "sum(huber(x - A @ z, 1/2))", "r": "lam/2*sumsq(z)"}), 1e3, lambda A, x, z: cp.sum(cp.huber(x - A @ z, 0.5)) / 2 + LAM / 2 * cp.sum_squares(z), None),
}  # fmt: skip
"""Spec, the condition of A'A, what CVXPY minimises, its constraints."""


@cache
def optimum(name):
    """(the values, their data) of CVXPY."""
    _, condition, value, sets = PROBLEMS[name]
    A, x = draw(condition)
    found = []
    for row in x:
        z = cp.Variable(N)
        p = cp.Problem(cp.Minimize(value(A, row, z)), sets(z) if sets else [])
        p.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        found.append(p.value)
    return torch.tensor(found), torch.from_numpy(A), torch.from_numpy(x)


def kinds():
    """Every text that claims optima, with the problems here that it fits, three of them."""
    parts = {
        n: classify(from_spec(load({**p[0], "unroll": {"algorithm": "fista", "layers": 1}})))
        for n, p in PROBLEMS.items()
    }
    for a in by_simplicity():
        if "optimum" in a.text.record.claimed:
            fitting = [
                n
                for n in PROBLEMS
                if a.fits(parts[n]) is None and not (a.name in ("admm", "adaptive_admm") and n == "least squares")
            ]
            hard = [n for n in reversed(fitting) if PROBLEMS[n][1] == 1e3][:1]
            for n in [*hard, *(n for n in fitting if n not in hard)][:3]:
                yield a.name, n


@pytest.mark.parametrize(("algorithm", "name"), list(kinds()))
def test_a_text_that_claims_optima_reaches_that_of_cvxpy(algorithm, name):
    best, A, x = optimum(name)
    found = solve(PROBLEMS[name][0], x, parameters={"A": A}, algorithm=algorithm)
    assert found.algorithm == algorithm and found.claims and found.converged.all(), found
    assert torch.allclose(found.objective, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_left_to_itself_it_takes_a_text_that_reaches_the_optimum(name):
    best, A, x = optimum(name)
    found = solve(PROBLEMS[name][0], x, parameters={"A": A})
    assert found.converged.all() and found.convex and torch.allclose(found.objective, best, rtol=1e-6, atol=0)
    assert found.algorithm.endswith("accelerated") == any(
        is_map(a) and a.name in found.algorithm for a in by_simplicity()
    )
    again = solve(PROBLEMS[name][0], x, parameters={"A": A}, algorithm="auto")
    assert torch.equal(found.z, again.z)


OWN = "bends"


def own(algorithm, x, **more):
    _, A, _ = optimum(OWN)
    return solve(PROBLEMS[OWN][0], x, parameters={"A": A}, algorithm=algorithm, **{"max_iterations": 500, **more})


COMPOSITE = ["admm", "chambolle_pock", "condat_vu"]


@pytest.mark.parametrize("algorithm", COMPOSITE)
def test_a_text_runs_as_it_is_written_and_rows_do_not_disturb_each_other(algorithm):
    _, A, x = optimum(OWN)
    made = {**PROBLEMS[OWN][0], "unroll": {"algorithm": algorithm, "layers": 25}}
    net = unroll.compile(made, parameters={"A": A}, dtype=torch.float64)
    assert torch.allclose(own(algorithm, x, max_iterations=25).z, net(x), rtol=1e-12, atol=2e-14)
    together = own(algorithm, x)
    for row, z in zip(x, together.z, strict=True):
        assert torch.allclose(own(algorithm, row).z, z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", [*COMPOSITE, "fista", None])
def test_a_solution_is_gone_on_from_with_all_that_it_kept(algorithm):
    name = OWN if algorithm in COMPOSITE else "lasso"
    _, A, x = optimum(name)
    run = lambda n, start=None: solve(PROBLEMS[name][0], x, parameters={"A": A}, algorithm=algorithm, start=start, max_iterations=n, tol=2e-14)  # fmt: skip
    once, twice = run(60), run(35, run(25))
    on = ~once.converged  # what is solved stops at once
    for n, kept in {**once.states, "": once.z}.items():
        assert torch.allclose(kept[on], (twice.states[n] if n else twice.z)[on], rtol=1e-9, atol=1e-11)
    assert on.any()
    anew = run(35, run(25).z)
    assert not torch.allclose(once.z[on], anew.z[on], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", ["admm", "condat_vu", None])
def test_a_start_at_the_answer_stays_there(algorithm):
    _, A, x = optimum(OWN)
    solved = own(algorithm, x, tol=1e-10, max_iterations=5000)
    on = own(algorithm, x, start=solved)
    assert on.converged.all() and on.iterations == 10 and torch.allclose(on.z, solved.z, rtol=1e-6, atol=1e-8)
    lasso = PROBLEMS["lasso"][0]
    from_another = solve(lasso, x, parameters={"A": A}, algorithm="fista", start=solve(lasso, x, parameters={"A": A}))
    assert from_another.converged.all() and from_another.iterations == 10


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.zeros(3, N + 1, dtype=torch.float64), "start|z has shape"),
        (torch.zeros(2, N, dtype=torch.float64), r"start has batch axes \(2,\), the inputs have \(3,\)"),
        (torch.zeros(3, N), "float32"),
        (torch.full((3, N), torch.nan, dtype=torch.float64), "not finite"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, message):
    _, A, x = optimum("lasso")
    with pytest.raises(UnrollError, match=f"E404(.|\n)*({message})"):
        solve(PROBLEMS["lasso"][0], x, parameters={"A": A}, start=start)


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("algorithm", ["admm", "condat_vu"])
def test_scaled_data_scale_the_answer_and_nothing_else(algorithm, unit):
    _, _, x = optimum(OWN)
    one, other = own(algorithm, x, scalars={"lam": LAM}), own(algorithm, x * unit, scalars={"lam": LAM * unit})
    assert torch.equal(other.z / unit, one.z) and torch.equal(other.error, one.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", [*COMPOSITE, "davis_yin", "douglas_rachford", "forward_backward_forward"])
def test_a_zero_sample_among_others_is_solved_and_its_answer_is_0(algorithm, dtype):
    name = OWN if algorithm in COMPOSITE else "lasso"
    _, A, x = optimum(name)
    x = x.to(dtype).clone()
    x[0] = 0
    found = solve(PROBLEMS[name][0], x, parameters={"A": A}, algorithm=algorithm, max_iterations=300)
    assert found.converged[0] and found.error[0] == 0 and not found.z[0].any()
    assert solve(PROBLEMS[name][0], x[:0], parameters={"A": A}, algorithm=algorithm).z.shape == (0, N)


def test_what_has_no_gradient_is_solved_by_its_proxes():
    g = np.random.default_rng(0)
    x = g.normal(size=(3, 6))
    s = {
        "dims": {"n": 6},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["n"]},
        "minimize": {"fit": "norm1(x - z)", "length": "norm2(z)"},
    }
    found = solve(s, torch.from_numpy(x))
    for row, value in zip(x, found.objective, strict=True):
        z = cp.Variable(6)
        p = cp.Problem(cp.Minimize(cp.norm1(row - z) + cp.norm2(z)))
        p.solve(solver=cp.CLARABEL)
        assert float(value) == pytest.approx(p.value, rel=1e-6)
    assert found.converged.all() and "fixed_point" in found.measure


OF_ITS_OWN = {
    "algorithm": "slow", "solves": "f(z) + g(z)", "scalars": {"step": {"start": "1 / (2 * L(f))"}},
    "updates": {"z": "prox(step * g, z - step * grad(f, z))"}, "residuals": {"still": "(z - last(z)) / step"},
}  # fmt: skip


def test_a_text_of_the_specs_own_is_run_by_its_name_with_what_the_spec_says_of_it():
    best, A, x = optimum("lasso")
    s = {**PROBLEMS["lasso"][0], "algorithms": {"slow": OF_ITS_OWN}}
    found = solve(s, x, parameters={"A": A}, algorithm="slow")
    assert torch.allclose(found.objective, best, rtol=1e-6) and found.algorithm == "slow" and not found.claims
    faster = solve({**s, "unroll": {"algorithm": "slow", "layers": 3, "numbers": {"step": "1/L"}}}, x, parameters={"A": A}, algorithm="slow")  # fmt: skip
    assert faster.converged.all() and faster.iterations < found.iterations
    other = solve({**s, "unroll": {"algorithm": "fista", "layers": 3}}, x, parameters={"A": A}, algorithm="slow")
    assert other.iterations == found.iterations


def test_a_path_is_a_text_too(tmp_path):
    import yaml

    _, A, x = optimum("lasso")
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.dump(OF_ITS_OWN))
    found = solve(PROBLEMS["lasso"][0], x, parameters={"A": A}, algorithm=str(path))
    assert found.algorithm == "slow" and found.converged.all()


@pytest.mark.parametrize(
    ("algorithm", "code", "message"),
    [
        ("gradient_descent", "E303", "gradient_descent does not fit: λ ‖z‖₁ is not smooth"),
        ("fitsa", "E303", "did you mean 'fista'"),
        ("nowhere.yaml", "E001", "no file"),
        ("power_step", "E303", "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(algorithm, code, message):
    _, A, x = optimum("lasso")
    with pytest.raises(UnrollError) as caught:
        solve(PROBLEMS["lasso"][0], x, parameters={"A": A}, algorithm=algorithm)
    assert caught.value.code == code and message in str(caught.value)


def test_a_residual_reads_what_is_kept():
    _, A, x = optimum("lasso")
    bad = {
        **OF_ITS_OWN,
        "updates": {"v": "z - step * grad(f, z)", "z": "prox(step * g, v)"},
        "residuals": {"r": "v - z"},
    }
    with pytest.raises(UnrollError, match=r"E101(.|\n)*'v'"):
        solve({**PROBLEMS["lasso"][0], "algorithms": {"slow": bad}}, x, parameters={"A": A}, algorithm="slow")


def test_what_claims_no_optima_says_so():
    found = own("half_quadratic", optimum(OWN)[2])
    assert not found.claims and "half_quadratic claims no optima" in str(found)


def test_what_is_not_convex_is_left_to_who_names_a_text():
    _, A, x = optimum("lasso")
    s = spec({"fit": FIT, "count": "lam*norm0(z)", "t": "lam*norm1(difference(difference(z)))"})
    with pytest.raises(UnrollError, match=r"E303(.|\n)*not known to be convex; admm fits"):
        solve(s, x, parameters={"A": A})
    assert not solve(s, x, parameters={"A": A}, algorithm="admm", max_iterations=20).convex
