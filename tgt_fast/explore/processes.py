"""The share of a sampler in one of several processes: its chains, and a scale measured on its own data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tgt_fast._processes import connected, done_by_each, exchanged, place
from tgt_fast.errors import ArgumentError
from tgt_fast.ops.counts import counting_group

_NUMBERS: Final = 64  # of a scale, that are compared between processes
_CLOSE: Final = 1e-3  # relative; what the same data may differ by on two devices is far less, on two shards more
_ONE: Final = (
    "so that sigma, step_size and radius mean other lengths on each; give every process the same data, or load one "
    "process's state into the others"
)
_CHAIN_ID: Final = (1 << 48) - 1  # of a chain's key, the sample id
_WATCHED, _ASKED = 256, 4096  # chains of a bank that others can find, and that it looks for itself
_watched = itertools.count()
_calibrated = itertools.count()  # so that the calls of a program that all processes run find each other


# Whether every process saves the state that it makes, so that nothing is lost
SAVED_BY_ALL: ContextVar[bool] = ContextVar("SAVED_BY_ALL", default=False)


@contextmanager
def saved_by_all(every: bool) -> Iterator[None]:
    """Inside, with ``every``, each process saves its own state: none warns that it is one process's alone."""
    token = SAVED_BY_ALL.set(every)
    try:
        yield
    finally:
        SAVED_BY_ALL.reset(token)


def warn_of_own_chains(place: tuple[int, int]) -> None:
    """As a state is made, in the first process: that it is not everybody's."""
    rank, world = place
    if rank == 0 and world > 1 and not SAVED_BY_ALL.get():
        warnings.warn(
            f"LatentSampler: the chains in a state_dict() are those of this process, rank 0 of {world}, alone; save "
            "every rank's own state and load it there, or one state_dict(group='world'), which every rank makes. "
            "Where rank 0's is all that is saved, the others' chains are lost and begin anew",
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
    elif connected():
        other = _another_scale(scale)
        if other is not None:
            message = f"LatentSampler: calibrate measured another scale in this process than in rank {other}, {_ONE}"
            warnings.warn(message, stacklevel=5)


class ChainWatch:
    """Notices that an example whose chain one process has comes to another one, which does not know it.

    The first chains that begin are written down in the process group's store, where another process that begins one
    looks for it; no process waits for another.
    """

    def __init__(self) -> None:
        self._number: int | None = None  # of the bank, among those that a program which all processes run begins
        self._watched, self._asked = _WATCHED, _ASKED

    def begun(self, chains: list[int]) -> None:
        if not chains or not self._asked:
            return
        rank, world = place()
        if world == 1:
            return
        if self._number is None:
            self._number = next(_watched)
        chains = chains[: self._asked]
        self._asked -= len(chains)
        try:
            store = torch.distributed.distributed_c10d._get_default_store()
            for chain in chains:
                key = f"tgt_fast/chain/{self._number}/{chain}"
                if store.check([key]):
                    other = int(store.get(key))
                    if other != rank:
                        self._asked = 0  # once
                        self._warn(chain & _CHAIN_ID, other, rank)
                        return
                elif self._watched:
                    store.set(key, str(rank))
                    self._watched -= 1
        except (RuntimeError, NotImplementedError, AttributeError):  # a store that cannot tell
            self._asked = 0

    @staticmethod
    def _warn(sample_id: int, other: int, rank: int) -> None:
        warnings.warn(
            f"LatentSampler: sample id {sample_id}, whose chain is in rank {other}, came to rank {rank}: chains stay "
            "in their process, so that one whose id moves starts there anew from Enc(x) + noise (or where a loaded "
            "state left it); a sampler that gives each process the same examples every epoch keeps them going",
            stacklevel=5,
        )


def of_all_processes(op: str, group: Any, work: Callable[[], Any]) -> list[Any]:
    """Results of ``work`` in each process of the group, in the order of ranks; where it fails in one, all raise."""
    group = counting_group(op, group, name="group")
    if group is None:
        return [work()]
    return done_by_each(
        work,
        lambda mine: exchanged(mine, group),
        lambda rank, _, text: ArgumentError(f"{op}: rank {rank} of the group failed: {text}"),
    )


def _parts(loader: Any) -> int:
    """Of how many parts the loader gives one, going by samplers of PyTorch's and of accelerate's kind."""
    batches = getattr(loader, "batch_sampler", None)
    holders = [loader, batches, getattr(loader, "dataset", None)]
    holders += [getattr(holder, "sampler", None) for holder in (loader, batches)]
    found = [getattr(holder, name, 1) for holder in holders for name in ("num_replicas", "num_processes")]
    return max(count for count in found if isinstance(count, int))


def _another_scale(scale: Tensor) -> int | None:
    """A neighbouring rank whose scale, where it is known, is another one."""
    (rank, world), number = place(), next(_calibrated)
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
