"""Problems in several variables solved: the optimum where they are convex together, a point that no step moves where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import unroll
from unroll.cli import cli
from unroll.errors import UnrollError
from unroll.from_files import solve_files

D = torch.float64
M, N, T = 9, 3, 4
CODES: dict[str, Any] = {
    "dims": {"m": M, "n": N, "T": T}, "variables": {"D": ["m", "n"], "Z": ["n", "T"]}, "inputs": {"X": ["m", "T"]}, "name": "codes",
    "scalars": {"lam": 0.1}, "minimize": {"fit": "1/2*sumsq(X - D @ Z)", "sparsity": "lam*norm1(Z)"}, "constraints": ["D in unit_columns"],
}  # fmt: skip


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=D)


def soft(v: Tensor, t: Tensor | float) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


MAPS = {f"H{k}": torch.linalg.qr(drawn(M, N, seed=k))[0] for k in (1, 2)}


def data() -> Tensor:
    """Three problems, one of them blank."""
    x = drawn(3, T, M)
    x[1] = 0
    return x


def test_a_convex_problem_is_solved_as_cvxpy_does() -> None:
    x = data()
    found = unroll.solve("low_rank_and_groups", x, parameters=MAPS, dims={"T": T}, tol=1e-9)
    assert found.converged.all() and found.convex and found.claims and not found.certified
    assert "3 of 3 problems solved" in str(found) and "of L and S" in found.measure
    a, b = (h.numpy() for h in MAPS.values())
    for k in (0, 2):
        low, rows = cp.Variable((N, T)), cp.Variable((N, T))
        cost = (
            cp.sum_squares(x[k].T.numpy() - a @ low - b @ rows) / 2
            + 0.1 * cp.normNuc(low)
            + 0.1 * cp.sum(cp.norm(rows, axis=1))
        )
        best = cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL)
        assert abs(float(found.objective[k]) - best) < 1e-6 * best
    assert (found.values["L"][1] == 0).all() and (found.values["S"][1] == 0).all()
    again = unroll.solve("low_rank_and_groups", x, parameters=MAPS, dims={"T": T}, start=found)
    assert again.iterations == 10 and again.converged.all()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_of_what_is_not_convex_a_point_that_no_step_moves(unit: float) -> None:
    """The residual is worked out by hand: in codes and in atoms, each a step of 1/L long; no optimum is claimed."""
    x, d0 = unit * data(), drawn(3, N, M, seed=3)
    lam = {"lam": 0.1 * unit}
    found = unroll.solve(CODES, x, algorithm="palm", start={"D": d0}, scalars=lam, tol=1e-7)
    assert found.converged.all() and not found.convex
    assert "points found that no step moves (not known to be convex)" in str(found)
    d, z = found.values["D"].mT, found.values["Z"].mT
    size = lambda a: torch.linalg.matrix_norm(a, 2)[..., None, None] ** 2
    rest = d @ z - x.mT
    v = d - rest @ z.mT / torch.where(size(z) == 0, 1, size(z))
    assert (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1) - d).abs().max() < 1e-5
    assert (soft(z - d.mT @ rest / size(d), 0.1 * unit / size(d)) - z).abs().max() < 1e-5 * unit
    assert (z[0] != 0).any() and (z[1] == 0).all()
    alone = unroll.solve(CODES, x[2:], algorithm="palm", start={"D": d0[2:]}, scalars=lam, tol=1e-7)
    torch.testing.assert_close(alone.values["Z"][0], found.values["Z"][2], rtol=1e-4, atol=1e-5 * unit)


def test_it_goes_on_from_where_it_was_and_in_float32() -> None:
    x, d0 = data(), drawn(3, N, M, seed=3)
    short = unroll.solve(CODES, x, algorithm="palm", start={"D": d0}, max_iterations=40)
    long = unroll.solve(CODES, x, algorithm="palm", start=short, max_iterations=60)
    whole = unroll.solve(CODES, x, algorithm="palm", start={"D": d0}, max_iterations=100)
    assert not short.converged.all()
    torch.testing.assert_close(long.values["Z"], whole.values["Z"], rtol=1e-12, atol=1e-12)
    assert unroll.solve(CODES, x.float(), algorithm="palm", start={"D": d0.float()}).converged.all()
    assert unroll.solve(CODES, x[:0], algorithm="palm").values["D"].shape == (0, N, M)


BROKEN: dict[str, dict[str, Any]] = {
    "E303.*joint_proximal_gradient does not fit": {"algorithm": "joint_proximal_gradient"},
    "E303.*minimises over z, and the problem over D and Z": {"algorithm": "fista"},
    "E404.*there are 2 variables, D, Z, and the start is one tensor": {"algorithm": "palm", "start": drawn(3, N, M)},
    "E404.*the start has A; there are D, Z": {"algorithm": "palm", "start": {"A": drawn(3, N, M)}},
}


def test_left_to_itself_it_takes_what_descends_and_claims_nothing() -> None:
    found = unroll.solve(CODES, data(), start={"D": drawn(3, N, M, seed=3)}, max_iterations=20)
    assert (found.algorithm, found.claims, found.convex, found.certified) == ("palm", False, False, False)


@pytest.mark.parametrize("says", BROKEN)
def test_what_cannot_be_solved_is_said(says: str) -> None:
    with pytest.raises(UnrollError, match=f"(?s){says}"):
        unroll.solve(CODES, data(), **BROKEN[says])


def test_a_variable_may_be_called_file(tmp_path: Path) -> None:
    spec = {
        "dims": {"n": 3}, "variables": {"file": ["n"], "z": ["n"]}, "inputs": {"x": ["n"]},
        "minimize": {"a": "1/2*sumsq(x - file - z)", "b": "0.1*norm1(file)", "c": "1/2*sumsq(z)"},
    }  # fmt: skip
    np.save(tmp_path / "x.npy", np.ones((2, 3)))
    solve_files(spec, [str(tmp_path / "x.npy")], [], output=tmp_path / "z.npz")
    with np.load(tmp_path / "z.npz") as found:
        assert {*found} == {"file", "z"}
        file, z = (torch.as_tensor(found[n]) for n in ("file", "z"))
        torch.testing.assert_close(file + 2 * z, torch.ones(2, 3, dtype=D), atol=1e-5, rtol=0)  # the slope in z


def test_files_hold_all_variables(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", data().numpy())
    for name, h in MAPS.items():
        np.save(tmp_path / f"{name}.npy", h.numpy())
    spec = [
        f"dims.T={T}",
        f"dims.m={M}",
        f"dims.p={N}",
        "--input",
        str(tmp_path / "x.npy"),
        "-o",
        str(tmp_path / "z.npz"),
    ]
    given = [f for n in MAPS for f in ("--parameter", f"{n}={tmp_path / n}.npy")]
    done = CliRunner().invoke(cli, ["solve", "low_rank_and_groups", *spec, *given])
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "z.npz") as found:
        assert {*found} == {"L", "S"} and found["L"].shape == (3, T, N)
