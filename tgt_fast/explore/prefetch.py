"""Batches of a loader beside the examples explored from them, made while the batch before is trained on."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, cast

from tgt_fast.errors import ArgumentError
from tgt_fast.explore.ahead import Ahead, Draws, check_ahead
from tgt_fast.explore.by_class import label_argument
from tgt_fast.explore.cached import check_cache, needed_ids
from tgt_fast.explore.options import checked_integer
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.teacher import tree
from tgt_fast.teacher.batches import Columns, check_loader

if TYPE_CHECKING:
    from tgt_fast.explore.replay import SyntheticReplay
    from tgt_fast.explore.sampler import LatentSampler

_OP: Final = "prefetch"
MOST: Final = 1024  # batches ahead


class ReadingAhead:
    """Batches that are read before they are due, as long as that changes nothing.

    A loader that draws from the global generators as it reads (augmentation in this process) would draw before the
    training on the batch in front does, so such a one is not read ahead. Whether it is one shows in the second batch of
    a run, which is read when it is due; the first one's draws may be those that begin an epoch.
    """

    def __init__(self) -> None:
        self._reads = 0
        self.allowed: bool | None = None  # None: not known yet

    def __call__(self, read: Callable[[], Any], *, due: bool) -> Any:
        """What ``read`` gives, which is read when it is due or before."""
        if self.allowed is False or (due and (self.allowed or self._reads == 0)):
            self._reads += 1
            return read()
        before = Draws()
        found = read()
        self._reads += 1
        moved = before.moved()
        if moved and not due:
            warnings.warn(
                "prefetch: the loader has drawn random numbers in this process as it was read ahead; from here on "
                "batches are read when they are due, and the run's numbers differ from those without prefetch",
                stacklevel=3,
            )
        self.allowed = not moved
        return found


class Prefetching:
    """Exploration ahead, for loops of one's own."""

    def prefetch(
        self,
        loader: Iterable[Any],
        *,
        depth: int = 2,
        columns: Sequence[Any] | None = None,
        cache: Any = None,
    ) -> Iterator[tuple[Any, Synthetic]]:
        """``for batch, synth in sampler.prefetch(loader)``: one epoch, with ``synth = sampler(x, sample_ids=ids)``.

        The next batches are read and explored while the body of the loop trains: on a CUDA device on a stream of their
        own (not yet run on a GPU), on a CPU in a thread, where PyTorch leaves it a core
        (``torch.set_num_threads``). The bits are those without: batches come in order, the sampler's counters are those
        of the batches that came, and a sampler that is changed in the loop explores anew what was ahead.

        Args:
            loader: batches ``(ids, x, y)``, ``(x, y)`` or ``x``, or others with ``columns`` as for
                :func:`tgt_fast.fit`. One that draws from the global random generators in this process as it reads is
                not read ahead: its numbers would come before those of the training.
            depth: in [0, 1024], how many batches are explored ahead; 0: none.
            cache: a :class:`tgt_fast.TeacherCache` with ``latents=True``, or an ensemble's, which gives Enc(x).

        Yields:
            ``(batch, synth)``: the batch as the loader gave it, and what the sampler makes of it on the teacher's
            device. An error of the loader or of exploration is raised in the turn of its batch. A loop that is left
            ends the thread.

        Raises:
            ArgumentError: the modes gradient and persistent, which need the student as the batch before leaves it.
        """
        sampler = cast("LatentSampler | SyntheticReplay", self)
        check_ahead("LatentSampler", sampler)
        if getattr(self, "select", "uniform") != "uniform" or getattr(self, "retire", None) is not None:
            raise ArgumentError(
                'SyntheticReplay: select="disagreement" and retire= ask the student in each step, which a loop over '
                "prefetch() has no place for; fit(prefetch=) has"
            )
        check_loader(_OP, loader)
        depth = checked_integer("depth", depth, 0, MOST)
        check_cache(_OP, cache)
        return _explored(sampler, loader, depth, Columns(_OP, columns), cache)


def _explored(
    sampler: LatentSampler | SyntheticReplay, loader: Iterable[Any], depth: int, columns: Columns, cache: Any
) -> Iterator[tuple[Any, Synthetic]]:
    teacher, batches, reading = sampler.teacher, iter(loader), ReadingAhead()
    waiting: deque[Any] = deque()  # batches, or the error that reading the next one gave
    over = False

    def read(due: bool) -> None:
        """One batch more in the queue, and under exploration."""
        nonlocal over
        try:
            raw = reading(lambda: next(batches, waiting), due=due)
            if raw is waiting:  # the end, of which nothing else can be the mark
                over = True
                return
            batch = columns.split(raw)
            device = teacher.device or tree.first_device(batch.x)
            x = tree.map_batched(lambda leaf: leaf.to(device), batch.x)
            call: dict[str, Any] = {"sample_ids": batch.sample_ids}
            call |= label_argument(sampler, batch.y, tree.batch_size(x), device)
            if cache is not None and sampler.encodes:
                call["latents"] = cache.encode(x, needed_ids(_OP, batch.sample_ids))
            ahead.submit(x, device, **call)
            waiting.append(raw)
        except Exception as error:
            if due:
                raise
            over = True
            waiting.append(_Failed(error))

    with closing(Ahead(sampler, beside=depth > 0)) as ahead:
        while True:
            if not waiting and not over:
                read(due=True)
            if not waiting:
                return
            while ahead.beside and reading.allowed and not over and len(waiting) <= depth:
                read(due=False)
            first = waiting.popleft()
            if isinstance(first, _Failed):
                raise first.error
            made = ahead.take()
            assert made is not None
            yield first, made


class _Failed:
    def __init__(self, error: Exception) -> None:
        self.error = error
