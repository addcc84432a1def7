"""The method `construct`: parameters worked out on data, layer by layer, in batches where a layer reads sums over samples."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import sympy as sp

from unroll.derivation.step import Learned
from unroll.emit.layer import (
    known_in_forward,
    layer_lines,
    opening,
    output,
    per_layer,
    prologue,
    read_sizes,
    squeezed,
    stack_level,
    start_lines,
    state_name,
)
from unroll.emit.module import Method, Module
from unroll.emit.section import Section, hint
from unroll.lower.operations import Ref
from unroll.lower.scalar_text import POSTFIX, Text


def construct(m: Module) -> Method:
    """The method that works out parameters on data, layer by layer."""
    names = ", ".join(p.name for p in m.constructed)
    words = ", ".join(m.locals("symbol", s.name) for s in m.problem.inputs)
    if m.samples is None:
        args, (lines, used) = words, _construct_at_once(m)
        doc = f"Work out {names} on these data, layer by layer; no batch axes. Returns what the data have become."
    else:
        batches = m.locals.fresh("batches")
        args, (lines, used) = f"*{batches}", _construct_by_batches(m, batches, *m.samples)
        doc = f"Work out {names} on these data, layer by layer. A batch is a tuple of {words}; returns what each has become."
    inverses = {"softplus_inverse" for p in m.constructed if p.constraint == "positive"}
    return Method.of(f"@torch.no_grad()\ndef construct(self, {args}):", [f'"""{doc}"""', *lines], used | inverses)


def _construct_at_once(m: Module) -> tuple[list[str], set[str]]:
    inputs = list(m.problem.inputs)
    lines, sec, states = opening(m, inputs, m.construct_nodes, start=False)
    body = [*_layer_of(m, m.learned, known=True), *_work_out(m, sec), *_layer_of(m, m.constructed)]
    body += layer_lines(m, sec, states)
    lines += [_layers_of_construct(m), *_indented(body), f"return {output(m, states)}"]
    return read_sizes(m, inputs, lines), sec.used_ops


def _construct_by_batches(
    m: Module, batches: str, samples: sp.Symbol, sums: tuple[int, ...]
) -> tuple[list[str], set[str]]:
    """Per layer: the sums over all batches, the parameters, and the next state of each batch."""
    inputs = list(m.problem.inputs)
    names = [m.locals("symbol", s.name) for s in inputs]
    each = ", ".join(names) if len(names) > 1 else f"({names[0]},)"
    batch = f"({each})" if len(names) > 1 else each
    states = {s.symbol.name: state_name(m, s.symbol) for s in m.step.states}
    state = f"({', '.join(states.values())})" if len(states) > 1 else "".join(states.values())
    opened = squeezed(m, inputs)
    like = f"self.{m.attributes('learned', m.constructed[0].name)}"
    shared = m.section(known_in_forward(m), like, {*states.values()})
    given = {i for i, n in m.graph.nodes.items() if n.op == "input"}
    of_data = {i for i in m.construct_nodes if given & m.graph.reached([i])}
    lines = prologue(m, shared, m.construct_nodes, without=of_data)
    all_states, place = shared.fresh("states"), shared.fresh("i")

    starts = [*opened, *start_lines(m, shared.branch(), states, given=False)]
    if len(starts) == 1 and len(states) == 1:
        lines.append(f"{all_states} = [{starts[0].removeprefix(f'{state} = ')} for {each} in {batches}]")
    else:
        loop = [f"for {each} in {batches}:", *_indented([*starts, f"{all_states}.append({state})"])]
        lines += [f"{all_states} = []", *loop]
    for i, node in m.graph.nodes.items():
        if node.op in ("state", "counter"):
            shared.known[i] = Text(states[str(node.attrs[0])], tensor=not node.plain)

    both = f"zip({batches}, {all_states}, strict=True)"
    totals, adding = _adding(m, shared, sums)
    body = [*_layer_of(m, m.learned, known=True), f"{' = '.join(totals)} = 0"]
    body += [f"for {batch}, {state} in {both}:", *_indented([*opened, *adding])]
    body += [*_work_out(m, shared), *_layer_of(m, m.constructed)]
    moving = [*opened, *layer_lines(m, shared.branch(), states), f"{all_states}[{place}] = {state}"]
    body += [f"for {place}, ({batch}, {state}) in enumerate({both}):", *_indented(moving)]
    answer = output(m, states)
    out = all_states if answer == state else f"[{answer} for {state} in {all_states}]"
    lines += [_layers_of_construct(m), *_indented(body), f"return {out}"]

    def size_of(d: sp.Symbol, word: str, axis: int) -> str:
        if d == samples:
            return f"sum({word}.shape[{axis}] for {each} in {batches})"
        return f"{batches}[0][{names.index(word)}].shape[{axis}]"

    return read_sizes(m, inputs, lines, size_of), shared.used_ops


def _adding(m: Module, shared: Section, sums: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """The names of sums, which are known from here on, and the lines that add a batch to them."""
    sec, names, lines = shared.branch(), list[str](), list[str]()
    for i in sec.lines_for(map(Ref, sums), keep=sums):
        if i not in sums:
            lines.append(sec.assign(i))
            continue
        names.append(shared.fresh(m.graph.names.get(i) or hint(m.graph, i)))
        lines.append(f"{names[-1]} += {sec.text(i).code}")
        shared.known[i] = Text(names[-1])
    return names, lines


def _layers_of_construct(m: Module) -> str:
    return f"for layer in range(len(self.{m.attributes('learned', m.constructed[0].name)})):"


def _work_out(m: Module, sec: Section) -> list[str]:
    """Store what the parameters of a layer are."""
    goals = {p.name: m.graph.roots["learned", p.name] for p in m.constructed}
    lines = [sec.assign(i) for i in sec.lines_for(goals.values())]
    for p in m.constructed:
        value = sec.operand(goals[p.name]).ordered("rc").code
        if p.constraint == "positive":
            value = f"softplus_inverse({value})"
        lines.append(f"self.{m.attributes('learned', p.name)}[layer] = {value}")
    return lines


def _layer_of(m: Module, learned: Iterable[Learned], known: bool = False) -> list[str]:
    """Names for the parameters of a layer.  known: those that need no data."""
    wanted = {m.locals("learned", p.name) for p in learned if not (known and p.constructed)}
    return [
        f"{name} = {Text(stack, stack_level(stack)).at(POSTFIX)}[layer]"
        for name, stack in per_layer(m)
        if name in wanted
    ]


def _indented(lines: Iterable[str]) -> list[str]:
    return textwrap.indent("\n".join(lines), "    ").split("\n")
