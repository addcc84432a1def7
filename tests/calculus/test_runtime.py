"""Operations written into emitted modules, against scipy, mpmath and polynomial roots."""

from __future__ import annotations

import ast
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import wrightomega

import unroll
from unroll.calculus.torch_functions import RUNTIME, operation, source_of

records = pytest.mark.parametrize("op", RUNTIME, ids=[op.name for op in RUNTIME])


def loaded(name: str) -> Callable[..., torch.Tensor]:
    space: dict[str, object] = {"torch": torch}
    exec(source_of([name]), space)
    return space[name]  # type: ignore[return-value]


@records
def test_a_record_is_whole(op):
    function = ast.parse(op.source).body
    assert len(function) == 1 and isinstance(function[0], ast.FunctionDef) and function[0].name == op.name
    assert ast.get_docstring(function[0]) and op.about and op.shapes and op.origin
    assert operation(op.name) is op
    assert max(map(len, op.source.splitlines())) <= 120


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 4e-14), (torch.float32, 2e-6)])
def test_wright_omega(dtype: torch.dtype, tolerance: float):
    x = np.concatenate([np.linspace(-80, 80, 2001), np.linspace(-1e3, 1e6, 501)])
    ours = loaded("wright_omega")(torch.from_numpy(x).to(dtype)).double().numpy()
    exact = wrightomega(torch.from_numpy(x).to(dtype).double().numpy())
    np.testing.assert_allclose(ours, exact, rtol=tolerance * 50 if dtype == torch.float32 else tolerance, atol=1e-38)


def test_quadratic_root_increases_there_and_does_not_cancel():
    a, b, c = torch.randn(3, 5000, dtype=torch.float64, generator=torch.manual_seed(0))
    real = b * b - 4 * a * c > 1e-3
    a, b, c = a[real], b[real], c[real]
    z = loaded("quadratic_root")(a, b, c)
    assert (2 * a * z + b > 0).all()
    assert ((a * z * z + b * z + c).abs() < 1e-9 * (1 + z * z)).all()
    near = loaded("quadratic_root")(torch.tensor(1.0), torch.tensor(1e3), torch.tensor(-0.1))
    torch.testing.assert_close(near, torch.tensor(9.99999e-5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", [-1, 0, 1])
def test_cubic_root_of_three(which: int):
    """(z − p)(z − q)(z − r), p < q < r, also far apart."""
    scale = 10 ** torch.empty(3000, 3, dtype=torch.float64).uniform_(-3, 3, generator=torch.manual_seed(1))
    roots = (torch.randn(3000, 3, dtype=torch.float64) * scale).sort(dim=1).values
    p, q, r = roots.T
    z = loaded("cubic_root")(which, 1, -(p + q + r), p * q + q * r + r * p, -p * q * r)
    gap = roots.diff(dim=1).min(dim=1).values / roots.abs().max(dim=1).values
    error = (z - roots[:, which + 1]).abs() / roots.abs().max(dim=1).values
    assert error[gap > 1e-3].max() < 1e-10


def test_cubic_root_of_one():
    a, p, m, w = torch.randn(4, 3000, dtype=torch.float64, generator=torch.manual_seed(2))
    quadratic = (m**2 + w**2 + 0.1, -2 * m)  # (z − m)² + w² + 0.1
    coefficients = (a, a * (quadratic[1] - p), a * (quadratic[0] - p * quadratic[1]), -a * p * quadratic[0])
    for which in (-1, 0, 1):
        z = loaded("cubic_root")(which, *coefficients)
        assert ((z - p).abs() < 1e-8).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_only_cubic_root_is_right_to_its_last_digits(dtype: torch.dtype):
    """z³ + p z = q, p > 0, of all sizes of q: the cube roots of Cardano alone are off by 4e-11, in float32 by 2 %."""
    z = 10 ** torch.linspace(-4, 2, 4000, dtype=torch.float64)
    p = torch.linspace(0.1, 5, 4000, dtype=torch.float64).roll(1234)
    found = loaded("cubic_root")(1, 1, 0, p.to(dtype), -(z**3 + p * z).to(dtype)).double()
    assert ((found - z).abs() / z).max() < 8 * torch.finfo(dtype).eps


def test_cubic_root_in_single_precision_does_not_cancel():
    """z³ − v z² − c with v ≪ 0: the positive root is about √(c/|v|)."""
    v = -torch.logspace(0, 3, 50)
    z = loaded("cubic_root")(1, 1, -v, 0, -torch.ones(50))
    exact = [max(np.roots([1, -x, 0, -1.0]).real) for x in v.double().tolist()]
    torch.testing.assert_close(z, torch.tensor(exact, dtype=torch.float32), rtol=1e-5, atol=0)


def test_bracketed_root_finds_the_zero_or_stays_at_the_end():
    x = torch.linspace(-30, 30, 101, dtype=torch.float64)
    z = loaded("bracketed_root")(lambda z: z + z**5 - x, lambda z: 1 + 5 * z**4, -30, 30, x)
    assert (z + z**5 - x).abs().max() < 1e-12
    ends = loaded("bracketed_root")(lambda z: z - x, torch.ones_like, -1, 2, x)
    torch.testing.assert_close(ends, x.clamp(-1, 2))
    assert loaded("bracketed_root")(lambda z: z - x, torch.ones_like, -1, 2, x * torch.nan).isnan().all()


@records
def test_operations_compile_to_one_graph(op):
    torch.compiler.reset()
    function = loaded(op.name)
    x = torch.linspace(0.1, 2, 20)
    calls = {
        "wright_omega": lambda x: function(x),
        "quadratic_root": lambda x: function(x, -1, -x),
        "cubic_root": lambda x: function(1, 1, 0, 1, -x),
        "bracketed_root": lambda x: function(lambda z: z + z**3 - x, lambda z: 1 + 3 * z * z, 0, 2, x),
    }
    call = calls[op.name]
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_a_root_with_plain_numbers_takes_the_kind_of_the_tensor_among_them() -> None:
    """As where step and weight are numbers: the prox of 0.3 sum sqrt|z|, whose only tensor is not the last argument."""
    spec = {
        "dims": {"n": 3},
        "variables": {"z": ["n"]},
        "inputs": {"x": ["n"]},
        "minimize": {"f": "1/2*sumsq(x - z)", "l": "0.3*sum(sqrt(abs(z)))"},
    }
    how = {"algorithm": "proximal_gradient", "layers": 1, "step": 1}
    x, grid = torch.tensor([[2.0, -0.1, 0.7]], dtype=torch.float64), torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    for v, z in zip(x[0], unroll.compile({**spec, "unroll": how}, dtype=torch.float64)(x)[0], strict=True):
        cost = lambda u, v=v: 0.3 * u.abs().sqrt() + (u - v) ** 2 / 2
        assert cost(z) <= cost(grid).min() + 1e-9
