"""The prox of total variation as networks run it: optimal to rounding by its dual, against CVXPY, with its derivatives, in every way of running."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import unroll
from unroll.emit.text import helper, imports, needed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy as cp

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself


def emitted(*names: str) -> dict[str, Any]:
    """The helpers as a module would hold them."""
    text = "\n\n".join(map(helper, needed(names)))
    module: dict[str, Any] = {}
    exec(f"{imports(text)}\n\n{text}", module)
    return module


CALLS = emitted("prox_tv")
prox_tv = CALLS["prox_tv"]


def drawn(kind: str, n: int, batch: int = 8, dtype: torch.dtype = D) -> Tensor:
    g = torch.Generator().manual_seed(n)
    v = torch.randn(batch, n, generator=g, dtype=D)
    if kind == "ties":
        v = v.round()
    if kind == "walk":
        v = v.cumsum(-1)
    if kind == "steps":
        v = (v.round()).repeat_interleave(4, -1)[..., :n] + 100
    if kind == "doubling":
        v = 2.0 ** torch.arange(n, dtype=D).expand(batch, n).clamp_max(60) * v.sign()
    v = v * {"tiny": 1e-6, "large": 1e6}.get(kind, 1)
    v[1] = 0
    v[2] = v[2, :1]
    return v.to(dtype)


def excess(x: Tensor, v: Tensor, t: Tensor) -> float:
    """How far the sums of x - v are from t times the signs of the jumps of x: 0 at the minimiser and nowhere else; relative."""
    pull, jump = (x - v).to(D).cumsum(-1), x.to(D).diff(dim=-1)
    size = v.abs().to(D).amax(-1, keepdim=True).clamp_min(1e-300)
    outside = (pull[..., :-1].abs() - t).clamp_min(0) / size
    slack = (t * jump.abs() - pull[..., :-1] * jump).abs() / size**2 / (1 + t / size)
    return max(float(p.max()) if p.numel() else 0.0 for p in (outside, slack, (pull[..., -1:] / size).abs()))


KINDS = ("usual", "ties", "walk", "steps", "doubling", "tiny", "large")


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_optimal_to_rounding_with_a_step_for_each_sample(kind: str, n: int, dtype: torch.dtype) -> None:
    v = drawn(kind, n, dtype=dtype)
    t = torch.tensor([0.3, 1, 0.5, 0, 1e-3, 2, 30, 1e12], dtype=dtype)[:, None] * v.abs().mean()
    x = prox_tv(v, t)
    assert x.shape == v.shape and x.dtype == v.dtype
    assert excess(x, v, t.to(D)) <= 8 * n * torch.finfo(dtype).eps
    assert torch.allclose(x[3], v[3], rtol=4 * torch.finfo(dtype).eps, atol=0)  # a step of 0
    assert torch.allclose(x[7], v[7].mean(), atol=4 * torch.finfo(dtype).eps * float(v[7].abs().max()))


def test_it_is_that_of_cvxpy() -> None:
    v = drawn("walk", 60)
    for i, t in ((0, 0.7), (3, 0.1), (4, 5.0)):
        z = cp.Variable(60)
        problem = cp.Problem(cp.Minimize(t * cp.tv(z) + cp.sum_squares(z - v[i].numpy()) / 2))
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        assert np.abs(z.value - prox_tv(v[i], t).numpy()).max() < 1e-6


def test_a_step_for_each_pair_of_neighbours() -> None:
    v = drawn("usual", 6)
    t = torch.tensor([0.5, 0, 2, 0.1, 1e9], dtype=D)
    assert excess(prox_tv(v, t), v, t) < 1e-14
    alone = torch.cat([prox_tv(v[..., :2], t[:1]), prox_tv(v[..., 2:], t[2:])], -1)
    assert torch.allclose(prox_tv(v, t), alone, atol=1e-14)


def test_a_batch_is_its_members_of_any_number_of_axes_and_of_none() -> None:
    v = drawn("walk", 30)
    whole = prox_tv(v.reshape(2, 4, 30), 1.0)
    assert torch.equal(whole.reshape(8, 30), torch.stack([prox_tv(m, 1.0) for m in v]))
    assert prox_tv(v[:0], 1.0).shape == (0, 30)


@pytest.mark.parametrize("n", [1, 2, 12])
def test_derivatives_are_those_of_differences_twice_and_in_forward_mode(n: int) -> None:
    v, t = drawn("usual", n)[[0, 3, 4]], torch.tensor([[0.3], [0.6], [1.5]], dtype=D)
    args = (v.clone().requires_grad_(), t.clone().requires_grad_())
    assert torch.autograd.gradcheck(prox_tv, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(prox_tv, args)


def test_where_there_is_no_derivative_that_of_the_pieces_is_taken() -> None:
    """At a jump that just vanishes both neighbours move as one; equal neighbours with no weight between them move apart."""
    slope = lambda v, t: torch.autograd.functional.jacobian(lambda x: prox_tv(x, t), torch.tensor(v, dtype=D))
    assert torch.allclose(slope([0.0, 2.0], 1.0), torch.full((2, 2), 0.5, dtype=D))  # type: ignore[arg-type]
    assert torch.allclose(slope([0.0, 0.0, 0.0], 1.0), torch.full((3, 3), 1 / 3, dtype=D))  # type: ignore[arg-type]
    assert torch.equal(slope([0.0, 2.0], 0.0), torch.eye(2, dtype=D))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["usual", "ties", "walk", "large"])
def test_compiled_and_mapped_it_is_the_same_to_rounding(kind: str) -> None:
    v = drawn(kind, 20)
    t = v.abs().mean().expand(8, 1) * 0.4
    size = float(v.abs().max())
    assert torch.allclose(torch.func.vmap(prox_tv)(v, t), prox_tv(v, t), atol=1e-13 * size)
    f = lambda v: prox_tv(v, t).square().sum()
    want = torch.autograd.grad(f(x := v.clone().requires_grad_()), x)[0]
    mapped = torch.func.vmap(torch.func.grad(lambda v, t: prox_tv(v, t).square().sum()))(v, t)
    assert torch.allclose(mapped, want, atol=1e-12 * size)


def test_compiled_whole_it_is_the_same() -> None:
    v = drawn("usual", 2, dtype=torch.float32)
    compiled = torch.compile(prox_tv, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(v, torch.tensor(0.4)), prox_tv(v, 0.4), atol=1e-6)


def test_a_sample_that_is_no_number_leaves_the_others_alone() -> None:
    v = drawn("usual", 9)
    broken = v.clone()
    broken[5, 3] = torch.nan
    found, want = prox_tv(broken, 0.5), prox_tv(v, 0.5)
    kept = torch.arange(8) != 5
    assert torch.allclose(found[kept], want[kept], atol=1e-14) and found[5].isnan().any()


SPEC = {
    "dims": {"n": 12, "T": 3}, "variables": {"Z": ["n", "T"]}, "inputs": {"X": ["n", "T"]}, "scalars": {"mu": 0.3, "lam": 0.1},
    "minimize": {"f": "1/2*sumsq(Z - X)", "jumps": "mu*tv(Z)", "size": "lam*norm1(Z)"},
    "unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": 1, "learn": {"theta": {"replaces": "step*mu"}}},
}  # fmt: skip


def test_a_network_takes_each_column_and_learns_the_step() -> None:
    net = unroll.compile(SPEC, dtype=D)
    x = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0), dtype=D)
    assert torch.allclose(net(x), torch.nn.functional.softshrink(prox_tv(x, 0.3), 0.1), atol=1e-14)
    net(x).sum().backward()
    assert net.theta.grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize("n, T", [(9, 3), (4, 4), (1, 3), (3, 1)])
def test_along_the_other_axis_it_is_that_of_the_transpose(n: int, T: int) -> None:
    """By its prox, and by the duals of two composite terms along both axes, against CVXPY."""
    terms = {"f": "1/2*sumsq(Z - X)", "jumps": "mu*tv(Z.T)", "size": "lam*norm1(Z)"}
    net = unroll.compile({**SPEC, "dims": {"n": n, "T": T}, "minimize": terms}, dtype=D)
    x = torch.randn(5, T, n, generator=torch.Generator().manual_seed(0), dtype=D)
    want = torch.nn.functional.softshrink(prox_tv(x.mT, 0.3).mT, 0.1)
    assert torch.allclose(net(x), want, atol=1e-14)

    plane = {**SPEC, "dims": {"n": n, "T": T}, "minimize": {**terms, "size": "lam*tv(Z)"}}
    plane["unroll"] = {"algorithm": "condat_vu", "layers": 700}
    found, z = unroll.compile(plane, dtype=D)(x[:1])[0], cp.Variable((T, n))
    cost = cp.sum_squares(x[0].numpy() - z) / 2
    cost += 0.3 * cp.sum(cp.abs(cp.diff(z, axis=0))) if T > 1 else 0
    cost += 0.1 * cp.sum(cp.abs(cp.diff(z, axis=1))) if n > 1 else 0
    cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11)
    assert abs(found.numpy() - z.value).max() < 1e-5


def test_fused_lasso_by_proximal_gradient_is_that_of_cvxpy() -> None:
    g = torch.Generator().manual_seed(0)
    a, x = torch.randn(20, 30, generator=g, dtype=D) / 4, torch.randn(2, 20, generator=g, dtype=D)
    ways = ["unroll.algorithm=fista", "unroll.layers=300"]
    net = unroll.compile("fused_lasso", dims={"m": 20, "n": 30}, parameters={"A": a}, overrides=ways, dtype=D)
    z = cp.Variable(30)
    for sample, found in zip(x, net(x), strict=True):
        cost = cp.sum_squares(sample.numpy() - a.numpy() @ z) / 2 + 0.1 * cp.norm1(z) + 0.2 * cp.tv(z)
        best = cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11)
        z.value = found.numpy()
        assert abs(cost.value - best) <= 1e-6 * abs(best)
