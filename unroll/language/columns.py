"""Lines and tables of text that fit a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

WIDTH = 80
LEAST = 24
"""No column is made narrower than that."""


def counted(n: int | str, noun: str) -> str:
    """1 layer, 2 layers."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def wrapped(text: str, width: int, hang: int = 2) -> list[str]:
    """The text in lines of at most `width`, those after the first moved in; a formula breaks where it binds least.

    A part without a space that is longer stays whole.
    """
    lines: list[str] = []
    while len(text) > width:
        at = _break(text, width)
        if at is None:
            break
        lines.append(text[:at].rstrip())
        text = " " * hang + text[at:].lstrip()
    return [*lines, text]


def _break(text: str, width: int) -> int | None:
    """The space to break at: outside brackets and norms, before a sign or after a comma, and late; past `width` if need be."""
    depth, best, at = 0, None, None
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c != " " or not text[:i].strip():
            continue
        if i > width and at is not None:
            break
        loose = 0 if text[i + 1] in "+−" or text[i - 1] in ";,: " else 1 if text[i + 1] == "(" else 2
        rank = (2 * (depth + text[:i].count("‖") % 2) + loose + 6 * (i < width // 2), -i)
        if best is None or rank <= best:
            best, at = rank, i
    return at


def table(rows: Iterable[tuple[str, ...]], width: int = WIDTH) -> list[str]:
    """Columns three spaces apart; where they do not fit, the widest are narrowed and their cells go on below."""
    return [line for lines in table_rows(rows, width) for line in lines]


def table_rows(rows: Iterable[tuple[str, ...]], width: int = WIDTH) -> list[list[str]]:
    """The lines of each row of such a table."""
    rows = list(rows)
    if not rows:
        return []
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    while sum(widths) + 3 * (len(widths) - 1) > width and max(widths) > LEAST:
        i = widths.index(max(widths))
        over = sum(widths) + 3 * (len(widths) - 1) - width
        second = max([LEAST, *(w for w in widths if w < widths[i])])
        widths[i] = max(second, widths[i] - over)
    out: list[list[str]] = []
    for r in rows:
        cells = [wrapped(c, w) for c, w in zip(r, widths, strict=True)]
        lines = zip_longest(*cells, fillvalue="")
        out.append(["   ".join(p.ljust(w) for p, w in zip(parts, widths, strict=True)).rstrip() for parts in lines])
    return out
