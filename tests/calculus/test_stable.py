"""Formulas of exponentials and logs at their extremes, in every way they are written, against mpmath with 1000 digits."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import mpmath
import pytest
import sympy as sp
import torch

import unroll
from unroll.calculus.stable import entr, logaddexp, sigmoid, softplus, stable, xlogy
from unroll.calculus.torch_text import decimal

WIDE = (-1e3, -88.0, -30.0, -1.3, 0.0, 0.4, 40.0, 1e3)
NARROW = tuple(max(min(z, 500.0), -500.0) for z in WIDE)
WRITTEN = [
    "log(sigmoid(z))", "log(1 - sigmoid(z))", "x*log(sigmoid(z)) + (1 - x)*log(1 - sigmoid(z))", "-log(1/(1 + exp(-z)))",
    "log(exp(z)/(1 + exp(z)))", "log(sigmoid(z)/(1 - sigmoid(z)))", "log(exp(z) + exp(-z))", "log(cosh(z))", "log(cosh(z) + 1)",
    "log(2 + exp(z))", "log(3 + 1/2*exp(2*z))", "log(a + b*exp(c*z))", "log(b*exp(z) + exp(-c*z) + a)", "log(1 + exp(z) + exp(2*z))",
    "log(exp(z) + exp(z/2))", "log((1 + exp(z))/2)", "log(1 + exp(z)**2)", "log(1 + x*exp(z))", "log(x*exp(z) + (1 - x)*exp(-z))",
    "log(1 + exp(z + x))", "log(3/10 + 7/10*sigmoid(z))", "log(1 + tanh(z))", "log(1 - tanh(z)**2)", "1/(1 + exp(-z))",
    "exp(z)/(1 + exp(z))", "exp(2*z)/(1 + exp(2*z))", "exp(-z)/(1 + exp(-z))**2", "exp(z/2)/(1 + exp(z))", "(1 + exp(z))/(2 + exp(z))",
    "(exp(z) - exp(-z))/(exp(z) + exp(-z))", "(1 - exp(-2*z))/(1 + exp(-2*z))", "2*sigmoid(2*z) - 1", "sigmoid(z)*(1 - sigmoid(z))",
    "z*sigmoid(z)", "softplus(z)**2", "1/cosh(z)", "1/(exp(z) + exp(-z))**2", "sqrt(sigmoid(z))", "exp(z - softplus(z))",
    "-sigmoid(z)*log(sigmoid(z))",
]  # fmt: skip
"""Logistic losses, cross entropies, sums of exponentials under a log, sigmoids and hyperbolic functions."""
NUMBERS, X = {"a": 3.0, "b": 0.5, "c": 2.0}, 0.25
EXACT: dict[str, Any] = {
    **{f: getattr(mpmath, f) for f in ("exp", "log", "tanh", "cosh", "cos", "sqrt")},
    "sigmoid": lambda u: 1 / (1 + mpmath.exp(-u)),
    "softplus": lambda u: mpmath.log1p(mpmath.exp(u)),
}


def reads_x(text: str) -> bool:
    return re.search(r"\bx\b", text) is not None


@cache
def loss(text: str, n: int = 8) -> unroll.Loss:
    used = {k: v for k, v in NUMBERS.items() if re.search(rf"\b{k}\b", text)}
    parts = {"inputs": {"x": ["n"]} if reads_x(text) else {}, "scalars": used}
    spec = {"dims": {"n": n}, "variables": {"z": ["n"]}, "minimize": {"f": text}}
    return unroll.loss(spec | {k: v for k, v in parts.items() if v})


@cache
def exactly(text: str, z: float) -> tuple[float, float]:
    """Value and slope."""
    with mpmath.workdps(1000):
        known = {**EXACT, **{k: mpmath.mpf(v) for k, v in NUMBERS.items()}, "x": mpmath.mpf(X)}
        f = lambda u: eval(
            text.replace("3/10", "mpf(3)/10").replace("7/10", "mpf(7)/10"), {**known, "mpf": mpmath.mpf}, {"z": u}
        )
        return float(f(mpmath.mpf(z))), float(mpmath.diff(f, mpmath.mpf(z), h=mpmath.mpf(10) ** -400))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("text", WRITTEN)
def test_values_and_slopes_are_finite_and_right_however_they_are_written(text: str, dtype: torch.dtype) -> None:
    net, zs = loss(f"sum({text})"), WIDE if dtype == torch.float64 else NARROW
    given = (torch.full((8,), X, dtype=dtype),) if reads_x(text) else ()
    z = torch.tensor(zs, dtype=dtype, requires_grad=True)
    (slopes,) = torch.autograd.grad(net(z, *given), z)
    for u, got in zip(zs, slopes.tolist(), strict=True):
        at = torch.full((8,), u, dtype=dtype)
        value, slope = exactly(text, float(at[0]))
        allowed = 1e3 * torch.finfo(dtype).eps
        assert abs(float(net(at, *given)) / 8 - value) <= allowed * (1 + abs(u) + abs(value)), u
        assert abs(got - slope) <= allowed * (1 + abs(u) + abs(slope)), u


@pytest.mark.parametrize("text", WRITTEN[:24:2])
def test_the_derived_slope_is_right_at_the_extremes_too(text: str) -> None:
    """Of the profile, differentiated by SymPy and written by the same rule."""
    z, x, *numbers = sp.symbols("z x a b c", real=True)
    names = {
        "z": z,
        "x": x,
        **{str(s): s for s in numbers},
        "sigmoid": lambda u: 1 / (1 + sp.exp(-u)),
        "softplus": lambda u: sp.log(1 + sp.exp(u)),
    }
    slope = stable(
        sp.diff(sp.sympify(text, locals=names), z).subs({str(k): sp.Rational(v) for k, v in NUMBERS.items()})
    )
    from unroll.lower.scalar_text import Text, formula

    at = torch.tensor(WIDE, dtype=torch.float64)
    code = formula(
        slope.subs(dict(zip(numbers, map(sp.Rational, NUMBERS.values()), strict=True))), {z: Text("z"), x: Text("x")}
    ).code
    got = eval(code, {"torch": torch, "F": torch.nn.functional, "math": math, "z": at, "x": torch.full_like(at, X)})
    for u, y in zip(WIDE, (got + 0 * at).tolist(), strict=True):
        want = exactly(text, u)[1]
        assert abs(y - want) <= 1e-12 * (1 + abs(u) + abs(want)), (u, code)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("log(sum(exp(z)))", lambda z, x: z.logsumexp(-1)),
        ("log(sum(x*exp(z)))", lambda z, x: (z + x.log()).logsumexp(-1)),
        ("log(1 + sum(exp(z)))", lambda z, x: torch.nn.functional.pad(z, (0, 1)).logsumexp(-1)),
        ("-dot(x, log(softmax(z, 0)))", lambda z, x: -(x * z.log_softmax(-1)).sum()),
        ("dot(x, exp(z)/sum(exp(z)))", lambda z, x: (x * z.softmax(-1)).sum()),
        ("kl(x, softmax(z, 0))", lambda z, x: (x * x.log() - x * z.log_softmax(-1) - x).sum() + 1),
        ("entropy(softmax(z, 0))", lambda z, x: -(z.softmax(-1) * z.log_softmax(-1)).sum()),
    ],
)
def test_sums_over_entries_do_not_overflow_either(text: str, right: Any) -> None:
    z, x = torch.tensor(WIDE, dtype=torch.float64), torch.linspace(0.1, 2, 8, dtype=torch.float64)
    net = loss(text)
    call = (lambda z: net(z, x)) if reads_x(text) else net
    torch.testing.assert_close(call(z), right(z, x))
    torch.testing.assert_close(torch.func.grad(call)(z), torch.func.grad(lambda z: right(z, x))(z))


# --- 0 log 0 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_divergence_from_zero_counts_is_what_is_predicted(dtype: torch.dtype) -> None:
    """kl(0, z) = z with slope 1, at z = 0 too."""
    z = torch.tensor([0.5, 0.0, 1.0, 3.0], dtype=dtype, requires_grad=True)
    x = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=dtype)
    value = loss("kl(x, z)", 4)(z, x)
    want = 0.5 + 2 * math.log(2 / 3) + 1
    assert abs(float(value.detach()) - want) < 10 * torch.finfo(dtype).eps
    (slope,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(slope, torch.tensor([1, 1, 0, 1 / 3], dtype=dtype))


def test_a_step_on_zero_counts_and_its_trace_are_finite() -> None:
    spec = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": {"f": "kl(x, z)"},
        "unroll": {"algorithm": "gradient_descent", "layers": 2, "step": 0.1},
    }  # fmt: skip
    net = unroll.compile(spec, dtype=torch.float64)
    x, z = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([0.5, 0.1, 4.0], dtype=torch.float64)
    torch.testing.assert_close(net(x, z=z, layers=1), torch.tensor([0.4, 0.0, 3.95], dtype=torch.float64))
    assert net(x, z=z).isfinite().all()  # the second step starts at 0 / 0
    assert abs(float(net.objective(x, z=z)["total"]) - (0.6 + 2 * math.log(0.5) + 2)) < 1e-12
    own = torch.func.jacrev(lambda x: net(x, z=z))(x)
    assert own.isfinite().all()


def test_entropy_at_zero_is_zero_and_its_slope_infinite() -> None:
    z = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    value = loss("entropy(z)", 3)(z)
    assert abs(float(value.detach()) - 0.5 * math.log(2)) < 1e-15
    (slope,) = torch.autograd.grad(value, z)
    assert slope[0] == math.inf
    torch.testing.assert_close(slope[1:], torch.tensor([-1, math.log(2) - 1], dtype=torch.float64))


def test_what_vanishes_times_a_log_has_the_log_for_its_slope() -> None:
    """d/dz z log y = log y at z = 0 too, and z / y = 0 in y; 0 log 0 has slope 0 in both."""
    spec = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"y": ["n"]}, "minimize": {"f": "sum(z * log(y))"}}
    z = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([3.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    in_z, in_y = torch.autograd.grad(unroll.loss(spec)(z, y), (z, y))
    torch.testing.assert_close(in_z, torch.tensor([math.log(3), 0, math.log(0.5)], dtype=torch.float64))
    torch.testing.assert_close(in_y, torch.tensor([0, 0, 4], dtype=torch.float64))


@pytest.mark.parametrize(
    "formula", ["z*log(-z)", "z*log(-2*z)", "z*log(z*x)", "z**2*log(-z**3)", "z*x*log(z*x)", "z*log(-z**2*x)"]
)
def test_a_log_is_split_where_its_factors_have_a_sign_only(formula: str) -> None:
    """log(a b) = log a + log b is false where both are negative: the formula as it is written, in numbers of Python."""
    spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["n"]},
        "minimize": {"f": f"sum({formula} + x)"},
    }
    net = unroll.loss(spec)
    z, x = torch.tensor([-0.5, -2.0, -3.0], dtype=torch.float64), torch.tensor([-1.0, -0.3, -5.0], dtype=torch.float64)
    want = eval(f"{formula} + x", {"log": torch.log, "z": z, "x": x}).sum()
    assert want.isfinite()
    torch.testing.assert_close(net(z, x), want)


@pytest.mark.parametrize("power", ["z*log(z)", "z**2*log(z)", "x*log(z)", "x**2*log(x/z)", "x*log(x/sigmoid(z))"])
def test_what_vanishes_times_a_log_is_zero(power: str) -> None:
    value = loss(f"sum({power})", 2)
    zero = torch.zeros(2, dtype=torch.float64)
    assert float(value(zero, zero) if reads_x(power) else value(zero)) == 0.0


@pytest.mark.parametrize(
    ("primitive", "value"),
    [
        (softplus(0) ** 2, math.log(2) ** 2),
        (sigmoid(-40), 1 / (1 + math.exp(40))),
        (logaddexp(3, 5), 5 + math.log1p(math.exp(-2))),
        (1 + xlogy(0, 0) + entr(0), 1.0),
        (entr(sp.Rational(1, 3)), math.log(3) / 3),
    ],
    ids=str,
)
def test_a_primitive_of_numbers_is_a_number_in_the_text(primitive: sp.Expr, value: float) -> None:
    assert float(decimal(primitive)) == pytest.approx(value, rel=1e-15)


ONE, TWO = sp.symbols("x y", positive=True)
MEANING = {
    sigmoid(ONE): 1 / (1 + sp.exp(-ONE)), softplus(ONE): sp.log(1 + sp.exp(ONE)), logaddexp(ONE, TWO): sp.log(sp.exp(ONE) + sp.exp(TWO)),
    xlogy(ONE, TWO): ONE * sp.log(TWO), entr(ONE): -ONE * sp.log(ONE),
}  # fmt: skip


@pytest.mark.parametrize("stated", MEANING, ids=str)
def test_slopes_of_stable_primitives_are_those_of_what_they_mean(stated: sp.Expr) -> None:
    """In each argument."""
    at = {ONE: sp.Rational(7, 10), TWO: sp.Rational(19, 10)}
    for s in sorted(stated.free_symbols, key=str):
        slope = sp.diff(stated, s).replace(sigmoid, lambda u: 1 / (1 + sp.exp(-u)))
        assert float(abs((slope - sp.diff(MEANING[stated], s)).subs(at).evalf())) < 1e-14


CANCELLING = [
    "log(cosh(z))", "log(cosh(c*z))", "sqrt(1 + z**2) - 1", "sqrt(a**2 + z**2) - a", "sqrt(a + z**2) - sqrt(a)", "cosh(z) - 1", "cosh(c*z) - 1",
    "1 - cos(z)", "1 - 1/sqrt(1 + z**2)", "1 - 1/(1 + z**2)", "1 - exp(-z**2/a)", "a*log(1 + z**2/a)", "log(1 + z**2)",
]  # fmt: skip
"""Losses that are 0 at 0, where they are least, as they are written."""
SMALL = (1e-6, -3e-5, 1e-3, -0.1)


@pytest.mark.parametrize("text", CANCELLING)
def test_what_cancels_near_zero_does_so_exactly(text: str) -> None:
    """Value and slope in float32, to a relative error, and those of the square of the value and of the root of the sum."""
    z = torch.tensor(SMALL, dtype=torch.float32)
    want = [exactly(text, u) for u in z.tolist()]
    value, slope = (torch.tensor([w[k] for w in want], dtype=torch.float64) for k in (0, 1))
    for form, f, df in (
        ("sum({})", value.sum(), slope),
        ("sum(({})**2)", (value**2).sum(), 2 * value * slope),
        ("sqrt(sum({}))", value.sum().sqrt(), slope / 2 / value.sum().sqrt()),
    ):
        net = loss(form.format(text), len(SMALL))
        got = net(at := z.clone().requires_grad_())
        (grad,) = torch.autograd.grad(got, at)
        torch.testing.assert_close(got.double(), f, rtol=2e-5, atol=0)
        torch.testing.assert_close(grad.double(), df, rtol=2e-5, atol=0)


@pytest.mark.parametrize("text", CANCELLING)
def test_the_root_of_a_loss_has_slope_zero_where_it_is_least(text: str) -> None:
    net, z = loss(f"sqrt(sum({text}))"), torch.zeros(8, requires_grad=True)
    value = net(z)
    (slope,) = torch.autograd.grad(value, z)
    assert value == 0
    assert torch.equal(slope, torch.zeros(8))


@pytest.mark.parametrize("text", ["log(cosh(z))", "cosh(z) - 1", "1 - exp(-z**2/a)", "sqrt(a**2 + z**2) - a"])
def test_forms_that_do_not_cancel_hold_far_away_too(text: str) -> None:
    for u in (-300.0, -20.0, 19.9, 20.1, 88.0):
        z = torch.full((8,), u, dtype=torch.float64, requires_grad=True)
        value = loss(f"sum({text})")(z)
        (slope,) = torch.autograd.grad(value, z)
        want, tilt = exactly(text, u)
        assert abs(float(value.detach()) / 8 - want) <= 1e-13 * abs(want)
        assert abs(float(slope[0]) - tilt) <= 1e-13 * (abs(tilt) + 1e-200), (u, float(slope[0]), tilt)


@pytest.mark.parametrize(("text", "sign"), [("sqrt(sumsq(z) - sumsq(x))", 1), ("sqrt(sumsq(x) - sumsq(z))", -1)])
def test_a_slope_without_bound_has_the_sign_of_the_slopes_nearby(text: str, sign: int) -> None:
    x = torch.linspace(1, 2, 8, dtype=torch.float64)
    for shift in (0.0, 1e-9 * sign):
        z = (x * (1 + shift)).requires_grad_()
        (slope,) = torch.autograd.grad(loss(text)(z, x), z)
        assert (slope.sign() == sign).all(), (shift, slope)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_the_derived_slope_of_the_entropy_of_shares_does_not_cancel(size: float) -> None:
    """-p (z - sum p z): what is the same for all entries is nothing to the shares."""
    spec: dict[str, Any] = {
        "dims": {"n": 6}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": "entropy(softmax(z, 0))",
        "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 1e12, "start": {"z": "x"}},
    }  # fmt: skip
    x = size * torch.linspace(-1, 2, 6, dtype=torch.float32)
    step = (x.double() - unroll.compile(spec)(x).double()) / 1e12
    u = x.double()
    p = u.softmax(-1)
    want = -p * (u - (p * u).sum())
    torch.testing.assert_close(step, want, rtol=0, atol=float(1e-5 * want.abs().max()))
