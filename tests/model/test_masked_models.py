"""Models whose samples have several lengths: a padded batch answers as its samples do alone, whatever stands around the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

LENGTHS = (5, 3, 1)
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [3, 0, 0, 0, 0]])
THERE = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
HEADS: dict[str, dict[str, Any]] = {
    "mean": {"kind": "mean", "classes": 3},
    "class token": {"kind": "class_token", "classes": 3},
    "tokens": {"kind": "tokens", "classes": 9},
    "no classes": {"kind": "mean", "norm": False},
    "tied": {"kind": "tied"},
    "class attention": {"kind": "class_attention", "classes": 3, "heads": 2},
}
SMALL = ["dims.d=8", "dims.K=2", "dims.p=4", "unroll.layers=2"]


def spec(body: str, head: str = "mean", class_token: bool = False, **more: Any) -> dict[str, Any]:
    text = {"kind": "tokens", "vocabulary": 9, "length": 12}
    around = {"embed": text, "positions": {"kind": "learned"}, "head": HEADS[head], **more}
    around |= {"class_token": {"std": 1.0}} if class_token else {}
    return {"use": body, "inputs": {"there": {"shape": ["N"], "mask": True}}, "model": around}


def made(
    body: str, head: str = "mean", class_token: bool = False, dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    overrides = [*SMALL, *(["dims.T=13"] if body == "tost_causal" else [])]
    net = unroll.compile(spec(body, head, class_token, **more), overrides=overrides, seed=0, dtype=dtype)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64).to(
                dtype
            )
    return net


AROUND = [
    (h, c) for h in HEADS for c in (False, True) if (h, c) not in (("class token", False), ("class attention", True))
]
"""A head, and whether a class token stands before the others: all that there are."""


@pytest.mark.parametrize(("head", "class_token"), AROUND)
@pytest.mark.parametrize("body", ["crate", "crate_causal", "tost", "tost_causal"])
def test_a_padded_batch_is_its_samples_alone(body: str, head: str, class_token: bool) -> None:
    net = made(body, head, class_token)
    answer = net(TOKENS, THERE)
    for i, n in enumerate(LENGTHS):
        alone = net(TOKENS[i : i + 1, :n], THERE[i : i + 1, :n])[0]
        own = answer[i, :n] if answer.ndim == 3 else answer[i]
        assert (own - alone).abs().max() < 1e-12
        if answer.ndim == 3:
            assert not answer[i, n:].any()
    elsewhere = torch.where(THERE == 1, TOKENS, 8)
    assert torch.equal(net(elsewhere, THERE), answer)  # what stands at padding is not read


@pytest.mark.parametrize("head", ["mean", "class attention"])
def test_a_mask_of_ones_changes_nothing_and_other_types_say_the_same(head: str) -> None:
    net, around = made("crate", head), spec("crate", head)
    del around["inputs"]
    plain = unroll.compile(around, overrides=SMALL, dtype=torch.float64)
    plain.load_state_dict(net.state_dict())
    assert (net(TOKENS, torch.ones_like(TOKENS)) - plain(TOKENS)).abs().max() < 1e-14
    for there in (THERE.bool(), THERE.double()):
        assert torch.equal(net(TOKENS, there), net(TOKENS, there=THERE))
    low = made("crate", head, dtype=torch.float32)
    assert (low(TOKENS, THERE)[1] - low(TOKENS[1:2, :3], THERE[1:2, :3])[0]).abs().max() < 1e-5


def test_images_with_fewer_patches() -> None:
    patches = {"kind": "patches", "image": [1, 4, 6], "patch": 2}
    net = made("crate", "mean", True, embed=patches)
    x, there = torch.randn(2, 1, 4, 6, dtype=torch.float64), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    changed = x.clone()
    changed[1, :, 2:] = 7.0  # the second row of patches
    assert torch.equal(net(x, there), net(changed, there))
    assert not torch.equal(net(x, torch.ones(2, 6)), net(changed, torch.ones(2, 6)))


def test_slopes_stay_out_of_padding_and_a_trace_leaves_it_at_0() -> None:
    net = made("crate", "mean", True)
    net(TOKENS, THERE).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert not net.positions.grad[6:].any()  # the class token's, and five places
    trace = net.trace(TOKENS, there=THERE)
    last = trace.iterates["Z"][-1]
    assert last.shape == (3, 6, 8) and not last[2, 2:].any() and last[2, :2].any()


def test_it_is_saved_and_restored(tmp_path: Path) -> None:
    net = made("crate", "class attention")
    net.save(tmp_path / "net")
    back = unroll.restore(tmp_path / "net")
    assert back.inputs == ("tokens", "there")
    assert torch.equal(back(TOKENS, THERE), net(TOKENS, THERE))


REFUSED: dict[str, tuple[tuple[Tensor | None, ...], dict[str, Any], str]] = {
    "no mask": ((TOKENS,), {}, "the mask there is missing, expected \\(3, 5\\)"),
    "another length": ((TOKENS, THERE[:, :4]), {}, "has shape \\(3, 4\\), expected \\(3, 5\\)"),
    "padding alone": ((TOKENS, THERE * torch.tensor([[1], [0], [1]])), {}, "of sample 1 is 0 everywhere"),
    "half a token": ((TOKENS, 0.5 * THERE), {}, "there"),
    "twice": ((TOKENS, THERE), {"there": THERE}, "'there' is given twice"),
    "another name": ((TOKENS,), {"mask_": THERE}, "'mask_' is nothing that this model takes: tokens, there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_mean_nothing_are_refused(case: str) -> None:
    given, named, says = REFUSED[case]
    with pytest.raises(UnrollError, match=says):
        made("crate", "mean", True)(*given, **named)


def test_models_that_have_no_use_for_a_mask_are_refused() -> None:
    patches = {"kind": "patches", "image": [1, 4, 4], "patch": 2}
    hidden = spec("crate", embed=patches, mask={"ratio": 0.5}, decoder={"layers": {"use": "crate"}})
    del hidden["model"]["head"]
    with pytest.raises(UnrollError, match="of no use where patches are hidden or found"):
        unroll.compile(hidden, overrides=SMALL)
    with pytest.raises(UnrollError, match="takes a mask, there, with each call"):
        made("crate_causal", "tied").generate(TOKENS[:1], 3)
