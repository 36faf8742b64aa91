"""The loss over the classes of several processes as PyTorch's dispatcher knows it.

What a process does between two collectives is an op; the collectives are PyTorch's functional ones. So a compiler sees
both, and numbers that are known only when a program runs are read where they are needed.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, gradients, is_soft, outputs
from tgt_fast.ops import library
from tgt_fast.ops._distill_op import (
    CALL,
    distill_scale_,
    form_of,
    packed_call,
    ready,
    returned,
    returned_gradients,
    unpacked,
    with_graph,
)
from tgt_fast.ops.library import or_nothing
from tgt_fast.ops.vocab_parallel import statistics, topk
from tgt_fast.ops.vocab_parallel.kernel import Sharded, Steps, row_kernel, served
from tgt_fast.ops.vocab_parallel.merging import SUMS
from tgt_fast.ops.vocab_parallel.opening import OPENED, STATE
from tgt_fast.ops.vocab_parallel.records import of_record
from tgt_fast.ops.vocab_parallel.shards import Shards
from tgt_fast.ops.vocab_parallel.shares import WithShares

# The numbers a row that a step gives, by its name.
_WIDTHS: Final = {
    "opened": OPENED, "sums": SUMS, "merged": STATE + 1, "second": 2, "with_second": STATE + 1, "losses": 1,
    "stats": statistics.OWN, "stats_sums": statistics.SUMS, "stats_values": statistics.VALUES,
    "record_opened": topk.OPENED, "record_sums": topk.SUMS, "record_second": 2, "record_merged": topk.STATE + 1,
    "record_losses": 1,
}  # fmt: skip
SHARDS: Final = "str[] groups, int start, int width, int classes, int widest"
_WANTED: Final = "bool want_d_student, bool want_d_teacher"


def as_arguments(shards: Shards) -> tuple[Any, ...]:
    """Shards in the order of the schema."""
    return (list(shards.groups), *shards[1:])


def _settled(call: DistillCall, backend: str) -> tuple[DistillCall, list[Any]]:
    """A call that can run, and the kernels that it runs on: of its form, and of pairs of logits."""
    call, chosen = ready(call, backend, looked_at=True)
    form = form_of(call.teacher)
    return call, [row_kernel(op, served(chosen, form)) for op in (form, "distill")]


def _steps(call: DistillCall, kernels: list[Any]) -> Any:
    return Steps(kernels[1]) if isinstance(call.teacher, Tensor) else topk.Steps(*kernels)


def sharded(call: DistillCall, kernels: Any, shards: Shards, steps: Any = None) -> Any:
    """What gives the loss of all classes, on kernels of a call's form and of pairs of logits."""
    made: Any = Sharded(kernels[1], shards, steps)
    if not isinstance(call.teacher, Tensor):
        made = of_record(call.teacher.tail_mode, kernels[0], kernels[1], shards, steps)
    return WithShares(made, Sharded(kernels[1], shards, steps)) if is_soft(call.target) else made


# One step of the loss


def _rows(*arguments: Any) -> Tensor:
    call, (backend, step, carried) = unpacked(arguments)
    call, kernels = _settled(call, backend)
    made: Tensor = getattr(_steps(call, kernels), step)(call, *carried)
    return made.contiguous()


def _rows_fake(*arguments: Any) -> Tensor:
    call, (_, step, _) = unpacked(arguments)
    return call.student.new_empty((call.student.shape[0], _WIDTHS[step]), dtype=statistics.DTYPE)


def _gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (row_state, d_loss, backend, d_student, d_teacher) = unpacked(arguments)
    call, kernels = _settled(call._replace(want_d_student=d_student, want_d_teacher=d_teacher), backend)
    return returned_gradients(call, _steps(call, kernels).gradients(call, row_state.contiguous(), d_loss))


def _gradients_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, (_, _, _, d_student, d_teacher) = unpacked(arguments)
    call = call._replace(want_d_student=d_student, want_d_teacher=d_teacher)
    return returned_gradients(call, gradients(call))


class Dispatched:
    """The same as the ``Steps`` of logits and of records, each an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, step: str) -> Any:
        if step not in _WIDTHS:
            raise AttributeError(step)

        def run(call: DistillCall, *carried: Tensor) -> Tensor:
            made: Tensor = library.dispatched(vocab_rows, *packed_call(call), self.backend, step, list(carried))
            return made

        return run

    def gradients(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        wanted = call.want_d_student, call.want_d_teacher
        d_student, d_teacher = library.dispatched(
            vocab_gradients, *packed_call(call), row_state, d_loss, self.backend, *wanted
        )
        return d_student if wanted[0] else None, d_teacher if wanted[1] else None

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        library.dispatched(distill_scale_, grad, d_loss, self.backend)


# The whole loss


def _parted(arguments: tuple[Any, ...]) -> tuple[DistillCall, bool, str, Shards]:
    call, (want_stats, backend, groups, *places) = unpacked(arguments)
    return call, want_stats, backend, Shards(tuple(groups), *places)


def _loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, want_stats, backend, shards = _parted(arguments)
    call, kernels = _settled(call._replace(want_stats=want_stats), backend)
    out = sharded(call, kernels, shards).forward(call)
    return out.loss, or_nothing(out.stats, out.loss)


def _loss_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, want_stats, *_ = _parted(arguments)
    loss, stats, *_ = returned(call, outputs(call._replace(want_stats=want_stats)))
    return loss, stats


def _loss_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, want_stats, backend, shards = _parted(arguments)
    steps = Dispatched(backend)
    loss, stats = with_graph(sharded(call, (steps, steps), shards, steps), *call[:6], want_stats)
    return loss, or_nothing(stats, loss.detach())


vocab_distillation_loss = library.define(
    f"vocab_distillation_loss({CALL}, bool want_stats, str backend, {SHARDS}) -> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=2,
)
vocab_rows = library.define(f"vocab_rows({CALL}, str backend, str step, Tensor[] carried) -> Tensor", _rows, _rows_fake)
vocab_gradients = library.define(
    f"vocab_gradients({CALL}, Tensor row_state, Tensor d_loss, str backend, {_WANTED}) -> (Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)
