"""Learn a dictionary from data: minimise over A with unit columns and over z   Σᵢ ½‖xᵢ − A zᵢ‖² + (what `code` adds).

Alternates a sparse code of a batch, `code(x, A)`, with exact steps in one column of A after the other, on the sums
zz, xz of all batches so far (older ones fade out).
Source: Mairal, Bach, Ponce & Sapiro 2010, JMLR 11:19-60, algorithms 1 and 2.
Legend: B batch, m signal, n atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unroll.errors import SpecError
from unroll.spec.schema import Dictionary
from unroll.train.samples import generator

Code = Callable[[Tensor, Tensor], Tensor]


def learn_dictionary(x: Tensor, atoms: int, code: Code, settings: Dictionary) -> Tensor:
    """A: (m, n = atoms), unit columns.  x: (N, m).  code(x_Bm, A_mn) -> z_Bn.  Raises SpecError E504, E509."""
    *_, a = alternate(x, atoms, code, settings)
    return a


def alternate(x: Tensor, atoms: int, code: Code, settings: Dictionary) -> Iterator[Tensor]:
    """The dictionary after each round, `settings.rounds` of them; deterministic by seed."""
    draw = generator(settings.seed)
    a = first_atoms(x, atoms, draw)
    zz, xz = x.new_zeros(atoms, atoms), x.new_zeros(x.shape[1], atoms)
    use = x.new_zeros(atoms)
    for t in range(settings.rounds):
        batch = x[torch.randint(len(x), (min(settings.batch, len(x)),), generator=draw).to(x.device)]
        z = code(batch, a)
        if not bool(z.isfinite().all()):
            raise SpecError("E509", f"the dictionary's sparse codes are not finite in round {t + 1}")
        keep = (t / (t + 1)) ** 2  # early batches were coded with a poor A
        zz, xz = keep * zz + z.mT @ z / len(z), keep * xz + batch.mT @ z / len(z)
        use = keep * use + (1 - keep) * (z != 0).to(use).mean(0)
        a = column_steps(a, zz, xz)
        dead = (use < settings.unused).nonzero().flatten()
        if len(dead) and t + 1 < settings.rounds:
            a, zz, xz, use = _replace(dead, batch, batch - z @ a.mT, a, zz, xz, use)
        yield a


def first_atoms(x: Tensor, atoms: int, draw: torch.Generator) -> Tensor:
    """Distinct samples, scaled to length 1, as columns: (m, atoms). Raises SpecError E504 if there are too few."""
    usable = x[x.norm(dim=1) > 0]
    if len(usable) < atoms:
        raise SpecError("E504", f"data: {atoms:,} atoms cannot start from {len(usable):,} samples that are not zero")
    chosen = usable[torch.randperm(len(usable), generator=draw)[:atoms].to(x.device)]
    return (chosen / chosen.norm(dim=1, keepdim=True)).mT.contiguous()


def column_steps(a: Tensor, zz: Tensor, xz: Tensor, sweeps: int = 1) -> Tensor:
    """aⱼ <- unit(aⱼ + (xzⱼ − A zzⱼ) / zzⱼⱼ), column after column.

    Each minimises ½ tr(A'A zz) − tr(A' xz) over its column on the unit sphere, so the sum never grows.
    """
    a = a.clone()
    for _ in range(sweeps):
        for j in (zz.diagonal() > 1e-10).nonzero().flatten().tolist():
            column = a[:, j] + (xz[:, j] - a @ zz[:, j]) / zz[j, j]
            a[:, j] = column / column.norm().clamp_min(1e-12)
    return a


def _replace(
    dead: Tensor, x: Tensor, residual: Tensor, a: Tensor, zz: Tensor, xz: Tensor, use: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unused atoms become the worst coded samples; their statistics are forgotten and they count as used a while."""
    worst = residual.norm(dim=1).argsort(descending=True)[: len(dead)]
    dead = dead[: len(worst)]
    a, zz, xz, use = a.clone(), zz.clone(), xz.clone(), use.clone()
    a[:, dead] = (x[worst] / x[worst].norm(dim=1, keepdim=True).clamp_min(1e-12)).mT
    zz[dead], zz[:, dead], xz[:, dead] = 0, 0, 0
    use[dead] = use.mean()
    return a, zz, xz, use
