"""Strict YAML: text -> Node. Own walk over PyYAML's events; nothing is constructed but text, numbers, lists, mappings.

Refused: aliases, anchors, merge keys, tags, duplicate keys, keys that are not text, several documents, and anything
large or deep. Plain scalars are read as YAML 1.2 does: 1e-3 is a number; yes, no, on, 12:30 are text; 010 is ten.
What YAML does to formulas without a word (`[norm(x, 1) <= 1]` is two items) is an error here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import yaml

from unroll.errors import SpecError, Where, quote
from unroll.spec.nodes import Entries, Items, Node, Origin, Run, Scalar, Source, entries

MAX_LENGTH = 100_000
MAX_DEPTH = 32
MAX_NODES = 5_000
MAX_INT = 2**63

BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
INT = re.compile(r"[-+]?[0-9]+")
BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
RESOLVERS = {  # the core schema of YAML 1.2, for writing
    "int": re.compile(rf"(?:{INT.pattern}|{BASED.pattern})$"),
    "float": re.compile(rf"(?:{FLOAT.pattern}|{NOT_FINITE.pattern})$"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    "null": re.compile(r"(?:~|null|Null|NULL|)$"),
    "merge": re.compile(r"<<$"),
}
WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
UNFINISHED = re.compile(r"[-+*/@=<>,(\[]$")
VALUE = re.compile(r"(?P<before>\s*(?:-\s+)*(?:[^\s#:'\"\[\]{},][^#:]*:\s+)?)(?P<value>\S.*)")
NO_DIRECTIVE = "a spec has no YAML directives"
WRITE_OUT = "write the value out where it is needed; a formula that starts with & or * goes in double quotes"
QUOTE_IT = 'put the formula in double quotes, or on the next line after "|"'


@lru_cache(maxsize=1024)
def parse(data: str | bytes, file: str, shown: Source | None = None) -> Node:
    """The tree of one YAML document; places are cited from `shown`. Raises SpecError E006, E010 to E026.

    Remembered: trees do not change, and the same files of the library are read again and again.
    """
    text = _decode(data, file)
    source = shown or Source(file, tuple(BREAK.split(text)))
    if len(text) > MAX_LENGTH:
        raise SpecError("E017", f"{len(text):,} characters: a spec may have {MAX_LENGTH:,}", source.where(0, 0))
    reader = yaml.SafeLoader("")
    try:
        reader = yaml.SafeLoader(text)
        return _Builder(source, text, reader.get_event).document()
    except yaml.YAMLError as e:
        raise _explain(e, source, text) from None
    except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF"
        mark = reader.get_mark()
        raise SpecError("E010", "an escape names no character", source.where(mark.line, mark.column)) from None
    finally:
        reader.dispose()


def _decode(data: str | bytes, file: str) -> str:
    if isinstance(data, str):
        return data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        good = data[: e.start].decode("utf-8-sig", errors="replace")
        lines = BREAK.split(good)
        where = Source(file, tuple(lines)).where(len(lines) - 1, len(lines[-1]))
        raise SpecError(
            "E006", f"the byte {data[e.start]:02x} is not UTF-8 text", where, "save the file as UTF-8"
        ) from None


@dataclass
class _Builder:
    """Turns events into nodes; counts them."""

    source: Source
    text: str
    next: Callable[[], yaml.Event]
    nodes: int = 0

    def document(self) -> Node:
        self.next()  # stream start
        event = self.next()
        if isinstance(event, yaml.StreamEndEvent):
            raise SpecError("E011", "the file is empty", self.source.where(0, 0), "start with `use:` or `objective:`")
        assert isinstance(event, yaml.DocumentStartEvent)
        if event.version or event.tags:
            raise SpecError(
                "E010", "a spec has no YAML directives", self.at(event), "delete the line that starts with %"
            )
        node = self.node(self.next(), 0, flow=False)
        self.next()  # document end
        if not isinstance(event := self.next(), yaml.StreamEndEvent):
            raise SpecError("E019", "a second document starts here", self.at(event), "one file holds one spec")
        return node

    def node(self, event: yaml.Event, depth: int, flow: bool) -> Node:
        self.nodes += 1
        self.refuse(event, depth)
        match event:
            case yaml.ScalarEvent():
                return self.scalar(event, flow)
            case yaml.SequenceStartEvent():
                return self.items(event, depth, flow or bool(event.flow_style))
            case yaml.MappingStartEvent():
                return self.entries(event, depth, flow or bool(event.flow_style))
            case _:
                raise AssertionError(f"event {event!r}: please report")

    def refuse(self, event: yaml.Event, depth: int) -> None:
        where = self.at(event)
        if depth > MAX_DEPTH:
            raise SpecError("E017", f"nested deeper than {MAX_DEPTH} levels", where)
        if self.nodes > MAX_NODES:
            raise SpecError("E017", f"more than {MAX_NODES:,} values", where)
        match event:
            case yaml.AliasEvent():
                raise SpecError(
                    "E014", f"'*{event.anchor}' is a YAML alias, which a spec may not use", where, WRITE_OUT
                )
            case yaml.NodeEvent() if event.anchor is not None:
                message = f"'&{event.anchor}' is a YAML anchor, which a spec may not use"
                raise SpecError("E014", message, where, WRITE_OUT)
            case yaml.ScalarEvent() | yaml.CollectionStartEvent() if event.tag is not None:
                written = quote(self.text[event.start_mark.index :].split(maxsplit=1)[0])
                hint = "write the value alone; a formula that starts with ! goes in double quotes"
                raise SpecError("E015", f"'{written}' is a YAML tag, which a spec may not use", where, hint)
            case _:
                pass

    def items(self, event: yaml.Event, depth: int, flow: bool) -> Items:
        found: list[Node] = []
        while not isinstance(item := self.next(), yaml.SequenceEndEvent):
            found.append(self.node(item, depth + 1, flow))
        return Items(tuple(found), self.origin(event, ""))

    def entries(self, event: yaml.Event, depth: int, flow: bool) -> Entries:
        found: dict[str, tuple[Origin, Node]] = {}
        while not isinstance(item := self.next(), yaml.MappingEndEvent):
            name, key = self.key(item, depth, flow)
            if name in found:
                first = found[name][0].where()
                note = f"it stands first on line {first.line}, column {first.column}"
                raise SpecError("E013", f"key '{quote(name)}' is written twice", key.where(), "keep one", (note,))
            found[name] = (key, self.node(self.next(), depth + 1, flow))
        return entries(found, self.origin(event, ""))

    def key(self, event: yaml.Event, depth: int, flow: bool) -> tuple[str, Origin]:
        node = self.node(event, depth + 1, flow)
        if not isinstance(node, Scalar):
            hint = 'double quotes make a key with brackets: "R(Y)"; a formula that starts with { or [ goes in them too'
            raise SpecError("E016", "a list or a mapping cannot be a key", node.origin.where(), hint)
        if node.value == "<<":
            hint = "`use:` is how a spec builds on another"
            raise SpecError("E014", "'<<' is a YAML merge key, which a spec may not use", node.origin.where(), hint)
        if not isinstance(node.value, str):
            hint = "keys are names"
            raise SpecError("E016", f"key '{quote(node.origin.text)}' is not text", node.origin.where(), hint)
        return node.value, node.origin

    def scalar(self, event: yaml.ScalarEvent, flow: bool) -> Scalar:
        origin = self.origin(event, event.value)
        if event.style:
            return Scalar(event.value, origin)
        self.refuse_cut(event, origin, flow)
        return Scalar(_value(event.value, origin), origin)

    def refuse_cut(self, event: yaml.ScalarEvent, origin: Origin, flow: bool) -> None:
        """A plain scalar that YAML ended early: at a comma within brackets, or at ' #'."""
        open_bracket = _open(event.value)
        if flow and open_bracket:
            found = quote(event.value)
            message = f"the comma ends this item: YAML reads '{found}'"
            raise SpecError("E024", message, origin.where(), 'put the formula in double quotes, or each on a "- " line')
        rest = self.source.lines[event.end_mark.line][event.end_mark.column :]
        if re.match(r"\s+#", rest) and (open_bracket or UNFINISHED.search(event.value)):
            where = self.source.where(event.end_mark.line, event.end_mark.column + rest.index("#"), len(rest))
            raise SpecError(
                "E023", f"the comment cuts this formula: YAML reads '{quote(event.value)}'", where, QUOTE_IT
            )

    def at(self, event: yaml.Event) -> Where:
        start, end = event.start_mark, event.end_mark
        if start.line == end.line:
            return self.source.where(start.line, start.column, end.column - start.column)
        return self.source.where(start.line, start.column, len(self.text))

    def origin(self, event: yaml.Event, text: str) -> Origin:
        start, where = event.start_mark, self.at(event)
        raw = self.text[start.index : event.end_mark.index]
        runs = _runs(raw, event) if isinstance(event, yaml.ScalarEvent) else ()
        return Origin(self.source, start.line, start.column, where.length, text, runs)


def _open(text: str) -> bool:
    return any(text.count(a) > text.count(b) for a, b in ("()", "[]"))


def _value(text: str, origin: Origin) -> bool | int | float | str | None:
    """A plain scalar by the core schema of YAML 1.2. Raises SpecError E020."""
    if text in WORDS:
        return WORDS[text]
    if BASED.fullmatch(text) and len(text) < 20:
        return int(text, 0)
    if INT.fullmatch(text):
        if len(text) > 20 or abs(int(text)) >= MAX_INT:
            raise SpecError("E020", f"'{quote(text)}' is too large", origin.where())
        return int(text)
    if NOT_FINITE.fullmatch(text) or (FLOAT.fullmatch(text) and not math.isfinite(float(text))):
        hint = "leave the key out where there is no bound"
        raise SpecError("E020", f"'{quote(text)}' is not a finite number", origin.where(), hint)
    return float(text) if FLOAT.fullmatch(text) else text


def _runs(raw: str, event: yaml.ScalarEvent) -> tuple[Run, ...]:
    """The stretches of a scalar that stand together in the file, one per line; none if escapes blur them."""
    line, column = event.start_mark.line, event.start_mark.column
    if event.style in ("'", '"'):
        raw, column = raw[1:-1], column + 1
    runs: list[Run] = []
    at = 0
    for i, piece in enumerate(BREAK.split(raw)):
        body = piece.strip(" \t")
        if not body or (i == 0 and event.style in ("|", ">")):
            continue
        at += len(event.value[at:]) - len(event.value[at:].lstrip(" \t\n"))
        if not event.value.startswith(body, at):
            return ()
        runs.append(Run(at, len(body), line + i, piece.index(body) + (0 if i else column)))
        at += len(body)
    return tuple(runs)


def _explain(e: yaml.YAMLError, source: Source, text: str) -> SpecError:
    """PyYAML's complaint in the words of someone who wanted to write a formula."""
    if isinstance(e, yaml.reader.ReaderError):
        line = len(BREAK.findall(text[: e.position]))
        column = len(BREAK.split(text[: e.position])[-1])
        code = f"U+{ord(text[e.position]):04X}"
        return SpecError("E026", f"the character {code} may not be in a spec", source.where(line, column), "delete it")
    assert isinstance(e, yaml.MarkedYAMLError) and e.problem_mark and e.problem
    line, column, problem = e.problem_mark.line, e.problem_mark.column, e.problem
    here = source.where(line, column)
    if "'\\t'" in problem:
        return SpecError("E018", "a tab starts this line or value", here, "indent with spaces")
    if cannot := re.search(r"found character (.+) that cannot start any token", problem):
        return SpecError("E021", f"a value cannot start with {cannot[1]} in YAML", here, QUOTE_IT)
    if "directive" in str(e.context):
        return SpecError("E010", NO_DIRECTIVE, here, "delete the line that starts with %")
    if "end of stream" in problem or "<stream end>" in problem:
        start = e.context_mark or e.problem_mark
        what = "bracket" if "flow" in str(e.context) else "quote"
        return SpecError("E010", f"this {what} is not closed", source.where(start.line, start.column))
    for mark in (e.problem_mark, e.context_mark):
        if mark and (found := _formula(source, mark.line, mark.column, problem)):
            return found
    return SpecError("E010", f"YAML cannot read this: {_plain_words(e)}", here, _guess(problem))


def _formula(source: Source, line: int, column: int, problem: str) -> SpecError | None:
    """The trap that the value on this line fell into, if it is one of those we know."""
    match = VALUE.match(source.lines[line]) if line < len(source.lines) else None
    if not match:
        return None
    value, start = match["value"], match.start("value")
    where = source.where(line, start, len(value))
    if "mapping values are not allowed" in problem and ": " in match["before"] and column > start:
        colon = source.where(line, column)
        return SpecError("E022", "': ' within a value starts a new key in YAML", colon, QUOTE_IT)
    if (value[0] in "|>" and "indicator" in problem) or "comment or a line break" in problem:
        return SpecError("E021", f"a value that starts with '{value[0]}' is a text block in YAML", where, QUOTE_IT)
    if value[0] in "*&" and ("alphabetic" in problem or value[0] == "*"):
        return SpecError("E021", f"a value cannot start with '{value[0]}' in YAML", where, QUOTE_IT)
    if re.match(r"'[^']*'\s*[^\s#,\]}:]|\"[^\"]*\"\s*[^\s#,\]}:]", value):
        return SpecError("E021", "the value ends at its closing quote, and more follows", where, QUOTE_IT)
    if value.startswith("- ") and "sequence entries" in problem:
        return SpecError("E021", "a value that starts with '- ' is a list in YAML", where, QUOTE_IT)
    return None


WORDS_OF_YAML = {
    "'<block mapping start>'": "keys further in",
    "'<block sequence start>'": "a list further in",
    "'<scalar>'": "a value",
    "'?'": "a key",
    "<block end>": "the end of the block",
}


def _plain_words(e: yaml.MarkedYAMLError) -> str:
    text = ", ".join(part for part in (e.context, e.problem) if part)
    for theirs, ours in WORDS_OF_YAML.items():
        text = text.replace(theirs, ours)
    return text


def _guess(problem: str) -> str:
    if "mapping values" in problem or "block end" in problem:
        return "check the indentation: keys of one mapping start in the same column"
    if "escape" in problem:
        return "a backslash in double quotes starts an escape: use single quotes"
    return "check brackets and quotes"
