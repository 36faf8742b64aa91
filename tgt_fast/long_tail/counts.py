"""How often each class comes: counts and priors out of loaders, data sets and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.explore.processes import of_all_processes
from tgt_fast.ops import _checks
from tgt_fast.ops.counts import counting_group
from tgt_fast.teacher.batches import LABELS, Columns, check_loader

_OP: Final = "class_counts"
_MOST: Final = 1 << 31  # classes


def class_counts(
    source: Any, num_classes: int | None = None, *, columns: Sequence[Any] | None = None, group: Any = None
) -> Tensor:
    r"""``n_c = sum_i [y_i = c]``, int64 (C,), on the CPU; examples without a label count nowhere.

    Args:
        source: labels, integers in a tensor, an array or a list; a data set, whose ``labels`` or ``targets`` are taken
            where it has them, and whose items are read where not; or a loader, of whose batches one pass is read.
            Negative labels are missing ones. In a mapping the labels are what is called so ("labels", "label", "y",
            "targets", "target", "label_ids").
        num_classes: C; by default the largest label + 1.
        columns: ``(ids, x, y)``, where they are in an item or a batch, as for :func:`tgt_fast.fit`.
        group: "world", or a process group of ``torch.distributed``, whose processes count together, each its part of
            the data.

    Raises:
        ArgumentError: no label at all, one beyond ``num_classes``, or a batch of which it is not known what the
            labels are.
        DTypeError: labels that are no integers, such as shares of the classes.

    >>> import torch, tgt_fast as tgt
    >>> tgt.long_tail.class_counts([{"x": torch.zeros(4, 2), "label": torch.tensor([0, 2, -1, 0])}]).tolist()
    [2, 0, 1]
    """
    classes = None if num_classes is None else _checks.integer(_OP, "num_classes", num_classes, 1, _MOST)
    together = counting_group(_OP, group, name="group")

    def of_this() -> Tensor:
        return _counted(labels_of(_OP, source, columns))

    parts = [of_this()] if together is None else list(of_all_processes(_OP, together, of_this))
    found = max(len(part) for part in parts)
    if found == 0 and classes is None:
        raise ArgumentError(f"{_OP}: there is no labelled example; num_classes= says how many classes there are")
    if classes is not None and found > classes:
        raise ArgumentError(f"{_OP}: label {found - 1} is beyond num_classes={classes}")
    total = torch.zeros(found if classes is None else classes, dtype=torch.int64, device="cpu")
    for part in parts:
        total[: len(part)] += part
    return total


def class_priors(
    source: Any, num_classes: int | None = None, *, columns: Sequence[Any] | None = None, group: Any = None
) -> Tensor:
    r"""``pi_c = n_c / sum_c n_c``, float64 (C,): the share of each class among the labelled examples.

    Args:
        source, num_classes, columns, group: as for :func:`class_counts`.

    Raises:
        ArgumentError, DTypeError: as there; also if no example is labelled.

    >>> import tgt_fast as tgt
    >>> tgt.long_tail.class_priors([0, 0, 2, -1, 0]).tolist()
    [0.75, 0.0, 0.25]
    """
    return priors_of("class_priors", class_counts(source, num_classes, columns=columns, group=group))


def checked_counts(op: str, counts: Any) -> Tensor:
    """Counts of classes as float64 (C,) on the CPU: integers, or weighted counts.

    Raises:
        ArgumentError: they are none, or all 0.
    """
    try:
        found = torch.as_tensor(counts).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"{op}: class_counts must be counts, got {counts!r:.200} ({error})") from None
    if found.is_complex() or found.dtype == torch.bool or found.dim() != 1 or not len(found):
        raise ArgumentError(f"{op}: class_counts must be counts (C,), got {tuple(found.shape)} of {found.dtype}")
    found = found.to(torch.float64)
    if not bool((found.isfinite() & (found >= 0)).all()) or not bool((found > 0).any()):
        raise ArgumentError(f"{op}: class_counts must be finite, >= 0 and not all 0, got {found.tolist()!r:.200}")
    return found


def priors_of(op: str, counts: Any) -> Tensor:
    """``n_c / sum n``, of counts of any size."""
    found = checked_counts(op, counts)
    if not bool(found.sum().isfinite()):
        found = found / found.max()
    return found / found.sum()


def labels_of(op: str, source: Any, columns: Sequence[Any] | None = None) -> Iterator[Tensor]:
    """The labels of a source, int64, piece by piece; missing ones are negative."""
    whole = None if columns is not None else _whole(op, source)
    if whole is not None:
        yield whole
        return
    check_loader(op, source)
    item = isinstance(source, Dataset)
    parts = None if columns is None else Columns(op, columns)
    for raw in _items(source):
        y = _label(op, raw, item) if parts is None else parts._parts(raw)[2]
        if y is not None:
            yield _integers(op, y)


def _whole(op: str, source: Any) -> Tensor | None:
    """All labels at once, where the source is them or has them."""
    if isinstance(source, Subset):
        of_all = _whole(op, source.dataset)
        return None if of_all is None else of_all[torch.as_tensor(list(source.indices), dtype=torch.int64)]
    if isinstance(source, (Tensor, np.ndarray)):
        return _integers(op, source)
    if isinstance(source, (list, tuple)):
        plain = all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in source)
        return _integers(op, source) if plain else None
    if isinstance(source, Dataset):
        for name in ("labels", "targets"):
            found = getattr(source, name, None)
            if isinstance(found, (Tensor, np.ndarray, list, tuple)) and len(found) == len(source):  # type: ignore[arg-type]
                return _integers(op, found)
    return None


def _items(source: Any) -> Iterable[Any]:
    if isinstance(source, Dataset) and hasattr(source, "__len__"):  # not all that have a length end by IndexError
        return (source[place] for place in range(len(source)))
    return source  # type: ignore[no-any-return]


def _label(op: str, raw: Any, item: bool) -> Any:
    """What of a batch, or an item, its labels are."""
    if isinstance(raw, Mapping):
        names = [key for key in raw if str(key).lower() in LABELS]
        if len(names) != 1:
            raise ArgumentError(f"{op}: of a mapping with the keys {list(raw)!r:.200}, columns= must say what y is")
        return raw[names[0]]
    if item and isinstance(raw, (tuple, list)) and len(raw) in (2, 3):
        return raw[-1]
    if item:
        raise ArgumentError(f"{op}: an item is (x, y) or (ids, x, y), here it is a {type(raw).__name__}; pass columns=")
    return Columns(op).split(raw).y


def _integers(op: str, labels: Any) -> Tensor:
    try:
        found = torch.as_tensor(labels).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DTypeError(f"{op}: labels must be integers, got {labels!r:.200} ({error})") from None
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise DTypeError(f"{op}: labels must be integers, got {found.dtype} {tuple(found.shape)}")
    return found.to(torch.int64).reshape(-1)


def _counted(labels: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(0, dtype=torch.int64, device="cpu")
    for some in labels:
        some = some[some >= 0]
        if some.numel() and int(some.max()) >= _MOST:
            raise ArgumentError(f"{_OP}: {int(some.max())} is no label of a class, which are numbers below 2**31")
        counted = torch.bincount(some)
        if len(counted) > len(total):
            total, counted = counted, total
        total[: len(counted)] += counted
    return total
