"""Whole networks against the released forms written out by hand (released.py): values and gradients in float64, odd shapes too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import released
import torch
from torch import Tensor

import unroll
from unroll.network.network import Network

EXACT = 1e-10
SMALL = {"d": 12, "K": 3, "p": 4}
TOKENS = [(7,), (2, 5), (1,), (2, 1)]


def network(name: str, layers: int = 2, **dims: int) -> Network:
    """A network of the library at small sizes, its parameters anything but their starting values."""
    net = unroll.compile(
        name, dims={**(SMALL if not dims else {}), **dims}, dtype=torch.float64, overrides=[f"unroll.layers={layers}"]
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.4 + ("weight" in n))
    return net


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(net: Network, x: Tensor, by_hand: Callable[[Tensor], Tensor]) -> None:
    """Values, and the gradients of all parameters and of x, are those of the function written by hand."""
    given = dict(net.named_parameters())
    weight = drawn(*net(x).shape, seed=9)
    found: list[list[Tensor]] = []
    for run in (net, by_hand):
        inputs = x.clone().requires_grad_()
        out = run(inputs)
        grads = torch.autograd.grad(
            (out * weight).sum(), [inputs, *given.values()], materialize_grads=True, allow_unused=True
        )
        found.append([out, *grads])
    for name, ours, theirs in zip(["the answer", "x", *given], *found, strict=True):
        gap = float(((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)).detach())
        assert gap <= EXACT, name


def heads(w: Tensor) -> Tensor:
    """(K, d, p) -> (d, K p): head k in columns kp : (k + 1) p."""
    return w.movedim(0, 1).flatten(1)


def crate_layer(net: Network, i: int, x: Tensor, **options: bool) -> Tensor:
    n = net
    return released.crate_block(
        x, n.compress_norm_weight[i], n.compress_norm_bias[i], n.W[i], heads(n.W_out[i]), n.W_out_bias[i],
        n.sparsify_norm_weight[i], n.sparsify_norm_bias[i], n.Q[i], **options,
    )  # fmt: skip


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize(("name", "causal"), [("crate", False), ("crate_causal", True)])
def test_crate_is_the_released_block(name: str, causal: bool, shape: tuple[int, ...]) -> None:
    net = network(name)

    def by_hand(x: Tensor) -> Tensor:
        for i in range(2):
            x = crate_layer(net, i, x, causal=causal)
        return x

    agree(net, drawn(*shape, 12), by_hand)


def test_a_later_token_changes_no_earlier_one_in_a_causal_network() -> None:
    for name in ("crate_causal", "tost_causal"):
        net, x = network(name), drawn(6, 12)
        y = x.clone()
        y[4:] += drawn(2, 12, seed=5)
        assert torch.equal(net(x)[:4], net(y)[:4])
        assert not torch.allclose(net(x)[4:], net(y)[4:])


@pytest.mark.parametrize("shape", TOKENS)
def test_crate_alpha_is_the_released_block(shape: tuple[int, ...]) -> None:
    net = network("crate_alpha", **SMALL, s=20)

    def by_hand(x: Tensor) -> Tensor:
        for i in range(2):
            n = net
            x = released.crate_alpha_block(
                x, n.compress_norm_weight[i], n.compress_norm_bias[i], n.W[i], heads(n.W_out[i]),
                n.sparsify_norm_weight[i], n.sparsify_norm_bias[i], n.Q[i], n.Q_out[i], 0.1, 0.1,
            )  # fmt: skip
        return x

    agree(net, drawn(*shape, 12), by_hand)


@pytest.mark.parametrize("shape", TOKENS)
def test_the_decoder_is_the_released_layer(shape: tuple[int, ...]) -> None:
    net = network("crate_decoder")

    def by_hand(x: Tensor) -> Tensor:
        for i in range(2):
            n = net
            x = released.mae_decoder_layer(
                x, n.expand_norm_weight[i], n.expand_norm_bias[i], n.Q[i],
                n.spread_norm_weight[i], n.spread_norm_bias[i], n.W[i], heads(n.W_out[i]), n.W_out_bias[i],
            )  # fmt: skip
        return x

    agree(net, drawn(*shape, 12), by_hand)


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize("causal", [False, True])
def test_token_statistics_attention_is_the_released_one(shape: tuple[int, ...], causal: bool, zeros: int) -> None:
    net = network("tost_causal", **SMALL, T=4) if causal else network("tost")  # shorter and longer texts than T

    def by_hand(x: Tensor) -> Tensor:
        for i in range(2):
            n = net
            y = released.layer_norm(x, n.compress_norm_weight[i], n.compress_norm_bias[i], 1e-6)
            args = (y, n.W[i], n.offset[i], n.temperature[i])
            if causal:
                told = torch.cat([n.place[i], torch.zeros(3, 9, dtype=x.dtype)], -1)  # 0 after the last place
                out = released.tost_causal_attention(*args, told, heads(n.W_out[i]), -n.W_out_bias[i])
            else:
                out = released.tost_attention(*args, heads(n.W_out[i]), -n.W_out_bias[i])
            x = x + n.layer_scale[i] * out
        return x

    x = drawn(*shape, 12)
    for small in (1e-7, 1e-13):  # sums below what the released clamps keep them from 0 by
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with torch.no_grad():
            net.offset.zero_()
            net.compress_norm_bias.zero_()
            net.compress_norm_weight.mul_(small)
            net.layer_scale.div_(small)
        assert torch.allclose(net(x), by_hand(x), atol=EXACT)
        net.load_state_dict(before)
    if zeros:  # tokens that put nothing into a sum: its shares are 0, as the released clamp makes them
        x[..., :zeros, :] = 0
        with torch.no_grad():
            net.offset.zero_()
            net.compress_norm_bias.zero_()
        assert torch.allclose(net(x), by_hand(x), atol=EXACT)
        assert all(g.isfinite().all() for g in torch.autograd.grad(net(x).sum(), list(net.parameters())))
    else:
        agree(net, x, by_hand)


def labelled(m: int = 30, d: int = 6, K: int = 3) -> tuple[Tensor, Tensor]:
    """(m, d) features on the sphere near K lines, and their (K, m) memberships."""
    labels = torch.arange(m) % K
    x = drawn(K, d)[labels] + 0.3 * drawn(m, d, seed=3)
    return released.unit_rows(x), torch.nn.functional.one_hot(labels, K).double().mT


def test_redunet_is_constructed_and_runs_as_the_released_network() -> None:
    x, members = labelled()
    net = unroll.compile("redunet", dims={"d": 6, "K": 3}, dtype=torch.float64, overrides=["unroll.layers=4"])
    with pytest.raises(unroll.UnrollError, match="E408"):
        net(x)
    after = net.construct(X=x, Pi=members)
    operators, features = released.redunet_construct(x, members.mT, 4, 0.5, 0.1, 500.0, exact=False)
    assert torch.allclose(after, features[-1], atol=1e-10)
    for i, (E, C, gamma) in enumerate(operators):
        assert torch.allclose(net.E[i], E, atol=1e-10)
        assert torch.allclose(net.C[i], gamma[:, None, None] * C, atol=1e-10)
    fresh = released.unit_rows(drawn(8, 6, seed=7))
    want = fresh
    for E, C, gamma in operators:
        want = released.redunet_layer(want, E, C, gamma, 0.5, 500.0)
    assert torch.allclose(net(fresh), want, atol=1e-10)
    assert torch.allclose(net(x), after, atol=1e-12), "the network on its own data does what was constructed"


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 30, 1000])
def test_redunet_is_constructed_batch_by_batch(batch_size: int, soft: bool) -> None:
    x, members = labelled()
    members = drawn(*members.shape).softmax(0) if soft else members
    net = unroll.compile("redunet", dims={"d": 6, "K": 3}, dtype=torch.float64, overrides=["unroll.layers=4"])
    after = net.construct(X=x, Pi=members, batch_size=batch_size)
    operators, features = released.redunet_construct(x, members.mT, 4, 0.5, 0.1, 500.0, exact=False)
    assert torch.allclose(after, features[-1], atol=1e-10)
    for i, (E, C, gamma) in enumerate(operators):
        assert torch.allclose(net.E[i], E, atol=1e-10)
        assert torch.allclose(net.C[i], gamma[:, None, None] * C, atol=1e-10)
    assert "weighed_product(" in net.source.split("def forward")[0], "samples of other classes are left out"
    with pytest.raises(unroll.UnrollError, match="E404.*Pi 29, X 30"):
        net.construct(X=x, Pi=members[:, 1:], batch_size=batch_size)
    with pytest.raises(unroll.UnrollError, match="E404.*batch_size is 0"):
        net.construct(X=x, Pi=members, batch_size=0)


def constructed_on_data(objective: str, replaces: str, **more: Any) -> unroll.Network:
    spec = {
        "objective": "o", "dims": {"d": 4, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]}, "minimize": {"f": objective},
        "unroll": {
            "algorithm": "gradient_descent", "layers": 3, "step": 0.1, "start": {"Z": "X"},
            "learn": {"E": {"replaces": replaces, "init": "data"}}, **more,
        },
    }  # fmt: skip
    return cast(unroll.Network, unroll.compile(spec, dtype=torch.float64))


SUMS = {
    "a Gram matrix": ("-logdet(I(d) + Z @ Z.T)", "inv(I(d) + Z @ Z.T)", {}),
    "with momentum": ("-logdet(I(d) + Z @ Z.T) + 1/2*sumsq(Z)", "inv(I(d) + y @ y.T)", {"algorithm": "fista"}),
    "of a normalised Gram matrix": ("-logdet(I(d) + Z @ Z.T / sumsq(Z))", "inv(I(d) + Z @ Z.T / sumsq(Z))", {}),
    "of powers": ("-1/4*logdet(I(d) + Z**2 @ Z.T**2)", "inv(I(d) + Z**2 @ Z.T**2)", {}),
}


@pytest.mark.parametrize(("objective", "replaces", "more"), SUMS.values(), ids=SUMS)
def test_sums_over_samples_are_taken_batch_by_batch(objective: str, replaces: str, more: dict[str, Any]) -> None:
    """The constructed layers against gradient descent on all samples at once, by autograd; any batches give the same."""
    x = drawn(11, 4)
    net = constructed_on_data(objective, replaces, **more)
    assert net.program.samples is not None
    after = net.construct(X=x, batch_size=4)
    if not more:
        exact = x
        for _ in range(3):
            z = exact.clone().requires_grad_()
            exact = (z - 0.1 * torch.autograd.grad(net.objective(X=x, Z=z)["total"], z)[0]).detach()
        assert torch.allclose(after, exact, atol=1e-12)
    assert torch.allclose(net(x), after, atol=1e-12)
    for batch_size in (1, 11, None):
        assert torch.allclose(net.construct(X=x, batch_size=batch_size), after, atol=1e-12)


@pytest.mark.parametrize(
    ("mixed", "in_batches"),
    [
        ("logsumexp(Z)", False),  # a softmax over all samples
        ("sumsq(Z @ ones(N, N))", False),  # a sum over samples in every sample
        ("sum(softmax(Z, axis=1)**2)", False),
        ("1/4*sumsq(Z.T @ Z)", True),  # the smaller side is a sum over samples
        ("sum(log(1 + sum((Z @ Z.T @ Z)**2, axis=0)))", False),  # a sum over samples that are weighed by such a sum
        ("sumsq(sum(Z, axis=1))", False),  # repeated over as many columns as there are samples
    ],
)
def test_what_mixes_samples_is_constructed_at_once_or_as_if(mixed: str, in_batches: bool) -> None:
    x = drawn(5, 4)
    net = constructed_on_data(f"-logdet(I(d) + Z @ Z.T) + 0.1*({mixed})", "inv(I(d) + Z @ Z.T)")
    exact, after = x, net.construct(X=x)
    for _ in range(3):
        z = exact.clone().requires_grad_()
        exact = (z - 0.1 * torch.autograd.grad(net.objective(X=x, Z=z)["total"], z)[0]).detach()
    assert torch.allclose(after, exact, atol=1e-10)
    assert (net.program.samples is not None) == in_batches
    if in_batches:
        assert torch.allclose(net.construct(X=x, batch_size=2), after, atol=1e-10)
    else:
        with pytest.raises(unroll.UnrollError, match="E404.*batches"):
            net.construct(X=x, batch_size=2)


@pytest.mark.parametrize(
    ("inside", "in_batches"),
    [
        ("sphere", True),
        ("simplex", True),
        ("nonneg", True),
        ("unit_columns", True),
        ("orthogonal", False),
        ("stiefel", False),
        ("ball2(1)", False),
        ("ball1(1)", False),
    ],
)
def test_a_projection_of_all_samples_together_is_constructed_at_once(inside: str, in_batches: bool) -> None:
    """The step of every layer is taken from the layers as they run: on all samples at once."""
    spec = {
        "objective": "o", "dims": {"d": 4, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "minimize": {"f": "-logdet(I(d) + Z @ Z.T)"}, "constraints": [f"Z in {inside}"],
        "unroll": {
            "algorithm": "projected_gradient", "layers": 2, "step": 0.1, "start": {"Z": "X"},
            "learn": {"E": {"replaces": "inv(I(d) + Z @ Z.T)", "init": "data"}},
        },
    }  # fmt: skip
    net, x = unroll.compile(spec, dtype=torch.float64), drawn(3, 4)
    after = net.construct(X=x)
    assert torch.allclose(net(x), after, atol=1e-12)
    if in_batches:
        assert torch.allclose(net.construct(X=x, batch_size=1), after, atol=1e-12)
    else:
        with pytest.raises(unroll.UnrollError, match="E404.*batches"):
            net.construct(X=x, batch_size=1)


def test_the_exact_flow_is_projected_ascent_and_rises() -> None:
    x, members = labelled()
    net = unroll.compile(
        "rate_reduction_flow",
        dims={"d": 6, "K": 3},
        dtype=torch.float64,
        overrides=["unroll.layers=6", "unroll.step=0.1"],
    )
    trace = net.trace(X=x, Pi=members)
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(released.rate_reduction(z, members.mT, 0.1), z)
    assert torch.allclose(trace.iterates["Z"][1], released.unit_rows(x + 0.1 * slope), atol=1e-12)
    rate = trace.terms["rate"] + trace.terms["class_rate"]
    assert torch.allclose(rate[0], released.rate_reduction(x, members.mT, 0.1))
    assert (rate[1:] > rate[:-1]).all()


def test_the_denoiser_of_a_mixture_is_the_closed_form() -> None:
    net = unroll.compile(
        "mixture_denoiser", dims={"d": 6, "K": 3, "p": 2}, dtype=torch.float64, overrides=["unroll.layers=5"]
    )
    x = drawn(9, 6)
    want, u = x, net.W.detach()
    for i in range(5):
        now, then = torch.tensor(-i / 2).exp().item(), torch.tensor(-(i + 1) / 2).exp().item()
        want = released.ddim_step(want, u, (1.0, now), (1.0, then))
    assert torch.allclose(net(x), want, atol=1e-6)


def test_energies_give_their_layers() -> None:
    net, q = network("hopfield", 1, d=6, M=10), drawn(4, 6)
    agree(net, q, lambda x: released.hopfield_step(x, net.patterns, 2.0))
    net = network("energy_transformer", 1, d=8, K=2, p=4, M=10)
    agree(
        net,
        drawn(2, 5, 8),
        lambda x: released.energy_transformer_step(
            x,
            torch.ones(8, dtype=x.dtype),
            torch.zeros(8, dtype=x.dtype),
            net.Wq.mT,
            net.Wk.mT,
            net.patterns.mT,
            0.125,
            0.1,
        ),
    )


def test_power_steps_are_the_published_iterations() -> None:
    x = drawn(40, 5)
    msp = unroll.compile("msp", dims={"d": 5}, dtype=torch.float64, overrides=["unroll.layers=3"])
    want = torch.eye(5, dtype=torch.float64)
    for _ in range(3):
        want = released.msp_step(want, x)
    trace = msp.trace(x)
    assert torch.allclose(trace.iterates["A"][-1].mT, want, atol=1e-10)
    assert (trace.terms["peaks"].diff() > 0).all()
    ica = unroll.compile("fastica", dims={"d": 5}, dtype=torch.float64, overrides=["unroll.layers=3"])
    u = torch.full((5,), 5**-0.5, dtype=torch.float64)
    for _ in range(3):
        u = released.fastica_step(u, x)
    assert torch.allclose(ica(x), u, atol=1e-10)


def test_principal_components_are_those_of_the_singular_vectors() -> None:
    x = drawn(50, 6) * torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5, 0.1])
    net = unroll.compile("pca", dims={"d": 6, "p": 3}, dtype=torch.float64, overrides=["unroll.layers=200"])
    u = net(x, torch.eye(6, 3, dtype=torch.float64).mT)
    truth = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    assert torch.allclose(u.mT @ u, truth.mT @ truth, atol=1e-8)


def test_alternating_blocks_learn_a_dictionary_and_the_objective_falls() -> None:
    x = drawn(30, 6)
    a = torch.nn.functional.normalize(drawn(6, 9, seed=2), dim=0)
    net = unroll.compile("palm", dims={"m": 6, "n": 9}, dtype=torch.float64, overrides=["unroll.layers=8"])
    trace = net.trace(x, a.mT)
    assert (trace.all_terms["total"].diff() <= 1e-10).all()
    assert trace.labels[:3] == ((1, "codes"), (1, "atoms"), (2, "codes"))
    z = torch.zeros(30, 9, dtype=torch.float64)
    for _ in range(2):
        step = 1 / torch.linalg.matrix_norm(a, 2) ** 2
        z = released.soft_threshold(z - step * (z @ a.mT - x) @ a, step * 0.1)
    assert torch.allclose(trace.steps["Z"][1], z, atol=1e-10)
    step = 1 / torch.linalg.matrix_norm(z, 2) ** 2
    assert torch.allclose(
        trace.steps["A"][2].mT, released.unit_ball_columns(a - step * (z @ a.mT - x).mT @ z), atol=1e-10
    )


def test_an_encoder_is_one_step_of_sparse_coding() -> None:
    net, x = network("sparse_autoencoder", 1, m=5, n=8), drawn(3, 5)
    agree(net, x, lambda h: released.sparse_autoencoder(h, net.W_enc[0], -net.theta[0], drawn(5, 8), net.b_pre)[0])


def test_first_order_predictions_are_the_limit_of_small_steps() -> None:
    x = drawn(5, 12)
    gaps = []
    for step in (1e-4, 1e-6):
        net = unroll.compile(
            "crate_neumann",
            dims=SMALL,
            dtype=torch.float64,
            overrides=["unroll.layers=1"],
            scalars={"kappa": step, "eta": 1e-9},
        )
        trace = net.trace(x)
        gaps.append(float((trace.predicted["compression"][0] - trace.actual["compression"][0]).abs().detach()) / step)
    assert gaps[1] < gaps[0] / 50
    assert trace.labels == ((1, "compress"), (1, "sparsify"))


def test_the_exact_halves_do_what_they_say_and_the_released_ones_need_not() -> None:
    x = drawn(4, 16, 12)
    exact = unroll.compile("crate_exact", dims=SMALL, dtype=torch.float64, overrides=["unroll.layers=1"]).trace(x)
    assert (exact.actual["compression"][0] > 0).all(), "the rate of the subspaces falls: its negative is maximised"
    assert (exact.predicted["compression"][0] > 0).all()


def test_dropout_and_drop_path_act_on_the_update_while_training_only() -> None:
    spec = ["unroll.layers=3"]
    both = unroll.load("crate").to_dict()
    both["unroll"]["blocks"][0] |= {"dropout": "0.25", "drop_path": "0.5 * layer / layers"}  # type: ignore[index, operator]
    net = unroll.compile(both, dims=SMALL, dtype=torch.float64, overrides=spec, seed=3)
    plain = unroll.compile("crate", dims=SMALL, dtype=torch.float64, overrides=spec, seed=3)
    x = drawn(4000, 5, 12)
    assert torch.equal(net.eval()(x), plain(x))
    torch.manual_seed(0)
    steps = net.train().trace(x).steps["Z"]
    moved = (steps[1] - steps[0]) / (plain.trace(x).steps["Z"][1] - x)
    kept = moved.abs() > 1e-12
    assert abs(float(kept.double().mean()) - 0.75) < 0.01
    assert torch.allclose(moved[kept], torch.tensor(1 / 0.75, dtype=torch.float64))
    gone = (steps[5] == steps[4]).flatten(1).all(1)  # layer 3: chance 1/3
    assert abs(float(gone.double().mean()) - 1 / 3) < 0.03


def test_drop_path_keeps_the_mean_of_an_update() -> None:
    """A sample's update is left out as a whole, or divided by the chance that it is not."""
    written = """
    dims: {n: 6}
    variables: {z: [n]}
    inputs: {x: [n]}
    minimize: {fit: 1/2 * sumsq(x - z)}
    unroll: {layers: 1, blocks: [{block: fit, algorithm: gradient_descent, step: 0.1, gauge: {residual: 1}, drop_path: 0.25}]}
    """
    x = drawn(4000, 6)
    torch.manual_seed(0)
    share = unroll.compile(written, dtype=torch.float64).train()(x) / (0.1 * x)
    kept = share[:, 0] != 0
    assert (share[~kept] == 0).all() and torch.allclose(share[kept], torch.full((), 4 / 3, dtype=torch.float64))
    assert abs(float(share.mean()) - 1) < 0.04


def test_the_momentum_of_a_block_follows_its_own_steps() -> None:
    """Chambolle and Dossal: (k - 1)/(k + a) in step k of the block, which goes on counting from layer to layer."""
    written = """
    dims: {m: 5, n: 7}
    variables: {z: [n]}
    inputs: {x: [m]}
    parameters: {A: [m, n]}
    minimize: {fit: 1/2 * sumsq(x - A @ z), sparsity: 0.1 * norm1(z)}
    unroll: {layers: 2, blocks: [{block: code, algorithm: fista, steps: 3, step: 0.1, momentum: chambolle_dossal(3)}]}
    """
    a, x = drawn(5, 7), drawn(4, 5, seed=1)
    net = unroll.compile(written, parameters={"A": a}, dtype=torch.float64)
    y = z = torch.zeros(4, 7, dtype=torch.float64)
    for k in range(1, 7):
        fresh = torch.nn.functional.softshrink(y + 0.1 * (x - y @ a.mT) @ a, 0.01)
        y, z = fresh + (k - 1) / (k + 3) * (fresh - z), fresh
    assert torch.allclose(net(x), z, rtol=0, atol=EXACT)
