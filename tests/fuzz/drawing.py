"""A random spec as a user would write it: YAML text, and values for all that it declares."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
import yaml
from torch import Tensor

from .oracle import Size

Shape = tuple[str, str]
SCALARS = {"lam": 0.3, "mu": 0.45}
CONSTANTS = ("2", "0.5", "1/3", "lam", "mu", "0.1", "3", "1e-3", "0.30000000000000004", "1.7")

PLAIN = (
    "abs({u})", "exp({u})", "tanh({u})", "sinh({u})", "cosh({u})", "atan({u})", "erf({u})", "sin({u})", "cos({u})",
    "sigmoid({u})", "softplus({u})", "logistic({u})", "pos({u})", "({u})**2", "({u})**3", "({u})**4", "abs({u})**1.5",
    "huber({u}, {c})", "maximum({u}, {c})", "minimum({u}, {c})", "where(abs({u}) <= 1, ({u})**2, 2*abs({u}) - 1)",
    "where({u} > 0, {u}, 0.1*({u}))", "1/(1 + ({u})**2)", "({u})/(1 + abs({u}))", "exp(-({u})**2)", "log(1 + ({u})**2)",
    "sqrt(1 + ({u})**2)", "log(1 + abs({u})/{c})", "log(1 + exp({u}))", "log(exp({u}) + exp(-({u})))", "-log(sigmoid({u}))",
    "minimum(abs({u}), {c})", "{c}*({u})", "({u}) - {c}", "({u}) + {c}", "log(cosh({u}))", "abs(abs({u}) - 1)",
)  # fmt: skip
EDGED = ("log({u})", "sqrt({u})", "({u})*log({u})", "sqrt(abs({u}))", "1/({u})", "log(({u})**2)", "({u})**1.5")
"""Formulas with an edge of their domain, or a slope without bound."""
PAIRED = (
    "{f} + {g}", "{f} - {g}", "({f})*({g})", "({f})/(1 + ({g})**2)", "maximum({f}, {g})", "minimum({f}, {g})",
    "{c}*({f}) + {d}*({g})", "where({u} > {c}, {f}, {g})",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A spec and its values: tensors (rows, cols), families (K, rows, cols); `variable` has no value."""

    document: dict[str, Any]
    values: dict[str, Tensor]
    variable: str
    size: tuple[int, int]

    @property
    def yaml(self) -> str:
        return yaml.safe_dump(self.document, sort_keys=False, width=1000, allow_unicode=True)

    @property
    def names(self) -> dict[str, Any]:
        """What the formulas read, for the oracle."""
        families = {n: list(v) if v.ndim == 3 else v for n, v in self.values.items()}
        return {**{n: Size(v) for n, v in self.document["dims"].items()}, **SCALARS, **families}

    def point(self, seed: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(self.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def with_unroll(self, **unroll: Any) -> Case:
        return replace(self, document={**self.document, "unroll": unroll})

    def without(self, name: str) -> Case:
        terms = {n: f for n, f in self.document["minimize"].items() if n != name}
        return replace(self, document={**self.document, "minimize": terms})


VECTOR: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "A": ("parameters", ("m", "n"), {}),
    "S": ("parameters", ("n", "n"), {"symmetric": True}),
    "M": ("parameters", ("n", "n"), {}),
    "Q": ("parameters", ("n", "p"), {"orthonormal": True}),
    "c": ("parameters", ("n",), {"positive": True}),
    "b": ("parameters", ("m",), {}),
    "U": ("parameters", ("K", "n", "p"), {}),
    "x": ("inputs", ("m",), {}),
    "y": ("inputs", ("n",), {}),
    "w": ("inputs", ("n",), {}),
}
MATRIX: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    **{n: VECTOR[n] for n in ("A", "S", "M", "Q", "c", "U")},
    "C": ("parameters", ("n", "N"), {"positive": True}),
    "B": ("parameters", ("N", "p"), {}),
    "X": ("inputs", ("m", "N"), {}),
    "Y": ("inputs", ("n", "N"), {}),
    "W": ("inputs", ("n", "N"), {}),
}


@dataclass
class Author:
    """Writes formulas for one variable, z (n) or Z (n x N), from a key: the same key, the same text."""

    key: str
    most: int = 4
    shape: tuple[int, int] | None = None
    matrix: bool = False
    pick: Random = field(init=False)
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.pick = Random(self.key)
        self.matrix = self.matrix or self.pick.random() < 0.45
        draw = lambda: self.pick.choice((1, 2, 3, 3, 4, 5)[: self.most + 2])
        self.sizes = {"n": draw(), "m": draw(), "N": draw() if self.matrix else 1, "K": 2}
        self.sizes["p"] = self.pick.randint(1, self.sizes["n"])

    @property
    def z(self) -> str:
        return "Z" if self.matrix else "z"

    @property
    def declared(self) -> dict[str, tuple[str, tuple[str, ...], dict[str, Any]]]:
        return MATRIX if self.matrix else VECTOR

    def one(self, *options: Callable[[], Any] | str) -> Any:
        found = self.pick.choice(options)
        return found if isinstance(found, str) else found()

    def constant(self) -> str:
        return self.pick.choice(CONSTANTS)

    # --- formulas of one number

    def formula(self, u: str, depth: int = 1, edged: float = 0.05) -> str:
        """A scalar formula of u."""
        if depth <= 0:
            return self.pick.choice((u, u, f"{self.constant()}*({u})", f"({u}) - {self.constant()}"))
        if self.pick.random() < 0.3:
            f, g = self.formula(u, depth - 1, edged), self.formula(u, depth - 1, edged)
            return self.pick.choice(PAIRED).format(u=f"({u})", f=f, g=g, c=self.constant(), d=self.constant())
        options = EDGED if self.pick.random() < edged else PLAIN
        inner = u if depth == 1 else self.formula(u, depth - 1, edged)
        return self.pick.choice(options).format(u=inner, c=self.constant())

    # --- tensors of the variable

    def data(self, shape: Shape) -> str | None:
        rows = [n for n, (_, s, p) in self.declared.items() if ((*s, "1")[:2] if len(s) < 3 else None) == shape]
        return self.pick.choice(rows) if rows else None

    def linear(self) -> tuple[str, Shape]:
        """An affine map of the variable."""
        z, cols = self.z, "N" if self.matrix else "1"
        maps: list[tuple[str, Shape]] = [(z, ("n", cols))] * 3
        maps += [(f"A @ {z}", ("m", cols))] * 3
        maps += [(f"S @ {z}", ("n", cols)), (f"M @ {z}", ("n", cols)), (f"Q.T @ {z}", ("p", cols))]
        maps += [(f"2*{z}", ("n", cols)), (f"-A @ {z}", ("m", cols)), (f"lam*{z}", ("n", cols))]
        if self.matrix:
            maps += [
                ("Z.T", ("N", "n")),
                ("Z @ B", ("n", "p")),
                ("A @ Z @ B", ("m", "p")),
                ("running_sum(Z)", ("n", "N")),
            ]
            maps += [("diag(c) @ Z", ("n", "N")), ("C*Z", ("n", "N")), ("W*Z", ("n", "N"))]
        else:
            maps += [("c*z", ("n", "1")), ("w*z", ("n", "1")), ("diag(w) @ z", ("n", "1"))]
        text, shape = self.pick.choice(maps)
        away = self.data(shape)
        if away is not None and self.pick.random() < 0.45:
            text = self.pick.choice((f"{text} - {away}", f"{away} - {text}", f"{text} + {away}"))
        return text, shape

    def tensor(self, depth: int) -> tuple[str, Shape]:
        """A tensor of the variable, curved where there is depth left."""
        text, (rows, cols) = self.linear()
        if depth <= 0 or self.pick.random() < 0.6:
            return text, (rows, cols)
        axis = self.pick.randrange(2) if self.matrix else 0
        made = self.one(
            lambda: self.formula(f"({text})"),
            f"softmax({text}, axis={axis})",
            f"normalize({text}, axis={axis})",
            f"layer_norm({text}, axis={axis}, eps=0.1)",
            f"rms_norm({text}, axis={axis}, eps=0.01)",
            f"inv(I({rows}) + ({text}) @ ({text}).T) @ ({text})",
            f"({text}) * stop_gradient({text})",
        )
        return made, (rows, cols)

    def smooth(self, depth: int = 1) -> str:
        """A number of the variable, with a gradient almost everywhere."""
        t, (rows, cols) = self.tensor(depth)
        t2 = self.one(lambda: self.data((rows, cols)) or t, t)
        axis = self.pick.randrange(2) if self.matrix else 0
        weight = self.data((rows, cols)) or "2"
        inner = "U[k].T @ " + self.z
        return self.one(
            f"{self.constant()}*sumsq({t})",
            f"sumsq({t})",
            lambda: f"sum({self.formula(f'({t})', 1)})",
            lambda: f"sum({self.formula(f'({t})', 2)})",
            lambda: f"sum({weight}*({self.formula(f'({t})', 1)}))",
            f"logsumexp({t})",
            f"sum(logsumexp({t}, axis={axis}))",
            f"norm_fro({t})" if self.matrix else f"norm2({t})",
            f"norm4({t})",
            f"huber(norm_fro({t}), {self.constant()})",
            f"group_norm({t}, axis={axis})",
            f"logdet(I({rows}) + {self.constant()}*({t}) @ ({t}).T)",
            f"sum(logdet(I(p) + {inner} @ ({inner}).T) for k in K)",
            f"sum(sumsq({inner}) for k in K)",
            f"sum(logsumexp({inner}) for k in K)",
            lambda: f"sum(sum({self.formula(f'({inner})', 1)}) for k in K)",
            f"logsumexp(sumsq({inner}) for k in K)",
            f"dot({t}, {t2})",
            f"trace(({t}).T @ ({t}))",
            f"sumsq({t})/(1 + sumsq({t2}))",
            f"trace(inv(I({rows}) + ({t}) @ ({t}).T))",
            f"entropy(softmax({t}, axis={axis}))",
            f"kl(softplus({t}), exp({t2}))" if t2 != t else f"kl(({t})**2 + 1, ones({rows}, {cols}))",
            lambda: self.formula(f"sumsq({t})", 1),
            f"sumsq(softmax({t}, axis={axis}) - {self.constant()})",
            f"sumsq(({t}).T @ ({t}))",
            f"spectral({t})" if self.pick.random() < 0.3 else f"sumsq({t})",
            f"nuclear({t})" if self.pick.random() < 0.3 else f"norm1({t})",
            f"tv({t})" if self.sizes[rows] > 1 else f"norm1({t})",
            f"norm_inf({t})" if self.pick.random() < 0.3 else f"sum(abs({t})**1.5)",
            f"max_entry({t})" if self.pick.random() < 0.3 else f"sum(pos({t}))",
        )

    # --- terms with a prox

    def proximable(self) -> tuple[dict[str, str], list[str]]:
        """Terms, and constraints, of which a user would ask the prox."""
        z, axis = self.z, self.pick.randrange(2) if self.matrix else 0
        y, weight, norm = ("Y", "C", "norm_fro") if self.matrix else ("y", "c", "norm2")
        terms = [
            self.one(
                f"lam*norm1({z})",
                f"sum({weight}*abs({z}))",
                lambda: f"sum({self.formula(z, 1, 0.1)})",
                lambda: f"sum({self.formula(z, 2, 0.1)})",
                lambda: f"sum({self.formula(f'({z} - {y})', 1)})",
                lambda: f"{self.constant()}*sum({self.formula(z, 1)})",
                lambda: f"sum({weight}*({self.formula(z, 1)}))",
                f"{norm}({z})",
                f"lam*{norm}({z} - {y})",
                f"huber({norm}({z}), {self.constant()})",
                lambda: self.formula(f"{norm}({z})", 1),
                f"{self.constant()}*norm_inf({z})",
                f"{self.constant()}*norm0({z})",
                f"group_norm({z}, axis={axis})" if self.matrix else "lam*norm1(Q.T @ z)",
                "lam*nuclear(Z)" if self.matrix else f"norm1({y} - 2*z)",
                "rank(Z)" if self.matrix else "norm1(z)",
                f"1/2*sumsq(A @ {z} - {'X' if self.matrix else 'x'})",
            )
        ]
        if self.pick.random() < 0.35:
            terms.append(
                self.one(f"mu/2*sumsq({z})", f"dot({y}, {z})", f"mu/2*sumsq({z} - {y})", f"lam*norm1({z})", f"sum({z})")
            )
        sets: list[str] = []
        if self.pick.random() < 0.35:
            sets.append(f"{z} in {self.set()}")
            if self.pick.random() < 0.7:
                terms = []
        return {f"g{i}": t for i, t in enumerate(terms)}, sets

    def set(self) -> str:
        some = [
            "nonneg",
            "box(-0.5, 0.7)",
            "ball_inf(0.8)",
            "simplex",
            "ball1(0.8)",
            "ball2(1.2)",
            "sphere",
            "sparse(1)",
        ]
        if self.matrix:
            some += ["unit_columns", "rank_at_most(1)"]
            some += ["psd"] if self.sizes["n"] == self.sizes["N"] else []
            some += ["stiefel"] if self.sizes["n"] >= self.sizes["N"] else []
        elif self.sizes["m"] <= self.sizes["n"]:
            some += ["affine(A, b)"]
        return self.pick.choice(some)

    # --- the whole

    def case(self, terms: dict[str, str], constraints: list[str] | None = None, start: str = "") -> Case:
        text = " ".join([*terms.values(), *(constraints or []), start])
        used = [n for n in self.declared if re.search(rf"\b{n}\b", text)]
        used = used if any(self.declared[n][0] == "inputs" for n in used) else [*used, "Y" if self.matrix else "y"]
        shape = ["n", "N"] if self.matrix else ["n"]
        document: dict[str, Any] = {
            "dims": self.sizes,
            "variables": {self.z: shape},
            "inputs": {n: list(self.declared[n][1]) for n in used if self.declared[n][0] == "inputs"},
            "parameters": {n: self.entry(n) for n in used if self.declared[n][0] == "parameters"},
            "scalars": {n: {"default": v, "positive": True} for n, v in SCALARS.items()},
            "minimize": terms,
        }
        if constraints:
            document["constraints"] = constraints
        g = torch.Generator().manual_seed(self.pick.randrange(2**31))
        values = {n: self.value(n, g) for n in used}
        return Case(document, values, self.z, (self.sizes["n"], self.sizes["N"]))

    def entry(self, name: str) -> Any:
        _, shape, props = self.declared[name]
        return {"shape": list(shape), **props} if props else list(shape)

    def value(self, name: str, g: torch.Generator) -> Tensor:
        _, shape, props = self.declared[name]
        x = torch.randn([self.sizes[s] for s in shape], generator=g, dtype=torch.float64)
        x = x[:, None] if x.ndim == 1 else x
        if "positive" in props:
            return x.abs() + 0.05
        if "symmetric" in props:
            return (x + x.mT) / 2
        return torch.linalg.qr(x).Q if "orthonormal" in props else x
