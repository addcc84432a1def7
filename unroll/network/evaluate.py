"""Value of an expression, straight from the definition of each node: the slow oracle of graphs and emitted text.

Everything is in mathematical layout, (..., rows, cols), a scalar (..., 1, 1), a family (K, rows, cols); float64 is
meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from itertools import combinations, product
from math import prod
from typing import Any, assert_never, cast

import sympy as sp
import torch
from torch import Tensor

from unroll.language.constructors import swap
from unroll.language.nodes import (
    STEP_OF_ENTRY,
    Add,
    Curve,
    Diag,
    Diagonal,
    Expr,
    Eye,
    FamilyLogSumExp,
    FamilySoftmax,
    FamilySum,
    Grid,
    Hold,
    Indicator,
    Inverse,
    LogDet,
    LogSumExp,
    Map,
    Max,
    Member,
    Mul,
    Multiplier,
    Node,
    Noise,
    Normalise,
    Ones,
    Op,
    Project,
    Prox,
    ProxMap,
    Signal,
    Softmax,
    Sorted,
    Spectral,
    SpectralDivergence,
    SpectralMap,
    SpectralNorm,
    SpectralProx,
    Spectrum,
    Sum,
    Sweep,
    Sym,
    Trace,
    Transpose,
    Worked,
    Zero,
    entry,
    free_indices,
    slot,
)


def _wide(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)


def _extreme(pick: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *args: reduce(pick, torch.broadcast_tensors(*map(_wide, args)))


def _of_tensors(name: str) -> Callable[..., Tensor]:
    return lambda x: getattr(torch, name)(_wide(x))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{f: _of_tensors(f) for f in ["exp", "log", "tanh", "sqrt", "sign", "sin", "cos", "atan", "erf", "sinh", "cosh"]},
    "Abs": lambda x: _wide(x).abs(),
    "Heaviside": lambda x, half=0.5: (torch.sign(_wide(x)) + 1) / 2,
    "reciprocal": lambda x: torch.where(x == 0, 0, 1 / torch.where(x == 0, 1, x)),
    "max": _extreme(torch.maximum),
    "min": _extreme(torch.minimum),
    "nonzero": lambda x: torch.where(_wide(x) >= torch.finfo(torch.float64).tiny, _wide(x), 1),
    "above_zero": lambda x: torch.where(_wide(x) == 0, 1e-77, _wide(x)),
    "log_of_mass": lambda x: torch.where(_wide(x) > 0, _wide(x).clamp_min(1e-320).log(), -1e300),
    "pow": lambda x, p: torch.pow(_wide(x), _wide(p)),
    "where": lambda yes, a, b: torch.where(yes, _wide(a), _wide(b)),
}
"""SymPy's names on tensors and numbers."""


@cache
def _function(c: sp.Expr) -> tuple[tuple[sp.Symbol, ...], Callable[..., Any]]:
    """The symbols of c, and c as a function of them."""
    symbols = cast(tuple[sp.Symbol, ...], tuple(sorted(c.free_symbols, key=str)))
    return symbols, sp.lambdify(symbols, cast(Any, c).replace(sp.Mul, _at_zero), modules=[_FUNCTIONS, "torch"])


def _at_zero(*factors: sp.Expr) -> sp.Expr:
    """0 log 0 = 0."""
    e = sp.Mul(*factors)
    logs = [f for f in factors if isinstance(f, sp.log)]
    m = e / logs[0] if logs else sp.S.One
    return sp.Piecewise((0, sp.Eq(m, 0)), (e, True)) if m.free_symbols and not m.is_positive else e


@dataclass(frozen=True)
class Evaluator:
    """values: tensors of symbols.  scalars: numbers or tensors (..., 1, 1), sizes too.  members: the k of U[k] now.  known: what has been worked out, by the members that it is of."""

    values: Mapping[Sym, Tensor]
    scalars: Mapping[sp.Symbol, Any]
    members: Mapping[str, int]
    dtype: torch.dtype = torch.float64
    known: dict[tuple[Expr, tuple[int, ...]], Tensor] = field(
        default_factory=dict[tuple[Expr, tuple[int, ...]], Tensor]
    )

    def size(self, n: sp.Expr) -> int:
        return int(swap(n, {s: self.scalars[s] for s in n.free_symbols if isinstance(s, sp.Symbol)}))

    def number(self, c: sp.Expr) -> Tensor:
        """A scalar formula, as a tensor."""
        return self.profile(c, {})

    def profile(self, c: sp.Expr, slots: Mapping[sp.Symbol, Tensor]) -> Tensor:
        if not c.free_symbols:
            return torch.tensor(float(c), dtype=self.dtype)
        symbols, function = _function(c)
        values = [slots[s] if s in slots else self.scalars[s] for s in symbols]
        tensors = [v if isinstance(v, Tensor) else torch.tensor(float(v), dtype=self.dtype) for v in values]
        found = function(*tensors)
        if isinstance(found, Tensor):
            return found if found.is_complex() else found.to(self.dtype)
        return torch.tensor(float(found), dtype=self.dtype)

    def __call__(self, e: Expr) -> Tensor:
        key = e, tuple(self.members[i] for i in _indices(e))
        if key not in self.known:
            self.known[key] = self.value(cast(Node, e))
        return self.known[key]

    def value(self, e: Node) -> Tensor:
        match e:
            case Sym() as s:
                return self.values[s]
            case Member(of, index):
                return self.values[of][self.members[index]]
            case Eye(n):
                return torch.eye(self.size(n), dtype=self.dtype)
            case Ones(rows, cols):
                return torch.ones(self.size(rows), self.size(cols), dtype=self.dtype)
            case Zero(rows, cols):
                return torch.zeros(self.size(rows), self.size(cols), dtype=self.dtype)
            case Add(terms):
                out = self(terms[0])
                for t in terms[1:]:
                    out = out + self(t)
                return out
            case Mul(c, factors):
                out = self(factors[0])
                for f in factors[1:]:
                    out = _times(out, self(f))
                return self.number(c) * out
            case Transpose(x):
                return self(x).mT
            case Inverse(x):
                return torch.linalg.inv(self(x))
            case Map(profile, args):
                tensors = torch.broadcast_tensors(*map(self, args))
                found = self.profile(profile, {slot(i): t for i, t in enumerate(tensors)})
                return found.expand_as(tensors[0])
            case Diag(x):
                return torch.diag_embed(self(x).squeeze(-1))
            case Diagonal(x):
                return self(x).diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            case Softmax(x, axis, causal):
                return (self.seen(self(x), axis) if causal else self(x)).softmax(axis - 2)
            case FamilySoftmax(index, n, x):
                return torch.stack(torch.broadcast_tensors(*self.family(index, n, x))).softmax(0)[self.members[index]]
            case FamilyLogSumExp(index, n, body):
                return torch.stack(self.family(index, n, body)).logsumexp(0)
            case Noise(_, _, x):  # of a network that is not being trained
                return self(x)
            case Normalise(kind, axis, eps, x, weight, bias):
                return self.normalised(kind, axis - 2, self.number(eps), self(x)) * self(weight) + self(bias)
            case SpectralMap(h, x):
                return self.spectral(x, lambda s: self.profile(h, {slot(0): s}))
            case SpectralProx(prox, x):
                return self.spectral(x, lambda s: self.prox(prox, s, {}))
            case Op("running_sum", x, adjoint):
                ones = torch.ones(self.size(x.cols), self.size(x.cols), dtype=self.dtype)
                return self(x) @ (ones.tril() if adjoint else ones.triu())
            case Op("repeat", x, adjoint, sizes):
                n = prod(map(self.size, sizes))
                copies = torch.kron(
                    torch.eye(self.size(e.rows if adjoint else x.rows), dtype=self.dtype),
                    torch.ones(n, 1, dtype=self.dtype),
                )
                return (copies.T if adjoint else copies) @ self(x)
            case Op("first", x, _, (n,)):
                return torch.eye(self.size(n), self.size(x.rows), dtype=self.dtype) @ self(x)
            case Op("groups", x, True, _):
                return self(x).mT.flatten(-2).unsqueeze(-1)
            case Op("groups", x, _, (n,)):
                return torch.stack(self(x).squeeze(-1).split(self.size(n), -1), -1)
            case Op("shifts", x, adjoint, sizes):
                return self.shifts(self(x), adjoint, [self.size(n) for n in sizes])
            case Op(_, x, adjoint):
                return self.difference(self(x), adjoint)
            case Spectrum(index, sizes, x, conjugate):
                row = _frequencies(*map(self.size, sizes))[self.members[index]]
                blocks = self(x).unflatten(-2, (-1, len(row)))
                return torch.einsum("t,...ctn->...cn", row.conj() if conjugate else row, blocks.to(row.dtype))
            case Signal(index, sizes, body):
                back = _frequencies(*map(self.size, sizes)).conj()
                blocks = torch.stack(self.family(index, sp.Mul(*sizes), body)).to(back.dtype)
                return torch.einsum("wt,w...cn->...ctn", back, blocks).real.flatten(-3, -2)
            case Hold(x):
                return self(x).detach()
            case Prox() as node:
                from unroll.calculus.prox import plan

                return self(plan(node))
            case ProxMap(prox, args, slots):
                first, *rest = torch.broadcast_tensors(*map(self, args))
                return self.prox(prox, first, dict(zip(slots, rest, strict=True)))
            case Multiplier(prox, args, slots):
                v, a, s, _, *rest = args
                return self.multiplier(prox, slots, *torch.broadcast_tensors(*map(self, (v, a, *rest))), total=self(s))
            case Sweep(q, fall, at, step):
                return self.sweep(entry(at), self(q), self(fall), self(at), step)
            case Sorted(x):
                return self(x).sort(dim=-2, descending=True).values
            case Worked("top", (x, share)):
                return _top(self(x), self(share))
            case Worked("signs", (x, seed)):
                drawn = torch.Generator().manual_seed(int(self(seed)))
                return 2.0 * torch.randint(0, 2, self(x).shape, generator=drawn).to(self.dtype) - 1
            case Worked(name, (x,)):
                return _factor(name, self(x))
            case Worked():
                raise AssertionError(f"internal error, please report: no {e.name}")
            case Curve(points, x, grid):
                return _curve(self(points), self(x), grid)
            case Project(name, params, x):
                return project(name, self(x), [self(p) if isinstance(p, Expr) else self.number(p) for p in params])
            case FamilySum(index, n, body):
                return torch.stack(self.family(index, n, body)).sum(0)
            case Sum(x, axis):
                return self.along(x, axis, torch.sum)
            case LogSumExp(x, axis):
                return self.along(x, axis, torch.logsumexp)
            case Max(x, axis):
                return self.along(x, axis, torch.amax)
            case Trace(x):
                return self(x).diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            case LogDet(x):
                return torch.linalg.slogdet(self(x)).logabsdet[..., None, None]
            case Spectral(h, x):
                s = torch.linalg.svdvals(self(x))
                s = torch.where(s > s.amax(-1, keepdim=True) * 1e-13 * s.shape[-1], s, 0.0)
                return self.profile(h, {slot(0): s}).sum(-1)[..., None, None]
            case SpectralNorm(x):
                return torch.linalg.svdvals(self(x)).amax(-1)[..., None, None]
            case SpectralDivergence(prox, symmetric, x):
                return self.spectral_divergence(prox, symmetric, self(x))
            case Indicator(name, params, x):
                numbers = [self(p) if isinstance(p, Expr) else self.number(p) for p in params]
                return self.indicator(name, self(x), numbers)
            case _ as never:
                assert_never(never)

    def family(self, index: str, n: sp.Expr, body: Expr) -> list[Tensor]:
        """The body for every member."""
        return [replace(self, members={**self.members, index: k})(body) for k in range(self.size(n))]

    def shifts(self, x: Tensor, adjoint: bool, sizes: list[int]) -> Tensor:
        """Column (n, s) is column n with its places moved on by s; the adjoint moves back and sums over s."""
        came = _moved(*sizes)
        if adjoint:
            parts = x.unflatten(-2, (-1, len(came))).unflatten(-1, (-1, len(came)))
            back = came.argsort(0)[:, None, :]
            return torch.take_along_dim(parts, back.expand(parts.shape), -3).sum(-1).flatten(-3, -2)
        return x.unflatten(-2, (-1, len(came)))[..., came, :].mT.flatten(-2).flatten(-3, -2)

    def seen(self, x: Tensor, axis: int) -> Tensor:
        """Scores of a causal softmax: -inf where what is looked at comes after what looks."""
        ahead = torch.ones_like(x).tril(-1) if axis == 0 else torch.ones_like(x).triu(1)
        return x.masked_fill(ahead.bool(), -torch.inf)

    def normalised(self, kind: str, dim: int, eps: Tensor, x: Tensor) -> Tensor:
        if kind == "sphere":
            return x / x.norm(dim=dim, keepdim=True).clamp_min(eps)
        centred = x - x.mean(dim, keepdim=True) if kind == "layer_norm" else x
        return centred / (centred.square().mean(dim, keepdim=True) + eps).sqrt()

    def along(self, x: Expr, axis: int | None, reduce: Callable[..., Tensor]) -> Tensor:
        return reduce(self(x), dim=(-2, -1) if axis is None else axis - 2, keepdim=True)

    def spectral(self, x: Expr, h: Callable[[Tensor], Tensor]) -> Tensor:
        u, s, v = torch.linalg.svd(self(x), full_matrices=False)
        s = torch.where(s > s.amax(-1, keepdim=True) * 1e-13 * s.shape[-1], s, 0.0)
        return u @ torch.diag_embed(h(s)) @ v

    def spectral_divergence(self, record: Any, symmetric: bool, x: Tensor) -> Tensor:
        """Candes, Sing-Long & Trzasko 2013, as written there; of eigenvalues, the sum of all divided differences."""
        s = torch.linalg.eigvalsh((x + x.mT) / 2) if symmetric else torch.linalg.svdvals(x)
        least = 1e-13 * s.abs().amax(-1, keepdim=True) * s.shape[-1]
        with torch.enable_grad():
            at = torch.where(s.abs() > least, s, 0.0).detach().requires_grad_()
            h = self.prox(record, at, {})
            (slope,) = torch.autograd.grad(h.sum(), at)
        s, h = at.detach(), h.detach()
        ratio = torch.where(s == 0, slope, h / torch.where(s == 0, 1, s))
        of, value, tie = (s, h, slope) if symmetric else (s.square(), 2 * s * h, slope + ratio)
        total = slope.sum(-1) + (0 if symmetric else abs(x.shape[-2] - x.shape[-1])) * ratio.sum(-1)
        for i, j in combinations(range(s.shape[-1]), 2):
            near, gap = (s[..., i] - s[..., j]).abs() <= least[..., 0], of[..., i] - of[..., j]
            quotient = (value[..., i] - value[..., j]) / torch.where(near, 1, gap)
            total = total + torch.where(near, tie[..., i], quotient)
        return total[..., None, None]

    def prox(self, record: Any, v: Tensor, given: Mapping[sp.Symbol, Tensor]) -> Tensor:
        """A scalar prox record, called by the names of its scalars."""
        values = {str(s): given[s] if s in given else self.scalars[s] for s in record.scalars}
        step = values.pop(str(record.t), None)
        out = record(v, step, **values)
        return (
            out.reshape(v.shape) if out.numel() == v.numel() else out
        )  # numbers are (1, 1): they add axes to singular values

    def multiplier(
        self, record: Any, slots: tuple[sp.Symbol, ...], v: Tensor, a: Tensor, *rest: Tensor, total: Tensor
    ) -> Tensor:
        """By bisection of an interval that is doubled until it is wide enough; its derivative by one step of Newton."""
        given = dict(zip(slots, rest, strict=True))
        excess = lambda m: (a * self.prox(record, v - m * a, given)).sum(-2, keepdim=True) - total
        with torch.no_grad():
            low, high = (sign * torch.ones_like(excess(torch.zeros_like(v[..., :1, :]))) for sign in (-1, 1))
            while (short := excess(low) < 0).any() and low.min() > -1e30:
                low = torch.where(short, 2 * low, low)
            while (short := excess(high) > 0).any() and high.max() < 1e30:
                high = torch.where(short, 2 * high, high)
            for _ in range(64):
                middle = (low + high) / 2
                above = excess(middle) > 0
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            m, width = (low + high) / 2, 1e-7 * (1 + v.abs().amax(-2, keepdim=True))
            slope = (excess(m - width) - excess(m + width)) / (2 * width)
        return m + torch.where(slope == 0, 0, excess(m) / torch.where(slope == 0, 1, slope))

    def sweep(self, v: Sym, q: Tensor, fall: Tensor, z: Tensor, step: Expr) -> Tensor:
        """Entry by entry, each time with the step of all entries, of which one is taken."""
        weight = q.diagonal(dim1=-2, dim2=-1)
        top = weight.amax(-1, keepdim=True)
        weight = torch.where(weight > 0, weight, torch.where(top > 0, top, 1) * torch.finfo(self.dtype).eps)
        for i in range(z.shape[-2]):
            number = 1 / weight[..., i, None, None]
            values, scalars = {**self.values, v: z + number * fall}, {**self.scalars, STEP_OF_ENTRY: number}
            new = replace(self, values=values, scalars=scalars, known={})(step)
            moved = torch.where(torch.arange(z.shape[-2])[:, None] == i, new - z, 0)
            z, fall = z + moved, fall - q @ moved
        return z

    def difference(self, x: Tensor, adjoint: bool) -> Tensor:
        n = x.shape[-2] + adjoint
        d = torch.eye(n, dtype=x.dtype)[1:] - torch.eye(n, dtype=x.dtype)[:-1]
        return (d.T if adjoint else d) @ x

    def indicator(self, name: str, x: Tensor, params: list[Tensor]) -> Tensor:
        gap = params[0] @ x - params[1] if name == "affine" else project(name, x, params) - x
        gap = x.norm(dim=-2, keepdim=True) - 1 if name == "sphere" else gap  # 0 stays 0, and is not in it
        inside = gap.abs().amax((-2, -1), keepdim=True) < 1e-8
        return torch.where(inside, 0.0, torch.inf).to(x.dtype)


def project(name: str, x: Tensor, params: list[Tensor]) -> Tensor:
    """Nearest point of a set, or the prox of a function, by bisection or sorting."""
    match name, params:
        case "nonneg", []:
            return x.clamp_min(0)
        case "box", [a, b]:
            return torch.minimum(torch.maximum(x, a), b)
        case "ball_inf", [r]:
            return torch.minimum(torch.maximum(x, -r), r)
        case "ball1", [r]:
            return x.sign() * _lowered(x.abs(), r, (-2, -1))
        case "columns_ball1", [r]:
            return x.sign() * _lowered(x.abs(), r, (-2,))
        case "simplex", _:
            total = params[0] if params else torch.ones(())
            return _lowered(x, total, (-2,), x.amax(-2, keepdim=True) - total)
        case _ if x.ndim > 2:
            return torch.stack([project(name, m, [p[i] if p.ndim > 2 else p for p in params]) for i, m in enumerate(x)])
        case "ball2", [r]:
            return x * (r / x.norm()).clamp_max(1)
        case "sorted_l1", [w]:
            return torch.stack([_sorted_shrunk(y, s) for y, s in zip(x.T, w.expand(x.shape).T, strict=True)], 1)
        case "tv", [t]:
            edges = t.expand(max(x.shape[0] - 1, 0), x.shape[1])
            return torch.stack([_taut(y, e) for y, e in zip(x.T, edges.T, strict=True)], 1)
        case "sphere", []:
            length = x.norm(dim=0)
            return x / torch.where(length == 0, 1, length)
        case "unit_columns", []:
            return x / x.norm(dim=0).clamp_min(1)
        case "volume", [t]:
            w, q = torch.linalg.eigh((x + x.T) / 2)
            return q @ torch.diag((w + (w**2 + 4 * t.squeeze()).sqrt()) / 2) @ q.T
        case "psd", []:
            w, q = torch.linalg.eigh((x + x.T) / 2)
            return q @ torch.diag(w.clamp_min(0)) @ q.T
        case "stiefel" | "orthogonal", []:
            u, _, v = torch.linalg.svd(x, full_matrices=False)
            return u @ v
        case "sparse", [s]:
            kept = x.abs().flatten().sort(descending=True, stable=True).indices[: int(s)]
            return torch.zeros_like(x).flatten().scatter(0, kept, x.flatten()[kept]).reshape(x.shape)
        case "rank_at_most", [r]:
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            return u[:, : int(r)] @ torch.diag(s[: int(r)]) @ v[: int(r)]
        case _:
            raise AssertionError(f"internal error, please report: no set {name}")


def _top(x: Tensor, share: Tensor) -> Tensor:
    """1 where no more entries of the sample are as large, itself among them, than the share says."""
    size = x.abs().flatten(-2)
    as_large = (size[..., None, :] >= size[..., :, None]).sum(-1)
    count = (share.nan_to_num(0).flatten(-2) * size.shape[-1] * (1 + 1e-6) + 0.5).floor()
    return (as_large <= count).to(x.dtype).reshape(x.shape)


def _factor(name: str, x: Tensor) -> Tensor:
    """Factorisations, singular values from those of the Gram matrix, and the pseudoinverse by least squares."""
    rank = min(x.shape[-2:])
    match name:
        case "pinv":
            return torch.linalg.lstsq(x, torch.eye(x.shape[-2], dtype=x.dtype), driver="gelsd").solution
        case "svd_s":
            return torch.linalg.eigvalsh(x @ x.mT).flip(-1)[..., :rank, None].clamp_min(0).sqrt()
        case "svd_u" | "svd_v" | "eigh_vectors":
            u = torch.linalg.eigh(x).eigenvectors if name == "eigh_vectors" else torch.linalg.svd(x, False).U
            up = u.gather(-2, u.abs().argmax(-2, keepdim=True)).sign()
            return torch.linalg.svd(x, False).Vh.mT * up if name == "svd_v" else u * up
        case "qr_q" | "qr_r":
            q, r = torch.linalg.qr(x)
            up = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0)
            return q * up[..., None, :] if name == "qr_q" else r * up[..., None]
        case _:
            assert name == "eigh_values", name
            return torch.linalg.eigvalsh(x)[..., None]


def _curve(points: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """The sum of a bump for each place, a hat or a cubic B-spline, times its number; beyond the ends its tangent there."""
    y = points.mT if points.shape[-1] == 1 else points  # (rows or 1, places)
    y = torch.cat([-y.flip(-1), 0 * y[..., :1], y], -1) if grid.odd else y
    place = (x - grid.low) / grid.width
    inside = place.clamp(0, grid.knots - 1)
    y = torch.cat([2 * y[..., :1] - y[..., 1:2], y, 2 * y[..., -1:] - y[..., -2:-1]], -1)
    gap = (inside[..., None] - torch.arange(-1, grid.knots + 1)).abs()
    hat = (1 - gap).clamp_min(0)
    bump = hat if grid.degree == 1 else ((2 - gap).clamp_min(0) ** 3 - 4 * hat**3) / 6
    ends = torch.where(place < 0, (y[..., 1] - y[..., 0])[..., None], (y[..., -1] - y[..., -2])[..., None])
    return (bump * y[..., None, :]).sum(-1) + (place - inside) * ends


@cache
def _indices(e: Expr) -> tuple[str, ...]:
    return tuple(sorted(free_indices(e)))


@cache
def _frequencies(*sizes: int) -> Tensor:
    """The orthonormal Fourier matrix of the places, a Kronecker product over their axes: (T, T)."""
    one = torch.ones(1, 1, dtype=torch.complex128)
    for n in sizes:
        k = torch.arange(n, dtype=torch.float64)
        one = torch.kron(one, torch.exp(-2j * torch.pi / n * k.outer(k)) / n**0.5)
    return one


@cache
def _moved(*sizes: int) -> Tensor:
    """Which place comes to place t when all are moved on by s: (t, s)."""
    places = torch.arange(prod(sizes)).reshape(sizes)
    moves = product(*map(range, sizes))
    return torch.stack([places.roll(s, tuple(range(len(sizes)))).flatten() for s in moves], -1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """A product, one of them complex perhaps."""
    kind = torch.promote_types(a.dtype, b.dtype)
    return a.to(kind) @ b.to(kind)


def _taut(y: Tensor, t: Tensor, left: float = 0.0, right: float = 0.0) -> Tensor:
    """The prox of sum(t |differences|): which entries lie above the mean, by clipping along the line; each part by itself."""
    level, n = (y.sum() + right - left) / len(y), len(y)
    slopes, pull = list[Tensor](), torch.tensor(left, dtype=y.dtype)
    for i in range(n):
        slopes.append(pull + level - y[i])
        pull = torch.minimum(torch.maximum(slopes[i], -t[i]), t[i]) if i < n - 1 else slopes[i]
    up = [bool(slopes[-1] < right)]
    for i in range(n - 2, -1, -1):
        up.insert(0, bool(slopes[i] < 0) if abs(slopes[i]) > t[i] else up[0])
    ends = [i for i in range(n - 1) if up[i] != up[i + 1]]
    if not ends:
        return level.expand(n)
    i = ends[0]
    at = float(t[i]) if up[i + 1] else -float(t[i])
    return torch.cat([_taut(y[: i + 1], t[:i], left, at), _taut(y[i + 1 :], t[i + 1 :], at, right)])


def _sorted_shrunk(v: Tensor, w: Tensor) -> Tensor:
    """The prox of the sum of w times the magnitudes, the largest first: neighbours out of order are pooled, one pair at a time."""
    size, order = v.abs().sort(descending=True, stable=True)
    blocks = list[list[Tensor]]()
    for gap in size - w:
        blocks.append([gap])
        while len(blocks) > 1 and torch.stack(blocks[-1]).mean() >= torch.stack(blocks[-2]).mean():
            last = blocks.pop()
            blocks[-1] = blocks[-1] + last
    means = torch.cat([torch.stack(b).mean().expand(len(b)) for b in blocks]).clamp_min(0)
    return v.sign() * torch.zeros_like(v).scatter(0, order, means)


def _lowered(x: Tensor, total: Tensor, axes: tuple[int, ...], low: Tensor | None = None) -> Tensor:
    """max(x - t, 0) with the least t >= low, or 0, that lets it sum to no more than `total`: by bisection."""
    high = x.amax(axes, keepdim=True)
    low = torch.zeros_like(high) if low is None else low.expand_as(high)
    above: Callable[[Tensor], Tensor] = lambda t: (x - t).clamp_min(0).sum(axes, keepdim=True) > total
    high = torch.where(above(low), high, low)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = torch.where(above(middle), middle, low), torch.where(above(middle), high, middle)
    return (x - (low + high) / 2).clamp_min(0)


def evaluate(e: Expr, values: Mapping[Sym, Tensor], scalars: Mapping[sp.Symbol, Any]) -> Tensor:
    """The value of e: (..., rows, cols)."""
    return Evaluator(values, scalars, {})(e)
