"""From a spec to a network, in one call.

What needs torch is imported where it is used: deriving and printing start without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy as sp

from unroll.derivation.derive import Derivation
from unroll.derivation.derive import derive as derive_spec
from unroll.language.problem import from_spec
from unroll.spec import DECODER, Spec, load

if TYPE_CHECKING:
    import torch

    from unroll.calculus.prox_function import ScalarProx
    from unroll.emit.program import Program
    from unroll.model.module import Model
    from unroll.model.words import Words
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
    words: Words | str | Path | None = None,
) -> Network | Model:
    """The network of a spec: an `nn.Module`, set to the untrained algorithm; with the model around it that the spec has.

    As `compile_layers`; names of a decoder's own sizes, parameters and scalars start with `decoder.`.
    words: what tokens stand for, or what `unroll.words` takes; no more than the table has rows, else SpecError E420.
    """
    loaded = read(spec, overrides)
    meant = None
    if words is not None:
        from unroll.model.words import agree
        from unroll.model.words import words as read_words

        meant = read_words(words) if isinstance(words, str | Path) else words
        agree(meant, loaded)
    ours, theirs = shares(loaded, {"dims": dims or {}, "parameters": parameters or {}, "scalars": scalars or {}})
    body = compile_layers(loaded, **ours, seed=seed, dtype=dtype, device=device)
    if loaded.model is None:
        return body
    from unroll.model.module import model, seed_of

    decoder = None
    if loaded.decoder is not None:
        decoder = compile_layers(loaded.decoder, **theirs, seed=seed_of(seed, "decoder"), dtype=dtype, device=device)
    chosen = {**body.derivation.exact.chosen}
    if decoder is not None:
        chosen |= {(*DECODER, *path): name for path, name in decoder.derivation.exact.chosen.items()}
    made = model(loaded.naming(chosen), body, decoder, seed=seed, dtype=dtype)
    made.words = meant
    return made


def sketch(
    spec: Spec,
    dims: Mapping[str, int],
    parameters: Mapping[str, torch.Tensor],
    mode: Callable[[], AbstractContextManager[Any]],
) -> Network | Model:
    """The network of a spec, whose parameters have sizes and no values.

    dims, parameters: as for `compile`.  mode: its tensors are made within it, as fake ones.
    Raises SpecError (the spec), UnrollError E4xx.
    """
    ours, theirs = shares(spec, {"dims": dims, "parameters": parameters})
    body = _sketched(spec if spec.model is None else spec.layers(), **ours, mode=mode)
    if spec.model is None:
        return body
    from unroll.model.module import unset, with_layers
    from unroll.model.source import wrap

    decoder = None if spec.decoder is None else _sketched(spec.decoder, **theirs, mode=mode)
    wrapped = wrap(spec, body.program, None if decoder is None else decoder.program)
    with mode():
        return with_layers(unset(wrapped, "cpu"), spec, body, decoder)


def _sketched(spec: Spec, dims: Mapping[str, int], parameters: Mapping[str, torch.Tensor], mode: Any) -> Network:
    import torch

    from unroll.network import values
    from unroll.network.network import unset, values_of

    derivation = derive_spec(spec, values.sizes_of(spec, dims, parameters))
    program, problem = build(derivation), derivation.problem
    values.refuse_too_large(program, [s.name for s in problem.parameters if s.name not in parameters])
    sizes = {s.name: program.tensor_sizes(s) for s in problem.parameters}
    with mode():
        held = {name: torch.empty([n or 1 for n in known]) for name, known in sizes.items()}
        return unset(program, held, values_of(problem, {}), derivation.spec, derivation)


def shares(spec: Spec, values: dict[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
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
    from unroll.network import values
    from unroll.network.kinds import check_making

    check_making(seed, dtype, device)
    loaded = read(spec, overrides)
    loaded = loaded if loaded.model is None else loaded.layers()
    given = {name: values.as_tensor(name, value) for name, value in (parameters or {}).items()}
    derivation = derive_spec(loaded, values.sizes_of(loaded, dims or {}, given))
    return network_of(derivation, build(derivation), given, scalars, seed=seed, dtype=dtype, device=device)


def network_of(
    derivation: Derivation,
    program: Program,
    given: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Network:
    """The network of a program; parameters without a value are drawn. Raises UnrollError E4xx."""
    import torch

    from unroll.network import values
    from unroll.network.network import draw, network

    loaded = derivation.spec
    values.refuse_undeclared(derivation.problem.parameters, given)
    values.refuse_out_of_bounds(loaded, scalars or {})
    missing = [s.name for s in derivation.problem.parameters if s.name not in given]
    values.refuse_too_large(program, missing)
    drawn = (
        draw(values.with_inits(loaded, derivation.problem, program.problem.symbols), program.dims, seed)
        if missing
        else {}
    )
    dtype = dtype or torch.get_default_dtype()
    held = {**given, **{name: drawn[name].to(dtype) for name in missing}}
    net = network(
        program, held, scalars, spec=derivation.spec, derivation=derivation, dtype=dtype, device=device, seed=seed
    )
    values.refuse_blind(program)
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
    from unroll.network import values
    from unroll.network.kinds import check_making
    from unroll.network.network import draw

    check_making(seed, None, None)
    loaded = read(spec, overrides)
    given = {name: values.as_tensor(name, value) for name, value in (parameters or {}).items()}
    problem = from_spec(loaded, values.sizes_of(loaded, dims or {}, given))
    values.refuse_undeclared(problem.parameters, given)
    values.refuse_out_of_bounds(loaded, scalars or {})
    missing = [name for name in loaded.parameters if name in learn and name not in given]
    recipe = losses.recipe(problem, loaded.title, held=(*given, *missing), learn=learn, origin=origin_of(loaded))
    losses.sized(recipe, missing)
    drawn = draw(values.with_inits(loaded, problem, missing), recipe.dims, seed)
    return losses.loss(
        loaded, recipe, given | {n: v.to(torch.get_default_dtype()) for n, v in drawn.items()}, scalars or {}
    )


def build(derivation: Derivation) -> Program:
    """Graph, passes and source. Raises UnrollError E402 for a size without a value."""
    from unroll.emit.program import build as build_program

    spec, problem = derivation.spec, derivation.problem
    sizes = {d.name: n for d, n in problem.dims.items() if isinstance(n, int)}
    return build_program(
        problem,
        derivation.step,
        layers=derivation.layers,
        free=derivation.free,
        dims=sizes,
        name=spec.title,
        origin=origin_of(spec),
        sha=spec.sha256,
    )


def origin_of(spec: Spec) -> str:
    return (
        ""
        if spec.file.startswith("<")
        else os.path.relpath(spec.file)
        if Path(spec.file).is_relative_to(Path.cwd())
        else Path(spec.file).name
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
