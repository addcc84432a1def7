"""Split a scalar profile where it switches: breakpoints in order, one smooth branch between two of them."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportAssignmentType=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import sympy as sp
from sympy.core.relational import Relational

from unroll.calculus.factored import factored
from unroll.calculus.signs import Signs, Undecided
from unroll.errors import DeriveError

SWITCHES = (sp.Abs, sp.Max, sp.Min, sp.sign, sp.Piecewise)
MAX_VARIANTS = 64


@dataclass(frozen=True)
class Piece:
    """f on the open interval (lo, hi); ends may be ±oo or symbolic."""

    lo: sp.Expr
    hi: sp.Expr
    f: sp.Expr


@dataclass(frozen=True)
class Profile:
    """A scalar function in pieces that touch: f = pieces[i].f on each, `at[b]` at a breakpoint or closed end b."""

    u: sp.Symbol
    pieces: tuple[Piece, ...]
    at: tuple[tuple[sp.Expr, sp.Expr], ...]

    @property
    def lo(self) -> sp.Expr:
        return self.pieces[0].lo

    @property
    def hi(self) -> sp.Expr:
        return self.pieces[-1].hi

    @property
    def inner(self) -> tuple[sp.Expr, ...]:
        """Breakpoints strictly inside the domain."""
        return tuple(p.lo for p in self.pieces[1:])


def split(f: sp.Expr, u: sp.Symbol, domain: tuple[sp.Expr, sp.Expr], signs: Signs) -> Profile:
    """f on a domain, in smooth pieces.  Raises DeriveError E302 where they are not one interval."""
    inside = [b for b in _real(switch_points(f, u, signs), signs) if _within(b, domain, signs)]
    knots = [domain[0], *signs.ordered(inside), domain[1]]
    found = [(lo, hi, resolve(f, u, midpoint(lo, hi), signs)) for lo, hi in pairwise(knots)]
    keep = [i for i, piece in enumerate(found) if piece[2] is not None]
    if not keep or keep != list(range(keep[0], keep[-1] + 1)):
        raise DeriveError(
            "E302", f"{f} is not real on one interval of its domain", hint="declare the interval it lives on"
        )
    pieces = tuple(Piece(lo, hi, g) for lo, hi, g in found if g is not None)
    return _merged(Profile(u, pieces, _knot_values(f, u, pieces, signs)))


def switch_points(f: sp.Expr, u: sp.Symbol, signs: Signs) -> set[sp.Expr]:
    """Where an argument of |.|, max, min, sign, cases, log or a fractional power changes sign."""
    out: set[sp.Expr] = set()
    for node in sp.preorder_traversal(f):
        for argument in _switching(node):
            for smooth in variants(argument, u):
                out |= set(roots_of(smooth, u, signs))
    return out


def _switching(node: sp.Basic) -> list[sp.Expr]:
    match node:
        case sp.Abs() | sp.sign() | sp.log():
            return [node.args[0]]
        case sp.Max() | sp.Min():
            return [a - b for a, b in combinations(node.args, 2)]
        case sp.Piecewise():
            relations = [r for _, c in node.args for r in c.atoms(Relational)]
            return [r.lhs - r.rhs for r in relations]
        case sp.Pow() if not (node.exp.is_integer and node.exp.is_nonnegative):
            return [node.base]
        case _:
            return []


def variants(e: sp.Expr, u: sp.Symbol) -> set[sp.Expr]:
    """The smooth expressions that e is equal to, over all ways in which its switches may fall."""
    todo, out = {e}, set[sp.Expr]()
    while todo:
        e = todo.pop()
        inner = next((n for n in sp.postorder_traversal(e) if isinstance(n, SWITCHES) and n.has(u)), None)
        if inner is None:
            out.add(e)
        else:
            todo |= {e.xreplace({inner: b}) for b in _branches(inner)}
        if len(todo) + len(out) > MAX_VARIANTS:
            raise DeriveError("E302", f"{e} nests too many switches", hint="write it as a sum of simpler terms")
    return out


def _branches(node: sp.Basic) -> list[sp.Expr]:
    match node:
        case sp.Abs():
            return [node.args[0], -node.args[0]]
        case sp.sign():
            return [sp.S.One, sp.S.NegativeOne]
        case sp.Piecewise():
            return [value for value, _ in node.args]
        case _:
            return list(node.args)


def resolve(f: sp.Expr, u: sp.Symbol, at: sp.Expr, signs: Signs) -> sp.Expr | None:
    """The branch of f that holds at u = at, in u; None where f is not real there."""
    if f == u or not f.has(u):
        return f
    if isinstance(f, sp.Piecewise):
        return next((resolve(g, u, at, signs) for g, c in f.args if _holds(c, u, at, signs)), None)
    args = [resolve(a, u, at, signs) for a in f.args]
    if any(a is None for a in args):
        return None
    match f:
        case sp.Abs() | sp.sign():
            s = signs.of(args[0].subs(u, at))
            return s * args[0] if isinstance(f, sp.Abs) else sp.Integer(s)
        case sp.Max() | sp.Min():
            toward = 1 if isinstance(f, sp.Max) else -1
            best = args[0]
            for a in args[1:]:
                best = a if signs.of((a - best).subs(u, at)) * toward > 0 else best
            return best
        case sp.log() if signs.of(args[0].subs(u, at)) < 0:
            return None
        case sp.Pow() if not args[1].is_integer and signs.of(args[0].subs(u, at)) < 0:
            return None
        case _:
            return f.func(*args)


def _holds(condition: sp.Basic, u: sp.Symbol, at: sp.Expr, signs: Signs) -> bool:
    """Whether a condition of a case holds at u = at."""
    match condition:
        case sp.logic.boolalg.BooleanTrue() | sp.logic.boolalg.BooleanFalse():
            return bool(condition)
        case sp.And():
            return all(_holds(c, u, at, signs) for c in condition.args)
        case sp.Or():
            return any(_holds(c, u, at, signs) for c in condition.args)
        case sp.Not():
            return not _holds(condition.args[0], u, at, signs)
        case Relational():
            gap = resolve(condition.lhs - condition.rhs, u, at, signs)
            return gap is not None and bool(condition.func(signs.of(gap.subs(u, at)), 0))
        case _:
            raise DeriveError("E302", f"the case {condition} is not a comparison")


def midpoint(lo: sp.Expr, hi: sp.Expr) -> sp.Expr:
    """A point strictly between two ends."""
    if lo == -sp.oo and hi == sp.oo:
        return sp.S.Zero
    if lo == -sp.oo:
        return hi - 1
    return lo + 1 if hi == sp.oo else (lo + hi) / 2


def limit(e: sp.Expr, u: sp.Symbol, to: sp.Expr, side: str) -> sp.Expr:
    """e at `to` from the side '+' or '-'.  Raises DeriveError where SymPy finds no limit."""
    if to.is_finite is not False and not to.is_infinite:
        value = e.subs(u, to)
        if not value.has(sp.nan, sp.zoo, sp.oo):
            return value
    try:
        value = sp.limit(e, u, to, side)
    except NotImplementedError as e_:
        raise DeriveError(
            "E302",
            f"no limit of {e} was found at {u} = {to}: {e_}",
            hint="a number in the place of a symbolic power may help",
        ) from None
    if value.has(sp.Limit, sp.nan, sp.zoo, sp.AccumBounds) or value.has(u):
        raise DeriveError("E302", f"no limit of {e} was found at {u} = {to}")
    return value


def roots_of(e: sp.Expr, u: sp.Symbol, signs: Signs) -> tuple[sp.Expr, ...]:
    """Real zeros (and poles) of a smooth expression in u.  Raises DeriveError E302 where they are out of reach."""
    if not signs.afford(e):
        raise DeriveError(
            "E302",
            f"the zeros of an expression in {u} are not sought: it has {sp.count_ops(e)} operations",
            hint="write the term as a sum of simpler ones",
        )
    top, bottom = sp.fraction(sp.together(e))
    out: list[sp.Expr] = []
    for factor in sp.Mul.make_args(factored(top)) + sp.Mul.make_args(factored(bottom)):
        base = factor.base if isinstance(factor, sp.Pow) and not factor.exp.has(u) else factor
        if base.has(u):
            out += _zeros(base, u, signs)
    return tuple(dict.fromkeys(out))


def _zeros(e: sp.Expr, u: sp.Symbol, signs: Signs) -> list[sp.Expr]:
    if e.is_positive or e.is_negative:
        return []
    if e.is_polynomial(u):
        return _polynomial_zeros(sp.Poly(e, u), signs)
    rate = _exponential_rate(e, u)
    if rate is not None:
        y = sp.Symbol("y", positive=True)
        swapped = sp.expand(e.rewrite(sp.exp), power_exp=True)
        swapped = sp.powsimp(
            swapped.replace(
                lambda n: isinstance(n, sp.exp) and n.has(u),
                lambda n: y ** (sp.expand(n.exp).coeff(u) / rate) * sp.exp(sp.expand(n.exp).subs(u, 0)),
            )
        )
        if not swapped.has(u):
            return [sp.log(r) / rate for r in roots_of(swapped, y, signs) if _positive(r, signs)]
    return _invert(e, u, signs)


def _exponential_rate(e: sp.Expr, u: sp.Symbol) -> sp.Expr | None:
    """k where e is a rational function of exp(k u); None otherwise."""
    exponents = {sp.expand(n.exp) for n in e.rewrite(sp.exp).atoms(sp.exp) if n.has(u)}
    rates = {x.coeff(u) for x in exponents}
    if not rates or any(r.has(u) for r in rates) or any((x - x.coeff(u) * u).expand().has(u) for x in exponents):
        return None
    base = next(iter(sorted(rates, key=sp.default_sort_key)))
    ratios = [sp.cancel(r / base) for r in rates]
    if not all(r.is_Rational for r in ratios):
        return None
    return (
        sp.Abs(base / sp.ilcm(1, *[r.q for r in ratios]))
        if base.is_number
        else base / sp.ilcm(1, *[r.q for r in ratios])
    )


def _polynomial_zeros(poly: sp.Poly, signs: Signs) -> list[sp.Expr]:
    if poly.degree() == 1:
        a, b = poly.all_coeffs()
        return [sp.cancel(-b / a)]
    if poly.degree() == 2:
        a, b, c = poly.all_coeffs()
        gap = factored(b**2 - 4 * a * c)
        if signs.of(gap) < 0:
            return []
        return [(-b - sp.sqrt(gap)) / (2 * a), (-b + sp.sqrt(gap)) / (2 * a)]
    if not poly.free_symbols_in_domain:
        try:
            roots = [root for root, _ in poly.real_roots(multiple=False)]
        except NotImplementedError:  # coefficients such as exp(1/3): SymPy does not sort their roots
            raise DeriveError("E302", f"the zeros of {poly.as_expr()} are out of reach") from None
        return [sp.nsimplify(r) if r.is_Rational else r.evalf(30) for r in roots]
    even = all(p % 2 == 0 for (p,) in poly.monoms())
    if even and poly.degree() == 4:
        y = sp.Symbol("y", positive=True)
        half = _polynomial_zeros(sp.Poly([poly.coeff_monomial(poly.gen**k) for k in (4, 2, 0)], y), signs)
        return [s * sp.sqrt(r) for r in half if _positive(r, signs) for s in (-1, 1)]
    raise DeriveError("E302", f"the zeros of {poly.as_expr()} are out of reach")


def _invert(e: sp.Expr, u: sp.Symbol, signs: Signs) -> list[sp.Expr]:
    """Peel e = 0 down to u = value, where u occurs once.  A value that is not real means: no zero."""
    right = sp.S.Zero
    while e != u:
        moving = [a for a in e.args if a.has(u)]
        if len(moving) != 1:
            raise DeriveError("E302", f"{e} = {right} has no closed solution in {u}")
        match e:
            case sp.Add():
                e, right = moving[0], right - (e - moving[0])
            case sp.Mul():
                e, right = moving[0], right / (e / moving[0])
            case sp.Pow() if e.base == moving[0] and not e.exp.has(u):
                if right == 0:
                    e, right = e.base, right
                elif not _positive(right, signs):
                    return []
                else:
                    e, right = e.base, sp.powdenest(right ** (1 / e.exp), force=True)
            case sp.exp():
                if not _positive(right, signs):
                    return []
                e, right = e.exp, sp.log(right)
            case sp.log():
                e, right = e.args[0], sp.exp(right)
            case _:
                raise DeriveError("E302", f"{e} = {right} has no closed solution in {u}")
    return [right]


def _positive(e: sp.Expr, signs: Signs) -> bool:
    return e.is_real is not False and signs.of(e) > 0


def _real(points: Iterable[sp.Expr], signs: Signs) -> list[sp.Expr]:
    """Points that are real and finite at every draw of the scalars; dropped if at none."""
    out: list[sp.Expr] = []
    for point in sorted(points, key=sp.default_sort_key):
        real = [abs(x.imag) <= 1e-9 * (1 + abs(x)) for x in signs.values(point)]
        if any(real) and not all(real):
            raise Undecided(point)
        if all(real) and point.is_finite is not False:
            out.append(point)
    return out


def _within(point: sp.Expr, domain: tuple[sp.Expr, sp.Expr], signs: Signs) -> bool:
    lo, hi = domain
    return (lo == -sp.oo or signs.of(point - lo) > 0) and (hi == sp.oo or signs.of(hi - point) > 0)


def _knot_values(
    f: sp.Expr, u: sp.Symbol, pieces: tuple[Piece, ...], signs: Signs
) -> tuple[tuple[sp.Expr, sp.Expr], ...]:
    """(b, f(b)) at every finite end; by the limit from inside where the formula itself has no value."""
    out: list[tuple[sp.Expr, sp.Expr]] = []
    for point, piece, side in [(p.lo, p, "+") for p in pieces] + [(pieces[-1].hi, pieces[-1], "-")]:
        if point.is_infinite:
            continue
        branch = resolve(f, u, point, signs)
        value = sp.nan if branch is None else branch.subs(u, point)
        out.append((point, limit(piece.f, u, point, side) if value.has(sp.nan, sp.zoo, sp.oo, sp.I) else value))
    return tuple(out)


def _merged(profile: Profile) -> Profile:
    """Drop breakpoints at which nothing happens: the same branch on both sides, and the value of that branch."""
    at = dict(profile.at)
    pieces = [profile.pieces[0]]
    for piece in profile.pieces[1:]:
        before = pieces[-1]
        same = sp.expand(before.f - piece.f) == 0
        smooth = same and not piece.f.subs(profile.u, piece.lo).has(sp.nan, sp.zoo, sp.oo)
        if smooth and sp.simplify(piece.f.subs(profile.u, piece.lo) - at[piece.lo]) == 0:
            at.pop(piece.lo)
            pieces[-1] = replace(before, hi=piece.hi)
        else:
            pieces.append(piece)
    return replace(profile, pieces=tuple(pieces), at=tuple(at.items()))
