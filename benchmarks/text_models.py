"""White-box language models and a plain GPT of their width and depth, on the characters of Python's documentation.

All have the same embedding, optimiser, number of steps and order of samples. Loss: of the held-out tenth of the text, after the last step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from _record import write
from torch import Tensor, nn
from torch.nn import functional as F

import unroll
from unroll.spec import Spec, load
from unroll.spec.schema import Train
from unroll.train import labels
from unroll.train.data import make_data
from unroll.train.engine import fit
from unroll.train.samples import Data, Shapes

SPECS = ("crate_text", "crate_alpha_text", "tost_text")
ABOUT = {
    "crate_text": "causal self-attention, q = k = v; one step of ISTA, no residual",
    "crate_alpha_text": "causal self-attention, q = k = v; two steps of ISTA, 4 d atoms, residual",
    "tost_text": "running token statistics, linear in T; GELU, 4 d",
    "gpt": "causal self-attention; GELU, 4 d",
}


class Block(nn.Module):
    """x + A(norm x), then x + M(norm x): the block of GPT-2, without biases in its linear maps."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(read)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """tokens (B, T) -> logits (B, T, vocabulary); learned positions, head tied to the table of tokens."""

    inputs, given = ("tokens",), {}

    def __init__(self, vocabulary: int, length: int, d: int, heads: int, layers: int, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.layers = layers
        self.table, self.positions = nn.Embedding(vocabulary, d), nn.Parameter(0.02 * torch.randn(length, d))
        nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(d)

    @property
    def learned(self) -> tuple[SimpleNamespace, ...]:
        return tuple(SimpleNamespace(kind="matrix") for _ in self.parameters())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.positions[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.table.weight.mT


def networks(names: list[str], seed: int) -> Iterator[tuple[str, nn.Module]]:
    for name in names:
        if name != "gpt":
            yield name, unroll.compile(name, seed=seed)
            continue
        spec = load(SPECS[0])
        assert spec.model is not None and spec.unroll is not None
        embed, d, heads = cast(Any, spec.model.embed), int(spec.dims["d"]), int(spec.dims["K"])
        yield name, Gpt(embed.vocabulary, embed.length, d, heads, int(spec.unroll.layers), seed)


def settings_of(spec: Spec, lr: float, steps: int | None, seed: int) -> Train:
    assert spec.train is not None
    return Train.model_validate(
        {
            **spec.train.model_dump(exclude_unset=True),
            "lr": lr,
            "keep": "last",
            "seed": seed,
            **({"steps": steps} if steps else {}),
        }
    )


def measure(name: str, net: nn.Module, data: Data, settings: Train) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fit(cast(Any, net), data, settings, Path(folder), device="cpu")
    found = labels.held_out(cast(Any, net.eval()), data.validation, settings)
    return {
        "network": name, "is": ABOUT[name], "parameters": sum(p.numel() for p in net.parameters()), "lr": settings.lr, "steps": outcome.steps,
        "nats per character": found["nats"], "bits per character": found["bits"], "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=[*SPECS, "gpt"], choices=[*SPECS, "gpt"])
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-3, 1e-3])
    parser.add_argument("--steps", type=int, help="in place of those of the specs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = load(SPECS[0])
    assert spec.data is not None
    data = make_data(spec.data, Shapes({}), {})
    rows: list[dict[str, Any]] = []
    for lr in args.lr:
        for name, net in networks(args.networks, args.seed):
            rows.append(measure(name, net, data, settings_of(spec, lr, args.steps, args.seed)))
            write(
                "text_models",
                rows,
                threads=1,
                seed=args.seed,
                train=spec.train.model_dump(mode="json") if spec.train else {},
                text=spec.data.model_dump(mode="json"),
            )


if __name__ == "__main__":
    main()
