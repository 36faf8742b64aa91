"""Arguments of a cache, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from tgt_fast.errors import ArgumentError, DeviceError
from tgt_fast.ops._checks import readable


def flag(op: str, name: str, value: Any) -> bool:
    """
    Raises:
        ArgumentError: it is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{op}: {name} must be True or False, got {value!r}")
    return bool(value)


def as_transforms(op: str, transforms: Any) -> tuple[Callable[..., Any], ...]:
    """
    Raises:
        ArgumentError: it is no sequence of callables.
    """
    if callable(transforms) and not isinstance(transforms, (list, tuple)):
        raise ArgumentError(f"{op}: transforms must be a sequence of callables; put the one in a list")
    empty = not isinstance(transforms, Iterable) or getattr(transforms, "ndim", None) == 0  # a scalar of numpy
    if empty or isinstance(transforms, (str, bytes, Tensor)):
        raise ArgumentError(f"{op}: transforms must be a sequence of callables, got {transforms!r}")
    found = tuple(transforms)
    for one in found:
        if not callable(one):
            raise ArgumentError(f"{op}: transforms must be a sequence of callables, got {one!r} in it")
    return found


def as_loader(op: str, loader: Any) -> Iterable[Any]:
    """
    Raises:
        ArgumentError: it gives no batches.
    """
    gives = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if not gives or isinstance(loader, (type, Tensor, str, bytes, np.generic)):
        raise ArgumentError(f"{op}: a loader must give batches one after the other, got {type(loader).__name__}")
    made: Iterable[Any] = loader
    return made


def with_numbers(op: str, name: str, tensor: Any) -> Tensor:
    """
    Raises:
        DTypeError, ArgumentError: it is no dense tensor, or has no memory.
        DeviceError: it is on the meta device.
    """
    checked = readable(op, name, tensor)
    if checked.device.type == "meta":
        raise DeviceError(f"{op}: {name} is on the meta device, and holds no numbers to store or to look for")
    return checked
