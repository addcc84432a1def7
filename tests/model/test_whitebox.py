"""What a network did: measured forms, attention maps and streamed moments, against formulas written by hand."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import unroll
from unroll import html
from unroll.errors import UnrollError
from unroll.model.inside import grid
from unroll.pages import page

SIZES = {"d": 24, "K": 3, "p": 8}


def crate(spec: str = "crate", **more: object) -> unroll.Network:
    net = unroll.compile(spec, dims=SIZES, overrides=["unroll.layers=2"], dtype=torch.float64, **more)
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
        assert float((trace.entering["compression"][k] - found[0]).abs().max()) < 1e-9
        assert float((trace.leaving["compression"][k] - found[1]).abs().max()) < 1e-9


@torch.no_grad()
def test_the_published_measurement_is_a_formula() -> None:
    net, x = crate(), tokens()
    v = "unit_norm(W[k].T @ layer_norm(Z, 0), 0)"
    trace = net.trace(x, terms={"published": f"1/2 * sum(logdet(I(p) + p/(N*0.01) * {v} @ {v}.T) for k in K)"})
    z = torch.nn.functional.layer_norm(x, (24,), eps=1e-5)
    heads = torch.einsum("kdp,bnd->bknp", net.get_parameter("W")[0], z)
    heads = heads / heads.norm(dim=-1, keepdim=True)
    assert float((trace.all_terms["published"][0] - rate(heads, 0.01).sum(-1)).abs().max()) < 1e-6


RELEASED = "1/2 * sum(logdet(I(p) + p/(N*0.01) * {v} @ {v}.T) for k in K)".format(
    v="unit_norm(W[k].T @ layer_norm(Z, 0, 1e-5, compress_norm_weight, compress_norm_bias), 0)"
)
"""R^c as the released hook of CRATE has it, whose eps = 0.01 is the eps^2 of the paper."""


class Released(torch.nn.Module):
    """A CRATE as released: its layers' modules under the names at which the measuring hooks listen."""

    def __init__(self, net: unroll.Network) -> None:
        super().__init__()
        self.qkv, self.ista = torch.nn.ModuleList(), torch.nn.ModuleList()
        for k in range(net.layers):
            qkv, ista = torch.nn.Linear(24, 24, bias=False), torch.nn.Linear(24, 24, bias=False)
            qkv.weight.data, ista.weight.data = net.W[k].mT.flatten(0, 1), net.Q[k]
            self.qkv.append(qkv)
            self.ista.append(Ista(ista.weight))
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        n, norm = self.net, torch.nn.functional.layer_norm
        for k in range(n.layers):
            v = self.qkv[k](norm(z, (24,), n.compress_norm_weight[k], n.compress_norm_bias[k])).unflatten(-1, (3, 8))
            v = v.transpose(1, 2)
            read = ((v @ v.mT) * 8**-0.5).softmax(-1) @ v
            z = z + torch.einsum("bknp,kdp->bnd", read, n.W_out[k]) + n.W_out_bias[k]
            z = self.ista[k](norm(z, (24,), n.sparsify_norm_weight[k], n.sparsify_norm_bias[k]))
        return z


class Ista(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        grad = (x - x @ self.weight.mT) @ self.weight
        return torch.relu(x + 0.1 * grad - 0.1 * 0.1)


@torch.no_grad()
def test_curves_of_layers_are_those_of_the_released_hooks() -> None:
    """Rates at the output of qkv, each token of each head at length one, on the side of the tokens; zeros at the output of ISTA."""
    net, x = crate(), tokens(6)
    g = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1)
    module, rates, zeros = Released(net), list[Tensor](), list[Tensor]()

    def coding_rate(module: object, given: object, out: Tensor) -> None:
        y = torch.nn.functional.normalize(out.unflatten(-1, (3, 8)).transpose(1, 2), dim=-1)  # (B, heads, N, p)
        gram = torch.eye(5, dtype=y.dtype) + 8 / (5 * 0.01) * y @ y.mT
        rates.append(torch.logdet(gram).sum(-1) / 2)

    for qkv, ista in zip(module.qkv, module.ista, strict=True):
        qkv.register_forward_hook(coding_rate)
        ista.register_forward_hook(lambda m, i, out: zeros.append((out == 0).double().mean((1, 2))))
    torch.testing.assert_close(module(x), net(x), rtol=1e-10, atol=1e-10)
    table = unroll.white_box(net, x.split(4), terms={"released": RELEASED})
    compress, sparsify = [0, 2], [1, 3]
    for k in range(2):
        assert float(table.entering["released"].mean[compress[k]]) == pytest.approx(float(rates[k].mean()), abs=1e-8)
        assert float(table.entering["released"].std[compress[k]]) == pytest.approx(float(rates[k].std(correction=0)), abs=1e-8)  # fmt: skip
        assert float(table.zeros["Z"].mean[sparsify[k] + 1]) == pytest.approx(float(zeros[k].mean()), abs=1e-12)
    assert 0 < float(zeros[0].mean()) < 1


@torch.no_grad()
def test_a_layer_is_measured_at_what_enters_it_by_its_own_matrices() -> None:
    """The figure of the literature. The terms between layers have the matrices of the layer before: another number."""
    net, x = crate(), tokens()
    with torch.no_grad():
        net.get_parameter("W")[1] *= 2.0
    trace = net.trace(x, at="layer_norm", parameters="layers", terms={"rc": "sum(R(U[k].T @ Z) for k in K)"})
    y = torch.nn.functional.layer_norm(trace.iterates["Z"][1], (24,), eps=1e-5)
    by = [rate(torch.einsum("kdp,bnd->bknp", w, y), 0.25).sum(-1) for w in net.get_parameter("W")]
    entering = trace.entering["rc"][trace.labels.index((2, "compress"))]
    assert torch.allclose(entering, by[1]) and torch.allclose(trace.terms["rc"][1], by[0])
    table = unroll.white_box(net, [x], at="layer_norm", terms={"rc": "sum(R(U[k].T @ Z) for k in K)"}).records()
    row = next(r for r in table if (r["layer"], r["block"], r["term"]) == (2, "compress", "rc"))
    assert row["entering"] == pytest.approx(float(by[1].mean())) and float((by[1] - by[0]).abs().min()) > 1


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
        for kind in ("entering", "leaving", "predicted", "actual", "cosine"):
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


def test_the_total_is_the_sum_of_the_terms_without_the_constraints() -> None:
    net = unroll.compile("nonnegative_digits", overrides=["unroll.layers=2"], dtype=torch.float64)
    x = torch.rand(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = unroll.white_box(net, [x])
    assert found.terms == ("fidelity", "sparsity", "total") and found.claimed("step", "total")
    a, lam = net.given["A"], net.numbers["lam"]
    z = [v.detach() for v in net.trace(x).iterates["z"]]
    at = z[1].clone().requires_grad_()
    values = (x - at @ a.mT).square().sum(-1) / 2 + lam * at.abs().sum(-1)
    (slope,) = torch.autograd.grad(values.sum(), at)
    move = z[2] - z[1]
    predicted = (slope * move).sum(-1)
    assert torch.allclose(found.values["total"].mean[1], values.mean())
    assert torch.allclose(found.predicted["total"].mean[1], predicted.mean())
    assert torch.allclose(found.cosine["total"].mean[1], (predicted / (slope.norm(dim=-1) * move.norm(dim=-1))).mean())


@pytest.mark.parametrize("at", ["iterate", "sphere"])
def test_a_formula_is_seen_where_the_terms_are(at: str) -> None:
    net, x = crate(), tokens()
    with torch.no_grad():
        net.get_parameter("W").add_(0.1)  # no longer the U that was given
    found = unroll.white_box(net, [x], at=at, terms={"gain": "R(Z) - sum(R(U[k].T @ Z) for k in K)"})
    for kind in ("values", "predicted", "actual"):
        table = getattr(found, kind)
        both = table["expansion"].mean + table["compression"].mean
        assert torch.allclose(table["gain"].mean, both, atol=1e-9) and float(both.abs().min()) > 1e-6


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawing(sign: int) -> ElementTree.Element:
    c = html.Course(
        "rate", sign, [0.0, 1.0, 0.5], [2.0, 0.25], [1.0, -0.75], [0.9, 0.1], [True, False], [(1, "a"), (1, "b")]
    )
    return ElementTree.fromstring(html.course(c))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_is_drawn_by_what_it_did_to_the_objective(sign: int) -> None:
    up, down = drawing(sign).findall("g")
    better, worse = (up, down) if sign < 0 else (down, up)
    for step, colour, dashed in ((better, html.IMPROVES, False), (worse, html.WORSENS, True)):
        line = step.find("line")
        assert line is not None and (line.get("stroke"), "stroke-dasharray" in line.attrib) == (colour, dashed)
    marks = [g.find("path") for g in (up, down)]
    assert marks[0] is not None and marks[1] is not None
    assert marks[0].get("fill") != "#fff" and marks[1].get("fill") == "#fff"  # the second step does not take the term
    tips = [float(m.get("d", "").split(",")[1].split()[0]) for m in marks if m is not None]
    lines = [g.find("line") for g in (up, down)]
    ends = [float(v.get("y2", "nan")) for v in lines if v is not None]
    assert tips[0] < ends[0] and tips[1] > ends[1]  # y grows downwards: the first points up, the second down
    assert "improved in 90 %" in (up.findtext("title") or "")


def test_bars_are_as_long_as_changes_and_lines_start_where_their_step_did() -> None:
    up, down = drawing(1).findall("g")
    heights = [float(r.get("height", "nan")) for g in (up, down) for r in g.findall("rect")]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 0.5, 0.125, 0.375], abs=0.01)
    assert [r.get("fill") == "none" for r in up.findall("rect")] == [True, False]
    first, second = (g.find("line") for g in (up, down))
    assert first is not None and second is not None
    assert second.get("y1") != first.get(
        "y2"
    )  # 0.5 + 0.75 is not 1: the second layer measures by parameters of its own
    scale = float(first.get("y1", "nan")) - float(first.get("y2", "nan"))
    assert (float(second.get("y2", "nan")) - float(second.get("y1", "nan"))) / scale == pytest.approx(0.75, abs=0.01)


def pixels(figure: str) -> Tensor:
    """The grey values of a picture of a page, from its bytes."""
    found = re.search(r"base64,([^\"]+)", figure)
    assert found is not None
    data = base64.b64decode(found[1])
    wide, tall = struct.unpack(">II", data[16:24])
    at, body = 8, b""
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, part = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + part)
        body += part if kind == b"IDAT" else b""
        at += 12 + size
    rows = torch.tensor(list(zlib.decompress(body))).reshape(tall, wide + 1)
    assert not rows[:, 0].any()  # no filter
    return rows[:, 1:]


def greys(weights: Tensor) -> Tensor:
    span = (weights - weights.min()) / (weights.max() - weights.min())
    return 255 - (255 * span.sqrt()).round().long()


@torch.no_grad()
def test_the_page_draws_the_softmax_of_each_head_and_what_the_class_token_takes() -> None:
    net = unroll.compile("crate_digits", overrides=["unroll.layers=2"], dtype=torch.float64)
    assert isinstance(net, unroll.Model)
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = page._attention(net.trace(image).maps, grid(net))
    figures = re.findall("<figure>.*?</figure>", text)
    assert len(figures) == 2 * 2 * 4 and "layers 1, 2 of 2" in text
    z = net.embedding(image)
    y = torch.nn.functional.layer_norm(z, (48,), eps=1e-5)
    v = torch.einsum("kdp,bnd->bknp", net.body.get_parameter("W")[0], y)
    weights = (v @ v.mT / 12**0.5).softmax(-1)[0]
    for k in range(4):
        assert int((pixels(figures[k]) - greys(weights[k])).abs().max()) <= 1
        assert int((pixels(figures[4 + k]) - greys(weights[k, 0, 1:].reshape(4, 4))).abs().max()) <= 1


def test_maps_are_cut_to_what_a_page_can_hold_and_say_so() -> None:
    net = unroll.compile("crate", dims={"d": 40, "K": 10, "p": 4}, overrides=["unroll.layers=6"])
    with torch.no_grad():
        found = net.trace(torch.randn(1, 100, 40)).maps
    text = page._attention(found, None)
    assert "layers 1, 3, 4, 6 of 6" in text and "first 8 heads" in text and "first 96 rows" in text
    figures = re.findall("<figure>.*?</figure>", text)
    assert len(figures) == 4 * 8 and pixels(figures[0]).shape == (96, 96)
    assert page._spread([1, 2], 4) == [1, 2] and page._attention((), None) == ""


def test_one_map_of_shares_is_drawn_where_two_softmaxes_give_the_same() -> None:
    net = unroll.compile("tost", dims={"d": 24, "K": 3, "p": 8}, overrides=["unroll.layers=2"])
    found = net.trace(tokens().float()[:1]).maps
    figures = re.findall("<figure>.*?</figure>", page._attention(found, None))
    assert len(found) == 4 and len(figures) == 2  # of columns and of rows, in each layer
    assert pixels(figures[0]).shape == (3, 5)


def test_a_page_says_what_cannot_be_measured(tmp_path) -> None:
    text = unroll.report("attention_only", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "error E409" in text and "not positive definite" in text and "<h2>Module</h2>" in text
    with pytest.raises(UnrollError, match="is a term of the objective"):
        unroll.report("ista", tmp_path / "other.html", terms={"sparsity": "1"})


def test_a_page_of_layers_that_diverge_is_drawn_as_far_as_they_are_finite(tmp_path) -> None:
    text = unroll.report(
        "hopfield", tmp_path / "page.html", overrides=["unroll.step=1e18", "unroll.layers=20"]
    ).read_text(encoding="utf-8")
    assert ": not finite</figcaption>" in text and "<h2>Module</h2>" in text
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', "".join(re.findall("<(?:line|path|rect|circle)[^>]*>", text)))


@pytest.mark.parametrize("spec", ["ista", "hopfield", "mcp_network"])
def test_a_page_of_one_layer_draws_every_term(spec, tmp_path) -> None:
    text = unroll.report(spec, tmp_path / "page.html", overrides=["unroll.layers=1"]).read_text(encoding="utf-8")
    drawings = [ElementTree.fromstring(d) for d in re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)]
    courses = [d for d in drawings if "over the steps" in (d.findtext("title") or "")]
    assert len(courses) == 3 and all(len(d.findall("g")) == 1 for d in courses)
