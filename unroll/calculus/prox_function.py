"""A derived scalar prox as people use it: a formula, a text, torch source, a function of tensors."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import sympy as sp

from unroll.calculus import prox_source
from unroll.calculus.prox_pieces import Pieces
from unroll.calculus.torch_functions import source_of
from unroll.calculus.torch_text import quadratic_root
from unroll.errors import DeriveError
from unroll.language.show import latex, pretty

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScalarProx(Pieces):
    """prox of t f at v: p(v, t) evaluates it, p.formula, p.curvature and p.proof say what was derived."""

    @cached_property
    def formula(self) -> sp.Expr | None:
        """The prox as a SymPy expression in v and the scalars; None if a root has no closed form or values decide."""
        if self.mode != "threshold":
            return None
        short = prox_source.textbook(self)
        if short is not None:
            return short
        segs = prox_source.segments(self)
        if any(z is None for _, z, _ in segs):
            return None
        cases = [(_textbook(z), self.x <= end) for end, z, _ in segs[:-1]] + [(_textbook(segs[-1][1]), True)]
        whole = sp.Piecewise(*cases)
        return (
            sp.sign(self.v) * whole.xreplace({self.x: sp.Abs(self.v)})
            if self.even
            else whole.xreplace({self.x: self.v})
        )

    @property
    def runtime(self) -> tuple[str, ...]:
        """Names of the runtime operations that `source` calls."""
        return tuple(sorted(prox_source.helpers_of(self)))

    def source(self, name: str) -> str:
        """Torch text of `def name(v, *scalars)`; it calls the operations named in `runtime`."""
        return _source(self, name)

    def plain(self, name: str) -> str:
        """What that text calls the same function without derivatives, which costs less to call."""
        return prox_source.plain(self, name)

    def slope_source(self, name: str) -> str:
        """Torch text of `def name(z, *scalars)`: dz/dv, from z."""
        return prox_source.emit_slope(self, name)

    def __call__(self, v: Tensor, t: Any = None, /, **values: Any) -> Tensor:
        """Evaluate the emitted source. Scalars by name, numbers or tensors that broadcast against v."""
        import torch

        given = values if t is None else {str(self.t): t, **values}
        missing = [str(s) for s in self.scalars if str(s) not in given]
        if missing:
            raise DeriveError("E401", f"the proximal step needs a value for {', '.join(missing)}")
        like = {"dtype": v.dtype, "device": v.device}
        arguments = [given[str(s)] for s in self.scalars]
        return _loaded(self)(
            v, *(a if isinstance(a, torch.Tensor) else torch.tensor(float(a), **like) for a in arguments)
        )

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """The formula on one line, for people."""
        return f"prox_t(v) = {self.formula_text()}"

    def formula_text(self) -> str:
        """What v becomes."""
        return self._body(pretty, str)

    def latex(self) -> str:
        """The formula in LaTeX."""
        return self._body(latex, lambda words: rf"\text{{{words}}}")

    def _body(self, show: Callable[[Any], str], say: Callable[[str], str]) -> str:
        if self.formula is not None:
            return show(self.formula)
        points = [show(k.at) for k in self.knots if k is not None and k.flat]
        for part in self.parts:
            points += [
                show(_textbook(r.z)) if r.z is not None else say("root of ") + show(self.u + part.G - self.x)
                for r in part.roots
            ]
        head = say("sign(v) times ") if self.even else ""
        where = say(", x = |v|") if self.even else ""
        choice = "" if len(points) == 1 else "one of " if self.mode == "threshold" else "the best of "
        return f"{head}{say(choice)}{', '.join(points)}{where}{say(self.tie)}"


@cache
def _source(prox: ScalarProx, name: str) -> str:
    """It is asked for wherever the function is called."""
    return prox_source.emit(prox, name)


@cache
def _loaded(prox: ScalarProx) -> Callable[..., Any]:
    import torch

    space: dict[str, Any] = {"torch": torch}
    exec(compile(f"{source_of(prox.runtime)}\n\n{prox.source('prox')}", "<derived prox>", "exec"), space)
    return space["prox"]


def _textbook(e: sp.Expr | None) -> sp.Expr:
    assert e is not None
    return e.replace(quadratic_root, lambda *a: quadratic_root(*a).textbook())
