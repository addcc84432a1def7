"""What texts claim of a problem, and under which conditions on their numbers."""

from __future__ import annotations

import pytest
import torch

import unroll
from unroll.errors import SpecError

FIT = "1/2 * sumsq(x - A @ z)"
LASSO = {"fit": FIT, "sparsity": "lam * norm1(z)"}


def spec(algorithm, minimize=LASSO, **said):
    return {
        "dims": {"m": 6, "n": 8}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": 0.1, "eta": 0.01}, "minimize": minimize,
        "unroll": {"algorithm": algorithm, "layers": 3, **said},
    }  # fmt: skip


def claims(*args, **said):
    return {c.name: c.holds for c in unroll.derive(spec(*args, **said)).exact.claims}


@pytest.mark.parametrize(("algorithm", "numbers", "optimum"), [
    ("proximal_gradient", {}, True), ("proximal_gradient", {"step": "1.9/L(f)"}, True),
    ("proximal_gradient", {"step": "2/L(f)"}, False), ("proximal_gradient", {"step": "eta"}, None),
    ("forward_backward_forward", {}, True), ("forward_backward_forward", {"step": "1/L(f)"}, False),
    ("fista", {"step": "1/L(f)"}, True), ("fista", {"step": "1.1/L(f)"}, False),
    ("davis_yin", {"relax": 1.4}, True), ("davis_yin", {"relax": 1.5}, False),
    ("davis_yin", {"relax": 1.8, "step": "0.3/L(h)"}, True),
    ("douglas_rachford", {"relax": 1.8}, True), ("admm", {"relax": 1.8}, True),
    ("chambolle_pock", {}, True), ("chambolle_pock", {"sigma": 4, "tau": "1/4"}, True),
    ("chambolle_pock", {"sigma": 4, "tau": "1/3"}, False),
    ("condat_vu", {}, True), ("condat_vu", {"tau": "1/L(h)"}, True), ("condat_vu", {"tau": "1.1/L(h)"}, False),
])  # fmt: skip
def test_a_claim_is_made_of_the_numbers_that_meet_its_condition(algorithm, numbers, optimum):
    assert claims(algorithm, numbers={n: str(v) for n, v in numbers.items()})["optimum"] is optimum


@pytest.mark.parametrize(("relax", "converges"), [(1.45, True), (1.99, None)])
def test_the_condition_of_davis_and_yin_is_met_where_it_converges(relax, converges):
    """Beyond it nothing is claimed: it may converge or not. Within it, the fixed point is that of ISTA."""
    torch.manual_seed(0)
    A, x = torch.randn(6, 8).double(), torch.randn(1, 6).double()
    s = spec("davis_yin", numbers={"relax": str(relax)})
    found = unroll.solve(s, x, parameters={"A": A}, algorithm="davis_yin", max_iterations=5000)
    assert found.claims is (converges is True)
    if converges:
        assert torch.allclose(found.z, unroll.solve(s, x, parameters={"A": A}).z, atol=1e-5)


def test_what_fails_is_shown_with_both_sides():
    page = " ".join(str(unroll.derive(spec("gradient_descent", {"fit": FIT}, step="3/L"))).split())
    assert "step * L(f) < 2 does not hold, 3 against 2" in page and "monotone" not in page
    page = " ".join(str(unroll.derive(spec("gradient_descent", {"fit": FIT}, step="eta"))).split())
    assert "claimed if step * L(f) < 2: the limit is an optimum" in page


@pytest.mark.parametrize(("step", "optimum"), [(1.9, True), (2, False), (3, False)])
def test_a_step_is_held_against_a_constant_that_is_a_number(step, optimum):
    s = spec("proximal_gradient", {"fit": "1/2 * sumsq(z - A.T @ x)", "sparsity": "lam * norm1(z)"}, step=step)
    assert {c.name: c.holds for c in unroll.derive(s).exact.claims}["optimum"] is optimum
    page = " ".join(str(unroll.derive(s)).split())
    assert (f"step * L(f) < 2 does not hold, {step} against 2" in page) is not optimum


def test_a_longer_step_of_gradient_descent_still_falls_and_a_longer_one_does_not():
    torch.manual_seed(0)
    A, x = torch.randn(6, 8).double(), torch.randn(4, 6).double()
    for step, falls in (("2/L", True), ("2.1/L", False)):
        s = spec("gradient_descent", {"fit": FIT}, step=step, layers=40)
        assert claims("gradient_descent", {"fit": FIT}, step=step)["monotone"] is falls
        total = unroll.compile(s, parameters={"A": A}, dtype=torch.float64).trace(x).terms["total"]
        assert bool((total[1:] <= total[:-1] + 1e-12).all()) is falls


@pytest.mark.parametrize(("eta", "verdict"), [(1e-4, "holds"), (10.0, "noted")])
def test_check_says_how_an_open_condition_stands_with_the_numbers_it_has(eta, verdict):
    s = spec("proximal_gradient", step="eta")
    s["scalars"]["eta"] = eta
    rows = [r for r in unroll.check(s).rows if "step * L(f) < 2" in r.law]
    assert [r.verdict for r in rows] == [verdict] and "against 2" in rows[0].measured


def test_multiplicative_descends_on_quadratic_fits_of_nonnegative_data_and_claims_no_more():
    positive = lambda *shape: {"shape": list(shape), "positive": True}
    s = spec("multiplicative", {"fit": FIT}) | {
        "variables": {"z": positive("n")}, "inputs": {"x": positive("m")}, "parameters": {"A": positive("m", "n")},
    }  # fmt: skip
    assert "monotone" in str(unroll.derive(s))
    assert "monotone" in str(unroll.derive(s, overrides=["unroll.numbers.power=1/2"]))
    assert "power <= 1 does not hold, 2 against 1" in " ".join(
        str(unroll.derive(s, overrides=["unroll.numbers.power=2"])).split()
    )
    fourth = {**s, "minimize": {"fit": "sum((A @ z)**4)/4 - dot(x, A @ z)"}}
    assert "monotone" not in str(unroll.derive(fourth))
    net = unroll.compile({**s, "unroll": {**s["unroll"], "layers": 30}}, dtype=torch.float64)
    total = net.trace(torch.rand(5, 6).double()).terms["total"]
    assert (total[1:] <= total[:-1] + 1e-12).all()


@pytest.mark.parametrize("claim", ["step * L(f)", "step * L(f) < 1 < 2", "grad(f, z) < 1"])
def test_a_condition_is_a_comparison_of_two_numbers(claim):
    own = {
        "algorithm": "own", "solves": "f(z)", "scalars": {"step": "1 / L(f)"},
        "updates": {"z": "z - step * grad(f, z)"}, "claims": [{"optimum": claim}],
    }  # fmt: skip
    with pytest.raises(SpecError, match="E320"):
        print(unroll.derive({**spec("own", {"fit": FIT}), "algorithms": {"own": own}}))


def test_where_a_constant_is_not_known_nothing_is_claimed():
    d = unroll.derive(spec("gradient_descent", {"fit": "sum((x - A @ z)**4)"}, step="0.01"))
    assert d.exact.claims == () and [a.target.name for a in d.exact.definitions] == ["step"]
