"""The key of counter-based noise: (seed, sample ids, step, replica), checked, and as a registered op's arguments."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.kernels.options import MAX_REPLICA, MAX_SAMPLE_ID, MAX_STEP
from tgt_fast.ops import _checks, library

KEY: Final = "Tensor? device_seed, int seed, Tensor sample_ids, Tensor? device_step, int step, int replica"
KEY_COUNT: Final = 6  # arguments of that


def noise_key(
    name: str,  # of the op
    what: str,  # the tensor whose samples have the noise
    tensor: Tensor,
    samples: int,
    seed: int | Tensor,
    sample_ids: Tensor | None,
    step: int | Tensor,
    replica: int,
) -> dict[str, Any]:
    """The checked key of the noise. Integers that live in a tensor stay there."""
    if sample_ids is None:
        ids = torch.arange(samples, device=tensor.device)
    else:
        ids = _checked_ids(name, what, tensor, samples, sample_ids)
    return {
        "seed": _whole(name, "seed", seed, -(2**63), 2**64),
        "sample_ids": ids,
        "step": _whole(name, "step", step, 0, MAX_STEP),
        "replica": _checks.integer(name, "replica", replica, 0, MAX_REPLICA),
    }


def _checked_ids(name: str, what: str, tensor: Tensor, samples: int, sample_ids: Tensor) -> Tensor:
    if not isinstance(sample_ids, Tensor):
        raise DTypeError(f"{name}: sample_ids must be an integer tensor, got {type(sample_ids).__name__}")
    if sample_ids.is_floating_point() or sample_ids.dtype == torch.bool or sample_ids.is_complex():
        raise DTypeError(f"{name}: sample_ids must hold integers, got {sample_ids.dtype}")
    if sample_ids.shape != (samples,):
        found, shape = tuple(sample_ids.shape), tuple(tensor.shape)
        raise ShapeError(f"{name}: sample_ids {found} must be one a sample of {what} {shape}")
    _checks.same_device(name, "sample_ids", sample_ids, what, tensor)
    if sample_ids.dtype != torch.int64:
        sample_ids = sample_ids.to(torch.int64)
    check_ids(name, sample_ids)
    return sample_ids


def _whole(name: str, what: str, value: int | Tensor, low: int, high: int) -> int | Tensor:
    """An int, or a 0-d int64 tensor; what lies on another device is not looked at."""
    if not isinstance(value, Tensor):
        return _checks.integer(name, what, value, low, high)
    if value.dim() != 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ArgumentError(f"{name}: {what} must be an integer or a 0-d int64 tensor, got {found}")
    value = value.to(torch.int64)
    if what == "step":
        check_step(name, value)
    return value


def check_ids(name: str, sample_ids: Tensor) -> None:
    """On a CPU, where looking costs no synchronisation: ArgumentError unless 0 <= id < 2**48."""
    if _checks.on_plain_cpu(sample_ids) and sample_ids.numel():
        low, high = (int(bound) for bound in sample_ids.aminmax())
        if low < 0 or high >= MAX_SAMPLE_ID:
            raise ArgumentError(f"{name}: sample_ids must be in [0, 2**48), got {low if low < 0 else high}")


def check_step(name: str, step: int | Tensor) -> None:
    """The same for a step that a tensor holds."""
    if isinstance(step, Tensor) and _checks.on_plain_cpu(step):
        _checks.integer(name, "step", int(step), 0, MAX_STEP)


def _signed(seed: int) -> int:
    """The 64 bits of a seed as a schema's integer."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def packed(seed: int | Tensor, sample_ids: Tensor, step: int | Tensor, replica: int) -> tuple[Any, ...]:
    """The key as the arguments of :data:`KEY`."""
    device_seed, seed_number = library.split(seed, 0)
    device_step, step_number = library.split(step, 0)
    return device_seed, _signed(seed_number), sample_ids, device_step, step_number, replica


def unpacked(
    device_seed: Tensor | None, seed: int, sample_ids: Tensor, device_step: Tensor | None, step: int, replica: int
) -> dict[str, Any]:
    """And back."""
    return {
        "seed": seed if device_seed is None else device_seed,
        "sample_ids": sample_ids,
        "step": step if device_step is None else device_step,
        "replica": replica,
    }
