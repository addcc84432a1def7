"""Random well-shaped expressions over a small problem, and the two layouts of its values."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from unroll.language.constructors import (
    add,
    constant,
    diag,
    diagonal,
    elementwise,
    eye,
    family_logsumexp,
    family_softmax,
    family_sum,
    hold,
    inverse,
    largest,
    logdet,
    logsumexp,
    matmul,
    member,
    normalise,
    ones,
    operator,
    scale,
    softmax,
    spectral,
    spectral_norm,
    symbol,
    total,
    trace,
    transpose,
    zeros,
)
from unroll.language.nodes import Expr, Sym, dim, scalar, slot
from unroll.language.problem import Problem

M, N, T, K = dim("m"), dim("n"), dim("T"), dim("K")
LAM = scalar("lam", positive=True)
A = symbol("A", M, N)
G = symbol("G", N, N)
W = symbol("w", N)
U = symbol("U", M, N, family=K)
X = symbol("X", M, T, "input")
Y = symbol("y", M, 1, "input")
V = symbol("v", N, 1, "input")
Z = symbol("Z", N, T, "variable", 2)
Q = symbol("q", N, 1, "variable")
SYMBOLS = (A, G, W, U, X, Y, V, Z, Q)
DIMS: tuple[sp.Symbol, ...] = (M, N, T, K)

PROFILES = (
    slot(0) ** 2, sp.tanh(slot(0)), sp.Abs(slot(0)), sp.exp(-slot(0) ** 2), sp.sqrt(1 + slot(0) ** 2), sp.Max(slot(0), 0),
    sp.log(1 + sp.exp(slot(0))), slot(0) / (1 + slot(0) ** 2), sp.Piecewise((slot(0), sp.Abs(slot(0)) < LAM), (LAM * sp.sign(slot(0)), True)),
)  # fmt: skip


def problem(terms: dict[str, Expr], dims: dict[str, int]) -> Problem:
    return Problem(
        "random", "", (Z, Q), (X, Y, V), (A, G, W, U), {LAM: sp.Rational(3, 10)}, {d: dims[d.name] for d in DIMS}, terms
    )  # fmt: skip


class Random:
    """Draws expressions of a wanted shape."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)

    def expr(self, rows: sp.Expr, cols: sp.Expr, depth: int) -> Expr:
        options: list[Callable[[], Expr]] = [lambda: self.leaf(rows, cols)]
        if depth > 0:
            options = [
                lambda: add(self.expr(rows, cols, depth - 1), self.expr(rows, cols, depth - 1)),
                lambda: scale(self.coefficient(), self.expr(rows, cols, depth - 1)),
                lambda: self.product(rows, cols, depth - 1),
                lambda: self.product(rows, cols, depth - 1),
                lambda: transpose(self.expr(cols, rows, depth - 1)),
                lambda: elementwise(self.pick.choice(PROFILES), self.expr(rows, cols, depth - 1)),
                lambda: elementwise(
                    slot(0) * slot(1), self.expr(rows, cols, depth - 1), self.expr(rows, sp.Integer(1), depth - 1)
                ),
                lambda: elementwise(
                    slot(0) + slot(1), self.expr(sp.Integer(1), cols, depth - 1), self.expr(rows, cols, depth - 1)
                ),
                lambda: elementwise(slot(0) * slot(1), self.scalar(depth - 1), self.expr(rows, cols, depth - 1)),
                lambda: softmax(self.expr(rows, cols, depth - 1), self.pick.randrange(2)),
                lambda: self.solve(rows, cols, depth - 1),
                lambda: hold(self.expr(rows, cols, depth - 1)),
                lambda: self.family(rows, cols, depth - 1),
                lambda: self.shares(rows, cols, depth - 1),
                lambda: self.norm(self.expr(rows, cols, depth - 1)),
                lambda: operator("running_sum", self.expr(rows, cols, depth - 1), self.pick.random() < 0.5),
                lambda: matmul(diag(self.expr(rows, sp.Integer(1), depth - 1)), self.expr(rows, cols, depth - 1)),
            ]
            if cols == 1:
                wide = self.size()
                options.append(lambda: total(self.expr(rows, wide, depth - 1), 1))
                options.append(lambda: logsumexp(self.expr(rows, wide, depth - 1), 1))
                options.append(lambda: diagonal(self.expr(rows, rows, depth - 1)))
                options.append(lambda: operator("first", self.expr(wide, cols, depth - 1), sizes=(rows,)))
                options.append(
                    lambda: operator(
                        "difference", operator("difference", self.expr(rows, cols, depth - 1)), adjoint=True
                    )
                )
            if rows == cols:
                options.append(lambda: softmax(self.expr(rows, rows, depth - 1), self.pick.randrange(2), causal=True))
                options.append(lambda: eye(rows))
                options.append(lambda: diag(self.expr(rows, sp.Integer(1), depth - 1)))
            if rows == cols == 1:
                options = [lambda: self.scalar(depth)]
        return self.pick.choice(options)()

    def size(self) -> sp.Expr:
        return self.pick.choice((M, N, T, sp.Integer(1)))

    def leaf(self, rows: sp.Expr, cols: sp.Expr) -> Expr:
        found = [s for s in SYMBOLS if s.family is None and s.shape == (rows, cols)]
        found += [transpose(s) for s in SYMBOLS if s.family is None and s.shape == (cols, rows)]
        return self.pick.choice([*found, *found, ones(rows, cols), zeros(rows, cols)] if found else [ones(rows, cols)])

    def coefficient(self) -> Any:
        return self.pick.choice((2, -1, LAM, sp.Rational(1, 3), -LAM / 2, LAM / M, sp.sqrt(LAM)))

    def product(self, rows: sp.Expr, cols: sp.Expr, depth: int) -> Expr:
        inner = self.size()
        return matmul(self.expr(rows, inner, depth), self.expr(inner, cols, depth))

    def gram(self, rows: sp.Expr, depth: int) -> Expr:
        return self.gram_of(self.expr(rows, self.size(), depth))

    def gram_of(self, x: Expr) -> Expr:
        """I + lam x x', positive definite."""
        return add(eye(x.rows), scale(LAM, matmul(x, transpose(x))))

    def solve(self, rows: sp.Expr, cols: sp.Expr, depth: int) -> Expr:
        """By a positive definite matrix, from the left or the right."""
        if self.pick.random() < 0.5:
            return matmul(inverse(self.gram(rows, depth)), self.expr(rows, cols, depth))
        return matmul(self.expr(rows, cols, depth), inverse(self.gram(cols, depth)))

    def family(self, rows: sp.Expr, cols: sp.Expr, depth: int) -> Expr:
        u = member(U, "k")
        left, right = self.expr(rows, M, depth), self.expr(N, cols, depth)
        body = matmul(left, u, right)
        return family_sum("k", K, body if self.pick.random() < 0.7 else elementwise(sp.tanh(slot(0)), body))

    def shares(self, rows: sp.Expr, cols: sp.Expr, depth: int) -> Expr:
        """Log-sum-exp over a family, or its members weighed by their shares."""
        body = matmul(self.expr(rows, M, depth), member(U, "k"), self.expr(N, cols, depth))
        if self.pick.random() < 0.5:
            return family_logsumexp("k", K, body)
        return family_sum("k", K, elementwise(slot(0) * slot(1), family_softmax("k", K, body), body))

    def norm(self, x: Expr) -> Expr:
        axis = self.pick.randrange(2)
        weight = self.expr(*((x.rows, sp.Integer(1)) if axis == 0 else (sp.Integer(1), x.cols)), 0)
        kind = self.pick.choice(("layer_norm", "rms_norm", "sphere"))
        return normalise(kind, axis, sp.Rational(1, 3), x, weight if self.pick.random() < 0.5 else None)

    def scalar(self, depth: int) -> Expr:
        if depth <= 0:
            return constant(self.coefficient())
        rows, cols = self.size(), self.size()
        x = lambda: self.expr(rows, cols, depth - 1)
        return self.pick.choice(
            (
                lambda: total(elementwise(slot(0) ** 2, x())),
                lambda: logsumexp(x()),
                lambda: largest(x()),
                lambda: trace(self.product(rows, rows, depth - 1)),
                lambda: logdet(self.gram(rows, depth - 1)),
                lambda: spectral_norm(add(x(), x())),
                lambda: trace(self.expr(rows, rows, depth - 1)),
            )
        )()


def stored(s: Sym, value: Tensor) -> Tensor:
    """(..., rows, cols) -> what a user passes."""
    if s.role == "parameter":
        return value.squeeze(-1) if s.rank == 1 else value
    return value.squeeze(-1) if s.rank == 1 else value.mT


def mathematical(s: Sym, value: Tensor) -> Tensor:
    """What a network returns -> (..., rows, cols)."""
    return value.unsqueeze(-1) if s.rank == 1 else value.mT


def values(dims: dict[str, int], batch: tuple[int, ...], seed: int) -> dict[Sym, Tensor]:
    """Random tensors in mathematical layout; batch axes for inputs and variables."""
    g = torch.Generator().manual_seed(seed)

    def draw(s: Sym) -> Tensor:
        lead = batch if s.role != "parameter" else () if s.family is None else (dims["K"],)
        sizes = [int(n.subs({d: dims[d.name] for d in DIMS})) for n in s.shape]
        return 0.5 * torch.randn(*lead, *sizes, generator=g, dtype=torch.float64)

    return {s: draw(s) for s in SYMBOLS}


SLOPED = (
    *PROFILES[:-1], sp.Piecewise((slot(0) ** 2 / 2, sp.Abs(slot(0)) <= LAM), (LAM * (sp.Abs(slot(0)) - LAM / 2), True)),
    sp.Min(slot(0), LAM), sp.atan(slot(0)), sp.cosh(slot(0) / 2), sp.sin(slot(0)), sp.cos(2 * slot(0)), slot(0) ** 3, 1 / (1 + sp.exp(-slot(0))),
    sp.log(1 + slot(0) ** 2), sp.Max(slot(0), -slot(0) / 2, LAM),
)  # fmt: skip
"""Profiles with a derivative almost everywhere."""
PAIRED = (
    slot(0) * slot(1), slot(0) - slot(1) ** 2, slot(0) / (1 + slot(1) ** 2), sp.exp(-(slot(0) ** 2)) * sp.sin(slot(1)),
    sp.Max(slot(0), slot(1)), sp.Piecewise((slot(0), slot(0) < slot(1)), (slot(1) / 2 + slot(0) / 2, True)), sp.log(1 + slot(0) ** 2 + slot(1) ** 2),
)  # fmt: skip
SINGULAR = (
    slot(0) ** 4,
    sp.log(1 + LAM * slot(0) ** 2),
    slot(0) ** 2 / (1 + slot(0) ** 2),
    slot(0) ** 3,
    sp.sqrt(1 + slot(0) ** 2) - 1,
)


class Smooth(Random):
    """Draws expressions that have a gradient almost everywhere, and that mostly depend on the variables."""

    def leaf(self, rows: sp.Expr, cols: sp.Expr) -> Expr:
        found = [s for s in (Z, Q) if s.shape == (rows, cols)] + [
            transpose(s) for s in (Z, Q) if s.shape == (cols, rows)
        ]
        if found and self.pick.random() < 0.8:
            return self.pick.choice(found)
        if self.pick.random() < 0.7:  # a product that ends at a variable
            s = self.pick.choice((Z, Q))
            left, right = (super(Smooth, self).leaf(*shape) for shape in ((rows, s.rows), (s.cols, cols)))
            return matmul(left, s, right)
        return super().leaf(rows, cols)

    def expr(self, rows: sp.Expr, cols: sp.Expr, depth: int) -> Expr:
        if depth <= 0 or self.pick.random() < 0.7:
            return super().expr(rows, cols, depth)
        inner = lambda: self.expr(rows, cols, depth - 1)
        return self.pick.choice(
            (
                lambda: elementwise(self.pick.choice(SLOPED), inner()),
                lambda: elementwise(self.pick.choice(PAIRED), inner(), inner()),
                lambda: elementwise(self.pick.choice(PAIRED), self.scalar(depth - 1), inner()),
                lambda: elementwise(
                    slot(0) / sp.sqrt(1 + slot(1)), inner(), total(elementwise(slot(0) ** 2, inner()), 0)
                ),
                lambda: inverse(self.gram(rows, depth - 1)) if rows == cols else inner(),
            )
        )()

    def scalar(self, depth: int) -> Expr:
        if depth <= 0:
            return constant(self.coefficient())
        rows, cols = self.size(), self.size()
        x = lambda: self.expr(rows, cols, depth - 1)
        u = member(U, "k")
        return self.pick.choice(
            (
                lambda: total(elementwise(slot(0) ** 2, x())),
                lambda: total(elementwise(self.pick.choice(SLOPED), x())),
                lambda: total(elementwise(self.pick.choice(PAIRED), x(), x())),
                lambda: logsumexp(x()),
                lambda: total(logsumexp(x(), self.pick.randrange(2))),
                lambda: trace(self.product(rows, rows, depth - 1)),
                lambda: logdet(self.gram(rows, depth - 1)),
                lambda: spectral(self.pick.choice(SINGULAR), x()),
                lambda: elementwise(sp.sqrt(1 + slot(0)), total(elementwise(slot(0) ** 2, x()))),
                lambda: elementwise(slot(0) / (1 + slot(1) ** 2), self.scalar(depth - 1), self.scalar(depth - 1)),
                lambda: family_sum("k", K, logdet(self.gram_of(matmul(transpose(u), self.expr(M, T, depth - 1))))),
                lambda: family_sum("k", K, total(elementwise(self.pick.choice(SLOPED), matmul(u, self.expr(N, cols, depth - 1))))),
            )
        )()  # fmt: skip
