"""The key of counter-based noise: (seed, sample ids, step, replica), checked, and as a registered op's arguments."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DeviceError, ShapeError
from tgt_fast.kernels.options import MAX_REPLICA, MAX_SAMPLE_ID, MAX_STEP
from tgt_fast.kernels.philox import NoiseKey
from tgt_fast.ops import _checks, library
from tgt_fast.ops._checks import readable

KEY: Final = (
    "Tensor? device_seed, int seed, Tensor sample_ids, Tensor? device_step, int step, Tensor? replicas, int replica"
)
KEY_COUNT: Final = 7  # arguments of that
_ID_BITS: Final = 48


def noise_key(
    name: str,  # of the op
    what: str,  # the tensor whose samples have the noise
    tensor: Tensor,
    samples: int,
    seed: int | Tensor,
    sample_ids: Tensor | None,
    step: int | Tensor,
    replica: int | Tensor,
    op: int = 0,
) -> NoiseKey:
    """The checked key of the noise. Integers that live in a tensor stay there."""
    if sample_ids is None:
        ids = torch.arange(samples, device=tensor.device)
    else:
        ids = _checked_ids(name, what, tensor, samples, sample_ids)
    seed = _whole(name, "seed", seed, tensor, -(2**63), 2**64)
    step = _whole(name, "step", step, tensor, 0, MAX_STEP)
    return NoiseKey(seed, ids, step, _checked_replica(name, what, tensor, samples, replica), op)


def for_kernel(key: NoiseKey) -> NoiseKey:
    """The key as kernels take it, for whom a replica is one number.

    The counter has the replica above the upper bits of the id, so a replica of each sample's own travels in the bits
    48 to 63 of its id, and comes out of every kernel's Philox as if it had been given as the number.
    """
    replica = key.replica
    if not isinstance(replica, Tensor):
        return key
    return key._replace(sample_ids=key.sample_ids & (MAX_SAMPLE_ID - 1) | replica << _ID_BITS, replica=0)


def _checked_ids(name: str, what: str, tensor: Tensor, samples: int, sample_ids: Tensor) -> Tensor:
    ids = _one_a_sample(name, "sample_ids", sample_ids, what, tensor, samples)
    check_ids(name, ids)
    return ids


def _checked_replica(name: str, what: str, tensor: Tensor, samples: int, replica: int | Tensor) -> int | Tensor:
    if not isinstance(replica, Tensor):
        return _checks.integer(name, "replica", replica, 0, MAX_REPLICA)
    replicas = _one_a_sample(name, "replica", replica, what, tensor, samples)
    check_replicas(name, replicas)
    return replicas


def _one_a_sample(name: str, label: str, value: Tensor, what: str, tensor: Tensor, samples: int) -> Tensor:
    _checks.integers(name, label, value)
    if value.shape != (samples,):
        found, shape = tuple(value.shape), tuple(tensor.shape)
        raise ShapeError(f"{name}: {label} {found} must be one a sample of {what} {shape}")
    _checks.same_device(name, label, value, what, tensor)
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def _whole(name: str, what: str, value: int | Tensor, tensor: Tensor, low: int, high: int) -> int | Tensor:
    """An int, or a 0-d int64 tensor; what lies on another device is not looked at."""
    if not isinstance(value, Tensor):
        return _checks.integer(name, what, value, low, high)
    readable(name, what, value)
    if value.dim() != 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ArgumentError(f"{name}: {what} must be an integer or a 0-d int64 tensor, got {found}")
    if value.is_meta and not tensor.is_meta:  # which nothing can be read from, unlike from another device
        raise DeviceError(f"{name}: {what} is on {value.device}, its samples on {tensor.device}")
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


def check_replicas(name: str, replica: int | Tensor) -> None:
    """Likewise, of replicas that a tensor holds: 0 <= replica < 2**16."""
    if isinstance(replica, Tensor) and _checks.on_plain_cpu(replica) and replica.numel():
        low, high = (int(bound) for bound in replica.aminmax())
        if low < 0 or high >= MAX_REPLICA:
            raise ArgumentError(f"{name}: replica must be in [0, 2**16), got {low if low < 0 else high}")


def check_key(name: str, key: NoiseKey) -> NoiseKey:
    """A key that came through a schema, as kernels take it, once the values that there are to look at are checked."""
    check_ids(name, key.sample_ids)
    check_step(name, key.step)
    check_replicas(name, key.replica)
    return for_kernel(key)


def check_step(name: str, step: int | Tensor) -> None:
    """The same for a step that a tensor holds."""
    if isinstance(step, Tensor) and _checks.on_plain_cpu(step):
        _checks.integer(name, "step", int(step), 0, MAX_STEP)


def _signed(seed: int) -> int:
    """The 64 bits of a seed as a schema's integer."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def packed(key: NoiseKey) -> tuple[Any, ...]:
    """The key as the arguments of :data:`KEY`."""
    device_seed, seed_number = library.split(key.seed, 0)
    device_step, step_number = library.split(key.step, 0)
    ids, replicas = key.sample_ids, library.split(key.replica, 0)
    return device_seed, _signed(seed_number), ids, device_step, step_number, *replicas


def unpacked(arguments: tuple[Any, ...], op: int = 0, truncation: float | None = None) -> NoiseKey:
    """And back."""
    device_seed, seed, sample_ids, device_step, step, replicas, replica = arguments
    return NoiseKey(
        seed if device_seed is None else device_seed, sample_ids, step if device_step is None else device_step,
        replica if replicas is None else replicas, op, truncation,
    )  # fmt: skip
