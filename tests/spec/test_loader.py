"""Strict YAML: what values mean, where they stand, what is refused."""

import pytest
import yaml

from unroll.errors import SpecError
from unroll.spec.loader import parse
from unroll.spec.nodes import Entries, Scalar, node_at, plain


def value(text: str) -> object:
    node = plain(parse(f"v: {text}\n", "a.yaml"))
    assert isinstance(node, dict)
    return node["v"]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-3", 1e-3), ("1E3", 1000.0), ("-.5", -0.5), ("3.", 3.0), ("+7", 7), ("0x1f", 31), ("0o17", 15), ("010", 10),
        ("1_000", "1_000"), ("12:30:00", "12:30:00"), ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("1/2", "1/2"),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("n", "n"), ("=", "="),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("'it''s'", "it's"), ('"\\u03bb"', "λ"), ("A @ z", "A @ z"), ("x#y", "x#y"), ("a  # note", "a"), ("-x", "-x"),
        ("lam * norm1(z)  # l1", "lam * norm1(z)"), ("[m, n]", ["m", "n"]), ("{a: 1}", {"a": 1}), ("[]", []),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2_reads_them(text, meaning):
    assert value(text) == meaning
    assert type(value(text)) is type(meaning)


TEXT = """\
block: |
  x - A @ z
    + ll1(z)

  - foo
fold: >-
  one
  two three
plain: first
  second
quoted: "A @ ll1"
single: 'A @ ll1'
escaped: "\\u03bb + ll1"
deep:
  - - {λ: A @ ll1}
"R(Y)": ll1
"""


@pytest.mark.parametrize(
    ("path", "word", "line", "column"),
    [
        (("block",), "A", 2, 7), (("block",), "ll1", 3, 7), (("block",), "foo", 5, 5), (("fold",), "three", 8, 7),
        (("plain",), "second", 10, 3), (("quoted",), "ll1", 11, 14), (("single",), "ll1", 12, 14),
        (("deep", 0, 0, "λ"), "ll1", 15, 15), (("R(Y)",), "ll1", 16, 9),
    ],
)  # fmt: skip
def test_a_place_in_a_value_is_a_place_in_the_file(path, word, line, column):
    node = node_at(parse(TEXT, "a.yaml"), path)
    assert isinstance(node, Scalar)
    where = node.origin.where(str(node.value).index(word), len(word))
    assert (where.line, where.column, where.length) == (line, column, len(word))
    assert where.excerpt[where.column - 1 :].startswith(word)


def test_a_value_with_escapes_is_cited_whole():
    node = node_at(parse(TEXT, "a.yaml"), ("escaped",))
    assert isinstance(node, Scalar)
    where = node.origin.where(4, 3)
    assert where.excerpt[where.column - 1 :][: where.length] == '"\\u03bb + ll1"'


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems_give_the_same_places(line_end):
    root = parse(TEXT.replace("\n", line_end), "a.yaml")
    assert plain(root) == plain(parse(TEXT, "a.yaml"))
    node = node_at(root, ("R(Y)",))
    assert isinstance(node, Scalar)
    assert node.origin.where().line == 16


def test_keys_have_places():
    root = parse("a: {b: 1,\n  c: 2}\n", "a.yaml")
    assert isinstance(root, Entries)
    inner = root.get("a")
    assert isinstance(inner, Entries)
    assert str(inner.entries["c"][0].where()) == "a.yaml:2:3"


def test_a_byte_order_mark_is_not_a_character():
    assert plain(parse(b"\xef\xbb\xbfa: 1\n", "a.yaml")) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("c: *x + 1", "E014"), ("c: &x 1", "E014"), ("c: !x 1", "E015"), ("c: !<tag:x> 1", "E015"),
        ("? {a: b}\n: 1", "E016"),
        ("c: |x\n y", "E021"), ("c: >= 0", "E021"), ('c: "a" + b', "E021"), ("c: 'U'*U == I", "E021"),
        ("c: {b: @x}", "E021"),
        ("c: a: b", "E022"), ("c: x ? y : z", "E022"), ("c: a @ # b", "E023"), ("c: (a\n  + b # c", "E023"),
        ("c: [norm(x,1) <= 1]", "E024"), ("c: {r: box(0, 1)}", "E024"), ('c: "\\UFFFFFFFF"', "E010"), ("c: ]", "E010"),
        ("a: 1\n  b: 2", "E010"), ("%TAG ! x\n---\na: 1", "E010"), ("a: x\n\tb: 2", "E018"),
        ("a: 1\n---\nb: 2", "E019"),
        ("a: -.INF", "E020"), ("a: 1e400", "E020"), ("a: " + "9" * 5000, "E020"), ("a: \x7f", "E026"),
        ("\x85\x00", "E026"),
        ("# only\n", "E011"), ("---\n", None), ("a: 'ok' # no: no", None), ("a: b, c", None), ("a: [b, (c)]", None),
    ],
)  # fmt: skip
def test_traps_have_codes(text, code):
    if code is None:
        parse(text, "a.yaml")
        return
    with pytest.raises(SpecError) as caught:
        parse(text, "a.yaml")
    assert caught.value.code == code
    assert caught.value.where is not None


@pytest.mark.parametrize("text", ["a: 1\nb: [2, {c: d}]\n", "a: 'x'\nb: |\n  y\n", "- 1\n- {a: 2.5, b: true}\n"])
def test_plain_files_mean_what_they_mean_to_others(text):
    assert plain(parse(text, "a.yaml")) == yaml.safe_load(text)
