"""Transformers, declared, against those that torch has: the black boxes beside the networks of the library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unroll
from unroll.model.module import Model

D = torch.float64
SIZES = {"d": 12, "K": 3, "p": 4, "s": 20}
LAYERS = ["unroll.layers=2"]


def moved(net: nn.Module) -> nn.Module:
    """No parameter where it started, a bias at 0 or a norm at 1."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return net


def torch_layer(net: unroll.Network, k: int, eps: float) -> nn.TransformerEncoderLayer:
    """Layer k as torch has it, with our numbers."""
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, 0.0, "gelu", layer_norm_eps=eps, batch_first=True, norm_first=True, dtype=D
    )
    flat = lambda w: w[k].mT.flatten(0, 1)  # (K, d, p) -> (K p, d)
    attention = theirs.self_attn
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([flat(w) for w in (net.W_query, net.W_key, net.W_value)]))
        attention.in_proj_bias.copy_(
            torch.cat([b[k].flatten() for b in (net.query_bias, net.key_bias, net.value_bias)])
        )
        pairs = [
            (attention.out_proj.weight, net.W_out[k].movedim(0, 1).flatten(1)),
            (attention.out_proj.bias, net.out_bias[k]),
            (theirs.norm1.weight, net.attention_norm_weight[k]),
            (theirs.norm1.bias, net.attention_norm_bias[k]),
            (theirs.norm2.weight, net.perceptron_norm_weight[k]),
            (theirs.norm2.bias, net.perceptron_norm_bias[k]),
            (theirs.linear1.weight, net.W_up[k]),
            (theirs.linear1.bias, net.up_bias[k]),
            (theirs.linear2.weight, net.W_down[k]),
            (theirs.linear2.bias, net.down_bias[k]),
        ]
        for to, of in pairs:
            to.copy_(of)
    return theirs.train()  # its fast path is another program


@pytest.mark.parametrize(("spec", "eps", "causal"), [("transformer", 1e-6, False), ("transformer_causal", 1e-5, True)])
def test_layers_are_those_of_torch(spec: str, eps: float, causal: bool) -> None:
    net = moved(unroll.compile(spec, dims=SIZES, overrides=LAYERS, dtype=D))
    layers = [torch_layer(net, k, eps) for k in range(2)]
    x, answer = torch.randn(2, 2, 7, 12, generator=torch.Generator().manual_seed(0), dtype=D)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    want: Tensor = theirs
    for layer in layers:
        want = layer(want, src_mask=mask)
    found = net(ours)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    (found * answer).sum().backward()
    (want * answer).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    for k, layer in enumerate(layers):
        q, _, v = layer.self_attn.in_proj_weight.grad.unflatten(0, (3, 3, 4)).mT
        torch.testing.assert_close(net.W_query.grad[k], q, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(net.W_value.grad[k], v, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(net.W_down.grad[k], layer.linear2.weight.grad, rtol=1e-10, atol=1e-12)


def test_nothing_is_claimed_of_them_and_the_objective_measures_them() -> None:
    net = unroll.compile("transformer", dims=SIZES, overrides=LAYERS, seed=0)
    said = str(net.derivation)
    assert said.count("not derived: as the spec says") == 2 and "no block takes it" in said and "monotone" not in said
    table = unroll.white_box(net, [torch.randn(3, 7, 12)], parameters="layers")
    assert table.labels == ((1, "attention"), (1, "perceptron"), (2, "attention"), (2, "perceptron"))
    assert not any(r["claimed"] for r in table.records()) and table.own == {"U": "W_value"}


def test_the_objective_that_measures_them_is_of_their_values() -> None:
    net = moved(unroll.compile("transformer", dims=SIZES, overrides=LAYERS, seed=0, dtype=D))
    x = torch.randn(1, 7, 12, dtype=D)
    y = net.trace(x, parameters="layers").entering["compression"][:, 0]
    z = net.trace(x).steps["Z"]
    for k in range(4):
        inner = [z[k][0] @ net.W_value[k // 2, h] for h in range(3)]
        rates = [torch.logdet(torch.eye(4, dtype=D) + 4 / (7 * 0.25) * v.mT @ v) / 2 for v in inner]
        torch.testing.assert_close(y[k], -torch.stack(rates).sum().detach(), rtol=1e-10, atol=1e-10)


def timm_weights(net: Model, layers: int) -> dict[str, Tensor]:
    """Random weights under the names that timm has."""
    g, d = torch.Generator().manual_seed(2), 192
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=D) * 0.05
    found = {"cls_token": draw(1, 1, d), "pos_embed": draw(1, 197, d)}
    found |= {"patch_embed.proj.weight": draw(d, 3, 16, 16), "patch_embed.proj.bias": draw(d)}
    for k in range(layers):
        maps = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        found |= {f"blocks.{k}.{n}.weight": draw(*shape) for n, shape in maps.items()}
        found |= {f"blocks.{k}.{n}.bias": draw(shape[0]) for n, shape in maps.items()}
        found |= {f"blocks.{k}.norm{i}.{n}": draw(d) for i in (1, 2) for n in ("weight", "bias")}
    return found | {"norm.weight": draw(d), "norm.bias": draw(d), "head.weight": draw(1000, d), "head.bias": draw(1000)}


def test_a_released_vision_transformer_is_read_by_its_names() -> None:
    """Written out as timm has it: qkv in one map, heads in its rows, a convolution for the patches."""
    net = unroll.compile("vit_tiny", overrides=["unroll.layers=1"], dtype=D)
    w = timm_weights(net, 1)
    unroll.restore_weights(net, {"model": w})
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3), dtype=D)
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(2, -1, -1), x], 1) + w["pos_embed"]
    linear = lambda v, name: F.linear(v, w[f"{name}.weight"], w[f"{name}.bias"])
    norm = lambda v, name: F.layer_norm(v, (192,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").reshape(2, 197, 3, 3, 64).permute(2, 0, 3, 1, 4)
    read = (q @ k.mT / 8).softmax(-1) @ v
    x = x + linear(read.transpose(1, 2).flatten(2), "blocks.0.attn.proj")
    x = x + linear(F.gelu(linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")), "blocks.0.mlp.fc2")
    torch.testing.assert_close(net(image), linear(norm(x, "norm")[:, 0], "head"), rtol=1e-10, atol=1e-11)
    again = unroll.release_weights(net)
    assert again.keys() == w.keys() and all(torch.equal(again[n], w[n]) for n in w)


def test_black_and_white_are_of_one_size() -> None:
    """Layers, heads and, to a few hundredths, numbers in the layers."""
    for black, white in (("vit_digits", "crate_digits"), ("gpt_text", "crate_text")):
        a, b = unroll.compile(black), unroll.compile(white)
        count = [sum(p.numel() for p in n.body.parameters()) for n in (a, b)]
        assert abs(count[0] / count[1] - 1) < 0.02 and a.layers == b.layers
        assert a.sizes["K"] == b.sizes["K"] and a.spec.to_dict()["train"] == b.spec.to_dict()["train"]


def test_a_black_box_writes_from_what_it_keeps() -> None:
    net = moved(unroll.compile("gpt_text", overrides=["unroll.layers=2"]))
    begun = torch.tensor([[84, 104, 101]])
    assert torch.equal(net.generate(begun, 8, kept=True), net.generate(begun, 8, kept=False))
