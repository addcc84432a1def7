"""Graph -> Python source: one `nn.Module` that needs torch only, as a person who knows the paper would have written it.

Lines are made section by section (set up, once per call, per layer). A value read once is written inside the line that
reads it; one that is read more often, or that the algorithm names, has a line of its own.
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy as sp
from torch import nn

from unroll.calculus import torch_functions as runtime
from unroll.derivation.rewrites.exact import smaller_side
from unroll.derivation.step import Learned, Step
from unroll.errors import UnrollError
from unroll.language.constructors import swap
from unroll.language.nodes import ONE, Sym, slot
from unroll.language.problem import Problem
from unroll.language.show import text as show
from unroll.lower.graph import Graph, lower_step, lower_terms
from unroll.lower.operations import BY_NAME, HELPERS, Context, Node, Operand, Ref, Stage, helpers_of
from unroll.lower.passes import Sizes, optimise
from unroll.lower.scalar_text import POSTFIX, PRODUCT, Text, formula, number
from unroll.lower.sums_over_samples import sums_over

WIDTH = 110
DRAWN = ("gaussian", "uniform")
LONG = 60
"""An expression longer than this gets a line of its own."""


@dataclass(frozen=True)
class Program:
    """What a network is made from: the optimised graph of one layer, what the passes did, and the text."""

    problem: Problem
    step: Step
    layers: int
    dims: dict[str, int]
    class_name: str
    graph: Graph
    log: tuple[str, ...]
    source: str
    objective_source: str
    words: Mapping[tuple[str, str], str]
    """("symbol" or "learned" or "dim", the user's word) -> identifier in the text: argument, attribute, argument."""
    initialise_arguments: tuple[str, ...]
    """Parameters and scalars, in the user's words, that `initialise` takes."""
    inputs: tuple[str, ...]
    """What a call takes, in the user's words; an input that only the objective reads is not among them."""
    construct_inputs: tuple[str, ...]
    """What `construct` takes; nothing where no parameter is worked out on data."""
    samples: sp.Symbol | None
    """The size along which `construct` takes batches; None: all at once."""

    @property
    def drawn(self) -> bool:
        """Does `initialise` draw the start of a parameter?"""
        return any(p.init in DRAWN and ("learned", p.name) in self.words for p in self.step.learned)

    @property
    def any_depth(self) -> bool:
        """May the number of layers differ from call to call?"""
        return all(("learned", p.name) not in self.words or not p.per_layer for p in self.step.learned)

    @property
    def init_arguments(self) -> dict[str, int]:
        return {**{self.words["dim", d]: n for d, n in self.dims.items()}, "layers": self.layers}

    def axes(self, s: Sym) -> tuple[str, ...]:
        """Names of the axes of the tensor a user gives, after the batch axes."""
        return stored_sizes(s)

    def tensor_sizes(self, s: Sym) -> tuple[int | None, ...]:
        """Numbers for `axes`; None is open."""
        return self._sizes[s.name]

    @cached_property
    def _sizes(self) -> dict[str, tuple[int | None, ...]]:
        values = {d: self.dims[d.name] for d in self.problem.dims if d.name in self.dims}
        numbers = {s.name: [swap(n, values) for n in stored_axes(s)] for s in self.problem.symbols.values()}
        return {name: tuple(int(n) if n.is_Integer else None for n in sizes) for name, sizes in numbers.items()}


def build(
    problem: Problem, step: Step, *, layers: int, dims: Mapping[str, int], name: str, origin: str = "", sha: str = ""
) -> Program:
    """Graph, passes and source of a network. Raises UnrollError E402 where a size has no value."""
    for d, n in problem.dims.items():
        if n != "dynamic" and d.name not in dims and _mentioned(d, problem):
            raise UnrollError("E402", f"the size '{d.name}' has no value", hint=f"give it: dims: {{{d.name}: ...}}")
    sizes = Sizes({d: dims[d.name] for d in problem.dims if d.name in dims}, layers)
    optimised = optimise(lower_step(problem, step), sizes)
    module = Module(problem, step, optimised.graph, layers, dict(dims), name, origin, sha)
    source = module.source()
    return Program(
        problem, step, layers, dict(dims), module.class_name, optimised.graph, optimised.log, source,
        term_source(problem, dims),
        module.words, tuple(module.initialise_arguments),
        tuple(s.name for s in module.inputs),
        tuple(s.name for s in problem.inputs) if module.constructed else (),
        module.samples[0] if module.samples is not None else None,
    )  # fmt: skip


def _mentioned(d: sp.Symbol, problem: Problem) -> bool:
    symbols = problem.symbols.values()
    return any(d in n.free_symbols for s in symbols for n in (s.nrows, s.ncols, s.family or ONE))


# --- names ------------------------------------------------------------------------------------------------------------

_TAKEN = (
    frozenset(["torch", "nn", "F", "math", "functools", "self", "layers", "layer", "trace", "s", *dir(builtins)])
    | HELPERS.keys()
    | {op.name for op in runtime.RUNTIME}
)
"""Names that emitted functions use."""
_MEMBERS = frozenset(
    [
        "takes",
        "numbers",
        "drawn",
        "terms_of",
        "initialise",
        "construct",
        "built",
        "trace",
        "objective",
        "source",
        "graph",
        "learned",
        "given",
        "scalars",
        "inputs",
        "variables",
        "layers",
        "program",
        "spec",
        "derivation",
        "save",
    ]
)
"""What a network has besides what it holds."""


class Names:
    """The one place where a user's word becomes an identifier of emitted text; distinct words stay distinct."""

    def __init__(self, taken: frozenset[str] = _TAKEN) -> None:
        self.given: dict[tuple[str, str], str] = {}
        self.used: set[str] = set(taken)

    def __call__(self, kind: str, word: str) -> str:
        """The identifier of a word of some kind ("state", "given", ...); always the same for the same pair."""
        key = (kind, word)
        if key not in self.given:
            self.given[key] = self.fresh(word)
        return self.given[key]

    def fresh(self, word: str) -> str:
        name = base = identifier(word)
        count = 2
        while name in self.used or keyword.iskeyword(name) or keyword.issoftkeyword(name):
            name = f"{base}_" if name == base else f"{base}_{count}"
            count += name != f"{base}_"
        self.used.add(name)
        return name


def identifier(word: str) -> str:
    """Letters, digits and underscores only, not starting with a digit or two underscores."""
    plain = re.sub(r"\W", "_", unicodedata.normalize("NFKC", word))
    plain = re.sub(r"^_+", "", plain)[:60] or "x"
    return plain if plain.isidentifier() else f"x_{plain}"


def remark(text: str) -> str:
    """Text for a comment or docstring: one line, and nothing that could end it."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat.replace("\\", "\\\\").replace('"""', "'''")


# --- sections ---------------------------------------------------------------------------------------------------------


@dataclass
class Section:
    """Lines that compute some values, given the text of others."""

    graph: Graph
    known: dict[int, Text]
    fresh: Callable[[str], str]
    size: Callable[[sp.Expr], str]
    function: Callable[[Any], str]
    like: str = "x"
    used_ops: set[str] = field(default_factory=set[str])

    def branch(self) -> Section:
        """Lines within these, whose names are theirs alone."""
        return replace(self, known=dict(self.known))

    def operand(self, ref: Ref) -> Operand:
        return Operand(self.graph.nodes[ref.node], ref.flip, self.text(ref.node))

    def text(self, i: int) -> Text:
        """The expression of a node, operands that have no name written inside it."""
        if i in self.known:
            return self.known[i]
        node = self.graph.nodes[i]
        op = BY_NAME[node.op]
        self.used_ops.update(helpers_of(node))
        out = op.text(node, [self.operand(r) for r in node.inputs], Context(self.size, self.like, self.function))
        return Text(out.code, out.level, not node.plain)

    def stored(self, ref: Ref) -> Text:
        """The expression of a ref in the order in which its own value would be stored."""
        node = self.graph.nodes[ref.node]
        return self.operand(ref).ordered("cr" if node.batched else "rc")

    def lines_for(self, roots: Iterable[Ref], keep: Iterable[int] = ()) -> list[int]:
        """Nodes that deserve a line, operands first."""
        roots = list(roots)
        reads: dict[int, int] = {}
        pending = [r.node for r in roots]
        order: set[int] = set()
        for i in pending:
            reads[i] = reads.get(i, 0) + 1
        while pending:
            i = pending.pop()
            if i in order or i in self.known:
                continue
            order.add(i)
            for k, r in enumerate(self.graph.nodes[i].inputs):
                reads[r.node] = reads.get(r.node, 0) + self._occurrences(i, k)
                pending.append(r.node)
        kept, rows = set(keep), list[int]()
        for i in sorted(order):
            if i in kept or self._deserves(i, reads[i]):
                rows.append(i)
                self.known[i] = Text("name")  # for the length of what reads it
        for i in rows:
            del self.known[i]
        return rows

    def _occurrences(self, i: int, k: int) -> int:
        """How often the text of node i writes its k-th operand."""
        node = self.graph.nodes[i]
        if node.op == "attention":
            return 3 if k == 0 else 1
        return max(node.attrs[0].count(slot(k)), 1) if node.op == "map" else 1

    def _deserves(self, i: int, reads: int) -> bool:
        node = self.graph.nodes[i]
        if node.op in ("number", "full", "eye") or not node.inputs:
            return node.op == "eye" and reads > 1
        return reads > 1 or i in self.graph.names or len(self.text(i).code) > LONG

    def assign(self, i: int, name: str | None = None) -> str:
        """The line of a node, which is known by its name from here on."""
        text = self.text(i)
        name = name or self.fresh(self.graph.names.get(i) or hint(self.graph, i))
        self.known[i] = Text(name, POSTFIX, text.tensor)
        return commented(f"{name} = {text.code}", self.graph.notes.get(i, ""))


def commented(line: str, note: str) -> str:
    note = remark(note)
    if not note:
        return line
    return f"{line}  # {note}" if len(line) + len(note) < WIDTH - 12 else f"# {note}\n{line}"


def hint(graph: Graph, i: int) -> str:
    """A name that says what a value is: A.T @ A -> AtA, step * A.T -> step_At."""

    def word(ref: Ref) -> str:
        node = graph.nodes[ref.node]
        own = graph.names.get(ref.node) or (
            str(node.attrs[0])
            if not node.inputs and node.op not in ("number", "eye", "full")
            else hint(graph, ref.node)
        )
        return f"{own}t" if ref.flip and {"r", "c"} <= {*node.tags} else own

    node = graph.nodes[i]
    match node.op:
        case "matmul" | "contract":
            joined = "".join(map(word, node.inputs))
        case "scale":
            joined = _joined(map(word, node.inputs))
        case "map":
            joined = _of_formula(node.attrs[0], [word(r) for r in node.inputs])
        case "weighed_product":
            joined = f"{''.join(map(word, node.inputs))}t"
        case "detach":
            joined = word(node.inputs[0])
        case "spectrum":
            joined = f"{word(node.inputs[0])}_hat"
        case "conjugate":
            joined = f"{word(node.inputs[0])}_conj"
        case "family_softmax":
            joined = "shares"
        case "cholesky" | "cholesky_inverse" | "inverse":
            joined = "chol" if node.op == "cholesky" else "inv"
        case _:
            joined = {"add": "t", "number": "t", "sum": "total"}.get(node.op, node.op)
    return joined if len(joined) <= 12 else {"matmul": "p", "scale": "q"}.get(node.op, "t")


def _joined(words: Iterable[str]) -> str:
    """Words that say something, each once."""
    return "_".join(dict.fromkeys(w for w in words if w != "t")) or "t"


def _of_formula(profile: sp.Expr, words: Sequence[str]) -> str:
    """x**2 -> x_sq, sqrt(x) -> x_root, exp(x) -> x_exp, x * y -> x_y; else t."""
    core = profile.as_coeff_Mul()[1]
    match core:
        case sp.Pow(base=sp.Symbol(), exp=power) if power in (2, sp.Rational(1, 2)):
            kind = "sq" if power == 2 else "root"
        case sp.Function(args=(sp.Symbol(),)) | sp.exp(args=(sp.Symbol(),)):
            kind = type(core).__name__.lower()
        case sp.Mul() if all(x.is_Symbol for x in core.args):
            return _joined(words)
        case _:
            return "t"
    return f"{words[0]}_{kind}" if words[0] != "t" else kind


# --- the module -------------------------------------------------------------------------------------------------------


@dataclass
class Module:
    """Writes the class. Attributes are worked out in the order of the text."""

    problem: Problem
    step: Step
    graph: Graph
    layers: int
    dims: dict[str, int]
    name: str
    origin: str
    sha: str
    attributes: Names = field(default_factory=lambda: Names(frozenset(dir(nn.Module())) | _MEMBERS))
    locals: Names = field(default_factory=Names)
    functions: dict[int, str] = field(default_factory=dict[int, str])
    proxes: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    helpers: set[str] = field(default_factory=set[str])
    sizes_used: set[str] = field(default_factory=set[str])
    initialise_arguments: list[str] = field(default_factory=list[str])

    @cached_property
    def class_name(self) -> str:
        word = "".join(p[:1].upper() + p[1:] for p in identifier(self.name).split("_") if p)
        return Names().fresh(word or "Net")

    # What the module holds.

    @cached_property
    def forward_nodes(self) -> list[int]:
        """Nodes computed in a call."""
        return self._computed("start", "next", "block")

    @cached_property
    def construct_nodes(self) -> list[int]:
        """Nodes computed while parameters are worked out on data; none if there are no such parameters."""
        return self._computed("start", "next", "block", "learned") if self.constructed else []

    def _computed(self, *kinds: str) -> list[int]:
        """What a call computes for these roots."""
        own = {p.name for p in self.constructed}
        roots = [
            r.node
            for (kind, name), r in self.graph.roots.items()
            if kind in kinds and (kind != "learned" or name in own)
        ]
        reached = self.graph.reached(roots)
        return [i for i, n in self.graph.nodes.items() if i in reached and n.stage > Stage.SETUP and n.inputs]

    @cached_property
    def constructed(self) -> list[Learned]:
        """Parameters that are worked out on data."""
        return [p for p in self.learned if p.constructed]

    @cached_property
    def samples(self) -> tuple[sp.Symbol, tuple[int, ...]] | None:
        """The open size along which such data may come in batches, and the nodes that are sums over it."""
        for d, n in self.problem.dims.items():
            sums = sums_over(self.graph, d, [p.name for p in self.constructed]) if n == "dynamic" else None
            if sums:
                return d, sums
        return None

    @cached_property
    def inputs(self) -> list[Sym]:
        """What a call takes: not what is estimated."""
        return [s for s in self.problem.inputs if s.name not in self.step.estimated]

    @cached_property
    def buffers(self) -> list[int]:
        """Values of set-up time that a call reads."""
        computed = {*self.forward_nodes, *self.construct_nodes}
        reads = [r.node for i in self.graph.nodes if i in computed for r in self.graph.nodes[i].inputs]
        reads += [r.node for (kind, _), r in self.graph.roots.items() if kind in ("start", "next")]
        return [i for i in dict.fromkeys(reads) if self.graph.nodes[i].stage == Stage.SETUP]

    @cached_property
    def learned(self) -> list[Learned]:
        """Parameters that a call reads; others are not in the module."""
        names = {n.attrs[0] for n in self.graph.nodes.values() if n.op == "learned"}
        return [p for p in self.step.learned if p.name in names]

    @cached_property
    def starts(self) -> list[str]:
        """States that can be started at a value given by the caller: the variables."""
        states = {s.symbol.name for s in self.step.states}
        return [v.name for v in self.problem.variables if v.name in states]

    def size(self, n: sp.Expr, prefix: str = "self.") -> Text:
        names: dict[sp.Symbol, Text] = {}
        for d in n.free_symbols:
            assert isinstance(d, sp.Symbol)
            if prefix and self.problem.dims.get(d) != "dynamic":
                word = self.attributes("dim", d.name)
                self.sizes_used.add(d.name)
                names[d] = Text(prefix + word, tensor=False)
            else:
                names[d] = Text(self.locals("dim", d.name), tensor=False)
        return formula(n, names)

    def function(self, record: Any) -> str:
        """The module-level function of a scalar prox."""
        if id(record) not in self.functions:
            same = [name for name, known in self.proxes if known.source("prox") == record.source("prox")]
            if same:
                self.functions[id(record)] = same[0]
                return same[0]
            name = self.locals.fresh("prox" if not self.proxes else f"prox_{len(self.proxes) + 1}")
            self.functions[id(record)] = name
            self.proxes.append((name, record))
            self.helpers.update(record.runtime)
        return self.functions[id(record)]

    def section(self, known: dict[int, Text], like: str, used: set[str]) -> Section:
        local = Names()
        local.used |= used | self.locals.used | {"prox", *(f"prox_{k}" for k in range(2, len(self.graph.nodes) + 1))}
        return Section(self.graph, known, local.fresh, lambda n: self.size(n).code, self.function, like)

    @property
    def words(self) -> dict[tuple[str, str], str]:
        """What the user's words became, once the text is written."""
        learned = {("learned", p.name): self.attributes("learned", p.name) for p in self.learned}
        local = {(kind, word): name for (kind, word), name in self.locals.given.items() if kind in ("symbol", "dim")}
        return {**local, **learned}

    # The text.

    def source(self) -> str:
        for s in (*self.problem.inputs, *self.problem.variables, *self.problem.parameters, *self.problem.scalars):
            self.locals("symbol", s.name)
        for d in self.problem.dims:
            self.locals("dim", d.name)
        for p in self.learned:
            self.locals("learned", p.name)
            self.attributes("learned", p.name)
        buffer_names = {i: self._buffer_name(i) for i in self.buffers}
        forward = self._forward(buffer_names)
        initialise = self._initialise(buffer_names)
        parts = [
            self._init(buffer_names),
            initialise,
            *([self._construct(buffer_names)] if self.constructed else []),
            forward,
        ]
        body = "\n\n".join(textwrap.indent(part, "    ") for part in parts)
        text = f"class {self.class_name}(nn.Module):\n{textwrap.indent(self._signature_doc(), '    ')}\n\n{body}\n"
        functions = [*(_helper(h) for h in needed(self.helpers))]
        functions += [record.source(name) for name, record in self.proxes]
        whole = "\n\n".join([*(f.strip("\n") + "\n" for f in functions), text])
        return f"{self._header()}{imports(whole)}\n\n{whole}"

    def _header(self) -> str:
        terms = " + ".join(show(e) for e in self.problem.terms.values())
        goal = "minimise" if self.problem.sign > 0 else "maximise"
        over = ", ".join(v.name for v in self.problem.variables)
        steps = [f"    {a.target.name} <- {show(a.value)}" for a in self.step.assigns]
        by = f" from {self.origin}" if self.origin else ""
        sha = f" (sha256 {self.sha[:12]})" if self.sha else ""
        head = [
            f"{self.name}: {self.layers} unrolled layers of {self.step.algorithm} for", "",
            f"    {goal} over {over}   {terms}", "", "one layer:", "", *steps, "",
            f"Generated by unroll{by}{sha}. Needs torch only.",
        ]  # fmt: skip
        lines = [("    " if line.startswith("    ") else "") + remark(line) for line in head]
        return '"""' + "\n".join(lines) + '\n"""\n\n'

    def _signature_doc(self) -> str:
        def show_axes(s: Sym) -> str:
            return f"{self.locals('symbol', s.name)}: ({', '.join(('...', *stored_sizes(s)))})"

        ins = ", ".join(map(show_axes, self.inputs)) or "nothing"
        outs = ", ".join(show_axes(s) for s in self.step.output)
        return f'"""{remark(ins)} -> {remark(outs)}."""'

    def _init(self, buffers: dict[int, str]) -> str:
        lines: list[str] = []
        for p in self.learned:
            name, node = self.attributes("learned", p.name), self._leaf("learned", p.name)
            shape = self._shape(node, ["layers"] if p.per_layer else [])
            where = "one per layer" if p.per_layer else "shared by layers"
            kind = {"none": "", "positive": ", kept > 0 by softplus"}.get(
                p.constraint, f", {p.constraint.replace('_', ' ')}"
            )
            lines.append(
                commented(
                    f"self.{name} = nn.Parameter(torch.empty({shape}))", f"{p.text or show(p.replaces)}, {where}{kind}"
                )
            )
        for i, name in buffers.items():
            lines.append(f'self.register_buffer("{name}", torch.empty({self._shape(self.graph.nodes[i], [])}))')
        keep = [(self.attributes("dim", d), self.locals("dim", d)) for d in self.dims if d in self.sizes_used]
        keep += [("layers", "layers")] if self._counts_layers else []
        if keep:
            lines.insert(0, f"{', '.join(f'self.{k}' for k, _ in keep)} = {', '.join(k for _, k in keep)}")
        used = [(self.locals("dim", d), n) for d, n in self.dims.items()]
        args = ", ".join(["self", *(f"{word}={n}" for word, n in used), f"layers={self.layers}"])
        return f"def __init__({args}):\n" + textwrap.indent("\n".join(["super().__init__()", *lines]), "    ")

    @property
    def _counts_layers(self) -> bool:
        return not any(p.per_layer for p in self.learned)

    def _shape(self, node: Node, first: list[str]) -> str:
        by_tag = {"r": node.shape[0], "c": node.shape[1], **dict(node.families)}
        sizes = [*first, *(self.size(by_tag[t], "").code for t in node.tags)]
        return ", ".join(sizes) if sizes else "()"

    def _leaf(self, op: str, name: str) -> Node:
        return next(n for n in self.graph.nodes.values() if n.op == op and n.attrs[0] == name)

    def _buffer_name(self, i: int) -> str:
        node = self.graph.nodes[i]
        if node.op in ("given", "scalar"):
            return self.attributes("symbol", str(node.attrs[0]))
        word = self.graph.names.get(i) or hint(self.graph, i)
        return self.attributes.fresh("constant" if word == "t" else word)

    # initialise

    def _initialise(self, buffers: dict[int, str]) -> str:
        goals = {p.name: self.graph.roots["learned", p.name] for p in self.learned if p.init == "value"}
        reached = self._reach([*(r.node for r in goals.values()), *buffers])
        given = [s for s in self.problem.parameters if ("given", s.name) in reached]
        scalars = [s for s in self.problem.scalars if ("scalar", s.name) in reached]
        known: dict[int, Text] = {}
        lines: list[str] = []
        for i, node in self.graph.nodes.items():
            if node.op in ("given", "scalar"):
                known[i] = Text(self.locals("symbol", str(node.attrs[0])))
            elif node.op == "dim":
                known[i] = self.size(sp.Symbol(node.attrs[0], integer=True, positive=True))
        for s in given:
            word = self.locals("symbol", s.name)
            dropped = unit_axes(s)
            lines += [f"{word} = {word}.squeeze({_tuple(dropped)})"] if dropped else []
        for s in scalars:
            word = self.locals("symbol", s.name)
            lines.append(f"{word} = torch.as_tensor({word}, dtype=torch.float64)")
        like = next((self.locals("symbol", s.name) for s in given), f"self.{self._some_tensor(buffers)}")
        sec = self.section(known, like, set())
        for i in sec.lines_for([*goals.values(), *(Ref(i) for i in buffers)]):
            lines.append(sec.assign(i))
        for p in self.learned:
            lines.append(self._start_of(p, goals[p.name], sec) if p.name in goals else self._drawn(p))
        for i, name in buffers.items():
            text = sec.text(i)
            lines.append(f"self.{name}.copy_({text.code})" if text.tensor else f"self.{name}.fill_({text.code})")
        self.helpers |= sec.used_ops
        self.initialise_arguments = [s.name for s in (*given, *scalars)]
        drawn = ["generator=None"] if any(p.init in DRAWN for p in self.learned) else []
        args = ", ".join(["self", *(self.locals("symbol", s.name) for s in given), *self._scalar_args(scalars), *drawn])
        doc = '"""Set every parameter to the value that makes the network the algorithm itself."""'
        if drawn:
            doc = '"""Set every parameter to the value that makes the network the algorithm itself, or to a draw where the spec asks for one."""'
        return f"@torch.no_grad()\ndef initialise({args}):\n" + textwrap.indent(
            "\n".join([doc, *lines, "return self"]), "    "
        )

    def _drawn(self, p: Learned) -> str:
        """The start of a parameter that is drawn (its variance is scale^2 / rows), or worked out on data later."""
        name = f"self.{self.attributes('learned', p.name)}"
        match p.init:
            case "zeros":
                return f"{name}.zero_()"
            case "ones" if p.constraint == "positive":
                return f"{name}.fill_({number(sp.sympify(math.log(math.expm1(p.scale)))).code})  # softplus of it is {p.scale:g}"
            case "ones":
                return f"{name}.fill_({number(sp.sympify(p.scale)).code})"
            case "data":
                return f"{name}.fill_(math.nan)  # until construct has worked it out"
            case _:
                rows = self.size(p.shape[0]).code if p.shape else "1"
                if p.init == "gaussian":
                    return f"{name}.normal_(0, {p.scale!r} / math.sqrt({rows}), generator=generator)"
                return f"{name}.uniform_(-1, 1, generator=generator).mul_({p.scale!r} * math.sqrt(3 / {rows}))"

    def _scalar_args(self, scalars: list[sp.Symbol]) -> list[str]:
        """Those without a default first."""
        required = [self.locals("symbol", s.name) for s in scalars if self.problem.scalars[s] is None]
        optional = [(self.locals("symbol", s.name), self.problem.scalars[s]) for s in scalars]
        return [*required, *(f"{w}={number(sp.sympify(v)).code}" for w, v in optional if v is not None)]

    def _reach(self, nodes: Iterable[int]) -> set[tuple[str, str]]:
        found = (self.graph.nodes[i] for i in self.graph.reached(nodes))
        return {(n.op, str(n.attrs[0])) for n in found if not n.inputs}

    def _start_of(self, p: Learned, ref: Ref, sec: Section) -> str:
        """Copy the start value of a parameter into it, through the inverse of its constraint."""
        name = self.attributes("learned", p.name)
        leaves = (n for i in self.graph.reached([ref.node]) if not (n := self.graph.nodes[i]).inputs)
        if any(n.stage > Stage.SETUP for n in leaves):
            raise UnrollError(
                "E403", f"'{p.name}' cannot be learned: what it replaces depends on the input or the layer"
            )
        text = sec.stored(ref)
        if p.constraint == "positive":
            self.helpers.add("softplus_inverse")
            value = text.code if text.tensor else f"torch.tensor({text.code}, dtype=torch.float64)"
            return f"self.{name}.copy_(softplus_inverse({value}))"
        return f"self.{name}.copy_({text.code})" if text.tensor else f"self.{name}.fill_({text.code})"

    def _some_tensor(self, buffers: dict[int, str]) -> str:
        return next((self.attributes("learned", p.name) for p in self.learned), next(iter(buffers.values()), ""))

    # forward

    def _forward(self, buffers: dict[int, str]) -> str:
        symbol = lambda name: self.locals("symbol", name)
        lines, sec, states = self._opening(buffers, self.inputs, self.forward_nodes)
        record = f"trace.append({self._answer(states)})"
        tracing = ["if trace is not None:", f"    {record}"]
        lines += tracing
        lines += self._loop_head(self._per_layer())
        body = self._body(sec, states, trace=True)
        lines += textwrap.indent("\n".join([*body, *([] if self.step.blocks else tracing)]), "    ").split("\n")
        lines.append(f"return {self._answer(states)}")
        self.helpers |= sec.used_ops
        args = ["self", *(symbol(s.name) for s in self.inputs), *(f"{symbol(v)}=None" for v in self.starts), "*"]
        args += ["layers=None"] if self._counts_layers else []
        lines = self._read_sizes(self.inputs, lines)
        return f"def forward({', '.join([*args, 'trace=None'])}):\n" + textwrap.indent("\n".join(lines), "    ")

    def _construct(self, buffers: dict[int, str]) -> str:
        """The method that works out parameters on data, layer by layer."""
        names = ", ".join(p.name for p in self.constructed)
        words = ", ".join(self.locals("symbol", s.name) for s in self.problem.inputs)
        if self.samples is None:
            args, lines = words, self._construct_at_once(buffers)
            doc = f"Work out {names} on these data, layer by layer; no batch axes. Returns what the data have become."
        else:
            batches = self.locals.fresh("batches")
            args, lines = f"*{batches}", self._construct_by_batches(buffers, batches, *self.samples)
            doc = f"Work out {names} on these data, layer by layer. A batch is a tuple of {words}; returns what each has become."
        text = "\n".join([f'"""{doc}"""', *lines])
        return f"@torch.no_grad()\ndef construct(self, {args}):\n" + textwrap.indent(text, "    ")

    def _construct_at_once(self, buffers: dict[int, str]) -> list[str]:
        inputs = list(self.problem.inputs)
        lines, sec, states = self._opening(buffers, inputs, self.construct_nodes, start=False)
        body = [*self._layer_of(self.learned, known=True), *self._work_out(sec), *self._layer_of(self.constructed)]
        body += self._body(sec, states)
        lines += [self._layers_of_construct(), *_indented(body), f"return {self._answer(states)}"]
        self.helpers |= sec.used_ops
        return self._read_sizes(inputs, lines)

    def _construct_by_batches(
        self, buffers: dict[int, str], batches: str, samples: sp.Symbol, sums: tuple[int, ...]
    ) -> list[str]:
        """Per layer: the sums over all batches, the parameters, and the next state of each batch."""
        inputs = list(self.problem.inputs)
        names = [self.locals("symbol", s.name) for s in inputs]
        each = ", ".join(names) if len(names) > 1 else f"({names[0]},)"
        batch = f"({each})" if len(names) > 1 else each
        states = {s.symbol.name: self._state_name(s.symbol) for s in self.step.states}
        state = f"({', '.join(states.values())})" if len(states) > 1 else "".join(states.values())
        opened = self._squeezed(inputs)
        like = f"self.{self.attributes('learned', self.constructed[0].name)}"
        shared = self.section(self._known_in_forward(buffers), like, {*states.values()})
        given = {i for i, n in self.graph.nodes.items() if n.op == "input"}
        of_data = {i for i in self.construct_nodes if given & self.graph.reached([i])}
        lines = self._prologue(shared, self.construct_nodes, without=of_data)
        all_states, place = shared.fresh("states"), shared.fresh("i")

        starts = [*opened, *self._starts(shared.branch(), states, given=False)]
        if len(starts) == 1 and len(states) == 1:
            lines.append(f"{all_states} = [{starts[0].removeprefix(f'{state} = ')} for {each} in {batches}]")
        else:
            loop = [f"for {each} in {batches}:", *_indented([*starts, f"{all_states}.append({state})"])]
            lines += [f"{all_states} = []", *loop]
        for i, node in self.graph.nodes.items():
            if node.op in ("state", "counter"):
                shared.known[i] = Text(states[str(node.attrs[0])], tensor=not node.plain)

        both = f"zip({batches}, {all_states}, strict=True)"
        totals, adding = self._adding(shared, sums)
        body = [*self._layer_of(self.learned, known=True), f"{' = '.join(totals)} = 0"]
        body += [f"for {batch}, {state} in {both}:", *_indented([*opened, *adding])]
        body += [*self._work_out(shared), *self._layer_of(self.constructed)]
        moving = [*opened, *self._body(shared.branch(), states), f"{all_states}[{place}] = {state}"]
        body += [f"for {place}, ({batch}, {state}) in enumerate({both}):", *_indented(moving)]
        answer = self._answer(states)
        out = all_states if answer == state else f"[{answer} for {state} in {all_states}]"
        lines += [self._layers_of_construct(), *_indented(body), f"return {out}"]
        self.helpers |= shared.used_ops

        def size_of(d: sp.Symbol, word: str, axis: int) -> str:
            if d == samples:
                return f"sum({word}.shape[{axis}] for {each} in {batches})"
            return f"{batches}[0][{names.index(word)}].shape[{axis}]"

        return self._read_sizes(inputs, lines, size_of)

    def _adding(self, shared: Section, sums: tuple[int, ...]) -> tuple[list[str], list[str]]:
        """The names of sums, which are known from here on, and the lines that add a batch to them."""
        sec, names, lines = shared.branch(), list[str](), list[str]()
        for i in sec.lines_for(map(Ref, sums), keep=sums):
            if i not in sums:
                lines.append(sec.assign(i))
                continue
            names.append(shared.fresh(self.graph.names.get(i) or hint(self.graph, i)))
            lines.append(f"{names[-1]} += {sec.text(i).code}")
            shared.known[i] = Text(names[-1])
        return names, lines

    def _layers_of_construct(self) -> str:
        return f"for layer in range(len(self.{self.attributes('learned', self.constructed[0].name)})):"

    def _work_out(self, sec: Section) -> list[str]:
        """Store what the parameters of a layer are."""
        goals = {p.name: self.graph.roots["learned", p.name] for p in self.constructed}
        lines = [sec.assign(i) for i in sec.lines_for(goals.values())]
        for p in self.constructed:
            value = sec.operand(goals[p.name]).ordered("rc").code
            if p.constraint == "positive":
                self.helpers.add("softplus_inverse")
                value = f"softplus_inverse({value})"
            lines.append(f"self.{self.attributes('learned', p.name)}[layer] = {value}")
        return lines

    def _layer_of(self, learned: Iterable[Learned], known: bool = False) -> list[str]:
        """Names for the parameters of a layer.  known: those that need no data."""
        wanted = {self.locals("learned", p.name) for p in learned if not (known and p.constructed)}
        return [
            f"{name} = {Text(stack, stack_level(stack)).at(POSTFIX)}[layer]"
            for name, stack in self._per_layer()
            if name in wanted
        ]

    def _squeezed(self, inputs: Iterable[Sym]) -> list[str]:
        """Axes of size 1 that are not stored, taken away."""
        return [
            f"{word} = {word}.squeeze({_tuple(dropped)})"
            for s in inputs
            if (dropped := unit_axes(s))
            for word in [self.locals("symbol", s.name)]
        ]

    def _opening(
        self, buffers: dict[int, str], inputs: list[Sym], nodes: list[int], start: bool = True
    ) -> tuple[list[str], Section, dict[str, str]]:
        """What comes before the loop: values that layers share, and start values."""
        states = {s.symbol.name: self._state_name(s.symbol) for s in self.step.states}
        known = self._known_in_forward(buffers)
        like = self.locals("symbol", inputs[0].name) if inputs else f"self.{self._some_tensor(buffers)}"
        sec = self.section(known, like, {*states.values()})
        lines = [*self._squeezed(inputs), *self._prologue(sec, nodes)]
        lines += self._starts(sec, states, start)
        for i, node in self.graph.nodes.items():
            if node.op in ("state", "counter"):
                known[i] = Text(states[str(node.attrs[0])], tensor=not node.plain)
        return lines, sec, states

    def _read_sizes(
        self,
        inputs: list[Sym],
        lines: list[str],
        size_of: Callable[[sp.Symbol, str, int], str] = lambda d, word, axis: f"{word}.shape[{axis}]",
    ) -> list[str]:
        """Open sizes that the lines use are read off the inputs, before anything else."""
        first: list[str] = []
        text = "\n".join(line.split("#")[0] for line in "\n".join(lines).split("\n"))
        for d, n in self.problem.dims.items():
            word = self.locals("dim", d.name)
            if n == "dynamic" and re.search(rf"(?<![\w.]){re.escape(word)}\b", text):
                found = [(s, a) for s in inputs for a in axes_of(s, d)]
                if found:
                    s, axis = found[0]
                    first.append(f"{word} = {size_of(d, self.locals('symbol', s.name), axis)}")
                else:
                    hint = f"give it a number: dims: {{{d.name}: ...}}"
                    raise UnrollError(
                        "E402", f"the size '{d.name}' is open, and no input has an axis of that size", hint=hint
                    )
        return [*first, *lines]

    def _state_name(self, symbol: Sym | sp.Symbol) -> str:
        return self.locals("symbol" if symbol.name in self.starts else "state", symbol.name)

    def _known_in_forward(self, buffers: dict[int, str]) -> dict[int, Text]:
        known = {i: Text(f"self.{name}") for i, name in buffers.items()}
        for i, node in self.graph.nodes.items():
            word = str(node.attrs[0]) if node.attrs else ""
            match node.op:
                case "input":
                    known[i] = Text(self.locals("symbol", word))
                case "learned":
                    p = next(p for p in self.learned if p.name == word)
                    attribute = f"self.{self.attributes('learned', word)}"
                    known[i] = Text(self.locals("learned", word)) if p.per_layer else constrained(p, attribute)
                case "dim":
                    known[i] = self.size(sp.Symbol(word, integer=True, positive=True))
                case "layer":
                    known[i] = Text("layer", tensor=False)
                case "start":
                    known[i] = Text(
                        self.locals("symbol" if word in self.starts else "state", word), tensor=not node.plain
                    )
                case _:
                    pass
        return known

    def _prologue(self, sec: Section, nodes: list[int], without: Collection[int] = ()) -> list[str]:
        """Values that the layers share."""
        ahead = [i for i in self.graph.nodes if self.graph.nodes[i].stage <= Stage.PROLOGUE]
        read = [r.node for i in nodes if self.graph.nodes[i].stage == Stage.BODY for r in self.graph.nodes[i].inputs]
        read += [r.node for (kind, _), r in self.graph.roots.items() if kind == "next"]
        goals = [
            i for i in dict.fromkeys(read)
            if i in ahead and i not in sec.known and i not in without
            and self.graph.nodes[i].op not in ("number", "full") and not self.graph.nodes[i].plain
        ]  # fmt: skip
        lines: list[str] = []
        for i in list(dict.fromkeys(read)):
            node = self.graph.nodes[i]
            if node.op == "learned" and node.stage == Stage.PROLOGUE and "(" in sec.known[i].code:
                name = self.locals("learned", str(node.attrs[0]))
                lines.append(f"{name} = {sec.known[i].code}")
                sec.known[i] = Text(name)
        return lines + [sec.assign(i) for i in sec.lines_for(map(Ref, goals), keep=goals)]

    def _starts(self, sec: Section, states: dict[str, str], given: bool = True) -> list[str]:
        lines: list[str] = []
        for s in self.step.states:
            name, ref = states[s.symbol.name], self.graph.roots["start", s.symbol.name]
            value = self._start_value(s.symbol, ref, sec)
            if s.symbol.name in self.starts and given:
                assert isinstance(s.symbol, Sym)
                dropped = unit_axes(s.symbol)
                own = f"{name}.squeeze({_tuple(dropped)})" if dropped else name
                lines.append(f"{name} = {value} if {name} is None else {own}")
            else:
                lines.append(f"{name} = {value}")
        return lines

    def _start_value(self, symbol: Sym | sp.Symbol, ref: Ref, sec: Section) -> str:
        node = self.graph.nodes[ref.node]
        if not isinstance(symbol, Sym):
            return sec.text(ref.node).code
        if sec.like == "self.":
            hint = "declare an input and start there, as in start: {Z: X}; or a scalar or parameter that the objective reads"
            raise UnrollError("E402", "this network would neither take nor hold a tensor", hint=hint)
        batch = self._batch()
        sizes = [self.size(n).code for n in reversed(symbol.shape) if n != 1]
        dims = ", ".join([*([f"*{batch}"] if batch else []), *sizes]) or "()"
        if (node.op == "full" and node.attrs[0] == 0) or (node.op == "number" and node.attrs[0] == 0):
            return f"{sec.like}.new_zeros({dims})"
        if node.plain:
            return f"{sec.like}.new_full({dims if dims == '()' else f'({dims},)'}, {sec.text(ref.node).code})"
        text = sec.operand(ref).ordered("cr")
        return text.code if node.batched else text.then(f".expand({dims})").code

    def _batch(self) -> str:
        """Shape of the batch axes."""
        if not self.inputs:
            return ""
        s = self.inputs[0]
        kept = sum(n != 1 for n in s.shape) + (s.family is not None)
        word = self.locals("symbol", s.name)
        return f"{word}.shape[:-{kept}]" if kept else f"{word}.shape"

    def _per_layer(self) -> list[tuple[str, str]]:
        """(name in the loop, the stack it runs over)."""
        out: list[tuple[str, str]] = []
        for p in self.learned:
            if p.per_layer:
                stack = constrained(p, f"self.{self.attributes('learned', p.name)}")
                out.append((self.locals("learned", p.name), stack.code))
        return out

    def _loop_head(self, per_layer: list[tuple[str, str]]) -> list[str]:
        index = any(n.op == "layer" for n in self.graph.nodes.values())
        if not per_layer:
            return [f"for {'layer' if index else '_'} in range(self.layers if layers is None else layers):"]
        names, stacks = ", ".join(n for n, _ in per_layer), [s for _, s in per_layer]
        over = stacks[0] if len(stacks) == 1 else f"zip({', '.join(stacks)}, strict=True)"
        if index:
            names = f"layer, {names if len(per_layer) == 1 else f'({names})'}"
            over = f"enumerate({over})"
        line = f"for {names} in {over}:"
        if len(line) <= WIDTH or len(per_layer) == 1:
            return [line]
        wrap: Callable[[str], list[str]] = lambda text: textwrap.wrap(text, WIDTH - 12, break_long_words=False)
        inner = [*textwrap.indent("\n".join(wrap(", ".join(n for n, _ in per_layer))), "    ").split("\n")]
        stacked = [*textwrap.indent("\n".join(wrap(", ".join([*stacks, "strict=True"]))), "    ").split("\n")]
        if index:
            return ["for layer, (", *inner, ") in enumerate(zip(", *stacked, ")):"]
        return ["for (", *inner, ") in zip(", *stacked, "):"]

    def _body(self, sec: Section, states: dict[str, str], trace: bool = False) -> list[str]:
        """Assign the new states; a name is used again once nothing reads its old value. trace: record the end of each block."""
        goals = {s.symbol.name: self.graph.roots["next", s.symbol.name] for s in self.step.states}
        ends = {name: ref for (kind, name), ref in self.graph.roots.items() if kind == "block"}
        leaf_of = {str(n.attrs[0]): i for i, n in self.graph.nodes.items() if n.op in ("state", "counter")}
        wanted = [r.node for r in (*goals.values(), *ends.values()) if r.node not in sec.known]
        rows = sec.lines_for([*goals.values(), *ends.values()], keep=wanted)
        reads = {i: self._reads(i, set(rows), sec) for i in rows}
        direct = {r.node for r in (*goals.values(), *ends.values())}
        becomes = self._results(goals, ends, set(rows))
        holds = {states[name]: leaf for name, leaf in leaf_of.items()}
        bases: dict[str, str] = {}
        left, pending, lines = dict(states), list(ends.items()) if trace else [], list[str]()
        block_state = {a.block: a.target.name for a in self.step.assigns if a.block and a.target in self.step.output}

        def record(waiting: Collection[int]) -> None:
            """What every block left, in their order, as soon as it is there: one that changes nothing leaves what was there."""
            while pending and pending[0][1].node not in waiting:
                block, ref = pending.pop(0)
                left[block_state[block]] = sec.operand(ref).ordered("cr").code
                lines.extend(["if trace is not None:", f"    trace.append({self._answer(left)})"])

        record(rows)
        for place, i in enumerate(rows):
            later = {j for k in rows[place + 1 :] for j in reads[k]}
            free: Callable[[str], bool] = lambda name, later=later: name in holds and holds[name] not in later
            state = becomes.get(i)
            base = states[state] if state is not None else bases.get(self.graph.names.get(i, ""), "")
            final = state is not None and goals[state].node == i
            if state is not None and free(base) and not (holds[base] in direct and holds[base] == leaf_of.get(state)):
                name: str | None = base
            elif state is not None:
                name = sec.fresh(f"{base}_next" if final else f"{base}_half")
            else:
                name = base if base and free(base) else None
            lines.append(sec.assign(i, name))
            used = sec.known[i].code
            holds[used] = i
            if i in self.graph.names:
                bases.setdefault(self.graph.names[i], used)
            record(rows[place + 1 :])
        moves = [(states[name], sec.operand(ref).ordered("cr").code) for name, ref in goals.items()]
        moves = [(a, b) for a, b in moves if a != b]
        if moves:
            lines.append(f"{', '.join(a for a, _ in moves)} = {', '.join(b for _, b in moves)}")
        return lines

    def _results(self, goals: dict[str, Ref], ends: dict[str, Ref], rows: set[int]) -> dict[int, str]:
        """Node -> the state whose new value it is, for lines that can take the state's own name."""
        out: dict[int, str] = {}
        block_state = {a.block: a.target.name for a in self.step.assigns if a.block and a.target in self.step.output}
        pairs = [*((ref, name) for name, ref in goals.items()), *((ref, block_state[b]) for b, ref in ends.items())]
        for ref, name in pairs:
            if ref.node in rows and not self._turned(ref):
                out.setdefault(ref.node, name)
        return out

    def _turned(self, ref: Ref) -> bool:
        """Is the ref stored in another order than a state?"""
        return ref.flip and {"r", "c"} <= set(self.graph.nodes[ref.node].tags)

    def _reads(self, i: int, rows: set[int], sec: Section) -> set[int]:
        """Lines and leaves that the line of a node reads, through what is written inside it."""
        out: set[int] = set()
        stack = [r.node for r in self.graph.nodes[i].inputs]
        while stack:
            j = stack.pop()
            if j in rows or not self.graph.nodes[j].inputs:
                out.add(j)
            elif j not in sec.known:
                stack += [r.node for r in self.graph.nodes[j].inputs]
        return out

    def _answer(self, states: dict[str, str]) -> str:
        out: list[str] = []
        for s in self.step.output:
            text = states[s.name]
            for axis in reversed(unit_axes(s)):
                text += f".unsqueeze({axis})"
            out.append(text)
        return ", ".join(out) if len(out) == 1 else f"({', '.join(out)})"


def stack_level(stack: str) -> int:
    """How tightly the text of a stack of parameters binds."""
    return PRODUCT if " " in stack and not stack.startswith("F.") else POSTFIX


def constrained(p: Learned, text: str) -> Text:
    """The value of a parameter, from what is stored."""
    match p.constraint:
        case "none":
            return Text(text)
        case "positive":
            return Text(f"F.softplus({text})")
        case "symmetric":
            return Text(f"({text} + {text}.mT) / 2", PRODUCT)
        case "unit_columns":
            return Text(f"F.normalize({text}, dim={p.column_axis})")


def unit_axes(s: Sym) -> tuple[int, ...]:
    """Axes of size 1 of the tensor a user sees that are not stored, counted from the end."""
    match s.rank:
        case 0:
            return ()
        case 1:
            return (-1,) if s.nrows == 1 else ()
        case _:
            sizes = (s.nrows, s.ncols) if s.role == "parameter" else (s.ncols, s.nrows)
            return tuple(i - 2 for i in (0, 1) if sizes[i] == 1)


def stored_axes(s: Sym) -> tuple[sp.Expr, ...]:
    """Axes of the tensor that a user sees, after the batch axes."""
    family = () if s.family is None else (s.family,)
    match s.rank:
        case 0:
            return family
        case 1:
            return (*family, s.nrows)
        case _:
            return (*family, *((s.nrows, s.ncols) if s.role == "parameter" else (s.ncols, s.nrows)))


def stored_sizes(s: Sym) -> tuple[str, ...]:
    return tuple(map(str, stored_axes(s)))


def axes_of(s: Sym, d: sp.Symbol) -> list[int]:
    """Axes of size d of the tensor of an input or variable, counted from the end."""
    sizes = (s.nrows,) if s.rank == 1 else (s.ncols, s.nrows) if s.rank == 2 else ()
    return [i - len(sizes) for i, n in enumerate(sizes) if n == d]


def _indented(lines: Iterable[str]) -> list[str]:
    return textwrap.indent("\n".join(lines), "    ").split("\n")


def _tuple(axes: Sequence[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(tuple(axes))


def imports(text: str) -> str:
    wanted = [("math", r"\bmath\."), ("functools", r"\bfunctools\.")]
    first = [f"import {m}" for m, pattern in wanted if re.search(pattern, text)]
    torch = ["import torch", "from torch import nn"] + (
        ["from torch.nn import functional as F"] if re.search(r"\bF\.", text) else []
    )
    return "\n".join([*sorted(first), *([""] if first else []), *torch]) + "\n"


def needed(names: Iterable[str]) -> list[str]:
    """Helpers with those they call, callees first."""
    out: dict[str, None] = {}
    for name in sorted(names):
        if name in HELPERS:
            out |= dict.fromkeys(needed(HELPERS[name].needs))
        out[name] = None
    return list(out)


def _helper(name: str) -> str:
    return HELPERS[name].source if name in HELPERS else runtime.operation(name).source


def term_source(problem: Problem, dims: Mapping[str, int], otherwise: str = "") -> str:
    """Source of the terms of a problem (see `objective`), its graph optimised for the sizes that are known.

    Determinants are taken on the smaller side.  otherwise: what to give where the sizes turn none of them.
    """
    small = _on_smaller_side(problem, dims)
    if otherwise and small is problem:
        return otherwise
    sizes = Sizes({d: dims[d.name] for d in problem.dims if d.name in dims}, 1)
    return objective(small, optimise(lower_terms(small), sizes).graph, dims)


def _on_smaller_side(problem: Problem, dims: Mapping[str, int]) -> Problem:
    """The problem itself where nothing changes."""
    known = {d: dims[d.name] for d in problem.dims if d.name in dims}
    terms = {name: smaller_side(e, known) for name, e in problem.terms.items()}
    return problem if all(terms[n] is e for n, e in problem.terms.items()) else replace(problem, terms=terms)


# --- the objective ----------------------------------------------------------------------------------------------------


def term_symbols(problem: Problem) -> list[Sym]:
    """What the terms are functions of: all variables, then the inputs and parameters that occur."""
    read = {s for e in problem.terms.values() for s in e.symbols}
    return [*problem.variables, *(s for s in (*problem.inputs, *problem.parameters) if s in read)]


def objective(problem: Problem, graph: Graph, dims: Mapping[str, int] | None = None) -> str:
    """Source of a function of variables, inputs, parameters and scalars: the value of every term, per sample.

    dims: numbers for sizes that are no axis of a tensor.
    """
    names, lines = Names(), list[str]()
    symbols = [*problem.variables, *problem.inputs, *problem.parameters]
    read = [*(known := term_symbols(problem)), *(s for s in symbols if s not in known)]
    args = [names("symbol", s.name) for s in symbols] + [names("symbol", s.name) for s in problem.scalars]
    sizes = {d: names("dim", d.name) for d in problem.dims}
    for s in read:
        for d, word in sizes.items():
            family = [(-len(stored_sizes(s)))] if s.family == d else []
            axes = axes_of(s, d) if s.role != "parameter" else [a if s.rank == 1 else -3 - a for a in axes_of(s, d)]
            line = f"{word} = {names('symbol', s.name)}.shape[{(family or axes)[0]}]" if family or axes else ""
            if line and not any(x.startswith(f"{word} = ") for x in lines):
                lines.append(line)
    known_sizes = dims or {}
    lines += [
        f"{word} = {known_sizes[d.name]}"
        for d, word in sizes.items()
        if d.name in known_sizes and not any(x.startswith(f"{word} = ") for x in lines)
    ]
    for s in known:
        if dropped := unit_axes(s):
            lines.append(f"{names('symbol', s.name)} = {names('symbol', s.name)}.squeeze({_tuple(dropped)})")
    counted = {str(n.attrs[0]) for n in graph.nodes.values() if n.op == "scalar"}
    numbers = [names("symbol", s.name) for s in problem.scalars if s.name in counted]
    lines += [f"{w} = torch.as_tensor({w}, dtype=torch.float64)" for w in numbers]
    texts: dict[int, Text] = {}
    for i, node in graph.nodes.items():
        if node.op in ("input", "given", "scalar"):
            texts[i] = Text(names("symbol", str(node.attrs[0])))
        elif node.op == "dim":
            texts[i] = Text(names("dim", str(node.attrs[0])), tensor=False)
    size: Callable[[sp.Expr], str] = lambda n: formula(n, {d: Text(w, tensor=False) for d, w in sizes.items()}).code

    def no_prox(record: Any) -> str:
        raise AssertionError(f"internal error, please report: a proximal step within an objective: {record}")

    sec = Section(graph, texts, names.fresh, size, no_prox, args[0])
    goals = {name: graph.roots["term", name] for name in problem.terms}
    computed = [sec.assign(i) for i in sec.lines_for(goals.values())]
    body = [f"    {name!r}: {sec.text(ref.node).code}," for name, ref in goals.items()]
    used = "\n".join([*computed, *body])
    lines = [
        x
        for x in lines
        if not (m := re.match(r"(\w+) = (?:\w+\.shape|\d+$)", x)) or re.search(rf"(?<![\w.]){m[1]}\b", used)
    ] + computed
    code = (
        "\n".join(["def objective(" + ", ".join(args) + "):", *(f"    {x}" for x in [*lines, "return {", *body, "}"])])
        + "\n"
    )
    whole = "\n\n".join([*(_helper(h) for h in needed(sec.used_ops)), code])
    return f"{imports(whole)}\n\n{whole}"
