"""A training from spec to run folder, and again from there.

    spec -> data (-> dictionary) -> network (-> converged optimum) -> fit -> closing table, pictures

A run folder holds all that another session needs: spec.yaml, run.json (command, versions, seed, sizes, which parameters
decay, what it started from), start.safetensors (the weights that it started with, if `from:` says so), given.safetensors
(values of parameters, a learned dictionary among them), data.json (names of classes, the characters of a text), optimum_*.safetensors, checkpoints/, metrics.csv, and in the end weights.safetensors, table.json,
curves.png, confusion.png and .csv of classes; evaluations/ on other data. What is done with codes, labels or hidden patches is in the record of the task.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from unroll.api import build as emit
from unroll.api import derive
from unroll.errors import SpecError, UnrollError, quote
from unroll.language.problem import from_spec
from unroll.model.module import Model
from unroll.model.whitebox import Batch, Measured, white_box
from unroll.model.words import read_record
from unroll.network.network import Network, network
from unroll.network.saved import Value, differences, seal
from unroll.network.values import refuse_undeclared
from unroll.spec import Spec, load
from unroll.spec.schema import Characters, Dictionary, Files, From, Images, TokenArrays, TokenEmbed
from unroll.train import losses, plots
from unroll.train.beginning import Beginning, begin, inherited, start
from unroll.train.data import make_data
from unroll.train.dictionary import Code, alternate
from unroll.train.groups import record
from unroll.train.job import Job, build, first_rank, plain_spec, shapes_of
from unroll.train.losses import Net, Outcome
from unroll.train.masked import masks
from unroll.train.pictures import WHERE, asked_for, read_elsewhere
from unroll.train.samples import NEEDED, Data, Split, Tensors, package
from unroll.train.stored import AGAIN, read_json, read_tensors, reading
from unroll.train.table import Closing, Line
from unroll.train.tasks import find_task

PACKAGES = ("unroll-compiler", "torch", "lightning", "numpy", "sympy", "scikit-learn", "safetensors")
SHARED = "UNROLL_RUN_FOLDER"
PLACES = ("pictures", "tokens")
"""What data.json says of files, not of what they mean."""
DIVISION = ("validation", "seed", "characters")
"""Settings of data by which samples are held out."""
OF_TRAINING = ("train", "augment", "normalise")
"""Settings of data that what is held out does not depend on, or has from the run."""
CODING = 30  # iterations per code while a dictionary is learned


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training: all is saved, and the message says how to go on."""


@dataclass(frozen=True)
class Run:
    """A finished training; printed, it is the closing table."""

    folder: Path
    net: nn.Module
    status: str
    steps: int
    seconds: float
    closing: Closing
    elsewhere: tuple[str, ...] = ()
    """other settings of the data that it was measured on"""

    @property
    def table(self) -> tuple[Line, ...]:
        """The rows of the closing table; none where another process measures."""
        return tuple(self.closing.rows)

    def __str__(self) -> str:
        title = f"at depth {cast(Net, self.net).layers} on {self.closing.samples:,} held-out samples"
        if self.elsewhere:
            return f"{self.closing.text(title)}\n\nmeasured with {' '.join(self.elsewhere)}: {self.folder}"
        files = "spec, weights.safetensors, metrics.csv, curves.png"
        lines = [self.closing.text(title), "", f"run folder   {self.folder}   {files}"]
        return "\n".join([*lines, f"again        unroll train --resume {self.folder}"])


def train(
    source: str | Path | Mapping[str, Any] | Spec,
    *,
    overrides: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    scalars: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    devices: int = 1,
    quiet: bool = False,
    command: Sequence[str] = (),
) -> Run:
    """Train the network of a spec as its `data:` and `train:` sections say. `print(run)` shows the closing table.

    out: the run folder, a new one; runs/<name>/<time> if left out.  quiet: show no progress (it goes to stderr).
    device: auto, cpu, cuda, cuda:1, mps.  command: the command line, for the record.
    Raises SpecError (E5xx for data and training), Interrupted after Ctrl-C.
    """
    console = None if quiet else Console(stderr=True)
    spec = source if isinstance(source, Spec) else load(source, overrides)
    _installed(spec)
    _refuse_at_sight(spec, parameters or {})
    given, sizes = dict(parameters or {}), dict(dims or {})
    beginning = begin(spec, given, sizes, _finished)
    given |= {} if beginning is None else inherited(beginning, spec, sizes, given)
    new = out is None or not Path(out).exists()
    folder = new_folder(out if out is None else Path(out), spec.title)
    job = Job(folder, spec, sizes, dict(scalars or {}), given, console)
    if first_rank():
        _write_start(job, command)
    try:
        with _shared(folder):
            return _train(job, device, devices, beginning)
    except UnrollError:
        if new and first_rank() and not (folder / "checkpoints").exists():  # nothing was trained
            shutil.rmtree(folder)
        raise


def _refuse_at_sight(spec: Spec, given: Mapping[str, Any]) -> None:
    """What the sections of a spec say against each other once they are trained on. Raises SpecError E507, E511."""
    embed = spec.model.embed if spec.model is not None else None
    if (
        isinstance(spec.data, Characters | TokenArrays)
        and isinstance(embed, TokenEmbed)
        and spec.data.length > embed.length
    ):
        message = f"samples of {spec.data.length:,} tokens are longer than the model reads, {embed.length:,} tokens"
        where, hint = (
            spec.origin("data", "length").where(),
            f"data.length={embed.length}, or a longer model.embed.length",
        )
        raise SpecError("E511", message, where, hint)
    if isinstance(spec.data, Files) and spec.model is None:
        learned = spec.data.dictionary.learn if spec.data.dictionary is not None else None
        known = {*spec.data.files, *given, learned}
        for name in (n for n, p in spec.parameters.items() if p.init is None and n not in known):
            where = spec.key_where("data", "files")
            hint = f"{name}: FILE, or let the spec ask for a draw: parameters: {{{name}: {{.., init: gaussian}}}}"
            raise SpecError("E507", f"data: files: no file for the parameter {name}", where, hint)


def _installed(spec: Spec) -> None:
    """Before anything is written. Raises SpecError E501 for a package that the training will ask for."""
    source = spec.data.source if spec.data is not None else None
    for name in NEEDED.get(source or "", ()):
        package(name, f"data: source: {source}")
    if spec.train is not None and spec.train.tensorboard:
        package("tensorboard", "train: tensorboard: true", extra="")
    package("matplotlib.figure", "unroll train, for its pictures,")
    package("lightning", "unroll train")


MAY_CHANGE = (
    "train.steps",
    "train.epochs",
    "train.minutes",
    "train.patience",
    "train.baselines",
    "train.evaluate",
    "data.workers",
)
"""When a run ends, what its table compares with, and who reads: all else would make it another run."""


def resume(
    folder: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    devices: int = 1,
    quiet: bool = False,
) -> Run:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted; or with a finished one, for longer.

    overrides: "train.steps=2000" and the like, of MAY_CHANGE; learning rates follow the new end.
    Raises SpecError E510 if the folder holds no run, or a damaged one, E511 for an override that it cannot go on with.
    """
    for name in (text.partition("=")[0].strip() for text in overrides):
        if name not in MAY_CHANGE:
            hint = f"what may change is {', '.join(MAY_CHANGE)}; for all else, train anew"
            raise SpecError("E511", f"a run cannot go on with another {quote(name)}", hint=hint)
    job = _read_start(Path(folder), None if quiet else Console(stderr=True))
    _installed(job.spec)
    if overrides:
        job = _changed(job, overrides)
    with _shared(job.folder):
        return _train(job, device, devices)


def _changed(job: Job, overrides: Sequence[str]) -> Job:
    """The job with these settings, written down. Raises SpecError E511 for an end that the run has passed."""
    spec = load(job.spec.to_dict(), overrides)
    last = job.folder / "checkpoints" / "last.ckpt"
    if last.exists():
        with reading(last):
            kept: dict[str, Any] = torch.load(last, map_location="cpu", weights_only=True)
            done, progress = int(kept["global_step"]), kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if spec.train is not None and spec.train.steps is not None and spec.train.steps < done:
            raise SpecError(
                "E511", f"train: steps: {spec.train.steps:,}, and the run has done {done:,}", hint="more steps"
            )
        if first_rank() and progress["is_last_batch"]:  # of the end that it had
            progress["is_last_batch"] = False
            torch.save(kept, last.with_suffix(".part"))
            os.replace(last.with_suffix(".part"), last)
    if first_rank():
        record = read_json(job.folder / "run.json")
        changes = [*record.get("changes", []), list(overrides)]
        (job.folder / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
        _amend(job.folder / "run.json", {"spec_sha256": spec.sha256, "changes": changes})
    return replace(job, spec=spec)


def evaluate(folder: str | Path, *, overrides: Sequence[str] = (), quiet: bool = False) -> Run:
    """The closing table of a finished run, measured again; or, with other settings of its data, on those.

    overrides: "data.folder=other" and the like. Of other pictures all are measured, or those that are set apart as held out; where no other place
    is named, those that the run held out. What is measured is in a folder of its own, within that of the run: evaluations/...
    Raises SpecError E510 if the folder holds no run, E511 for settings that are none of its data, E507, E512, E514 for data that are not for its network.
    """
    package("lightning", "a run of unroll train")
    job = _read_finished(Path(folder), None if quiet else Console(stderr=True), "weights.safetensors", "table.json")
    with reading(job.folder / "table.json"):
        ended = read_json(job.folder / "table.json")
        outcome = Outcome(ended["status"], ended["steps"], ended["seconds"], math.nan)
    if overrides:
        return _evaluate_elsewhere(job, overrides, outcome)
    data, net = ready(job)
    initial = copy.deepcopy(net)
    _read_trained(job, net)
    return _close(job, data, initial, net, outcome)


def _evaluate_elsewhere(job: Job, overrides: Sequence[str], outcome: Outcome) -> Run:
    from unroll.train.engine import check_answer, read_weights

    spec, means = _spec_elsewhere(job, overrides), _meaning(job)
    other = replace(job, spec=spec)
    data = _data_elsewhere(other, means, job.spec)
    task, net = find_task(other.settings, data), _untrained(job, means)
    initial = copy.deepcopy(net)
    if job.settings.from_ is not None:
        read_weights(initial, job.folder / "start.safetensors")
    _read_trained(job, net)
    loss = losses.find_loss(other.settings.loss)
    if not loss.by_layer:
        check_answer(cast(Net, net), loss, data, other.settings)
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]
    other = replace(other, folder=job.folder / "evaluations" / digest)
    shutil.rmtree(other.folder, ignore_errors=True)
    other.folder.mkdir(parents=True)
    closing = task.close(other, data, initial, net)
    _write_closing(other.folder, closing, {"overrides": list(overrides)}, means)
    return Run(other.folder, net, outcome.status, outcome.steps, outcome.seconds, closing, tuple(overrides))


def _spec_elsewhere(job: Job, overrides: Sequence[str]) -> Spec:
    """The spec with other settings of its data, and none about its own. Raises SpecError E511."""
    names = [text.partition("=")[0].strip() for text in overrides]
    for name in names:
        if not name.startswith("data.") or name in ("data.source", "data.input", "data.dictionary"):
            hint = "settings of data: as data.folder=FOLDER; the network is that of the run"
            raise SpecError("E511", f"a run cannot be measured with another {quote(name)}", hint=hint)
    _refuse_unread(job.spec, {name.split(".")[1] for name in names})
    document: dict[str, Any] = job.spec.to_dict()
    if isinstance(job.spec.data, Images):
        with reading(job.folder / "run.json"):
            sizes: dict[str, int] = read_json(job.folder / "run.json")["sizes"]
        document["data"] = asked_for(document["data"], {name.split(".")[1] for name in names}, sizes)
    if "train" in document:  # probes are fitted to samples of the training
        document["train"] = {k: v for k, v in document["train"].items() if k not in ("probes", "evaluate", "keep")}
        document["train"]["keep"] = "last"
    return load(document, overrides)


def _refuse_unread(spec: Spec, asked: Set[str]) -> None:
    """What is of the training alone, and what would hold out samples that the run was trained on. Raises SpecError E511."""
    assert spec.data is not None
    fields, moved = type(spec.data).model_fields, asked & {*WHERE, "held", "files", "text"}
    drawn = "train" in fields  # a number of samples: these are drawn apart from what is held out, not divided
    for word in sorted(asked & set(fields)):
        if word in OF_TRAINING:
            raise SpecError("E511", f"data: {word}: is of the training, and nothing here reads it", hint="leave it out")
        if word not in DIVISION or drawn or (moved and not isinstance(spec.data, Images)):
            continue
        if moved:
            message = "other pictures are measured all, or those that are set apart"
            raise SpecError("E511", f"data: {word}: {message}", hint="leave it out, or set pictures apart by held:")
        message = f"data: {word}: another one would hold out samples that the run was trained on"
        raise SpecError("E511", message, hint="leave it out: what the run held out is measured")


def _data_elsewhere(job: Job, means: Mapping[str, Any], trained: Spec) -> Data:
    """Other data for the network of a run. Raises SpecError E514 where what they mean is not what it was trained on."""
    assert job.spec.data is not None
    if isinstance(job.spec.data, Images):
        assert isinstance(trained.data, Images)
        data = read_elsewhere(job.spec.data, means, trained.data)
    else:
        data = make_data(job.spec.data, shapes_of(job.spec, job.dims), job.given)
        wanted, found = ({k: v for k, v in kept.items() if k not in PLACES} for kept in (means, data.kept))
        if odd := _differences(wanted, found):
            hint = f"data.words={job.folder / 'data.json'}" if "vocabulary" in odd else ""
            raise SpecError("E514", f"the data mean something else than those of the run: {', '.join(odd)}", hint=hint)
    parameters = {k: v.to(job.dtype) for k, v in job.given.items()}
    if job.console is not None:
        _show_data(data, job.console)
    return replace(
        data, train=data.train.to(job.dtype), validation=data.validation.to(job.dtype), parameters=parameters
    )


def _meaning(job: Job) -> dict[str, Any]:
    """data.json, which says what samples mean; empty where there is nothing to say."""
    path = job.folder / "data.json"
    return read_json(path) if path.exists() else {}


def measure(
    folder: str | Path,
    *,
    at: str = "iterate",
    parameters: str = "layers",
    terms: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> Measured:
    """What every step of a finished run's network does to every term, over all held-out samples, batch by batch.

    at, parameters, terms: as `Network.trace` takes them.  quiet: show no progress (it goes to stderr).
    Raises SpecError E510 (no finished run), E1xx (a formula), UnrollError E404, E409.
    """
    net, batches = trained_on(folder)
    shown = batches if quiet else track(batches, "held-out samples", console=Console(stderr=True))
    return white_box(net, shown, at=at, parameters=parameters, terms=terms)


def trained(folder: str | Path) -> Any:
    """The network of a finished run, with its trained weights and its words; the data are not read again.

    Raises SpecError E510 if the folder holds none.
    """
    job = _read_finished(Path(folder), None, "weights.safetensors")
    with reading(job.folder / "run.json"):
        old = "sizes" not in read_json(job.folder / "run.json")
    if old:  # a run of before
        return _restored(folder)[2]
    net = _untrained(job, _meaning(job))
    _read_trained(job, net)
    return net.eval()


def _untrained(job: Job, means: Mapping[str, Any]) -> nn.Module:
    """The network of a run before training, without its data. means: data.json. Raises SpecError E510."""
    with reading(job.folder / "run.json"):
        sizes: dict[str, int] = read_json(job.folder / "run.json")["sizes"]
    with reading(job.folder / "data.json"):
        words = read_record(means)
    given = {name: value.to(job.dtype) for name, value in job.given.items()}
    net = build(job, Data("", Split({}), Split({}), given, sizes=sizes, words=words), job.spec)
    _refuse_others(job.folder, "manifest", _manifest(job, {**cast(Net, net).given, **job.given}))
    return net


def trained_on(folder: str | Path) -> tuple[Any, list[Batch]]:
    """The network of a finished run, and what it is given of the held-out samples, in batches. Raises SpecError E510."""
    job, data, net = _restored(folder)
    held, settings = data.validation, job.settings
    if isinstance(net, Model) and net.wrapped.model.mask is not None:
        masked = masks(cast(Net, net), held, settings)
        return net, [(*losses.arguments(cast(Net, net), batch.inputs), mask) for batch, mask in masked]
    return net, [batch.inputs for batch in held.batches(settings.batch)]


def _finished(folder: Path) -> tuple[Job, nn.Module]:
    """What a finished run started from, and its trained network. Raises SpecError E510."""
    return _read_finished(folder, None, "weights.safetensors"), trained(folder)


def _restored(folder: str | Path) -> tuple[Job, Data, nn.Module]:
    package("lightning", "a run of unroll train")
    job = _read_finished(Path(folder), None, "weights.safetensors")
    data, net = ready(job)
    _read_trained(job, net)
    return job, data, net.eval()


def _read_trained(job: Job, net: nn.Module) -> None:
    """Raises SpecError E510 for weights that are damaged, or not those that the run ended with."""
    from unroll.train.engine import read_weights

    path = job.folder / "weights.safetensors"
    read_weights(net, path)
    _refuse_others(job.folder, "weights", read_tensors(path))


def _train(job: Job, device: str, devices: int, beginning: Beginning | None = None) -> Run:
    from unroll.train.engine import fit  # lightning takes seconds to import

    data, net = ready(job, beginning)
    initial = copy.deepcopy(net)
    samples = find_task(job.settings, data).prepare(job, data)
    again = (job.folder / "checkpoints" / "last.ckpt").exists()
    options: Any = {"resume": again, "console": job.console, "device": device, "devices": devices}
    outcome = fit(cast(Net, net), samples, job.settings, job.folder, **options)
    if outcome.status == "interrupted":
        raise Interrupted(f"saved after {outcome.steps:,} steps; go on with\n  unroll train --resume {job.folder}")
    if not first_rank():
        return Run(job.folder, net, outcome.status, outcome.steps, outcome.seconds, Closing((), (), 0))
    return _close(job, data, initial, net.to("cpu"), outcome)


# --- before: data, dictionary, network, optimum ----------------------------------------------------------------------


def ready(job: Job, beginning: Beginning | None = None) -> tuple[Data, nn.Module]:
    """Data and network as the training starts; what both depend on is kept in the run folder.

    beginning: of a new run, what it starts from; of another one, its folder says with which weights it started.
    """
    data, exact = prepare(job)
    _keep_meaning(job, data)
    _refuse_few_rows(job.spec, data)
    net = build(job, data, job.spec)
    parameters = _keep_given(job, cast(Net, net), exact)
    if first_rank():
        sizes = dict(data.sizes)
        _amend(job.folder / "run.json", {"parameters": record(cast(Net, net), job.settings), "sizes": sizes})
        if isinstance(net, Network | Model):
            _settle(job, cast(Spec, net.spec))
    if job.settings.from_ is not None:
        _start(job, net, data, beginning)
    return replace(data, parameters=parameters), net


def _start(job: Job, net: nn.Module, data: Data, beginning: Beginning | None) -> None:
    """Set the weights that the run starts with: those of what it begins from, or as they are in its folder. Raises SpecError E510, E515."""
    from unroll.train.engine import read_weights, write_weights

    path, origin = job.folder / "start.safetensors", cast(From, job.settings.from_)
    if beginning is not None:
        taken = start(net, beginning, data, origin.leave)
        if job.console is not None:
            job.console.print(f"starts from {beginning.path}\n{taken}", markup=False)
        if first_rank():
            write_weights(net, path)
            _amend(
                job.folder / "run.json",
                {"from": {"path": beginning.path, "sha256": beginning.sha256, **taken.to_dict()}},
            )
    else:
        read_weights(net, path)
    if first_rank():
        _refuse_others(job.folder, "start", read_tensors(path))


def _refuse_few_rows(spec: Spec, data: Data) -> None:
    """Raises SpecError E420 where the data have more words than the table of the model has rows."""
    embed, words = spec.model.embed if spec.model is not None else None, data.sizes.get("vocabulary", 0)
    if isinstance(embed, TokenEmbed) and words > embed.vocabulary:
        message = f"the data have {words:,} words, and the table of the model has {embed.vocabulary:,} rows"
        where = spec.origin("model", "embed", "vocabulary").where()
        raise SpecError("E420", message, where, f"model.embed.vocabulary={words}")


def _settle(job: Job, spec: Spec) -> None:
    """The spec of the folder with the algorithm that was chosen, if it left that open: it is not chosen anew."""
    if spec != job.spec:
        (job.folder / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
        _amend(job.folder / "run.json", {"spec_sha256": spec.sha256})


def _keep_given(job: Job, net: Net, exact: Tensors) -> Tensors:
    """The values of all parameters of the problem, drawn ones too. Raises SpecError E510 if they are not what they were."""
    parameters: Tensors = {name: value.clone() for name, value in net.given.items()}
    kept = {**parameters, **exact}  # rounded values would give a resumed run other samples
    _refuse_others(job.folder, "manifest", _manifest(job, kept))
    if parameters and first_rank():
        save_file({k: v.contiguous() for k, v in kept.items()}, job.folder / "given.safetensors")
        for name, value in parameters.items():
            if value.ndim == 2:
                plots.atoms(value, job.folder / f"{name}.png")
    return parameters


def _manifest(job: Job, kept: Tensors) -> dict[str, Value]:
    """Sizes, scalars and parameters by their names in run.json."""
    settings: dict[str, Mapping[str, float]] = {"dims": job.dims, "scalars": job.scalars}
    numbers: dict[str, Value] = {f"{part}.{name}": v for part, named in settings.items() for name, v in named.items()}
    return {**numbers, **{f"given.{name}": v for name, v in kept.items()}}


def _refuse_others(folder: Path, entry: str, values: Mapping[str, Value]) -> None:
    """Compare values with their digests in run.json, or leave these there. Raises SpecError E510."""
    path, now = folder / "run.json", {name: seal(value) for name, value in values.items()}
    if not first_rank() and not path.exists():  # the first process writes it, of a new run later than another one looks
        return
    with reading(path):
        found: dict[str, list[str]] | None = read_json(path).get(entry)
        was = None if found is None else {name: (kind, digest) for name, (kind, digest) in found.items()}
    if was is not None and (odd := "; ".join(differences(was, now))):
        raise SpecError("E510", f"the run in '{folder}' is not as it was written: {odd}", hint=AGAIN)
    if was is None and first_rank():
        _amend(path, {entry: now})


def _keep_meaning(job: Job, data: Data) -> None:
    """What the samples mean, in data.json. Raises SpecError E514 if it is not what it was when the run began."""
    path = job.folder / "data.json"
    if path.exists() and (odd := _differences(read_json(path), data.kept)):
        message = f"the data are not those that the run in '{job.folder}' began with: {', '.join(odd)} differ"
        raise SpecError("E514", message, hint="bring the data back, or train anew")
    if data.kept and first_rank():
        _write_json(path, dict(data.kept))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))


def prepare(job: Job) -> tuple[Data, Tensors]:
    """The data of a spec, with a dictionary learned from them if it asks for one, in the dtype of its training.

    And the parameters that the data were made with, as they were before they got that dtype.
    """
    spec, given = job.spec, job.given
    if spec.data is None:
        names = "patches, digits, images, text, tokens, synthetic, low_rank or file"
        raise SpecError("E507", f"{spec.title} has no section 'data:'", hint=f"data: {{source: ..}} with {names}")
    made = make_data(spec.data, shapes_of(spec, job.dims), given)
    for samples in (made.train.whole(), made.validation.whole()):
        refuse_undeclared(from_spec(spec, job.dims).inputs, samples.inputs)
    exact = {**made.parameters, **given}
    parameters = {k: v.to(job.dtype) for k, v in exact.items()}
    train, held = made.train.to(job.dtype), made.validation.to(job.dtype)
    data = replace(made, train=train, validation=held, parameters=parameters)
    if job.console is not None:
        _show_data(data, job.console)
    wanted = spec.data.dictionary
    if wanted is not None and wanted.learn not in given:
        parameters[wanted.learn] = _learned(job, wanted, data)
        exact.pop(wanted.learn, None)
    return data, exact


def _learned(job: Job, wanted: Dictionary, data: Data) -> Tensor:
    """The parameter that `data: dictionary:` asks for. Codes are those of the spec's own objective."""
    declared = shapes_of(job.spec, job.dims).parameters.get(wanted.learn)
    fed = list(data.train.whole().inputs)
    if declared is None or len(declared) != 2 or declared[1] is None or len(fed) != 1 or fed[0] not in job.spec.inputs:
        hint = "name a parameter A: [m, n] of a problem with one input x: [m], with both sizes given under dims:"
        raise SpecError("E507", f"data: dictionary: '{wanted.learn}' cannot be learned from the samples", hint=hint)
    (x,) = data.train.whole().inputs.values()
    rounds = alternate(x, declared[1], _coder(job, wanted.learn, data), wanted)
    if job.console is not None:
        rounds = track(rounds, "dictionary", total=wanted.rounds, console=job.console)
    *_, a = rounds
    return a


def _coder(job: Job, name: str, data: Data) -> Code:
    """(x, A) -> z by CODING accelerated iterations on the spec's own objective, derived once for all A."""
    derived = derive(plain_spec(job.spec, "fista", CODING), dims=job.dims)
    program = emit(derived)

    @torch.no_grad()
    def code(x: Tensor, a: Tensor) -> Tensor:
        given = {**data.parameters, name: a}
        net = network(program, given, job.scalars, dtype=x.dtype)
        (z,) = losses.run(cast(Net, net), {net.inputs[0]: x}).values()
        return z

    return code


# --- after: table, pictures, weights ---------------------------------------------------------------------------------


def _close(job: Job, data: Data, initial: nn.Module, net: nn.Module, outcome: Outcome) -> Run:
    """weights.safetensors, table.json, curves.png."""
    from unroll.train.engine import read_rows, write_weights

    task = find_task(job.settings, data)
    write_weights(net, job.folder / "weights.safetensors")
    ended = {"status": outcome.status, "steps": outcome.steps, "seconds": outcome.seconds}
    _write_json(
        job.folder / "table.json", ended
    )  # should the table fail, the training is whole, and can be measured again
    _amend(job.folder / "run.json", {"weights": None})
    _refuse_others(job.folder, "weights", read_tensors(job.folder / "weights.safetensors"))
    try:
        closing = task.close(job, data, initial, net)
    except UnrollError as error:
        if error.code == "E510":
            raise
        again = f"the weights are saved; unroll eval {job.folder} tries again"
        closing = Closing((), (), len(data.validation), notes=(f"no closing table: {error.message}", again))
    _write_closing(job.folder, closing, ended, data.kept)
    plots.curves(read_rows(job.folder / "metrics.csv"), closing, task.columns[-1], job.folder / "curves.png")
    return Run(job.folder, net, outcome.status, outcome.steps, outcome.seconds, closing)


def _write_closing(folder: Path, closing: Closing, ended: Mapping[str, Any], means: Mapping[str, Any]) -> None:
    """table.json; confusion.png and confusion.csv of classes."""
    layers = {name: [v if math.isfinite(v) else None for v in row] for name, row in closing.layers.items()}
    table = {"reference": closing.reference, "samples": closing.samples, "notes": closing.notes}
    rows = [row.to_dict() for row in closing.rows]
    _write_json(folder / "table.json", {**ended, **table, "rows": rows, "layers": layers})
    if closing.confusion is not None:
        own: list[str] = means.get("classes", [])
        names = [*own, *map(str, range(len(own), len(closing.confusion)))][: len(closing.confusion)]
        plots.confusion(closing.confusion, names, folder / "confusion.png")


def _show_data(data: Data, console: Console) -> None:
    for what, name, shape, span, dtype in data.summary():
        console.print(f"{what:16}{name:8}{shape:20}{span:24}{dtype}")
    for note in data.notes:
        console.print(note, markup=False)


# --- the folder ------------------------------------------------------------------------------------------------------


def new_folder(out: Path | None, name: str) -> Path:
    """out, or runs/<name>/<time>: a new folder; all processes of one training get the same.

    Raises SpecError E510 if `out` holds a run, or is missing under torchrun, whose processes cannot agree on a time.
    """
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    if out is None and "TORCHELASTIC_RUN_ID" in os.environ:
        raise SpecError("E510", "under torchrun the run folder must be named", hint="add --out FOLDER")
    if out is None:
        stem = Path("runs") / re.sub(r"[^\w.-]", "_", name) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        out = next(p for k in range(1000) if not (p := stem.with_name(stem.name + (f"_{k}" if k else ""))).exists())
    if first_rank() and (out / "run.json").exists():
        raise SpecError(
            "E510", f"'{out}' holds a run already", hint="go on with it by --resume, or name another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def _shared(folder: Path) -> Generator[None]:
    """Tell the processes that Lightning starts for further devices which folder is theirs."""
    outer = os.environ.get(SHARED)
    os.environ[SHARED] = str(folder)
    try:
        yield
    finally:
        if outer is None:
            del os.environ[SHARED]


def _write_start(job: Job, command: Sequence[str]) -> None:
    """spec.yaml, run.json, given.safetensors."""
    (job.folder / "spec.yaml").write_text(job.spec.to_yaml(), encoding="utf-8")
    if job.given:
        save_file({k: v.contiguous() for k, v in job.given.items()}, job.folder / "given.safetensors")
    started = {
        "command": list(command) or sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "spec_sha256": job.spec.sha256,
        "seed": job.settings.seed,
        "dims": job.dims,
        "scalars": job.scalars,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    _write_json(job.folder / "run.json", started)


def _read_start(folder: Path, console: Console | None) -> Job:
    """The inverse of `_write_start`; what was learned or drawn is given now. Raises SpecError E510."""
    if not (folder / "run.json").is_file():
        hint = "name the folder of a run: runs/<name>/<time>"
        raise SpecError("E510", f"'{folder}' holds no run: there is no run.json in it", hint=hint)
    with reading(folder / "run.json"):
        started = read_json(folder / "run.json")
        sha, dims, scalars = started["spec_sha256"], dict(started["dims"]), dict(started["scalars"])
    spec = load(folder / "spec.yaml")
    if spec.sha256 != sha:
        raise SpecError("E510", f"'{folder / 'spec.yaml'}' is not the spec that this run began with", hint=AGAIN)
    stored = read_tensors(folder / "given.safetensors") if (folder / "given.safetensors").exists() else {}
    given = {
        name: value.clone() for name, value in stored.items()
    }  # in memory of torch's own: products round by alignment
    return Job(folder, spec, dims, scalars, given, console)


def _read_finished(folder: Path, console: Console | None, *files: str) -> Job:
    """`_read_start` of a run that has left these files. Raises SpecError E510."""
    job = _read_start(folder, console)
    if not all((folder / name).is_file() for name in files):
        raise SpecError("E510", f"the run in '{folder}' is not finished", hint=f"unroll train --resume {folder}")
    return job


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _amend(path: Path, more: Mapping[str, Any]) -> None:
    """Add to a JSON file."""
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **more})


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
