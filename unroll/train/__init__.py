"""Train a network as the `data:` and `train:` sections of its spec say. Nothing heavy is imported before it is used."""

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
