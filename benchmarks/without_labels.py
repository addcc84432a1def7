"""One small CRATE trained on digits by SimDINO and by rate reduction, without labels and with them, beside the same network untrained and supervised.

Probes are fitted to the features of 1,500 training images and measured on 297 others. One training is made to collapse: the rate does not count in it.
Writes results/without_labels.json.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

from _record import write

from unroll.train import train

LABELS = [
    "train.loss.objective.scalars={eps2: 0.5, gam1: 1, gam2: 1, delta: 1e-6}",
    "train.loss.takes={Z: {of: network}, Pi: {of: labels}}",
]
SAME = ["unroll.layers=3", "model.embed.patch=4", "train.warmup=30", "train.probes={}"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "SimDINO": ("simdino_digits", []),
    "SimDINO, gamma = 0": ("simdino_digits", ["train.loss.objective.scalars.gamma=0"]),
    "rate reduction, a class for each sample": ("mcr2_digits", []),
    "rate reduction, labels": ("mcr2_digits", LABELS),
    "cross entropy, labels": ("crate_digits", SAME),
}
KEYS = ("rank", "rate", "probe_neighbours", "probe_linear", "probe_subspaces")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--epochs", type=int, default=20)
    parse.add_argument("--seed", type=int, default=0)
    asked = parse.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for name, (spec, overrides) in RUNS.items():
            settings = [*overrides, f"train.epochs={asked.epochs}", f"train.seed={asked.seed}", "train.keep=last"]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                run: Any = train(spec, overrides=settings, out=Path(place) / str(len(rows)), quiet=True)
            found = {row.name: row.to_dict() for row in run.table}
            if not rows:
                rows.append(shown("the samples themselves", found["the samples themselves"]))
                rows.append(shown("untrained", found["untrained"]))
            heard = [str(w.message) for w in said if "collapsed" in str(w.message)]
            rows.append(shown(name, found[f"{spec}, trained"], run.seconds, heard))
    write("without_labels", rows, epochs=asked.epochs, seed=asked.seed)


def shown(name: str, row: dict[str, Any], seconds: float = 0.0, heard: list[str] | None = None) -> dict[str, Any]:
    return {"network": name, **{key: row[key] for key in KEYS}, "seconds": seconds, "said": "; ".join(heard or ["-"])}


if __name__ == "__main__":
    main()
