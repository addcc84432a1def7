"""Text from a network: what is drawn, and what words are kept with it."""

import base64
import pickle
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer as Held
from tokenizers import decoders, models, pre_tokenizers, trainers

import unroll
from unroll.errors import SpecError, UnrollError
from unroll.model.generation import Draw
from unroll.model.words import UNKNOWN, Bytes, Characters, Tokenizer, _letters, of_ranks, pieces
from unroll.network.kept import Kept

TINY = ["dims.d=16", "dims.K=2", "dims.p=8", "unroll.layers=2", "model.embed.length=24"]
TEXT = "the cat sat on the mat, the dog on the log; über 10 000 naïve cafés, 日本語 too. " * 3


@pytest.fixture(scope="module")
def joined() -> Held:
    """A byte-level tokenizer, trained here."""
    held = Held(models.BPE())
    held.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    held.decoder = decoders.ByteLevel()
    trained = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    held.train_from_iterator([TEXT], trained)
    return held


@pytest.fixture(scope="module")
def net():
    made = unroll.compile("crate_text", overrides=TINY, dtype=torch.float64, seed=1)
    made.words = Characters.of("abcdefgh ")
    return made


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_temperature_of_zero_takes_the_likeliest_and_others_the_softmax():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]], dtype=torch.float64)
    assert Draw(0).shares(logits).tolist() == [[0, 1, 0, 0]]  # the first of equals
    assert torch.equal(Draw(0.5).shares(logits), (logits / 0.5).softmax(-1))
    extreme = Draw(1e-3).shares(logits * 1e6)
    assert extreme.isfinite().all() and extreme[0, 1] == extreme[0, 2] == 0.5


def test_top_k_and_top_p_keep_the_likeliest_in_their_proportions():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    near = lambda draw, found: torch.testing.assert_close(
        draw.shares(p.log())[0], torch.tensor(found).double() / sum(found)
    )
    near(Draw(top_k=2), [0, 0.5, 0, 0.25])
    near(Draw(top_p=0.5), [0, 1, 0, 0])  # exactly the share is enough
    near(Draw(top_p=0.51), [0, 0.5, 0, 0.25])
    near(Draw(top_p=1.0), [0.1, 0.5, 0.15, 0.25])
    near(Draw(top_k=3, top_p=0.6), [0, 0.5, 0, 0.25])  # 0.5 of the 0.9 that top_k left is 0.56


def test_draws_are_as_often_as_their_shares():
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(20_000, 3)
    found = torch.bincount(Draw()(logits, torch.Generator().manual_seed(0)), minlength=3) / 20_000
    assert (found - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 0.015


@pytest.mark.parametrize(
    "asked", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_draws_that_mean_nothing_are_refused(net, asked):
    with pytest.raises(UnrollError) as caught:
        net.generate(torch.ones(1, 2, dtype=torch.int64), 1, **asked)
    assert caught.value.code == "E404"


# --- generate ---------------------------------------------------------------------------------------------------------


def test_each_token_is_the_one_that_the_network_finds_likeliest(net):
    begun = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = net.generate(begun, 5, temperature=0)
    assert found.shape == (2, 8) and torch.equal(found[:, :3], begun)
    for t in range(3, 8):
        assert torch.equal(net(found[:, :t])[:, -1, : net.words.size].argmax(-1), found[:, t])


def test_the_same_seed_writes_the_same_and_another_does_not(net):
    texts = [net.generate("abc", 20, seed=s, temperature=2) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(t) == 23 and t.startswith("abc") and set(t) <= {*"abcdefgh ", UNKNOWN} for t in texts)


def test_a_stream_is_told_what_is_returned_and_the_mode_of_the_network_stays(net):
    told, new = [], []
    text = net.generate("abc", 9, stream=told.append)
    assert "abc" + "".join(told) == text and len(told) > 1
    net.train()
    found = net.generate(torch.tensor([1, 2]), 4, stream=new.append)
    assert found.shape == (6,) and torch.equal(torch.stack(new), found[2:])
    assert net.training and not found.requires_grad
    net.eval()


@pytest.mark.parametrize(
    "asked",
    [{"length": 2.0}, {"length": True}, {"seed": 1.5}, {"seed": 2**70}, {"top_k": "3"}, {"top_k": 1.5}, {"window": 2.0}, {"tokens": [1, 2]}, {"tokens": None}],
)  # fmt: skip
def test_what_is_of_another_kind_is_said(net, asked):
    given = {"tokens": torch.tensor([1, 2]), "length": 2, **asked}
    with pytest.raises(UnrollError, match="whole number") as caught:
        net.generate(given.pop("tokens"), given.pop("length"), **given)
    assert caught.value.code == "E404"


def test_a_text_is_as_long_as_the_longest_where_nobody_says_how_long(net):
    assert len(net.generate("abc", seed=3)) == 25 and net.generate("abc", seed=3) == net.generate("abc", 22, seed=3)
    assert net.generate(torch.tensor([1, 2]), window=8).shape == (302,)


def test_a_text_that_is_too_long_is_refused_and_a_window_goes_on(net):
    begun = torch.ones(1, 4, dtype=torch.int64)
    assert net.generate(begun, 21).shape == (1, 25)  # the last one is never read
    with pytest.raises(UnrollError, match="4 tokens and 22 more: the longest text .* has 24") as caught:
        net.generate(begun, 22)
    assert caught.value.code == "E404" and "length=21" in caught.value.hint and "window=" in caught.value.hint
    found = net.generate(begun, 40, window=7, temperature=0)
    assert torch.equal(net(found[:, 18:25])[:, -1, : net.words.size].argmax(-1), found[:, 25])
    assert torch.equal(net(found[:, 18:30])[:, -1, : net.words.size].argmax(-1), found[:, 30])
    for asked in ({"window": 25}, {"window": 0}):
        with pytest.raises(UnrollError, match="window"):
            net.generate(begun, 2, **asked)


def test_what_does_not_say_the_next_token_writes_nothing():
    image = unroll.compile("crate_digits", overrides=["unroll.layers=1"])
    with pytest.raises(UnrollError) as caught:
        image.generate(torch.ones(1, 2, dtype=torch.int64), 1)
    assert caught.value.code == "E422"
    text = unroll.compile("crate_text", overrides=TINY)
    with pytest.raises(UnrollError, match="does not know what its tokens stand for") as caught:
        text.generate("abc", 2)
    assert caught.value.code == "E422"
    text.words = Bytes() if text.wrapped.model.embed.vocabulary >= 256 else Characters.of("ab")
    with pytest.raises(UnrollError, match="an empty text"):
        text.generate("", 2)


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_give_back_what_they_were_given(joined):
    for words in (Characters.of(TEXT), Bytes(), Tokenizer(joined.to_str())):
        codes = words.encode(TEXT)
        assert words.decode(codes) == TEXT and min(codes) >= 0 and max(codes) < words.size
        assert "".join(pieces(words, iter(codes))) == TEXT
        assert words.decode(words.encode("")) == ""
        assert pickle.loads(pickle.dumps(words)) == words
    assert Characters.of("ab").encode("azb") == [1, 0, 2] and Characters.of("").encode("az") == [0, 0]
    assert Characters.of("ab").decode([0]) == UNKNOWN
    assert Bytes().encode("é") == [0xC3, 0xA9] and list(pieces(Bytes(), [0xC3, 0xA9, 0xC3])) == ["é", UNKNOWN]


def by_ranks(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """Of all neighbours the pair of lowest rank is joined, the first of equals, until none has a rank."""
    parts = [bytes([b]) for b in word]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[p] for p in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_ranks_are_joined_as_their_definition_says(joined, tmp_path):
    back = {c: b for b, c in enumerate(_letters())}
    ranks = {bytes(back[c] for c in word): n for word, n in joined.get_vocab().items()}
    path = tmp_path / "words.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % n for t, n in sorted(ranks.items(), key=lambda i: i[1])))
    words = unroll.words(path)
    pattern = [w for w, _ in Held.from_str(of_ranks(ranks)).pre_tokenizer.pre_tokenize_str(TEXT)]
    expected = [t for w in pattern for t in by_ranks(ranks, bytes(back[c] for c in w))]
    assert words.encode(TEXT) == expected and words.decode(expected) == TEXT
    assert len(expected) < len(TEXT.encode())
    assert unroll.words(path, pattern=r"\s").encode(TEXT) != expected


def test_files_that_hold_no_words_are_refused(tmp_path):
    for name, text, code in (
        ("none", None, "E502"),
        ("a.json", "{", "E503"),
        ("b.json", '{"a": 1}', "E503"),
        ("c", "no ranks", "E503"),
        ("d", "", "E503"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(SpecError) as caught:
            unroll.words(tmp_path / name)
        assert caught.value.code == code, name


def test_without_the_library_a_sentence_says_what_to_install(joined, monkeypatch, tmp_path):
    (tmp_path / "w.json").write_text(joined.to_str())
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(SpecError, match="need the package tokenizers") as caught:
        unroll.words(tmp_path / "w.json")
    assert caught.value.code == "E501" and "unroll-compiler[text]" in caught.value.hint
    assert unroll.words("bytes").size == 256


def test_more_words_than_rows_are_refused_with_the_place(joined):
    words = Tokenizer(joined.to_str())
    with pytest.raises(SpecError, match="there are 300 words, and the table of the model has 256 rows") as caught:
        unroll.compile("crate_text", overrides=[*TINY, "model.embed.vocabulary=256"], words=words)
    assert caught.value.code == "E420" and "model.embed.vocabulary=300" in caught.value.hint
    assert unroll.compile("crate_text", overrides=[*TINY, "model.embed.vocabulary=300"], words=words).words == words
    with pytest.raises(SpecError, match="reads no tokens"):
        unroll.compile("crate_digits", overrides=["unroll.layers=1"], words="bytes")


def test_words_are_saved_restored_and_pickled_with_their_network(net, joined, tmp_path):
    wide = unroll.compile(
        "crate_text", overrides=[*TINY, "model.embed.vocabulary=300"], words=Tokenizer(joined.to_str())
    )
    for made in (net, wide):
        again = unroll.restore(made.save(tmp_path / "net"))
        assert again.words.encode(TEXT) == made.words.encode(TEXT)
        assert again.generate("the", 9) == made.generate("the", 9)
        assert pickle.loads(pickle.dumps(made)).words == made.words
    (tmp_path / "net/words.json").write_text('{"words": "bytes"}')
    with pytest.raises(UnrollError, match="words.json is not what it was"):
        unroll.restore(tmp_path / "net")
    net.save(tmp_path / "net")
    assert unroll.words(tmp_path / "net/words.json") == net.words  # another text in the same characters
    plain = unroll.compile("crate_text", overrides=TINY)
    assert unroll.restore(plain.save(tmp_path / "net")).words is None


@pytest.mark.parametrize(("first", "then"), [((1, 3), (2, 3)), ((2, 3), (1, 3)), ((2, 3), (3,))])
def test_texts_go_on_as_many_as_they_were(net, first, then):
    """One text that goes on as two was repeated, where room had just been made."""
    kept = Kept()
    net.extend(torch.ones(first, dtype=torch.int64), kept)
    with pytest.raises(UnrollError, match=f"expected .{first[0]}, n"):
        net.extend(torch.ones(then, dtype=torch.int64), kept)
