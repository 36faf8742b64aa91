"""The ids that are asked for, and the teacher that is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tgt_fast.cache.arguments import with_numbers
from tgt_fast.cache.index import MISSING, Ids, Places
from tgt_fast.cache.outputs import OP
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.teacher import Latents, Teacher
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.teacher.parts import modules_of
from tgt_fast.teacher.returned import LogitsOf, call, logits_in
from tgt_fast.teacher.teacher import checked_logits

SampleIds = Tensor | Sequence[int]
_ID_LIMIT: Final = 1 << 48  # as of the noise that belongs to a sample


def as_ids(given: SampleIds) -> Ids:
    """int64 on the host.

    Raises:
        DTypeError, ShapeError, ArgumentError, DeviceError: they are no sample ids.
    """
    if isinstance(given, Tensor):
        given = with_numbers(OP, "sample_ids", given)
        if given.dtype != torch.int64:
            if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
                raise DTypeError(f"{OP}: sample_ids must be integers, got {given.dtype}")
            given = given.to(torch.int64)
        ids: Ids = given.detach().cpu().resolve_neg().numpy()
    else:
        found = np.asarray(given)
        if found.dtype.kind not in "iu" and found.size:
            raise DTypeError(f"{OP}: sample_ids must be integers, got {given!r}")
        ids = found.astype(np.int64)
    if ids.ndim != 1:
        raise ShapeError(f"{OP}: sample_ids must be (B,), got {ids.shape}")
    ids = np.ascontiguousarray(ids)
    if len(ids) and ids.view(np.uint64).max() >= _ID_LIMIT:  # which a negative one is, too
        raise ArgumentError(f"{OP}: sample_ids must be in [0, 2^48), got {ids.min()} to {ids.max()}")
    return ids


def missing_rows(ids: Ids, where: Places) -> Ids:
    """The positions that are missing, in order; of an id that repeats, the first."""
    found = np.flatnonzero(where == MISSING)
    return found[np.sort(np.unique(ids[found], return_index=True)[1])]


def ask(
    teacher: Callable[..., Any], x: Any, n: int, logits_of: LogitsOf = None, *, latents: bool
) -> tuple[Tensor | TeacherTopK, Latents | None]:
    """Outputs of a teacher for n samples, without a graph, in eval mode.

    Raises:
        ArgumentError: it has no encoder, and latents are wanted.
        ShapeError, DTypeError: it gave no logits of n samples.
    """
    encoded = None
    with torch.no_grad():
        if isinstance(teacher, Teacher):
            outputs: Any = teacher.label(x)
            encoded = teacher.encode(x) if latents else None
        elif latents:
            raise ArgumentError(f"{OP}: latents=True needs a Teacher, which encodes, or add(..., latents=)")
        else:
            with eval_mode(*modules_of(teacher)):
                outputs = call(teacher, x)
    if not isinstance(outputs, TeacherTopK):
        outputs = checked_logits(logits_in(f"{OP}: the teacher", outputs, logits_of), n, f"{OP}: the teacher")
    return outputs, encoded
