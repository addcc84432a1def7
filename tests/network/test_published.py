"""The published networks: as many parameters as the papers say, and the outputs of modules written by hand for their weights."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released
import torch
from released_counts import PUBLISHED, Shapes, parameters
from torch import Tensor
from torch.nn import functional as F

import unroll

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _experts

EXACT = 1e-10
SMALL = ["model.embed.image=[3, 32, 32]", "model.head.classes=7", "unroll.layers=2"]
WHOLE = {
    "crate_tiny": "crate tiny", "crate_small": "crate small", "crate_base": "crate base", "crate_large": "crate large",
    "crate_alpha_base": "crate-alpha base/16", "tost_tiny": "tost tiny", "tost_small": "tost small", "tost_medium": "tost medium",
}  # fmt: skip
"""What a spec of ours is called in the list of what was published. Larger ones of the same make are left out: they take seconds each."""


def count(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())


def expert(**sizes: int) -> _experts.Crate:
    """A module written by hand, every weight of it drawn: norms and biases too."""
    made = _experts.Crate(side=32, classes=7, layers=2, **sizes).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype) + ("norm.weight" in name))
    return made


def pictures(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize(("ours", "theirs"), WHOLE.items())
def test_parameters_are_as_many_as_published(ours: str, theirs: str) -> None:
    shapes, exactly, millions = PUBLISHED[theirs]
    assert count(unroll.compile(ours)) == exactly == parameters(shapes)
    assert round(exactly / 1e6, 2) == millions


def without(shapes: Shapes, *names: str) -> int:
    """All parameters but those that the released file holds and the network does not use, or that we do not have."""
    assert all(any(word in name for name in shapes) for word in names)
    return parameters({k: v for k, v in shapes.items() if not any(word in k for word in names)})


def test_an_autoencoder_has_the_parameters_that_are_used() -> None:
    shapes, *_ = PUBLISHED["crate-mae small"]
    assert count(unroll.compile("crate_mae_small")) == without(shapes, "positions", "pretoken")


def test_token_statistics_for_language_has_the_parameters_of_the_released_one() -> None:
    shapes, exactly, _ = PUBLISHED["tost language base"]
    assert count(unroll.compile("tost_language")) == exactly + 1024 * 768  # positions are not counted there
    assert exactly == parameters(shapes)


@pytest.mark.parametrize(("size", "d", "K"), [("tiny", 384, 6), ("small", 576, 12)])
def test_released_weights_of_crate_give_the_released_answer(size: str, d: int, K: int) -> None:
    net, by_hand, x = (
        unroll.compile(f"crate_{size}", dtype=torch.float64, overrides=SMALL),
        expert(d=d, K=K),
        pictures(),
    )
    before = net(x)
    assert unroll.restore_weights(net, {"state_dict": {f"module.{k}": v for k, v in by_hand.state_dict().items()}}).ok
    assert (net(x) - by_hand(x)).abs().max() <= EXACT < (net(x) - before).abs().max()
    again = unroll.release_weights(net)
    assert again.keys() == by_hand.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in by_hand.state_dict().items())


def draws(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {k: 0.2 * torch.randn(s, generator=g, dtype=torch.float64) + ("norm.weight" in k) for k, s in shapes.items()}


def linear(name: str, ins: int, outs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outs, ins), f"{name}.bias": (outs,)}


def norm(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def test_released_weights_of_crate_alpha_give_the_released_answer() -> None:
    d, K, s, x = 24, 3, 96, pictures()
    norm = {"norm.weight": (d,), "norm.bias": (d,)}
    first = {**norm, "fn.qkv.weight": (d, d), "fn.to_out.0.weight": (d, d)}
    second = {**norm, "fn.D": (d, s), "fn.D1": (d, s)}
    around = {"cls_token": (1, 1, d), "pos_embedding": (1, 5, d), "conv1.weight": (d, 3, 16, 16), "conv1.bias": (d,)}
    ends = {"mlp_head.0.weight": (d,), "mlp_head.0.bias": (d,), "mlp_head.1.weight": (7, d), "mlp_head.1.bias": (7,)}
    blocks = {
        f"transformer.layers.{i}.{j}.{k}": v
        for i in range(2)
        for j, part in enumerate((first, second))
        for k, v in part.items()
    }
    w = draws({**around, **blocks, **ends})
    net = unroll.compile(
        "crate_alpha_base", dims={"d": d, "K": K, "p": 8, "s": s}, dtype=torch.float64, overrides=SMALL
    )
    assert unroll.restore_weights(net, w).ok
    z = F.conv2d(x, w["conv1.weight"], w["conv1.bias"], stride=16).flatten(2).mT
    z = torch.cat([w["cls_token"].expand(2, 1, d), z], 1) + w["pos_embedding"]
    for i in range(2):
        a, b = ({k: w[f"transformer.layers.{i}.{j}.{k}"] for k in part} for j, part in enumerate((first, second)))
        z = released.crate_alpha_block(
            z, a["norm.weight"], a["norm.bias"], released.bases(a["fn.qkv.weight"], K), a["fn.to_out.0.weight"],
            b["norm.weight"], b["norm.bias"], b["fn.D"], b["fn.D1"], 0.1, 0.1,
        )  # fmt: skip
    z = released.layer_norm(z[:, 0], w["mlp_head.0.weight"], w["mlp_head.0.bias"])
    assert (net(x) - (z @ w["mlp_head.1.weight"].mT + w["mlp_head.1.bias"])).abs().max() <= EXACT
    again = unroll.release_weights(net)
    assert again.keys() == w.keys() and all(torch.equal(again[k], v) for k, v in w.items())


def flax_arrays(d: int, K: int, s: int) -> dict[str, Any]:
    """Nested as the trained networks of CRATE-alpha are; head k of the maps is its own axis, images have channels last."""
    g, p = np.random.default_rng(6), d // K

    def draw(*shape: int) -> Any:
        return 0.2 * g.standard_normal(shape)

    def norm() -> dict[str, Any]:
        return {"scale": 1 + draw(d), "bias": draw(d)}

    block = "MultiHeadDotProductSubspaceAttention_0"
    layers = {
        f"encoderblock_{i}": {
            "LayerNorm_0": norm(), block: {"proj": {"kernel": draw(d, K, p)}, "out": {"kernel": draw(K, p, d)}},
            "LayerNorm_1": norm(), "OvercompleteISTABlock_0": {"D": draw(d, s), "D1": draw(d, s)},
        }
        for i in range(2)
    }  # fmt: skip
    return {
        "embedding": {"kernel": draw(16, 16, 3, d), "bias": draw(d)}, "cls": draw(1, 1, d), "pos_embedding": draw(1, 5, d),
        "Transformer": layers, "encoder_norm": norm(), "head": {"kernel": draw(d, 7), "bias": draw(7)},
    }  # fmt: skip


def flax_answer(w: dict[str, Any], images: Tensor) -> Tensor:
    """CRATE-alpha on pictures with channels last; all norms have eps 1e-6."""

    def t(a: Any) -> Tensor:
        return torch.as_tensor(a, dtype=torch.float64)

    x = images.movedim(1, -1)
    d = w["cls"].shape[-1]
    cells = x.reshape(2, 2, 16, 2, 16, 3)  # sample, row, y, column, x, channel
    z = torch.einsum("brycxh,yxhd->brcd", cells, t(w["embedding"]["kernel"])).flatten(1, 2) + t(w["embedding"]["bias"])
    z = torch.cat([t(w["cls"]).expand(2, 1, d), z], 1) + t(w["pos_embedding"])
    for block in w["Transformer"].values():
        maps, first, second = (
            block["MultiHeadDotProductSubspaceAttention_0"],
            block["LayerNorm_0"],
            block["LayerNorm_1"],
        )
        z = released.crate_alpha_block(
            z, t(first["scale"]), t(first["bias"]), t(maps["proj"]["kernel"]).movedim(1, 0), t(maps["out"]["kernel"]).flatten(0, 1).mT,
            t(second["scale"]), t(second["bias"]), t(block["OvercompleteISTABlock_0"]["D"]), t(block["OvercompleteISTABlock_0"]["D1"]),
        )  # fmt: skip
    z = released.layer_norm(z[:, 0], t(w["encoder_norm"]["scale"]), t(w["encoder_norm"]["bias"]), 1e-6)
    return z @ t(w["head"]["kernel"]) + t(w["head"]["bias"])


def flattened(w: dict[str, Any], before: str = "params/") -> dict[str, Any]:
    parts = [flattened(v, f"{before}{k}/") if isinstance(v, dict) else {f"{before}{k}": v} for k, v in w.items()]
    return {k: v for part in parts for k, v in part.items()}


@pytest.mark.parametrize("form", ["file", "nested", "bare"])
def test_arrays_of_crate_alpha_in_flax_give_its_answer(form: str, tmp_path: Path) -> None:
    dims = {"d": 24, "K": 3, "p": 8, "s": 96}
    net, x = unroll.compile("crate_alpha_flax", dims=dims, dtype=torch.float64, overrides=SMALL), pictures()
    w = flax_arrays(24, 3, 96)
    path, state = tmp_path / "checkpoint.npz", {"opt/0/mu": np.zeros(3), "chrono/steps": np.array(7)}
    np.savez(path, **flattened(w), **state)
    sources = {"file": path, "nested": {"params": w, "opt": {"count": 7}, "chrono": {}}, "bare": w}
    report = unroll.restore_weights(net, sources[form])
    ignored = {"file": set(state), "nested": {"opt/count"}, "bare": set[str]()}
    assert report.ok and set(report.ignored) == ignored[form]
    want = flax_answer(w, x)
    assert (net(x) - want).abs().max() <= EXACT
    again = unroll.release_weights(net)
    assert again.keys() == flattened(w, "").keys()
    assert all(np.array_equal(again[k], v) for k, v in flattened(w, "").items())


def test_weights_of_crate_gpt_give_its_answer() -> None:
    d, K, words = 12, 3, torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(8))
    block = {
        **norm("prenorm_1", d),
        "attn.c_attn.weight": (d, d),
        **linear("attn.c_proj", d, d),
        **norm("prenorm_2", d),
        "ista.weight": (d, d),
    }
    shapes = {f"transformer.h.{i}.{k}": v for i in range(2) for k, v in block.items()}
    w = draws({"transformer.wte.weight": (9, d), "transformer.wpe.weight": (6, d), **shapes})
    w |= {"lm_head.weight": w["transformer.wte.weight"], "transformer.h.0.attn.bias": torch.ones(1, 1, 6, 6).tril()}
    overrides = ["unroll.layers=2", "model.embed.vocabulary=9", "model.embed.length=6"]
    net = unroll.compile("crate_gpt", dims={"d": d, "K": K, "p": d // K}, overrides=overrides, dtype=torch.float64)
    assert unroll.restore_weights(net, {"model": w, "model_args": {}}).ignored == ("transformer.h.0.attn.bias",)
    z = w["transformer.wte.weight"][words] + w["transformer.wpe.weight"][:5]
    for i in range(2):
        b = released.part(w, f"transformer.h.{i}.")
        z = released.crate_causal_block(
            z, norm1_w=b["prenorm_1.weight"], norm1_b=b["prenorm_1.bias"], U=released.bases(b["attn.c_attn.weight"], K),
            W_out=b["attn.c_proj.weight"], b_out=b["attn.c_proj.bias"], norm2_w=b["prenorm_2.weight"], norm2_b=b["prenorm_2.bias"], D=b["ista.weight"],
        )  # fmt: skip
    assert (net(words) - z @ w["lm_head.weight"].mT).abs().max() <= EXACT


def test_released_weights_of_crate_mae_give_the_released_patches() -> None:
    d, K, x = 24, 3, pictures()
    norm = {"norm.weight": (d,), "norm.bias": (d,)}
    attention = {**norm, "fn.qkv.weight": (d, d), "fn.to_out.0.weight": (d, d), "fn.to_out.0.bias": (d,)}
    matrix = {**norm, "fn.weight": (d, d)}
    layers = {"blocks": (attention, matrix), "decoder_blocks": (matrix, attention)}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "mask_token": (1, 1, d), "pos_embed": (1, 5, d), "decoder_pos_embed": (1, 5, d),
        "patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,),
        "decoder_embed.weight": (d, d), "decoder_embed.bias": (d,), "decoder_pred.weight": (768, d), "decoder_pred.bias": (768,),
        **{f"{n}.{k}": (d,) for n in ("norm", "decoder_norm") for k in ("weight", "bias")},
        **{f"{n}.{i}.layers.0.{j}.{k}": v for n, parts in layers.items() for i in range(2) for j, p in enumerate(parts) for k, v in p.items()},
    }  # fmt: skip
    w = draws(shapes) | {"decoder_pos_embed": released.sines_of_places(2, d)}
    sizes = {"d": d, "K": K, "p": 8}
    small = [
        SMALL[0],
        SMALL[2],
        "model.decoder.layers.unroll.layers=2",
        *(f"model.decoder.layers.dims.{k}={v}" for k, v in sizes.items()),
    ]
    net = unroll.compile("crate_mae_small", dims=sizes, dtype=torch.float64, overrides=small)
    report = unroll.restore_weights(net, {"model": w})
    assert report.ok and set(report.ignored) == {
        "pos_embed",
        "decoder_embed.weight",
        "decoder_embed.bias",
    }
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])

    def part(name: str, i: int, j: int) -> dict[str, Tensor]:
        return {k: w[f"{name}.{i}.layers.0.{j}.{k}"] for k in layers[name][j]}

    z = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).mT
    z = torch.where(mask[..., None], w["mask_token"], z)
    z = torch.cat([w["cls_token"].expand(2, 1, d), z], 1) + w["decoder_pos_embed"]
    for i in range(2):
        a, b = part("blocks", i, 0), part("blocks", i, 1)
        z = released.crate_block(
            z, a["norm.weight"], a["norm.bias"], released.bases(a["fn.qkv.weight"], K), a["fn.to_out.0.weight"], a["fn.to_out.0.bias"],
            b["norm.weight"], b["norm.bias"], b["fn.weight"], 0.1, 0.5,
        )  # fmt: skip
    z = released.layer_norm(z, w["norm.weight"], w["norm.bias"], 1e-6)
    for i in range(2):
        a, b = part("decoder_blocks", i, 0), part("decoder_blocks", i, 1)
        z = released.mae_decoder_layer(
            z, a["norm.weight"], a["norm.bias"], a["fn.weight"],
            b["norm.weight"], b["norm.bias"], released.bases(b["fn.qkv.weight"], K), b["fn.to_out.0.weight"], b["fn.to_out.0.bias"],
        )  # fmt: skip
    z = released.layer_norm(z[:, 1:], w["decoder_norm.weight"], w["decoder_norm.bias"], 1e-6)
    found, hidden = net(x, mask)
    assert torch.equal(hidden, mask)
    assert (found - (z @ w["decoder_pred.weight"].mT + w["decoder_pred.bias"])).abs().max() <= EXACT
    again = unroll.release_weights(net)
    assert again.keys() == w.keys() - set(report.ignored)
    assert all(torch.allclose(v, w[k], rtol=0, atol=EXACT) for k, v in again.items())
    for row in (0, 3):  # the class token, a patch: the released network adds both
        moved = w["decoder_pos_embed"].clone()
        moved[0, row, 5] += 1e-3
        with pytest.raises(unroll.UnrollError, match=r"E421.*decoder_pos_embed"):
            unroll.restore_weights(net, {"model": {**w, "decoder_pos_embed": moved}})


def tost_shapes(d: int, K: int, classes: int = 7, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released `tost_vision` networks; running statistics are positive where they must be."""
    ends = {
        **norm("norm1", d),
        **norm("norm2", d),
        **linear("mlp.fc1", d, 4 * d),
        **linear("mlp.fc2", 4 * d, d),
        "gamma1": (d,),
        "gamma2": (d,),
    }
    block = {**ends, **linear("attn.qkv", d, d), "attn.temp": (K, 1), **linear("attn.to_out.0", d, d)}
    reader = {**ends, **linear("attn.qkv", d, 3 * d), **linear("attn.proj", d, d)}
    widths = (3, d // 8, d // 4, d // 2, d)
    stem: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(pairwise(widths)):
        stem[f"patch_embed.proj.{2 * i}.0.weight"] = (b, a, 3, 3)
        stem |= {f"patch_embed.proj.{2 * i}.1.{k}": (b,) for k in ("weight", "bias", "running_mean", "running_var")}
        stem[f"patch_embed.proj.{2 * i}.1.num_batches_tracked"] = ()
    return {
        "cls_token": (1, 1, d), **stem,
        **{f"blocks.{i}.{k}": v for i in range(layers) for k, v in block.items()},
        **{f"cls_attn_blocks.{i}.{k}": v for i in range(2) for k, v in reader.items()},
        **norm("norm", d), **linear("head", d, classes),
        "pos_embeder.token_projection.weight": (d, 64, 1, 1), "pos_embeder.token_projection.bias": (d,),
    }  # fmt: skip


def tost_weights(d: int, K: int) -> dict[str, Tensor]:
    w = draws(tost_shapes(d, K))
    w |= {k: v.abs() + 0.1 for k, v in w.items() if k.endswith("running_var")}
    return w | {k: torch.tensor(9) for k in w if k.endswith("num_batches_tracked")}


TOST = {"tost_tiny": (32, 4), "tost_small": (32, 8), "tost_medium": (32, 8), "tost_large": (32, 16)}
"""Small widths, with the heads of each network: the class token reads with as many."""


@pytest.mark.parametrize(("name", "d", "K"), [(k, *v) for k, v in TOST.items()])
def test_released_weights_of_token_statistics_give_the_released_answer(name: str, d: int, K: int) -> None:
    dims = {"d": d, "K": K, "p": d // K, "s": 4 * d}
    net, other = (
        unroll.compile(name, dims=dims, dtype=torch.float64, overrides=SMALL, seed=i).eval() for i in range(2)
    )
    w, x = tost_weights(d, K), pictures()
    before = net(x)
    for n, theirs in ((net, {"model": w}), (other, {f"module.{k}": v for k, v in w.items()})):
        report = unroll.restore_weights(n, theirs)
        assert report.ok and {k for k, _ in report.loaded} | set(report.ignored) == w.keys()
    want = released.tost_classifier(x, w, K)
    assert (net(x) - want).abs().max() <= EXACT < (want - before).abs().max()
    assert torch.equal(net(x), other(x))
    again = unroll.release_weights(net)
    assert again.keys() == w.keys() - set(report.ignored)
    assert all(torch.equal(again[k], w[k]) for k in again)


def writer_shapes(d: int, K: int, vocabulary: int, length: int, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released `tost_lang` networks."""
    block = {
        **norm("ln_1", d), **norm("ln_2", d), **linear("attn.c_attn", d, d), **linear("attn.c_proj", d, d), "attn.temp": (K, 1),
        "attn.denom_bias": (K, length, 1), **linear("mlp.c_fc", d, 4 * d), **linear("mlp.c_proj", 4 * d, d), "gamma1": (d,), "gamma2": (d,),
    }  # fmt: skip
    blocks = {f"transformer.h.{i}.{k}": v for i in range(layers) for k, v in block.items()}
    return {
        "transformer.wte.weight": (vocabulary, d),
        "transformer.wpe.weight": (length, d),
        **blocks,
        **norm("transformer.ln_f", d),
    }


def writer_weights(d: int, K: int) -> dict[str, Tensor]:
    w = draws(writer_shapes(d, K, 9, 6))
    return w | {"lm_head.weight": w["transformer.wte.weight"]}


def writer() -> Any:
    overrides = ["unroll.layers=2", "model.embed.vocabulary=9", "model.embed.length=6"]
    dims = {"d": 12, "K": 3, "p": 4, "s": 48, "T": 6}
    return unroll.compile("tost_language", dims=dims, overrides=overrides, dtype=torch.float64)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("length", [1, 4, 6])
def test_released_weights_of_token_statistics_for_language_give_the_released_answer(prefix: str, length: int) -> None:
    net, w = writer(), writer_weights(12, 3)
    words = torch.randint(9, (2, length), generator=torch.Generator().manual_seed(8))
    before = net(words)
    report = unroll.restore_weights(net, {"model": {f"{prefix}{k}": v for k, v in w.items()}, "iter_num": 7})
    assert report.ok and {k for k, _ in report.loaded} == w.keys()
    want = released.tost_writer(words, w, 3)
    assert (net(words) - want).abs().max() <= EXACT < (want - before).abs().max()
    again = unroll.release_weights(net)
    assert again.keys() == w.keys() and all(torch.equal(again[k], w[k]) for k in w)


def test_a_file_without_biases_leaves_those_at_zero_and_says_so() -> None:
    """The training script leaves biases out: ours start at 0, which is what they mean there."""
    net, w = writer(), writer_weights(12, 3)
    words = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(8))
    biases = {k for k in w if k.endswith(".bias")}
    with pytest.warns(UserWarning, match="7 missing, 0 not used") as caught:
        report = unroll.restore_weights(net, {k: v for k, v in w.items() if k not in biases}, strict=False)
    assert all("bias" in name or name == "body.offset" for name in report.missing) and "body.W_up_bias" in str(
        caught[0].message
    )
    want = released.tost_writer(words, w | {k: torch.zeros_like(w[k]) for k in biases}, 3)
    assert (net(words) - want).abs().max() <= EXACT


def test_a_layer_of_token_statistics_ends_in_a_perceptron() -> None:
    net: Any = unroll.compile(
        "tost_layers", dims={"d": 12, "K": 3, "p": 4, "s": 20}, dtype=torch.float64, overrides=["unroll.layers=2"]
    )
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    x = torch.randn(2, 5, 12, generator=g, dtype=torch.float64)
    want = x
    for i in range(2):
        y = F.layer_norm(want, (12,), net.compress_norm_weight[i], net.compress_norm_bias[i], 1e-6)
        out = net.W_out[i].movedim(0, 1).flatten(1)
        want = want + net.layer_scale[i] * released.tost_attention(
            y, net.W[i], net.offset[i], net.temperature[i], out, -net.W_out_bias[i]
        )
        y = F.layer_norm(want, (12,), net.perceptron_norm_weight[i], net.perceptron_norm_bias[i], 1e-6)
        y = F.gelu(F.linear(y, net.W_up[i], net.W_up_bias[i]))
        want = want + net.perceptron_scale[i] * F.linear(y, net.W_down[i], net.W_down_bias[i])
    assert (net(x) - want).abs().max() <= EXACT
    assert "not derived: as the spec says" in str(net.derivation)
    assert net.trace(x).labels == ((1, "compress"), (1, "perceptron"), (2, "compress"), (2, "perceptron"))


@pytest.mark.parametrize("name", ["crate_language", "crate_alpha_language", "tost_language"])
def test_a_later_word_changes_nothing_before_it(name: str) -> None:
    small = {"d": 12, "K": 3, "p": 4} | ({} if name == "crate_language" else {"s": 20})
    words = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(7))
    other = words.clone()
    other[:, 4] = (other[:, 4] + 1) % 9
    overrides = ["model.embed.vocabulary=9", "model.embed.length=6", "unroll.layers=2"]
    net = unroll.compile(name, dims=small, overrides=overrides, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(net(words)[:, :4], net(other)[:, :4])
        assert not torch.allclose(net(words)[:, 4:], net(other)[:, 4:])
