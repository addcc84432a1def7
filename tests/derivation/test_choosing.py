"""The text that is taken where a spec says `algorithm: auto`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unroll
from unroll.derivation.algorithms import find
from unroll.errors import SpecError
from unroll.solver.solve import is_map

FIT = "1/2 * sumsq(x - A @ z)"


def spec(minimize, constraints=(), **said):
    return {
        "dims": {"m": 6, "n": 8}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": 0.1, "mu": 0.2}, "minimize": minimize, "constraints": list(constraints),
        "unroll": {"algorithm": "auto", "layers": 3, **said},
    }  # fmt: skip


PROBLEMS = {
    "gradient_descent": spec({"fit": FIT, "ridge": "mu * sumsq(z)"}),
    "proximal_gradient": spec({"fit": FIT, "sparsity": "lam * norm1(z)"}),
    "projected_gradient": spec({"fit": FIT}, ["z in simplex"]),
    "admm": spec({"fit": FIT, "sparsity": "lam * norm1(z)", "flat": "mu * norm1(difference(difference(z)))"}),
    "douglas_rachford": spec({"fit": "norm1(z)"}, ["z in affine(A, x)"]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_chosen_is_what_is_named(name):
    auto = unroll.derive(PROBLEMS[name])
    assert auto.exact.algorithm == name
    named = unroll.derive(PROBLEMS[name], overrides=[f"unroll.algorithm={name}"])
    assert auto.spec == named.spec and auto.step.assigns == named.step.assigns
    assert f"chosen: {name}" in str(auto) and "chosen" not in str(named)


@pytest.mark.parametrize("name", PROBLEMS)
def test_solving_chooses_by_the_same_rule(name):
    torch.manual_seed(0)
    A, x = torch.randn(6, 8).double(), torch.randn(2, 6).double()
    found = unroll.solve(PROBLEMS[name], x, parameters={"A": A}, max_iterations=3)
    assert found.algorithm == (f"{name}, accelerated" if is_map(find(name)) else name)


def test_the_reason_names_what_fits_and_why_the_others_do_not():
    page = " ".join(str(unroll.derive(PROBLEMS["proximal_gradient"])).split())
    assert "the optimum: every term is convex" in page
    assert "fista" in page.split("fit too: ")[1].split("do not fit")[0]
    assert "gradient_descent, heavy_ball, nesterov, multiplicative, newton (λ ‖z‖₁ is not smooth)" in page


def test_of_what_is_not_convex_no_optimum_is_claimed():
    page = " ".join(str(unroll.derive(spec({"fit": FIT, "a": "mu * sum(log(1 + z**2))"}))).split())
    assert "claims that no step raises the objective, which is not known to be convex" in page


def test_what_the_spec_says_of_its_algorithm_has_to_be_known_to_the_text():
    s = spec({"fit": FIT, "sparsity": "lam * norm1(z)"}, numbers={"rho": 2})
    d = unroll.derive(s)
    assert d.exact.algorithm == "admm" and "it has" not in str(d)
    assert "proximal_gradient" in str(d).split("do not fit")[1] and "no number 'rho'" in " ".join(str(d).split())


def test_nothing_that_fits_is_refused_with_a_reason_for_each():
    with pytest.raises(SpecError, match="E303") as caught:
        unroll.derive(spec({"fit": FIT, "odd": "norm1(z)**2"}))
    said = str(caught.value)
    assert "no algorithm fits and claims something of this problem" in said
    assert "projected_gradient (‖z‖₁² is neither smooth nor a constraint)" in said and "palm (" in said
    with pytest.raises(SpecError, match="half_quadratic fits|admm fits"):
        unroll.derive(spec({"fit": FIT, "count": "lam*norm0(z)", "t": "mu*norm1(difference(difference(z)))"}))


def test_each_block_chooses_for_its_own_terms():
    s = spec({"fit": FIT, "sparsity": "lam * norm1(z)", "far": "mu * sumsq(z)"})
    del s["unroll"]["algorithm"]
    s["unroll"]["blocks"] = [
        {"block": "first", "algorithm": "auto", "terms": ["fit", "sparsity"]},
        {"block": "second", "algorithm": "auto", "terms": ["far"]},
    ]
    d = unroll.derive(s)
    assert d.exact.algorithm == "proximal_gradient and gradient_descent"
    assert [b.algorithm for b in d.spec.unroll.blocks] == ["proximal_gradient", "gradient_descent"]


def test_several_variables_take_a_text_of_as_many():
    s = spec({"fit": "1/2 * sumsq(X - L @ R)", "sparsity": "lam * norm1(R)"}) | {
        "variables": {"L": ["m", 2], "R": [2, "n"]}, "inputs": {"X": ["m", "n"]}, "parameters": {},
    }  # fmt: skip
    d = unroll.derive(s)
    assert d.exact.algorithm == "palm" and "not known to be convex" in " ".join(str(d).split())


def test_a_saved_network_keeps_the_choice(tmp_path, monkeypatch):
    net = unroll.compile(PROBLEMS["proximal_gradient"])
    assert "of proximal_gradient for" in net.source
    net.save(tmp_path)
    assert "algorithm: proximal_gradient" in (tmp_path / "spec.yaml").read_text()
    monkeypatch.setattr("unroll.derivation.blocks.choose", None)
    x = torch.randn(2, 6)
    assert torch.equal(unroll.restore(tmp_path)(x), net(x))


def test_a_text_of_the_spec_itself_is_among_them():
    own = {
        "algorithm": "mine", "solves": "f(z)", "scalars": {"step": "1 / L(f)"},
        "updates": {"z": "z - step * grad(f, z)"}, "claims": ["monotone", "optimum"],
    }  # fmt: skip
    s = {**PROBLEMS["gradient_descent"], "algorithms": {"aaa": {**own, "algorithm": "aaa"}}}
    assert unroll.derive(s).exact.algorithm == "aaa"
    with pytest.raises(SpecError, match="E320"):
        unroll.derive({**s, "algorithms": {"auto": {**own, "algorithm": "auto"}}})


def test_a_model_around_the_layers_keeps_the_choice(tmp_path):
    s = {
        "dims": {"d": 8, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "parameters": {"D": ["d", "d"]}, "scalars": {"lam": 0.1},
        "minimize": {"fit": "1/2 * sumsq(X - D @ Z)", "sparsity": "lam * norm1(Z)"},
        "unroll": {"algorithm": "auto", "layers": 1},
        "model": {"embed": {"kind": "patches", "image": [1, 8, 8], "patch": 4}, "head": {"kind": "mean", "classes": 3}},
    }  # fmt: skip
    net = unroll.compile(s)
    assert net.spec.unroll.algorithm == "proximal_gradient"
    net.save(tmp_path)
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(unroll.restore(tmp_path)(image), net(image))


@pytest.mark.parametrize(("algorithm", "minimize", "taken", "other"), [
    ("douglas_rachford", {"a": FIT, "b": "lam * norm1(z)"}, {"f": "a", "g": "b"}, {"f": ["b"], "g": ["a"]}),
    ("admm", {"a": FIT, "b": "lam * norm1(z)", "c": "mu * sumsq(z)"}, {"f": "a, c", "g": "b"}, {"f": ["a"], "g": ["b", "c"]}),
])  # fmt: skip
def test_the_next_best_dealing_is_printed_and_can_be_taken(algorithm, minimize, taken, other):
    first = unroll.derive(spec(minimize, algorithm=algorithm))
    for letter, terms in taken.items():
        assert any(n.startswith(f"{letter}: {terms}") for n in first.exact.notes)
    said = ", ".join(f"{letter}: [{', '.join(terms)}]" for letter, terms in other.items())
    assert f"or split: {{{said}}}" in str(first)
    second = unroll.derive(spec(minimize, algorithm=algorithm, split=other))
    assert {h.letter: list(h.terms) for h in second.exact.hands} == other
    assert "or split" not in str(second)


def test_where_one_dealing_fits_no_other_is_printed():
    assert "or split" not in str(unroll.derive(spec({"a": FIT, "b": "mu * tv(z)"}, algorithm="half_quadratic")))


@pytest.mark.parametrize("held", ["sum(stop_gradient(z)*z)", "norm1(stop_gradient(1/(abs(z) + 0.1))*z)"])
def test_of_what_is_held_nothing_is_claimed_and_nothing_chosen(held: str) -> None:
    """Its fixed points need not be least, and its value may rise: a text has to be named."""
    spec: dict[str, Any] = {
        "dims": {"n": 4}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": {"f": "1/2*sumsq(x - z)", "l": held},
    }  # fmt: skip
    with pytest.raises(unroll.UnrollError, match="claims something") as refused:
        unroll.compile({**spec, "unroll": {"algorithm": "auto", "layers": 3}})
    assert "takes it, without a claim" in str(refused.value)
    found = unroll.solve(spec, torch.ones(1, 4, dtype=torch.float64), algorithm="proximal_gradient")
    assert not found.convex and "not known to be convex" in str(found)
