"""Gradients against torch.autograd in float64: random expressions, the library, families; refusals where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy as sp
import torch
from conftest import LAW
from library_objectives import NAMES, drawn
from random_expressions import DIMS, LAM, A, K, M, N, Q, Smooth, T, U, Y, Z, values
from torch import Tensor

from unroll.calculus.gradient import derivative, gradient, jumps
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    elementwise,
    eye,
    family_sum,
    hold,
    indicator,
    inverse,
    logdet,
    matmul,
    member,
    operator,
    rename_index,
    scale,
    symbol,
    total,
    trace,
    transpose,
)
from unroll.language.functions import BY_NAME
from unroll.language.nodes import Expr, Sym, free_indices, slot
from unroll.language.traversal import substitute
from unroll.network.evaluate import evaluate

SIZES = {"m": 4, "n": 3, "T": 2, "K": 2}
SCALARS: dict[sp.Symbol, Any] = {LAM: 0.3} | {d: SIZES[d.name] for d in DIMS}
BLOCKS, EACH = 12, 60
TOLERANCE = 1e-9


def by_autograd(e: Expr, wrt: Sym, given: dict[Sym, Tensor], scalars: dict[sp.Symbol, Any]) -> Tensor:
    x = given[wrt].clone().requires_grad_()
    value = evaluate(e, {**given, wrt: x}, scalars)
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value.sum(), x, materialize_grads=True)[0]


def error(e: Expr, wrt: Sym, given: dict[Sym, Tensor], scalars: dict[sp.Symbol, Any]) -> float:
    """Relative distance of the derived gradient from that of autograd."""
    want = by_autograd(e, wrt, given, scalars)
    return float((evaluate(gradient(e, wrt), given, scalars) - want).norm() / want.norm().clamp_min(1e-3))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_random_gradient_is_that_of_autograd(block: int, record_property: Callable[[str, object], None]) -> None:
    worst, count = 0.0, 0
    for i in range(EACH):
        seed = block * 10_000 + i
        draws, wrt = Smooth(seed), (Z, Q)[i % 2]
        e = add(draws.scalar(3 if i % 16 == 0 else 2), draws.scalar(1))
        if wrt not in e.symbols:
            e = add(e, total(elementwise(slot(0) * slot(1), draws.expr(*wrt.shape, 1), wrt)))
        try:
            found = error(e, wrt, values(SIZES, (), seed), SCALARS)
        except DeriveError as at_jump:
            assert "jumps" in at_jump.message
            continue
        assert found < TOLERANCE, f"seed {seed}, {wrt.name}: error {found:.1e} in {e}"
        worst, count = max(worst, found), count + 1
    assert count >= 0.9 * EACH
    record_property(LAW, (count, worst))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_every_smooth_library_term_is_that_of_autograd(name: str) -> None:
    problem, given, scalars = drawn(name)
    given = {s: v.abs() if "positive" in s.props else v for s, v in given.items()}
    smooth = 0
    for z in problem.variables:
        for e in problem.costs.values():
            try:
                found = error(e, z, given, scalars)
            except DeriveError as refused:
                assert refused.code == "E301"
                continue
            smooth += 1
            assert found < TOLERANCE
    assert smooth >= 1


# --- families ---------------------------------------------------------------------------------------------------------

u, other = member(U, "k"), member(U, "j")
x_MT = symbol("X", M, T, "input")


def _rate(index: str) -> Expr:
    y = matmul(transpose(member(U, index)), x_MT)
    return family_sum(index, K, logdet(add(eye(N), scale(LAM, matmul(y, transpose(y))))))


FAMILIES: dict[str, Expr] = {
    "coding rate": _rate("k"),
    "two names of the index": add(_rate("k"), family_sum("j", K, total(elementwise(sp.tanh(slot(0)), matmul(other, Z))))),
    "a product of sums": elementwise(slot(0) * slot(1), _rate("k"), family_sum("k", K, trace(matmul(transpose(u), u)))),
    "a sum within a sum": family_sum("k", K, total(elementwise(slot(0) ** 2, matmul(transpose(u), family_sum("j", K, matmul(other, Z)))))),
    "the same index within": family_sum("k", K, total(elementwise(slot(0) ** 2, matmul(transpose(u), family_sum("k", K, matmul(u, Z)))))),
    "a member twice": family_sum("k", K, total(elementwise(sp.exp(-slot(0) ** 2), matmul(u, transpose(u), A)))),
    "an inverse": family_sum("k", K, trace(inverse(add(eye(N), scale(LAM, matmul(transpose(u), u)))))),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_a_family_is_that_of_each_member(name: str) -> None:
    """The derived formula is free in the index of the member: put each k in, compare with autograd over the whole family."""
    e, given = FAMILIES[name], values(SIZES, (), 1)
    want = by_autograd(e, U, given, SCALARS)
    slope = gradient(e, U)
    (index,) = free_indices(slope)
    for k in range(SIZES["K"]):
        fixed = symbol("U_now", *U.shape)
        now = substitute(rename_index(slope, index, "free"), {member(U, "free"): fixed})
        found = evaluate(now, {**given, fixed: given[U][k]}, SCALARS)
        assert (found - want[k]).norm() <= TOLERANCE * want[k].norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_variables_inside_families_get_the_sum_over_members(name: str) -> None:
    e, given = add(FAMILIES[name], trace(matmul(transpose(Z), Z))), values(SIZES, (), 2)
    assert error(e, Z, given, SCALARS) < TOLERANCE


# --- refusals ---------------------------------------------------------------------------------------------------------

KINKS: dict[str, Expr] = {
    "norm_inf": BY_NAME["norm_inf"].build(Z),  # type: ignore[dict-item]
    "max_entry": BY_NAME["max_entry"].build(Z),  # type: ignore[dict-item]
    "norm0": BY_NAME["norm0"].build(Z),  # type: ignore[dict-item]
    "rank": BY_NAME["rank"].build(Z),  # type: ignore[dict-item]
    "spectral": BY_NAME["spectral"].build(Z),  # type: ignore[dict-item]
    "nuclear": BY_NAME["nuclear"].build(Z),  # type: ignore[dict-item]
    "sign": total(elementwise(sp.sign(slot(0)), Z)),
    "a constraint": indicator("nonneg", Z),
    "inside a sum": add(trace(matmul(transpose(Z), Z)), BY_NAME["norm_inf"].build(matmul(A, Z))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", KINKS)
def test_what_has_no_gradient_is_refused(name: str) -> None:
    with pytest.raises(DeriveError) as refused:
        gradient(KINKS[name], Z)
    assert refused.value.code == "E301"


def test_a_matrix_has_no_gradient() -> None:
    with pytest.raises(DeriveError) as refused:
        gradient(Z, Z)
    assert refused.value.code == "E133"


def test_what_is_held_is_a_constant() -> None:
    assert gradient(trace(matmul(transpose(hold(Z)), Z)), Z) is hold(Z)


def test_the_adjoint_of_differences_is_their_transpose() -> None:
    e = total(elementwise(slot(0) ** 2, operator("difference", Q)))
    assert error(e, Q, values(SIZES, (), 0), SCALARS) < 1e-14


# --- the test can fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["sign", "factor", "transpose"])
def test_a_wrong_gradient_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: dict[str, Callable[[Expr], Expr]] = {
        "sign": lambda g: scale(-1, g),
        "factor": lambda g: scale(sp.Rational(999_999, 1_000_000), g),
        "transpose": lambda g: elementwise(slot(0) * slot(1), g, elementwise(1 + slot(0) / 10**6, g)),
    }
    e, given = trace(matmul(transpose(matmul(A, Q)), add(Y, scale(-1, matmul(A, Q))))), values(SIZES, (), 3)
    assert error(e, Q, given, SCALARS) < TOLERANCE
    monkeypatch.setitem(globals(), "gradient", lambda e, wrt: faults[fault](gradient_of(e, wrt)))
    assert error(e, Q, given, SCALARS) > 100 * TOLERANCE


gradient_of = gradient


s, other, rate = slot(0), slot(1), sp.Symbol("lam", positive=True)


@pytest.mark.parametrize(
    ("profile", "steps"),
    [
        (sp.Piecewise((1, s > 0), (0, True)), True),
        (sp.Piecewise((s**2 / 2, abs(s) <= 1), (abs(s), True)), True),
        (sp.Piecewise((rate * abs(s), abs(s) <= rate), (2 * rate**2, True)), True),
        (sp.Piecewise((s, s < other), (other + 1, True)), True),
        (sp.Piecewise((1, s > 0), (0, True)) * s**2, False),
        (sp.Piecewise((s**2 / 2, abs(s) <= 1), (abs(s) - sp.Rational(1, 2), True)), False),
        (sp.Piecewise((rate * abs(s), abs(s) <= rate), (rate**2, True)), False),
        (sp.Piecewise((s, s < other), (other, True)), False),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_between_cases_is_seen(profile: sp.Expr, steps: bool):
    """Its slope is 0 on either side: descent along it would be silently along nothing."""
    assert jumps(profile, s) == steps


@pytest.mark.parametrize(
    ("profile", "border"),
    [(sp.Max(0, slot(0)), 0.0), (sp.Min(1, slot(0)), 1.0), (sp.Max(1, sp.Abs(slot(0))), 1.0), (sp.Abs(slot(0)), 0.0)],
)
def test_what_is_cut_off_has_slope_0_at_its_border(profile: sp.Expr, border: float) -> None:
    """As relu has it in torch."""
    assert derivative(profile, slot(0)).subs(slot(0), border) == 0
    assert derivative(profile, slot(0)).subs(slot(0), border + (-0.5 if profile.has(sp.Min) else 0.5)) == 1
