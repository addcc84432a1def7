"""Algorithms: one record each. A record says what it needs of a problem and writes one iteration as assignments.

Every term is smooth (its gradient has a derived Lipschitz constant, or a step size was given) or proximable (its prox was
derived). What does not fit is refused with what was needed, what was found, and which algorithm fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.cones import nonnegative
from unroll.calculus.curvature import Bounds
from unroll.calculus.gradient import gradient, kinked
from unroll.calculus.prox import Proximal, proximable
from unroll.calculus.torch_text import nonzero
from unroll.derivation.step import LAYER, Assign, State, Step
from unroll.errors import DeriveError, SpecError, did_you_mean
from unroll.language.constructors import add, as_constant, constant, elementwise, eye, prox, scale, split, symbol, zeros
from unroll.language.nodes import Add, Expr, Hold, Indicator, Map, Sym, depends, scalar, show_shape, slot, walk
from unroll.language.parse import Place, Scope, nowhere, parse
from unroll.language.problem import Problem, place_of
from unroll.language.show import pretty, text
from unroll.language.traversal import held_at, substitute
from unroll.spec import Spec

STEP, LIPSCHITZ = scalar("step", positive=True), scalar("L", positive=True)
MOMENTUM, COUNTER_NEXT = scalar("momentum"), scalar("t_next", positive=True)


NONE_FITS = "no algorithm here fits; each term must be smooth, or the rest proximable together"


@dataclass(frozen=True)
class Part:
    """One summand of the objective and what is known of it, derived when it is first read.

    weight_name: what a number in front of it is called.  given: is it taken through its gradient, whatever else is known?
    """

    term: str
    e: Expr
    variable: Sym
    weight_name: str = "weight"
    given: bool = False

    @cached_property
    def differentiable(self) -> bool:
        """Has it a gradient? Curvature is asked only where the formula leaves that open: |u| - log(1 + |u|)."""
        return _differentiable(self.e, self.variable) or self._finite is not None

    @cached_property
    def smooth(self) -> Bounds | None:
        """Hessian bounds, infinite where it is differentiable and no more."""
        rough = Bounds(constant(-sp.oo), constant(sp.oo), "proved", "differentiable")
        return self._finite or (rough if self.differentiable else None)

    @cached_property
    def _finite(self) -> Bounds | None:
        found = None if self.is_set else curvature.bounds(self.e, self.variable)
        return found if found is not None and found.smooth else None

    @property
    def proximal(self) -> Proximal | None:
        """Its prox, where it is not smooth."""
        return self._prox[0]

    @property
    def reason(self) -> str:
        """Why it has no prox."""
        return self._prox[1]

    @property
    def weight(self) -> tuple[sp.Symbol, Expr] | None:
        """A number made of data, or held, that stands before a term which has a prox, and its name in that prox."""
        return self._prox[2]

    @cached_property
    def _prox(self) -> tuple[Proximal | None, str, tuple[sp.Symbol, Expr] | None]:
        if self.given or self._finite is not None:
            return None, "", None
        try:
            return proximable(self.e, self.variable), "", None
        except DeriveError as refused:
            w, own = _unweighed(self.e, self.variable)
            if as_constant(w) is None:
                name = scalar(self.weight_name, positive=nonnegative(w))
                try:
                    return proximable(scale(name, own), self.variable), "", (name, w)
                except DeriveError:
                    pass
            return None, refused.message, None

    @property
    def holds(self) -> bool:
        """Is something that changes with the variable held constant in it?"""
        return any(isinstance(x, Hold) and self.variable in x.symbols for x in walk(self.e))

    @property
    def weighed(self) -> Expr:
        """The term as its prox takes it: with the name of its weight."""
        if self.weight is None:
            return self.e
        return scale(self.weight[0], _unweighed(self.e, self.variable)[1])

    @property
    def descended(self) -> bool:
        """Is it taken through its gradient, where both ways are open?"""
        return self.given or (self.differentiable and self.proximal is None)

    @property
    def is_set(self) -> bool:
        return isinstance(split(self.e)[1], Indicator)

    def show(self) -> str:
        found = (
            []
            if self.smooth is None
            else ["smooth" if self.smooth.smooth else "differentiable (no Lipschitz constant is known)"]
        )
        found += [] if self.proximal is None else ["constraint with a projection" if self.is_set else "proximable"]
        return f"{self.term}: {pretty(self.e)} is {' and '.join(found) or f'neither smooth nor proximable ({self.reason})'}"


@dataclass(frozen=True)
class Options:
    """What a spec may ask of an algorithm. momentum: None is the algorithm's own."""

    step: str = "1/L"
    momentum: str | None = None
    place: Place = nowhere


@dataclass(frozen=True)
class Algorithm:
    """build(problem, parts, options) writes the iteration. fits(parts): None, or what is missing."""

    name: str
    about: str
    source: str
    needs: str
    fits: Callable[[tuple[Part, ...]], str | None]
    build: Callable[[Problem, tuple[Part, ...], Options], Step]
    momenta: tuple[str, ...] = ()


def find(name: str, spec: Spec | None = None, path: tuple[str | int, ...] = ()) -> Algorithm:
    """The record of a name; path: where the spec says it. Raises SpecError E303."""
    record = BY_NAME.get(name)
    if record is None:
        where = spec.origin(*path).where() if spec is not None and name else None
        hint = did_you_mean(name, BY_NAME) or f"algorithms: {', '.join(BY_NAME)}"
        raise SpecError("E303", f"unknown algorithm '{name}'" if name else "no algorithm is named", where, hint)
    return record


def build(record: Algorithm, problem: Problem, options: Options) -> Step:
    """One iteration on `problem`. Raises DeriveError E303 with what was needed, found, and what fits."""
    if len(problem.variables) != 1:
        raise DeriveError(
            "E303", f"{record.name} minimises over one variable; this problem has {len(problem.variables)}"
        )
    if options.momentum is not None and options.momentum.split("(")[0] not in record.momenta:
        hint = (
            f"its momenta: {', '.join(record.momenta)}"
            if record.momenta
            else f"{record.name} has no momentum; fista has"
        )
        raise DeriveError("E303", f"{record.name} does not know the momentum '{options.momentum}'", hint=hint)
    parts = classify(problem)
    missing = record.fits(parts)
    if missing is not None:
        fitting = [a.name for a in ALGORITHMS if a.fits(parts) is None]
        raise DeriveError(
            "E303",
            f"{record.name} does not fit: {missing}",
            hint=f"{' or '.join(fitting)} fits" if fitting else unsigned(parts) or NONE_FITS,
            notes=(f"needed: {record.needs}", *(f"found: {p.show()}" for p in parts)),
        )
    step = record.build(problem, parts, options)
    each, once = where_known(step.definitions, {s.symbol.name for s in step.states})
    return replace(step, definitions=tuple(once), assigns=(*each, *step.assigns))


def where_known(definitions: Iterable[Assign], moving: set[str]) -> tuple[list[Assign], list[Assign]]:
    """Definitions that depend on the state are worked out in every layer, the others once."""
    inside: list[Assign] = []
    once: list[Assign] = []
    changing: set[sp.Basic] = set()
    for a in definitions:
        symbols = {s.name for s in a.value.symbols} if isinstance(a.value, Expr) else set[str]()
        free = a.value.scalars if isinstance(a.value, Expr) else a.value.free_symbols
        if symbols & moving or free & changing or LAYER in free:
            changing.add(cast(sp.Symbol, a.target))
            inside.append(a)
        else:
            once.append(a)
    return inside, once


def unsigned(parts: tuple[Part, ...]) -> str:
    """A hint where terms have no prox because the sign of a scalar, or of data, is open."""
    refused = [p for p in parts if p.smooth is None and p.proximal is None]
    open_signs = sorted({s.name for p in refused for s in p.e.scalars if s.is_positive is None and not s.is_integer})
    if open_signs:
        return f"declare its sign: {open_signs[0]}: {{default: .., positive: true}}, under scalars"
    names = [s.name for p in refused for s in sorted(p.e.symbols, key=lambda s: s.name) if _fits_if_positive(p, s)]
    return (
        f"{names[0]} may be negative: declare {names[0]}: {{shape: [..], positive: true}}, or write abs({names[0]}) or exp({names[0]})"
        if names
        else ""
    )


def _fits_if_positive(p: Part, data: Sym) -> bool:
    if data is p.variable or "positive" in data.props:
        return False
    s = symbol(data.name, data.nrows, data.ncols, data.role, data.rank, data.family, {*data.props, "positive"})
    known = Part(p.term, substitute(p.e, {data: s}), p.variable, f"weight_{p.term}")
    return known.smooth is not None or known.proximal is not None


def classify(problem: Problem) -> tuple[Part, ...]:
    """Every summand of every term; what is known of it is derived when it is read."""
    (z,) = problem.variables
    parts: list[Part] = []
    for name, cost in problem.costs.items():
        parts += [Part(name, e, z, f"weight_{name}{i or ''}") for i, e in enumerate(_summands(cost, z))]
    if not parts:
        raise DeriveError("E303", f"the objective does not depend on {z.name}")
    return tuple(parts)


def _summands(cost: Expr, z: Sym) -> list[Expr]:
    """The terms of a sum that depend on z; entrywise ones of the same argument stay together: |u| - log(1 + |u|) is smooth."""
    groups: dict[object, list[Expr]] = {}
    for e in cost.terms if isinstance(cost, Add) else (cost,):
        if depends(e, z):
            inner = curvature.entrywise(e, z)
            groups.setdefault(e if inner is None else tuple(a for a in inner[1].args if depends(a, z)), []).append(e)
    return [add(*g) for g in groups.values()]


def _unweighed(e: Expr, z: Sym) -> tuple[Expr, Expr]:
    """(w, x) with e = w x, w a number made of data, or held; (1, e) where there is none."""
    c, body = split(e)
    moving = [i for i, a in enumerate(body.args) if depends(a, z)] if isinstance(body, Map) else []
    if not isinstance(body, Map) or not e.is_scalar or len(moving) != 1 or len(body.args) == 1:
        return eye(1), e
    w, own = body.profile.as_independent(slot(moving[0]), as_Add=False)
    return elementwise(w, *body.args), scale(c, elementwise(own, *body.args))


def _differentiable(e: Expr, z: Sym) -> bool:
    """Has e a gradient everywhere (in its domain), though no Lipschitz constant is known for it?"""
    for x in walk(e, within=lambda x: not isinstance(x, Hold)):  # what is held is a constant, whatever is in it
        if isinstance(x, Map) and depends(x, z):
            signed = {slot(i): sp.Symbol(f"_{i}", nonnegative=True) for i, a in enumerate(x.args) if nonnegative(a)}
            moving = [slot(i) for i, a in enumerate(x.args) if depends(a, z)]
            if kinked(x.profile.xreplace(signed), frozenset(signed.get(s, s) for s in moving)):
                return False
    try:
        gradient(e, z)
    except DeriveError:
        return False
    return True


# --- what records need ------------------------------------------------------------------------------------------------


def _smooth(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(p for p in parts if p.descended)


def _rest(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(p for p in parts if not p.descended)


def _all_smooth(parts: tuple[Part, ...]) -> str | None:
    bad = [p for p in parts if not p.differentiable]
    return f"{pretty(bad[0].e)} is not smooth" if bad else None


def _smooth_and_proximable(parts: tuple[Part, ...]) -> str | None:
    for p in _rest(parts):
        if p.proximal is None:
            return p.reason
    if not _smooth(parts):
        return "no term is smooth, so there is no gradient to follow"
    return _joint(_rest(parts))


def _joint(parts: tuple[Part, ...]) -> str | None:
    if len(parts) > 1:
        try:
            proximable(add(*(p.weighed for p in parts)), parts[0].variable)
        except DeriveError as refused:
            return refused.message
    return None


def _smooth_and_sets(parts: tuple[Part, ...]) -> str | None:
    loose = [p for p in _rest(parts) if not p.is_set]
    if loose:
        return f"{pretty(loose[0].e)} is neither smooth nor a constraint"
    if not _rest(parts):
        return "there is no constraint to project on"
    return _smooth_and_proximable(parts)


def _curved_up(parts: tuple[Part, ...]) -> str | None:
    if all(p.smooth is not None and p.smooth.convex for p in _smooth(parts)):
        return "what is minimised is convex; this step is for what is convex and maximised"
    return _smooth_and_sets(parts)


# --- pieces of iterations ---------------------------------------------------------------------------------------------


def state_of(z: Sym, name: str | None = None) -> Sym:
    """The running value of a variable."""
    return symbol(name or z.name, z.nrows, z.ncols, "state", z.rank, z.family, z.props)


def _fresh(problem: Problem, name: str) -> str:
    return name if name not in problem.scope.names else _fresh(problem, name + "_")


def _weights(parts: tuple[Part, ...], at: Sym) -> tuple[Assign, ...]:
    """The numbers in front of terms that are taken through their prox, at the point where the step is taken."""
    found = ((p.variable, *p.weight) for p in _rest(parts) if p.weight is not None)
    return tuple(Assign(name, substitute(w, {z: at}), "weight") for z, name, w in found)


def _step_size(
    problem: Problem, parts: tuple[Part, ...], options: Options, at: Sym
) -> tuple[tuple[Assign, ...], tuple[str, ...]]:
    """Definitions of step (and L where it is used), what is held at `at`. Raises DeriveError E304."""
    (z,) = problem.variables
    names = {**problem.scope.names, "L": LIPSCHITZ}
    value = parse(options.step, replace(problem.scope, names=names), options.place)
    if isinstance(value, Expr):
        raise SpecError(
            "E132",
            f"a step size is a number; {options.step} is {show_shape(value.shape)}",
            options.place(0, len(options.step)),
        )
    if value.is_nonpositive:
        raise SpecError("E132", f"a step size is positive; {options.step} is not", options.place(0, len(options.step)))
    if LIPSCHITZ not in value.free_symbols:
        return (Assign(STEP, value, "step size"),), ("step size given, not derived",)
    smooth = add(*(p.e for p in _smooth(parts)))
    found = curvature.smoothness(smooth, z)
    lipschitz = substitute(found.lipschitz, {z: at})
    if as_constant(lipschitz) == 0:
        raise DeriveError(
            "E304",
            "the smooth part is linear: L is 0, so 1/L is no step size",
            hint="give the step size yourself: step: 0.1",
        )
    if any(s.role != "parameter" for s in lipschitz.symbols):
        # L may be 0 for one sample: its smooth part is constant there, and every number is a bound
        value = value.subs(LIPSCHITZ, cast(sp.Expr, nonzero(LIPSCHITZ)))
    note = f"L: {found.proof}, {found.reason}"
    return (Assign(LIPSCHITZ, lipschitz, "Lipschitz constant of the gradient"), Assign(STEP, value, "step size")), (
        note,
    )


def _gradient_step(problem: Problem, parts: tuple[Part, ...], at: Sym) -> Expr:
    """at - step * gradient of the smooth part at `at`."""
    (z,) = problem.variables
    slope = gradient(add(*(p.e for p in _smooth(parts))), z)
    return substitute(add(z, scale(-STEP, slope)), {z: at})


def _proximal_step(problem: Problem, parts: tuple[Part, ...], at: Sym) -> Expr:
    """prox of step * (the rest) at the gradient step."""
    (z,) = problem.variables
    moved = _gradient_step(problem, parts, at)
    rest = _rest(parts)
    return prox(_held(rest, at), z, STEP, moved) if rest else moved


def _held(rest: tuple[Part, ...], at: Sym) -> Expr:
    """What the prox is of: what is held is worked out at the point where the step is taken."""
    return held_at(add(*(p.weighed for p in rest)), {rest[0].variable: at})


def _monotone(parts: tuple[Part, ...], options: Options) -> tuple[str, ...]:
    return (
        ("monotone: no step raises the objective",)
        if options.step == "1/L"
        and all(p.descended or p.is_set or (p.proximal and p.proximal.convex) for p in parts)
        and not any(p.holds for p in parts)
        else ()
    )


def _descent(name: str) -> Callable[[Problem, tuple[Part, ...], Options], Step]:
    def make(problem: Problem, parts: tuple[Part, ...], options: Options) -> Step:
        (z,) = problem.variables
        state = state_of(z)
        definitions, notes = _step_size(problem, parts, options, state)
        definitions = (*_weights(parts, state), *definitions)
        value = _proximal_step(problem, parts, state)
        note = f"{z.name} <- {text(value)}"
        return Step(
            name,
            definitions,
            (State(state, zeros(*z.shape)),),
            (Assign(state, value, note),),
            (state,),
            (),
            notes + _monotone(parts, options),
        )

    return make


def _gradient_descent(problem: Problem, parts: tuple[Part, ...], options: Options) -> Step:
    """Every term through its gradient."""
    return _descent("gradient_descent")(problem, tuple(replace(p, given=True) for p in parts), options)


def _fista(problem: Problem, parts: tuple[Part, ...], options: Options) -> Step:
    """z⁺ = prox(y - step grad(y));  y⁺ = z⁺ + momentum (z⁺ - z)."""
    (z,) = problem.variables
    state, y, ahead = (state_of(z, n) for n in (z.name, _fresh(problem, "y"), _fresh(problem, f"{z.name}_next")))
    definitions, notes = _step_size(problem, parts, options, y)
    definitions = (*_weights(parts, y), *definitions)
    rule = (options.momentum or "beck_teboulle").split("(")[0]
    if rule == "beck_teboulle" and options.momentum not in (None, rule):
        raise DeriveError(
            "E303", f"{options.momentum}: this momentum has no parameter", hint="chambolle_dossal(a) has one"
        )
    if rule == "beck_teboulle":
        counter = scalar(_fresh(problem, "t"), positive=True)
        counters = (State(counter, sp.Integer(1)),)
        before = (
            Assign(COUNTER_NEXT, (1 + sp.sqrt(1 + 4 * counter**2)) / 2, "momentum of Beck and Teboulle"),
            Assign(MOMENTUM, (counter - 1) / COUNTER_NEXT, ""),
            Assign(counter, COUNTER_NEXT, ""),
        )
    else:
        a = _parameter_of(options.momentum or "", 3)
        counters, before = (), (Assign(MOMENTUM, LAYER / (LAYER + a + 1), "momentum of Chambolle and Dossal"),)
    assigns = (
        Assign(ahead, _proximal_step(problem, parts, y), f"{z.name}_next <- {text(_proximal_step(problem, parts, y))}"),
        *before,
        Assign(y, add(ahead, scale(MOMENTUM, add(ahead, scale(-1, state)))), "extrapolate"),
        Assign(state, ahead, ""),
    )
    start = zeros(*z.shape)
    return Step("fista", definitions, (State(state, start), State(y, state), *counters), assigns, (state,), (), notes)


def _power(problem: Problem, parts: tuple[Part, ...], options: Options) -> Step:
    """z⁺ = P(minus the gradient of the smooth part): the direction of steepest descent, projected."""
    (z,) = problem.variables
    state = state_of(z)
    slope = gradient(add(*(p.e for p in _smooth(parts))), z)
    along = substitute(scale(-1, slope), {z: state})
    value = prox(_held(_rest(parts), state), z, sp.Integer(1), along)
    return Step(
        "power_step",
        _weights(parts, state),
        (State(state, zeros(*z.shape)),),
        (Assign(state, value, f"{z.name} <- {text(value)}"),),
        (state,),
    )


def _parameter_of(momentum: str, default: int) -> sp.Expr:
    """chambolle_dossal(a) -> a; must be larger than 2. Raises DeriveError E303."""
    if "(" not in momentum:
        return sp.Integer(default)
    if not momentum.endswith(")"):
        raise DeriveError("E303", f"{momentum}: the bracket is not closed")
    value = parse(momentum.split("(", 1)[1].removesuffix(")"), Scope(), nowhere)
    if isinstance(value, Expr) or not value.is_number or value <= 2:
        raise DeriveError("E303", f"{momentum}: the parameter must be a number larger than 2")
    return value


def parse_start(problem: Problem, spec: Spec, name: str) -> Expr:
    """The start value of a variable. Raises SpecError E101, E131."""
    place = place_of(spec, "unroll", "start", name)
    z = next((v for v in problem.variables if v.name == name), None)
    if z is None:
        raise SpecError(
            "E101",
            f"'{name}' is not a variable",
            spec.key_where("unroll", "start", name),
            did_you_mean(name, [v.name for v in problem.variables]),
        )
    value = parse(spec.unroll.start[name], problem.scope, place)  # type: ignore[union-attr]
    e = value if isinstance(value, Expr) else constant(value, *z.shape)
    if e.shape != z.shape:
        raise SpecError("E131", f"the start of {name} has another shape than {name}", place(0, 1))
    if any(v in e.symbols for v in problem.variables):
        raise SpecError("E101", f"the start of {name} depends on a variable", place(0, 1))
    return e


ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("gradient_descent", "z⁺ = z − step ∇f(z)", "Cauchy 1847; Nesterov 2004, ch. 1.2", "every term smooth", _all_smooth, _gradient_descent),
    Algorithm("projected_gradient", "z⁺ = P(z − step ∇f(z))", "Goldstein 1964, doi:10.1090/S0002-9904-1964-11178-2", "smooth terms, and constraints with a projection", _smooth_and_sets, _descent("projected_gradient")),
    Algorithm("proximal_gradient", "z⁺ = prox(z − step ∇f(z)), known as ISTA", "Daubechies, Defrise & De Mol 2004, doi:10.1002/cpa.20042", "smooth terms, and the rest proximable together", _smooth_and_proximable, _descent("proximal_gradient")),
    Algorithm("power_step", "z⁺ = P(−∇f(z)), the step of infinite size: for what is convex and maximised over a sphere or a group", "Journée, Nesterov, Richtárik & Sepulchre 2010, JMLR 11; Zhai et al. 2020, JMLR 21", "smooth terms that are not all convex, and a constraint with a projection", _curved_up, _power),
    Algorithm("fista", "proximal gradient at an extrapolated point", "Beck & Teboulle 2009, doi:10.1137/080716542; Chambolle & Dossal 2015, doi:10.1007/s10957-015-0746-4", "smooth terms, and the rest proximable together", _smooth_and_proximable, _fista, ("beck_teboulle", "chambolle_dossal")),
)  # fmt: skip
BY_NAME = {a.name: a for a in ALGORITHMS}
