"""Batches made ahead of the training by other processes, in their order: batch k is the same whoever makes it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from unroll.errors import UnrollError
from unroll.train.samples import Split


@dataclass(frozen=True)
class _Made(Dataset[Any]):
    make: Callable[[int], Split]

    def __getitem__(self, k: int) -> Split | UnrollError:
        try:
            return self.make(k)
        except UnrollError as error:  # as it is: torch would make another one of it on the way
            return error


def ahead(make: Callable[[int], Split], steps: range, workers: int) -> Iterator[Split]:
    """make(k) for every k of the steps, two batches ahead in each of so many processes; 0: here, when it is asked for."""
    if not workers:
        yield from map(make, steps)
        return
    loader: Any = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_patient,
        generator=torch.Generator(),  # the global random numbers are not moved
    )
    for found in loader:
        if isinstance(found, UnrollError):
            raise found
        yield cast(Split, found)


def _as_it_is(batch: object) -> object:
    return batch


def _patient(worker: int) -> None:
    """Ctrl-C is for the training, which ends this process when it is done."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
