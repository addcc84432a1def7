"""A user's word becomes an identifier of emitted text; a remark becomes a comment."""

from __future__ import annotations

import builtins
import keyword
import re
import unicodedata

from unroll.calculus import torch_functions as runtime
from unroll.lower.operations import HELPERS

_TAKEN = (
    frozenset(
        ["torch", "nn", "F", "math", "functools", "self", "layers", "layer", "trace", "kept", "s", *dir(builtins)]
    )
    | HELPERS.keys()
    | {op.name for op in runtime.RUNTIME}
)
"""Names that emitted functions use."""


MEMBERS = frozenset(
    [
        "takes",
        "shared_sizes",
        "numbers",
        "drawn",
        "terms_of",
        "initialise",
        "construct",
        "built",
        "trace",
        "objective",
        "source",
        "graph",
        "learned",
        "given",
        "scalars",
        "inputs",
        "variables",
        "layers",
        "program",
        "spec",
        "derivation",
        "save",
    ]
)
"""What a network has besides what it holds."""


class Names:
    """The one place where a user's word becomes an identifier of emitted text; distinct words stay distinct."""

    def __init__(self, taken: frozenset[str] = _TAKEN) -> None:
        self.given: dict[tuple[str, str], str] = {}
        self.used: set[str] = set(taken)

    def __call__(self, kind: str, word: str, base: str = "") -> str:
        """The identifier of a word of some kind ("state", "given", ...), like `base`; always the same for the same pair."""
        key = (kind, word)
        if key not in self.given:
            self.given[key] = self.fresh(base or word)
        return self.given[key]

    def fresh(self, word: str) -> str:
        name = base = identifier(word)
        count = 2
        while name in self.used or keyword.iskeyword(name) or keyword.issoftkeyword(name):
            name = f"{base}_" if name == base else f"{base}_{count}"
            count += name != f"{base}_"
        self.used.add(name)
        return name


def identifier(word: str) -> str:
    """Letters, digits and underscores only, not starting with a digit or two underscores."""
    plain = re.sub(r"\W", "_", unicodedata.normalize("NFKC", word))
    plain = re.sub(r"^_+", "", plain)[:60] or "x"
    return plain if plain.isidentifier() else f"x_{plain}"


def remark(text: str) -> str:
    """Text for a comment or docstring: one line, and nothing that could end it."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat.replace("\\", "\\\\").replace('"""', "'''")
