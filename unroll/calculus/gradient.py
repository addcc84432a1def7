"""Reverse-mode gradients of matrix expressions, in closed form: one pullback per kind of node.

For a scalar e, the adjoint of a sub-expression x is de/dx, of the shape of x. `pullback` hands the adjoint of a node to its
children. Inside sum(... for k in K) adjoints depend on k; they are summed over k where the sweep leaves the family.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, assert_never, cast

import sympy as sp

from unroll.calculus.cones import signed
from unroll.calculus.stable import vanishing
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    diag,
    diagonal,
    elementwise,
    eye,
    family_softmax,
    family_sum,
    fresh_index,
    inverse,
    matmul,
    ones,
    operator,
    rename_index,
    softmax,
    spectral_map,
    times,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Axis,
    Curve,
    Diag,
    Diagonal,
    Expr,
    Eye,
    FamilyLogSumExp,
    FamilySoftmax,
    FamilySum,
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
    bound_indices,
    depends,
    free_indices,
    slot,
    walk,
)
from unroll.language.show import text
from unroll.language.traversal import require_scalar


@cache
def gradient(e: Expr, wrt: Sym) -> Expr:
    """de/dwrt, of the shape of `wrt`, for a scalar e. For a family: the gradient for member [k], free in the index k.

    Raises DeriveError E301 where e has no gradient (a norm at its kink, a constraint set).
    Source: Minka 2000, Old and New Matrix Algebra Useful for Statistics; Giles 2008, Collected matrix derivative results.
    """
    require_scalar(e)
    found = _sweep(e, eye(1), wrt)
    index = min((i for i, _ in found if i is not None), default="")
    return add(zeros(*wrt.shape), *(g if i is None else rename_index(g, i, index) for i, g in found))


def _sweep(e: Expr, seed: Expr, wrt: Sym) -> list[tuple[str | None, Expr]]:
    """Contributions to the adjoint of `wrt` from the adjoint `seed` of e. For a family: each with the index of its member."""
    adjoints: dict[Expr, list[Expr]] = {e: [seed]}
    found: list[tuple[str | None, Expr]] = []
    for node in reversed(list(walk(e)) if not isinstance(e, FamilySum | FamilyLogSumExp) else [e]):
        received = adjoints.pop(node, None)
        if received is None or not depends(node, wrt):
            continue
        g = add(*received)
        if node is wrt:
            found.append((None, g))
        elif isinstance(node, Member) and node.of is wrt:
            found.append((node.index, g))
        elif isinstance(node, FamilySum | FamilyLogSumExp):
            found += [
                (i, x if i == node.index else family_sum(node.index, node.size, x))
                for i, x in _sweep(node.body, _shared(node, g), wrt)
            ]
        else:
            for child, adjoint in pullback(cast(Node, node), g):
                assert adjoint.shape == child.shape, "an adjoint has the shape of its expression; please report"
                adjoints.setdefault(child, []).append(adjoint)
    return found


def _shared(node: FamilySum | FamilyLogSumExp, g: Expr) -> Expr:
    """What every member of a family receives: the adjoint, or its share of it."""
    return g if isinstance(node, FamilySum) else times(family_softmax(node.index, node.size, node.body), g)


def pullback(node: Node, g: Expr) -> Iterator[tuple[Expr, Expr]]:
    """(child, contribution to its adjoint) for every child, given the adjoint g of the node."""
    match node:
        case Sym() | Member() | Eye() | Ones() | Zero() | Hold():
            return
        case Add(terms):
            yield from ((t, g) for t in terms)
        case Mul(c, factors):  # d tr(G' c L X R) = tr((c L' G R')' dX)
            for i, f in enumerate(factors):
                left, right = map(transpose, reversed(factors[:i])), map(transpose, reversed(factors[i + 1 :]))
                yield f, matmul(*left, g, *right, coef=c)
        case Transpose(x):
            yield x, transpose(g)
        case Inverse(x):  # d X^-1 = -X^-1 dX X^-1
            y = transpose(node)
            yield x, matmul(y, g, y, coef=-1)
        case Map(profile, args):
            for i, a in enumerate(args):
                if slot(i) in profile.free_symbols:
                    if jumps(profile, slot(i)):
                        raise no_gradient(node, "it jumps")
                    slope = elementwise(derivative(signed(profile, args), slot(i)), *args)
                    yield a, _reduce(times(slope, g), a)
        case Diag(x):
            yield x, diagonal(g)
        case Diagonal(x):
            yield x, diag(g)
        case FamilySoftmax(i, n, x):  # as Softmax, the sum over members
            other = fresh_index(i, free_indices(node) | free_indices(g) | bound_indices(node) | bound_indices(g) | {i})
            shared = family_sum(other, n, rename_index(times(node, g), i, other))
            yield x, elementwise(slot(0) * (slot(1) - slot(2)), node, g, shared)
        case Normalise():
            yield from _normalised(node, g)
        case Softmax(x, axis, _):  # S * (G - sum(S * G))
            g = _varying(g, axis)
            yield x, elementwise(slot(0) * (slot(1) - slot(2)), node, g, total(times(node, g), axis))
        case Op("first", x):
            yield x, operator("first", g, sizes=(x.rows,))
        case Op(name, x, adjoint, sizes):
            yield x, operator(name, g, not adjoint, sizes)
        case Sum(x, _):
            yield x, _repeat(g, x)
        case LogSumExp(x, None) if 1 in x.shape:
            yield x, times(softmax(x, 0 if x.cols == 1 else 1), g)
        case LogSumExp(x, None):
            yield x, elementwise(sp.exp(slot(0) - slot(1)) * slot(2), x, node, g)
        case LogSumExp(x, axis):
            yield x, elementwise(slot(0) * slot(1), softmax(x, cast(int, axis)), g)
        case Trace(x):
            yield x, times(g, eye(x.rows))
        case LogDet(x):
            yield x, times(g, inverse(transpose(x)))
        case Spectral(h, x):
            if jumps(h, slot(0)):
                raise no_gradient(node, "it jumps")
            slope = derivative(h, slot(0))
            if slope.subs(slot(0), 0) != 0:
                raise no_gradient(node, "its derivative at a zero singular value is not 0")
            yield x, times(g, spectral_map(slope, x))
        case Sorted():
            raise no_gradient(node, "it has a kink wherever two entries tie")
        case Max() | SpectralNorm():
            raise no_gradient(node, "it has a kink wherever two entries tie for the largest")
        case Indicator():
            raise no_gradient(node, "it is a constraint, infinite outside its set")
        case Spectrum() | Signal():
            raise no_gradient(node, "it is worked out per frequency, which is done after derivatives are taken")
        case Worked("div", _):
            raise no_gradient(node, "it is a divergence of what makes the variable, which a loss alone sees")
        case (
            Noise()
            | SpectralMap()
            | Prox()
            | ProxMap()
            | Multiplier()
            | Sweep()
            | SpectralProx()
            | SpectralDivergence()
            | Project()
            | Worked()
            | Curve()
        ):
            raise no_gradient(node, "it is the result of a derivation and has no derivative rule")
        case FamilySum() | FamilyLogSumExp():
            raise AssertionError("families are swept in their own scope; please report")
        case _ as never:
            assert_never(never)


def _varying(g: Expr, axis: Axis) -> Expr:
    """g without the terms that are the same all along an axis, which shares do not see: they would cancel in rounding only."""
    match g:
        case Map(profile, args):
            wide = {slot(i) for i, a in enumerate(args) if a.shape[cast(int, axis)] != 1}
            kept = [t for t in sp.Add.make_args(profile) if t.free_symbols & wide]
            return elementwise(sp.Add(*kept), *args) if kept else zeros(*g.shape)
        case Add(terms):
            return add(*(_varying(t, axis) for t in terms))
        case _:
            return g


def _normalised(node: Normalise, g: Expr) -> Iterator[tuple[Expr, Expr]]:
    """Adjoints through y = s (x - m) w + b, s = (spread)^-1/2: u = (x - m) s, dx = s (h - mean h - u mean(h u)), h = g w."""
    x, axis, n = node.x, node.axis, node.x.shape[node.axis]
    along = 1 - axis
    h = times(g, node.weight)
    if node.kind == "sphere":  # x / max(|x|, eps)
        length = elementwise(sp.Max(sp.sqrt(slot(0)), node.eps), total(elementwise(slot(0) ** 2, x), axis))
        unit = elementwise(slot(0) / slot(1), x, length)
        inner = total(times(unit, h), axis)
        free = elementwise(sp.Piecewise((slot(0), slot(1) > node.eps), (0, True)), inner, length)
        yield x, elementwise((slot(0) - slot(1) * slot(2)) / slot(3), h, unit, free, length)
    else:
        mean = elementwise(slot(0) / n, total(x, axis)) if node.kind == "layer_norm" else zeros(*total(x, axis).shape)
        centred = elementwise(slot(0) - slot(1), x, mean)
        scale = elementwise(1 / sp.sqrt(slot(0) / n + node.eps), total(elementwise(slot(0) ** 2, centred), axis))
        unit = times(centred, scale)
        shift = elementwise(slot(0) / n, total(h, axis)) if node.kind == "layer_norm" else zeros(*total(h, axis).shape)
        turn = elementwise(slot(0) / n, total(times(h, unit), axis))
        yield x, elementwise(slot(4) * (slot(0) - slot(1) - slot(2) * slot(3)), h, shift, unit, turn, scale)
    yield node.weight, total(times(g, unit), cast(Axis, along))
    yield node.bias, total(g, cast(Axis, along))


def no_gradient(e: Expr, why: str) -> DeriveError:
    return DeriveError(
        "E301",
        f"{text(e)} has no gradient: {why}",
        hint="proximal algorithms (proximal_gradient, fista) take such a term through its prox",
    )


ROUNDING = 1e-9
"""Of cases whose constants were written as decimals."""


@cache
def jumps(profile: sp.Expr, by: sp.Symbol) -> bool:
    """Does the profile itself (not its slope) have a step, as sign(u) and 1[u != 0] have?"""
    choices = [(p, *pair) for p in profile.atoms(sp.Piecewise) for pair in pairwise(p.args)]
    conditions = [branch.args[1] for p in profile.atoms(sp.Piecewise) for branch in p.args]
    exact = any(isinstance(c, sp.Eq | sp.Ne) and c.has(by) for c in conditions)
    if exact or any(s.has(by) for s in profile.atoms(sp.sign, sp.Heaviside)):
        return True
    return any(_apart(profile, p, yes, no, by) for p, yes, no in choices)


def _apart(profile: sp.Expr, p: sp.Piecewise, yes: Any, no: Any, by: sp.Symbol) -> bool:
    """Do two cases give the profile other values where one takes over from the other?"""
    condition = yes.args[1]
    if not isinstance(condition, sp.Rel) or not condition.has(by):
        return False
    one, two = (cast(sp.Expr, profile.xreplace({p: case.args[0]})) for case in (yes, no))
    gap, border = one - two, cast(Any, condition).lhs - cast(Any, condition).rhs
    for sign in (1, -1) if condition.has(sp.Abs) else (1,):
        straight = border.xreplace({sp.Abs(by): sign * by})
        slope = sp.diff(straight, by)
        if slope.has(by) or slope == 0:
            continue  # where they meet is not worked out
        at = sp.expand(by - straight / slope)
        jump = sp.expand(gap.xreplace({by: at}))
        if not (sign * at).is_negative and (abs(jump) > ROUNDING if jump.is_number else jump.is_zero is False):
            return True
    return False


@cache
def kinked(profile: sp.Expr, by: frozenset[sp.Symbol]) -> bool:
    """May the slope of the profile in one of these symbols jump or be infinite: a branch, or a root of what can be 0?"""
    branches = profile.atoms(sp.Abs, sp.Max, sp.Min, sp.sign, sp.Piecewise)
    powers = (p for p in profile.atoms(sp.Pow) if not p.exp.is_integer and not (p.exp.is_number and p.exp > 1))
    roots = (p.base for p in powers if not p.base.is_positive)
    return any(x.has(*by) for x in (*branches, *roots))


@cache
def derivative(profile: sp.Expr, by: sp.Symbol) -> sp.Expr:
    """d profile / d by, piecewise where the profile has kinks: sign(0) = 0, and a branch's own slope at its border."""
    if (ended := _of_log(profile, by)) is not None:
        return ended
    slope = sp.diff(profile.replace(lambda x: isinstance(x, sp.Max | sp.Min), _as_piecewise), by)
    for s in slope.atoms(sp.sinh):  # sinh / cosh overflows where tanh is 1
        slope = slope.subs(s / sp.cosh(s.args[0]), sp.tanh(s.args[0]))
    return slope


def _of_log(profile: sp.Expr, by: sp.Symbol) -> sp.Expr | None:
    """m g'/g for m log g, 0 where m is 0, whatever g is: there the product is 0 log g = 0."""
    logs = [f for f in sp.Mul.make_args(profile) if isinstance(f, sp.log)]
    if len(logs) != 1 or not logs[0].has(by) or not vanishing(logs[0]):
        return None
    m, g = profile / logs[0], logs[0].args[0]
    if m.has(by) or not m.free_symbols or m.is_positive:
        return None
    top, bottom = sp.fraction(sp.cancel(sp.diff(g, by) / g))
    weight = sp.Mul(*(f for f in sp.Mul.make_args(m) if f.free_symbols))
    both = sp.And(*(cast(sp.logic.boolalg.Boolean, sp.Eq(x, 0)) for x in (weight, bottom)))
    return m * top / (bottom + sp.Piecewise((1, both), (0, True)))


def _as_piecewise(e: sp.Expr) -> sp.Expr:
    first, *rest = e.args
    other = _as_piecewise(e.func(*rest)) if len(rest) > 1 else rest[0]
    better = sp.Ge(first, other) if isinstance(e, sp.Max) else sp.Le(first, other)
    return sp.Piecewise((first, better), (other, True))


def _repeat(g: Expr, like: Expr) -> Expr:
    """g along the axes of `like` that were summed over."""
    return g if g.shape == like.shape else elementwise(slot(0) * slot(1), g, ones(*like.shape))


def _reduce(g: Expr, like: Expr) -> Expr:
    """Sum over the axes along which `like` was repeated."""
    axes: list[Axis] = [k for k in (0, 1) if like.shape[k] == 1 and g.shape[k] != 1]
    if len(axes) == 2:
        return total(g)
    return total(g, axes[0]) if axes else g
