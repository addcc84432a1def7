"""The closing table: how good a network is, beside what it could have been and what is trivial."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from unroll.train import losses
from unroll.train.losses import Net
from unroll.train.metrics import flat, nmse, nmse_mean_db, objective_gap, support_f1
from unroll.train.samples import Split, Tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """One column of the table: the key of its values, its head, and how a number is shown."""

    key: str
    head: str
    show: Callable[[float], str]


class Line(Protocol):
    """What a row of the table is: numbers by the keys of the columns, None where there is none."""

    @property
    def name(self) -> str: ...
    def to_dict(self) -> dict[str, str | float | None]: ...


@dataclass(frozen=True)
class Score:
    """A row of any columns."""

    name: str
    values: Mapping[str, float]

    def to_dict(self) -> dict[str, str | float | None]:
        return {"name": self.name, **{k: v if math.isfinite(v) else None for k, v in self.values.items()}}


@dataclass(frozen=True)
class Closing:
    """What is said at the end of a training, on `samples` held-out samples.

    reference: what rows are compared with, "truth" or "optimum"; "" where they need no comparison.
    footer: what the table must say below itself.  layers: errors of iterates 0 .. layers by row, where there are any.
    confusion: how many samples of each class (row) get each answer (column), where there are classes.
    """

    rows: Sequence[Line]
    columns: Sequence[Column]
    samples: int
    reference: str = ""
    footer: str = ""
    notes: tuple[str, ...] = ()
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    confusion: Tensor | None = None

    def text(self, title: str) -> str:
        lines = [render(self.rows, self.columns, title), self.footer, *self.notes]
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class Reference:
    """What codes are compared with, on the held-out samples. values: {variable: (B, ...)}.

    kind: "truth" or "optimum".  best: the objective at the converged optimum, (B,); None where it was not solved.
    """

    kind: str
    values: Tensors
    best: Tensor | None


@dataclass(frozen=True)
class Row:
    """One row; see `unroll.train.metrics` for the definitions. nan: not defined. nmse_db: 10 log10(nmse); micros: microseconds per sample."""

    name: str
    nmse: float
    nmse_db: float
    nmse_mean_db: float
    objective: float
    gap: float
    f1: float
    micros: float

    def to_dict(self) -> dict[str, str | float | None]:
        """For JSON: nan, which JSON has no word for, is null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@torch.no_grad()
def measure(name: str, net: Net, held: Split, reference: Reference, layers: int | None = None) -> Row:
    """A network's row on held-out samples, all in one batch. layers: its depth, where that is free."""
    held = held.to(next(iter(losses.module(net).state_dict().values())))
    more = {} if layers is None else {"layers": layers}
    z, seconds = timed(net, held.inputs, lambda: losses.run(net, held.inputs, **more))
    return score(name, losses.objective(net, held.inputs, z), z, reference, 1e6 * seconds / len(held))


def score(name: str, value: Tensor, z: Tensors, reference: Reference, micros: float) -> Row:
    """The row of given codes. value: their objective, (B,)."""
    found, ref = (flat(v).double().cpu() for v in (losses.known(z, reference.values), reference.values))
    best = reference.best
    error = float(nmse(found, ref))
    return Row(
        name,
        error,
        10 * math.log10(error) if error > 0 else -math.inf,
        float(nmse_mean_db(found, ref)),
        float(value.mean()),
        math.nan if best is None else float(objective_gap(value.double().cpu(), best.double().cpu())),
        float(support_f1(found, ref)),
        micros,
    )


def timed(net: Net, inputs: Tensors, call: Callable[[], T], repeats: int = 3) -> tuple[T, float]:
    """What `call` gives with the network in evaluation, and the shortest of a few times that it took."""
    with evaluating(net):
        answer, times = call(), list[float]()
        for _ in range(repeats):
            _wait(inputs)
            start = time.perf_counter()
            answer = call()
            _wait(inputs)
            times.append(time.perf_counter() - start)
    return answer, min(times)


@contextmanager
def evaluating(net: Net) -> Generator[None]:
    """Inside, the network does not train: no dropout; afterwards it is as it was."""
    module = losses.module(net)
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _wait(inputs: Tensors) -> None:
    device = next(iter(inputs.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def errors_by_layer(net: Net, held: Split, reference: Reference) -> list[float]:
    """NMSE (sum ratio) of iterates 0 .. layers."""
    held = held.to(next(iter(losses.module(net).state_dict().values())))
    ref = flat(reference.values)
    states = (losses.known(state, reference.values) for state in losses.iterates(net, held.inputs))
    return [float(nmse(flat(state).to(ref), ref)) for state in states]


def render(rows: Sequence[Line], columns: Sequence[Column], title: str) -> str:
    """The table as text; "-" where there is no number."""
    grid = [(title, *(c.head for c in columns))]
    for row in rows:
        values = row.to_dict()
        grid.append((row.name, *("-" if (v := values.get(c.key)) is None else c.show(float(v)) for c in columns)))
    wide = [max(len(row[i]) for row in grid) for i in range(len(columns) + 1)]
    lines = [
        "   ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))])
        for row in grid
    ]
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:.3g}"


def fixed(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def decibel(value: float) -> str:
    return "-" if value < -250 else f"{value:.2f}"  # below: exact up to rounding


MICROS = Column("micros", "µs per sample", fixed)
CODES = (
    Column("nmse", "NMSE (sum ratio)", number),
    Column("nmse_db", "NMSE (dB)", decibel),
    Column("nmse_mean_db", "NMSE (mean dB)", decibel),
    Column("gap", "objective gap", number),
    Column("f1", "support F1", fixed),
    MICROS,
)
AGAINST = {"truth": "the true codes", "optimum": "the converged optimum"}
