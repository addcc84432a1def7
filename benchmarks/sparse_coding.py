"""NMSE at depth 16 on noiseless synthetic codes: the plain algorithms, and networks trained for 60 s each.

m = 250, n = 500, 10 % nonzeros, A Gaussian with unit columns.

python benchmarks/sparse_coding.py            needs [train]; takes about five minutes
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _record import write

from unroll.train import train

NETWORKS = {"step_lista": "learned steps", "lista_cp": "LISTA-CP"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for spec, name in NETWORKS.items():
        settings = (
            f"train.minutes={args.seconds / 60}",
            "train.epochs=100000",
            "dims.m=250",
            "dims.n=500",
            "unroll.layers=16",
        )
        with tempfile.TemporaryDirectory() as folder:
            run = train(spec, overrides=settings, out=Path(folder) / "run", device=args.device, quiet=True)
        for row in run.table:
            plain = not row.name.endswith("trained")
            if plain and spec != next(iter(NETWORKS)):
                continue
            rows.append(
                {
                    "network": row.name if plain else f"{name}, {run.seconds:.0f} s, {run.steps:,} steps",
                    "NMSE (sum ratio)": row.nmse,
                    "NMSE (mean dB)": row.nmse_mean_db,
                    "support F1": row.f1,
                }
            )
    facts = {"m": 250, "n": 500, "nonzeros": 0.1, "snr": None, "samples": run.samples, "seconds": args.seconds}
    rows.sort(key=lambda row: -row["NMSE (sum ratio)"])
    write("sparse_coding", rows, **facts, device=args.device, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
