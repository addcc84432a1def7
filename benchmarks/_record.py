"""What every benchmark notes beside its numbers, and where it writes them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("unroll-compiler", "torch", "sympy", "numpy", "lightning")


def cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def write(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write results/NAME.json and print the rows as a table."""
    machine = {"cpu": cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    versions = {package: metadata.version(package) for package in PACKAGES}
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {"commit": commit(), "when": when, "machine": machine, "versions": versions, **facts, "rows": rows}
    target = ROOT / "benchmarks" / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(rows)
    print(f"wrote {target.relative_to(ROOT)}; {machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}")


def show(rows: list[dict[str, Any]]) -> None:
    cells = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
