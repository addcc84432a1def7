"""What all tests share: the golden texts, and the worst error of the gradient law, printed at the end of a run."""

from __future__ import annotations

import gc
from typing import Any

import pytest

LAW = "gradient against autograd"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the texts in tests/goldens/ anew")


@pytest.fixture
def update_goldens(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-goldens"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Gather what tests recorded under LAW, from the workers of xdist too: (expressions, worst relative error)."""
    rows = [v for r in terminalreporter.getreports("passed") for k, v in r.user_properties if k == LAW]
    if rows:
        count, worst = sum(n for n, _ in rows), max(e for _, e in rows)
        terminalreporter.write_line(f"{LAW}: {count} derivatives, worst relative error {worst:.1e}")


def pytest_configure() -> None:
    gc.set_threshold(20_000, 20, 20)  # importing and collecting make many objects that all stay


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are faster on one thread, and workers do not fight for cores."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: not to be looked through at every collection
