"""Axes of the tensors that a user sees, and which of them are stored."""

from __future__ import annotations

import sympy as sp

from unroll.language.nodes import Sym


def unit_axes(s: Sym) -> tuple[int, ...]:
    """Axes of size 1 of the tensor a user sees that are not stored, counted from the end."""
    match s.rank:
        case 0:
            return ()
        case 1:
            return (-1,) if s.nrows == 1 else ()
        case _:
            return tuple(i - 2 for i in (0, 1) if s.stored[i] == 1)


def stored_axes(s: Sym) -> tuple[sp.Expr, ...]:
    """Axes of the tensor that a user sees, after the batch axes."""
    family = () if s.family is None else (s.family,)
    match s.rank:
        case 0:
            return family
        case 1:
            return (*family, s.nrows)
        case _:
            return (*family, *s.stored)


def stored_sizes(s: Sym) -> tuple[str, ...]:
    return tuple(map(str, stored_axes(s)))


def axes_of(s: Sym, d: sp.Symbol) -> list[int]:
    """Axes of size d of a tensor, counted from the end."""
    sizes = (s.nrows,) if s.rank == 1 else s.stored if s.rank == 2 else ()
    return [i - len(sizes) for i, n in enumerate(sizes) if n == d]
