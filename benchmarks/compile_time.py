"""Seconds of `unroll.compile` per spec, once torch and sympy are loaded: each in a fresh process, then again.

cold: first time in a process that has compiled nothing.  cached: the same spec again, derived proxes remembered.
Target: 0.3 s.

python benchmarks/compile_time.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from _record import write

from unroll.spec import library

REPEATS = 3
CODE = """
import json, sys, time
import networkx, pydantic, sympy, torch, unroll
from unroll import api
from unroll.network import network
from unroll.spec import load
torch.set_num_threads(1)
times = []
for _ in range(3):
    start, busy = time.perf_counter(), time.process_time()
    unroll.compile(sys.argv[1])
    times.append((time.perf_counter() - start, time.process_time() - busy))
print(json.dumps(times))
"""


def measure(name: str) -> list[list[float]]:
    done = subprocess.run([sys.executable, "-c", CODE, name], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    rows: list[dict[str, object]] = []
    for name in library.names("specs"):
        runs = [measure(name) for _ in range(REPEATS)]
        cold, cached = ([run[i] for run in runs] for i in (0, -1))
        rows.append(
            {
                "spec": name,
                "cold s": statistics.median(wall for wall, _ in cold),
                "cold, processor s": statistics.median(busy for _, busy in cold),
                "cached s": statistics.median(wall for wall, _ in cached),
                "cached, processor s": statistics.median(busy for _, busy in cached),
            }
        )
        print(*(f"{v:.2f}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    write("compile_time", rows, repeats=REPEATS, threads=1)


if __name__ == "__main__":
    main()
