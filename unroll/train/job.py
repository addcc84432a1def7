"""What a training starts from, and the network of a spec on its data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from unroll.api import compile
from unroll.spec import Spec, load
from unroll.spec.schema import PatchEmbed, StemEmbed, TokenEmbed, Train
from unroll.train.samples import Data, Shape, Shapes, Tensors

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.float32,
}  # bfloat16: weights stay float32


@dataclass(frozen=True)
class Job:
    """The spec, and what the caller set in addition."""

    folder: Path
    spec: Spec
    dims: dict[str, int]
    scalars: dict[str, float]
    given: Tensors
    console: Console | None

    @property
    def settings(self) -> Train:
        return self.spec.train or Train()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.precision]


def build(job: Job, data: Data, spec: Spec) -> nn.Module:
    """The network of a spec on this job's data; sizes that the spec names and leaves open are those of the data."""
    return compile(
        spec,
        dims={**open_sizes(spec, data.sizes), **job.dims},
        parameters=data.parameters,
        scalars=job.scalars,
        seed=job.settings.seed,
        dtype=job.dtype,
        words=data.words if spec.model is not None else None,
    )


def open_sizes(spec: Spec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of the data that the spec names and leaves open."""
    return {name: sizes[name] for name, size in spec.dims.items() if not isinstance(size, int) and name in sizes}


def plain_spec(spec: Spec, algorithm: str, layers: int, step: float | str | None = None) -> Spec:
    """The same objective with an algorithm of which nothing is learned."""
    document: dict[str, Any] = spec.to_dict()
    start = document.get("unroll", {}).get("start")
    document["unroll"] = {"algorithm": algorithm, "layers": layers} | ({"start": start} if start else {})
    document["unroll"] |= {} if step is None else {"step": step}
    return load({k: v for k, v in document.items() if k not in ("data", "train", "model", "weights")})


def first_rank() -> bool:
    """Is this the process that writes? (Of several, started by torchrun or by Lightning.)"""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def shapes_of(spec: Spec, dims: Mapping[str, int]) -> Shapes:
    """Stored shapes of what a spec declares: matrices that carry samples are tokens first, so [d, N] is (N, d)."""
    sizes = {**{name: size for name, size in spec.dims.items() if isinstance(size, int)}, **dims}

    def shape(declared: Sequence[int | str]) -> Shape:
        return tuple(size if isinstance(size, int) else sizes.get(size) for size in declared)

    return Shapes(
        {name: shape(item.given) for name, item in spec.inputs.items()},
        {name: shape(item.given) for name, item in spec.variables.items()},
        {name: shape(item.shape) for name, item in spec.parameters.items()},
        _taken(spec),
    )


def _taken(spec: Spec) -> str:
    match spec.model.embed if spec.model is not None else None:
        case TokenEmbed():
            return "tokens"
        case PatchEmbed() | StemEmbed():
            return "image"
        case _:
            return ""
