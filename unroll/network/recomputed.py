"""The text of a network of which no layer keeps what it worked out: in the derivative it is worked out again.

    for W, b in zip(..):          def _layer(Z, W, b):
        Z = ..            ->          Z = ..
                                      return (Z,)
                                  for W, b in zip(..):
                                      (Z,) = _kept(_layer, Z, W, b, use_reentrant=False)

Source: Chen, Xu, Zhang & Guestrin 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
"""

from __future__ import annotations

import ast
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import nn

from unroll.errors import UnrollError
from unroll.network.network import Network, mixed


@contextmanager
def recomputing(module: nn.Module) -> Generator[None]:
    """Inside, the layers of all networks in a module are worked out again for the derivative. Raises UnrollError E511."""
    nets = [m for m in module.modules() if isinstance(m, Network)]
    if not nets:
        raise UnrollError("E511", "train: checkpoint: this network says nothing of its layers", hint="leave it out")
    before = [type(net) for net in nets]
    made = [mixed(recomputed(net.program.source, net.program.class_name), net.program.class_name) for net in nets]
    for net, kind in zip(nets, made, strict=True):
        net.__class__ = kind
    try:
        yield
    finally:
        for net, kind in zip(nets, before, strict=True):
            net.__class__ = kind


def recomputed(source: str, title: str) -> str:
    """The text of a module, the method `forward` of its class changed. Raises UnrollError E511 for a text without one loop over layers."""
    tree = ast.parse(source)
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == title)
    (forward,) = (node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "forward")
    loops = [k for k, node in enumerate(forward.body) if isinstance(node, ast.For)]
    if len(loops) != 1:
        message = f"train: checkpoint: {title} has {len(loops)} loops over layers, and one is known how to split"
        raise UnrollError("E511", message, hint="leave it out")
    (place,) = loops
    before, after = forward.body[:place], forward.body[place + 1 :]
    loop = forward.body[place]
    assert isinstance(loop, ast.For)
    bound = {a.arg for a in (*forward.args.args, *forward.args.kwonlyargs)} | _names(before, ast.Store)
    states = sorted(_names(loop.body, ast.Store) & bound)
    lost = _names(after, ast.Load) & (_names(loop.body, ast.Store) - bound)
    leaves = [n for part in loop.body for n in ast.walk(part) if isinstance(n, ast.Break | ast.Continue | ast.Return)]
    if lost or leaves or not states:
        raise UnrollError("E511", f"train: checkpoint: layers of {title} cannot be split", hint="leave it out")
    given = ", ".join([*states, *sorted(_names([loop.target], ast.Store))])
    answer = f"({', '.join(states)},)"
    layer = ast.parse(f"def _layer({given}):\n    return {answer}").body[0]
    assert isinstance(layer, ast.FunctionDef)
    layer.body = [*loop.body, *layer.body]
    loop.body = ast.parse(
        f"if trace is None and torch.is_grad_enabled():\n"
        f"    {answer} = _again(_layer, {given}, use_reentrant=False)\n"
        f"else:\n"
        f"    {answer} = _layer({given})"
    ).body
    start = ast.parse("from torch.utils.checkpoint import checkpoint as _again").body
    forward.body = [*start, *before, layer, loop, *after]
    return ast.unparse(ast.fix_missing_locations(tree))


def _names(nodes: Sequence[ast.AST], kind: type[ast.expr_context]) -> set[str]:
    """Names that are set (ast.Store) or read (ast.Load)."""
    walked = (n for node in nodes for n in ast.walk(node))
    return {n.id for n in walked if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}
