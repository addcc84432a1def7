"""The tasks of labels: classes of samples, and the next character at each place of a text.

A label costs −log p(label) nats, a nat is 1/log 2 bits.  What needs no network is measured beside it: the distribution
of the training labels alone, and for text that of the label after each character.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unroll.spec.schema import Train
from unroll.train import losses
from unroll.train.losses import Net
from unroll.train.samples import Data, Split
from unroll.train.table import Score


@torch.no_grad()
def held_out(net: Net, held: Split, settings: Train) -> dict[str, float]:
    """nats and bits per label, and the share of labels that are the likeliest answer; no label smoothing."""
    nats = hits = count = 0.0
    for batch in held.batches(settings.batch):
        labels = labels_of(batch)
        answer: Tensor = net(*losses.arguments(net, batch.inputs))
        logits = answer.flatten(0, -2).double()
        nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        hits += float((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return _measured(nats / count, hits / count)


def _measured(nats: float, accuracy: float) -> dict[str, float]:
    return {"held_out": nats, "nats": nats, "bits": nats / math.log(2), "accuracy": accuracy}


def labels_of(samples: Split) -> Tensor:
    """All labels in one row."""
    assert samples.labels is not None, "internal error, please report: samples without labels"
    return samples.labels.flatten()


def classes(net: Net, data: Data, settings: Train) -> list[Score]:
    """The most frequent class of the training samples."""
    del net, settings
    train, held = labels_of(data.train.whole()), labels_of(data.validation)
    p = frequencies(train, _size(train, held))
    return [Score("most frequent class", _measured(float(-p[held].log().mean()), _share(held, p.argmax())))]


def characters(net: Net, data: Data, settings: Train) -> list[Score]:
    """Frequencies of characters, alone and after the one before.

    Source: Shannon 1951, doi:10.1002/j.1538-7305.1951.tb01366.x.
    """
    del net, settings
    train, held = data.train.whole(), data.validation
    label, after = labels_of(train), labels_of(held)
    (before,), (seen,) = train.inputs.values(), held.inputs.values()
    size = _size(label, after, before, seen)
    p = frequencies(label, size)
    pair = pairs(before.flatten(), label, p)
    rows = seen.flatten()
    return [
        Score("unigram", _measured(float(-p[after].log().mean()), _share(after, p.argmax()))),
        Score("bigram", _measured(float(-pair[rows, after].log().mean()), _share(after, pair.argmax(-1)[rows]))),
    ]


def frequencies(labels: Tensor, size: int) -> Tensor:
    """p(y) = (count of y + 1) / (count + size): (size,), float64; no label has probability 0."""
    return (torch.bincount(labels, minlength=size).double() + 1) / (len(labels) + size)


def pairs(before: Tensor, labels: Tensor, p: Tensor) -> Tensor:
    """p(y | x) = (count of y after x + p(y)) / (count of x + 1): (size, size), float64, rows x."""
    size = len(p)
    counts = torch.bincount(before * size + labels, minlength=size * size).reshape(size, size).double()
    return (counts + p) / (counts.sum(1, keepdim=True) + 1)


def _size(*labels: Tensor) -> int:
    return 1 + max(int(label.max()) for label in labels)


def _share(labels: Tensor, guess: Tensor) -> float:
    return float((labels == guess).double().mean())
