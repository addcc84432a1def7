"""Algorithms as texts: their limits against CVXPY, their iterates against the loops of the papers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import unroll
from unroll.derivation.algorithms import every
from unroll.errors import SpecError, UnrollError

Spec = dict[str, Any]
M, N = 6, 8
SHARED: Spec = {
    "dims": {"m": M, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
    "scalars": {"lam": 0.1, "mu": 0.2},
}  # fmt: skip
FIT = "1/2*sumsq(x - A @ z)"
PROBLEMS: dict[str, tuple[Spec, Any]] = {
    "ridge": (
        {"minimize": {"fit": FIT, "ridge": "lam/2*sumsq(z)"}},
        lambda z, a, x: (cp.sum_squares(x - a @ z) / 2 + 0.05 * cp.sum_squares(z), []),
    ),
    "logistic": (
        {"minimize": {"fit": "sum(logistic(x * (A @ z)))", "ridge": "lam/2*sumsq(z)"}},
        lambda z, a, x: (cp.sum(cp.logistic(-cp.multiply(x, a @ z))) + 0.05 * cp.sum_squares(z), []),
    ),
    "lasso": (
        {"minimize": {"fit": FIT, "sparsity": "lam*norm1(z)"}},
        lambda z, a, x: (cp.sum_squares(x - a @ z) / 2 + 0.1 * cp.norm1(z), []),
    ),
    "box": (
        {"minimize": {"fit": FIT}, "constraints": ["0 <= z <= 1/2"]},
        lambda z, a, x: (cp.sum_squares(x - a @ z) / 2, [z >= 0, z <= 0.5]),
    ),
    "fused": (
        {"minimize": {"fit": FIT, "sparsity": "lam*norm1(z)", "jumps": "mu*norm1(difference(z))"}},
        lambda z, a, x: (cp.sum_squares(x - a @ z) / 2 + 0.1 * cp.norm1(z) + 0.2 * cp.norm1(cp.diff(z)), []),
    ),
    "robust": (
        {"minimize": {"fit": "norm1(A @ z - x)", "ridge": "mu/2*sumsq(z)"}, "constraints": ["z >= 0"]},
        lambda z, a, x: (cp.norm1(a @ z - x) + 0.1 * cp.sum_squares(z), [z >= 0]),
    ),
}
"""name -> (objective, the same for CVXPY)."""
OTHERS: dict[str, Spec] = {
    "simplex": {"minimize": {"fit": FIT}, "constraints": ["z in simplex"]},
    "sums": {"minimize": {"fit": "-dot(A.T @ x, z) + sum(z*log(z))"}, "constraints": ["z in simplex", "sum(z) == 1"], "variables": {"z": {"shape": ["n"], "positive": True}}},
    "concave": {"minimize": {"energy": "1/2*sumsq(z)", "memory": "-logsumexp(A @ z)"}, "inputs": {}},
    "smoothed": {"minimize": {"fit": FIT, "sparsity": "lam*sum(sqrt(mu + z**2))"}},
    "weighted": {"minimize": {"fit": FIT, "sparsity": "lam*sum(log(1 + abs(z) / mu))"}},
    "positive": {
        "minimize": {"fit": FIT}, "parameters": {"A": {"shape": ["m", "n"], "positive": True}},
        "variables": {"z": {"shape": ["n"], "positive": True}}, "inputs": {"x": {"shape": ["m"], "positive": True}},
    },
}  # fmt: skip
"""Of algorithms that claim no optimum of a convex problem, or take one kind of problem alone."""
CONDITION = {"lasso": 1e3, "ridge": 1e3}
"""That of A'A + lam I, or of A A' where A is wide; else random."""


def data(name: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(M, N, generator=g, dtype=torch.float64)
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    top = 0.1 * CONDITION.get(name, 9)
    s = torch.linspace(0.3, top**0.5, M, dtype=torch.float64)
    a, x = u @ (s[:, None] * v), torch.randn(M, generator=g, dtype=torch.float64)
    return (a.abs(), x.abs()) if name == "positive" else (a, x)


def optimum(name: str) -> float:
    a, x = (t.numpy() for t in data(name))
    z = cp.Variable(N)
    cost, constraints = PROBLEMS[name][1](z, a, x)
    problem = cp.Problem(cp.Minimize(cost), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return float(problem.value)


def compiled(name: str, algorithm: str, layers: int, **more: Any) -> Any:
    own = OTHERS[name] if name in OTHERS else PROBLEMS[name][0]
    spec = {**SHARED, **own, "name": name, "unroll": {"algorithm": algorithm, "layers": layers, **more}}
    unused = {"lam", "mu"} - {s for s in ("lam", "mu") if s in str(own)}
    spec["scalars"] = {k: v for k, v in SHARED["scalars"].items() if k not in unused}
    return unroll.compile(spec, parameters={"A": data(name)[0]}, dtype=torch.float64)


# --- limits -----------------------------------------------------------------------------------------------------------

LAYERS = {"ridge": 4000, "logistic": 60, "lasso": 500, "box": 250, "fused": 160, "robust": 250}
FITTING = {
    "ridge": "adaptive_admm admm chambolle_pock condat_vu coordinate_descent davis_yin douglas_rachford fista forward_backward_forward gradient_descent heavy_ball nesterov proximal_gradient",
    "logistic": "adaptive_admm admm chambolle_pock condat_vu davis_yin fista forward_backward_forward gradient_descent heavy_ball nesterov proximal_gradient",
    "lasso": "adaptive_admm admm chambolle_pock condat_vu coordinate_descent davis_yin douglas_rachford fista forward_backward_forward proximal_gradient",
    "box": "adaptive_admm admm chambolle_pock condat_vu coordinate_descent davis_yin douglas_rachford fista forward_backward_forward projected_gradient proximal_gradient",
    "fused": "adaptive_admm admm chambolle_pock condat_vu davis_yin douglas_rachford fista forward_backward_forward proximal_gradient",
    "robust": "adaptive_admm admm chambolle_pock condat_vu",
}
"""Problem -> the algorithms of the library that claim optima and fit."""


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_claims_optima_reaches_them(name: str) -> None:
    want, x, fitting = optimum(name), data(name)[1], list[str]()
    for a in (a for a in every() if "optimum" in a.text.record.claimed):
        try:
            net = compiled(name, a.name, LAYERS[name])
        except UnrollError as refused:
            assert refused.code == "E303", a.name
            continue
        fitting.append(a.name)
        assert abs(float(net.objective(x, z=net(x))["total"]) - want) <= 1e-6 * abs(want), a.name
    assert fitting == FITTING[name].split()


# --- the loops of the papers ------------------------------------------------------------------------------------------


def soft(v: Tensor, t: float) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def hand_written(algorithm: str, a: Tensor, x: Tensor, layers: int) -> Tensor:
    """The lasso with lam = 0.1, as the papers write the iteration."""
    n, lam = a.shape[1], 0.1
    z = torch.zeros(n, dtype=a.dtype)
    eye, top = torch.eye(n, dtype=a.dtype), float(torch.linalg.matrix_norm(a, 2)) ** 2
    grad = lambda z: a.T @ (a @ z - x)
    w, u, y, s, q = z, z, z, z, z
    for _ in range(layers):
        match algorithm:
            case "admm":  # Boyd et al. 3.1 and 3.4.3
                z = torch.linalg.solve(a.T @ a + 0.7 * eye, a.T @ x + 0.7 * (w - u))
                over = 1.5 * z - 0.5 * w
                w = soft(over + u, lam / 0.7)
                u = u + over - w
            case "half_quadratic":
                w = soft(z, lam / 0.7)
                z = torch.linalg.solve(a.T @ a + 0.7 * eye, a.T @ x + 0.7 * w)
            case "douglas_rachford":
                z = soft(s, 0.7 * lam)
                s = s + torch.linalg.solve(eye + 0.7 * a.T @ a, 2 * z - s + 0.7 * a.T @ x) - z
            case "davis_yin":
                z, v = s, None  # one prox is left to the other group: nothing
                v = soft(2 * z - s - grad(z) / top, lam / top)
                s = s + v - z
            case "chambolle_pock":  # algorithm 1, theta = 1, K = 1: f is the fit
                y = y + q - soft(y + q, lam)
                after = torch.linalg.solve(eye + a.T @ a, z - y + a.T @ x)
                q, z = 2 * after - z, after
            case "condat_vu":
                y = y + 0.3 * q - 0.3 * soft(y / 0.3 + q, lam / 0.3)
                after = z - (grad(z) + y) / (top / 2 + 0.3)
                q, z = 2 * after - z, after
            case "forward_backward_forward":
                v = soft(z - 0.9 / top * grad(z), 0.9 / top * lam)
                z = v - 0.9 / top * (grad(v) - grad(z))
            case _:
                raise AssertionError(algorithm)
    return z


NUMBERS: dict[str, dict[str, Any]] = {
    "admm": {"rho": 0.7, "relax": 1.5}, "half_quadratic": {"rho": 0.7}, "douglas_rachford": {"step": 0.7}, "davis_yin": {},
    "chambolle_pock": {"tau": 1, "sigma": 1}, "condat_vu": {"sigma": 0.3}, "forward_backward_forward": {},
}  # fmt: skip
SPLIT = {
    "davis_yin": {"f": ["sparsity"]}, "douglas_rachford": {"f": ["fit"], "g": ["sparsity"]},
    "chambolle_pock": {"f": ["fit"], "g": ["sparsity"]}, "condat_vu": {"g": ["sparsity"]},
}  # fmt: skip


@pytest.mark.parametrize("algorithm", NUMBERS)
def test_a_text_is_the_loop_of_its_paper(algorithm: str) -> None:
    a, x = data("lasso")
    more = {"numbers": NUMBERS[algorithm], "split": SPLIT.get(algorithm, {})}
    for layers in (1, 7):
        net = compiled("lasso", algorithm, layers, **more)
        want = hand_written(algorithm, a, x, layers)
        assert (net(x) - want).abs().max() <= 1e-10 * (1 + want.abs().max())
    assert want.abs().max() > 0


@pytest.mark.parametrize("algorithm", ["heavy_ball", "nesterov"])
def test_momentum_of_smooth_problems(algorithm: str) -> None:
    a, x = data("ridge")
    grad, top = lambda z: a.T @ (a @ z - x) + 0.1 * z, float(torch.linalg.matrix_norm(a, 2)) ** 2 + 0.1
    z = before = y = torch.zeros(N, dtype=a.dtype)
    for k in range(9):
        if algorithm == "heavy_ball":
            z, before = z - grad(z) / top + (z - before) / 2, z
        else:
            after = y - grad(y) / top
            y, z = after + k / (k + 4) * (after - z), after
    net = compiled("ridge", algorithm, 9)
    assert (net(x) - z).abs().max() <= 1e-10 * z.abs().max()


def test_last_is_the_state_where_the_layer_began() -> None:
    """Heavy ball keeps the point before, or the last move: z - last(z), once z has moved."""
    moves = {
        "algorithm": "moves", "solves": "f(z)", "scalars": {"step": "1 / L(f)"}, "states": {"d": {"like": "z"}},
        "updates": {"z": "z - step * grad(f, z) + d / 2", "d": "z - last(z)"},
    }  # fmt: skip
    kept = compiled("ridge", "heavy_ball", 9)
    spec = {**kept.spec.to_dict(), "algorithms": {"moves": moves}, "unroll": {"algorithm": "moves", "layers": 9}}
    net, x = unroll.compile(spec, parameters={"A": data("ridge")[0]}, dtype=torch.float64), data("ridge")[1]
    torch.testing.assert_close(net(x), kept(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("term", ["norm1(B @ z - x)", "norm2(x - B @ z)"])
def test_the_norm_of_an_operator_is_its_largest_singular_value(term: str) -> None:
    """By torch, under the square root of a sum of squares too."""
    b = data("lasso")[0]
    spec = {**SHARED, "name": "p", "parameters": {"B": ["m", "n"]}, "scalars": {}}
    spec |= {"minimize": {"size": "sumsq(z)/2", "term": term}, "unroll": {"algorithm": "chambolle_pock", "layers": 1}}
    net = unroll.compile(spec, parameters={"B": b}, dtype=torch.float64)
    (tau,) = [t for n, t in net.named_buffers() if n.endswith("tau")]
    torch.testing.assert_close(tau, 1 / torch.linalg.matrix_norm(b, 2))


# --- degenerate shapes and data ---------------------------------------------------------------------------------------

FIT_MATRIX = "1/2*sumsq(X - A @ Z)"
DEGENERATE: dict[str, tuple[Spec, str]] = {
    "a number": ({"v": ["n"]}, "lam*abs(dot(v, z) - 1)"),
    "one row": ({"B": [1, "n"]}, "lam*norm1(B @ z)"),
    "square": ({"B": ["n", "n"]}, "lam*norm1(B @ z)"),
    "a shift": ({"B": ["n", "n"], "b": ["n"]}, "lam*norm1(B @ z - b)"),
    "a row of a matrix": ({"v": ["n"]}, "lam*norm1(v.T @ Z)"),
    "a square matrix": ({"B": ["n", "n"]}, "lam*norm1(B @ Z)"),
    "from the right": ({"C": ["N", "N"]}, "lam*norm1(Z @ C)"),
    "groups": ({"B": ["m", "n"]}, "lam*group_norm(B @ Z, axis=1)"),
}
"""What K is -> (parameters, term)."""


@pytest.mark.parametrize("size", [{"n": 4, "N": 3}, {"n": 1, "N": 1}], ids=["many", "one entry"])
@pytest.mark.parametrize("what", DEGENERATE)
def test_splittings_agree_on_degenerate_operators(what: str, size: dict[str, int]) -> None:
    """Three algorithms that share no formula but the objective; a blank sample among others, none, and float32."""
    parameters, term = DEGENERATE[what]
    matrix = "Z" in term
    sizes = {"m": 4, **size}
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    parameters = {"A": ["m", "n"], **parameters}
    given = {k: draw(*(n if isinstance(n, int) else sizes[n] for n in shape)) for k, shape in parameters.items()}
    x = draw(3, *([sizes["N"]] if matrix else []), 4)
    x[1] = 0
    spec: Spec = {
        "dims": sizes, "variables": {"Z": ["n", "N"]} if matrix else {"z": ["n"]}, "scalars": {"lam": 0.3}, "name": "p",
        "inputs": {"X": ["m", "N"]} if matrix else {"x": ["m"]}, "parameters": parameters,
        "minimize": {"fit": FIT_MATRIX if matrix else FIT, "term": term},
    }  # fmt: skip
    if not matrix:
        del spec["dims"]["N"]
    found: list[Tensor] = []
    for algorithm in ("admm", "chambolle_pock", "condat_vu"):
        whole = {**spec, "unroll": {"algorithm": algorithm, "layers": 1500}}
        try:
            net = unroll.compile(whole, parameters=given, dtype=torch.float64)
        except SpecError as refused:
            assert (refused.code, algorithm) == ("E302", "admm") and what in ("a number", "from the right")
            continue
        found.append(net.objective(x, **{net.variables[0]: net(x)})["total"])
        assert net(x[:0], layers=2).shape[0] == 0
        narrow = unroll.compile(whole, parameters={k: v.float() for k, v in given.items()})
        torch.testing.assert_close(narrow(x.float(), layers=50).double(), net(x, layers=50), rtol=1e-3, atol=1e-3)
    assert len(found) >= 2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-8)


# --- states live on ---------------------------------------------------------------------------------------------------

ALL = [a.name for a in every() if a.name not in ("power_step", "palm", "joint_proximal_gradient", "scaled_gradient")]


def problem_of(algorithm: str) -> str:
    return {
        "gradient_descent": "ridge", "heavy_ball": "ridge", "nesterov": "ridge", "projected_gradient": "box", "newton": "logistic",
        "mirror_descent": "simplex", "bregman_projections": "sums", "multiplicative": "positive", "irls": "smoothed", "cccp": "concave", "reweighted_l1": "weighted",
    }.get(algorithm, "lasso")  # fmt: skip


def inputs_of(name: str) -> tuple[Tensor, ...]:
    return (data(name)[1],) if OTHERS.get(name, SHARED).get("inputs", True) else ()


@pytest.mark.parametrize("algorithm", ALL)
def test_a_block_goes_on_as_its_algorithm_does(algorithm: str, tmp_path: Path) -> None:
    """Alone, in a block, two steps at a time, deeper than compiled, after restore: the same iterates."""
    name = problem_of(algorithm)
    x = inputs_of(name)
    alone = torch.stack(compiled(name, algorithm, 6).trace(*x).iterates["z"])
    spec = compiled(name, algorithm, 6).spec.to_dict()
    given = {"parameters": {"A": data(name)[0]}, "dtype": torch.float64}
    for steps in (1, 2):
        blocks = {"blocks": [{"block": "b", "algorithm": algorithm, "steps": steps}], "layers": 6 // steps}
        net = unroll.compile({**spec, "unroll": blocks}, **given)
        found = torch.stack(net.trace(*x).iterates["z"])
        torch.testing.assert_close(found, alone[::steps], rtol=1e-10, atol=1e-12)
    shallow = compiled(name, algorithm, 2)
    shallow.save(tmp_path / "net")
    torch.testing.assert_close(unroll.restore(tmp_path / "net")(*x, layers=6), alone[-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", ALL)
def test_replaced_by_what_was_derived_nothing_changes(algorithm: str) -> None:
    name = problem_of(algorithm)
    x, text = inputs_of(name), next(a.text for a in every() if a.name == algorithm)
    updates = {u: "derived" for u in text.record.updates if u != "momentum"}
    plain, same = compiled(name, algorithm, 5), compiled(name, algorithm, 5, updates=updates)
    assert torch.equal(plain(*x), same(*x))
    assert len(same.derivation.exact.departures) == len(updates)


@pytest.mark.parametrize("algorithm", ["admm", "condat_vu", "half_quadratic", "davis_yin"])
def test_units_of_the_operator_do_not_matter(algorithm: str) -> None:
    """A and x in other units, lam with their square: the same iterates, by the starts of the numbers, relative to L and norms.

    Steps of chambolle_pock are those of K alone: there the units of z count.
    """
    a, x = data("lasso")
    small = compiled("lasso", algorithm, 8)
    spec = small.spec.to_dict()
    c = 1e3
    large = unroll.compile(spec, parameters={"A": c * a}, scalars={"lam": 0.1 * c**2}, dtype=torch.float64)
    torch.testing.assert_close(large(c * x), small(x), rtol=1e-9, atol=1e-11)


# --- a text of one's own ----------------------------------------------------------------------------------------------

INERTIAL = """
algorithm: inertial_three_operators
about: Davis-Yin about an extrapolated point
source: of this test
solves: f(z) + g(z) + h(z)
scalars:
  step: 1 / L(h)
  alpha: {start: 0.2, below: 1}
states:
  s: z
  s_before: z
updates:
  q: s + alpha * (s - s_before)
  z: prox(step * g, q)
  v: prox(step * f, 2 * z - q - step * grad(h, z))
  s_before: s
  s: q + v - z
claims: [optimum]
"""


def test_a_text_outside_of_the_package_is_derived_checked_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inertial_three_operators.yaml").write_text(INERTIAL)
    monkeypatch.chdir(tmp_path)
    objective = {"minimize": {"fit": FIT, "sparsity": "lam*norm1(z)"}, "constraints": ["z <= 1/4"]}
    shared = {**SHARED, "scalars": {"lam": 0.1}, **objective, "name": "own"}
    own = {
        "algorithm": "inertial_three_operators.yaml",
        "layers": 400,
        "split": {"f": ["constraint"], "g": ["sparsity"]},
    }
    a, x = data("box")
    net = unroll.compile({**shared, "unroll": own}, parameters={"A": a}, dtype=torch.float64)
    z = cp.Variable(N)
    cost = cp.sum_squares(x.numpy() - a.numpy() @ z) / 2 + 0.1 * cp.norm1(z)
    problem = cp.Problem(cp.Minimize(cost), [z <= 0.25])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    assert abs(float(net.objective(x, z=net(x).clamp_max(0.25))["total"]) - float(problem.value)) < 1e-6 * abs(
        problem.value
    )
    rows = unroll.check({**shared, "unroll": {**own, "layers": 3}}).rows
    assert not [r for r in rows if r.verdict not in ("holds", "noted")]
    learned = {**own, "layers": 3, "learn": {"theta": {"replaces": "lam * step", "positive": True}}}
    free = unroll.compile({**shared, "unroll": learned}, parameters={"A": a}, dtype=torch.float64)
    exact = unroll.compile({**shared, "unroll": {**own, "layers": 3}}, parameters={"A": a}, dtype=torch.float64)
    torch.testing.assert_close(free(x), exact(x))
    free(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in free.parameters())


def test_a_saved_network_holds_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path, and by name from the folder where one is: it is restored where neither is."""
    (tmp_path / "specs" / "algorithms").mkdir(parents=True)
    for file in ("inertial_three_operators.yaml", "specs/algorithms/inertial_three_operators.yaml"):
        (tmp_path / file).write_text(INERTIAL)
    monkeypatch.chdir(tmp_path)
    a, x = data("lasso")
    for i, algorithm in enumerate(["inertial_three_operators.yaml", "inertial_three_operators"]):
        net = compiled("lasso", algorithm, 5)
        block = {**net.spec.to_dict(), "unroll": {"layers": 5, "blocks": [{"block": "b", "algorithm": algorithm}]}}
        block.pop("algorithms")
        torch.testing.assert_close(unroll.compile(block, parameters={"A": a}, dtype=torch.float64)(x), net(x))
        net.save(tmp_path / f"net{i}")
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with monkeypatch.context() as m:
            m.chdir(tmp_path / "elsewhere")
            assert torch.equal(unroll.restore(tmp_path / f"net{i}")(x), net(x))


TEXT = """
algorithms:
  own:
    algorithm: own
    solves: h(z) + f(z)
    scalars: {step: 1 / L(h)}
    states: {s: z}
    updates:
      v: z - step * grad(h, z)
      s: z
      z: prox(step * f, v)
"""
COMPOSITE = ("h(z) + f(z)", "h(z) + sum(f[j](K[j] @ z) for j in J)")
BROKEN: dict[str, tuple[list[tuple[str, str]], str, str]] = {
    "solves": ([("h(z) + f(z)", "h(z) + * f(z)")], "E320", "does not say what is minimised"),
    "a letter nothing uses": ([("h(z) + f(z)", "h(z) + f(z) + g(z)")], "E320", "no update uses the letter g"),
    "an unknown name": ([("z - step *", "z - stp *")], "E101", "unknown name 'stp'"),
    "an update in a residual": ([("prox(step * f, v)\n", "prox(step * f, v)\n    residuals: {gap: v - z}\n")], "E101", "'v' is an update that has no value here"),
    "an open bracket": ([("grad(h, z)", "grad(h, z")], "E100", "was never closed"),
    "too few arguments": ([("prox(step * f, v)", "prox(step * f)")], "E105", "prox takes 2 arguments, not 1"),
    "a name of the problem": ([("prox(step * f, v)", "prox(step * f, A.T @ v)")], "E101", "unknown name 'A'"),
    "a bare letter": ([("z - step * grad(h, z)", "z - step * grad(h, z) + h")], "E320", "h is a letter"),
    "last of what has not changed": ([("prox(step * f, v)", "prox(step * f, v + z - last(z))")], "E320", "nothing has changed it yet"),
    "argmin elsewhere": ([("v: z - step", "v: argmin(sumsq(z - s)) - step")], "E320", "argmin is over the update it stands in"),
    "no operator": ([("1 / L(h)", "1 / norm(K)")], "E320", "K is not an operator"),
    "no member": ([COMPOSITE, ("step * f,", "step * f[j],")], "E320", "no member j is meant here"),
    "a member left out": ([COMPOSITE, ("prox(step * f, v)", "v - sum(K[j].T @ prox(f, K[j] @ v) for j in J)")], "E320", "f has a member for each j"),
    "an indefinite number": ([("{step: 1 / L(h)}", "{step: {start: 2, below: 1}}")], "E132", "a step size is below 1"),
    "no minimum in closed form": ([("prox(step * f, v)", "prox(step * f, v) + argmin(h(z) + norm1(z - v))")], "E302", "no closed form"),
    "a requirement": ([("    states:", "    requires: [f smooth]\n    states:")], "E320", "requires nothing that is known"),
    "two variables": ([("h(z) + f(z)", "h(z) + f(y)")], "E320", "no update changes y, the variable"),
    "a letter twice": ([("h(z) + f(z)", "f(z) + f(z)")], "E320", "a letter stands twice"),
    "a letter that is a number": ([("{step: 1 / L(h)}", "{step: 1 / L(h), f: 1}")], "E320", "f is a letter"),
    "an unknown index": ([("{s: z}", '{"s[i]": z}')], "E320", "i is no index"),
    "a state that stays": ([("{s: z}", "{s: z, r: z}")], "E320", "no update changes the state r"),
    "no answer": ([("z: prox(step * f, v)", "y: prox(step * f, v)")], "E320", "no update changes z"),
    "a number that is not positive": ([("{s: z}", "{s: {number: -1}}")], "E132", "s is one positive number"),
    "a step of a prox that is not positive": ([("step * f,", "-step * f,")], "E132", "the step of a prox is positive"),
    "numbers out of order": ([("{step: 1 / L(h)}", "{a: 2 * step, step: 1 / L(h)}")], "E320", "a reads step, which stands below it"),
    "rules that nothing names": ([("    states:", "    momenta: {slow: {updates: {momentum: layer}}}\n    states:")], "E320", "the update momentum names none"),
    "a note of nothing": ([("    states:", "    notes: {w: what}\n    states:")], "E320", "there is no update w"),
    "an unknown key": ([("    states:", "    state:")], "E201", "state"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_text_is_refused_where_it_is_broken(what: str) -> None:
    changes, code, message = BROKEN[what]
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    problem = f"""
name: p
dims: {{m: 6, n: 8}}
variables: {{z: [n]}}
inputs: {{x: [m]}}
parameters: {{A: [m, n]}}
scalars: {{lam: 0.1}}
minimize: {{fit: "{FIT}", sparsity: lam*norm1(z)}}
{text}
unroll: {{algorithm: own, layers: 3}}
"""
    with pytest.raises(SpecError, match=message) as refused:
        unroll.compile(problem)
    assert refused.value.code == code
    assert refused.value.where is not None
    line = problem.splitlines()[refused.value.where.line - 1]
    assert line in text, line  # the place is in the text of the algorithm


def test_derived_is_what_was_there_at_any_point() -> None:
    """derived(z=q) reads what stands above at q too: of proximal gradient, and of the variable itself in an update before it."""
    a, x = data("lasso")
    step, z = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2, torch.zeros(N, dtype=a.dtype)
    layer = lambda z: soft(z - step * a.T @ (a @ z - x), 0.1 * step)
    for _ in range(3):
        z = 2 * layer(z) - layer(a.T @ x)
    net = compiled("lasso", "proximal_gradient", 3, updates={"z": "2*derived - derived(z=A.T @ x)"})
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    z = torch.zeros(N, dtype=a.dtype)
    for _ in range(3):
        z = soft(z - step * a.T @ (a @ z - x) + z / 10, 0.1 * step)
    net = compiled("lasso", "proximal_gradient", 3, updates={"v": "derived + z/10"})
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    with pytest.raises(SpecError, match="z is n × 1"):
        compiled("lasso", "proximal_gradient", 3, updates={"z": "derived(z=x)"})


def test_what_was_not_dealt_as_asked_is_refused() -> None:
    for more, message in [
        ({"split": {"q": ["fit"]}}, "has no letter 'q'"),
        ({"split": {"f": ["fidelity"]}}, "no term 'fidelity'"),
        ({"numbers": {"stp": 1}}, "has no number 'stp'"),
        ({"updates": {"w": "derived"}}, "has no update 'w'"),
        ({"numbers": {"step": 0.1}, "step": 0.2}, "given twice"),
        ({"numbers": {"step": "norm1(z)"}}, "step"),
    ]:
        with pytest.raises(SpecError, match=message):
            compiled("lasso", "proximal_gradient", 2, **more)


# --- what is learned of a text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "replaces"),
    [
        ("admm", "rho"),
        ("admm", "relax"),
        ("admm", "lam/rho"),
        ("admm", "mu/rho"),
        ("admm", "A.T"),
        ("chambolle_pock", "tau"),
        ("chambolle_pock", "sigma"),
        ("condat_vu", "lam*tau"),
        ("condat_vu", "tau*A.T"),
    ],
)
def test_numbers_and_matrices_of_a_text_are_learned(algorithm: str, replaces: str) -> None:
    """They start at the algorithm, and a gradient reaches all of their layers."""
    x = data("fused")[1].expand(3, M)
    learn = {"learn": {"free": {"replaces": replaces, "positive": "A" not in replaces}}}
    exact, net = compiled("fused", algorithm, 4), compiled("fused", algorithm, 4, **learn)
    torch.testing.assert_close(net(x), exact(x), rtol=1e-10, atol=1e-12)
    net(x).square().sum().backward()
    (free,) = net.parameters()
    assert len(free) == 4
    used = free.grad.reshape(4, -1).abs().sum(1) > 0
    assert used[1:-1].all()  # duals start at 0; what the last layer leaves them is read by none
