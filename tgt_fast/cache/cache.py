"""TeacherCache: what a teacher said of each sample, so that it need not be asked again."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tgt_fast._opening import as_path
from tgt_fast.cache.arguments import as_loader, flag
from tgt_fast.cache.fingerprint import Fingerprint, teacher_fingerprint, warn_of_unseen
from tgt_fast.cache.index import MISSING, Ids, Places
from tgt_fast.cache.layout import Layout, Rows
from tgt_fast.cache.outputs import LABELS, LATENTS, OP, Settings, as_latents
from tgt_fast.cache.processes import packed, unpacked
from tgt_fast.cache.query import SampleIds, as_ids, ask, missing_rows
from tgt_fast.cache.store import Store
from tgt_fast.errors import ArgumentError, CacheError, ShapeError, UnknownIdError
from tgt_fast.ops import _checks
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.teacher import Latents, tree
from tgt_fast.teacher.batches import Columns
from tgt_fast.teacher.returned import LogitsOf

_SHOWN: Final = 5  # ids in a message


class Contents(NamedTuple):
    """Of the folder of a cache."""

    layout: Layout
    shards: dict[str, int]  # bytes of a file by its name
    torn: dict[str, str]  # what is wrong by name


class TeacherCache:
    r"""``cache.label(x, ids) == topk_teacher(teacher.label(x), k, T)``, row by row, with each row computed once.

    Rows belong to a **sample id**, not to a step or a place in an epoch, so shuffling, other batch sizes, several
    epochs and several workers meet the same rows. What is stored is given back bit for bit. The first value computed
    for an id is the one that is stored and served: a teacher whose last bits depend on the other rows of a batch, as
    those of matrix products and log-sum-exps often do, then gives what it gave the first time. The data of an id must
    be the same each time: cache before augmentation that draws at random, not after.

    A folder holds ``manifest.json`` and shards, safetensors files that never change. Reading is a copy out of a memory
    map. Several processes may write to one folder: each writes shards of its own, which have their name only once they
    are whole and on the disk, and sees those of the others when it lacks a row. Where two computed the same id, the one
    that had read it first keeps its own; whoever opens the folder later gets the row of the older shard. A killed
    writer loses what waited in memory. A shard that is torn (cut short, or with a wrong checksum) is found before any
    of its torn rows is used; it is set aside as ``*.torn`` with a warning, and all its rows are computed again. That
    goes for a shard that is cut while the cache is open, too, but not for one that is cut, or a disk that fails, in
    the moment in which its rows are copied: the system then ends the process with SIGBUS, as with any memory map. So
    replace and remove files of a cache that is in use, but write to none of them, which nothing here does.

    Args:
        folder: made if need be.
        teacher: a :class:`~tgt_fast.Teacher`, a module (run in eval mode) or a callable, data -> logits
            ``(B, ..., C)``; a callable may give a :class:`~tgt_fast.TeacherTopK`. It runs without a graph. None: rows
            come from :meth:`add`, and ``version`` names whose they are.
        k: how many classes a record lists. None: logits are stored as they are, and ``temperature`` and ``tail`` do not
            matter.
        temperature, tail: of the records; see :func:`tgt_fast.topk_teacher`.
        latents: store ``teacher.encode(x)`` as well, with its mask; for :meth:`latents`.
        dtype: round logits, or log-probabilities, to this dtype, also when they are first computed. None: as the
            teacher and ``topk_teacher`` give them, which is float32 for records.
        transforms, version: see :func:`tgt_fast.teacher_fingerprint`.
        logits_of: of a module or callable, where the logits are in what it returns: a name, an index, or a function of
            it; by default what is named ``logits``, or the first floating-point tensor of at least two dimensions. A
            ``Teacher`` has its own.
        readonly: never write; rows that are missing are computed and not kept. The folder must hold a cache.
        shard_bytes, shard_seconds: rows wait in memory until they are so many bytes, or the first of them has waited so
            long, then they are written. Fewer, larger shards read faster; :meth:`flush` and :meth:`close` write what
            there is.
        checksums: compare the checksum of each 128 KiB of a shard once in a process, before the first of its rows is
            used. Without, only its size, header and sample ids are compared.

    Samples may have any dimensions in front of the classes, ``(L, C)`` of a language model for one; all samples of a
    cache share them. One thread at a time. Forked and pickled caches, such as those in the workers of a DataLoader,
    read and write shards of their own, at the latest when their process ends; a pickled one takes the teacher along if
    that can be pickled. Rows are read into host memory; :meth:`label` moves them to the device of ``x`` (not yet run on
    a GPU).

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
        shard_seconds: float = 300.0,
        checksums: bool = True,
        logits_of: LogitsOf = None,
    ) -> None:
        fingerprint = teacher_fingerprint(
            teacher, k=k, temperature=temperature, tail=tail, latents=latents, dtype=dtype, transforms=transforms,
            version=version, logits_of=logits_of,
        )  # fmt: skip
        warn_of_unseen(fingerprint)
        readonly, checksums = flag(OP, "readonly", readonly), flag(OP, "checksums", checksums)
        shard_bytes = _checks.integer(OP, "shard_bytes", shard_bytes, 1, 1 << 40)
        shard_seconds = _checks.number(OP, "shard_seconds", shard_seconds, 0.0, 1e9)
        self._start(
            folder, teacher, fingerprint, writable=not readonly, shard_bytes=shard_bytes, shard_seconds=shard_seconds,
            checksums=checksums,
        )  # fmt: skip
        self._logits_of: LogitsOf = logits_of

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, checksums: bool = True) -> TeacherCache:
        """A cache to read from, whoever's it is: settings and fingerprint are those of its manifest.

        Raises:
            CacheError: there is none, or it cannot be read.
        """
        checksums = flag(OP, "checksums", checksums)
        made = cls.__new__(cls)
        made._start(folder, None, None, writable=False, shard_bytes=1, shard_seconds=0.0, checksums=checksums)
        return made

    def _start(
        self,
        folder: str | os.PathLike[str],
        teacher: Callable[..., Any] | None,
        fingerprint: Fingerprint | None,
        **options: Any,
    ) -> None:
        self.folder = as_path(OP, "a folder", folder)
        self._teacher = teacher
        self._logits_of = None
        self._stayed = ""  # why it is not in this process
        self._store: Store | None = None
        store = Store(self.folder, fingerprint, **options)
        self._store = store
        self._at_exit = weakref.finalize(self, store.close)  # rows that wait are written where nobody calls close
        if fingerprint is None:
            assert store.manifest is not None
            fingerprint = store.manifest.fingerprint
        self.fingerprint: Fingerprint = fingerprint
        self.settings = Settings.of(fingerprint.parts)

    @property
    def teacher(self) -> Callable[..., Any] | None:
        """Who is asked for what is missing; None: nobody."""
        return self._teacher

    # Reading

    def label(self, x: Any, sample_ids: SampleIds) -> TeacherTopK | Tensor:
        """Outputs of the teacher for ``x``: read where it is stored, else computed and stored.

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
        return self._labels(self._served(x, sample_ids, LABELS), x)

    def encode(self, x: Any, sample_ids: SampleIds) -> Latents:
        """``teacher.encode(x)`` as :meth:`label` gives labels: read where it is stored, else computed and stored.

        Raises:
            ArgumentError: the cache was made without ``latents=True``. And what :meth:`label` raises.
        """
        return self.label_and_encode(x, sample_ids)[1]

    def label_and_encode(self, x: Any, sample_ids: SampleIds) -> tuple[TeacherTopK | Tensor, Latents]:
        """Both at once, which a step of training needs of its real examples."""
        self._check_latents()
        rows = self._served(x, sample_ids, (*LABELS, *LATENTS))
        mine = {name: rows[name] for name in self._names(LATENTS)}
        labels = {name: raw for name, raw in rows.items() if name not in mine}
        return self._labels(labels, x), as_latents(self._layout().unpack(mine), tree.first_device(x))

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
        self._check_latents()
        return as_latents(self._layout().unpack(self._read(sample_ids, LATENTS)), torch.device("cpu"))

    def missing(self, sample_ids: SampleIds) -> Tensor:
        """``(B,)`` bool: which of these ids are not stored. Takes in what other writers have finished."""
        return torch.from_numpy(self._find(as_ids(sample_ids)) == MISSING)

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
        ids, store = as_ids(sample_ids), self._open()
        if not store.writable:
            raise CacheError(f"{OP}: {self.folder} was opened to be read")
        layout, tensors = self.settings.fields(outputs, latents, len(ids))
        return store.append(ids, layout.pack(tensors), layout)

    def fill(
        self,
        loader: Iterable[Any],
        *,
        columns: Sequence[Any] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        flush: bool = True,
    ) -> int:
        """Label every sample of a loader that is not stored yet.

        Args:
            loader: batches ``(ids, x)`` or ``(ids, x, y)``, of which ``y`` is not looked at; others with ``columns``.
            columns: where ids, x and y are in a batch, ``(ids, x, y)``: each an index, a key, or None for y; x may be a
                tuple of keys, and is then a dict of them.
            batch_size: run the teacher on at most so many samples at a time.
            progress: show a progress bar.
            flush: write what still waits in memory at the end.

        Returns:
            How many rows were computed.

        Raises:
            ArgumentError: a batch without ids, or one that could be read in more than one way.
            What :meth:`label` raises. What was computed by then is kept.
        """
        store = self._open()
        if not store.writable:
            raise CacheError(f"{OP}: {self.folder} was opened to be read")
        if batch_size is not None:
            batch_size = _checks.integer(OP, "batch_size", batch_size, 1, 2**31)
        parts, added, loader = Columns(OP, columns, needs_ids=True), 0, as_loader(OP, loader)
        with tqdm(loader, desc="teacher cache", unit="batch", disable=not progress) as bar:
            for batch in bar:
                given, x, _ = parts.split(batch)
                assert given is not None
                ids = as_ids(given)
                which = missing_rows(ids, self._find(ids))
                step = batch_size or max(1, len(which))
                for start in range(0, len(which), step):
                    part = which[start : start + step]
                    layout, rows = self._compute(x, part, ids)
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

    def contents(self) -> Contents:
        """The contents of the folder, as seen."""
        store = self._open()
        return Contents(self._layout(), {shard.path.name: shard.bytes for shard in store.shards}, dict(store.torn))

    def close(self) -> None:
        """Write what waits and let go of the files. A closed cache refuses everything but ``close``."""
        if self._store is not None:
            self._store.close()
            self._at_exit.detach()
            self._store = None

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
        """A copy in another process writes shards of its own, and takes the teacher along where that can be pickled."""
        self.flush()
        store = self._open()
        asked = None if self._teacher is None else (self._teacher, self._logits_of)
        return _reopened, (self.folder, store.fingerprint, *packed(asked), store.options)

    # Inside

    def _open(self) -> Store:
        if self._store is None:
            raise CacheError(f"{OP}: the cache in {self.folder} is closed")
        return self._store

    def _layout(self) -> Layout:
        layout = self._open().layout
        if layout is None:
            raise CacheError(f"{OP}: the cache in {self.folder} has no rows yet")
        return layout

    def _names(self, fields: Sequence[str]) -> list[str]:
        """The blocks that hold them."""
        return self._layout().holding(tuple(fields))

    def _check_latents(self) -> None:
        if not self.settings.latents:
            raise ArgumentError(f"{OP}: {self.folder} stores no latents; make the cache with latents=True")

    def _served(self, x: Any, sample_ids: SampleIds, fields: Sequence[str]) -> Rows:
        """The rows of these ids, of which the teacher makes what is missing."""
        ids, store = as_ids(sample_ids), self._open()
        where = self._find(ids)
        while store.layout is None or _lacks(where):  # again if a file was cut while the teacher computed
            which = missing_rows(ids, where)
            if not store.writable:
                return self._mixed(x, ids, where, which, fields)
            layout, rows = self._compute(x, which, ids)
            store.append(ids[which], rows, layout)
            where = store.find(ids)
        return store.gather(where, self._names(fields))

    def _find(self, ids: Ids) -> Places:
        store = self._open()
        where = store.find(ids)
        if _lacks(where):
            store.refresh()
            where = store.find(ids)
        return where

    def _read(self, sample_ids: SampleIds, names: Sequence[str]) -> Rows:
        ids, store = as_ids(sample_ids), self._open()
        where = self._find(ids)
        if store.layout is None or _lacks(where):
            raise UnknownIdError(self._unknown(ids[where == MISSING]))
        return store.gather(where, self._names(names))

    def _unknown(self, ids: Ids) -> str:
        some = ", ".join(map(str, ids[:_SHOWN].tolist())) + (", ..." if len(ids) > _SHOWN else "")
        return f"{OP}: {self.folder} does not hold {len(ids)} of the sample ids asked for: {some or 'it is empty'}"

    def _compute(self, x: Any, which: Ids, ids: Ids) -> tuple[Layout, Rows]:
        """Run the teacher on these positions of a batch."""
        if self._teacher is None:
            raise UnknownIdError(f"{self._unknown(ids[which])}, and there is no teacher to ask{self._stayed}")
        size = tree.batch_size(x)
        if size != len(ids):
            raise ShapeError(f"{OP}: {len(ids)} sample ids for {size} samples")
        # A batch that is missing as a whole goes in as it is, and so comes out as without a cache.
        part = x if len(which) == size else tree.take(x, torch.from_numpy(which))
        outputs, latents = ask(self._teacher, part, len(which), self._logits_of, latents=self.settings.latents)
        layout, tensors = self.settings.fields(outputs, latents, len(which))
        return layout, layout.pack(tensors)

    def _mixed(self, x: Any, ids: Ids, where: Places, which: Ids, fields: Sequence[str]) -> Rows:
        """Rows of a batch of which some are stored and the others are computed, and not kept."""
        store = self._open()
        names, have = self._names(fields), where != MISSING
        stored = store.gather(where[have], names)  # first: a file may be cut while a teacher computes
        layout, rows = self._compute(x, which, ids)
        store.agree(layout)
        out = layout.empty(len(ids), names)
        order = np.argsort(ids[which])
        source = order[np.searchsorted(ids[which], ids[~have], sorter=order)]
        for name in names:
            out[name][have] = stored[name]
            out[name][~have] = rows[name][source]
        return out

    def _labels(self, rows: Rows, x: Any) -> TeacherTopK | Tensor:
        layout, device = self._layout(), tree.first_device(x)
        # To another device ids travel as narrow as they are stored.
        tensors = layout.unpack(rows, widen=device.type == "cpu")
        return self.settings.labels(tensors, layout.classes, device)


def _lacks(where: Places) -> bool:
    return bool(len(where)) and where.min() < 0


def _reopened(
    folder: Path, fingerprint: Fingerprint | None, teacher: bytes | None, stayed: str, options: dict[str, Any]
) -> TeacherCache:
    made = TeacherCache.__new__(TeacherCache)
    asked, logits_of = unpacked(teacher) or (None, None)
    made._start(folder, asked, fingerprint, **options)
    made._logits_of, made._stayed = logits_of, stayed
    return made
