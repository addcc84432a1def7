"""A finished run measured on other data: numbered, and in the scale, as its network knows them; the run stays as it is."""

import csv
import json
import tarfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from unroll.cli import cli
from unroll.errors import SpecError, UnrollError
from unroll.spec.schema import Train
from unroll.train import evaluate, labels, train
from unroll.train.samples import Split

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
SPEC = """
name: animals
use: crate
dims: {d: 8, K: 2, p: 4}
unroll: {layers: 1}
model:
  embed: {kind: patches, image: [3, 6, 6], patch: 3, norm: after}
  head: {kind: mean, classes: 8}
data: {source: images, folder: FOLDER, size: 6, normalise: data}
train: {loss: cross_entropy, steps: 60, batch: 20, lr: 2e-2}
"""


def paint(folder, names=NAMES, count=10, seed=0):
    """Pictures of one colour for each class, with noise: learned at once."""
    draw = np.random.default_rng(seed)
    colours = {name: np.random.default_rng(k).integers(30, 220, 3) for k, name in enumerate(NAMES)}
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            pixels = (colours[name] + draw.integers(-25, 25, (6, 6, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    top = tmp_path_factory.mktemp("animals")
    return train(SPEC.replace("FOLDER", str(paint(top / "mine"))), out=top / "run", quiet=True)


def rows(found):
    return {row.name: row.to_dict() for row in found.table}


def test_a_run_writes_which_classes_it_mistakes_for_which(run):
    with (run.folder / "confusion.csv").open() as file:
        head, *lines = list(csv.reader(file))
    assert head == ["label", *NAMES, "7"]  # the head has a row more than there are classes
    counts = np.array([[int(n) for n in line[1:]] for line in lines])
    trained = rows(run)["animals, trained"]
    assert counts.sum() == run.closing.samples == 7 and counts.trace() == round(trained["accuracy"] * 7)
    assert (run.folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert 1 >= trained["top5"] >= trained["accuracy"] and "among five" in str(run)


def test_other_pictures_are_numbered_by_their_names_and_all_of_them_are_measured(run, tmp_path):
    paint(tmp_path / "other", ("dog", "gnu"), count=9, seed=7)
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    found = evaluate(run.folder, overrides=[f"data.folder={tmp_path / 'other'}", "data.workers=1"], quiet=True)
    assert found.closing.samples == 18 and before == {p: p.read_bytes() for p in before}
    assert rows(found)["animals, trained"]["accuracy"] > 0.9  # by position they would be ant and bee
    with (found.folder / "confusion.csv").open() as file:
        counts = {line[0]: line[1:] for line in csv.reader(file)}
    assert sum(map(int, counts["dog"])) == sum(map(int, counts["gnu"])) == 9 and set(counts["ant"]) == {"0"}
    kept = json.loads((found.folder / "table.json").read_text())
    assert kept["overrides"][0].startswith("data.folder=") and kept["samples"] == 18
    assert str(found.folder) in str(found) and "measured with data.folder=" in str(found)
    assert not any("chosen" in note for note in found.closing.notes)


def test_without_another_place_what_the_run_held_out_is_measured(run, tmp_path):
    found = evaluate(run.folder, overrides=["data.workers=0"], quiet=True)
    assert found.closing.samples == run.closing.samples == 7
    assert rows(found)["animals, trained"]["nats"] == pytest.approx(rows(run)["animals, trained"]["nats"], rel=1e-6)
    mine = run.folder.parent / "mine"
    (tmp_path / "link").symlink_to(mine)
    for place in (f"data.folder={mine}/../mine", f"data.folder={tmp_path / 'link'}", f"data.held=[{mine}]"):
        with pytest.raises(SpecError, match="E511.*mine/ant' (has pictures that the run was|is trained on)"):
            evaluate(run.folder, overrides=[place], quiet=True)
    Image.new("RGB", (6, 6)).save(mine / "ant" / "new.png")
    with pytest.raises(SpecError, match="E514"):
        evaluate(run.folder, overrides=["data.workers=0"], quiet=True)
    (mine / "ant" / "new.png").unlink()


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("data.validation=0.5", "another one would hold out samples that the run was trained on"),
        ("data.seed=7", "another one would hold out samples"),
        ("data.normalise=null", "nothing here reads it"),
        ("data.augment={flip: true}", "nothing here reads it"),
        ("data.seed=7 data.folder=x", "other pictures are measured all"),
    ],
)
def test_settings_that_nothing_reads_are_refused(run, override, why):
    with pytest.raises(SpecError, match=f"E511.*{why}"):
        evaluate(run.folder, overrides=override.split() if " data." in override else [override], quiet=True)


def test_only_what_divides_samples_is_refused_for_dividing_them():
    from unroll.spec import load
    from unroll.train.run import _refuse_unread

    for name, word in (("crate_digits", "seed"), ("crate_digits", "validation"), ("crate_text", "characters")):
        with pytest.raises(SpecError, match="E511.*trained on"):
            _refuse_unread(load(name), {word})
    _refuse_unread(load("crate_text"), {"characters", "text"})
    _refuse_unread(load("hyper_lista"), {"seed", "validation", "sparsity"})
    with pytest.raises(SpecError, match="E511.*train: is of the training"):
        _refuse_unread(load("hyper_lista"), {"train"})


def test_pictures_that_are_given_twice_are_named(tmp_path):
    from unroll.spec.schema import Images
    from unroll.train.pictures import _shelves

    paint(tmp_path / "a", count=1)
    x, y, tar = (str(tmp_path / name) for name in ("x.npy", "y.npy", "a.tar"))
    np.save(x, np.zeros((4, 6, 6), np.uint8))
    np.save(y, np.arange(4))
    with tarfile.open(tar, "w") as made:
        made.add(tmp_path / "a" / "ant" / "0.png", "ant/0.png")
    twice = (
        ({"folder": str(tmp_path / "a"), "held": (f"{tmp_path}/./a",)}, "a/ant' is trained on, and held out"),
        ({"shards": (tar,), "held": (f"{tmp_path}/*.tar",)}, "a.tar' is trained on, and held out"),
        ({"shards": (tar, f"{tmp_path}/a*.tar")}, "a.tar' is given twice"),
        ({"arrays": (x, y), "held": (x, y)}, "x.npy' is trained on, and held out"),
    )
    for given, message in twice:
        with pytest.raises(SpecError, match=f"E511.*{message}"):
            _shelves(Images.model_validate({"source": "images", "size": 6, **given}))
    np.savez(tmp_path / "both.npz", image=np.zeros((4, 6, 6)), labels=np.arange(4))
    one = str(tmp_path / "both.npz")
    assert len(_shelves(Images.model_validate({"source": "images", "arrays": (one, one)}))[0]) == 1


def test_of_what_is_set_apart_only_that_is_measured_in_arrays_too(run, tmp_path):
    paint(tmp_path / "parts" / "train", count=2)
    paint(tmp_path / "parts" / "val", count=3, seed=5)
    found = evaluate(run.folder, overrides=[f"data.folder={tmp_path / 'parts'}"], quiet=True)
    assert found.closing.samples == 21
    made, numbers = [], []
    for k, name in enumerate(NAMES):
        for path in sorted((tmp_path / "parts" / "val" / name).iterdir()):
            with Image.open(path) as picture:
                made.append(np.asarray(picture))
            numbers.append(k)
    np.save(tmp_path / "x.npy", np.stack(made))
    np.save(tmp_path / "y.npy", np.array(numbers))
    again = evaluate(run.folder, overrides=[f"data.arrays=[{tmp_path}/x.npy, {tmp_path}/y.npy]"], quiet=True)
    a, b = (rows(r)["animals, trained"] for r in (found, again))
    assert a["nats"] == pytest.approx(b["nats"], rel=1e-5) and a["accuracy"] == b["accuracy"]


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("train.lr=1", "E511", "cannot be measured with another train.lr"),
        ("data.source=digits", "E511", "cannot be measured with another data.source"),
        ("data.folder=nowhere", "E502", "no folder 'nowhere'"),
        ("data.size=9", "E404", "9"),
    ],
)
def test_what_is_not_for_the_network_is_refused(run, override, code, message):
    with pytest.raises(UnrollError, match=message) as caught:
        evaluate(run.folder, overrides=[override], quiet=True)
    assert caught.value.code == code


def test_a_class_that_the_network_does_not_know_is_named(run, tmp_path):
    paint(tmp_path / "other", ("dog",), count=2)
    (tmp_path / "other" / "yak").mkdir()
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(tmp_path / "other" / "yak" / "0.png")
    with pytest.raises(SpecError, match="knows no class yak") as caught:
        evaluate(run.folder, overrides=[f"data.folder={tmp_path / 'other'}"], quiet=True)
    assert caught.value.code == "E507"


def test_the_command_measures_elsewhere(run, tmp_path):
    paint(tmp_path / "other", count=1)
    found = CliRunner().invoke(cli, ["eval", str(run.folder), f"data.folder={tmp_path / 'other'}", "-q"])
    assert found.exit_code == 0 and "on 7 held-out samples" in found.output, found.output
    refused = CliRunner().invoke(cli, ["eval", str(run.folder), "data.folder=x", "--white-box"])
    assert refused.exit_code == 2 and "leave KEY=VALUE out" in refused.output


def test_codes_are_measured_with_other_samples_of_the_same_dictionary(tmp_path):
    spec = """
name: tiny
use: lasso
dims: {m: 8, n: 16}
unroll: {algorithm: proximal_gradient, layers: 2, parametrisation: lista}
data: {source: synthetic, train: 64, validation: 32, sparsity: 0.2}
train: {loss: nmse, steps: 5, batch: 32}
"""
    run = train(spec, out=tmp_path / "run", quiet=True)
    same = evaluate(run.folder, overrides=["data.sparsity=0.2"], quiet=True)
    dense = evaluate(run.folder, overrides=["data.sparsity=0.9"], quiet=True)
    a, b, c = ([row.nmse for row in r.table] for r in (run, same, dense))
    assert a == b and all(x < y for x, y in zip(b[:3], c[:3], strict=True))


def test_the_label_is_among_five_where_four_at_most_are_likelier():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(50) % 9
    likelier = (logits > logits[torch.arange(50), truth][:, None]).sum(1)

    class Net(torch.nn.Module):
        inputs = ("x",)

        def forward(self, x):
            return x

    held = Split({"x": logits}, labels=truth)
    found = labels.held_out(Net(), held, Train(batch=7))
    assert found["top5"] == pytest.approx(float((likelier < 5).double().mean())) and 0.3 < found["top5"] < 0.8
    few = Split({"x": logits[:, :5]}, labels=truth % 5)
    assert "top5" not in labels.held_out(Net(), few, Train(batch=7))
    counts = labels.confusion(Net(), held, Train(batch=7))
    pairs = list(zip(truth.tolist(), logits.argmax(1).tolist(), strict=True))
    assert all(counts[i, j] == pairs.count((i, j)) for i in range(9) for j in range(9))
