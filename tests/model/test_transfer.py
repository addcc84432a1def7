"""Weights of one network as the start of another: what each rule promises, against another source."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import unroll
from unroll.errors import UnrollError
from unroll.model.parts import Cells, Channels, Grid, Named, Row
from unroll.model.transfer import Layers, _Unfit, along, axes_of, resized, transfer

SPEC = """
name: small
dims: {d: 8, N: dynamic}
variables: {Z: [d, N]}
inputs: {X: [d, N]}
parameters: {D: [d, d]}
scalars: {lam: 0.1, eta: 0.1}
minimize: {fit: 1/2 * sumsq(X - D @ Z), sparsity: lam * norm1(Z)}
unroll: {algorithm: proximal_gradient, layers: 2, step: eta, start: {Z: X}, learn: {W: {replaces: step * D.T}}}
model:
  embed: {kind: patches, image: [1, 8, 8], patch: 4, norm: EDGE}
  positions: {kind: learned}
  class_token: {std: 0.02}
  head: {kind: class_token, classes: 4}
"""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(*overrides, norm="both", seed=0):
    """A network that was trained, as it were: no number of it is where it started."""
    net = unroll.compile(SPEC.replace("EDGE", norm), overrides=overrides, seed=seed, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=100 * seed + i))
    return net


def tokens(net, image):
    """Of its patches, before positions."""
    with torch.no_grad():
        net.positions.zero_()
        return net.embedding(image)[:, 1:]


# --- positions --------------------------------------------------------------------------------------------------------


def test_positions_are_resized_as_pillow_resizes_pictures():
    for (rows, columns), (up, across) in (((4, 6), (9, 5)), ((7, 7), (3, 14)), ((2, 3), (2, 9))):
        table = draw(rows * columns, 2)
        moved, how = along(table, Grid(rows, columns, False), Grid(up, across, False))
        for k in range(2):
            picture = Image.fromarray(table[:, k].view(rows, columns).float().numpy(), mode=None)
            theirs = np.asarray(picture.resize((across, up), Image.Resampling.BICUBIC))
            assert np.abs(moved[:, k].view(up, across).numpy() - theirs).max() < 1e-5
        assert how == f"interpolated from {rows} x {columns} places to {up} x {across}"


def test_the_place_of_the_class_token_is_no_place_of_the_image():
    table = torch.cat([torch.full((1, 3), 100.0), torch.ones(16, 3)])
    moved, _ = along(table, Grid(4, 4, True), Grid(6, 5, True))
    assert torch.equal(moved[0], table[0]) and (moved[1:] - 1).abs().max() < 1e-6 and len(moved) == 31
    without, _ = along(table, Grid(4, 4, True), Grid(4, 4, False))
    assert torch.equal(without, table[1:])
    fresh, how = along(table[1:], Grid(4, 4, False), Grid(2, 2, True))
    assert not fresh[0].any() and len(fresh) == 5 and "class token 0" in how


def test_a_grid_that_is_turned_is_another_grid_of_as_many_places():
    table = draw(8, 2)
    moved, _ = along(table, Grid(2, 4, False), Grid(4, 2, False))
    assert moved.shape == table.shape and not torch.allclose(moved, table)


def test_places_of_a_text_keep_theirs():
    table, own = draw(5, 2), draw(7, 2, seed=1)
    longer, _ = along(table, Row(5, False), Row(7, False), own)
    assert torch.equal(longer[:5], table) and torch.equal(longer[5:], own[5:])
    shorter, how = along(table, Row(4, True), Row(2, True), own[:3])
    assert torch.equal(shorter, table[:3]) and how == "3 of 5 places taken, 0 of ours left"


# --- patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_of_patches_that_grow_stay_what_they_were(order, channels):
    """<w', B x> = <w, x> where B has a left inverse: Beyer et al. 2023, section 3.4."""
    small_, large = Cells(channels, 3, order), Cells(channels, 5, order)
    w, x = draw(channels * 9, 4), draw(6, channels, 3, 3, seed=1)
    moved, how = along(w, small_, large)
    bigger = F.interpolate(x, (5, 5), mode="bicubic", antialias=True)
    flat = [p.flatten(1) if order == "channels_first" else p.permute(0, 2, 3, 1).flatten(1) for p in (x, bigger)]
    assert (flat[0] @ w - flat[1] @ moved).abs().max() < 1e-12
    assert how == f"resampled from {channels} x 3 x 3 to {channels} x 5 x 5"


def test_tokens_of_patches_that_shrink_are_as_near_as_least_squares_brings_them():
    w = draw(25, 1)
    moved, _ = along(w, Cells(1, 5, "channels_first"), Cells(1, 3, "channels_first"))
    b = resized(torch.eye(25, dtype=torch.float64).view(25, 5, 5), 3, 3).flatten(1)  # rows: resized unit pictures
    assert (moved - torch.linalg.lstsq(b, w).solution).abs().max() < 1e-12


@pytest.mark.parametrize("norm", ["both", "before", "none", "after"])
@pytest.mark.parametrize(("there", "here"), [(1, 3), (3, 1)])
def test_grey_pictures_in_any_number_of_channels_give_the_same_tokens(norm, there, here):
    source = small(f"model.embed.image=[{there},8,8]", norm=norm)
    net = small(f"model.embed.image=[{here},8,8]", norm=norm, seed=1)
    grey = draw(5, 1, 8, 8)
    report = transfer(net, source)
    a, b = tokens(source, grey.expand(-1, there, -1, -1)), tokens(net, grey.expand(-1, here, -1, -1))
    assert (a - b).abs().max() < 1e-4 * a.abs().max()  # the norm adds 1e-5 to a variance
    if norm in ("none", "after"):
        assert (a - b).abs().max() < 1e-12
    assert dict(report.changed)["embed.weight"] == f"resampled from {there} x 4 x 4 to {here} x 4 x 4"
    assert ("embed_norm.weight" in dict(report.changed)) == (norm in ("both", "before"))


def test_other_patches_of_an_image_that_grows_with_them_give_the_same_tokens():
    source, net = small(norm="after"), small("model.embed={image: [1,12,12], patch: 6}", norm="after", seed=1)
    report, image = transfer(net, source), draw(3, 1, 8, 8)
    assert "positions" in report.taken  # as many places: 2 x 2
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).flatten(1, 3)  # each grows by itself
    larger = F.interpolate(patches, (6, 6), mode="bicubic", antialias=True)
    image6 = larger.view(3, 2, 2, 6, 6).permute(0, 1, 3, 2, 4).reshape(3, 1, 12, 12)
    assert (tokens(source, image) - tokens(net, image6)).abs().max() < 1e-12


def test_what_makes_patches_makes_resized_ones():
    w, code = draw(9, 4), draw(4, 6, seed=1)
    made, _ = along(w, Cells(1, 3, "channels_last", made=True), Cells(1, 5, "channels_last", made=True))
    patches = (w @ code).mT.view(6, 1, 3, 3)
    bigger = F.interpolate(patches, (5, 5), mode="bicubic", antialias=True)
    assert ((made @ code).mT - bigger.flatten(1)).abs().max() < 1e-12
    colour, _ = along(w, Cells(1, 3, "channels_first", made=True), Cells(3, 3, "channels_first", made=True))
    assert torch.equal(colour, torch.cat([w, w, w]))
    grey, _ = along(colour, Cells(3, 3, "channels_first", made=True), Cells(1, 3, "channels_first", made=True))
    assert (grey - w).abs().max() < 1e-15


def test_the_order_of_the_numbers_of_a_patch_is_changed_without_loss():
    w = draw(27, 2)
    moved, how = along(w, Cells(3, 3, "channels_last"), Cells(3, 3, "channels_first"))
    assert (moved - w.view(3, 3, 3, 2).permute(2, 0, 1, 3).flatten(0, 2)).abs().max() < 1e-12
    assert how == "in another order"


def test_channels_of_a_convolution_and_those_without_a_rule():
    w, x = draw(3, 4, 3, 3), draw(2, 1, 5, 5, seed=1)
    grey, _ = along(w, Channels(3), Channels(1))
    assert (F.conv2d(x.expand(-1, 3, -1, -1), w.movedim(0, 1)) - F.conv2d(x, grey.movedim(0, 1))).abs().max() < 1e-12
    with pytest.raises(_Unfit, match="3 channels there, 4 here: only between one and several"):
        along(w, Channels(3), Channels(4))
    with pytest.raises(_Unfit, match="no rule"):
        along(draw(4, 2), Grid(2, 2, False), Row(4, False))


# --- heads, layers, whole networks ------------------------------------------------------------------------------------


def test_rows_go_by_their_names_and_without_names_by_their_number():
    head, own = draw(3, 5), draw(4, 5, seed=1)
    moved, how = along(head, Named(3), Named(4), own, (["a", "b", "c"], ["c", "x", "a", "y"]))
    assert torch.equal(moved, torch.stack([head[2], own[1], head[0], own[3]]))
    assert how == "2 of 3 classes or words taken, 2 of ours left"
    assert along(head, Named(3), Named(3), own[:3]) == (head, "")
    turned, _ = along(head, Named(3), Named(3), own[:3], (["a", "b", "c"], ["b", "c", "a"]))
    assert torch.equal(turned, head[[1, 2, 0]])
    for names in (([], []), (["a", "b", "c"], ["x", "y", "z", "w"])):
        with pytest.raises(_Unfit, match="classes or words"):
            along(head, Named(3), Named(4), own, names)


def test_every_axis_that_a_model_says_is_as_long_as_it_says():
    sizes = {
        Grid: lambda a: a.rows * a.columns + a.first,
        Row: lambda a: a.count + a.first,
        Cells: lambda a: a.channels * a.side**2,
        Channels: lambda a: a.count,
        Named: lambda a: a.count,
        Layers: lambda a: a.count,
    }
    tiny = ["dims.d=8", "dims.K=2", "dims.p=4", "unroll.layers=2"]
    nets = [small(), small("model.head={kind: class_attention, classes: 3, heads: 2}", "model.class_token=null")]
    stem = SPEC.replace(
        "kind: patches, image: [1, 8, 8], patch: 4, norm: EDGE", "kind: stem, image: [3, 8, 8], patch: 4"
    )
    nets += [unroll.compile(stem), unroll.compile("crate_text", overrides=[*tiny, "model.embed.vocabulary=20"])]
    there = [f"model.decoder.layers.{x}" for x in tiny]
    nets += [unroll.compile("crate_mae_digits", overrides=[*tiny, *there])]
    met = set()
    for net in nets:
        state = net.state_dict()
        for name, axes in axes_of(net).items():
            if name not in state:  # a bias that is not there
                continue
            assert len(axes) == state[name].ndim, name
            for axis, n in zip(axes, state[name].shape, strict=True):
                if axis is not None:
                    assert sizes[type(axis)](axis) == n, name
                    met.add(type(axis))
    assert met == set(sizes)


def test_more_layers_keep_the_first_and_start_the_rest():
    source, net = small(), small("unroll.layers=3", seed=1)
    before, report = net.body.W.detach().clone(), transfer(net, source)
    assert torch.equal(net.body.W[:2], source.body.W) and torch.equal(net.body.W[2], before[2])
    fewer = small("unroll.layers=1", seed=2)
    assert dict(transfer(fewer, source).changed)["body.W"] == "1 of 2 layers taken, 0 of ours left"
    assert json.loads(json.dumps(report.to_dict()))["changed"]["body.W"] == "2 of 2 layers taken, 1 of ours left"
    assert "body.W: 2 of 2 layers taken, 1 of ours left" in str(report)


def test_what_layers_learn_is_taken_where_it_stands_for_the_same():
    source = small()
    other = small("unroll.learn={W: {replaces: D.T}}", seed=1)
    assert dict(transfer(other, source).left)["body.W"] == "there it stands for step * D.T, here for D.T"
    bounded = small("unroll.learn={W: {replaces: step * D.T}, t: {replaces: step * lam, bounds: exp}}", seed=1)
    positive = small("unroll.learn={W: {replaces: step * D.T}, t: {replaces: step * lam}}", seed=1)
    assert dict(transfer(bounded, positive).left)["body.t"] == "it is kept within other bounds there"
    assert transfer(small(seed=2), positive).unused == ("body.t",)


def test_a_head_put_there_by_hand_is_taken_as_it_is():
    source, net = small(), small("model.head.classes=7", seed=1)
    source.head = torch.nn.Linear(8, 7, dtype=torch.float64)
    assert "head.weight" in transfer(net, source).taken and torch.equal(net.head.weight, source.head.weight)


def test_of_another_width_nothing_fits_and_nothing_is_changed():
    source, net = small("dims.d=12"), small(seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = transfer(net, source)
    assert set(report.taken) == {"embed_norm.weight", "embed_norm.bias", "head.bias"}  # these are not of that width
    assert dict(report.left)["body.W"] == "2 x 12 x 12 there, 2 x 8 x 8 here"
    assert torch.equal(net.body.W, before["body.W"])
    with pytest.raises(UnrollError, match="nothing of it fits"):
        transfer(net, source, leave=["embed_norm", "head"])
    with pytest.raises(UnrollError, match="(?s)no parameter 'hed' to leave.*did you mean 'head'"):
        transfer(net, source, leave="hed")


@pytest.mark.parametrize("shape", [{}, {"shape": {"rank": 2}}, {"shape": {"rank": 1}}])
@pytest.mark.parametrize("share", [{}, {"share": "layers"}])
@pytest.mark.parametrize("rank", [1, 3])
def test_what_was_learned_at_low_rank_goes_along(shape, share, rank):
    """Into a network that learns all of the matrix, or a change of another rank."""
    made = lambda more, seed: unroll.compile(
        {
            "dims": {"m": 4, "n": 5}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
            "minimize": {"fit": "1/2*sumsq(x - A @ z)", "sparsity": "0.1*norm1(z)"},
            "unroll": {"algorithm": "proximal_gradient", "layers": 2, "step": 0.3, "learn": {"W": {"replaces": "step * A.T", **share, **more}}},
        },
        parameters={"A": torch.arange(20.0).view(4, 5).sin()}, seed=seed,
    )  # fmt: skip
    source, net = made({"shape": {"rank": rank}}, 0), made(shape, 1)
    with torch.no_grad():
        for p in source.parameters():
            p += 0.1 * torch.randn_like(p)
    unroll.transfer(net, source)
    x = torch.randn(3, 4)
    torch.testing.assert_close(net(x), source(x))
