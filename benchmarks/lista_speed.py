"""Emitted LISTA against the module an expert would write by hand: time and memory, both in one interleaved run.

python benchmarks/lista_speed.py            prints a table and writes results/lista_speed.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import unroll


class Soft(torch.autograd.Function):
    """sign(v) max(|v| - t, 0); keeps its output for backward, nothing else."""

    @staticmethod
    def forward(ctx, v, t):
        z = v - v.clamp(-t, t)
        ctx.save_for_backward(z)
        ctx.shape = t.shape
        return z

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        g = grad * z.sign()
        return g * z.sign(), -g.sum_to_size(ctx.shape)


class Expert(nn.Module):
    """LISTA, written by hand: one shared W1, a W2 and a threshold per layer."""

    def __init__(self, m: int, n: int, layers: int) -> None:
        super().__init__()
        self.W1 = nn.Parameter(torch.empty(n, m))
        self.W2 = nn.Parameter(torch.empty(layers, n, n))
        self.theta = nn.Parameter(torch.empty(layers))

    def forward(self, x: Tensor) -> Tensor:
        b = x @ self.W1.T
        z = torch.zeros_like(b)
        for W2, theta in zip(self.W2, nn.functional.softplus(self.theta), strict=True):
            z = Soft.apply(z @ W2.T + b, theta)
        return z


def clock(f: Callable[[], object], least: float = 0.05) -> float:
    """Processor seconds of one call (what else the machine does is not counted), over at least `least` seconds."""
    count, start = 0, time.process_time()
    while (spent := time.process_time() - start) < least:
        f()
        count += 1
    return spent / count


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median over rounds of the ratio of two times, measured in turn and in both orders."""
    for f in (ours, theirs, ours, theirs):
        f()
    pairs: list[tuple[float, float]] = []
    for i in range(rounds):
        if i % 2:
            a, b = clock(ours), clock(theirs)
        else:
            b, a = clock(theirs), clock(ours)
        pairs.append((a, b))
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "emitted_us": 1e6 * statistics.median(a for a, _ in pairs),
        "expert_us": 1e6 * statistics.median(b for _, b in pairs),
    }


def saved_per_layer(net: nn.Module, x: Tensor, layers: int, unit: int) -> float:
    """Activations kept for backward in each layer, in units of one (batch, n) tensor; parameters are not counted."""
    owned = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    del out
    return sum(kept.values()) / (layers * unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for m, n, layers, batch in ((64, 256, 16, 64), (64, 256, 16, 256), (250, 500, 16, 256), (64, 128, 16, 1)):
        net = unroll.compile("lista", dims={"m": m, "n": n}, seed=0, device=args.device)
        expert = Expert(m, n, net.layers).to(args.device)
        expert.load_state_dict({k: v for k, v in net.state_dict().items() if k in ("W1", "W2", "theta")})
        x = torch.randn(batch, m, device=args.device)
        assert (net(x) - expert(x)).abs().max() < 1e-5

        def forward(f: nn.Module, x: Tensor = x) -> None:
            with torch.no_grad():
                f(x)

        def both(f: nn.Module, x: Tensor = x) -> None:
            f.zero_grad()
            f(x).square().sum().backward()

        for what, run in (("forward", forward), ("forward and backward", both)):
            row = {"m": m, "n": n, "layers": layers, "batch": batch, "what": what}
            row |= ratio(lambda: run(net), lambda: run(expert), args.rounds)  # noqa: B023
            rows.append(row)
            print(
                f"{m:4d} x {n:4d}  batch {batch:4d}  {what:22s} "
                f"{row['emitted_us']:10.0f} us {row['expert_us']:10.0f} us  {row['ratio']:.3f}"
            )
        unit = batch * n * x.element_size()
        row = {
            "m": m,
            "n": n,
            "layers": layers,
            "batch": batch,
            "what": "kept for backward per layer, in (batch, n) tensors",
        }
        row |= {"emitted": saved_per_layer(net, x, layers, unit), "expert": saved_per_layer(expert, x, layers, unit)}
        rows.append(row)
        print(
            f"{m:4d} x {n:4d}  batch {batch:4d}  kept for backward      {row['emitted']:.2f}       {row['expert']:.2f}"
        )
    record = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "device": args.device,
        "rows": rows,
    }
    target = Path(__file__).parent / "results" / "lista_speed.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
