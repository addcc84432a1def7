"""Formulas of a text: those of the language, its letters and operators, and the operations on them that a scope holds."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import sympy as sp

from unroll.calculus.linear import Linear
from unroll.calculus.majorise import tangent
from unroll.calculus.prox import weighed
from unroll.derivation.dealing import Share
from unroll.derivation.known import Known, member
from unroll.errors import DeriveError, did_you_mean
from unroll.language.constructors import add, elementwise, scale, zeros
from unroll.language.functions import Value
from unroll.language.nodes import Expr, Sym, show_shape, slot
from unroll.language.parse import Condition, Reader, Scope
from unroll.language.traversal import substitute


@dataclass(frozen=True)
class Later:
    """L, in a step size that a spec writes: asked for when it is read."""

    reading: Known
    letter: str


@dataclass(frozen=True)
class TextScope(Scope):
    """What names mean in an update; index: the member that is being read."""

    reading: Any = None
    index: Mapping[str, int] = field(default_factory=dict[str, int])
    operations: Mapping[str, Operation] = field(default_factory=dict[str, "Operation"])


@dataclass(frozen=True)
class Operation:
    """Something that is done with letters: how it is called, with how many arguments, what it gives; at: may a point be given by names?"""

    signature: str
    counts: tuple[int, ...]
    build: Callable[[Formula, ast.Call, list[ast.expr]], Value]
    at: bool = False


class Formula(Reader):
    """A formula of an algorithm: those of the language, and what is done with letters."""

    undeclared = "a text reads its variables, states and numbers, and updates above"

    @property
    def reading(self) -> Known:
        return cast(TextScope, self.scope).reading

    @property
    def index(self) -> Mapping[str, int]:
        return cast(TextScope, self.scope).index

    def _name(self, node: ast.Name, name: str) -> Value:
        if name not in self.scope.names and name in (u.partition("[")[0] for u in self.reading.text.record.updates):
            hint = f"a state has one, from layer to layer: states: {{{name}: {{like: z}}}}"
            self.fail(node, "E101", f"'{name}' is an update that has no value here", hint)
        return super()._name(node, name)

    def visit(self, node: ast.expr) -> Value | Condition:
        match node:
            case ast.BinOp(op=ast.MatMult()) if (chain := self._chain(node)) is not None:
                return chain
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if i in self.index:
                return self._name(cast(Any, node), member(name, self.index[i], self.reading.indexed(i)))
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name)) as letter, args=args) if (
                name in self.reading.letters
            ):
                return self._value_of(node, self.share(letter), args)
            case ast.Name(id=name) if isinstance(self.scope.names.get(name), Later):
                later = cast(Later, self.scope.names[name])
                return later.reading.lipschitz(later.letter)
            case ast.Name(id=name) if name in self.reading.letters and name not in self.scope.names:
                self.fail(
                    node,
                    "E320",
                    f"{name} is a letter: it is taken by grad, prox, argmin",
                    f"grad({name}, z), prox(t * {name}, v)",
                )
            case ast.Attribute(value=ast.Name(id="algorithm"), attr=name):
                value = self.reading.names.get(name)
                if value is None:
                    known = list(self.reading.names)
                    self.fail(
                        node,
                        "E101",
                        f"the algorithm has no '{name}'",
                        did_you_mean(name, known) or f"there are: {', '.join(known)}",
                    )
                return value
            case _:
                return super().visit(node)

    def operator_of(self, node: ast.expr) -> tuple[str, Linear, bool] | None:
        """(name, K, is it transposed?) of K, K.T, K[j], K[j].T."""
        match node:
            case ast.Attribute(value=x, attr="T") if (found := self.operator_of(x)) is not None:
                return found[0], found[1], not found[2]
            case ast.Name(id=name) if (shares := self.with_operator(name)) and not shares[0].letter.index:
                return name, cast(Linear, shares[0].linear), False
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if i in self.index and (
                shares := self.with_operator(name)
            ):
                return member(name, self.index[i], shares), cast(Linear, shares[self.index[i]].linear), False
            case _:
                return None

    def with_operator(self, name: str) -> tuple[Share, ...]:
        r = self.reading
        return next((r.dealt[x.name] for x in r.letters.values() if x.operator == name), ())

    def _chain(self, node: ast.BinOp) -> Expr | None:
        """K.T @ K @ z: operators applied from the right."""
        factors: list[ast.expr] = []
        at: ast.expr = node
        while isinstance(at, ast.BinOp) and isinstance(at.op, ast.MatMult):
            factors.append(at.right)
            at = at.left
        weight: list[ast.expr] = []  # of `a * K @ z`, which Python reads as (a * K) @ z
        negative = False
        while True:
            match at:
                case ast.BinOp(left=c, op=ast.Mult(), right=inner) if self.operator_of(inner) is not None:
                    weight.append(c)
                    at = inner
                case ast.UnaryOp(op=ast.USub(), operand=inner) if self.operator_of(inner) is not None:
                    negative = not negative
                    at = inner
                case _:
                    break
        found = [self.operator_of(x) for x in (*factors[1:], at)]
        if not any(x is not None for x in found):
            return None
        value = self.matrix(factors[0])
        for x, k in zip((*factors[1:], at), found, strict=True):
            if k is None:
                self.fail(
                    x, "E320", f"{self.source(x)} stands before an operator", "apply it to the result: name that first"
                )
            _, linear, transposed = k
            want = linear.e.shape if transposed else linear.z.shape
            if value.shape != want:
                self.fail(
                    node,
                    "E131",
                    f"{self.source(node)} does not fit: {self.source(x)} takes {show_shape(want)}, this is {self.shape(value)}",
                )
            value = linear.adjoint(value) if transposed else linear(value)
        for c in weight:
            w = self.value(c)
            value = elementwise(slot(0) * slot(1), w, value) if isinstance(w, Expr) else scale(w, value)
        return scale(-1, value) if negative else value

    def _call(self, node: ast.Call, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        r = self.reading
        if name == "derived" and isinstance(self.scope.names.get("derived"), Expr):
            return self._derived(node, args, keywords)
        if name in r.letters:
            return self._value_of(node, self.share(node.func), args)
        if name in ("rows", "cols") and len(args) == 1 and (k := self.operator_of(args[0])) is not None:
            _, linear, transposed = k
            tall, wide = linear.e, linear.z
            x = wide if transposed == (name == "rows") else tall
            return x.rows * x.cols
        operation = cast(TextScope, self.scope).operations.get(name)
        if operation is None:
            if (
                name == "sum"
                and len(args) == 1
                and isinstance(args[0], ast.GeneratorExp)
                and (e := self._over(args[0])) is not None
            ):
                return e
            return super()._call(node, name, args, keywords)
        if (keywords and not operation.at) or len(args) not in operation.counts:
            self.fail(
                node,
                "E105",
                f"{name} takes {' or '.join(map(str, operation.counts))} arguments, not {len(args) + len(keywords)}",
                f"it is called as {operation.signature}",
            )
        try:
            return operation.build(self, node, args)
        except DeriveError as e:
            raise e.located(self.place(*self.span(node))) if e.code not in ("E304",) else e from None

    def _over(self, node: ast.GeneratorExp) -> Expr | None:
        """sum(... for j in J), J what an index of the text runs over."""
        match node.generators:
            case [ast.comprehension(target=ast.Name(id=j), iter=ast.Name(id=over), ifs=[])] if self.reading.indexed(
                over
            ):
                pass
            case _:
                return None
        shares = self.reading.indexed(over)
        terms: list[Expr] = []
        for i in range(len(shares)):
            scope = replace(cast(TextScope, self.scope), index={**self.index, j: i})
            terms.append(type(self)(self.text, scope, self.place, self.active).matrix(node.elt))
        return add(*terms)

    def _derived(self, node: ast.Call, args: list[ast.expr], keywords: list[ast.keyword]) -> Value:
        """derived(z=q): what was there, at another point."""
        if args or not keywords:
            self.fail(node, "E105", "derived takes the names that change, derived(z=q)", "derived, or derived(z=q)")
        put: dict[Expr, Expr] = {}
        for k in keywords:
            s = self.reading.names.get(str(k.arg))
            if not isinstance(s, Sym):
                self.fail(node, "E101", f"the algorithm has no state '{k.arg}'")
            put[s] = self.matrix(k.value)
            if put[s].shape != s.shape:
                self.fail(
                    k.value, "E131", f"{self.source(k.value)} is {self.shape(put[s])}; {k.arg} is {self.shape(s)}"
                )
        value, states = cast(Expr, self.scope.names["derived"]), {s.symbol for s in self.reading.states}
        for a in reversed(self.reading.assigns):  # what was read through an update above
            if (
                isinstance(a.target, Sym)
                and isinstance(a.value, Expr)
                and a.target not in states
                and a.target not in put
            ):
                value = substitute(value, {a.target: a.value})
        return substitute(value, put)

    def share(self, node: ast.expr) -> Share:
        """The letter that stands here."""
        match node:
            case ast.Name(id=name) if name in self.reading.letters:
                shares = self.reading.dealt[name]
                letter = self.reading.letters[name]
                if letter.index:
                    self.fail(node, "E320", f"{name} has a member for each {letter.index}", f"{name}[{letter.index}]")
                return shares[0]
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if (
                name in self.reading.letters and i in self.index
            ):
                return self.reading.dealt[name][self.index[i]]
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Name(id=i)) if self.reading.letters.get(name):
                hint = f"sum(... for {i} in {self.reading.letters[name].over or 'J'}), or an update of its own: v[{i}]"
                self.fail(node, "E320", f"no member {i} is meant here", hint)
            case _:
                known = ", ".join(self.reading.letters)
                self.fail(
                    node, "E320", f"{self.source(node)} is not a letter of the algorithm", f"its letters: {known}"
                )

    def majorant(self, node: ast.Call) -> Share:
        """The letter of tangent(g, p, abs), with what lies above it."""
        match node.args:
            case [letter, at, ast.Name(id="abs" | "square" as of)]:
                share, point = self.share(letter), self.matrix(at)
            case _:
                self.fail(node, "E105", "tangent takes a letter, a point, and abs or square", "tangent(g, z, abs)")
        if share.e is None:
            return share
        point = substitute(
            point, {z: self.reading.running[a] for a, z in self.reading.places.items()}
        )  # inside argmin, z is what is minimised over
        return replace(share, e=tangent(share.e, share.variable, point, of))

    def _value_of(self, node: ast.Call, share: Share, args: list[ast.expr]) -> Expr:
        """f(z): the value of a letter."""
        count = len(share.places)
        if len(args) != count:
            self.fail(
                node, "E105", f"{share.letter.name} takes {count} argument{'s' if count > 1 else ''}, not {len(args)}"
            )
        variables = [share.variable] if count == 1 else [z for _, z in share.places]
        at = [self.matrix(a) for a in args]
        for a, e, z in zip(args, at, variables, strict=True):
            if (share.linear is not None or count > 1) and e.shape != z.shape:
                message = f"{self.source(a)} is {self.shape(e)}; {share.letter.name} takes {self.shape(z)}"
                self.fail(a, "E131", message)
        return zeros(1, 1) if share.e is None else substitute(share.e, dict(zip(variables, at, strict=True)))

    def scaled(self, node: ast.expr) -> tuple[sp.Expr, Share, bool]:
        """(t, g, is it the conjugate?) of t * g, g / t, t * conj(g)."""
        match node:
            case ast.BinOp(left=t, op=ast.Mult(), right=g):
                return self._times(t, self.scaled(g), lambda x: x)
            case ast.BinOp(left=g, op=ast.Div(), right=t):
                return self._times(t, self.scaled(g), lambda x: 1 / x)
            case ast.Call(func=ast.Name(id="conj"), args=[g], keywords=[]):
                return sp.S.One, self.share(g), True
            case ast.Call(func=ast.Name(id="tangent")):
                return sp.S.One, self.majorant(node), False
            case _:
                return sp.S.One, self.share(node), False

    def _times(
        self, node: ast.expr, scaled: tuple[sp.Expr, Share, bool], power: Callable[[sp.Expr], sp.Expr]
    ) -> tuple[sp.Expr, Share, bool]:
        """With a factor more: a number, or one for each entry, which the letter then has in its terms."""
        c, share, conjugate = scaled
        value, z = self.value(node), share.variable
        if not isinstance(value, Expr) or value.is_scalar or conjugate:
            return c * power(self.strength(node)), share, conjugate
        if any(n not in (1, m) for n, m in zip(value.shape, z.shape, strict=True)):
            says = f"{self.source(node)} is {self.shape(value)}; {share.letter.name} takes {self.shape(z)}"
            self.fail(node, "E131", says, "one number, one per sample, or one for each entry")
        if share.e is None:
            return c, share, conjugate
        by = self.reading.weights(elementwise(power(slot(0)), value))
        try:
            return c, replace(share, e=weighed(share.e, z, by)), conjugate
        except DeriveError as e:
            raise e.located(self.place(*self.span(node))) from None

    def strength(self, node: ast.expr) -> sp.Expr:
        """A number before a letter. One of each sample gets a name, as the prox takes numbers."""
        value = self.value(node)
        if not isinstance(value, Expr):
            return value
        if not value.is_scalar:
            self.fail(
                node,
                "E131",
                f"{self.source(node)} is {self.shape(value)}; before a letter stands a number",
                "one number, or one per sample",
            )
        return self.reading.named(value)
