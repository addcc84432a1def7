"""Learned functions of one number, against NumPy and SciPy; how far they start from what they replace; what keeps them where they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor

import unroll
from unroll.emit.text import helper, imports, needed
from unroll.errors import SpecError

D = torch.float64
CALLS: dict[str, Any] = {}
TEXT = "\n\n".join(map(helper, needed(["curve", "spline", "odd", "rising"])))
exec(f"{imports(TEXT)}\nimport math\n\n{TEXT}", CALLS)
KINDS = ("curve", "spline")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself
LOW, HIGH, KNOTS = -1.3, 2.0, 7
WIDTH = (HIGH - LOW) / (KNOTS - 1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def by_scipy(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """B-splines on an even grid that goes on far enough, their coefficients in a straight line beyond the knots."""
    more = 200
    first, last = y[0] + (y[1] - y[0]) * np.arange(-more, 0), y[-1] + (y[-1] - y[-2]) * np.arange(1, more + 1)
    knots = LOW + WIDTH * (np.arange(-more, KNOTS + more + degree + 1) - (degree + 1) / 2)
    return BSpline(knots, np.concatenate([first, y, last]), degree)(x)


def test_between_knots_it_is_that_of_numpy() -> None:
    x, y = 2 * drawn(50, 4), drawn(KNOTS, seed=1)
    x[0] = torch.linspace(LOW, HIGH, 4, dtype=D)  # knots
    found, knots = CALLS["curve"](x, y, LOW, HIGH), np.linspace(LOW, HIGH, KNOTS)
    inside = ((x >= LOW) & (x <= HIGH)).numpy()
    assert 20 < inside.sum() < 190
    np.testing.assert_allclose(found.numpy()[inside], np.interp(x.numpy()[inside], knots, y.numpy()), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_spline_of_scipy_and_straight_on_beyond_the_knots(kind: str) -> None:
    x, y = 5 * drawn(50, 4), drawn(KNOTS, seed=1)
    found = CALLS[kind](x, y, LOW, HIGH)
    np.testing.assert_allclose(found.numpy(), by_scipy(x.numpy(), y.numpy(), KINDS.index(kind) * 2 + 1), atol=1e-10)
    far = CALLS[kind](torch.tensor([HIGH, HIGH + 1e6], dtype=D), y, LOW, HIGH)
    assert far.diff().item() / 1e6 == pytest.approx((y[-1] - y[-2]).item() / WIDTH, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_in_x_and_in_the_values(kind: str) -> None:
    for shape in ((KNOTS,), (4, KNOTS)):  # one function, one for each row
        x, y = (3 * drawn(3, 4)).requires_grad_(), drawn(*shape, seed=1).requires_grad_()
        f = lambda x, y: CALLS[kind](x, y, LOW, HIGH)
        assert torch.autograd.gradcheck(f, (x, y), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (x, y))
        each = torch.vmap(torch.func.grad(lambda x, y, f=f: f(x, y).sum(), argnums=(0, 1)), (0, None))(x, y)
        whole = torch.autograd.grad(f(x, y).sum(), (x, y))
        assert torch.allclose(each[0], whole[0]) and torch.allclose(each[1].sum(0), whole[1])
        compiled = torch.autograd.grad(CALLS["along"](x, y.expand(2, *shape), LOW, WIDTH).sum(), x)
        ruled = torch.autograd.grad(CALLS["Along"].apply(x, y.expand(2, *shape), LOW, WIDTH).sum(), x)
        assert torch.allclose(compiled[0], ruled[0])


def test_each_row_has_its_own() -> None:
    x, y = drawn(6, 4), drawn(4, KNOTS, seed=1)
    found = CALLS["curve"](x, y, LOW, HIGH)
    assert torch.equal(found, torch.stack([CALLS["curve"](x[:, i], y[i], LOW, HIGH) for i in range(4)], -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_in_other_types_and_at_their_ends(kind: str, dtype: torch.dtype) -> None:
    x, y = drawn(6, 4, dtype=dtype), drawn(KNOTS, seed=1, dtype=dtype)
    x[0, 0] = math.nan
    found = CALLS[kind](x, y, LOW, HIGH)
    assert found.dtype == dtype and bool(found[0, 0].isnan()) and int(found.isnan().sum()) == 1
    exact = CALLS[kind](x.to(D), y.to(D), LOW, HIGH)
    assert torch.allclose(found.to(D), exact, rtol=0, atol=20 * torch.finfo(dtype).eps, equal_nan=True)
    assert CALLS[kind](x[:0], y, LOW, HIGH).shape == (0, 4)
    y.requires_grad_()
    CALLS[kind](x[:0].requires_grad_(), y, LOW, HIGH).sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))
    assert CALLS[kind](torch.tensor([1e30, -1e30]), torch.zeros(5), -1.0, 1.0).tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_slopes_is_what_came_in(kind: str) -> None:
    kept: list[Tensor] = []
    x, y = drawn(100, 50).requires_grad_(), drawn(KNOTS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CALLS[kind](x, y, LOW, HIGH)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


def spec(function: dict[str, Any], replaces: str = "prox", penalty: str = "lam * norm1(z)", **more: Any) -> Any:
    return {"dims": {"m": 5, "n": 7}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]},
            "parameters": {"A": ["m", "n"], "w": {"shape": ["n"], "positive": True}}, "scalars": {"lam": 0.3},
            "minimize": {"fit": "1/2 * sumsq(x - A @ z)", "penalty": penalty},
            "unroll": {"algorithm": "proximal_gradient", "layers": 3, "step": 1.0,
                       "learn": {"phi": {"replaces": replaces, "function": {"range": [-1, 1], **function}, **more}}}}  # fmt: skip


def said(net: Any) -> str:
    (found,) = (x for x in net.derivation.step.departures if x.name == "function")
    return found.says


@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("odd", [False, True])
def test_it_starts_as_far_from_the_proximal_step_as_is_said(degree: int, odd: bool) -> None:
    """A threshold in the middle between two knots: a bend there is what is known worst."""
    net: Any = unroll.compile(spec({"knots": 11, "degree": degree, "odd": odd}), dtype=D, seed=0)
    v = torch.linspace(-1, 1, 2001, dtype=D)
    y = net.phi[1].detach()
    off = CALLS[KINDS[degree // 2]](v, CALLS["odd"](y) if odd else y, -1.0, 1.0)
    off = (off - v.sign() * (v.abs() - 0.3).clamp_min(0)).abs().max()
    bound = float(said(net).split("at most ")[1].split(" ")[0])
    assert 0.5 * bound < off <= bound * (1 + 1e-3) if degree == 1 else 0 < off <= bound
    assert bound == pytest.approx(0.2 * (0.25 if degree == 1 else 13 / 48), rel=1e-2)


def test_the_said_bounds_are_met_by_a_bend() -> None:
    """f = max(v - a, 0) or max(a - v, 0), a anywhere: the bends of which all that rises by 0 to 1 is made."""
    v = torch.linspace(-1, 1, 4001, dtype=D)
    for kind, share in (("curve", 1 / 4), ("spline", 13 / 48)):
        worst = 0.0
        for a in torch.linspace(-0.1, 0.1, 41, dtype=D):
            f = lambda x, a=a: (x - a).clamp_min(0)
            off = CALLS[kind](v, f(torch.linspace(-1, 1, 11, dtype=D)), -1.0, 1.0) - f(v)
            worst = max(worst, float(off.abs().max()))
        assert share * 0.2 * 0.98 < worst <= share * 0.2 + 1e-12


def test_more_knots_come_nearer_to_the_algorithm() -> None:
    x, exact = drawn(6, 5) / 5, spec({})
    del exact["unroll"]["learn"]
    off = []
    for knots in (11, 101, 1001):
        net: Any = unroll.compile(spec({"knots": knots, "range": [-3.1, 3.2]}), dtype=D, seed=0)
        plain: Any = unroll.compile(exact, parameters=dict(net.given), dtype=D)
        off.append(float((net(x) - plain(x)).detach().abs().max()))
    assert off[2] < off[1] / 3 < off[0] / 9


@pytest.mark.parametrize("shape", [None, ["n"]])
@pytest.mark.parametrize("share", ["none", "layers"])
@pytest.mark.parametrize("degree", [1, 3])
def test_a_moved_network_by_hand(shape: Any, share: str, degree: int) -> None:
    more = {"shape": shape} if shape else {}
    net: Any = unroll.compile(
        spec({"knots": KNOTS, "range": [LOW, HIGH], "degree": degree}, share=share, **more), dtype=D, seed=0
    )
    with torch.no_grad():
        net.phi.add_(drawn(*net.phi.shape))
    x, A, z = drawn(4, 5), net.given["A"], torch.zeros(4, 7, dtype=D)
    for k in range(3):
        v, y = z + (x - z @ A.T) @ A, (net.phi if share == "layers" else net.phi[k]).detach().expand(7, KNOTS)
        z = torch.from_numpy(np.stack([by_scipy(v[:, i].numpy(), y[i].numpy(), degree) for i in range(7)], -1))
    assert net.phi.shape == ((3,) if share == "none" else ()) + ((7,) if shape else ()) + (KNOTS,)
    assert torch.allclose(net(x), z, atol=1e-10)
    assert torch.allclose(unroll.compile(spec({}), seed=0)(x[:0].float()), z[:0].float())


def test_weights_of_each_entry_start_each_row() -> None:
    net: Any = unroll.compile(spec({"knots": 101}, penalty="lam * norm1(w * z)", shape=["n"]), dtype=D, seed=0)
    knots = torch.linspace(-1, 1, 101, dtype=D)
    want = knots.sign() * (knots.abs() - 0.3 * net.given["w"][:, None]).clamp_min(0)
    assert torch.allclose(net.phi, want.expand(3, 7, 101), atol=1e-12)


def test_of_a_matrix_each_row_has_its_own() -> None:
    s = spec({"knots": KNOTS, "range": [LOW, HIGH]}, shape=["n"], penalty="lam * norm1(z)")
    s |= {"dims": {"m": 5, "n": 7, "T": 2}, "variables": {"z": ["n", "T"]}, "inputs": {"x": ["m", "T"]}}
    net: Any = unroll.compile(s, dtype=D, seed=0)
    with torch.no_grad():
        net.phi.add_(drawn(*net.phi.shape))
    x, A, z = drawn(4, 2, 5), net.given["A"], torch.zeros(4, 2, 7, dtype=D)
    for k in range(3):
        v = z + (x - z @ A.T) @ A
        z = torch.stack([CALLS["curve"](v[..., i], net.phi[k, i], LOW, HIGH) for i in range(7)], -1)
    assert torch.allclose(net(x), z, atol=1e-12)


@pytest.mark.parametrize("kept", ["monotone", "nonexpansive"])
@pytest.mark.parametrize("odd", [False, True])
def test_what_is_asked_for_holds_through_training_and_restoring(kept: str, odd: bool, tmp_path: Path) -> None:
    net: Any = unroll.compile(spec({"knots": 21, kept: True, "odd": odd}), dtype=D, seed=0)

    def values(net: Any) -> Tensor:
        y = CALLS["rising"](net.phi, 0.1 if kept == "nonexpansive" else math.inf, odd)
        return (CALLS["odd"](y) if odd else y)[1]

    start, x, want = values(net).detach(), drawn(30, 5), 3 * drawn(30, 7, seed=1)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        (net(x) - want).square().mean().backward()
        optimiser.step()
    found = values(net).detach()
    assert not torch.allclose(found, start, atol=1e-3)
    assert bool((net.phi[1].diff() < 0).any()) or kept == "nonexpansive"  # what is stored need not rise
    assert bool((found.diff() >= 0).all())
    assert kept == "monotone" or bool((found.diff() <= 0.1 + 1e-12).all())
    assert not odd or torch.equal(found, -found.flip(-1))
    net.save(tmp_path / "net")
    again: Any = unroll.restore(tmp_path / "net")
    assert torch.equal(again(x), net(x)) and torch.equal(values(again), found)
    v = drawn(200).sort().values * 2
    assert bool((CALLS["curve"](v, found, -1.0, 1.0).diff() >= 0).all())


def test_what_has_reached_its_end_comes_back() -> None:
    """A slope that is below 0 is 0, and may rise again; it does not go on falling."""
    y = torch.tensor([0.0, -1.0, 0.5], dtype=D, requires_grad=True)
    rising = CALLS["rising"](y, math.inf, False)
    assert rising.tolist() == [0, 0, 1.5]
    (up,) = torch.autograd.grad(-rising[1], y, retain_graph=True)
    (down,) = torch.autograd.grad(rising[1], y)
    assert up.tolist() == [0, -1, 0] and down.tolist() == [1, 0, 0]
    y = torch.tensor([0.0, 5.0, 5.5], dtype=D, requires_grad=True)
    rising = CALLS["rising"](y, 1.0, False)
    assert rising.tolist() == [0, 1, 1.5]
    (up,) = torch.autograd.grad(-rising[1], y, retain_graph=True)
    (down,) = torch.autograd.grad(rising[1], y)
    assert up.tolist() == [-1, 0, 0] and down.tolist() == [0, 1, 0]


def test_of_a_formula_of_the_spec() -> None:
    s = spec({"knots": 201, "odd": True}, replaces="tanh(u)")
    s["unroll"]["updates"] = {"z": "tanh(v)"}
    net: Any = unroll.compile(s, dtype=D, seed=0)
    x, A, z = drawn(4, 5) / 10, net.given["A"], torch.zeros(4, 7, dtype=D)
    for _ in range(3):
        z = (z + (x - z @ A.T) @ A).tanh()
    assert "no bound" in said(net)
    assert 1e-9 < (net(x) - z).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"penalty": "lam * norm2(z)"}, "no function of each entry"),
        ({"penalty": "lam * norm1(w * z)"}, "another function in each entry"),
        ({"function": {"odd": True}, "penalty": "lam * sum(pos(z))"}, "not known to be"),
        ({"function": {"odd": True, "knots": 100}}, "an odd number"),
        ({"function": {"odd": True, "range": [-1, 2]}}, "an odd number"),
        ({"function": {"range": [1, -1]}}, "is empty"),
        ({"function": {"nonexpansive": True}, "penalty": "lam * norm0(z)"}, "not known to be convex"),
        ({"in": "v"}, "no proximal step in the update of v"),
        ({"replaces": "tanh(z)"}, r"no tanh\(z\) in the step"),
        ({"replaces": "A.T"}, "cannot be a function"),
        ({"shape": ["m"]}, "not that of the rows"),
        ({"positive": True}, "'positive' says nothing"),
        ({"function": {"degree": 2}}, "degree must be 1 or 3, not 2"),
        ({"bias": True}, "'bias' says nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_words(change: dict[str, Any], says: str) -> None:
    function = change.pop("function", {})
    with pytest.raises(SpecError, match=says):
        unroll.compile(spec(function, **change))


def test_two_functions_are_not_one() -> None:
    s = spec({})
    s["minimize"] |= {"more": "lam * norm0(z)"}
    s["unroll"] |= {"algorithm": "douglas_rachford", "split": {"f": ["penalty"], "g": ["more"]}}
    s["unroll"]["start"] = {"z": "A.T @ x"}
    del s["unroll"]["step"]
    s["minimize"].pop("fit")
    with pytest.raises(SpecError, match="place of 2 functions"):
        unroll.compile(s)


@pytest.mark.parametrize(
    ("algorithm", "change", "depends"),
    [
        ("proximal_gradient", {"inputs": {"x": ["m"], "A": {"shape": ["m", "n"], "stored": "as_written"}}}, "A"),
        ("coordinate_descent", {}, "the step of each entry"),
        ("adaptive_admm", {}, "rho"),
        ("admm", {"numbers": {"rho": "1 + layer"}}, "rho"),
    ],
)
def test_what_is_known_in_a_call_alone_is_no_start(algorithm: str, change: dict[str, Any], depends: str) -> None:
    s = spec({"knots": 11})
    s["unroll"] |= {"algorithm": algorithm, "numbers": change.pop("numbers", {})}
    s |= {"parameters": {}, **change} if change else {}
    if "admm" in algorithm:
        s["unroll"]["learn"]["phi"]["in"] = "w[j]"
    del s["unroll"]["step"]
    with pytest.raises(SpecError, match=f"depends on {depends}: it has no value to start at") as refusal:
        unroll.compile(s, seed=0)
    assert refusal.value.code == "E306" and "known when the network is set up" in str(refusal.value)


def test_in_an_update_of_members() -> None:
    s = spec({"knots": 11}, penalty="lam * norm1(A @ z)", **{"in": "w[j]"})
    s["unroll"] = {**s["unroll"], "algorithm": "admm"}
    del s["unroll"]["step"]
    steps = {a.target.name: str(a.value) for a in unroll.derive(s).step.assigns}
    assert steps["w_"] == "phi(v)" and "phi" not in steps["z"]
