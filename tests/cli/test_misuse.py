"""What is wrong ends in a message, never in a crash, and nothing that a spec says is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import unroll
from unroll import SpecError, UnrollError, load
from unroll.laws import laws

LASSO: dict[str, Any] = {
    "dims": {"m": 4, "n": 6},
    "variables": {"z": ["n"]},
    "inputs": {"x": ["m"]},
    "parameters": {"A": ["m", "n"]},
    "scalars": {"lam": 0.1},
    "minimize": {"fit": "1/2 * sumsq(x - A @ z)", "sparsity": "lam * norm1(z)"},
    "unroll": {"algorithm": "proximal_gradient", "layers": 3},
}


def lasso(unrolled: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {**LASSO, **sections, "unroll": {**LASSO["unroll"], **(unrolled or {})}}


def square(**declared: Any) -> dict[str, Any]:
    shapes = {"variables": {"z": ["m"]}, "parameters": {"A": {"shape": ["m", "m"], **declared}}}
    return lasso(dims={"m": 5}, **shapes)


@pytest.mark.parametrize(
    "spec, words",
    [
        (lasso({"layers": "equilibrium"}), "'equilibrium' is accepted by the language, but not built yet"),
        (lasso({"algorithm": "fista", "restart": "gradient"}), "'restart' is accepted"),
        (lasso({"algorithm": "fista", "momentum": "chambolle_dossal(4"}), "the bracket is not closed"),
        (lasso({"algorithm": "fista", "momentum": "beck_teboulle(7)"}), "this momentum has no parameter"),
        (
            lasso({"learn": {"D": {"replaces": "A", "columns": "unit"}}}),
            "'D' cannot start at the value that it replaces",
        ),
        (lasso(minimize="(" * 10_001), "minimize has more than 10,000 characters"),
        (lasso(minimize="1/2 * sumsq(x - A.T @ z)"), "hint: A @ z fits"),
        (lasso(scalars={"lam": {"default": 0.1}}), r"declare its sign: lam: \{default: .., positive: true\}"),
        (lasso(dims={"m": 4, "n": "dynamic"}), "the size 'n' is open, and no input has an axis of that size"),
        (lasso(dims={"m": 10_000_000, "n": 10_000_000}), "A would have 100,000,000,000,000 entries"),
        (None, "NoneType is not a spec"),
        (3, "int is not a spec"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_in_words(spec: Any, words: str):
    with pytest.raises(UnrollError, match=words):
        unroll.compile(spec)


@pytest.mark.parametrize(
    "spec, given, words",
    [
        (LASSO, {"A": [[1.0, 2.0], [3.0]]}, "A cannot be read as a tensor"),
        (LASSO, {"A": torch.full((4, 6), torch.nan)}, "A has entries that are not finite"),
        (LASSO, {"A": torch.ones(4, 6, dtype=torch.complex64)}, "A is complex"),
        (
            square(orthonormal=True),
            {"A": torch.ones(5, 5)},
            "'A' is declared orthonormal, and the value given is not: off by 5",
        ),
        (square(columns="unit"), {"A": torch.ones(5, 5)}, "'A' is declared unit columns"),
        (square(symmetric=True), {"A": torch.ones(5, 5).tril()}, "'A' is declared symmetric"),
        (square(positive=True), {"A": -torch.ones(5, 5)}, "'A' is declared positive"),
    ],
)
def test_a_value_that_is_not_what_was_declared_is_refused(spec: Any, given: Any, words: str):
    with pytest.raises(UnrollError, match=words):
        unroll.compile(spec, parameters=given)


@pytest.mark.parametrize(
    "a", [np.eye(5), torch.eye(5), torch.eye(5, dtype=torch.int64), torch.eye(5).tolist(), torch.eye(5).half()]
)
def test_a_value_that_is_what_was_declared_is_taken(a: Any):
    net = unroll.compile(square(orthonormal=True, symmetric=True, positive=True, columns="unit"), parameters={"A": a})
    assert torch.equal(net.given["A"], torch.eye(5))


@pytest.mark.parametrize("value", [5.0, 0.01, float("nan"), "much"])
def test_bounds_of_a_scalar_hold_for_values_given_later(value: Any):
    spec = lasso(scalars={"lam": {"default": 0.1, "positive": True, "min": 0.05, "max": 1}})
    assert unroll.compile(spec, scalars={"lam": 0.05}).scalars == {"lam": 0.05}
    with pytest.raises(UnrollError, match="E403.*lam"):
        unroll.compile(spec, scalars={"lam": value})


def test_a_lower_bound_above_zero_is_a_sign():
    net = unroll.compile(lasso(scalars={"lam": {"default": 0.1, "min": 0.05}}))
    assert "proximable, convex" in str(net.derivation)


def test_a_penalty_of_unknown_sign_is_not_smooth():
    """inf * |lam| is no Lipschitz constant: 1/L would be 0, and the network would stand still."""
    with pytest.raises(UnrollError, match="E303: proximal_gradient does not fit.*the sign of 2.lam"):
        unroll.compile(lasso(scalars={"lam": {"default": -0.1}}))


def test_problems_in_variables_that_nothing_reads_or_no_text_has_are_not_solved():
    given, two, three = {"A": torch.ones(4, 6)}, {"z": ["n"], "w": ["m"]}, {"z": ["n"], "w": ["m"], "y": ["m"]}
    with pytest.raises(UnrollError, match="E303.*does not depend on w"):
        unroll.solve(lasso(variables=two), torch.ones(4), parameters=given)
    of_all = "1/2 * sumsq(x - A @ z - w - y) + lam * norm1(z)"
    with pytest.raises(UnrollError, match=r"(?s)E303.*over z and w and y.*hint: a text of your own.*H\(z, w, y\)"):
        unroll.solve(lasso(variables=three, minimize=of_all), torch.ones(4), parameters=given)


@pytest.mark.parametrize("penalty", ["nuclear(Z)", "rank(Z)"])
def test_laws_hold_for_functions_of_singular_values(penalty: str):
    spec = lasso(
        variables={"Z": ["n", "m"]}, inputs={"X": ["m", "m"]}, minimize=f"1/2 * sumsq(X - A @ Z) + lam * {penalty}"
    )
    found = laws.check(spec)
    assert found.ok, str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_is_that_of_the_matrix_and_not_of_its_rounding(dtype: torch.dtype):
    spec = lasso(
        variables={"Z": ["n", "m"]},
        inputs={"X": ["n", "m"]},
        parameters={},
        minimize={"fit": "1/2 * sumsq(X - Z)", "rank": "lam * rank(Z)"},
    )
    net = unroll.compile(spec, scalars={"lam": 1.0}, dtype=dtype)
    left, right = (
        torch.randn(3, n, k, generator=torch.Generator().manual_seed(n), dtype=dtype) for n, k in ((4, 2), (2, 6))
    )
    z = left @ right
    assert net.objective(z, Z=z)["rank"].tolist() == [2.0, 2.0, 2.0] == torch.linalg.matrix_rank(z).tolist()


def test_a_scalar_may_be_called_t():
    """The step of a prox has that name too."""
    declared = lasso(scalars={"t": 0.1}, minimize="1/2 * sumsq(x - A @ z) + t * norm1(z)")
    learned = lasso({"learn": {"t": {"replaces": "lam", "positive": True, "shape": ["n"]}}})
    for spec in (declared, learned):
        found = laws.check(spec)
        assert found.ok, str(found)


@pytest.mark.parametrize("names", [("L", "step", "z"), ("step", "t", "z"), ("m", "n", "t")])
@pytest.mark.parametrize("algorithm", ["proximal_gradient", "fista"])
def test_sizes_and_variables_may_be_called_as_the_algorithm_calls_its_numbers(algorithm: str, names: tuple[str, ...]):
    """The same problem under other names is the same network."""

    def network(m: str, n: str, z: str) -> Any:
        spec = {
            "dims": {m: 5, n: 7},
            "variables": {z: [n]},
            "inputs": {"x": [m]},
            "parameters": {"A": [m, n]},
            "scalars": {"lam": {"default": 0.1, "positive": True}},
            "minimize": {"fit": f"1/(2*{m}) * sumsq(x - A @ {z})", "sparsity": f"lam/{n}/{m} * norm1({z})"},
            "unroll": {"algorithm": algorithm, "layers": 3},
        }
        return unroll.compile(spec, parameters={"A": A}, dtype=torch.float64)

    A, x = torch.randn(5, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    found, plain = network(*names)(x), network("p", "q", "w")(x)
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-13)
    slopes = [torch.func.jacrev(network(*words))(x[0]) for words in (names, ("p", "q", "w"))]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-13)


@pytest.mark.parametrize("formula", ["tanh(u)", "sigmoid(u)"])
def test_a_prox_with_three_stationary_points_is_written(formula: str):
    """Of each of them the energy is compared: a grid knows no better."""
    prox, v = unroll.prox(formula), torch.linspace(-4, 4, 41, dtype=torch.float64)
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    f = getattr(torch, formula[:-3])
    for t in (0.5, 3.0):
        z = prox(v, t)
        best = (t * f(grid) + (grid - v[:, None]) ** 2 / 2).amin(1)
        assert (t * f(z) + (z - v) ** 2 / 2 <= best + 1e-9).all()


def test_a_symbolic_power_is_refused():
    with pytest.raises(UnrollError, match="no limit of .* was found"):
        unroll.prox("abs(u)**lam", lam=1.5)


def test_weights_that_are_damaged_or_of_something_else_are_refused(tmp_path: Any):
    folder = unroll.save(unroll.compile(LASSO), tmp_path / "net")
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnrollError, match="E405.*is damaged"):
        unroll.restore(folder)
    save_file({"network.A": torch.ones(1)}, weights)
    with pytest.raises(UnrollError, match="E405.*was not written by unroll.save"):
        unroll.restore(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 0.5}, "adam has no momentum"), ({"refine": 0.3}, "layerwise"), ({"epochs": 2, "steps": 5}, "number of steps"),
        ({"steps": 5, "warmup": 9}, "all 5 steps"), ({"schedule": "constant", "final_lr": 0.1}, "does not fall"),
    ],
)  # fmt: skip
def test_a_setting_of_training_that_nothing_reads_is_refused(settings, words):
    with pytest.raises(SpecError, match=words) as refused:
        load({"use": "lasso", "unroll": {"algorithm": "fista", "layers": 2}, "train": settings})
    assert refused.value.code == "E511" and refused.value.where is not None


def test_what_is_no_tensor_of_real_numbers_is_refused_in_words():
    net = unroll.compile("lista", dims={"m": 4, "n": 6}, overrides=["unroll.layers=2"])
    for x in ([1.0] * 4, torch.ones(4, dtype=torch.long), torch.ones(4).numpy()):
        with pytest.raises(unroll.UnrollError, match="E404"):
            net(x)
    with pytest.raises(unroll.UnrollError, match="E406"):
        unroll.compile("ista", dims={"m": 4, "n": 6})(torch.ones(4), layers=-1)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_class_without_samples_is_refused_in_words_and_leaves_no_network_built(batch_size: int | None):
    net = unroll.compile("redunet", dims={"d": 4, "K": 2}, dtype=torch.float64, overrides=["unroll.layers=2"])
    x = torch.nn.functional.normalize(torch.randn(9, 4, dtype=torch.float64), dim=-1)
    one, both = torch.ones(9, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64)
    net.construct(X=x, Pi=both)
    with pytest.raises(unroll.UnrollError, match="E408.*\n.*a class without samples"):
        net.construct(X=x, Pi=torch.stack([one, 0 * one]), batch_size=batch_size)
    with pytest.raises(unroll.UnrollError, match="E408.*has seen none"):
        net(x)
    assert torch.equal(net.construct(X=x, Pi=both), net(x))


@pytest.mark.parametrize("batch_size", [2.5, True, "3"])
def test_a_size_of_batches_that_is_no_number_is_refused(batch_size: Any):
    net = unroll.compile("redunet", dims={"d": 4, "K": 2}, overrides=["unroll.layers=2"])
    with pytest.raises(unroll.UnrollError, match="E404.*batch_size is .*: it is a number of samples"):
        net.construct(X=torch.randn(9, 4), Pi=torch.rand(2, 9), batch_size=batch_size)


def test_solve_without_restart_gets_there_too_and_takes_longer():
    g = torch.Generator().manual_seed(0)
    a, x = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((20, 40), (5, 20)))
    quick, slow = (unroll.solve("lasso", x, parameters={"A": a}, tol=1e-9, restart=r) for r in (True, False))
    assert torch.allclose(quick.z, slow.z, atol=1e-6)
    assert quick.iterations < slow.iterations


LONG = "a" * 5000


@pytest.mark.parametrize("name", [LONG, f"{LONG}.yaml", f"{LONG}/x.yaml", "a\0b.yaml", f"{LONG}.npy"])
def test_a_name_that_no_file_can_have_is_refused_in_words(name: str):
    """Names of 5,000 characters and of bytes of 0: the system raises, ours are words."""
    from unroll.train.data import read_array

    for call in (
        lambda: unroll.load(f"use: {json.dumps(name)}\n"), lambda: unroll.restore(name), lambda: read_array(Path(name), "x"),
    ):  # fmt: skip
        with pytest.raises(unroll.UnrollError) as refused:
            call()
        assert len(str(refused.value)) < 10_000
