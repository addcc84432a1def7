"""Emitted ADMM, Condat-Vu and FISTA against the modules an expert would write by hand: forward and training step, in one interleaved run.

python benchmarks/splitting_speed.py        prints a table and writes results/splitting_speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _record import write
from _timing import interleaved
from lista_speed import Soft
from torch import Tensor, nn
from torch.nn import functional as F

import unroll


def soft(v: Tensor, t: Tensor) -> Tensor:
    return Soft.apply(v, t)


def adjoint(y: Tensor) -> Tensor:
    """Of differences of neighbours."""
    return F.pad(y, (1, 0)) - F.pad(y, (0, 1))


class Expert(nn.Module):
    """What all of them hold: the operator, and both weights of each layer, learned."""

    def __init__(self, A: Tensor, layers: int, weights: tuple[float, float]) -> None:
        super().__init__()
        self.register_buffer("A", A)
        start = torch.tensor(weights).log().expand(layers, 2).clone()
        self.weights = nn.Parameter(start)
        self.L = torch.linalg.matrix_norm(A, 2) ** 2

    def layers(self) -> Tensor:
        return self.weights.exp()


class Admm(Expert):
    """Boyd et al. 2011, section 3.1.1, on a fused lasso; the inverse is worked out once."""

    def __init__(self, A: Tensor, layers: int) -> None:
        rho = torch.linalg.matrix_norm(A, 2) ** 2 / 5
        super().__init__(A, layers, (0.1 / float(rho), 0.2 / float(rho)))
        n = A.shape[1]
        D = torch.eye(n).diff(dim=0)
        self.register_buffer("inverse", torch.linalg.inv(A.T @ A + rho * (torch.eye(n) + D.T @ D)))
        self.rho = rho

    def forward(self, x: Tensor) -> Tensor:
        b = x @ self.A
        z = torch.zeros_like(b)
        w, d = z, z.diff(dim=-1)
        u, v = torch.zeros_like(w), torch.zeros_like(d)
        for lam, mu in self.layers():
            z = (b + self.rho * (w - u + adjoint(d - v))) @ self.inverse
            s, t = z + u, z.diff(dim=-1) + v
            w, d = soft(s, lam), soft(t, mu)
            u, v = s - w, t - d
        return z


class CondatVu(Expert):
    """Condat 2013, algorithm 3.1, on a fused lasso."""

    def __init__(self, A: Tensor, layers: int) -> None:
        super().__init__(A, layers, (0.1, 0.2))
        self.sigma = self.L / 8
        self.tau = 1 / (self.L / 2 + 4 * self.sigma)
        self.register_buffer("step", self.tau * A)

    def forward(self, x: Tensor) -> Tensor:
        z = q = x.new_zeros(*x.shape[:-1], self.A.shape[1])
        y = z.diff(dim=-1)
        for lam, mu in self.layers():
            y = torch.clamp(y + self.sigma * q.diff(dim=-1), -mu, mu)
            new = soft(z + (x - z @ self.A.T) @ self.step - self.tau * adjoint(y), self.tau * lam)
            q, z = 2 * new - z, new
        return z


class Fista(Expert):
    """Beck & Teboulle 2009, on a lasso."""

    def __init__(self, A: Tensor, layers: int) -> None:
        super().__init__(A, layers, (0.1, 0.2))
        self.register_buffer("step", A / self.L)

    def forward(self, x: Tensor) -> Tensor:
        z = y = x.new_zeros(*x.shape[:-1], self.A.shape[1])
        t = 1.0
        for lam, _ in self.layers():
            new = soft(y + (x - y @ self.A.T) @ self.step, lam / self.L)
            after = (1 + (1 + 4 * t * t) ** 0.5) / 2
            y, z, t = new + (t - 1) / after * (new - z), new, after
        return z


CASES = {
    "admm": (Admm, "fused_lasso", {"lam": {"replaces": "lam / rho", "positive": True}, "mu_k": {"replaces": "mu / rho", "positive": True}}),
    "condat_vu": (CondatVu, "fused_lasso", {"theta": {"replaces": "lam", "positive": True}, "mu_k": {"replaces": "mu", "positive": True}}),
    "fista": (Fista, "lasso", {"theta": {"replaces": "lam", "positive": True}}),
}  # fmt: skip


def training(net: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        net.zero_grad()
        net(x).square().sum().backward()

    return step


def forward(net: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> Tensor:
        return net(x)

    return run


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    m, n, layers, batch = 64, 256, 12, 256
    A, x = torch.randn(m, n) / m**0.5, torch.randn(batch, m)
    rows: list[dict[str, object]] = []
    for name, (expert, objective, learn) in CASES.items():
        learn = {("lam_k" if k == "lam" else k): v for k, v in learn.items()}
        unrolled = {"algorithm": name, "layers": layers, "learn": learn}
        emitted = unroll.compile({"use": objective, "dims": {"m": m, "n": n}, "unroll": unrolled}, parameters={"A": A})
        written = expert(A, layers)
        torch.testing.assert_close(emitted(x), written(x), rtol=1e-3, atol=1e-3)
        for what, run in (("forward", forward), ("training step", training)):
            seconds = interleaved({"emitted": run(emitted, x), "expert": run(written, x)}, "cpu", rounds)
            ratio = sorted(a / b for a, b in zip(seconds["emitted"], seconds["expert"], strict=True))
            ms = {k: 1e3 * sorted(v)[len(v) // 2] for k, v in seconds.items()}
            rows.append(
                {
                    "algorithm": name,
                    "what": what,
                    "emitted ms": ms["emitted"],
                    "expert ms": ms["expert"],
                    "ratio": ratio[len(ratio) // 2],
                }
            )
    write("splitting_speed", rows, m=m, n=n, layers=layers, batch=batch, rounds=rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args().rounds)
