"""Networks: what users hold. Shapes, depth, saving, exporting, precision, memory."""

from __future__ import annotations

import copy
import pickle
import traceback
from typing import Any

import pytest
import torch
from lista_program import lista
from torch import Tensor, nn

import unroll
from unroll.errors import UnrollError
from unroll.network.network import draw, load, network

SPECS = ("ista", "fista", "lista", "lista_cp", "step_lista", "nonnegative_digits", "mcp_network", "simplex_unmixing")
TIED = """
use: lasso
dims: {m: 6, n: 9}
unroll: {algorithm: proximal_gradient, layers: 4, learn: {W1: {replaces: step * A.T, share: layers}}}
"""
SMALL = {"m": 6, "n": 9}


def small(spec: str = "lista", **options: Any) -> unroll.Network:
    return unroll.compile(spec, dims=SMALL, seed=1, dtype=torch.float64, overrides=["unroll.layers=4"], **options)


def signal(*batch: int) -> Tensor:
    return torch.rand(*batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def ista(a: Tensor, x: Tensor, layers: int, lam: float = 0.1) -> Tensor:
    """Beck & Teboulle 2009, (1.4), written here by hand."""
    step, z = 1 / torch.linalg.svdvals(a)[0] ** 2, x.new_zeros(*x.shape[:-1], a.shape[1])
    for _ in range(layers):
        v = z - step * (z @ a.T - x) @ a
        z = v.sign() * (v.abs() - step * lam).clamp_min(0)
    return z


@pytest.mark.parametrize(
    "spec", ["ista", "lista", "lista_cp", "step_lista", TIED], ids=["ista", "lista", "lista_cp", "step", "tied"]
)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_at_initialisation_every_parametrisation_is_ista(spec: str, batch: tuple[int, ...]) -> None:
    net = small(spec)
    x = signal(*batch)
    with torch.no_grad():
        iterates = net.trace(x).iterates["z"]
    assert len(iterates) == 5
    for k, z in enumerate(iterates):
        want = ista(net.given["A"], x, k)
        assert z.shape == want.shape
        assert not z.numel() or float((z - want).abs().max()) < 1e-12


def test_a_start_value_is_where_the_iteration_starts() -> None:
    net, x = small("ista"), signal(3)
    z = net(x)
    assert torch.equal(net(x, z=net(x, layers=3)), net(x, layers=7))
    assert torch.equal(net.trace(x, z=z).iterates["z"][0], z)


def test_depth_may_differ_where_no_layer_has_parameters_of_its_own() -> None:
    net, x = small(TIED), signal(3)
    assert torch.allclose(net(x, layers=11), ista(net.given["A"], x, 11), atol=1e-12)
    with pytest.raises(UnrollError, match="E406"):
        small("lista")(x, layers=11)


def test_untied_parameters_are_distinct_and_tied_ones_are_one() -> None:
    net = small("lista")
    with torch.no_grad():
        dict(net.named_parameters())["W2"][0].zero_()
    later = dict(net.named_parameters())["W2"][1:]
    assert bool((later != 0).any())
    assert [p.shape[0] for p in net.parameters()] == [9, 4, 4]
    assert [(p.name, p.kind, p.per_layer) for p in net.learned] == [
        ("W1", "matrix", False),
        ("W2", "matrix", True),
        ("theta", "scalar", True),
    ]


def test_the_objective_is_that_of_the_spec() -> None:
    net, x = small("ista"), signal(2, 3)
    z = torch.randn(2, 3, 9, dtype=torch.float64)
    terms = net.objective(x, z=z)
    assert torch.allclose(terms["fidelity"], 0.5 * (x - z @ net.given["A"].T).square().sum(-1))
    assert torch.allclose(terms["sparsity"], 0.1 * z.abs().sum(-1))
    assert torch.equal(terms["total"], terms["fidelity"] + terms["sparsity"])
    assert terms["total"].shape == (2, 3)


def test_a_trace_tells_every_term_at_every_iterate_and_ista_descends() -> None:
    net, x = small("ista"), signal(5)
    trace = net.trace(x)
    assert trace.terms["total"].shape == (5, 5)
    assert bool((trace.terms["total"].diff(dim=0) <= 1e-12).all())
    assert torch.equal(trace.terms["total"][2], net.objective(x, z=trace.iterates["z"][2])["total"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda net: net(torch.zeros(3, 5, dtype=torch.float64)), r"x has shape \(3, 5\), expected \(..., m = 6\)"),
        (lambda net: net(torch.zeros((), dtype=torch.float64)), r"x has shape \(\)"),
        (lambda net: net(signal(3), z=signal(3)), r"z has shape \(3, 6\), expected \(..., n = 9\)"),
        (lambda net: net(), "the input 'x' is missing"),
        (lambda net: net(signal(3), y=signal(3)), "'y' is neither an input nor a variable"),
        (lambda net: net(signal(3), signal(3)), "2 inputs were given"),
        (lambda net: net.objective(signal(3)), "needs a value for 'z'"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(UnrollError, match=message):
        call(small("ista"))


def test_wrong_values_are_named() -> None:
    program = lista()
    a = torch.randn(6, 9)
    for given, scalars, code, word in (
        ({}, {}, "E402", "'A'"),
        ({"A": a, "B": a}, {}, "E402", "'B'"),
        ({"A": a.T}, {}, "E404", "m = 6, n = 9"),
        ({"A": a}, {"mu": 1.0}, "E402", "'mu'"),
        ({"A": a}, {"lam": -1.0}, "E403", "'lam'"),
    ):
        with pytest.raises(UnrollError, match=word) as caught:
            network(program, given, scalars)
        assert caught.value.code == code


def test_random_parameters_have_the_declared_properties() -> None:
    program = lista()
    a = draw(program.problem, program.dims, 0)["A"]
    assert a.shape == (6, 9)
    assert torch.equal(a, draw(program.problem, program.dims, 0)["A"])
    assert not torch.equal(a, draw(program.problem, program.dims, 1)["A"])


# --- save, copy, pickle -----------------------------------------------------------------------------------------------


def disturbed() -> unroll.Network:
    net = small("lista", scalars={"lam": 0.2})
    with torch.no_grad():
        for p in net.parameters():
            p += 0.01 * torch.randn_like(p)
    return net


def test_saved_and_restored_it_is_the_same_network(tmp_path: Any) -> None:
    net, x = disturbed(), signal(3)
    net.save(tmp_path / "out")
    net.save(tmp_path / "out")
    again = unroll.restore(tmp_path / "out")
    assert torch.equal(again(x), net(x))
    assert again.scalars == {"lam": 0.2} and torch.equal(again.given["A"], net.given["A"])
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["network.py", "spec.yaml", "weights.safetensors"]
    with pytest.raises(UnrollError, match="not a saved network"):
        unroll.restore(tmp_path)


def test_copies_and_pickles_are_the_same_network_with_storage_of_their_own() -> None:
    net, x = disturbed(), signal(3)
    want = net(x).detach()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), want)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert torch.equal(net(x), want)


def test_saved_weights_fit_the_source_alone(tmp_path: Any) -> None:
    net, x = disturbed(), signal(3)
    space: dict[str, Any] = {}
    exec(net.source, space)
    alone = next(v for v in space.values() if isinstance(v, type) and issubclass(v, nn.Module))(6, 9, 4).double()
    alone.load_state_dict(net.state_dict())
    assert torch.equal(alone(x), net(x))


def test_a_traceback_shows_the_emitted_line() -> None:
    net = small("ista")
    for name, value in list(net.named_buffers(recurse=False)):
        setattr(net, name, value[..., :2] if value.ndim else value)
    try:
        net(torch.zeros(3, 6, dtype=torch.float64))
    except RuntimeError:
        assert "@ self." in traceback.format_exc()
    else:
        raise AssertionError("matrices that do not fit were accepted")


# --- tools of torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_exports_with_a_dynamic_batch(spec: str) -> None:
    net = unroll.compile(spec, overrides=["unroll.layers=2"])
    (size,) = net.program.tensor_sizes(net.program.problem.inputs[0])
    assert size is not None
    x = torch.rand(4, size)
    exported = torch.export.export(net, (x,), dynamic_shapes={"args": ({0: torch.export.Dim("batch", min=1)},)})
    for batch in (1, 9):
        x = torch.rand(batch, size)
        assert float((exported.module()(x) - net(x)).abs().max().detach()) < 1e-6


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, within dynamo
def test_it_compiles_to_one_graph() -> None:
    net, x = small("lista"), signal(3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert float((compiled(x) - net(x)).detach().abs().max()) < 1e-12
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised inside torch's forward mode
@pytest.mark.parametrize("spec", ["lista", "simplex_unmixing", "mcp_network"])
def test_jacobians_and_maps_over_samples_go_through(spec: str) -> None:
    net = unroll.compile(spec, seed=1, dtype=torch.float64, overrides=["unroll.layers=2"])
    (size,) = net.program.tensor_sizes(net.program.problem.inputs[0])
    x = torch.rand(3, size or 1, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(net, x[0])
    torch.testing.assert_close(torch.func.jacrev(net)(x[0]), want)
    torch.testing.assert_close(torch.func.jacfwd(net)(x[0]), want)
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x))


@pytest.mark.parametrize("term", ["1e308 * 1e308 * sumsq(z)", "1e-300 * 1e-300 * sumsq(z)"])
def test_a_number_that_no_float64_holds_is_refused(term: str) -> None:
    spec = {
        "dims": {"n": 2}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]},
        "minimize": {"f": "sumsq(z - x)", "g": term}, "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1},
    }  # fmt: skip
    with pytest.raises(UnrollError, match="beyond what a float64 holds"):
        unroll.compile(spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_the_answer_by_rounding_only(spec: str, dtype: torch.dtype) -> None:
    net = unroll.compile(spec, overrides=["unroll.layers=2"])
    (size,) = net.program.tensor_sizes(net.program.problem.inputs[0])
    assert size is not None
    x = torch.rand(4, size)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        low = net(x).float()
    with torch.no_grad():
        assert float((low - net(x)).norm()) < 0.05 * float(net(x).norm())


def test_linear_algebra_stays_in_float32_under_autocast() -> None:
    spec = """
dims: {n: 8}
variables: {z: [n]}
inputs: {x: [n]}
parameters: {B: [n, n]}
minimize: {f: 1/2 * sumsq(z - inv(I(n) + B @ B.T) @ x)}
unroll: {algorithm: gradient_descent, layers: 3}
"""
    net = unroll.compile(spec)
    x = torch.rand(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((net(x).float() - net(x)).detach().abs().max()) < 0.05
    assert "cholesky_solve(" in net.source or "inverse(" in net.source


def test_each_layer_keeps_one_activation_for_backward() -> None:
    net = unroll.compile("lista", dims={"m": 32, "n": 64}, overrides=["unroll.layers=10"])
    x = torch.randn(128, 32)
    owned = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    assert sum(kept.values()) <= 1.2 * 10 * out.nbytes


def test_emitted_text_is_loaded_once() -> None:
    assert load(lista().source, "x") is load(lista().source, "x")


def test_the_objective_of_a_huge_batch_axis_count_is_per_sample() -> None:
    net, x = small("ista"), signal(1, 2, 1, 3)
    assert net.objective(x, z=net(x))["total"].shape == (1, 2, 1, 3)
