"""What stands around the layers, in words: the section that `unroll show` prints after the derivation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from unroll.language.columns import counted
from unroll.model import parts
from unroll.spec import Spec
from unroll.spec.schema import (
    ClassAttentionHead,
    Decoder,
    FourierPositions,
    LearnedPositions,
    LinearEmbed,
    Model,
    NoEmbed,
    NoPositions,
    PatchEmbed,
    PooledHead,
    SinusoidalPositions,
    StemEmbed,
    TiedHead,
    TokenEmbed,
)

NORMS = {"both": "norm, linear, norm", "before": "norm, linear", "after": "linear, norm", "none": "linear"}
INITS = {
    "torch": "uniform within 1/sqrt(inputs)",
    "xavier": "Glorot-uniform, biases 0",
    "kaiming": "He-uniform, biases 0",
    "normal": "normal with standard deviation 0.02, biases 0",
}


def describe(spec: Spec) -> list[str]:
    """Lines to print; none for a spec without a model."""
    if spec.model is None:
        return []
    model = spec.model
    own = model.embed.init if isinstance(model.embed, PatchEmbed) else None
    starts = f"start {INITS[model.init]}" + (f"; that of patches {INITS[own]}" if own else "")
    rows = [("", ""), *_rows(spec, model), ("linear maps", starts)]
    return [f"{head:15}   {body}".rstrip() for head, body in rows]


def _rows(spec: Spec, model: Model) -> Iterator[tuple[str, str]]:
    yield "model", _embed(model)
    if model.mask is not None:
        yield "", f"mask: a free token in the place of {model.mask.ratio:.0%} of the patches, before the layers"
    if model.class_token is not None:
        yield "", f"class token before the others, starts with standard deviation {model.class_token.std:g}"
    yield from (("", line) for line in _positions(model))
    if model.dropout:
        yield "", f"dropout {model.dropout:g}"
    depth = f"{counted(spec.unroll.layers, 'layer')}, as above" if spec.unroll else "layers"
    yield "", depth
    if model.decoder is not None:
        yield from (("", line) for line in _decoder(spec, model, model.decoder))
    else:
        yield "", _head(model)


def _embed(model: Model) -> str:
    match model.embed:
        case PatchEmbed(image=image, patch=p, order=order, norm=norm):
            shape = " × ".join(map(str, image))
            inside = "row, column, channel" if order == "channels_last" else "channel, row, column"
            return f"image {shape} in {parts.tokens(model)} patches of {p} × {p} ({inside}): {NORMS[norm]}"
        case StemEmbed(image=image, patch=p):
            shape = " × ".join(map(str, image))
            return f"image {shape}: {p.bit_length() - 1} convolutions of stride 2, {parts.tokens(model)} tokens"
        case TokenEmbed(vocabulary=n, length=length):
            return f"text of {length} tokens at most: a table of {n} rows"
        case LinearEmbed(features=n):
            return f"vectors of {n}: linear"
        case NoEmbed():
            return "what the layers take comes in"
        case _ as never:
            assert_never(never)


def _positions(model: Model) -> Iterator[str]:
    match model.positions:
        case None | NoPositions():
            return
        case LearnedPositions(std=std, class_token=own):
            which = ", of the class token too" if own and model.class_token is not None else ""
            yield f"positions: learned{which}, start with standard deviation {std:g}"
        case SinusoidalPositions(base=base):
            yield f"positions: sines and cosines, base {base:g}"
        case FourierPositions(waves=waves, base=base):
            yield f"positions: linear map of {waves} waves for row and column each, base {base:g}"
        case _ as never:
            assert_never(never)


def _head(model: Model) -> str:
    match model.head:
        case None:
            return "no head: tokens as they leave the layers"
        case TiedHead(norm=norm):
            return f"head: {'norm, ' if norm else ''}products with the table of tokens, for each token"
        case ClassAttentionHead(blocks=blocks, heads=heads, classes=n):
            return f"head: a class token reads the others, {blocks} blocks of {heads} heads; norm, linear to {n}"
        case PooledHead(kind=kind, classes=classes, norm=norm):
            what = {"class_token": "the class token", "mean": "the mean of the tokens", "tokens": "each token"}[kind]
            steps = [*(["norm"] if norm else []), *([f"linear to {classes}"] if classes is not None else [])]
            return f"head: {', '.join([what, *steps])}"
        case _ as never:
            assert_never(never)


def _decoder(spec: Spec, model: Model, decoder: Decoder) -> Iterator[str]:
    between = [*(["norm"] if decoder.norm_before else []), *(["linear"] if decoder.embed else [])]
    if between:
        yield ", ".join(between)
    assert spec.decoder is not None and spec.decoder.unroll is not None
    yield f"decoder: {counted(spec.decoder.unroll.layers, 'layer')} of {spec.decoder.title}"
    yield f"{'norm, ' if decoder.norm else ''}linear to the {parts.pixels(model)} numbers of each patch"
