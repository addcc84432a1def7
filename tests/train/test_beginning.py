"""Fine-tuning: a training that starts from a run, a saved network or a file, and what of it learns."""

import hashlib
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import unroll
from unroll.errors import UnrollError
from unroll.model.module import Model
from unroll.model.words import Characters
from unroll.network.network import Network
from unroll.spec import load
from unroll.train import Interrupted, evaluate, resume, train, trained
from unroll.train.beginning import Beginning, begin, inherited, start
from unroll.train.data import make_data
from unroll.train.engine import fit
from unroll.train.groups import record, shares
from unroll.train.job import DTYPES
from unroll.train.run import _finished
from unroll.train.samples import Data, Shapes, Split

torch.set_num_threads(1)

SPEC = """
name: small
dims: {d: 12, N: dynamic}
variables: {Z: [d, N]}
inputs: {X: [d, N]}
parameters: {D: [d, d]}
scalars: {lam: 0.1, eta: 0.1}
minimize: {fit: 1/2 * sumsq(X - D @ Z), sparsity: lam * norm1(Z)}
unroll: {algorithm: proximal_gradient, layers: 3, step: eta, start: {Z: X}, learn: {W: {replaces: step * D.T}, theta: {replaces: step * lam, share: layers}}}
model:
  embed: {kind: patches, image: [1, 8, 8], patch: 4, norm: both}
  positions: {kind: learned}
  class_token: {std: 0.02}
  head: {kind: class_token, classes: 4}
data: {source: digits, form: images, classes: [0, 1, 2, 3]}
train: {loss: cross_entropy, optimizer: adamw, weight_decay: 0.1, steps: 12, batch: 32, keep: last, validate_every: 6, lr: 1e-2, clip: 1.0}
"""
NEW = ["data.classes=[7, 3, 8]", "model.head.classes=3"]
LISTA = """
name: tiny
use: lasso
dims: {m: 8, n: 16}
unroll: {algorithm: proximal_gradient, layers: 3, parametrisation: lista}
data: {source: synthetic, train: 256, validation: 64, sparsity: 0.2}
train: {loss: nmse, steps: 6, batch: 32, baselines: []}
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return train(SPEC, out=tmp_path_factory.mktemp("runs") / "first", quiet=True)


def tuned(first, folder, *overrides, spec=SPEC, **more):
    return train(spec, overrides=[f"train.from={first.folder}", *NEW, *overrides], out=folder, quiet=True, **more)


def start_of(folder):
    return load_file(folder / "start.safetensors")


def said(folder):
    return json.loads((folder / "run.json").read_text())["from"]


def test_a_run_starts_with_the_weights_of_another_but_for_the_head_of_other_classes(first, tmp_path):
    run, there = tuned(first, tmp_path / "run"), load_file(first.folder / "weights.safetensors")
    begun, report = start_of(run.folder), said(run.folder)
    assert report["sha256"] == hashlib.sha256((first.folder / "weights.safetensors").read_bytes()).hexdigest()
    assert report["path"] == str(first.folder)
    assert set(report["taken"]) == {name for name in there if not name.startswith("head.")} - {"body.D"}
    assert all(torch.equal(begun[name], there[name]) for name in report["taken"]) and "body.W" in report["taken"]
    # of the digits 0 1 2 3 and 7 3 8, the row of 3 is known
    assert torch.equal(begun["head.weight"][1], there["head.weight"][3])
    assert report["changed"] == dict.fromkeys(
        ("head.weight", "head.bias"), "1 of 4 classes or words taken, 2 of ours left"
    )
    fresh = unroll.compile(load(SPEC, NEW))
    assert torch.equal(begun["head.weight"][[0, 2]], fresh.head.weight[[0, 2]].detach())
    assert [row.name for row in run.table][1] == "as it started"


def test_what_is_left_starts_as_without_a_start_and_is_reported(first, tmp_path):
    run = tuned(first, tmp_path / "run", "train.from={path: " + str(first.folder) + ", leave: [head, body.W]}")
    report, fresh = said(run.folder), unroll.compile(load(SPEC, NEW))
    assert report["left"] == dict.fromkeys(("head.weight", "head.bias", "body.W"), "as the spec says")
    assert torch.equal(start_of(run.folder)["body.W"], fresh.body.W.detach())


def test_a_run_that_started_from_another_resumes_to_the_bit_without_it(first, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(first.folder, source)
    first = type(first)(source, *[getattr(first, k) for k in ("net", "status", "steps", "seconds", "closing")])
    options = ["train.freeze=[embed, 'body.W[:2]']", "train.ema=0.9"]
    whole = tuned(first, tmp_path / "whole", *options)
    forward, calls = Model.forward, []

    def once_interrupted(self, *args, **named):
        calls.append(self.training)
        if calls.count(True) == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **named)

    monkeypatch.setattr(Model, "forward", once_interrupted)
    with pytest.raises(Interrupted):
        tuned(first, tmp_path / "cut", *options)
    monkeypatch.setattr(Model, "forward", forward)
    shutil.rmtree(source)
    cut = resume(tmp_path / "cut", quiet=True)
    ours, theirs = (load_file(r.folder / "weights.safetensors") for r in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [[(r.name, r.values["nats"]) for r in each.table] for each in (whole, cut, evaluate(cut.folder, quiet=True))]
    assert rows[0] == rows[1] == rows[2]
    assert torch.equal(trained(cut.folder).body.W.detach(), theirs["body.W"])

    start = cut.folder / "start.safetensors"
    values = load_file(start)
    save_file({**values, "head.bias": values["head.bias"] + 1}, start)
    with pytest.raises(UnrollError, match="head.bias is not what it was"):
        evaluate(cut.folder, quiet=True)
    start.unlink()
    with pytest.raises(UnrollError, match="there is no such file"):
        resume(cut.folder, quiet=True)


# --- what learns ------------------------------------------------------------------------------------------------------


def fitted(folder, *overrides, spec=SPEC):
    """A network, and how it was before it was trained."""
    spec = load(spec, overrides)
    net = unroll.compile(spec, dtype=DTYPES[spec.train.precision])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(net, make_data(spec.data, Shapes({})), spec.train, folder)
    return net, before


def moved(net, before):
    """Names of parameters that training changed."""
    return {name for name, p in net.named_parameters() if not torch.equal(before[name], p)}


def test_the_head_alone(tmp_path):
    net, before = fitted(tmp_path, "train.only=[head, head_norm]", "train.ema=0.9")
    assert moved(net, before) == {"head.weight", "head.bias", "head_norm.weight", "head_norm.bias"}
    assert all(p.requires_grad for p in net.parameters())


def test_frozen_parts_and_frozen_layers_do_not_move_and_all_else_does(tmp_path):
    net, before = fitted(tmp_path, "train.freeze=['*norm*', embed, 'body.W[1:]']")
    assert torch.equal(before["body.W"][1:], net.body.W[1:]) and not torch.equal(before["body.W"][0], net.body.W[0])
    assert moved(net, before) == {"body.W", "body.theta", "positions", "class_token", "head.weight", "head.bias"}
    said = record(net, load(SPEC, ["train.freeze=['*norm*', embed, 'body.W[1:]']"]).train)
    assert said["share_of_the_rate"]["body.W"] == [1.0, 0.0, 0.0] and said["share_of_the_rate"]["embed.bias"] == 0.0
    assert "embed.weight" not in said["decay"] and "head.weight" in said["decay"]


def test_the_gradient_is_clipped_over_what_learns_alone(tmp_path):
    """One step of plain gradient descent of rate 1: what moves is exactly as long as the clip."""
    options = ["train.optimizer=sgd", "train.momentum=0", "train.lr=1.0", "train.steps=1", "train.weight_decay=0"]
    options += ["train.schedule=constant", "train.clip=0.001", "train.precision=float64", "train.only=['body.W[:1]']"]
    net, before = fitted(tmp_path, *options)
    gone = (net.body.W.detach() - before["body.W"]).flatten(1).norm(dim=1)
    assert gone[0].item() == pytest.approx(1e-3, rel=1e-3) and not gone[1:].any()


def test_statistics_of_a_frozen_stem_stand_still(tmp_path):
    stem = SPEC.replace(
        "kind: patches, image: [1, 8, 8], patch: 4, norm: both", "kind: stem, image: [1, 8, 8], patch: 4"
    )
    frozen, _ = fitted(tmp_path / "frozen", "train.freeze=[stem]", spec=stem)
    free, _ = fitted(tmp_path / "free", "train.freeze=[head]", spec=stem)
    assert not frozen.stem[1].running_mean.any() and free.stem[1].running_mean.any()


def test_the_rate_of_a_layer_is_a_share_of_that_of_the_next():
    """As ELECTRA and BEiT have it: c^(L + 1) before the layers, c^(L - l) in layer l from 0, 1 in the head."""
    net, settings = unroll.compile(SPEC), load(SPEC, ["train.layer_decay=0.5", "train.freeze=['body.W[:1]']"]).train
    found = {name: share.tolist() for name, share in shares(net, settings).items()}
    assert found["embed.weight"] == found["positions"] == found["class_token"] == 0.5**4
    assert found["body.W"] == [0, 0.5**2, 0.5]
    assert found["body.theta"] == 0.5  # shared by all: as the last of them
    assert found["head.weight"] == found["head_norm.bias"] == 1
    tail = unroll.compile(LISTA, overrides=["unroll.layers=6", "unroll.free=2"])
    found = shares(tail, load(LISTA, ["train.layer_decay=0.5"]).train)
    assert found["W2"].tolist() == [0.5**5, 0.5**4, 1]
    tiny = [f"{at}{x}" for at in ("", "model.decoder.layers.") for x in ("dims.d=8", "dims.K=2", "dims.p=4")]
    coder = unroll.compile("crate_mae_digits", overrides=[*tiny, "unroll.layers=2"])  # 2 and 3 layers
    found = shares(coder, load("crate_mae_digits", ["train.layer_decay=0.5"]).train)
    assert found["mask_token"] == 0.5**6 and found["body.Q"].tolist() == [0.5**5, 0.5**4]
    assert found["encoder_norm.weight"] == 0.5**3 and found["decoder.Q"].tolist() == [0.5**3, 0.5**2, 0.5]
    assert found["pixels.weight"] == 1


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_layers_move_as_if_each_had_an_optimizer_of_its_own(tmp_path, optimizer):
    options = [f"train.optimizer={optimizer}", "train.precision=float64", "train.schedule=constant", "train.clip=null"]
    options += ["train.layer_decay=0.5", "train.steps=5", "train.lr=0.01"]
    net, before = fitted(tmp_path, *options)
    other = unroll.compile(SPEC, dtype=torch.float64)
    assert torch.equal(before["body.W"], other.body.W)
    spec = load(SPEC, options)
    settings, rates = spec.train, shares(other, spec.train)
    groups = {"body.W": 0.01, "body.theta": 0.1}  # scalars learn ten times as fast
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    params, opts = dict(other.named_parameters()), []
    rows = {name: p if rates[name].ndim == 0 else [r.detach().clone() for r in p] for name, p in params.items()}
    for name, own in rows.items():
        decay = 0.1 if name in ("body.W", "embed.weight", "head.weight") else 0.0
        for piece, share in (
            [(own, rates[name])] if isinstance(own, nn.Parameter) else zip(own, rates[name], strict=True)
        ):
            more = {"momentum": 0.9} if optimizer == "sgd" else {}
            lr = groups.get(name, 0.01) * float(share)
            opts.append(make([piece.requires_grad_(True)], lr=lr, weight_decay=decay, **more))
    data = make_data(spec.data, Shapes({}))
    order = data.train.order(torch.Generator().manual_seed(0))
    for step in range(5):
        batch = data.train[order[32 * step : 32 * step + 32]].to(torch.float64)
        stacked = {n: r if isinstance(r, nn.Parameter) else torch.stack(r) for n, r in rows.items()}
        answer = torch.func.functional_call(other, stacked, batch.inputs["image"])
        for o in opts:
            o.zero_grad()
        torch.nn.functional.cross_entropy(answer, batch.labels).backward()
        for o in opts:
            o.step()
    assert torch.allclose(net.body.W, torch.stack(rows["body.W"]), rtol=0, atol=1e-12)
    assert torch.allclose(net.head.weight, params["head.weight"], rtol=0, atol=1e-12)
    assert torch.allclose(net.embed.weight, params["embed.weight"], rtol=0, atol=1e-12)
    assert (net.embed.weight - before["embed.weight"]).abs().max() > 1e-5 and settings.layer_decay == 0.5


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.freeze=[hed]"], "there is no parameter 'hed'.*did you mean 'head'"),
        (["train.only=[body.V]"], "there is no parameter 'body.V'.*did you mean 'body.W'"),
        (["train.freeze=['head[:2]']"], "means layers, and head.weight is not one for each"),
        (["train.freeze=['body[:2]']"], "body.theta is not one for each.*name those that are: body.W"),
        (["train.freeze=['body.W[5:]']"], "are no layers.*0 to 2"),
        (["train.freeze=['body.W[1']"], "is no name"),
        (["train.freeze=['*']"], "nothing is left to learn"),
        (["train.freeze=[head]", "train.only=[embed]"], "only: says what learns"),
        (["train.only=[body]", "train.search={grid: {theta: [1.0]}}"], "search: sets what it names"),
    ],
)
def test_parts_that_cannot_be_frozen_are_named(tmp_path, overrides, says):
    with pytest.raises(UnrollError, match=f"(?s){says}") as caught:
        fitted(tmp_path, *overrides)
    assert caught.value.code == "E511"


# --- where it starts from ---------------------------------------------------------------------------------------------


def begun(origin, *overrides, spec=SPEC, given=None):
    return begin(load(spec, [f"train.from={origin}", *overrides]), given or {}, {}, _finished)


def test_a_saved_network_and_a_file_of_its_tensors_are_starts_too(first, tmp_path):
    first.net.save(tmp_path / "saved")
    torch.save(first.net.state_dict(), tmp_path / "own.pth")
    (tmp_path / "first.yaml").write_text(SPEC)
    file = f"{{path: {tmp_path / 'own.pth'}, spec: {tmp_path / 'first.yaml'}}}"
    for origin in (tmp_path / "saved", file, first.folder):
        found = begun(origin, *NEW)
        theirs = found.net.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in first.net.state_dict().items())
        assert len(found.sha256) == 64
        assert [*found.given] == ([] if origin is file else ["D"])


def test_a_file_with_names_of_its_own_is_read_by_the_names_of_its_spec(first, tmp_path):
    theirs, path = tmp_path / "theirs.yaml", tmp_path / "released.pth"
    names = {name.replace("body", "layers").upper(): name for name in first.net.state_dict()}
    theirs.write_text(SPEC + "weights: {strip: [module.], names: " + json.dumps(names) + "}\n")
    same = unroll.compile(load(theirs), parameters=first.net.given)
    same.load_state_dict(first.net.state_dict())
    torch.save({f"module.{name}": value for name, value in unroll.release_weights(same).items()}, path)
    found = begun(f"{{path: {path}, spec: {theirs}}}", *NEW, given=first.net.given)
    assert torch.equal(found.net.body.W, first.net.body.W) and len(found.net.head.bias) == 4
    with pytest.raises(UnrollError, match="names in .* are not those of small"):
        begun(path)
    with pytest.raises(UnrollError, match="(?s)HEAD.*say whose they are"):  # of four classes, for the spec of three
        begun(path, *NEW, spec=theirs, given=first.net.given)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("nowhere", "there is no 'nowhere'"),
        ("{path: FIRST, leave: [hed]}", "no parameter 'hed' to leave.*did you mean 'head'"),
        ("{path: FIRST, spec: lista}", "spec: is for a file"),
        ("{path: FIRST, leave: ['*']}", "nothing of it fits"),
        ("OTHER", "is of another objective than small: minimize differ"),
        ("CUT", "is not finished"),
    ],
)
def test_what_is_no_start_is_refused_and_leaves_no_folder(first, tmp_path, start, says):
    if start == "OTHER":
        unroll.compile(SPEC.replace("1/2", "2")).save(tmp_path / "OTHER")
    if start == "CUT":
        shutil.copytree(first.folder, tmp_path / "CUT")
        (tmp_path / "CUT" / "weights.safetensors").unlink()
    for word, place in (("FIRST", first.folder), ("OTHER", tmp_path / "OTHER"), ("CUT", tmp_path / "CUT")):
        start = start.replace(word, str(place))
    with pytest.raises(UnrollError, match=f"(?s){says}"):
        train(SPEC, overrides=[f"train.from={start}"], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_rows_of_words_go_by_their_characters_and_words_of_another_kind_by_nothing():
    tiny = ["dims.d=8", "dims.K=2", "dims.p=4", "unroll.layers=1", "model.embed.length=9"]
    there = unroll.compile("crate_text", overrides=[*tiny, "model.embed.vocabulary=3"], seed=1)
    there.words = Characters(("\ufffd", "a", "b"))
    here = unroll.compile("crate_text", overrides=[*tiny, "model.embed.vocabulary=4"], seed=2)
    own = here.embed.weight.detach().clone()
    found = Beginning("", "", there, {})

    def data(words):
        return Data("text", Split({}), Split({}), words=words)

    taken = start(here, found, data(Characters(("\ufffd", "b", "c", "d"))), ())
    assert dict(taken.changed)["embed.weight"] == "2 of 3 classes or words taken, 2 of ours left"
    assert torch.equal(here.embed.weight[:2], there.embed.weight[[0, 2]]) and torch.equal(
        here.embed.weight[2:], own[2:]
    )
    same = unroll.compile("crate_text", overrides=[*tiny, "model.embed.vocabulary=3"], seed=2)
    left = dict(start(same, found, data(Other(3)), ()).left)
    assert left["embed.weight"] == "it is of other classes or words"
    assert "embed.weight" in start(same, found, data(there.words), ()).taken


class Other:
    """Words that are no list of characters."""

    def __init__(self, size):
        self.size = size

    def record(self):
        return {"tokenizer": {}}


def test_a_problem_keeps_the_matrix_that_its_network_was_trained_for(tmp_path):
    spec = load(LISTA, ["data.seed=3", "unroll.layers=2"])  # of which the data would make another A
    net = unroll.compile(spec, dims={"m": 8, "n": 16}, seed=1)
    net.save(tmp_path / "saved")
    run = train(LISTA, overrides=[f"train.from={tmp_path / 'saved'}"], out=tmp_path / "run", quiet=True)
    assert isinstance(run.net, Network) and torch.equal(run.net.given["A"], net.given["A"])
    assert torch.equal(start_of(run.folder)["W1"], net.W1.detach()) and not said(run.folder)["left"]
    assert said(run.folder)["changed"]["W2"] == "2 of 2 layers taken, 1 of ours left"
    assert run.table[0].name.startswith("as it started")

    found = begun(tmp_path / "saved", spec=LISTA)
    spec = load(LISTA, ["dims.n=20"])
    assert inherited(found, load(LISTA), {}, {}).keys() == {"A"}
    assert not inherited(found, load(LISTA), {}, {"A": net.given["A"]})  # what the caller gives goes before it
    assert not inherited(found, spec, {}, {})  # another size
