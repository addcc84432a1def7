"""The laws, tried on one spec: every derived thing against a source of truth that knows nothing of the derivation.

Laws are tried at small sizes (the mathematics is the same) on drawn data in float64. What a spec assumes in addition (a bound of a
rewrite, a tight frame) is measured at the sizes that the spec says, on the data given or drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, cast

import sympy as sp
import torch
from torch import Tensor

from unroll.api import Source, build, network_of, read
from unroll.calculus import prox as proximal
from unroll.calculus.gradient import gradient
from unroll.derivation.algorithms import LIPSCHITZ, STEP, state_of
from unroll.derivation.derive import Derivation, Half, derive
from unroll.derivation.parts import Part
from unroll.derivation.rewrites.record import Applied, Site
from unroll.derivation.step import CLAIMS, LAYER, Assign, Claim, Hand
from unroll.emit.program import Program
from unroll.errors import UnrollError, did_you_mean
from unroll.language.columns import WIDTH, table_rows, wrapped
from unroll.language.constructors import prox, swap
from unroll.language.nodes import Expr, Member, Normalise, Prox, Spectrum, Sym, Worked, free_indices, scalar, walk
from unroll.language.parse import Scope, parse_matrix
from unroll.language.show import pretty, text
from unroll.network.evaluate import Evaluator, evaluate
from unroll.network.network import Network, draw
from unroll.network.stepwise import State, as_matrix, as_stored, learned_value
from unroll.network.trace import Trace
from unroll.spec import Spec, load

DRAWS = 8
POINTS = 4
"""Of these draws, so many are points beside the same inputs, evaluated at once."""
EXACT = 1e-10
"""Largest relative difference that rounding explains in float64."""
OPEN = 64
"""An open size, where assumptions are measured."""
LARGEST = 2048
"""A size is cut to this where assumptions are measured."""


@dataclass(frozen=True)
class Row:
    """One law: what was measured, what it is held against, and the verdict.

    "holds" or "BROKEN" for a law; "noted", "does NOT hold", "descends", "ASCENDS" for what a spec assumes in addition.
    """

    law: str
    measured: str
    reference: str
    verdict: str


SHORT = 20
"""What is measured, and what it is held against, stand in their columns up to this length, else below."""


@dataclass(frozen=True)
class Check:
    """All laws of a spec. ok: none is broken; what a spec assumes may fail all the same, and says so."""

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return not any(r.verdict == "BROKEN" for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"spec": self.title, "ok": self.ok, "rows": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        told = [("law", "measured", "reference", "verdict"), *(astuple(r) for r in self.rows)]
        short = [(law, *(x if len(x) <= SHORT else "" for x in found), verdict) for law, *found, verdict in told]
        lines = [self.title, ""]
        for cells, (_, *found, _) in zip(table_rows(short), told, strict=True):
            below = [f"{word}{x}" for word, x in zip(("", "reference: "), found, strict=True) if len(x) > SHORT]
            lines += [*cells, *(f"    {line}" for x in below for line in wrapped(x, WIDTH - 4, hang=0))]
        return "\n".join(lines)


def check(
    spec: Source, *, overrides: Sequence[str] = (), inputs: Mapping[str, Tensor] | None = None, seed: int = 0
) -> Check:
    """Try every law on a spec, and measure what it assumes on `inputs` (a tensor without batch axes for each input), or on a draw.

    Raises SpecError for a spec that does not compile at all, UnrollError E404 for inputs that it does not have.
    """
    loaded = read(spec, overrides).layers()
    for name in inputs or {}:
        if name not in loaded.inputs:
            raise UnrollError("E404", f"'{name}' is not an input", hint=did_you_mean(name, loaded.inputs))
    derivation = derive(loaded, small_sizes(loaded))
    sample = Sample(derivation, seed)
    laws: tuple[Callable[[Derivation, Sample], Iterator[Row]], ...] = (
        printed, gradients, lipschitz, proxes, initialisation, monotone, claims, emitted, gradients_flow,
        degenerate,
    )  # fmt: skip
    rows = [row for law in laws for row in law(derivation, sample)]
    if derivation.step.departures:
        rows += assumptions(loaded, inputs or {}, seed)
    return Check(f"{loaded.title}, at sizes {_sizes_text(derivation)}", tuple(rows))


def small_sizes(spec: Spec) -> dict[str, int]:
    """Different small numbers for all sizes, in their order: at most what the spec says, and smaller where that is smaller."""
    said = {name: n for name, n in spec.dims.items() if isinstance(n, int)}
    ranks = {n: i for i, n in enumerate(sorted(set(said.values())))}
    found: dict[str, int] = {}
    for i, (name, n) in enumerate(spec.dims.items()):
        found[name] = min(n, 6 + 3 * i, 3 + 2 * ranks[n] if len(said) > 2 else n) if isinstance(n, int) else 6 + 3 * i
    return found


def _sizes_text(d: Derivation) -> str:
    return ", ".join(f"{s.name} = {n}" for s, n in d.problem.dims.items())


# --- data -------------------------------------------------------------------------------------------------------------


class Sample:
    """Random values for everything in a problem, in mathematical layout, and the untrained network of a spec."""

    def __init__(self, d: Derivation, seed: int) -> None:
        self.d, self.generator = d, torch.Generator().manual_seed(seed)
        self.programs: dict[Spec, tuple[Derivation, Program]] = {}
        problem = d.problem
        self.dims = {s.name: int(n) for s, n in problem.dims.items() if isinstance(n, int)}
        self.sizes: dict[sp.Symbol, Any] = {s: int(n) for s, n in problem.dims.items() if isinstance(n, int)}
        self.numbers = {s: 0.3 if v is None else float(v) for s, v in problem.scalars.items()}
        self.parameters = draw(problem, self.dims, seed)
        self.inputs: dict[str, Any] = {s.name: self.tensor(s, batch=3) for s in problem.inputs}

    def tensor(self, s: Sym, batch: int | None = None) -> Tensor:
        """A draw in the shape that a network takes."""
        shape = [int(swap(n, self.sizes)) for n in ([], [s.nrows], s.stored)[s.rank]]
        family = [] if s.family is None else [int(swap(s.family, self.sizes))]
        size = (*([] if batch is None else [batch]), *family, *shape)
        value = torch.randn(size, generator=self.generator, dtype=torch.float64)
        if "mask" in s.props:  # what evaluates formulas knows of no padding
            return torch.ones_like(value)
        return value.abs() if "positive" in s.props else value

    def network(self, spec: Spec) -> Network:
        """A new one each time, of a program that is made once."""
        if spec not in self.programs:
            derivation = derive(spec, self.dims)
            self.programs[spec] = derivation, build(derivation)
        numbers = {s.name: v for s, v in self.numbers.items()}
        return network_of(*self.programs[spec], self.parameters, numbers, dtype=torch.float64).eval()

    def taken(self, net: Network) -> dict[str, Any]:
        """The inputs that a network takes; one that is worked out on data has seen the first sample."""
        if not net.built:
            net.construct(**{name: value[0] for name, value in self.inputs.items()})
        return {name: self.inputs[name] for name in net.inputs}

    def values(self, half: Half, points: int | None = None) -> dict[Sym, Tensor]:
        """One sample of everything in a block, rows and columns as in the formulas; its variable, so many points of it, is made feasible."""
        known = {s: as_matrix(self.parameters[s.name], s) for s in self.d.problem.parameters}
        z = half.variable
        read = sorted({s for e in half.problem.terms.values() for s in e.symbols} | {z}, key=lambda s: s.name)
        out = known | {s: as_matrix(self.tensor(s, points if s is z else None), s) for s in read if s not in known}
        if any(h.use == "prox" and h.variable is z for h in half.hands):
            out[z] = self.feasible(half, out)
        return out

    def feasible(self, half: Half, values: dict[Sym, Tensor]) -> Tensor:
        (first, *_) = (h for h in half.hands if h.use == "prox" and h.variable is half.variable)
        rest, held = first.e, self.held([p for p in half.parts if p.term in first.terms], values)
        step = scalar("step", positive=True)
        start = proximal.replace_role(half.variable)
        node = prox(rest, half.variable, step, start)
        return self.at(node, {**values, start: values[half.variable]}, {**held, step: 0.1})

    def held(self, parts: Iterable[Part], values: dict[Sym, Tensor]) -> dict[sp.Symbol, Any]:
        """What stands before terms that have a prox with a name in its place; of several points, at the first."""
        weights = (p.weight for p in parts if p.weight is not None)
        return {name: float(self.at(e, values).flatten()[0]) for name, e in weights}

    def at(self, e: Expr, values: dict[Sym, Tensor], extra: dict[sp.Symbol, Any] | None = None) -> Tensor:
        return evaluate(e, values, {**self.numbers, **self.sizes, **(extra or {})})


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the larger of 1 and the largest entry."""
    a, b = a.detach(), b.detach()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    size = b[b.isfinite()].abs().max().clamp_min(1) if b.isfinite().any() else 0.0
    return float(torch.where(same, 0, (a - b).abs()).max() / size)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, keepdim=True)


def _verdict(holds: bool) -> str:
    return "holds" if holds else "BROKEN"


def _in(half: Half) -> str:
    return f" ({half.name})" if half.name else ""


# --- laws -------------------------------------------------------------------------------------------------------------


def printed(d: Derivation, sample: Sample) -> Iterator[Row]:
    """parse(text(e)) is e."""
    scope = Scope(d.problem.scope.names, broadcast=True)
    sets = {p.term for h in d.halves for p in h.parts if p.is_set}
    terms = {n: e for n, e in d.problem.terms.items() if n not in sets}
    known = {s for s in d.problem.symbols.values()}
    terms |= {
        f"gradient{_in(h)}": h.gradient for h in d.halves if h.gradient is not None and h.gradient.symbols <= known
    }
    wrong = [n for n, e in terms.items() if parse_matrix(text(e), scope) is not e]
    yield Row(
        "what is printed reads back the same", f"{len(terms) - len(wrong)} of {len(terms)}", "all", _verdict(not wrong)
    )


def gradients(d: Derivation, sample: Sample) -> Iterator[Row]:
    for half in d.halves:
        for p in (p for p in half.parts if p.smooth is not None):
            worst, z = 0.0, half.variable
            for _ in range(DRAWS // POINTS):
                values = sample.values(half, POINTS)
                at = values[z].clone().requires_grad_()
                value = sample.at(p.e, {**values, z: at})
                (truth,) = torch.autograd.grad(value.expand(POINTS, 1, 1).sum(), at)
                worst = max(worst, _gap(sample.at(gradient(p.e, z), values).expand_as(truth), truth))
            yield Row(
                f"gradient of {p.term} == autograd{_in(half)}",
                f"worst {worst:.0e} of {DRAWS}",
                f"{EXACT:.0e}",
                _verdict(worst <= EXACT),
            )


def lipschitz(d: Derivation, sample: Sample) -> Iterator[Row]:
    """|grad f(a) - grad f(b)| <= L |a - b| along the steepest of many directions."""
    for half in d.halves:
        for p in (p for p in half.parts if p.smooth is not None and p.smooth.smooth):
            assert p.smooth is not None
            worst, z = 0.0, half.variable
            slope = gradient(p.e, z)
            for _ in range(DRAWS // POINTS):
                values = sample.values(half, POINTS)
                bound = sample.at(p.smooth.lipschitz, values)
                v = torch.randn(values[z].shape, generator=sample.generator, dtype=torch.float64)
                for _ in range(20):
                    size = _norm(v)
                    v = torch.where(size < 1e-12, 0, v / size)
                    ends = sample.at(slope, {**values, z: torch.stack([values[z] + 1e-5 * v, values[z] - 1e-5 * v])})
                    v = ends.expand(2, *v.shape).diff(dim=0)[0] / -2e-5
                worst = max(worst, float(torch.where(bound == 0, (_norm(v) > 1e-8).double(), _norm(v) / bound).max()))
            yield Row(
                f"L of {p.term} bounds the Hessian{_in(half)}",
                f"largest / L = {worst:.3f}",
                "1",
                _verdict(worst <= 1 + 1e-5),
            )


def proxes(d: Derivation, sample: Sample) -> Iterator[Row]:
    """No nearby point has a smaller t g(z) + |z - v|^2 / 2 than the derived prox."""
    for half in d.halves:
        for hand in (h for h in half.hands if h.use == "prox"):
            worst = max(_excess(half, hand, sample, t) for t in (0.05, 0.5, 2.0))
            of = "" if hand.operator is None else f" of {pretty(hand.operator)}"
            name = f"prox of {' + '.join(hand.terms)}{of} <= every other point{_in(half)}"
            yield Row(name, f"excess {max(worst, 0.0):.0e}", "1e-08", _verdict(worst <= 1e-8))
    seen: set[Expr] = set()
    for node in (n for a in d.exact.assigns if isinstance(a.value, Expr) for n in walk(a.value) if isinstance(n, Prox)):
        found = proximal.derive(node.term, node.variable, node.t, node.at, node.swaps)
        if found.scalar is not None and node.term not in seen:
            seen.add(node.term)
            yield Row(f"scalar prox of {pretty(node.term)}", found.scalar.proof, "brute force", "holds")


def _excess(half: Half, hand: Hand, sample: Sample, t: float) -> float:
    """How much lower than at the derived prox the cost is at any of many points."""
    z, worst = hand.variable, 0.0
    e, step, start = hand.e, scalar("step", positive=True), proximal.replace_role(z)
    rest = [p for p in half.parts if p.term in hand.terms]
    node = prox(e, z, step, start)

    def draw_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=sample.generator, dtype=torch.float64)

    for _ in range(DRAWS // POINTS):
        values = sample.values(half)
        like = values[z] if z is half.variable else sample.at(cast(Expr, hand.operator), values)
        v, held = draw_like(like) * 2, sample.held(rest, values)
        best = sample.at(node, {**values, start: v}, {**held, step: t})
        near = torch.stack([best + size * draw_like(best) for size in (1e-3, 1e-2, 0.1, 1.0) for _ in range(4)])
        inside = sample.at(node, {**values, start: near}, {**held, step: 1e-6})  # feasible where there are constraints
        points = torch.cat([torch.stack([best, v, torch.zeros_like(v)]), near, inside.expand_as(near)])
        costs = t * sample.at(e, {**values, z: points}, held).flatten() + (points - v).square().sum((-2, -1)) / 2
        worst = max(worst, float(costs[0] - costs[costs.isfinite()].min())) if costs[0].isfinite() else math.inf
    return worst


def plain(spec: Spec) -> Spec:
    """The spec with nothing learned, estimated or kept."""
    gone = ("learn", "parametrisation", "estimate", "keep", "free")
    document = cast(dict[str, Any], spec.to_dict())
    unrolled = {k: v for k, v in document["unroll"].items() if k not in gone}
    if "blocks" in unrolled:
        unrolled["blocks"] = [{k: v for k, v in b.items() if k not in gone} for b in unrolled["blocks"]]
    return load({**document, "unroll": unrolled})


def initialisation(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Layer l of the learned network, untrained, is iterate l of the algorithm."""
    if not d.step.learned:
        return
    drawn = [p.name for p in d.step.learned if p.init not in ("value", "data")]
    own = {"start": "it starts at formulas of its own", "function": "functions start at their values at knots"}
    apart = [says for name, says in own.items() if any(x.name == name for x in d.step.departures)]
    if drawn or apart or d.step.estimated:
        what = f"{', '.join(drawn)} start drawn" if drawn else f"{', '.join(d.step.estimated)} is estimated"
        what = apart[0] if apart and not drawn else what
        yield Row("untrained network == algorithm, every layer", f"does not apply: {what}", "-", "noted")
        return
    ours, exact = sample.network(d.spec), sample.network(plain(d.spec))
    one = slice(0, 1 if ours.program.construct_inputs else None)  # what is worked out on data is of one sample
    found = [n.trace(**{k: v[one] for k, v in sample.taken(n).items()}).iterates for n in (ours, exact)]
    worst = max(_gap(a, b) for z in found[0] for a, b in zip(found[0][z], found[1][z], strict=True))
    yield Row(
        "untrained network == algorithm, every layer", f"worst {worst:.0e}", f"{EXACT:.0e}", _verdict(worst <= EXACT)
    )


def monotone(d: Derivation, sample: Sample) -> Iterator[Row]:
    if not any(c.name == "monotone" and c.holds for c in d.exact.claims):
        return
    total = sample.network(plain(d.spec)).trace(**sample.inputs).terms["total"].detach() * d.problem.sign
    if not total[0].isfinite().all():
        total = total[1:]  # the start lies outside the constraints
    if len(total) < 2:
        return
    rise = float((total[1:] - total[:-1]).div(total[:-1].abs().clamp_min(1)).max())
    yield Row("the objective falls in every layer", f"largest rise {max(rise, 0.0):.0e}", "0", _verdict(rise <= 1e-12))


def claims(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Conditions on numbers that the derivation leaves open, with the values that they have here."""
    open_claims = [c for c in d.exact.claims if c.conditions and c.holds is not True]
    values = {s: as_matrix(sample.parameters[s.name], s) for s in d.problem.parameters}
    if any(set(e.symbols) - set(values) for c in open_claims for e in _expressions(c)):
        return  # a constant of each sample
    for claim in open_claims:
        state = State(dict(values), {**sample.numbers, **sample.sizes})
        for a in claim.definitions:
            state.assign(a)
        for c in claim.conditions:
            read = c.left.free_symbols | c.right.free_symbols
            known = {s: sp.Float(float(v)) for s, v in state.numbers.items() if s in read}
            left, right, room = (float(swap(x, known)) for x in (c.left, c.right, c.room))
            holds = room > 0 if c.strict else room >= -1e-9 * max(abs(left), abs(right))
            what = f"{left:.3g} against {right:.3g}" if holds else f"{left:.3g} against {right:.3g}: not claimed"
            yield Row(f"{CLAIMS[claim.name]}, if {c.text}", what, "-", "holds" if holds else "noted")


def _expressions(c: Claim) -> Iterator[Expr]:
    return (a.value for a in c.definitions if isinstance(a.value, Expr))


def emitted(d: Derivation, sample: Sample) -> Iterator[Row]:
    """The emitted module against direct evaluation of the step, assignment by assignment, parameters in place."""
    net = sample.network(d.spec)
    inputs = sample.taken(net)
    found = net.trace(**inputs).steps
    worst = 0.0
    for i in range(3):
        own = {z.name: [a[i] if a.ndim > z.rank else a for a in found[z.name]] for z in d.step.output}
        for z, iterates in by_hand(d, sample, i, net, own).items():
            worst = max(worst, *(_gap(a, b) for a, b in zip(own[z], iterates, strict=True)))
    yield Row("emitted module == mathematics", f"worst {worst:.0e}", f"{EXACT:.0e}", _verdict(worst <= EXACT))


def by_hand(
    d: Derivation, sample: Sample, i: int, net: Network, seen: dict[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    """Iterates of sample i, after every block, by evaluating the step as it is written, with the parameters of a network.

    Every layer starts from the network's own iterates, `seen`, where they are all that a layer carries: a layer that magnifies
    rounding does not add up over the depth.
    """
    problem, step = d.problem, d.step
    whole = {s.symbol for s in step.states} == set(step.output)
    per_layer = max(len(step.blocks), 1)
    values = {s: as_matrix(sample.parameters[s.name], s) for s in problem.parameters}
    values |= {s: as_matrix(sample.inputs[s.name][i], s) for s in problem.inputs}
    state = State(values, {**sample.numbers, **sample.sizes})
    for p in (p for p in net.learned if not p.per_layer):  # of the start, too
        state.put(p, learned_value(net, net.program.words, p, 0))
    for a in step.definitions:
        state.assign(a)
    for s in step.states:
        state.assign(Assign(s.symbol, s.start, ""))
    out: dict[str, list[Tensor]] = {z.name: [as_stored(values[z], z)] for z in step.output}
    for layer in range(d.layers):
        state.numbers[LAYER] = layer
        if whole:
            values |= {z: as_matrix(seen[z.name][layer * per_layer], z) for z in step.output}
        for p in net.learned:
            state.put(p, learned_value(net, net.program.words, p, layer))
        for k, a in enumerate(step.assigns):
            state.assign(a)
            last = k + 1 == len(step.assigns) or step.assigns[k + 1].block != a.block
            if last:
                for z in step.output:
                    out[z.name].append(as_stored(values[z], z))
    return out


def _selects(d: Derivation) -> bool:
    """Does a layer count entries? What says how many moves the answer in jumps."""
    values = (a.value for a in d.step.assigns if isinstance(a.value, Expr))
    return any(isinstance(x, Worked) for value in values for x in walk(value))


def gradients_flow(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Every parameter moves the answer; of one layer, where more of them magnify these inputs past all numbers."""
    if not d.step.learned:
        return
    net = sample.network(d.spec)
    few = not all(o.isfinite().all() for o in _answers(net, sample.taken(net)))
    if few:
        net = sample.network(read(d.spec, ["unroll.layers=1", *([] if d.free is None else ["unroll.free=null"])]))
    with torch.no_grad():  # the way out of a cell starts at 0: what is before it would not count
        for p in (net.get_parameter(net.program.words["learned", p.name]) for p in d.step.learned if p.cell):
            p.add_(0.1 * torch.randn(p.shape, generator=sample.generator, dtype=p.dtype))
    outs = _answers(net, sample.taken(net))
    sum((o * torch.randn(o.shape, generator=sample.generator, dtype=o.dtype)).sum() for o in outs).backward()  # type: ignore[union-attr]
    jumps = [n for n, p in net.named_parameters() if p.grad is None and _selects(d)]
    lost = [n for n, p in net.named_parameters() if n not in jumps and (p.grad is None or not p.grad.isfinite().all())]
    still = [
        n for n, p in net.named_parameters() if n not in (*lost, *jumps) and not cast(Tensor, p.grad).abs().sum() > 0
    ]
    count = sum(1 for _ in net.parameters())
    idle = f"; 0 here for {', '.join(still)}" if still and d.step.estimated else ""
    alone = "; one layer: more of them overflow" if few else ""
    alone += f"; {', '.join(jumps)} says how many" if jumps else ""
    broken = lost or (still and not d.step.estimated)
    yield Row(
        "a gradient reaches every parameter",
        f"{count - len(jumps) - len(lost) - (0 if idle else len(still))} of {count - len(jumps)}{idle}{alone}",
        "all",
        _verdict(not broken),
    )


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "a blank sample among others": lambda x: torch.cat([x[:1], 0 * x[1:2], x[2:]]),
    "units of 1e-6": lambda x: 1e-6 * x,
    "units of 1e6": lambda x: 1e6 * x,
    "ties": torch.ones_like,
    "a batch of none": lambda x: x[:0],
}
"""Inputs at which formulas end: made of a batch of three."""


ANSWERED = "degenerate inputs have answers and slopes"
REFUSED = "refused in words"


def degenerate(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Of finite inputs the answer is finite, and so are its slopes, or they are refused; a blank sample leaves the others alone."""
    if not d.problem.inputs:
        return
    net = sample.network(d.spec)
    inputs = sample.taken(net)
    found = {kind: _finite(net, {n: make(x) for n, x in inputs.items()}) for kind, make in DEGENERATE.items()}
    refused = [kind for kind, what in found.items() if what == REFUSED]
    wrong = [f"{kind}: {what}" for kind, what in found.items() if what not in ("", REFUSED)]
    if wrong and (ordinary := _finite(net, inputs)):
        wrong = [f"ordinary inputs too: {ordinary}"]
    answered = f"{len(found) - len(refused)} of {len(found)} kinds"
    told = "; ".join([*wrong, *(f"{kind}: {REFUSED}" for kind in refused)] or [answered])
    yield Row(ANSWERED, told, "finite", "noted" if wrong else "holds")
    if not found["a blank sample among others"]:
        whole, others = (_answers(net, {n: x[kept] for n, x in inputs.items()}) for kept in (slice(0, 3), [0, 2]))
        worst = max(_gap(a[[0, 2]], b) for a, b in zip(whole, others, strict=True))
        yield Row("samples do not see each other", f"worst {worst:.0e}", f"{EXACT:.0e}", _verdict(worst <= EXACT))


def _answers(net: Network, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out = net(**inputs)
    return out if isinstance(out, tuple) else (out,)


def _finite(net: Network, inputs: dict[str, Tensor]) -> str:
    """What is not finite, or that the input is refused; nothing where all is finite."""
    inputs = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    try:
        out = _answers(net, inputs)
    except UnrollError:
        return REFUSED
    if not all(o.isfinite().all() for o in out):
        return "the answer is not finite"
    named = {**inputs, **dict(net.named_parameters())}
    slopes = torch.autograd.grad(sum(o.sum() for o in out), list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    lost = [n for n, g in zip(named, slopes, strict=True) if g is not None and not g.isfinite().all()]
    return f"the slope in {', '.join(lost)} is not finite" if lost else ""


# --- what a spec assumes in addition ----------------------------------------------------------------------------------


def assumptions(spec: Spec, inputs: Mapping[str, Tensor], seed: int) -> list[Row]:
    """Every rewrite, surrogate and choice of a spec, measured at its own sizes in the first layer, nothing learned."""
    said = {name: min(n, LARGEST) for name, n in spec.dims.items() if isinstance(n, int)}
    given = {name: value.shape for name, value in inputs.items()}
    sizes = {
        **{name: OPEN for name, n in spec.dims.items() if not isinstance(n, int)},
        **said,
        **_read_off(spec, given),
    }
    d = derive(plain(spec), sizes)
    sample = Sample(d, seed)
    sample.inputs |= {name: value.double()[None] for name, value in inputs.items()}
    rows: list[Row] = []
    entries = _entries(d, sample)
    for half in d.halves:
        values, numbers = entries[half.name]
        for x in (x for x in d.exact.departures if x.block == half.name):
            rows += _measured(x, values, numbers)
    return [*rows, *_directions(d, sample)]


def _read_off(spec: Spec, given: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Open sizes, from the shapes of what was given."""
    out: dict[str, int] = {}
    for name, shape in given.items():
        axes = spec.inputs[name].given
        for entry, n in zip(axes, shape[-len(axes) :], strict=True):
            if entry in spec.dims and not isinstance(spec.dims[entry], int):
                out[entry] = n
    return out


def _entries(d: Derivation, sample: Sample) -> dict[str, tuple[dict[Sym, Tensor], dict[sp.Symbol, Any]]]:
    """Values of all symbols where each block begins; the block's variable at the point where its step is taken."""
    step, problem = d.exact, d.problem
    values = {s: as_matrix(sample.parameters[s.name], s) for s in problem.parameters}
    values |= {s: as_matrix(sample.inputs[s.name][0], s) for s in problem.inputs}
    state = State(values, {**sample.numbers, **sample.sizes, LAYER: 0})
    for a in step.definitions:
        state.assign(a)
    for s in step.states:
        state.assign(Assign(s.symbol, s.start, ""))
    out: dict[str, tuple[dict[Sym, Tensor], dict[sp.Symbol, Any]]] = {}
    for half in d.halves:
        mine = [a for a in step.assigns if a.block == half.name]
        z = half.variable
        before = dict(state.values)
        entry = next((a for a in mine if isinstance(a.value, Normalise) and a.value.shape == z.shape), None)
        for a in mine:
            state.assign(a)
        at = (
            evaluate(entry.value, before, state.numbers)
            if entry is not None and isinstance(entry.value, Expr)
            else None
        )
        point = (
            at
            if at is not None
            else before.get(
                state_of(z), torch.zeros(*(int(swap(n, sample.sizes)) for n in z.shape), dtype=torch.float64)
            )
        )
        seen = {
            **before,
            **{a.target: state.values[a.target] for a in mine if isinstance(a.target, Sym) and a.target not in before},
        }
        own = {
            s: state.numbers[named]
            for s in (STEP, LIPSCHITZ)
            if (named := scalar(f"{s.name}_{half.name}", positive=True)) in state.numbers
        }
        out[half.name] = ({**seen, z: point, state_of(z): point}, {**state.numbers, **own})
    return out


def _measured(x: Any, values: dict[Sym, Tensor], numbers: dict[sp.Symbol, Any]) -> Iterator[Row]:
    """One departure: its assumption and its error, over all places where it applied and all members of a family."""
    name = f"{x.block}: {x.name}" if x.block else x.name
    applied = cast("Applied | None", x.applied)
    if applied is None or not applied.sites:
        yield Row(name, x.says, "a choice", "noted")
        return
    sites = [found for site in applied.sites for found in _members(site, values, numbers)]
    worst = max((a for a, _ in sites if a is not None), default=None)
    relative = max(r for _, r in sites)
    record = applied.rewrite
    if x.name == "surrogate":
        yield Row(name, f"{record.assumes}: off by {worst:.2f}" if worst is not None else "-", "no bound", "noted")
    elif record.kind == "exact":
        yield Row(name, f"changes {relative:.0e}", f"{EXACT:.0e}", _verdict(relative <= EXACT))
    elif record.kind == "heuristic":
        yield Row(name, f"what it replaces changes by {_percent(relative)}", "no bound", "noted")
    elif record.limit is not None and worst is not None:
        limit = record.limit(worst, **applied.values)
        holds = math.isfinite(limit) and relative <= limit * (1 + 1e-9)
        bound = f"<= {limit:.2g}" if math.isfinite(limit) else "no bound"
        broken = math.isfinite(limit) and not holds
        yield Row(
            name,
            f"{record.assumes}: it is {worst:.3g}; relative error {relative:.2g}",
            bound,
            "BROKEN" if broken else "holds" if holds else "does NOT hold",
        )
    else:
        off = f"{record.assumes}: off by {worst:.2g}; " if worst is not None else ""
        yield Row(name, f"{off}what it replaces changes by {_percent(relative)}", record.error, "noted")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 10 else f"{share:.2g} times itself"


def _members(
    site: Site, values: dict[Sym, Tensor], numbers: dict[sp.Symbol, Any]
) -> Iterator[tuple[float | None, float]]:
    """(assumption, relative error) for every member of the families that are free at a place."""
    nodes = [x for x in walk(site.before) if isinstance(x, Member | Spectrum)]
    sizes = {x.index: x.of.family if isinstance(x, Member) else sp.Mul(*x.sizes) for x in nodes}
    free = sorted(free_indices(site.before))
    whole = Evaluator(values, numbers, {})
    for place in itertools.product(*(range(int(swap(cast(sp.Expr, sizes[i]), numbers))) for i in free)):
        at = replace(whole, members=dict(zip(free, place, strict=True)))
        before, after = map(at, site.core or (site.before, site.after))
        size: Callable[[Tensor], Tensor] = lambda x: torch.linalg.matrix_norm(x, 2 if site.core else "fro")
        assumed = None if site.assumption is None else float(at(site.assumption))
        yield assumed, float(size(before - after) / size(before).clamp_min(1e-300))


def _directions(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Is what a block does a direction of descent for the terms it is about?"""
    net = sample.network(d.spec)
    named = {x.name for x in d.problem.inputs}
    trace = net.trace(**{k: v[:1] for k, v in sample.inputs.items() if k in named})
    for k, (layer, block) in enumerate(trace.labels):
        half = next((h for h in d.halves if h.name == block or not h.name), None)
        if layer > 1 or half is None:
            return
        about = tuple(dict.fromkeys(p.term for p in half.parts if p.smooth is not None and p.term in d.problem.terms))
        value, slope, moved = _first_order(net, trace, k, about)
        if not about or moved == 0 or slope == 0:
            continue
        cosine = value * d.problem.sign / (slope * moved)
        name = f"first-order change of the cost ({' + '.join(about)}){f' in {block}' if block != 'step' else ''}"
        yield Row(name, f"cosine {cosine:+.2f}", "< 0", "descends" if cosine < 0 else "ASCENDS")


def _first_order(net: Network, trace: Trace, k: int, about: tuple[str, ...]) -> tuple[float, float, float]:
    """<gradient, move>, |gradient|, |move| of some terms of the objective in step k."""
    if not about:
        return 0.0, 0.0, 0.0
    before = {n: found[k].detach().requires_grad_() for n, found in trace.steps.items()}
    terms = trace.evaluate(before, "", 0)
    value = sum(terms[t].sum() for t in about)
    assert isinstance(value, Tensor)
    slopes = torch.autograd.grad(value, list(before.values()), materialize_grads=True, allow_unused=True)
    moves = [trace.steps[n][k + 1].detach() - before[n].detach() for n in before]
    inner = sum(float((g * m).sum()) for g, m in zip(slopes, moves, strict=True))
    return (
        inner,
        math.sqrt(sum(float(g.square().sum()) for g in slopes)),
        math.sqrt(sum(float(m.square().sum()) for m in moves)),
    )
