"""Texts in several variables: partial gradients and constants, points before an update, each against a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvxpy as cp
import pytest
import torch
from sklearn.decomposition import non_negative_factorization
from torch import Tensor

import unroll
from unroll.errors import UnrollError

M, N, R = 9, 7, 3
CODES: dict[str, Any] = {
    "dims": {"m": M, "n": R, "N": N}, "variables": {"D": ["m", "n"], "Z": ["n", "N"]}, "inputs": {"X": ["m", "N"], "D0": ["m", "n"]},
    "scalars": {"lam": 0.1}, "minimize": {"fit": "1/2*sumsq(X - D @ Z)", "sparsity": "lam*norm1(Z)"},
    "constraints": ["D in unit_columns"], "name": "codes",
}  # fmt: skip
PALM: dict[str, Any] = {**CODES, "unroll": {"algorithm": "palm", "layers": 4, "start": {"D": "D0"}}}


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft(v: Tensor, t: Tensor | float) -> Tensor:
    return v.sign() * (v.abs() - t).clamp_min(0)


def by_palm(x: Tensor, d: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Bolte, Sabach & Teboulle 2014, section 4; of matrices as they are written."""
    size = lambda a: torch.linalg.matrix_norm(a, 2)[..., None, None] ** 2
    safe = lambda l: torch.where(l == 0, 1, l)
    z = torch.zeros(*x.shape[:-2], R, N, dtype=torch.float64)
    for _ in range(layers):
        d = d - (d @ z - x) @ z.mT / safe(size(z))
        d = d / torch.linalg.vector_norm(d, dim=-2, keepdim=True).clamp_min(1)
        z = soft(z - d.mT @ (d @ z - x) / safe(size(d)), 0.1 / safe(size(d)))
    return d, z


def test_palm_is_the_loop_of_its_paper(tmp_path: Path) -> None:
    """A blank sample among others, deeper than compiled, after restore; the objective falls."""
    x, d0 = drawn(3, M, N), drawn(3, M, R, seed=1) / 3
    x[1] = 0
    net = unroll.compile(PALM, dtype=torch.float64)
    for layers in (4, 9):
        d, z = by_palm(x, d0, layers)
        found = net(x.mT, d0.mT, layers=layers)
        torch.testing.assert_close(found[0].mT, d, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[1].mT, z, rtol=1e-10, atol=1e-12)
    trace = net.trace(x.mT, d0.mT)
    total = torch.stack(list(trace.terms.values())[:2]).sum(0)
    assert (total[1:].diff(dim=0) <= 1e-12).all()
    net.save(tmp_path / "net")
    assert torch.equal(unroll.restore(tmp_path / "net")(x.mT, d0.mT)[1], net(x.mT, d0.mT)[1])
    assert net(x[:0].mT, d0[:0].mT)[1].shape == (0, N, R)


@pytest.mark.parametrize("words", [("D", "Z"), ("y", "x"), ("x", "y")])
def test_arguments_are_variables_by_name_or_in_their_order(words: tuple[str, str]) -> None:
    """Of the same names, whatever the order is; else as both are written."""
    first, second = words
    text = {
        "algorithm": "own", "solves": f"f({first}) + g({second}) + H({first}, {second})",
        "updates": {first: f"prox(f, {first} - grad(H, {first}) / L(H, {first}))", second: f"prox(g, {second} - grad(H, {second}))"},
    }  # fmt: skip
    net = unroll.compile(
        {**PALM, "algorithms": {"own": text}, "unroll": {"algorithm": "own", "layers": 1, "start": {"D": "D0"}}},
        dtype=torch.float64,
    )
    assert net(drawn(N, M), drawn(R, M))[0].shape == (R, M)
    if words == ("D", "Z"):
        swapped = {**text, "solves": "g(Z) + f(D) + H(Z, D)"}
        same = unroll.compile({**net.spec.to_dict(), "algorithms": {"own": swapped}}, dtype=torch.float64)
        assert torch.equal(same(drawn(N, M), drawn(R, M))[1], net(drawn(N, M), drawn(R, M))[1])


def test_a_learned_step_in_two_variables_gets_its_gradient() -> None:
    spec = {**PALM, "unroll": {**PALM["unroll"], "learn": {"share": {"replaces": "c", "positive": True}}}}
    net = unroll.compile(spec, dtype=torch.float64)
    net(drawn(N, M), drawn(R, M))[1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    plain = unroll.compile(PALM, dtype=torch.float64)
    torch.testing.assert_close(
        net(drawn(N, M), drawn(R, M))[1], plain(drawn(N, M), drawn(R, M))[1], rtol=1e-12, atol=1e-13
    )


def outliers(n: int, rank: int, share: float) -> tuple[Tensor, Tensor]:
    """(a matrix of low rank, itself with errors as large as its largest entry)."""
    low = drawn(n, rank) @ drawn(rank, n, seed=1) / n
    g = torch.Generator().manual_seed(2)
    where = torch.rand(n, n, generator=g, dtype=torch.float64) < share
    return low, low + where * (2 * torch.rand(n, n, generator=g, dtype=torch.float64) - 1) * low.abs().max()


def test_learned_robust_pca_is_its_layer_equation_and_recovers_the_matrix() -> None:
    """Cai, Liu & Yin 2021, algorithm 1, both factors from the old ones, with parameters that were moved."""
    n, rank = 300, 3
    low, y = outliers(n, rank, 0.1)
    top = float(low.abs().max())
    net = unroll.compile("lrpca", dims={"m": n, "n": n, "r": rank}, scalars={"zeta": top}, dtype=torch.float64)
    l, r, _ = net(y.mT)
    assert (l.mT @ r - low).norm() <= 1e-5 * low.norm()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * drawn(*p.shape, seed=3)
    theta, eta = (
        torch.nn.functional.softplus(p) for _, p in sorted(net.named_parameters(), key=lambda p: "theta" not in p[0])
    )
    u, s, v = torch.linalg.svd(y.clamp(-top, top), full_matrices=False)
    l, r = u[:, :rank] * s[:rank].sqrt(), v.mT[:, :rank] * s[:rank].sqrt()
    for zeta, step in zip(theta, eta, strict=True):
        rest = y - l @ r.mT - soft(y - l @ r.mT, zeta)
        l, r = l + step * rest @ r @ torch.linalg.inv(r.mT @ r), r + step * rest.mT @ l @ torch.linalg.inv(l.mT @ l)
    found = net(y.mT)
    torch.testing.assert_close(found[0].mT @ found[1], l @ r.mT, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("divergence", ["kullback-leibler", "frobenius"])
def test_nonnegative_factors_are_those_of_scikit_learn(divergence: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, h = (torch.rand(*s, generator=g, dtype=torch.float64) + 0.01 for s in ((M, N), (M, R), (R, N)))
    overrides = ["minimize.fit=1/2*sumsq(X - W @ H)"] if divergence == "frobenius" else []
    net = unroll.compile("nmf", dims={"m": M, "n": N, "r": R}, dtype=torch.float64, overrides=overrides)
    want = non_negative_factorization(
        x.numpy(), W=w.numpy().copy(), H=h.numpy().copy(), n_components=R, init="custom", solver="mu", beta_loss=divergence, max_iter=20, tol=0
    )  # fmt: skip
    for found, right in zip(net(x.mT, w.mT, h.mT), want, strict=False):
        torch.testing.assert_close(found.mT, torch.as_tensor(right), rtol=1e-10, atol=1e-12)


JOINT = {
    "algorithm": "joint", "solves": "f(x) + g(y) + H(x, y)", "scalars": {"step": "1 / (L(H, x) + L(H, y))"},
    "updates": {"v": "x - step * grad(H, x)", "w": "y - step * grad(H, y)", "x": "prox(step * f, v)", "y": "prox(step * g, w)"},
}  # fmt: skip


def test_a_number_reads_the_constant_of_one_variable_at_the_other_where_the_layer_begins() -> None:
    net = unroll.compile(
        {**PALM, "algorithms": {"joint": JOINT}, "unroll": {**PALM["unroll"], "algorithm": "joint"}},
        dtype=torch.float64,
    )
    x, d0 = drawn(3, M, N), drawn(3, M, R, seed=1) / 3
    d, z = d0, torch.zeros(3, R, N, dtype=torch.float64)
    size = lambda a: torch.linalg.matrix_norm(a, 2)[..., None, None] ** 2
    for k in range(4):
        step = 1 / (torch.where(size(z) == 0, 1, size(z)) + size(d))
        v, w = d - step * (d @ z - x) @ z.mT, z - step * d.mT @ (d @ z - x)
        d, z = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1), soft(w, 0.1 * step)
        torch.testing.assert_close(net(x.mT, d0.mT, layers=k + 1)[1].mT, z, rtol=1e-10, atol=1e-12)


CONVEX: dict[str, Any] = {
    "name": "o", "dims": {"n": 4}, "variables": {"a": ["n"], "b": ["n"]}, "inputs": {"u": ["n"]}, "parameters": {"A": ["n", "n"]},
    "scalars": {"lam": 0.1}, "unroll": {"algorithm": "joint_proximal_gradient", "layers": 1},
}  # fmt: skip
HESSIANS = {
    "sumsq(u - A @ a - b)": True, "sumsq(u - a) + sumsq(A @ a - b)": True, "sumsq(u - a * b)": False, "sumsq(a - u) + dot(a, b)": False,
    "sumsq(a) + sumsq(b) + 4*dot(a, b)": False, "sumsq(a + b) - sumsq(b)": False, "sumsq(A @ (a - b)) + sumsq(a * u)": True,
}  # fmt: skip


@pytest.mark.parametrize("smooth", HESSIANS)
def test_what_is_convex_in_two_variables_together(smooth: str) -> None:
    """Against the least eigenvalue of the Hessian of the pair, by autograd, at random points; nothing else is taken by a step of both."""
    spec = {**CONVEX, "minimize": {"f": smooth, "g": "lam*norm1(a)"}}
    loss: Any = unroll.loss({k: v for k, v in spec.items() if k != "unroll"})
    u, a_matrix = drawn(4), drawn(4, 4, seed=1)
    given = {n: v for n, v in {"u": u, "A": a_matrix}.items() if n in loss.shapes}
    of = lambda p: loss.terms(a=p[:4], b=p[4:], **given)["f"]
    least = min(
        float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(of, drawn(8, seed=s)))[0]) for s in range(5)
    )  # type: ignore[no-untyped-call]
    assert (least >= -1e-9) == HESSIANS[smooth]
    if HESSIANS[smooth]:
        assert "monotone" in " ".join(unroll.derive(spec).exact.notes)
    else:
        with pytest.raises(UnrollError, match="E303.*not known to be convex|E303.*no letter is of that"):
            unroll.derive(spec)


def test_a_step_in_units_of_one_constant_is_refused_where_there_are_two() -> None:
    spec = {**CONVEX, "minimize": {"f": "sumsq(u - A @ a - b)"}, "unroll": {**CONVEX["unroll"], "step": "0.5/L"}}
    with pytest.raises(UnrollError, match="E304.*several variables"):
        unroll.derive(spec)
    spec["unroll"]["step"] = "0.01"
    unroll.derive(spec)


def test_where_an_update_needs_a_constant_that_is_not_known_the_update_can_be_given():
    spec = {**CONVEX, "minimize": {"f": "sum((u - A @ a - b)**4)"}, "unroll": {"algorithm": "palm", "layers": 2}}
    with pytest.raises(UnrollError, match="E304") as refused:
        unroll.derive(spec)
    assert refused.value.hint == "give the update yourself: updates: {step_x: 0.01}"
    spec["unroll"]["updates"] = {"step_x": "0.01", "step_y": "0.01"}
    unroll.derive(spec)


OWN = {
    "algorithm": "own",
    "solves": "f(x) + g(y) + H(x, y)",
    "updates": {"x": "x - grad(H, x)", "y": "prox(f, x) + grad(H, x)"},
}
BROKEN = {
    "grad(H, z)": "none of the variables of H", "grad(H, x, z=y)": "has no variable 'z'", "x / L(H)": "several variables", "grad(H, x, y=x)": "E131",
    "x * L(f)": "E3", "x * H(x)": "takes 2 arguments",
}  # fmt: skip


@pytest.mark.parametrize("formula", BROKEN)
def test_formulas_that_do_not_fit_several_variables_are_refused(formula: str) -> None:
    text = {**OWN, "updates": {"x": formula, "y": "prox(g, y - grad(H, y))", "v": "prox(f, x)"}}
    with pytest.raises(UnrollError, match=BROKEN[formula]):
        unroll.compile({**PALM, "algorithms": {"own": text}, "unroll": {"algorithm": "own", "layers": 1}})


def test_one_variable_more_than_a_text_has_is_said() -> None:
    with pytest.raises(UnrollError, match="E303.*minimises over z, and the problem over D and Z"):
        unroll.compile({**CODES, "unroll": {"algorithm": "proximal_gradient", "layers": 1}})
    with pytest.raises(UnrollError, match="E303.*minimises over x and y, and the problem over z"):
        unroll.compile("lasso", dims={"m": 3, "n": 4}, overrides=["unroll.algorithm=palm", "unroll.layers=2"])


INTERCEPT = {
    "dims": {"m": 30, "n": 6}, "inputs": {"y": ["m"]}, "parameters": {"A": ["m", "n"]}, "variables": {"w": ["n"], "b": []}, "scalars": {"lam": 0.5},
    "minimize": {"fit": "sum(logistic(y * (A @ w + b)))", "size": "lam * norm1(w)"},
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ["joint_proximal_gradient", "palm"])
def test_an_intercept_without_a_penalty_is_that_of_cvxpy(algorithm: str) -> None:
    """Labels of one class by far, features that are not centred; and a blank sample, which leaves both where they start."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(30, 6, generator=g, dtype=torch.float64) + 0.3
    y = torch.where(torch.rand(3, 30, generator=g, dtype=torch.float64) < 0.8, 1.0, -1.0).double()
    y[2] = 0
    spec = {**INTERCEPT, "unroll": {"algorithm": algorithm, "layers": 3000}}
    w, b = unroll.compile(spec, parameters={"A": a}, dtype=torch.float64)(y)
    for i in range(2):
        own, shift = cp.Variable(6), cp.Variable()
        loss = cp.sum(cp.logistic(-cp.multiply(y[i].numpy(), a.numpy() @ own + shift))) + 0.5 * cp.norm1(own)
        best = cp.Problem(cp.Minimize(loss)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11)
        own.value, shift.value = w[i].numpy(), b[i].numpy()
        assert abs(loss.value - best) <= 1e-8 * best and abs(shift.value) > 0.1
    assert (w[2] == 0).all() and b[2] == 0


@pytest.mark.parametrize("algorithm", ["joint_proximal_gradient", "palm"])
def test_a_number_beside_a_vector_needs_no_batch(algorithm: str) -> None:
    spec = {
        "dims": {"n": 5}, "variables": {"z": ["n"], "b": []}, "inputs": {"x": ["n"]},
        "minimize": {"f": "1/2*sumsq(x - z - b)", "l": "0.1*norm1(z)"},
    }  # fmt: skip
    net = unroll.compile({**spec, "unroll": {"algorithm": algorithm, "layers": 3}}, dtype=torch.float64)
    x = drawn(2, 5)
    one, both = net(x[0]), net(x)
    assert all(torch.equal(a, b[0]) for a, b in zip(one, both, strict=True)) and one[1].shape == ()
    found = unroll.solve(spec, x, algorithm=algorithm)
    z, b = found.values["z"], found.values["b"]
    wanted = torch.nn.functional.softshrink(x - b[:, None], 0.1)  # both optimal, given the other
    torch.testing.assert_close(z, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(b, (x - z).mean(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("algorithm", ["joint_proximal_gradient", "palm"])
def test_a_term_that_is_affine_in_one_variable_has_a_step(algorithm: str) -> None:
    """Its Lipschitz constant is 0, and a step of 1 is taken."""
    spec = {
        "dims": {"n": 3}, "variables": {"z": ["n"], "w": ["n"]}, "inputs": {"x": ["n"]},
        "minimize": {"f": "1/2*sumsq(x - z) + sum(w)", "g": "2*norm1(w)"}, "unroll": {"algorithm": algorithm, "layers": 50},
    }  # fmt: skip
    x = drawn(2, 3)
    z, w = unroll.compile(spec, dtype=torch.float64)(x)
    torch.testing.assert_close(z, x)
    assert (w == 0).all()
