"""SyntheticReplay: synthetic examples that are served more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.explore.by_class import ByClass, is_by_class
from tgt_fast.explore.counters import checked_ids, checked_step
from tgt_fast.explore.gradient import divergence_of_each
from tgt_fast.explore.guard import preserve_student, unwrapped
from tgt_fast.explore.lottery import LAST, by_score, in_turn, lottery, weighted
from tgt_fast.explore.options import Adjustable, SamplerOptions, checked_integer
from tgt_fast.explore.pool import RowPool, joined
from tgt_fast.explore.prefetch import Prefetching
from tgt_fast.explore.replay_saving import SavedReplay
from tgt_fast.explore.sampler import LatentSampler
from tgt_fast.explore.scores import Score, scored
from tgt_fast.explore.student import refuse_labeler, student_logits
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.explore.tally import Tally
from tgt_fast.ops import _checks
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.returned import LogitsOf, check_logits_of
from tgt_fast.teacher.teacher import checked_logits

SELECT: Final = ("uniform", "disagreement")
_OP: Final = "SyntheticReplay"
_ANCHORS, _ROWS = 0, 1  # what lotteries are about; rows: of each call of a step another


class SyntheticReplay(Adjustable, Prefetching, SavedReplay):
    r"""A sampler that explores a ``reuse``-th of what it serves, and takes the rest from a pool of earlier examples::

        fresh  = sampler(x[a])        a: ceil(B / reuse) rows of the batch, each in its turn
        pool   = the last ``capacity`` rows that were fresh
        served = fresh and, of the pool, (B - |a|) * replicas rows: drawn uniformly, or those of largest
                 D( f(x~), h(x~) ) among ``candidates`` times as many that were drawn

    with f the student as it is now, h the labeler, D the sampler's divergence at its temperature. The teacher is
    frozen, so a synthetic example and its soft label stay right; what they can still teach changes.

    It is used wherever a :class:`tgt_fast.LatentSampler` is, called like one, and has its options as attributes.

    Source: this project's; experience replay goes back to Lin, "Self-improving reactive agents based on reinforcement
    learning, planning and teaching" (Machine Learning, 1992), the preference for what is learned least to Schaul et
    al., "Prioritized experience replay" (ICLR 2016). No published work replays a teacher's latent explorations.

    Args:
        sampler: the :class:`tgt_fast.LatentSampler` that explores, of any mode but persistent.
        reuse: >= 1, how often an example is served on average; 1 is the sampler itself.
        capacity: >= 1, rows that the pool keeps; beyond it the oldest give way.
        select: "uniform"; "disagreement"; or, in the place of D, a score such as those of :mod:`tgt_fast.scores`. All
            but the first need ``student=`` at each call, which runs once more, in eval mode, on the candidates, and is
            left as it was found.
        by_class: None; or "balanced", or weights of the classes, >= 0 (a tensor, a sequence, or a dict, whose other
            classes have the weight under None, or 1): rows are drawn from the pool so that each class of the labeler's
            argmax comes in proportion to its weight, as far as the pool holds it. A class of weight 0 comes only where
            there is nothing else.
        candidates: >= 1, how many rows are drawn for one that is taken (all but "uniform").
        retire: >= 0 or None: a row whose D was found below it is not served again. D is found of the candidates; with
            "uniform" of the rows that are drawn, for which the student runs once more.
        device: where the pool lies; by default where the sampler's examples do. With "cpu" beside a CUDA device it lies
            in pinned memory, and each call waits for the rows that it adds.
        seed: 64-bit integer of the draws. They are keyed by it, the step and, where a step has several calls, the
            call's number in it alone; no global generator is read or written.

    Attributes:
        sampler: the sampler that explores.
        teacher, mode, scale, options, last_disagreement, ...: the sampler's; an assignment such as
            ``replay.sigma = 0.5`` reaches it.
        reuse, capacity, select, by_class, candidates, retire, seed: the arguments above.

    A call of B examples explores ceil(B / reuse) and serves replicas * B rows (with replicas by class, as many as all
    of the batch asks for), no row twice as long as the pool has enough of them. In the first calls it does not: then
    its rows are served in turn, equally often, so that the teacher's work is a ``reuse``-th from the beginning. A batch
    below ``reuse`` examples explores one.

    Row ``r * B + b`` of what is served does *not* belong to the batch's row b: ``Synthetic.anchor_ids`` says which real
    example a row started from, and the caller's labels are not its.

    Examples of different lengths are padded to the longest in the pool, as the teacher pads them. Logits of a position
    each must be of one length.

    Each process has its own pool, and its rows in its own ``state_dict()``, from which a resumed run goes on with the
    same bits; ``state_dict(group="world")`` holds those of all.

    Raises:
        ArgumentError: no sampler, one in persistent mode, or an option outside its range.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> sampler = tgt.LatentSampler(teacher, mode="random", sigma=0.5, units="absolute")
    >>> replay = tgt.SyntheticReplay(sampler, reuse=4)
    >>> for step in range(6):
    ...     synth = replay(torch.randn(8, 8), step=step)
    >>> synth.x.shape, replay.statistics()["explored"], replay.statistics()["served"]
    (torch.Size([8, 8]), 12, 48)
    """

    def __init__(
        self,
        sampler: LatentSampler,
        *,
        reuse: int = 8,
        capacity: int = 8192,
        select: str | Score = "uniform",
        by_class: Any = None,
        candidates: int = 4,
        retire: float | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(sampler, LatentSampler):
            raise ArgumentError(f"{_OP}: sampler must be a tgt_fast.LatentSampler, got {type(sampler).__name__}")
        if sampler.mode == "persistent":
            raise ArgumentError(
                f'{_OP}: mode="persistent" moves an example\'s chain by the backward pass of the batch that it was '
                "served in, and costs no teacher's work that replay could save; use random, gradient or prior"
            )
        self.sampler = sampler
        self.reuse = checked_integer("reuse", reuse, 1, 1 << 30, _OP)
        self.capacity = checked_integer("capacity", capacity, 1, 1 << 40, _OP)
        self.select: str | Score = select if callable(select) else _checks.choice(_OP, "select", select, SELECT)
        if by_class is None or is_by_class(by_class):
            self.by_class = None if by_class is None else ByClass.of("by_class", by_class, 0, LAST, op=_OP)
        else:
            _checks.choice(_OP, "by_class", by_class, ("balanced",))
            self.by_class = ByClass((1.0,), 1.0, closed=False)
        if self.by_class is not None and not self.by_class.largest:
            raise ArgumentError(f"{_OP}: by_class has weight 0 for every class")
        self.candidates = checked_integer("candidates", candidates, 1, 1 << 20, _OP)
        self.retire = None if retire is None else _checks.number(_OP, "retire", retire, 0, LAST)
        self.seed = checked_integer("seed", seed, -(2**63), 2**63 - 1, _OP)
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(f"{_OP}: device must be one of PyTorch's, got {device!r}") from error
        self._lent: Synthetic | None = None  # what the sampler has made for the next call already
        self._step = 0  # of the next call that is not told one
        self._before: tuple[int | Tensor, int | Tensor] = (-1, 0)  # the last call's step, and its number in it
        self._empty()

    # What a sampler has

    @property
    def options(self) -> SamplerOptions:  # type: ignore[override]
        return self.sampler.options

    @options.setter
    def options(self, value: SamplerOptions) -> None:
        self.sampler.options = value

    @property
    def teacher(self) -> Teacher:
        return self.sampler.teacher

    @property
    def scale(self) -> Tensor | None:
        return self.sampler.scale

    @property
    def encodes(self) -> bool:
        return self.sampler.encodes

    @property
    def asks_labels(self) -> bool:
        return self.sampler.asks_labels

    @property
    def last_disagreement(self) -> list[float]:
        return self.sampler.last_disagreement

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        per_class: int = 1024,
        columns: Sequence[Any] | None = None,
        group: Any = None,
        progress: bool | None = None,
        cache: Any = None,
    ) -> SyntheticReplay:
        """:meth:`tgt_fast.LatentSampler.calibrate` of the sampler; returns the replay."""
        self.sampler.calibrate(
            loader, per_class=per_class, columns=columns, group=group, progress=progress, cache=cache
        )
        return self

    def __repr__(self) -> str:
        shown = f"reuse={self.reuse}, capacity={self.capacity}, select={self.select!r}"
        shown += f", by_class={self.by_class!r}" if self.by_class is not None else ""
        shown += f", candidates={self.candidates}" if self.select != "uniform" else ""
        shown += f", retire={self.retire}" if self.retire is not None else ""
        return f"SyntheticReplay({self.sampler!r}, {shown})"

    def __call__(
        self,
        x: Any,
        *,
        student: Callable[..., Any] | None = None,
        sample_ids: Tensor | None = None,
        step: int | Tensor | None = None,
        occurrence: Tensor | None = None,
        logits_of: LogitsOf = None,
        latents: Latents | Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Synthetic:
        """Explore from a part of the batch, and serve as many rows as the sampler would from all of it.

        Args:
            x, sample_ids, step, occurrence, logits_of, latents, labels: as for :class:`tgt_fast.LatentSampler`.
            student: as there; also for ``select="disagreement"`` and ``retire``.

        Raises:
            ArgumentError: a missing student; a pool too small for what a call explores; and what the sampler raises.
        """
        _checks.refuse_tracing(_OP)
        self.teacher.check_data(x)
        count, device = tree.batch_size(x), tree.first_device(x)
        if sample_ids is not None:
            checked_ids(sample_ids, count)
        now, number = self._counted(step, device)
        if self.select != "uniform" or self.retire is not None:
            self._check_student(student)
        explored = -(-count // self.reuse)
        most = explored * self.options.most_replicas
        if most > self.capacity:
            raise ArgumentError(f"{_OP}: a call explores {most} rows, more than capacity={self.capacity}")
        if labels is None and self.asks_labels:
            raise ArgumentError(f"{_OP}: replicas and sigma by class go by the rows' classes: pass labels=")
        rows = int(self.options.rows_made(count, labels, device))
        made, self._lent = self._lent, None
        if made is None:
            of_rows = {"sample_ids": sample_ids, "occurrence": occurrence, "latents": latents, "labels": labels}
            x, call = self.part_of(x, now, **of_rows)
            made = self.sampler(x, student=student, step=step, logits_of=logits_of, **call)
        if step is None:
            self._step += 1
        with named_range("replay"), torch.no_grad():
            needed = rows - made.ids.shape[0] if explored < count else 0
            served = self._served(made, needed, student, now, number, logits_of)
        self._before = now, number
        return served

    def part_of(self, x: Any, now: int | Tensor, **call: Any) -> tuple[Any, dict[str, Any]]:
        """The rows of a batch that are explored in a step, and of what belongs to its rows."""
        count = tree.batch_size(x)
        explored = -(-count // self.reuse)
        if explored == count:
            return x, call
        rows = in_turn(count, explored, self.seed, _ANCHORS, now, tree.first_device(x))
        return tree.take(x, rows), {name: _rows_of(name, part, rows, count) for name, part in call.items()}

    def lend(self, made: Synthetic) -> None:
        """What the sampler has made for the next call, ahead of it."""
        self._lent = made

    def step_of(self, behind: int) -> int:
        """The step of the call that comes after so many others, where it is not told one."""
        return self._step + behind

    def clear(self) -> None:
        """Empty the pool, as after a change of the teacher; the statistics begin anew, too."""
        self._empty()

    @torch.no_grad()
    def statistics(self, student: Callable[..., Any] | None = None, *, logits_of: LogitsOf = None) -> dict[str, Any]:
        """How the pool has fared so far, in this process. Waits for a device.

        Returns:
            ``calls``; ``explored``, the rows that the teacher made and labelled; ``served``; ``held``, rows in the pool
            that may be served; ``mean_uses``, served / explored; ``mean_age``, of the rows served, in calls since they
            were made (a fresh one's is 0); ``share_by_class``, of the rows served, by the labeler's argmax (none where
            it labels positions). With a student, also ``fresh_disagreement`` and ``replayed_disagreement``: the mean
            divergence of the last call's fresh rows and of those from the pool, for the student as it is.
        """
        held = int(self._pool.marks["alive"][: len(self._pool)].sum()) if len(self._pool) else 0
        found: dict[str, Any] = {**self._tally.shown(), "held": held}
        if student is not None and self._last is not None:
            self._check_student(student)
            places, fresh, like = self._last
            scores = self._scores(student, places, like, logits_of)
            for name, part in (("fresh", scores[:fresh]), ("replayed", scores[fresh:])):
                found[f"{name}_disagreement"] = part.mean().item() if len(part) else None
        return found

    # A call

    def _empty(self) -> None:
        self._pool = RowPool(self.capacity)
        self._tally = Tally()
        self._last: tuple[Tensor, int, Synthetic] | None = None

    def _counted(self, step: Any, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
        """This call's step, and its number among the calls of the step."""
        now = self._step if step is None else checked_step(step, device)
        before, number = self._before
        if isinstance(now, int) and isinstance(before, int):
            return now, int(number) + 1 if now == before else 0
        now, before, number = (torch.as_tensor(part, device=device) for part in (now, before, number))
        return now, torch.where(now == before, number + 1, 0)

    def _served(
        self,
        made: Synthetic,
        needed: int,
        student: Any,
        now: int | Tensor,
        number: int | Tensor,
        logits_of: LogitsOf,
    ) -> Synthetic:
        where = made.ids.device if self.device is None else self.device
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        fresh = self._pool.add(made, self._tally.calls, where, lambda parts: joined(self.teacher.join, parts))
        places = fresh
        if needed > 0 and len(self._pool):
            places = torch.cat([fresh, self._drawn(needed, fresh, made, student, now, number, logits_of)])
        self._pool.served(places)
        classes = made.teacher_logits.shape[1] if made.teacher_logits.ndim == 2 else None
        marks = self._pool.marks
        self._tally.add(len(fresh), marks["born"][places], marks["classes"][places], classes)
        self._last = places, len(fresh), made
        return made if self.reuse == 1 else Synthetic(**self._pool.take(places, made), source=made.source)

    def _drawn(
        self,
        needed: int,
        fresh: Tensor,
        made: Synthetic,
        student: Any,
        now: int | Tensor,
        number: int | Tensor,
        logits_of: LogitsOf,
    ) -> Tensor:
        """Places of rows to serve beside the fresh ones, which take part where there are not enough others."""
        size = len(self._pool)
        numbers = lottery(size, self.seed, number + _ROWS, now, fresh.device)
        if self.by_class is not None:
            numbers = self._by_class(numbers, made)
        numbers = numbers.index_fill(0, fresh, LAST)
        usable: int | Tensor = size
        if self.retire is not None:
            alive = self._pool.marks["alive"][:size]
            numbers = numbers.masked_fill(~alive, torch.inf)
            usable = alive.sum()
            if self.options.most_replicas != self.options.replicas and not int(usable):  # by class: none may be fresh
                return fresh[:0]
        drawn = min(size, needed * (1 if self.select == "uniform" else self.candidates))
        places = numbers.topk(drawn, largest=False).indices  # ascending: dropped rows last, before them the fresh
        usable = min(drawn, usable) if isinstance(usable, int) else usable.clamp(max=drawn)
        order = places
        if self.select != "uniform" or self.retire is not None:
            scores = self._scores(student, places, made, logits_of).to(places.device)
            if self.select != "uniform":
                order = places[by_score(scores, numbers[places])]
        within = torch.arange(needed, device=places.device)
        chosen = order[within if isinstance(usable, int) and usable >= needed else within % usable]
        if self.retire is not None:
            self._pool.drop(places, (scores < self.retire) & (numbers[places] < LAST))
        return chosen

    def _by_class(self, numbers: Tensor, made: Synthetic) -> Tensor:
        """The numbers of a lottery in which a class wins by its weight, however many rows it has."""
        assert self.by_class is not None
        if made.teacher_logits.ndim != 2:
            raise ArgumentError(f"{_OP}: by_class goes by the labeler's class of an example, which labels positions")
        classes, known = made.teacher_logits.shape[1], len(self.by_class.values)
        if self.by_class.closed and known != classes:
            raise ArgumentError(f"{_OP}: by_class has {known} weights, the labeler {classes} classes")
        size = len(self._pool)
        of_rows, alive = (self._pool.marks[name][:size] for name in ("classes", "alive"))
        held = torch.zeros(classes, dtype=torch.float64, device=of_rows.device)
        held.index_add_(0, of_rows, alive.to(held.dtype))
        return weighted(numbers, self.by_class.at(of_rows) / held.clamp(min=1)[of_rows])

    def _check_student(self, student: Any) -> None:
        if student is None:
            raise ArgumentError(
                f"{_OP}: select={self.select!r} and retire={self.retire} ask the student: pass student="
            )
        if not callable(student):
            raise ArgumentError(f"{_OP}: student must be callable, got {type(student).__name__}")
        refuse_labeler(_OP, self.teacher, unwrapped(student))

    def _scores(self, student: Callable[..., Any], places: Tensor, like: Synthetic, logits_of: LogitsOf) -> Tensor:
        """D of the student as it is, [rows], for rows of the pool."""
        student = unwrapped(student)
        where = self.options.logits_of if logits_of is None else check_logits_of(_OP, logits_of)
        rows = self._pool.take(places, like, ("x", "teacher_logits"))
        with preserve_student(student), torch.no_grad(), named_range("student"):
            view = self.teacher.student_view(rows["x"])
            ours = student_logits(_OP, student, view, where, self.teacher.class_dim)
            ours = checked_logits(ours, len(places), "student")
            theirs = rows["teacher_logits"]
            if callable(self.select):
                return scored(_OP, self.select, ours, theirs)
            return divergence_of_each(ours, theirs, None, None, self.options)


def _rows_of(name: str, part: Any, rows: Tensor, count: int) -> Any:
    leaves = tree.batched_leaves(part)
    if any(leaf.shape[0] != count for leaf in leaves):
        raise ShapeError(f"{_OP}: {name} {tuple(leaves[0].shape)} must have {count} rows, one an example")
    return tree.take(part, rows) if leaves else part
