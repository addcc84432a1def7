"""Objective -> loss: a module that is the objective itself, to be minimised through whatever makes its variables.

    loss = unroll.loss("mcr2")
    loss(z, members)            # a number: the mean over batch axes; of an objective that is maximised, its negative
    loss.terms(z, members)      # every term as written, per sample

The emitted class needs torch only.  It computes in float32 or better, under autocast too.  A matrix without a Cholesky
factor is an error that names its term.  A determinant of I + c X X' is taken on the smaller side, known when the loss
is built or looked up in each call.  Constraints are left to what makes the variables, and listed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import sympy as sp
import torch
from torch import Tensor, nn

from unroll.calculus import torch_functions as runtime
from unroll.derivation.rewrites.exact import push_through, smaller_side
from unroll.emit.axes import stored_axes, unit_axes
from unroll.emit.names import Names, identifier, remark
from unroll.emit.objective import term_symbols
from unroll.emit.section import Section
from unroll.emit.text import imports, needed
from unroll.errors import UnrollError, did_you_mean
from unroll.language.constructors import rebuild, scale, swap
from unroll.language.nodes import Expr, Indicator, LogDet, Sym, Worked, same, walk
from unroll.language.problem import Problem
from unroll.language.show import pretty, text
from unroll.lower.graph import Graph, lower_terms
from unroll.lower.operations import HELPERS
from unroll.lower.padding import padded
from unroll.lower.passes import Sizes, optimise
from unroll.lower.scalar_text import Text, formula, number
from unroll.network.kinds import check_kind, check_place
from unroll.network.network import layout, load, same_samples, values_of
from unroll.spec import Spec

# --- what a loss is made of -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """problem: without its constraints, determinants on the smaller side where the sizes are known.

    left_out: the constraints.  dims: sizes that are known.  held: parameters that the module has; others are arguments.
    learned: what has a gradient.  open: (n, p) where determinants of n x n matrices could be p x p ones, and it is not
    known which is smaller; a call looks it up where there is one such question.
    """

    problem: Problem
    name: str
    left_out: tuple[Expr, ...] = ()
    dims: Mapping[str, int] = field(default_factory=dict[str, int])
    held: tuple[str, ...] = ()
    learned: frozenset[str] = frozenset()
    open: tuple[tuple[sp.Expr, sp.Expr], ...] = ()
    origin: str = ""

    @property
    def side(self) -> tuple[sp.Expr, sp.Expr] | None:
        """The question that a call answers."""
        return self.open[0] if len(self.open) == 1 else None

    @property
    def arguments(self) -> list[Sym]:
        """What a call takes: variables, inputs, parameters without a value; then the parameters that are held."""
        return sorted(term_symbols(self.problem), key=lambda s: s.name in self.held)

    @cached_property
    def written(self) -> Writer:
        """The text of the module, and the words in it."""
        return Writer(self)

    def __str__(self) -> str:
        return "\n".join(_page(self, pretty))


def recipe(
    problem: Problem, name: str, *, held: Iterable[str] = (), learn: Iterable[str] = (), origin: str = ""
) -> Recipe:
    """What the loss of a problem is. Raises UnrollError E402 (nothing of that name), E403 (cannot be learned)."""
    sizes = {d: n for d, n in problem.dims.items() if isinstance(n, int)}
    bound = {
        n: scale(problem.sign, e) for n, e in problem.terms.items() if any(isinstance(x, Indicator) for x in walk(e))
    }
    terms = {n: smaller_side(e, sizes) for n, e in problem.terms.items() if n not in bound}
    if not terms:
        raise UnrollError("E402", f"{name} has constraints only: there is nothing to minimise")
    inner = replace(problem, terms=terms)
    learned = frozenset(learn)
    _check_learned(inner, learned)
    read = {s.name for s in term_symbols(inner)}
    known = {d.name: n for d, n in sizes.items()}
    return Recipe(
        inner,
        name,
        tuple(bound.values()),
        known,
        tuple(n for n in held if n in read),
        learned,
        _open_sides(terms.values(), sizes),
        origin,
    )


def sized(r: Recipe, names: Iterable[str]) -> None:
    """Are all sizes of these parameters known? Raises UnrollError E402."""
    for s in (r.problem.symbols[n] for n in names):
        for d in (d for n in stored_axes(s) for d in n.free_symbols if str(d) not in r.dims):
            raise UnrollError(
                "E402", f"{s.name} cannot be drawn: the size '{d}' has no value", hint=f"give it: dims={{'{d}': ...}}"
            )


def _check_learned(problem: Problem, learned: frozenset[str]) -> None:
    scalars = {s.name for s in problem.scalars}
    parameters = {s.name: s for s in term_symbols(problem) if s.role == "parameter"}
    for name in sorted(learned):
        if name not in scalars and name not in parameters:
            raise UnrollError(
                "E402",
                f"'{name}' is neither a scalar nor a parameter of this objective",
                hint=did_you_mean(name, [*scalars, *parameters]),
            )
        if name in parameters and parameters[name].props:
            declared = ", ".join(sorted(parameters[name].props))
            raise UnrollError(
                "E403",
                f"'{name}' is declared {declared}, which a loss does not keep while it is learned",
                hint=f"give it in each call: {name}=...",
            )


def _open_sides(terms: Iterable[Expr], sizes: Mapping[sp.Symbol, int]) -> tuple[tuple[sp.Expr, sp.Expr], ...]:
    """(n, p) for determinants of n x n matrices that could be p x p ones, where it is not known which is smaller."""
    found: dict[tuple[sp.Expr, sp.Expr], None] = {}
    for e in (x for t in terms for x in walk(t) if isinstance(x, LogDet)):
        for n in sorted({s for x in walk(e) for s in x.shape}, key=str):
            known = swap(e.x.rows, sizes).is_number and swap(n, sizes).is_number
            if not known and n != 1 and not same(n, e.x.rows) and push_through(n)(e) is not None:
                found[e.x.rows, n] = None
    return tuple(found)


def _turned(e: Expr, side: tuple[sp.Expr, sp.Expr]) -> Expr:
    """Determinants of the first size as determinants of the second."""
    rows, to = side
    here: dict[Expr, Expr] = {
        x: found.after
        for x in walk(e)
        if isinstance(x, LogDet) and same(x.x.rows, rows) and (found := push_through(to)(x)) is not None
    }
    return here.get(e) or rebuild(e, tuple(_turned(c, side) for c in e.children))


def _page(r: Recipe, show: Callable[[Expr], str]) -> list[str]:
    p = r.problem
    goal, sign = ("minimise", "") if p.sign > 0 else ("maximise", "minus ")
    first, wide = f" {goal} over {', '.join(v.name for v in p.variables)}", max(map(len, p.terms))
    terms = [f"{'+' if i else first:>17}   {n:{wide}}   {show(e)}" for i, (n, e) in enumerate(p.terms.items())]
    has_logdet = any(isinstance(x, LogDet) for e in p.terms.values() for x in walk(e))
    left_out = "; ".join(map(show, r.left_out))
    facts = {
        "takes": ", ".join(_shape(s) for s in r.arguments),
        "holds": ", ".join(r.held),
        "learns": ", ".join(sorted(r.learned)),
        "determinants": _sides(r) if has_logdet else "",
        "not in it": f"{left_out}: left to what makes the variables"
        if left_out
        else "nothing: there are no constraints",
    }
    head = [
        f"{r.name}: a loss, the mean over batch axes of {sign}the sum of its terms",
        *([p.about] if p.about else []),
    ]
    return [*head, "", *terms, "", *(f"{name:17} {said}" for name, said in facts.items() if said)]


def _shape(s: Sym) -> str:
    batch = [] if s.role == "parameter" else ["..."]
    return f"{s.name} ({', '.join([*batch, *map(str, stored_axes(s))])})"


def _sides(r: Recipe) -> str:
    """Of what size the determinants are."""
    logdets = (x for e in r.problem.terms.values() for x in walk(e) if isinstance(x, LogDet))
    rows = ", ".join(sorted({str(x.x.rows) for x in logdets})) + " to a side"
    if r.side is not None:
        n, p = r.side
        return f"{rows}; {p} in place of {n} in a call with {p} < {n}"
    several = " or ".join(f"{p} < {n}" for n, p in r.open)
    return f"{rows}, as written: whether {several} is known once dims= says it" if r.open else rows


# --- the text ---------------------------------------------------------------------------------------------------------

CHOLESKY = '''def cholesky(s, term):
    """Lower L with L L' = s, s symmetric positive definite; the term is named where s is not."""
    try:
        return torch.linalg.cholesky(s)
    except torch.linalg.LinAlgError as e:
        raise torch.linalg.LinAlgError(f"the term {term} has a matrix that is not positive definite") from e
'''
MEMBERS = frozenset(
    ["terms", "_terms", "recipe", "source", "derivation", "scalars", "shapes", "sizes", "samples", "spec"]
)
"""What a loss has besides what it holds."""


class Named(Section):
    """A section in which a Cholesky factor knows the terms that it is computed for."""

    def text(self, i: int) -> Text:
        own = super().text(i)
        if self.graph.nodes[i].op != "cholesky" or i in self.known:
            return own
        return Text(f"{own.code[:-1]}, {' and '.join(self.readers(i))!r})")

    def readers(self, i: int) -> list[str]:
        """The terms that node i is computed for."""
        reached, stack = {i}, [i]
        while stack:
            users = [j for j in self.graph.users[stack.pop()] if j not in reached]
            reached |= {*users}
            stack += users
        return [name for (_, name), ref in self.graph.roots.items() if ref.node in reached]


@dataclass
class Writer:
    """Writes the class of a recipe."""

    recipe: Recipe
    attributes: Names = field(default_factory=lambda: Names(frozenset(dir(nn.Module())) | MEMBERS))
    locals: Names = field(default_factory=Names)
    helpers: set[str] = field(default_factory=set[str])

    @property
    def problem(self) -> Problem:
        return self.recipe.problem

    def word(self, name: str) -> str:
        return self.locals("symbol", name)

    def attribute(self, name: str) -> str:
        return self.attributes("symbol", name)

    @cached_property
    def source(self) -> str:
        r, p = self.recipe, self.problem
        for s in (*r.arguments, *p.scalars):
            self.word(s.name)
            if s.name in r.held or isinstance(s, sp.Symbol):
                self.attribute(s.name)
        inner = self._terms()
        methods = [self._init(), self._forward(), self._outer(), inner]
        doc = f'"""{remark(", ".join(map(_shape, r.arguments)))} -> (), to be minimised."""'
        body = "\n\n".join(textwrap.indent(part, "    ") for part in (doc, *methods))
        helpers = [_helper(h) for h in needed(self.helpers) if h != "exact"]
        whole = "\n\n".join([*helpers, f"class {self.class_name}(nn.Module):\n{body}\n"])
        return f"{self._header()}{imports(whole)}\n\n{whole}"

    @cached_property
    def class_name(self) -> str:
        word = "".join(p[:1].upper() + p[1:] for p in identifier(self.recipe.name).split("_") if p)
        return Names().fresh(word or "Loss")

    def _header(self) -> str:
        by = f" from {self.recipe.origin}" if self.recipe.origin else ""
        lines = [*_page(self.recipe, text), "", f"Generated by unroll{by}. Needs torch only."]
        apart = [
            "".join(part if part.isspace() else remark(part) for part in re.split(r"(^ +| {2,})", x)) for x in lines
        ]
        return '"""' + "\n".join(apart) + '\n"""\n\n'

    def _init(self) -> str:
        r, args, lines = self.recipe, ["self"], ["super().__init__()"]
        for name in r.held:
            own, word = self.attribute(name), self.word(name)
            args.append(word)
            lines.append(
                f"self.{own} = nn.Parameter({word}.detach().clone())"
                if name in r.learned
                else f'self.register_buffer("{own}", {word}.detach().clone())'
            )
        for s, value in sorted(self.problem.scalars.items(), key=lambda item: item[1] is not None):
            own, word = self.attribute(s.name), self.word(s.name)
            args.append(word if value is None else f"{word}={number(value).code}")
            lines.append(f"self.{own} = {self._stored(s, word)}")
        return f"def __init__({', '.join(args)}):\n" + textwrap.indent("\n".join(lines), "    ")

    def _stored(self, s: sp.Symbol, word: str) -> str:
        if s.name not in self.recipe.learned:
            return word
        if not s.is_positive:
            return f"nn.Parameter(torch.tensor(float({word})))"
        self.helpers.add("softplus_inverse")
        return f"nn.Parameter(softplus_inverse(torch.tensor(float({word}))))  # kept > 0 by softplus"

    def _forward(self) -> str:
        words = ", ".join(self.word(s.name) for s in self.recipe.arguments)
        minus = "" if self.problem.sign > 0 else "-"
        doc = f'"""The mean over batch axes of {"minus " if minus else ""}the sum of the terms."""'
        return (
            f"def forward({self._arguments()}):\n    {doc}\n    return {minus}sum(self.terms({words}).values()).mean()"
        )

    def _arguments(self) -> str:
        r = self.recipe
        return ", ".join(["self", *(self.word(s.name) + ("=None" if s.name in r.held else "") for s in r.arguments)])

    def _outer(self) -> str:
        """In float32 or better: what the caller gives is brought to one type, and autocast is off inside.

        A determinant is worked out in float64: beside large features float32 loses the I of I + c X X', and the gradient with it.
        """
        r = self.recipe
        words = [self.word(s.name) for s in r.arguments]
        det = any(isinstance(x, LogDet) for e in self.problem.terms.values() for x in walk(e))
        type_ = "float64" if det else "float32 or better"
        lines = [f'"""Every term as written, per sample; in {type_}, under autocast too."""']
        lines += [f"{w} = self.{self.attribute(n)} if {w} is None else {w}" for n in r.held for w in [self.word(n)]]
        lines += [
            f"dtype = torch.promote_types({words[0]}.dtype, torch.float32)",
            f"with torch.autocast({words[0]}.device.type, enabled=False):",
        ]
        wide = "wide" if det else "dtype"
        if det:  # Metal alone has no float64
            lines.insert(-1, f'wide = dtype if {words[0]}.device.type == "mps" else torch.float64')
        lines.append(f"    terms = self._terms({', '.join(f'{w}.to({wide})' for w in words)})")
        lines.append("return {name: value.to(dtype) for name, value in terms.items()}" if det else "return terms")
        return f"def terms({self._arguments()}):\n" + textwrap.indent("\n".join(lines), "    ")

    def _terms(self) -> str:
        r, p = self.recipe, self.problem
        sizes = {d: Text(self.locals("dim", d.name), tensor=False) for d in p.dims}
        bodies = [self._body(p, sizes)]
        if r.side is not None:
            turned = replace(p, terms={n: _turned(e, r.side) for n, e in p.terms.items()})
            small, large = formula(r.side[1], sizes).code, formula(r.side[0], sizes).code
            inner = textwrap.indent("\n".join(self._body(turned, sizes)), "    ").split("\n")
            bodies.insert(0, [f"if {small} < {large}:  # the smaller side", *inner])
        lines = [line for body in bodies for line in body]
        head = self._scalar_lines(lines)
        first = self._size_lines([*head, *lines], sizes)
        squeezed = [
            f"{w} = {w}.squeeze({', '.join(map(str, (axes,) if len(axes) > 1 else axes))})"
            for s in r.arguments
            if (axes := unit_axes(s))
            for w in [self.word(s.name)]
        ]
        words = ", ".join(["self", *(self.word(s.name) for s in r.arguments)])
        return f"def _terms({words}):\n" + textwrap.indent("\n".join([*first, *squeezed, *head, *lines]), "    ")

    def _size_lines(self, lines: list[str], sizes: Mapping[sp.Symbol, Text]) -> list[str]:
        """Sizes that the lines use: read off what is given, or as they were declared. Raises UnrollError E402."""
        out: list[str] = []
        for d, word in sizes.items():
            if not _used(word.code, lines):
                continue
            found = [(s, axes.index(d) - len(axes)) for s in self.recipe.arguments if d in (axes := stored_axes(s))]
            if found:
                s, axis = found[0]
                out.append(f"{word.code} = {self.word(s.name)}.shape[{axis}]")
            elif d.name in self.recipe.dims:
                out.append(f"{word.code} = {self.recipe.dims[d.name]}")
            else:
                raise UnrollError(
                    "E402", f"the size '{d.name}' has no value", hint=f"give it: dims={{'{d.name}': ...}}"
                )
        return out

    def _scalar_lines(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        like = self.word(self.recipe.arguments[0].name)
        for s in self.problem.scalars:
            word, own = self.word(s.name), f"self.{self.attribute(s.name)}"
            if _used(word, lines):
                held = f"F.softplus({own})" if s.name in self.recipe.learned and s.is_positive else own
                out.append(f"{word} = torch.as_tensor({held}, dtype={like}.dtype)")
        return out

    def _body(self, problem: Problem, sizes: Mapping[sp.Symbol, Text]) -> list[str]:
        """Lines that compute the terms and return them."""
        known = {d: n for d, n in problem.dims.items() if isinstance(n, int)}
        graph = optimise(padded(lower_terms(problem), problem), Sizes(known, 1)).graph
        size: Callable[[sp.Expr], str] = lambda n: formula(n, sizes).code
        sec = Named(
            graph, self._leaves(graph), self.locals.fresh, size, _no_prox, self.word(self.recipe.arguments[0].name)
        )
        goals = {name: graph.roots["term", name] for name in problem.terms}
        lines = [sec.assign(i) for i in sec.lines_for(goals.values())]
        lines = [x for line in lines for x in line.split("\n")]
        rows = [f"    {name!r}: {_tensor(sec.text(ref.node), sec.like)}," for name, ref in goals.items()]
        self.helpers |= sec.used_ops
        return [*lines, "return {", *rows, "}"]

    def _leaves(self, graph: Graph) -> dict[int, Text]:
        out: dict[int, Text] = {}
        for i, node in graph.nodes.items():
            if node.op in ("input", "given", "scalar"):
                out[i] = Text(self.word(str(node.attrs[0])))
            elif node.op == "dim":
                out[i] = Text(self.locals("dim", str(node.attrs[0])), tensor=False)
        return out


def _no_prox(record: Any) -> str:
    raise AssertionError(f"internal error, please report: a proximal step within an objective: {record}")


def _tensor(value: Text, like: str) -> str:
    """A term that no tensor is in is a tensor too."""
    return value.code if value.tensor else f"{like}.new_tensor({value.code})"


def _used(word: str, lines: Iterable[str]) -> bool:
    pattern = re.compile(rf"(?<![\w.]){re.escape(word)}\b")
    return any(pattern.search(line.split("  #")[0]) for line in lines)


def _helper(name: str) -> str:
    """A helper without its guard against autocast, which is off here already."""
    if name == "cholesky":
        return CHOLESKY
    return HELPERS[name].source.removeprefix("@exact\n") if name in HELPERS else runtime.operation(name).source


# --- the module -------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """An emitted loss and what it stands for. Made by `loss`, which mixes this class with the emitted one.

    recipe, spec: what it was made from.  shapes: the last axes of what a call takes, by name.
    sizes: those that are known.
    """

    recipe: Recipe
    spec: Spec
    shapes: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    moved: frozenset[str]
    """Inputs in which a divergence is taken."""
    samples: dict[str, bool]
    """What comes once per sample: is it a variable?"""

    @property
    def source(self) -> str:
        """The Python text of the module."""
        return self.recipe.written.source

    @property
    def derivation(self) -> str:
        """The objective to be read: terms, sign, shapes, what is left out."""
        return str(self.recipe)

    @property
    def scalars(self) -> dict[str, float]:
        """Their values now, learned ones too."""
        word = self.recipe.written.attribute
        soft = {s.name for s in self.recipe.problem.scalars if s.is_positive and s.name in self.recipe.learned}
        own = {
            s.name: torch.as_tensor(getattr(self, word(s.name)), dtype=torch.float64).detach()
            for s in self.recipe.problem.scalars
        }
        return {n: float(nn.functional.softplus(v) if n in soft else v) for n, v in own.items()}

    def forward(self, /, *args: Tensor, **named: Tensor) -> Tensor:
        """Variables and inputs, in order or by name -> a number to be minimised. Raises UnrollError E404, E409."""
        return super().forward(*self._bind(args, named))

    def terms(self, /, *args: Tensor | None, **named: Tensor) -> dict[str, Tensor]:
        """Every term as written: (...) values, one per sample. Raises UnrollError E404, E409."""
        values = self._bind(args, named)
        self._check(values)
        self._check_made(dict(zip(self.shapes, values, strict=True)))
        try:
            return cast(Any, super()).terms(*values)
        except LookupError as e:
            if type(e) is not LookupError:  # an index of torch's, a key
                raise
            hint = "give the loss what the network was given, in float32 or float64, and its answer, not detached"
            raise UnrollError("E404", str(e), hint=hint) from e
        except torch.linalg.LinAlgError as e:  # pyright: ignore[reportPrivateImportUsage]
            hint = "values that are not finite (0/0 for a class without samples), or float32 where float64 is needed"
            raise UnrollError("E409", str(e), hint=hint) from e

    def _check_made(self, values: Mapping[str, Tensor | None]) -> None:
        """Does autograd see what a divergence is taken in? Raises UnrollError E404."""
        for name in sorted(self.moved):
            x = values[name]
            if x is not None and not (x.requires_grad and torch.is_grad_enabled()):
                hint = f"{name}.requires_grad_() before it goes into the network, and no torch.no_grad() around"
                raise UnrollError("E404", f"the divergence in {name} needs its gradient", hint=hint)

    def __reduce__(self) -> tuple[Any, ...]:
        given = {n: getattr(self, self.recipe.written.attribute(n)).detach() for n in self.recipe.held}
        return _rebuild, (
            self.spec.to_yaml(),
            self.recipe.dims,
            given,
            self.scalars,
            tuple(self.recipe.learned),
            self.training,
        )

    def _bind(self, args: tuple[Tensor | None, ...], named: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
        """The arguments in order."""
        names = list(self.shapes)
        if len(args) > len(names):
            raise UnrollError(
                "E404", f"{len(args)} tensors were given, this loss takes {len(names)}: {', '.join(names)}"
            )
        values = {**dict(zip(names, args, strict=False)), **named}
        for name in named:
            if name not in self.shapes:
                raise UnrollError(
                    "E404",
                    f"'{name}' is not something this loss takes",
                    hint=did_you_mean(name, names) or f"it takes {', '.join(names)}",
                )
        for name in names:
            if values.get(name) is None and name not in self.recipe.held:
                raise UnrollError("E404", f"'{name}' is missing", hint=f"this loss takes {', '.join(names)}")
        return tuple(values.get(name) for name in names)

    def _check(self, values: tuple[Any, ...]) -> None:
        """Real tensors in one place, their last axes those declared, a size the same wherever it is met. Raises UnrollError E404."""
        found, first = dict(self.sizes), next((v for v in values if isinstance(v, Tensor)), torch.empty(()))
        batches: dict[str, tuple[int, ...]] = {}
        for (name, axes), value in zip(self.shapes.items(), values, strict=True):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.is_complex() or value.layout is not torch.strided:
                check_kind(name, value)  # whole numbers are taken: the text brings all to one type
            check_place(name, value, first, "the first tensor")
            shape, known = tuple(value.shape), dict(found)
            last = shape[len(shape) - len(axes) :] if len(shape) >= len(axes) else ()
            batches[name] = shape[: len(shape) - len(axes)]
            if len(last) != len(axes) or any(found.setdefault(a, n) != n for a, n in zip(axes, last, strict=True)):
                want = ", ".join(["...", *(f"{a} = {known[a]}" if a in known and not a.isdigit() else a for a in axes)])
                raise UnrollError(
                    "E404",
                    f"{name} has shape {shape}, expected ({want})",
                    hint=layout(self.recipe.problem.symbols[name]),
                )
        samples = {n: b for n, b in batches.items() if n in self.samples}
        same_samples(samples, [n for n in samples if self.samples[n]])


def _rebuild(
    spec: str,
    dims: dict[str, int],
    given: dict[str, Tensor],
    scalars: dict[str, float],
    learn: tuple[str, ...],
    training: bool,
) -> Loss:
    import unroll

    return unroll.loss(spec, dims=dims, parameters=given, scalars=scalars, learn=learn).train(training)


def loss(spec: Spec, r: Recipe, given: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Loss:
    """The module of a recipe. given: the parameters that it holds. Raises UnrollError E402, E403 (scalars)."""
    numbers = values_of(r.problem, scalars)
    made = _mixed(r)
    module = made.__new__(made)
    arguments = {r.written.word(n): v for n, v in (*((n, given[n]) for n in r.held), *numbers.items())}
    cast(Any, super(Loss, module)).__init__(**arguments)
    module.recipe, module.spec = r, spec
    module.shapes = {s.name: tuple(_axis(n, r) for n in stored_axes(s)) for s in r.arguments}
    module.samples = {s.name: s.role == "variable" for s in r.arguments if s.role != "parameter"}
    divs = (x for e in r.problem.terms.values() for x in walk(e) if isinstance(x, Worked) and x.name == "div")
    module.moved = frozenset(cast(Sym, x.args[1]).name for x in divs)
    module.sizes = {**r.dims, **{a: int(a) for axes in module.shapes.values() for a in axes if a.isdigit()}}
    return module


def _axis(n: sp.Expr, r: Recipe) -> str:
    """The name of a size, or a number."""
    return (
        n.name
        if isinstance(n, sp.Symbol)
        else str(swap(n, {d: r.dims[d.name] for d in r.problem.dims if d.name in r.dims}))
    )


def _mixed(r: Recipe) -> type[Loss]:
    name = r.written.class_name
    emitted = load(r.written.source, f"loss {r.name}")[name]
    return cast(type[Loss], type(name, (Loss, emitted), {"__doc__": emitted.__doc__, "__module__": __name__}))
