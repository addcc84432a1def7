"""Recipes of papers: each against its formula written out, or against the same training without it."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import unroll
from unroll.errors import SpecError, UnrollError
from unroll.model.module import Model
from unroll.network.recomputed import recomputed, recomputing
from unroll.spec import load
from unroll.spec.schema import Digits, Rates, Synthetic, Train
from unroll.train import losses, recipes, train
from unroll.train.data import make_data
from unroll.train.engine import fit
from unroll.train.groups import parameter_groups, record
from unroll.train.samples import Shapes, Split

torch.set_num_threads(1)


def test_lion_moves_by_signs_and_keeps_a_mean_of_slopes():
    p, g = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).double()), torch.randn(6, 3, generator=gen(0)).double()
    lion = recipes.Lion([{"params": [p], "lr": 0.1, "weight_decay": 0.3}], (0.8, 0.95))
    x, m = [1.0, -2.0, 0.5], [0.0] * 3
    for row in g:
        p.grad = row.clone()
        lion.step()
        for i, s in enumerate(row.tolist()):
            step = math.copysign(1, 0.8 * m[i] + 0.2 * s)
            x[i] -= 0.1 * (step + 0.3 * x[i])
            m[i] = 0.95 * m[i] + 0.05 * s
        assert torch.allclose(p, torch.tensor(x).double(), atol=1e-12)


def gen(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_betas_reach_the_optimiser_and_have_defaults(name):
    groups = lambda: [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1}]
    given = recipes.optimizer(groups(), Train(optimizer=name, betas=(0.5, 0.6)))
    assert given.param_groups[0]["betas"] == (0.5, 0.6)
    plain = recipes.optimizer(groups(), Train(optimizer=name)).param_groups[0]["betas"]
    assert plain == ((0.9, 0.99) if name == "lion" else (0.9, 0.999))


def test_weight_decay_goes_from_one_value_to_the_other():
    settings = Train(weight_decay=0.04, final_weight_decay=0.4)
    assert recipes.decay(settings, 0.0) == pytest.approx(0.04) and recipes.decay(settings, 1.0) == pytest.approx(0.4)
    assert recipes.decay(settings, 0.5) == pytest.approx(0.22)  # the middle of a cosine
    assert recipes.decay(Train(weight_decay=0.04), 0.7) == 0.04


DIGITS = """
name: small
use: crate
dims: {d: 12, K: 2, p: 4}
unroll: {layers: 1}
model:
  embed: {kind: patches, image: [1, 8, 8], patch: 4, norm: after}
  head: {kind: mean, classes: 10}
data: {source: digits, form: images}
train: {loss: cross_entropy, optimizer: lion, steps: 4, batch: 50, lr: 1e-3, keep: last}
"""


def test_a_step_has_the_weight_decay_of_its_share_of_the_training(tmp_path, monkeypatch):
    seen = []
    step = recipes.Lion.step

    def watched(self, closure=None):
        found = step(self, closure)  # what is set is set within it, after the slopes
        seen.append({g["kind"]: g["weight_decay"] for g in self.param_groups})
        return found

    monkeypatch.setattr(recipes.Lion, "step", watched)
    options = ["train.weight_decay=0.1", "train.final_weight_decay=0.5"]
    run = train(DIGITS, overrides=options, out=tmp_path / "run", quiet=True)
    cosine = [0.5 - 0.4 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [row["matrix"] for row in seen] == pytest.approx(cosine)
    assert all(row["vector"] == 0 for row in seen)
    kept = json.loads((run.folder / "run.json").read_text())["parameters"]
    assert kept["final_weight_decay"] == 0.5 and kept["decay"]


# --- steps in parts --------------------------------------------------------------------------------------------------

CASES = {
    "classes": ("cross_entropy", "crate_digits", ["unroll.layers=1"]),
    "smoothed": ("cross_entropy", "crate_digits", ["unroll.layers=1"]),
    "codes": ("mse", "lista", ["unroll.layers=2", "dims.m=6", "dims.n=8"]),
    "objective": ("objective", "lista", ["unroll.layers=2", "dims.m=6", "dims.n=8"]),
}


def ready(case):
    name, spec, overrides = CASES[case]
    net = unroll.compile(spec, overrides=overrides, dtype=torch.float64, seed=1)
    settings = Train(loss=name, label_smoothing=0.1 if case == "smoothed" else 0.0)
    if isinstance(net, Model):
        batch = make_data(Digits(source="digits", form="images"), Shapes({})).train[:11].to(torch.float64)
        batch.labels[2:5] = -1  # not as many count in each part
    else:
        shapes = Shapes({"x": (6,)}, {"z": (8,)}, {"A": (6, 8)})
        batch = make_data(Synthetic(source="synthetic", train=11, validation=2), shapes, dict(net.given)).train
    return net, settings, batch


@pytest.mark.parametrize("parts", [2, 3, 11, 20])
@pytest.mark.parametrize("case", CASES)
def test_a_step_in_parts_is_that_of_the_whole_batch(case, parts):
    net, settings, batch = ready(case)
    loss = losses.find_loss(settings.loss)
    weights = losses.layer_weights("last", net.layers)
    value = lambda part: losses.total(loss, net, part, weights, settings)
    whole = value(batch)
    slopes = torch.autograd.grad(whole, list(net.parameters()))
    found = recipes.in_parts(value, loss.weight, batch, parts, net.parameters())
    assert found.detach() == pytest.approx(whole.item(), rel=1e-12)
    found.backward()
    for p, g in zip(net.parameters(), slopes, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-13)
    assert max(float(g.abs().max()) for g in slopes) > 1e-4


def test_of_mixtures_each_part_counts_its_labels_in_shares():
    net, settings, batch = ready("classes")
    batch = Split(batch.inputs, labels=batch.labels, mixed=(batch.labels.flip(0), torch.linspace(0, 1, 11).double()))
    loss, weights = losses.find_loss("cross_entropy"), losses.layer_weights("last", net.layers)
    value = lambda part: losses.total(loss, net, part, weights, settings)
    found = recipes.in_parts(value, loss.weight, batch, 4, net.parameters())
    assert found.item() == pytest.approx(value(batch).item(), rel=1e-12)


def test_batches_that_make_a_step_are_one_that_is_as_large(tmp_path):
    """Three steps of 4 x 25 samples and of 100: the same samples in the same order, and the same weights up to rounding."""
    weights = []
    for batch, accumulate in ((100, 1), (25, 4)):
        options = [
            f"train.batch={batch}",
            f"train.accumulate={accumulate}",
            "train.precision=float64",
            "train.optimizer=sgd",
        ]
        run = train(DIGITS, overrides=options, out=tmp_path / str(batch), quiet=True)
        weights.append(dict(run.net.named_parameters()))
        assert run.steps == 4
    start = dict(unroll.compile(DIGITS, dtype=torch.float64).named_parameters())
    for name, p in weights[0].items():
        assert torch.allclose(p, weights[1][name], rtol=0, atol=1e-9), name
    assert any((p - start[name]).abs().max() > 1e-5 for name, p in weights[0].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("optimizer: sgd, betas: [0.9, 0.9]", "betas: optimizer: sgd has none"),
        ("optimizer: lion, momentum: 0.5", "momentum: optimizer: lion has no momentum"),
        ("search: {grid: {c: [0.1]}}, accumulate: 2", "accumulate: search: sets what it names"),
        ("search: {grid: {c: [0.1]}}, betas: [0.9, 0.9]", "betas: search: sets what it names"),
        ("search: {grid: {c: [0.1]}}, final_weight_decay: 0.1", "final_weight_decay: search: sets"),
    ],
)
def test_what_nothing_would_read_is_refused_with_its_place(settings, message):
    with pytest.raises(SpecError, match=message) as caught:
        load(f"use: lasso\ndims: {{m: 6, n: 8}}\ntrain: {{{settings}}}")
    assert caught.value.code == "E511" and caught.value.where is not None


def test_a_ratio_of_sums_is_no_sum_of_parts(tmp_path):
    net = unroll.compile("lista", overrides=["unroll.layers=1", "dims.m=6", "dims.n=8"])
    shapes = Shapes({"x": (6,)}, {"z": (8,)}, {"A": (6, 8)})
    data = make_data(Synthetic(source="synthetic", train=11, validation=2), shapes, dict(net.given))
    with pytest.raises(SpecError, match="loss: nmse is no mean over samples") as caught:
        fit(net, data, Train(loss="nmse", steps=1, accumulate=2), tmp_path)
    assert caught.value.code == "E511"


def test_batch_norms_see_a_whole_batch():
    net, loss = nn.Sequential(nn.BatchNorm2d(3)), losses.find_loss("cross_entropy")
    recipes.check(net, loss, Train(loss="cross_entropy"))
    with pytest.raises(SpecError, match="batch norms, which would see a part"):
        recipes.check(net, loss, Train(loss="cross_entropy", accumulate=2))


def test_what_decays_only_at_the_end_is_listed():
    net = unroll.compile("crate_digits", overrides=["unroll.layers=1"])
    settings = Train(loss="cross_entropy", final_weight_decay=0.1, lr=Rates())
    assert record(net, settings)["decay"] and not record(net, Train(loss="cross_entropy"))["decay"]
    assert all("kind" in group for group in parameter_groups(net, settings))


# --- layers that keep nothing, and compiled ones ---------------------------------------------------------------------

NETWORKS = ["crate_digits", "lista", "fista", "tost_text", "crate_mae_digits", "lista_cpss", "lrpca", "condat_vu_step"]


def answer(net, inputs):
    torch.manual_seed(0)  # which patches are hidden
    found = net(*inputs)
    found = list(found.values()) if isinstance(found, dict) else found if isinstance(found, tuple | list) else [found]
    total = sum((v.double() ** 2).sum() for v in found if v.is_floating_point())
    own = [p for p in net.parameters() if p.requires_grad]
    return total, torch.autograd.grad(total, own, allow_unused=True) if own else ()


def inputs_of(net):
    if isinstance(net, Model):
        kind = net.wrapped.model.embed
        if kind.kind == "tokens":
            return [torch.randint(kind.vocabulary, (3, 7), generator=gen(0))]
        return [torch.rand(3, *kind.image, generator=gen(0), dtype=torch.float64)]
    sizes = [net.program.tensor_sizes(s) for s in net.program.problem.symbols.values() if s.role == "input"]
    return [
        torch.randn(3, *(5 if n is None else n for n in size), generator=gen(0), dtype=torch.float64) for size in sizes
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_that_keep_nothing_give_the_same_to_the_bit(name):
    net = unroll.compile(name, overrides=["unroll.layers=3"], dtype=torch.float64, seed=0)
    inputs, kind = inputs_of(net), type(net)
    value, slopes = answer(net, inputs)
    with recomputing(net):
        calls = []
        monkey = torch.utils.checkpoint.checkpoint
        torch.utils.checkpoint.checkpoint = lambda *a, **k: (calls.append(1), monkey(*a, **k))[1]
        try:
            again, others = answer(net, inputs)
        finally:
            torch.utils.checkpoint.checkpoint = monkey
        with torch.no_grad():
            net(*inputs)
    assert len(calls) >= 3 and torch.equal(value, again) and type(net) is kind
    for a, b in zip(slopes, others, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_what_is_kept_between_layers_alone_is_less():
    net = unroll.compile("crate_digits", overrides=["unroll.layers=6"], seed=0)
    x, held = torch.rand(20, 1, 8, 8), []
    for context in (nullcontext(), recomputing(net)):
        kept = {}
        pack = lambda t, kept=kept: kept.__setitem__(t.data_ptr(), t.numel()) or t
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x).sum()
        held.append(sum(kept.values()))
    assert held[1] < held[0] / 4


def test_a_text_that_cannot_be_split_is_refused():
    text = "class A:\n    def forward(self, x, *, trace=None):\n        {}\n        return x\n"
    with pytest.raises(UnrollError, match="0 loops over layers"):
        recomputed(text.format("x = 2 * x"), "A")
    with pytest.raises(UnrollError, match="cannot be split"):
        recomputed(text.format("for k in range(3): return x"), "A")
    with pytest.raises(UnrollError, match="nothing of its layers"), recomputing(nn.Linear(1, 1)):
        pass


def test_a_training_whose_layers_keep_nothing_ends_as_without(tmp_path):
    options = ["train.precision=float64", "train.steps=3", "train.batch=300"]
    one = train(DIGITS, overrides=options, out=tmp_path / "one", quiet=True)
    two = train(DIGITS, overrides=[*options, "train.checkpoint=true"], out=tmp_path / "two", quiet=True)
    for (name, a), b in zip(one.net.named_parameters(), two.net.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_calls_are_compiled_within_a_training_and_not_after_it(monkeypatch):
    calls, plain = [], nn.Module.compile
    backend = lambda graph, inputs: calls.append(graph) or graph.forward  # what comes after it is torch's
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend=backend, fullgraph=True))
    net, x = unroll.compile(DIGITS, seed=0), torch.rand(4, 1, 8, 8)
    names, value = set(net.state_dict()), net(x)
    for settings in (Train(compile=True), Train(compile=True, checkpoint=True)):
        calls.clear()
        with recipes.prepared(net, settings):
            assert torch.allclose(net(x), value, atol=1e-6) and calls and set(net.state_dict()) == names
        calls.clear()
        net(torch.rand(5, 1, 8, 8))
        assert not calls


@pytest.mark.parametrize("setting", ["checkpoint", "compile"])
def test_what_every_layer_says_is_not_worked_out_in_a_call(setting):
    for more in ({"layer_weights": "uniform"}, {"stages": "layerwise"}):
        with pytest.raises(SpecError, match=f"{setting}: what each layer says") as caught:
            recipes.check(nn.Linear(1, 1), losses.find_loss("mse"), Train(loss="mse", **{setting: True}, **more))
        assert caught.value.code == "E511"


def test_products_in_bfloat16_leave_weights_in_float32(tmp_path):
    seen = []
    forward = nn.functional.linear
    options = ["train.precision=bfloat16", "train.steps=30", "train.optimizer=adam", "train.lr=1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *a: (seen.append(found := forward(*a)), found)[1])
        run = train(DIGITS, overrides=options, out=tmp_path / "run", quiet=True)
    assert any(v.dtype == torch.bfloat16 for v in seen)
    assert all(p.dtype == torch.float32 for p in run.net.parameters())
    frequent, _, trained = (row.to_dict()["nats"] for row in run.table)
    assert trained < frequent
