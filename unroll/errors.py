"""What a user is told when something is wrong: where, what, and what to write instead.

Every message has a code. `explain(code)` prints its page from `explain.md`, which lies beside this file.
Standard library only: this module is imported by everything.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WIDTH = 100  # columns of an excerpt; longer lines are cut around the caret
MORE_AT = 66  # column of "more: unroll explain CODE" when the hint leaves room for it


@dataclass(frozen=True)
class Where:
    """A stretch of one line of a file. line, column: from 1. excerpt: that line of the file, whole."""

    file: str
    line: int
    column: int
    length: int
    excerpt: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class UnrollError(Exception):
    """Base of every error that is the user's to mend: `str(e)` is the whole message, ready to print."""

    def __init__(
        self, code: str, message: str, where: Where | None = None, hint: str = "", notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(code, message, where, hint, notes)
        self.code, self.message, self.where, self.hint, self.notes = code, message, where, hint, notes

    @property
    def headline(self) -> str:
        """The first line: `error E131: A @ z does not fit`."""
        return f"{'warning' if self.code.startswith('W') else 'error'} {self.code}: {printable(self.message)}"

    def __str__(self) -> str:
        return "\n".join(_render(self))


class SpecError(UnrollError):
    """A spec says something that it may not say, at a place in a file.

    others: further errors of the same file, found in the same pass; they print after this one.
    """

    def __init__(
        self,
        code: str,
        message: str,
        where: Where | None = None,
        hint: str = "",
        notes: tuple[str, ...] = (),
        others: tuple[SpecError, ...] = (),
    ) -> None:
        super().__init__(code, message, where, hint, notes)
        self.args = (code, message, where, hint, notes, others)
        self.others = others

    @classmethod
    def together(cls, errors: Iterable[SpecError]) -> SpecError:
        """One error that prints all of `errors`, the first in the file first."""
        first, *rest = sorted(errors, key=lambda e: (e.where.line, e.where.column) if e.where else (0, 0))
        return cls(first.code, first.message, first.where, first.hint, first.notes, (*first.others, *rest))

    def __str__(self) -> str:
        return "\n\n".join("\n".join(_render(e)) for e in (self, *self.others))


class DeriveError(UnrollError):
    """Mathematics that cannot be done: the formula, the reason, the nearest thing that works."""

    def __init__(self, code: str, message: str, hint: str = "", notes: tuple[str, ...] = ()) -> None:
        super().__init__(code, message, None, hint, notes)
        self.args = (code, message, hint, notes)

    def located(self, where: Where | None) -> SpecError:
        """The same message with the place in the spec that asked for it."""
        return SpecError(self.code, self.message, where, self.hint, self.notes)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A hint that names the nearest candidate: "did you mean 'x'?", or "" if nothing is near."""
    names = sorted(set(candidates))
    lower = {name.lower(): name for name in reversed(names)}
    if word.lower() in lower:
        return f"did you mean '{lower[word.lower()]}'?"
    near = difflib.get_close_matches(word[:80], names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else ""


def quote(text: str, most: int = 60) -> str:
    """The user's own words within a message, on one line, cut to `most` characters."""
    flat = " ".join(printable(text[: 4 * most]).split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def printable(text: str) -> str:
    """Text with control characters (terminal escapes, bells, direction marks) shown as '�'."""
    return "".join(c if c in "\n " or unicodedata.category(c)[0] not in "CZ" else _stand_in(c) for c in text)


def _stand_in(c: str) -> str:
    return " " if c == "\t" or unicodedata.category(c) == "Zs" else "�"


def _render(e: UnrollError) -> list[str]:
    pad = " " * (len(str(e.where.line)) + 2 if e.where else 3)
    lines = [e.headline]
    if e.where:
        lines += [f"{pad[:-1]}--> {printable(str(e.where))}", *_frame(e.where, pad)]
    lines += [f"{pad}= {part}" for note in e.notes for part in printable(note).splitlines()]
    more = f"more: unroll explain {e.code}"
    *head, last = [f"{pad}{mark} {part}" for mark, part in _hint_lines(e.hint)] or [f"{pad}= {more}"]
    if e.hint:
        last = f"{last:{MORE_AT}}{more}" if _columns(last) < MORE_AT - 2 else f"{last}   {more}"
    return [*lines, *head, last]


def _hint_lines(hint: str) -> list[tuple[str, str]]:
    first, *rest = printable(hint).splitlines() or [""]
    return [("=", f"hint: {first}"), *((" ", f"      {part}") for part in rest)] if hint else []


def _frame(where: Where, pad: str) -> list[str]:
    start = max(where.column - 1, 0)
    left = max(0, start - WIDTH // 2) if len(where.excerpt) > WIDTH else 0
    line = where.excerpt[left : left + WIDTH]
    marked = line[start - left : start - left + where.length]
    before = " " * _columns(printable(line[: start - left]))
    head, tail = "..." if left else "", "..." if left + WIDTH < len(where.excerpt) else ""
    caret = "^" * max(_columns(printable(marked)), 1)
    return [
        f"{pad}|",
        f" {where.line} | {head}{printable(line)}{tail}".rstrip(),
        f"{pad}| {' ' * len(head)}{before}{caret}",
    ]


def _columns(text: str) -> int:
    """Columns that text takes in a terminal: wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@cache
def codes() -> dict[str, str]:
    """Every code with its page, from explain.md, in order."""
    text = Path(__file__).with_name("explain.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (?=[EW]\d{3} )", text, flags=re.MULTILINE)[1:]
    return {part[:4]: part.strip() for part in parts}


def explain(code: str) -> str:
    """The page of one code: its title, what it means, an example of wrong and right. Raises SpecError E005."""
    page = codes().get(code.strip().upper())
    if page is None:
        raise SpecError("E005", f"there is no code '{quote(code)}'", hint=did_you_mean(code.upper(), codes()))
    return page
