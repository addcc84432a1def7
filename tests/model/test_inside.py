"""Looking inside: attention, segments, components and atoms against formulas written by hand, counts, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

import unroll
from unroll.errors import UnrollError
from unroll.model.inside import heaviest

D = torch.float64


def model(spec: str = "crate_digits", *overrides: str, dtype: torch.dtype = D) -> unroll.Model:
    """Two layers on images of 6 x 4 in patches of 2: three rows of two."""
    sizes = {"crate_digits": ["dims.d=12", "dims.K=3", "dims.p=4"], "vit_digits": ["dims.d=12", "dims.K=3", "dims.p=4", "dims.s=20"]}  # fmt: skip
    changes = ["unroll.layers=2", "model.embed.image=[1, 6, 4]", *sizes.get(spec, []), *overrides]
    net = unroll.compile(spec, overrides=changes, seed=0, dtype=dtype)
    assert isinstance(net, unroll.Model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():  # moved: no bias is 0, no norm the identity
            p.add_(torch.randn(p.shape, generator=g, dtype=D).to(p.dtype) * 0.3)
    return net.eval()


def images(count: int = 3, dtype: torch.dtype = D) -> Tensor:
    return torch.rand(count, 1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=D).to(dtype)


def looks(net: unroll.Model, x: Tensor, layer: int) -> Tensor:
    """The softmax of a layer, by hand: (B, heads, N, N), of what the layer takes."""
    body = net.body
    z = net.trace(x).iterates["Z"][layer]
    if "W_query" not in dict(body.named_parameters()):
        y = F.layer_norm(z, (12,), body.compress_norm_weight[layer], body.compress_norm_bias[layer], 1e-5)
        q = k = torch.einsum("hdp,bnd->bhnp", body.W[layer], y)
    else:
        y = F.layer_norm(z, (12,), body.attention_norm_weight[layer], body.attention_norm_bias[layer], 1e-6)
        q = torch.einsum("hdp,bnd->bhnp", body.W_query[layer], y) + body.query_bias[layer][:, None]
        k = torch.einsum("hdp,bnd->bhnp", body.W_key[layer], y) + body.key_bias[layer][:, None]
    scores = (q @ k.mT / 2).exp()
    return scores / scores.sum(-1, keepdim=True)


# --- attention --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("spec", ["crate_digits", "vit_digits"])
def test_a_map_is_the_softmax_of_its_layer(spec: str) -> None:
    net, x = model(spec), images()
    for layer in (0, 1):
        found = unroll.attention_maps(net, x, layer=layer + 1)
        assert found.shape == (3, 3, 7, 7)
        torch.testing.assert_close(found, looks(net, x, layer), rtol=1e-12, atol=1e-14)
    assert torch.equal(unroll.attention_maps(net, x), found)
    assert torch.equal(unroll.attention_maps(net, x, layer=-2), unroll.attention_maps(net, x, layer=1))


@torch.no_grad()
def test_a_map_has_the_precision_of_the_network_and_one_layer_is_worked_out() -> None:
    net, x = model(dtype=torch.float32), images(dtype=torch.float32)
    found = unroll.attention_maps(net, x, layer=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, looks(net, x, 1), rtol=1e-5, atol=1e-6)
    trace = net.trace(x)
    trace.steps["Z"][0].fill_(torch.nan)  # what layer 1 takes is not read for layer 2
    assert torch.equal(trace.maps_of(2)[0].weights, found) and trace.maps_of(1)[0].weights.isnan().all()


@torch.no_grad()
def test_states_that_an_algorithm_keeps_are_brought_to_the_layer() -> None:
    """The softmax of fista is at its extrapolated point, which hangs on all layers before."""
    spec = {"use": "hopfield_energy", "dims": {"d": 4, "M": 6}, "inputs": {"q": ["d"]}, "unroll": {"algorithm": "nesterov", "layers": 4, "step": 0.5, "start": {"x": "q"}}}  # fmt: skip
    net = unroll.compile(spec, seed=0, dtype=D)
    trace = net.trace(torch.randn(2, 4, dtype=D, generator=torch.Generator().manual_seed(0)))
    for one, m in zip((1, 2, 3, 4), trace.maps, strict=True):
        (alone,) = trace.maps_of(one)
        assert alone.layer == m.layer == one and torch.equal(alone.weights, m.weights)
    xs = trace.iterates["x"]
    apart = [torch.softmax(net.scalars["beta"] * xs[k] @ net.given["Xi"], -1) for k in (2, 3)]
    assert all(
        (m.weights.reshape(2, 6) - a).abs().max() > 1e-4 for m, a in zip(trace.maps[2:], apart, strict=True)
    )  # at the iterate it would be another one


@torch.no_grad()
def test_looking_hides_no_patch_and_drops_nothing_out() -> None:
    hidden = unroll.compile("crate_mae_digits", seed=0, dtype=D)
    x = torch.rand(2, 1, 8, 8, dtype=D, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(2, 16, dtype=torch.bool)
    z = hidden.trace(x, none).iterates["Z"][-1]
    assert torch.equal(unroll.components(hidden, x), unroll.components(hidden, x))
    assert torch.equal(
        unroll.model.inside.tokens(hidden, x), z if hidden.wrapped.model.class_token is None else z[:, 1:]
    )
    net = model("crate_digits", "model.dropout=0.5").train()
    assert torch.equal(unroll.attention_maps(net, images()), unroll.attention_maps(net, images())) and net.training


def test_what_there_is_no_map_of_is_refused() -> None:
    net = model()
    for layer in (0, 3, -3, 1.0, True):
        with pytest.raises(UnrollError, match="there is no layer"):
            unroll.attention_maps(net, images(), layer=layer)
    with pytest.raises(UnrollError, match="layer -1, block sparsify has no softmax over tokens"):
        unroll.attention_maps(net, images(), block="sparsify")
    with pytest.raises(UnrollError, match="no block 'nothing'"):
        unroll.components(net, images(), block="nothing")
    lista = unroll.compile("lista", dims={"m": 4, "n": 6})
    with pytest.raises(UnrollError, match="has no softmax over tokens"):
        unroll.attention_maps(lista, torch.randn(2, 4))
    with pytest.raises(UnrollError, match="no patches of an image behind a class token"):
        unroll.segment(unroll.compile("crate", dims={"d": 12, "K": 3, "p": 4}), torch.randn(2, 5, 12))
    with pytest.raises(UnrollError, match="share is"):
        unroll.segment(net, images(), share=0.0)


# --- segments ---------------------------------------------------------------------------------------------------------


def by_growing(mass: list[float], share: float) -> set[int]:
    """Places in the order of their mass, until the share is reached."""
    kept: set[int] = set()
    while sum(mass[i] for i in kept) < share * sum(mass) - 1e-12:
        kept.add(max((i for i in range(len(mass)) if i not in kept), key=lambda i: mass[i]))
    return kept


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95, 1.0])
def test_the_fewest_patches_with_a_share_of_the_mass(share: float) -> None:
    mass = torch.rand(4, 9, generator=torch.Generator().manual_seed(0), dtype=D)
    mass[1] = 1.0  # ties
    found = heaviest(mass, share)
    for row, kept in zip(mass.tolist(), found, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == by_growing(row, share)
    # as DINO's script: ascending, what lies above 1 - share
    value, at = torch.sort(mass / mass.sum(-1, keepdim=True), stable=True)
    theirs = torch.zeros_like(found).scatter(-1, at, value.cumsum(-1) > 1 - share + 1e-12)
    assert share == 1.0 or torch.equal(found[[0, 2, 3]], theirs[[0, 2, 3]])
    assert not heaviest(torch.zeros(2, 9), share).any()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["crate_digits", "vit_digits"])
def test_segments_are_of_the_class_token_in_the_places_of_the_patches(spec: str) -> None:
    net, x = model(spec), images()
    found = unroll.segment(net, x, layer=1)
    assert found.shape == (3, 3, 6, 4) and found.dtype == torch.bool
    weights = looks(net, x, 0)[:, :, 0, 1:]
    for b in range(3):
        for h in range(3):
            kept = by_growing(weights[b, h].tolist(), 0.6)
            for row in range(6):
                for column in range(4):
                    assert bool(found[b, h, row, column]) == (row // 2 * 2 + column // 2 in kept)
    assert 0 < found.double().mean() < 1 and unroll.segment(net, x[:0]).shape == (0, 3, 6, 4)


def test_jaccard_counts() -> None:
    g = torch.Generator().manual_seed(0)
    mask, truth = torch.rand(4, 3, 5, 6, generator=g) < 0.4, torch.rand(4, 5, 6, generator=g) < 0.3
    found = unroll.jaccard(mask, truth)
    for b in range(4):
        for h in range(3):
            ours = {(i, j) for i in range(5) for j in range(6) if mask[b, h, i, j]}
            theirs = {(i, j) for i in range(5) for j in range(6) if truth[b, i, j]}
            assert float(found[b, h]) == pytest.approx(len(ours & theirs) / len(ours | theirs), rel=1e-6)
    assert torch.equal(unroll.jaccard(mask, mask), torch.ones(4, 3))
    assert float(unroll.jaccard(torch.zeros(2, 2), torch.zeros(2, 2))) == 1.0
    assert float(unroll.jaccard(torch.zeros(2, 2), torch.ones(2, 2))) == 0.0
    assert torch.equal(unroll.jaccard(mask, truth.to(torch.uint8) * 7), found)
    for other in (truth[:, :4], truth[:3], truth[..., :1]):
        with pytest.raises(UnrollError, match="does not lie on"):
            unroll.jaccard(mask, other)


# --- components and atoms ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("spec", ["crate_digits", "vit_digits"])
def test_components_are_those_of_scikit_learn(spec: str) -> None:
    net, x = model(spec), images()
    for layer, block, k in ((-1, None, 4), (1, None, 2), (1, net.trace(x).blocks[0], 1)):
        z = net.trace(x).steps["Z"][k][:, 1:].reshape(-1, 12).numpy()
        pca = PCA(3, svd_solver="full").fit(z)
        theirs = pca.transform(z) * np.sign([c[np.abs(c).argmax()] for c in pca.components_])
        found = unroll.components(net, x, layer=layer, block=block)
        assert found.shape == (3, 3, 2, 3)
        np.testing.assert_allclose(found.reshape(-1, 3).numpy(), theirs, atol=1e-10)
    with pytest.raises(UnrollError, match="1 to 6 components of 6 tokens"):
        unroll.components(net, x[:1], count=7)
    same = unroll.components(net, torch.zeros_like(x).expand(3, 1, 6, 4))
    assert same.isfinite().all()


@torch.no_grad()
def test_active_atoms_are_those_of_a_loop() -> None:
    net, x = model(), images()
    z = net.trace(x).iterates["Z"][-1][:, 1:]
    found = unroll.active_atoms(net, x, count=4, excited=3)
    means = [float(z[..., i].abs().mean()) for i in range(12)]
    assert found.entries.tolist() == sorted(range(12), key=lambda i: -means[i])[:4]
    for i, mean, share, values, places in zip(
        found.entries.tolist(), found.activity, found.shares, found.values, found.places, strict=True
    ):
        assert float(mean) == pytest.approx(means[i])
        assert float(share) == pytest.approx(float((z[..., i] != 0).double().mean()))
        size = {(b, n): abs(float(z[b, n, i])) for b in range(3) for n in range(6)}
        want = sorted(size, key=lambda at: -size[at])[:3]
        assert [tuple(p.tolist()) for p in places] == want and [float(v) for v in values] == [
            float(z[b, n, i]) for b, n in want
        ]
    assert (found.shares < 1).any()  # a code: some of it is 0
    head, *rows = str(found).splitlines()
    assert head.split() == ["atom", "mean", "not", "zero", "most", "in", "(sample,", "token)"] and len(rows) == 4
    assert len(unroll.active_atoms(net, x, count=99, excited=99).entries) == 12
    with pytest.raises(UnrollError, match="no sample"):
        unroll.active_atoms(net, x[:0])
    with pytest.raises(UnrollError, match="excited is 0"):
        unroll.active_atoms(net, x, excited=0)


@torch.no_grad()
def test_atoms_of_a_code_of_vectors_are_excited_by_samples() -> None:
    net = unroll.compile("ista", dims={"m": 6, "n": 9}, seed=0, dtype=D)
    x = torch.randn(20, 6, dtype=D, generator=torch.Generator().manual_seed(0))
    found = unroll.active_atoms(net, x, count=2, excited=5)
    z = net(x)
    assert found.places.shape == (2, 5, 1)
    assert torch.equal(z[found.places[0, :, 0], found.entries[0]], found.values[0])
    assert int(found.places[0, 0]) == int(z[:, found.entries[0]].abs().argmax())


@torch.no_grad()
@pytest.mark.parametrize("name", ["crate", "transformer", "transformer_causal", "tost"])
def test_maps_of_a_padded_batch_are_those_of_its_samples_alone(name: str) -> None:
    spec = unroll.load(name).to_dict()
    spec["inputs"]["there"] = {"shape": ["N"], "mask": True}
    spec["unroll"]["layers"] = 2
    net = unroll.compile(spec, dims={"d": 12, "K": 3, "p": 4} | ({"s": 8} if "s" in spec["dims"] else {}), dtype=D)
    x = torch.randn(2, 2, 6, 12, dtype=D, generator=torch.Generator().manual_seed(0))
    there = torch.ones(2, 2, 6, dtype=D)
    there[1, 0, [0, 3]] = 0
    x[1, 0, 3] = torch.nan
    found = net.trace(x, there=there).maps_of(2)
    assert found
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = there[place].nonzero().flatten()
        alone = net.trace(x[place][at], there=there[place][at]).maps_of(2)
        for m, a in zip(found, alone, strict=True):
            w = m.weights[place]
            rows = at if w.shape[-2] == 6 else slice(None)
            columns = at if w.shape[-1] == 6 else slice(None)
            torch.testing.assert_close(w[:, rows][:, :, columns], a.weights, rtol=1e-10, atol=1e-12)
            assert w.sum() == pytest.approx(float(a.weights.sum())) and w.isfinite().all()
