"""The task of codes: variables of the problem, compared with their true values or with the converged optimum."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from unroll.errors import SpecError, UnrollError, did_you_mean
from unroll.solver.solve import solve
from unroll.spec import Spec
from unroll.spec.schema import LowRank, Parameter, Synthetic, Train
from unroll.train import losses
from unroll.train.data import make_data
from unroll.train.job import Job, build, first_rank, plain_spec, shapes_of
from unroll.train.losses import Net
from unroll.train.metrics import flat, nmse
from unroll.train.samples import Data, Held, Split, Tensors, generator
from unroll.train.stored import read_tensors
from unroll.train.table import AGAINST, CODES, Closing, Reference, Row, errors_by_layer, measure, score

TOLERANCE, ITERATIONS = 1e-7, 20_000  # of the converged optimum
ELSEWHERE = 7919
"""Added to the seed of the data for the samples of `evaluate:`."""


@torch.no_grad()
def held_out(net: Net, held: Held, settings: Train) -> dict[str, float]:
    """Loss of the last iterate and NMSE (sum ratio; nan without targets) over all held-out samples."""
    loss = losses.find_loss(settings.loss)
    parts = [losses.run(net, batch.inputs) for batch in held.batches(settings.batch)]
    z = {name: torch.cat([part[name] for part in parts]) for name in net.variables}
    every = held.whole()
    value = float(loss.value(net, every, z, settings))
    return {
        "held_out": value,
        "nmse": float(nmse(flat(losses.known(z, every.targets)), flat(every.targets))) if every.targets else math.nan,
    }


def with_targets(job: Job, data: Data) -> Data:
    """The data with the targets that the loss compares with: the truth, or the converged optimum."""
    _check_inputs(job, data)
    for name in job.settings.evaluate:  # what is asked of the closing table is refused before the training
        elsewhere(job, data, name)
    samples = data.train.whole()
    target = job.settings.target or ("truth" if samples.targets else "optimum")
    if target == "truth" and not samples.targets:
        hint = "use source: synthetic, a file with the true values, or train: target: optimum"
        raise SpecError("E508", f"train: target: truth, but source '{data.source}' does not know it", hint=hint)
    if target == "truth":
        return data
    held = _solved(job, data.validation.whole(), data.parameters, "validation")
    supervised = losses.find_loss(job.settings.loss).needs == "targets"
    train = _solved(job, samples, data.parameters, "train") if supervised else replace(samples, targets={})
    return replace(data, train=train, validation=held)


def _check_inputs(job: Job, data: Data) -> None:
    """Raises SpecError E512 for samples of a model, whose layers compute no codes of them."""
    fed = data.validation.whole().inputs
    if missing := [name for name in job.spec.inputs if name not in fed]:
        message = (
            f"train: loss: {job.settings.loss} compares codes of {', '.join(missing)}, the data are {', '.join(fed)}"
        )
        raise SpecError("E512", message, hint="a model learns by loss: cross_entropy or masked_mse")
    if not isinstance(data.validation, Split):
        message = f"train: loss: {job.settings.loss} compares codes of arrays in memory, source '{data.source}' leaves them on disk"
        raise SpecError("E512", message, hint="source: file")


def _solved(job: Job, samples: Split, parameters: Tensors, part: str) -> Split:
    values = _values(optimum(job, samples, parameters, part))
    return replace(samples, targets={name: z.to(job.dtype) for name, z in values.items()})


def optimum(job: Job, samples: Split, parameters: Tensors, part: str) -> Tensors:
    """{"value.NAME": codes, "objective", "error": (B,), "certified": ()}: solved once in float64 and kept."""
    path = job.folder / f"optimum_{part}.safetensors"
    if path.exists():
        return read_tensors(path, "without this file, it is solved again")
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


def close(job: Job, data: Data, initial: nn.Module, net: nn.Module) -> Closing:
    """Untrained, plain algorithms of the same depth, trained, and the converged optimum."""
    spec, held = job.spec, data.validation.whole()
    truth = held.targets if job.settings.target != "optimum" else {}
    kind = "truth" if truth else "optimum"
    solved, unsolved = (
        _optimum(job, held, data.parameters) if truth else (optimum(job, held, data.parameters, "validation"), ())
    )
    reference = Reference(kind, truth or _values(solved), solved.get("objective"))
    layers = cast(Net, net).layers
    baselines, notes = _baselines(job, data, layers)
    notes = (*notes, *unsolved)
    depth = f"{layers} iterations"
    untrained = f"untrained (= {_algorithm(cast(Spec, initial.spec))}, {depth})"
    nets = {untrained if job.settings.from_ is None else f"as it started, {depth}": initial}
    nets |= {f"{name}, {depth}": baseline for name, baseline in baselines.items()}
    nets[f"{spec.title}, trained"] = net
    rows = [measure(name, cast(Net, item), held, reference) for name, item in nets.items()]
    if solved:
        error, kind_of_error = float(solved["error"].max()), "gap" if solved["certified"] else "residual"
        if error > TOLERANCE:
            notes = (
                *notes,
                f"the optimum is not converged: {kind_of_error} {error:.1e} after {ITERATIONS:,} iterations",
            )
        last = f"converged optimum ({kind_of_error} {error:.0e})"
        rows.append(score(last, solved["objective"], _values(solved), reference, math.nan))
    compared = {name: item for name, item in nets.items() if item is not initial}
    others, missing = _elsewhere(job, data, compared)
    rows, notes = [*rows, *others], (*notes, *missing)
    errors = {name: errors_by_layer(cast(Net, item), held, reference) for name, item in nets.items()}
    footer = f"NMSE and support F1 are against {AGAINST[kind]}"
    return Closing(rows, CODES, len(held), kind, footer, notes, errors)


def _algorithm(spec: Spec) -> str:
    return (spec.unroll and spec.unroll.algorithm) or "the steps as written"


def elsewhere(job: Job, data: Data, name: str) -> Split:
    """The held-out samples of an entry of `evaluate:`, of another seed than those of the training. Raises SpecError E508, E511."""
    wanted, settings = job.settings.evaluate[name], job.spec.data
    where = job.spec.key_where("train", "evaluate", name)
    if not isinstance(settings, Synthetic | LowRank):
        hint = "source: synthetic and low_rank draw samples, and know the true values"
        raise SpecError("E508", f"evaluate: {name}: source '{data.source}' has no others with true codes", where, hint)
    try:
        own = {**settings.model_dump(), "train": 1, "seed": settings.seed + ELSEWHERE}
        asked = type(settings).model_validate({**own, **wanted.data})
    except ValidationError as error:
        first = error.errors()[0]
        word = ".".join(map(str, first["loc"]))
        raise SpecError("E511", f"evaluate: {name}: data: {word}: {first['msg']}", where) from None
    given = dict(data.parameters)
    for parameter, size in wanted.perturb.items():
        if parameter not in given:
            hint = did_you_mean(parameter, given) or f"there are {', '.join(given) or 'none'}"
            raise SpecError("E511", f"evaluate: {name}: perturb: '{parameter}' is no parameter", where, hint)
        given[parameter] = _perturbed(given[parameter], size, job.spec.parameters[parameter], asked.seed)
    return make_data(asked, shapes_of(job.spec, job.dims), given).validation.whole().to(job.dtype)


def _perturbed(value: Tensor, size: float, declared: Parameter, seed: int) -> Tensor:
    """A + e, |e| = size |A|, with columns of length one where they are declared so."""
    noise = torch.randn(value.shape, generator=generator(seed), dtype=torch.float64).to(value)
    moved = value + size * value.norm() / noise.norm() * noise
    return moved / moved.norm(dim=-2, keepdim=True) if declared.columns == "unit" else moved


def _elsewhere(job: Job, data: Data, nets: Mapping[str, nn.Module]) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of all networks on the samples of `evaluate:`, and why some are not there."""
    rows, notes = list[Row](), list[str]()
    for name, wanted in job.settings.evaluate.items():
        held = elsewhere(job, data, name)
        for title, net in nets.items():
            try:
                rows.append(
                    measure(
                        f"{name}: {title}", cast(Net, net), held, Reference("truth", held.targets, None), wanted.layers
                    )
                )
            except UnrollError as error:
                notes.append(f"{name}: {title}: {error.message}")
    return rows, tuple(notes)


def _optimum(job: Job, held: Split, parameters: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """The converged optimum, or why there is none: the truth does without."""
    try:
        return optimum(job, held, parameters, "validation"), ()
    except UnrollError as error:
        if error.code == "E510":  # a damaged file is no reason to go without it
            raise
        return {}, (f"no converged optimum: {error.message}",)


def _baselines(job: Job, data: Data, layers: int) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Networks of the algorithms to compare with, and why some are not there."""
    found: dict[str, nn.Module] = {}
    notes: list[str] = []
    step = job.spec.unroll.step if job.spec.unroll else None
    for name in job.settings.baselines:
        steps = [{}] if step in (None, "1/L") else [{}, {"step": step}]
        for more in steps:  # 1/L where L is known, else the step of the spec
            try:
                found[name] = build(job, data, plain_spec(job.spec, name, layers, **more))
                break
            except UnrollError as error:
                if more is steps[-1]:
                    notes.append(f"no baseline {name}: {error.message}")
    return found, tuple(notes)
