"""Expr -> text. Three dialects: the language itself (parse(text(e)) is e), Unicode for people, LaTeX for papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import sympy as sp
from sympy.printing.latex import LatexPrinter
from sympy.printing.str import StrPrinter

from unroll.language.constructors import as_constant, scale, split
from unroll.language.nodes import (
    Add,
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
    Spectral,
    SpectralMap,
    SpectralNorm,
    SpectralProx,
    Spectrum,
    Sum,
    Sym,
    Trace,
    Transpose,
    Zero,
    slot,
)

SUM, PRODUCT, UNARY, POWER, ATOM = range(5)
"""Binding strength of what was printed: a looser part is put in brackets."""


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

GREEK = {
    name: letter
    for name, letter in zip(
        [
            "alpha",
            "beta",
            "gamma",
            "delta",
            "epsilon",
            "eps",
            "zeta",
            "eta",
            "theta",
            "kappa",
            "lam",
            "lambda",
            "mu",
            "nu",
            "xi",
            "rho",
            "sigma",
            "tau",
            "phi",
            "chi",
            "psi",
            "omega",
        ],
        ["α", "β", "γ", "δ", "ε", "ε", "ζ", "η", "θ", "κ", "λ", "λ", "μ", "ν", "ξ", "ρ", "σ", "τ", "φ", "χ", "ψ", "ω"],
        strict=True,
    )
}


# SymPy finds these methods by name: what it calls their argument, and the literals it returns, bind no subclass.
# pyright: reportIncompatibleMethodOverride=false
class _Text(StrPrinter):
    """SymPy scalars in the language: abs, maximum, where, ** and so on."""

    names: dict[sp.Symbol, str]

    def __init__(self, names: dict[sp.Symbol, str]) -> None:
        super().__init__({"order": "none"})
        self.names = names

    def _print_Symbol(self, e: sp.Symbol) -> str:
        return self.names.get(e, e.name)

    def _print_Abs(self, e: Any) -> str:
        return f"abs({self._print(e.args[0])})"

    def _print_Max(self, e: Any) -> str:
        return self._fold("maximum", e.args)

    def _print_Min(self, e: Any) -> str:
        return self._fold("minimum", e.args)

    def _fold(self, name: str, args: tuple[Any, ...]) -> str:
        out = self._print(args[-1])
        for a in reversed(args[:-1]):
            out = f"{name}({self._print(a)}, {out})"
        return out

    def _print_Piecewise(self, e: Any) -> str:
        *cases, (last, _) = e.args
        out = self._print(last)
        for value, condition in reversed(cases):
            out = f"where({self._print(condition)}, {self._print(value)}, {out})"
        return out

    def _print_Relational(self, e: Any) -> str:
        op = {sp.Eq: "==", sp.Ne: "!="}.get(type(e), e.rel_op)
        return f"{self._print(e.lhs)} {op} {self._print(e.rhs)}"

    def _print_And(self, e: Any) -> str:
        return " and ".join(f"({self._print(a)})" for a in e.args)

    def _print_Or(self, e: Any) -> str:
        return " or ".join(f"({self._print(a)})" for a in e.args)

    def _print_Rational(self, e: Any) -> str:
        return _decimal(e) or super()._print_Rational(e)

    def _print_Infinity(self, e: Any) -> str:
        return "inf"

    def _print_Exp1(self, e: Any) -> str:
        return "exp(1)"


def _decimal(e: sp.Rational) -> str:
    """What is shorter than its fraction: 1e-08, not 1/100000000."""
    short = repr(float(e))
    return short if e.q > 10**6 and sp.Rational(short) == e else ""


class _Latex(LatexPrinter):
    def _print_Rational(self, e: Any) -> str:
        digits, _, power = _decimal(e).partition("e")
        if not power:
            return digits or super()._print_Rational(e)
        return ("" if digits == "1" else rf"{digits} \cdot ") + f"10^{{{int(power)}}}"


class _Pretty(_Text):
    def _print_Symbol(self, e: sp.Symbol) -> str:
        name = super()._print_Symbol(e)
        return GREEK.get(name, name)

    def _print_Abs(self, e: Any) -> str:
        return f"|{self._print(e.args[0])}|"

    def _print_Max(self, e: Any) -> str:
        return f"max({', '.join(map(self._print, e.args))})"

    def _print_Min(self, e: Any) -> str:
        return f"min({', '.join(map(self._print, e.args))})"

    def _print_Mul(self, e: Any) -> str:
        return super()._print_Mul(e).replace("*", " ")

    def _print_Pow(self, e: Any, rational: bool = False) -> str:
        power = {2: "²", 3: "³"}.get(e.exp if e.exp.is_Integer else 0)
        return f"{self.parenthesize(e.base, 100)}{power}" if power else super()._print_Pow(e, rational)


def _scalar_text(e: sp.Expr, names: dict[sp.Symbol, str] | None = None) -> str:
    return _Text(names or {}).doprint(e)


def _scalar_pretty(e: sp.Expr, names: dict[sp.Symbol, str] | None = None) -> str:
    if e == sp.Rational(1, 2):
        return "½"
    return _Pretty(names or {}).doprint(e)


def _scalar_latex(e: sp.Expr, names: dict[sp.Symbol, str] | None = None) -> str:
    words = {s: _word_latex(s.name) for s in _free(e) if s.name in GREEK or (s.name.isalpha() and len(s.name) > 1)}
    return _Latex({"symbol_names": words | (names or {}), "mul_symbol": r"\,"}).doprint(e)


def _word_latex(name: str) -> str:
    """A Greek letter, or a word set as one."""
    return "\\" + {"lam": "lambda", "eps": "epsilon"}.get(name, name) if name in GREEK else rf"\mathrm{{{name}}}"


def _free(e: sp.Basic) -> set[sp.Symbol]:
    return cast(set[sp.Symbol], e.free_symbols)


# --- dialects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """What differs between the three. Templates take the printed arguments in order."""

    scalar: Any
    product: str
    times: str
    plus: str
    minus: str
    transpose: str
    brackets: str
    templates: dict[str, str]


_TEXT = Dialect(_scalar_text, " @ ", "{} * {}", " + ", " - ", "{}.T", "({})", {
    "sumsq": "sumsq({})", "norm1": "norm1({})", "dot": "dot({}, {})", "norm2": "norm_fro({})", "sum": "sum({})",
    "sum_axis": "sum({}, axis={})", "group": "group_norm({}, axis={})", "eye": "I({})", "ones": "ones({}, {})", "zeros": "zeros({}, {})",
    "member": "{}[{}]", "inverse": "inv({})", "diag": "diag({})", "diagonal": "diagonal({})", "softmax": "softmax({}, axis={})",
    "logsumexp": "logsumexp({})", "logsumexp_axis": "logsumexp({}, axis={})", "max": "max_entry({})", "max_axis": "max_entry({}, axis={})",
    "trace": "trace({})", "logdet": "logdet({})", "nuclear": "nuclear({})", "spectral_sum": "spectral_sum({}, {})", "spectral_map": "spectral_map({}, {})",
    "spectral_norm": "spectral({})", "hold": "stop_gradient({})", "in": "{} in {}", "family": "sum({} for {} in {})", "op": "{}({})", "op_T": "{}_T({})",
    "prox": "prox[{}]({})", "prox_map": "prox[{}]({})", "tv": "tv({})", "norm0": "norm0({})", "rank": "rank({})",
    "causal": "causal_softmax({}, axis={})", "shares": "softmax({}, over={})", "family_lse": "logsumexp({} for {} in {})",
    "frequency": "fft({}, {})[{}]", "conjugate": "conj({})", "signal": "ifft({} for {} in {})",
    "noise": "{0}({1}, {2})", "norm": "{0}({1}, axis={2}, eps={3})", "norm_affine": "{0}({1}, axis={2}, eps={3}, weight={4}, bias={5})",
})  # fmt: skip
_PRETTY = Dialect(_scalar_pretty, " ", "{} {}", " + ", " − ", "{}ᵀ", "({})", _TEXT.templates | {
    "sumsq": "‖{}‖²", "norm1": "‖{}‖₁", "dot": "⟨{}, {}⟩", "norm2": "‖{}‖", "eye": "I", "inverse": "({})⁻¹",
    "nuclear": "‖{}‖_*", "spectral_norm": "‖{}‖₂", "in": "{} ∈ {}", "family": "Σ_{1} {0}", "trace": "tr({})", "logdet": "log det({})",
    "sum": "Σ {}", "ones": "1", "zeros": "0", "norm0": "‖{}‖₀", "group": "Σ ‖{}‖ along axis {}",
    "shares": "softmax_{1}({0})", "family_lse": "lse_{1} {0}", "norm": "{0}({1})", "norm_affine": "{0}({1}; {4}, {5})",
})  # fmt: skip
_LATEX = Dialect(_scalar_latex, r"\, ", r"{} \, {}", " + ", " - ", r"{}^{{\top}}", r"\left({}\right)", {
    "sumsq": r"\left\|{}\right\|_F^2", "norm1": r"\left\|{}\right\|_1", "dot": r"\left\langle {}, {}\right\rangle", "norm2": r"\left\|{}\right\|_F",
    "sum": r"\sum {}", "sum_axis": r"\operatorname{{sum}}_{{1}}({0})", "group": r"\left\|{}\right\|_{{2,1;{}}}", "eye": r"I_{{{}}}",
    "ones": r"\mathbf{{1}}_{{{} \times {}}}", "zeros": r"0_{{{} \times {}}}", "member": r"{{{}}}_{{{}}}", "inverse": r"\left({}\right)^{{-1}}",
    "diag": r"\operatorname{{diag}}({})", "diagonal": r"\operatorname{{diagonal}}({})", "softmax": r"\operatorname{{softmax}}_{1}({0})",
    "logsumexp": r"\operatorname{{lse}}({})", "logsumexp_axis": r"\operatorname{{lse}}_{1}({0})", "max": r"\max({})", "max_axis": r"\max_{1}({0})",
    "trace": r"\operatorname{{tr}}\left({}\right)", "logdet": r"\log\det\left({}\right)", "nuclear": r"\left\|{}\right\|_*",
    "spectral_sum": r"\operatorname{{tr}} h({1})|_{{h={0}}}", "spectral_map": r"h({1})|_{{h={0}}}", "spectral_norm": r"\left\|{}\right\|_2",
    "hold": r"\operatorname{{sg}}\left({}\right)", "in": r"{0} \in \mathrm{{{1}}}", "family": r"\sum_{{{1}=1}}^{{{2}}} {0}",
    "op": r"\operatorname{{{}}}\left({}\right)", "op_T": r"\operatorname{{{}}}^{{\top}}\left({}\right)", "prox": r"\operatorname{{prox}}_{{{}}}\left({}\right)",
    "prox_map": r"\operatorname{{prox}}_{{{}}}\left({}\right)", "tv": r"\left\|\nabla {}\right\|_1",
    "norm0": r"\left\|{}\right\|_0", "rank": r"\operatorname{{rank}}({})", "causal": r"\operatorname{{causal\,softmax}}_{1}({0})",
    "shares": r"\operatorname{{softmax}}_{{{1}}}\left({0}\right)", "family_lse": r"\operatorname{{lse}}_{{{1}=1}}^{{{2}}} {0}",
    "frequency": r"\widehat{{{0}}}_{{{2}}}", "conjugate": r"\overline{{{}}}", "signal": r"\mathcal{{F}}^{{-1}}_{{{1}}}\left({0}\right)",
    "noise": r"\operatorname{{{0}}}_{{{2}}}\left({1}\right)", "norm": r"\operatorname{{{0}}}\left({1}\right)", "norm_affine": r"\operatorname{{{0}}}\left({1};\, {4}, {5}\right)",
})  # fmt: skip


# --- nodes ------------------------------------------------------------------------------------------------------------

Shown = tuple[str, int]
NORMS = {"layer_norm": "layer_norm", "rms_norm": "rms_norm", "sphere": "unit_norm"}
"""Kind of a norm -> the function of the language."""
NONZERO = sp.Piecewise((0, sp.Eq(slot(0), 0)), (1, True))


def _wrap(shown: Shown, least: int, d: Dialect) -> str:
    return shown[0] if shown[1] >= least else d.brackets.format(shown[0])


def _node(e: Expr, d: Dialect) -> Shown:
    value = as_constant(e)
    if value is not None and e.is_scalar:
        return d.scalar(value), (
            SUM if value.is_Add or value.could_extract_minus_sign() else PRODUCT if not value.is_Atom else ATOM
        )

    def call(name: str, *args: Any) -> Shown:
        return d.templates[name].format(*(a if isinstance(a, str) else _show(a, d) for a in args)), ATOM

    match cast(Node, e):
        case Sym(name):
            return (d.scalar(sp.Symbol(name)) if d is not _TEXT else name), ATOM
        case Member(of, index):
            return call("member", of, index)
        case Eye(n):
            return call("eye", n)
        case Ones(r, c):
            return call("ones", r, c)
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
        case Sum(x, axis):
            return call("sum", x) if axis is None else call("sum_axis", x, str(axis))
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
            return (
                call("norm", shown, x, str(axis), eps)
                if plain
                else call("norm_affine", shown, x, str(axis), eps, weight, bias)
            )
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
            return call("signal", body, i, " * ".join(map(d.scalar, sizes)))
        case Hold(x):
            return call("hold", x)
        case FamilySum(i, n, body):
            return call("family", body, i, n)
        case Indicator(name, params, x):
            return d.templates["in"].format(_show(x, d), _set(name, params, d)), SUM
        case Project(name, params, x):
            return call("prox", _set(name, params, d), x)
        case SpectralProx(p, x):
            return call("prox_map", "spectral " + p.text(), x)
        case Prox(term, _, t, at, _):
            return call("prox", scale(t, term), at)
        case ProxMap(p, args, _):
            return call("prox_map", p.text(), ", ".join(_show(a, d) for a in args))


def _set(name: str, params: tuple[sp.Expr | Expr, ...], d: Dialect) -> str:
    name = name.replace("_", r"\_") if d is _LATEX else name
    return name if not params else f"{name}({', '.join(_show(p, d) for p in params)})"


def _scalar_profile(h: sp.Expr, d: Dialect) -> str:
    return d.scalar(h, {slot(0): "s"})


def _sum(terms: tuple[Expr, ...], d: Dialect) -> Shown:
    out = ""
    for i, term in enumerate(terms):
        c, body = split(term)
        negative = _negative(c)
        shown = _wrap(_node(scale(-c if negative else c, body), d), PRODUCT, d)
        out += (d.minus.strip() if negative else "") + shown if i == 0 else (d.minus if negative else d.plus) + shown
    return out, SUM


def _negative(c: sp.Expr) -> bool:
    return not c.is_Add and c.could_extract_minus_sign()


def _product(c: sp.Expr, factors: tuple[Expr, ...], d: Dialect) -> Shown:
    sums = [i for i, f in enumerate(factors) if isinstance(f, Add)]
    if _negative(c) and len(sums) == 1 and len(factors) > 1:  # -A.T @ (x - A @ z) reads better turned round
        i = sums[0]
        c, factors = -c, (*factors[:i], _Turned(factors[i]), *factors[i + 1 :])  # type: ignore[assignment]
    shown = [_wrap(_turned(f.of, d) if isinstance(f, _Turned) else _node(f, d), UNARY, d) for f in factors]
    body = d.product.join(shown)
    if c == 1:
        return body, PRODUCT
    if c == -1:
        return d.minus.strip() + body, SUM
    negative = _negative(c)
    front = d.scalar(-c if negative else c)
    out = d.times.format(d.brackets.format(front) if c.is_Add else front, body)
    return (d.minus.strip() + out, SUM) if negative else (out, PRODUCT)


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
    names: dict[sp.Symbol, str] = {}
    for i, a in enumerate(e.args):
        names[slot(i)] = _wrap(_node(a, d), ATOM, d)
    shown = d.scalar(e.profile, names)
    shape_only = [a for i, a in enumerate(e.args) if slot(i) not in used]
    for a in shape_only:
        shown = d.times.format(d.brackets.format(shown), _node(a, d)[0])
    level = (
        SUM
        if e.profile.is_Add
        else ATOM
        if e.profile.is_Function and not shape_only
        else POWER
        if _is_power(e.profile)
        else PRODUCT
    )
    return shown, level


def _is_power(e: sp.Expr) -> bool:
    """Printed with **, not as a quotient."""
    return isinstance(e, sp.Pow) and not e.exp.could_extract_minus_sign()
