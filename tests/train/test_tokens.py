"""Tokens that lie in files: windows, documents, labels that do not count, and training on them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unroll.errors import SpecError
from unroll.model.words import Bytes, Characters
from unroll.spec.schema import Files, TokenArrays, Train
from unroll.train import labels, losses, resume, train
from unroll.train.data import make_data
from unroll.train.samples import Data, Shapes, Split, generator
from unroll.train.text import with_bytes
from unroll.train.tokens import bytes_of, open_array

SHAPES = Shapes({"X": (None, 16)}, model="tokens")


@pytest.fixture
def arrays(tmp_path):
    """Two files of documents that end with 0: (paths, the tokens of both)."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 60_000, n) for n in (1, 4, 5, 6, 9, 30, 2, 13)]
    parts = [np.concatenate([np.append(r, 0) for r in rows[:5]]), np.concatenate([np.append(r, 0) for r in rows[5:]])]
    np.save(tmp_path / "a.npy", parts[0].astype(np.uint16))
    parts[1].astype("<u2").tofile(tmp_path / "b.bin")
    return [str(tmp_path / "a.npy"), str(tmp_path / "b.bin")], parts, rows


def read(files, **more):
    return make_data(
        TokenArrays(
            source="tokens",
            files=tuple(files),
            length=4,
            **{k: tuple(v) if k == "held" else v for k, v in more.items()},
        ),
        SHAPES,
    )


def pairs(split):
    """(token, label) of all labels that count."""
    kept = split.labels >= 0
    return list(zip(split.inputs["tokens"][kept].tolist(), split.labels[kept].tolist(), strict=True))


def test_an_epoch_has_every_token_of_a_document_once_and_none_of_the_next(arrays):
    files, _, rows = arrays
    data = read(files, separator=0, held=files)
    expected = sorted((a, b) for r in rows for a, b in zip(r, np.append(r, 0)[1:], strict=True))
    for seed in (0, 1):
        split = data.train[data.train.order(generator(seed))]
        assert sorted(pairs(split)) == expected
        assert (split.inputs["tokens"][split.labels < 0] == 0).all()
        assert not (split.labels[:, :-1] < split.labels[:, 1:].clamp_max(0)).any()  # filled at the end alone
    assert len(data.train) == sum(math.ceil(len(r) / 4) for r in rows) == len(data.train.order(generator(0)))
    assert "8 documents" in data.notes[0]


def test_without_a_separator_windows_stay_in_their_file_and_move_from_epoch_to_epoch(arrays):
    files, parts, _ = arrays
    data = read(files, held=files)
    whole = [p.tolist() for p in parts]
    seen = set()
    for seed in range(8):
        order = data.train.order(generator(seed))
        split = data.train[order]
        assert len(order) == len(set(order.tolist())) == len(data.train)
        for tokens, label in zip(split.inputs["tokens"].tolist(), split.labels.tolist(), strict=True):
            assert min(label) >= 0 and tokens[1:] == label[:-1]
            assert any(p[i : i + 5] == [*tokens, label[-1]] for p in whole for i in range(len(p)))
        seen |= set(order.tolist())
    assert len(seen) > 2 * len(data.train)
    assert torch.equal(data.train.order(generator(3)), data.train.order(generator(3)))


def test_a_separator_that_no_file_has_is_said(arrays):
    with pytest.raises(SpecError, match="the separator 60000 is in none of the files") as e:
        read(arrays[0], separator=60_000)
    assert e.value.code == "E504"


@pytest.mark.parametrize("separator", [None, 0])
def test_what_is_held_out_was_never_trained_on(arrays, separator):
    files, parts, _ = arrays
    numbered = [np.arange(1, 1 + len(parts[0])), np.arange(100, 100 + len(parts[1]))]
    for path, part, own in zip(files, parts, numbered, strict=True):
        own = np.where((part == 0) & (separator is not None), 0, own).astype("<u2")
        np.save(path, own) if path.endswith("npy") else own.tofile(path)
    data = read(files, separator=separator, validation=0.3)
    trained = {a for s in range(6) for a, _ in pairs(data.train[data.train.order(generator(s))])}
    held = {a for a, _ in pairs(data.validation)}
    assert trained and held and not trained & held
    assert max(trained - {0}) < min(held - {0})


def test_arrays_stay_on_disk_and_say_how_large_their_words_are(arrays, tmp_path):
    files, parts, _ = arrays
    opened = [open_array(path, "uint16") for path in map(Path, files)]
    assert all(isinstance(a, np.memmap) or isinstance(a.base, np.memmap) for a in opened)
    data = read(files, held=files)
    assert data.sizes["vocabulary"] == 1 + max(int(p.max()) for p in parts)
    np.array([70_000, 1, 2] * 9, "<u4").tofile(tmp_path / "wide.bin")
    wide = read([str(tmp_path / "wide.bin")], kind="uint32", validation=0.4)
    assert wide.sizes["vocabulary"] == 70_001 and int(wide.train.whole().inputs["tokens"].max()) == 70_000
    np.save(tmp_path / "rows.npy", np.arange(60).reshape(5, 12))
    assert read([str(tmp_path / "rows.npy")], validation=0.4).sizes["vocabulary"] == 60


def test_files_that_hold_no_tokens_are_refused(tmp_path):
    def refused(**more):
        with pytest.raises(SpecError) as caught:
            read(**more)
        return caught.value.code

    path = tmp_path / "x.npy"
    assert refused(files=[str(path)]) == "E502"
    np.save(path, np.ones(50))
    assert refused(files=[str(path)]) == "E506"
    np.save(path, np.arange(-1, 50))
    assert refused(files=[str(path)]) == "E505"
    np.save(path, np.arange(4))
    assert refused(files=[str(path)]) == "E504"
    np.save(path, np.zeros(0, np.uint16))
    assert refused(files=[str(path)]) == refused(files=[str(path)], separator=0) == "E504"
    path.write_bytes(b"no array")
    assert refused(files=[str(path)]) == "E503"
    (tmp_path / "x.bin").write_bytes(b"odd")
    assert refused(files=[str(tmp_path / "x.bin")]) == "E503"
    (tmp_path / "x.bin").write_bytes(b"")
    assert refused(files=[str(tmp_path / "x.bin")]) == "E503"


# --- labels that do not count -----------------------------------------------------------------------------------------


class Logits(torch.nn.Module):
    """A network that answers with these."""

    inputs = ("tokens",)

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, tokens):
        return self.logits[: len(tokens)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_below_0_count_in_no_loss(smoothing):
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    known = torch.tensor([[0, -1, 4, 2], [-100, 3, -1, 1], [-1, -1, -1, -1]])
    batch, kept = Split({"tokens": known}, labels=known), known >= 0
    value = losses.find_loss("cross_entropy").value(None, batch, logits, Train(label_smoothing=smoothing))
    expected = F.cross_entropy(logits[kept], known[kept], label_smoothing=smoothing)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    (slope,) = torch.autograd.grad(value, logits)
    assert (slope[~kept] == 0).all() and (slope[kept] != 0).all()
    none = torch.full_like(known, -1)
    value = losses.find_loss("cross_entropy").value(None, Split({}, labels=none), logits, Train())
    (slope,) = torch.autograd.grad(value, logits)
    assert value == 0 and (slope == 0).all()


def test_held_out_measures_leave_them_out_and_are_what_their_names_say():
    net = Logits(torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_(False)
    known = torch.tensor([[0, -1, 3], [2, 1, -1]])
    held = Split({"tokens": known}, labels=known, bytes=7)
    found = labels.held_out(net, held, Train())
    kept = known >= 0
    nats = float(F.cross_entropy(net.logits[kept], known[kept]))
    assert found["nats"] == pytest.approx(nats, rel=1e-14) and found["perplexity"] == pytest.approx(math.exp(nats))
    assert found["bits_per_byte"] == pytest.approx(4 * nats / math.log(2) / 7)
    assert found["accuracy"] == float((net.logits.argmax(-1)[kept] == known[kept]).double().mean())
    assert math.isnan(labels.held_out(net, Split(held.inputs, labels=known), Train())["bits_per_byte"])
    data = Data("", held, held)
    rows = labels.characters(None, data, None)
    p = torch.tensor([2.0, 2, 2, 2]) / 8  # each label once, one more of each
    assert rows[0].values["nats"] == pytest.approx(float(-p.log().mean())) and rows[0].values["bits_per_byte"] > 0


def test_bytes_are_those_of_the_text():
    text = "naïve 日本"
    for known in (Bytes(), Characters.of(text)):
        row = torch.tensor([[*known.encode(text), -1, -1]])
        assert bytes_of(known, row) == len(text.encode())
        assert with_bytes(Split({}, labels=row), known).to(torch.zeros(())).bytes == len(text.encode())


# --- training ---------------------------------------------------------------------------------------------------------

TINY = [
    "dims.d=16", "dims.K=2", "dims.p=8", "unroll.layers=1", "model.embed.vocabulary=64", "model.embed.length=8", "data.length=8",
    "train.loss=cross_entropy", "train.batch=4", "train.validate_every=3", "train.schedule=constant", "data.source=tokens",
]  # fmt: skip


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.npy"
    np.save(path, np.random.default_rng(1).integers(0, 64, 400).astype(np.uint16))
    return path


@pytest.mark.parametrize(
    ("name", "own"),
    [("crate_gpt", []), ("tost_language", ["dims.s=8", "dims.T=8"]), ("crate_alpha_language", ["dims.s=8"])],
)
def test_networks_for_language_train_on_arrays_of_tokens(small, tmp_path, name, own):
    run = train(
        name, overrides=[*TINY, *own, f"data.files=['{small}']", "train.steps=2"], out=tmp_path / "run", quiet=True
    )
    assert run.steps == 2 and "perplexity" in str(run) and math.isfinite(run.closing.rows[-1].values["nats"])


def test_an_interrupted_training_goes_on_to_the_bit(small, tmp_path):
    spec = ["crate_gpt", [*TINY, f"data.files=['{small}']", "data.separator=3", "train.keep=last"]]
    whole = train(spec[0], overrides=[*spec[1], "train.steps=14"], out=tmp_path / "whole", quiet=True)
    train(spec[0], overrides=[*spec[1], "train.steps=5"], out=tmp_path / "parts", quiet=True)
    parts = resume(tmp_path / "parts", overrides=["train.steps=14"], quiet=True)
    values = zip(whole.net.state_dict().items(), parts.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in values)
    np.save(small, np.load(small)[::-1])
    with pytest.raises(SpecError, match="tokens differ"):
        resume(tmp_path / "parts", overrides=["train.steps=20"], quiet=True)


def test_a_model_with_too_few_rows_or_places_is_refused_with_its_place(small, tmp_path):
    for change, code, text in (
        ("model.embed.vocabulary=63", "E420", "the data have 64 words, and the table of the model has 63 rows"),
        ("data.length=9", "E511", "samples of 9 tokens are longer than the model reads, 8 tokens"),
    ):
        with pytest.raises(SpecError, match=text) as caught:
            train("crate_gpt", overrides=[*TINY, f"data.files=['{small}']", change], out=tmp_path / "run", quiet=True)
        assert caught.value.code == code and caught.value.where is not None and not (tmp_path / "run").exists()


def test_samples_of_tokens_with_labels_of_their_own(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 9, (12, 5))
    known = np.where(tokens == 3, -1, np.roll(tokens, -1, 1))
    np.save(tmp_path / "t.npy", tokens)
    np.save(tmp_path / "l.npy", known)
    files = {"tokens": str(tmp_path / "t.npy"), "labels": str(tmp_path / "l.npy")}
    data = make_data(Files(source="file", files=files, validation=3), SHAPES)
    whole, held = data.train.whole(), data.validation
    assert (len(whole), len(held)) == (9, 3) and whole.labels.dtype == torch.int64
    rows = {
        (tuple(t), tuple(l))
        for s in (whole, held)
        for t, l in zip(s.inputs["tokens"].tolist(), s.labels.tolist(), strict=True)
    }
    assert rows == {(tuple(t), tuple(l)) for t, l in zip(tokens.tolist(), known.tolist(), strict=True)}
    for name, bad, code in (
        ("tokens", tokens - 1, "E505"),
        ("tokens", tokens + 0.5, "E506"),
        ("labels", known + 0.5, "E506"),
    ):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(SpecError) as caught:
            make_data(Files(source="file", files={**files, name: str(tmp_path / "bad.npy")}), SHAPES)
        assert caught.value.code == code
    with pytest.raises(SpecError, match="is no name of this problem"):
        make_data(Files(source="file", files={**files, "X": files["tokens"]}), SHAPES)
