"""Proximal step of a scalar profile, derived: argmin over z of t f(z) + (z − v)²/2.

f is split where it switches; on each piece z + t f'(z) = v is solved. If t f is convex, or weakly convex with t ρ < 1,
pieces follow one another in v and thresholds b + t f'(b∓) tell which is active; else candidates are compared by value.
"""

# SymPy annotates what its trees hold and return as Basic, where Expr is meant; only that is let pass.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import sympy as sp

from unroll.calculus import prox_source
from unroll.calculus.pieces import Piece, Profile, limit, split
from unroll.calculus.roots import Root, stationary
from unroll.calculus.scalar import REALS, Curvature, as_ends, curvature_of, extremes, scalars, undecided, with_order
from unroll.calculus.signs import Signs, Undecided
from unroll.calculus.torch_functions import source_of
from unroll.calculus.torch_text import quadratic_root, stable
from unroll.errors import DeriveError
from unroll.language.show import latex, pretty

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One smooth piece: F = t f and G = F' on (lo, hi) in u, and where z + G(z) = x there."""

    u: sp.Symbol
    lo: sp.Expr
    hi: sp.Expr
    F: sp.Expr
    G: sp.Expr
    roots: tuple[Root, ...]


@dataclass(frozen=True)
class Knot:
    """A breakpoint or finite end: F there, and the x from `below` to `above` that it is returned for, if flat."""

    at: sp.Expr
    value: sp.Expr
    below: sp.Expr
    above: sp.Expr
    flat: bool


@dataclass(frozen=True)
class ScalarProx:
    """prox of t f at v. mode: "threshold" or "candidates". even: parts and knots are of z ≥ 0, for x = |v|.

    centred: shown that the prox of an even f is 0 at 0. Where it is not, z and −z are as good at v = 0, and z ≥ 0 is returned, the
    limit from v > 0. Of other ties the first candidate wins: breakpoints before zeros of z + t f'(z) − v, small before large.
    """

    f: sp.Expr
    u: sp.Symbol
    v: sp.Symbol
    t: sp.Symbol
    x: sp.Symbol
    domain: tuple[sp.Expr, sp.Expr]
    curvature: Curvature
    mode: str
    even: bool
    centred: bool
    objective: sp.Expr
    parts: tuple[Part, ...]
    knots: tuple[Knot | None, ...]
    proof: str

    @property
    def scalars(self) -> tuple[sp.Symbol, ...]:
        """Arguments after v, in order: t first if it is one, then by name."""
        found: set[sp.Basic] = set()
        for e in self.expressions():
            found |= e.free_symbols
        return tuple(sorted(found - {self.u, self.v, self.x}, key=lambda s: (s != self.t, str(s))))

    def expressions(self) -> Iterable[sp.Expr]:
        """Every formula of the parts and knots."""
        for p in self.parts:
            yield from (e for e in (p.lo, p.hi, p.F, p.G, *(r.z for r in p.roots if r.z is not None)))
        for k in self.knots:
            if k is not None:
                yield from (k.at, k.value, k.below, k.above)

    def map(self, change: Callable[[sp.Expr], sp.Expr]) -> ScalarProx:
        """The same prox with every expression changed by an exact identity or substitution."""

        def of_root(r: Root) -> Root:
            return replace(r, z=None if r.z is None else change(r.z), lo=change(r.lo), hi=change(r.hi))

        def of_part(p: Part) -> Part:
            mapped = [change(e) for e in (p.lo, p.hi, p.F, p.G)]
            return Part(p.u, *mapped, tuple(of_root(r) for r in p.roots))

        knots = [
            k and replace(k, at=change(k.at), value=change(k.value), below=change(k.below), above=change(k.above))
            for k in self.knots
        ]
        parts = tuple(of_part(p) for p in self.parts)
        domain = (change(self.domain[0]), change(self.domain[1]))
        return replace(self, parts=parts, knots=tuple(knots), objective=change(self.objective), domain=domain)

    def substitute(self, values: Mapping[sp.Basic, Any]) -> ScalarProx:
        """Scalars given other expressions or numbers, e.g. {t: step}."""
        swap = {k: sp.sympify(e) for k, e in values.items()}
        return self.map(lambda e: e.subs(swap, simultaneous=True))

    def replace(self, product: sp.Expr, symbol: sp.Expr) -> ScalarProx:
        """`symbol` in the place of a product of scalars, as theta for step*lam; exact wherever else they occur."""
        choices = [self.substitute_identity(s, e) for s, e in _eliminations(product, symbol)]
        if not choices:
            raise DeriveError("E305", f"{product} is not a product of scalars of this proximal step")
        return min(choices, key=lambda p: (len(p.scalars), sum(e.count_ops() for e in p.expressions())))

    def substitute_identity(self, s: sp.Symbol, e: sp.Expr) -> ScalarProx:
        """s = e everywhere, simplified."""
        return self.map(lambda x: _tidy(x.subs(s, e)) if x.has(s) else x)

    @property
    def formula(self) -> sp.Expr | None:
        """The prox as a SymPy expression in v and the scalars; None if a root has no closed form or values decide."""
        if self.mode != "threshold":
            return None
        short = prox_source.textbook(self)
        if short is not None:
            return short
        segs = prox_source.segments(self)
        if any(z is None for _, z, _ in segs):
            return None
        cases = [(_textbook(z), self.x <= end) for end, z, _ in segs[:-1]] + [(_textbook(segs[-1][1]), True)]
        whole = sp.Piecewise(*cases)
        return (
            sp.sign(self.v) * whole.xreplace({self.x: sp.Abs(self.v)})
            if self.even
            else whole.xreplace({self.x: self.v})
        )

    @property
    def tie(self) -> str:
        """Words for what is returned where two points are as good, at v = 0 of an even f that is not least there."""
        return ", sign(0) = 1" if self.even and not self.centred else ""

    @property
    def slope(self) -> sp.Expr:
        """d prox / dv as an expression in the output u (|u| for an even profile): 1/(1 + t f''(u)), 0 at knots."""
        cases: list[tuple[sp.Expr, Any]] = []
        for part, after in zip(self.parts, self.knots[1:], strict=True):
            inside = 1 / (1 + sp.diff(part.G, self.u))
            cases.append((inside, True if after is None else self.u < after.at))
            if after is not None and after.flat:
                cases.append((sp.S.Zero, sp.Eq(self.u, after.at)))
        first = self.knots[0]
        head = [(sp.S.Zero, sp.Eq(self.u, first.at))] if first is not None and first.flat else []
        return sp.Piecewise(*head, *cases)

    @property
    def runtime(self) -> tuple[str, ...]:
        """Names of the runtime operations that `source` calls."""
        return tuple(sorted(prox_source.helpers_of(self)))

    def source(self, name: str) -> str:
        """Torch text of `def name(v, *scalars)`; it calls the operations named in `runtime`."""
        return prox_source.emit(self, name)

    def __call__(self, v: Tensor, t: Any = None, /, **values: Any) -> Tensor:
        """Evaluate the emitted source. Scalars by name, numbers or tensors that broadcast against v."""
        import torch

        given = values if t is None else {str(self.t): t, **values}
        missing = [str(s) for s in self.scalars if str(s) not in given]
        if missing:
            raise DeriveError("E401", f"the proximal step needs a value for {', '.join(missing)}")
        like = {"dtype": v.dtype, "device": v.device}
        arguments = [given[str(s)] for s in self.scalars]
        return _loaded(self)(
            v, *(a if isinstance(a, torch.Tensor) else torch.tensor(float(a), **like) for a in arguments)
        )

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """The formula on one line, for people."""
        return f"prox_t(v) = {self.formula_text()}"

    def formula_text(self) -> str:
        """What v becomes."""
        return self._body(pretty, str)

    def latex(self) -> str:
        """The formula in LaTeX."""
        return self._body(latex, lambda words: rf"\text{{{words}}}")

    def _body(self, show: Callable[[Any], str], say: Callable[[str], str]) -> str:
        if self.formula is not None:
            return show(self.formula)
        points = [show(k.at) for k in self.knots if k is not None and k.flat]
        for part in self.parts:
            points += [
                show(_textbook(r.z)) if r.z is not None else say("root of ") + show(self.u + part.G - self.x)
                for r in part.roots
            ]
        head = say("sign(v) times ") if self.even else ""
        where = say(", x = |v|") if self.even else ""
        choice = "" if len(points) == 1 else "one of " if self.mode == "threshold" else "the best of "
        return f"{head}{say(choice)}{', '.join(points)}{where}{say(self.tie)}"


@cache
def _loaded(prox: ScalarProx) -> Callable[..., Any]:
    import torch

    space: dict[str, Any] = {"torch": torch}
    exec(compile(f"{source_of(prox.runtime)}\n\n{prox.source('prox')}", "<derived prox>", "exec"), space)
    return space["prox"]


def _textbook(e: sp.Expr | None) -> sp.Expr:
    assert e is not None
    return e.replace(quadratic_root, lambda *a: quadratic_root(*a).textbook())


def _tidy(e: sp.Expr) -> sp.Expr:
    """step * (theta / step) -> theta, under roots and inside arguments too."""
    if e.is_Atom:
        return e
    inner = e.func(*[_tidy(a) for a in e.args])
    return sp.cancel(inner) if isinstance(inner, (sp.Mul, sp.Add)) and not inner.is_number else inner


def _eliminations(product: sp.Expr, symbol: sp.Expr) -> list[tuple[sp.Symbol, sp.Expr]]:
    """s = ... for each scalar that `symbol` = product can be solved for."""
    out: list[tuple[sp.Symbol, sp.Expr]] = []
    for s in sorted(product.free_symbols, key=str):
        power = sp.degree(product, s) if product.is_polynomial(s) else product.as_powers_dict().get(s, 0)
        rest = sp.cancel(product / s**power)
        if power != 0 and not rest.has(s):
            out.append((s, (symbol / rest) ** (sp.S.One / power)))
    return out


def derive_prox(
    f: sp.Expr,
    u: sp.Symbol,
    domain: tuple[Any, Any] | sp.Interval = REALS,
    *,
    assume: Iterable[sp.Basic] = (),
    small_step: bool = False,
    verify: bool = True,
) -> ScalarProx:
    """The proximal step of f on `domain`; scalars of f are symbols with assumptions, facts of `assume` hold.

    small_step: t ρ < 1 is promised, so a ρ-weakly convex f gets its threshold form. Else, if f is not convex,
    candidates are compared by value, which is right for every t.
    Raises DeriveError E302 with the reason, also when brute force beats the derived formula.
    """
    return _derive(sp.sympify(f), u, as_ends(domain), tuple(assume), small_step, verify)


@cache
def _derive(
    f: sp.Expr,
    u: sp.Symbol,
    domain: tuple[sp.Expr, sp.Expr],
    assume: tuple[sp.Basic, ...],
    small_step: bool,
    verify: bool,
) -> ScalarProx:
    signs = Signs(scalars(f, u, domain), with_order(domain, assume))
    try:
        profile = split(f, u, domain, signs)
        prox = assemble(f, profile, curvature_of(profile, signs), small_step, signs)
    except Undecided as e:
        raise undecided(f, e) from e
    if not verify:
        return prox
    from unroll.calculus.verify import verified

    return verified(prox, signs)


def assemble(f: sp.Expr, profile: Profile, curved: Curvature, small_step: bool, signs: Signs) -> ScalarProx:
    """Thresholds and roots of every piece."""
    if small_step and not curved.convex and curved.rho.is_infinite:
        raise DeriveError("E302", f"{f} is not weakly convex: no step is small enough for a threshold form")
    threshold = curved.convex or small_step
    _refuse_unbounded(f, profile, threshold, signs)
    _refuse_unattained(f, profile, signs)
    t, v = _fresh("t", f, profile.u, positive=True), _fresh("v", f, profile.u, real=True)
    steps = Signs({*signs.symbols, t}, (*signs.assume, *_small(t, curved, small_step)))
    steps.sampled = signs.sampled
    even = _is_even(profile, steps) and (len(profile.pieces) > 1 or not threshold)
    x = _fresh("x", f, profile.u, nonnegative=True) if even else v
    half = _half(profile, steps) if even else profile
    floor = sp.S.One if curved.convex else 1 - t * curved.rho
    parts = tuple(_part(p, profile.u, t, x, steps, floor if threshold else None) for p in half.pieces)
    knots = tuple(_knots(half, parts, t, even, threshold, steps))
    centred = even and (threshold or _least_at_0(half, steps))
    domain = (profile.lo, profile.hi)
    proof = f"{curved.proof}: {curved.reason}"
    if steps.sampled:
        proof += f"; signs sampled at {len(steps.draws)} draws: {', '.join(dict.fromkeys(steps.sampled))}"
    if small_step and not curved.convex:
        proof += f"; for t < {1 / curved.rho}"
    mode = "threshold" if threshold else "candidates"
    return ScalarProx(f, profile.u, v, t, x, domain, curved, mode, even, centred, t * stable(f), parts, knots, proof)


def _refuse_unbounded(f: sp.Expr, profile: Profile, threshold: bool, signs: Signs) -> None:
    """Raise where t f(z) + (z − v)²/2 has no minimum for some t: f falls without end at a point, or as −z² far away."""
    u = profile.u
    for piece in profile.pieces:
        for end, side in ((piece.lo, "+"), (piece.hi, "-")):
            if end.is_infinite and threshold:
                continue
            what = sp.diff(piece.f, u, 2) if end.is_infinite else piece.f
            value = limit(what, u, end, side)
            if value == -sp.oo or (end.is_infinite and signs.known(value) == -1):
                raise DeriveError(
                    "E302", f"{f} has no proximal step: it is not bounded below {_near(end)}", _way_out(end)
                )


def _refuse_unattained(f: sp.Expr, profile: Profile, signs: Signs) -> None:
    """Raise where f jumps up at a point that it reaches from the side: the infimum of t f(z) + (z − v)²/2 is then no minimum for some v."""
    at, u = dict(profile.at), profile.u
    for piece in profile.pieces:
        for end, side in ((piece.lo, "+"), (piece.hi, "-")):
            inside = limit(piece.f, u, end, side) if end in at else sp.oo
            if inside != sp.oo and (at[end] == sp.oo or signs.of(sp.expand(at[end] - inside)) > 0):
                raise DeriveError(
                    "E302",
                    f"{f} has no proximal step: its value at {u} = {end} is above its limit from the side, so a minimum need not exist",
                    "write <= in the place of <, or the reverse, so that the lower value holds at the jump",
                )


def _least_at_0(half: Profile, signs: Signs) -> bool:
    """Is f(u) ≥ f(0) shown for all u ≥ 0?"""
    least = dict(half.at)[sp.S.Zero]
    if least.is_infinite:
        return False
    try:
        ranges = [extremes(p.f - least, p, half.u, signs) for p in half.pieces]
        return all(r.proof != "sampled" and signs.known(r.lo) in (0, 1) for r in ranges)
    except (DeriveError, Undecided):
        return False


def _near(end: sp.Expr) -> str:
    return "by −u² times any constant" if end.is_infinite else f"near {end}"


def _way_out(end: sp.Expr) -> str:
    if end.is_infinite:
        return "add a term that grows at least as fast, or a constraint"
    return "restrict the domain to one side of that point" if end.is_number else ""


def _fresh(word: str, f: sp.Expr, u: sp.Symbol, **assumptions: bool) -> sp.Symbol:
    taken = {str(s) for s in f.free_symbols | {u}}
    while word in taken:
        word += "_"
    return sp.Symbol(word, **assumptions)


def _small(t: sp.Symbol, curved: Curvature, small_step: bool) -> tuple[sp.Expr, ...]:
    return (1 / curved.rho - t,) if small_step and not curved.convex else ()


def _part(piece: Piece, u: sp.Symbol, t: sp.Symbol, x: sp.Symbol, signs: Signs, floor: sp.Expr | None) -> Part:
    f = stable(piece.f)
    F, G = sp.expand(t * f), sp.expand(t * sp.diff(f, u))
    plain = sp.expand(t * sp.diff(piece.f, u))
    roots = stationary(plain, G, piece, u, x, signs, floor)
    return Part(u, piece.lo, piece.hi, F, G, roots)


def _knots(
    half: Profile, parts: tuple[Part, ...], t: sp.Symbol, even: bool, threshold: bool, signs: Signs
) -> Iterable[Knot | None]:
    u, at = half.u, dict(half.at)
    for i in range(len(parts) + 1):
        b = parts[i].lo if i < len(parts) else parts[-1].hi
        if b.is_infinite:
            yield None
            continue
        value = t * at[b] if b in at else limit(parts[0].F, u, b, "+")
        if value.is_infinite:
            below, above = -sp.oo if i == 0 else b, b if i == 0 else sp.oo
            yield Knot(b, value, below, above, flat=False)
            continue
        below = b + limit(parts[i - 1].G, u, b, "-") if i > 0 else -sp.oo
        above = b + limit(parts[i].G, u, b, "+") if i < len(parts) else sp.oo
        centre, end = even and i == 0, i in (0, len(parts))
        if threshold:
            flat = _flat(b, below, above, centre, end, signs)
        else:  # a candidate unless f goes on smoothly or bends down there: then the zeros beside it are enough
            sides = [(parts[k].F, side) for k, side in ((i - 1, "-"), (i, "+")) if 0 <= k < len(parts)]
            jumps = any(signs.known(sp.expand(limit(F, u, b, side) - value)) != 0 for F, side in sides)
            width = sp.expand(above - b if centre else above - below)
            flat = jumps or (end and not centre) or width is sp.nan or signs.known(width) not in (0, -1)
        yield Knot(b, value, below, above, flat)


def _flat(b: sp.Expr, below: sp.Expr, above: sp.Expr, centre: bool, end: bool, signs: Signs) -> bool:
    """Whether b is returned for a whole interval of x: a kink upward or a finite slope at an end of the domain."""
    if above == -sp.oo or below == sp.oo:
        return False
    if centre:
        return above == sp.oo or signs.of(above - b) > 0
    return end or below == -sp.oo or above == sp.oo or signs.of(sp.expand(above - below)) > 0


def _is_even(profile: Profile, signs: Signs) -> bool:
    pieces, u, at = profile.pieces, profile.u, dict(profile.at)
    knots = [p.lo for p in pieces] + [pieces[-1].hi]
    if any(a + b != 0 for a, b in zip(knots, reversed(knots), strict=True) if a.is_finite or b.is_finite):
        return False
    if any(sp.expand(p.f - q.f.subs(u, -u)) != 0 for p, q in zip(pieces, reversed(pieces), strict=True)):
        return False
    del signs
    return all(value == at[-b] or sp.expand(value - at[-b]) == 0 for b, value in at.items())


def _half(profile: Profile, signs: Signs) -> Profile:
    """The part of an even profile on u ≥ 0."""
    kept = [p for p in profile.pieces if p.hi == sp.oo or signs.of(p.hi) > 0]
    pieces = (replace(kept[0], lo=sp.S.Zero), *kept[1:])
    at = dict(profile.at)
    at.setdefault(sp.S.Zero, kept[0].f.subs(profile.u, 0))
    return replace(profile, pieces=pieces, at=tuple(at.items()))
