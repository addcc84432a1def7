"""Learning: a free parameter takes the place of a derived sub-expression and starts at its value.

    structural   the sub-expression stands in the step as it is (its transpose too): step * A.T in z + step * A.T @ (x - A @ z)
    algebraic    it is there once products are expanded: I - step * A.T @ A in z - step * A.T @ A @ z + step * A.T @ x
    scalar       a product of scalars in a coefficient or in the derived prox: step * lam in the threshold

What is not found is an error that shows the step, never a parameter that does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp

from unroll.algorithms import LIPSCHITZ, MOMENTUM, STEP, state_of
from unroll.calculus.prox import derive as derive_prox
from unroll.errors import SpecError, Where
from unroll.expr import (
    Add,
    Expr,
    Eye,
    Map,
    Mul,
    Prox,
    Sym,
    add,
    as_constant,
    elementwise,
    expand,
    eye,
    is_symmetric,
    matmul,
    prox,
    scalar,
    scale,
    split,
    substitute_scalars,
    symbol,
    transform,
    transpose,
    walk,
)  # fmt: skip
from unroll.functions import Value
from unroll.parse import parse
from unroll.problem import Problem, place_of
from unroll.show import text
from unroll.spec import Spec
from unroll.spec.schema import Learn
from unroll.step import Assign, Constraint, Learned, Step

PLACES = ("gradient", "prox")
"""Where an occurrence may be: in the gradient step (all that is fed to the prox), or in the prox itself."""

Word = tuple[Expr, ...]


@dataclass(frozen=True)
class _Wanted:
    """One entry of `learn:`, read."""

    name: str
    record: Learn
    value: Value
    where: Where


def parametrise(step: Step, problem: Problem, spec: Spec) -> Step:
    """The step with learned parameters in place. Raises SpecError E305 (not found), E306 (a constraint that does not apply)."""
    assert spec.unroll is not None
    wanted = [_read(name, step, problem, spec) for name in spec.unroll.learn]
    for w in sorted(wanted, key=_size, reverse=True):  # what is larger takes its words first
        step = _replace(step, w)
    order = list(spec.unroll.learn)
    learned = tuple(sorted(step.learned, key=lambda p: order.index(p.name)))
    return _without_unused(replace(step, learned=learned))


def _shape_fits(name: str, record: Learn, problem: Problem, where: Where) -> None:
    """A scalar may be repeated over the entries of the variable, and over nothing else."""
    (z,) = problem.variables
    sizes = {**{d.name: d for d in problem.dims}, **{str(d): d for d in z.shape}}
    shape = [sizes.get(str(n), sp.Integer(n) if isinstance(n, int) else None) for n in record.shape or ()]
    if shape and shape != [z.rows]:
        raise SpecError("E306", f"the shape of {name} is not that of {z.name}", where, f"shape: [{z.rows}] gives every entry of {z.name} its own")


def _read(name: str, step: Step, problem: Problem, spec: Spec) -> _Wanted:
    assert spec.unroll is not None
    record, path = spec.unroll.learn[name], ("unroll", "learn", name)
    states = {s.name: s for z in problem.variables for s in [state_of(z)]}
    names: dict[str, Value] = {**problem.scope.names, **states, "step": STEP, "L": LIPSCHITZ, "momentum": MOMENTUM}
    where = spec.key_where(*path)
    _shape_fits(name, record, problem, where)
    if name in names:
        raise SpecError("E306", f"'{name}' is already the name of something else", where, "choose another name for the parameter")
    value = parse(record.replaces, replace(problem.scope, names=names), place_of(spec, *path, "replaces"))
    if isinstance(value, Expr) and (c := as_constant(value)) is not None and value.is_scalar:
        value = c
    if MOMENTUM in (value.scalars if isinstance(value, Expr) else value.free_symbols) and any(a.target == MOMENTUM for a in step.assigns):
        hint = "learn the step or a matrix; momentum follows its schedule"
        raise SpecError("E307", "learning the momentum is not built yet: it starts at another value in each layer", where, hint)
    for field, used in (("bias", record.bias),):
        if used:
            raise SpecError("E307", f"'{field}' is accepted by the language, but not built yet", spec.key_where(*path, field))
    if record.where is not None and record.where not in PLACES:
        raise SpecError("E306", f"'{record.where}' is not a place in a step", spec.key_where(*path, "where"), f"places: {', '.join(PLACES)}")
    return _Wanted(name, record, value, spec.origin(*path, "replaces").where())


def _size(w: _Wanted) -> tuple[int, int]:
    if not isinstance(w.value, Expr):
        return (0, len(w.value.free_symbols))
    words = _words(w.value)
    return (len(words), max(len(f) for _, f in words))


def _replace(step: Step, w: _Wanted) -> Step:
    learned = _learned(w)
    swap = _swap_matrix if isinstance(w.value, Expr) else _swap_scalar
    assigns = tuple(replace(a, value=swap(a.value, w, learned)) for a in step.assigns)
    if assigns == step.assigns:
        body = "; ".join(f"{_name(a.target)} = {text(expand(a.value) if isinstance(a.value, Expr) else a.value)}" for a in step.assigns)
        raise SpecError(
            "E305", f"{w.record.replaces.strip()} does not occur in the step" + (f" ({w.record.where})" if w.record.where else ""), w.where,
            "it must be a sub-expression of the step, up to expanding products", (f"the step: {body}",),
        )  # fmt: skip
    assigns = tuple(replace(a, note=_note(a)) for a in assigns)
    return replace(step, assigns=assigns, learned=(*step.learned, learned))


def _name(target: Sym | sp.Symbol) -> str:
    return target.name


def _note(a: Assign) -> str:
    return f"{_name(a.target)} <- {text(a.value)}" if a.note and isinstance(a.value, Expr) else a.note


def _learned(w: _Wanted) -> Learned:
    record, value = w.record, w.value
    constraint = _constraint(w)
    per_layer = record.share == "none"
    if isinstance(value, Expr):
        if record.shape is not None:
            raise SpecError("E306", f"{w.name} takes the place of a matrix; its shape is that matrix's", w.where, "leave out 'shape'")
        shape = value.shape if value.cols != 1 else (value.rows,)
        return Learned(w.name, symbol(w.name, *value.shape, "learned"), value, shape, per_layer, constraint, record.replaces)
    shape = tuple(sp.Integer(n) if isinstance(n, int) else sp.Symbol(n, integer=True, positive=True) for n in record.shape or ())
    s = scalar(w.name, positive=bool(value.is_positive) or record.positive)
    return Learned(w.name, s, value, shape, per_layer, constraint, record.replaces)


def _constraint(w: _Wanted) -> Constraint:
    record, value = w.record, w.value
    asked: list[Constraint] = []
    asked += ["positive"] if record.positive else []
    asked += ["symmetric"] if record.symmetric else []
    asked += ["unit_columns"] if record.columns == "unit" else []
    if len(asked) > 1:
        raise SpecError("E306", f"{w.name} has two constraints, {' and '.join(asked)}; one can be kept", w.where)
    match asked:
        case ["symmetric"] if not isinstance(value, Expr) or value.rows != value.cols:
            raise SpecError("E306", f"{w.name} cannot be symmetric: it is not a square matrix", w.where)
        case ["unit_columns"] if not isinstance(value, Expr):
            raise SpecError("E306", f"{w.name} has no columns: it is a number", w.where)
        case ["positive"] if not isinstance(value, Expr) and value.is_nonpositive:
            raise SpecError("E306", f"{w.name} cannot be positive: it starts at {value}", w.where)
        case _:
            return asked[0] if asked else "none"


# --- matrices ---------------------------------------------------------------------------------------------------------


def _swap_matrix(value: Expr | sp.Expr, w: _Wanted, learned: Learned) -> Expr | sp.Expr:
    assert isinstance(w.value, Expr) and isinstance(learned.symbol, Sym)
    if not isinstance(value, Expr) or w.record.where == "prox":
        return value
    pattern, into = w.value, learned.symbol

    def inside(e: Expr) -> Expr:
        """The pattern lives in what is fed to the prox, not in the term that the prox belongs to."""
        if isinstance(e, Prox):
            return prox(e.term, e.variable, e.t, inside(e.at), e.swaps)
        found = structural(e, pattern, into)
        if found is e:
            found = algebraic(e, pattern, into)
        return found

    return inside(value)


def structural(e: Expr, pattern: Expr, into: Expr) -> Expr:
    """Every occurrence of `pattern` as it is written, and transposed, replaced by `into`."""
    swaps = [(pattern, into)] + ([] if is_symmetric(pattern) else [(transpose(pattern), transpose(into))])

    def rule(node: Expr) -> Expr | None:
        for p, x in swaps:
            if node is p:
                return x
            if isinstance(node, Mul) and (found := _in_product(node, p, x)) is not None:
                return rule(found) or found
        return None

    return transform(e, rule)


def _in_product(node: Mul, pattern: Expr, into: Expr) -> Expr | None:
    """c * ... F1 F2 ... with the factors of the pattern in a row, and its coefficient in c."""
    c, body = split(pattern)
    factors = body.factors if isinstance(body, Mul) else (body,)
    if isinstance(body, Eye):
        if c == 1 or not _divides(c, node.coef) or node.rows != body.n:
            return None
        return matmul(into, *node.factors, coef=node.coef / c)
    if not _divides(c, node.coef):
        return None
    n = len(factors)
    for i in range(len(node.factors) - n + 1):
        if node.factors[i : i + n] == factors:
            return matmul(eye(node.rows), *node.factors[:i], into, *node.factors[i + n :], coef=node.coef / c)
    return None


def _divides(c: sp.Expr, coef: sp.Expr) -> bool:
    """Is coef = c * (something without the symbols of c)?"""
    return not (coef / c).free_symbols & c.free_symbols


def _words(e: Expr) -> list[tuple[sp.Expr, Word]]:
    """The terms of an expanded matrix polynomial: coefficient and factors; the identity is the empty word."""
    out: list[tuple[sp.Expr, Word]] = []
    whole = expand(e)
    for t in whole.terms if isinstance(whole, Add) else (whole,):
        c, body = split(t)
        out.append((c, () if isinstance(body, Eye) else body.factors if isinstance(body, Mul) else (body,)))
    return out


def algebraic(e: Expr, pattern: Expr, into: Expr) -> Expr:
    """Division of matrix polynomials: sum of a * P w_i S over the words w_i of the pattern becomes a * P @ into @ S."""
    words = _words(pattern)
    if len(words) < 2:  # one product: it is there once e is expanded, or not at all
        flat = expand(e)
        found_in = structural(flat, pattern, into)
        return e if found_in is flat else found_in
    lead_c, lead = max(words, key=lambda cw: len(cw[1]))
    terms = dict((f, c) for c, f in _words(e))
    found = list[Expr]()
    for whole, c in list(terms.items()):
        for i in range(len(whole) - len(lead) + 1):
            if whole[i : i + len(lead)] != lead or whole not in terms:
                continue
            a, before, after = c / lead_c, whole[:i], whole[i + len(lead) :]
            needed = {(*before, *w, *after): a * k for k, w in words}
            if all(sp.expand(terms.get(f, sp.Integer(0)) - k) == 0 for f, k in needed.items()):
                for f in needed:
                    del terms[f]
                found.append(matmul(eye(e.rows), *before, into, *after, coef=a))
    if not found:
        return e
    rest = [scale(c, matmul(*f) if f else eye(e.rows)) for f, c in terms.items()]
    return add(*found, *rest)


# --- scalars ----------------------------------------------------------------------------------------------------------


def _swap_scalar(value: Expr | sp.Expr, w: _Wanted, learned: Learned) -> Expr | sp.Expr:
    assert isinstance(w.value, sp.Expr) and isinstance(learned.symbol, sp.Symbol)
    old, new, place = w.value, learned.symbol, w.record.where
    if not isinstance(value, Expr):
        return value.subs(old, new)

    def coefficient(c: sp.Expr) -> sp.Expr:
        if isinstance(c, sp.Add):
            return sp.Add(*map(coefficient, c.args))
        return c.subs(old, new) if old.is_Symbol else c / old * new if _divides(old, c) and old.free_symbols <= c.free_symbols else c

    def rule(node: Expr) -> Expr | None:
        match node:
            case Mul(c, factors) if place != "prox":
                return matmul(*factors, coef=coefficient(c))
            case Map(profile, args) if place != "prox":
                return elementwise(profile.subs(old, new), *args)
            case _:
                return None

    def inside(e: Expr) -> Expr:
        if isinstance(e, Prox):
            at = inside(e.at)
            return _swap_in_prox(prox(e.term, e.variable, e.t, at, e.swaps), old, new) if place != "gradient" else prox(e.term, e.variable, e.t, at, e.swaps)
        return transform(e, rule)

    return inside(value)


def _swap_in_prox(e: Expr, old: sp.Expr, new: sp.Symbol) -> Expr:
    """The scalar replaced in the derived formula, if it is there: `step * lam` is the threshold of prox of step * lam * |.|_1."""
    assert isinstance(e, Prox)
    if old.is_Symbol:
        swaps = tuple((a.subs(old, new), b) for a, b in e.swaps)
        return prox(substitute_scalars(e.term, {old: new}), e.variable, e.t.subs(old, new), e.at, swaps)
    fresh = prox(e.term, e.variable, e.t, e.at, (*e.swaps, (old, new)))
    assert isinstance(fresh, Prox)
    if not any(_occurs(old, x) for x in walk(_derived(e))):
        return e
    return fresh if any(new in _scalars(x) for x in walk(_derived(fresh))) else e


def _derived(e: Prox) -> Expr:
    return derive_prox(e.term, e.variable, e.t, e.at, e.swaps).step


def _occurs(product: sp.Expr, e: Expr) -> bool:
    """Is the product a part of a product in the derived scalar prox of e?"""
    found = getattr(e, "prox", None)
    wanted = product.as_powers_dict()
    factors = [m.as_powers_dict() for x in (found.expressions() if found is not None else ()) for m in x.atoms(sp.Mul)]
    return any(all(f.get(base, 0) / power >= 1 for base, power in wanted.items()) for f in factors)


def _scalars(e: Expr) -> set[sp.Symbol]:
    found = getattr(e, "prox", None)
    return set(e.scalars) | (set(found.scalars) if found is not None else set())


# --- what is no longer needed -----------------------------------------------------------------------------------------


def used_scalars(e: Expr) -> set[sp.Symbol]:
    """Scalars of an expression, those of derived proxes in it included."""
    out: set[sp.Symbol] = set(e.scalars)
    for node in walk(e):
        if isinstance(node, Prox):
            step = derive_prox(node.term, node.variable, node.t, node.at, node.swaps).step
            own = set().union(*(_scalars(x) for x in walk(step)))
            out = (out - set(node.term.scalars) - node.t.free_symbols) | own | set(node.at.scalars)  # type: ignore[operator]
    return out


def _without_unused(step: Step) -> Step:
    """Assignments to numbers that nothing reads any more (a momentum counter once momentum is learned) are dropped."""
    read = set[sp.Basic]().union(*(used_scalars(a.value) for a in step.assigns if isinstance(a.value, Expr)))
    numbers = [a for a in step.assigns if isinstance(a.target, sp.Symbol)]
    for _ in numbers:  # what a number that is read needs is read too
        read |= set[sp.Basic]().union(*(a.value.free_symbols for a in numbers if a.target in read))
    kept = [a for a in step.assigns if isinstance(a.target, Sym) or a.target in read]
    targets = {a.target for a in kept}
    return replace(step, assigns=tuple(kept), states=tuple(s for s in step.states if isinstance(s.symbol, Sym) or s.symbol in targets))

