"""Pictures of what is inside: what is drawn where, against the numbers, and that a file comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unroll
from unroll.errors import UnrollError
from unroll.pages import inside

OVERRIDES = ["unroll.layers=2", "dims.d=12", "dims.K=3", "dims.p=4", "model.embed.image=[3, 6, 4]"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[inside.Cell]]:
    """The rows of the picture, in the place of the picture."""
    found: list[list[inside.Cell]] = []
    monkeypatch.setattr(inside, "_drawn", lambda rows, path: found.extend(rows) or path)
    return found


def net(spec: str = "crate_digits") -> unroll.Model:
    made = unroll.compile(spec, overrides=OVERRIDES, seed=0)
    assert isinstance(made, unroll.Model)
    return made.eval()


def images() -> Tensor:
    return torch.rand(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_segments_are_framed_on_what_is_looked_at(drawn: list[list[inside.Cell]]) -> None:
    made, x = net(), images()
    truth = torch.zeros(2, 6, 4, dtype=torch.bool)
    truth[:, :4] = True
    inside.draw_segments(made, x, "none.png", truth=truth)
    assert len(drawn) == 2 and all(len(row) == 1 + 2 for row in drawn)
    for layer in (1, 2):
        maps, masks = unroll.attention_maps(made, x, layer=layer), unroll.segment(made, x, layer=layer)
        means = [sum(float(unroll.jaccard(masks[b, h], truth[b])) for b in range(2)) for h in range(3)]
        head = means.index(max(means))
        for b in range(2):
            heat, said, framed = drawn[b][layer]
            for row in range(6):
                for column in range(4):
                    assert heat[row, column] == maps[b, head, 0, 1 + row // 2 * 2 + column // 2]
            assert framed is not None and torch.equal(framed, masks[b, head])
            assert said == f"layer {layer}, head {head + 1}: {float(unroll.jaccard(masks[b, head], truth[b])):.2f}"
    assert torch.equal(drawn[1][0][0], x[1]) and drawn[1][0][2] is not None
    drawn.clear()
    inside.draw_segments(made, x, "none.png")
    mean = unroll.attention_maps(made, x, layer=1)[:, :, 0, 1:].mean(1).reshape(2, 3, 2)
    assert torch.equal(drawn[0][1][0][::2, ::2], mean[0]) and drawn[0][0][2] is None and drawn[0][1][1] == "layer 1"


@torch.no_grad()
def test_components_are_colours_between_their_least_and_largest(drawn: list[list[inside.Cell]]) -> None:
    made, x = net("vit_digits"), images()
    inside.draw_components(made, x, "none.png")
    found = unroll.components(made, x, layer=2).reshape(-1, 3)
    shown = torch.stack([row[2][0][:, ::2, ::2] for row in drawn]).movedim(1, -1).reshape(-1, 3)
    assert torch.equal(shown.amin(0), torch.zeros(3)) and torch.equal(shown.amax(0), torch.ones(3))
    for k in range(3):
        torch.testing.assert_close(torch.corrcoef(torch.stack([found[:, k], shown[:, k]]))[0, 1], torch.tensor(1.0))


@torch.no_grad()
def test_patches_stand_beside_the_atoms_that_they_excite(drawn: list[list[inside.Cell]]) -> None:
    made, x = net(), images()
    inside.draw_atoms(made, x, "none.png", count=2, excited=3)
    found = unroll.active_atoms(made, x, count=2, excited=3)
    cut = F.unfold(x, 2, stride=2).mT.reshape(2, 6, 3, 2, 2)
    for row, places, values in zip(drawn, found.places.tolist(), found.values.tolist(), strict=True):
        for (patch, said, _), (b, n), value in zip(row, places, values, strict=True):
            assert torch.equal(patch, cut[b, n]) and said.endswith(f"{value:+.2g}")
    assert drawn[0][0][1].startswith(f"atom {int(found.entries[0])}: ")
    drawn.clear()
    ista = unroll.compile("ista", dims={"m": 9, "n": 12}, seed=0)
    samples = torch.randn(5, 9)
    inside.draw_atoms(ista, samples, "none.png", count=1, excited=2)
    at = int(unroll.active_atoms(ista, samples, count=1, excited=1).places[0, 0, 0])
    assert torch.equal(drawn[0][0][0].flatten(), samples[at])
    with pytest.raises(UnrollError, match="no patches and no squares"):
        inside.draw_atoms(unroll.compile("ista", dims={"m": 8, "n": 12}), torch.randn(5, 8), "none.png")


def test_a_frame_runs_between_what_is_marked_and_what_is_not() -> None:
    marks = torch.zeros(3, 3, dtype=torch.bool)
    marks[1, 2] = True
    assert set(inside._frame(marks)) == {
        ((1.5, 2.5), (0.5, 0.5)),
        ((1.5, 2.5), (1.5, 1.5)),
        ((1.5, 1.5), (0.5, 1.5)),
        ((2.5, 2.5), (0.5, 1.5)),
    }


@torch.no_grad()
def test_a_file_comes_out(tmp_path: Path) -> None:
    made, x = net(), images()
    paths = [
        unroll.draw_segments(made, x, tmp_path / "a.png"),
        unroll.draw_components(made, x[:1], tmp_path / "b.png"),
        unroll.draw_atoms(made, x, tmp_path / "c.png", count=2, excited=2),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert inside._pixels(torch.full((1, 2, 2), 3.0)).isfinite().all() and inside._pixels(x[0]).shape == (6, 4, 3)
    with pytest.raises(UnrollError, match="no image to draw"):
        unroll.draw_segments(made, x[:0], tmp_path / "d.png")
    with pytest.raises(UnrollError, match="no patches of an image"):
        unroll.draw_components(unroll.compile("ista", dims={"m": 8, "n": 12}), torch.randn(5, 8), tmp_path / "e.png")


@torch.no_grad()
def test_curves_are_what_enters_each_block_and_zeros_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = net(), images()
    found = unroll.white_box(made, [x])
    figures: list[Any] = []
    with monkeypatch.context() as m:
        m.setattr(inside, "_saved", lambda figure, path: figures.append(figure))
        unroll.draw_curves(found, "none.png", terms=["sparsity"])
    rates, zeros = figures[0].axes
    assert [line.get_ydata().tolist() for line in rates.lines] == [
        found.entering["sparsity"].mean[k::2].tolist() for k in (0, 1)
    ]
    assert zeros.lines[1].get_ydata().tolist() == found.zeros["Z"].mean[2::2].tolist()
    for (layers, means, stds, block), at in zip(
        inside._by_block(found, found.entering["compression"], 0), ([0, 2], [1, 3]), strict=True
    ):
        assert layers == [1, 2] and block == found.labels[at[0]][1]
        assert means.tolist() == [float(found.entering["compression"].mean[k]) for k in at]
        assert stds.tolist() == [float(found.entering["compression"].std[k]) for k in at]
    after = [row[1].tolist() for row in inside._by_block(found, found.zeros["Z"], 1)]
    zeros = made.trace(x).all_zeros["Z"].double().mean(1).tolist()
    assert after == [[zeros[1], zeros[3]], [zeros[2], zeros[4]]]
    assert unroll.draw_curves(found, tmp_path / "c.png", terms=["compression"]).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UnrollError, match="'compresion' was not measured"):
        unroll.draw_curves(found, tmp_path / "d.png", terms=["compresion"])
