"""Text from a network that was trained to say which token comes next: one drawn token after another.

Legend: B texts, T tokens of each, V rows of the table of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unroll.errors import UnrollError

WRITTEN = 300
"""Tokens that follow where nobody says how many, at most."""


@dataclass(frozen=True)
class Draw:
    """How a token is drawn. temperature: what logits are divided by; 0: the likeliest.  top_k: of so many of the likeliest.
    top_p: of the fewest of the likeliest that have this share together (Holtzman et al. 2020, arXiv:1904.09751)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if not (t >= 0 and math.isfinite(t)):
            raise UnrollError("E404", f"temperature is a number from 0 on, not {t}")
        if k is not None and k < 1:
            raise UnrollError("E404", f"top_k is how many tokens are drawn from, at least 1, not {k}")
        if p is not None and not 0 < p <= 1:
            raise UnrollError("E404", f"top_p is a share above 0, at most 1, not {p}")

    def shares(self, logits: Tensor) -> Tensor:
        """What each token is drawn with: (B, V) -> (B, V) in float64, rows sum to 1."""
        logits = logits.double()
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        places = order.argsort(-1)  # 0: the likeliest, the first of equals
        if self.temperature == 0:
            return (places == 0).double()
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_k is not None:
            p = _of(p, places < self.top_k)
        if self.top_p is not None:
            likeliest = p.gather(-1, order)
            before = likeliest.cumsum(-1) - likeliest
            p = _of(p, (before < self.top_p).gather(-1, places))
        return p

    def __call__(self, logits: Tensor, draw: torch.Generator) -> Tensor:
        """(B, V) -> (B,), drawn on the CPU: the same on every device."""
        return torch.multinomial(self.shares(logits.cpu()), 1, generator=draw).squeeze(-1).to(logits.device)


def _of(p: Tensor, kept: Tensor) -> Tensor:
    p = p * kept
    return p / p.sum(-1, keepdim=True)


def continued(
    tokens: Tensor,
    length: int,
    answer: Callable[[Tensor, bool], Tensor],
    draw: Draw,
    *,
    seed: int,
    known: int,
    most: int,
    window: int | None,
) -> Iterator[Tensor]:
    """`length` tokens (B,) after tokens (B, T), one after another; answer: tokens so far (B, T), and whether they are a
    text that it has not begun to read -> logits (B, V) of the next.

    known: how many tokens stand for words.  most: the longest text; beyond it the last `window` tokens are a text of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    anew = True
    for _ in range(length):
        if tokens.shape[1] > most:
            assert window is not None, "internal error, please report: a text that is too long"
            tokens, anew = tokens[:, -window:], True
        logits, anew = answer(tokens, anew)[..., :known], False
        if not bool(logits.isfinite().all()):
            raise UnrollError("E404", "the network answers with values that are not finite", hint="look at its weights")
        new = draw(logits, generator)
        tokens = torch.cat([tokens, new[:, None].to(tokens.dtype)], 1)
        yield new


def check_length(tokens: Tensor, length: int, most: int, window: int | None) -> None:
    """Raises UnrollError E404 for what the network cannot read."""
    if tokens.ndim not in (1, 2) or 0 in tokens.shape:
        raise UnrollError("E404", f"a text begins with at least one token, (B, T); these are {tuple(tokens.shape)}")
    if length < 0:
        raise UnrollError("E404", f"length is how many tokens follow, not {length}")
    if window is not None and not 0 < window <= most:
        raise UnrollError("E404", f"window is how many of the last tokens are read anew, 1 to {most}, not {window}")
    begun = tokens.shape[-1]
    if begun > most:
        raise UnrollError("E404", f"{begun} tokens are more than the longest text has, {most}")
    if window is None and begun + length > most + 1:
        hint = f"length={max(most + 1 - begun, 0)}; or window={max(most // 2, 1)}, which goes on after the end from so many last tokens, as from a new text"
        message = f"{begun} tokens and {length} more: the longest text that this network was made for has {most}"
        raise UnrollError("E404", message, hint=hint)


@contextmanager
def at_rest(net: nn.Module) -> Generator[None]:
    """Inside, the network is as in evaluation and takes no derivatives."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        net.train(training)
