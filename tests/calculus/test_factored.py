"""Factoring with exponentials: equal to what was given, in few factors, whatever decimals the rates were written with."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from unroll.calculus.factored import factored
from unroll.calculus.prox_scalar import derive_prox

u = sp.Symbol("u", real=True)


@pytest.mark.parametrize(
    ("written", "factors"),
    [
        ("exp(2*u) + 2*exp(u) + 1", {"(exp(u) + 1)**2"}),
        ("exp(3*u/2) - exp(u/2)", {"exp(u/2)", "exp(u/2) - 1", "exp(u/2) + 1"}),
        ("exp(77*u/20) + 1", {"exp(77*u/20) + 1"}),  # no 77th power of exp(u/20)
        ("u*exp(77*u/20) + u*exp(u/3)", {"u", "exp(77*u/20) + exp(u/3)"}),
        ("u**2*exp(-u**2) - exp(-2*u**2)", {"exp(-2*u**2)", "u**2*exp(u**2) - 1"}),
        ("exp(u)*exp(22500000000000003/25000000000000000) + exp(u)", {"exp(u)", "1 + exp(22500000000000003/25000000000000000)"}),
    ],
)  # fmt: skip
def test_factors_are_those_of_the_rates_that_are_there(written: str, factors: set[str]) -> None:
    e = sp.sympify(written, {"u": u})
    found = factored(e)
    assert {str(f) for f in sp.Mul.make_args(found)} == factors
    assert all(abs(complex((found - e).subs(u, x).evalf())) < 1e-12 for x in (-1.3, 0.2, 0.9))


@pytest.mark.parametrize("rate", [3.85, 0.30000000000000004, 3**0.5])
def test_a_softplus_has_its_prox_whatever_its_rate_is(rate: float) -> None:
    k = sp.Rational(repr(rate))
    prox = derive_prox(sp.log(1 + sp.exp(k * u - sp.Rational("0.9000000000000001"))), u)
    v = torch.linspace(-4, 4, 41, dtype=torch.float64)
    z = prox(v, 0.7)
    torch.testing.assert_close(z + 0.7 * rate * torch.sigmoid(rate * z - 0.9), v, rtol=1e-12, atol=1e-12)
