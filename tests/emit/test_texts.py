"""What an emitted module says of itself is true: its problem, what is not exact in it, its helpers."""

from __future__ import annotations

import ast
import re

import pytest
import torch

from unroll.language.constructors import add
from unroll.language.parse import Scope, parse_matrix
from unroll.language.problem import from_spec
from unroll.pages.stages import stage
from unroll.spec import load

CHOSEN = ("fastica", "msp", "pca", "palm", "hopfield", "ista", "crate_paper", "attention_only", "rate_reduction_flow")


def head_of(source: str) -> str:
    return ast.get_docstring(ast.parse(source)) or ""


@pytest.mark.parametrize("name", CHOSEN)
def test_the_problem_that_a_module_names_is_that_of_its_spec(name: str) -> None:
    spec = load(name).layers()
    head, problem = head_of(stage(spec, "source")), from_spec(spec)
    found = re.search(r"(minimise|maximise) over (.+?): (.+?)(?:, subject to (.+))?$", head, re.MULTILINE)
    assert found is not None, head
    goal, over, formula, sets = found.groups()
    assert (goal == "maximise") == (spec.maximize is not None)
    assert over.split(", ") == [v.name for v in problem.variables]
    assert (sets or "") == ", ".join(spec.constraints)
    read = parse_matrix(formula, Scope(problem.scope.names, broadcast=True))
    assert read is add(*problem.penalties)
    assert "+ -" not in formula and " in " not in formula.replace(" in K", "")


@pytest.mark.parametrize("name", CHOSEN)
def test_a_module_names_what_is_not_exact_as_the_page_does(name: str) -> None:
    head, page = head_of(stage(name, "source")), stage(name, "derivation")
    _, _, listed = page.partition("\nnot exact  ")
    names = re.findall(r"^ *(?:\w+: )?([a-z_]+(?:\(.*\))?)$", listed, re.MULTILINE)
    said = re.search(r"^not exact: (.*)$", head, re.MULTILINE)
    assert (said is not None) == bool(names), (head, names)
    assert said is None or all(n in said[1] for n in names)


def test_one_layer_is_a_layer() -> None:
    assert "1 unrolled layer of" in stage("hopfield", "source") and ", 1 layer," in stage("hopfield", "derivation")


@pytest.mark.parametrize(
    ("name", "said"),
    [("pca", "nothing is learned"), ("lista", "the algorithm itself."), ("redunet", "is NaN until construct")],
)
def test_initialise_says_what_it_sets(name: str, said: str) -> None:
    assert said in stage(name, "source")


def test_the_columns_of_a_helper_are_along_the_axis_that_it_names() -> None:
    """A matrix p x d, as it is stored: p vectors of length d, orthonormal."""
    space: dict[str, object] = {}
    source = stage("pca", "source")
    exec(compile(source, "pca", "exec"), space)
    project = space["project_stiefel"]
    assert callable(project) and "orthonormal columns (here: the last axis)" in source
    u = project(torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(u @ u.mT, torch.eye(3, dtype=torch.float64))
    assert (u.mT @ u - torch.eye(7, dtype=torch.float64)).abs().max() > 0.1


def test_a_spec_of_the_library_names_its_sets_apart_from_its_terms() -> None:
    for name in ("fastica", "palm"):
        terms, _, sets = stage(name, "problem").partition("subject to\n")
        assert sets.split() and "sphere" not in terms and "unit_columns" not in terms
