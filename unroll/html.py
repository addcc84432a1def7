"""Pieces of a self-contained HTML page: formulas as MathML, tables, lines over layers, Python text. No script in it."""

from __future__ import annotations

import io
import keyword
import math
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

MATH = '"STIX Two Math", "Cambria Math", "STIX Math", "Latin Modern Math", "DejaVu Math TeX Gyre", math'
"""Brackets stretch only in a mathematical font."""
COLOURS = ("#1b6ca8", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#566573")
STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2833; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin-bottom: 0 }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5d8dc }}
.about {{ color: #566573; margin-top: .2rem }}
math {{ font-family: {MATH}; font-size: 1.1rem }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: baseline }}
th {{ color: #566573; font-weight: normal; border-bottom: 1px solid #d5d8dc }}
.equations td:nth-child(1) {{ color: #566573 }}  .equations td:nth-child(2) {{ text-align: right }}
.scroll {{ overflow: auto hidden; padding-bottom: .3rem }}
pre {{ font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace }}
pre {{ background: #f8f9f9; padding: .8rem 1rem; overflow-x: auto }}
.k {{ color: #8e44ad }}  .s {{ color: #1e8449 }}  .c {{ color: #839192 }}
.bad {{ color: #c0392b; font-weight: bold }}  .good {{ color: #1e8449 }}
.chart {{ max-width: 100%; height: auto }}
.chart text {{ font: 12px system-ui, sans-serif }}
"""


def page(title: str, about: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole document. sections: (heading, HTML); an empty one is left out."""
    body = "\n".join(f"<section><h2>{escape(head)}</h2>\n{html}</section>" for head, html in sections if html)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    top = f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p>'
    start = f'<!doctype html>\n<html lang="en"><head>{head}\n<style>{STYLE}</style></head>'
    return f"{start}\n<body>{top}\n{body}\n</body></html>\n"


def formula(latex: str) -> str:
    """LaTeX -> MathML."""
    from latex2mathml.converter import convert

    return convert(latex, display="inline").replace("<math ", '<math displaystyle="true" ', 1)


def equations(rows: Sequence[tuple[str, str, str]]) -> str:
    """(name, left side, right side), the sides in LaTeX; a name is shown where it changes."""
    lines: list[str] = []
    before = ""
    for name, left, right in rows:
        shown = "" if name == before else escape(name)
        lines.append(f"<tr><td>{shown}</td><td>{formula(left)}</td><td>{formula(right)}</td></tr>")
        before = name
    return f'<div class="scroll"><table class="equations">{"".join(lines)}</table></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; verdicts are coloured."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    kind = {"holds": ' class="good"', "BROKEN": ' class="bad"'}.get(text, "")
    return f"<td{kind}>{escape(text)}</td>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, html: str) -> str:
    """Shown when the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def scrolled(html: str) -> str:
    """As wide as it is."""
    return f'<div class="scroll">{html}</div>'


def python(source: str) -> str:
    """Python text with its keywords, strings and comments told apart."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    out, at = list[str](), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _kind(token)
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        if kind:
            out += [escape(source[at:begin]), f'<span class="{kind}">{escape(source[begin:end])}</span>']
            at = end
    return f"<pre>{''.join(out)}{escape(source[at:])}</pre>"


def _kind(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return "k" if keyword.iskeyword(token.string) else ""
    return {tokenize.STRING: "s", tokenize.COMMENT: "c"}.get(token.type, "")


# --- lines ------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 300, 60, 10, 10, 40


def lines(values: Mapping[str, Sequence[float]], across: str, up: str) -> str:
    """One line per name over 0, 1, 2, ..., as SVG; what is not finite is left out. Points tell their value."""
    found = [v for row in values.values() for v in row if math.isfinite(v)]
    if not found:
        return ""
    low, high = min(found), max(found)
    high = high if high > low else low + 1
    last = max(1, max(map(len, values.values())) - 1)

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * i / last

    def y(v: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - v) / (high - low)

    marks = [low + (high - low) * k / 4 for k in range(5)]
    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#eaeded"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in marks
    )
    ticks = "".join(
        f'<text x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{i}</text>'
        for i in range(0, last + 1, max(1, math.ceil(last / 8)))
    )
    words = (
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
        f'<text transform="translate(12 {(HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(up)}</text>'
    )
    drawn = "".join(_line(name, row, x, y, COLOURS[k % len(COLOURS)]) for k, (name, row) in enumerate(values.items()))
    start = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
    return f"{start}{grid}{ticks}{words}{drawn}</svg>{_legend(list(values))}"


def decibel(ratio: float | None) -> float:
    """10 log10(ratio); nan where that is not finite."""
    return 10 * math.log10(ratio) if ratio is not None and ratio > 0 else math.nan


def _line(
    name: str, row: Sequence[float], x: Callable[[float], float], y: Callable[[float], float], colour: str
) -> str:
    points = [(i, v) for i, v in enumerate(row) if math.isfinite(v)]
    path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points)
    dots = "".join(
        f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="2.5" fill="{colour}">'
        f"<title>{escape(name)}: {v:.4g} at {i}</title></circle>"
        for i, v in (points if len(points) <= 64 else [])
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>{dots}'


def _legend(names: Sequence[str]) -> str:
    shown = (f'<span style="color:{COLOURS[k % len(COLOURS)]}">&#9632;</span> {escape(n)}' for k, n in enumerate(names))
    return f"<p>{' &emsp; '.join(shown)}</p>"
