"""Compile an optimisation problem, declared in a few lines of YAML, into a deep network.

    net = unroll.compile("specs/lista.yaml", seed=0)     # path, library name, YAML text or dict
    z = net(x)                                           # (..., m) -> (..., n)

Everything that is not named here is private. Heavy libraries load when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unroll.api import compile, derive, loss, prox, save
    from unroll.errors import DeriveError, SpecError, UnrollError
    from unroll.from_files import restore
    from unroll.laws.laws import check
    from unroll.model.audit import audit
    from unroll.model.inside import active_atoms, attention_maps, components, jaccard, segment
    from unroll.model.module import Model
    from unroll.model.transfer import transfer
    from unroll.model.weights import release_weights, restore_weights
    from unroll.model.whitebox import white_box
    from unroll.model.words import words
    from unroll.network.loss import Loss
    from unroll.network.network import Network
    from unroll.pages.inside import draw_atoms, draw_components, draw_curves, draw_segments
    from unroll.pages.page import report
    from unroll.solver.solve import solve
    from unroll.spec import load

__version__ = "0.1.0"
__all__ = [
    "DeriveError", "Loss", "Model", "Network", "SpecError", "UnrollError", "active_atoms", "attention_maps", "audit",
    "check", "compile", "components", "derive", "draw_atoms", "draw_components", "draw_curves", "draw_segments",
    "jaccard", "load", "loss", "prox", "release_weights", "report", "restore", "restore_weights", "save", "segment",
    "solve", "transfer", "white_box", "words",
]  # fmt: skip

_HOME = {
    "DeriveError": "errors", "SpecError": "errors", "UnrollError": "errors", "Network": "network.network", "load": "spec",
    "audit": "model.audit", "Loss": "network.loss", "Model": "model.module", "release_weights": "model.weights", "restore_weights": "model.weights",
    "check": "laws.laws", "solve": "solver.solve", "white_box": "model.whitebox", "report": "pages.page",
    "compile": "api", "derive": "api", "loss": "api", "prox": "api", "restore": "from_files", "save": "api",
    "transfer": "model.transfer", "words": "model.words",
    **dict.fromkeys(("active_atoms", "attention_maps", "components", "jaccard", "segment"), "model.inside"),
    **dict.fromkeys(("draw_atoms", "draw_components", "draw_curves", "draw_segments"), "pages.inside"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"unroll.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'unroll' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
