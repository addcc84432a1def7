"""The training loop: Lightning's Trainer, made to resume bit for bit at any step. The only file that imports lightning.

Lightning sees the whole training as one epoch of `steps` batches, and batch k is a pure function of (seed, k): nothing
of its bookkeeping of epochs, samplers or loaders takes part. Callbacks hold the rest: random numbers, averaged weights,
clock, journal. Learning rates and stages are pure functions of the step.
"""

from __future__ import annotations

import copy
import csv
import logging
import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from unroll.errors import SpecError, did_you_mean, quote
from unroll.network.network import Network
from unroll.spec.schema import Declared, Teacher, Train
from unroll.train import losses, recipes, search
from unroll.train.ahead import ahead
from unroll.train.declared import objective
from unroll.train.features import hides
from unroll.train.groups import by_rows, learning, parameter_groups, rates
from unroll.train.losses import Net, Outcome, Status
from unroll.train.masked import as_in_training
from unroll.train.samples import Change, Data, Held, Samples, Split, generator, package
from unroll.train.stored import reading
from unroll.train.table import evaluating
from unroll.train.tasks import Task as Purpose
from unroll.train.tasks import find_task
from unroll.train.views import draws

EPOCHS = 20  # where neither epochs, steps nor minutes are given
FOREVER = 2**31  # steps, where only the clock ends the training


@dataclass(frozen=True)
class Stage:
    """Steps start .. stop train the first `depth` layers, at this share of the learning rate; anneals: it may fall to 0 in it."""

    depth: int
    start: int
    stop: int
    anneals: bool
    share: float = 1.0


# --- the plan: pure functions of the step ----------------------------------------------------------------------------


def plan(settings: Train, layers: int, steps: int, free: int | None = None) -> tuple[Stage, ...]:
    """end_to_end: one stage. layerwise: depth 1, 2, .., layers with equal shares of the steps, then all together.

    free: where those after so many layers share what they learn, the first ones one by one, then all.
    With `falls`, each depth is trained at the learning rate, and again at each of these shares of it.
    Source of the order: Chen, Liu, Wang & Yin 2018, arXiv 1808.10038, section 4.
    """
    if settings.stages == "end_to_end":
        return (Stage(layers, 0, steps, True),)
    if steps == FOREVER:
        raise SpecError("E511", "train: stages: layerwise needs epochs: or steps:", hint="minutes: may stay as a limit")
    greedy = steps - round(settings.refine * steps)
    shares = (1.0, *settings.falls)
    depths = range(1, layers + 1) if free is None else [*range(1, free + 1), layers]
    count = len(depths) * len(shares)
    if greedy < count:
        raise SpecError("E511", f"train: {greedy} steps are too few for {count} stages, {len(shares)} per layer")
    cuts = [round(greedy * k / count) for k in range(count + 1)]
    of = [(k, share) for k in depths for share in shares]
    stages = [Stage(k, cuts[i], cuts[i + 1], False, share) for i, (k, share) in enumerate(of)]
    return (*stages, Stage(layers, greedy, steps, True)) if greedy < steps else tuple(stages)


def rate(settings: Train, stage: Stage, step: int, share: float) -> float:
    """Factor of the learning rate: that of the stage, times a linear warm-up, then 1, or f + (1 − f)(1 + cos(pi share))/2 where it anneals.

    f: the share of the learning rate that is left at the end.
    """
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    cosine = settings.schedule == "cosine" and stage.anneals
    left = settings.final_lr
    return stage.share * warm * (left + (1 - left) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))) if cosine else 1.0)


def momentum(settings: Train, share: float) -> float:
    """m of the teacher: end − (end − start)(1 + cos(pi share))/2. Source: Caron et al. 2021, arXiv:2104.14294, section 3.1."""
    wanted = settings.teacher or Teacher()
    return wanted.end - (wanted.end - wanted.momentum) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def follow(teacher: nn.Module, net: nn.Module, kept: float) -> None:
    """θ' ← m θ' + (1 − m) θ; what is not learned is that of the network."""
    for own, p in zip(teacher.parameters(), net.parameters(), strict=True):
        own.lerp_(p, 1 - kept)
    for own, b in zip(teacher.buffers(), net.buffers(), strict=True):
        own.copy_(b)


# --- what Lightning drives -------------------------------------------------------------------------------------------


def noisy(batch: Split, ratios: Mapping[str, tuple[float, float]], share: float, draw: torch.Generator) -> Split:
    """The batch with Gaussian noise on its inputs: of these signal-to-noise ratios, in dB, at the first and at the last step; 0 stays 0."""
    inputs = {**batch.inputs}
    for name, (first, last) in ratios.items():
        x = inputs[name]
        noise = torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x)
        size = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)) / math.sqrt(x[0].numel())
        inputs[name] = x + 10 ** (-(first + (last - first) * share) / 20) * size * noise
    return replace(batch, inputs=inputs)


@dataclass
class Drawing:
    """Batch k of the training, k = 0, 1, ..: a pure function of (seed, k); of several ranks, the part of one."""

    samples: Samples
    change: Change | None
    size: int
    seed: int
    steps: int
    noise: Mapping[str, tuple[float, float]]
    mine: slice
    order: tuple[int, Tensor] = (-1, torch.empty(0))
    """of the epoch that was asked for last"""

    def __call__(self, step: int) -> Split:
        epoch, k = divmod(step, len(self.samples) // self.size)
        if self.order[0] != epoch:
            self.order = epoch, self.samples.order(generator(self.seed + epoch))
        places = self.order[1][k * self.size : (k + 1) * self.size]
        if self.change is None and not self.noise:
            return self.samples[places[self.mine]]
        draw = generator((self.seed + 1) * FOREVER + step)
        batch = self.samples[places] if self.change is None else self.change(self.samples, places, draw)
        # all ranks change the whole batch, so that it does not depend on their number
        return noisy(batch, self.noise, step / max(self.steps - 1, 1), draw)[self.mine]


class Batches:
    """The batches of a training, from where the trainer stands; read ahead by so many other processes."""

    def __init__(
        self,
        samples: Samples,
        change: Change | None,
        size: int,
        seed: int,
        steps: int,
        trainer: L.Trainer,
        noise: Mapping[str, tuple[float, float]] | None = None,
        workers: int = 0,
    ) -> None:
        self.drawing = Drawing(samples, change, size, seed, steps, noise or {}, slice(None))
        self.trainer, self.workers = trainer, workers

    def __len__(self) -> int:
        return self.drawing.steps

    def __iter__(self) -> Iterator[Split]:
        start = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        mine = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return ahead(replace(self.drawing, mine=mine), range(start, self.drawing.steps), self.workers)


class Task(L.LightningModule):
    """The network with its loss and optimiser; the place where a value that is not finite is named."""

    def __init__(
        self, net: Net, settings: Train, stages: Sequence[Stage], clock: Clock, teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.net, self.teacher = losses.module(net), teacher
        self.settings, self.stages, self.clock = settings, stages, clock
        self.declared = objective(settings) if isinstance(settings.loss, Declared) else None
        self.loss = losses.find_loss(settings.loss)
        self.weights = losses.layer_weights(settings.layer_weights, net.layers)
        self.by_rows = by_rows(net, settings)

    @property
    def stage(self) -> Stage:
        return next((s for s in self.stages if s.start <= self.global_step < s.stop), self.stages[-1])

    @property
    def passed(self) -> float:
        """The share of the whole training that is over."""
        end = self.stages[-1].stop
        return self.global_step / end if end < FOREVER else self.clock.share

    @property
    def share(self) -> float:
        """Share of the stage that has passed."""
        known = self.stage.stop < FOREVER
        return (
            (self.global_step - self.stage.start) / (self.stage.stop - self.stage.start) if known else self.clock.share
        )

    @property
    def factor(self) -> float:
        """What the learning rates are multiplied with at this step."""
        return rate(self.settings, self.stage, self.global_step, self.share)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return recipes.optimizer(parameter_groups(cast(Net, self.net), self.settings), self.settings)

    def training_step(self, batch: Split, index: int) -> Tensor:
        del index
        _still(self.net)
        depth = self.stage.depth
        weights = self.weights if depth == len(self.weights) else (0.0,) * (depth - 1) + (1.0,)
        of = lambda part: losses.total(self.loss, cast(Net, self.net), part, weights, self.settings)
        if self.declared is not None:
            draw = draws(self.settings.seed, self.global_step)
            value = self.declared.value(cast(Net, self.net), cast(Net, self.teacher or self.net), batch, draw)
        elif self.settings.accumulate > 1:
            assert self.loss.weight is not None
            value = recipes.in_parts(of, self.loss.weight, batch, self.settings.accumulate, self.net.parameters())
        else:
            value = of(batch)
        if not bool(value.isfinite()):
            raise blame(cast(Net, self.net), batch, self.global_step)
        return value

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **also_unused: Any) -> None:
        """Clip the norm of the whole gradient, refuse one that is not finite, and set this step's learning rates."""
        del unused, also_unused
        for p, share in self.by_rows:
            if p.grad is not None:
                p.grad.mul_((share > 0).to(p))
        learned = [p for p in self.net.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
        if not bool(norm.isfinite()):
            raise blame_gradient(cast(Net, self.net), self.global_step)
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(learned, self.settings.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor
            if group["kind"] == "matrix":
                group["weight_decay"] = recipes.decay(self.settings, self.passed)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step in which every layer moves by its share: the update of each optimizer here is entry by entry."""
        before = [(p, p.detach().clone(), share.to(p)) for p, share in self.by_rows]
        if self.teacher is not None:
            self.teacher.eval()
        kept = momentum(self.settings, self.share)  # of this step: the number of steps grows within the next line
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for p, was, share in before:
                p.copy_(torch.lerp(was, p, share))
            if self.teacher is not None:
                follow(self.teacher, self.net, kept)

    def transfer_batch_to_device(self, batch: Split, device: torch.device, dataloader_idx: int) -> Split:
        del dataloader_idx
        return batch.to(device)


def _still(net: nn.Module) -> None:
    """Statistics of what is frozen do not move either."""
    for m in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        if m.affine and not any(p.requires_grad for p in m.parameters()):
            m.eval()


def blame(net: Net, batch: Split, step: int) -> SpecError:
    """The first thing that is not finite: a parameter, else an iterate by its layer, else the loss itself."""
    found = [describe(net, name, p) for name, p in losses.module(net).named_parameters() if not p.isfinite().all()]
    with torch.no_grad():
        iterates: dict[str, list[Tensor]] = net.trace(*losses.arguments(net, batch.inputs)).iterates
    broken = [(k, name) for name, row in iterates.items() for k, z in enumerate(row) if not z.isfinite().all()]
    found += [f"{name} after layer {k}" for k, name in sorted(broken)]
    what = found[0] if found else "the value of the loss"
    return _not_finite(what, step)


def blame_gradient(net: Net, step: int) -> SpecError:
    """Names the parameters whose gradient is not finite, or the one whose is so large that the length of all is not."""
    grads = {name: p.grad for name, p in losses.module(net).named_parameters() if p.grad is not None}
    found = [describe(net, name, g) for name, g in grads.items() if not g.isfinite().all()]
    if not found:
        return _not_finite(
            f"the length of the gradient, of {max(grads, key=lambda n: grads[n].abs().max())} most,", step
        )
    return _not_finite(f"the gradient of {', '.join(found)}", step)


def describe(net: Net, name: str, value: Tensor) -> str:
    """`W2`, or `W2 of layer 3` where the first axis of the parameter is the layer."""
    if value.ndim == 0 or value.shape[0] != net.layers:
        return name
    layer = (
        int((~value.isfinite()).flatten(1).any(1).nonzero()[0])
        if value.ndim > 1
        else int((~value.isfinite()).nonzero()[0])
    )
    return f"{name} of layer {layer + 1}"


def _not_finite(what: str, step: int) -> SpecError:
    hint = "a smaller lr: or clip: usually helps; the last finite weights are in checkpoints/"
    return SpecError("E509", f"training stopped at step {step}: {what} is not finite", hint=hint)


# --- callbacks -------------------------------------------------------------------------------------------------------


class Randomness(L.Callback):
    """Every rank's random state is saved, and given back before the first batch after a resume."""

    def __init__(self) -> None:
        self.waiting: dict[str, Any] | None = None
        self.trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        del pl_module, stage
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        own = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(device)
        if self.trainer.world_size == 1:
            return {kind: [state] for kind, state in own.items()}
        gathered = {kind: self.trainer.strategy.all_gather(state.to(device)) for kind, state in own.items()}
        return {kind: list(states.cpu()) for kind, states in gathered.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.waiting = state_dict

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        del pl_module, batch, batch_idx
        if self.waiting is None:
            return
        for kind, states in self.waiting.items():
            state = states[
                trainer.global_rank % len(states)
            ]  # fewer ranks than before: still runs, no longer bit-equal
            if kind == "cpu":
                torch.set_rng_state(state)
            elif trainer.strategy.root_device.type == "cuda":
                torch.cuda.set_rng_state(state, trainer.strategy.root_device)
        self.waiting = None


class Average(L.Callback):
    """The mean of the weights after steps 1 .. t, that after step k counting decay^(t − k).

    After step t the mean moves by the share (1 − decay)/(1 − decay^t) towards the weights; for t = 1 it is 1, so the
    start does not count.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.values = decay, list[Tensor]()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del outputs, batch, batch_idx
        own = list(pl_module.net.parameters())
        self.values = [v.to(p) for v, p in zip(self.values or own, own, strict=True)]
        share = (1 - self.decay) / (1 - self.decay**trainer.global_step)
        self.values = [v + share * (p - v) for v, p in zip(self.values, own, strict=True)]

    @contextmanager
    def shown(self, net: nn.Module) -> Generator[None]:
        """Inside, the network has the averaged weights."""
        own = [p.detach().clone() for p in net.parameters()]
        self.put(net)
        try:
            yield
        finally:
            _set(net, own)

    def put(self, net: nn.Module) -> None:
        """Give the network the averaged weights; before the first step there are none, and nothing is done."""
        if self.values:
            _set(net, self.values)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = list(state_dict["values"])


@torch.no_grad()
def _set(net: nn.Module, values: Sequence[Tensor]) -> None:
    for p, value in zip(net.parameters(), values, strict=True):
        p.copy_(value)


class Clock(L.Callback):
    """Seconds of training over all sessions; ends the training at the time limit or after Ctrl-C, between two steps."""

    def __init__(self, minutes: float | None) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.before, self.begun = 0.0, time.monotonic()
        self.interrupted = self.late = False

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    @property
    def share(self) -> float:
        """Share of the time limit that has passed."""
        return self.seconds / self.limit if self.limit else 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del trainer, pl_module
        self.begun = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del pl_module, outputs, batch, batch_idx
        self.late = self.limit is not None and self.seconds >= self.limit
        agreed = trainer.strategy.reduce_boolean_decision(self.late or self.interrupted, all=False)
        trainer.should_stop = trainer.should_stop or agreed

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = float(state_dict["seconds"])

    @contextmanager
    def listening(self) -> Generator[None]:
        """Ctrl-C and SIGTERM ask for a stop after this step; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            del frame
            self.interrupted = True
            signal.signal(number, old[number])

        for number in old:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Journal(L.Callback):
    """Every `every` steps and at the end: the held-out loss, a row of metrics.csv, the best weights, the checkpoint."""

    def __init__(
        self,
        folder: Path,
        held: Held,
        purpose: Purpose,
        settings: Train,
        every: int,
        per_epoch: int,
        clock: Clock,
        shown: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        self.folder, self.held, self.purpose, self.settings = folder, held, purpose, settings
        self.every, self.per_epoch, self.clock, self.shown = every, per_epoch, clock, shown
        self.best, self.stale, self.alarmed = math.inf, 0, False
        self.sum, self.count = 0.0, 0
        self.row: dict[str, float] = {}
        self.board = _board(folder) if settings.tensorboard else None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del batch, batch_idx
        self.sum, self.count = self.sum + float(outputs["loss"]), self.count + 1
        last = trainer.global_step == trainer.max_steps
        if trainer.global_step % self.every == 0 or last:
            self._record(trainer, pl_module)
        elif trainer.should_stop:
            self._save(trainer)

    def _record(self, trainer: L.Trainer, task: Task) -> None:
        with self.shown(task.net):
            measured = evaluate(cast(Net, task.net), self.held, self.purpose, self.settings)
            if trainer.is_global_zero:
                self._warn(task, trainer.global_step)
            better = self._judge(trainer, task, measured)
            if trainer.is_global_zero:
                self._write(task, better)
        self._save(trainer)

    def _warn(self, task: Task, step: int) -> None:
        """Say what the task has to say, and not again while it stays the same; what was so before the first step is left to the table."""
        with torch.no_grad(), evaluating(cast(Net, task.net)):
            held = self.held.to(next(task.net.parameters()))
            alarm = self.purpose.alarm(cast(Net, task.net), held, self.settings)
        if alarm and not self.alarmed and step:
            warnings.warn(f"step {step:,}: {alarm}", stacklevel=2)
        self.alarmed = bool(alarm)

    def _judge(self, trainer: L.Trainer, task: Task, measured: dict[str, float]) -> bool:
        """Make the row; is it the best one?"""
        step = trainer.global_step
        self.row = {
            "step": step,
            "epoch": step / self.per_epoch,
            "seconds": self.clock.seconds,
            "lr": rates(self.settings).matrices * task.factor,
            "depth": task.stage.depth,
            "loss": self.sum / max(self.count, 1),
            "held_out": measured["held_out"],
            **{column.key: measured[column.key] for column in self.purpose.columns},
        }
        self.sum, self.count = 0.0, 0
        better = measured["held_out"] < self.best
        self.best, self.stale = (measured["held_out"], 0) if better else (self.best, self.stale + 1)
        if self.settings.patience is not None and self.stale >= self.settings.patience:
            trainer.should_stop = True
        return better

    def _write(self, task: Task, better: bool) -> None:
        if better:
            write_weights(task.net, self.folder / "checkpoints" / "best.safetensors")
        append_row(self.folder / "metrics.csv", self.row)
        if self.board is not None:
            for name in ("loss", "held_out", "lr", *(column.key for column in self.purpose.columns)):
                self.board.add_scalar(name, self.row[name], int(self.row["step"]))
            self.board.flush()

    def _save(self, trainer: L.Trainer) -> None:
        """checkpoints/last.ckpt, whole or not at all."""
        path = self.folder / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path.with_suffix(".part"))
        if trainer.is_global_zero:
            os.replace(path.with_suffix(".part"), path)

    def state_dict(self) -> dict[str, Any]:
        kept = {"best": self.best, "stale": self.stale, "sum": self.sum, "count": self.count}
        return {**kept, "alarmed": self.alarmed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.stale = float(state_dict["best"]), int(state_dict["stale"])
        self.sum, self.count = float(state_dict["sum"]), int(state_dict["count"])
        self.alarmed = bool(state_dict.get("alarmed"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            if trainer.global_step == 0:
                self._warn(cast(Task, pl_module), 0)
            keep_rows(self.folder / "metrics.csv", trainer.global_step)


class Bar(L.Callback):
    """epoch 12/40 ━━━━━━ 0:01:12 loss .. held out .. best .."""

    def __init__(self, console: Console, journal: Journal, steps: int, clock: Clock) -> None:
        self.journal, self.steps, self.clock = journal, steps, clock
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Progress(*columns, console=console)
        self.shown = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del trainer, pl_module
        self.task = self.bar.add_task("epoch 0", total=1.0, note="")
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del pl_module, outputs, batch, batch_idx
        now = time.monotonic()
        if now - self.shown > 0.2 or trainer.should_stop or trainer.global_step == self.steps:
            self.shown = now
            self._show(trainer.global_step)

    def _show(self, step: int) -> None:
        row, per_epoch = self.journal.row, self.journal.per_epoch
        by_steps = step / self.steps if self.steps < FOREVER else 0.0
        epochs = f"epoch {step / per_epoch:.1f}" + (f"/{self.steps / per_epoch:g}" if self.steps < FOREVER else "")
        note = f"loss {row['loss']:.4g}  held out {row['held_out']:.4g}  best {self.journal.best:.4g}" if row else ""
        self.bar.update(self.task, description=epochs, completed=max(by_steps, self.clock.share), note=note)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        del trainer, pl_module, stage
        self.bar.stop()


# --- files of the loop -----------------------------------------------------------------------------------------------


def write_weights(net: nn.Module, path: Path) -> None:
    """Weights as safetensors, whole or not at all; tied parameters are stored once."""
    part = path.with_suffix(".part")
    save_model(net, str(part))
    os.replace(part, path)


def read_weights(net: nn.Module, path: Path) -> None:
    """The inverse of `write_weights`, in place. Raises SpecError E510."""
    with reading(path, "unroll train --resume writes the weights of a finished run again"):
        load_model(net, str(path))


def append_row(path: Path, row: dict[str, float]) -> None:
    """One line more in a CSV file with the names of the row as its head."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.9g}" for name, value in row.items()})


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; none if there is no such file. Raises SpecError E510."""
    if not path.exists():
        return []
    with reading(path, "delete the lines that are not whole"), path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def keep_rows(path: Path, step: int) -> None:
    """Forget rows after `step`: a resumed training writes them again."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    for row in read_rows(path):
        if row["step"] <= step:
            append_row(part, row)
    if part.exists():
        os.replace(part, path)  # at once: a kill in between would lose the journal
    else:
        path.unlink(missing_ok=True)


def _board(folder: Path) -> Any:
    package("tensorboard", "train: tensorboard: true", extra="")
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


# --- the two verbs ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: Net, held: Held, purpose: Purpose, settings: Train) -> dict[str, float]:
    """What the task measures on all held-out samples, "held_out" among it: the loss."""
    with evaluating(net):
        return purpose.measure(net, held.to(next(losses.module(net).parameters())), settings)


def fit(
    net: Net,
    data: Data,
    settings: Train,
    folder: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    device: str = "auto",
    devices: int = 1,
) -> Outcome:
    """Train `net` in place, from its present weights or from folder/checkpoints/last.ckpt; keep best or last weights.

    console: where the progress bar is drawn; None: nowhere.
    Raises SpecError E507 (inputs), E508 (loss without its targets), E509 (a value that is not finite), E511 (settings),
    E510 (a damaged checkpoint), E512 (the network's answer is none for this loss).
    """
    purpose = find_task(settings, data)
    _check(net, data, settings)
    if settings.search is not None:
        return search.find(net, data, settings, folder)
    size = min(settings.batch * settings.accumulate, len(data.train))
    per_epoch = len(data.train) // size
    steps = total_steps(settings, per_epoch)
    every = settings.validate_every or min(per_epoch, 500)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    clock = Clock(settings.minutes)
    average = None if settings.ema is None else Average(settings.ema)
    shown = _as_it_is if average is None else average.shown
    teacher = _teacher(net, settings)
    if teacher is not None and (settings.teacher or Teacher()).kept == "teacher":
        shown = lambda own, teacher=teacher: _as(teacher, own)
    journal = Journal(folder, data.validation, purpose, settings, every, per_epoch, clock, shown)
    callbacks: list[L.Callback] = [Randomness(), *([average] if average else []), clock, journal]
    if console is not None:
        callbacks.append(Bar(console, journal, steps, clock))
    last = folder / "checkpoints" / "last.ckpt"
    module = losses.module(net)
    with quiet(), clock.listening(), learning(net, settings), recipes.prepared(module, settings):
        trainer = _trainer(settings, steps, callbacks, folder, device, devices)
        if not resume:
            torch.manual_seed(settings.seed)
        free = net.program.free if isinstance(net, Network) else None
        if isinstance(settings.loss, Declared) and trainer.world_size > 1:
            message = "train: a declared loss is over the whole batch, and each of several devices sees a part of it"
            raise SpecError("E511", message, hint="--devices 1")
        task = Task(net, settings, plan(settings, net.layers, steps, free), clock, teacher)
        like = next(losses.module(net).parameters())
        samples = data.train.to(like.dtype)
        batches = Batches(samples, data.change, size, settings.seed, steps, trainer, settings.noise, data.workers)
        if resume:
            with reading(last, "without this file, --resume trains from the start"):
                torch.load(last, map_location="cpu", weights_only=True)
        trainer.fit(task, batches, ckpt_path=last if resume else None, weights_only=True)
    best = folder / "checkpoints" / "best.safetensors"
    if settings.keep == "best" and best.exists():
        read_weights(losses.module(net), best)
    elif average is not None:
        average.put(losses.module(net))
    elif teacher is not None and shown is not _as_it_is:
        losses.module(net).load_state_dict(teacher.state_dict())
    return Outcome(_status(clock, journal, settings), trainer.global_step, clock.seconds, journal.best)


def _teacher(net: Net, settings: Train) -> nn.Module | None:
    """A copy of the network that learns nothing by itself, where the loss takes what one answers."""
    taken = settings.loss.takes.values() if isinstance(settings.loss, Declared) else ()
    return copy.deepcopy(losses.module(net)).requires_grad_(False) if any(t.of == "teacher" for t in taken) else None


@contextmanager
def _as(teacher: nn.Module, net: nn.Module) -> Generator[None]:
    """Inside, the network has the weights of its teacher."""
    own = [p.detach().clone() for p in net.parameters()]
    _set(net, list(teacher.parameters()))
    try:
        yield
    finally:
        _set(net, own)


def _as_it_is(net: nn.Module) -> AbstractContextManager[None]:
    del net
    return nullcontext()


def _status(clock: Clock, journal: Journal, settings: Train) -> Status:
    if clock.interrupted:
        return "interrupted"
    if settings.patience is not None and journal.stale >= settings.patience:
        return "patience"
    return "time" if clock.late else "done"


def total_steps(settings: Train, per_epoch: int) -> int:
    """Steps of the whole training: `steps`, or `epochs` of them (EPOCHS if nothing is said), or no end."""
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is not None or settings.minutes is None:
        return (settings.epochs or EPOCHS) * per_epoch
    return FOREVER


def _check(net: Net, data: Data, settings: Train) -> None:
    loss = losses.find_loss(settings.loss)
    recipes.check(losses.module(net), loss, settings)
    inputs = data.train.whole().inputs
    for name in settings.noise:
        if name not in inputs or not inputs[name].is_floating_point():
            hint = did_you_mean(name, inputs) or f"noise goes on numbers that are not counts: {', '.join(inputs)}"
            raise SpecError("E511", f"train: noise: '{name}' is no input of numbers", hint=hint)
    if settings.noise and settings.steps is None and settings.epochs is None and settings.minutes is not None:
        raise SpecError("E511", "train: noise: needs epochs: or steps:", hint="minutes: may stay as a limit")
    if settings.noise and settings.search is not None:
        raise SpecError("E511", "train: noise: is for training, and search: takes its place")
    if loss.needs == "targets" and not data.train.whole().targets:
        hint = "set train: target: optimum, or train: loss: objective"
        raise SpecError("E508", f"train: loss: {settings.loss} needs the true {', '.join(net.variables)}", hint=hint)
    if data.mixes and not loss.mixes:
        hint = "leave mixup: and cutmix: out"
        raise SpecError(
            "E511", f"data: augment: mixtures have labels in shares, which loss: {loss.name} does not know", hint=hint
        )
    fed = data.validation.whole().inputs
    if missing := [name for name in net.inputs if name not in fed]:
        message = f"the network takes {', '.join(missing)}, source '{data.source}' has {', '.join(fed)}"
        raise SpecError("E507", message, hint="data: input: names what the samples are; digits have form: images")
    if next(losses.module(net).parameters(), None) is None:
        raise SpecError(
            "E511", "train: the network has nothing to learn", hint="give it a learn: section or a parametrisation:"
        )
    if settings.probes is not None and settings.probes.at == "answer" and hides(losses.module(net)):
        hint = "at: features reads the tokens as they leave the layers"
        raise SpecError("E511", "train: probes: at: answer: this network answers with patches", hint=hint)
    if not loss.by_layer:
        check_answer(net, loss, data, settings)


@torch.no_grad()
def check_answer(net: Net, loss: losses.Loss, data: Data, settings: Train) -> None:
    """Ask the network, as it is in training, about two samples. Raises SpecError E512."""
    module = losses.module(net)
    like = next(module.parameters())
    few = _highest(data).to(like)
    try:
        with as_in_training(net, like.device, 0):
            if isinstance(settings.loss, Declared):
                objective(settings).terms(net, net, few, draws(settings.seed, 0))
                return
            answer = module(*losses.arguments(net, few.inputs))
    except IndexError as error:
        most = max(int(v.max()) for v in few.inputs.values())
        hint = f"the data have {', '.join(f'{name}: {n}' for name, n in data.sizes.items())}"
        raise SpecError("E512", f"train: the network has no row for token {most}", hint=hint) from error
    labels = [part.labels for part in (data.train, data.validation)]
    most = max(-1 if part is None else int(part.max()) for part in labels)
    if reason := loss.misfit(few, answer, most):
        raise SpecError("E512", f"train: {reason}", hint="change loss:, the data, or the head of the model")


def _highest(data: Data) -> Split:
    """Two samples; where inputs are tokens, one of them is the highest that occurs."""
    few = data.validation[:2]
    inputs = dict(few.inputs)
    for name, value in inputs.items():
        if not value.is_floating_point():
            inputs[name] = value.clone()
            inputs[name].view(-1)[0] = max(
                int(part.inputs[name].max()) for part in (data.train.whole(), data.validation.whole())
            )
    return replace(few, inputs=inputs)


def _trainer(
    settings: Train, steps: int, callbacks: list[L.Callback], folder: Path, device: str, devices: int
) -> L.Trainer:
    accelerator, ranks, nodes = place(device, devices)
    several = nodes > 1 or (ranks if isinstance(ranks, int) else len(ranks)) > 1
    return L.Trainer(
        accelerator=accelerator,
        devices=ranks,
        num_nodes=nodes,
        strategy="ddp_find_unused_parameters_true" if several else "auto",  # early stages leave later layers unused
        precision="bf16-mixed" if settings.precision == "bfloat16" else "32-true",
        max_epochs=1,
        max_steps=steps if steps < FOREVER else -1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def place(device: str, devices: int) -> tuple[str, int | list[int], int]:
    """(accelerator, devices, nodes). Under torchrun its counts hold: Lightning alone trains a copy per process.

    Raises SpecError E511 for a device that is not there.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device) or devices < 1:
        raise SpecError(
            "E511", f"there is no device '{quote(device)}' x {devices}", hint="auto, cpu, cuda, cuda:1, mps"
        )
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device.partition(":")[0])
    if backend is not None and not backend.is_available():
        raise SpecError("E511", f"this machine has no {device}", hint="--device auto")
    accelerator, _, number = device.partition(":")
    accelerator = {"cuda": "gpu"}.get(accelerator, accelerator)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if local:
        return accelerator, local, int(os.environ["WORLD_SIZE"]) // local
    if devices > (there := _there(accelerator)):
        raise SpecError("E511", f"this machine has no {devices} of {device}", hint=f"--devices {there}")
    return accelerator, [int(number)] if number else devices, 1


def _there(accelerator: str) -> int:
    """How many devices of a kind there are; processes, where that is the processor."""
    if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.cuda.device_count()
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return 1
    return os.cpu_count() or 1


@contextmanager
def quiet() -> Generator[None]:
    """Lightning without its adverts, and without warnings that do not hold here: our batches do resume."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)
