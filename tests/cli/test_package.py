"""The package as a stranger gets it: what a wheel holds, what importing costs, what the engine may know."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import MUTATIONS

from unroll.derivation.algorithms import every
from unroll.spec import library

ROOT = Path(__file__).parents[2]
ENGINE = sorted((ROOT / "unroll").rglob("*.py"))
HEAVY = {"torch", "sympy", "numpy", "pydantic", "yaml", "networkx", "lightning", "sklearn", "matplotlib", "rich"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_the_library_and_the_schema(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("objectives", "specs", "specs/presets"):
        ours = {f"unroll/_library/{kind}/{path.name}" for path in (ROOT / kind).glob("*.yaml")}
        assert ours and ours <= held
    assert {"unroll/py.typed", "unroll/explain.md", "unroll/spec/spec.schema.json"} <= held
    assert not [name for name in held if name.startswith("tests/") or "__pycache__" in name]


def test_an_installed_wheel_works_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    where = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", where, wheel, cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(where)!r}); from unroll.cli import main; main()"
    listed = run(sys.executable, "-c", code, "list", cwd=tmp_path)
    for name in library.names("specs"):
        assert re.search(rf"^  {name} ", listed, re.MULTILINE)
    origin = run(sys.executable, "-c", code.replace("main()", "import unroll; print(unroll.__file__)"), cwd=tmp_path)
    assert origin.startswith(str(where))
    source = run(sys.executable, "-c", code, "compile", library.names("specs")[0], cwd=tmp_path)
    assert "nn.Module" in source


# --- importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["unroll", "unroll.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run(sys.executable, "-c", code, cwd=ROOT).split()}
    assert module.partition(".")[0] in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("code", "needed", "spared"),
    [
        ("import unroll; unroll.load('ista')", "yaml", {"torch", "sympy", "networkx"}),
        ("import unroll; str(unroll.derive('ista'))", "sympy", {"networkx", "lightning"}),
        ("import unroll; unroll.compile('ista')", "torch", {"lightning", "sklearn", "matplotlib"}),
    ],
    ids=["spec", "derivation", "network"],
)
def test_each_stage_loads_what_it_needs(code: str, needed: str, spared: set[str]) -> None:
    loaded = set(run(sys.executable, "-c", f"import sys; {code}; print(*sys.modules)", cwd=ROOT).split())
    assert needed in loaded
    assert not loaded & spared


def test_every_public_name_is_there() -> None:
    import unroll

    assert sorted(unroll.__all__) == unroll.__all__
    for name in unroll.__all__:
        assert getattr(unroll, name).__name__ == name
    assert set(unroll.__all__) <= set(dir(unroll))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unroll.nothing


# --- what the engine knows --------------------------------------------------------------------------------------------

WORDS = {a.name for a in every()} | {"step", "slope", "hessian", "momentum", "ridge", "tied", "pca"}
"""Names that are words of mathematics, or of models, too."""
ENTRIES = {name for kind in ("objectives", "specs", "presets") for name in library.names(kind)} - WORDS


def code_words(tree: ast.Module) -> Iterator[str]:
    """Identifiers, and strings without blanks; docstrings, comments and sentences are for people."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=str(word)):
                yield word
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word) | ast.alias(name=word):
                yield word
            case ast.Constant(value=str(text)) if id(node) not in texts:
                yield text.removesuffix(".yaml")
            case _:
                pass


def test_the_search_finds_a_name_that_is_there() -> None:
    assert "lasso" in code_words(ast.parse("def f(kind):\n    'a lasso in words'\n    return kind == 'lasso'"))
    assert "lasso" not in code_words(ast.parse("def f():\n    'a lasso in words'"))


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_knows_no_network_and_no_objective_by_name(path: Path) -> None:
    assert len(ENTRIES) > 20
    found = {word.lower() for word in code_words(ast.parse(path.read_text(encoding="utf-8")))}
    assert not found & ENTRIES


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_names_no_device(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert "cuda" not in {function.attr for function in calls if isinstance(function, ast.Attribute)}


def test_one_file_imports_lightning() -> None:
    imported = re.compile(r"^\s*(import|from) lightning", re.MULTILINE)
    assert [path.name for path in ENGINE if imported.search(path.read_text(encoding="utf-8"))] == ["engine.py"]


# --- documents --------------------------------------------------------------------------------------------------------


def test_the_changelog_names_this_version() -> None:
    from unroll import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_help_names_every_target() -> None:
    shown = run("make", "help", cwd=ROOT)
    for target in ("test", "lint", "demo", "bench", "clean"):
        assert re.search(rf"^{target} ", shown, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


# --- the house --------------------------------------------------------------------------------------------------------

FOLDERS = sorted(path.parent for path in (ROOT / "unroll").rglob("__init__.py") if path.parent != ROOT / "unroll")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_says_what_comes_in_what_goes_out_and_what_to_open(folder: Path) -> None:
    """Files that its docstring names are there, and so is what it says goes out."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    places = {line.split()[0]: line for line in text.splitlines() if line[:4] in ("in  ", "out ", "open")}
    assert places.keys() == {"in", "out", "open"}
    for file in re.findall(r"\b\w+\.py\b", text):
        assert (folder / file).is_file(), file
    for module, name in re.findall(r"`(\w+)\.(\w+)`", text):
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {d.name for d in tree.body if isinstance(d, ast.FunctionDef | ast.ClassDef)}, (module, name)


def test_every_mutation_has_its_place_in_the_code() -> None:
    """Else it is tried no more, in silence, after what it breaks has moved."""
    lost = [m.name for m in MUTATIONS if (ROOT / "unroll" / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    assert not lost
