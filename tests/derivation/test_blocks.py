"""Blocks: a part of a layer is the algorithm that it names. What an algorithm keeps from step to step lives on between layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from library_objectives import NAMES, SIZES
from torch import Tensor

import unroll
from unroll.derivation.algorithms import every, find
from unroll.derivation.step import Step
from unroll.errors import SpecError
from unroll.language.nodes import Expr
from unroll.language.traversal import substitute
from unroll.spec import load

LAYERS = 4
Spec = dict[str, Any]
LASSO: Spec = load("lasso").to_dict() | {"dims": {"m": 6, "n": 8}}
SOME = ("lasso", "ridge", "nonnegative_least_squares", "fourth_power", "robust_regression", "simplex_least_squares")
ELSEWHERE = (
    "amp",
    "bregman_projections",
    "cccp",
    "irls",
    "joint_proximal_gradient",
    "multiplicative",
    "palm",
    "scaled_gradient",
)
"""Algorithms of other problems; those that a block can hold are in test_algorithm_texts.py."""
MOMENTA = ("beck_teboulle", "chambolle_dossal(3)")


def network(spec: Spec, unrolled: Spec, **given: Any) -> Any:
    dims = {d: SIZES[i] for i, (d, n) in enumerate(spec["dims"].items()) if isinstance(n, str) and n != "dynamic"}
    whole = {k: v for k, v in spec.items() if k not in ("unroll", "data", "train")} | {"unroll": unrolled}
    return unroll.compile(whole, dims=dims, dtype=torch.float64, **given)


def inputs(net: Any, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = [net.program.tensor_sizes(net.program.problem.symbols[name]) for name in net.inputs]
    return [torch.randn(2, *(n or 3 for n in shape), generator=g, dtype=torch.float64).abs() for shape in sizes]


def iterates(net: Any, *given: Tensor, **more: Any) -> Tensor:
    found = net.trace(*given, **more).iterates
    return torch.stack([torch.stack(z).flatten() for z in found.values()])


def same(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())
    assert b.isfinite().all()


# --- a block alone is its algorithm alone -----------------------------------------------------------------------------


def layer(step: Step, block: str = "") -> tuple[Any, Any]:
    """(states with their starts, assignments) of a step as plain text, the names of a block taken off, Z0 read as Z."""
    z = step.output[0]
    entry = [a.target for a in step.assigns if a.value is z and block]
    plain = lambda e: re.sub(
        rf"_*_{block}\b|_\b", "", str(substitute(e, dict.fromkeys(entry, z)) if isinstance(e, Expr) else e)
    )
    states = [(plain(s.symbol), plain(s.start)) for s in step.states]
    return states, [(plain(a.target), plain(a.value)) for a in step.assigns if a.target not in entry]


@pytest.mark.parametrize("algorithm", [a.name for a in every() if a.name not in ELSEWHERE])
def test_a_block_alone_is_its_algorithm_alone(algorithm: str) -> None:
    """Of the objectives of the library that fit (all, where there is more than the variable to keep): states, starts, assignments."""
    numbers = find(algorithm).text.record.scalars
    scheme, fitting = {"algorithm": algorithm, "numbers": {n: 0.02 for n in ("step", "rho") if n in numbers}}, 0
    for name in NAMES if algorithm == "fista" else SOME:
        spec = load(name).to_dict()
        try:
            alone = unroll.derive({**spec, "unroll": {**scheme, "layers": LAYERS}})
        except SpecError as refused:
            assert refused.code in ("E303", "E304"), name
            continue
        block = unroll.derive({**spec, "unroll": {"blocks": [{"block": "b", **scheme}], "layers": LAYERS}})
        assert layer(block.exact, "b") == layer(alone.exact), name
        fitting += 1
    assert fitting


@pytest.mark.parametrize("name", ["lasso", "group_lasso", "sparse_logistic_regression"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_block_alone_runs_as_its_algorithm_alone(name: str, momentum: str) -> None:
    scheme = {"algorithm": "fista", "momentum": momentum, "step": 0.1}
    alone = network(load(name).to_dict(), {**scheme, "layers": LAYERS})
    block = network(
        load(name).to_dict(), {"blocks": [{"block": "b", **scheme}], "layers": LAYERS}, parameters=alone.given
    )
    given = inputs(alone)
    same(iterates(block, *given), iterates(alone, *given))


@pytest.mark.parametrize("momentum", MOMENTA)
def test_steps_of_a_block_count_as_iterations(momentum: str) -> None:
    alone = network(LASSO, {"algorithm": "fista", "momentum": momentum, "layers": 6})
    block = {"block": "b", "algorithm": "fista", "momentum": momentum, "steps": 2}
    twice = network(LASSO, {"blocks": [block], "layers": 3}, parameters=alone.given)
    x = inputs(alone)
    same(iterates(twice, *x), iterates(alone, *x).reshape(7, -1)[::2].reshape(1, -1))


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_block_goes_on_at_any_depth_and_from_any_start_and_after_restore(momentum: str, tmp_path: Path) -> None:
    block = {"block": "b", "algorithm": "fista", "momentum": momentum}
    net = network(LASSO, {"blocks": [block], "layers": 2})
    (x,) = inputs(net)
    deep = network(LASSO, {"algorithm": "fista", "momentum": momentum, "layers": 9}, parameters=net.given)
    z = torch.linspace(-1, 1, 8, dtype=torch.float64).expand(2, 8)
    same(net(x, z=z, layers=9), deep(x, z=z))
    net.save(tmp_path)
    same(unroll.restore(tmp_path)(x, layers=9), deep(x))


@pytest.mark.parametrize(
    "learn", [{"W": {"replaces": "step * A.T"}}, {"theta": {"replaces": "step * lam", "positive": True}}]
)
def test_a_learned_block_starts_as_its_algorithm(learn: Spec) -> None:
    alone = network(LASSO, {"algorithm": "fista", "layers": LAYERS})
    block = {"block": "b", "algorithm": "fista", "learn": learn}
    net = network(LASSO, {"blocks": [block], "layers": LAYERS}, parameters=alone.given)
    x = inputs(alone)
    same(iterates(net, *x), iterates(alone, *x))
    net(*x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_blocks_about_other_variables_leave_a_block_alone() -> None:
    spec = {**LASSO, "variables": {"z": ["n"], "q": [1]}, "minimize": {**LASSO["minimize"], "idle": "1/2 * sumsq(q)"}}
    alone = network(LASSO, {"algorithm": "fista", "layers": LAYERS})
    code, idle = (
        {"block": "code", "over": "z", "algorithm": "fista"},
        {"block": "idle", "over": "q", "algorithm": "gradient_descent"},
    )
    x = inputs(alone)
    for blocks in ([code, idle], [idle, code]):
        net = network(spec, {"blocks": blocks, "layers": LAYERS}, parameters=alone.given)
        same(torch.stack(net.trace(*x).iterates["z"]).flatten(), iterates(alone, *x).flatten())


# --- what others make of the variable is where a block goes on ---------------------------------------------------------


def by_hand(A: Tensor, x: Tensor, layers: int, between: Any, lam: float = 0.1, momentum: str = MOMENTA[0]) -> Tensor:
    """FISTA, written out, k / (k + 4) the momentum of Chambolle and Dossal: whatever `between` makes of z, the point y that is ahead of z moves with it."""
    step, t = 1 / torch.linalg.matrix_norm(A, 2) ** 2, 1.0
    z = x.new_zeros(*x.shape[:-1], A.shape[1])
    ahead = torch.zeros_like(z)
    for k in range(layers):
        z = between(z)
        y = z + ahead
        v = y - step * (y @ A.mT - x) @ A
        new = v.sign() * (v.abs() - step * lam).clamp_min(0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        weight = (t - 1) / t_new if momentum == MOMENTA[0] else k / (k + 4)
        ahead, z, t = weight * (new - z), new, t_new
    return z


@pytest.mark.parametrize("between", [lambda z: z, lambda z: z / 2 + 0.1])
def test_a_block_goes_on_from_what_another_made_of_its_variable(between: Any) -> None:
    code = {"block": "code", "algorithm": "fista"}
    other = {"block": "other", "output": "z" if between(1.0) == 1.0 else "z / 2 + 0.1"}
    net = network(LASSO, {"blocks": [other, code], "layers": 5})
    (x,) = inputs(net)
    same(net(x), by_hand(net.given["A"], x, 5, between))


def test_a_norm_before_the_step_moves_all_that_a_layer_reads() -> None:
    norm = lambda z: torch.nn.functional.normalize(z, dim=-1, eps=1e-5)
    scheme = {"algorithm": "fista", "normalise": {"kind": "sphere", "when": "before"}}
    alone = network(LASSO, {**scheme, "layers": 5})
    block = network(LASSO, {"blocks": [{"block": "b", **scheme}], "layers": 5}, parameters=alone.given)
    (x,) = inputs(alone)
    for net in (alone, block):
        same(net(x), by_hand(alone.given["A"], x, 5, norm))


def test_a_norm_after_the_step_moves_all_that_a_layer_reads() -> None:
    norm = lambda z: torch.nn.functional.normalize(z, dim=-1, eps=1e-5)
    net = network(LASSO, {"algorithm": "fista", "normalise": {"kind": "sphere", "when": "after"}, "layers": 5})
    (x,) = inputs(net)
    same(net(x), norm(by_hand(net.given["A"], x, 5, norm)))


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_variable_of_a_blocks_own_starts_anew_with_all_that_its_algorithm_keeps(momentum: str) -> None:
    block = {"block": "inner", "variable": {"a": ["n"]}, "algorithm": "fista", "steps": 3, "output": "a", "momentum": momentum,
             "surrogate": {"replaces": ["fidelity", "sparsity"], "by": "1/2 * sumsq(x - A @ a) + lam * norm1(a)", "assumes": "incoherent(A)"}}  # fmt: skip
    net = network(LASSO, {"blocks": [block], "layers": 3})
    (x,) = inputs(net)
    seen = net.trace(x).iterates["z"]
    want = by_hand(net.given["A"], x, 3, lambda z: z, momentum=momentum)
    for z in seen[1:]:
        same(z, want)
    kept = "y_inner, t_inner" if momentum == MOMENTA[0] else "y_inner"
    assert f"{kept}: anew in every layer" in str(net.derivation)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_block_that_starts_elsewhere_starts_anew(momentum: str) -> None:
    block = {"block": "b", "algorithm": "fista", "steps": 3, "start": "zeros(n)", "momentum": momentum}
    net = network(LASSO, {"blocks": [block], "layers": 2})
    (x,) = inputs(net)
    same(net(x), by_hand(net.given["A"], x, 3, lambda z: z, momentum=momentum))


def test_what_a_block_keeps_is_said() -> None:
    said = str(unroll.derive({**LASSO, "unroll": {"blocks": [{"block": "b", "algorithm": "fista"}], "layers": 2}}))
    assert "y_b, t_b: kept from layer to layer" in said
    plain = {"blocks": [{"block": "b", "algorithm": "proximal_gradient"}], "layers": 2}
    assert "from layer to layer" not in str(unroll.derive({**LASSO, "unroll": plain}))


# --- what a trace sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_block_that_changes_nothing_is_a_step_of_the_trace(first: bool) -> None:
    blocks = [{"block": "idle", "output": "z"}, {"block": "b", "algorithm": "proximal_gradient"}]
    net = network(LASSO, {"blocks": blocks if first else blocks[::-1], "layers": 3})
    (x,) = inputs(net)
    steps = net.trace(x).steps["z"]
    assert len(steps) == 7
    for before, after in zip(
        steps[:-1:2] if first else steps[1:-1:2], steps[1::2] if first else steps[2::2], strict=True
    ):
        assert torch.equal(before, after)


def test_a_layer_may_be_declared_whole() -> None:
    """LISTA with its step and threshold learned, written out: at its start it is ISTA."""
    spec = {
        **LASSO,
        "scalars": {"lam": 0.1, "g": 0.1, "th": 0.01},
        "functions": {"S(u, t)": "sign(u) * pos(abs(u) - t)"},
    }
    learn = {"gamma": {"replaces": "g"}, "theta": {"replaces": "th"}}
    block = {"block": "step", "output": "S(z0 + g * A.T @ (x - A @ z0), th)", "learn": learn}
    net = network(spec, {"blocks": [block], "layers": 4})
    ista = network(LASSO, {"algorithm": "proximal_gradient", "step": 0.1, "layers": 4}, parameters=net.given)
    x = inputs(net)
    same(iterates(net, *x), iterates(ista, *x))
    assert sorted(p.name for p in net.learned) == ["gamma", "theta"]
