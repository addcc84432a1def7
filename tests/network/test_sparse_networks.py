"""The published networks of sparse coding, with moved parameters, against their layer equations written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import unroll

D = torch.float64
M, N, K, B = 8, 12, 4, 5


def shrink(v: Tensor, t: Tensor | float) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def largest(v: Tensor, p: float | Tensor) -> Tensor:
    """Entries of which no more are as large, itself among them, than round(p n)."""
    as_large = (v.abs()[:, None, :] >= v.abs()[:, :, None]).sum(-1)
    return as_large <= (torch.as_tensor(p, dtype=D) * v.shape[-1] + 0.5).floor()


def selected(v: Tensor, t: Tensor | float, p: float | Tensor) -> Tensor:
    """S_ss: what is above t and among the share p of largest is not shrunk."""
    return torch.where(largest(v, p) & (v.abs() > t), v, shrink(v, t))


def share(k: int) -> float:
    return min(1.2 * (k + 1), 13) / 100


def analytic(A: Tensor) -> Tensor:
    """W' with w_i' a_i = 1 and least |W' A|_F, one column at a time: w = G⁻¹ a / a' G⁻¹ a, G = A A'."""
    inner = torch.linalg.inv(A @ A.T)
    return torch.stack([inner @ a / (a @ inner @ a) for a in A.T])


Net = Any
Layer = Callable[[Net, Tensor, Tensor, Tensor, int, dict[str, Any]], Tensor]


def ista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    step = 1 / torch.linalg.matrix_norm(A, 2) ** 2
    return shrink(z - step * (z @ A.T - x) @ A, 0.1 * step)


def fista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    t, before = kept.get("t", 1.0), kept.get("before", z)
    kept["t"], kept["before"] = (1 + (1 + 4 * t * t) ** 0.5) / 2, z
    y = z + kept.get("momentum", 0.0) * (z - before)
    kept["momentum"] = (t - 1) / kept["t"]
    return ista(net, A, x, y, k, kept)


def step_lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    gamma = softplus(net.gamma[k])
    return shrink(z - gamma * (z @ A.T - x) @ A, 0.1 * gamma)


def lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    return shrink(z @ net.W2[k].T + x @ net.W1.T, softplus(net.theta[k]))


def lfista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    before = kept.get("before", z)
    kept["before"] = z
    return shrink(z @ net.Wg[k].T - before @ net.Wm[k].T + x @ net.We.T, softplus(net.theta[k]))


def lista_cp(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    return shrink(z + (x - z @ A.T) @ net.W[k].T, softplus(net.theta[k]))


def lista_cpss(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    return selected(z + (x - z @ A.T) @ net.W[k].T, softplus(net.theta[k]), share(k))


def ti_lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    return selected(z + softplus(net.gamma[k]) * (x - z @ A.T) @ net.W.T, softplus(net.theta[k]), share(k))


def alista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    return selected(z + softplus(net.gamma[k]) * (x - z @ A.T) @ analytic(A).T, softplus(net.theta[k]), share(k))


def hyper_lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    before, onto = kept.get("before", z), torch.linalg.pinv(A)
    kept["before"] = z
    r = z @ A.T - x
    far, first = (r @ onto.T).abs().sum(-1, keepdim=True), (x @ onto.T).abs().sum(-1, keepdim=True)
    momentum = net.c2 * (z != 0).sum(-1, keepdim=True)
    v = z - r @ analytic(A).T + momentum * (z - before)
    p = torch.where(far == 0, 1.0, (net.c3 * (first / torch.where(far == 0, 1, far)).log()).clamp(0, 1).nan_to_num(0))
    return selected(v, softplus(net.c1) * far, p)


def hessian_lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    H = (net.H[k] + net.H[k].T) / 2
    return shrink(z - (z @ A.T - x) @ A @ H, softplus(net.theta[k]))


def scaled_lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    gamma, eta = softplus(net.gamma[k]), softplus(net.eta[k])
    return eta * shrink((z - gamma * z @ net.B.T + gamma * x @ net.C.T) / eta, 0.1)


def ada_lista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    """A: one of each sample."""
    of_z = torch.einsum("bmn,pm,pq,bql,bl->bn", A, net.W2, net.W2, A, z)
    of_x = torch.einsum("bmn,pm,bp->bn", A, net.W1, x)
    gamma = softplus(net.gamma[k])
    return shrink(z - gamma * of_z + gamma * of_x, softplus(net.theta[k]))


def glista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    theta = softplus(net.theta[k])
    gated = (1 + net.gain_k[k] * torch.relu(1 - torch.relu(softplus(net.knee_k[k]) * z.abs()))) * z
    s = selected(gated + (x - gated @ A.T) @ net.W[k].T, theta, share(k))
    o = 1 - net.over_k[k] * theta / ((s - z).abs() + 0.1)
    return o * s + (1 - o) * z


def tista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    gamma, W, p, alpha2, sigma2 = net.gamma_k[k], torch.linalg.pinv(A), 0.1, 1.0, 1e-9
    r = x - z @ A.T
    v2 = ((r.square().sum(-1, keepdim=True) - M * sigma2) / (A.T @ A).trace()).clamp_min(1e-9)
    tau2 = v2 / N * (N + (gamma**2 - 2 * gamma) * M) + gamma**2 * (W @ W.T).trace() * sigma2 / N
    u, xi = z + gamma * r @ W.T, alpha2 + tau2
    of: Callable[[Tensor, Tensor], Tensor] = lambda q, v: (-q * q / (2 * v)).exp() / (2 * torch.pi * v).sqrt()
    return u * alpha2 / xi * p * of(u, xi) / ((1 - p) * of(u, tau2) + p * of(u, xi))


def lamp(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    v = kept["v"] = x - z @ A.T + (z != 0).sum(-1, keepdim=True) / M * kept.get("v", torch.zeros_like(x))
    return shrink(z + v @ net.W[k].T, softplus(net.alpha_k[k]) * v.norm(dim=-1, keepdim=True) / M**0.5)


def na_alista(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    hidden, gates = net.control_out.shape[0], "ifgo"
    cell = torch.nn.LSTMCell(2, hidden, dtype=D)
    joined: Callable[[str], Tensor] = lambda word: torch.cat([getattr(net, f"control_{g}_{word}") for g in gates])
    own = {
        "weight_ih": torch.stack([joined("1"), joined("2")], 1),
        "weight_hh": joined("hidden"),
        "bias_ih": joined("bias"),
    }
    own["bias_hh"] = torch.zeros(4 * hidden, dtype=D)
    r = z @ A.T - x
    u = torch.stack([(r.abs().sum(-1) - 88.6) / 11.0, ((r @ analytic(A).T).abs().sum(-1) - 155.0) / 19.4], -1)
    start = (net.control_hidden_start.expand(len(x), -1), net.control_cell_start.expand(len(x), -1))
    h, c = kept["h"], kept["c"] = torch.func.functional_call(cell, own, (u, kept.get("hc", start)))
    kept["hc"] = (h, c)
    out = torch.relu(c @ net.control_out.T + net.control_out_bias)
    gamma, theta = (
        softplus(out @ getattr(net, f"{q}_weight") + getattr(net, f"{q}_bias"))[:, None] for q in ("gamma", "theta")
    )
    return selected(z - gamma * r @ analytic(A).T, theta, share(k))


def lvamp(net: Net, A: Tensor, x: Tensor, z: Tensor, k: int, kept: dict[str, Any]) -> Tensor:
    """Least squares by the dense inverse, which is also that of the trace; one sample at a time."""
    r, gamma = kept.get("r", z), kept.get("gamma", torch.full_like(x[:, :1], 10))
    sigma2, theta = softplus(net.sigma2_k[k]), softplus(net.theta_k[k])
    inner = torch.linalg.inv(A.T @ A / sigma2 + gamma[:, :, None] * torch.eye(N, dtype=D))
    first = torch.einsum("bij,bj->bi", inner, x @ A / sigma2 + gamma * r)
    share = (gamma * torch.einsum("bii->b", inner)[:, None] / N).clamp_max(1 - 1e-6)
    q, gamma_q = (first - share * r) / (1 - share), gamma * (1 - share) / share
    z = shrink(q, theta / gamma_q.sqrt())
    alpha = ((z != 0).double().mean(-1, keepdim=True)).clamp(1e-6, 1 - 1e-6)
    kept["r"], kept["gamma"] = (z - alpha * q) / (1 - alpha), (gamma_q * (1 - alpha) / alpha).clamp_max(1e13)
    return z


LAYERS: dict[str, Layer] = {
    f.__name__: f
    for f in (
        ista, fista, step_lista, lista, lfista, lista_cp, lista_cpss, ti_lista, alista, hyper_lista, hessian_lista, scaled_lista,
        ada_lista, glista, tista, lamp, na_alista, lvamp,
    )
}  # fmt: skip


def moved(name: str) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
    """The network with all parameters moved, A, and what it is called with."""
    net = unroll.compile(name, overrides=[f"dims.m={M}", f"dims.n={N}", f"unroll.layers={K}"], dtype=D, seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.05 * torch.randn(q.shape, generator=g, dtype=D))
    x = torch.randn(B, M, generator=g, dtype=D)
    x[1] = 0
    if name == "ada_lista":
        A = torch.randn(B, M, N, generator=g, dtype=D) / M**0.5
        return net, A, (x, A)
    return net, net.given["A"], (x,)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_the_paper(name: str) -> None:
    net, A, inputs = moved(name)
    z, kept = torch.zeros(B, N, dtype=D), dict[str, Any]()
    got = net.trace(*inputs).iterates["z"]
    for k in range(K):
        z = LAYERS[name](net, A, inputs[0], z, k, kept)
        assert (got[k + 1] - z).abs().max() < 1e-10, k
    assert (z[0] != 0).any() and z.isfinite().all()
    assert (net(*(v[:0] for v in inputs))).shape == (0, N)


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("ista", "fista")])
def test_slopes_are_those_of_the_equation(name: str) -> None:
    net, A, inputs = moved(name)
    z, kept = torch.zeros(B, N, dtype=D), dict[str, Any]()
    for k in range(K):
        z = LAYERS[name](net, A, inputs[0], z, k, kept)
    weights = torch.randn(B, N, generator=torch.Generator().manual_seed(2), dtype=D)
    weights[1] = 0  # a blank sample has no share: the equation by hand has 0 / 0 there
    want = torch.autograd.grad((z * weights).sum(), list(net.parameters()), allow_unused=True)
    have = torch.autograd.grad((net(*inputs) * weights).sum(), list(net.parameters()), allow_unused=True)
    for a, b in zip(have, want, strict=True):
        if b is not None and b.isfinite().all():
            assert a is not None and torch.allclose(a, b, atol=1e-9)
        else:
            assert a is None or a.isfinite().all()


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "ada_lista"])
def test_a_blank_sample_and_float32(name: str) -> None:
    net = unroll.compile(name, overrides=[f"dims.m={M}", f"dims.n={N}", f"unroll.layers={K}"], seed=0)
    for unit in (1e-6, 1.0, 1e6):
        x = unit * torch.randn(3, M, generator=torch.Generator().manual_seed(0))
        x[1] = 0
        z = net(x)
        assert z.isfinite().all() and (z[1] == 0).all()
        if parameters := list(net.parameters()):
            slopes = torch.autograd.grad(z.square().sum() / unit**2, parameters, allow_unused=True)
            assert all(s is None or s.isfinite().all() for s in slopes)


def test_the_analytic_weight_is_the_least() -> None:
    """min |W A|_F with w_i' a_i = 1: no other has a smaller norm (KKT: (W A A')_i is along a_i)."""
    A = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=D)
    A = A / A.norm(dim=0)
    net: Any = unroll.compile("alista", overrides=[f"dims.m={M}", f"dims.n={N}", "unroll.layers=1"], parameters={"A": A}, dtype=D)  # fmt: skip
    W = net.pinv
    assert torch.allclose((W @ A).diagonal(), torch.ones(N, dtype=D))
    slope = W @ A @ A.T  # of |W A|_F^2 / 2, row by row
    along = (slope * A.T).sum(-1, keepdim=True) * A.T
    assert torch.allclose(slope, along, atol=1e-10)
