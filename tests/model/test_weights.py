"""Released weights under other names: every entry lands where it belongs, or the message says which does not."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released as theirs
import torch
from safetensors.torch import save_file
from test_model import LAYERS, VIT, close, images
from torch import Tensor

import unroll
from unroll import release_weights, restore_weights
from unroll.errors import SpecError, UnrollError
from unroll.model.weights import rearrange, slices
from unroll.spec import load

Spec = dict[str, Any]
NAMES: Spec = {
    "pos_embedding": {"to": "positions", "axes": "1 n d -> n d"},
    "cls_token": {"to": "class_token", "axes": "1 1 d -> d"},
    "to_patch.1.weight": "embed_norm.weight",
    "to_patch.1.bias": "embed_norm.bias",
    "to_patch.2.weight": {"to": "embed.weight", "axes": "d c p q -> d (p q c)"},
    "to_patch.2.bias": "embed.bias",
    "to_patch.3.weight": "token_norm.weight",
    "to_patch.3.bias": "token_norm.bias",
    "layers.{layer}.fn.weight": {"to": "body.W", "axes": "j i -> i j"},
    "layers.{layer}.step": "body.theta",
    "mlp_head.0.all": [
        {"to": "head_norm.weight", "part": "0:8"},
        {"to": "head_norm.bias", "part": "8:16"},
    ],
    "mlp_head.1.first": {"to": "head.weight", "into": "0:2"},
    "mlp_head.1.rest": {"to": "head.weight", "into": "2:5"},
    "mlp_head.1.bias": "head.bias",
}
WEIGHTS: Spec = {
    "key": "state_dict",
    "strip": ["module."],
    "ignore": ["*.num_batches_tracked"],
    "sizes": {"p": 4, "q": 4},
}
GIVEN = torch.eye(8, dtype=torch.float64) + 0.1
LEARN = {"W": {"replaces": "step * D.T"}, "theta": {"replaces": "step * lam", "positive": True}}


def model(names: Spec | None = None, **options: Any) -> Any:
    spec = {**LAYERS, "unroll": {**LAYERS["unroll"], "learn": LEARN}, "model": VIT}
    spec["weights"] = {**WEIGHTS, "names": names if names is not None else NAMES}
    return unroll.compile(spec, **{"seed": 1, "dtype": torch.float64, "parameters": {"D": GIVEN}, **options})


def released(seed: int = 0) -> dict[str, Tensor]:
    """A file as somebody else might have written it."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "pos_embedding": (1, 7, 8), "cls_token": (1, 1, 8), "to_patch.1.weight": (48,), "to_patch.1.bias": (48,),
        "to_patch.2.weight": (8, 3, 4, 4), "to_patch.2.bias": (8,), "to_patch.3.weight": (8,), "to_patch.3.bias": (8,),
        "layers.0.fn.weight": (8, 8), "layers.1.fn.weight": (8, 8), "layers.0.step": (), "layers.1.step": (),
        "mlp_head.0.all": (16,), "mlp_head.1.first": (2, 8), "mlp_head.1.rest": (3, 8), "mlp_head.1.bias": (5,),
    }  # fmt: skip
    return {name: torch.rand(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def test_every_number_lands_where_it_belongs() -> None:
    net, theirs = model(), released()
    report = restore_weights(net, theirs)
    assert report.ok and len(report.loaded) == len(theirs) + 1
    assert torch.equal(net.positions, theirs["pos_embedding"][0])
    assert torch.equal(net.class_token, theirs["cls_token"][0, 0])
    for k in range(2):
        assert torch.equal(net.body.W[k], theirs[f"layers.{k}.fn.weight"].T)
        assert close(torch.nn.functional.softplus(net.body.theta[k]), theirs[f"layers.{k}.step"])
    assert torch.equal(net.head_norm.bias, theirs["mlp_head.0.all"][8:])
    assert torch.equal(net.head.weight, torch.cat([theirs["mlp_head.1.first"], theirs["mlp_head.1.rest"]]))
    image = images()  # their patches are convolutions
    convolved = torch.nn.functional.conv2d(image, theirs["to_patch.2.weight"], theirs["to_patch.2.bias"], stride=4)
    assert close(net.embed(net.patches(image)), convolved.flatten(2).mT)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_with_keys_and_prefixes(name: str, tmp_path: Path) -> None:
    theirs = {f"module.{k}": v for k, v in released().items()} | {"module.bn.num_batches_tracked": torch.tensor(3)}
    if name.endswith(".pth"):
        torch.save({"epoch": 7, "state_dict": theirs}, tmp_path / name)
    else:
        save_file(theirs, tmp_path / name)
    net, other = model(), model()
    report = restore_weights(net, tmp_path / name)
    restore_weights(other, released())
    assert report.ignored == ("bn.num_batches_tracked",) and report.kept == ("body.D",)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert "ignored, as the spec says: 1" in str(report) and "layers.1.step -> body.theta" in str(report)


def test_what_is_released_is_what_was_restored() -> None:
    theirs = released()
    net, again = model(), model(seed=9)
    restore_weights(net, theirs)
    out = release_weights(net)
    assert out.keys() == theirs.keys()
    for name, value in theirs.items():
        assert close(out[name], value), name
    restore_weights(again, out)
    assert close(net(images()), again(images()))


def test_layers_alone_have_weights_too_and_numbers_may_stand_in_the_name_of_ours() -> None:
    spec = {**LAYERS, "weights": {"names": {"a.{layer}": "W"}}}
    net = unroll.compile(spec, seed=1, parameters={"D": GIVEN})
    assert isinstance(net, unroll.Network)
    theirs = {f"a.{k}": torch.randn(8, 8) for k in range(2)}
    restore_weights(net, theirs)
    assert all(torch.equal(net.get_parameter("W")[k], theirs[f"a.{k}"]) for k in range(2))
    assert all(torch.equal(v, theirs[k]) for k, v in release_weights(net).items())
    stem = {"embed": {"kind": "stem", "image": [3, 8, 8], "patch": 4}}
    names = {f"patch.{{layer}}.{k}": f"stem.{{layer}}.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
    whole = {**LAYERS, "model": stem, "weights": {"names": {**names, "w": {"to": "body.W"}}}}
    net = unroll.compile(whole, seed=1, parameters={"D": GIVEN})
    theirs = {k.replace("stem", "patch").replace("body.W", "w"): v for k, v in net.state_dict().items()}
    theirs = {k: v + 1 for k, v in theirs.items() if k == "w" or (k.startswith("patch.") and "num" not in k)}
    assert restore_weights(net, theirs).ok
    assert all(torch.equal(v, theirs[k]) for k, v in release_weights(net).items())


def test_leftovers_on_both_sides_are_told_and_nothing_is_loaded() -> None:
    net, theirs = model(), released()
    theirs["extra.weight"] = theirs.pop("mlp_head.1.bias")
    del theirs["layers.1.fn.weight"]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UnrollError, match="the weights do not match toy: 2 missing, 1 not used") as caught:
        restore_weights(net, theirs)
    assert caught.value.code == "E421"
    assert caught.value.notes[:5] == (
        "not in the file: 2",
        "  body.W (1 of its first axis)",
        "  head.bias",
        "in the file, not used: 1",
        "  extra.weight",
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.warns(UserWarning, match="2 missing, 1 not used"):
        report = restore_weights(net, theirs, strict=False)
    assert not report.ok and report.unused == ("extra.weight",)
    assert torch.equal(net.positions, theirs["pos_embedding"][0])
    assert torch.equal(net.head.bias, before["head.bias"]) and torch.equal(net.body.W[1], before["body.W"][1])


def test_a_long_report_is_cut() -> None:
    theirs = released() | {f"extra.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(UnrollError, match="0 missing, 50 not used") as caught:
        restore_weights(model(), theirs)
    assert caught.value.notes[0] == "in the file, not used: 50" and caught.value.notes[41] == "  and 10 more"


def test_a_constant_that_was_drawn_is_missing() -> None:
    with pytest.raises(UnrollError, match="1 missing, 0 not used") as caught:
        restore_weights(model(parameters={}), released())
    assert caught.value.notes[1] == "  body.D (drawn from the seed: give it to compile)"


def test_a_tensor_of_which_a_part_is_used_is_told() -> None:
    net = model({**NAMES, "mlp_head.0.all": [{"to": "head_norm.weight", "part": "0:8"}]})
    with pytest.raises(UnrollError, match="1 missing, 1 not used") as caught:
        restore_weights(net, released())
    assert "  mlp_head.0.all (8 of 16 numbers)" in caught.value.notes


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"pos_embedding": torch.zeros(1, 8, 8)},
            r"pos_embedding -> positions: '1 n d -> n d' does not fit: n is 7, not 8",
        ),
        ({"pos_embedding": torch.zeros(7, 8)}, r"'1 n d -> n d' does not fit \(7, 8\)"),
        ({"to_patch.2.bias": torch.zeros(9)}, r"to_patch.2.bias is \(9,\), but embed.bias is \(8,\)"),
        ({"to_patch.2.bias": torch.zeros(8, dtype=torch.complex64)}, r"to_patch.2.bias is complex \(8,\)"),
        ({"mlp_head.0.all": torch.tensor(1.0)}, r"mlp_head.0.all is \(\)"),
        (
            {"layers.2.fn.weight": torch.zeros(8, 8)},
            r"layer 2 \(from 0\), but body.W has 2 layers",
        ),
        ({"to_patch.2.bias": torch.zeros(8).to_sparse()}, "to_patch.2.bias is a sparse tensor"),
        ({"epoch": 7}, "'epoch' is not a tensor"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    """All or nothing; if not strict, all that fits, and the rest by name with its reason."""
    net, theirs = model(), {"state_dict": released() | change}
    before, (name,) = {k: v.clone() for k, v in net.state_dict().items()}, change
    with pytest.raises(UnrollError, match=message):
        restore_weights(net, theirs)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.warns(UserWarning, match=re.escape(name)):
        report = restore_weights(net, theirs, strict=False)
    assert not report.ok and (name == "epoch" or re.search(message, "\n".join(report.refused)))
    assert report.unused == (("epoch",) if name == "epoch" else ())
    full = model()
    assert restore_weights(full, released()).ok
    unfilled = {line.split(" ")[0] for line in report.missing}
    odd = {k for k, v in net.state_dict().items() if not torch.equal(v, full.state_dict()[k])}
    assert odd <= unfilled and (name in ("epoch", "layers.2.fn.weight") or odd)


def lista(theta: Any) -> Any:
    spec = {
        "name": "toy",
        "dims": {"m": 4, "n": 6},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["m"]},
        "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": 0.1},
        "minimize": {"f": "1/2 * sumsq(x - A @ z)", "s": "lam * norm1(z)"},
        "unroll": {
            "algorithm": "proximal_gradient",
            "layers": 3,
            "learn": {"th": {"replaces": "step * lam", "positive": True}},
        },
        "weights": {"names": {"theta": theta}},
    }
    return unroll.compile(spec)


@pytest.mark.parametrize("value", [-0.1, 0.0])
def test_a_number_that_the_spec_keeps_positive_is_positive(value: float) -> None:
    net = lista("th")
    before = net.th.detach().clone()
    with pytest.raises(UnrollError, match="numbers that the spec keeps positive are not"):
        restore_weights(net, release_weights(net) | {"theta": torch.tensor([0.1, value, 0.2])})
    assert torch.equal(net.th, before)


def test_a_part_of_more_axes_than_there_are_is_refused() -> None:
    net = lista({"to": "th", "into": "0:3, :"})
    for attempt in (lambda: restore_weights(net, {"theta": torch.ones(3)}), lambda: release_weights(net)):
        with pytest.raises(UnrollError, match="is of 2 axes, th has 1"):
            attempt()


@pytest.mark.parametrize(
    "names, code, message",
    [
        ({"a": "possitions"}, "E421", "'possitions' is not a parameter of toy"),
        ({"a": [{"to": "head.{layer}"}]}, "E421", "'head.{layer}' is not a parameter of toy"),
    ],
)
def test_names_of_ours_that_are_wrong_are_shown_in_the_spec(names: Spec, code: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        restore_weights(model(names), {"a": torch.zeros(8)})
    assert caught.value.code == code and caught.value.where is not None
    word = (
        names["a"]
        if isinstance(names["a"], str)
        else (names["a"][0] if isinstance(names["a"], list) else names["a"])["to"]
    )
    assert word in caught.value.where.excerpt
    with pytest.raises(UnrollError):
        release_weights(model({"a": "nothing"}))


def test_a_spec_without_a_map_and_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UnrollError, match="says nothing about weights"):
        restore_weights(unroll.compile(LAYERS), {})
    net = model()
    with pytest.raises(UnrollError, match=r"cannot read .*No such file"):
        restore_weights(net, tmp_path / "none.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UnrollError, match="holds a Tensor, not weights by name"):
        restore_weights(net, tmp_path / "tensor.pth")
    torch.save({"model": released(), "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UnrollError, match="there is no 'state_dict' in the file") as caught:
        restore_weights(net, tmp_path / "other.pth")
    assert caught.value.notes == ("the file holds: model, epoch",)
    keyless = unroll.compile({**LAYERS, "weights": {"names": {"a": "W"}}})
    with pytest.raises(UnrollError, match="'model' is not a tensor") as caught:
        restore_weights(keyless, tmp_path / "other.pth")
    assert caught.value.hint == "weights: {key: model}"


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    torch.save({"state_dict": Path}, tmp_path / "code.pth")
    with pytest.raises(UnrollError, match="holds no plain weights") as caught:
        restore_weights(model(), tmp_path / "code.pth")
    assert "needs to run code" in caught.value.hint


# --- what files may hold ----------------------------------------------------------------------------------------------


def test_a_factor_is_undone_when_weights_are_released() -> None:
    net, theirs = model({**NAMES, "mlp_head.1.bias": {"to": "head.bias", "factor": -4}}), released()
    restore_weights(net, theirs)
    assert torch.equal(net.head.bias, -4 * theirs["mlp_head.1.bias"])
    assert torch.equal(release_weights(net)["mlp_head.1.bias"], theirs["mlp_head.1.bias"])
    with pytest.raises(SpecError, match="a factor is a number, and not 0"):
        model({"a": {"to": "head.bias", "factor": 0}})


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_numbers_of_low_precision_are_read_as_they_are(low: torch.dtype) -> None:
    net, theirs = model(), {k: v.to(low) for k, v in released().items()}
    assert restore_weights(net, theirs).ok and net.head.bias.dtype == torch.float64
    assert torch.equal(net.head.bias, theirs["mlp_head.1.bias"].double())


def test_arrays_are_read_from_dicts_and_files(tmp_path: Path) -> None:
    theirs = {k: v.numpy() for k, v in released().items()}
    np.savez(tmp_path / "weights.npz", **theirs)
    for source in (theirs, tmp_path / "weights.npz"):
        net = model()
        assert restore_weights(net, source).ok and np.array_equal(net.head.bias.detach(), theirs["mlp_head.1.bias"])
    short = torch.tensor([0.5, -2.0, 3.0, 0.25, 8.0], dtype=torch.bfloat16)  # numpy keeps its bits, not its type
    net = model()
    restore_weights(net, theirs | {"mlp_head.1.bias": short.view(torch.int16).numpy().view("V2")})
    assert torch.equal(net.head.bias, short.double())
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UnrollError, match="holds no plain weights: Object arrays cannot be loaded"):
        restore_weights(net, tmp_path / "objects.npz")


def test_a_slash_in_a_name_goes_into_nested_dicts() -> None:
    names = {"net/first/{layer}/map": "body.W", **{k: v for k, v in NAMES.items() if k != "layers.{layer}.fn.weight"}}
    net, theirs = model(names), released()
    maps = {str(i): {"map": theirs.pop(f"layers.{i}.fn.weight").T.clone()} for i in range(2)}
    assert restore_weights(net, {"state_dict": {**theirs, "net": {"first": maps}}}).ok
    assert torch.equal(net.body.W[1], maps["1"]["map"])


def test_the_first_key_that_is_there_and_prefixes_in_any_order() -> None:
    spec = {**LAYERS, "weights": {"key": ["ema.net", "model"], "strip": ["a.", "b."], "names": {"w": "W"}}}
    W = torch.randn(2, 8, 8)
    for source in ({"model": {"a.b.a.w": W}}, {"ema": {"net": {"b.a.w": W}}, "model": {}}, {"w": W}):
        net: Any = unroll.compile(spec, seed=1, parameters={"D": GIVEN})
        assert restore_weights(net, source).ok and torch.equal(net.W, W)
    with pytest.raises(UnrollError, match="there is no 'ema.net' or 'model' in the file") as caught:
        restore_weights(net, {"net": {"w": W}, "epoch": 3})
    assert caught.value.hint == "weights: {key: net}"


def test_settings_of_a_script_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    torch.save({"state_dict": released(), "args": Namespace(lr=0.1)}, tmp_path / "run.pth")
    assert restore_weights(model(), tmp_path / "run.pth").ok


def test_a_prefix_that_the_map_does_not_know_is_named() -> None:
    with pytest.raises(UnrollError, match="16 not used") as caught:
        restore_weights(model(), {f"net.back.{k}": v for k, v in released().items()})
    assert caught.value.hint == "their names begin with 'net.back.': weights: {strip: [net.back.]}"
    assert not any("loaded" in note for note in caught.value.notes)


def test_two_of_theirs_in_one_place_must_agree() -> None:
    names, theirs = {**NAMES, "tied": "head.bias"}, released()
    net = model(names)
    assert restore_weights(net, theirs | {"tied": theirs["mlp_head.1.bias"]}).ok
    before = net.head.bias.detach().clone()
    with pytest.raises(UnrollError, match="mlp_head.1.bias and tied go to the same place of head.bias, and differ"):
        restore_weights(net, theirs | {"tied": before + 1}, strict=False)
    with pytest.raises(UnrollError, match="two that are named cls_token, but for a prefix, go to the same place"):
        restore_weights(net, theirs | {"module.cls_token": theirs["cls_token"] + 1})
    assert torch.equal(net.head.bias, before)


@pytest.mark.parametrize(
    "bias, message",
    [
        (torch.zeros(5, dtype=torch.int8), r"mlp_head.1.bias holds torch.int8, head.bias torch.float64"),
        (torch.tensor([1.0, 2.0, float("nan"), 4.0, float("inf")]), "2 of 5 numbers are not finite"),
        (np.array(["a"] * 5), "is an array of <U1, which torch does not know"),
    ],
)
def test_numbers_that_are_none_are_refused(bias: Any, message: str) -> None:
    net = model()
    before = net.positions.detach().clone()
    with pytest.raises(UnrollError, match=message):
        restore_weights(net, released() | {"mlp_head.1.bias": bias})
    assert torch.equal(net.positions, before)


def test_a_network_is_no_dict_of_weights() -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(unroll.UnrollError, match=r"E421.*Linear[\s\S]*state_dict\(\)"):
        unroll.restore_weights(unroll.compile("crate_tiny", overrides=["unroll.layers=1"]), net)


def test_numbers_that_a_narrow_type_cannot_hold_are_refused() -> None:
    net = model(dtype=torch.float16)
    with pytest.raises(UnrollError, match="5 of 5 numbers are not finite in torch.float16"):
        restore_weights(net, released() | {"mlp_head.1.bias": torch.full((5,), 1e6)})


def test_a_map_replaces_the_one_that_it_builds_on() -> None:
    flax = load("crate_alpha_flax").weights
    assert flax is not None and not any("transformer.layers" in n for n in flax.names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_is_compared_with_theirs_as_far_as_their_type_goes(dtype: torch.dtype) -> None:
    """What a file holds and the spec says too: equal, or refused."""
    names = {**NAMES, "fixed": [{"to": "body.D", "part": "0:8"}, {"to": 3, "part": "8:10"}]}
    net, theirs = model(names), released()
    fixed = torch.cat([GIVEN, torch.full((2, 8), 3.0)]).to(dtype)
    report = restore_weights(net, theirs | {"fixed": fixed})
    assert report.ok and report.compared == (("fixed", "body.D"), ("fixed", "3")) and not report.kept
    assert "the same in both: 2" in str(report)
    assert torch.equal(release_weights(net)["fixed"], torch.cat([GIVEN, torch.full((2, 8), 3.0)]))
    with pytest.raises(UnrollError, match="does not say where it ends"):
        release_weights(model({**names, "fixed": [names["fixed"][0], {"to": 3, "part": "8:"}]}))
    for row, words in (
        (5, "fixed is not the constant body.D of the spec: off by"),
        (9, "fixed has 1 numbers that are not 3"),
    ):
        other = fixed.clone()
        other[row, 2] += 0.5
        with pytest.raises(UnrollError, match=words):
            restore_weights(net, theirs | {"fixed": other})
        with pytest.warns(UserWarning, match=words):
            assert len(restore_weights(net, theirs | {"fixed": other}, strict=False).refused) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_sizes_of_axes_may_lie_elsewhere_in_the_spec(size: int) -> None:
    """The kernel of a convolution has the side of a patch, whatever it is: released, read back, and by hand."""
    spec = {
        **LAYERS,
        "unroll": {**LAYERS["unroll"], "learn": LEARN},
        "model": {**VIT, "embed": {**VIT["embed"], "patch": size}},
    }
    weights = {
        "sizes": {"p": "model.embed.patch", "q": "model.embed.patch"},
        "names": {"conv": NAMES["to_patch.2.weight"]},
    }
    net: Any = unroll.compile({**spec, "weights": weights}, parameters={"D": GIVEN}, dtype=torch.float64)
    conv = release_weights(net)["conv"]
    assert conv.shape == (8, 3, size, size)
    convolved = torch.nn.functional.conv2d(images(), conv, net.embed.bias, stride=size)
    assert close(net.embed(net.patches(images())), convolved.flatten(2).mT)


def test_a_size_that_the_file_contradicts_is_refused() -> None:
    """3 x 4 x 4 numbers are 12 x 2 x 2 ones: shapes alone would let them pass."""
    with pytest.raises(UnrollError, match="does not fit: p is 2, not 4"):
        restore_weights(model(), released() | {"to_patch.2.weight": torch.zeros(8, 12, 2, 2)})


@pytest.mark.parametrize("place", ["model.embed.kind", "model.embed", "model.embed.patch.side", "model.depth", ""])
def test_a_size_that_is_nowhere_in_the_spec_is_shown(place: str) -> None:
    with pytest.raises(SpecError, match="the spec has no whole number at") as caught:
        unroll.load({**LAYERS, "model": VIT, "weights": {"sizes": {"p": place}, "names": {"a": "b"}}})
    assert caught.value.code == "E205" and caught.value.where is not None


# --- axes and parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, shape, sizes, want",
    [
        ("(k p) d -> k d p", (6, 4), {"k": 2}, lambda t: t.view(2, 3, 4).transpose(1, 2)),
        ("d (k p) -> k d p", (4, 6), {"p": 3}, lambda t: t.view(4, 2, 3).permute(1, 0, 2)),
        ("a b -> b a", (2, 3), {}, lambda t: t.T),
        ("1 a 1 -> a", (1, 5, 1), {}, lambda t: t[0, :, 0]),
        ("a -> 1 a", (5,), {}, lambda t: t[None]),
        ("a b c -> (c a) b", (2, 3, 4), {}, lambda t: t.permute(2, 0, 1).reshape(8, 3)),
    ],
)
def test_axes_are_split_permuted_and_joined(pattern: str, shape: tuple[int, ...], sizes: Any, want: Any) -> None:
    t = torch.arange(float(torch.Size(shape).numel())).view(shape)
    assert torch.equal(rearrange(t, pattern, sizes), want(t))
    assert torch.equal(rearrange(t, pattern, {}, want(t).shape), want(t))
    left, right = pattern.split("->")
    assert torch.equal(rearrange(want(t), f"{right} -> {left}", sizes, shape), t)


def test_axes_of_unknown_or_wrong_size() -> None:
    with pytest.raises(UnrollError, match=r"the size of axis 'k' in .* is not known"):
        rearrange(torch.zeros(6, 4), "(k p) d -> k d p", {})
    with pytest.raises(UnrollError, match="does not fit: k p is 6, not 8"):
        rearrange(torch.zeros(6, 4), "(k p) d -> k d p", {"k": 4, "p": 2})
    with pytest.raises(UnrollError, match="is not known"):
        rearrange(torch.zeros(6, 4), "(k p) d -> k d p", {"k": 4})


def test_a_part_is_a_range_for_each_axis() -> None:
    t = torch.arange(12).view(3, 4)
    assert torch.equal(t[slices("1:, :2")], t[1:, :2]) and torch.equal(t[slices("")], t)


def test_the_map_is_read_with_the_spec() -> None:
    spec = load({**LAYERS, "weights": {"names": {"layers.{layer}.w": "W"}}})
    assert spec.weights is not None and spec.weights.names["layers.{layer}.w"][0].to == "W"
    assert load(spec.to_yaml()) == spec


# --- numbers of theirs that are multiples of one another, and members of a family ------------------------------------------------


def redunet(**options: Any) -> Any:
    return unroll.compile(
        "redunet",
        dims={"d": 8, "K": 3},
        overrides=["unroll.layers=2", "scalars.sharpness=3.0"],
        dtype=torch.float64,
        **options,
    )


def of_classes(empty: bool = False) -> tuple[Tensor, dict[str, Tensor], list[tuple[Tensor, ...]]]:
    """Unit vectors, and the operators of two layers under the names of the released module, C_k without gamma_k."""
    g = torch.Generator().manual_seed(0)
    z = theirs.unit_rows(torch.randn(30, 8, dtype=torch.float64, generator=g))
    labels = torch.arange(30) % 3
    pi, found, layers = torch.nn.functional.one_hot(labels, 3).double(), dict[str, Tensor](), []
    for i in range(2):
        E, C, gamma = theirs.redunet_operators(z, pi, 0.1 + i)
        gamma = torch.where(torch.arange(3) == 1, 0, gamma) if empty else gamma
        layers.append((E, C, gamma))
        found |= {f"{i}.Cs.{k}.weight": C[k] for k in range(3)} | {f"{i}.E.weight": E, f"{i}.gam": gamma}
    return z, found, layers


def test_operators_of_released_layers_are_taken_with_the_factor_of_their_class_whatever_comes_first() -> None:
    z, found, layers = of_classes()
    for order in (found, dict(reversed(found.items()))):
        net = redunet()
        assert restore_weights(net, order).ok
        want = z
        for E, C, gamma in layers:
            want = theirs.redunet_layer(want, E, C, gamma, eta=0.5, sharpness=3.0)
        assert (net(z) - want).abs().max() < 1e-13
        back = release_weights(net)
        assert back.keys() == found.keys()
        assert all(torch.allclose(back[n], t, rtol=1e-14, atol=0) for n, t in found.items())


def test_a_factor_of_0_is_no_way_back_and_a_member_too_many_is_said() -> None:
    _, found, _ = of_classes(empty=True)
    net = redunet()
    restore_weights(net, found)
    with pytest.raises(UnrollError, match="Cs.1.weight cannot be told: it is C over gamma, which is 0"):
        release_weights(net)
    with pytest.raises(UnrollError, match=r"is of member 3 \(from 0\), but C has 3 members"):
        restore_weights(net, {**found, "0.Cs.3.weight": found["0.Cs.0.weight"]})
    with pytest.raises(UnrollError, match="1 missing") as e:
        restore_weights(net, {n: t for n, t in found.items() if n != "1.Cs.2.weight"})
    assert "C (1 of its first axis)" in str(e.value)


def test_a_factor_that_is_no_parameter_is_said() -> None:
    names = {**NAMES, "mlp_head.1.bias": {"to": "head.bias", "factor": "head.wait"}}
    with pytest.raises(SpecError, match=r"'head.wait' is not a parameter") as e:
        restore_weights(model(names), released())
    assert "head.weight" in str(e.value)


def factors(learn: Spec, output: str, parameters: Spec, names: Spec) -> Any:
    spec = {
        "objective": "o", "dims": {"d": 3, "K": 2, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "minimize": {"f": "1/2 * sumsq(Z - X)"}, "parameters": parameters,
        "unroll": {"layers": 2, "start": {"Z": "X"}, "blocks": [{"block": "a", "output": output, "learn": learn}]},
        "weights": {"names": names},
    }  # fmt: skip
    return unroll.compile(spec, seed=0, dtype=torch.float64)


def test_a_factor_that_all_layers_share_is_that_of_the_member() -> None:
    learn = {"WC": {"replaces": "C", "init": "zeros"}, "S": {"replaces": "s", "init": "zeros", "share": "layers"}}
    given = {"C": {"family": "K", "shape": ["d", "d"]}, "s": {"family": "K", "shape": ["d"]}}
    names = {"{layer}.C.{member}": {"to": "WC", "factor": "S"}, "s.{member}": {"to": "S"}}
    net = factors(learn, "Z + sum(C[k] @ Z + s[k] @ ones(1, N) for k in K)", given, names)
    file = {"s.0": torch.full((3,), 10.0), "s.1": torch.full((3,), 100.0)}
    file |= {f"{i}.C.{k}": torch.ones(3, 3) for i in range(2) for k in range(2)}
    restore_weights(net, file)
    assert net.WC[:, :, 0, 0].tolist() == [[10, 100], [10, 100]]
    assert all(torch.equal(release_weights(net)[n], t.double()) for n, t in file.items())
    with pytest.raises(UnrollError, match="its factor S is not in the file"):
        restore_weights(net, {n: t for n, t in file.items() if n != "s.1"})


def test_a_factor_that_has_a_factor_comes_after_it_and_a_circle_is_said() -> None:
    learn = {f"W{a}": {"replaces": a, "init": "zeros"} for a in "ABD"}
    names: Spec = {
        "{layer}.a": {"to": "WA", "factor": "WB"},
        "{layer}.b": {"to": "WB", "factor": "WD"},
        "{layer}.d": "WD",
    }
    made = lambda names: factors(learn, "Z + A @ Z + B @ Z + D @ Z", {a: ["d", "d"] for a in "ABD"}, names)
    file = {f"{i}.{a}": torch.full((3, 3), n) for i in range(2) for a, n in (("a", 2.0), ("b", 3.0), ("d", 5.0))}
    for order in (file, dict(reversed(file.items()))):
        net = made(names)
        restore_weights(net, order)
        assert [float(w.detach()[1, 0, 0]) for w in (net.WA, net.WB, net.WD)] == [30, 15, 5]
    with pytest.raises(UnrollError, match="is a multiple of itself"):
        restore_weights(made({**names, "{layer}.d": {"to": "WD", "factor": "WA"}}), file)
