"""Every objective of the library with sizes and random values in mathematical layout."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
from torch import Tensor

from unroll.language.nodes import Sym
from unroll.language.problem import Problem, from_spec
from unroll.spec import Spec, library, load


def loaded(name: str) -> Spec:
    return load(library.find(name, ("objectives",)))


NAMES = tuple(n for n in library.names("objectives") if all(v.family is None for v in loaded(n).variables.values()))
"""Those in matrices: an objective in families of them is for losses alone (test_losses.py)."""
SIZES = (5, 4, 3, 2, 6)
"""Sizes of dims, in the order in which an objective declares them."""
SIZES_OF = {"subspace_mixture": (2, 3, 5, 4)}


def objective(name: str) -> Problem:
    spec = loaded(name)
    return from_spec(spec, dict(zip(spec.dims, SIZES_OF.get(name, SIZES), strict=False)))


def drawn(name: str, seed: int = 0) -> tuple[Problem, dict[Sym, Tensor], dict[sp.Symbol, Any]]:
    """The problem, values of its symbols (rows, cols), values of its scalars and sizes."""
    problem = objective(name)
    g = torch.Generator().manual_seed(seed)
    sizes: dict[sp.Symbol, Any] = {d: n for d, n in problem.dims.items() if isinstance(n, int)}
    given = {s: torch.randn(*_shape(s, sizes), generator=g, dtype=torch.float64) for s in problem.symbols.values()}
    scalars = {s: float(v) for s, v in problem.scalars.items() if v is not None}
    return problem, given, scalars | sizes


def _shape(s: Sym, sizes: dict[sp.Symbol, Any]) -> list[int]:
    return [int(n.subs(sizes)) for n in ([s.family] if s.family is not None else []) + [s.rows, s.cols]]
