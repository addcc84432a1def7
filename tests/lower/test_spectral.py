"""Derivatives of functions of singular values: against finite differences where the map has a derivative, ties and zeros
included; finite and as documented where it has none; through torch.func, twice, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.emit.text import helper, imports, needed

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself


def emitted(*names: str) -> dict[str, Any]:
    """The helpers as a module would hold them."""
    text = "\n\n".join(map(helper, needed(names)))
    module: dict[str, Any] = {}
    exec(f"{imports(text)}\n\n{text}", module)
    return module


CALLS = emitted(
    "spectral_map",
    "project_psd",
    "project_stiefel",
    "project_rank_at_most",
    "spectral_sum",
    "spectral_norm",
    "prox_volume",
)


def soft(x: Tensor, theta: Any = 0.5) -> Tensor:
    return CALLS["spectral_map"](x, lambda s: torch.relu(s - theta), lambda s, t: t > 0)


def shrunk(x: Tensor) -> Tensor:
    return CALLS["spectral_map"](x, lambda s: s / (1 + s**2), lambda s, t: (1 - s**2) / (1 + s**2) ** 2)


def inverted(x: Tensor) -> Tensor:
    zero: Callable[[Tensor], Tensor] = lambda s: torch.where(s > 0, s, 1)
    return CALLS["spectral_map"](x, lambda s: torch.where(s > 0, 1 / zero(s), 0), lambda s, t: -(t**2))


def rank2(x: Tensor) -> Tensor:
    return CALLS["project_rank_at_most"](x, 2)


def volume(x: Tensor, t: Any = 0.5) -> Tensor:
    return CALLS["prox_volume"](x, t)


psd, polar = CALLS["project_psd"], CALLS["project_stiefel"]


def turned(rows: int, cols: int, *values: float) -> Tensor:
    """A matrix with these singular values, in a basis of its own."""
    g = torch.Generator().manual_seed(rows * cols)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=D)).Q for n in (rows, cols))
    s = torch.zeros(rows, cols, dtype=D)
    s.diagonal()[: len(values)] = torch.tensor(values, dtype=D)
    return u @ s @ v


def symmetric(*values: float) -> Tensor:
    q = torch.linalg.qr(turned(len(values), len(values), *range(1, len(values) + 1))).Q
    return q @ torch.diag(torch.tensor(values, dtype=D)) @ q.mT


WHERE_SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "distinct": (soft, turned(4, 4, 3, 2, 1, 0.1)),
    "tall": (soft, turned(5, 3, 3, 2, 0.2)),
    "wide": (shrunk, turned(3, 5, 3, 2, 0.2)),
    "zero": (soft, torch.zeros(4, 3, dtype=D)),
    "a multiple of I": (soft, 3 * torch.eye(4, dtype=D)),
    "ties above and below": (soft, turned(5, 5, 2, 2, 0.3, 0.3, 0)),
    "ties up to rounding": (soft, turned(4, 4, 2, 2 + 1e-15, 2 + 1e-13, 0)),
    "near ties": (shrunk, turned(4, 4, 2, 2 + 1e-8, 2 + 1e-6, 0)),
    "smooth, ties and zeros": (shrunk, turned(5, 4, 2, 2, 0, 0)),
    "smooth at 0": (shrunk, torch.zeros(3, 4, dtype=D)),
    "polar, all equal": (polar, turned(4, 4, 2, 2, 2, 2)),
    "polar, tall": (polar, turned(5, 3, 2, 2, 1)),
    "polar, one zero": (polar, turned(3, 3, 2, 1, 1e-3)),
    "low rank": (rank2, turned(4, 5, 3, 3, 1, 1)),
    "low rank, of lower rank": (rank2, turned(4, 5, 3, 3, 0)),
    "psd": (psd, symmetric(3, 3, -1, -1, 0.5)),
    "psd, indefinite": (psd, turned(4, 4, 3, 2, 1, 0.5)),
}  # fmt: skip


def quotient(f: Callable[[Tensor], Tensor], x: Tensor, way: Tensor, h: float = 1e-5) -> Tensor:
    return (f(x + h * way) - f(x - h * way)) / (2 * h)


@pytest.mark.parametrize("name", WHERE_SMOOTH)
def test_the_derivative_is_that_of_differences(name: str) -> None:
    f, x = WHERE_SMOOTH[name]
    if name == "low rank, of lower rank":  # only along what keeps the rank
        ways = [x @ turned(5, 5, 1, 2, 3, 1, 2), turned(4, 4, 1, 2, 3, 1) @ x]
    else:
        g = torch.Generator().manual_seed(1)
        ways = [torch.randn(x.shape, generator=g, dtype=D) for _ in range(3)]
    h = 1e-7 if name == "near ties" else 1e-5
    if name == "polar, one zero":
        h = 1e-8
    for way in ways:
        want = quotient(f, x, way, h)
        got = torch.func.jvp(f, (x,), (way,))[1]
        assert torch.allclose(got, want, atol=1e-6 * max(1, float(want.abs().max()))), "forward"
        back = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=D)
        slope = torch.func.vjp(f, x)[1](back)[0]
        assert float((slope * way).sum()) == pytest.approx(float((back * got).sum()), rel=1e-8, abs=1e-9), "backward"


AT_KINKS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "a singular value at the threshold": (soft, turned(3, 3, 1, 0.5, 0.1)),
    "all at the threshold": (soft, 0.5 * torch.eye(3, dtype=D)),
    "polar of 0": (polar, torch.zeros(3, 3, dtype=D)),
    "polar of low rank": (polar, turned(4, 3, 2)),
    "low rank, the cut tied": (rank2, turned(4, 4, 2, 1, 1, 1)),
    "low rank of I": (rank2, torch.eye(3, dtype=D)),
    "psd of 0": (psd, torch.zeros(3, 3, dtype=D)),
    "pseudo-inverse of 0": (inverted, torch.zeros(3, 4, dtype=D)),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_KINKS)
def test_where_there_is_no_derivative_the_slope_is_finite_and_not_large(name: str) -> None:
    f, x = AT_KINKS[name]
    x = x.clone().requires_grad_()
    slope = torch.autograd.grad(f(x).sum(), x)[0]
    assert slope.isfinite().all()
    assert float(slope.abs().max()) < 10 * (1 + x.numel())


def test_what_is_not_determined_has_slope_zero() -> None:
    for f in (polar, psd, soft):
        x = torch.zeros(3, 3, dtype=D, requires_grad=True)
        assert (torch.autograd.grad(f(x).sum(), x)[0] == 0).all()


def test_the_derivative_in_what_the_profile_holds() -> None:
    theta = torch.tensor(0.5, dtype=D, requires_grad=True)
    for x in (torch.zeros(3, 3, dtype=D), 3 * torch.eye(3, dtype=D), turned(4, 3, 2, 2, 0.1)):
        found = torch.autograd.grad(soft(x, theta).square().sum(), theta)[0]
        want = quotient(lambda t, x=x: soft(x, t).square().sum(), theta.detach(), torch.ones((), dtype=D))
        assert torch.allclose(found, want, atol=1e-8)


@pytest.mark.parametrize("x", [symmetric(3, -1, 2), torch.zeros(3, 3, dtype=D), -2 * torch.eye(3, dtype=D)])
def test_the_prox_of_a_log_determinant_and_its_derivatives_at_ties_too(x: Tensor) -> None:
    t = torch.tensor(0.5, dtype=D)
    z = volume(x, t)
    assert torch.allclose(z - t * torch.linalg.inv(z), (x + x.T) / 2, atol=1e-12)
    assert torch.autograd.gradcheck(
        volume, (x.clone().requires_grad_(), t.clone().requires_grad_()), check_forward_ad=True
    )
    assert volume(x, torch.zeros((), dtype=D)).isfinite().all() and volume(1e6 * x.float()).isfinite().all()


@pytest.mark.parametrize(
    ("f", "x"),
    [(shrunk, turned(3, 2, 3, 1)), (soft, turned(2, 3, 3, 0.2)), (polar, turned(3, 3, 3, 2, 1)), (psd, symmetric(3, -1, 2)), (volume, symmetric(3, -1, 2)), (rank2, turned(3, 3, 3, 2, 1))],
)  # fmt: skip
def test_second_derivatives_where_singular_values_differ(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(f, x, atol=1e-6)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=D)
    value = lambda x: (weight * f(x)).sum()
    both = torch.func.hessian(value)(x), torch.func.jacrev(torch.func.jacrev(value))(x)
    assert torch.allclose(*both, atol=1e-9)


@pytest.mark.parametrize("f", [soft, polar, psd])
def test_a_batch_is_its_members_compiled_and_mapped_too(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.stack([torch.zeros(3, 3, dtype=D), torch.eye(3, dtype=D), turned(3, 3, 3, 2, 1)])
    slope = lambda f, x: torch.autograd.grad(f(x).square().sum(), x)[0]
    want = torch.stack([slope(f, m.clone().requires_grad_()) for m in x])
    assert torch.allclose(slope(f, x.clone().requires_grad_()), want, atol=1e-12)
    assert torch.allclose(torch.func.vmap(torch.func.grad(lambda m: f(m).square().sum()))(x), want, atol=1e-12)
    if f is psd:
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.allclose(slope(compiled, x.clone().requires_grad_()), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_low_precision_ties_are_ties_up_to_its_rounding(dtype: torch.dtype) -> None:
    q = turned(6, 6, *[1] * 6)
    for scale in (1e-3, 1.0, 1e3) if dtype == torch.float32 else (1.0, 16.0):
        x = (scale * q).to(dtype).requires_grad_()
        back = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=D)
        found = torch.autograd.grad((soft(x, scale / 2).double() * back).sum(), x)[0]
        want = torch.func.vjp(lambda m, scale=scale: soft(m, scale / 2), scale * q)[1](back)[0]
        assert torch.allclose(found.double(), want, atol=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("name", "h"), [("nuclear", lambda s: s), ("root", torch.sqrt), ("log", lambda s: torch.log(1 + s))]
)
def test_sums_over_singular_values_have_slope_zero_at_those_that_are_zero(name: str, h: Any) -> None:
    for x in (torch.zeros(3, 4, dtype=D), turned(3, 4, 2, 2), turned(4, 3, 3, 2, 1)):
        x = x.clone().requires_grad_()
        slope = torch.autograd.grad(CALLS["spectral_sum"](x, h), x)[0]
        u, s, v = torch.linalg.svd(x.detach(), full_matrices=False)
        kept = s > 1e-10
        rate = {"nuclear": torch.ones_like(s), "root": 0.5 / s.sqrt(), "log": 1 / (1 + s)}[name]
        assert torch.allclose(slope, u @ torch.diag(torch.where(kept, rate, 0)) @ v, atol=1e-9)


def test_a_transposed_map_is_the_map_of_the_transposed() -> None:
    spec = {
        "dims": {"a": 3, "b": 4},
        "variables": {"X": ["a", "b"]},
        "minimize": {"f": "sum(spectral_map(s**3, X).T @ X)"},
    }
    x = turned(4, 3, 3, 2, 1)
    cubed = x @ x.mT @ x
    assert torch.allclose(unroll.loss(spec)(x), (x.mT @ cubed).mT.sum()) or torch.allclose(
        unroll.loss(spec)(x), (cubed @ x.mT).sum()
    )
