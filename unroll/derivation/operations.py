"""Operations: what a text may do with its letters, each a function of the formula that it stands in, in one table."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import sympy as sp

from unroll.calculus.entropy import entropic, signed_parts
from unroll.calculus.linear import Linear, least, swept
from unroll.calculus.prox import conjugate_of_abs
from unroll.derivation.dealing import Share
from unroll.derivation.formulas import Formula, Operation, TextScope
from unroll.derivation.known import member, state_of
from unroll.language.constructors import add, hold, scale, zeros
from unroll.language.functions import Value
from unroll.language.nodes import Expr, Sym, depends, scalar
from unroll.language.show import text as shown
from unroll.language.traversal import held_at, substitute

MOST = 16
"""Probes of one divergence."""


def _grad(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return r.reading.grad(*_letter_at(r, args, node.keywords))


def _hess(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return r.reading.hessian(*_letter_at(r, args, node.keywords))


def _letter_at(r: Formula, args: list[ast.expr], keywords: list[ast.keyword]) -> tuple[Share, Sym, dict[Sym, Expr]]:
    """A letter, the variable that is meant, and the point; of g(K z), a value of K z. Of H(x, y), grad(H, x, y=last(y))."""
    share = r.share(args[0])
    places = dict(share.places)
    if len(places) == 1:
        z, put = share.variable, {share.variable: args[1]}
    else:
        name = args[1].id if isinstance(args[1], ast.Name) else ""
        if name not in places:
            hint = f"grad({share.letter.name}, {share.letter.argument}); at another point, grad(.., {share.letter.argument}=..)"
            r.fail(args[1], "E320", f"{r.source(args[1])} is none of the variables of {share.letter.name}", hint)
        z, put = places[name], {places[name]: args[1]}
    for k in keywords:
        if str(k.arg) not in places or len(places) == 1:
            r.fail(k.value, "E320", f"{share.letter.name} has no variable '{k.arg}' beside that one")
        put[places[str(k.arg)]] = k.value
    at = {v: r.matrix(e) for v, e in put.items()}
    for v, e in put.items():
        if at[v].shape != v.shape:
            what = (
                v.name
                if len(places) > 1
                else "the variable"
                if share.linear is None
                else f"{share.letter.operator} {r.reading.argument}"
            )
            r.fail(e, "E131", f"{r.source(e)} is {r.shape(at[v])}; {what} is {r.shape(v)}")
    return share, z, at


def _prox(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    v = r.matrix(args[1])
    t, share, conjugate = r.scaled(args[0])
    if share.e is not None and v.shape != share.variable.shape:
        r.fail(
            args[1], "E131", f"{r.source(args[1])} is {r.shape(v)}; {share.letter.name} takes {r.shape(share.variable)}"
        )
    if t.is_nonpositive:
        r.fail(args[0], "E132", f"the step of a prox is positive; {r.source(args[0])} has {t}")
    if not conjugate:
        return r.reading.prox(share, t, v)
    if not share.convex:
        r.fail(
            args[0],
            "E303",
            f"conj({share.letter.name}) needs what is convex, and {shown(cast(Expr, share.e))} is not known to be",
        )
    known = None if share.e is None else conjugate_of_abs(share.e, share.variable)
    if known is not None:
        return r.reading.prox(replace(share, e=known), t, v)
    t = r.reading.above_zero(t)
    return add(v, scale(-t, r.reading.prox(share, 1 / t, scale(1 / t, v))))  # Moreau


def _tangent(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    """The majorant of a letter, as a value: at the variable in argmin, through `scaled` in a prox."""
    share = r.majorant(node)
    z = cast(Expr, r.scope.names[share.letter.argument])
    if share.e is None:
        return zeros(1, 1)
    return substitute(share.e, {share.variable: z if share.linear is None else share.linear(z)})


def _div(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    reading = r.reading
    names = [a.id if isinstance(a, ast.Name) else "" for a in args]
    targets = [b.target for b in reading.assigns]
    last: Callable[[Any], int] = lambda s: max((i for i, t in enumerate(targets) if t is s), default=-1)
    z, at = (reading.names.get(n) for n in names)
    for a, s, known in zip(args, (z, at), (False, any(s.symbol is at for s in reading.states)), strict=True):
        if not isinstance(s, Sym) or (last(s) < 0 and not known):
            hint = "div(z, r): of the update of z, in r, from which it was worked out"
            r.fail(a, "E320", f"{r.source(a)} is no update above", hint)
    z, at = cast(Sym, z), cast(Sym, at)
    if last(z) < last(at):
        hint = f"div above the update of {names[1]}"
        r.fail(args[1], "E320", f"{names[1]} changes after {names[0]} was worked out", hint)
    value = cast(Expr, reading.assigns[last(z)].value)
    if not depends(value, at):
        r.fail(node, "E320", f"{names[0]} was not worked out from {names[1]}")
    if value.shape != at.shape:
        message = f"{names[0]} is {r.shape(value)}, {names[1]} is {r.shape(at)}: a divergence needs one shape"
        r.fail(node, "E131", message)
    return reading.divergence(z, value, at, *_probes(r, node, node.keywords))


def _probes(r: Formula, node: ast.Call, keywords: list[ast.keyword]) -> tuple[int, int]:
    """How many probes, none where that is not said, and the seed of the first."""
    said = {"probes": 0, "seed": 0}
    for k in keywords:
        value, least = r.value(k.value), 1 if k.arg == "probes" else 0
        if k.arg not in said or isinstance(value, Expr) or not value.is_Integer or not least <= value < 2**63:
            r.fail(
                k.value,
                "E320",
                f"{k.arg} of div is none of probes=1, 2, .. and seed=0, 1, ..",
                "div(z, r, probes=8, seed=1)",
            )
        said[k.arg] = int(value)
    if said["probes"] > MOST:
        r.fail(
            node,
            "E320",
            f"at most {MOST} probes: each is written out in every layer",
            "the closed form, where there is one",
        )
    if keywords and not said["probes"]:
        r.fail(keywords[0].value, "E320", "a seed without probes draws nothing", "div(z, r, probes=8, seed=1)")
    return said["probes"], said["seed"]


def _bregman(r: Formula, node: ast.Call, args: list[ast.expr], logs: bool = False) -> Expr:
    v = r.matrix(args[1])
    t, share, conjugate = r.scaled(args[0])
    if conjugate:
        name = "logbregman" if logs else "bregman"
        r.fail(args[0], "E320", f"{name} takes a letter, not its conjugate", f"{name}(t * g, v)")
    return v if share.e is None else entropic(share.e, share.variable, t, v, logs)


def _plus(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return signed_parts(r.matrix(args[0]))[0]


def _minus(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return signed_parts(r.matrix(args[0]))[1]


def _mu(r: Formula, node: ast.Call, args: list[ast.expr]) -> sp.Expr:
    return r.reading.convexity(r.share(args[0]).letter.name)


def _lipschitz(r: Formula, node: ast.Call, args: list[ast.expr]) -> Value:
    share = r.share(args[0])
    if len(share.places) > 1:
        if len(args) == 1:
            hint = f"L({share.letter.name}, {share.letter.argument}): in one of its variables"
            r.fail(node, "E105", f"{share.letter.name} is of several variables", hint)
        return r.reading.partial(*_letter_at(r, args, node.keywords))
    if len(args) > 1 or node.keywords:
        r.fail(node, "E105", f"{share.letter.name} is of one variable", f"L({share.letter.name})")
    return r.reading.lipschitz(share.letter.name)


def _norm(r: Formula, node: ast.Call, args: list[ast.expr]) -> sp.Expr:
    match args[0]:
        case ast.Call(func=ast.Name(id="stack"), args=[ast.Name(id=name)]) if shares := r.with_operator(name):
            found = [(member(name, i, shares), cast(Linear, s.linear)) for i, s in enumerate(shares)]
        case _:
            one = r.operator_of(args[0])
            if one is None:
                r.fail(
                    args[0],
                    "E320",
                    f"{r.source(args[0])} is not an operator of the algorithm",
                    "norm(K), norm(stack(K))",
                )
            found = [(one[0], one[1])]
    return r.reading.norm(found)


def _argmin(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    """argmin over the update that it is the value of."""
    return least(*_minimised(r, node, args[0], "argmin"))


def _minimised(r: Formula, node: ast.Call, formula: ast.expr, word: str) -> tuple[Expr, Sym]:
    """What is minimised, and over which variable: the update that it stands in."""
    reading = r.reading
    z = reading.places.get(reading.target)
    if z is None:
        r.fail(
            node,
            "E320",
            f"{word} is over the update it stands in, and {reading.target} is not a variable",
            f"{reading.argument}: {word}(...)",
        )
    names = {**r.scope.names, reading.target: z}
    inner = Formula(r.text, replace(cast(TextScope, r.scope), names=names), r.place, r.active)
    return held_at(inner.matrix(formula), reading.others(())), z


def _sweep(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    """A pass over the entries of the update that it is the value of."""
    e, z = _minimised(r, node, args[0], "sweep")
    return swept(e, z, r.reading.running[r.reading.target])


def _hold(r: Formula, node: ast.Call, args: list[ast.expr]) -> Expr:
    return hold(r.matrix(args[0]))


def _last(r: Formula, node: ast.Call, args: list[ast.expr]) -> Value:
    reading = r.reading
    match args[0]:
        case ast.Name(id=name):
            pass
        case ast.Subscript(value=ast.Name(id=family), slice=ast.Name(id=i)) if i in r.index:
            name = member(family, r.index[i], reading.indexed(i))
        case _:
            name = ""
    if not any(s.symbol is reading.names.get(name) for s in reading.states):
        r.fail(args[0], "E320", f"{r.source(args[0])} is not a state", "last(z) is z where the layer began")
    now = cast("Sym | sp.Symbol", reading.names[name])
    if name not in reading.written:
        if name == reading.target:
            r.fail(
                node,
                "E320",
                f"last({name}) in the update of {name} is {name} itself: nothing has changed it yet",
                f"keep the one before as a state: {name}_before",
            )
        return now
    if name not in reading.last:
        fresh = reading.fresh(f"{name}_last")
        reading.last[name] = (
            state_of(now, fresh) if isinstance(now, Sym) else scalar(fresh, positive=bool(now.is_positive))
        )
    return cast(Value, reading.last[name])


OPERATIONS = {
    "grad": Operation("grad(f, z): the gradient of f at z; of H(x, y), grad(H, x, y=..)", (2,), _grad, at=True),
    "prox": Operation("prox(t * g, v): argmin of t g(x) + |x - v|^2 / 2; of t * conj(g) too", (2,), _prox),
    "hess": Operation("hess(f, z): the matrix of second derivatives of f at a vector z", (2,), _hess, at=True),
    "tangent": Operation("tangent(g, p, abs): above g, linear in |z|, and equal at p; square: in z^2", (3,), _tangent),
    "bregman": Operation("bregman(t * g, v): argmin of t g(x) + sum(x log(x/v) - x + v)", (2,), _bregman),
    "logbregman": Operation("logbregman(t * g, w): log(bregman(t * g, exp(w)))", (2,), partial(_bregman, logs=True)),
    "plus": Operation("plus(e): the terms of e without a negative entry", (1,), _plus),
    "minus": Operation("minus(e): minus the others", (1,), _minus),
    "div": Operation(
        "div(z, r): the divergence of the update of z in r; an estimate of it, div(z, r, probes=8)", (2,), _div, at=True
    ),
    "mu": Operation("mu(f): a constant of strong convexity of f", (1,), _mu),
    "L": Operation("L(f): the Lipschitz constant of grad f; of H(x, y), L(H, x)", (1, 2), _lipschitz, at=True),
    "norm": Operation("norm(K), norm(stack(K)): the largest singular value", (1,), _norm),
    "argmin": Operation("argmin(f(z) + ...), over the update it stands in", (1,), _argmin),
    "sweep": Operation("sweep(f(z) + ...): one pass over the entries of the update it stands in", (1,), _sweep),
    "hold": Operation("hold(e): a constant for every derivation", (1,), _hold),
    "last": Operation("last(z): z where the layer began", (1,), _last),
}
