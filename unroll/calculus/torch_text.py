"""Scalar SymPy expressions as torch text, in forms that neither overflow nor cancel."""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
from __future__ import annotations

import math
from typing import Any

import sympy as sp
from sympy.printing.str import StrPrinter

from unroll.calculus.factored import factored
from unroll.calculus.stable import entr, expm1, log1p, logaddexp, logcosh, sigmoid, softplus, xlogy
from unroll.errors import DeriveError


class quadratic_root(sp.Function):
    """The zero of a z² + b z + c at which it increases."""

    nargs = (3,)

    def textbook(self) -> sp.Expr:
        a, b, c = self.args
        return (sp.sqrt(factored(b**2 - 4 * a * c)) - b) / (2 * a)


class cubic_root(sp.Function):
    """cubic_root(which, a, b, c, d): a real zero of a cubic."""

    nargs = (5,)


class wright_omega(sp.Function):
    """ω(x) + log ω(x) = x."""

    nargs = (1,)


class power(sp.Function):
    """x^p for 0 < p < 1, of what is 0 where it is least: with slope 0 there."""

    nargs = (2,)


class nonzero(sp.Function):
    """x >= 0, and 1 in the place of an x that is too small to divide by."""

    nargs = (1,)
    is_positive = True

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        return sp.S.One if x.is_zero else None

    def _torchcode(self, printer: Any) -> str:  # what SymPy's own printer of torch asks for
        return f"nonzero({printer.doprint(self.args[0])})"


class above_zero(sp.Function):
    """x > 0, and a number too small to count, but not to divide by, in the place of 0."""

    nargs = (1,)
    is_positive = True

    def _torchcode(self, printer: Any) -> str:
        return f"above_zero({printer.doprint(self.args[0])})"


class log_of_mass(sp.Function):
    """log x; of 0, far below every other logarithm of the type, a number that can be subtracted from itself."""

    nargs = (1,)

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        return (
            sp.Integer(-16_000) if x.is_zero else sp.log(x) if x.is_number else None
        )  # its exponential is 0 in every type

    def _torchcode(self, printer: Any) -> str:
        return f"log_of_mass({printer.doprint(self.args[0])})"


class reciprocal(sp.Function):
    """1/x, and 0 for 0."""

    nargs = (1,)

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        return 1 / x if x.is_nonzero and x.is_number else x if x.is_zero else None

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return -(self**2)

    def _torchcode(self, printer: Any) -> str:
        return f"reciprocal({printer.doprint(self.args[0])})"


HELPERS = (quadratic_root, cubic_root, wright_omega)


CALLS = {
    sp.exp: "torch.exp",
    sp.log: "torch.log",
    sp.tanh: "torch.tanh",
    sp.sinh: "torch.sinh",
    sp.cosh: "torch.cosh",
    sp.sin: "torch.sin",
    sp.cos: "torch.cos",
    sp.tan: "torch.tan",
    sp.atan: "torch.atan",
    sp.asinh: "torch.asinh",
    sp.acos: "torch.acos",
    sp.asin: "torch.asin",
    sp.erf: "torch.erf",
    sp.erfc: "torch.erfc",
    expm1: "torch.expm1",
    log1p: "torch.log1p",
    sigmoid: "torch.sigmoid",
    softplus: "torch.nn.functional.softplus",
    logaddexp: "torch.logaddexp",
    xlogy: "torch.xlogy",
    entr: "torch.special.entr",
    quadratic_root: "quadratic_root",
    cubic_root: "cubic_root",
    wright_omega: "wright_omega",
}


class TorchPrinter(StrPrinter):
    """Text that torch evaluates: every symbol is a tensor, every number a Python literal."""

    def _print_Rational(self, expr: Any) -> str:
        return f"{expr.p}/{expr.q}"

    def _print_Float(self, expr: Any) -> str:
        return decimal(expr)

    def _print_NumberSymbol(self, expr: Any) -> str:
        return decimal(expr)

    _print_Exp1 = _print_Pi = _print_NumberSymbol

    def _print_Infinity(self, expr: Any) -> str:
        return "float('inf')"

    def _print_NegativeInfinity(self, expr: Any) -> str:
        return "-float('inf')"

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        if expr.is_number and not expr.is_rational:
            return decimal(expr)
        if expr.exp == sp.Rational(1, 2):
            return f"torch.sqrt({self._print(expr.base)})"
        if expr.exp == sp.Rational(-1, 2):
            return f"1/torch.sqrt({self._print(expr.base)})"
        if isinstance(expr.base, sp.Basic) and expr.base.is_number and not expr.exp.is_number:
            return f"torch.exp({self._print(expr.exp * float(sp.log(expr.base)))})"
        return super()._print_Pow(expr, rational)

    def _print_Function(self, expr: Any) -> str:
        if expr.is_number:
            return decimal(expr)
        inside = ", ".join(self._print(a) for a in expr.args)
        if isinstance(expr, logcosh):  # beyond 20 it is |x| - log 2
            return (
                f"(torch.log1p(2*torch.sinh(({inside}).clamp(-20, 20)/2)**2) + (torch.abs({inside}) - 20).clamp_min(0))"
            )
        if expr.func in CALLS:
            return f"{CALLS[expr.func]}({inside})"
        raise NotImplementedError(f"no torch text for {expr.func}")

    _print_log = _print_exp = _print_tanh = _print_sinh = _print_cosh = _print_Function

    def _print_ExpBase(self, expr: Any) -> str:
        return self._print_Function(expr)

    def _print_Abs(self, expr: Any) -> str:
        return f"torch.abs({self._print(expr.args[0])})"

    def _print_sign(self, expr: Any) -> str:
        return f"torch.sign({self._print(expr.args[0])})"

    def _print_Max(self, expr: Any) -> str:
        return self._bounded(expr, "clamp_min", "maximum")

    def _print_Min(self, expr: Any) -> str:
        return self._bounded(expr, "clamp_max", "minimum")

    def _bounded(self, expr: Any, clamp: str, pair: str) -> str:
        numbers = [a for a in expr.args if a.is_number]
        rest = [self._print(a) for a in expr.args if not a.is_number]
        text = rest[0]
        for other in rest[1:]:
            text = f"torch.{pair}({text}, {other})"
        for number in numbers:
            text = f"({text}).{clamp}({self._print(number)})"
        return text


_PRINTER = TorchPrinter()


def torch_text(e: sp.Expr | int) -> str:
    """e as Python text over torch tensors named as its symbols. Raises DeriveError E401: a number that float64 does not hold."""
    e = sp.sympify(e)
    long = [n for n in e.atoms(sp.Rational) if not as_fraction(n)]
    return _PRINTER.doprint(e.xreplace({n: sp.Float(decimal(n), 17) for n in long}))


def as_fraction(e: sp.Rational) -> bool:
    """Is a number, written as what it is, shorter than as a decimal, and of parts that a tensor takes?"""
    return max(abs(e.p), e.q) < 2**53 and (e.q == 1 or len(str(e)) < len(decimal(e)))


def decimal(e: sp.Expr) -> str:
    """The shortest decimal that is the float64 nearest to a number. Raises DeriveError E401 where there is none."""
    x = float(e.evalf(30))
    if not math.isfinite(x) or (x == 0) != (e == 0):
        raise DeriveError("E401", f"the number {e.evalf(6)} is beyond what a float64 holds")
    return repr(x)


def helpers_in(e: sp.Basic) -> set[str]:
    """Names of the runtime operations that the text of e calls."""
    return {h.__name__ for h in HELPERS if e.has(h)}
