"""The closing table: how near a network comes to the reference, beside the algorithms that it could have been."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from unroll.train import losses
from unroll.train.data import Split, Tensors
from unroll.train.losses import Net
from unroll.train.metrics import flat, nmse, nmse_mean_db, objective_gap, support_f1


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
    """One row; see `unroll.train.metrics` for the definitions. nan: not defined. micros: microseconds per sample."""

    name: str
    nmse: float
    nmse_mean_db: float
    objective: float
    gap: float
    f1: float
    micros: float

    def to_dict(self) -> dict[str, str | float | None]:
        """For JSON: nan, which JSON has no word for, is null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@torch.no_grad()
def measure(name: str, net: Net, held: Split, reference: Reference) -> Row:
    """A network's row on held-out samples, all in one batch."""
    held = held.to(next(iter(losses.module(net).state_dict().values())))
    z, seconds = _timed(net, held.inputs)
    return score(name, losses.objective(net, held.inputs, z), z, reference, 1e6 * seconds / len(held))


def score(name: str, value: Tensor, z: Tensors, reference: Reference, micros: float) -> Row:
    """The row of given codes. value: their objective, (B,)."""
    found, ref = flat(z).double().cpu(), flat(reference.values).double().cpu()
    best = reference.best
    return Row(
        name,
        float(nmse(found, ref)),
        float(nmse_mean_db(found, ref)),
        float(value.mean()),
        math.nan if best is None else float(objective_gap(value.double().cpu(), best.double().cpu())),
        float(support_f1(found, ref)),
        micros,
    )


def _timed(net: Net, inputs: Tensors, repeats: int = 3) -> tuple[Tensors, float]:
    """The answer, and the shortest of a few times that it took."""
    module = losses.module(net)
    was_training = module.training
    module.eval()
    z, times = losses.run(net, inputs), list[float]()
    for _ in range(repeats):
        _wait(inputs)
        start = time.perf_counter()
        z = losses.run(net, inputs)
        _wait(inputs)
        times.append(time.perf_counter() - start)
    module.train(was_training)
    return z, min(times)


def _wait(inputs: Tensors) -> None:
    device = next(iter(inputs.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def errors_by_layer(net: Net, held: Split, reference: Reference) -> list[float]:
    """NMSE (sum ratio) of iterates 0 .. layers."""
    held = held.to(next(iter(losses.module(net).state_dict().values())))
    ref = flat(reference.values)
    return [float(nmse(flat(state).to(ref), ref)) for state in losses.iterates(net, held.inputs)]


HEAD = ("NMSE (sum ratio)", "NMSE (mean dB)", "objective gap", "support F1", "µs per sample")


def render(rows: tuple[Row, ...], reference: str, title: str) -> str:
    """The table as text."""
    against = {"truth": "the true codes", "optimum": "the converged optimum"}[reference]
    cells = [
        (r.name, _number(r.nmse), _decibel(r.nmse_mean_db), _number(r.gap), _fixed(r.f1), _fixed(r.micros))
        for r in rows
    ]
    grid = [(title, *HEAD), *cells]
    wide = [max(len(row[i]) for row in grid) for i in range(len(HEAD) + 1)]
    lines = [
        "   ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))])
        for row in grid
    ]
    return "\n".join([*lines, f"NMSE and support F1 are against {against}"])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _fixed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _decibel(value: float) -> str:
    return "-" if math.isnan(value) or value < -250 else f"{value:.2f}"  # below: exact up to rounding
