"""The training loop: Lightning's Trainer, made to resume bit for bit at any step. The only file that imports lightning.

Lightning sees the whole training as one epoch of `steps` batches, and batch k is a pure function of (seed, k): nothing
of its bookkeeping of epochs, samplers or loaders takes part. Callbacks hold the rest: random numbers, clock, journal.
Learning rates and stages are pure functions of the step.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from unroll.errors import SpecError
from unroll.spec.schema import Rates, Train
from unroll.train import losses
from unroll.train.data import Data, Split, generator, package
from unroll.train.losses import Net, Outcome, Status
from unroll.train.metrics import flat, nmse

EPOCHS = 20  # where neither epochs, steps nor minutes are given
FOREVER = 2**31  # steps, where only the clock ends the training
COLUMNS = ("step", "epoch", "seconds", "lr", "depth", "loss", "held_out", "nmse")


@dataclass(frozen=True)
class Stage:
    """Steps start .. stop train the first `depth` layers; anneals: the learning rate may fall to 0 in it."""

    depth: int
    start: int
    stop: int
    anneals: bool


# --- the plan: pure functions of the step ----------------------------------------------------------------------------


def plan(settings: Train, layers: int, steps: int) -> tuple[Stage, ...]:
    """end_to_end: one stage. layerwise: depth 1, 2, .., layers with equal shares of the steps, then all together.

    Source of the order: Chen, Liu, Wang & Yin 2018, arXiv 1808.10038, section 4.
    """
    if settings.stages == "end_to_end":
        return (Stage(layers, 0, steps, True),)
    if steps == FOREVER:
        raise SpecError("E511", "train: stages: layerwise needs epochs: or steps:", hint="minutes: may stay as a limit")
    greedy = steps - round(settings.refine * steps)
    if greedy < layers:
        raise SpecError("E511", f"train: {greedy} steps are too few for {layers} stages, one per layer")
    cuts = [round(greedy * k / layers) for k in range(layers + 1)]
    stages = [Stage(k, cuts[k - 1], cuts[k], False) for k in range(1, layers + 1)]
    return (*stages, Stage(layers, greedy, steps, True)) if greedy < steps else tuple(stages)


def rate(settings: Train, stage: Stage, step: int, share: float) -> float:
    """Factor of the learning rate: a linear warm-up, then 1, or (1 + cos(pi share)) / 2 in a stage that anneals."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    cosine = settings.schedule == "cosine" and stage.anneals
    return warm * (0.5 * (1 + math.cos(math.pi * min(share, 1.0))) if cosine else 1.0)


def rates(settings: Train) -> Rates:
    """Learning rates by kind of parameter; where one number is given, what is no matrix learns ten times as fast."""
    lr = settings.lr
    return lr if isinstance(lr, Rates) else Rates(matrices=lr, scalars=10 * lr)


def parameter_groups(net: Net, settings: Train) -> list[dict[str, Any]]:
    """One group per kind: matrices, and everything smaller (steps, thresholds)."""
    lr = rates(settings)
    by_kind = {"matrix": lr.matrices, "scalar": lr.scalars}
    found: dict[str, list[nn.Parameter]] = {"matrix": [], "scalar": []}
    for item, p in zip(net.learned, losses.module(net).parameters(), strict=True):
        found[item.kind].append(p)
    return [{"params": ps, "lr": by_kind[k], "base_lr": by_kind[k], "kind": k} for k, ps in found.items() if ps]


# --- what Lightning drives -------------------------------------------------------------------------------------------


class Batches:
    """Batch k of the training, k = 0, 1, ..: a pure function of (seed, k). It starts where the trainer stands."""

    def __init__(self, samples: Split, size: int, seed: int, steps: int, trainer: L.Trainer) -> None:
        self.samples, self.size, self.seed, self.steps, self.trainer = samples, size, seed, steps, trainer

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Split]:
        start = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        mine = slice(self.trainer.global_rank, None, self.trainer.world_size)
        epoch, order = -1, torch.empty(0)
        per_epoch = len(self.samples) // self.size
        for step in range(start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(len(self.samples), generator=generator(self.seed + epoch))
            first = step % per_epoch * self.size
            yield self.samples[order[first : first + self.size][mine]]


class Task(L.LightningModule):
    """The network with its loss and optimiser; the place where a value that is not finite is named."""

    def __init__(self, net: Net, settings: Train, stages: Sequence[Stage], clock: Clock) -> None:
        super().__init__()
        self.net = losses.module(net)
        self.settings, self.stages, self.clock = settings, stages, clock
        self.loss = losses.find_loss(settings.loss)
        self.weights = losses.layer_weights(settings.layer_weights, net.layers)

    @property
    def stage(self) -> Stage:
        return next((s for s in self.stages if s.start <= self.global_step < s.stop), self.stages[-1])

    @property
    def factor(self) -> float:
        """What the learning rates are multiplied with at this step."""
        known = self.stage.stop < FOREVER
        share = (
            (self.global_step - self.stage.start) / (self.stage.stop - self.stage.start) if known else self.clock.share
        )
        return rate(self.settings, self.stage, self.global_step, share)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(cast(Net, self.net), self.settings)
        decay = self.settings.weight_decay
        match self.settings.optimizer:
            case "adam":
                return torch.optim.Adam(groups, weight_decay=decay)
            case "adamw":
                return torch.optim.AdamW(groups, weight_decay=decay)
            case "sgd":
                return torch.optim.SGD(groups, momentum=self.settings.momentum, weight_decay=decay)

    def training_step(self, batch: Split, index: int) -> Tensor:
        del index
        depth = self.stage.depth
        weights = self.weights if depth == len(self.weights) else (0.0,) * (depth - 1) + (1.0,)
        value = losses.total(self.loss, cast(Net, self.net), batch.inputs, batch.targets, weights)
        if not bool(value.isfinite()):
            raise blame(cast(Net, self.net), batch, self.global_step)
        return value

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **also_unused: Any) -> None:
        """Clip the norm of the whole gradient, refuse one that is not finite, and set this step's learning rates."""
        del unused, also_unused
        learned = [p for p in self.net.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
        if not bool(norm.isfinite()):
            raise blame_gradient(cast(Net, self.net), self.global_step)
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(learned, self.settings.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor

    def transfer_batch_to_device(self, batch: Split, device: torch.device, dataloader_idx: int) -> Split:
        del dataloader_idx
        return batch.to(device)


def blame(net: Net, batch: Split, step: int) -> SpecError:
    """The first thing that is not finite: a parameter, else an iterate by its layer, else the loss itself."""
    found = [describe(net, name, p) for name, p in losses.module(net).named_parameters() if not p.isfinite().all()]
    with torch.no_grad():
        states = losses.iterates(net, batch.inputs)
    for k, state in enumerate(states):
        found += [f"{name} after layer {k}" for name, z in state.items() if not z.isfinite().all()]
    what = found[0] if found else "the value of the loss"
    return _not_finite(what, step)


def blame_gradient(net: Net, step: int) -> SpecError:
    """Names the parameters whose gradient is not finite."""
    named = losses.module(net).named_parameters()
    found = [describe(net, name, p.grad) for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
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

    def __init__(self, folder: Path, held: Split, settings: Train, every: int, per_epoch: int, clock: Clock) -> None:
        self.folder, self.held, self.settings = folder, held, settings
        self.every, self.per_epoch, self.clock = every, per_epoch, clock
        self.best, self.stale = math.inf, 0
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
        step = trainer.global_step
        measured = evaluate(cast(Net, task.net), self.held, self.settings, task.loss)
        self.row = {
            "step": step,
            "epoch": step / self.per_epoch,
            "seconds": self.clock.seconds,
            "lr": rates(self.settings).matrices * task.factor,
            "depth": task.stage.depth,
            "loss": self.sum / max(self.count, 1),
            **measured,
        }
        self.sum, self.count = 0.0, 0
        better = measured["held_out"] < self.best
        self.best, self.stale = (measured["held_out"], 0) if better else (self.best, self.stale + 1)
        if self.settings.patience is not None and self.stale >= self.settings.patience:
            trainer.should_stop = True
        if trainer.is_global_zero:
            self._write(task, better)
        self._save(trainer)

    def _write(self, task: Task, better: bool) -> None:
        if better:
            write_weights(task.net, self.folder / "checkpoints" / "best.safetensors")
        append_row(self.folder / "metrics.csv", self.row)
        if self.board is not None:
            for name in ("loss", "held_out", "nmse", "lr"):
                self.board.add_scalar(name, self.row[name], int(self.row["step"]))
            self.board.flush()

    def _save(self, trainer: L.Trainer) -> None:
        """checkpoints/last.ckpt, whole or not at all."""
        path = self.folder / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path.with_suffix(".part"))
        if trainer.is_global_zero:
            os.replace(path.with_suffix(".part"), path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stale": self.stale, "sum": self.sum, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.stale = float(state_dict["best"]), int(state_dict["stale"])
        self.sum, self.count = float(state_dict["sum"]), int(state_dict["count"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        if trainer.is_global_zero:
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
    """The inverse of `write_weights`, in place."""
    load_model(net, str(path))


def append_row(path: Path, row: dict[str, float]) -> None:
    """One line more in a CSV file with COLUMNS as its head."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{row[name]:.9g}" for name in COLUMNS})


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def keep_rows(path: Path, step: int) -> None:
    """Forget rows after `step`: a resumed training writes them again."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    path.unlink(missing_ok=True)
    for row in kept:
        append_row(path, row)


def _board(folder: Path) -> Any:
    package("tensorboard", "train: tensorboard: true", extra="")
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


# --- the two verbs ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: Net, held: Split, settings: Train, loss: losses.Loss) -> dict[str, float]:
    """Loss of the last iterate and NMSE (sum ratio; nan without targets) over all held-out samples."""
    module = losses.module(net)
    like = next(module.parameters())
    was_training = module.training
    module.eval()
    held = held.to(like)
    parts = [losses.run(net, held[slice(k, k + settings.batch)].inputs) for k in range(0, len(held), settings.batch)]
    z = {name: torch.cat([part[name] for part in parts]) for name in net.variables}
    value = float(loss.value(net, held.inputs, z, held.targets))
    module.train(was_training)
    return {"held_out": value, "nmse": float(nmse(flat(z), flat(held.targets))) if held.targets else math.nan}


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
    Raises SpecError E508 (loss without its targets), E509 (a value that is not finite), E511 (settings).
    """
    _check(net, data, settings)
    size = min(settings.batch, len(data.train))
    per_epoch = len(data.train) // size
    steps = total_steps(settings, per_epoch)
    every = settings.validate_every or min(per_epoch, 500)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    clock = Clock(settings.minutes)
    journal = Journal(folder, data.validation, settings, every, per_epoch, clock)
    callbacks: list[L.Callback] = [Randomness(), clock, journal]
    if console is not None:
        callbacks.append(Bar(console, journal, steps, clock))
    last = folder / "checkpoints" / "last.ckpt"
    with quiet(), clock.listening():
        trainer = _trainer(settings, steps, callbacks, folder, device, devices)
        if not resume:
            torch.manual_seed(settings.seed)
        task = Task(net, settings, plan(settings, net.layers, steps), clock)
        like = next(losses.module(net).parameters())
        batches = Batches(data.train.to(like.dtype), size, settings.seed, steps, trainer)
        trainer.fit(task, batches, ckpt_path=last if resume else None, weights_only=True)
    best = folder / "checkpoints" / "best.safetensors"
    if settings.keep == "best" and best.exists():
        read_weights(losses.module(net), best)
    return Outcome(_status(clock, journal, settings), trainer.global_step, clock.seconds, journal.best)


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
    if losses.find_loss(settings.loss).supervised and not data.train.targets:
        hint = "set train: target: optimum, or train: loss: objective"
        raise SpecError("E508", f"train: loss: {settings.loss} needs the true {', '.join(net.variables)}", hint=hint)
    if next(losses.module(net).parameters(), None) is None:
        raise SpecError(
            "E511", "train: the network has nothing to learn", hint="give it a learn: section or a parametrisation:"
        )


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
    """(accelerator, devices, nodes). Under torchrun its counts hold: Lightning alone trains a copy per process."""
    accelerator, _, number = device.partition(":")
    accelerator = {"cuda": "gpu"}.get(accelerator, accelerator)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if local:
        return accelerator, local, int(os.environ["WORLD_SIZE"]) // local
    return accelerator, [int(number)] if number else devices, 1


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
