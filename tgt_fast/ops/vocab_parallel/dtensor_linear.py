"""The loss from hidden states that are DTensors: heads sharded on classes, hidden states on rows, or whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.options import DistillOptions, LinearOptions, LinearTensors
from tgt_fast.ops._linear_arguments import OP
from tgt_fast.ops.counts import weight_of_rows
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.ops.vocab_parallel.dtensor import Layout, came_back, is_dtensor, local_rows, on_mesh, shards_along
from tgt_fast.ops.vocab_parallel.linear import linear_distillation_loss as of_shards
from tgt_fast.ops.vocab_parallel.shards import reduced

_SETTINGS = ("student_scale", "student_softcap", "teacher_scale", "teacher_softcap", "vocab_size", "memory_budget")
_HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")


def linear_distillation_loss(
    plain: Callable[..., Any], given: LinearTensors, topk: TeacherTopK | None, normalizer: Any, count_group: Any,
    heads: LinearOptions, options: DistillOptions, return_stats: bool, backend: str, *, named_group: bool,
) -> Any:  # fmt: skip
    """The loss of whole tensors, from the parts that this process has; ``plain``: that of whole heads."""
    if named_group:
        raise ArgumentError(f"{OP}: vocab_group is for plain tensors; DTensors say themselves how they are sharded")
    hidden, mesh = given.student_hidden, _mesh(given)
    placed: dict[str, Any] = {}
    for name, tensor in given._asdict().items():
        if name in ("vocab_map", "vocab_mask"):
            if is_dtensor(tensor):
                raise ArgumentError(f"{OP}: {name} must be a plain tensor, whole in each process")
        elif tensor is not None:
            placed[name] = on_mesh(OP, name, tensor, mesh)
    linear = given.teacher_weight is not None
    _check_shapes(placed)
    if topk is not None:
        linear = True  # a record has no classes along which it could be cut
    layout = _layout(placed, mesh, linear)
    if count_group is not None and layout.rows:
        raise ArgumentError(f"{OP}: count_group is for the rows of each process, but DTensors hold all of them")
    classes = given.student_weight.shape[0]
    local = given._replace(
        **{name: _local(name, tensor, layout, linear or name == "target") for name, tensor in placed.items()}
    )
    if local.target is not None and local.target.dim() == hidden.dim():
        local = local._replace(target=_local("target", placed["target"], layout, False))
    record = None if topk is None else local_rows(OP, topk, layout)
    if is_dtensor(normalizer):
        normalizer = normalizer.full_tensor()
    if options.reduction == "mean" and normalizer is None and layout.rows:
        counted = classes if heads.vocab_size is None else heads.vocab_size
        rows = local.student_hidden.shape[:-1]
        mine = weight_of_rows(rows, hidden.device, local.target, local.sample_weight, counted, options)
        normalizer = reduced(mine, "sum", layout.groups(layout.rows))
    if layout.classes:
        others = given.teacher_weight.shape[0] if given.teacher_weight is not None else given.teacher.shape[-1]
        if others != classes and topk is None:
            raise ShapeError(
                f"{OP}: student_weight has {classes} classes and the teacher {others}: heads that are sharded on "
                "classes must have the same"
            )
        shards = shards_along(mesh, layout.classes, classes, local.student_weight.shape[0])
        made = of_shards(shards, local, record, normalizer, count_group, heads, options, return_stats, backend)
    else:
        named = {name: value for name, value in options._asdict().items() if name != "numbers"}
        for name in _SETTINGS:
            named[name] = getattr(heads, name)
        if given.teacher_weight is not None:
            named |= {"teacher_hidden": local.teacher, "teacher_weight": local.teacher_weight}
        else:
            named["teacher_logits"] = local.teacher if record is None else record
        made = plain(
            local.student_hidden, local.student_weight, target=local.target, student_bias=local.student_bias,
            teacher_bias=local.teacher_bias, sample_weight=local.sample_weight, vocab_map=local.vocab_map,
            vocab_mask=local.vocab_mask, normalizer=normalizer, count_group=count_group, return_stats=return_stats,
            backend=backend, **named,
        )  # fmt: skip
    return came_back(made, layout, hidden.shape[:-1], options, return_stats)


def _mesh(given: tuple[Any, ...]) -> Any:
    return next(tensor for tensor in given if is_dtensor(tensor)).device_mesh


def _check_shapes(placed: dict[str, Any]) -> None:
    """Of the whole tensors; what else is to be checked is of the local ones."""
    hidden = placed["student_hidden"]
    rows = hidden.shape[:-1]
    for name in ("teacher", "target", "sample_weight"):
        if name in placed and placed[name].shape[: len(rows)] != rows:
            raise ShapeError(
                f"{OP}: {name} {tuple(placed[name].shape)} does not match the rows of student_hidden "
                f"{tuple(hidden.shape)}: beside a DTensor a plain tensor is whole in each process"
            )


def _layout(placed: dict[str, Any], mesh: Any, linear: bool) -> Layout:
    """Along which dimensions of the mesh rows are spread, and along which classes.

    Raises:
        ArgumentError: along one of them both are, or hidden states are cut, or sums are to be taken.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    rows: list[int] = []
    classes: list[int] = []
    dims = placed["student_hidden"].dim()
    for at in range(mesh.ndim):
        found: dict[tuple[str, int], str] = {}
        for name in ("student_hidden", "teacher", *_HEADS):
            if name not in placed:
                continue
            placement = placed[name].placements[at]
            if type(placement) is Replicate:
                continue
            own = placement.dim % placed[name].dim() if type(placement) is Shard else -1
            of_classes = own == 0 if name in _HEADS else own == dims - 1 and name == "teacher" and not linear
            of_rows = name not in _HEADS and 0 <= own < dims - 1
            if not of_classes and not of_rows:
                raise ArgumentError(
                    f"{OP}: along dimension {at} of the mesh {name} must be Replicate, or sharded on "
                    f"{'classes' if name in _HEADS else 'rows'}, got {placement}; redistribute it before"
                )
            found[("classes", 0) if of_classes else ("rows", own)] = name
        if len(found) > 1:
            raise ArgumentError(
                f"{OP}: along dimension {at} of the mesh {' and '.join(found.values())} are cut differently: "
                "classes would have to be gathered; redistribute one before"
            )
        placements.append(Replicate())
        for (what, dim), _ in found.items():
            placements[at] = Shard(dim)
            (classes if what == "classes" else rows).append(at)
    return Layout(mesh, tuple(placements), tuple(rows), tuple(classes))


def _local(name: str, tensor: Any, layout: Layout, linear: bool) -> Tensor:
    """This process's part, whose gradient is a part of the whole's."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    wanted: list[Any] = [Replicate()] * layout.mesh.ndim
    grads = list(wanted)
    for at in range(layout.mesh.ndim):
        if at in layout.classes and (name in _HEADS or (name in ("teacher", "target") and not linear)):
            wanted[at] = grads[at] = Shard(0 if name in _HEADS else tensor.dim() - 1)
        elif at in layout.rows:
            if name in _HEADS:
                grads[at] = Partial()
            else:
                wanted[at] = grads[at] = layout.placements[at]
    made: Tensor = tensor.redistribute(placements=wanted).to_local(grad_placements=grads)
    return made
