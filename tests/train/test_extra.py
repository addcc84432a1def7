"""Without the extra `train`: every verb that needs it says so, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

from unroll import cli

SPEC = """
use: lasso
dims: {m: 4, n: 6}
unroll: {algorithm: proximal_gradient, layers: 1, learn: {W: {replaces: step * A.T}}}
data: {source: synthetic, sparsity: 0.3, train: 8, validation: 4}
train: {loss: nmse, steps: 1, batch: 4, baselines: []}
"""
EXTRA = ("lightning", "sklearn", "matplotlib", "PIL")


class Missing(MetaPathFinder):
    """Stands before all other finders: these packages are not installed."""

    def __init__(self, blocked: tuple[str, ...]) -> None:
        self.blocked = blocked

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


Said = Callable[..., str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a command that fails prints where packages are missing."""

    def run(folder: Path, *words: str, blocked: tuple[str, ...] = EXTRA) -> str:
        for name in [n for n in sys.modules if n.split(".")[0] in blocked]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Missing(blocked), *sys.meta_path])
        monkeypatch.setattr(sys, "argv", ["unroll", *words])
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extra")
    (folder / "small.yaml").write_text(SPEC, encoding="utf-8")
    from unroll.train import train

    return train(folder / "small.yaml", out=folder / "run", quiet=True).folder


@pytest.mark.parametrize(
    "words",
    [("eval", "run"), ("eval", "run", "--white-box"), ("report", "run"), ("train", "--resume", "run")],
    ids=" ".join,
)
def test_every_verb_on_a_run_says_which_extra_is_missing(run: Path, words: tuple[str, ...], said: Said) -> None:
    shown = said(run.parent, *words)
    assert "E501" in shown and "is not installed" in shown and "pip install 'unroll-compiler[train]'" in shown
    assert "internal error" not in shown and not (run.parent / "report.html").exists()


NEEDS = {"lightning": "synthetic", "matplotlib": "synthetic", "sklearn": "digits", "PIL": "images"}


@pytest.mark.parametrize("package", NEEDS)
def test_training_says_so_before_it_makes_a_folder(tmp_path: Path, package: str, said: Said) -> None:
    data = {
        "synthetic": "{source: synthetic, sparsity: 0.3, train: 8, validation: 4}",
        "digits": "{source: digits}",
        "images": "{source: images, folder: pets, size: 8, channels: 1}",
    }[NEEDS[package]]
    spec = "\n".join(f"data: {data}" if line.startswith("data:") else line for line in SPEC.splitlines())
    (tmp_path / "small.yaml").write_text(spec, encoding="utf-8")
    shown = said(tmp_path, "train", "small.yaml", blocked=(package,))
    assert "E501" in shown and package in shown and "pip install 'unroll-compiler[train]'" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["small.yaml"]
