"""What a formula of the language is worth, by Python itself: torch under the names of the language, nothing of the engine.

Matrices are (..., rows, cols), vectors (..., rows, 1); families are lists of matrices.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Value = Tensor | float


class Size(int):
    """A size, over which `for k in K` runs."""

    def __iter__(self) -> Any:
        return iter(range(self))


def wide(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)


def _total(x: Any, axis: int | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        return reduce(lambda a, b: a + b, x)
    return x.sum((-2, -1), keepdim=True) if axis is None else x.sum(axis - 2, keepdim=True)


def _logsumexp(x: Any, axis: int | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.stack(list(x)).logsumexp(0)
    return x.logsumexp((-2, -1), keepdim=True) if axis is None else x.logsumexp(axis - 2, keepdim=True)


def _largest(x: Tensor, axis: int | None = None) -> Tensor:
    return x.amax((-2, -1), keepdim=True) if axis is None else x.amax(axis - 2, keepdim=True)


def _fro(x: Tensor, axis: int | None = None) -> Tensor:
    return _total(x * x, axis).sqrt()


def _values(x: Tensor) -> Tensor:
    known = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.linalg.svdvals(x.where(known, 0))[..., None].where(known, torch.nan)


def _logdet(x: Tensor) -> Tensor:
    return torch.linalg.slogdet(x).logabsdet[..., None, None]


def _layer_norm(x: Tensor, axis: int = 0, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(axis - 2, keepdim=True)
    return centred / (centred.square().mean(axis - 2, keepdim=True) + eps).sqrt()


def _where(yes: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(yes), wide(a), wide(b))


def _of(f: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda x: f(wide(x))


def _huber(x: Any, d: Any) -> Tensor:
    return _where(wide(x).abs() <= d, wide(x) ** 2 / 2, d * (wide(x).abs() - d / 2))


def _kl(x: Tensor, y: Tensor) -> Tensor:
    return _total(torch.xlogy(x, x) - torch.xlogy(x, y) - x + y)


NAMES: dict[str, Callable[..., Any]] = {
    **{n: _of(getattr(torch, n)) for n in ["abs", "exp", "sqrt", "tanh", "sinh", "cosh", "atan", "erf", "sin", "cos", "sign", "sigmoid"]},
    "log": _of(lambda x: torch.log(x).where(x != 0, torch.nan)),  # at the edge of the domain: no value
    "over": lambda x, y: wide(x) / wide(y).where(wide(y) != 0, torch.nan),  # at a pole: no value, though that of 1/(1 + 1/0) is 0
    "compared": wide,
    "softplus": _of(functional.softplus),
    "logistic": _of(lambda x: functional.softplus(-x)),
    "pos": _of(lambda x: x.clamp_min(0)),
    "maximum": lambda x, y: torch.maximum(*torch.broadcast_tensors(wide(x), wide(y))),
    "minimum": lambda x, y: torch.minimum(*torch.broadcast_tensors(wide(x), wide(y))),
    "where": _where,
    "huber": _huber,
    "I": lambda n: torch.eye(n, dtype=torch.float64),
    "ones": lambda m, n=1: torch.ones(m, n, dtype=torch.float64),
    "inv": torch.linalg.inv,
    "diag": lambda x: torch.diag_embed(x.squeeze(-1)),
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1)[..., None],
    "rows": lambda x: Size(x.shape[-2]),
    "cols": lambda x: Size(x.shape[-1]),
    "sum": _total,
    "dot": lambda x, y: _total(x * y),
    "trace": lambda x: x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None],
    "logdet": _logdet,
    "det": lambda x: torch.linalg.det(x)[..., None, None],
    "sumsq": lambda x: _total(x * x),
    "norm1": lambda x: _total(x.abs()),
    "norm2": _fro,
    "norm_fro": _fro,
    "norm_inf": lambda x: _largest(x.abs()),
    "norm0": lambda x: _total((x != 0).double()),
    "norm4": lambda x: _total(x**4) ** 0.25,
    "group_norm": lambda x, axis: _total(_fro(x, axis)),
    "nuclear": lambda x: _total(_values(x)),
    "spectral": lambda x: _largest(_values(x)),
    "rank": lambda x: _total((_values(x) > 1e-12).double()),
    "tv": lambda x: _total(x.diff(dim=-2).abs()),
    "difference": lambda x: x.diff(dim=-2),
    "logsumexp": _logsumexp,
    "softmax": lambda x, axis: x.softmax(axis - 2),
    "normalize": lambda x, axis: x / _fro(x, axis),
    "entropy": lambda x: -_total(torch.xlogy(x, x)),
    "kl": _kl,
    "max_entry": _largest,
    "layer_norm": _layer_norm,
    "rms_norm": lambda x, axis=0, eps=1e-5: x / (x.square().mean(axis - 2, keepdim=True) + eps).sqrt(),
    "running_sum": lambda x: x.cumsum(-1),
    "stop_gradient": lambda x: x.detach(),
}  # fmt: skip


KINKED = ("abs", "pos", "maximum", "minimum", "norm1", "norm_inf", "max_entry", "tv", "compared")


def beside_kinks(size: float) -> dict[str, Callable[..., Any]]:
    """The functions that have kinks, each a little beside its argument, on a side of its own at each entry and call.

    At a tie inside a tie the chain rule takes a slope of each by itself: pos(minimum(x, x/2)) may have 0, 1/2, 1 at 0.
    """
    chance = torch.Generator().manual_seed(0)

    def moved(name: str) -> Callable[..., Any]:
        def f(x: Any, *others: Any) -> Any:
            x = torch.broadcast_tensors(wide(x), *map(wide, others))[0] if others else wide(x)
            noise = torch.randn(x.shape, generator=chance, dtype=x.dtype)
            if len(noise) > 2:  # all ties one way, all the other
                noise[0], noise[1] = 1, -1
            return NAMES[name](x + size * noise, *others)

        return f

    return {n: moved(n) for n in KINKED}


class Swapped(ast.NodeTransformer):
    """`x.T`, quotients and what is compared, of a batch; or products as calls of `times`, where those of Python mean something else."""

    def __init__(self, times: bool) -> None:
        self.times = times

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return node if self.times else ast.Attribute(node.value, "mT", node.ctx)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        left = node.left if self.times else ast.Call(ast.Name("compared", ast.Load()), [node.left], [])
        return ast.Compare(left, node.ops, node.comparators)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        match self.times, node.op:
            case True, ast.Mult():
                name = "times"
            case False, ast.Div():
                name = "over"
            case _:
                return node
        return ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], [])


def compiled(formula: str, times: bool = False) -> Any:
    tree = Swapped(times).visit(ast.parse(formula.strip(), mode="eval"))
    return compile(ast.fix_missing_locations(tree), "<formula>", "eval")


def function(formulas: Iterable[str], names: Mapping[str, Any], variable: str) -> Callable[[Tensor], Tensor]:
    """The sum of formulas as a function of one variable: (..., rows, cols) -> (...)."""
    codes = [compiled(f) for f in formulas]

    def total(z: Tensor) -> Tensor:
        space = {**NAMES, **names, variable: z}
        values = [wide(eval(c, space)) for c in codes]
        return sum((v.reshape(*v.shape[:-2]) if v.ndim > 1 else v for v in values), z.new_zeros(z.shape[:-2]))

    return total


def slope(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient at each of a batch of points, by autograd."""
    at = z.clone().requires_grad_()
    value = f(at).sum()
    return torch.autograd.grad(value, at, materialize_grads=True)[0] if value.requires_grad else torch.zeros_like(z)


def hessians(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Second derivatives at each of a batch of points: (B, rows, cols) -> (B, n, n)."""
    at = z.clone().requires_grad_()
    first = torch.autograd.grad(f(at).sum(), at, create_graph=True, materialize_grads=True)[0].flatten(1)
    if not first.requires_grad:
        return z.new_zeros(len(z), first.shape[1], first.shape[1])
    rows = [
        torch.autograd.grad(first[:, i].sum(), at, retain_graph=True, materialize_grads=True)[0].flatten(1)
        for i in range(first.shape[1])
    ]
    return torch.stack(rows, 1)


def sides(f: Callable[[Tensor], Tensor], z: Tensor, h: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Slopes from the left and from the right of one point, entry by entry, to second order in h."""
    steps = h * torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    at = f(z[None])
    right = (4 * f(z + steps) - 3 * at - f(z + 2 * steps)) / (2 * h)
    left = (3 * at - 4 * f(z - steps) + f(z - 2 * steps)) / (2 * h)
    return left.reshape(z.shape), right.reshape(z.shape)


# --- sets -------------------------------------------------------------------------------------------------------------


def _shrunk(x: Tensor, size: Tensor, r: float) -> Tensor:
    return x * (r / size.clamp_min(1e-300)).clamp_max(1)


def _simplex(x: Tensor) -> Tensor:
    kept = x.clamp_min(0) + (x.amax(-2, keepdim=True) <= 0) * (x >= x.amax(-2, keepdim=True))
    return kept / kept.sum(-2, keepdim=True)


def _psd(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    return vectors @ (values.clamp_min(0)[..., None] * vectors.mT)


def _turned(x: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left @ right


def _cut(x: Tensor, r: int) -> Tensor:
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    return left[..., :r] @ (values[..., :r, None] * right[..., :r, :])


def _sparse(x: Tensor, s: int) -> Tensor:
    flat = x.flatten(-2)
    kept = flat.abs().topk(s, -1).indices
    return torch.zeros_like(flat).scatter(-1, kept, flat.gather(-1, kept)).reshape(x.shape)


SETS: dict[str, Callable[..., Tensor]] = {
    "nonneg": lambda x: x.clamp_min(0),
    "box": lambda x, lo, hi: x.clamp(lo, hi),
    "simplex": _simplex,
    "ball1": lambda x, r: _shrunk(x, x.abs().sum((-2, -1), keepdim=True), r),
    "ball2": lambda x, r: _shrunk(x, _fro(x), r),
    "ball_inf": lambda x, r: x.clamp(-r, r),
    "sphere": lambda x: (x + (_fro(x, 0) == 0)) / _fro(x + (_fro(x, 0) == 0), 0),  # of 0, any point
    "psd": _psd,
    "orthogonal": _turned,
    "stiefel": _turned,
    "unit_columns": lambda x: _shrunk(x, _fro(x, 0), 1),
    "affine": lambda x, a, b: x - torch.linalg.pinv(a) @ (a @ x - b),
    "sparse": _sparse,
    "rank_at_most": _cut,
}  # fmt: skip
"""Some point of the set near x, x itself where it is in the set: which one does not matter, they are candidates only."""


def inside(constraints: Iterable[str], names: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """A map onto `z in SET(...)`, one after the other; `member` tells whether all hold afterwards."""
    maps: list[Callable[[Tensor], Tensor]] = []
    for text in constraints:
        name, _, rest = text.split(" in ")[1].partition("(")
        args = eval(f"({rest.removesuffix(')')},)" if rest else "()", {**NAMES, **names})
        maps.append(lambda x, name=name, args=args: SETS[name](x, *args))
    return lambda x: reduce(lambda at, f: f(at), maps, x)
