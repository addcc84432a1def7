"""Operations that emitted source may need: each a few lines of torch, written out into the module that uses it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One function of emitted source: its text, what it computes, the shapes it takes, where it comes from."""

    name: str
    source: str
    about: str
    shapes: str
    origin: str


QUADRATIC_ROOT = Operation(
    "quadratic_root",
    '''def quadratic_root(a, b, c):
    """The zero of a z^2 + b z + c at which it increases, without cancellation."""
    r = torch.sqrt((b * b - 4 * a * c).clamp_min(0))
    b = b + torch.zeros_like(r)
    return torch.where(b > 0, -2 * c / (b + r), (r - b) / (2 * a))
''',
    "the zero of a z² + b z + c at which it increases: (√(b² − 4ac) − b) / 2a",
    "a, b, c broadcast; real; b² ≥ 4ac (else the vertex)",
    "Press et al., Numerical Recipes, section 5.6",
)

CUBIC_ROOT = Operation(
    "cubic_root",
    '''def cubic_root(which, a, b, c, d):
    """The largest (1), middle (0) or smallest (-1) real zero of a z^3 + b z^2 + c z + d; or the only one."""
    like = next(k for k in (d, c, b, a) if isinstance(k, torch.Tensor))
    wide = (torch.as_tensor(k, dtype=like.dtype, device=like.device) for k in (a, b, c, d))
    a, b, c, d = torch.broadcast_tensors(*wide)
    b, c, d = b / a, c / a, d / a
    p, q = (c - b * b / 3) / 3, (2 * b**3 / 27 - b * c / 3 + d) / 2  # x^3 + 3 p x + 2 q, z = x - b / 3
    gap = 4 * c**3 + 4 * b**3 * d + 27 * d * d - b * b * c * c - 18 * b * c * d  # < 0: three zeros
    r = torch.sqrt((-p).clamp_min(0))
    angle = torch.acos((-q / (r**3).clamp_min(1e-30)).clamp(-1, 1)) / 3
    low, high = (2 * r * torch.cos(angle - k * 2.0943951023931953) - b / 3 for k in (2, 0))
    far = torch.where(low.abs() > high.abs(), low, high)  # the other two from it, by Vieta: nothing cancels
    far = torch.where(far == 0, 1, far)
    pair, mean = -d / far, (c + d / far) / far / 2
    outer = mean + torch.where(mean < 0, -1.0, 1.0).to(q) * torch.sqrt((mean * mean - pair).clamp_min(0))
    inner = pair / torch.where(outer == 0, 1, outer)
    small, large = torch.minimum(outer, inner), torch.maximum(outer, inner)
    three = torch.maximum(small, torch.minimum(far, large))
    three = torch.maximum(far, large) if which == 1 else torch.minimum(far, small) if which == -1 else three
    s = -torch.where(q < 0, -1.0, 1.0).to(q) * (q.abs() + torch.sqrt(gap.clamp_min(0) / 108)) ** (1 / 3)
    one = s - p / torch.where(s == 0, 1, s) - b / 3
    z = torch.where(gap < 0, three, one)
    for _ in range(3):  # Newton, kept where it helps
        y, slope = ((z + b) * z + c) * z + d, (3 * z + 2 * b) * z + c
        near = z - y / torch.where(slope == 0, 1, slope)
        z = torch.where((((near + b) * near + c) * near + d).abs() < y.abs(), near, z)
    return z
''',
    "a chosen real zero of a z³ + b z² + c z + d, by cosines or cube roots, then Newton",
    "which: -1, 0 or 1; a, b, c, d broadcast, a ≠ 0, d a tensor",
    "Viète and Cardano; Press et al., Numerical Recipes, section 5.6",
)

WRIGHT_OMEGA = Operation(
    "wright_omega",
    '''def wright_omega(x):
    """w with w + log w = x: Newton on y + e^y = x, y = log w, from the right, where it is monotone."""
    y = torch.where(x > 1, torch.log(x.clamp_min(1)), x)
    for _ in range(7):
        e = torch.exp(y)
        y = y - (y + e - x) / (1 + e)
    return torch.where(x > 1, x - y, torch.exp(y))
''',
    "Wright's omega: w + log w = x, free of overflow",
    "x: any shape, real, finite",
    "Corless and Jeffrey 2002, doi:10.1007/3-540-45470-5_10",
)

BRACKETED_ROOT = Operation(
    "bracketed_root",
    '''def bracketed_root(h, slope, lo, hi, like):
    """The zero of an increasing h in [lo, hi], or the end it lies beyond: bisection, then Newton inside."""
    lo, hi = torch.zeros_like(like) + lo, torch.zeros_like(like) + hi
    low, high = h(lo) >= 0, h(hi) <= 0
    first, last = lo, hi
    for _ in range(36):
        z = lo + (hi - lo) / 2
        right = h(z) > 0
        lo, hi = torch.where(right, lo, z), torch.where(right, z, hi)
    z = lo + (hi - lo) / 2
    for _ in range(4):
        near = z - h(z) / slope(z)
        z = torch.where((near >= lo) & (near <= hi), near, z)
    z = torch.where(low, first, torch.where(high, last, z))
    return torch.where(like == like, z, like)  # a NaN stays one
''',
    "the zero of an increasing function in an interval, by a fixed number of steps",
    "h, slope: tensor -> tensor; lo, hi broadcast to the shape of like",
    "Press et al., Numerical Recipes, section 9.4",
)

RUNTIME: tuple[Operation, ...] = (QUADRATIC_ROOT, CUBIC_ROOT, WRIGHT_OMEGA, BRACKETED_ROOT)


def operation(name: str) -> Operation:
    """The record called `name`."""
    return next(op for op in RUNTIME if op.name == name)


def source_of(names: Iterable[str]) -> str:
    """Source of the named operations, in the order of RUNTIME."""
    wanted = set(names)
    assert wanted <= {op.name for op in RUNTIME}, wanted
    return "\n\n".join(op.source for op in RUNTIME if op.name in wanted)
