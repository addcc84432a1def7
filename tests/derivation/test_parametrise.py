"""Learning: at its start every network is the untrained algorithm, layer by layer; parameters are there, are their own, and count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll
from unroll.errors import SpecError
from unroll.spec import load

FOLDER = Path(__file__).parents[2] / "specs"
SPECS = tuple(sorted(p.stem for p in FOLDER.glob("*.yaml")))
PRESETS = tuple(sorted(p.stem for p in (FOLDER / "presets").glob("*.yaml") if "updates:" not in p.read_text()))
"""Those that learn, and change nothing else; of the others: test_presets.py."""
SMALL = {"m": 6, "n": 8, "N": 3}


def drawn(name: str) -> bool:
    """Has a network a parameter that starts at a draw, at what data say, or at a formula of its own?"""
    unrolled = load(name).unroll
    assert unrolled is not None
    learned = [p for scheme in (unrolled, *unrolled.blocks) for p in scheme.learn.values()]
    return any(p.init != "value" or p.start is not None for p in learned)


DRAWN = {n for n in SPECS if drawn(n)}
"""Networks with a parameter that starts at a draw, or at what data say."""
LAYERS = 5
Spec = dict[str, Any]
BASE: Spec = {
    "objective": "own", "dims": {"m": 6, "n": 8}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]}, "parameters": {"A": ["m", "n"]}, "scalars": {"lam": 0.1},
    "minimize": {"fidelity": "1/2 * sumsq(x - A @ z)", "sparsity": "lam * norm1(z)"},
}  # fmt: skip


def plain(spec: Spec) -> Spec:
    """The same without learning."""

    def bare(scheme: Spec) -> Spec:
        return {k: v for k, v in scheme.items() if k not in ("learn", "parametrisation")}

    unrolled = bare(spec["unroll"])
    return {
        **spec,
        "unroll": {**unrolled, **({"blocks": [bare(b) for b in unrolled["blocks"]]} if "blocks" in unrolled else {})},
    }


def pair(spec: Spec) -> tuple[Any, Any]:
    """The learned network at its start, and the algorithm, with the same parameters of the problem."""
    learned = unroll.compile(spec, dtype=torch.float64, seed=1)
    return learned, unroll.compile(plain(spec), dtype=torch.float64, parameters=learned.given)


def inputs(net: Any, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for s in net.program.problem.inputs:
        sizes = [n if n is not None else 3 for n in net.program.tensor_sizes(s)]
        value = torch.randn(2, *sizes, generator=g, dtype=torch.float64)
        found.append(value.abs() if "positive" in s.props else value)
    return found


def same_iterates(spec: Spec, tolerance: float = 1e-10) -> Any:
    net, algorithm = pair(spec)
    given = inputs(net)
    seen, want = (n.trace(*given).iterates[n.variables[0]] for n in (net, algorithm))
    assert len(seen) == len(want) == net.layers + 1
    for a, b in zip(seen, want, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())
    assert want[-1].abs().max() > 1e-3
    return net


def small(name: str) -> Spec:
    spec = load(name).to_dict()
    dims = {d: min(n, SMALL.get(d, 6)) if isinstance(n, int) else n for d, n in spec["dims"].items()}
    scalars = spec.get("scalars", {}) | (
        {"eps2": 100, "lam": 0.001}
        if {"eps2", "lam"} <= spec.get("scalars", {}).keys()
        else {"eps2": 100}
        if "eps2" in spec.get("scalars", {})
        else {}
    )  # where a Neumann series converges
    return {k: v for k, v in spec.items() if k not in ("data", "train")} | {
        "scalars": scalars,
        "dims": dims,
        "unroll": {**spec["unroll"], "layers": LAYERS},
    }


def on(learn: Spec, algorithm: str = "proximal_gradient", objective: Spec = BASE, **more: Any) -> Spec:
    return {**objective, "unroll": {"algorithm": algorithm, "layers": LAYERS, "learn": learn, **more}}


# --- the law ----------------------------------------------------------------------------------------------------------


FUNCTIONS = ("admm_csnet",)
"""With a function that starts at its values at knots: test_learned_functions.py says how far that is off."""


@pytest.mark.parametrize("name", [n for n in SPECS if n not in DRAWN])
def test_every_shipped_network_starts_as_the_algorithm(name: str) -> None:
    same_iterates(small(name), 1e-2 if name in FUNCTIONS else 1e-10)


FITTING = {
    "lasso": BASE,
    "nonnegative": {**BASE, "constraints": ["z >= 0"]},
    "elastic net": {**BASE, "minimize": BASE["minimize"] | {"ridge": "1/4 * sumsq(z)"}},
    "matrix": {**BASE, "dims": {"m": 6, "n": 8, "N": 3}, "variables": {"z": ["n", "N"]}, "inputs": {"x": ["m", "N"]}},
}


@pytest.mark.parametrize("objective", FITTING)
@pytest.mark.parametrize("algorithm", ["proximal_gradient", "fista"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts_as_the_algorithm(preset: str, algorithm: str, objective: str) -> None:
    spec = on({}, algorithm, FITTING[objective])
    spec["unroll"] = {k: v for k, v in spec["unroll"].items() if k != "learn"} | {"parametrisation": preset}
    if (preset, objective) == ("lista", "elastic net"):  # (1 - step/2) I - step A'A, so the second matrix is not there
        with pytest.raises(SpecError, match="does not occur"):
            unroll.derive(spec)
        return
    net = same_iterates(spec)
    assert list(net.parameters())


INVENTED: dict[str, Spec] = {
    "the dictionary": on({"D": {"replaces": "A"}}),
    "its transpose": on({"B": {"replaces": "A.T"}}),
    "the dictionary, shared": on({"D": {"replaces": "A", "share": "layers"}}),
    "the Gram matrix": on({"G": {"replaces": "A.T @ A"}}),
    "the Gram matrix, symmetric": on({"G": {"replaces": "A.T @ A", "symmetric": True}}),
    "both matrices of LISTA": on({"W": {"replaces": "step * A.T"}, "S": {"replaces": "I(n) - step * A.T @ A"}}),
    "only the second": on({"S": {"replaces": "I(n) - step * A.T @ A"}}),
    "the scaled Gram matrix": on({"S": {"replaces": "step * A.T @ A"}}),
    "a preconditioner": on({"H": {"replaces": "step * I(n)", "symmetric": True}}),
    "the weight": on({"weight": {"replaces": "lam", "positive": True}}),
    "the threshold": on({"theta": {"replaces": "step * lam", "positive": True}}),
    "a threshold per entry": on({"theta": {"replaces": "step * lam", "positive": True, "shape": ["n"]}}),
    "a threshold, shared": on({"theta": {"replaces": "step * lam", "share": "layers"}}),
    "the step": on({"gamma": {"replaces": "step", "positive": True}}),
    "the step of the gradient": on({"gamma": {"replaces": "step", "where": "gradient"}}),
    "the step of the prox": on({"gamma": {"replaces": "step", "where": "prox", "positive": True}}),
    "everything": on({"D": {"replaces": "A", "share": "layers"}, "gamma": {"replaces": "step", "positive": True}, "weight": {"replaces": "lam", "positive": True}}),
    "unit columns": on({"D": {"replaces": "A", "columns": "unit"}}, objective={**BASE, "parameters": {"A": {"shape": ["m", "n"], "columns": "unit"}}}),
    "gradient descent": on({"W": {"replaces": "step * A.T"}}, "gradient_descent", {**BASE, "minimize": "1/2 * sumsq(x - A @ z) + lam/2 * sumsq(z)"}),
    "ridge weight": on({"mu": {"replaces": "step * lam"}}, "gradient_descent", {**BASE, "minimize": "1/2 * sumsq(x - A @ z) + lam/2 * sumsq(z)"}),
    "inside a slope": on({"D": {"replaces": "A"}}, "proximal_gradient", {**BASE, "minimize": {"f": "sum(logistic(x * (A @ z)))", "g": "lam * norm1(z)"}}),
    "a scale inside a slope": on({"c": {"replaces": "delta", "positive": True}}, "proximal_gradient", {**BASE, "scalars": {"lam": 0.1, "delta": 0.4}, "minimize": {"f": "sum(huber(x - A @ z, delta))", "g": "lam * norm1(z)"}}),
    "the weight of groups": on({"theta": {"replaces": "step * lam", "positive": True}}, objective={**BASE, "dims": {"m": 6, "n": 8, "T": 2}, "variables": {"z": ["n", "T"]}, "inputs": {"x": ["m", "T"]}, "minimize": {"f": "1/2 * sumsq(x - A @ z)", "g": "lam * group_norm(z, axis=1)"}}),
    "one weight of two": on({"theta": {"replaces": "step * lam", "positive": True}}, objective={**BASE, "dims": {"m": 6, "n": 8, "T": 2}, "scalars": {"lam": 0.1, "mu": 0.2}, "variables": {"z": ["n", "T"]}, "inputs": {"x": ["m", "T"]}, "minimize": {"f": "1/2 * sumsq(x - A @ z)", "g": "mu * group_norm(z, axis=1)", "h": "lam * norm1(z)"}}),
    "a nonconvex weight": on({"weight": {"replaces": "lam", "positive": True}}, objective={**BASE, "minimize": {"f": "1/2 * sumsq(x - A @ z)", "g": "lam * norm0(z)"}}),
    "singular values": on({"theta": {"replaces": "step * lam", "positive": True}}, objective={**BASE, "dims": {"m": 6, "n": 8, "T": 3}, "variables": {"z": ["n", "T"]}, "inputs": {"x": ["m", "T"]}, "minimize": {"f": "1/2 * sumsq(x - A @ z)", "g": "lam * nuclear(z)"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", INVENTED)
def test_parameters_of_all_kinds_start_as_the_algorithm_and_count(name: str) -> None:
    net = same_iterates(INVENTED[name])
    wanted = set(INVENTED[name]["unroll"]["learn"])
    assert {p.name for p in net.learned} == wanted
    given = inputs(net)
    moving(net, given)
    if name != "a nonconvex weight":  # a hard threshold is flat in its threshold wherever it has a derivative
        flows(net, given)


def moving(net: Any, given: list[Tensor]) -> None:
    """Each parameter, moved a little, moves the answer."""
    before = net(*given).detach()
    for parameter in net.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += (
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=parameter.dtype)
                + 0.4
            )
        assert (net(*given) - before).abs().max() > 1e-7
        with torch.no_grad():
            parameter.copy_(kept)
    assert torch.equal(net(*given), before)


def flows(net: Any, given: list[Tensor]) -> None:
    """Every parameter has a finite gradient that is not 0, in each of its layers but perhaps the first (it starts at 0)."""
    start = {net.variables[0]: torch.full_like(net(*given).detach(), 0.3)}
    net.zero_grad()
    net(*given, **start).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# --- storage ----------------------------------------------------------------------------------------------------------


def layers_of(net: Any, name: str) -> list[Tensor]:
    parameter = dict(net.named_parameters())[name]
    return list(parameter.unbind(0)) if parameter.shape[0] == net.layers else [parameter]


def test_untied_parameters_are_their_own_and_tied_ones_are_one() -> None:
    untied = unroll.compile(INVENTED["the dictionary"], dtype=torch.float64)
    tied = unroll.compile(INVENTED["the dictionary, shared"], dtype=torch.float64)
    (free,), (shared,) = (list(n.parameters()) for n in (untied, tied))
    assert free.shape == (LAYERS, 6, 8) and shared.shape == (6, 8)
    parts = layers_of(untied, "D")
    assert len({p.data_ptr() for p in parts}) == LAYERS
    x = inputs(untied)
    with torch.no_grad():
        before = [z.clone() for z in untied.trace(*x).iterates["z"]]
        free[3] += 0.1
        after = untied.trace(*x).iterates["z"]
    changed = [bool((a - b).abs().max() > 0) for a, b in zip(before, after, strict=True)]
    assert changed == [False] * 4 + [True] * 2


def test_parameters_share_no_storage_with_each_other_or_the_problem() -> None:
    net = unroll.compile(INVENTED["everything"], dtype=torch.float64)
    places = [p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.given.values())]
    assert len(set(places)) == len(places)


def test_a_replaced_dictionary_is_gone_from_the_step() -> None:
    """What is learned takes every occurrence: the problem's own matrix no longer matters."""
    net = unroll.compile(INVENTED["the dictionary"], dtype=torch.float64)
    assert not [n for n, b in net.named_buffers() if b.shape in ((6, 8), (8, 6), (8, 8)) and not n.startswith("_given")]


def test_a_replaced_product_is_replaced_where_it_stands_transposed() -> None:
    """Of G'A'(x - A G z): both A G and its transpose."""
    two = {
        **BASE,
        "parameters": {"A": ["m", "n"], "G": ["n", "n"]},
        "minimize": {"f": "1/2 * sumsq(x - A @ G @ z)", "g": "lam * norm1(z)"},
    }
    spec = on({"P": {"replaces": "A @ G"}}, objective=two)
    same_iterates(spec)
    (assign,) = unroll.derive(spec).step.assigns
    assert {s.name for s in assign.value.symbols} == {"P", "x", "z"}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["the threshold", "the step", "the Gram matrix, symmetric", "unit columns"])
def test_constraints_hold_for_all_values_of_the_parameter(name: str) -> None:
    net = unroll.compile(INVENTED[name], dtype=torch.float64)
    x = inputs(net)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
        assert net(*x).isfinite().all()


@pytest.mark.parametrize("init", ["gaussian", "uniform"])
def test_draws_have_the_deviation_that_is_asked_for(init: str) -> None:
    """scale / sqrt(rows), the mean 0, a draw of its own in each layer; the sum of n squares lies within 6 deviations of its mean."""
    wide = {**BASE, "dims": {"m": 80, "n": 100}}
    spec = on({"W": {"replaces": "step * A.T", "init": init, "scale": 0.3}}, objective=wide)
    (w,) = unroll.compile(spec, dtype=torch.float64, seed=2).parameters()
    assert w.shape == (LAYERS, 100, 80)
    unit = w.detach() / (0.3 / 100**0.5)
    assert abs(float(unit.mean())) < 6 / unit.numel() ** 0.5
    assert abs(float(unit.square().mean()) - 1) < 6 * (2 / unit.numel()) ** 0.5
    assert float(unit.abs().max()) <= 3**0.5 if init == "uniform" else float(unit.abs().max()) > 3
    assert not torch.equal(w[0], w[1])


@pytest.mark.parametrize("init", ["gaussian", "uniform"])
def test_a_draw_over_the_inputs_that_are_said(init: str) -> None:
    """Where a map is one of several that are added, its own rows are not what each output adds."""
    wide = {**BASE, "dims": {"m": 80, "n": 100}}
    spec = on({"W": {"replaces": "step * A.T", "init": init, "fan_in": "3*m + n", "scale": 2}}, objective=wide)
    (w,) = unroll.compile(spec, dtype=torch.float64, seed=2).parameters()
    assert abs(float(w.detach().square().mean()) * 340 / 4 - 1) < 6 * (2 / w.numel()) ** 0.5


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        ({"init": "uniform", "fan_in": "lam"}, "a formula of sizes"),
        ({"init": "uniform", "fan_in": "-3"}, "a formula of sizes"),
        ({"init": "uniform", "fan_in": "m - n"}, "a formula of sizes"),
        ({"fan_in": "n"}, "is not drawn"),
        ({"init": "zeros", "fan_in": "n"}, "is not drawn"),
    ],
)
def test_inputs_that_no_draw_can_count(learn: Spec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        unroll.compile(on({"W": {"replaces": "step * A.T", **learn}}))


# --- not found --------------------------------------------------------------------------------------------------------

MISSING: dict[str, tuple[Spec, str]] = {
    "a matrix that is not there": (on({"W": {"replaces": "A @ A.T"}}), "E305"),
    "another coefficient": (on({"W": {"replaces": "I(n) - 2 * step * A.T @ A"}}), "E305"),
    "another sign": (on({"W": {"replaces": "I(n) + step * A.T @ A"}}), "E305"),
    "a scalar that is not there": (on({"w": {"replaces": "step * lam**2"}}), "E305"),
    "momentum where there is none": (on({"w": {"replaces": "momentum"}}), "E305"),
    "a threshold in the gradient": (on({"w": {"replaces": "step * lam", "where": "gradient"}}), "E305"),
    "a matrix in the prox": (on({"w": {"replaces": "A", "where": "prox"}}), "E305"),
    "taken by another": (on({"D": {"replaces": "A"}, "B": {"replaces": "A.T"}}), "E305"),
    "an input": (on({"w": {"replaces": "x @ x.T"}}), "E305"),
    "a name that is taken": (on({"A": {"replaces": "A"}}), "E213"),
    "momentum, not built yet": (on({"beta": {"replaces": "momentum"}}, "fista"), "E307"),
    "momentum of a block": (
        {"use": "lasso", "dims": {"m": 6, "n": 9}, "unroll": {"layers": 2, "blocks": [
            {"block": "b", "terms": ["fidelity", "sparsity"], "algorithm": "fista", "learn": {"beta": {"replaces": "momentum"}}}
        ]}}, "E307"),
    "a place that is none": (on({"w": {"replaces": "step", "where": "proxx"}}), "E"),
    "two constraints": (on({"w": {"replaces": "A.T @ A", "symmetric": True, "columns": "unit"}}), "E306"),
    "symmetric, not square": (on({"w": {"replaces": "A", "symmetric": True}}), "E306"),
    "columns of a number": (on({"w": {"replaces": "step", "columns": "unit"}}), "E306"),
    "an unknown name": (on({"w": {"replaces": "stepp"}}), "E101"),
    "a wrong shape": (on({"w": {"replaces": "A @ A"}}), "E131"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_a_parameter_that_would_do_nothing_is_refused(name: str) -> None:
    spec, code = MISSING[name]
    with pytest.raises(SpecError) as refused:
        unroll.derive(spec)
    assert refused.value.code.startswith(code) and refused.value.where is not None
    if code == "E305":
        assert "the step" in str(refused.value)


def weighted(sparsity: str, learn: Spec, fidelity: str = "1/2 * sumsq(x - A @ z)") -> Spec:
    unrolled = {"algorithm": "proximal_gradient", "layers": 3, "step": 0.05, "learn": learn}
    return {
        **BASE,
        "parameters": {"A": ["m", "n"], "w": {"shape": ["n"], "positive": True}},
        "minimize": {"fidelity": fidelity, "sparsity": sparsity},
        "unroll": unrolled,
    }


WEIGHT: Spec = {"omega": {"replaces": "w", "positive": True}}
IN_A_MAP = "pos(2 * (I(n) - B) @ z + u)"


def declared(output: str, learn: Spec) -> Spec:
    block = {"block": "b", "over": "z", "output": output, "learn": learn}
    return {
        "dims": {"n": 4}, "variables": {"z": ["n"], "q": [1]}, "inputs": {"u": ["n"]}, "parameters": {"B": ["n", "n"]},
        "minimize": {"idle": "1/2 * sumsq(q)"},
        "unroll": {"layers": 3, "blocks": [block, {"block": "i", "over": "q", "algorithm": "gradient_descent"}]},
    }  # fmt: skip


INSIDE = {
    "weights in a prox": weighted("lam * norm1(w * z)", WEIGHT),
    "weights in a prox, in that place": weighted("lam * norm1(w * z)", {"omega": {**WEIGHT["omega"], "where": "prox"}}),
    "weights in a prox and in the gradient": weighted("lam * norm1(w * z)", WEIGHT, "1/2 * sumsq(x - A @ (w * z))"),
    "weights of squares in a prox": weighted("lam * sum(w * z**2) + lam * norm1(z)", WEIGHT),
    "a sum in a map": declared(IN_A_MAP, {"W": {"replaces": "2 * (I(n) - B)"}}),
    "a sum in a map, expanded": declared("tanh(z - B @ z + u)", {"W": {"replaces": "I(n) - B"}}),
    "a sum in a map in a map": declared("pos(u - B @ tanh(z - B @ z))", {"W": {"replaces": "I(n) - B"}}),
    "a sum in a map and beside it": declared("z - B @ z + tanh(z - B @ z) + u", {"W": {"replaces": "I(n) - B"}}),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_replaced_inside_a_prox_or_a_map_starts_as_it_was_and_counts(name: str) -> None:
    learned, algorithm = pair(INSIDE[name])
    given = inputs(learned)
    for ours, theirs in zip(*(net.trace(*given).iterates["z"] for net in (learned, algorithm)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    z_of(learned, given).sum().backward()
    found = [p for n, p in learned.named_parameters() if n.split(".")[0] in ("omega", "W")]
    assert found and any(bool((p.grad != 0).any()) for p in found if p.grad is not None)
    with torch.no_grad():
        for p in found:
            p.add_(0.1)
    assert not torch.allclose(z_of(learned, given), z_of(algorithm, given))


def z_of(net: Any, given: Any) -> torch.Tensor:
    found = net(*given)
    return found[0] if isinstance(found, tuple) else found


def test_every_occurrence_inside_a_map_is_replaced() -> None:
    step = unroll.derive(INSIDE["a sum in a map and beside it"]).step
    assert "B" not in {s.name for a in step.assigns if a.block == "b" for s in a.value.symbols}


def test_a_weight_that_may_change_its_sign_in_a_prox_is_refused_with_both_ways_out() -> None:
    with pytest.raises(SpecError, match="positive: true.*where: gradient") as refused:
        unroll.derive(weighted("lam * norm1(w * z)", {"omega": {"replaces": "w"}}))
    assert refused.value.code == "E306"


TWO_BLOCKS = """
dims: {{m: 5, n: 7}}
variables: {{z: [n]}}
inputs: {{x: [m]}}
parameters: {{A: [m, n], B: [m, n]}}
scalars: {{lam: 0.1, {scalar}: 0.5}}
minimize: {{fit: 1/2 * sumsq(x - A @ z), other: "{scalar} / 2 * sumsq(x - B @ z)", sparsity: lam * norm1(z)}}
unroll:
  layers: 2
  blocks:
    - {{block: a, terms: [fit], algorithm: gradient_descent, normalise: layer_norm, learn: {{{first}}}}}
    - {{block: b, terms: [other, sparsity], algorithm: fista, learn: {{{second}}}}}
"""


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("W: {replaces: A}", "W: {replaces: B}", "'W' is already"),
        ("W: {replaces: A}", "step_a: {replaces: step}", "'step_a' is already"),
        ("a_norm_weight: {replaces: A}", "", "'a_norm_weight' is already"),
        ("W: {replaces: A.T, where: output, bias: true}", "W_bias: {replaces: B}", "'W_bias' is already"),
        ("one: {replaces: 1}", "", "takes the place of a number"),
    ],
)
def test_a_parameter_has_a_name_of_its_own_in_all_blocks(first: str, second: str, message: str) -> None:
    with pytest.raises(unroll.UnrollError, match=message) as refusal:
        unroll.compile(TWO_BLOCKS.format(scalar="mu", first=first, second=second))
    assert refusal.value.code == "E306"


@pytest.mark.parametrize("name", ["step_a", "L_b", "t_b", "momentum_b"])
def test_a_scalar_is_not_named_as_what_an_algorithm_works_out(name: str) -> None:
    with pytest.raises(unroll.UnrollError, match=f"'{name}' is a number that the algorithm works out") as refusal:
        unroll.compile(TWO_BLOCKS.format(scalar=name, first="", second=""))
    assert refusal.value.code == "E213"


@pytest.mark.parametrize(("weight", "names"), [("1 + sumsq(y)", "y"), ("stop_gradient(1 + sumsq(z))", "z")])
def test_a_step_whose_constant_depends_on_a_sample_has_no_start_as_a_parameter(weight: str, names: str) -> None:
    spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "inputs": {"y": ["n"]},
        "minimize": {"f": f"sumsq(z - y)/({weight})"},
    }
    unrolled = {"algorithm": "gradient_descent", "step": "1/L", "layers": 2, "learn": {"a": {"replaces": "step"}}}
    with pytest.raises(SpecError, match=f"depends on {names}: it has no value to start at"):
        unroll.derive({**spec, "unroll": unrolled})


def test_a_number_that_layers_set_has_no_start_as_a_parameter() -> None:
    spec = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"y": ["n"]}, "minimize": {"f": "sumsq(z - y)"}}
    unrolled = {"algorithm": "gradient_descent", "numbers": {"step": "0.1/(1 + layer)"}, "layers": 2}
    with pytest.raises(SpecError, match="depends on step: it has no value to start at"):
        unroll.derive({**spec, "unroll": {**unrolled, "learn": {"a": {"replaces": "step"}}}})
    learned: dict[str, Any] = {"a": {"replaces": "step", "start": 0.25, "share": "none"}}
    net: Any = unroll.compile({**spec, "unroll": {**unrolled, "learn": learned}}, dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(net(x), 0.75 * x)
