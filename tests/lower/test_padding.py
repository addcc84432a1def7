"""Samples of several lengths in a batch: what a mask calls padding is left out, so that each sample is as if alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.spec import load

D = torch.float64
LENGTHS, LONGEST = (5, 3, 1, 7), 7
SIZES = {"d": 12, "K": 3, "p": 4}
FAMILY = [
    "attention_only", "crate", "crate_causal", "crate_exact", "crate_neumann", "crate_paper", "crate_alpha", "crate_decoder",
    "tost", "tost_causal", "tost_layers", "energy_transformer", "transformer", "transformer_causal",
]  # fmt: skip
MASK = {"there": {"shape": ["N"], "mask": True}}


def pair(spec: str | dict[str, Any], dtype: torch.dtype = D, layers: int = 2) -> tuple[Any, Any]:
    """The network with a mask and the one without."""
    plain = load(spec).to_dict()
    plain["unroll"]["layers"] = layers
    plain["dims"].update({k: v for k, v in SIZES.items() if k in plain["dims"]})
    masked = {**plain, "inputs": {**plain.get("inputs", {}), **MASK}}
    return unroll.compile(masked, seed=0, dtype=dtype), unroll.compile(plain, seed=0, dtype=dtype)


def batch(prefix: bool, dtype: torch.dtype = D, filled: float = float("nan")) -> tuple[list[Tensor], Tensor, Tensor]:
    """(samples, the same in one batch with something at padding, the mask): padding stands anywhere, or at the end."""
    g = torch.Generator().manual_seed(1)
    alone = [torch.randn(n, SIZES["d"], generator=g, dtype=dtype) for n in LENGTHS]
    whole = torch.full((len(LENGTHS), LONGEST, SIZES["d"]), filled, dtype=dtype)
    there = torch.zeros(len(LENGTHS), LONGEST, dtype=dtype)
    for i, x in enumerate(alone):
        at = torch.arange(len(x)) if prefix else torch.randperm(LONGEST, generator=g)[: len(x)].sort().values
        whole[i, at], there[i, at] = x, 1
    return alone, whole, there


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(D, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", FAMILY)
def test_a_padded_batch_is_its_samples_alone(name: str, dtype: torch.dtype, close: float) -> None:
    masked, plain = pair(name, dtype)
    for prefix in (True, False):
        if name == "tost_causal" and not prefix:  # it has a number for each place
            continue
        alone, whole, there = batch(prefix, dtype)
        out = masked(whole, there=there)
        for i, x in enumerate(alone):
            wanted = plain(x)  # of the largest entry: without training some of them grow
            torch.testing.assert_close(out[i][there[i] > 0], wanted, rtol=0, atol=close * float(wanted.abs().max()))
        assert (out[there == 0] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["crate", "crate_causal", "tost", "energy_transformer"])
def test_terms_are_those_of_the_samples_alone(name: str) -> None:
    """Of N in front of a rate, its determinant, its sums: by trace and over batches."""
    masked, plain = pair(name)
    alone, whole, there = batch(True)
    found = masked.trace(whole, there=there, at="layer_norm")
    for i, x in enumerate(alone):
        wanted = plain.trace(x, at="layer_norm")
        for term, values in wanted.all_terms.items():
            torch.testing.assert_close(found.all_terms[term][:, i], values, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.predicted[term][:, i], wanted.predicted[term], rtol=1e-8, atol=1e-10)
    table = unroll.white_box(masked, [(whole, there)])
    each = [unroll.white_box(plain, [x]) for x in alone]
    for term in table.terms:
        mean = torch.stack([m.actual[term].mean for m in each]).mean(0)
        torch.testing.assert_close(table.actual[term].mean, mean, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_only", "crate", "tost", "energy_transformer"])
def test_a_start_that_is_given_may_have_anything_at_padding(name: str) -> None:
    masked, plain = pair(name)
    alone, whole, there = batch(False)
    start = torch.where(there[..., None] > 0, torch.roll(whole.nan_to_num(0.5), 1, -1), torch.nan)
    out = masked(whole, there=there, Z=start)
    for i, x in enumerate(alone):
        torch.testing.assert_close(out[i][there[i] > 0], plain(x, Z=start[i][there[i] > 0]), rtol=0, atol=1e-11)
    assert (out[there == 0] == 0).all()


def test_gradients_are_those_of_the_samples_alone() -> None:
    masked, plain = pair("crate")
    alone, whole, there = batch(False)
    whole = whole.requires_grad_()
    masked(whole, there=there).square().sum().backward()
    sum(plain(x).square().sum() for x in alone).backward()
    for mine, yours in zip(masked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-9, atol=1e-10)
    assert whole.grad is not None and (whole.grad[there == 0] == 0).all()


OWN = {
    "sums, lengths, N itself": "1/(2*N) * sumsq(Z - X) + 0.1/N * sum(sqrt(1 + sum(Z, axis=1)**2)) + 0.01/N * sqrt(1 + sumsq(Z))",
    "log of sums of exponentials, largest entries": "1/2 * sumsq(Z - X) + 0.1 * sum(logsumexp(Z, axis=1)) + 0.1 * sum(exp(0 - sumsq(Z) / N))",
    "tokens against tokens": "1/2 * sumsq(Z - X) + 0.05/N * sum(sqrt(1 + (Z.T @ Z)**2))",
    "an inverse over tokens": "1/2 * sumsq(Z - X) + 0.1 * trace(inv(I(N) + 1/N * (X + ones(d, N)).T @ (X + ones(d, N))) @ Z.T @ Z)",
    "what is not 0 at padding": "1/2 * sumsq(Z - X) + 0.1 * logdet(I(d) + 1/N * (Z + ones(d, N)) @ (Z + ones(d, N)).T)",
}


@torch.no_grad()
def test_singular_values_of_what_is_there() -> None:
    spec = {
        "objective": "own", "dims": {"d": 12, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "minimize": {"fit": "1/2 * sumsq(Z - X)", "rank": "nuclear(Z) / N"}, 
        "unroll": {"algorithm": "proximal_gradient", "layers": 3},
    }  # fmt: skip
    masked, plain = pair(spec)
    alone, whole, there = batch(False)
    out = masked(whole, there=there)
    terms = masked.objective(whole.nan_to_num(3.0), there, Z=out)
    for i, x in enumerate(alone):
        torch.testing.assert_close(out[i][there[i] > 0], plain(x), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(terms["rank"][i], plain.objective(x, Z=plain(x))["rank"], rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("term", OWN.values(), ids=OWN.keys())
def test_objectives_that_nobody_has_seen(term: str) -> None:
    spec = {
        "objective": "own", "dims": {"d": 12, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "minimize": {"all": term}, "unroll": {"algorithm": "gradient_descent", "layers": 2, "step": 0.1, "start": {"Z": "X"}},
    }  # fmt: skip
    masked, plain = pair(spec)
    alone, whole, there = batch(False)
    out = masked(whole, there=there)
    terms = masked.objective(whole.nan_to_num(3.0), there, Z=out + 5 * (1 - there)[..., None])
    for i, x in enumerate(alone):
        wanted = plain(x)
        torch.testing.assert_close(out[i][there[i] > 0], wanted, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(terms["all"][i], plain.objective(x, Z=wanted)["all"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "term",
    [
        "nuclear(Z.T @ Z)", "spectral(inv(I(N) + Z.T @ Z))", "logdet(2 * I(N) + Z.T @ Z)", "sum(log(Z))", "sum(1 / Z)", "kl(ones(d, N), Z)",
        "sum(1 / sqrt(sum(Z**2, axis=0)))", "sumsq(log(Z) @ ones(N, N))", "sum(log(Z.T @ Z))",
    ],
)  # fmt: skip
def test_terms_and_slopes_where_zeros_at_padding_would_count(term: str) -> None:
    """Singular values of a matrix with tokens along both axes, and what has no value at 0."""
    spec = {"objective": "own", "dims": {"d": 12, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "minimize": term}
    masked, plain = unroll.loss({**spec, "inputs": MASK}), unroll.loss(spec)
    alone, whole, there = batch(False, filled=-1.0)
    alone, whole = [(x.abs() + 0.1).requires_grad_() for x in alone], (whole.abs() + 0.1).requires_grad_()
    found, wanted = masked(whole, there), torch.stack([plain(x) for x in alone]).mean()
    torch.testing.assert_close(found, wanted)
    found.backward(), wanted.backward()
    for i, x in enumerate(alone):
        torch.testing.assert_close(whole.grad[i][there[i] > 0], x.grad)
    assert (whole.grad[there == 0] == 0).all()


def test_a_loss_leaves_padding_out() -> None:
    spec = load("sparse_rate_reduction").to_dict()
    U = torch.randn(3, 12, 4, dtype=D)
    masked = unroll.loss({**spec, "dims": {**SIZES, "N": "dynamic"}, "inputs": MASK}, parameters={"U": U})
    plain = unroll.loss({**spec, "dims": {**SIZES, "N": "dynamic"}}, parameters={"U": U})
    alone, whole, there = batch(False, filled=2.0)
    wanted = torch.stack([plain(x) for x in alone]).mean()
    torch.testing.assert_close(masked(whole, there), wanted)


def test_attention_stays_fused() -> None:
    """The scores of all tokens are never held."""
    masked, _ = pair("crate")
    assert "scaled_dot_product_attention" in masked.source and "attn_mask=" in masked.source


@torch.no_grad()
def test_it_compiles_exports_and_is_restored(tmp_path: Path) -> None:
    masked, _ = pair("crate", layers=1)
    _, whole, there = batch(False, filled=0.0)
    wanted = masked(whole, there=there)
    compiled = torch.compile(masked, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(whole, there=there), wanted)
    exported = torch.export.export(masked, (whole, there))
    torch.testing.assert_close(exported.module()(whole, there), wanted)
    masked.save(tmp_path)
    torch.testing.assert_close(unroll.restore(tmp_path)(whole, there=there), wanted)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (torch.tensor([[1.0, 1], [0, 0]]), "the mask there of sample 1 is 0 everywhere"),
        (torch.tensor([[1.0, 0.5], [1, 1]]), "declared mask"),
        (None, "the input 'there' is missing"),
    ],
)  # fmt: skip
def test_masks_that_are_none_are_refused(there: Tensor | None, said: str) -> None:
    masked, _ = pair("attention_only", torch.float32)
    with pytest.raises(unroll.UnrollError, match=said):
        masked(torch.randn(2, 2, 12), **({} if there is None else {"there": there}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": {"X": ["d", "N"], "there": {"shape": ["d", "N"], "mask": True}}}, "there is a mask"),
        ({"inputs": {"X": ["d", "N"], "there": {"shape": [4], "mask": True}}}, "there is a mask"),
        ({"inputs": {"X": ["d", "N"], "Y": ["d", "2*N"], **MASK}, "minimize": "1/2 * sumsq(Z - X) + sumsq(Y)"}, "not which of 2\\*N"),
        ({"variables": {"Z": {"shape": ["d", "N"], "mask": True}}}, "Z is a mask"),
        ({"minimize": "1/2 * sumsq(Z - X)", "constraints": ["Z in ball1(1)"], "unroll": {"algorithm": "projected_gradient", "layers": 1}}, "has no rule for padding"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_with_padding_is_refused(change: dict[str, Any], said: str) -> None:
    spec = {
        "objective": "own", "dims": {"d": 12, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"], **MASK},
        "minimize": "1/2 * sumsq(Z - X)", "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1}, **change,
    }  # fmt: skip
    with pytest.raises(unroll.UnrollError, match=said):
        unroll.compile(spec)


@torch.no_grad()
@pytest.mark.parametrize("constraint", ["Z in sphere", "Z in simplex", "Z >= 0"])
def test_columns_that_are_padding_are_in_every_set_of_columns(constraint: str) -> None:
    spec = {
        "objective": "own", "dims": {"d": 12, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "minimize": {"fit": "1/(2*N) * sumsq(Z - X)"}, "constraints": [constraint],
        "unroll": {"algorithm": "projected_gradient", "layers": 2, "step": "N / 2"},
    }  # fmt: skip
    masked, plain = pair(spec)
    alone, whole, there = batch(False)
    out = masked(whole, there=there)
    (held,) = (t for t in masked.derivation.problem.terms if t != "fit")
    assert (masked.objective(whole.nan_to_num(3.0), there, Z=out)[held] == 0).all()
    assert masked.objective(whole.nan_to_num(3.0), there, Z=out - 2)[held].isinf().all()
    for i, x in enumerate(alone):
        torch.testing.assert_close(out[i][there[i] > 0], plain(x), rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_entries_that_are_padding_on_either_axis_are_in_every_set_of_entries() -> None:
    spec = {
        "objective": "own", "dims": {"N": "dynamic"}, "variables": {"C": ["N", "N"]}, "inputs": {"X": ["N", "N"], **MASK},
        "minimize": {"fit": "sumsq(C - X)"}, "constraints": ["C in box(1, 2)"],
        "unroll": {"algorithm": "projected_gradient", "layers": 1},
    }  # fmt: skip
    net = unroll.compile(spec)
    there, X = torch.tensor([[1.0, 1, 0]]), torch.zeros(1, 3, 3)
    C = torch.tensor([[[1.0, 2, 0], [1, 1, 7], [0, 0, 0]]])
    assert float(net.objective(X, there, C=C)["total"]) == 7
    assert net.objective(X, there, C=C - 0.5)["total"].isinf()
