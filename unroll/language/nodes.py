"""Matrix expressions: a small closed set of frozen, hash-consed, shape-checked nodes.

Everything is a matrix (rows, cols): a vector is a column (n, 1), a scalar is (1, 1). Dims and coefficients are SymPy
expressions. Two expressions are equal exactly when they are the same object, so `is`, `==` and dictionaries are cheap.
Only `constructors.py` builds nodes: it keeps the normal form.

    leaves       Sym, Member, Eye, Ones, Zero
    matrices     Add, Mul, Transpose, Inverse, Map, Diag, Diagonal, Softmax, SpectralMap, Op, Spectrum, Signal, Hold, Noise,
                 Normalise, Prox, ProxMap, Multiplier, Sweep, SpectralProx, Project, Sorted, Worked, Curve
    families     FamilySum, FamilyLogSumExp (bind an index), FamilySoftmax (shares among the members of a free index)
    scalars      Sum, Trace, LogDet, LogSumExp, Max, Spectral, SpectralNorm, SpectralDivergence, Indicator   (Sum, LogSumExp, Max: also along an axis)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, Protocol, cast

import sympy as sp

Role = Literal["variable", "input", "parameter", "state", "learned"]
Norm = Literal["layer_norm", "rms_norm", "sphere"]
Axis = Literal[0, 1] | None
Shape = tuple[sp.Expr, sp.Expr]
ONE = sp.Integer(1)


class ShapeError(ValueError):
    """Shapes that do not fit; the parser adds the place in the spec."""


# --- dims, scalars and placeholders -----------------------------------------------------------------------------------


@cache
def dim(name: str) -> sp.Symbol:
    """A size: a positive integer."""
    return sp.Symbol(name, integer=True, positive=True)


@cache
def scalar(name: str, positive: bool = False) -> sp.Symbol:
    """A real scalar of the problem, such as a weight or a step size."""
    return sp.Symbol(name, positive=True) if positive else sp.Symbol(name, real=True)


@cache
def slot(i: int) -> sp.Symbol:
    """Placeholder of the i-th argument in the profile of a `Map`."""
    return sp.Symbol(f"_{i}", real=True)


def same(a: sp.Expr, b: sp.Expr) -> bool:
    """Are two sizes equal as formulas?"""
    return a == b or sp.expand(a - b) == 0


# --- nodes ------------------------------------------------------------------------------------------------------------

_interned: dict[tuple[Any, ...], Expr] = {}


class Arithmetic(Protocol):
    """What Python's operators make of expressions: the constructors, which stand above this file (see `unroll.language`)."""

    def add(self, *terms: Expr) -> Expr: ...
    def scale(self, c: Any, e: Expr) -> Expr: ...
    def times(self, a: Expr, b: Expr) -> Expr: ...
    def matmul(self, *parts: Expr, coef: Any = 1) -> Expr: ...
    def transpose(self, e: Expr) -> Expr: ...
    def constant(self, value: Any, rows: Any = 1, cols: Any = 1) -> Expr: ...


@dataclass(frozen=True, eq=False, repr=False)
class Expr:
    """A matrix expression. `rows`, `cols` are SymPy expressions; nodes are interned, so identity is equality."""

    arithmetic: ClassVar[Arithmetic]
    printer: ClassVar[Callable[[Expr], str]]

    @cached_property
    def shape(self) -> Shape:
        raise AssertionError("every node defines its shape")

    @property
    def rows(self) -> sp.Expr:
        return self.shape[0]

    @property
    def cols(self) -> sp.Expr:
        return self.shape[1]

    @property
    def is_scalar(self) -> bool:
        return self.shape == (ONE, ONE)

    @cached_property
    def children(self) -> tuple[Expr, ...]:
        found: list[Expr] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Expr):
                found.append(value)
            elif isinstance(value, tuple):
                found.extend(v for v in cast(tuple[Any, ...], value) if isinstance(v, Expr))
        return tuple(found)

    @cached_property
    def key(self) -> str:
        """Total, reproducible order of expressions: simple before compound, then by text."""
        parts = [_key(getattr(self, f.name)) for f in fields(self)]
        return f"{len(_LEVELS) - _LEVELS.get(type(self).__name__, 0):02d}{type(self).__name__}({','.join(parts)})"

    @cached_property
    def symbols(self) -> frozenset[Sym]:
        """All matrix symbols, families included."""
        own = frozenset({self}) if isinstance(self, Sym) else frozenset[Sym]()
        return own.union(*(c.symbols for c in self.children))

    @cached_property
    def moving(self) -> frozenset[Sym]:
        """The symbols that a derivation sees: not those within `Hold`, which is constant for it."""
        if isinstance(self, Hold):
            return frozenset()
        own = frozenset({self}) if isinstance(self, Sym) else frozenset[Sym]()
        return own.union(*(c.moving for c in self.children))

    @cached_property
    def scalars(self) -> frozenset[sp.Symbol]:
        """All scalar symbols in coefficients and profiles (not sizes in shapes, not placeholders)."""
        own: set[sp.Symbol] = set()
        for f in fields(self):
            own |= _scalar_symbols(getattr(self, f.name))
        return frozenset(s for s in own if not s.name.startswith("_")).union(*(c.scalars for c in self.children))

    def __repr__(self) -> str:
        return type(self).printer(self)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Expr:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return intern, (type(self), *(getattr(self, f.name) for f in fields(self)))

    # The operators of the language, so that Python users can write what a spec writes.
    def __add__(self, other: Expr | sp.Expr | float) -> Expr:
        return self.arithmetic.add(self, self._like(other))

    def __radd__(self, other: sp.Expr | float) -> Expr:
        return self._like(other) + self

    def __sub__(self, other: Expr | sp.Expr | float) -> Expr:
        return self + -self._like(other)

    def __rsub__(self, other: sp.Expr | float) -> Expr:
        return self._like(other) + -self

    def __neg__(self) -> Expr:
        return self.arithmetic.scale(-1, self)

    def __matmul__(self, other: Expr) -> Expr:
        return self.arithmetic.matmul(self, other)

    def __mul__(self, other: Expr | sp.Expr | float) -> Expr:
        return self.arithmetic.times(self, other) if isinstance(other, Expr) else self.arithmetic.scale(other, self)

    def __rmul__(self, other: sp.Expr | float) -> Expr:
        return self.arithmetic.scale(other, self)

    @property
    def T(self) -> Expr:
        return self.arithmetic.transpose(self)

    def _like(self, value: Expr | sp.Expr | float) -> Expr:
        return value if isinstance(value, Expr) else self.arithmetic.constant(value, *self.shape)


def _key(value: Any) -> str:
    if isinstance(value, Expr):
        return value.key
    if isinstance(value, tuple):
        return "(" + ",".join(_key(v) for v in cast(tuple[Any, ...], value)) + ")"
    return str(value)


def _scalar_symbols(value: Any) -> set[sp.Symbol]:
    if isinstance(value, sp.Basic):
        return {s for s in value.free_symbols if isinstance(s, sp.Symbol)}
    if isinstance(value, tuple):
        return set[sp.Symbol]().union(*(_scalar_symbols(v) for v in cast(tuple[Any, ...], value)))
    return set()


@dataclass(frozen=True, eq=False, repr=False)
class Sym(Expr):
    """A named matrix. `rank`: how it was declared, 0 scalar, 1 vector, 2 matrix; `family`: size of its index set, or None."""

    name: str
    nrows: sp.Expr
    ncols: sp.Expr
    role: Role
    rank: int = 2
    family: sp.Expr | None = None
    props: frozenset[str] = frozenset()

    @cached_property
    def shape(self) -> Shape:
        return self.nrows, self.ncols

    @property
    def as_written(self) -> bool:
        """Has the tensor that a user gives or gets the axes of the matrix in their order? Else columns, as tokens, come first."""
        return self.role == "parameter" or "as_written" in self.props

    @property
    def stored(self) -> Shape:
        """Its sizes in the order of that tensor."""
        return self.shape if self.as_written else (self.ncols, self.nrows)


@dataclass(frozen=True, eq=False, repr=False)
class Member(Expr):
    """U[k]: one member of a family; `index` is bound by the `FamilySum` around it."""

    of: Sym
    index: str

    @cached_property
    def shape(self) -> Shape:
        return self.of.shape


@dataclass(frozen=True, eq=False, repr=False)
class Eye(Expr):
    """I(n). Eye(1) is the number 1."""

    n: sp.Expr

    @cached_property
    def shape(self) -> Shape:
        return self.n, self.n


@dataclass(frozen=True, eq=False, repr=False)
class Ones(Expr):
    nrows: sp.Expr
    ncols: sp.Expr

    @cached_property
    def shape(self) -> Shape:
        return self.nrows, self.ncols


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Expr):
    nrows: sp.Expr
    ncols: sp.Expr

    @cached_property
    def shape(self) -> Shape:
        return self.nrows, self.ncols


@dataclass(frozen=True, eq=False, repr=False)
class Add(Expr):
    """Sum of at least two terms of one shape, in the order of their keys."""

    terms: tuple[Expr, ...]

    @cached_property
    def shape(self) -> Shape:
        return self.terms[0].shape


@dataclass(frozen=True, eq=False, repr=False)
class Mul(Expr):
    """coef * F1 @ F2 @ ...: at least one factor, none of them a `Mul`; one factor only if coef is not 1."""

    coef: sp.Expr
    factors: tuple[Expr, ...]

    @cached_property
    def shape(self) -> Shape:
        return self.factors[0].rows, self.factors[-1].cols


@dataclass(frozen=True, eq=False, repr=False)
class Transpose(Expr):
    """Transpose of a node through which it cannot be pushed."""

    x: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.x.cols, self.x.rows


class _Keeping(Expr):
    """What is as large as its child x."""

    x: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.x.shape


@dataclass(frozen=True, eq=False, repr=False)
class Inverse(_Keeping):
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Map(Expr):
    """Elementwise: entry (i, j) is profile(_0, _1, ...) at the entries of the arguments; a size-1 axis is repeated."""

    profile: sp.Expr
    args: tuple[Expr, ...]

    @cached_property
    def shape(self) -> Shape:
        return broadcast(*(a.shape for a in self.args))


@dataclass(frozen=True, eq=False, repr=False)
class Diag(Expr):
    """diag(v): the square matrix with the vector v on its diagonal."""

    x: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.x.rows, self.x.rows


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Expr):
    """diagonal(M): the diagonal of a square matrix, as a column."""

    x: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.x.rows, ONE


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(_Keeping):
    """exp(x) / sum of exp(x) along `axis` (0: down the columns). causal: entry i counts only for i <= j, j the column (axis 0)
    or row (axis 1)."""

    x: Expr
    axis: Literal[0, 1]
    causal: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class SpectralMap(_Keeping):
    """U diag(h(s)) V' for x = U diag(s) V', h the profile in _0."""

    profile: sp.Expr
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Op(Expr):
    """A linear operator applied to x: `difference` maps a column of n entries to the n - 1 differences of neighbours,
    `running_sum` sums each row from its start (its adjoint: to its end), `repeat` writes each entry of a column T times,
    `groups` is a column cut into columns of T entries (its adjoint: these below one another),
    `first` keeps the first T entries of a column, 0 after its last (its adjoint: as many as it had), `shifts` gives all T cyclic shifts of each column. sizes: of the axes of the T places, which cycle; a column is channels by places.
    """

    name: str
    x: Expr
    adjoint: bool = False
    sizes: tuple[sp.Expr, ...] = ()

    @cached_property
    def shape(self) -> Shape:
        return operator_shape(self.name, self.x.shape, self.adjoint, self.sizes)


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Expr):
    """The frequency `index` of the orthonormal Fourier transform over places: real c T rows become c complex ones."""

    index: str
    sizes: tuple[sp.Expr, ...]
    x: Expr
    conjugate: bool = False

    @cached_property
    def shape(self) -> Shape:
        return self.x.rows / sp.Mul(*self.sizes), self.x.cols


@dataclass(frozen=True, eq=False, repr=False)
class Signal(Expr):
    """The inverse of Spectrum: c complex rows at each frequency `index` become c T rows, of which the real part is taken."""

    index: str
    sizes: tuple[sp.Expr, ...]
    body: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.body.rows * sp.Mul(*self.sizes), self.body.cols


@dataclass(frozen=True, eq=False, repr=False)
class Hold(_Keeping):
    """stop_gradient(x): the value of x, a constant for every derivative."""

    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Normalise(_Keeping):
    """Columns (axis 0) or rows (axis 1) of x normalised, entry by entry scaled by `weight` and moved by `bias` (as long as they are).

    layer_norm: (x - mean) / sqrt(variance + eps).  rms_norm: x / sqrt(mean of squares + eps).  sphere: x / max(norm, eps).
    """

    kind: Norm
    axis: Literal[0, 1]
    eps: sp.Expr
    x: Expr
    weight: Expr
    bias: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Noise(_Keeping):
    """x, of which training leaves out a share `rate` by chance: single entries (dropout), or all of a sample (drop_path)."""

    kind: Literal["dropout", "drop_path"]
    rate: sp.Expr
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Prox(Expr):
    """argmin over `variable` of t * term + |variable - at|^2 / 2. `swaps`: scalar sub-expressions of the derived formula that
    parameters have taken the place of."""

    term: Expr
    variable: Sym
    t: sp.Expr
    at: Expr
    swaps: tuple[tuple[sp.Expr, sp.Expr], ...] = ()

    @cached_property
    def shape(self) -> Shape:
        return self.at.shape


@dataclass(frozen=True, eq=False, repr=False)
class ProxMap(Expr):
    """A derived scalar prox applied elementwise to args[0]. Its further scalars are SymPy symbols, except that `slots`
    (ordered scalar names) take the values of args[1:]. A size-1 axis is repeated."""

    prox: Any
    args: tuple[Expr, ...]
    slots: tuple[sp.Symbol, ...] = ()

    @cached_property
    def shape(self) -> Shape:
        return broadcast(*(a.shape for a in self.args))


@dataclass(frozen=True, eq=False, repr=False)
class Multiplier(Expr):
    """The number m of each column at which the sum of a * prox(v - m a) is s: it lies between the least and the largest entry of reach.

    args: v, a, s, reach and the values of the scalars in `slots`; prox, a derived scalar one, as in `ProxMap`.
    """

    prox: Any
    args: tuple[Expr, ...]
    slots: tuple[sp.Symbol, ...] = ()

    @cached_property
    def shape(self) -> Shape:
        return ONE, self.args[0].cols


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Expr):
    """One pass over the entries of `at`, down each column: in turn each goes to the least of a quadratic and what `step` is the prox of,
    the others as they are by then.

    q: the second derivatives of the quadratic.  fall: minus its gradient at `at`.  step: the proximal step of every entry by itself, at
    `entry` with STEP_OF_ENTRY; or `entry` itself, where there is no more than the quadratic.
    """

    q: Expr
    fall: Expr
    at: Expr
    step: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.at.shape


STEP_OF_ENTRY = scalar("_t", positive=True)
"""The number of the proximal step within a `Sweep`."""


def entry(z: Expr) -> Sym:
    """The point, as large as z, of that step."""
    return intern(Sym, "_entry", z.rows, z.cols, "state", 2, None, frozenset())


@dataclass(frozen=True, eq=False, repr=False)
class SpectralProx(_Keeping):
    """U diag(prox(s)) V' for x = U diag(s) V', `prox` a derived scalar prox whose scalars are SymPy symbols."""

    prox: Any
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Project(_Keeping):
    """Nearest point of a set that no scalar prox gives (simplex, stiefel, ...): an operation of the runtime."""

    set: str
    params: tuple[sp.Expr | Expr, ...]
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Sorted(_Keeping):
    """The entries of each column, the largest first."""

    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Worked(Expr):
    """What an operation of `WORKED` makes of its arguments: worked out as a whole, without a derivative."""

    name: str
    args: tuple[Expr, ...]

    @cached_property
    def shape(self) -> Shape:
        return WORKED[self.name](*(a.shape for a in self.args))


WORKED: dict[str, Callable[..., Shape]] = {
    "top": lambda x, share: x,
    "signs": lambda x, seed: x,
    "div": lambda e, x, probes: (ONE, ONE),
    "pinv": lambda x: (x[1], x[0]),
    "svd_u": lambda x: (x[0], _smaller(x)),
    "svd_s": lambda x: (_smaller(x), ONE),
    "svd_v": lambda x: (x[1], _smaller(x)),
    "qr_q": lambda x: (x[0], _smaller(x)),
    "qr_r": lambda x: (_smaller(x), x[1]),
    "eigh_values": lambda x: (x[0], ONE),
    "eigh_vectors": lambda x: x,
}
"""Operations that are worked out as a whole: their shapes."""


def _smaller(shape: Shape) -> sp.Expr:
    return cast(sp.Expr, sp.Min(*shape))


@dataclass(frozen=True)
class Grid:
    """knots places, even from low to high, and the degree of what is between them; straight on beyond. odd: f(-x) = -f(x)."""

    knots: int
    low: float
    high: float
    degree: Literal[1, 3] = 1
    odd: bool = False

    @property
    def width(self) -> float:
        return (self.high - self.low) / (self.knots - 1)

    @property
    def stored(self) -> int:
        """How many numbers say the function: of an odd one, those above 0."""
        return self.knots // 2 if self.odd else self.knots


@dataclass(frozen=True, eq=False, repr=False)
class Curve(_Keeping):
    """Of each entry of x, the function that has these values, or coefficients, at the places of a grid: a column of them, or a row for each row of x."""

    points: Expr
    x: Expr
    grid: Grid


@dataclass(frozen=True, eq=False, repr=False)
class FamilySum(Expr):
    """sum(body for index in size)."""

    index: str
    size: sp.Expr
    body: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.body.shape


@dataclass(frozen=True, eq=False, repr=False)
class FamilyLogSumExp(Expr):
    """logsumexp(body for index in size), entry by entry."""

    index: str
    size: sp.Expr
    body: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.body.shape


@dataclass(frozen=True, eq=False, repr=False)
class FamilySoftmax(_Keeping):
    """exp(x) over the sum of exp(x) of all members of `index`, which stays free; entry by entry."""

    index: str
    size: sp.Expr
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Expr):
    """Sum of all entries (axis None), of each column (0: gives a row) or of each row (1: gives a column)."""

    x: Expr
    axis: Axis = None

    @cached_property
    def shape(self) -> Shape:
        return reduced(self.x.shape, self.axis)


@dataclass(frozen=True, eq=False, repr=False)
class LogSumExp(Expr):
    x: Expr
    axis: Axis = None

    @cached_property
    def shape(self) -> Shape:
        return reduced(self.x.shape, self.axis)


@dataclass(frozen=True, eq=False, repr=False)
class Max(Expr):
    """Largest entry."""

    x: Expr
    axis: Axis = None

    @cached_property
    def shape(self) -> Shape:
        return reduced(self.x.shape, self.axis)


@dataclass(frozen=True, eq=False, repr=False)
class _ToScalar(Expr):
    @cached_property
    def shape(self) -> Shape:
        return ONE, ONE


@dataclass(frozen=True, eq=False, repr=False)
class Trace(_ToScalar):
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class LogDet(_ToScalar):
    """log det of a symmetric positive definite matrix."""

    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Spectral(_ToScalar):
    """Sum of h(s_i) over the singular values of x, h the profile in _0."""

    profile: sp.Expr
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class SpectralNorm(_ToScalar):
    """Largest singular value."""

    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDivergence(_ToScalar):
    """The divergence in x of `SpectralProx(prox, x)`; symmetric: of the same of the eigenvalues of (x + x') / 2."""

    prox: Any
    symmetric: bool
    x: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Indicator(_ToScalar):
    """0 where x lies in the set, infinite elsewhere. `params`: SymPy scalars or matrices of the set."""

    set: str
    params: tuple[sp.Expr | Expr, ...]
    x: Expr


Node = (
    Sym | Member | Eye | Ones | Zero | Add | Mul | Transpose | Inverse | Map | Diag | Diagonal | Softmax | SpectralMap
    | Op | Spectrum | Signal | Hold | Noise | Normalise | Prox | ProxMap | Multiplier | Sweep | SpectralProx | Project | Sorted | Worked | Curve | FamilySum | FamilyLogSumExp | FamilySoftmax | Sum | LogSumExp | Max | Trace | LogDet | Spectral | SpectralNorm | SpectralDivergence | Indicator
)  # fmt: skip

_LEVELS = {"Eye": 9, "Ones": 9, "Sym": 8, "Member": 8, "Transpose": 7, "Mul": 5, "Add": 4}


def intern(cls: type[Expr], *args: Any) -> Any:
    """The one node of this kind with these parts."""
    key = (cls, *args)
    found = _interned.get(key)
    if found is None:
        found = _interned[key] = cls(*args)
    return found


# --- shapes -----------------------------------------------------------------------------------------------------------


def broadcast(*shapes: Shape) -> Shape:
    """The common shape, size-1 axes repeated. Raises ShapeError."""
    out: list[sp.Expr] = [ONE, ONE]
    for shape in shapes:
        for i in (0, 1):
            if out[i] == 1:
                out[i] = shape[i]
            elif shape[i] != 1 and not same(out[i], shape[i]):
                raise ShapeError(f"{show_shape(shapes[0])} against {show_shape(shape)}")
    return out[0], out[1]


def reduced(shape: Shape, axis: Axis) -> Shape:
    return (ONE if axis in (None, 0) else shape[0], ONE if axis in (None, 1) else shape[1])


def operator_shape(name: str, shape: Shape, adjoint: bool = False, sizes: tuple[sp.Expr, ...] = ()) -> Shape:
    """Shape of the value of a linear operator. Raises ShapeError."""
    rows, cols = shape
    match name:
        case "difference":
            return rows + (1 if adjoint else -1), cols
        case "shifts":
            multiple(rows, sizes)
            return rows, multiple(cols, sizes) if adjoint else cols * sp.Mul(*sizes)
        case "repeat":
            return multiple(rows, sizes) if adjoint else rows * sp.Mul(*sizes), cols
        case "first":
            return sizes[0], cols
        case "groups" if adjoint:
            if not same(rows, sizes[0]):
                raise ShapeError(f"groups of {sizes[0]} entries have as many rows, not {rows}")
            return rows * cols, ONE
        case "groups":
            if cols != 1:
                raise ShapeError(f"groups are of entries of a vector, this is {show_shape(shape)}")
            return sizes[0], multiple(rows, sizes)
        case _:
            return shape


def multiple(n: sp.Expr, sizes: tuple[sp.Expr, ...]) -> sp.Expr:
    """n / (the number of places). Raises ShapeError where that is not known to be a whole number."""
    found = sp.cancel(n / sp.Mul(*sizes))
    if found.is_integer is not True:
        raise ShapeError(
            f"{n} is not a multiple of {sp.Mul(*sizes)}: what has parts of one size is declared as a product, as in [c*T, N]"
        )
    return found


def show_shape(shape: Shape) -> str:
    """(n, 1) -> 'n', (1, 1) -> 'a scalar', (m, n) -> 'm × n'."""
    rows, cols = shape
    if cols == 1:
        return "a scalar" if rows == 1 else f"{rows} × 1"
    return f"{rows} × {cols}"


# --- reading ----------------------------------------------------------------------------------------------------------


def walk(e: Expr, within: Callable[[Expr], bool] = lambda e: True) -> Iterable[Expr]:
    """Every distinct sub-expression, children before parents. within: of which nodes the children are looked at."""
    seen: dict[Expr, None] = {}
    stack: list[tuple[Expr, bool]] = [(e, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            seen[node] = None
        elif node not in seen:
            stack.append((node, True))
            stack.extend((c, False) for c in reversed(node.children) if within(node))
    return list(seen)


def depends(e: Expr, on: Sym) -> bool:
    """Does e change with `on`, for a derivation? What is held does not."""
    return on in e.moving


def mentions(e: Expr, index: str) -> bool:
    """Does e contain a member with this free index?"""
    match e:
        case Member(_, i):
            return i == index
        case Spectrum(i, _, _, _) if i == index:
            return True
        case FamilySum(i, _, _) | FamilyLogSumExp(i, _, _) | Signal(i, _, _) if i == index:
            return False
        case _:
            return any(mentions(c, index) for c in e.children)


def bound_indices(e: Expr) -> frozenset[str]:
    """The indices of all sums over families in e."""
    return frozenset(x.index for x in walk(e) if isinstance(x, FamilySum | FamilyLogSumExp | Signal))


def free_indices(e: Expr) -> frozenset[str]:
    return frozenset(x.index for x in walk(e) if isinstance(x, Member | Spectrum) and mentions(e, x.index))


def complex_valued(e: Expr) -> bool:
    """Does e depend on a frequency?"""
    return isinstance(e, Spectrum) or (not isinstance(e, Signal | LogDet) and any(map(complex_valued, e.children)))
