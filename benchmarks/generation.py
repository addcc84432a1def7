"""Tokens per second of a text that a network writes, by what its layers keep and by full passes.

python benchmarks/generation.py             prints a table and writes results/generation.json

After a text of 64, 256 or 1024 tokens, the seconds that one more token takes: read alone, what the layers keep of those before at hand, or
as the last of the whole text. Both answers are compared.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from _record import write
from _timing import interleaved

import unroll
from unroll.network.kept import Kept

SIZES = [
    "dims.d=256",
    "dims.K=4",
    "dims.p=64",
    "unroll.layers=6",
    "model.embed.vocabulary=1024",
    "model.embed.length=1100",
]
NETWORKS = {"crate_text": [], "crate_alpha_text": ["dims.s=1024"], "tost_text": ["dims.s=1024", "dims.T=1100"]}
LENGTHS = (64, 256, 1024)


def measure(name: str, length: int, device: str, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    net = unroll.compile(name, overrides=[*SIZES, *NETWORKS[name]], device=device, seed=0).eval()
    tokens = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    kept = Kept()
    net.extend(tokens[:, :-1], kept)

    def alone() -> torch.Tensor:
        kept.seen = length - 1  # the token before is read anew each time
        return net.extend(tokens[:, -1:], kept)[:, -1]

    @torch.no_grad()
    def whole() -> torch.Tensor:
        return net(tokens)[:, -1]

    gap = float((alone() - whole()).abs().max() / whole().abs().max())
    seconds = {k: statistics.median(v) for k, v in interleaved({"kept": alone, "full": whole}, device, rounds).items()}
    rates = {f"tokens/s, {k}": 1 / s for k, s in seconds.items()}
    return {
        "network": name,
        "tokens": length,
        **rates,
        "ratio": seconds["full"] / seconds["kept"],
        "relative difference": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, length, args.device, args.rounds) for name in NETWORKS for length in LENGTHS]
    write("generation", rows, device=args.device, threads=1, sizes=SIZES)


if __name__ == "__main__":
    main()
