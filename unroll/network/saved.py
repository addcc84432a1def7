"""A network in a folder and in a pickle; what was changed since is found by its name.

    write(folder, net)      spec.yaml, network.py, weights.safetensors: tensors, numbers and a manifest; no pickle. words.json, of a
                            model that has words
    restore(folder)         the network again, once every value and text has the digest that the manifest says

Values have names of one kind: network.W, given.A, scalars.lam, dims.m. Folders of version 1 had no manifest: of them
names, shapes, types and the spec are compared, and values are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from os.path import isfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unroll.errors import UnrollError, quote

if TYPE_CHECKING:
    from unroll.network.network import Network

VERSION, BARE = "2", "1"
"""Of the layout of a folder: with a manifest, and without."""
SPEC, WEIGHTS, SOURCE, WORDS = "spec.yaml", "weights.safetensors", "network.py", "words.json"
SHOWN = 6
"""Differences that a message lists."""
Value = Tensor | float | int | bytes
Seal = tuple[str, str]
"""What a value is, in words, and its digest."""


class Written(Protocol):
    """What a network keeps of the spec it came from."""

    @property
    def sha256(self) -> str: ...
    def to_yaml(self) -> str: ...


class Kept(Protocol):
    """What is kept of a network, or of the model around one."""

    @property
    def source(self) -> str: ...
    @property
    def given(self) -> Mapping[str, Tensor]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def scalars(self) -> Mapping[str, float]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


# --- writing ----------------------------------------------------------------------------------------------------------


def write(folder: str | os.PathLike[str], spec: Written, net: Kept, more: Mapping[str, bytes] | None = None) -> Path:
    """A network as files in a folder, each whole or not at all. more: files beside those that every network has."""
    target = Path(folder)
    if next((p for p in (target, *target.parents) if p.exists()), target).is_file():
        raise UnrollError("E405", f"a network is saved as a folder, and {target} is, or lies in, a file")
    target.mkdir(parents=True, exist_ok=True)
    values, texts = values_of(net), {SPEC: spec.to_yaml().encode(), SOURCE: net.source.encode(), **(more or {})}
    record = {
        "version": VERSION,
        "dims": json.dumps(_named(values, "dims")),
        "scalars": json.dumps(_named(values, "scalars")),
        "manifest": json.dumps({name: seal(value) for name, value in {**values, **texts}.items()}),
    }
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in values.items() if isinstance(v, Tensor)}
    with TemporaryDirectory(dir=target, prefix=".saving-") as fresh:
        save_file(tensors, Path(fresh) / WEIGHTS, metadata=record)
        for name, text in texts.items():
            (Path(fresh) / name).write_bytes(text)
        if WORDS not in texts:  # of a network that was here before
            (target / WORDS).unlink(missing_ok=True)
        for name in (*texts, WEIGHTS):
            os.replace(Path(fresh) / name, target / name)
    return target


def values_of(net: Kept) -> dict[str, Value]:
    """Every tensor and number that a network of a spec is made with, by name."""
    parts: dict[str, Mapping[str, Value]] = {
        "network": net.state_dict(),
        "given": net.given,
        "dims": {name: int(n) for name, n in net.sizes.items()},
        "scalars": {name: float(x) for name, x in net.scalars.items()},
    }
    return {f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()}


def seal(value: Value) -> Seal:
    """What a value is, and the digest of its bytes; a number is its own."""
    match value:
        case Tensor():
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
            return kind, hashlib.sha256(raw.data).hexdigest()
        case bytes():
            return "text", hashlib.sha256(value).hexdigest()
        case _:
            return repr(value), ""


def differences(was: Mapping[str, Seal], now: Mapping[str, Seal]) -> Iterator[str]:
    """What is missing, what was added, and what is not what it was, a phrase each."""
    for name in sorted({*was, *now}):
        if name not in now:
            yield f"{name} is missing"
        elif name not in was:
            yield f"{name} was not there"
        elif was[name][0] != now[name][0]:
            yield f"{name} is {now[name][0]}, not {was[name][0]}"
        elif was[name] != now[name]:
            yield f"{name} is not what it was"


# --- what a spec makes ------------------------------------------------------------------------------------------------

WAY_OUT = (
    "net.state_dict() keeps any network, beside the code that changed it; or let the spec say it, as it does of a head "
    "that is one linear map: model.head.classes=10"
)


def refuse_changed(net: nn.Module, made: nn.Module, apart: tuple[str, ...]) -> None:
    """Raises UnrollError E405 where the modules or the tensors of a network are not those that its spec makes.

    made: one that was just made, on any device.  apart: children that are looked at by themselves.
    """
    odd = list(differences(_parts(made, apart), _parts(net, apart)))
    types = {value.dtype for value in net.state_dict().values() if value.is_floating_point()}
    if len(types) > 1:
        odd.append(f"its tensors are of several types, {' and '.join(sorted(map(str, types)))}")
    if odd:
        message = f"this network is no longer the one that its spec makes: {_several(odd)}"
        raise UnrollError("E405", message, hint=WAY_OUT)


def _parts(net: nn.Module, apart: tuple[str, ...]) -> dict[str, Seal]:
    """Modules by what they are, tensors by their shape."""
    apart_from = (nn.Identity,)  # which does nothing, in the place of a part or without one
    kept = {name: m for name, m in net.named_modules() if not isinstance(m, apart_from)}
    modules = {name or "the network": (f"{type(m).__name__}({m.extra_repr()})", "") for name, m in kept.items()}
    tensors = {name: (str(tuple(value.shape)), "") for name, value in net.state_dict().items()}
    return {name: kind for name, kind in {**modules, **tensors}.items() if name.split(".")[0] not in apart}


def _several(odd: list[str]) -> str:
    return "; ".join(odd[:SHOWN]) + (f"; and {len(odd) - SHOWN} more" if len(odd) > SHOWN else "")


# --- reading ----------------------------------------------------------------------------------------------------------


def restore(folder: str | os.PathLike[str]) -> Network:
    """The network that `save` wrote. Raises UnrollError E405 for a folder that is not one, or no longer is."""
    place = Path(folder)
    for name in (SPEC, WEIGHTS):
        if not isfile(place / name):
            raise UnrollError("E405", f"{quote(str(place), 200)} holds no {name}: it is not a saved network")
    record, tensors = _opened(place / WEIGHTS)
    values: dict[str, Value] = {**tensors, **_numbers(place, record, "dims"), **_numbers(place, record, "scalars")}
    text = (place / SPEC).read_bytes()
    if record["version"] == VERSION:
        texts = {name: (place / name).read_bytes() for name in (SPEC, SOURCE, WORDS) if (place / name).is_file()}
        was = _manifest(place, record)
        was = {name: kind for name, kind in was.items() if name != SOURCE or name in texts}
        _refuse_others(
            place, was, {name: seal(v) for name, v in {**values, **texts}.items()}, "bring it back as it was"
        )
    dims, given, scalars, state = (_named(values, part) for part in ("dims", "given", "scalars", "network"))
    net = recompile(_decoded(place, text), dims, given, scalars, state)
    if record["version"] == BARE and cast(Any, net.spec).sha256 != record.get("sha256"):
        raise UnrollError("E405", f"{place / SPEC} is not the spec that these weights belong to")
    kinds, made = ({name: (seal(v)[0], "") for name, v in d.items()} for d in (values, values_of(net)))
    _refuse_others(place, made, kinds, "")
    return net


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that `write` wrote. Raises UnrollError E405."""
    try:
        with safe_open(path, framework="pt") as file:
            record = cast(dict[str, str], file.metadata() or {})
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise UnrollError("E405", f"{path} is damaged: {e}") from None
    if "version" not in record:
        hint = "of a run folder, unroll eval measures the network again"
        raise UnrollError("E405", f"{path.parent} was not written by unroll.save", hint=hint)
    if record["version"] not in (VERSION, BARE):
        raise UnrollError("E405", f"{path} was written by another version of unroll")
    return record, tensors


def _json(place: Path, record: Mapping[str, str], entry: str) -> dict[str, Any]:
    """An entry of the metadata. Raises UnrollError E405 for one that is missing, or no JSON."""
    try:
        found = json.loads(record.get(entry, "null"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UnrollError(
            "E405", f"{place / WEIGHTS} is damaged: its metadata say nothing that can be read of '{entry}'"
        )
    return cast("dict[str, Any]", found)


def _numbers(place: Path, record: Mapping[str, str], part: str) -> dict[str, Value]:
    found = _json(place, record, part)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnrollError("E405", f"{place / WEIGHTS} is damaged: {part}.{quote(name)} is no number")
    return {f"{part}.{name}": value for name, value in found.items()}


def _manifest(place: Path, record: Mapping[str, str]) -> dict[str, Seal]:
    return {
        name: tuple(kind) if isinstance(kind, list) else ("", "")
        for name, kind in _json(place, record, "manifest").items()
    }


def _refuse_others(place: Path, was: Mapping[str, Seal], now: Mapping[str, Seal], hint: str) -> None:
    if odd := list(differences(was, now)):
        raise UnrollError("E405", f"{place} is not as it was saved: {_several(odd)}", hint=hint)


def _decoded(place: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as e:
        raise UnrollError("E405", f"{place / SPEC} is damaged: it is not UTF-8 ({e.reason})") from None


def _named(values: Mapping[str, Value], part: str) -> dict[str, Any]:
    return {name.removeprefix(f"{part}."): v for name, v in values.items() if name.startswith(f"{part}.")}


def recompile(
    spec: str,
    dims: Mapping[str, int],
    given: Mapping[str, Tensor],
    scalars: Mapping[str, float],
    state: Mapping[str, Tensor],
    training: bool = True,
) -> Network:
    """The network (or the model around one) of a spec, with these values: what a pickle holds.

    Raises UnrollError E405 for a state that is not of the network that the spec makes.
    """
    import unroll  # what was saved is compiled again: the one step back up

    net = cast(Any, unroll.compile)(spec, dims=dims, parameters=given, scalars=scalars, dtype=_dtype(state, given))
    made, found = ({n: (str(tuple(v.shape)), "") for n, v in d.items()} for d in (net.state_dict(), state))
    if odd := list(differences(made, found)):
        raise UnrollError("E405", f"these weights are not those of the network that the spec makes: {_several(odd)}")
    net.load_state_dict(state)
    return net.train(training)


def _dtype(*tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    return next((t.dtype for d in tensors for t in d.values() if t.is_floating_point()), None)
