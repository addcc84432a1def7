"""A run on text knows its words, wherever its text has gone."""

import pytest
import torch
from click.testing import CliRunner

import unroll
from unroll.cli import cli
from unroll.errors import SpecError
from unroll.train import train
from unroll.train.run import evaluate

SMALL = [
    "dims.d=16", "dims.K=2", "dims.p=8", "unroll.layers=1", "model.embed.length=16", "data.length=16",
    "train.steps=3", "train.warmup=1", "train.validate_every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mät. " * 40, encoding="utf-8")
    return path


def written(folder, *options):
    return CliRunner().invoke(cli, ["generate", str(folder), "--prompt", "the", *options])


@pytest.mark.parametrize("words", ["characters", "bytes"])
def test_a_run_writes_text_in_its_words_after_its_data_are_gone(text, tmp_path, words):
    own = tmp_path / "own.txt"
    own.write_bytes(text.read_bytes())
    rows = [] if words == "characters" else ["model.embed.vocabulary=256"]
    run = train(
        "crate_text",
        overrides=[*SMALL, f"data.text={own}", f"data.words={words}", *rows],
        out=tmp_path / "run",
        quiet=True,
    )
    own.unlink()
    again = unroll.restore(run.folder)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), run.net.state_dict().values(), strict=True)
    )
    assert again.words == run.net.words and again.words.decode(again.words.encode("the mat")) == "the mat"
    expected = again.generate("the", 10, seed=3, top_k=5)
    found = written(run.folder, "--length", "10", "--seed", "3", "--top-k", "5")
    assert found.exit_code == 0 and found.output == expected + "\n"
    assert written(run.folder, "--length", "10", "--seed", "4").output != expected + "\n"
    with pytest.raises(SpecError, match="there is no file"):
        evaluate(run.folder, quiet=True)


def test_words_that_have_no_row_are_refused_before_a_step(text, tmp_path):
    with pytest.raises(SpecError, match="the data have 256 words, and the table of the model has 128 rows") as caught:
        train(
            "crate_text", overrides=[*SMALL, f"data.text={text}", "data.words=bytes"], out=tmp_path / "run", quiet=True
        )
    assert caught.value.code == "E420" and not (tmp_path / "run").exists()
