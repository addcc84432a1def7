"""log det(I + t Z diag(w) Z') of all members w of a family: over the samples that weigh something, where these are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unroll

D, N = 12, 40
COEFFICIENTS = {
    "of each member": "a / sum(Pi[k])",
    "of all": "a",
    "of the sizes": "d/N",
    "a number": "2",
}


def loss(coefficient: str = "of each member", **options: Any) -> Any:
    return unroll.loss(
        {
            "dims": {"d": D, "N": "dynamic", "K": 8},
            "variables": {"Z": ["d", "N"]},
            "inputs": {"Pi": {"family": "K", "shape": ["N"], "positive": True}},
            "scalars": {"a": 3.0},
            "minimize": {"f": f"sum(logdet(I(d) + {COEFFICIENTS[coefficient]} * Z @ diag(Pi[k]) @ Z.T) for k in K)"},
        },
        **options,
    )


def naive(z: Tensor, pi: Tensor, coefficient: str = "of each member") -> Tensor:
    t = {
        "of each member": lambda w: 3 / w.sum(-1),
        "of all": lambda w: 3.0,
        "of the sizes": lambda w: D / z.shape[-2],
        "a number": lambda w: 2.0,
    }
    total = z.new_zeros(())
    for w in pi.unbind(-2):
        c = t[coefficient](w)
        gram = torch.einsum("...nd,...n,...ne->...de", z, w, z)
        c = c[..., None, None] if isinstance(c, Tensor) else c
        total = total + torch.logdet(torch.eye(D, dtype=z.dtype) + c * gram)
    return total.mean()


def features(*batch: int, seed: int = 0) -> Tensor:
    return torch.randn(*batch, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(kind: str) -> Tensor:
    """hard: five samples of each of eight classes; soft: all weigh something; few: two classes of 20, the others of none."""
    g = torch.Generator().manual_seed(3)
    match kind:
        case "hard":
            return torch.nn.functional.one_hot(torch.arange(N) % 8, 8).T.double()
        case "soft":
            return torch.rand(8, N, dtype=torch.float64, generator=g)
        case "few":
            return torch.nn.functional.one_hot(torch.arange(N) % 2, 8).T.double()
        case _:
            return torch.nn.functional.one_hot(torch.arange(N) % 8, 8).T.double() * torch.rand(
                N, dtype=torch.float64, generator=g
            )


KINDS = [
    (k, c) for k in ("hard", "soft", "few", "weighed") for c in COEFFICIENTS if (k, c) != ("few", "of each member")
]
"""Memberships and coefficients; a class without samples has no coefficient of its own."""


@pytest.mark.parametrize(("kind", "coefficient"), KINDS)
def test_values_and_slopes_are_those_of_the_determinants_as_written(kind: str, coefficient: str) -> None:
    z, pi = features().requires_grad_(), labels(kind)
    f = loss(coefficient)
    assert torch.allclose(f(Z=z, Pi=pi), naive(z, pi, coefficient), rtol=1e-12)
    (found,), (want,) = (torch.autograd.grad(g, z) for g in (f(Z=z, Pi=pi), naive(z, pi, coefficient)))
    assert (found - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_batches_and_slopes_in_the_weights_take_all_samples(coefficient: str) -> None:
    z, pi = features(3), torch.stack([labels("hard"), labels("soft"), labels("weighed")])
    f = loss(coefficient)
    assert torch.allclose(f(Z=z, Pi=pi), naive(z, pi, coefficient), rtol=1e-12)
    w = labels("hard").requires_grad_()
    (found,), (want,) = (
        torch.autograd.grad(g(z[0], w), w) for g in (lambda a, b: f(Z=a, Pi=b), lambda a, b: naive(a, b, coefficient))
    )
    assert torch.allclose(found, want, rtol=1e-10, atol=1e-12)


def test_second_derivatives_units_and_maps() -> None:
    f, pi = loss(), labels("hard")
    assert torch.autograd.gradgradcheck(lambda v: f(Z=v, Pi=pi), 0.3 * features().requires_grad_(), atol=1e-6)
    own = [
        torch.arange(N)[w != 0] for w in pi
    ]  # the side of the samples: that of the features is rounded away in the unit 1e6
    by_samples = lambda v: sum(torch.logdet(torch.eye(5, dtype=v.dtype) + 3 / 5 * v[i] @ v[i].mT) for i in own)
    for unit in (1e-6, 1e6):
        x = (unit * features()).requires_grad_()
        (found,), (want,) = (torch.autograd.grad(g, x) for g in (f(Z=x, Pi=pi), by_samples(x)))
        assert (found - want).abs().max() <= 1e-9 * want.abs().max()
    many = features(4)
    mapped = torch.func.vmap(lambda v: f(Z=v, Pi=pi))(many)
    assert torch.allclose(mapped, torch.stack([naive(v, pi) for v in many]), rtol=1e-12)


def test_few_samples_make_a_small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda s: (sides.append(s.shape[-1]), cholesky(s))[1])
    for kind, side in (("hard", 5), ("soft", D)):
        sides.clear()
        loss()(Z=features(), Pi=labels(kind))
        assert sides == [side]


def test_a_weight_below_0_is_not_taken_the_root_of() -> None:
    z, pi = 0.1 * features(), labels("hard")
    pi[0, 0] = -1.0
    assert torch.allclose(loss("of all")(Z=z, Pi=pi), naive(z, pi, "of all"), rtol=1e-12)
