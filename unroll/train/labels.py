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
from unroll.train.samples import Data, Held, Samples, Split
from unroll.train.table import Score


@torch.no_grad()
def held_out(net: Net, held: Held, settings: Train) -> dict[str, float]:
    """nats and bits per label, and the share of labels that are the likeliest answer; no label smoothing."""
    nats = hits = near = count = 0.0
    few = False
    for batch in held.batches(settings.batch):
        assert batch.labels is not None
        answer: Tensor = net(*losses.arguments(net, batch.inputs))
        logits = answer.double()
        nats += float(losses.cross_entropy(logits, batch.labels))
        hits += float((logits.argmax(-1) == batch.labels).sum())
        few = logits.shape[-1] <= TOP
        near += 0 if few else float((logits.topk(TOP).indices == batch.labels[..., None]).sum())
        count += int((batch.labels >= 0).sum())
    count = max(count, 1)
    return {**_measured(nats / count, hits / count, per_byte(held)), **({} if few else {"top5": near / count})}


def per_byte(held: Held) -> float:
    """Labels for each byte of the text that they stand for; nan where that is not known."""
    return math.nan if held.bytes is None else len(labels_of(held)) / held.bytes


def _measured(nats: float, accuracy: float, rate: float = math.nan) -> dict[str, float]:
    bits = nats / math.log(2)
    shown = {"perplexity": math.exp(min(nats, 700)), "bits_per_byte": bits * rate}
    return {"held_out": nats, "nats": nats, "bits": bits, **shown, "accuracy": accuracy}


def labels_of(samples: Samples | Held) -> Tensor:
    """All labels that count, in one row."""
    assert samples.labels is not None, "internal error, please report: samples without labels"
    return samples.labels[samples.labels >= 0]


def classes(net: Net, data: Data, settings: Train) -> list[Score]:
    """The most frequent class of the training samples."""
    del net, settings
    train, held = labels_of(data.train), labels_of(data.validation)
    p = frequencies(train, _size(train, held))
    near = float(torch.isin(held, p.topk(min(TOP, len(p))).indices).double().mean())
    told = _measured(float(-p[held].log().mean()), _share(held, p.argmax()))
    return [Score("most frequent class", {**told, "top5": near})]


@torch.no_grad()
def confusion(net: Net, held: Held, settings: Train) -> Tensor:
    """How many samples of each class (row) get each answer (column): (K, K)."""
    counts: Tensor | None = None
    for batch in held.batches(settings.batch):
        assert batch.labels is not None
        logits: Tensor = net(*losses.arguments(net, batch.inputs))
        size, known = logits.shape[-1], batch.labels >= 0
        pairs = batch.labels[known] * size + logits.argmax(-1)[known]
        found = torch.bincount(pairs, minlength=size * size).reshape(size, size).cpu()
        counts = found if counts is None else counts + found
    assert counts is not None, "internal error, please report: no held-out samples"
    return counts


def characters(net: Net, data: Data, settings: Train) -> list[Score]:
    """Frequencies of tokens, alone and after the one before (of few words); of a part of what is larger than memory.

    Source: Shannon 1951, doi:10.1002/j.1538-7305.1951.tb01366.x.
    """
    del net, settings
    (before, label), (seen, after) = map(_known, (data.train.whole(), data.validation.whole()))
    size, rate = _size(label, after, before, seen), per_byte(data.validation)
    p = frequencies(label, size)
    rows = [Score("unigram", _measured(float(-p[after].log().mean()), _share(after, p.argmax()), rate))]
    if size <= LARGEST:
        pair = pairs(before, label, p)
        told = _measured(float(-pair[seen, after].log().mean()), _share(after, pair.argmax(-1)[seen]), rate)
        rows.append(Score("bigram", told))
    return rows


TOP = 5
"""Answers among which a label is looked for, where there are more classes."""
LARGEST = 4096
"""Words, of which all pairs are counted."""


def _known(samples: Split) -> tuple[Tensor, Tensor]:
    """(token, label) where there is a label."""
    assert samples.labels is not None, "internal error, please report: samples without labels"
    (tokens,) = samples.inputs.values()
    kept = samples.labels >= 0
    return tokens[kept], samples.labels[kept]


def frequencies(labels: Tensor, size: int) -> Tensor:
    """p(y) = (count of y + 1) / (count + size): (size,), float64; no label has probability 0."""
    return (torch.bincount(labels, minlength=size).double() + 1) / (len(labels) + size)


def pairs(before: Tensor, labels: Tensor, p: Tensor) -> Tensor:
    """p(y | x) = (count of y after x + p(y)) / (count of x + 1): (size, size), float64, rows x."""
    size = len(p)
    counts = torch.bincount(before * size + labels, minlength=size * size).reshape(size, size).double()
    return (counts + p) / (counts.sum(1, keepdim=True) + 1)


def _size(*labels: Tensor) -> int:
    return 1 + max((int(label.max()) for label in labels if len(label)), default=0)


def _share(labels: Tensor, guess: Tensor) -> float:
    return float((labels == guess).double().mean())
