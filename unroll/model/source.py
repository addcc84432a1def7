"""Parts -> one text: the classes of the layers as they are, and a class around them. Needs torch only."""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize
from dataclasses import dataclass

from unroll.emit.names import Names, remark
from unroll.emit.program import Program
from unroll.emit.section import commented
from unroll.errors import UnrollError
from unroll.language.nodes import Sym
from unroll.model import parts
from unroll.model.parts import Held, Part
from unroll.spec import Spec
from unroll.spec.schema import (
    ClassAttentionHead,
    Drawn,
    LinearEmbed,
    Model,
    PatchEmbed,
    PooledHead,
    SinusoidalPositions,
    StemEmbed,
    TiedHead,
    TokenEmbed,
)

ZERO = ("if layer.bias is not None:", "    layer.bias.zero_()")
DRAWS: dict[str, tuple[str, ...]] = {
    "torch": (
        "uniform within 1 / sqrt(inputs)",
        "bound = layer.weight[0].numel() ** -0.5",
        "for p in layer.parameters():",
        "    p.uniform_(-bound, bound, generator=generator)",
    ),
    "xavier": (
        "uniform, Glorot and Bengio 2010; biases 0",
        "nn.init.xavier_uniform_(layer.weight.flatten(1), generator=generator)",
        *ZERO,
    ),
    "kaiming": (
        "uniform within sqrt(6 / inputs), He et al. 2015; biases 0",
        'nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)',
        *ZERO,
    ),
    "normal": (
        "normal with standard deviation 0.02; biases 0",
        "layer.weight.normal_(0, 0.02, generator=generator)",
        *ZERO,
    ),
}
"""What is drawn, in words; then its lines."""
DRAW = '''def {name}(module, generator):
    """Start linear maps and convolutions: {about}. Norms start as the identity."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
{lines}
        elif isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
            layer.reset_parameters()
'''
FUNCTIONS = {
    "sinusoids": '''def sinusoids(places, width, base):
    """(n, axes) -> (n, axes * width): for each axis the sines, then the cosines, of place / base^(2 i / width)."""
    angle = places.unsqueeze(-1) * base ** (torch.arange(width // 2, dtype=torch.float64) * (-2 / width))
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)
''',
    "fourier": '''def fourier(rows, columns, waves, base):
    """(rows * columns, 2 waves): for row, then column, both scaled to (0, 2 pi], sine and cosine in turn."""
    rates = base ** (torch.arange(waves, dtype=torch.float64) // 2 * (-2 / waves))

    def axis(n):
        angle = torch.arange(1.0, n + 1, dtype=rates.dtype).unsqueeze(1) * (2 * math.pi / (n + 1e-6)) * rates
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)

    return torch.cat([axis(rows).repeat_interleave(columns, 0), axis(columns).repeat(rows, 1)], 1)
''',
    "ClassAttention": '''class ClassAttention(nn.Module):
    """x (B, 1 + N, d), class token first -> the same; the class token attends to all tokens, then two maps."""

    def __init__(self, d, heads, eps):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(d, eps=eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, eps=eps)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x, scales):
        y = self.norm1(x)
        q, k, v = self.qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1 + N, d / heads)
        read = F.scaled_dot_product_attention(q[:, :, :1], k, v).transpose(1, 2).flatten(2)
        x = self.norm2(x + scales[0] * torch.cat([self.out(read), y[:, 1:]], 1))
        first = self.down(F.gelu(self.up(x[:, :1])))
        return x + torch.cat([scales[1] * first, x[:, 1:]], 1)
''',
}
SEES_ALL = ("[:, :, :1], k, v)", "[:, :, :1], k, v, there[:, None, None, :] > 0)")
CALLED = ("def forward(self, x, scales):", "def forward(self, x, scales, there):")
"""What becomes of the attention of a class token where a mask (B, 1 + N) says what is there."""
EXTRA = {"import math": " math.", "from torch.nn import functional as F": " F."}


@dataclass(frozen=True)
class Wrapped:
    """The text of a model, and what it was made from.

    argument: the name of its input.  held: what stands around the layers, each with its start.
    shape: sizes of the input after the batch axis; None is any.
    order: names of what stands before the layers, between them and those of a decoder, and after all.
    """

    model: Model
    body: Program
    decoder: Program | None
    class_name: str
    argument: str
    shape: tuple[int | None, ...]
    held: tuple[Held, ...]
    source: str
    order: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]

    @property
    def tokens(self) -> int | None:
        """N, without the class token."""
        return parts.tokens(self.model)

    @property
    def flat(self) -> bool:
        """Layers of single vectors, with any number of batch axes."""
        return _fed(self.body).rank == 1

    @property
    def fed(self) -> str:
        """The input of the layers that tokens go into."""
        return _fed(self.body).name

    @property
    def there(self) -> str:
        """The input that says which tokens are no padding, "" where there is none."""
        return next(iter(self.body.masks), "")


def wrap(spec: Spec, body: Program, decoder: Program | None) -> Wrapped:
    """The source of a model. Raises UnrollError E420 where its parts and its layers do not fit."""
    model = spec.model
    assert model is not None
    fits(model, body, decoder)
    ins, outs = width(body, "in"), width(body, "out")
    argument = _argument(model, body)
    inner, renamed = _join(body, decoder)
    name = Names(frozenset({*inner.definitions, "draw", *FUNCTIONS})).fresh(f"{body.class_name}Model")
    before = parts.embed(model, ins, argument) + parts.before_layers(model, ins)
    after, calls, between = _after(model, outs, decoder, body.words["symbol", body.masks[0]] if body.masks else "")
    held = (*before.held, *after.held)
    writer = _Writer(model, body, decoder, renamed, name, argument, before, after, calls)
    source = _module(spec, inner, body, [*_functions(model, before + after, next(iter(body.masks), "")), writer.text()])
    last = tuple(h.name for h in after.held if h.name not in between)
    order = (tuple(h.name for h in before.held), between, last)
    return Wrapped(model, body, decoder, name, argument, _shape(model, body), held, source, order)


def _after(model: Model, outs: int, decoder: Program | None, there: str) -> tuple[Part, list[str], tuple[str, ...]]:
    """What stands after the layers, the lines of forward that lead there, and what of it stands before those of a decoder."""
    if model.decoder is None or decoder is None:
        return parts.head(model, outs, there), [], ()
    between = parts.between(model, model.decoder, outs, width(decoder, "in"))
    read = parts.to_pixels(model, model.decoder, width(decoder, "out"))
    names = tuple(h.name for h in between.held)
    return Part((*between.held, *read.held), read.lines), [*between.lines, "x = self.decoder(x)"], names


# --- does it fit? -----------------------------------------------------------------------------------------------------


def _fed(program: Program) -> Sym:
    """The input that tokens go into: the first that is no mask."""
    return next(s for s in program.problem.inputs if s.name not in program.masks)


def width(program: Program, side: str) -> int:
    """d of the tokens that go in or come out. Raises UnrollError E420."""
    fed = tuple(s for s in program.problem.inputs if s.name not in program.masks)
    symbols = fed if side == "in" else program.step.output
    if len(symbols) != 1:
        names = ", ".join(s.name for s in symbols) or "nothing"
        what = "take one input" if side == "in" else "give one variable"
        raise UnrollError("E420", f"layers with a model around them {what}, these have {names}")
    size = program.tensor_sizes(symbols[0])[-1] if symbols[0].rank else None
    if size is None:
        hint = "the first size of [d, N] is a number"
        raise UnrollError("E420", f"{symbols[0].name} has no fixed width", hint=hint)
    return size


def fits(model: Model, body: Program, decoder: Program | None) -> None:
    """Raises UnrollError E420 where widths or numbers of tokens differ."""
    d = width(body, "in")
    symbol = _fed(body)
    count = parts.tokens(model)
    _fits_mask(model, body, decoder)
    if symbol.rank == 1 and (count is not None or model.class_token is not None):
        raise UnrollError("E420", f"{symbol.name} is one vector, not tokens", hint="declare it as [d, N], N: dynamic")
    if symbol.rank == 1 and getattr(model.head, "kind", "tokens") != "tokens":
        raise UnrollError("E420", f"{symbol.name} is one vector: there is nothing to pool", hint="head: {kind: tokens}")
    if symbol.rank == 2 and count is not None:
        fixed = body.tensor_sizes(symbol)[0]
        given = count + (model.class_token is not None)
        if fixed is not None and (fixed != given or isinstance(model.embed, TokenEmbed)):
            hint = f"{symbol.shape[1]}: dynamic"
            raise UnrollError("E420", f"{symbol.name} has {fixed} columns, the model makes {given} tokens", hint=hint)
    if model.decoder is not None and decoder is not None and not model.decoder.embed:
        outs, ins = width(body, "out"), width(decoder, "in")
        if outs != ins:
            hint = "decoder: {embed: true} puts a linear map between them"
            raise UnrollError("E420", f"the layers give tokens of {outs}, the decoder takes {ins}", hint=hint)
    _divides(model, d)
    if isinstance(model.head, ClassAttentionHead) and width(body, "out") % model.head.heads:
        raise UnrollError("E420", f"tokens of {width(body, 'out')} numbers do not divide into {model.head.heads} heads")


def _fits_mask(model: Model, body: Program, decoder: Program | None) -> None:
    """Raises UnrollError E420 for a mask that is of something else than the tokens, and beside patches that are hidden or found."""
    for other in (body, decoder):
        if other is not None and other.masks and (model.mask is not None or model.decoder is not None):
            hint = "leave out the input that is a mask: images have as many patches"
            raise UnrollError(
                "E420", f"the mask {other.masks[0]} is of no use where patches are hidden or found", hint=hint
            )
    for name in body.masks:
        size = body.problem.symbols[name].shape[0]
        if _fed(body).rank != 2 or size != _fed(body).shape[1] or len(body.masks) > 1:
            hint = f"inputs: {{{name}: {{shape: [{_fed(body).shape[-1]}], mask: true}}}}, and no other"
            raise UnrollError("E420", f"a model has one mask, of its tokens; {name} is of {size}", hint=hint)


def _divides(model: Model, d: int) -> None:
    need = 1
    if isinstance(model.positions, SinusoidalPositions):
        need = 4 if isinstance(parts.places(model), tuple) else 2
    if isinstance(model.embed, StemEmbed):
        need = max(need, model.embed.patch // 2)
    if d % need:
        raise UnrollError("E420", f"tokens of {d} numbers: this model needs a multiple of {need}")


def _argument(model: Model, body: Program) -> str:
    match model.embed:
        case PatchEmbed() | StemEmbed():
            return "image"
        case TokenEmbed():
            return "tokens"
        case _:
            return body.words["symbol", _fed(body).name]


def _shape(model: Model, body: Program) -> tuple[int | None, ...]:
    """Sizes of the input after the batch axis; None is any."""
    match model.embed:
        case PatchEmbed(image=image) | StemEmbed(image=image):
            return image
        case TokenEmbed():
            return (None,)
        case e:
            size = e.features if isinstance(e, LinearEmbed) else width(body, "in")
            return (size,) if _fed(body).rank == 1 else (None, size)


def _sizes(shape: tuple[int | None, ...], words: bool) -> list[str]:
    return [("T" if words else "N") if n is None else str(n) for n in shape]


# --- several texts into one -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """A module: its docstring, its imports, its definitions by name."""

    doc: str
    imports: tuple[str, ...]
    definitions: dict[str, str]


def _taken_apart(source: str) -> _Text:
    tree, lines = ast.parse(source), source.splitlines()
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno]) + "\n"
    return _Text(ast.get_docstring(tree, clean=False) or "", tuple(imports), found)


def _join(body: Program, decoder: Program | None) -> tuple[_Text, str]:
    """The definitions of both, those of the decoder under a name of their own where they differ; its class's name."""
    first = _taken_apart(body.source)
    if decoder is None:
        return first, ""
    second = _taken_apart(decoder.source)
    taken, new = {*first.definitions, *second.definitions}, dict[str, str]()
    for name, text in second.definitions.items():
        if first.definitions.get(name, text) != text:
            new[name] = f"{name}_decoder"
            while new[name] in taken:
                new[name] += "_"
            taken.add(new[name])
    moved = {new.get(n, n): _renamed(text, new) for n, text in second.definitions.items()}
    joined = _Text(first.doc, (*first.imports, *second.imports), {**first.definitions, **moved})
    return joined, new.get(decoder.class_name, decoder.class_name)


def _renamed(text: str, new: dict[str, str]) -> str:
    """The text with other names for what it calls: attributes (after a dot) stay."""
    lines = text.splitlines(keepends=True)
    found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for before, token in reversed(list(zip([None, *found], found, strict=False))):
        if token.type == tokenize.NAME and token.string in new and (before is None or before.string != "."):
            row, column = token.start
            line = lines[row - 1]
            lines[row - 1] = line[:column] + new[token.string] + line[column + len(token.string) :]
    return "".join(lines)


def _module(spec: Spec, inner: _Text, body: Program, own: list[str]) -> str:
    definitions = [*inner.definitions.values(), *own]
    text = "\n\n".join(d.strip("\n") + "\n" for d in definitions)
    head = f"{remark(spec.title)}: a model around these layers.\n\n{inner.doc.strip()}"
    imports = {
        *inner.imports,
        "import torch",
        "from torch import nn",
        *(m for m, word in EXTRA.items() if word in text),
    }
    torch = sorted((i for i in imports if "torch" in i), key=lambda i: (i.startswith("from"), i))
    others = sorted(imports - set(torch))
    groups = "\n\n".join("\n".join(g) for g in (others, torch) if g)
    quoted = head.replace("\\", "\\\\").replace('"""', "'''")
    assert body.class_name in inner.definitions, "internal error, please report: the class of the layers is missing"
    return f'"""{quoted}\n"""\n\n{groups}\n\n\n{text}'


def _functions(model: Model, around: Part, there: str) -> list[str]:
    starts = {"draw": model.init, **({"draw_embed": own} if (own := _own_start(model)) else {})}
    found = [FUNCTIONS[name] for name in around.needs]
    if there:  # which tokens the class token may attend to
        found = [text.replace(*SEES_ALL).replace(*CALLED) for text in found]
    for name, init in starts.items():
        about, *lines = DRAWS[init]
        found.append(DRAW.format(name=name, about=about, lines=textwrap.indent("\n".join(lines), " " * 12)))
    return found


def _own_start(model: Model) -> Drawn | None:
    """How the map of patches starts, where it does not start as the others."""
    return model.embed.init if isinstance(model.embed, PatchEmbed) else None


# --- the class --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    model: Model
    body: Program
    decoder: Program | None
    decoder_class: str
    name: str
    argument: str
    before: Part
    after: Part
    calls: list[str]

    @property
    def masked(self) -> bool:
        return self.model.mask is not None

    @property
    def there(self) -> str:
        """The argument that says which tokens are no padding."""
        return self.body.words["symbol", self.body.masks[0]] if self.body.masks else ""

    def text(self) -> str:
        methods = [
            self._init(),
            self._initialise(),
            *self._patches(),
            *self.before.methods,
            self._embedding(),
            self._forward(),
        ]
        if not self.calls:
            methods.insert(-1, self._read())
        inner = "\n\n".join(textwrap.indent(m.strip("\n"), "    ") for m in methods)
        return f'class {self.name}(nn.Module):\n    """{self._doc()}"""\n\n{inner}\n'

    def _doc(self) -> str:
        """Shapes of what comes in and of what goes out."""
        flat = _fed(self.body).rank == 1
        lead = "..." if flat else "B"
        words = isinstance(self.model.embed, TokenEmbed)
        ins = ", ".join([lead, *_sizes(_shape(self.model, self.body), words)])
        n = parts.tokens(self.model)
        count = [] if flat else _sizes((None if words else n,), words)
        if self.calls:
            outs = f"patches ({lead}, {n}, {parts.pixels(self.model)}), mask ({lead}, {n}), True where hidden"
            return f"{self.argument}: ({ins}) -> {outs}."
        outs = ", ".join([lead, *self._answer(count)])
        also = f", {self.there}: ({', '.join([lead, *count])}), 0 for padding" if self.there else ""
        return f"{self.argument}: ({ins}){also} -> ({outs})."

    def _answer(self, count: list[str]) -> list[str]:
        d = str(width(self.body, "out"))
        match self.model.head, self.model.embed:
            case None, _:
                extra = " + 1" if self.model.class_token is not None else ""
                return [*(c + extra for c in count), d]
            case TiedHead(), TokenEmbed(vocabulary=n):
                return [*count, str(n)]
            case PooledHead(kind="tokens", classes=classes), _:
                return [*count, str(classes or d)]
            case head, _:
                return [str(getattr(head, "classes", None) or d)]

    def _init(self) -> str:
        lines = ["super().__init__()"]
        by_name = {"body": (self.body, self.body.class_name, "the layers")}
        if self.decoder is not None:
            by_name["decoder"] = (self.decoder, self.decoder_class, "the layers of the decoder")
        for h in self.before.held:
            lines += _held(h)
        for attribute, (program, class_name, about) in by_name.items():
            args = ", ".join(f"{k}={n}" for k, n in program.init_arguments.items())
            lines.append(commented(f"self.{attribute} = {class_name}({args})", about))
        for h in self.after.held:
            lines += _held(h)
        return "def __init__(self):\n" + textwrap.indent("\n".join(lines), "    ")

    def _initialise(self) -> str:
        held = (*self.before.held, *self.after.held)
        own = ["self.embed"] if _own_start(self.model) else []
        drawn = [name for h in held if h.start in ("linear", "norm") and (name := f"self.{h.name}") not in own]
        lines = ['"""Draw what stands around the layers; they have an `initialise` of their own."""']
        if drawn:
            over = f"({', '.join(drawn)})" if len(drawn) > 1 else f"({drawn[0]},)"
            lines += [f"for module in {over}:", "    draw(module, generator)"]
        lines += [f"draw_embed({name}, generator)" for name in own]
        for h in held:
            if isinstance(h.start, float):
                weight = f"self.{h.name}{'.weight' if 'Embedding' in h.code else ''}"
                lines.append(f"{weight}.normal_(0, {h.start:g}, generator=generator)")
            elif h.start not in ("linear", "norm", ""):
                lines.append(f"self.{h.name}.copy_({h.start})")
        body = textwrap.indent("\n".join([*lines, "return self"]), "    ")
        return f"@torch.no_grad()\ndef initialise(self, generator=None):\n{body}"

    def _patches(self) -> list[str]:
        """The method that cuts an image: what a decoder finds again, else what is embedded."""
        match self.model.embed:
            case PatchEmbed(order=order):
                return [parts.patches(self.model, "patches", self.model.decoder.order if self.model.decoder else order)]
            case StemEmbed() if self.model.decoder is not None:
                return [parts.patches(self.model, "patches", self.model.decoder.order)]
            case _:
                return []

    def _embedding(self) -> str:
        begins = " start: how many are before these." if any(parts.CUT in line for line in self.before.lines) else ""
        lines = [f'"""{self.argument} -> tokens, as the layers take them.{begins}"""', *self.before.lines, "return x"]
        if lines[-2].startswith("x = "):
            lines[-2:] = [f"return {lines[-2].removeprefix('x = ')}"]
        later = ", start=0" if any(parts.CUT in line for line in self.before.lines) else ""
        return f"def embedding(self, {self._arguments()}{later}):\n" + textwrap.indent("\n".join(lines), "    ")

    def _arguments(self) -> str:
        return f"{self.argument}, mask" if self.masked else self.argument

    def _read(self) -> str:
        also = f", {self.there}" if self.there else ""
        return f"def read(self, x{also}):\n" + textwrap.indent(
            "\n".join(['"""Tokens, as they leave the layers -> the answer."""', *self.after.lines]), "    "
        )

    def _forward(self) -> str:
        embedded = f"self.embedding({self._arguments()})"
        if self.there:
            padded = [] if self.model.class_token is None else [f"{self.there} = F.pad({self.there}, (1, 0), value=1)"]
            own = self.body.words["symbol", _fed(self.body).name]
            lines = [
                *padded,
                f"x = self.body({own}={embedded}, {self.there}={self.there})",
                f"return self.read(x, {self.there})",
            ]
            return f"def forward(self, {self.argument}, {self.there}):\n" + textwrap.indent("\n".join(lines), "    ")
        if not self.calls:
            return f"def forward(self, {self.argument}):\n    return self.read(self.body({embedded}))"
        lines = [
            f"mask = self.random_mask({self.argument}) if mask is None else mask",
            f"x = self.body({embedded})", *self.calls, *self.after.lines,
        ]  # fmt: skip
        return f"def forward(self, {self.argument}, mask=None):\n" + textwrap.indent("\n".join(lines), "    ")


def _held(h: Held) -> list[str]:
    if h.code.startswith("buffer("):
        shape = h.code.removeprefix("buffer(")[:-1]
        return commented(f'self.register_buffer("{h.name}", torch.empty({shape}))', h.about).split("\n")
    return commented(f"self.{h.name} = {h.code}", h.about).split("\n")
