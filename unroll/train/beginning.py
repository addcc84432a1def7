"""What a training starts from: a run, a saved network or a file of weights. Read once, when the run begins, and kept in its folder.

begin(origin, ..)   -> Beginning: the network that was found
start(net, ..)      -> Taken: what of it our network starts with
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unroll.api import compile
from unroll.errors import SpecError, UnrollError, quote
from unroll.model.module import Model
from unroll.model.transfer import Taken, transfer
from unroll.model.weights import read_file, restore_weights
from unroll.model.words import Words
from unroll.network import saved
from unroll.network.network import Network
from unroll.spec import Spec, load
from unroll.spec.schema import From
from unroll.train.job import Job, shapes_of
from unroll.train.samples import Data, Tensors
from unroll.train.stored import read_json


@dataclass(frozen=True)
class Beginning:
    """A network to start from. sha256: of its file.  given: values of its problem's parameters, exact.  means: its data.json."""

    path: str
    sha256: str
    net: Network | Model
    given: Tensors
    means: Mapping[str, Any] = field(default_factory=dict[str, Any])


def begin(
    spec: Spec, given: Tensors, dims: Mapping[str, int], run: Callable[[Path], tuple[Job, nn.Module]]
) -> Beginning | None:
    """What `train: from:` names, None where it names nothing.

    given, dims: what the caller sets; a file of weights has none of its own.  run: job and network of a finished run in a folder.
    Raises SpecError E515 where there is nothing, E510 for a run that is not finished, UnrollError E405, E421.
    """
    origin = spec.train.from_ if spec.train is not None else None
    if origin is None:
        return None
    path, where = Path(origin.path), spec.key_where("train", "from")
    if origin.spec is not None and not isfile(path):
        raise SpecError("E515", "train: from: spec: is for a file of weights", where, "a folder has one of its own")
    if isfile(path / "run.json"):
        job, net = run(path)
        means = read_json(path / "data.json") if isfile(path / "data.json") else {}
        return Beginning(origin.path, _digest(path / saved.WEIGHTS), _ours(net), job.given, means)
    if isfile(path / saved.SPEC):
        net = _ours(saved.restore(path))
        return Beginning(origin.path, _digest(path / saved.WEIGHTS), net, net.given)
    if isfile(path):
        return Beginning(origin.path, _digest(path), _from_file(path, origin, spec, given, dims), {})
    hint = "a run folder, a folder of net.save, or a file of weights; paths are relative to where you run unroll"
    raise SpecError("E515", f"train: from: there is no '{quote(origin.path)}'", where, hint)


def _from_file(path: Path, origin: From, spec: Spec, given: Tensors, dims: Mapping[str, int]) -> Network | Model:
    """The network of a spec with the weights of a file: under our names, or those that its section `weights:` says."""
    of = spec if origin.spec is None else load(origin.spec)
    known = {name: value for name, value in given.items() if name in of.parameters}
    net = compile(of, parameters=known, dims={name: n for name, n in dims.items() if name in of.dims})
    found = read_file(path)
    hint = "say whose they are: from: {path: .., spec: SPEC}, a spec with the sizes of the file"
    if set(found) == set(net.state_dict()):
        try:
            net.load_state_dict(dict(found))
        except RuntimeError as e:
            reason = str(e).splitlines()[-1].strip()
            raise UnrollError("E515", f"'{quote(str(path))}' is not of {of.title}: {reason}", hint=hint) from None
    elif of.weights is None:
        message = f"the names in '{quote(str(path))}' are not those of {of.title}, which says none of other files"
        raise UnrollError("E515", message, hint="add  weights: {names: {..}}, or from: {path: .., spec: SPEC}")
    else:
        try:
            restore_weights(net, path)
        except UnrollError as e:
            notes = (*e.notes, hint) if origin.spec is None else e.notes
            raise UnrollError(e.code, e.message, e.where, e.hint, notes) from None
    return net


def _ours(net: nn.Module) -> Network | Model:
    assert isinstance(net, Network | Model)
    return net


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inherited(beginning: Beginning, spec: Spec, dims: Mapping[str, int], given: Tensors) -> Tensors:
    """Values of the problem's parameters that a run hands on, where they have the declared sizes and nothing else gives them."""
    declared = shapes_of(spec, dims).parameters
    data = getattr(spec.data, "files", {})
    return {
        name: value
        for name, value in beginning.given.items()
        if name in declared and name not in given and name not in data and _fits(value, declared[name])
    }


def _fits(value: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    return value.ndim == len(shape) and all(n in (None, k) for n, k in zip(shape, value.shape, strict=True))


def start(net: nn.Module, beginning: Beginning, data: Data, leave: tuple[str, ...]) -> Taken:
    """Give our network what it can take. Raises UnrollError E515."""
    return transfer(_ours(net), beginning.net, leave=leave, names=_names(beginning, data))


def _names(beginning: Beginning, data: Data) -> tuple[list[str], list[str]]:
    """Names of the rows of a head or of a table of words, there and here: classes or words; none where one side has none."""
    classes = [kept.get("classes") for kept in (beginning.means, data.kept)]
    theirs, ours = beginning.net.words if isinstance(beginning.net, Model) else None, data.words
    if classes[0] and classes[1]:
        return classes[0], classes[1]
    if theirs is None or ours is None or theirs.record() == ours.record():
        return [], []
    return _listed(theirs, "there"), _listed(ours, "here")


def _listed(words: Words, side: str) -> list[str]:
    """Characters by themselves; words of a tokenizer are those of no other."""
    return words.record().get("vocabulary") or [f"{side} {k}" for k in range(words.size)]
