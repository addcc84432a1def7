"""Constructing a ReduNet from features: the loop of explicit inverses, and its inverses alone.

python benchmarks/redunet_construct.py      prints a table and writes results/redunet_construct.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import torch
from _experts import redunet_construct
from _record import write
from _timing import Run, against, interleaved
from torch import Tensor
from torch.nn import functional as F

import unroll

Construct = Callable[[Tensor, Tensor, int], Tensor]
"""(features (m, d) of unit norm, labels (m,), layers) → features after the last layer; η = 0.5, ε² = 0.1."""

SHAPES = ((1000, 64, 10, 10), (1000, 256, 10, 4), (1000, 784, 10, 1))
"""Samples m, features d, classes K, layers."""

EXPERT = "by hand, explicit inverses"


def mixture(m: int, d: int, K: int, device: str) -> tuple[Tensor, Tensor]:
    """Unit vectors near K random subspaces, and their classes."""
    labels = torch.arange(m, device=device) % K
    bases = torch.randn(K, max(d // (2 * K), 1), d, device=device)
    codes = torch.randn(m, 1, bases.shape[1], device=device)
    z = (codes @ F.normalize(bases, dim=-1)[labels]).squeeze(1) + 0.1 * torch.randn(m, d, device=device)
    return F.normalize(z, dim=-1), labels


def emitted(z: Tensor, labels: Tensor, layers: int) -> Tensor:
    """`construct` of specs/redunet.yaml; compiling is not part of it."""
    members = F.one_hot(labels).to(z).mT
    return network(z.shape[1], len(members), layers, str(z.device)).construct(X=z, Pi=members)


@cache
def network(d: int, K: int, layers: int, device: str) -> unroll.Network:
    sizes = {"d": d, "K": K}
    return unroll.compile("redunet", dims=sizes, overrides=[f"unroll.layers={layers}"], device=device)


def inverses(d: int, K: int, layers: int, device: str) -> Run:
    matrices = torch.eye(d, device=device).expand(K + 1, d, d) + 0.1 * torch.randn(K + 1, d, d, device=device) / d

    def run() -> None:
        for _ in range(layers):
            for matrix in matrices:
                torch.linalg.inv(matrix)

    return run


def measure(construct: Construct | None, device: str, rounds: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for m, d, K, layers in SHAPES:
        z, labels = mixture(m, d, K, device)

        def by_hand(z: Tensor = z, labels: Tensor = labels, layers: int = layers) -> Tensor:
            return redunet_construct(z, labels, layers)[1]

        runs: dict[str, Run] = {EXPERT: by_hand, "its inverses alone": inverses(d, K, layers, device)}
        if construct is not None:
            torch.testing.assert_close(construct(z, labels, layers), by_hand(), rtol=1e-3, atol=1e-3)
            runs["emitted"] = lambda z=z, labels=labels, layers=layers: construct(z, labels, layers)
        found = against(interleaved(runs, device, rounds), EXPERT)
        rows += [{"m": m, "d": d, "classes": K, "layers": layers} | row for row in found]
    return rows


def main(construct: Construct | None = emitted) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(construct, args.device, args.rounds)
    write("redunet_construct", rows, threads=1, device=args.device, dtype="float32")


if __name__ == "__main__":
    main()
