"""Every stage of a spec as text: what `unroll show --stage` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unroll.api import Source, build, origin_of, read, shares
from unroll.derivation.derive import derive
from unroll.errors import UnrollError
from unroll.language.nodes import show_shape
from unroll.language.problem import from_spec
from unroll.language.show import text
from unroll.model.describe import describe
from unroll.model.source import wrap
from unroll.network import loss as losses
from unroll.pages.graph_picture import graph_text
from unroll.spec import Spec


def stage(spec: Source, name: str, *, dims: Mapping[str, int] | None = None, overrides: Sequence[str] = ()) -> str:
    """One stage as text: spec, problem, derivation, step, graph or source."""
    loaded = read(spec, overrides)
    if name == "spec":
        return loaded.to_yaml()
    if name == "problem":
        return _problem_text(loaded, dims)
    if name == "source" and loaded.unroll is None and loaded.model is None:
        return _loss_source(loaded, dims)
    derivation = derive(loaded, dict(dims or {}))
    match name:
        case "derivation":
            return "\n".join([str(derivation), *describe(loaded)])
        case "step":
            return "\n".join(
                f"{a.target.name} <- {a.value}" for a in (*derivation.step.definitions, *derivation.step.assigns)
            )
        case "graph":
            program = build(derivation)
            return "\n".join([graph_text(program.graph), "", "passes:", *(f"  {line}" for line in program.log)])
        case "source":
            return _source(loaded, dims)
        case _:
            raise UnrollError(
                "E401", f"there is no stage '{name}'", hint="spec, problem, derivation, step, graph, source"
            )


def _source(spec: Spec, dims: Mapping[str, int] | None) -> str:
    """The layers, and the model around them if there is one."""
    ours, theirs = shares(spec, {"dims": dims or {}})
    if spec.model is None:
        return build(derive(spec, ours["dims"])).source
    decoder = build(derive(spec.decoder, theirs["dims"])) if spec.decoder is not None else None
    return wrap(spec, build(derive(spec.layers(), ours["dims"])), decoder).source


def _loss_source(spec: Spec, dims: Mapping[str, int] | None) -> str:
    """What is emitted for an objective that is not unrolled: the objective itself."""
    return losses.recipe(from_spec(spec, dims), spec.title, origin=origin_of(spec)).written.source


def _problem_text(spec: Spec, dims: Mapping[str, int] | None) -> str:
    problem = from_spec(spec, dims)
    rows = [f"{s.role:10} {s.name:8} {show_shape(s.shape)}" for s in problem.symbols.values()]
    rows += [f"scalar     {s.name:8} {'' if v is None else v}" for s, v in problem.scalars.items()]
    rows += [f"size       {d.name:8} {'open' if n is None else n}" for d, n in problem.dims.items()]
    return "\n".join(
        [
            *rows,
            "",
            "minimise" if problem.sign > 0 else "maximise",
            *(f"  {n}: {text(e)}" for n, e in problem.terms.items() if e in problem.penalties),
            *(["subject to", *(f"  {text(e)}" for e in problem.sets)] if problem.sets else []),
        ]
    )
