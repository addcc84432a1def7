"""Specs: text -> `Spec`, a frozen record of what was written that knows where each part of it stands.

load(path | library name | YAML text | dict, overrides) -> parse -> use: -> overrides -> preset -> schema -> Spec

in    a path, a name of the library, YAML text or a dict, and overrides
out   `load`: a `Spec`
open  schema.py first (what a spec may say); then loader.py (strict YAML), messages.py and consistency.py (what is refused)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path as FilePath
from typing import Any, Self, cast

import yaml
from pydantic import BaseModel, PrivateAttr, ValidationError

from unroll.errors import SpecError, Where, did_you_mean, quote
from unroll.spec import library, loader
from unroll.spec.consistency import contradictions
from unroll.spec.messages import known_paths, to_spec_error
from unroll.spec.nodes import (
    Entries,
    Items,
    Node,
    Origin,
    Plain,
    Scalar,
    Source,
    child,
    entries,
    key_origin,
    merge,
    node_at,
    plain,
    put,
)  # fmt: skip
from unroll.spec.schema import Document

__all__ = ["Origin", "Spec", "load"]

MAX_USE = 8
AROUND = ("model", "weights", "data", "train")  # sections that are not about the layers
DECODER = ("model", "decoder", "layers")
LOSS = ("train", "loss", "objective")
NAMED = ("dims", "variables", "inputs", "parameters", "scalars")  # sections that declare the names of formulas
OVERRIDE = re.compile(r"\s*([^\s=]+)\s*=(.*)", re.DOTALL)
ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029\ufeff"}  # text to JSON, line breaks to YAML
TEXT, DICT = "<text>", "<dict>"


@dataclass(frozen=True)
class Left:
    """Terms or constraints that what is laid over a spec does not take: an objective and constraints are replaced whole."""

    of: str
    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} of {self.of} not taken: {', '.join(self.names)}"


@dataclass(frozen=True)
class Idle:
    """Names that are declared, and that nothing in the spec reads."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"declared, and used nowhere: {', '.join(self.names)}"


class Spec(Document):
    """A checked spec. Fields: see `Document`. origin, key_where: places in the file."""

    _root: Entries = PrivateAttr()
    _preset: str | None = PrivateAttr(default=None)
    _left: tuple[Left | Idle, ...] = PrivateAttr(default=())
    _decoder: Spec | None = PrivateAttr(default=None)

    @property
    def file(self) -> str:
        """The file that was loaded, as messages cite it."""
        return self._root.origin.source.file

    @property
    def title(self) -> str:
        """The name of the network."""
        return self.name or "network"

    @property
    def preset(self) -> str | None:
        """The preset that was worked into `unroll`."""
        return self._preset

    @property
    def left(self) -> tuple[Left, ...]:
        """What this spec does not take of those that it uses."""
        return tuple(x for x in self._left if isinstance(x, Left))

    @property
    def idle(self) -> tuple[Idle, ...]:
        """What this spec declares for nothing."""
        return tuple(x for x in self._left if isinstance(x, Idle))

    def at(self, *path: str | int) -> Any:
        """The record or value at `path`."""
        value: Any = self
        for key in path:
            value = getattr(value, str(key)) if isinstance(value, BaseModel) else value[key]
        return value

    @property
    def decoder(self) -> Spec | None:
        """The layers of the decoder in `model:`."""
        return self._decoder

    def layers(self) -> Spec:
        """The spec of the layers alone, with nothing around them."""
        return self.check(self._root.without(*AROUND), self._preset, self._left)

    def naming(self, algorithms: Mapping[tuple[str | int, ...], str]) -> Spec:
        """The spec with these algorithms in place; those of the user's own folder are worked in."""
        root = self._root
        for path, name in algorithms.items():
            keys = [(str(key), key_origin(self._root, path[: i + 1])) for i, key in enumerate(path)]
            root = put(root, keys, Scalar(name, self.origin(*path).saying(name)))
        return self if root is self._root else self.check(_with_texts(root), self._preset, self._left)

    def origin(self, *path: str | int) -> Origin:
        """Where the value at `path` is written; of a default, the nearest key around it, with the default as text."""
        node = node_at(self._root, path)
        return node.origin if isinstance(node, Scalar) else key_origin(self._root, path).saying(self._text(path))

    def node(self, *path: str | int) -> Node | None:
        """What is written at `path`."""
        return node_at(self._root, path)

    def key_where(self, *path: str | int) -> Where:
        """Where the last key of `path` is written."""
        return key_origin(self._root, path).where()

    def to_dict(self) -> dict[str, Plain]:
        """The whole spec with `use`, overrides and preset worked in: `load` reads it back to an equal spec."""
        return cast("dict[str, Plain]", plain(self._root))

    def to_yaml(self) -> str:
        """`to_dict` as YAML text."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)

    @property
    def sha256(self) -> str:
        """Of what the spec says, not how: comments, the order of keys and `use` do not count."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.sha256)

    def _text(self, path: Sequence[str | int]) -> str:
        value: Any = self
        for key in path:
            value = getattr(value, str(key), "") if isinstance(value, BaseModel) else value[key]
        return value if isinstance(value, str) else ""

    @classmethod
    def check(cls, root: Entries, preset: str | None, left: tuple[Left | Idle, ...] = ()) -> Self:
        """The spec that a whole tree says. Raises SpecError E201 to E206 or E212 to E216, with all findings."""
        try:
            spec = cls.model_validate(frozen(plain(root)))
        except ValidationError as e:
            raise to_spec_error(e, root, Document) from None
        if errors := contradictions(spec, root):
            raise SpecError.together(errors)
        spec._root, spec._preset, spec._left = root, preset, left
        if isinstance(layers := node_at(root, DECODER), Entries) and spec.model and spec.model.decoder:
            spec._decoder = cls.check(layers, None)
        if isinstance(loss := _within(root, LOSS), Entries):
            cls.check(loss, None)
        return spec


def load(source: str | bytes | FilePath | Mapping[str, Any], overrides: Sequence[str] = ()) -> Spec:
    """A spec from a path, a name of the library, YAML text or a dict; overrides: `train.epochs=3`, in order.

    Raises SpecError E0xx (files, YAML), E2xx (what it says), with the place.
    """
    root, folder = _read(source)
    root, left = _use(root, folder, ())
    whole = _with_loss(reduce(_override, overrides, root), folder, ())
    left = (*left, *_not_taken(str(plain(_named(root).entries["name"][1])), root, whole))
    root, preset = _expand(_named(_around(whole)))
    root = _with_texts(root)
    return Spec.check(root, preset, (*left, *_idle(root)))


# --- where a spec comes from ---------------------------------------------------------------------------------------


def _read(source: str | bytes | FilePath | Mapping[str, Any]) -> tuple[Entries, FilePath]:
    """The tree, and the folder that relative paths in it start from."""
    match source:
        case FilePath():
            return read_file(source), source.parent
        case bytes():
            return _mapping(source, TEXT), FilePath()
        case Mapping():
            return _mapping(_as_text(source), DICT), FilePath()
        case str() if "\n" in source or re.search(r":(\s|$)", source) or not source.strip():
            return _mapping(source, TEXT), FilePath()
        case str():
            path = library.find(source, ("specs", "objectives"))
            return read_file(path), path.parent
        case _:
            raise SpecError(
                "E008",
                f"{type(source).__name__} is not a spec",
                hint="give a path, a name of the library, YAML text or a dict",
            )


def read_file(path: FilePath) -> Entries:
    """The tree of a YAML file. Raises SpecError E002, E01x."""
    try:
        with path.open("rb") as file:
            data = file.read(loader.MAX_LENGTH * 4 + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror or "" if isinstance(e, OSError) else "not a path"
        raise SpecError("E002", f"cannot read '{quote(str(path))}': {reason}") from None
    return _mapping(data, str(path))


def _mapping(data: str | bytes, file: str) -> Entries:
    root = loader.parse(data, file)
    if not isinstance(root, Entries):
        hint = "start with `use:` or `objective:`"
        raise SpecError("E012", "a spec is a mapping of keys to values", root.origin.where(), hint)
    return root


def _as_text(source: Mapping[str, Any]) -> str:
    """A dict as JSON, which is YAML: what comes in from Python passes the same checks."""
    try:
        return json.dumps(dict(source), ensure_ascii=False, indent=2).translate(ESCAPED)
    except (TypeError, ValueError, RecursionError) as e:
        hint = "use text, numbers, true, false, None, lists and dicts"
        raise SpecError("E008", f"this dict cannot be a spec: {quote(str(e), 120)}", hint=hint) from None


# --- use:, overrides, presets --------------------------------------------------------------------------------------


def _use(root: Entries, folder: FilePath, chain: tuple[FilePath, ...]) -> tuple[Entries, tuple[Left, ...]]:
    """The tree laid on the one that it uses, and what it does not take of it."""
    if isinstance(layers := _within(root), Entries):
        root = _with(root, _use(layers, folder, chain)[0])
    root = _with_loss(root, folder, chain)
    match root.get("use"):
        case Scalar(str(name), origin):
            path = library.find(name, ("objectives", "specs"), origin.where(), folder)
            if path.resolve() in chain or len(chain) == MAX_USE:
                loop = " uses ".join(p.stem for p in (*chain, path))
                raise SpecError("E004", f"`use` goes in a circle or too deep: {loop}", origin.where())
            under, left = _use(read_file(path), path.parent, (*chain, path.resolve()))
            joined = merge(under.without("name"), root.without("use"))
            return joined, (*left, *_not_taken(path.stem, under, joined))
        case _:
            return root, ()


def _with_loss(root: Entries, folder: FilePath, chain: tuple[FilePath, ...]) -> Entries:
    """The tree with the objective that it trains by made whole."""
    loss = _within(root, LOSS)
    return _with(root, _use(loss, folder, chain)[0], LOSS) if isinstance(loss, Entries) else root


def _not_taken(of: str, under: Entries, joined: Entries) -> Iterator[Left]:
    """Terms by name, constraints as they are written, that are in `under` alone."""
    before, after = _terms(under), _terms(joined)
    if lost := tuple(name for name in before if name not in after):
        yield Left(of, "terms", lost)
    written, kept = (_constraints(root) for root in (under, joined))
    if lost := tuple(text for text in written if text not in kept):
        yield Left(of, "constraints", lost)


WORD = re.compile(r"[^\W\d]\w*")
SILENT = ("use", "name", "objective", "about", "source", "tags")  # sections for people


def _idle(root: Entries) -> Iterator[Idle]:
    """Sizes, inputs, parameters and scalars whose names stand nowhere but where they are declared."""
    sections = {k: plain(v) for k, (_, v) in root.entries.items() if k not in SILENT}
    declared = {k: v for k, v in sections.items() if k in NAMED and isinstance(v, dict)}
    read = {w for k, v in sections.items() for x in (declared[k].values() if k in declared else [v]) for w in _words(x)}
    if names := tuple(n for k, v in declared.items() if k != "variables" for n in v if n not in read):
        yield Idle(names)


def _words(value: Any) -> Iterator[str]:
    """All names in a value, of its keys too."""
    match value:
        case dict():
            for key, inner in cast("dict[str, Any]", value).items():
                yield from () if key == "about" else (*WORD.findall(str(key)), *_words(inner))
        case list():
            for inner in cast("list[Any]", value):
                yield from _words(inner)
        case str():
            yield from WORD.findall(value)
        case _:
            return


def _terms(root: Entries) -> list[str]:
    objective = root.get("minimize") or root.get("maximize")
    return list(objective.entries) if isinstance(objective, Entries) else ["objective"] if objective else []


def _constraints(root: Entries) -> list[str]:
    found = root.get("constraints")
    return [str(plain(item)) for item in found.items] if isinstance(found, Items) else []


def _named(root: Entries) -> Entries:
    """The tree with a `name`: its file's, else that of its objective."""
    if "name" in root.entries:
        return root
    file, objective = root.origin.source.file, root.get("objective")
    name = FilePath(file).stem if file not in (TEXT, DICT) else plain(objective) if objective else "network"
    return entries(
        {"name": (root.origin, Scalar(str(name), root.origin.saying(str(name)))), **root.entries}, root.origin
    )


def _within(root: Entries, path: Sequence[str] = DECODER) -> Node | None:
    """A spec within a spec: the layers of a decoder, or the objective of a training."""
    return reduce(lambda node, key: node and child(node, key), path, cast("Node | None", root))


def _with(node: Node, layers: Entries, path: Sequence[str] = DECODER) -> Entries:
    """The tree with `layers` in that place, and nothing of what was there."""
    if not path:
        return layers
    assert isinstance(node, Entries)
    key, value = node.entries[path[0]]
    return entries({**node.entries, path[0]: (key, _with(value, layers, path[1:]))}, node.origin)


def _around(root: Entries) -> Entries:
    """The tree with the spec of its decoder made whole: without an objective, it is that of the layers before it."""
    layers = _within(root)
    if not isinstance(layers, Entries):
        return root
    if not {"minimize", "maximize"} & set(layers.entries):
        own = {"unroll"} & set(layers.entries)
        layers = merge(root.without(*AROUND, *own, "name"), layers)
    if "name" not in layers.entries:
        name = f"{plain(_named(root).entries['name'][1])}_decoder"
        named = Scalar(name, layers.origin.saying(name))
        layers = entries({"name": (layers.origin, named), **layers.entries}, layers.origin)
    return _with(root, _expand(layers)[0])


def _override(root: Entries, text: str) -> Entries:
    """The tree with one `dotted.path=value` laid on it. Raises SpecError E210, E211."""
    source = Source("override", (text,))
    match = OVERRIDE.fullmatch(text)
    if not match or not match[2].strip() or "\n" in text:
        raise SpecError("E211", f"'{quote(text)}' does not set anything", source.where(0, 0, len(text)), "KEY=VALUE")
    keys, at = match[1].split("."), match.start(1)
    _refuse_unknown(root, keys, source.where(0, at, len(match[1])))
    node = loader.parse(" " * match.start(2) + match[2], source.file, source)
    columns = [at + sum(len(key) + 1 for key in keys[:i]) for i in range(len(keys))]
    path = [(key, Origin(source, 0, column, len(key), key)) for key, column in zip(keys, columns, strict=True)]
    return put(root, path, node)


def _refuse_unknown(root: Entries, keys: list[str], where: Where) -> None:
    """An override may set a name that the spec declares, but not declare one."""
    sections = {name: section for name in NAMED if isinstance(section := root.get(name), Entries)}
    declared = [f"{name}.{key}" for name, section in sections.items() for key in section.entries]
    settings = [".".join(path) for path in known_paths(Document)]
    if keys[0] in NAMED and ".".join(keys[:2]) not in declared:
        near = did_you_mean(".".join(keys[:2]), declared)
        raise SpecError("E210", f"the spec declares no '{quote('.'.join(keys))}'", where, near)
    if keys[0] not in Document.model_fields:
        last = [path for path in (*declared, *settings) if path.split(".")[-1] == keys[0]]
        hint = f"did you mean '{last[0]}'?" if last else did_you_mean(".".join(keys), [*declared, *settings])
        raise SpecError("E210", f"a spec has no '{quote('.'.join(keys))}'", where, hint)


CALLED = re.compile(r"\s*([\w./-]+)\s*\(\s*(\w+\s*=\s*\w+(?:\s*,\s*\w+\s*=\s*\w+)*)\s*\)\s*")
"""lista_cp(A=D, lam=mu): a preset, and what its names are called here."""


def _expand(root: Entries) -> tuple[Entries, str | None]:
    """The tree with the preset that `unroll.parametrisation` names worked in; what is written goes before it."""
    unroll = root.get("unroll")
    if not isinstance(unroll, Entries):
        return root, None
    match unroll.get("parametrisation"):
        case Scalar(str(written), origin):
            called = CALLED.fullmatch(written)
            name = called[1] if called else written
            pairs = [pair.partition("=") for pair in called[2].split(",")] if called else []
            swaps = {word.strip(): here.strip() for word, _, here in pairs}
            fragment = read_file(library.find(name, ("presets",), origin.where()))
            reads = [str(x) for x in cast("list[str]", plain(fragment.get("names") or Items((), origin)))]
            _preset_fits(name, swaps, reads, root, origin)
            own = ("scalars", "functions")
            for section in own:  # what it brings beside the steps
                if (part := fragment.get(section)) is not None:
                    given = entries({section: (fragment.entries[section][0], part)}, fragment.origin)
                    root = merge(given, root)
            steps = _renamed(fragment.without("about", "source", "parametrisation", "names", *own), swaps)
            joined = merge(cast(Entries, steps), unroll.without("parametrisation"))
            key = root.entries["unroll"][0]
            return entries({**root.entries, "unroll": (key, joined)}, root.origin), written.strip()
        case _:
            return root, None


def _preset_fits(name: str, swaps: dict[str, str], reads: list[str], root: Entries, origin: Origin) -> None:
    """Raises SpecError E101 for a name that the preset has not, or the objective."""
    for word in swaps:
        if word not in reads:
            hint = did_you_mean(word, reads) or f"it reads {', '.join(reads) or 'no name of an objective'}"
            raise SpecError("E101", f"the preset {name} reads no '{quote(word)}'", origin.where(), hint)
    declared = {n for section in NAMED for n in _names_of(root, section)}
    for word in reads:
        if swaps.get(word, word) not in declared:
            what = f"the preset {name} reads '{word}', and there is no '{swaps.get(word, word)}' here"
            hint = f"say what it is called here: parametrisation: {name}({word}=..); declared: {', '.join(sorted(declared))}"
            raise SpecError("E101", what, origin.where(), hint)


def _names_of(root: Entries, section: str) -> Iterator[str]:
    part = root.get(section)
    yield from part.entries if isinstance(part, Entries) else ()


def _renamed(node: Node, swaps: dict[str, str]) -> Node:
    """The tree with words of its texts swapped, all at once."""
    match node:
        case Scalar(str(text), origin):
            return Scalar(WORD.sub(lambda found: swaps.get(found[0], found[0]), text), origin)
        case Entries(found, origin):
            return entries({k: (key, _renamed(v, swaps)) for k, (key, v) in found.items()}, origin)
        case Items(items, origin):
            return Items(tuple(_renamed(i, swaps) for i in items), origin)
        case _:
            return node


def _with_texts(root: Entries) -> Entries:
    """The tree with the algorithms that it names by a path, or that lie in the user's own folder, worked in by their names."""
    unroll = root.get("unroll")
    if not isinstance(unroll, Entries):
        return root
    blocks = unroll.get("blocks")
    paths: list[tuple[tuple[str, Origin], ...]] = [()]
    if isinstance(blocks, Items):
        key = unroll.entries["blocks"][0]
        paths += [(("blocks", key), (str(i), b.origin)) for i, b in enumerate(blocks.items) if isinstance(b, Entries)]
    for path in paths:
        scheme = node_at(root, ("unroll", *(int(k) if k.isdecimal() else k for k, _ in path)))
        match scheme.get("algorithm") if isinstance(scheme, Entries) else None:
            case Scalar(str(name), origin) if (file := _own_text(root, name, origin)) is not None:
                tree, stem = read_file(file), file.stem
                first = ("unroll", root.entries["unroll"][0])
                last = ("algorithm", cast(Entries, scheme).entries["algorithm"][0])
                root = put(root, (first, *path, last), Scalar(stem, origin.saying(stem)))
                root = put(root, (("algorithms", origin), (stem, origin)), tree)
            case _:
                pass
    return root


def _own_text(root: Entries, name: str, origin: Origin) -> FilePath | None:
    """The file of an algorithm that is not shipped. Raises SpecError E001 for a path that is none."""
    own = root.get("algorithms")
    if isinstance(own, Entries) and name in own.entries:
        return None
    if name.endswith(library.SUFFIXES):
        return library.find(name, ("algorithms",), origin.where(), FilePath(origin.source.file).parent)
    here, *shipped = (folder / f"{name}.yaml" for folder in library.folders("algorithms"))
    known = library.NAME.fullmatch(name) and library.isfile(here)
    return here if known and not any(library.isfile(x) and x.samefile(here) for x in shipped) else None


def frozen(value: Plain) -> object:
    """Lists as tuples: as records keep them."""
    match value:
        case list():
            return tuple(frozen(item) for item in value)
        case dict():
            return {key: frozen(item) for key, item in value.items()}
        case _:
            return value


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that our loader would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: object) -> bool:
        del data
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = '"' if any(ord(c) in ESCAPED for c in text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _write_text)
for _tag, _pattern in loader.RESOLVERS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
