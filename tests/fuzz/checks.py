"""What the engine says of a random spec against what the oracle finds. Each check: a key -> the case, and what is wrong with it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor

import unroll
from unroll.calculus.curvature import bounds
from unroll.calculus.gradient import gradient
from unroll.calculus.prox import proximable, replace_role
from unroll.derivation.parts import Part
from unroll.emit.objective import objective
from unroll.language.constructors import add
from unroll.language.nodes import Expr, Sym, scalar, walk
from unroll.language.problem import Problem, from_spec
from unroll.language.show import text
from unroll.laws import laws
from unroll.lower.graph import lower_terms
from unroll.lower.passes import Sizes, optimise
from unroll.network.evaluate import evaluate
from unroll.network.network import load as load_source
from unroll.solver.solve import solve
from unroll.spec import load

from . import oracle
from .drawing import SCALARS, Author, Case

EXACT = 1e-8
"""Relative, of two computations in float64."""


class Wrong(Exception):
    """What the engine says is not so."""


class Nothing(Exception):
    """There was nothing to compare; why."""


@dataclass(frozen=True)
class Read:
    """A case as the engine reads it."""

    case: Case
    problem: Problem
    z: Sym
    values: dict[Sym, Tensor]
    numbers: dict[sp.Symbol, Any]

    @staticmethod
    def of(case: Case) -> Read:
        p = from_spec(load(case.yaml))
        values = {s: case.values[s.name] for s in p.symbols.values() if s.name in case.values}
        numbers = {s: SCALARS[s.name] for s in p.scalars} | {d: case.document["dims"][d.name] for d in p.dims}
        return Read(case, p, p.variables[0], values, numbers)

    @property
    def cost(self) -> Expr:
        return add(*self.problem.costs.values())

    def at(self, e: Expr, known: dict[Sym, Tensor] | None = None, more: dict[sp.Symbol, Any] | None = None) -> Tensor:
        return evaluate(e, {**self.values, **(known or {})}, {**self.numbers, **(more or {})})

    def emitted(self, terms: dict[str, Expr]) -> Callable[[Tensor], dict[str, Tensor]]:
        """Terms as a function of the variable, (B, rows, cols) -> (B, ...), by the text that is emitted for them."""
        p = replace(self.problem, terms=terms)
        sizes = {d: int(n) for d, n in p.dims.items() if isinstance(n, int)}
        graph = optimise(lower_terms(p), Sizes(sizes, 1)).graph
        function = load_source(objective(p, graph), "fuzz")["objective"]
        tags = {n: [t for t in graph.view(ref).tags if t in ("r", "c")] for (_, n), ref in graph.roots.items()}
        order = [s for s in (*p.variables, *p.inputs, *p.parameters)]

        def run(z: Tensor) -> dict[str, Tensor]:
            given = [_given(z if s is self.z else self.values[s], s) for s in order]
            found = function(*given, *(SCALARS[s.name] for s in p.scalars))
            return {n: _matrix(torch.as_tensor(v, dtype=torch.float64), tags[n]) for n, v in found.items()}

        return run


def _given(x: Tensor, s: Sym) -> Tensor:
    """A value in the layout that is stored: parameters as written, all else tokens first."""
    return x.squeeze(-1) if s.rank == 1 else x if s.role == "parameter" else x.mT


def _matrix(x: Tensor, tags: list[str]) -> Tensor:
    """What is emitted, as (..., rows, cols)."""
    if tags == ["c", "r"]:
        return x.mT
    return x if len(tags) == 2 else x.unsqueeze(-2 if tags == ["c"] else -1) if tags else x[..., None, None]


def function(case: Case, names: dict[str, Any] | None = None) -> Callable[[Tensor], Tensor]:
    return oracle.function(case.document["minimize"].values(), {**case.names, **(names or {})}, case.variable)


def _differ(found: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return not bool(((found - want).abs() <= tolerance * want.abs().amax().clamp_min(1)).all())


def _few(x: Tensor) -> str:
    return str([float(f"{v:.6g}") for v in x.flatten()[:6].tolist()])


# --- gradients --------------------------------------------------------------------------------------------------------


def draw_gradient(key: str) -> Case:
    author = Author(key)
    return author.case({"t": author.smooth(2 if author.pick.random() < 0.5 else 1)})


def check_gradient(case: Case) -> None:
    """The emitted gradient: of autograd where points are random, between the one-sided slopes at 0, ties and edges."""
    r = Read.of(case)
    run = r.emitted({"value": r.cost, "slope": gradient(r.cost, r.z)})
    f = function(case)
    points = torch.stack([case.point(i, size) for i, size in enumerate((0.3, 1.0, 2.0))])
    taken = Part("t", r.cost, r.z).differentiable  # else no algorithm takes its gradient
    compared = _at_random_points(run, f, points, taken)
    if "stop_gradient" not in case.yaml:  # differences move what is held
        kinks = function(case, oracle.beside_kinks(1e-6))
        compared += _at_degenerate_points(run, f, kinks, degenerate(case), taken)
    if not compared:
        raise Nothing("no point lies in the domain")


def _at_random_points(
    run: Callable[[Tensor], dict[str, Tensor]], f: Callable[[Tensor], Tensor], z: Tensor, taken: bool
) -> int:
    value, slope = f(z), oracle.slope(f, z)
    known = value.isfinite() & slope.flatten(1).isfinite().all(1)
    z, value, slope = z[known], value[known], slope[known]
    if not len(z):
        return 0
    found = run(z)
    if not taken:
        found["slope"] = oracle.slope(lambda x: run(x)["value"], z)
    for i in range(len(z)):
        ours = [found[n].expand(len(z), *size)[i] for n, size in (("value", (1, 1)), ("slope", z.shape[1:]))]
        if _differ(ours[0].squeeze(), value[i]):
            raise Wrong(f"value {float(ours[0]):.9g}, by the oracle {float(value[i]):.9g} at {_few(z[i])}")
        if _differ(ours[1], slope[i]):
            raise Wrong(f"gradient {_few(ours[1])}, by autograd {_few(slope[i])} at {_few(z[i])}")
    return len(z)


def degenerate(case: Case) -> list[Tensor]:
    """0, ties, edges, one entry 0, what other data are."""
    drawn = case.point(7)
    with_zero = drawn.clone()
    with_zero.view(-1)[0] = 0
    same = [v for v in case.values.values() if v.shape == drawn.shape and v.ndim == 2]
    return [0 * drawn, 0 * drawn + 0.5, 0 * drawn + 1, 0 * drawn - 1, with_zero, *same]


def _at_degenerate_points(
    run: Callable[[Tensor], dict[str, Tensor]],
    f: Callable[[Tensor], Tensor],
    kinks: Callable[[Tensor], Tensor],
    at: list[Tensor],
    taken: bool,
) -> int:
    compared = 0
    for z in at:
        if not bool(f(z[None]).isfinite()):
            continue
        leaf = z[None].clone().requires_grad_()
        value = run(leaf)["value"].sum()
        (g,) = torch.autograd.grad(value, leaf, materialize_grads=True) if value.requires_grad else (0 * z[None],)
        g, derived = g[0], run(z[None])["slope"].expand(1, *z.shape)[0]
        (left, right), near = oracle.sides(f, z), oracle.sides(f, z, 1e-5)
        size = torch.stack([left.abs(), right.abs()]).amax(0).clamp_min(1)
        steady = ((left - near[0]).abs() + (right - near[1]).abs()) <= 1e-3 * size  # no vertical slope, no edge
        size = size + 1e-4 * f(z[None]).abs()  # rounding of differences
        slack = 1e-4 * size + 3 * ((left - near[0]).abs() + (right - near[1]).abs())  # slopes such as |x|^(1/2) at 0
        noise = torch.randn(64, *z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        mixed = [oracle.slope(h, z + far * noise).nan_to_num(0) for h, far in ((f, 1e-6), (kinks, 1e-9))]  # Clarke
        beside = torch.cat([left[None], right[None], *mixed])
        low, high = beside.amin(0) - slack, beside.amax(0) + slack
        outside = steady & ~((g >= low) & (g <= high))
        smooth = bool(left.isfinite().all() and right.isfinite().all())
        if bool(outside.any()) or (smooth and bool(g.isnan().any())):
            raise Wrong(f"gradient {_few(g)}, one-sided slopes {_few(left)} and {_few(right)} at {_few(z)}")
        if (
            taken
            and smooth
            and bool((steady & ((left - right).abs() <= 1e-4 * size)).all())
            and _differ(derived, right, 1e-3)
        ):
            raise Wrong(f"derived gradient {_few(derived)}, slopes from both sides {_few(right)} at {_few(z)}")
        compared += bool(steady.any())
    return compared


# --- proximal steps ---------------------------------------------------------------------------------------------------


def draw_prox(key: str) -> Case:
    author = Author(key, most=1)
    return author.case(*author.proximable())


def check_prox(case: Case) -> None:
    """No point of many has a smaller t f(x) + |x - v|^2 / 2 than the derived step at v."""
    r = Read.of(case)
    found, at, step = proximable(r.cost, r.z), replace_role(r.z), scalar("step", positive=True)
    f, onto = function(case), oracle.inside(case.document.get("constraints", ()), case.names)
    v = torch.stack([case.point(1, 1.5), case.point(2, 0.4), 4 * case.point(3), *degenerate(case)])
    for t in (0.2, 1.0, 3.0):
        answers = r.at(found.step, {at: v}, {step: t}).expand_as(v)
        for x, centre in zip(answers, v, strict=True):
            if not bool(x.isfinite().all()):
                raise Wrong(f"the prox of {_few(centre)} is {_few(x)}, t = {t}")
            if "in sphere" in case.yaml and bool(((centre.norm(dim=0) == 0) | (x.norm(dim=0) == 0)).any()):
                continue  # no point is nearest; that 0 stays 0 is what the language says
            if _differ(onto(x[None])[0], x, 1e-7):
                raise Wrong(f"the prox of {_few(centre)} is {_few(x)}, outside the constraints, t = {t}")
            cost = lambda p, centre=centre, t=t: t * f(p) + (p - centre).square().sum((-2, -1)) / 2
            best, value = lowest(cost, onto, [x, centre, 0 * x])
            sides = cost(
                torch.stack([x + e * (1 + x.abs()) for e in (0, 1e-12, -1e-12)])
            )  # at a jump or an edge: the side it is on
            own = float(sides.nan_to_num(torch.inf).min())
            if not own <= value + 1e-6 * (1 + abs(value)):
                raise Wrong(
                    f"the prox of {_few(centre)} is {_few(x)} with cost {own:.8g}; {_few(best)} has {value:.8g}, t = {t}"
                )


def lowest(
    cost: Callable[[Tensor], Tensor], onto: Callable[[Tensor], Tensor], near: list[Tensor]
) -> tuple[Tensor, float]:
    """The best of many feasible points: around some at every scale, some entries kept; then around the best so far."""
    g = torch.Generator().manual_seed(0)
    best, value = near[0], float("inf")

    def look(base: Tensor, sizes: Iterable[float], count: int) -> None:
        nonlocal best, value
        noise = [s * torch.randn(count, *base.shape, generator=g, dtype=base.dtype) for s in sizes]
        moved = torch.cat(noise)
        points = onto(base + moved * (torch.rand(moved.shape, generator=g) < 0.7))
        costs = cost(points).nan_to_num(torch.inf, posinf=torch.inf)
        i = int(costs.argmin())
        if float(costs[i]) < value:
            best, value = points[i], float(costs[i])

    for base in near:
        look(base, (1e-3, 1e-2, 0.1, 0.5, 2.0), 300)
    for size in (0.3, 0.1, 0.03, 0.01, 1e-3):
        look(best, (size,), 300)
    return best, value


# --- curvature --------------------------------------------------------------------------------------------------------


def check_curvature(case: Case) -> None:
    """Stated bounds of the Hessian hold where it was sampled."""
    r = Read.of(case)
    stated = bounds(r.cost, r.z)
    if stated is None:
        raise Nothing("no rule for its curvature")
    if r.z in stated.low.symbols | stated.high.symbols:
        raise Nothing("its bounds move with what is held")
    low, high = (float(r.at(b)) for b in (stated.low, stated.high))
    if low == -torch.inf and high == torch.inf:
        raise Nothing("its curvature has no bound")
    sizes = (0.05, 0.3, 1.0, 1.0, 3.0, 10.0)
    z = torch.cat([torch.stack([case.point(10 * i + j, s) for j in range(8)]) for i, s in enumerate(sizes)])
    found = oracle.hessians(function(case), torch.cat([z, torch.stack(degenerate(case))]))
    found = found[found.flatten(1).isfinite().all(1)]
    if not len(found):
        raise Nothing("no point lies in the domain")
    values = torch.linalg.eigvalsh((found + found.mT) / 2)
    least, most = float(values.min()), float(values.max())
    slack = 1e-7 * max(1.0, *(abs(v) for v in (least, most)))
    if not (low - slack <= least and most <= high + slack):
        raise Wrong(f"the Hessian is stated within [{low:.9g}, {high:.9g}]; found [{least:.9g}, {most:.9g}]")


# --- networks ---------------------------------------------------------------------------------------------------------

KINKED = re.compile(r"norm|abs|tv|max|min|where|pos|huber|nuclear|spectral|sign|sqrt")
REWRITES = ("push_through", "expand", "collect({z})", "woodbury", "shares")


def draw_rewrites(key: str) -> Case:
    author = Author(key)
    y = "Y" if author.matrix else "y"
    drawn = (author.smooth(1) for _ in range(5))
    first = next((t for t in drawn if not KINKED.search(t)), f"logsumexp({author.z})")
    terms = {"t": first, "q": f"1/2*sumsq({author.z} - {y})"}
    chosen = [r.format(z=author.z) for r in REWRITES if author.pick.random() < 0.2]
    case = author.case(terms, start=y)
    extra = {"rewrites": chosen} if chosen else {}
    return case.with_unroll(algorithm="gradient_descent", layers=2, step=0.01, start={author.z: y}, **extra)


def check_rewrites(case: Case) -> None:
    """Two layers, through all passes and rewrites, are two steps of gradient descent by autograd."""
    r = Read.of(case)
    inputs = {s: torch.stack([r.values[s], 2 * r.values[s]]) for s in r.problem.inputs}
    try:
        net = unroll.compile(case.yaml, parameters=_stored(r, r.problem.parameters), dtype=torch.float64)
    except unroll.UnrollError as e:
        if e.code != "E309" or "rewrites" not in case.document["unroll"]:
            raise
        rest = {k: v for k, v in case.document["unroll"].items() if k != "rewrites"}
        return check_rewrites(case.with_unroll(**rest))  # there is nothing to rewrite
    names = {**case.names, **{s.name: v for s, v in inputs.items()}}
    f = oracle.function(case.document["minimize"].values(), names, case.variable)
    want = inputs[next(s for s in r.problem.inputs if s.name.upper() == "Y")]
    for _ in range(2):
        want = want - 0.01 * oracle.slope(f, want)
    found = net(*(_given(inputs[s], s) for s in r.problem.inputs))
    if not bool(want.isfinite().all()):
        raise Nothing("no point lies in the domain")
    if _differ(found, _given(want, r.z)):
        raise Wrong(f"two layers give {_few(found)}, two steps by autograd {_few(_given(want, r.z))}")


def _stored(r: Read, symbols: Iterable[Sym]) -> dict[str, Tensor]:
    return {s.name: _given(r.values[s], s) for s in symbols}


def draw_learn(key: str) -> Case:
    """A proximal algorithm in which something that occurs is learned: a sub-expression of its own step, in its words."""
    author = Author(key)
    z, y, x = (author.z, *(("Y", "X") if author.matrix else ("y", "x")))
    norm = "norm_fro" if author.matrix else "norm2"
    smooth = author.one(
        f"1/2*sumsq(A @ {z} - {x})", f"1/2*sumsq(M @ {z} - {y})", f"sum(huber(A @ {z} - {x}, 0.7))", author.smooth
    )
    rest = author.one(
        f"lam*norm1({z})", f"lam*{norm}({z})", f"mu/2*sumsq({z})", f"sum({'C' if author.matrix else 'c'}*abs({z}))"
    )
    case = author.case({"fit": smooth, "rest": rest})
    algorithm = author.one("proximal_gradient", "fista", "gradient_descent")
    case = case.with_unroll(algorithm=algorithm, layers=3, step=author.one("1/L", "0.05"))
    found = _learnable(case)
    if not found:
        return case
    learn = {"W0": {"replaces": author.pick.choice(found)}}
    return case.with_unroll(**case.document["unroll"], learn=learn)


def _learnable(case: Case) -> list[str]:
    """Texts of what stands in the step and depends on no data."""
    try:
        exact = unroll.derive(case.yaml).exact
    except unroll.UnrollError:
        return []
    assigned = {a.target for a in exact.assigns}
    nodes = [e for a in exact.assigns if isinstance(a.value, Expr) for e in walk(a.value)]
    known = [e for e in nodes if e.symbols and all(s.role == "parameter" and s not in assigned for s in e.symbols)]
    return [*dict.fromkeys(text(e) for e in known), "step", "lam"]


def check_learn(case: Case) -> None:
    """Untrained, every layer is that of the algorithm; and the emitted text is the mathematics."""
    spec = load(case.yaml)
    if "learn" not in case.document["unroll"]:
        unroll.derive(spec)
        raise Nothing("nothing in it can be learned")
    d = unroll.derive(spec)
    sample = laws.Sample(d, 0)
    for row in (*laws.initialisation(d, sample), *laws.emitted(d, sample)):
        if row.verdict == "BROKEN":
            raise Wrong(f"{row.law}: {row.measured}")


# --- solutions --------------------------------------------------------------------------------------------------------


def draw_solve(key: str) -> Case:
    """A convex problem that CVXPY can read too."""
    author = Author(key)
    z, (y, x), weight = author.z, ("Y", "X") if author.matrix else ("y", "x"), "C" if author.matrix else "c"
    residual = f"A @ {z} - {x}"
    fit = author.one(
        f"1/2*sumsq({residual})", f"1/2*sumsq({residual})", f"3*sumsq({z} - {y})", f"sum(huber({residual}, 0.7))",
        f"sum(logistic(A @ {z})) + mu/2*sumsq({z})", f"logsumexp(A @ {z}) + 1/2*sumsq({z} - {y})",
        f"sum({weight}*({z} - {y})**2)", f"sum(softplus({z} - {y})) + 1/2*sumsq({z})",
    )  # fmt: skip
    rest = author.one(
        f"lam*norm1({z})", f"sum({weight}*abs({z}))", f"lam*{'norm_fro' if author.matrix else 'norm2'}({z})",
        f"lam*norm_inf({z})", f"mu/2*sumsq({z})", f"lam*norm1({z} - {y})", f"lam*sum(pos({z}))",
        f"lam*group_norm({z}, axis=1)" if author.matrix else f"lam*norm1({z})", "lam*nuclear(Z)" if author.matrix else f"lam*norm1({z})", "",
    )  # fmt: skip
    sets = author.one(
        "",
        "",
        "",
        f"{z} in nonneg",
        f"{z} in box(-0.5, 0.7)",
        f"{z} in simplex",
        f"{z} in ball1(0.8)",
        f"{z} in ball2(1.2)",
    )
    if sets and author.pick.random() < 0.7:
        rest = ""
    case = author.case({"fit": fit, **({"rest": rest} if rest else {})}, [sets] if sets else [])
    unit = author.pick.choice((1.0, 1.0, 1.0, 1e-3, 1e3))
    return replace(case, values={n: v * unit if n in (x, y) else v for n, v in case.values.items()})


def check_solve(case: Case) -> None:
    """The optimum is that of CVXPY, certified where it is said to be."""
    r = Read.of(case)
    inputs = [_given(r.values[s], s) for s in r.problem.inputs]
    found = solve(case.yaml, *inputs, parameters=_stored(r, r.problem.parameters), tol=1e-9, max_iterations=20_000)
    if not bool(found.converged.all()):
        raise Nothing("has not converged in 20,000 iterations, and says so")
    z = found.z.mT if case.variable == "Z" else found.z[..., None]
    f, onto = function(case), oracle.inside(case.document.get("constraints", ()), case.names)
    ours, theirs = float(f(z[None])), by_cvxpy(case)
    start = float(f(onto(torch.zeros(1, *case.size, dtype=torch.float64))))
    if _differ(onto(z[None])[0], z, 1e-6):
        raise Wrong(f"the solution {_few(z)} lies outside the constraints")
    if not ours <= theirs + 1e-6 * max(abs(start - theirs), abs(theirs), 1e-12):
        raise Wrong(f"solved to {ours:.10g}, CVXPY to {theirs:.10g} (at the start {start:.6g})")


def by_cvxpy(case: Case) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cvxpy as cp

        z = cp.Variable(case.size)
        arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in case.names.items()}
        space = {**_convex(cp), **arrays, case.variable: z, "times": _times(cp)}
        terms = [eval(oracle.compiled(t, times=True), space) for t in case.document["minimize"].values()]
        limits = [_limit(cp, c, z) for c in case.document.get("constraints", ())]
        problem = cp.Problem(cp.Minimize(sum(terms)), [c for found in limits for c in found])
        try:
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        except cp.SolverError as e:
            raise Nothing("CVXPY fails") from e
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise Nothing(f"CVXPY says {problem.status}")
    return float(problem.value)


def _times(cp: Any) -> Callable[[Any, Any], Any]:
    return lambda a, b: a * b if isinstance(a, (int, float)) or isinstance(b, (int, float)) else cp.multiply(a, b)


def _convex(cp: Any) -> dict[str, Callable[..., Any]]:
    flat = lambda x: cp.vec(x, order="F")
    return {
        "sumsq": cp.sum_squares, "norm1": lambda x: cp.sum(cp.abs(x)), "norm2": lambda x: cp.norm(flat(x)),
        "norm_fro": lambda x: cp.norm(flat(x)), "norm_inf": lambda x: cp.max(cp.abs(x)), "nuclear": cp.normNuc,
        "group_norm": lambda x, axis: cp.sum(cp.norm(x, 2, axis=axis)), "sum": cp.sum, "abs": cp.abs, "pos": cp.pos,
        "huber": lambda x, d: cp.huber(x, d) / 2, "logistic": lambda x: cp.logistic(-x), "softplus": cp.logistic,
        "logsumexp": cp.log_sum_exp,
    }  # fmt: skip


def _limit(cp: Any, constraint: str, z: Any) -> list[Any]:
    match constraint.split(" in ")[1]:
        case "nonneg":
            return [z >= 0]
        case "box(-0.5, 0.7)":
            return [z >= -0.5, z <= 0.7]
        case "simplex":
            return [z >= 0, cp.sum(z, axis=0) == 1]
        case "ball1(0.8)":
            return [cp.sum(cp.abs(z)) <= 0.8]
        case found:
            assert found == "ball2(1.2)"
            return [cp.norm(cp.vec(z, order="F")) <= 1.2]


@dataclass(frozen=True)
class Check:
    """draw(key): the case.  run(case): raises Wrong, Nothing, or what the engine refuses it with."""

    draw: Callable[[str], Case]
    run: Callable[[Case], None]


CHECKS: dict[str, Check] = {
    "gradient": Check(draw_gradient, check_gradient),
    "prox": Check(draw_prox, check_prox),
    "curvature": Check(draw_gradient, check_curvature),
    "solve": Check(draw_solve, check_solve),
    "rewrites": Check(draw_rewrites, check_rewrites),
    "learn": Check(draw_learn, check_learn),
}
