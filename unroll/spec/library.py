"""Find objectives, specs and presets by name or by path: the user's own folders first, then what is shipped.

Standard library only.
"""

from __future__ import annotations

import re
from os.path import isdir, isfile  # no error of the system for a name that no file can have
from pathlib import Path
from typing import Literal

from unroll.errors import SpecError, Where, did_you_mean, quote

Kind = Literal["objectives", "specs", "presets", "algorithms"]
FOLDERS: dict[Kind, str] = {
    "objectives": "objectives",
    "specs": "specs",
    "presets": "specs/presets",
    "algorithms": "specs/algorithms",
}
SUFFIXES = (".yaml", ".yml")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


def folders(kind: Kind) -> tuple[Path, ...]:
    """Where entries of this kind are looked for, in order: here, in the package, in the checkout around it."""
    package = Path(__file__).parents[1]
    return (Path(FOLDERS[kind]), package / "_library" / FOLDERS[kind], package.parent / FOLDERS[kind])


def names(kind: Kind) -> tuple[str, ...]:
    """All names of this kind, sorted."""
    return tuple(sorted({path.stem for folder in folders(kind) for path in folder.glob("*.yaml")}))


def find(name: str, kinds: tuple[Kind, ...], where: Where | None = None, near: Path = Path()) -> Path:
    """The file that `name` means: a path (it ends in .yaml; looked for beside `near` first), or a library name.

    Raises SpecError E001 (no such file), E003 (no such name), at `where`.
    """
    if name.endswith(SUFFIXES):
        return _file(name, near, where)
    if NAME.fullmatch(name):
        for path in (folder / f"{name}.yaml" for kind in kinds for folder in folders(kind)):
            if isfile(path):
                return path
    known = sorted({n for kind in kinds for n in names(kind)})
    what = " or ".join(kind.removesuffix("s") for kind in kinds)
    note = f"there are: {', '.join(known)}" if known else "the library is empty"
    hint = did_you_mean(name, known) or f"a name from the list, or the path of a file that ends in {SUFFIXES[0]}"
    raise SpecError("E003", f"no {what} is called '{quote(name)}'", where, hint, (note,))


def _file(name: str, near: Path, where: Where | None) -> Path:
    for path in (near / name, Path(name)):
        if isfile(path):
            return path
    if isdir(name):
        raise SpecError("E001", f"'{quote(name)}' is a folder", where, "name the file in it")
    hint = did_you_mean(Path(name).name, _siblings(Path(name).parent))
    raise SpecError("E001", f"there is no file '{quote(name)}'", where, hint)


def _siblings(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.y*ml") if isfile(path)] if isdir(folder) else []
