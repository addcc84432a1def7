"""Laws of the normal form: one object per expression, shapes checked, and no constructor changes a value."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import sympy as sp
import torch
from random_expressions import DIMS, LAM, A, G, K, M, N, Q, Random, Smooth, T, U, V, W, X, Y, Z, values
from torch import Tensor

import unroll
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    as_constant,
    constant,
    diag,
    diagonal,
    elementwise,
    eye,
    family_sum,
    hold,
    inverse,
    is_symmetric,
    logdet,
    logsumexp,
    matmul,
    member,
    number,
    ones,
    rebuild,
    rename_index,
    scale,
    softmax,
    spectral_norm,
    split,
    symbol,
    times,
    total,
    trace,
    transpose,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Expr,
    Eye,
    FamilyLogSumExp,
    FamilySum,
    LogDet,
    Map,
    Mul,
    ShapeError,
    Zero,
    dim,
    free_indices,
    mentions,
    scalar,
    slot,
    walk,
)
from unroll.language.traversal import expand, require_scalar, substitute, substitute_scalars, transform
from unroll.network.evaluate import evaluate

SIZES = {"m": 4, "n": 3, "T": 2, "K": 2}
SCALARS = {LAM: 0.3} | {d: SIZES[d.name] for d in DIMS}
SEEDS = range(30)
many = pytest.mark.parametrize("seed", SEEDS)


def value(e: Expr, seed: int = 0) -> Tensor:
    return evaluate(e, values(SIZES, (), seed), SCALARS)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-9 * (1 + b.norm()))


def drawn(seed: int) -> Expr:
    return (Smooth if seed % 2 else Random)(seed).expr(M, T, 3)


# --- one object per expression ----------------------------------------------------------------------------------------


@many
def test_copies_and_pickles_are_the_same_object(seed: int) -> None:
    e = drawn(seed)
    assert pickle.loads(pickle.dumps(e)) is e
    assert copy.deepcopy(e) is e and copy.copy(e) is e


@many
def test_building_the_same_expression_again_gives_the_same_object(seed: int) -> None:
    assert drawn(seed) is drawn(seed)


@many
def test_a_child_taken_out_and_put_back_changes_no_value(seed: int) -> None:
    e = drawn(seed)
    assert transform(e, lambda x: None) is e
    for node in walk(e):
        if node.children and not isinstance(node, FamilySum | FamilyLogSumExp | LogDet) and not free_indices(node):
            child, *rest = node.children
            stand_in = symbol("stand_in", *child.shape)
            assert close(value(substitute(rebuild(node, (stand_in, *rest)), {stand_in: child})), value(node))


# --- values -----------------------------------------------------------------------------------------------------------


@many
def test_transposing_twice_is_nothing_and_once_is_the_transpose(seed: int) -> None:
    e = drawn(seed)
    assert transpose(transpose(e)) is e
    assert close(value(transpose(e)), value(e).mT)


@many
def test_expanding_keeps_the_value_and_happens_once(seed: int) -> None:
    e = drawn(seed)
    flat = expand(e)
    assert close(value(flat), value(e))
    assert expand(flat) is flat


@many
def test_symbols_put_in_for_themselves_change_nothing(seed: int) -> None:
    e = drawn(seed)
    assert substitute(e, {s: s for s in e.symbols}) is e
    assert substitute_scalars(e, {LAM: LAM}) is e


@many
def test_putting_values_in_is_evaluating(seed: int) -> None:
    """lam = 3/10 as a number; Z as another symbol with the same value."""
    e = drawn(seed)
    fresh = symbol("fresh", *Z.shape)
    given = values(SIZES, (), seed)
    swapped = substitute(substitute_scalars(e, {LAM: sp.Rational(3, 10)}), {Z: fresh})
    assert Z not in swapped.symbols and LAM not in swapped.scalars
    assert close(evaluate(swapped, {**given, fresh: given[Z]}, SCALARS), evaluate(e, given, SCALARS))


@many
def test_sums_products_and_coefficients_commute_with_evaluation(seed: int) -> None:
    a, b = drawn(seed), drawn(seed + 1000)
    c = sp.Rational(-2, 3) * LAM
    x, y = value(a), value(b)
    assert close(value(add(a, b)), x + y)
    assert close(value(add(a, scale(c, b), scale(-1, a))), -0.2 * y)
    assert close(value(scale(c, add(a, b))), -0.2 * (x + y))
    assert close(value(matmul(transpose(a), b)), x.mT @ y)
    assert close(value(times(a, b)), x * y)
    assert close(value(total(a)), x.sum()[None, None])
    assert close(value(total(a, 0)), x.sum(0, keepdim=True)) and close(value(total(a, 1)), x.sum(1, keepdim=True))
    assert close(value(trace(matmul(transpose(a), b))), (x * y).sum()[None, None])


MAPS = (
    slot(0) ** 2,
    sp.exp(-slot(0)),
    1 / (4 + 4 * slot(0) ** 2),
    sp.Abs(slot(0)) - LAM,
    sp.Max(slot(0), LAM * slot(0), -1),
    3 * slot(0) - LAM,
)


@many
@pytest.mark.parametrize("profile", MAPS, ids=str)
def test_maps_of_maps_are_one_map_of_the_same_value(profile: sp.Expr, seed: int) -> None:
    e = drawn(seed % 12)
    inside = value(e)
    outside = sp.lambdify(slot(0), profile.subs(LAM, 0.3), [{"Abs": torch.abs, "exp": torch.exp, "Max": _largest}])
    assert close(value(elementwise(profile, e)), outside(inside))
    for node in walk(elementwise(profile, e)):
        assert not (isinstance(node, Map) and any(isinstance(a, Map) for a in node.args if a.shape == node.shape))


def _largest(*xs: object) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in xs))).amax(0)


# --- the normal form --------------------------------------------------------------------------------------------------


@many
def test_sums_are_flat_ordered_and_without_zeros_and_products_are_flat(seed: int) -> None:
    for node in walk(drawn(seed)):
        match node:
            case Add(terms):
                assert len(terms) > 1 and not any(isinstance(t, Add | Zero) for t in terms)
                assert len({split(t)[1] for t in terms}) == len(terms)
            case Mul(c, factors):
                assert c != 0 and not any(isinstance(f, Mul | Zero) for f in factors)
                assert (len(factors) > 1 or c != 1) and not (
                    len(factors) > 1 and any(isinstance(f, Eye) for f in factors)
                )
            case _:
                pass


def test_a_sum_does_not_depend_on_the_order_or_nesting_of_its_terms() -> None:
    parts = [matmul(A, Q), Y, scale(2, Y), scale(-LAM, matmul(A, V))]
    want = add(*parts)
    for order in itertools.permutations(parts):
        assert add(*order) is want
        assert add(order[0], add(*order[1:3]), order[3]) is want


IDENTITIES: dict[str, tuple[Expr, Expr]] = {
    "like terms merge": (add(Y, Y, scale(-2, Y)), zeros(M)),
    "coefficients merge": (add(scale(LAM, Y), scale(1 - LAM, Y)), Y),
    "decimals are exact": (add(scale(0.1, Y), scale(0.2, Y)), scale(sp.Rational(3, 10), Y)),
    "scalars go out": (matmul(scale(2, A), scale(LAM, Q)), scale(2 * LAM, matmul(A, Q))),
    "signs go out": (matmul(transpose(A), add(matmul(A, Q), scale(-1, Y))), scale(-1, matmul(transpose(A), add(Y, scale(-1, matmul(A, Q)))))),
    "a coefficient may be inside": (matmul(transpose(A), scale(2 * LAM, add(scale(2, Y), matmul(A, Q)))), scale(2 * LAM, matmul(transpose(A), add(scale(2, Y), matmul(A, Q))))),
    "identities go": (matmul(eye(M), A, eye(N)), A),
    "products are flat": (matmul(matmul(A, G), Q), matmul(A, matmul(G, Q))),
    "inverses cancel": (matmul(inverse(G), G, Q), Q),
    "an inverse of an inverse": (inverse(inverse(G)), G),
    "inverse of a multiple": (inverse(scale(LAM, G)), scale(1 / LAM, inverse(G))),
    "transpose of a product": (transpose(matmul(A, G)), matmul(transpose(G), transpose(A))),
    "transpose of a map": (transpose(elementwise(sp.tanh(slot(0)), A)), elementwise(sp.tanh(slot(0)), transpose(A))),
    "transpose of softmax": (transpose(softmax(A, 0)), softmax(transpose(A), 1)),
    "transpose of a row sum": (transpose(total(A, 0)), total(transpose(A), 1)),
    "a scalar is its own transpose": (transpose(total(A)), total(A)),
    "sums distribute": (total(add(Y, scale(2, matmul(A, Q)))), add(total(Y), scale(2, total(matmul(A, Q))))),
    "sum of ones": (total(ones(M, N)), constant(M * N)),
    "sum of a repeated scalar": (total(elementwise(sp.tanh(slot(0)) + 0 * slot(1), total(A), ones(M, N))), scale(M * N, elementwise(sp.tanh(slot(0)), total(A)))),
    "trace is cyclic": (trace(matmul(A, G, transpose(A))), trace(matmul(transpose(A), A, G))),
    "trace of a transpose": (trace(transpose(G)), trace(G)),
    "trace of a rank one": (trace(matmul(Q, transpose(W))), matmul(transpose(W), Q)),
    "logdet of a multiple": (logdet(scale(LAM, inverse(eye(N)))), constant(N * sp.log(LAM))),
    "diagonal of diag": (diagonal(diag(Q)), Q),
    "diag of ones": (diag(ones(N)), eye(N)),
    "spectral norm of a multiple": (spectral_norm(scale(-3, A)), scale(3, spectral_norm(A))),
    "spectral norm of a Gram matrix": (spectral_norm(matmul(transpose(A), A)), spectral_norm(matmul(transpose(scale(-1, A)), scale(-1, A)))),
    "commuting products": (times(A, elementwise(sp.exp(slot(0)), A)), times(elementwise(sp.exp(slot(0)), A), A)),
    "constants go into maps": (elementwise(sp.Max(slot(0), slot(1)), A, constant(2, M, N)), elementwise(sp.Max(slot(0), 2), A)),
    "linear maps are sums": (elementwise(2 * slot(0) - slot(1), A, A), A),
    "hold is linear": (hold(add(scale(2, A), A)), scale(3, hold(A))),
    "hold once": (hold(hold(A)), hold(A)),
    "softmax of one": (softmax(Y, 1), ones(M)),
    "log-sum-exp of one": (logsumexp(Y, 1), Y),
    "a family without its index": (family_sum("k", K, A), scale(K, A)),
    "families are linear": (family_sum("k", K, add(member(U, "k"), scale(2, A))), add(family_sum("k", K, member(U, "k")), scale(2 * K, A))),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_equal_by_algebra_is_one_object(name: str) -> None:
    left, right = IDENTITIES[name]
    assert left is right


def test_expansion_makes_equal_polynomials_one_object() -> None:
    residual = add(Y, scale(-1, matmul(A, Q)))
    step = add(Q, scale(LAM, matmul(transpose(A), residual)))
    again = add(matmul(add(eye(N), scale(-LAM, matmul(transpose(A), A))), Q), scale(LAM, matmul(transpose(A), Y)))
    assert step is not again and expand(step) is expand(again)


def test_a_symmetric_symbol_is_its_transpose() -> None:
    s = symbol("S", N, N, props={"symmetric"})
    assert transpose(s) is s and is_symmetric(matmul(transpose(A), A)) and not is_symmetric(G)


def test_symbols_that_differ_in_anything_are_different() -> None:
    made = {
        symbol("a", N),
        symbol("b", N),
        symbol("a", M),
        symbol("a", N, role="input"),
        symbol("a", N, 1, rank=2),
        symbol("a", N, family=K),
        symbol("a", N, props={"x"}),
    }
    assert len(made) == 7


@pytest.mark.parametrize("c", [0, 1, -1, 0.1, 2.5, LAM, sp.sqrt(2), 1 - LAM])
def test_a_constant_knows_its_value(c: object) -> None:
    assert as_constant(constant(c, M, N)) == number(c)
    assert as_constant(A) is None and as_constant(elementwise(sp.exp(slot(0)), A)) is None


# --- families ---------------------------------------------------------------------------------------------------------


def test_nested_sums_over_one_index_are_kept_apart() -> None:
    """The index of the inner sum shadows that of the outer, as in Python."""
    u = member(U, "k")
    inner = family_sum("k", K, matmul(u, Q))
    nested = family_sum("k", K, total(times(matmul(u, Q), inner)))
    given = values(SIZES, (), 0)
    uq = torch.stack([m @ given[Q] for m in given[U]])
    assert close(value(nested), (uq * uq.sum(0)).sum()[None, None])
    bound = [x.index for x in walk(nested) if isinstance(x, FamilySum)]
    assert len(bound) == len(set(bound)) == 2


def test_renaming_an_index_captures_nothing() -> None:
    e = matmul(transpose(member(U, "k")), family_sum("j", K, member(U, "j")))
    renamed = rename_index(e, "k", "j")
    assert mentions(renamed, "j") and not mentions(renamed, "k")
    assert rename_index(renamed, "j", "k") is not e or rename_index(e, "k", "k") is e
    whole = lambda x, i: value(total(family_sum(i, K, x)))
    assert close(whole(renamed, "j"), whole(e, "k"))


# --- shapes -----------------------------------------------------------------------------------------------------------

MISFITS: dict[str, Callable[[], Expr]] = {
    "sum": lambda: add(A, G),
    "sum of a column and a row": lambda: add(Q, transpose(Q)),
    "product": lambda: matmul(A, A),
    "long product": lambda: matmul(A, G, transpose(G), A),
    "entrywise": lambda: times(A, G),
    "entrywise vectors": lambda: times(Q, Y),
    "inverse": lambda: inverse(A),
    "inverse of zero": lambda: inverse(zeros(N, N)),
    "trace": lambda: trace(A),
    "diag of a matrix": lambda: diag(A),
    "diagonal": lambda: diagonal(A),
    "logdet": lambda: logdet(A),
    "logdet of what is not symmetric": lambda: logdet(G),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_are_refused_where_they_are_made(name: str) -> None:
    with pytest.raises(ShapeError):
        MISFITS[name]()


def test_sizes_are_compared_as_formulas() -> None:
    p, q = dim("p"), dim("q")
    wide = symbol("wide", p * q + p, 1)
    tall = symbol("tall", p * (q + 1), 1)
    assert add(wide, tall).shape[0] in (p * q + p, p * (q + 1))
    with pytest.raises(ShapeError, match=r"p\*q"):
        add(wide, symbol("short", p * q, 1))


def test_only_a_scalar_is_an_objective() -> None:
    require_scalar(total(A))
    with pytest.raises(DeriveError) as refused:
        require_scalar(A)
    assert refused.value.code == "E133"


def test_shapes_of_expressions_are_those_of_their_values() -> None:
    for seed in SEEDS:
        for node in walk(drawn(seed)):
            if not (free_indices(node) or node is U):
                assert tuple(value(node).shape) == tuple(int(n.subs(SCALARS)) for n in node.shape)


def test_a_scalar_symbol_knows_its_sign() -> None:
    assert scalar("a", positive=True).is_positive and scalar("a").is_positive is None
    assert X.shape == (M, T)


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("nuclear(z)", lambda s: s),
        ("nuclear(z - z - 3*ones(m))", lambda s: 0 * s + 6),
        ("rank(z)", lambda s: (s > 0).double()),
        ("spectral_sum(log(1 + s**2), z.T)", lambda s: (s**2).log1p()),
    ],
)
def test_a_column_has_one_singular_value(formula: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """By torch's svdvals; at 0 too."""
    loss = unroll.loss({"dims": {"m": 4}, "variables": {"z": ["m"]}, "minimize": {"f": formula}})
    for z in (torch.tensor([1.0, -2, 0.5, 3], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)):
        torch.testing.assert_close(loss(z), value(torch.linalg.svdvals(z[:, None])[0]))
