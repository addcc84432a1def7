"""Spec -> Problem: symbols declared, shapes checked, functions expanded, the objective split into named terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

import sympy as sp

from unroll.errors import SpecError, Where, did_you_mean
from unroll.language.constructors import number, scale, split, swap, symbol
from unroll.language.functions import Value, as_expr
from unroll.language.nodes import ONE, Expr, Indicator, Role, Sym, dim, scalar, show_shape
from unroll.language.parse import Macro, Place, Scope, parse, parse_constraint, parse_signature
from unroll.spec import Spec
from unroll.spec.schema import Tensor


@dataclass(frozen=True)
class Problem:
    """minimise over `variables` the sum of `terms` (maximise, where `sign` is -1; terms are as written).

    Symbols: `variables` and `inputs` carry batch axes, `parameters` do not.
    scalars: symbol -> default value or None.  dims: size symbol -> number, None (open) or "dynamic".
    """

    name: str
    about: str
    variables: tuple[Sym, ...]
    inputs: tuple[Sym, ...]
    parameters: tuple[Sym, ...]
    scalars: dict[sp.Symbol, sp.Expr | None]
    dims: dict[sp.Symbol, int | str | None]
    terms: dict[str, Expr]
    sign: int = 1
    scope: Scope = field(default_factory=Scope)

    @property
    def symbols(self) -> dict[str, Sym]:
        return {s.name: s for s in (*self.variables, *self.inputs, *self.parameters)}

    @property
    def costs(self) -> dict[str, Expr]:
        """The terms of what is minimised."""
        return {name: scale(self.sign, e) for name, e in self.terms.items()}

    @property
    def penalties(self) -> list[Expr]:
        """The terms that are not constraints."""
        return [e for e in self.terms.values() if not isinstance(split(e)[1], Indicator)]

    @property
    def sets(self) -> list[Expr]:
        """The constraints, with no sign in front."""
        return [e for e in (split(e)[1] for e in self.terms.values()) if isinstance(e, Indicator)]


def from_spec(spec: Spec, dims: Mapping[str, int] | None = None) -> Problem:
    """The problem that a spec declares; `dims` set sizes that it leaves open.

    Raises SpecError E1xx with the place of a formula that does not fit, E134 for a size that is not declared.
    """
    sizes = _dims(spec, dims or {})
    names: dict[str, Value] = {d.name: d for d in sizes}
    defaults: dict[sp.Symbol, sp.Expr | None] = {}
    for name, record in spec.scalars.items():
        s = scalar(name, positive=record.positive or (record.min is not None and record.min > 0))
        names[name] = s
        defaults[s] = None if record.default is None else number(record.default)
    sections: dict[str, Role] = {"variables": "variable", "inputs": "input", "parameters": "parameter"}
    tensors = {section: _tensors(spec, section, role, names) for section, role in sections.items()}
    for symbols in tensors.values():
        names |= {s.name: s for s in symbols}
    declared = {s.name: _declared(spec, section, s) for section, symbols in tensors.items() for s in symbols}
    known = {d: n for d, n in sizes.items() if isinstance(n, int)}
    for s in tensors["parameters"]:
        rows, cols = swap(s.rows, known), swap(s.cols, known)
        if "orthonormal" in s.props and (cols - rows).is_positive:
            where = spec.key_where("parameters", s.name)
            raise SpecError(
                "E131",
                f"{s.name} is declared orthonormal, but {show_shape((rows, cols))} has no orthonormal columns",
                where,
                "declare its transpose",
            )
    scope = Scope(names, _macros(spec), declared, known)
    terms = _terms(spec, scope)
    return Problem(
        spec.title, spec.about, tensors["variables"], tensors["inputs"], tensors["parameters"], defaults, sizes, terms,
        -1 if spec.maximize is not None else 1, scope,
    )  # fmt: skip


def place_of(spec: Spec, *path: str | int) -> Place:
    """Where characters of the formula at `path` stand."""
    origin = spec.origin(*path)
    return lambda start, length: origin.where(start, length)


def _dims(spec: Spec, given: Mapping[str, int]) -> dict[sp.Symbol, int | str | None]:
    for name, n in given.items():
        if name not in spec.dims:
            raise SpecError(
                "E134",
                f"'{name}' is not a size of {spec.title}",
                hint=did_you_mean(name, spec.dims) or f"its sizes: {', '.join(spec.dims)}",
            )
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SpecError("E134", f"the size {name} must be a whole number from 1, not {n!r}")
    written = {n: v if isinstance(v, int) or v == "dynamic" else None for n, v in spec.dims.items()}
    return {dim(n): given.get(n, v) for n, v in written.items()}


def _tensors(spec: Spec, section: str, role: Role, names: Mapping[str, Value]) -> tuple[Sym, ...]:
    return tuple(
        tensor(name, record, role, names, spec.key_where(section, name))
        for name, record in getattr(spec, section).items()
    )


def tensor(name: str, record: Tensor, role: Role, names: Mapping[str, Value], where: Where) -> Sym:
    """The symbol of a declared tensor. Raises SpecError E131, E132, E134."""
    shape = [_size(entry, names, where) for entry in record.shape]
    props = {p for p in ("orthonormal", "symmetric", "positive") if getattr(record, p, False)}
    props |= {"unit_columns"} if getattr(record, "columns", None) == "unit" else set()
    props |= {"mask"} if record.mask else set()
    family = shape.pop(0) if len(shape) == 3 else None if record.family is None else _size(record.family, names, where)
    rows, cols = [*shape, ONE, ONE][:2]
    if role != "parameter" and record.stored == "as_written":
        props |= {"as_written"}
    if role == "parameter" and record.stored == "tokens_first":
        hint = f"give {name}.T, or declare its transpose"
        raise SpecError("E132", f"{name} is a parameter: these are stored as they are written", where, hint)
    if record.mask and (role != "input" or len(shape) != 1 or family is not None or not isinstance(rows, sp.Symbol)):
        hint = f"inputs: {{{name}: {{shape: [N], mask: true}}}}, N: dynamic under dims"
        raise SpecError("E132", f"{name} is a mask: an input with one size", where, hint)
    if "symmetric" in props and rows != cols:
        raise SpecError("E131", f"{name} is declared symmetric, but {show_shape((rows, cols))} is not square", where)
    return symbol(name, rows, cols, role, len(shape), family, props)


def _size(entry: int | str, names: Mapping[str, Value], where: Where) -> sp.Expr:
    if isinstance(entry, int):
        return sp.Integer(entry)
    value = parse(entry, Scope(names), lambda start, length: where)
    if isinstance(value, Expr) or value.is_integer is not True or not value.is_positive:
        raise SpecError("E134", f"'{entry}' is not a size", where, "sizes are declared under 'dims:'")
    return value


def _declared(spec: Spec, section: str, s: Sym) -> str:
    where = spec.key_where(section, s.name)
    sizes = [*([s.family] if s.family is not None else []), *s.shape[: s.rank]]
    of = "" if where.file == spec.file else f" of {PurePath(where.file).name}"
    return f"[{', '.join(map(str, sizes))}] on line {where.line}{of}"


def _macros(spec: Spec) -> dict[str, Macro]:
    found: dict[str, Macro] = {}
    for signature, body in spec.functions.items():
        where = spec.key_where("functions", signature)
        name, parameters = parse_signature(signature, lambda start, length, where=where: where)
        found[name] = Macro(name, parameters, body, place_of(spec, "functions", signature))
    return found


def _terms(spec: Spec, scope: Scope) -> dict[str, Expr]:
    section = "maximize" if spec.maximize is not None else "minimize"
    written = getattr(spec, section)
    assert written is not None, "a spec without an objective is refused when it is loaded; please report"
    texts = (
        {"objective": (written, (section,))}
        if isinstance(written, str)
        else {n: (t, (section, n)) for n, t in written.items()}
    )
    terms: dict[str, Expr] = {}
    for name, (text, path) in texts.items():
        place = place_of(spec, *path)
        e = as_expr(parse(text, scope, place))
        if not e.is_scalar:
            hint = "sum(...), sumsq(...) or norm1(...) makes a number of it"
            raise SpecError(
                "E133", f"the term {name} is {show_shape(e.shape)}; an objective is a scalar", place(0, len(text)), hint
            )
        terms[name] = e
    for i, text in enumerate(spec.constraints):
        name = "constraint" if i == 0 else f"constraint_{i + 1}"
        e = parse_constraint(text, scope, place_of(spec, "constraints", i))
        terms[name] = scale(-1, e) if spec.maximize is not None else e
    return terms
