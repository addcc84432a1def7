"""SymPy scalar formulas -> torch source text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import sympy as sp
from sympy.logic.boolalg import Boolean

from unroll.calculus.stable import entr, expm1, log1p, logaddexp, logcosh, sigmoid, softplus, xlogy
from unroll.calculus.torch_text import above_zero, as_fraction, decimal, log_of_mass, nonzero, power, reciprocal
from unroll.errors import DeriveError

COMPARE, SUM, PRODUCT, UNARY, POWER, POSTFIX = range(6)
"""How tightly Python binds a text; a looser one is put in brackets."""


@dataclass(frozen=True)
class Text:
    """A Python expression. tensor: False for one whose value is a plain number."""

    code: str
    level: int = POSTFIX
    tensor: bool = True

    def at(self, level: int) -> str:
        """The text as an operand of something that binds at `level`."""
        return self.code if self.level >= level else f"({self.code})"

    def then(self, suffix: str) -> Text:
        """Attribute, call or index: `x.mT`, `x[..., None]`."""
        return Text(self.at(POSTFIX) + suffix, POSTFIX, self.tensor)


def formula(e: sp.Expr, names: Mapping[sp.Symbol, Text]) -> Text:
    """Torch text of a SymPy formula, its symbols replaced by `names`. Raises DeriveError E401: no torch form."""
    return _text(cast(Any, e).replace(softplus, lambda u: -cast(Any, logsigmoid)(-u)), names)


class logsigmoid(sp.Function):
    """log(1 / (1 + e^{-x})): torch's softplus is only right to 2e-9."""


class where_taken(sp.Function):
    """x where a case is taken, 1 elsewhere."""

    nargs = (2,)

    def _eval_is_extended_real(self) -> bool | None:
        return cast(sp.Expr, self.args[0]).is_extended_real

    def _eval_is_nonnegative(self) -> bool | None:
        return cast(sp.Expr, self.args[0]).is_nonnegative


# --- text -------------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[type[Any], tuple[str, str]] = {
    sp.exp: ("torch.exp", "math.exp"),
    sp.log: ("torch.log", "math.log"),
    sp.sin: ("torch.sin", "math.sin"),
    sp.cos: ("torch.cos", "math.cos"),
    sp.tan: ("torch.tan", "math.tan"),
    sp.atan: ("torch.atan", "math.atan"),
    sp.tanh: ("torch.tanh", "math.tanh"),
    sp.sinh: ("torch.sinh", "math.sinh"),
    sp.cosh: ("torch.cosh", "math.cosh"),
    sp.erf: ("torch.erf", "math.erf"),
    expm1: ("expm1", "math.expm1"),
    log1p: ("torch.log1p", "math.log1p"),
    sp.floor: ("torch.floor", "math.floor"),
    sp.ceiling: ("torch.ceil", "math.ceil"),
}
"""SymPy function -> its name for tensors, for plain numbers."""
TEMPLATES: dict[type[Any], tuple[str, str]] = {
    **{f: (f"{tensor}({{}})", f"{plain}({{}})") for f, (tensor, plain) in FUNCTIONS.items()},
    logsigmoid: ("F.logsigmoid({})", "-math.log1p(math.exp(-({})))"),
    sigmoid: ("torch.sigmoid({})", "(1 / (1 + math.exp(-({}))))"),
    nonzero: ("torch.where({0} >= torch.finfo({0}.dtype).tiny, {0}, 1)", "({0} or 1.0)"),
    above_zero: (
        "torch.where({0} >= torch.finfo({0}.dtype).tiny, {0}, torch.finfo({0}.dtype).tiny ** 0.25)",
        "({0} or 1e-9)",
    ),
    log_of_mass: (
        "torch.where({0} > 0, torch.log(torch.where({0} > 0, {0}, 1)), torch.finfo({0}.dtype).min / 4)",
        "(math.log({0}) if {0} > 0 else -16_000.0)",
    ),
}


def _text(e: sp.Basic, names: Mapping[sp.Symbol, Text]) -> Text:
    def go(x: sp.Basic) -> Text:
        return _text(x, names)

    match e:
        case sp.Symbol():
            return names[e]
        case sp.Number() | sp.NumberSymbol() | sp.core.numbers.Infinity() | sp.core.numbers.NegativeInfinity():
            return number(cast(sp.Expr, e))
        case sp.Add():
            return _sum([cast(sp.Expr, a) for a in e.as_ordered_terms()], go)
        case sp.Mul():
            return _product(e, go)
        case sp.Pow():
            return _power(e, go)
        case reciprocal():
            x = go(e.args[0]).code
            return Text(f"torch.where({x} == 0, 0, 1 / torch.where({x} == 0, 1, {x}))")
        case power():
            x, p = cast(tuple[sp.Expr, sp.Expr], e.args)
            base = go(x)
            return Text(f"power({base.code}, {go(p).code})") if base.tensor else _power(cast(sp.Pow, sp.Pow(x, p)), go)
        case sp.Max() | sp.Min():
            return _extreme("max" if isinstance(e, sp.Max) else "min", [go(a) for a in e.args])
        case sp.Abs():
            return _call("abs", go(e.args[0]))
        case sp.sign():
            x = go(e.args[0])
            return (
                x.then(".sign()") if x.tensor else Text(f"math.copysign(1, {x.code}) * ({x.code} != 0)", PRODUCT, False)
            )
        case sp.Heaviside():
            x = go(e.args[0])
            return Text(f"(torch.sign({x.code}) + 1) / 2", PRODUCT)
        case sp.Piecewise():
            return _piecewise(e, go)
        case sp.Rel() | sp.And() | sp.Or() | sp.Not():
            return _condition(e, go)
        case logaddexp() | xlogy():
            x, y = map(go, e.args)
            a, b = cast(tuple[sp.Expr, sp.Expr], e.args)
            if isinstance(e, logaddexp) and not (x.tensor and y.tensor):
                a, b = (b, a) if x.tensor else (a, b)
                return go(a - cast(Any, logsigmoid)(a - b))
            if not (x.tensor or y.tensor):
                return go(a * sp.log(b))
            return Text(f"{'torch.logaddexp' if isinstance(e, logaddexp) else 'xlogy'}({x.code}, {y.code})")
        case logcosh():
            x = go(e.args[0])
            return Text(f"logcosh({x.code})") if x.tensor else go(sp.log(sp.cosh(cast(sp.Expr, e.args[0]))))
        case where_taken():
            x, condition = map(go, e.args)
            return Text(f"torch.where({condition.code}, {x.code}, 1)")
        case entr():
            return Text(f"torch.special.entr({go(e.args[0]).code})")
        case _ if type(e) in TEMPLATES:
            x = go(e.args[0])
            return Text(TEMPLATES[type(e)][0 if x.tensor else 1].format(x.code), POSTFIX, x.tensor)
        case _:
            raise DeriveError("E401", f"no torch form for the function {e.func.__name__} in {e}")


def number(e: sp.Expr) -> Text:
    """A constant as Python text."""
    if e.is_Integer and abs(e) < 2**53:
        return Text(str(e), POSTFIX if e >= 0 else UNARY, False)
    if e in (sp.oo, -sp.oo):
        return Text("math.inf" if e == sp.oo else "-math.inf", POSTFIX if e == sp.oo else UNARY, False)
    if e is sp.pi:
        return Text("math.pi", POSTFIX, False)
    short = decimal(e)
    if isinstance(e, sp.Rational) and len(short) > 10 and as_fraction(e):
        return Text(f"{e.p} / {e.q}", PRODUCT, False)
    return Text(short, POSTFIX if e >= 0 else UNARY, False)


Go = Callable[[sp.Basic], Text]


def _sum(terms: list[sp.Expr], go: Go) -> Text:
    ordered = sorted(terms, key=lambda t: (t.could_extract_minus_sign(), t.is_number))
    parts = [(t.could_extract_minus_sign(), t) for t in ordered]
    first, *rest = parts
    texts = [go(first[1])] + [go(-t if minus else t) for minus, t in rest]
    code = texts[0].at(SUM) + "".join(
        f" {'-' if minus else '+'} {x.at(PRODUCT)}" for (minus, _), x in zip(rest, texts[1:], strict=True)
    )
    return Text(code, SUM, any(x.tensor for x in texts))


def _product(e: sp.Expr, go: Go) -> Text:
    over: list[sp.Expr] = []
    under: list[sp.Expr] = []
    coef, body = e.as_coeff_Mul()
    for f in sp.Mul.make_args(body):
        down = isinstance(f, sp.Pow) and f.exp.is_Rational and f.exp < 0 and f.exp != sp.Rational(-1, 2)
        (under if down else over).append(1 / f if down else f)
    minus = coef.is_negative
    coef = -coef if minus else coef
    if isinstance(coef, sp.Rational) and coef.q != 1 and (coef.p == 1 or len(decimal(coef)) > 10) and as_fraction(coef):
        under.insert(0, sp.Integer(coef.q))
        coef = sp.Integer(coef.p)
    if coef != 1 or not over:
        over.insert(0, coef)
    texts = [go(f) for f in over]
    code = " * ".join([texts[0].at(PRODUCT), *(x.at(UNARY) for x in texts[1:])])
    if under:
        divisors = [go(f) for f in under]
        texts += divisors
        code += " / " + (
            divisors[0].at(UNARY) if len(under) == 1 else f"({' * '.join(x.at(PRODUCT) for x in divisors)})"
        )
    single = len(texts) == 1
    out = Text(code, texts[0].level if single else PRODUCT, any(x.tensor for x in texts))
    return Text(f"-{out.at(PRODUCT)}", UNARY if single else PRODUCT, out.tensor) if minus else out


def _power(e: sp.Pow, go: Go) -> Text:
    base, exponent = go(e.base), e.exp
    if e.base is sp.E:
        x = go(exponent)
        return Text(f"{'torch' if x.tensor else 'math'}.exp({x.code})", POSTFIX, x.tensor)
    half = sp.Rational(1, 2)
    if exponent == half:
        return Text(f"torch.sqrt({base.code})") if base.tensor else Text(f"math.sqrt({base.code})", POSTFIX, False)
    if exponent == -half and base.tensor:
        return Text(f"torch.rsqrt({base.code})")
    if exponent == 2 and base.tensor:
        return base.then(".square()")
    if exponent.is_Rational and exponent < 0:
        return Text(f"1 / {go(1 / e).at(UNARY)}", PRODUCT, base.tensor)
    power = go(exponent)
    if e.base.is_Integer and not exponent.is_number and not power.tensor:  # else an int, which torch takes up to 2**63
        base = Text(f"{base.code}.0", base.level, False)
    return Text(f"{base.at(POSTFIX)} ** {power.at(POWER)}", POWER, base.tensor or power.tensor)


def _extreme(which: str, args: list[Text]) -> Text:
    """Largest or smallest of several; plain numbers become a clamp."""
    tensors, plain = [a for a in args if a.tensor], [a for a in args if not a.tensor]
    bound = plain[0] if len(plain) == 1 else Text(f"{which}({', '.join(a.code for a in plain)})", POSTFIX, False)
    if not tensors:
        return bound
    clamp = ".clamp_min" if which == "max" else ".clamp_max"
    pick = f"torch.{which}imum"
    out = reduce(lambda a, b: Text(f"{pick}({a.code}, {b.code})"), tensors)
    return out.then(f"{clamp}({bound.code})") if plain else out


def _call(name: str, x: Text) -> Text:
    return x.then(f".{name}()") if x.tensor else Text(f"{name}({x.code})", POSTFIX, False)


def _piecewise(e: sp.Basic, go: Go) -> Text:
    cases = [cast(sp.Tuple, c) for c in e.args]
    if cases[-1].args[1] != sp.true:
        raise DeriveError("E401", f"a formula by cases must end in one that always holds: {e}")
    conditions = [cast(Boolean, c.args[1]) for c in cases]
    texts = [go(_guarded(cast(sp.Expr, c.args[0]), conditions[:k], conditions[k], go)) for k, c in enumerate(cases)]
    out = texts[-1]
    for case, value in zip(reversed(cases[:-1]), reversed(texts[:-1]), strict=True):
        condition = go(case.args[1])
        if condition.tensor and not (value.tensor or out.tensor):  # two plain numbers, of the type they are chosen by
            like = next(x.code for x in map(go, sorted(case.args[1].free_symbols, key=_slots_first)) if x.tensor)
            if (value.code, out.code) in (("1", "0"), ("0", "1")):
                yes = case.args[1] if value.code == "1" else sp.Not(case.args[1])
                out = Text(f"({go(yes).code}).to({like})")
            else:
                out = Text(f"torch.where({condition.code}, {value.code}, torch.full_like({like}, {out.code}))")
        elif condition.tensor:
            out = Text(f"torch.where({condition.code}, {value.code}, {out.code})")
        else:
            out = Text(f"({value.code} if {condition.code} else {out.code})", POSTFIX, value.tensor or out.tensor)
    return out


def _guarded(value: sp.Expr, before: list[Boolean], own: Boolean, go: Go) -> sp.Expr:
    """A case with 1 in the place of what it divides by, or takes a root or a log of, where it is not taken: its slope, times 0, is NaN there."""
    taken = sp.And(*(sp.Not(c) for c in before), own)
    if taken == sp.true or not go(taken).tensor:
        return value

    def guarded(x: sp.Expr) -> sp.Expr:
        *first, base = x.args if isinstance(x, xlogy) else x.args[:1]
        if isinstance(base, where_taken) or base.is_positive or not base.free_symbols or not go(base).tensor:
            return x
        return cast(Any, x.func)(*first, cast(Any, where_taken)(base, taken), *x.args[len(first) + 1 :])

    return cast(sp.Expr, value.replace(_is_singular, guarded))


def _is_singular(x: sp.Basic) -> bool:
    """May it have no slope where its argument is 0?"""
    return isinstance(x, sp.log | entr | xlogy) or (
        isinstance(x, sp.Pow) and not (x.exp.is_integer and x.exp.is_nonnegative)
    )


def _slots_first(s: sp.Basic) -> tuple[bool, str]:
    return not str(s).startswith("_"), str(s)


def _condition(e: sp.Basic, go: Go) -> Text:
    if isinstance(e, sp.Rel):
        a, b = go(e.lhs), go(e.rhs)
        op = {"Equality": "==", "Unequality": "!="}.get(type(e).__name__, cast(Any, e).rel_op)
        return Text(f"{a.at(SUM)} {op} {b.at(SUM)}", COMPARE, a.tensor or b.tensor)
    parts = [go(a) for a in e.args]
    tensor = any(p.tensor for p in parts)
    if isinstance(e, sp.Not):
        return Text(f"{'~' if tensor else 'not '}({parts[0].code})", UNARY if tensor else COMPARE, tensor)
    word = ("&" if isinstance(e, sp.And) else "|") if tensor else ("and" if isinstance(e, sp.And) else "or")
    return Text(f" {word} ".join(f"({p.code})" for p in parts), COMPARE, tensor)
