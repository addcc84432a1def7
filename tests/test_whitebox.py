"""What a network did: measured forms, attention maps and streamed moments, against formulas written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import UnrollError

SIZES = {"d": 24, "K": 3, "p": 8}


def crate(spec: str = "crate", **more: object) -> unroll.Network:
    net = unroll.compile(spec, dims=SIZES, overrides=["unroll.layers=2"], dtype=torch.float64, **more)  # type: ignore[arg-type]
    assert isinstance(net, unroll.Network)
    return net


def tokens(batch: int = 4, n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rate(v: Tensor, eps2: float) -> Tensor:
    """1/2 log det(I + p/(N eps2) v v') of tokens (..., N, p), token by token."""
    n, p = v.shape[-2:]
    return torch.linalg.slogdet(torch.eye(n, dtype=v.dtype) + p / (n * eps2) * v @ v.mT).logabsdet / 2


@torch.no_grad()
@pytest.mark.parametrize("n", [5, 40])  # either side of the determinants is the smaller
def test_terms_are_those_of_the_normalised_tokens_and_of_the_layers_own_subspaces(n: int) -> None:
    net, x = crate(), tokens(n=n)
    trace = net.trace(x, at="sphere", parameters="layers")
    assert trace.own == {"U": "W"}
    for k, (layer, _) in enumerate(trace.labels):
        found = []
        for z in (trace.steps["Z"][k], trace.steps["Z"][k + 1]):
            unit = z / z.norm(dim=-1, keepdim=True)
            found.append(-rate(torch.einsum("kdp,bnd->bknp", net.get_parameter("W")[layer - 1], unit), 0.25).sum(-1))
        assert float((trace.actual["compression"][k] - (found[1] - found[0])).abs().max()) < 1e-9
        assert float((trace.all_terms["compression"][k + 1] - found[1]).abs().max()) < 1e-9


@torch.no_grad()
def test_the_published_measurement_is_a_formula() -> None:
    net, x = crate(), tokens()
    v = "unit_norm(W[k].T @ layer_norm(Z, 0), 0)"
    trace = net.trace(x, terms={"published": f"1/2 * sum(logdet(I(p) + p/(N*0.01) * {v} @ {v}.T) for k in K)"})
    z = torch.nn.functional.layer_norm(x, (24,), eps=1e-5)
    heads = torch.einsum("kdp,bnd->bknp", net.get_parameter("W")[0], z)
    heads = heads / heads.norm(dim=-1, keepdim=True)
    assert float((trace.all_terms["published"][0] - rate(heads, 0.01).sum(-1)).abs().max()) < 1e-6


@torch.no_grad()
def test_a_map_is_the_softmax_of_the_layer() -> None:
    net, x = crate(), tokens()
    trace = net.trace(x)
    assert [(m.layer, m.block, m.over) for m in trace.maps] == [(1, "compress", "tokens"), (2, "compress", "tokens")]
    for m, z in zip(trace.maps, trace.iterates["Z"][:-1], strict=True):
        y = torch.nn.functional.layer_norm(z, (24,), eps=1e-5)
        v = torch.einsum("kdp,bnd->bknp", net.get_parameter("W")[m.layer - 1], y)
        assert float((m.weights - (v @ v.mT / 8**0.5).softmax(-1)).abs().max()) < 1e-12


def test_streamed_moments_are_those_of_all_samples_at_once() -> None:
    net, x = crate(), tokens(11)
    found = unroll.white_box(net, x.split(4))
    trace = net.trace(x, parameters="layers")
    assert found.samples == 11 and found.claims == {"compress": ("compression",), "sparsify": ("sparsity", "expansion")}
    for term in ("expansion", "compression", "sparsity"):
        for kind in ("predicted", "actual", "cosine"):
            whole, parts = getattr(trace, kind)[term], getattr(found, kind)[term]
            assert torch.allclose(parts.mean, whole.mean(1), atol=1e-12)
            assert torch.allclose(parts.std, whole.std(1, correction=0), atol=1e-10)
        assert torch.allclose(found.improved(term), (trace.actual[term] > 0).double().mean(1))
    assert torch.allclose(found.zeros["Z"].mean, trace.all_zeros["Z"].mean(1))
    assert "compress" in str(found) and len(found.rows()) == 4 * 4  # and their total


def test_a_layer_that_cannot_solve_and_a_term_that_has_no_determinant_are_named() -> None:
    net, x = crate("crate_exact"), tokens()
    with torch.no_grad():
        net.get_parameter("W")[1] = torch.nan
    for call in (net, net.trace, lambda z: unroll.white_box(net, [z])):
        with pytest.raises(UnrollError, match=r"compress of layer 2 .*compression") as e:
            call(x)
        assert e.value.code == "E409"


@pytest.mark.parametrize("spec", ["crate_exact", "crate"])
def test_half_precision_changes_terms_by_rounding_only(spec: str) -> None:
    net = crate(spec).float()
    x = tokens().float()
    with torch.no_grad():
        z = net(x)
        terms = net.objective(x, Z=z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, found = net(x).float(), net.objective(x, Z=z)
    assert low.isfinite().all() and float((low - z).norm()) < 2e-2 * float(z.norm())
    assert all(float((found[n] - terms[n]).abs().max()) < 1e-4 * float(terms[n].abs().max()) + 1e-6 for n in terms)


@pytest.mark.parametrize("asked", [{"at": "nowhere"}, {"parameters": "other"}, {"terms": {"sparsity": "1"}}])
def test_what_a_trace_cannot_measure_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(UnrollError) as e:
        crate().trace(tokens(), **asked)
    assert e.value.code == "E404"


@pytest.mark.parametrize("name", ["crate_digits", "redunet", "palm", "mixture_denoiser", "tost"])
def test_the_page_of_a_layer_with_blocks_tells_what_each_layer_does(name, tmp_path):
    page = unroll.report(name, tmp_path / "page.html", overrides=["unroll.layers=2"]).read_text(encoding="utf-8")
    assert ("What each layer does" in page) == (name != "redunet")
    assert len(page) < 400_000
