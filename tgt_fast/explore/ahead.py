"""Exploration before its batch is due, beside the training on the batches in front of it: a thread, or a CUDA stream.

What is made ahead is made by a copy of the sampler that starts where the sampler will stand. When the batch is due, the
sampler is put where the copy stood after it; if the sampler has been changed in between, it is made anew.
"""

from __future__ import annotations

import copy
import queue
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tgt_fast._threads import cores
from tgt_fast.errors import ArgumentError

if TYPE_CHECKING:
    from tgt_fast.explore.anchors import AnchorPool
    from tgt_fast.explore.counters import Counters
    from tgt_fast.explore.replay import SyntheticReplay
    from tgt_fast.explore.sampler import LatentSampler
    from tgt_fast.explore.synthetic import Synthetic

_END: Final = None
_REASONS: Final = {
    "gradient": "climbs the disagreement of the student as it is at that moment, which a batch ahead is not there yet",
    "persistent": "moves its chains by the backward pass of the batch before",
}


def check_ahead(op: str, sampler: LatentSampler | SyntheticReplay) -> None:
    """
    Raises:
        ArgumentError: what the sampler makes of a batch depends on the training on those before.
    """
    reason = _REASONS.get(sampler.mode)
    if reason is not None:
        raise ArgumentError(f'{op}: mode="{sampler.mode}" {reason}; the modes random and prior can explore ahead')


def pays(device: torch.device) -> bool:
    """Whether something is idle that could explore: a GPU has streams, a CPU cores that PyTorch does not use."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and cores() > torch.get_num_threads()


class Draws:
    """The global generators' states, to see whether something drew from them."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        state: Any = np.random.get_state()
        self._numpy = (state[1].tobytes(), *state[2:])

    def moved(self) -> bool:
        now = Draws()
        return self._numpy != now._numpy or self._python != now._python or not torch.equal(self._torch, now._torch)


class _Item:
    """A batch that is explored ahead, and what came of it."""

    def __init__(self, x: Any, call: dict[str, Any], options: Any, whole: tuple[Any, dict[str, Any]], tag: Any) -> None:
        self.x, self.call, self.options = x, call, options
        self.whole = whole  # the batch of which x is a part, where a pool serves the rest
        self.tag = tag  # by which that part was chosen
        self.made: Synthetic | None = None
        self.counters: Counters | None = None  # and what else of the sampler it moved
        self.scale: Tensor | None = None
        self.pool: AnchorPool | None = None
        self.event: Any = None  # on a CUDA device, that it is made
        self.error: BaseException | None = None
        self.done = threading.Event()

    def explore(self, shadow: LatentSampler) -> None:
        try:
            shadow.options = self.options
            self.made = shadow(self.x, **self.call)
            self.counters, self.scale, self.pool = shadow._counters.copy(), shadow.scale, shadow._pool
        except BaseException as error:  # which its batch's reader gets
            self.error = error


def _shadow(sampler: LatentSampler) -> LatentSampler:
    made = copy.copy(sampler)
    made._counters = sampler._counters.copy()
    return made


def _mark(sampler: LatentSampler) -> tuple[Any, ...]:
    """Objects and their versions, by which a change of the sampler from outside shows."""
    counters = sampler._counters
    tensors = (counters.seed, counters.step, counters.next_id)
    versions = tuple(tensor._version for tensor in tensors)
    return (*tensors, sampler.scale, sampler._pool, counters), versions, counters.stride


def _same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    return all(a is b for a, b in zip(one[0], two[0], strict=True)) and one[1:] == two[1:]


class Ahead:
    """A queue of batches under exploration; what comes out is what ``sampler`` would make of them, one by one."""

    def __init__(self, sampler: LatentSampler | SyntheticReplay, *, beside: bool = True) -> None:
        """``beside``: if False, batches wait as they are until they are taken, as they do where nothing is idle."""
        given: Any = sampler
        self.given = given
        self.replay: SyntheticReplay | None = given if hasattr(sampler, "part_of") else None
        self.sampler: LatentSampler = given if self.replay is None else self.replay.sampler
        self.beside = beside
        self._items: deque[_Item] = deque()
        self._worker: _Worker | _Stream | None = None
        self._expected: tuple[Any, ...] = _mark(self.sampler)
        self._shadow = _shadow(self.sampler)

    def __len__(self) -> int:
        return len(self._items)

    def submit(self, x: Any, device: torch.device, **call: Any) -> None:
        """Begin to explore from a batch."""
        item = self._item(x, call)
        if self._worker is None:
            self.beside = self.beside and pays(device)
        if self.beside:
            if not self._items:
                self._restart()
            if self._worker is None:
                self._worker = _Stream(device) if device.type == "cuda" else _Worker()
            self._worker.put(item, self._shadow)
        self._items.append(item)

    def _item(self, x: Any, call: dict[str, Any]) -> _Item:
        """Of the batch after those in the queue."""
        if self.replay is None:
            return _Item(x, call, self.sampler.options, (x, call), None)
        tag = self._tag(call, len(self._items))
        some = {name: part for name, part in call.items() if name != "step"}
        part, of_part = self.replay.part_of(x, tag[-1], **some)
        of_part |= {name: call[name] for name in ("step",) if name in call}
        return _Item(part, of_part, self.sampler.options, (x, call), tag)

    def _tag(self, call: dict[str, Any], behind: int) -> Any:
        if self.replay is None:
            return None
        return self.replay.reuse, self.replay.seed, call.get("step", self.replay.step_of(behind))

    def fail(self, error: Exception) -> None:
        """A batch that cannot be explored, as will be told in its turn."""
        item = _Item(None, {}, self.sampler.options, (None, {}), None)
        item.error = error
        item.done.set()
        self._items.append(item)

    def take(self, *, lend: bool = False) -> Synthetic | None:
        """The examples of the first batch in the queue; the sampler then stands as if it had made them now.

        With ``lend`` those of a replay stay with it, for its next call; so does the batch where nothing was explored.

        Raises:
            What exploring the batch raised.
        """
        item = self._items[0]
        if self._worker is None:
            self._items.popleft()
            if item.error is not None:
                raise item.error
            x, call = item.whole
            made: Synthetic | None = None if lend else self.given(x, **call)
            return made
        changed = item.options != self.sampler.options or item.tag != self._tag(item.whole[1], 0)
        if (changed and item.x is not None) or not _same(self._expected, _mark(self.sampler)):
            self._again()
            item = self._items[0]
        item.done.wait()
        self._items.popleft()
        if item.error is not None:
            self._wait()  # those after it started from a state that never was
            self._items.clear()
            raise item.error
        assert item.counters is not None
        self.sampler._counters, self.sampler.scale, self.sampler._pool = item.counters, item.scale, item.pool
        self._expected = _mark(self.sampler)
        assert item.made is not None
        self._worker.hand_over(item)
        if self.replay is None:
            return item.made
        self.replay.lend(item.made)
        x, call = item.whole
        return None if lend else self.replay(x, **call)

    def drop(self) -> None:
        """Leave out the first batch in the queue: the sampler will not have seen it."""
        self._items.popleft()
        if self._worker is not None:
            self._again()

    def close(self) -> None:
        """Drop what waits, and end the thread."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._items.clear()

    def _restart(self) -> None:
        self._expected, self._shadow = _mark(self.sampler), _shadow(self.sampler)

    def _wait(self) -> None:
        for item in self._items:
            item.done.wait()

    def _again(self) -> None:
        """Make all that waits anew, from where the sampler stands."""
        assert self._worker is not None
        self._wait()
        self._restart()
        waiting, self._items = self._items, deque()
        for item in waiting:
            if item.x is None:
                self._items.append(item)
                continue
            self._items.append(self._item(*item.whole))
            self._worker.put(self._items[-1], self._shadow)


class _Worker:
    """A thread that explores batches one after the other, under the caller's modes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(self._queue, self._over), name="tgt_fast: exploration ahead", daemon=True
        )
        self._thread.start()
        self._at_exit = weakref.finalize(self, _end, self._queue, self._over, self._thread)

    def put(self, item: _Item, shadow: LatentSampler) -> None:
        self._queue.put((item, shadow, _modes()))

    def hand_over(self, item: _Item) -> None:
        return None  # who waited for it can read it

    def close(self) -> None:
        self._at_exit()


def _end(waiting: queue.SimpleQueue[Any], over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    waiting.put(_END)
    if thread is not threading.current_thread():
        thread.join()


def _work(waiting: queue.SimpleQueue[Any], over: threading.Event) -> None:
    while True:
        found = waiting.get()
        if found is _END:
            return
        item, shadow, modes = found
        if not over.is_set():
            with modes():
                item.explore(shadow)
        item.done.set()
        del found, item, shadow, modes  # no batch is kept while the next one is waited for


def _modes() -> Callable[[], AbstractContextManager[Any]]:
    """What is the calling thread's own and decides what is computed, to be entered in another."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    cast = _cast()
    device = torch.get_default_device()

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            if not inference:
                stack.enter_context(torch.set_grad_enabled(grad))
            stack.callback(_set_cast, *_cast())
            _set_cast(*cast)
            if device.type != "cpu":
                stack.enter_context(device)
            yield

    return entered


def _cast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def _set_cast(enabled: bool, dtype: torch.dtype) -> None:
    """Without ``torch.autocast``, whose end would empty the weights' cache of all threads, in the midst of a step."""
    torch.set_autocast_enabled("cpu", enabled)
    torch.set_autocast_dtype("cpu", dtype)


class _Stream:
    """A side stream of a CUDA device, onto which exploration is launched at once (not yet run on a GPU)."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def put(self, item: _Item, shadow: LatentSampler) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            item.explore(shadow)
            item.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            item.event.record(self._stream)
        for given in (item.x, item.call):  # memory that the caller may let go of before the stream has read it
            _of_stream(given, self._stream)
        item.done.set()

    def hand_over(self, item: _Item) -> None:
        here = torch.cuda.current_stream(self._stream.device)
        here.wait_event(item.event)
        for kept in (vars(item.made), vars(item.counters)):  # of the stream's memory, which it may not use again yet
            _of_stream(kept, here)

    def close(self) -> None:
        return None


def _of_stream(things: Any, stream: Any) -> None:
    for leaf in pytree.tree_leaves(things):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)
