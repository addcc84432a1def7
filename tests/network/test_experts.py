"""The modules of the benchmarks against the hand-written references: a rival that computes something else is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import released as r
import released_counts as counts
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _experts as e
import _timing


def rough(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, every parameter random: norms and biases too."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in module.double().parameters():
            w.copy_(torch.randn(w.shape, generator=g, dtype=w.dtype) / max(w.shape[-1], 1) ** 0.5)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("attend", [e.explicit, e.fused])
@pytest.mark.parametrize(("d", "K", "layers"), [(6, 3, 2), (4, 1, 1)])
def test_the_network_by_hand_is_the_reference_block_by_block(attend, d, K, layers):
    net = rough(e.Crate(attend, d, layers, K, side=8, patch=4, classes=5))
    s, images = net.state_dict(), normal(2, 3, 8, 8)
    patches = torch.stack(
        [images[:, :, i : i + 4, j : j + 4].movedim(1, -1).flatten(1) for i in (0, 4) for j in (0, 4)], 1
    )
    at = "to_patch_embedding"
    x = r.layer_norm(patches, s[f"{at}.1.weight"], s[f"{at}.1.bias"])
    x = r.layer_norm(F.linear(x, s[f"{at}.2.weight"], s[f"{at}.2.bias"]), s[f"{at}.3.weight"], s[f"{at}.3.bias"])
    x = torch.cat([s["cls_token"].expand(2, 1, d), x], 1) + s["pos_embedding"]
    for i in range(layers):
        one, two = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        x = r.crate_block(
            x,
            s[f"{one}.norm.weight"],
            s[f"{one}.norm.bias"],
            r.bases(s[f"{one}.fn.qkv.weight"], K),
            s[f"{one}.fn.to_out.0.weight"],
            s[f"{one}.fn.to_out.0.bias"],
            s[f"{two}.norm.weight"],
            s[f"{two}.norm.bias"],
            s[f"{two}.fn.weight"],
        )
    y = r.layer_norm(x[:, 0], s["mlp_head.0.weight"], s["mlp_head.0.bias"])
    wanted = F.linear(y, s["mlp_head.1.weight"], s["mlp_head.1.bias"])
    assert torch.allclose(net(images), wanted, rtol=1e-12, atol=1e-13)
    assert sum(w.numel() for w in s.values()) == counts.parameters(counts.crate(d, layers, K, 4, 5, 8))


@pytest.mark.parametrize(("N", "d", "K", "p"), [(5, 8, 2, 4), (1, 6, 3, 2), (7, 4, 1, 4), (4, 5, 3, 1)])
def test_token_statistics_are_the_reference(N, d, K, p):
    net, x = rough(e.TokenStatistics(d, K, p)), normal(2, N, d)
    W, b = net.qkv.weight, net.qkv.bias.unflatten(0, (K, p))
    out = net.to_out[0]
    wanted = r.tost_attention(x, r.bases(W, K), b, net.temp[:, 0], out.weight, out.bias)
    assert torch.allclose(net(x), wanted, rtol=1e-12, atol=1e-13)


def test_the_loop_of_inverses_is_the_reference_as_released():
    z = F.normalize(normal(30, 6), dim=-1)
    labels = torch.arange(30) % 3
    operators, features = e.redunet_construct(z, labels, layers=3, sharpness=5.0)
    wanted, path = r.redunet_construct(z, F.one_hot(labels).double(), layers=3, sharpness=5.0, exact=False)
    assert torch.allclose(features, path[-1], rtol=1e-11)
    for (E, C), (E_wanted, C_wanted, _) in zip(operators, wanted, strict=True):
        assert torch.allclose(E, E_wanted, rtol=1e-9, atol=1e-12)
        assert torch.allclose(C, C_wanted, rtol=1e-9, atol=1e-12)


def flops(run: _timing.Run) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
def test_the_products_alone_are_those_that_the_network_computes(backward):
    net = e.Crate(e.explicit, d=6, layers=2, K=3, side=8, patch=4, classes=5)
    pairs = e.crate_products(2, 5, 6, 3, 2, 48, 5, backward, "cpu")

    def network() -> None:
        out = net(torch.zeros(2, 3, 8, 8))
        if backward:
            out.sum().backward()

    assert flops(network) == flops(lambda: [a @ b for a, b in pairs]) > 0


def test_runs_are_timed_in_turn_and_compared_in_pairs():
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = _timing.interleaved(runs, "cpu", rounds=4, least=0.0001)
    assert order[:2] == ["a", "b"] and {len(s) for s in seconds.values()} == {4}
    rows = _timing.against({"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 4.0]}, "b")
    assert rows[0] == {"module": "a", "ms": 4000.0, "ratio to b": 2.0} and rows[1]["ratio to b"] == 1.0


def test_peak_memory_sees_a_large_tensor():
    assert _timing.peak_mb(lambda: torch.ones(2**28).sum(), "cpu") > 200
