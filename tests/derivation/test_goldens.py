"""What people read, kept as plain text: a change of it shows in review. Rewrite with `make goldens`."""

from __future__ import annotations

from pathlib import Path

import pytest

from unroll.pages import stages

GOLDENS = Path(__file__).parent / "goldens"
SPECS = ("fista", "lista", "lista_cp", "mcp_network", "simplex_unmixing")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("stage", "ending"), [("derivation", "txt"), ("source", "py.txt")])
def test_text_is_the_golden_one(name: str, stage: str, ending: str, update_goldens: bool) -> None:
    path = GOLDENS / f"{name}.{stage}.{ending}"
    text = stages.stage(name, stage).rstrip() + "\n"
    if update_goldens:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "read the difference; if it is meant: make goldens"
