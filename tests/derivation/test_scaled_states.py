"""States that are multiples of numbers which change: ADMM with a rho of each layer, against the same with duals that are not scaled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError

Spec = dict[str, Any]
M, N, LAM, MU, RELAX = 5, 4, 0.3, 0.2, 1.4
ADMM: Spec = {
    "algorithm": "mine",
    "solves": "f(z) + sum(g[j](K[j] @ z) for j in J)",
    "scalars": {"rho": "L(f) / norm(stack(K))**2", "relax": {"start": 1, "below": 2}},
    "states": {"w[j]": "K[j] @ z", "u[j]": {"like": "w[j]", "scaled_by": "1 / rho"}},
    "updates": {
        "z": "argmin(f(z) + rho / 2 * sum(sumsq(K[j] @ z - w[j] + u[j]) for j in J))",
        "v[j]": "relax * K[j] @ z + (1 - relax) * w[j] + u[j]",
        "w[j]": "prox(g[j] / rho, v[j])",
        "u[j]": "v[j] - w[j]",
    },
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, X = drawn(M, N), drawn(3, M, seed=1)
D = torch.eye(N, dtype=torch.float64)[1:] - torch.eye(N, dtype=torch.float64)[:-1]


def spec(layers: int = 6, **unrolled: Any) -> Spec:
    return {
        "dims": {"m": M, "n": N}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": LAM, "mu": MU, "c": 1.0},
        "minimize": {"fit": "1/2*sumsq(x - A @ z)", "s": "lam*norm1(z)", "t": "mu*tv(z)"},
        "unroll": {"layers": layers, **({"algorithm": "admm"} if "blocks" not in unrolled else {}), **unrolled},
    }  # fmt: skip


def compiled(whole: Spec) -> Any:
    if "c" not in str(whole["unroll"].get("numbers", "")) + str(whole["unroll"].get("blocks", "")):
        whole = {**whole, "scalars": {"lam": LAM, "mu": MU}}
    return unroll.compile(whole, parameters={"A": A}, dtype=torch.float64)


def by_hand(rhos: Iterable[float], relax: float = 1.0) -> Tensor:
    """z of ADMM whose duals y are those of K z = w themselves."""
    ks = [torch.eye(N, dtype=torch.float64), D]
    costs = [LAM, MU]
    w = [torch.zeros(3, len(k), dtype=torch.float64) for k in ks]
    y, z = [0 * e for e in w], torch.zeros(3, N, dtype=torch.float64)
    for rho in rhos:
        matrix = A.T @ A + rho * sum((k.T @ k for k in ks), torch.zeros(N, N, dtype=torch.float64))
        right = X @ A + sum(((rho * e - f) @ k for e, f, k in zip(w, y, ks, strict=True)), 0 * z)
        z = torch.linalg.solve(matrix, right.T).T
        for j, (k, c) in enumerate(zip(ks, costs, strict=True)):
            ahead = relax * z @ k.T + (1 - relax) * w[j]
            v = ahead + y[j] / rho
            w[j] = v.sign() * (v.abs() - c / rho).clamp_min(0)
            y[j] = y[j] + rho * (ahead - w[j])
    return z


NUMBERS = {"rho": "c", "relax": str(RELAX)}


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-10)


def test_a_schedule_keeps_the_duals(tmp_path: Path) -> None:
    net = compiled(spec(numbers=NUMBERS, schedule={"c": "1 + layer/2"}))
    assert near(net(X), by_hand([1 + k / 2 for k in range(6)], RELAX))
    assert not near(net(X), by_hand([1.0] * 6, RELAX))
    assert near(net(X, layers=11), by_hand([1 + k / 2 for k in range(11)], RELAX))
    net.save(tmp_path)
    assert torch.equal(unroll.restore(tmp_path)(X), net(X))


def test_a_number_that_reads_the_layer_keeps_them_too() -> None:
    net = compiled(spec(numbers={"rho": "4 / (1 + layer)"}))
    assert near(net(X), by_hand([4 / (1 + k) for k in range(6)]))
    low = unroll.compile(spec(numbers={"rho": "4*c / (1 + layer)"}), parameters={"A": A.float()})
    assert (low(X.float()) - net(X)).abs().max() < 1e-5
    assert net(X[:0]).shape == (0, N)


def test_a_weight_of_each_layer_is_learned() -> None:
    rhos = [3.0, 0.2, 5.0, 1.0, 0.7, 2.0]
    net = compiled(spec(learn={"r": {"replaces": "rho", "bounds": "exp"}}))
    assert near(net(X), compiled(spec())(X))
    with torch.no_grad():
        dict(net.named_parameters())["r"].copy_(torch.tensor(rhos, dtype=torch.float64).log())
    assert near(net(X), by_hand(rhos))
    net(X).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).all() for p in net.parameters())


def test_in_a_block_of_two_steps() -> None:
    layers = 3
    block = {"block": "a", "over": "z", "algorithm": "admm", "steps": 2}
    counted = compiled(spec(layers, blocks=[{**block, "numbers": {"rho": "1 + layer"}}]))
    assert near(counted(X), by_hand([1.0 + k for k in range(2 * layers)]))
    scheduled = compiled(spec(layers, blocks=[{**block, "numbers": {"rho": "c"}}], schedule={"c": "1 + layer"}))
    assert near(scheduled(X), by_hand([1.0 + k // 2 for k in range(2 * layers)]))
    anew = compiled(spec(layers, blocks=[{**block, "steps": 3, "start": "0 * z", "numbers": {"rho": "1 + layer"}}]))
    assert near(anew(X), by_hand([1.0, 2.0, 3.0]))


def test_where_another_block_moves_the_number() -> None:
    """rho is the largest eigenvalue of B'B, and B the other variable."""
    whole: Spec = {
        "dims": {"m": M, "n": N}, "variables": {"z": ["n"], "b": []}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": LAM},
        "minimize": {"fit": "1/2*sumsq(x - b*(A @ z))", "s": "lam*norm1(z)", "r": "1/2*(b - 2)**2"},
        "unroll": {"layers": 5, "start": {"b": "1"}, "blocks": [
            {"block": "code", "over": "z", "algorithm": "admm"},
            {"block": "size", "over": "b", "algorithm": "gradient_descent", "step": "0.05"},
        ]},
    }  # fmt: skip
    net = unroll.compile(whole, parameters={"A": A}, dtype=torch.float64)
    for i in range(3):
        z = w = y = torch.zeros(N, dtype=torch.float64)
        b = torch.ones((), dtype=torch.float64)
        for _ in range(5):
            rho = (b * torch.linalg.matrix_norm(A, 2)) ** 2
            z = torch.linalg.solve(b**2 * A.T @ A + rho * torch.eye(N, dtype=torch.float64), b * X[i] @ A + rho * w - y)
            v = z + y / rho
            w = v.sign() * (v.abs() - LAM / rho).clamp_min(0)
            y = y + rho * (z - w)
            b = b - 0.05 * (-(X[i] - b * A @ z) @ (A @ z) + b - 2)
        assert near(net(X)["z"][i] if isinstance(net(X), dict) else net(X)[0][i], z)


def derived(text: Spec, **unrolled: Any) -> Any:
    whole = {**spec(**unrolled, algorithm="mine"), "algorithms": {"mine": text}}
    return unroll.derive(whole if "numbers" in unrolled else {**whole, "scalars": {"lam": LAM, "mu": MU}}).step


def test_where_nothing_changes_nothing_is_written() -> None:
    """Line by line what a text without scaled_by gives: a number, a scalar without a schedule, a weight that all layers share."""
    bare = {**ADMM, "states": {**ADMM["states"], "u[j]": {"like": "w[j]"}}}
    for unrolled in ({}, {"numbers": NUMBERS}, {"learn": {"r": {"replaces": "rho", "share": "layers"}}}):
        steps = [derived(text, **unrolled) for text in (ADMM, bare)]
        assert steps[0].assigns == steps[1].assigns
    moved = {"numbers": NUMBERS, "schedule": {"c": "1 + layer"}}
    steps = [derived(text, **moved) for text in (ADMM, bare)]
    assert len(steps[0].assigns) == len(steps[1].assigns) + 4  # each of two duals taken up and left


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        ({"like": "w[j]", "scaled_by": "sumsq(z)"}, "E132", "is a multiple of positive numbers"),
        ({"like": "w[j]", "scaled_by": "-rho"}, "E132", "is a multiple of positive numbers"),
        ({"like": "w[j]", "scaled_by": "t"}, "E132", "under scalars"),
        ({"like": "w[j]", "start": "1", "scaled_by": "rho"}, "E320", "starts at 0"),
        ({"number": "1", "scaled_by": "rho"}, "E320", "is a number, and scaled_by is of vectors"),
    ],
)
def test_what_no_state_is_a_multiple_of_is_refused(state: Spec, code: str, says: str) -> None:
    text = {
        **ADMM,
        "states": {"t": {"number": "1"}, **ADMM["states"], "u[j]": state},
        "updates": {**ADMM["updates"], "t": "2 * t"},
    }
    with pytest.raises(SpecError) as refused:
        compiled({**spec(algorithm="mine"), "algorithms": {"mine": text}})
    assert (refused.value.code, says in refused.value.message) == (code, True)
    assert refused.value.where is not None


def test_a_weight_that_doubles_is_a_number_in_every_layer() -> None:
    """An int would be too large for torch in layer 63."""
    spec = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": {"f": "1/2*sumsq(x - z)", "s": "0.3*norm1(z)"},
        "unroll": {"algorithm": "admm", "layers": 80, "numbers": {"rho": "2**layer"}},
    }  # fmt: skip
    assert unroll.compile(spec)(torch.ones(2, 3)).isfinite().all()
