"""A duality gap bounds the distance to the optimum from above, everywhere, and closes at the optimum."""

import pytest
import torch

import unroll
from unroll.derivation.derive import Derivation
from unroll.language.nodes import Sym
from unroll.laws.laws import Sample
from unroll.solver.certificate import duality_gap

GAPS = (
    "lasso",
    "nonnegative_lasso",
    "elastic_net",
    "group_lasso",
    "ball_denoising",
    "box_least_squares",
    "simplex_least_squares",
    "dictionary_coding",
)
OPEN = ("l0_sparse_coding", "mcp_sparse_coding", "ridge", "nonnegative_least_squares", "sparse_logistic_regression")
INVENTED = {
    "nuclear": "lam * nuclear(Z)",
    "groups of columns": "lam * group_norm(Z, axis=0)",
    "one long vector": "lam * norm_fro(Z)",
    "largest entry": "lam * norm_inf(Z)",
    "pinball": "sum(maximum(lam*Z, -2*lam*Z))",
}


def spec_of(name: str) -> dict[str, object]:
    from unroll import spec
    from unroll.spec import library

    dims = spec.load(library.find(name, ("objectives",))).dims
    return {
        "use": name,
        "dims": {d: n for d, n in {"m": 7, "n": 5, "T": 3, "N": 3}.items() if d in dims},
        "unroll": {"algorithm": "fista", "layers": 2000},
    }


WEIGHTED = {
    "weight by entry": "1/2 * sumsq(w * (A @ Z - X))",
    "positive weight by entry": "sum(exp(w) * (A @ Z - X)**2)",
    "one weight": "norm_fro(w) * sumsq(A @ Z - X)",
}


def invented(term: str, fit: str = "1/2 * sumsq(A @ Z - X)") -> dict[str, object]:
    return {
        "objective": "mine", "dims": {"m": 7, "n": 5, "T": 3}, "variables": {"Z": ["n", "T"]}, "inputs": {"X": ["m", "T"]},
        "parameters": {"A": ["m", "n"], "w": ["m", "T"]}, "scalars": {"lam": 0.3}, "minimize": {"fit": fit, "g": term},
        "unroll": {"algorithm": "fista", "layers": 2000},
    }  # fmt: skip


SPECS = {n: spec_of(n) for n in GAPS} | {n: invented(g) for n, g in INVENTED.items()}
SPECS |= {n: invented("lam * norm1(Z)", fit) for n, fit in WEIGHTED.items()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gap_bounds_the_distance_to_the_optimum_and_closes_there(spec):
    d = unroll.derive(spec)
    sample = Sample(d, seed=1)
    gap = duality_gap(d.parts, d.variable)
    assert gap is not None
    (half,) = d.halves
    values = sample.values(half)
    x = d.problem.inputs[0]
    stored = values[x].mT if x.rank == 2 else values[x].squeeze(-1)
    with torch.no_grad():
        best = sample.network(d.spec)(stored)
    optimum = {**values, d.variable: best.mT if x.rank == 2 else best.unsqueeze(-1)}
    low = total(sample, d, optimum)
    assert abs(float(sample.at(gap, optimum))) < 1e-9
    for scale in (1.0, 0.1, 1e-3):
        drawn = {**values, d.variable: optimum[d.variable] + scale * torch.randn_like(values[d.variable])}
        point = {**values, d.variable: sample.feasible(half, drawn)}
        above = total(sample, d, point) - low
        assert above - 1e-9 <= float(sample.at(gap, point))
        assert above > 0  # or the bound was not tried


def total(sample: Sample, d: Derivation, values: dict[Sym, torch.Tensor]) -> float:
    return sum(float(sample.at(p.e, values)) for p in d.parts)


@pytest.mark.parametrize("name", OPEN)
def test_no_gap_is_claimed_where_none_is_derived(name):
    d = unroll.derive(
        spec_of(name)
        if name != "ridge"
        else {**spec_of(name), "unroll": {"algorithm": "gradient_descent", "layers": 1}}
    )
    assert duality_gap(d.parts, d.variable) is None


def test_no_gap_where_a_weight_may_be_negative():
    d = unroll.derive(invented("lam * norm1(Z)", "sum(w * (A @ Z - X)**2)"))
    assert duality_gap(d.parts, d.variable) is None


@pytest.mark.parametrize("fit", ["1/2 * sumsq(A @ z - x) - 5 * sumsq(z)", "sum(log(1 + (A @ z - x)**2))"])
def test_no_gap_where_the_smooth_part_is_not_convex(fit):
    """Over a compact set too, where <grad F, z> and the support function are known: they bound nothing then."""
    spec = {
        "dims": {"m": 4, "n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
        "minimize": {"fit": fit}, "constraints": ["z in simplex"], "unroll": {"algorithm": "projected_gradient", "layers": 1},
    }  # fmt: skip
    d = unroll.derive(spec)
    assert duality_gap(d.parts, d.variable) is None
    convex = unroll.derive({**spec, "minimize": {"fit": "1/2 * sumsq(A @ z - x)"}})
    assert duality_gap(convex.parts, convex.variable) is not None
