"""One HTML page about a spec or a finished run: the derivation, the graph, the laws, the module, the curves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from unroll import html
from unroll.api import Source, build, derive, read, stage
from unroll.derivation import Derivation
from unroll.errors import SpecError
from unroll.interpret import svg
from unroll.laws import check
from unroll.spec import Spec

Section = tuple[str, str]


def report(source: Source, path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> Path:
    """Write the page of a spec, or of the run in a folder. Raises SpecError for a spec that does not compile."""
    target = Path(path)
    run = _run_folder(source)
    if run is not None and overrides:
        raise SpecError(
            "E510", f"'{run}' is a finished run: its spec cannot be overridden", hint=f"unroll report {run}"
        )
    spec = read(source if run is None else run / "spec.yaml", overrides)
    derivation = derive(spec)
    measured = _of_layers(spec) if run is None else _of_trained(run)
    sections = [
        *_of_spec(spec, derivation),
        *(_of_run(run) if run is not None else ()),
        *measured,
        *_of_network(derivation),
    ]
    target.write_text(html.page(spec.title, derivation.problem.about, sections), encoding="utf-8")
    return target


def _run_folder(source: Source) -> Path | None:
    """The folder, if the source is one that holds a run."""
    if not isinstance(source, str | Path) or "\n" in str(source):
        return None
    return Path(source) if (Path(source) / "run.json").is_file() else None


def _of_spec(spec: Spec, derivation: Derivation) -> Iterator[Section]:
    yield (
        "Derivation",
        html.equations(derivation.equations()) + html.folded("in words", html.preformatted(str(derivation))),
    )
    yield "Spec", html.preformatted(spec.to_yaml())
    yield "Laws", _laws(spec)


def _of_network(derivation: Derivation) -> Iterator[Section]:
    program = build(derivation)
    yield "Graph of one layer", html.scrolled(svg(program.graph)) + html.preformatted("\n".join(program.log))
    yield "Module", html.python(stage(derivation.spec, "source"))


# --- what each layer did ----------------------------------------------------------------------------------------------

MOST_ROWS, SAMPLES, TOKENS = 120, 16, 32


def _of_layers(spec: Spec) -> Iterator[Section]:
    """The untrained layers on drawn inputs; nothing where an input cannot be drawn (data that a network is worked out on)."""
    import torch

    from unroll.api import compile_layers

    open_sizes = {d: TOKENS for d, n in spec.dims.items() if not isinstance(n, int)}
    net = compile_layers(spec, dims={d: n for d, n in open_sizes.items() if spec.dims[d] != "dynamic"})
    if not net.built or not net.inputs:
        return
    symbols, generator = net.program.problem.symbols, torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {}
    for name in net.program.problem.symbols:
        s = symbols[name]
        if s.role == "input":
            sizes = [TOKENS if n is None else n for n in net.program.tensor_sizes(s)]
            drawn = torch.randn(SAMPLES, *sizes, generator=generator)
            batch[name] = drawn.abs() if "positive" in s.props else drawn
    note = f"Untrained, on {SAMPLES} samples drawn from a Gaussian: what the derivation leads one to expect, not what training makes of it."
    yield "What each layer does", _did(net, [batch], note)


def _of_trained(folder: Path) -> Iterator[Section]:
    """The trained network of a run on its held-out samples."""
    from unroll.model.module import Model
    from unroll.network import Network
    from unroll.train.run import trained_on

    if (folder / "weights.safetensors").is_file():
        net, batches = trained_on(folder)
        if isinstance(net, Network | Model):
            yield (
                "What each layer does",
                _did(
                    net,
                    batches,
                    "Trained, on the held-out samples of the run, each step measured with its own layer's parameters.",
                ),
            )


def _did(net: Any, batches: Any, note: str) -> str:
    """Every term after every step as curves, and predicted and actual changes as a table."""
    from unroll.whitebox import HEAD, white_box

    found = white_box(net, batches)
    curves = {term: [float(v) for v in found.values[term].mean] for term in found.terms}
    zeros = {name: [float(v) for v in m.mean] for name, m in found.zeros.items()}
    rows = found.rows()
    cut = f"<p>The first {MOST_ROWS} of {len(rows)} rows.</p>" if len(rows) > MOST_ROWS else ""
    step = "step (blocks one after the other)" if len(set(b for _, b in found.labels)) > 1 else "layer"
    charts = html.lines(curves, step, "term of the objective") + html.lines(zeros, step, "share of zeros")
    return f"<p>{note}</p>" + charts + html.folded("every step", html.table(HEAD, rows[:MOST_ROWS]) + cut)


def _laws(spec: Spec) -> str:
    found = check(spec)
    rows = [(r.law, r.measured, r.reference, r.verdict) for r in found.rows]
    return html.table(("law", "measured", "bound / reference", "verdict"), rows)


# --- a run ------------------------------------------------------------------------------------------------------------


def _of_run(folder: Path) -> Iterator[Section]:
    from unroll.train.engine import read_rows

    yield "Training", _training(read_rows(folder / "metrics.csv"))
    if (folder / "table.json").is_file():
        ended: dict[str, Any] = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        if ended["layers"]:
            layers = cast(dict[str, list[float | None]], ended["layers"])
            yield "Layer by layer", _layers(layers, str(ended["reference"]))
        yield "Closing table", _closing(cast(list[dict[str, Any]], ended["rows"]))


def _training(rows: Sequence[dict[str, float]]) -> str:
    curves = {name: [row[key] for row in rows] for key, name in (("loss", "training"), ("held_out", "held out"))}
    return html.lines(curves, "measurement", "loss")


def _layers(errors: dict[str, list[float | None]], reference: str) -> str:
    values = {name: [html.decibel(v) for v in row] for name, row in errors.items()}
    return html.lines(values, "layer", f"NMSE in dB, against the {reference}")


def _closing(rows: Sequence[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if key != "name"]
    body = [(str(row["name"]), *("-" if row[key] is None else f"{row[key]:.4g}" for key in columns)) for row in rows]
    return html.table(("", *(key.replace("_", " ") for key in columns)), body)
