"""The YAML tree with the place of every key and value: what the loader makes and the schema reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from unroll.errors import SpecError, Where, quote

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """A text with the name under which messages cite it."""

    file: str
    lines: tuple[str, ...] = field(repr=False)

    def where(self, line: int, column: int, length: int = 1) -> Where:
        """The place at line, column, both from 0."""
        excerpt = self.lines[line] if line < len(self.lines) else ""
        room = max(1, len(excerpt) - column)
        return Where(self.file, line + 1, column + 1, min(max(length, 1), room), excerpt)


@dataclass(frozen=True)
class Run:
    """`length` characters of a value, from `offset` on, stand together at line, column of the file (from 0)."""

    offset: int
    length: int
    line: int
    column: int


@dataclass(frozen=True)
class Origin:
    """Where a value was written. runs: empty if its characters cannot be told apart in the file (escapes)."""

    source: Source
    line: int
    column: int
    length: int
    text: str = ""
    runs: tuple[Run, ...] = ()

    def where(self, start: int = 0, length: int | None = None) -> Where:
        """The place of characters [start, start + length) of the value, as far as they are on one line."""
        before = [run for run in self.runs if run.offset <= start]
        if not before:
            return self.source.where(self.line, self.column, self.length)
        run = before[-1]
        skip = min(start - run.offset, run.length)
        rest = max(run.length - skip, 1)
        return self.source.where(run.line, run.column + skip, rest if length is None else min(length, rest))

    def saying(self, text: str) -> Origin:
        """The same place for a value that is not written there, such as a default."""
        return Origin(self.source, self.line, self.column, self.length, text)


@dataclass(frozen=True)
class Scalar:
    value: bool | int | float | str | None
    origin: Origin


@dataclass(frozen=True)
class Items:
    items: tuple[Node, ...]
    origin: Origin


@dataclass(frozen=True)
class Entries:
    """A mapping: name -> (place of the name, value), in the order of the file."""

    entries: Mapping[str, tuple[Origin, Node]]
    origin: Origin

    def get(self, name: str) -> Node | None:
        return self.entries[name][1] if name in self.entries else None

    def without(self, *names: str) -> Entries:
        return entries({k: v for k, v in self.entries.items() if k not in names}, self.origin)


Node = Scalar | Items | Entries


def entries(found: dict[str, tuple[Origin, Node]], origin: Origin) -> Entries:
    return Entries(MappingProxyType(found), origin)


def plain(node: Node) -> Plain:
    """The tree as lists and dicts."""
    match node:
        case Scalar(value, _):
            return value
        case Items(items, _):
            return [plain(item) for item in items]
        case Entries(found, _):
            return {name: plain(value) for name, (_, value) in found.items()}


def child(node: Node, key: str | int) -> Node | None:
    match node:
        case Entries(found, _) if isinstance(key, str) and key in found:
            return found[key][1]
        case Items(items, _) if isinstance(key, int) and 0 <= key < len(items):
            return items[key]
        case _:
            return None


def follow(root: Node, path: Path) -> Iterator[tuple[str | int, Node, Node]]:
    """(key, parent, value) of each step of `path` that exists; names that do not exist are passed over."""
    node = root
    for key in path:
        if (value := child(node, key)) is not None:
            yield key, node, value
            node = value


def place(root: Node, path: Iterable[str | int]) -> Path:
    """The part of `path` that is in the file."""
    return tuple(key for key, _, _ in follow(root, tuple(path)))


def node_at(root: Node, path: Path) -> Node:
    """The value at `path`, or the nearest around it."""
    return [root, *(value for _, _, value in follow(root, path))][-1]


def key_origin(root: Node, path: Path) -> Origin:
    """Where the last key of `path` that exists is written; for an entry of a list, the entry."""
    origin = root.origin
    for key, parent, value in follow(root, path):
        origin = parent.entries[key][0] if isinstance(parent, Entries) and isinstance(key, str) else value.origin
    return origin


REPLACED_WHOLE = frozenset({"minimize", "maximize", "constraints", "shape", "names"})
OPPOSITE = {"minimize": "maximize", "maximize": "minimize"}


def merge(under: Entries, over: Entries) -> Entries:
    """`over` laid on `under`: mappings join by name, `blocks` by the name of the block, everything else is replaced; an objective
    and the names of weights are replaced whole."""
    found = dict(under.entries)
    for name, (key, value) in over.entries.items():
        found.pop(OPPOSITE.get(name, ""), None)
        found[name] = (key, _join(name, found[name][1], value) if name in found else value)
    return entries(found, over.origin)


def without_nulls(under: Entries, over: Entries) -> Entries:
    """The mapping laid on `under`, less the keys that it says are null: what a block takes away from the one it builds on."""
    gone = [k for k, (_, v) in over.entries.items() if isinstance(v, Scalar) and v.value is None and k in under.entries]
    return merge(under.without(*gone), over.without(*gone))


def _joined_blocks(under: Items, over: Items) -> Items | None:
    """Blocks of one name joined, new ones after them; None where the items are not blocks."""
    named = [{_block(i): i for i in part.items} for part in (under, over)]
    if any(None in n for n in named):
        return None
    old, new = ({k: cast(Entries, v) for k, v in n.items()} for n in named)
    joined = {k: _block_on(v, new[k]) if k in new else v for k, v in old.items()}
    return Items(tuple({**joined, **{k: v for k, v in new.items() if k not in old}}.values()), over.origin)


def _block(item: Node) -> str | None:
    name = item.get("block") if isinstance(item, Entries) else None
    return str(name.value) if isinstance(name, Scalar) else None


def _block_on(under: Entries, over: Entries) -> Entries:
    """A block laid on one of its name; in it and in its `learn`, null takes a key away."""
    learn = under.get("learn"), over.get("learn")
    if all(isinstance(x, Entries) for x in learn):
        key = over.entries["learn"][0]
        over = entries(
            {**over.without("learn").entries, "learn": (key, without_nulls(*cast(tuple[Entries, Entries], learn)))},
            over.origin,
        )
        under = under.without("learn")
    return without_nulls(under, over)


def put(root: Entries, path: Sequence[tuple[str, Origin]], value: Node) -> Entries:
    """The tree with `value` laid on what is at `path`; mappings on the way are made where they are missing.

    Raises SpecError E210 where a list on the way has no such entry.
    """
    (name, key), *rest = path
    new = _put_in(name, root.get(name), rest, value)
    kept = {k: v for k, v in root.entries.items() if k != OPPOSITE.get(name)}
    return entries({**kept, name: (key, new)}, root.origin)


def _put_in(name: str, old: Node | None, rest: Sequence[tuple[str, Origin]], value: Node) -> Node:
    match old:
        case _ if not rest:
            return _join(name, old, value) if old else value
        case Items(items, origin):
            i = _entry(items, *rest[0])
            new = _put_in(rest[0][0], items[i], rest[1:], value)
            return Items((*items[:i], new, *items[i + 1 :]), origin)
        case Entries():
            return put(old, rest, value)
        case _:
            return put(entries({}, rest[0][1]), rest, value)


def _entry(items: Sequence[Node], name: str, key: Origin) -> int:
    """The place in a list of the block of that name, else of the entry of that number, from 0. Raises SpecError E210."""
    known = [_block(item) for item in items]
    if name in known:
        return known.index(name)
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    there = [n or str(i) for i, n in enumerate(known)]
    hint = f"there {'is' if len(there) == 1 else 'are'}: {', '.join(there)}" if there else "the list is empty"
    raise SpecError("E210", f"the list has no entry '{quote(name)}'", key.where(), hint)


def _join(name: str, under: Node, over: Node) -> Node:
    match under, over:
        case Items(), Items() if name == "blocks":
            return _joined_blocks(under, over) or over
        case Entries(), Entries() if name not in REPLACED_WHOLE and not _other_kind(under, over):
            return merge(under, over)
        case Entries(found, origin), Scalar(value, _) if "default" in found and not isinstance(value, str):
            return entries({**found, "default": (over.origin, over)}, origin)  # lam: 0.2 over lam: {default: 0.1, ..}
        case _:
            return over


def _other_kind(under: Entries, over: Entries) -> bool:
    tags = [(under.get(tag), over.get(tag)) for tag in ("source", "kind")]
    return any(isinstance(a, Scalar) and isinstance(b, Scalar) and a.value != b.value for a, b in tags)
