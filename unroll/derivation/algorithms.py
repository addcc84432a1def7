"""Algorithms: a text of named updates, read for one problem, becomes one iteration as assignments.

    proximal_gradient   z: prox(step * g, z - step * grad(f, z))     f, g: sums of terms (dealing.py)

What can be done with a letter is known here, no algorithm by name: grad, L, prox, conj, argmin, norm, hold, last. What does not fit
is refused with what was needed, what was found, and which algorithm fits. The language: docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import sympy as sp

from unroll.derivation.dealing import SWEEP, Misfit, deal, letters, others
from unroll.derivation.known import LIPSCHITZ, state_of
from unroll.derivation.parts import Part, classify, unsigned
from unroll.derivation.reading import MOMENTUM, OWN_STEP, STEP, Options, Reading
from unroll.derivation.step import LAYER, Assign, Step
from unroll.errors import DeriveError, SpecError, UnrollError, did_you_mean
from unroll.language.constructors import constant
from unroll.language.nodes import Expr
from unroll.language.parse import parse
from unroll.language.problem import Problem, place_of
from unroll.spec import Spec, texts
from unroll.spec.texts import Text

__all__ = [
    "LIPSCHITZ",
    "MOMENTUM",
    "STEP",
    "Algorithm",
    "Options",
    "build",
    "every",
    "find",
    "parse_start",
    "state_of",
    "where_known",
]

NONE_FITS = "no algorithm here fits; each term must be smooth, or the rest proximable together"


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of the library, or a spec's own."""

    text: Text

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def about(self) -> str:
        return self.text.record.about

    @property
    def source(self) -> str:
        return self.text.record.source

    @property
    def needs(self) -> str:
        return self.text.record.needs or self.text.record.solves

    def fits(self, parts: tuple[Part, ...], split: Mapping[str, tuple[str, ...]] | None = None) -> str | None:
        """None, or what is missing."""
        try:
            deal(self.text, parts, split)
        except Misfit as missing:
            return str(missing)
        return None


def every() -> tuple[Algorithm, ...]:
    """All algorithms of the library."""
    return tuple(Algorithm(t) for t in texts.every())


def by_simplicity(own: Iterable[Algorithm] = ()) -> list[Algorithm]:
    """All algorithms of the library, and a spec's own: those that claim most first, then those of few letters and states.

    What goes from entry to entry comes last: it takes as many steps, one after the other, as there are entries.
    """
    records = {a.name: (a, a.text.record) for a in (*every(), *own)}

    def key(name: str) -> tuple[bool, bool, bool, int, int, str]:
        a, record = records[name]
        claims, written = record.claimed, len(record.solves)
        return _one_by_one(a), "optimum" not in claims, "monotone" not in claims, written, len(record.states), name

    return [records[name][0] for name in sorted(records, key=key)]


def _one_by_one(a: Algorithm) -> bool:
    try:
        return any(SWEEP in x.uses for x in letters(a.text))
    except SpecError:  # said when it is tried
        return False


def fitting_names(parts: tuple[Part, ...]) -> Iterator[str]:
    """The algorithms of the library that fit, the simplest first."""
    return (a.name for a in by_simplicity() if a.fits(parts) is None)


def find(name: str, spec: Spec | None = None, path: tuple[str | int, ...] = ()) -> Algorithm:
    """The algorithm of a name; path: where the spec says it. Raises SpecError E303."""
    where = spec.origin(*path).where() if spec is not None and name else None
    if not name:
        raise SpecError("E303", "no algorithm is named", where, f"algorithms: {', '.join(a.name for a in every())}")
    try:
        return Algorithm(texts.find(name, spec, where))
    except SpecError as e:
        if e.code != "E003":
            raise
        known = [a.name for a in every()]
        hint = did_you_mean(name, known) or f"algorithms: {', '.join(known)}"
        raise SpecError("E303", f"unknown algorithm '{name}'", where, hint) from None


def build(algorithm: Algorithm, problem: Problem, options: Options) -> Step:
    """One iteration on `problem`. Raises DeriveError E303 with what was needed, found, and what fits."""
    parts = classify(problem)
    try:
        return attempt(algorithm, problem, parts, options)
    except Misfit as missing:
        fitting = list(islice(fitting_names(parts), 3))
        hint = unsigned(parts) or (f"{' or '.join(fitting)} fits" if fitting else NONE_FITS)
        hint += ", or blocks do, one over: each variable" if len(problem.variables) > 1 else ""
        raise DeriveError(
            "E303",
            f"{algorithm.name} does not fit: {missing}",
            hint=hint,
            notes=(f"needed: {algorithm.needs}", *(f"found: {p.show()}" for p in parts)),
        ) from None


def attempt(algorithm: Algorithm, problem: Problem, parts: tuple[Part, ...], options: Options) -> Step:
    """One iteration on `problem`, of which `parts` are what is known. Raises Misfit, SpecError E320, DeriveError E303, E304."""
    text, record = algorithm.text, algorithm.text.record
    rules = [k.split("(")[0] for k in record.momenta]
    if options.momentum is not None and options.momentum.split("(")[0] not in rules:
        hint = f"its momenta: {', '.join(rules)}" if rules else f"{algorithm.name} has no momentum; fista has"
        raise DeriveError("E303", f"{algorithm.name} does not know the momentum '{options.momentum}'", hint=hint)
    _known_terms(text, parts, options)
    dealt = deal(text, parts, options.split)
    _known_numbers(text, options)
    step = Reading(text, problem, dealt, options).step()
    each, once = where_known(step.definitions, {s.symbol.name for s in step.states})
    return replace(
        step, definitions=tuple(once), assigns=(*(replace(a, block=step.assigns[0].block) for a in each), *step.assigns)
    )


def otherwise(algorithm: Algorithm, problem: Problem, options: Options) -> Iterator[str]:
    """The next best dealing whose constants are known, as the spec would ask for it."""
    parts = classify(problem)
    for split in others(algorithm.text, parts, options.split):
        try:
            attempt(algorithm, problem, parts, replace(options, split=split))
        except (Misfit, UnrollError):
            continue
        letters_of = ", ".join(f"{letter}: [{', '.join(terms)}]" for letter, terms in split.items())
        yield f"or split: {{{letters_of}}}"
        return


def _known_terms(text: Text, parts: tuple[Part, ...], options: Options) -> None:
    names, terms = {x.name for x in letters(text)}, {p.term for p in parts}
    for letter, wanted in options.split.items():
        bad = letter if letter not in names else next((t for t in wanted if t not in terms), None)
        if bad is not None:
            known = names if letter not in names else terms
            what = f"{text.name} has no letter '{bad}'" if letter not in names else f"the objective has no term '{bad}'"
            raise SpecError(
                "E320",
                what,
                options.at("split", letter)(0, 1),
                did_you_mean(bad, known) or f"there are: {', '.join(sorted(known))}",
            )


def _known_numbers(text: Text, options: Options) -> None:
    scalars = text.record.scalars
    if STEP.name in options.numbers and options.step != OWN_STEP:
        raise SpecError(
            "E320", "the step size is given twice", options.at("step")(0, 1), "step: is short for numbers: {step: ..}"
        )
    for name in (*options.numbers, *([STEP.name] if options.step != OWN_STEP else [])):
        if name not in scalars:
            hint = did_you_mean(name, scalars) or f"its numbers: {', '.join(scalars) or 'none'}"
            place = options.at("numbers", name) if name in options.numbers else options.at("step")
            raise SpecError("E320", f"{text.name} has no number '{name}'", place(0, 1), hint)


def where_known(definitions: Iterable[Assign], moving: set[str]) -> tuple[list[Assign], list[Assign]]:
    """Definitions that depend on the state are worked out in every layer, the others once."""
    inside: list[Assign] = []
    once: list[Assign] = []
    changing: set[sp.Basic] = set()
    for a in definitions:
        symbols = {s.name for s in a.value.symbols} if isinstance(a.value, Expr) else set[str]()
        free = a.value.scalars if isinstance(a.value, Expr) else a.value.free_symbols
        if symbols & moving or free & changing or LAYER in free:
            changing.add(cast(sp.Symbol, a.target))
            inside.append(a)
        else:
            once.append(a)
    return inside, once


def parse_start(problem: Problem, spec: Spec, name: str) -> Expr:
    """The start value of a variable. Raises SpecError E101, E131."""
    place = place_of(spec, "unroll", "start", name)
    z = next((v for v in problem.variables if v.name == name), None)
    if z is None:
        raise SpecError(
            "E101",
            f"'{name}' is not a variable",
            spec.key_where("unroll", "start", name),
            did_you_mean(name, [v.name for v in problem.variables]),
        )
    value = parse(spec.unroll.start[name], problem.scope, place)  # type: ignore[union-attr]
    e = value if isinstance(value, Expr) else constant(value, *z.shape)
    if e.shape != z.shape:
        raise SpecError("E131", f"the start of {name} has another shape than {name}", place(0, 1))
    if any(v in e.symbols for v in problem.variables):
        raise SpecError("E101", f"the start of {name} depends on a variable", place(0, 1))
    return e
