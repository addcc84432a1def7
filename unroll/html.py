"""Pieces of a self-contained HTML page: formulas as MathML, tables, Python text, lines over layers, terms over steps, maps.

No script in it, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import io
import keyword
import math
import struct
import tokenize
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
h3 {{ font-size: 1rem; margin: 1.2rem 0 .2rem }}
.maps {{ display: flex; flex-wrap: wrap; gap: .8rem }}
figure {{ margin: 0 }}  figcaption {{ color: #566573; font-size: 12px; max-width: 9rem }}
.map {{ image-rendering: pixelated; border: 1px solid #d5d8dc; display: block }}
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
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{_mark(v)}</text>'
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


def _mark(v: float) -> str:
    """A number that fits beside an axis."""
    if v and not 1e-4 <= abs(v) < 1e6:
        return f"{v:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}"


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


# --- terms over steps -------------------------------------------------------------------------------------------------

IMPROVES, WORSENS, STILL = "#0072b2", "#d55e00", "#7f8c8d"
"""Blue and vermilion, which no common colour blindness confuses. Source: Okabe & Ito 2008, Color Universal Design."""
UPPER, GAP, LOWER = 180, 14, 110


@dataclass(frozen=True)
class Course:
    """One term over S steps: value (S + 1) after each, the start first; predicted, actual (S): its changes.

    sign: 1 if the term is to fall, -1 if it is to rise.  better: (S) share of samples in which it does.
    own: (S) does the step take the term?  steps: (S) (layer, block).
    """

    name: str
    sign: int
    value: Sequence[float]
    predicted: Sequence[float]
    actual: Sequence[float]
    better: Sequence[float]
    own: Sequence[bool]
    steps: Sequence[tuple[int, str]]

    def colour(self, k: int) -> str:
        gain = -self.sign * self.actual[k]
        return IMPROVES if gain > 0 else WORSENS if gain < 0 else STILL

    def words(self, k: int) -> str:
        layer, block = self.steps[k]
        changes = f"actual {self.actual[k]:+.4g}, predicted {self.predicted[k]:+.4g}"
        return f"layer {layer}, {block}: {self.name} {changes}, improved in {100 * self.better[k]:.0f} %"


def course(c: Course) -> str:
    """Above, the term: a line per step, coloured by what the step did to it. Below, bars: that, and what was predicted.

    A line starts at the value before its step by the parameters of its own layer: where these change, lines do not meet.
    """
    count = len(c.actual)
    starts = [after - change for after, change in zip(c.value[1:], c.actual, strict=True)]
    y, low, high = _scale([*c.value, *starts], TOP, UPPER)
    bar, fall, rise = _scale([0.0, *c.predicted, *c.actual], TOP + UPPER + GAP, LOWER)
    ends = [v for v in (fall, rise) if abs(bar(v) - bar(0)) > 12]
    slot = (WIDTH - LEFT - RIGHT) / count
    drawn = [
        _bands(c.steps, slot),
        _levels(y, [low + (high - low) * k / 4 for k in range(5)]),
        _levels(bar, [0.0, *ends]),
    ]
    for k in range(count):
        left, right = LEFT + slot * k, LEFT + slot * (k + 1)
        if all(map(_drawn, (starts[k], c.value[k + 1], c.predicted[k], c.actual[k]))):
            shapes = _move(c, k, (left, y(starts[k])), (right, y(c.value[k + 1])))
            shapes += _bars(c, k, left + slot / 2, min(slot, 36), bar)
            drawn.append(f"<g><title>{escape(c.words(k))}</title>{shapes}</g>")
    if _drawn(c.value[0]):
        drawn.append(f'<circle cx="{LEFT}" cy="{y(c.value[0]):.1f}" r="3" fill="{STILL}"/>')
    bottom = TOP + UPPER + GAP + LOWER
    zero = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bar(0):.1f}" y2="{bar(0):.1f}" stroke="#1c2833"/>'
    words = (
        f'<text x="{(LEFT + WIDTH) / 2}" y="{bottom + 34}" text-anchor="middle">layer</text>'
        f'<text transform="translate(12 {TOP + UPPER / 2}) rotate(-90)" text-anchor="middle">{escape(c.name)}</text>'
        f'<text transform="translate(12 {bottom - LOWER / 2}) rotate(-90)" text-anchor="middle">change</text>'
    )
    start = f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 40}" width="{WIDTH}" role="img">'
    return f"{start}<title>{escape(c.name)} over the steps</title>{''.join(drawn)}{zero}{words}</svg>"


def course_legend(blocks: Sequence[str], own: Sequence[str]) -> str:
    """What the marks of a course mean. own: parameters that each layer has a value of its own for."""
    parts = (
        f'<span style="color:{IMPROVES}">&#9473;&#9473; &#9650;&#9660;</span> a step that improves the term in the mean',
        f'<span style="color:{WORSENS}">&#9477;&#9477; &#9650;&#9660;</span> one that makes it worse (&#9650; rose, &#9660; fell)',
        "&#9650; full: the step takes the term, &#9651; hollow: it does not",
        "bars: &#9633; change predicted to first order, &#9632; what came",
    )
    order = (f"in every layer: {escape(', then '.join(blocks))}",) if len(blocks) > 1 else ()
    names = escape(", ".join(own))
    gaps = (
        (
            f"a line leads from what enters a step to what leaves it, both by its layer's own {names}: lines may not meet",
        )
        if own
        else ()
    )
    return f"<p>{'<br>'.join((*parts, *order, *gaps))}</p>"


def _drawn(v: float) -> bool:
    """Finite, and such that differences are."""
    return abs(v) < 1e300


def _scale(values: Sequence[float], top: float, tall: float) -> tuple[Callable[[float], float], float, float]:
    """Value -> y within a panel; the least and the largest value."""
    found = list(filter(_drawn, values)) or [0.0]
    low, high = min(found), max(found)
    high = high if high > low else low + 1
    return lambda v: top + 6 + (tall - 12) * (high - v) / (high - low), low, high


def _levels(y: Callable[[float], float], marks: Sequence[float]) -> str:
    return "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#d5d8dc"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{_mark(v)}</text>'
        for v in marks
    )


def _bands(steps: Sequence[tuple[int, str]], slot: float) -> str:
    """Every other layer on grey, and numbers of layers where there is room."""
    layers = list(dict.fromkeys(layer for layer, _ in steps))
    every = max(1, math.ceil(len(layers) / 24))
    out, bottom = "", TOP + UPPER + GAP + LOWER
    for k, layer in enumerate(layers):
        mine = [i for i, (of, _) in enumerate(steps) if of == layer]
        left, wide = LEFT + slot * mine[0], slot * len(mine)
        if k % 2:
            out += f'<rect x="{left:.1f}" y="{TOP}" width="{wide:.1f}" height="{bottom - TOP}" fill="#f4f6f6"/>'
        if k % every == 0:
            out += f'<text x="{left + wide / 2:.1f}" y="{bottom + 16}" text-anchor="middle">{layer}</text>'
    return out


def _move(c: Course, k: int, start: tuple[float, float], end: tuple[float, float]) -> str:
    """The line of a step, dashed if it makes the term worse, and at its end which way the term went."""
    colour, (x, y) = c.colour(k), end
    dash = ' stroke-dasharray="4 3"' if colour == WORSENS else ""
    way = math.copysign(1, c.actual[k])
    shape = (
        f"M{x:.1f},{y - 5 * way:.1f} l4.5,{8 * way:g} h-9 z"
        if c.actual[k]
        else f"M{x - 4:.1f},{y - 1.5:.1f} h8 v3 h-8 z"
    )
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"{dash}/>'
        f'<path d="{shape}" fill="{colour if c.own[k] else "#fff"}" stroke="{colour}"/>'
    )


def _bars(c: Course, k: int, x: float, wide: float, y: Callable[[float], float]) -> str:
    """Left of x the change that was predicted, hollow; right of it the one that came."""
    out, half = "", 0.38 * wide
    for at, v, fill in ((x - half, c.predicted[k], "none"), (x, c.actual[k], c.colour(k))):
        top, tall = min(y(v), y(0)), abs(y(v) - y(0))
        out += f'<rect x="{at:.1f}" y="{top:.1f}" width="{half:.1f}" height="{tall:.1f}" fill="{fill}" stroke="{c.colour(k)}"/>'
    return out


# --- maps -------------------------------------------------------------------------------------------------------------


def picture(rows: Sequence[Sequence[float]], caption: str, cell: int) -> str:
    """Weights as squares of `cell` pixels: white is the smallest, black the largest, grey by the square root between them."""
    if not all(math.isfinite(v) for row in rows for v in row):
        return f"<figure><figcaption>{escape(caption)}: not finite</figcaption></figure>"
    low, high = min(map(min, rows)), max(map(max, rows))
    span = high - low if high > low else 1.0
    grey = [bytes(255 - round(255 * math.sqrt((v - low) / span)) for v in row) for row in rows]
    text = base64.b64encode(_png(grey)).decode()
    size = f'width="{cell * len(rows[0])}" height="{cell * len(rows)}"'
    shown = f'<img class="map" {size} alt="{escape(caption)}" src="data:image/png;base64,{text}">'
    return f"<figure>{shown}<figcaption>{escape(caption)}: {low:.2g} to {high:.2g}</figcaption></figure>"


def maps(pictures: Iterable[str]) -> str:
    """Pictures side by side."""
    return f'<div class="maps">{"".join(pictures)}</div>'


def _png(grey: Sequence[bytes]) -> bytes:
    """Rows of 8-bit grey. Source: ISO/IEC 15948, Portable Network Graphics."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", len(grey[0]), len(grey), 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in grey), 9))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")
