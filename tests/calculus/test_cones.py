"""What a form shows of its sign: never more than values show, and as much as the networks need."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from torch import Tensor

import unroll
from unroll.calculus.cones import definite, is_hermitian, nonnegative
from unroll.calculus.gradient import gradient
from unroll.language.constructors import largest, scale
from unroll.language.nodes import Expr, Map, Sym, scalar, walk
from unroll.language.parse import Scope, parse_matrix
from unroll.network.evaluate import evaluate

N, M = (sp.Symbol(n, integer=True, positive=True) for n in "nm")
SIZES = {N: 4, M: 3}
SYMBOLS = (
    Sym("A", N, M, 2), Sym("B", N, M, 2), Sym("S", N, N, 2, props=frozenset({"symmetric"})),
    Sym("p", M, sp.Integer(1), 1, props=frozenset({"positive"})), Sym("v", M, sp.Integer(1), 1),
)  # fmt: skip


def parsed(formula: str) -> Expr:
    names = {"n": N, "m": M, "lam": scalar("lam", positive=True), "mu": scalar("mu")}
    return parse_matrix(formula, Scope({**names, **{s.name: s for s in SYMBOLS}}))


def values(seed: int) -> dict[Sym, Tensor]:
    g = torch.Generator().manual_seed(seed)
    out: dict[Sym, Tensor] = {}
    for s in SYMBOLS:
        x = torch.randn(int(s.nrows.subs(SIZES)), int(s.ncols.subs(SIZES)), generator=g, dtype=torch.float64)
        zero = torch.arange(len(x))[:, None] == 0  # what is declared positive may be 0
        out[s] = (
            x.abs().masked_fill(zero, 0) if "positive" in s.props else (x + x.mT) / 2 if "symmetric" in s.props else x
        )
    return out


GRADES = {
    "I(n)": 2, "I(n) + A @ A.T": 2, "2*I(n) + lam*A @ A.T": 2, "inv(I(n) + A @ A.T)": 2, "I(n) + inv(I(n) + A @ A.T)": 2,
    "I(n) + A @ diag(p) @ A.T": 2, "I(n) + A @ diag(p) @ A.T / sum(p)": 2, "I(n) + lam/sum(p) * A @ diag(p) @ A.T": 2,
    "I(n) + A @ diag(v**2) @ A.T": 2, "diag(exp(v))": 2, "A @ inv(I(m) + A.T @ A) @ A.T": 1, "A @ A.T": 1, "A @ diag(p) @ A.T": 1, "diag(p)": 1,
    "A @ diag(abs(v)) @ A.T + B @ B.T": 1,
    "A @ diag(v) @ A.T": 0, "I(n) + A @ diag(v) @ A.T": 0, "I(n) - A @ A.T": 0, "I(n) + mu*A @ A.T": 0, "S": 0, "I(n) + S": 0,
    "I(n) + A @ A.T / sum(v)": 0, "A @ B.T + B @ A.T": 0, "I(n) + A @ A.T / sum(A)": 0, "diag(p - 1)": 0,
}  # fmt: skip


@pytest.mark.parametrize(("formula", "grade"), GRADES.items(), ids=GRADES)
def test_positive_definite_is_what_the_eigenvalues_say(formula: str, grade: int) -> None:
    e = parsed(formula)
    assert is_hermitian(e)
    assert definite(e) == grade
    least = [
        float(
            torch.linalg.eigvalsh(evaluate(e, values(seed), {**SIZES, scalar("lam", True): 0.7, scalar("mu"): -2.0}))[0]
        )
        for seed in range(20)
    ]
    assert min(least) > {2: 0.0, 1: -1e-12, 0: -torch.inf}[grade]
    assert grade or min(least) < -1e-3, "this one is definite too: it should be known"


SIGNS = {
    "p": True, "A**2": True, "exp(v)": True, "diag(p) @ abs(A.T)": True, "sum(p) * softmax(v, axis=0)": True, "p/(1 + p)": True,
    "where(p <= 1, p, 1)": True, "where(p <= 0, -1, 1)": False, "2*sign(p) - 1": False, "sign(p)": True,
    "v": False, "difference(p)": False, "difference_T(p)": False, "repeat(p, 2)": True, "p - 1": False, "A.T @ A @ p": False, "mu*p": False, "log(1 + p) * v": False,
}  # fmt: skip


@pytest.mark.parametrize(("formula", "sign"), SIGNS.items(), ids=SIGNS)
def test_no_negative_entry(formula: str, sign: bool) -> None:
    e = parsed(formula)
    assert nonnegative(e) is sign
    given = {**SIZES, scalar("lam", True): 0.7, scalar("mu"): -2.0}
    assert all(bool((evaluate(e, values(seed), given) >= 0).all()) for seed in range(20)) is sign


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_inverse_of_something_definite_is_taken_by_its_factor(dtype: torch.dtype) -> None:
    """Values and gradients against torch.linalg.inv; something indefinite keeps the general inverse."""
    spec = {
        "objective": "o", "dims": {"d": 5, "n": 7}, "variables": {"z": ["d"]}, "parameters": {"A": ["d", "n"]}, "inputs": {"w": {"shape": ["n"], "positive": True}, "x": ["d"]},
        "minimize": {"f": "1/2*sumsq(z - x) + sum(inv(I(d) + A @ diag(w) @ A.T) * (A @ A.T))"},
        "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1},
    }  # fmt: skip
    net = unroll.compile(spec, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    A, w, x, z = (torch.rand(n, generator=g, dtype=dtype) for n in ((5, 7), (3, 7), (3, 5), (3, 5)))
    net = unroll.compile(spec, dtype=dtype, parameters={"A": A})
    w.requires_grad_()
    found = net.objective(w=w, x=x, z=z)["f"]
    want = 0.5 * (z - x).square().sum(-1) + (
        torch.linalg.inv(torch.eye(5, dtype=dtype) + A @ (w[..., None] * A.mT)) * (A @ A.mT)
    ).sum((-2, -1))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert torch.allclose(found, want, rtol=tolerance)
    ours, theirs = (torch.autograd.grad(y.sum(), w, retain_graph=True)[0] for y in (found, want))
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert "cholesky_inverse" in net.program.objective_source
    spec["inputs"]["w"]["positive"] = False
    assert "cholesky" not in unroll.compile(spec).program.objective_source


SIGNED = (
    "huber(norm2(v), 1)", "huber(norm_fro(A), 1)", "sum(huber(exp(v), 1))", "sum(abs(exp(v) + p))", "huber(sumsq(v), 2)",
    "sum(huber(v, 1))", "sum(abs(v + p))", "sum(abs(exp(v) - p))", "huber(sum(v), 1)",
)  # fmt: skip


@pytest.mark.parametrize("formula", SIGNED)
def test_a_gradient_knows_what_is_not_negative_and_stays_real(formula: str) -> None:
    """Against autograd; a length is not a complex number, of which |.| would have an angle."""
    e = parsed(formula)
    (x, *_) = sorted((s for s in e.symbols if "positive" not in s.props), key=lambda s: s.name)
    slope = gradient(e, x)
    assert not any(m.profile.has(sp.atan2, sp.arg, sp.re, sp.im) for m in walk(slope) if isinstance(m, Map))
    for seed in range(5):
        given = values(seed)
        at = given[x].requires_grad_()
        (want,) = torch.autograd.grad(evaluate(e, given, SIZES).sum(), at)
        assert (evaluate(slope, {**given, x: at.detach()}, SIZES) - want).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("formula", "known"), [("v**2", True), ("exp(v)", True), ("p + exp(v)", True), ("v", False), ("p - exp(v)", False)]
)
def test_the_smallest_of_what_is_not_negative_is_not_negative(formula: str, known: bool) -> None:
    smallest = scale(-1, largest(scale(-1, parsed(formula))))
    assert nonnegative(smallest) is known
