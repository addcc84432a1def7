"""Rewrites: exact ones change no value on many spellings; bounded ones keep their bound, which is not vacuous; each says where it fits."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

import unroll
from unroll.calculus.gradient import gradient
from unroll.derivation.rewrites.catalogue import REWRITES
from unroll.derivation.rewrites.exact import smaller_side
from unroll.derivation.rewrites.rewriting import apply, read
from unroll.errors import SpecError
from unroll.language.constructors import symbol
from unroll.language.nodes import Expr, Inverse, Sym, dim, scalar, walk
from unroll.language.parse import Scope, nowhere, parse_matrix
from unroll.network.evaluate import Evaluator, evaluate

d, N, p, K = (dim(n) for n in ("d", "N", "p", "K"))
a, c, r = (scalar(n, positive=True) for n in ("a", "c", "r"))
Z, Y = symbol("Z", d, N, "variable", 2), symbol("Y", d, N, "input", 2)
U, Q, D = symbol("U", d, p, "parameter", 2, K), symbol("Q", d, d), symbol("D", d, d)
O, F = symbol("O", d, p, props={"orthonormal"}), symbol("F", d, 2 * d)
SCOPE = Scope({s.name: s for s in (Z, Y, U, Q, D, O, F, d, N, p, K, a, c, r)}, broadcast=True)
SIZES = {"wide": {d: 4, N: 7, p: 2, K: 3}, "tall": {d: 6, N: 3, p: 2, K: 2}, "one": {d: 1, N: 1, p: 1, K: 1}}


def values(sizes: dict[sp.Symbol, int], seed: int = 0) -> dict[Sym, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    n = {k.name: v for k, v in sizes.items()}
    return {
        Z: draw(n["d"], n["N"]), Y: draw(n["d"], n["N"]), U: draw(n["K"], n["d"], n["p"]), Q: torch.linalg.qr(draw(n["d"], n["d"])).Q,
        D: draw(n["d"], n["d"]), O: torch.linalg.qr(draw(n["d"], n["p"])).Q, F: torch.linalg.qr(draw(2 * n["d"], n["d"])).Q.mT,
    }  # fmt: skip


def at(e: Expr, size: str, **scalars: float) -> Tensor:
    numbers: dict[Any, Any] = {a: 1.3, c: 0.4, r: 0.2} | {{"a": a, "c": c, "r": r}[k]: v for k, v in scalars.items()}
    return evaluate(e, values(SIZES[size]), {**numbers, **SIZES[size]})


def rewritten(text: str, call: str) -> tuple[Expr, Expr, Any]:
    e = parse_matrix(text, SCOPE)
    after, applied = apply(read(call, SCOPE, nowhere), e)
    assert applied.sites, f"{call} finds nothing in {text}"
    return e, after, applied


EXACT = {
    "an N x N inverse": ("Z @ inv(I(N) + c * Z.T @ Z)", "push_through(to=d)"),
    "a d x d inverse": ("inv(I(d) + c * Z @ Z.T) @ Z", "push_through(to=N)"),
    "a ridge": ("2 * inv(a * I(d) + c * Z @ Z.T) @ Z @ Y.T", "push_through(to=N)"),
    "grouped otherwise": ("inv(r * I(N) + c * (Z.T @ U_ @ U_.T @ Z)) @ (Z.T @ U_)", "push_through(to=p)"),
    "in the middle": ("Y.T @ inv(I(d) + c * Z @ Z.T) @ Z", "push_through(to=N)"),
    "a determinant": ("logdet(I(d) + c * Z @ Z.T)", "push_through(to=N)"),
    "a determinant with a ridge": ("logdet(a * I(N) + c * Z.T @ Z)", "push_through(to=d)"),
    "a family": ("sum(U[k] @ inv(I(p) + c * U[k].T @ Z @ Z.T @ U[k]) @ U[k].T @ Z for k in K)", "push_through(to=N)"),
    "woodbury": ("inv(a * I(d) + c * O @ O.T) @ Z", "woodbury"),
    "woodbury, plain": ("inv(I(d) + O @ O.T)", "woodbury"),
    "expand": ("(Z + Y) @ (Z - Y).T @ Q", "expand"),
    "expand beside weights": ("((Q - D) @ Z) * sum(Y, axis=0)", "expand"),
    "collect": ("Q @ Z - c * D @ Z + Y", "collect(Z)"),
    "shares of a shift": (
        "sum(softmax(sum(Y, axis=0) + sum(U[k].T @ Z, axis=0), over=k) * sum(U[k].T @ Y, axis=0) for k in K)",
        "shares",
    ),
    "shares of what is common": ("sum(Z * softmax(sum(U[k].T @ Z, axis=0), over=k) for k in K)", "shares"),
    "all shifts": ("inv(a * I(d) + c * shifts(Z, d) @ shifts(Z, d).T) @ Y", "circulant_to_fft"),
    "a determinant of all shifts": ("logdet(I(d) + c * shifts(Z, d) @ shifts(Z, d).T)", "circulant_to_fft"),
    "shares alone": ("sum(softmax(sum(U[k].T @ Z, axis=0), over=k) for k in K)", "shares"),
}
SCOPE.names["U_"] = O  # type: ignore[index]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_rewrite_changes_no_value(name: str, size: str) -> None:
    e, after, _ = rewritten(*EXACT[name])
    assert after is not e
    assert torch.allclose(at(after, size), at(e, size), rtol=1e-10, atol=1e-10)


def test_push_through_goes_to_the_side_that_is_asked_for() -> None:
    _, after, _ = rewritten("inv(I(d) + c * Z @ Z.T) @ Z", "push_through(to=N)")
    assert {x.rows for x in walk(after) if isinstance(x, Inverse)} == {N}


def test_the_smaller_side_is_taken_where_sizes_are_known() -> None:
    e = parse_matrix("logdet(I(d) + c * Z @ Z.T) + trace(Z @ inv(I(N) + c * Z.T @ Z) @ Y.T)", SCOPE)
    for size, small in (("wide", d), ("tall", N)):
        out = smaller_side(e, SIZES[size])
        inner = [x.x.rows for x in walk(out) if type(x).__name__ in ("Inverse", "LogDet")]  # type: ignore[attr-defined]
        assert inner == [small, small]
        assert torch.allclose(at(out, size), at(e, size))


@pytest.mark.parametrize("size", SIZES)
def test_a_determinant_that_would_lose_its_symmetric_form_stays_as_written(size: str) -> None:
    e = parse_matrix("logdet(I(d) + r * (inv(I(d) + c*Z @ Z.T) @ Z) @ (inv(I(d) + c*Z @ Z.T) @ Z).T)", SCOPE)
    assert torch.allclose(at(smaller_side(e, SIZES[size]), size), at(e, size))


SPELLINGS = {
    "p x p": "sum(1/2 * logdet(I(p) + c * U[k].T @ Z @ Z.T @ U[k]) for k in K)",
    "N x N": "sum(1/2 * logdet(I(N) + c * Z.T @ U[k] @ U[k].T @ Z) for k in K)",
    "scaled": "sum(1/2 * logdet(2 * I(p) + 2*c * U[k].T @ Z @ Z.T @ U[k]) for k in K)",
    "grouped": "1/2 * sum(logdet(I(p) + c * (U[k].T @ Z) @ (U[k].T @ Z).T) for k in K)",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_rate_becomes_attention(name: str) -> None:
    slope = gradient(parse_matrix(SPELLINGS[name], SCOPE), Z)
    series, first = apply(read("neumann(order=1)", SCOPE, nowhere), slope)
    attention, second = apply(read("gram_to_softmax(scale=r)", SCOPE, nowhere), series)
    assert first.sites and second.sites
    z, u = values(SIZES["wide"])[Z], values(SIZES["wide"])[U]
    v = u.mT @ z
    want = 0.4 * (u @ v).sum(0) - 0.4**2 * (u @ v @ (0.2 * v.mT @ v).softmax(-2)).sum(0)
    assert torch.allclose(at(attention, "wide"), want, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("weight", [0.3, 0.03, 0.003])
@pytest.mark.parametrize(
    ("written", "shift"), [("I(d)", 1.0), ("a * I(d)", 1.3), ("7 * I(d)", 7.0), ("a**2/4*I(d)", 0.4225)]
)
def test_neumann_stays_within_its_bound_and_is_not_the_identity(
    order: int, weight: float, written: str, shift: float
) -> None:
    _, _, applied = rewritten(f"inv({written} + c * Z @ Z.T) @ Y", f"neumann(order={order})")
    (site,) = applied.sites
    assert site.core is not None
    before, after = (at(x, "wide", c=weight) for x in site.core)
    rho = float(at(site.assumption, "wide", c=weight))
    truth = float(torch.linalg.matrix_norm(weight / shift * values(SIZES["wide"])[Z] @ values(SIZES["wide"])[Z].mT, 2))
    assert rho == pytest.approx(truth)
    gap = float(torch.linalg.matrix_norm(before - after, 2) / torch.linalg.matrix_norm(before, 2))
    limit = applied.rewrite.limit(rho, order=order)
    if rho < 1:
        assert 0 < gap <= limit < 1
    else:
        assert limit == float("inf")


def test_the_spectral_bound_is_one_and_is_tight_at_eigenvectors() -> None:
    e, after, applied = rewritten("logdet(I(d) + c * Z @ Z.T)", "spectral_bound(Q)")
    assert applied.rewrite.stage == "objective"
    assert float(at(after, "wide")) >= float(at(e, "wide"))
    z = values(SIZES["wide"])[Z]
    best = {**values(SIZES["wide"]), Q: torch.linalg.eigh(z @ z.mT).eigenvectors}
    tight = Evaluator(best, {a: 1.3, c: 0.4, r: 0.2, **SIZES["wide"]}, {})
    assert float(tight(after)) == pytest.approx(float(tight(e)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("by", "bounds"), [("Q", True), ("F", True), ("O", False)])
def test_the_spectral_bound_needs_rows_that_are_orthonormal(by: str, bounds: bool, size: str) -> None:
    """Of any frame with Q Q' = I, as log is concave; of a tall Q what lies outside its span is lost, and the assumption says so."""
    e, after, applied = rewritten("logdet(a * I(d) + c * Z @ Z.T)", f"spectral_bound({by})")
    off = float(at(applied.sites[0].assumption, size))
    whole = bounds or SIZES[size][d] == SIZES[size][p]
    assert off == pytest.approx(0 if whole else 1, abs=1e-12)
    assert (float(at(after, size)) >= float(at(e, size)) - 1e-12) is whole


def test_the_spectral_bound_of_a_frame_is_tight_too() -> None:
    """Eigenvectors beside as many zeros."""
    e, after, _ = rewritten("logdet(a * I(d) + c * Z @ Z.T)", "spectral_bound(F)")
    z = values(SIZES["wide"])[Z]
    v = torch.linalg.eigh(z @ z.mT).eigenvectors
    tight = Evaluator({Z: z, F: torch.cat([v, 0 * v], 1)}, {a: 1.3, c: 0.4, **SIZES["wide"]}, {})
    assert float(tight(after)) == pytest.approx(float(tight(e)))


def test_a_frame_and_an_incoherent_dictionary_are_taken_for_the_identity() -> None:
    e, after, applied = rewritten("sum(U[k] @ U[k].T @ Z for k in K)", "tight_frame(U)")
    assert after is Z
    u = values(SIZES["wide"])[U]
    frame = sum(m @ m.mT for m in u) - torch.eye(4, dtype=torch.float64)
    assert float(at(applied.sites[0].assumption, "wide")) == pytest.approx(float(torch.linalg.matrix_norm(frame, 2)))
    assert torch.linalg.norm(at(e, "wide") - at(after, "wide")) <= float(
        at(applied.sites[0].assumption, "wide")
    ) * torch.linalg.norm(at(after, "wide"))
    assert rewritten("D.T @ D @ Z", "incoherent(D)")[1] is Z


@pytest.mark.parametrize("text", ["sum(Z @ Y.T)", "inv(Q)", "sum(U[k].T @ Z @ Z.T for k in K)", "Z"])
@pytest.mark.parametrize(
    "call",
    [
        "neumann(order=1)",
        "gram_to_softmax",
        "tight_frame(U)",
        "incoherent(D)",
        "woodbury",
        "spectral_bound(Q)",
        "push_through(to=N)",
    ],
)
def test_a_rewrite_leaves_alone_what_it_does_not_fit(text: str, call: str) -> None:
    e = parse_matrix(text, SCOPE)
    out, applied = apply(read(call, SCOPE, nowhere), e)
    assert out is e and not applied.sites


def test_running_sums_follow_each_prefix() -> None:
    e, after, _ = rewritten("(Z**2 @ sum(Y, axis=0).T / sum(Y)) @ ones(1, N) * Z", "causal(over=N)")
    del e
    z, y = values(SIZES["wide"])[Z], values(SIZES["wide"])[Y]
    w = y.sum(0)
    for j in range(7):
        want = (z[:, : j + 1] ** 2 @ w[: j + 1]) / w[: j + 1].sum() * z[:, j]
        assert torch.allclose(at(after, "wide")[:, j], want)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("neumann(order=Z)", "must be a whole number"),
        ("tight_frame(V)", "declared symbol"),
        ("gram_to_softmax(causal=1)", "True or False"),
        ("tight_frame", "missing"),
        ("neumann(1, 2)", "too many"),
    ],
)
def test_wrong_arguments_are_refused(call: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        read(call, SCOPE, nowhere)
    assert refused.value.code == "E308"


def test_every_rewrite_is_used_here() -> None:
    import pathlib

    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert all(f.name in text for f in REWRITES)


def test_check_says_where_a_series_diverges_and_where_it_does_not() -> None:
    for eps2, verdict in ((0.25, "does NOT hold"), (1e4, "holds")):
        rows = unroll.check("crate_neumann", overrides=["unroll.layers=1", f"scalars.eps2={eps2}"]).rows
        (row,) = [r for r in rows if "neumann" in r.law]
        assert row.verdict == verdict


@pytest.mark.parametrize(
    ("shift", "rho", "verdict"), [(1, 2.0, "does NOT hold"), (4, 0.5, "holds"), (8, 0.25, "holds")]
)
def test_what_a_series_assumes_is_measured_against_the_identity_as_it_is_scaled(
    shift: int, rho: float, verdict: str
) -> None:
    """|X X'| = 2 in all three: what decides is |X X'| / shift."""
    spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "inputs": {"X": ["n", "n"]},
        "minimize": {"f": f"1/2 * sum(z * (inv({shift} * I(n) + X @ X.T) @ z))"},
        "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1, "rewrites": ["neumann(order=1)"]},
    }
    given = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64).sqrt())
    (row,) = [r for r in unroll.check(spec, inputs={"X": given}).rows if "neumann" in r.law]
    assert (row.verdict, f"it is {rho:.3g};" in row.measured) == (verdict, True), row


@pytest.mark.parametrize("order", ["-1", "1/2", "1.5", "n"])
def test_an_order_is_a_whole_number(order: str) -> None:
    written = f"""
    dims: {{n: 4, N: 3}}
    variables: {{Z: [n, N]}}
    inputs: {{X: [n, N]}}
    minimize: 1/2 * logdet(I(n) + Z @ Z.T) + 1/2 * sumsq(X - Z)
    unroll: {{algorithm: gradient_descent, layers: 1, step: 0.1, rewrites: [neumann(order={order})]}}
    """
    with pytest.raises(unroll.UnrollError, match="order must be a whole number from 0") as refusal:
        unroll.compile(written)
    assert refusal.value.code == "E308"


@pytest.mark.parametrize("objective", ["logdet(I(p) + V.T @ Z @ Z.T @ V) + sumsq(Z - X)", "sumsq(V.T @ Z + W @ Z - Y)"])
def test_what_is_collected_need_not_be_square(objective: str) -> None:
    spec = {
        "dims": {"d": 4, "p": 2, "N": 3},
        "variables": {"Z": ["d", "N"]},
        "inputs": {"X": ["d", "N"], "Y": ["p", "N"]},
        "parameters": {"V": ["d", "p"], "W": ["p", "d"]},
        "minimize": {"f": objective},
        "unroll": {"algorithm": "gradient_descent", "layers": 2, "step": 0.05},
    }
    plain = unroll.compile(spec, dtype=torch.float64)
    collected = unroll.compile(
        spec, overrides=["unroll.rewrites=[collect(Z)]"], parameters=plain.given, dtype=torch.float64
    )
    given = [torch.randn(2, 3, n, dtype=torch.float64) for n in (4, 2)]
    start = torch.randn(2, 3, 4, dtype=torch.float64)
    assert (plain(*given, Z=start) - collected(*given, Z=start)).abs().max() < 1e-12
