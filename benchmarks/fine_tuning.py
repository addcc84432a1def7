"""A small CRATE trained on the digits 0 to 4, and taken to the digits 5 to 9 in larger images: each way beside training from scratch.

Every network is trained for the same steps, saved, restored, and measured again on held-out images. Writes results/fine_tuning.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _record import write

import unroll
from unroll.spec import load
from unroll.train import labels, train
from unroll.train.data import make_data
from unroll.train.groups import shares
from unroll.train.samples import Shapes

SPEC = "crate_digits"
OLD = ["data={source: digits, form: images, classes: [0, 1, 2, 3, 4], validation: 200}", "model.head.classes=5"]
NEW = [
    "data={source: digits, form: images, classes: [5, 6, 7, 8, 9], validation: 400, size: SIZE}",
    "model.head.classes=5",
]
IMAGES = {
    "12 x 12 in patches of 2": ["model.embed={image: [1,12,12]}"],
    "16 x 16 in patches of 4": ["model.embed={image: [1,16,16], patch: 4}"],
}
LAYERS = [
    f"unroll.blocks.{name}.shape={{rank: 4}}"
    for name in ("compress.learn.W", "compress.learn.W_out", "sparsify.learn.Q")
]
WAYS = {
    "from scratch": [],
    "all of it": ["FROM"],
    "layers slower towards the first": ["FROM", "train.layer_decay=0.65"],
    "what is before the layers and two of four frozen": [
        "FROM",
        "train.freeze=[embed, token_norm, positions, class_token, 'body[:2]']",
    ],
    "changes of rank 4 in the layers": ["FROM", *LAYERS],
    "head alone": ["FROM", "train.only=[head, head_norm]"],
}
FEW = ("from scratch", "all of it", "what is before the layers and two of four frozen", "head alone")
"""Of the second images."""


def trained(folder: Path, overrides: list[str], steps: int) -> Any:
    spec = load(SPEC).to_dict()
    spec["train"] = {k: v for k, v in spec["train"].items() if k != "epochs"} | {"steps": steps, "warmup": steps // 10}
    return train(spec, overrides=overrides, out=folder, quiet=True)


def again(run: Any, folder: Path, overrides: list[str]) -> dict[str, float]:
    """The network saved, restored, and measured on the held-out images: nats and accuracy."""
    spec = load(SPEC, overrides)
    assert spec.data is not None and spec.train is not None
    net: Any = unroll.restore(run.net.save(folder))
    held = make_data(spec.data, Shapes({})).validation.to(next(net.parameters()))
    found = labels.held_out(net.eval(), held, spec.train)
    closing = {name: value for name, value in run.table[-1].values.items() if name in ("nats", "accuracy")}
    assert all(abs(found[name] - value) < 1e-9 for name, value in closing.items()), (found, closing)
    return found


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--steps", type=int, default=100)
    parse.add_argument("--before", type=int, default=300)
    steps = parse.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        first = trained(Path(place) / "first", OLD, steps.before)
        rows.append(
            {"network": f"0 to 4, {steps.before} steps", **shown(again(first, Path(place) / "saved", OLD), first)}
        )
        for image, sizes in IMAGES.items():
            for way, settings in WAYS.items() if image == next(iter(IMAGES)) else ((w, WAYS[w]) for w in FEW):
                overrides = [text.replace("SIZE", image.split()[0]) for text in (*NEW, *sizes)]
                own = [text.replace("FROM", f"train.from={first.folder}") for text in settings]
                run = trained(Path(place) / f"run {len(rows)}", [*overrides, *own], steps.steps)
                found = again(run, Path(place) / f"saved {len(rows)}", overrides)
                rows.append({"network": f"5 to 9, {image}: {way}", **shown(found, run)})
    write("fine_tuning", rows, steps=steps.steps, before=steps.before)


def shown(found: dict[str, float], run: Any) -> dict[str, Any]:
    settings = load(run.folder / "spec.yaml").train
    assert settings is not None
    share = shares(run.net, settings)
    learned = sum(
        int((share[name] > 0).sum()) * (p.numel() // share[name].numel()) for name, p in run.net.named_parameters()
    )
    return {"accuracy": found["accuracy"], "nats": found["nats"], "numbers learned": learned, "seconds": run.seconds}


if __name__ == "__main__":
    main()
