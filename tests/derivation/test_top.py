"""`top(v, p)`: the share p of largest magnitudes of a sample, against a sort written by hand; support selection with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError
from unroll.language.problem import from_spec
from unroll.network.evaluate import evaluate
from unroll.spec import load

D = torch.float64


def largest(v: Tensor, p: float) -> Tensor:
    """By counting, one sample at a time: an entry is in if no more entries are as large as the share says."""
    flat = v.flatten()
    count = int(p * len(flat) + 0.5)
    return torch.tensor([float((flat.abs() >= e.abs()).sum() <= count) for e in flat], dtype=v.dtype).reshape(v.shape)


def declared(formula: str, shape: list[str], **more: Any) -> dict[str, Any]:
    """A layer that is the formula."""
    return {"dims": {"n": 7, "N": 3}, "variables": {"z": shape}, "inputs": {"x": shape}, "scalars": {"p": 0.3},
            "minimize": "1/2 * sumsq(x - z)",
            "unroll": {"algorithm": "gradient_descent", "layers": 1, "start": {"z": "x"}, "updates": {"z": formula}, **more}}  # fmt: skip


SAMPLES = torch.stack(
    [
        torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=D),
        torch.zeros(7, dtype=D),
        torch.tensor([1.0, -1, 1, 2, 0, 0, -3], dtype=D),
        torch.ones(7, dtype=D),
    ]
)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("p", [0, 0.1, 2 / 7, 0.3, 0.5, 0.99, 1])
def test_a_share_is_that_of_a_sort(p: float, unit: float) -> None:
    x = unit * SAMPLES
    want = torch.stack([largest(s, p) for s in x])
    for formula in (f"top(z, {p!r}) * z", f"where(top(z, {p!r}), z, 0)", f"top(z, {p!r} + 0 * norm1(z)) * z"):
        assert torch.equal(unroll.compile(declared(formula, ["n"]), dtype=D)(x), want * x), formula
    assert want[0].sum() == round(7 * p) and want[1].sum() == (7 if round(7 * p) == 7 else 0)


def test_a_share_of_each_sample_and_of_the_layer() -> None:
    x = SAMPLES / SAMPLES.norm(dim=-1, keepdim=True).clamp_min(1)
    net = unroll.compile(declared("top(x, norm_inf(x)) * x", ["n"]), dtype=D)
    want = torch.stack([largest(s, float(s.abs().max())) * s for s in x])
    assert torch.equal(net(x), want)
    assert torch.equal(torch.stack([net(s) for s in x]), want)
    assert net(x[:0]).shape == (0, 7)
    spec = declared("top(x, p) * x", ["n"], schedule={"p": "minimum(2 * layer, 5) / 7"}) | {"inputs": {"x": ["n"]}}
    spec["unroll"]["layers"] = 4
    steps = unroll.compile(spec, dtype=D).trace(x).steps["z"]
    for k, z in enumerate(steps[1:]):
        assert torch.equal(z, torch.stack([largest(s, min(2 * k, 5) / 7) * s for s in x]))


def test_no_number_is_a_share_of_none() -> None:
    spec = declared("top(z, norm1(x) / norm1(x)) * z", ["n"])
    got = unroll.compile(spec, dtype=D)(SAMPLES)
    assert torch.equal(got[0], SAMPLES[0]) and (got[1] == 0).all()


def test_a_matrix_is_one_sample() -> None:
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=D)
    want = torch.stack([largest(s, 0.4) * s for s in x])
    assert torch.equal(unroll.compile(declared("top(z, 0.4) * z", ["n", "N"]), dtype=D)(x), want)
    turned = unroll.compile(declared("(top(z.T, 0.4) * z.T).T", ["n", "N"]), dtype=D)
    assert torch.equal(turned(x), want)


def test_one_entry() -> None:
    x = torch.tensor([[2.0], [0.0]], dtype=D)
    for p, kept in ((0.4, 0), (0.5, 1), (1, 1)):
        spec = declared(f"where(top(z, {p}), z, -1)", ["n"])
        spec["dims"]["n"] = 1
        assert torch.equal(unroll.compile(spec, dtype=D)(x), torch.where(torch.tensor(kept == 1), x, -1.0))


def test_the_formula_is_the_emitted_text() -> None:
    """The evaluator of formulas, which counts, against the emitted module, which sorts."""
    problem = from_spec(load({**declared("z", ["n"]), "minimize": "sum(top(x, p) * z) + sumsq(z)"}))
    (e,), (z,), (x,) = problem.terms.values(), problem.variables, problem.inputs
    (p,) = (s for s in problem.scalars)
    for sample in SAMPLES:
        got = evaluate(e, {z: torch.ones(7, 1, dtype=D), x: sample[:, None]}, {p: 0.3})
        assert float(got) == 7 + float(largest(sample, 0.3).sum())


SELECTED = {"use": "lasso", "dims": {"m": 8, "n": 12},
            "unroll": {"algorithm": "proximal_gradient", "layers": 3, "updates": {"z": "where(top(v, 0.25) & (derived != 0), v, derived)"},
                       "learn": {"W": {"replaces": "step * A.T", "where": "gradient"}, "theta": {"replaces": "step * lam", "positive": True}}}}  # fmt: skip


def test_support_selection_is_that_of_lista_cpss() -> None:
    """x <- S_ss(x + W (y - A x)): entries among the largest and above the threshold are not shrunk; slopes through both branches."""
    net = unroll.compile(SELECTED, dtype=D, seed=0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.1 * torch.randn(q.shape, generator=g, dtype=D))
    x = torch.randn(5, 8, generator=g, dtype=D)
    x[1] = 0
    A = net.given["A"]

    def by_hand() -> Tensor:
        z = x.new_zeros(5, 12)
        for W, theta in zip(net.W, torch.nn.functional.softplus(net.theta), strict=True):
            v = z + (x - z @ A.T) @ W.T
            kept = torch.stack([largest(s, 0.25) for s in v]).bool() & (v.abs() > theta)
            z = torch.where(kept, v, v.sign() * (v.abs() - theta).clamp_min(0))
        return z

    assert (net(x) - by_hand()).abs().max() < 1e-12 and (by_hand() != 0).any()
    weights = torch.randn(5, 12, generator=g, dtype=D)
    have = torch.autograd.grad((net(x) * weights).sum(), list(net.parameters()))
    want = torch.autograd.grad((by_hand() * weights).sum(), list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(have, want, strict=True))


def test_float32_selects_as_many() -> None:
    """p n = 6 in both: 0.012 * 500 is more than 6 in float32."""
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(3))
    spec = declared("where(top(z, 0.012), 1, 0) + 0 * z", ["n"])
    spec["dims"]["n"] = 500
    assert (unroll.compile(spec)(x).sum(-1) == 6).all()


@pytest.mark.parametrize(
    "formula, says",
    [
        ("where(top(z, 1.2), z, 0)", "1.2 is no share"),
        ("where(top(z, z), z, 0)", "a share is a number from 0 to 1"),
        ("where(top(z, 0.1) & z, z, 0)", "z is not a comparison"),
        ("where(top(z, 0.1) & z != 0, z, 0)", "not a comparison"),
        ("top(z) * z", "top takes 2 arguments"),
        ("z & x", "z is not a comparison"),
    ],
)
def test_what_is_no_share_or_condition_is_refused(formula: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        unroll.compile(declared(formula, ["n"]))
