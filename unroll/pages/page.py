"""One HTML page about a spec or a finished run: the derivation, the graph, the laws, the module, the curves, what layers do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from unroll import html
from unroll.api import Source, build, derive, read
from unroll.derivation.derive import Derivation
from unroll.errors import SpecError, UnrollError
from unroll.laws.laws import check
from unroll.pages.graph_picture import svg
from unroll.pages.stages import stage
from unroll.spec import Spec

if TYPE_CHECKING:
    from unroll.model.module import Model
    from unroll.model.whitebox import Batch, Measured
    from unroll.network.network import Network
    from unroll.network.stepwise import AttentionMap

Section = tuple[str, str]


def report(
    source: Source | Measured,
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    at: str = "iterate",
    terms: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of a spec, of the run in a folder, or of what `audit` or `white_box` measured.

    at, terms: what is measured of each layer, as `Network.trace` takes them.
    Raises SpecError for a spec that does not compile or a formula, UnrollError E404 for another `at`, or for these with what is measured already.
    """
    from unroll.model.whitebox import Measured

    target, asked = Path(path), Asked(at, dict(terms or {}))
    if isinstance(source, Measured):
        if overrides or asked != Asked():
            raise UnrollError("E404", "what is measured already takes no overrides, at or terms")
        target.write_text(_of_measured(source), encoding="utf-8")
        return target
    run = _run_folder(source)
    if run is not None and overrides:
        raise SpecError(
            "E510", f"'{run}' is a finished run: its spec cannot be overridden", hint=f"unroll report {run}"
        )
    spec = read(source if run is None else run / "spec.yaml", overrides)
    derivation = derive(spec)
    measured = _of_layers(spec, asked) if run is None else _of_trained(run, asked)
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
    return Path(source) if isfile(Path(source) / "run.json") else None


def _of_measured(found: Measured) -> str:
    """One page of what was measured, of any network."""
    where = "as they are" if found.at == "iterate" else f"at their {found.at}"
    count = len(dict.fromkeys(layer for layer, _ in found.labels))
    about = f"{count} layers, {found.samples:,} samples, terms of the variables {where}"
    stand = [(name, place) for name, place in found.own.items()]
    weights = html.table(("parameter of the objective", "what stands in its place"), stand) if stand else ""
    return html.page("What each layer does", about, [("Terms", _changes(found)), ("Weights", weights)])


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

MOST_ROWS, MOST_STEPS, MOST_LAYERS, MOST_HEADS, MOST_TOKENS = 120, 96, 4, 8, 96
"""Of the table, of the curves, and of the maps: what is left out is said."""
SAMPLES, TOKENS = 16, 32
"""Of what is drawn for a spec."""


@dataclass(frozen=True)
class Asked:
    """What is measured of each layer, as `Network.trace` takes it."""

    at: str = "iterate"
    terms: dict[str, str] = field(default_factory=dict[str, str])


def _of_layers(spec: Spec, asked: Asked) -> Iterator[Section]:
    """The untrained layers on drawn inputs; nothing where an input cannot be drawn (data that a network is worked out on)."""
    import torch

    from unroll.api import compile_layers

    unsaid = {d: TOKENS for d, n in spec.dims.items() if not isinstance(n, int) and n != "dynamic"}
    net = compile_layers(spec, dims=unsaid, dtype=torch.float64)
    if not net.built or not net.inputs:
        return
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {}
    for name, s in net.program.problem.symbols.items():
        if s.role == "input":
            sizes = [TOKENS if n is None else n for n in net.program.tensor_sizes(s)]
            drawn = torch.randn(SAMPLES, *sizes, generator=generator, dtype=torch.float64)
            batch[name] = drawn.abs() if "positive" in s.props else drawn
    note = f"Untrained, on {SAMPLES} samples drawn from a Gaussian: what the derivation leads one to expect, not what training makes of it."
    yield from _did(net, [batch], note, asked)


def _of_trained(folder: Path, asked: Asked) -> Iterator[Section]:
    """The trained network of a run on its held-out samples."""
    from unroll.train.run import trained_on

    if (folder / "weights.safetensors").is_file():
        net, batches = trained_on(folder)
        note = "Trained, on the held-out samples of the run, each step measured with its own layer's parameters."
        yield from _did(net, batches, note, asked)


def _did(net: Network | Model, batches: Sequence[Batch], note: str, asked: Asked) -> Iterator[Section]:
    """Every term over the steps, and where every softmax looks; where one cannot be measured, why."""
    from unroll.model.inside import grid
    from unroll.model.whitebox import traced, white_box

    head = "What each layer does"
    try:
        found = white_box(net, batches, at=asked.at, terms=asked.terms)
    except UnrollError as e:
        if e.code != "E409":  # what was asked for is wrong: no page
            raise
        yield head, f"<p>{note}</p>{html.preformatted(str(e))}"
        return
    yield head, f"<p>{note} Means over {found.samples:,} samples.</p>" + _changes(found)
    yield "Attention", _attention(traced(net, _first(batches[0])).maps, grid(net))


def _first(batch: Batch) -> Batch:
    """The first sample of a batch."""
    if isinstance(batch, Mapping):
        return {name: value[:1] for name, value in batch.items()}
    return tuple(value[:1] for value in batch) if isinstance(batch, tuple) else batch[:1]


def _changes(found: Measured) -> str:
    """Every term after every step as curves, with predicted and actual changes, then as a table."""
    from unroll.model.whitebox import HEAD

    blocks = list(dict.fromkeys(block for _, block in found.labels))
    charts = "".join(f"<h3>{escape(term)}</h3>{html.course(_course(found, term))}" for term in found.terms)
    cut = f"<p>The first {MOST_STEPS} of {len(found.labels)} steps.</p>" if len(found.labels) > MOST_STEPS else ""
    zeros = {name: m.mean.tolist() for name, m in found.zeros.items()}
    across = f"step ({', '.join(blocks)} in turn)" if len(blocks) > 1 else "layer"
    rows = found.rows()
    rest = f"<p>The first {MOST_ROWS} of {len(rows)} rows.</p>" if len(rows) > MOST_ROWS else ""
    table = html.folded("every step", html.table(HEAD, rows[:MOST_ROWS]) + rest)
    shares = "<h3>share of zeros</h3>" + html.lines(zeros, across, "share of zeros")
    return html.course_legend(blocks, list(found.own)) + cut + charts + shares + table


def _course(found: Measured, term: str) -> html.Course:
    steps = found.labels[:MOST_STEPS]
    tables = (found.values, found.predicted, found.actual)
    value, predicted, actual = (t[term].mean.tolist() for t in tables)
    return html.Course(
        term,
        found.sign,
        value[: len(steps) + 1],
        predicted[: len(steps)],
        actual[: len(steps)],
        found.improved(term).tolist()[: len(steps)],
        [found.claimed(block, term) for _, block in steps],
        steps,
    )


# --- where it looks ---------------------------------------------------------------------------------------------------


def _attention(found: Sequence[AttentionMap], grid: tuple[int, int] | None) -> str:
    """Every softmax for one sample: rows take from columns; of a class token, where in the image it looks."""
    if not found:
        return ""
    layers = list(dict.fromkeys(m.layer for m in found))
    chosen = _spread(layers, MOST_LAYERS)
    shown: list[AttentionMap] = []
    for m in found:
        if m.layer in chosen and not any(_twins(m, other) for other in shown):
            shown.append(m)
    notes = [f"One sample, layers {', '.join(map(str, chosen))} of {layers[-1]}."]
    if any(m.weights.shape[-3] > MOST_HEADS for m in shown):
        notes.append(f"The first {MOST_HEADS} heads.")
    if any(max(m.weights.shape[-2:]) > MOST_TOKENS for m in shown):
        notes.append(f"The first {MOST_TOKENS} rows and columns.")
    if any(m.over == "tokens" for m in shown):
        notes.append("Row i of a head says how much token i takes from each, and sums to 1.")
    if any(m.over == "members" for m in shown):
        notes.append("Shares of the members of a family, which sum to 1 over them.")
    notes.append("White is the smallest weight of a map, black the largest, grey by the square root between them.")
    several = len({m.block for m in found}) > 1
    heads = [f"layer {m.layer}{', ' + m.block if several else ''}" for m in shown]
    body = "".join(f"<h3>{escape(head)}</h3>{_maps(m, grid)}" for head, m in zip(heads, shown, strict=True))
    return f"<p>{' '.join(notes)}</p>{body}"


def _twins(a: AttentionMap, b: AttentionMap) -> bool:
    """Do both show the same shares, of rows and of columns, say?"""
    import torch

    if (a.layer, a.block, a.over, b.over) != (b.layer, b.block, "members", "members"):
        return False
    x, y = a.weights.flatten(-2), b.weights.flatten(-2)
    return x.shape == y.shape and torch.allclose(x, y)


def _maps(m: AttentionMap, grid: tuple[int, int] | None) -> str:
    """A picture per head; where shares of members are those of single columns or rows, one of them all."""
    weights = m.weights.reshape(-1, *m.weights.shape[-3:])[0]  # (heads, rows, columns) of one sample
    if m.over == "members" and 1 in weights.shape[1:]:
        shares = weights.flatten(1)[:, :MOST_TOKENS]
        return html.maps([html.picture(shares.tolist(), "members by place", _cell(*shares.shape))])
    named = list(enumerate(weights[:MOST_HEADS], start=1))
    cut = [(f"head {k}" if len(weights) > 1 else "weights", w[:MOST_TOKENS, :MOST_TOKENS]) for k, w in named]
    out = html.maps(html.picture(w.tolist(), name, _cell(*w.shape)) for name, w in cut)
    if grid is None or weights.shape[1:] != (1 + grid[0] * grid[1],) * 2:
        return out
    looks = ((f"head {k}", w[0, 1:].reshape(grid)) for k, w in named)
    return (
        out
        + "<p>What the class token takes from each patch, in their places:</p>"
        + html.maps(html.picture(w.tolist(), name, _cell(*grid)) for name, w in looks)
    )


def _cell(rows: int, columns: int) -> int:
    """Pixels of a square, so that a picture is about as wide as the others."""
    return max(2, min(36, 144 // max(rows, columns)))


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _laws(spec: Spec) -> str:
    found = check(spec)
    rows = [(r.law, r.measured, r.reference, r.verdict) for r in found.rows]
    return html.table(("law", "measured", "bound / reference", "verdict"), rows)


# --- a run ------------------------------------------------------------------------------------------------------------


def _of_run(folder: Path) -> Iterator[Section]:
    from unroll.train.samples import package

    package("lightning", "a run of unroll train")
    from unroll.train.engine import read_rows
    from unroll.train.stored import read_json, reading

    with reading(folder / "metrics.csv"):
        training = _training(read_rows(folder / "metrics.csv"))
    yield "Training", training
    if (folder / "table.json").is_file():
        with reading(folder / "table.json"):
            ended: dict[str, Any] = read_json(folder / "table.json")
            layers = cast(dict[str, list[float | None]], ended["layers"])
            by_layer, closing = _layers(layers, str(ended["reference"])), _closing(ended["rows"])
        if layers:
            yield "Layer by layer", by_layer
        yield "Closing table", closing


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
