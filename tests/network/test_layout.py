"""How tensors are given: matrices of samples columns first, or as they are written where that is said; nothing is repeated silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

N = 4
Spec = dict[str, Any]


def spec(operator: bool, variable: bool, algorithm: str = "fista") -> Spec:
    """All shapes are square: a transposition shows in the values alone."""

    def declared(written: bool) -> Spec:
        return {"shape": ["n", "N"], **({"stored": "as_written"} if written else {})}

    return {
        "dims": {"n": N, "N": N},
        "variables": {"Z": declared(variable)},
        "inputs": {"X": declared(variable), "A": {**declared(operator), "shape": ["n", "n"]}},
        "scalars": {"lam": 0.1},
        "minimize": {"fit": "1/2 * sumsq(X - A @ Z)", "sparsity": "lam * norm1(Z)"},
        "unroll": {"algorithm": algorithm, "layers": 3, "step": 0.1},
    }


def drawn() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, N, N, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def by_hand(X: Tensor, A: Tensor) -> Tensor:
    """Three steps of FISTA on matrices as they are written."""
    z = y = torch.zeros_like(X)
    t = 1.0
    for _ in range(3):
        v = y - 0.1 * A.mT @ (A @ y - X)
        new = v.sign() * (v.abs() - 0.01).clamp_min(0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, z, t = new + (t - 1) / t_new * (new - z), new, t_new
    return z


@pytest.mark.parametrize("operator", [True, False])
@pytest.mark.parametrize("variable", [True, False])
def test_a_matrix_is_given_as_its_declaration_says(operator: bool, variable: bool, tmp_path: Path) -> None:
    """Network, objective, trace, start values and a restored network, against the mathematics."""
    X, A = drawn()
    given = (X if variable else X.mT, A if operator else A.mT)
    net = unroll.compile(spec(operator, variable), dtype=torch.float64)
    stored = by_hand(X, A) if variable else by_hand(X, A).mT
    assert (net(*given) - stored).abs().max() < 1e-12
    value = (X - A @ by_hand(X, A)).square().sum((-2, -1)) / 2
    assert (net.objective(*given, Z=stored)["fit"] - value).abs().max() < 1e-12
    trace = net.trace(*given)
    assert (trace.iterates["Z"][-1] - stored).abs().max() < 1e-12
    assert (trace.terms["fit"][-1] - value).abs().max() < 1e-12
    net.save(tmp_path)
    assert torch.equal(unroll.restore(tmp_path)(*given), net(*given))


def test_a_start_of_a_variable_is_given_as_it_is_written() -> None:
    X, A = drawn()
    net = unroll.compile(
        spec(True, True, "gradient_descent") | {"minimize": "1/2 * sumsq(X - A @ Z)"}, dtype=torch.float64
    )
    start = X.flip(0)
    assert (net(X, A, Z=start) - _descended(X, A, start)).abs().max() < 1e-12


def _descended(X: Tensor, A: Tensor, z: Tensor) -> Tensor:
    for _ in range(3):
        z = z - 0.1 * A.mT @ (A @ z - X)
    return z


@pytest.mark.parametrize("operator", [True, False])
def test_a_loss_takes_what_its_declarations_say(operator: bool) -> None:
    X, A = drawn()
    loss = unroll.loss({k: v for k, v in spec(operator, True).items() if k != "unroll"})
    want = (X - A @ X).square().sum((-2, -1)) / 2
    assert (loss.terms(X, X, A if operator else A.mT)["fit"] - want).abs().max() < 1e-12


def test_a_family_is_given_as_its_declaration_says() -> None:
    base = {
        "dims": {"n": 3, "K": 2}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"], "B": {"family": "K", "shape": ["n", "n"], "stored": "as_written"}},
        "minimize": "1/2 * sumsq(x - z) + sum(sumsq(B[k] @ z) for k in K)", "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1},
    }  # fmt: skip
    x, B, z = (torch.randn(5, *n, dtype=torch.float64) for n in ((3,), (2, 3, 3), (3,)))
    slope = z - x + 2 * torch.einsum("bkij,bkil,bl->bj", B, B, z)
    assert (unroll.compile(base, dtype=torch.float64)(x, B, z=z) - (z - 0.1 * slope)).abs().max() < 1e-12


def test_a_wrong_shape_is_told_with_how_it_is_given() -> None:
    wide = spec(False, False) | {"dims": {"n": 3, "N": 5}}
    X = torch.randn(2, 3, 5)
    with pytest.raises(UnrollError, match=r"X has shape \(2, 3, 5\), expected \(\.\.\., N = 5, n = 3\)") as told:
        unroll.compile(wide)(X, torch.randn(2, 3, 3))
    assert "stored: as_written" in str(told.value)


def test_a_parameter_is_as_it_is_written() -> None:
    base = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": "1/2 * sumsq(x - A @ z)",
            "parameters": {"A": {"shape": ["n", "n"], "stored": "tokens_first"}}}  # fmt: skip
    with pytest.raises(UnrollError, match="stored as they are written"):
        unroll.derive({**base, "unroll": {"algorithm": "gradient_descent", "layers": 1}})


# --- batches ----------------------------------------------------------------------------------------------------------


def test_memberships_as_matrices_are_refused() -> None:
    """K x N x N in the place of K x N would be read as K samples with N classes each."""
    loss = unroll.loss("mcr2")
    z, members = torch.nn.functional.normalize(torch.randn(6, 5), dim=-1), torch.eye(2).repeat(1, 3)
    assert loss(z, members).isfinite()
    with pytest.raises(UnrollError, match="batch axes"):
        loss(z, torch.diag_embed(members))


@pytest.mark.parametrize("shapes", [((4, N, N), (2, N, N)), ((4, N, N), (1, N, N)), ((N, N), (2, N, N))])
def test_inputs_of_other_samples_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    net = unroll.compile(spec(True, True))
    with pytest.raises(UnrollError, match="A has batch axes"):
        net(*(torch.randn(n) for n in shapes))


def test_what_has_no_batch_axes_is_that_of_every_sample() -> None:
    net = unroll.compile(spec(True, True), dtype=torch.float64)
    X, A = drawn()
    assert (net(X, A[0]) - net(X, A[:1].expand_as(A))).abs().max() < 1e-12
