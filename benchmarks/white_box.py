"""What every half of every layer of a trained CRATE does to the objective that it is derived from, on held-out digits.

R^c is measured with the subspaces that the layer has learned, before and after its compression; R, the l1 norm and the zeros before and
after its sparsification. Tokens as they are, and scaled to length sqrt(d) each, for rates grow with the length of tokens.
Writes results/white_box.json and docs/crate_digits.png.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from _record import ROOT, write
from torch import Tensor

import unroll
from unroll.spec import load
from unroll.train import labels, train
from unroll.train.data import make_data
from unroll.train.samples import Shapes

SPEC = "crate_digits"
READ = {"compress": ("compression",), "sparsify": ("expansion", "sparsity", "zeros")}
"""The terms that each half is about. All are maximised: a change above zero is what the derivation promises."""


@dataclass(frozen=True)
class Change:
    """One term (B,) before and after half a layer, and its change to first order."""

    before: Tensor
    after: Tensor
    first: Tensor | None

    def row(self) -> dict[str, float | str]:
        gained = self.after - self.before
        return {
            "before": float(self.before.mean()), "after": float(self.after.mean()), "change": float(gained.mean()),
            "first order": float(self.first.mean()) if self.first is not None else "-",
            "improves": "yes" if gained.mean() > 0 else "NO", "images improved": float((gained > 0).double().mean()),
        }  # fmt: skip


def scaled(z: Tensor) -> Tensor:
    """Every token (..., d) at length sqrt(d), as a norm without weights leaves it; zero stays zero."""
    return z * z.shape[-1] ** 0.5 / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def yardsticks(body: unroll.Network) -> list[unroll.Network]:
    """For each layer, the objective with its own subspaces."""
    learned = cast(Tensor, body.W).detach().double()
    dims = {n: body.program.dims[n] for n in ("d", "K", "p")}
    return [
        unroll.compile("crate", dims=dims, parameters={"U": U}, dtype=torch.float64, overrides=["unroll.layers=1"])
        for U in learned
    ]


def change(yard: unroll.Network, x: Tensor, before: Tensor, after: Tensor, term: str) -> Change:
    """x: (B, N, d), what went into the layers, which no term reads."""
    if term == "zeros":
        return Change(*((z == 0).double().mean((-2, -1)) for z in (before, after)), None)
    at = before.clone().requires_grad_()
    value = yard.objective(x, Z=at)[term]
    (slope,) = torch.autograd.grad(value.sum(), at)
    first = (slope * (after - before)).sum((-2, -1))
    return Change(value.detach(), yard.objective(x, Z=after)[term].detach(), first)


def changes(net: unroll.Model, images: Tensor) -> list[dict[str, Any]]:
    """A row for every half-step, term and scale of the tokens."""
    trace, x = net.trace(images), net.embedding(images).detach().double()  # type: ignore[operator]
    steps = [z.detach().double() for z in trace.steps["Z"]]
    yards, rows = yardsticks(net.body), list[dict[str, Any]]()
    for k, (layer, block) in enumerate(trace.labels):
        for term in READ[block]:
            for scale, at in (("as they are", lambda z: z), ("length sqrt(d)", scaled)):
                if term in ("zeros", "sparsity") and scale != "as they are":
                    continue
                found = change(yards[layer - 1], x, at(steps[k]), at(steps[k + 1]), term)
                rows.append({"layer": layer, "half": block, "term": term, "tokens": scale, **found.row()})
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Arrows from before to after: blue where the term improves, red where it does not."""
    import matplotlib.pyplot as plt

    panels = [
        ("compression", "as they are", -1, "$R^c$, compression rate"),
        ("compression", "length sqrt(d)", -1, "$R^c$, tokens of length $\\sqrt{d}$"),
        ("expansion", "as they are", 1, "$R$, rate of all tokens"),
        ("expansion", "length sqrt(d)", 1, "$R$, tokens of length $\\sqrt{d}$"),
        ("sparsity", "as they are", -1, "$\\lambda\\,\\|Z\\|_1$"),
        ("zeros", "as they are", 1, "share of zeros"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.2), layout="constrained")
    for axis, (term, scale, sign, title) in zip(axes.T.flat, panels, strict=True):
        own = [r for r in rows if r["term"] == term and r["tokens"] == scale]
        for r in own:
            colour = "tab:blue" if r["improves"] == "yes" else "tab:red"
            ends = [(r["layer"] + dx, sign * r[k]) for dx, k in ((-0.25, "before"), (0.25, "after"))]
            axis.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
            axis.plot(*zip(*ends, strict=True), "o", color=colour, ms=3)
        promised = {-1: "falls", 1: "rises"}[sign]
        half = next(r["half"] for r in own)
        axis.set_title(f"{title}\n{half}: {promised} by design", fontsize=9)
        axis.set_xticks([r["layer"] for r in own])
        axis.set_xlabel("layer", fontsize=8)
        axis.margins(y=0.2)
    figure.suptitle(
        "A trained CRATE on held-out digits, every half of a layer (blue: as derived, red: against it)", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = train(SPEC, overrides=[f"train.seed={args.seed}"], out=Path(folder) / "run", device="cpu", quiet=True)
    net, spec = cast(Any, run.net).eval(), load(SPEC)
    assert spec.data is not None and spec.train is not None
    data = make_data(spec.data, Shapes({}), {})
    splits = {"train": data.train.whole().to(torch.float32), "test": data.validation.to(torch.float32)}
    accuracy = {name: labels.held_out(net, split, spec.train)["accuracy"] for name, split in splits.items()}
    print(
        f"accuracy: train {accuracy['train']:.1%}, test {accuracy['test']:.1%}; {run.steps} steps, {run.seconds:.0f} s"
    )
    images = splits["test"].inputs["image"]
    rows = changes(net, images)
    write(
        "white_box",
        rows,
        threads=1,
        seed=args.seed,
        spec=SPEC,
        accuracy=accuracy,
        steps=run.steps,
        seconds=run.seconds,
        images=len(images),
    )
    picture(rows, ROOT / "docs" / "crate_digits.png")


if __name__ == "__main__":
    main()
