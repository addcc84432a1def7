"""Text -> a call of a rewrite -> the expression rewritten, from the outside in, with every place where the rule matched:
`unroll check` measures assumption and error there."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import sympy as sp

from unroll.derivation.rewrites.bounded import incoherence
from unroll.derivation.rewrites.catalogue import BY_NAME
from unroll.derivation.rewrites.patterns import descend
from unroll.derivation.rewrites.record import Applied, Argument, Call, Site
from unroll.errors import SpecError, did_you_mean, quote
from unroll.language.nodes import Expr, Sym
from unroll.language.parse import Place, Scope, parse
from unroll.language.show import text


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
    out = descend(e, rule, sites)
    return out, Applied(call.rewrite, call.values, block, tuple(dict.fromkeys(sites)))


def rewritten(e: Expr, done: tuple[Applied, ...]) -> Expr:
    """What rewrites that were applied elsewhere make of e."""
    for applied in done:
        e = descend(e, applied.rewrite.rule(**applied.values), [])
    return e


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


def assumption(call: Call) -> Expr | None:
    """The number that the assumption of a rewrite is about, where it does not depend on a place in a formula."""
    of = call.values.get("of")
    if call.rewrite.name == "incoherent" and isinstance(of, Sym):
        return incoherence(of)
    return None
