"""What a sampler in one of several processes has for itself: its chains, and a scale measured on its own data."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

_NUMBERS: Final = 64  # of a scale, that are compared between processes
_CLOSE: Final = 1e-3  # relative; what the same data may differ by on two devices is far less, on two shards more
_ONE: Final = (
    "so that sigma, step_size and radius mean other lengths on each; give every process the same data, or load one "
    "process's state into the others"
)
_calibrated = itertools.count()  # so that the calls of a program that all processes run find each other


def warn_of_own_chains(place: tuple[int, int]) -> None:
    """As a state is made, in the first process: that it is not everybody's."""
    rank, world = place
    if rank == 0 and world > 1:
        warnings.warn(
            f"LatentSampler: the chains in a state_dict() are those of this process, rank 0 of {world}, alone; save "
            "every rank's own state and load it there. Where rank 0's is all that is saved, the others' chains are "
            "lost and begin anew",
            stacklevel=3,
        )


def warn_of_foreign_chains(saved: tuple[int, int], here: tuple[int, int]) -> None:
    """As a state is loaded: that its chains are another process's. One process's own of old may go to any number."""
    if saved[1] > 1 and saved != here:
        warnings.warn(
            f"LatentSampler: the chains in this state are those of rank {saved[0]} of {saved[1]}, loaded into rank "
            f"{here[0]} of {here[1]}: chains of examples that other ranks had begin anew from Enc(x) + noise; save "
            "every rank's own state_dict(), and load it in the same rank of as many",
            stacklevel=4,
        )


def warn_of_shards(loader: Any, scale: Tensor) -> None:
    """After a calibration: that this process measured on its part of the data, as far as it can tell.

    By what splits a loader up, and by the scales of neighbouring processes that are done with theirs. Those are read
    from the process group's store, without waiting: a program that calibrates in one process alone goes on.
    """
    parts = _parts(loader)
    if parts > 1:
        message = f"LatentSampler: calibrate was given a loader that is split over {parts} processes, {_ONE}"
        warnings.warn(message, stacklevel=5)
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        other = _another_scale(scale)
        if other is not None:
            message = f"LatentSampler: calibrate measured another scale in this process than in rank {other}, {_ONE}"
            warnings.warn(message, stacklevel=5)


def _parts(loader: Any) -> int:
    """Of how many parts the loader gives one, going by samplers of PyTorch's and of accelerate's kind."""
    batches = getattr(loader, "batch_sampler", None)
    holders = [loader, batches, getattr(loader, "dataset", None)]
    holders += [getattr(holder, "sampler", None) for holder in (loader, batches)]
    found = [getattr(holder, name, 1) for holder in holders for name in ("num_replicas", "num_processes")]
    return max(count for count in found if isinstance(count, int))


def _another_scale(scale: Tensor) -> int | None:
    """A neighbouring rank whose scale, where it is known, is another one."""
    rank, world, number = torch.distributed.get_rank(), torch.distributed.get_world_size(), next(_calibrated)
    numbers = scale.flatten()
    mine = numbers[:: max(1, len(numbers) // _NUMBERS)][:_NUMBERS].to("cpu", torch.float64).numpy()
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(
            _key(number, rank), mine.tobytes().hex()
        )  # before the others' are read: the later of two sees the other
        for other in {(rank - 1) % world, (rank + 1) % world} - {rank}:
            if store.check([_key(number, other)]):
                theirs = np.frombuffer(bytes.fromhex(store.get(_key(number, other)).decode()), np.float64)
                if theirs.shape != mine.shape or not np.allclose(theirs, mine, rtol=_CLOSE, atol=0):
                    return other
    except (RuntimeError, NotImplementedError, AttributeError):  # a store that cannot tell: nothing is known
        return None
    return None


def _key(number: int, rank: int) -> str:
    return f"tgt_fast/scale/{number}/{rank}"
