"""Emitted modules: every layer is the step as defined; the text is safe and stands alone."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from lista_program import ETA, SOFT, THETA, lista
from random_expressions import (
    DIMS,
    LAM,
    A,
    G,
    K,
    M,
    N,
    Q,
    Random,
    T,
    U,
    V,
    W,
    X,
    Y,
    Z,
    mathematical,
    problem,
    stored,
    values,
)
from torch import Tensor

import unroll
from unroll.derivation.step import LAYER, Assign, Learned, State, Step
from unroll.emit import program as programs
from unroll.language.constructors import (
    add,
    elementwise,
    eye,
    family_sum,
    matmul,
    member,
    prox_map,
    scale,
    spectral_norm,
    symbol,
    total,
    transpose,
    zeros,
)
from unroll.language.nodes import Expr, Sym, slot
from unroll.network.evaluate import Evaluator
from unroll.network.network import Network, network

SHAPES = (
    {"m": 3, "n": 4, "T": 2, "K": 3},
    {"m": 1, "n": 4, "T": 3, "K": 1},
    {"m": 5, "n": 1, "T": 1, "K": 2},
)
BATCHES = ((), (3,), (2, 3), (0,))
COUNT = sp.Symbol("t", positive=True)


def random_step(seed: int) -> Step:
    """Two states and a counter; later assignments see earlier ones; something learned per layer, something shared."""
    draw = Random(seed)
    w1, w2 = symbol("W1", N, M, "learned"), symbol("W2", N, N, "learned")
    tame = lambda e: elementwise(sp.tanh(slot(0)), e)
    mixed = add(tame(draw.expr(N, T, 2)), matmul(w2, Z), matmul(w1, X))
    half = symbol("half", N, T, "state", 2)
    beta = (COUNT - 1) / (COUNT + 2)
    first = zeros(N, T) if seed % 2 else tame(matmul(transpose(A), X))
    return Step(
        "random",
        (Assign(ETA, elementwise(1 / (1 + slot(0) ** 2), spectral_norm(A)), "step size"),),
        (State(Z, first), State(Q, zeros(N)), State(COUNT, sp.Integer(1))),
        (
            Assign(half, prox_map(SOFT, (), scale(ETA, mixed)), "prox"),
            Assign(Q, tame(add(draw.expr(N, sp.Integer(1), 2), scale(1 / (2 + 2 * LAYER), Q), total(half, 1))), ""),
            Assign(COUNT, COUNT + 1, "momentum"),
            Assign(Z, add(half, scale(beta, add(half, scale(-1, Z)))), ""),
        ),
        (Z, Q),
        (
            Learned("W1", w1, scale(ETA, transpose(A)), (N, M), bool(seed % 3)),
            Learned("W2", w2, add(eye(N), scale(-ETA, matmul(transpose(A), A))), (N, N), True, "symmetric"),
            Learned("theta", THETA, LAM * ETA, ((), (N,))[seed % 2], bool(seed % 5), "positive"),
        ),
    )  # fmt: skip


def compiled(
    step: Step, dims: dict[str, int], given: dict[Sym, Tensor], layers: int = 3, name: str = "random"
) -> Network:
    p = problem({"fidelity": total(elementwise(slot(0) ** 2, add(X, scale(-1, matmul(A, Z)))))}, dims)
    program = programs.build(p, step, layers=layers, dims=dims, name=name)
    return network(program, {s.name: stored(s, given[s]) for s in (A, G, W, U)}, dtype=torch.float64)


def reference(
    step: Step, dims: dict[str, int], given: dict[Sym, Tensor], learned: dict[str, Any], layers: int
) -> list[dict[str, Tensor]]:
    """Every iterate, by evaluating the step as it is written. learned: values of parameters, stacked if per layer."""
    tensors: dict[Any, Tensor] = dict(given)
    scalars: dict[Any, Any] = {LAM: 0.3, **{d: dims[d.name] for d in DIMS}}

    def value(e: Expr | sp.Expr) -> Any:
        run = Evaluator(tensors, scalars, {})
        return run(e) if isinstance(e, Expr) else run.number(e)

    def bind(target: Sym | sp.Symbol, found: Tensor) -> None:
        (tensors if isinstance(target, Sym) else scalars)[target] = found

    batch = given[X].shape[:-2]
    for a in step.definitions:
        bind(a.target, value(a.value))
    for s in step.states:
        found = value(s.start)
        bind(s.symbol, found.expand(*batch, *found.shape[-2:]) if isinstance(s.symbol, Sym) else found)
    out = [{s.name: tensors[s] for s in step.output}]
    for layer in range(layers):
        scalars[LAYER] = layer
        for p in step.learned:
            w = learned[p.name][layer] if p.per_layer else learned[p.name]
            bind(p.symbol, w if w.ndim < 1 or isinstance(p.symbol, Sym) else w.unsqueeze(-1))
        for a in step.assigns:
            bind(a.target, value(a.value))
        out.append({s.name: tensors[s] for s in step.output})
    return out


def start_values(step: Step, dims: dict[str, int], given: dict[Sym, Tensor], layers: int) -> dict[str, Tensor]:
    """What parameters start at."""
    scalars: dict[Any, Any] = {LAM: 0.3, **{d: dims[d.name] for d in DIMS}}
    run = Evaluator(given, scalars, {})
    for a in step.definitions:
        scalars[a.target] = run(a.value).squeeze() if isinstance(a.value, Expr) else run.number(a.value)
    out: dict[str, Tensor] = {}
    for p in step.learned:
        v = run(p.replaces) if isinstance(p.replaces, Expr) else run.number(p.replaces)
        v = v.expand([run.size(n) for n in p.shape]) if len(p.shape) < 2 else v
        out[p.name] = v.expand(layers, *v.shape) if p.per_layer else v
    return out


@pytest.mark.parametrize("seed", range(24))
def test_every_iterate_is_that_of_the_step(seed: int) -> None:
    step, dims, batch = random_step(seed), SHAPES[seed % 3], BATCHES[seed % 4]
    given = values(dims, batch, seed)
    net = compiled(step, dims, given)
    with torch.no_grad():
        found = net.trace(*(stored(s, given[s]) for s in (X, Y, V))).iterates
    want = reference(step, dims, given, start_values(step, dims, given, 3), 3)
    for name, symbol_ in (("Z", Z), ("q", Q)):
        for k in range(4):
            a, b = mathematical(symbol_, found[name][k]), want[k][name]
            assert a.shape == b.shape
            assert not a.numel() or float((a - b).abs().max()) < 1e-10 * max(1.0, float(b.abs().max())), (k, name)


@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_parameters_are_those_of_the_step(seed: int) -> None:
    step, dims = random_step(seed), SHAPES[0]
    step = replace(step, learned=tuple(replace(p, constraint="none") for p in step.learned))
    given = values(dims, (2,), seed)
    net = compiled(step, dims, given)
    z, q = net(*(stored(s, given[s]) for s in (X, Y, V)))
    mine = dict(net.named_parameters())
    found = torch.autograd.grad((z**2).sum() + q.sin().sum(), list(mine.values()), allow_unused=True)
    learned = {k: v.clone().requires_grad_() for k, v in start_values(step, dims, given, 3).items()}
    last = reference(step, dims, given, learned, 3)[-1]
    want = torch.autograd.grad(
        (last["Z"] ** 2).sum() + last["q"].sin().sum(), [learned[k] for k in mine], allow_unused=True
    )
    for name, a, b in zip(mine, found, want, strict=True):
        assert a is not None and b is not None
        assert float((a - b).abs().max()) < 1e-9 * max(1.0, float(b.abs().max())), name


def test_emitted_lista_reads_as_an_expert_would_write_it() -> None:
    source = lista().source
    forward = source[source.index("def forward(self") :]
    assert forward.split("\n")[1:9] == [
        "        W1x = x @ self.W1.mT",
        "        z = x.new_zeros(*x.shape[:-1], self.n) if z is None else z",
        "        if trace is not None:",
        "            trace.append(z)",
        "        for W2, theta in zip(self.W2, F.softplus(self.theta), strict=True):",
        "            z = prox(W1x + z @ W2.mT, theta)  # prox",
        "            if trace is not None:",
        "                trace.append(z)",
    ]


def test_the_source_runs_alone_with_torch_only(tmp_path: Any) -> None:
    file = tmp_path / "net.py"
    check = """
import sys
net = Lista().initialise(torch.randn(6, 9))
assert net(torch.randn(5, 6)).shape == (5, 9)
assert 'unroll' not in sys.modules
"""
    file.write_text(lista().source + check)
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        {"A": "self", "x": "torch", "z": "forward"},
        {"A": "class", "x": "lambda", "z": "trace"},
        {"A": "nn", "x": "layers", "z": "W2"},
        {"A": "λ", "x": "é", "z": "F"},
        {"A": "state_dict", "W1": "parameters", "x": "m"},
        {"W1": "training", "lam": "step", "x": "prox", "z": "zip"},
        {"lam": "range", "A": "softplus_inverse", "W1": "given"},
        {"n": "super", "m": "len", "lam": "sum"},
        {"n": "self", "A": "super", "x": "zip", "W1": "enumerate"},
    ],
    ids=lambda w: "-".join(w.values()),
)
def test_any_word_of_a_spec_can_name_a_quantity(words: dict[str, str]) -> None:
    if words.get("x") == "m":  # a size and an input may not share a name in a spec
        words = {**words, "x": "mm"}
    a, x = torch.randn(6, 9, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    plain, other = lista(), lista(**words)
    want = network(plain, {"A": a}, dtype=torch.float64)(x)
    net = network(other, {words.get("A", "A"): a}, dtype=torch.float64)
    assert torch.equal(net(x), want)
    assert torch.equal(net(**{words.get("x", "x"): x, words.get("z", "z"): torch.zeros_like(want)}), want)
    assert net.objective(x, **{words.get("z", "z"): want}).keys() == {"fidelity", "sparsity", "total"}


@pytest.mark.parametrize(
    "text", ['"""\nimport os\n"""', "a\\", "x\n    raise SystemExit", "\u2028raise SystemExit", "'''\"" * 5]
)
def test_no_text_of_a_spec_can_leave_its_comment(text: str) -> None:
    program = lista()
    step = replace(
        program.step,
        algorithm=text,
        assigns=tuple(replace(a, note=text) for a in program.step.assigns),
        learned=tuple(replace(p, text=text) for p in program.step.learned),
    )
    made = programs.build(program.problem, step, layers=2, dims={"m": 6, "n": 9}, name=text, origin=text, sha=text)
    kinds = {type(node).__name__ for node in ast.parse(made.source).body}
    assert kinds <= {"Expr", "Import", "ImportFrom", "FunctionDef", "ClassDef"}
    assert "os" not in {a.name for n in ast.walk(ast.parse(made.source)) if isinstance(n, ast.Import) for a in n.names}
    assert not any(isinstance(n, ast.Raise) for n in ast.walk(ast.parse(made.source)))


def test_a_family_is_one_contraction_and_never_a_loop() -> None:
    u = member(U, "k")
    grad = family_sum("k", K, matmul(u, transpose(u), add(X, scale(-1, matmul(A, Z)))))
    step = Step(
        "gd",
        (),
        (State(Z, zeros(N, T)),),
        (Assign(Z, add(Z, scale(sp.Rational(1, 10), matmul(transpose(A), grad))), ""),),
        (Z,),
    )
    dims = SHAPES[0]
    given = values(dims, (2, 3), 0)
    net = compiled(step, dims, given)
    want = reference(step, dims, given, {}, 3)[-1]["Z"]
    assert float((net(*(stored(s, given[s]) for s in (X, Y, V))).mT - want).abs().max()) < 1e-12
    assert net.source.count("for ") == net.source.count("for _ in range") + net.source[
        : net.source.index("class ")
    ].count("for ")


def test_a_gram_matrix_is_kept_only_where_it_is_cheaper() -> None:
    step = Step(
        "gd", (Assign(ETA, elementwise(1 / slot(0) ** 2, spectral_norm(A)), ""),), (State(Q, zeros(N)),),
        (Assign(Q, add(Q, scale(-ETA, matmul(transpose(A), add(matmul(A, Q), scale(-1, Y))))), ""),), (Q,),
    )  # fmt: skip
    for dims, kept in (({**SHAPES[0], "m": 40, "n": 5}, True), ({**SHAPES[0], "m": 5, "n": 40}, False)):
        given = values(dims, (2,), 0)
        net = compiled(step, dims, given)
        shapes = {tuple(b.shape) for b in net.state_dict().values()}
        assert ((dims["n"], dims["n"]) in shapes) == kept
        want = reference(step, dims, given, {}, 3)[-1]["q"]
        assert float((net(*(stored(s, given[s]) for s in (X, Y, V))) - want[..., 0]).abs().max()) < 1e-12


def test_parameters_that_nothing_reads_are_not_in_the_module() -> None:
    names = set(network(lista(), {"A": torch.randn(6, 9)}).state_dict())
    assert names == {"W1", "W2", "theta"}


@pytest.mark.parametrize("term", ["norm1(z)", "norm2(z)", "sum(huber(z, 1/2))", "sum(z**4)"])
def test_a_step_that_is_a_plain_number_goes_into_a_prox_that_autograd_can_save(term: str) -> None:
    """L = 2 here, without a parameter: a number, which no rule of autograd can keep."""
    net = unroll.compile(
        {
            "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"y": ["n"]}, "scalars": {"lam": 0.3},
            "minimize": {"fit": "sumsq(y - z)", "rest": f"lam*{term}"},
            "unroll": {"algorithm": "proximal_gradient", "layers": 2, "start": {"z": "y"}},
        },
        dtype=torch.float64,
    )  # fmt: skip
    y = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(net, y, atol=1e-5)


@pytest.mark.parametrize("choice", ["where(z > 0, 1, 0)", "where(z > 1/2, 2, -1)", "3*where(z > 0, 1, 0) + 1"])
def test_a_choice_between_whole_numbers_is_of_the_type_of_what_it_is_chosen_by(choice: str) -> None:
    """A product of matrices takes no integers: the module could not be called."""
    s, z = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[-1.0, 0.2, 2.0]])
    loss = unroll.loss(
        {"dims": {"n": 3}, "variables": {"z": ["n"]}, "parameters": {"S": ["n", "n"]}, "minimize": {"f": f"sumsq(S @ ({choice}))"}},
        parameters={"S": s},
    )  # fmt: skip
    by_hand = eval(choice, {"where": lambda c, a, b: torch.where(c, float(a), float(b)), "z": z})
    assert torch.allclose(loss(z), (by_hand @ s.mT).square().sum())


@pytest.mark.parametrize(
    ("chosen", "want"),
    [
        ("where(z > 0, 3, 0.001)", 3.003),
        ("where(z > 0, 1, 0)", 1),
        ("where(z > 0, 0.1, where(z > -1, 2, 5))", 9.1),
        ("where(z > lam, 0.1, 0.7)", 2.2),
    ],
)
def test_a_choice_between_numbers_has_the_type_it_is_chosen_by(chosen: str, want: float):
    """0.001 was 0.000999987 in float64: a mask times a number is of the default type."""
    spec = {
        "dims": {"n": 4}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "scalars": {"lam": 0.2},
        "minimize": {"fit": f"sumsq(z - x) + sum({chosen})"},
    }  # fmt: skip
    for dtype, gap in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        z = torch.tensor([[-2.0, -0.5, 0.0, 3.0]], dtype=dtype)
        found = unroll.loss(spec).to(dtype)(z, z)
        assert found.dtype == dtype
        assert abs(float(found) - want) <= gap * want


@pytest.mark.parametrize(
    ("formula", "slope"),
    [
        ("where(z > 0, z*log(z), 0)", [0, 0, 1, math.log(2) + 1]),
        ("where(z > 0, 1/z, z)", [1, 1, -1, -0.25]),
        ("where(z <= 0, 0, where(z < 1, z**1.5, log(z)))", [0, 0, 1, 0.5]),
        ("where(abs(z) <= 0.5, z**2, sqrt(abs(z)))", [-0.5, 0, 0.5, 8**-0.5]),
        ("where(z > 1, z*log(z/3), 0)", [0, 0, 0, math.log(2 / 3) + 1]),
    ],
)
def test_a_case_that_is_not_taken_has_no_part_in_the_slope(formula: str, slope: list[float]) -> None:
    spec = {"dims": {"n": 1}, "variables": {"z": ["n"]}, "minimize": {"f": f"sum({formula})"}}
    z = torch.tensor([[-1.0], [0.0], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(unroll.loss(spec).terms(z)["f"].sum(), z)
    torch.testing.assert_close(found.flatten(), torch.tensor(slope, dtype=torch.float64))


def test_a_blank_sample_has_slopes_where_a_length_divides_in_the_case_not_taken() -> None:
    spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "inputs": {"y": ["n"]},
        "minimize": {"f": "huber(norm2(z - y), 1)"},
    }
    spec |= {"unroll": {"algorithm": "gradient_descent", "layers": 2, "step": 0.1}}
    y = torch.tensor([[0.0, 0, 0], [1, 2, 3]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(unroll.compile(spec)(y).sum(), y)
    torch.testing.assert_close(slope[0], torch.full((3,), 1 - 0.9**2, dtype=torch.float64))
    assert slope.isfinite().all()


@pytest.mark.parametrize("formula", ["norm_fro(log(1 + abs(z)/mu))", "sqrt(sum(z**2/(mu + z**2)))"])
def test_a_root_of_a_sum_with_a_positive_scalar_has_slope_0_at_a_blank_sample(formula: str) -> None:
    spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "scalars": {"mu": {"default": 0.4, "positive": True}},
        "minimize": {"f": formula},
    }
    z = torch.tensor([[0.0, 0, 0], [1, -2, 3]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(unroll.loss(spec).terms(z)["f"].sum(), z)
    assert (slope[0] == 0).all() and slope[1].isfinite().all() and (slope[1] != 0).all()
