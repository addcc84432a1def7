"""LISTA as a program written by hand: what emission and networks are tried on."""

from __future__ import annotations

import sympy as sp

from unroll.calculus.prox_scalar import derive_prox
from unroll.derivation.step import Assign, Learned, State, Step
from unroll.emit import program as programs
from unroll.language.constructors import (
    add,
    elementwise,
    eye,
    matmul,
    prox_map,
    scale,
    spectral_norm,
    symbol,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import scalar, slot
from unroll.language.problem import Problem

ETA, THETA = scalar("eta", True), scalar("theta", True)
U = sp.Symbol("u", real=True)
SOFT = derive_prox(sp.Abs(U), U)
SOFT = SOFT.substitute({SOFT.t: THETA})


def lista(n_layers: int = 4, dims: dict[str, int] | None = None, **names: str) -> programs.Program:
    """LISTA, as the compiler would hand it over. names: other words for A, x, z, lam, W1."""
    m, n = sp.Symbol("m", integer=True, positive=True), sp.Symbol("n", integer=True, positive=True)
    word = {"A": "A", "x": "x", "z": "z", "lam": "lam", "W1": "W1", **names}
    a, x, z = symbol(word["A"], m, n), symbol(word["x"], m, 1, "input"), symbol(word["z"], n, 1, "variable")
    lam, w1, w2 = scalar(word["lam"], True), symbol(word["W1"], n, m, "learned"), symbol("W2", n, n, "learned")
    fidelity = scale(sp.Rational(1, 2), total(elementwise(slot(0) ** 2, add(x, scale(-1, matmul(a, z))))))
    terms = {"fidelity": fidelity, "sparsity": scale(lam, total(elementwise(sp.Abs(slot(0)), z)))}
    p = Problem("lasso", "", (z,), (x,), (a,), {lam: sp.Rational(1, 10)}, {m: None, n: None}, terms)
    step = Step(
        "proximal_gradient",
        (Assign(ETA, elementwise(1 / slot(0) ** 2, spectral_norm(a)), "1/L"),), (State(z, zeros(n)),),
        (Assign(z, prox_map(SOFT, (), add(matmul(w2, z), matmul(w1, x))), "prox"),), (z,),
        (
            Learned(word["W1"], w1, scale(ETA, transpose(a)), (n, m), False),
            Learned("W2", w2, add(eye(n), scale(-ETA, matmul(transpose(a), a))), (n, n), True),
            Learned("theta", THETA, ETA * lam, (n,), True, "positive"),
        ),
    )  # fmt: skip
    return programs.build(
        p, step, layers=n_layers, dims=dims or {"m": 6, "n": 9}, name="lista", origin="specs/lista.yaml", sha="0" * 64
    )
