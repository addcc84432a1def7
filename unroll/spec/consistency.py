"""What no single field can know: contradictions between the sections of a spec."""

from __future__ import annotations

from collections.abc import Iterator

from unroll.errors import SpecError, did_you_mean, quote
from unroll.spec import around
from unroll.spec.nodes import Entries, Scalar, follow, key_origin, node_at
from unroll.spec.schema import Declared, Document, Number, Train, Unroll

SECTIONS = ("dims", "variables", "inputs", "parameters", "scalars")


def contradictions(spec: Document, root: Entries) -> list[SpecError]:
    """All of them; none if the spec is consistent."""
    unroll = _unroll(spec.unroll, root, set(spec.variables)) if spec.unroll else iter(())
    found = [
        *_empty(root),
        *_not_built(spec, root),
        *_objective(spec, root),
        *_twice(spec, root),
        *_scalars(spec.scalars, root),
    ]
    found += [*_idle(spec, root), *_open_sizes(spec, root)]
    return [*found, *unroll, *around.contradictions(spec, root)]


def _empty(root: Entries) -> Iterator[SpecError]:
    for section in ("use", "minimize", "maximize", "unroll", "data", "train", "model", "weights"):
        if isinstance(node := root.get(section), Scalar) and node.value is None:
            hint = "fill it in, or leave the key out"
            yield SpecError("E203", f"{section} is empty", key_origin(root, (section,)).where(), hint)


def _not_built(spec: Document, root: Entries) -> Iterator[SpecError]:
    """Words that the language has and nothing reads: to pass over them would be silent."""
    unroll = spec.unroll
    used: dict[tuple[str, ...], str] = {
        **({("unroll", "layers"): "give a number of layers"} if unroll and unroll.layers == "equilibrium" else {}),
        **(
            {("unroll", "restart"): "unroll.solve restarts its momentum by itself"}
            if unroll and unroll.restart is not None
            else {}
        ),
    }
    for path, hint in used.items():
        word = "equilibrium" if path[-1] == "layers" else path[-1]
        yield SpecError(
            "E307", f"'{word}' is accepted by the language, but not built yet", key_origin(root, path).where(), hint
        )


def _idle(spec: Document, root: Entries) -> Iterator[SpecError]:
    """Settings of training that nothing would read."""
    train = spec.train
    if train is None:
        return
    said = train.model_fields_set
    idle = {
        "momentum": (
            train.optimizer != "sgd",
            f"optimizer: {train.optimizer} has no momentum to set",
            "optimizer: sgd",
        ),
        "betas": (train.optimizer == "sgd", "optimizer: sgd has none", "momentum, or another optimizer"),
        "final_lr": (train.schedule != "cosine", "a constant learning rate does not fall", "schedule: cosine"),
        "refine": (train.stages != "layerwise", "it is a share of layerwise stages", "stages: layerwise"),
        "epochs": ("steps" in said and train.steps is not None, "the number of steps is given", "one of the two"),
        "warmup": (
            train.steps is not None and train.warmup >= train.steps,
            f"the learning rate would grow for all {train.steps} steps",
            "fewer steps of warm-up",
        ),
        "freeze": (bool(train.freeze and train.only), "only: says what learns", "one of the two"),
        **{
            key: (True, "search: sets what it names, and takes no step", "leave it out")
            for key in (
                "freeze",
                "only",
                "layer_decay",
                "betas",
                "final_weight_decay",
                "accumulate",
                "checkpoint",
                "compile",
            )
            if train.search is not None
        },
        **_of_declared_losses(train),
    }
    for key, (odd, why, hint) in idle.items():
        if key in said and odd:
            yield SpecError("E511", f"train: {key}: {why}", key_origin(root, ("train", key)).where(), hint)


def _of_declared_losses(train: Train) -> dict[str, tuple[bool, str, str]]:
    """Settings of a loss that is declared, without one, or that nothing of it reads."""
    loss = train.loss
    if not isinstance(loss, Declared):
        why, hint = "a loss that takes them is declared", "loss: {objective: {use: ..}, takes: {..}}"
        return {key: (True, f"is for a declared loss: {why}", hint) for key in ("views", "teacher")}
    asked = {taken.views for taken in loss.takes.values() if taken.views is not None}
    every = any(taken.views is None and taken.of != "labels" for taken in loss.takes.values())
    unread = sorted({*train.views} - asked) if not every else []
    taught = any(taken.of == "teacher" for taken in loss.takes.values())
    unknown = sorted(asked - {*train.views})
    return {
        "views": (bool(unread), f"nothing takes {', '.join(unread)}", "takes: {NAME: {of: network, views: ..}}"),
        "teacher": (not taught, "nothing is taken of a teacher", "takes: {NAME: {of: teacher}}"),
        "ema": (taught, "the teacher is the mean of the weights", "teacher: {momentum: ..}"),
        "loss": (bool(unknown), f"there are no views {', '.join(unknown)}", "views: {NAME: {count: 2, ..}}"),
        "search": (True, "a declared loss is of all samples of a batch, and learns by slopes", "leave it out"),
    }


def _open_sizes(spec: Document, root: Entries) -> Iterator[SpecError]:
    """Sizes of axes of released weights that lie elsewhere in the spec."""
    for axis, size in spec.weights.sizes.items() if spec.weights else ():
        if isinstance(size, str):
            path = tuple(size.split("."))
            match [value for _, _, value in follow(root, path)]:
                case [*before, Scalar(int(n))] if len(before) == len(path) - 1 and n > 0:
                    continue
                case _:
                    pass
            where = node_at(root, ("weights", "sizes", axis)).origin.where()
            hint = "a number, or the place of one, such as model.embed.patch"
            yield SpecError("E205", f"the spec has no whole number at '{quote(size)}'", where, hint)


def _objective(spec: Document, root: Entries) -> Iterator[SpecError]:
    if spec.minimize is None and spec.maximize is None:
        hint = "write `minimize:` with a formula, or `use:` with the name of an objective"
        yield SpecError("E207", "the spec has nothing to minimize", root.origin.where(), hint)
    if spec.minimize is not None and spec.maximize is not None:
        where = key_origin(root, ("maximize",)).where()
        yield SpecError("E212", "the spec has both `minimize` and `maximize`", where, "subtract one from the other")
    for goal in ("minimize", "maximize"):
        if isinstance(terms := getattr(spec, goal), dict) and "total" in terms:
            where = key_origin(root, (goal, "total")).where()
            yield SpecError("E213", "'total' is the sum of all terms", where, "give this term another name")
    if not spec.variables:
        hint = "add  variables: {z: [n]}"
        yield SpecError("E207", "the spec has no variables to minimize over", root.origin.where(), hint)


def _twice(spec: Document, root: Entries) -> Iterator[SpecError]:
    first: dict[str, str] = {}
    learned = spec.unroll.learn if spec.unroll else {}
    declared = [((section, name), name) for section in SECTIONS for name in getattr(spec, section)]
    for path, name in [*declared, *((("unroll", "learn", name), name) for name in learned)]:
        if name in first:
            where = key_origin(root, path).where()
            hint = "every name means one thing"
            yield SpecError("E213", f"'{name}' is already declared under {first[name]}", where, hint)
        first.setdefault(name, path[0])


def _scalars(scalars: dict[str, Number], root: Entries) -> Iterator[SpecError]:
    for name, number in scalars.items():
        default = number.default
        least = max((m for m in (number.min, 0 if number.positive else None) if m is not None), default=None)
        if (
            number.max is not None
            and least is not None
            and (least > number.max or (number.positive and number.max <= 0))
        ):
            where = node_at(root, ("scalars", name, "max")).origin.where()
            above = f"min {number.min:g}" if number.min is not None and number.min > number.max else "positive"
            yield SpecError(
                "E205",
                f"scalars.{name} has no value: max {number.max:g} does not go with {above}",
                where,
                "raise max, or leave it out",
            )
            continue
        if default is None:
            continue
        broken = [
            *(["positive"] if number.positive and default <= 0 else []),
            *([f"at least {number.min:g}"] if number.min is not None and default < number.min else []),
            *([f"at most {number.max:g}"] if number.max is not None and default > number.max else []),
        ]
        if broken:
            where = node_at(root, ("scalars", name, "default")).origin.where()
            yield SpecError("E205", f"scalars.{name} must be {' and '.join(broken)}, not {default:g}", where)


def _unroll(unroll: Unroll, root: Entries, variables: set[str]) -> Iterator[SpecError]:
    here = key_origin(root, ("unroll",)).where()
    if unroll.algorithm is None and not unroll.blocks:
        yield SpecError("E202", "unroll needs a key 'algorithm'", here, "add  algorithm: proximal_gradient")
    for name in unroll.start:
        if name not in variables:
            where = key_origin(root, ("unroll", "start", name)).where()
            yield SpecError("E214", f"'{name}' is not a variable", where, did_you_mean(name, variables))
