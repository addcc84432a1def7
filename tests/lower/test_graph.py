"""Graphs and passes: every value as the mathematics says, every pass does what it claims."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import networkx as nx
import pytest
import sympy as sp
import torch
from random_expressions import (
    DIMS,
    LAM,
    SYMBOLS,
    A,
    G,
    K,
    M,
    N,
    Q,
    Random,
    T,
    U,
    V,
    W,
    X,
    Y,
    Z,
    problem,
    stored,
    values,
)
from torch import Tensor

import unroll
from unroll.emit.interpret import difference
from unroll.emit.objective import objective
from unroll.language.constructors import (
    add,
    diag,
    elementwise,
    eye,
    family_sum,
    indicator,
    inverse,
    logdet,
    matmul,
    member,
    project,
    scale,
    softmax,
    total,
    transpose,
)
from unroll.language.nodes import ONE, Expr, slot
from unroll.lower.graph import Builder, Graph, axes_text, lower_terms
from unroll.lower.operations import Ref, Stage
from unroll.lower.passes import Optimised, Sizes, collect, flatten, gram, optimise, order, verify
from unroll.network.evaluate import evaluate
from unroll.network.network import load
from unroll.pages.graph_picture import graph_text, mermaid, svg

SHAPES = (
    {"m": 3, "n": 4, "T": 2, "K": 3},
    {"m": 1, "n": 4, "T": 3, "K": 1},
    {"m": 5, "n": 1, "T": 1, "K": 2},
    {"m": 2, "n": 2, "T": 2, "K": 2},
)
BATCHES = ((), (3,), (2, 3), (0,))


def compiled(e: Expr, dims: dict[str, int]) -> Optimised:
    return optimise(lower_terms(problem({"e": e}, dims)), Sizes({d: dims[d.name] for d in DIMS}, 1))


def emitted(e: Expr, dims: dict[str, int], given: dict) -> Tensor:
    """The value of the emitted text, in mathematical layout."""
    p, graph = problem({"e": e}, dims), compiled(e, dims).graph
    function = load(objective(p, graph), "test")["objective"]
    found = function(*(stored(s, given[s]) for s in (*p.variables, *p.inputs, *p.parameters)), 0.3)["e"]
    found = torch.as_tensor(found, dtype=torch.float64)
    tags = [t for t in graph.view(graph.roots["term", "e"]).tags if t in ("r", "c")]
    if tags == ["c", "r"]:
        return found.mT
    return found if len(tags) == 2 else found.unsqueeze(-2 if tags == ["c"] else -1) if tags else found[..., None, None]


def exact(e: Expr, dims: dict[str, int], given: dict) -> Tensor:
    return evaluate(e, given, {LAM: 0.3, **{d: dims[d.name] for d in DIMS}})


@pytest.mark.parametrize("block", range(8))
def test_emitted_text_has_the_value_that_the_mathematics_says(block: int) -> None:
    compared = 0
    for seed in range(40 * block, 40 * block + 40):
        draw, dims, batch = Random(seed), SHAPES[seed % 4], BATCHES[(seed // 4) % 4]
        e = draw.expr(draw.size(), draw.size(), 3)
        given = values(dims, batch, seed)
        want = exact(e, dims, given)
        found = emitted(e, dims, given)
        assert found.shape[-2:] == want.shape[-2:], (seed, e)
        if bool(want.isfinite().all()) and want.numel():
            compared += 1
            size = max(1.0, float(want.abs().max()))
            assert float((found - want).abs().max()) <= 1e-10 * size, (seed, e)
    assert compared > 20


@pytest.mark.parametrize("block", range(4))
def test_gradients_flow_through_emitted_text_as_through_the_definition(block: int) -> None:
    compared = 0
    for seed in range(20 * block, 20 * block + 20):
        draw, dims = Random(seed), SHAPES[0]
        e = total(elementwise(sp.sin(slot(0)), draw.expr(N, T, 2)))
        given = values(dims, (2,), seed)
        leaves = {s: v.clone().requires_grad_() for s, v in given.items()}
        want, found = exact(e, dims, leaves).sum(), emitted(e, dims, leaves).sum()
        if not want.requires_grad:
            assert not found.requires_grad
            continue
        tensors = list(leaves.values())
        for a, b in zip(
            *(torch.autograd.grad(v, tensors, allow_unused=True, materialize_grads=True) for v in (want, found)),
            strict=True,
        ):
            if bool(a.isfinite().all()):
                compared += 1
                assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(a.abs().max())), (seed, e)
    assert compared > 50


SETS = (
    ("nonneg", Z, ()), ("box", Z, (sp.Rational(-1, 4), sp.Rational(1, 4))), ("simplex", Z, ()), ("simplex", Q, ()),
    ("ball1", Z, (LAM,)), ("ball1", Q, (LAM,)), ("ball2", Z, (LAM,)), ("ball_inf", Z, (LAM,)), ("sphere", Z, ()),
    ("sphere", Q, ()), ("unit_columns", Z, ()), ("stiefel", Z, ()), ("orthogonal", G, ()), ("psd", G, ()),
    ("sparse", Z, (sp.Integer(2),)), ("sparse", Q, (sp.Integer(2),)), ("rank_at_most", Z, (sp.Integer(1),)),
)  # fmt: skip


@pytest.mark.parametrize("name, x, params", SETS, ids=lambda p: str(p))
def test_projections_are_those_of_the_definition_and_lie_in_their_set(name: str, x: Expr, params: tuple) -> None:
    dims = SHAPES[0]
    nearest = project(name, x, *params)
    for batch in BATCHES:
        given = values(dims, batch, 1)
        if x is Z or batch != (0,):
            found, want = emitted(nearest, dims, given), exact(nearest, dims, given) if batch != (0,) else given[x]
            assert found.shape == want.shape
        if batch != (0,):
            assert float((found - want).abs().max()) < 1e-9
            inside = emitted(indicator(name, x, *params), dims, {**given, x: found})
            outside = emitted(indicator(name, x, *params), dims, {**given, x: 20 * given[x]})
            assert bool((inside == 0).all()) and bool((outside == torch.inf).all())
            if name not in ("simplex", "sphere", "stiefel", "orthogonal"):  # the others hold 0, and what is between
                half = emitted(nearest, dims, {**given, x: found / 2})
                assert float((half - found / 2).abs().max()) < 1e-12


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scores", [G, matmul(transpose(Z), Z), matmul(transpose(Z), elementwise(sp.tanh(slot(0)), Z))])
def test_causal_shares_look_back_along_either_axis(scores: Expr, axis: int) -> None:
    """Stored as it is written, and transposed where there are samples: what is looked at comes no later than what looks."""
    given, e = values(SHAPES[0], (3,), 0), softmax(scores, axis, causal=True)
    found = emitted(e, SHAPES[0], given)
    assert torch.allclose(found, exact(e, SHAPES[0], given), atol=1e-12)
    assert torch.allclose(found.sum(axis - 2), torch.ones((), dtype=torch.float64))
    later = found.tril(-1) if axis == 0 else found.triu(1)
    assert bool((later == 0).all()) and bool((found != 0).any())


def test_an_affine_set_is_where_the_equation_holds() -> None:
    dims, given = SHAPES[0], values(SHAPES[0], (3,), 0)
    inside = emitted(indicator("affine", Q, A, Y), dims, {**given, Y: given[A] @ given[Q]})
    assert bool((inside == 0).all())
    assert bool((emitted(indicator("affine", Q, A, Y), dims, given) == torch.inf).all())


# --- passes -----------------------------------------------------------------------------------------------------------


def ops(graph: Graph, op: str) -> int:
    return sum(n.op == op for n in graph.nodes.values())


def test_a_product_and_its_transpose_are_one_value() -> None:
    graph = compiled(add(matmul(A, Z), transpose(matmul(transpose(Z), transpose(A)))), SHAPES[0]).graph
    assert ops(graph, "matmul") == 1


def test_a_gram_matrix_is_known_to_be_symmetric() -> None:
    graph = compiled(matmul(transpose(A), A, Z), {**SHAPES[0], "m": 50}).graph
    assert [n.symmetric for n in graph.nodes.values() if n.op == "matmul" and n.stage == Stage.SETUP] == [True]


@pytest.mark.parametrize("m, n, reused", [(50, 10, True), (10, 50, False)])
def test_a_chain_is_multiplied_in_the_cheapest_order(m: int, n: int, reused: bool) -> None:
    graph = compiled(matmul(transpose(A), A, Q), {**SHAPES[0], "m": m, "n": n}).graph
    assert any(v.op == "matmul" and v.stage == Stage.SETUP for v in graph.nodes.values()) == reused


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_positive_definite_inverse_becomes_a_cholesky_solve(side: str) -> None:
    s = add(eye(N), scale(LAM, matmul(transpose(A), A)))
    e = matmul(inverse(s), Q) if side == "left" else matmul(transpose(Q), inverse(s))
    graph = compiled(add(total(e), logdet(s)), SHAPES[0]).graph
    assert (ops(graph, "cholesky"), ops(graph, "cholesky_solve"), ops(graph, "inverse")) == (1, 1, 0)


@pytest.mark.parametrize(("of", "known"), [(eye(M), True), (G, False)])
def test_the_matrix_of_second_differences_is_known_to_be_symmetric(of: Expr, known: bool) -> None:
    """Second differences of the rows of a matrix are symmetric where that is the identity, not where it is any symmetric one."""
    b = Builder(frozenset())
    g = b.leaf("given", "G", (M, M), Stage.SETUP, symmetric=True) if of == G else b.constant("eye", M, M)
    twice = b.add("difference", (b.add("difference", (g,), "difference", False),), "difference", True)
    assert b.nodes[twice.node].symmetric == known


def test_an_inverse_that_may_be_indefinite_is_solved_without_cholesky() -> None:
    graph = compiled(matmul(inverse(add(eye(N), scale(-LAM, matmul(Z, transpose(Z))))), Q), SHAPES[0]).graph
    assert (ops(graph, "cholesky"), ops(graph, "solve")) == (0, 1)


def test_a_sum_over_a_family_is_one_contraction() -> None:
    u = member(U, "k")
    e = family_sum("k", K, matmul(u, transpose(u), X))
    optimised = compiled(e, SHAPES[0])
    assert ops(optimised.graph, "family_sum") == 0
    assert "for" not in objective(problem({"e": e}, SHAPES[0]), optimised.graph)


def test_a_diagonal_matrix_is_never_built_beside_a_product() -> None:
    graph = compiled(matmul(A, diag(W), Q), SHAPES[0]).graph
    assert ops(graph, "diag") == 0


@pytest.mark.parametrize("v", [Z, matmul(A, Z), matmul(transpose(A), A, Z)], ids=["Z", "A Z", "A' A Z"])
@pytest.mark.parametrize("weight", [ONE, LAM, sp.Integer(3)])
@pytest.mark.parametrize(("axis", "turned", "fused"), [(0, False, 1), (1, True, 1), (1, False, 0), (0, True, 0)])
def test_attention_is_fused_where_the_weights_of_each_column_sum_to_one_and_nowhere_else(
    v: Expr, weight: sp.Expr, axis: int, turned: bool, fused: int
) -> None:
    """V' V is symmetric, so shares along the other axis are the transposed matrix: another product."""
    weights = softmax(scale(weight, matmul(transpose(v), v)), axis)
    e = matmul(v, transpose(weights) if turned else weights)
    given = values(SHAPES[0], (3,), 0)
    assert ops(compiled(e, SHAPES[0]).graph, "attention") == fused
    assert torch.allclose(emitted(e, SHAPES[0], given), exact(e, SHAPES[0], given), atol=1e-12)


def test_the_graph_is_a_networkx_dag_with_named_axes() -> None:
    graph = compiled(matmul(A, Z), SHAPES[0]).graph
    g = graph.digraph
    assert nx.is_directed_acyclic_graph(g)
    assert {d["axes"] for _, d in g.nodes(data=True)} >= {"... T n", "m n", "... T m"}


def test_verification_refuses_a_graph_with_wrong_axes() -> None:
    graph = compiled(matmul(A, Z), SHAPES[0]).graph
    i, node = next((i, n) for i, n in graph.nodes.items() if n.op == "matmul")
    from dataclasses import replace

    broken = Graph({**graph.nodes, i: replace(node, shape=(N, T))}, graph.roots)
    with pytest.raises(AssertionError, match="please report"):
        verify(broken)


def test_axes_are_named_as_they_are_stored() -> None:
    graph = lower_terms(problem({"e": add(*(total(elementwise(slot(0) ** 2, s)) for s in (X, V, A)))}, SHAPES[0]))
    named = {n.attrs[0]: axes_text(n) for n in graph.nodes.values() if n.op in ("input", "given")}
    assert named == {"X": "... T m", "v": "... n", "A": "m n"}
    assert len(SYMBOLS) == 9 and M in DIMS


@pytest.mark.parametrize("block", range(4))
def test_no_pass_changes_a_value(block: int) -> None:
    gaps: list[float] = []
    for seed in range(1000 + 8 * block, 1000 + 8 * block + 8):
        draw, dims = Random(seed), SHAPES[seed % 4]
        graph = lower_terms(problem({"e": total(elementwise(sp.tanh(slot(0)), draw.expr(N, T, 3)))}, dims))
        optimise(graph, Sizes({d: dims[d.name] for d in DIMS}, 8), lambda a, b: gaps.append(difference(a, b, dims)))  # noqa: B023
        assert max(gaps, default=0.0) < 1e-10, seed
    assert len(gaps) > 8


def test_a_sum_that_is_read_transposed_is_opened_transposed() -> None:
    """x - (y + 2 z')', square: as one sum x - y' - 2 z."""
    b, n = Builder(), sp.Integer(3)
    x, y, z = (b.leaf("given", name, (n, n), Stage.SETUP) for name in "xyz")
    inner = b.add("add", (y, b.flip(z)), (sp.Integer(1), sp.Integer(2)))
    graph = b.graph({("term", "e"): b.add("add", (x, b.flip(inner)), (sp.Integer(1), sp.Integer(-1)))})
    flat = flatten(graph)
    assert [m.op for m in flat.nodes.values()].count("add") == 1
    assert difference(graph, flat, {}) < 1e-14


def test_a_product_that_is_read_transposed_is_distributed_transposed() -> None:
    """a' (y + (C D)'), square: cheaper as a' y + (a' D') C'."""
    b, n = Builder(), sp.Integer(8)
    c, d, y = (b.leaf("given", name, (n, n), Stage.BODY) for name in "cdy")
    a, one = b.leaf("given", "a", (ONE, n), Stage.BODY), b.number(ONE)
    inner = b.add("add", (y, b.flip(b.product(one, (c, d)))), (sp.Integer(1), sp.Integer(1)))
    graph = b.graph({("term", "e"): b.product(one, (a, inner))})
    cheap, did = gram(graph, Sizes({}, 1))
    assert did.startswith("1 product")
    assert difference(graph, cheap, {}) < 1e-13


def leaf(b: Builder, name: str, stage: Stage = Stage.BODY) -> Ref:
    """A square matrix, so that a transposition is seen by its values alone."""
    return b.leaf("given", name, (sp.Integer(4), sp.Integer(4)), stage)


HEADS: dict[str, Callable[[Builder, Ref], Ref]] = {
    "scale": lambda b, x: b.scaled(b.leaf("scalar", "c", (ONE, ONE), Stage.SETUP), x),
    "matmul": lambda b, x: b.add("matmul", (leaf(b, "m"), x)),
    "matmul, from the right": lambda b, x: b.add("matmul", (x, leaf(b, "m"))),
    "difference": lambda b, x: b.add("difference", (x,), "difference", False),
    "difference, adjoint": lambda b, x: b.add("difference", (x,), "difference", True),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_what_stands_in_front_of_several_terms_is_applied_to_their_sum(name: str, turned: bool) -> None:
    """c v / 2 + 2 c F x - 3 c F y', or c F' ..: in two steps c (v / 2 + F (2 x - 3 y'))."""
    b = Builder()
    turn: Callable[[Ref], Ref] = b.flip if turned else lambda r: r
    x, y, v = (leaf(b, n) for n in "xyv")
    fx, fy = (HEADS["scale"](b, turn(HEADS[name](b, r))) for r in (x, b.flip(y)))
    first = [HEADS["scale"](b, v)] if b.view(fx).shape == b.view(v).shape else []
    coefs = (sp.Rational(1, 2), sp.Integer(2), sp.Integer(-3))[-2 - len(first) :]
    graph = b.graph({("term", "e"): b.add("add", (*first, fx, fy), coefs)})
    once, did = collect(graph, Sizes({}, 1))
    inner = name.split(",")[0]
    assert ops(once, "scale") == 1 + (inner == "scale") and (inner == "scale" or ops(once, inner) == 1)
    assert not did.startswith("0 ")
    assert difference(graph, once, {}) < 1e-13


@pytest.mark.parametrize("turned", [False, True])
def test_a_sign_in_front_of_a_product_goes_into_its_sum(turned: bool) -> None:
    b = Builder()
    s = b.add("add", (leaf(b, "x"), leaf(b, "y")), (sp.Integer(2), sp.Integer(-3)))
    e = b.product(b.number(sp.Integer(-1)), (leaf(b, "m", Stage.SETUP), b.flip(s) if turned else s))
    graph = b.graph({("term", "e"): e})
    ordered, _ = order(graph, Sizes({}, 1))
    assert ops(ordered, "add") == 1
    assert difference(graph, ordered, {}) < 1e-13


@pytest.mark.parametrize("why", ["read elsewhere", "known before the layers", "of another size"])
def test_what_would_not_be_saved_stays_in_its_terms(why: str) -> None:
    b = Builder()
    x, y = leaf(b, "x"), leaf(b, "y", Stage.PROLOGUE if why.startswith("known") else Stage.BODY)
    if why == "of another size":
        y = b.leaf("given", "y", (sp.Integer(4), ONE), Stage.BODY)
    cx, cy = (HEADS["scale"](b, r) for r in (x, y))
    roots = {("term", "e"): b.add("add", (cx, cy), (ONE, ONE))}
    if why == "read elsewhere":
        roots["term", "f"] = cy
    graph = b.graph(roots)
    assert collect(graph, Sizes({}, 1))[1].startswith("0 ")


def test_the_weight_of_a_splitting_is_multiplied_once_in_each_layer() -> None:
    unrolled = {"algorithm": "admm", "layers": 2, "learn": {"theta": {"replaces": "mu / rho"}}}
    net = unroll.compile({"use": "fused_lasso", "dims": {"m": 3, "n": 5}, "unroll": unrolled})
    assert net.source.split("def forward(self")[1].count("self.rho *") == 1
    assert "= -(" not in net.source


def test_a_pass_that_changes_a_value_is_caught() -> None:
    one, two = (compiled(scale(c, matmul(A, Z)), SHAPES[0]).graph for c in (2, 3))
    assert difference(one, two, SHAPES[0]) > 0.1
    assert difference(one, one, SHAPES[0]) == 0


def test_graphs_are_shown_as_text_mermaid_and_svg() -> None:
    graph = compiled(add(matmul(A, Z), scale(LAM, X)), SHAPES[0]).graph
    shown = graph_text(graph)
    assert "once per call" in shown and "A @ Z" in shown and "... T m" in shown
    assert mermaid(graph).count("-->") >= 4
    root = ElementTree.fromstring(svg(graph))
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == sum(
        n.stage != Stage.CONSTANT for n in graph.nodes.values()
    )


def test_a_column_times_a_row_is_a_broadcast() -> None:
    e = matmul(Q, transpose(W))
    optimised = compiled(e, SHAPES[0])
    assert ops(optimised.graph, "matmul") == 0
    given = values(SHAPES[0], (2, 3), 0)
    assert torch.allclose(emitted(e, SHAPES[0], given), given[Q] @ given[W].mT, atol=1e-12)


def test_a_sum_repeats_its_rows_and_columns_itself() -> None:
    """Z - log(row) - column, where all axes are those of Z; without one that has them the ones stay."""
    row, column = total(elementwise(sp.exp(slot(0)), Z), 0), total(Z, 1)
    e = elementwise(slot(0) - sp.log(slot(1)) - slot(2), Z, row, column)
    assert ops(compiled(e, SHAPES[0]).graph, "full") == 0
    given = values(SHAPES[0], (2, 3), 0)
    z = given[Z]
    wanted = z - z.exp().sum(-2, keepdim=True).log() - z.sum(-1, keepdim=True)
    assert torch.allclose(emitted(e, SHAPES[0], given), wanted, atol=1e-12)
    alone = elementwise(slot(0) + slot(1), row, column)
    assert torch.allclose(emitted(alone, SHAPES[0], given), z.exp().sum(-2, keepdim=True) + z.sum(-1, keepdim=True))


def test_a_formula_within_another_is_computed_once() -> None:
    square = elementwise(slot(0) ** 2, Z)
    e = elementwise(slot(0) / (1 + slot(1)), square, total(square, 1))
    text = objective(problem({"e": e}, SHAPES[0]), compiled(e, SHAPES[0]).graph)
    assert text.count(".square()") == 1
    given = values(SHAPES[0], (3,), 0)
    squared = given[Z] ** 2
    assert torch.allclose(emitted(e, SHAPES[0], given), squared / (1 + squared.sum(-1, keepdim=True)), atol=1e-12)


def test_heads_are_laid_out_token_by_token() -> None:
    e = family_sum("k", K, elementwise(sp.sin(slot(0)), total(matmul(transpose(member(U, "k")), X))))
    text = objective(problem({"e": e}, SHAPES[0]), compiled(e, SHAPES[0]).graph)
    assert 'einsum("...' in text, "what has batch axes comes first"


def test_a_drawing_says_which_box_a_number_is_and_which_set_a_projection_is_on() -> None:
    spec = {
        "dims": {"m": 3, "n": 4},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["m"]},
        "parameters": {"A": ["m", "n"]},
    }
    spec |= {"minimize": "1/2 * sumsq(x - A @ z)", "constraints": ["z in simplex"]}
    graph = unroll.compile({**spec, "unroll": {"algorithm": "projected_gradient", "layers": 2}}).program.graph
    for drawn in (mermaid(graph), svg(graph)):
        boxes = [b for b in re.findall(r'(?:\["|<text[^>]*>)([^"<]*)', drawn)]
        named = {b.split(" = ")[0] for b in boxes if " = " in b}
        called = set(re.findall(r"%\d+", " ".join(b.split(" = ")[-1] for b in boxes)))
        assert called and called <= named, (called, named)
        assert "nearest in simplex(" in drawn
