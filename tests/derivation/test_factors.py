"""What is worked out once, when the module is built: pseudoinverse, singular vectors, QR, eigenvectors, of parameters alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError

D = torch.float64


def declared(formula: str, rows: int = 4, cols: int = 6) -> dict[str, object]:
    return {"dims": {"m": rows, "n": cols}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
            "minimize": "1/2 * sumsq(x - A @ z)",
            "unroll": {"algorithm": "gradient_descent", "layers": 2, "updates": {"z": f"z + {formula}"}}}  # fmt: skip


WRITTEN = {
    "pinv(A) @ x": lambda A, x: x @ torch.linalg.pinv(A).T,
    "A.T @ svd_u(A) @ diag(svd_s(A)) @ svd_v(A).T @ A.T @ x": lambda A, x: x @ A @ A.T @ A,
    "A.T @ (qr_q(A) @ qr_r(A)) @ A.T @ x": lambda A, x: x @ A @ A.T @ A,
    "A.T @ eigh_vectors(A @ A.T) @ diag(eigh_values(A @ A.T)) @ eigh_vectors(A @ A.T).T @ x": lambda A, x: (
        x @ A @ A.T @ A
    ),
    "pinv(A.T @ A) @ A.T @ x": lambda A, x: x @ torch.linalg.pinv(A).T,
}


@pytest.mark.parametrize("formula", WRITTEN)
@pytest.mark.parametrize(("rows", "cols"), [(4, 6), (6, 4), (1, 5), (5, 1), (3, 3)])
def test_a_factor_is_worked_out_once_and_right(formula: str, rows: int, cols: int) -> None:
    net = unroll.compile(declared(formula, rows, cols), dtype=D)
    A = net.given["A"]
    x = torch.randn(3, rows, generator=torch.Generator().manual_seed(1), dtype=D)
    x[1] = 0
    want: Tensor = 2 * WRITTEN[formula](A, x)
    assert torch.allclose(net(x), want, atol=1e-10)
    text = str(net.source)
    called = text[text.index("def forward") :]
    assert not any(f"{name}(" in called for name in ("pinv", "svd_u", "svd_s", "svd_v", "qr_q", "qr_r", "eigh_vectors"))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_without_full_rank_in_any_unit(scale: float) -> None:
    net = unroll.compile(
        declared("pinv(A) @ x"),
        parameters={"A": scale * torch.ones(4, 6, dtype=D)},
        dtype=D,
    )
    x = scale * torch.eye(4, dtype=D)
    assert torch.allclose(net(x), torch.full((4, 6), 2 / 24, dtype=D), atol=1e-12)
    zero = unroll.compile(declared("pinv(A) @ x"), parameters={"A": torch.zeros(4, 6, dtype=D)}, dtype=D)
    assert (zero(x) == 0).all()


def test_signs_do_not_depend_on_the_library() -> None:
    net = unroll.compile(declared("A.T @ svd_u(A) @ svd_s(A)"), dtype=D)
    u = torch.linalg.svd(net.given["A"]).U
    u = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    assert torch.allclose(
        net(torch.zeros(4, dtype=D)), 2 * (u @ torch.linalg.svdvals(net.given["A"])) @ net.given["A"], atol=1e-10
    )


@pytest.mark.parametrize(
    "formula, says",
    [
        ("svd_u(z @ z.T) @ z", "svd_u is worked out once, of parameters and inputs; this depends on z"),
        ("eigh_vectors(pinv(A) @ pinv(A).T @ pinv(A) @ A) @ z", "takes a symmetric matrix"),
    ],
)
def test_what_moves_is_refused(formula: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        unroll.compile(declared(formula))


def test_what_a_parameter_takes_the_place_of_is_not_worked_out_once() -> None:
    spec = declared("pinv(A) @ (x - A @ z)") | {}
    spec["unroll"] = {**spec["unroll"], "learn": {"D": {"replaces": "A"}}}  # type: ignore[dict-item]
    with pytest.raises(unroll.UnrollError, match="worked out once"):
        unroll.compile(spec)
