"""The constructors of expressions: the only code that builds nodes. They keep the normal form, so that no pass sees 0 * x:

add        flat, like terms merged, zeros gone, terms in a fixed order
matmul     flat list of factors with one scalar coefficient, identities gone, signs of sums pulled out
transpose  pushed down to symbols
elementwise  one node `Map` with a SymPy profile in the placeholders _0, _1, ...; nested maps are composed
reductions   linear ones distribute over sums and let coefficients out
families   an index that a body binds again is renamed
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal, assert_never, cast

import sympy as sp

from unroll.errors import DeriveError
from unroll.language.nodes import (
    ONE,
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
    Role,
    Shape,
    ShapeError,
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
    broadcast,
    complex_valued,
    free_indices,
    intern,
    mentions,
    multiple,
    operator_shape,
    reduced,
    same,
    show_shape,
    slot,
)

# --- leaves ---------------------------------------------------------------------------------------------


def symbol(
    name: str, rows: Any, cols: Any = 1, role: Role = "parameter", rank: int | None = None, family: Any = None, props: Iterable[str] = ()
) -> Sym:  # fmt: skip
    """A named matrix, vector (cols 1) or family of matrices."""
    rows, cols = sp.sympify(rows), sp.sympify(cols)
    rank = (1 if cols == 1 else 2) if rank is None else rank
    return intern(Sym, name, rows, cols, role, rank, None if family is None else sp.sympify(family), frozenset(props))


def member(of: Sym, index: str) -> Expr:
    assert of.family is not None
    return intern(Member, of, index)


def eye(n: Any) -> Expr:
    return intern(Eye, sp.sympify(n))


def ones(rows: Any, cols: Any = 1) -> Expr:
    rows, cols = sp.sympify(rows), sp.sympify(cols)
    return eye(1) if rows == cols == 1 else intern(Ones, rows, cols)


def zeros(rows: Any, cols: Any = 1) -> Expr:
    return intern(Zero, sp.sympify(rows), sp.sympify(cols))


def constant(value: Any, rows: Any = 1, cols: Any = 1) -> Expr:
    """The matrix all of whose entries are `value`."""
    return scale(value, ones(rows, cols))


def as_constant(e: Expr) -> sp.Expr | None:
    """The value c of an expression that is c in every entry, else None."""
    match e:
        case Zero():
            return sp.Integer(0)
        case Ones():
            return ONE
        case Eye(n) if n == 1:
            return ONE
        case Mul(c, (f,)):
            return None if as_constant(f) is None else c
        case _:
            return None


# --- sums and products ----------------------------------------------------------------------------------


def split(e: Expr) -> tuple[sp.Expr, Expr]:
    """e = c * body with body free of a coefficient."""
    match e:
        case Mul(c, (f,)):
            return c, f
        case Mul(c, factors):
            return c, (e if c == 1 else intern(Mul, ONE, factors))
        case _:
            return ONE, e


def add(*terms: Expr) -> Expr:
    """Sum; like terms merged. Raises ShapeError."""
    assert terms
    shape = terms[0].shape
    merged: dict[Expr, sp.Expr] = {}
    for term in terms:
        if not (same(term.rows, shape[0]) and same(term.cols, shape[1])):
            raise ShapeError(f"{show_shape(shape)} and {show_shape(term.shape)} cannot be added")
        for t in term.terms if isinstance(term, Add) else (term,):
            if not isinstance(t, Zero):
                c, body = split(t)
                merged[body] = merged.get(body, sp.Integer(0)) + c
    parts = [scale(c, body) for body, c in sorted(merged.items(), key=lambda kv: kv[0].key) if _tidy(c) != 0]
    if not parts:
        return zeros(*shape)
    return parts[0] if len(parts) == 1 else intern(Add, tuple(parts))


def _tidy(c: sp.Expr) -> sp.Expr:
    return c if c.is_Atom or c.is_Mul else sp.expand(c)


def scale(c: Any, e: Expr) -> Expr:
    """c * e, c a SymPy scalar or a number."""
    c = number(c)
    if c == 0 or isinstance(e, Zero):
        return zeros(*e.shape)
    if c == 1:
        return e
    match e:
        case Add(terms):
            return add(*(scale(c, t) for t in terms))
        case Mul(d, factors):
            c = _tidy(c * d)
            if c == 1 and len(factors) == 1:
                return factors[0]
            return zeros(*e.shape) if c == 0 else intern(Mul, c, factors)
        case _:
            return intern(Mul, c, (e,))


def number(c: Any) -> sp.Expr:
    """A SymPy scalar; decimal numbers become the fraction that was written (0.1 -> 1/10)."""
    if isinstance(c, sp.Float | float):
        return sp.Rational(str(c)) if sp.sympify(c).is_finite else sp.sympify(c)
    return sp.sympify(c)


def swap(c: sp.Expr, values: Mapping[Any, Any]) -> sp.Expr:
    """c with symbols replaced, all at once."""
    if cast(Any, c).is_Atom:  # most sizes and coefficients are
        return sp.sympify(values.get(c, c))
    if all(isinstance(s, sp.Symbol) for s in values):
        return cast(sp.Expr, cast(Any, c).xreplace({s: sp.sympify(v) for s, v in values.items()}))
    return cast(sp.Expr, cast(Any, c).subs(values, simultaneous=True))


def matmul(*parts: Expr, coef: Any = 1) -> Expr:
    """coef * A @ B @ ... Raises ShapeError where inner sizes differ."""
    assert parts
    for a, b in itertools.pairwise(parts):
        if not same(a.cols, b.rows):
            raise ShapeError(f"{show_shape(a.shape)} times {show_shape(b.shape)}: {a.cols} is not {b.rows}")
    shape = parts[0].rows, parts[-1].cols
    c, flat = number(coef), list[Expr]()
    for i, part in enumerate(parts):
        if isinstance(part, Zero):
            return zeros(*shape)
        match _regrouped(part, i > 0, i + 1 < len(parts)):
            case Mul(d, factors):
                c *= d
                flat.extend(factors)
            case other:
                flat.append(other)
    if len(flat) > 1 and any(scalar_factor(f)[1] is not f for f in flat):  # A (s X) = s (A X) for a scalar s
        outer, inner = zip(*map(scalar_factor, flat), strict=True)
        return elementwise(sp.Mul(*map(slot, range(len(flat) + 1))), matmul(*inner, coef=c), *outer)
    if len(flat) > 1 and (weighed := _weights(flat[-1], 0)) is not None:  # A (X * r) = (A X) * r for a row r
        return elementwise(slot(0) * slot(1), matmul(*flat[:-1], weighed[0], coef=c), weighed[1])
    if len(flat) > 1 and (weighed := _weights(flat[0], 1)) is not None:  # (c * X) A = c * (X A) for a column c
        return elementwise(slot(0) * slot(1), matmul(weighed[0], *flat[1:], coef=c), weighed[1])
    factors = list[Expr]()
    for f in flat:
        if isinstance(f, Eye):
            continue
        if isinstance(f, Add) and len(flat) > 1:
            d, f = _unit(f)
            c *= d
        if factors and _cancel(factors[-1], f):
            factors.pop()
        else:
            factors.append(f)
    if not factors:
        return scale(c, eye(shape[0]))
    if len(factors) == 1:
        return scale(c, factors[0])
    return zeros(*shape) if c == 0 else intern(Mul, _tidy(c), tuple(factors))


def scalar_factor(e: Expr, wanted: Callable[[Expr], bool] = lambda x: not x.is_scalar) -> tuple[Expr, Expr]:
    """(s, x) with e = s x, s a 1 × 1 expression and x the one argument of a map that is wanted; (1, e) if there is no such."""
    if not isinstance(e, Map):
        return eye(1), e
    own = [i for i, a in enumerate(e.args) if wanted(a)]
    rest = e.profile / slot(own[0]) if len(own) == 1 else e.profile
    if len(own) != 1 or rest.has(slot(own[0])) or not all(a.is_scalar for i, a in enumerate(e.args) if i != own[0]):
        return eye(1), e
    others = [i for i in range(len(e.args)) if i != own[0]]
    names = {slot(i): slot(j) for j, i in enumerate(others)}
    return elementwise(rest.xreplace(names), *(e.args[i] for i in others)), e.args[own[0]]


def _weights(e: Expr, axis: Literal[0, 1]) -> tuple[Expr, Expr] | None:
    """(X, w) for X * w entry by entry, w of size 1 along `axis`, where it is repeated."""
    if not isinstance(e, Map) or e.shape[axis] == 1:
        return None
    wide = [i for i, a in enumerate(e.args) if a.shape[axis] != 1]
    rest = e.profile / slot(wide[0]) if wide else e.profile
    if (
        len(wide) != 1
        or rest.has(slot(wide[0]))
        or e.args[wide[0]].shape != e.shape
        or isinstance(e.args[wide[0]], Ones)
    ):
        return None
    others = [a for i, a in enumerate(e.args) if i != wide[0]]
    if all(a.is_scalar for a in others):
        return None
    names = {slot(i): slot(j) for j, i in enumerate(i for i in range(len(e.args)) if i != wide[0])}
    return e.args[wide[0]], elementwise(rest.xreplace(names), *others)


def _regrouped(e: Expr, left: bool, right: bool) -> Expr:
    """(A X) * r before another factor is A (X * r), c * (X A) after one is (c * X) A: products have one form however they are grouped."""
    coef, body = split(e)
    for axis, beside in ((0, right), (1, left)):
        weighed = _weights(body, axis) if beside else None  # type: ignore[arg-type]
        if weighed is not None and isinstance(weighed[0], Mul) and len(weighed[0].factors) > 1:
            k, factors = weighed[0].coef, weighed[0].factors
            at = -1 if axis == 0 else 0
            inner = elementwise(slot(0) * slot(1), factors[at], weighed[1])
            rest = (*factors[:-1], inner) if axis == 0 else (inner, *factors[1:])
            return intern(Mul, _tidy(coef * k), rest)
    return e


def _unit(e: Add) -> tuple[sp.Expr, Expr]:
    """Pull the common coefficient out of a sum, so that its first term has the number 1: 2 A - 4 B -> 2 (A - 2 B), -A + B -> -(A - B)."""
    coefs = [split(t)[0] for t in e.terms]
    first, largest = coefs[0].as_coeff_Mul()[0], max((c.as_coeff_Mul()[0] for c in coefs), key=abs)
    c = (largest if abs(largest) > LARGE * abs(first) else first) * common_powers(coefs)
    return (c, e) if c == 1 else (c, scale(1 / c, e))


def common_powers(coefs: Iterable[sp.Expr]) -> sp.Expr:
    """The powers of symbols (and of sums) in every coefficient: 2 a b, a^2 -> a."""
    powers: list[Mapping[sp.Expr, Any]] = [c.as_coeff_Mul()[1].as_powers_dict() for c in coefs]
    shared = set[sp.Expr].union(*(set(p) for p in powers)) - {ONE}
    least = {base: [p.get(base, sp.Integer(0)) for p in powers] for base in shared}
    return sp.Mul(*(base ** min(found) for base, found in least.items() if all(x.is_Rational for x in found)))


def _cancel(a: Expr, b: Expr) -> bool:
    return (isinstance(a, Inverse) and a.x is b) or (isinstance(b, Inverse) and b.x is a)


def times(a: Expr, b: Expr) -> Expr:
    """Elementwise product; a scalar may meet anything."""
    return elementwise(slot(0) * slot(1), a, b)


def transpose(e: Expr) -> Expr:
    """e.T, pushed inwards as far as it goes."""
    if e.is_scalar:
        return e
    match e:
        case Transpose(x):
            return x
        case Eye() | Diag():
            return e
        case Ones():
            return ones(e.cols, e.rows)
        case Zero():
            return zeros(e.cols, e.rows)
        case Add(terms):
            return add(*map(transpose, terms))
        case Mul(c, factors):
            return matmul(*map(transpose, reversed(factors)), coef=c)
        case Inverse(x):
            return inverse(transpose(x))
        case Map(profile, args):
            return elementwise(profile, *map(transpose, args))
        case Softmax(x, axis, causal):
            return softmax(transpose(x), 1 - axis, causal)
        case FamilySoftmax(i, n, x):
            return family_softmax(i, n, transpose(x))
        case FamilyLogSumExp(i, n, body):
            return family_logsumexp(i, n, transpose(body))
        case Noise(kind, rate, x):
            return noise(kind, rate, transpose(x))
        case Normalise(kind, axis, eps, x, weight, bias):
            return normalise(kind, 1 - axis, eps, transpose(x), transpose(weight), transpose(bias))
        case Sum(x, axis) if axis is not None:
            return total(transpose(x), 1 - axis)
        case LogSumExp(x, axis) if axis is not None:
            return logsumexp(transpose(x), 1 - axis)
        case Max(x, axis) if axis is not None:
            return largest(transpose(x), 1 - axis)
        case SpectralMap(h, x):
            return spectral_map(h, transpose(x))
        case FamilySum(i, n, body):
            return family_sum(i, n, transpose(body))
        case Hold(x):
            return hold(transpose(x))
        case Sym(props=props) if "symmetric" in props:
            return e
        case _:
            return intern(Transpose, e)


def inverse(e: Expr) -> Expr:
    """inv(e) of a square matrix. Raises ShapeError."""
    square(e, "inv")
    match e:
        case Eye():
            return e
        case Inverse(x):
            return x
        case Mul(c, (x,)):
            return scale(1 / c, inverse(x))
        case Zero():
            raise ShapeError("a zero matrix has no inverse")
        case _ if e.is_scalar:
            return elementwise(1 / slot(0), e)
        case _:
            return intern(Inverse, e)


def square(e: Expr, who: str) -> None:
    if not same(e.rows, e.cols):
        raise ShapeError(f"{who} needs a square matrix, this one is {show_shape(e.shape)}")


def is_symmetric(e: Expr) -> bool:
    """Is e equal to its transpose, as its form shows?"""
    return transpose(e) is e


# --- elementwise ----------------------------------------------------------------------------------------


class _Leaf(sp.Symbol):
    """Placeholder of an innermost argument while maps are composed."""


@cache
def _leaf(i: int) -> sp.Symbol:
    """The i-th placeholder. Not a new Dummy: SymPy remembers what it knows of a name."""
    return _Leaf(f"_leaf{i}", real=True)


def elementwise(profile: Any, *args: Expr) -> Expr:
    """The map with SymPy `profile` in slot(0), slot(1), ..., normalised: nested maps composed, constants and coefficients
    absorbed, arguments distinct and ordered, sums split into terms (so no profile is a sum)."""
    return _elementwise(number(profile), *args)


@cache
def _elementwise(profile: sp.Expr, *args: Expr) -> Expr:
    shape = broadcast(*(a.shape for a in args))
    flat: dict[Expr, sp.Symbol] = {}

    def inline(e: Expr) -> sp.Expr:
        value = as_constant(e)
        if value is not None:
            return value
        match e:
            case Map(p, inner):
                return cast(sp.Expr, p.xreplace({slot(i): inline(a) for i, a in enumerate(inner)}))
            case Add(terms) if inner := [
                t for t in terms if isinstance(split(t)[1], Map) or as_constant(t) is not None
            ]:
                rest = [t for t in terms if t not in inner]
                return sp.Add(*map(inline, inner), *([inline(add(*rest))] if rest else []))
            case Mul(c, _) if c != 1:
                return c * inline(split(e)[1])
            case Mul(_, (*front, Ones(one, _))) if one == 1 and front:  # a column, repeated: a map does so by itself
                return inline(matmul(*front))
            case Mul(_, (Ones(_, one), *rest)) if one == 1 and rest:
                return inline(matmul(*rest))
            case Add() if (unit := _unit(e))[0] != 1:
                return unit[0] * inline(unit[1])
            case _:
                return flat.setdefault(e, _leaf(len(flat)))

    profile = cast(sp.Expr, profile.xreplace({slot(i): inline(a) for i, a in enumerate(args)}))
    if profile.has(sp.exp):
        profile = cast(sp.Expr, profile.replace(sp.Mul, _one_exponential))
    if profile.has(sp.log, sp.Pow) and (found := _exponentials(profile, {s: e for e, s in flat.items()})):
        return elementwise(*found)
    return _mapped(_primitive(_plain_conditions(profile)), {s: e for e, s in flat.items()}, shape)


def _one_exponential(*factors: sp.Expr) -> sp.Expr:
    """e^a e^b -> e^(a + b): neither overflows where their product does not."""
    powers = [f for f in factors if isinstance(f, sp.exp)]
    if len(powers) < 2:
        return sp.Mul(*factors)
    return sp.Mul(sp.exp(sp.Add(*(cast(sp.Expr, p.args[0]) for p in powers))), *(f for f in factors if f not in powers))


def _exponentials(profile: sp.Expr, named: dict[sp.Symbol, Expr]) -> tuple[sp.Expr, *tuple[Expr, ...]] | None:
    """The profile and its arguments with what overflows under a log or a fraction bar in other words: a sum of exponentials is
    e^logsumexp, or what it is after the largest is pulled out where weights have any sign; a softmax under a log is e^(x - logsumexp)."""
    args = list(named.values())
    if not any(isinstance(e, Softmax) or (isinstance(e, Sum) and isinstance(e.x, Map)) for e in args):
        return None
    place: Callable[[Expr], sp.Symbol] = lambda e: args.append(e) or slot(len(args) - 1)
    profile = swap(profile, {s: slot(i) for i, s in enumerate(named)})
    logs = profile.atoms(sp.log)
    narrow = [*logs, *(p for p in profile.atoms(sp.Pow) if p.exp.is_negative)]
    swaps: dict[Any, sp.Expr] = {}
    for i, e in enumerate(named.values()):
        match e:
            case Sum(Map(p, parts), axis) if any(f.has(slot(i)) for f in narrow) and not any(
                isinstance(x, Hold) for x in parts
            ):
                weight, power = p.as_independent(sp.exp, as_Add=False)
                if not isinstance(power, sp.exp):
                    continue
                exponent = elementwise(power.args[0], *parts)
                if exponent.shape != e.x.shape:
                    continue
                if weight.is_positive:
                    swaps[slot(i)] = weight * sp.exp(place(logsumexp(exponent, axis)))
                else:
                    most = hold(largest(exponent, axis))
                    shifted = p.xreplace({power: sp.exp(power.args[0] - slot(len(parts)))})
                    swaps[slot(i)] = sp.exp(place(most)) * place(total(elementwise(shifted, *parts, most), axis))
            case Softmax(x, axis, False):
                under = [f for f in logs if f.has(slot(i))]
                share = sp.exp(place(x) - place(logsumexp(x, axis))) if under else slot(i)
                swaps |= {f: cast(sp.Expr, f.xreplace({slot(i): share})) for f in under}
            case _:
                pass
    return (cast(sp.Expr, profile.xreplace(swaps)), *args) if swaps else None


def _plain_conditions(profile: sp.Expr) -> sp.Expr:
    """if-then-else of conditions (SymPy makes them of branches on branches) by `and` and `or`."""
    if not profile.has(sp.ITE):
        return profile
    return cast(sp.Expr, profile.replace(sp.ITE, lambda p, a, b: sp.Or(sp.And(p, a), sp.And(sp.Not(p), b))))


def _primitive(profile: sp.Expr) -> sp.Expr:
    """One spelling where a sum meets a coefficient: 1/(4 + 4 u) -> 1/4 * 1/(1 + u), (a + a u) w -> a (1 + u) w, a (1 + u) -> a + a u."""
    if profile.is_Atom or not profile.has(sp.Add):
        return profile
    args = tuple(map(_primitive, cast(tuple[sp.Expr, ...], profile.args)))
    e = profile if args == profile.args else profile.func(*args)
    match e:
        case sp.Pow(base=base, exp=exponent) if isinstance(base, sp.Add) and not exponent.has(_Leaf):
            c, rest = _content(base)
            return e if c == 1 else sp.Pow(c, exponent) * sp.Pow(rest, exponent)
        case sp.Mul():
            fixed, moving = e.as_independent(_Leaf, as_Add=False)
            if isinstance(moving, sp.Add):
                return sp.Add(*(fixed * t for t in moving.args))
            parts = [_content(x) if isinstance(x, sp.Add) else (ONE, x) for x in sp.Mul.make_args(moving)]
            return e if all(c == 1 for c, _ in parts) else sp.Mul(fixed, *(c * x for c, x in parts))
        case _:
            return e


LARGE = 10**4
"""Whole numbers up to this make one spelling of a sum."""


def _content(e: sp.Add) -> tuple[sp.Expr, sp.Expr]:
    """(c, e / c), c the number and the powers of scalars common to all terms: 1/2 + u/3 -> 1/6, 3 + 2 u; but 1e-24 + u stays."""
    number_, rest = e.as_content_primitive()
    largest = max(abs(t.as_coeff_Mul()[0]) for t in sp.Add.make_args(rest))
    if largest > LARGE:  # numbers that a narrow type does not hold
        number_, rest = number_ * largest, sp.Add(*(t / largest for t in sp.Add.make_args(rest)))
    terms = rest.args if isinstance(rest, sp.Add) else (rest,)
    powers = common_powers([t.as_independent(_Leaf, as_Add=False)[0] for t in terms])
    return number_ * powers, (rest if powers == 1 else sp.Add(*(t / powers for t in terms)))


def _mapped(profile: sp.Expr, named: dict[sp.Symbol, Expr], shape: Shape) -> Expr:
    used = sorted((s for s in named if s in profile.free_symbols), key=lambda s: named[s].key)
    if not used:
        return constant(profile, *shape)
    full = broadcast(*(named[s].shape for s in used)) == shape
    if full and (linear := _linear(profile, used, named, shape)) is not None:
        return linear
    c, core = profile.as_independent(*used, as_Add=False)
    if isinstance(core, sp.Add):
        return add(*(_mapped(c * t, named, shape) for t in core.args))
    args = tuple(named[s] for s in used)
    if not full:
        args = (*args, ones(*shape))  # only its shape counts
    core = core.xreplace({s: slot(i) for i, s in enumerate(used)})
    return scale(c, intern(Map, core, args))


def _linear(profile: sp.Expr, used: list[sp.Symbol], named: dict[sp.Symbol, Expr], shape: Shape) -> Expr | None:
    """a*x + b*y + c as a sum of scaled terms, if the profile is that and every argument has the full shape."""
    if not profile.is_polynomial(*used) or any(named[s].shape != shape for s in used):
        return None
    poly = sp.Poly(profile, *used)
    if poly.total_degree() > 1:
        return None
    terms = [scale(poly.coeff_monomial(s), named[s]) for s in used]
    return add(*terms, constant(poly.coeff_monomial(1), *shape))


# --- everything else ------------------------------------------------------------------------------------


def _distribute(make: Callable[[Expr], Expr], e: Expr) -> Expr | None:
    """Push a linear map through sums and coefficients, or None at the bottom."""
    match e:
        case Add(terms):
            return add(*map(make, terms))
        case Mul(c, _) if c != 1:
            return scale(c, make(split(e)[1]))
        case _:
            return None


def total(e: Expr, axis: Axis = None) -> Expr:
    """Sum of entries, over everything or along an axis."""
    if axis is not None and e.shape[axis] == 1:
        return e
    if e.is_scalar:
        return e
    if axis is not None and e.shape[1 - axis] == 1:  # there is one column, or one row
        axis = None
    pushed = _distribute(lambda x: total(x, axis), e)
    if pushed is not None:
        return pushed
    if axis is None and (whole := _uncut(e)) is not e:
        return total(whole)
    if (
        axis is None
        and isinstance(e, Map | Transpose)
        and transpose(e).key.count("Transpose(") < e.key.count("Transpose(")
    ):
        return total(transpose(e))
    out = reduced(e.shape, axis)
    match e:
        case Map(profile, args) if axis is None and all(a.is_scalar or isinstance(a, Ones) for a in args):
            return scale(e.rows * e.cols, elementwise(profile, *(a for a in args if a.is_scalar)))
        case Zero():
            return zeros(*out)
        case Ones():
            count = e.rows * e.cols if axis is None else e.shape[axis]
            return constant(count, *out)
        case Eye() | Diag() if axis is None:
            return trace(e)
        case FamilySum(i, n, body):
            return family_sum(i, n, total(body, axis))
        case Softmax(_, along, _) if axis in (along, None):  # shares
            return ones(*out) if axis == along else total(ones(*reduced(e.shape, along)))
        case _:
            return intern(Sum, e, axis)


def _uncut(e: Expr) -> Expr:
    """e of the vector where it is of groups of that, entry by entry: for what does not ask where an entry stands."""
    parts = e.args if isinstance(e, Map) else (e,)
    terms = [split(t)[1] for part in parts for t in (part.terms if isinstance(part, Add) else (part,))]
    cuts = {(t.adjoint, t.sizes) for t in terms if isinstance(t, Op) and t.name == "groups"}
    if len(cuts) != 1 or any(not part.is_scalar and part.shape != e.shape for part in parts):
        return e
    ((adjoint, sizes),) = cuts
    whole = [part if part.is_scalar else operator("groups", part, not adjoint, sizes) for part in parts]
    found = elementwise(e.profile, *whole) if isinstance(e, Map) else whole[0]
    return found if found.key.count("Op(groups,") < e.key.count("Op(groups,") else e


def trace(e: Expr) -> Expr:
    """Trace of a square matrix, products rotated to one cyclic order."""
    square(e, "trace")
    if e.is_scalar:
        return e
    pushed = _distribute(trace, e)
    if pushed is not None:
        return pushed
    match e:
        case Zero():
            return zeros(1, 1)
        case Eye(n):
            return constant(n)
        case Diag(v):
            return total(v)
        case Transpose(x):
            return trace(x)
        case FamilySum(i, n, body):
            return family_sum(i, n, trace(body))
        case Mul(_, factors):
            turned = [matmul(*factors[i:], *factors[:i]) for i in range(len(factors))]
            turned = [t for t in turned if (isinstance(t, Mul) and t.coef == 1) or t.is_scalar] or [e]
            best = min(turned, key=lambda t: (not t.is_scalar, t.key))
            return best if best.is_scalar else intern(Trace, best)
        case _:
            return intern(Trace, e)


def logdet(e: Expr) -> Expr:
    """log det of a symmetric positive definite matrix. Raises ShapeError for one that is not symmetric."""
    square(e, "logdet")
    if isinstance(e, Eye):
        return zeros(1, 1)
    if e.is_scalar and not complex_valued(e):
        return elementwise(sp.log(slot(0)), e)
    if not is_symmetric(e) and transpose(conjugated(e)) is not e:
        raise ShapeError("logdet needs a symmetric positive definite matrix, and the form of this one is not symmetric")
    c, body = split(e)
    return add(constant(e.rows * sp.log(c)), logdet(body)) if c != 1 else intern(LogDet, e)


def logsumexp(e: Expr, axis: Axis = None) -> Expr:
    e = _uncut(e) if axis is None else e
    return e if (e.is_scalar or (axis is not None and e.shape[axis] == 1)) else intern(LogSumExp, e, axis)


def softmax(e: Expr, axis: int, causal: bool = False) -> Expr:
    """Shares along an axis. Raises ShapeError for a causal one of a matrix that is not square."""
    if causal:
        square(e, "a causal softmax")
    return ones(*e.shape) if e.shape[axis] == 1 else intern(Softmax, e, axis, causal)


def normalise(kind: str, axis: int, eps: Any, e: Expr, weight: Expr | None = None, bias: Expr | None = None) -> Expr:
    """Columns (axis 0) or rows (axis 1) normalised; without weight and bias: no more than that. Raises ShapeError."""
    length = (e.rows, ONE) if axis == 0 else (ONE, e.cols)
    weight, bias = ones(*length) if weight is None else weight, zeros(*length) if bias is None else bias
    for part in (weight, bias):
        if not all(map(same, part.shape, length)):
            raise ShapeError(f"a weight of a norm is {show_shape(length)}, not {show_shape(part.shape)}")
    if e.shape[axis] == 1:  # of single entries
        u, w, b, eps = slot(0), slot(1), slot(2), number(eps)
        alone = {
            "layer_norm": sp.Integer(0) * u,
            "rms_norm": u / sp.sqrt(u**2 + eps),
            "sphere": u / sp.Max(sp.Abs(u), eps),
        }[kind]
        return elementwise(alone * w + b, e, weight, bias)
    return intern(Normalise, kind, axis, number(eps), e, weight, bias)


def largest(e: Expr, axis: Axis = None) -> Expr:
    e = _uncut(e) if axis is None else e
    return e if (e.is_scalar or (axis is not None and e.shape[axis] == 1)) else intern(Max, e, axis)


def diag(v: Expr) -> Expr:
    if v.cols != 1:
        raise ShapeError(
            f"diag needs a vector, this is {show_shape(v.shape)}; diagonal(M) takes the diagonal of a matrix"
        )
    pushed = _distribute(diag, v)
    if pushed is not None:
        return pushed
    match v:
        case Ones(n, _):
            return eye(n)
        case Zero(n, _):
            return zeros(n, n)
        case _:
            return v if v.is_scalar else intern(Diag, v)


def diagonal(e: Expr) -> Expr:
    square(e, "diagonal")
    pushed = _distribute(diagonal, e)
    if pushed is not None:
        return pushed
    match e:
        case Eye(n):
            return ones(n)
        case Zero(n, _):
            return zeros(n)
        case Diag(v):
            return v
        case Transpose(x):
            return diagonal(x)
        case _:
            return e if e.is_scalar else intern(Diagonal, e)


def spectral(profile: Any, e: Expr) -> Expr:
    """Sum of profile(s_i) over singular values; profile(0) must be 0 or the count of singular values would matter."""
    profile = number(profile)
    if profile == slot(0) ** 2:
        return total(elementwise(profile, e))
    if as_constant(e) == 0 and profile.subs(slot(0), 0) == 0:
        return zeros(1, 1)
    if 1 in e.shape:  # its one singular value is its length
        return elementwise(swap(profile, {slot(0): sp.sqrt(slot(0))}), total(elementwise(slot(0) ** 2, e)))
    c, core = profile.as_independent(slot(0), as_Add=False)
    if isinstance(e, Transpose):
        e = e.x
    return scale(c, intern(Spectral, core, e))


def spectral_map(profile: Any, e: Expr) -> Expr:
    profile = number(profile)
    c, core = profile.as_independent(slot(0), as_Add=False)
    if core == slot(0):
        return scale(c, e)
    return scale(c, intern(SpectralMap, core, e))  # of a transposed matrix too: transpose moves inside


def spectral_norm(e: Expr) -> Expr:
    """Largest singular value."""
    c, body = split(e)
    if c != 1:
        return scale(sp.Abs(c), spectral_norm(body))
    match e:
        case Eye():
            return eye(1)
        case Transpose(x):
            return spectral_norm(x)
        case Mul(_, (a, b)) if a is transpose(b):  # |B'B| = |B|^2
            return elementwise(slot(0) ** 2, spectral_norm(min(a, b, key=lambda x: isinstance(x, Transpose))))
        case _ if 1 in e.shape:
            return elementwise(sp.sqrt(slot(0)), total(elementwise(slot(0) ** 2, e)))
        case Diag(v):
            return largest(elementwise(sp.Abs(slot(0)), v))
        case _:
            return intern(SpectralNorm, e)


def noise(kind: str, rate: Any, e: Expr) -> Expr:
    """e with a part left out by chance while training."""
    return e if number(rate) == 0 else intern(Noise, kind, number(rate), e)


def operator(name: str, e: Expr, adjoint: bool = False, sizes: tuple[sp.Expr, ...] = ()) -> Expr:
    """A named linear operator applied to a matrix. Raises ShapeError."""
    shape = operator_shape(name, e.shape, adjoint, sizes)
    if isinstance(e, Zero):
        return zeros(*shape)
    match name, e:
        case "groups", Ones():
            return ones(*shape)
        case "groups", Op("groups", x, other, same_sizes) if other != adjoint and same_sizes == sizes:
            return x
        case "groups", _ if adjoint and e.cols == 1:
            return e
        case "groups", _ if shape[1] == 1 and not adjoint:
            return e
        case "groups", _ if sizes[0] == 1:
            return transpose(e)
        case _:
            pass
    if (sizes and name != "first" and sp.Mul(*sizes) == 1) or (name == "running_sum" and e.cols == 1):
        return e
    if name == "first" and same(e.rows, sizes[0]):
        return e
    if name == "first" and e.rows == 1 and e is not eye(ONE):
        return matmul(operator(name, eye(ONE), sizes=sizes), e)
    return _distribute(lambda x: operator(name, x, adjoint, sizes), e) or intern(Op, name, e, adjoint, sizes)


def spectrum(index: str, sizes: tuple[sp.Expr, ...], e: Expr, conjugate: bool = False) -> Expr:
    """The frequency `index` of a real matrix, channels by places down its columns. Raises ShapeError."""
    rows = multiple(e.rows, sizes)
    if isinstance(e, Zero):
        return zeros(rows, e.cols)
    if sp.Mul(*sizes) == 1:
        return e
    match e:
        case Signal(i, s, body) if s == sizes:
            fresh = rename_index(body, i, index)
            return conjugated(fresh) if conjugate else fresh
        case Mul(c, (*front, Diag() as last)) if front:
            return matmul(spectrum(index, sizes, matmul(*front, coef=c), conjugate), last)
        case _:
            return _distribute(lambda x: spectrum(index, sizes, x, conjugate), e) or intern(
                Spectrum, index, sizes, e, conjugate
            )


def signal(index: str, sizes: tuple[sp.Expr, ...], body: Expr) -> Expr:
    """The real matrix with this body at every frequency; real factors to the right of all that depends on it stand outside."""
    if isinstance(body, Zero):
        return zeros(body.rows * sp.Mul(*sizes), body.cols)
    if sp.Mul(*sizes) == 1:
        return body
    match body:
        case Spectrum(i, s, x, False) if i == index and s == sizes:
            return x
        case Mul(c, (*front, last)) if front and not mentions(last, index):
            return matmul(signal(index, sizes, matmul(*front, coef=c)), last)
        case _:
            return _distribute(lambda x: signal(index, sizes, x), body) or intern(Signal, index, sizes, body)


def conjugated(e: Expr) -> Expr:
    """The complex conjugate."""
    match e:
        case Spectrum(i, sizes, x, conjugate):
            return spectrum(i, sizes, x, not conjugate)
        case Signal():
            return e
        case _:
            return rebuild(e, tuple(map(conjugated, e.children)))


def family_sum(index: str, size: Any, body: Expr) -> Expr:
    """sum(body for index in size). An index that the body binds again is renamed, so nested sums have distinct ones."""
    size = sp.sympify(size)
    if not mentions(body, index):
        return scale(size, body)
    if index in (taken := bound_indices(body)):
        index, body = (fresh := fresh_index(index, taken | free_indices(body))), rename_index(body, index, fresh)
    return _distribute(lambda x: family_sum(index, size, x), body) or intern(FamilySum, index, size, body)


def family_logsumexp(index: str, size: Any, body: Expr) -> Expr:
    """log of sum(exp(body) for index in size)."""
    size = sp.sympify(size)
    if not mentions(body, index):
        return add(body, constant(sp.log(size), *body.shape))
    if index in (taken := bound_indices(body)):
        index, body = (fresh := fresh_index(index, taken | free_indices(body))), rename_index(body, index, fresh)
    return intern(FamilyLogSumExp, index, size, body)


def family_softmax(index: str, size: Any, e: Expr) -> Expr:
    """Shares among the members of a family: exp(e) / sum(exp(e) for index in size), still a function of the index."""
    size = sp.sympify(size)
    return intern(FamilySoftmax, index, size, e) if mentions(e, index) else constant(1 / size, *e.shape)


def fresh_index(index: str, taken: frozenset[str]) -> str:
    return index if index not in taken else fresh_index(f"{index}_", taken)


def rename_index(e: Expr, old: str, new: str) -> Expr:
    """e with its free index `old` called `new`; a sum that binds `new` gets another index first."""
    if old == new or not mentions(e, old):
        return e
    match e:
        case Member(of, _):
            return member(of, new)
        case FamilySum(i, n, body) | FamilyLogSumExp(i, n, body) if i == new:
            fresh = fresh_index(i, free_indices(body) | bound_indices(body) | {old, new})
            make = family_sum if isinstance(e, FamilySum) else family_logsumexp
            return make(fresh, n, rename_index(rename_index(body, i, fresh), old, new))
        case Signal(i, sizes, body) if i == new:
            fresh = fresh_index(i, free_indices(body) | bound_indices(body) | {old, new})
            return signal(fresh, sizes, rename_index(rename_index(body, i, fresh), old, new))
        case Spectrum(i, sizes, x, conjugate):
            return spectrum(new if i == old else i, sizes, rename_index(x, old, new), conjugate)
        case FamilySoftmax(i, n, x):
            return family_softmax(new if i == old else i, n, rename_index(x, old, new))
        case _:
            return rebuild(e, tuple(rename_index(c, old, new) for c in e.children))


def hold(e: Expr) -> Expr:
    return _distribute(hold, e) or (e if isinstance(e, Eye | Ones | Zero | Hold) else intern(Hold, e))


def sort(e: Expr) -> Expr:
    """The entries of each column, the largest first."""
    c, body = split(e)
    if c != 1 and c.is_nonnegative:
        return scale(c, sort(body))
    return e if e.rows == 1 or as_constant(e) is not None else intern(Sorted, e)


def top(e: Expr, share: Expr) -> Expr:
    """1 where an entry is among the share of largest magnitudes of its sample, else 0; constant for every derivation."""
    if not share.is_scalar:
        raise ShapeError(f"a share is a number, this is {show_shape(share.shape)}")
    return hold(intern(Worked, "top", (e, share)))


def factored(name: str, e: Expr) -> Expr:
    """A part of a factorisation of what no layer changes. Raises DeriveError E132 of what moves."""
    moving = sorted(s.name for s in e.symbols if s.role not in ("parameter", "input"))
    if moving and name == "pinv":
        return transpose(spectral_map(sp.Piecewise((1 / slot(0), slot(0) > 0), (0, True)), e))
    if moving:
        raise DeriveError(
            "E132",
            f"{name} is worked out once, of parameters and inputs; this depends on {moving[0]}",
            hint="inv(M), pinv(M) and spectral_map(h(s), M) follow what moves",
        )
    if name.startswith("eigh") and not is_symmetric(e):
        raise DeriveError("E132", f"{name} takes a symmetric matrix", hint="M.T @ M, or (M + M.T) / 2")
    return intern(Worked, name, (e,))


def indicator(name: str, e: Expr, *params: Any) -> Expr:
    """0 on the set, infinity outside."""
    if name == "simplex" and params == (1,):
        params = ()
    return intern(Indicator, name, tuple(p if isinstance(p, Expr) else number(p) for p in params), e)


def prox(term: Expr, variable: Sym, t: Any, at: Expr, swaps: tuple[tuple[sp.Expr, sp.Expr], ...] = ()) -> Expr:
    """argmin over `variable` of t * term + |variable - at|^2 / 2."""
    return intern(Prox, term, variable, number(t), at, swaps)


def prox_map(p: Any, slots: tuple[sp.Symbol, ...], *args: Expr) -> Expr:
    """A scalar prox record applied elementwise to args[0]; args[1:] are the values of the scalars in `slots`."""
    return intern(ProxMap, p, args, slots)


def sweep(q: Expr, fall: Expr, at: Expr, step: Expr) -> Expr:
    """One pass over the entries of `at`, each to the least of a quadratic and what `step` is the prox of."""
    return intern(Sweep, q, fall, at, step)


def multiplier(p: Any, slots: tuple[sp.Symbol, ...], *args: Expr) -> Expr:
    """The m of each column at which the sum of a * p(v - m a) is s: args are v, a, s, reach, among whose entries it is, and as in prox_map."""
    return intern(Multiplier, p, args, slots)


def spectral_prox(p: Any, x: Expr) -> Expr:
    """A scalar prox record applied to the singular values of x."""
    return intern(SpectralProx, p, x)


def spectral_divergence(p: Any, x: Expr, symmetric: bool = False) -> Expr:
    """The divergence of that in x; symmetric: of the record applied to the eigenvalues of the symmetric part of x."""
    return intern(SpectralDivergence, p, symmetric, x)


def answer_divergence(e: Expr, x: Expr, probes: Any = 0) -> Expr:
    """The divergence of an answer e in an input x that it was worked out from, when a loss is called; by so many probes, or 0: exact.

    Raises ShapeError, DeriveError E132.
    """
    if e.shape != x.shape:
        raise ShapeError(f"{show_shape(e.shape)} against {show_shape(x.shape)}")
    if not (
        isinstance(x, Sym) and x.role == "input" and x.family is None and any(s.role == "variable" for s in e.moving)
    ):
        hint = "div(z, x), or div(A @ z, x), of a loss: z is what a network made of x"
        raise DeriveError("E132", "a divergence is of what reads a variable, in an input", hint=hint)
    return intern(Worked, "div", (e, x, constant(probes)))


def signs(seed: int, rows: Any, cols: Any) -> Expr:
    """1 and -1 at random, one number of a seed for each entry, the same in every sample and call."""
    return intern(Worked, "signs", (ones(rows, cols), constant(seed)))


def project(name: str, x: Expr, *params: Any) -> Expr:
    """The nearest point of the named set."""
    return intern(Project, name, tuple(p if isinstance(p, Expr) else number(p) for p in params), x)


def curve(points: Expr, x: Expr, grid: Grid) -> Expr:
    """Of each entry of x, the function that has these values at the places of a grid."""
    return intern(Curve, points, x, grid)


def places(grid: Grid) -> Expr:
    """The places of a grid, of an odd function those above 0, as a column."""
    width = sp.Rational(repr(grid.high)) - sp.Rational(repr(grid.low))
    width /= grid.knots - 1
    before = sp.Integer(0) if grid.odd else sp.Rational(repr(grid.low)) - width
    counted = transpose(operator("running_sum", ones(1, grid.stored)))
    return add(constant(before, grid.stored), scale(width, counted))


# --- the same node of other parts ---


def rebuild(e: Expr, parts: tuple[Expr, ...]) -> Expr:
    """The same operation on other children (in the order of `e.children`), normalised again."""
    if all(a is b for a, b in zip(parts, e.children, strict=True)):
        return e
    match cast(Node, e):
        case Sym() | Eye() | Ones() | Zero():
            return e
        case Member(_, index):
            of = parts[0]
            return member(of, index) if isinstance(of, Sym) and of.family is not None else of
        case Add():
            return add(*parts)
        case Mul(c, _):
            return matmul(*parts, coef=c)
        case Transpose():
            return transpose(parts[0])
        case Inverse():
            return inverse(parts[0])
        case Map(profile, _):
            return elementwise(profile, *parts)
        case Diag():
            return diag(parts[0])
        case Diagonal():
            return diagonal(parts[0])
        case Softmax(_, axis, causal):
            return softmax(parts[0], axis, causal)
        case Noise(kind, rate, _):
            return noise(kind, rate, parts[0])
        case Normalise(kind, axis, eps, _, _, _):
            return normalise(kind, axis, eps, *parts)
        case FamilyLogSumExp(i, n, _):
            return family_logsumexp(i, n, parts[0])
        case FamilySoftmax(i, n, _):
            return family_softmax(i, n, parts[0])
        case SpectralMap(h, _):
            return spectral_map(h, parts[0])
        case Op(name, _, adjoint, sizes):
            return operator(name, parts[0], adjoint, sizes)
        case Spectrum(i, sizes, _, conjugate):
            return spectrum(i, sizes, parts[0], conjugate)
        case Signal(i, sizes, _):
            return signal(i, sizes, parts[0])
        case Hold():
            return hold(parts[0])
        case Prox(_, _, t, _, swaps):
            term, variable, at = parts
            assert isinstance(variable, Sym)
            return prox(term, variable, t, at, swaps)
        case ProxMap(p, _, slots):
            return prox_map(p, slots, *parts)
        case Multiplier(p, _, slots):
            return multiplier(p, slots, *parts)
        case Sweep():
            return sweep(*parts)
        case SpectralProx(p, _):
            return spectral_prox(p, parts[0])
        case Project(name, params, _):
            fresh = iter(parts)
            params = tuple(next(fresh) if isinstance(p, Expr) else p for p in params)
            return project(name, next(fresh), *params)
        case Sorted():
            return sort(parts[0])
        case Worked(name, _):
            return intern(Worked, name, parts)
        case Curve(_, _, grid):
            return curve(parts[0], parts[1], grid)
        case FamilySum(i, n, _):
            return family_sum(i, n, parts[0])
        case Sum(_, axis):
            return total(parts[0], axis)
        case LogSumExp(_, axis):
            return logsumexp(parts[0], axis)
        case Max(_, axis):
            return largest(parts[0], axis)
        case Trace():
            return trace(parts[0])
        case LogDet():
            return logdet(parts[0])
        case Spectral(h, _):
            return spectral(h, parts[0])
        case SpectralNorm():
            return spectral_norm(parts[0])
        case SpectralDivergence(p, symmetric, _):
            return spectral_divergence(p, parts[0], symmetric)
        case Indicator(name, params, _):
            fresh = iter(parts)
            params = tuple(next(fresh) if isinstance(p, Expr) else p for p in params)
            return indicator(name, next(fresh), *params)
        case _ as never:
            assert_never(never)
