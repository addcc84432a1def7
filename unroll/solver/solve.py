"""Solve problems to convergence, many at once: the derived iteration of one layer, accelerated and restarted.

    y = z + beta (z - z_before);  z <- T(y)        T: one untrained layer of the spec's problem

Every problem of the batch has its own momentum, its own restarts and its own stop.
Sources: Beck & Teboulle 2009, doi:10.1137/080716542; O'Donoghue & Candes 2015, doi:10.1007/s10208-013-9150-3 (restart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from unroll.api import Source, compile_layers, read
from unroll.derivation.algorithms import ALGORITHMS, classify
from unroll.errors import SpecError, UnrollError
from unroll.language.problem import from_spec
from unroll.network.network import Network, finite
from unroll.solver.certificate import duality_gap
from unroll.spec import Spec, load

PLAIN = ("proximal_gradient", "projected_gradient", "gradient_descent")
"""Algorithms whose layer is a map of the variable alone, in the order of preference."""
CHECK = 10
"""Iterations between two looks at who has converged."""

Map = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """values: {variable: (..., n)}.  objective, error: (...), one per problem.

    error: the certified duality gap divided by max(1, objective) where `certified`, else the residual (see `iterate`).
    """

    values: dict[str, Tensor]
    objective: Tensor
    error: Tensor
    certified: bool
    iterations: int
    converged: Tensor

    @property
    def z(self) -> Tensor:
        """The solution of a problem in one variable."""
        (value,) = self.values.values()
        return value

    @property
    def residual(self) -> Tensor:
        return self.error

    def __str__(self) -> str:
        done, count = int(self.converged.sum()), self.converged.numel()
        kind = "certified duality gap" if self.certified else "residual |z - prox(z - step grad)|"
        worst = float(self.error.max()) if count else 0.0
        mean = float(self.objective.mean()) if count else 0.0
        return f"{done} of {count} problems solved in {self.iterations} iterations: {kind} <= {worst:.1e}, mean objective {mean:.10g}"


@torch.no_grad()
def solve(
    source: Source,
    *inputs: Tensor,
    dims: Mapping[str, int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float] | None = None,
    overrides: Sequence[str] = (),
    tol: float | None = None,
    max_iterations: int = 100_000,
    restart: bool = True,
    console: Console | None = None,
    label: str = "solve",
) -> Solution:
    """The optimum for every sample of `inputs`, each (..., n): certified gap (else residual) at most `tol`.

    restart: forget the momentum of a problem where it points uphill.  The gap is relative to max(1, objective). tol: 1e-8 in float64 and 1e-5 in float32, if left out. Works in the dtype and
    on the device of the inputs.  console: where a progress bar is drawn; None: nowhere.
    Raises SpecError E303 if no algorithm fits, UnrollError E402 for a parameter without a value, E407 for a tol below the
    precision of the inputs.
    """
    spec = read(source, overrides)
    missing = [name for name in spec.parameters if name not in (parameters or {})]
    if missing:
        raise UnrollError(
            "E402", f"the parameter '{missing[0]}' has no value", hint=f"give it: parameters={{'{missing[0]}': ...}}"
        )
    if len(inputs) != len(spec.inputs):
        raise UnrollError(
            "E404", f"{spec.title} has {len(spec.inputs)} inputs ({', '.join(spec.inputs)}); {len(inputs)} were given"
        )
    bad = [(name, x) for name, x in zip(spec.inputs, inputs, strict=True) if not finite(x)]
    if bad:
        name, x = bad[0]
        raise UnrollError("E404", f"{int((~x.isfinite()).sum()):,} of {x.numel():,} entries of {name} are not finite")
    like = inputs[0] if inputs else torch.empty(())
    tol = _tolerance(tol, like.dtype)
    net = compile_layers(
        one_step(spec), dims=dims, parameters=parameters, scalars=scalars, dtype=like.dtype, device=like.device
    )
    name, axes = net.variables[0], len(next(iter(spec.inputs.values())).shape)
    shape = like.shape[: like.ndim - axes]
    flat = [x.reshape(-1, *x.shape[len(shape) :]) for x in inputs]

    def step(z: Tensor, rows: Tensor) -> Tensor:
        return net(*(x[rows] for x in flat), **{name: z})

    gap = gap_of(net)
    certify = (
        None
        if gap is None
        else lambda z, rows: gap(dict(zip(net.inputs, (x[rows] for x in flat), strict=True)) | {name: z})
    )
    z, error, count = iterate(step, net(*flat), tol, max_iterations, console, label, certify, restart)
    value = net.objective(*flat, **{name: z})["total"]
    answer = z.reshape(*shape, *z.shape[1:])
    error = error.reshape(shape)
    return Solution({name: answer}, value.reshape(shape), error, gap is not None, count, error <= tol)


def _tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """The default of a dtype, or what was asked for. Raises UnrollError E407 for what the dtype cannot tell from 0."""
    if tol is None:
        return 1e-8 if dtype == torch.float64 else 1e-5
    least = 50 * torch.finfo(dtype).eps
    if not tol >= least:  # nan too
        raise UnrollError(
            "E407", f"tol={tol:g} is below what {dtype} can certify, about {least:.0e}", hint="give inputs in float64"
        )
    return tol


def gap_of(net: Network) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """The derived gap divided by max(1, objective), as a function of inputs and variable; None where none is derived."""
    derivation = net.derivation
    gap = duality_gap(derivation.parts, derivation.variable)
    if gap is None:
        return None
    problem = replace(net.program.problem, terms={"gap": gap, **net.program.problem.terms})
    evaluate = net.terms_of(problem)

    def relative(values: dict[str, Tensor]) -> Tensor:
        terms = evaluate(values)
        found = terms.pop("gap")
        return found.abs() / sum(terms.values()).abs().clamp_min(1)  # type: ignore[union-attr]

    return relative


def one_step(spec: Spec) -> Spec:
    """The spec's problem with one layer of the first plain algorithm that fits. Raises SpecError E303."""
    document: dict[str, Any] = {
        k: v for k, v in spec.to_dict().items() if k not in ("data", "train", "model", "weights")
    }
    problem = from_spec(spec)
    if len(problem.variables) != 1:
        raise SpecError("E303", f"{spec.title} has {len(problem.variables)} variables; solve minimises over one")
    parts = classify(problem)
    fitting = [a.name for a in ALGORITHMS if a.name in PLAIN and a.fits(parts) is None]
    if not fitting:
        raise SpecError(
            "E303",
            f"no algorithm here solves {spec.title}",
            hint="each term must be smooth, or the rest proximable together",
        )
    name = next(name for name in PLAIN if name in fitting)
    return load({**document, "unroll": {"algorithm": name, "layers": 1}})


def iterate(
    step: Map,
    z: Tensor,
    tol: float,
    iterations: int,
    console: Console | None = None,
    label: str = "",
    certify: Map | None = None,
    restart: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """(fixed points, errors, iterations done) of z = step(z, rows), row by row of z, accelerated with restarts.

    step(z, rows) maps the rows of z that belong to the problems `rows`.  certify(z, rows): their error, (rows,); without it
    the residual |y - step(y)| / max(1, |step(y)|) at the extrapolated point y that was mapped last.
    """
    answer, residual = z.clone(), z.new_full((len(z),), torch.inf)
    active, y, before, k = torch.arange(len(z), device=z.device), z, z, 0
    t = z.new_ones(len(z), *[1] * (z.ndim - 1))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task(label, total=len(z), note="")
        for k in range(1, iterations + 1):
            new = step(y, active)
            moved, change = y - new, new - before
            if restart:
                t = torch.where(dot(moved, change) > 0, torch.ones_like(t), t)  # momentum points uphill: forget it
            t_new = (1 + (1 + 4 * t * t).sqrt()) / 2
            residual_now = (moved.flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1).clamp_min(1)).to(residual)
            y, before, t = new + (t - 1) / t_new * change, new, t_new
            if k % CHECK and k < iterations:
                continue
            error = residual_now if certify is None else certify(new, active).to(residual)
            answer[active], residual[active] = new, error
            left = error > tol
            active, y, before, t = active[left], y[left], before[left], t[left]
            bar.update(task, completed=len(z) - len(active), note=f"iteration {k:,}, {len(active):,} left")
            if not len(active):
                break
    return answer, residual, k


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product row by row, kept as a column that scales rows: (B, ...), (B, ...) -> (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))
