"""The pages of the codes, and what a message looks like."""

import pickle
import re
from pathlib import Path

import pytest

import unroll
from unroll.errors import DeriveError, SpecError, Where, codes, did_you_mean, explain, quote

SOURCES = [path for path in Path(unroll.__file__).parent.rglob("*.py") if "_library" not in path.parts]
RAISED = {code for path in SOURCES for code in re.findall(r"[\"']([EW]\d{3})[\"']", path.read_text(encoding="utf-8"))}
PLACE = Where("my_spec.yaml", 9, 29, 5, "  fidelity: 1/2 * sumsq(x - A @ z)")
MISFIT = SpecError(
    "E131",
    "A @ z does not fit: A is m × n = 64 × 256, z is 128",
    PLACE,
    "declare z as [n], or A as [m, k]",
    ("z was declared [k] on line 5 with k = 128",),
)


def test_every_code_that_is_raised_has_a_page_and_every_page_a_code():
    assert set(codes()) == RAISED


def test_pages_are_in_order_and_named():
    assert list(codes()) == sorted(codes())
    assert all(re.match(rf"{code} \S", page) for code, page in codes().items())


def test_an_unknown_code_is_refused():
    with pytest.raises(SpecError, match="there is no code 'E999'"):
        explain("E999")


def test_a_message_shows_place_excerpt_caret_note_and_hint():
    assert str(MISFIT).splitlines() == [
        "error E131: A @ z does not fit: A is m × n = 64 × 256, z is 128",
        "  --> my_spec.yaml:9:29",
        "   |",
        " 9 |   fidelity: 1/2 * sumsq(x - A @ z)",
        "   |                             ^^^^^",
        "   = z was declared [k] on line 5 with k = 128",
        "   = hint: declare z as [n], or A as [m, k]                       more: unroll explain E131",
    ]


def test_the_caret_stands_below_wide_and_combining_letters():
    line = "  变量 + e\u0301 + ll1(z)"
    where = Where("a.yaml", 123, line.index("ll1") + 1, 3, line)
    excerpt, caret = str(SpecError("E102", "unknown", where)).splitlines()[3:5]
    assert caret.rstrip().endswith("^^^")
    assert caret.index("^") == excerpt.index("ll1") + 2 - 1  # two wide letters, one combining mark


def test_a_long_line_is_cut_around_the_caret():
    where = Where("a.yaml", 1, 5001, 3, "x" * 5000 + "ll1" + "y" * 5000)
    excerpt, caret = str(SpecError("E102", "unknown", where)).splitlines()[3:5]
    assert len(excerpt) < 120
    assert excerpt[caret.index("^") :][:3] == "ll1"


def test_terminal_escapes_of_a_file_do_not_reach_the_terminal():
    where = Where("\x1b[2Ja.yaml", 1, 1, 1, "\x1b[31mred\u202e")
    text = str(SpecError("E100", "bad \x07", where, "\x1b]0;", ("\x9b",)))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_errors_of_one_file_print_together_in_the_order_of_the_file():
    late = SpecError("E201", "late", Where("f", 7, 1, 1, ""))
    early = SpecError("E203", "early", Where("f", 2, 1, 1, ""))
    both = SpecError.together([late, early])
    assert (both.code, both.others) == ("E203", (late,))
    assert str(both).index("early") < str(both).index("late")


def test_a_derivation_error_gets_its_place_later():
    located = DeriveError("E302", "no prox", "add a square", ("why",)).located(PLACE)
    assert (located.where, located.hint, located.notes) == (PLACE, "add a square", ("why",))


@pytest.mark.parametrize("error", [MISFIT, SpecError.together([MISFIT, MISFIT]), DeriveError("E302", "no", "h")])
def test_errors_survive_pickling(error):
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("word", "nearest"), [("ll1", "l1"), ("LogDet", "logdet"), ("lamda", "lam_da"), ("zzz", ""), ("", "")]
)
def test_did_you_mean(word, nearest):
    assert did_you_mean(word, ["l1", "logdet", "lam_da"]) == (f"did you mean '{nearest}'?" if nearest else "")


def test_quoted_words_are_short_and_on_one_line():
    assert quote("a\n  b\t" + "c" * 1000) == "a b " + "c" * 53 + "..."
