"""Declared objectives as the loss of a training: what is given to them, teachers, views, and what is refused."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import unroll
from unroll.errors import SpecError
from unroll.spec import Spec, load
from unroll.spec.schema import Teacher, Train, View
from unroll.train import evaluate, train
from unroll.train.data import make_data
from unroll.train.declared import Objective, held_out, objective
from unroll.train.engine import fit, follow, momentum, read_rows
from unroll.train.samples import Data, Shapes, Split
from unroll.train.views import changed, draws, views

torch.set_num_threads(1)
TINY = (
    "dims.d=12", "dims.K=2", "dims.p=6", "unroll.layers=1", "train.steps=4", "train.batch=20", "train.validate_every=2", "train.lr=0.003",
    "train.probes={kinds: []}", "data.validation=20", "data.classes=[0, 1, 2, 3]", "model.head.classes=5",
)  # fmt: skip
MCR2 = "train.loss={objective: {use: mcr2, scalars: {eps2: 0.3}}, takes: {Z: {of: network}, Pi: {of: OF}}}"
SIMDINO = (
    "train.loss={objective: {use: simdino}, takes: {S: {of: network, views: wide}, S_local: {of: network, views: local}, "
    "T: {of: teacher, views: wide}}}",
    "train.views={wide: {count: 2, area: [0.5, 1], noise: 0.1}, local: {count: 3, area: [0.2, 0.5]}}",
)
CASES = {
    "labels": (MCR2.replace("OF", "labels"), "train.views={all: {count: 2, noise: 0.1}}"),
    "samples": (MCR2.replace("OF", "samples"), "train.views={all: {count: 3, noise: 0.1}}"),
    "teacher": (*SIMDINO, "train.teacher={momentum: 0.5}"),
}


def tiny(*overrides: str) -> Spec:
    document = load("crate_digits").to_dict()
    return load({**document, "train": {}}, [*TINY, *overrides])


def made(*overrides: str, seed: int = 0) -> tuple[Any, Data, Train]:
    spec = tiny(*overrides)
    assert spec.data is not None and spec.train is not None
    return copy.deepcopy(network(seed)), make_data(spec.data, Shapes({})), spec.train


@cache
def network(seed: int) -> Any:
    return unroll.compile(tiny(), seed=seed)


def first(data: Data, count: int = 8) -> Split:
    return data.train.whole()[:count].to(torch.float32)


def rate(z: torch.Tensor, eps2: float) -> torch.Tensor:
    """1/2 log det (I + d/(n eps2) Z'Z) of rows z (n, d)."""
    n, d = z.shape
    return torch.linalg.slogdet(torch.eye(d, dtype=z.dtype) + d / (n * eps2) * z.T @ z)[1] / 2


# --- what the objective is given -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["labels", "samples"])
def test_rate_reduction_is_of_all_views_at_length_one_and_its_classes_are_labels_or_samples(case: str) -> None:
    net, data, settings = made(*CASES[case])
    batch, declared = first(data), objective(settings)
    value = declared.value(net, net, batch, draws(0, 5))
    seen = views(batch.inputs["image"], settings.views["all"], draws(0, 5))
    assert len(seen) == (2 if case == "labels" else 3)
    z = normalize(torch.cat([net(x) for x in seen]).double(), dim=-1)
    labels = batch.labels if case == "labels" else torch.arange(8)
    assert labels is not None
    members = labels.repeat(len(seen))
    inside = sum((members == k).sum() / len(z) * rate(z[members == k], 0.3) for k in members.unique())
    assert value.item() == pytest.approx(-(rate(z, 0.3) - inside).item(), rel=1e-3)
    (slope,) = torch.autograd.grad(value, net.head.weight)
    assert slope.isfinite().all() and slope.abs().max() > 1e-4


def test_simdino_gets_views_of_the_network_and_of_its_teacher_which_takes_no_slope() -> None:
    net, data, settings = made(*CASES["teacher"])
    teacher, _, _ = made(*CASES["teacher"], seed=1)
    batch, x = first(data), first(data).inputs["image"]
    found = objective(settings).terms(net, teacher, batch, draws(0, 2))
    draw = draws(0, 2)
    wide, local = (views(x, settings.views[name], draw) for name in ("wide", "local"))
    s, t = (
        normalize(torch.stack([net(v) for v in (*wide, *local)]), dim=-1),
        normalize(torch.stack([teacher(v) for v in wide]), dim=-1),
    )
    pairs = [(s[j] * t[i]).sum(-1).mean() for i in range(2) for j in range(5) if i != j]
    assert found["alignment"].item() == pytest.approx(-torch.stack(pairs).mean().item(), rel=1e-5)
    both = torch.stack([rate(s[v].double(), 0.5) for v in range(2)]).mean()
    assert found["rate"].item() == pytest.approx(-(5 + 8) / (5 * 8) * both.item(), rel=1e-5)
    objective(settings).value(net, teacher, batch, draws(0, 2)).backward()
    _, _, taught = made(
        CASES["labels"][0].replace("of: network", "of: teacher")
    )  # an objective that stops no slope by itself
    assert not objective(taught).value(net, teacher, batch, draws(0, 2)).requires_grad
    assert all(p.grad is None for p in teacher.parameters()) and net.embed.weight.grad.abs().max() > 0


def test_features_may_be_those_before_the_head_and_there_may_be_no_local_views() -> None:
    net, data, settings = made(
        SIMDINO[0].replace("{of: network, views: wide}", "{of: network, views: wide, at: answer}"),
        SIMDINO[1].replace("count: 3", "count: 0"),
    )
    found = objective(settings).terms(net, net, first(data), draws(0, 0))
    assert all(v.isfinite() for v in found.values())
    net, data, settings = made(CASES["labels"][0].replace("Z: {of: network}", "Z: {of: network, at: features}"))
    kept = list[torch.Tensor]()
    net.head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    value = objective(settings).terms(net, net, first(data), draws(0, 0))["rate"]
    assert value.item() == pytest.approx(rate(normalize(kept[0].double(), dim=-1), 0.3).item(), rel=1e-5)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["labels", "teacher"])
def test_it_trains_resumes_bit_for_bit_and_its_terms_are_in_the_log(case: str, tmp_path: Any) -> None:
    whole, data, settings = made(*CASES[case])
    held = held_out(whole, data.validation.to(torch.float32), settings)
    fit(whole, data, settings, tmp_path / "whole")
    after = held_out(whole, data.validation.to(torch.float32), settings)
    assert after["held_out"] < held["held_out"] - 1e-4
    rows = read_rows(tmp_path / "whole" / "metrics.csv")
    named = {k for k in rows[0] if k.startswith("term_")}
    assert named == {f"term_{n}" for n in objective(settings).loss.recipe.problem.terms}
    assert rows[-1]["held_out"] == pytest.approx(after["held_out"], rel=1e-4)

    cut, again, steps = made(*CASES[case])[0], made(*CASES[case])[0], 0

    def stop(module: nn.Module, args: Any) -> None:
        nonlocal steps
        steps += module.training and torch.is_grad_enabled()
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
            steps += 1

    cut.register_forward_pre_hook(stop)
    assert fit(cut, data, settings, tmp_path / "cut").status == "interrupted"
    torch.manual_seed(99)
    assert fit(again, data, settings, tmp_path / "cut", resume=True).status == "done"
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    without = lambda where: [
        {k: v for k, v in row.items() if k != "seconds"} for row in read_rows(tmp_path / where / "metrics.csv")
    ]
    assert without("whole") == without("cut")


def test_a_teacher_follows_by_a_cosine_from_its_momentum_to_its_end() -> None:
    settings = Train(teacher=Teacher(momentum=0.9, end=1.0))
    assert [momentum(settings, s) for s in (0, 0.5, 1, 2)] == pytest.approx([0.9, 0.95, 1, 1])
    assert momentum(settings, 0.25) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2)
    teacher, net = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.running_mean.fill_(7.0)
        follow(teacher, net, 0.75)
    assert teacher.weight.tolist() == [1.5] * 3 and teacher.running_mean.tolist() == [7.0] * 3


@pytest.mark.parametrize("kept", ["teacher", "network"])
def test_a_teacher_that_never_moves_is_the_start_and_one_that_is_the_network_changes_nothing(
    kept: str, tmp_path: Any
) -> None:
    weights = {}
    for m in (0.0, 1.0):
        net, data, settings = made(
            *SIMDINO, f"train.teacher={{momentum: {m}, end: {m}, kept: {kept}}}", "train.keep=last"
        )
        start = {k: v.clone() for k, v in net.state_dict().items()}
        fit(net, data, settings, tmp_path / str(m))
        weights[m] = net.state_dict()
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(weights[1.0], start) == (kept == "teacher") and not same(weights[0.0], start)


def test_what_the_run_folder_holds_needs_no_other_file(tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text("use: mcr2\nscalars: {eps2: 0.3}\n", encoding="utf-8")
    loss = (
        CASES["samples"][0].removeprefix("train.loss=").replace("{use: mcr2, scalars: {eps2: 0.3}}", "{use: mine.yaml}")
    )
    text = f"use: plain.yaml\ntrain:\n  loss: {loss}\n  views: {{all: {{count: 2, noise: 0.1}}}}\n"
    (tmp_path / "plain.yaml").write_text(tiny().to_yaml(), encoding="utf-8")
    (tmp_path / "net.yaml").write_text(text, encoding="utf-8")
    found = train(
        tmp_path / "net.yaml", overrides=["train.loss.objective.scalars.gam1=2.0"], out=tmp_path / "run", quiet=True
    )
    (tmp_path / "mine.yaml").unlink()
    again = evaluate(tmp_path / "run", quiet=True)
    assert str(again).split("µs")[0] == str(found).split("µs")[0]
    kept = load(tmp_path / "run" / "spec.yaml").train
    assert (
        kept is not None and objective(kept).loss.scalars["gam1"] == 2.0 and objective(kept).loss.scalars["eps2"] == 0.3
    )
    rows = {row.name: row.values for row in found.table}
    assert set(rows["untrained"]) >= {"term_rate", "term_class_rate", "rank", "rate"}
    assert rows["net, trained"]["term_rate"] > rows["untrained"]["term_rate"]


# --- views -----------------------------------------------------------------------------------------------------------


def ramp(height: int = 8, width: int = 8) -> torch.Tensor:
    """Images whose value is the column, -1 .. 1 at the borders."""
    return ((torch.arange(width) + 0.5) * 2 / width - 1).expand(64, 1, height, width).contiguous()


def test_views_depend_on_seed_and_step_alone_and_each_sample_has_its_own() -> None:
    wanted = View(count=2, area=(0.3, 0.9), turn=20, flip=True, contrast=0.2, brightness=0.1, noise=0.1)
    one, two, other = (views(ramp(), wanted, draws(s, k)) for s, k in ((0, 3), (0, 3), (0, 4)))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0][0], one[0][1])
    assert torch.equal(changed(ramp(), View(), draws(0, 0)), ramp())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_what_is_cut_out_has_the_share_of_the_area_that_is_asked_for(height: int, width: int) -> None:
    x = ramp(height, width)
    found = changed(x, View(area=(0.25, 0.25)), draws(0, 0))
    slopes = (found[:, 0, 0, 1:-1].diff(dim=-1) / (2 / width)).mean(-1)  # half the width over the whole view
    assert (
        slopes == pytest.approx(0.5 * torch.ones(64), abs=0.06) and found.std(0).max() > 0.1
    )  # at places of their own
    wide = changed(x, View(area=(0.25, 0.25), aspect=(4.0, 4.0)), draws(0, 0))
    assert torch.allclose(wide, x, atol=0.1)  # as wide as the image
    mirrored = changed(x, View(flip=True), draws(0, 0))
    share = torch.isclose(mirrored, -x, atol=1e-5).all((1, 2, 3)).float().mean()
    assert 0.3 < share < 0.7 and torch.isclose(mirrored.abs(), x.abs(), atol=1e-5).all()


def test_a_turn_is_one_of_pixels() -> None:
    dot = torch.zeros(200, 1, 9, 15)
    dot[:, :, 4, 11] = 1  # four columns right of the middle
    found = changed(dot, View(turn=90), draws(0, 0))
    rows, columns = torch.meshgrid(torch.arange(9.0) - 4, torch.arange(15.0) - 7, indexing="ij")
    mass = found.sum((1, 2, 3)).clamp_min(1e-6)
    far = ((found[:, 0] * rows).sum((1, 2)).square() + (found[:, 0] * columns).sum((1, 2)).square()).sqrt() / mass
    inside = mass > 0.5
    assert inside.float().mean() > 0.8 and torch.allclose(far[inside], torch.tensor(4.0), atol=0.4)


def test_light_noise_and_hidden_entries_are_as_large_as_said() -> None:
    x = torch.rand(400, 30)
    light = changed(x, View(contrast=0.5), draws(0, 0))
    factor = (light - x.mean(1, keepdim=True)).norm(dim=1) / (x - x.mean(1, keepdim=True)).norm(dim=1)
    assert 0.5 <= factor.min() < 0.55 and 1.45 < factor.max() <= 1.5 + 1e-5
    higher = (changed(x, View(brightness=0.2), draws(0, 0)) - x).mean(1)
    assert -0.2 <= higher.min() < -0.18 and 0.18 < higher.max() <= 0.2
    assert (changed(x, View(noise=0.3), draws(0, 0)) - x).std() == pytest.approx(0.3, rel=0.03)
    assert (changed(x + 1, View(hide=0.25), draws(0, 0)) == 0).float().mean() == pytest.approx(0.25, rel=0.1)


# --- what is refused -------------------------------------------------------------------------------------------------

TAKES = "train.loss={objective: {use: mcr2}, takes: {%s}}"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown argument": (lambda: (TAKES % "Z: {of: network}, Pi: {of: labels}, X: {of: network}",), "E511.*'X' is nothing that mcr2 takes"),
    "a missing argument": (lambda: (TAKES % "Z: {of: network}",), "E511.*does not say what Pi is"),
    "an unknown view": (lambda: (TAKES % "Z: {of: network, views: a}, Pi: {of: samples}",), "E511.*there are no views a"),
    "a view for nothing": (lambda: (*SIMDINO[:1], "train.views={wide: {}, local: {}, more: {}}"), "E511.*nothing takes more"),
    "views of another loss": (lambda: ("train.views={a: {}}",), "E511.*views: is for a declared loss"),
    "a teacher of another loss": (lambda: ("train.teacher={}",), "E511.*teacher: is for a declared loss"),
    "a teacher for nothing": (lambda: (CASES["labels"][0], "train.teacher={}"), "E511.*nothing is taken of a teacher"),
    "a teacher and averages": (lambda: (*CASES["teacher"], "train.ema=0.9"), "E511.*the teacher is the mean"),
    "label smoothing": (lambda: (CASES["labels"][0], "train.label_smoothing=0.1"), "E511.*label_smoothing: means nothing"),
    "a constraint": (
        lambda: ("train.loss={objective: {use: mcr2, constraints: ['Z in nonneg']}, takes: {Z: {of: network}, Pi: {of: labels}}}",),
        "E511.*nothing here keeps the constraint Z in nonneg",
    ),
    "parts of a batch": (lambda: (CASES["labels"][0], "train.accumulate=2"), "E511.*no mean over samples"),
    "sizes": (lambda: (TAKES % "Z: {of: network}, Pi: {of: network}",), "E512.*Pi has shape"),
    "a key of a view": (lambda: (*SIMDINO[:1], "train.views={wide: {cont: 2}, local: {}}"), "E2.*cont"),
    "no such objective": (lambda: ("train.loss={objective: {use: mcr3}, takes: {Z: {of: network}}}",), "E003.*mcr3|mcr3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(case: str, tmp_path: Any) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(SpecError, match=message) as said:
        train(tiny(*overrides()), out=tmp_path / "run", quiet=True)
    assert "must be 'mse'" not in str(said.value) and not (tmp_path / "run" / "metrics.csv").exists()


def test_a_batch_that_is_spread_over_devices_is_refused(tmp_path: Any) -> None:
    net, data, settings = made(*CASES["samples"])
    with pytest.raises(SpecError, match="E511.*over the whole batch"):
        fit(net, data, settings, tmp_path, device="cpu", devices=2)


def test_views_of_images_need_images_and_labels_need_classes() -> None:
    net, _, settings = made(*CASES["labels"][:1], "train.views={all: {area: [0.5, 1.0]}}")
    flat = Split({"image": torch.rand(4, 64)}, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(SpecError, match="E512.*area, aspect, turn and flip are of images"):
        objective(settings).terms(net, net, flat, draws(0, 0))
    words = Split({"image": torch.ones(4, 8, dtype=torch.long)})
    with pytest.raises(SpecError, match="E512.*one input of numbers"):
        objective(settings).terms(net, net, words, draws(0, 0))
    assert isinstance(objective(settings), Objective)
    bare = Data("file", Split({"image": torch.rand(9, 1, 8, 8)}), Split({"image": torch.rand(9, 1, 8, 8)}))
    from unroll.train.tasks import find_task

    with pytest.raises(SpecError, match="E508.*needs labels"):
        find_task(settings, bare)
    own = find_task(made(*CASES["samples"])[2], bare)  # needs none
    assert [c.key for c in own.columns][:2] == ["rank", "rate"]


@pytest.mark.parametrize("word", ["area", "aspect"])
def test_ends_of_a_view_that_are_the_wrong_way_round_are_refused(word: str) -> None:
    with pytest.raises(SpecError, match=rf"E511.*views: all: {word}: the smaller one comes first"):
        objective(load("mcr2_digits", [f"train.views={{all: {{{word}: [1.0, 0.2]}}}}"]).train)


def test_of_no_samples_there_are_views_and_no_objective() -> None:
    none = torch.zeros(0, 3, 8, 6)
    for view in (View(area=(0.2, 1.0)), View(contrast=0.5, brightness=0.1), View(noise=0.1, hide=0.1), View(flip=True)):
        assert [x.shape for x in views(none, view, draws(0, 0))] == [none.shape]
    for case in ("labels", "samples"):
        net, data, settings = made(*CASES[case])
        with pytest.raises(SpecError, match="E512.*batch without samples"):
            objective(settings).terms(net, net, first(data, 0), draws(0, 0))
