"""What layers keep of a text: reading the next tokens alone is the full pass, for every causal network."""

import copy
import pickle
import warnings

import pytest
import torch

import unroll
from unroll.errors import UnrollError
from unroll.network.kept import Kept
from unroll.spec import library, load
from unroll.spec.schema import TokenEmbed

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = ["dims.d=16", "dims.K=2", "dims.p=8", "unroll.layers=2"]


def small(name: str) -> list[str]:
    """Overrides that make a spec of a text, or of causal layers, small."""
    spec = load(name)
    own = [f"dims.{n}={k}" for n, k in (("s", 24), ("T", 9)) if n in spec.dims]
    return [*SIZES, *own, *(["model.embed.vocabulary=50", "model.embed.length=20"] if spec.model is not None else [])]


def reads_text(name: str) -> bool:
    model = load(name).model
    return model is not None and isinstance(model.embed, TokenEmbed)


OF_TEXT = [n for n in library.names("specs") if reads_text(n)]
LAYERS = [n for n in library.names("specs") if n.endswith("_causal")]


def moved(net):
    """No parameter is where it starts: a scale of 0 would hide all else."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net.eval()


def in_parts(read, tokens, cuts, axis=1):
    kept = Kept()
    return torch.cat([read(part, kept) for part in tokens.split(cuts, axis)], axis)


def agree(found, full):
    assert (found - full).abs().max() <= ROUNDING[full.dtype] * full.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", OF_TEXT)
def test_the_next_tokens_alone_are_the_full_pass(name, dtype):
    net = moved(unroll.compile(name, overrides=small(name), dtype=dtype, seed=1))
    tokens = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = net(tokens)
    agree(in_parts(net.extend, tokens, [1] * 20), full)
    agree(in_parts(net.extend, tokens, [7, 1, 1, 4, 7]), full)
    assert (in_parts(net.extend, tokens[:, 1:], [1] * 19) - full[:, 1:]).abs().max() > 1e-3 * full.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", LAYERS)
def test_so_it_is_of_layers_alone_in_any_unit(name, unit, dtype):
    net = moved(unroll.compile(name, overrides=small(name), dtype=dtype, seed=1))
    x = unit * torch.randn(2, 3, 11, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    with torch.no_grad():
        full = net(x)
    agree(in_parts(net.extend, x, [4, 1, 1, 5], axis=2), full)
    agree(in_parts(net.extend, x[:0], [4, 7], axis=2), full) if x[:0].numel() else None


def layers(**more):
    return {
        "name": "own", "dims": {"d": 6, "K": 2, "p": 3, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "parameters": {"U": ["K", "d", "p"]}, **more,
    }  # fmt: skip


def test_a_running_mean_is_kept_with_its_count():
    spec = layers(
        minimize={"spread": "1/2 * sum(sum(log(1 + (U[k].T @ Z)**2 @ ones(N, 1) / N)) for k in K)"},
        unroll={
            "layers": 3, "start": {"Z": "X"},
            "blocks": [{"block": "one", "terms": ["spread"], "algorithm": "gradient_descent", "step": 0.5, "rewrites": ["causal(over=N)"]}],
        },
    )  # fmt: skip
    net = unroll.compile(spec, dtype=torch.float64, seed=0)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    full = net(x)
    assert "cumsum" in net.source and (full - x).abs().max() > 1e-2
    agree(in_parts(net.extend, x, [1, 3, 1, 4]), full)
    assert (in_parts(net.extend, x[:, 1:], [1, 7]) - full[:, 1:]).abs().max() > 1e-3  # what came before counts


@pytest.mark.parametrize("p", [2, 16])
def test_attention_is_kept_however_wide_its_heads_are(p):
    net = moved(
        unroll.compile(
            "crate_causal", overrides=["dims.d=16", "dims.K=1", f"dims.p={p}", "unroll.layers=2"], dtype=torch.float64
        )
    )
    assert "scaled_dot_product" in net.source
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    agree(in_parts(net.extend, x, [1, 3, 1, 4]), net(x))


def test_the_library_has_the_networks_that_this_is_about():
    assert {"crate_gpt", "crate_language", "tost_language", "crate_alpha_language", "crate_text", "tost_text"} <= set(
        OF_TEXT
    )
    assert {"crate_causal", "tost_causal"} <= set(LAYERS)


SEEN = {
    "columns look back": "Z + Z @ causal_softmax(Z.T @ A @ Z, axis=0)",
    "rows look back": "Z + Z @ causal_softmax(Z.T @ A @ Z, axis=1).T",
    "symmetric scores": "Z + Z @ causal_softmax(Z.T @ Z, axis=1).T",
    "weighed again": "Z + tanh(A @ Z @ (causal_softmax(Z.T @ A @ Z, axis=0) * tanh(Z.T @ Z)))",
    "sums of what attention found": "Z + tanh(running_sum(Z @ causal_softmax(Z.T @ Z, axis=0)))",
    "twice": "Z + Z @ causal_softmax(Z.T @ Z, axis=0) @ causal_softmax(Z.T @ A @ Z, axis=0)",
    "of each token": "normalize(Z, axis=0) + softmax(A @ Z, axis=0) + inv(I(d) + A @ A.T) @ Z + sort(Z)",
}
AHEAD = {
    "a softmax over all tokens": "Z + softmax(Z, axis=1)",
    "attention to later tokens": "Z + Z @ softmax(Z.T @ Z, axis=0)",
    "a sum over all tokens": "Z + tanh(Z @ Z.T @ Z)",
    "sums to the last token": "Z + running_sum_T(Z)",
    "the number of tokens": "Z / cols(Z)",
    "a norm over all tokens": "Z + rms_norm(Z, axis=1, eps=0.1)",
    "the operation 'top' over tokens": "Z + top(Z, 0.5)",
}


def declared(formula):
    """Layers that are this formula, after a gradient step."""
    return layers(
        parameters={"A": ["d", "d"]},
        minimize={"size": "sumsq(A @ Z)"},
        unroll={
            "layers": 2,
            "start": {"Z": "X"},
            "blocks": [
                {"block": "one", "terms": ["size"], "algorithm": "gradient_descent", "step": 0.1},
                {"block": "two", "output": formula},
            ],
        },
    )


@pytest.mark.parametrize("formula", SEEN.values(), ids=SEEN)
def test_what_a_token_sees_of_those_before_is_kept_wherever_it_stands(formula):
    net = unroll.compile(declared(formula), dtype=torch.float64, seed=0)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    full = net(x)
    agree(in_parts(net.extend, x, [1, 3, 1, 4]), full)
    agree(net(x[:, :5]), full[:, :5])  # it is causal


@pytest.mark.parametrize(("why", "formula"), AHEAD.items(), ids=AHEAD)
def test_what_stands_in_the_way_is_named(why, formula):
    net = unroll.compile(declared(formula), dtype=torch.float64, seed=0)
    with pytest.raises(UnrollError) as caught:
        net.extend(torch.randn(2, 3, 6, dtype=torch.float64), Kept())
    assert caught.value.code == "E423" and str(caught.value.message).startswith(why)


def test_what_sees_later_tokens_has_nothing_to_keep_and_says_so():
    net = unroll.compile("crate", overrides=SIZES)
    with pytest.raises(UnrollError, match="keeps nothing from token to token") as caught:
        net.extend(torch.randn(2, 3, 16), Kept())
    assert caught.value.code == "E423"
    text = {"embed": {"kind": "tokens", "vocabulary": 9, "length": 8}, "head": {"kind": "tied"}}
    net = unroll.compile({"use": "crate", "model": text}, overrides=SIZES)
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.warns(UserWarning, match="the whole text is read for each token: attention to later tokens"):
        found = net.generate(tokens, 3, temperature=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net.generate(tokens, 3, temperature=0, kept=False), found)
    with pytest.raises(UnrollError) as caught:
        net.generate(tokens, 3, kept=True)
    assert caught.value.code == "E423"


@pytest.mark.parametrize("name", ["crate_text", "tost_text", "crate_alpha_text"])
def test_both_ways_write_the_same_text(name):
    net = moved(unroll.compile(name, overrides=small(name), dtype=torch.float64, seed=2))
    begun = torch.tensor([[3, 1, 4], [1, 5, 9]])
    for more in ({"length": 17}, {"length": 30, "window": 6}):
        assert torch.equal(
            net.generate(begun, kept=True, seed=1, **more), net.generate(begun, kept=False, seed=1, **more)
        )


def test_a_text_beyond_the_longest_is_refused_on_the_way():
    net = unroll.compile("crate_text", overrides=small("crate_text"))
    kept = Kept()
    net.extend(torch.ones(1, 19, dtype=torch.int64), kept)
    with pytest.raises(UnrollError, match="19 tokens and 2 more are longer than the longest text, 20"):
        net.extend(torch.ones(1, 2, dtype=torch.int64), kept)
    assert kept.seen == 19 and net.extend(torch.ones(1, 1, dtype=torch.int64), kept).shape == (1, 1, 50)


def test_what_another_network_kept_is_refused_and_words_without_a_row_too():
    one, other = (unroll.compile("crate_text", overrides=small("crate_text"), seed=s) for s in (0, 1))
    kept, tokens = Kept(), torch.tensor([[3, 1, 4]])
    one.extend(tokens, kept)
    with pytest.raises(UnrollError, match="of another network"):
        other.extend(tokens, kept)
    with pytest.raises(UnrollError, match="whole numbers from 0 to"):
        one.extend(tokens + 10**6, kept)
    with pytest.raises(UnrollError, match="whole numbers below"):
        one.extend(tokens.float(), kept)
    agree(one.extend(tokens, kept), one(torch.cat([tokens, tokens], 1))[:, 3:])  # what was refused left nothing behind


def test_what_is_kept_is_copied_and_pickled():
    net = unroll.compile("crate_text", overrides=small("crate_text"), seed=0)
    kept, tokens = Kept(), torch.tensor([[3, 1, 4]])
    net.extend(tokens, kept)
    copies = [pickle.loads(pickle.dumps(kept)), copy.deepcopy(kept)]
    want = net.extend(tokens, kept)
    assert all(torch.equal(net.extend(tokens, other), want) for other in copies)
