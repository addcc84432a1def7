"""What may be given to a network, a model, a loss: real tensors of its own type, in its own place; else the remedy in words.

Nothing is converted: that would cost precision, time or a copy between devices which nobody has asked for.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from unroll.errors import UnrollError

NARROW = (torch.float16, torch.bfloat16, torch.float32)
"""Types that autocast converts into one another."""


def check_kind(name: str, value: object, like: Tensor | None = None, whose: str = "the network") -> None:
    """Real, dense, and of the type and device of `like`, which is `whose`. Raises UnrollError E404."""
    if not isinstance(value, Tensor):
        array = type(value).__module__ == "numpy"
        want = torch.get_default_dtype() if like is None else like.dtype
        raise UnrollError(
            "E404",
            f"{name} is of type {type(value).__name__}, not a tensor of real numbers",
            hint=f"torch.from_numpy({name}).to({want})" if array else f"torch.as_tensor({name}, dtype={want})",
        )
    if not value.is_floating_point():
        raise UnrollError(
            "E404",
            f"{name} is a tensor of {value.dtype}, not a tensor of real numbers",
            hint=_as_real(name, value, like),
        )
    if value.layout is not torch.strided:
        raise UnrollError("E404", f"{name} is stored as {value.layout}", hint=f"{name}.to_dense()")
    if like is None:
        return
    if value.dtype is not like.dtype and not _cast(value, like):
        hint = f"{name}.to({like.dtype})" + (f", or net.to({value.dtype})" if whose == "the network" else "")
        raise UnrollError("E404", f"{name} is a tensor of {value.dtype}, {whose} is of {like.dtype}", hint=hint)
    check_place(name, value, like, whose)


def check_place(name: str, value: Tensor, like: Tensor, whose: str) -> None:
    """On the device of `like`. Raises UnrollError E404."""
    if value.device != like.device:
        raise UnrollError(
            "E404", f"{name} is on {value.device}, {whose} on {like.device}", hint=f'{name}.to("{like.device}")'
        )


def _as_real(name: str, value: Tensor, like: Tensor | None) -> str:
    if value.is_complex():
        return f"{name}.real, or torch.view_as_real({name}) with one more axis in the spec"
    want = f"{name}.to({torch.get_default_dtype() if like is None else like.dtype})"
    return f"{want} / 255, where these are the bytes of a picture" if value.dtype is torch.uint8 else want


def _cast(value: Tensor, like: Tensor) -> bool:
    """Does autocast see to the type?"""
    return value.dtype in NARROW and like.dtype in NARROW and torch.is_autocast_enabled(value.device.type)


def as_number(name: str, value: Any) -> float:
    """A finite scalar: a number, or a tensor or array of one. Raises UnrollError E403."""
    try:
        found = float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        found = float("nan")
    if not isfinite(found):
        raise UnrollError("E403", f"'{name}' is a number; {value!r} is not")
    return found


def check_whole(**given: Any) -> None:
    """Whole numbers that 64 bits hold, or None. Raises UnrollError E404."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63):
            raise UnrollError("E404", f"{name} is a whole number, not {value!r}")


def check_making(seed: Any, dtype: Any, device: Any) -> None:
    """What a network is made with besides its spec. Raises UnrollError E404."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UnrollError("E404", f"seed={seed!r} is not a whole number")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        hint = "torch.float32, torch.float64, torch.float16 or torch.bfloat16"
        raise UnrollError("E404", f"dtype={dtype!r} is not a type of real numbers", hint=hint)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UnrollError("E404", f"device={device!r} cannot be used: {reason}", hint='"cpu", say') from None
