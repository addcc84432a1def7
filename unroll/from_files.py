"""From files: a problem solved to a file, a network from its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from unroll.api import Source, read
from unroll.errors import UnrollError
from unroll.solver.solve import Solution, solve
from unroll.train.data import read_array

if TYPE_CHECKING:
    from unroll.model.module import Model
    from unroll.network.network import Network


def restore(folder: str | os.PathLike[str]) -> Network | Model:
    """The network that `save` wrote, or the one that a run folder of `unroll train` holds. Raises UnrollError E405, E5xx."""
    if isfile(Path(folder) / "run.json"):
        from unroll.train import trained

        return trained(Path(folder))
    from unroll.network.saved import restore as read_folder

    return read_folder(folder)


def solve_files(
    source: Source,
    inputs: Sequence[str],
    parameters: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    tol: float = 1e-8,
    max_iterations: int = 100_000,
    output: Path | None = None,
) -> Solution:
    """As `solve`, from and to .npy files named [NAME=]FILE. Raises SpecError E502 to E506 for files, UnrollError E404 for names."""
    spec = read(source, overrides)
    named = _pairs(inputs, spec.inputs)
    given = {name: read_array(Path(file), name) for name, file in _pairs(parameters, spec.parameters).items()}
    absent = [name for name in spec.inputs if name not in named]
    if absent:
        raise UnrollError("E404", f"the input '{absent[0]}' is missing", hint=f"--input {absent[0]}=FILE")
    arrays = [read_array(Path(named[name]), name).double() for name in spec.inputs]
    found = solve(spec, *arrays, parameters=given, tol=tol, max_iterations=max_iterations, console=Console(stderr=True))
    if output is not None:
        with output.open("wb") as file:  # np.save would add to a name without .npy
            np.save(file, found.z.numpy())
    return found


def _pairs(texts: Sequence[str], names: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, file in (_pair(text, names) for text in texts):
        if name in found:
            raise UnrollError("E404", f"two files for {name}: '{found[name]}' and '{file}'")
        found[name] = file
    return found


def _pair(text: str, names: Mapping[str, Any]) -> tuple[str, str]:
    """NAME=FILE, or FILE where there is one name."""
    name, equals, file = text.partition("=")
    if equals and name in names:
        return name, file
    if len(names) == 1:
        return next(iter(names)), text
    raise UnrollError(
        "E404", f"'{text}' does not say what it is", hint=f"NAME=FILE with NAME one of {', '.join(names)}"
    )
