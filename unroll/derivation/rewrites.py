"""Rewrites: named identities and named approximations of a derived step. One record each: picture, what it assumes, its error.

    exact       changes no value
    bounded     an approximation with a stated error under a stated assumption
    heuristic   a substitution; no bound is known, and every report says so

A rewrite is a rule on one node: it gives what stands there afterwards and, for an approximation, the number that its
assumption is about. `apply` runs a rule over an expression from the outside in and keeps every place where it matched, so that
`unroll check` can measure assumption and error there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import sympy as sp

from unroll.errors import SpecError, did_you_mean, quote
from unroll.language.constructors import (
    add,
    common_powers,
    conjugated,
    constant,
    diag,
    diagonal,
    elementwise,
    eye,
    family_softmax,
    family_sum,
    fresh_index,
    inverse,
    is_symmetric,
    logdet,
    matmul,
    member,
    ones,
    operator,
    prox,
    rebuild,
    scale,
    signal,
    softmax,
    spectral_norm,
    spectrum,
    split,
    swap,
    total,
    transpose,
)
from unroll.language.nodes import (
    ONE,
    Add,
    Diag,
    Expr,
    Eye,
    FamilySoftmax,
    FamilySum,
    Hold,
    Inverse,
    LogDet,
    LogSumExp,
    Map,
    Max,
    Member,
    Mul,
    Normalise,
    Op,
    Prox,
    ShapeError,
    Softmax,
    Spectral,
    SpectralMap,
    SpectralNorm,
    Sum,
    Sym,
    Trace,
    Transpose,
    bound_indices,
    free_indices,
    mentions,
    multiple,
    same,
    slot,
    walk,
)
from unroll.language.parse import Place, Scope, parse
from unroll.language.show import text
from unroll.language.traversal import expand

Kind = Literal["exact", "bounded", "heuristic"]


@dataclass(frozen=True)
class Site:
    """One place where a rewrite matched. assumption: the number it is about, 1 × 1; None for an exact one.

    core: what the stated error is about, before and after, where that is a part of the whole.
    """

    before: Expr
    after: Expr
    assumption: Expr | None = None
    core: tuple[Expr, Expr] | None = None


@dataclass(frozen=True)
class Argument:
    """kind: number, count, flag, symbol or word; without a default it must be given."""

    name: str
    kind: Literal["number", "count", "flag", "symbol", "word"]
    default: Any = None
    optional: bool = True


Rule = Callable[[Expr], Site | None]


@dataclass(frozen=True)
class Rewrite:
    """rule(arguments) -> what happens at one node. picture, result: before and after. assumes, error: in words. limit(assumption, arguments) -> the stated bound on the
    relative error, infinite where the assumption fails. left(e, arguments) -> what is still there that the rewrite is to leave none of. rest(e, arguments, values of scalars) -> e with what is in front of its terms rewritten."""

    name: str
    picture: str
    result: str
    kind: Kind
    assumes: str
    error: str
    source: str
    rule: Callable[..., Rule]
    arguments: tuple[Argument, ...] = ()
    stage: Literal["objective", "step"] = "step"
    limit: Callable[..., float] | None = None
    left: Callable[..., Expr | None] | None = None
    rest: Callable[..., Expr] | None = None

    @property
    def signature(self) -> str:
        shown = [a.name if not a.optional else f"{a.name}={a.default}" for a in self.arguments]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True)
class Applied:
    """A rewrite as a spec asked for it, and the places where it matched."""

    rewrite: Rewrite
    values: dict[str, Any]
    block: str
    sites: tuple[Site, ...]

    @property
    def title(self) -> str:
        shown = ", ".join(
            f"{k}={v.name if isinstance(v, Sym) else v}"
            for k, v in self.values.items()
            if v is not None and v is not False
        )
        return f"{self.rewrite.name}({shown})" if shown else self.rewrite.name


# --- reading and applying ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """`neumann(order=1)`, read."""

    rewrite: Rewrite
    values: dict[str, Any]
    text: str
    place: Place


def read(written: str, scope: Scope, place: Place) -> Call:
    """A line of `rewrites:`. Raises SpecError E308 for an unknown rewrite or wrong arguments."""

    def fail(message: str, hint: str = "") -> SpecError:
        return SpecError("E308", message, place(0, len(written)), hint)

    try:
        tree = ast.parse(written.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise fail(f"'{quote(written)}' is not a rewrite", "write it as name or name(argument=value)") from None
    match tree:
        case ast.Name(id=name):
            args, keywords = list[ast.expr](), list[ast.keyword]()
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            pass
        case _:
            raise fail(f"'{quote(written)}' is not a rewrite", "write it as name or name(argument=value)")
    record = BY_NAME.get(name)
    if record is None:
        raise fail(f"unknown rewrite '{quote(name)}'", did_you_mean(name, BY_NAME) or f"rewrites: {', '.join(BY_NAME)}")
    given = {a.name: node for a, node in zip(record.arguments, args, strict=False)}
    given |= {k.arg: k.value for k in keywords if k.arg is not None}
    unknown = [k for k in given if k not in {a.name for a in record.arguments}]
    if unknown or len(args) > len(record.arguments) or any(k.arg is None for k in keywords):
        takes = ", ".join(a.name for a in record.arguments) or "no arguments"
        raise fail(
            f"{name} has no argument '{unknown[0]}'" if unknown else f"{name} has too many arguments",
            f"it takes {takes}",
        )
    values = {a.name: _value(a, given.get(a.name), written, scope, fail) for a in record.arguments}
    return Call(record, values, written.strip(), place)


def _value(a: Argument, node: ast.expr | None, written: str, scope: Scope, fail: Callable[..., SpecError]) -> Any:
    if node is None:
        if not a.optional:
            raise fail(f"the argument '{a.name}' is missing", f"{a.name}: a {a.kind}")
        return a.default
    match a.kind, node:
        case "flag", ast.Constant(value=bool() as value):
            return value
        case "symbol", ast.Name(id=name) if isinstance(scope.names.get(name), Sym):
            return scope.names[name]
        case "word", ast.Name(id=name):
            return name
        case "number", _:
            value = parse(ast.unparse(node), scope)
            if isinstance(value, Expr):
                raise fail(f"{a.name} must be a number")
            return value
        case "count", _:
            value = parse(ast.unparse(node), scope)
            if not isinstance(value, sp.Integer) or value < 0:
                raise fail(f"{a.name} must be a whole number from 0")
            return value
        case _:
            raise fail(
                f"{a.name} must be {'True or False' if a.kind == 'flag' else 'the name of a declared ' + a.kind}"
            )


def apply(call: Call, e: Expr, block: str = "") -> tuple[Expr, Applied]:
    """The expression rewritten everywhere, from the outside in. Sites may be none: the caller decides."""
    sites: list[Site] = []
    rule = call.rewrite.rule(**call.values)
    out = _descend(e, rule, sites)
    return out, Applied(call.rewrite, call.values, block, tuple(dict.fromkeys(sites)))


def rewritten(e: Expr, done: tuple[Applied, ...]) -> Expr:
    """What rewrites that were applied elsewhere make of e."""
    for applied in done:
        e = _descend(e, applied.rewrite.rule(**applied.values), [])
    return e


MOST = 100_000  # steps of one rule at one place


def _descend(e: Expr, rule: Rule, sites: list[Site]) -> Expr:
    for _ in range(MOST):
        found = rule(e)
        if found is None or found.after is e:
            break
        sites.append(found)
        e = found.after
    if isinstance(e, Prox):  # what is fed to the prox; the term it belongs to is a definition
        return prox(e.term, e.variable, e.t, _descend(e.at, rule, sites), e.swaps)
    return rebuild(e, tuple(_descend(c, rule, sites) for c in e.children))


def missed(call: Call, e: Expr) -> SpecError:
    """The error of a rewrite that found nothing to do."""
    return SpecError(
        "E309", f"{call.text} finds nothing to rewrite", call.place(0, len(call.text)),
        f"it rewrites {call.rewrite.picture}", (f"the step: {text(e)}",),
    )  # fmt: skip


def unfinished(call: Call, e: Expr) -> SpecError:
    """The error of a rewrite that cannot do what it promises to a part e of the step."""
    return SpecError(
        "E309", f"{call.text} leaves {text(e)} as it is", call.place(0, len(call.text)),
        f"it rewrites {call.rewrite.picture}, of which this is no form that it knows",
    )  # fmt: skip


# --- pieces of pictures -----------------------------------------------------------------------------------------------


def factors_of(e: Expr) -> tuple[sp.Expr, tuple[Expr, ...]]:
    """e = c * F1 @ F2 @ ..."""
    c, body = split(e)
    return c, body.factors if isinstance(body, Mul) else (body,)


def shifted_identity(x: Expr) -> tuple[sp.Expr, Expr] | None:
    """(a, M) with x = a I + M."""
    if not isinstance(x, Add):
        return None
    found = [split(t)[0] for t in x.terms if isinstance(split(t)[1], Eye)]
    if len(found) != 1:
        return None
    return found[0], add(x, scale(-found[0], eye(x.rows)))


def turned(factors: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The factors of the transposed product."""
    return tuple(transpose(f) for f in reversed(factors))


def _joined(n: sp.Expr, *parts: Expr) -> Expr:
    return matmul(eye(n), *parts)


# --- exact ------------------------------------------------------------------------------------------------------------


def push_through(to: sp.Expr | None = None) -> Rule:
    """(a I + c X Y)⁻¹ X → X (a I + c Y X)⁻¹, its transposed, and log det(a I + c X Y) → log det(a I + c Y X) + (n − p) log a."""

    def inner(x: Expr) -> list[tuple[sp.Expr, sp.Expr, tuple[Expr, ...], tuple[Expr, ...]]]:
        """(a, c, X, Y) for the ways to cut the product, the new side as asked."""
        shifted = shifted_identity(x)
        if shifted is None:
            return []
        c, factors = factors_of(shifted[1])
        cuts = [(shifted[0], c, factors[:i], factors[i:]) for i in range(1, len(factors))]
        return [cut for cut in cuts if _wanted(cut[3][0].rows, x.rows, to)]

    def other(a: sp.Expr, c: sp.Expr, x: tuple[Expr, ...], y: tuple[Expr, ...]) -> Expr:
        return add(scale(a, eye(y[0].rows)), matmul(*y, *x, coef=c))

    def rule(e: Expr) -> Site | None:
        match e:
            case Mul(coef, factors):
                for i, f in enumerate(factors):
                    for a, c, x, y in inner(f.x) if isinstance(f, Inverse) else []:
                        before, after = factors[:i], factors[i + 1 :]
                        turned_around = inverse(other(a, c, x, y))
                        if after[: len(x)] == x:
                            return Site(e, matmul(*before, *x, turned_around, *after[len(x) :], coef=coef))
                        if before[len(before) - len(y) :] == y:
                            return Site(
                                e, matmul(*before[: len(before) - len(y)], turned_around, *y, *after, coef=coef)
                            )
                return None
            case LogDet(arg):
                for a, c, x, y in inner(arg):
                    small = other(a, c, x, y)
                    if transpose(small) is small:
                        return Site(e, add(logdet(small), constant((arg.rows - small.rows) * sp.log(a))))
                return None
            case _:
                return None

    return rule


def _wanted(new: sp.Expr, old: sp.Expr, to: sp.Expr | None) -> bool:
    """Is the new side the one asked for, or surely the smaller one?"""
    return same(new, to) and not same(old, to) if to is not None else (old - new).is_positive is True


def smaller_side(e: Expr, sizes: dict[sp.Symbol, int]) -> Expr:
    """Inverses and determinants on their smaller side, where the sizes are known: an exact rewrite that cost decides."""

    def known(n: sp.Expr) -> int | None:
        found = swap(n, sizes)
        return int(found) if found.is_number else None

    def rule(x: Expr) -> Site | None:
        sides = {n: size for f in _inverted(x) for n in _sides(f) if (size := known(n)) is not None}
        for n, size in sorted(sides.items(), key=lambda side: side[1]):
            found = push_through(n)(x)
            if found is not None and all(size < old for f in _inverted(x) if (old := known(f.rows)) is not None):
                return found
        return None

    return _descend(e, rule, [])


def _inverted(e: Expr) -> list[Expr]:
    match e:
        case LogDet(x):
            return [x]
        case Mul(_, factors):
            return [f.x for f in factors if isinstance(f, Inverse)]
        case _:
            return []


def _sides(x: Expr) -> set[sp.Expr]:
    """Sizes at which the product inside a I + c X Y can be cut."""
    shifted = shifted_identity(x)
    return {f.rows for f in factors_of(shifted[1])[1][1:]} if shifted is not None else set()


def woodbury() -> Rule:
    """(a I + c U Uᵀ)⁻¹ → (I − c/(a + c) U Uᵀ)/a for U with orthonormal columns."""

    def rule(e: Expr) -> Site | None:
        shifted = shifted_identity(e.x) if isinstance(e, Inverse) else None
        if shifted is None:
            return None
        a, (c, factors) = shifted[0], factors_of(shifted[1])
        if len(factors) == 2 and factors[1] is transpose(factors[0]) and orthonormal_columns(factors[0]):
            return Site(e, scale(1 / a, add(eye(e.rows), scale(-c / (a + c), matmul(*factors)))))
        return None

    return rule


def orthonormal_columns(u: Expr) -> bool:
    """U' U = I, as declared."""
    own = u.of if isinstance(u, Member) else u
    return isinstance(own, Sym) and "orthonormal" in own.props


def expanded() -> Rule:
    """A (B + C) D → A B D + A C D, and (B + C) * r → B * r + C * r for a row r."""

    def rule(e: Expr) -> Site | None:
        match e:
            case Mul() if (out := expand(e)) is not e:
                return Site(e, out)
            case Map(profile, args):
                wide = [
                    i
                    for i, a in enumerate(args)
                    if isinstance(a, Add | Mul) and a.rows != 1 and not sp.diff(profile, slot(i)).has(slot(i))
                ]
                for i in wide:
                    out = expand(args[i])
                    if isinstance(out, Add) and profile.subs(slot(i), 0) == 0:
                        return Site(e, add(*(elementwise(profile, *args[:i], t, *args[i + 1 :]) for t in out.terms)))
                return None
            case _:
                return None

    return rule


def collected(on: Sym) -> Rule:
    """A X + B X → (A + B) X."""

    def rule(e: Expr) -> Site | None:
        if not isinstance(e, Add):
            return None
        tails: dict[tuple[Expr, ...], list[Expr]] = {}
        for t in e.terms:
            c, factors = factors_of(t)
            at = next((i for i, f in enumerate(factors) if f is on or (isinstance(f, Sym) and f.name == on.name)), None)
            key = () if at is None else factors[at:]
            tails.setdefault(key, []).append(t if at is None else scale(c, _joined(factors[at].rows, *factors[:at])))
        if all(len(fronts) < 2 for key, fronts in tails.items() if key):
            return None
        return Site(e, add(*(add(*fronts) if not key else matmul(add(*fronts), *key) for key, fronts in tails.items())))

    return rule


def shares() -> Rule:
    """softmax_k(a + b_k) → softmax_k(b_k), and Σ_k softmax_k(b_k) * A → A, A and a the same for every k."""

    def rule(e: Expr) -> Site | None:
        match e:
            case FamilySoftmax(k, n, x) if isinstance(x, Add):
                kept = [t for t in x.terms if mentions(t, k)]
                return Site(e, family_softmax(k, n, add(*kept))) if 0 < len(kept) < len(x.terms) else None
            case FamilySum(k, _, body):
                c, inner = split(body)
                match inner:
                    case FamilySoftmax(i, _, _) if i == k:
                        return Site(e, constant(c, *inner.shape))
                    case Map(profile, args):
                        own = [j for j, a in enumerate(args) if isinstance(a, FamilySoftmax) and a.index == k]
                        rest = profile / slot(own[0]) if len(own) == 1 else profile
                        if (
                            len(own) != 1
                            or rest.has(slot(own[0]))
                            or any(mentions(a, k) for j, a in enumerate(args) if j != own[0])
                        ):
                            return None
                        shape = args[own[0]].shape
                        return Site(
                            e,
                            scale(
                                c,
                                elementwise(
                                    profile.subs(slot(own[0]), 1),
                                    *(ones(*shape) if j == own[0] else a for j, a in enumerate(args)),
                                ),
                            ),
                        )
                    case _:
                        return None
            case _:
                return None

    return rule


FREQUENCY = "w"
"""Index of frequencies."""


def circulant_to_fft() -> Rule:
    """f(X) Y → the inverse transform of f(X̂) Ŷ for f(X) made of shifts(X): sums, products, inverses; log det f(X) → Σ log det f(X̂)."""

    def rule(e: Expr) -> Site | None:
        sizes = next((x.sizes for x in walk(e) if isinstance(x, Op) and x.name == "shifts"), None)
        if sizes is None:
            return None
        found = _per_frequency(e, sizes, fresh_index(FREQUENCY, bound_indices(e) | free_indices(e)))
        return None if found is None else Site(e, found)

    return rule


def per_frequency(e: Expr) -> Expr:
    """e with circulant_to_fft wherever it applies: an exact rewrite that is never dearer."""
    return _descend(e, circulant_to_fft(), []) if any(isinstance(x, Op) and x.name == "shifts" for x in walk(e)) else e


def _per_frequency(e: Expr, sizes: tuple[sp.Expr, ...], w: str) -> Expr | None:
    places = sp.Mul(*sizes)
    match e:
        case LogDet(x) if (b := circulant_block(x, sizes, w)) is not None:
            return family_sum(w, places, logdet(b))
        case Inverse() if (b := circulant_block(e, sizes, w)) is not None:
            return circulant(b, sizes, w)
        case Op("shifts", x, True, s) if (
            s == sizes and (b := circulant_block(x, sizes, w)) is not None and mentions(b, w)
        ):
            return scale(sp.sqrt(places), signal(w, sizes, b))
        case Mul() if (found := _product_per_frequency(e, sizes, w)) is not None:
            return found
        case Mul() if (
            isinstance(turned := transpose(e), Mul) and (found := _product_per_frequency(turned, sizes, w)) is not None
        ):
            return transpose(found)
        case _:
            return None


def _product_per_frequency(e: Mul, sizes: tuple[sp.Expr, ...], w: str) -> Expr | None:
    """A @ Y with A of cyclic shifts: the run of such factors that ends farthest to the right, and what follows it.

    Not of a product that is symmetric by its form, which would lose that.
    """
    if is_symmetric(e):
        return None
    blocks = [circulant_block(f, sizes, w) for f in e.factors]
    for j in range(len(blocks) - 1, 0, -1):
        i = next((i for i in range(j) if None not in blocks[i:j]), j)
        run = [b for b in blocks[i:j] if b is not None]
        if blocks[j] is None and any(mentions(b, w) for b in run) and _places(e.factors[j], sizes):
            end = len(blocks) if e.cols == 1 or isinstance(e.factors[j], Diag) else j + 1  # the narrow side first
            y = signal(w, sizes, matmul(*run, spectrum(w, sizes, matmul(*e.factors[j:end]))))
            return matmul(*e.factors[:i], y, *e.factors[end:], coef=e.coef)
    return None


def _places(e: Expr, sizes: tuple[sp.Expr, ...]) -> bool:
    """Are the rows of e channels by places?"""
    try:
        return bool(multiple(e.rows, sizes))
    except ShapeError:
        return False


def circulant(block: Expr, sizes: tuple[sp.Expr, ...], w: str) -> Expr:
    """The matrix that commutes with cyclic shifts and has this block at every frequency: the shifts of its first columns."""
    return operator("shifts", signal(w, sizes, scale(1 / sp.sqrt(sp.Mul(*sizes)), block)), sizes=sizes)


def circulant_block(e: Expr, sizes: tuple[sp.Expr, ...], w: str) -> Expr | None:
    """The block at frequency w of a matrix that commutes with cyclic shifts by its form, else None: Fᴴ e F is block diagonal.

    e: c T × c' T, made of shifts(X), X: c T × c'.  Returns c × c'; products, inverses and transposes of matrices are those of blocks.
    Source: Davis 1979, Circulant Matrices; Chan et al. 2022, arXiv:2105.10446.
    """
    if not (_places(e, sizes) and _places(transpose(e), sizes)):
        return None
    match e:
        case Eye(n):
            return eye(multiple(n, sizes))
        case Op("shifts", x, False, s) if s == sizes:
            return scale(sp.sqrt(sp.Mul(*sizes)), spectrum(w, sizes, x))
        case Transpose(x):
            b = circulant_block(x, sizes, w)
            return None if b is None else transpose(conjugated(b))
        case Diag(Op("repeat", v, False, (n,))) if same(n, sp.Mul(*sizes)):
            return diag(v)
        case Diag(Map(profile, args)) if all(
            a.is_scalar or (isinstance(a, Op) and a.name == "repeat" and not a.adjoint) for a in args
        ):
            return _repeated(profile, args, sizes)
        case Inverse() | Hold() | FamilySum() | Add() | Mul():
            blocks = [circulant_block(c, sizes, w) for c in e.children]
            return None if None in blocks else rebuild(e, tuple(b for b in blocks if b is not None))
        case Map(profile, args):  # scalars times a matrix
            wide = [i for i, a in enumerate(args) if not a.is_scalar]
            if len(wide) != 1 or (profile / slot(wide[0])).has(slot(wide[0])):
                return None
            b = circulant_block(args[wide[0]], sizes, w)
            return None if b is None else elementwise(profile, *(b if i == wide[0] else a for i, a in enumerate(args)))
        case _:
            return None


def _repeated(profile: sp.Expr, args: tuple[Expr, ...], sizes: tuple[sp.Expr, ...]) -> Expr | None:
    """diag(h(repeat(v))) has the block diag(h(v))."""
    short = [a.x if isinstance(a, Op) and same(sp.Mul(*a.sizes), sp.Mul(*sizes)) else a for a in args]
    fits = all(a.is_scalar or a is not b for a, b in zip(args, short, strict=True))
    return diag(elementwise(profile, *short)) if fits else None


# --- bounded ----------------------------------------------------------------------------------------------------------


def neumann(order: sp.Expr) -> Rule:
    """(a I + M)⁻¹ → (I − M/a + ... ± (M/a)^order)/a."""

    def rule(e: Expr) -> Site | None:
        c, factors = factors_of(e)
        for i, f in enumerate(factors):
            shifted = shifted_identity(f.x) if isinstance(f, Inverse) else None
            if shifted is not None:
                a, m = shifted
                ratio = scale(-1 / a, m)
                powers = [_joined(f.rows, *[ratio] * k) for k in range(int(order) + 1)]
                terms = [scale(c / a, _joined(e.rows, *factors[:i], p, *factors[i + 1 :])) for p in powers]
                return Site(e, add(*terms), spectral_norm(ratio), (f, scale(1 / a, add(*powers))))
        return None

    return rule


def tight_frame(of: Sym) -> Rule:
    """Σ_k A U_k U_kᵀ B → A B."""

    def rule(e: Expr) -> Site | None:
        match e:
            case FamilySum(k, n, body) if of.family is not None:
                c, factors = factors_of(body)
                u = member(of, k)
                for i in range(len(factors) - 1):
                    rest = (*factors[:i], *factors[i + 2 :])
                    if factors[i] is u and factors[i + 1] is transpose(u) and not any(mentions(f, k) for f in rest):
                        frame = family_sum(k, n, matmul(u, transpose(u)))
                        gap = spectral_norm(add(frame, scale(-1, eye(u.rows))))
                        return Site(e, scale(c, _joined(e.rows, *rest)), gap)
                return None
            case _:
                return None

    return rule


def incoherent(of: Sym) -> Rule:
    """Dᵀ D → I."""

    def rule(e: Expr) -> Site | None:
        if not isinstance(e, Mul):
            return None
        for i in range(len(e.factors) - 1):
            if e.factors[i] is transpose(of) and e.factors[i + 1] is of:
                rest = (*e.factors[:i], *e.factors[i + 2 :])
                return Site(e, scale(e.coef, _joined(e.rows, *rest)), incoherence(of))
        return None

    return rule


def incoherence(d: Expr) -> Expr:
    """|D' D - I|."""
    return spectral_norm(add(matmul(transpose(d), d), scale(-1, eye(d.cols))))


def spectral_bound(by: Sym) -> Rule:
    """log det(a I + c M) → n log a + Σ_i log(1 + c/a (Qᵀ M Q)_ii): an upper bound, tight where Q diagonalises M."""

    def rule(e: Expr) -> Site | None:
        shifted = shifted_identity(e.x) if isinstance(e, LogDet) else None
        if shifted is None or not isinstance(e, LogDet):
            return None
        a, m = shifted
        free = sorted(free_indices(e))
        if by.family is not None and not free:
            return None
        q = by if by.family is None else member(by, free[0])
        if not same(q.rows, e.x.rows):
            return None
        energies = diagonal(matmul(transpose(q), scale(1 / a, m), q))
        value = total(elementwise(sp.log(1 + slot(0)), energies))
        gap = spectral_norm(add(matmul(transpose(q), q), scale(-1, eye(q.cols))))
        return Site(e, add(value, constant(e.x.rows * sp.log(a))), gap)

    return rule


# --- heuristic --------------------------------------------------------------------------------------------------------


def gram_to_softmax(scale: sp.Expr, causal: bool = False) -> Rule:
    """V Vᵀ V → V softmax(scale Vᵀ V), down the columns."""

    def rule(e: Expr) -> Site | None:
        if not isinstance(e, Mul):
            return None
        fs = e.factors
        for length in range(len(fs) // 3, 0, -1):
            for i in range(len(fs) - 3 * length + 1):
                v = fs[i : i + length]
                if fs[i + length : i + 2 * length] == turned(v) and fs[i + 2 * length : i + 3 * length] == v:
                    weights = softmax(matmul(*turned(v), *v, coef=scale), 0, causal)
                    return Site(e, matmul(*fs[: i + length], weights, *fs[i + 3 * length :], coef=e.coef))
        return None

    return rule


def causal_tokens(over: sp.Expr) -> Rule:
    """Sums over tokens become running sums: token j sees the tokens up to j. What is in front of terms stays: see `counted`."""

    def rule(e: Expr) -> Site | None:
        with suppress(ShapeError):  # no form that it knows: what is left is refused
            out = _sum_repeated([scale(c, _running(x, over)) for c, x in map(split, terms_of(e))])
            return Site(e, out) if out is not e else None
        return None

    return rule


def terms_of(e: Expr) -> tuple[Expr, ...]:
    return e.terms if isinstance(e, Add) else (e,)


def counted(e: Expr, over: sp.Expr, values: Mapping[sp.Symbol, sp.Expr]) -> Expr:
    """The number of tokens in front of the terms of e becomes that of the tokens up to each. values: of scalars in their place."""
    if isinstance(e, Prox):
        return prox(e.term, e.variable, e.t, counted(e.at, over, values), e.swaps)
    terms = [(c, x, sp.cancel(swap(c, dict(values)))) for c, x in map(split, terms_of(e))]
    if not any(number.has(over) for _, _, number in terms):
        return e
    return _sum_repeated([_counted(number, x, over) if number.has(over) else scale(c, x) for c, x, number in terms])


def _counted(c: sp.Expr, e: Expr, n: sp.Expr) -> Expr:
    """c e with n in c the number of tokens so far, a row."""
    return elementwise(c.subs(n, slot(0)) * slot(1), _counts(n), e) if c.has(n) else scale(c, e)


def _counts(n: sp.Expr) -> Expr:
    """1, 2, .. n: how many tokens there are up to each."""
    return operator("running_sum", ones(1, n))


def _running(e: Expr, n: sp.Expr) -> Expr:
    """e with every sum over the n tokens replaced by the sums up to each token: what was one value is a row of n values."""
    if same(e.rows, n) and not same(e.cols, n):  # tokens as rows
        return transpose(_running(transpose(e), n)) if not isinstance(e, Transpose | Sym) else e
    match e:
        case Sum(x, None | 1) if same(x.cols, n) or (same(x.rows, n) and x.cols == 1):
            inner = _running(x if same(x.cols, n) else transpose(x), n)
            return operator("running_sum", inner if e.axis == 1 else total(inner, 0))
        case Sum(x, 0) if same(x.rows, n):
            return transpose(operator("running_sum", _running(transpose(x), n)))
        case Mul(c, factors):
            return _running_product(c, factors, n)
        case Softmax(x, axis, False) if same(x.rows, n) and same(x.cols, n):
            return softmax(x, axis, True)
        case Map(profile, args) if profile.has(n):
            return elementwise(profile.subs(n, slot(len(args))), *(_running(a, n) for a in args), _counts(n))
        case Map(profile, args):
            return elementwise(profile, *(_running(a, n) for a in args))
        case Add(terms):
            parts = [_running(t, n) for t in terms]
            return _sum_repeated(parts)
        case FamilySum() | FamilySoftmax() | Hold():
            return rebuild(e, tuple(_running(c, n) for c in e.children))
        case Sum():
            return rebuild(e, (_running(e.x, n),))
        case _:
            return e


def looks_ahead(e: Expr, over: sp.Expr) -> Expr | None:
    """A part of e in which a token sees later ones: a sum over tokens that is neither running nor weighed by causal shares, or
    their number. What is in front of terms is not looked at: see `counted`."""
    return next((x for t in terms_of(e) if (x := _ahead(split(t)[1], over)) is not None), None)


def _ahead(e: Expr, over: sp.Expr) -> Expr | None:
    across: list[sp.Expr]
    match e:
        case Prox():  # its term is a definition
            return looks_ahead(e.at, over)
        case Mul(c, _) if c.has(over):
            across = [over]
        case Sum(x, axis) | LogSumExp(x, axis) | Max(x, axis):
            across = [n for n, a in zip(x.shape, (0, 1), strict=True) if axis in (None, a)]
        case Normalise() | Softmax(causal=False):
            across = [e.shape[e.axis]]
        case Inverse() | LogDet() | Trace() | Spectral() | SpectralMap() | SpectralNorm():
            across = list(e.children[0].shape)
        case Mul(_, factors):
            across = [a.cols for a, b in pairwise(factors) if not (_upper(b) or _upper(transpose(a)))]
        case Map(profile, _) if profile.has(over):
            across = [over]
        case _:
            across = []
    if any(same(n, over) for n in across):
        return e
    return next((found for c in e.children if (found := _ahead(c, over)) is not None), None)


def _upper(e: Expr) -> bool:
    """Is entry (i, j) 0 for i > j?"""
    match e:
        case Softmax(axis=0, causal=True):
            return True
        case Map(profile, args):
            return any(_upper(a) and profile.subs(slot(i), 0) == 0 for i, a in enumerate(args))
        case _:
            return False


def _sum_repeated(parts: list[Expr]) -> Expr:
    """The sum of terms, of which some were one value and are a row now."""
    shapes = {p.shape for p in parts}
    return add(*parts) if len(shapes) == 1 else elementwise(sp.Add(*(slot(i) for i in range(len(parts)))), *parts)


def _running_product(c: sp.Expr, factors: tuple[Expr, ...], n: sp.Expr) -> Expr:
    """A @ b with b a column over tokens: the running sum of A * b'.  a @ r with a worked out over tokens, r a row: a * r.
    A @ (w * B) @ C with w a column: A @ (w * (B @ C))."""
    for i, f in enumerate(factors[1:-1], 1):
        if isinstance(f, Map) and not same(f.rows, n) and isinstance(tail := matmul(*factors[i:]), Map):
            return _counted(c, matmul(*factors[:i], _running(tail, n)), n)
    parts = [_running(f, n) for f in factors]
    if len(factors) >= 2 and same(factors[-1].rows, n) and factors[-1].cols == 1 and same(factors[-2].cols, n):
        weighed = operator("running_sum", elementwise(slot(0) * slot(1), parts[-2], transpose(parts[-1])))
        return _counted(c, _joined(factors[0].rows, *parts[:-2], weighed), n)
    if len(factors) > 1 and factors[-1].rows == 1 and same((front := _running(matmul(*factors[:-1]), n)).cols, n):
        return _counted(c, elementwise(slot(0) * slot(1), front, parts[-1]), n)
    return _counted(c, matmul(*parts), n)


def _neumann_limit(rho: float, order: Any) -> float:
    """What is left out is (I + R)⁻¹ (−R)^(order+1), R = M/a."""
    return rho ** (int(order) + 1) if rho < 1 else float("inf")


REWRITES: tuple[Rewrite, ...] = (
    Rewrite("push_through", "(a I + c X Y)⁻¹ X; log det(a I + c X Y)", "X (a I + c Y X)⁻¹; log det(a I + c Y X) + (n − p) log a", "exact", "", "", "Woodbury 1950; Henderson & Searle 1981, doi:10.1137/1023004", push_through, (Argument("to", "number"),)),
    Rewrite("woodbury", "(a I + c U Uᵀ)⁻¹ with U declared orthonormal", "(I − c/(a + c) U Uᵀ)/a", "exact", "", "", "Woodbury 1950", woodbury),
    Rewrite("expand", "A (B + C)", "A B + A C", "exact", "", "", "distributive law", expanded),
    Rewrite("shares", "softmax_k(a + b_k); Σ_k softmax_k(b_k) * A", "softmax_k(b_k); A", "exact", "", "", "shares add up to 1, and do not change with what all have in common", shares),
    Rewrite(
        "circulant_to_fft", "f(X) Y; log det f(X), with f(X) sums, products and inverses of shifts(X)", "ifft f(X̂_w) Ŷ_w; Σ_w log det f(X̂_w)",
        "exact", "", "", "Davis 1979, Circulant Matrices; Chan et al. 2022, ReduNet, arXiv:2105.10446", circulant_to_fft,
    ),
    Rewrite("collect", "A X + B X", "(A + B) X", "exact", "", "", "distributive law", collected, (Argument("on", "symbol", optional=False),)),
    Rewrite(
        "neumann", "(a I + M)⁻¹", "(I − M/a + … ± (M/a)^order)/a", "bounded", "‖M/a‖ < 1", "of the inverse, relative: at most rho^(order+1), rho = ‖M/a‖",
        "Neumann series; Yu et al. 2023, arXiv:2306.01129", neumann, (Argument("order", "count", sp.Integer(1)),), limit=_neumann_limit,
    ),
    Rewrite(
        "tight_frame", "Σ_k A U_k U_kᵀ B", "A B", "bounded", "Σ U_k U_kᵀ = I", "at most ‖A‖ ‖Σ U_k U_kᵀ − I‖ ‖B‖",
        "Yu et al. 2023, arXiv:2306.01129", tight_frame, (Argument("of", "symbol", optional=False),),
    ),
    Rewrite(
        "incoherent", "Dᵀ D", "I", "bounded", "Dᵀ D = I", "‖Dᵀ D − I‖",
        "Yu et al. 2023, arXiv:2306.01129", incoherent, (Argument("of", "symbol", optional=False),),
    ),
    Rewrite(
        "spectral_bound", "log det(a I + c M)", "n log a + Σ_i log(1 + c/a (Qᵀ M Q)_ii)", "bounded", "Q orthogonal", "an upper bound, equal where Q diagonalises M",
        "Wu et al. 2025, Token Statistics Transformer, arXiv:2412.17810", spectral_bound, (Argument("by", "symbol", optional=False),), "objective",
    ),
    Rewrite(
        "gram_to_softmax", "V Vᵀ V", "V softmax(scale Vᵀ V), down the columns", "heuristic", "", "no bound is known",
        "Yu et al. 2023, arXiv:2306.01129", gram_to_softmax, (Argument("scale", "number", ONE), Argument("causal", "flag", False)),
    ),
    Rewrite(
        "causal", "sums over tokens", "running sums: a token sees those up to it", "heuristic", "", "each token follows the step of the sequence up to it; of a sum within a sum, that up to the inner token",
        "Wu et al. 2025, Token Statistics Transformer, arXiv:2412.17810", causal_tokens, (Argument("over", "number", optional=False),), left=looks_ahead, rest=counted,
    ),
)  # fmt: skip
BY_NAME = {r.name: r for r in REWRITES}


def assumption(call: Call) -> Expr | None:
    """The number that the assumption of a rewrite is about, where it does not depend on a place in a formula."""
    of = call.values.get("of")
    if call.rewrite.name == "incoherent" and isinstance(of, Sym):
        return incoherence(of)
    return None


def common_factor(coefs: list[sp.Expr]) -> sp.Expr:
    """What all coefficients share; with the sign of the first."""
    return coefs[0].as_coeff_Mul()[0] * common_powers(coefs)
