"""Scalar formulas -> the same in forms that neither overflow, nor cancel, nor meet 0 * inf.

One rule for sums of exponentials: whatever is written with them is read as c e^b S1^p1 S2^p2 ..., each S a sum of exponentials,
and written back with the largest term of every S pulled out. A sum of positive terms is 1 + e^D after one term is taken out, D the log
of the rest: its log is softplus(D), its inverse sigmoid(-D). One whose terms have other signs is P - N = tanh((log P - log N)/2) (P + N).
"""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from itertools import permutations, product

import sympy as sp
from mpmath.libmp import prec_to_dps


class Primitive(sp.Function):
    """A function with a stable operation of its own; of numbers it has the value of its textbook form."""

    def textbook(self) -> sp.Expr:
        raise NotImplementedError

    def _eval_evalf(self, prec: int) -> sp.Expr:
        return self.textbook().evalf(prec_to_dps(prec))


class sigmoid(Primitive):
    """1 / (1 + e^{−x})."""

    nargs = (1,)

    def textbook(self) -> sp.Expr:
        return 1 / (1 + sp.exp(-self.args[0]))

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return self * sigmoid(-self.args[0])

    def _eval_is_positive(self) -> bool | None:
        return self.args[0].is_extended_real


class softplus(Primitive):
    """log(1 + e^x)."""

    nargs = (1,)

    def textbook(self) -> sp.Expr:
        return sp.log(1 + sp.exp(self.args[0]))

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sigmoid(self.args[0])

    def _eval_is_positive(self) -> bool | None:
        return self.args[0].is_extended_real


class logaddexp(Primitive):
    """log(e^x + e^y)."""

    nargs = (2,)

    def textbook(self) -> sp.Expr:
        return sp.log(sum(map(sp.exp, self.args)))

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        x, y = self.args if argindex == 1 else self.args[::-1]
        return sigmoid(x - y)

    def _eval_is_extended_real(self) -> bool | None:
        return all(a.is_extended_real for a in self.args) or None


class xlogy(Primitive):
    """x log y, 0 where x is 0."""

    nargs = (2,)

    @classmethod
    def eval(cls, x: sp.Expr, y: sp.Expr) -> sp.Expr | None:
        return sp.S.Zero if x.is_zero else None

    def textbook(self) -> sp.Expr:
        return self.args[0] * sp.log(self.args[1])

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        x, y = self.args
        return sp.log(y) if argindex == 1 else x / y


class entr(Primitive):
    """−x log x, 0 where x is 0."""

    nargs = (1,)

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        return sp.S.Zero if x.is_zero else None

    def textbook(self) -> sp.Expr:
        return -self.args[0] * sp.log(self.args[0])

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return -sp.log(self.args[0]) - 1


class expm1(Primitive):
    """e^x − 1."""

    nargs = (1,)

    def textbook(self) -> sp.Expr:
        return sp.exp(self.args[0]) - 1

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sp.exp(self.args[0])

    def _eval_is_extended_real(self) -> bool | None:
        return self.args[0].is_extended_real

    def _eval_is_nonnegative(self) -> bool | None:
        return self.args[0].is_nonnegative

    def _eval_is_nonpositive(self) -> bool | None:
        return self.args[0].is_nonpositive


class log1p(Primitive):
    """log(1 + x)."""

    nargs = (1,)

    def textbook(self) -> sp.Expr:
        return sp.log(1 + self.args[0])

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return 1 / (1 + self.args[0])

    def _eval_is_nonnegative(self) -> bool | None:
        return self.args[0].is_nonnegative


class logcosh(Primitive):
    """log((e^x + e^−x)/2)."""

    nargs = (1,)

    def textbook(self) -> sp.Expr:
        return sp.log(sp.cosh(self.args[0]))

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sp.tanh(self.args[0])

    def _eval_is_nonnegative(self) -> bool | None:
        return self.args[0].is_extended_real


GROWING = (sp.exp, sp.cosh, sp.sinh)
WIDEST = 24
"""Terms of the longest sum that is written out."""
Sum = tuple[tuple[sp.Expr, sp.Expr], ...]
"""((d, r), ...): the sum of r e^d, the first d 0."""


def vanishing(log: sp.log) -> list[sp.log]:
    """The logs of what can be 0 within a log, which may have none: that of a sigmoid is finite."""
    return [t for t in stable(log).atoms(sp.log) if not t.args[0].is_positive]


@cache
def stable(e: sp.Expr) -> sp.Expr:
    """The same values, finite wherever they can be, and so for its derivatives."""
    match e:
        case _ if not e.free_symbols:
            return e
        case sp.Add() if (apart := _difference(e)) is not None:
            return stable(apart)
        case _ if not e.has(*GROWING, sp.log, sp.tanh):
            return _rebuilt(e) if any(isinstance(a, sp.Add) for a in sp.preorder_traversal(e)) else e
        case sp.log():
            return _log(e.args[0])
        case sp.Add():
            whole = _read(e)
            single = whole.sums and all(p.is_negative for p in whole.sums.values())
            return _write(whole) if single else _centred(sp.Add(*map(stable, e.args)))
        case sp.Mul() if sum(isinstance(f, sp.log) for f in e.args) == 1:
            return _times_log(e)
        case sp.Mul() | sp.Pow() if not isinstance(e, sp.exp):
            whole = _read(e)
            over = any(
                p.exp.is_negative and p.base.has(*GROWING, sp.tanh)
                for p in e.atoms(sp.Pow)
                if not isinstance(p, sp.exp)
            )
            whole = _read(_spelled(e)) if over and e.has(sp.tanh) else whole
            meets = whole.exponent != 0 and whole.sums and all(_signs(s) == 1 for s in whole.sums)
            several = sum(isinstance(f.as_base_exp()[0], sp.exp) or isinstance(f, sp.exp) for f in e.args) > 1
            return _write(whole) if over or meets or several else _rebuilt(e)
        case _:
            return _rebuilt(e)


def _rebuilt(e: sp.Basic) -> sp.Expr:
    """Its parts in their stable forms, those of cases and conditions too."""
    return e.func(*(stable(a) if isinstance(a, sp.Expr) else _rebuilt(a) for a in e.args)) if e.args else e


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """coef e^exponent times sums of exponentials to their powers."""

    coef: sp.Expr
    exponent: sp.Expr
    sums: Mapping[Sum, sp.Expr]

    @property
    def plain(self) -> bool:
        return self.exponent == 0 and not self.sums


def _read(e: sp.Expr) -> Product:
    match e:
        case sp.exp():
            return Product(sp.S.One, sp.expand(stable(e.args[0])), {})
        case sp.Mul():
            return _times(map(_read, e.args))
        case sp.Pow() if e.exp.is_Rational:
            base = _read(e.base)
            if not base.plain and (
                e.exp.is_Integer or (base.coef.is_positive and all(_signs(s) == 1 for s in base.sums))
            ):
                return _to(base, e.exp)
            return Product(_rebuilt(e), sp.S.Zero, {})
        case sp.cosh() | sp.sinh():
            u, half = stable(e.args[0]), sp.Rational(1, 2)
            return _sum({sp.expand(u): half, sp.expand(-u): half if isinstance(e, sp.cosh) else -half})
        case sp.Add():
            return _added(e)
        case _:
            return Product(stable(e), sp.S.Zero, {})


def _times(parts: Iterable[Product]) -> Product:
    coef, exponent, sums = sp.S.One, sp.S.Zero, dict[Sum, sp.Expr]()
    for x in parts:
        coef, exponent = coef * x.coef, exponent + x.exponent
        for s, p in x.sums.items():
            sums[s] = sums.get(s, sp.S.Zero) + p
    return Product(coef, sp.expand(exponent), {s: p for s, p in sums.items() if p != 0})


def _to(x: Product, p: sp.Expr) -> Product:
    return Product(x.coef**p, sp.expand(x.exponent * p), {s: q * p for s, q in x.sums.items()})


def _added(e: sp.Add) -> Product:
    """A sum over the common denominator of its terms."""
    terms = [_read(t) for t in e.args]
    opaque = Product(sp.Add(*map(stable, e.args)), sp.S.Zero, {})
    under: dict[Sum, sp.Expr] = {}
    for t in terms:
        for s, p in t.sums.items():
            if not p.is_Integer:
                return opaque
            under[s] = min(under.get(s, sp.S.Zero), p)
    if all(t.plain for t in terms):
        return opaque
    found: dict[sp.Expr, sp.Expr] = {}
    for t in terms:
        over = [s for s in {*under, *t.sums} for _ in range(int(t.sums.get(s, 0) - under.get(s, 0)))]
        if len(over) > 4 or len(list(product(*over))) > WIDEST:
            return opaque
        for picked in product(*over):
            a = sp.expand(t.exponent + sp.Add(*(d for d, _ in picked)))
            found[a] = found.get(a, sp.S.Zero) + sp.Mul(t.coef, *(r for _, r in picked))
    found = {a: c for a, m in found.items() if (c := sp.expand(m) if m.is_Add else m) != 0}
    if not found or len(found) > WIDEST:
        return opaque
    return _times([_sum(found), Product(sp.S.One, sp.S.Zero, {s: p for s, p in under.items() if p != 0})])


def _sum(terms: Mapping[sp.Expr, sp.Expr]) -> Product:
    """The sum of r e^a, one spelling of all that differ by a factor."""
    if len(terms) == 1:
        ((a, r),) = terms.items()
        return Product(r, a, {})
    spellings = [
        sorted(((sp.expand(a - first), a) for a in terms), key=lambda x: (x[0] != 0, _order(x[0]))) for first in terms
    ]
    best = min(spellings, key=lambda s: [_order(d) for d, _ in s])
    first = best[0][1]
    lead = terms[first] if terms[first].is_number or terms[first].is_positive else sp.S.One
    return Product(lead, first, {tuple((d, terms[a] / lead) for d, a in best): sp.S.One})


def _order(d: sp.Expr) -> tuple[bool, str]:
    return bool(d.could_extract_minus_sign()), str(d)


# --- writing ----------------------------------------------------------------------------------------------------------


def _signs(s: Sum) -> int:
    """1: all terms are positive; 2: each has a sign, not all the same; 0: unknown."""
    known = [r.is_positive or (False if r.is_negative else None) for _, r in s]
    return 0 if None in known else 1 if all(known) else 2


def _rest(s: Iterable[tuple[sp.Expr, sp.Expr]]) -> sp.Expr:
    """log of the sum of r e^d, r > 0."""
    return reduce(lambda x, y: logaddexp(y, x), [d + sp.log(r) for d, r in reversed(list(s))])


def _log_sum(s: Iterable[tuple[sp.Expr, sp.Expr]]) -> sp.Expr:
    """The same, softplus where a term is 1."""
    terms = list(s)
    one = next((t for t in terms if t[0] == 0 and t[1] == 1), None)
    if one is None or len(terms) == 1:
        return _rest(terms)
    terms.remove(one)
    return softplus(_rest(terms))


def _pulled(s: Sum, p: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """(factor, exponent): s^p = factor e^exponent, the exponent of slow growth and the factor bounded."""
    if _signs(s) == 1:
        return sp.S.One, p * _log_sum(s)
    if _signs(s) == 2:
        up, down = [(d, r) for d, r in s if r.is_positive], [(d, -r) for d, r in s if r.is_negative]
        return sp.tanh(sp.expand(_log_sum(up) - _log_sum(down)) / 2) ** p, p * _log_sum((*up, *down))
    largest = sp.Max(*(d for d, _ in s))
    return sp.Add(*(r * sp.exp(d - largest) for d, r in s)) ** p, p * largest


def _turned(x: Product) -> Product:
    """e^{-p d} (1 + r e^d)^p is (e^{-d} + r)^p: nothing large is left that cancels."""
    for s, p in x.sums.items():
        if len(s) == 2 and x.exponent != 0 and sp.expand(x.exponent + p * s[1][0]) == 0:
            (_, lead), (d, r) = s
            turned = (
                ((sp.S.Zero, sp.S.One), (-d, lead / r))
                if r.is_number or r.is_positive
                else ((sp.S.Zero, r), (-d, lead))
            )
            factor = r**p if turned[0][1] == 1 else sp.S.One
            return Product(x.coef * factor, sp.S.Zero, {**{k: v for k, v in x.sums.items() if k != s}, turned: p})
    return x


def _write(x: Product) -> sp.Expr:
    if all(p.is_Integer and p > 0 for p in x.sums.values()):  # it overflows only where its value does
        over = [s for s, p in x.sums.items() for _ in range(int(p))]
        return x.coef * sp.Add(
            *(sp.Mul(*(r for _, r in t)) * sp.exp(x.exponent + sp.Add(*(d for d, _ in t))) for t in product(*over))
        )
    if (shares := _shares(x)) is not None:
        return shares
    x = _turned(x)
    parts = [_pulled(s, p) for s, p in x.sums.items()]
    return sp.Mul(x.coef, *(f for f, _ in parts), sp.exp(x.exponent + sp.Add(*(a for _, a in parts))))


def _shares(x: Product) -> sp.Expr | None:
    """e^{q d} / (1 + r e^d)^n, and products of such without a numerator, by sigmoids."""
    if any(_signs(s) != 1 or not p.is_Integer or p > 0 for s, p in x.sums.items()):
        return None
    if x.exponent == 0:
        return sp.Mul(x.coef, *(sigmoid(-_rest(s[1:])) ** -p for s, p in x.sums.items()))
    ((s, p), *others) = x.sums.items()
    q = sp.cancel(x.exponent / s[1][0])
    if others or len(s) != 2 or not q.is_number or (0 < q < -p and not q.is_Integer):
        return None
    (_, (d, r)), k = s, sp.Max(0, sp.Min(q, -p))
    inner = d + sp.log(r)
    return x.coef * r**-k * sigmoid(inner) ** k * sigmoid(-inner) ** (-p - k) * sp.exp((q - k) * d)


def _spelled(e: sp.Expr) -> sp.Expr:
    """tanh as the quotient that it is: 1 - tanh^2 is nothing but exponentials."""
    return e.replace(sp.tanh, lambda u: (1 - sp.exp(-2 * u)) / (1 + sp.exp(-2 * u)))


def _log(g: sp.Expr) -> sp.Expr:
    whole = _read(_spelled(g))
    terms = [stable(t) for t in g.args] if isinstance(g, sp.Add) else []
    bounded = terms and all(t.is_nonnegative and not t.has(*GROWING) for t in terms)
    if whole.plain or bounded:
        rest = sp.Add(*terms) - 1
        return log1p(rest) if bounded and 1 in terms else sp.log(sp.Add(*terms) if terms else stable(g))
    whole = _turned(whole)
    parts = [_pulled(s, p) for s, p in whole.sums.items()]
    return _centred(sp.log(sp.Mul(whole.coef, *(f for f, _ in parts))) + sp.Add(whole.exponent, *(a for _, a in parts)))


# --- what cancels -----------------------------------------------------------------------------------------------------


def _difference(e: sp.Add) -> sp.Expr | None:
    """Two terms that cancel where s vanishes, without the difference: √(c² + s) − c = s/(√(c² + s) + c), and its kin."""
    for t, r in permutations(e.args, 2):
        k, f = _factor(t)
        if f is not None and (close := _close(f, sp.cancel(-r / k))) is not None:
            return sp.Add(k * close, *(a for a in e.args if a not in (t, r)))
    return None


def _factor(t: sp.Expr) -> tuple[sp.Expr, sp.Expr | None]:
    """(k, f): t = k f, f of a kind that `_close` knows."""
    for f in sp.Mul.make_args(t):
        power = isinstance(f, sp.Pow) and not isinstance(f, sp.exp) and f.exp in CLOSE and f.base.is_Add
        if f.free_symbols and (power or isinstance(f, sp.exp | sp.cosh | sp.cos)):
            return t / f, f
    return sp.S.One, None


CLOSE = (sp.Rational(1, 2), sp.Rational(-1, 2), sp.S.NegativeOne)


def _close(f: sp.Expr, c: sp.Expr) -> sp.Expr | None:
    """f − c where c > 0 is what f is at the point where they cancel; None where nothing cancels."""
    match f:
        case sp.exp() | sp.cosh() | sp.cos():
            s = f.args[0]
            if c != 1:
                return None
            return expm1(s) if isinstance(f, sp.exp) else 2 * sp.sinh(s / 2) ** 2 if isinstance(f, sp.cosh) else -2 * sp.sin(s / 2) ** 2  # fmt: skip
        case _:
            base, p = f.as_base_exp()
            if not c.is_positive:
                return None
            s = sp.expand(base - c ** (1 / p))
            if len(sp.Add.make_args(s)) >= len(base.args):
                return None
            if p == sp.S.NegativeOne:
                return -c * s / base
            root = sp.sqrt(base)
            return s / (root + c) if p.is_positive else -c * s / (root * (root + 1 / c))


def _centred(e: sp.Expr) -> sp.Expr:
    """log(1 + e^d) − d/2, even in d → log 2 + log cosh(d/2)."""
    for t in sp.Add.make_args(e):
        k, f = t.as_coeff_Mul()
        if isinstance(f, softplus):
            half = k * f.args[0] / 2
            rest = sp.expand(e - t + half)
            if len(sp.Add.make_args(rest)) < len(sp.Add.make_args(e - t)) or not rest.free_symbols:
                return k * logcosh(f.args[0] / 2) + rest + k * sp.log(2)
    return e


# --- zero times log of zero -------------------------------------------------------------------------------------------


def _times_log(e: sp.Mul) -> sp.Expr:
    """m log g, 0 where m is 0 whatever the log: x log x and x log(x/y) too."""
    log = next(f for f in e.args if isinstance(f, sp.log))
    m, terms = stable(e / log), [t.as_coeff_Mul() for t in sp.Add.make_args(stable(log))]
    if m.is_number or m.is_positive:
        return m * stable(log)
    ends = [t for t in terms if isinstance(t[1], sp.log) and not t[1].args[0].is_positive]
    rest = sp.Add(*(c * x for c, x in terms if (c, x) not in ends))
    return sp.Add(m * rest, *(c * _with_zero(m, x.args[0]) for c, x in ends))


def _with_zero(m: sp.Expr, g: sp.Expr) -> sp.Expr:
    c, rest = g.as_coeff_Mul()
    powers = [f.as_base_exp() for f in sp.Mul.make_args(rest)]
    signed = [p for b, p in powers if not (p.is_even or b.is_nonnegative)]
    joined = sum(bool(p.is_positive) for p in signed) > 1  # log(a b) is not log a + log b where both are negative
    turned = c < 0 and not (len(signed) == 1 and signed[0].is_odd)
    if not any(_carries(m, b) for b, _ in powers) or joined or turned:  # a/b is that of kl: neither is negative
        return xlogy(m, g)
    terms = [p * _with_power(m, b, p, -1 if c < 0 and p is signed[0] else 1) for b, p in powers]
    return m * sp.log(abs(c)) + sp.Add(*terms)


def _with_power(m: sp.Expr, b: sp.Expr, p: sp.Expr, sign: int) -> sp.Expr:
    """m log(sign b), where the log of b^p was meant: that of |b| where p is even."""
    if b.is_positive:
        return m * sp.log(b)
    return xlogy(m, sp.Abs(b)) if p.is_even and not b.is_nonnegative else _of_zero(m, b, sign)


def _carries(m: sp.Expr, b: sp.Expr) -> bool:
    """Is b a factor of m?"""
    return not b.is_number and any(f.as_base_exp()[0] == b for f in sp.Mul.make_args(m))


def _of_zero(m: sp.Expr, b: sp.Expr, sign: int) -> sp.Expr:
    rest = sign * m / b
    return -rest * entr(sign * b) if not rest.has(b) else xlogy(m, sign * b)
