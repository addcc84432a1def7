"""Time and peak memory, measured alike in every benchmark."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def once(run: Run, device: str, least: float) -> float:
    """Seconds of one call, over at least `least` seconds: of the processor on a CPU, of the clock on anything else."""
    on_cpu = torch.device(device).type == "cpu"
    now = time.process_time if on_cpu else time.perf_counter
    count, start = 0, now()
    while (spent := now() - start) < least:
        run()
        if not on_cpu:
            torch.accelerator.synchronize()
        count += 1
    return spent / count


def interleaved(runs: Mapping[str, Run], device: str, rounds: int, least: float = 0.05) -> dict[str, list[float]]:
    """Seconds of every run in every round; each round runs all of them, beginning with another one."""
    names = list(runs)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(once(runs[name], device, least))
    return seconds


def against(seconds: Mapping[str, list[float]], base: str) -> list[dict[str, object]]:
    """A row for every run: its median time, and the median over the rounds of its ratio to `base`."""
    return [
        {
            "module": name,
            "ms": 1e3 * statistics.median(spent),
            f"ratio to {base}": statistics.median(a / b for a, b in zip(spent, seconds[base], strict=True)),
        }
        for name, spent in seconds.items()
    ]


def peak_mb(run: Run, device: str) -> float:
    """Megabytes that one call adds to the peak; on a CPU to that of the process, which must not have run it before."""
    if torch.device(device).type != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
