"""Planned memory against the tensors of a training, and counted operations against torch's own counter."""

import json
from functools import cache

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import unroll
from unroll.cli import cli
from unroll.errors import SpecError
from unroll.train import losses
from unroll.train.data import make_data
from unroll.train.engine import Clock, Stage, Task
from unroll.train.job import DTYPES, shapes_of
from unroll.train.planning import Rates, plan, seconds_of

torch.set_num_threads(1)

LISTA = """
name: tiny
use: lasso
dims: {m: 20, n: 40}
unroll: {algorithm: proximal_gradient, layers: 3, parametrisation: lista}
data: {source: synthetic, train: 64, validation: 16, sparsity: 0.2}
train: {loss: nmse, batch: 32}
"""
MODEL = """
name: small
dims: {d: 12, N: dynamic}
variables: {Z: [d, N]}
inputs: {X: [d, N]}
parameters: {D: [d, d]}
scalars: {lam: 0.1, eta: 0.1}
minimize: {fit: 1/2 * sumsq(X - D @ Z), sparsity: lam * norm1(Z)}
unroll: {algorithm: proximal_gradient, layers: 3, step: eta, start: {Z: X}, learn: {W: {replaces: step * D.T}}}
model: {embed: {kind: patches, image: [1, 8, 8], patch: 4}, head: {kind: mean, classes: 10}}
data: {source: digits, form: images}
train: {loss: cross_entropy, batch: 64}
"""
DIGITS = ("crate_digits", "train.batch=16", "unroll.layers=2")
HIDDEN = ("crate_mae_digits", "train.batch=8", "unroll.layers=1")
CODES = (LISTA, "train.optimizer=sgd", "train.momentum=0.9")


@cache
def planned(source, *overrides, **more):
    return plan(source, overrides=overrides, **more)


@cache
def real(source, *overrides):
    """A step of the training itself: (network, optimiser, bytes saved for the gradient, torch's count of operations)."""
    spec = unroll.load(source, overrides)
    settings, dtype = spec.train, DTYPES[spec.train.precision]
    data = make_data(spec.data, shapes_of(spec, {}), {})
    net = unroll.compile(spec, parameters=data.parameters, dtype=dtype)
    task = Task(net, settings, (Stage(net.layers, 0, 1, False),), Clock(None))
    optimizer = task.configure_optimizers()
    batch = data.train[torch.arange(settings.batch)].to(dtype)
    held = {}
    own = [*net.parameters(), *net.buffers(), *batch.inputs.values(), *batch.targets.values()]
    places = {v.data_ptr() for v in own} | ({batch.labels.data_ptr()} if batch.labels is not None else set())

    def keep(value):
        memory = value.untyped_storage()
        if memory.data_ptr() not in places:
            held[memory.data_ptr()] = memory
        return value

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            loss = losses.total(task.loss, net, batch, task.weights, settings)
        loss.backward()
        optimizer.step()
    return net, optimizer, sum(m.nbytes() for m in held.values()), counter.get_total_flops()


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("spec", [CODES, DIGITS, HIDDEN, (MODEL,)], ids=["lista", "digits", "hidden", "small"])
def test_planned_bytes_are_those_of_the_tensors(spec):
    found = planned(*spec)
    net, optimizer, activations, _ = real(*spec)
    memory = found.memory["alone"]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    assert memory.parameters == size(net.parameters()) and found.numbers == sum(p.numel() for p in net.parameters())
    assert memory.gradients == size(p.grad for p in net.parameters() if p.grad is not None)
    assert memory.optimizer == size(state) > 0
    assert abs(memory.activations - activations) <= 0.01 * activations
    assert memory.total == sum(v for k, v in found.to_dict()["memory"]["alone"].items() if k != "total")


def test_operations_are_those_that_torch_counts():
    assert planned(*CODES).operations == real(*CODES)[3] > 0


def test_fused_attention_counts_as_its_products():
    """In each of two layers two products forward and five backward, of 2 B H T T p each."""
    assert planned(*DIGITS).operations - real(*DIGITS)[3] == 2 * 7 * 2 * 16 * 4 * 17 * 17 * 12


def test_frozen_parts_have_no_gradient_and_no_state():
    every, head = planned(MODEL), planned(MODEL, "train.only=[head]")
    assert head.learned == 12 * 10 + 10 and head.memory["alone"].gradients == 4 * head.learned
    assert head.memory["alone"].optimizer < every.memory["alone"].optimizer / 3
    assert head.memory["alone"].activations < every.memory["alone"].activations / 10


def test_averaged_weights_and_bfloat16_are_counted():
    plain, mixed = planned(MODEL).memory["alone"], planned(MODEL, "train.precision=bfloat16").memory["alone"]
    averaged = planned(MODEL, "train.ema=0.9").memory["alone"]
    assert averaged.average == averaged.parameters and averaged.total == plain.total + averaged.average
    assert mixed.activations < 0.9 * plain.activations and mixed.optimizer == plain.optimizer


def test_layers_that_are_worked_out_again_and_parts_of_a_batch_save_less():
    plain, again = planned(MODEL).memory["alone"], planned(MODEL, "train.checkpoint=true").memory["alone"]
    parts = planned(MODEL, "train.batch=16", "train.accumulate=4")
    assert again.activations < 0.9 * plain.activations
    assert parts.batch == 64 and parts.memory["alone"].activations == pytest.approx(plain.activations / 4, rel=0.05)
    assert parts.memory["alone"].copies == plain.gradients and plain.copies == 0
    once = planned(MODEL).operations  # what does not depend on the batch is worked out for each part
    assert once < parts.operations < 1.05 * once


def test_a_declared_loss_has_a_teacher():
    loss = {"objective": {"use": "simdino", "scalars": {"eps2": 0.05}}, "takes": {}}
    loss["takes"] = {"S": {"of": "network", "views": "a"}, "T": {"of": "teacher", "views": "a"}}
    loss["takes"]["S_local"] = {"of": "network", "views": "b"}
    spec = unroll.load(MODEL).to_dict()
    spec["train"] = {"loss": loss, "views": {"a": {"count": 2}, "b": {"count": 2}}, "batch": 16}
    memory = plan(spec).memory["alone"]
    assert memory.average == memory.parameters and memory.activations > 0


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that has memory."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, tuple | list) else [out]:
            if isinstance(v, torch.Tensor) and not isinstance(v, FakeTensor) and v.device.type != "meta":
                self.most = max(self.most, v.numel() * v.element_size())
        return out


def test_nothing_of_the_size_of_the_network_is_made():
    large = {
        "name": "large",
        "use": "lasso",
        "dims": {"m": 20_000, "n": 30_000},
        "unroll": {"algorithm": "proximal_gradient", "layers": 1, "learn": {"W": {"replaces": "step * A.T"}}},
    }
    with Largest() as made:
        found = plan(large, overrides=["train.batch=4096"])
    assert found.memory["alone"].parameters == 4 * 600_000_000 and any("no section data" in n for n in found.notes)
    assert 0 < made.most < 100e6


def test_ranks_share_a_batch():
    alone, shared = planned(MODEL), planned(MODEL, gpus=4)
    one, ours = alone.memory["alone"], shared.memory["ddp"]
    assert ours.activations * 4 == pytest.approx(one.activations, rel=0.05) and ours.parameters == one.parameters
    assert shared.sent["ddp"] == 2 * one.gradients * 3 // 4


def test_a_step_that_was_run_is_near_to_one_that_was_counted():
    counted, run = planned(LISTA), planned(LISTA, measure=True)
    assert counted.source.startswith("counted") and run.source.startswith("measured")
    assert 0.05 < counted.seconds / run.seconds < 20  # the machine has other work too


def test_time_is_the_longer_of_computing_and_moving():
    rates = Rates(1e9, 1e8, 1e-5)
    assert seconds_of([(10**12, 0)], rates) == pytest.approx(1e12 / rates.operations + rates.begin)
    assert seconds_of([(0, 10**12), (0, 0)], rates) == pytest.approx(1e12 / rates.bytes + 2 * rates.begin)


def test_what_cannot_be_planned_is_refused():
    fixed = {"use": "lasso", "dims": {"m": 4, "n": 8}, "unroll": {"algorithm": "proximal_gradient", "layers": 2}}
    for spec, words in ((fixed, "E511.*nothing to learn"), ({**fixed, "dims": {"m": "dynamic", "n": 8}}, "E402")):
        with pytest.raises(SpecError, match=words):
            plan(spec)


def test_the_command_prints_lines_of_eighty_columns_and_json(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(LISTA)
    shown = CliRunner().invoke(cli, ["plan", str(path), "--gpus", "8"])
    assert shown.exit_code == 0 and max(map(len, shown.output.splitlines())) <= 80
    assert "ddp of 8" in shown.output and "state of adam" in shown.output
    told = json.loads(CliRunner().invoke(cli, ["plan", str(path), "--json"]).output)
    assert told["memory"]["alone"]["total"] == planned(LISTA).memory["alone"].total and told["steps"] == 40
    assert max(map(len, CliRunner().invoke(cli, ["plan", "--help"]).output.splitlines())) <= 100
