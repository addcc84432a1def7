"""What stands around the layers, against the same written by hand; and all that a module of torch must bear."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unroll
from unroll import api
from unroll.errors import SpecError, UnrollError
from unroll.pages import stages

Spec = dict[str, Any]
LAYERS: Spec = {
    "name": "toy",
    "dims": {"d": 8, "N": "dynamic"},
    "variables": {"Z": ["d", "N"]},
    "inputs": {"X": ["d", "N"]},
    "parameters": {"D": ["d", "d"]},
    "scalars": {"lam": 0.1, "eta": 0.1},
    "minimize": {"fit": "1/2*sumsq(X - D @ Z)", "sparsity": "lam*norm1(Z)"},
    "unroll": {
        "algorithm": "proximal_gradient",
        "layers": 2,
        "step": "eta",
        "start": {"Z": "X"},
        "learn": {"W": {"replaces": "step * D.T"}},
    },
}
IMAGE = [3, 8, 12]
VIT: Spec = {
    "embed": {"kind": "patches", "image": IMAGE, "patch": 4},
    "positions": {"kind": "learned", "std": 1.0},
    "class_token": {"std": 1.0},
    "head": {"kind": "class_token", "classes": 5},
}
TEXT: Spec = {
    "embed": {"kind": "tokens", "vocabulary": 11, "length": 7},
    "positions": {"kind": "learned"},
    "head": {"kind": "tied", "eps": 1e-6},
}
STEM: Spec = {
    "embed": {"kind": "stem", "image": IMAGE, "patch": 4},
    "positions": {"kind": "fourier", "waves": 4},
    "head": {"kind": "mean", "classes": 5},
}
MAE: Spec = {
    "embed": {"kind": "patches", "image": IMAGE, "patch": 4, "order": "channels_first", "norm": "none"},
    "positions": {"kind": "sinusoidal"},
    "class_token": {"std": 0.02},
    "mask": {"ratio": 0.75},
    "decoder": {"eps": 1e-6, "layers": {"constraints": ["Z >= 0"], "minimize": {"fit": "1/2*sumsq(X - D @ Z)"},
        "unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": "2*eta", "start": {"Z": "X"},
                   "learn": {"V": {"replaces": "step * D.T"}}},
        **{k: LAYERS[k] for k in ("dims", "variables", "inputs", "parameters", "scalars")}}},
    "init": "xavier",
}  # fmt: skip
TOST: Spec = {
    **STEM,
    "head": {"kind": "class_attention", "classes": 5, "heads": 2, "scale": 0.5},
}
ALL = {"class attention": TOST, "patches": VIT, "text": TEXT, "stem": STEM, "autoencoder": MAE}


def model(around: Spec, **options: Any) -> Any:
    return unroll.compile({**LAYERS, "model": around}, **{"seed": 3, "dtype": torch.float64, **options})


def changed(around: Spec, **parts: Any) -> Spec:
    """With other parts; None leaves one out."""
    return {k: v for k, v in {**around, **parts}.items() if v is not None}


def images(batch: int = 3, shape: list[int] = IMAGE, seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample(around: Spec, batch: int = 3) -> Tensor:
    if around["embed"]["kind"] == "tokens":
        return torch.randint(11, (batch, 6), generator=torch.Generator().manual_seed(0))
    return images(batch)


def answer(net: Any, x: Tensor) -> Tensor:
    """The logits, or the patches that were found."""
    torch.manual_seed(0)  # of the mask
    out = net(x)
    return out[0] if isinstance(out, tuple) else out


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-12)


def norm(x: Tensor, layer: nn.LayerNorm, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def cells(image: Tensor, p: int, order: str) -> Tensor:
    """Patches cut one by one."""
    rows, columns = image.shape[2] // p, image.shape[3] // p
    cut = [image[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p] for r in range(rows) for c in range(columns)]
    return torch.stack([(c.permute(0, 2, 3, 1) if order == "channels_last" else c).flatten(1) for c in cut], 1)


# --- to tokens --------------------------------------------------------------------------------------------------------


def test_patches_class_token_positions_and_head_by_hand() -> None:
    net, image = model(VIT), images()
    x = cells(image, 4, "channels_last")
    x = norm(norm(x, net.embed_norm) @ net.embed.weight.T + net.embed.bias, net.token_norm)
    x = torch.cat([net.class_token.expand(3, 1, 8), x], 1) + net.positions
    assert close(net.embedding(image), x)
    z = norm(net.body(x)[:, 0], net.head_norm) @ net.head.weight.T + net.head.bias
    assert close(net(image), z) and z.shape == (3, 5)


def test_a_patch_with_channels_first_is_what_a_convolution_takes() -> None:
    net = model(changed(VIT, embed={**VIT["embed"], "order": "channels_first", "norm": "none"}, class_token=None,
                        positions=None, head={"kind": "tokens"}))  # fmt: skip
    image = images()
    assert torch.equal(net.patches(image), F.unfold(image, 4, stride=4).mT)
    assert torch.equal(net.patches(image), cells(image, 4, "channels_first"))
    kernel = net.embed.weight.reshape(8, 3, 4, 4)
    want = F.conv2d(image, kernel, net.embed.bias, stride=4).flatten(2).mT
    assert close(net.embedding(image), want)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_one_norm_of_patches(kind: str) -> None:
    net, image = (
        model(changed(VIT, embed={**VIT["embed"], "norm": kind, "eps": 0.1}, class_token=None, head=None)),
        images(),
    )
    x = cells(image, 4, "channels_last")
    x = norm(x, net.embed_norm, 0.1) if kind == "before" else x
    x = x @ net.embed.weight.T + net.embed.bias
    x = norm(x, net.token_norm, 0.1) if kind == "after" else x
    assert close(net.embedding(image) - net.positions, x)


def test_a_stem_halves_the_image_until_each_token_is_a_patch() -> None:
    net, image = model(STEM).eval(), images()
    convolutions = [m for m in net.stem if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(3, 4), (4, 8)]
    x = F.gelu(F.conv2d(image, convolutions[0].weight, stride=2, padding=1) / math.sqrt(1 + 1e-5))
    x = F.conv2d(x, convolutions[1].weight, stride=2, padding=1) / math.sqrt(1 + 1e-5)
    want = x.flatten(2).mT + net.waves @ net.positions.weight.T + net.positions.bias
    assert close(net.embedding(image), want)
    trained = net.train().stem(image)
    assert close(trained.mean((0, 2, 3)), torch.zeros(8, dtype=torch.float64))  # batch norm


def test_text_with_a_tied_head_by_hand() -> None:
    net, text = model(TEXT), sample(TEXT)
    x = net.embed.weight[text] + net.positions[:6]
    logits = norm(net.body(x), net.head_norm, 1e-6) @ net.embed.weight.T
    assert close(net(text), logits) and logits.shape == (3, 6, 11)
    assert net(text[:, :2]).shape == (3, 2, 11)


def test_vectors_through_a_linear_map_or_as_they_are() -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    net = model({"embed": {"kind": "linear", "features": 6, "bias": False}})
    assert torch.equal(net(x), net.body(x @ net.embed.weight.T))
    bare = model({"embed": {"kind": "none"}, "head": {"kind": "mean"}})
    z = torch.randn(3, 4, 8, dtype=torch.float64)
    assert close(bare(z), norm(bare.body(z).mean(1), bare.head_norm))
    assert bare.inputs == ("X",)


def test_layers_of_single_vectors_have_any_number_of_batch_axes() -> None:
    around = {"embed": {"kind": "linear", "features": 5}, "head": {"kind": "tokens", "classes": 2, "norm": False}}
    net = unroll.compile({"use": "ista", "dims": {"m": 6, "n": 9}, "model": around}, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert isinstance(net, unroll.Model)
    assert torch.equal(net(x), net.head(net.body(net.embed(x)))) and net(x).shape == (2, 3, 2)
    assert net(x[0, 0]).shape == (2,)


@pytest.mark.parametrize(
    "kind, pool",
    [("class_token", lambda x: x[:, 0]), ("mean", lambda x: x[:, 1:].mean(1)), ("tokens", lambda x: x[:, 1:])],
)
def test_what_a_head_reads(kind: str, pool: Any) -> None:
    net, image = model(changed(VIT, head={"kind": kind, "classes": 5, "norm": False, "bias": False})), images()
    want = pool(net.body(net.embedding(image))) @ net.head.weight.T
    assert close(net(image), want)


def test_a_class_token_that_reads_after_the_layers() -> None:
    """ClassAttentionBlock with tokens_norm of the XCiT release: tokens are scaled by their norm on the way."""
    net, image = model(TOST).eval(), images()
    x = torch.cat([net.class_token.expand(3, 1, 8), net.body(net.embedding(image))], 1)
    for block in net.readers:
        y = norm(x, block.norm1, 1e-6)
        q, k, v = (y @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = (q[:, :1, h] @ k[..., h].mT / 4**0.5).softmax(-1)
            heads.append(scores @ v[..., h])
        read = torch.cat(heads, -1) @ block.out.weight.T + block.out.bias
        x = norm(x + 0.5 * torch.cat([read, y[:, 1:]], 1), block.norm2, 1e-6)
        hidden = F.gelu(x[:, :1] @ block.up.weight.T + block.up.bias)
        first = 0.5 * (hidden @ block.down.weight.T + block.down.bias)
        x = x + torch.cat([first, x[:, 1:]], 1)
    want = norm(x[:, 0], net.head_norm, 1e-6) @ net.head.weight.T + net.head.bias
    assert close(net(image), want) and len(net.readers) == 2


def test_without_a_head_tokens_come_out_as_they_leave_the_layers() -> None:
    net, image = model(changed(VIT, head=None)), images()
    assert torch.equal(net(image), net.body(net.embedding(image)))
    assert "(B, 6 + 1, 8)" in net.__doc__


def test_a_position_is_not_for_a_class_token_that_has_none() -> None:
    net = model(changed(VIT, positions={"kind": "learned", "class_token": False}))
    tokens = net.embedding(images())
    assert net.positions.shape == (6, 8)
    assert torch.equal(tokens[:, 0], net.class_token.expand(3, 8))


def test_dropout_is_of_tokens_while_training() -> None:
    net, image = model(changed(VIT, dropout=0.5)), images(20)
    dropped = net.embedding(image) == 0
    assert 0.4 < float(dropped.double().mean()) < 0.6
    assert not (net.eval().embedding(image) == 0).any()


def test_sines_of_column_then_row() -> None:
    """He et al. 2022, get_2d_sincos_pos_embed, entry by entry."""
    net = model(changed(VIT, positions={"kind": "sinusoidal", "base": 100.0}, class_token=None, head=None))
    for row in range(2):
        for column in range(3):
            rates = [100.0 ** (-2 * i / 4) for i in range(2)]
            want = [f(at * r) for at in (column, row) for f in (math.sin, math.cos) for r in rates]
            assert torch.allclose(net.positions[3 * row + column], torch.tensor(want, dtype=torch.float64), atol=1e-14)


def test_sines_of_the_place_in_a_text() -> None:
    """Vaswani et al. 2017, section 3.5, sines first."""
    net = model(changed(TEXT, positions={"kind": "sinusoidal"}))
    for place in range(7):
        angle = [place / 10_000 ** (2 * i / 8) for i in range(4)]
        want = [*map(math.sin, angle), *map(math.cos, angle)]
        assert torch.allclose(net.positions[place], torch.tensor(want, dtype=torch.float64), atol=1e-14)


def test_fourier_positions_of_row_and_column() -> None:
    """El-Nouby et al. 2021 (XCiT), PositionalEncodingFourier, entry by entry."""
    waves = model(STEM).waves
    for row in range(2):
        for column in range(3):
            want: list[float] = []
            for at, of in ((row, 2), (column, 3)):
                angle = [(at + 1) / (of + 1e-6) * 2 * math.pi / 10_000 ** (2 * (i // 2) / 4) for i in range(4)]
                want += [math.sin(angle[0]), math.cos(angle[1]), math.sin(angle[2]), math.cos(angle[3])]
            assert torch.allclose(waves[3 * row + column], torch.tensor(want, dtype=torch.float64), atol=1e-14)


# --- autoencoders -----------------------------------------------------------------------------------------------------


def test_a_masked_autoencoder_by_hand() -> None:
    """As the released one: shuffle, keep a part, add mask tokens, put back in order."""
    net, image = model(MAE), images()
    found, mask = net(image)
    assert found.shape == (3, 6, 48) and mask.dtype == torch.bool and mask.sum(1).tolist() == [5, 5, 5]
    x = cells(image, 4, "channels_first") @ net.embed.weight.T + net.embed.bias
    shuffled = mask.long().argsort(1)
    kept = torch.stack([row[ids[:1]] for row, ids in zip(x, shuffled, strict=True)])
    x = torch.cat([kept, net.mask_token.expand(3, 5, 8)], 1)
    x = torch.stack([row[ids] for row, ids in zip(x, shuffled.argsort(1), strict=True)])
    x = torch.cat([net.class_token.expand(3, 1, 8), x + net.positions], 1)
    x = net.decoder(norm(net.body(x), net.encoder_norm, 1e-6))
    want = (norm(x, net.decoder_norm, 1e-6) @ net.pixels.weight.T + net.pixels.bias)[:, 1:]
    again, same = net(image, mask)
    assert close(want, found) and torch.equal(again, found) and torch.equal(same, mask)
    assert torch.equal(net.patches(image), cells(image, 4, "channels_last"))


def test_each_image_has_a_mask_of_its_own() -> None:
    net = model(changed(MAE, mask={"ratio": 0.5}))
    torch.manual_seed(1)
    masks = net(images(200))[1]
    assert masks.sum(1).eq(3).all() and len({tuple(m.tolist()) for m in masks}) == math.comb(6, 3)


def test_a_decoder_may_take_the_objective_of_the_layers_or_another_width() -> None:
    inline = {"unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": "eta"}, "dims": {"d": 4}}
    with pytest.raises(UnrollError, match="the layers give tokens of 8, the decoder takes 4"):
        model(changed(MAE, decoder={"layers": inline}))
    net = model(changed(MAE, decoder={"layers": inline, "embed": True, "norm": False, "norm_before": False}))
    assert net.coder.layers == 1 and net.decoder_embed.weight.shape == (4, 8)
    assert net.coder.derivation.problem.terms.keys() == {"fit", "sparsity"}
    assert net.spec.decoder.title == "toy_decoder"
    x = net.decoder(net.decoder_embed(net.body(net.embedding(images(), net(images())[1]))))
    assert net.pixels(x[:, 1:]).shape == (3, 6, 48)


def test_the_values_of_a_decoder_are_named_with_it() -> None:
    d = torch.eye(8, dtype=torch.float64)
    net = model(MAE, parameters={"decoder.D": 2 * d, "D": d}, scalars={"decoder.eta": 0.5})
    assert torch.equal(net.decoder.given["D"], 2 * d) and torch.equal(net.body.given["D"], d)
    assert net.scalars == {"lam": 0.1, "eta": 0.1, "decoder.lam": 0.1, "decoder.eta": 0.5}
    assert net.sizes == {"d": 8, "decoder.d": 8}
    assert not torch.equal(model(MAE).body.given["D"], model(MAE).decoder.given["D"])


def test_a_decoder_from_a_file_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "inner.yaml").write_text(api.read({**LAYERS, "name": "inner"}).to_yaml(), encoding="utf-8")
    around = api.read({**LAYERS, "model": changed(MAE, decoder={"layers": {"use": "ista"}})}).to_yaml()
    text = around[: around.index("    layers:")] + "    layers: {use: inner.yaml, dims: {d: 8}}\n"
    (tmp_path / "outer.yaml").write_text(text, encoding="utf-8")
    whole = api.read(tmp_path / "outer.yaml")
    assert whole.decoder is not None and whole.decoder.title == "toy_decoder"
    assert api.read(whole.to_yaml()) == whole


def test_overrides_reach_the_model_and_the_layers_of_its_decoder(tmp_path: Path) -> None:
    spec = api.read({**LAYERS, "model": changed(MAE, decoder={"layers": {}})})
    assert spec.decoder is not None and spec.decoder.unroll == spec.unroll
    (tmp_path / "base.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    over = ["model.decoder.layers.unroll.layers=3", "model.mask.ratio=0.5", "model.decoder.layers.scalars.lam=0.3"]
    child = api.read({"use": str(tmp_path / "base.yaml"), "name": "child", "model": {"embed": {"patch": 2}}}, over)
    assert child.model is not None and child.model.mask is not None and child.decoder is not None
    assert (child.model.embed.patch, child.model.mask.ratio) == (2, 0.5)
    assert child.decoder.unroll.layers == 3 and child.unroll.layers == 2
    assert child.decoder.scalars["lam"].default == 0.3 and child.scalars["lam"].default == 0.1
    other = api.read({"use": str(tmp_path / "base.yaml"), "model": {"positions": {"kind": "none"}}})
    assert other.model is not None and other.model.positions.kind == "none"


# --- published sizes --------------------------------------------------------------------------------------------------

CRATE = {  # width, layers, parameters: MATH of the released code, layer by layer
    "tiny": (384, 12, 6_090_856),
    "small": (576, 12, 13_116_328),
    "base": (768, 12, 22_796_008),
    "large": (1024, 24, 77_641_192),
}


@pytest.mark.parametrize("size", CRATE)
def test_the_published_networks_have_as_many_parameters(size: str) -> None:
    """Yu et al. 2023, table 1: 6.09, 13.12, 22.80, 77.64 million."""
    d, layers, published = CRATE[size]
    around = changed(VIT, embed={"kind": "patches", "image": [3, 224, 224], "patch": 16},
                     head={"kind": "class_token", "classes": 1000})  # fmt: skip
    net = model(around, dims={"d": d}, overrides=["unroll.layers=1", "dims.d=wide"], dtype=torch.float32)
    held = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("body."))
    layer = d * d + (d * d + d) + d * d + 2 * 2 * d  # heads, output map with bias, dictionary, two norms
    assert held + layers * layer == published


TOST_SIZES = {"tiny": (192, 12, 4, 5_769_328), "small": (384, 12, 8, 22_589_944)}


@pytest.mark.parametrize("size", TOST_SIZES)
def test_a_stem_and_class_attention_have_as_many_parameters_as_published(size: str) -> None:
    """Wu et al. 2024 (ToST): 5.8, 22.6 million; a layer has two maps, a temperature per head, an MLP, norms, scales."""
    d, layers, heads, published = TOST_SIZES[size]
    around = {
        "embed": {"kind": "stem", "image": [3, 224, 224], "patch": 16},
        "positions": {"kind": "fourier"},
        "head": {"kind": "class_attention", "classes": 1000, "heads": heads},
    }
    net = model(around, dims={"d": d}, overrides=["unroll.layers=1", "dims.d=wide"], dtype=torch.float32)
    held = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("body."))
    layer = 2 * (d * d + d) + heads + (8 * d * d + 5 * d) + 4 * d + 2 * d
    assert held + layers * layer == published


# --- a module of torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_source_runs_alone_with_the_same_weights(name: str) -> None:
    net, x = model(ALL[name]), sample(ALL[name])
    assert "unroll" not in net.source.split('"""', 2)[2]
    space: dict[str, Any] = {}
    exec(net.source, space)
    alone = space[net.wrapped.class_name]().double()
    assert not [k for k in alone.state_dict() if k not in net.state_dict()]
    alone.load_state_dict(net.state_dict())
    assert torch.equal(answer(alone, x), answer(net, x))


def test_two_different_proximal_steps_keep_their_own_names() -> None:
    layers = {
        **MAE["decoder"]["layers"],
        "minimize": {"fit": "1/2*sumsq(X - D @ Z)", "log": "lam*sum(log(1 + abs(Z)))"},
    }
    net, x = model(changed(MAE, decoder={"layers": layers})), images()
    assert [net.source.count(f"{name}(") for name in ("class _prox", "def prox", "class _prox_decoder")] == [1, 1, 1]
    assert "def prox_decoder(" in net.source and "rule = _prox_decoder if " in net.source
    space: dict[str, Any] = {}
    exec(net.source, space)
    alone = space["ToyModel"]().double()
    alone.load_state_dict(net.state_dict())
    assert torch.equal(answer(alone, x), answer(net, x))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, within dynamo
def test_it_compiles_to_one_graph_and_a_gradient_reaches_every_parameter(name: str) -> None:
    net, x = model(ALL[name]), sample(ALL[name])
    args = (x, net(x)[1]) if name == "autoencoder" else (x,)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    out, want = compiled(*args), net(*args)
    out, want = (out[0], want[0]) if name == "autoencoder" else (out, want)
    assert close(out, want)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("name", ALL)
def test_it_exports_with_a_dynamic_batch(name: str) -> None:
    net, x = model(ALL[name]).eval(), sample(ALL[name], 4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    args, shapes = ((x, net(x)[1]), (batch, batch)) if name == "autoencoder" else ((x,), (batch,))
    exported = torch.export.export(net, args, dynamic_shapes=shapes)
    for count in (1, 9):
        x = sample(ALL[name], count)
        args = (x, net(x)[1]) if name == "autoencoder" else (x,)
        found, want = exported.module()(*args), net(*args)
        found, want = (found[0], want[0]) if name == "autoencoder" else (found, want)
        assert close(found, want)


def test_text_exports_with_a_dynamic_length() -> None:
    net, x = model(TEXT), sample(TEXT)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=7)}
    exported = torch.export.export(net, (x,), dynamic_shapes=(axes,))
    assert torch.allclose(exported.module()(x[:2, :3]), net(x[:2, :3]))


@pytest.mark.parametrize("name", ALL)
def test_copies_pickles_and_folders_are_the_same_model(name: str, tmp_path: Path) -> None:
    net, x = model(ALL[name], scalars={"lam": 0.2}), sample(ALL[name])
    with torch.no_grad():
        for p in net.parameters():
            p += 0.01 * torch.randn_like(p)
    net.eval()
    want = answer(net, x).detach()
    net.save(tmp_path / "out")
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), unroll.restore(tmp_path / "out").eval()
    for other in copies:
        assert torch.equal(answer(other, x), want)
        assert other.scalars == net.scalars and other.source == net.source and other.kinds == net.kinds
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert torch.equal(answer(net, x), want)
    assert (tmp_path / "out" / "network.py").read_text(encoding="utf-8") == net.source
    assert torch.equal(answer(unroll.Model.restore(tmp_path / "out").eval(), x), want)


def test_layers_alone_are_no_model(tmp_path: Path) -> None:
    net = model(VIT)
    net.body.save(tmp_path)
    assert isinstance(unroll.restore(tmp_path), unroll.Network)
    with pytest.raises(UnrollError, match="holds layers alone"):
        unroll.Model.restore(tmp_path)
    assert isinstance(pickle.loads(pickle.dumps(net.body)), unroll.Network)


@pytest.mark.parametrize("name", ALL)
def test_a_seed_says_every_parameter_and_nothing_else_does(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = model(ALL[name])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    two, other, single = model(ALL[name]), model(ALL[name], seed=4), model(ALL[name], dtype=torch.float32)
    for (key, p), q, r in zip(
        one.state_dict().items(), two.state_dict().values(), single.state_dict().values(), strict=True
    ):
        assert torch.equal(p, q), key
        assert torch.equal(p.to(r.dtype), r) or key.startswith(("body.", "decoder.")), key
    drawn = [k for k, p in one.named_parameters() if p.ndim > 1 and k != "reader_scales"]
    assert all(not torch.equal(one.get_parameter(k), other.get_parameter(k)) for k in drawn)


@pytest.mark.parametrize(
    "init, std, most",
    [
        ("torch", 1 / math.sqrt(3 * 4), 1 / math.sqrt(4)),  # uniform within 1/sqrt(inputs)
        ("xavier", math.sqrt(2 / 204), math.sqrt(6 / 204)),  # Glorot & Bengio 2010, eq. 16
        ("kaiming", math.sqrt(2 / 4), math.sqrt(6 / 4)),  # He et al. 2015, eq. 10
        ("normal", 0.02, 0.1),
    ],
)
def test_linear_maps_start_as_stated(init: str, std: float, most: float) -> None:
    around = {"embed": {"kind": "linear", "features": 4}, "head": {"kind": "tokens", "classes": 4}, "init": init}
    net = model(around, dims={"d": 200}, overrides=["dims.d=wide", "unroll.layers=1"])
    weight, bias = net.embed.weight.detach(), net.embed.bias.detach()
    assert abs(float(weight.std()) / std - 1) < 0.1 and float(weight.abs().max()) <= most
    assert bool(bias.any()) == (init == "torch")


def test_the_map_of_patches_may_start_in_another_way_than_the_rest() -> None:
    def drawn(**own: str) -> Any:
        embed = {"kind": "patches", "image": [1, 32, 32], "patch": 8, "norm": "none", **own}
        around = {"embed": embed, "head": {"kind": "mean", "classes": 9}, "init": "normal"}
        return model(around, dims={"d": 200}, overrides=["dims.d=wide", "unroll.layers=1"])

    net = drawn(init="kaiming")
    assert (
        abs(float(net.embed.weight.detach().std()) / math.sqrt(2 / 64) - 1) < 0.1 and not net.embed.bias.detach().any()
    )
    assert abs(float(net.head.weight.detach().std()) / 0.02 - 1) < 0.1
    assert abs(float(drawn().embed.weight.detach().std()) / 0.02 - 1) < 0.1


def test_drawn_tokens_have_the_stated_deviation() -> None:
    around = changed(
        TEXT, embed={"kind": "tokens", "vocabulary": 500, "length": 400, "std": 0.3}, class_token={"std": 2.0}
    )
    net = model(changed(around, positions={"kind": "learned", "std": 0.1}))
    assert abs(float(net.embed.weight.detach().std()) / 0.3 - 1) < 0.1
    assert abs(float(net.positions.detach().std()) / 0.1 - 1) < 0.1 and net.positions.shape == (401, 8)
    assert net(sample(TEXT)).shape == (3, 6, 500)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_kind_and_a_line_that_says_what_it_is(name: str) -> None:
    net = model(ALL[name])
    assert list(net.kinds) == [k for k, _ in net.named_parameters()]
    assert {k for k, v in net.kinds.items() if v == "table"} <= {
        "class_token",
        "mask_token",
        "positions",
        "embed.weight",
    }
    assert all(net.get_parameter(k).ndim >= 2 for k, v in net.kinds.items() if v == "matrix")
    assert all(v == "scalar" for k, v in net.kinds.items() if k.endswith("bias") or "norm" in k)
    lines = net.source.splitlines()
    for held in net.wrapped.held:
        (i,) = [
            i
            for i, line in enumerate(lines)
            if line.lstrip().startswith(f"self.{held.name} = ") or f'("{held.name}",' in line
        ]
        assert (held.about and held.about in lines[i] + lines[i - 1]) or held.name == "stem"


def test_what_a_model_tells_of_its_layers() -> None:
    net, image = model(VIT), images()
    trace = net.trace(image)
    assert net.layers == 2 and net.inputs == ("image",) and [p.name for p in net.learned] == ["W"]
    assert torch.equal(trace.iterates["Z"][0], net.embedding(image))
    assert torch.equal(net.read(trace.iterates["Z"][-1]), net(image))
    assert trace.terms["fit"].shape == (3, 3)
    assert net.graph is net.body.graph and net.derivation is net.body.derivation and net.given.keys() == {"D"}
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    mae = model(MAE)
    assert torch.equal(mae.trace(image, hidden).iterates["Z"][0], mae.embedding(image, hidden))
    assert mae.trace(image).iterates["Z"][-1].shape == (3, 7, 8) and len(mae.learned) == 2


def test_it_moves_to_a_device_and_a_type() -> None:
    net = model(STEM, dtype=torch.bfloat16, device="cpu")
    assert {t.dtype for t in net.state_dict().values()} == {torch.bfloat16, torch.int64}
    meta = model(VIT).to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around, call, message",
    [
        (VIT, lambda net: net(images(3, [3, 8, 8])), r"image has shape \(3, 3, 8, 8\), expected \(B, 3, 8, 12\)"),
        (VIT, lambda net: net(images(3)[0]), r"expected \(B, 3, 8, 12\)"),
        (VIT, lambda net: net(images(3), torch.ones(3, 6, dtype=torch.bool)), "this model has no mask"),
        (MAE, lambda net: net(images(3), torch.ones(3, 6)), r"mask is torch.float32 \(3, 6\)"),
        (MAE, lambda net: net.trace(images(3), torch.ones(3, 5, dtype=torch.bool)), r"expected torch.bool \(3, 6\)"),
        (TEXT, lambda net: net(torch.zeros(3, 8, dtype=torch.int64)), "8 tokens are more than the longest text has, 7"),
        (TEXT, lambda net: net(torch.zeros(3, 6)), "whole numbers below 11, not torch.float32"),
    ],
)
def test_wrong_arguments_are_named(around: Spec, call: Any, message: str) -> None:
    with pytest.raises(UnrollError, match=message) as caught:
        call(model(around))
    assert caught.value.code == "E404"


@pytest.mark.parametrize(
    "layers, around, message",
    [
        ({"dims": {"d": 8, "N": 5}}, VIT, "X has 5 columns, the model makes 7 tokens"),
        ({"dims": {"d": 6, "N": "dynamic"}}, changed(VIT, positions={"kind": "sinusoidal"}), "a multiple of 4"),
        ({"dims": {"d": 7, "N": "dynamic"}}, STEM, "tokens of 7 numbers: this model needs a multiple of 2"),
        (
            {"inputs": {"X": ["d", "N"], "Y": ["d", "N"]}, "minimize": "sumsq(X - Y + D @ Z)"},
            VIT,
            "take one input, these have X, Y",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers: Spec, around: Spec, message: str) -> None:
    plain = {"algorithm": "gradient_descent", "layers": 1, "step": "eta"}
    layers = {"minimize": "1/2*sumsq(X - D @ Z)", **layers}
    with pytest.raises(UnrollError, match=message) as caught:
        unroll.compile({**LAYERS, "unroll": plain, **layers, "model": around})
    assert caught.value.code == "E420"


def test_layers_without_a_fixed_width_are_refused() -> None:
    spec = {**LAYERS, "dims": {"d": "dynamic", "N": "dynamic"}, "parameters": {}, "minimize": "1/2*sumsq(Z - X)"}
    spec["unroll"] = {"algorithm": "gradient_descent", "layers": 1, "step": "eta"}
    with pytest.raises(UnrollError, match="X has no fixed width"):
        unroll.compile({**spec, "model": {"embed": {"kind": "none"}}})


def test_heads_divide_the_width() -> None:
    with pytest.raises(UnrollError, match="tokens of 8 numbers do not divide into 3 heads"):
        model(changed(TOST, head={"kind": "class_attention", "classes": 5, "heads": 3}))


def test_a_stem_may_stand_before_a_mask() -> None:
    net, image = model(changed(MAE, embed=STEM["embed"])), images()
    found, mask = net(image)
    hidden = torch.where(mask.unsqueeze(-1), net.mask_token, net.stem(image).flatten(2).mT)
    tokens = net.embedding(image, mask)[:, 1:]
    assert close(tokens, hidden + net.positions) and found.shape == net.patches(image).shape


def test_single_vectors_are_not_pooled() -> None:
    spec = {"use": "ista", "dims": {"m": 8, "n": 9}}
    with pytest.raises(UnrollError, match="x is one vector, not tokens"):
        unroll.compile({**spec, "model": VIT})
    with pytest.raises(UnrollError, match="x is one vector: there is nothing to pool"):
        unroll.compile({**spec, "model": {"embed": {"kind": "none"}, "head": {"kind": "mean"}}})


def test_a_spec_within_a_model_says_where_it_is_wrong() -> None:
    with pytest.raises(SpecError, match="unknown key 'algoritm'"):
        model(changed(MAE, decoder={"layers": {"unroll": {"algoritm": "gradient_descent", "layers": 1}}}))


# --- on the command line ----------------------------------------------------------------------------------------------


def test_show_says_what_stands_around_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unroll.cli import cli

    path = tmp_path / "mine.yaml"
    path.write_text(api.read({**LAYERS, "model": VIT}).to_yaml(), encoding="utf-8")
    cli.main(["show", str(path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "not exact         nothing" in shown
    for line in (
        "model             image 3 × 8 × 12 in 6 patches of 4 × 4 (row, column, channel): norm, linear, norm",
        "                  positions: learned, of the class token too, start with standard deviation 1",
        "                  2 layers, as above",
        "                  head: the class token, norm, linear to 5",
    ):
        assert line in shown.splitlines()
    cli.main(["compile", str(path), "-o", str(tmp_path / "out.py"), "model.head.classes=4"], standalone_mode=False)
    assert "self.head = nn.Linear(8, 4)" in (tmp_path / "out.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "around, lines",
    [
        (TEXT, ["text of 7 tokens at most: a table of 11 rows", "head: norm, products with the table of tokens, "
                "for each token"]),
        (STEM, ["image 3 × 8 × 12: 2 convolutions of stride 2, 6 tokens", "head: the mean of the tokens, norm, "
                "linear to 5"]),
        (
            changed(MAE, dropout=0.1),
            [
                "mask: a free token in the place of 75% of the patches, before the layers",
                "positions: sines and cosines, base 10000",
                "dropout 0.1", "decoder: 1 layer of toy_decoder", "norm, linear to the 48 numbers of each patch",
            ],
        ),
        (TOST, ["head: a class token reads the others, 2 blocks of 2 heads; norm, linear to 5"]),
        ({"embed": {"kind": "linear", "features": 4}},
         ["vectors of 4: linear", "no head: tokens as they leave the layers"]),
        ({"embed": {"kind": "none"}, "positions": {"kind": "none"}}, ["what the layers take comes in"]),
    ],
)  # fmt: skip
def test_every_part_is_described(around: Spec, lines: list[str]) -> None:
    shown = [line[18:] for line in stages.stage({**LAYERS, "model": around}, "derivation").splitlines()]
    assert [line for line in lines if line not in shown] == []
