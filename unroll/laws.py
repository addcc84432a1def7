"""The laws, tried on one spec: every derived thing against a source of truth that knows nothing of the derivation.

Sizes are made small (the mathematics is the same), data are drawn from a seed, and everything runs in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from unroll.api import Source, compile_layers, read
from unroll.calculus import prox as proximal
from unroll.calculus.gradient import gradient
from unroll.derivation import Derivation, derive
from unroll.evaluate import evaluate
from unroll.expr import Expr, Prox, Sym, add, prox, scalar, walk
from unroll.network import Network, draw
from unroll.parse import Scope, parse_matrix
from unroll.show import pretty, text
from unroll.spec import Spec, load
from unroll.step import LAYER

DRAWS = 8
EXACT = 1e-10
"""Largest relative difference that rounding explains in float64."""


@dataclass(frozen=True)
class Row:
    """One law: what was measured, what it is held against, and the verdict ("holds", "BROKEN", "noted")."""

    law: str
    measured: str
    reference: str
    verdict: str


@dataclass(frozen=True)
class Check:
    """All laws of a spec. ok: none is broken."""

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return not any(r.verdict == "BROKEN" for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"spec": self.title, "ok": self.ok, "rows": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        rows = [Row("law", "measured", "bound / reference", "verdict"), *self.rows]
        widths = [max(len(getattr(r, k)) for r in rows) for k in ("law", "measured", "reference")]
        lines = ["   ".join([r.law.ljust(widths[0]), r.measured.ljust(widths[1]), r.reference.ljust(widths[2]), r.verdict]) for r in rows]
        return "\n".join([self.title, "", *lines])


def check(spec: Source, *, overrides: Sequence[str] = (), seed: int = 0) -> Check:
    """Try every law on a spec. Raises SpecError for a spec that does not compile at all."""
    loaded = read(spec, overrides)
    derivation = derive(loaded, small_sizes(loaded))
    sample = Sample(derivation, seed)
    laws: tuple[Callable[[Derivation, Sample], Iterator[Row]], ...] = (
        printed, gradients, lipschitz, proxes, initialisation, monotone, emitted, gradients_flow,
    )  # fmt: skip
    return Check(f"{loaded.title}, at sizes {_sizes_text(derivation)}", tuple(row for law in laws for row in law(derivation, sample)))


def small_sizes(spec: Spec) -> dict[str, int]:
    """Different small numbers for all sizes, in their order: at most what the spec says."""
    found: dict[str, int] = {}
    for i, (name, n) in enumerate(spec.dims.items()):
        found[name] = min(n, 6 + 3 * i) if isinstance(n, int) else 6 + 3 * i
    return found


def _sizes_text(d: Derivation) -> str:
    return ", ".join(f"{s.name} = {n}" for s, n in d.problem.dims.items())


# --- data -------------------------------------------------------------------------------------------------------------


class Sample:
    """Random values for everything in a problem, in mathematical layout, and the untrained network of a spec."""

    def __init__(self, d: Derivation, seed: int) -> None:
        self.d, self.generator = d, torch.Generator().manual_seed(seed)
        problem = d.problem
        self.dims = {s.name: int(n) for s, n in problem.dims.items() if isinstance(n, int)}
        self.sizes: dict[sp.Symbol, Any] = {s: int(n) for s, n in problem.dims.items() if isinstance(n, int)}
        self.numbers = {s: 0.3 if v is None else float(v) for s, v in problem.scalars.items()}
        self.parameters = draw(problem, self.dims, seed)
        self.inputs = {s.name: self.tensor(s, batch=3) for s in problem.inputs}

    def tensor(self, s: Sym, batch: int | None = None) -> Tensor:
        """A draw in the shape that a network takes: (batch, ..., cols, rows)."""
        sizes = [int(n.subs(self.sizes)) for n in s.shape]
        shape = sizes[:1] if s.rank == 1 else [] if s.rank == 0 else sizes[::-1]
        value = torch.randn(*([] if batch is None else [batch]), *shape, generator=self.generator, dtype=torch.float64)
        return value.abs() if "positive" in s.props else value

    def network(self, derivation: Derivation) -> Network:
        return compile_layers(
            derivation.spec, dims=self.dims, parameters=self.parameters, scalars={s.name: v for s, v in self.numbers.items()}, dtype=torch.float64
        )  # fmt: skip

    def values(self) -> dict[Sym, Tensor]:
        """One sample of everything, rows and columns as in the formulas; the variable is made feasible."""
        problem = self.d.problem
        out = {s: _matrix(self.parameters[s.name], s) for s in problem.parameters}
        out |= {s: _matrix(self.tensor(s), s) for s in problem.inputs}
        for z in problem.variables:
            out[z] = _matrix(self.tensor(z), z)
            if any(p.smooth is None and p.proximal is not None for p in self.d.parts):
                out[z] = self.feasible(z, out)
        return out

    def feasible(self, z: Sym, values: dict[Sym, Tensor]) -> Tensor:
        rest = add(*(p.e for p in self.d.parts if not p.descended and p.proximal is not None))
        step = scalar("step", positive=True)
        start = proximal.replace_role(z)
        node = prox(rest, z, step, start)
        return evaluate(node, {**values, start: values[z]}, {**self.numbers, **self.sizes, step: 0.1})

    def at(self, e: Expr, values: dict[Sym, Tensor], extra: dict[sp.Symbol, Any] | None = None) -> Tensor:
        return evaluate(e, values, {**self.numbers, **self.sizes, **(extra or {})})


def _matrix(value: Tensor, s: Sym) -> Tensor:
    """A tensor as a network takes it -> (rows, cols) as in formulas."""
    if s.role == "parameter" and s.rank == 2 or s.family is not None:
        return value
    return value.mT if s.rank == 2 else value.unsqueeze(-1) if s.rank == 1 else value[..., None, None]


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the larger of 1 and the largest entry."""
    if a.numel() == 0:
        return 0.0
    a, b = a.detach(), b.detach()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0, (a - b).abs()).max() / b[b.isfinite()].abs().max().clamp_min(1)) if b.isfinite().any() else float("inf")


def _verdict(holds: bool) -> str:
    return "holds" if holds else "BROKEN"


# --- laws -------------------------------------------------------------------------------------------------------------


def printed(d: Derivation, sample: Sample) -> Iterator[Row]:
    """parse(text(e)) is e."""
    scope = Scope(d.problem.scope.names, broadcast=True)
    terms = {**d.problem.terms, **({"gradient": d.gradient} if d.gradient is not None else {})}
    wrong = [n for n, e in terms.items() if not any(p.is_set for p in d.parts if p.term == n) and parse_matrix(text(e), scope) is not e]
    yield Row("what is printed reads back the same", f"{len(terms) - len(wrong)} of {len(terms)}", "all", _verdict(not wrong))


def gradients(d: Derivation, sample: Sample) -> Iterator[Row]:
    for p in (p for p in d.parts if p.smooth is not None):
        worst = 0.0
        for _ in range(DRAWS):
            values = sample.values()
            z = values[d.variable].clone().requires_grad_()
            (truth,) = torch.autograd.grad(sample.at(p.e, {**values, d.variable: z}).sum(), z)
            worst = max(worst, _gap(sample.at(gradient(p.e, d.variable), values).expand_as(truth), truth))
        yield Row(f"gradient of {p.term} == autograd", f"worst {worst:.0e} of {DRAWS}", f"{EXACT:.0e}", _verdict(worst <= EXACT))


def lipschitz(d: Derivation, sample: Sample) -> Iterator[Row]:
    """|grad f(a) - grad f(b)| <= L |a - b| along the steepest of many directions."""
    for p in (p for p in d.parts if p.smooth is not None and p.smooth.smooth):
        assert p.smooth is not None
        worst = 0.0
        slope = gradient(p.e, d.variable)
        for _ in range(DRAWS):
            values = sample.values()
            bound = float(sample.at(p.smooth.lipschitz, values))
            v = torch.randn_like(values[d.variable])
            for _ in range(20):
                v = v / v.norm()
                ends = [sample.at(slope, {**values, d.variable: values[d.variable] + s * 1e-5 * v}) for s in (1, -1)]
                v = (ends[0] - ends[1]) / 2e-5
                if v.norm() < 1e-12:
                    break
            worst = max(worst, float(v.norm()) / bound if bound else float(v.norm() > 1e-8))
        yield Row(f"L of {p.term} bounds the Hessian", f"largest / L = {worst:.3f}", "1", _verdict(worst <= 1 + 1e-5))


def proxes(d: Derivation, sample: Sample) -> Iterator[Row]:
    """No nearby point has a smaller t g(z) + |z - v|^2 / 2 than the derived prox."""
    rest = [p for p in d.parts if not p.descended]
    if not rest:
        return
    e, step = add(*(p.e for p in rest)), scalar("step", positive=True)
    start = proximal.replace_role(d.variable)
    node = prox(e, d.variable, step, start)
    worst = 0.0
    for t in (0.05, 0.5, 2.0):
        for _ in range(DRAWS // 4):
            values = sample.values()
            v = torch.randn_like(values[d.variable]) * 2
            best = sample.at(node, {**values, start: v}, {step: t})
            cost = lambda z, values=values, v=v, t=t: t * float(sample.at(e, {**values, d.variable: z})) + float((z - v).square().sum()) / 2  # noqa: E731
            low = cost(best)
            near = [best + size * torch.randn_like(best) for size in (1e-3, 1e-2, 0.1, 1.0) for _ in range(4)]
            inside = [sample.at(node, {**values, start: z}, {step: 1e-6}) for z in near]  # feasible where there are constraints
            costs = [cost(z) for z in (*near, *inside, v, torch.zeros_like(v))]
            worst = max([worst, *(low - c for c in costs if c < float("inf"))]) if low < float("inf") else float("inf")
    yield Row(f"prox of {' + '.join(p.term for p in rest)} <= every other point", f"excess {max(worst, 0.0):.0e}", "1e-08", _verdict(worst <= 1e-8))
    for node in (n for a in d.exact.assigns if isinstance(a.value, Expr) for n in walk(a.value) if isinstance(n, Prox)):
        found = proximal.derive(node.term, node.variable, node.t, node.at, node.swaps)
        if found.scalar is not None:
            yield Row(f"scalar prox of {pretty(node.term)}", found.scalar.proof, "brute force", "holds")


def _plain(d: Derivation, sample: Sample) -> Network:
    """The network with nothing learned."""
    spec = d.spec.to_dict()
    spec["unroll"] = {k: v for k, v in spec["unroll"].items() if k not in ("learn", "parametrisation")}  # type: ignore[union-attr]
    return sample.network(derive(load({k: v for k, v in spec.items() if k not in ("data", "train", "model", "weights")}), sample.dims))


def initialisation(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Layer l of the learned network, untrained, is iterate l of the algorithm."""
    if not d.step.learned:
        return
    ours, plain = (n.trace(**sample.inputs).iterates for n in (sample.network(d), _plain(d, sample)))
    worst = max(_gap(a, b) for z in ours for a, b in zip(ours[z], plain[z], strict=True))
    yield Row("untrained network == algorithm, every layer", f"worst {worst:.0e}", f"{EXACT:.0e}", _verdict(worst <= EXACT))


def monotone(d: Derivation, sample: Sample) -> Iterator[Row]:
    if not any(note.startswith("monotone") for note in d.exact.notes):
        return
    total = _plain(d, sample).trace(**sample.inputs).terms["total"].detach() * d.problem.sign
    total = total[1:]  # the start may lie outside the constraints
    rise = float((total[1:] - total[:-1]).div(total[:-1].abs().clamp_min(1)).max()) if len(total) > 1 else 0.0
    yield Row("the objective falls in every layer", f"largest rise {max(rise, 0.0):.0e}", "0", _verdict(rise <= 1e-12))


def emitted(d: Derivation, sample: Sample) -> Iterator[Row]:
    """The emitted module against direct evaluation of the step, assignment by assignment."""
    net = sample.network(d)
    found = net.trace(**sample.inputs).iterates
    worst = 0.0
    for i in range(3):
        for z, iterates in by_hand(d, sample, i).items():
            worst = max(worst, *(_gap(a[i] if a.ndim == b.ndim + 1 else a, b) for a, b in zip(found[z], iterates, strict=True)))
    yield Row("emitted module == mathematics", f"worst {worst:.0e}", f"{EXACT:.0e}", _verdict(worst <= EXACT))


def by_hand(d: Derivation, sample: Sample, i: int) -> dict[str, list[Tensor]]:
    """Iterates of sample i, by evaluating the exact step as it is written."""
    problem = d.problem
    values = {s: _matrix(sample.parameters[s.name], s) for s in problem.parameters} | {s: _matrix(sample.inputs[s.name][i], s) for s in problem.inputs}
    numbers: dict[sp.Symbol, Any] = {**sample.numbers, **sample.sizes}

    def assign(target: Sym | sp.Symbol, value: Expr | sp.Expr) -> None:
        if isinstance(target, Sym):
            values[target] = evaluate(value, values, numbers) if isinstance(value, Expr) else torch.as_tensor(float(value.subs(numbers)))
        else:
            numbers[target] = evaluate(value, values, numbers) if isinstance(value, Expr) else _number(value, numbers)

    for a in d.exact.definitions:
        assign(a.target, a.value)
    for s in d.exact.states:
        assign(s.symbol, s.start)
    out: dict[str, list[Tensor]] = {z.name: [_stored(values[z], z)] for z in d.exact.output}
    for layer in range(d.layers):
        numbers[LAYER] = layer
        for a in d.exact.assigns:
            assign(a.target, a.value)
        for z in d.exact.output:
            out[z.name].append(_stored(values[z], z))
    return out


def _number(value: sp.Expr, numbers: dict[sp.Symbol, Any]) -> Any:
    symbols = sorted(value.free_symbols, key=str)
    return sp.lambdify(symbols, value, modules=["math"])(*(numbers[s] for s in symbols)) if symbols else float(value)  # type: ignore[index]


def _stored(value: Tensor, s: Sym) -> Tensor:
    return value.mT if s.rank == 2 else value.squeeze(-1) if s.rank == 1 else value[..., 0, 0]


def gradients_flow(d: Derivation, sample: Sample) -> Iterator[Row]:
    """Every parameter moves the answer."""
    if not d.step.learned:
        return
    net = sample.network(d)
    out = net(**sample.inputs)
    outs = out if isinstance(out, tuple) else (out,)
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()  # type: ignore[union-attr]
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0]
    count = sum(1 for _ in net.parameters())
    yield Row("a gradient reaches every parameter", f"{count - len(idle)} of {count}", "all", _verdict(not idle))

