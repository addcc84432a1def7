"""`unroll.solve` by every algorithm that claims optima, against CVXPY, scikit-learn, celer and skglm on their own problems.

python benchmarks/solve_speed.py        prints a table and writes results/solve_speed.json

All reach the same accuracy: each is run with the loosest of its tolerances whose objective lies within 1e-6 of the best one
known, relative, in the worst of the problems; that run is timed. One problem, and 1,000 that share the matrix: for others a
loop over 20 of them, counted 50 times. celer and skglm (pip install celer skglm) are left out where they are not installed, and
compiled before they are timed.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from _record import write
from numpy.typing import NDArray
from sklearn import linear_model
from torch import Tensor

import unroll
from unroll.derivation.algorithms import by_simplicity

Array = NDArray[np.float64]
ACCURACY, MANY, LOOPED = 1e-6, 1000, 20
LADDER = tuple(10.0**-k for k in range(2, 13))
Solve = Callable[[Array, Array, float, float], Array]
"""A (m, n), x (batch, m), weight of the penalty, tolerance -> (batch, n)."""


class Problem:
    """An objective of the library, its data, and what others call it. scale: of the weight, for what others minimise."""

    def __init__(self, objective: str, size: tuple[int, int], labels: bool, others: Mapping[str, Solve]) -> None:
        self.objective, self.labels, self.others = objective, labels, others
        g = np.random.default_rng(0)
        m, n = size
        self.A = g.standard_normal(size) / m**0.5
        z = g.standard_normal((MANY, n)) * (g.random((MANY, n)) < 0.05)
        clean = z @ self.A.T
        self.x = np.sign(clean + 1e-9) if labels else clean + 0.05 * g.standard_normal((MANY, m))
        self.weight = 0.1 * float(np.abs(self.x @ self.A).max(1).min()) * (0.5 if labels else 1)

    def value(self, x: Array, z: Array) -> Array:
        fit = z @ self.A.T
        loss = np.logaddexp(0, -x * fit).sum(1) if self.labels else ((x - fit) ** 2).sum(1) / 2
        ridge = 0.1 / 2 * (z**2).sum(1) if self.objective == "elastic_net" else 0
        return np.asarray(loss + ridge + self.weight * np.abs(z).sum(1), dtype=np.float64)


def looped(fit: Callable[[Array, Array, float, float], Array]) -> Solve:
    """One problem after another, which is how these libraries are used."""
    return lambda A, x, weight, tol: np.stack([fit(A, one, weight, tol) for one in x])


def coordinate(make: Callable[..., Any], **more: Any) -> Solve:
    """An estimator of |x - A z|^2 / 2m + alpha |z|_1."""

    def fit(A: Array, x: Array, weight: float, tol: float) -> Array:
        own = make(alpha=weight / len(A), fit_intercept=False, tol=tol, max_iter=100_000, **more)
        return np.asarray(own.fit(np.asfortranarray(A), x).coef_)

    return looped(fit)


def elastic(make: Callable[..., Any], **more: Any) -> Solve:
    def fit(A: Array, x: Array, weight: float, tol: float) -> Array:
        both = weight + 0.1
        own = make(alpha=both / len(A), l1_ratio=weight / both, fit_intercept=False, tol=tol, max_iter=100_000, **more)
        return np.asarray(own.fit(np.asfortranarray(A), x).coef_)

    return looped(fit)


def logistic(make: Callable[..., Any], strength: Callable[[float, int], dict[str, float]], **more: Any) -> Solve:
    def fit(A: Array, x: Array, weight: float, tol: float) -> Array:
        own = make(fit_intercept=False, tol=tol, max_iter=100_000, **strength(weight, len(A)), **more)
        return np.asarray(own.fit(np.asfortranarray(A), x).coef_).ravel()

    return looped(fit)


def by_cvxpy(objective: str) -> Solve:
    import cvxpy as cp

    def fit(A: Array, x: Array, weight: float, tol: float) -> Array:
        z = cp.Variable(A.shape[1])
        loss = cp.sum(cp.logistic(-cp.multiply(x, A @ z))) if "logistic" in objective else cp.sum_squares(x - A @ z) / 2
        ridge = 0.1 / 2 * cp.sum_squares(z) if objective == "elastic_net" else 0
        goal = cp.Problem(cp.Minimize(loss + ridge + weight * cp.norm1(z)))
        goal.solve(solver=cp.CLARABEL, tol_gap_abs=tol, tol_gap_rel=tol)
        return np.asarray(z.value)

    return looped(fit)


def of_others() -> list[Problem]:
    inverse = lambda weight, m: {"C": 1 / weight}
    others: dict[str, dict[str, Solve]] = {
        "lasso": {"scikit-learn": coordinate(linear_model.Lasso)},
        "elastic_net": {"scikit-learn": elastic(linear_model.ElasticNet)},
        "sparse_logistic_regression": {
            "scikit-learn": logistic(linear_model.LogisticRegression, inverse, l1_ratio=1.0, solver="liblinear")
        },
    }
    for name in ("celer", "skglm"):
        try:
            peer = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: left out")
            continue
        others["lasso"][name] = coordinate(peer.Lasso)
        others["elastic_net"][name] = elastic(peer.ElasticNet)
        if name == "celer":
            others["sparse_logistic_regression"][name] = logistic(peer.LogisticRegression, inverse)
        else:
            mean = lambda weight, m: {"alpha": weight / m}
            others["sparse_logistic_regression"][name] = logistic(peer.SparseLogisticRegression, mean)
    for objective in others:
        others[objective]["cvxpy"] = by_cvxpy(objective)
    sizes = {"lasso": (200, 500), "elastic_net": (200, 500), "sparse_logistic_regression": (300, 100)}
    return [Problem(o, sizes[o], "logistic" in o, found) for o, found in others.items()]


def ours(p: Problem, algorithm: str) -> Solve:
    def fit(A: Array, x: Array, weight: float, tol: float) -> Array:
        found = unroll.solve(
            p.objective,
            torch.as_tensor(x),
            algorithm=algorithm,
            parameters={"A": torch.as_tensor(A)},
            scalars={"lam": weight},
            tol=tol,
            max_iterations=20_000,
        )
        z: Tensor = found.z
        return z.numpy()

    return fit


def timed(run: Callable[[], Array]) -> tuple[float, Array]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def fair(p: Problem, solve: Solve, x: Array, best: Array, budget: float) -> tuple[float, float] | None:
    """Seconds and tolerance of the loosest run that is accurate enough; None where none is within `budget` seconds."""
    spent = 0.0
    for tol in LADDER:
        try:
            seconds, z = timed(lambda tol=tol: solve(p.A, x, p.weight, tol))
        except unroll.UnrollError:
            return None
        spent += seconds
        if (np.abs(p.value(x, z) - best) <= ACCURACY * np.abs(best)).all():
            return min(seconds, timed(lambda tol=tol: solve(p.A, x, p.weight, tol))[0]), tol
        if spent > budget:
            return None
    return None


def main(budget: float) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for p in of_others():
        exact = unroll.solve(
            p.objective,
            torch.as_tensor(p.x),
            parameters={"A": torch.as_tensor(p.A)},
            scalars={"lam": p.weight},
            tol=1e-12,
        )
        assert bool(exact.converged.all())
        best = p.value(p.x, exact.z.numpy())
        claims = [a.name for a in by_simplicity() if "optimum" in a.text.record.claimed]
        runs = {**p.others, "unroll": ours(p, "auto"), **{f"unroll, {a}": ours(p, a) for a in claims}}
        for name, solve in runs.items():
            solve(p.A, p.x[:2], p.weight, 1e-4) if name in p.others else None  # compiled before
            one = fair(p, solve, p.x[:1], best[:1], budget)
            batch = MANY if name.startswith("unroll") else LOOPED
            many = fair(p, solve, p.x[:batch], best[:batch], budget) if one is not None else None
            if one is None:
                continue
            rows.append(
                {
                    "problem": p.objective,
                    "solver": name,
                    "one, s": one[0],
                    "1,000, s": many[0] * MANY / batch if many is not None else None,
                    "tolerance": one[1],
                }
            )
            print(rows[-1], flush=True)
    write("solve_speed", rows, accuracy=ACCURACY, budget_s=budget)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=20, help="CPU seconds in which an accurate run has to be found")
    main(parser.parse_args().budget)
