"""Softmax attention and token statistics over N = 256 ... 16384 tokens: time and peak memory, a process for each.

python benchmarks/token_mixers.py           prints a table and writes results/token_mixers.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from _experts import SubspaceAttention, TokenStatistics, explicit, fused
from _record import write
from _timing import Run, once, peak_mb
from torch import Tensor, nn

import unroll

D, K = 192, 4
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)


class Emitted(nn.Module):
    """One layer of a spec at these sizes: norm and residual are in it too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = unroll.compile(name, dims={"d": D, "K": K, "p": D // K}, overrides=["unroll.layers=1"])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "softmax, explicit": lambda: SubspaceAttention(D, K, D // K, explicit),
    "softmax, fused": lambda: SubspaceAttention(D, K, D // K, fused),
    "attention_only, emitted": lambda: Emitted("attention_only"),
    "token statistics": lambda: TokenStatistics(D, K, D // K),
    "tost, emitted": lambda: Emitted("tost"),
}
"""Name → a module (1, N, D) → (1, N, D)."""


def needed_gb(mixer: str, n: int) -> float:
    """What the N x N matrices of the explicit form take: logits, weights, and a gradient of each."""
    return 4 * K * n**2 * 4 / 2**30 if mixer == "softmax, explicit" else 0.0


def forward(net: nn.Module, x: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def both(net: nn.Module, x: Tensor) -> Run:
    def run() -> None:
        net.zero_grad()
        net(x).square().sum().backward()

    return run


RUNS = {"forward": forward, "forward and backward": both}


def measure_one(mixer: str, what: str, n: int, device: str, rounds: int) -> dict[str, float]:
    """Peak memory of the first call at this size, then its time; to be run in a process of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, x = MIXERS[mixer]().to(device), torch.randn(1, n, D, device=device)
    both(net, x[:, :16])()  # loads what PyTorch loads late
    run = RUNS[what](net, x)
    peak = peak_mb(run, device)
    return {"MB": peak, "ms": 1e3 * statistics.median(once(run, device, 0.05) for _ in range(rounds))}


def measure(tokens: tuple[int, ...], device: str, rounds: int, most_gb: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n in tokens:
        for mixer in MIXERS:
            if needed_gb(mixer, n) > most_gb:
                print(f"{mixer} at {n} tokens is not run: it needs more than {most_gb:g} GB")
                continue
            for what in RUNS:
                one = [sys.executable, __file__, "--one", mixer, what, "--tokens", str(n), "--device", device]
                done = subprocess.run([*one, "--rounds", str(rounds)], stdout=subprocess.PIPE, text=True, check=True)
                rows.append({"mixer": mixer, "N": n, "what": what} | json.loads(done.stdout))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--most-gb", type=float, default=8.0, help="leave out what needs more than this")
    parser.add_argument("--one", nargs=2, metavar=("MIXER", "WHAT"), help="measure this alone, here, and print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(*args.one, args.tokens[0], args.device, args.rounds)))
        return
    rows = measure(tuple(args.tokens), args.device, args.rounds, args.most_gb)
    write("token_mixers", rows, threads=1, device=args.device, dtype="float32", d=D, heads=K)


if __name__ == "__main__":
    main()
