"""Solve problems to convergence, many at once: the derived iteration of one layer, accelerated and restarted.

    y = z + beta (z - z_before);  z <- T(y)        T: one untrained layer of the spec's problem

Every problem of the batch has its own momentum, its own restarts and its own stop.
Sources: Beck & Teboulle 2009, doi:10.1137/080716542; O'Donoghue & Candes 2015, doi:10.1007/s10208-013-9150-3 (restart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from unroll.api import Source, compile_layers, read
from unroll.calculus.gradient import gradient
from unroll.derivation.algorithms import LIPSCHITZ, find
from unroll.derivation.parts import Part, classify, unsigned
from unroll.errors import SpecError, UnrollError
from unroll.language.constructors import add, elementwise, total
from unroll.language.nodes import Expr, slot
from unroll.language.problem import from_spec
from unroll.language.show import pretty
from unroll.network.kinds import check_kind
from unroll.network.network import Network, check_shape, finite
from unroll.network.values import refuse_undeclared
from unroll.solver.certificate import duality_gap, values_of
from unroll.spec import Spec, load

PLAIN = ("proximal_gradient", "projected_gradient", "gradient_descent")
"""Algorithms whose layer is a map of the variable alone, in the order of preference."""
CHECK = 10
"""Iterations between two looks at who has converged."""

DEFAULTS = {torch.float64: 1e-8, torch.float32: 1e-5}
"""Tolerances where none is asked for, of the types that can certify a solution."""

Map = Callable[[Tensor, Tensor], Tensor]
Error = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """values: {variable: (..., n)}.  objective, error: (...), one per problem.

    error has no unit. Where `certified` it is the duality gap, divided by the objective at 0 (|x|^2/2 of least squares) or
    at the start, the larger; else the residual z - prox(z - step grad), divided by the length of the first gradient step.
    convex: is the objective known to be? Where it is not, a point that no step moves need not be the optimum.
    """

    values: dict[str, Tensor]
    objective: Tensor
    error: Tensor
    certified: bool
    iterations: int
    converged: Tensor
    convex: bool

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
        solved = "problems solved" if self.convex else "points found that no step moves (not known to be convex),"
        return f"{done} of {count} {solved} in {self.iterations} iterations: {kind} <= {worst:.1e}, mean objective {mean:.10g}"


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
    """The optimum for every sample of `inputs`, each (..., n): certified gap (else residual) at most `tol`, see `Solution`.

    Samples that come in other units, c x in the place of x, are solved to the same share.  restart: forget the momentum of
    a problem where it points uphill.  tol: 1e-8 in float64 and 1e-5 in float32, if left out. Works in the dtype (float32 or
    float64) and on the device of the inputs.  console: where a progress bar is drawn; None: nowhere.
    Raises SpecError E303 if no algorithm fits, UnrollError E402 for a parameter without a value, E403 for an input that is not
    what it is declared to be, E404 for inputs of another kind or shape, E407 for a tol below the precision of the inputs.
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
    data = dict(zip(spec.inputs, inputs, strict=True))
    like = _refuse_other_kinds(data)
    tol = _tolerance(tol, like.dtype)
    _refuse_none(max_iterations)
    single = one_step(spec)
    try:
        net = compile_layers(
            single, dims=dims, parameters=parameters, scalars=scalars, dtype=like.dtype, device=like.device
        )
    except SpecError as refused:
        if refused.code != "E304":
            raise
        hint = "layers with steps of a size of your own, by unroll.compile, as unroll: {algorithm: gradient_descent, layers: 100, step: 0.01}"
        message = f"no algorithm here solves {spec.title}: {refused.message}, so no step is known to be short enough"
        raise SpecError("E303", message, hint=hint) from refused
    refuse_undeclared(net.program.problem.inputs, data)
    shape, data = _flat(net, data)
    name, read_by_layers = net.variables[0], {n: x for n, x in data.items() if n in net.inputs}

    def step(z: Tensor, rows: Tensor) -> Tensor:
        return net(**{n: x[rows] for n, x in read_by_layers.items()}, **{name: z})

    start = net(**read_by_layers)
    error, certified = error_of(net, data, start)
    z, found, count = iterate(step, start, error, tol, max_iterations, console, label, restart)
    value = net.objective(**data, **{name: z})["total"]
    found = found.reshape(shape)
    return Solution(
        {name: z.reshape(*shape, *z.shape[1:])},
        value.reshape(shape),
        found,
        certified,
        count,
        found <= tol,
        _convex(net),
    )


def _convex(net: Network) -> bool:
    """Is every part of the objective known to be convex?"""
    parts = net.derivation.parts
    return all(p.smooth.convex if p.smooth is not None else p.proximal is not None and p.proximal.convex for p in parts)


def _refuse_other_kinds(data: Mapping[str, Any]) -> Tensor:
    """The first input, whose type and place are those of all. Raises UnrollError E404."""
    first = next((x for x in data.values() if isinstance(x, Tensor)), torch.empty(()))
    for name, x in data.items():
        check_kind(name, x, first, "the first input")
        if x.dtype not in DEFAULTS:
            hint = f"{name}.float(), or {name}.double()"
            raise UnrollError("E404", f"{name} is a tensor of {x.dtype}, too coarse to certify a solution", hint=hint)
        if not finite(x):
            message = f"{int((~x.isfinite()).sum()):,} of {x.numel():,} entries of {name} are not finite"
            raise UnrollError("E404", message)
    return first


def _flat(net: Network, data: dict[str, Tensor]) -> tuple[torch.Size, dict[str, Tensor]]:
    """(batch axes, the inputs with one batch axis). Raises UnrollError E404."""
    lead: dict[str, torch.Size] = {}
    for name, x in data.items():
        check_shape(net.program, name, x)
        lead[name] = x.shape[: x.ndim - len(net.program.tensor_sizes(net.program.problem.symbols[name]))]
    try:
        shape = torch.broadcast_shapes(*lead.values())
    except RuntimeError:
        found = ", ".join(f"{name} {tuple(axes)}" for name, axes in lead.items())
        raise UnrollError("E404", f"the batch axes of the inputs do not fit: {found}") from None
    core = {name: x.shape[len(lead[name]) :] for name, x in data.items()}
    return shape, {n: x.expand(*shape, *core[n]).reshape(shape.numel(), *core[n]) for n, x in data.items()}


def least_tolerance(dtype: torch.dtype) -> float:
    """What a dtype can tell from 0, beside 1."""
    return 50 * torch.finfo(dtype).eps


def _refuse_none(iterations: Any) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise UnrollError("E407", f"max_iterations={iterations!r} is not a number of iterations, 1 or more")


def _tolerance(tol: Any, dtype: torch.dtype) -> float:
    """The default of a dtype, or what was asked for. Raises UnrollError E407 for what the dtype cannot tell from 0."""
    if tol is None:
        return DEFAULTS[dtype]
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 < tol < 1:  # nan too
        hint = f"{DEFAULTS[dtype]:g}, say, of the objective at the start"
        raise UnrollError("E407", f"tol={tol!r} is not a number between 0 and 1", hint=hint)
    least = least_tolerance(dtype)
    if tol < least:
        raise UnrollError(
            "E407",
            f"tol={tol:g} is below what {dtype} can certify, about {least:.0e}",
            hint="" if dtype == torch.float64 else "give inputs in float64",
        )
    return tol


# --- what an error is measured against --------------------------------------------------------------------------------


def error_of(net: Network, data: Mapping[str, Tensor], start: Tensor) -> tuple[Error, bool]:
    """(the error of points, as `Solution` says it; is it a certified gap?), for the problems of these data.

    A gap is divided by the larger of the objective at 0 and at the start; a residual by the longer of the gradient steps
    there. What may vanish at the answer is left out, but for the rounding of the answer itself.
    """
    parts, z = net.derivation.parts, net.derivation.variable
    points = (torch.zeros_like(start), start)

    def values(**terms: Expr) -> Callable[[Tensor, Any], dict[str, Tensor]]:
        run = net.terms_of(replace(net.program.problem, terms=terms))
        return lambda point, rows: run({**{name: x[rows] for name, x in data.items()}, z.name: point})

    gap = duality_gap(parts, z)
    if gap is not None:
        objective = values(f=add(*values_of(p.e for p in parts)))
        scale = _largest(objective(p, slice(None))["f"] for p in points)
        _refuse_tiny(scale, data)
        gap_at = values(gap=gap)
        return lambda new, moved, rows: relative(gap_at(new, rows)["gap"].abs(), scale[rows], moved), True
    slope = gradient(add(*(p.e for p in parts if p.descended)), z)
    (lipschitz,) = (a.value for a in net.derivation.exact.definitions if a.target == LIPSCHITZ)
    steep = values(slope=total(elementwise(slot(0) ** 2, slope)), L=lipschitz)
    first = _largest(found["slope"].sqrt() / found["L"] for found in (steep(p, slice(None)) for p in points))
    _refuse_tiny(first, data)
    rounding = least_tolerance(start.dtype) / DEFAULTS[start.dtype]

    def residual(new: Tensor, moved: Tensor, rows: Tensor) -> Tensor:
        return relative(length(moved), torch.maximum(first[rows], rounding * length(new)), moved)

    return residual, False


def _largest(values: Iterable[Tensor]) -> Tensor:
    """Row by row, of what is finite. Raises UnrollError E404 where all is beyond the largest number of the type."""
    found = torch.stack([v.abs() for v in values])
    beyond = found.isinf().any(0) & ~found.isfinite().any(0)
    if beyond.any():
        message = f"{int(beyond.sum()):,} of {beyond.numel():,} problems have an objective, or a slope, beyond what {found.dtype} can hold"
        raise UnrollError(
            "E404", message, hint="other units" + ("" if found.dtype == torch.float64 else ", or float64")
        )
    return found.nan_to_num(0, 0, 0).amax(0)


def _refuse_tiny(scale: Tensor, data: Mapping[str, Tensor]) -> None:
    """Data whose squares are lost, so that no error can be measured against them. Raises UnrollError E404."""
    info = torch.finfo(scale.dtype)
    least = 2 * (info.tiny * info.eps) ** 0.5  # gaps have products of two objectives
    entries = torch.stack([x.abs().flatten(1).amax(1) for x in data.values() if x.numel()], 1) if len(scale) else None
    if entries is None:
        return
    top = entries.amax(1)
    lost = (scale < least) & (top > 0) & (top < (1e3 * least) ** 0.5)
    if lost.any():
        message = f"{int(lost.sum()):,} of {lost.numel():,} problems have values whose squares are too near 0 for {scale.dtype} to measure an error by"
        raise UnrollError(
            "E404", message, hint="other units" + ("" if scale.dtype == torch.float64 else ", or float64")
        )


def relative(x: Tensor, scale: Tensor, moved: Tensor) -> Tensor:
    """x / scale; where the scale is too small to divide by, 0 for a point that no longer moves, else infinite."""
    info = torch.finfo(scale.dtype)
    still = (moved == 0).flatten(1).all(1) & x.isfinite()
    return torch.where(scale >= info.tiny / info.eps, x / scale, torch.where(still, 0.0, torch.inf).to(scale))


def length(x: Tensor) -> Tensor:
    """Of every row."""
    return x.flatten(1).norm(dim=1)


def one_step(spec: Spec) -> Spec:
    """The spec's problem with one layer of the first plain algorithm that fits. Raises SpecError E303."""
    document: dict[str, Any] = {
        k: v for k, v in spec.to_dict().items() if k not in ("data", "train", "model", "weights")
    }
    problem = from_spec(spec)
    if len(problem.variables) != 1:
        raise SpecError("E303", f"{spec.title} has {len(problem.variables)} variables; solve minimises over one")
    parts = classify(problem)
    name = next((name for name in PLAIN if find(name).fits(parts) is None), None)
    if name is None:
        found = {name: find(name).fits(parts) for name in PLAIN}
        raise SpecError(
            "E303",
            f"no algorithm here solves {spec.title}: {found[PLAIN[0]]}",
            hint=unsigned(parts) or _remedy(parts),
            notes=tuple(p.show() for p in parts),
        )
    return load({**document, "unroll": {"algorithm": name, "layers": 1}})


def _remedy(parts: Sequence[Part]) -> str:
    """What to change in the objective."""
    stuck = [p for p in parts if not p.descended and p.proximal is None]
    if stuck:
        return f"leave out, or write in another way, what has neither a gradient nor a prox: {pretty(stuck[0].e)}"
    if not any(p.descended for p in parts):
        return "one term must have a gradient with a Lipschitz constant: 1/2 * sumsq(x - z), say, or huber(z, 0.1) in the place of abs(z)"
    return "of the terms without a gradient keep one, or give the others one: huber(z, 0.1) in the place of abs(z)"


def iterate(
    step: Map,
    z: Tensor,
    error: Error,
    tol: float,
    iterations: int,
    console: Console | None = None,
    label: str = "",
    restart: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """(fixed points, errors, iterations done) of z = step(z, rows), row by row of z, accelerated with restarts.

    step(z, rows) maps the rows of z that belong to the problems `rows`.  error(z, moved, rows): that of z, reached from the
    extrapolated point z + moved.  A row is done when its error is at most tol, or when it is no number any more.
    """
    answer, errors = z.clone(), z.new_full((len(z),), torch.inf)
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
            y, before, t = new + (t - 1) / t_new * change, new, t_new
            if k % CHECK and k < iterations:
                continue
            found = error(new, moved, active).to(errors)
            answer[active], errors[active] = new, found
            left = ~(found <= tol) & new.flatten(1).isfinite().all(1)
            active, y, before, t = active[left], y[left], before[left], t[left]
            bar.update(task, completed=len(z) - len(active), note=f"iteration {k:,}, {len(active):,} left")
            if not len(active):
                break
    return answer, errors, k


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product row by row, kept as a column that scales rows: (B, ...), (B, ...) -> (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))
