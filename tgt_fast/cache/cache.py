"""TeacherCache: what a teacher said of each sample, so that it need not be asked again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tgt_fast.cache.fingerprint import Fingerprint, teacher_fingerprint
from tgt_fast.cache.index import MISSING, Ids, Places
from tgt_fast.cache.layout import Layout, Rows
from tgt_fast.cache.outputs import LABELS, LATENTS, OP, Settings
from tgt_fast.cache.store import Store
from tgt_fast.errors import ArgumentError, CacheError, DTypeError, ShapeError, UnknownIdError
from tgt_fast.ops import _checks
from tgt_fast.ops._sparse_record import TeacherTopK
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.modes import eval_mode
from tgt_fast.teacher.teacher import checked_logits

SampleIds = Tensor | Sequence[int]
_ID_LIMIT: Final = 1 << 48  # as of the noise that belongs to a sample
_SHOWN: Final = 5  # ids in a message


class TeacherCache:
    r"""``cache.label(x, ids) == topk_teacher(teacher.label(x), k, T)``, row by row, with each row computed once.

    Rows belong to a **sample id**, not to a step or a place in an epoch, so shuffling, other batch sizes, several
    epochs and several workers meet the same rows. What is stored is given back bit for bit. The first value computed for an id
    is the one that is stored and served: a teacher whose last bits depend on the other rows of a batch, as matrix
    products often do, then gives what it gave the first time. The data of an id must be the same each time: cache
    before augmentation that draws at random, not after.

    A folder holds ``manifest.json`` and shards, safetensors files that never change. Reading is a copy out of a memory
    map. Several processes may write to one folder: each writes shards of its own, which have their name only once they
    are whole and on the disk, and sees those of the others when it lacks a row. Where two computed the same id, the one
    that had read it first keeps its own; whoever opens the folder later gets the row of the older shard. A killed
    writer loses what waited in memory. A shard that is torn (cut short, or with a wrong checksum) is found before its
    first row is read; it is set aside as ``*.torn`` with a warning, and its rows are computed again.

    Args:
        folder: made if need be.
        teacher: a :class:`~tgt_fast.Teacher`, a module (run in eval mode) or a callable, data -> logits
            ``(B, ..., C)``; a callable may give a :class:`~tgt_fast.TeacherTopK`. It runs without a graph. None: rows come from
            :meth:`add`, and ``version`` names whose they are.
        k: how many classes a record lists. None: logits are stored as they are, and ``temperature`` and ``tail`` do not
            matter.
        temperature, tail: of the records; see :func:`tgt_fast.topk_teacher`.
        latents: store ``teacher.encode(x)`` as well, with its mask; for :meth:`latents`.
        dtype: round logits, or log-probabilities, to this dtype, also when they are first computed. None: as the
            teacher and ``topk_teacher`` give them, which is float32 for records.
        transforms, version: see :func:`tgt_fast.teacher_fingerprint`.
        readonly: never write; rows that are missing are computed and not kept. The folder must hold a cache.
        shard_bytes: rows wait in memory until they are so many bytes, then they are written. Fewer, larger shards read
            faster; :meth:`flush` and :meth:`close` write what there is.
        checksums: read a shard as a whole once in a process, before its first row, to compare its checksum. Without,
            only its size and header are compared.

    Samples may have any dimensions in front of the classes, ``(L, C)`` of a language model for one; all samples of a
    cache share them. One thread at a time. Forked and pickled caches read; a forked one that is given rows writes its
    own. A cache and its results are on the CPU; :meth:`label` gives results on the device of ``x``.

    Raises:
        StaleCacheError: the folder holds rows of another teacher or of other settings; it names both and what differs.
        CacheError: a folder that cannot be read or written, or a manifest that was changed.
        ArgumentError: a setting out of its range.

    >>> import tempfile, torch, tgt_fast as tgt
    >>> x, ids = torch.randn(4, 8), torch.tensor([7, 2, 9, 4])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tgt.TeacherCache(folder, torch.nn.Linear(8, 100), k=5) as cache:
    ...         first = cache.label(x, ids)  # runs the teacher on all four
    ...         again = cache.label(x[:2], ids[:2])  # reads
    ...         print(again, torch.equal(again.log_probs, first.log_probs[:2]), cache.missing([2, 3]).tolist())
    TeacherTopK(rows=(2,), k=5, temperature=2.0, num_classes=100, tail='bucket') True [False, True]
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Callable[..., Any] | None = None,
        *,
        k: int | None = 64,
        temperature: float = 2.0,
        tail: str = "bucket",
        latents: bool = False,
        dtype: torch.dtype | None = None,
        transforms: Sequence[Callable[..., Any]] = (),
        version: str | None = None,
        readonly: bool = False,
        shard_bytes: int = 64 << 20,
        checksums: bool = True,
    ) -> None:
        fingerprint = teacher_fingerprint(
            teacher, k=k, temperature=temperature, tail=tail, latents=latents, dtype=dtype, transforms=transforms,
            version=version,
        )  # fmt: skip
        if fingerprint.unseen:
            warnings.warn(
                f"{OP}: the fingerprint cannot look into {', '.join(fingerprint.unseen[:_SHOWN])}; name the state of "
                "the teacher and its transforms by version=, and change it when they change",
                stacklevel=2,
            )
        shard_bytes = _checks.integer(OP, "shard_bytes", shard_bytes, 1, 1 << 40)
        self._start(Path(folder), teacher, fingerprint, readonly, shard_bytes, checksums)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, checksums: bool = True) -> TeacherCache:
        """A cache to read from, whoever's it is: settings and fingerprint are those of its manifest.

        Raises:
            CacheError: there is none, or it cannot be read.
        """
        made = cls.__new__(cls)
        made._start(Path(folder), None, None, True, 1, checksums)
        return made

    def _start(
        self,
        folder: Path,
        teacher: Callable[..., Any] | None,
        fingerprint: Fingerprint | None,
        readonly: bool,
        shard_bytes: int,
        checksums: bool,
    ) -> None:
        self.folder = folder
        self._teacher = teacher
        self._store: Store | None = Store(
            folder, fingerprint, writable=not readonly, shard_bytes=shard_bytes, checksums=checksums
        )
        if fingerprint is None:
            assert self._store.manifest is not None
            fingerprint = self._store.manifest.fingerprint
        self.fingerprint: Fingerprint = fingerprint
        self.settings = Settings.of(fingerprint.parts)

    # Reading

    def label(self, x: Any, sample_ids: SampleIds) -> TeacherTopK | Tensor:
        """What the teacher says of ``x``: read where it is stored, else computed and stored.

        Args:
            x: B samples, a tensor or a pytree of tensors. Not looked at where all rows are stored.
            sample_ids: ``(B,)`` integers from 0 to 2^48 - 1. The same id twice is one sample.

        Returns:
            A :class:`~tgt_fast.TeacherTopK` of rows ``(B, ...)``, or with ``k=None`` logits ``(B, ..., C)``, on the
            device of ``x``, in the order of the ids.

        Raises:
            UnknownIdError: rows are missing and there is no teacher.
            ShapeError, DTypeError, ArgumentError, CacheError: ids or outputs that do not fit; a disk that is full.
        """
        ids, store = self._ids(sample_ids), self._open()
        where = self._find(ids)
        if (where != MISSING).all():
            return self._labels(store.gather(where, self._names(LABELS)), x)
        lacking = np.flatnonzero(where == MISSING)
        lacking = lacking[np.sort(np.unique(ids[lacking], return_index=True)[1])]  # of an id that repeats, one
        layout, rows = self._compute(x, lacking, ids)
        if store.writable:
            store.append(ids[lacking], rows, layout)
            return self._labels(store.gather(store.find(ids), self._names(LABELS)), x)
        return self._labels(self._mixed(ids, where, lacking, rows, layout), x)

    def read(self, sample_ids: SampleIds) -> TeacherTopK | Tensor:
        """The rows of these ids, in that order, on the CPU; the teacher is not asked.

        Raises:
            UnknownIdError: some are not stored; it names the first of them.
        """
        return self._labels(self._read(sample_ids, LABELS), None)

    def latents(self, sample_ids: SampleIds) -> Latents:
        """The stored latents of these ids, with their mask if they had one.

        Raises:
            UnknownIdError: some are not stored.
            ArgumentError: the cache was made without ``latents=True``.
        """
        if not self.settings.latents:
            raise ArgumentError(f"{OP}: {self.folder} stores no latents; make the cache with latents=True")
        rows = self._read(sample_ids, LATENTS)
        layout = self._layout()
        found = layout.unpack(rows)
        return Latents(found["latents"], found.get("latents_mask"))

    def missing(self, sample_ids: SampleIds) -> Tensor:
        """``(B,)`` bool: which of these ids are not stored. Takes in what other writers have finished."""
        return torch.from_numpy(self._find(self._ids(sample_ids)) == MISSING)

    def ids(self) -> Tensor:
        """All ids, ascending, int64."""
        return torch.from_numpy(self._open().ids())

    def __len__(self) -> int:
        return len(self._open())

    # Writing

    def add(self, sample_ids: SampleIds, outputs: Tensor | TeacherTopK, latents: Latents | Tensor | None = None) -> int:
        """Store what a teacher has said already.

        Args:
            sample_ids: ``(B,)``. Of an id that is stored already, or comes twice, the first row stays.
            outputs: logits ``(B, ..., C)``, of which records are made if the cache holds records, or a record of the
                cache's own k, temperature and tail.
            latents: ``(B, ...)``, with ``latents=True``.

        Returns:
            How many rows are new.

        Raises:
            ShapeError, DTypeError, ArgumentError: what does not fit the cache, with both values.
            CacheError: the cache is read only, or the disk refuses.
        """
        ids, store = self._ids(sample_ids), self._open()
        if not store.writable:
            raise CacheError(f"{OP}: {self.folder} was opened to be read")
        layout, tensors = self.settings.fields(outputs, latents, len(ids))
        return store.append(ids, layout.pack(tensors), layout)

    def fill(
        self, loader: Iterable[Any], *, batch_size: int | None = None, progress: bool = True, flush: bool = True
    ) -> int:
        """Label every sample of a loader that is not stored yet.

        Args:
            loader: batches ``(ids, x, ...)``; what comes after ``x`` is not looked at.
            batch_size: run the teacher on at most so many samples at a time.
            progress: show a progress bar.
            flush: write what still waits in memory at the end.

        Returns:
            How many rows were computed.

        Raises:
            What :meth:`label` raises. What was computed by then is kept.
        """
        store = self._open()
        if not store.writable:
            raise CacheError(f"{OP}: {self.folder} was opened to be read")
        if batch_size is not None:
            batch_size = _checks.integer(OP, "batch_size", batch_size, 1, 2**31)
        added = 0
        with tqdm(loader, desc="teacher cache", unit="batch", disable=not progress) as bar:
            for batch in bar:
                if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                    raise ArgumentError(f"{OP}: a batch to fill from is (ids, x, ...), got {type(batch).__name__}")
                ids = self._ids(batch[0])
                where = self._find(ids)
                lacking = np.flatnonzero(where == MISSING)
                lacking = lacking[np.sort(np.unique(ids[lacking], return_index=True)[1])]
                step = batch_size or max(1, len(lacking))
                for start in range(0, len(lacking), step):
                    part = lacking[start : start + step]
                    layout, rows = self._compute(batch[1], part, ids)
                    added += store.append(ids[part], rows, layout)
                bar.set_postfix(computed=added, refresh=False)
        if flush:
            self.flush()
        return added

    def flush(self) -> None:
        """Write the rows that wait in memory. From here on they survive, and other processes see them.

        Raises:
            CacheError: the disk refuses; the rows still wait.
        """
        store = self._open()
        if store.writable:
            store.flush()

    def verify(self) -> dict[str, str]:
        """Compare the checksum of every shard now.

        Returns:
            Of each torn shard that was found since the cache was opened, by file name, what is wrong with it. Their
            rows are missing from here on, and unless the cache is read only the files are set aside.
        """
        return self._open().check()

    def close(self) -> None:
        """Write what waits and let go of the files. A closed cache refuses everything but ``close``."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._store is None else f"{len(self)} samples"
        return f"{OP}({str(self.folder)!r}, {state}, fingerprint={self.fingerprint[:12]}...)"

    def __reduce__(self) -> Any:
        """A copy in another process reads; the teacher stays here."""
        self.flush()
        return _reopened, (self.folder, self._open().checksums)

    # Inside

    def _open(self) -> Store:
        if self._store is None:
            raise CacheError(f"{OP}: the cache in {self.folder} is closed")
        return self._store

    def _layout(self) -> Layout:
        layout = self._open().layout
        assert layout is not None  # a row was found
        return layout

    def _names(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._layout().fields]

    def _find(self, ids: Ids) -> Places:
        store = self._open()
        where = store.find(ids)
        if (where == MISSING).any():
            store.refresh()
            where = store.find(ids)
        return where

    def _read(self, sample_ids: SampleIds, names: Sequence[str]) -> Rows:
        ids, store = self._ids(sample_ids), self._open()
        where = self._find(ids)
        if store.layout is None or (where == MISSING).any():
            raise UnknownIdError(self._unknown(ids[where == MISSING]))
        return store.gather(where, self._names(names))

    def _unknown(self, ids: Ids) -> str:
        some = ", ".join(map(str, ids[:_SHOWN].tolist())) + (", ..." if len(ids) > _SHOWN else "")
        return f"{OP}: {self.folder} does not hold {len(ids)} of the sample ids asked for: {some or 'it is empty'}"

    def _compute(self, x: Any, which: Ids, ids: Ids) -> tuple[Layout, Rows]:
        """Run the teacher on these positions of a batch."""
        if self._teacher is None:
            raise UnknownIdError(self._unknown(ids[which]) + ", and there is no teacher to ask")
        size = tree.batch_size(x)
        if size != len(ids):
            raise ShapeError(f"{OP}: {len(ids)} sample ids for {size} samples")
        # A batch that is missing as a whole goes in as it is, and so comes out as without a cache.
        part = x if len(which) == size else tree.take(x, torch.from_numpy(which))
        teacher, latents = self._teacher, None
        with torch.no_grad():
            if isinstance(teacher, Teacher):
                outputs: Any = teacher.label(part)
                latents = teacher.encode(part) if self.settings.latents else None
            elif self.settings.latents:
                raise ArgumentError(f"{OP}: latents=True needs a Teacher, which encodes, or add(..., latents=)")
            elif isinstance(teacher, nn.Module):
                with eval_mode(teacher):
                    outputs = teacher(part)
            else:
                outputs = teacher(part)
        if not isinstance(outputs, TeacherTopK):
            outputs = checked_logits(outputs, len(which), f"{OP}: the teacher")
        layout, tensors = self.settings.fields(outputs, latents, len(which))
        return layout, layout.pack(tensors)

    def _mixed(self, ids: Ids, where: Places, computed: Ids, rows: Rows, layout: Layout) -> Rows:
        """Rows of a batch of which some are stored and the others have just been computed, and are not kept."""
        store = self._open()
        store.agree(layout)
        names, have = self._names(LABELS), where != MISSING
        stored, out = store.gather(where[have], names), layout.empty(len(ids), names)
        order = np.argsort(ids[computed])
        source = order[np.searchsorted(ids[computed], ids[~have], sorter=order)]
        for name in names:
            out[name][have] = stored[name]
            out[name][~have] = rows[name][source]
        return out

    def _labels(self, rows: Rows, x: Any) -> TeacherTopK | Tensor:
        layout = self._layout()
        return self.settings.labels(layout.unpack(rows), layout.classes, tree.first_device(x))

    def _ids(self, sample_ids: SampleIds) -> Ids:
        if isinstance(sample_ids, Tensor):
            if sample_ids.is_floating_point() or sample_ids.is_complex() or sample_ids.dtype == torch.bool:
                raise DTypeError(f"{OP}: sample_ids must be integers, got {sample_ids.dtype}")
            ids = sample_ids.detach().to("cpu", torch.int64).numpy()
        else:
            given = np.asarray(sample_ids)
            if given.dtype.kind not in "iu" and given.size:
                raise DTypeError(f"{OP}: sample_ids must be integers, got {sample_ids!r}")
            ids = given.astype(np.int64)
        if ids.ndim != 1:
            raise ShapeError(f"{OP}: sample_ids must be (B,), got {ids.shape}")
        if len(ids) and not (ids.min() >= 0 and ids.max() < _ID_LIMIT):
            raise ArgumentError(f"{OP}: sample_ids must be in [0, 2^48), got {ids.min()} to {ids.max()}")
        return ids


def _reopened(folder: Path, checksums: bool) -> TeacherCache:
    return TeacherCache.open(folder, checksums=checksums)
