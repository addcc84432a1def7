"""Samples: what every source of data makes, and the trainer draws its batches from.

Shapes: batch first, B samples; a vector [n] is (B, n), a matrix [d, N] is (B, N, d), an image (B, C, H, W),
T tokens (B, T).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from unroll.errors import SpecError
from unroll.model.words import Words

Shape = tuple[int | None, ...]
Tensors = dict[str, Tensor]
Place = Tensor | torch.device | torch.dtype


@dataclass(frozen=True)
class Shapes:
    """What a problem asks of its data: stored shapes without the batch axis; None where a size is open."""

    inputs: Mapping[str, Shape]
    variables: Mapping[str, Shape] = field(default_factory=dict[str, Shape])
    parameters: Mapping[str, Shape] = field(default_factory=dict[str, Shape])
    model: str = ""
    """what the model around the layers takes in the place of their input, tokens or image; "" if that is the input"""


class Samples(Protocol):
    """What can be trained on: batches are `samples[places]` for some of the places that `order` puts in a row.

    whole: all of it, each sample once; of what is larger than memory a part.  labels: all of them, in the same order; or of that part.
    """

    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def order(self, draw: torch.Generator) -> Tensor: ...
    def __getitem__(self, index: Tensor) -> Split: ...
    def whole(self) -> Split: ...
    def to(self, like: Place) -> Samples: ...


class Held(Protocol):
    """What can be measured on, as it lies: `batches` of all of it. bytes: see Split."""

    @property
    def labels(self) -> Tensor | None: ...
    @property
    def bytes(self) -> int | None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: slice) -> Split: ...
    def whole(self) -> Split: ...
    def to(self, like: Place) -> Held: ...
    def batches(self, size: int) -> Iterator[Split]: ...


@dataclass(frozen=True)
class Split:
    """Samples: inputs by name, and the true values of variables where the source knows them. All (B, ...).

    labels: (B,) the class of each sample, or (B, T) the answer at each token; whole numbers, below 0 where there is none.
    bytes: of the text that all labels stand for, where that is known.
    mixed: (labels of other samples that are mixed in, share of the sample itself), both (B,).
    """

    inputs: Tensors
    targets: Tensors = field(default_factory=dict[str, Tensor])
    labels: Tensor | None = None
    bytes: int | None = None
    mixed: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: Tensor | slice) -> Split:
        labels = None if self.labels is None else self.labels[index]
        mixed = None if self.mixed is None else (self.mixed[0][index], self.mixed[1][index])
        inputs, targets = ({k: v[index] for k, v in part.items()} for part in (self.inputs, self.targets))
        return Split(inputs, targets, labels, mixed=mixed)

    def order(self, draw: torch.Generator) -> Tensor:
        """The samples of one epoch, shuffled."""
        return torch.randperm(len(self), generator=draw)

    def whole(self) -> Split:
        """All of it, each sample once."""
        return self

    def to(self, like: Place) -> Split:
        """The same samples with the device and dtype of `like`; whole numbers keep their dtype."""
        labels = None if self.labels is None else moved(self.labels, like)
        return Split(
            {k: moved(v, like) for k, v in self.inputs.items()},
            {k: moved(v, like) for k, v in self.targets.items()},
            labels,
            self.bytes,
            None if self.mixed is None else (moved(self.mixed[0], like), moved(self.mixed[1], like)),
        )

    def batches(self, size: int) -> Iterator[Split]:
        """The samples as they lie, `size` at a time; the last batch may be smaller."""
        return (self[slice(k, k + size)] for k in range(0, len(self), size))


def moved(value: Tensor, like: Place) -> Tensor:
    """value with the device and, if it has a fraction, the dtype of `like`."""
    if value.is_floating_point() or isinstance(like, torch.device):
        return value.to(like)
    return value if isinstance(like, torch.dtype) else value.to(like.device)


@dataclass(frozen=True)
class Windows:
    """Stretches of `length` tokens of a row of L codes; the label of each token is the one after it.

    An epoch starts at a random place below `length` and goes through the row once, in windows that do not overlap, in a
    shuffled order. Windows are cut out when a batch needs them: places are the first tokens of windows.
    """

    name: str
    codes: Tensor
    length: int

    def __len__(self) -> int:
        """Windows of one epoch: every start leaves room for them and for the label of the last token."""
        return (len(self.codes) - self.length) // self.length

    def order(self, draw: torch.Generator) -> Tensor:
        start = torch.randint(self.length, (), generator=draw)
        return start + self.length * torch.randperm(len(self), generator=draw)

    def __getitem__(self, index: Tensor) -> Split:
        rows = self.codes[index[:, None] + torch.arange(self.length + 1)]
        return Split({self.name: rows[:, :-1]}, labels=rows[:, 1:])

    @property
    def labels(self) -> Tensor:
        return self.codes[None, 1:]

    def whole(self) -> Split:
        """All tokens as one long sample."""
        return Split({self.name: self.codes[None, :-1]}, labels=self.labels)

    def to(self, like: Place) -> Windows:
        return Windows(self.name, moved(self.codes, like), self.length)


Change = Callable[[Samples, Tensor, torch.Generator], Split]
"""(samples, places of a batch, random numbers of its step) -> the batch as training sees it."""


@dataclass(frozen=True)
class Data:
    """Samples to train on, samples held out, and what comes with them.

    parameters: values of the problem's parameters.  notes: lines for the reader.
    sizes: what the data say about a model, such as classes or vocabulary.
    kept: what the samples mean (names of classes, the characters): a run can go on only while it stays the same.
    change: takes every batch in training from `train`, with random numbers of that step alone.  mixes: in mixtures of samples.
    words: what tokens stand for.  workers: processes that read batches ahead of the training.
    """

    source: str
    train: Samples
    validation: Held
    parameters: Tensors = field(default_factory=dict[str, Tensor])
    notes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    kept: Mapping[str, Any] = field(default_factory=dict[str, Any])
    change: Change | None = None
    words: Words | None = None
    workers: int = 0
    mixes: bool = False

    def summary(self) -> list[tuple[str, str, str, str, str]]:
        """Rows to print before training: what, name, shape, range, dtype."""
        train, held = self.train.whole(), self.validation.whole()
        parts = [
            ("train", train.inputs),
            ("train target", train.targets),
            ("train label", _named(train.labels)),
            ("held out", held.inputs),
            ("held-out target", held.targets),
            ("held-out label", _named(held.labels)),
            ("parameter", self.parameters),
        ]
        return [(what, name, *_describe(value)) for what, tensors in parts for name, value in tensors.items()]


def _named(labels: Tensor | None) -> Tensors:
    return {} if labels is None else {"label": labels}


def _describe(value: Tensor) -> tuple[str, str, str]:
    low, high = value.aminmax()
    shape = " × ".join(f"{size:,}" for size in value.shape)
    return shape, f"{low.item():.3g} .. {high.item():.3g}", str(value.dtype).removeprefix("torch.")


def divide(samples: Split, validation: float, seed: int) -> tuple[Split, Split]:
    """(train, held out): shuffled, the last `validation` samples held out; below 1 it is a share."""
    train, held = shuffled(len(samples), validation, seed)
    return samples[train], samples[held]


def shuffled(count: int, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers below count in two parts, of which the second has `validation`. Raises SpecError E504."""
    held = round(validation * count) if validation < 1 else int(validation)
    if not 0 < held < count:
        raise SpecError("E504", f"cannot hold out {held:,} of {count:,} samples", hint="set data: validation:")
    order = torch.randperm(count, generator=generator(seed))
    return order[:-held], order[-held:]


def generator(seed: int) -> torch.Generator:
    """A private source of random numbers: neither reads nor moves the global one."""
    return torch.Generator().manual_seed(seed)


NEEDED = {"patches": ("sklearn.datasets",), "digits": ("sklearn.datasets",), "images": ("PIL.Image",)}
"""What sources of data need of the extra."""


def package(name: str, wanted_by: str, extra: str = "train") -> ModuleType:
    """Import an optional package. Raises SpecError E501 with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name.split(".")[0] != error.name.split(".")[0]:
            raise
        hint = f"pip install 'unroll-compiler[{extra}]'" if extra else f"pip install {name}"
        raise SpecError(
            "E501", f"{wanted_by} needs the package {error.name}, which is not installed", hint=hint
        ) from error
