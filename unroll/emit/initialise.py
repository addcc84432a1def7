"""The method `initialise`: every parameter at the value that makes the network the algorithm itself."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

import sympy as sp

from unroll.derivation.step import DRAWN, Learned
from unroll.emit.axes import unit_axes
from unroll.emit.layer import axes_tuple, some_tensor
from unroll.emit.module import Method, Module
from unroll.emit.section import Section
from unroll.errors import UnrollError
from unroll.language.nodes import ONE, Sym
from unroll.lower.operations import Ref, Stage
from unroll.lower.scalar_text import UNARY, Text, number


def initialise(m: Module) -> Method:
    """Parameters at their start values, and what is worked out once."""
    goals = _goals(m)
    given, scalars = _arguments(m)
    known: dict[int, Text] = {}
    lines: list[str] = []
    for i, node in m.graph.nodes.items():
        if node.op in ("given", "scalar"):
            known[i] = Text(m.locals("symbol", str(node.attrs[0])))
        elif node.op == "layer" and node.stage == Stage.SETUP:
            known[i] = Text("layer", tensor=False)
        elif node.op == "dim":
            known[i] = m.size(sp.Symbol(node.attrs[0], integer=True, positive=True))
    for s in given:
        word = m.locals("symbol", s.name)
        dropped = unit_axes(s)
        lines += [f"{word} = {word}.squeeze({axes_tuple(dropped)})"] if dropped else []
    for s in scalars:
        word = m.locals("symbol", s.name)
        lines.append(f"{word} = torch.as_tensor({word}, dtype=torch.float64)")
    like = next((m.locals("symbol", s.name) for s in given), f"self.{some_tensor(m)}")
    sec = m.section(known, like, set())
    own = {p.name for p in m.learned if p.name in goals and _of_layer(m, goals[p.name])}
    for i in sec.lines_for([*(r for name, r in goals.items() if name not in own), *(Ref(i) for i in m.buffers)]):
        lines.append(sec.assign(i))
    for p in m.learned:
        if p.name in own:
            lines += _start_by_layer(m, p, goals[p.name], sec)
        else:
            lines.append(_start_of(m, p, goals[p.name], sec) if p.name in goals else _drawn(m, p))
    for i, name in m.buffers.items():
        text = sec.text(i)
        lines.append(f"self.{name}.copy_({text.code})" if text.tensor else f"self.{name}.fill_({text.code})")
    drawn = ["generator=None"] if any(p.init in DRAWN for p in m.learned) else []
    args = ", ".join(["self", *(m.locals("symbol", s.name) for s in given), *_scalar_args(m, scalars), *drawn])
    doc = f'"""{_doc(m)}"""'
    inverses = {"softplus_inverse" for p in m.learned if p.name in goals and p.constraint == "positive"}
    head = f"@torch.no_grad()\ndef initialise({args}):"
    return Method.of(head, [doc, *lines, "return self"], sec.used_ops | inverses)


def _doc(m: Module) -> str:
    if not m.learned:
        return "Work out what every layer uses from what is given; nothing is learned."
    drawn = ", or to a draw where the spec asks for one" if any(p.init in DRAWN for p in m.learned) else ""
    late = "; what data decide is NaN until construct has seen them" if m.constructed else ""
    return f"Set every parameter to the value that makes the network the algorithm itself{drawn}{late}."


def initialise_arguments(m: Module) -> list[str]:
    """Parameters and scalars, in the user's words, that `initialise` takes."""
    given, scalars = _arguments(m)
    return [s.name for s in (*given, *scalars)]


def _arguments(m: Module) -> tuple[list[Sym], list[sp.Symbol]]:
    reached = _reach(m, [*(r.node for r in _goals(m).values()), *m.buffers])
    given = [s for s in m.problem.parameters if ("given", s.name) in reached]
    return given, [s for s in m.problem.scalars if ("scalar", s.name) in reached]


def _goals(m: Module) -> dict[str, Ref]:
    """Start values that are computed."""
    return {p.name: m.graph.roots["learned", p.name] for p in m.learned if p.init == "value"}


def _drawn(m: Module, p: Learned) -> str:
    """The start of a parameter that is drawn (its variance is scale^2 over its rows or fan_in), or worked out on data later."""
    name = f"self.{m.attributes('learned', p.name)}"
    match p.init:
        case "zeros":
            return f"{name}.zero_()"
        case "ones" if p.constraint == "positive":
            return f"{name}.fill_({number(sp.sympify(math.log(math.expm1(p.scale)))).code})  # softplus of it is {p.scale:g}"
        case "ones":
            return f"{name}.fill_({number(sp.sympify(p.scale)).code})"
        case "data":
            return f"{name}.fill_(math.nan)  # until construct has worked it out"
        case _:
            each = p.fan_in or (p.shape[0] if p.shape else ONE)
            rows = m.size(each)
            if p.init == "gaussian":
                return f"{name}.normal_(0, {p.scale!r} / math.sqrt({rows.code}), generator=generator)"
            return f"{name}.uniform_(-1, 1, generator=generator).mul_({p.scale!r} * math.sqrt(3 / {rows.at(UNARY)}))"


def _scalar_args(m: Module, scalars: list[sp.Symbol]) -> list[str]:
    """Those without a default first."""
    required = [m.locals("symbol", s.name) for s in scalars if m.problem.scalars[s] is None]
    optional = [(m.locals("symbol", s.name), m.problem.scalars[s]) for s in scalars]
    return [*required, *(f"{w}={number(sp.sympify(v)).code}" for w, v in optional if v is not None)]


def _reach(m: Module, nodes: Iterable[int]) -> set[tuple[str, str]]:
    found = (m.graph.nodes[i] for i in m.graph.reached(nodes))
    return {(n.op, str(n.attrs[0])) for n in found if not n.inputs}


def _of_layer(m: Module, ref: Ref) -> bool:
    """Does a start differ from layer to layer?"""
    return any(m.graph.nodes[i].op == "layer" for i in m.graph.reached([ref.node]))


def _start_by_layer(m: Module, p: Learned, ref: Ref, sec: Section) -> list[str]:
    if not p.per_layer:
        raise UnrollError("E403", f"'{p.name}' is shared by all layers: its start cannot depend on the layer")
    inner = sec.branch()
    body = [inner.assign(i) for i in inner.lines_for([ref])]
    body.append(_start_of(m, p, ref, inner, "[layer]"))
    head = f"for layer in range(len(self.{m.attributes('learned', p.name)})):"
    return [head, *textwrap.indent("\n".join(body), "    ").split("\n")]


def _start_of(m: Module, p: Learned, ref: Ref, sec: Section, which: str = "") -> str:
    """Copy the start value of a parameter into it, through the inverse of its constraint."""
    name = m.attributes("learned", p.name) + which
    leaves = (n for i in m.graph.reached([ref.node]) if not (n := m.graph.nodes[i]).inputs)
    if any(n.stage > Stage.SETUP for n in leaves):
        raise UnrollError("E403", f"'{p.name}' cannot be learned: what it replaces depends on the input or the layer")
    text = sec.stored(ref)
    if p.constraint == "positive":
        value = text.code if text.tensor else f"torch.tensor({text.code}, dtype=torch.float64)"
        return f"self.{name}.copy_(softplus_inverse({value}))"
    if p.constraint in ("exp", "sigmoid"):
        value = text.code if text.tensor else f"torch.tensor({text.code}, dtype=torch.float64)"
        low, high = p.limits
        inner = f"({value}).log()" if p.constraint == "exp" else f"torch.logit(({value} - {low!r}) / {high - low!r})"
        return f"self.{name}.copy_({inner})"
    return f"self.{name}.copy_({text.code})" if text.tensor else f"self.{name}.fill_({text.code})"
