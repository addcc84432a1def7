"""Divergences by probes: against closed forms, against products with the Jacobian, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

D = torch.float64
FIT, NORM1, SIGNED = "1/2*sumsq(x - A @ z)", "0.1*norm1(z)", "0.3*norm1(Q @ z)"


def network(divergence: str | None, term: str = NORM1, dtype: torch.dtype = D, y: str = "prox(step * g, s)") -> Any:
    """One layer: y, the proximal gradient step, times its divergence in s, or y alone."""
    updates = {"s": "z - step * grad(f, z)", "y": y}
    updates |= {"z": "y"} if divergence is None else {"d": divergence, "z": "d * y"}
    text = {
        "algorithm": "own", "solves": "f(z) + g(z)", "scalars": {"step": "1 / L(f)"},
        "states": {"s": "z"}, "updates": updates,
    }  # fmt: skip
    spec = {
        "dims": {"m": 6, "n": 6}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]},
        "parameters": {"A": ["m", "n"], **({"Q": {"shape": ["n", "n"], "orthonormal": True}} if "Q" in term else {})},
        "minimize": {"fit": FIT, "term": term}, "algorithms": {"own": text}, "unroll": {"algorithm": "own", "layers": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    given = {"A": torch.randn(6, 6, dtype=dtype)}
    if "Q" in term:
        given["Q"] = torch.linalg.qr(torch.randn(6, 6, dtype=dtype)).Q
    return unroll.compile(spec, parameters=given, dtype=dtype)


def samples(dtype: torch.dtype = D) -> Tensor:
    """A blank one among others."""
    torch.manual_seed(1)
    x = torch.randn(4, 6, dtype=dtype)
    x[1] = 0
    return x


@pytest.mark.parametrize(("dtype", "unit"), [(D, 1.0), (torch.float32, 1e-6), (torch.float32, 1e6)])
def test_one_probe_is_exact_where_each_entry_reads_itself(dtype: torch.dtype, unit: float) -> None:
    x, term = samples(dtype) * unit, f"{0.1 * unit}*norm1(z)"
    close: Any = {"rtol": 1e-9, "atol": 1e-12} if dtype == D else {"rtol": 1e-3, "atol": 0.0}
    wanted = network("div(y, s)", term, dtype)(x)
    torch.testing.assert_close(network("div(y, s, probes=1)", term, dtype)(x), wanted, **close)
    assert wanted.abs().max() > unit


def test_what_is_held_does_not_move_with_the_probe() -> None:
    x, y = samples(), "prox(step * g, hold(s) * s)"
    wanted = network("div(y, s)", y=y)(x)
    torch.testing.assert_close(network("div(y, s, probes=1)", y=y)(x), wanted, rtol=1e-9, atol=1e-12)
    assert wanted.abs().max() > 1e-3


def drawn(net: unroll.Network, probes: int) -> Tensor:
    """The random signs that the module holds."""
    found = [b for name, b in net.named_buffers() if name.startswith("signs")]
    assert len(found) == probes and all((b.abs() == 1).all() for b in found)
    return torch.stack(found)


@pytest.mark.parametrize("term", ["0.5*norm2(z)", SIGNED, "0.3*tv(z)", "0.3*norm_inf(z)"])
def test_a_probe_is_a_product_with_the_jacobian(term: str) -> None:
    """b' J b, by automatic differentiation of the emitted step; s is a linear map of x, so that of x is asked for."""
    x, net, plain = samples(), network("div(y, s, probes=3, seed=5)", term), network(None, term)
    a = net.given["A"]
    back = a.T / torch.linalg.matrix_norm(a, 2) ** 2  # s = step A' x at z = 0
    signs = drawn(net, 3)
    for one, y, out in zip(x, plain(x), net(x), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: plain(v[None])[0], one) @ torch.linalg.inv(back)
        d = torch.einsum("ki,ij,kj->k", signs, jacobian, signs).mean()
        torch.testing.assert_close(out, d * y, rtol=1e-4, atol=1e-7)


def test_the_mean_of_probes_is_the_divergence_within_the_variance_that_is_stated() -> None:
    x, term, probes = samples()[:1], "0.5*norm2(z)", 5
    one, plain = network("div(y, s)", term), network(None, term)(x)
    size = plain.square().sum()
    wanted, found = (
        float((net(x) * plain).sum() / size) for net in (one, network(f"div(y, s, probes={probes})", term))
    )
    step = 1 / torch.linalg.matrix_norm(one.given["A"], 2) ** 2
    shrink = lambda v: v * (1 - 0.5 * step / v.norm()).clamp_min(0)
    jacobian = torch.autograd.functional.jacobian(shrink, (step * x @ one.given["A"])[0])
    error = float((2 * (jacobian - jacobian.diag().diag()).square().sum() / probes) ** 0.5)
    assert 0 < abs(wanted - found) < 4 * error < 0.4 * wanted


def test_the_same_numbers_are_drawn_for_every_call_and_sample() -> None:
    x, term = samples(), "0.5*norm2(z)"
    net = network("div(y, s, probes=2)", term)
    assert torch.equal(net(x), net(x)) and torch.equal(net(x)[2:3], net(x[2:3]))
    assert not torch.equal(net(x), network("div(y, s, probes=2, seed=7)", term)(x))
    assert net(x[:0]).shape == (0, 6)


def test_an_estimate_is_not_said_to_be_exact_and_is_learned_through() -> None:
    x = samples()[:1].requires_grad_()
    net = network("div(y, s, probes=2)", SIGNED)
    assert "probes   of y in s, by 2 of random signs, seed 0: an estimate" in str(net.derivation)
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    move = torch.randn_like(x)
    ends = [net(x + side * 1e-7 * move).sum() for side in (1, -1)]
    torch.testing.assert_close((slope * move).sum(), (ends[0] - ends[1]) / 2e-7, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(net, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), net(x.detach()), rtol=1e-12, atol=1e-12)


def test_what_has_no_closed_form_is_refused_with_probes_as_the_way() -> None:
    with pytest.raises(UnrollError, match="E301") as refused:
        network("div(y, s)", SIGNED)
    assert "probes=8" in str(refused.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("div(y, s, probes=0)", "E320"), ("div(y, s, probes=17)", "at most 16"), ("div(y, s, probes=1.5)", "E320"), ("div(y, s, seed=1)", "seed without probes"),
        ("div(y, s, probes=2, seed=-1)", "E320"), ("div(y, s, probes=2, seed=2**63)", "E320"), ("div(y, s, number=2)", "E320"), ("div(y, s, probes=step)", "E320"),
    ],
)  # fmt: skip
def test_what_says_no_number_of_probes_is_refused(line: str, says: str) -> None:
    with pytest.raises(UnrollError, match=says):
        network(line)


def test_a_step_that_jumps_has_no_estimate_either() -> None:
    with pytest.raises(UnrollError, match="jumps"):
        network("div(y, s, probes=2)", "0.3*norm0(z)")
