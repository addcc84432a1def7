"""Every verb of the command line: what it prints, where it prints it, how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from unroll import api, cli
from unroll.pages import stages

VERBS = ("list", "show", "compile", "check", "solve", "plan", "train", "eval", "generate", "report", "new", "explain")
SMALL = ("dims.m=6", "dims.n=9", "unroll.layers=3")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Unroll = Callable[..., Answer]


@pytest.fixture
def unroll(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Unroll:
    """The command, as typed in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> Answer:
        monkeypatch.setattr("sys.argv", ["unroll", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return Answer(code, shown.out, shown.err)

    return run


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_names_every_verb(unroll: Unroll) -> None:
    shown = unroll("--help")
    assert shown.code == 0
    assert set(VERBS) == set(cli.cli.commands)
    for verb in VERBS:
        assert f"\n  {verb} " in shown.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does(unroll: Unroll, verb: str) -> None:
    shown = unroll(verb, "-h")
    assert shown.code == 0
    assert len(shown.out.split("\n\n")[1].split()) > 4


def test_version(unroll: Unroll) -> None:
    assert unroll("--version").out.strip() == "unroll, version 0.1.0"


# --- show -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["admm", "algorithms/fista", "mine.yaml"])
def test_an_algorithm_is_shown_as_it_is_written(unroll: Unroll, tmp_path: Path, name: str) -> None:
    """What is printed is the algorithm: as a file of one's own it is the same again."""
    shown = unroll("show", "admm") if name == "mine.yaml" else unroll("show", name)
    (tmp_path / "mine.yaml").write_text(shown.out.replace("algorithm: admm", "algorithm: mine"))
    assert shown.code == 0 and "solves: f(z)" in shown.out and "updates:" in shown.out
    if name == "mine.yaml":
        assert unroll("show", "mine.yaml").out == shown.out.replace("algorithm: admm", "algorithm: mine")


@pytest.mark.parametrize("words", [("admm", "unroll.layers=3"), ("admm", "--latex"), ("admm", "--stage", "source")])
def test_what_an_algorithm_alone_has_not_is_said(unroll: Unroll, words: tuple[str, ...]) -> None:
    shown = unroll("show", *words)
    assert shown.code == 2 and "'admm' is an algorithm" in shown.err


def test_a_name_of_both_is_the_spec_and_one_of_neither_is_refused(unroll: Unroll) -> None:
    assert "fista on lasso" in unroll("show", "fista").out
    assert "no algorithm is called 'nope'" in unroll("show", "algorithms/nope").err
    assert "no spec or objective is called 'nope'" in unroll("show", "nope").err


# --- list and explain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cli.KINDS)
def test_list_tells_of_each_entry_in_both_forms(unroll: Unroll, kind: str) -> None:
    entries = json.loads(unroll("list", kind, "--json").out)[kind]
    shown = unroll("list", kind).out
    assert len(entries) >= 4
    for name, about in entries.items():
        assert about
        assert f"  {name} " in shown


def test_explain_tells_wrong_and_right(unroll: Unroll) -> None:
    page = unroll("explain", "e131")
    assert page.code == 0 and "wrong" in page.out and "right" in page.out
    assert unroll("explain", "E999").code == 2


# --- show and compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", cli.STAGES)
def test_show_prints_what_python_gives(unroll: Unroll, stage: str) -> None:
    shown = unroll("show", "ista", *SMALL, "--stage", stage)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.strip() == stages.stage("ista", stage, overrides=SMALL).strip()


def test_show_latex(unroll: Unroll) -> None:
    shown = unroll("show", "ista", "--latex")
    assert shown.out.startswith(r"\begin{aligned}") and r"\nabla f(z)" in shown.out


def test_overrides_reach_the_module(unroll: Unroll) -> None:
    shown = unroll("compile", "lista", "dims.m=5", "dims.n=7", "unroll.layers=3", "name=mine")
    assert "class Mine(nn.Module)" in shown.out
    assert "m=5, n=7, layers=3" in shown.out


def test_compile_writes_a_module_that_runs(unroll: Unroll, tmp_path: Path) -> None:
    assert unroll("compile", "ista", *SMALL, "-o", "net.py").code == 0
    space: dict[str, object] = {"__name__": "net"}
    exec(compile((tmp_path / "net.py").read_text(encoding="utf-8"), "net.py", "exec"), space)
    assert "Ista" in space


# --- check, solve, report ---------------------------------------------------------------------------------------------


def test_check_passes_and_says_so_in_json(unroll: Unroll) -> None:
    answer = unroll("check", "ista", *SMALL, "--json")
    told = json.loads(answer.out)
    assert answer.code == 0 and told["ok"]
    assert {"law", "measured", "reference", "verdict"} == set(told["rows"][0])


def test_check_exits_with_1_where_a_law_is_broken(unroll: Unroll, monkeypatch: pytest.MonkeyPatch) -> None:
    from unroll.laws import laws

    broken = laws.Check("x", (laws.Row("2 + 2 = 5", "4", "5", "BROKEN"),))
    monkeypatch.setattr(laws, "check", lambda *args, **settings: broken)
    answer = unroll("check", "ista")
    assert answer.code == 1 and "BROKEN" in answer.out


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    draw = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", draw.normal(size=(3, 6)))
    np.save(tmp_path / "A.npy", draw.normal(size=(6, 9)))
    return tmp_path / "x.npy", tmp_path / "A.npy"


def test_solve_writes_the_solution(unroll: Unroll, arrays: tuple[Path, Path], tmp_path: Path) -> None:
    x, a = arrays
    answer = unroll("solve", "lasso", "--input", x, "--parameter", f"A={a}", "-o", "z.npy")
    assert answer.code == 0, answer.err
    z, image = np.load(tmp_path / "z.npy"), np.load(a)
    gradient = (z @ image.T - np.load(x)) @ image
    assert z.shape == (3, 9)
    np.testing.assert_allclose(gradient[z != 0], -0.1 * np.sign(z[z != 0]), atol=1e-5)
    assert abs(gradient).max() <= 0.1 + 1e-5


def test_solve_writes_to_the_very_file(unroll: Unroll, arrays: tuple[Path, Path], tmp_path: Path) -> None:
    x, a = arrays
    assert unroll("solve", "lasso", "--input", x, "--parameter", f"A={a}", "-o", "solution").code == 0
    assert (tmp_path / "solution").is_file() and not (tmp_path / "solution.npy").exists()


def test_solve_refuses_a_tolerance_that_is_no_number(unroll: Unroll, arrays: tuple[Path, Path]) -> None:
    x, a = arrays
    shown = unroll("solve", "lasso", "--input", x, "--parameter", f"A={a}", "--tol", "nan")
    assert shown.code == 2 and "E407" in shown.err


def test_a_folder_is_not_a_spec(unroll: Unroll, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    shown = unroll("show", "mine.yaml")
    assert shown.code == 2 and "'mine.yaml' is a folder" in shown.err and "did you mean" not in shown.err


def test_a_key_that_another_form_of_a_section_has_is_not_sent_to_where_it_is(unroll: Unroll) -> None:
    assert "goes to data.train" not in unroll("show", "crate_digits", "data.train=5").err


def test_solve_exits_with_1_before_it_has_converged(unroll: Unroll, arrays: tuple[Path, Path]) -> None:
    x, a = arrays
    assert unroll("solve", "lasso", "--input", x, "--parameter", f"A={a}", "--max-iterations", "1").code == 1


def test_report_is_one_page_that_needs_nothing(unroll: Unroll, tmp_path: Path) -> None:
    assert unroll("report", "ista", *SMALL, "-o", "r.html").code == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<math" in page and page.count("<h2>") >= 4
    assert "<script" not in page and "href=" not in page and "src=" not in page
    assert len(page) < 100_000


def test_report_escapes_what_a_spec_says(unroll: Unroll, tmp_path: Path) -> None:
    unroll("report", "ista", *SMALL, "about='<script>alert(1)</script>'", "-o", "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page


# --- new, and on with it ----------------------------------------------------------------------------------------------

TINY = ("dims.m=6", "dims.n=9", "unroll.layers=2", "data.train=64", "data.validation=16", "train.epochs=1")


def test_a_new_spec_shows_checks_compiles_and_trains(unroll: Unroll, tmp_path: Path) -> None:
    made = unroll("new", "mine")
    assert made.code == 0 and (tmp_path / "mine.yaml").is_file()
    assert "W" in unroll("show", "mine.yaml").out
    checked = unroll("check", "mine.yaml")
    assert checked.code == 0, checked.out
    assert "class Mine" in unroll("compile", "mine.yaml").out
    trained = unroll("train", "mine.yaml", *TINY, "--out", "run", "-q")
    assert trained.code == 0, trained.err
    assert "mine, trained" in trained.out and "fista" in trained.out
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "spec.yaml",
        "weights.safetensors",
        "metrics.csv",
        "table.json",
    }
    again = unroll("eval", "run")
    assert again.code == 0 and "mine, trained" in again.out
    inside = unroll("eval", "run", "--white-box")
    assert inside.code == 0 and len(inside.out.splitlines()) == 1 + 2 * 3 and "held-out samples" in inside.err
    rows = unroll("eval", "run", "--white-box", "--json", "--term", "odd=log(-1 - sumsq(z))", "-q").out
    changes = {r["term"]: r["actual"] for r in json.loads(rows, parse_constant=pytest.fail)}
    assert changes.pop("odd") is None and None not in changes.values()  # the logarithm of a negative number
    assert unroll("report", "run", "-o", "run.html").code == 0
    assert "<polyline" in (tmp_path / "run.html").read_text(encoding="utf-8")


@pytest.fixture
def digits(unroll: Unroll, tmp_path: Path) -> Path:
    """A small run with hidden patches, whose masks are drawn."""
    size = ("unroll.layers=1", "train.epochs=1", "train.warmup=1", "train.batch=64")
    assert unroll("train", "crate_mae_digits", *size, "--out", "run", "-q").code == 0
    return tmp_path / "run"


def test_eval_measures_every_step_over_all_held_out_samples(unroll: Unroll, digits: Path) -> None:
    words = ("eval", digits, "--white-box", "--at", "sphere", "--term", "double=2 * norm1(Z)", "--json", "-q")
    shown = unroll(*words)
    rows = json.loads(shown.out)
    assert shown.err == "" and [r["term"] for r in rows] == 2 * [
        "expansion",
        "compression",
        "sparsity",
        "total",
        "double",
    ]
    assert unroll(*words).out == shown.out  # the masks are those of the closing table, every time
    from unroll.train.run import trained_on

    net, batches = trained_on(digits)
    image, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(batches) > 1 and len(image) == 297
    with torch.no_grad():
        trace = net.trace(image, mask)
    before, after = (torch.nn.functional.normalize(trace.steps["Z"][k], dim=-1) for k in (0, 1))
    change = 2 * (after.abs().sum((-2, -1)) - before.abs().sum((-2, -1)))
    assert rows[4]["actual"] == pytest.approx(float(change.mean()), rel=1e-4)
    assert rows[4]["improved"] == pytest.approx(float((change > 0).double().mean()))


def test_places_are_those_of_a_trace() -> None:
    from unroll.network.trace import NORMS

    assert ("iterate", *NORMS) == cli.PLACES


def test_new_does_not_overwrite_and_wants_a_name(unroll: Unroll, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious", encoding="utf-8")
    assert unroll("new", "mine").code == 2
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "precious"
    assert unroll("new", "../mine").code == 2


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "lissta"), "did you mean 'lista'?"),
        (("show", "lasso"), "add a section 'unroll:'"),
        (("show", "nothing.yaml"), "there is no file 'nothing.yaml'"),
        (("show", "lista", "unroll.layer=3"), "did you mean 'layers'?"),
        (("show", "lista", "unroll.layers=0"), "unroll.layers must be at least 1"),
        (("show", "lista", "unroll.layers=x"), "override:1:15"),
        (("show", "lista", "layers"), "KEY=VALUE"),
        (("solve", "lasso", "--input", "none.npy"), "there is no file 'none.npy'"),
        (("solve", "lasso", "--input", "a.npy", "--input", "x=b.npy"), "two files for x: 'a.npy' and 'b.npy'"),
        (("solve", "lasso", "--input", "a.npy", "--max-iterations", "0"), "0 is not in the range"),
        (("show", "crate_digits", "data.train=5"), "unknown key 'train' in data"),
        (("eval", "."), "there is no run.json"),
        (("eval", ".", "--white-box"), "there is no run.json"),
        (("eval", ".", "--at", "sphere"), "--white-box: add it"),
        (("eval", ".", "--white-box", "--term", "rate"), "--term is NAME=FORMULA"),
        (("eval", ".", "--white-box", "--term", "a=norm1(z)", "--term", "a=norm2(z)"), "two formulas are called 'a'"),
        (("report", "ista", "--term", "rate=foo(z)"), "unknown function 'foo'"),
        (("train",), "give a SPEC to train"),
        (("train", "--resume", ".", "--seed", "7"), "are those of the run that goes on"),
        (("train", "lista_cp", "-q", "--devices", "0"), "E511"),
        (("train", "lista_cp", "-q", "--devices", "9999"), "this machine has no 9999 of auto"),
        (("train", "lista_cp", "-q", "--device", "gpux"), "there is no device 'gpux'"),
        (("train", "lasso", "-q"), "section"),
        (("frob",), "No such command 'frob'"),
        (("show", "lista", "--stage", "nothing"), "'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_exits_with_2_and_a_message_on_stderr(unroll: Unroll, words: tuple[str, ...], said: str) -> None:
    answer = unroll(*words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "Traceback" not in answer.err


def spec_with(fidelity: str) -> str:
    return (
        "dims: {m: 4, n: 8}\nvariables: {z: [n]}\ninputs: {x: [m]}\nparameters: {A: [m, n]}\n"
        f"minimize:\n  fidelity: {fidelity}\nunroll: {{algorithm: gradient_descent, layers: 2}}\n"
    )


HOSTILE = {
    "import": (spec_with("sumsq(__import__('os').system('touch owned'))"), "E103"),
    "attribute": (spec_with("z.__class__.__bases__"), "E103"),
    "parentheses": (spec_with("(" * 10_000 + "z" + ")" * 10_000), "E2"),
    "brackets": (spec_with("(" * 4_000 + "z" + ")" * 4_000), "E104"),
    "tower": (spec_with("sumsq(z)**9**9**9"), "E104"),
    "tag": ("name: !!python/object/apply:os.system ['touch owned']\n", "E0"),
    "bomb": ("a: &a [1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(50)), "E0"),
    "nesting": ("a: " + "[" * 10_000 + "]" * 10_000, "E0"),
    "duplicate": ("name: a\nname: b\n", "E0"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_input_is_refused_within_a_second_and_nothing_runs(unroll: Unroll, tmp_path: Path, kind: str) -> None:
    text, code = HOSTILE[kind]
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    unroll("show", "ista", "--stage", "spec")  # libraries are loaded
    start = time.process_time()
    answer = unroll("compile", "bad.yaml")
    assert time.process_time() - start < 1
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith(f"error {code}") or f"error {code}" in answer.err
    assert not (tmp_path / "owned").exists()


def test_ctrl_c_exits_with_130(unroll: Unroll, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "stage", interrupt)
    answer = unroll("show", "ista")
    assert answer.code == 130 and answer.err.strip() == "interrupted"


def test_our_own_mistakes_ask_to_be_reported(
    unroll: Unroll, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("impossible")

    monkeypatch.setattr(stages, "stage", fail)
    with pytest.raises(AssertionError):
        unroll("show", "ista")
    assert "internal error, please report it" in capsys.readouterr().err


def test_editors_find_the_schema_of_a_new_spec(unroll: Unroll, tmp_path: Path) -> None:
    unroll("new", "mine", "--folder", tmp_path)
    head = (tmp_path / "mine.yaml").read_text().splitlines()[0]
    assert head.startswith("# yaml-language-server: $schema=") and Path(head.split("=", 1)[1]).is_file()


def test_list_needs_no_torch() -> None:
    code = "import sys; from unroll.cli import cli; cli.main(['list'], standalone_mode=False); assert 'torch' not in sys.modules"
    folder = Path(api.__file__).parents[1]
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=folder, check=False).returncode == 0
    )


@pytest.mark.parametrize(
    "words",
    [
        ("new", "mine", "--folder", "no/such/folder"),
        ("compile", "lista", "-o", "no/such/folder/net.py"),
        ("report", "nothing", "-o", "no/such/folder/r.html"),  # said before the work begins
        ("solve", "nothing", "--input", "none.npy", "-o", "no/such/folder/z.npy"),
    ],
)
def test_a_place_that_cannot_be_written_is_an_error_of_the_user(unroll: Unroll, words: tuple[str, ...]) -> None:
    shown = unroll(*words)
    assert (
        shown.code == 2 and "No such file or directory: 'no/such/folder" in shown.err and "Traceback" not in shown.err
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--input", "nope.npy"), "there is no file 'nope.npy' for x"),
        (("--input", "."), "'.' for x is a folder"),
        (("--input", "y=x.npy"), "the problem has no input 'y'"),
        (("--input", "x.npy", "--parameter", "B=A.npy"), "the problem has no parameter 'B'"),
        (("--input", "x.npy", "--parameter", "A=A.npy", "--input", "x.npy"), "two files for x"),
        (("--input", "text.npy"), "it is text, and begins '1 2 3'"),
        (("--input", "junk.npy"), "it has none of its marks"),
        (("--input", "short.npy", "--parameter", "A=A.npy"), "x has shape (3, 5), expected (..., m = 6)"),
        (("--input", "nan.npy", "--parameter", "A=A.npy"), "1 of 18 entries of x are not finite"),
        (("--input", "x.npy"), "--parameter A=FILE"),
        (("--input", "x.npy", "--parameter", "A=A.npy", "foo.bar=3"), "a spec has no 'foo.bar'"),
        (("--input", "x.npy", "--parameter", "A=A.npy", "--tol", "1e-30"), "below what torch.float64 can certify"),
    ],
)
def test_solve_says_what_is_wrong_with_what_it_is_given(
    unroll: Unroll, arrays: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    x = np.load(arrays[0])
    np.save(tmp_path / "short.npy", x[:, :5])
    x[1, 2] = np.nan
    np.save(tmp_path / "nan.npy", x)
    (tmp_path / "text.npy").write_text("1 2 3\n")
    (tmp_path / "junk.npy").write_bytes(bytes(range(200, 255)))
    shown = unroll("solve", "lasso", *words)
    assert shown.code == 2
    assert told in shown.err
    assert "internal error" not in shown.err and "give inputs in float64" not in shown.err


def test_solve_takes_whole_numbers_and_a_batch_of_none(
    unroll: Unroll, arrays: tuple[Path, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "int.npy", np.arange(18).reshape(3, 6))
    np.save(tmp_path / "none.npy", np.zeros((0, 6)))
    for name, count in (("int", 3), ("none", 0)):
        shown = unroll("solve", "lasso", "--input", f"{name}.npy", "--parameter", "A=A.npy", "-o", "z.npy")
        assert shown.code == 0, shown.err
        assert np.load(tmp_path / "z.npy").shape == (count, 9)
