"""`shape: {rank: r}`: what a matrix starts at stays, and a change W_up @ W_down is learned beside it."""

import pickle

import pytest
import torch

import unroll
from unroll.errors import SpecError, UnrollError
from unroll.spec import load
from unroll.train.groups import record, shares

LISTA = """
use: lasso
dims: {m: 6, n: 9}
unroll:
  algorithm: proximal_gradient
  layers: 2
  learn:
    B: {replaces: step * A.T, share: layers RANK1}
    S: {replaces: I(n) - step * A.T @ A RANK2}
    theta: {replaces: step * lam}
"""
CRATE = ["dims.d=8", "dims.K=2", "dims.p=4", "unroll.layers=2"]
RANKS = {"compress.learn.W": 2, "compress.learn.W_out": 1, "sparsify.learn.Q": 3}


def lista(one=None, two=None, **more):
    said = [f", shape: {{rank: {r}}}" if r else "" for r in (one, two)]
    text = LISTA.replace(" RANK1", said[0]).replace(" RANK2", said[1])
    return unroll.compile(text, seed=1, dtype=torch.float64, **more)


def crate(ranks):
    ranked = [f"unroll.blocks.{name}.shape={{rank: {r}}}" for name, r in ranks.items()]
    return unroll.compile("crate", overrides=[*CRATE, *ranked], seed=1, dtype=torch.float64)


PAIRS = {
    "lista": (lista, lambda: lista(2, 3), lambda: torch.randn(4, 6, dtype=torch.float64)),
    "crate": (lambda: crate({}), lambda: crate(RANKS), lambda: torch.randn(4, 5, 8, dtype=torch.float64)),
}
both = pytest.mark.parametrize("name", PAIRS)


def drawn(net):
    """The network with factors that are not 0."""
    with torch.no_grad():
        for i, (name, p) in enumerate(net.named_parameters()):
            if name.endswith(("_up", "_down")):
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    return net


@both
def test_it_starts_as_the_network_that_learns_the_whole_matrix(name):
    whole, low, x = (make() for make in PAIRS[name])
    assert torch.equal(low(x), whole(x)) or (low(x) - whole(x)).abs().max() < 1e-14
    assert {n for n, p in low.named_parameters() if not p.requires_grad} == (
        {"B", "S"} if name == "lista" else {"W", "W_out", "Q"}
    )


@both
def test_it_is_the_network_whose_matrices_are_changed_by_the_products(name):
    whole, low, x = (make() for make in PAIRS[name])
    parameters = dict(drawn(low).named_parameters())
    rank = {"B": 2, "S": 3, "W": 2, "W_out": 1, "Q": 3}
    with torch.no_grad():
        for n, p in whole.named_parameters():
            p.copy_(parameters[n])
            if f"{n}_up" in parameters:
                lead = p.shape[:-2]
                up, down = (parameters[f"{n}_{end}"] for end in ("up", "down"))
                change = up.reshape(*lead, p.shape[-2], rank[n]) @ down.reshape(*lead, rank[n], p.shape[-1])
                assert torch.linalg.matrix_rank(change).max() == rank[n]
                p.add_(change)
    assert (low(x) - whole(x)).abs().max() < 1e-12
    assert (low(x) - PAIRS[name][1]()(x)).abs().max() > 1e-3  # and another one than it started as


@both
def test_only_the_factors_get_a_gradient_and_a_rate(name):
    _, low, x = (make() for make in PAIRS[name])
    drawn(low)(x).square().sum().backward()
    held = {n for n, p in low.named_parameters() if p.grad is None}
    assert held == {n for n, p in low.named_parameters() if f"{n}_up" in dict(low.named_parameters())}
    settings = load("lista", ["train={weight_decay: 0.1, only: ['*']}"]).train
    assert {n for n, share in shares(low, settings).items() if not share.any()} == held
    assert not held & set(record(low, settings)["decay"])


@both
def test_it_is_saved_pickled_and_takes_the_weights_of_the_whole_network(name, tmp_path):
    whole, low, x = (make() for make in PAIRS[name])
    drawn(low)
    for again in (unroll.restore(low.save(tmp_path)), pickle.loads(pickle.dumps(low))):
        assert torch.equal(again(x), low(x))
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in low.parameters()]
    with torch.no_grad():
        for p in whole.parameters():
            p.mul_(1.1)
    fresh = PAIRS[name][1]()
    report = unroll.transfer(fresh, whole)
    assert (fresh(x) - whole(x)).abs().max() < 1e-14
    assert {n for n, _ in report.left} == {n for n, _ in fresh.named_parameters() if n.endswith(("_up", "_down"))}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["unroll.learn.theta.shape={rank: 1}"], "theta is no matrix"),
        (["unroll.learn.S.shape={rank: 2}", "unroll.learn.S.symmetric=true"], "keeps nothing of what 'symmetric' says"),
        (["unroll.learn.S.shape={rank: 2}", "unroll.learn.S.bounds=clamp(0)"], "keeps nothing of what 'bounds' says"),
        (["unroll.learn.S.shape={rank: 2}", "unroll.learn.S_up={replaces: lam}"], "'S_up' is already"),
        (["unroll.learn.S.shape={rank: 0}"], "at least 1"),
        (["unroll.learn.S.shape={rank: 99}"], "of rank 99 is any change"),
        (["unroll.learn.f={replaces: prox, function: {knots: 5, range: [-1, 1]}, shape: {rank: 2}}"], "no rank"),
    ],
)  # fmt: skip
def test_what_has_no_change_of_low_rank_is_refused(overrides, says):
    text = LISTA.replace(" RANK1", "").replace(" RANK2", "")
    with pytest.raises((SpecError, UnrollError), match=says):
        unroll.compile(text, overrides=overrides)
