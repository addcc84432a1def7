"""Where a parameter stands (`in:`), what it starts at (`start:`), what is fixed; updates and states of a spec's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError

D = torch.float64
Spec = dict[str, Any]


def on(learn: Spec, algorithm: str = "proximal_gradient", **more: Any) -> Spec:
    return {"use": "lasso", "dims": {"m": 5, "n": 7},
            "unroll": {"algorithm": algorithm, "layers": 3, "learn": learn, **more}}  # fmt: skip


def made(spec: Spec) -> tuple[Any, Tensor, Tensor, float]:
    net: Any = unroll.compile(spec, dtype=D, seed=0)
    A = net.given["A"]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=D)
    x[1] = 0
    return net, A, x, float(1 / torch.linalg.matrix_norm(A, 2) ** 2)


def shrink(v: Tensor, t: Any) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def move(net: Any) -> None:
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.1 * torch.randn(q.shape, generator=g, dtype=D))


def by_hand(net: Any, A: Tensor, x: Tensor, v: Any, t: Any) -> Tensor:
    z = torch.zeros(4, 7, dtype=D)
    for k in range(3):
        z = shrink(v(z, k), t(k))
    return z


def test_the_step_is_learned_in_one_update_and_in_the_other() -> None:
    net, A, x, step = made(on({"gamma": {"replaces": "step", "in": "v"}}))
    move(net)
    want = by_hand(net, A, x, lambda z, k: z + net.gamma[k] * (x - z @ A.T) @ A, lambda k: 0.1 * step)
    assert torch.allclose(net(x), want, atol=1e-12)
    net, A, x, step = made(on({"gamma": {"replaces": "step", "in": "z", "positive": True}}))
    move(net)
    width = 0.1 * torch.nn.functional.softplus(net.gamma)
    want = by_hand(net, A, x, lambda z, k: z + step * (x - z @ A.T) @ A, lambda k: width[k])
    assert torch.allclose(net(x), want, atol=1e-12)


def test_the_adjoint_alone() -> None:
    both = {"B": {"replaces": "A.T", "in": "v"}}
    net, A, x, step = made(on(both))
    move(net)
    want = by_hand(net, A, x, lambda z, k: z + step * (x - z @ net.B[k]) @ net.B[k].T, lambda k: 0.1 * step)
    assert torch.allclose(net(x), want, atol=1e-12)
    net, A, x, step = made(on({"B": {**both["B"], "transposed": False}}))
    move(net)
    want = by_hand(net, A, x, lambda z, k: z + step * (x - z @ A.T) @ net.B[k].T, lambda k: 0.1 * step)
    assert torch.allclose(net(x), want, atol=1e-12)


def test_a_start_of_its_own_in_each_layer_and_of_all() -> None:
    net, A, x, step = made(on({"gamma": {"replaces": "step", "in": "v", "start": "0.3 * 0.5**layer", "positive": True},
                               "W": {"replaces": "A.T", "in": "v", "transposed": False, "share": "layers", "start": "pinv(A)"}}))  # fmt: skip
    assert torch.allclose(torch.nn.functional.softplus(net.gamma), torch.tensor([0.3, 0.15, 0.075], dtype=D))
    assert torch.allclose(net.W, torch.linalg.pinv(A))
    want = by_hand(net, A, x, lambda z, k: z + 0.3 * 0.5**k * (x - z @ A.T) @ torch.linalg.pinv(A).T, lambda k: 0.1 * step)  # fmt: skip
    assert torch.allclose(net(x), want, atol=1e-12)
    matrix, A, _, step = made(on({"W": {"replaces": "step * A.T", "start": "(1 + layer) * A.T"}}))
    assert all(torch.allclose(matrix.W[k], (1 + k) * A.T) for k in range(3))


def test_what_is_fixed_is_no_parameter() -> None:
    net, A, x, step = made(on({"W": {"replaces": "A.T", "in": "v", "transposed": False, "start": "2 * A.T", "fixed": True},
                               "gamma": {"replaces": "step", "start": "1/3", "fixed": True, "in": "z"}}))  # fmt: skip
    assert not list(net.parameters())
    want = by_hand(net, A, x, lambda z, k: z + 2 * step * (x - z @ A.T) @ A, lambda k: 0.1 / 3)
    assert torch.allclose(net(x), want, atol=1e-12)
    assert {d.says.split(":")[0] for d in net.derivation.step.departures} == {"A.T becomes 2 * A.T", "step becomes 1/3"}


def test_a_start_of_the_variable_is_learned() -> None:
    net, A, x, step = made(on({"Q": {"replaces": "A.T", "in": "start"}}, start={"z": "A.T @ x"}))
    assert torch.allclose(net.Q, A.T)
    move(net)
    z = x @ net.Q.T
    for _ in range(3):
        z = shrink(z + step * (x - z @ A.T) @ A, 0.1 * step)
    assert torch.allclose(net(x), z, atol=1e-12)


def test_a_threshold_of_each_entry_within_where() -> None:
    net, A, x, step = made(on({"theta": {"replaces": "step * lam", "in": "z", "shape": ["n"], "positive": True}},
                              updates={"z": "where(abs(v) >= 0.5, v, derived) / 2"}))  # fmt: skip
    move(net)
    z = torch.zeros(4, 7, dtype=D)
    for k in range(3):
        v = z + step * (x - z @ A.T) @ A
        z = torch.where(v.abs() >= 0.5, v, shrink(v, torch.nn.functional.softplus(net.theta[k]))) / 2
    assert torch.allclose(net(x), z, atol=1e-12)


def test_in_a_block_with_two_steps() -> None:
    alone = {"learn": {"gamma": {"replaces": "step", "in": "v"}}, "algorithm": "proximal_gradient"}
    spec = on({})
    spec["unroll"] = {"layers": 3, "blocks": [{"block": "code", "steps": 2, **alone}]}
    net, A, x, step = made(spec)
    move(net)
    z = torch.zeros(4, 7, dtype=D)
    for k in range(3):
        for _ in range(2):
            z = shrink(z + net.gamma[k] * (x - z @ A.T) @ A, 0.1 * step)
    assert torch.allclose(net(x), z, atol=1e-12)


def test_updates_and_states_of_its_own() -> None:
    """A threshold that follows each sample, and a state that is kept: alone, continued, and as it was saved."""
    spec = on({}, states={"before": "z", "n_": {"like": "z", "start": 1}},
              updates={"far": "norm1(A @ z - x)", "v": "derived + 0.3 * (z - before) * n_", "before": "z", "z": "prox(0.05 * far * g / lam, v)", "n_": "n_ / 2"})  # fmt: skip
    net, A, x, step = made(spec)
    z = before = torch.zeros(4, 7, dtype=D)
    n = torch.ones(4, 7, dtype=D)
    seen = []
    for _ in range(3):
        far = (z @ A.T - x).abs().sum(-1, keepdim=True)
        v = z + step * (x - z @ A.T) @ A + 0.3 * (z - before) * n
        before, z, n = z, shrink(v, 0.05 * far), n / 2
        seen.append(z)
    for got, want in zip(net.trace(x).steps["z"][1:], seen, strict=True):
        assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(net(x, layers=2), seen[1], atol=1e-12)


@pytest.mark.parametrize(
    "learn, more, says",
    [
        ({"g": {"replaces": "step", "in": "w"}}, {}, "proximal_gradient has no update 'w'"),
        ({"g": {"replaces": "lam", "in": "v"}}, {}, "lam does not occur in the step"),
        ({"g": {"replaces": "step", "in": "v", "where": "prox"}}, {}, "says twice where it stands"),
        ({"g": {"replaces": "step", "fixed": True}}, {}, "fixed at what it replaces"),
        ({"g": {"replaces": "step", "start": "1", "init": "ones"}}, {}, "two starts"),
        ({"W": {"replaces": "A.T", "start": "A"}}, {}, "the start of W is m × n, what it replaces is n × m"),
        ({"W": {"replaces": "A.T", "start": "A.T * norm1(x)"}}, {}, "the start of W depends on x"),
        ({"g": {"replaces": "step", "share": "layers", "start": "layer + 1"}}, {}, "shared by all layers"),
        ({}, {"updates": {"q": "z"}}, "proximal_gradient has no update 'q'"),
        ({}, {"states": {"q": "z"}}, "nothing updates the state 'q'"),
        ({}, {"states": {"z": "z"}, "updates": {"z": "z"}}, "has a 'z' already"),
        ({}, {"updates": {"q": "A @ z", "v": "derived + q"}}, "does not fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(learn: Spec, more: Spec, says: str) -> None:
    with pytest.raises(unroll.UnrollError, match=says) as caught:
        unroll.compile(on(learn, **more))
    assert isinstance(caught.value, SpecError) or "shared by all layers" in says


BOUNDS = {
    "softplus": (torch.nn.functional.softplus, 0.0, float("inf")),
    "exp": (torch.exp, 0.0, float("inf")),
    "sigmoid(0, 0.9)": (lambda q: 0.9 * torch.sigmoid(q), 0.0, 0.9),
    "sigmoid(0.01, 1)": (lambda q: 0.01 + 0.99 * torch.sigmoid(q), 0.01, 1.0),
    "clamp(0)": (lambda q: q.clamp_min(0), 0.0, float("inf")),
    "box(0, 0.8)": (lambda q: q.clamp(0, 0.8), 0.0, 0.8),
}


@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_bound_by_its_name(bounds: str) -> None:
    """It starts at the value that it replaces, and stays within wherever training takes it."""
    of, low, high = BOUNDS[bounds]
    net, A, x, step = made(on({"gamma": {"replaces": "step", "in": "v", "bounds": bounds}}))
    assert torch.allclose(of(net.gamma), torch.full((3,), step, dtype=D))
    plain: Any = unroll.compile(on({}), parameters={"A": A}, dtype=D)
    assert torch.allclose(net(x), plain(x), atol=1e-12)
    for far in (-30.0, 0.3, 30.0):
        with torch.no_grad():
            net.gamma.fill_(far)
        value = of(net.gamma)
        assert ((value >= low) & (value <= high)).all()
        want = by_hand(net, A, x, lambda z, k, v=value: z + v[k] * (x - z @ A.T) @ A, lambda k: 0.1 * step)
        got = net(x)
        assert torch.allclose(got, want, rtol=1e-9) or not want.isfinite().all()


def test_a_matrix_has_bounds_of_its_entries() -> None:
    net, A, *_ = made(on({"W": {"replaces": "A.T", "in": "v", "transposed": False, "bounds": "sigmoid(-5, 5)"}}))
    assert torch.allclose(-5 + 10 * torch.sigmoid(net.W[0]), A.T)


@pytest.mark.parametrize(
    "bounds, says",
    [
        ("tanh", "'tanh' is no bound of gamma"),
        ("sigmoid(0)", "is no bound"),
        ("box(1, 0)", "no room between 1 and 0"),
        ("sigmoid(0, inf)", "no room between"),
        ("sigmoid(5, 9)", "cannot start at the value that it replaces"),
        ("box(5, 9)", "cannot start at the value that it replaces"),
    ],
)
def test_what_is_no_bound_is_said(bounds: str, says: str) -> None:
    with pytest.raises(unroll.UnrollError, match=says):
        unroll.compile(on({"gamma": {"replaces": "step", "in": "v", "bounds": bounds}}))
    with pytest.raises(unroll.UnrollError, match="two constraints"):
        unroll.compile(on({"gamma": {"replaces": "step", "bounds": "exp", "positive": True}}))
