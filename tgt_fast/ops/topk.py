"""A teacher's answer in k numbers a row instead of a number a class."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import TAILS, TEMPERATURES, TOPK_DIVERGENCES, DistillOptions, TopK
from tgt_fast.kernels.row_checks import bad_id, find_bad_id
from tgt_fast.ops import _checks
from tgt_fast.ops._checks import all_readable, check_log_probs, counted_rows, warn_of_small_log_probs

OP: Final = "TeacherTopK"
CHECK_VARIABLE: Final = "TGT_FAST_CHECK_RECORDS"
# Logits that are looked at at once, of which a copy is made: on a CPU so few that the allocator gives the same memory
# to every piece, elsewhere so many that the work outweighs the launches.
_CPU_PIECE: Final = 1 << 22
_PIECE: Final = 1 << 24


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """``log_probs = log_softmax(t / T).gather(-1, ids)``, and the log of the mass that they leave: ``tail_log_prob``.

    What :func:`tgt_fast.distillation_loss` takes where teacher logits stand. :func:`tgt_fast.topk_teacher` makes one
    from logits. A record is data: no gradient passes through it, and it cannot be brought to another temperature, for
    the classes that are not listed would change their share in a way that it does not know.

    Args:
        ids: ``(..., k)`` class indices of any integer dtype, distinct within a row, in any order.
        log_probs: ``(..., k)`` log-probabilities, float64, float32, bfloat16 or float16. -inf is padding, for rows with
            fewer than k entries: its id is not looked at.
        tail_log_prob: ``(...)`` log-probability of all other classes together, of a floating dtype. ``None``, for
            records from elsewhere: ``log(1 - sum(exp(log_probs)))``, which on a peaked row is rounding alone and is
            kept above the resolution of ``log_probs``. With ``tail="renormalize"`` it is not read.
        temperature: T > 0, at which the probabilities were taken.
        num_classes: C, of the logits that the ids point into; ``k <= C``.
        tail: what the loss makes of the classes that are not listed. ``"bucket"``: one class, on both sides.
            ``"renormalize"``: nothing; both sides are restricted to the listed classes. ``"uniform"``: each has the
            same share of the teacher's mass, apart from those to which the student gives none.

    Rows need not be normalised: rounding them to 16 bits does no harm, for the loss divides by their sum.

    Raises:
        ShapeError, DTypeError, DeviceError, ArgumentError: with the offending values. Ids that repeat or lie out of
            range, and logits or probabilities in the place of log-probabilities, are found by :meth:`check` and, on a
            CPU, by the loss. Where no row lists a class with its share of the mass, 1 / C, the loss warns.

    Rows are selected as those of a tensor (``record[2:5]``, ``record[mask]``), ``len`` counts them, and a record is a
    node of PyTorch's pytrees.

    >>> import torch, tgt_fast as tgt
    >>> record = tgt.topk_teacher(torch.tensor([[2.0, 0.0, 1.0, 0.0]]), k=2)
    >>> record.ids.tolist(), record
    ([[0, 2]], TeacherTopK(rows=(1,), k=2, temperature=1.0, num_classes=4, tail='bucket'))
    """

    ids: Tensor  # [..., k]
    log_probs: Tensor  # [..., k]
    tail_log_prob: Tensor | None  # [...]
    temperature: float
    num_classes: int
    tail: str = "bucket"

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", _checks.number(OP, "temperature", self.temperature, *TEMPERATURES))
        object.__setattr__(self, "num_classes", _checks.integer(OP, "num_classes", self.num_classes, 1, 2**63))
        _checks.choice(OP, "tail", self.tail, TAILS)
        _checks.integers(OP, "ids", self.ids, "integer class indices")
        _checks.real(OP, "log_probs", _checks.floating(OP, "log_probs", self.log_probs))
        if self.ids.shape != self.log_probs.shape or self.ids.dim() == 0:
            shapes = f"{tuple(self.ids.shape)} and {tuple(self.log_probs.shape)}"
            raise ShapeError(f"{OP}: ids and log_probs must both be (..., k), got {shapes}")
        if not 1 <= self.k <= self.num_classes:
            raise ShapeError(f"{OP}: a row must list 1 to num_classes = {self.num_classes} classes, got k = {self.k}")
        _checks.same_device(OP, "ids", self.ids, "log_probs", self.log_probs)
        if self.tail_log_prob is not None:
            _checks.real(OP, "tail_log_prob", _checks.floating(OP, "tail_log_prob", self.tail_log_prob))
            if self.tail_log_prob.shape != self.shape:
                raise ShapeError(
                    f"{OP}: tail_log_prob {tuple(self.tail_log_prob.shape)} does not match the rows {tuple(self.shape)}"
                )
            _checks.same_device(OP, "tail_log_prob", self.tail_log_prob, "log_probs", self.log_probs)

    @property
    def k(self) -> int:
        """The number of classes that a row lists."""
        return self.ids.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Of the rows: that of the student's logits without their last dimension."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.log_probs.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TeacherTopK:
        """The record on a device."""
        return _with_tensors(self, [
            None if x is None else x.to(device, non_blocking=non_blocking) for x in _tensors(self)
        ])  # fmt: skip

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{OP}: one row has no len()")
        return self.shape[0]

    def __getitem__(self, rows: Any) -> TeacherTopK:
        try:
            ids, log_probs = self.ids[rows], self.log_probs[rows]
            tail = None if self.tail_log_prob is None else self.tail_log_prob[rows]
        except (TypeError, RuntimeError, IndexError) as error:
            if isinstance(error, IndexError) and isinstance(rows, int):
                raise  # what ends an iteration
            raise ArgumentError(f"{OP}: {rows!r} selects no rows of {tuple(self.shape)} ({error})") from error
        if ids.dim() == 0 or ids.shape[-1] != self.k or (tail is not None and tail.shape != ids.shape[:-1]):
            raise ShapeError(f"{OP}: an index selects rows {tuple(self.shape)}, not entries of a row; got {rows!r}")
        return _with_tensors(self, [ids, log_probs, tail])

    def __repr__(self) -> str:
        if not isinstance(self.ids, Tensor):  # a tree whose leaves were replaced
            return f"{OP}({self.ids!r}, {self.log_probs!r}, {self.tail_log_prob!r})"
        return (
            f"{OP}(rows={tuple(self.shape)}, k={self.k}, temperature={self.temperature}, "
            f"num_classes={self.num_classes}, tail={self.tail!r})"
        )

    def check(self) -> TeacherTopK:
        """Looks at the values, which on a device waits for it, and returns the record.

        Raises:
            ArgumentError: an id that is out of range or listed twice in its row, or entries that are no
                log-probabilities, with row and value.
        """
        all_readable(OP, ids=self.ids, log_probs=self.log_probs)
        ids, log_probs = self.ids.reshape(-1, self.k), self.log_probs.reshape(-1, self.k)
        found = find_bad_id(ids.to(torch.int64), log_probs, self.num_classes, None)
        if found is not None:
            raise ArgumentError(bad_id(OP, ids, *found, self.num_classes))
        check_log_probs(OP, log_probs, None)
        return self

    def rest(self) -> Tensor | None:
        """``(...)`` log-probability of the classes that are not listed; None where it does not matter."""
        if self.tail == "renormalize":
            return None
        if self.tail_log_prob is not None:
            return self.tail_log_prob
        log_probs = self.log_probs.detach()
        of_topk = log_probs.to(torch.float64).logsumexp(-1)
        rest = (-of_topk.clamp(max=-torch.finfo(log_probs.dtype).eps).expm1()).log()
        everything = (log_probs > -math.inf).sum(-1) == self.num_classes
        rest = torch.where(everything | (of_topk == -math.inf), -math.inf, rest)
        rest = torch.where(of_topk.isnan(), math.nan, rest)
        return rest.to(torch.float64 if log_probs.dtype == torch.float64 else torch.float32)


def rows_of(topk: TeacherTopK) -> TopK:
    """A record's rows one after the other, as the kernels take them."""
    rest = topk.rest()
    return TopK(
        topk.ids.reshape(-1, topk.k).to(torch.int64), topk.log_probs.reshape(-1, topk.k),
        None if rest is None else rest.reshape(-1), topk.tail,
    )  # fmt: skip


def check_options(op: str, topk: TeacherTopK, options: DistillOptions) -> None:
    """That a loss of these options can be taken of the record, whose tensors may have been freed since it was made."""
    all_readable(op, ids=topk.ids, log_probs=topk.log_probs, tail_log_prob=topk.tail_log_prob)
    if options.divergence not in TOPK_DIVERGENCES:
        raise ArgumentError(
            f"{op}: divergence must be one of {TOPK_DIVERGENCES} with a top-k record, got {options.divergence!r}"
        )
    for name in ("temperature", "teacher_temperature"):
        if isinstance(getattr(options, name), Tensor) or isinstance(topk.temperature, Tensor):
            raise ArgumentError(
                f"{op}: {name} is a tensor, which cannot be compared with the record's while compiling; pass a number"
            )
        if getattr(options, name) != topk.temperature:
            raise ArgumentError(
                f"{op}: {name} is {getattr(options, name):g}, but the record was taken at {topk.temperature:g}, and "
                f"a record cannot be brought to another temperature; pass temperature={topk.temperature:g}, or take "
                "a new record from the teacher's logits"
            )
    alone = topk.k == 1 and topk.tail == "renormalize" and topk.num_classes > 1
    if alone and is_on(options.soft_weight) and not torch.compiler.is_compiling():
        warnings.warn(
            f"{op}: the record lists one class a row and tail='renormalize' leaves out the others, so the soft term is "
            "0 for every student; list more classes, or use tail='bucket'",
            stacklevel=5,
        )


def warn_where_small(
    op: str, topk: TeacherTopK, rows: TopK, target: Tensor | None, sample_weight: Tensor | None,
    options: DistillOptions, *, stacklevel: int,
) -> None:  # fmt: skip
    """On a CPU, of a record whose tail was derived: say so where its entries are too small to be the likeliest."""
    derived = topk.tail_log_prob is None and topk.tail != "renormalize" and topk.k < topk.num_classes
    if derived and options.soft_weight > 0 and _checks.on_plain_cpu(rows.log_probs):
        counted = counted_rows(target, sample_weight, options)
        warn_of_small_log_probs(op, rows.log_probs, topk.num_classes, counted, stacklevel=stacklevel + 1)


def check_where_asked(topk: TeacherTopK) -> None:
    """Looks at the ids, also on a device, where the environment asks for it."""
    if os.environ.get(CHECK_VARIABLE, "") not in ("", "0") and not torch.compiler.is_compiling():
        topk.check()


def _tensors(topk: TeacherTopK) -> list[Tensor | None]:
    return [topk.ids, topk.log_probs, topk.tail_log_prob]


def _with_tensors(like: TeacherTopK, tensors: Any) -> TeacherTopK:
    """Another record of the same kind, unchecked: its tensors come from one that was."""
    return _rebuild(tensors, (like.temperature, like.num_classes, like.tail))


def _rebuild(tensors: Any, context: Any) -> TeacherTopK:
    topk = object.__new__(TeacherTopK)
    names = ("ids", "log_probs", "tail_log_prob", "temperature", "num_classes", "tail")
    for name, value in zip(names, (*tensors, *context), strict=True):
        object.__setattr__(topk, name, value)
    return topk


def _flatten(topk: TeacherTopK) -> tuple[list[Any], Any]:
    return _tensors(topk), (topk.temperature, topk.num_classes, topk.tail)


pytree.register_pytree_node(
    TeacherTopK, _flatten, _rebuild, serialized_type_name="tgt_fast.TeacherTopK",
    flatten_with_keys_fn=lambda topk: (
        list(zip(map(pytree.GetAttrKey, ("ids", "log_probs", "tail_log_prob")), _tensors(topk), strict=True)),
        (topk.temperature, topk.num_classes, topk.tail),
    ),
)  # fmt: skip


@one_thread_in_forks
def topk_teacher(
    logits: Tensor,  # [..., C]
    k: int,
    temperature: float = 1.0,
    *,
    tail: str = "bucket",
) -> TeacherTopK:
    """``log_softmax(logits / T).topk(k)``, with a log-sum-exp over the classes that are left out as the tail.

    Args:
        logits: ``(..., C)`` float64, float32, bfloat16 or float16. Not differentiable: a record is data.
        k: how many classes to list, 1 to C.
        temperature: T, in [1e-30, 100]. The loss must be taken at the same.
        tail: what the loss makes of the classes that are not listed; see :class:`TeacherTopK`.

    Returns:
        A :class:`TeacherTopK` of int64 ids, most probable first, and float32 log-probabilities (float64 for float64).
        Logits of -inf that come among the k are padding. A row that holds NaN or +inf, or nothing but -inf, gives NaN.

    Raises:
        ShapeError, DTypeError, ArgumentError: with the offending values.

    The tail is summed by itself and not as 1 minus the mass of the top k, of which rounding would leave nothing where
    a teacher is sure. Rows are taken in pieces: the extra memory does not grow with their number. Deterministic, apart
    from the choice among equal logits, which is that of ``torch.topk``; nothing waits for a device.

    >>> import torch, tgt_fast as tgt
    >>> record = tgt.topk_teacher(torch.tensor([[0.0, 30.0, 1.0]]), k=1)
    >>> record.ids.item(), round(record.tail_log_prob.item(), 4)
    (1, -28.6867)
    """
    op = "topk_teacher"
    _checks.refuse_tracing(op)
    _checks.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"{op}: logits must be (..., C) with C >= 1, got {tuple(logits.shape)}")
    classes = logits.shape[-1]
    k = _checks.integer(op, "k", k, 1, classes + 1)
    temperature = _checks.number(op, "temperature", temperature, *TEMPERATURES)
    _checks.choice(op, "tail", tail, TAILS)
    with torch.no_grad():
        rows = logits.detach().reshape(-1, classes)
        most = _CPU_PIECE if rows.device.type == "cpu" else _PIECE
        pieces = [_top(piece, k, temperature) for piece in rows.split(max(1, most // classes))]
        ids, log_probs, rest = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    shape = logits.shape[:-1]
    ids, log_probs = ids.reshape(*shape, k), log_probs.reshape(*shape, k)
    return TeacherTopK(ids, log_probs, rest.reshape(shape), temperature, classes, tail)


def _top(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log-probabilities and tail of some rows.  [N, C] -> [N, k], [N, k], [N]"""
    cast = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    values, ids = cast.topk(k, dim=-1)
    # Relative to the largest: a difference of logits is exact where a tempered logit would be rounded.
    peak = values[:, :1]
    values = (values - peak) / temperature
    if k < logits.shape[1]:
        others = cast.scatter(1, ids, -torch.inf)
        next_largest = others.amax(-1, keepdim=True)
        next_largest = torch.where(next_largest == -torch.inf, 0, next_largest)
        # In place, and relative to the largest of the others, of which much would underflow beside the largest of all.
        others = others.sub_(next_largest).div_(temperature).exp_().sum(-1).log_()
        others = others + ((next_largest - peak) / temperature)[:, 0]
    else:
        others = torch.where(peak[:, 0].isfinite(), -torch.inf, torch.nan).to(cast.dtype)
    total = torch.logaddexp(values.logsumexp(-1), others)
    return ids, values - total[:, None], others - total
