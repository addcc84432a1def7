"""`div` in a loss: against the whole Jacobian, the risk of Stein against the error that it stands for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

D = torch.float64
VECTORS: dict[str, Any] = {"dims": {"n": 5}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}}
MATRICES: dict[str, Any] = {
    "dims": {"d": 3, "N": 2},
    "variables": {"Z": ["d", "N"]},
    "inputs": {"x": {"shape": ["d", "N"]}},
}


def freedom(problem: dict[str, Any], formula: str) -> Any:
    return unroll.loss({**problem, "minimize": {"freedom": formula}})


@pytest.mark.parametrize(("problem", "entries"), [(VECTORS, (5,)), (MATRICES, (2, 3))])
def test_it_is_the_trace_of_the_jacobian_of_each_sample(problem: dict[str, Any], entries: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    (z,) = problem["variables"]
    w = torch.randn(6 if len(entries) == 2 else 5, 6 if len(entries) == 2 else 5, dtype=D)
    answer = lambda v: torch.tanh(v.flatten(v.ndim - len(entries)) @ w).unflatten(-1, entries) * v
    x = torch.randn(4, *entries, dtype=D)
    x[1] = 0
    x.requires_grad_()
    found = freedom(problem, f"div(2 * {z}, x)").terms(answer(x), x)["freedom"]
    jacobians = [torch.autograd.functional.jacobian(answer, v).reshape(v.numel(), -1) for v in x]
    torch.testing.assert_close(found, torch.stack([2 * j.trace() for j in jacobians]), rtol=1e-10, atol=1e-10)

    probed = freedom(problem, f"div({z}, x, probes=2)").eval()
    signs = [2.0 * torch.randint(0, 2, entries, generator=torch.Generator().manual_seed(k)).to(D) - 1 for k in (0, 1)]
    wanted = torch.stack([sum(b.flatten() @ j @ b.flatten() for b in signs) / 2 for j in jacobians])  # type: ignore[misc]
    assert torch.equal(probed.terms(answer(x), x)["freedom"], probed.terms(answer(x), x)["freedom"])
    torch.testing.assert_close(probed.terms(answer(x), x)["freedom"], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("formula", ["div(z, x)", "div(z, x, probes=2)"])
def test_a_network_that_mixes_samples_is_refused(formula: str) -> None:
    """With signs of its own for each sample what comes from others has the mean 0, and nothing is wrong."""
    x = torch.randn(4, 5, dtype=D, requires_grad=True)
    norm = torch.nn.BatchNorm1d(5, dtype=D)
    loss = freedom(VECTORS, formula).eval()
    with pytest.raises(UnrollError, match="E404.*mixes samples"):
        loss.terms(norm(x), x)
    loss.terms(norm.eval()(x), x)
    none = torch.zeros(0, 5, dtype=D, requires_grad=True)
    assert loss.terms(torch.tanh(none), none)["freedom"].shape == (0,)
    if "probes" in formula:
        loss.train().terms(norm.train()(x), x)


def test_one_input_for_all_samples_is_refused() -> None:
    x = torch.randn(5, dtype=D, requires_grad=True)
    with pytest.raises(UnrollError, match="E404.*one input for all samples"):
        freedom(VECTORS, "div(z, x)").terms(torch.tanh(x).expand(3, 5), x)


def test_training_draws_anew_as_torch_is_seeded() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(5, 5, dtype=D), torch.randn(400, 5, dtype=D, requires_grad=True)
    loss = freedom(VECTORS, "div(z, x, probes=1)")
    one, two = (loss.terms(x @ w, x)["freedom"] for _ in range(2))
    torch.manual_seed(0)
    _ = torch.randn(5, 5, dtype=D), torch.randn(400, 5, dtype=D)
    assert torch.equal(loss.terms(x @ w, x)["freedom"], one) and not torch.equal(one, two)
    off = (w + w.T)[torch.ones(5, 5).triu(1) > 0]
    error = float((off.square().sum() / 800) ** 0.5)
    assert 0 < abs(float(torch.cat([one, two]).mean() - w.trace())) < 4 * error
    assert one.std() > 0.5 * float(off.square().sum() ** 0.5)  # each sample has signs of its own


def test_it_is_learned_through() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(5, 5, dtype=D, requires_grad=True), torch.randn(3, 5, dtype=D, requires_grad=True)
    value = lambda w: freedom(VECTORS, "div(z, x)")(torch.tanh(x @ w), x)
    assert torch.autograd.gradcheck(value, (w,))


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_the_risk_of_stein_has_the_mean_of_the_error(sigma: float) -> None:
    """Of a soft threshold, on 20,000 samples: within three standard errors, and not if the divergence is left out."""
    draw = torch.Generator().manual_seed(1)
    y = torch.randn(20000, 5, generator=draw, dtype=D) * (torch.arange(5) < 2)
    x = (y + sigma * torch.randn(y.shape, generator=draw, dtype=D)).requires_grad_()
    z = x.sign() * (x.abs() - sigma).clamp_min(0)
    terms = {"misfit": "sumsq(z - x)", "freedom": "2*sigma**2 * div(z, x)", "noise": "-n*sigma**2"}
    risk = unroll.loss({**VECTORS, "scalars": {"sigma": sigma}, "minimize": terms}).terms(z, x)
    error = lambda parts: (sum(parts) - (z - y).square().sum(-1)).detach()
    mean: Any = lambda gap: abs(float(gap.mean())) / float(gap.std() / len(gap) ** 0.5)
    assert mean(error(risk.values())) < 3 < 30 < mean(error((risk["misfit"], risk["noise"])))


def test_the_projected_risk_has_the_mean_of_the_error_that_can_be_seen() -> None:
    """Generalised SURE, of a soft threshold of A' x, on 20,000 samples."""
    draw, sigma = torch.Generator().manual_seed(2), 0.5
    a, y = torch.randn(3, 5, generator=draw, dtype=D), torch.randn(20000, 5, generator=draw, dtype=D)
    x = y @ a.T
    x = (x + sigma * torch.randn(x.shape, generator=draw, dtype=D)).requires_grad_()
    z = 0.3 * (x @ a)
    z = z.sign() * (z.abs() - 0.4).clamp_min(0)
    back = torch.linalg.pinv(a)
    error = ((z - y) @ a.T @ back.T).square().sum(-1)
    terms = {
        "misfit": "sumsq(pinv(A) @ (A @ z - x))", "freedom": "2*sigma**2 * div(pinv(A).T @ z, x)", "noise": "-sigma**2 * sumsq(pinv(A))"
    }  # fmt: skip
    spec = {
        "dims": {"m": 3, "n": 5},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["m"]},
        "parameters": {"A": ["m", "n"]},
    }
    risk = unroll.loss({**spec, "scalars": {"sigma": sigma}, "minimize": terms}, parameters={"A": a}).terms(z, x)
    gaps = ((sum(risk.values()) - error).detach(), (risk["misfit"] + risk["noise"] - error).detach())
    right, wrong = (abs(float(g.mean())) / float(g.std() / len(g) ** 0.5) for g in gaps)
    assert right < 3 < 30 < wrong


def test_an_empty_batch_and_one_entry_have_one() -> None:
    x = torch.randn(0, 5, dtype=D, requires_grad=True)
    assert freedom(VECTORS, "div(z, x)").terms(2 * x, x)["freedom"].shape == (0,)
    one = {"variables": {"z": []}, "inputs": {"x": []}}
    t = torch.tensor([1.0, -2.0], dtype=D, requires_grad=True)
    assert torch.equal(freedom(one, "div(z, x)").terms(t**2, t)["freedom"], 2 * t)


def pair() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 5, requires_grad=True)
    return 2 * x, x


def test_what_was_not_made_of_the_input_is_refused() -> None:
    loss, (z, x) = freedom(VECTORS, "div(z, x)"), pair()
    assert torch.equal(loss.terms(z, x)["freedom"], torch.full((3,), 10.0))
    for answer in (z.detach(), pair()[0]):
        with pytest.raises(UnrollError, match="E404.*not made of"):
            loss(answer, x)
    with pytest.raises(UnrollError, match="requires_grad_"):
        loss(z, x.detach())
    with torch.no_grad(), pytest.raises(UnrollError, match="no_grad"):
        loss(z, x)


@pytest.mark.parametrize(
    "formula", ["div(x, x)", "div(z, z)", "div(z, 2 * x)", "div(z, x, probes=0)", "div(z, x, 1.5)"]
)
def test_what_is_no_divergence_of_an_answer_is_refused(formula: str) -> None:
    with pytest.raises(UnrollError, match="E132"):
        freedom(VECTORS, formula)


def test_an_objective_with_one_is_not_unrolled() -> None:
    unrolled = {"unroll": {"algorithm": "gradient_descent", "layers": 2}}
    with pytest.raises(UnrollError, match="E303"):
        unroll.compile({**VECTORS, "minimize": {"f": "sumsq(z - x)", "g": "div(z, x)"}, **unrolled})
