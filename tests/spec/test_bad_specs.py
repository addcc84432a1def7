"""Every file of bad_specs/ is refused, at once, with the message that its first line states."""

import time
from pathlib import Path

import pytest

from unroll.derivation.blocks import derive
from unroll.derivation.learning import parametrise
from unroll.errors import SpecError
from unroll.language.problem import from_spec
from unroll.spec import load

HERE = Path(__file__).parent / "bad_specs"
FILES = sorted(HERE.glob("*.yaml"))
SECONDS = 5.0
"""Of CPU time, on a machine that others use too; a derivation that runs away takes minutes."""
DEEP = "(" * 10_000 + "z" + ")" * 10_000
LASSO = "use: lasso\n"
GOOD = """
use: lasso
dims: {m: 4, n: 8}
unroll:
  algorithm: proximal_gradient
  layers: 2
  learn: {theta: {replaces: step * lam, positive: true}}
"""


def read(source: str | Path) -> None:
    """Everything that is done with a spec before its network is built."""
    spec = load(source)
    problem = from_spec(spec)
    if spec.unroll:
        parametrise(derive(problem, spec), problem, spec)


@pytest.fixture(scope="module", autouse=True)
def a_good_spec_is_accepted() -> None:
    """The difference is the mistake; and what is loaded when first needed is loaded."""
    read(GOOD)


def refusal(source: str | Path) -> SpecError:
    """What `source` is refused with. Fails if it is accepted, or after too long."""
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        read(source)
    assert time.process_time() - start < SECONDS
    return caught.value


def stated(e: SpecError) -> str:
    return f"# error {e.code}{f' at {e.where.line}:{e.where.column}' if e.where else ''}: {e.message}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_bad_spec_gets_exactly_its_message(path, capfd):
    first, _, _ = path.read_bytes().partition(b"\n")
    error = refusal(path)
    assert stated(error) == first.decode()
    assert str(error).startswith(error.headline)
    assert capfd.readouterr() == ("", "")  # nothing that a spec says was executed


def test_there_are_many():
    assert len(FILES) >= 100


LARGE = {
    "deep parentheses": (f"objective: a\nvariables: {{z: [3]}}\nminimize: '{DEEP}'\n", "E205"),
    "deep parentheses that fit": (f"objective: a\nvariables: {{z: [3]}}\nminimize: '{DEEP[7000:13000]}'\n", "E104"),
    "deep lists": (LASSO + "model: " + "[" * 10_000, "E017"),
    "deep mappings": (LASSO + "model: " + "{a: " * 10_000, "E017"),
    "deep blocks": (LASSO + "\n".join(" " * i + "a:" for i in range(400)), "E017"),
    "deep signs": ("objective: a\nvariables: {z: [3]}\nminimize: norm1(" + "-" * 5_000 + "z)\n", "E104"),
    "long sum": ("objective: a\nvariables: {z: [3]}\nminimize: norm1(z" + "+z" * 4_900 + ")\n", "E104"),
    "long chain of attributes": ("objective: a\nvariables: {z: [3]}\nminimize: norm1(z" + ".T" * 4_900 + ")\n", "E104"),
    "many values": (LASSO + "tags: [" + "a," * 20_000 + "]", "E017"),
    "long file": (LASSO + "about: " + "x" * 200_000, "E017"),
    "long value": (LASSO + "about: " + "x" * 90_000, "E205"),
    "long name": (LASSO + "dims: {" + "x" * 1_000 + ": 3}", "E206"),
    "many aliases": ("a: &a [x]\n" + "b: *a\n" * 9_000, "E014"),
    "many errors": (LASSO + "".join(f"k{i}: 1\n" for i in range(1_000)), "E201"),
}


@pytest.mark.parametrize(("text", "code"), LARGE.values(), ids=LARGE)
def test_large_specs_are_refused_at_once(text, code):
    assert refusal(text).code == code


def restate() -> None:
    """Write the present messages into the first lines, to be read in the diff: python tests/spec/test_bad_specs.py"""
    read(GOOD)
    for path in FILES:
        _, _, rest = path.read_bytes().partition(b"\n")
        path.write_bytes(stated(refusal(path)).encode() + b"\n" + rest)


if __name__ == "__main__":
    restate()
