"""Kill a training at random moments, go on, and compare with one that was left alone: python -m tests.train.kill --times 10

Only what is killed needs a process of its own: to start one takes longer than the training.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from unroll.train import resume, train

STEPS = 150
OPTIONS = [
    f"train.steps={STEPS}",
    "train.validate_every=7",
    "train.ema=0.9",
    "train.keep=last",
    "data.train=512",
    "data.validation=64",
]
SPEC = """
name: killed
use: lasso
dims: {m: 8, n: 16}
unroll: {algorithm: proximal_gradient, layers: 3, parametrisation: lista}
data: {source: synthetic, sparsity: 0.2}
train: {loss: nmse, batch: 32}
"""


def start(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "unroll", "train", *words, "-q"], stdout=subprocess.DEVNULL)


def compare(folder: Path, whole: Path) -> bool:
    """Weights to the bit, and the rows of the journal but for the clock."""
    ours, theirs = (load_file(f / "weights.safetensors") for f in (folder, whole))
    rows = [[line.split(",") for line in (f / "metrics.csv").read_text().splitlines()] for f in (folder, whole)]
    clock = rows[0][0].index("seconds")
    kept = [[[cell for i, cell in enumerate(row) if i != clock] for row in table] for table in rows]
    return (
        kept[0] == kept[1] and ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    )


def steps(folder: Path) -> int:
    """Of the last row of the journal; -1 before there is a run folder."""
    if not (folder / "run.json").exists():
        return -1
    rows = (folder / "metrics.csv").read_text().splitlines()[1:] if (folder / "metrics.csv").exists() else []
    return int(rows[-1].split(",")[0]) if rows else 0


def killed(spec: Path, folder: Path, step: int, more: float) -> int:
    """Start, kill -9 `more` seconds after a step, and go on until it is done; returns the steps that were saved."""
    process = start(str(spec), *OPTIONS, "--out", str(folder))
    while steps(folder) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(more)
    process.kill()
    process.wait()
    last = folder / "checkpoints" / "last.ckpt"
    saved = int(torch.load(last, weights_only=True)["global_step"]) if last.exists() else 0
    resume(folder, quiet=True)
    return saved


def main(times: int, seed: int) -> int:
    draw, bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        spec, whole = Path(place) / "killed.yaml", Path(place) / "whole"
        spec.write_text(SPEC)
        train(spec, overrides=OPTIONS, out=whole, quiet=True)
        for k in range(times):
            step, more = draw.randrange(STEPS), draw.uniform(0, 0.05)
            saved = killed(spec, Path(place) / str(k), step, more)
            same = compare(Path(place) / str(k), whole)
            bad += not same
            result = "equal to the bit" if same else "DIFFERS"
            print(f"killed after step {step:3}, {saved:3} of {STEPS} steps saved: {result}", flush=True)
    print(f"{times - bad} of {times} equal")
    return int(bad > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    raise SystemExit(main(given.times, given.seed))
