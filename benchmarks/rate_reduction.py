"""The rate reduction of 200 classes, its value and slope: the emitted loss against what is written by hand.

python benchmarks/rate_reduction.py         prints a table and writes results/rate_reduction.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _record import write
from _timing import Run, against, interleaved
from torch import Tensor
from torch.nn import functional as F

import unroll

EPS2 = 0.1
Rate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Features (N, d), labels (N,), memberships (K, N) -> minus the rate reduction."""


def rate(z: Tensor, weight: Tensor | float) -> Tensor:
    d = z.shape[-1]
    return 0.5 * torch.logdet(torch.eye(d, dtype=z.dtype, device=z.device) + weight * z.mT @ z)


def by_memberships(z: Tensor, labels: Tensor, members: Tensor) -> Tensor:
    """As released: a diagonal matrix of memberships for each class, one determinant after the other."""
    n, d = z.shape
    eye, total = torch.eye(d, dtype=z.dtype, device=z.device), members.sum(-1)
    compressed = z.new_zeros(())
    for w, size in zip(members, total, strict=True):
        compressed = compressed + size / (2 * n) * torch.logdet(eye + d / (size * EPS2) * (z.mT * w) @ z)
    return compressed - rate(z, d / (n * EPS2))


def by_labels(z: Tensor, labels: Tensor, members: Tensor) -> Tensor:
    """The samples of a class picked out, one determinant after the other."""
    n, d = z.shape
    parts = [z[labels == k] for k in range(len(members))]
    return sum(len(p) / n * rate(p, d / (len(p) * EPS2)) for p in parts) - rate(z, d / (n * EPS2))


def value_and_slope(loss: Rate, z: Tensor, labels: Tensor, members: Tensor) -> Run:
    def run() -> None:
        torch.autograd.grad(loss(z, labels, members), z)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for classes, each, d in ((200, 10, 128), (200, 50, 128), (10, 200, 128)):
        labels = torch.arange(classes, device=args.device).repeat_interleave(each)
        z = F.normalize(torch.randn(len(labels), d, device=args.device), dim=-1).requires_grad_()
        members = F.one_hot(labels).mT.to(z.dtype)
        emitted = unroll.loss("rate_reduction").to(args.device)
        losses: dict[str, Rate] = {
            "emitted": lambda z, labels, members, loss=emitted: loss(Z=z, Pi=members),
            "by hand, labels": by_labels,
            "by hand, memberships": by_memberships,
        }
        values = [loss(z, labels, members).detach() for loss in losses.values()]
        for value in values:
            torch.testing.assert_close(value, values[-1], rtol=1e-3, atol=1e-3)
        runs = {name: value_and_slope(loss, z, labels, members) for name, loss in losses.items()}
        found = against(interleaved(runs, args.device, args.rounds), "by hand, labels")
        rows += [{"classes": classes, "samples of each": each, "d": d} | row for row in found]
    write("rate_reduction", rows, threads=1, device=args.device, dtype="float32, emitted float64 within")


if __name__ == "__main__":
    main()
