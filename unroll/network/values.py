"""Values that are given to a network: read as tensors, and held against what the spec declares, before any memory is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import sympy as sp
import torch

from unroll.emit.program import Program
from unroll.errors import UnrollError, did_you_mean
from unroll.language.constructors import swap
from unroll.language.nodes import Sym, dim
from unroll.language.problem import Problem
from unroll.network.kinds import as_number
from unroll.spec import Spec

MOST_ENTRIES = 2**31
"""Of all tensors that a network is made with: 8 GiB in float32."""


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """A value of a parameter: real, finite, floating. Raises UnrollError E404."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UnrollError("E404", f"{name} cannot be read as a tensor: {e}") from None
    if found.is_complex():
        raise UnrollError("E404", f"{name} is complex; parameters are real")
    found = found if found.is_floating_point() else found.to(torch.float64)
    if not found.isfinite().all():
        raise UnrollError("E404", f"{name} has entries that are not finite")
    return found


def refuse_undeclared(declared: Iterable[Sym], given: Mapping[str, torch.Tensor]) -> None:
    """What was derived relies on what parameters and inputs were declared to be. Raises UnrollError E403."""
    for s in declared:
        for prop in sorted(s.props) if s.name in given else ():
            off = _distance(prop, given[s.name].detach())
            if off > (1e-4 if given[s.name].dtype.itemsize > 2 else 1e-2):
                raise UnrollError(
                    "E403",
                    f"'{s.name}' is declared {prop.replace('_', ' ')}, and the value given is not: off by {off:.1e}",
                    hint="what was derived relies on it",
                )


def _distance(prop: str, value: torch.Tensor) -> float:
    """How far a value is from what `prop` says; 0 for a property that can only be drawn."""
    m = value.double()
    match prop:
        case "orthonormal" if m.ndim > 1:
            gram = m.mT @ m
            return float((gram - torch.eye(gram.shape[-1], dtype=m.dtype, device=m.device)).abs().max())
        case "unit_columns" if m.ndim > 1:
            return float((m.norm(dim=-2) - 1).abs().max())
        case "symmetric" if m.ndim > 1:
            return float((m - m.mT).abs().max() / m.abs().max().clamp_min(1e-30))
        case "positive":
            return float(-m.clamp_max(0).min() / m.abs().max().clamp_min(1e-30))
        case "mask":
            return float(torch.minimum(m.abs(), (m - 1).abs()).max())
        case _:
            return 0.0


def refuse_empty_masks(inputs: Iterable[Sym], given: Mapping[str, Any]) -> None:
    """Raises UnrollError E403 for a mask that is not 0 or 1, or of a sample that has nothing else than padding."""
    masks = [s for s in inputs if "mask" in s.props and s.name in given]
    refuse_undeclared(masks, given)
    for s in masks:
        if s.name in given and not (there := given[s.name].bool().any(-1)).all():
            which = f" of sample {int((~there).flatten().nonzero()[0])}" if there.ndim else ""
            raise UnrollError("E403", f"the mask {s.name}{which} is 0 everywhere", hint="leave that sample out")


def refuse_out_of_bounds(spec: Spec, scalars: Mapping[str, Any]) -> None:
    """min and max hold for values given later too. Raises UnrollError E403."""
    for name, value in scalars.items():
        record = spec.scalars.get(name)
        if record is None:
            continue  # `network` says that there is no such scalar
        number = as_number(name, value)
        if not (record.min is None or number >= record.min) or not (record.max is None or number <= record.max):
            bounds = f"{'' if record.min is None else f'{record.min:g} <= '}{name}{'' if record.max is None else f' <= {record.max:g}'}"
            raise UnrollError("E403", f"'{name}' = {number:g} breaks what the spec declares: {bounds}")


def refuse_too_large(program: Program, missing: Sequence[str]) -> None:
    """Before any memory is asked for. Raises UnrollError E402 for an open size, E404 for more than MOST_ENTRIES."""
    for s in program.problem.parameters:
        sizes = program.tensor_sizes(s)
        if s.name in missing and None in sizes:
            raise UnrollError(
                "E402",
                f"{s.name} has a dynamic size and no value",
                hint=f"give parameters={{'{s.name}': ...}}, or the size as a number",
            )
    counts = {s.name: prod(n or 1 for n in program.tensor_sizes(s)) for s in program.problem.parameters}
    dims = {dim(name): sp.Integer(n) for name, n in program.dims.items()}
    for p in program.step.learned:
        sizes = [swap(n, dims) for n in (*p.shape, *([] if p.family is None else [p.family]))]
        if not all(n.is_Integer for n in sizes):
            raise UnrollError(
                "E402",
                f"'{p.name}' has an open size: {' × '.join(map(str, sizes))}",
                hint="what is learned has as many entries as the sizes say: give them as numbers",
            )
        counts[p.name] = prod(map(int, sizes)) * (program.sets if p.per_layer else 1)
    name = max(counts, key=lambda n: counts[n], default="")
    if sum(counts.values()) > MOST_ENTRIES:
        raise UnrollError(
            "E404",
            f"{name} would have {counts[name]:,} entries; all together may have {MOST_ENTRIES:,}",
            hint="smaller dims, fewer layers, or share: layers",
        )


def refuse_blind(program: Program) -> None:
    """What a layer makes is as many tensors as come in. Raises UnrollError E402 where it reads nothing of them."""
    for s in program.step.states:
        node = program.graph.nodes[program.graph.roots["next", s.symbol.name].node]
        if isinstance(s.symbol, Sym) and not node.batched:
            hint = "another step size, or an objective that an input occurs in"
            raise UnrollError("E402", f"a layer makes the same of every {s.symbol.name}, whatever comes in", hint=hint)


def sizes_of(spec: Spec, dims: Mapping[str, int], parameters: Mapping[str, Any]) -> dict[str, int]:
    """Sizes given, and those that the shapes of given parameters say. Raises UnrollError E404 for a shape that contradicts."""
    found = dict(dims)
    open_sizes = {name for name, n in spec.dims.items() if not isinstance(n, int)}
    for name, value in parameters.items():
        if name not in spec.parameters:
            raise UnrollError(
                "E402", f"'{name}' is not a parameter of {spec.title}", hint=did_you_mean(name, spec.parameters)
            )
        record = spec.parameters[name]
        declared = record.shape if record.family is None else (record.family, *record.shape)
        if len(value.shape) != len(declared):
            raise UnrollError(
                "E404",
                f"{name} has {len(value.shape)} axes, declared are {len(declared)}: [{', '.join(map(str, declared))}]",
            )
        for entry, n in zip(declared, value.shape, strict=True):
            if isinstance(entry, str) and entry in open_sizes and found.setdefault(entry, int(n)) != n:
                raise UnrollError("E404", f"{name} has shape {tuple(value.shape)}, but {entry} = {found[entry]}")
    return found


def with_inits(spec: Spec, problem: Problem, names: Collection[str]) -> Problem:
    """The problem with these parameters alone, `init:` of each as a property that `draw` keeps."""
    props = {n: p.init for n, p in spec.parameters.items() if p.init not in (None, "gaussian")}
    wanted = [s for s in problem.parameters if s.name in names]
    return replace(
        problem, parameters=tuple(replace(s, props=s.props | {props[s.name]}) if s.name in props else s for s in wanted)
    )
