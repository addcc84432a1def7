"""Probes: how well simple classifiers tell the classes of samples by the features of a network.

They are fitted to training samples, and measured on held-out ones; nothing of the network learns by them.
Legend: n training samples, m held-out ones, d numbers of a feature.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unroll.errors import SpecError
from unroll.spec.schema import Probes, Train
from unroll.train import features
from unroll.train.losses import Net
from unroll.train.samples import Data, Held, Split, generator, package
from unroll.train.table import Closing, Column, Score

# --- classifiers: (n, d), (n,), (m, d) -> the class of each held-out sample, (m,) ------------------------------------


def neighbours(z: Tensor, labels: Tensor, held: Tensor, wanted: Probes) -> Tensor:
    """The most frequent class among the nearest training samples, by cosine; of several the lowest."""
    made: Any = package("sklearn.neighbors", "train: probes")
    near = made.KNeighborsClassifier(min(wanted.neighbours, len(z)), algorithm="brute")
    return torch.from_numpy(near.fit(_unit(z), labels.numpy()).predict(_unit(held)))


def linear(z: Tensor, labels: Tensor, held: Tensor, wanted: Probes) -> Tensor:
    """Logistic regression on standardised features, penalty ½‖w‖², at most 1,000 steps of L-BFGS."""
    del wanted
    made: Any = package("sklearn.linear_model", "train: probes")
    low, spread = z.mean(0), z.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lbfgs failed to converge")
        fitted = made.LogisticRegression(max_iter=1000).fit(((z - low) / spread).numpy(), labels.numpy())
    return torch.from_numpy(fitted.predict(((held - low) / spread).numpy()))


def subspaces(z: Tensor, labels: Tensor, held: Tensor, wanted: Probes) -> Tensor:
    """The class whose affine subspace is nearest: mean and principal directions of its training samples, all of length one.

    Of d numbers at most d - 1 directions count, else the subspace of every class is all there is, and no residual tells them apart;
    nor does a direction in which the samples of a class do not differ but for rounding.
    Source: Yu et al. 2020, arXiv:2006.08558, section 4.
    """
    made: Any = package("sklearn.decomposition", "train: probes")
    known, far = labels.unique(), list[Tensor]()
    for k in known:
        own = _unit(z[labels == k])
        rank = min(wanted.components, len(own) - 1, z.shape[1] - 1)
        gap, axes = torch.from_numpy(_unit(held) - own.mean(0)), torch.zeros(0, z.shape[1])
        if rank > 0 and own.std(0).max() > ROUNDING:
            fitted = made.PCA(rank).fit(own)
            axes = torch.from_numpy(fitted.components_[fitted.singular_values_ > ROUNDING * math.sqrt(len(own))])
        far.append(gap.square().sum(1) - (gap @ axes.to(gap).T).square().sum(1))
    return known[torch.stack(far).argmin(0)]


CLASSIFIERS: Mapping[str, tuple[str, Callable[[Tensor, Tensor, Tensor, Probes], Tensor]]] = {
    "neighbours": ("nearest neighbours", neighbours),
    "linear": ("linear probe", linear),
    "subspaces": ("nearest subspace", subspaces),
}


ROUNDING = 1e-6
"""A spread below it, of features at length one that a network made in float32, is none."""


def _unit(z: Tensor) -> Any:
    return features.unit(z).numpy()


# --- what is measured -------------------------------------------------------------------------------------------------


def columns(wanted: Probes, labelled: bool) -> tuple[Column, ...]:
    """Rank and rate of features; the share of right answers of each probe, where samples have labels."""
    percent: Callable[[float], str] = lambda v: f"{100 * v:.1f} %"
    kinds = wanted.kinds if labelled else ()
    room = (Column("rank", "rank", lambda v: f"{v:.0f}"), Column("rate", "coding rate", lambda v: f"{v:.3g}"))
    return (*room, *(Column(f"probe_{kind}", CLASSIFIERS[kind][0], percent) for kind in kinds))


def check(wanted: Probes, data: Data) -> None:
    """Raises SpecError E508 for labels that are not the classes of samples, and where the samples that are drawn are of one class."""
    own, hint = data.train.labels, "kinds: [] measures the room that features take, which needs no labels"
    if own is None or not labelled(data) or _count(own) < 2:
        raise SpecError("E508", "train: probes: need samples of two classes or more", hint=hint)
    if _count(own[_drawn(data, wanted).to(own.device)]) < 2:
        message = f"train: probes: samples: the {wanted.samples:,} that are drawn are of fewer than two classes"
        raise SpecError("E508", message, hint=f"more of the {len(data.train):,}; {hint}")


def _count(labels: Tensor) -> int:
    return len(labels[labels >= 0].unique())


def labelled(data: Data) -> bool:
    return data.validation.labels is not None and data.validation.labels.ndim == 1


Rows = Callable[[Iterable[Split]], tuple[Tensor, Tensor | None]]


def measured(net: Net, data: Data, held: Held, wanted: Probes, settings: Train) -> dict[str, float]:
    """What the columns say of a network."""
    return _of(lambda batches: features.all_of(net, batches, wanted.at), data, held, wanted, settings)


def _of(rows: Rows, data: Data, held: Held, wanted: Probes, settings: Train) -> dict[str, float]:
    """rows: of some batches what is read of each sample, (n, d), and the labels."""
    z, labels = rows(held.batches(settings.batch))
    room = features.room(z, wanted.eps2)
    found = {"rank": room.rank, "rate": room.rate}
    if not (wanted.kinds and labelled(data)):
        return found
    train, own = rows(_training_samples(data, wanted, settings.batch))
    assert labels is not None and own is not None
    if not (z.isfinite().all() and train.isfinite().all()):
        return {**found, **{f"probe_{kind}": math.nan for kind in wanted.kinds}}
    for kind in wanted.kinds:
        right = CLASSIFIERS[kind][1](train[own >= 0], own[own >= 0], z[labels >= 0], wanted) == labels[labels >= 0]
        found[f"probe_{kind}"] = float(right.double().mean())
    return found


def _training_samples(data: Data, wanted: Probes, size: int) -> Iterator[Split]:
    """Those that probes are fitted to, the same every time, a few at once."""
    return (data.train[some] for some in _drawn(data, wanted).split(size))


def _drawn(data: Data, wanted: Probes) -> Tensor:
    return data.train.order(generator(0))[: wanted.samples]


def _as_they_are(batches: Iterable[Split]) -> tuple[Tensor, Tensor | None]:
    return features.together((next(iter(b.inputs.values())).flatten(1), b.labels) for b in batches)


def added(closing: Closing, wanted: Probes, data: Data, settings: Train, nets: Sequence[tuple[str, Net]]) -> Closing:
    """The closing table with what probes say of (the beginning of the name of a row, network), the trained network last; and of the samples as they are."""
    held, own = data.validation, columns(wanted, labelled(data))
    rows = [Score(row.name, _numbers(row.to_dict())) for row in closing.rows]
    for start, net in nets:
        place = next(k for k, row in enumerate(rows) if row.name.startswith(start))
        rows[place] = Score(rows[place].name, {**rows[place].values, **measured(net, data, held, wanted, settings)})
    few = held[:1].inputs
    if len(few) == 1 and next(iter(few.values())).is_floating_point():
        rows.insert(0, Score("the samples themselves", _of(_as_they_are, data, held, wanted, settings)))
    keys = [c.key for c in (*closing.columns, *own)]
    rows = [Score(row.name, {k: row.values.get(k, math.nan) for k in {*keys, *row.values}}) for row in rows]
    collapse = features.said(features.rooms(nets[-1][1], held, settings.batch, wanted.eps2))
    notes = (*closing.notes, _definition(wanted, data), *((collapse,) if collapse else ()))
    return replace(closing, rows=rows, columns=(*closing.columns[:-1], *own, closing.columns[-1]), notes=notes)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: math.nan if v is None else float(v) for k, v in row.items() if k != "name"}


def _definition(wanted: Probes, data: Data) -> str:
    """What the columns mean, in a line."""
    where = "what the head reads" if wanted.at == "features" else "the answer"
    said = f"of {where}, at length one: rank, singular values above {features.SHARE:.0%} of the largest; rate at eps² = {wanted.eps2:g}"
    if not (wanted.kinds and labelled(data)):
        return said
    count = min(wanted.samples, len(data.train))
    how = {
        "neighbours": f"{wanted.neighbours} neighbours",
        "subspaces": f"at most {wanted.components} dimensions for each class, fewer than a feature has",
    }
    detail = ", ".join(how[kind] for kind in wanted.kinds if kind in how)
    return f"{said}\nprobes are fitted to {count:,} training samples" + (f": {detail}" if detail else "")


def collapsed(net: Net, held: Held, wanted: Probes, settings: Train) -> str:
    """A warning for the log, "" where there is none."""
    return features.said(features.rooms(net, held, settings.batch, wanted.eps2))
