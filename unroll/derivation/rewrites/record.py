"""What a rewrite is, and what applying one leaves behind: a picture, what it assumes, its error, the places where it matched.

    exact       changes no value
    bounded     an approximation with a stated error under a stated assumption
    heuristic   a substitution; no bound is known, and every report says so

A rewrite is a rule on one node: it gives what stands there afterwards and, for an approximation, the number that its
assumption is about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from unroll.language.nodes import Expr, Sym
from unroll.language.parse import Place

Kind = Literal["exact", "bounded", "heuristic"]


@dataclass(frozen=True)
class Site:
    """One place where a rewrite matched. assumption: the number it is about, 1 × 1; None for an exact one.

    core: what the stated error is about, before and after, where that is a part of the whole.
    """

    before: Expr
    after: Expr
    assumption: Expr | None = None
    core: tuple[Expr, Expr] | None = None


@dataclass(frozen=True)
class Argument:
    """kind: number, count, flag, symbol or word; without a default it must be given."""

    name: str
    kind: Literal["number", "count", "flag", "symbol", "word"]
    default: Any = None
    optional: bool = True


Rule = Callable[[Expr], Site | None]


@dataclass(frozen=True)
class Rewrite:
    """rule(arguments) -> what happens at one node. picture, result: before and after. assumes, error: in words. limit(assumption, arguments) -> the stated bound on the
    relative error, infinite where the assumption fails. left(e, arguments) -> what is still there that the rewrite is to leave none of. rest(e, arguments, values of scalars) -> e with what is in front of its terms rewritten."""

    name: str
    picture: str
    result: str
    kind: Kind
    assumes: str
    error: str
    source: str
    rule: Callable[..., Rule]
    arguments: tuple[Argument, ...] = ()
    stage: Literal["objective", "step"] = "step"
    limit: Callable[..., float] | None = None
    left: Callable[..., Expr | None] | None = None
    rest: Callable[..., Expr] | None = None

    @property
    def signature(self) -> str:
        shown = [a.name if not a.optional else f"{a.name}={a.default}" for a in self.arguments]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True)
class Applied:
    """A rewrite as a spec asked for it, and the places where it matched."""

    rewrite: Rewrite
    values: dict[str, Any]
    block: str
    sites: tuple[Site, ...]

    @property
    def title(self) -> str:
        shown = ", ".join(
            f"{k}={v.name if isinstance(v, Sym) else v}"
            for k, v in self.values.items()
            if v is not None and v is not False
        )
        return f"{self.rewrite.name}({shown})" if shown else self.rewrite.name


@dataclass(frozen=True)
class Call:
    """`neumann(order=1)`, read."""

    rewrite: Rewrite
    values: dict[str, Any]
    text: str
    place: Place
