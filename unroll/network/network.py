"""Program -> nn.Module: the emitted class, loaded so that tracebacks show its text, with the problem it came from.

net(x, z=z0)               the answer; (..., m) -> (..., n)
net.trace(x)               every iterate, and every term of the objective at every iterate
net.objective(x, z=z)      the terms of the objective, per sample
net.save(folder)           spec.yaml, weights.safetensors, the source: no pickle
"""

from __future__ import annotations

import copy
import hashlib
import linecache
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import sympy as sp
import torch
from torch import Tensor, nn

from unroll.derivation.step import Learned
from unroll.emit.axes import axes_of, stored_axes
from unroll.emit.objective import term_source, term_symbols
from unroll.emit.program import Program
from unroll.errors import UnrollError, did_you_mean
from unroll.language.constructors import swap
from unroll.language.nodes import LogDet, Sym, walk
from unroll.language.problem import Problem
from unroll.network.kept import Kept
from unroll.network.kinds import as_number, check_kind
from unroll.network.saved import Written, recompile, refuse_changed, write
from unroll.network.sets import falling, refuse_empty
from unroll.network.stepwise import Replay, learned_value, rising
from unroll.network.trace import Measure, Trace, measure
from unroll.network.values import refuse_empty_masks

if TYPE_CHECKING:
    import networkx as nx


class Network(nn.Module):
    """An emitted module and what it stands for. Made by `network`, which mixes this class with the emitted one.

    layers, spec, derivation, program: what it was made from.  drawn: parameters that no value was given for, drawn from the seed.
    """

    layers: int
    program: Program
    spec: Written | None
    derivation: Any
    numbers: dict[str, float]
    drawn: tuple[str, ...]
    takes: dict[str, tuple[str, tuple[int | None, ...], bool]]
    """Inputs, then variables: the word in the text, the sizes of the last axes, whether it must be given."""
    shared_sizes: tuple[tuple[str, str, int], ...]
    """Sizes that the spec leaves open and several tensors have: (size, word, axis)."""
    built: bool
    """Have the parameters that depend on data been worked out?"""

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.program.inputs

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.program.step.output)

    @property
    def source(self) -> str:
        """The Python text of the module."""
        return self.program.source

    @property
    def graph(self) -> nx.DiGraph[int]:
        """Tensor operations of one layer and of what goes before it."""
        return self.program.graph.digraph

    @property
    def learned(self) -> tuple[Learned, ...]:
        names = {
            self.program.words["learned", p.name]: p
            for p in self.program.step.learned
            if ("learned", p.name) in self.program.words
        }
        return tuple(names[name] for name, _ in self.named_parameters())

    @property
    def given(self) -> dict[str, Tensor]:
        """Values of the problem's parameters, in the network's type and place."""
        held = cast(nn.Module, self._modules["_given"])
        return {s.name: held.get_buffer(f"p{i}") for i, s in enumerate(self.program.problem.parameters)}

    @property
    def scalars(self) -> dict[str, float]:
        return dict(self.numbers)

    @property
    def sizes(self) -> dict[str, int]:
        """As `compile(dims=)` takes them."""
        return dict(self.program.dims)

    def forward(self, /, *args: Tensor, **start: Any) -> Any:
        """Inputs in order or by name, start values by the names of the variables. Raises UnrollError E404, E406, E408."""
        given = self._bind(args, start)
        try:
            return super().forward(**given)
        except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]
            raise self._unsolved(given) from e

    def extend(self, x: Tensor, kept: Kept) -> Tensor:
        """The answer at the next tokens of a text, from these alone: (..., n, d) -> (..., n, d). A new `Kept()` begins a text.

        It is what the network says of all tokens so far, of which these are the last. Takes no derivatives.
        Raises UnrollError E404 (shapes), E423 where an operation over tokens has nothing that it could keep.
        """
        if (why := self.program.growth.why) or not self.program.growth.source:
            raise UnrollError("E423", f"{why} keeps nothing from token to token", hint="the whole text in each call")
        self._bind((x,), {})
        with torch.no_grad(), kept.reading(x.shape[-2], self):
            return _grow(self.program.growth.source, self.program.class_name)(self, x, kept)

    def construct(self, /, *args: Tensor, batch_size: int | None = None, **named: Tensor) -> Any:
        """Work out, layer by layer, the parameters that depend on data; returns what these data become.

        Inputs in order or by name, without batch axes: one set of data, such as (N, d) features and their (K, N) memberships.
        batch_size: so many samples at a time, which bounds the memory of a layer and changes nothing but rounding.
        Raises UnrollError E404, E408.
        """
        wanted = self.program.construct_inputs
        if not wanted:
            raise UnrollError(
                "E408",
                "no parameter of this network depends on data",
                hint="init: data, in an entry of learn:, asks for that",
            )
        given = {**dict(zip(wanted, args, strict=False)), **named}
        for name in (*wanted, *given):
            if name not in given or name not in wanted:
                raise UnrollError(
                    "E404",
                    f"the data to construct with are {', '.join(wanted)}; '{name}' is {'missing' if name in wanted else 'not one of them'}",
                )
            check_kind(name, given[name], self._like)
            check_shape(self.program, name, given[name])
            if given[name].ndim != len(self.program.axes(self.program.problem.symbols[name])):
                raise UnrollError(
                    "E404", f"{name} has shape {tuple(given[name].shape)}: data to construct with have no batch axes"
                )
        out = self._constructed([given[name] for name in wanted], batch_size)
        bad = [n for n, p in self.named_parameters() if not finite(p)]
        if bad:
            raise UnrollError(
                "E408",
                f"'{bad[0]}' is not finite on these data",
                hint="a class without samples, or a step that diverges",
            )
        _refuse_excluded(self, "data")
        self.built = True
        return out

    def _constructed(self, data: list[Tensor], batch_size: int | None) -> Any:
        """What `construct` of the text makes of data, cut into batches along the samples."""
        construct, problem, samples = self._worked_out, self.program.problem, self.program.samples
        if samples is None:
            if batch_size is not None:
                hint = "leave batch_size out: a layer needs all samples at once"
                raise UnrollError("E404", "these data cannot come in batches", hint=hint)
            return construct(*data)
        axes = [next(iter(axes_of(s, samples)), None) for s in problem.inputs]
        counts = {s.name: x.shape[a] for s, x, a in zip(problem.inputs, data, axes, strict=True) if a is not None}
        count = max(counts.values())
        if min(counts.values()) != count:
            have = ", ".join(f"{name} {n}" for name, n in counts.items())
            raise UnrollError("E404", f"the data to construct with have different numbers of samples: {have}")
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise UnrollError("E404", f"batch_size is {batch_size!r}: it is a number of samples")
        cuts = [
            x.split(batch_size or max(count, 1), a) if a is not None else None for x, a in zip(data, axes, strict=True)
        ]
        number = len(next(c for c in cuts if c is not None))
        parts = construct(
            *([c[i] if c is not None else x for x, c in zip(data, cuts, strict=True)] for i in range(number))
        )
        output = [axes_of(s, samples)[0] for s in self.program.step.output]
        if len(output) == 1:
            return torch.cat(parts, output[0])
        return tuple(torch.cat(part, a) for a, part in zip(output, zip(*parts, strict=True), strict=True))

    def _worked_out(self, *data: Any) -> Any:
        """`construct` of the text; a network is not built while, or where, that fails."""
        self.built = False
        try:
            return cast(Any, super()).construct(*data)
        except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]
            raise UnrollError(
                "E408",
                "on these data a matrix is not positive definite, or has no inverse",
                hint="a class without samples, or a step that diverges",
            ) from e

    def trace(
        self,
        *args: Tensor,
        at: str = "iterate",
        parameters: str = "given",
        terms: Mapping[str, str] | None = None,
        **start: Any,
    ) -> Trace:
        """Run, and keep what every block left. Inputs that only the objective reads may be given by name.

        at: what the objective, and every further formula, is evaluated at: the "iterate", or its columns after "layer_norm", "rms_norm" or "sphere".
        parameters: those "given" to the network, or what the "layers" learned in their place.  terms: further formulas, which may
        read learned matrices by name.  Raises UnrollError E404, E406, E408, E409.
        """
        program = self.program
        asked = measure(program.problem, program.step, at, parameters, terms or {})
        extra = {
            s.name: start.pop(s.name) for s in program.problem.inputs if s.name in start and s.name not in self.takes
        }
        given = self._bind(args, start)
        found: list[Any] = []
        try:
            super().forward(**given, trace=found)
        except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]
            raise self._unsolved(given) from e
        rows = [r if isinstance(r, tuple) else (r,) for r in found]
        steps = {name: [r[i] for r in rows] for i, name in enumerate(self.variables)}
        inputs = {name: given[program.words["symbol", name]] for name in self.inputs} | extra
        replay = Replay(program.problem, program.step, self, program.words, self.given, inputs, self.numbers, steps)
        values = self._terms_at(asked, inputs)
        return Trace(
            steps,
            program.step.blocks or ("step",),
            values,
            lambda layer: tuple(replay.maps(layer)),
            asked.own,
            bool(asked.reads),
        )

    def _terms_at(
        self, asked: Measure, inputs: dict[str, Tensor]
    ) -> Callable[[dict[str, Tensor], str, int], dict[str, Tensor]]:
        """(values of the variables, place, layer) -> the terms that a trace is asked for."""
        problem, program = self.program.problem, self.program
        plain = all(asked.problem.terms.get(n) is e for n, e in problem.terms.items()) and len(
            asked.problem.terms
        ) == len(problem.terms)
        source = program.objective_source if plain else term_source(asked.problem, program.dims)

        def run(values: dict[str, Tensor], place: str, layer: int) -> dict[str, Tensor]:
            like = next(iter(values.values()))
            own = {p.name: learned_value(self, program.words, p, layer).to(like) for p in asked.reads}
            found = self._terms({**inputs, **values, **own}, place, asked.problem, source)
            total = sum(found[name] for name in problem.terms)
            return {**found, "total": total}  # type: ignore[dict-item]

        return run

    def _unsolved(self, given: dict[str, Any]) -> UnrollError:
        """The layer in which a matrix has no factor or inverse, from a second run."""
        blocks, found = self.program.step.blocks or ("step",), list[Any]()
        with suppress(torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            super().forward(**given, trace=found)
        layer, block = divmod(max(len(found) - 1, 0), len(blocks))
        terms = next((p.terms for name, p in self.program.step.subproblems if name in (blocks[block], "")), {})
        where = f"{blocks[block]} of layer {layer + 1}" if found else "what comes before the first layer"
        about = (
            f" (of {', '.join(n for n in terms if n in self.program.problem.terms) or 'its surrogate'})"
            if found
            else ""
        )
        hint = "values that are not finite, or float32 where float64 is needed"
        return UnrollError(
            "E409", f"{where} has a matrix{about} that is not positive definite, or has no inverse", hint=hint
        )

    def objective(self, /, *args: Tensor, **values: Tensor) -> dict[str, Tensor]:
        """Every term of the objective, and "total": (...) values, one per sample."""
        named = {**self._by_name(args), **values}
        for name in named:
            if name not in self.program.problem.symbols:
                self._refuse_unknown({name: named[name]})
            check_kind(name, named[name], self._like)
            check_shape(self.program, name, named[name])
        self._refuse_broadcast(named)
        return self._terms(named)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write spec, weights and source into a folder, each file whole or not at all."""
        return write(folder, self.as_made("saved"), self)

    def as_made(self, verb: str) -> Written:
        """The spec, which says all of this network but values. Raises UnrollError E405 where it does not."""
        if self.spec is None:
            raise UnrollError("E405", f"a network without a spec cannot be {verb}; its source and state_dict can")
        made = type(self).__new__(type(self))
        with torch.device("meta"):
            cast(Any, super(Network, made)).__init__(**self.program.init_arguments)
        refuse_changed(self, made, ("_given",))
        return self.spec

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.sizes, self.given, self.scalars, self.state_dict(), self.training)
        return recompile, (self.as_made("pickled").to_yaml(), *values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        shared = ("program", "spec", "derivation")
        new.__dict__ = {k: v if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        return new

    # Arguments.

    def _by_name(self, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if len(args) > len(self.inputs):
            raise UnrollError(
                "E404",
                f"{len(args)} inputs were given, this network takes {len(self.inputs)}: {', '.join(self.inputs)}",
            )
        return dict(zip(self.inputs, args, strict=False))

    def _bind(self, args: tuple[Tensor, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the emitted forward."""
        if not self.built:
            raise UnrollError(
                "E408",
                "this network has parameters that are worked out on data, and has seen none",
                hint=f"net.construct({', '.join(self.program.construct_inputs)})",
            )
        out: dict[str, Any] = {}
        batches: dict[str, tuple[int, ...]] = {}
        if "layers" in named and "layers" not in self.takes:
            out["layers"] = self._depth(named.pop("layers"))
        if args:
            named |= self._by_name(args)
        like = self._like
        for name, (word, sizes, needed) in self.takes.items():
            value = named.pop(name, None)
            if value is not None:
                check_kind(name, value, like)
                if value.shape[max(value.ndim - len(sizes), 0) :] != sizes:
                    check_shape(self.program, name, value)
                out[word] = value
                batches[name] = tuple(value.shape[: value.ndim - len(sizes)])
            elif needed:
                raise UnrollError("E404", f"the input '{name}' is missing")
        if named:
            self._refuse_unknown(named)
        if len(batches) > 1:
            first, *others = batches
            starts = [] if batches[first] else [n for n in others if not self.takes[n][2]]  # many starts for one sample
            same_samples(batches, [first, *starts])
        if self.shared_sizes:
            self._check_shared_sizes(out)
        if not torch.compiler.is_compiling() and self.program.masks:  # its cache has a lock, which cannot be traced
            refuse_empty_masks(
                self.program.problem.inputs, {n: out[w] for n, (w, *_) in self.takes.items() if w in out}
            )
        return out

    def _check_shared_sizes(self, given: Mapping[str, Any]) -> None:
        """A size that the spec leaves open is the same wherever it is met. Raises UnrollError E404."""
        found: dict[str, tuple[str, int]] = {}
        for size, word, axis in self.shared_sizes:
            if isinstance(value := given.get(word), Tensor):
                first, n = found.setdefault(size, (word, value.shape[axis]))
                if value.shape[axis] != n:
                    raise UnrollError("E404", f"{size} is {n} in {first} and {value.shape[axis]} in {word}")

    def _depth(self, layers: Any) -> Any:
        if layers is not None and not self.program.any_depth:
            own = f"this network has parameters of its own in each of its {self.layers} layers: its depth is fixed"
            raise UnrollError("E406", own)
        if layers is not None and (not isinstance(layers, int | torch.SymInt) or layers < 0):
            raise UnrollError("E406", f"a network has 0 or more layers, not {layers!r}")
        return layers

    def _refuse_unknown(self, named: Mapping[str, Any]) -> None:
        for name in named:
            if name not in self.takes:
                hint = did_you_mean(name, self.takes)
                raise UnrollError("E404", f"'{name}' is neither an input nor a variable", hint=hint)

    def _refuse_broadcast(self, values: Mapping[str, Tensor]) -> None:
        """Inputs are of the samples that the variables, or the first of the inputs, have, or of no sample. Raises UnrollError E404."""
        symbols = self.program.problem.symbols
        axes = {name: len(self.program.axes(symbols[name])) for name in values if symbols[name].role != "parameter"}
        batches = {name: tuple(values[name].shape[: values[name].ndim - n]) for name, n in axes.items()}
        same_samples(batches, [v for v in self.variables if v in batches] or list(batches)[:1])

    @property
    def _like(self) -> Tensor | None:
        """A tensor of the network's type, in its place; None where it has none."""
        held = cast(nn.Module, self._modules["_given"])
        own = (*self._parameters.values(), *self._buffers.values(), *held._buffers.values())
        return next((t for t in own if t is not None and t.is_floating_point()), None)

    def terms_of(self, problem: Problem) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """The terms of another problem in the same symbols (a duality gap, say), given inputs and variables by name."""
        return self._evaluator(problem, term_source(problem, self.program.dims))

    def _terms(
        self, named: Mapping[str, Tensor], place: str = "", problem: Problem | None = None, source: str = ""
    ) -> dict[str, Tensor]:
        """All terms of the objective (or of `problem`) and their sum. Raises UnrollError E404 for a missing value, E409 where a matrix has no log-determinant."""
        problem, source = problem or self.program.problem, source or self.program.objective_source
        for s in term_symbols(problem):
            if s.role != "parameter" and s.name not in named:
                raise UnrollError(
                    "E404", f"the objective needs a value for '{s.name}'", hint=f"give it by name: {s.name}=..."
                )
        try:
            terms = self._evaluator(problem, source)(named)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            raise self._not_definite(named, place, problem) from None
        return {**terms, "total": sum(terms.values())}  # type: ignore[dict-item]

    def _not_definite(self, named: Mapping[str, Tensor], place: str, problem: Problem) -> UnrollError:
        """Which term has a matrix that is not positive definite."""
        for name, e in problem.terms.items():
            one = replace(problem, terms={name: e})
            try:
                self.terms_of(one)(named)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                return UnrollError(
                    "E409",
                    f"the term {name} has a matrix that is not positive definite {place}".rstrip(),
                    hint="values that are not finite, or float32 where float64 is needed",
                )
        return UnrollError("E409", f"a matrix is not positive definite {place}".rstrip())

    def _evaluator(self, problem: Problem, source: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """The terms of a problem from named values, in float32 or better under autocast too; determinants in float64, on the smaller side."""
        order = [*problem.variables, *problem.inputs, *problem.parameters]
        det = any(isinstance(x, LogDet) for e in problem.terms.values() for x in walk(e))

        def run(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            values: dict[str, Any] = {**named, **self.given, **self.numbers}
            text = _at_sizes(problem, self.program.dims, source, values)
            evaluate = load(text, f"objective of {problem.name}")["objective"]
            tensors = [_at_least_float32(values.get(s.name)) for s in order]
            first = next(t for t in tensors if t is not None)
            if det and first.device.type != "mps":  # Metal alone has no float64
                tensors = [t if t is None else t.double() for t in tensors]
            with torch.autocast(first.device.type, enabled=False):
                found = evaluate(*tensors, *(values[s.name] for s in problem.scalars))
            return {name: value.to(first.dtype) for name, value in found.items()} if det else found

        return run


def layout(s: Sym) -> str:
    """How the axes of a tensor follow from its declaration."""
    if s.rank < 2:
        return "batch axes come first, then the axes of the spec"
    written = f"[{s.nrows}, {s.ncols}]"
    if s.as_written:
        return f"batch axes come first, then those of {s.name}: {written}, as it is written"
    return f"batch axes come first, then the columns of {s.name}: {written}, which formulas see, is given transposed; stored: as_written, where it is declared, takes it as it is"


def same_samples(batches: Mapping[str, tuple[int, ...]], first: Iterable[str]) -> None:
    """Batch axes are those of one of `first`, its last ones, or none. Raises UnrollError E404: nothing is repeated silently."""
    known = [batches[name] for name in first]
    for name, batch in batches.items():
        if known and not any(batch == whole[len(whole) - len(batch) :] for whole in known):
            of = next(iter(first))
            raise UnrollError(
                "E404",
                f"{name} has batch axes {batch}, {of} has {batches[of]}",
                hint="all have the same batch axes; what has none is that of every sample",
            )


def check_shape(program: Program, name: str, value: Tensor) -> None:
    """The last axes are those declared; axes before them are batch axes. Raises UnrollError E404."""
    symbol = program.problem.symbols[name]
    sizes = program.tensor_sizes(symbol)
    shape = tuple(value.shape)
    last = shape[len(shape) - len(sizes) :] if len(shape) >= len(sizes) else ()
    if len(last) != len(sizes) or any(n is not None and n != k for n, k in zip(sizes, last, strict=True)):
        want = ", ".join(["...", *map(_axis, program.axes(symbol), sizes)])
        raise UnrollError("E404", f"{name} has shape {shape}, expected ({want})", hint=layout(symbol))


def _at_least_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


_SIZED: dict[tuple[str, tuple[tuple[str, int], ...]], str] = {}
"""(source of terms, open sizes of a call) -> the source for these sizes."""


def _at_sizes(problem: Problem, dims: Mapping[str, int], source: str, values: Mapping[str, Any]) -> str:
    """The source of the terms for the sizes of this call, where a determinant has another side."""
    if not any(isinstance(x, LogDet) for e in problem.terms.values() for x in walk(e)):
        return source
    found: dict[str, int] = {}
    for s in (*problem.variables, *problem.inputs):
        axes = stored_axes(s)
        if isinstance(values.get(s.name), Tensor) and axes:
            found |= {
                n.name: int(k)
                for n, k in zip(axes, values[s.name].shape[-len(axes) :], strict=True)
                if isinstance(n, sp.Symbol)
            }
    sizes = {d.name: found[d.name] for d in problem.dims if d.name in found and d.name not in dims}
    key = (source, tuple(sizes.items()))
    if key not in _SIZED:
        _SIZED[key] = term_source(problem, {**dims, **sizes}, source) if sizes else source
    return _SIZED[key]


def _axis(name: str, size: int | None) -> str:
    return name if size is None or str(size) == name else f"{name} = {size}"


# --- making one -------------------------------------------------------------------------------------------------------


@cache
def load(source: str, title: str) -> dict[str, Any]:
    """Run emitted text and return its names; tracebacks show its lines."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    file = f"<unroll {title} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = sys.modules[f"unroll_emitted_{digest}"] = ModuleType(
        f"unroll_emitted_{digest}"
    )  # torch.compile looks it up
    exec(compile(source, file, "exec"), module.__dict__)
    return module.__dict__


@cache
def mixed(source: str, name: str) -> type[Network]:
    emitted = load(source, name)[name]
    return cast(type[Network], type(name, (Network, emitted), {"__doc__": emitted.__doc__, "__module__": __name__}))


@cache
def _grow(source: str, title: str) -> Callable[[Network, Tensor, Kept], Tensor]:
    return load(source, title)["grow"]


def network(
    program: Program,
    given: Mapping[str, Tensor],
    scalars: Mapping[str, float] | None = None,
    *,
    spec: Written | None = None,
    derivation: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Network:
    """A network set to the algorithm itself; starts that the spec asks to draw are drawn from `seed`.

    given: a tensor for every parameter of the problem, as declared.  scalars: values in the place of defaults.
    Raises UnrollError E402 (no value), E403 (a start value that its constraint excludes, a set without a point), E404 (shape).
    """
    problem = program.problem
    numbers = values_of(problem, scalars or {})
    net = unset(program, given, numbers, spec, derivation)
    refuse_empty(problem, numbers, program.dims, given)
    net.to(dtype=dtype or torch.get_default_dtype(), device=device)
    exact = {s.name: given[s.name].to(device=device) for s in problem.parameters}
    wanted = program.initialise_arguments
    drawn = {"generator": torch.Generator(next(net.parameters()).device).manual_seed(seed)} if program.drawn else {}
    cast(Any, net).initialise(
        **{program.words["symbol", n]: exact[n] if n in exact else numbers[n] for n in wanted}, **drawn
    )
    waiting = {
        program.words["learned", p.name]
        for p in program.step.learned
        if p.constructed and ("learned", p.name) in program.words
    }
    for name, p in net.named_parameters():
        if name not in waiting and not finite(p):
            raise UnrollError(
                "E403",
                f"'{name}' cannot start at the value that it replaces: not finite, or excluded by its constraint",
            )
    _refuse_excluded(net, "value")
    for name, b in net.named_buffers():
        if b.is_floating_point() and not finite(b):
            raise UnrollError(
                "E403",
                f"'{name}' is not finite for the parameters given",
                hint="a matrix of zeros has the Lipschitz constant 0, and 1/0 is no step size",
            )
    return net


def unset(
    program: Program,
    given: Mapping[str, Tensor],
    numbers: dict[str, float],
    spec: Written | None = None,
    derivation: Any = None,
) -> Network:
    """A network whose parameters have sizes and no values yet."""
    made = mixed(program.source, program.class_name)
    net = made.__new__(made)
    cast(Any, super(Network, net)).__init__(**program.init_arguments)
    net.layers, net.program, net.numbers = program.layers, program, numbers
    net.spec, net.derivation = spec, derivation
    net.drawn = ()
    net.takes, net.shared_sizes = _arguments(program), _shared_sizes(program)
    net.built = not program.construct_inputs
    net.register_load_state_dict_post_hook(_mark_built)
    _hold(net, given)
    return net


def _mark_built(net: Any, keys: Any) -> None:
    """What was loaded may be what a construction left, or what one never worked out."""
    del keys
    net.built = all(map(finite, net.parameters()))


def finite(x: Tensor) -> bool:
    """Is every entry finite? Without a tensor of answers: parameters may be large."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x.detach())
    return bool(low.isfinite() & high.isfinite())


def _refuse_excluded(net: Network, init: str) -> None:
    """Raises UnrollError E403 for a parameter that starts at what it replaces where its constraint excludes that."""
    for record, p in zip(net.learned, net.parameters(), strict=True):
        if record.init == init and not _holds(record, p.detach()):
            raise UnrollError(
                "E403",
                f"'{record.name}' cannot start at the value that it replaces, which is not "
                f"{record.constraint.replace('_', ' ')}: {record.replaces}",
            )


def _holds(p: Learned, value: Tensor) -> bool:
    """Is a start value what its parameter is kept to? What is positive by softplus was tried before."""
    match p.constraint:
        case "symmetric":
            value = value.double()
            return not bool((value - value.mT).abs().max() > 1e-3 * value.abs().max())
        case "unit_columns":
            return not bool((value.double().norm(dim=p.column_axis) - 1).abs().max() > 1e-3)
        case "clamp":
            low, high = p.limits
            return bool((value >= low).all() & (value <= high).all())
        case "rising":
            return bool((rising(p, value.double()) - value).abs().max() <= 1e-3 * value.abs().max())
        case _:
            return True


def _arguments(program: Program) -> dict[str, tuple[str, tuple[int | None, ...], bool]]:
    problem, words, sizes = program.problem, program.words, program.tensor_sizes
    ins = {s.name: (words["symbol", s.name], sizes(s), True) for s in problem.inputs if s.name in program.inputs}
    return ins | {s.name: (words["symbol", s.name], sizes(s), False) for s in problem.variables}


def _shared_sizes(program: Program) -> tuple[tuple[str, str, int], ...]:
    found = [
        (str(n), word, i - len(sizes))
        for name, (word, sizes, _) in _arguments(program).items()
        for i, n in enumerate(program.axes(program.problem.symbols[name]))
        if sizes[i] is None
    ]
    names = [size for size, *_ in found]
    return tuple(x for x in found if names.count(x[0]) > 1)


def values_of(problem: Problem, scalars: Mapping[str, float]) -> dict[str, float]:
    """A number for every scalar of a problem: given, or its default. Raises UnrollError E402, E403."""
    known = {s.name: default for s, default in problem.scalars.items()}
    positive = {s.name for s in problem.scalars if s.is_positive}
    for name, value in scalars.items():
        if name not in known:
            raise UnrollError("E402", f"'{name}' is not a scalar of this problem", hint=did_you_mean(name, known))
        if name in positive and not as_number(name, value) > 0:
            raise UnrollError(
                "E403",
                f"'{name}' is declared positive, {as_number(name, value):g} is not",
                hint="what was derived relies on its sign",
            )
    out: dict[str, float] = {}
    for name, default in known.items():
        if name not in scalars and default is None:
            raise UnrollError("E402", f"the scalar '{name}' has no value", hint=f"give it: scalars={{'{name}': ...}}")
        out[name] = as_number(name, scalars.get(name, default))
    return out


def _hold(net: Network, given: Mapping[str, Tensor]) -> None:
    """Keep the parameters of the problem for the objective: moved with the network, not part of its state."""
    known = [s.name for s in net.program.problem.parameters]
    for name in given:
        if name not in known:
            raise UnrollError("E402", f"'{name}' is not a parameter of this problem", hint=did_you_mean(name, known))
    held = nn.Module()
    for i, s in enumerate(net.program.problem.parameters):
        if s.name not in given:
            raise UnrollError(
                "E402", f"the parameter '{s.name}' has no value", hint=f"give it: parameters={{'{s.name}': ...}}"
            )
        sizes = net.program.tensor_sizes(s)
        if tuple(given[s.name].shape) != sizes:
            want = ", ".join(map(_axis, net.program.axes(s), sizes))
            raise UnrollError("E404", f"{s.name} has shape {tuple(given[s.name].shape)}, expected ({want})")
        held.register_buffer(f"p{i}", given[s.name].detach().clone(), persistent=False)
    net.add_module("_given", held)


def draw(problem: Problem, dims: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random values for the parameters of a problem: Gaussian with variance 1/rows, then made what was declared.

    Float64. `orthonormal` gives M M' = I, or M' M = I for a tall M; `tight_frame` makes the members of a family together orthonormal.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {d: dims[d.name] for d in problem.dims if d.name in dims}
    drawn = {s.name: _drawn(s, [int(swap(n, sizes)) for n in stored_axes(s)], generator) for s in problem.parameters}
    return drawn | {n: drawn[n].sort(0, descending=True).values for n in falling(problem) if n in drawn}


def _drawn(s: Sym, shape: list[int], generator: torch.Generator) -> Tensor:
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    if s.rank == 2:
        value = value / shape[-2] ** 0.5
    if "tight_frame" in s.props:
        count, rows, cols = shape
        if count * cols != rows:
            raise UnrollError(
                "E403", f"{s.name} cannot start as a tight frame: {count} times {cols} columns are not {rows}"
            )
        value = torch.linalg.qr(value.movedim(0, 1).reshape(rows, rows)).Q.reshape(rows, count, cols).movedim(1, 0)
    if "orthonormal" in s.props:
        left, _, right = torch.linalg.svd(value, full_matrices=False)
        value = left @ right
    if "unit_columns" in s.props:
        value = nn.functional.normalize(value, dim=-2)
    if "symmetric" in s.props:
        value = (value + value.mT) / 2
    if "positive" in s.props:
        value = value.abs()
    if "identity" in s.props:
        value = torch.eye(*shape[-2:], dtype=torch.float64).expand(shape).clone()
    return torch.full_like(value, float("ones" in s.props)) if {"zeros", "ones"} & s.props else value
