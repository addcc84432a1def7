"""Corners that a user meets: names, sizes and matrices where two readings look alike. What is emitted is held against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unroll
from unroll.errors import UnrollError
from unroll.laws import laws


def sound(**spec: Any) -> None:
    """Every law holds: gradients against autograd, the emitted module against the formulas, the start against the algorithm."""
    found = laws.check({"name": "corner", **spec})
    assert found.ok, str(found)


def test_a_product_is_not_distributed_over_a_vector_that_stands_for_its_copies() -> None:
    sound(
        dims={"n": 3, "N": 40, "q": 4},
        variables={"Z": ["n", "N"]},
        inputs={"Y": ["n", "q"]},
        parameters={"b": ["n"], "C": ["N", "q"]},
        minimize={"fit": "0.5*sumsq((Z + b @ ones(1, N)) @ C - Y)"},
        unroll={"algorithm": "gradient_descent", "layers": 200},
    )


@pytest.mark.parametrize("scores", ["Z @ Z.T", "Z.T @ Z"])
def test_scores_of_a_square_matrix_are_told_from_those_of_its_transpose(scores: str) -> None:
    sound(
        dims={"n": 5},
        variables={"Z": ["n", "n"]},
        inputs={"Y": ["n", "n"]},
        minimize={"f": f"dot(Z, stop_gradient(Z @ softmax({scores}, axis=0)))", "q": "0.5*sumsq(Z - Y)"},
        unroll={"algorithm": "gradient_descent", "layers": 3, "step": 0.1, "start": {"Z": "Y"}},
    )


def family(term: str) -> dict[str, Any]:
    return {
        "name": "corner",
        "dims": {"m": 4, "n": 5, "p": 3, "K": 2},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["m"]},
        "parameters": {"A": ["m", "n"], "B": {"shape": ["p", "n"], "family": "K"}, "C": {"shape": ["p", "n"], "family": "K"}},
        "scalars": {"lam": {"default": 0.3, "positive": True}},
        "minimize": {"fit": "0.5*sumsq(A @ z - x)", "c": f"0.5*lam*sum(sumsq({term}) for k in K)"},
        "unroll": {
            "algorithm": "gradient_descent",
            "layers": 3,
            "step": 0.05,
            "learn": {"W": {"replaces": "lam*B[k] for k in K"}},
        },
    }  # fmt: skip


def test_a_coefficient_is_taken_into_a_family_once() -> None:
    assert laws.check(family("B[k] @ z")).ok


def test_a_coefficient_that_other_terms_need_is_not_taken_from_them() -> None:
    with pytest.raises(UnrollError) as refusal:
        unroll.compile(family("(B[k] + C[k]) @ z"))
    assert refusal.value.code == "E305"


AHEAD = [
    "0.25*sumsq(Z @ Z.T)",
    "0.5*logdet(I(d) + Z @ Z.T)",
    "sum(logsumexp(Z.T @ Z, axis=0))",
    "0.5*sumsq(layer_norm(Z, axis=1, eps=0.001))",
]


@pytest.mark.parametrize("term", AHEAD)
def test_what_stays_blind_to_order_is_refused_in_a_causal_network(term: str) -> None:
    spec = {
        "dims": {"d": 4, "N": "dynamic"},
        "variables": {"Z": ["d", "N"]},
        "inputs": {"X": ["d", "N"]},
        "minimize": {"a": term, "b": "sum(log(1 + sum(Z**2, axis=1)))", "c": "0.5*sumsq(Z)"},
        "unroll": {
            "algorithm": "gradient_descent",
            "layers": 2,
            "step": 0.1,
            "start": {"Z": "X"},
            "rewrites": ["causal(over=N)"],
        },
    }
    with pytest.raises(UnrollError, match="leaves .* as it is") as refusal:
        unroll.compile(spec)
    assert refusal.value.code == "E309"
    del spec["minimize"]["a"]
    net = unroll.compile(spec, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    later = x.clone()
    later[-1] += 1
    change = (net(later) - net(x)).abs()
    assert float(change[:-1].detach().max()) == 0 < float(change[-1].detach().max())


def lasso(learn: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "corner",
        "dims": {"m": 4, "n": 6},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["m"]},
        "parameters": {"A": ["m", "n"]},
        "scalars": {"lam": {"default": 0.1, "positive": True}},
        "minimize": {"fit": "0.5*sumsq(x - A @ z)", "sparsity": "lam*norm1(z)"},
        "unroll": {"algorithm": "proximal_gradient", "layers": 2, "learn": learn},
    } | more


def test_a_parameter_kept_positive_starts_at_the_number_that_init_says() -> None:
    net = unroll.compile(lasso({"theta": {"replaces": "step*lam", "init": "ones", "scale": 0.7, "positive": True}}))
    torch.testing.assert_close(torch.nn.functional.softplus(net.theta), torch.full_like(net.theta, 0.7))
    with pytest.raises(UnrollError, match="cannot be positive: it starts at 0"):
        unroll.compile(lasso({"theta": {"replaces": "step*lam", "init": "zeros", "positive": True}}))


@pytest.mark.parametrize("kept", [{"symmetric": True}, {"columns": "unit"}])
def test_a_drawn_start_need_not_be_what_it_replaces(kept: dict[str, Any]) -> None:
    net = unroll.compile(lasso({"W": {"replaces": "A.T @ A", "init": "gaussian", **kept}}))
    assert net(torch.randn(3, 4)).isfinite().all()


@pytest.mark.parametrize("name", ["project_simplex", "drop_path", "causal_softmax"])
def test_an_input_may_be_called_as_a_helper_is(name: str) -> None:
    spec = {
        "dims": {"n": 4},
        "variables": {"z": ["n"]},
        "inputs": {name: ["n"]},
        "minimize": f"0.5*sumsq(z - {name})",
        "constraints": ["z in simplex"],
        "unroll": {"algorithm": "projected_gradient", "layers": 2},
    }
    net = unroll.compile(spec, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x).sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["construct", "built"])
def test_a_parameter_may_be_called_as_what_a_network_has(name: str) -> None:
    net = unroll.compile(lasso({name: {"replaces": "step*A.T"}}))
    assert len(list(net.parameters())) == 1


@pytest.mark.parametrize("share", ["none", "layers"])
@pytest.mark.parametrize("replaces", ["b", "b.T"])
def test_rows_and_columns_are_learned(replaces: str, share: str) -> None:
    spec = lasso(
        {"w": {"replaces": replaces, "share": share}},
        parameters={"b": ["n"]},
        inputs={"x": []},
        minimize={"fit": "0.5*(x - b.T @ z)**2", "sparsity": "lam*norm1(z)"},
    )
    sound(**spec)


def test_unit_columns_of_one_column() -> None:
    b = torch.nn.functional.normalize(torch.randn(4), dim=0)
    spec = lasso(
        {"w": {"replaces": "b", "columns": "unit"}},
        parameters={"A": ["m", "n"], "b": ["m"]},
        minimize={"fit": "0.5*sumsq(x - b - A @ z)", "sparsity": "lam*norm1(z)"},
    )
    A, x = torch.randn(4, 6), torch.randn(3, 4)
    net = unroll.compile(spec, parameters={"A": A, "b": b})
    plain = unroll.compile(spec, parameters={"A": A, "b": b}, overrides=["unroll.learn={}"])
    torch.testing.assert_close(net(x), plain(x))


def test_an_open_size_is_no_size_of_a_parameter() -> None:
    spec = {
        "dims": {"d": 4, "N": "dynamic"},
        "variables": {"Z": ["d", "N"]},
        "inputs": {"Y": ["d", "N"]},
        "minimize": "0.5*sumsq(Z - Y)",
        "unroll": {"algorithm": "gradient_descent", "layers": 2, "learn": {"a": {"replaces": "Y", "init": "gaussian"}}},
    }
    with pytest.raises(UnrollError, match="'a' has an open size") as refusal:
        unroll.compile(spec)
    assert refusal.value.code == "E402"


def test_a_threshold_per_entry_is_of_the_variable_of_its_block() -> None:
    def spec(size: str) -> dict[str, Any]:
        learn = {"th": {"replaces": "lam", "shape": [size]}}
        return {
            "dims": {"n": 5, "m": 3},
            "variables": {"z": ["n"], "w": ["m"]},
            "inputs": {"x": ["n"], "y": ["m"]},
            "scalars": {"lam": {"default": 0.1, "positive": True}},
            "minimize": {"p": "0.5*sumsq(z - x)", "q": "0.5*sumsq(w - y)", "s": "lam*norm1(w)"},
            "unroll": {
                "layers": 2,
                "blocks": [
                    {"block": "a", "over": "z", "terms": ["p"], "algorithm": "gradient_descent"},
                    {"block": "b", "over": "w", "terms": ["q", "s"], "algorithm": "proximal_gradient", "learn": learn},
                ],
            },
        }

    assert unroll.compile(spec("m")).th.shape == (2, 3)
    with pytest.raises(UnrollError, match="the shape of th is not that of w"):
        unroll.compile(spec("n"))


def test_check_knows_the_inputs_of_a_spec() -> None:
    with pytest.raises(UnrollError, match="'bogus' is not an input"):
        laws.check("crate", inputs={"bogus": torch.zeros(2, 2)})


def test_a_bounded_rewrite_is_measured_at_every_frequency() -> None:
    spec = {
        "dims": {"c": 2, "T": 4, "N": 5},
        "variables": {"Z": ["c*T", "N"]},
        "inputs": {"X": ["c*T", "N"]},
        "minimize": {"r": "1/2*logdet(I(c*T) + 0.01*shifts(Z, T) @ shifts(Z, T).T)"},
        "unroll": {
            "algorithm": "gradient_descent",
            "layers": 2,
            "step": 0.1,
            "start": {"Z": "X"},
            "rewrites": ["circulant_to_fft", "neumann(order=1)"],
        },
    }
    rows = [r for r in laws.check(spec).rows if r.law.startswith("neumann")]
    assert [r.verdict for r in rows] == ["holds"]


@pytest.mark.parametrize("start", [0, 2])
def test_a_variable_without_axes_and_a_problem_without_inputs(start: float) -> None:
    spec = {
        "variables": {"z": []},
        "scalars": {"c": 3},
        "minimize": "0.5*(z - c)**2",
        "unroll": {"algorithm": "gradient_descent", "layers": 3, "step": 0.5, "start": {"z": start}},
    }
    net = unroll.compile(spec, dtype=torch.float64)
    assert float(net()) == pytest.approx(3 - (3 - start) / 8)
    with pytest.raises(UnrollError, match="neither take nor hold a tensor"):
        unroll.compile(spec | {"scalars": {}, "minimize": "0.5*(z - 3)**2"})


def tokens(objective: str, tokens: Any = "dynamic", step: Any = 0.1, **parameters: Any) -> dict[str, Any]:
    return {
        "dims": {"d": 3, "K": 2, "T": 4, "N": tokens}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]}, "parameters": parameters,
        "minimize": objective, "unroll": {"algorithm": "gradient_descent", "layers": 2, "step": step, "start": {"Z": "X"}},
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize(
    ("objective", "by_hand"),
    [
        ("1/2*sumsq(Z - m @ ones(1, N))", lambda z, m, b, s: (z - m).square().sum() / 2),
        ("1/2*sumsq(Z - running_sum(m @ ones(1, N)))", lambda z, m, b, s: (z - m.expand_as(z).cumsum(0)).square().sum() / 2),
        ("sum(sum(sin(sum(Z, axis=0) + first(b[k], N).T)) for k in K)", lambda z, m, b, s: (z.sum(1) + torch.nn.functional.pad(b, (0, 6))[:, : len(z)]).sin().sum()),
        ("1/2*sum(Z**2 @ repeat(s, N))", lambda z, m, b, s: s * z.square().sum() / 2),
    ],
    ids=["repeated", "running", "cut", "one entry"],
)  # fmt: skip
def test_what_parameters_give_for_as_many_tokens_as_come_is_worked_out_in_the_call(
    objective: str, by_hand: Any, count: int
) -> None:
    given = {"m": ["d"], "b": {"family": "K", "shape": ["T"]}, "s": [1]}
    net = unroll.compile(tokens(objective, **given), dtype=torch.float64)
    x = torch.randn(2, count, 3, dtype=torch.float64)
    want = x
    for _ in range(2):
        z = want.clone().requires_grad_()
        value = sum(by_hand(sample, *(net.given[name] for name in "mbs")) for sample in z)
        want = want - 0.1 * torch.autograd.grad(value, z)[0]
    assert torch.allclose(net(x), want, atol=1e-12)


@pytest.mark.parametrize("count", ["dynamic", 5])
@pytest.mark.parametrize("step", [1, "1/L"])
def test_a_step_that_replaces_every_token_by_one_value_repeats_it(step: Any, count: Any) -> None:
    net = unroll.compile(tokens("1/2*sumsq(Z - sum(X, axis=1)/N @ ones(1, N))", count, step), dtype=torch.float64)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.allclose(net(x), x.mean(1, keepdim=True).expand_as(x))
    with pytest.raises(UnrollError, match="E402.*the same of every Z"):
        unroll.compile(tokens("1/2*sumsq(Z - m @ ones(1, N))", count, step, m=["d"]))


@pytest.mark.parametrize(("n", "times"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_repetition_of_one_entry_and_its_adjoint(n: int, times: int) -> None:
    sound(
        dims={"n": n, "T": times},
        variables={"z": ["n"]},
        inputs={"x": ["n*T"]},
        parameters={"A": ["n*T", "n"]},
        minimize={"f": "1/2*sumsq(x - repeat(z, T)) + 1/2*sumsq(repeat_T(A @ z, T))"},
        unroll={"algorithm": "gradient_descent", "layers": 2, "step": 0.1},
    )


UP_TO = {
    "a mean": ("1/2*sumsq(sum(Z, axis=1)/N)", 0.1, lambda z: z.mean(0).square().sum() / 2),
    "a mean, by a step of N": ("1/2*sumsq(sum(Z, axis=1)/N)", "N/4", lambda z: len(z) * z.mean(0).square().sum() / 0.8),
    "beside a fit": ("1/2*sumsq(Z)/N + 1/2*sumsq(sum(Z, axis=1)/N)", 0.1, lambda z: z.square().sum() / (2 * len(z)) + z.mean(0).square().sum() / 2),
    "statistics": ("sum(log(1 + sum((M @ Z)**2, axis=1)/N))", 0.1, lambda z, m: (z @ m.mT).square().mean(0).log1p().sum()),
    "statistics by a product": ("sum(log(1 + (M @ Z)**2 @ ones(N, 1)/N))", 0.1, lambda z, m: (z @ m.mT).square().mean(0).log1p().sum()),
    "a norm": ("sumsq(Z)/sqrt(1 + sumsq(Z)/N)", 0.1, lambda z: z.square().sum() / (1 + z.square().sum() / len(z)).sqrt()),
}  # fmt: skip


@pytest.mark.parametrize(("objective", "step", "by_hand"), UP_TO.values(), ids=UP_TO)
@pytest.mark.parametrize("count", ["dynamic", 5])
def test_each_token_follows_the_step_of_the_tokens_up_to_it_and_of_their_number(
    objective: str, step: Any, by_hand: Any, count: Any
) -> None:
    spec = tokens(objective, count, step, **({"M": ["d", "d"]} if "M" in objective else {}))
    spec["unroll"]["rewrites"] = ["causal(over=N)"]
    net = unroll.compile(spec, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    want = x
    for _ in range(2):
        rows = list[torch.Tensor]()
        for j in range(5):
            z = want[: j + 1].clone().requires_grad_()
            slope = torch.autograd.grad(by_hand(z, *net.given.values()), z)[0]
            rows.append((z - 0.1 * slope)[j].detach())
        want = torch.stack(rows)
    assert torch.allclose(net(x), want, atol=1e-12)
    if count == "dynamic":
        assert torch.allclose(net(x[:3]), net(x)[:3], atol=1e-14), "what comes later changes nothing"


@pytest.mark.parametrize(
    ("inside", "smooth"),
    [("1 + sum(Z**2, axis=0)", True), ("1 + sum(abs(X), axis=0) + sum(exp(Z), axis=0)", True), ("sum(Z**2, axis=0)", False), ("1 + sum(Z, axis=0)", False)],
)  # fmt: skip
def test_a_root_has_a_gradient_where_what_is_under_it_is_known_to_stay_above_0(inside: str, smooth: bool) -> None:
    spec = tokens(f"sum(sqrt({inside})) + 1/2*sumsq(Z - X)", 4)
    if smooth:
        return sound(**spec)
    with pytest.raises(UnrollError, match="E303.*is not smooth"):
        unroll.derive(spec)


@pytest.mark.parametrize("gauge", [{"update": "1/N"}, {"residual": "1 - 1/N"}])
def test_a_gauge_that_counts_all_tokens_is_refused_in_a_causal_step(gauge: dict[str, str]) -> None:
    spec = {
        "objective": "o", "dims": {"d": 4, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]},
        "minimize": {"f": "1/N*sum(log(1 + sum(Z**2, axis=1)))"},
        "unroll": {
            "algorithm": "gradient_descent", "layers": 2, "step": 0.1, "start": {"Z": "X"}, "rewrites": ["causal(over=N)"],
            "gauge": {"update": "0.1"},
        },
    }  # fmt: skip
    net, x = unroll.compile(spec, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    assert torch.allclose(net(x)[:4], net(x[:4]), atol=1e-12)
    spec["unroll"]["gauge"] = gauge
    with pytest.raises(unroll.SpecError, match=r"E309.*1/N is not what causal"):
        unroll.compile(spec)


@pytest.mark.parametrize("term", ["group_norm(Z, axis=0)", "group_norm(Z, axis=1)", "norm_fro(Z)"])
def test_a_length_of_zero_has_a_gradient(term: str) -> None:
    """0, one of the subgradients, where the root of a sum of squares gives nan; elsewhere that of lengths taken one by one."""
    spec = {
        "objective": "o", "dims": {"n": 3, "N": 4}, "variables": {"Z": ["n", "N"]}, "inputs": {"X": ["n", "N"]},
        "minimize": {"f": term, "g": "1/2*sumsq(Z - X)"}, "unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": 0.1},
    }  # fmt: skip
    net = unroll.compile(spec, dtype=torch.float64)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for z in (torch.zeros_like(x), x):
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        found = torch.autograd.grad(net.objective(Z=ours, X=x)["f"], ours)[0]
        parts = [theirs.flatten()] if "axis" not in term else theirs.unbind(0 if "axis=0" in term else 1)
        want = torch.autograd.grad(sum(p.norm() for p in parts), theirs)[0]  # type: ignore[arg-type]
        assert torch.allclose(found, want, atol=1e-12)
