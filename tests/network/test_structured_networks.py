"""Networks of low rank, of rows, of total variation, on graphs and of nonnegative factors, with moved parameters, against their layer equations written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import non_negative_factorization
from torch import Tensor
from torch.nn.functional import softplus

import unroll

D = torch.float64
M, N, T, R, K, B = 5, 7, 3, 2, 3, 4
SIZES = {"m": M, "n": N, "p": N, "T": T, "r": R, "e": 9, "d": T}
Net = Any
Layer = Callable[[Net, tuple[Tensor, ...], tuple[Tensor, ...], int, dict[str, Tensor]], tuple[Tensor, ...]]
"""(network, its inputs as formulas see them, iterates, layer, what is kept) -> iterates."""


def soft(v: Tensor, t: Tensor | float) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def soft_rows(v: Tensor, t: Tensor | float) -> Tensor:
    """Each row of a matrix by its length."""
    length = v.norm(dim=-1, keepdim=True)
    return v * (1 - t / torch.where(length == 0, 1, length)).clamp_min(0)


def soft_values(v: Tensor, t: Tensor) -> Tensor:
    u, s, w = torch.linalg.svd(v, full_matrices=False)
    return u @ torch.diag_embed((s - t).clamp_min(0)) @ w


def jumps(n: int) -> Tensor:
    """D u = u[1:] - u[:-1]."""
    return torch.eye(n, dtype=D)[1:] - torch.eye(n, dtype=D)[:-1]


def sums(n: int) -> Tensor:
    """u = C z, running sums."""
    return torch.ones(n, n, dtype=D).tril()


def tv_prox(v: Tensor, t: Tensor) -> Tensor:
    """argmin of t |D u|_1 + |u - v|^2/2 by its dual, a quadratic in a box, to the end."""
    d = jumps(v.shape[-1])
    y = v.new_zeros(*v.shape[:-1], len(d))
    q, momentum = y, 1.0
    for _ in range(1000):
        new = (q + (v - q @ d) @ d.T / 4).clamp(-t.item(), t.item())
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        if ((new - y) * (q - new)).sum() > 0:
            after = momentum = 1.0
        y, q, momentum = new, new + (momentum - 1) / after * (new - y), after
    return v - y @ d


def corona(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (d,), (low, rows) = data, at
    v = n.P1[k] @ d + n.P2[k] @ low + n.P3[k] @ rows
    w = n.P4[k] @ d + n.P5[k] @ low + n.P6[k] @ rows
    top = torch.linalg.svdvals(v)[..., :1]
    mean = w.norm(dim=-1).mean(-1)[..., None, None]
    return soft_values(v, 0.4 * n.share[k].sigmoid() * top), soft_rows(w, 1.8 * n.part[k].sigmoid() * mean)


def group_lista_cp(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (x,), (z,) = data, at
    return (soft_rows(z + n.W[k] @ (x - n.given["A"] @ z), softplus(n.theta[k])),)


def group_alista(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (x,), (z,), a = data, at, n.given["A"]
    inner = torch.linalg.inv(a @ a.T)
    w = torch.stack([inner @ c / (c @ inner @ c) for c in a.T])
    return (soft_rows(z + softplus(n.gamma[k]) * w @ (x - a @ z), softplus(n.theta[k])),)


def of_jumps(z: Tensor, t: Tensor) -> Tensor:
    """The first entry is no jump."""
    return torch.cat([z[..., :1], soft(z[..., 1:], t)], -1)


def tv_step(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (x,), (z,), ac, gamma = data, at, n.given["A"] @ sums(N), softplus(n.gamma[k])
    return (of_jumps(z - gamma * (z @ ac.T - x) @ ac, 0.1 * gamma),)


def tv_coupled(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (x,), (z,), ac = data, at, n.given["A"] @ sums(N)
    return (of_jumps(z - (z @ ac.T - x) @ n.W[k].T, softplus(n.theta[k])),)


def tv_lista(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (x,), (z,) = data, at
    return (of_jumps(z @ n.Wz[k].T + x @ n.Wx[k].T, softplus(n.theta[k])),)


def lpgd_tv(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (x,), (u,) = data, at
    return (tv_prox(u @ n.Wu[k].T + x @ n.Wx[k].T, softplus(n.theta[k])),)


def condat_vu(
    n: Net, x: Tensor, u: Tensor, kept: dict[str, Tensor], w: Tensor, lam: Any, sigma: Any, tau: Any
) -> Tensor:
    """u' = u - tau A'(A u - x) - tau W' y,  y' = clip(y + sigma W (2 u' - u)): the dual of the layer before it."""
    a = n.given["A"]
    y = kept.get("y", torch.zeros(B, N - 1, dtype=D)) + sigma * kept.get("q", u) @ w.T
    y = y - soft(y, lam)
    new = u - tau * (u @ a.T - x) @ a - tau * y @ w
    kept["y"], kept["q"] = y, 2 * new - u
    return new


def condat_vu_coupled(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    size = lambda a: torch.linalg.matrix_norm(a, 2) ** 2
    tau = 1 / (size(n.given["A"]) / 2 + size(jumps(N)) / 2)
    return (condat_vu(n, data[0], at[0], kept, n.W[k], softplus(n.theta[k]), 0.5, tau),)


def condat_vu_step(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    sigma, tau = n.sigma_k[k].clamp(0.5, 2), softplus(n.tau_k[k])
    return (condat_vu(n, data[0], at[0], kept, jumps(N), 0.1, sigma, tau),)


def twirls(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """Of a graph without weights, Y (1 - alpha lam - alpha) + alpha lam Y (I - L) + alpha F; rows are features here."""
    (f, b), (y,), alpha, lam = data, at, softplus(n.rate), softplus(n.weight)
    near = torch.eye(N, dtype=D) - b.mT @ b
    return ((1 - alpha * lam - alpha) * y + alpha * lam * y @ near + alpha * f,)


def twirls_attention(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    (f, b), (y,), alpha, lam = data, at, softplus(n.rate), softplus(n.weight)
    w = 1 / (b @ y.mT).square().sum(-1).sqrt().clamp_min(0.1)  # d^(p - 2), p = 1, at most 1/tau
    return (y - alpha * (y - f) - alpha * lam * y @ b.mT @ (w[..., None] * b),)


def factors(
    x: Tensor, w: Tensor, h: Tensor, b: float, by_w: Tensor | float = 1, by_h: Tensor | float = 1
) -> tuple[Tensor, Tensor]:
    """Fevotte & Idier 2011, of beta = 1 + b."""
    wh = w @ h
    w = by_w * w * ((x * wh ** (b - 1)) @ h.mT) / (wh**b @ h.mT)
    wh = w @ h
    return w, by_h * h * (w.mT @ (x * wh ** (b - 1))) / (w.mT @ wh**b)


def beta_nmf(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    return factors(data[0], *at, b=0.5)


def accelerated_nmf(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    return factors(data[0], *at, 0.0, softplus(n.A_W[k]), softplus(n.A_H[k]))


def admm_csnet(
    n: Net, data: tuple[Tensor, ...], at: tuple[Tensor, ...], k: int, kept: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """X = (A'A + rho D'D)^-1 (A'y + rho D'(Z - beta)), Z = S(D X + beta), beta += eta (D X - Z); S by numpy."""
    (y,), a, d, rho = data, n.given["A"], n.filters[k], softplus(n.weight[k])
    z, beta = (kept.get(name, torch.zeros(B, N, dtype=D)) for name in ("z", "beta"))
    if k == 0:
        z = at[0] @ n.given["D"].T
    x = torch.linalg.solve(a.T @ a + rho * d.T @ d, (y @ a + rho * (z - beta) @ d).mT).mT
    v, q = (x @ d.T + beta), n.phi[k]
    i = ((v.detach() + 1) / 0.02).floor().clamp(0, 99).long()
    kept["z"] = q[i] + ((v + 1) / 0.02 - i) * (q[i + 1] - q[i])
    inside = v.detach().abs() < 1
    known = torch.from_numpy(np.interp(v.detach().numpy(), np.linspace(-1, 1, 101), q.detach().numpy()))
    assert torch.allclose(kept["z"].detach()[inside], known[inside], atol=1e-12)
    kept["beta"] = beta + n.rate[k] * (x @ d.T - kept["z"])
    return (x,)


LAYERS: dict[str, Layer] = {
    f.__name__: f
    for f in (
        corona, group_lista_cp, group_alista, tv_step, tv_coupled, tv_lista, lpgd_tv, condat_vu_coupled, condat_vu_step, twirls,
        twirls_attention, beta_nmf, accelerated_nmf, admm_csnet,
    )
}  # fmt: skip
POSITIVE = ("beta_nmf", "accelerated_nmf")


def network(name: str, dtype: torch.dtype = D) -> Net:
    dims = {d: SIZES[d] for d in unroll.load(name).dims}
    return unroll.compile(name, dims=dims, overrides=[f"unroll.layers={K}"], dtype=dtype, seed=0)


def inputs(net: Net, blank: int | None = 1) -> tuple[Tensor, ...]:
    """As a call takes them, one sample blank."""
    g, found = torch.Generator().manual_seed(1), list[Tensor]()
    for s in net.derivation.problem.inputs:
        x = torch.randn(B, *net.program.tensor_sizes(s), generator=g, dtype=D)
        if "positive" in s.props:
            x = x.abs() + 0.01
        elif blank is not None and s.name != "B":
            x[blank] = 0
        found.append(x)
    return tuple(found)


def seen(net: Net, x: Tensor, s: Any) -> Tensor:
    """An input as formulas see it."""
    return x.mT if s.rank == 2 and "as_written" not in s.props else x


def tuples(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def moved(name: str) -> Net:
    net = network(name)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.05 * torch.randn(q.shape, generator=g, dtype=D))
    return net


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_the_paper(name: str) -> None:
    """One sample is blank; slopes are those of the equation without it, which has 0 / 0 there."""
    net = moved(name)
    symbols, variables = net.derivation.problem.inputs, net.derivation.problem.variables
    for blank in (1, None) if name not in ("lpgd_tv", *POSITIVE) else (1,):
        given, kept = inputs(net, blank), dict[str, Tensor]()
        data = tuple(seen(net, x, s) for x, s in zip(given, symbols, strict=True))
        iterates = net.trace(*given).iterates
        at = tuple(seen(net, iterates[z.name][0], z) for z in variables)
        for k in range(K):
            at = LAYERS[name](net, data, at, k, kept)
            for z, want in zip(variables, at, strict=True):
                assert (seen(net, iterates[z.name][k + 1], z) - want).abs().max() < 1e-10, (z.name, k)
                assert want[0].abs().max() > 1e-3 and want.isfinite().all()
        if blank is None:
            have, want = (sum((x**2).sum() for x in z) for z in (tuples(net(*given)), at))
            for a, b in zip(*(torch.autograd.grad(v, list(net.parameters())) for v in (have, want)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_degenerate_inputs_and_units(name: str) -> None:
    net = network(name, torch.float32)
    for unit in (1e-6, 1.0, 1e6):
        given = tuple(
            x.float() * (1 if s.name == "B" else unit)
            for x, s in zip(inputs(net), net.derivation.problem.inputs, strict=True)
        )
        out = tuples(net(*given))
        assert all(z.isfinite().all() for z in out)
        if parameters := list(net.parameters()):
            slopes = torch.autograd.grad(sum((z / unit).square().sum() for z in out), parameters, allow_unused=True)
            assert all(s is None or s.isfinite().all() for s in slopes)
        assert all(len(z) == 0 for z in tuples(net(*(x[:0] for x in given))))


def test_corona_untrained_without_shares_descends_to_the_optimum() -> None:
    """joint_proximal_gradient on its objective: values fall, and the limit is that of CVXPY."""
    import cvxpy as cp

    spec = {
        "use": "low_rank_and_groups",
        "dims": {"m": N, "p": M, "T": T},
        "unroll": {"algorithm": "joint_proximal_gradient", "layers": 30},
    }
    net = unroll.compile(spec, dtype=D, seed=0)
    d = torch.randn(T, N, generator=torch.Generator().manual_seed(0), dtype=D)
    values = net.trace(d).terms["total"]
    assert (values.diff() <= 1e-12).all() and values[-1] < values[0]
    low, rows = cp.Variable((M, T)), cp.Variable((M, T))
    a, b = net.given["H1"].numpy(), net.given["H2"].numpy()
    cost = (
        cp.sum_squares(d.T.numpy() - a @ low - b @ rows) / 2
        + 0.1 * cp.normNuc(low)
        + 0.1 * cp.sum(cp.norm(rows, axis=1))
    )
    best = cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL)
    found = net(d, layers=1000)
    reached = net.objective(D=d, L=found[0], S=found[1])["total"]
    assert -1e-7 < float(reached) - best < 1e-4 * best


@pytest.mark.parametrize("b", [0.2, 0.5, 1.0])
def test_factors_of_a_beta_divergence_are_those_of_scikit_learn(b: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, h = (torch.rand(*s, generator=g, dtype=D) + 0.01 for s in ((9, 7), (9, 3), (3, 7)))
    net = unroll.compile("beta_nmf", dims={"m": 9, "n": 7, "r": 3}, scalars={"b": b, "eps": 1e-16}, dtype=D)
    want = non_negative_factorization(
        x.numpy(), W=w.numpy().copy(), H=h.numpy().copy(), n_components=3, init="custom", solver="mu", beta_loss=1 + b, max_iter=20, tol=0
    )  # fmt: skip
    for found, right in zip(net(x.mT, w.mT, h.mT), want, strict=False):
        torch.testing.assert_close(found.mT, torch.as_tensor(right), rtol=1e-10, atol=1e-12)


def test_a_normalised_graph_is_the_released_layer() -> None:
    """Of B with 1/sqrt(degree) at its ends, B'B is I - D^(-1/2) A D^(-1/2): the layer that TWIRLS has without its preconditioner."""
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 0), (0, 3), (1, 5)]
    adjacency, b = torch.zeros(N, N, dtype=D), torch.zeros(len(edges), N, dtype=D)
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = 1
    root = adjacency.sum(0).rsqrt()
    for e, (i, j) in enumerate(edges):
        b[e, i], b[e, j] = root[i], -root[j]
    net, f = network("twirls"), torch.randn(N, T, generator=torch.Generator().manual_seed(0), dtype=D)
    y = f
    for _ in range(K):
        y = (1 - 0.3 - 0.3) * y + 0.3 * root[:, None] * (adjacency @ (root[:, None] * y)) + 0.3 * f
    torch.testing.assert_close(net(f, b), y, rtol=1e-12, atol=1e-12)


def test_reweighted_least_squares_of_a_graph_is_its_closed_form() -> None:
    """The text irls on the same objective: each layer solves (I + lam B' w B) y = f, with the weights of the layer before."""
    spec = {
        "use": "reweighted_nodes",
        "dims": {"d": T, "n": N, "e": 9},
        "unroll": {"algorithm": "irls", "layers": K, "start": {"Y": "F"}},
    }
    net = unroll.compile(spec, dtype=D)
    f, b = inputs(net)
    y = f
    for _ in range(K):
        w = 1 / (b @ y).norm(dim=-1).clamp_min(0.1)
        y = torch.linalg.solve(torch.eye(N, dtype=D) + b.mT @ (w[..., None] * b), f)
    torch.testing.assert_close(net(f, b), y, rtol=1e-10, atol=1e-11)
