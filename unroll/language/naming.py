"""A long formula in parts that have names, as a reader would write it: Z + W @ shares, where shares = softmax(...)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count

import sympy as sp

from unroll.language.constructors import member, symbol, transpose
from unroll.language.nodes import (
    Expr,
    FamilyLogSumExp,
    FamilySoftmax,
    FamilySum,
    Hold,
    Inverse,
    Member,
    Ones,
    Prox,
    Softmax,
    Spectrum,
    Sym,
    Transpose,
    free_indices,
    walk,
)
from unroll.language.show import text
from unroll.language.traversal import substitute

WIDTH, LONG, LEAST, MOST = 110, 160, 20, 8
"""Characters of a line in which what is written twice may stand, of one in which any part may, and of the least part that gets a
name; how many parts get one at most."""
_text = lru_cache(4096)(text)
FUNCTIONS = (Softmax, FamilySoftmax, Inverse, Hold)


@dataclass(frozen=True)
class InParts:
    """A formula that reads the names of its parts, and what those are, each after those that it reads: (name, formula)."""

    whole: Expr | sp.Expr
    parts: tuple[tuple[Expr, Expr], ...] = ()


@lru_cache(64)
def in_parts(formulas: tuple[Expr | sp.Expr, ...]) -> tuple[InParts, ...]:
    """Formulas of one step, each itself where its text is short, else with names for what is written often, for functions, then for
    what is long. No name stands for two things."""
    names = {word for f in formulas for word in re.findall(r"\w+", _text(f))}
    return tuple(_in_parts(f, names) if isinstance(f, Expr) else InParts(f) for f in formulas)


def _in_parts(e: Expr, names: set[str]) -> InParts:
    whole, parts = e, list[tuple[Expr, Expr]]()
    while len(parts) < MOST:
        formulas = [whole, *(p for _, p in parts)]
        part = next((p for f in sorted(formulas, key=lambda f: -len(_text(f))) if (p := _part(f, formulas))), None)
        if part is None:
            break
        part = min((part, transpose(part)), key=lambda p: (len(_text(p)), _text(p).count(".T")))
        name = _named(part, names, e)
        put = {transpose(part): transpose(name), part: name}
        whole = substitute(whole, put)
        parts = [(n, substitute(p, put)) for n, p in parts]
        first = next((i for i, (_, p) in enumerate(parts) if name in walk(p)), len(parts))
        parts.insert(first, (name, part))
    return InParts(whole, tuple(parts))


def _part(e: Expr, formulas: Sequence[Expr]) -> Expr | None:
    """What of a long formula saves most where it has a name: what all formulas write often, else a function, else what is long."""
    size = len(_text(e))
    if size <= WIDTH:
        return None
    shown = [_text(f) for f in formulas]

    def saves(part: Expr) -> tuple[int, bool, int]:
        words = {_text(part), _text(transpose(part))}
        often = sum(line.count(word) for line in shown for word in words)
        return (often - 1) * len(_text(part)), isinstance(part, FUNCTIONS), len(_text(part))

    own = (e, e.x) if isinstance(e, Hold) else (e,)  # nor nearly all of it, which would say nothing of its shape
    found = [c for c in _inside(e) if c not in own and _may_be_named(c) and 2 * len(_text(c)) < size + WIDTH]
    saved, best = max(((saves(c), c) for c in found), key=lambda s: s[0], default=((0, False, 0), None))
    return best if saved[0] or saved[1] or size > LONG else None


def _inside(e: Expr) -> Iterable[Expr]:
    """All that a formula reads, but not the penalty of a proximal map, which has a variable of its own."""
    for x in walk(e, lambda x: not isinstance(x, Prox)):
        yield x
        if isinstance(x, Prox):
            yield from _inside(x.at)


def _may_be_named(part: Expr) -> bool:
    plain = isinstance(part, Sym | Member | Transpose | Ones)
    free = free_indices(part)
    of_frequency = any(isinstance(x, Spectrum) and x.index in free for x in walk(part))
    return not plain and not of_frequency and len(_text(part)) >= LEAST and len(free) <= 1


def _named(part: Expr, names: set[str], within: Expr) -> Expr:
    """A new symbol in the place of a part: a member of a family where the part is one of each index."""
    core = part.x if isinstance(part, Hold) else part
    word = "shares" if isinstance(core, Softmax | FamilySoftmax) else "inv" if isinstance(core, Inverse) else "part"
    name = next(n for n in chain([word], (f"{word}_{i}" for i in count(2))) if n not in names)
    names.add(name)
    for index in free_indices(part):
        return member(symbol(name, *part.shape, family=_size(within, index)), index)
    return symbol(name, *part.shape)


def _size(e: Expr, index: str) -> sp.Expr:
    """How many members the index runs over."""
    families = (x for x in walk(e) if isinstance(x, FamilySum | FamilyLogSumExp | FamilySoftmax))
    return next(x.size for x in families if x.index == index)
