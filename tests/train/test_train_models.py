"""Training of models: classes, characters, hidden patches. The models here are tiny, with the interface of a model."""

import csv
import hashlib
import itertools
import json
import math
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import unroll
from unroll.errors import SpecError
from unroll.spec import load
from unroll.spec.schema import Augment, Characters, Digits, Rates, Train
from unroll.train import Interrupted, evaluate, labels, losses, masked, resume, run, train
from unroll.train.augment import flipped, shifted
from unroll.train.data import make_data
from unroll.train.engine import Average, Batches, fit, rate, read_rows
from unroll.train.engine import Stage as Span
from unroll.train.groups import by_kind, parameter_groups, record
from unroll.train.pictures import change_of
from unroll.train.samples import Data, Shapes, Split, Windows
from unroll.train.tasks import TASKS, find_task

torch.set_num_threads(1)
NONE = Shapes({})


class Model(nn.Module):
    """What every model here has: inputs, depth, kinds of its parameters, iterates."""

    inputs, layers, given = ("image",), 2, {}

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.calls, self.interrupt_at = 0, None

    @property
    def learned(self):
        kinds = {"step": "scalar"}  # the others stand around the layers: nothing is derived of them
        return tuple(SimpleNamespace(kind=kinds.get(name)) for name, _ in self.named_parameters())

    def count(self):
        if self.training:
            self.calls += 1
            if self.calls == self.interrupt_at:
                signal.raise_signal(signal.SIGINT)

    def trace(self, *args):
        return SimpleNamespace(iterates={"Z": list(self.steps(*args))})


class Classifier(Model):
    """Two residual layers on the pixels of an image, and a head."""

    def __init__(self, classes=10, pixels=64, dropout=0.0, seed=0):
        super().__init__(seed)
        self.embedding = nn.Linear(pixels, 16)
        self.position = nn.Parameter(0.1 * torch.randn(2, 16))
        self.W = nn.Parameter(0.1 * torch.randn(2, 16, 16))
        self.step = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, classes)

    def steps(self, image):
        z = self.embedding(image.flatten(1))
        yield z
        for W, position, step in zip(self.W, self.position, self.step, strict=True):
            z = z + step * self.dropout(torch.tanh(z @ W.mT + position))
            yield z

    def forward(self, image):
        self.count()
        *_, z = self.steps(image)
        return self.head(self.norm(z))


class Language(Model):
    """The next character from the last two: causal."""

    inputs = ("tokens",)

    def __init__(self, vocabulary, seed=0):
        super().__init__(seed)
        self.embedding = nn.Embedding(vocabulary, 16)
        self.before = nn.Linear(16, 16)
        self.head = nn.Linear(16, vocabulary)

    def steps(self, tokens):
        z = self.embedding(tokens)
        yield z
        z = z + self.before(nn.functional.pad(z, (0, 0, 1, 0))[:, :-1])
        yield z
        yield torch.tanh(z)

    def forward(self, tokens):
        self.count()
        *_, z = self.steps(tokens)
        return self.head(z)


class Autoencoder(Model):
    """Hides half of the sixteen 2 x 2 patches of an image, sums up the others, predicts all."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.encode, self.dropout, self.decode = nn.Linear(64, 32), nn.Dropout(0.1), nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(64)  # its statistics move in training alone

    def patches(self, image):
        return image.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3).flatten(3).squeeze(1)

    def steps(self, image, mask=None):
        yield torch.tanh(self.encode(image.flatten(1)))

    def forward(self, image, mask=None):
        self.count()
        patches = self.patches(image)
        if mask is None and self.training:
            mask = torch.rand(patches.shape[:2]).argsort(1) < 8
        elif mask is None:
            mask = torch.zeros(patches.shape[:2], dtype=torch.bool)
        seen = (patches * ~mask[:, :, None]).flatten(1)
        return self.decode(self.dropout(torch.tanh(self.encode(self.norm(seen))))).unflatten(1, (16, 4)), mask


def digest(net):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()


def digits(**changes):
    return make_data(Digits(source="digits", form="images", **changes), NONE)


def text(**changes):
    settings = {"text": "python documentation", "characters": 8000, "length": 16, **changes}
    return make_data(Characters(source="text", **settings), NONE)


TEXT = text()
CASES = {
    "classes": (lambda: Classifier(dropout=0.2), lambda: digits(augment=Augment(shift=1, flip=True)), "cross_entropy"),
    "characters": (lambda: Language(TEXT.sizes["vocabulary"]), lambda: TEXT, "cross_entropy"),
    "hidden patches": (Autoencoder, digits, "masked_mse"),
}
every_case = pytest.mark.parametrize("case", CASES)


def settings(loss="cross_entropy", **changes):
    options = {"loss": loss, "steps": 20, "batch": 64, "validate_every": 7, "keep": "last", "lr": 3e-3, "clip": 1.0}
    return Train(**{**options, **changes})


def without_time(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(path / "metrics.csv")]


# --- resume ----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("stop", [1, 7, 12])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_interrupted_training_of_a_model_resumes_bit_for_bit(tmp_path, case, stop, ema):
    make, data, loss = CASES[case]
    options = settings(loss, ema=ema, optimizer="adamw", weight_decay=0.1, warmup=3)
    whole, first, again = make(), make(), make()
    done = fit(whole, data(), options, tmp_path / "whole")
    assert (done.status, done.steps) == ("done", 20)

    first.interrupt_at = stop + 1  # one call looks at the answer before the first step
    if case == "hidden patches" and stop >= 7:
        first.interrupt_at = stop + 1 + 5 * (stop // 7)  # and each measurement draws its masks in training mode
    cut = fit(first, data(), options, tmp_path / "cut")
    assert cut.status == "interrupted" and cut.steps < 20
    assert digest(first) != digest(whole)

    torch.manual_seed(12345)
    rest = fit(again, data(), options, tmp_path / "cut", resume=True)
    assert (rest.status, rest.steps) == ("done", 20)
    assert digest(again) == digest(whole)
    assert without_time(tmp_path / "whole") == without_time(tmp_path / "cut")


@every_case
def test_measuring_does_not_move_the_training(tmp_path, case):
    make, data, loss = CASES[case]
    often, seldom = make(), make()
    fit(often, data(), settings(loss, validate_every=1), tmp_path / "often")
    fit(seldom, data(), settings(loss, validate_every=20), tmp_path / "seldom")
    assert digest(often) == digest(seldom)
    assert read_rows(tmp_path / "often" / "metrics.csv")[-1]["held_out"] == pytest.approx(
        read_rows(tmp_path / "seldom" / "metrics.csv")[-1]["held_out"], rel=1e-12
    )


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_is_no_longer_than_its_clip(tmp_path, clip):
    net = Classifier()
    before = [p.detach().clone() for p in net.parameters()]
    options = {"optimizer": "sgd", "lr": Rates(matrices=1.0, scalars=1.0), "steps": 1, "schedule": "constant"}
    fit(net, digits(), settings(**options, clip=clip), tmp_path)
    moved = math.hypot(*(float((p.detach() - b).norm()) for p, b in zip(net.parameters(), before, strict=True)))
    assert moved > 0.01 if clip is None else moved == pytest.approx(clip, rel=1e-2)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_cross_entropy_is_that_of_the_smoothed_labels_by_hand(smoothing, shape):
    draw = np.random.default_rng(0)
    logits, label = draw.standard_normal((*shape, 4)), draw.integers(4, size=shape)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = (1 - smoothing) * np.eye(4)[label] + smoothing / 4
    by_hand = -(q * np.log(p)).sum(-1).mean()
    loss, batch = losses.find_loss("cross_entropy"), Split({}, labels=torch.from_numpy(label))
    value = loss.value(None, batch, torch.from_numpy(logits), settings(label_smoothing=smoothing))
    assert value.item() == pytest.approx(by_hand, rel=1e-12)
    own = nn.CrossEntropyLoss(label_smoothing=smoothing)
    assert value.item() == pytest.approx(own(torch.from_numpy(logits).movedim(-1, 1), batch.labels).item(), rel=1e-12)


def test_masked_mse_counts_hidden_patches_alone():
    net, image = Autoencoder(), torch.rand(3, 1, 8, 8)
    patches, mask = net.patches(image), torch.zeros(3, 16, dtype=torch.bool)
    assert torch.equal(patches[1, 5], image[1, 0, 2:4, 2:4].flatten())
    mask[0, 3], mask[2, 7] = True, True
    predicted = patches + 100.0
    predicted[0, 3], predicted[2, 7] = patches[0, 3] + torch.tensor([1.0, 0, 0, 0]), patches[2, 7] - 2
    value = losses.find_loss("masked_mse").value(net, Split({"image": image}), (predicted, mask), settings())
    assert value.item() == pytest.approx((1 / 4 + 4) / 2, rel=1e-5)


def test_measures_of_labels_equal_plain_loops_over_all_samples():
    net, held = Classifier().double(), digits().validation
    with torch.no_grad():
        logits = net.eval()(held.inputs["image"]).numpy()
    nats = hits = 0.0
    for row, label in zip(logits, held.labels.tolist(), strict=True):
        nats += math.log(sum(math.exp(v) for v in row)) - row[label]
        hits += max(range(10), key=lambda k, row=row: row[k]) == label
    found = labels.held_out(net, held, settings(batch=50, label_smoothing=0.3))  # smoothing is not measured
    assert found["nats"] == found["held_out"] == pytest.approx(nats / 297, rel=1e-12)
    assert found["accuracy"] == hits / 297 and found["bits"] == pytest.approx(nats / 297 / math.log(2), rel=1e-12)


def test_masks_of_a_measurement_are_those_of_training_and_always_the_same():
    net, held = Autoencoder().double(), digits().validation
    one, two = [], []
    for seed, found in enumerate((one, two)):  # whatever the global random numbers are
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found += [mask for _, mask in masked.masks(net, held, settings(batch=100))]
        assert torch.equal(before, torch.get_rng_state()) and net.training
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and [len(m) for m in one] == [100, 100, 97]
    assert not torch.equal(one[0][:97], one[2]) and all((m.sum(1) == 8).all() for m in one)
    with torch.no_grad():
        net.eval()  # a measurement has no dropout
        parts = [
            (net(b, mask=m)[0] - net.patches(b)).square().mean(-1)[m]
            for b, m in zip(held.inputs["image"].split(100), one, strict=True)
        ]
        value = masked.held_out(net.train(), held, settings(batch=100))["masked_mse"]
    assert value == pytest.approx(torch.cat(parts).mean().item(), rel=1e-12)


def test_losses_of_answers_are_float32_under_bfloat16(tmp_path):
    net, batch = Classifier(), digits().validation.to(torch.float32)
    loss, weights = losses.find_loss("cross_entropy"), losses.layer_weights("last", 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = losses.total(loss, net, batch, weights, settings())
    high = losses.total(loss, net, batch, weights, settings())
    assert low.dtype == torch.float32 and 0 < abs(low - high).item() < 0.01
    fit(net, digits(), settings(precision="bfloat16"), tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    assert rows[-1]["held_out"] < rows[0]["held_out"]


# --- what needs no network -------------------------------------------------------------------------------------------


def test_the_most_frequent_class_and_its_nats_equal_a_counter():
    data = digits()
    (row,) = labels.classes(None, data, settings())
    counts, held = Counter(data.train.labels.tolist()), data.validation.labels.tolist()
    best = max(counts, key=lambda k: (counts[k], -k))
    assert row.values["accuracy"] == sum(y == best for y in held) / 297
    nats = -sum(math.log((counts[y] + 1) / (1500 + 10)) for y in held) / 297
    assert row.values["nats"] == pytest.approx(nats, rel=1e-12)


def test_unigram_and_bigram_entropies_equal_a_counter_over_the_text():
    from pydoc_data.topics import topics

    whole = "\n".join(topics[k] for k in sorted(topics))[:8000]
    start, end = whole[:7200], whole[7200:]
    known = {*start, "\ufffd"}
    end = [c if c in known else "\ufffd" for c in end]
    pairs = [(end[i], end[i + 1]) for i in range((len(end) - 1) // 16 * 16)]
    size = 1 + max(sorted(known - {"\ufffd"}).index(c) + 1 for c in start)
    one, two, before = Counter(start[1:]), Counter(itertools.pairwise(start)), Counter(start[:-1])

    def unigram(c):
        return (one[c] + 1) / (len(start) - 1 + size)

    def bigram(a, b):
        return (two[a, b] + unigram(b)) / (before[a] + 1)

    rows = labels.characters(None, TEXT, settings())
    assert [row.name for row in rows] == ["unigram", "bigram"]
    nats = [-sum(math.log(unigram(b)) for _, b in pairs), -sum(math.log(bigram(a, b)) for a, b in pairs)]
    for row, value in zip(rows, nats, strict=True):
        assert row.values["nats"] == pytest.approx(value / len(pairs), rel=1e-12)
        assert row.values["bits"] == pytest.approx(value / len(pairs) / math.log(2), rel=1e-12)
    assert rows[1].values["nats"] < rows[0].values["nats"]


def test_distributions_of_the_counts_sum_to_one():
    tokens = torch.randint(5, (2, 400), generator=torch.Generator().manual_seed(0))
    p = labels.frequencies(tokens[1], 7)
    pair = labels.pairs(tokens[0], tokens[1], p)
    assert p.sum().item() == pytest.approx(1) and torch.allclose(pair.sum(1), torch.ones(7, dtype=torch.float64))
    assert p.min() > 0 and pair.min() > 0 and torch.equal(pair[6], p)  # a token that was never seen


def test_mean_patches_are_the_best_constants_in_training():
    net, data = Autoencoder().double(), digits()
    rows = {row.name: row.values["masked_mse"] for row in masked.mean_patches(net, data, settings())}
    assert list(rows) == ["mean patch", "mean patch of the same place"]
    train = net.patches(data.train.inputs["image"]).numpy()
    held, mask = net.patches(data.validation.inputs["image"]).numpy(), []
    mask = np.concatenate([m.numpy() for _, m in masked.masks(net, data.validation, settings())])
    for name, mean in (("mean patch", train.mean((0, 1))), ("mean patch of the same place", train.mean(0))):
        assert rows[name] == pytest.approx(((held - mean) ** 2).mean(-1)[mask].mean(), rel=1e-10)
    assert rows["mean patch of the same place"] < rows["mean patch"]


# --- weights: decay, average, rates ----------------------------------------------------------------------------------


def test_matrices_alone_decay_and_run_json_says_which():
    net = Classifier()
    names = {kind: [name for name, _ in named] for kind, named in by_kind(net).items()}
    assert names == {
        "matrix": ["W", "embedding.weight", "head.weight"],
        "vector": ["position", "embedding.bias", "norm.weight", "norm.bias", "head.bias"],
        "scalar": ["step"],
    }
    options = settings(weight_decay=0.1, lr=Rates(matrices=0.1, scalars=0.2))
    groups = {g["kind"]: (g["lr"], g["weight_decay"]) for g in parameter_groups(net, options)}
    assert groups == {"matrix": (0.1, 0.1), "vector": (0.1, 0.0), "scalar": (0.2, 0.0)}
    assert record(net, options)["decay"] == names["matrix"] and record(net, settings())["decay"] == []


def test_scalars_are_found_in_the_layers_within_a_model():
    import unroll

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.token_norm, self.positions = (
                nn.Embedding(5, 8),
                nn.LayerNorm(8),
                nn.Parameter(torch.zeros(4, 8)),
            )
            self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.body = unroll.compile("lista", dims={"m": 8, "n": 16}, seed=0)

    names = {kind: [name for name, _ in named] for kind, named in by_kind(Around()).items()}
    assert names == {
        "matrix": ["embed.weight", "body.W1", "body.W2"],
        "vector": ["positions", "class_token", "token_norm.weight", "token_norm.bias"],
        "scalar": ["body.theta"],
    }


def test_a_step_without_gradient_shrinks_matrices_and_nothing_else(tmp_path):
    net = Classifier()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.register_hook(torch.zeros_like)
    fit(net, digits(), settings(steps=1, optimizer="adamw", weight_decay=0.5, lr=0.1, schedule="constant"), tmp_path)
    for name, p in net.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("W", "embedding.weight", "head.weight") else 1
        assert torch.allclose(p, factor * start[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_closed_form_of_all_steps(decay):
    net, average, seen = nn.Linear(3, 2).double(), Average(decay), []
    for t in range(1, 8):
        with torch.no_grad():
            for p in net.parameters():
                p.normal_(generator=torch.Generator().manual_seed(t))
        seen.append([p.detach().numpy().copy() for p in net.parameters()])
        average.on_train_batch_end(SimpleNamespace(global_step=t), SimpleNamespace(net=net), None, None, 0)
    weights = np.array([decay ** (7 - k) for k in range(1, 8)])
    own = [p.detach().clone() for p in net.parameters()]
    with average.shown(net):
        for i, p in enumerate(net.parameters()):
            mean = sum(w * row[i] for w, row in zip(weights, seen, strict=True)) / weights.sum()
            assert np.allclose(p.detach().numpy(), mean, rtol=1e-10, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), own, strict=True))


@pytest.mark.parametrize("keep", ["best", "last"])
def test_averaged_weights_are_measured_and_kept(tmp_path, keep):
    plain, mean = Classifier(), Classifier()
    data = digits()
    fit(plain, data, settings(keep=keep), tmp_path / "plain")
    fit(mean, data, settings(keep=keep, ema=0.8), tmp_path / "mean")
    rows = [read_rows(tmp_path / name / "metrics.csv") for name in ("plain", "mean")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == theirs["loss"] and ours["held_out"] != theirs["held_out"]  # the same training
    value = labels.held_out(mean.eval(), data.validation.to(torch.float32), settings())["nats"]
    shown = [row["held_out"] for row in rows[1]]
    assert value == pytest.approx(shown[-1] if keep == "last" else min(shown), rel=1e-6)


def test_the_cosine_ends_at_the_share_that_is_asked_for():
    stage = Span(2, 0, 100, True)
    factors = [rate(settings(warmup=10, final_lr=0.1), stage, k, k / 100) for k in range(101)]
    assert factors[100] == pytest.approx(0.1) and factors[50] == pytest.approx(0.55) and factors[0] < 0.1 + 1e-9
    assert max(factors) <= 1


# --- batches ---------------------------------------------------------------------------------------------------------


def stand(step):
    progress = SimpleNamespace(current=SimpleNamespace(ready=step))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loop, global_rank=0, world_size=1)


def test_an_epoch_of_windows_reads_the_text_once_and_labels_are_the_next_tokens():
    codes = torch.arange(100)
    windows, draw = Windows("tokens", codes, 8), torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(40):
        order = windows.order(draw)
        batch = windows[order]
        tokens, label = batch.inputs["tokens"], batch.labels
        assert torch.equal(label, tokens + 1) and label.max() < 100
        assert len(set(tokens.flatten().tolist())) == tokens.numel() == 8 * len(windows) == 88
        starts.add(int(order.min()))
    assert starts == set(range(8))


@pytest.mark.parametrize("start", [0, 3, 9])
def test_a_batch_is_a_function_of_seed_and_step(start):
    for data in (TEXT, digits(augment=Augment(shift=2, flip=True))):
        whole = list(Batches(data.train, data.change, 100, 5, 12, stand(0)))
        torch.manual_seed(99)
        again = list(Batches(data.train, data.change, 100, 5, 12, stand(start)))
        other = list(Batches(data.train, data.change, 100, 6, 12, stand(start)))
        (name,) = whole[0].inputs
        assert len(again) == 12 - start
        for a, b, c in zip(whole[start:], again, other, strict=True):
            assert torch.equal(a.inputs[name], b.inputs[name]) and torch.equal(a.labels, b.labels)
            assert not torch.equal(a.inputs[name], c.inputs[name])


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own():
    """Two epochs of 5 batches, from any step on."""
    samples = Split({"x": torch.arange(20.0)[:, None]})
    orders = [
        torch.cat([b.inputs["x"][:, 0] for b in Batches(samples, None, 4, seed, 10, stand(0))]).reshape(2, 20)
        for seed in (0, 7)
    ]
    for epochs in orders:
        assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
        assert not torch.equal(*epochs)
    assert not torch.equal(*orders)


def test_every_step_changes_images_anew():
    same = Split({"image": torch.rand(1, 1, 8, 8).expand(40, 1, 8, 8)}, labels=torch.zeros(40).long())
    batches = [b.inputs["image"] for b in Batches(same, change_of(Augment(shift=3), "image", 1), 20, 0, 4, stand(0))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_the_folder_of_a_model_names_the_text_that_was_chosen(tmp_path):
    spec = load("crate_digits").to_dict()
    block = spec["unroll"]["blocks"][1]
    for key in ("step", "learn"):
        del block[key]
    spec["unroll"] |= {"layers": 1, "blocks": [spec["unroll"]["blocks"][0], {**block, "algorithm": "auto"}]}
    train({**spec, "train": {"loss": "cross_entropy", "epochs": 1, "batch": 800}}, out=tmp_path / "run", quiet=True)
    kept = load(str(tmp_path / "run" / "spec.yaml")).unroll.blocks[1].algorithm
    assert kept == "proximal_gradient"
    assert resume(tmp_path / "run", overrides=["train.epochs=2"], quiet=True).status == "done"


def test_noise_has_the_ratio_of_its_step_and_nothing_is_added_to_zeros():
    x = torch.randn(64, 3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[5] = 0
    noise, steps = {"x": (40.0, 10.0)}, 4
    batches = list(Batches(Split({"x": x, "b": x}), None, 64, 3, steps, stand(0), noise))
    for step, batch in enumerate(batches):
        clean = batch.inputs["b"]  # the same samples in the same order, without noise
        size, off = (v.flatten(1).norm(dim=1) for v in (clean, batch.inputs["x"] - clean))
        blank = size == 0
        assert blank.sum() == 1 and (off[blank] == 0).all()
        ratio = 20 * (size / off)[~blank].log10()
        assert abs(ratio.mean() - (40 - 30 * step / 3)) < 0.3 and ratio.std() < 1
    (first, *_), (again, *_) = (list(Batches(Split({"x": x}), None, 64, 3, steps, stand(k), noise)) for k in (2, 2))
    assert torch.equal(first.inputs["x"], again.inputs["x"]) and torch.equal(first.inputs["x"], batches[2].inputs["x"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"noise": {"imag": (30.0, 20.0)}}, "'imag' is no input of numbers(.|\n)*did you mean 'image'"),
        ({"noise": {"image": (30.0, 20.0)}, "minutes": 0.1}, "needs epochs: or steps:"),
    ],
)
def test_noise_that_cannot_be_is_refused(settings, says, tmp_path):
    net = unroll.compile("crate_digits", overrides=["unroll.layers=1"])
    with pytest.raises(SpecError, match=says) as refused:
        fit(net, digits(), Train(loss="cross_entropy", **settings), tmp_path)
    assert refused.value.code == "E511"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one(ranks):
    data = digits(augment=Augment(shift=2, flip=True))
    (one,) = Batches(data.train, data.change, 60, 0, 1, stand(0))
    trainers = [stand(0) for _ in range(ranks)]
    for rank, trainer in enumerate(trainers):
        trainer.global_rank, trainer.world_size = rank, ranks
        (part,) = Batches(data.train, data.change, 60, 0, 1, trainer)
        assert torch.equal(part.inputs["image"], one.inputs["image"][rank::ranks])
        assert torch.equal(part.labels, one.labels[rank::ranks])


def test_shifts_move_an_image_and_fill_with_zeros():
    image = torch.arange(1.0, 33).reshape(2, 1, 4, 4).repeat(200, 1, 1, 1)
    moved = shifted(image, 2, torch.Generator().manual_seed(0))
    found = Counter()
    for before, after in zip(image[:, 0].numpy(), moved[:, 0].numpy(), strict=True):
        padded = np.pad(before, 2)
        fits = [(i, j) for i in range(5) for j in range(5) if (padded[i : i + 4, j : j + 4] == after).all()]
        assert len(fits) == 1
        found[fits[0]] += 1
    assert len(found) == 25 and max(found.values()) < 40


def test_every_second_image_is_flipped():
    image = torch.rand(400, 3, 4, 4)
    turned = flipped(image, torch.Generator().manual_seed(0))
    same, mirror = ((turned == other).flatten(1).all(1) for other in (image, image.flip(-1)))
    assert (same ^ mirror).all() and 160 < same.sum() < 240


def test_held_out_images_are_not_changed():
    plain, changed = digits(), digits(augment=Augment(shift=2))
    assert torch.equal(plain.validation.inputs["image"], changed.validation.inputs["image"])


# --- the whole way ---------------------------------------------------------------------------------------------------

SPEC = """
name: tiny
use: lasso
dims: {m: 8, n: 16}
unroll: {algorithm: proximal_gradient, layers: 2}
"""
SECTIONS = {
    "classes": """
data: {source: digits, form: images, augment: {shift: 1}}
train: {loss: cross_entropy, label_smoothing: 0.1, steps: 120, batch: 64, lr: 1e-2, weight_decay: 0.01, ema: 0.9}
""",
    "characters": """
data: {source: text, text: python documentation, characters: 60000, length: 32}
train: {loss: cross_entropy, steps: 300, batch: 32, lr: 1e-2, validate_every: 50}
""",
    "hidden patches": """
data: {source: digits, form: images}
train: {loss: masked_mse, steps: 600, batch: 64, lr: 3e-3, validate_every: 100}
""",
}


def net_of(case, data):
    return Language(data.sizes["vocabulary"]) if case == "characters" else CASES[case][0]()


@pytest.fixture
def models(monkeypatch):
    """Specs compile to the tiny models; each is remembered, and may be told to be interrupted."""
    made, plan = [], SimpleNamespace(case=None, interrupt_at=None)

    def build(job, data, spec):
        net = net_of(plan.case, data)
        net.interrupt_at = plan.interrupt_at
        made.append(net)
        return net

    monkeypatch.setattr(run, "build", build)
    return plan


@every_case
def test_a_model_is_trained_measured_and_measured_again(tmp_path, models, case):
    models.case = case
    found = train(SPEC + SECTIONS[case], out=tmp_path / "run", quiet=True)
    *trivial, untrained, trained = found.table
    key = found.closing.columns[0].key
    value = {row.name: row.to_dict()[key] for row in found.table}
    assert value[trained.name] < min(v for name, v in value.items() if name != trained.name)
    assert untrained.name == "untrained" and trivial and all(row.to_dict()["micros"] is None for row in trivial)
    assert "NMSE" not in str(found) and found.closing.columns[0].head in str(found)
    with (found.folder / "metrics.csv").open() as file:
        head = next(csv.reader(file))
    own = [c.key for c in next(t for t in TASKS if t.name == case).columns]
    assert head == ["step", "epoch", "seconds", "lr", "depth", "loss", "held_out", *own]
    assert (found.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(found.folder.glob("optimum*"))
    started = json.loads((found.folder / "run.json").read_text())
    assert "a matrix decays" in started["parameters"]["rule"] and started["parameters"]["kinds"]["matrix"]

    again = evaluate(found.folder, quiet=True)
    rows = [[{**r.to_dict(), "micros": 0} for r in each.table] for each in (found, again)]
    assert rows[0] == rows[1]


@every_case
def test_ctrl_c_and_resume_of_a_model_end_with_the_same_weights(tmp_path, models, case):
    from safetensors.torch import load_file

    models.case = case
    spec = SPEC + SECTIONS[case]
    options = ["train.steps=20", "train.validate_every=50"]
    train(spec, overrides=options, out=tmp_path / "whole", quiet=True)
    models.interrupt_at = 9
    with pytest.raises(Interrupted):
        train(spec, overrides=options, out=tmp_path / "cut", quiet=True)
    models.interrupt_at = None
    resume(tmp_path / "cut", quiet=True)
    whole, cut = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


def test_the_command_line_trains_goes_on_with_and_measures_a_model(tmp_path):
    """A model of the library as small as it goes, from the first step to the page of its layers."""
    from click.testing import CliRunner

    from unroll.cli import cli

    folder, call = str(tmp_path / "run"), CliRunner().invoke
    small = [
        "dims.d=8",
        "dims.K=2",
        "dims.p=4",
        "unroll.layers=1",
        "model.embed.length=16",
        "data.length=16",
        "data.characters=20000",
    ]
    told = [
        call(cli, ["train", "crate_text", *small, "train.steps=10", "train.warmup=2", "--out", folder, "-q"]),
        call(cli, ["train", "--resume", folder, "-q"]),
        call(cli, ["eval", folder]),
        call(cli, ["report", folder, "-o", str(tmp_path / "page.html")]),
    ]
    assert [each.exit_code for each in told] == [0] * 4, told
    assert all("bits per token" in each.output and "bigram" in each.output for each in told[:3])
    page = (tmp_path / "page.html").read_text()
    assert "bigram" in page and "Attention" in page


def test_the_characters_are_kept_and_another_text_is_refused(tmp_path, models):
    models.case = "characters"
    (tmp_path / "mine.txt").write_text("the cat sat on the mat. " * 60)
    data = f"\ndata: {{source: text, text: {tmp_path / 'mine.txt'}, length: 8}}\n"
    train(SPEC + data + "train: {loss: cross_entropy, steps: 3, batch: 4}", out=tmp_path / "run", quiet=True)
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["vocabulary"] == ["\ufffd", *sorted(set("the cat sat on the mat. "))]
    (tmp_path / "mine.txt").write_text("the cat sat on the hat. " * 60)
    with pytest.raises(SpecError, match="text_sha256, vocabulary differ") as caught:
        resume(tmp_path / "run", quiet=True)
    assert caught.value.code == "E514"


def test_sizes_that_the_spec_leaves_open_come_from_the_data(monkeypatch, tmp_path):
    from unroll.spec import load
    from unroll.train import job

    asked = {}
    monkeypatch.setattr(job, "compile", lambda spec, **options: asked.update(options))
    spec = load(SPEC.replace("n: 16}", "n: 16, height: 4, classes: how many}"))
    job.build(job.Job(tmp_path, spec, {"width": 2}, {}, {}, None), digits(), spec)
    assert asked["dims"] == {"classes": 10, "width": 2}


# --- what does not go together ---------------------------------------------------------------------------------------


def refused(tmp_path, net, data, **options):
    with pytest.raises(SpecError) as caught:
        fit(net, data, settings(**options), tmp_path)
    return caught.value.code, caught.value.message


def answering(answer):
    net = Classifier()
    net.forward = lambda image: answer(image)
    return net


def bare(data):
    return Data(data.source, Split(data.train.inputs), Split(data.validation.inputs))


def test_labels_are_needed_by_cross_entropy(tmp_path):
    code, message = refused(tmp_path, Classifier(), bare(digits()))
    assert code == "E508" and "needs labels, source 'digits' has none" in message


def test_codes_are_not_asked_of_a_model(tmp_path, models):
    spec = SPEC + "data: {source: digits, form: images}\ntrain: {loss: nmse}"
    models.case = "classes"
    with pytest.raises(SpecError, match="compares codes of x, the data are image") as caught:
        train(spec, out=tmp_path / "run", quiet=True)
    assert caught.value.code == "E512"


def test_a_dictionary_is_not_learned_from_what_a_model_takes(tmp_path, models):
    spec = SPEC + "data: {source: digits, form: images, dictionary: {learn: A}}\ntrain: {loss: cross_entropy}"
    models.case = "classes"
    with pytest.raises(SpecError, match="'A' cannot be learned from the samples") as caught:
        train(spec, out=tmp_path / "run", quiet=True)
    assert caught.value.code == "E507"


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (lambda: Classifier(classes=7), {}, "labels go up to 9, the network tells 7 classes apart"),
        (Autoencoder, {}, "needs one tensor of logits, the network answers with 2 values"),
        (lambda: answering(lambda x: torch.zeros(len(x), 4, 10)), {}, "the labels are () and the answer is (4, 10)"),
        (Classifier, {"loss": "masked_mse"}, "the network answers with a tensor of shape (2, 10)"),
        (
            lambda: answering(lambda x: (torch.zeros(len(x), 4, 3), torch.zeros(len(x), 5).bool())),
            {"loss": "masked_mse"},
            "the mask is (2, 5), predicted patches are (2, 4, 3)",
        ),
        (
            lambda: answering(lambda x: (torch.zeros(len(x), 4, 3), torch.zeros(len(x), 4).bool())),
            {"loss": "masked_mse"},
            "no patch is hidden",
        ),
    ],
)
def test_an_answer_that_the_loss_cannot_compare_is_refused_before_the_first_step(tmp_path, net, options, message):
    code, found = refused(tmp_path, net(), digits(), **options)
    assert code == "E512" and message in found
    assert not (tmp_path / "checkpoints").exists()


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    code, message = refused(tmp_path, Language(TEXT.sizes["vocabulary"] - 1), TEXT)
    assert code == "E512" and message == f"train: the network has no row for token {TEXT.sizes['vocabulary'] - 1}"


def test_inputs_of_another_name_are_refused(tmp_path):
    code, message = refused(tmp_path, Language(9), digits())
    assert code == "E507" and "the network takes tokens, source 'digits' has image" in message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"stages": "layerwise"}, "stages"),
        ({"layer_weights": "uniform"}, "layer_weights"),
        ({"target": "optimum"}, "target"),
        ({"baselines": ("ista",)}, "baselines"),
        ({"loss": "masked_mse", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "objective", "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_settings_that_mean_nothing_for_the_loss_are_refused(options, word):
    with pytest.raises(SpecError, match=f"train: {word}: means nothing for loss:") as caught:
        find_task(settings(**options), digits())
    assert caught.value.code == "E511"


def test_a_gradient_of_a_model_that_is_not_finite_is_named(tmp_path):
    net = Classifier()
    net.W.register_hook(lambda g: g * math.nan)
    code, message = refused(tmp_path, net, digits())
    assert code == "E509" and "the gradient of W of layer 1" in message


def test_a_parameter_of_a_model_that_is_not_finite_is_named(tmp_path):
    net = Classifier()
    with torch.no_grad():
        net.head.weight[0, 0] = math.inf
    code, message = refused(tmp_path, net, digits())
    assert code == "E509" and "head.weight is not finite" in message
