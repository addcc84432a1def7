"""Derived proximal steps against brute force, closed forms of the literature, finite differences and theorems."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prox_catalogue import NONZERO, PEAKED, ROWS, UNSEEN, Row, abs_u, al, eps, gam, hi, lam, lo, mcp, scad, u
from prox_catalogue import a as scad_a

import unroll
from unroll.calculus.pieces import roots_of
from unroll.calculus.prox_function import ScalarProx
from unroll.calculus.prox_scalar import derive_prox
from unroll.calculus.signs import BUDGET, Signs
from unroll.calculus.torch_functions import source_of
from unroll.errors import DeriveError

ALL = ROWS + UNSEEN
STEPS = (0.05, 0.7, 3.0)
rows = pytest.mark.parametrize("row", ALL, ids=[r.name for r in ALL])


def prox_of(row: Row) -> ScalarProx:
    return derive_prox(row.f, u, row.domain, assume=row.assume)


def draw(row: Row, salt: int = 0) -> dict[str, float]:
    """Values of the row's scalars, the same in every run."""
    rng = np.random.default_rng(int(hashlib.sha256(f"{row.name}{salt}".encode()).hexdigest()[:8], 16))
    values = {str(s): float(rng.uniform(0.3, 1.6)) for s in row.f.free_symbols - {u}}
    values |= {"a": 2 + values["a"]} if "a" in values else {}
    return values | ({"lo": -0.7, "hi": 1.3} if row.domain == (lo, hi) else {})


def scalars(prox: ScalarProx, t: float, values: dict[str, float]) -> dict[str, float]:
    return {str(s): {"t": t, **values}[str(s)] for s in prox.scalars}


def inputs(n: int, reach: float = 1e3) -> np.ndarray:
    """n points of [−reach, reach], half of them near 0."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(-6, 6, n // 2), rng.uniform(-reach, reach, n - n // 2 - 2), [reach, -reach]])


def profile(row: Row, values: dict[str, float]):
    """f as a numpy function, +inf outside its domain: nothing of the engine is used."""
    named = {s: values[str(s)] for s in row.f.free_symbols - {u}}
    low, high = (float(sp.sympify(e).subs({lo: -0.7, hi: 1.3})) for e in row.domain)
    raw = sp.lambdify(u, row.f.subs(named), "numpy")

    wide = np.longdouble if row.f.has(sp.exp, sp.cosh) else np.float64  # e^1000 is a number there

    def f(z: np.ndarray) -> np.ndarray:
        inside = np.where(z == 0, 1e-300, np.where(z == 1, 1 - 1e-16, z))
        y = np.asarray(raw(z.astype(wide))) + np.zeros_like(z)
        y = np.where(np.isnan(y), np.asarray(raw(inside.astype(wide))) + np.zeros_like(z), y)  # 0 log 0
        return np.where((z < low) | (z > high) | np.isnan(y), np.inf, y)

    return f


def least(energy, z0: np.ndarray, v: np.ndarray) -> np.ndarray:
    """min over z of energy(z) per row: a wide grid, then golden sections around its best points."""
    fixed = np.concatenate([np.linspace(-8, 8, 1601), np.geomspace(1e-7, 1.2e3, 300), -np.geomspace(1e-7, 1.2e3, 300)])
    near = np.concatenate([np.linspace(-6, 6, 401), np.linspace(-0.3, 0.3, 201)])
    grid = np.concatenate(
        [np.broadcast_to(fixed, (v.size, fixed.size)), v[:, None] + near, z0[:, None] + near[401:]], 1
    )
    grid = np.sort(grid, axis=1)
    values = energy(grid)
    best = values.argmin(1)
    at = np.arange(v.size)
    left = grid[at, np.maximum(best - 1, 0)][:, None]
    right = grid[at, np.minimum(best + 1, grid.shape[1] - 1)][:, None]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        c, d = right - ratio * (right - left), left + ratio * (right - left)
        lower = energy(c) < energy(d)
        left, right = np.where(lower, left, c), np.where(lower, d, right)
    return np.minimum(values.min(1), energy((left + right) / 2)[:, 0])


@rows
@np.errstate(all="ignore")
def test_no_point_beats_the_prox(row: Row):
    prox, v = prox_of(row), inputs(200)
    for salt, t in enumerate(STEPS):
        values = draw(row, salt)
        f = profile(row, values)
        z = prox(torch.from_numpy(v), **scalars(prox, t, values)).numpy()
        found = t * f(z) + (z - v) ** 2 / 2
        best = least(lambda x, t=t, f=f: t * f(x) + (x - v[:, None]) ** 2 / 2, z, v)
        gap = (found - best) / (1 + np.abs(best))
        assert gap.max() <= 1e-8, (t, values, v[gap.argmax()], z[gap.argmax()])


@pytest.mark.parametrize("row", [r for r in ROWS if r.closed], ids=[r.name for r in ROWS if r.closed])
def test_the_prox_is_the_one_of_the_literature(row: Row):
    prox, v = prox_of(row), inputs(400, 30)
    for salt, t in enumerate(STEPS):
        values = draw(row, salt)
        assert row.closed is not None
        known = row.closed(v, t, values)
        if known is None:
            continue
        z = prox(torch.from_numpy(v), **scalars(prox, t, values)).numpy()
        np.testing.assert_allclose(z, known, rtol=1e-9, atol=1e-9)


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_finite_up_to_a_thousand(row: Row, dtype: torch.dtype):
    prox = prox_of(row)
    for salt, t in enumerate(STEPS):
        v = torch.from_numpy(inputs(500)).to(dtype).requires_grad_()
        given_ = {
            k: torch.tensor(x, dtype=dtype).requires_grad_() for k, x in scalars(prox, t, draw(row, salt)).items()
        }
        z = prox(v, **given_)
        assert z.isfinite().all() and z.dtype == dtype
        gradients = torch.autograd.grad(z.sum(), [v, *given_.values()])
        for name, g in zip(["v", *given_], gradients, strict=True):
            assert g.isfinite().all(), (name, t, v[~g.isfinite()] if g.shape == v.shape else g)


@rows
def test_single_precision_agrees_with_double(row: Row):
    prox, values = prox_of(row), draw(row)
    v = torch.from_numpy(inputs(300)).float()
    exact = prox(v.double(), **scalars(prox, 0.7, values))
    gap = ((prox(v, **scalars(prox, 0.7, values)) - exact).abs() / (1 + v.abs())).double()
    tie = 0 if row.convex else 3  # points at which two candidates are as good as each other may go either way
    assert gap.kthvalue(len(v) - tie).values < 2e-5, v[gap.argmax()]


@rows
def test_gradients_are_finite_differences(row: Row):
    """In v, t and every scalar, away from kinks: the median over points is exact, and hardly any point is off."""
    prox, t, h = prox_of(row), 0.7, 1e-6
    v = torch.from_numpy(inputs(200, 8)).requires_grad_()
    names = [str(s) for s in prox.scalars]
    base = [torch.tensor(x, dtype=torch.float64) for x in scalars(prox, t, draw(row)).values()]
    arguments = [b.expand(200).clone().requires_grad_() for b in base]
    z = prox(v, **dict(zip(names, arguments, strict=True)))
    gradients = torch.autograd.grad(z.sum(), [v, *arguments])
    for i, g in enumerate(gradients):
        up, down = ([x.detach() + s * h * (j == i) for j, x in enumerate([v, *arguments])] for s in (1, -1))
        difference = prox(up[0], **dict(zip(names, up[1:], strict=True))) - prox(
            down[0], **dict(zip(names, down[1:], strict=True))
        )
        error = (g - difference / (2 * h)).abs() / (1 + g.abs())
        assert error.kthvalue(196).values < 1e-5, (["v", *names][i], v[error.argmax()], error.max())


@pytest.mark.parametrize("row", [r for r in ALL if r.convex], ids=[r.name for r in ALL if r.convex])
def test_a_convex_prox_is_firmly_nonexpansive(row: Row):
    prox = prox_of(row)
    assert prox.curvature.convex and prox.mode == "threshold"
    a, b = torch.from_numpy(inputs(400, 40)).split(200)
    p, q = (prox(x, **scalars(prox, 0.7, draw(row))) for x in (a, b))
    assert (((p - q) ** 2) <= (p - q) * (a - b) + 1e-9).all()


@pytest.mark.parametrize("row", [r for r in ALL if not r.convex], ids=[r.name for r in ALL if not r.convex])
def test_what_is_not_convex_is_not_called_convex(row: Row):
    assert not prox_of(row).curvature.convex


PAIRS = (
    (lam * sp.Abs(u), sp.S.Zero, (-lam, lam)),  # |.| and the box
    (u**2 / 2, u**2 / 2, (-sp.oo, sp.oo)),
    (sp.Max(0, u), sp.S.Zero, (0, 1)),
    (sp.exp(u), u * sp.log(u) - u, (0, sp.oo)),
    (-sp.log(u), -1 - sp.log(-u), (-sp.oo, 0)),
    (sp.log(1 + sp.exp(u)), u * sp.log(u) + (1 - u) * sp.log(1 - u), (0, 1)),
    (sp.sqrt(1 + u**2), -sp.sqrt(1 - u**2), (-1, 1)),
    (2 * sp.Abs(u) ** sp.Rational(3, 2) / 3, sp.Abs(u) ** 3 / 3, (-sp.oo, sp.oo)),
)


@pytest.mark.parametrize(("f", "conjugate", "domain"), PAIRS, ids=[str(p[0]) for p in PAIRS])
@pytest.mark.parametrize("t", [0.4, 1.0, 2.5])
def test_moreau(f: sp.Expr, conjugate: sp.Expr, domain: tuple[sp.Expr, sp.Expr], t: float):
    """v = prox_tf(v) + t prox_{f*/t}(v/t)."""
    p, q = derive_prox(f, u), derive_prox(conjugate, u, domain)
    v = torch.from_numpy(inputs(200, 20))
    values = {"lam": 0.8} if f.has(lam) else {}
    first, second = p(v, **scalars(p, t, values)), q(v / t, **scalars(q, 1 / t, values))
    torch.testing.assert_close(first + t * second, v, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- points of symmetry, breakpoints, ties


@pytest.mark.parametrize("f", PEAKED, ids=str)
@pytest.mark.parametrize("t", [0.05, 0.5, 2.0])
@np.errstate(all="ignore")
def test_the_prox_of_zero_is_the_limit_from_the_right_where_zero_is_a_peak(f: sp.Expr, t: float):
    prox, values = derive_prox(f, u), {"lam": 0.4} if f.has(lam) else {}
    v = np.array([0.0, 1e-9, -1e-9, 1.0, -1.0, 1 + t, -1 - t])
    raw = profile(Row("", f), values)
    z = prox(torch.from_numpy(v), **scalars(prox, t, values)).numpy()
    best = least(lambda x: t * raw(x) + (x - v[:, None]) ** 2 / 2, z, v)
    assert (t * raw(z) + (z - v) ** 2 / 2 <= best + 1e-9).all()
    assert abs(z[0] - z[1]) < 1e-7 and z[1] == -z[2] and z[0] >= 0
    assert not prox.centred and "sign(0) = 1" in prox.text() and "sign(0) = 1" in prox.source("prox")


@pytest.mark.parametrize("f", [sp.log(1 + u**2), 1 - sp.exp(-(u**2)), u**2 / (1 + u**2)], ids=str)
def test_where_an_even_profile_is_smooth_at_zero_so_is_its_prox(f: sp.Expr):
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(derive_prox(f, u)(v, 0.3).sum(), v)
    assert slope.item() == pytest.approx(1 / (1 + 0.3 * float(sp.diff(f, u, 2).subs(u, 0))))


@pytest.mark.parametrize("f", [sp.Rational(7, 9) * (u**2 - 1) ** 2, -abs_u / 7], ids=str)
def test_brute_force_sees_a_wrong_prox_of_zero(f: sp.Expr, monkeypatch: pytest.MonkeyPatch):
    from unroll.calculus import prox_scalar

    monkeypatch.setattr(prox_scalar, "_least_at_0", lambda *_: True)
    with pytest.raises(DeriveError, match="beaten by a grid"):
        derive_prox(f, u)


# ---------------------------------------------------------------- objectives nobody has seen


def terms() -> st.SearchStrategy[sp.Expr]:
    number = st.integers(-6, 6).map(lambda k: sp.Rational(k, 2))
    weight = st.integers(1, 6).map(lambda k: sp.Rational(k, 4))
    kinds = (
        st.builds(lambda c, b: c * sp.Abs(u - b), weight, number),
        st.builds(lambda c, b: c * sp.Max(0, u - b), weight, number),
        st.builds(lambda c, b: c * sp.Max(0, b - u) ** 2, weight, number),
        st.builds(lambda c, b: c * (u - b) ** 2, weight, number),
        st.builds(lambda c, b, w: c * sp.Max(0, sp.Abs(u - b) - w), weight, number, weight),
        st.builds(lambda p, q: sp.Max(p * u, q * u + 1, -u), number, number),
    )
    return st.one_of(*kinds)


def brute(f: sp.Expr, v: np.ndarray, t: float) -> np.ndarray:
    raw = sp.lambdify(u, f, "numpy")
    return least(lambda z: t * (raw(z) + np.zeros_like(z)) + (z - v[:, None]) ** 2 / 2, v, v)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(terms(), min_size=1, max_size=4), st.sampled_from(STEPS))
def test_random_convex_profiles(parts: list[sp.Expr], t: float):
    f = sp.Add(*parts)
    prox = derive_prox(f, u, verify=False)
    v = np.linspace(-9, 9, 37)
    z = prox(torch.from_numpy(v), **scalars(prox, t, {})).numpy()
    assert prox.curvature.convex
    assert (t * sp.lambdify(u, f, "numpy")(z) + (z - v) ** 2 / 2 <= brute(f, v, t) + 1e-9).all()


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(terms(), min_size=2, max_size=3), st.sampled_from(STEPS))
def test_random_minima_of_convex_profiles(parts: list[sp.Expr], t: float):
    f = sp.Min(*parts)
    prox = derive_prox(f, u, verify=False)
    v = np.linspace(-9, 9, 37)
    z = prox(torch.from_numpy(v), **scalars(prox, t, {})).numpy()
    assert (t * sp.lambdify(u, f, "numpy")(z) + (z - v) ** 2 / 2 <= brute(f, v, t) + 1e-9).all()


# ---------------------------------------------------------------- the form of the answer


def test_soft_threshold_reads_as_in_the_textbook():
    prox = derive_prox(lam * sp.Abs(u), u)
    assert prox.formula == sp.sign(prox.v) * sp.Max(sp.Abs(prox.v) - lam * prox.t, 0)
    assert [str(s) for s in prox.scalars] == ["t", "lam"]
    assert "verified" in prox.proof and prox.proof.startswith("proved")
    assert prox.text() == "prox_t(v) = sign(v) max(|v| − λ t, 0)"
    assert r"\operatorname{sign}" in prox.latex()
    assert derive_prox(sp.S.Zero, u, (0, sp.oo)).text() == "prox_t(v) = max(v, 0)"
    assert derive_prox(sp.S.Zero, u, (lo, hi)).text() == "prox_t(v) = min(max(v, lo), hi)"


def test_weakly_convex_with_a_small_step_has_a_threshold_form():
    """MCP with t < gamma: the firm threshold."""
    prox = derive_prox(mcp(), u, small_step=True)
    assert prox.mode == "threshold" and "t < gam" in prox.proof
    v = torch.from_numpy(inputs(300, 20))
    whole = derive_prox(mcp(), u)
    values = {"t": 0.6, "lam": 0.8, "gam": 1.7}
    torch.testing.assert_close(prox(v, **values), whole(v, **values))


def test_a_bracket_is_as_wide_as_weak_convexity_needs():
    """z - t sin z = v has its zero near v / (1 - t) for small v."""
    prox = derive_prox(sp.cos(u), u, small_step=True)
    assert [r.kind for p in prox.parts for r in p.roots] == ["bracket"] and prox.mode == "threshold"
    z = torch.linspace(-7, 7, 201, dtype=torch.float64)
    for t in (0.5, 0.9, 0.99):
        assert float((prox(z - t * z.sin(), t) - z).abs().max()) < 1e-9


def test_scad_with_a_small_step_has_a_threshold_form():
    prox, whole = (derive_prox(scad(), u, assume=(scad_a > 2,), small_step=s) for s in (True, False))
    v = torch.from_numpy(inputs(300, 20))
    values = {"t": 0.9, "lam": 0.8, "a": 3.7}
    assert prox.mode == "threshold"
    torch.testing.assert_close(prox(v, **values), whole(v, **values))


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lam * sp.Abs(u), ["theta"]),
        (lam * sp.Abs(u) + al * u**2 / 2, ["al", "step", "theta"]),
        (lam * NONZERO, ["theta"]),
        (lam * sp.sqrt(sp.Abs(u)), ["theta"]),
        (lam * sp.log(1 + sp.exp(u)), ["theta"]),
        (lam * sp.Abs(u) ** sp.Rational(2, 3), ["theta"]),
        (lam * sp.log(1 + sp.Abs(u) / eps), ["eps", "theta"]),
        (mcp(), ["gam", "step", "theta"]),
        (-lam * sp.log(u), ["theta"]),
        (lam * u * sp.log(u), ["theta"]),
    ],
    ids=str,
)
def test_a_product_of_scalars_becomes_one_learned_symbol(f: sp.Expr, left: list[str]):
    step, theta = sp.symbols("step theta", positive=True)
    whole = derive_prox(f, u)
    prox = whole.substitute({whole.t: step}).replace(step * lam, theta)
    assert sorted(map(str, prox.scalars)) == left
    values = {"step": 0.6, "al": 0.9, "eps": 0.5, "gam": 1.7}
    v = torch.from_numpy(inputs(200, 9))
    ours = prox(v, **{k: x for k, x in {**values, "theta": 0.6 * 0.8}.items() if k in left})
    torch.testing.assert_close(ours, whole(v, **scalars(whole, 0.6, {**values, "lam": 0.8})))


def test_numbers_may_take_the_place_of_scalars():
    whole = derive_prox(lam * sp.Abs(u), u)
    prox = whole.substitute({lam: sp.Rational(1, 3), whole.t: 2})
    assert prox.scalars == ()
    v = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(prox(v), whole(v, t=2, lam=1 / 3))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (3, 7)], ids=str)
def test_scalars_broadcast_against_v_and_gradients_come_back_in_their_shape(shape: tuple[int, ...]):
    prox = derive_prox(lam * sp.Abs(u) + al * u**2 / 2, u)
    torch.manual_seed(0)
    v = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    given_ = [torch.rand(shape, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda v, *s: prox(v, **dict(zip(("t", "al", "lam"), s, strict=True))), (v, *given_)
    )


# ---------------------------------------------------------------- emitted source


def module(prox: ScalarProx, name: str = "shrink") -> dict[str, object]:
    space: dict[str, object] = {}
    exec(f"import torch\n{source_of(prox.runtime)}\n{prox.source(name)}", space)
    return space


EMITTED = [
    r for r in ROWS if r.name in ("abs", "elastic net", "Huber", "box", "L0", "MCP", "entropy", "power 4", "logistic")
]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside torch.compile
@pytest.mark.parametrize("row", EMITTED, ids=[r.name for r in EMITTED])
def test_source_compiles_and_exports(row: Row):
    prox = prox_of(row)
    shrink, names = module(prox)["shrink"], [str(s) for s in prox.scalars]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for k, x in scalars(prox, 0.7, draw(row)).items():
                self.register_buffer(k, torch.tensor(x))

        def forward(self, v):
            return shrink(v, *(getattr(self, s) for s in names))

    torch.compiler.reset()
    layer, v = Layer(), torch.from_numpy(inputs(60, 9)).float().reshape(10, 6)
    exact = layer(v)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(v), exact)
    program = torch.export.export(layer, (v,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(v[:4]), exact[:4])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised inside torch's forward mode
@pytest.mark.parametrize("row", EMITTED, ids=[r.name for r in EMITTED])
def test_transforms_of_torch_go_through_the_derivative_rule(row: Row):
    """Forward mode against reverse mode, a map over samples against the batch, second derivatives against differences."""
    prox = prox_of(row)
    values = {k: torch.tensor(x, dtype=torch.float64) for k, x in scalars(prox, 0.7, draw(row)).items()}
    call = lambda v, *s: prox(v, **dict(zip(values, s, strict=True)))
    v, given_ = torch.tensor([0.31, -0.47, 2.9, -3.3], dtype=torch.float64), tuple(values.values())
    torch.testing.assert_close(torch.func.vmap(call, (0, *(None for _ in given_)))(v, *given_), call(v, *given_))
    own = torch.autograd.functional.jacobian(call, (v, *given_))
    for i, want in enumerate(own):
        torch.testing.assert_close(torch.func.jacfwd(call, i)(v, *given_), want)
        torch.testing.assert_close(torch.func.jacrev(call, i)(v, *given_), want)
    slope = torch.func.grad(lambda v: call(v, *given_).pow(2).sum())
    difference = torch.stack([(slope(v + e) - slope(v - e)) / 2e-6 for e in 1e-6 * torch.eye(4, dtype=torch.float64)])
    torch.testing.assert_close(
        torch.func.hessian(lambda v: call(v, *given_).pow(2).sum())(v), difference, atol=1e-6, rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised inside torch's forward mode
@pytest.mark.parametrize("row", EMITTED, ids=[r.name for r in EMITTED])
def test_where_no_gradients_are_kept_values_and_slopes_are_the_same(row: Row):
    """Its rule is not called then: values to the bit, forward mode, a map over samples, and a gradient asked for within."""
    prox = prox_of(row)
    values = {k: torch.tensor(x, dtype=torch.float64) for k, x in scalars(prox, 0.7, draw(row)).items()}
    call = lambda v, *s: prox(v, **dict(zip(values, s, strict=True)))
    v, given_ = torch.tensor([0.31, -0.47, 2.9, -3.3, 0.0], dtype=torch.float64), tuple(values.values())
    wide = torch.from_numpy(inputs(200, 9))
    own, kept = torch.autograd.functional.jacobian(call, (v[:4], *given_)), call(wide, *given_)
    with torch.no_grad():
        assert torch.equal(call(wide, *given_), kept)
        torch.testing.assert_close(torch.func.vmap(call, (0, *(None for _ in given_)))(v, *given_), call(v, *given_))
        for i, want in enumerate(own):
            torch.testing.assert_close(torch.func.jacfwd(call, i)(v[:4], *given_), want)
        torch.testing.assert_close(torch.func.grad(lambda v: call(v, *given_).sum())(v[:4]), own[0].sum(0))


@pytest.mark.parametrize("row", EMITTED, ids=[r.name for r in EMITTED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(row: Row, dtype: torch.dtype):
    prox = prox_of(row)
    v = torch.from_numpy(inputs(200, 20)).to(dtype).requires_grad_()
    given_ = {k: torch.tensor(x, requires_grad=True) for k, x in scalars(prox, 0.7, draw(row)).items()}
    with torch.autocast("cpu", dtype=dtype):
        z = prox(v, **given_)
    assert z.dtype == dtype and z.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(z.float().sum(), [v, *given_.values()]))
    exact = prox(v.detach().double(), **{k: x.item() for k, x in given_.items()})
    gap = (z.double() - exact).abs() / (1 + exact.abs())
    assert gap.kthvalue(196).values < 8 * torch.finfo(dtype).eps


def test_the_soft_threshold_saves_one_tensor_for_backward():
    shrink = module(derive_prox(lam * sp.Abs(u), u))["shrink"]
    v = torch.randn(40, 50, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        shrink(v, torch.tensor(0.5), torch.tensor(0.2, requires_grad=True))  # type: ignore[operator]
    assert sum(x.numel() > 1 for x in saved) == 1


def test_a_nan_stays_a_nan():
    for row in (r for r in ROWS if r.name not in ("box",)):
        prox = prox_of(row)
        z = prox(torch.tensor([float("nan"), 0.3], dtype=torch.float64), **scalars(prox, 0.7, draw(row)))
        assert z[0].isnan() and not z[1].isnan(), row.name


def test_names_that_python_forbids_are_mended():
    word, clash = sp.Symbol("lambda", positive=True), sp.Symbol("v", positive=True)
    prox = derive_prox(word * sp.Abs(u) + clash * u**2, u)
    z = prox(torch.tensor([2.0]), t=1.0, **{"lambda": 0.5, "v": 0.25})
    torch.testing.assert_close(z, torch.tensor([1.0]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised inside torch's forward mode
@pytest.mark.parametrize(
    "words", [("rad", "a"), ("a", "ga"), ("a", "da"), ("z", "dz"), ("max", "type"), ("torch", "range")]
)
def test_no_scalar_is_mistaken_for_a_name_of_the_source(words: tuple[str, str]):
    rate, bend = (sp.Symbol(w, positive=True) for w in words)
    prox = derive_prox(rate * sp.Abs(u) + bend * u**2, u, verify=False)
    v = torch.tensor([2.0, -0.1, -3.0], dtype=torch.float64, requires_grad=True)
    given_ = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.25)]
    call = lambda v, r, b: prox(v, t=0.8, **{words[0]: r, words[1]: b})
    assert torch.autograd.gradcheck(call, (v, *given_), check_forward_ad=True)
    closed = v.sign() * (v.abs() - 0.4).clamp_min(0) / 1.4
    torch.testing.assert_close(call(v, *given_), closed)


@pytest.mark.parametrize(
    "digits", ["1.7320508075688772", "0.12345678901234567", "3.3333333333333333e-7", "98765432109876543210.5"]
)
def test_a_number_with_all_its_digits_is_the_nearest_decimal(digits: str):
    prox = derive_prox(sp.Rational(digits) * sp.Abs(u), u)
    v = torch.tensor([3 * float(digits), -float(digits) / 2], dtype=torch.float64)
    torch.testing.assert_close(
        prox(v, t=1.0), torch.tensor([2 * float(digits), 0.0], dtype=torch.float64), rtol=1e-14, atol=0
    )


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("f", "domain", "words"),
    [
        (sp.Min(sp.Abs(u), lam) + sp.Min(sp.Abs(u), al), (-sp.oo, sp.oo), "depends on the values of"),
        (1 / u, (-sp.oo, sp.oo), "below"),
        (-(u**4), (-sp.oo, sp.oo), "below"),
        (sp.log(-1 - u**2), (-sp.oo, sp.oo), "not real"),
        (sp.sign(u), (-sp.oo, sp.oo), "above its limit"),
        (-NONZERO, (-sp.oo, sp.oo), "above its limit"),
        (sp.Piecewise((0, u < 0), (1, True)), (-sp.oo, sp.oo), "above its limit"),
    ],
    ids=str,
)
def test_what_cannot_be_derived_is_refused_with_the_reason(f: sp.Expr, domain: tuple[sp.Expr, sp.Expr], words: str):
    with pytest.raises(DeriveError, match=words) as caught:
        derive_prox(f, u, domain)
    assert caught.value.code == "E302"


def test_a_missing_scalar_is_named():
    with pytest.raises(DeriveError, match="lam"):
        derive_prox(lam * sp.Abs(u), u)(torch.zeros(2), t=1.0)


def test_a_wrong_formula_is_not_emitted(monkeypatch: pytest.MonkeyPatch):
    from unroll.calculus import roots

    stationary = roots._polynomial
    monkeypatch.setattr(roots, "_polynomial", lambda *a: tuple(r.__class__(r.kind, r.z + 1) for r in stationary(*a)))
    with pytest.raises(DeriveError, match="beaten by a grid"):
        derive_prox(sp.Rational(7, 9) * u**2, u)


def test_the_slope_is_the_derivative_at_the_output():
    prox = derive_prox(lam * sp.Abs(u) + al * u**2 / 2, u)
    slope = sp.lambdify((u, prox.t, lam, al), prox.slope)
    assert slope(0, 1, 1, 1) == 0 and slope(0.3, 1, 1, 1) == 0.5
    assert gam not in prox.slope.free_symbols


def test_a_one_sided_threshold_needs_no_rule_of_its_own() -> None:
    u, lam = sp.Symbol("u", real=True), sp.Symbol("lam", positive=True)
    source = derive_prox(lam * u, u, (sp.Integer(0), sp.oo)).source("prox")
    assert "autograd" not in source
    names: dict = {"torch": torch}
    exec(source, names)
    v = torch.tensor([-1.0, 0.2, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    out = names["prox"](v, torch.tensor(1.0, dtype=torch.float64), t)
    assert out.tolist() == pytest.approx([0, 0, 0, 1.7])
    slopes = torch.autograd.grad(out.sum(), (v, t))
    assert slopes[0].tolist() == [0, 0, 0, 1]
    assert float(slopes[1]) == -1


def test_constants_with_all_their_digits_meet_in_all_but_the_last():
    """Huber at sqrt(3), written out: its pieces differ by 2e-16 where they meet."""
    p = unroll.prox("where(abs(u) <= 1.7320508075688772, u**2/2, 1.7320508075688772*abs(u) - 1.5)")
    v, t, edge = torch.linspace(-5, 5, 41, dtype=torch.float64), 0.6, 3**0.5
    want = torch.where(v.abs() <= edge * (1 + t), v / (1 + t), v - t * edge * v.sign())
    torch.testing.assert_close(p(v, t), want, rtol=0, atol=1e-12)


def test_a_step_that_nobody_could_read_is_refused_by_its_length():
    with pytest.raises(DeriveError, match="operations as it would be evaluated"):
        derive_prox(sp.sinh(u) / (1 + sp.Abs(sp.sinh(u))), u)


def test_a_slope_with_many_bends_is_refused_before_it_grows(monkeypatch: pytest.MonkeyPatch):
    f = sp.log(1 + ((u - sp.Rational(1, 10)) / (1 + (u - sp.Rational(1, 1000)) ** 2)) ** 2)
    sizes: list[int] = []
    afford = Signs.afford
    monkeypatch.setattr(Signs, "afford", lambda s, e, *n: sizes.append(sp.count_ops(e)) or afford(s, e, *n))
    with pytest.raises(DeriveError, match="bends 5 times"):
        derive_prox(f, u)
    assert 0 < max(sizes) < BUDGET


@pytest.mark.parametrize("f", [u**3 * sp.log(u) / 3 - u**3 / 9, u * sp.log(u) + sp.log(1 + u**2) / 2], ids=str)
def test_a_log_whose_weight_moves_is_no_lambert(f: sp.Expr):
    """The prox solves z + t f'(z) = v."""
    prox, t = derive_prox(f, u, (sp.S.Zero, sp.oo)), 0.6
    v = torch.tensor([0.9, 2.0, 5.0], dtype=torch.float64)
    z = prox(v, t)
    slope = torch.from_numpy(sp.lambdify(u, sp.diff(f, u), "numpy")(z.numpy()))
    torch.testing.assert_close(z + t * slope, v, rtol=0, atol=1e-9)


def test_a_rate_that_moves_is_no_rate():
    with pytest.raises(DeriveError, match="no closed solution"):
        roots_of(sp.exp(u * sp.atan(u)) - 2, u, Signs([]))


def test_far_away_a_term_that_levels_off_leaves_v_alone():
    """Powers of z, multiplied out, are no numbers of float32 there."""
    v = torch.tensor([-1e5, 30.0, 1e5], requires_grad=True)
    (slope,) = torch.autograd.grad(derive_prox(1 / (1 + u**2) ** 2, u, verify=False)(v, 0.5).sum(), v)
    torch.testing.assert_close(slope, torch.ones(3), rtol=0, atol=1e-3)
