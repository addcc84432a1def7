"""A recurrent cell that gives numbers for each sample: where it starts, how long its state lives, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError

D = torch.float64
GIVES = {"gamma": {"replaces": "step", "in": "v"}, "theta": {"replaces": "step * lam", "in": "z"}}


def lasso(control: dict[str, Any] | None, blocks: bool = False, **more: Any) -> dict[str, Any]:
    given = (
        {} if control is None else {"control": {"hidden": 5, "reads": ["norm1(A @ z - x)"], "gives": GIVES, **control}}
    )
    how: dict[str, Any] = {"algorithm": "proximal_gradient", **given, **more}
    unrolled = {"blocks": [{"block": "a", "terms": ["fidelity", "sparsity"], **how}]} if blocks else how
    return {"use": "lasso", "dims": {"m": 6, "n": 9}, "unroll": {"layers": 3, **unrolled}}


def net(spec: dict[str, Any], **more: Any) -> Any:
    return unroll.compile(spec, dtype=D, seed=0, **more)


def samples(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=D)


def awake(spec: dict[str, Any]) -> Any:
    """The network with a way out that is not 0: what the cell reads matters."""
    found, g = net(spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for q in found.parameters():
            q.add_(0.3 * torch.randn(q.shape, generator=g, dtype=D))
    return found


@pytest.mark.parametrize("blocks", [False, True])
def test_before_training_it_is_the_algorithm(blocks: bool) -> None:
    x = samples()
    assert torch.allclose(net(lasso({}, blocks))(x), net(lasso(None))(x), atol=1e-12)


@pytest.mark.parametrize("bounds", ["exp", "sigmoid(0, 2)", "clamp(0)", "box(0, 1)", "softplus"])
def test_a_number_starts_at_what_it_replaces_within_its_bounds(bounds: str) -> None:
    x, gives = samples(), {"theta": {"replaces": "step * lam", "bounds": bounds}}
    assert torch.allclose(net(lasso({"gives": gives}))(x), net(lasso(None))(x), atol=1e-12)
    far = net(lasso({"gives": gives}))
    with torch.no_grad():
        far.theta_bias.fill_(-30.0)
    least = net(lasso({"gives": {"theta": {"replaces": "lam", "bounds": "clamp(0)"}}}))
    with torch.no_grad():
        least.theta_bias.fill_(-30.0)
    assert torch.allclose(far(x), least(x), atol=1e-10)


def test_each_sample_has_a_state_of_its_own_that_lives_through_the_layers() -> None:
    found, x = awake(lasso({})), samples()
    x[2] = 0
    assert torch.allclose(found(x)[1], found(x[1]), atol=1e-12)
    assert torch.allclose(found(x.reshape(2, 2, 6)).reshape(4, 9), found(x), atol=1e-12)
    twice = found(x, z=found(x, layers=1), layers=1)
    assert (found(x, layers=2) - twice).abs().max() > 1e-6  # a call that goes on from z starts the cell anew
    assert torch.equal(found(x, layers=3), found(x)) and found(x, layers=7).isfinite().all()
    assert found(x[:0]).shape == (0, 9)
    for unit in (1e-6, 1e6):
        assert found(samples(unit)).isfinite().all()


def test_in_a_block_it_is_what_it_is_alone() -> None:
    alone, block = awake(lasso({})), net(lasso({}, blocks=True))
    block.load_state_dict({k.replace("control_", "control_a_"): v for k, v in alone.state_dict().items()})
    assert torch.allclose(block(samples()), alone(samples()), atol=1e-12)


def test_it_is_saved_and_restored(tmp_path: Any) -> None:
    found, x = awake(lasso({})), samples()
    found.save(tmp_path / "net.safetensors")
    assert torch.equal(unroll.restore(tmp_path / "net.safetensors")(x), found(x))


def test_all_of_it_learns() -> None:
    found = awake(lasso({}))
    found(samples()).square().sum().backward()
    assert all(q.grad is not None and (q.grad != 0).any() for q in found.parameters())


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"reads": ["A @ z - x"]}, "E131: a controller reads numbers, or vectors as large as the variable; A @ z - x is m"),
        ({"reads": ["far"], "gives": {"gamma": {"replaces": "step"}}}, "far is worked out after the controller has read"),
        ({"reads": ["norm1(w)"]}, "E101"),
        ({"gives": {"W": {"replaces": "step * A.T"}}}, "W takes the place of a matrix"),
        ({"gives": {"gamma": {"replaces": "lam**3"}}}, "E305"),
        ({"gives": {"A": {"replaces": "step"}}}, "'A' is already the name of something else"),
        ({"gives": {"gamma": {"replaces": "step", "in": "w"}}}, "E320: proximal_gradient has no update 'w'"),
        ({"gives": {"theta": {"replaces": "step * lam", "positive": False}}}, "theta may be negative"),
        ({"cell": "gru"}, "E2"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said(control: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("(", r"\(").replace("*", r"\*")):
        unroll.derive(
            lasso(
                {"gives": {"theta": {"replaces": "lam"}}, **control},
                updates={"far": "norm1(A @ z - x)", "z": "prox(far * g, v)"} if message[:3] == "far" else {},
            )
        )


def test_several_steps_of_a_block_have_no_controller() -> None:
    with pytest.raises(SpecError, match="a controller gives its numbers once in a layer"):
        unroll.derive(lasso({}, blocks=True, steps=2))


@pytest.mark.parametrize(
    "reads", [["norm1(A @ z - x) / norm1(x)"], ["norm2(z) / (norm1(x) * norm2(x))", "1 / sumsq(x)"]]
)
def test_a_blank_sample_leaves_the_others_and_every_gradient_alone(reads: list[str]) -> None:
    found, x = awake(lasso({"reads": reads})), samples()
    kept = found(x)
    x[2] = 0
    z = found(x)
    assert torch.equal(z[[0, 1, 3]], kept[[0, 1, 3]]) and z.isfinite().all()
    z.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in found.parameters())
