"""Long formulas in parts that have names: the parts put back are the formula, and what is printed is shorter."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from random_expressions import DIMS, LAM, Q, Random, values

import unroll
from unroll.language.constructors import (
    elementwise,
    family_softmax,
    family_sum,
    hold,
    matmul,
    member,
    symbol,
    transpose,
)
from unroll.language.naming import LONG, MOST, WIDTH, InParts, in_parts
from unroll.language.nodes import Expr, slot
from unroll.language.show import text
from unroll.language.traversal import substitute
from unroll.network.evaluate import evaluate

SIZES = {"m": 5, "n": 4, "T": 3, "p": 2, "K": 2}


def whole_again(shown: InParts) -> Expr:
    e = shown.whole
    assert isinstance(e, Expr)
    for name, part in reversed(shown.parts):
        e = substitute(e, {name: part})
    return e


@pytest.mark.parametrize("block", range(4))
def test_parts_put_back_have_the_value_of_the_formula(block: int) -> None:
    named = 0
    for seed in range(60 * block, 60 * block + 60):
        draw = Random(seed)
        e = draw.expr(draw.size(), draw.size(), 5)
        (shown,) = in_parts((e,))
        named += bool(shown.parts)
        if not shown.parts:
            assert shown.whole is e
            continue
        dims = {d.name: SIZES.get(d.name, 3) for d in DIMS}
        given, scalars = values(dims, (), seed), {LAM: 0.3, **{d: dims[d.name] for d in DIMS}}
        want, found = evaluate(e, given, scalars), evaluate(whole_again(shown), given, scalars)
        if bool(want.isfinite().all()):
            assert torch.allclose(found, want, rtol=1e-9, atol=1e-9), (seed, text(e))
    assert named > 5


def test_what_is_written_twice_is_named_and_read_transposed_where_it_is() -> None:
    a, b = symbol("a_weight_of_the_layer", 4, 4), symbol("an_other_weight_of_it", 4, 4)
    x = elementwise(sp.tanh(slot(0)), matmul(a, b, b, a))
    (shown,) = in_parts((matmul(x, a, transpose(x), b, x),))
    (named,) = shown.parts
    assert named[1] == x
    assert text(shown.whole) == "part @ a_weight_of_the_layer @ part.T @ an_other_weight_of_it @ part"


def test_shares_of_members_are_members_and_names_that_are_taken_are_left() -> None:
    z, taken = symbol("Z_of_the_tokens", 6, 9), symbol("shares", 9, 9)
    u = member(symbol("U_of_the_heads", 6, 3, family=sp.Symbol("K")), "k")
    weights = hold(family_softmax("k", sp.Symbol("K"), matmul(transpose(u), z, transpose(z), z, taken)))
    e = family_sum("k", sp.Symbol("K"), matmul(u, weights, transpose(weights), weights))
    (shown,) = in_parts((e,))
    (named,) = shown.parts
    assert text(shown.whole) == "sum(U_of_the_heads[k] @ shares_2[k] @ shares_2[k].T @ shares_2[k] for k in K)"
    assert (text(named[0]), named[1]) == ("shares_2[k]", weights)


@pytest.mark.parametrize("spec", ["tost", "redunet_2d", "transformer", "energy_transformer"])
def test_comments_of_shipped_networks_are_lines_that_can_be_read(spec: str) -> None:
    net = unroll.compile(spec)
    comments = [line.strip() for line in net.source.splitlines() if line.strip().startswith("# ") and " <- " in line]
    assert comments
    assert max(map(len, comments)) <= LONG + WIDTH // 4
    assert all(line[2:] in net.source.split('"""')[1] for line in comments)  # the header says the same, and its parts


def test_at_most_so_many_parts() -> None:
    e: Expr = Q
    for i in range(40):
        e = elementwise(sp.sin(slot(0)) + i, e)
    (shown,) = in_parts((e,))
    assert len(shown.parts) <= MOST


def test_no_name_of_a_part_means_two_things_in_one_text() -> None:
    text_of = unroll.compile("tost", dims={"d": 24, "K": 3, "p": 8}, overrides=["unroll.layers=1"]).source.split('"""')[
        1
    ]
    names = [line.strip().removeprefix("with ").split(" = ")[0] for line in text_of.splitlines() if " = " in line]
    assert len(names) > 3 and len(set(names)) == len(names)
    long = "tanh(Z.T @ a_long_name_of_a_matrix @ Z)"
    spec = {
        "objective": "taken", "dims": {"d": 3, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "parameters": {"part": ["d", "d"], "a_long_name_of_a_matrix": ["d", "d"]},
        "minimize": {"f": "1/2 * sumsq(Z - X) + sumsq(part @ Z)"},
        "unroll": {"layers": 1, "start": {"Z": "X"}, "blocks": [
            {"block": "b", "output": f"Z + Z @ {long} @ {long} @ {long}"}]},
    }  # fmt: skip
    assert "    part_2 = tanh(" in unroll.compile(spec).source
