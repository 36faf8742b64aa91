"""The soft-label loss on DTensors: how they are laid out, what each process calls, and what comes back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.plain import PLAIN
from tgt_fast.ops import _checks
from tgt_fast.ops._distill_arguments import OP
from tgt_fast.ops.counts import weight_of_rows
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.ops.vocab_parallel.shards import Shards, reduced

Loss = Callable[..., Any]


def is_dtensor(tensor: Any) -> bool:
    """True if it is one, asked without importing what makes them."""
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


class Layout(NamedTuple):
    """Over which dimensions of a mesh logits are sharded, and on what."""

    mesh: Any
    placements: tuple[Any, ...]  # of the logits
    rows: tuple[int, ...]  # the mesh dimensions over which rows are spread
    classes: tuple[int, ...]  # and those over which classes are

    def of_rows(self, partial: bool = False) -> list[Any]:
        """Placements of what has a number a row; with ``partial`` of a sum over the rows of a process."""
        from torch.distributed.tensor import Partial, Replicate

        own = [Partial() if partial else self.placements[at] for at in range(self.mesh.ndim)]
        return [own[at] if at in self.rows else Replicate() for at in range(self.mesh.ndim)]

    def groups(self, dimensions: tuple[int, ...]) -> tuple[str, ...]:
        """The process groups along those dimensions, by name."""
        return tuple(self.mesh.get_group(at).group_name for at in dimensions)


def distillation_loss(
    plain: Loss, sharded: Loss, student: Any, teacher: Any, target: Any, options: DistillOptions, sample_weight: Any,
    normalizer: Any, count_group: Any, inplace: bool, return_stats: bool, backend: str,
) -> Any:  # fmt: skip
    """The loss of whole tensors, from the parts that this process has.

    ``plain``: the loss of whole rows of plain tensors; ``sharded``: that of some classes of them.
    """
    record = teacher if isinstance(teacher, TeacherTopK) else None
    teacher = None if record is not None else teacher
    mesh = next(t for t in (student, teacher, target, sample_weight) if is_dtensor(t)).device_mesh
    given = {"student_logits": student, "teacher_logits": teacher, "target": target, "sample_weight": sample_weight}
    placed = {name: None if t is None else on_mesh(OP, name, t, mesh) for name, t in given.items()}
    student, teacher = placed["student_logits"], placed["teacher_logits"]
    if record is not None and record.shape != student.shape[:-1]:
        raise ShapeError(
            f"{OP}: student_logits {tuple(student.shape)} and the record's rows {tuple(record.shape)} do not match"
        )
    if is_dtensor(normalizer):
        normalizer = normalizer.full_tensor()
    _check_shapes(placed)
    layout = _layout(student, student if teacher is None else teacher)
    if count_group is not None and layout.rows:
        raise ArgumentError(f"{OP}: count_group is for the rows of each process, but DTensors hold all of them")
    if inplace and student.placements != layout.placements:
        raise ArgumentError(
            f"{OP}: inplace=True needs student_logits that lie as the loss takes them, {layout.placements}, "
            f"got {student.placements}"
        )
    s = student.redistribute(placements=layout.placements).to_local()
    t: Any = None if teacher is None else teacher.redistribute(placements=layout.placements).to_local()
    if record is not None:
        t = local_rows(OP, record, layout)
    a_row = (placed["target"], placed["sample_weight"])
    y, weight = (
        None if x is None
        else x.redistribute(placements=layout.of_rows() if x.dim() < student.dim() else layout.placements).to_local()
        for x in a_row
    )  # fmt: skip
    if options.reduction == "mean" and normalizer is None and layout.rows:
        mine = weight_of_rows(s.shape[:-1], s.device, y, weight, student.shape[-1], options)
        normalizer = reduced(mine, "sum", layout.groups(layout.rows))
    if layout.classes:
        shards = shards_along(layout.mesh, layout.classes, student.shape[-1], s.shape[-1])
        made = sharded(shards, s, t, y, options, weight, normalizer, count_group, inplace, return_stats, backend)
    else:
        named = {name: value for name, value in options._asdict().items() if name != "numbers"}
        made = plain(
            s, t, y, sample_weight=weight, normalizer=normalizer, count_group=count_group, inplace=inplace,
            return_stats=return_stats, backend=backend, **named,
        )  # fmt: skip
    return came_back(made, layout, student.shape[:-1], options, return_stats)


def came_back(made: Any, layout: Layout, shape: torch.Size, options: DistillOptions, return_stats: bool) -> Any:
    """Loss and statistics of all rows, from those of this process's."""
    back = functools.partial(_of_rows, layout=layout, shape=shape)
    loss, stats = made if return_stats else (made, None)
    loss = back(loss) if options.reduction == "none" else _sum(loss, layout)
    return loss if stats is None else (loss, type(stats)(*map(back, stats)))


def local_rows(op: str, record: TeacherTopK, layout: Layout) -> TeacherTopK:
    """The rows of a record that this process has."""
    tensors = {name: getattr(record, name) for name in ("ids", "log_probs", "tail_log_prob")}
    placed = {name: on_mesh(op, name, x, layout.mesh) for name, x in tensors.items() if x is not None}
    local = {name: x.redistribute(placements=layout.of_rows()).to_local() for name, x in placed.items()}
    return dataclasses.replace(record, **local)


def on_mesh(op: str, name: str, tensor: Any, mesh: Any) -> Any:
    """A plain tensor is whole in every process."""
    from torch.distributed.tensor import DTensor, Replicate

    if not is_dtensor(tensor):
        checked = _checks.real(op, name, tensor)
        return DTensor.from_local(checked, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.device_mesh != mesh:
        raise ArgumentError(f"{op}: all DTensors must be on one mesh, got {mesh} and, of {name}, {tensor.device_mesh}")
    return tensor


def _check_shapes(placed: dict[str, Any]) -> None:
    """Of the whole tensors; what else is to be checked is of the local ones."""
    student = placed["student_logits"]
    if not student.dim():
        raise ShapeError(f"{OP}: logits must be (..., C) with C >= 1, got ()")
    for name, tensor in placed.items():
        shares = name == "target" and tensor is not None and tensor.dim() == student.dim()
        shape = student.shape if name == "teacher_logits" or shares else student.shape[:-1]
        if name != "student_logits" and tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"{OP}: {name} {tuple(tensor.shape)} does not match student_logits {tuple(student.shape)}: beside a "
                "DTensor a plain tensor is whole in each process"
            )


def _layout(student: Any, teacher: Any) -> Layout:
    """The layout that both sides are to have: as one of them does, where the other is whole.

    Raises:
        ArgumentError: classes would have to be gathered, or sums to be taken.
    """
    from torch.distributed.tensor import Replicate, Shard

    dims = student.dim()
    placements: list[Any] = []
    rows: list[int] = []
    classes: list[int] = []
    for at, pair in enumerate(zip(student.placements, teacher.placements, strict=True)):
        for name, placement in zip(("student_logits", "teacher_logits"), pair, strict=True):
            if type(placement) not in (Shard, Replicate):
                raise ArgumentError(
                    f"{OP}: {name} must be Shard or Replicate along each dimension of the mesh, got {placement} along "
                    f"{at}; redistribute them before"
                )
        sharded = {p.dim % dims for p in pair if isinstance(p, Shard)}
        if len(sharded) > 1:
            raise ArgumentError(
                f"{OP}: along dimension {at} of the mesh student_logits are {pair[0]} and teacher_logits {pair[1]}: "
                "classes would have to be gathered; redistribute one side before"
            )
        if not sharded:
            placements.append(Replicate())
            continue
        dim = sharded.pop()
        placements.append(Shard(dim))
        (classes if dim == dims - 1 else rows).append(at)
    return Layout(student.device_mesh, tuple(placements), tuple(rows), tuple(classes))


def shards_along(mesh: Any, dimensions: tuple[int, ...], classes: int, width: int) -> Shards:
    """The place of this process's classes: DTensors cut evenly along one dimension of the mesh after the other."""
    start, end, widest = 0, classes, classes
    for at in dimensions:
        part = -(-(end - start) // mesh.size(at))
        start = min(start + part * mesh.get_local_rank(at), end)
        end = min(start + part, end)
        widest = -(-widest // mesh.size(at))
    if end - start != width:
        raise ArgumentError(f"{OP}: {width} classes of a DTensor are in a process that should have {end - start}")
    groups = tuple(mesh.get_group(at).group_name for at in dimensions)
    return Shards(groups, start if width else classes, width, classes, widest)


def _sum(loss: Tensor, layout: Layout) -> Any:
    """The sum over rows from those of all processes, whole in each."""
    from torch.distributed.tensor import DTensor, Replicate

    made = DTensor.from_local(loss, layout.mesh, layout.of_rows(partial=True), run_check=False)
    return made.redistribute(placements=[Replicate()] * layout.mesh.ndim)


def _of_rows(values: Tensor, layout: Layout, shape: torch.Size) -> Any:
    """A number a row, where the rows are."""
    from torch.distributed.tensor import DTensor

    if values.shape == shape and not layout.rows:
        return DTensor.from_local(values, layout.mesh, layout.of_rows(), run_check=False)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, layout.mesh, layout.of_rows(), run_check=False, shape=shape, stride=stride)
