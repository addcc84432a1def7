"""What a network, a model, a loss is given in another kind than its own is refused, with the line that mends it."""

import re
from typing import Any

import numpy as np
import pytest
import torch

import unroll
from unroll.errors import UnrollError
from unroll.network.kinds import check_kind

AROUND: dict[str, Any] = {
    "dims": {"d": 8, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"]}, "parameters": {"D": ["d", "d"]},
    "minimize": {"fit": "1/2 * sumsq(X - D @ Z)", "sparsity": "0.1 * norm1(Z)"},
    "unroll": {"algorithm": "proximal_gradient", "layers": 1, "step": 0.1, "start": {"Z": "X"}},
}  # fmt: skip
IMAGES = {
    **AROUND,
    "model": {"embed": {"kind": "patches", "image": [1, 4, 4], "patch": 2}, "head": {"kind": "mean", "classes": 3}},
}
WORDS = {
    **AROUND,
    "model": {"embed": {"kind": "tokens", "vocabulary": 11, "length": 6}, "head": {"kind": "mean", "classes": 3}},
}
HIDDEN = {
    **IMAGES,
    "model": {**IMAGES["model"], "mask": {"ratio": 0.5}, "decoder": {"layers": {"unroll": AROUND["unroll"]}}},
}
HIDDEN["model"].pop("head")
BUILT = {"use": "redunet", "dims": {"d": 8, "K": 2}, "unroll": {"layers": 1}}
OTHERS: dict[str, tuple[Any, str]] = {
    "float64": (lambda x: x.double(), r"torch.float64, the network is of torch.float32(.|\n)*\w+.to\(torch.float32\), or net.to\(torch.float64\)"),
    "float16": (lambda x: x.half(), r"torch.float16, the network is of torch.float32"),
    "bytes": (lambda x: x.to(torch.uint8), r"torch.uint8(.|\n)*\w+.to\(torch.float32\) / 255"),
    "integers": (lambda x: x.long(), r"torch.int64(.|\n)*\w+.to\(torch.float32\)"),
    "yes or no": (lambda x: x > 0, r"torch.bool(.|\n)*\w+.to\(torch.float32\)"),
    "complex": (lambda x: x.to(torch.complex64), r"torch.complex64(.|\n)*\w+.real"),
    "sparse": (lambda x: x.to_sparse(), r"sparse_coo(.|\n)*\w+.to_dense\(\)"),
    "array": (lambda x: x.numpy(), r"type ndarray(.|\n)*torch.from_numpy\(\w+\).to\(torch.float32\)"),
    "list": (lambda x: x.tolist(), r"type list(.|\n)*torch.as_tensor\(\w+, dtype=torch.float32\)"),
    "text": (lambda x: "import torch", "type str"),
    "elsewhere": (lambda x: x.to("meta"), r'on meta, the network on cpu(.|\n)*\w+.to\("cpu"\)'),
}  # fmt: skip
NETWORKS: dict[str, tuple[Any, torch.Size, tuple[Any, ...]]] = {
    "layers": (AROUND, torch.Size((2, 5, 8)), (lambda net, x: net(x), lambda net, x: net.trace(x), lambda net, x: net.objective(X=x, Z=x), lambda net, x: net(torch.ones(2, 5, 8), Z=x))),
    "model of images": (IMAGES, torch.Size((2, 1, 4, 4)), (lambda net, x: net(x), lambda net, x: net.trace(x), lambda net, x: unroll.white_box(net, [[x]]))),
    "masked images": (HIDDEN, torch.Size((2, 1, 4, 4)), (lambda net, x: net(x), lambda net, x: net.trace(x))),
    "constructed": (BUILT, torch.Size((6, 8)), (lambda net, x: net.construct(X=x, Pi=torch.eye(2).repeat(1, 3)),)),
}  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {name: unroll.compile(spec) for name, (spec, *_) in NETWORKS.items()}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_another_kind_is_refused_with_the_remedy(made, name, other):
    _, shape, calls = NETWORKS[name]
    change, message = OTHERS[other]
    for call in calls:
        with pytest.raises(UnrollError) as caught:
            call(made[name], change(torch.ones(shape)))
        assert caught.value.code == "E404" and re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_own_kind_is_taken(made, name):
    _, shape, calls = NETWORKS[name]
    for call in calls:
        call(made[name], torch.ones(shape))


TOKENS: dict[str, tuple[Any, str]] = {
    "beyond": (torch.full((1, 4), 11), "from 0 to 10; these go from 11 to 11"),
    "negative": (torch.tensor([[0, -1]]), "from 0 to 10; these go from -1 to 0"),
    "text": ("import torch", r"below 11, not of type str(.|\n)*torch.as_tensor\("),
    "array": (np.zeros((1, 4), int), "below 11, not of type ndarray"),
    "floats": (torch.zeros(1, 4), "below 11, not torch.float32"),
    "elsewhere": (torch.zeros(1, 4, dtype=torch.int64, device="meta"), "on meta, the network on cpu"),
    "one word": (torch.tensor(3), r"shape \(\)"),
}


@pytest.fixture(scope="module")
def words() -> Any:
    return unroll.compile(WORDS)


@pytest.mark.parametrize("case", TOKENS)
def test_words_that_the_model_does_not_know_are_refused(words, case):
    x, message = TOKENS[case]
    for call in (words, words.trace):
        with pytest.raises(UnrollError, match=f"E404(.|\n)*{message}"):
            call(x)


def test_words_at_the_ends_of_the_vocabulary_are_taken(words):
    assert words(torch.tensor([[0, 10]], dtype=torch.int32)).shape == words(torch.tensor([[10, 0]])).shape == (1, 3)
    assert words(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 3)


def test_autocast_sees_to_the_type_and_to_nothing_else(made):
    net = made["layers"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.ones(2, 5, 8, dtype=torch.bfloat16))
        with pytest.raises(UnrollError, match="torch.float64, the network is of torch.float32"):
            net(torch.ones(2, 5, 8, dtype=torch.float64))


def test_a_loss_takes_whole_numbers_and_refuses_what_is_no_real_tensor():
    loss = unroll.loss("mcr2")
    z, members = torch.randn(9, 4), torch.eye(2).repeat(1, 5)[:, :9]
    assert torch.equal(loss(z, members.long()), loss(z, members))
    for other, message in (
        (z.numpy(), "ndarray"),
        (z.to(torch.complex64), "complex64"),
        (z.to_sparse(), "sparse"),
        (z.to("meta"), "on"),
    ):
        with pytest.raises(UnrollError, match=f"E404(.|\n)*{message}"):
            loss(other, members)


def test_a_mask_of_another_kind_is_refused(made):
    net, image = made["masked images"], torch.ones(2, 1, 4, 4)
    for mask in (np.zeros((2, 4), bool), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(UnrollError, match="E404(.|\n)*mask is .* expected torch.bool"):
            net(image, mask)


def test_a_size_that_is_open_is_the_same_in_all_inputs():
    spec = {
        "dims": {"d": 3, "N": "dynamic"}, "variables": {"Z": ["d", "N"]}, "inputs": {"X": ["d", "N"], "Y": ["d", "N"]},
        "minimize": {"fit": "1/2 * sumsq(X - Z) + 1/2 * sumsq(Y - Z)"}, "unroll": {"algorithm": "gradient_descent", "layers": 1},
    }  # fmt: skip
    net = unroll.compile(spec)
    assert net(torch.ones(5, 3), torch.ones(5, 3)).shape == (5, 3)
    with pytest.raises(UnrollError, match="E404.*N is 5 in X and 1 in Y"):  # torch would repeat the one
        net(torch.ones(5, 3), torch.ones(1, 3))


@pytest.mark.parametrize("layers", [-1, 1.5, "3"])
def test_a_depth_that_is_none_is_refused(layers):
    net = unroll.compile("ista", dims={"m": 4, "n": 6})
    with pytest.raises(UnrollError, match="E406.*0 or more layers"):
        net(torch.ones(2, 4), layers=layers)


def test_a_network_without_numbers_of_its_own_takes_any_real_type():
    check_kind("x", torch.ones(2, dtype=torch.float64))
    with pytest.raises(UnrollError, match="E404"):
        check_kind("x", torch.ones(2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scalars": {"lam": "0.1"}}, "E403.*'lam' is a number; '0.1' is not"),
        ({"scalars": {"lam": torch.ones(2)}}, "E403.*'lam' is a number"),
        ({"scalars": {"lam": float("inf")}}, "E403.*'lam' is a number; inf is not"),
        ({"scalars": {"lam": None}}, "E403.*'lam' is a number"),
        ({"seed": None}, "E404.*seed=None is not a whole number"),
        ({"seed": 1.5}, "E404.*seed=1.5"),
        ({"dtype": torch.int32}, "E404.*dtype=torch.int32 is not a type of real numbers"),
        ({"dtype": "float64"}, "E404.*dtype='float64'"),
        ({"device": "gpu"}, "E404.*device='gpu' cannot be used"),
    ],
)
def test_what_a_network_is_made_with_is_of_its_kind(given, message):
    with pytest.raises(UnrollError, match=message):
        unroll.compile("lista", dims={"m": 4, "n": 6}, overrides=["unroll.layers=1"], **given)


def test_a_start_is_of_the_samples_that_come_in():
    net = unroll.compile("lista", dims={"m": 4, "n": 6}, overrides=["unroll.layers=2"], dtype=torch.float64)
    x, z = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert torch.allclose(net(x, z=z), net(x, z=z.expand(5, 6)))
    assert torch.allclose(net(x[0], z=z.expand(5, 6)), net(x[0].expand(5, 4), z=z))
    for batch in ((4,), (1,), (5, 1)):
        with pytest.raises(UnrollError, match="E404.*batch axes"):
            net(x, z=torch.zeros(*batch, 6, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_sign_is_tried_in_the_units_of_its_matrix(scale):
    spec = {
        "dims": {"n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["n"]}, "parameters": {"w": {"shape": ["n"], "positive": True}},
        "minimize": {"fit": "1/2 * sumsq(x - z)", "sparsity": "dot(w, abs(z))"}, "unroll": {"algorithm": "proximal_gradient", "layers": 1},
    }  # fmt: skip
    for w in ([0.0, 0, 0], [1, 2, -1e-9], [3, 0, 1]):
        unroll.compile(spec, parameters={"w": scale * torch.tensor(w)})
    for w in ([-1.0, -1, -1], [1, 2, -1e-2]):
        with pytest.raises(UnrollError, match="E403.*'w' is declared positive"):
            unroll.compile(spec, parameters={"w": scale * torch.tensor(w)})


@pytest.mark.parametrize("rows", [5, 3])
def test_columns_are_what_orthonormal_is_about(rows: int) -> None:
    """Tall or square; a column of another length, or two that are not at right angles, are refused."""
    spec = {
        "dims": {"m": rows, "n": 3}, "variables": {"z": ["n"]}, "inputs": {"x": ["m"]},
        "parameters": {"O": {"shape": ["m", "n"], "orthonormal": True}}, "minimize": {"f": "1/2 * sumsq(x - O @ z)"},
        "unroll": {"algorithm": "gradient_descent", "layers": 1},
    }  # fmt: skip
    q = torch.linalg.qr(torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    assert unroll.compile(spec, parameters={"O": q}).given["O"].shape == (rows, 3)
    for wrong in (q * torch.tensor([1.0, 1.0, 1.1]), q + 0.1 * q.roll(1, 1)):
        with pytest.raises(UnrollError, match="declared orthonormal"):
            unroll.compile(spec, parameters={"O": wrong})
