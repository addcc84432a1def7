"""The method `forward`."""

from __future__ import annotations

import textwrap

from unroll.emit.layer import layer_lines, loop_head, opening, output, per_layer, read_sizes
from unroll.emit.module import Method, Module


def forward(m: Module) -> Method:
    """A call: what layers share, then the layers."""
    symbol = lambda name: m.locals("symbol", name)
    lines, sec, states = opening(m, m.inputs, m.forward_nodes)
    record = f"trace.append({output(m, states)})"
    tracing = ["if trace is not None:", f"    {record}"]
    lines += tracing
    lines += loop_head(m, per_layer(m), sec.fresh)
    body = layer_lines(m, sec, states, trace=True)
    lines += textwrap.indent("\n".join([*body, *([] if m.step.blocks else tracing)]), "    ").split("\n")
    lines.append(f"return {output(m, states)}")
    args = ["self", *(symbol(s.name) for s in m.inputs), *(f"{symbol(v)}=None" for v in m.starts), "*"]
    args += ["layers=None"] if m.counts_layers else []
    lines = read_sizes(m, m.inputs, lines)
    return Method.of(f"def forward({', '.join([*args, 'trace=None'])}):", lines, sec.used_ops)
