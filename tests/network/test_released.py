"""The hand-written references against a second source each: autograd, PyTorch's kernels, linear algebra, theory."""

from __future__ import annotations

import math
from inspect import Parameter, signature
from itertools import pairwise, product

import pytest
import released as r
import released_counts as counts
import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = [(5, 8, 2, 4), (1, 6, 3, 2), (7, 4, 1, 4), (4, 5, 3, 1), (9, 6, 2, 5), (2, 3, 1, 2)]
"""(tokens, features, heads, width of a head): one token, one head, p = 1, K p ≠ d."""

shapes = pytest.mark.parametrize(("N", "d", "K", "p"), SHAPES)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def drawn(shape_of: counts.Shapes, seed: int = 1, scale: float = 1.0) -> dict[str, Tensor]:
    """A parameter of every name and shape, all of them random: biases and norms too."""
    g = draws(seed)
    return {k: scale * torch.randn(*s, generator=g, dtype=torch.float64) for k, s in shape_of.items()}


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def orthonormal(K: int, d: int, p: int, seed: int = 0) -> Tensor:
    """(K, d, p), every U_k with orthonormal columns; together orthonormal if K p ≤ d."""
    if K * p <= d:
        return torch.linalg.qr(normal(d, K * p, seed=seed))[0].unflatten(1, (K, p)).transpose(0, 1)
    return torch.linalg.qr(normal(K, d, p, seed=seed))[0]


def one_hot(N: int, K: int) -> Tensor:
    return F.one_hot(torch.arange(N) % K, K).double()


def gradient(f: object, z: Tensor) -> Tensor:
    z = z.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(f(z), z)
    return g


def gap(a: Tensor, b: Tensor) -> float:
    """Relative error; absolute where both are small."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


# ---------------------------------------------------------------- rates


@shapes
@pytest.mark.parametrize("eps2", [0.01, 0.5, 4.0])
def test_rate_gradients_are_those_of_autograd(N, d, K, p, eps2):
    z, U, pi = normal(N, d), normal(K, d, p, seed=1), normal(N, K, seed=2).softmax(-1)
    assert gap(r.coding_rate_gradient(z, eps2), gradient(lambda v: r.coding_rate(v, eps2), z)) < 1e-12
    assert gap(r.class_rate_gradient(z, pi, eps2), gradient(lambda v: r.class_rate(v, pi, eps2), z)) < 1e-12
    wanted = gradient(lambda v: r.subspace_rate(v, U, eps2), z)
    assert gap(r.subspace_rate_gradient(z, U, eps2), wanted) < 1e-10
    assert gap(r.subspace_rate_gradient_small(z, U, eps2), wanted) < 1e-12


@shapes
def test_the_rate_has_two_equal_sides_and_is_a_log_determinant(N, d, K, p):
    z, c = normal(N, d), d / (N * 0.1)
    small, large = eye(d) + c * z.mT @ z, eye(N) + c * z @ z.mT
    assert torch.allclose(r.coding_rate(z, 0.1), torch.linalg.slogdet(small)[1] / 2, rtol=1e-12)
    assert torch.allclose(r.coding_rate(z, 0.1), torch.linalg.slogdet(large)[1] / 2, rtol=1e-12)


def test_the_rate_reduction_of_orthogonal_classes_is_positive_and_of_one_class_zero():
    z = torch.cat([normal(10, 2), normal(10, 2, seed=1)]).double()
    apart = torch.zeros(20, 4, dtype=torch.float64)
    apart[:10, :2], apart[10:, 2:] = z[:10], z[10:]
    halves = one_hot(20, 2).sort(0, descending=True)[0]
    halves[:, 1] = 1 - halves[:, 0]
    assert r.rate_reduction(apart, halves, 0.5) > 1
    assert abs(r.rate_reduction(apart, one_hot(20, 1), 0.5)) < 1e-14


@pytest.mark.parametrize("strength", [16.0, 1.44, 0.16, 0.014])
def test_neumann_errs_by_no_more_than_the_square_of_its_ratio(strength):
    """At strength 16, 1.44, 0.16, 0.014: 92, 1.0, 1.4e-2, 1.2e-4 were measured elsewhere, on other data."""
    z, U, eps2 = normal(32, 16), normal(1, 16, 4, seed=1), 0.5
    c = 4 / (32 * eps2)
    U = U * math.sqrt(strength / (c * torch.linalg.matrix_norm(z @ U[0], 2) ** 2))
    exact, first = r.subspace_rate_gradient(z, U, eps2), r.subspace_rate_gradient_neumann(z, U, eps2)
    # U_k is injective, so that both may be compared before it is applied: error = exact (cG)²
    left = torch.linalg.pinv(U[0]).mT
    error = torch.linalg.matrix_norm((first - exact) @ left) / torch.linalg.matrix_norm(exact @ left)
    elsewhere = {16.0: 92, 1.44: 1.0, 0.16: 1.4e-2, 0.014: 1.2e-4}[strength]
    assert elsewhere / 3 < error <= strength**2
    assert (error < 1) == (strength < 1)


def test_the_order_of_the_gram_softmax_is_the_papers():
    """V softmax_col(VᵀV), columns as tokens, is the transpose of softmax_row(vvᵀ) v, rows as tokens."""
    V = normal(4, 7)
    assert gap((V @ torch.softmax(V.mT @ V, 0)).mT, torch.softmax(V.mT @ V, -1) @ V.mT) < 1e-14


@pytest.mark.parametrize(("d", "K", "p"), [(8, 2, 4), (6, 6, 1), (5, 1, 5)])
def test_a_tight_frame_sums_to_the_identity_and_a_wider_one_does_not(d, K, p):
    z, U = normal(5, d), orthonormal(K, d, p)
    assert gap(r.from_heads(r.in_heads(z, U), U), z) < 1e-13
    assert gap(r.from_heads(r.in_heads(z, U[:, :, : max(p - 1, 0)]), U[:, :, : max(p - 1, 0)]), z) > 0.1


def test_the_released_dictionary_does_not_start_incoherent():
    D = torch.empty(384, 384, dtype=torch.float64)
    torch.nn.init.kaiming_uniform_(D, generator=draws())
    assert abs(torch.linalg.matrix_norm(D.mT @ D - eye(384)) / math.sqrt(384) - 2.23) < 0.02


def test_the_regularised_optimum_is_stationary_and_outside_its_interval_there_is_none():
    d, eps2, sizes = 12, 0.5, torch.tensor([6, 9, 5]).double()
    N, K = int(sizes.sum()), len(sizes)
    members = eye(K).repeat_interleave(sizes.long(), 0)
    a, a_k = d / (N * eps2), d / (sizes * eps2)
    root = math.sqrt(N / int(sizes.max()))
    most = d * (root - 1) / (N * (root + 1) * eps2)
    U = orthonormal(K, d, 4)

    def discriminant(lam: float) -> Tensor:
        eta = (a_k - a) - lam * (N / sizes + 1)
        return eta**2 - 4 * lam**2 * N / sizes

    for lam in (0.3 * most, 0.9 * most):
        eta = (a_k - a) - lam * (N / sizes + 1)
        radius = ((eta + discriminant(lam).sqrt()) / (2 * lam * a_k)).sqrt()
        blocks = [radius[k] * orthonormal(1, int(sizes[k]), 4, seed=k)[0] @ U[k].mT for k in range(K)]
        best = torch.cat(blocks)
        slope = gradient(lambda z, lam=lam: r.mcr2_regularised(z, members, eps2, lam), best)
        assert slope.abs().max() < 1e-13
        assert gradient(lambda z, lam=lam: r.mcr2_regularised(z, members, eps2, lam), 1.1 * best).abs().max() > 1e-3
    assert discriminant(1.5 * most).min() < 0 < discriminant(0.9 * most).min()


# ---------------------------------------------------------------- CRATE and its relatives


def by_kernel(y: Tensor, U: Tensor, W_out: Tensor, b_out: Tensor | None, causal: bool) -> Tensor:
    v = torch.stack([y @ u for u in U], -3)
    heads = F.scaled_dot_product_attention(v, v, v, is_causal=causal)
    return F.linear(torch.cat(list(heads.unbind(-3)), -1), W_out, b_out)


@shapes
@pytest.mark.parametrize("causal", [False, True])
def test_subspace_attention_is_the_fused_kernel_with_equal_arguments(N, d, K, p, causal):
    y, U, W, b = normal(2, N, d), normal(K, d, p, seed=1), normal(d, K * p, seed=2), normal(d, seed=3)
    assert gap(r.mssa(y, U, W, b, causal), by_kernel(y, U, W, b, causal)) < 1e-13


@shapes
@pytest.mark.parametrize("causal", [False, True])
def test_a_crate_block_is_the_one_of_pytorchs_layers(N, d, K, p, causal):
    x, t = normal(2, N, d), drawn(counts.crate_block(d, K, p))
    half = x + by_kernel(F.layer_norm(x, (d,), t["norm1_w"], t["norm1_b"]), t["U"], t["W_out"], t["b_out"], causal)
    y = F.layer_norm(half, (d,), t["norm2_w"], t["norm2_b"])
    smooth = gradient(lambda a: (F.linear(a, t["D"]) - y).square().sum() / 2, y)
    wanted = F.relu(y - 0.1 * smooth - 0.1 * 0.1)
    out = (r.crate_causal_block if causal else r.crate_block)(x, **t)
    assert gap(out, wanted) < 1e-12
    assert (out >= 0).all() and (out > 0).any()


@shapes
def test_crate_alpha_is_two_steps_of_a_lasso_solver_from_zero(N, d, K, p):
    s = 4 * d
    x, t = normal(2, N, d), drawn(counts.crate_alpha_block(d, K, p, s), scale=0.5)
    y1 = F.layer_norm(x, (d,), t["norm1_w"], t["norm1_b"], eps=1e-6)
    half = x + by_kernel(y1, t["U"], t["W_out"], None, causal=False)
    y = F.layer_norm(half, (d,), t["norm2_w"], t["norm2_b"], eps=1e-6)
    code = torch.zeros(2, N, s, dtype=torch.float64)
    for _ in range(2):
        smooth = gradient(lambda a: (a @ t["D"].mT - y).square().sum() / 2, code)
        code = F.relu(code - 0.1 * smooth - 0.1 * 0.1)
    assert gap(r.crate_alpha_block(x, **t), half + F.linear(code, t["D_hat"])) < 1e-12
    first = F.relu(0.1 * y @ t["D"] - 0.01)
    assert gap(r.crate_alpha_block(x, **t, steps=1), half + F.linear(first, t["D_hat"])) < 1e-12


@shapes
def test_the_decoder_layer_has_no_residual_first_and_a_minus_after(N, d, K, p):
    x, t = normal(2, N, d), drawn(counts.mae_decoder_layer(d, K, p))
    half = F.linear(F.layer_norm(x, (d,), t["norm1_w"], t["norm1_b"]), t["D"])
    y = F.layer_norm(half, (d,), t["norm2_w"], t["norm2_b"])
    wanted = half - by_kernel(y, t["U"], t["W_out"], t["b_out"], causal=False)
    assert gap(r.mae_decoder_layer(x, **t), wanted) < 1e-12


def test_a_single_full_head_has_no_output_map():
    y, U = normal(3, 4), normal(1, 4, 4, seed=1)
    assert gap(r.mssa(y, U, None), r.mssa(y, U, eye(4))) < 1e-15


def test_bases_reads_the_rows_of_the_released_map():
    W, y = normal(6, 4), normal(5, 4, seed=1)
    heads = F.linear(y, W).unflatten(-1, (3, 2)).transpose(0, 1)
    assert gap(r.in_heads(y, r.bases(W, 3)), heads) < 1e-15


def test_masked_loss_sees_the_masked_patches_alone():
    a, b = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]]).double()
    assert torch.allclose(r.masked_loss(a, b, mask), F.mse_loss(a[mask > 0], b[mask > 0]), rtol=1e-14)


CAUSAL = {
    "crate": lambda x, t: r.crate_causal_block(x, **t),
    "tost": lambda x, t: r.tost_causal_attention(x, **t),
}


@pytest.mark.parametrize("name", CAUSAL)
@shapes
def test_a_later_token_changes_no_earlier_output(name, N, d, K, p):
    table = counts.crate_block(d, K, p) if name == "crate" else counts.tost_causal_attention(d, K, p, N + 3)
    x, t = normal(N, d), drawn(table)
    before = CAUSAL[name](x, t)
    for i in range(N):
        moved = x.clone()
        moved[i] += normal(d, seed=5)
        change = (CAUSAL[name](moved, t) - before).abs().amax(-1)
        assert change[:i].sum() == 0 and change[i:].sum() > 0
    if N > 2:
        seen = r.crate_block(x, **t) if name == "crate" else None
        assert seen is None or (seen - before).abs().max() > 1e-6


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_attention_alone_raises_the_signal_to_noise_ratio_by_its_step(noise):
    """By exactly 1 + ητ = 1.3 in every class, for five layers; four classes of 32 tokens, p = 64."""
    U = orthonormal(4, 256, 64)
    own = torch.arange(4).repeat_interleave(32)
    gain = torch.full((128, 4), noise, dtype=torch.float64)
    gain[torch.arange(128), own] = 1
    z = torch.einsum("nk,nkp,kdp->nd", gain, normal(128, 4, 64, seed=1), U)

    def ratio(z: Tensor) -> Tensor:
        v = r.in_heads(z, U).square().sum(-1)
        return torch.stack(
            [v[k, own == k].sum() / (v[:, own == k].sum() - v[k, own == k].sum()) for k in range(4)]
        ).sqrt()

    for _ in range(5):
        after = r.aot_step(z, U, eta=0.5, tau=0.6)
        assert torch.allclose(ratio(after) / ratio(z), torch.tensor(1.3, dtype=torch.float64), rtol=1e-12)
        z = after


# ---------------------------------------------------------------- ToST


@shapes
def test_tied_attention_is_minus_n_times_the_gradient_of_the_variational_rate(N, d, K, p):
    """The membership held constant; no bias, unit temperature, output maps U_k."""
    z, U = normal(N, d), normal(K, d, p, seed=1)
    w = r.in_heads(z, U)
    members = torch.softmax(F.normalize(w, dim=-2).square().sum(-1), 0)
    wanted = -N * gradient(lambda v: r.variational_rate(v, U, members), z)
    tied = {"b_qkv": torch.zeros(K, p), "temp": torch.ones(K), "W_out": torch.cat(list(U), 1), "b_out": torch.zeros(d)}
    assert gap(r.tost_attention(z, U, **tied), wanted) < 3e-8 / members.sum(-1).min()  # 1e-8 beside ⟨π, 1⟩
    assert gap(r.tost_attention(z, U, **tied, eps=0.0), wanted) < 1e-13


@shapes
def test_the_variational_rate_bounds_the_rate_and_touches_it_in_the_eigenbasis(N, d, K, p):
    z, pi = normal(N, d), normal(N, seed=2).sigmoid()[None]
    moment = (pi[0][:, None] * z).mT @ z / pi.sum()
    least = pi.sum() / N * torch.linalg.slogdet(eye(d) + moment)[1] / 2
    eigen = torch.linalg.eigh(moment)[1]
    assert torch.allclose(r.variational_rate(z, eigen[None], pi), least, rtol=1e-12)
    assert r.variational_rate(z, orthonormal(1, d, d, seed=3), pi) > least


def one_token_at_a_time(y: Tensor, t: dict[str, Tensor]) -> Tensor:
    """Causal TSSA, a token at a time and a head at a time, from the tokens that it may see."""
    N, K = len(y), len(t["U"])
    w = [y @ t["U"][k] + t["b_qkv"][k] for k in range(K)]
    pi = torch.zeros(N, K, dtype=y.dtype)
    rows = []
    for i in range(N):
        shares = [(w[k][i] ** 2 / (w[k][: i + 1] ** 2).sum(0) + t["b_denom"][k, i]).sum() for k in range(K)]
        pi[i] = torch.softmax(torch.stack(shares) * t["temp"], 0)
        heads = []
        for k in range(K):
            seen = pi[: i + 1, k]
            heads.append(-w[k][i] * pi[i, k] / (1 + seen @ w[k][: i + 1] ** 2 / (seen.sum() + 1e-8)))
        rows.append(t["W_out"] @ torch.cat(heads) + t["b_out"])
    return torch.stack(rows)


@shapes
def test_causal_attention_is_the_one_built_a_token_at_a_time(N, d, K, p):
    y, t = normal(N, d), drawn(counts.tost_causal_attention(d, K, p, N + 2))
    assert gap(r.tost_causal_attention(y, **t), one_token_at_a_time(y, t)) < 1e-12


@shapes
def test_one_head_is_a_member_of_every_token(N, d, K, p):
    """With one head all memberships are one: the attention is a column scaling by 1/(1 + mean square)."""
    y, t = normal(2, N, d), drawn(counts.tost_attention(d, 1, p))
    w = y @ t["U"][0] + t["b_qkv"][0]
    wanted = F.linear(-w / (1 + w.square().mean(-2, keepdim=True)), t["W_out"], t["b_out"])
    assert gap(r.tost_attention(y, **t, eps=0.0), wanted) < 1e-12
    damped = F.linear(-w / (1 + w.square().sum(-2, keepdim=True) / (N + 0.25)), t["W_out"], t["b_out"])
    assert gap(r.tost_attention(y, **t, eps=0.25), damped) < 1e-12
    assert 0 < gap(r.tost_attention(y, **t), wanted) < 1e-7


@shapes
def test_a_tost_block_is_two_scaled_residuals(N, d, K, p):
    x, t = normal(2, N, d), drawn(counts.tost_block(d, K, p))
    attention = {k: t[k] for k in counts.tost_attention(d, K, p)}
    half = x + t["gamma1"] * r.tost_attention(F.layer_norm(x, (d,), t["norm1_w"], t["norm1_b"], 1e-6), **attention)
    y = F.layer_norm(half, (d,), t["norm2_w"], t["norm2_b"], 1e-6)
    wanted = half + t["gamma2"] * F.linear(F.gelu(F.linear(y, t["W_up"], t["b_up"])), t["W_down"], t["b_down"])
    assert gap(r.tost_block(x, **t), wanted) < 1e-12
    still = r.tost_block(x, **(t | {"gamma1": torch.zeros(d), "gamma2": torch.zeros(d)}))
    assert torch.equal(still, x)


# ---------------------------------------------------------------- ReduNet


def mixture(K: int = 3, each: int = 12, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors near K random planes, and their labels one-hot."""
    U = torch.linalg.qr(normal(K, d, 2, seed=seed))[0]
    z = torch.cat([normal(each, 2, seed=seed + 1 + k) @ U[k].mT for k in range(K)])
    return r.unit_rows(z + 0.1 * normal(K * each, d, seed=seed + 9)), eye(K).repeat_interleave(each, 0)


def test_an_exact_layer_is_projected_gradient_ascent_on_the_rate_reduction():
    z, pi = mixture()
    layer = r.redunet_layer(z, *r.redunet_operators(z, pi, 0.1), eta=0.5, members=pi)
    slope = gradient(lambda v: r.rate_reduction(v, pi, 0.1), z)
    assert gap(layer, F.normalize(z + 0.5 * slope, dim=-1)) < 1e-13


@pytest.mark.parametrize("sharpness", [500.0, 1.0])
def test_the_released_forward_is_the_sum_over_classes_of_one_sample(sharpness):
    z, pi = mixture()
    E, C, gamma = r.redunet_operators(z, pi, 0.1)
    rows = []
    for v in z:
        norms = torch.stack([torch.linalg.vector_norm(c @ v) for c in C])
        soft = torch.exp(-sharpness * (norms - norms.min()))
        soft = soft / soft.sum()
        step = v + 0.5 * (E @ v - sum(gamma[k] * soft[k] * C[k] @ v for k in range(3)))
        rows.append(step / step.norm())
    out = r.redunet_layer(z.unflatten(0, (4, 9)), E, C, gamma, sharpness=sharpness).flatten(0, 1)
    assert gap(out, torch.stack(rows)) < 1e-12


def test_the_flow_raises_the_rate_reduction_in_every_layer_with_labels_and_with_estimates():
    z, pi = mixture()
    for exact in (True, False):
        operators, features = r.redunet_construct(z, pi, layers=20, eta=0.1, exact=exact)
        values = torch.stack([r.rate_reduction(v, pi, 0.1) for v in features])
        assert len(operators) == 20 and len(features) == 21
        assert values[-1] > values[0] + 0.2
        if exact:
            assert (values.diff() > 0).all()
        for v in features:
            assert torch.allclose(v.norm(dim=-1), torch.ones(len(z)).double(), rtol=1e-14)


def test_memberships_find_the_class_of_a_sample():
    z, pi = mixture(d=12)
    _, C, _ = r.redunet_operators(z, pi, 0.1)
    soft = r.redunet_memberships(z, C)
    assert torch.allclose(soft.sum(-1), torch.ones(len(z)).double())
    assert (soft.argmax(-1) == pi.argmax(-1)).double().mean() > 0.9


@pytest.mark.parametrize(("m", "C", "grid"), [(4, 2, (5,)), (2, 1, (4,)), (5, 3, (1,)), (3, 2, (3, 4))])
def test_the_spectral_layer_is_the_layer_of_all_shifted_copies(m, C, grid):
    """Per frequency, one and two dimensions = the vector layer whose data are every cyclic shift of every signal."""
    axes, T = tuple(range(2, 2 + len(grid))), math.prod(grid)
    x, members = F.normalize(normal(m, C * T), dim=-1).reshape(m, C, *grid), one_hot(m, 2)
    shifts = [x.roll(s, axes).flatten(1) for s in product(*map(range, grid))]
    E, Cs, gamma = r.redunet_operators(torch.cat(shifts), members.repeat(T, 1), 0.1)
    wanted = r.redunet_layer(x.flatten(1), E, Cs, gamma, sharpness=3.0)
    v = torch.fft.fftn(x, dim=axes, norm="ortho").flatten(2)

    def through(factor: float) -> Tensor:
        out = r.redunet_spectral_layer(v, *r.redunet_spectral_operators(v, members, 0.1, factor), sharpness=3.0)
        return torch.fft.ifftn(out.unflatten(2, grid), dim=axes, norm="ortho").flatten(1)

    assert gap(through(T).real, wanted) < 1e-12
    assert through(T).imag.abs().max() < 1e-14
    assert T == 1 or gap(through(1).real, wanted) > 1e-3


# ---------------------------------------------------------------- power iterations and dictionaries


def test_power_iteration_finds_the_leading_eigenvectors():
    x = normal(200, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    U = normal(6, 2, seed=1)
    for _ in range(100):
        U = r.power_step(U, x)
    wanted = torch.linalg.eigh(x.mT @ x)[1][:, [-1, -2]]
    assert gap((U.mT @ wanted).abs(), eye(2)) < 1e-12
    u, v = U[:, :1] + U[:, 1:], x.mT @ (x @ (U[:, :1] + U[:, 1:]))
    assert gap(r.power_step(u, x), v / v.norm()) < 1e-14


def bernoulli_gaussian(N: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sparse codes through an orthogonal dictionary, white: (x (N, d), dictionary (d, d))."""
    on = torch.rand(N, d, generator=draws(seed + 1), dtype=torch.float64) < 0.3
    U = torch.linalg.qr(normal(d, d, seed=seed + 2))[0]
    return (on * normal(N, d, seed=seed)) @ U.mT / math.sqrt(0.3), U


def test_msp_raises_the_fourth_norm_and_recovers_the_dictionary():
    x, U = bernoulli_gaussian(4000, 8)
    A = torch.linalg.qr(normal(8, 8, seed=5))[0]
    values = [((x @ A.mT) ** 4).sum() / 4]
    for _ in range(30):
        A = r.msp_step(A, x)
        values.append(((x @ A.mT) ** 4).sum() / 4)
    rises = torch.stack(values).diff()
    assert (rises[:5] > 0).all() and (rises > -1e-9 * values[0]).all()
    assert gap(A @ A.mT, eye(8)) < 1e-13
    assert (A @ U).abs().amax(1).min() > 0.99
    slope = gradient(lambda B: ((x @ B.mT) ** 4).sum() / 4, A)
    left, _, right = torch.linalg.svd(slope)
    assert gap(r.msp_step(A, x), left @ right) < 1e-12


def test_fastica_finds_one_component():
    x, U = bernoulli_gaussian(4000, 6)
    u = normal(6, seed=3)
    u = u / u.norm()
    for _ in range(30):
        u = r.fastica_step(u, x)
    assert (U.mT @ u).abs().max() > 0.99
    u = normal(6, seed=4)
    slope = gradient(lambda v: ((x @ v) ** 4).mean() / 4 - 1.5 * (v @ v), u)
    assert gap(r.fastica_step(u, x), slope / slope.norm()) < 1e-13


def test_palm_descends_and_its_codes_reach_the_lasso():
    x, A = normal(40, 6), r.unit_ball_columns(normal(6, 9, seed=1))
    z = torch.zeros(40, 9, dtype=torch.float64)

    def cost(A: Tensor, z: Tensor) -> Tensor:
        return (z @ A.mT - x).square().sum() + 0.3 * z.abs().sum()

    values = [cost(A, z)]
    B, w = A, z
    for _ in range(20):
        B, w = r.palm_step(B, w, x, 0.3, codes=1, atoms=1)
        values.append(cost(B, w))
        assert B.norm(dim=0).max() <= 1 + 1e-14
    assert (torch.stack(values).diff() < 0).all()
    _, codes = r.palm_step(A, z, x, 0.3, codes=4000, atoms=0)
    # optimality of the lasso with no ½: |2Aᵀ(x − Az)| ≤ λ, with the sign of z where z ≠ 0
    slack = 2 * (x - codes @ A.mT) @ A
    assert slack.abs().max() < 0.3 + 1e-9
    assert (slack - 0.3 * codes.sign())[codes != 0].abs().max() < 1e-9


def test_palm_takes_the_largest_safe_steps_along_the_gradients():
    """1/L with L the largest curvature of each block, from the Hessian itself."""
    x, A, z, lam = normal(4, 3), 0.5 * normal(3, 2, seed=1), normal(4, 2, seed=2), 0.3

    def fit(A: Tensor, z: Tensor) -> Tensor:
        return (z @ A.mT - x).square().sum()

    def curvature(f: object, at: Tensor) -> Tensor:
        n = at.numel()
        return torch.linalg.eigvalsh(torch.autograd.functional.hessian(f, at).reshape(n, n)).max()

    step = 1 / curvature(lambda v: fit(A, v), z)
    v = z - step * gradient(lambda v: fit(A, v), z)
    codes = torch.where(v.abs() > step * lam, v - step * lam * v.sign(), 0)
    assert gap(r.palm_step(A, z, x, lam, codes=1, atoms=0)[1], codes) < 1e-12
    W = A - gradient(lambda B: fit(B, codes), A) / curvature(lambda B: fit(B, codes), A)
    atoms = torch.where(W.norm(dim=0) > 1, F.normalize(W, dim=0), W)
    assert gap(r.palm_step(A, z, x, lam, codes=1, atoms=1)[0], atoms) < 1e-12


def test_a_sparse_autoencoder_is_one_nonnegative_step_with_its_maps_set_free():
    A, x, start = normal(5, 9), normal(4, 5, seed=1), normal(9, seed=2).clamp_min(0)
    b, eta, lam = normal(5, seed=3), 0.05, 0.2
    smooth = gradient(lambda z: (z @ A.mT - (x - b)).square().sum(), start.expand(4, 9))
    wanted = F.relu(start - eta * smooth - lam * eta)
    b_enc = start - 2 * eta * start @ A.mT @ A - lam * eta
    z, back = r.sparse_autoencoder(x, 2 * eta * A.mT, b_enc, A, b)
    assert gap(z, wanted) < 1e-13
    assert gap(back, F.linear(wanted, A, b)) < 1e-13


# ---------------------------------------------------------------- denoisers and energies


@pytest.mark.parametrize(("d", "K", "p"), [(6, 3, 2), (4, 1, 1), (5, 2, 1), (3, 2, 3)])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.3), (1.0, 2.0), (0.6, 0.8)])
def test_the_mixture_denoiser_is_tweedies(d, K, p, alpha, sigma):
    """E[x₀|x] = (x + σ²∇log p(x))/α, p the mixture's density itself."""
    U, x = orthonormal(K, d, p) if p < d else torch.linalg.qr(normal(K, d, p))[0], normal(7, d, seed=1)
    cov = alpha**2 * U @ U.mT + sigma**2 * eye(d)
    parts = torch.distributions.MultivariateNormal(torch.zeros(d).double(), cov)
    score = gradient(lambda v: torch.logsumexp(parts.log_prob(v[:, None]), -1).sum(), x)
    assert gap(r.mixture_denoiser(x, U, alpha, sigma), (x + sigma**2 * score) / alpha) < 1e-12


def test_the_sampler_goes_to_the_subspaces_and_its_last_step_is_the_denoiser():
    U, x = orthonormal(3, 6, 2), 3 * normal(50, 6, seed=1)
    assert gap(r.ddim_step(x, U, (1.0, 3.0), (1.0, 0.0)), r.mixture_denoiser(x, U, 1.0, 3.0)) < 1e-15
    grid = [3.0 * 0.8**i for i in range(40)]
    for now, then in pairwise(grid):
        x = r.ddim_step(x, U, (1.0, now), (1.0, then))
    on = r.in_heads(x, U).norm(dim=-1).amax(0) / x.norm(dim=-1)
    assert on.median() > 0.99


def test_a_sampler_step_along_the_exact_score_is_an_euler_step_of_the_probability_flow():
    """VE: dx/dt = −t∇log p = (x − x̄)/t."""
    U, x, t, h = orthonormal(2, 5, 2), normal(4, 5, seed=1), 0.7, 0.05
    euler = x - h * (x - r.mixture_denoiser(x, U, 1.0, t)) / t
    assert gap(r.ddim_step(x, U, (1.0, t), (1.0, t - h)), euler) < 1e-14


def test_a_sampler_step_keeps_the_noise_it_estimates():
    """x = αx̄ + σe gives e; the next point is α'x̄ + σ'e.  On a circle, α² + σ² = 1."""
    U, x = orthonormal(2, 5, 2), normal(4, 5, seed=1)
    clean = r.mixture_denoiser(x, U, 0.6, 0.8)
    noise = (x - 0.6 * clean) / 0.8
    assert gap(r.ddim_step(x, U, (0.6, 0.8), (0.96, 0.28)), 0.96 * clean + 0.28 * noise) < 1e-14


@shapes
def test_an_energy_transformer_step_is_the_gradient_in_the_normalised_tokens(N, d, K, p):
    x, t = normal(2, N, d), (normal(K, d, p, seed=1), normal(K, d, p, seed=2), normal(d, 7, seed=3))
    w, b = normal(1, seed=4)[0], normal(d, seed=5)
    g = F.layer_norm(x, (d,)) * w + b
    slope = gradient(lambda v: r.energy_transformer_energy(v, *t, beta=0.7).sum(), g)
    assert gap(r.energy_transformer_step(x, w, b, *t, beta=0.7, step=0.1), x - 0.1 * slope) < 1e-12


def test_a_small_energy_transformer_step_lowers_the_energy():
    x, t = normal(6, 8), (normal(2, 8, 4, seed=1), normal(2, 8, 4, seed=2), normal(8, 7, seed=3))
    one, zero = torch.ones(8).double(), torch.zeros(8).double()
    y = r.energy_transformer_step(x, one, zero, *t, beta=0.5, step=1e-3)
    before, after = (r.energy_transformer_energy(F.layer_norm(v, (8,)), *t, 0.5) for v in (x, y))
    assert after < before


def test_a_hopfield_step_is_a_unit_gradient_step_and_lowers_its_energy():
    Xi, x, beta = normal(6, 9), normal(5, 6, seed=1), 2.0

    def energy(v: Tensor) -> Tensor:
        return -torch.logsumexp(beta * v @ Xi, -1) / beta + v.square().sum(-1) / 2

    y = r.hopfield_step(x, Xi, beta)
    assert gap(y, x - gradient(lambda v: energy(v).sum(), x)) < 1e-13
    assert (energy(y) < energy(x)).all()
    unit = F.normalize(Xi, dim=0)
    assert gap(r.hopfield_step(unit.mT + 0.05 * normal(9, 6, seed=2), unit, 200.0), unit.mT) < 1e-6


# ---------------------------------------------------------------- losses


def test_the_mcr2_loss_is_minus_the_rate_reduction_and_gam1_stays_inside_the_first_term():
    z, pi = mixture()
    assert torch.allclose(r.mcr2_loss(z, pi, 0.5), -r.rate_reduction(z, pi, 0.5), rtol=1e-14)
    N, d = z.shape
    by_det = [torch.linalg.slogdet(eye(d) + d / (12 * 0.5) * z[pi[:, k] > 0].mT @ z[pi[:, k] > 0])[1] for k in range(3)]
    whole = torch.linalg.slogdet(eye(d) + 20 * d / (N * 0.5) * z.mT @ z)[1] / 2
    wanted = sum(12 / (2 * N) * v for v in by_det) - 0.05 * whole
    assert torch.allclose(r.mcr2_loss(z, pi, 0.5, gam1=20, gam2=0.05), wanted, rtol=1e-13)


def test_the_rate_distance_is_the_rate_reduction_of_two_classes():
    a, b = mixture()[0], mixture(seed=20)[0]
    pi = eye(2).repeat_interleave(len(a), 0)
    assert torch.allclose(r.rate_distance(a, b, 0.5), r.rate_reduction(torch.cat([a, b]), pi, 0.5), rtol=1e-12)
    assert abs(r.rate_distance(a, a, 0.5)) < 1e-13 < r.rate_distance(a, b, 0.5)
    assert torch.equal(r.ctrl_binary(a, b, 0.5), r.rate_distance(a, b, 0.5))


def test_the_closed_loop_objective_of_a_perfect_decoder_is_twice_the_rate_reduction():
    (a, pi), b = mixture(), mixture(seed=20)[0]
    assert torch.allclose(r.ctrl_multi(a, a, pi, 0.5), 2 * r.rate_reduction(a, pi, 0.5), rtol=1e-12)
    apart = r.ctrl_multi(a, b, pi, 0.5) - r.rate_reduction(a, pi, 0.5) - r.rate_reduction(b, pi, 0.5)
    by_class = sum(r.rate_distance(a[12 * k : 12 * k + 12], b[12 * k : 12 * k + 12], 0.5) for k in range(3))
    assert torch.allclose(apart, by_class, rtol=1e-11)


def test_the_simdino_loss_is_the_books_distance_minus_its_rate_up_to_a_constant():
    """½‖a − b‖² = 1 − cosine on the sphere; pairs of one view are left out; the rate through eigenvalues."""
    m, p, V, W = 6, 4, 2, 5
    teacher, student = normal(V, m, p), normal(W, m, p, seed=1)
    t, s = F.normalize(teacher, dim=-1), F.normalize(student, dim=-1)
    pairs = [(t[i] - s[j]).square().sum(-1).mean() / 2 for i in range(V) for j in range(W) if i != j]
    spectrum = torch.linalg.eigvalsh(s[:V].mT @ s[:V])
    rate = (1 + p / (m * 0.05) * spectrum).log().sum(-1).mean() / 2
    wanted = sum(pairs) / len(pairs) - 1 - 0.7 * (p + m) / (p * m) * rate
    assert torch.allclose(r.simdino_loss(teacher, student, 0.05, 0.7), wanted, rtol=1e-12)
    shared = (1 + p / (3 * m * 0.05) * spectrum).log().sum(-1).mean() / 2
    wanted = sum(pairs) / len(pairs) - 1 - 0.7 * (p + 3 * m) / (p * 3 * m) * shared
    assert torch.allclose(r.simdino_loss(teacher, student, 0.05, 0.7, workers=3), wanted, rtol=1e-12)
    moved = teacher.clone().requires_grad_()
    assert not r.simdino_loss(moved, student, 0.05, 1.0).requires_grad


CONSTANTS = {
    r.layer_norm: {"eps": 1e-5},
    r.crate_block: {"eta": 0.1, "lam": 0.1, "causal": False},
    r.crate_alpha_block: {"eta": 0.1, "lam": 0.1, "steps": 2},
    r.tost_attention: {"eps": 1e-8},
    r.tost_causal_attention: {"eps": 1e-8},
    r.redunet_layer: {"eta": 0.5, "sharpness": 500.0, "members": None},
    r.redunet_spectral_layer: {"eta": 0.5, "sharpness": 500.0},
    r.redunet_construct: {"eta": 0.5, "eps2": 0.1, "sharpness": 500.0, "exact": True},
}


@pytest.mark.parametrize("form", CONSTANTS, ids=lambda f: f.__name__)
def test_the_constants_are_the_released_ones(form):
    found = {k: v.default for k, v in signature(form).parameters.items() if v.default is not Parameter.empty}
    assert found == CONSTANTS[form]


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", counts.PUBLISHED)
def test_the_shapes_count_to_the_published_size(name):
    shape_of, exact, millions = counts.PUBLISHED[name]
    assert counts.parameters(shape_of) == exact
    assert abs(exact / 1e6 - millions) < 10.0 ** -len(str(millions).partition(".")[2])


@pytest.mark.parametrize("size", counts.CRATE)
def test_crate_counts_what_pytorchs_own_layers_count(size):
    d, layers, K = counts.CRATE[size]
    with torch.device("meta"):
        nn = torch.nn
        block = [
            nn.LayerNorm(d),
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d),
            nn.LayerNorm(d),
            nn.Linear(d, d, bias=False),
        ]
        around = [nn.LayerNorm(768), nn.Linear(768, d), nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 1000)]
        tokens = [nn.Embedding(197, d), nn.Embedding(1, d)]
    one, rest = (sum(w.numel() for layer in part for w in layer.parameters()) for part in (block, around + tokens))
    assert counts.parameters(counts.crate(d, layers, K)) == layers * one + rest
