"""A network that is not ours, measured against a declared objective at named places of it, by forward hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from unroll.errors import UnrollError, did_you_mean
from unroll.language.problem import Problem, from_spec
from unroll.model.whitebox import Batch, Measured, count, measured, nothing
from unroll.network import loss as losses
from unroll.network import values
from unroll.network.trace import Trace, check_form, seen
from unroll.spec import Spec, load

Place = str | Mapping[str, str]
"""A module by its name, `*` for the number of the layer, `:in` or `:out` at its end; of several variables, one for each by name."""
Pair = Mapping[str, Place]
"""{"before": place, "after": place}"""
Weight = str | Tensor | Callable[[nn.Module, int], Tensor]
"""A tensor, the name of one with `*` for the number of the layer, or a function of the module and the layer, from 0."""


def audit(
    module: nn.Module,
    objective: str | Mapping[str, Any] | Spec,
    batches: Iterable[Batch],
    *,
    at: Pair | Mapping[str, Pair],
    parameters: Mapping[str, Weight] | None = None,
    inputs: Mapping[str, str | Callable[[Any], Tensor]] | None = None,
    scalars: Mapping[str, float] | None = None,
    dims: Mapping[str, int] | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
    normalised: str = "iterate",
) -> Measured:
    """What each layer of any module does to each term of an objective: predicted to first order, actual, and how often it improves.

        unroll.audit(vit, "sparse_rate_reduction", batches,
                     at={"before": "blocks.*.attn", "after": "blocks.*.mlp"},
                     parameters={"U": lambda m, k: m.blocks[k].attn.weight.view(heads, p, d).mT})

    module: run on each batch as `white_box` takes them: one tensor, a tuple, or by name. It stays as it is, in its own mode and precision.
    at: what enters the module `before` and what leaves the module `after`, or {step: {before, after}} of several steps
    of a layer, in their order; `*` stands for the number of the layer, there and in the weights' names and what functions of a layer are given,
    `name:in` and `name:out` say otherwise. A module that runs several times
    (an unrolled solver with one set of weights) is a layer each time. Of a tuple the first tensor counts.
    What stands there are the variables of the objective as they are stored, tokens before features: (..., N, d) for Z: [d, N].
    read: from what stands there to the variables, such as `lambda z: z[:, 1:]` without a class token.
    parameters: what the places' weights stand for.  inputs: of the objective, a place or a function of the batch.
    normalised: the terms at columns after "layer_norm", "rms_norm" or "sphere".  Constraints are left out.
    Raises UnrollError E402 (no such scalar, size), E404 (places, shapes, what is missing), E409 (a matrix that is not positive definite).
    """
    loaded = load(objective) if not isinstance(objective, Spec) else objective
    check_form(normalised, "normalised=")
    plan = _steps(at)
    weights, problem = parameters or {}, from_spec(loaded, values.sizes_of(loaded, dims or {}, {}))
    values.refuse_out_of_bounds(loaded, scalars or {})
    terms = {name: seen(e, problem, normalised) for name, e in problem.terms.items()}
    recipe = losses.recipe(replace(problem, terms=terms), loaded.title)
    loss = losses.loss(loaded, recipe, {}, scalars or {})
    taken = {*loss.shapes}
    _refuse_missing(problem, taken, weights, inputs or {})

    @cache
    def of_layer(layer: int, stars: tuple[str, ...]) -> dict[str, Tensor]:
        given = {n: _weight(module, n, w, layer, stars) for n, w in weights.items() if n in taken}
        values.refuse_undeclared(problem.parameters, given)
        return given

    layered = {n: w for n, w in weights.items() if n in taken and not isinstance(w, Tensor)}
    hooks = _Hooks(
        module,
        {p for pair in plan.values() for p in _places(pair)}
        | {p for p in (inputs or {}).values() if isinstance(p, str)},
    )
    found, labels = nothing(), tuple[tuple[int, str], ...]()
    own = {n: w if isinstance(w, str) else getattr(w, "__name__", type(w).__name__) for n, w in layered.items()}
    for batch in batches:
        with torch.no_grad(), hooks.listening() as heard:
            _run(module, batch)
        here = {n: heard.once(p) if isinstance(p, str) else p(batch) for n, p in (inputs or {}).items() if n in taken}
        entered, left, stars = _heard(problem, plan, heard, read)

        def evaluate(
            now: dict[str, Tensor],
            place: str,
            layer: int,
            here: dict[str, Tensor] = here,
            stars: list[tuple[str, ...]] = stars,
        ) -> dict[str, Tensor]:
            out = loss.terms(
                **{n: v for n, v in {**now, **here, **of_layer(layer, stars[layer])}.items() if n in taken}
            )
            return {**out, "total": sum(out.values())}  # type: ignore[dict-item]

        steps = {n: [*states, left[n][-1]] for n, states in entered.items()}
        trace = Trace(steps, tuple(plan), evaluate, lambda _: (), own, bool(layered), left)
        assert len(trace.labels) == len(stars) * len(plan)
        with torch.no_grad():
            count(trace, list(recipe.problem.terms), [], found)
        labels = trace.labels
    if not measured(found):
        raise UnrollError("E404", "there is no sample to measure on", hint="a list of tensors, or of {name: tensor}")
    return Measured(labels, problem.sign, {}, own, normalised, found)


# --- places -----------------------------------------------------------------------------------------------------------


def _steps(at: Any) -> dict[str, Pair]:
    """Step -> its two places. Raises UnrollError E404."""
    plan: dict[str, Any] = {"step": at} if not isinstance(at, Mapping) or {*at} & {"before", "after"} else dict(at)
    for name, pair in plan.items():
        if not isinstance(pair, Mapping) or {*pair} != {"before", "after"} or not all(map(_is_place, pair.values())):
            hint = (
                'at={"before": "blocks.*.attn", "after": "blocks.*.mlp"}, or {step: that} of several steps of a layer'
            )
            raise UnrollError("E404", f"the step '{name}' needs two places, before and after", hint=hint)
    if not plan:
        raise UnrollError("E404", "at= names no place", hint='at={"before": "blocks.*.attn", "after": "blocks.*.mlp"}')
    return plan


def _is_place(found: object) -> bool:
    places = found.values() if isinstance(found, Mapping) else (found,)
    return all(isinstance(p, str) for p in places)


def _places(pair: Pair) -> Iterator[str]:
    for side in ("before", "after"):
        places = pair[side]
        for place in places.values() if isinstance(places, Mapping) else (places,):
            yield _end(place, side)


def _end(place: str, side: str) -> str:
    """With the end of the module that is meant."""
    return place if place.endswith((":in", ":out")) else f"{place}:{'in' if side == 'before' else 'out'}"


@dataclass(frozen=True)
class _Seen:
    """What stood at a place; what * was there; how much had been seen before."""

    value: Tensor
    stars: tuple[str, ...]
    when: int


@dataclass
class _Heard:
    """place -> what stood there, in the order in which it did."""

    states: dict[str, list[_Seen]]

    def add(self, place: str, found: Any, stars: tuple[str, ...]) -> None:
        self.states[place].append(_Seen(_tensor(found, place), stars, sum(map(len, self.states.values()))))

    def once(self, place: str) -> Tensor:
        """What stands there first. Raises UnrollError E404."""
        found = self.states[_end(place, "after")]
        if not found:
            raise UnrollError("E404", f"'{place}' did not run")
        return found[0].value


class _Hooks:
    """Listens at places of a module. Raises UnrollError E404 for a place that it does not have."""

    def __init__(self, module: nn.Module, places: Iterable[str]) -> None:
        self.at: list[tuple[str, nn.Module, tuple[str, ...]]] = []
        names = dict(module.named_modules())
        self.places = sorted({_end(p, "after") for p in places})
        for place in self.places:
            pattern = place.rpartition(":")[0]
            like = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
            there = [(m, found.groups()) for n, m in names.items() if (found := like.fullmatch(n))]
            if not there:
                hint = did_you_mean(pattern, list(names)) or "its modules: " + ", ".join(_starred(names)[:20])
                raise UnrollError("E404", f"the module has no '{pattern}'", hint=hint)
            self.at += [(place, m, stars) for m, stars in there]

    @contextmanager
    def listening(self) -> Generator[_Heard]:
        heard = _Heard({place: [] for place in self.places})
        handles = [self._listen(heard, *at) for at in self.at]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, heard: _Heard, place: str, module: nn.Module, stars: tuple[str, ...]) -> Any:
        if place.endswith(":out"):
            return module.register_forward_hook(lambda m, args, out: heard.add(place, out, stars))

        def before(m: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            heard.add(place, (*args, *named.values()), stars)

        return module.register_forward_pre_hook(before, with_kwargs=True)


def _starred(names: Iterable[str]) -> list[str]:
    """Names of modules, numbers as `*`, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", n) for n in names if n))


def _tensor(found: Any, place: str) -> Tensor:
    """The first tensor of what stands at a place, as it is now: modules may write over it."""
    for x in found if isinstance(found, tuple | list) else found.values() if isinstance(found, Mapping) else (found,):
        if isinstance(x, Tensor):
            return x.detach().clone()
    raise UnrollError("E404", f"at '{place}' stands {type(found).__name__}, no tensor")


def _run(module: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Tensor):
        module(batch)
    elif isinstance(batch, Mapping):
        module(**batch)
    else:
        module(*batch)


def _heard(
    problem: Problem, plan: Mapping[str, Pair], heard: _Heard, read: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], list[tuple[str, ...]]]:
    """(what entered each step, what it left) by variable, layer by layer, and what * was in each layer. Raises UnrollError E404."""
    sides: dict[str, dict[str, dict[str, list[_Seen]]]] = {}
    for step, pair in plan.items():
        for side in ("before", "after"):
            for name, place in _of_variables(problem, pair[side]).items():
                sides.setdefault(side, {}).setdefault(name, {})[step] = heard.states[_end(place, side)]
    runs = {(step, side): len(s) for side, by in sides.items() for steps in by.values() for step, s in steps.items()}
    layers = next(iter(runs.values()))
    if layers == 0 or len({*runs.values()}) > 1:
        said = ", ".join(f"{side} {step} {n} times" for (step, side), n in runs.items())
        raise UnrollError(
            "E404",
            f"the places do not run equally often: {said}",
            hint="a step is what lies between two places of one layer",
        )
    stood = {
        side: {name: [steps[step][k] for k in range(layers) for step in plan] for name, steps in by.items()}
        for side, by in sides.items()
    }
    look = read or (lambda z: z)
    out = {side: {name: [look(s.value) for s in row] for name, row in by.items()} for side, by in stood.items()}
    for name, entered in stood["before"].items():
        for i, (first, last) in enumerate(zip(entered, stood["after"][name], strict=True)):
            _refuse_pair(f"{name} of layer {i // len(plan) + 1}", first, last, *(out[s][name][i] for s in out))
    starred = next(
        (row for by in stood.values() for row in by.values() if row[0].stars), next(iter(stood["before"].values()))
    )
    return out["before"], out["after"], [s.stars for s in starred[:: len(plan)]]


def _refuse_pair(what: str, first: _Seen, last: _Seen, before: Tensor, after: Tensor) -> None:
    """Raises UnrollError E404 for two places that are no step: what comes after is there first, or has another shape."""
    if last.when < first.when:
        raise UnrollError(
            "E404", f"{what} is there at its place after sooner than at its place before", hint="change them"
        )
    if getattr(before, "shape", None) != getattr(after, "shape", None):
        raise UnrollError("E404", f"{what} has shape {tuple(before.shape)} before and {tuple(after.shape)} after", hint="read= takes what is meant from what stands there")  # fmt: skip


def _of_variables(problem: Problem, place: Place) -> dict[str, str]:
    names = [v.name for v in problem.variables]
    if isinstance(place, Mapping):
        if {*place} != {*names}:
            raise UnrollError("E404", f"places are needed for {', '.join(names)}, and given for {', '.join(place)}")
        return dict(place)
    if len(names) > 1:
        hint = f"{{{', '.join(f'{n!r}: ...' for n in names)}}} in the place of '{place}'"
        raise UnrollError(
            "E404", f"the objective has {len(names)} variables: each stands at a place of its own", hint=hint
        )
    return {names[0]: place}


def _weight(module: nn.Module, name: str, weight: Weight, layer: int, stars: tuple[str, ...]) -> Tensor:
    """The tensor that stands for a parameter in a layer. Raises UnrollError E404."""
    if isinstance(weight, Tensor):
        return weight.detach()
    number = int(stars[0]) if len(stars) == 1 else layer
    try:
        if isinstance(weight, str):
            of = stars if weight.count("*") == len(stars) else (str(number),) * weight.count("*")
            found = attrgetter(weight.replace("*", "{}").format(*of))(module)
        else:
            found = weight(module, number)
    except (AttributeError, IndexError) as e:
        raise UnrollError("E404", f"the module has nothing for {name} in layer {layer + 1}: {e}") from e
    if not isinstance(found, Tensor):
        raise UnrollError("E404", f"for {name} stands {type(found).__name__} in layer {layer + 1}, no tensor")
    return found.detach()


def _refuse_missing(problem: Problem, taken: Iterable[str], parameters: Iterable[str], inputs: Iterable[str]) -> None:
    """Raises UnrollError E404 for a parameter or input of the terms that has no tensor, or one that is not the objective's."""
    for s in (problem.symbols[n] for n in taken):
        if s.role == "parameter" and s.name not in parameters:
            raise UnrollError("E404", f"nothing stands for the parameter {s.name}", hint=f"parameters={{'{s.name}': ...}}: a name of the module's, a tensor, or a function of the module and the layer")  # fmt: skip
        if s.role == "input" and s.name not in inputs:
            raise UnrollError(
                "E404",
                f"the objective reads {s.name}",
                hint=f"inputs={{'{s.name}': ...}}: a place, or a function of the batch",
            )
    for kind, names, known in (("parameter", parameters, problem.parameters), ("input", inputs, problem.inputs)):
        for name in names:
            if name not in {s.name for s in known}:
                hint = did_you_mean(name, [s.name for s in known])
                raise UnrollError("E404", f"'{name}' is no {kind} of the objective", hint=hint)
