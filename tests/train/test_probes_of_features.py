"""Probes of features, each against loops or another package; the room that features take, and features that have collapsed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize

import unroll
from unroll.errors import SpecError
from unroll.spec import load
from unroll.spec.schema import Probes
from unroll.train import evaluate, features, probes, train
from unroll.train.engine import fit, read_rows
from unroll.train.run import ready
from unroll.train.samples import Split

torch.set_num_threads(1)
TINY = (
    "dims.d=12", "dims.K=2", "dims.p=6", "unroll.layers=2", "train.epochs=1", "train.warmup=2",
    "train.validate_every=3", "train.batch=80", "data.validation=220", "data.classes=[0, 1, 2, 3]", "model.head.classes=4",
)  # fmt: skip


def drawn(n: int, d: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blurred classes, a sample of zeros among them."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    z = centres[labels] + 1.5 * torch.randn(n, d, generator=draw, dtype=torch.float64)
    z[n // 2] = 0
    return z, labels


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_neighbours_are_those_of_a_loop_over_cosines(count: int, scale: float) -> None:
    (z, labels), (held, _) = drawn(61, 6, 3, 0), drawn(20, 6, 3, 1)
    found = probes.neighbours(scale * z, labels, held, Probes(neighbours=count))
    for row, own in zip(held.numpy(), found.tolist(), strict=True):
        length = np.linalg.norm(z.numpy(), axis=1) * np.linalg.norm(row)
        far = 2 - 2 * np.divide(z.numpy() @ row, length, out=np.zeros(61), where=length > 0)  # |u - v|^2
        far[np.linalg.norm(z.numpy(), axis=1) == 0] = 0 if not row.any() else 1
        near = labels.numpy()[np.argsort(far, kind="stable")[:count]]
        if row.any():
            assert own == np.bincount(near, minlength=3).argmax()
    assert len(found.unique()) == (1 if count == 10_000 else 3)


def test_the_linear_probe_is_the_minimum_of_its_loss() -> None:
    """Against L-BFGS of torch on the sum of cross entropies and 1/2 |W|^2, of features with mean 0 and spread 1."""
    (z, labels), (held, _) = drawn(80, 6, 3, 0), drawn(300, 6, 3, 1)
    z[:, 2] = 7.0  # a feature that is a constant says nothing
    found = probes.linear(z, labels, held, Probes())
    low, spread = z.mean(0), z.std(0, correction=0).clamp_min(1e-30)
    x, x_held = ((v - low) / torch.where(spread > 1e-12, spread, 1.0) for v in (z, held))
    w, b = (torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (3,)))
    optimiser = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def value() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ w.T + b, labels, reduction="sum") + w.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(value)
    expected = (x_held @ w.T + b).argmax(1)
    assert (found == expected).double().mean() > 0.99 and len(found.unique()) == 3
    assert torch.equal(found, probes.linear(1e6 * z, labels, 1e6 * held, Probes()))


@pytest.mark.parametrize("components", [1, 3, 50])
def test_the_nearest_subspace_has_the_smallest_residual_of_least_squares(components: int) -> None:
    (z, labels), (held, _) = drawn(40, 6, 3, 0), drawn(50, 6, 3, 1)
    z, labels = torch.cat([z, torch.ones(1, 6, dtype=z.dtype)]), torch.cat([labels, torch.tensor([7])])  # one sample
    found = probes.subspaces(z, labels, held, Probes(components=components))
    gaps = []
    for k in (0, 1, 2, 7):
        own = normalize(z[labels == k], dim=-1).numpy()
        mean = own.mean(0)
        axes = np.linalg.svd(own - mean)[2][: min(components, len(own) - 1, 5)].T
        rest = (normalize(held, dim=-1).numpy() - mean).T
        gaps.append(
            ((rest - axes @ np.linalg.lstsq(axes, rest, rcond=None)[0]) ** 2).sum(0) if axes.size else (rest**2).sum(0)
        )
    assert found.tolist() == [(0, 1, 2, 7)[k] for k in np.argmin(gaps, 0)]


@pytest.mark.parametrize("scale", [1e-160, 1e-6, 1e6])
@pytest.mark.parametrize("d", [1, 2, 3, 9])
def test_subspaces_tell_classes_apart_that_fill_the_space(d: int, scale: float) -> None:
    """Opposite classes of as many numbers as there are components, or fewer; of one number only its sign is left."""
    labels = torch.arange(60) % 2
    z = torch.randn(60, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    z = scale * (0.2 * z + torch.where(labels == 0, 1.0, -1.0)[:, None])
    found = probes.subspaces(z[:40], labels[:40], z[40:], Probes(components=9))
    assert (found == labels[40:]).double().mean() >= 0.9
    if d >= 3:  # samples of a class that are all the same: only their mean tells
        rows = (
            scale
            * torch.eye(3, d, dtype=torch.float64)[torch.arange(30) % 3]
            * (1 + 1e-9 * torch.rand(30, 1, dtype=torch.float64))
        )
        assert torch.equal(probes.subspaces(rows, torch.arange(30) % 3, rows, Probes()), torch.arange(30) % 3)


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-160, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("n", "d"), [(30, 5), (5, 30), (8, 8), (1, 4), (6, 1)])
def test_rank_and_rate_are_those_of_the_matrix_of_cosines(n: int, d: int, scale: float) -> None:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 0] *= 1e-3  # a direction that does not count
    if n > 4:
        z[3] = 0
    found = features.room(scale * z, 0.3)
    unit = (z / z.norm(dim=1, keepdim=True).clamp_min(1e-300)).numpy()
    kernel = np.linalg.eigvalsh(unit @ unit.T)
    assert found.rank == (np.sqrt(kernel.clip(0)) > 0.01 * np.sqrt(kernel[-1])).sum()
    assert found.rate == pytest.approx(np.linalg.slogdet(np.eye(n) + d / (n * 0.3) * unit @ unit.T)[1] / 2, rel=1e-9)
    assert found.most == min(n, d)


def test_the_same_feature_again_and_again_has_rank_one_and_none_has_rank_zero() -> None:
    z = torch.ones(9, 6, dtype=torch.float64)
    assert features.room(z, 0.5).rank == 1 and features.room(z, 0.5).collapsed
    noisy = z + 1e-4 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    assert features.room(noisy, 0.5).rank == 1
    for size, alike in ((500, True), (3000, False)):  # in the sum of squares
        found, unit = features.room(z + size * (noisy - z), 0.5), normalize(z + size * (noisy - z), dim=-1)
        assert found.rank > 1 and found.collapsed == alike
        assert found.first == pytest.approx(float(np.linalg.norm(unit.numpy(), 2) ** 2 / 9), rel=1e-9)
    nothing = features.room(torch.zeros(9, 6), 0.5)
    assert (nothing.rank, nothing.rate) == (0, 0.0) and nothing.collapsed


def test_room_of_nothing_and_of_what_is_not_finite() -> None:
    """No samples have not collapsed, and a nan is passed on, to what a table says too."""
    empty = features.room(torch.zeros(0, 4), 0.5)
    assert (empty.rank, empty.most, empty.rate) == (0, 0, 0.0) and not empty.collapsed
    z = torch.eye(4).repeat(3, 1)
    bad = features.room(z.index_fill(0, torch.tensor([2]), float("nan")), 0.5)
    assert np.isnan([bad.rank, bad.rate, bad.first]).all() and not bad.collapsed
    from unroll.spec.schema import Train
    from unroll.train.samples import Data

    samples = Split({"x": z}, labels=torch.arange(12) % 4)
    rows = lambda batches: features.together((x.inputs["x"] / 0 * 0, x.labels) for x in batches)
    found = probes._of(rows, Data("file", samples, samples), samples, Probes(), Train(batch=5))
    assert len(found) == 5 and all(np.isnan(v) for v in found.values())


def test_collapse_is_named_from_the_place_on_where_it_begins() -> None:
    rank = lambda *ranks: {f"place {k}": features.Room(r, 8, 0.5, 1 / max(r, 1)) for k, r in enumerate(ranks)}
    assert features.said(rank(1, 3, 2)) == features.said(rank(1, 1, 2)) == ""
    assert "from place 1 on: place 2 has rank 1 of 8, rate 0.5: 100.00% of it is one" in features.said(rank(2, 1, 1))
    assert "everywhere" in features.said(rank(1, 1, 1)) and "is zero for every sample" in features.said(rank(4, 0))


# --- features ---------------------------------------------------------------------------------------------------------

HEADS = {
    "class_token": ("class_token", lambda net, x: net.head_norm(x[:, 0])),
    "mean": ("mean", lambda net, x: net.head_norm(x[:, 1:].mean(1))),
    "tokens": ("tokens", lambda net, x: net.head_norm(x[:, 1:]).mean(1)),
    "no map": ("mean", lambda net, x: net.head_norm(x[:, 1:].mean(1))),
}


@pytest.mark.parametrize("case", HEADS)
def test_features_are_what_the_map_of_the_head_reads(case: str) -> None:
    kind, read = HEADS[case]
    classes = "null" if case == "no map" else "5"
    net: Any = unroll.compile(
        "crate_digits", overrides=[*TINY, f"model.head={{kind: {kind}, classes: {classes}}}"], seed=1
    )
    image = torch.rand(4, 1, 8, 8)
    expected = read(net, net.body(net.embedding(image)))
    assert torch.allclose(features.features(net, {"image": image}), expected, atol=1e-6)
    given = net(image)
    assert torch.equal(features.answer(net, {"image": image}), given.mean(1) if given.ndim == 3 else given)
    assert torch.autograd.grad(features.features(net, {"image": image}).sum(), net.embed.weight)[0].isfinite().all()


def test_features_of_hidden_patches_hide_nothing_and_of_words_are_means() -> None:
    small = ["unroll.layers=1", "model.decoder.layers.unroll.layers=1"]
    net: Any = unroll.compile("crate_mae_digits", overrides=small)
    image = torch.rand(3, 1, 8, 8)
    x = net.body(net.embedding(image, torch.zeros(3, 16, dtype=torch.bool)))
    token = net.wrapped.model.class_token is not None
    assert torch.equal(features.features(net, {"image": image}), x[:, int(token) :].mean(1))
    text: Any = unroll.compile("crate_text", overrides=["unroll.layers=1"])
    tokens = torch.randint(0, 128, (2, 7))
    found = features.features(text, {"tokens": tokens})
    assert torch.allclose(found, text.body(text.embedding(tokens)).mean(1), atol=1e-6)


# --- in a run ---------------------------------------------------------------------------------------------------------


def run(tmp_path: Any, *overrides: str) -> Any:
    return train("crate_digits", overrides=[*TINY, *overrides], out=tmp_path, quiet=True)


def test_the_table_has_what_scikit_learn_says_and_the_training_is_not_moved(tmp_path: Any) -> None:
    asked = "train.probes={on_the_way: true, neighbours: 5, components: 2}"
    found, plain = run(tmp_path / "probed", asked), run(tmp_path / "plain")
    assert all(
        torch.equal(a, b) for a, b in zip(found.net.state_dict().values(), plain.net.state_dict().values(), strict=True)
    )
    _, first = read_rows(tmp_path / "plain" / "metrics.csv"), read_rows(tmp_path / "probed" / "metrics.csv")
    trained = {row.name: row.values for row in found.table}["crate_digits, trained"]
    assert [first[-1][k] for k in ("probe_linear", "probe_neighbours", "rank", "rate")] == pytest.approx(
        [trained[k] for k in ("probe_linear", "probe_neighbours", "rank", "rate")], rel=1e-6
    )
    from unroll.train.data import make_data
    from unroll.train.samples import Shapes

    data = make_data(load("crate_digits", TINY).data, Shapes({}))
    z, held = (
        features.features(found.net, {"image": part.inputs["image"].float()}).detach().double().numpy()
        for part in (data.train.whole(), data.validation)
    )
    labels, own = data.train.whole().labels, data.validation.labels
    near = KNeighborsClassifier(5, metric="cosine").fit(z, labels).score(held, own)
    line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000)).fit(z, labels).score(held, own)
    assert trained["probe_neighbours"] == pytest.approx(near, abs=0.02)
    assert trained["probe_linear"] == pytest.approx(line, abs=0.02) and line > 0.2
    raw = {row.name: row.values for row in found.table}["the samples themselves"]
    assert raw["probe_neighbours"] > 0.95 and raw["rank"] > 40
    assert str(evaluate(tmp_path / "probed", quiet=True)).split("µs")[0] == str(found).split("µs")[0]
    with (tmp_path / "probed" / "metrics.csv").open() as file:
        assert file.readline().count("probe_") == 3


def test_features_that_are_all_alike_are_named_with_their_place(tmp_path: Any) -> None:
    from unroll.train.job import Job
    from unroll.train.run import _read_start, _write_start

    spec = load("crate_digits", [*TINY, "train.probes={kinds: []}", "train.only=[head]", "model.embed.patch=4"])
    (tmp_path / "run").mkdir()
    job = Job(tmp_path / "run", spec, {}, {}, {}, None)
    _write_start(job, ["test"])
    data, net = ready(_read_start(job.folder, None))
    made: Any = net

    def forget(module: Any, args: Any) -> None:
        if module.training and torch.is_grad_enabled():  # not while the answer is looked at, before the first step
            module.embed.weight.data.zero_()

    made.register_forward_pre_hook(forget)
    with pytest.warns(
        UserWarning, match=r"step 3: features have collapsed everywhere: the answer has rank 1 of 4"
    ) as said:
        fit(made, data, job.settings, tmp_path / "run")
    assert len(said) == 1  # once
    assert [row["rank"] for row in read_rows(tmp_path / "run" / "metrics.csv")] == [1, 1]
    found = features.rooms(made, data.validation, 64, 0.5)
    assert set(found) >= {"after layer 0", "after layer 2", "the answer"} and found["what the head reads"].most == 12


def test_probes_of_what_has_no_classes_are_refused(tmp_path: Any) -> None:
    with pytest.raises(SpecError, match="E508.*two classes or more"):
        train(
            "crate_text",
            overrides=["train.probes={}", "train.steps=1", "train.warmup=0"],
            out=tmp_path / "text",
            quiet=True,
        )
    with pytest.raises(SpecError, match="E511.*patches"):
        small = ["unroll.layers=1", "train.epochs=1", "train.batch=1500", "train.warmup=0", "train.probes={at: answer}"]
        train("crate_mae_digits", overrides=small, out=tmp_path / "mae", quiet=True)
    one = Split({"x": torch.zeros(4, 3)}, labels=torch.zeros(4, dtype=torch.long))
    from unroll.train.samples import Data

    with pytest.raises(SpecError, match="E508"):
        probes.check(Probes(), Data("file", one, one))
    two = Split({"x": torch.zeros(4, 3)}, labels=torch.arange(4) % 2)
    probes.check(Probes(), Data("file", two, two))
    with pytest.raises(SpecError, match="E508.*the 1 that are drawn are of fewer than two classes"):
        probes.check(Probes(samples=1), Data("file", two, two))
