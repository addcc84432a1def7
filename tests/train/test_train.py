"""Training: exact resume, guards, plans, metrics. The network is a LISTA written by hand."""

import hashlib
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import unroll
from unroll.errors import SpecError
from unroll.spec.schema import Dictionary, Rates, Synthetic, Train
from unroll.train import losses, metrics
from unroll.train.data import make_data
from unroll.train.dictionary import alternate, column_steps, first_atoms, learn_dictionary
from unroll.train.engine import Stage, fit, parameter_groups, plan, rate, read_rows, read_weights
from unroll.train.groups import by_kind
from unroll.train.samples import Shapes, Split

M, N = 8, 16
torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
SHAPES = Shapes({"x": (M,)}, {"z": (N,)}, {"A": (M, N)})


def soft(v, t):
    return v.sign() * (v.abs() - t).clamp_min(0)


class Lista(nn.Module):
    """z <- soft(W2 z + W1 x, theta): the interface of a compiled network, by hand."""

    inputs, variables = ("x",), ("z",)
    learned = tuple(SimpleNamespace(kind=kind) for kind in ("matrix", "matrix", "scalar"))

    def __init__(self, A, layers=3, lam=0.1, dropout=0.0):
        super().__init__()
        step = 1 / torch.linalg.matrix_norm(A, 2) ** 2
        self.register_buffer("A", A)
        self.layers, self.lam = layers, lam
        self.W1 = nn.Parameter(step * A.mT.clone())
        self.W2 = nn.Parameter((torch.eye(A.shape[1]).to(A) - step * A.mT @ A).repeat(layers, 1, 1))
        self.theta = nn.Parameter((step * lam) * torch.ones(layers, A.shape[1]).to(A))
        self.dropout = nn.Dropout(dropout)
        self.calls, self.interrupt_at = 0, None

    def steps(self, x):
        if self.training:
            self.calls += 1
            if self.calls == self.interrupt_at:
                signal.raise_signal(signal.SIGINT)
        z = x.new_zeros(*x.shape[:-1], self.A.shape[1])
        yield z
        for W2, theta in zip(self.W2, self.theta, strict=True):
            z = soft(self.dropout(z @ W2.mT + x @ self.W1.mT), theta)
            yield z

    def forward(self, x):
        *_, z = self.steps(x)
        return z

    def trace(self, x):
        return SimpleNamespace(iterates={"z": list(self.steps(x))})

    def objective(self, x, z):
        fidelity = (x - z @ self.A.mT).square().sum(-1) / 2
        sparsity = self.lam * z.abs().sum(-1)
        return {"fidelity": fidelity, "sparsity": sparsity, "total": fidelity + sparsity}


@pytest.fixture(scope="module")
def data():
    return make_data(Synthetic(source="synthetic", train=96, validation=32, sparsity=0.2), SHAPES)


def fresh(data, **options):
    return Lista(data.parameters["A"], **options)


def digest(net):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()


def settings(**changes):
    return Train(**{"epochs": 4, "batch": 16, "clip": 1.0, "keep": "last", "lr": 1e-3, **changes})


# 96 samples in batches of 16 are 6 steps an epoch: 24 steps; 6 and 12 are ends of epochs
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 12, 17, 23])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_interrupted_training_resumes_bit_for_bit(tmp_path, data, stop, dropout):
    whole = fresh(data, dropout=dropout)
    done = fit(whole, data, settings(), tmp_path / "whole")
    assert (done.status, done.steps) == ("done", 24)

    first = fresh(data, dropout=dropout)
    first.interrupt_at = stop
    cut = fit(first, data, settings(), tmp_path / "cut")
    assert (cut.status, cut.steps) == ("interrupted", stop)
    assert digest(first) != digest(whole)

    torch.manual_seed(12345)  # whatever another process did to the random numbers
    again = fresh(data, dropout=dropout)
    rest = fit(again, data, settings(), tmp_path / "cut", resume=True)
    assert (rest.status, rest.steps) == ("done", 24)
    assert digest(again) == digest(whole)
    rows = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in read_rows(tmp_path / d / "metrics.csv")]
        for d in ("whole", "cut")
    ]
    assert str(rows[0]) == str(rows[1]) and len(rows[0]) == 4
    seconds = [r["seconds"] for r in read_rows(tmp_path / "cut" / "metrics.csv")]
    assert seconds == sorted(seconds) and rest.seconds > cut.seconds / 2  # the clock counts all sessions


def test_layerwise_training_and_sgd_resume_bit_for_bit_too(tmp_path, data):
    options = {
        "stages": "layerwise", "loss": "objective", "optimizer": "sgd", "validate_every": 5, "noise": {"x": (40.0, 20.0)},
    }  # fmt: skip
    whole, first, again = fresh(data), fresh(data), fresh(data)
    fit(whole, data, settings(**options), tmp_path / "whole")
    first.interrupt_at = 9
    fit(first, data, settings(**options), tmp_path / "cut")
    fit(again, data, settings(**options), tmp_path / "cut", resume=True)
    assert digest(again) == digest(whole) != digest(first)


def test_a_resumed_training_knows_the_best_so_far_and_since_when(tmp_path, data):
    """At a learning rate of 1 the first row stays the best: patience ends the training where it would have ended it."""
    options = {"epochs": 50, "patience": 3, "lr": 1.0, "clip": None, "keep": "best"}
    whole, first, again = fresh(data), fresh(data), fresh(data)
    done = fit(whole, data, settings(**options), tmp_path / "whole")
    first.interrupt_at = done.steps - 4  # one epoch and two thirds without a better row are behind it
    fit(first, data, settings(**options), tmp_path / "cut")
    rest = fit(again, data, settings(**options), tmp_path / "cut", resume=True)
    assert rest.status == done.status == "patience"
    assert (rest.steps, rest.best) == (done.steps, done.best) and digest(again) == digest(whole)


def test_the_seed_decides_the_result_and_the_global_state_does_not(tmp_path, data):
    nets = [fresh(data, dropout=0.3) for _ in range(3)]
    for k, (net, seed) in enumerate(zip(nets, (0, 0, 1), strict=True)):
        torch.manual_seed(k)
        fit(net, data, settings(seed=seed), tmp_path / str(k))
    assert digest(nets[0]) == digest(nets[1]) != digest(nets[2])


@pytest.mark.parametrize("loss", ["objective", "mse", "nmse"])
def test_training_lowers_its_loss_on_held_out_samples(tmp_path, loss):
    data = make_data(Synthetic(source="synthetic", train=2000, validation=256, sparsity=0.2), SHAPES)
    net = fresh(data)
    fit(net, data, settings(loss=loss, epochs=2, keep="best", lr=Rates(matrices=3e-3, scalars=3e-3)), tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    before = losses.find_loss(loss).value
    held = data.validation
    with torch.no_grad():
        start, end = (float(before(n, held, losses.run(n, held.inputs), settings())) for n in (fresh(data), net))
    assert end < 0.98 * start
    assert end == pytest.approx(min(row["held_out"] for row in rows), rel=1e-6)  # the best weights were kept


def test_patience_ends_a_training_that_does_not_improve(tmp_path, data):
    out = fit(fresh(data), data, settings(epochs=50, patience=2, lr=1.0, clip=None), tmp_path)
    assert out.status == "patience" and out.steps < 300


def test_a_time_limit_alone_ends_the_training(tmp_path, data):
    out = fit(fresh(data), data, Train(minutes=0.01, batch=16), tmp_path)
    assert out.status == "time" and 0.6 <= out.seconds < 5
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_parameter_that_is_not_finite_is_named_with_its_layer(tmp_path, data):
    net = fresh(data)
    with torch.no_grad():
        net.W2[1, 0, 0] = math.nan
    with pytest.raises(SpecError, match="step 0: W2 of layer 2 is not finite") as caught:
        fit(net, data, settings(), tmp_path)
    assert caught.value.code == "E509"


def test_an_iterate_that_overflows_is_named_with_its_layer(tmp_path, data):
    net = fresh(data)
    with torch.no_grad():
        net.W2[1] = 1e200 * torch.eye(N, dtype=torch.float64)
        net.W2[2] = 1e200 * torch.eye(N, dtype=torch.float64)
    with pytest.raises(SpecError, match="z after layer 3 is not finite"):
        fit(net, data, settings(), tmp_path)


def test_a_gradient_that_is_not_finite_is_named(tmp_path, data):
    net = fresh(data)
    net.theta.register_hook(lambda g: g * math.nan)
    with pytest.raises(SpecError, match="the gradient of theta of layer 1 is not finite"):
        fit(net, data, settings(), tmp_path)
    assert all(p.isfinite().all() for p in net.parameters())


def test_gradients_that_are_too_long_to_measure_are_named_by_the_largest(tmp_path, data):
    net = fresh(data)
    net.W1.register_hook(lambda g: g * 1e200)
    with pytest.raises(SpecError, match="the length of the gradient, of W1 most, is not finite"):
        fit(net, data, settings(), tmp_path)


def test_a_supervised_loss_without_targets_is_refused(tmp_path, data):
    bare = type(data)("file", Split(data.train.inputs), Split(data.validation.inputs))
    with pytest.raises(SpecError) as caught:
        fit(fresh(data), bare, settings(loss="mse"), tmp_path)
    assert caught.value.code == "E508"


def test_checkpoints_hold_tensors_only_and_weights_are_safetensors(tmp_path, data):
    net = fresh(data)
    fit(net, data, settings(epochs=1), tmp_path)
    torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    other = fresh(data)
    read_weights(other, tmp_path / "checkpoints" / "best.safetensors")
    assert digest(other) == digest(net)
    assert not list(tmp_path.rglob("*.part"))


# --- the plan --------------------------------------------------------------------------------------------------------


def test_layerwise_stages_share_the_steps_and_end_with_all_layers():
    stages = plan(Train(stages="layerwise", refine=0.5), 3, 60)
    assert stages == (Stage(1, 0, 10, False), Stage(2, 10, 20, False), Stage(3, 20, 30, False), Stage(3, 30, 60, True))


def test_cosine_falls_from_one_to_nought_and_warm_up_rises():
    stage = Stage(3, 0, 100, True)
    factors = [rate(Train(warmup=4), stage, k, k / 100) for k in range(101)]
    assert factors[0] == 0.25 and factors[100] == pytest.approx(0, abs=1e-12)
    assert factors[50] == pytest.approx(0.5) and factors[3:] == sorted(factors[3:], reverse=True)
    assert {rate(Train(schedule="constant"), stage, k, k / 100) for k in range(101)} == {1.0}


def test_the_learning_rate_of_each_step_is_that_of_its_stage(tmp_path, data):
    """1 in stages that add a layer, cosine over the steps of the last stage alone."""
    options = {"stages": "layerwise", "refine": 0.5, "validate_every": 1, "loss": "objective"}
    fit(fresh(data), data, settings(**options), tmp_path)
    found = [row["lr"] / 1e-3 for row in read_rows(tmp_path / "metrics.csv")]  # after step 1 .. 24: that of the next
    cosine = [(1 + math.cos(math.pi * k / 12)) / 2 for k in range(13)]
    assert found == pytest.approx([1.0] * 11 + cosine, abs=1e-9)


def test_matrices_and_scalars_have_their_own_learning_rates(data):
    net = fresh(data)
    groups = {g["kind"]: g for g in parameter_groups(net, Train(lr=1e-3))}
    assert groups["scalar"]["lr"] == pytest.approx(1e-2) and groups["matrix"]["lr"] == 1e-3
    assert [p.shape for p in groups["scalar"]["params"]] == [net.theta.shape]
    groups = {g["kind"]: g["lr"] for g in parameter_groups(net, Train(lr=Rates(matrices=0.1, scalars=0.2)))}
    assert groups == {"matrix": 0.1, "scalar": 0.2}


def test_vectors_of_many_layers_and_heads_are_no_matrices():
    net = unroll.compile("tost", dims={"d": 8, "K": 2, "p": 4}, overrides=["unroll.layers=3"])
    kinds = {name: kind for kind, named in by_kind(net).items() for name, _ in named}
    assert {name for name, kind in kinds.items() if kind == "matrix"} == {"W", "W_out"}
    assert kinds["offset"] == kinds["layer_scale"] == "vector" and kinds["temperature"] == "scalar"


def test_layer_weights_are_normalised_and_refused_when_wrong():
    assert losses.layer_weights("last", 3) == (0, 0, 1)
    assert losses.layer_weights("uniform", 4) == (0.25,) * 4
    assert losses.layer_weights("linear", 3) == pytest.approx((1 / 6, 2 / 6, 3 / 6))
    assert losses.layer_weights((1, 0, 3), 3) == (0.25, 0, 0.75)
    for wrong in ((1.0,), (0, 0, 0), (1, 1, -1), "lst"):
        with pytest.raises(SpecError):
            losses.layer_weights(wrong, 3)


def test_deep_supervision_is_the_weighted_sum_of_the_losses_of_the_iterates(data):
    net, batch = fresh(data), data.validation
    loss, weights = losses.find_loss("mse"), losses.layer_weights("linear", 3)
    states = losses.iterates(net, batch.inputs)
    by_hand = sum(w * ((states[k]["z"] - batch.targets["z"]) ** 2).mean() for k, w in enumerate(weights, start=1))
    assert losses.total(loss, net, batch, weights, settings()).item() == pytest.approx(by_hand.item(), rel=1e-12)


# --- metrics against plain loops -------------------------------------------------------------------------------------


def test_metrics_equal_plain_loops():
    draw = np.random.default_rng(0)
    ref = draw.standard_normal((20, 7)) * (draw.random((20, 7)) < 0.4)
    z = ref + 0.1 * draw.standard_normal((20, 7)) * (draw.random((20, 7)) < 0.3)
    ref[3] = 0  # a sample without a ratio
    error = size = tp = fp = fn = 0.0
    ratios = []
    for a, b in zip(z, ref, strict=True):
        e, s = sum((p - q) ** 2 for p, q in zip(a, b, strict=True)), sum(q**2 for q in b)
        error, size = error + e, size + s
        if s > 0:
            ratios.append(10 * math.log10(max(e / s, np.finfo(float).eps ** 2)))
        for p, q in zip(a, b, strict=True):
            tp, fp, fn = tp + (p != 0 and q != 0), fp + (p != 0 and q == 0), fn + (p == 0 and q != 0)
    zt, rt = torch.from_numpy(z), torch.from_numpy(ref)
    assert metrics.nmse(zt, rt).item() == pytest.approx(error / size, rel=1e-12)
    assert metrics.nmse_mean_db(zt, rt).item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-12)
    assert metrics.support_f1(zt, rt).item() == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-12)


def test_metrics_of_an_exact_answer():
    ref = torch.eye(3, dtype=torch.float64)
    assert metrics.nmse(ref, ref) == 0 and metrics.support_f1(ref, ref) == 1
    assert metrics.nmse(0 * ref, 0 * ref) == 0 and metrics.support_f1(0 * ref, 0 * ref) == 1
    assert metrics.nmse(ref, 0 * ref) == math.inf
    assert metrics.objective_gap(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])) == 1


# --- dictionary ------------------------------------------------------------------------------------------------------


def fista_code(lam=0.1, steps=30):
    def code(x, A):
        step = 1 / torch.linalg.matrix_norm(A, 2) ** 2
        z = y = x.new_zeros(len(x), A.shape[1])
        t = 1.0
        for _ in range(steps):
            new = soft(y - step * (y @ A.mT - x) @ A, step * lam)
            t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
            y, z, t = new + (t - 1) / t_new * (new - z), new, t_new
        return z

    return code


def test_column_steps_keep_unit_columns_and_never_raise_the_cost():
    draw = torch.Generator().manual_seed(0)
    A = nn.functional.normalize(torch.randn(6, 9, generator=draw, dtype=torch.float64), dim=0)
    z, x = (torch.randn(50, k, generator=draw, dtype=torch.float64) for k in (9, 6))
    costs = []
    for _ in range(5):
        costs.append((x - z @ A.mT).square().sum().item())
        A = column_steps(A, z.mT @ z, x.mT @ z)
        assert torch.allclose(A.norm(dim=0), torch.ones(9, dtype=torch.float64))
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_a_dictionary_that_made_the_data_is_found_again():
    true = nn.functional.normalize(torch.randn(16, 20, generator=torch.Generator().manual_seed(1)), dim=0)
    shapes = Shapes({"x": (16,)}, {"z": (20,)}, {"A": (16, 20)})
    made = make_data(Synthetic(source="synthetic", train=4000, sparsity=0.1), shapes, {"A": true})
    options = Dictionary(learn="A", rounds=60, batch=500)
    found = [learn_dictionary(made.train.inputs["x"], 20, fista_code(), options) for _ in range(2)]
    assert torch.equal(*found)  # deterministic
    match = (found[0].mT @ true.double()).abs().amax(dim=1)
    assert (match > 0.9).float().mean() >= 0.9 and match.median() > 0.99


def test_an_atom_that_is_never_used_is_replaced():
    x = torch.randn(200, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = fista_code()

    def blind(batch, A):  # never uses atom 0
        z = code(batch, A)
        z[:, 0] = 0
        return z

    options = Dictionary(learn="A", rounds=4, batch=100)
    start = first_atoms(x, 12, torch.Generator().manual_seed(options.seed))
    *_, last = alternate(x, 12, blind, options)
    assert not torch.allclose(start[:, 0], last[:, 0]) and torch.allclose(last.norm(dim=0), torch.ones(12).double())
