"""What the class token looks at, against masks that are known: a white box and a black one, trained alike to read one digit among clutter.

A digit of 8 x 8 pixels lies in one of nine places of an image of 12 x 12, with 3 x 3 pieces of other digits and noise around it; its mask are
its pixels of ink. Nobody tells the networks where it is. The fewest patches with 60 % of what the class token takes from all patches are held against the
mask, by digits that were never trained on: of the head that is best for all images (chosen on other ones), and of the best head of each.
Writes results/segmentation.json and docs/segmentation_*.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _record import ROOT, write
from sklearn.datasets import load_digits
from torch import Tensor

import unroll
from unroll.model.inside import enlarged, heaviest
from unroll.spec import load
from unroll.train import train

SIDE, CLUTTER, PIECE, NOISE, HELD = 12, 2, 3, 0.2, 297
SPECS = {"CRATE": "crate_digits", "ViT": "vit_digits"}


def composed(digits: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(images (count, 1, SIDE, SIDE), labels (count,), masks (count, SIDE, SIDE)) of digits (n, 8, 8) in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=g))
    images = NOISE * torch.rand(count, SIDE, SIDE, generator=g)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    chosen = torch.randint(len(digits), (count,), generator=g)
    for image, mask, i in zip(images, masks, chosen.tolist(), strict=True):
        for _ in range(CLUTTER):
            top, left, y, x = (draw(n) for n in (SIDE - PIECE + 1, SIDE - PIECE + 1, 9 - PIECE, 9 - PIECE))
            piece, at = digits[draw(len(digits))], (slice(top, top + PIECE), slice(left, left + PIECE))
            image[at] = torch.maximum(image[at], piece[y : y + PIECE, x : x + PIECE])
        top, left = 2 * draw((SIDE - 8) // 2 + 1), 2 * draw((SIDE - 8) // 2 + 1)
        image[top : top + 8, left : left + 8] = torch.maximum(image[top : top + 8, left : left + 8], digits[i])
        mask[top : top + 8, left : left + 8] = digits[i] > 0.25
    return images[:, None], labels[chosen], masks


def trained(spec: str, folder: Path, steps: int, lr: float) -> Any:
    own = load(spec).to_dict()
    own["data"] = {"source": "file", "files": {n: str(folder / f"{n}.pt") for n in ("image", "labels")}, "validation": 500}  # fmt: skip
    own["model"]["embed"]["image"] = [1, SIDE, SIDE]
    own["train"] = {k: v for k, v in own["train"].items() if k != "epochs"} | {"steps": steps, "lr": lr}
    return train(own, out=folder / spec, quiet=True).net.eval()


@torch.no_grad()
def measured(net: Any, first: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """A row for every layer: (images, masks) to choose the head on, and to measure."""
    rows: list[dict[str, Any]] = []
    for layer in range(1, net.layers + 1):
        chosen = int(unroll.jaccard(unroll.segment(net, first[0], layer=layer), first[1]).mean(0).argmax())
        found = unroll.jaccard(unroll.segment(net, held[0], layer=layer), held[1])
        rows.append(
            {
                "layer": layer,
                "one head": float(found[:, chosen].mean()),
                "best of each": float(found.max(-1).values.mean()),
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--steps", type=int, default=1500)
    parse.add_argument("--samples", type=int, default=20_000)
    parse.add_argument("--lr", type=float, default=3e-3)
    asked = parse.parse_args()
    data = load_digits()
    digits, labels = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    images, names, masks = composed(digits[:-HELD], labels[:-HELD], asked.samples, seed=0)
    test, answers, truth = composed(digits[-HELD:], labels[-HELD:], 1000, seed=1)
    rows: list[dict[str, Any]] = []
    nets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        torch.save(images, Path(place) / "image.pt")
        torch.save(names, Path(place) / "labels.pt")
        for name, spec in SPECS.items():
            with torch.enable_grad():
                nets[name] = trained(spec, Path(place), asked.steps, asked.lr)
            before = unroll.compile(nets[name].spec, seed=0).eval()
            for said, net in (("trained", nets[name]), ("untrained", before)):
                right = float((net(test).argmax(-1) == answers).double().mean())
                size = sum(p.numel() for p in net.parameters())
                for row in measured(net, (images[:500], masks[:500]), (test, truth)):
                    rows.append({"network": f"{name}, {said}", "parameters": size, "accuracy": right, **row})
    one = next(iter(nets.values()))
    patches = torch.nn.functional.avg_pool2d(test[:, 0], 2).flatten(1)
    best = torch.nn.functional.max_pool2d(truth.float(), 2)
    share = torch.rand(patches.shape, generator=torch.Generator().manual_seed(0))
    for name, mass in (("the brightest patches", patches), ("patches by chance", share)):
        cut = enlarged(one, heaviest(mass, 0.6).unflatten(-1, best.shape[-2:]))
        rows.append(_without(name, float(unroll.jaccard(cut, truth).mean())))
    rows.append(
        _without("all patches with ink, the most that patches can", float(unroll.jaccard(enlarged(one, best > 0), truth).mean()))
    )  # fmt: skip
    for name, net in nets.items():
        unroll.draw_segments(net, test[:4], ROOT / "docs" / f"segmentation_{name.lower()}.png", truth=truth[:4])
    write("segmentation", rows, steps=asked.steps, samples=asked.samples, lr=asked.lr, images=len(test), share=0.6)


def _without(name: str, found: float) -> dict[str, Any]:
    """The row of what is no network."""
    return {"network": name, "parameters": "-", "accuracy": "-", "layer": "-", "one head": found, "best of each": "-"}


if __name__ == "__main__":
    main()
