"""A declared objective as the loss of a training: over all samples of a batch together, of what networks answer to views of them.

    batch -> views -> features by the network, by its teacher; classes -> the arguments of the objective -> its terms

Legend: B samples, V views of each, d numbers of a feature, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from unroll.api import loss as compile_loss
from unroll.errors import SpecError, UnrollError
from unroll.language.nodes import Indicator, Sym
from unroll.network.loss import Loss
from unroll.spec.schema import Declared, Taken, Train, View
from unroll.train import losses
from unroll.train.features import READ
from unroll.train.losses import Net
from unroll.train.samples import Held, Split, Tensors
from unroll.train.table import Column
from unroll.train.views import draws, views

AS_IT_IS = "as it is"
"""The name of the only view, where none is declared."""


@dataclass(frozen=True)
class Objective:
    """loss: its module.  takes: what each of its arguments is.  views: by name.  unit: arguments whose features have length one."""

    loss: Loss
    takes: Mapping[str, Taken]
    views: Mapping[str, View]
    unit: frozenset[str]

    @property
    def sign(self) -> int:
        return self.loss.recipe.problem.sign

    def terms(self, net: Net, teacher: Net, batch: Split, draw: torch.Generator) -> Tensors:
        """The terms of the objective as written, () each. Raises SpecError E512, UnrollError E409."""
        if not len(batch):
            hint = "its terms are means over samples, or determinants of what they span"
            raise SpecError("E512", "train: loss: a declared objective of a batch without samples", hint=hint)
        made = {name: views(self._image(net, batch), view, draw) for name, view in self.views.items()}
        inputs = {
            of: self._answers(of, {"network": net, "teacher": teacher}[of], made) for of in ("network", "teacher")
        }
        given = {name: self._argument(name, taken, inputs, made, batch) for name, taken in self.takes.items()}
        try:
            return {name: value.mean() for name, value in self.loss.terms(**given).items()}
        except UnrollError as error:
            if error.code == "E409":
                raise
            raise SpecError("E512", f"train: loss: {error.message}", hint=error.hint) from error

    def value(self, net: Net, teacher: Net, batch: Split, draw: torch.Generator) -> Tensor:
        """What is minimised: the sum of the terms, or minus that."""
        return self.sign * torch.stack([*self.terms(net, teacher, batch, draw).values()]).sum()

    def _image(self, net: Net, batch: Split) -> Tensor:
        """What views are of. Raises SpecError E512."""
        x, *more = losses.arguments(net, batch.inputs)
        plain = all(view == View(count=view.count) for view in self.views.values())
        if more or (not plain and not x.is_floating_point()):
            raise SpecError("E512", "train: views: are of networks with one input of numbers", hint="leave views: out")
        if x.ndim != 4 and any(view.of_images for view in self.views.values()):
            hint = "noise:, hide:, contrast: and brightness: are of any numbers"
            raise SpecError("E512", "train: views: area, aspect, turn and flip are of images", hint=hint)
        return x

    def _answers(self, of: str, net: Net, made: Mapping[str, list[Tensor]]) -> dict[tuple[str, str], list[Tensor]]:
        """(where it is read, name of views) -> (B, d) of each view that an argument takes of this network, in one pass."""
        found: dict[tuple[str, str], list[Tensor]] = {}
        for at in READ:
            asked = [t for t in self.takes.values() if t.of == of and t.at == at]
            names = [n for n in made if made[n] and any(t.views in (None, n) for t in asked)]
            flat = [x for n in names for x in made[n]]
            if flat:
                with torch.set_grad_enabled(of == "network" and torch.is_grad_enabled()):
                    rows = READ[at](net, {net.inputs[0]: torch.cat(flat)})
                parts = iter((rows if rows.dtype == torch.float64 else rows.float()).chunk(len(flat)))
                found |= {(at, n): [next(parts) for _ in made[n]] for n in names}
        return found

    def _argument(
        self,
        name: str,
        taken: Taken,
        answers: Mapping[str, dict[tuple[str, str], list[Tensor]]],
        made: Mapping[str, list[Tensor]],
        batch: Split,
    ) -> Tensor:
        """A family of matrices: a member for each view, (V, B, d). A matrix: all views below each other, (V B, d). Classes: (K, V B), or (V B, K)."""
        names = [n for n in made if taken.views in (None, n)]
        count, size = sum(len(made[n]) for n in names), len(batch)
        if taken.of in ("network", "teacher"):
            rows = [z for n in names for z in answers[taken.of].get((taken.at, n), [])]
            stacked = torch.stack(rows) if rows else self._none(taken, answers, size)
            stacked = nn.functional.normalize(stacked, dim=-1) if name in self.unit else stacked
            return stacked if len(self.loss.shapes[name]) == 3 else stacked.flatten(0, 1)
        x = next(iter(batch.inputs.values()))
        if taken.of == "samples":
            members = torch.eye(size, device=x.device).repeat(count, 1)
        else:
            assert batch.labels is not None
            members = (batch.labels[:, None] == torch.arange(self._classes(batch), device=x.device)).repeat(count, 1)
        members = members.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
        return members.mT if len(self.loss.shapes[name]) == 2 else members

    def _none(self, taken: Taken, answers: Mapping[str, dict[tuple[str, str], list[Tensor]]], size: int) -> Tensor:
        """No view at all: (0, B, d)."""
        like = next((rows[0] for found in answers.values() for (at, _), rows in found.items() if at == taken.at), None)
        if like is None:
            raise SpecError("E512", "train: loss: no network answers to any view", hint="views: {NAME: {count: 2}}")
        return like.new_zeros(0, size, like.shape[-1])

    def _classes(self, batch: Split) -> int:
        """As many as the labels of this batch show: a class without samples adds nothing to an objective that allows for one."""
        assert batch.labels is not None
        return int(batch.labels.max()) + 1


# --- from settings ----------------------------------------------------------------------------------------------------


def objective(settings: Train) -> Objective:
    """Raises SpecError E511 (arguments, constraints), and what the objective itself may raise."""
    assert isinstance(settings.loss, Declared)
    loss = _compiled(json.dumps(_plain(settings.loss.objective)))
    return _checked(loss, settings.loss, settings.views or {AS_IT_IS: View()})


@lru_cache(maxsize=16)
def _compiled(text: str) -> Loss:
    return compile_loss(json.loads(text))


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {k: _plain(v) for k, v in value.items()}
        case tuple() | list():
            return [_plain(v) for v in value]
        case _:
            return value


def _checked(loss: Loss, declared: Declared, made: Mapping[str, View]) -> Objective:
    names, said = set(loss.shapes), ", ".join(loss.shapes)
    if odd := sorted(set(declared.takes) - names):
        raise SpecError("E511", f"train: loss: takes: '{odd[0]}' is nothing that {loss.recipe.name} takes", hint=said)
    if missing := sorted(names - set(declared.takes)):
        hint = f"takes: {{{missing[0]}: {{of: network}}}}; {loss.recipe.name} takes {said}"
        raise SpecError("E511", f"train: loss: takes: does not say what {', '.join(missing)} is", hint=hint)
    for name, view in made.items():
        for word, (low, high) in (("area", view.area), ("aspect", view.aspect)):
            if low > high:
                hint = f"{word}: [{high:g}, {low:g}]"
                raise SpecError("E511", f"train: views: {name}: {word}: the smaller one comes first", hint=hint)
    unit = set[str]()
    for bound in loss.recipe.left_out:
        match bound:
            case Indicator("sphere", (), Sym(name=name)):
                unit.add(name)
            case _:
                message = f"train: loss: nothing here keeps the constraint {bound}"
                raise SpecError("E511", message, hint="constraints: [Z in sphere] is kept; an objective without others")
    return Objective(loss, dict(declared.takes), dict(made), frozenset(unit))


def needs_labels(settings: Train) -> bool:
    return isinstance(settings.loss, Declared) and any(t.of == "labels" for t in settings.loss.takes.values())


# --- on held-out samples ----------------------------------------------------------------------------------------------


def columns(settings: Train) -> tuple[Column, ...]:
    """The terms by their names, as written."""
    return tuple(Column(f"term_{n}", n, lambda v: f"{v:.4g}") for n in objective(settings).loss.recipe.problem.terms)


@torch.no_grad()
def held_out(net: Net, held: Held, settings: Train) -> dict[str, float]:
    """The objective, batch by batch: each counts as many samples as it has. Views are the same every time, and the network is its own teacher."""
    declared, sums = objective(settings), dict[str, float]()
    for k, batch in enumerate(held.batches(settings.batch)):
        terms = declared.terms(net, net, batch, draws(settings.seed, -1 - k))
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
    terms = {name: value / len(held) for name, value in sums.items()}
    return {"held_out": declared.sign * sum(terms.values()), **{f"term_{n}": v for n, v in terms.items()}}
