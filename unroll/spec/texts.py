"""Algorithms as texts: found by name, by path, or in the spec itself, read strictly, each part with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from unroll.errors import SpecError, Where
from unroll.spec import Spec, frozen, library, read_file
from unroll.spec.messages import to_spec_error
from unroll.spec.nodes import Entries, Origin, Scalar, child, key_origin, node_at, plain
from unroll.spec.schema import Algorithm

AUTO = "auto"
"""No text is called so: one is chosen."""


@dataclass(frozen=True, eq=False)
class Text:
    """A checked algorithm that knows where each part of it stands."""

    record: Algorithm
    root: Entries

    @property
    def name(self) -> str:
        return self.record.algorithm

    def origin(self, *path: str | int) -> Origin:
        node = node_at(self.root, path)
        return node.origin if isinstance(node, Scalar) else key_origin(self.root, path)

    def place(self, *path: str | int) -> Callable[[int, int], Where]:
        """Where characters of the formula at `path` stand."""
        return self.origin(*path).where

    def is_leaf(self, *path: str | int) -> bool:
        """Is a formula, not a mapping, written at `path`?"""
        return isinstance(node_at(self.root, path), Scalar)

    def where(self, *path: str | int) -> Where:
        return key_origin(self.root, path).where()


def find(name: str, spec: Spec | None = None, where: Where | None = None) -> Text:
    """The algorithm that `name` means: one of the spec's own, of the library, or a path. Raises SpecError E001 to E003, E2xx."""
    if spec is not None and name in spec.algorithms:
        node = spec.node("algorithms", name)
        assert isinstance(node, Entries)
        return _called(name, Text(spec.algorithms[name], node))
    near = Path(spec.file).parent if spec is not None else Path()
    path = library.find(name, ("algorithms",), where, near)
    return _read(path, path.stat().st_mtime_ns)


def written(name: str) -> str | None:
    """The file of an algorithm: a path, its name where no spec has it too, or algorithms/NAME. None where `name` means something else.

    Raises SpecError E001 (no such file), E003 (no such name), E2xx, E320 (what stands there is no algorithm).
    """
    own = name if name.endswith(library.SUFFIXES) else name.removeprefix("algorithms/")
    if name.endswith(library.SUFFIXES):
        if child(read_file(library.find(name, ("algorithms",))), "algorithm") is None:
            return None
    elif own == name and (
        name in (*library.names("specs"), *library.names("objectives")) or name not in library.names("algorithms")
    ):
        return None
    find(own)
    return library.find(own, ("algorithms",)).read_text(encoding="utf-8").rstrip()


def every() -> Iterator[Text]:
    """All algorithms of the library."""
    return (find(name) for name in library.names("algorithms"))


@cache
def _read(path: Path, changed: int) -> Text:
    del changed  # a file that is written anew is read anew
    root = read_file(path)
    try:
        record = Algorithm.model_validate(frozen(plain(root)))
    except ValidationError as e:
        raise to_spec_error(e, root, Algorithm) from None
    return _called(path.stem, Text(record, root))


def _called(name: str, text: Text) -> Text:
    """The text, if it is called as what holds it. Raises SpecError E320."""
    if name == AUTO:
        raise SpecError("E320", f"no text is called {AUTO}: one that fits is chosen", text.where("algorithm"))
    if text.name != name:
        raise SpecError(
            "E320", f"'{text.name}' stands where '{name}' is meant", text.where("algorithm"), f"algorithm: {name}"
        )
    return text
