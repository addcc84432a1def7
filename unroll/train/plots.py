"""Pictures of a run as PNG files: the course of the training, the error layer by layer, the atoms of a dictionary, which classes are mistaken for which."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unroll.errors import printable
from unroll.train.samples import package
from unroll.train.table import Closing, Column

NAMED = 30
"""Classes whose names there is room for."""


def curves(rows: Sequence[Mapping[str, float]], closing: Closing, column: Column, path: Path) -> None:
    """Left: loss by epoch, in training and held out. Right: the errors of the layers, else `column` by epoch."""
    figure, (left, right) = _figure(2)
    epochs = [row["epoch"] for row in rows]
    for key, label in (("loss", "training"), ("held_out", "held out")):
        left.plot(epochs, [row[key] for row in rows], label=label)
    values = [row[key] for row in rows for key in ("loss", "held_out")]
    if values and 0 < 10 * min(values) < max(values):
        left.set_yscale("log")
    left.set(xlabel="epoch", ylabel="loss")
    if closing.layers:
        _by_layer(right, closing)
    else:
        _by_epoch(right, rows, closing, column)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="best")
    _save(figure, path)


def _by_layer(axis: Any, closing: Closing) -> None:
    """NMSE (sum ratio, dB) after each layer, a line for each row of the table."""
    for label, errors in closing.layers.items():
        decibel = [10 * math.log10(v) if v > 0 else math.nan for v in errors]
        axis.plot(range(len(decibel)), decibel, marker="o", markersize=3, label=label)
    axis.set(xlabel="layer", ylabel=f"NMSE in dB, against the {closing.reference}")


def _by_epoch(axis: Any, rows: Sequence[Mapping[str, float]], closing: Closing, column: Column) -> None:
    """A column of metrics.csv; level lines for the rows of the table that were not trained."""
    axis.plot([row["epoch"] for row in rows], [row[column.key] for row in rows], label="held out")
    for line, row in enumerate(closing.rows[:-1], start=1):
        value = row.to_dict().get(column.key)
        if value is not None:
            axis.axhline(float(value), color=f"C{line}", linestyle="--", linewidth=1, label=row.name)
    axis.set(xlabel="epoch", ylabel=column.head)


def confusion(counts: Tensor, names: Sequence[str], path: Path) -> None:
    """How many samples of each class (row) get each answer (column): a picture of shares of each row, and numbers as CSV beside it."""
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *names])
        writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    figure, (axis,) = _figure(1)
    shares = (counts.double() / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="answer", ylabel="label")
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), [printable(name) for name in names], rotation=90)
        axis.set_yticks(range(len(names)), [printable(name) for name in names])
    figure.colorbar(picture, label="share of the samples of a label")
    _save(figure, path)


def atoms(dictionary: Tensor, path: Path) -> bool:
    """The columns of (m, n) as a wall of square pictures; not drawn if m is no square. Returns whether it was."""
    m, n = dictionary.shape
    side = math.isqrt(m)
    if side * side != m:
        return False
    columns = math.ceil(math.sqrt(n))
    wall = np.full((math.ceil(n / columns) * (side + 1) + 1, columns * (side + 1) + 1), np.nan)
    for k, atom in enumerate(dictionary.detach().double().cpu().T.numpy()):
        top, left = (k // columns) * (side + 1) + 1, (k % columns) * (side + 1) + 1
        wall[top : top + side, left : left + side] = (atom / max(abs(atom).max(), 1e-12)).reshape(side, side)
    figure, (axis,) = _figure(1)
    axis.imshow(wall, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.axis("off")
    _save(figure, path)
    return True


def _figure(panels: int) -> tuple[Any, Any]:
    """A figure that never opens a window."""
    figure_module = package("matplotlib.figure", "the pictures of a run")
    package("matplotlib.backends.backend_agg", "the pictures of a run")
    figure: Any = figure_module.Figure(figsize=(5 * panels, 4), dpi=120, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
