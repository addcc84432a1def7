"""Pictures of what is inside a network, as PNG files: what each layer looks at, its tokens as colours, what excites its atoms, curves over layers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unroll.errors import UnrollError, did_you_mean
from unroll.model.inside import active_atoms, attention_maps, components, enlarged, grid, heaviest, jaccard, segment

if TYPE_CHECKING:
    from unroll.model.module import Model
    from unroll.model.whitebox import Measured, Moments
    from unroll.network.network import Network

Cell = tuple[Tensor, str, Tensor | None]
"""What is shown, what stands above it, and the pixels that are framed."""


def draw_segments(
    net: Network | Model,
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    share: float = 0.6,
    truth: Tensor | None = None,
) -> Path:
    """A row for each image (B, C, H, W), a column for each layer: what the class token takes from each patch, framed what `segment` keeps.

    Of the mean of the heads; with `truth` (B, H, W) of the head whose masks lie best on it, the Jaccard index above.
    Layers without a softmax over tokens are refused: UnrollError E404.
    """
    columns: list[list[Cell]] = [[(image, "", None if truth is None else truth[b]) for b, image in enumerate(images)]]
    for layer in range(1, net.layers + 1):
        masks = segment(net, images, layer=layer, share=share)
        looks = attention_maps(net, images, layer=layer)[..., 0, 1:]
        said = [f"layer {layer}"] * len(images)
        if truth is None:
            looks = looks.mean(1)
            masks = enlarged(net, heaviest(looks, share).unflatten(-1, _grid(net)))
        else:
            found = jaccard(masks, truth)
            head = int(found.mean(0).argmax())
            said = [f"layer {layer}, head {head + 1}: {float(j):.2f}" for j in found[:, head]]
            looks, masks = looks[:, head], masks[:, head]
        columns.append(list(zip(enlarged(net, looks.unflatten(-1, _grid(net))), said, masks, strict=True)))
    return _drawn([list(row) for row in zip(*columns, strict=True)], path)


def draw_components(
    net: Network | Model, images: Tensor, path: str | os.PathLike[str], *, block: str | None = None
) -> Path:
    """A row for each image, a column for each layer: the first three principal components of its tokens as red, green and blue.

    Of all images together, each component from its least to its largest.  Raises UnrollError E404 as `unroll.components` does.
    """
    _grid(net)
    columns: list[list[Cell]] = [[(image, "", None) for image in images]]
    for layer in range(1, net.layers + 1):
        found = components(net, images, layer=layer, block=block)
        low, high = found.amin((0, 1, 2)), found.amax((0, 1, 2))
        colours = enlarged(net, ((found - low) / (high - low).clamp_min(1e-12)).movedim(-1, 1))
        columns.append([(c, f"layer {layer}", None) for c in colours])
    return _drawn([list(row) for row in zip(*columns, strict=True)], path)


def draw_atoms(
    net: Network | Model,
    samples: Tensor,
    path: str | os.PathLike[str],
    *,
    layer: int = -1,
    block: str | None = None,
    count: int = 8,
    excited: int = 8,
) -> Path:
    """A row for each of the most active atoms: the patches of images (B, C, H, W), or square samples (B, n), that excite it the most.

    Arguments as those of `unroll.active_atoms`.  Raises UnrollError E404, also for what are no patches and no squares.
    """
    found = active_atoms(net, samples, layer=layer, block=block, count=count, excited=excited)
    shown = _squares(net, samples)
    rows: list[list[Cell]] = []
    for i, places, values in zip(found.entries.tolist(), found.places, found.values, strict=True):
        pairs = list(zip(places, values.tolist(), strict=True))
        said = [f"{v:+.2g}" if k else f"atom {i}: {v:+.2g}" for k, (_, v) in enumerate(pairs)]
        rows.append([(shown[tuple(place)], text, None) for (place, _), text in zip(pairs, said, strict=True)])
    return _drawn(rows, path)


def draw_curves(found: Measured, path: str | os.PathLike[str], *, terms: Sequence[str] | None = None) -> Path:
    """A panel for each term, of what enters each block by the parameters of its own layer, over the layers; and one for shares of zeros after each block.

    Means over the samples, and one standard deviation around them.  found: of `white_box` or `audit`.  terms: of those of `found`; all if left out.
    Raises UnrollError E404 for a term that is not there.
    """
    shown = found.terms if terms is None else tuple(terms)
    for name in shown:
        if name not in found.terms:
            hint = did_you_mean(name, found.terms) or f"terms: {', '.join(found.terms)}"
            raise UnrollError("E404", f"'{name}' was not measured", hint=hint)
    panels = [(name, found.entering[name], 0) for name in shown] + [
        (f"zeros of {name}", of, 1) for name, of in found.zeros.items()
    ]
    figure = _figure(4.2 * len(panels), 3.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, moments, late) in zip(axes, panels, strict=True):
        for x, mean, std, block in _by_block(found, moments, late):
            (line,) = axis.plot(x, mean, marker="o", markersize=3, label=block)
            axis.fill_between(x, mean - std, mean + std, alpha=0.2, color=line.get_color())
        axis.set(xlabel="layer", title=name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _by_block(found: Measured, of: Moments, late: int) -> Iterable[tuple[list[int], Any, Any, str]]:
    """(layers, means, standard deviations, block) of moments with a row for each step; late: of zeros, whose first row is the start."""
    for block in dict.fromkeys(b for _, b in found.labels):
        rows = [k for k, (_, b) in enumerate(found.labels) if b == block]
        at = [k + late for k in rows]
        yield [found.labels[k][0] for k in rows], of.mean[at].numpy(), of.std[at].numpy(), block


def _squares(net: Network | Model, samples: Tensor) -> Tensor:
    """(B, N, C, P, P) patches in the order of tokens, or (B, side, side) of vectors."""
    if (of := grid(net)) is not None:
        rows, columns = of
        cut = samples.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))  # (B, C, rows, P, columns, P)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    side = math.isqrt(samples.shape[-1])
    if samples.ndim != 2 or side * side != samples.shape[-1]:
        hint = "unroll.active_atoms has the table"
        raise UnrollError("E404", f"samples {tuple(samples.shape)} are no patches and no squares", hint=hint)
    return samples.unflatten(-1, (side, side))


def _grid(net: Network | Model) -> tuple[int, int]:
    found = grid(net)
    if found is None:
        raise UnrollError("E404", "these tokens are no patches of an image behind a class token")
    return found


# --- the figure -------------------------------------------------------------------------------------------------------


def _drawn(rows: Sequence[Sequence[Cell]], path: str | os.PathLike[str]) -> Path:
    if not rows:
        raise UnrollError("E404", "there is no image to draw")
    figure = _figure(1.6 * len(rows[0]), 1.75 * len(rows))
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for cells, row in zip(rows, axes, strict=True):
        for cell, axis in zip(cells, row, strict=True):
            _one(axis, *cell)
    return _saved(figure, path)


def _figure(width: float, height: float) -> Any:
    """A figure that never opens a window."""
    from unroll.train.samples import package

    figure_module = package("matplotlib.figure", "a picture")
    package("matplotlib.backends.backend_agg", "a picture")
    return figure_module.Figure(figsize=(width, height), dpi=110, layout="constrained")


def _saved(figure: Any, path: str | os.PathLike[str]) -> Path:
    figure.savefig(target := Path(path), format="png")
    return target


def _one(axis: Any, shown: Tensor, said: str, framed: Tensor | None) -> None:
    pixels = _pixels(shown)
    axis.imshow(pixels.numpy(), cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
    for x, y in _frame(framed) if framed is not None else ():
        axis.plot(x, y, color="#e67e22", linewidth=1.2)
    axis.set_title(said, fontsize=7)
    axis.axis("off")


def _frame(marks: Tensor) -> Iterable[tuple[tuple[float, float], tuple[float, float]]]:
    """The sides of pixels between what is marked and what is not."""
    padded = torch.nn.functional.pad(marks.cpu().int(), (1, 1, 1, 1))
    for row, column in (padded[1:] != padded[:-1]).nonzero().tolist():
        yield (column - 1.5, column - 0.5), (row - 0.5, row - 0.5)
    for row, column in (padded[:, 1:] != padded[:, :-1]).nonzero().tolist():
        yield (column - 0.5, column - 0.5), (row - 1.5, row - 0.5)


def _pixels(image: Tensor) -> Tensor:
    """(H, W), or (C, H, W) -> (H, W, 3) of three channels, the mean of others; between 0 and 1."""
    x = image.detach().double().cpu()
    x = x.movedim(0, -1) if x.ndim == 3 and len(x) == 3 else x.mean(0) if x.ndim == 3 else x
    low, high = (float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0)
    return (x - low) / ((high - low) or 1.0)
