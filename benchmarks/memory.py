"""Activations kept for backward per layer: the emitted soft threshold against the textbook formula in plain autograd.

python benchmarks/memory.py
"""

from __future__ import annotations

import torch
from _record import write
from torch import Tensor, nn

import unroll

SHAPES = ((64, 256, 16, 256), (250, 500, 16, 256))


class Textbook(nn.Module):
    """The same layers with sign(v) max(|v| - theta, 0) as it is written."""

    def __init__(self, net: unroll.Network) -> None:
        super().__init__()
        self.W1, self.W2, self.theta = (net.get_parameter(name) for name in ("W1", "W2", "theta"))

    def forward(self, x: Tensor) -> Tensor:
        b = x @ self.W1.mT
        z = torch.zeros_like(b)
        for w2, theta in zip(self.W2, nn.functional.softplus(self.theta), strict=True):
            v = b + z @ w2.mT
            z = v.sign() * (v.abs() - theta).clamp_min(0)
        return z


def kept(net: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward, parameters and input not counted."""
    owned = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = net(x)
    del held
    return sum(found.values())


def main() -> None:
    rows: list[dict[str, object]] = []
    for m, n, layers, batch in SHAPES:
        net = unroll.compile("lista", dims={"m": m, "n": n}, overrides=[f"unroll.layers={layers}"])
        x, textbook = torch.randn(batch, m), Textbook(net)
        assert torch.allclose(net(x), textbook(x), atol=1e-5)
        one = batch * n * x.element_size()
        emitted, plain = (kept(f, x) / layers for f in (net, textbook))
        rows.append(
            {
                "m x n": f"{m} x {n}",
                "layers": layers,
                "batch": batch,
                "emitted, bytes per layer": emitted,
                "textbook, bytes per layer": plain,
                "emitted, (batch, n) tensors": emitted / one,
                "textbook, (batch, n) tensors": plain / one,
            }
        )
    write("memory", rows, dtype="float32", device="cpu")


if __name__ == "__main__":
    main()
