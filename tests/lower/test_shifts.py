"""Cyclic shifts: the operator, the rewrite of circulant matrices per frequency, and the ReduNet that commutes with them."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import released
import sympy as sp
import torch
from torch import Tensor

import unroll
from unroll.calculus.gradient import gradient
from unroll.derivation.rewrites.catalogue import REWRITES
from unroll.derivation.rewrites.frequencies import circulant_block, circulant_to_fft, per_frequency
from unroll.emit.interpret import difference
from unroll.language.constructors import conjugated, matmul, operator, rename_index, signal, spectrum, symbol
from unroll.language.nodes import Expr, Op, Signal, Spectrum, Sym, dim, free_indices, walk
from unroll.language.parse import Scope, parse_matrix
from unroll.language.problem import Problem, from_spec
from unroll.language.show import latex, pretty, text
from unroll.lower.graph import half_spectrum, lower_step, lower_terms
from unroll.lower.passes import Sizes, optimise
from unroll.network.evaluate import Evaluator, evaluate
from unroll.spec import load

GRIDS = [
    (2, (5,), 6, 2),
    (1, (4,), 3, 2),
    (3, (1,), 4, 2),
    (2, (6,), 1, 1),
    (2, (3, 4), 6, 3),
    (1, (1, 4), 2, 1),
    (2, (4, 1), 3, 1),
]
"""(channels, places, samples, classes): even, odd and single places, one channel, one sample, one class."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.is_complex() == b.is_complex()
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1))


def sizes(c: int, grid: tuple[int, ...], K: int) -> dict[str, int]:
    return {"c": c, "K": K, **dict(zip("T" if len(grid) == 1 else "HW", grid, strict=True))}


def name(grid: tuple[int, ...]) -> str:
    return "redunet_1d" if len(grid) == 1 else "redunet_2d"


def moved(x: Tensor, c: int, grid: tuple[int, ...], s: tuple[int, ...]) -> Tensor:
    """Rows, channels by places, with their places moved on by s."""
    axes = tuple(range(-len(grid), 0))
    return x.unflatten(-1, (c, *grid)).roll(s, axes).flatten(-len(grid) - 1)


def everywhere(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*map(range, grid)))


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_columns_of_shifts_are_the_shifted_columns(c: int, grid: tuple[int, ...], N: int, K: int) -> None:
    X = symbol("X", c * math.prod(grid), N)
    places = tuple(map(sp.Integer, grid))
    x = drawn(c * math.prod(grid), N)
    found = evaluate(operator("shifts", X, sizes=places), {X: x}, {})
    wanted = [moved(x.mT, c, grid, s)[n] for n in range(N) for s in everywhere(grid)]
    assert torch.equal(found, torch.stack(wanted, 1))
    Y = symbol("Y", *found.shape)
    y = drawn(*found.shape, seed=1)
    back = evaluate(operator("shifts", Y, adjoint=True, sizes=places), {Y: y}, {})
    assert torch.allclose((found * y).sum(), (x * back).sum(), rtol=1e-12)


def test_what_is_no_multiple_of_the_places_is_refused() -> None:
    spec: dict[str, Any] = {
        "objective": "o",
        "dims": {"n": "length", "T": "places"},
        "variables": {"z": ["n"]},
        "minimize": "sumsq(shifts(z, T))",
    }
    with pytest.raises(unroll.SpecError, match="not a multiple of T"):
        from_spec(load(spec))


# --- the rewrite ------------------------------------------------------------------------------------------------------

SCOPE = {
    "c": dim("c"),
    "b": dim("b"),
    "T": dim("T"),
    "H": dim("H"),
    "W": dim("W"),
    "n": dim("n"),
    "m": dim("m"),
    "K": dim("K"),
}
C, B, T, H, W, N, M, K = SCOPE.values()
SYMBOLS = [
    symbol("X", C * T, N), symbol("Y", C * T, N), symbol("A", C * T, B), symbol("M", B * T, M), symbol("P", M, C * T), symbol("v", N), symbol("u", C * T),
    symbol("pi", N, family=K), symbol("g", N * T), symbol("I2", C * H * W, N), symbol("M2", C * H * W, M), symbol("G", C * T, C * T),
]  # fmt: skip
FORMULAS = {
    "a determinant": "logdet(I(c*T) + 3 * shifts(X, T) @ shifts(X, T).T)",
    "its other side": "logdet(2 * I(n*T) + shifts(X, T).T @ shifts(X, T))",
    "a scaled determinant": "logdet(2 * I(c*T) + 6 * shifts(X, T) @ shifts(X, T).T)",
    "of a sum": "logdet(I(c*T) + shifts(X, T) @ shifts(X, T).T + 2 * shifts(Y, T) @ shifts(Y, T).T)",
    "with weights": "logdet(I(c*T) + shifts(X, T) @ diag(repeat(v**2, T)) @ shifts(X, T).T)",
    "with repeated and then squared weights": "logdet(I(c*T) + shifts(X, T) @ diag(repeat(v, T)**2) @ shifts(X, T).T)",
    "with weights and one": "logdet(I(c*T) + shifts(X, T) @ diag(repeat(v**2, T) + ones(n*T)) @ shifts(X, T).T)",
    "of a family": "sum(logdet(I(c*T) + shifts(X, T) @ diag(repeat(exp(pi[k]), T)) @ shifts(X, T).T) for k in K)",
    "of the sum of a family": "logdet(I(c*T) + sum(shifts(X, T) @ diag(repeat(exp(pi[k]), T)) @ shifts(X, T).T for k in K))",
    "of a quotient": "logdet(I(c*T) + shifts(X, T) @ shifts(X, T).T / sumsq(X))",
    "an inverse": "inv(I(c*T) + shifts(X, T) @ shifts(X, T).T)",
    "an inverse times": "inv(I(c*T) + shifts(X, T) @ shifts(X, T).T) @ X",
    "times an inverse": "P @ inv(I(c*T) + shifts(X, T) @ shifts(X, T).T)",
    "between": "P @ inv(I(c*T) + shifts(X, T) @ shifts(X, T).T) @ X @ v",
    "of no symmetry": "inv(5 * I(c*T) + shifts(X, T) @ shifts(Y, T).T) @ u",
    "of an inverse": "inv(I(c*T) + inv(I(c*T) + shifts(X, T) @ shifts(X, T).T)) @ X",
    "a convolution": "shifts(A, T) @ M",
    "a correlation": "shifts(X, T).T @ Y",
    "convolved twice": "shifts(X, T) @ shifts(Y, T).T @ u",
    "the adjoint": "shifts_T(inv(I(c*T) + shifts(X, T) @ shifts(X, T).T) @ shifts(Y, T), T)",
    "held": "stop_gradient(inv(I(c*T) + shifts(X, T) @ shifts(X, T).T)) @ X",
    "two dimensions": "logdet(I(c*H*W) + shifts(I2, H, W) @ shifts(I2, H, W).T)",
    "an inverse in two dimensions": "inv(I(c*H*W) + shifts(I2, H, W) @ shifts(I2, H, W).T) @ M2",
}  # fmt: skip
MIXED = {
    "weighed and convolved": "shifts(X, T) @ diag(g) @ shifts(Y, T).T @ Y @ v",
    "a product that stays symmetric": "logdet(I(c*T) + shifts(X, T) @ diag(repeat(v, T) * g)**2 @ shifts(X, T).T) * (shifts(X, T).T @ X @ v)",
}  # fmt: skip
NUMBERS = [
    {C: 2, B: 3, T: 5, H: 3, W: 4, N: 4, M: 2, K: 3},
    {C: 1, B: 1, T: 4, H: 2, W: 1, N: 1, M: 1, K: 1},
    {C: 3, B: 2, T: 1, H: 1, W: 2, N: 2, M: 3, K: 2},
]


def parsed(formula: str) -> Expr:
    return parse_matrix(formula, Scope({**SCOPE, **{s.name: s for s in SYMBOLS}}))


def values(numbers: dict[sp.Symbol, int]) -> dict[Sym, Tensor]:
    def size(n: sp.Expr) -> int:
        return int(n.subs(numbers))

    return {
        s: 0.5 * drawn(*([size(s.family)] if s.family is not None else []), size(s.rows), size(s.cols), seed=i)
        for i, s in enumerate(SYMBOLS)
    }


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_the_rewrite_changes_no_value_and_leaves_no_matrix_of_all_places(formula: str) -> None:
    e = parsed(formula)
    out = per_frequency(e)
    assert out is not e
    places = H * W if "H" in formula else T
    square = [
        x
        for x in walk(out)
        if not isinstance(x, Op) and (x.cols / places).subs({C: 2, N: 3}).is_integer and (x.rows / places).is_integer
    ]
    assert not square or e.shape == (C * T, C * T)
    for numbers in NUMBERS:
        given = values(numbers)
        assert gap(evaluate(out, given, numbers), evaluate(e, given, numbers)) < 1e-10


@pytest.mark.parametrize("formula", MIXED.values(), ids=MIXED)
def test_the_rewrite_changes_no_value_beside_what_does_not_commute(formula: str) -> None:
    e = parsed(formula)
    for numbers in NUMBERS:
        given = values(numbers)
        assert gap(evaluate(per_frequency(e), given, numbers), evaluate(e, given, numbers)) < 1e-10
    assert per_frequency(e) is not e


def test_what_does_not_commute_with_shifts_is_left_alone() -> None:
    for formula in (
        "inv(G + shifts(X, T) @ shifts(X, T).T) @ u",
        "logdet(G @ G.T + I(c*T))",
        "shifts(X, T) @ diag(repeat(v, T))",
        "X @ v",
    ):
        e = parsed(formula)
        assert circulant_to_fft()(e) is None
        assert per_frequency(e) is e
    e = parsed("logdet(I(c*T) + shifts(X, T) @ diag(repeat(v, T) * g) @ shifts(X, T).T)")
    assert per_frequency(e) is e, "weights of each place"
    assert circulant_block(parsed("shifts(I2, H, W)"), (T,), "w") is None, "other places"


def test_a_matrix_is_the_one_with_its_blocks() -> None:
    """Fᴴ A F is block diagonal with the blocks of the rewrite: by explicit Fourier matrices."""
    numbers = NUMBERS[0]
    e = parsed("inv(I(c*T) + shifts(X, T) @ shifts(Y, T).T)")
    block = circulant_block(e, (T,), "w")
    assert block is not None
    given, n = values(numbers), numbers[T]
    full = evaluate(e, given, numbers)
    fourier = torch.fft.fft(torch.eye(n, dtype=torch.complex128), norm="ortho")
    F = torch.kron(torch.eye(numbers[C], dtype=torch.complex128), fourier)
    diagonal = (F @ full.to(F.dtype) @ F.conj().mT).unflatten(0, (-1, n)).unflatten(2, (-1, n))
    for i, j in product(range(n), range(n)):
        wanted = Evaluator(given, numbers, {"w": i})(block) if i == j else torch.zeros(2, 2, dtype=torch.complex128)
        assert (diagonal[:, i, :, j] - wanted).abs().max() < 1e-12


def test_the_rewrite_is_listed_as_exact() -> None:
    record = next(r for r in REWRITES if r.name == "circulant_to_fft")
    assert record.kind == "exact" and record.stage == "step"


def test_transforms_cancel_and_keep_one_form() -> None:
    X = SYMBOLS[0]
    x = spectrum("w", (T,), X)
    assert signal("w", (T,), x) is X
    twisted = matmul(x, parsed("diag(v)"))
    assert signal("w", (T,), twisted) is matmul(X, parsed("diag(v)")), (
        "what does not depend on the frequency stands outside"
    )
    body = matmul(x, conjugated(x).T, x)
    y = signal("w", (T,), body)
    assert isinstance(y, Signal) and spectrum("q", (T,), y) is rename_index(body, "w", "q")
    assert spectrum("w", (T,), y, conjugate=True) is conjugated(body)
    assert conjugated(conjugated(body)) is body
    assert free_indices(body) == {"w"} and free_indices(y) == frozenset()
    bound = signal("q", (T,), matmul(spectrum("q", (T,), X), conjugated(x).T, spectrum("q", (T,), X)))
    assert (
        isinstance(renamed := rename_index(bound, "w", "q"), Signal)
        and renamed.index == "q_"
        and free_indices(renamed) == {"q"}
    )
    assert spectrum("w", (sp.Integer(1),), X) is X and signal("w", (sp.Integer(1),), X) is X


def test_what_is_worked_out_per_frequency_is_shown() -> None:
    X = SYMBOLS[0]
    e = per_frequency(parsed("inv(I(c*T) + shifts(X, T) @ shifts(X, T).T) @ u"))
    assert text(e) == "ifft(inv(I(c) + T * fft(X, T)[w] @ conj(fft(X, T)[w]).T) @ fft(u, T)[w] for w in T)"
    assert pretty(e) == "ifft((I + T fft(X, T)[w] conj(fft(X, T)[w])ᵀ)⁻¹ fft(u, T)[w] for w in T)"
    assert latex(spectrum("w", (T,), X, conjugate=True)) == r"\overline{\widehat{X}_{w}}"
    assert latex(e).startswith(r"\mathcal{F}^{-1}_{w}\left(")
    assert isinstance(next(x for x in walk(e) if isinstance(x, Spectrum)), Spectrum)


def test_derivatives_are_taken_before() -> None:
    with pytest.raises(unroll.DeriveError, match="per frequency"):
        gradient(per_frequency(parsed(FORMULAS["a determinant"])), SYMBOLS[0])


# --- the objective ----------------------------------------------------------------------------------------------------


def problem(c: int, grid: tuple[int, ...], N: int, K: int) -> tuple[Problem, dict[Any, Any]]:
    found = from_spec(load("shift_rate_reduction" + ("" if len(grid) == 1 else "_2d")), {**sizes(c, grid, K), "N": N})
    return found, {**found.dims, **{s: 0.1 for s in found.scalars}}


def labelled(c: int, grid: tuple[int, ...], N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(N, c T) signals of length 1 and their (N, K) memberships."""
    labels = torch.arange(N) % K
    return released.unit_rows(drawn(N, c * math.prod(grid), seed=seed)), torch.nn.functional.one_hot(labels, K).double()


@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_the_objective_is_rate_reduction_of_all_shifts(c: int, grid: tuple[int, ...], N: int, K: int) -> None:
    found, numbers = problem(c, grid, N, K)
    (Z,), (Pi,) = found.variables, found.inputs
    x, members = labelled(c, grid, N, K)
    all_shifts = torch.cat([moved(x, c, grid, s) for s in everywhere(grid)])
    z = x.mT.clone().requires_grad_()
    given = {Z: z, Pi: members.mT[..., None]}
    total = found.terms["rate"] + found.terms["class_rate"]
    wanted = released.rate_reduction(all_shifts, members.repeat(math.prod(grid), 1), 0.1)
    value = evaluate(total, given, numbers)
    assert gap(value.squeeze(), wanted) < 1e-10
    assert gap(evaluate(per_frequency(total), given, numbers), value) < 1e-10
    (truth,) = torch.autograd.grad(value.sum(), z)
    slope = gradient(total, Z)
    assert gap(evaluate(slope, given, numbers), truth) < 1e-10
    assert gap(evaluate(per_frequency(slope), given, numbers), truth) < 1e-10


@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_every_sample_may_be_shifted_on_its_own(c: int, grid: tuple[int, ...], N: int, K: int) -> None:
    net = flow(c, grid, K, dense=False)
    x, members = labelled(c, grid, N, K)
    places = everywhere(grid)
    y = torch.stack([moved(x[i], c, grid, places[(3 * i + 1) % len(places)]) for i in range(N)])
    a, b = (net.objective(Z=v, X=v, Pi=members.mT) for v in (x, y))
    for term in ("rate", "class_rate"):
        assert gap(a[term], b[term]) < 1e-10


# --- networks ---------------------------------------------------------------------------------------------------------


def flow(c: int, grid: tuple[int, ...], K: int, dense: bool, layers: int = 3) -> unroll.Network:
    """The exact flow, nothing learned: by dense matrices or per frequency."""
    spec = load(name(grid)).to_dict()
    own = {
        k: v
        for k, v in spec["unroll"].items()
        if k not in ("learn", "keep", "estimate") and not (dense and k == "rewrites")
    }  # type: ignore[union-attr]
    return unroll.compile(
        {**spec, "unroll": own}, dims=sizes(c, grid, K), dtype=torch.float64, overrides=[f"unroll.layers={layers}"]
    )


@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_the_flow_per_frequency_is_the_dense_flow(c: int, grid: tuple[int, ...], N: int, K: int) -> None:
    x, members = labelled(c, grid, N, K)
    dense, fast = (flow(c, grid, K, d).trace(X=x, Pi=members.mT) for d in (True, False))
    for a, b in zip(dense.iterates["Z"], fast.iterates["Z"], strict=True):
        assert gap(b, a) < 1e-10
    rate = (fast.terms["rate"] + fast.terms["class_rate"]).detach()
    assert K == 1 or N <= K or (rate[1:] > rate[:-1]).all()


@pytest.mark.parametrize("as_released", [False, True], ids=["all shifts", "released"])
@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_redunet_is_constructed_and_runs_as_the_spectral_layer(
    c: int, grid: tuple[int, ...], N: int, K: int, as_released: bool
) -> None:
    """The covariance of all shifts has a factor T. Released operators lack it: eps2 is T times larger there, and so is the step."""
    T, axes = math.prod(grid), tuple(range(2, 2 + len(grid)))
    factor = T if as_released else 1
    scalars = {"eps2": 0.1 * factor, "sharpness": 3.0 * factor}
    overrides = ["unroll.layers=3", *(["unroll.step=0.5"] if as_released else [])]
    net = unroll.compile(name(grid), dims=sizes(c, grid, K), dtype=torch.float64, scalars=scalars, overrides=overrides)
    x, members = labelled(c, grid, N, K)
    fresh = labelled(c, grid, 5, K, seed=1)[0]
    with pytest.raises(unroll.UnrollError, match="E408"):
        net(x)
    after = net.construct(X=x, Pi=members.mT)

    def to(z: Tensor) -> Tensor:
        return torch.fft.fftn(z.unflatten(1, (c, *grid)), dim=axes, norm="ortho").flatten(2)

    def back(v: Tensor) -> Tensor:
        return torch.fft.ifftn(v.unflatten(2, grid), dim=axes, norm="ortho").real.flatten(1)

    v, u = to(x), to(fresh)
    for i in range(3):
        E, Cs, gamma = released.redunet_spectral_operators(v, members, 0.1, 1 if as_released else T)
        assert gap(factor * frequencies(net.E[i], c, grid), E) < 1e-10
        assert gap(factor * frequencies(net.C[i], c, grid), gamma[:, None, None, None] * Cs) < 1e-10
        v, u = (released.redunet_spectral_layer(z, E, Cs, gamma, 0.5, 3.0) for z in (v, u))
    assert gap(after, back(v)) < 1e-10
    assert gap(net(fresh).detach(), back(u)) < 1e-10
    assert gap(net(x).detach(), after) < 1e-12, "the network on its own data does what was constructed"
    stacked = net(fresh.unflatten(0, (1, 5)))
    assert gap(stacked[0].detach(), back(u)) < 1e-10


def frequencies(kernel: Tensor, c: int, grid: tuple[int, ...]) -> Tensor:
    """What a circular convolution multiplies every frequency by: (..., c T, c) -> (..., T, c, c)."""
    places = tuple(range(-1 - len(grid), -1))
    return torch.fft.fftn(kernel.detach().unflatten(-2, (c, *grid)), dim=places).flatten(places[0], -2).movedim(-2, -3)


@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_the_network_commutes_with_shifts(c: int, grid: tuple[int, ...], N: int, K: int) -> None:
    net = unroll.compile(name(grid), dims=sizes(c, grid, K), dtype=torch.float64, overrides=["unroll.layers=3"])
    x, members = labelled(c, grid, N, K)
    after = net.construct(X=x, Pi=members.mT)
    y = labelled(c, grid, 4, K, seed=2)[0]
    assert K == 1 or N <= K or not torch.allclose(after, x, atol=1e-4), "the layers do something"
    for s in everywhere(grid):
        assert gap(net(moved(y, c, grid, s)), moved(net(y), c, grid, s)) < 1e-10
    other = unroll.compile(name(grid), dims=sizes(c, grid, K), dtype=torch.float64, overrides=["unroll.layers=3"])
    places = everywhere(grid)
    other.construct(X=torch.stack([moved(z, c, grid, places[i % len(places)]) for i, z in enumerate(x)]), Pi=members.mT)
    assert gap(other.E, net.E) < 1e-10 and gap(other.C, net.C) < 1e-10, "operators do not know where a sample was"


def test_a_gradient_reaches_every_operator_and_single_precision_holds() -> None:
    net = unroll.compile("redunet_1d", dims=sizes(2, (6,), 3), overrides=["unroll.layers=2"], scalars={"sharpness": 3})
    x, members = (t.float() for t in labelled(2, (6,), 9, 3))
    net.construct(X=x, Pi=members.mT)
    assert all(p.dtype == torch.float32 for p in net.parameters()), "convolutions are real"
    (net(x) * drawn(9, 12).float()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
    exact = net(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(net(x).detach(), exact) < 0.05
    assert gap(net(x.bfloat16().float()).detach(), exact) < 0.05


ODD = {
    "one channel": ("[T, N]", "logdet(I(T) + shifts(Z, T) @ shifts(Z, T).T)"),
    "one sample": ("[c*T]", "logdet(I(c*T) + shifts(Z, T) @ shifts(Z, T).T)"),
    "one of each": ("[T]", "logdet(I(T) + shifts(Z, T) @ shifts(Z, T).T)"),
    "two dimensions, one of each": ("[c*T]", "logdet(I(c*T) + shifts(Z, c, T) @ shifts(Z, c, T).T)"),
    "the other side": ("[c*T, N]", "logdet(I(N*T) + shifts(Z, T).T @ shifts(Z, T))"),
    "weighed": ("[c*T, N]", "logdet(I(c*T) + shifts(Z, T) @ diag(repeat(sum(Z, axis=0).T**2, T)) @ shifts(Z, T).T)"),
    "filtered": ("[c*T, N]", "sumsq(shifts(F, T) @ Z)"),
    "by a given filter alone": ("[c*T, N]", "sumsq(inv(I(c*T) + shifts(F, T) @ shifts(F, T).T) @ Z)"),
}


@pytest.mark.parametrize(("shape", "formula"), ODD.values(), ids=ODD)
@pytest.mark.parametrize(("c", "T", "N"), [(2, 5, 3), (3, 4, 1), (1, 1, 2)])
def test_odd_shapes_are_emitted_dense_and_per_frequency(shape: str, formula: str, c: int, T: int, N: int) -> None:
    """Iterates of gradient descent and values of the objective against autograd on the definition."""
    axes = [s.strip() for s in shape.strip("[]").split(",")]
    spec: dict[str, Any] = {
        "objective": "o", "dims": {"c": c, "T": T, "N": N}, "variables": {"Z": axes}, "inputs": {"X": axes}, "minimize": {"f": formula},
        **({"parameters": {"F": ["c*T", "c"]}} if "F" in formula else {}),
        "unroll": {"algorithm": "gradient_descent", "layers": 2, "step": "0.1", "start": {"Z": "X"}},
    }  # fmt: skip
    found = from_spec(load(spec))
    numbers = {d: n for d, n in found.dims.items()}
    Z = found.variables[0]
    rows, cols = (int(n.subs(numbers)) for n in Z.shape)
    x = drawn(2, cols, rows) if Z.rank == 2 else drawn(2, rows)
    given = {s: drawn(c * T, c, seed=9) for s in found.parameters}
    rewrites = [[], ["circulant_to_fft"]] if "weighed" not in formula else [[]]
    for asked in rewrites:
        own = {**spec, "unroll": {**spec["unroll"], "rewrites": asked}}
        net = unroll.compile(own, dtype=torch.float64, parameters={s.name: v for s, v in given.items()})
        trace = net.trace(x)
        z = x[1].mT.clone() if Z.rank == 2 else x[1][:, None].clone()
        for layer in range(3):
            value = evaluate(found.terms["f"], {Z: z.requires_grad_(), **given}, numbers)
            stored = z.mT if Z.rank == 2 else z[:, 0]
            assert gap(trace.iterates["Z"][layer][1].detach(), stored.detach()) < 1e-10
            assert gap(trace.terms["f"][layer][1].detach(), value.detach().squeeze()) < 1e-10
            z = (z - 0.1 * torch.autograd.grad(value.sum(), z)[0]).detach()


def test_half_of_the_frequencies_are_kept() -> None:
    assert [int(half_spectrum((T,)).subs(T, n)) for n in (1, 2, 5, 6)] == [1, 2, 3, 4]
    assert int(half_spectrum((H, W)).subs({H: 3, W: 4})) == 9


@pytest.mark.parametrize("grid", [(5,), (3, 4)])
def test_terms_and_gradients_of_the_objective_read_back_the_same(grid: tuple[int, ...]) -> None:
    found, _ = problem(2, grid, 4, 3)
    for term in ("rate", "class_rate"):
        e = found.terms[term]
        slope = gradient(e, found.variables[0])
        scope = Scope(found.scope.names, broadcast=True)
        assert parse_matrix(text(e), scope) is e and parse_matrix(text(slope), scope) is slope


@pytest.mark.filterwarnings(
    "ignore:.*Function.*should not be instantiated:DeprecationWarning"
)  # by torch.compile itself
def test_the_network_compiles_exports_and_is_restored(tmp_path: Path) -> None:
    net = unroll.compile("redunet_2d", dims=sizes(2, (3, 4), 2), dtype=torch.float64, overrides=["unroll.layers=1"])
    x, members = labelled(2, (3, 4), 9, 2)
    net.construct(X=x, Pi=members.mT)
    wanted = net(x).detach()
    other = unroll.compile("lista", dims={"m": 4, "n": 5}, overrides=["unroll.layers=1"])
    torch.compile(other, fullgraph=True, backend="eager")(torch.randn(3, 4))  # from here on sizes are unknown ones
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x).detach(), wanted)
    assert torch.equal(torch.export.export(net, (x,)).module()(x).detach(), wanted)
    net.save(tmp_path)
    assert torch.equal(unroll.restore(tmp_path)(x).detach(), wanted)
    assert r"\mathcal{F}^{-1}_{w}" in net.derivation.to_latex()


@pytest.mark.parametrize("index", ["w", "j"])
def test_indices_may_have_any_name(index: str) -> None:
    """That of the classes in an entry or in the objective may be the one that frequencies have elsewhere."""

    def renamed(formula: str) -> str:
        return (
            formula.replace("[k]", f"[{index}]")
            .replace("for k in", f"for {index} in")
            .replace("over=k", f"over={index}")
        )

    plain = load("redunet_1d").to_dict()
    unrolled: Any = plain["unroll"]
    own = {
        **unrolled,
        "learn": {n: {**e, "replaces": renamed(e["replaces"])} for n, e in unrolled["learn"].items()},
        "keep": {n: renamed(e) for n, e in unrolled["keep"].items()},
        "estimate": {n: renamed(e) for n, e in unrolled["estimate"].items()},
    }
    terms = {n: renamed(e) for n, e in plain["maximize"].items()}  # type: ignore[union-attr]
    x, members = labelled(2, (5,), 6, 3)
    found: list[Tensor] = []
    for spec in (
        plain,
        {**plain, "unroll": own},
        {**plain, "maximize": terms},
        {**plain, "unroll": own, "maximize": terms},
    ):
        net = unroll.compile(spec, dims=sizes(2, (5,), 3), dtype=torch.float64, overrides=["unroll.layers=2"])
        net.construct(X=x, Pi=members.mT)
        found.append(net(x).detach())
    assert all(gap(f, found[0]) < 1e-12 for f in found)


def test_an_open_number_of_places_is_refused() -> None:
    with pytest.raises(unroll.UnrollError, match="no input has an axis of that size"):
        unroll.compile("redunet_1d", overrides=["dims.T=dynamic"])


def test_an_entry_that_is_nowhere_is_refused() -> None:
    with pytest.raises(unroll.SpecError, match="E305"):
        unroll.derive("redunet_1d", overrides=["unroll.learn.E.replaces=inv(2*I(c*T) + shifts(Z, T) @ shifts(Z, T).T)"])
    with pytest.raises(unroll.SpecError, match="E309"):
        unroll.derive("redunet", overrides=["unroll.rewrites=[circulant_to_fft]"])


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("c", "grid", "N", "K"), GRIDS)
def test_passes_change_no_value(c: int, grid: tuple[int, ...], N: int, K: int, learned: bool) -> None:
    d = unroll.derive(name(grid), dims={**sizes(c, grid, K), "N": N})
    dims = {s.name: n for s, n in d.problem.dims.items() if isinstance(n, int)}
    gaps: list[float] = []
    graph = lower_step(d.problem, d.step if learned else d.exact)
    known = Sizes({s: dims[s.name] for s in d.problem.dims}, 2)
    log = optimise(graph, known, lambda a, b: gaps.append(difference(a, b, dims, positive=["Pi"]))).log
    assert max(gaps) < 1e-10
    assert any(line.startswith("parseval: 1 signals") for line in log)


@pytest.mark.parametrize(
    ("formula", "count"),
    [
        ("sum(sum(y[k]**2) for k in K)", 0),  # no sum to gain from
        ("sum(norm_fro(sum(y[k]**2, axis=0)) for k in K) + sumsq(sum(y[k] @ diag(pi[k]) for k in K))", 1),
        ("sumsq(sum(y[k] @ diag(pi[k]) for k in K))", 1),
        (
            "sum(norm_fro(sum(y[k]**2, axis=0)) for k in K) + sumsq(sum(y[k] * X for k in K))",
            0,
        ),  # weights of every place
        (
            "sum(norm_fro(sum(y[k]**2, axis=1)) for k in K) + sumsq(sum(y[k] @ diag(pi[k]) for k in K))",
            0,
        ),  # not of columns
        ("sum(norm_fro(sum(tanh(y[k]), axis=0)) for k in K) + sumsq(sum(y[k] @ diag(pi[k]) for k in K))", 0),
        (
            "sum(norm_fro(sum(y[k]**2, axis=0)) for k in K) + sum(norm1(y[k] @ diag(pi[k])) for k in K)",
            0,
        ),  # every signal is read
    ],
)
def test_signals_stay_spectra_where_only_lengths_and_sums_are_read(formula: str, count: int) -> None:
    dims = {"c": 2, "T": 5, "n": 3, "K": 2}
    spec = {
        "objective": "o",
        "dims": dims,
        "variables": {"X": ["c*T", "n"]},
        "inputs": {"pi": {"family": "K", "shape": ["n"]}},
        "parameters": {"B": {"family": "K", "shape": ["c*T", "c"]}},
        "minimize": {"f": formula.replace("y[k]", "(shifts(B[k], T) @ X)")},
    }
    found = from_spec(load(spec))
    gaps: list[float] = []
    known = Sizes({s: dims[s.name] for s in found.dims}, 1)
    log = optimise(lower_terms(found), known, lambda a, b: gaps.append(difference(a, b, dims))).log
    assert max(gaps) < 1e-10
    assert any(line.startswith("parseval") for line in log) == bool(count)
