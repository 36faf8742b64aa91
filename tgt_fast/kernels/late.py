"""Numbers that are known only when a compiled program runs: those of a schedule, for which one program is compiled.

A compiler sees a number in the call of an op as part of the program, and compiles another program for another number.
A number that changes from call to call (a symbolic float, as PyTorch calls it) or that is given as a 0-d tensor travels
in a tensor instead, in double precision; the op reads it when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_symbolic(value: Any) -> bool:
    """True if a number is one that the program being compiled does not know."""
    return torch.compiler.is_compiling() and isinstance(value, (int, float)) and not _has_static_value(value)


def _has_static_value(value: Any) -> bool:
    try:  # here, where a compiler has imported it: it takes as long as half of PyTorch
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:  # PyTorch that cannot say it: every number is part of the program
        return True
    return has_static_value(value)


def is_late(value: Any) -> bool:
    return isinstance(value, Tensor) or is_symbolic(value)


def is_on(weight: Any) -> bool:
    """True if a term of this weight is wanted. That of a tensor is: while compiling, its value cannot be asked for."""
    return isinstance(weight, Tensor) or weight != 0


def shown(value: Any) -> str:
    """A number for a message, which cannot ask for one that is late."""
    return "a number that is not known yet" if is_late(value) else f"{value:g}"


def as_scalar(value: Any, device: torch.device | str = "cpu") -> Tensor:
    """A number as a 0-d float64 tensor; one that is a tensor already stays."""
    # A sum, which compilers take a symbolic float in; torch.full would make it part of the program.
    return value if isinstance(value, Tensor) else torch.zeros((), dtype=torch.float64, device=device) + value


def beside(value: Any, tensor: Tensor) -> Any:
    """A symbolic number as a tensor on the device of another one; anything else as it is."""
    return as_scalar(value, tensor.device) if is_symbolic(value) else value


def packed(*values: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """Numbers for the schema of an op: themselves, or ones that stand in their place and one tensor of them all.

    None, for an option that is not used, stays None.
    """
    if not any(is_late(value) for value in values):
        return values, None
    numbers = torch.stack([as_scalar(0.0 if value is None else value) for value in values])
    return tuple(None if value is None else 1.0 for value in values), numbers


def unpacked(values: tuple[Any, ...], numbers: Tensor | None) -> tuple[Any, ...]:
    """And back, where the op runs."""
    if numbers is None:
        return values
    return tuple(None if value is None else read for value, read in zip(values, numbers.tolist(), strict=True))
