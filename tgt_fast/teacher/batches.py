"""Batches of a loader, for calibration, training, evaluation and caches alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.teacher import tree

LABELS: Final = ("labels", "label", "y", "targets", "target", "label_ids")  # keys that no input has
_IDS: Final = ("sample_ids", "sample_id", "ids", "id", "index", "idx")


class Batch(NamedTuple):
    """One batch of a loader, by name."""

    sample_ids: Tensor | None  # (B,) int64
    x: Any  # a tensor or a pytree of tensors
    y: Tensor | None  # (B, ...) int64


class Columns:
    """Places of ids, x and y in the batches of a loader.

    Without ``columns`` the length of a tuple or list decides: three are (ids, x, y), two (x, y), one (x,); what is
    neither tuple, list nor mapping is x, and so is a mapping. Where ids are needed, two are (ids, x). What was found is
    then looked at: ids are a vector of integers as long as the batch, y integers (B, ...), x is no vector of integers,
    and a mapping that is x as a whole has no labels or ids in it. All else could be read in more than one way, and is
    refused.

    Args:
        op: whose batches they are, for messages.
        columns: ``(ids, x, y)``, each an index into a tuple or list, a key of a mapping (or the name of a field of a
            named tuple), or None for what a batch does not have. For x also a tuple of keys: x is then a dict of them.
        needs_ids: a batch must have ids, and its y is of no interest.

    Raises:
        ArgumentError: ``columns`` of another form.
    """

    def __init__(self, op: str, columns: Sequence[Any] | None = None, *, needs_ids: bool = False) -> None:
        self.op, self.needs_ids = op, needs_ids
        self.named = None if columns is None else self._checked(columns)

    def split(self, batch: Any) -> Batch:
        """The parts of a batch; of mappings, the parts are plain dicts.

        Raises:
            ArgumentError: a batch that lacks a part, or that could be read in more than one way.
        """
        ids, x, y = self._parts(batch)
        found = Batch(_as_tensor(ids), tree.plain(x), None if self.needs_ids else _as_tensor(y))
        wrong = self._wrong(found, alone=not isinstance(batch, (tuple, list)) or len(batch) == 1)
        if wrong:
            raise self._refused(wrong, batch)
        return found

    def _parts(self, batch: Any) -> tuple[Any, Any, Any]:
        if self.named is not None:
            ids, x, y = (self._part(batch, column) for column in self.named)
            return ids, x, y
        if not isinstance(batch, (tuple, list)):
            return None, batch, None
        if len(batch) == 3:
            return batch[0], batch[1], batch[2]
        if len(batch) == 2:
            return (batch[0], batch[1], None) if self.needs_ids else (None, batch[0], batch[1])
        if len(batch) == 1:
            return None, batch[0], None
        expected = "(ids, x) or (ids, x, y)" if self.needs_ids else "x, (x, y) or (ids, x, y)"
        raise self._refused(f"a batch is {expected}; the loader gave a {type(batch).__name__} of {len(batch)}", batch)

    def _part(self, batch: Any, column: Any) -> Any:
        if column is None:
            return None
        if isinstance(column, tuple):
            return {key: self._part(batch, key) for key in column}
        if isinstance(batch, Mapping):
            if column in batch:
                return batch[column]
            held = f"with the keys {list(batch)}"
        elif isinstance(batch, (tuple, list)):
            if isinstance(column, int) and -len(batch) <= column < len(batch):
                return batch[column]
            fields = getattr(batch, "_fields", ())  # of a named tuple
            if column in fields:
                return getattr(batch, column)
            held = f"of {len(batch)}" + (f" with the fields {list(fields)}" if fields else "")
        else:
            held = "which is x as a whole"
        raise ArgumentError(
            f"{self.op}: columns={self.named!r} names {column!r}, but the loader gave a {type(batch).__name__} {held}"
        )

    def _wrong(self, batch: Batch, alone: bool) -> str | None:
        """Check a batch, read as it was, for what it cannot have."""
        ids, x, y = batch
        size = _length(x)
        if ids is None and self.needs_ids:
            return "a batch needs ids beside x"
        if ids is not None and not _is_vector(ids, size):
            return f"ids are a vector of integers as long as the batch, here they are {_shown(ids)}"
        if self.named is not None:
            return None  # what x and y are is then the caller's to say
        if y is not None and not (_is_integer(y) and y.ndim and size in (None, len(y))):
            return f"y is read as labels, integers (batch, ...), here it is {_shown(y)}"
        if _is_vector(x, None) and not alone:
            return f"x is read from where there is a vector of integers {tuple(x.shape)}, as ids or labels are"
        if alone and isinstance(x, Mapping):
            named = [key for key in x if str(key).lower() in LABELS or _is_vector(x[key], size)]
            if named:
                return f"of a mapping it is not known whether {named} are labels, ids or part of x"
        return None

    def _refused(self, problem: str, batch: Any) -> ArgumentError:
        return ArgumentError(
            f"{self.op}: {problem}. Name the parts: columns=(ids, x, y), each an index, a key or None, x also a tuple "
            f"of keys; here for example columns={_example(batch, self.needs_ids)!r}"
        )

    def _checked(self, columns: Any) -> tuple[Any, Any, Any]:
        if not isinstance(columns, (tuple, list)) or len(columns) != 3:
            raise ArgumentError(f"{self.op}: columns are (ids, x, y), three of them, got {columns!r}")
        ids, x, y = columns
        x = tuple(x) if isinstance(x, list) else x
        if x is None or x == ():
            raise ArgumentError(f"{self.op}: columns={columns!r} names no x")
        if ids is None and self.needs_ids:
            raise ArgumentError(f"{self.op}: columns={columns!r} names no ids")
        for name, column in (("ids", ids), ("y", y)):
            if isinstance(column, (tuple, list)):
                raise ArgumentError(
                    f"{self.op}: columns={columns!r}: {name} is one index or key, x alone can be several"
                )
        return ids, x, y


def check_loader(op: str, loader: Any) -> None:
    """
    Raises:
        ArgumentError: nothing can be read from it.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ArgumentError(f"{op}: the loader must be something to iterate over, got {type(loader).__name__}")
    if getattr(loader, "ndim", None) == 0:  # torch's and numpy's have __iter__ all the same
        raise ArgumentError(f"{op}: the loader must be something to iterate over, got one number")


def checked_batches(op: str, batches: Any, columns: Sequence[Any] | None = None) -> list[Batch]:
    """Batches that were read already: by name, or as a loader gives them."""
    check_loader(op, batches)
    parts = Columns(op, columns)
    return [batch if all(hasattr(batch, name) for name in Batch._fields) else parts.split(batch) for batch in batches]


def split_batches(loader: Iterable[Any], parts: Columns, *, padding: bool) -> Iterator[tuple[Batch, int | None]]:
    """The batches of a loader, and how many of a batch's first examples count; None: all of them.

    Without ``padding`` those do not that PyTorch's ``DistributedSampler`` repeats, at the end of a process's, so that
    all processes have equally many.
    """
    left = None if padding else _own_examples(getattr(loader, "sampler", None))
    for raw in loader:
        batch = parts.split(raw)
        if left is None:
            yield batch, None
            continue
        size = tree.batch_size(batch.x)
        yield batch, None if size <= left else left
        left -= min(size, left)


def _own_examples(sampler: Any) -> int | None:
    """The number of a process's examples that are no repetition; None: they all are, as far as is known."""
    if not torch.distributed.is_available():
        return None
    from torch.utils.data.distributed import DistributedSampler

    if not isinstance(sampler, DistributedSampler) or type(sampler).__iter__ is not DistributedSampler.__iter__:
        return None
    examples = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.total_size <= examples:
        return None
    return len(range(sampler.rank, examples, sampler.num_replicas))


def _as_tensor(part: Any) -> Any:
    """Arrays and lists of integers, which a collate function may leave, as tensors."""
    if isinstance(part, np.ndarray) and part.dtype.kind in "biuf":
        return torch.from_numpy(part)
    if isinstance(part, (list, tuple)) and part and all(isinstance(one, (int, np.integer)) for one in part):
        return torch.tensor([int(one) for one in part], device="cpu")
    return part


def _is_integer(part: Any) -> bool:
    return isinstance(part, Tensor) and not (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool)


def _is_vector(part: Any, size: int | None) -> bool:
    """True if it is a vector of integers, of this length where one is known."""
    return _is_integer(part) and part.ndim == 1 and size in (None, len(part))


def _length(x: Any) -> int | None:
    """The batch size, where the tensors of x agree about one."""
    sizes = {leaf.shape[0] for leaf in tree.batched_leaves(x)}
    return sizes.pop() if len(sizes) == 1 else None


def _shown(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"a tensor {tuple(part.shape)} of {str(part.dtype).removeprefix('torch.')}"
    return f"a {type(part).__name__}"


def _example(batch: Any, needs_ids: bool) -> tuple[Any, Any, Any]:
    """A guess at what the columns of a batch are."""
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Mapping):
        ids = next((key for key in batch if str(key).lower() in _IDS), "ids" if needs_ids else None)
        y = next((key for key in batch if str(key).lower() in LABELS), None)
        if y is None:
            y = next((key for key in batch if key != ids and _is_vector(batch[key], None)), None)
        x = tuple(key for key in batch if key not in (ids, y))
        return ids, x[0] if len(x) == 1 else x, None if needs_ids else y
    if not isinstance(batch, (tuple, list)):
        return (0 if needs_ids else None), (1 if needs_ids else 0), None
    if _is_vector(_as_tensor(batch[0]) if len(batch) else None, None):
        return 0, 1, (2 if len(batch) > 2 and not needs_ids else None)
    y_at = 1 if len(batch) > 1 else None
    ids_at = 2 if len(batch) > 2 else None
    return (ids_at, 0, y_at) if not needs_ids else ((len(batch) - 1), 0, None)
