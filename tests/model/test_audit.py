"""Modules that are not ours, held against an objective: a CRATE and a ViT as they are written by hand, a stranger's autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll

D, K, P, LAYERS = 12, 3, 4, 3


class Attend(nn.Module):
    """Attention of subspaces as released: one map for queries, keys and values, scores written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, K * P, bias=False)
        self.out = nn.Linear(K * P, D)

    def forward(self, x: Tensor) -> Tensor:
        v = self.qkv(self.norm(x)).unflatten(-1, (K, P)).transpose(-2, -3)
        scores = (v @ v.mT * P**-0.5).softmax(-1)
        return x + self.out((scores @ v).transpose(-2, -3).flatten(-2))


class Ista(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.weight = nn.Parameter(torch.randn(D, D) / D**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y + 0.1 * (y - y @ self.weight.T) @ self.weight - 0.1 * 0.1).relu()


class Crate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attend": Attend(), "ista": Ista()}) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["ista"](layer["attend"](x))
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, K, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def tokens(batch: int = 4, n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspaces(m: Any, layer: int) -> Tensor:
    return m.layers[layer]["attend"].qkv.weight.unflatten(0, (K, P)).mT


def listeners(module: nn.Module) -> int:
    """Ours are gone when the audit ends, by an error too."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())  # pyright: ignore[reportPrivateUsage]


PLACES = {
    "compress": {"before": "layers.*.attend", "after": "layers.*.attend"},
    "sparsify": {"before": "layers.*.ista", "after": "layers.*.ista"},
}
SIZES = {"d": D, "K": K, "p": P}


@pytest.fixture(scope="module")
def pair() -> tuple[Crate, unroll.Network]:
    """The same weights in a module written by hand and in ours."""
    torch.manual_seed(0)
    theirs = Crate().double()
    ours = unroll.compile("crate", dims=SIZES, overrides=[f"unroll.layers={LAYERS}"], dtype=torch.float64)
    assert isinstance(ours, unroll.Network)
    with torch.no_grad():
        for k, layer in enumerate(theirs.layers):
            attend, ista = layer["attend"], layer["ista"]
            ours.get_parameter("W")[k] = attend.qkv.weight.unflatten(0, (K, P)).mT
            ours.get_parameter("W_out")[k] = attend.out.weight.unflatten(1, (K, P)).transpose(0, 1)
            ours.get_parameter("W_out_bias")[k] = attend.out.bias
            ours.get_parameter("Q")[k] = ista.weight
    return theirs, ours


@pytest.mark.parametrize("form", ["iterate", "sphere"])
def test_a_module_written_by_hand_is_measured_as_ours_is(pair: tuple[Crate, unroll.Network], form: str) -> None:
    theirs, ours = pair
    torch.testing.assert_close(theirs(tokens()), ours(tokens()), rtol=0, atol=1e-12)
    batches = [tokens(), tokens(2, 7, 1)]
    found = unroll.audit(
        theirs, "sparse_rate_reduction", batches, at=PLACES, parameters={"U": subspaces}, dims=SIZES, normalised=form
    )
    wanted = unroll.white_box(ours, batches, at=form)
    assert found.labels == wanted.labels and found.samples == wanted.samples == 6
    keys = ("entering", "predicted", "actual", "improved", "cosine")
    for mine, yours in zip(found.records(), wanted.records(), strict=True):
        assert {mine[k] == yours[k] for k in ("layer", "block", "term")} == {True}
        assert [mine[k] for k in keys] == pytest.approx([yours[k] for k in keys], rel=1e-10, abs=1e-10)
    for name in found.found["zeros"]:
        torch.testing.assert_close(found.zeros[name].mean, wanted.zeros[name].mean)
    assert "compress" in str(found) and found.own == {"U": "subspaces"}


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_places_need_not_follow_on_each_other_and_a_class_token_may_be_left_out() -> None:
    """In a ViT the step of attention starts at what the norm leaves and ends before the sum: by hand, from hooks of our own."""
    torch.manual_seed(1)
    vit, x = Vit().double().eval(), tokens()
    seen: dict[str, list[Tensor]] = {"norm1": [], "attn": []}
    for block in vit.blocks:
        block.get_submodule("norm1").register_forward_hook(lambda m, args, out: seen["norm1"].append(out[:, 1:]))
        block.get_submodule("attn").register_forward_hook(lambda m, args, out: seen["attn"].append(out[0][:, 1:]))
    found = unroll.audit(
        vit,
        {"objective": "o", "dims": {"d": D, "N": "tokens"}, "variables": {"Z": ["d", "N"]}, "minimize": {"size": "1/2 * sumsq(Z)", "sparse": "0.1 * norm1(Z)"}},
        [x],
        at={"before": "blocks.*.norm1:out", "after": "blocks.*.attn"},
        read=lambda z: z[:, 1:],
    )  # fmt: skip
    for k in range(LAYERS):
        z, after = seen["norm1"][k], seen["attn"][k]
        size = [0.5 * v.square().sum((-1, -2)).mean() for v in (z, after)]
        torch.testing.assert_close(found.entering["size"].mean[k], size[0])
        torch.testing.assert_close(found.actual["size"].mean[k], size[1] - size[0])
        torch.testing.assert_close(found.predicted["size"].mean[k], (z * (after - z)).sum((-1, -2)).mean())
    assert found.labels == tuple((k + 1, "step") for k in range(LAYERS))
    assert listeners(vit) == 2 * LAYERS


def test_a_solver_that_runs_one_module_again_and_again_is_a_layer_each_time() -> None:
    """ISTA by hand with one set of weights on a LASSO: what is predicted and what comes, from formulas."""

    class Iterate(nn.Module):
        def forward(self, z: Tensor, x: Tensor, A: Tensor) -> Tensor:
            step = 1 / torch.linalg.matrix_norm(A, 2) ** 2
            v = z - step * (z @ A.T - x) @ A
            return v.sign() * (v.abs() - 0.1 * step).clamp_min(0)

    class Ista(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.A = Iterate(), nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z = x.new_zeros(*x.shape[:-1], 6)
            for _ in range(5):
                z = self.layer(z, x, self.A)
            return z

    torch.manual_seed(0)
    net, x = Ista(), torch.randn(8, 4, dtype=torch.float64)
    found = unroll.audit(
        net, "lasso", [x], at={"before": "layer", "after": "layer"}, parameters={"A": "A"}, inputs={"x": lambda batch: batch}, scalars={"lam": 0.1}
    )  # fmt: skip
    cost = lambda z: ((z @ net.A.T - x).square().sum(-1) / 2 + 0.1 * z.abs().sum(-1)).mean()
    assert found.samples == 8 and len(found.labels) == 5 and found.own == {"A": "A"}
    torch.testing.assert_close(found.values["total"].mean[0], cost(torch.zeros(8, 6, dtype=torch.float64)).detach())
    torch.testing.assert_close(found.values["total"].mean[-1], cost(net(x)).detach())
    assert (found.improved("total") == 1).all()


def test_the_autoencoder_of_a_stranger_in_ten_lines() -> None:
    """Its code against the sparse coding that it stands for: what lies between its code and one step of it."""
    torch.manual_seed(0)
    sae = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(6, 16), nn.ReLU()), "decoder": nn.Linear(16, 6, bias=False)}
    )
    sae.forward = lambda h: sae["decoder"](sae["encoder"](h))
    found = unroll.audit(
        sae.float(), "lasso", [torch.randn(32, 6)],
        at={"before": "encoder.1", "after": "encoder.1"},
        parameters={"A": "decoder.weight"}, inputs={"x": "encoder:in"},
    )  # fmt: skip
    assert found.labels == ((1, "step"),) and found.actual["sparsity"].mean[0] < 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"at": {"before": "layers.*.attent", "after": "layers.*.ista"}}, "has no 'layers.*.attent'"),
    ({"at": {"before": "layers.*.attend"}}, "needs two places"),
    ({"at": {}}, "names no place"),
    ({"at": {"before": "layers.*.attend", "after": "layers.0.ista"}}, "do not run equally often"),
    ({"parameters": {}}, "nothing stands for the parameter U"),
    ({"parameters": {"U": "layers.*.attend.qkv.weights"}}, "has nothing for U in layer 1"),
    ({"parameters": {"U": "layers.*.attend.norm"}}, "stands LayerNorm in layer 1"),
    ({"parameters": {"U": "layers.*.attend.qkv.weight"}}, "U"),
    ({"parameters": {"U": subspaces, "V": subspaces}}, "'V' is no parameter of the objective"),
    ({"inputs": {"x": lambda b: b}}, "'x' is no input of the objective"),
    ({"normalised": "sphere_"}, "cannot be taken at 'sphere_'"),
    ({"scalars": {"lambda": 1.0}}, "lambda"),
    ({"batches": []}, "no sample"),
    ({"read": lambda z: z[..., :5]}, "d = 12"),
    ({"at": {"before": {"Y": "layers.*.attend"}, "after": "layers.*.ista"}}, "places are needed for Z"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_does_not_fit_is_said(pair: tuple[Crate, unroll.Network], change: dict[str, Any], said: str) -> None:
    asked: dict[str, Any] = {
        "batches": [tokens()],
        "at": PLACES,
        "parameters": {"U": subspaces},
        "dims": SIZES,
        **change,
    }
    with pytest.raises(unroll.UnrollError) as error:
        unroll.audit(pair[0], "sparse_rate_reduction", **asked)
    assert said in str(error.value)
    assert listeners(pair[0]) == 0


class Backwards(nn.Module):
    """Its last layer runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer(z)
        return z


OWN = {
    "objective": "own", "dims": {"n": 3}, "variables": {"z": ["n"]}, "parameters": {"A": ["n", "n"]}, "minimize": "sumsq(A @ z)",
}  # fmt: skip


@pytest.mark.parametrize("weight", ["layers.*.weight", lambda m, k: m.layers[k].weight])
def test_weights_are_those_of_the_layer_that_ran(weight: Any) -> None:
    net, z = Backwards(), torch.randn(4, 3)
    found = unroll.audit(net, OWN, [z], at={"before": "layers.*", "after": "layers.*"}, parameters={"A": weight})
    with torch.no_grad():
        after = net.layers[1](z)
        wanted = net.layers[1](after).square().sum(-1) - after.square().sum(-1)
    torch.testing.assert_close(found.actual["objective"].mean[0].float(), wanted.mean())


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ({"before": "layers.0", "after": "layers.1"}, "sooner than at its place before"),
        ({"before": 1, "after": "layers.1"}, "needs two places"),
        ("layers.*", "needs two places"),
    ],
)  # fmt: skip
def test_places_that_are_no_step(at: Any, said: str) -> None:
    with pytest.raises(unroll.UnrollError, match=said):
        unroll.audit(Backwards(), OWN, [torch.randn(4, 3)], at=at, parameters={"A": torch.eye(3)})


def test_a_step_that_changes_the_shape() -> None:
    """A tuple whose first tensor is something else."""
    net, at = Backwards(), {"before": "layers.*", "after": "layers.*"}
    with pytest.raises(unroll.UnrollError, match=r"has shape \(4, 3\) before and \(1, 3\) after"):
        read = iter([torch.ones(4, 3)] * 2 + [torch.ones(1, 3)] * 2)
        unroll.audit(net, OWN, [torch.randn(4, 3)], at=at, parameters={"A": torch.eye(3)}, read=lambda z: next(read))


def test_a_batch_without_samples_counts_for_nothing() -> None:
    net, at = Backwards(), {"before": "layers.*", "after": "layers.*"}
    x = torch.randn(4, 3)
    ask = lambda batches: unroll.audit(net, OWN, batches, at=at, parameters={"A": torch.eye(3)})
    assert str(ask([x[:0], x, x[:0]])) == str(ask([x]))
    with pytest.raises(unroll.UnrollError, match="no sample to measure on"):
        ask([x[:0]])


def test_an_audit_is_a_page(pair: tuple[Crate, unroll.Network], tmp_path: Path) -> None:
    theirs, _ = pair
    found = unroll.audit(
        theirs, "sparse_rate_reduction", [tokens()], at=PLACES, parameters={"U": subspaces}, dims=SIZES
    )
    text = unroll.report(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{LAYERS} layers, 4 samples, terms of the variables as they are" in text and "subspaces" in text
    for row in found.rows():
        assert "".join(f"<td>{cell}</td>" for cell in row) in text.replace(' class="good"', "").replace(
            ' class="bad"', ""
        )
    with pytest.raises(unroll.UnrollError, match="takes no overrides"):
        unroll.report(found, tmp_path / "other.html", at="sphere")
