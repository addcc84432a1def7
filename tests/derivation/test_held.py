"""What is held is constant for every derivation, whatever it is of; a step works it out at the point where it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.calculus.curvature import bounds
from unroll.calculus.gradient import gradient
from unroll.language.problem import from_spec
from unroll.network.evaluate import evaluate
from unroll.solver.certificate import duality_gap
from unroll.spec import load

M, N = 5, 4
Spec = dict[str, Any]
SPEC: Spec = {
    "dims": {"m": M, "n": N},
    "variables": {"z": ["n"]},
    "inputs": {"x": ["m"]},
    "parameters": {"A": ["m", "n"]},
    "scalars": {"lam": 0.1},
    "minimize": {"fit": "1/2 * sumsq(x - A @ z)"},
}
HELD = ("abs(z)", "exp(z) * z", "A.T @ (A @ z - x)", "1 / (abs(z) + 0.1)", "norm2(z) * z", "pos(z)")
SMOOTH = (
    "dot(stop_gradient({0}), z)", "sumsq(z - stop_gradient({0}))", "sumsq(stop_gradient({0}) * z)", "sum(stop_gradient({0}) * softplus(z))",
    "stop_gradient(sumsq({0})) * sumsq(A @ z)", "logsumexp(z + stop_gradient({0}))", "sumsq(diag(stop_gradient({0})) @ z)",
)  # fmt: skip


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*n, generator=g, dtype=torch.float64) for n in ((N, 1), (M, 1), (M, N)))  # type: ignore[return-value]


@pytest.mark.parametrize("inside", HELD)
@pytest.mark.parametrize("around", SMOOTH)
def test_gradient_and_curvature_see_a_constant(around: str, inside: str) -> None:
    """Against autograd and its Hessian of the formula with the held part as a number."""
    problem = from_spec(load({**SPEC, "minimize": around.format(inside)}))
    (e,), (z,), (x,), (A,) = problem.terms.values(), problem.variables, problem.inputs, problem.parameters
    at, b, a = drawn()
    at.requires_grad_()
    value: Callable[[Tensor], Tensor] = lambda t: evaluate(e, {z: t, x: b, A: a}, {}).squeeze()
    (want,) = torch.autograd.grad(value(at), at, create_graph=True)
    have = evaluate(gradient(e, z), {z: at.detach(), x: b, A: a}, {})
    assert (have - want).abs().max() <= 1e-12 * (1 + want.abs().max())
    hessian = (
        torch.stack([torch.autograd.grad(s, at, retain_graph=True)[0].flatten() for s in want.flatten()])
        if want.requires_grad
        else torch.zeros(N, N, dtype=torch.float64)
    )
    found = bounds(e, z)
    assert found is not None and found.smooth
    low, high = (float(evaluate(b_, {z: at.detach(), x: b, A: a}, {})) for b_ in (found.low, found.high))
    eigenvalues = torch.linalg.eigvalsh((hessian + hessian.mT) / 2)
    assert low - 1e-9 <= eigenvalues[0] and eigenvalues[-1] <= high + 1e-9


def shrink(v: Tensor, t: Tensor) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def of_length(v: Tensor, t: Tensor) -> Tensor:
    return v * (1 - t / v.norm(dim=-1, keepdim=True)).clamp_min(0)


def of_peak(v: Tensor, t: Tensor) -> Tensor:
    """v minus its projection on the 1-norm ball of radius t, by sorting."""
    u = v.abs().sort(descending=True).values
    k = torch.arange(1, N + 1, dtype=v.dtype)
    theta = ((u.cumsum(-1) - t) / k).where((u * k > u.cumsum(-1) - t), -torch.inf).amax(-1, keepdim=True)
    return torch.where(u.sum(-1, keepdim=True) <= t, 0, v - shrink(v, theta))


Prox = Callable[[Tensor, Tensor], Tensor]
TERMS: dict[str, tuple[Callable[[Tensor], Tensor], Prox]] = {
    "lam * norm1(stop_gradient(1 / (abs(z) + 0.1)) * z)": (lambda z: 0.1 / (z.abs() + 0.1), shrink),
    "lam * stop_gradient(1 + sumsq(z)) * norm1(z)": (lambda z: 0.1 * (1 + z.square().sum(-1, keepdim=True)), shrink),
    "lam * stop_gradient(1 + norm1(z)) * norm2(z)": (lambda z: 0.1 * (1 + z.abs().sum(-1, keepdim=True)), of_length),
    "lam * stop_gradient(1 + sumsq(z)) * norm_inf(z)": (
        lambda z: 0.1 * (1 + z.square().sum(-1, keepdim=True)),
        of_peak,
    ),
}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("algorithm", ["proximal_gradient", "fista"])
def test_a_held_weight_is_that_of_the_point_where_the_step_is_taken(algorithm: str, term: str) -> None:
    weight, prox = TERMS[term]
    net = unroll.compile(
        {**SPEC, "minimize": SPEC["minimize"] | {"held": term}, "unroll": {"algorithm": algorithm, "layers": 4}},
        dtype=torch.float64,
    )
    x = torch.stack([drawn(s)[1].flatten() for s in range(3)])
    A = net.given["A"]
    step, t = 1 / torch.linalg.matrix_norm(A, 2) ** 2, 1.0
    z = y = x.new_zeros(3, N)
    for _ in range(4):
        new = prox(y - step * (y @ A.mT - x) @ A, step * weight(y))
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y = new + (t - 1) / t_new * (new - z) if algorithm == "fista" else new
        z, t = new, t_new
    assert (net(x) - z).abs().max() < 1e-10 and z.abs().max() > 0.01


def test_a_held_singular_value_weighs_the_others() -> None:
    spec = {"dims": {"m": 4, "T": 3}, "variables": {"L": ["m", "T"]}, "inputs": {"D": ["m", "T"]},
            "minimize": {"fit": "1/2 * sumsq(D - L)", "low": "0.3 * stop_gradient(spectral(L)) * nuclear(L)"}}  # fmt: skip
    net = unroll.compile({**spec, "unroll": {"algorithm": "proximal_gradient", "layers": 3}}, dtype=torch.float64)
    D = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L = torch.zeros_like(D)
    for _ in range(3):
        u, s, v = torch.linalg.svd(D, full_matrices=False)
        L = u @ torch.diag_embed((s - 0.3 * torch.linalg.svdvals(L)[:, :1]).clamp_min(0)) @ v
    assert (net(D) - L).abs().max() < 1e-10


def test_a_lipschitz_constant_that_is_held_is_that_of_each_layer_and_sample() -> None:
    spec = {**SPEC, "minimize": "1/2 * sumsq(x - A @ z) + stop_gradient(1 + sumsq(z)) / 2 * sumsq(z)"}
    net = unroll.compile({**spec, "unroll": {"algorithm": "gradient_descent", "layers": 5}}, dtype=torch.float64)
    x = torch.stack([drawn(s)[1].flatten() for s in range(3)])
    A, z = net.given["A"], torch.zeros(3, N, dtype=torch.float64)
    for _ in range(5):
        w = 1 + z.square().sum(-1, keepdim=True)
        z = z - ((z @ A.mT - x) @ A + w * z) / (torch.linalg.matrix_norm(A, 2) ** 2 + w)
    assert (net(x) - z).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("held", "inside"),
    [("lam * norm1(stop_gradient(1 + abs(z)) * z)", []), ("sumsq(z - stop_gradient(abs(z)))", ["z in simplex"])],
)
def test_what_holds_claims_neither_descent_nor_a_gap(held: str, inside: list[str]) -> None:
    """Over a compact set too, where any other convex smooth function has its gap."""
    spec = {**SPEC, "minimize": SPEC["minimize"] | {"held": held}, "constraints": inside}
    d = unroll.derive({**spec, "unroll": {"algorithm": "proximal_gradient", "layers": 2}})
    assert "monotone" not in str(d)
    assert duality_gap(d.parts, d.variable) is None


def test_a_gradient_passes_a_held_weight_of_singular_values() -> None:
    spec = {"dims": {"m": 4, "T": 3}, "variables": {"L": ["m", "T"]}, "inputs": {"D": ["m", "T"]},
            "minimize": {"fit": "1/2 * sumsq(D - L)", "low": "0.3 * stop_gradient(1 + sumsq(L)) * nuclear(L)"}}  # fmt: skip
    net = unroll.compile({**spec, "unroll": {"algorithm": "proximal_gradient", "layers": 2}}, dtype=torch.float64)
    D = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(3 * x), D)
