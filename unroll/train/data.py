"""Data: settings -> `Data`, tensors by the names that a problem gives to its inputs, variables and parameters.

Every source is one record in `SOURCES`, and a pure function of its settings: the same seed gives the same bits.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from unroll.errors import SpecError, did_you_mean, quote
from unroll.spec import schema
from unroll.spec.schema import DataSettings, Digits, Files, LowRank, Patches, Synthetic
from unroll.train.pictures import change_of, image_sizes, mixes, read_pictures
from unroll.train.samples import Data, Shape, Shapes, Split, Tensors, divide, generator, package
from unroll.train.sources import ABOUT
from unroll.train.text import read_text
from unroll.train.tokens import read_tokens


@dataclass(frozen=True)
class Source:
    """One kind of data: its name in a spec, and the function that makes it from its record of `unroll.spec.schema`."""

    name: str
    make: Callable[[Any, Shapes, Tensors], Data]
    about: str


# --- sources -------------------------------------------------------------------------------------------------------


def patches(settings: Patches, shapes: Shapes, given: Tensors) -> Data:
    """x = W (p - mean p) for patches p, W = (C + eps I)^-1/2 of the training patches' covariance C."""
    del given
    name = fed_input(settings, shapes)
    images = _grey_images()
    cut = images.shape[2] * 3 // 4  # training patches lie wholly to the left of it, held-out ones to the right
    train = _choose(images[:, :, :cut], settings.train, settings.seed, settings)
    held = _choose(images[:, :, cut:], settings.validation, settings.seed + 1, settings)
    train, held = (p - p.mean(-1, keepdim=True) for p in (train, held))
    if settings.whiten != "none":
        w = whitening(train, settings.whiten, settings.eps)
        train, held = train @ w.mT, held @ w.mT
    train, held = (_scaled(p, settings.norm) for p in (train, held))
    return Data("patches", Split({name: train}), Split({name: held}))


def _grey_images() -> Tensor:
    """scikit-learn's two photographs in grey, 0..1: (2, 427, 640)."""
    datasets = package("sklearn.datasets", "data: source: patches")
    colour = torch.from_numpy(np.stack(datasets.load_sample_images().images)).double() / 255
    return colour @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def _choose(images: Tensor, count: int, seed: int, settings: Patches) -> Tensor:
    """`count` patches drawn without replacement among those with enough contrast: (count, size^2)."""
    size = settings.size
    windows = images.unfold(1, size, 1).unfold(2, size, 1)
    means = [torch.nn.functional.avg_pool2d(power, size, stride=1) for power in (images, images.square())]
    places = ((means[1] - means[0].square()).clamp_min(0).sqrt() > settings.contrast).nonzero()
    if len(places) < count:
        message = f"{count:,} patches were asked for, {len(places):,} have a contrast above {settings.contrast}"
        raise SpecError("E504", f"data: {message}", hint="ask for fewer, or set contrast: lower")
    chosen = places[torch.randperm(len(places), generator=generator(seed))[:count]]
    return windows[tuple(chosen.T)].flatten(1)


def whitening(x: Tensor, kind: Literal["zca", "pca"], eps: float) -> Tensor:
    """W with W C W' = diag(c / (c + eps max c)) in the eigenbasis of C = cov(x). x: (B, n). Returns (n, n), float64.

    zca: W = V diag(..) V', the nearest to the identity; pca: W = diag(..) V', largest eigenvalue first.
    """
    c, v = torch.linalg.eigh(x.double().mT.cov())
    scale = (c.clamp_min(0) + eps * c[-1]).rsqrt()
    return (v * scale) @ v.mT if kind == "zca" else (v * scale).mT.flip(0)


def digits(settings: Digits, shapes: Shapes, given: Tensors) -> Data:
    """x: (B, 64), or image: (B, 1, 8, 8), and labels, in a shuffled order; the last `validation` are held out."""
    del given
    raw: Any = package("sklearn.datasets", "data: source: digits").load_digits()
    x, labels = (
        _scaled(torch.from_numpy(np.array(raw.data)) / 16, settings.norm),
        torch.from_numpy(np.array(raw.target)),
    )
    kept: dict[str, Any] = {}
    if settings.classes is not None:
        x, labels = _of_classes(x, labels, settings.classes)
        kept = {"classes": [str(k) for k in settings.classes]}
    count = len(settings.classes or range(10))
    if settings.form == "vectors":
        for odd, word in ((settings.augment is not None, "augment"), (settings.size != 8, "size")):
            if odd:
                raise SpecError(
                    "E511", f"data: {word}: changes images, these are vectors", hint="set data: form: images"
                )
        train, held = divide(Split({fed_input(settings, shapes): x}, labels=labels), settings.validation, settings.seed)
        return Data("digits", train, held, sizes={"classes": count}, kept=kept)
    name, image = settings.input or "image", x.unflatten(-1, (1, 8, 8))
    if settings.size != 8:
        image = torch.nn.functional.interpolate(image, size=2 * (settings.size,), mode="bilinear", align_corners=False)
    train, held = divide(Split({name: image}, labels=labels), settings.validation, settings.seed)
    sizes, change = image_sizes(image, count), change_of(settings.augment, name, 1)
    return Data("digits", train, held, sizes=sizes, kept=kept, change=change, mixes=mixes(settings.augment))


def _of_classes(x: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The samples of some classes, which are numbered in this order. Raises SpecError E504."""
    if len(set(classes)) < len(classes):
        raise SpecError("E504", f"data: classes: {list(classes)} names a digit twice")
    number = torch.full((10,), -1).index_put((torch.tensor(classes),), torch.arange(len(classes)))[labels]
    return x[number >= 0], number[number >= 0]


def synthetic(settings: Synthetic, shapes: Shapes, given: Tensors) -> Data:
    """x = A z + noise with the A that is given, or a random one. x: (B, m), z: (B, n), A: (m, n)."""
    if settings.input is not None:
        fed = fed_input(settings, shapes)
        shapes = replace(shapes, inputs={fed: shapes.inputs[fed]})
    x, z, a = _linear_names(shapes)
    A = given[a].double() if a in given else _matrix(settings, *_sizes(shapes, x, z))
    splits = [
        _sparse_samples(settings, A, count, generator(settings.seed * 3 + part))
        for part, count in ((1, settings.train), (2, settings.validation))
    ]
    train, held = (Split({x: signal}, {z: code}) for signal, code in splits)
    return Data("synthetic", train, held, {a: A})


def _matrix(settings: Synthetic, m: int, n: int) -> Tensor:
    """Gaussian with unit columns, or with singular values spaced geometrically and |A|_F^2 = n."""
    A = torch.randn(m, n, generator=generator(settings.seed * 3), dtype=torch.float64)
    if settings.condition is None:
        return A / A.norm(dim=0)
    u, _, vt = torch.linalg.svd(A, full_matrices=False)
    s = torch.logspace(0, -math.log10(settings.condition), min(m, n), dtype=torch.float64)
    return (u * (s * math.sqrt(n) / s.norm())) @ vt


def _sparse_samples(settings: Synthetic, A: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    code = torch.randn(count, A.shape[1], generator=draw, dtype=A.dtype)
    code = code.abs() if settings.nonnegative else code
    code = code * (torch.rand(code.shape, generator=draw, dtype=A.dtype) < settings.sparsity)
    clean = code @ A.mT
    if settings.snr is None:
        return clean, code
    noise = torch.randn(clean.shape, generator=draw, dtype=A.dtype)
    level = clean.norm(dim=-1, keepdim=True) * 10 ** (-settings.snr / 20) / math.sqrt(A.shape[0])
    return clean + level * noise, code


def low_rank(settings: LowRank, shapes: Shapes, given: Tensors) -> Data:
    """Y = L R' + S. Y: (B, n, m), Gaussian L: (m, r) and R: (n, r) scaled to a largest entry 1 of L R'; the target is `L @ R.T`."""
    del given
    y, l, r = _factor_names(settings, shapes)
    (n, m), rank = shapes.inputs[y], shapes.variables[l][0]
    if n is None or m is None or rank is None:
        raise SpecError("E507", "data: source 'low_rank' needs all sizes", hint="give them under dims:")
    train, held = (
        _with_outliers(settings, (count, n, rank, m), generator(settings.seed * 3 + part))
        for part, count in ((1, settings.train), (2, settings.validation))
    )
    name = f"{l} @ {r}.T"
    return Data("low_rank", Split({y: train[0]}, {name: train[1]}), Split({y: held[0]}, {name: held[1]}))


def _with_outliers(settings: LowRank, sizes: tuple[int, int, int, int], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(low + errors, low): (B, n, m)."""
    count, n, rank, m = sizes
    right = torch.randn(count, n, rank, generator=draw, dtype=torch.float64)
    low = right @ torch.randn(count, rank, m, generator=draw, dtype=torch.float64)
    low = low / low.abs().amax((-2, -1), keepdim=True)
    errors = 2 * torch.rand(low.shape, generator=draw, dtype=low.dtype) - 1
    there = torch.rand(low.shape, generator=draw, dtype=low.dtype) < settings.outliers
    return low + settings.size * errors * there, low


def _factor_names(settings: LowRank, shapes: Shapes) -> tuple[str, str, str]:
    """(Y, L, R) with Y: (n, m), L: (r, m), R: (r, n) as stored, L before R. Raises SpecError E507."""
    y = fed_input(settings, shapes)
    factors = [(name, size) for name, size in shapes.variables.items() if len(size) == 2]
    for i, (l, of_l) in enumerate(factors):
        for r, of_r in factors[i + 1 :]:
            if of_l[0] == of_r[0] and shapes.inputs[y] == (of_r[1], of_l[1]):
                return y, l, r
    raise SpecError("E507", "data: source 'low_rank' makes Y = L R' + S, and the problem has no such Y, L and R")


def files(settings: Files, shapes: Shapes, given: Tensors) -> Data:
    """Arrays by the names of inputs (needed), variables (targets) and parameters (values)."""
    del given
    if settings.input is not None:
        raise SpecError("E507", "data: input: files: names the inputs already", hint="leave input: out")
    wanted = [shapes.model] if shapes.model else list(shapes.inputs)
    known = [*wanted, *(["labels"] if shapes.model else shapes.variables), *shapes.parameters]
    for name in settings.files:
        if name not in known:
            hint = did_you_mean(name, known) or f"known are {', '.join(known)}"
            raise SpecError("E507", f"data: files: '{quote(name)}' is no name of this problem", hint=hint)
    missing = [name for name in wanted if name not in settings.files]
    if missing:
        raise SpecError("E507", f"data: files: no file for the input {', '.join(missing)}")
    loaded = {name: read_array(Path(path), name) for name, path in settings.files.items()}
    for name, value in loaded.items():
        _check_finite(name, value)  # here, before they are shuffled: the place is that of the file
    numbers = ("labels", "tokens") if shapes.model else ()
    loaded |= {name: _whole(name, loaded[name]) for name in numbers if name in loaded}
    inputs, targets, parameters = (
        {k: v for k, v in loaded.items() if k in names}
        for names in (wanted, () if shapes.model else shapes.variables, shapes.parameters)
    )
    labels = loaded.get("labels") if shapes.model else None
    check_counts({**inputs, **targets, **({} if labels is None else {"labels": labels})})
    train, held = divide(Split(inputs, targets, labels), settings.validation, settings.seed)
    rows = {"vocabulary": 1 + int(inputs["tokens"].max())} if "tokens" in inputs and shapes.model else {}
    return Data("file", train, held, parameters, sizes=rows)


def _whole(name: str, value: Tensor) -> Tensor:
    """int64. Raises SpecError E506 for a fraction, E505 for a token below 0; a label below 0 does not count."""
    if not torch.equal(value, value.round()):
        raise SpecError("E506", f"data: {name} are whole numbers, and the file has fractions")
    if name != "labels" and value.numel() and value.min() < 0:
        raise SpecError("E505", f"data: {name} begin at 0, and the file has {int(value.min())}")
    return value.long()


SOURCES: tuple[Source, ...] = (
    Source("patches", patches, ABOUT["patches"]),
    Source("digits", digits, ABOUT["digits"]),
    Source("images", read_pictures, ABOUT["images"]),
    Source("text", read_text, ABOUT["text"]),
    Source("tokens", read_tokens, ABOUT["tokens"]),
    Source("synthetic", synthetic, ABOUT["synthetic"]),
    Source("low_rank", low_rank, ABOUT["low_rank"]),
    Source("file", files, ABOUT["file"]),
)


def make_data(settings: schema.Data, shapes: Shapes, given: Tensors | None = None) -> Data:
    """The data that a spec's `data:` asks for, checked: finite, and of the shapes that the problem declares.

    given: values of problem parameters that are known already.  Raises SpecError E501 to E507, E513.
    """
    data = find_source(settings.source).make(settings, shapes, given or {})
    check(data, shapes)
    return data


def find_source(name: str) -> Source:
    """The record of a source. Raises SpecError E507."""
    for record in SOURCES:
        if record.name == name:
            return record
    names = [record.name for record in SOURCES]
    hint = did_you_mean(name, names) or f"there are {', '.join(names)}"
    raise SpecError("E507", f"data: there is no source '{quote(name)}'", hint=hint)


# --- files ---------------------------------------------------------------------------------------------------------


def read_array(path: Path, name: str) -> Tensor:
    """The array `name` of a .npy, .npz or .pt file; nothing in the file is executed. Raises SpecError E502 to E506."""
    if not isfile(path):
        raise SpecError(
            "E502",
            f"'{quote(str(path))}' for {name} is a folder"
            if isdir(path)
            else f"there is no file '{quote(str(path))}' for {name}",
            hint="paths are relative to where you run unroll",
        )
    readers = {".npy": _read_numpy, ".npz": _read_numpy, ".pt": _read_torch}
    if path.suffix not in readers:
        raise SpecError(
            "E503", f"'{path}' for {name}: a {path.suffix or 'nameless'} file", hint="use .npy, .npz or .pt"
        )
    return _numbers(readers[path.suffix](path, name), path, name)


def _read_numpy(path: Path, name: str) -> object:
    _refuse_unlike(path, name)
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else _member(dict(loaded), path, name)
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise SpecError(
                "E506",
                f"'{path}' for {name} holds Python objects, not numbers",
                hint="objects may run code when loaded; save a plain array: np.save(path, np.asarray(x, dtype=float))",
            ) from error
        raise SpecError("E503", f"'{path}' for {name} is not a numpy file: {error}") from error
    except (EOFError, zipfile.BadZipFile) as error:
        raise SpecError("E503", f"'{path}' for {name} is not a numpy file: {error}") from error


def _refuse_unlike(path: Path, name: str) -> None:
    """What begins as no file of NumPy, nor as pickled objects, which are told apart below. Raises SpecError E503."""
    with path.open("rb") as file:
        head = file.read(64)
    if head and not head.startswith((b"\x93NUMPY", b"PK", b"\x80")):
        line = head.decode("ascii", "replace").splitlines()[0]
        text = line.isprintable() and line.isascii()
        what = f"is text, and begins '{quote(line[:20])}'" if text else "has none of its marks"
        hint = "np.save('x.npy', np.loadtxt('x.txt')) makes one of numbers in text" if text else ""
        raise SpecError("E503", f"'{path}' for {name} is not a numpy file: it {what}", hint=hint)


def _read_torch(path: Path, name: str) -> object:
    try:
        loaded: object = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise SpecError(
            "E503",
            f"'{path}' for {name} holds more than tensors, or is no PyTorch file",
            hint="save a tensor or a dict of tensors: torch.save({'x': x}, path)",
        ) from error
    return _member(cast("dict[str, object]", loaded), path, name) if isinstance(loaded, dict) else loaded


def _member(arrays: Mapping[str, object], path: Path, name: str) -> object:
    if name in arrays:
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    hint = did_you_mean(name, arrays) or f"it holds {', '.join(arrays) or 'nothing'}"
    raise SpecError("E507", f"'{path}' holds no array '{name}'", hint=hint)


def _numbers(value: object, path: Path, name: str) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if not isinstance(value, Tensor) or value.is_complex():
        raise SpecError("E506", f"'{path}' for {name} holds {_kind(value)}, not real numbers")
    return value if value.is_floating_point() else value.double()


def _kind(value: object) -> str:
    kind = getattr(value, "dtype", type(value).__name__)
    return f"{kind} values"


# --- helpers -------------------------------------------------------------------------------------------------------


def fed_input(settings: DataSettings, shapes: Shapes) -> str:
    """The input that samples are fed to: the one that is named, or the only one. Raises SpecError E507."""
    if settings.input is not None and settings.input not in shapes.inputs:
        hint = did_you_mean(settings.input, shapes.inputs)
        raise SpecError("E507", f"data: input: '{quote(settings.input)}' is no input of this problem", hint=hint)
    if settings.input is None and len(shapes.inputs) != 1:
        names = ", ".join(shapes.inputs) or "none"
        raise SpecError("E507", f"data: which input do the samples feed? There are: {names}", hint="add data: input:")
    return settings.input or next(iter(shapes.inputs))


def _linear_names(shapes: Shapes) -> tuple[str, str, str]:
    """(x, z, A) with x: (m,), z: (n,), A: (m, n), if the problem has exactly one such triple."""
    found = [
        (x, z, a)
        for x, m in shapes.inputs.items()
        for z, n in shapes.variables.items()
        for a, size in shapes.parameters.items()
        if len(m) == len(n) == 1 and size == (*m, *n)
    ]
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise SpecError("E507", f"data: source 'synthetic' makes x = A z, and the problem has {what} such x, z and A")
    return found[0]


def _sizes(shapes: Shapes, x: str, z: str) -> tuple[int, int]:
    m, n = shapes.inputs[x][0], shapes.variables[z][0]
    if m is None or n is None:
        raise SpecError("E507", f"data: the size of {x if m is None else z} is open", hint="give it under dims:")
    return m, n


def _scaled(x: Tensor, norm: Literal["unit", "none"]) -> Tensor:
    return x if norm == "none" else x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def check_counts(arrays: Tensors) -> None:
    """Every array has the same number of samples. Raises SpecError E504."""
    for name, value in arrays.items():
        if value.ndim == 0:
            raise SpecError("E504", f"data: {name} is a single number", hint="the batch axis comes first")
    counts = {name: len(value) for name, value in arrays.items()}
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{name} has {count:,}" for name, count in counts.items())
        raise SpecError("E504", f"data: inputs and targets differ in their number of samples: {found}")


def check(data: Data, shapes: Shapes) -> None:
    """Every tensor is finite and has its declared shape, if the problem declares it. Raises SpecError E504, E505.

    What only a model around the problem declares (image, tokens) meets the network before the first step.
    """
    for split in (data.train.whole(), data.validation.whole()):
        for names, tensors in ((shapes.inputs, split.inputs), (shapes.variables, split.targets)):
            for name, value in tensors.items():
                if name in names:
                    _check_shape(name, tuple(value.shape[1:]), names[name])
                _check_finite(name, value)
    for name, value in data.parameters.items():
        _check_shape(name, tuple(value.shape), shapes.parameters[name])
        _check_finite(name, value)


def _check_shape(name: str, found: tuple[int, ...], declared: Shape) -> None:
    fits = len(found) == len(declared) and all(d in (None, f) for f, d in zip(found, declared, strict=True))
    if not fits:
        sizes = [" × ".join("?" if s is None else str(s) for s in shape) or "scalar" for shape in (found, declared)]
        raise SpecError(
            "E504",
            f"data: {name} is {sizes[0]}, the problem declares {sizes[1]}",
            hint="the batch axis comes first; a matrix [d, N] is stored N × d"
            if len(declared) > 1
            else "change dims: or the data",
        )


def _check_finite(name: str, value: Tensor) -> None:
    bad = ~value.isfinite()
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise SpecError("E505", f"data: {name} has {int(bad.sum()):,} values that are not finite, the first at {first}")
