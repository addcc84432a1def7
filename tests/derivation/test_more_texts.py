"""Texts beside splittings: messages, majorants, second derivatives, entropy, multiplication; each against a loop written by hand."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

M, N = 12, 20
SHARED: dict[str, Any] = {
    "dims": {"m": M, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
}  # fmt: skip
FIT = "1/2*sumsq(x - A @ z)"
POSITIVE = {
    "variables": {"z": {"shape": ["n"], "positive": True}}, "inputs": {"x": {"shape": ["m"], "positive": True}},
    "parameters": {"A": {"shape": ["m", "n"], "positive": True}},
}  # fmt: skip


def data(batch: int = 3, positive: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    a = torch.randn(M, N, generator=g, dtype=torch.float64) / M**0.5
    x = torch.randn(batch, M, generator=g, dtype=torch.float64)
    x[1:2] = 0  # a blank sample among others
    return (a.abs(), x.abs()) if positive else (a, x)


def network(
    terms: dict[str, str], algorithm: str, layers: int, a: Tensor, more: dict[str, Any] | None = None, **unrolled: Any
) -> Any:
    spec = {
        **SHARED,
        "minimize": terms,
        **(more or {}),
        "name": "test",
        "unroll": {"algorithm": algorithm, "layers": layers, **unrolled},
    }
    return unroll.compile(spec, parameters={"A": a}, dtype=torch.float64)


def soft(v: Tensor, t: Tensor | float) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def values(net: Any, *x: Tensor) -> Tensor:
    """(layers + 1, samples): the objective after every layer."""
    return torch.stack([net.objective(*x, z=z)["total"] for z in net.trace(*x).iterates["z"]])


# --- approximate message passing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["1/2", "3"])
def test_amp_is_the_loop_of_its_paper(weight: str) -> None:
    """The Onsager term counts what is not 0; the fidelity's weight does not matter."""
    a, x = data()
    net = network({"fit": f"{weight}*sumsq(x - A @ z)", "sparsity": "norm1(z)"}, "amp", 6, a, numbers={"alpha": 1.4})
    z, v = torch.zeros(3, N, dtype=torch.float64), x.clone()
    for _ in range(6):
        theta = 1.4 * v.norm(dim=-1, keepdim=True) / M**0.5
        z = soft(z + v @ a, theta)
        v = x - z @ a.T + (z != 0).double().sum(-1, keepdim=True) / M * v
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    assert torch.equal(net(x)[1], torch.zeros(N, dtype=torch.float64))
    assert net(x[:0]).shape == (0, N)


def test_amp_of_groups_has_their_divergence() -> None:
    """Against automatic differentiation of the step that was emitted."""
    a, x = data()
    terms = {"fit": FIT, "group": "norm2(z)"}
    one, two = (network(terms, "amp", k, a, numbers={"alpha": 1.2})(x[:1])[0] for k in (1, 2))
    shrink = lambda r, t: r * (1 - t / r.norm()).clamp_min(0)
    v, t = x[0], 1.2 * x[0].norm() / M**0.5
    r = v @ a
    z = shrink(r, t)
    trace = torch.autograd.functional.jacobian(lambda r: shrink(r, t), r).trace()
    v = v * trace / M + x[0] - a @ z
    torch.testing.assert_close(one, z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(two, shrink(z + v @ a, 1.2 * v.norm() / M**0.5), rtol=1e-10, atol=1e-12)


def test_vamp_is_the_loop_of_its_paper() -> None:
    """Rangan, Schniter & Fletcher 2019, algorithm 2, sample by sample, each with precisions of its own; shares are kept off 0 and 1."""
    a, x = data()
    net = network({"fit": "50*sumsq(x - A @ z)", "sparsity": "norm1(z)"}, "vamp", 5, a)
    h, eye = 100 * a.T @ a, torch.eye(N, dtype=torch.float64)
    for found, sample in zip(net(x), x, strict=True):
        r, gamma, z = (
            torch.zeros(N, dtype=torch.float64),
            torch.tensor(1.0, dtype=torch.float64),
            torch.zeros(N, dtype=torch.float64),
        )
        for _ in range(5):
            inverse = torch.linalg.inv(eye + h / gamma)
            kept = (inverse.trace() / N).clamp_max(1 - 1e-6)
            q = (inverse @ (r + 100 * a.T @ sample / gamma) - kept * r) / (1 - kept)
            gamma = gamma * (1 - kept) / kept
            z = soft(q, 1 / gamma)
            share = ((z != 0).double().mean()).clamp(1e-6, 1 - 1e-6)
            r, gamma = (z - share * q) / (1 - share), (gamma * (1 - share) / share).clamp_max(1e12)
        torch.testing.assert_close(found, z, rtol=1e-8, atol=1e-9)
    assert net(x[:0]).shape == (0, N)
    assert net(x, layers=60).isfinite().all()


def test_a_number_per_sample_may_stand_before_a_letter() -> None:
    """Worked out where it stands, without a name; against the same with one."""
    a, x = data()
    text = {"algorithm": "own", "solves": "f(z) + g(z)", "states": {"s": {"like": "sumsq(z)", "start": 2}}}
    inline = {**text, "updates": {"v": "z - grad(f, z) / L(f)", "z": "prox(g / (1 + norm2(v)) / s, v)", "s": "s * 2"}}
    z, s, l = torch.zeros(3, N, dtype=torch.float64), 2.0, torch.linalg.matrix_norm(a, 2) ** 2
    for _ in range(4):
        v = z - (z @ a.T - x) @ a / l
        z, s = soft(v, 1 / (1 + v.norm(dim=-1, keepdim=True)) / s), s * 2
    net = network({"fit": FIT, "sparsity": "norm1(z)"}, "own", 4, a, {"algorithms": {"own": inline}})
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)


def test_messages_need_a_quadratic_and_a_step_without_jumps() -> None:
    a, _ = data()
    with pytest.raises(UnrollError, match="E303.*is not quadratic"):
        network({"fit": "sum(huber(x - A @ z, 1))", "sparsity": "norm1(z)"}, "amp", 2, a)
    with pytest.raises(UnrollError, match="jumps"):
        network({"fit": FIT, "sparsity": "norm0(z)"}, "amp", 2, a)


# --- majorants --------------------------------------------------------------------------------------------------------


def test_reweighted_l1_is_a_weighted_lasso_step_and_descends() -> None:
    a, x = data()
    net = network({"fit": FIT, "sparsity": "0.1*sum(log(1 + abs(z)/0.2))"}, "reweighted_l1", 8, a)
    step = 1 / torch.linalg.matrix_norm(a, 2) ** 2
    z = torch.zeros(3, N, dtype=torch.float64)
    for _ in range(8):
        z = soft(z - step * (z @ a.T - x) @ a, step * 0.1 / (0.2 + z.abs()))
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    assert (values(net, x).diff(dim=0) <= 1e-12).all()
    assert "monotone" in str(net.derivation)


def test_reweighted_least_squares_reaches_the_minimum() -> None:
    """Of a convex objective: the gradient there is 0, by automatic differentiation."""
    a, x = data()
    net = network({"fit": FIT, "sparsity": "0.1*sum(sqrt(0.01 + z**2))"}, "irls", 200, a)
    z = net(x).requires_grad_()
    (slope,) = torch.autograd.grad(net.objective(x, z=z)["total"].sum(), z)
    assert slope.abs().max() < 1e-9
    assert (values(net, x).diff(dim=0) <= 1e-12).all()


def test_the_concave_convex_procedure_of_hopfield_energy_is_attention() -> None:
    """z <- A' softmax(beta A z), Ramsauer et al. 2021, arXiv:2008.02217."""
    a, _ = data()
    net = network(
        {"energy": "1/2*sumsq(z) - 1/2*logsumexp(2*A @ z)"}, "cccp", 3, a, {"inputs": {}}, start={"z": "A.T @ ones(m)"}
    )
    z = a.T @ torch.ones(M, dtype=torch.float64)
    for _ in range(3):
        z = torch.softmax(2 * a @ z, 0) @ a
    torch.testing.assert_close(net(), z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "term", ["sum(log(1 + z**2))", "sqrt(0.01 + sumsq(z))", "sum(1 - exp(-z**2))", "sum((z**2 + 0.1)**(1/4))", "lam*sum(z**2/(1 + z**2))"]
)  # fmt: skip
def test_reweighted_least_squares_descends_on_what_grows(term: str) -> None:
    a, x = data()
    net = network({"fit": FIT, "own": term}, "irls", 20, a, {"scalars": {"lam": 0.3}}, start={"z": "A.T @ x"})
    found = values(net, x)
    assert (found.diff(dim=0) <= 1e-12 * (1 + found[:-1].abs())).all()
    assert "monotone" in str(net.derivation)


@pytest.mark.parametrize("algorithm, term", [
    ("irls", "-1.3*sumsq(z)"), ("irls", "-1.3*sumsq(A @ z)"), ("irls", "sum(log(1 + z**2) - z**2)"), ("cccp", "-2*sumsq(A @ z)"),
    ("cccp", "1/4*sumsq(A @ z)"),
])  # fmt: skip
def test_a_saddle_is_not_taken_for_a_minimum(algorithm: str, term: str) -> None:
    """The linear system has a solution which is no argmin, or none, and the objective rises."""
    terms = {"fit": FIT, "own": term, "concave": "-logsumexp(z)"}
    if algorithm == "irls":
        terms["concave"] = "0.1*sum(log(1 + z**2))"
    split = {} if algorithm == "irls" else {"split": {"f": ["fit", "own"]}}
    with pytest.raises(UnrollError, match="E303"):
        network(terms, algorithm, 2, data()[0], **split)


@pytest.mark.parametrize("term", ["0.1*norm1(z)", "sum(z**4)", "0.1*sum(sqrt(abs(z)))"])
def test_what_has_no_majorant_is_refused(term: str) -> None:
    with pytest.raises(UnrollError, match="E303"):
        network({"fit": FIT, "own": term}, "irls", 2, data()[0])


# --- second derivatives -----------------------------------------------------------------------------------------------


def test_newton_steps_are_those_of_automatic_differentiation() -> None:
    a, x = data()
    net = network({"fit": "sum(logistic(x * (A @ z)))", "ridge": "0.1/2*sumsq(z)"}, "newton", 7, a)
    cost = lambda z, x: torch.nn.functional.softplus(-x * (a @ z)).sum() + 0.05 * z.square().sum()
    for found, sample in zip(net.trace(x).iterates["z"][-1], x, strict=True):
        own = partial(cost, x=sample)
        z = g = torch.zeros(N, dtype=torch.float64)
        for _ in range(7):
            g = torch.autograd.functional.jacobian(own, z)
            z = z - torch.linalg.solve(torch.autograd.functional.hessian(own, z), g)
        torch.testing.assert_close(found, z, rtol=1e-9, atol=1e-10)
        assert g.abs().max() < 1e-8


def test_strong_convexity_sets_the_momentum() -> None:
    a, x = data()
    terms = {"fit": FIT, "ridge": "1/8*sumsq(z)", "sparsity": "0.1*norm1(z)"}
    net = network(terms, "fista", 9, a, momentum="strongly_convex")
    step = 1 / (torch.linalg.matrix_norm(a, 2) ** 2 + 0.25)
    q = (0.25 * step).sqrt()
    z = y = torch.zeros(3, N, dtype=torch.float64)
    for _ in range(9):
        new = soft(y - step * ((y @ a.T - x) @ a + 0.25 * y), 0.1 * step)
        y, z = new + (1 - q) / (1 + q) * (new - z), new
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    with pytest.raises(UnrollError, match="E304.*strongly convex"):
        network({"fit": FIT, "sparsity": "0.1*norm1(z)"}, "fista", 2, a, momentum="strongly_convex")


# --- entropy and multiplication ---------------------------------------------------------------------------------------


def test_mirror_descent_is_exponentiated_gradient_and_reaches_the_optimum() -> None:
    a, x = data()
    a = 3 * a
    net = network({"fit": FIT}, "mirror_descent", 5, a, {"constraints": ["z in simplex"]})
    step, z = 1 / torch.linalg.matrix_norm(a, 2) ** 2, torch.full((3, N), 1 / N, dtype=torch.float64)
    for _ in range(5):
        z = z * torch.exp(-step * (z @ a.T - x) @ a)
        z = z / z.sum(-1, keepdim=True)
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    w = cp.Variable(N)
    within: Any = [w >= 0, cp.sum(w) == 1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x[0].numpy() - a.numpy() @ w) / 2), within)
    problem.solve(solver=cp.CLARABEL)
    want = float(cast(Any, problem.value))
    assert abs(float(net.objective(x[0], z=net(x[0], layers=20000))["total"]) - want) < 1e-6 * want


@pytest.mark.parametrize("divergence", ["1/2*sumsq(x - A @ z)", "kl(x, A @ z)"])
def test_multiplicative_updates_are_those_of_lee_and_seung(divergence: str) -> None:
    a, x = data(positive=True)
    net = network({"fit": divergence}, "multiplicative", 9, a, POSITIVE)
    z = torch.ones(3, N, dtype=torch.float64)
    for _ in range(9):
        up = z @ a.T @ a if "sumsq" in divergence else a.sum(0).expand_as(z)
        down = x @ a if "sumsq" in divergence else (x / torch.where(z @ a.T == 0, 1, z @ a.T)) @ a
        z = z * down / torch.where(up == 0, 1, up)
    torch.testing.assert_close(net(x), z, rtol=1e-10, atol=1e-12)
    assert torch.equal(net(x)[1], torch.zeros(N, dtype=torch.float64))
    assert (values(net, x[:1]).diff(dim=0) <= 1e-12).all()


def test_multiplication_promises_no_descent() -> None:
    """z <- x / z^2 moves away from the minimum of z^4/4 - x z: the power that descends depends on the objective."""
    a, x = data(positive=True)
    net = network({"fit": "sum((A @ z)**4)/4 - dot(x, A @ z)"}, "multiplicative", 6, a, POSITIVE)
    assert (values(net, x[:1]).diff(dim=0) > 0).any()
    assert "monotone" not in str(net.derivation)


@pytest.mark.parametrize("term", ["0.1*tv(z)", "0.1*norm2(z)", "0.1*norm_inf(z)", "sumsq(z)"])
def test_what_has_no_step_of_entropy_is_refused_and_not_left_out(term: str) -> None:
    own = {"algorithm": "own", "solves": "f(z) + g(z)", "updates": {"z": "bregman(g, z * exp(-grad(f, z)))"}}
    more = {**POSITIVE, "algorithms": {"own": own}}
    with pytest.raises(UnrollError, match="E303"):
        network({"fit": FIT, "own": term}, "own", 2, data(positive=True)[0], more, split={"g": ["own"]})


@pytest.mark.parametrize("term", ["0.3*norm1(z)", "sum(z*log(z)) + dot(x, A @ z)"])
@pytest.mark.parametrize("held", [None, "z >= 0.5", "z <= 0.05", "z in simplex", "sum(z) == 3"])
def test_the_step_of_entropy_in_logarithms_is_the_logarithm_of_it(term: str, held: str | None) -> None:
    a, x = data(positive=True)
    terms, more = {"fit": FIT, "own": term}, {**POSITIVE, "constraints": [held] if held else []}
    split = {"g": ["own", *(["constraint"] if held else [])]}
    found = []
    for update in ("bregman(0.7 * g, exp(r))", "exp(logbregman(0.7 * g, r))"):
        own = {
            "algorithm": "own",
            "solves": "f(z) + g(z)",
            "updates": {"r": "0.1 * z - 0.05 * grad(f, z)", "z": update},
        }
        found.append(network(terms, "own", 3, a, {**more, "algorithms": {"own": own}}, split=split)(x))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_signs_that_are_not_declared_are_asked_for() -> None:
    with pytest.raises(UnrollError, match="positive: true"):
        network({"fit": FIT}, "multiplicative", 2, data()[0])


# --- texts that are refused -------------------------------------------------------------------------------------------

OWN = {"algorithm": "own", "solves": "f(z) + g(z)", "updates": {"r": "z - grad(f, z)", "z": "prox(g, r)"}}
BROKEN = {
    "d: div(z, q)": "is no update above", "d: div(r, z)": "changes after", "d: div(z, r, z)": "takes 2 arguments",
    "d: tangent(g, z)": "takes 3 arguments", "d: tangent(g, z, cube)": "abs or square", "d: mu(q)": "is not a letter",
    "d: plus(r)": "sign of", "d: hess(f, 2)": "E131", "d: grad(f, 2)": "E131",
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_operations_on_what_they_do_not_take_are_refused(line: str) -> None:
    name, formula = line.split(": ")
    text = {**OWN, "updates": {**OWN["updates"], name: formula, "z_": "z + sum(d)"}}  # type: ignore[dict-item]
    terms = {"fit": FIT, "sparsity": "0.1*norm1(z)"}
    with pytest.raises(UnrollError, match=BROKEN[line]):
        network(terms, "own", 2, data()[0], {"algorithms": {"own": text}})
