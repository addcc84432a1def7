"""What a network does to its objective over many samples: moments of every trace, batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unroll.errors import UnrollError
from unroll.language.problem import Problem
from unroll.model.module import Model
from unroll.network.network import Network
from unroll.network.trace import Trace, is_constraint

Batch = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


@dataclass
class Moments:
    """Mean and standard deviation (of the population) of values (rows, samples) that come batch by batch."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    spread: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum of squares around the mean."""

    def add(self, values: Tensor) -> None:
        """Source: Chan, Golub & LeVeque 1979, doi:10.1007/978-3-642-51461-6_3."""
        values = values.detach().double().cpu()
        n, mean = values.shape[1], values.mean(1)
        if not n:  # 0/0 would be all that is left
            return
        both, off = self.count + n, mean - self.mean
        self.spread = self.spread + (values - mean[:, None]).square().sum(1) + off.square() * self.count * n / both
        self.mean = self.mean + off * n / both
        self.count = both

    @property
    def std(self) -> Tensor:
        return (self.spread / self.count).sqrt()


@dataclass(frozen=True)
class Measured:
    """What every step did to every term, over `samples` samples. sign: 1 minimised, -1 maximised.

    terms: those of the objective, "total", their sum, where there are several, and the formulas that were asked for.
    values, zeros: (steps + 1,) from the start on, as `Trace.terms`.  entering, leaving, predicted, actual, cosine, fell, rose: (steps,),
    by the parameters of the step's own layer; fell and rose are shares of samples, kept as moments.  claims: block -> the terms that it takes.  own: as `Trace.own`.
    """

    labels: tuple[tuple[int, str], ...]
    sign: int
    claims: Mapping[str, tuple[str, ...]]
    own: Mapping[str, str]
    at: str
    found: Mapping[str, Mapping[str, Moments]]

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.found["actual"])

    @property
    def samples(self) -> int:
        return next(iter(self.found["actual"].values())).count

    def __getattr__(self, name: str) -> Mapping[str, Moments]:
        """values, zeros, entering, leaving, predicted, actual, cosine, fell, rose: moments by term (zeros: by variable)."""
        if name in KINDS:
            return self.found[name]
        raise AttributeError(name)

    def improved(self, term: str) -> Tensor:
        """(steps,) the share of samples in which the term moved as the objective asks."""
        return self.found["fell" if self.sign > 0 else "rose"][term].mean

    def claimed(self, block: str, term: str) -> bool:
        return term in self.claims.get(block, ())

    def records(self) -> list[dict[str, Any]]:
        """Every step and term by HEAD; numbers are means over the samples, improved is a share."""
        out: list[dict[str, Any]] = []
        for k, (layer, block) in enumerate(self.labels):
            for term in self.terms:
                numbers = {n: float(self.found[n][term].mean[k]) for n in MEANS} | {
                    "improved": float(self.improved(term)[k])
                }
                row = (layer, block, term, self.claimed(block, term), *(numbers[n] for n in HEAD[4:]))
                out.append(dict(zip(HEAD, row, strict=True)))
        return out

    def rows(self) -> list[tuple[str, ...]]:
        """The records as text."""
        return [
            (
                *(str(r["layer"]), r["block"], r["term"], "yes" if r["claimed"] else ""),
                *(
                    f"{r['entering']:.4g}",
                    f"{r['predicted']:+.4g}",
                    f"{r['actual']:+.4g}",
                    f"{100 * r['improved']:.0f} %",
                    f"{r['cosine']:+.2f}",
                ),
            )
            for r in self.records()
        ]

    def __str__(self) -> str:
        grid = [HEAD, *self.rows()]
        wide = [max(len(r[i]) for r in grid) for i in range(len(HEAD))]
        return "\n".join("   ".join(c.ljust(w) for c, w in zip(r, wide, strict=True)).rstrip() for r in grid)


MEANS = ("entering", "leaving", "predicted", "actual", "cosine")
KINDS = ("values", *MEANS, "fell", "rose", "zeros")
HEAD = ("layer", "block", "term", "claimed", "entering", "predicted", "actual", "improved", "cosine")
TOTAL = "total"


def white_box(
    net: Network | Model,
    batches: Iterable[Batch],
    *,
    at: str = "iterate",
    parameters: str = "layers",
    terms: Mapping[str, str] | None = None,
) -> Measured:
    """What each step did to each term on these batches. Constraints are left out: their values are 0 or infinite.

    A batch: one tensor, several in the order of the inputs, or by name.  at, parameters, terms: as `Network.trace` takes
    them; a formula improves where it moves as a term of the objective should.
    Raises UnrollError E404 (shapes), E409 (a matrix that is not positive definite).
    """
    body = net.body if isinstance(net, Model) else net
    problem = body.program.problem
    names = valued(problem)
    found = nothing()
    trace: Trace | None = None
    for batch in batches:
        with torch.no_grad():
            trace = traced(net, batch, at=at, parameters=parameters, terms=terms)
            count(trace, names, list(terms or {}), found)
    if trace is None or not measured(found):
        raise UnrollError("E404", "there is no sample to measure on", hint="a list of tensors, or of {name: tensor}")
    return Measured(trace.labels, problem.sign, claims(body), trace.own, at, found)


def valued(problem: Problem) -> list[str]:
    """The terms that are not constraints."""
    return [n for n, e in problem.terms.items() if not is_constraint(e)]


def traced(net: Network | Model, batch: Batch, **asked: Any) -> Trace:
    """The trace of one batch, in whichever form it comes."""
    ask: Any = net.trace
    if isinstance(batch, Tensor):
        return ask(batch, **asked)
    if isinstance(batch, Mapping):
        return ask(*(batch[n] for n in net.inputs), **asked) if isinstance(net, Model) else ask(**batch, **asked)
    return ask(*batch, **asked)


def nothing() -> dict[str, dict[str, Moments]]:
    """Of each kind of number, before the first batch."""
    return {kind: {} for kind in KINDS}


def measured(found: Mapping[str, Mapping[str, Moments]]) -> bool:
    """Was there a sample?"""
    return any(m.count for m in found["actual"].values())


def count(trace: Trace, names: list[str], extra: list[str], found: dict[str, dict[str, Moments]]) -> None:
    tables = {
        "values": trace.all_terms, "entering": trace.entering, "leaving": trace.leaving,
        "predicted": trace.predicted, "actual": trace.actual,
    }  # fmt: skip
    tables = {kind: {**t, TOTAL: sum((t[n] for n in names), torch.zeros(()))} for kind, t in tables.items()}
    shown = [*names, *([TOTAL] if len(names) > 1 else []), *extra]
    tables = {kind: {n: t[n] for n in shown} for kind, t in {**tables, "cosine": trace.cosine}.items()}
    tables["fell"] = {n: (t < 0).double() for n, t in tables["actual"].items()}
    tables["rose"] = {n: (t > 0).double() for n, t in tables["actual"].items()}
    tables["zeros"] = trace.all_zeros
    for kind, table in tables.items():
        for name, value in table.items():
            found[kind].setdefault(name, Moments()).add(value.reshape(len(value), -1))


def claims(net: Network) -> dict[str, tuple[str, ...]]:
    """Block -> the terms of the objective that it takes, those that a surrogate stands for too; "total" if these are all."""
    step, problem = net.program.step, net.program.problem
    taken = {name or "step": [n for n in p.terms if n in problem.terms] for name, p in step.subproblems}
    unrolled = getattr(net.spec, "unroll", None)
    for block in unrolled.blocks if unrolled is not None else ():
        taken[block.block] += block.surrogate.replaces if block.surrogate is not None else ()
    whole = {name: [TOTAL] if {*valued(problem)} <= {*terms} else [] for name, terms in taken.items()}
    return {name: tuple(dict.fromkeys([*terms, *whole[name]])) for name, terms in taken.items()}
