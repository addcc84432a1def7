"""Expr -> text. Three dialects: the language itself (parse(text(e)) is e), Unicode for people, LaTeX for papers."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, cast

import sympy as sp
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from unroll.language.constructors import add, as_constant, scale, split
from unroll.language.nodes import (
    Add,
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
    slot,
)

SUM, PREFIX, PRODUCT, UNARY, POWER, ATOM = range(6)
"""Binding strength of what was printed: a looser part is put in brackets. PREFIX: Σ x y, which takes all factors after it."""


def text(e: Expr | sp.Expr) -> str:
    """In the language of specs; parsing it gives the same object."""
    return _show(e, _TEXT)


def pretty(e: Expr | sp.Expr) -> str:
    """In Unicode, for terminals: ½‖x − A z‖²."""
    return _show(e, _PRETTY)


def latex(e: Expr | sp.Expr) -> str:
    """In LaTeX."""
    return _show(e, _LATEX)


def _show(e: Expr | sp.Expr, d: Dialect) -> str:
    return _node(e, d)[0] if isinstance(e, Expr) else d.scalar(e)


# --- scalars ----------------------------------------------------------------------------------------------------------

LETTERS = "alpha beta gamma delta epsilon zeta eta theta kappa mu nu xi rho sigma tau phi chi psi omega lam lambda eps"
GREEK: dict[str, str] = dict(zip(LETTERS.split(), "αβγδεζηθκμνξρστφχψωλλϵ", strict=True))
COMMANDS = {"lam": "lambda", "epsilon": "varepsilon", "eps": "epsilon"}
"""Letters of another name in LaTeX."""
Shown = tuple[str, int]
"""What was printed, and its strength."""
Names = dict[sp.Symbol, Shown]
"""What stands in the place of symbols."""
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _tight(shown: Shown) -> str:
    return shown[0] if shown[1] >= ATOM else f"({shown[0]})"


# SymPy finds these methods by name: what it calls their argument, and the literals it returns, bind no subclass.
# pyright: reportIncompatibleMethodOverride=false
class _Text(StrPrinter):
    """SymPy scalars in the language: abs, maximum, where, ** and so on."""

    names: Names

    def __init__(self, names: Names) -> None:
        super().__init__({"order": "none"})
        self.names = names

    def parenthesize(self, item: Any, level: int, strict: bool = False) -> str:
        return self._loose(item) if level == 0 else super().parenthesize(item, level, strict)

    def _loose(self, e: Any) -> str:
        """Where nothing can take a part of it: the argument of a function, a side of a comparison."""
        return self.names[e][0] if e in self.names else self._print(e)

    def _as_ordered_terms(self, e: Any, order: str | None = None) -> list[Any]:
        """t - 1, not -1 + t."""
        del order
        return sorted(e.args, key=_negative)

    def _print_Symbol(self, e: sp.Symbol) -> str:
        return _tight(self.names[e]) if e in self.names else e.name

    def _print_Abs(self, e: Any) -> str:
        return f"abs({self._loose(e.args[0])})"

    def _print_Max(self, e: Any) -> str:
        return self._fold("maximum", e.args)

    def _print_Min(self, e: Any) -> str:
        return self._fold("minimum", e.args)

    def _fold(self, name: str, args: tuple[Any, ...]) -> str:
        out = self._loose(args[-1])
        for a in reversed(args[:-1]):
            out = f"{name}({self._loose(a)}, {out})"
        return out

    def _print_Piecewise(self, e: Any) -> str:
        *cases, (last, _) = e.args
        out = self._loose(last)
        for value, condition in reversed(cases):
            out = f"where({self._print(condition)}, {self._loose(value)}, {out})"
        return out

    def _print_Relational(self, e: Any) -> str:
        op = {sp.Eq: "==", sp.Ne: "!="}.get(type(e), e.rel_op)
        return f"{self._loose(e.lhs)} {op} {self._loose(e.rhs)}"

    def _print_Mul(self, e: Any) -> str:
        c, body = e.as_coeff_Mul()
        below = [f for f in sp.Mul.make_args(body) if isinstance(f, sp.Pow) and f.exp.could_extract_minus_sign()]
        if c.is_Rational and c.q != 1 and [(f.exp, f.base.is_Add) for f in below] == [(-1, True)]:
            return f"{self._print(c)}*{self._print(body)}"  # SymPy reads 3*(p + q) as 3*p + 3*q
        signs = [a for a in e.args if isinstance(a, sp.sign)]
        rest = e / sp.Mul(*signs)
        if not signs or rest.is_number or _negative(rest):
            return super()._print_Mul(e)
        return "*".join([*map(self._print, signs), self.parenthesize(rest, PRECEDENCE["Mul"], strict=True)])

    def _print_Pow(self, e: Any, rational: bool = False) -> str:
        if e.exp == sp.S.Half and not rational:
            return f"sqrt({self._loose(e.base)})"
        return super()._print_Pow(e, rational)

    def _print_And(self, e: Any) -> str:
        return " and ".join(f"({self._print(a)})" for a in e.args)

    def _print_Or(self, e: Any) -> str:
        return " or ".join(f"({self._print(a)})" for a in e.args)

    def _print_Rational(self, e: Any) -> str:
        return _decimal(e) or super()._print_Rational(e)

    def _print_Infinity(self, e: Any) -> str:
        return "inf"

    def _print_NegativeInfinity(self, e: Any) -> str:
        return "-inf"

    def _print_Exp1(self, e: Any) -> str:
        return "exp(1)"


def _decimal(e: sp.Rational) -> str:
    """What is shorter than its fraction: 1e-08, not 1/100000000."""
    short = repr(float(e))
    return short if e.q > 10**6 and sp.Rational(short) == e else ""


class _Latex(LatexPrinter):
    """tensors: as of `_Pretty`."""

    def __init__(self, names: dict[sp.Symbol, str], tensors: frozenset[sp.Symbol]) -> None:
        super().__init__({"symbol_names": names, "mul_symbol": r"\,"})
        self.tensors = tensors

    def _print_Mul(self, e: Any) -> str:
        front, top, bottom = _entrywise(e, self.tensors)
        if len(top) + len(bottom) < 2:
            return super()._print_Mul(e)
        above = r" \odot ".join(self.parenthesize(f, PRECEDENCE["Mul"]) for f in top) or "1"
        below = r" \odot ".join(self.parenthesize(f, PRECEDENCE["Mul"]) for f in bottom)
        out = rf"\frac{{{above}}}{{{below}}}" if bottom else above
        if front in (1, -1):
            return out if front == 1 else f"- {out}"
        return rf"{self.parenthesize(front, PRECEDENCE['Mul'])} \, {out}"

    def _print_Rational(self, e: Any) -> str:
        digits, _, power = _decimal(e).partition("e")
        if not power:
            return digits or super()._print_Rational(e)
        return ("" if digits == "1" else rf"{digits} \cdot ") + f"10^{{{int(power)}}}"


class _Pretty(_Text):
    """tensors: slots whose arguments are no single number; their product is ⊙, not that of matrices."""

    tensors: frozenset[sp.Symbol]

    def __init__(self, names: Names, tensors: frozenset[sp.Symbol]) -> None:
        super().__init__(names)
        self.tensors = tensors

    def _print_Symbol(self, e: sp.Symbol) -> str:
        name = super()._print_Symbol(e)
        return GREEK.get(name, name)

    def _print_Abs(self, e: Any) -> str:
        inner = self._loose(e.args[0])
        return f"abs({inner})" if "|" in inner else f"|{inner}|"

    def _print_Max(self, e: Any) -> str:
        return f"max({', '.join(map(self._loose, sorted(e.args, key=_rank)))})"

    def _print_Min(self, e: Any) -> str:
        return f"min({', '.join(map(self._loose, sorted(e.args, key=_rank)))})"

    def _print_Mul(self, e: Any) -> str:
        front, top, bottom = _entrywise(e, self.tensors)
        if len(top) + len(bottom) < 2:
            return super()._print_Mul(e).replace("*", " ")  # no power is left in it, nor in a name
        out = " ⊙ ".join(self.parenthesize(f, PRECEDENCE["Mul"]) for f in top) or "1"
        out += "".join(f"/{self.parenthesize(f, PRECEDENCE['Pow'], strict=True)}" for f in bottom)
        if front in (1, -1):
            return out if front == 1 else f"-{out}"
        return f"{self.parenthesize(front, PRECEDENCE['Mul'])} {out}"

    def _print_Pow(self, e: Any, rational: bool = False) -> str:
        if e.exp == sp.S.Half:
            return super()._print_Pow(e)
        if e.exp.could_extract_minus_sign():
            return f"1/{self.parenthesize(1 / e, PRECEDENCE['Pow'], strict=True)}"
        base, power = self.parenthesize(e.base, PRECEDENCE["Atom"], strict=True), self._print(e.exp)
        if e.exp.is_Integer:
            return base + power.translate(SUPERSCRIPT)
        return f"{base}^{power if e.exp.is_Symbol else f'({power})'}"


def _rank(e: sp.Expr) -> tuple[bool, int, bool]:
    """Arguments of max and min as people write them: what varies first, numbers last."""
    return bool(e.is_number), -int(e.count_ops()), str(e) != "v"


def _entrywise(e: sp.Mul, tensors: frozenset[sp.Symbol]) -> tuple[sp.Expr, list[sp.Expr], list[sp.Expr]]:
    """A product as (number, tensors above the line, tensors below it)."""
    factors = e.args
    found = [f for f in factors if _free(f) & tensors]
    below = [f for f in found if isinstance(f, sp.Pow) and f.exp.could_extract_minus_sign()]
    front = sp.Mul(*(f for f in factors if f not in found))
    return front, [f for f in found if f not in below], [1 / f for f in below]


NONE: frozenset[sp.Symbol] = frozenset()


def _scalar_text(e: sp.Expr, names: Names | None = None, tensors: frozenset[sp.Symbol] = NONE) -> str:
    del tensors
    return _Text(names or {}).doprint(e)


def _scalar_pretty(e: sp.Expr, names: Names | None = None, tensors: frozenset[sp.Symbol] = NONE) -> str:
    if e == sp.Rational(1, 2):
        return "½"
    return re.sub(r"(?<!\de)-", "−", _Pretty(names or {}, tensors).doprint(e))  # 1e-08 stays


def _scalar_latex(e: sp.Expr, names: Names | None = None, tensors: frozenset[sp.Symbol] = NONE) -> str:
    words = {s: _name_latex(s.name) for s in _free(e)}
    slots = {s: _wrap(shown, ATOM, _LATEX) for s, shown in (names or {}).items()}
    return _Latex(words | slots, tensors).doprint(e)


def _name_latex(name: str) -> str:
    """step_codes -> \\mathrm{step}_{\\mathrm{codes}}, eps2 -> \\epsilon_{2}: Greek letters, and words set as one."""
    head, *tail = (w for part in name.split("_") for w in re.findall(r"\d+|\D+", part) or [""])
    below = ", ".join(map(_word_latex, filter(None, tail)))
    return _word_latex(head) + (f"_{{{below}}}" if below else "")


def _word_latex(word: str) -> str:
    if word in GREEK:
        return "\\" + COMMANDS.get(word, word)
    return word if len(word) < 2 or word.isdigit() else rf"\mathrm{{{word}}}"


def _free(e: sp.Basic) -> set[sp.Symbol]:
    return cast(set[sp.Symbol], e.free_symbols)


# --- dialects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """What differs between the three. Templates take the printed arguments in order."""

    scalar: Any
    product: str
    times: str
    entrywise: str
    plus: str
    minus: str
    transpose: str
    brackets: str
    templates: dict[str, str]


_TEXT = Dialect(_scalar_text, " @ ", "{} * {}", "{} * {}", " + ", " - ", "{}.T", "({})", {
    "sumsq": "sumsq({})", "norm1": "norm1({})", "dot": "dot({}, {})", "norm2": "norm_fro({})", "sum": "sum({})",
    "sum_axis": "sum({}, axis={})", "group": "group_norm({}, axis={})", "eye": "I({})", "ones": "ones({}, {})", "zeros": "zeros({}, {})",
    "member": "{}[{}]", "inverse": "inv({})", "diag": "diag({})", "diagonal": "diagonal({})", "softmax": "softmax({}, axis={})",
    "logsumexp": "logsumexp({})", "logsumexp_axis": "logsumexp({}, axis={})", "max": "max_entry({})", "max_axis": "max_entry({}, axis={})",
    "trace": "trace({})", "logdet": "logdet({})", "nuclear": "nuclear({})", "spectral_sum": "spectral_sum({}, {})", "spectral_map": "spectral_map({}, {})",
    "spectral_norm": "spectral({})", "hold": "stop_gradient({})", "in": "{} in {}", "family": "sum({} for {} in {})", "op": "{}({})", "op_T": "{}_T({})",
    "prox": "prox[{}]({})", "sweep": "sweep[{}]({})", "tv": "tv({})", "norm0": "norm0({})", "rank": "rank({})",
    "causal": "causal_softmax({}, axis={})", "shares": "softmax({}, over={})", "family_lse": "logsumexp({} for {} in {})",
    "frequency": "fft({}, {})[{}]", "conjugate": "conj({})", "signal": "ifft({} for {} in {})",
    "noise": "{0}({1}, {2})", "norm": "{0}({1}, axis={2}, eps={3})", "norm_affine": "{0}({1}, axis={2}, eps={3}, weight={4}, bias={5})",
})  # fmt: skip
_PRETTY = Dialect(_scalar_pretty, " ", "{} {}", "{} ⊙ {}", " + ", " − ", "{}ᵀ", "({})", _TEXT.templates | {
    "sumsq": "‖{}‖²", "norm1": "‖{}‖₁", "dot": "⟨{}, {}⟩", "norm2": "‖{}‖", "eye": "I", "inverse": "({})⁻¹",
    "nuclear": "‖{}‖∗", "spectral_norm": "‖{}‖₂", "in": "{} ∈ {}", "family": "Σ_{1} {0}", "trace": "tr({})", "logdet": "log det({})",
    "sum": "Σ {}", "ones": "𝟏", "zeros": "0", "norm0": "‖{}‖₀",
    "shares": "softmax_{1}({0})", "family_lse": "lse_{1}({0})",
    "norm_columns": "{0}({1})", "norm_columns_affine": "{0}({1}; {2}, {3})",
})  # fmt: skip
_LATEX = Dialect(_scalar_latex, r"\, ", r"{} \, {}", r"{} \odot {}", " + ", " - ", r"{}^{{\top}}", r"\left({}\right)", {
    "sumsq": r"\left\|{}\right\|_F^2", "norm1": r"\left\|{}\right\|_1", "dot": r"\left\langle {}, {}\right\rangle", "norm2": r"\left\|{}\right\|_F",
    "sum": r"\sum {}", "sum_axis": r"\operatorname{{sum}}_{{{1}}}({0})", "group": r"\left\|{}\right\|_{{2,1;{}}}", "eye": r"I_{{{}}}",
    "ones": r"\mathbf{{1}}_{{{} \times {}}}", "zeros": r"0_{{{} \times {}}}", "member": r"{{{}}}_{{{}}}", "inverse": r"\left({}\right)^{{-1}}",
    "diag": r"\operatorname{{diag}}({})", "diagonal": r"\operatorname{{diagonal}}({})", "softmax": r"\operatorname{{softmax}}_{1}({0})",
    "logsumexp": r"\operatorname{{lse}}({})", "logsumexp_axis": r"\operatorname{{lse}}_{1}({0})", "max": r"\max({})", "max_axis": r"\max_{1}({0})",
    "trace": r"\operatorname{{tr}}\left({}\right)", "logdet": r"\log\det\left({}\right)", "nuclear": r"\left\|{}\right\|_*",
    "spectral_sum": r"\operatorname{{tr}} h({1})|_{{h={0}}}", "spectral_map": r"h({1})|_{{h={0}}}", "spectral_norm": r"\left\|{}\right\|_2",
    "hold": r"\operatorname{{sg}}\left({}\right)", "in": r"{0} \in \mathrm{{{1}}}", "family": r"\sum_{{{1}=1}}^{{{2}}} {0}",
    "op": r"\operatorname{{{}}}\left({}\right)", "op_T": r"\operatorname{{{}}}^{{\top}}\left({}\right)", "prox": r"\operatorname{{prox}}_{{{}}}\left({}\right)",
    "sweep": r"\operatorname{{sweep}}_{{{}}}\left({}\right)", "tv": r"\left\|\nabla {}\right\|_1",
    "norm0": r"\left\|{}\right\|_0", "rank": r"\operatorname{{rank}}({})", "causal": r"\operatorname{{causal\,softmax}}_{1}({0})",
    "shares": r"\operatorname{{softmax}}_{{{1}}}\left({0}\right)", "family_lse": r"\operatorname{{lse}}_{{{1}=1}}^{{{2}}} {0}",
    "frequency": r"\widehat{{{0}}}_{{{2}}}", "conjugate": r"\overline{{{}}}", "signal": r"\mathcal{{F}}^{{-1}}_{{{1}}}\left({0}\right)",
    "noise": r"\operatorname{{{0}}}_{{{2}}}\left({1}\right)", "norm": r"\operatorname{{{0}}}_{{{2}}}\left({1}\right)", "norm_affine": r"\operatorname{{{0}}}_{{{2}}}\left({1};\, {4}, {5}\right)",
})  # fmt: skip


# --- nodes ------------------------------------------------------------------------------------------------------------

NORMS = {"layer_norm": "layer_norm", "rms_norm": "rms_norm", "sphere": "unit_norm"}
"""Kind of a norm -> the function of the language."""
NONZERO = sp.Piecewise((0, sp.Eq(slot(0), 0)), (1, True))


def _ones(r: sp.Expr, c: sp.Expr) -> str:
    return "𝟏" if c == 1 else "𝟏ᵀ" if r == 1 else "𝟏 𝟏ᵀ"


def _wrap(shown: Shown, least: int, d: Dialect) -> str:
    return shown[0] if shown[1] >= least else d.brackets.format(shown[0])


def _node(e: Expr, d: Dialect) -> Shown:
    value = as_constant(e)
    if value is not None and e.is_scalar:
        return d.scalar(value), (
            SUM if value.is_Add or value.could_extract_minus_sign() else PRODUCT if not value.is_Atom else ATOM
        )

    def call(name: str, *args: Any) -> Shown:
        shown = [a if isinstance(a, str) else _show(a, d) for a in args]
        template = d.templates[name]
        if d is _PRETTY and "‖" in template and "‖" in shown[0]:  # a norm within a norm: by its name
            template = _TEXT.templates[name]
        return template.format(*shown), ATOM

    def over(name: str, body: Expr, *args: Any) -> Shown:
        """A sum: in brackets in the language, else a sign before a product."""
        if d is _TEXT:
            return call(name, body, *args)
        return call(name, _wrap(_node(body, d), PREFIX, d), *args)[0], PREFIX

    match cast(Node, e):
        case Sym(name):
            return (d.scalar(sp.Symbol(name)) if d is not _TEXT else name), ATOM
        case Member(of, index):
            return call("member", of, index)
        case Eye(n):
            return call("eye", n)
        case Ones(r, c):
            return (_ones(r, c), ATOM if 1 in (r, c) else PRODUCT) if d is _PRETTY else call("ones", r, c)
        case Zero(r, c):
            return call("zeros", r, c)
        case Add(terms):
            return _sum(terms, d)
        case Mul(c, factors):
            return _product(c, factors, d)
        case Transpose(x):
            return d.transpose.format(_wrap(_node(x, d), ATOM, d)), ATOM
        case Inverse(x):
            return call("inverse", x)
        case Map(sp.Pow(base=base, exp=half), (Sum(Map(p, (x,)), None),)) if (base, half, p) == (
            slot(0),
            sp.S.Half,
            slot(0) ** 2,
        ):
            return call("norm2", x)
        case Map() as m:
            return _map(m, d)
        case Sum(Map(p, (x,)), None) if p == slot(0) ** 2:
            return call("sumsq", x)
        case Sum(Map(p, (Op("difference", x, False),)), None) if p == sp.Abs(slot(0)):
            return call("tv", x)
        case Sum(Map(p, (x,)), None) if p == sp.Abs(slot(0)):
            return call("norm1", x)
        case Sum(Map(p, (x,)), None) if p == NONZERO:
            return call("norm0", x)
        case Spectral(h, x) if h == NONZERO:
            return call("rank", x)
        case Sum(Map(p, (x, y)), None) if p == slot(0) * slot(1) and x.shape == y.shape:
            return call("dot", x, y)
        case Sum(Map(p, (Sum(Map(q, (x,)), axis),)), None) if (p, q) == (
            sp.sqrt(slot(0)),
            slot(0) ** 2,
        ) and axis is not None:
            return call("group", x, str(axis))
        case Sum(x, None):
            return over("sum", x)
        case Sum(x, axis):
            return call("sum_axis", x, str(axis))
        case LogSumExp(x, axis):
            return call("logsumexp", x) if axis is None else call("logsumexp_axis", x, str(axis))
        case Max(x, axis):
            return call("max", x) if axis is None else call("max_axis", x, str(axis))
        case Diag(x):
            return call("diag", x)
        case Diagonal(x):
            return call("diagonal", x)
        case Softmax(x, axis, causal):
            return call("causal" if causal else "softmax", x, str(axis))
        case Normalise(kind, axis, eps, x, weight, bias):
            plain = as_constant(weight) == 1 and as_constant(bias) == 0
            shown = NORMS[kind].replace("_", r"\_") if d is _LATEX else NORMS[kind]
            if d is _PRETTY and axis == 0:  # of columns, as every layer has it
                return call("norm_columns" if plain else "norm_columns_affine", shown, x, weight, bias)
            rest = () if plain else (weight, bias)
            return call("norm_affine" if rest else "norm", shown, x, str(axis), eps, *rest)
        case Noise(kind, rate, x):
            return call("noise", kind.replace("_", r"\_") if d is _LATEX else kind, x, rate)
        case FamilySoftmax(i, _, x):
            return call("shares", x, i)
        case FamilyLogSumExp(i, n, body):
            return call("family_lse", body, i, n)
        case Spectral(h, x) if h == slot(0):
            return call("nuclear", x)
        case Spectral(h, x):
            return call("spectral_sum", _scalar_profile(h, d), x)
        case SpectralMap(h, x):
            return call("spectral_map", _scalar_profile(h, d), x)
        case SpectralNorm(x):
            return call("spectral_norm", x)
        case Trace(x):
            return call("trace", x)
        case LogDet(x):
            return call("logdet", x)
        case Op(name, x, adjoint, sizes):
            arguments = ", ".join(_show(a, d) for a in (x, *sizes))
            return call("op_T" if adjoint else "op", name.replace("_", r"\_") if d is _LATEX else name, arguments)
        case Spectrum(i, sizes, x, conjugate):
            shown = d.templates["frequency"].format(_show(x, d), ", ".join(map(d.scalar, sizes)), i)
            return call("conjugate", shown) if conjugate else (shown, ATOM)
        case Signal(i, sizes, body):
            return call("signal", body, i, functools.reduce(d.times.format, map(d.scalar, sizes)))
        case Hold(Worked("top", _) as x):  # which no derivation sees through as it is
            return _node(x, d)
        case Hold(x):
            return call("hold", x)
        case Sorted(x):
            return call("op", "sort", _show(x, d))
        case Worked("div", (of, x, probes)):
            said = () if as_constant(probes) == 0 else (f"probes={_show(probes, d)}",)
            return call("op", "div", ", ".join([_show(of, d), _show(x, d), *said]))
        case Worked(name, args):
            shown = name.replace("_", r"\_") if d is _LATEX else name
            return call("op", shown, ", ".join(_show(a, d) for a in args))
        case Curve(points, x):
            return call("op", points, x)
        case FamilySum(i, n, body):
            return over("family", body, i, n)
        case Indicator(name, params, x):
            return d.templates["in"].format(_show(x, d), _set(name, params, d)), SUM
        case Project(name, params, x):
            return call("prox", _set(name, params, d), x)
        case SpectralDivergence(p, symmetric, x):
            called = call("prox", ("symmetric " if symmetric else "spectral ") + p.text(), x)[0]
            return call("op", "div", called)
        case SpectralProx(p, x):
            return call("prox", "spectral " + p.text(), x)
        case Prox(at=at) as node:
            return call("prox", penalty(node, d), at)
        case Sweep(q, fall, at, step):
            parts = (q, step.term) if isinstance(step, Prox) else (q,)
            return call("sweep", ", ".join(_show(x, d) for x in parts), ", ".join(_show(x, d) for x in (at, fall)))
        case Multiplier(p, args, _):
            return call("op", "multiplier", ", ".join([p.text(), *(_show(a, d) for a in args)]))
        case ProxMap(p, args, _):
            return call("prox", p.text(), ", ".join(_show(a, d) for a in args))


def penalty(e: Prox, d: Dialect) -> str:
    """t times the term of a prox, with what was learned in the place of its weights; then its sets, which have no weight."""
    parts = e.term.terms if isinstance(e.term, Add) else (e.term,)
    sets = [body for _, body in map(split, parts) if isinstance(body, Indicator)]
    weighed = [split(scale(e.t, p)) for p in parts if not isinstance(split(p)[1], Indicator)]
    hidden: list[str] = []
    for old, new in e.swaps:
        fresh = [(c.subs(old, new), body) for c, body in weighed]
        hidden += [f"{d.scalar(old)} = {d.scalar(new)}"] if fresh == weighed else []
        weighed = fresh
    terms = [add(*(scale(c, body) for c, body in weighed))] if weighed else []
    return ", ".join([*(_show(x, d) for x in (*terms, *sets)), *hidden])


def _set(name: str, params: tuple[sp.Expr | Expr, ...], d: Dialect) -> str:
    name = name.replace("_", r"\_") if d is _LATEX else name
    return name if not params else f"{name}({', '.join(_show(p, d) for p in params)})"


def _scalar_profile(h: sp.Expr, d: Dialect) -> str:
    return d.scalar(h, {slot(0): ("s", ATOM)})


def _sum(terms: tuple[Expr, ...], d: Dialect) -> Shown:
    out = ""
    for i, term in enumerate(terms):
        c, body = split(term)
        negative = _negative(c)
        shown = _wrap(_node(scale(-c if negative else c, body), d), PREFIX, d)
        out += (d.minus.strip() if negative else "") + shown if i == 0 else (d.minus if negative else d.plus) + shown
    return out, SUM


def _negative(c: sp.Expr) -> bool:
    return not c.is_Add and c.could_extract_minus_sign()


def _product(c: sp.Expr, factors: tuple[Expr, ...], d: Dialect) -> Shown:
    sums = [i for i, f in enumerate(factors) if isinstance(f, Add)]
    if _negative(c) and len(sums) == 1 and len(factors) > 1:  # -A.T @ (x - A @ z) reads better turned round
        i = sums[0]
        c, factors = -c, (*factors[:i], _Turned(factors[i]), *factors[i + 1 :])  # type: ignore[assignment]
    nodes = [_turned(f.of, d) if isinstance(f, _Turned) else _node(f, d) for f in factors]
    level = PREFIX if nodes[-1][1] == PREFIX else PRODUCT
    least = [*(UNARY for _ in nodes[:-1]), PREFIX if level == PREFIX else UNARY]
    body = d.product.join(_wrap(f, strength, d) for f, strength in zip(nodes, least, strict=True))
    if c == 1:
        return body, level
    if c == -1:
        return d.minus.strip() + body, SUM
    negative = _negative(c)
    front = d.scalar(-c if negative else c)
    out = d.times.format(d.brackets.format(front) if c.is_Add else front, body)
    return (d.minus.strip() + out, SUM) if negative else (out, level)


@dataclass(frozen=True)
class _Turned:
    of: Expr


def _turned(e: Expr, d: Dialect) -> Shown:
    """Minus a sum, its positive terms first."""
    assert isinstance(e, Add)
    terms = sorted((scale(-1, t) for t in e.terms), key=lambda t: _negative(split(t)[0]))
    return _sum(tuple(terms), d)


def _map(e: Map, d: Dialect) -> Shown:
    used = cast(set[sp.Symbol], e.profile.free_symbols)
    names = {slot(i): _node(a, d) for i, a in enumerate(e.args)}
    shown = d.scalar(e.profile, names, frozenset(slot(i) for i, a in enumerate(e.args) if not a.is_scalar))
    shape_only = [a for i, a in enumerate(e.args) if slot(i) not in used]
    for a in shape_only:
        times = (
            d.times
            if d is _TEXT or e.profile.is_number or all(x.is_scalar for x in e.args if x is not a)
            else d.entrywise
        )
        shown = times.format(d.brackets.format(shown), _wrap(_node(a, d), UNARY, d))
    if shape_only:
        return shown, PRODUCT
    p = e.profile
    return shown, SUM if p.is_Add else ATOM if p.is_Function else POWER if _is_power(p) else PRODUCT


def _is_power(e: sp.Expr) -> bool:
    """Printed with **, not as a quotient."""
    return isinstance(e, sp.Pow) and not e.exp.could_extract_minus_sign()


def joined(shown: list[str]) -> str:
    """A sum, its minus signs between the terms."""
    return " + ".join(shown).replace("+ −", "− ").replace("+ -", "- ")
