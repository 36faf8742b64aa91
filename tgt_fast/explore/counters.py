"""Counters of a sampler, so that its caller need not count: steps, and the ids of examples without one."""

from __future__ import annotations

import copy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tgt_fast._processes import place
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.explore.options import SamplerOptions, checked_integer
from tgt_fast.explore.repeats import first_replicas
from tgt_fast.kernels.options import MAX_SAMPLE_ID, MAX_STEP
from tgt_fast.ops._noise import check_ids
from tgt_fast.teacher.key import Key


class Counters:
    """Makes the noise key of each call. The counters are tensors on the device of the batches and are counted
    there, so that a replayed CUDA graph moves on."""

    def __init__(self, seed: int, rank: int | None, world_size: int | None) -> None:
        self._place_given = _checked_place(rank, world_size)
        self.seed = seed_tensor(seed)
        with torch.inference_mode(False):  # normal tensors, which may be counted up in any mode
            self.step = torch.tensor(0, device="cpu")
            self.next_id = torch.tensor(0, device="cpu")
        self.stride = 0  # ids set aside for each rank a call, where there are several

    def key(
        self,
        count: int,
        device: torch.device,
        sample_ids: Tensor | None,
        step: int | Tensor | None,
        occurrence: Tensor | None,
        options: SamplerOptions,
    ) -> Key:
        """The key of a batch of ``count`` examples' first replicas: what the caller gives, and for the rest the
        counters."""
        if self.seed.device != device:
            with torch.inference_mode(False):
                self.seed, self.step, self.next_id = (t.to(device) for t in (self.seed, self.step, self.next_id))
        given = None if sample_ids is None else checked_ids(sample_ids, count)
        replica = first_replicas(given, occurrence, options)  # where the ids lie: on a CPU it costs least
        if given is None:
            rank, world = self.place
            ids = self.next_id + rank * self._stride_for(count, world) + torch.arange(count, device=device)
        else:
            ids = given.to(device)
        return Key(
            self.seed,
            ids,
            self.step.clone() if step is None else checked_step(step, device),
            replica.to(device) if isinstance(replica, Tensor) else replica,
        )

    def copy(self) -> Counters:
        """Others that stand where these do, and count for themselves."""
        made = copy.copy(self)
        with torch.inference_mode(False):
            made.seed, made.step, made.next_id = self.seed.clone(), self.step.clone(), self.next_id.clone()
        return made

    def advance(self, count: int, *, ids: bool, step: bool) -> None:
        """Count one call, for the counters that it used."""
        if ids:
            _, world = self.place
            self.stride = self._stride_for(count, world)
            self.next_id += world * self.stride
        if step:
            self.step += 1

    def _stride_for(self, count: int, world: int) -> int:
        # A rank's share of the ids must not depend on how few examples happen to be in its last batch.
        return count if world == 1 else max(count, self.stride)

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank, and of how many."""
        return place() if self._place_given is None else self._place_given


def seed_tensor(seed: int) -> Tensor:
    """0-d int64, a normal tensor in any mode."""
    with torch.inference_mode(False):
        return torch.tensor(checked_integer("seed", seed, -(2**63), 2**63 - 1), device="cpu")


def _checked_place(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise ArgumentError(
            f"LatentSampler: give both rank and world_size, or neither; got {rank!r} and {world_size!r}"
        )
    world_size = checked_integer("world_size", world_size, 1, MAX_SAMPLE_ID)
    return checked_integer("rank", rank, 0, world_size - 1), world_size


def checked_ids(ids: Any, count: int) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise DTypeError(f"LatentSampler: sample_ids must be a tensor of integers, got {found}")
    if ids.ndim != 1 or ids.shape[0] != count:
        raise ShapeError(f"LatentSampler: sample_ids {tuple(ids.shape)} must be ({count},), one an example")
    check_ids("LatentSampler", ids)
    return ids.to(torch.int64)


def checked_step(step: Any, device: torch.device) -> int | Tensor:
    if isinstance(step, Tensor) and step.ndim == 0 and not step.is_floating_point():
        return step.to(device, torch.int64)
    if isinstance(step, bool) or not isinstance(step, Integral):
        raise ArgumentError(f"LatentSampler: step must be an integer or a 0-d integer tensor, got {step!r}")
    if not 0 <= int(step) < MAX_STEP:
        raise ArgumentError(f"LatentSampler: step must be in [0, 2**28), got {step}")
    return int(step)
