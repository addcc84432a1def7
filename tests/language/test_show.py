"""What is printed means what it says: scalars and products that cannot be misread, in three dialects, and lines that fit."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import sympy as sp
from random_expressions import DIMS, LAM, SYMBOLS, K, Random, T, Z

from unroll.language.columns import WIDTH, table, wrapped
from unroll.language.nodes import scalar
from unroll.language.parse import Scope, parse, parse_matrix
from unroll.language.show import latex, pretty, text

P, Q, R = scalar("p", positive=True), scalar("q", positive=True), scalar("r")
SCALARS = Scope({"p": P, "q": Q, "r": R})
SCOPE = Scope({s.name: s for s in (*SYMBOLS, *DIMS)} | {"lam": LAM, "p": P}, broadcast=True)
AT = {P: 1.3, Q: 0.7, R: -0.4}


def drawn(pick: random.Random, depth: int) -> Any:
    """A scalar of powers, quotients within quotients, signs, and the functions that change sides."""
    if depth == 0:
        return pick.choice([P, Q, R, *map(sp.Rational, ("2", "3", "1/3", "5/2"))])
    a, b = drawn(pick, depth - 1), drawn(pick, pick.randrange(depth))
    return pick.choice([
        lambda: a + b, lambda: a - b, lambda: a * b, lambda: a / (P + b**2), lambda: -a, lambda: a**2, lambda: P ** (b if b.count_ops() < 4 else 2),
        lambda: sp.sqrt(1 + a**2), lambda: 1 / (Q + a**2) ** 3, lambda: sp.Max(a, b), lambda: sp.Min(a, 0), lambda: sp.Abs(a), lambda: sp.exp(-(a**2)),
        lambda: sp.tanh(a), lambda: (1 + a**2) ** sp.Rational(-1, 2), lambda: (Q + a**2) ** sp.Rational(3, 2),
    ])()  # fmt: skip


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


def read(shown: str) -> sp.Expr:
    """Unicode as a person reads it: a space multiplies, bars are absolute values, ^ and raised digits are powers."""
    s = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "**" + m[0].translate(SUPERSCRIPTS), shown)
    s = s.replace("−", "-").replace("½", "(1/2)").replace("^", "**")
    while "|" in s:
        s = re.sub(r"\|([^|]*)\|", r"abs(\1)", s)
    s = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", s)
    names = {"p": P, "q": Q, "r": R, "max": sp.Max, "min": sp.Min, "abs": sp.Abs}
    return sp.sympify(s, locals=names)  # pyright: ignore


@pytest.mark.parametrize("block", range(4))
def test_scalars_read_back_as_the_same_object_and_in_unicode_as_the_same_number(block: int) -> None:
    for i in range(25):
        e = drawn(random.Random(100 * block + i), 3)
        if not e.has(sp.zoo, sp.nan):
            assert parse(text(e), SCALARS) == e, text(e)
            assert complex(read(pretty(e)).subs(AT)) == pytest.approx(complex(e.subs(AT)), rel=1e-9), pretty(e)
            assert "**" not in latex(e)


POWERS = {
    2**P: ("2**p", "2^p", "2^{p}"),
    P ** (Q - 1): ("p**(q - 1)", "p^(q − 1)", "p^{q - 1}"),
    sp.Integer(2) ** (-P): ("2**(-p)", "1/2^p", "2^{- p}"),
    P ** sp.Rational(3, 2): ("p**(3/2)", "p^(3/2)", r"p^{\frac{3}{2}}"),
    P**12: ("p**12", "p¹²", "p^{12}"),
    (1 + P) ** 2: ("(1 + p)**2", "(1 + p)²", r"\left(p + 1\right)^{2}"),
    sp.Rational(1, 3) * (1 / (P + Q)): ("1/3*1/(p + q)", "1/3 1/(p + q)", r"\frac{1}{3\,\left(p + q\right)}"),
    sp.Abs(sp.Abs(R) - 1): ("abs(abs(r) - 1)", "abs(|r| − 1)", r"\left|{\left|{r}\right| - 1}\right|"),
    scalar("step_codes") * scalar("eps"): (
        "eps*step_codes",
        "ϵ step_codes",
        r"\epsilon\,\mathrm{step}_{\mathrm{codes}}",
    ),
}


@pytest.mark.parametrize("e", POWERS, ids=str)
def test_powers_and_names_in_three_dialects(e: sp.Expr) -> None:
    assert (text(e), pretty(e), latex(e)) == POWERS[e]


MEANT = {
    "2**p * sumsq(q)": "2^p ‖q‖²",
    "sum(exp(Z + A.T @ X))": "Σ exp(Z + Aᵀ X)",
    "sum(Z.T @ q) + sum(Z)": "Σ Z + Σ Zᵀ q",
    "sum(Z) * sum(Z.T @ Z)": "(Σ Z) (Σ Zᵀ Z)",
    "trace(Z.T @ Z) * Z": "Z tr(Z Zᵀ)",
    "sum(U[k] @ Z for k in K) @ Z.T": "(Σ_k U[k] Z) Zᵀ",
    "A @ sum(U[k].T @ X for k in K)": "A Σ_k U[k]ᵀ X",
    "Z * (A.T @ X)": "Z ⊙ (Aᵀ X)",
    "tanh(X - A @ Z)": "tanh(X − A Z)",
    "w @ ones(1, T) + Z": "Z + w 𝟏ᵀ",
    "nuclear(diag(q * nuclear(Z)))": "nuclear(diag(q ‖Z‖∗))",
    "layer_norm(Z, 1)": "layer_norm(Z, axis=1, eps=1/100000)",
    "logsumexp(q.T @ U[k].T @ y for k in K)": "lse_k(qᵀ U[k]ᵀ y)",
}


@pytest.mark.parametrize("formula", MEANT)
def test_products_and_sums_are_told_apart(formula: str) -> None:
    e = parse_matrix(formula, SCOPE)
    assert pretty(e) == MEANT[formula]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", ["sum({}, {})", "softmax({}, {})", "layer_norm({}, {})", "logsumexp({}, {})"])
def test_latex_says_the_axis(form: str, axis: int) -> None:
    shown = [latex(parse_matrix(form.format("Z", a), SCOPE)) for a in (axis, 1 - axis)]
    assert shown[0] != shown[1] and f"_{axis}" in shown[0].replace("{", "")


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [40, 80])
def test_wrapping_keeps_every_word_and_the_width(seed: int, width: int) -> None:
    shown = " + ".join(pretty(Random(10 * seed + i).expr(Z.rows, T, 2)) for i in range(6))
    lines = wrapped(shown, width)
    assert " ".join(" ".join(lines).split()) == " ".join(shown.split())
    longest = max(map(len, shown.split()))
    assert all(len(line) <= max(width, longest + 2) for line in lines) and len(lines) > 1


def test_a_formula_breaks_where_it_binds_least() -> None:
    assert wrapped("a (b + c + d) + e (f + g + h)", 20) == ["a (b + c + d)", "  + e (f + g + h)"]
    assert wrapped("short", 20) == ["short"]


def test_a_table_that_does_not_fit_is_narrowed_where_it_is_widest() -> None:
    rows = [("law", "measured"), ("a", "word " * 40)]
    lines = table(rows)
    assert all(len(line) <= WIDTH for line in lines) and len(lines) > 2 and lines[0].startswith("law   measured")
    assert table([("a", "b"), ("cc", "d")]) == ["a    b", "cc   d"] and K is not None
