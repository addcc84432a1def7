"""What `unroll show` says is true of the mathematics: curvature in the sense of the objective, terms that a block replaces, sets of a prox, places of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

import unroll
from unroll.language.columns import WIDTH
from unroll.pages.stages import stage

PROBLEM: dict[str, Any] = {
    "dims": {"m": 4, "n": 3},
    "variables": {"z": ["n"]},
    "inputs": {"x": ["m"]},
    "parameters": {"A": ["m", "n"]},
}


def shown(extra: Mapping[str, Any], algorithm: str = "gradient_descent", **unrolled: Any) -> str:
    return stage({**PROBLEM, **extra, "unroll": {"algorithm": algorithm, "layers": 1, **unrolled}}, "derivation")


def joined(page: str) -> str:
    """The page without its line breaks."""
    return " ".join(page.split())


KINDS = {
    "1/2 * sumsq(x - A @ z)": ("convex", "convex", "‖A‖₂²"),
    "-1/2 * sumsq(x - A @ z)": ("concave", "concave", "‖A‖₂²"),
    "sum(cos(z))": ("not known to be convex", "not known to be concave", "1"),
    "sum(log(1 + exp(A @ z)))": ("convex", "convex", "‖A‖₂²"),
}


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize("formula", KINDS)
def test_convexity_is_said_of_the_term_that_stands_there(formula: str, goal: str) -> None:
    page = joined(shown({goal: {"term": formula}}, step=0.1))
    found = re.search(r"term:? smooth, ([^,]*), L =", page)
    assert found is not None and found[1] == KINDS[formula][goal == "maximize"], page


def test_what_has_no_constant_that_is_known_says_only_that() -> None:
    page = joined(shown({"minimize": {"term": "sum(exp(A @ z))"}}, step=0.1))
    assert "no Lipschitz constant is known" in page and "no Lipschitz constant," not in page


def test_a_maximised_penalty_and_its_set_are_not_called_convex_in_the_wrong_sense() -> None:
    extra = {"maximize": {"fit": "-1/2 * sumsq(x - A @ z)", "sparsity": "-norm1(z)"}, "constraints": ["z in simplex"]}
    page = joined(shown({**extra, "constraints": ["z >= 0"]}, "proximal_gradient"))
    assert "sparsity: its negative is proximable, convex" in page
    assert "subject to z ∈ nonneg" in page and "constraint: convex set" in page and "−(z" not in page
    assert "f is minus the smooth terms" in page


def test_penalties_that_are_not_convex_are_called_so_only_where_that_is_proved() -> None:
    assert "proximable, not convex" in joined(stage("mcp_network", "derivation"))


CRATE, ALPHA = "crate", "crate_alpha"


@cache
def page_of(name: str) -> str:
    return stage(name, "derivation")


def test_terms_that_a_surrogate_replaces_are_no_constants() -> None:
    assert "constant" not in re.sub("Lipschitz constant|f'' constant", "", page_of(CRATE) + page_of(ALPHA))
    assert "expansion: in its place block sparsify has a surrogate" in joined(page_of(CRATE))
    assert "sparsity: in its place block sparsify has a surrogate" in joined(page_of(ALPHA))


def test_a_term_that_does_not_move_is_constant() -> None:
    page = joined(shown({"minimize": {"fit": "1/2 * sumsq(x - A @ z)", "rest": "sumsq(x)"}}))
    assert re.search(r"rest:? constant", page)


PLACES = {
    r"W_out\s.*\n\s+for U\[k\], on the way out$": CRATE,
    r"W_out_bias\s.*\n\s+for 0, added$": CRATE,
    r"W\s.*\n\s+for U\[k\], elsewhere$": CRATE,
    r"compress_norm_weight\s.*\n\s+for 𝟏, weight of the norm$": CRATE,
    r"compress_norm_bias\s.*\n\s+for 0, bias of the norm$": CRATE,
    r"Q\s.*\n\s+for D, elsewhere$": ALPHA,
    r"Q_out\s.*\n\s+for D, on the way out$": ALPHA,
}


@pytest.mark.parametrize("row", PLACES)
def test_a_learned_parameter_says_which_occurrences_it_replaces(row: str) -> None:
    page = page_of(PLACES[row])
    assert re.search(row, page, re.MULTILINE), page


@pytest.mark.parametrize("where", ["gradient", "prox"])
def test_a_learned_number_says_which_occurrences_it_replaces(where: str) -> None:
    spec = {"use": "lasso", "dims": {"m": 4, "n": 3}}
    unrolled = {"algorithm": "proximal_gradient", "layers": 2, "learn": {"s": {"replaces": "step", "where": where}}}
    page = joined(stage({**spec, "unroll": unrolled}, "derivation"))
    assert f"for step, in the {where}" in page


def test_the_step_with_learned_parameters_shows_them_in_the_prox_too() -> None:
    page = stage("lista", "derivation")
    assert "z ← prox[θ ‖z‖₁](W1 x + W2 z)" in page and page.count("prox[λ step ‖z‖₁]") == 1


SETS = {"z >= 0": "z >= 0", "z in box(-1, 2)": "-1 <= z <= 2", "z in box(-inf, 1)": "z <= 1"}


@pytest.mark.parametrize("constraint", SETS)
def test_the_docstring_of_a_prox_names_its_set(constraint: str) -> None:
    extra = {"minimize": {"fit": "1/2 * sumsq(x - A @ z)", "sparsity": "norm1(z)"}, "constraints": [constraint]}
    source = unroll.compile({**PROBLEM, **extra, "unroll": {"algorithm": "proximal_gradient", "layers": 1}}).source
    assert f'subject to {SETS[constraint]}"""' in source
    free = unroll.compile(
        {**PROBLEM, "minimize": extra["minimize"], "unroll": {"algorithm": "proximal_gradient", "layers": 1}}
    ).source
    assert "subject to" not in free


def test_a_residual_is_named_with_what_it_weighs() -> None:
    page = joined(stage("energy_transformer", "derivation"))
    assert "residual: Z in place of layer_norm(Z" in page


@pytest.mark.parametrize("name", [CRATE, ALPHA, "lista", "palm", "mixture_denoiser"])
def test_pages_fit_a_terminal(name: str) -> None:
    head, _, rest = page_of(name).partition("\n\n")
    cells = ("one per layer", "shared by layers")  # of a table that is narrow already
    assert all(len(line) <= WIDTH for line in rest.splitlines() if not any(c in line for c in cells)) and head


def test_every_prox_stands_once_per_block() -> None:
    page = stage("palm", "derivation")
    assert page.count("v ↦") == 1 and "in Z: smooth" in joined(page) and "in A: smooth" in joined(page)


def test_the_page_names_the_terms_of_a_used_objective_that_were_not_taken() -> None:
    written = (
        "use: lasso\nminimize: {fidelity: 1/2 * sumsq(A @ z - x)}\nunroll: {algorithm: gradient_descent, layers: 2}\n"
    )
    assert "terms of lasso not taken: sparsity" in str(unroll.derive(written))
    assert "not taken" not in str(unroll.derive("lista"))
