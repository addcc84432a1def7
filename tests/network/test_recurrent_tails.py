"""The first layers have numbers of their own, those after them one set: against layers by hand, in all that counts layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import unroll
from unroll.errors import SpecError, UnrollError
from unroll.spec.schema import Train
from unroll.train.engine import plan

D = torch.float64
SPEC: dict[str, Any] = {"use": "lista_cp", "dims": {"m": 5, "n": 7}, "unroll": {"layers": 6, "free": 2}}


def moved(spec: Any = SPEC, overrides: tuple[str, ...] = ()) -> Any:
    net: Any = unroll.compile(spec, overrides=overrides, dtype=D, seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=D))
    return net


def drawn(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(2), dtype=D)


def by_hand(net: Any, x: Tensor, layers: int) -> list[Tensor]:
    z = [torch.zeros(len(x), 7, dtype=D)]
    for k in range(layers):
        i = min(k, 2)
        v = z[-1] + (x - z[-1] @ net.given["A"].T) @ net.W[i].T
        z.append(v.sign() * (v.abs() - softplus(net.theta[i])).clamp_min(0))
    return z


def test_layers_after_the_free_ones_are_the_same_and_as_many_as_a_call_says() -> None:
    net, x = moved(), drawn()
    assert net.W.shape == (3, 7, 5) and net.theta.shape == (3,)
    for layers in (0, 1, 2, 3, 6, 40):
        assert torch.allclose(net(x, layers=layers), by_hand(net, x, layers)[-1], atol=1e-10)
    assert torch.equal(net(x), net(x, layers=6)) and not torch.allclose(net(x), net(x, layers=5))
    assert net(x[:0]).shape == (0, 7)


def test_a_single_stack_that_is_kept_positive() -> None:
    spec = {**SPEC, "use": "lasso"}
    spec["unroll"] = {
        **SPEC["unroll"],
        "algorithm": "proximal_gradient",
        "learn": {"theta": {"replaces": "step * lam"}},
    }
    net, x = moved(spec), drawn()
    A, z = net.given["A"], torch.zeros(4, 7, dtype=D)
    for k in range(6):
        v = z + (x - z @ A.T) @ A / torch.linalg.matrix_norm(A, 2) ** 2
        z = v.sign() * (v.abs() - softplus(net.theta[min(k, 2)])).clamp_min(0)
    assert torch.allclose(net(x), z, atol=1e-10)


def test_slopes_of_the_tail_add_up() -> None:
    net, x = moved(), drawn()
    whole = moved({**SPEC, "unroll": {"layers": 6}})
    with torch.no_grad():
        for p, q in zip(whole.parameters(), net.parameters(), strict=True):
            p.copy_(q[[0, 1, 2, 2, 2, 2]])
    assert torch.allclose(net(x), whole(x), atol=1e-12)
    net(x).square().sum().backward()
    whole(x).square().sum().backward()
    for p, q in zip(whole.parameters(), net.parameters(), strict=True):
        assert torch.allclose(q.grad, torch.cat([p.grad[:2], p.grad[2:].sum(0, keepdim=True)]), atol=1e-10)


def test_everything_that_counts_layers_sees_them_all(tmp_path: Path) -> None:
    net, x = moved(), drawn()
    trace = net.trace(x)
    assert len(trace.iterates["z"]) == 7 and len(trace.labels) == 6
    for a, b in zip(trace.iterates["z"], by_hand(net, x, 6), strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    page = str(unroll.derive(SPEC))
    assert "6 layers" in page and "those after layer 2 the same" in page
    assert "one for each of 2 layers, one for those after" in page
    net.save(tmp_path / "net")
    again: Any = unroll.restore(tmp_path / "net")
    assert torch.equal(again(x), net(x)) and torch.equal(again(x, layers=20), net(x, layers=20))
    longer = unroll.compile(SPEC, overrides=["unroll.layers=20"], parameters=dict(net.given), dtype=D)
    longer.load_state_dict(net.state_dict())
    assert torch.equal(longer(x), net(x, layers=20))
    assert len(longer.trace(x).iterates["z"]) == 21


def test_it_starts_as_the_algorithm_and_meets_every_law() -> None:
    net: Any = unroll.compile(SPEC, dtype=D, seed=0)
    plain: Any = unroll.compile({"use": "ista", "dims": SPEC["dims"]}, parameters=dict(net.given), dtype=D)
    assert torch.allclose(net(drawn(), layers=30), plain(drawn(), layers=30), atol=1e-10)
    assert unroll.check(SPEC).ok


def test_a_start_that_differs_from_layer_to_layer() -> None:
    learn = {"theta": {"replaces": "step * lam", "start": "0.9**layer"}}
    net: Any = unroll.compile(
        {"use": "lasso", "dims": SPEC["dims"], "unroll": {"algorithm": "proximal_gradient", "layers": 6, "free": 2, "learn": learn}},
        dtype=D, seed=0,
    )  # fmt: skip
    assert torch.allclose(softplus(net.theta), torch.tensor([1, 0.9, 0.81], dtype=D))


def test_layerwise_training_takes_the_tail_at_once() -> None:
    stages = plan(Train(stages="layerwise", steps=120, refine=0.25), 60, 120, 2)
    assert [(s.depth, s.start, s.stop) for s in stages] == [(1, 0, 30), (2, 30, 60), (60, 60, 90), (60, 90, 120)]


def test_what_would_say_nothing_is_refused() -> None:
    for unrolled, says in (
        ({"layers": 2, "free": 2}, "none is left that shares"),
        ({"layers": 6, "free": 2, "learn": None, "algorithm": "proximal_gradient", "parametrisation": None}, "numbers of its own"),
    ):  # fmt: skip
        use = "lista_cp" if "learn" not in unrolled else "lasso"
        with pytest.raises(SpecError, match=says):
            unroll.compile({**SPEC, "use": use, "unroll": {k: v for k, v in unrolled.items() if v is not None}})
    with pytest.raises(UnrollError, match="its depth is fixed"):
        moved({**SPEC, "unroll": {"layers": 6}})(drawn(), layers=3)
