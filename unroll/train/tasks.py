"""What a training is for: one record per task says what is measured meanwhile, and what the result is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from unroll.errors import SpecError
from unroll.spec.schema import Declared, Probes, Train
from unroll.train import codes, declared, labels, losses, masked, probes, table
from unroll.train.job import Job
from unroll.train.losses import Net
from unroll.train.samples import Data, Held, Split
from unroll.train.table import MICROS, Closing, Column, Score

T = TypeVar("T")
Measure = Callable[[Net, Held, Train], T]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A task belongs to the losses that it names, on labels of so many axes (None: on samples without or with any).

    measure: "held_out", the loss, and the columns, of a network in evaluation on held-out samples.
    columns: what is written to metrics.csv beside the loss.  prepare: what the data get before training.
    close: the closing table from (job, data, untrained, trained).
    without: settings of `train:` that mean nothing here; set to other values they are refused.
    alarm: what is to be said at once of a network in evaluation, "" if nothing.
    """

    name: str
    losses: tuple[str, ...]
    axes: int | None
    measure: Measure[Numbers]
    columns: tuple[Column, ...]
    close: Callable[[Job, Data, nn.Module, nn.Module], Closing]
    prepare: Callable[[Job, Data], Data] = field(default=lambda job, data: data)
    without: tuple[str, ...] = ()
    alarm: Measure[str] = field(default=lambda net, held, settings: "")


def comparison(
    measure: Measure[Numbers],
    trivial: Callable[[Net, Data, Train], list[Score]],
    columns: tuple[Column, ...],
    forward: Callable[[Net, Split, Train], Callable[[], Any]],
    confusion: Measure[Tensor] | None = None,
) -> Callable[[Job, Data, nn.Module, nn.Module], Closing]:
    """The table of answers that need no network, the untrained network, and the trained one; columns that the trained one has."""

    def close(job: Job, data: Data, initial: nn.Module, net: nn.Module) -> Closing:
        settings, held = job.settings, data.validation
        rows = trivial(cast(Net, net), data, settings)
        start = "untrained" if settings.from_ is None else "as it started"
        for name, item in ((start, initial), (f"{job.spec.title}, trained", net)):
            rows.append(_row(name, cast(Net, item), held, settings))
        shown = tuple(c for c in (*columns, MICROS) if c.key in rows[-1].values)
        rows = [Score(row.name, {c.key: row.values.get(c.key, math.nan) for c in shown}) for row in rows]
        chosen = "the weights were chosen by their loss on these samples: train: keep: last does not"
        with table.evaluating(cast(Net, net)):
            counts = None if confusion is None else confusion(cast(Net, net), held, settings)
        notes = (chosen,) if settings.keep == "best" else ()
        return Closing(rows, shown, len(held), notes=notes, confusion=counts)

    @torch.no_grad()
    def _row(name: str, net: Net, held: Held, settings: Train) -> Score:
        batch = held[: settings.batch]
        _, seconds = table.timed(net, batch.inputs, forward(net, batch, settings))
        with table.evaluating(net):
            return Score(name, {**measure(net, held, settings), "micros": 1e6 * seconds / len(batch)})

    return close


def _answer(net: Net, batch: Split, settings: Train) -> Callable[[], Any]:
    del settings
    return lambda: net(*losses.arguments(net, batch.inputs))


def _prediction(net: Net, batch: Split, settings: Train) -> Callable[[], Any]:
    _, mask = next(masked.masks(net, batch, settings))
    return lambda: masked.predict(net, batch, mask)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _four(value: float) -> str:
    return f"{value:.4g}"


BY_LAYER = ("target", "layer_weights", "stages", "refine", "falls", "baselines", "evaluate")
CLASSES = (Column("nats", "nats per label", _four), Column("accuracy", "accuracy", _percent))
TOP5 = Column("top5", "among five", _percent)
TOKENS = (
    Column("nats", "nats per token", _four),
    Column("perplexity", "perplexity", _four),
    Column("bits_per_byte", "bits per byte", _four),
    Column("bits", "bits per token", _four),
)
MASKED = (Column("masked_mse", "MSE of hidden patches", _four),)

TASKS: tuple[Task, ...] = (
    Task(
        "codes",
        ("objective", "mse", "nmse"),
        None,
        codes.held_out,
        (table.CODES[0],),
        codes.close,
        codes.with_targets,
        ("label_smoothing",),
    ),
    Task(
        "classes",
        ("cross_entropy",),
        1,
        labels.held_out,
        CLASSES,
        comparison(labels.held_out, labels.classes, (*CLASSES, TOP5), _answer, labels.confusion),
        without=BY_LAYER,
    ),
    Task(
        "characters",
        ("cross_entropy",),
        2,
        labels.held_out,
        TOKENS,
        comparison(labels.held_out, labels.characters, TOKENS, _answer),
        without=BY_LAYER,
    ),
    Task(
        "hidden patches",
        ("masked_mse",),
        None,
        masked.held_out,
        MASKED,
        comparison(masked.held_out, masked.mean_patches, MASKED, _prediction),
        without=(*BY_LAYER, "label_smoothing"),
    ),
)


def find_task(settings: Train, data: Data) -> Task:
    """The task of a loss on these data. Raises SpecError E508 (no labels), E511 (settings that mean nothing)."""
    loss, given = losses.find_loss(settings.loss), data.validation.labels
    if loss.needs == "labels" and given is None:
        hint = "source: digits, images, text and tokens have labels, and file may"
        raise SpecError("E508", f"train: loss: {loss.name} needs labels, source '{data.source}' has none", hint=hint)
    axes = 0 if given is None else given.ndim
    if loss.name == losses.DECLARED and loss.needs == "labels" and axes != 1:
        raise SpecError("E508", "train: loss: takes: labels are the classes of samples, here they are of tokens")
    known = (*TASKS, _declared(settings)) if isinstance(settings.loss, Declared) else TASKS
    task = next(t for t in known if loss.name in t.losses and t.axes in (None, axes))
    for name in task.without:
        if getattr(settings, name) != Train.model_fields[name].default:
            hint = "leave it out"
            raise SpecError("E511", f"train: {name}: means nothing for loss: {loss.name}", hint=hint)
    wanted = settings.probes
    if wanted is None and isinstance(settings.loss, Declared):  # nothing else says whether it learned anything
        wanted = Probes() if probes.labelled(data) else Probes(kinds=())
    return task if wanted is None else _probed(task, wanted, data)


def _declared(settings: Train) -> Task:
    """The task of a declared objective: its terms. Raises SpecError E511."""
    shown = declared.columns(settings)
    close = comparison(declared.held_out, lambda net, data, settings: [], shown, _answer)
    return Task(
        "a declared objective",
        (losses.DECLARED,),
        None,
        declared.held_out,
        shown,
        close,
        without=(*BY_LAYER, "label_smoothing"),
    )


def _probed(task: Task, wanted: Probes, data: Data) -> Task:
    """The task with rank and rate of features in each measurement, and probes in the closing table, or in both. Raises SpecError E508."""
    if wanted.kinds:
        probes.check(wanted, data)
    meanwhile = wanted if wanted.on_the_way else wanted.model_copy(update={"kinds": ()})

    def measure(net: Net, held: Held, settings: Train) -> Numbers:
        return {**task.measure(net, held, settings), **probes.measured(net, data, held, meanwhile, settings)}

    def close(job: Job, data: Data, initial: nn.Module, net: nn.Module) -> Closing:
        start = "untrained" if job.settings.from_ is None else "as it started"
        nets = [(start, cast(Net, initial)), (f"{job.spec.title}, trained", cast(Net, net))]
        return probes.added(task.close(job, data, initial, net), wanted, data, job.settings, nets)

    def alarm(net: Net, held: Held, settings: Train) -> str:
        return probes.collapsed(net, held, wanted, settings)

    own = probes.columns(meanwhile, probes.labelled(data))
    return replace(task, measure=measure, columns=(*own, *task.columns), close=close, alarm=alarm)
