"""The weights of one network as the start of another: what is the same is taken, what has another size is resampled where a rule says how.

    transfer(net, source)    -> Taken: what was taken, changed, left, and not needed

What the axes of a tensor run over is known of the parts around the layers (`parts.Held.axes`); of layers, only their number may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from unroll.derivation.step import Learned
from unroll.errors import UnrollError, did_you_mean, quote
from unroll.model.module import Model
from unroll.model.parts import Axis, Cells, Channels, Grid, Held, Named, Row
from unroll.model.weights import Net, constants_of, listed, networks_of
from unroll.spec import Spec

PROBLEM = ("variables", "inputs", "minimize", "maximize", "constraints", "functions")
"""Sections of a spec that say what is minimised."""


@dataclass(frozen=True)
class Layers:
    """Sets of numbers, one for each layer."""

    count: int


@dataclass(frozen=True)
class Taken:
    """What became of every tensor. changed, left: with how, or why.

    taken: as it is.  changed: resampled, or a part of it.  left: ours, as they were.  unused: theirs.
    kept: our constants, which the spec says, and which are others there.
    """

    taken: tuple[str, ...] = ()
    changed: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        yield from listed("taken as it is", self.taken)
        yield from listed("taken, and changed", [f"{name}: {how}" for name, how in self.changed])
        yield from listed("left as it starts", [f"{name}: {why}" for name, why in self.left])
        yield from listed("there, and not needed", self.unused)
        yield from listed("kept from the spec, and other than there", self.kept)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        lists = {"taken": list(self.taken), "unused": list(self.unused), "kept": list(self.kept)}
        return {**lists, "changed": dict(self.changed), "left": dict(self.left)}

    def __str__(self) -> str:
        return "\n".join(self.lines())


class _Unfit(Exception):
    """No rule leads from their tensor to ours; the text says why."""


def transfer(
    net: Net,
    source: Net,
    *,
    leave: str | Sequence[str] = (),
    names: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Taken:
    """Give a network the weights of another one of the same objective, tensor by tensor by its name, in place.

    leave: parameters that stay as they are: names, what they begin with, or patterns with *.
    names: of their classes or words, and of ours; rows go by them. Without, equal numbers of them are taken to be the same.
    Other images: positions are interpolated (bicubic, antialiased, that of the class token apart).  Other patches: a map of
    patches is resampled so that it answers to resized patches as it did, and to grey pictures in any number of channels.
    Raises UnrollError E515 for another objective, a name to leave that is not there, or where nothing fits.
    """
    _refuse_other_objective(net, source)
    leave = (leave,) if isinstance(leave, str) else leave
    ours, constants = net.state_dict(), constants_of(net)
    for entry in leave:
        if not matching(entry, ours):
            raise UnrollError("E515", f"there is no parameter '{quote(entry)}' to leave", hint=near(entry, list(ours)))
    chosen = {name for entry in leave for name in matching(entry, ours)}
    moving = _Moving(net, source, names)
    values: dict[str, Tensor] = {}
    taken, changed, left, kept = list[str](), list[tuple[str, str]](), list[tuple[str, str]](), list[str]()
    for name, own in ours.items():
        if name in constants:
            kept += [name] if name in moving.theirs and _others(own, moving.theirs[name]) else []
        elif name in chosen:
            left.append((name, "as the spec says"))
        else:
            try:
                values[name], how = moving.take(name, own)
            except _Unfit as e:
                left.append((name, str(e)))
                continue
            if how:
                changed.append((name, how))
            else:
                taken.append(name)
    unused = tuple(n for n in moving.theirs if n not in ours)
    found = Taken(tuple(taken), tuple(changed), tuple(left), unused, tuple(kept))
    if not values:
        raise UnrollError("E515", "nothing of it fits this network", hint=SAME, notes=tuple(found.lines()))
    _commit(net, values)
    return found


SAME = "start from a network whose layers have the same sizes and learn the same things"


@torch.no_grad()
def _commit(net: Net, values: Mapping[str, Tensor]) -> None:
    state = net.state_dict(keep_vars=True)
    for name, value in values.items():
        state[name].copy_(value)


def _others(own: Tensor, their: Tensor) -> bool:
    """Is a constant another one, beyond the rounding of either?"""
    if own.shape != their.shape or not own.is_floating_point():
        return False
    eps = max(torch.finfo(own.dtype).eps, torch.finfo(their.dtype).eps)
    return bool((own - their.to(own)).abs().max() > 16 * eps * own.abs().max().clamp_min(1)) if own.numel() else False


def _refuse_other_objective(net: Net, source: Net) -> None:
    ours, theirs = (cast("Spec | None", n.spec) for n in (net, source))
    if ours is None or theirs is None:
        raise UnrollError("E515", "a network without a spec is no start, and cannot have one", hint="load_state_dict")
    for section in PROBLEM:
        if getattr(ours, section) != getattr(theirs, section):
            message = f"{theirs.title} is of another objective than {ours.title}: {section} differ"
            hint = "weights that mean the same can be given as a file, with names for them under weights:"
            raise UnrollError("E515", message, hint=hint)


def matching(entry: str, names: Iterable[str]) -> list[str]:
    """The names that an entry means: it is one, or what they begin with, or a pattern with *."""
    return [n for n in names if n == entry or n.startswith(f"{entry}.") or fnmatchcase(n, entry)]


def near(entry: str, names: Sequence[str]) -> str:
    """A hint for an entry that means none of them."""
    parts = list(dict.fromkeys(n.split(".")[0] for n in names))
    return did_you_mean(entry, [*names, *parts]) or f"there are {', '.join(parts)}"


# --- one tensor -------------------------------------------------------------------------------------------------------


@dataclass
class _Moving:
    """Their tensors, and what the axes of both sides run over."""

    net: Net
    source: Net
    names: tuple[Sequence[str], Sequence[str]]
    theirs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.theirs = {n: t.detach().cpu() for n, t in self.source.state_dict().items()}
        self.axes = (axes_of(self.source), axes_of(self.net))
        self.learned = (_learned(self.source), _learned(self.net))
        self.folded, self.merged = set[str](), set[str]()
        for name, item in self.learned[0].items():
            if item.held:
                self._merge(name)
        for h in _held(self.source):
            weight = f"{h.name}.weight"
            if h.before and weight in self.axes[1] and self.axes[0][weight] != self.axes[1][weight]:
                self._fold(h.name, h.before)

    def _merge(self, name: str) -> None:
        """W + W_up @ W_down in the place of W, where our network has no change of that rank beside it."""
        up, down = f"{name}_up", f"{name}_down"
        if all(self.learned[1].get(n) is not None and not _unlike(*(of[n] for of in self.learned)) for n in (up, down)):
            return
        w = self.theirs[name]
        left = self.theirs[up].reshape(*w.shape[:-1], -1)
        self.theirs[name] = w + left @ self.theirs[down].reshape(*w.shape[:-2], -1, w.shape[-1])
        self.merged.add(name)

    def _fold(self, norm: str, after: str) -> None:
        """W (g x + b) + c = (W diag g) x + (W b + c): the norm is then the same for every number of a patch."""
        g, b = (self.theirs[f"{norm}.{k}"] for k in ("weight", "bias"))
        w = self.theirs[f"{after}.weight"]
        self.theirs[f"{after}.bias"] = self.theirs[f"{after}.bias"] + w @ b
        self.theirs[f"{after}.weight"] = w * g
        self.folded |= {f"{norm}.weight", f"{norm}.bias"}

    def take(self, name: str, own: Tensor) -> tuple[Tensor, str]:
        """Our value of a tensor, and how it was changed, "" if it was not. Raises _Unfit."""
        if name not in self.theirs:
            raise _Unfit("there is none there")
        if name in self.folded:
            return torch.full_like(own, float(name.endswith(".weight"))), "worked into the map of patches"
        if reason := _unlike(*(learned.get(name) for learned in self.learned)):
            raise _Unfit(reason)
        value, here = self.theirs[name], own.detach().cpu()
        theirs, ours = (axes.get(name, (None,) * t.ndim) for axes, t in zip(self.axes, (value, here), strict=True))
        if len(theirs) != len(ours):
            raise _Unfit(f"{_shape(value)} there, {_shape(here)} here")
        hows = ["with its change of low rank"] if name in self.merged else []
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            if type(a) is not type(b) or (b is None and value.shape[i] != here.shape[i]):
                raise _Unfit(f"{_shape(value)} there, {_shape(here)} here")
            like = here.movedim(i, 0) if value.movedim(i, 0).shape[1:] == here.movedim(i, 0).shape[1:] else None
            moved, how = along(value.movedim(i, 0), a, b, like, self.names)
            value = moved.movedim(0, i)
            hows += [how] if how else []
        return value.to(own), "; ".join(hows)


def _unlike(theirs: Learned | None, ours: Learned | None) -> str:
    """Why numbers of layers are not to be compared, "" where they are."""
    if theirs is None or ours is None:
        return ""
    if theirs.text != ours.text:
        return f"there it stands for {theirs.text}, here for {ours.text}"
    if (theirs.constraint, theirs.limits) != (ours.constraint, ours.limits):
        return "it is kept within other bounds there"
    return ""


def _shape(t: Tensor) -> str:
    return " x ".join(map(str, t.shape)) or "a number"


def _held(net: Net) -> tuple[Held, ...]:
    return net.wrapped.held if isinstance(net, Model) else ()


def axes_of(net: Net) -> dict[str, tuple[Axis | Layers, ...]]:
    """What the axes of tensors run over, where that is more than a size of the layers."""
    found: dict[str, tuple[Axis | Layers, ...]] = {}
    there = dict(net.named_parameters())
    for h in _held(net):
        for inner, axes in h.axes.items():
            name = f"{h.name}.{inner}" if inner else h.name
            now = there.get(name)  # a head that was put there by hand may have other classes than the spec
            found[name] = tuple(
                Named(now.shape[i]) if isinstance(a, Named) and now is not None else a for i, a in enumerate(axes)
            )
    for prefix, inner in networks_of(net).items():
        for (name, p), item in zip(inner.named_parameters(), inner.learned, strict=True):
            if item.per_layer:
                found[prefix + name] = (Layers(len(p)), *[None] * (p.ndim - 1))
    return found


def _learned(net: Net) -> dict[str, Learned]:
    """Names of parameters of the layers -> what is known of them."""
    return {
        prefix + name: item
        for prefix, inner in networks_of(net).items()
        for (name, _), item in zip(inner.named_parameters(), inner.learned, strict=True)
    }


# --- along one axis ---------------------------------------------------------------------------------------------------


def along(
    x: Tensor,
    theirs: Axis | Layers,
    ours: Axis | Layers,
    own: Tensor | None = None,
    names: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> tuple[Tensor, str]:
    """x, (n, ...), with its first axis as ours, (m, ...), and how, "" where nothing changed.

    own: what stands in rows that theirs say nothing of.  Raises _Unfit where no rule is known.
    """
    match theirs, ours:
        case (Named(n), Named(m)):
            return _by_name(x, (n, m), own, names)
        case _ if theirs == ours:
            return x, ""
        case (Grid(), Grid()):
            return _over_grid(x, theirs, ours)
        case (Row(n, first), Row(m, other)) if first == other:
            shift = int(first)
            return _rows(x, range(min(n, m) + shift), range(min(n, m) + shift), m + shift, own, "places")
        case (Layers(n), Layers(m)):
            return _rows(x, range(min(n, m)), range(min(n, m)), m, own, "layers")
        case (Cells(), Cells()):
            same = (theirs.channels, theirs.side) == (ours.channels, ours.side)
            how = "in another order" if same else f"resampled from {_cells(theirs)} to {_cells(ours)}"
            return torch.tensordot(_between(theirs, ours), x.double(), 1).to(x), how
        case (Channels(n), Channels(m)):
            return torch.tensordot(_channels(n, m, False), x.double(), 1).to(x), f"from {n} channels to {m}"
        case _:
            raise _Unfit("no rule leads from one to the other")


def _cells(c: Cells) -> str:
    return f"{c.channels} x {c.side} x {c.side}"


def _rows(
    x: Tensor, those: Sequence[int], to: Sequence[int], count: int, own: Tensor | None, what: str
) -> tuple[Tensor, str]:
    """Some rows of theirs in the place of some of ours."""
    if own is None:
        raise _Unfit(f"other {what}, and another size beside")
    out = own.to(x).clone()
    out[list(to)] = x[list(those)]
    return out, f"{len(those)} of {len(x)} {what} taken, {count - len(to)} of ours left"


def _by_name(
    x: Tensor, counts: tuple[int, int], own: Tensor | None, names: tuple[Sequence[str], Sequence[str]]
) -> tuple[Tensor, str]:
    """Rows of classes or words: by their names where both sides have them, else where they are as many."""
    known = tuple(map(len, names)) == counts
    if (known and list(names[0]) == list(names[1])) or (not known and counts[0] == counts[1]):
        return x, ""
    if not known:
        raise _Unfit(f"{counts[0]:,} classes or words there, {counts[1]:,} here")
    at = {word: i for i, word in enumerate(names[0])}
    pairs = [(at[word], i) for i, word in enumerate(names[1]) if word in at]
    if not pairs:
        raise _Unfit("it is of other classes or words")
    return _rows(x, [i for i, _ in pairs], [j for _, j in pairs], counts[1], own, "classes or words")


def _over_grid(x: Tensor, theirs: Grid, ours: Grid) -> tuple[Tensor, str]:
    """Positions of an image of another size: bicubic, antialiased; that of the class token is no place of it.

    Source: Touvron et al. 2021 (DeiT), arXiv:2012.12877, section 6, and its released script.
    """
    first, said = x[: int(ours.first)], ""
    if ours.first and not theirs.first:
        first, said = x.new_zeros(1, *x.shape[1:]), ", that of the class token 0"
    places = x[int(theirs.first) :].unflatten(0, (theirs.rows, theirs.columns))
    where = f"{theirs.rows} x {theirs.columns} places to {ours.rows} x {ours.columns}"
    if (theirs.rows, theirs.columns) == (ours.rows, ours.columns):
        return torch.cat([first, places.flatten(0, 1)]), f"the same places{said}"
    moved = resized(places.movedim(-1, 0), ours.rows, ours.columns).movedim(0, -1)
    return torch.cat([first, moved.flatten(0, 1)]), f"interpolated from {where}{said}"


def resized(pictures: Tensor, rows: int, columns: int) -> Tensor:
    """(n, rows, columns) pictures of another size: bicubic, antialiased. Worked out in float64."""
    found = F.interpolate(
        pictures.double().unsqueeze(0), (rows, columns), mode="bicubic", antialias=True, align_corners=False
    )
    return found[0].to(pictures)


@cache
def _resize(side: int, to: int) -> Tensor:
    """The matrix (to^2, side^2) that resizes square patches."""
    return (
        resized(torch.eye(side**2, dtype=torch.float64).unflatten(1, (side, side)), to, to).flatten(1).mT.contiguous()
    )


def _channels(n: int, m: int, made: bool) -> Tensor:
    """(m, n): what a map of n channels is for m, so that it answers to grey pictures as it did. Raises _Unfit."""
    if n != m and 1 not in (n, m):
        raise _Unfit(f"{n} channels there, {m} here: only between one and several is there a rule")
    if n == m:
        return torch.eye(n, dtype=torch.float64)
    return torch.full((m, n), 1 / n if made else 1 / m, dtype=torch.float64)


def _between(theirs: Cells, ours: Cells) -> Tensor:
    """(P', P): what is made is resized by B; what reads patches so that <w', B x> is <w, x>, or as near as it can be: w' = pinv(B)' w.

    Source: Beyer et al. 2023, FlexiViT, arXiv:2212.08013, section 3.4.
    """
    b = _resize(theirs.side, ours.side)
    resize = b if ours.made else torch.linalg.pinv(b).mT.contiguous()
    whole = torch.kron(_channels(theirs.channels, ours.channels, ours.made), resize)
    return whole[_order(ours)][:, _order(theirs)]


def _order(c: Cells) -> Tensor:
    """Of the numbers of a patch as they are stored, their places in (channel, row, column)."""
    places = torch.arange(c.channels * c.side**2).view(c.channels, c.side, c.side)
    match c.order:
        case "channels_first":
            return places.flatten()
        case _:
            return places.permute(1, 2, 0).flatten()
