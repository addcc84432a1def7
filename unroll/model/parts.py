"""Each part of `model:` as lines of torch: what it holds, how that starts, what it does to x.

Shapes: B samples, N tokens (1 more with a class token), d numbers each, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import assert_never

from unroll.spec import schema
from unroll.spec.schema import (
    ClassAttentionHead,
    Decoder,
    FourierPositions,
    LearnedPositions,
    LinearEmbed,
    NoEmbed,
    NoPositions,
    PatchEmbed,
    PooledHead,
    SinusoidalPositions,
    StemEmbed,
    TiedHead,
    TokenEmbed,
)

CELLS = {"channels_last": "0, 2, 4, 3, 5, 1", "channels_first": "0, 2, 4, 1, 3, 5"}
"""(B, C, rows, p, columns, p) -> (B, rows, columns, numbers of a patch)"""
CUT = "[start : start + x.shape[1]]"
"""The positions of tokens that follow `start` others."""


# --- what an axis of a tensor runs over -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Places of an image, row by row. first: after that of the class token."""

    rows: int
    columns: int
    first: bool


@dataclass(frozen=True)
class Row:
    """Places of a text. first: after that of the class token."""

    count: int
    first: bool


@dataclass(frozen=True)
class Cells:
    """The numbers of a patch. made: they are made, not read."""

    channels: int
    side: int
    order: str
    made: bool = False


@dataclass(frozen=True)
class Channels:
    """Those of an image that a convolution reads."""

    count: int


@dataclass(frozen=True)
class Named:
    """One for each of what has names: classes, or words."""

    count: int


Axis = Grid | Row | Cells | Channels | Named | None
"""None: an axis that is as the layers are."""
Axes = Mapping[str, tuple[Axis, ...]]
"""Name of a tensor within an attribute ("" where it is one itself) -> its axes."""


@dataclass(frozen=True)
class Held:
    """One attribute: its name, the torch code that makes it, what it is.

    start: how it is drawn: "linear", "norm" (torch's own reset), a standard deviation, or code of a fixed value.
    axes: of tensors whose size is the model's.  before: the linear map that reads what this norm gives.
    says: the key of `model:` that says how many rows it has, or whether it is there.
    """

    name: str
    code: str
    about: str
    start: str | float
    axes: Axes = field(default_factory=dict[str, "tuple[Axis, ...]"])
    before: str = ""
    says: str = ""

    @property
    def kind(self) -> str:
        """What an optimizer wants to know: a matrix, a table of tokens, or numbers such as those of a norm."""
        return "matrix" if self.start == "linear" else "table" if isinstance(self.start, float) else "scalar"


@dataclass(frozen=True)
class Part:
    """held: attributes.  lines: of the method that uses them.  methods: whole ones.  needs: functions of the module."""

    held: tuple[Held, ...] = ()
    lines: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __add__(self, other: Part) -> Part:
        lines, methods = (*self.lines, *other.lines), (*self.methods, *other.methods)
        return Part((*self.held, *other.held), lines, methods, (*self.needs, *other.needs))


def norm(name: str, width: int, eps: float, about: str, over: Axis = None, before: str = "") -> Held:
    axes: Axes = {} if over is None else {"weight": (over,), "bias": (over,)}
    return Held(name, f"nn.LayerNorm({width}{'' if eps == 1e-5 else f', eps={eps:g}'})", about, "norm", axes, before)


def linear(
    name: str, ins: int, outs: int, about: str, bias: bool = True, reads: Axis = None, gives: Axis = None
) -> Held:
    axes: Axes = {"weight": (gives, reads), "bias": (gives,)}
    return Held(name, f"nn.Linear({ins}, {outs}{'' if bias else ', bias=False'})", about, "linear", axes)


def vector(name: str, shape: str, about: str, std: float, axes: tuple[Axis, ...] = ()) -> Held:
    code, start = f"nn.Parameter(torch.empty({shape}))", f"{about}; starts with standard deviation {std:g}"
    return Held(name, code, start, std, {"": axes} if axes else {})


# --- how many, how wide -----------------------------------------------------------------------------------------------


def places(model: schema.Model) -> tuple[int, int] | int | None:
    """Rows and columns of patches, the longest text, or None: any number of vectors."""
    match model.embed:
        case PatchEmbed(image=(_, height, width), patch=p) | StemEmbed(image=(_, height, width), patch=p):
            return height // p, width // p
        case TokenEmbed(length=n):
            return n
        case _:
            return None


def tokens(model: schema.Model) -> int | None:
    """N, without the class token."""
    found = places(model)
    return found[0] * found[1] if isinstance(found, tuple) else found


def pixels(model: schema.Model) -> int:
    """P."""
    assert isinstance(model.embed, PatchEmbed | StemEmbed), "a spec whose mask has no image is refused; please report"
    return model.embed.image[0] * model.embed.patch**2


# --- to tokens --------------------------------------------------------------------------------------------------------


def embed(model: schema.Model, d: int, argument: str) -> Part:
    """What comes in -> x: (B, N, d)."""
    match model.embed:
        case PatchEmbed() as e:
            return _patch_embed(model, e, d)
        case StemEmbed() as e:
            note = f"a token for every {e.patch} x {e.patch} pixels"
            axes: Axes = {"0.weight": (None, Channels(e.image[0]), None, None)}
            stem = [Held("stem", f"nn.Sequential(\n{_stem(e, d)}\n)", note, "linear", axes)]
            return Part((*stem,), ("x = self.stem(image).flatten(2).mT",))
        case TokenEmbed(vocabulary=n, std=std):
            about = f"a row for each of {n} words; starts with standard deviation {std:g}"
            axes = {"weight": (Named(n), None)}
            table = Held("embed", f"nn.Embedding({n}, {d})", about, std, axes, says="embed.vocabulary")
            return Part((table,), (f"x = self.embed({argument})",))
        case LinearEmbed(features=n, bias=bias):
            return Part((linear("embed", n, d, "vector -> token", bias),), (f"x = self.embed({argument})",))
        case NoEmbed():
            return Part((), (f"x = {argument}",))
        case _ as never:
            assert_never(never)


def _patch_embed(model: schema.Model, e: PatchEmbed, d: int) -> Part:
    size, cells = pixels(model), Cells(e.image[0], e.patch, e.order)
    before, after = e.norm in ("both", "before"), e.norm in ("both", "after")
    held = [linear("embed", size, d, f"patch, {_order(e.order)} -> token", reads=cells)]
    held = [norm("embed_norm", size, e.eps, "of every patch", cells, "embed"), *held] if before else held
    held = [*held, norm("token_norm", d, e.eps, "of every token")] if after else held
    decoder = model.decoder
    same = decoder is None or decoder.order == e.order
    cut = "self.patches" if same else "self.cells"
    x = f"{cut}(image)"
    for h in held:
        x = f"self.{h.name}({x})"
    methods = () if same else (patches(model, "cells", e.order),)
    return Part(tuple(held), (f"x = {x}",), methods)


def _order(order: str) -> str:
    return "(row, column, channel)" if order == "channels_last" else "(channel, row, column)"


def patches(model: schema.Model, name: str, order: str) -> str:
    """The method that cuts an image."""
    assert isinstance(model.embed, PatchEmbed | StemEmbed)
    (c, height, width), p, n = model.embed.image, model.embed.patch, tokens(model)
    rows, columns = height // p, width // p
    return f'''def {name}(self, image):
    """(B, {c}, {height}, {width}) -> (B, {n}, {pixels(model)}): the numbers of every patch, {_order(order)}."""
    cells = image.unflatten(3, ({columns}, {p})).unflatten(2, ({rows}, {p}))  # (B, {c}, {rows}, {p}, {columns}, {p})
    return cells.permute({CELLS[order]}).flatten(3).flatten(1, 2)
'''


def _stem(e: StemEmbed, d: int) -> str:
    """Strided convolutions, each twice as wide as the one before."""
    stages = e.patch.bit_length() - 1
    widths = [e.image[0], *(d >> (stages - 1 - i) for i in range(stages))]
    lines: list[str] = []
    for i, (ins, outs) in enumerate(pairwise(widths)):
        lines.append(f"    nn.Conv2d({ins}, {outs}, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d({outs}),")
        lines += ["    nn.GELU(),"] if i < stages - 1 else []
    return "\n".join(lines)


def before_layers(model: schema.Model, d: int) -> Part:
    """Mask, class token, positions, dropout: x (B, N, d) -> (B, N or N + 1, d)."""
    out = Part()
    if model.mask is not None:
        held = vector("mask_token", f"{d}", "in the place of what is masked", model.mask.std)
        line = "x = torch.where(mask.unsqueeze(-1), self.mask_token, x)"
        out += Part((held,), (line,), (_random_mask(model),))
    shared = isinstance(model.positions, LearnedPositions) and model.positions.class_token
    cls = _class_token(model, d)
    places = _positions(model, d)
    out += cls + places if shared else places + cls
    if model.dropout:
        out += Part((Held("dropout", f"nn.Dropout({model.dropout:g})", "of tokens", ""),), ("x = self.dropout(x)",))
    return out


def _random_mask(model: schema.Model) -> str:
    n = tokens(model)
    assert model.mask is not None and n is not None
    hidden = n - int(n * (1 - model.mask.ratio))
    return f'''def random_mask(self, image):
    """(B, {n}) bool: True for {hidden} patches of each image, drawn at random."""
    noise = torch.rand(image.shape[0], {n}, device=image.device)
    return noise.argsort(1).argsort(1) < {hidden}
'''


def _class_token(model: schema.Model, d: int) -> Part:
    if model.class_token is None:
        return Part()
    held = vector("class_token", f"{d}", "before all other tokens", model.class_token.std)
    return Part((held,), ("x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)",))


def _positions(model: schema.Model, d: int) -> Part:
    found, n = places(model), tokens(model)
    match model.positions:
        case None | NoPositions():
            return Part()
        case LearnedPositions(std=std, class_token=own):
            own = own and model.class_token is not None
            assert n is not None
            about = f"a vector for each place{', that of the class token first' if own else ''}"
            over = Grid(*found, own) if isinstance(found, tuple) else Row(n, own)
            held = vector("positions", f"{n + own}, {d}", about, std, (over, None))
        case SinusoidalPositions(base=base) if isinstance(found, tuple):
            grid = f"torch.cartesian_prod(torch.arange({found[0]}.0), torch.arange({found[1]}.0)).flip(1)"
            value = f"sinusoids({grid}, {d // 2}, {base:g})"
            return _fixed(f"{n}, {d}", "sines, cosines of the column, then of the row", value, "sinusoids", "")
        case SinusoidalPositions(base=base):
            value = f"sinusoids(torch.arange({n}.0).unsqueeze(1), {d}, {base:g})"
            return _fixed(f"{n}, {d}", "sines, then cosines of the place", value, "sinusoids", CUT)
        case FourierPositions(waves=waves, base=base):
            assert isinstance(found, tuple)
            value = f"fourier({found[0]}, {found[1]}, {waves}, {base:g})"
            about = "sines and cosines in turn, of the row, then of the column"
            fixed = _buffer("waves", f"{n}, {2 * waves}", about, value)
            map_ = linear("positions", 2 * waves, d, "waves -> position")
            return Part((fixed, map_), ("x = x + self.positions(self.waves)",), (), ("fourier",))
        case _ as never:
            assert_never(never)
    return Part((held,), (f"x = x + self.positions{'' if isinstance(found, tuple) else CUT}",))


def _buffer(name: str, shape: str, about: str, value: str) -> Held:
    return Held(name, f"buffer({shape})", f"{about}; fixed", value)


def _fixed(shape: str, about: str, value: str, function: str, cut: str) -> Part:
    held = _buffer("positions", shape, about, value)
    return Part((held,), (f"x = x + self.positions{cut}",), (), (function,))


# --- from tokens ------------------------------------------------------------------------------------------------------


def head(model: schema.Model, d: int, there: str = "") -> Part:
    """x, as it leaves the layers -> the answer. there: what says which tokens are no padding; the answer there is 0."""
    own = f"{there}[:, 1:]" if there and model.class_token is not None else there
    kept = f" * {own}.unsqueeze(-1)" if there else ""
    match model.head:
        case None:
            return Part((), ("return x",))
        case TiedHead(norm=normed, eps=eps):
            lines = ["x = x[:, 1:]"] if model.class_token is not None else []
            lines += ["x = self.head_norm(x)"] if normed else []
            return Part(_head_norm(normed, d, eps), (*lines, f"return x @ self.embed.weight.mT{kept}"))
        case PooledHead(kind=kind, classes=classes, norm=normed, eps=eps, bias=bias):
            lines = _pooled(kind, model.class_token is not None, own)
            kept = kept if kind == "tokens" else ""
            lines += ["x = self.head_norm(x)"] if normed else []
            if classes is None:
                return Part(_head_norm(normed, d, eps), (*lines, f"return x{kept}"))
            held = linear("head", d, classes, f"-> {classes} outputs", bias, gives=Named(classes))
            held = replace(held, says="head.classes")
            return Part((*_head_norm(normed, d, eps), held), (*lines, f"return self.head(x){kept}"))
        case ClassAttentionHead() as h:
            return _class_attention(h, d, there)
        case _ as never:
            assert_never(never)


def _class_attention(h: ClassAttentionHead, d: int, there: str) -> Part:
    """Touvron et al. 2021 (CaiT), as El-Nouby et al. 2021 (XCiT) use it: all tokens are normalised in each block."""
    blocks = f"nn.ModuleList(ClassAttention({d}, {h.heads}, {h.eps:g}) for _ in range({h.blocks}))"
    shape = f"({h.blocks}, 2, {d})"
    about = f"factors of both updates of each block; start at {h.scale:g}"
    held = (
        vector("class_token", f"{d}", "joins the others after the layers", h.std),
        Held("readers", blocks, "the class token reads the others", "linear"),
        Held("reader_scales", f"nn.Parameter(torch.empty{shape})", about, f"torch.full({shape}, {h.scale:g})"),
        *_head_norm(True, d, h.eps),
        replace(linear("head", d, h.classes, f"-> {h.classes} outputs", gives=Named(h.classes)), says="head.classes"),
    )
    lines = (
        "x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)",
        *([f"{there} = F.pad({there}, (1, 0), value=1)"] if there else []),
        "for reader, scales in zip(self.readers, self.reader_scales, strict=True):",
        f"    x = reader(x, scales{', ' + there if there else ''})",
        "return self.head(self.head_norm(x[:, 0]))",
    )
    return Part(held, lines, (), ("ClassAttention",))


def _head_norm(normed: bool, d: int, eps: float) -> tuple[Held, ...]:
    held = norm("head_norm", d, eps, "of what the head reads")
    return (replace(held, says="head.norm"),) if normed else ()


def _pooled(kind: str, class_token: bool, there: str) -> list[str]:
    """there: of these tokens; what layers leave is 0 at padding."""
    rest = "x[:, 1:]" if class_token else "x"
    mean = f"{rest}.sum(1) / {there}.sum(1, keepdim=True)" if there else f"{rest}.mean(1)"
    pool = {"class_token": "x[:, 0]", "mean": mean, "tokens": rest}[kind]
    return [f"x = {pool}"] if pool != "x" else []


def between(model: schema.Model, decoder: Decoder, outs: int, ins: int) -> Part:
    """What the layers say -> what the layers of the decoder take."""
    held = [norm("encoder_norm", outs, decoder.eps, "of every token, after the layers")] if decoder.norm_before else []
    held += [linear("decoder_embed", outs, ins, "width of the layers -> width of the decoder")] if decoder.embed else []
    return Part(tuple(held), tuple(f"x = self.{h.name}(x)" for h in held))


def to_pixels(model: schema.Model, decoder: Decoder, d: int) -> Part:
    """What the layers of the decoder say -> (B, N, P)."""
    assert isinstance(model.embed, PatchEmbed | StemEmbed)
    cells = Cells(model.embed.image[0], model.embed.patch, decoder.order, made=True)
    read = linear("pixels", d, pixels(model), f"token -> patch, {_order(decoder.order)}", gives=cells)
    first = (norm("decoder_norm", d, decoder.eps, "of every token, after the decoder"),) if decoder.norm else ()
    rest = "x[:, 1:]" if model.class_token is not None else "x"
    x = f"self.decoder_norm({rest})" if decoder.norm else rest
    return Part((*first, read), (f"return self.pixels({x}), mask",))
