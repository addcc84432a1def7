"""Looking inside: where a layer looks, what it cuts out of an image, the directions of its tokens, the atoms of its code.

What is found is found by what a layer computes, never by what a network is called: a softmax over tokens in its text, the tokens that
its blocks leave, the grid that a model cuts an image into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from unroll.errors import UnrollError
from unroll.model import parts
from unroll.model.generation import at_rest
from unroll.model.module import Model
from unroll.model.whitebox import Batch, traced
from unroll.network.network import Network
from unroll.network.trace import Trace
from unroll.spec.schema import PatchEmbed, StemEmbed

# --- where it looks ---------------------------------------------------------------------------------------------------


def attention_maps(net: Network | Model, batch: Batch, *, layer: int = -1, block: str | None = None) -> Tensor:
    """The softmax over tokens of one layer: (..., heads, rows, columns), row i says how much token i takes from each, and sums to 1.

    batch: as `white_box` takes one.  layer: from 1, or from the last: -1.  block: where several parts of a layer have one.
    It costs a forward pass and this softmax, in the network's own precision; dropout is off, no patch is hidden.
    Raises UnrollError E404: no such layer or block, none in it, or several.
    """
    found = [m for m in _trace(net, batch).maps_of(layer) if m.over == "tokens" and block in (None, m.block)]
    if len(found) != 1:
        where = f"layer {layer}" + (f", block {block}" if block is not None else "")
        several = ", ".join(dict.fromkeys(m.block for m in found))
        said = f"has {len(found)} softmaxes over tokens, in {several}" if found else "has no softmax over tokens"
        hint = "block= names one of several; net.trace(x).maps_of(layer) has all that there are"
        raise UnrollError("E404", f"{where} {said}", hint=hint)
    return found[0].weights


def _trace(net: Network | Model, batch: Batch) -> Trace:
    with at_rest(net):
        if isinstance(net, Model) and net.wrapped.model.mask is not None:
            x = (
                batch
                if isinstance(batch, Tensor)
                else next(iter(batch.values() if isinstance(batch, Mapping) else batch))
            )
            return net.trace(x, torch.zeros(len(x), cast(int, net.wrapped.tokens), dtype=torch.bool, device=x.device))
        return traced(net, batch)


def grid(net: Network | Model) -> tuple[int, int] | None:
    """Rows and columns of the patches of an image behind a class token, if that is what the tokens are."""
    if not isinstance(net, Model) or net.wrapped.model.class_token is None:
        return None
    found = parts.places(net.wrapped.model)
    return found if isinstance(found, tuple) else None


# --- what it cuts out -------------------------------------------------------------------------------------------------


def segment(
    net: Network | Model, images: Tensor, *, layer: int = -1, block: str | None = None, share: float = 0.6
) -> Tensor:
    """(B, C, H, W) -> (B, heads, H, W), True at the fewest patches that have this share of what the class token takes from all patches.

    layer, block: as `attention_maps` takes them.  Raises UnrollError E404, also for what has no class token before the patches of an image.
    Source: Caron et al. 2021, arXiv:2104.14294 (share 0.6); of CRATE Yu et al. 2023, arXiv:2308.16271.
    """
    if not 0 < share <= 1:
        raise UnrollError("E404", f"share is {share!r}: a part of the whole, above 0 and at most 1")
    rows, columns = _patches(net)
    looks = attention_maps(net, images, layer=layer, block=block)[..., 0, 1:]
    return enlarged(net, heaviest(looks, share).unflatten(-1, (rows, columns)))


def heaviest(mass: Tensor, share: float) -> Tensor:
    """(..., N) -> the fewest entries that together have this share of the sum, the earlier of equal ones; none where all are 0."""
    ordered, at = mass.double().sort(dim=-1, descending=True, stable=True)
    upto = ordered.cumsum(-1)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, at, upto - ordered < share * upto[..., -1:])


def enlarged(net: Network | Model, marks: Tensor) -> Tensor:
    """(..., rows, columns) of patches -> (..., H, W) of pixels."""
    patch = cast("PatchEmbed | StemEmbed", cast(Model, net).wrapped.model.embed).patch
    return marks.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def _patches(net: Network | Model) -> tuple[int, int]:
    found = grid(net)
    if found is None:
        hint = "model: {embed: {kind: patches, ..}, class_token: {..}}"
        raise UnrollError("E404", "these tokens are no patches of an image behind a class token", hint=hint)
    return found


def jaccard(mask: Tensor, truth: Tensor) -> Tensor:
    """Of two sets of pixels, how many are in both of those in either: (..., H, W) of both -> (...); 1 where both are empty.

    mask may have heads where truth has none: (B, heads, H, W) and (B, H, W) -> (B, heads). What is not 0 is in a set.
    Raises UnrollError E404 where sizes differ.
    """
    a, b = mask != 0, truth != 0
    if a.ndim == b.ndim + 1:
        b = b.unsqueeze(-3)
    fits = 2 <= a.ndim == b.ndim and all(n in (1, m) for m, n in zip(a.shape, b.shape, strict=True))
    if not fits or a.shape[-2:] != b.shape[-2:] or a.shape[:-3] != b.shape[:-3]:
        raise UnrollError("E404", f"a mask {tuple(mask.shape)} does not lie on {tuple(truth.shape)}")
    both, either = (marks.sum((-2, -1)) for marks in (a & b, a | b))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


# --- the directions of its tokens -------------------------------------------------------------------------------------


def components(
    net: Network | Model, batch: Batch, *, layer: int = -1, block: str | None = None, count: int = 3
) -> Tensor:
    """The principal components of one layer's tokens, those of all samples together: (..., N, count), of an image (B, rows, columns, count).

    A class token is left out. The largest entry of each direction is positive.  layer, block: what is looked at is what the layer, or
    that block of it, left.  Raises UnrollError E404.
    """
    x = tokens(net, batch, layer=layer, block=block)
    flat = x.reshape(-1, x.shape[-1])
    if not len(flat):
        raise UnrollError("E404", "there is no sample to look at")
    if type(count) is not int or not 1 <= count <= min(flat.shape):
        raise UnrollError(
            "E404", f"count is {count!r}: there are 1 to {min(flat.shape)} components of {len(flat)} tokens"
        )
    centred = flat - flat.mean(0)
    wide = centred.to(torch.promote_types(centred.dtype, torch.float32))  # of less there is no decomposition
    directions = torch.linalg.svd(wide, full_matrices=False).Vh[:count].mT.to(centred.dtype)
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    found = (centred @ directions).reshape(*x.shape[:-1], count)
    return found if (of := grid(net)) is None else found.unflatten(-2, of)


def tokens(net: Network | Model, batch: Batch, *, layer: int = -1, block: str | None = None) -> Tensor:
    """What a layer, or a block of it, left: (..., N, d), of vectors (..., n); without a class token. Raises UnrollError E404."""
    trace = _trace(net, batch)
    at = trace.step_of(layer, block)
    if len(trace.steps) > 1:
        hint = "net.trace(x).steps has all of them"
        raise UnrollError("E404", f"the layers have several variables: {', '.join(trace.steps)}", hint=hint)
    (steps,) = trace.steps.values()
    own = isinstance(net, Model) and net.wrapped.model.class_token is not None
    return steps[at][..., 1:, :] if own else steps[at]


# --- the atoms of its code --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Atoms:
    """The most active entries of a code, the most active first, and the tokens that excite each of them the most.

    entries: (count,) numbers of rows of the code, from 0.  activity: (count,) mean magnitudes.  shares: (count,) of tokens in which the entry is not 0.
    values: (count, excited) the entries there.  places: (count, excited, axes) where: sample and token, or sample alone.
    """

    entries: Tensor
    activity: Tensor
    shares: Tensor
    values: Tensor
    places: Tensor

    def rows(self) -> list[tuple[str, ...]]:
        """As text, under HEAD."""
        return [
            (str(int(i)), f"{float(a):.3g}", f"{100 * float(s):.1f} %", ", ".join(_place(p, v) for p, v in zip(places, values, strict=True)))
            for i, a, s, places, values in zip(self.entries, self.activity, self.shares, self.places, self.values, strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        grid = [HEAD, *self.rows()]
        wide = [max(len(r[i]) for r in grid) for i in range(len(HEAD))]
        return "\n".join("   ".join(c.ljust(w) for c, w in zip(r, wide, strict=True)).rstrip() for r in grid)


HEAD = ("atom", "mean", "not zero", "most in (sample, token)")


def _place(place: Tensor, value: Tensor) -> str:
    return f"{':'.join(str(int(i)) for i in place)} {float(value):+.3g}"


def active_atoms(
    net: Network | Model, batch: Batch, *, layer: int = -1, block: str | None = None, count: int = 8, excited: int = 8
) -> Atoms:
    """The entries of the code that a layer left which are largest on average, and the tokens in which each is largest.

    layer, block: as `components` takes them.  count, excited: how many entries, and how many tokens of each; no more than there are.
    Raises UnrollError E404.
    """
    for name, n in (("count", count), ("excited", excited)):
        if type(n) is not int or n < 1:
            raise UnrollError("E404", f"{name} is {n!r}: a number from 1")
    z = tokens(net, batch, layer=layer, block=block)
    flat = z.reshape(-1, z.shape[-1])
    if not len(flat):
        raise UnrollError("E404", "there is no sample to look at")
    size = flat.abs()
    activity, entries = size.mean(0).sort(dim=0, descending=True, stable=True)
    entries = entries[:count]
    at = size[:, entries].sort(dim=0, descending=True, stable=True).indices[:excited].mT
    places = torch.stack(torch.unravel_index(at, _leading(z.shape)), -1)
    shares = (flat[:, entries] != 0).to(flat.dtype).mean(0)
    return Atoms(entries, activity[: len(entries)], shares, flat[at, entries[:, None]], places)


def _leading(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:-1]) or (1,)
