"""The lines of a layer, and of what comes before the loop over layers."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence

import sympy as sp

from unroll.derivation.step import Learned
from unroll.emit.axes import axes_of, unit_axes
from unroll.emit.module import Module
from unroll.emit.section import WIDTH, Section
from unroll.errors import UnrollError
from unroll.language.nodes import Sym
from unroll.lower.operations import Ref, Stage
from unroll.lower.scalar_text import POSTFIX, PRODUCT, SUM, Text


def opening(
    m: Module, inputs: list[Sym], nodes: list[int], start: bool = True
) -> tuple[list[str], Section, dict[str, str]]:
    """What comes before the loop: values that layers share, and start values."""
    states = {s.symbol.name: state_name(m, s.symbol) for s in m.step.states}
    known = known_in_forward(m)
    like = m.locals("symbol", inputs[0].name) if inputs else f"self.{some_tensor(m)}"
    sec = m.section(known, like, {*states.values()})
    lines = [*squeezed(m, inputs), *prologue(m, sec, nodes)]
    lines += start_lines(m, sec, states, start)
    for i, node in m.graph.nodes.items():
        if node.op in ("state", "counter"):
            known[i] = Text(states[str(node.attrs[0])], tensor=not node.plain)
    return lines, sec, states


def squeezed(m: Module, inputs: Iterable[Sym]) -> list[str]:
    """Axes of size 1 that are not stored, taken away."""
    return [
        f"{word} = {word}.squeeze({axes_tuple(dropped)})"
        for s in inputs
        if (dropped := unit_axes(s))
        for word in [m.locals("symbol", s.name)]
    ]


def read_sizes(
    m: Module,
    inputs: list[Sym],
    lines: list[str],
    size_of: Callable[[sp.Symbol, str, int], str] = lambda d, word, axis: f"{word}.shape[{axis}]",
) -> list[str]:
    """Open sizes that the lines use are read off the inputs, before anything else."""
    first: list[str] = []
    text = "\n".join(line.split("#")[0] for line in "\n".join(lines).split("\n"))
    for d, n in m.problem.dims.items():
        word = m.locals("dim", d.name)
        if n == "dynamic" and re.search(rf"(?<![\w.]){re.escape(word)}\b", text):
            found = [(s, a) for s in inputs for a in axes_of(s, d)]
            if found:
                s, axis = found[0]
                first.append(f"{word} = {size_of(d, m.locals('symbol', s.name), axis)}")
            else:
                hint = f"give it a number: dims: {{{d.name}: ...}}"
                raise UnrollError(
                    "E402", f"the size '{d.name}' is open, and no input has an axis of that size", hint=hint
                )
    return [*first, *lines]


def state_name(m: Module, symbol: Sym | sp.Symbol) -> str:
    return m.locals("symbol" if symbol.name in m.starts else "state", symbol.name)


def known_in_forward(m: Module) -> dict[int, Text]:
    known = {i: Text(f"self.{name}") for i, name in m.buffers.items()}
    for i, node in m.graph.nodes.items():
        word = str(node.attrs[0]) if node.attrs else ""
        match node.op:
            case "input":
                known[i] = Text(m.locals("symbol", word))
            case "learned":
                p = next(p for p in m.learned if p.name == word)
                attribute = f"self.{m.attributes('learned', word)}"
                known[i] = Text(m.locals("learned", word)) if p.per_layer else constrained(p, attribute)
            case "dim":
                known[i] = m.size(sp.Symbol(word, integer=True, positive=True))
            case "layer":
                known[i] = Text("layer", tensor=False)
            case "start":
                known[i] = Text(m.locals("symbol" if word in m.starts else "state", word), tensor=not node.plain)
            case _:
                pass
    return known


def prologue(m: Module, sec: Section, nodes: list[int], without: Collection[int] = ()) -> list[str]:
    """Values that the layers share."""
    ahead = [i for i in m.graph.nodes if m.graph.nodes[i].stage <= Stage.PROLOGUE]
    read = [r.node for i in nodes if m.graph.nodes[i].stage == Stage.BODY for r in m.graph.nodes[i].inputs]
    read += [r.node for (kind, _), r in m.graph.roots.items() if kind == "next"]
    goals = [
        i for i in dict.fromkeys(read)
        if i in ahead and i not in sec.known and i not in without
        and m.graph.nodes[i].op not in ("number", "full") and not m.graph.nodes[i].plain
    ]  # fmt: skip
    lines: list[str] = []
    for i in list(dict.fromkeys(read)):
        node = m.graph.nodes[i]
        if node.op == "learned" and node.stage == Stage.PROLOGUE and "(" in sec.known[i].code:
            name = m.locals("learned", str(node.attrs[0]))
            lines.append(f"{name} = {sec.known[i].code}")
            sec.known[i] = Text(name)
    return lines + [sec.assign(i) for i in sec.lines_for(map(Ref, goals), keep=goals)]


def start_lines(m: Module, sec: Section, states: dict[str, str], given: bool = True) -> list[str]:
    lines: list[str] = []
    for s in m.step.states:
        name, ref = states[s.symbol.name], m.graph.roots["start", s.symbol.name]
        value = _start_value(m, s.symbol, ref, sec)
        if s.symbol.name in m.starts and given:
            assert isinstance(s.symbol, Sym)
            dropped = unit_axes(s.symbol)
            own = f"{name}.squeeze({axes_tuple(dropped)})" if dropped else name
            lines.append(f"{name} = {value} if {name} is None else {own}")
        else:
            lines.append(f"{name} = {value}")
    return lines


def _start_value(m: Module, symbol: Sym | sp.Symbol, ref: Ref, sec: Section) -> str:
    node = m.graph.nodes[ref.node]
    if not isinstance(symbol, Sym):
        return sec.text(ref.node).code
    if sec.like == "self.":
        hint = (
            "declare an input and start there, as in start: {Z: X}; or a scalar or parameter that the objective reads"
        )
        raise UnrollError("E402", "this network would neither take nor hold a tensor", hint=hint)
    batch = _batch(m)
    sizes = [m.size(n).code for n in (symbol.stored if symbol.rank == 2 else symbol.shape) if n != 1]
    dims = batch if batch and not sizes else ", ".join([*([f"*{batch}"] if batch else []), *sizes]) or "()"
    if (node.op == "full" and node.attrs[0] == 0) or (node.op == "number" and node.attrs[0] == 0):
        return f"{sec.like}.new_zeros({dims})"
    if node.plain:
        return f"{sec.like}.new_full({f'({dims},)' if sizes else dims}, {sec.text(ref.node).code})"
    text = sec.operand(ref).ordered("cr")
    return text.code if node.batched else text.then(f".expand({dims})").code


def _batch(m: Module) -> str:
    """Shape of the batch axes."""
    if not m.inputs:
        return ""
    s = m.inputs[0]
    kept = sum(n != 1 for n in s.shape) + (s.family is not None)
    word = m.locals("symbol", s.name)
    return f"{word}.shape[:-{kept}]" if kept else f"{word}.shape"


def per_layer(m: Module) -> list[tuple[str, str]]:
    """(name in the loop, the stack it runs over)."""
    out: list[tuple[str, str]] = []
    for p in m.learned:
        if p.per_layer:
            stack = constrained(p, f"self.{m.attributes('learned', p.name)}")
            out.append((m.locals("learned", p.name), stack.code))
    return out


def loop_head(m: Module, per_layer: list[tuple[str, str]], fresh: Callable[[str], str]) -> list[str]:
    index = any(n.op == "layer" and n.stage == Stage.BODY for n in m.graph.nodes.values())
    if not per_layer:
        return [f"for {'layer' if index else '_'} in range(self.layers if layers is None else layers):"]
    names, stacks = ", ".join(n for n, _ in per_layer), [s for _, s in per_layer]
    if m.free is not None:
        together = f"list(zip({', '.join(stacks)}, strict=True))"
        if len(stacks) == 1:
            together = Text(stacks[0], stack_level(stacks[0])).then(".unbind()").code
        head = "for layer in range(self.layers if layers is None else layers):"
        own = fresh("own")
        return [f"{own} = {together}", head, f"    {names} = {own}[min(layer, {m.free})]"]
    over = stacks[0] if len(stacks) == 1 else f"zip({', '.join(stacks)}, strict=True)"
    if index:
        names = f"layer, {names if len(per_layer) == 1 else f'({names})'}"
        over = f"enumerate({over})"
    line = f"for {names} in {over}:"
    if len(line) <= WIDTH or len(per_layer) == 1:
        return [line]
    wrap: Callable[[str], list[str]] = lambda text: textwrap.wrap(text, WIDTH - 12, break_long_words=False)
    inner = [*textwrap.indent("\n".join(wrap(", ".join(n for n, _ in per_layer))), "    ").split("\n")]
    stacked = [*textwrap.indent("\n".join(wrap(", ".join([*stacks, "strict=True"]))), "    ").split("\n")]
    if index:
        return ["for layer, (", *inner, ") in enumerate(zip(", *stacked, ")):"]
    return ["for (", *inner, ") in zip(", *stacked, "):"]


def layer_lines(m: Module, sec: Section, states: dict[str, str], trace: bool = False) -> list[str]:
    """Assign the new states; a name is used again once nothing reads its old value. trace: record the end of each block."""
    goals = {s.symbol.name: m.graph.roots["next", s.symbol.name] for s in m.step.states}
    ends = {name: ref for (kind, name), ref in m.graph.roots.items() if kind == "block"}
    leaf_of = {str(n.attrs[0]): i for i, n in m.graph.nodes.items() if n.op in ("state", "counter")}
    wanted = [r.node for r in (*goals.values(), *ends.values()) if r.node not in sec.known]
    rows = sec.lines_for([*goals.values(), *ends.values()], keep=wanted)
    reads = {i: _reads(m, i, set(rows), sec) for i in rows}
    direct = {r.node for r in (*goals.values(), *ends.values())}
    becomes = _results(m, goals, ends, set(rows))
    holds = {states[name]: leaf for name, leaf in leaf_of.items()}
    bases: dict[str, str] = {}
    left, pending, lines = dict(states), list(ends.items()) if trace else [], list[str]()
    block_state = {a.block: a.target.name for a in m.step.assigns if a.block and a.target in m.step.output}

    def record(waiting: Collection[int]) -> None:
        """What every block left, in their order, as soon as it is there: one that changes nothing leaves what was there."""
        while pending and pending[0][1].node not in waiting:
            block, ref = pending.pop(0)
            left[block_state[block]] = sec.operand(ref).ordered("cr").code
            lines.extend(["if trace is not None:", f"    trace.append({output(m, left)})"])

    record(rows)
    for place, i in enumerate(rows):
        later = {j for k in rows[place + 1 :] for j in reads[k]}
        free: Callable[[str], bool] = lambda name, later=later: name in holds and holds[name] not in later
        state = becomes.get(i)
        base = states[state] if state is not None else bases.get(m.graph.names.get(i, ""), "")
        final = state is not None and goals[state].node == i
        if state is not None and free(base) and not (holds[base] in direct and holds[base] == leaf_of.get(state)):
            name: str | None = base
        elif state is not None:
            name = sec.fresh(f"{base}_next" if final else f"{base}_half")
        else:
            name = base if base and free(base) else None
        lines.append(sec.assign(i, name))
        used = sec.known[i].code
        holds[used] = i
        if i in m.graph.names:
            bases.setdefault(m.graph.names[i], used)
        record(rows[place + 1 :])
    moves = [(states[name], sec.operand(ref).ordered("cr").code) for name, ref in goals.items()]
    moves = [(a, b) for a, b in moves if a != b]
    if moves:
        lines.append(f"{', '.join(a for a, _ in moves)} = {', '.join(b for _, b in moves)}")
    return lines


def _results(m: Module, goals: dict[str, Ref], ends: dict[str, Ref], rows: set[int]) -> dict[int, str]:
    """Node -> the state whose new value it is, for lines that can take the state's own name."""
    out: dict[int, str] = {}
    block_state = {a.block: a.target.name for a in m.step.assigns if a.block and a.target in m.step.output}
    pairs = [*((ref, name) for name, ref in goals.items()), *((ref, block_state[b]) for b, ref in ends.items())]
    for ref, name in pairs:
        if ref.node in rows and not _turned(m, ref):
            out.setdefault(ref.node, name)
    return out


def _turned(m: Module, ref: Ref) -> bool:
    """Is the ref stored in another order than a state?"""
    return ref.flip and {"r", "c"} <= set(m.graph.nodes[ref.node].tags)


def _reads(m: Module, i: int, rows: set[int], sec: Section) -> set[int]:
    """Lines and leaves that the line of a node reads, through what is written inside it."""
    out: set[int] = set()
    stack = [r.node for r in m.graph.nodes[i].inputs]
    while stack:
        j = stack.pop()
        if j in rows or not m.graph.nodes[j].inputs:
            out.add(j)
        elif j not in sec.known:
            stack += [r.node for r in m.graph.nodes[j].inputs]
    return out


def output(m: Module, states: dict[str, str]) -> str:
    out: list[str] = []
    for s in m.step.output:
        text = states[s.name]
        for axis in reversed(unit_axes(s)):
            text += f".unsqueeze({axis})"
        out.append(text)
    return ", ".join(out) if len(out) == 1 else f"({', '.join(out)})"


def some_tensor(m: Module) -> str:
    return next((m.attributes("learned", p.name) for p in m.learned), next(iter(m.buffers.values()), ""))


def stack_level(stack: str) -> int:
    """How tightly the text of a stack of parameters binds."""
    return PRODUCT if " " in stack and not stack.startswith("F.") else POSTFIX


def constrained(p: Learned, text: str) -> Text:
    """The value of a parameter, from what is stored."""
    match p.constraint:
        case "none":
            return Text(text)
        case "positive":
            return Text(f"F.softplus({text})")
        case "symmetric":
            return Text(f"({text} + {text}.mT) / 2", PRODUCT)
        case "unit_columns":
            return Text(f"F.normalize({text}, dim={p.column_axis})")
        case "exp":
            return Text(f"{text}.exp()")
        case "sigmoid":
            low, high = p.limits
            code = f"{high - low!r} * torch.sigmoid({text})"
            return Text(f"{low!r} + {code}" if low else code, SUM if low else PRODUCT)
        case "clamp":
            low, high = p.limits
            return Text(f"{text}.clamp({low!r}, {high!r})" if math.isfinite(high) else f"{text}.clamp_min({low!r})")
        case "rising":
            assert p.grid is not None
            most = repr(p.limits[1]) if math.isfinite(p.limits[1]) else "math.inf"
            return Text(f"rising({text}, {most}, {p.grid.odd})")


def axes_tuple(axes: Sequence[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(tuple(axes))
