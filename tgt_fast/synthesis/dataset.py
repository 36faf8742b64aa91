"""SyntheticDataset: what a synthesis left in a folder, as a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map

from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.index import MISSING, Ids
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Layout
from tgt_fast.cache.outputs import LABELS, Settings
from tgt_fast.errors import ArgumentError, CacheError, UnknownIdError
from tgt_fast.kernels.options import MAX_REPLICA, MAX_SAMPLE_ID, MAX_STEP
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.synthesis.folder import DROPPED, RowStore, beneath, open_rows
from tgt_fast.synthesis.parquet import is_parquet
from tgt_fast.synthesis.replay import StoredReplay
from tgt_fast.synthesis.rows import data_of, names_of_data
from tgt_fast.teacher import Latents

OP: Final = "SyntheticDataset"
_LATENTS: Final = ("latents", "latents_mask", "latents_source")


class SyntheticRows(NamedTuple):
    """Some rows of a data set, in the order asked."""

    keys: Tensor  # [n, 3] int64: sample id, replica, step
    x: Any  # a tensor or a pytree of tensors, [n, ...]
    labels: Tensor | TeacherTopK  # logits [n, ..., C], or a record of n rows
    latents: Latents | None  # of n examples, where they were stored


class SyntheticDataset(Dataset[tuple[Any, ...]]):
    """``dataset[i] == (id, x~, h(x~)[, z~])``, the rows of :func:`tgt_fast.synthesize` in the order of
    (id, replica, step).

    The id is int64 []; x~ is a tensor or a pytree of tensors of one example; ``h(x~)`` are logits [..., C], or a
    :class:`~tgt_fast.TeacherTopK` of one row, which PyTorch's ``default_collate`` puts together to one of a batch; z~
    is a tensor, or ``(z, mask)`` where latents have a mask. ``dataset[id, replica, step]`` is the row of that key.

    What is read is what was stored, bit for bit, out of memory maps (or Parquet row groups, of which the last few are
    kept). A batch of a ``DataLoader`` is read at once. It can be pickled: the workers of a ``DataLoader`` open the
    folder anew.

    Args:
        folder: of :func:`tgt_fast.synthesize`, or an address that fsspec knows, of Parquet files.

    Attributes:
        keys: int64 [N, 3], sample id, replica and step of each row.
        fingerprint: of teacher, sampler and options; its ``parts`` say which.
        num_classes: C.

    Raises:
        CacheError: there are no synthetic examples, or they cannot be read.

    >>> import tempfile, torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = tgt.synthesize(sampler, [(torch.tensor([5, 3]), torch.zeros(2, 8))], folder, replicas=2, progress=False)
    ...     data = tgt.SyntheticDataset(folder)
    ...     print(data.keys.tolist(), [part.shape for part in data[5, 1, 0]])
    [[3, 0, 0], [3, 1, 0], [5, 0, 0], [5, 1, 0]] [torch.Size([]), torch.Size([8]), torch.Size([3])]
    """

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self._rows: RowStore = open_rows(OP, folder, None, format="parquet" if is_parquet(folder) else "safetensors")
        layout, fingerprint = self._rows.layout, self._rows.stored_fingerprint
        if layout is None or fingerprint is None:
            raise CacheError(f"{OP}: there are no synthetic examples in {folder}")
        self._layout: Layout = layout
        self.fingerprint: Fingerprint = fingerprint
        self._settings = Settings.of(self.fingerprint.parts)
        self._keys: Ids = self._rows.ids()
        self._data = names_of_data(layout)

    @property
    def num_classes(self) -> int:
        return self._layout.classes

    @property
    def keys(self) -> Tensor:
        return torch.from_numpy(SYNTHETIC.unpack(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"{OP}({str(self.folder)!r}, {len(self)} examples, fingerprint={self.fingerprint[:12]}...)"

    def __getitem__(self, index: int | tuple[int, int, int]) -> tuple[Any, ...]:
        if isinstance(index, tuple):
            return self._items(self.read(keys=[index]))[0]
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """The items at several places, for the fetchers of a ``DataLoader``."""
        return self._items(self.read(indices))

    def read(
        self,
        indices: Sequence[int] | Tensor | None = None,
        *,
        keys: Sequence[tuple[int, int, int]] | Tensor | None = None,
    ) -> SyntheticRows:
        """Rows by their places, or by their keys; by default all.

        Raises:
            UnknownIdError: keys that are not there; it names the first of them.
            ArgumentError: something else than keys; IndexError: a place beyond the last.
        """
        if keys is not None:
            wanted = _as_keys(keys)
        elif indices is None:
            wanted = self._keys
        else:
            places = np.asarray(indices, np.int64).reshape(-1)
            wanted = self._keys[places]
        where = self._rows.find(wanted)
        if (where == MISSING).any():
            lost = SYNTHETIC.unpack(wanted[where == MISSING])
            some = ", ".join(str(tuple(key)) for key in lost[:5].tolist())
            raise UnknownIdError(
                f"{OP}: {self.folder} does not hold {len(lost)} of the keys (id, replica, step) asked for: {some}"
            )
        rows = self._rows.gather(where, list(self._layout.blocks))
        tensors = self._layout.unpack(rows, widen=True)
        said: dict[str, Tensor] = {name: tensors[name] for name in LABELS if name in tensors}
        labels = self._settings.labels(said, self._layout.classes, torch.device("cpu"))
        latents = None
        if "latents" in tensors:
            latents = Latents(*(tensors.get(name) for name in _LATENTS))  # type: ignore[arg-type]
        return SyntheticRows(
            torch.from_numpy(SYNTHETIC.unpack(wanted)), data_of(self._layout, tensors), labels, latents
        )

    def dropped(self) -> Tensor:
        """The keys of what filters refused, int64 [n, 3]."""
        try:
            return SyntheticDropped(beneath(self.folder, DROPPED)).keys
        except CacheError:
            return torch.empty(0, 3, dtype=torch.int64, device="cpu")

    def as_replay(self, *, replicas: int = 1) -> StoredReplay:
        """The rows in the place of a sampler, in :class:`tgt_fast.TGTObjective`, :func:`tgt_fast.fit` or a loop of
        yours: those of each batch's own examples, without a teacher's work."""
        return StoredReplay(self, replicas=replicas)

    def _items(self, rows: SyntheticRows) -> list[tuple[Any, ...]]:
        latents = rows.latents
        found = []
        for row in range(len(rows.keys)):
            x = tree_map(lambda leaf: leaf[row], rows.x)  # noqa: B023  (called at once)
            item = (rows.keys[row, 0], x, rows.labels[row])
            if latents is not None:
                z = latents.z[row]
                item += (z if latents.mask is None else (z, latents.mask[row]),)  # type: ignore[assignment]
            found.append(item)
        return found

    def __reduce__(self) -> Any:
        return SyntheticDataset, (self.folder,)


class SyntheticDropped:
    """The keys that filters refused, in a folder of their own."""

    def __init__(self, folder: Any) -> None:
        rows = open_rows(OP, folder, None, format="parquet" if is_parquet(folder) else "safetensors")
        self.keys = torch.from_numpy(SYNTHETIC.unpack(rows.ids()))


def _as_keys(keys: Any) -> Ids:
    found = np.asarray(keys)
    if found.dtype.kind not in "iu" or found.ndim != 2 or found.shape[1] != 3:
        raise ArgumentError(f"{OP}: a key is (id, replica, step), three integers, got {keys!r:.200}")
    if len(found) and ((found < 0) | (found >= np.array([MAX_SAMPLE_ID, MAX_REPLICA, MAX_STEP]))).any():
        raise UnknownIdError(f"{OP}: a key (id, replica, step) out of range: {found.tolist()!r:.200}")
    return SYNTHETIC.pack(found.astype(np.int64))


def _collate(rows: list[TeacherTopK], *, collate_fn_map: Any = None) -> TeacherTopK:
    """Records of one row each to one of a batch."""
    first = rows[0]
    tails = [row.tail_log_prob for row in rows]
    return TeacherTopK(
        torch.stack([row.ids for row in rows]),
        torch.stack([row.log_probs for row in rows]),
        None if tails[0] is None else torch.stack(tails),  # type: ignore[arg-type]
        first.temperature,
        first.num_classes,
        first.tail,
    )


default_collate_fn_map[TeacherTopK] = _collate
