"""Expression text -> Expr. A subset of Python expressions, read through `ast` with an allow-list; nothing is ever evaluated.

A value is an `Expr` (matrix) or a SymPy expression (number, size, weight). Every error carries the place of the text at fault.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Self, TypeVar

import sympy as sp

from unroll.errors import DeriveError, SpecError, Where, did_you_mean, quote
from unroll.language.constructors import (
    add,
    as_constant,
    constant,
    elementwise,
    family_logsumexp,
    family_softmax,
    family_sum,
    matmul,
    member,
    ones,
    scale,
    spectral,
    spectral_map,
    swap,
    transpose,
)
from unroll.language.functions import BY_NAME, ELEMENTWISE_BY_NAME, SETS_BY_NAME, Kind, Set, Value, as_expr
from unroll.language.nodes import Expr, Hold, Mul, ShapeError, Sym, Worked, same, show_shape, slot

LENGTH, DEPTH, DIGITS, EXPONENT = 10_000, 60, 40, 64
"""Most characters of a formula, levels of brackets, digits of a number, and size of a numeric exponent."""

Place = Callable[[int, int], Where | None]
V = TypeVar("V", sp.Expr, Expr)


def nowhere(start: int, length: int) -> None:
    """The place of text that is in no file."""


@dataclass(frozen=True)
class Macro:
    """A function of the spec: parameters and body text."""

    name: str
    parameters: tuple[str, ...]
    body: str
    place: Place = nowhere


@dataclass(frozen=True)
class Scope:
    """What names mean. sizes: numbers known for dims, for messages. broadcast: let size-1 axes repeat (derived formulas do)."""

    names: Mapping[str, Value] = field(default_factory=dict[str, Value])
    macros: Mapping[str, Macro] = field(default_factory=dict[str, Macro])
    declared: Mapping[str, str] = field(default_factory=dict[str, str])
    sizes: Mapping[sp.Symbol, Any] = field(default_factory=dict[sp.Symbol, Any])
    broadcast: bool = False


def parse(text: str, scope: Scope, place: Place = nowhere) -> Value:
    """The value of a formula. Raises SpecError (E1xx) with the place of what is wrong."""
    return Reader(text, scope, place).read()


def parse_matrix(text: str, scope: Scope, place: Place = nowhere) -> Expr:
    """The value of a formula as a matrix expression; a number becomes 1 × 1."""
    return as_expr(parse(text, scope, place))


def parse_member(text: str, scope: Scope, place: Place = nowhere) -> tuple[Value, str, sp.Expr | None]:
    """(value, index, size) of `f(U[k]) for k in K`, one value for each member; of a plain formula (value, "", None)."""
    return Reader(text, scope, place).member()


def parse_constraint(text: str, scope: Scope, place: Place = nowhere) -> Expr:
    """`z >= 0`, `z <= b`, `z in simplex`, `z in box(0, 1)` -> the indicator of the set. Raises SpecError E132 where no variable is in it."""
    found = Reader(text, scope, place).constraint()
    if all(s.role in ("input", "parameter") for s in found.symbols):
        message, hint = (
            f"{text} says nothing about a variable",
            "what holds for data is declared where they are: positive: true, columns: unit",
        )
        raise SpecError("E132", message, place(0, len(text)), hint)
    return found


def parse_signature(text: str, place: Place = nowhere) -> tuple[str, tuple[str, ...]]:
    """`R(Y, a)` -> ("R", ("Y", "a"))."""
    return Reader(text, Scope(), place).signature()


@dataclass(frozen=True)
class Condition:
    """A comparison, for `where`: a SymPy relation in slots of `args`."""

    relation: Any
    args: tuple[Expr, ...]


OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.MatMult: "@",
}  # fmt: skip
RELATIONS: dict[type[ast.cmpop], Any] = {
    ast.Lt: sp.Lt, ast.LtE: sp.Le, ast.Gt: sp.Gt, ast.GtE: sp.Ge, ast.Eq: sp.Eq, ast.NotEq: sp.Ne,
}  # fmt: skip


NAMED = ("axis", "eps", "weight", "bias", "probes")
"""Arguments that may be written with their name."""
FAMILIES: dict[str, Callable[[str, Any, Expr], Expr]] = {"sum": family_sum, "logsumexp": family_logsumexp}
"""What can be taken over the members of a family."""


class Reader:
    """One formula: its text, what its names mean, where it stands, and which macros are being expanded."""

    undeclared = "declare it under variables, inputs, parameters, scalars or dims"

    def __init__(self, text: str, scope: Scope, place: Place, active: tuple[str, ...] = ()) -> None:
        self.text, self.scope, self.place, self.active = text, scope, place, active
        self.lines = text.split("\n")

    # --- text to tree ---

    def tree(self) -> ast.expr:
        self._limits()
        try:
            return ast.parse(f"({self.text}\n)", mode="eval").body
        except SyntaxError as e:
            self._syntax(e)
        except (RecursionError, MemoryError):
            self.fail_at(0, 1, "E104", "this formula is nested too deeply")
        except ValueError as e:
            self.fail_at(0, 1, "E100", f"this is not a formula: {e}")

    def _limits(self) -> None:
        if not self.text.strip():
            self.fail_at(0, 1, "E100", "the formula is empty")
        if len(self.text) > LENGTH:
            self.fail_at(LENGTH, 1, "E104", f"this formula has {len(self.text)} characters; at most {LENGTH} are read")
        depth = 0
        for i, c in enumerate(self.text):
            depth += (c in "([{") - (c in ")]}")
            if depth > DEPTH:
                self.fail_at(
                    i, 1, "E104", f"brackets are nested more than {DEPTH} deep here", "name a part under 'functions:'"
                )
            if depth < 0:
                self.fail_at(i, 1, "E100", f"'{c}' closes a bracket that was not opened")
        if "\0" in self.text:
            self.fail_at(self.text.index("\0"), 1, "E100", "a formula cannot contain a NUL character")

    def _syntax(self, e: SyntaxError) -> NoReturn:
        line = min((e.lineno or 1) - 1, len(self.lines) - 1)
        at = self._index(line, (e.offset or 1) - 1 - (line == 0), chars=True)
        hint = ""
        if "^" in self.text:
            at, hint = self.text.index("^"), "a power is written **"
        elif "'" in self.text:
            at, hint = self.text.index("'"), "a transpose is written A.T"
        elif "|" in self.text:
            at, hint = self.text.index("|"), "write norm1(z), norm2(z), sumsq(z) or abs(z)"
        message = (
            (e.msg or "invalid syntax")
            .split(". Perhaps")[0]
            .replace("invalid syntax", "this cannot be read as a formula")
        )
        self.fail_at(min(at, max(len(self.text) - 1, 0)), 1, "E100", message, hint)

    def _index(self, line: int, column: int, chars: bool = False) -> int:
        before = sum(len(s) + 1 for s in self.lines[:line])
        if line >= len(self.lines):
            return len(self.text)
        row = self.lines[line]
        return before + (max(column, 0) if chars else len(row.encode()[: max(column, 0)].decode(errors="ignore")))

    def span(self, node: ast.AST) -> tuple[int, int]:
        n: Any = node
        start = self._index(n.lineno - 1, n.col_offset - (n.lineno == 1))
        end = self._index(n.end_lineno - 1, n.end_col_offset - (n.end_lineno == 1))
        return start, max(end - start, 1)

    def source(self, node: ast.AST) -> str:
        start, length = self.span(node)
        return quote(self.text[start : start + length])

    # --- errors ---

    def fail_at(
        self, start: int, length: int, code: str, message: str, hint: str = "", notes: tuple[str, ...] = ()
    ) -> NoReturn:
        raise SpecError(code, message, self.place(start, length), hint, notes) from None

    def fail(self, node: ast.AST, code: str, message: str, hint: str = "", notes: tuple[str, ...] = ()) -> NoReturn:
        self.fail_at(*self.span(node), code, message, hint, notes)

    def shape(self, value: Value) -> str:
        """'m × n = 64 × 256', or 'm × n' while sizes are open."""
        e = as_expr(value)
        shown = show_shape(e.shape)
        known = show_shape((swap(e.rows, self.scope.sizes), swap(e.cols, self.scope.sizes)))
        return shown if shown == known else f"{shown} = {known}"

    def declared(self, *nodes: ast.AST) -> tuple[str, ...]:
        names = dict.fromkeys(n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name))
        return tuple(f"{n} was declared {self.scope.declared[n]}" for n in names if n in self.scope.declared)

    # --- entry points ---

    def read(self) -> Value:
        tree = self.tree()
        return self.value(tree)

    def value(self, tree: ast.expr) -> Value:
        try:
            value = self.visit(tree)
        except RecursionError:
            self.fail_at(0, 1, "E104", "this formula is nested too deeply", "name a part under 'functions:'")
        if isinstance(value, Condition):
            self.fail(
                tree,
                "E132",
                f"{self.source(tree)} is a comparison, not a value",
                "where(condition, a, b) chooses by one; constraints go under 'constraints:'",
            )
        return value

    def member(self) -> tuple[Value, str, sp.Expr | None]:
        tree = self.tree()
        if not isinstance(tree, ast.GeneratorExp):
            return self.value(tree), "", None
        inner, index, size = self._scope_of(tree)
        return inner.value(tree.elt), index, size

    def signature(self) -> tuple[str, tuple[str, ...]]:
        tree = self.tree()
        match tree:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if all(isinstance(a, ast.Name) for a in args):
                return name, tuple(a.id for a in args if isinstance(a, ast.Name))
            case _:
                self.fail(
                    tree, "E100", f"{self.source(tree)} does not declare a function", "write it as name(x, y): formula"
                )

    def constraint(self) -> Expr:
        tree = self.tree()
        match tree:
            case ast.Compare(left=left, ops=[ast.In()], comparators=[right]):
                found, params = self._set(right)
                return self._built(tree, lambda: found.indicator(self.matrix(left), *params))
            case ast.Compare(left=left, ops=[ast.GtE()], comparators=[right]):
                return self._bound(tree, self.matrix(left), right, below=True)
            case ast.Compare(left=left, ops=[ast.LtE()], comparators=[right]):
                return self._bound(tree, self.matrix(left), right, below=False)
            case ast.Compare(left=low, ops=[ast.LtE(), ast.LtE()], comparators=[x, high]):
                return SETS_BY_NAME["box"].indicator(self.matrix(x), self.number(low), self.number(high))
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                return self._affine(tree, left, right)
            case _:
                self.fail(
                    tree,
                    "E106",
                    f"{self.source(tree)} is not a constraint",
                    "write x >= 0, a <= x <= b, A @ x == b, or x in SET",
                )

    def _bound(self, tree: ast.expr, x: Expr, limit: ast.expr, below: bool) -> Expr:
        value = self.number(limit)
        if below and value == 0:
            return SETS_BY_NAME["nonneg"].indicator(x)
        return SETS_BY_NAME["box"].indicator(x, *((value, sp.oo) if below else (-sp.oo, value)))

    def _affine(self, tree: ast.expr, left: ast.expr, right: ast.expr) -> Expr:
        match left:
            case ast.BinOp(left=a, op=ast.MatMult(), right=x):
                return self._built(
                    tree, lambda: SETS_BY_NAME["affine"].indicator(self.matrix(x), self.matrix(a), self.matrix(right))
                )
            case ast.Call(func=ast.Name(id="sum"), args=[x, *axis], keywords=[]) if len(axis) < 2:
                return self._sums(tree, self.matrix(x), int(self._as_kind(axis[0], "axis")) if axis else None, right)
            case ast.Call(func=ast.Name(id="sum"), args=[x], keywords=[ast.keyword(arg="axis", value=axis)]):
                return self._sums(tree, self.matrix(x), int(self._as_kind(axis, "axis")), right)
            case ast.Call(func=ast.Name(id="dot"), args=[a, x], keywords=[]):
                weights, e = self.matrix(a), self.matrix(x)
                weights, e = (weights, e) if any(s.role == "variable" for s in e.symbols) else (e, weights)
                if e.cols != 1 or weights.shape != e.shape:
                    self.fail(
                        tree,
                        "E131",
                        f"{self.source(left)} is of {self.shape(weights)} and {self.shape(e)}; two vectors of one length are needed here",
                    )
                value = as_expr(self.value(right))
                return self._built(tree, lambda: SETS_BY_NAME["affine"].indicator(e, transpose(weights), value))
            case _:
                self.fail(
                    tree,
                    "E106",
                    f"{self.source(tree)} is not a constraint that is known",
                    "an equality constraint is written A @ x == b, dot(a, x) == b or sum(x) == b",
                )

    def _sums(self, tree: ast.expr, x: Expr, axis: int | None, right: ast.expr) -> Expr:
        """sum(x) == s of a vector; of a matrix, sum(X, axis=0) == b of each column, sum(X, axis=1) == a of each row."""
        if axis is None and x.cols != 1:
            self.fail(
                tree,
                "E106",
                f"{self.source(tree)} adds up a whole matrix",
                "sum(X, axis=0) == b of its columns, sum(X, axis=1) == a of its rows",
            )
        x, value = transpose(x) if axis == 1 else x, as_expr(self.value(right))
        value = constant(c, 1, x.cols) if (c := as_constant(value)) is not None else value
        value = transpose(value) if value.cols == 1 else value
        if not (value.rows == 1 and same(value.cols, x.cols)):
            self.fail(
                right,
                "E131",
                f"{self.source(right)} is {self.shape(value)}, for {x.cols} sums",
                notes=self.declared(right),
            )
        return SETS_BY_NAME["affine"].indicator(x, ones(1, x.rows), value)

    def _set(self, node: ast.expr) -> tuple[Set, tuple[Any, ...]]:
        match node:
            case ast.Name(id=name):
                args: list[ast.expr] = []
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                pass
            case _:
                self.fail(node, "E106", f"{self.source(node)} is not a set", f"sets: {', '.join(SETS_BY_NAME)}")
        found = SETS_BY_NAME.get(name)
        if found is None:
            self.fail(
                node,
                "E106",
                f"unknown set '{quote(name)}'",
                did_you_mean(name, SETS_BY_NAME) or f"sets: {', '.join(SETS_BY_NAME)}",
            )
        least = len(found.kinds) - found.optional
        if not least <= len(args) <= len(found.kinds):
            wanted = str(least) if not found.optional else f"{least} to {len(found.kinds)}"
            self.fail(node, "E105", f"the set {name} takes {wanted} parameters, not {len(args)}", found.about)
        return found, tuple(self._as_kind(a, k) for a, k in zip(args, found.kinds, strict=False))

    # --- nodes ---

    def visit(self, node: ast.expr) -> Value | Condition:
        match node:
            case ast.Constant(value=v) if isinstance(v, int | float) and not isinstance(v, bool):
                return self._number(node)
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                value = self.value(x)
                return scale(-1, value) if isinstance(value, Expr) else -value
            case ast.UnaryOp(op=ast.UAdd(), operand=x):
                return self.value(x)
            case ast.BinOp(left=a, op=op, right=b) if type(op) in OPERATORS:
                return self._binary(node, a, OPERATORS[type(op)], b)
            case ast.Attribute(value=x, attr="T"):
                return self._built(node, lambda: transpose(self.matrix(x)))
            case ast.Attribute(attr=attr):
                self.fail(
                    node,
                    "E103",
                    f".{quote(attr)} is not part of the language",
                    "the only attribute is .T, the transpose",
                )
            case ast.Subscript(value=x, slice=i):
                return self._member(node, x, i)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self._call(node, name, args, keywords)
            case ast.Compare(left=a, ops=[op], comparators=[b]) if type(op) in RELATIONS:
                return self._compare(node, a, RELATIONS[type(op)], b)
            case ast.BoolOp(op=op, values=values):
                return self._joined(sp.And if isinstance(op, ast.And) else sp.Or, values)
            case ast.BinOp(left=a, op=ast.BitAnd() | ast.BitOr() as op, right=b):
                return self._joined(sp.And if isinstance(op, ast.BitAnd) else sp.Or, [a, b])
            case ast.BinOp(op=op):
                self.fail(
                    node,
                    "E103",
                    f"this operator is not part of the language: {self.source(node)}",
                    "operators: + - * / ** @" if not isinstance(op, ast.BitXor) else "a power is written **",
                )
            case _:
                self.fail(
                    node,
                    "E103",
                    f"not part of the language: {self.source(node)}",
                    "formulas have numbers, names, + - * / ** @ .T, U[k] and the functions of 'unroll list functions'",
                )

    def _number(self, node: ast.Constant) -> sp.Expr:
        start, length = self.span(node)
        written = self.text[start : start + length].replace("_", "")
        if len(written) > DIGITS or not math.isfinite(float(node.value)):  # type: ignore[arg-type]
            self.fail(node, "E104", f"the number {quote(written, 20)} is too large or too long")
        return sp.Rational(written) if written[:2].lower() not in ("0x", "0b", "0o") else sp.Integer(int(node.value))  # type: ignore[arg-type]

    def _name(self, node: ast.Name, name: str) -> Value:
        value = self.scope.names.get(name)
        if value is None:
            if name == "inf":
                return sp.oo
            if name == "pi":
                return sp.pi
            known = [
                n for n in (*self.scope.names, *self.scope.macros, *BY_NAME, *ELEMENTWISE_BY_NAME) if n.isidentifier()
            ]
            hint = did_you_mean(name, known) or self.undeclared
            if name in BY_NAME or name in ELEMENTWISE_BY_NAME or name in self.scope.macros:
                self.fail(node, "E132", f"{name} is a function; it needs arguments", f"{name}(...)")
            self.fail(node, "E101", f"unknown name '{quote(name)}'", hint)
        if isinstance(value, Sym) and value.family is not None:
            self.fail(
                node,
                "E132",
                f"{name} is a family of matrices; a formula takes one member",
                f"{name}[k] inside sum(... for k in {value.family})",
            )
        return value

    def _member(self, node: ast.Subscript, x: ast.expr, i: ast.expr) -> Expr:
        family = self.scope.names.get(x.id) if isinstance(x, ast.Name) else None
        if not (isinstance(family, Sym) and family.family is not None):
            self.fail(
                node,
                "E103",
                f"{self.source(x)} is not a family, so it has no members",
                "declare a family with three sizes, U: [K, d, p]; entries of a matrix cannot be indexed",
            )
        index = self.scope.names.get(f"[{i.id}]") if isinstance(i, ast.Name) else None
        if index is None:
            self.fail(
                i,
                "E101",
                f"'{self.source(i)}' is not an index",
                f"members are summed: sum(f({family.name}[k]) for k in {family.family})",
            )
        if not same(index, family.family):  # type: ignore[arg-type]
            self.fail(i, "E131", f"the index runs over {index}, but {family.name} has {family.family} members")
        return member(family, i.id)  # type: ignore[union-attr]

    def _binary(self, node: ast.BinOp, a: ast.expr, op: str, b: ast.expr) -> Value:
        x, y = self.value(a), self.value(b)
        if not isinstance(x, Expr) and not isinstance(y, Expr):
            return self._arithmetic(node, x, op, y)
        if op == "@":
            return self._matmul(node, a, b, as_expr(x), as_expr(y))
        if op == "**" and isinstance(y, Expr):
            self.fail(b, "E132", f"the exponent {self.source(b)} is a matrix; it must be a number")
        if isinstance(x, Expr) and isinstance(y, Expr):
            self._fit(node, a, b, x, y)
        match op:
            case "+":
                return self._sum(x, y)
            case "-":
                return self._sum(x, scale(-1, y) if isinstance(y, Expr) else -y)
            case "*":
                return (
                    scale(y, as_expr(x))
                    if not isinstance(y, Expr)
                    else scale(x, y)
                    if not isinstance(x, Expr)
                    else elementwise(slot(0) * slot(1), x, y)
                )
            case "/":
                return self._real(node, self._quotient(node, x, y))
            case _:
                return self._real(node, elementwise(slot(0) ** self._exponent(b, y), as_expr(x)))

    def _arithmetic(self, node: ast.BinOp, x: sp.Expr, op: str, y: sp.Expr) -> sp.Expr:
        match op:
            case "+":
                return self._real(node, x + y)
            case "-":
                return self._real(node, x - y)
            case "*" | "@":
                return self._real(node, x * y)
            case "/":
                if y == 0:
                    self.fail(node, "E132", f"division by zero: {self.source(node)}")
                return self._real(node, x / y)
            case _:
                if x == 0 and y.is_negative:
                    self.fail(node, "E132", f"division by zero: {self.source(node)}")
                value = self._real(node, x ** self._exponent(node.right, y))
                if value.is_number and (not value.is_finite or abs(float(value)) > 1e300):
                    self.fail(node, "E104", f"{self.source(node)} is not a number of reasonable size")
                return value

    def _real(self, node: ast.expr, value: V) -> V:
        """A number has a real value, the one in front of a matrix too: no sqrt(-1), log(0), inf - inf, z / (x - x)."""
        found = value if isinstance(value, sp.Expr) else value.coef if isinstance(value, Mul) else sp.S.One
        if found.has(sp.I, sp.nan, sp.zoo):
            self.fail(node, "E132", f"{self.source(node)} has no real value")
        return value

    def _exponent(self, node: ast.expr, y: Any) -> sp.Expr:
        if y.is_number and abs(y) > EXPONENT:
            self.fail(node, "E104", f"the exponent {self.source(node)} is too large; at most {EXPONENT}")
        return y

    def _quotient(self, node: ast.BinOp, x: Value, y: Value) -> Expr:
        if y == 0:
            self.fail(node, "E132", f"division by zero: {self.source(node)}")
        if isinstance(y, Expr):
            return elementwise(slot(0) / slot(1), as_expr(x), y)
        return scale(1 / y, as_expr(x))

    def _sum(self, x: Value, y: Value) -> Expr:
        a, b = as_expr(x), as_expr(y)
        if a.shape == b.shape:
            return add(a, b)
        return elementwise(slot(0) + slot(1), a, b)

    def _fit(self, node: ast.AST, a: ast.expr, b: ast.expr, x: Expr, y: Expr) -> None:
        """Entrywise operations take equal shapes, or a scalar with anything."""
        if x.is_scalar or y.is_scalar or (same(x.rows, y.rows) and same(x.cols, y.cols)):
            return
        if self.scope.broadcast and all(same(p, q) or 1 in (p, q) for p, q in zip(x.shape, y.shape, strict=True)):
            return
        hint = (
            "there is no silent broadcasting: repeat a vector with v @ ones(1, n)" if 1 in (*x.shape, *y.shape) else ""
        )
        if same(x.rows, y.cols) and same(x.cols, y.rows):
            hint = f"{self.source(b)}.T has the shape of {self.source(a)}"
        self.fail(
            node,
            "E131",
            f"{self.source(node)} does not fit: {self._is(a, x)}, {self._is(b, y)}",
            hint,
            self.declared(a, b),
        )

    def transposed(self, node: ast.expr) -> str:
        """The text of the transpose: A for A.T, (A @ B).T for a product."""
        if isinstance(node, ast.Attribute):
            return self.source(node.value)
        return f"({self.source(node)}).T" if isinstance(node, ast.BinOp | ast.UnaryOp) else f"{self.source(node)}.T"

    def _is(self, node: ast.expr, value: Expr) -> str:
        return f"{self.source(node)} is {self.shape(value)}"

    def _matmul(self, node: ast.BinOp, a: ast.expr, b: ast.expr, x: Expr, y: Expr) -> Expr:
        if (x.is_scalar or y.is_scalar) and x.shape != y.shape and not (same(x.cols, y.rows)):
            self.fail(
                node,
                "E131",
                f"{self.source(node)} does not fit: @ multiplies matrices, and one of these is a scalar",
                "a scalar is multiplied with *",
            )
        if same(x.cols, y.rows):
            return matmul(x, y)
        hint = ""
        if x.cols == 1 and y.cols == 1 and same(x.rows, y.rows):
            hint = f"the inner product is dot({self.source(a)}, {self.source(b)})"
        elif same(x.rows, y.rows):
            hint = f"{self.transposed(a)} @ {self.source(b)} fits"
        elif same(x.cols, y.cols):
            hint = f"{self.source(a)} @ {self.transposed(b)} fits"
        elif y.cols == 1:
            hint = f"{self.source(b)} must have {x.cols} entries here"
        self.fail(
            node,
            "E131",
            f"{self.source(node)} does not fit: {self._is(a, x)}, {self._is(b, y)}",
            hint,
            self.declared(a, b),
        )

    def _compare(self, node: ast.Compare, a: ast.expr, relation: Any, b: ast.expr) -> Condition:
        x, y = as_expr(self.value(a)), as_expr(self.value(b))
        self._fit(node, a, b, x, y)
        return Condition(relation(slot(0), slot(1)), (x, y))

    def _condition(self, node: ast.expr) -> Condition | None:
        """A comparison, or what is 1 where it holds, as top(v, p) is."""
        found = self.visit(node)
        match found:
            case Condition():
                return found
            case Hold(Worked("top", _)):
                return Condition(sp.Ne(slot(0), 0), (found,))
            case _:
                return None

    def _joined(self, word: Any, values: list[ast.expr]) -> Condition:
        """Comparisons joined by `and` or `or`, `&` or `|`."""
        relations, args = list[Any](), list[Expr]()
        for v in values:
            found = self._condition(v)
            if found is None:
                hint = "& and | bind closer than comparisons: (a) & (b > 0)" if len(values) == 2 else ""
                self.fail(v, "E132", f"{self.source(v)} is not a comparison", hint)
            shift = {slot(i): slot(i + len(args)) for i in range(len(found.args))}
            relations.append(found.relation.subs(shift, simultaneous=True))
            args.extend(found.args)
        return Condition(word(*relations), tuple(args))

    # --- calls ---

    def _call(self, node: ast.Call, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        if any(isinstance(a, ast.Starred) for a in args) or any(k.arg is None for k in keywords):
            self.fail(
                node, "E103", f"not part of the language: {self.source(node)}", "arguments are written one by one"
            )
        if name in self.scope.macros:
            return self._macro(node, self.scope.macros[name], args, keywords)
        if name == "where":
            return self._where(node, args)
        if name in FAMILIES and len(args) == 1 and isinstance(args[0], ast.GeneratorExp):
            return self._family(args[0], FAMILIES[name])
        if name == "softmax" and len(args) == 1 and [k.arg for k in keywords] == ["over"]:
            return self._shares(args[0], keywords[0].value)
        if name in ("spectral_sum", "spectral_map"):
            return self._spectral(node, name, args)
        if name in ELEMENTWISE_BY_NAME:
            return self._elementwise(node, name, args, keywords)
        found = BY_NAME.get(name)
        if found is None:
            known = [*BY_NAME, *ELEMENTWISE_BY_NAME, *self.scope.macros, "where"]
            hint = did_you_mean(name, known)
            if isinstance(self.scope.names.get(name), Expr | sp.Basic):
                self.fail(
                    node,
                    "E102",
                    f"{quote(name)} is not a function; it was declared as a quantity",
                    "multiply with * or @",
                )
            self.fail(
                node.func,
                "E102",
                f"unknown function '{quote(name)}'",
                hint or "declare it under 'functions:' by its formula; 'unroll list functions' shows those that exist",
            )
        least = len(found.kinds) - found.optional
        bad = [k.arg for k in keywords if k.arg not in found.kinds or k.arg not in NAMED]
        if bad:
            self.fail(
                node, "E105", f"{name} has no argument '{bad[0]}'", f"it is called as {found.signature}: {found.about}"
            )
        order = [found.kinds.index(k.arg) for k in keywords]
        if order != list(range(len(args), len(args) + len(order))):
            self.fail(node, "E105", f"{name} is called as {found.signature}", found.about)
        given = [*args, *(k.value for k in keywords)]
        if not least <= len(given) <= len(found.kinds):
            wanted = str(least) if not found.optional else f"{least} to {len(found.kinds)}"
            self.fail(
                node,
                "E105",
                f"{name} takes {wanted} argument{'s' if wanted != '1' else ''}, not {len(given)}",
                f"it is called as {found.signature}: {found.about}",
            )
        values = [self._as_kind(a, k) for a, k in zip(given, found.kinds, strict=False)]
        return self._built(node, lambda: found.build(*values))

    def _built(self, node: ast.AST, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ShapeError as e:
            self.fail(node, "E131", f"{self.source(node)} does not fit: {e}", notes=self.declared(node))
        except DeriveError as e:
            raise e.located(self.place(*self.span(node))) from None

    def matrix(self, node: ast.expr) -> Expr:
        return as_expr(self.value(node))

    def number(self, node: ast.expr) -> sp.Expr:
        value = self.value(node)
        if isinstance(value, Expr):
            self.fail(
                node,
                "E132",
                f"{self.source(node)} is {self.shape(value)}; a number that every sample shares is needed here",
                notes=self.declared(node),
                hint="write a number, or a name declared under scalars",
            )
        return value

    def _as_kind(self, node: ast.expr, kind: Kind) -> Any:
        match kind:
            case "matrix":
                return self.matrix(node)
            case "vector":
                value = self.matrix(node)
                if value.cols != 1:
                    self.fail(
                        node,
                        "E132",
                        f"{self.source(node)} is {self.shape(value)}; a vector is needed here",
                        notes=self.declared(node),
                    )
                return value
            case "weight" | "bias":
                return self.matrix(node)
            case "share":
                return self._share(node)
            case "number":
                return self.number(node)
            case "eps":
                value = self.number(node)
                if value.is_negative:
                    self.fail(node, "E132", f"eps is not negative; {self.source(node)} is")
                return value
            case "probes":
                value = self.number(node)
                if not (value.is_Integer and value.is_positive):
                    self.fail(
                        node,
                        "E132",
                        f"{self.source(node)} is no number of probes",
                        "1, 2, ..; without it, div is exact",
                    )
                return value
            case "size":
                value = self.number(node)
                if value.is_number and not (value.is_integer and value.is_positive and value < 10**7):
                    self.fail(
                        node, "E132", f"{self.source(node)} is not a size; sizes are whole numbers from 1 to 10 million"
                    )
                if value.is_integer is not True:
                    self.fail(node, "E132", f"{self.source(node)} is not a size", "sizes are declared under 'dims:'")
                return value
            case "axis":
                value = self.number(node)
                if value not in (0, 1):
                    self.fail(
                        node, "E132", f"an axis is 0 (down the columns) or 1 (along the rows), not {self.source(node)}"
                    )
                return int(value)

    def _share(self, node: ast.expr) -> Expr:
        """A share: a number, or one for each sample."""
        value = self.matrix(node)
        if not value.is_scalar:
            self.fail(node, "E132", f"{self.source(node)} is {self.shape(value)}; a share is a number from 0 to 1")
        c = as_constant(value)
        if c is not None and c.is_number and not 0 <= c <= 1:
            self.fail(node, "E132", f"{self.source(node)} is no share: it is from 0 to 1", "1.2 percent are 0.012")
        return value

    def _elementwise(self, node: ast.Call, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        found = ELEMENTWISE_BY_NAME[name]
        if len(args) != found.arity or keywords:
            self.fail(
                node,
                "E105",
                f"{name} takes {found.arity} argument{'s' if found.arity > 1 else ''}, not {len(args) + len(keywords)}",
                found.about,
            )
        values = [self.value(a) for a in args]
        if all(not isinstance(v, Expr) for v in values):
            return self._real(node, swap(found.profile, {slot(i): v for i, v in enumerate(values)}))
        exprs = [as_expr(v) for v in values]
        if found.arity == 2:
            self._fit(node, args[0], args[1], exprs[0], exprs[1])
        return self._real(node, elementwise(found.profile, *exprs))

    def _where(self, node: ast.Call, args: list[ast.expr]) -> Expr:
        condition = self._condition(args[0]) if len(args) == 3 else None
        if condition is None:
            self.fail(node, "E105", "where takes a condition and two values", "where(abs(u) <= a, u**2, a*abs(u))")
        yes, no = (self.matrix(a) for a in args[1:])
        exprs = [*condition.args, yes, no]
        for a, x in zip((*args, args[2]), exprs, strict=False):
            self._fit(node, args[1], a, yes, x)
        n = len(condition.args)
        return elementwise(sp.Piecewise((slot(n), condition.relation), (slot(n + 1), True)), *exprs)

    def _spectral(self, node: ast.Call, name: str, args: list[ast.expr]) -> Expr:
        if len(args) != 2:
            self.fail(node, "E105", f"{name} takes a formula in s and a matrix", f"{name}(log(1 + s**2), M)")
        inner = type(self)(
            self.text, replace(self.scope, names={**self.scope.names, "s": slot(0)}), self.place, self.active
        )
        profile = inner.number(args[0])
        return (spectral if name == "spectral_sum" else spectral_map)(profile, self.matrix(args[1]))

    def _shares(self, x: ast.expr, over: ast.expr) -> Expr:
        """softmax(x, over=k): shares among the members of a family, inside a sum over k."""
        size = self.scope.names.get(f"[{over.id}]") if isinstance(over, ast.Name) else None
        if size is None:
            self.fail(
                over,
                "E101",
                f"'{self.source(over)}' is not an index",
                "softmax(f(U[k]), over=k) stands inside sum(... for k in K)",
            )
        return family_softmax(over.id, size, self.matrix(x))  # type: ignore[union-attr]

    def _family(self, node: ast.GeneratorExp, make: Callable[[str, Any, Expr], Expr]) -> Expr:
        inner, index, size = self._scope_of(node)
        return make(index, size, inner.matrix(node.elt))

    def _scope_of(self, node: ast.GeneratorExp) -> tuple[Self, str, sp.Expr]:
        """A reader that knows the index of `... for k in K`, the index and its size."""
        match node.generators:
            case [ast.comprehension(target=ast.Name(id=index), iter=ast.Name() as over, ifs=[], is_async=0)]:
                size = self.number(over)
            case _:
                self.fail(node, "E103", "a sum over a family is written sum(f(U[k]) for k in K)")
        if index in self.scope.names:
            self.fail(node, "E103", f"the index {index} is already the name of something else", "choose another letter")
        names = {**self.scope.names, f"[{index}]": size}
        return type(self)(self.text, replace(self.scope, names=names), self.place, self.active), index, size

    def _macro(self, node: ast.Call, macro: Macro, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        if keywords or len(args) != len(macro.parameters):
            self.fail(
                node,
                "E105",
                f"{macro.name} takes {len(macro.parameters)} arguments, not {len(args) + len(keywords)}",
                f"declared as {macro.name}({', '.join(macro.parameters)})",
            )
        if macro.name in self.active:
            self.fail(
                node,
                "E104",
                f"the function {macro.name} calls itself",
                "a function is expanded where it is used, so it cannot be recursive",
            )
        bound = dict(zip(macro.parameters, (self.value(a) for a in args), strict=True))
        globals_ = {k: v for k, v in self.scope.names.items() if not k.startswith("[")}
        inner = type(self)(
            macro.body,
            replace(self.scope, names={**globals_, **bound}, declared={}),
            macro.place,
            (*self.active, macro.name),
        )
        return inner.read()
