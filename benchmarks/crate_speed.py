"""CRATE-T and CRATE-B: forward and training step against modules written by hand and against their matrix products alone.

python benchmarks/crate_speed.py            prints a table and writes results/crate_speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _experts import Crate, crate_products, explicit, fused
from _record import write
from _timing import Run, against, interleaved
from torch import Tensor, nn
from torch.nn import functional as F

import unroll

Build = Callable[[dict[str, Tensor]], nn.Module]
"""Makes images (B, 3, 224, 224) → logits (B, 1000) with the weights of a released state dict."""

PRODUCTS = "its matrix products"
EXPERT = "by hand, explicit attention"
SIZES = {"T": (384, 6), "B": (768, 12)}
"""Numbers of a token, and heads."""


def modules(emitted: Build | None, size: str, device: str) -> dict[str, nn.Module]:
    """The networks side by side, all with the same weights."""
    expert, faster = (Crate(kind, *of(size)).to(device) for kind in (explicit, fused))
    faster.load_state_dict(expert.state_dict())
    found = {EXPERT: expert, "by hand, fused attention": faster}
    return found if emitted is None else {"emitted": emitted(expert.state_dict()).to(device), **found}


def of(size: str) -> tuple[int, int, int]:
    """d, layers, heads."""
    d, heads = SIZES[size]
    return d, 12, heads


def emitted(state: dict[str, Tensor]) -> nn.Module:
    """The layers of specs/crate.yaml with the patches and the head written by hand around them."""
    d = state["cls_token"].shape[-1]
    heads = d // 64
    net, layers = Crate(fused, d, 12, heads), unroll.compile("crate", dims={"d": d, "K": heads})
    net.load_state_dict(state)
    with torch.no_grad():
        for i in range(layers.layers):
            one, two = (f"transformer.layers.{i}.{part}" for part in (0, 1))
            layers.W[i] = state[f"{one}.fn.qkv.weight"].unflatten(0, (heads, 64)).mT
            layers.W_out[i] = state[f"{one}.fn.to_out.0.weight"].unflatten(1, (heads, 64)).movedim(1, 0)
            layers.W_out_bias[i] = state[f"{one}.fn.to_out.0.bias"]
            layers.Q[i] = state[f"{two}.fn.weight"]
            for norm, at in (("compress", one), ("sparsify", two)):
                getattr(layers, f"{norm}_norm_weight")[i] = state[f"{at}.norm.weight"]
                getattr(layers, f"{norm}_norm_bias")[i] = state[f"{at}.norm.bias"]
    net.transformer = layers
    return net


def forward(net: nn.Module, images: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            net(images)

    return run


def training_step(net: nn.Module, images: Tensor, labels: Tensor) -> Run:
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def run() -> None:
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()

    return run


def products(batch: int, size: str, backward: bool, device: str) -> Run:
    d, layers, heads = of(size)
    pairs = crate_products(batch, 197, d, heads, layers, 768, 1000, backward, device)

    def run() -> None:
        with torch.no_grad():
            for a, b in pairs:
                a @ b

    return run


def measure(emitted: Build | None, size: str, batch: int, rounds: int, device: str) -> list[dict[str, object]]:
    torch.manual_seed(0)
    nets = modules(emitted, size, device)
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    with torch.no_grad():
        outputs = {name: net(images) for name, net in nets.items()}
    for out in outputs.values():
        torch.testing.assert_close(out, outputs[EXPERT], rtol=1e-3, atol=1e-4)
    rows: list[dict[str, object]] = []
    for what in ("forward", "training step"):
        runs = {
            k: forward(v, images) if what == "forward" else training_step(v, images, labels) for k, v in nets.items()
        }
        runs[PRODUCTS] = products(batch, size, what != "forward", device)
        about = {"size": size, "what": what, "batch": batch}
        rows += [about | row for row in against(interleaved(runs, device, rounds), EXPERT)]
    return rows


def main(emitted: Build | None = emitted) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=[*SIZES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for size in args.sizes for row in measure(emitted, size, args.batch, args.rounds, args.device)]
    write("crate_speed", rows, threads=1, device=args.device, dtype="float32")


if __name__ == "__main__":
    main()
