"""Choosing: the text that is taken where none is named.

    fits, its constants known, claims something of this problem     -> those that claim most first, then the simplest

An optimum is claimed of what is convex; that no step raises the objective, of all that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from unroll.derivation.algorithms import NONE_FITS, Algorithm, attempt, by_simplicity
from unroll.derivation.dealing import Misfit, convex, requirement
from unroll.derivation.parts import classify
from unroll.derivation.reading import Options
from unroll.derivation.step import Step
from unroll.errors import DeriveError, UnrollError, quote
from unroll.language.problem import Problem

DESCENDS = "monotone"
WHY = {
    "optimum": "claims the optimum: every term is convex",
    DESCENDS: "claims that no step raises the objective, which is not known to be convex",
}


@dataclass(frozen=True)
class Tried:
    """A text tried on a problem: its step, or why there is none. claim: what it says of this problem, "" where nothing."""

    algorithm: Algorithm
    claim: str = ""
    step: Step | None = None
    refused: Misfit | UnrollError | None = None

    @property
    def reason(self) -> str:
        """Why it is not taken."""
        match self.refused:
            case None:
                return "it claims nothing of this problem"
            case UnrollError(message=said):
                return said.removeprefix(f"{self.algorithm.name} ")
            case _:
                return str(self.refused)

    @property
    def needs_a_number(self) -> bool:
        """Does it fit, but for a constant that is not known?"""
        return isinstance(self.refused, UnrollError) and self.refused.code == "E304"


@dataclass(frozen=True)
class Choice:
    """What is taken, None where nothing fits and claims something; what was tried before it, and what is left to be tried."""

    taken: Tried | None
    before: tuple[Tried, ...]
    rest: Iterable[Tried]

    def says(self) -> Iterator[str]:
        """What is taken and why; what else fits; what does not, and why not. Raises DeriveError E303 with a reason for each."""
        tried = (*self.before, *self.rest)
        fits = [t.algorithm.name for t in tried if t.step is not None]
        if self.taken is None:
            steps = next((cast(UnrollError, t.refused).hint for t in tried if t.needs_a_number), "")
            named = f"{fits[0]} fits; algorithm: {fits[0]} takes it, without a claim" if fits else ""
            message = "no algorithm fits and claims something of this problem"
            raise DeriveError("E303", message, hint=named or steps or NONE_FITS, notes=tuple(_reasons(tried)))
        yield f"chosen: {self.taken.algorithm.name}, the simplest that fits and {WHY[self.taken.claim]}"
        yield f"fit too: {', '.join(fits) or 'none'}"
        yield f"do not fit: {'; '.join(_reasons(t for t in tried if t.step is None)) or 'none'}"


def choose(problem: Problem, options: Options, own: Iterable[Algorithm] = ()) -> Choice:
    """The text for a problem, among those of the library and a spec's own."""
    waiting, before = tried(problem, by_simplicity(own), options), list[Tried]()
    for t in waiting:
        if t.step is not None and t.claim:
            return Choice(t, tuple(before), waiting)
        before.append(t)
    return Choice(None, tuple(before), ())


def tried(problem: Problem, among: Iterable[Algorithm], options: Options | None = None) -> Iterator[Tried]:
    """Each text on a problem, in this order, one after the other as they are asked for."""
    parts = classify(problem)
    held, whole = any(p.holds for p in parts), all(map(convex, parts))
    for a in among:
        try:
            step = attempt(a, problem, parts, options or Options())
        except (Misfit, UnrollError) as refused:
            yield Tried(a, refused=refused)
            continue
        claims = {c.claim for c in a.text.record.claims if not any(map(requirement, c.when)) or _made(c.claim, step)}
        claim = "optimum" if whole and "optimum" in claims else DESCENDS if DESCENDS in claims else ""
        claim = "" if held else claim  # a fixed point of what is held need not be the least value
        yield Tried(a, claim, step)


def _made(claim: str, step: Step) -> bool:
    """Is what a claim requires of letters met here, and by the numbers?"""
    return any(c.name == claim and c.holds is not False for c in step.claims)


def _reasons(found: Iterable[Tried]) -> Iterator[str]:
    """Why each was not taken, those with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for t in found:
        by_reason.setdefault(quote(t.reason, 72), []).append(t.algorithm.name)
    yield from (f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
