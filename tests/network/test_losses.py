"""Losses compiled from objectives against those written out by hand (released.py) and the definition of every node."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import released
import sympy as sp
import torch
from torch import Tensor, nn

import unroll
from unroll.errors import SpecError, UnrollError
from unroll.language.nodes import Sym
from unroll.language.problem import from_spec
from unroll.network.evaluate import evaluate
from unroll.network.network import load
from unroll.pages.stages import stage
from unroll.spec import library

EXACT = {torch.float64: 1e-10, torch.float32: 2e-5}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def onehot(N: int, K: int) -> Tensor:
    """(K, N); every class has a sample."""
    labels = torch.cat([torch.arange(K), torch.randint(K, (N - K,), generator=torch.Generator().manual_seed(3))])
    return nn.functional.one_hot(labels, K).T.double()


@dataclass(frozen=True)
class Case:
    """A loss, the tensors of one call, what they are called by hand, and the numbers that both take."""

    name: str
    tensors: tuple[Tensor, ...]
    by_hand: Callable[..., Tensor]
    scalars: dict[str, float]
    moves: int  # how many of the tensors are variables, which come first


def mcr2(N: int, d: int, K: int, soft: bool = False) -> Case:
    members = drawn(K, N, seed=5).softmax(0) if soft else onehot(N, K)
    hand = lambda z, pi: released.mcr2_loss(z, pi.mT, 0.3, 2.0, 0.7)
    return Case("mcr2", (drawn(N, d), members), hand, {"eps2": 0.3, "gam1": 2.0, "gam2": 0.7}, 1)


def regularised(N: int, d: int, K: int) -> Case:
    hand = lambda z, pi: -released.mcr2_regularised(z, pi.mT, 0.3, 0.05)
    return Case("mcr2_regularised", (drawn(N, d), onehot(N, K)), hand, {"eps2": 0.3, "lam": 0.05}, 1)


def simdino(m: int, p: int, V: int, local: int, workers: int = 1, mean: bool = False) -> Case:
    hand = lambda s, near, t: released.simdino_loss(t, torch.cat([s, near]), 0.2, 1.3, workers, mean)
    tensors = (drawn(V, m, p), drawn(local, m, p, seed=1), drawn(V, m, p, seed=2))
    return Case(
        "simdino_mean" if mean else "simdino", tensors, hand, {"eps2": 0.2, "gamma": 1.3, "workers": workers}, 2
    )


def binary(N: int, d: int) -> Case:
    return Case(
        "ctrl_binary",
        (drawn(N, d), drawn(N, d, seed=1)),
        lambda z, z_hat: -released.ctrl_binary(z, z_hat, 0.3),
        {"eps2": 0.3},
        2,
    )


def multi(N: int, d: int, K: int) -> Case:
    hand = lambda z, z_hat, pi: -released.ctrl_multi(z, z_hat, pi.mT, 0.3)
    return Case("ctrl_multi", (drawn(N, d), drawn(N, d, seed=1), onehot(N, K)), hand, {"eps2": 0.3}, 2)


CASES = [
    mcr2(11, 5, 3), mcr2(5, 11, 2), mcr2(7, 7, 1), mcr2(11, 5, 3, soft=True), mcr2(1, 3, 1),
    regularised(11, 5, 3), regularised(4, 9, 2),
    simdino(9, 5, 2, 3), simdino(5, 9, 2, 0, workers=4), simdino(7, 3, 3, 1), simdino(9, 5, 2, 3, mean=True),
    binary(11, 5), binary(3, 8), multi(11, 5, 3), multi(5, 7, 2),
]  # fmt: skip


def both(case: Case, ours: Callable[..., Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients in the variables, ours in dtype and by hand in float64."""
    out: list[list[Tensor]] = []
    for run, kind in ((ours, dtype), (case.by_hand, torch.float64)):
        tensors = [t.to(kind).clone() for t in case.tensors]
        moved = [t.requires_grad_() for t in tensors[: case.moves]]
        value = run(*tensors)
        out.append([value, *torch.autograd.grad(value, moved)])
    return out[0], out[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{'x'.join(map(str, c.tensors[0].shape))}")
def test_a_loss_is_the_one_written_by_hand(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = both(case, unroll.loss(case.name, scalars=case.scalars), dtype)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert b.nelement() == 0 or (a - b).abs().max() <= EXACT[dtype] * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda c: str(tuple(c.tensors[0].shape)))
def test_the_side_of_determinants_is_chosen_by_the_sizes_given_or_in_the_call(case: Case) -> None:
    N, d = case.tensors[0].shape
    settled = unroll.loss(case.name, dims={"N": N, "d": d}, scalars=case.scalars)
    assert "smaller side" not in settled.source and "in a call with" not in settled.derivation
    ours, theirs = both(case, settled, torch.float64)
    assert all((a - b).abs().max() <= 1e-10 * b.abs().max().clamp_min(1) for a, b in zip(ours, theirs, strict=True))
    small = "torch.eye(N" in settled.source
    assert small is (d > N)
    open_ = unroll.loss(case.name)
    assert "if N < d:" in open_.source and "N in place of d in a call with N < d" in open_.derivation


@pytest.mark.parametrize("case", [mcr2(6, 4, 2), simdino(6, 4, 2, 1), multi(6, 4, 2)], ids=lambda c: c.name)
def test_batch_axes_are_averaged_and_terms_keep_them(case: Case) -> None:
    loss = unroll.loss(case.name, scalars=case.scalars)
    batch = [torch.stack([t, t.flip(-1), t.flip(-2)])[:, None].expand(3, 2, *t.shape) for t in case.tensors]
    singles = torch.stack([case.by_hand(*(t[i, 0] for t in batch)) for i in range(3)])
    sign = 1 if case.name == "simdino" else -1
    terms = loss.terms(*batch)
    assert all(v.shape == (3, 2) for v in terms.values())
    assert (sign * sum(terms.values()) - singles[:, None]).abs().max() < 1e-10
    assert (loss(*batch) - singles.mean()).abs() < 1e-10


def test_terms_are_as_written_and_the_loss_of_a_maximum_is_its_negative() -> None:
    z, members = drawn(11, 5), onehot(11, 3)
    loss = unroll.loss("mcr2", scalars={"eps2": 0.3})
    terms = loss.terms(Z=z, Pi=members)
    assert torch.allclose(terms["rate"], released.coding_rate(z, 0.3))
    assert torch.allclose(terms["class_rate"], -released.class_rate(z, members.mT, 0.3))
    assert loss(z, Pi=members) == -(terms["rate"] + terms["class_rate"])


DEFINITE = {"sparse_inverse_covariance"}
"""Objectives of positive definite matrices."""


@pytest.mark.parametrize("name", library.names("objectives"))
def test_every_objective_of_the_library_is_a_loss(name: str) -> None:
    """Its terms are what the definition of each node says."""
    problem = from_spec(
        unroll.load(name), {d: n for d, n in zip(unroll.load(name).dims, (3, 4, 5, 2, 6), strict=False)}
    )
    sizes: dict[sp.Symbol, Any] = {d: n for d, n in problem.dims.items() if isinstance(n, int)}
    products = any(n.is_Mul for z in problem.variables for n in z.shape)  # c * T: its factors cannot be read off
    loss = unroll.loss(name, dims={d.name: n for d, n in sizes.items()} if products else None)
    values: dict[Sym, Tensor] = {}
    for (
        s
    ) in loss.recipe.arguments:  # in mathematical layout; positive, as memberships are, and what is under a logarithm
        family = [] if s.family is None else [s.family]
        values[s] = drawn(*(int(n.subs(sizes)) for n in (*family, s.rows, s.cols)), seed=len(values)).abs()
    values |= {s: v @ v.mT for s, v in values.items() if name in DEFINITE and s.rows == s.cols}
    terms = loss.terms(**{s.name: stored(s, v) for s, v in values.items()})
    assert terms
    for term, value in terms.items():
        want = evaluate(problem.terms[term], values, problem.scalars | sizes).squeeze((-2, -1))
        assert abs(value - want) <= 1e-10 * abs(want).clamp_min(1), term


def stored(s: Sym, value: Tensor) -> Tensor:
    """A value in mathematical layout as a call takes it: tokens before features."""
    flat = value.squeeze(-1) if s.rank == 1 else value.squeeze((-2, -1)) if s.rank == 0 else value
    return flat.mT if s.rank == 2 and s.role != "parameter" and "as_written" not in s.props else flat


def test_the_teacher_gets_no_gradient() -> None:
    case = simdino(6, 4, 2, 1)
    tensors = [t.requires_grad_() for t in case.tensors]
    unroll.loss("simdino")(*tensors).backward()
    assert tensors[2].grad is None and all(t.grad is not None and t.grad.abs().max() > 0 for t in tensors[:2])


# --- classes without samples, matrices without a factor ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mcr2", "mcr2_regularised", "ctrl_multi"])
def test_a_class_without_samples_changes_nothing(name: str, dtype: torch.dtype) -> None:
    loss, members = unroll.loss(name), onehot(9, 2)
    empty = torch.cat([members, torch.zeros(1, 9)]).to(dtype).requires_grad_()
    z = [drawn(9, 4, seed=i).to(dtype).requires_grad_() for i in range(1 + (name == "ctrl_multi"))]
    value = loss(*z, empty)
    gradients = torch.autograd.grad(value, [*z, empty])
    without = torch.autograd.grad(loss(*z, members), z)
    assert torch.allclose(value, loss(*z, members), rtol=0, atol=EXACT[dtype])
    assert all(torch.allclose(a, b, rtol=0, atol=EXACT[dtype]) for a, b in zip(gradients, without, strict=False))
    assert all(g.isfinite().all() for g in gradients)


def test_a_soft_class_that_empties_out_goes_to_zero_without_a_jump() -> None:
    z, loss = drawn(9, 4), unroll.loss("mcr2")
    weights = torch.tensor([1e-3, 1e-5, 1.0001e-7, 1e-7, 1e-9, 0], dtype=torch.float64)
    gaps = torch.stack(
        [loss(z, torch.cat([onehot(9, 2), w * torch.ones(1, 9)])) - loss(z, onehot(9, 2)) for w in weights]
    )
    assert (gaps.diff() <= 0).all() and gaps[0] > 0 and gaps[-1] == 0


def test_a_matrix_without_a_factor_names_its_term() -> None:
    z = drawn(9, 4)
    with pytest.raises(UnrollError, match="the term class_rate has a matrix that is not positive definite") as e:
        unroll.loss("rate_reduction")(z, torch.cat([onehot(9, 2), torch.zeros(1, 9)]))  # divides by the size of a class
    assert e.value.code == "E409" and "a class without samples" in str(e.value)
    with pytest.raises(UnrollError, match="the term (class_)?rate has"):
        unroll.loss("mcr2")(z * torch.nan, onehot(9, 2))


def test_memberships_may_be_whole_numbers() -> None:
    z, members = drawn(9, 4), onehot(9, 2)
    assert unroll.loss("mcr2")(z, members.long()) == unroll.loss("mcr2")(z, members)


def test_a_shared_factor_names_all_its_terms() -> None:
    assert "'features and distance'" in unroll.loss("ctrl_multi").source


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mcr2", "ctrl_binary"])
def test_under_autocast_a_loss_is_computed_in_float32(name: str) -> None:
    case = {"mcr2": mcr2(40, 16, 3), "ctrl_binary": binary(40, 16)}[name]
    loss, tensors = unroll.loss(name, scalars=case.scalars), [t.bfloat16() for t in case.tensors]
    exact = case.by_hand(*(t.double() for t in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*tensors)
        rough = case.by_hand(*(t.float() for t in tensors))  # its products are in bfloat16
    assert value.dtype == torch.float32
    assert abs(value - exact) <= 1e-5 * abs(exact) < 1e-3 * abs(exact) < abs(rough - exact)


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_on_a_loss_makes_rate_reduction_rise_and_classes_orthogonal() -> None:
    torch.manual_seed(0)
    x, members = drawn(40, 10).float(), onehot(40, 2)
    encoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 6))
    loss, optimiser = unroll.loss("mcr2"), torch.optim.Adam(encoder.parameters(), lr=1e-2)
    features = lambda: nn.functional.normalize(encoder(x), dim=-1)
    history: list[float] = []
    for _ in range(60):
        optimiser.zero_grad()
        loss(features(), members).backward()
        optimiser.step()
        history.append(float(released.rate_reduction(features().detach().double(), members.mT, 0.5)))
    assert all(b > a for a, b in zip(history[::10], history[10::10], strict=False)) and history[-1] > 3 * history[0]
    z = features().detach()
    between = (z[members[0] > 0] @ z[members[1] > 0].mT).abs().mean()
    assert between < 0.5 * (z[members[0] > 0] @ z[members[0] > 0].mT).abs().mean()


@pytest.mark.parametrize(
    "case", [simdino(9, 5, 2, 3), binary(11, 5), multi(11, 5, 3), regularised(11, 5, 3)], ids=lambda c: c.name
)
def test_every_loss_falls_under_adam(case: Case) -> None:
    loss = unroll.loss(case.name, scalars=case.scalars)
    tensors = [nn.Parameter(t.float()) for t in case.tensors[: case.moves]] + list(case.tensors[case.moves :])
    optimiser = torch.optim.Adam(tensors[: case.moves], lr=1e-2)
    history: list[float] = []
    for _ in range(20):
        optimiser.zero_grad()
        value = loss(*tensors)
        value.backward()
        optimiser.step()
        history.append(value.item())
    assert all(b < a for a, b in pairwise(history))


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::5], ids=lambda c: c.name)
def test_the_source_runs_with_torch_alone(case: Case, tmp_path: Path) -> None:
    loss = unroll.loss(case.name)
    assert {
        line.split()[1].split(".")[0] for line in loss.source.splitlines() if line.startswith(("import ", "from "))
    } == {"torch"}
    emitted = load(loss.source, "alone")[type(loss).__name__]
    assert emitted(**case.scalars)(*case.tensors) == unroll.loss(case.name, scalars=case.scalars)(*case.tensors)


def test_a_loss_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    case = mcr2(11, 5, 3)
    loss = unroll.loss(case.name, scalars=case.scalars)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = both(case, compiled, torch.float64)
    assert all((a - b).abs().max() <= 1e-10 * b.abs().max().clamp_min(1) for a, b in zip(ours, theirs, strict=True))


def test_a_loss_can_be_exported_with_samples_on_one_side_of_features() -> None:
    case, N = mcr2(11, 5, 3), torch.export.Dim("N", min=5)
    loss = unroll.loss(case.name, scalars=case.scalars)
    exported = torch.export.export(loss, case.tensors, dynamic_shapes=(({0: N}, {1: N}),)).module()
    assert torch.allclose(exported(*mcr2(8, 5, 3).tensors), mcr2(8, 5, 3).by_hand(*mcr2(8, 5, 3).tensors), rtol=1e-12)


def test_the_source_of_an_objective_without_unroll_is_its_loss() -> None:
    assert stage("mcr2", "source") == unroll.loss("mcr2").source


def test_a_loss_says_what_it_is() -> None:
    said = unroll.loss("mcr2").derivation
    assert "minus the sum of its terms" in said and "Z (..., N, d), Pi (..., K, N)" in said
    assert said.splitlines()[-1].split("   ")[-1].strip() == "Z ∈ sphere: left to what makes the variables"
    assert (
        "minus" not in unroll.loss("simdino").derivation
        and "there are no constraints" in unroll.loss("simdino").derivation
    )
    assert "as written: whether N < d or N < p is known" in unroll.loss("sparse_rate_reduction").derivation


def test_copies_and_pickles_are_the_same_loss() -> None:
    case = mcr2(11, 5, 3)
    loss = unroll.loss(case.name, scalars=case.scalars, learn={"gam1"})
    with torch.no_grad():
        loss.gam1.add_(0.3)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.allclose(other(*case.tensors), loss(*case.tensors), rtol=1e-6)
        assert other.gam1 is not loss.gam1


# --- scalars and parameters -------------------------------------------------------------------------------------------

RATE = """
objective: token_rate
dims: {d: width, N: tokens, K: heads, p: width of a head, n: a number that no tensor has}
variables: {Z: [d, N]}
parameters: {U: [K, d, p], w: [d]}
scalars: {eps2: 0.5, shift: {default: -1}, temp: }
minimize:
  rate: "1/2 * sum(logdet(I(p) + 1/eps2 * (U[k].T @ Z @ Z.T @ U[k])) for k in K)"
  tilt: temp * sum(w * (Z @ ones(N, 1))) + shift * n
"""


def test_parameters_are_held_if_given_and_arguments_if_not() -> None:
    z, U, w = drawn(7, 4), drawn(2, 4, 3, seed=1), drawn(4, seed=2)
    expected = (
        released.half_logdet(released.in_heads(z, U).mT @ released.in_heads(z, U), 2.0).sum() + 3 * (z @ w).sum() - 9
    )
    both_given = unroll.loss(RATE, dims={"n": 9}, parameters={"U": U, "w": w}, scalars={"temp": 3})
    one_given = unroll.loss(RATE, dims={"n": 9}, parameters={"U": U}, scalars={"temp": 3})
    none_given = unroll.loss(RATE, dims={"n": 9}, scalars={"temp": 3})
    values = [
        both_given(z),
        one_given(z, w),
        one_given(z, w=w),
        none_given(z, U, w),
        both_given(z, U=U),
        one_given(z, w, U),
    ]
    assert all(abs(v - expected) < 1e-10 for v in values)
    assert set(dict(both_given.named_buffers())) == {"U", "w"} and not list(both_given.parameters())
    assert both_given(z, U=2 * U) != both_given(z)


def test_scalars_are_attributes_that_may_change() -> None:
    case = mcr2(11, 5, 3)
    loss = unroll.loss("mcr2")
    loss.eps2, loss.gam1, loss.gam2 = 0.3, 2.0, 0.7
    assert torch.allclose(loss(*case.tensors), case.by_hand(*case.tensors), rtol=1e-12)
    assert loss.scalars == {"eps2": 0.3, "gam1": 2.0, "gam2": 0.7, "delta": 1e-6}


def test_what_is_learned_has_a_gradient_and_keeps_its_sign() -> None:
    z, w = drawn(7, 4).float(), drawn(4, seed=2).float()
    loss = unroll.loss(
        RATE, dims={"d": 4, "K": 2, "p": 3, "n": 9}, learn={"U", "eps2", "shift"}, scalars={"temp": 3}, seed=1
    )
    assert {n for n, _ in loss.named_parameters()} == {"U", "eps2", "shift"} and loss.scalars["shift"] == -1
    assert abs(loss.scalars["eps2"] - 0.5) < 1e-6
    before = loss.U.detach().clone()
    optimiser = torch.optim.SGD(loss.parameters(), lr=5.0)
    for _ in range(3):
        optimiser.zero_grad()
        (-loss(z, w)).backward()  # a larger loss: a smaller eps2
        optimiser.step()
    assert 0 < loss.scalars["eps2"] < 0.5 and loss.scalars["shift"] > -1 and not torch.equal(loss.U, before)
    same = unroll.loss(RATE, dims={"d": 4, "K": 2, "p": 3, "n": 9}, learn={"U"}, scalars={"temp": 3}, seed=1)
    assert torch.equal(same.U, before)


SMALL = {"dims": {"n": 3}, "variables": {"z": ["n"]}, "minimize": "sum(z)"}
WRONG: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: unroll.loss(RATE, scalars={"temp": 3}), "E402", "the size 'n' has no value"),
    (lambda: unroll.loss(RATE, dims={"n": 9}), "E402", "the scalar 'temp' has no value"),
    (lambda: unroll.loss("mcr2", scalars={"eps2": -1}), "E403", "'eps2' is declared positive"),
    (lambda: unroll.loss("mcr2", learn={"esp2"}), "E402", "did you mean 'eps2'"),
    (lambda: unroll.loss(RATE, dims={"n": 9}, learn={"U"}), "E402", "U cannot be drawn: the size 'K' has no value"),
    (lambda: unroll.loss("subspace_mixture", learn={"U"}), "E403", "'U' is declared orthonormal"),
    (
        lambda: unroll.loss({**SMALL, "minimize": "0 * sum(z)", "constraints": ["z >= 0"]})(drawn(4)),
        "E404",
        "(..., n = 3)",
    ),
    (lambda: unroll.loss({**SMALL, "variables": {"z": [3]}})(drawn(4)), "E404", "z has shape (4,), expected (..., 3)"),
    (lambda: unroll.loss("mcr2")(drawn(9, 4)), "E404", "'Pi' is missing"),
    (lambda: unroll.loss("mcr2")(drawn(9, 4), onehot(9, 2).T), "E404", "Pi has shape (9, 2), expected (..., K, N = 9)"),
    (lambda: unroll.loss("mcr2")(drawn(4), onehot(9, 2)), "E404", "Z has shape (4,), expected (..., N, d)"),
    (lambda: unroll.loss("mcr2", dims={"d": 5})(drawn(9, 4), onehot(9, 2)), "E404", "expected (..., N, d = 5)"),
    (lambda: unroll.loss("mcr2")(drawn(9, 4), onehot(9, 2), drawn(1)), "E404", "this loss takes 2: Z, Pi"),
    (lambda: unroll.loss("mcr2")(drawn(9, 4), P=onehot(9, 2)), "E404", "'P' is not something this loss takes"),
]


@pytest.mark.parametrize(("build", "code", "says"), WRONG, ids=[says for *_, says in WRONG])
def test_what_does_not_fit_is_said(build: Callable[[], Any], code: str, says: str) -> None:
    with pytest.raises(UnrollError) as e:
        build()
    assert e.value.code == code and says in str(e.value)


def test_a_family_as_a_variable_is_for_losses_alone() -> None:
    with pytest.raises(SpecError, match="S is a family; what is unrolled is one matrix") as e:
        unroll.compile({"use": "simdino", "unroll": {"algorithm": "gradient_descent", "layers": 1, "step": 0.1}})
    assert e.value.code == "E132"
