"""README.md and docs/: every block of Python and of commands is run, every generated table is what the code says.

```console blocks: `$ command`, then what it prints; a line `...` stands for any lines. A block after `<!-- not run -->`
takes too long. A ```yaml block whose first line is `# NAME.yaml` is a file that commands find; one of `# specs/NAME.yaml` is that file.
`make goldens` rewrites all.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from unroll import cli, load
from unroll.derivation.algorithms import every
from unroll.derivation.rewrites.catalogue import REWRITES
from unroll.language.functions import ELEMENTWISE, FUNCTIONS, SETS
from unroll.spec import library
from unroll.spec.schema import Parameter, Train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<mark><!-- not run -->\n+)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture
def folder(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the specs that the page shows."""
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.finditer(read(page)):
        name = re.match(r"# (\w+\.yaml)\n", block["body"])
        if block["kind"] == "yaml" and name:
            (tmp_path / name[1]).write_text(block["body"], encoding="utf-8")
    return tmp_path


@pages
def test_files_are_shown_as_they_are(page: Path, update_goldens: bool) -> None:
    text = read(page)
    for found in re.finditer(r"^```yaml\n# (specs/\S+\.yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        own = read(ROOT / found[1])
        if update_goldens:
            text = text.replace(found[0], f"```yaml\n# {found[1]}\n{own}```")
        else:
            assert found[2] == own, f"make goldens: {found[1]}"
    if update_goldens:
        page.write_text(text, encoding="utf-8")


# --- Python -----------------------------------------------------------------------------------------------------------


@pages
def test_python_blocks_run(page: Path, folder: Path) -> None:
    for example in Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"]).parse(page).examples():
        example.evaluate()


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """start, end: where its output stands in the page."""

    words: str
    output: str
    start: int
    end: int


def commands(text: str) -> Iterator[Command]:
    for block in BLOCK.finditer(text):
        if block["kind"] != "console" or block["mark"]:
            continue
        for found in re.finditer(r"^\$ (?P<words>.*)\n(?P<output>(?:(?!\$ ).*\n)*)", block["body"], re.MULTILINE):
            at = block.start("body")
            yield Command(found["words"], found["output"], at + found.start("output"), at + found.end("output"))


Shell = Callable[[str], str]


@pytest.fixture
def shell(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """What a line prints, on both streams. `unroll` runs in this process, which has loaded its libraries."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(line: str) -> str:
        first, _, rest = line.partition(" | ")
        monkeypatch.setattr("sys.argv", shlex.split(first))
        assert sys.argv[0] == "unroll", line
        with contextlib.suppress(SystemExit):
            cli.main()
        shown = capsys.readouterr()
        text = shown.err + shown.out
        if rest:
            text = subprocess.run(rest, shell=True, input=text, check=True, capture_output=True, text=True).stdout
        return "".join(f"{row.rstrip()}\n" for row in text.splitlines())

    return run


ROUNDING = re.compile(r"\d(?:\.\d+)?e[-+]\d\d")
"""Errors of rounding differ between machines."""


def matches(shown: str, printed: str) -> bool:
    parts = [re.escape(ROUNDING.sub("~", part)) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    return re.fullmatch("(?:.*\n)*".join(parts), ROUNDING.sub("~", printed)) is not None


def test_three_dots_stand_for_any_lines() -> None:
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n") and matches("a\n...\n", "a\n")
    assert not matches("a\n...\nd\n", "a\nb\nc\n") and not matches("a\n", "a\nb\n")


def test_errors_of_rounding_may_differ() -> None:
    assert matches("worst 1e-15 of 8\n", "worst 3.1e-16 of 8\n") and not matches(
        "worst 1e-15 of 8\n", "worst 1e-15 of 9\n"
    )


@pages
def test_commands_print_what_the_page_shows(page: Path, shell: Shell, update_goldens: bool) -> None:
    text = read(page)
    for command in reversed(list(commands(text))) if update_goldens else commands(text):
        printed = shell(command.words)
        if update_goldens and "...\n" not in command.output:
            text = text[: command.start] + printed + text[command.end :]
        else:
            if not matches(command.output, printed):
                pytest.fail(f"{page.name} shows something else than\n$ {command.words}\n{printed}", pytrace=False)
    if update_goldens:
        page.write_text(text, encoding="utf-8")


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def functions() -> str:
    return table("function | meaning", ((f"`{f.signature}`", f.about) for f in FUNCTIONS))


def elementwise() -> str:
    return table("function | meaning", ((f"`{f.name}({', '.join('uv'[: f.arity])})`", f.about) for f in ELEMENTWISE))


def sets() -> str:
    names = {"matrix": "M", "vector": "v", "number": "a", "size": "n", "axis": "axis"}
    shown = ((s.name + (f"({', '.join(names[k] for k in s.kinds)})" if s.kinds else ""), s.about) for s in SETS)
    return table("after `in` | meaning", ((f"`{signature}`", about) for signature, about in shown))


def algorithms() -> str:
    return table(
        "algorithm | one step | needs | source", ((f"`{a.name}`", a.about, a.needs, a.source) for a in every())
    )


def rewrites() -> str:
    rows = (
        (
            f"`{r.signature}`",
            r.picture,
            r.result,
            f"{r.kind}{f': assumes {r.assumes}' if r.assumes else ''}",
            r.error or "none",
        )
        for r in REWRITES
    )
    return table("rewrite | before | after | kind | error", rows)


def training() -> str:
    fields = Train.model_fields
    return table(
        "`train:` | default",
        ((f"`{f.alias or n}`", f"`{f.default}`" if f.default is not None else "") for n, f in fields.items()),
    )


def parameters() -> str:
    fields = Parameter.model_fields
    return table(
        "property | meaning", ((f"`{n}`", f.description or n) for n, f in fields.items() if n not in ("shape", "about"))
    )


def specs() -> str:
    def row(name: str) -> tuple[str, ...]:
        spec = load(name)
        assert spec.unroll is not None
        schemes = (spec.unroll, *spec.unroll.blocks)
        learned = ", ".join(f"`{n}`" for s in schemes for n in s.learn) or "nothing"
        algorithm = spec.unroll.algorithm or ", ".join(
            dict.fromkeys(b.algorithm or "declared" for b in spec.unroll.blocks)
        )
        link = f"[{name}](specs/{name}.yaml)"
        return link, spec.objective or "its own", algorithm, str(spec.unroll.layers), learned, spec.source

    return table("spec | objective | algorithm | layers | learned | source", map(row, library.names("specs")))


def networks() -> str:
    """How long each spec is, and what of its layer is not derived."""

    def row(name: str) -> tuple[str, ...]:
        spec = load(name)
        assert spec.unroll is not None
        lines = read(ROOT / "specs" / f"{name}.yaml").splitlines()
        schemes = (spec.unroll, *spec.unroll.blocks)
        said = [f"`{u}`" for s in schemes for u in s.updates]
        said += [
            f"`{n}` {'fixed' if w.fixed else 'drawn'}"
            for s in schemes
            for n, w in s.learn.items()
            if w.fixed or w.init not in ("value", "data")
        ]
        said += [r.partition("(")[0].strip() for s in schemes for r in s.rewrites]
        said += [word for s in schemes for word, there in (("gauge", s.gauge), ("norm", s.normalise)) if there]
        said += [
            f"{b.block} declared" if b.algorithm is None else "surrogate"
            for b in spec.unroll.blocks
            if b.algorithm is None or b.surrogate
        ]
        written = sum(bool(line.strip()) and not line.startswith("#") for line in lines)
        return f"[{name}](../specs/{name}.yaml)", str(written), ", ".join(dict.fromkeys(said)) or "nothing", spec.about

    return table("spec | lines | beside what is derived | about", map(row, library.names("specs")))


def measured() -> str:
    """The numbers of benchmarks/results/."""
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    found: dict[str, list[dict[str, Any]]] = {path.stem: json.loads(read(path))["rows"] for path in files}
    speed = [row for row in found["lista_speed"] if "ratio" in row]
    memory, imports, compiled = found["memory"], found["import_time"], found["compile_time"]
    rows = [
        (
            f"{what}: emitted LISTA / a module written by hand, {len(ratios)} sizes",
            f"{min(ratios):.2f} to {max(ratios):.2f} of its time",
        )
        for what in ("forward", "forward and backward")
        if (ratios := [float(row["ratio"]) for row in speed if row["what"] == what])
    ]
    rows += [
        (
            f"kept for backward per layer, {row['m x n']}, batch {row['batch']}: emitted; plain autograd",
            f"{row['emitted, bytes per layer'] / 1e6:.2f} MB; {row['textbook, bytes per layer'] / 1e6:.2f} MB",
        )
        for row in memory
    ]
    rows += [(f"`{row['command']}`", f"{row['median s']:.2f} s") for row in imports if "unroll" in row["command"]]
    for kind in ("cold", "cached"):
        seconds = [float(row[f"{kind}, processor s"]) for row in compiled]
        spread = f"{min(seconds):.2f} to {max(seconds):.2f} s, {statistics.median(seconds):.2f} s in the median"
        rows.append((f"`unroll.compile` of a shipped spec, {kind}; the longest draws its parameters", spread))
    rows += _speed(found)
    rows += _sparse_coding(found["sparse_coding"])
    rows += _white_box(found)
    return table("what | measured", iter(rows))


def _sparse_coding(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One row for each network: of fresh samples if it was measured on them, the median over its seeds."""
    of: dict[str, list[dict[str, Any]]] = {}
    for row in (r for r in rows if r["setting"] == "10 % nonzeros"):
        of.setdefault(row["network"], []).append(row)
    found: list[tuple[float, str]] = []
    for network, own in of.items():
        fresh = [r for r in own if r["measured on"] == "fresh samples"] or own
        seeds = sum(len(r["seeds"]) for r in fresh)
        said = f"{network}, {fresh[0]['measured on']}, {seeds} seed{'s' if seeds > 1 else ''}"
        found.append((statistics.median(float(r["NMSE (dB)"]) for r in fresh), said))
    of_codes = "NMSE of noiseless codes at depth 16, m = 250, n = 500 ([how](benchmarks/results/sparse_coding.md))"
    return [(f"{of_codes}: {said}", f"{value:.1f} dB") for value, said in sorted(found, reverse=True)]


def _speed(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Networks against what experts write by hand."""
    for row in (r for r in found["crate_speed"] if r["module"] == "emitted"):
        ratio = row["ratio to by hand, explicit attention"]
        yield (
            f"CRATE-{row['size']}, {row['what']}, batch {row['batch']}: emitted / a module written by hand",
            f"{ratio:.2f} of its time",
        )
    for row in (r for r in found["rate_reduction"] if r["module"] == "emitted"):
        about = f"rate reduction of {row['classes']} classes of {row['samples of each']} samples, value and slope"
        yield f"{about}: emitted / a loop over the classes", f"{row['ratio to by hand, labels']:.2f} of its time"
    construct = [r for r in found["redunet_construct"] if r["module"] == "emitted"]
    ratios = [r["ratio to by hand, explicit inverses"] for r in construct]
    yield (
        f"ReduNet built from data, d = {', '.join(str(r['d']) for r in construct)}: emitted / a loop of explicit inverses",
        f"{min(ratios):.2f} to {max(ratios):.2f} of its time",
    )
    mixers = found["token_mixers"]
    for name in ("softmax, explicit", "attention_only, emitted", "tost, emitted"):
        own = [r for r in mixers if r["mixer"] == name and r["what"] == "forward and backward"]
        last = max(own, key=lambda r: r["N"])
        yield f"{name}, forward and backward, {last['N']:,} tokens", f"{last['ms'] / 1e3:.2f} s, {last['MB']:,.0f} MB"


def _white_box(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    for row in found["redunet"]:
        rate = (
            f"{row['rate reduction, first']:.2f} to {row['last']:.2f}, {row['falls']} falls in {row['layers']} layers"
        )
        test = "" if row["test after"] == "-" else f"; test {row['test before']:.1%} to {row['test after']:.1%}"
        right = f"nearest subspace: train {row['train before']:.1%} to {row['after']:.1%}{test}"
        yield f"rate reduction of {row['data']}, {row['features']}", f"{rate}; {right}"
    for row in (r for r in found["text_models"] if r["lr"] == found["text_models"][0]["lr"]):
        name = "a plain GPT block" if row["network"] == "gpt" else f"`{row['network']}`"
        yield (
            f"Python documentation, held out: {name}, {row['parameters']:,} parameters",
            f"{row['bits per character']:.2f} bits per character after {row['steps']:,} steps",
        )
    for row in found["generation"]:
        kept, full = row["tokens/s, kept"], row["tokens/s, full"]
        said = f"tokens per second after {row['tokens']:,} tokens, `{row['network']}` of width 256, 6 layers: kept; full passes"
        yield said, f"{kept:.0f}; {full:.1f}"
    looks = found["segmentation"]
    for name in dict.fromkeys(r["network"] for r in looks):
        row = max((r for r in looks if r["network"] == name), key=lambda r: r["one head"])
        said = (
            "" if row["layer"] == "-" else f", layer {row['layer']}; best head of each image {row['best of each']:.2f}"
        )
        yield f"Jaccard with a digit among clutter: {name}", f"{row['one head']:.2f}{said}"
    changes = found["white_box"]
    for term, tokens in dict.fromkeys((r["term"], r["tokens"]) for r in changes):
        own = [r for r in changes if (r["term"], r["tokens"]) == (term, tokens)]
        good = sum(r["improves"] == "yes" for r in own)
        yield f"`crate_digits`, {own[0]['half']} halves that improve {term}, tokens {tokens}", f"{good} of {len(own)}"


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (functions, elementwise, sets, algorithms, rewrites, training, parameters, specs, networks, measured)
}


@pages
def test_tables_are_what_the_code_says(page: Path, update_goldens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = read(page)
    for name, rows in re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL):
        if update_goldens:
            text = text.replace(f"<!-- table: {name} -->\n{rows}", f"<!-- table: {name} -->\n{TABLES[name]()}")
        else:
            assert rows == TABLES[name](), "make goldens"
    if update_goldens:
        page.write_text(text, encoding="utf-8")
