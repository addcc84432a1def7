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

D, K = 192, 4
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "softmax, explicit": lambda: SubspaceAttention(D, K, D // K, explicit),
    "softmax, fused": lambda: SubspaceAttention(D, K, D // K, fused),
    "token statistics": lambda: TokenStatistics(D, K, D // K),
}
"""Name → a module (1, N, D) → (1, N, D).  An emitted mixer is one more line."""


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


def measure_one(mixer: str, n: int, device: str, rounds: int) -> dict[str, float]:
    """Peak memory of the first call at this size, then times; to be run in a process of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, x = MIXERS[mixer]().to(device), torch.randn(1, n, D, device=device)
    both(net, x[:, :16])()  # loads what PyTorch loads late
    found: dict[str, float] = {}
    for what, make in (("forward", forward), ("forward and backward", both)):
        run = make(net, x)
        found[f"{what}, MB"] = peak_mb(run, device)
        found[f"{what}, ms"] = 1e3 * statistics.median(once(run, device, 0.05) for _ in range(rounds))
    return found


def measure(tokens: tuple[int, ...], device: str, rounds: int, most_gb: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n in tokens:
        for mixer in MIXERS:
            if needed_gb(mixer, n) > most_gb:
                print(f"{mixer} at {n} tokens is not run: it needs more than {most_gb:g} GB")
                continue
            one = [sys.executable, __file__, "--one", mixer, "--tokens", str(n), "--device", device]
            done = subprocess.run([*one, "--rounds", str(rounds)], capture_output=True, text=True, check=True)
            rows.append({"mixer": mixer, "N": n} | json.loads(done.stdout))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--most-gb", type=float, default=8.0, help="leave out what needs more than this")
    parser.add_argument("--one", choices=MIXERS, help="measure this one alone, here, and print it as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one, args.tokens[0], args.device, args.rounds)))
        return
    rows = measure(tuple(args.tokens), args.device, args.rounds, args.most_gb)
    write("token_mixers", rows, threads=1, device=args.device, dtype="float32", d=D, heads=K)


if __name__ == "__main__":
    main()
