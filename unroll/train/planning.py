"""What a training will need, before anything starts: memory by what it is for, and the time of a step.

The network is made of fake tensors, which have sizes and no memory, and takes one step as the training does: loss, gradient, optimiser.
Counted are the bytes of what is held, of what is saved for the gradient, and of what operations read and write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from unroll.api import Source, compile, read, sketch
from unroll.errors import SpecError
from unroll.network.recomputed import recomputing
from unroll.spec.schema import Declared, PatchEmbed, StemEmbed, TokenEmbed, Train
from unroll.train import losses
from unroll.train.data import make_data
from unroll.train.groups import learning
from unroll.train.job import Job, build, open_sizes, shapes_of
from unroll.train.losses import Net
from unroll.train.samples import Data, Split, package
from unroll.train.tasks import find_task
from unroll.train.views import draws

if TYPE_CHECKING:
    from unroll.train.engine import Task

ROUNDS = 3
"""Of what is timed, the fastest counts."""


@dataclass(frozen=True)
class Rates:
    """A machine: additions and multiplications in a second, bytes read and written in a second, seconds to begin an operation."""

    operations: float
    bytes: float
    begin: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. average: of weights, for ema and teachers.  copies: of gradients, for other parts of a batch and for other ranks.  activations: saved for the gradient."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    copies: int
    samples: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    numbers, learned: how many parameters there are, and learn.  batch: samples of a step, of all ranks together.
    memory: of a rank, by how parameters are spread.  sent: bytes that a rank sends in a step, likewise.
    seconds: of a step of one rank on this machine, without what is sent.  source: what they come from.
    operations, moved: additions and multiplications, and bytes read and written, of a step of one rank.
    steps: of the training, None where only the clock ends it.
    """

    title: str
    numbers: int
    learned: int
    precision: str
    optimizer: str
    batch: int
    ranks: int
    memory: Mapping[str, Memory]
    sent: Mapping[str, int]
    seconds: float
    source: str
    operations: int
    moved: int
    steps: int | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": {name: {**asdict(m), "total": m.total} for name, m in self.memory.items()}}

    def __str__(self) -> str:
        return "\n".join(_page(self))


def plan(
    source: Source,
    *,
    overrides: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    gpus: int = 1,
    measure: bool = False,
) -> Plan:
    """What the training of a spec needs, without starting it: nothing of the size of its network is made, nothing is written.

    gpus: ranks that share a batch.  measure: time steps of few samples of the whole network, in place of counting operations.
    Raises SpecError E511 (search: takes no gradients), E516 (sizes that depend on values), and what `train` says of data and settings.
    """
    package("lightning", "unroll plan")
    spec = read(source, overrides)
    job = Job(Path(), spec, dict(dims or {}), {}, {}, None)
    settings = job.settings
    if settings.search is not None:
        raise SpecError(
            "E511", "train: search: takes no gradients, so that there is nothing to plan", hint="leave it out"
        )
    data = None if spec.data is None else make_data(spec.data, shapes_of(spec, job.dims), {})
    if data is not None:
        find_task(settings, data)
    asked = settings.batch * settings.accumulate
    batch = asked if data is None else min(asked, len(data.train))
    own = ceil(batch / gpus / settings.accumulate)
    few, fake = _few(job, data, 2), FakeTensorMode()
    sizes = {**open_sizes(spec, {} if data is None else data.sizes), **job.dims}
    net = cast(Net, sketch(spec, sizes, {} if data is None else data.parameters, lambda: _making(fake, job.dtype)))
    if next(losses.module(net).parameters(), None) is None:
        raise SpecError(
            "E511", "train: the network has nothing to learn", hint="give it a learn: section or a parametrisation:"
        )
    with fake:
        samples = _each(few, lambda v: torch.empty((own, *v.shape[1:]), dtype=v.dtype))
    again = recomputing(losses.module(net)) if settings.checkpoint else nullcontext()
    with learning(net, settings), again:
        counted = _counted(fake, job, net, samples, data)
        return _plan(job, net, data, batch, gpus, counted, measured(job, data, own) if measure else None)


# --- what a step is -------------------------------------------------------------------------------------------------


def _few(job: Job, data: Data | None, count: int) -> Split:
    """So many samples as training draws them; without data, some of the declared sizes. Raises SpecError E402."""
    from unroll.train.engine import Drawing

    if data is not None:
        settings = job.settings
        size = min(count, len(data.train))
        drawn = Drawing(data.train.to(job.dtype), data.change, size, settings.seed, 1, settings.noise, slice(None))(0)
        needed = losses.find_loss(settings.loss).needs == "targets" and not drawn.targets
        return replace(drawn, targets=_declared(job, size, "variables")) if needed else drawn
    return Split(_declared(job, count, "inputs"))


def _declared(job: Job, count: int, what: str) -> dict[str, Tensor]:
    """Zeros of the declared sizes. Raises SpecError E402 for a size without a value."""
    embed = job.spec.model.embed if job.spec.model is not None else None
    if what == "inputs" and isinstance(embed, TokenEmbed):
        return {"tokens": torch.zeros((count, embed.length), dtype=torch.long)}
    if what == "inputs" and isinstance(embed, PatchEmbed | StemEmbed):
        return {"image": torch.zeros((count, *embed.image), dtype=job.dtype)}
    shapes = shapes_of(job.spec, job.dims)
    declared = shapes.inputs if what == "inputs" else shapes.variables
    for name, shape in declared.items():
        if None in shape:
            raise SpecError(
                "E402", f"{name} has a size without a value", hint="give it: dims.N=196, or a section data:"
            )
    return {
        name: torch.zeros((count, *map(int, filter(None, shape))), dtype=job.dtype) for name, shape in declared.items()
    }


def _each(batch: Split, change: Callable[[Tensor], Tensor]) -> Split:
    def of(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    inputs, targets = ({k: change(v) for k, v in part.items()} for part in (batch.inputs, batch.targets))
    mixed = None if batch.mixed is None else (change(batch.mixed[0]), change(batch.mixed[1]))
    return replace(batch, inputs=inputs, targets=targets, labels=of(batch.labels), mixed=mixed)


def loss_of(task: Task, batch: Split, settings: Train, alone: bool) -> Tensor:
    """The loss of a batch as the training computes it; alone: there are no data, and the mean square of the answer stands in."""
    net = cast(Net, task.net)
    kind = next(iter(batch.inputs.values())).device.type
    with torch.autocast(kind, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        if task.declared is not None and not alone:
            return task.declared.value(net, net, batch, draws(settings.seed, 0))
        if not alone:
            return losses.total(task.loss, net, batch, task.weights, settings)
        answer = task.net(*losses.arguments(net, batch.inputs))
        parts = [
            v.float().square().mean() for v in tree_leaves(answer) if isinstance(v, Tensor) and v.is_floating_point()
        ]
        return torch.stack(parts).sum()


def _task(net: Net, settings: Train) -> Task:
    from unroll.train.engine import Clock, Stage
    from unroll.train.engine import Task as Loop

    return Loop(net, settings, (Stage(net.layers, 0, 1, False),), Clock(None))


@contextmanager
def _making(fake: FakeTensorMode, dtype: torch.dtype) -> Generator[None]:
    """Inside, tensors are fake, of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with fake:
            yield
    finally:
        torch.set_default_dtype(before)


# --- counting ---------------------------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Of every operation within, (additions and multiplications, bytes read and written); views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            moved = sum(v.numel() * v.element_size() for v in tree_leaves((args, kwargs, out)) if isinstance(v, Tensor))
            count = FORMULAS.get(func.overloadpacket)
            self.done.append((count(*args, **(kwargs or {}), out_val=out) if count else 0, moved))
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> int:
    del rest, named
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_gradient(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> int:
    del rest, named
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_ATTENTION: Any = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **cast("dict[Any, Callable[..., int]]", flop_registry),
    _ATTENTION._scaled_dot_product_flash_attention_for_cpu: _attention,  # not in torch's own table
    _ATTENTION._scaled_dot_product_flash_attention_for_cpu_backward: _attention_gradient,
}


@contextmanager
def saved(but: Iterable[Tensor]) -> Generator[dict[Any, int]]:
    """Inside, bytes of all memory that is saved for a gradient, by storage; what is shared with these tensors does not count."""
    own, found = {StorageWeakRef(v.untyped_storage()) for v in but}, dict[Any, int]()

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if (place := StorageWeakRef(storage)) not in own:
            found[place] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        yield found


@dataclass(frozen=True)
class Counted:
    """Bytes of a step on one rank, and its operations."""

    optimizer: int
    samples: int
    activations: int
    work: Sequence[tuple[int, int]]


def _counted(fake: FakeTensorMode, job: Job, net: Net, batch: Split, data: Data | None) -> Counted:
    """One step of fake tensors. Raises SpecError E516."""
    task, work = _task(net, job.settings), Work()
    optimizer = task.configure_optimizers()
    module = losses.module(net)
    given = list(_tensors(batch))
    try:
        with fake, work:
            with saved([*module.parameters(), *module.buffers(), *given]) as kept:
                loss = loss_of(task, batch, job.settings, data is None)
            loss.backward()
            done = work.done * job.settings.accumulate
            work.done = []
            optimizer.step()
    except (DataDependentOutputException, DynamicOutputShapeException) as e:
        message = f"a step of {job.spec.title} cannot be counted: what {e.func} makes depends on values"
        raise SpecError("E516", message, hint="train a few steps: train.steps=5, and look at what they took") from e
    state = (v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
    return Counted(_bytes(state), _bytes(given), sum(kept.values()), done + work.done)


def _tensors(batch: Split) -> Iterable[Tensor]:
    return (v for v in tree_leaves((batch.inputs, batch.targets, batch.labels, batch.mixed)) if isinstance(v, Tensor))


def _bytes(values: Iterable[Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in values)


# --- time -------------------------------------------------------------------------------------------------------------


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds, of ROUNDS after one that does not count."""
    device, best = here(), inf
    for k in range(ROUNDS + 1):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun) if k else best
    return best


def rates_here(dtype: torch.dtype = torch.float32) -> Rates:
    """Of this machine, from a product of matrices, a sum of long vectors, and many sums of two numbers with their gradient."""
    n, count, times = 512, 2**22, 500
    a, long = torch.ones(n, n, dtype=dtype, device=here()), torch.ones(count, dtype=dtype, device=here())
    one = torch.ones((), dtype=dtype, device=here(), requires_grad=True)

    def begin() -> None:
        x = one
        for _ in range(times):
            x = x + 1
        x.backward()

    product, long_sum = _fastest(lambda: a @ a), _fastest(lambda: long + long)
    return Rates(2 * n**3 / product, 3 * count * long.element_size() / long_sum, _fastest(begin) / (2 * times))


def seconds_of(work: Iterable[tuple[int, int]], rates: Rates) -> float:
    """Of each operation the longer of computing and of moving, and its begin."""
    return sum(rates.begin + max(n / rates.operations, moved / rates.bytes) for n, moved in work)


def measured(job: Job, data: Data | None, batch: int) -> tuple[float, str]:
    """(seconds of a step of a batch, how they were found): from steps of two small numbers of samples, on the line through them."""
    sizes = [batch] if batch <= 8 else [max(1, batch // 16), max(2, batch // 8)]
    spent = [_step_seconds(job, data, size) for size in sizes]
    if len(sizes) == 1:
        return spent[0], f"measured: steps of {batch} samples"
    slope = max(spent[1] - spent[0], 0.0) / (sizes[1] - sizes[0])
    return spent[1] + slope * (
        batch - sizes[1]
    ), f"measured: the line through steps of {sizes[0]} and {sizes[1]} samples"


def _step_seconds(job: Job, data: Data | None, size: int) -> float:
    few = _few(job, data, size).to(here())
    net: Any = compile(job.spec, dims=job.dims, dtype=job.dtype) if data is None else build(job, data, job.spec)
    net.to(here())
    with learning(net, job.settings):
        task = _task(net, job.settings)
        optimizer = task.configure_optimizers()

        def step() -> None:
            optimizer.zero_grad()
            loss_of(task, few, job.settings, data is None).backward()
            optimizer.step()

        return _fastest(step)


# --- all of it --------------------------------------------------------------------------------------------------------


def _plan(
    job: Job, net: Net, data: Data | None, batch: int, ranks: int, counted: Counted, timed: tuple[float, str] | None
) -> Plan:
    from unroll.train.engine import FOREVER, total_steps

    settings, module = job.settings, losses.module(net)
    every, learned = list(module.parameters()), [p for p in module.parameters() if p.requires_grad]
    whole, gradients = _bytes(every), _bytes(learned)
    taken = settings.loss.takes.values() if isinstance(settings.loss, Declared) else ()
    average = whole * ((settings.ema is not None) + any(t.of == "teacher" for t in taken))
    parts = gradients if settings.accumulate > 1 else 0
    alone = Memory(whole, gradients, counted.optimizer, average, parts, counted.samples, counted.activations)
    memory, sent = {"alone": alone}, {"alone": 0}
    if ranks > 1:
        memory = {"ddp": replace(alone, copies=parts + gradients)}
        sent = {"ddp": 2 * gradients * (ranks - 1) // ranks}
    if timed is None:
        rates = rates_here(job.dtype)
        said = f"counted, at {_short(rates.operations, 'flop/s')} and {_short(rates.bytes, 'B/s')}, {_time(rates.begin)} to begin one"
        timed = seconds_of(counted.work, rates), said
    steps = None if data is None else total_steps(settings, len(data.train) // batch)
    notes = (
        ()
        if data is not None
        else (
            "no section data: samples are of the declared sizes,",
            "and the mean square of the answer stands in the place of the loss",
        )
    )
    return Plan(
        title=job.spec.title,
        numbers=sum(p.numel() for p in every),
        learned=sum(p.numel() for p in learned),
        precision=settings.precision,
        optimizer=settings.optimizer,
        batch=batch,
        ranks=ranks,
        memory=memory,
        sent=sent,
        seconds=timed[0],
        source=timed[1],
        operations=sum(n for n, _ in counted.work),
        moved=sum(moved for _, moved in counted.work),
        steps=None if steps == FOREVER else steps,
        notes=notes,
    )


ROWS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "state of {optimizer}",
    "average": "averaged weights",
    "copies": "copies of gradients",
    "samples": "samples of a batch",
    "activations": "saved for the gradient",
    "total": "in all",
}


def _page(p: Plan) -> Generator[str]:
    own = ceil(p.batch / p.ranks)
    learn = "all learn" if p.learned == p.numbers else f"{p.learned:,} learn"
    yield f"{p.title}: {p.numbers:,} parameters in {p.precision}, {learn}"
    shared = f" of {p.ranks} ranks, {own:,} each" if p.ranks > 1 else ""
    yield f"a step: {p.batch:,} samples{shared}"
    yield ""
    heads = "" if p.ranks == 1 else "".join(f"{name + f' of {p.ranks}':>16}" for name in p.memory)
    yield f"{'memory' if p.ranks == 1 else 'memory of a rank':26}{heads}".rstrip()
    for key, name in ROWS.items():
        values = [m.total if key == "total" else asdict(m)[key] for m in p.memory.values()]
        if any(values):
            yield f"  {name.format(optimizer=p.optimizer):24}" + "".join(f"{_size(v):>16}" for v in values)
    if p.ranks > 1:
        yield f"{'sent by it in a step':26}" + "".join(f"{_size(v):>16}" for v in p.sent.values())
    yield ""
    yield f"{'time of a step':26}{_time(p.seconds):>16}"
    yield f"  {p.source}"
    yield f"  {_short(p.operations, 'flop')}, {_size(p.moved)} read and written" + (
        ", without what ranks send" if p.ranks > 1 else ""
    )
    if p.steps is not None:
        yield f"{f'{p.steps:,} steps':26}{_time(p.steps * p.seconds):>16}"
    yield from p.notes


def _size(count: float) -> str:
    """Bytes in three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _short(count: float, unit: str) -> str:
    for prefix in ("", "K", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} P{unit}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1000 * seconds:.3g} ms"
    minutes, left = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:.0f} s" if minutes else f"{left:.3g} s"
