"""Whatever comes in, `load` returns a spec or says what is wrong with it."""

import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from unroll.errors import SpecError, Where
from unroll.spec import Spec, load
from unroll.spec.schema import Document

QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=200)
KEYS = st.sampled_from(sorted(Document.model_fields)) | st.text(max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(LEAVES, lambda s: st.lists(s, max_size=4) | st.dictionaries(KEYS, s, max_size=4), max_leaves=12)
YAMLISH = st.text(alphabet="abz:{}[],-?!&*|>'\"%@`# \n\t\\~0159.e<=()", max_size=60)
GOOD = "use: lasso\ndims: {m: 64, n: 256}\nunroll:\n  algorithm: a\n  layers: 16\n  learn: {W: {replaces: A.T}}\n"


def outcome(source: bytes | str | dict[str, object], overrides: tuple[str, ...] = ()) -> None:
    try:
        assert isinstance(load(source, overrides), Spec)
    except SpecError as e:
        for error in (e, *e.others):
            assert error.code.startswith(("E0", "E2"))
            assert not error.where or inside(error.where)
        told = str(e)
        assert not any(c in told for c in "\x00\x1b\x07")


def inside(where: Where) -> bool:
    """The caret stands in the line, or right behind it."""
    return where.line >= 1 and 1 <= where.column <= len(where.excerpt) + 1 and where.length >= 1


@QUIET
@given(st.binary(max_size=200))
@example(b"\xff\xfe\x00")
@example(b"")
def test_random_bytes(data):
    outcome(data)


@QUIET
@given(YAMLISH)
@example('"\\UFFFFFFFF"')
@example("? ")
def test_text_made_of_what_yaml_minds(text):
    outcome(text.encode())


@settings(QUIET, max_examples=100)
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_random_trees(tree):
    outcome(tree)


@QUIET
@given(st.integers(0, len(GOOD)), st.integers(0, 5), YAMLISH)
def test_a_good_spec_with_a_stretch_replaced(at, cut, text):
    outcome((GOOD[:at] + text + GOOD[at + cut :]).encode())


@QUIET
@given(st.text(alphabet=string.printable, max_size=40) | st.builds("train.lr={}".format, YAMLISH))
def test_random_overrides(text):
    outcome(GOOD, (text,))


@QUIET
@given(st.text(min_size=1, max_size=30))
def test_random_names(name):
    outcome({"use": name})


@pytest.mark.parametrize("text", [GOOD[:n] for n in range(0, len(GOOD), 3)])
def test_every_beginning_of_a_good_spec(text):
    outcome(text.encode())


@QUIET
@given(st.text(max_size=60))
@example("\x85")
@example("\u2028 \ufeff")
def test_every_text_is_kept_as_it_is_or_refused(text):
    try:
        spec = load({"use": "lasso", "about": text})
    except SpecError as e:
        assert e.code == "E026"  # control characters
    else:
        assert spec.about == text
        assert load(spec.to_yaml()).about == text
