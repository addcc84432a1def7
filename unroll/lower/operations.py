"""Tensor operations: what a graph is made of.

A `Node` has a mathematical shape (rows, cols), like every expression, and a place where it is stored:

    with batch axes      (*, families, cols, rows)      a column (*, families, rows)
    without              (families, rows, cols)         a column (families, rows)

An axis of size 1 is not stored, so a column and the row that is its transpose are one tensor, and a matrix and its
transpose differ by `.mT` only. A `Ref` is a node or its transpose. Operations are an open set: one record each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from math import prod
from typing import Any

import sympy as sp

from unroll.calculus.gradient import derivative
from unroll.calculus.stable import expm1, logcosh, xlogy
from unroll.calculus.torch_text import power
from unroll.language.nodes import ONE, STEP_OF_ENTRY, WORKED, Shape, broadcast, operator_shape, slot
from unroll.lower import curves, spectral
from unroll.lower.scalar_text import POSTFIX, POWER, PRODUCT, SUM, UNARY, Text, formula, number

Tags = tuple[str, ...]
"""Stored axes in order: "*" all batch axes, "r" rows, "c" columns, anything else the index of a family."""


class Stage(IntEnum):
    """When a value is known. Setup: from problem parameters alone. Prologue: once per call. Body: per layer."""

    CONSTANT = 0
    SETUP = 1
    PROLOGUE = 2
    BODY = 3


@dataclass(frozen=True)
class Ref:
    """A node, or its transpose."""

    node: int
    flip: bool = False

    @property
    def T(self) -> Ref:
        return Ref(self.node, not self.flip)


@dataclass(frozen=True)
class Node:
    """One tensor operation. families: (index, size) of every free family index. plain: a Python number."""

    op: str
    inputs: tuple[Ref, ...]
    attrs: tuple[Any, ...]
    shape: Shape
    batched: bool = False
    families: tuple[tuple[str, sp.Expr], ...] = ()
    stage: Stage = Stage.CONSTANT
    plain: bool = False
    symmetric: bool = False
    positive: bool = False

    @property
    def tags(self) -> Tags:
        """Stored axes."""
        rows = () if self.shape[0] == 1 else ("r",)
        cols = () if self.shape[1] == 1 else ("c",)
        matrix = cols + rows if self.batched else rows + cols
        return (("*",) if self.batched else ()) + tuple(k for k, _ in self.families) + matrix


@dataclass(frozen=True)
class View:
    """A ref with its node: the operand of an operation."""

    node: Node
    flip: bool

    @property
    def shape(self) -> Shape:
        rows, cols = self.node.shape
        return (cols, rows) if self.flip else (rows, cols)

    @property
    def tags(self) -> Tags:
        turn = {"r": "c", "c": "r"} if self.flip else {}
        return tuple(turn.get(t, t) for t in self.node.tags)


@dataclass(frozen=True)
class Operand(View):
    """A view with its text."""

    text: Text

    @property
    def turned(self) -> Operand:
        """The transpose."""
        return Operand(self.node, not self.flip, self.text)

    def ordered(self, order: str) -> Text:
        """The text with its two matrix axes in this order, "rc" or "cr" """
        both = "r" in self.tags and "c" in self.tags
        stored = "".join(t for t in self.tags if t in "rc")
        return self.text.then(".mT") if both and stored != order and not self.node.symmetric else self.text

    def aligned(self, tags: Tags) -> Text:
        """The text with axes of size 1 where it lacks one of `tags`, so that it broadcasts against them."""
        text = self.ordered("".join(t for t in tags if t in ("r", "c")) or "rc") if len(self.tags) > 1 else self.text
        if self.node.plain or not self.tags:
            return text
        own = [t for t in tags if t in self.tags]
        inner = tags[tags.index(own[0]) + 1 :] if own else ()
        parts = [":" if t in self.tags else "None" for t in inner]
        if "None" not in parts:
            return text
        while parts and parts[0] == ":" and own[0] == "*":
            parts.pop(0)
        return text.then(f"[{', '.join(['...' if own[0] == '*' else ':', *parts])}]")


@dataclass(frozen=True)
class Context:
    """What the text of an operation may need besides its operands."""

    size: Callable[[sp.Expr], str]
    like: str  # a tensor whose dtype and device new ones take
    function: Callable[[Any], str]  # name of a record's function in the module


@dataclass(frozen=True)
class Operation:
    """A kind of tensor operation.

    axes(shapes of the inputs, attrs) -> shape.  text(out, operands, context) -> Python.  cost(out, inputs, sizes) -> floating-point
    operations of one sample.  helpers: module-level functions that the text calls.
    """

    name: str
    axes: Callable[[Sequence[Shape], tuple[Any, ...]], Shape]
    text: Callable[[Node, Sequence[Operand], Context], Text]
    cost: Callable[[Node, Sequence[View], Callable[[sp.Expr], int]], int]
    helpers: tuple[str, ...] = ()


# --- costs ------------------------------------------------------------------------------------------------------------

Sizes = Callable[[sp.Expr], int]


def entries(v: Node | View, size: Sizes) -> int:
    node = v.node if isinstance(v, View) else v
    return size(node.shape[0]) * size(node.shape[1]) * prod(size(n) for _, n in node.families)


def _pointwise(out: Node, args: Sequence[View], size: Sizes) -> int:
    return max((entries(a, size) for a in (out, *args)), default=1)


def _free(out: Node, args: Sequence[View], size: Sizes) -> int:
    return 0


def _product_cost(out: Node, args: Sequence[View], size: Sizes) -> int:
    """2 m k n per product, left to right."""
    parts = args[1:] if out.op == "product" else args
    families = {k: size(n) for a in parts for k, n in a.node.families}
    rows, total = size(parts[0].shape[0]), 0
    for b in parts[1:]:
        total += 2 * rows * size(b.shape[0]) * size(b.shape[1])
    return total * prod(families.values())


def _weighed_product_cost(out: Node, args: Sequence[View], size: Sizes) -> int:
    """That of one member: the others weigh nothing, where weights are labels."""
    return 2 * size(out.shape[0]) * size(out.shape[1]) * size(args[0].shape[1])


def _attention_cost(out: Node, args: Sequence[View], size: Sizes) -> int:
    """Two products with the N x N matrix of scores."""
    return 4 * size(out.shape[1]) * entries(out, size)


def _sweep_cost(out: Node, args: Sequence[View], size: Sizes) -> int:
    return 2 * size(out.shape[0]) * entries(out, size)


def _cubic(out: Node, args: Sequence[View], size: Sizes) -> int:
    n = size(args[0].shape[0])
    return n**2 * max(n, entries(out, size) // max(n, 1)) * prod(size(k) for _, k in out.families)


# --- axes -------------------------------------------------------------------------------------------------------------


def _same(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    return args[0]


def _broadcast(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    return broadcast(*args) if args else (ONE, ONE)


def _given(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    return attrs[-2], attrs[-1]


def _to_scalar(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    return ONE, ONE


def _along(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    rows, cols = args[0]
    return (ONE if attrs[0] in (None, 0) else rows, ONE if attrs[0] in (None, 1) else cols)


def _product_axes(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    return args[0][0], args[-1][1]


# --- text -------------------------------------------------------------------------------------------------------------


def _map_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """Elementwise formula attrs[0] in slots."""
    return formula(out.attrs[0], {slot(i): a.aligned(out.tags) for i, a in enumerate(args)})


def _add_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs[0]: the numbers in front of the terms."""
    parts = sorted(zip(out.attrs[0], args, strict=True), key=lambda p: bool(p[0] < 0))
    texts: list[str] = []
    for i, (coef, arg) in enumerate(parts):
        text, minus = arg.aligned(out.tags), coef < 0
        size = abs(coef)
        body = Text(f"{number(size).at(PRODUCT)} * {text.at(UNARY)}", PRODUCT) if size != 1 else text
        if i:
            texts.append(f" {'-' if minus else '+'} {body.at(PRODUCT)}")
        else:
            texts.append(f"-{body.at(UNARY)}" if minus else body.at(SUM))
    return Text("".join(texts), SUM, not out.plain)


def _matmul_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """a @ b. With batch axes the stored tensors are transposed, so the product is b.T @ a.T."""
    a, b = args
    if (short := _weighed_sum(a, b) or _weighed_sum(b.turned, a.turned)) is not None:
        return short
    if a.node.families or b.node.families or a.shape[1] == 1:
        return einsum(out, a, b)
    if not out.batched:
        return _at(a.ordered("rc"), b.ordered("rc"))
    thin_a, thin_b = a.shape[0] == 1, b.shape[1] == 1
    match a.node.batched, b.node.batched:
        case True, True if thin_a and thin_b:
            return Text(f"torch.linalg.vecdot({a.text.code}, {b.text.code})")
        case True, True if thin_b:
            return _at(b.text.then("[..., None, :]"), a.ordered("cr")).then(".squeeze(-2)")
        case True, True if thin_a:
            return _at(b.ordered("cr"), a.text.then("[..., None]")).then(".squeeze(-1)")
        case True, False if thin_a:
            return _at(a.text, b.ordered("rc"))
        case _:
            return _at(b.ordered("cr"), a.ordered("cr"))


def _weighed_sum(a: Operand, v: Operand) -> Text | None:
    """A v for every one of a family and a batch: columns of A weighed and added, cheaper than a call for each."""
    thin = v.shape[1] == 1 and 1 not in a.shape
    if not (thin and a.node.batched and v.node.batched and v.node.families and a.node.families == v.node.families):
        return None
    weighed = f"{a.text.at(PRODUCT)} * {v.turned.aligned(a.tags).at(UNARY)}"
    return Text(f"({weighed}).sum({_axis(a, 'c')})")


def _at(a: Text, b: Text) -> Text:
    return Text(f"{a.at(PRODUCT)} @ {b.at(UNARY)}", PRODUCT)


def einsum(out: Node, a: Operand, b: Operand) -> Text:
    """The general contraction, one letter per axis; an index missing from the result is summed over.

    What has batch axes comes first: the result is then laid out token by token, features together, as it is stored.
    """
    turns = ({"r": "i", "c": "k"}, {"r": "k", "c": "j"}, {"r": "i", "c": "j"})
    families = list(dict.fromkeys(k for x in (a, b) for k, _ in x.node.families))
    letters = dict(zip(families, "hgfedcba", strict=False))

    def word(tags: Tags, turn: Mapping[str, str]) -> str:
        return "".join("..." if t == "*" else turn.get(t) or letters[t] for t in tags)

    words = [(word(a.tags, turns[0]), a), (word(b.tags, turns[1]), b)]
    (first, x), (second, y) = sorted(words, key=lambda w: not w[1].node.batched)
    return Text(f'torch.einsum("{first},{second}->{word(out.tags, turns[2])}", {x.text.code}, {y.text.code})')


def _scale_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    coef, x = (a.aligned(out.tags) for a in args)
    return Text(f"{coef.at(PRODUCT)} * {x.at(UNARY)}", PRODUCT, not out.plain)


def _prox_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return Text(f"{c.function(out.attrs[0])}({', '.join(_tensor(a.aligned(out.tags), a, c) for a in args)})")


def _tensor(text: Text, x: Operand, c: Context) -> str:
    """What autograd can save: a plain number as a tensor of the kind that is computed with."""
    return text.code if x.text.tensor else f"{c.like}.new_tensor({text.code})"


def _axis(x: View, tag: str) -> int:
    """Position of an axis, counted from the end."""
    return x.tags.index(tag) - len(x.tags)


def _over(out: Node, x: Operand) -> str:
    """The axes that a reduction removes, as an argument."""
    axes = tuple(_axis(x, t) for t in x.tags if t in "rc" and t not in out.tags)
    return str(axes[0]) if len(axes) == 1 else str(axes)


def _reduction(method: str) -> Callable[[Node, Sequence[Operand], Context], Text]:
    def text(out: Node, args: Sequence[Operand], c: Context) -> Text:
        (x,) = args
        return x.text if x.tags == out.tags else x.text.then(f".{method}({_over(out, x)})")

    return text


def _length_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """sqrt of the sum of squares. attrs: axis."""
    (x,) = args
    if x.tags == out.tags:
        return x.text.then(".abs()")
    return Text(f"torch.linalg.vector_norm({x.text.code}, dim={_over(out, x)})")


def _unit_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """x over the length of x. attrs: axis."""
    (x,) = args
    axes = tuple(_axis(x, t) for i, t in enumerate("rc") if t in x.tags and out.attrs[0] in (None, i))
    if not axes:
        return x.text.then(".sign()")
    return Text(f"unit({x.text.code}, {axes[0] if len(axes) == 1 else axes})")


def _softmax_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: axis, causal."""
    axis, causal = out.attrs
    dim = _axis(args[0], "rc"[axis])
    return Text(f"causal_softmax({args[0].text.code}, {dim})") if causal else args[0].text.then(f".softmax({dim})")


def _norm_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: kind, axis, eps, and whether weight and bias are among the operands."""
    kind, axis, eps, affine = out.attrs
    x, n = args[0], out.shape[axis]
    last = x.tags[-1] == "rc"[axis]
    code = x.text if last else x.text.then(".mT")
    weights = [a.text.code for a in args[1:]] if affine else []
    match kind:
        case "layer_norm":
            call = f"F.layer_norm({', '.join([code.code, f'({c.size(n)},)', *(weights or ['None', 'None']), number(eps).code])})"
        case "rms_norm":
            call = (
                f"F.rms_norm({', '.join([code.code, f'({c.size(n)},)', *(weights[:1] or ['None']), number(eps).code])})"
            )
            call += f" + {weights[1]}" if weights else ""
        case _:
            call = f"F.normalize({code.code}, dim=-1, eps={number(eps).code})"
            call += f" * {weights[0]} + {weights[1]}" if weights else ""
    text = Text(call, POSTFIX if kind == "layer_norm" or not weights else SUM)
    return text if last else text.then(".mT")


def _over_family(method: str) -> Callable[[Node, Sequence[Operand], Context], Text]:
    """attrs[0]: the index."""

    def text(out: Node, args: Sequence[Operand], c: Context) -> Text:
        return args[0].text.then(f".{method}({_axis(args[0], out.attrs[0])})")

    return text


def _attention_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """V softmax(scale V'V) for V = args[0], tokens its columns. attrs: causal."""
    v, scale, *keep = args
    code = v.ordered("cr").code
    mask = ", is_causal=True" if out.attrs[0] else ""
    if keep:  # of the tokens that are looked at
        places = ", ".join(["...", *["None"] * (len(out.families) + 1), ":"])
        mask = f", attn_mask={keep[0].text.then(f'[{places}]').code} > 0"
    return Text(f"F.scaled_dot_product_attention({code}, {code}, {code}{mask}, scale={scale.text.code})")


def _attend_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """The same of the last tokens, V = args[0], that see all so far, args[1]."""
    v, all_, scale = args
    return Text(f"attend({v.ordered('cr').code}, {all_.ordered('cr').code}, {scale.text.code})")


def _kept(method: str) -> Callable[[Node, Sequence[Operand], Context], Text]:
    """attrs[0]: the axis of tokens. What it makes of the tokens before is kept from call to call."""
    return lambda out, args, c: Text(f"kept.{method}({args[0].text.code}, {_axis(args[0], 'rc'[out.attrs[0]])})")


def _softmax_so_far_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return Text(f"softmax_so_far({args[0].text.code}, {_axis(args[0], 'rc'[out.attrs[0]])})")


def _latest_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: the axis, and how many."""
    (x,), (axis, n) = args, out.attrs
    size = c.size(n)
    return x.text.then(f".narrow({_axis(x, 'rc'[axis])}, {c.size(x.shape[axis])} - {size}, {size})")


def _resized(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    rows, cols = args[0]
    return (attrs[1], cols) if attrs[0] == 0 else (rows, attrs[1])


def _drop_path_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """The axes after the batch axes stay or go together."""
    x, rate = args
    own = sum(t != "*" for t in x.tags)
    return Text(f"drop_path({x.text.code}, {rate.text.code}, {own}, self.training)")


def _running_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: axis, adjoint."""
    (x,) = args
    axis, adjoint = _axis(x, "rc"[out.attrs[0]]), out.attrs[1]
    return x.text.then(f".flip({axis}).cumsum({axis}).flip({axis})" if adjoint else f".cumsum({axis})")


def _sort_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: axis."""
    (x,) = args
    axis = "rc"[out.attrs[0]]
    return x.text.then(f".sort(dim={_axis(x, axis)}, descending=True).values") if axis in x.tags else x.text


def _top_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: is the share a plain number?"""
    x, share = args
    p = share.text if out.attrs[0] or not share.node.batched else share.text.then("[..., None]")
    name, axes = "top" if out.attrs[0] else "top_each", [t for t in x.tags if t in "rc"]
    if len(axes) == 2:
        call = Text(f"{name}({x.text.then('.flatten(-2)').code}, {p.code})")
        return call.then(f".unflatten(-1, {x.text.then('.shape[-2:]').code})")
    if axes:
        return Text(f"{name}({x.text.code}, {p.code})")
    return Text(f"{name}({x.text.then('[..., None]').code}, {p.code})").then(".squeeze(-1)")


def _factor_axes(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    return WORKED[attrs[0]](args[0])


def _factor_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: which factor. Axes of size 1 are there while it is worked out; those of inputs are constants for slopes."""
    (x,) = args
    code = x.ordered("rc")
    code = code.then(".detach()") if out.stage > Stage.SETUP else code
    code = code if "c" in x.tags else code.then("[..., None]")
    code = code if "r" in x.tags else code.then("[..., None, :]")
    call = Text(f"{out.attrs[0]}({code.code})")
    gone = [i - 2 for i, t in enumerate("rc") if t not in out.tags]
    if out.attrs[0] in ("svd_s", "eigh_values"):
        return call if "r" in out.tags else call.then(".squeeze(-1)")
    return call.then(f".squeeze({gone[0] if len(gone) == 1 else tuple(gone)})") if gone else call


def _call(name: str) -> Callable[[Node, Sequence[Operand], Context], Text]:
    """A function of square or orientation-free matrices, stored as they are."""

    def text(out: Node, args: Sequence[Operand], c: Context) -> Text:
        return Text(f"{name}({', '.join(a.text.code for a in args)})")

    return text


def _weighed_product_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """X diag(w) Y' for every member w; what is stored is the transpose where there are samples."""
    x, w, y = args
    x, y = (y, x) if out.batched else (x, y)
    return Text(f"weighed_product({x.ordered('cr').code}, {w.text.code}, {y.ordered('cr').code})")


def _identity_and_members_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """I + t X diag(w) X' for every member w, or a matrix of the same determinant."""
    x, w, t = args
    t_text = t.aligned(tuple(k for k, _ in out.families)).code
    return Text(f"identity_and_members({x.ordered('cr').code}, {w.text.code}, {t_text})")


def _solve_text(name: str) -> Callable[[Node, Sequence[Operand], Context], Text]:
    """inv(S) @ B for the factor or matrix args[0] and B = args[1]."""

    def text(out: Node, args: Sequence[Operand], c: Context) -> Text:
        s, b = args
        lead = tuple(t for t in out.tags if t not in ("r", "c"))
        side = b.aligned((*lead, *(t for t in ("r", "c") if t in b.tags))) if lead else b.ordered("rc")
        column = out.shape[1] == 1
        side = side.then("[..., None]") if column else side
        call = Text(f"{name}({s.aligned((*lead, 'r', 'c')).code}, {side.code})")
        return call.then(".squeeze(-1)") if column else call.then(".mT") if out.batched else call

    return text


def _solve_differences_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """args: what is solved for, and the numbers in front of I and of D'D."""
    x, a, b = args
    call = Text(f"solve_differences({', '.join([x.ordered('cr').code, a.text.code, b.text.code])})")
    return call if out.batched or len(out.tags) < 2 else call.then(".mT")


def _beside_values(a: Operand) -> Text:
    """A number, one per sample perhaps, beside the singular values of a matrix."""
    return a.text.then("[..., None]") if a.node.batched else a.text


def _of_singular_values(out: Node, args: Sequence[Operand]) -> tuple[str, str]:
    """attrs[0], a profile in slot(0), and its slope. Further operands are its scalars."""
    profile, names = out.attrs[0], {slot(0): Text("s"), **{slot(i): _beside_values(a) for i, a in enumerate(args) if i}}
    return formula(profile, names).code, formula(derivative(profile, slot(0)), names).code


def _spectral_sum_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return Text(f"spectral_sum({args[0].text.code}, lambda s: {_of_singular_values(out, args)[0]})")


def _spectral_map_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    value, slope = _of_singular_values(out, args)
    return Text(f"spectral_map({args[0].text.code}, lambda s: {value}, lambda s, t: {slope})")


def _shifts_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: adjoint, sizes. Columns last but one, their channels by places last."""
    (x,) = args
    adjoint, sizes = out.attrs
    code = x.ordered("cr") if "c" in x.tags else x.text.then(".unsqueeze(-2)")
    call = Text(f"{'shifts_adjoint' if adjoint else 'shifts'}({', '.join([code.code, *map(c.size, sizes)])})")
    call = call if "c" in out.tags else call.then(".squeeze(-2)")
    return call if out.batched or "c" not in out.tags else call.then(".mT")


def _repeat_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,), (adjoint, (n,)) = args, out.attrs
    entries = x.text if "r" in x.tags else x.text.then("[..., None]")  # of one entry there is only the number
    if not adjoint:
        found = entries.then(f".repeat_interleave({c.size(n)}, -1)")
        return found if "r" in out.tags else found.then(".squeeze(-1)")
    return entries.then(f".unflatten(-1, (-1, {c.size(n)})).sum(-1)" if "r" in out.tags else ".sum(-1)")


def _first_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,), (_, (n,)) = args, out.attrs
    entries = x.text.code if "r" in x.tags else f"{c.like}.new_ones(1)"  # of one entry there is only the number 1
    found = Text(f"F.pad({entries}, (0, {c.size(sp.expand(n - x.shape[0]))}))")  # fewer than none: cut
    return found if "r" in out.tags else found.then(".squeeze(-1)")


def _groups_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,), (adjoint, (n,)) = args, out.attrs
    if adjoint:
        return x.ordered("cr").then(".flatten(-2)")
    cut = x.text.then(f".unflatten(-1, (-1, {c.size(n)}))")
    return cut if out.batched else cut.then(".mT")


def _transform_axes(node: Node, frequency: str) -> tuple[int, int, int]:
    """Of a value at all frequencies, its channels stored even if there is one: the axis of channels, of frequencies, and
    that of channels by places in the signal, all from the end."""
    matrix = tuple(t for t in ("c", "r") if t == "r" or node.shape[1] != 1)
    families = [k for k, _ in node.families]
    tags = (*families, *(matrix if node.batched else reversed(matrix)))
    rest = [t for t in tags if t != frequency]
    return tags.index("r") - len(tags), tags.index(frequency) - len(tags), rest.index("r") - len(rest)


def _spectrum_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: index, sizes."""
    (x,), (index, sizes) = args, out.attrs
    channels, frequencies, places = _transform_axes(out, index)
    call = Text(
        f"spectrum({x.ordered('cr' if out.batched else 'rc').code}, {places}, {frequencies}, {', '.join(map(c.size, sizes))})"
    )
    return call if "r" in out.tags else call.then(f".squeeze({channels})")


def _signal_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (v,), (index, sizes) = args, out.attrs
    channels, frequencies, places = _transform_axes(replace(v.node, shape=v.shape), index)
    code = v.ordered("cr" if out.batched else "rc")
    code = code if "r" in v.tags else code.then(f".unsqueeze({channels})")
    return Text(f"signal({code.code}, {frequencies}, {places}, {', '.join(map(c.size, sizes))})")


def _logdet_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,) = args
    code = x.text if "r" in x.tags else x.text.then("[..., None, None]")
    return Text(f"logdet_hermitian({code.code})")


def _energy_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,) = args
    code = x.text if "r" in x.tags else x.text.then("[..., None]")
    return Text(f"energy({code.code}, {_axis(x, 'r') if 'r' in x.tags else -1})")


def _frequency_sum_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,), (index, sizes) = args, out.attrs
    return Text(f"frequency_sum({x.text.code}, {_axis(x, index)}, {', '.join(map(c.size, sizes))})")


def _spectrum_axes(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    rows, cols = args[0]
    return sp.cancel(rows / sp.Mul(*attrs[1])), cols


def _signal_axes(args: Sequence[Shape], attrs: tuple[Any, ...]) -> Shape:
    rows, cols = args[0]
    return rows * sp.Mul(*attrs[1]), cols


def _operator_axes(name: str) -> Callable[[Sequence[Shape], tuple[Any, ...]], Shape]:
    return lambda args, attrs: operator_shape(name, args[0], *attrs)


def _difference_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    (x,), adjoint = args, out.attrs[1]
    order = "cr" if out.batched else "rc"
    text, axis = x.ordered(order), -2 if order == "rc" and "c" in x.tags else -1
    if not adjoint:
        return text.then(f".diff(dim={axis})")
    before, after = ("0, 0, 1, 0", "0, 0, 0, 1") if axis == -2 else ("1, 0", "0, 1")
    return Text(f"F.pad({text.code}, ({before})) - F.pad({text.code}, ({after}))", SUM)


def _eye_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return Text(f"torch.eye({c.size(out.shape[0])}, dtype={c.like}.dtype, device={c.like}.device)")


def _full_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    sizes = ", ".join(c.size(n) for n in out.shape if n != 1)
    kind = "zeros" if out.attrs[0] == 0 else "ones"
    return Text(f"{c.like}.new_{kind}({sizes or '()'})")


def _div_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: how many probes."""
    of, x = (a.ordered("cr") for a in args)
    axes = len([t for t in args[1].tags if t in "rc"])
    return Text(f"div({of.code}, {x.code}, {axes}, {out.attrs[0]}, self.training)")


def _signs_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """The operand is the seed."""
    return Text(f"signs({', '.join([args[0].text.code, c.like, *(c.size(n) for n in out.shape if n != 1)])})")


def _diag_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return Text(f"torch.diag_embed({args[0].text.code})")


def _diagonal_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return args[0].text.then(".diagonal(dim1=-2, dim2=-1)")


def _trace_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return args[0].text.then(".diagonal(dim1=-2, dim2=-1).sum(-1)")


def _trace_product_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """trace(A @ B) = sum of A * B.T."""
    a, b = args
    letters = ({"r": "i", "c": "j"}, {"r": "j", "c": "i"})
    families = dict(zip(dict.fromkeys(k for x in (a, b) for k, _ in x.node.families), "hgfedcba", strict=False))
    words = [
        "".join("..." if t == "*" else m.get(t) or families[t] for t in x.tags)
        for x, m in zip(args, letters, strict=True)
    ]
    result = "".join("..." if t == "*" else families[t] for t in out.tags)
    return Text(f'torch.einsum("{words[0]},{words[1]}->{result}", {a.text.code}, {b.text.code})')


def _leaf_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    raise AssertionError("leaves are named by whoever prints the graph")


def _number_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return number(out.attrs[0])


WHOLE = ("ball1", "ball2", "sparse")
"""Sets that take a matrix as one long vector; the others take each column, or the matrix."""
COLUMNWISE = ("nonneg", "box", "ball_inf", "simplex", "sphere", "unit_columns", "tv", "sorted_l1", "columns_ball1")
"""Sets that a matrix is in if each of its columns is, and functions that are a sum over columns."""
SETS_OF_ENTRIES = ("nonneg", "box", "ball_inf")


def _nearest(out: Node, args: Sequence[Operand], name: str) -> Text:
    """The nearest point of a set, or the prox of a function, the last axis along the columns of x."""
    x, *params = args
    code = x.ordered("cr")
    order = (*(t for t in x.tags if t not in "rc"), *(t for t in "cr" if t in x.tags))
    bounds = ["" if p.node.op == "number" and p.node.attrs[0].is_infinite else p.aligned(order).code for p in params]
    match name:
        case "nonneg":
            return code.then(".clamp_min(0)")
        case "box":
            return code.then("".join(f".clamp_{m}({b})" for m, b in zip(("min", "max"), bounds, strict=True) if b))
        case "ball_inf":
            return code.then(f".clamp_min(-{params[0].text.at(POWER)}).clamp_max({bounds[0]})")
        case _:
            pass
    function = helper_of(name)
    if name in WHOLE and len([t for t in x.tags if t in "rc"]) == 2:
        call = Text(f"{function}({', '.join([code.then('.flatten(-2)').code, *bounds])})")
        return call.then(f".unflatten(-1, {code.then('.shape[-2:]').code})")
    return Text(f"{function}({', '.join([code.code, *bounds])})")


def helper_of(name: str) -> str:
    """The function that projects on a set, or is the prox of a function."""
    name = {"orthogonal": "stiefel", "columns_ball1": "ball1"}.get(name, name)
    return f"prox_{name}" if f"prox_{name}" in HELPERS else f"project_{name}"


def _project_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    text = _nearest(out, args, out.attrs[0])
    return text if out.batched or len(out.tags) < 2 else text.then(".mT")


def _curve_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: the grid. Its function may differ from row to row, the last axis."""
    (x, points), grid = args, out.attrs[0]
    y = f"odd({points.text.code})" if grid.odd else points.text.code
    call = Text(f"{CURVES[grid.degree]}({x.ordered('cr').code}, {y}, {grid.low!r}, {grid.high!r})")
    return call if out.batched or len(out.tags) < 2 else call.then(".mT")


CURVES = {1: "curve", 3: "spline"}
"""By the degree between two places."""


def _indicator_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """0 within rounding of the set, infinite outside: a point of the set is its own nearest point."""
    x = args[0]
    axes = tuple(range(-len([t for t in x.tags if t in "rc"]), 0))
    if out.attrs[0] == "affine":  # operands: A @ x and b
        return Text(f"indicator({x.text.code}, {args[1].aligned(x.tags).code}, {axes})")
    if out.attrs[0] == "sphere":  # 0 is not in it
        length = f"torch.linalg.vector_norm({x.ordered('cr').code}, dim=-1, keepdim=True)"
        return Text(f"indicator({length}, torch.ones_like({length}), {axes})")
    return Text(f"indicator({x.ordered('cr').code}, {_nearest(out, args, out.attrs[0]).code}, {axes})")


def _prox_of_values(out: Node, args: Sequence[Operand], c: Context) -> str:
    """A matrix, the scalar prox attrs[0] of its singular or eigenvalues s, and its slope where it gives t."""
    x, *scalars = args
    record, names = out.attrs[0], {s: _beside_values(a) for s, a in zip(out.attrs[0].scalars, scalars, strict=True)}
    arguments = ", ".join(["s", *(_tensor(_beside_values(a), a, c) for a in scalars)])
    slope = record.slope.xreplace({record.u: sp.Abs(record.u)}) if record.even else record.slope
    slope = formula(slope, {**names, record.u: Text("t")}).code
    return f"{x.text.code}, lambda s: {c.function(record)}({arguments}), lambda s, t: {slope}"


def _spectral_prox_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    return Text(f"spectral_map({_prox_of_values(out, args, c)})")


def _spectral_divergence_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: the scalar prox; of eigenvalues?"""
    kind = "symmetric" if out.attrs[1] else "spectral"
    return Text(f"{kind}_divergence({_prox_of_values(out, args, c)})")


def _multiplier_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: the scalar prox. args: v, a, s, reach, and the scalars of the prox."""
    order = (*(t for t in args[0].tags if t not in "rc"), *(t for t in "cr" if t in args[0].tags))
    order = tuple(dict.fromkeys((*(t for t in out.tags if t not in "rc"), *order)))
    ends = [a.aligned(order) if "r" in order else _beside_values(a) for a in args]
    record, (v, *own), scalars = out.attrs[0], ends[:4], ends[4:]
    name, given = c.function(record), [_tensor(t, a, c) for t, a in zip(scalars, args[4:], strict=True)]
    called = (("v", name), ("v", record.plain(name)), ("z", f"{name}_slope"))
    functions = [f"lambda {x}: {f}({', '.join([x, *given])})" for x, f in called]
    return Text(f"multiplier({', '.join([*functions, *(t.code for t in (v, *own))])})")


def _sweep_text(out: Node, args: Sequence[Operand], c: Context) -> Text:
    """attrs: the scalar prox of an entry, or None, and what clips it. args: q, fall, z, the scalars of the prox, those of what clips it."""
    record, clip = out.attrs
    lead = tuple(t for t in out.tags if t not in "rc")
    order = (*lead, *(t for t in "cr" if t in out.tags))
    side = lambda a: a.aligned(order) if "r" in out.tags else _beside_values(a)
    q, fall, z = args[0].aligned((*lead, "r", "c")), *map(side, args[1:3])
    if "r" not in out.tags:
        q = Text(_tensor(q, args[0], c), POSTFIX).then("[..., None, None]")
    elif "c" in out.tags and any(t not in "rc" for t in args[0].tags):
        q = q.then("[..., None, :, :]")
    words, own = list[str](), list[str]()
    for a in args[3:]:
        words.append(f"_w{len(own)}" if "r" in a.tags else _tensor(side(a), a, c))
        own += [side(a).code] if "r" in a.tags else []
    value, free = Text("_v"), () if record is None else tuple(s for s in record.scalars if s != STEP_OF_ENTRY)
    if record is not None:
        named = {**dict(zip(free, words, strict=False)), STEP_OF_ENTRY: "_t"}
        value = Text(f"{c.function(record)}({', '.join(['_v', *(named[s] for s in record.scalars)])})")
    if clip is not None:
        value = formula(clip, {slot(0): value, **{slot(i + 1): side(a) for i, a in enumerate(args[3 + len(free) :])}})
    step = f"lambda {', '.join(['_v', '_t', *(f'_w{i}' for i in range(len(own)))])}: {value.code}"
    call = Text(f"sweep({', '.join([step, q.code, fall.code, z.code, *own])})")
    call = call if "r" in out.tags else call.then(".squeeze(-1)")
    return call if out.batched or len(out.tags) < 2 else call.then(".mT")


def helpers_of(node: Node) -> tuple[str, ...]:
    """Module-level functions that the text of a node calls."""
    if node.op == "softmax" and node.attrs[1]:
        return ("causal_softmax",)
    if node.op == "factor":
        return (node.attrs[0],)
    if node.op == "curve":
        return (CURVES[node.attrs[0].degree], *(("odd",) if node.attrs[0].odd else ()))
    if node.op == "top":
        return ("top",) if node.attrs[0] else ("top_each",)
    if node.op == "spectral_divergence":
        return ("symmetric_divergence",) if node.attrs[1] else ("spectral_divergence",)
    if node.op in ("map", "spectral_sum", "spectral_map"):
        called = tuple(f.__name__ for f in (power, xlogy, expm1, logcosh) if node.attrs[0].has(f))
        return (*BY_NAME[node.op].helpers, *called)
    if node.op in ("project", "indicator"):
        called = helper_of(node.attrs[0])
        return (*BY_NAME[node.op].helpers, *((called,) if called in HELPERS else ()))
    return BY_NAME[node.op].helpers


LEAVES = ("given", "scalar", "learned", "input", "start", "state", "counter", "layer", "dim")
"""What a graph reads: attrs are (name, rows, cols)."""

OPERATIONS: tuple[Operation, ...] = (
    *(Operation(name, _given, _leaf_text, _free) for name in LEAVES),
    Operation("number", _to_scalar, _number_text, _free),
    Operation("eye", _given, _eye_text, _free),
    Operation("full", _given, _full_text, _free),
    Operation("map", _broadcast, _map_text, _pointwise),
    Operation("add", _broadcast, _add_text, _pointwise),
    Operation("scale", lambda args, attrs: broadcast(args[0], args[1]), _scale_text, _pointwise),
    Operation("product", lambda args, attrs: _product_axes(args[1:], attrs), _leaf_text, _product_cost),
    Operation("matmul", _product_axes, _matmul_text, _product_cost),
    Operation(
        "weighed_product",
        lambda args, attrs: (args[0][0], args[2][0]),
        _weighed_product_text,
        _weighed_product_cost,
        ("weighed_product",),
    ),
    Operation(
        "identity_and_members",
        lambda args, attrs: (args[0][0], args[0][0]),
        _identity_and_members_text,
        _weighed_product_cost,
        ("identity_and_members",),
    ),
    Operation("contract", _product_axes, lambda out, args, c: einsum(out, args[0], args[1]), _product_cost),
    Operation("prox", _broadcast, _prox_text, _pointwise),
    Operation("detach", _same, lambda out, args, c: args[0].text.then(".detach()"), _free),
    Operation("sum", _along, _reduction("sum"), _pointwise),
    Operation("length", _along, _length_text, _pointwise),
    Operation("unit", _same, _unit_text, _pointwise, ("unit",)),
    Operation("logsumexp", _along, _reduction("logsumexp"), _pointwise),
    Operation("max", _along, _reduction("amax"), _pointwise),
    Operation("softmax", _same, _softmax_text, _pointwise),
    Operation("family_sum", _same, _over_family("sum"), _pointwise),
    Operation("family_logsumexp", _same, _over_family("logsumexp"), _pointwise),
    Operation("family_softmax", _same, _over_family("softmax"), _pointwise),
    Operation("sort", _same, _sort_text, _pointwise),
    Operation("top", _same, _top_text, _pointwise),
    Operation("div", _to_scalar, _div_text, _cubic, ("div",)),
    Operation("signs", _given, _signs_text, _pointwise, ("signs",)),
    Operation("factor", _factor_axes, _factor_text, _cubic),
    Operation("norm", _same, _norm_text, _pointwise),
    Operation(
        "dropout",
        _same,
        lambda out, args, c: Text(f"F.dropout({args[0].text.code}, {args[1].text.code}, self.training)"),
        _pointwise,
    ),
    Operation("drop_path", _same, _drop_path_text, _pointwise, ("drop_path",)),
    Operation("running_sum", _same, _running_text, _pointwise),
    Operation("attention", _same, _attention_text, _attention_cost),
    # of the last tokens of a text, what those before left being kept: see growing.py
    Operation("keep", _resized, _kept("all"), _free),
    Operation("latest", _resized, _latest_text, _free),
    Operation("running_sum_so_far", _same, _kept("sum"), _pointwise),
    Operation("softmax_so_far", _same, _softmax_so_far_text, _pointwise, ("softmax_so_far",)),
    Operation("attend", _same, _attend_text, _attention_cost, ("attend",)),
    Operation("diag", lambda args, attrs: (args[0][0], args[0][0]), _diag_text, _pointwise),
    Operation("diagonal", lambda args, attrs: (args[0][0], ONE), _diagonal_text, _pointwise),
    Operation("trace", _to_scalar, _trace_text, _pointwise),
    Operation("trace_product", _to_scalar, _trace_product_text, _pointwise),
    Operation("inverse", _same, _call("inverse"), _cubic, ("inverse",)),
    Operation("cholesky", _same, _call("cholesky"), _cubic, ("cholesky",)),
    Operation("cholesky_inverse", _same, _call("cholesky_inverse"), _cubic, ("cholesky_inverse",)),
    Operation("solve", lambda args, attrs: args[1], _solve_text("solve"), _cubic, ("solve",)),
    Operation(
        "cholesky_solve",
        lambda args, attrs: args[1],
        _solve_text("cholesky_solve"),
        _cubic,
        ("cholesky_solve",),
    ),
    Operation("solve_differences", _same, _solve_differences_text, _pointwise, ("solve_differences",)),
    Operation("logdet_cholesky", _to_scalar, _call("logdet_cholesky"), _pointwise, ("logdet_cholesky",)),
    Operation("spectral_norm", _to_scalar, _call("spectral_norm"), _cubic, ("spectral_norm",)),
    Operation("spectral_sum", _to_scalar, _spectral_sum_text, _cubic, ("spectral_sum",)),
    Operation("spectral_map", lambda args, attrs: args[0], _spectral_map_text, _cubic, ("spectral_map",)),
    Operation(
        "difference",
        lambda args, attrs: (args[0][0] + (1 if attrs[1] else -1), args[0][1]),
        _difference_text,
        _pointwise,
    ),
    Operation("shifts", _operator_axes("shifts"), _shifts_text, _pointwise, ("shifts", "shifts_adjoint")),
    Operation("repeat", _operator_axes("repeat"), _repeat_text, _pointwise),
    Operation("first", _operator_axes("first"), _first_text, _pointwise),
    Operation("groups", _operator_axes("groups"), _groups_text, _free),
    Operation("spectrum", _spectrum_axes, _spectrum_text, _pointwise, ("spectrum",)),
    Operation("signal", _signal_axes, _signal_text, _pointwise, ("signal",)),
    Operation("energy", lambda args, attrs: (ONE, args[0][1]), _energy_text, _pointwise, ("energy",)),
    Operation("frequency_sum", _same, _frequency_sum_text, _pointwise, ("frequency_sum",)),
    Operation("conjugate", _same, lambda out, args, c: args[0].text.then(".conj()"), _free),
    Operation("logdet_hermitian", _to_scalar, _logdet_text, _cubic, ("logdet_hermitian",)),
    Operation("spectral_prox", lambda args, attrs: args[0], _spectral_prox_text, _cubic, ("spectral_map",)),
    Operation("spectral_divergence", _to_scalar, _spectral_divergence_text, _cubic),
    Operation("multiplier", lambda args, attrs: (ONE, args[0][1]), _multiplier_text, _pointwise, ("multiplier",)),
    Operation("sweep", lambda args, attrs: args[2], _sweep_text, _sweep_cost, ("sweep",)),
    Operation("project", _same, _project_text, _pointwise),
    Operation("curve", _same, _curve_text, _pointwise),
    Operation("indicator", _to_scalar, _indicator_text, _pointwise, ("indicator",)),
)
BY_NAME = {op.name: op for op in OPERATIONS}


@lru_cache(2**16)
def shape_of(op: str, shapes: tuple[Shape, ...], attrs: tuple[Any, ...]) -> Shape:
    """The shape of op(inputs). Raises ShapeError."""
    return BY_NAME[op].axes(shapes, attrs)


# --- helpers: functions that emitted text calls -----------------------------------------------------------------------

_EXACT = '''def exact(f):
    """Linear algebra in float32 or better, under autocast too."""

    @functools.wraps(f)
    def run(*args):
        x = next(a for a in args if isinstance(a, torch.Tensor))
        low = (torch.float16, torch.bfloat16)
        wide = [a.float() if isinstance(a, torch.Tensor) and a.dtype in low else a for a in args]
        with torch.autocast(x.device.type, enabled=False):
            return f(*wide).to(x.dtype)

    return run
'''


@dataclass(frozen=True)
class Helper:
    """Source text of a function, and the helpers it calls."""

    source: str
    needs: tuple[str, ...] = ()


def _exact(name: str, args: str, doc: str, body: str, needs: tuple[str, ...] = ()) -> Helper:
    lines = body.replace("\n", "\n    ")
    return Helper(f'@exact\ndef {name}({args}):\n    """{doc}"""\n    {lines}\n', ("exact", *needs))


HELPERS: dict[str, Helper] = {
    "drop_path": Helper(
        '''def drop_path(x, rate, axes, training):
    """x, or 0, for each sample by chance, scaled so that its mean stays (Huang et al. 2016, arXiv:1603.09382). axes: those of a sample."""
    if not training or rate == 0:
        return x
    kept = torch.empty(x.shape[: x.ndim - axes] + (1,) * axes, dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * kept / (1 - rate)
'''
    ),
    "top": Helper(
        '''def top(v, p):
    """1 where an entry is among the share p of largest magnitudes, as many as p n says, rounded; of equals at its end, none."""
    size = v.detach().abs()
    n = size.shape[-1]
    count = math.floor(p * n * (1 + 1e-6) + 0.5)
    if not 0 < count < n:
        return torch.full_like(size, 1 if count >= n else 0)
    return (size > size.topk(count + 1, dim=-1, sorted=False).values.amin(-1, keepdim=True)).to(v.dtype)
'''
    ),
    "top_each": Helper(
        '''def top_each(v, p):
    """1 where an entry is among the share p, of its own sample, of largest magnitudes: p n of them, rounded; of equals at its end, none."""
    size = v.detach().abs()
    n = size.shape[-1]
    count = (p.detach().nan_to_num(0) * (n * (1 + 1e-6)) + 0.5).floor().clamp(0, n).long()
    least = F.pad(size, (0, 1), value=-1).sort(dim=-1, descending=True).values
    return (size > least.gather(-1, count.expand(*size.shape[:-1], 1))).to(v.dtype)
'''
    ),
    "causal_softmax": Helper(
        '''def causal_softmax(x, dim):
    """Softmax along dim (-1 or -2) of square matrices: what is looked at comes no later than what looks."""
    seen = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    return x.masked_fill(~(seen.tril() if dim == -1 else seen.triu()), -math.inf).softmax(dim)
'''
    ),
    "softmax_so_far": Helper(
        '''def softmax_so_far(x, dim):
    """Softmax along dim (-1 or -2) of what all tokens so far are to the last ones: what is looked at comes no later than what looks."""
    seen, later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device), x.shape[-1] - x.shape[-2]
    return x.masked_fill(~(seen.tril(later) if dim == -1 else seen.triu(later)), -math.inf).softmax(dim)
'''
    ),
    "attend": Helper(
        '''def attend(v, so_far, scale):
    """What the last tokens v take from all so far, themselves among them, as causal attention has it."""
    n, m = v.shape[-2], so_far.shape[-2]
    seen = None if n == 1 else torch.ones(n, m, dtype=torch.bool, device=v.device).tril(m - n)
    return F.scaled_dot_product_attention(v, so_far, so_far, seen, scale=scale)
'''
    ),
    "weighed_product": Helper(
        '''def weighed_product(x, weights, y):
    """X' diag(w) Y for every row w of weights. Samples, the rows of X and Y, that weigh 0 are left out where that may be:
    not in batches, where code is compiled or mapped, and for a derivative in w."""
    constant = not weights.requires_grad and torch.autograd.forward_ad.unpack_dual(weights).tangent is None
    if constant and x.ndim == y.ndim == weights.ndim == 2 and not torch.compiler.is_compiling():
        try:
            kept = [w.nonzero().squeeze(-1) for w in weights]
            return torch.stack([x[i].mT @ (w[i, None] * y[i]) for w, i in zip(weights, kept)])
        except RuntimeError:  # of torch.func.vmap
            pass
    return x.mT.unsqueeze(-3) @ (weights.unsqueeze(-1) * y.unsqueeze(-3))
'''
    ),
    "identity_and_members": Helper(
        '''def identity_and_members(x, weights, t):
    """I + t X' diag(w) X for every row w of weights; or, where fewer samples than columns weigh anything, the matrix over these samples
    that has the same determinant. Not in batches, where code is compiled or mapped, and for a derivative in w."""
    constant = not weights.requires_grad and torch.autograd.forward_ad.unpack_dual(weights).tangent is None
    t = t[..., None, None] if torch.is_tensor(t) else t
    if constant and x.ndim == weights.ndim == 2 and not torch.compiler.is_compiling():
        try:
            most = int((weights != 0).sum(-1).max())
            if most < x.shape[-1] and bool((weights >= 0).all()):
                w, i = weights.topk(most)
                y = w.sqrt()[..., None] * x[i]
                return torch.eye(most, dtype=x.dtype, device=x.device) + t * (y @ y.mT)
        except RuntimeError:  # of torch.func.vmap
            pass
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + t * weighed_product(x, weights, x)
''',
        ("weighed_product",),
    ),
    "exact": Helper(_EXACT),
    "inverse": _exact("inverse", "m", "inv(m).", "return torch.linalg.inv(m)"),
    "cholesky": _exact(
        "cholesky",
        "s",
        "Lower l with l l' = s, s symmetric (Hermitian) positive definite.",
        "return torch.linalg.cholesky(s)",
    ),
    "cholesky_inverse": _exact("cholesky_inverse", "l", "inv(l l').", "return torch.cholesky_inverse(l)"),
    "beside_one_another": Helper(
        '''def beside_one_another(b):
    """The columns of all samples as one matrix, and the way back: what one matrix solves at once, it is not repeated for."""
    moved = b.movedim(-2, 0)
    return moved.flatten(1), lambda x: x.reshape(moved.shape).movedim(0, -2)
'''
    ),
    "solve": _exact(
        "solve",
        "m, b",
        "inv(m) b.",
        "if m.ndim > 2 or b.ndim < 3:\n    return torch.linalg.solve(m, b)\n"
        "columns, back = beside_one_another(b)\nreturn back(torch.linalg.solve(m, columns))",
        ("beside_one_another",),
    ),
    "cholesky_solve": _exact(
        "cholesky_solve",
        "l, b",
        "inv(l l') b.",
        "if l.ndim > 2 or b.ndim < 3:\n    return torch.cholesky_solve(b, l)\n"
        "columns, back = beside_one_another(b)\nreturn back(torch.cholesky_solve(columns, l))",
        ("beside_one_another",),
    ),
    "logdet_cholesky": _exact(
        "logdet_cholesky", "l", "log det(l l').", "return 2 * l.diagonal(dim1=-2, dim2=-1).log().sum(-1)"
    ),
    "logdet_hermitian": Helper(
        '''def logdet_hermitian(m):
    """log det of Hermitian positive definite matrices."""
    return 2 * torch.linalg.cholesky(m).diagonal(dim1=-2, dim2=-1).real.log().sum(-1)
'''
    ),
    "places": Helper(
        '''def places(sizes):
    """Every place of a grid, the last axis first."""
    return [p for n in sizes[:1] for k in range(n) for p in ([(k, *q) for q in places(sizes[1:])])] if sizes else [()]
'''
    ),
    "shifts": Helper(
        '''def shifts(x, *sizes):
    """All cyclic shifts of every row, channels by places: one row for each."""
    x, axes = x.unflatten(-1, (-1, *sizes)), tuple(range(-len(sizes), 0))
    return torch.stack([x.roll(s, axes).flatten(-len(sizes) - 1) for s in places(sizes)], -2).flatten(-3, -2)
''',
        ("places",),
    ),
    "shifts_adjoint": Helper(
        '''def shifts_adjoint(y, *sizes):
    """Rows that are cyclic shifts of one another, moved back and summed: the adjoint of shifts."""
    moves, axes = places(sizes), tuple(range(-len(sizes), 0))
    y = y.unflatten(-1, (-1, *sizes)).unflatten(-2 - len(sizes), (-1, len(moves)))
    return sum(part.roll([-n for n in s], axes) for part, s in zip(y.unbind(-2 - len(sizes)), moves)).flatten(-len(sizes) - 1)
''',
        ("places",),
    ),
    "transform": Helper(
        '''def transform(f, x, **options):
    """f of x; of a batch of none too, which not every library of transforms takes."""
    if x.numel():
        return f(x, **options)
    one = x.new_zeros([n or 1 for n in x.shape]) + x.sum()
    return f(one, **options)[tuple(slice(None if n else 0) for n in x.shape)]
'''
    ),
    "spectrum": Helper(
        '''def spectrum(x, dim, to, *sizes):
    """Orthonormal Fourier transform over places: axis dim, channels by places, keeps the channels; the frequencies become axis to.

    Of frequencies that are conjugate to one another, one is kept.
    """
    x = (x if x.dtype == torch.float64 else x.float()).unflatten(dim, (-1, *sizes))
    axes = tuple(range(dim - len(sizes) + 1, dim + 1))
    return transform(torch.fft.rfftn, x, dim=axes, norm="ortho").flatten(axes[0], dim).movedim(dim, to)
''',
        ("transform",),
    ),
    "energy": Helper(
        '''def energy(x, dim):
    """Sum of |x|^2 along an axis."""
    return (x.real.square() + x.imag.square()).sum(dim)
'''
    ),
    "frequency_sum": Helper(
        '''def frequency_sum(x, dim, *sizes):
    """Sum of a real function over all frequencies, from its values at those that spectrum keeps."""
    n = sizes[-1]
    x = x.movedim(dim, -1).unflatten(-1, (-1, n // 2 + 1))
    alone = x[..., 0] if n % 2 else x[..., 0] + x[..., n // 2]  # the others stand for two
    return (2 * x.sum(-1) - alone).sum(-1)
'''
    ),
    "signal": Helper(
        '''def signal(v, of, dim, *sizes):
    """The inverse of spectrum: the frequencies, axis of, go back into axis dim."""
    v = v.movedim(of, dim).unflatten(dim, (*sizes[:-1], sizes[-1] // 2 + 1))
    axes = tuple(range(dim - len(sizes) + 1, dim + 1))
    return transform(torch.fft.irfftn, v, s=sizes, dim=axes, norm="ortho").flatten(axes[0] - 1, dim)
''',
        ("transform",),
    ),
    "power": Helper(
        '''def power(x, p):
    """x ** p for x >= 0, 0 < p < 1, with slope 0 at 0."""
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x) ** p)
'''
    ),
    "expm1": Helper(
        '''def expm1(x):
    """e^x - 1, right near 0, and so is its slope e^x far below."""
    return torch.where(x > -0.5, torch.expm1(x.clamp_min(-0.5)), torch.exp(x.clamp_max(-0.5)) - 1)
'''
    ),
    "logcosh": Helper(
        '''def logcosh(x):
    """log cosh x, right near 0; beyond 20 it is |x| - log 2."""
    return torch.log1p(2 * torch.sinh(x.clamp(-20, 20) / 2).square()) + torch.relu(x.abs() - 20)
'''
    ),
    "unit": Helper(
        '''def unit(x, dim):
    """x over its length; 0, with slope 0, for 0."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return torch.where(length == 0, 0, x / torch.where(length == 0, 1, length))
'''
    ),
    "pinv": _exact("pinv", "m", "The pseudoinverse.", "return torch.linalg.pinv(m)"),
    "turned_up": Helper(
        '''def turned_up(u):
    """The sign of each column that makes its largest entry positive."""
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1, 1).to(u.dtype)
'''
    ),
    "svd_u": _exact(
        "svd_u",
        "m",
        "Left singular vectors.",
        "u = torch.linalg.svd(m, full_matrices=False).U\nreturn u * turned_up(u)",
        ("turned_up",),
    ),
    "svd_s": _exact("svd_s", "m", "Singular values, the largest first.", "return torch.linalg.svdvals(m)"),
    "svd_v": _exact(
        "svd_v",
        "m",
        "Right singular vectors.",
        "u, _, vt = torch.linalg.svd(m, full_matrices=False)\nreturn vt.mT * turned_up(u)",
        ("turned_up",),
    ),
    "qr_q": _exact(
        "qr_q",
        "m",
        "The orthonormal factor of m = q r.",
        "q, r = torch.linalg.qr(m)\nreturn q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[..., None, :]",
    ),
    "qr_r": _exact(
        "qr_r",
        "m",
        "The triangular factor of m = q r, its diagonal not negative.",
        "r = torch.linalg.qr(m).R\nreturn r * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[..., None]",
    ),
    "eigh_values": _exact("eigh_values", "m", "Eigenvalues, the smallest first.", "return torch.linalg.eigvalsh(m)"),
    "eigh_vectors": _exact(
        "eigh_vectors",
        "m",
        "Eigenvectors.",
        "q = torch.linalg.eigh(m).eigenvectors\nreturn q * turned_up(q)",
        ("turned_up",),
    ),
    "spectral_norm": _exact(
        "spectral_norm",
        "m",
        "Largest singular value, from the Gram matrix of the smaller side.",
        "gram = m @ m.mT if m.shape[-2] <= m.shape[-1] else m.mT @ m\n"
        "top = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0)\n"
        "return torch.where(top == 0, 0, torch.where(top == 0, 1, top).sqrt())  # slope 0 at 0",
    ),
    "spectral_sum": _exact(
        "spectral_sum",
        "x, h",
        "Sum of h over the singular values; those that only rounding tells from 0 are 0, and have slope 0.",
        "s = torch.linalg.svdvals(x)\nleast = s.amax(-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(s.dtype).eps\n"
        "return torch.where(s > least, h(torch.where(s > least, s, 1)), h(torch.zeros_like(s))).sum(-1)",
    ),
    "divided_difference": Helper(spectral.DIVIDED),
    "Recomposed": Helper(spectral.RECOMPOSED, ("divided_difference",)),
    "RecomposedForward": Helper(spectral.FORWARD, ("Recomposed",)),
    "recomposed": Helper(spectral.CHOSEN, ("RecomposedForward",)),
    "spectral_map": _exact(
        "spectral_map",
        "x, h, slope",
        "U h(S) V' for x = U S V'. slope: that of h, from s and h(s).",
        spectral.SPECTRAL_MAP,
        ("recomposed",),
    ),
    "spectral_divergence": _exact(
        "spectral_divergence",
        "x, h, slope",
        "The divergence of U h(S) V' in x = U S V'. slope: that of h, from s and h(s).",
        spectral.SPECTRAL_DIVERGENCE,
        ("divided_difference",),
    ),
    "symmetric_divergence": _exact(
        "symmetric_divergence",
        "x, h, slope",
        "The divergence in x of Q h(W) Q' for (x + x') / 2 = Q W Q', over all entries. slope: that of h, from w and h(w).",
        spectral.SYMMETRIC_DIVERGENCE,
        ("divided_difference",),
    ),
    "div": Helper(
        '''def div(e, x, axes, probes, fresh):
    """The trace of the Jacobian of e in x, of which it was made, per sample; axes: of one sample, the last ones. probes: 0, or b' J b for so
    many b of random signs, its mean; fresh: drawn anew in each call, for each sample, else from seeds 0, 1, .. for all samples.
    """
    shape, keep = x.shape[x.ndim - axes :], {"create_graph": torch.is_grad_enabled(), "retain_graph": True, "allow_unused": True}
    if x.ndim == axes < e.ndim:
        raise LookupError("a divergence is taken in one input for all samples, and not in that of each")

    def slope(e, b):
        found = torch.autograd.grad(e, x, b, **keep)[0] if e.requires_grad else None
        if found is None:
            raise LookupError("a divergence is taken in an input that the answer was not made of")
        return found

    def along(b):
        found = slope(e, b.expand_as(e)) * b
        return found.flatten(e.ndim - axes).sum(-1) if axes else found

    if not (probes and fresh) and x.ndim > axes and not torch.compiler.is_compiling():  # where signs are drawn for each sample, others count 0 in the mean
        first, *_ = e.reshape(-1, *shape).split(1) if e.numel() else (None,)
        if first is not None and slope(first, torch.ones_like(first)).reshape(-1, *shape)[1:].any():
            raise LookupError("a divergence is taken of a network that mixes samples, as batch norm does in training")
    if not probes:
        return sum(along(b.reshape(shape)) for b in torch.eye(math.prod(shape), dtype=e.dtype, device=e.device))
    signs = (
        torch.randint(0, 2, x.shape, device=x.device) if fresh else torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(k))
        for k in range(probes)
    )
    return sum(along((2 * b - 1).to(e)) for b in signs) / probes
'''
    ),
    "signs": Helper(
        '''def signs(seed, like, *shape):
    """1 and -1 at random, drawn from a seed."""
    drawn = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).to(like)
'''
    ),
    "xlogy": Helper(
        '''def xlogy(x, y):
    """x log y, 0 where x is 0, and so is its slope in y."""
    return torch.xlogy(x, torch.where((x == 0) & (y == 0), 1, y))
'''
    ),
    "softplus_inverse": Helper(
        'def softplus_inverse(y):\n    """x with softplus(x) = y > 0."""\n    return y + torch.log(-torch.expm1(-y))\n'
    ),
    "indicator": Helper(
        '''def indicator(x, nearest, axes):
    """0 where x is, up to rounding, its nearest point of the set; infinite elsewhere."""
    gap, size = (x - nearest).abs(), x.abs()
    gap, size = (gap.amax(axes), size.amax(axes)) if axes else (gap, size)
    inside = gap <= torch.finfo(x.dtype).eps ** (2 / 3) * size.clamp_min(1)
    return torch.zeros_like(gap).masked_fill(~inside, math.inf)
'''
    ),
    "solve_differences": _exact(
        "solve_differences",
        "v, a, b",
        "(a I + b D'D)^-1 v along the last axis, D v = v.diff(): of v and its mirror image in turn, without an end, each frequency by itself.",
        "n = v.shape[-1]\nhalf = torch.arange(n + 1, dtype=v.dtype, device=v.device) * (math.pi / (2 * n))\n"
        "waves = transform(torch.fft.rfft, torch.cat([v, v.flip(-1)], -1)) / (a + 4 * b * half.sin().square())\n"
        "return transform(torch.fft.irfft, waves, n=2 * n)[..., :n]",
        ("transform",),
    ),
    "piece_of": Helper(curves.PIECE_OF),
    "along": Helper(curves.ALONG, ("piece_of",)),
    "Along": Helper(curves.ALONG_RULE, ("along", "piece_of")),
    "on_pieces": Helper(curves.ON_PIECES, ("along", "Along")),
    "curve": Helper(curves.CURVE, ("on_pieces",)),
    "spline": Helper(curves.SPLINE, ("on_pieces",)),
    "odd": Helper(curves.ODD),
    "Kept": Helper(curves.KEPT),
    "rising": Helper(curves.RISING, ("Kept",)),
    "piece_means": Helper(
        '''def piece_means(v, jump):
    """v with the mean of its piece in each place; pieces end where jump, one shorter than v, is not 0."""
    piece = F.pad((jump != 0).cumsum(-1), (1, 0))
    count = torch.zeros_like(v).scatter_add(-1, piece, torch.ones_like(v)).clamp_min(1)
    return (torch.zeros_like(v).scatter_add(-1, piece, v) / count).gather(-1, piece)
'''
    ),
    "above_level": Helper(
        '''def above_level(v, t, jump, level):
    """Where is the minimiser of sum(t |jumps|) + |z - v|^2 / 2 above a level, one for each piece of known jumps? 1 or 0.

    The slope of the best cost up to a place, at the level, is clipped from place to place: clips are composed by doubling.
    """
    start, end = F.pad(jump != 0, (1, 0), value=True), F.pad(jump != 0, (0, 1), value=True)
    left, right, bound = F.pad(t * jump, (1, 0)), F.pad(t * jump, (0, 1)), F.pad(t, (0, 1), value=math.inf)
    move, low, high, far = level - v, -bound, bound, 1  # slope -> clip(slope + move, low, high)
    low = torch.where(start, (left + move).clamp(low, high), low)
    high = torch.where(start, low, high)
    while far < v.shape[-1]:
        shifted = zip((low, high, move), (-math.inf, math.inf, 0))
        a, b, c = (F.pad(x[..., :-far], (far, 0), value=first) for x, first in shifted)
        low, high, move, far = (a + move).clamp(low, high), (b + move).clamp(low, high), c + move, 2 * far
    slope = torch.where(start, left, F.pad(low[..., :-1], (1, 0))) + (level - v)
    up, known = torch.where(end, slope < right, slope < 0), end | (slope.abs() > bound)
    place = torch.arange(v.shape[-1], device=v.device)  # what is not known is as the next that is
    ahead = torch.where(known, place, v.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return up.gather(-1, ahead).to(v)
'''
    ),
    "signs_of_jumps": Helper(
        '''@torch.no_grad()
def signs_of_jumps(v, t):
    """1, 0 or -1 between neighbours of the minimiser: no two of a piece lie on different sides of its mean.

    Compiled or mapped code, which cannot ask whether all is found, halves the levels down to rounding instead.
    """
    try:
        asks = not (torch.compiler.is_compiling() or v.isnan().any())
    except RuntimeError:  # of torch.func.vmap
        asks = False
    jump, low, high = torch.zeros_like(v[..., 1:]), v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    for _ in range(v.shape[-1] if asks else 2 - round(math.log2(torch.finfo(v.dtype).eps))):
        pull = t * jump
        level = piece_means(v + F.pad(pull, (0, 1)) - F.pad(pull, (1, 0)), jump) if asks else (low + high) / 2
        up = above_level(v, t, jump, level)
        found = torch.where(jump != 0, jump, up.diff(dim=-1))
        if asks and torch.equal(found, jump):
            break
        jump, low, high = found, torch.where(up > 0, level, low), torch.where(up > 0, high, level)
    return jump
''',
        ("piece_means", "above_level"),
    ),
    "prox_tv": _exact(
        "prox_tv",
        "v, t",
        "argmin over z of sum(t |differences of neighbours of z|) + |z - v|^2 / 2, along the last axis, t >= 0: the jumps by levels\n"
        "    (Chambolle & Darbon 2009, doi:10.1007/s11263-009-0238-9; Johnson 2013, doi:10.1080/10618600.2012.681238), then means of pieces.",
        "t = torch.as_tensor(t, dtype=v.dtype, device=v.device).expand(v[..., 1:].shape)\n"
        "jump = signs_of_jumps(v.detach(), t.detach())\n"
        "v = v + F.pad(t * jump, (0, 1)) - F.pad(t * jump, (1, 0))\nmean = piece_means(v, jump).detach()\n"
        "return mean + piece_means(v - mean, jump)  # means of what is small: no rounding of long sums",
        ("signs_of_jumps",),
    ),
    "descending_jumps": Helper(
        '''@torch.no_grad()
def descending_jumps(v):
    """1 between neighbours of the nearest v that falls, or stays, from entry to entry where it falls, else 0: neighbours out of order
    are pooled, all at once. Compiled or mapped code, which cannot ask whether any are left, compares the means of all stretches.
    """
    try:
        asks = not (torch.compiler.is_compiling() or v.isnan().any())
    except RuntimeError:  # of torch.func.vmap
        asks = False
    n, jump = v.shape[-1], torch.ones_like(v[..., 1:])
    if not asks:  # x_i = min over j <= i of the max over k >= i of the mean of v_j .. v_k
        place = torch.arange(n, device=v.device)
        sums = F.pad((v - v.mean(-1, keepdim=True)).cumsum(-1), (1, 0))
        length = place + 1 - place[:, None]
        mean = (sums[..., None, 1:] - sums[..., :-1, None]) / length.where(length > 0, 1)
        most = mean.flip(-1).cummax(-1).values.flip(-1)
        return -most.masked_fill(length < 1, math.inf).amin(-2).diff(dim=-1).sign()
    for _ in range(n):
        found = jump * (piece_means(v, jump).diff(dim=-1) < 0)
        if torch.equal(found, jump):
            break
        jump = found
    return jump
''',
        ("piece_means",),
    ),
    "prox_sorted_l1": _exact(
        "prox_sorted_l1",
        "v, w",
        "argmin over z of w times the magnitudes of z, the largest first, + |z - v|^2 / 2, along the last axis; 0 <= w falls, or stays (Bogdan,\n"
        "    van den Berg, Sabatti, Su & Candes 2015, doi:10.1214/15-AOAS842). Magnitudes that meet move as one.",
        "size, order = v.abs().sort(dim=-1, descending=True)\nmoved = size - w\njump = descending_jumps(moved.detach())\n"
        "mean = piece_means(moved, jump).detach()\nx = (mean + piece_means(moved - mean, jump)).relu()\n"
        "return v.sign() * x.gather(-1, order.argsort(-1))",
        ("descending_jumps", "piece_means"),
    ),
    "multiplier": Helper(
        '''def multiplier(prox, value, slope, v, a, total, reach):
    """m with sum(a * prox(v - m a)) = total along the last axis, without that axis. value: the same as prox, without
    derivatives. slope: of the prox, from what it gives.

    The sum falls in m, which is among the entries of reach: their interval is halved down to rounding. Two steps of Newton, inside of what
    is left, are what derivatives go through: those of first and of second order are right.
    """
    def excess(f, m):
        return (a * f(v - m * a)).sum(-1, keepdim=True) - total

    with torch.no_grad():
        low, high = reach.amin(-1, keepdim=True), reach.amax(-1, keepdim=True)
        for _ in range(2 - round(math.log2(torch.finfo(v.dtype).eps))):
            m = low + (high - low) / 2
            above = excess(value, m) > 0
            low, high = torch.where(above, m, low), torch.where(above, high, m)
        m = (low + (high - low) / 2).detach()
        rate = (a * a * slope(value(v - m * a))).sum(-1, keepdim=True).detach()
    for _ in range(2):
        near = m + torch.where(rate == 0, 0, excess(prox, m) / torch.where(rate == 0, 1, rate))
        m = near + (near.clamp(low, high) - near).detach()
    return m.squeeze(-1)
'''
    ),
    "sweep": Helper(
        '''def sweep(step, q, fall, z, *given):
    """One pass over the entries of z, the first one first: each goes to the least of a quadratic and a cost of its own, the others as
    they are by then (Tseng 2001, doi:10.1023/A:1017501703105).

    q: second derivatives of the quadratic, fall: minus its gradient at z. step(v, t, ..): the proximal step of the cost of an entry;
    given: what it takes of each. Where q is 0 on the diagonal, t is 1 / eps in units of its largest: to the least of what is left, near v.
    """
    weight = q.diagonal(dim1=-2, dim2=-1)
    top = weight.amax(-1, keepdim=True)
    least = torch.where(top > 0, top, 1) * torch.finfo(z.dtype).eps
    t = 1 / torch.where(weight > 0, weight, least)
    swept = []
    for i in range(z.shape[-1]):
        own = slice(i, i + 1)
        old, number = z[..., own], t[..., own]
        swept.append(step(old + number * fall[..., :1], number, *(x[..., own] for x in given)))
        fall = fall[..., 1:] - (swept[-1] - old) * q[..., i, i + 1 :]
    return torch.cat(swept, -1)
'''
    ),
    "project_simplex": Helper(
        '''def project_simplex(v, total=1):
    """Nearest point with entries >= 0 that sum to total (Held, Wolfe & Crowder 1974, doi:10.1007/BF01580223)."""
    u = v.sort(dim=-1, descending=True).values
    shift = (u.cumsum(-1) - total) / torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    last = (u > shift).sum(-1, keepdim=True).sub(1).clamp_min(0)
    return (v - shift.gather(-1, last)).clamp_min(0)
'''
    ),
    "project_ball1": Helper(
        '''def project_ball1(v, r):
    """Nearest point whose absolute values sum to at most r (Duchi et al. 2008, doi:10.1145/1390156.1390191)."""
    u = v.abs().sort(dim=-1, descending=True).values
    shift = (u.cumsum(-1) - r) / torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    last = (u > shift).sum(-1, keepdim=True).sub(1).clamp_min(0)
    return v.sign() * (v.abs() - shift.gather(-1, last).clamp_min(0)).clamp_min(0)
'''
    ),
    "project_ball2": Helper(
        '''def project_ball2(v, r):
    """Nearest point of length at most r."""
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return torch.where(length > r, v * (r / length), v)
'''
    ),
    "project_sphere": Helper(
        '''def project_sphere(v):
    """Nearest point of length 1; 0, to which all are as near, stays 0."""
    return unit(v, -1)
''',
        ("unit",),
    ),
    "project_unit_columns": Helper(
        '''def project_unit_columns(v):
    """Nearest point whose columns (here: the last axis) have length at most 1."""
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1)
'''
    ),
    "project_psd": _exact(
        "project_psd", "m", "Nearest symmetric positive semidefinite matrix.", spectral.PSD, ("recomposed",)
    ),
    "prox_volume": _exact(
        "prox_volume",
        "m, t",
        "argmin over symmetric z of -t log det z + |z - m|^2 / 2.",
        spectral.VOLUME,
        ("recomposed",),
    ),
    "project_stiefel": _exact(
        "project_stiefel",
        "m",
        "Nearest matrix with orthonormal columns (here: the last axis): the polar factor; where m has no full rank, one of them.",
        spectral.STIEFEL,
        ("recomposed",),
    ),
    "project_sparse": Helper(
        '''def project_sparse(v, s):
    """Nearest point with at most s entries that are not zero: the s largest."""
    keep = v.abs().topk(min(s, v.shape[-1]), dim=-1).indices
    return torch.zeros_like(v).scatter(-1, keep, v.gather(-1, keep))
'''
    ),
    "project_rank_at_most": _exact(
        "project_rank_at_most", "m, r", "Nearest matrix of rank at most r.", spectral.RANK_AT_MOST, ("recomposed",)
    ),
}
