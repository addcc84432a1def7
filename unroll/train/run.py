"""A training from spec to run folder, and again from there.

    spec -> data (-> dictionary) -> network -> converged optimum -> fit -> closing table, pictures

A run folder holds all that another session needs: spec.yaml, run.json (command, versions, seed, sizes),
given.safetensors (values of parameters, a learned dictionary among them), optimum_*.safetensors, checkpoints/,
metrics.csv, and in the end weights.safetensors, table.json, curves.png.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from unroll.api import build as emit
from unroll.api import compile, derive
from unroll.errors import SpecError, UnrollError
from unroll.network import Network, network
from unroll.solver import solve
from unroll.spec import Spec, load
from unroll.spec.schema import Dictionary, Train
from unroll.train import losses, plots
from unroll.train.data import Data, Shape, Shapes, Split, Tensors, make_data
from unroll.train.dictionary import Code, alternate
from unroll.train.losses import Net, Outcome
from unroll.train.table import Reference, Row, errors_by_layer, measure, render, score

PACKAGES = ("unroll-compiler", "torch", "lightning", "numpy", "sympy", "scikit-learn", "safetensors")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.float32,
}  # bfloat16: weights stay float32
SHARED = "UNROLL_RUN_FOLDER"
TOLERANCE, ITERATIONS = 1e-7, 20_000  # of the converged optimum
CODING = 30  # iterations per code while a dictionary is learned


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training: all is saved, and the message says how to go on."""


@dataclass(frozen=True)
class Run:
    """A finished training; printed, it is the closing table.

    table: its rows.  reference: what they are compared with, "truth" or "optimum", on `samples` held-out samples.
    notes: baselines that do not fit, and why.
    """

    folder: Path
    net: Network
    status: str
    steps: int
    seconds: float
    table: tuple[Row, ...]
    reference: str
    samples: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        title = f"at depth {self.net.layers} on {self.samples:,} held-out samples"
        files = "spec, weights.safetensors, metrics.csv, curves.png"
        lines = [render(self.table, self.reference, title), *self.notes, "", f"run folder   {self.folder}   {files}"]
        return "\n".join([*lines, f"again        unroll train --resume {self.folder}"])


@dataclass(frozen=True)
class Job:
    """What a training starts from: the spec and what the caller set in addition."""

    folder: Path
    spec: Spec
    dims: dict[str, int]
    scalars: dict[str, float]
    given: Tensors
    console: Console | None

    @property
    def settings(self) -> Train:
        return self.spec.train or Train()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.precision]


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
    folder = new_folder(out if out is None else Path(out), spec.title)
    job = Job(folder, spec, dict(dims or {}), dict(scalars or {}), dict(parameters or {}), console)
    if first_rank():
        _write_start(job, command)
    with _shared(folder):
        return _train(job, device, devices)


def resume(folder: str | Path, *, device: str = "auto", devices: int = 1, quiet: bool = False) -> Run:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted.

    Raises SpecError E510 if the folder holds no run.
    """
    job = _read_start(Path(folder), None if quiet else Console(stderr=True))
    with _shared(job.folder):
        return _train(job, device, devices)


def evaluate(folder: str | Path, *, quiet: bool = False) -> Run:
    """The closing table of a finished run, measured again. Raises SpecError E510 if the folder holds none."""
    from unroll.train.engine import read_weights

    job = _read_start(Path(folder), None if quiet else Console(stderr=True))
    if not (job.folder / "table.json").is_file():
        hint = f"unroll train --resume {job.folder}"
        raise SpecError("E510", f"the run in '{job.folder}' is not finished", hint=hint)
    ended = json.loads((job.folder / "table.json").read_text(encoding="utf-8"))
    data, net = ready(job)
    initial = copy.deepcopy(net)
    read_weights(net, job.folder / "weights.safetensors")
    return _close(job, data, initial, net, Outcome(ended["status"], ended["steps"], ended["seconds"], math.nan))


def _train(job: Job, device: str, devices: int) -> Run:
    from unroll.train.engine import fit  # lightning takes seconds to import

    data, net = ready(job)
    initial = copy.deepcopy(net)
    samples = with_targets(job, data)
    again = (job.folder / "checkpoints" / "last.ckpt").exists()
    options: Any = {"resume": again, "console": job.console, "device": device, "devices": devices}
    outcome = fit(cast(Net, net), samples, job.settings, job.folder, **options)
    if outcome.status == "interrupted":
        raise Interrupted(f"saved after {outcome.steps:,} steps; go on with\n  unroll train --resume {job.folder}")
    if not first_rank():
        return Run(job.folder, net, outcome.status, outcome.steps, outcome.seconds, (), "", 0, ())
    return _close(job, data, initial, net.to("cpu"), outcome)


# --- before: data, dictionary, network, optimum ----------------------------------------------------------------------


def shapes_of(spec: Spec, dims: Mapping[str, int]) -> Shapes:
    """Stored shapes of what a spec declares: matrices that carry samples are tokens first, so [d, N] is (N, d)."""
    sizes = {**{name: size for name, size in spec.dims.items() if isinstance(size, int)}, **dims}

    def shape(declared: Sequence[int | str]) -> Shape:
        return tuple(size if isinstance(size, int) else sizes.get(size) for size in declared)

    return Shapes(
        {name: shape(item.shape)[::-1] for name, item in spec.inputs.items()},
        {name: shape(item.shape)[::-1] for name, item in spec.variables.items()},
        {name: shape(item.shape) for name, item in spec.parameters.items()},
    )


def ready(job: Job) -> tuple[Data, Network]:
    """Data and untrained network; the values of all parameters, drawn ones too, are kept in the run folder."""
    data, exact = prepare(job)
    net = build(job, data, job.spec)
    parameters = {name: value.clone() for name, value in net.given.items()}
    if parameters and first_rank():
        kept = {**parameters, **exact}  # rounded values would give a resumed run other samples
        save_file({k: v.contiguous() for k, v in kept.items()}, job.folder / "given.safetensors")
        for name, value in parameters.items():
            if value.ndim == 2:
                plots.atoms(value, job.folder / f"{name}.png")
    return Data(data.source, data.train, data.validation, parameters), net


def prepare(job: Job) -> tuple[Data, Tensors]:
    """The data of a spec, with a dictionary learned from them if it asks for one, in the dtype of its training.

    And the parameters that the data were made with, as they were before they got that dtype.
    """
    spec, given = job.spec, job.given
    if spec.data is None:
        names = "patches, digits, synthetic or file"
        raise SpecError("E507", f"{spec.title} has no section 'data:'", hint=f"data: {{source: ..}} with {names}")
    data = make_data(spec.data, shapes_of(spec, job.dims), given)
    exact = {**data.parameters, **given}
    parameters = {k: v.to(job.dtype) for k, v in exact.items()}
    data = Data(data.source, data.train.to(job.dtype), data.validation.to(job.dtype), parameters)
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
    if declared is None or len(declared) != 2 or declared[1] is None or len(data.train.inputs) != 1:
        hint = "name a parameter A: [m, n] of a problem with one input x: [m], with both sizes given under dims:"
        raise SpecError("E507", f"data: dictionary: '{wanted.learn}' cannot be learned from the samples", hint=hint)
    (x,) = data.train.inputs.values()
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


def plain_spec(spec: Spec, algorithm: str, layers: int) -> Spec:
    """The same objective with an algorithm of which nothing is learned."""
    document: dict[str, Any] = spec.to_dict()
    start = document.get("unroll", {}).get("start")
    document["unroll"] = {"algorithm": algorithm, "layers": layers} | ({"start": start} if start else {})
    return load({k: v for k, v in document.items() if k not in ("data", "train", "model", "weights")})


def build(job: Job, data: Data, spec: Spec) -> Network:
    """The network of a spec on this job's data."""
    return compile(
        spec, dims=job.dims, parameters=data.parameters, scalars=job.scalars, seed=job.settings.seed, dtype=job.dtype
    )


def optimum(job: Job, samples: Split, parameters: Tensors, part: str) -> Tensors:
    """{"value.NAME": codes, "objective", "error": (B,), "certified": ()}: solved once in float64 and kept."""
    path = job.folder / f"optimum_{part}.safetensors"
    if path.exists():
        return load_file(path)
    found = solve(
        job.spec,
        *(samples.inputs[name].double() for name in job.spec.inputs),
        dims=job.dims,
        parameters={k: v.double() for k, v in parameters.items()},
        scalars=job.scalars,
        tol=TOLERANCE,
        max_iterations=ITERATIONS,
        console=job.console,
        label=f"optimum, {part}",
    )
    packed = {f"value.{name}": z.contiguous() for name, z in found.values.items()}
    packed |= {"objective": found.objective, "error": found.error, "certified": torch.tensor(found.certified)}
    if first_rank():
        save_file(packed, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return packed


def _values(packed: Tensors) -> Tensors:
    return {key.removeprefix("value."): z for key, z in packed.items() if key.startswith("value.")}


def with_targets(job: Job, data: Data) -> Data:
    """The data with the targets that the loss compares with: the truth, or the converged optimum."""
    target = job.settings.target or ("truth" if data.train.targets else "optimum")
    if target == "truth" and not data.train.targets:
        hint = "use source: synthetic, a file with the true values, or train: target: optimum"
        raise SpecError("E508", f"train: target: truth, but source '{data.source}' does not know it", hint=hint)
    if target == "truth":
        return data
    held = _solved(job, data.validation, data.parameters, "validation")
    supervised = losses.find_loss(job.settings.loss).supervised
    train = _solved(job, data.train, data.parameters, "train") if supervised else Split(data.train.inputs)
    return Data(data.source, train, held, data.parameters)


def _solved(job: Job, samples: Split, parameters: Tensors, part: str) -> Split:
    values = _values(optimum(job, samples, parameters, part))
    return Split(samples.inputs, {name: z.to(job.dtype) for name, z in values.items()})


# --- after: table, pictures, weights ---------------------------------------------------------------------------------


def _close(job: Job, data: Data, initial: Network, net: Network, outcome: Outcome) -> Run:
    """weights.safetensors, table.json, curves.png."""
    from unroll.train.engine import read_rows, write_weights

    spec, held = job.spec, data.validation
    solved = optimum(job, held, data.parameters, "validation")
    truth = held.targets if job.settings.target != "optimum" else {}
    kind = "truth" if truth else "optimum"
    reference = Reference(kind, truth or _values(solved), solved["objective"])
    baselines, notes = _baselines(job, data, net.layers)
    depth = f"{net.layers} iterations"
    nets = {f"untrained (= {spec.unroll.algorithm if spec.unroll else ''}, {depth})": initial}
    nets |= {f"{name}, {depth}": baseline for name, baseline in baselines.items()}
    nets[f"{spec.title}, trained"] = net
    rows = [measure(name, cast(Net, item), held, reference) for name, item in nets.items()]
    error, kind_of_error = float(solved["error"].max()), "gap" if solved["certified"] else "residual"
    last = f"converged optimum ({kind_of_error} {error:.0e})"
    if error > TOLERANCE:
        notes = (*notes, f"the optimum is not converged: {kind_of_error} {error:.1e} after {ITERATIONS:,} iterations")
    rows.append(score(last, solved["objective"], _values(solved), reference, math.nan))
    write_weights(net, job.folder / "weights.safetensors")
    ended = {"status": outcome.status, "steps": outcome.steps, "seconds": outcome.seconds}
    errors = {name: errors_by_layer(cast(Net, item), held, reference) for name, item in nets.items()}
    layers = {name: [v if math.isfinite(v) else None for v in row] for name, row in errors.items()}
    table = {"reference": kind, "samples": len(held), "notes": notes, "rows": [row.to_dict() for row in rows]}
    _write_json(job.folder / "table.json", {**ended, **table, "layers": layers})
    plots.curves(read_rows(job.folder / "metrics.csv"), errors, kind, job.folder / "curves.png")
    return Run(job.folder, net, outcome.status, outcome.steps, outcome.seconds, tuple(rows), kind, len(held), notes)


def _baselines(job: Job, data: Data, layers: int) -> tuple[dict[str, Network], tuple[str, ...]]:
    """Networks of the algorithms to compare with, and why some are not there."""
    found: dict[str, Network] = {}
    notes: list[str] = []
    for name in job.settings.baselines:
        try:
            found[name] = build(job, data, plain_spec(job.spec, name, layers))
        except UnrollError as error:
            if error.code != "E303":
                raise
            notes.append(f"no baseline {name}: {error.message}")
    return found, tuple(notes)


def _show_data(data: Data, console: Console) -> None:
    for what, name, shape, span, dtype in data.summary():
        console.print(f"{what:16}{name:6}{shape:20}{span:24}{dtype}")


# --- the folder ------------------------------------------------------------------------------------------------------


def first_rank() -> bool:
    """Is this the process that writes? (Of several, started by torchrun or by Lightning.)"""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


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
    started = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stored = load_file(folder / "given.safetensors") if (folder / "given.safetensors").exists() else {}
    given = {name: value.clone() for name, value in stored.items()}  # in memory of torch's own: products round by alignment
    return Job(folder, load(folder / "spec.yaml"), started["dims"], started["scalars"], given, console)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
