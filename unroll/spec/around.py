"""What the parts of `model:` ask of each other: contradictions that no single field can know."""

from __future__ import annotations

from collections.abc import Iterator

from unroll.errors import SpecError
from unroll.spec.nodes import Entries, key_origin
from unroll.spec.schema import (
    ClassAttentionHead,
    ClassToken,
    Document,
    FourierPositions,
    LinearEmbed,
    Model,
    NoEmbed,
    NoPositions,
    PatchEmbed,
    PooledHead,
    StemEmbed,
    TiedHead,
    TokenEmbed,
)

Found = Iterator[tuple[tuple[str, ...], str, str]]
"""Keys below `model`, what is wrong, a hint."""


def contradictions(spec: Document, root: Entries) -> Iterator[SpecError]:
    """E220 for every part of `model:` that does not go with another."""
    if spec.model is None:
        return
    if spec.unroll is None:
        here = key_origin(root, ("model",)).where()
        yield SpecError("E220", "model: stands around layers, and there are none", here, "add  unroll: ..")
    for path, message, hint in (*_embed(spec.model), *_tokens(spec.model), *_answer(spec.model)):
        yield SpecError("E220", message, key_origin(root, ("model", *path)).where(), hint)


def _embed(model: Model) -> Found:
    match model.embed:
        case PatchEmbed(image=(_, height, width), patch=p) | StemEmbed(image=(_, height, width), patch=p):
            if height % p or width % p:
                hint = "height and width are multiples of patch"
                yield ("embed", "patch"), f"{height} x {width} pixels do not divide into patches of {p} x {p}", hint
            if isinstance(model.embed, StemEmbed) and (p < 2 or p & (p - 1)):
                hint = "each convolution halves height and width"
                yield ("embed", "patch"), f"the patch of a stem is a power of 2, not {p}", hint
        case _:
            pass


def _tokens(model: Model) -> Found:
    """What is added to tokens, or takes their place."""
    image = isinstance(model.embed, PatchEmbed | StemEmbed)
    match model.positions:
        case None | NoPositions():
            pass
        case FourierPositions() if not image:
            yield ("positions",), "fourier positions are rows and columns of an image", "learned or sinusoidal"
        case positions if isinstance(model.embed, LinearEmbed | NoEmbed):
            hint = "leave positions out"
            yield ("positions",), f"{positions.kind} positions need places: of an image or a text", hint
        case _:
            pass
    if model.mask is not None and not image:
        yield ("mask",), "mask: is for patches of an image", "leave it out"
    if model.mask is not None and model.decoder is None:
        yield ("mask",), "mask: hides patches, and no decoder finds them", "add  decoder: {layers: ..}"


def _answer(model: Model) -> Found:
    match model.head:
        case PooledHead(kind="class_token") if not isinstance(model.class_token, ClassToken):
            yield ("head", "kind"), "there is no class token to read", "add  class_token: {std: 0.02}"
        case ClassAttentionHead() if model.class_token is not None:
            hint = "leave class_token out"
            yield ("class_token",), "the class token of this head comes after the layers, not before", hint
        case TiedHead() if not isinstance(model.embed, TokenEmbed):
            yield ("head", "kind"), "a tied head needs a table of tokens", "embed: {kind: tokens, ..}"
        case _:
            pass
    if model.decoder is None:
        return
    if model.head is not None:
        yield ("head",), "a model ends in a head or in a decoder", "leave one of them out"
    if model.mask is None:
        yield ("decoder",), "a decoder finds patches that a mask hides", "add  mask: {ratio: 0.75}"
    if "model" in model.decoder.layers:
        yield ("decoder", "layers", "model"), "the layers of a decoder have nothing around them", "leave it out"
