"""From a spec to a network, in one call; and every stage on the way as text."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy as sp

from unroll.derivation.derive import Derivation
from unroll.derivation.derive import derive as derive_spec
from unroll.errors import UnrollError, did_you_mean
from unroll.language.constructors import swap
from unroll.language.nodes import Sym, dim
from unroll.language.problem import Problem, from_spec
from unroll.spec import Spec, load

if TYPE_CHECKING:
    import torch

    from unroll.calculus.prox_scalar import ScalarProx
    from unroll.emit.program import Program
    from unroll.model.module import Model
    from unroll.network.loss import Loss
    from unroll.network.network import Network

Source = str | Path | Mapping[str, Any] | Spec
"""A path, a name of the library, YAML text, a dict, or a loaded spec."""
PREFIX = "decoder."


def derive(spec: Source, *, dims: Mapping[str, int] | None = None, overrides: Sequence[str] = ()) -> Derivation:
    """The derivation of a spec: objective -> gradient, prox, L -> step -> learned. Printing it shows all.

    Raises SpecError with the place of what is wrong.
    """
    return derive_spec(read(spec, overrides), dict(dims or {}))


def read(spec: Source, overrides: Sequence[str] = ()) -> Spec:
    """A loaded spec. Raises SpecError E0xx, E2xx."""
    return (
        spec
        if isinstance(spec, Spec) and not overrides
        else load(spec.to_dict() if isinstance(spec, Spec) else spec, overrides)
    )


def compile(
    spec: Source,
    *,
    dims: Mapping[str, int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overrides: Sequence[str] = (),
) -> Network | Model:
    """The network of a spec: an `nn.Module`, set to the untrained algorithm; with the model around it that the spec has.

    As `compile_layers`; names of a decoder's own sizes, parameters and scalars start with `decoder.`.
    """
    loaded = read(spec, overrides)
    ours, theirs = _shares(loaded, {"dims": dims or {}, "parameters": parameters or {}, "scalars": scalars or {}})
    body = compile_layers(loaded, **ours, seed=seed, dtype=dtype, device=device)
    if loaded.model is None:
        return body
    from unroll.model.module import model, seed_of

    decoder = None
    if loaded.decoder is not None:
        decoder = compile_layers(loaded.decoder, **theirs, seed=seed_of(seed, "decoder"), dtype=dtype, device=device)
    return model(loaded, body, decoder, seed=seed, dtype=dtype)


def _shares(spec: Spec, values: dict[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is for the layers, and what for the decoder, which has the sizes of the layers that it declares too."""
    if spec.decoder is None:
        return dict(values), {}
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for kind, named in values.items():
        ours[kind] = {n: v for n, v in named.items() if not n.startswith(PREFIX)}
        theirs[kind] = {n.removeprefix(PREFIX): v for n, v in named.items() if n.startswith(PREFIX)}
    same = {n: v for n, v in ours["dims"].items() if n in spec.decoder.dims}
    return ours, {**theirs, "dims": {**same, **theirs["dims"]}}


def compile_layers(
    spec: Source,
    *,
    dims: Mapping[str, int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overrides: Sequence[str] = (),
) -> Network:
    """The layers of a spec, whatever it puts around them.

    dims: sizes that the spec leaves open; those of `parameters` are read off.  parameters: tensors or arrays, as declared;
    what is not given is drawn from `seed` (see `Network.drawn`).  scalars: values in the place of defaults.
    overrides: "unroll.layers=8" and the like.  Raises SpecError (the spec), UnrollError E4xx (values).
    """
    import torch

    from unroll.network.network import draw, network

    loaded = read(spec, overrides)
    loaded = loaded if loaded.model is None else loaded.layers()
    given = {name: _tensor(name, value) for name, value in (parameters or {}).items()}
    derivation = derive_spec(loaded, _sizes(loaded, dims or {}, given))
    program = build(derivation)
    _refuse_undeclared(derivation.problem, given)
    _refuse_out_of_bounds(loaded, scalars or {})
    missing = [s.name for s in derivation.problem.parameters if s.name not in given]
    _refuse_too_large(program, missing)
    _refuse_blind(program)
    drawn = (
        draw(_with_inits(loaded, derivation.problem, program.problem.symbols), program.dims, seed) if missing else {}
    )
    dtype = dtype or torch.get_default_dtype()
    values = given | {name: drawn[name].to(dtype) for name in missing}
    net = network(
        program, values, scalars, spec=derivation.spec, derivation=derivation, dtype=dtype, device=device, seed=seed
    )
    net.drawn = tuple(missing)
    return net


def loss(
    spec: Source,
    *,
    dims: Mapping[str, int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float] | None = None,
    learn: Collection[str] = (),
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Loss:
    """The objective of a spec as a module to be minimised: (variables, inputs) -> a number. It needs no `unroll:`.

    dims: sizes that are to be checked, and to decide on which side determinants are taken; others are read off each call.
    parameters: those that the module is to hold; others are arguments of each call.  scalars: values in the place of
    defaults.  learn: scalars and parameters that get a gradient; a parameter without a value starts at a draw from `seed`.
    Raises SpecError (the spec), UnrollError E4xx (values).
    """
    import torch

    from unroll.network import loss as losses
    from unroll.network.network import draw

    loaded = read(spec, overrides)
    given = {name: _tensor(name, value) for name, value in (parameters or {}).items()}
    problem = from_spec(loaded, _sizes(loaded, dims or {}, given))
    _refuse_undeclared(problem, given)
    _refuse_out_of_bounds(loaded, scalars or {})
    missing = [name for name in loaded.parameters if name in learn and name not in given]
    recipe = losses.recipe(problem, loaded.title, held=(*given, *missing), learn=learn, origin=_origin(loaded))
    losses.sized(recipe, missing)
    drawn = draw(_with_inits(loaded, problem, missing), recipe.dims, seed)
    return losses.loss(
        loaded, recipe, given | {n: v.to(torch.get_default_dtype()) for n, v in drawn.items()}, scalars or {}
    )


MOST_ENTRIES = 2**31
"""Of all tensors that a network is made with: 8 GiB in float32."""


def _tensor(name: str, value: Any) -> torch.Tensor:
    """A value of a parameter: real, finite, floating. Raises UnrollError E404."""
    import torch

    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UnrollError("E404", f"{name} cannot be read as a tensor: {e}") from None
    if found.is_complex():
        raise UnrollError("E404", f"{name} is complex; parameters are real")
    found = found if found.is_floating_point() else found.to(torch.float64)
    if not found.isfinite().all():
        raise UnrollError("E404", f"{name} has entries that are not finite")
    return found


def _refuse_undeclared(problem: Problem, given: Mapping[str, torch.Tensor]) -> None:
    """What was derived relies on what parameters were declared to be. Raises UnrollError E403."""
    for s in problem.parameters:
        for prop in sorted(s.props) if s.name in given else ():
            off = _distance(prop, given[s.name].detach())
            if off > (1e-4 if given[s.name].dtype.itemsize > 2 else 1e-2):
                raise UnrollError(
                    "E403",
                    f"'{s.name}' is declared {prop.replace('_', ' ')}, and the value given is not: off by {off:.1e}",
                    hint="what was derived relies on it",
                )


def _distance(prop: str, value: torch.Tensor) -> float:
    """How far a value is from what `prop` says; 0 for a property that can only be drawn."""
    import torch

    m = value.double()
    match prop:
        case "orthonormal" if m.ndim > 1:
            gram = m.mT @ m
            return float((gram - torch.eye(gram.shape[-1], dtype=m.dtype, device=m.device)).abs().max())
        case "unit_columns" if m.ndim > 1:
            return float((m.norm(dim=-2) - 1).abs().max())
        case "symmetric" if m.ndim > 1:
            return float((m - m.mT).abs().max() / m.abs().max().clamp_min(1e-30))
        case "positive":
            return float(-m.clamp_max(0).min())
        case _:
            return 0.0


def _refuse_out_of_bounds(spec: Spec, scalars: Mapping[str, Any]) -> None:
    """min and max hold for values given later too. Raises UnrollError E403."""
    for name, value in scalars.items():
        record = spec.scalars.get(name)
        if record is None:
            continue  # `network` says that there is no such scalar
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UnrollError("E403", f"'{name}' is a number; {value!r} is not") from None
        if not (record.min is None or number >= record.min) or not (record.max is None or number <= record.max):
            bounds = f"{'' if record.min is None else f'{record.min:g} <= '}{name}{'' if record.max is None else f' <= {record.max:g}'}"
            raise UnrollError("E403", f"'{name}' = {number:g} breaks what the spec declares: {bounds}")


def _refuse_too_large(program: Program, missing: Sequence[str]) -> None:
    """Before any memory is asked for. Raises UnrollError E402 for an open size, E404 for more than MOST_ENTRIES."""
    for s in program.problem.parameters:
        sizes = program.tensor_sizes(s)
        if s.name in missing and None in sizes:
            raise UnrollError(
                "E402",
                f"{s.name} has a dynamic size and no value",
                hint=f"give parameters={{'{s.name}': ...}}, or the size as a number",
            )
    counts = {s.name: prod(n or 1 for n in program.tensor_sizes(s)) for s in program.problem.parameters}
    dims = {dim(name): sp.Integer(n) for name, n in program.dims.items()}
    for p in program.step.learned:
        sizes = [swap(n, dims) for n in (*p.shape, *([] if p.family is None else [p.family]))]
        if not all(n.is_Integer for n in sizes):
            raise UnrollError(
                "E402",
                f"'{p.name}' has an open size: {' × '.join(map(str, sizes))}",
                hint="what is learned has as many entries as the sizes say: give them as numbers",
            )
        counts[p.name] = prod(map(int, sizes)) * (program.layers if p.per_layer else 1)
    name = max(counts, key=lambda n: counts[n], default="")
    if sum(counts.values()) > MOST_ENTRIES:
        raise UnrollError(
            "E404",
            f"{name} would have {counts[name]:,} entries; all together may have {MOST_ENTRIES:,}",
            hint="smaller dims, fewer layers, or share: layers",
        )


def _refuse_blind(program: Program) -> None:
    """What a layer makes is as many tensors as come in. Raises UnrollError E402 where it reads nothing of them."""
    for s in program.step.states:
        node = program.graph.nodes[program.graph.roots["next", s.symbol.name].node]
        if isinstance(s.symbol, Sym) and not node.batched:
            hint = "another step size, or an objective that an input occurs in"
            raise UnrollError("E402", f"a layer makes the same of every {s.symbol.name}, whatever comes in", hint=hint)


def build(derivation: Derivation) -> Program:
    """Graph, passes and source. Raises UnrollError E402 for a size without a value."""
    from unroll.emit.program import build as build_program

    spec, problem = derivation.spec, derivation.problem
    sizes = {d.name: n for d, n in problem.dims.items() if isinstance(n, int)}
    return build_program(
        problem,
        derivation.step,
        layers=derivation.layers,
        dims=sizes,
        name=spec.title,
        origin=_origin(spec),
        sha=spec.sha256,
    )


def _origin(spec: Spec) -> str:
    return (
        ""
        if spec.file.startswith("<")
        else os.path.relpath(spec.file)
        if Path(spec.file).is_relative_to(Path.cwd())
        else Path(spec.file).name
    )


def _sizes(spec: Spec, dims: Mapping[str, int], parameters: Mapping[str, Any]) -> dict[str, int]:
    """Sizes given, and those that the shapes of given parameters say. Raises UnrollError E404 for a shape that contradicts."""
    found = dict(dims)
    open_sizes = {name for name, n in spec.dims.items() if not isinstance(n, int)}
    for name, value in parameters.items():
        if name not in spec.parameters:
            raise UnrollError(
                "E402", f"'{name}' is not a parameter of {spec.title}", hint=did_you_mean(name, spec.parameters)
            )
        record = spec.parameters[name]
        declared = record.shape if record.family is None else (record.family, *record.shape)
        if len(value.shape) != len(declared):
            raise UnrollError(
                "E404",
                f"{name} has {len(value.shape)} axes, declared are {len(declared)}: [{', '.join(map(str, declared))}]",
            )
        for entry, n in zip(declared, value.shape, strict=True):
            if isinstance(entry, str) and entry in open_sizes and found.setdefault(entry, int(n)) != n:
                raise UnrollError("E404", f"{name} has shape {tuple(value.shape)}, but {entry} = {found[entry]}")
    return found


def _with_inits(spec: Spec, problem: Problem, names: Collection[str]) -> Problem:
    """The problem with these parameters alone, `init:` of each as a property that `draw` keeps."""
    props = {n: p.init for n, p in spec.parameters.items() if p.init not in (None, "gaussian")}
    wanted = [s for s in problem.parameters if s.name in names]
    return replace(
        problem, parameters=tuple(replace(s, props=s.props | {props[s.name]}) if s.name in props else s for s in wanted)
    )


def stage(spec: Source, name: str, *, dims: Mapping[str, int] | None = None, overrides: Sequence[str] = ()) -> str:
    """One stage as text: spec, problem, derivation, step, graph or source."""
    loaded = read(spec, overrides)
    if name == "spec":
        return loaded.to_yaml()
    if name == "problem":
        return _problem_text(loaded, dims)
    if name == "source" and loaded.unroll is None and loaded.model is None:
        return _loss_source(loaded, dims)
    derivation = derive_spec(loaded, dict(dims or {}))
    match name:
        case "derivation":
            from unroll.model.describe import describe

            return "\n".join([str(derivation), *describe(loaded)])
        case "step":
            return "\n".join(
                f"{a.target.name} <- {a.value}" for a in (*derivation.step.definitions, *derivation.step.assigns)
            )
        case "graph":
            from unroll.emit.interpret import graph_text

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
    ours, theirs = _shares(spec, {"dims": dims or {}})
    if spec.model is None:
        return build(derive_spec(spec, ours["dims"])).source
    from unroll.model.source import wrap

    decoder = build(derive_spec(spec.decoder, theirs["dims"])) if spec.decoder is not None else None
    return wrap(spec, build(derive_spec(spec.layers(), ours["dims"])), decoder).source


def _loss_source(spec: Spec, dims: Mapping[str, int] | None) -> str:
    """What is emitted for an objective that is not unrolled: the objective itself."""
    from unroll.network import loss as losses

    return losses.recipe(from_spec(spec, dims), spec.title, origin=_origin(spec)).written.source


def _problem_text(spec: Spec, dims: Mapping[str, int] | None) -> str:
    from unroll.language.nodes import show_shape
    from unroll.language.show import text

    problem = from_spec(spec, dims)
    rows = [f"{s.role:10} {s.name:8} {show_shape(s.shape)}" for s in problem.symbols.values()]
    rows += [f"scalar     {s.name:8} {'' if v is None else v}" for s, v in problem.scalars.items()]
    rows += [f"size       {d.name:8} {'open' if n is None else n}" for d, n in problem.dims.items()]
    return "\n".join(
        [
            *rows,
            "",
            "minimise" if problem.sign > 0 else "maximise",
            *(f"  {n}: {text(e)}" for n, e in problem.terms.items()),
        ]
    )


def prox(formula: str, *, domain: tuple[float, float] | None = None, **scalars: float) -> ScalarProx:
    """The derived prox of a scalar formula in u: prox("lam*abs(u)", lam=0.3)(v, t) = argmin_z t lam |z| + (z - v)^2 / 2.

    scalars: values, or none to leave them symbols; .formula, .curvature, .proof tell what was derived.
    Raises SpecError E1xx (the formula), DeriveError E302 (no prox).
    """

    from unroll.calculus.prox_scalar import derive_prox
    from unroll.language.constructors import number
    from unroll.language.nodes import Expr, scalar
    from unroll.language.parse import Scope, parse

    u = sp.Symbol("u", real=True)
    names: dict[str, Any] = {name: scalar(name, positive=value > 0) for name, value in scalars.items()}
    f = parse_entry(formula, Scope({**names, "u": u}), parse)
    assert not isinstance(f, Expr)
    ends = (-sp.oo, sp.oo) if domain is None else (number(domain[0]), number(domain[1]))
    found = derive_prox(f, u, ends)
    return found.substitute({names[n]: number(v) for n, v in scalars.items()})


def parse_entry(formula: str, scope: Any, parse: Any) -> sp.Expr:
    """A formula in u as a SymPy profile, `where` included."""
    from unroll.language.constructors import as_constant, symbol
    from unroll.language.nodes import Expr, Map, Mul, slot

    z = symbol("u", 1, 1, "variable", 0)
    value = parse(formula, replace(scope, names={**scope.names, "u": z}))
    if not isinstance(value, Expr):
        return value

    def profile(e: Any) -> Any:
        c = as_constant(e)
        if c is not None:
            return c
        match e:
            case Map(p, _):
                return p.subs(slot(0), scope.names["u"])
            case Mul(c, (x,)):
                return c * profile(x)
            case _:
                return sum(map(profile, e.terms)) if hasattr(e, "terms") else scope.names["u"]

    return profile(value)


def save(net: Network | Model, folder: str | os.PathLike[str]) -> Path:
    """Write a network as spec.yaml, weights.safetensors and its source; no pickle."""
    return net.save(folder)
