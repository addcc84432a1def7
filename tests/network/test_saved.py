"""A folder is the network that was saved, or is refused by the name of what was changed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import unroll
from unroll.errors import UnrollError
from unroll.network.saved import values_of

LISTA = {"spec": "lista", "dims": {"m": 5, "n": 7}, "overrides": ["unroll.layers=2"], "scalars": {"lam": 0.7}}
REDUNET = {"spec": "redunet", "dims": {"d": 4, "K": 2}, "overrides": ["unroll.layers=2"]}
SIZES = ["dims.d=12", "dims.K=3", "dims.p=4", "unroll.layers=2", "model.embed.image=[3,16,16]", "model.embed.patch=4"]
CRATE = {"spec": "crate_tiny", "overrides": [*SIZES, "model.head.classes=5"]}
ALL = {"lista": LISTA, "redunet": REDUNET, "crate": CRATE}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    found: dict[str, tuple[Any, Path]] = {}
    for name, made in ALL.items():
        net: Any = unroll.compile(**made, seed=3)  # type: ignore[arg-type]
        if name == "redunet":
            net.construct(X=torch.randn(9, 4), Pi=torch.rand(2, 9))
        found[name] = net, unroll.save(net, tmp_path_factory.mktemp(name))
    return found


def copied(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edited(folder: Path, edit: Callable[[dict[str, str], dict[str, torch.Tensor]], Any]) -> Path:
    """weights.safetensors written again, its metadata and tensors changed."""
    path = folder / "weights.safetensors"
    with safe_open(path, "pt") as file:
        record, tensors = dict(file.metadata()), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    edit(record, tensors)
    save_file(tensors, path, metadata=record)
    return folder


def put(part: str, name: str, value: Any) -> Callable[[dict[str, str], Any], None]:
    def edit(record: dict[str, str], tensors: Any) -> None:
        del tensors
        found = json.loads(record[part])
        found.pop(name)
        record[part] = json.dumps(found if value is None else {**found, name: value})

    return edit


@pytest.mark.parametrize("name", ALL)
def test_every_value_is_missed_and_every_change_of_one_is_seen(saved: Any, name: str, tmp_path: Path) -> None:
    net, folder = saved[name]
    for value, held in values_of(net).items():
        part, _, own = value.partition(".")
        if isinstance(held, torch.Tensor):
            kinds = [held.to(torch.float64), held.to(torch.int32), held.new_zeros(3, 2, 1, 5), held + 1]
            changes = [lambda r, t, v=value: t.pop(v), *(lambda r, t, v=value, k=k: t.update({v: k}) for k in kinds)]
        else:
            changes = [put(part, own, new) for new in (None, held + 1)]
        for change in changes:
            place = edited(copied(folder, tmp_path), change)
            with pytest.raises(UnrollError, match=rf"E405.* is not as it was saved: .*{value}\b"):
                unroll.restore(place)
    copied(folder, tmp_path)
    again = unroll.restore(tmp_path)
    assert {k: str(v) for k, v in values_of(again).items()} == {k: str(v) for k, v in values_of(net).items()}


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another number in the spec": (lambda d: (d / "spec.yaml").write_text((d / "spec.yaml").read_text().replace("2", "3")), r"spec.yaml is not what it was"),
    "a spec that is no text": (lambda d: (d / "spec.yaml").write_bytes(b"\xff\xfe"), r"spec.yaml is not what it was"),
    "no spec": (lambda d: (d / "spec.yaml").unlink(), r"holds no spec.yaml"),
    "no weights": (lambda d: (d / "weights.safetensors").unlink(), r"holds no weights.safetensors"),
    "an edited source": (lambda d: (d / "network.py").write_text("# mine\n"), r"network.py is not what it was"),
    "half a file": (lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-9]), r"is damaged"),
    "an empty file": (lambda d: (d / "weights.safetensors").write_bytes(b""), r"is damaged"),
    "one tensor more": (lambda d: edited(d, lambda r, t: t.update({"network.V": torch.ones(2)})), r"network.V was not there"),
    "no sizes": (lambda d: edited(d, lambda r, t: r.pop("dims")), r"metadata say nothing that can be read of 'dims'"),
    "sizes that are no JSON": (lambda d: edited(d, lambda r, t: r.update(dims="{m: 5")), r"metadata say nothing that can be read of 'dims'"),
    "sizes in a list": (lambda d: edited(d, lambda r, t: r.update(dims="[5, 7]")), r"metadata say nothing that can be read of 'dims'"),
    "a size in words": (lambda d: edited(d, put("dims", "m", "five")), r"dims.m is no number"),
    "no numbers": (lambda d: edited(d, lambda r, t: r.update(scalars="{}")), r"scalars.lam is missing"),
    "no manifest": (lambda d: edited(d, lambda r, t: r.pop("manifest")), r"metadata say nothing that can be read of 'manifest'"),
    "a manifest of nothing": (lambda d: edited(d, lambda r, t: r.update(manifest="{}")), r"dims.m was not there"),
    "a manifest in numbers": (lambda d: edited(d, put("manifest", "dims.m", 3)), r"dims.m is 5, not"),
    "another version": (lambda d: edited(d, lambda r, t: r.update(version="99")), r"written by another version"),
    "not ours": (lambda d: edited(d, lambda r, t: r.clear()), r"was not written by unroll.save"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_every_damage_is_refused_in_words(saved: Any, damage: str, tmp_path: Path) -> None:
    change, words = DAMAGED[damage]
    change(copied(saved["lista"][1], tmp_path))
    with pytest.raises(UnrollError, match=words) as refused:
        unroll.restore(tmp_path)
    assert refused.value.code == "E405" and str(tmp_path) in refused.value.message


def test_the_source_is_for_readers_and_may_be_gone(saved: Any, tmp_path: Path) -> None:
    net, folder = saved["lista"]
    (copied(folder, tmp_path) / "network.py").unlink()
    assert unroll.restore(tmp_path).spec.sha256 == net.spec.sha256


def bare(record: dict[str, str], tensors: Any) -> None:
    """As version 1 wrote it: no manifest, the digest of the spec."""
    del tensors
    del record["manifest"]
    record |= {"version": "1", "sha256": unroll.load("lista", LISTA["overrides"]).sha256}  # type: ignore[arg-type]


def test_folders_without_a_manifest_are_read_by_their_names_shapes_and_types(saved: Any, tmp_path: Path) -> None:
    net, folder = saved["lista"]
    old = edited(copied(folder, tmp_path), bare)
    x = torch.randn(3, 5)
    assert torch.equal(unroll.restore(old)(x), net(x)) and unroll.restore(old).scalars == net.scalars
    changes: dict[str, Callable[[Any, Any], Any]] = {
        "given.A is missing": lambda r, t: t.pop("given.A"),
        "W1 is missing": lambda r, t: t.pop("network.W1"),
        "W1 is int32": lambda r, t: t.update({"network.W1": t["network.W1"].int()}),
        "scalars.lam is 0.1, not|scalars.lam is missing": lambda r, t: r.update(scalars="{}"),
        "not the spec that these weights belong to": lambda r, t: r.update(sha256="0"),
    }
    for words, change in changes.items():
        with pytest.raises(UnrollError, match=f"E405.*({words})"):
            unroll.restore(edited(edited(copied(folder, tmp_path), bare), change))


# --- networks that are no longer their spec's -------------------------------------------------------------------------


class Cosine(nn.Linear):
    """The parameters of a linear map, and another answer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.normalize(input, dim=-1))


def half_of_it(net: Any) -> None:
    net.head.to(torch.float64)


def other_layers(net: Any) -> None:
    net.body = unroll.compile(**{**CRATE, "overrides": [*CRATE["overrides"], "unroll.layers=1"]}).body  # type: ignore[dict-item, arg-type]


CHANGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a head of another width": (lambda net: setattr(net, "head", nn.Linear(13, 3)), r"head is Linear\(in_features=13.*not Linear\(in_features=12"),
    "another kind of head": (lambda net: setattr(net, "head", Cosine(12, 5)), r"head is Cosine\("),
    "a head of several": (lambda net: setattr(net, "head", nn.Sequential(net.head, nn.GELU())), r"head is Sequential"),
    "one part more": (lambda net: net.add_module("extra", nn.Linear(2, 2)), r"extra was not there"),
    "one part less": (lambda net: setattr(net, "token_norm", nn.Identity()), r"token_norm is missing"),
    "a part of another type": (half_of_it, r"several types, torch.float32 and torch.float64"),
    "other layers": (other_layers, r"the layers of this model are no longer those of its spec"),
    "one more within the layers": (lambda net: net.body.add_module("extra", nn.Linear(2, 2)), r"extra was not there"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED)
def test_what_its_spec_no_longer_says_is_neither_saved_nor_pickled(change: str, tmp_path: Path) -> None:
    net: Any = unroll.compile(**CRATE)  # type: ignore[arg-type]
    alter, words = CHANGED[change]
    alter(net)
    for keep in (lambda: net.save(tmp_path / "out"), lambda: pickle.dumps(net)):
        with pytest.raises(UnrollError, match=rf"E405.*{words}") as refused:
            keep()
        assert "state_dict" in refused.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_type_of_the_whole_network_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    for made in ALL.values():
        net: Any = unroll.compile(**made).to(dtype)  # type: ignore[arg-type]
        again = unroll.restore(net.save(tmp_path))
        assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in net.state_dict().items()}


def test_what_was_never_constructed_comes_back_so_and_loads_what_was(saved: Any, tmp_path: Path) -> None:
    """A state from elsewhere says whether the parameters that data decide are there."""
    fresh: Any = unroll.compile(**REDUNET)  # type: ignore[arg-type]
    again: Any = unroll.restore(fresh.save(tmp_path))
    assert not again.built and not pickle.loads(pickle.dumps(fresh)).built
    built, x = saved["redunet"][0], torch.randn(3, 4)
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(x), built(x))


SAID: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "another head": (lambda net: setattr(net, "head", nn.Linear(12, 3)), {"classes": 3, "bias": True, "norm": True}),
    "one without bias": (lambda net: setattr(net, "head", nn.Linear(12, 5, bias=False)), {"classes": 5, "bias": False}),
    "no head": (lambda net: setattr(net, "head", nn.Identity()), {"classes": None, "norm": True}),
    "no norm": (lambda net: setattr(net, "head_norm", nn.Identity()), {"classes": 5, "norm": False}),
}


@pytest.mark.parametrize("change", SAID)
def test_a_head_that_the_spec_can_say_is_saved_and_comes_back(saved: Any, change: str, tmp_path: Path) -> None:
    net: Any = copy.deepcopy(saved["crate"][0])
    do, says = SAID[change]
    do(net)
    x, before = torch.randn(2, 3, 16, 16), net.spec
    code: Callable[[str], str] = lambda text: text.split('"""', 2)[2]  # the head names the file of the spec
    folder = unroll.save(net, tmp_path / "saved")
    for again in (unroll.restore(folder), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x), net(x)) and {k: getattr(again.spec.model.head, k) for k in says} == says
        assert again.spec.weights == before.weights and code(again.source) == code((folder / "network.py").read_text())
    assert net.spec is before  # saving changes nothing
    again.save(tmp_path / "again")  # and is the network of its spec


def test_a_norm_that_its_spec_always_has_is_not_left_out(tmp_path: Path) -> None:
    head = "model.head={kind: class_attention, classes: 5, heads: 2}"
    net: Any = unroll.compile("crate_tiny", overrides=[*SIZES, head, "model.class_token=null"])
    net.head_norm = nn.Identity()
    with pytest.raises(UnrollError, match="head_norm is missing"):
        net.save(tmp_path)


def test_a_table_of_more_words_is_saved_and_comes_back(tmp_path: Path) -> None:
    tiny = ["dims.d=8", "dims.K=2", "dims.p=4", "unroll.layers=1", "model.embed.vocabulary=20", "model.embed.length=9"]
    net: Any = unroll.compile("crate_text", overrides=tiny)
    net.embed = nn.Embedding(25, 8)
    tokens = torch.randint(20, (2, 9))
    again: Any = unroll.restore(net.save(tmp_path))
    assert torch.equal(again(tokens), net(tokens)) and again.spec.model.embed.vocabulary == 25


def test_a_network_is_not_saved_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UnrollError, match="E405.*a file"):
            unroll.compile("ista", dims={"m": 4, "n": 6}, overrides=["unroll.layers=1"]).save(target)
    assert (tmp_path / "file").read_text() == "mine"
