"""Training: a network as the `data:` and `train:` sections of its spec say. Nothing heavy is imported before it is used.

in    a spec; the folder of a run
out   `run.train`, `run.resume`, `run.evaluate`: a `Run`, in a folder that resumes bit for bit
open  run.py first (from spec to folder); then data.py, tasks.py (what is measured), engine.py (the loop; alone imports lightning)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unroll.train.run import Interrupted, Run, evaluate, resume, train, trained

__all__ = ["Interrupted", "Run", "evaluate", "resume", "train", "trained"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("unroll.train.run"), name)
    raise AttributeError(f"module 'unroll.train' has no attribute '{name}'")
