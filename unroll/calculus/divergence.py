"""The divergence of a map, sum over i of d e_i / d r_i, in closed form.

    entry by entry       sum of the slopes; a derived scalar prox has 1/(1 + t f''), 0 where it stands at a kink
    groups, balls        through the length: n - (n - 1) t/|v| of what is shrunk
    simplex, 1-norm ball entries that are not 0, less one for each sum that is held
    tv, with entries     a slope for each piece
    sorted 1-norm        as many as there are magnitudes, those of 0 apart
    one equation         sum of the slopes d, less that of their squares (a d)^2 over the sum of a^2 d
    singular values s    h'(s_i), |m - n| h(s_i) / s_i and 2 (s_i h_i - s_j h_j) / (s_i^2 - s_j^2) for i < j, of all entries
    eigenvalues w        h'(w_i) and (h_i - h_j) / (w_i - w_j) for i < j; the skew part of a matrix, which they do not see, apart
    linear               the trace

A map that jumps has none that could be worked out from its slopes. What no rule covers is refused, unless probes are asked for: by
differences along random signs b, the mean of b'(e(r + w b) - e(r - w b)) / (2 w), w a thousandth of the sizes of r and e.
Source: Stein 1981, doi:10.1214/aos/1176345632; Deledalle, Vaiter, Peyre & Fadili 2012, arXiv:1205.3482;
Candes, Sing-Long & Trzasko 2013, doi:10.1109/TSP.2013.2270464. Of probes: Hutchinson 1990, doi:10.1080/03610919008812866; Ramani, Blu & Unser 2008, doi:10.1109/TIP.2008.2001404.
"""

from __future__ import annotations

import sympy as sp

from unroll.calculus.gradient import derivative, jumps
from unroll.calculus.prox import plan, scalar_of
from unroll.calculus.prox_function import ScalarProx
from unroll.calculus.stable import Primitive
from unroll.errors import DeriveError
from unroll.language.constructors import (
    add,
    constant,
    diagonal,
    elementwise,
    eye,
    largest,
    matmul,
    ones,
    operator,
    prox_map,
    scale,
    signs,
    sort,
    spectral_divergence,
    split,
    symbol,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import (
    Add,
    Expr,
    Hold,
    Map,
    Mul,
    Multiplier,
    Op,
    Project,
    Prox,
    ProxMap,
    SpectralProx,
    Sum,
    Sym,
    Transpose,
    depends,
    slot,
    walk,
)
from unroll.language.show import text
from unroll.language.traversal import expand, substitute, transform

NOTHING = zeros(1, 1)
WIDTH, LEAST = sp.Rational(1, 1000), sp.Float("1e-12")
"""How far a probe goes, in parts of the size of what it moves; and where all of that is 0."""
JUMPING = ("sphere", "stiefel", "orthogonal", "sparse", "rank_at_most")


def planned(e: Expr) -> Expr:
    """e with every proximal step as the formula that was derived for it."""
    return transform(e, lambda x: plan(x) if isinstance(x, Prox) else None)


def divergence(e: Expr, r: Sym) -> Expr:
    """The trace of the Jacobian of e in r, a number per sample; e has the shape of r. Raises DeriveError E301."""
    e = expand(e)
    if isinstance(e, Add):
        return add(NOTHING, *(divergence(t, r) for t in e.terms))
    c, body = split(e)
    match body:
        case Project(name, _, x) if name in ("simplex", "ball1") and depends(x, r):
            return scale(c, _on_the_boundary(body, r))
        case Project("tv", _, x) if depends(x, r):
            return scale(c * _multiple(x, r, e), add(constant(r.cols), _count(operator("difference", body))))
        case ProxMap(found, (Project("tv", _, x) as steps,), _) if depends(x, r):  # the same slope all along a piece
            slope = _slope(found, body, (), [], e)
            ends = operator("first", _apart(operator("difference", steps)), sizes=(r.rows,))
            last = add(total(slope), scale(-1, total(operator("first", slope, sizes=(r.rows - 1,)))))
            return scale(c * _multiple(x, r, e), add(total(elementwise(slot(0) * slot(1), slope, ends)), last))
        case Project("sorted_l1", _, x) if depends(x, r):
            size = sort(elementwise(sp.Abs(slot(0)), body))
            least = scale(-1, largest(scale(-1, size), 0))
            return scale(c * _multiple(x, r, e), add(_count(operator("difference", size)), _count(least)))
        case SpectralProx(found, x) if depends(x, r):
            return scale(c * _multiple(x, r, e), spectral_divergence(_smooth(found, e), x))
        case Project("psd" | "volume" as name, params, x) if depends(x, r):
            found = scalar_of(name, *(p for p in params if not isinstance(p, Expr)))
            return scale(c * _multiple(x, r, e, turned=True), spectral_divergence(found, x, symmetric=True))
        case Op("groups", x, True, sizes) if r.cols == 1:  # the same number, of the matrix whose columns are the groups
            cut = operator("groups", r, sizes=sizes)
            matrix = symbol(f"_groups_{r.name}", *cut.shape, "state", 2)
            of_matrix = divergence(substitute(x, {r: operator("groups", matrix, True, sizes)}), matrix)
            return scale(c, substitute(of_matrix, {matrix: cut}))
        case _:
            return total(_own(e, r, e))


def width(e: Expr, r: Sym) -> Expr:
    """How far a probe goes, a number per sample."""
    length = add(*(elementwise(sp.sqrt(slot(0)), total(elementwise(slot(0) ** 2, x))) for x in (e, r)))
    part = WIDTH / sp.sqrt(r.rows * r.cols)
    return elementwise(sp.Piecewise((part * slot(0), slot(0) > 0), (LEAST, True)), length)


def probed(e: Expr, r: Sym, w: sp.Expr, probes: int, seed: int) -> Expr:
    """An estimate of the divergence of e in r, a number per sample, by probes of width w: of slopes of entries alone, exact.

    Its variance is 2/probes times the squares of the symmetric part of the Jacobian, off its diagonal. Raises DeriveError E301.
    """
    if any(_jumps(x, r) for x in walk(e)):
        raise _refused(e, "it jumps, and the jumps count")
    held = {x: symbol(f"_held{i}", *x.shape, "state") for i, x in enumerate(x for x in walk(e) if isinstance(x, Hold))}
    free, kept = substitute(e, {**held}), {s: x for x, s in held.items()}
    gaps: list[Expr] = []
    for b in (signs(seed + k, *r.shape) for k in range(probes)):
        ends = [substitute(substitute(free, {r: add(r, scale(side * w, b))}), {**kept}) for side in (1, -1)]
        gaps.append(total(elementwise(slot(0) * (slot(1) - slot(2)), b, *ends)))
    return scale(1 / (2 * probes * w), add(*gaps))


def _jumps(e: Expr, r: Sym) -> bool:
    match e:
        case Map(profile, args):
            return any(depends(a, r) and jumps(profile, slot(i)) for i, a in enumerate(args))
        case ProxMap(found, _, _) | Multiplier(found, _, _) | SpectralProx(found, _):
            return found.mode != "threshold" and depends(e, r)
        case Project(name, _, x):
            return name in JUMPING and depends(x, r)
        case _:
            return False


def _count(e: Expr) -> Expr:
    """How many entries are not 0."""
    return total(_apart(e))


def _apart(e: Expr) -> Expr:
    """1 where an entry is not 0, else 0."""
    return elementwise(sp.Piecewise((0, sp.Eq(slot(0), 0)), (1, True)), e)


def _multiple(x: Expr, r: Sym, whole: Expr, turned: bool = False) -> sp.Expr:
    """k with x = k r + b; turned: k + l with x = k r + l r' + b."""
    terms = [split(t) for t in (x.terms if isinstance(x, Add) else (x,)) if depends(t, r)]
    if any(body is not r and not (turned and body is transpose(r)) for _, body in terms):
        raise _refused(whole, "it takes more than a multiple of its argument")
    return sp.Add(*(k for k, _ in terms))


def _on_the_boundary(e: Project, r: Sym) -> Expr:
    """Of a projection: as many entries as are not 0, less one for each sum that is held; all of them inside of a ball."""
    c = _multiple(e.x, r, e)
    count = _count(e)
    if e.set == "simplex":
        return scale(c, add(count, constant(-r.cols)))
    (radius,) = (p for p in e.params if not isinstance(p, Expr))
    size = total(elementwise(sp.Abs(slot(0)), e.x))
    return scale(
        c, elementwise(sp.Piecewise((r.rows * r.cols, slot(0) <= radius), (sp.Max(slot(1) - 1, 0), True)), size, count)
    )


def _own(e: Expr, r: Sym, whole: Expr) -> Expr:
    """d e_k / d r_i at entry i of r, e_k the entry of e that belongs to i: i itself, or its row, column, or sample."""
    if not depends(e, r) or isinstance(e, Hold):
        return zeros(*e.shape)
    match e:
        case Sym():
            return ones(*r.shape)
        case Transpose(x) if x is r and e.shape == r.shape:
            return eye(r.rows)
        case Add(terms):
            return add(*(_wide(_own(t, r, whole), r) for t in terms))
        case Mul(c, (x,)):
            return scale(c, _own(x, r, whole))
        case Mul(c, factors) if [f for f in factors if depends(f, r)] == [r] and e.shape == r.shape:
            i = factors.index(r)
            left, right = matmul(eye(r.rows), *factors[:i]), matmul(eye(r.cols), *factors[i + 1 :])
            return elementwise(c * slot(0) * slot(1), diagonal(left), transpose(diagonal(right)))
        case Map(profile, args):
            slopes = [_wide(zeros(1, 1), r)]
            for i, a in enumerate(args):
                if slot(i) in profile.free_symbols and depends(a, r):
                    if jumps(profile, slot(i)):
                        raise _refused(whole, "it jumps, and the jumps count")
                    slope = elementwise(derivative(profile, slot(i)), *args)
                    slopes.append(_wide(elementwise(slot(0) * slot(1), slope, _own(a, r, whole)), r))
            return add(*slopes)
        case ProxMap(found, (v, *others), slots):
            if any(depends(o, r) for o in others):
                raise _refused(whole, "a number in its proximal step changes with it: hold(..) that")
            return elementwise(slot(0) * slot(1), _slope(found, e, slots, others, whole), _own(v, r, whole))
        case Multiplier(found, (v, a, s, _, *others), slots) if not any(depends(o, r) for o in (a, s, *others)):
            z = prox_map(found, slots, elementwise(slot(0) - slot(1) * slot(2), v, a, e), *others)
            rate = _slope(found, z, slots, others, whole)
            moved = elementwise(slot(0) * slot(1), _wide(a, r), rate)
            all_of = total(elementwise(slot(0) * slot(1), a, moved), 0)
            share = elementwise(sp.Piecewise((slot(0) / slot(1), slot(1) > 0), (0, True)), moved, all_of)
            return elementwise(slot(0) * slot(1), share, _own(v, r, whole))
        case Sum(x, _) if x.shape == r.shape and _entrywise(x, r):
            return _own(x, r, whole)
        case _:
            raise _refused(whole, f"no rule is known for {text(e)}")


def _slope(found: ScalarProx, z: Expr, slots: tuple[sp.Symbol, ...], others: list[Expr], whole: Expr) -> Expr:
    """d prox / dv, in what leaves the prox."""
    _smooth(found, whole)
    size = sp.Abs(slot(0)) if found.even else slot(0)
    names = {s: slot(i + 1) for i, s in enumerate(slots)}
    plain = found.slope.replace(lambda x: isinstance(x, Primitive), lambda x: x.textbook())
    return elementwise(plain.xreplace({found.u: size, **names}), z, *others)


def _smooth(found: ScalarProx, whole: Expr) -> ScalarProx:
    """A scalar prox that does not jump."""
    if found.mode != "threshold":
        raise _refused(whole, "it jumps, and the jumps count")
    return found


def _wide(e: Expr, r: Sym) -> Expr:
    """e, repeated to the shape of r."""
    return e if e.shape == r.shape else elementwise(slot(0) * slot(1), e, ones(*r.shape))


def _entrywise(e: Expr, r: Sym) -> bool:
    """Does every entry of e read that entry of r alone?"""
    match e:
        case _ if not depends(e, r) or e is r:
            return True
        case Map() | Add() | ProxMap() | Mul(_, (_,)):
            return e.shape == r.shape and all(_entrywise(a, r) for a in e.children)
        case _:
            return False


def _refused(e: Expr, why: str) -> DeriveError:
    return DeriveError(
        "E301",
        f"no divergence is known of {text(e)}: {why}",
        hint="maps of entries, of lengths of groups, of singular values, of tv, of the sorted 1-norm, projections on the simplex and the 1-norm ball, and linear maps have one; div(z, r, probes=8) estimates it",
    )
