"""Seconds from the start of Python to `import unroll` done, to `unroll --help` printed. Target: below 0.3 s.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from _record import write

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import unroll": ("-c", "import unroll"),
    "unroll --help": ("-m", "unroll", "--help"),
    "unroll list": ("-m", "unroll", "list"),
    "import torch": ("-c", "import torch"),
}
REPEATS = 7


def seconds(words: tuple[str, ...]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    rows: list[dict[str, object]] = []
    for name, words in COMMANDS.items():
        seconds(words)  # files are in memory then
        times = [seconds(words) for _ in range(REPEATS)]
        rows.append({"command": name, "median s": statistics.median(times), "least s": min(times)})
    write("import_time", rows, repeats=REPEATS)


if __name__ == "__main__":
    main()
