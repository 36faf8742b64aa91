"""Options of a sampler that have a number a class, and the classes of a batch's rows."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.ops import _checks
from tgt_fast.teacher.key import Key

if TYPE_CHECKING:
    from tgt_fast.explore.options import SamplerOptions

_OP: Final = "LatentSampler"
_MOST: Final = 1 << 24  # classes
DEFAULT: Final = 1.0  # of rows without a label, and of classes that a dict leaves out


@dataclass(frozen=True)
class ByClass:
    """A number a class. Two with the same numbers are equal, and hash alike."""

    values: tuple[float, ...]
    default: float = DEFAULT
    closed: bool = True  # there are no other classes; else they have the default
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(name: str, given: Any, low: float, high: float, *, whole: bool = False, op: str = _OP) -> ByClass:
        """From a tensor, an array, a sequence, or a mapping {class: number, None: the default}.

        Raises:
            ArgumentError: it is none, or a number is not in [low, high], or not whole.
        """
        if isinstance(given, ByClass):
            pairs: dict[Any, Any] = dict(enumerate(given.values))
            default, closed = given.default, given.closed
        elif isinstance(given, Mapping):
            pairs = {key: value for key, value in given.items() if key is not None}
            default, closed = given.get(None, DEFAULT), False
        else:
            pairs, default, closed = dict(enumerate(_listed(name, given, op))), DEFAULT, True
        keys = [key for key in pairs if not _is_class(key)]
        if keys or not pairs:
            raise ArgumentError(
                f"{op}: {name} by class needs a number for one class at least, and classes in [0, {_MOST}); got "
                f"{keys[0] if keys else given!r:.200}"
            )

        def checked(value: Any, of: Any) -> float:
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            number = _checks.number(op, f"{name} of {of}", value, low, high)
            if whole and number != int(number):
                raise ArgumentError(f"{op}: {name} of {of} must be an integer, got {value!r}")
            return number

        default = checked(default, "rows without a class")
        values = [default] * (int(max(pairs)) + 1)
        for key, value in pairs.items():
            values[int(key)] = checked(value, f"class {int(key)}")
        return ByClass(tuple(values), default, closed)

    @property
    def largest(self) -> float:
        """Of the classes and the rows without one."""
        return max(*self.values, self.default)

    def at(self, labels: Tensor) -> Tensor:
        """The number of each label, float64; the default of negative ones and of classes that there are none for."""
        table = self._tables.get(labels.device)
        if table is None:
            with torch.inference_mode(False):  # to serve in any mode later
                numbers = (*self.values, self.default)
                table = torch.tensor(numbers, dtype=torch.float64, device=labels.device)
            self._tables[labels.device] = table
        last = len(self.values)
        return table[torch.where((labels >= 0) & (labels < last), labels, last)]

    def check(self, name: str, labels: Tensor, op: str = _OP) -> None:
        """
        Raises:
            ArgumentError: on a CPU, a label of no class.
        """
        if self.closed and _checks.on_plain_cpu(labels) and labels.numel() and int(labels.max()) >= len(self.values):
            raise ArgumentError(
                f"{op}: {name} has numbers for {len(self.values)} classes, label {int(labels.max())} is of another; a "
                "dict leaves classes out"
            )

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:g}" for value in self.values[:8])
        others = "" if self.closed else f" else {self.default:g}"
        return f"[{shown}{', ...' if len(self.values) > 8 else ''}]{others}"

    @property
    def text(self) -> str:
        """All of it in words, which :meth:`of_text` reads."""
        return repr((self.values, self.default, self.closed))

    @staticmethod
    def of_text(text: str) -> ByClass:
        values, default, closed = ast.literal_eval(text)
        return ByClass(tuple(values), default, closed)


def is_by_class(given: Any) -> bool:
    """True if an option is given a number a class."""
    if isinstance(given, (Tensor, np.ndarray)):
        return given.ndim > 0
    if isinstance(given, (str, bytes)):
        return False
    return isinstance(given, (ByClass, Mapping, Sequence))


def _is_class(key: Any) -> bool:
    return isinstance(key, Integral) and not isinstance(key, bool) and 0 <= int(key) < _MOST


def _listed(name: str, given: Any, op: str) -> list[Any]:
    if isinstance(given, (Tensor, np.ndarray)):
        if given.ndim != 1:
            raise ArgumentError(f"{op}: {name} by class must be (classes,), got {tuple(given.shape)}")
        return list(given.tolist())
    return list(given)


def labels_of_rows(labels: Any, count: int, device: torch.device, op: str = _OP) -> Tensor:
    """The class of each row, int64 [count], negative where it has none.

    Args:
        labels: (count,) integers, or (count, C) shares of the classes, of which the largest counts.
    """
    if not isinstance(labels, Tensor) or labels.is_complex() or labels.dtype == torch.bool:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DTypeError(f"{op}: labels must be a tensor of classes, or of shares of them, got {found}")
    soft = labels.is_floating_point()
    if labels.ndim != 1 + soft or labels.shape[0] != count:
        raise ShapeError(
            f"{op}: labels {tuple(labels.shape)} must be ({count},), one class an example{' or its shares' * soft}"
        )
    return (labels.argmax(1) if soft else labels.to(torch.int64)).to(device)


def label_argument(sampler: Any, y: Any, count: int, device: torch.device) -> dict[str, Any]:
    """The keyword that tells a sampler the classes of a batch, where it asks for them; without labels: no class."""
    if not getattr(sampler, "asks_labels", False):
        return {}
    return {"labels": torch.full((count,), -1, device=device) if y is None else y}


def spread(key: Key, classes: Tensor, options: SamplerOptions) -> tuple[Tensor, Key]:
    """The batch's row of each synthetic example, where a class says how many there are of a row; and its key.

    Replica by replica, as where all classes have equally many. Waits for a device.
    """
    replicas = options.replicas
    assert isinstance(replicas, ByClass)
    wanted = replicas.at(classes)
    numbers = torch.arange(options.most_replicas, device=wanted.device)
    replica, rows = (numbers[:, None] < wanted[None]).nonzero().unbind(1)
    own = key.by_row().take(rows)
    return rows, own.of_replica(replica)


__all__ = ["ByClass", "is_by_class", "label_argument", "labels_of_rows", "spread"]
