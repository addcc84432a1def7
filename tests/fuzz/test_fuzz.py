"""The fuzz command at its smallest: a few cases of each kind, and wrong derivations, which it must call wrong."""

from __future__ import annotations

import pytest
import torch

from unroll.language.constructors import scale

from . import checks, oracle
from .checks import check_curvature, check_gradient, check_prox, draw_gradient
from .drawing import Author, Case
from .judging import judged


@pytest.mark.parametrize("what", ["prox", "curvature", "solve", "learn"])
def test_a_few_cases_are_right_or_refused(what: str) -> None:
    found = [judged(what, f"smoke/{what}/{i}") for i in range(3)]
    assert all(o.verdict in ("right", "refused") for o in found), found
    assert draw_gradient("same").yaml == draw_gradient("same").yaml


def one(term: str) -> Case:
    return Author("one").case({"t": term})


@pytest.mark.parametrize("factor", [1, -1, 1.0001])
def test_a_wrong_gradient_is_called_wrong(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    author = Author("one")
    case, true = one(f"sumsq({author.z})"), checks.gradient
    monkeypatch.setattr(checks, "gradient", lambda e, z: scale(factor, true(e, z)))
    if factor == 1:
        check_gradient(case)
    else:
        with pytest.raises(checks.Wrong):
            check_gradient(case)


def test_a_prox_of_another_term_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case, true = one(f"lam*norm1({Author('one').z})"), checks.proximable
    check_prox(case)
    monkeypatch.setattr(checks, "proximable", lambda e, z: true(scale(1.1, e), z))
    with pytest.raises(checks.Wrong):
        check_prox(case)


def test_a_bound_that_is_too_small_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case, true = one(f"sumsq({Author('one').z})"), checks.bounds
    check_curvature(case)
    monkeypatch.setattr(checks, "bounds", lambda e, z: true(scale(0.9, e), z))
    with pytest.raises(checks.Wrong):
        check_curvature(case)


@pytest.mark.parametrize("term", ["sum(sigmoid(1/(1 - z)))", "sum(1/(1 + 1/(1 - z)))", "sum(1 - z*log(1 - z))"])
def test_at_a_pole_and_at_an_edge_there_is_no_value_to_compare_with(term: str) -> None:
    f = oracle.function([term], {}, "z")
    found = f(torch.tensor([[[1.0]], [[0.5]]], dtype=torch.float64))
    assert found[0].isnan() and found[1].isfinite()


def test_at_a_tie_a_case_may_be_taken_for_all_entries_at_once() -> None:
    """All of 702/gradient/355 at 0 take the case that hardly any point beside 0 takes for all."""
    found = judged("gradient", "702/gradient/355")
    assert "where(" in found.yaml and found.verdict == "right", found.reason
