"""Samples unlike those of the training in the closing table, stages whose rates fall, and matrices with outliers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import unroll
from unroll.errors import SpecError
from unroll.spec import load
from unroll.spec.schema import LowRank, Train
from unroll.train import resume, train
from unroll.train.data import make_data
from unroll.train.engine import Stage, plan, rate
from unroll.train.samples import Shapes

SMALL = (
    "dims.m=12", "dims.n=20", "unroll.layers=3", "data.train=64", "data.validation=40", "data.sparsity=0.1", "train.batch=32",
    "train.baselines=[fista]",
)  # fmt: skip


def run(tmp_path: Any, name: str, *overrides: str) -> Any:
    return train(name, overrides=(*SMALL, *overrides), out=tmp_path / "run", device="cpu", quiet=True)


def test_the_table_has_rows_of_other_samples(tmp_path: Any) -> None:
    """Each against the network called on samples made by hand from the matrix of that entry."""
    asked = "{same: {}, dense: {data: {sparsity: 0.9}}, noisy: {data: {snr: 0.0}}, other_A: {perturb: {A: 0.5}}, deeper: {layers: 30}}"
    found = run(
        tmp_path, "hyper_lista", f"train.evaluate={asked}", "train.search.grid={c1: [0.02]}", "train.search.rounds=1"
    )
    rows = {row.name: row for row in found.table}
    own = {n: rows[f"{n}: hyper_lista, trained"].nmse_db for n in ("same", "dense", "noisy", "other_A", "deeper")}
    base = rows["hyper_lista, trained"]
    assert base.nmse_db == pytest.approx(10 * math.log10(base.nmse))
    assert abs(own["same"] - base.nmse_db) < 3 and own["same"] != base.nmse_db  # other samples of the same kind
    assert min(own["dense"], own["noisy"], own["other_A"]) > own["same"] + 1
    plain = {n: rows[f"{n}: fista, 3 iterations"].nmse for n in ("same", "deeper")}
    assert plain["deeper"] < plain["same"]
    A, net = found.net.given["A"], found.net
    shapes = Shapes({"x": (12,)}, {"z": (20,)}, {"A": (12, 20)})
    settings = load("hyper_lista", overrides=SMALL).data.model_copy(update={"seed": 7919, "snr": 0.0})
    held = make_data(settings, shapes, {"A": A}).validation
    z, x = held.targets["z"], held.inputs["x"].float()
    error = lambda codes: float((codes.detach() - z).square().sum() / z.square().sum())
    assert rows["noisy: hyper_lista, trained"].nmse == pytest.approx(error(net(x)), rel=1e-4)
    clean = make_data(settings.model_copy(update={"snr": None}), shapes, {"A": A}).validation
    z, x = clean.targets["z"], clean.inputs["x"].float()
    assert rows["deeper: hyper_lista, trained"].nmse == pytest.approx(error(net(x, layers=30)), rel=1e-4)
    assert rows["same: hyper_lista, trained"].nmse == pytest.approx(error(net(x)), rel=1e-4) != error(net(x, layers=30))


def test_a_depth_that_is_fixed_is_said(tmp_path: Any) -> None:
    found = run(tmp_path, "alista", "train.steps=8", "train.evaluate={deeper: {layers: 5}}")
    assert any("its depth is fixed" in note for note in found.closing.notes)
    assert [row.name for row in found.table if row.name.startswith("deeper")] == ["deeper: fista, 3 iterations"]


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        ("{a: {data: {sparsty: 0.1}}}", "E511", "evaluate: a: data: sparsty"),
        ("{a: {perturb: {B: 0.1}}}", "E511", "'B' is no parameter"),
        ("{a: {data: {sparsity: 2.0}}}", "E511", "less than or equal to 1"),
    ],
)
def test_what_it_cannot_do_is_refused_before_training(tmp_path: Any, asked: str, code: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"{code}.*{message}"):
        run(tmp_path, "alista", f"train.evaluate={asked}")
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_files_have_no_other_samples(tmp_path: Any) -> None:
    torch.save(torch.randn(10, 12), tmp_path / "x.pt")
    files = (
        f"data={{source: file, files: {{x: {tmp_path / 'x.pt'}}}}}",
        "train.evaluate={a: {}}",
        "train.loss=objective",
    )
    with pytest.raises(SpecError, match="E508.*source 'file' has no others with true codes"):
        train(
            "step_lista",
            overrides=("dims.m=12", "dims.n=20", *files),
            parameters={"A": torch.eye(12, 20)},
            out=tmp_path / "run",
            quiet=True,
        )


def test_each_stage_is_trained_again_at_lower_rates() -> None:
    """Chen, Liu, Wang & Yin 2018, section 4: the rate, then 0.2 and 0.02 of it."""
    settings = Train(stages="layerwise", refine=0.25, falls=(0.2, 0.02))
    stages = plan(settings, 2, 80)
    cuts = [(s.depth, s.start, s.stop, s.share) for s in stages]
    assert cuts == [
        (1, 0, 10, 1),
        (1, 10, 20, 0.2),
        (1, 20, 30, 0.02),
        (2, 30, 40, 1),
        (2, 40, 50, 0.2),
        (2, 50, 60, 0.02),
        (2, 60, 80, 1),
    ]
    assert [rate(settings, s, s.start, 0.0) for s in stages] == [1, 0.2, 0.02, 1, 0.2, 0.02, 1]
    assert rate(settings, Stage(2, 60, 80, True, 0.5), 70, 0.5) == pytest.approx(0.25)
    with pytest.raises(SpecError, match="5 steps are too few for 6 stages, 3 per layer"):
        plan(settings, 2, 7)


def test_a_low_rank_matrix_with_outliers_is_what_is_said() -> None:
    shapes = Shapes({"Y": (30, 40)}, {"L": (3, 40), "R": (3, 30), "S": (30, 40)})
    data = make_data(LowRank(source="low_rank", train=5, validation=4, outliers=0.2, size=2.0, seed=3), shapes)
    again = make_data(LowRank(source="low_rank", train=5, validation=4, outliers=0.2, size=2.0, seed=3), shapes)
    y, low = data.validation.inputs["Y"], data.validation.targets["L @ R.T"]
    assert torch.equal(y, again.validation.inputs["Y"]) and y.shape == low.shape == (4, 30, 40)
    assert torch.linalg.matrix_rank(low).tolist() == [3] * 4 and torch.allclose(
        low.abs().amax((-2, -1)), torch.ones(4, dtype=low.dtype)
    )
    errors = y - low
    assert abs(float((errors != 0).double().mean()) - 0.2) < 0.02 and 1.9 < float(errors.abs().max()) <= 2
    with pytest.raises(SpecError, match="E507.*no such Y, L and R"):
        make_data(LowRank(source="low_rank"), Shapes({"Y": (30, 40)}, {"L": (3, 40)}))


def test_learned_robust_pca_trains_from_its_spec(tmp_path: Any) -> None:
    small = (
        "dims.m=30",
        "dims.n=40",
        "dims.r=2",
        "unroll.layers=6",
        "data.train=8",
        "data.validation=3",
        "data.outliers=0.05",
    )
    found = train("lrpca", overrides=(*small, "train.steps=24"), out=tmp_path / "run", device="cpu", quiet=True)
    rows = {row.name.split(",")[0]: row for row in found.table}
    assert rows["lrpca"].nmse < rows["untrained (= scaled_gradient"].nmse < 1
    data = make_data(
        load("lrpca", overrides=small).data, Shapes({"Y": (40, 30)}, {"L": (2, 30), "R": (2, 40)})
    ).validation
    l, r, _ = (v.detach() for v in found.net(data.inputs["Y"].float()))
    low = data.targets["L @ R.T"]
    by_hand = ((l.mT @ r).mT - low).square().sum() / low.square().sum()
    assert rows["lrpca"].nmse == pytest.approx(float(by_hand), rel=1e-3)
    assert unroll.compile("lrpca").layers == 16


def test_a_folder_names_the_text_that_was_chosen_and_goes_on_with_it(tmp_path: Any) -> None:
    """`auto` is settled in the spec of the run, which resumed in two parts ends as in one."""
    auto = ("unroll.algorithm=auto", "train.stages=end_to_end", "train.schedule=constant", "train.keep=last")
    whole = run(tmp_path / "whole", "alista", *auto, "train.steps=8")
    assert load(str(whole.folder / "spec.yaml")).unroll.algorithm == "proximal_gradient"
    part = run(tmp_path / "part", "alista", *auto, "train.steps=4")
    found = resume(part.folder, overrides=["train.steps=8"], quiet=True)
    for a, b in zip(whole.net.parameters(), found.net.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert found.net.spec.unroll.algorithm == "proximal_gradient"
