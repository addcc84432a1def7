"""Torch source of a derived proximal step: forward in threshold or candidate form, backward from the output alone.

Legend: x = v, or |v| for an even profile; y = z, or |z|; G = t f', so that z + G(z) = x inside a piece.
"""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportArgumentType=false, reportReturnType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp

from unroll.calculus.prox_pieces import Knot, Part, Pieces
from unroll.calculus.roots import LONGEST
from unroll.calculus.torch_text import HELPERS, helpers_in, torch_text
from unroll.language import show

LOCALS = {
    "v", "z", "x", "y", "g", "gv", "dv", "dz", "ctx", "grad", "inputs", "rule", "rad", "torch", "best", "value", "better", "width", "dtype", "sign",
    *dir(builtins), *(h.__name__ for h in HELPERS), "bracketed_root",
}  # fmt: skip
"""Names that the source uses."""
HIGHEST = 4
"""Power of z in a slope that is multiplied out: the square of a large number is one still in float32, its twelfth power is not."""


def emit(prox: Pieces, name: str) -> str:
    """One function NAME(v, *scalars) and the autograd rule behind it; scalars are tensors that broadcast against v."""
    prox, arguments = _named(prox)
    args = ", ".join(["v", *arguments])
    if _is_identity(prox):  # a rule may not return what it was given
        return f'def {name}({args}):\n    """{_docline(prox)}"""\n    return v\n'
    if (end := one_sided(prox)) is not None:  # autograd keeps the output of a relu alone, and so needs no rule
        gap = "v" if end == 0 else f"v - {_grouped(torch_text(end)) if end.is_Add else torch_text(end)}"
        return f'def {name}({args}):\n    """{_docline(prox)}"""\n    return torch.relu({gap})\n'
    sizes = [a for s, a in zip(prox.scalars, arguments, strict=True) if _is_size(s)]
    saved = ", ".join(["z", *(a for a in arguments if a not in sizes)])
    unpack = [f"{saved}{'' if ', ' in saved else ','} = ctx.saved_tensors"]
    unpack += [f"{', '.join(sizes)}, = ctx.sizes"] if sizes else []
    tangents = [f"d{a}" for a in arguments]
    kept = [f"{', '.join(['_', *arguments])} = inputs"] if arguments else []
    kept += [f"ctx.save_for_backward({saved})", f"ctx.save_for_forward({saved})"]
    kept += [f"ctx.sizes = ({', '.join(sizes)},)"] if sizes else []
    alone = [
        "    if not torch.is_grad_enabled():",
        f"        return _{name}.forward({args})",
    ]  # a rule costs time to call
    return "\n".join(
        [
            f"class _{name}(torch.autograd.Function):",
            '    """Derivatives need the output alone: z tells which piece is active."""',
            "",
            "    generate_vmap_rule = True",
            *_method("forward", args, [*_forward(prox), "return z"]),
            *_method("setup_context", "ctx, inputs, z", kept),
            *_method("backward", "ctx, grad", [*unpack, *_backward(prox, arguments)]),
            "",
            "",
            f"class _{name}_forward(_{name}):",
            '    """In forward mode too, which torch.compile does not trace."""',
            *_method("jvp", ", ".join(["ctx", "dv", *tangents]), [*unpack, *_tangent(prox, arguments)]),
            "",
            "",
            f"def {name}({args}):",
            f'    """{_docline(prox)}"""',
            *([] if helpers_of(prox) else alone),  # slopes of what is searched for are those of the rule
            f"    rule = _{name} if torch.compiler.is_compiling() else _{name}_forward",
            f"    return rule.apply({args})",
            "",
        ]
    )


def plain(prox: Pieces, name: str) -> str:
    """What computes the step without its autograd rule, in the text of `emit`."""
    return name if _is_identity(prox) or one_sided(prox) is not None else f"_{name}.forward"


def emit_slope(prox: Pieces, name: str) -> str:
    """One function NAME(z, *scalars): how fast z moves with v, from z."""
    prox, arguments = _named(prox)
    lines = ["grad = torch.ones_like(z)", f"return {_chain(prox, _slopes(prox), lambda knot: sp.S.Zero, 'grad')}"]
    body = _indent(['"""The slope of that step, from what it gives."""', *_size_of(prox, lines)], 4)
    return "\n".join([f"def {name}({', '.join(['z', *arguments])}):", *body, ""])


def _method(name: str, args: str, body: list[str]) -> list[str]:
    return ["", "    @staticmethod", f"    def {name}({args}):", *_indent(body, 8)]


def helpers_of(prox: Pieces) -> set[str]:
    """Names of the runtime operations that the emitted source calls."""
    roots = [r for p in prox.parts for r in p.roots]
    named = {h for r in roots for e in (r.z, r.lo, r.hi) if e is not None for h in helpers_in(e)}
    return named | ({"bracketed_root"} if any(r.z is None for r in roots) else set())


def _docline(prox: Pieces) -> str:
    formula = "" if prox.formula is None else show.text(prox.formula)
    what = f"{formula}, the z that minimises" if 0 < len(formula) < 60 else "argmin over z of"
    return f"{what} {show.text(prox.objective.xreplace({prox.u: sp.Symbol('z')}))} + (z - v)**2/2{_over(*prox.domain)}{prox.tie}"


def _over(lo: sp.Expr, hi: sp.Expr) -> str:
    """The set that z is taken from, where that is not the line."""
    if lo.is_infinite and hi.is_infinite:
        return ""
    if hi.is_infinite:
        return f" subject to z >= {show.text(lo)}"
    return (
        f" subject to z <= {show.text(hi)}"
        if lo.is_infinite
        else f" subject to {show.text(lo)} <= z <= {show.text(hi)}"
    )


def _named(prox: Pieces) -> tuple[Pieces, list[str]]:
    """The prox with scalars renamed to fit Python and not to clash with the names of the source or with one another."""
    new: dict[sp.Symbol, str] = {}
    for s in prox.scalars:  # a size and the step size may both be called `step`
        word = _fit(str(s))
        while word in LOCALS or any(_meet(word, other) or _meet(other, word) for other in new.values()):
            word += "_"
        new[s] = word
    swap = {s: sp.Symbol(n, **s.assumptions0) for s, n in new.items() if n != str(s)}
    return (prox.map(lambda e: e.xreplace(swap)) if swap else prox), list(new.values())


def _is_identity(prox: Pieces) -> bool:
    """Is f constant on the whole line?"""
    values = {*(p.F for p in prox.parts), *(k.value for k in prox.knots if k is not None)}
    return prox.domain == (-sp.oo, sp.oo) and len(values) == 1 and not any(v.has(prox.u) for v in values)


def _is_size(s: sp.Symbol) -> bool:
    """Sizes are numbers of Python, not tensors: nothing is learned through them."""
    return bool(s.is_integer)


def _meet(word: str, other: str) -> bool:
    """Is a word another one, or the name of its derivative?"""
    return word in (other, f"g{other}", f"d{other}")


def _fit(word: str) -> str:
    word = "".join(c if c.isalnum() or c == "_" else "_" for c in word)
    return f"s_{word}" if keyword.iskeyword(word) or not word.isidentifier() else word


def _indent(lines: list[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]


def _forward(prox: Pieces) -> list[str]:
    wide = any(r.kind != "linear" for p in prox.parts for r in p.roots)
    up = ["dtype = torch.promote_types(v.dtype, torch.float32)"] if wide else []
    v = "v.to(dtype)" if wide else "v"
    down = ["z = z.to(v.dtype)"] if wide else []
    body = _threshold(prox, v) if prox.mode == "threshold" else _candidates(prox, v)
    return [*up, *body, *down]


# ---------------------------------------------------------------- forward, threshold form


def segments(prox: Pieces) -> list[tuple[sp.Expr, sp.Expr | None, int]]:
    """(up to which x, the value there or None for a bracketed root, index of the part or −1), ascending in x."""
    out: list[tuple[sp.Expr, sp.Expr | None, int]] = []
    for i, part in enumerate(prox.parts):
        knot, after = prox.knots[i], prox.knots[i + 1]
        if knot is not None and knot.flat:
            out.append((knot.above, knot.at, -1))
        out.append((sp.oo if after is None else after.below, part.roots[0].z, i))
    last = prox.knots[-1]
    if last is not None and last.flat:
        out.append((sp.oo, last.at, -1))
    return out


def textbook(prox: Pieces) -> sp.Expr | None:
    """The whole prox as max, min and sign where it has that shape: soft thresholds, clips, one-sided shrinkage."""
    segs, x = segments(prox), prox.x
    values = [s[1] for s in segs]
    slopes = [sp.diff(z, x) if z is not None else sp.nan for z in values]
    if any(s.has(x) or s is sp.nan for s in slopes):
        return None
    ends = [s[0] for s in segs]
    match slopes:
        case [s]:
            out = values[0]
        case [sp.S.Zero, s]:
            out = values[0] + s * sp.Max(x - ends[0], 0)
        case [s, sp.S.Zero]:
            out = values[1] - s * sp.Max(ends[0] - x, 0)
        case [sp.S.Zero, sp.S.One, sp.S.Zero] if values[1] == x:
            out = sp.Min(sp.Max(x, values[0]), values[2])
        case [sp.S.One, sp.S.Zero, sp.S.One]:
            out = values[1] + sp.Max(x - ends[1], 0) - sp.Max(ends[0] - x, 0)
        case _:
            return None
    assert out is not None
    return sp.sign(prox.v) * out.xreplace({x: sp.Abs(prox.v)}) if prox.even else out.xreplace({x: prox.v})


def one_sided(prox: Pieces) -> sp.Expr | None:
    """c for a prox that is max(0, v - c)."""
    if prox.mode != "threshold" or prox.even or any(r.kind != "linear" for p in prox.parts for r in p.roots):
        return None
    match [(end, value) for end, value, _ in segments(prox)]:
        case [(end, sp.S.Zero), (_, value)] if sp.expand(value - (prox.x - end)) == 0:
            return end
        case _:
            return None


def _threshold(prox: Pieces, v: str) -> list[str]:
    segs, x = segments(prox), prox.x
    short = _short(prox, segs) if textbook(prox) is not None and v == "v" else None
    if short is not None:
        return short
    lines = [f"x = {v}.abs()" if prox.even else f"x = {v}"]
    names: list[str] = []
    for _, value, i in segs:
        if value is None or (i >= 0 and prox.parts[i].roots[0].kind != "linear"):
            lines.append(f"z{i} = {_root_text(prox.parts[i], 0, x)}")
            names.append(f"z{i}")
        else:
            names.append(torch_text(value))
    middle = max(k for k, (_, value, _) in enumerate(segs) if value is None or value.has(x))
    text = names[middle]  # innermost, because a NaN falls through every comparison
    for k in range(middle + 1, len(segs)):
        text = f"torch.where(x > {torch_text(segs[k - 1][0])}, {names[k]}, {text})"
    for k in reversed(range(middle)):
        text = f"torch.where(x <= {torch_text(segs[k][0])}, {names[k]}, {text})"
    lines.append(f"z = v.sign() * {_grouped(text)}" if prox.even else f"z = {text}")
    return lines


def _short(prox: Pieces, segs: list[tuple[sp.Expr, sp.Expr | None, int]]) -> list[str] | None:
    """The fewest kernels for the shapes that every network has: v − clip(v), clip, one-sided."""
    values, ends, x = [s[1] for s in segs], [s[0] for s in segs], prox.x
    slopes = [sp.diff(z, x) for z in values if z is not None]
    scale = slopes[-1]
    times = (
        "" if scale == 1 else f" * ({torch_text(scale)})" if sp.denom(scale) == 1 else f" / ({torch_text(1 / scale)})"
    )
    wrap = (lambda text: f"({text}){times}") if times else (lambda text: text)
    match slopes:
        case [sp.S.Zero, _] if prox.even and values[0] == 0:
            width = torch_text(ends[0])
            named = [] if width.isidentifier() else [f"width = {width}"]
            width = "width" if named else width
            return [*named, f"z = {wrap(f'v - v.clamp(-{width}, {width})')}"]
        case [sp.S.Zero, _] if not prox.even and values[0] == 0:
            gap = "v" if ends[0] == 0 else f"(v - {_grouped(torch_text(ends[0]))})"
            return [f"z = {gap}.clamp_min(0){times}"]
        case [_] if not prox.even:
            return [f"z = {torch_text(values[0].xreplace({x: prox.v}))}"]
        case [sp.S.Zero, sp.S.One, sp.S.Zero] if values[1] == x and not prox.even:
            return [f"z = v{_clip(values[0], values[2])}"]
        case [sp.S.One, sp.S.Zero, sp.S.One] if not prox.even:
            flat = "" if values[1] == 0 else f" + {_grouped(torch_text(values[1]))}"
            return [f"z = v - v{_clip(ends[0], ends[1])}{flat}"]
        case _:
            return None


def _grouped(text: str) -> str:
    return text if text.isidentifier() or (text.startswith("torch.") and text.count("(") == 1) else f"({text})"


def _root_text(part: Part, k: int, x: sp.Symbol) -> str:
    root, u = part.roots[k], part.u
    if root.z is not None:
        text = torch_text(root.z)
        return text if root.kind == "linear" else _clamped(text, part)
    z = sp.Symbol("z")
    h, rise = (e.xreplace({u: z}) for e in (u + part.G - x, 1 + sp.diff(part.G, u)))
    lo, hi = torch_text(root.lo), torch_text(root.hi)
    if root.turn:
        bend = sp.diff(part.G, u, 2).xreplace({u: z})
        turn = f"bracketed_root({_lambda(root.turn * rise)}, {_lambda(root.turn * bend)}, {lo}, {hi}, x)"
        lo, hi = (turn, hi) if root.turn == 1 else (lo, turn)
    return f"bracketed_root({_lambda(h)}, {_lambda(rise)}, {lo}, {hi}, x)"


def _lambda(e: sp.Expr) -> str:
    return f"lambda z: {torch_text(e)}"


def _clamped(text: str, part: Part) -> str:
    """A root kept within its piece: rounding must not move it into the next one."""
    return f"({text}){_clip(part.lo, part.hi)}"


def _clip(lo: sp.Expr, hi: sp.Expr) -> str:
    """The call that keeps a tensor in [lo, hi]; torch takes two tensors or two numbers, not one of each."""
    if lo.is_finite and hi.is_finite and lo.is_number == hi.is_number:
        return f".clamp({torch_text(lo)}, {torch_text(hi)})"
    above = "" if lo == -sp.oo else f".clamp_min({torch_text(lo)})"
    return above if hi == sp.oo else f"{above}.clamp_max({torch_text(hi)})"


# ---------------------------------------------------------------- forward, candidates compared by value


@dataclass(frozen=True)
class Rival:
    """A point that may be the minimiser: its text, its value F(z) + (z − x)²/2, the line that computes it if any."""

    point: str
    value: sp.Expr
    line: str = ""


def _candidates(prox: Pieces, v: str) -> list[str]:
    """The best of all flat knots and of one point per root."""
    first, *rest = _rivals(prox)
    start = [f"x = {v}.abs()" if prox.even else f"x = {v}"]
    if prox.even and first.point == "0" and [r.point for r in rest] == ["x"]:
        return [*start, f"z = torch.where({torch_text(rest[0].value)} >= {torch_text(first.value)}, 0, v)"]
    zero = "torch.zeros_like(x)"
    lines = [*start, *filter(None, [first.line])]
    lines += [f"z = {zero} + {first.point}", f"best = {zero} + {torch_text(first.value)}"]
    for rival in rest:
        lines += [*filter(None, [rival.line]), f"value = {torch_text(rival.value)}", "better = value < best"]
        lines += [f"z, best = torch.where(better, {rival.point}, z), torch.where(better, value, best)"]
    signed = "v.sign() * z" if prox.centred else "torch.where(v < 0, -z, z)" if prox.even else "z"
    return [*lines, f"z = torch.where(x == x, {signed}, v)"]  # a NaN stays one


def _rivals(prox: Pieces) -> list[Rival]:
    x, u = prox.x, prox.u
    knots = [k for k in prox.knots if k is not None and k.flat]
    out = [
        Rival(
            torch_text(k.at), sp.expand(k.value + (k.at - x) ** 2 / 2) if k.at == 0 else k.value + (k.at - x) ** 2 / 2
        )
        for k in knots
    ]
    for i, part in enumerate(prox.parts):
        energy = part.F + (u - x) ** 2 / 2
        for k, root in enumerate(part.roots):
            if prox.even and part.lo == 0 and part.hi == sp.oo and root.z == x:
                out.append(Rival("x", sp.expand(energy.xreplace({u: x}))))
                continue
            name = sp.Symbol(f"z{i}" if len(part.roots) == 1 else f"z{i}{chr(ord('a') + k)}")
            text = _root_text(part, k, x)
            text = _clamped(text, part) if root.kind in ("linear", "bracket") else text
            out.append(Rival(str(name), energy.xreplace({u: name}), f"{name} = {text}"))
    return out


# ---------------------------------------------------------------- backward: implicit derivatives at the output


def _backward(prox: Pieces, arguments: list[str]) -> list[str]:
    """1 + G'(z) in the denominator; at a knot z does not move with v, only with the knot itself."""
    slopes = _slopes(prox)
    if _only_zero_is_flat(prox) and not slopes[0].has(prox.u):
        lines = ["sign = z.sign()", "g = grad * sign", f"gv = {_times('g * sign', slopes[0])}"]
    else:
        lines = [f"gv = {_chain(prox, slopes, lambda knot: sp.S.Zero, 'grad')}"]
        lines += [f"g = {'grad * z.sign()' if prox.even else 'grad'}"] if arguments else []
    for i, (s, argument) in enumerate(zip(prox.scalars, arguments, strict=True)):
        if _is_size(s):
            continue
        moved = _moved(prox, s, "g")
        lines.append(f"g{argument} = {_summed(moved, argument)} if ctx.needs_input_grad[{i + 1}] else None")
    given = ["None" if _is_size(s) else f"g{a}" for s, a in zip(prox.scalars, arguments, strict=True)]
    return [*_size_of(prox, lines), f"return {', '.join(['gv', *given])}"]


def _tangent(prox: Pieces, arguments: list[str]) -> list[str]:
    """How far z moves with v and with the scalars: the derivatives of _backward, forward."""
    lines = [f"dz = {_chain(prox, _slopes(prox), lambda knot: sp.S.Zero, 'dv')}"]
    for s, argument in zip(prox.scalars, arguments, strict=True):
        if _is_size(s):
            continue
        moved = _moved(prox, s, f"d{argument}")
        if not moved.startswith("torch.zeros_like"):
            lines.append(f"dz = dz + {'z.sign() * ' if prox.even else ''}{_grouped(moved)}")
    return [*_size_of(prox, lines), "return dz"]


def _slopes(prox: Pieces) -> list[sp.Expr]:
    return [_neat(1 / (1 + sp.diff(p.G, prox.u)), prox.u) for p in prox.parts]


def _moved(prox: Pieces, s: sp.Symbol, grad: str) -> str:
    """`grad` times the derivative of the output, or of its absolute value, in a scalar."""
    rates = [_neat(-sp.diff(p.G, s) / (1 + sp.diff(p.G, prox.u)), prox.u) for p in prox.parts]
    return _chain(prox, rates, lambda knot: sp.diff(knot.at, s), grad)


def _size_of(prox: Pieces, lines: list[str]) -> list[str]:
    """The lines, after that of |z| where they read it."""
    used = any(re.search(r"\by\b", line) for line in lines)
    return ["y = z.abs()", *lines] if prox.even and used else lines


def _only_zero_is_flat(prox: Pieces) -> bool:
    """The shape of soft and hard thresholds: z = 0, or one smooth piece on either side."""
    first = prox.knots[0]
    return prox.even and len(prox.parts) == 1 and first is not None and first.flat and first.at == 0


def _summed(moved: str, argument: str) -> str:
    """The gradient of a scalar in its own shape."""
    if moved == "torch.zeros_like(g)":
        return f"torch.zeros_like({argument})"
    if moved in ("g", "-g"):
        return f"{moved}.sum_to_size({argument}.shape)"
    return f"{_grouped(moved)}.sum_to_size({argument}.shape)"


def _neat(e: sp.Expr, u: sp.Symbol) -> sp.Expr:
    """One fraction where that is safe, its denominator not beginning with a minus sign.

    e^{−z} is never moved below, nor (1 + z²)^{−4} multiplied out: what vanishes far away would overflow.
    """
    if e.has(sp.exp, sp.cosh, sp.sinh, sp.tanh) or sp.count_ops(e) > LONGEST:
        return e
    top, bottom = sp.fraction(sp.cancel(e))
    if any(side.is_polynomial(u) and sp.degree(side, u) > HIGHEST for side in (top, bottom)):
        return e
    return -top / -bottom if bottom.could_extract_minus_sign() else top / bottom


def _chain(prox: Pieces, values: list[sp.Expr], at_knot: Callable[[Knot], sp.Expr], grad: str) -> str:
    """`grad` times the value of the piece that the output lies in, or of the flat knot that it is."""
    y = sp.Symbol("y" if prox.even else "z")

    def text(e: sp.Expr) -> str:
        return _times(grad, e.xreplace({prox.u: y}))

    knots = [at_knot(k) for k in prox.knots if k is not None]
    finite = all(v.is_number for v in (*values, *knots))  # then 0 times it is 0, and a product is faster than a choice

    def choice(condition: str, yes: str, no: str) -> str:
        if finite and no == "0" != yes:
            return f"{yes} * ({condition})"
        return yes if yes == no else f"torch.where({condition}, {yes}, {no})"

    first, last = prox.knots[0], prox.knots[-1]  # at an end of the domain z may have arrived by rounding
    out = text(values[0])
    if first is not None and (first.flat or not prox.even):
        odd = prox.even and first.at == 0
        vanishes = grad not in ("grad", "dv") and _only_zero_is_flat(prox) and values[0].is_polynomial(prox.u)
        apart = "z != 0" if odd else f"{y} > {torch_text(first.at)}"
        out = out if vanishes else choice(apart, out, text(at_knot(first)))
    for i, knot in enumerate(prox.knots[1:-1], start=1):
        assert knot is not None
        b, after = torch_text(knot.at), text(values[i])
        after = choice(f"{y} > {b}", after, text(at_knot(knot))) if knot.flat else after
        out = choice(f"{y} < {b}", out, after)
    if last is not None:
        out = choice(f"{y} < {torch_text(last.at)}", out, text(at_knot(last)))
    return f"torch.zeros_like({grad})" if out == "0" else out


def _times(grad: str, e: sp.Expr) -> str:
    """grad * e, read as a person would write it."""
    if e == 0:
        return "0"
    minus = "-" if e.could_extract_minus_sign() else ""  # at what is small: each sign of a tensor is a pass over it
    top, bottom = sp.fraction(-e if minus else e)
    if top != 1:
        grad, minus = f"{grad} * {minus}{_grouped(torch_text(top))}", ""
    if bottom != 1:
        grad, minus = f"{grad} / {minus}{_grouped(torch_text(bottom))}", ""
    return f"{minus}{grad}"
