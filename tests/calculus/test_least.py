"""argmin of a quadratic: its gradient is 0 there, whatever acts on the variable; what no rule solves is refused with the reason."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from torch import Tensor

import unroll
from unroll.calculus.gradient import gradient
from unroll.calculus.linear import least
from unroll.errors import DeriveError
from unroll.language.constructors import symbol
from unroll.language.nodes import Sym, dim, scalar
from unroll.language.parse import Scope, parse_matrix
from unroll.language.traversal import substitute
from unroll.network.evaluate import evaluate

D = torch.float64
M, N, T = dim("m"), dim("n"), dim("T")
RHO = scalar("rho", positive=True)
POSITIVE = {"positive"}
A, B, C, H = symbol("A", M, N), symbol("B", N, M), symbol("C", T, T), symbol("H", N, N)
v, w, u, y = symbol("v", N), symbol("w", N, props=POSITIVE), symbol("u", 1, 1, "state"), symbol("y", M)
V, W, X = symbol("V", N, T), symbol("W", N, T, props=POSITIVE), symbol("X", N, T)
q, Z = symbol("q", N, 1, "variable"), symbol("Z", N, T, "variable", 2)
SYMBOLS = (A, B, C, H, v, w, u, y, V, W, X, q, Z)
SCOPE = Scope({s.name: s for s in SYMBOLS} | {d.name: d for d in (M, N, T)} | {"rho": RHO})


def given(m: int, n: int, t: int) -> tuple[dict[Sym, Tensor], dict[sp.Symbol, float | int]]:
    g, sizes = torch.Generator().manual_seed(0), {M: m, N: n, T: t}
    draw = lambda s: torch.randn(int(s.rows.subs(sizes)), int(s.cols.subs(sizes)), generator=g, dtype=D)
    drawn = {s: draw(s) for s in SYMBOLS}
    return {s: x.abs() + 0.1 if "positive" in s.props else x for s, x in drawn.items()}, {**sizes, RHO: 0.7}


SOLVED = (
    "1/2*sumsq(A @ q - y) + rho/2*sumsq(q - v)",
    "1/2*sumsq(A @ q - y) + rho/2*(dot(v, q) - u)**2 + sumsq(q)",
    "1/2*sumsq(q - v) + rho/2*(dot(w, q) - u)**2",
    "1/2*sumsq(q - v) + rho/2*(sum(q) - u)**2",
    "1/2*sumsq(q - v) + rho/2*(dot(w, q) - u)**2 + 1/2*(dot(v, q) - 1)**2",
    "1/2*sum(w*(q - v)**2) + rho/2*sumsq(q)",
    "1/2*sum(w*(q - v)**2) + rho/2*sumsq(difference(q))",
    "1/2*sumsq(q - v) + rho/2*sumsq(difference(w * q)) + dot(q, v)",
    "1/2*sumsq(Z - X) + rho/2*sumsq(Z @ C - V)",
    "1/2*sumsq(Z @ C) + rho/2*sumsq(V - Z)",
    "1/2*sumsq(W * (Z - X)) + rho/2*sumsq(Z - V)",
    "1/2*sumsq(H @ Z - X) + rho/2*sumsq(Z - V)",
    "1/2*sumsq(Z - X) + rho/2*(dot(V, Z) - u)**2",
    "1/2*sumsq(Z - X) + rho/2*(trace(C @ Z.T @ V) - u)**2",
    "1/2*sumsq(Z - X) + rho/2*sumsq(difference(Z))",
)


@pytest.mark.parametrize("sizes", [(3, 4, 2), (1, 3, 1), (2, 2, 2)])
@pytest.mark.parametrize("formula", SOLVED)
def test_the_gradient_is_zero_at_what_argmin_gives(formula: str, sizes: tuple[int, int, int]) -> None:
    e = parse_matrix(formula, SCOPE)
    z = q if q in e.symbols else Z
    values, scalars = given(*sizes)
    at = evaluate(least(e, z), values, scalars)
    assert at.shape == values[z].shape
    assert evaluate(substitute(gradient(e, z), {}), {**values, z: at}, scalars).abs().max() < 1e-11


REFUSED = {
    "1/2*sumsq(H @ Z - X) + rho/2*sumsq(Z @ C)": "Sylvester",
    "1/2*sumsq(H @ Z @ C - X) + rho/2*sumsq(Z)": "Sylvester",
    "1/2*sumsq(W * Z - X) + rho/2*sumsq(H @ Z)": "no rule solves",
    "1/2*sumsq(V * Z - X) + rho*sum(Z)": "no rule solves",
    "dot(V, Z)": "not bounded below",
}


@pytest.mark.parametrize("formula", REFUSED)
def test_what_no_rule_solves_is_refused_with_the_reason(formula: str) -> None:
    with pytest.raises(DeriveError, match=REFUSED[formula]) as refused:
        least(parse_matrix(formula, SCOPE), Z)
    assert refused.value.code == "E302"


CONJUGATE = {
    "norm1(z)": lambda v: v.clamp(-1, 1),
    "norm2(z)": lambda v: v / v.norm(dim=-1, keepdim=True).clamp_min(1),
    "1/2*sumsq(z)": lambda v: v,
    "sum(huber(z, 1))": lambda v: v.clamp(-1, 1),
    "1/2*sumsq(z) + norm1(z)": lambda v: v,
}
"""g -> the nearest point at which its conjugate is finite."""


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("g", CONJUGATE)
def test_a_step_of_zero_for_a_sample_leaves_the_domain_of_a_conjugate(g: str, dtype: torch.dtype) -> None:
    """prox(c conj(g), v) for c -> 0; c is 0 where the layers begin."""
    text = {
        "algorithm": "own", "solves": "f(z) + g(z)", "scalars": {"step": "1 / L(f)"},
        "updates": {"c": "norm2(z)", "z": "prox(c * conj(g), z - step * grad(f, z))"},
    }  # fmt: skip
    spec = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": {"f": "1/2*sumsq(x - z)", "g": g},
        "algorithms": {"own": text}, "unroll": {"algorithm": "own", "layers": 1, "split": {"g": ["g"]}},
    }  # fmt: skip
    net = unroll.compile(spec, dtype=dtype)
    x = 3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=D).to(dtype)
    x[1] = 0
    found = net(x.requires_grad_())
    assert torch.allclose(found, CONJUGATE[g](x), atol=8 * torch.finfo(dtype).eps)
    start = torch.zeros_like(x).requires_grad_()
    slopes = torch.autograd.grad(net(x, z=start, layers=2).sum(), (x, start), materialize_grads=True)
    assert all(s.isfinite().all() for s in slopes)


def test_one_factor_solves_for_a_whole_batch_without_copies_of_it() -> None:
    net = unroll.compile(
        "lasso", dims={"m": 3, "n": 5}, overrides=["unroll.algorithm=admm", "unroll.layers=3"], dtype=D, seed=0
    )
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    assert torch.allclose(net(x), torch.stack([net(m) for m in x.reshape(8, 3)]).reshape(2, 4, 5), atol=1e-12)
    shapes = list[tuple[int, ...]]()
    solve = torch.cholesky_solve
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "cholesky_solve", lambda b, l: shapes.append(b.shape) or solve(b, l))
        net(x)
    assert set(shapes) == {(5, 8)}


@pytest.mark.parametrize(("m", "n", "side"), [(2, 9, 2), (1, 3, 1), (4, 9, 4), (5, 9, 9), (3, 3, 3)])
def test_an_inverse_is_taken_on_the_smaller_side_and_once(m: int, n: int, side: int) -> None:
    """ADMM as Boyd et al. write it, with the inverse of the larger side."""
    g = torch.Generator().manual_seed(0)
    a, x = torch.randn(m, n, generator=g, dtype=D), torch.randn(4, m, generator=g, dtype=D)
    ways = ["unroll.algorithm=admm", "unroll.layers=7", "unroll.numbers={rho: 0.3}"]
    net = unroll.compile("lasso", parameters={"A": a}, overrides=ways, dtype=D)
    w = u = torch.zeros(4, n, dtype=D)
    for _ in range(7):
        z = (x @ a + 0.3 * (w - u)) @ torch.linalg.inv(a.T @ a + 0.3 * torch.eye(n, dtype=D))
        w = torch.nn.functional.softshrink(z + u, 0.1 / 0.3)
        u = u + z - w
    assert torch.allclose(net(x), z, atol=1e-12)
    assert net.chol.shape[-1] == side and "cholesky(" not in net.source.split("def forward")[-1]
