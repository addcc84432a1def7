"""What the layers keep of the tokens of a text while it grows: `grow` of a program reads the next ones alone.

A call asks for the same things in the same order each time, so the place in that order says which of them it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from unroll.errors import UnrollError


class Kept:
    """seen: how many tokens were read, of so many texts. Without derivatives: what is held is written over."""

    def __init__(self) -> None:
        self.seen = self.texts = 0
        self._held: list[Tensor] = []
        self._place = 0
        self._by: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the network, which a copy elsewhere meets again with its next call."""
        return {**self.__dict__, "_by": None}

    @contextmanager
    def reading(self, count: int, by: nn.Module) -> Generator[None]:
        """Inside, `count` tokens are read by a network; if that fails, they do not count. Raises UnrollError E404 for another network."""
        if self._by is not None and self._by() is not by:
            raise UnrollError("E404", "what was kept is of another network", hint="a new Kept() begins a text")
        self._place = 0
        self._by = weakref.ref(by)
        yield
        self.seen += count

    def all(self, x: Tensor, dim: int) -> Tensor:
        """x of the new tokens -> of all so far, along dim. Room for them doubles when it is full."""
        held, end = self._next(), self.seen + x.shape[dim]
        if held is None or held.shape[dim] < end:
            sizes = list(x.shape)
            sizes[dim] = max(end, 2 * self.seen)
            room = x.new_empty(sizes)
            if held is not None:
                room.narrow(dim, 0, self.seen).copy_(held.narrow(dim, 0, self.seen))
            held = room
        held.narrow(dim, self.seen, x.shape[dim]).copy_(x)
        self._put(held)
        return held.narrow(dim, 0, end)

    def sum(self, x: Tensor, dim: int) -> Tensor:
        """Running sums along dim of what all so far are, at the new tokens."""
        before, sums = self._next(), x.cumsum(dim)
        sums = sums if before is None else sums + before
        self._put(sums.narrow(dim, -1, 1))
        return sums

    def _next(self) -> Tensor | None:
        return self._held[self._place] if self.seen else None

    def _put(self, value: Tensor) -> None:
        if self._place < len(self._held):
            self._held[self._place] = value
        else:
            self._held.append(value)
        self._place += 1
