"""Dealing: which terms of an objective stand for which letter of an algorithm.

A letter needs what its text does with it: `grad(f, z)` a gradient, `prox(t * g, v)` a prox, `argmin(f(z) + ..)` a quadratic,
g(K @ z) a term that reads z through something linear. Smooth terms go to what takes gradients, the others to the first letter of
`solves` that can take them, beside what it has already. What fits nowhere is refused with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product

import sympy as sp

from unroll.calculus import curvature
from unroll.calculus.cones import nonnegative
from unroll.calculus.entropy import entropic, signed_parts
from unroll.calculus.gradient import gradient
from unroll.calculus.linear import Linear, quadratic
from unroll.calculus.majorise import Of, tangent
from unroll.calculus.prox import proximable, replace_role, separable
from unroll.derivation.parts import Part
from unroll.errors import DeriveError, SpecError, did_you_mean
from unroll.language.constructors import add, as_constant
from unroll.language.nodes import Expr, Indicator, Sym, depends
from unroll.language.parse import Reader, Scope
from unroll.language.show import pretty
from unroll.spec.texts import Text

GRADIENT, PROX, ARGMIN, SWEEP, ENTROPY = "gradient", "prox", "argmin", "sweep", "entropy"
MAJORANTS: dict[str, Of] = {"majorant in |z|": "abs", "majorant in z^2": "square"}
USES = {
    "grad": GRADIENT,
    "hess": GRADIENT,
    "prox": PROX,
    "argmin": ARGMIN,
    "sweep": SWEEP,
    "bregman": ENTROPY,
    "logbregman": ENTROPY,
    "tangent": "majorant",
}
MOST = 512
"""Dealings that are tried, where the first does not fit."""
NEAR = 32
"""Those among which the next best is looked for."""
PROPERTIES = (
    "convex",
    "strongly convex",
    "not convex",
    "concave",
    "quadratic",
    "rising",
    "sets",
    "simplex",
    "equations",
)


class Misfit(Exception):
    """An algorithm does not fit a problem; what is missing."""


@dataclass(frozen=True)
class Letter:
    """A letter of `solves`. operator: the K of g(K @ z).  index: the j of g[j](K[j] @ z), one for each term."""

    name: str
    arguments: tuple[str, ...]
    operator: str = ""
    index: str = ""
    over: str = ""
    uses: frozenset[str] = frozenset()

    @property
    def argument(self) -> str:
        return self.arguments[0]


@dataclass(frozen=True)
class Share:
    """What a letter stands for: the sum e of some terms, as a function of `variable`, which is K z where there is a K.

    places: each argument of the letter, and the variable of the problem that it is.
    """

    letter: Letter
    parts: tuple[Part, ...]
    variable: Sym
    e: Expr | None
    linear: Linear | None = None
    places: tuple[tuple[str, Sym], ...] = ()

    @property
    def convex(self) -> bool:
        return all(convex(p) for p in self.parts)


Dealt = Mapping[str, tuple[Share, ...]]


@cache
def letters(text: Text) -> tuple[Letter, ...]:
    """What `solves` says, and what the updates do with it. Raises SpecError E100 (a formula that cannot be read), E320."""
    written = text.record.solves
    try:
        tree = ast.parse(written.strip(), mode="eval").body
        found = tuple(_letter(t) for t in _summands(tree))
    except (SyntaxError, ValueError):
        raise SpecError(
            "E320",
            f"'{written}' does not say what is minimised",
            text.where("solves"),
            "a sum of letters, each of the variable or of something linear in it: f(z) + g(K @ z)",
        ) from None
    names = [x.name for x in found]
    _refuse_names(text, found)
    uses = _uses(text, set(names))
    for name in names:
        if not uses[name]:
            hint = f"the updates may take grad({name}, z), prox(step * {name}, z), or argmin({name}(z) + ..)"
            raise SpecError("E320", f"no update uses the letter {name}", text.where("solves"), hint)
    return tuple(replace(x, uses=frozenset(uses[x.name])) for x in found)


def _refuse_names(text: Text, found: tuple[Letter, ...]) -> None:
    """Raises SpecError E320 for names that mean two things or nothing."""
    record, names = text.record, [x.name for x in found]
    if len(set(names)) < len(names):
        raise SpecError(
            "E320",
            f"a letter stands twice in {record.solves}",
            text.where("solves"),
            "a letter is a sum of terms: write it once",
        )
    indices = {x.index for x in found if x.index}
    rules = [(("momenta", m), r) for m, r in record.momenta.items()]
    written: dict[str, tuple[str, ...]] = {}
    for path, part in [((), record), *rules]:
        for section in ("scalars", "states", "updates"):
            for key in getattr(part, section):
                name, _, index = key.removesuffix("]").partition("[")
                where = text.where(*path, section, key)
                if name in names:
                    raise SpecError("E320", f"{name} is a letter of {record.solves}, and stands here too", where)
                if index and index not in indices:
                    hint = f"solves: sum(g[{index}](K[{index}] @ z) for {index} in J)"
                    raise SpecError("E320", f"{index} is no index of {record.solves}", where, hint)
                written[name] = (*written.get(name, ()), section)
    for name, sections in written.items():
        if "states" in sections and "updates" not in sections:
            key = next((k for k in record.states if k.partition("[")[0] == name), None)
            where = text.where("states", key) if key is not None else text.where("momenta")
            raise SpecError(
                "E320", f"no update changes the state {name}", where, "a number that stays is one of scalars"
            )
    if loose := next((z for z in arguments_of(found) if z not in record.updates), None):
        raise SpecError("E320", f"no update changes {loose}, the variable", text.where("updates"), f"{loose}: ...")
    rule = record.updates.get("momentum", "")
    if record.momenta and rule not in record.momenta:
        hint = f"momentum: {next(iter(record.momenta))}"
        raise SpecError(
            "E320", "momenta: has rules, and the update momentum names none of them", text.where("momenta"), hint
        )
    if bad := next((n for n in record.notes if n not in written), None):
        raise SpecError("E320", f"there is no update {bad}", text.where("notes", bad), did_you_mean(bad, written))


def arguments_of(found: tuple[Letter, ...]) -> tuple[str, ...]:
    """The variables of a text, in the order in which `solves` names them."""
    return tuple(dict.fromkeys(a for x in found for a in x.arguments))


def _summands(tree: ast.expr) -> Iterator[ast.expr]:
    match tree:
        case ast.BinOp(left=a, op=ast.Add(), right=b):
            yield from _summands(a)
            yield from _summands(b)
        case _:
            yield tree


def _letter(tree: ast.expr) -> Letter:
    match tree:
        case ast.Call(func=ast.Name("sum"), args=[ast.GeneratorExp(elt=inner, generators=[made])]):
            match made:
                case ast.comprehension(target=ast.Name(index), iter=ast.Name(over), ifs=[]):
                    letter = _letter(inner)
                    if not letter.operator:  # an index counts operators
                        raise ValueError
                    return replace(letter, index=index, over=over)
                case _:
                    raise ValueError
        case ast.Call(func=ast.Name(name) | ast.Subscript(value=ast.Name(name)), args=[arg]):
            match arg:
                case ast.Name(z):
                    return Letter(name, (z,))
                case ast.BinOp(
                    left=ast.Name(k) | ast.Subscript(value=ast.Name(k)), op=ast.MatMult(), right=ast.Name(z)
                ):
                    return Letter(name, (z,), k)
                case _:
                    raise ValueError
        case ast.Call(func=ast.Name(name), args=[_, _, *_] as args, keywords=[]):
            written = tuple(a.id for a in args if isinstance(a, ast.Name))
            if len(set(written)) < len(args):
                raise ValueError
            return Letter(name, written)
        case _:
            raise ValueError


def _uses(text: Text, names: set[str]) -> dict[str, set[str]]:
    record = text.record
    formulas = {("updates", k): f for k, f in record.updates.items()}
    formulas |= {("states", k): s.start for k, s in record.states.items() if s.start is not None}
    for momentum, rule in record.momenta.items():
        formulas |= {("momenta", momentum, "updates", k): f for k, f in rule.updates.items()}
    found: dict[str, set[str]] = {n: set() for n in names}
    for path, formula in formulas.items():
        tree = Reader(formula, Scope(), text.place(*path)).tree()
        for call in (x for x in ast.walk(tree) if isinstance(x, ast.Call)):
            match call:
                case ast.Call(func=ast.Name("tangent"), args=[ast.Name() | ast.Subscript() as first, _, ast.Name(of)]):
                    use = next((u for u, o in MAJORANTS.items() if o == of), "")
                case ast.Call(func=ast.Name(word), args=[first, *_]) if word in USES:
                    use = USES[word]
                case _:
                    continue
            for name in _named(first):
                if name in names:
                    found[name].add(use)
    return found


def _named(e: ast.AST) -> Iterator[str]:
    """The names in a formula, but those that an operation within takes."""
    match e:
        case ast.Name(name):
            yield name
        case ast.Call(func=ast.Name("tangent")):
            return
        case _:
            for x in ast.iter_child_nodes(e):
                yield from _named(x)


def placed(text: Text, variables: tuple[Sym, ...]) -> dict[str, Sym]:
    """The variable of the problem that each argument of a text is: of its name, or else in the order of both. Raises Misfit."""
    arguments = arguments_of(letters(text))
    if len(arguments) != len(variables):
        names = " and ".join(v.name for v in variables)
        raise Misfit(f"it minimises over {' and '.join(arguments)}, and the problem over {names}")
    by_name = {v.name: v for v in variables}
    return (
        {a: by_name[a] for a in arguments}
        if {*arguments} == {*by_name}
        else dict(zip(arguments, variables, strict=True))
    )


def deal(text: Text, parts: tuple[Part, ...], named: Mapping[str, tuple[str, ...]] | None = None) -> Dealt:
    """Every part to a letter. named: letter -> the terms that a spec gives it. Raises Misfit with what is missing."""
    hands = next(_dealings(text, parts, named or {}))
    places = placed(text, parts[0].among or (parts[0].variable,))
    return {x.name: tuple(_shares(x, tuple(hands[x.name]), places)) for x in letters(text)}


def others(
    text: Text, parts: tuple[Part, ...], named: Mapping[str, tuple[str, ...]] | None = None
) -> Iterator[dict[str, tuple[str, ...]]]:
    """Letter -> terms, of the dealings after the one that is taken and near it, as a spec would name them."""
    if not has_a_choice(letters(text)):
        return
    first, *after = (
        {x: tuple(dict.fromkeys(p.term for p in mine)) for x, mine in hands.items() if mine}
        for hands in _dealings(text, parts, named or {}, NEAR)
    )
    whole = (h for h in after if len({t for mine in h.values() for t in mine}) == sum(map(len, h.values())))
    yield from (h for h in whole if h != first)


def _dealings(
    text: Text, parts: tuple[Part, ...], named: Mapping[str, tuple[str, ...]], most: int = MOST
) -> Iterator[dict[str, list[Part]]]:
    """Letter -> parts, of all that meet every need, the first choice first. Raises Misfit with what the first lacks, if none does."""
    found = letters(text)
    places = placed(text, parts[0].among or (parts[0].variable,))
    smooth = next((x for x in found if GRADIENT in x.uses), None)
    others = [x for x in found if GRADIENT not in x.uses]
    if not others and smooth is not None:
        parts = tuple(replace(p, given=True) for p in parts)
        bad = [p for p in parts if not p.differentiable]
        if bad:
            raise Misfit(f"{pretty(bad[0].e)} is not smooth")
    chosen = {t: letter for letter, terms in named.items() for t in terms}
    choices = [_choices(p, found, smooth, chosen.get(p.term), places) for p in parts]
    greedy = _greedy(parts, choices, found)
    refused = _lacks(greedy, found, text)
    if refused is None:
        yield greedy
    fits = refused is None
    for picks in islice(product(*choices), most):
        hands = {x.name: [p for p, pick in zip(parts, picks, strict=True) if pick is x] for x in found}
        if _lacks(hands, found, text) is None:
            fits = True
            yield hands
    if refused is not None and not fits:
        raise refused


def has_a_choice(found: Iterable[Letter]) -> bool:
    """Are there letters, beside one that takes gradients, among which terms could be dealt otherwise?"""
    others = [x for x in found if GRADIENT not in x.uses]
    return len(others) > 1 or any(x.operator for x in others)


def _lacks(hands: Mapping[str, list[Part]], found: tuple[Letter, ...], text: Text) -> Misfit | None:
    """The first need that is not met."""
    try:
        _check(hands, found, text)
    except Misfit as missing:
        return missing
    return None


def _choices(
    p: Part, found: tuple[Letter, ...], smooth: Letter | None, chosen: str | None, places: Mapping[str, Sym]
) -> list[Letter]:
    """The letters that a part may go to, the first choice first: those of its variables, or of more where a gradient is taken."""
    if chosen is not None:
        return [x for x in found if x.name == chosen]
    if len(places) > 1:
        reads = {q.variable for q in (p, *p.also)}
        of = {x.name: {places[a] for a in x.arguments} for x in found}
        fits = [x for x in found if of[x.name] == reads or (GRADIENT in x.uses and of[x.name] > reads)]
        if not fits:
            names = ", ".join(sorted(v.name for v in reads))
            raise Misfit(f"{pretty(p.e)} reads {names}, and no letter is of that")
        return sorted(fits, key=lambda x: (GRADIENT in x.uses) != p.descended)
    if smooth is not None and p.descended:
        return [smooth, *(x for x in found if x is not smooth)]
    return [x for x in found if x is not smooth] or list(found)


def _greedy(parts: tuple[Part, ...], choices: list[list[Letter]], found: tuple[Letter, ...]) -> dict[str, list[Part]]:
    """Each part to the first letter that can take it beside what it has; what fits nowhere, to the last."""
    hands: dict[str, list[Part]] = {x.name: [] for x in found}
    for p, options in zip(parts, choices, strict=True):
        letter = next((x for x in options if _takes(x, [*hands[x.name], p])), options[-1])
        hands[letter.name].append(p)
    return hands


def _check(hands: Mapping[str, list[Part]], found: tuple[Letter, ...], text: Text) -> None:
    """Raises Misfit with the first need that is not met."""
    for required in text.record.requires:
        _require(required, hands, text)
    for x in found:
        for p in hands[x.name]:
            _refuse(x, [p])
    for x in found:
        if x.operator and not hands[x.name]:
            raise Misfit(f"no term is left for {x.name}({x.operator} {x.argument})")
        if GRADIENT in x.uses and not hands[x.name]:
            raise Misfit("no term is smooth, so there is no gradient to follow")
    for x in found:
        _refuse(x, hands[x.name])


def _takes(letter: Letter, parts: list[Part]) -> bool:
    """Can a letter stand for all of these?"""
    try:
        _refuse(letter, parts)
    except Misfit:
        return False
    return True


def _refuse(letter: Letter, parts: list[Part]) -> None:
    """Raises Misfit where a letter cannot stand for these parts."""
    if GRADIENT in letter.uses:
        for p in parts:
            if not all(q.differentiable for q in (p, *p.also)):
                raise Misfit(f"{pretty(p.e)} is not smooth")
            if letter.operator and p.inner is None:
                raise Misfit(f"{pretty(p.e)} is no {letter.name}(K {p.variable.name} + b) with one K")
        if letter.operator:
            _refuse_several(letter, parts)
        return
    if letter.operator:
        _refuse_inner(letter, parts)
        return
    if ARGMIN in letter.uses:
        for p in parts:
            if not quadratic(p.e, p.variable):
                raise Misfit(f"{pretty(p.e)} is not quadratic, and {letter.name} is minimised exactly")
        return
    if SWEEP in letter.uses:
        rest = [p for p in parts if not quadratic(p.e, p.variable)]
        for p in rest:
            try:
                separable(p.weighed, p.variable)
            except DeriveError as refused:
                raise Misfit(f"{pretty(p.e)} is not quadratic: {refused.message}") from None
        _try(lambda z: separable(add(*(p.weighed for p in rest)), z), rest)
        return
    if ENTROPY in letter.uses:
        _try(lambda z: entropic(add(*(p.e for p in parts)), z, sp.S.One, z), parts)
        return
    for use, of in MAJORANTS.items():
        if use in letter.uses:
            _refuse_majorant(parts, of)
            return
    for p in parts:
        if p.proximal is None and p.own_prox is None:
            raise Misfit(p.own_reason)
    if len(parts) > 1:
        _joint(add(*(p.weighed for p in parts)), parts[0].variable)


def _refuse_majorant(parts: list[Part], of: Of) -> None:
    """Each has one, and there is a prox of all together, or all are quadratic."""
    for p in parts:
        _try(lambda z, e=p.e: tangent(e, z, z, of), parts)
    if not parts:
        return
    z = parts[0].variable
    for p in parts:
        above = tangent(p.e, z, replace_role(z), of)
        if of == "square" and not quadratic(above, z):
            raise Misfit(f"what lies above {pretty(p.e)}, {pretty(above)}, is not quadratic")
    if of == "abs":
        _joint(add(*(tangent(p.e, z, replace_role(z), of) for p in parts)), z)


def _try(derive: Callable[[Sym], object], parts: list[Part]) -> None:
    """Raises Misfit where a derivation is refused."""
    try:
        if parts:
            derive(parts[0].variable)
    except DeriveError as refused:
        raise Misfit(refused.message) from None


def _joint(e: Expr, z: Sym) -> None:
    try:
        proximable(e, z)
    except DeriveError as refused:
        raise Misfit(refused.message) from None


def _refuse_inner(letter: Letter, parts: list[Part]) -> None:
    for p in parts:
        if p.inner is None:
            why = p.reason or "it reads the variable in more than one way"
            raise Misfit(f"{pretty(p.e)} is no g(K {p.variable.name} + b) with one K: {why}")
    groups = _by_operator(parts)
    for group in groups.values():
        for g, w, _ in group:
            _joint(g, w)
        _joint(add(*(g for g, _, _ in group)), group[0][1])
    _refuse_several(letter, parts)


def _refuse_several(letter: Letter, parts: list[Part]) -> None:
    groups = _by_operator(parts)
    if len(groups) > 1 and not letter.index:
        first, second = (pretty(e) for e in list(groups)[:2])
        raise Misfit(f"its {letter.name} reads one K, and these terms read {first} and {second}")


def _by_operator(parts: Iterable[Part]) -> dict[Expr, list[tuple[Expr, Sym, Linear]]]:
    """K z -> the (g, w, K) of the terms that read it."""
    groups: dict[Expr, list[tuple[Expr, Sym, Linear]]] = {}
    for p in parts:
        assert p.inner is not None
        groups.setdefault(p.inner[2].e, []).append(p.inner)
    return groups


def _require(required: str, hands: Mapping[str, list[Part]], text: Text) -> None:
    name, _, wanted = required.partition(" ")
    if name not in hands or wanted not in PROPERTIES:
        i = text.record.requires.index(required)
        hint = did_you_mean(wanted, PROPERTIES) or f"a letter, and one of: {', '.join(PROPERTIES)}"
        raise SpecError("E320", f"'{required}' requires nothing that is known", text.where("requires", i), hint)
    _meet(name, wanted, hands[name])


def requirement(written: str) -> bool:
    """Is it something that a letter may be required to be?"""
    return written.partition(" ")[2] in PROPERTIES


def meets(required: str, hands: Mapping[str, list[Part]]) -> bool:
    """Is a letter known to be what is required of it?"""
    name, _, wanted = required.partition(" ")
    try:
        _meet(name, wanted, hands[name])
    except Misfit:
        return False
    return True


def _meet(name: str, wanted: str, parts: list[Part]) -> None:
    """Raises Misfit where parts are not known to be what is wanted of their letter."""
    match wanted:
        case "sets":
            loose = [p for p in parts if not p.is_set]
            if loose:
                raise Misfit(f"{pretty(loose[0].e)} is neither smooth nor a constraint")
            if not parts:
                raise Misfit("there is no constraint to project on")
        case "strongly convex":
            known = curvature.bounds(add(*(p.e for p in parts)), parts[0].variable) if parts else None
            if known is None or not nonnegative(known.low) or as_constant(known.low) == 0:
                raise Misfit(f"{name} is not known to be strongly convex, so its minimum need not exist")
        case "simplex":
            loose = [p for p in parts if not isinstance(p.e, Indicator) or p.e.set != "simplex"]
            if loose or not parts:
                raise Misfit("the variable is not constrained to the simplex, and to nothing else")
        case "equations":
            loose = [p for p in parts if not isinstance(p.e, Indicator) or p.e.set not in ("simplex", "affine")]
            if loose or not parts:
                what = f"{pretty(loose[0].e)} is no set of equations" if loose else f"no set is left for {name}"
                raise Misfit(what)
        case "not convex":
            if all(convex(p) for p in parts):
                raise Misfit("what is minimised is convex; this step is for what is convex and maximised")
        case "concave":
            bad = [p for p in parts if p.smooth is None or not p.smooth.concave]
            if bad or not parts:
                raise Misfit(f"{pretty(bad[0].e)} is not known to be concave" if bad else f"no term is left for {name}")
        case "rising":
            for p in parts:
                if depends(signed_parts(gradient(p.e, p.variable))[1], p.variable):
                    raise Misfit(f"the gradient of {pretty(p.e)} falls with entries of {p.variable.name}")
        case "quadratic":
            bad = [p for p in parts if not quadratic(p.e, p.variable)]
            if bad:
                raise Misfit(f"{pretty(bad[0].e)} is not quadratic")
        case _:
            bad = [p for p in parts if not convex(p)]
            if bad:
                raise Misfit(f"{pretty(bad[0].e)} is not known to be convex")


def convex(p: Part) -> bool:
    """Is a part known to be convex, in all variables that it reads together?"""
    if p.also:
        variables = [q.variable for q in (p, *p.also)]
        return curvature.jointly_convex(p.e, variables)
    if p.descended or (p.smooth is not None and p.smooth.convex):
        return p.smooth is not None and p.smooth.convex
    if p.inner is not None and not p.inner[2].is_identity:
        g, w, _ = p.inner
        try:
            return proximable(g, w).convex
        except DeriveError:
            return False
    return p.own_prox is not None and p.own_prox.convex


def _shares(letter: Letter, parts: tuple[Part, ...], places: Mapping[str, Sym]) -> Iterator[Share]:
    """What a letter stands for; of one with an index, one for each operator."""
    mine = tuple((a, places[a]) for a in letter.arguments)
    if not letter.operator:
        yield Share(letter, parts, mine[0][1], add(*(p.weighed for p in parts)) if parts else None, places=mine)
        return
    for group in _by_operator(parts).values():
        _, w, k = group[0]
        own = tuple(p for p in parts if p.inner in group)
        yield Share(letter, own, w, add(*(g for g, _, _ in group)), k, mine)
