"""A loader read as an endless stream whose place can be saved and found again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from tgt_fast._rng import get_rng_state, isolated_rng, set_rng_state
from tgt_fast.errors import ArgumentError, DeviceError
from tgt_fast.teacher.batches import check_loader

_END = object()


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Every tensor of a pytree on ``device``; None leaves them where they are."""
    if device is None:
        return batch
    return pytree.tree_map_only(Tensor, lambda tensor: _moved(tensor, device), batch)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_meta and device.type != "meta":
        raise DeviceError(f"a batch is on the device meta, where tensors have no values; the student is on {device}")
    return tensor.to(device, non_blocking=True)


def module_device(module: nn.Module) -> torch.device | None:
    """The device of a module's first parameter or buffer; None when it has neither."""
    return next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), None)


class BatchStream:
    """The batches of ``loader``, epoch after epoch, with a place that can be saved.

    The order of an epoch is drawn as it begins, from the global generators or from those of the loader and
    its samplers. So their states at that moment, and the number of batches taken since, say where the stream
    is. Finding the place again reads the epoch's batches up to there once more; it moves the global
    generators, which are the caller's to set afterwards.

    Persistent workers are started before that moment, and without moving a generator: who starts them draws a number
    for their seeds, which must not make the first epoch of a process, so the one resumed in, differ from the others.

    Args:
        loader: a DataLoader, or anything that can be iterated over again. Its ``set_epoch``, its data set's and its
            samplers' are called.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        check_loader("BatchStream", loader)
        self.loader = loader
        self.epoch = 0  # the epoch under way, counted from 0
        self.position = 0  # batches taken of it
        self._batches: Iterator[Any] | None = None
        self._over = False  # whether the epoch under way has been read to its end
        self._order: object = None  # what the iterator of a DataLoader goes by, a new one each time it is begun anew
        self._start: dict[str, Any] | None = None  # the generators when it began

    def take(self) -> Any:
        """The next batch.

        Raises:
            ArgumentError: an epoch without any batch.
        """
        while True:
            if self._batches is None:
                self._batches = self._begin()
            elif _order_of(self._batches) is not self._order:
                self._find_again()
            batch = _END if self._over else next(self._batches, _END)
            if batch is not _END:
                self.position += 1
                return batch
            if not self.position:
                raise ArgumentError("the loader gave no batch: it is empty, or can be read only once")
            self.epoch, self.position, self._batches, self._over = self.epoch + 1, 0, None, False

    def more(self) -> bool:
        """Whether the epoch under way may have another batch, which can be taken without beginning the next one."""
        return self._batches is not None and not self._over and _order_of(self._batches) is self._order

    def take_early(self) -> tuple[Any, ...]:
        """``(batch,)``, the next of the epoch under way, or ``()`` at its end."""
        assert self._batches is not None
        batch = next(self._batches, _END)
        if batch is _END:
            self._over = True  # the place stays: a new epoch begins as its first batch is due
            return ()
        self.position += 1
        return (batch,)

    def state_dict(self) -> dict[str, Any]:
        own = [generator.get_state() for generator in self._generators()]
        return {"epoch": self.epoch, "position": self.position, "start": self._start, "generators": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            ArgumentError: the loader has fewer batches, or other generators, than the one whose place was
                saved.
        """
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise ArgumentError(f"BatchStream: it is no state of one: {str(state)[:200]}")
        generators, start = self._generators(), state["start"]
        if len(generators) != len(state["generators"]):
            raise ArgumentError("the loader's random generators are not those of the run that was saved")
        self.epoch, self.position, self._batches, self._over = state["epoch"], 0, None, False
        if start is not None:
            set_rng_state(start["global"])
            _set_states(generators, start["generators"])
            self._batches = self._begin()
            self.position = sum(1 for _ in itertools.islice(self._batches, state["position"]))
        if self.position < state["position"]:
            raise ArgumentError(f"the loader has {self.position} batches; the saved run had taken {state['position']}")
        # They may have been used for something else since the epoch began, such as an evaluation.
        _set_states(generators, state["generators"])

    def _begin(self) -> Iterator[Any]:
        for owner in _distinct((self.loader, getattr(self.loader, "dataset", None), *self._samplers())):
            if hasattr(owner, "set_epoch"):  # a DistributedSampler shuffles by it
                owner.set_epoch(self.epoch)
        self._start_workers()
        own = [generator.get_state() for generator in self._generators()]
        self._start = {"global": get_rng_state(), "generators": own}
        batches = iter(self.loader)
        self._order = _order_of(batches)
        return batches

    def _find_again(self) -> None:
        """Persistent workers serve one reader at a time, and another one, such as an evaluation, came in between."""
        with isolated_rng():
            self.load_state_dict(self.state_dict())

    def _start_workers(self) -> None:
        loader = self.loader
        if not isinstance(loader, DataLoader) or not loader.num_workers or not loader.persistent_workers:
            return
        if isinstance(loader.dataset, IterableDataset):
            return  # its order is drawn in its workers, and what they have read is gone
        if loader._iterator is None:
            own = [generator.get_state() for generator in self._generators()]
            with isolated_rng():
                iter(loader)
            _set_states(self._generators(), own)

    def _samplers(self) -> list[Any]:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        found = (
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        return _distinct(sampler for sampler in found if sampler is not None)

    def _generators(self) -> list[torch.Generator]:
        found = (getattr(owner, "generator", None) for owner in (self.loader, *self._samplers()))
        return _distinct(generator for generator in found if isinstance(generator, torch.Generator))


def _order_of(batches: Iterator[Any]) -> object:
    return getattr(batches, "_sampler_iter", None)


def _distinct(objects: Iterable[Any]) -> list[Any]:
    return list({id(one): one for one in objects}.values())


def _set_states(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
