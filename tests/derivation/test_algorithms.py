"""Iterations against reference solvers: fixed points are optima, values fall where that is claimed, momentum is the paper's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from library_objectives import NAMES, SIZES
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso, Ridge
from torch import Tensor

import unroll
from unroll.derivation import parts
from unroll.derivation.algorithms import every
from unroll.errors import SpecError
from unroll.spec import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

Spec = dict[str, Any]
LAYERS = 1200


def tensors(spec: Spec, seed: int = 0) -> tuple[dict[str, int], dict[str, Tensor], list[Tensor]]:
    """Sizes, parameters and inputs (one sample each), as a user passes them."""
    g = torch.Generator().manual_seed(seed)
    dims = {d: SIZES[i] if isinstance(n, str) else n for i, (d, n) in enumerate(spec["dims"].items())}

    def draw(record: Any, swap: bool) -> Tensor:
        shape = [
            n if isinstance(n, int) else dims[n] for n in (record["shape"] if isinstance(record, dict) else record)
        ]
        value = torch.randn(*shape, generator=g, dtype=torch.float64)
        return value.mT.contiguous() if swap and value.ndim == 2 else value

    def conditioned(value: Tensor) -> Tensor:
        """A matrix whose singular values are of one size, so that plain iterations converge to the digits compared."""
        return value / 2 + torch.eye(*value.shape, dtype=value.dtype) if value.ndim == 2 else value

    def declared(value: Tensor, record: Any) -> Tensor:
        return (
            torch.nn.functional.normalize(value, dim=-2)
            if isinstance(record, dict) and record.get("columns") == "unit"
            else value
        )

    parameters = {name: declared(conditioned(draw(r, False)), r) for name, r in spec.get("parameters", {}).items()}
    return dims, parameters, [draw(r, True) for r in spec.get("inputs", {}).values()]


def record(spec: Spec, dims: dict[str, int], algorithm: str, layers: int, **more: Any) -> tuple[Spec, dict[str, int]]:
    """The spec with an algorithm, and the sizes that it leaves open."""
    whole = {k: v for k, v in spec.items() if k != "unroll"} | {
        "unroll": {"algorithm": algorithm, "layers": layers, **more}
    }
    return whole, {
        d: n for d, n in dims.items() if not isinstance(spec["dims"].get(d), int) and spec["dims"].get(d) != "dynamic"
    }


def network(
    spec: Spec, dims: dict[str, int], parameters: dict[str, Tensor], algorithm: str, layers: int = LAYERS, **more: Any
) -> Any:
    whole, fixed = record(spec, dims, algorithm, layers, **more)
    return unroll.compile(whole, dims=fixed, parameters=parameters, dtype=torch.float64)


def library(name: str) -> Spec:
    return load(name).to_dict()


def with_labels(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Inputs that the objective is meant for: labels in {-1, 1}, counts."""
    if "logistic" in name:
        return [x.sign() for x in inputs]
    return [x.abs().round() for x in inputs] if "poisson" in name else inputs


# --- library ----------------------------------------------------------------------------------------------------------

Case = Callable[[cp.Variable, dict[str, np.ndarray]], tuple[Any, list[Any]]]


def residual(z: Any, a: dict[str, np.ndarray]) -> Any:
    return cp.sum_squares(a["x"] - a["A"] @ z) / 2


CVXPY: dict[str, Case] = {
    "lasso": lambda z, a: (residual(z, a) + 0.1 * cp.norm1(z), []),
    "elastic_net": lambda z, a: (residual(z, a) + 0.05 * cp.sum_squares(z) + 0.1 * cp.norm1(z), []),
    "ridge": lambda z, a: (residual(z, a) + 0.05 * cp.sum_squares(z), []),
    "nonnegative_lasso": lambda z, a: (residual(z, a) + 0.1 * cp.norm1(z), [z >= 0]),
    "nonnegative_least_squares": lambda z, a: (residual(z, a), [z >= 0]),
    "box_least_squares": lambda z, a: (residual(z, a), [z >= 0, z <= 1]),
    "ball_denoising": lambda z, a: (residual(z, a), [cp.norm1(z) <= 1]),
    "simplex_least_squares": lambda z, a: (residual(z, a), [z >= 0, cp.sum(z) == 1]),
    "robust_regression": lambda z, a: (cp.sum(cp.huber(a["x"] - a["A"] @ z, 0.5)) / 2 + 0.1 * cp.norm1(z), []),
    "sparse_logistic_regression": lambda z, a: (cp.sum(cp.logistic(-cp.multiply(a["y"], a["A"] @ z))) + 0.1 * cp.norm1(z), []),
    "poisson_regression": lambda z, a: (cp.sum(cp.exp(a["A"] @ z) - cp.multiply(a["y"], a["A"] @ z)) + 0.1 * cp.norm1(z), []),
    "group_lasso": lambda z, a: (cp.sum_squares(a["X"].T - a["A"] @ z) / 2 + 0.1 * cp.sum(cp.norm(z, 2, axis=1)), []),
    "total_variation_regression": lambda z, a: (residual(z, a) + 0.1 * cp.tv(z), []),
    "total_variation_synthesis": lambda z, a: (residual(cp.cumsum(z), a) + 0.1 * cp.norm1(z[1:]), []),
    "dictionary_coding": lambda z, a: (cp.sum_squares(a["X"].T - a["A"] @ z) / 2 + 0.1 * cp.sum(cp.abs(z)), []),
}  # fmt: skip
ELSEWHERE = {
    "robust_pca", "nonnegative_factorisation", "beta_factorisation", "low_rank_and_groups", "node_smoothing", "reweighted_nodes",
    "fused_lasso", "total_variation_denoising", "matrix_completion", "graph_smoothing", "svm_dual", "one_class", "slope", "entropic_transport", "group_infinity", "sparse_inverse_covariance",
    "sparse_rate_reduction", "rate_reduction", "token_statistics", "token_energy", "hopfield_energy", "subspace_mixture", "fourth_power",
    "kurtosis", "principal_subspace", "shift_rate_reduction", "shift_rate_reduction_2d", "dictionary_learning", "mcr2", "mcr2_regularised", "ctrl_binary", "ctrl_multi",
}  # fmt: skip
"""What they give is held against forms written by hand, and optima (test_networks.py, test_structured_networks.py, test_losses.py, test_optima.py)."""
WITHOUT_SPLITTING = ("gradient_descent", "projected_gradient", "proximal_gradient", "power_step", "fista")
"""The others: test_algorithm_texts.py."""
NOT_CONVEX = {"phase_retrieval", "l0_sparse_coding", "mcp_sparse_coding", "scad_sparse_coding"}
STEPS: dict[str, dict[str, Any]] = {"poisson_regression": {"step": 0.2}, "phase_retrieval": {"step": 0.01}}


def optimum(case: Case, shape: tuple[int, ...], arrays: dict[str, np.ndarray]) -> np.ndarray:
    z = cp.Variable(shape)
    objective, constraints = case(z, arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp.Problem(cp.Minimize(objective), constraints).solve(
            solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
        )
    return np.asarray(z.value)


def fitting(spec: Spec, dims: dict[str, int], **more: Any) -> list[str]:
    """The algorithms without splitting that accept the problem."""
    found = []
    for a in (a for a in every() if a.name in WITHOUT_SPLITTING):
        try:
            whole, fixed = record(spec, dims, a.name, 1, **more)
            unroll.derive(whole, dims=fixed)
        except SpecError as refused:
            assert refused.code == "E303"
            continue
        found.append(a.name)
    return found


@pytest.mark.parametrize("name", CVXPY)
def test_enough_layers_reach_the_optimum_of_convex_library_objectives(name: str) -> None:
    spec = library(name)
    dims, parameters, inputs = tensors(spec)
    inputs = with_labels(name, inputs)
    arrays = {k: v.numpy() for k, v in parameters.items()} | {
        k: v.numpy() for k, v in zip(spec["inputs"], inputs, strict=True)
    }
    accepted = fitting(spec, dims, **STEPS.get(name, {}))
    assert accepted
    for algorithm in accepted:
        net = network(
            spec,
            dims,
            parameters,
            algorithm,
            LAYERS * (4 if name in STEPS or name == "total_variation_synthesis" else 1),
            **STEPS.get(name, {}),
        )
        z = net(*inputs)
        z = z.mT if z.ndim == 2 else z
        want = optimum(CVXPY[name], tuple(z.shape), arrays)
        assert np.abs(z.numpy() - want).max() < 3e-6, algorithm


def test_every_library_objective_is_solved_or_not_convex() -> None:
    assert set(CVXPY) | NOT_CONVEX | ELSEWHERE >= {n for n in NAMES}


@pytest.mark.parametrize("lam", [0.05, 0.5])
def test_scikit_learn_agrees(lam: float) -> None:
    spec = library("lasso")
    dims, parameters, (x,) = tensors(spec, 3)
    m = dims["m"]
    a, b = parameters["A"].numpy(), x.numpy()
    solvers = {
        "lasso": Lasso(lam / m, fit_intercept=False, tol=1e-14, max_iter=100_000),
        "elastic_net": ElasticNet(
            (lam + 0.1) / m, l1_ratio=lam / (lam + 0.1), fit_intercept=False, tol=1e-14, max_iter=100_000
        ),
        "ridge": Ridge(0.1, fit_intercept=False, tol=1e-14),
    }
    for name, solver in solvers.items():
        other = library(name)
        scalars = {"lam": lam} if name != "ridge" else {}
        net = unroll.compile(
            {**other, "unroll": {"algorithm": "fista" if name != "ridge" else "gradient_descent", "layers": LAYERS}},
            dims=dims,
            parameters=parameters,
            scalars=scalars,
            dtype=torch.float64,
        )
        assert np.allclose(net(x).numpy(), solver.fit(a, b).coef_, atol=1e-6), name


def test_scikit_learn_agrees_on_groups() -> None:
    spec = library("group_lasso")
    dims, parameters, (x,) = tensors(spec, 4)
    want = (
        MultiTaskLasso(0.1 / dims["m"], fit_intercept=False, tol=1e-14, max_iter=100_000)
        .fit(parameters["A"].numpy(), x.mT.numpy())
        .coef_
    )
    assert np.allclose(network(spec, dims, parameters, "fista")(x).numpy(), want, atol=1e-6)


def test_scipy_agrees_on_nonnegative_least_squares() -> None:
    spec = library("nonnegative_least_squares")
    dims, parameters, (x,) = tensors(spec, 5)
    want, _ = scipy.optimize.nnls(parameters["A"].numpy(), x.numpy())
    for algorithm in ("projected_gradient", "proximal_gradient"):
        assert np.allclose(network(spec, dims, parameters, algorithm)(x).numpy(), want, atol=1e-6)


# --- values fall ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in [n for n in NAMES if n not in ELSEWHERE] if n not in STEPS])
def test_values_never_rise_where_that_is_claimed(name: str) -> None:
    spec = library(name)
    for seed in range(2):
        dims, parameters, inputs = tensors(spec, seed)
        inputs = with_labels(name, inputs)
        for algorithm in fitting(spec, dims):
            net = network(spec, dims, parameters, algorithm, 60)
            claimed = any(note.startswith("monotone") for note in net.derivation.exact.notes)
            assert claimed == (algorithm != "fista" and name not in NOT_CONVEX)
            if algorithm != "fista":  # also where the prox is not convex: it minimises the upper bound that 1/L gives
                values = net.trace(*inputs).terms["total"][1:]
                assert (values.diff() <= 1e-12 * (1 + values[:-1].abs())).all()


def test_a_given_step_claims_nothing() -> None:
    dims, parameters, _ = tensors(library("lasso"))
    assert not any(
        n.startswith("monotone")
        for n in network(library("lasso"), dims, parameters, "proximal_gradient", 1, step=0.1).derivation.exact.notes
    )


CHANGED = {
    "an update of its own": {"gauge": {"update": "3"}},
    "another share of what was": {"gauge": {"residual": "2"}},
    "a norm": {"normalise": {"kind": "sphere", "when": "after"}},
    "a weight of each layer": {"schedule": {"lam": "1 + layer"}},
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_step_that_a_spec_changes_claims_nothing(changed: str) -> None:
    """It need not descend any more, and `check` calls no choice of a spec a law that is broken."""
    spec = {**library("lasso"), "dims": {"m": 4, "n": 3}, "scalars": {"lam": 0.1}}
    unrolled = {"algorithm": "proximal_gradient", "layers": 3}
    plain, other = ({**spec, "unroll": unrolled | more} for more in ({}, CHANGED[changed]))
    assert "monotone" in str(unroll.derive(plain)) and "monotone" not in str(unroll.derive(other))
    rows = unroll.check(other).rows
    assert not [r for r in rows if r.verdict == "BROKEN" or "falls in every layer" in r.law]


# --- momentum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "a"), [(None, None), ("beck_teboulle", None), ("chambolle_dossal", 3), ("chambolle_dossal(4)", 4)]
)
def test_fista_is_the_algorithm_of_the_paper(momentum: str | None, a: int | None) -> None:
    spec = library("lasso")
    dims, parameters, (x,) = tensors(spec, 7)
    net = network(spec, dims, parameters, "fista", 30, **({} if momentum is None else {"momentum": momentum}))
    d, b = parameters["A"].numpy(), x.numpy()
    lipschitz = np.linalg.norm(d, 2) ** 2
    z = y = np.zeros(dims["n"])
    t, seen = 1.0, net.trace(x).iterates["z"]
    for k in range(1, 31):
        v = y - d.T @ (d @ y - b) / lipschitz
        new = np.sign(v) * np.maximum(np.abs(v) - 0.1 / lipschitz, 0)
        ahead = (1 + np.sqrt(1 + 4 * t * t)) / 2
        beta = (t - 1) / ahead if a is None else (k - 1) / (k + a)
        y, z, t = new + beta * (new - z), new, ahead
        assert np.abs(seen[k].numpy() - z).max() < 1e-12


# --- a user's own problems --------------------------------------------------------------------------------------------

BASE: Spec = {
    "dims": {"m": 6, "n": 4},
    "variables": {"z": ["n"]},
    "inputs": {"x": ["m"]},
    "parameters": {"A": ["m", "n"]},
}
OWN: dict[str, tuple[Spec, Case | None, dict[str, Any]]] = {
    "weighted lasso": (
        BASE | {"parameters": {"A": ["m", "n"], "w": {"shape": ["n"], "positive": True}}, "minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "0.2 * sum(w * abs(z))"}},
        lambda z, a: (residual(z, a) + 0.2 * cp.sum(cp.multiply(np.abs(a["w"]), cp.abs(z))), []), {},
    ),
    "weighted residuals": (
        BASE | {"parameters": {"A": ["m", "n"], "w": ["m"]}, "minimize": {"f": "1/2*sum((1 + w**2) * (x - A @ z)**2)", "g": "0.1 * norm1(z)"}},
        lambda z, a: (cp.sum(cp.multiply(1 + a["w"] ** 2, cp.square(a["x"] - a["A"] @ z))) / 2 + 0.1 * cp.norm1(z), []), {},
    ),
    "robust and nonnegative": (
        BASE | {"minimize": {"f": "sum(sqrt(1 + (x - A @ z)**2))"}, "constraints": ["z >= 0"]},
        lambda z, a: (cp.sum([cp.norm(cp.hstack([1, r])) for r in a["x"] - a["A"] @ z]), [z >= 0]), {},
    ),
    "sparse groups": (
        BASE | {"dims": {"m": 6, "n": 4, "T": 2}, "variables": {"Z": ["n", "T"]}, "inputs": {"X": ["m", "T"]}, "minimize": {"f": "1/2*sumsq(X - A @ Z)", "g": "0.3*group_norm(Z, axis=1)", "h": "0.2*norm1(Z)"}},
        lambda z, a: (cp.sum_squares(a["X"].T - a["A"] @ z) / 2 + 0.3 * cp.sum(cp.norm(z, 2, axis=1)) + 0.2 * cp.sum(cp.abs(z)), []), {},
    ),
    "logistic with ridge": (
        BASE | {"minimize": "sum(logistic(x * (A @ z))) + 0.3*sumsq(z)"},
        lambda z, a: (cp.sum(cp.logistic(-cp.multiply(a["x"], a["A"] @ z))) + 0.3 * cp.sum_squares(z), []), {},
    ),
    "box and l1": (
        BASE | {"scalars": {"low": -0.2, "high": 0.3}, "minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "0.1*norm1(z)"}, "constraints": ["low <= z <= high"]},
        lambda z, a: (residual(z, a) + 0.1 * cp.norm1(z), [z >= -0.2, z <= 0.3]), {},
    ),
    "maximise": (
        BASE | {"maximize": {"likelihood": "-sum(softplus(A @ z) - x * (A @ z))", "prior": "-0.2*norm1(z) - 1/2*sumsq(z)"}},
        lambda z, a: (cp.sum(cp.logistic(a["A"] @ z) - cp.multiply(a["x"], a["A"] @ z)) + 0.2 * cp.norm1(z) + cp.sum_squares(z) / 2, []), {},
    ),
    "fair penalty of two terms": (
        BASE | {"minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "0.5*sum(abs(z) - log(1 + abs(z)))"}}, None, {},
    ),
    "tilted": (
        BASE | {"parameters": {"A": ["m", "n"], "c": ["n"]}, "minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "0.3*norm1(z) + 0.2*dot(c, z)"}},
        lambda z, a: (residual(z, a) + 0.3 * cp.norm1(z) + 0.2 * a["c"] @ z, []), {},
    ),
    "two sides of a matrix": (
        {"dims": {"m": 5, "n": 3, "p": 2, "r": 4}, "variables": {"Z": ["n", "p"]}, "inputs": {"X": ["m", "r"]}, "parameters": {"A": ["m", "n"], "B": ["p", "r"]}, "minimize": {"f": "1/2*sumsq(X - A @ Z @ B)", "g": "0.2*nuclear(Z)"}},
        lambda z, a: (cp.sum_squares(a["X"].T - a["A"] @ z @ a["B"]) / 2 + 0.2 * cp.normNuc(z), []), {},
    ),
    "scale of the data in the step": (
        BASE | {"inputs": {"x": ["m"], "s": ["m"]}, "minimize": {"f": "1/2*sumsq(s * (A @ z) - x)", "g": "0.1*norm1(z)"}},
        lambda z, a: (cp.sum_squares(cp.multiply(a["s"], a["A"] @ z) - a["x"]) / 2 + 0.1 * cp.norm1(z), []), {},
    ),
    "largest entry": (
        BASE | {"minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "0.5*norm_inf(z)"}},
        lambda z, a: (residual(z, a) + 0.5 * cp.norm_inf(z), []), {},
    ),
    "smooth differences": (
        BASE | {"minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "sumsq(difference(z))", "h": "0.1*norm1(z)"}},
        lambda z, a: (residual(z, a) + cp.sum_squares(cp.diff(z)) + 0.1 * cp.norm1(z), []), {},
    ),
    "differences given a matrix": (
        BASE | {"parameters": {"A": ["m", "n"], "G": ["n", "n"]}, "minimize": {"f": "sum(huber(x - A @ z, 0.7))", "g": "1/4*z.T @ G.T @ G @ z", "h": "0.2*norm2(z)"}},
        lambda z, a: (cp.sum(cp.huber(a["x"] - a["A"] @ z, 0.7)) / 2 + cp.sum_squares(a["G"] @ z) / 4 + 0.2 * cp.norm(z), []), {},
    ),
    "an affine set": (
        BASE | {"dims": {"m": 6, "n": 4, "k": 2}, "parameters": {"A": ["m", "n"], "C": ["k", "n"], "d": ["k"]}, "minimize": {"f": "1/2*sumsq(x - A @ z)"}, "constraints": ["C @ z == d"]},
        lambda z, a: (residual(z, a), [a["C"] @ z == a["d"]]), {},
    ),
    "a family of views": (
        BASE | {"dims": {"m": 6, "n": 4, "K": 3}, "parameters": {"U": ["K", "m", "n"]}, "minimize": {"f": "1/2*sum(sumsq(x - U[k] @ z) for k in K)", "g": "0.4*norm1(z)"}},
        lambda z, a: (sum(cp.sum_squares(a["x"] - u @ z) for u in a["U"]) / 2 + 0.4 * cp.norm1(z), []), {},
    ),
    "poisson with identity link": (
        BASE | {"inputs": {"x": {"shape": ["n"]}}, "parameters": {"c": ["n"]}, "minimize": {"f": "1/2*sumsq(z - c)", "g": "sum(z - (1 + x**2) * log(z))"}, "constraints": ["z >= 0"]},
        lambda z, a: (cp.sum_squares(z - a["c"]) / 2 + cp.sum(z - cp.multiply(1 + a["x"] ** 2, cp.log(z))), []), {"step": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_problems_that_nobody_has_seen_are_solved(name: str) -> None:
    spec, case, more = OWN[name]
    spec = {"objective": "own", **spec}
    dims, parameters, inputs = tensors(spec, 11)
    parameters = {k: v.abs() + 0.1 if k == "w" else v for k, v in parameters.items()}
    arrays = {k: v.numpy() for k, v in parameters.items()} | {
        k: v.numpy() for k, v in zip(spec["inputs"], inputs, strict=True)
    }
    algorithms = fitting(spec, dims, **more)
    assert algorithms
    for algorithm in algorithms:
        z = network(spec, dims, parameters, algorithm, **more)(*inputs)
        assert z.isfinite().all()
        z = z.mT if z.ndim == 2 else z
        want = _by_scipy(arrays) if case is None else optimum(case, tuple(z.shape), arrays)
        assert np.abs(z.numpy() - want).max() < 1e-5, algorithm


def _by_scipy(a: dict[str, np.ndarray]) -> np.ndarray:
    """The Fair penalty, which CVXPY does not know to be convex."""
    f = lambda z: ((a["x"] - a["A"] @ z) ** 2).sum() / 2 + 0.5 * (np.abs(z) - np.log1p(np.abs(z))).sum()
    return scipy.optimize.minimize(f, np.zeros(4), tol=1e-14, options={"gtol": 1e-9}).x


def test_open_sizes_are_read_off_the_parameters() -> None:
    spec = {
        "objective": "open",
        **BASE,
        "dims": {"m": "observations", "n": "features"},
        "minimize": {"f": "1/(2*m)*sumsq(x - A @ z)", "g": "0.1*norm1(z)"},
    }
    a, x = torch.randn(7, 3, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    net = unroll.compile(
        {**spec, "unroll": {"algorithm": "fista", "layers": LAYERS}}, parameters={"A": a}, dtype=torch.float64
    )
    for row, b in zip(net(x), x, strict=True):
        want = Lasso(0.1, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(a.numpy(), b.numpy()).coef_
        assert np.allclose(row.numpy(), want, atol=1e-6)


# --- starts and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "want"), [("1/n", 0.25), ("A.T @ x", None), ("0.5*ones(n)", 0.5)])
def test_the_start_is_what_the_spec_says(written: str, want: float | None) -> None:
    dims, parameters, (x,) = tensors({**BASE})
    spec = {"objective": "own", **BASE, "minimize": "1/2*sumsq(x - A @ z)"}
    first = network(spec, dims, parameters, "gradient_descent", 2, start={"z": written}).trace(x).iterates["z"][0]
    assert torch.allclose(
        first, parameters["A"].mT @ x if want is None else torch.full((4,), want, dtype=torch.float64)
    )


L1 = {"f": "1/2*sumsq(x - A @ z)", "g": "0.1*norm1(z)"}
MISFITS: dict[str, tuple[Any, list[str], dict[str, Any], str, str]] = {
    "not smooth": (L1, [], {"algorithm": "gradient_descent"}, "E303", "not smooth"),
    "no set": (L1, [], {"algorithm": "projected_gradient"}, "E303", "neither smooth nor a constraint"),
    "only smooth": ("sumsq(x - A @ z)", [], {"algorithm": "projected_gradient"}, "E303", "no constraint"),
    "nothing smooth": ("norm1(z)", [], {"algorithm": "proximal_gradient"}, "E303", "no term is smooth"),
    "not joint": (L1, ["z in sphere"], {"algorithm": "proximal_gradient"}, "E303", "no rule joins them"),
    "not proximable": ("1/2*sumsq(z) + norm1(A @ z - x)", [], {"algorithm": "fista"}, "E303", "not declared orthonormal"),
    "unknown": (L1, [], {"algorithm": "fistaa"}, "E303", "unknown algorithm"),
    "unknown momentum": (L1, [], {"algorithm": "fista", "momentum": "nestrov"}, "E303", "does not know the momentum"),
    "a momentum too small": (L1, [], {"algorithm": "fista", "momentum": "chambolle_dossal(2)"}, "E303", "larger than 2"),
    "momentum where there is none": (L1, [], {"algorithm": "proximal_gradient", "momentum": "beck_teboulle"}, "E303", "no momentum|does not know"),
    "no constant": ("sum(exp(A @ z) - x * (A @ z))", [], {"algorithm": "gradient_descent"}, "E304", "no Lipschitz constant"),
    "linear": ("dot(x, A @ z) + norm1(z)", [], {"algorithm": "proximal_gradient"}, "E30[34]", "linear|no gradient|smooth"),
    "a start of another shape": (L1, [], {"algorithm": "fista", "start": {"z": "x"}}, "E131", "another shape"),
    "a start that is not a variable": (L1, [], {"algorithm": "fista", "start": {"y": "1"}}, "E214", "not a variable"),
    "a start that depends on the variable": (L1, [], {"algorithm": "fista", "start": {"z": "2*z"}}, "E101", "depends"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_with_what_was_needed(name: str) -> None:
    objective, constraints, settings, code, words = MISFITS[name]
    spec = {
        "objective": "own",
        **BASE,
        "minimize": objective,
        "constraints": constraints,
        "unroll": {"layers": 2, **settings},
    }
    with pytest.raises(SpecError) as refused:
        unroll.derive(spec)
    assert re.fullmatch(code, refused.value.code) and re.search(words, str(refused.value))
    assert refused.value.where is not None


def test_what_is_held_is_a_constant_however_it_bends() -> None:
    """A kink within stop_gradient is none of the step's: the gradient is that of autograd with the part detached."""
    dims, parameters, (x,) = tensors({**BASE})
    spec = {"objective": "own", **BASE, "minimize": "sum(stop_gradient(maximum(z, x0)) * (z - 1)**2)"}
    spec["parameters"] = {**BASE["parameters"], "x0": ["n"]}
    x0 = torch.randn(4, dtype=torch.float64)
    net = network(spec, dims, {**parameters, "x0": x0}, "gradient_descent", 1, step=0.1)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((torch.maximum(z, x0).detach() * (z - 1) ** 2).sum(), z)
    assert torch.allclose(net(x, z=z), z - 0.1 * slope)
    for bent in ("sum(stop_gradient(maximum(z, x0)) * abs(z - 1))", "sum(stop_gradient(abs(z))) + norm1(z)"):
        with pytest.raises(SpecError, match="E303.*not smooth"):
            network({**spec, "minimize": bent}, dims, {**parameters, "x0": x0}, "gradient_descent", 1, step=0.1)


def test_the_refusal_names_an_algorithm_that_fits() -> None:
    with pytest.raises(SpecError, match="proximal_gradient or forward_backward_forward or douglas_rachford fits"):
        unroll.derive(
            {"objective": "own", **BASE, "minimize": L1, "unroll": {"algorithm": "gradient_descent", "layers": 2}}
        )


# --- values that the derivation does not allow ------------------------------------------------------------------------


def test_a_concave_kink_is_taken_through_its_prox() -> None:
    """-lam |z|: not smooth, whatever the sign; the prox pushes away from 0."""
    spec = {
        "objective": "own",
        **BASE,
        "scalars": {"lam": 0.1},
        "minimize": {"f": "1/2*sumsq(x - A @ z)", "g": "-lam*norm1(z)"},
    }
    dims, parameters, (x,) = tensors(spec)
    net = network(spec, dims, parameters, "proximal_gradient", 60)
    values = net.trace(x).terms["total"]
    assert (values.diff() <= 1e-12).all() and values[-1] < values[0] - 0.1


def test_a_scalar_declared_positive_stays_positive() -> None:
    with pytest.raises(unroll.UnrollError, match="declared positive") as refused:
        unroll.compile("ista", scalars={"lam": -0.5})
    assert refused.value.code == "E403"


def test_a_step_that_is_not_finite_is_refused() -> None:
    spec = {"objective": "own", **BASE, "minimize": L1}
    dims, parameters, _ = tensors(spec)
    with pytest.raises(unroll.UnrollError, match="not finite"):
        network(spec, dims, {k: 0 * v for k, v in parameters.items()}, "proximal_gradient", 2)


@pytest.mark.parametrize(
    "f", ["sum((z - x)**64)", "sum(tanh(z) * log(1 + z**2))", "entropy(sigmoid(1/3 + z)) + sumsq(z - x)"]
)
def test_what_nothing_reads_is_not_derived(f: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    for name, where in (("bounds", parts.curvature), ("proximable", parts)):
        monkeypatch.setattr(where, name, lambda e, z: asked.append(e))  # pyright: ignore[reportUnknownLambdaType]
    spec: Spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["n"]},
        "minimize": {"f": f},
        "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.01},
    }
    net, x = unroll.compile(spec), torch.linspace(-1, 1, 3)
    assert torch.isfinite(net(x[None])).all() and not asked
    spec["unroll"]["step"] = "1/L"
    with pytest.raises(SpecError, match="no Lipschitz constant"):
        unroll.compile(spec)
    assert asked
