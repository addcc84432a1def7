"""`unroll check` on every entry of the library: all laws hold; and on a broken derivation: a law says so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import unroll
from unroll.derivation.derive import derive
from unroll.errors import SpecError
from unroll.language.columns import WIDTH
from unroll.language.constructors import scale
from unroll.laws import laws
from unroll.spec import library, load

ALTERNATING = (
    "dictionary_learning", "ctrl_binary", "ctrl_multi", "simdino", "simdino_mean", "robust_pca", "nonnegative_factorisation", "beta_factorisation", "low_rank_and_groups",
)  # fmt: skip
"""Objectives in several variables: their laws are those of the specs that use them, or of losses (test_losses.py)."""
CONSTRAINED = (
    "ball_denoising",
    "box_least_squares",
    "rate_reduction",
    "mcr2",
    "fourth_power",
    "kurtosis",
    "principal_subspace",
    "nonnegative_least_squares",
    "simplex_least_squares",
)
STEPS: dict[str, Any] = {
    name: 0.01
    for name in (
        "poisson_regression",
        "rate_reduction",
        "mcr2",
        "mcr2_regularised",
        "token_statistics",
        "token_energy",
        "subspace_mixture",
        "fourth_power",
        "kurtosis",
        "phase_retrieval",
    )
}
"""Objectives whose gradient has no Lipschitz constant, and a step size that is small enough here."""


STARTS = {
    "kurtosis": {"u": 1},
    "rate_reduction": {"Z": 1},
    "mcr2": {"Z": 1},
    "shift_rate_reduction": {"Z": 1},
    "shift_rate_reduction_2d": {"Z": 1},
}
"""Where 0 has no nearest point of the constraint."""


def one_network(objective: str, algorithm: str, **unrolled: Any) -> dict[str, Any]:
    least = 2 if "shift" in objective else 4  # all shifts of all places and channels are one matrix
    open_dims = {
        d: least + i
        for i, (d, n) in enumerate(load(library.find(objective, ("objectives",))).dims.items())
        if not isinstance(n, int)
    }
    return {
        "use": objective,
        "dims": open_dims,
        "unroll": {
            "algorithm": algorithm,
            "layers": 4,
            "step": STEPS.get(objective, "1/L"),
            "start": STARTS.get(objective, {}),
            **unrolled,
        },
    }


ENDS = {
    "crate_neumann": "the expansion has no sum where products are large",
    "poisson_regression": "a step of 0.01 is too long for counts of 1e6",
}
"""Where degenerate inputs are not answered by finite numbers, and why."""


def assert_holds(found: laws.Check, least: int = 3) -> None:
    assert len(found.rows) >= least
    assert found.ok, str(found)
    assert max(map(len, str(found).splitlines())) <= WIDTH, str(found)
    noted = [r for r in found.rows if r.law == laws.ANSWERED and r.verdict != "holds"]
    assert not noted or found.title.split(",")[0] in ENDS, noted


def without_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of terms does not depend on the algorithm, nor on what is learned: it is held once."""
    for law in (laws.printed, laws.gradients, laws.lipschitz, laws.proxes):
        monkeypatch.setattr(laws, law.__name__, lambda d, sample: iter(()))


def derivation_of(name: str) -> str:
    """What of a spec decides its layers, whatever their sizes and number: laws are tried at small sizes anyway."""
    document = load(name).layers().to_dict()
    kept = ("variables", "inputs", "parameters", "scalars", "functions", "minimize", "maximize", "constraints")
    unrolled = {k: v for k, v in document["unroll"].items() if k != "layers"}
    return json.dumps([{k: document.get(k) for k in kept}, unrolled], sort_keys=True, default=str)


DISTINCT = tuple({derivation_of(name): name for name in reversed(library.names("specs"))}.values())
"""One spec of each derivation: crate_large is crate at other sizes."""


@pytest.mark.parametrize("name", DISTINCT)
def test_laws_hold_for_every_spec(name, monkeypatch):
    monkeypatch.setattr(
        laws, "LARGEST", 4 if name.endswith("_2d") else 6 if name.endswith("_1d") else 16
    )  # assumptions are measured the same way at any size
    monkeypatch.setattr(laws, "OPEN", 16)
    assert_holds(unroll.check(name, overrides=["unroll.layers=4"]))


def test_specs_of_other_sizes_are_known_as_the_same_derivation():
    assert derivation_of("crate_large") == derivation_of("crate") != derivation_of("crate_causal")
    assert len(DISTINCT) >= 35


SMOOTH = (
    "ridge", "mcr2_regularised", "token_statistics", "token_energy", "subspace_mixture", "hopfield_energy", "node_smoothing", "reweighted_nodes",
)  # fmt: skip


SPLIT = ("entropic_transport", "fused_lasso", "svm_dual", "sparse_inverse_covariance")
"""Objectives that only algorithms with several letters take."""


@pytest.mark.parametrize(
    "algorithm", [n for n in library.names("algorithms") if n not in ("power_step", "multiplicative")]
)
def test_laws_hold_for_every_algorithm(algorithm):
    """On the first of these that it takes; the specs pca and nmf take the two that are left out."""
    own = {
        "palm": "dictionary_learning",
        "scaled_gradient": "robust_pca",
        "joint_proximal_gradient": "low_rank_and_groups",
        "mirror_descent": "simplex_least_squares",
        "cccp": "hopfield_energy",
        "bregman_projections": "entropic_transport",
        "amp": "lasso",
        "vamp": "elastic_net",
    }
    for name in (own[algorithm],) if algorithm in own else ("fused_lasso", "lasso", "ridge", "box_least_squares"):
        spec = one_network(name, algorithm)
        try:
            derive(load(spec))
        except SpecError as refused:
            assert refused.code == "E303"
            continue
        return assert_holds(unroll.check(spec))
    raise AssertionError(algorithm)


@pytest.mark.parametrize("name", [n for n in library.names("objectives") if n not in (*ALTERNATING, *SPLIT)])
def test_laws_hold_for_every_objective(name, monkeypatch):
    algorithm = (
        "projected_gradient" if name in CONSTRAINED else "gradient_descent" if name in SMOOTH else "proximal_gradient"
    )
    assert_holds(unroll.check(one_network(name, algorithm)))
    if name not in STEPS and name not in SMOOTH:
        without_terms(monkeypatch)
        assert_holds(unroll.check(one_network(name, "fista", momentum="chambolle_dossal(4)")), least=1)


OF_ONE_ALGORITHM = [n for n in library.names("presets") if "updates:" in library.find(n, ("presets",)).read_text()]
"""Presets with updates of proximal_gradient."""


@pytest.mark.parametrize(
    "preset, algorithm",
    [
        (p, a)
        for p in library.names("presets")
        for a in ("proximal_gradient", "fista")
        if a != "fista" or p not in OF_ONE_ALGORITHM
    ],
)
def test_laws_hold_for_every_preset(preset, algorithm, monkeypatch):
    without_terms(monkeypatch)
    assert_holds(unroll.check(one_network("lasso", algorithm, parametrisation=preset)))


def broken(law: Any, parts: Any, **unrolled: Any) -> str:
    d = derive(load(one_network("lasso", "proximal_gradient", **unrolled)), {"m": 5, "n": 7})
    (half,) = d.halves
    d.__dict__["halves"] = (replace(half, parts=parts(half.parts)),)
    return next(law(d, laws.Sample(d, seed=0))).verdict


def test_a_constant_that_is_too_small_is_found():
    def halve(parts):
        first, *rest = parts
        worse = replace(first)
        worse.__dict__["_finite"] = replace(first.smooth, high=scale(0.5, first.smooth.high))
        return (worse, *rest)

    assert broken(laws.lipschitz, parts=halve) == "BROKEN"
    assert broken(laws.lipschitz, parts=lambda parts: parts) == "holds"


def test_an_emitted_module_that_is_not_the_mathematics_is_found(monkeypatch):
    true = laws.by_hand
    monkeypatch.setattr(laws, "by_hand", lambda *args: {z: [1.001 * x for x in xs] for z, xs in true(*args).items()})
    assert broken(laws.emitted, parts=lambda parts: parts) == "BROKEN"


def test_a_gradient_with_the_wrong_sign_is_found(monkeypatch):
    true = laws.gradient
    monkeypatch.setattr(laws, "gradient", lambda e, z: scale(-1, true(e, z)))
    assert broken(laws.gradients, parts=lambda parts: parts) == "BROKEN"


def test_a_prox_that_is_beaten_is_found(monkeypatch):
    true = laws.prox
    monkeypatch.setattr(laws, "prox", lambda e, z, t, at: true(e, z, 1.01 * t, at))
    assert broken(laws.proxes, parts=lambda parts: parts) == "BROKEN"


@pytest.mark.parametrize(("law", "unrolled"), [("monotone", {}), ("initialisation", {"parametrisation": "lista"})])
def test_another_iteration_than_the_one_that_is_claimed_is_found(law, unrolled, monkeypatch):
    true = laws.plain
    longer = lambda spec: load({**true(spec).to_dict(), "unroll": {**true(spec).to_dict()["unroll"], "step": "2.5/L"}})
    monkeypatch.setattr(laws, "plain", longer)
    assert broken(getattr(laws, law), parts=lambda parts: parts, **unrolled) == "BROKEN"


NEUMANN = {
    "dims": {"m": 4, "n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]},
    "minimize": {"fit": "1/2 * sumsq(x - A @ z)", "h": "1/2 * dot(z, inv(9 * I(n) + A.T @ A / spectral(A)**2) @ z)"},
    "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1, "rewrites": ["neumann(order=1)"]},
}  # fmt: skip


@pytest.mark.parametrize(("error", "verdict"), [(0.009, "holds"), (0.011, "BROKEN")])
def test_a_bound_that_does_not_hold_is_found(error, verdict, monkeypatch):
    """Of order 1 at rho 0.1: 0.01."""
    monkeypatch.setattr(laws, "_members", lambda *found: [(0.1, error)])
    (row,) = [r for r in unroll.check(NEUMANN).rows if "neumann" in r.law]
    assert row.verdict == verdict


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize(("update", "verdict"), [("0.1", "descends"), ("-0.1", "ASCENDS")])
def test_a_direction_is_told_by_what_it_does_to_the_objective(goal, update, verdict):
    fit = {"fit": ("-" if goal == "maximize" else "") + "1/2 * sumsq(x - A @ z)"}
    unrolled = {"algorithm": "gradient_descent", "layers": 1, "gauge": {"update": update}}
    spec = {k: v for k, v in NEUMANN.items() if k not in ("minimize", "unroll")} | {goal: fit, "unroll": unrolled}
    (row,) = [r for r in unroll.check(spec).rows if r.law.startswith("first-order change")]
    assert row.verdict == verdict


@pytest.mark.parametrize("weight", ["stop_gradient(spectral(L))", "stop_gradient(norm_fro(L))", "sumsq(D)"])
def test_a_weight_that_is_held_or_made_of_data_is_checked_too(weight: str):
    spec = {
        "dims": {"m": 5, "T": 4},
        "variables": {"L": ["m", "T"]},
        "inputs": {"D": ["m", "T"]},
        "scalars": {"l1": 0.3},
    }
    spec |= {"minimize": {"fit": "1/2*sumsq(D - L)", "low_rank": f"l1*{weight}*nuclear(L)"}}
    assert_holds(unroll.check({**spec, "unroll": {"layers": 3, "algorithm": "proximal_gradient"}}))


@pytest.mark.parametrize(
    ("minimize", "told"),
    [
        ("1/2*sumsq(z - x) + 0.01*sum(sqrt(x**2))", "6 of 6 kinds"),
        ("1/2*sumsq(z - 1/x)", "zeros: the answer is not finite"),
    ],
)
def test_degenerate_inputs_are_told_of(minimize: str, told: str):
    spec = {"dims": {"n": 4}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "minimize": {"f": minimize}}
    found = unroll.check({**spec, "unroll": {"layers": 2, "algorithm": "gradient_descent", "step": 0.5}})
    (row,) = [r for r in found.rows if r.law == laws.ANSWERED]
    assert told in row.measured and (row.verdict == "holds") == ("kinds" in told)


GRAM: dict[str, Any] = {
    "dims": {"d": 3, "N": 4},
    "variables": {"Z": ["d", "N"]},
    "inputs": {"X": ["d", "N"]},
    "minimize": {"energy": "1/4 * sumsq(Z.T @ Z)"},
    "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1, "start": {"Z": "X"}},
}


@pytest.mark.parametrize("size", [1.0, 0.1])
def test_a_heuristic_says_how_much_it_changes_of_what_it_replaces(size: float) -> None:
    """Not of the step, which is Z less a tenth of it."""
    x = size * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spec = {**GRAM, "unroll": {**GRAM["unroll"], "rewrites": ["gram_to_softmax()"]}}
    (row,) = [r for r in unroll.check(spec, inputs={"X": x}).rows if r.law.startswith("gram_to_softmax")]
    v = x.mT
    before = v @ v.mT @ v
    share = float(torch.linalg.norm(before - v @ (v.mT @ v).softmax(0)) / torch.linalg.norm(before))
    said = re.fullmatch(r"what it replaces changes by ([\d.e+]+) (%|times itself)", row.measured)
    assert said is not None, row
    assert float(said[1]) / (100 if said[2] == "%" else 1) == pytest.approx(share, rel=0.05)
    assert (row.reference, row.verdict) == ("no bound", "noted")


def test_a_surrogate_has_no_bound_whatever_it_assumes() -> None:
    """What is known of Σ U U' B is not known of the term in its place."""
    spec = {
        "use": "sparse_rate_reduction",
        "dims": {"d": 4, "K": 2, "p": 2, "N": 5},
        "inputs": {"X": ["d", "N"]},
        "unroll": {
            "layers": 1,
            "start": {"Z": "X"},
            "blocks": [
                {"block": "compress", "terms": ["compression"], "algorithm": "gradient_descent", "step": 0.1},
                {
                    "block": "sparsify",
                    "terms": ["expansion", "sparsity"],
                    "surrogate": {
                        "replaces": "expansion",
                        "by": "-1/2 * sumsq(Z0 - D @ Z)",
                        "assumes": "incoherent(D)",
                    },
                    "algorithm": "proximal_gradient",
                },
            ],
        },
        "parameters": {"D": ["d", "d"]},
    }
    (row,) = [r for r in unroll.check(spec).rows if "surrogate" in r.law and "sparsify:" in r.law]
    assert row.reference == "no bound" and "off by" in row.measured


def test_a_gradient_is_sought_in_one_layer_where_many_overflow() -> None:
    """z + (A'(A z)^3), ten times: 3^10 is the degree of the answer."""
    spec = {
        "dims": {"n": 5, "m": 6},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["n"]},
        "parameters": {"A": ["m", "n"]},
    }
    spec |= {"minimize": {"f": "-1/4 * sum((A @ z)**4)"}}
    unrolled = {"algorithm": "gradient_descent", "step": 9.0, "start": {"z": "x"}, "learn": {"W": {"replaces": "A"}}}
    for layers, told in ((10, "1 of 1; one layer: more of them overflow"), (1, "1 of 1")):
        found = unroll.check({**spec, "unroll": {**unrolled, "layers": layers}})
        (row,) = [r for r in found.rows if "reaches" in r.law]
        assert (row.measured, row.verdict) == (told, "holds"), row
        (row,) = [r for r in found.rows if r.law == laws.ANSWERED]
        assert ("ordinary inputs too" in row.measured) == (layers > 1)


@pytest.mark.parametrize(("objective", "rows"), [("lasso", 1), ("simplex_least_squares", 0)])
def test_descent_is_claimed_of_one_layer_only_where_there_is_a_start_to_compare_it_with(
    objective: str, rows: int
) -> None:
    """0 is a point of the problem, but not of the simplex."""
    spec = one_network(objective, "proximal_gradient" if rows else "projected_gradient", layers=1)
    assert len([r for r in unroll.check(spec).rows if "falls" in r.law]) == rows


def test_one_layer_that_climbs_is_found(monkeypatch):
    d = derive(load(one_network("lasso", "proximal_gradient", layers=1)), {"m": 5, "n": 7})
    assert [r.verdict for r in laws.monotone(d, laws.Sample(d, 0))] == ["holds"]
    longer = load(one_network("lasso", "proximal_gradient", layers=1, step=5.0))
    monkeypatch.setattr(laws, "plain", lambda spec: longer)
    assert [r.verdict for r in laws.monotone(d, laws.Sample(d, 0))] == ["BROKEN"]
