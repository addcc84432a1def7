"""Constructing a ReduNet that commutes with shifts: dense matrices, per frequency by hand in a loop, and as emitted.

python benchmarks/shift_construct.py      prints a table and writes results/shift_construct.json
"""

from __future__ import annotations

import argparse

import torch
from _record import write
from _timing import Run, against, interleaved
from torch import Tensor
from torch.nn import functional as F

import unroll

SHAPES = ((100, 2, 32, 4, 2), (200, 8, 32, 4, 1), (500, 15, 200, 10, 2))
"""Samples, channels, places, classes, layers; the last one is that of rotated MNIST digits in polar coordinates."""

DENSE_UP_TO = 256
"""Channels by places; beyond, a layer of dense matrices holds all places times as many samples."""

LOOP, DENSE, EMITTED = "by hand, loop over frequencies", "emitted, dense", "emitted, per frequency"


def network(c: int, T: int, K: int, layers: int, dense: bool) -> unroll.Network:
    """The spec as it is, or without its rewrite: operators of c T by c T entries."""
    spec = unroll.load("redunet_1d").to_dict()
    if dense:
        own = dict(spec["unroll"])  # type: ignore[arg-type]
        estimate = "softmax(-sharpness / gamma[k] * sqrt(sum((C[k] @ Z)**2, axis=0)), over=k).T for k in K"
        spec["unroll"] = own | {"rewrites": [], "estimate": {"Pi": estimate}}
    return unroll.compile(spec, dims={"c": c, "T": T, "K": K}, overrides=[f"unroll.layers={layers}"])


def by_hand(x: Tensor, labels: Tensor, c: int, T: int, K: int, layers: int) -> Tensor:
    """The released construction, with the factor T of the covariance of all shifts: an inverse per frequency and class."""
    m, eye = len(x), torch.eye(c, dtype=torch.complex64)
    v, sizes = torch.fft.fft(x.view(m, c, T), norm="ortho"), torch.bincount(labels, minlength=K)
    a = c / (m * 0.1)
    for _ in range(layers):
        E, C = torch.empty(T, c, c, dtype=v.dtype), torch.empty(K, T, c, c, dtype=v.dtype)
        for f in range(T):
            E[f] = a * torch.linalg.inv(eye + a * T * v[:, :, f].T @ v[:, :, f].conj())
        for k in range(K):
            u, b = v[labels == k], c / (sizes[k] * 0.1)
            for f in range(T):
                C[k, f] = b * torch.linalg.inv(eye + b * T * u[:, :, f].T @ u[:, :, f].conj())
        near = torch.einsum("ktce,met->mkct", C, v)
        soft = torch.softmax(-500 * torch.linalg.vector_norm(near, dim=(-2, -1)), -1) * sizes / m
        v = v + 0.5 * (torch.einsum("tce,met->mct", E, v) - (soft[..., None, None] * near).sum(1))
        v = v / torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)
    return torch.fft.ifft(v, norm="ortho").real.flatten(1)


def contestants(m: int, c: int, T: int, K: int, layers: int) -> dict[str, Run]:
    """All of one shape; they agree."""
    x, labels = F.normalize(torch.randn(m, c * T), dim=-1), torch.arange(m) % K
    members = F.one_hot(labels, K).float().mT
    runs: dict[str, Run] = {LOOP: lambda: by_hand(x, labels, c, T, K, layers)}
    for name, dense in ((EMITTED, False), (DENSE, True)):
        if not dense or c * T <= DENSE_UP_TO:
            net = network(c, T, K, layers, dense)
            runs[name] = lambda net=net: net.construct(X=x, Pi=members)
            torch.testing.assert_close(net.construct(X=x, Pi=members), runs[LOOP](), rtol=1e-3, atol=1e-4)
    return runs


def measure(rounds: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for m, c, T, K, layers in SHAPES:
        shape = {"samples": m, "channels": c, "places": T, "classes": K, "layers": layers}
        found = interleaved(contestants(m, c, T, K, layers), "cpu", rounds)
        rows += [shape | row for row in against(found, LOOP)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    write("shift_construct", measure(args.rounds), threads=1, device="cpu", dtype="float32")


if __name__ == "__main__":
    main()
