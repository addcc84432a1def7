"""Constraint sets without a point, at the numbers of a network: refused by name, where a projection would answer something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import inf
from typing import Any

import sympy as sp
from torch import Tensor, finfo, float64, linalg

from unroll.calculus.prox import interval, sorted_weights, why_empty
from unroll.errors import UnrollError
from unroll.language.constructors import constant, ones, swap
from unroll.language.nodes import Add, Expr, Indicator, walk
from unroll.language.problem import Problem
from unroll.language.show import text
from unroll.network.evaluate import evaluate

HINT = "give other numbers, or leave the constraint out"


def refuse_empty(
    problem: Problem, numbers: Mapping[str, float], dims: Mapping[str, int], given: Mapping[str, Tensor]
) -> None:
    """Raises UnrollError E403 where a constraint set is empty for the scalars, sizes and parameters of a network."""
    known: dict[sp.Symbol, Any] = {s: sp.Float(numbers[s.name]) for s in problem.scalars}
    known |= {d: dims[d.name] for d in problem.dims if d.name in dims}
    for x in (x for e in problem.terms.values() for x in walk(e) if isinstance(x, Indicator)):
        for why in _empty(x, known, problem, given):
            raise UnrollError("E403", f"no point fulfils {text(x)}: {why}", hint=HINT)
    for t, w in _sorted(problem):
        if (why := _wrong_weights(w, known, problem, given)) is not None:
            hint = "give the largest first"
            raise UnrollError("E403", f"the weights {text(w)} of {text(t)} {why}", hint=hint)
    between = _between(problem, known)
    for x, (low, high) in between.items():
        if low.is_number and high.is_number and low > high:
            raise UnrollError(
                "E403", f"no entry of {text(x)} is at least {float(low):g} and at most {float(high):g}", hint=HINT
            )
    for x in (x for e in problem.terms.values() for x in walk(e) if isinstance(x, Indicator) and x.x in between):
        if (why := _out_of_reach(x, between[x.x], known, problem, given)) is not None:
            raise UnrollError("E403", f"no point fulfils {text(x)}: {why}", hint=HINT)


def falling(problem: Problem) -> set[str]:
    """Parameters that weigh sorted magnitudes: their entries fall."""
    return {v.name for _, w in _sorted(problem) for v in w.symbols}


def _sorted(problem: Problem) -> Iterator[tuple[Expr, Expr]]:
    """Each term that weighs sorted magnitudes, and its weights."""
    terms = [t for e in problem.terms.values() for t in (e.terms if isinstance(e, Add) else (e,))]
    for t, z in product(terms, problem.variables):
        if (w := sorted_weights(t, z)) is not None:
            yield t, w


def _out_of_reach(
    x: Indicator,
    ends: tuple[sp.Expr, sp.Expr],
    known: Mapping[sp.Symbol, Any],
    problem: Problem,
    given: Mapping[str, Tensor],
) -> str | None:
    """Why no entries between the ends sum, each with its weight, to what the set asks for, if that is known."""
    at_most = False
    match x.set, x.params:
        case "simplex", params:
            a, s = ones(1, x.x.rows), constant(params[0] if params else 1)
        case "affine", (Expr() as a, Expr() as s) if a.rows == 1:
            pass
        case "ball1", (r,) if not isinstance(r, Expr) and ends[0].is_nonnegative:
            a, s, at_most = ones(1, x.x.rows), constant(r), True
        case _:
            return None
    open_sizes = {d for d in (x.x.rows, s.cols) if not swap(d, known).is_number}
    if open_sizes or not all(e.is_number for e in ends) or any(v.name not in given for p in (a, s) for v in p.symbols):
        return None
    values = {v: _columns(given[v.name]) for v in problem.parameters if v.name in given}
    weights, total = (evaluate(p, values, {k: float(v) for k, v in known.items()}) for p in (a, s))
    low, high = (weights * (weights != 0) * float(e) if e.is_finite else weights.sign() * float(e) for e in ends)
    low, high = (t.nan_to_num(nan=0, posinf=inf, neginf=-inf) for t in (low, high))
    least, most = low.minimum(high).sum(), low.maximum(high).sum()
    slack = 1e-6 * total.abs().amax()
    if bool((total < least - slack).any() or (not at_most and (total > most + slack).any())):
        return (
            f"with entries from {float(ends[0]):g} to {float(ends[1]):g} it sums to {float(least):g} to {float(most):g}"
        )
    return None


def _wrong_weights(
    w: Expr, known: Mapping[sp.Symbol, Any], problem: Problem, given: Mapping[str, Tensor]
) -> str | None:
    """Why weights are none of a sorted 1-norm, where their values are known."""
    if any(v.name not in given for v in w.symbols) or not swap(w.rows, known).is_number:
        return None
    values = {v: _columns(given[v.name]) for v in problem.parameters if v.name in given}
    found = evaluate(w, values, {k: v if isinstance(v, int) else float(v) for k, v in known.items()}).flatten()
    return "rise from one entry to the next: the sum is not convex then" if bool((found.diff() > 0).any()) else None


def _between(problem: Problem, known: Mapping[sp.Symbol, Any]) -> dict[Expr, tuple[sp.Expr, sp.Expr]]:
    """What is bounded entry by entry, and the bounds of all its constraints together."""
    found: dict[Expr, tuple[sp.Expr, sp.Expr]] = {}
    for x in (x for e in problem.terms.values() for x in walk(e) if isinstance(x, Indicator)):
        params = [p if isinstance(p, Expr) else swap(p, known) for p in x.params]
        ends = interval(x.set, params) if x.set != "simplex" else interval("nonneg", ())  # it too has no entry below 0
        if ends is None:
            continue
        low, high = found.get(x.x, (-sp.oo, sp.oo))
        found[x.x] = sp.Max(low, ends[0]), sp.Min(high, ends[1])
    return found


def _empty(x: Indicator, known: dict[sp.Symbol, Any], problem: Problem, given: Mapping[str, Tensor]) -> Iterator[str]:
    """Why the set has no point, if it has none."""
    numbers = [swap(p, known) for p in x.params if not isinstance(p, Expr)]
    if (why := why_empty(x.set, numbers)) is not None:
        yield why
    match x.set:
        case "stiefel" if swap(x.x.rows - x.x.cols, known).is_negative:
            yield f"columns of {swap(x.x.rows, known)} entries, {swap(x.x.cols, known)} of them, cannot be orthonormal"
        case "affine":
            yield from _inconsistent(x, known, problem, given)
        case _:
            return


def _inconsistent(
    x: Indicator, known: dict[sp.Symbol, Any], problem: Problem, given: Mapping[str, Tensor]
) -> Iterator[str]:
    """Is b no A z, of an A and b made of parameters, and of sizes that are known?"""
    parts = [p for p in x.params if isinstance(p, Expr)]
    sizes = {n for p in parts for e in walk(p) for side in (e.rows, e.cols) for n in side.free_symbols}
    if any(s.name not in given for p in parts for s in p.symbols) or not sizes <= {*known}:
        return
    values = {s: _columns(given[s.name]) for s in problem.parameters if s.name in given}
    scalars = {s: v if isinstance(v, int) else float(v) for s, v in known.items()}
    a, b = (evaluate(p, values, scalars) for p in parts)
    gap, size = (a @ (linalg.pinv(a) @ b) - b).norm(), b.norm()
    if (
        gap
        > finfo(min((v.dtype for v in given.values()), key=lambda d: finfo(d).bits, default=float64)).eps ** 0.5 * size
    ):
        yield f"its equations contradict one another, by {float(gap / size):.1g} of the right side at best"


def _columns(value: Tensor) -> Tensor:
    """A parameter as mathematics has it, vectors as columns."""
    return value.double().unsqueeze(-1) if value.ndim == 1 else value.double()
