"""From a spec to a run folder: what is in it, what the table says, and going on from it."""

import json
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import unroll
from unroll.errors import SpecError, UnrollError
from unroll.network.network import Network
from unroll.pages.page import report
from unroll.spec import load
from unroll.train import Interrupted, evaluate, resume, train, trained
from unroll.train.data import make_data
from unroll.train.run import _read_start, _refuse_others, prepare, shapes_of

torch.set_num_threads(1)

SPEC = """
name: tiny
use: lasso
dims: {m: 8, n: 16}
unroll: {algorithm: proximal_gradient, layers: 3, parametrisation: lista}
data: {source: synthetic, train: 256, validation: 64, sparsity: 0.2}
train: {loss: objective, epochs: 3, batch: 32, precision: float64}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(SPEC, out=tmp_path_factory.mktemp("runs") / "tiny", quiet=True)


def test_a_run_folder_holds_all_that_was_promised(run):
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "spec.yaml",
        "run.json",
        "weights.safetensors",
        "metrics.csv",
        "curves.png",
        "table.json",
        "checkpoints",
    }
    assert (run.folder / "checkpoints" / "last.ckpt").exists() and not list(run.folder.rglob("*.part"))
    assert json.loads((run.folder / "run.json").read_text())["versions"]["torch"] == torch.__version__
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run.status, run.steps) == ("done", 24)


def test_the_table_ranks_training_above_no_training_and_nothing_above_the_optimum(run):
    untrained, fista, trained, best = run.table
    assert trained.objective < untrained.objective and fista.objective < untrained.objective
    assert best.gap == 0 <= min(row.gap for row in run.table)
    assert "untrained (= proximal_gradient, 3 iterations)" in str(run) and "NMSE (sum ratio)" in str(run)
    assert json.loads((run.folder / "table.json").read_text())["rows"][2]["objective"] == trained.objective


def test_the_untrained_row_is_the_iteration_written_by_hand(run):
    given, held = run.net.given["A"], load_file(run.folder / "optimum_validation.safetensors")
    step = 1 / torch.linalg.matrix_norm(given, 2) ** 2
    spec = load(run.folder / "spec.yaml")
    x = make_data(spec.data, shapes_of(spec, {}), {"A": given}).validation.inputs["x"]
    z = torch.zeros(len(x), 16, dtype=torch.float64)
    for _ in range(3):
        v = z - step * (z @ given.mT - x) @ given
        z = v.sign() * (v.abs() - step * 0.1).clamp_min(0)
    value = (x - z @ given.mT).square().sum(1) / 2 + 0.1 * z.abs().sum(1)
    assert run.table[0].objective == pytest.approx(value.mean().item(), rel=1e-9)
    assert run.table[0].gap == pytest.approx((value - held["objective"]).mean().item(), rel=1e-6)


def test_measuring_a_run_again_gives_the_same_table(run):
    again = evaluate(run.folder, quiet=True)
    rows = [[(r.nmse, r.nmse_mean_db, r.objective, r.gap, r.f1) for r in each.table[:3]] for each in (run, again)]
    assert rows[0] == [pytest.approx(row, rel=1e-12) for row in rows[1]]


def test_ctrl_c_saves_and_resume_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    forward, calls = Network.forward, []

    def forward_once_interrupted(self, *args, **start):
        calls.append(self.training)
        if calls.count(True) == 11:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **start)

    monkeypatch.setattr(Network, "forward", forward_once_interrupted)
    with pytest.raises(Interrupted, match=r"saved after \d+ steps; go on with\s+unroll train --resume"):
        train(SPEC, out=tmp_path / "cut", quiet=True)
    monkeypatch.setattr(Network, "forward", forward)
    assert not (tmp_path / "cut" / "weights.safetensors").exists()
    resume(tmp_path / "cut", quiet=True)
    whole, cut = (load_file(folder / "weights.safetensors") for folder in (run.folder, tmp_path / "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_dictionary_is_learned_when_the_spec_asks_and_kept(tmp_path):
    spec = SPEC.replace("sparsity: 0.2", "sparsity: 0.2, dictionary: {learn: A, rounds: 3, batch: 64}")
    found = train(spec, overrides=["train.epochs=1"], out=tmp_path / "run", quiet=True)
    A = load_file(tmp_path / "run" / "given.safetensors")["A"]
    assert torch.equal(A, found.net.given["A"]) and torch.allclose(A.norm(dim=0), torch.ones(16, dtype=A.dtype))


@pytest.mark.parametrize("call", [resume, evaluate])
def test_a_folder_without_a_run_is_refused(tmp_path, call):
    with pytest.raises(SpecError) as caught:
        call(tmp_path, quiet=True)
    assert caught.value.code == "E510"


def go_on(folder):
    return resume(folder, quiet=True)


def measure_again(folder):
    return evaluate(folder, quiet=True)


def page(folder):
    return report(folder, folder.parent / "page.html")


DAMAGED = {
    "run.json": (go_on, measure_again, trained, page),
    "spec.yaml": (go_on, measure_again, trained),
    "given.safetensors": (go_on, measure_again, trained, page),
    "weights.safetensors": (measure_again, trained, page),
    "table.json": (measure_again, page),
    "optimum_validation.safetensors": (go_on, measure_again),
    "metrics.csv": (go_on, page),
    "checkpoints/last.ckpt": (go_on,),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_run_is_named(run, tmp_path, name):
    """Cut short, or, of the spec, another one."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    whole = (folder / name).read_bytes()
    end = whole.rindex(b",") if name == "metrics.csv" else len(whole) * 2 // 3
    cut = whole.replace(b"layers: 3", b"layers: 4") if name == "spec.yaml" else whole[:end]
    (folder / name).write_bytes(cut)
    for call in DAMAGED[name]:
        with pytest.raises(SpecError, match=re.escape(str(folder / name))) as caught:
            call(folder)
        assert caught.value.code == "E510" and "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["{}", "[1]", "", '{"spec_sha256": "", "dims": 3, "scalars": {}}'])
def test_a_record_of_something_else_is_refused(run, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "spec.yaml").write_bytes((run.folder / "spec.yaml").read_bytes())
    with pytest.raises(SpecError, match=r"run\.json' cannot be read") as caught:
        resume(tmp_path, quiet=True)
    assert caught.value.code == "E510"


def test_a_run_without_its_weights_is_not_finished(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.raises(SpecError, match="is not finished"):
        evaluate(tmp_path / "run", quiet=True)


def test_a_folder_with_a_run_is_not_written_over(run):
    with pytest.raises(SpecError, match="holds a run already"):
        train(SPEC, out=run.folder, quiet=True)


def test_a_spec_without_data_is_refused(tmp_path):
    text = "\n".join(line for line in SPEC.splitlines() if not line.startswith("data:"))
    with pytest.raises(SpecError, match="has no section 'data:'"):
        train(text, out=tmp_path / "run", quiet=True)


def test_a_resumed_run_in_float32_sees_the_same_samples(tmp_path):
    """The matrix that made them is kept as it was, not as the network rounds it."""
    train(SPEC, overrides=["train.precision=float32", "train.epochs=1"], out=tmp_path / "run", quiet=True)
    job = _read_start(tmp_path / "run", None)
    again, first = prepare(job)[0], prepare(replace(job, given={}))[0]
    assert again.train.inputs["x"].dtype == torch.float32
    assert torch.equal(again.train.inputs["x"], first.train.inputs["x"])


def test_the_network_of_a_run_comes_back_from_its_folder(tmp_path):
    spec = {
        "use": "lasso", "dims": {"m": 6, "n": 8}, "unroll": {"algorithm": "proximal_gradient", "layers": 2, "parametrisation": "lista"},
        "data": {"source": "synthetic", "train": 64, "validation": 16}, "train": {"steps": 3, "batch": 16},
    }  # fmt: skip
    run = train(spec, out=tmp_path / "run", quiet=True)
    net = unroll.restore(tmp_path / "run")
    x = torch.randn(3, 6)
    assert torch.equal(net(x), run.net(x))


# --- own data, variables that have no targets, tables that fail -------------------------------------------------------


def own(folder, **more):
    """A problem whose input comes from a file, and a parameter from none."""
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(64, 8)))
    data = {"source": "file", "files": {"x": str(folder / "x.npy"), **more.pop("files", {})}, "validation": 8}
    return {
        "use": "lasso", "dims": {"m": 8, "n": 16}, "data": data, "train": {"loss": "objective", "steps": 2, "batch": 8},
        "unroll": {"algorithm": "proximal_gradient", "layers": 2, "parametrisation": "lista"}, **more,
    }  # fmt: skip


def test_an_input_that_is_not_what_it_is_declared_to_be_is_refused(tmp_path):
    spec = own(
        tmp_path,
        inputs={"x": {"shape": ["m"], "positive": True}},
        parameters={"A": {"shape": ["m", "n"], "init": "gaussian"}},
    )
    with pytest.raises(unroll.UnrollError, match="E403.*'x' is declared positive"):
        train(spec, out=tmp_path / "run", quiet=True)


def test_a_parameter_without_a_file_is_refused_unless_the_spec_asks_for_a_draw(tmp_path):
    with pytest.raises(SpecError, match="no file for the parameter A") as refused:
        train(own(tmp_path), out=tmp_path / "run", quiet=True)
    assert refused.value.code == "E507" and refused.value.where is not None and "init: gaussian" in refused.value.hint
    assert not (tmp_path / "run").exists()
    A = np.random.default_rng(1).normal(size=(8, 16))
    np.save(tmp_path / "A.npy", A)
    filed = train(own(tmp_path, files={"A": str(tmp_path / "A.npy")}), out=tmp_path / "filed", quiet=True)
    given = train(own(tmp_path), parameters={"A": torch.from_numpy(A)}, out=tmp_path / "given", quiet=True)
    drawn = {"parameters": {"A": {"shape": ["m", "n"], "init": "gaussian"}}}
    asked = train(own(tmp_path, **drawn), out=tmp_path / "asked", quiet=True)
    assert torch.equal(filed.net.given["A"], given.net.given["A"])
    assert not torch.equal(filed.net.given["A"], asked.net.given["A"])


def test_a_run_that_was_refused_leaves_no_folder_and_takes_none_away(tmp_path):
    wrong = own(tmp_path, files={"A": str(tmp_path / "A.npy")})
    np.save(tmp_path / "A.npy", np.zeros((3, 3)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for out in (tmp_path / "new", tmp_path / "mine"):
        with pytest.raises(SpecError, match="E504"):
            train(wrong, out=out, quiet=True)
    assert not (tmp_path / "new").exists() and (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_samples_longer_than_the_model_reads_are_shown_in_the_spec(tmp_path):
    with pytest.raises(SpecError, match="longer than the model reads") as refused:
        train("crate_text", overrides=["data.length=65", "model.embed.length=64"], out=tmp_path / "run", quiet=True)
    assert refused.value.where is not None and "65" in refused.value.where.excerpt
    assert not (tmp_path / "run").exists()


CARRIED = {
    "name": "carried", "dims": {"m": 6, "n": 8}, "variables": {"v": ["m"], "z": ["n"], "q": [1]}, "inputs": {"x": ["m"]},
    "parameters": {"A": ["m", "n"]}, "minimize": {"idle": "0.5*sumsq(q)"},
    "unroll": {"layers": 2, "blocks": [
        {"block": "residual", "over": "v", "output": "x - A @ z"},
        {"block": "shrink", "over": "z", "output": "z0 + A.T @ v", "learn": {"W": {"replaces": "A.T"}}},
        {"block": "idle", "over": "q", "algorithm": "gradient_descent"},
    ]},
    "data": {"source": "synthetic", "train": 64, "validation": 16},
}  # fmt: skip


@pytest.mark.parametrize("loss", ["mse", "nmse"])
@pytest.mark.parametrize("layer_weights", ["last", "uniform"])
def test_variables_without_targets_stay_out_of_loss_and_table(tmp_path, loss, layer_weights):
    settings = {"loss": loss, "steps": 3, "batch": 16, "layer_weights": layer_weights, "precision": "float64"}
    run = train({**CARRIED, "train": settings}, out=tmp_path / "run", quiet=True)
    data = make_data(load(CARRIED).data, shapes_of(load(CARRIED), {}))
    z = run.net(data.validation.inputs["x"])[1].detach()
    wanted = ((z - data.validation.targets["z"]) ** 2).sum() / (data.validation.targets["z"] ** 2).sum()
    assert run.table[-1].nmse == pytest.approx(float(wanted), rel=1e-12)
    assert any("no converged optimum" in note for note in run.closing.notes)


def test_a_baseline_without_a_constant_takes_the_step_of_the_spec(tmp_path):
    spec = {
        "use": "lasso", "minimize": {"f": "dot(stop_gradient(A.T @ (A @ z - x)), z)", "g": "lam * norm1(z)"}, "dims": {"m": 6, "n": 8},
        "unroll": {"algorithm": "proximal_gradient", "layers": 2, "step": 0.1, "learn": {"s": {"replaces": "step", "where": "gradient"}}},
        "data": {"source": "synthetic", "train": 64, "validation": 16}, "train": {"loss": "nmse", "steps": 2, "batch": 16},
    }  # fmt: skip
    run = train(spec, out=tmp_path / "run", quiet=True)
    assert [row.name for row in run.table][1] == "fista, 2 iterations"
    again = train(
        {**spec, "train": {**spec["train"], "baselines": ["gradient_descent"]}}, out=tmp_path / "two", quiet=True
    )
    assert any(note.startswith("no baseline gradient_descent") for note in again.closing.notes)


def test_a_table_that_fails_loses_no_training(run, tmp_path, monkeypatch):
    def fails(*args):
        raise UnrollError("E409", "a matrix is not positive definite")

    monkeypatch.setattr("unroll.train.codes.measure", fails)
    done = train(SPEC, out=tmp_path / "run", quiet=True)
    assert "no closing table: a matrix is not positive definite" in str(done) and "unroll eval" in str(done)
    monkeypatch.undo()
    assert [row.nmse for row in evaluate(tmp_path / "run", quiet=True).table] == [row.nmse for row in run.table]


def rewritten(path, change):
    value = change(load_file(path))
    save_file(value, path)


EDITED = {
    "given.A": lambda d: rewritten(d / "given.safetensors", lambda t: {"A": t["A"] + 1e-9}),
    "given.A ": lambda d: rewritten(d / "given.safetensors", lambda t: {"A": t["A"].float()}),
    "scalars.lam": lambda d: (d / "run.json").write_text((d / "run.json").read_text().replace('"scalars": {}', '"scalars": {"lam": 0.3}')),
    "W1": lambda d: rewritten(d / "weights.safetensors", lambda t: {**t, "W1": t["W1"] * 1.001}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITED)
def test_a_run_folder_that_was_edited_is_refused_by_name(run, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    assert torch.equal(trained(folder).W1, run.net.W1)
    EDITED[name](folder)
    for call in (trained, lambda d: evaluate(d, quiet=True)):
        with pytest.raises(SpecError, match=rf"E510.*{name.strip()} (is|was)"):
            call(folder)


def test_a_finished_run_goes_on_for_longer_as_one_that_was_meant_to(tmp_path):
    """A constant learning rate does not know the end: 6 steps and 4 more are 10, to the bit."""
    spec = SPEC.replace("epochs: 3", "steps: 6")
    settings = ["train.schedule=constant", "train.validate_every=2", "train.keep=last"]
    train(spec, overrides=settings, out=tmp_path / "run", quiet=True)
    with pytest.raises(SpecError, match="E511.*the run has done 6"):
        resume(tmp_path / "run", overrides=["train.steps=5"], quiet=True)
    longer = resume(tmp_path / "run", overrides=["train.steps=10"], quiet=True)
    whole = train(spec, overrides=[*settings, "train.steps=10"], out=tmp_path / "whole", quiet=True)
    assert longer.steps == 10 and all(
        torch.equal(v, whole.net.state_dict()[k]) for k, v in longer.net.state_dict().items()
    )
    assert resume(tmp_path / "run", quiet=True).steps == 10
    assert json.loads((tmp_path / "run" / "run.json").read_text())["changes"] == [["train.steps=10"]]


@pytest.mark.parametrize(
    "change", ["train.lr=1", "data.train=10", "unroll.layers=4", "train.batch=8", "train.stepps=4", "scalars.lam=1"]
)
def test_what_would_make_another_run_is_refused_by_name(run, change):
    before = (run.folder / "run.json").read_text()
    with pytest.raises(SpecError, match=f"E511.*{change.partition('=')[0]}"):
        resume(run.folder, overrides=[change], quiet=True)
    assert (run.folder / "run.json").read_text() == before


def test_a_training_that_was_killed_goes_on_to_the_same_bits(capsys):
    """kill -9, which saves nothing and tells nobody; python -m tests.train.kill --times 10 tries more moments."""
    from kill import main

    assert main(times=1, seed=1) == 0 and "1 of 1 equal" in capsys.readouterr().out


def test_another_process_of_a_new_run_does_not_wait_for_what_the_first_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    _refuse_others(tmp_path, "manifest", {"A": torch.ones(2)})
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SpecError, match="run.json"):
        _refuse_others(tmp_path, "manifest", {"A": torch.ones(2)})
