"""From files: a problem solved to a file, a network from its folder."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from unroll.api import Source, read
from unroll.errors import UnrollError, did_you_mean
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
    from unroll.model.module import restored

    return restored(folder)


def solve_files(
    source: Source,
    inputs: Sequence[str],
    parameters: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    tol: float = 1e-8,
    max_iterations: int = 100_000,
    output: Path | None = None,
    algorithm: str | None = None,
    start: str | None = None,
) -> Solution:
    """As `solve`, from and to .npy files named [NAME=]FILE. Raises SpecError E502 to E506 for files, UnrollError E404 for names."""
    spec = read(source, overrides)
    named = _pairs(inputs, spec.inputs, "input")
    given = {
        name: read_array(Path(file), name) for name, file in _pairs(parameters, spec.parameters, "parameter").items()
    }
    for name in (x for x in spec.inputs if x not in named):
        raise UnrollError("E404", f"the input '{name}' is missing", hint=f"--input {name}=FILE")
    arrays = [read_array(Path(named[name]), name).double() for name in spec.inputs]
    for name in (p for p in spec.parameters if p not in given):
        raise UnrollError("E402", f"the parameter '{name}' has no value", hint=f"--parameter {name}=FILE")
    begin = None if start is None else read_array(Path(start), "start").double()
    found = solve(
        spec,
        *arrays,
        algorithm=algorithm,
        start=begin,
        parameters=given,
        tol=tol,
        max_iterations=max_iterations,
        console=Console(stderr=True),
    )
    if output is not None:
        with output.open("wb") as file:  # np.save would add to a name without .npy
            if len(found.values) == 1:
                np.save(file, found.z.numpy())
            else:
                with zipfile.ZipFile(file, "w") as archive:  # np.savez has no array of the name `file`
                    for n, z in found.values.items():
                        with archive.open(f"{n}.npy", "w") as one:
                            np.save(one, z.numpy())
    return found


def _pairs(texts: Sequence[str], names: Mapping[str, Any], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, file in (_pair(text, names, what) for text in texts):
        if name in found:
            raise UnrollError("E404", f"two files for {name}: '{found[name]}' and '{file}'")
        found[name] = file
    return found


def _pair(text: str, names: Mapping[str, Any], what: str) -> tuple[str, str]:
    """NAME=FILE, or FILE where there is one name."""
    name, equals, file = text.partition("=")
    if equals and name in names:
        return name, file
    if equals and name.isidentifier() and not isfile(text):
        hint = did_you_mean(name, names) or f"there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'}"
        raise UnrollError("E404", f"'{text}': the problem has no {what} '{name}'", hint=hint)
    if len(names) == 1:
        return next(iter(names)), text
    raise UnrollError(
        "E404", f"'{text}' does not say what it is", hint=f"NAME=FILE with NAME one of {', '.join(names)}"
    )
