"""Weights from elsewhere: the section `weights:` of a spec, read in both directions.

restore_weights(net, "released.pth")    their names, axes and parts -> our parameters; tells what did not match
release_weights(net)                    the inverse: a dict under their names
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unroll.derivation.step import Learned
from unroll.errors import SpecError, UnrollError, did_you_mean, quote
from unroll.language.nodes import Sym
from unroll.model.module import Model
from unroll.network.network import Network, draw, finite
from unroll.spec import Spec
from unroll.spec.schema import Move, Weights

LAYER, MEMBER = "{layer}", "{member}"
STATISTICS = ("running_mean", "running_var")
"""Buffers that are learned: they come with the weights, as parameters do."""
SHOWN = 40
"""Names of a kind that a report lists."""
Net = Network | Model


@dataclass(frozen=True)
class Report:
    """What became of every name. ok: nothing was left over on either side.

    loaded: (theirs, ours).  compared: (theirs, our constant or number), which agree.  ignored: theirs, not needed as the
    spec says.  unused: theirs, with no place.  refused: theirs that do not fit, with the reason.
    missing: ours, without a value (or parts of them), or with one of chance.  kept: our constants, as the spec says.
    """

    loaded: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    kept: tuple[str, ...]
    compared: tuple[tuple[str, str], ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.unused and not self.missing and not self.refused

    def left_over(self) -> Iterator[str]:
        """What did not match, a name per line."""
        yield from listed("does not fit", self.refused)
        yield from listed("not in the file", self.missing)
        yield from listed("in the file, not used", self.unused)

    def lines(self) -> Iterator[str]:
        """The report, a name per line; what did not match first."""
        yield from self.left_over()
        yield from listed("ignored, as the spec says", self.ignored)
        yield from listed("kept from the spec", self.kept)
        yield from listed("the same in both", [f"{theirs} = {ours}" for theirs, ours in self.compared])
        yield from listed("loaded", [f"{theirs} -> {ours}" for theirs, ours in self.loaded])

    def __str__(self) -> str:
        return "\n".join(self.lines())


def listed(title: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{title}: {len(names)}"
        yield from (f"  {name}" for name in names[:SHOWN])
        if len(names) > SHOWN:
            yield f"  and {len(names) - SHOWN} more"


def restore_weights(net: Net, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True) -> Report:
    """Load released weights, named as the section `weights:` of the network's spec says; all of them, or none.

    source: a .safetensors or .npz file, a file of torch.save (read without running code), or a dict of tensors or arrays.
    Raises UnrollError E421 where a shape or a type does not fit, where a constant of the spec is another in the file,
    where two of theirs differ in one place of ours, and where a name of theirs or ours is left over. If not strict, what
    fits is loaded, and a warning lists the rest.
    """
    spec, weights = _weights(net)
    if not isinstance(source, str | os.PathLike | Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # of whom no checker asks
        hint = "give its state_dict()" if isinstance(source, nn.Module) else "a file, or a dict of tensors or arrays"
        raise UnrollError("E421", f"weights are not read from a {type(source).__name__}", hint=hint)
    found = _unwrapped(source if isinstance(source, Mapping) else read_file(Path(source)), weights)
    filling = _Filling(spec, net, strict)
    theirs = {name: _stripped(name, weights) for name in found}
    for name in sorted(found, key=lambda name: filling.turn(theirs[name])):
        filling.take(theirs[name], found[name], found)
    report = filling.report(weights)
    if not report.ok:
        counts = f"{len(report.missing)} missing, {len(report.unused)} not used"
        counts += f", {len(report.refused)} that do not fit" if report.refused else ""
        message = f"the weights do not match {spec.title}: {counts}"
        if strict:
            hint = (
                filling.prefix(report.unused)
                or "name them under weights: names or ignore, or load what fits with strict=False"
            )
            raise UnrollError("E421", message, hint=hint, notes=tuple(report.left_over()))
        warnings.warn("\n".join([message, *report.left_over()]), stacklevel=2)
    filling.commit()
    return report


def release_weights(net: Net) -> dict[str, Tensor]:
    """Our weights under their names: what `restore_weights` would read. Raises UnrollError E421."""
    spec, weights = _weights(net)
    values = {name: _outside(net, name, tensor.detach()) for name, tensor in net.state_dict().items()}
    pieces: dict[str, list[tuple[Move, Tensor]]] = {}
    for pattern, moves in weights.names.items():
        for i, move in enumerate(moves):
            if not isinstance(move.to, str):
                continue
            for name, ours, at, places in _expanded(pattern, move.to, values, spec, i):
                piece = _cut(ours, values[ours][at], move.into)
                if move.axes:
                    left, right = move.axes.split("->")
                    piece = rearrange(piece, f"{right} -> {left}", _sizes(net))
                if move.factor != 1:
                    factor = _factor(net, pattern, i, move, values, places, piece)
                    if not bool(torch.as_tensor(factor).all()):
                        raise UnrollError("E421", f"{name} cannot be told: it is {ours} over {move.factor}, which is 0")
                    piece = piece / factor
                pieces.setdefault(name, []).append((move, piece))
    return {name: _assembled(found, _numbers(weights, name)) for name, found in pieces.items()}


def _numbers(weights: Weights, name: str) -> list[Move]:
    """The parts of a tensor of theirs that are one number."""
    named = (moves for pattern, moves in weights.names.items() if _regex(pattern).fullmatch(name))
    return [move for moves in named for move in moves if not isinstance(move.to, str)]


def _assembled(pieces: list[tuple[Move, Tensor]], numbers: list[Move]) -> Tensor:
    """One tensor from its parts."""
    (move, first), *_ = pieces
    if not move.part:
        return first.clone()
    spans = [[_span(s, n) for s, n in zip(_padded(m.part, t.ndim), t.shape, strict=True)] for m, t in pieces]
    shape = [max(stop for _, stop in axis) for axis in zip(*spans, strict=True)]
    for constant in numbers:
        shape = [max(n, part.stop or 0) for n, part in zip(shape, _padded(constant.part, len(shape)), strict=True)]
    out = first.new_zeros(shape)
    for constant in numbers:
        if not out[slices(constant.part)].numel():
            raise UnrollError(
                "E421", f"part: '{constant.part}' of numbers that are {constant.to} does not say where it ends"
            )
        out[slices(constant.part)] = float(constant.to)
    for (_, tensor), span in zip(pieces, spans, strict=True):
        out[tuple(slice(a, b) for a, b in span)] = tensor
    return out


def _padded(part: str, ndim: int) -> tuple[slice, ...]:
    found = slices(part)
    return (*found, *[slice(None)] * (ndim - len(found)))


def _span(s: slice, size: int) -> tuple[int, int]:
    start = s.start or 0
    return start, start + size


# --- the network's side -----------------------------------------------------------------------------------------------


def _weights(net: Net) -> tuple[Spec, Weights]:
    spec = cast("Spec | None", net.spec)
    if spec is None or spec.weights is None:
        raise UnrollError(
            "E421", "the spec says nothing about weights from elsewhere", hint="add  weights: {names: {..}}"
        )
    return spec, spec.weights


def _sizes(net: Net) -> dict[str, int]:
    """Of axes that shapes leave open: what the map says, and the sizes of the spec."""
    return {**net.sizes, **_said(net)}


def _said(net: Net) -> dict[str, int]:
    """Sizes of axes that the map says, as numbers or by their place in the spec."""
    spec, weights = _weights(net)
    return {axis: n if isinstance(n, int) else spec.at(*n.split(".")) for axis, n in weights.sizes.items()}


def _learned(net: Net, name: str) -> Learned | None:
    """What is known of a learned parameter; None for all others."""
    for prefix, inner in networks_of(net).items():
        for (own, _), p in zip(inner.named_parameters(), inner.learned, strict=True):
            if prefix + own == name:
                return p
    return None


def _outside(net: Net, name: str, stored: Tensor) -> Tensor:
    """The value of a parameter from what is stored."""
    p = _learned(net, name)
    match p.constraint if p is not None else "none":
        case "positive":
            return nn.functional.softplus(stored)
        case "exp":
            return stored.exp()
        case "sigmoid":
            assert p is not None
            return p.limits[0] + (p.limits[1] - p.limits[0]) * torch.sigmoid(stored)
        case _:
            return stored


def _inside(net: Net, name: str, value: Tensor) -> Tensor:
    """The inverse of `_outside`."""
    p = _learned(net, name)
    return value if p is None else inside(p, value)


def inside(p: Learned, value: Tensor) -> Tensor:
    """What is stored for the value of a parameter."""
    match p.constraint:
        case "positive":
            return value + torch.log(-torch.expm1(-value))
        case "exp":
            return value.log()
        case "sigmoid":
            return torch.logit((value - p.limits[0]) / (p.limits[1] - p.limits[0]))
        case _:
            return value


def constants_of(net: Net) -> set[str]:
    """Buffers that the spec says, which no file may set."""
    return {n for n, _ in net.named_buffers() if n.split(".")[-1] not in STATISTICS}


def networks_of(net: Net) -> dict[str, Network]:
    """The layers by the prefix of their names."""
    return {f"{k}.": n for k, n in net.networks.items()} if isinstance(net, Model) else {"": net}


def _drawn(net: Net) -> set[str]:
    """Constants that would be others for another seed: those that change when what was drawn is drawn anew."""
    found: set[str] = set()
    for prefix, inner in networks_of(net).items():
        program, words = inner.program, inner.program.words
        if not inner.drawn:
            continue
        before = {n: inner.state_dict()[n] for n, _ in inner.named_buffers() if n in inner.state_dict()}
        for seed in (0, 1):  # at least one of them is not the network's
            probe, other = copy.deepcopy(inner), draw(program.problem, program.dims, seed)
            values: dict[str, Any] = {**inner.given, **inner.scalars, **{n: other[n] for n in inner.drawn}}
            cast(Any, probe).initialise(**{words["symbol", n]: values[n] for n in program.initialise_arguments})
            found |= {prefix + n for n, b in before.items() if not torch.equal(b, probe.get_buffer(n))}
    return found


@dataclass
class _Filling:
    """Our tensors, filled one after the other with theirs; nothing of the network changes before `commit`."""

    spec: Spec
    net: Net
    strict: bool
    values: dict[str, Tensor] = field(init=False)
    filled: dict[str, Tensor] = field(init=False)
    loaded: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    compared: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    left: dict[str, str] = field(default_factory=dict[str, str])
    refused: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        state = self.net.state_dict()
        self.values = {n: _outside(self.net, n, t.detach()).cpu().clone() for n, t in state.items()}
        self.filled = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in self.values.items()}
        assert self.spec.weights is not None
        self.moves = [(_regex(pattern), pattern, moves) for pattern, moves in self.spec.weights.names.items()]

    def turn(self, name: str) -> int:
        """After how many others a tensor of theirs comes: those that say its factor, and theirs."""
        return max((self._turn(moves, ()) for regex, _, moves in self.moves if regex.fullmatch(name)), default=0)

    def _turn(self, moves: Sequence[Move], on_the_way: tuple[str, ...]) -> int:
        """Raises UnrollError E421 where a factor waits for itself."""
        waits = [m.factor for m in moves if isinstance(m.factor, str)]
        for factor in waits:
            if factor in on_the_way:
                raise UnrollError("E421", f"the factor {factor} is a multiple of itself", hint="weights: names")
        first = [own for f in waits for _, _, own in self.moves if any(m.to == f for m in own)]
        return max((1 + self._turn(own, (*on_the_way, *waits)) for own in first), default=0) if waits else 0

    def take(self, name: str, value: Any, beside: Mapping[str, Any]) -> None:
        """Put a tensor of theirs where it goes. Raises UnrollError E421 where it does not fit."""
        assert self.spec.weights is not None
        if not isinstance(value, Tensor | _Array) and (_matches(name, self.spec.weights.ignore) or not self.strict):
            self.left[name] = name
            return
        with self._fitting(name):
            tensor = _tensor(name, value, beside)
            self._take(name, tensor)

    def _take(self, name: str, tensor: Tensor) -> None:
        used, known = torch.zeros(tensor.shape, dtype=torch.bool), False
        for regex, pattern, moves in self.moves:
            if match := regex.fullmatch(name):
                places, known = match.groupdict(), True
                for i, move in enumerate(moves):
                    with self._fitting(name):
                        self._put(name, tensor, pattern, move, i, places)
                    used[_place(slices(move.part), used)] = True
        if not known or not used.all():
            some = f"{name} ({int((~used).sum()):,} of {used.numel():,} numbers)"
            self.left[name] = some if known else name

    @contextmanager
    def _fitting(self, name: str) -> Generator[None]:
        """If not strict, what does not fit is set aside."""
        try:
            yield
        except SpecError:
            raise
        except UnrollError as e:
            if self.strict:
                raise
            self.refused.append(e.message if name in e.message else f"{name}: {e.message}")

    def _put(self, name: str, tensor: Tensor, pattern: str, move: Move, i: int, places: dict[str, str]) -> None:
        if not isinstance(move.to, str):
            _refuse_other_number(name, tensor[_place(slices(move.part), tensor)], move.to)
            self.compared.append((name, f"{move.to:g}"))
            return
        ours = _target(self.spec, pattern, i, move.to, places.get("layer"), self.values)
        into = _row(ours, move.to, places, self.values[ours], name)
        target, filled = self.values[ours][into], self.filled[ours][into]
        value = self._fitted(name, ours, tensor, move, _cut(ours, target, move.into))
        value = _converted(name, ours, value, target)
        if move.factor != 1:
            if isinstance(move.factor, str) and move.factor not in constants_of(self.net):
                known = cast(Tensor, _factor(self.net, pattern, i, move, self.filled, places, value))
                if not bool(known.all()):
                    raise UnrollError("E421", f"{name} -> {ours}: its factor {move.factor} is not in the file")
            value = value * _factor(self.net, pattern, i, move, self.values, places, value)
        place = slices(move.into)
        if ours in constants_of(self.net):
            self._refuse_other_constant(name, ours, tensor.dtype, value, target[place])
            self.compared.append((name, ours))
            return
        p = _learned(self.net, ours)
        if p is not None and p.constraint in ("positive", "exp") and not bool((value > 0).all()):
            hint = "leave positive: out of learn:"
            raise UnrollError("E421", f"{name} -> {ours}: numbers that the spec keeps positive are not", hint=hint)
        if p is not None and not bool(((value >= p.limits[0]) & (value <= p.limits[1])).all()):
            within = f"{p.limits[0]:g} to {p.limits[1]:g}"
            raise UnrollError("E421", f"{name} -> {ours}: numbers that the spec keeps from {within} are not", hint="leave bounds: out of learn:")  # fmt: skip
        if bool((filled[place] & (target[place] != value)).any()):
            first = next(theirs for theirs, to in self.loaded if to == ours)
            two = f"{first} and {name}" if first != name else f"two that are named {name}, but for a prefix,"
            where = self.spec.origin(*_path(self.spec, pattern, i)).where()
            raise SpecError("E421", f"{two} go to the same place of {ours}, and differ", where)
        target[place] = value
        filled[place] = True
        self.loaded.append((name, ours))

    def _refuse_other_constant(self, name: str, ours: str, theirs: torch.dtype, value: Tensor, own: Tensor) -> None:
        """Raises UnrollError E421 where a constant of the spec is another in the file, beyond the rounding of either."""
        off = (value - own).abs().max() if own.numel() else own.new_zeros(())
        eps = max(torch.finfo(t).eps for t in (theirs, own.dtype) if t.is_floating_point)
        if bool(off > 16 * eps * own.abs().max().clamp_min(1)):
            hint = "learn it, or give it to compile: parameters={..}"
            what = f"{name} is not the constant {ours} of the spec: off by {float(off):.1e}"
            raise UnrollError("E421", what, hint=hint)

    def _fitted(self, name: str, ours: str, tensor: Tensor, move: Move, target: Tensor) -> Tensor:
        """Theirs in the shape of ours."""
        found = tuple(tensor.shape)
        if len(slices(move.part)) <= tensor.ndim and tensor.is_complex() == target.is_complex():
            value = tensor[slices(move.part)]
            try:
                value = (
                    rearrange(value, move.axes, _sizes(self.net), target.shape, _said(self.net)) if move.axes else value
                )
            except UnrollError as e:
                raise UnrollError("E421", f"{name} -> {ours}: {e.message}", hint=e.hint or SIZES) from None
            if value.shape == target.shape:
                return value
            found = tuple(value.shape)
        kind = "complex " if tensor.is_complex() else ""
        as_ours = f", {found} as {ours} ({move.axes or move.part})" if found != tuple(tensor.shape) else ""
        message = f"{name} is {kind}{tuple(tensor.shape)}{as_ours}, but {ours} is {tuple(target.shape)}"
        laid_out = 'axes: says how theirs are laid out: "(k p) d -> k d p"'
        raise UnrollError("E421", message, hint=laid_out if tensor.numel() == target.numel() else SIZES)

    def prefix(self, unused: Sequence[str]) -> str:
        """What to write where names of theirs would fit without what they begin with."""
        for name in unused:
            for end in re.finditer(r"[./]", name):
                first, rest = name[: end.end()], name[end.end() :]
                if any(regex.fullmatch(rest) for regex, _, _ in self.moves):
                    return f"their names begin with '{first}': weights: {{strip: [{first}]}}"
        return ""

    def report(self, weights: Weights) -> Report:
        constants = constants_of(self.net)
        ignored = tuple(some for n, some in self.left.items() if _matches(n, weights.ignore))
        missing = [_lacking(n, f) for n, f in self.filled.items() if n not in constants and not f.all()]
        drawn = _drawn(self.net)
        drawn -= {ours for _, ours in self.compared}
        missing += [f"{n} (drawn from the seed: give it to compile)" for n in self.values if n in drawn]
        unused = tuple(some for some in self.left.values() if some not in ignored)
        compared = {ours for _, ours in self.compared}
        kept = tuple(n for n in self.values if n in constants - drawn and n not in compared)
        rest = tuple(self.compared), tuple(self.refused)
        return Report(tuple(self.loaded), ignored, unused, tuple(missing), kept, *rest)

    @torch.no_grad()
    def commit(self) -> None:
        state = self.net.state_dict(keep_vars=True)
        for name, value in self.values.items():
            if self.filled[name].any():
                state[name].copy_(_inside(self.net, name, value))
        for net in networks_of(self.net).values():
            net.built = net.built or all(map(finite, net.parameters()))


def _refuse_other_number(name: str, value: Tensor, number: float) -> None:
    if bool((value != number).any()):
        off = int((value != number).sum())
        what = f"{name} has {off:,} numbers that are not {number:g}, as the spec says of them"
        raise UnrollError("E421", what, hint="this network has no place for them")


def _place(part: tuple[slice, ...], value: Tensor) -> tuple[slice, ...]:
    """A part, where the tensor has its axes; all of it, where it has not."""
    return part if len(part) <= value.ndim else ()


def _lacking(name: str, filled: Tensor) -> str:
    if not filled.any():
        return name
    rows = [str(i) for i, row in enumerate(filled) if not row.all()]
    return f"{name} ({', '.join(rows[:8])}{' ..' if len(rows) > 8 else ''} of its first axis)"


def _path(spec: Spec, pattern: str, i: int) -> tuple[str | int, ...]:
    """Where the name of ours is written: `theirs: ours`, `theirs: {to: ours}`, or an entry of a list."""
    return ("weights", "names", pattern, i, "to")


def _target(spec: Spec, pattern: str, i: int, to: str, layer: str | None, values: Mapping[str, Tensor]) -> str:
    """The name of ours. Raises SpecError E421 if there is none."""
    ours = to.replace(LAYER, layer) if layer is not None else to
    if ours not in values:
        where = spec.origin(*_path(spec, pattern, i)).where()
        raise SpecError(
            "E421", f"'{quote(ours)}' is not a parameter of {spec.title}", where, did_you_mean(ours, values)
        )
    return ours


def _row(ours: str, to: str, places: Mapping[str, str], value: Tensor, name: str) -> tuple[int, ...]:
    """The part of ours that belongs to a layer, and to a member of a family."""
    found = list[int]()
    for kind in ("layer", "member"):
        if kind not in places or (kind == "layer" and LAYER in to):
            continue
        there, i = value.shape[len(found)] if len(found) < value.ndim else 0, int(places[kind])
        if i >= there:
            hint = f"unroll: {{layers: {i + 1}}}, or as many as the file has" if kind == "layer" else SIZES
            count = f"{there} {kind}s" if there else f"no {kind}s"
            raise UnrollError("E421", f"{name} is of {kind} {i} (from 0), but {ours} has {count}", hint=hint)
        found.append(i)
    return tuple(found)


def _factor(
    net: Net, pattern: str, i: int, move: Move, values: Mapping[str, Tensor], places: Mapping[str, str], like: Tensor
) -> Tensor | float:
    """What theirs are multiplied by: a number, or numbers of ours at the same layer and member. Raises SpecError E421."""
    if not isinstance(move.factor, str):
        return move.factor
    spec, _ = _weights(net)
    if move.factor not in values:
        where = spec.origin(*_path(spec, pattern, i)[:-1], "factor").where()
        message = f"'{quote(move.factor)}' is not a parameter of {spec.title}"
        raise SpecError("E421", message, where, did_you_mean(move.factor, values))
    found, p = values[move.factor], _learned(net, move.factor)
    if p is not None and p.per_layer and "layer" in places:
        found = found[int(places["layer"])]
    if p is not None and isinstance(p.symbol, Sym) and p.symbol.family is not None and "member" in places:
        found = found.select(int(p.per_layer and "layer" not in places), int(places["member"]))
    if found.ndim > like.ndim or any(a not in (1, b) for a, b in zip(found.shape, like.shape, strict=False)):
        where = spec.origin(*_path(spec, pattern, i)[:-1], "factor").where()
        message = f"the factor {move.factor} is {tuple(found.shape)}, and what it multiplies {tuple(like.shape)}"
        raise SpecError("E421", message, where, "{layer} and {member} pick its numbers")
    return found.reshape(*found.shape, *[1] * (like.ndim - found.ndim))


Place = tuple[str, str, tuple[int, ...], dict[str, str]]
"""Theirs, ours, the index of ours, and the numbers of layer and member."""


def _expanded(pattern: str, to: str, values: Mapping[str, Tensor], spec: Spec, i: int) -> Iterator[Place]:
    """One for every layer, and for every member."""
    for theirs, ours, at, places in _each_layer(pattern, to, values, spec, i):
        members = range(values[ours].shape[len(at)]) if MEMBER in theirs else ()
        yield from ((theirs.replace(MEMBER, str(k)), ours, (*at, k), {**places, "member": str(k)}) for k in members)
        if MEMBER not in theirs:
            yield theirs, ours, at, places


def _each_layer(pattern: str, to: str, values: Mapping[str, Tensor], spec: Spec, i: int) -> Iterator[Place]:
    if LAYER not in pattern:
        yield pattern, _target(spec, pattern, i, to, None, values), (), {}
    elif LAYER not in to:
        ours = _target(spec, pattern, i, to, None, values)
        each = range(values[ours].shape[0])
        yield from ((pattern.replace(LAYER, str(n)), ours, (n,), {"layer": str(n)}) for n in each)
    else:
        names = [(n, m["layer"]) for n in values if (m := _regex(to).fullmatch(n))]
        yield from ((pattern.replace(LAYER, n), ours, (), {"layer": n}) for ours, n in names)


# --- their side -------------------------------------------------------------------------------------------------------


@runtime_checkable
class _Array(Protocol):
    """What numpy can read: its own arrays, and those of other libraries."""

    def __array__(self) -> Any: ...


def read_file(path: Path) -> Mapping[str, Any]:
    """A file as a dict. Raises UnrollError E421."""
    try:
        match path.suffix:
            case ".safetensors":
                return load_file(path)
            case ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    return dict(arrays)
            case _:
                with torch.serialization.safe_globals([argparse.Namespace]):  # the settings of a training script
                    found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UnrollError("E421", f"cannot read '{quote(str(path))}': {e.strerror or e}") from None
    except Exception as e:
        raise UnrollError("E421", f"'{quote(str(path))}' holds no plain weights: {_reason(e)}", hint=UNREAD) from None
    if not isinstance(found, Mapping):
        raise UnrollError("E421", f"'{quote(str(path))}' holds a {type(found).__name__}, not weights by name")
    return cast("Mapping[str, Any]", found)


SIZES = "give the spec the sizes of the file, under dims: or model:"
UNREAD = (
    "read are .safetensors, .npz and files of torch.save; one that needs to run code is not: load it yourself, and give the "
    "dict of its tensors"
)


def _reason(e: Exception) -> str:
    """What torch or numpy say, without their advice to run the code."""
    text = str(e)
    if refused := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it names {refused[1]}"
    unpickled = re.search(r"WeightsUnpickler error: ([^\n]+)", text)
    return quote(unpickled[1] if unpickled else re.split(r"\n|\. ", text)[0], 100)


def _unwrapped(found: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """The weights within what a file holds, by name. Raises UnrollError E421 if they are not there."""
    inner = next((x for key in weights.key if (x := _inside_of(found, key)) is not None), found)
    if inner is found and weights.key and any(not isinstance(v, Tensor | _Array) for v in found.values()):
        wanted = " or ".join(f"'{key}'" for key in weights.key)
        raise UnrollError("E421", f"there is no {wanted} in the file", hint=_key(found), notes=(_holds(found),))
    return dict(_flat(inner)) if any("/" in name for name in weights.names) else dict(inner)


def _inside_of(found: Any, key: str) -> Mapping[str, Any] | None:
    for word in key.split("."):
        found = found.get(word) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _flat(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dicts as one, their names joined by /."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{before}{name}/")
        else:
            yield f"{before}{name}", value


def _tensor(name: str, value: Any, beside: Mapping[str, Any]) -> Tensor:
    """A value of a file as a tensor. Raises UnrollError E421."""
    match value:
        case Tensor():
            if value.layout != torch.strided:
                raise UnrollError("E421", f"{name} is a sparse tensor", hint="give it dense: .to_dense()")
            return value.detach()
        case _Array():
            array = np.asarray(value)
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which numpy does not know
                return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
            try:
                return torch.tensor(array)
            except TypeError:
                raise UnrollError("E421", f"{name} is an array of {array.dtype}, which torch does not know") from None
        case _:
            message = f"'{quote(str(name))}' is not a tensor"
            raise UnrollError("E421", message, hint=_key(beside), notes=(_holds(beside),))


def _converted(name: str, ours: str, value: Tensor, target: Tensor) -> Tensor:
    """Theirs in the type of ours: finite numbers, of any precision. Raises UnrollError E421."""
    if target.is_floating_point() and not (value.is_floating_point() or value.is_complex()):
        hint = "quantised weights are not read: give them as numbers"
        raise UnrollError("E421", f"{name} holds {value.dtype}, {ours} {target.dtype}", hint=hint)
    value = value.to(target)
    if not bool(value.isfinite().all()):
        bad = f"{int((~value.isfinite()).sum()):,} of {value.numel():,} numbers"
        raise UnrollError("E421", f"{name} -> {ours}: {bad} are not finite in {target.dtype}")
    return value


def _key(found: Mapping[str, Any]) -> str:
    """What to write where the weights are further in."""
    inner = [
        str(k)
        for k, v in found.items()
        if isinstance(v, Mapping) and any(isinstance(t, Tensor | _Array) for t in v.values())
    ]
    return f"weights: {{key: {inner[0]}}}" if inner else ""


def _holds(found: Mapping[str, Any]) -> str:
    names = [str(k) for k in found]
    return f"the file holds: {quote(', '.join(names[:8]), 200)}{', ..' if len(names) > 8 else ''}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _stripped(name: str, weights: Weights) -> str:
    while prefix := next((p for p in weights.strip if p and name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _regex(pattern: str) -> re.Pattern[str]:
    found = re.escape(pattern)
    for place in (LAYER, MEMBER):
        found = found.replace(re.escape(place), rf"(?P<{place[1:-1]}>0|[1-9]\d*)", 1)
    return re.compile(found)


# --- axes and parts ---------------------------------------------------------------------------------------------------


def slices(text: str) -> tuple[slice, ...]:
    """ "0:384, :" as an index."""
    ends = [part.split(":") for part in text.split(",")] if text else []
    return tuple(slice(int(a) if a.strip() else None, int(b) if b.strip() else None) for a, b in ends)


def _cut(name: str, value: Tensor, part: str) -> Tensor:
    """A part of a tensor. Raises UnrollError E421 if it names axes that are not there."""
    if len(slices(part)) > value.ndim:
        raise UnrollError("E421", f"into: '{part}' is of {len(slices(part))} axes, {name} has {value.ndim}")
    return value[slices(part)]


def rearrange(
    tensor: Tensor,
    pattern: str,
    sizes: Mapping[str, int],
    shape: Sequence[int] = (),
    said: Mapping[str, int] | None = None,
) -> Tensor:
    """Split, permute and join axes: "(k p) d -> k d p". 1 is an axis of one.

    sizes: of axes that shapes leave open.  shape: of the result, where it is known.  said: sizes that shapes may not
    contradict.  Raises UnrollError E421.
    """
    left, right = (_groups(side) for side in pattern.split("->"))
    names = [n for group in left for n in group]
    fixed = {n: size for n, size in (said or {}).items() if n in names}
    found = _lengths([(left, tensor.shape), *([(right, shape)] if len(shape) else [])], pattern, fixed)
    for n in names:
        if n not in found and n in sizes:
            found[n] = sizes[n]
    found |= _lengths([(left, tensor.shape)], pattern, found)
    open_ = [n for n in names if n not in found]
    if open_:
        raise UnrollError(
            "E421", f"the size of axis '{open_[0]}' in '{pattern}' is not known", hint="name it as a size of the spec"
        )
    order = [names.index(n) for group in right for n in group]
    split = tensor.reshape([found[n] for n in names]).permute(order)
    return split.reshape([math.prod(found[n] for n in group) for group in right])


def _groups(side: str) -> list[tuple[str, ...]]:
    found = [inner or single for inner, single in re.findall(r"\(([^)]*)\)|(\S+)", side)]
    return [tuple(n for n in group.split() if n != "1") for group in found]


def _lengths(
    sides: list[tuple[list[tuple[str, ...]], Sequence[int]]], pattern: str, known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Sizes of axes that follow from shapes: those alone, then those of which all others of their group are known."""
    found: dict[str, int] = dict(known or {})
    for groups, shape in sides:
        if len(groups) != len(shape):
            raise UnrollError("E421", f"'{pattern}' does not fit {tuple(shape)}")
    for _ in range(2):
        for group, size in ((g, n) for groups, shape in sides for g, n in zip(groups, shape, strict=True)):
            open_ = [n for n in group if n not in found]
            rest = math.prod(found.get(n, 1) for n in group)
            if len(open_) == 1 and rest and size % rest == 0:
                found[open_[0]] = size // rest
            elif not open_ and rest != size:
                raise UnrollError("E421", f"'{pattern}' does not fit: {' '.join(group) or '1'} is {size}, not {rest}")
    return found
