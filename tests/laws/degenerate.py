"""What every function, set, algorithm and a network of each kind does with degenerate inputs: `python -m tests.laws.degenerate`.

An answer is right if it is finite, as are its slopes in the input and in every parameter, and if one blank sample leaves the answers
of the others alone and adds its own slopes to theirs (a parameter that is a bias moves the answer of a blank sample too); a refusal in
words is right as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import unroll
from unroll.language.functions import SETS

N, D = 4, 4
THIN = ((1, N), (D, 1), (1, 1))
"""One row, one column, one entry."""


@dataclass(frozen=True)
class Subject:
    """make: the network for a type.  shape: of one sample."""

    name: str
    make: Callable[[torch.dtype], Any]
    shape: tuple[int, ...] = (N, D)


def loss(formula: str, d: int = D, n: int = N) -> Subject:
    spec = {"dims": {"d": d, "n": n}, "variables": {"Z": ["d", "n"]}, "minimize": {"f": formula}}
    return Subject(f"{formula}{_size(d, n)}", lambda dtype: _each(unroll.loss(spec)), (n, d))


def _size(d: int, n: int) -> str:
    return "" if (d, n) == (D, N) else f", {d} x {n}"


def _each(net: Any) -> Any:
    """The total of the terms, a number for each sample."""
    return lambda z: sum(net.terms(z).values())


FUNCTIONS = (
    "sumsq(Z)", "norm1(Z)", "norm_fro(Z)", "norm_fro(Z)**1.5", "norm_inf(Z)", "norm0(Z)", "norm4(Z)", "group_norm(Z, axis=0)",
    "group_norm(Z, axis=1)", "nuclear(Z)", "spectral(Z)", "rank(Z)", "logdet(I(d) + Z @ Z.T)", "trace(inv(I(d) + Z @ Z.T))",
    "logsumexp(Z)", "sum(softmax(Z, axis=0)**2)", "sum(causal_softmax(Z.T @ Z, axis=0)**2)", "sum(normalize(Z, axis=0)**3)", "max_entry(Z)",
    "sum(layer_norm(Z, axis=0)**3)", "sum(rms_norm(Z, axis=0)**3)", "sum(unit_norm(Z, axis=0)**3)", "sum(running_sum(Z)**2)",
    "sum(huber(Z, 1))", "sum(tanh(Z))", "sum(erf(Z))", "sum(softplus(Z))", "sum(logistic(Z))", "sum(sigmoid(Z))", "sum(sqrt(abs(Z)))",
    "sum(atan(Z))", "sum(sign(Z))", "sum(maximum(Z, 0))", "spectral_sum(log(1 + s), Z)", "sum(spectral_map(s/(1 + s), Z)**2)",
)  # fmt: skip
PARAMETERS = {
    "box": "(0, 1)",
    "ball1": "(1)",
    "ball2": "(1)",
    "ball_inf": "(1)",
    "sparse": "(2)",
    "rank_at_most": "(2)",
}


def projection(name: str, d: int = D, n: int = N) -> Subject:
    spec = {
        "dims": {"d": d, "n": n}, "variables": {"Z": ["d", "n"]}, "inputs": {"X": ["d", "n"]}, "minimize": {"f": "1/2*sumsq(Z - X)"},
        "constraints": [f"Z in {name}{PARAMETERS.get(name, '')}"],
        "unroll": {"algorithm": "projected_gradient", "layers": 2, "step": 0.5, "learn": {"a": {"replaces": "step"}}},
    }  # fmt: skip
    return Subject(f"in {name}{_size(d, n)}", lambda dtype: unroll.compile(spec, dtype=dtype, seed=0), (n, d))


def algorithm(name: str, term: str) -> Subject:
    spec = {
        "dims": {"d": D, "n": N, "m": D}, "variables": {"Z": ["d", "n"]}, "inputs": {"X": ["m", "n"]}, "parameters": {"A": ["m", "d"]},
        "minimize": {"f": "1/2*sumsq(A @ Z - X)", "g": term},
        "unroll": {"algorithm": name, "layers": 3, "learn": {"W": {"replaces": "step * A.T"}}},
    }  # fmt: skip
    return Subject(f"{name} on {term}", lambda dtype: unroll.compile(spec, dtype=dtype, seed=0))


def shipped(name: str, shape: tuple[int, ...], **dims: int) -> Subject:
    make = lambda dtype: unroll.compile(name, dims=dims, overrides=["unroll.layers=2"], dtype=dtype, seed=0)
    return Subject(name, make, shape)


def constructed() -> Subject:
    """A network whose parameters are worked out on data, a blank sample among them."""

    def make(dtype: torch.dtype) -> Any:
        net = unroll.compile("redunet", dims={"d": 8, "K": 2}, overrides=["unroll.layers=2"], dtype=dtype)
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = x / x.norm(dim=1, keepdim=True)
        x[3] = 0
        net.construct(X=x, Pi=torch.nn.functional.one_hot(torch.arange(20) % 2).T.to(dtype))
        return net

    return Subject("redunet", make, (4, 8))


NAMES = [s.name for s in SETS if s.name != "affine"]
SUBJECTS = (
    *map(loss, FUNCTIONS),
    *(loss(f, *thin) for f in FUNCTIONS[:14] for thin in THIN),
    *map(projection, NAMES),
    *(projection(s, *thin) for s in NAMES if s not in ("psd", "orthogonal") for thin in THIN),
    projection("psd", 1, 1),
    projection("orthogonal", 1, 1),
    algorithm("gradient_descent", "sumsq(Z)"),
    *(algorithm(a, t) for a, t in (("proximal_gradient", "nuclear(Z)"), ("fista", "norm1(Z)"), ("proximal_gradient", "group_norm(Z, axis=0)"))),
    shipped("lista", (4,), m=4, n=6),
    shipped("crate", (4, 8), d=8, K=2, p=4),
    shipped("crate_exact", (4, 8), d=8, K=2, p=4),
    shipped("tost_layers", (4, 8), d=8, K=2, p=4),
    shipped("transformer", (4, 8), d=8, K=2, p=4, s=12),
    constructed(),
)  # fmt: skip


def inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Samples, by what is degenerate about them."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    blank, token = x.clone(), x.clone()
    blank[1] = 0
    token[1, 0] = 0
    equal = 3 * torch.eye(*shape) if len(shape) > 1 else torch.ones(shape)
    return {
        "usual": x, "zero": torch.zeros_like(x), "one blank": blank, "a token of zeros": token, "units of 1e-6": 1e-6 * x,
        "units of 1e6": 1e6 * x, "ties": torch.ones_like(x), "equal singular values": equal.expand_as(x),
        "batch of none": x[:0], "one sample": x[0], "float16": x.half(),
    }  # fmt: skip


@cache
def made(subject: Subject, dtype: torch.dtype) -> Any:
    return subject.make(dtype)


def outcome(subject: Subject, kind: str) -> str:
    """ "right", "refused: ...", or what is wrong."""
    x = inputs(subject.shape)[kind]
    try:
        net = made(subject, x.dtype)
        value, slopes = _derived(net, x)
        alone = _derived(net, x[[0, 2]]) if kind == "one blank" else None
    except unroll.UnrollError as e:
        return f"refused: {str(e).splitlines()[0]}"
    except Exception as e:
        return f"WRONG: {type(e).__name__}: {str(e).splitlines()[0]}"
    if not value.isfinite().all():
        return "WRONG: not finite"
    if not all(s.isfinite().all() for s in slopes):
        return "WRONG: a slope is not finite"
    if alone is not None and not _near([value[[0, 2]]], [alone[0]]):
        return "WRONG: the others changed"
    if alone is not None and not _near(
        slopes[1:], [a + b for a, b in zip(alone[1][1:], _derived(net, x[[1]])[1][1:], strict=True)]
    ):
        return "WRONG: slopes of parameters changed"
    return "right"


def _near(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a, b, strict=True))


def _derived(net: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    value = net(x)
    own = list(net.parameters()) if isinstance(net, torch.nn.Module) else []
    if not value.requires_grad:
        return value.detach(), []
    slopes = torch.autograd.grad(value.float().sum(), [x, *own], allow_unused=True)
    return value.detach(), [s for s in slopes if s is not None]


KINDS = tuple(inputs((N, D)))


def table() -> Iterator[str]:
    """A row for each subject, a column for each kind, notes below."""
    yield from (f"{i}  {kind}" for i, kind in enumerate(KINDS))
    yield f"{'':44}{'   '.join(map(str, range(len(KINDS))))}"
    for s in SUBJECTS:
        found = {k: outcome(s, k) for k in KINDS}
        yield f"{s.name:44}{' '.join({'r': 'ok ', 'W': 'NO '}.get(f[0], '?  ') if f[:3] != 'ref' else 'ref' for f in found.values())}"
        yield from dict.fromkeys(f"{'':6}{f}" for f in found.values() if f != "right")


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
