"""``synthesize``: synthetic examples of a whole loader, in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from tqdm import tqdm

from tgt_fast._processes import place
from tgt_fast._rng import isolated_rng
from tgt_fast.cache.arguments import as_loader, flag
from tgt_fast.cache.query import as_ids
from tgt_fast.explore import LatentSampler
from tgt_fast.synthesis import interruption
from tgt_fast.synthesis.filters import Filters
from tgt_fast.synthesis.maker import OP, Maker
from tgt_fast.synthesis.summary import SynthesisSummary
from tgt_fast.synthesis.target import Target
from tgt_fast.teacher.batches import Columns


def synthesize(
    sampler: LatentSampler,
    loader: Iterable[Any],
    folder: Any,
    *,
    replicas: int = 1,
    k: int | None = None,
    latents: bool = False,
    student: Callable[..., Any] | None = None,
    step: int = 0,
    columns: Sequence[Any] | None = None,
    format: Literal["safetensors", "parquet"] | str = "safetensors",
    shard_bytes: int = 64 << 20,
    progress: bool = True,
    filters: Filters | None = None,
) -> SynthesisSummary:
    r"""``row(id, replica, step) = (x~, h(x~))``, with ``x~ = sampler(x, sample_ids=id, step=step)``.

    Each row is made once and kept; :class:`tgt_fast.SyntheticDataset` reads them. Run again it goes on where it was
    stopped: batches all of whose rows are there are not made again, of others all rows are made and those that are
    missing are kept, for the last bits of a matrix product depend on how many rows it has. So the folder is the same,
    bit for bit, whoever worked at it and however often it was interrupted, as long as the loader gives the same batches
    each time. What it draws from global generators is made the same: they start from one seed here, and are as they
    were afterwards.

    In the processes of ``torch.distributed`` each makes the batches ``rank, rank + world_size, ...`` of the same
    loader, into one folder; ``tgt-fast synthesize --workers`` starts processes by itself. Noise belongs to
    (seed, sample id, step, replica) alone; give every process as many threads, on which last bits may depend, too.

    Args:
        sampler: of the modes prior, random or gradient; calibrated, where its units are standard deviations. It is left
            as it was.
        loader: batches ``(ids, x)`` or ``(ids, x, y)``, of which ``y`` is not looked at. An id is one example: of one
            that comes again the first rows stay.
        folder: made if need be; with ``format="parquet"`` also an address that fsspec knows, such as
            ``"s3://bucket/folder"``.
        replicas: synthetic examples a real one, in [1, 32768], numbered from 0. This argument decides: a sampler whose
            own ``replicas`` is neither 1 nor the same number is refused. More of them later are added to the folder.
        k: store records of so many classes at the sampler's ``temperature`` (:func:`tgt_fast.topk_teacher`); None: the
            teacher's logits.
        latents: store ``z~``, too.
        student: the model that gradient mode climbs away from.
        step: 0 <= step < 2**28, part of the noise's key and of the row's. A folder may hold several.
        columns: where ids, x and y are in a batch, as for :meth:`tgt_fast.TeacherCache.fill`.
        format: ``"safetensors"``: shards as those of :class:`tgt_fast.TeacherCache`; ``"parquet"``: files that other
            pipelines read (``pip install 'tgt-fast[parquet]'``).
        shard_bytes: rows wait in memory until they are so many bytes, or for a minute.
        progress: show a bar.
        filters: :class:`tgt_fast.synthesis.Filters`, which examples to drop.

    Returns:
        A :class:`tgt_fast.synthesis.SynthesisSummary`: how many were made, found and dropped, with examples.

    Raises:
        StaleCacheError: the folder holds examples of another teacher, student, sampler or other options; the message
            says what differs.
        ArgumentError: a persistent or uncalibrated sampler, an option out of its range, batches without ids.
        ShapeError: examples of another shape than those in the folder.
        CacheError: the folder cannot be written.

    >>> import tempfile, torch, tgt_fast as tgt
    >>> from torch import nn
    >>> teacher = tgt.Teacher(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 3))
    >>> sampler = tgt.LatentSampler(teacher, sigma=0.5, units="absolute")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(tgt.synthesize(sampler, [(torch.arange(4), torch.zeros(4, 8))], folder, replicas=2, progress=False))
    ...     print(len(tgt.SyntheticDataset(folder)))
    8 examples made, 0 were there
    8
    """
    maker = Maker.of(
        sampler, replicas=replicas, k=k, latents=latents, student=student, step=step, filters=filters or Filters()
    )
    parts, loader = Columns(OP, columns, needs_ids=True), as_loader(OP, loader)
    progress = flag(OP, "progress", progress)
    with Target(maker.fingerprint, maker.filters.names, folder, format=format, shard_bytes=shard_bytes) as target:
        return run(maker, target, loader, parts, place(), progress=progress)


def run(
    maker: Maker,
    target: Target,
    loader: Iterable[Any],
    parts: Columns,
    share: tuple[int, int],
    *,
    progress: bool,
) -> SynthesisSummary:
    """The batches of one of several workers: whole ones, so that their bits are those of any number of workers."""
    summary = SynthesisSummary()
    worker, workers = share
    with isolated_rng(0), tqdm(loader, desc=OP, unit="batch", disable=not progress or worker > 0) as bar:
        for number, raw in enumerate(bar):
            interruption.check()
            if number % workers != worker:
                continue
            given, x, _ = parts.split(raw)
            assert given is not None
            ids = as_ids(given)
            keys = maker.keys(ids)
            if not target.lacks(keys):
                summary.found += len(set(keys.tolist()))
                continue
            target.take(maker.make(ids, x), summary)
            bar.set_postfix(made=summary.computed, refresh=False)
    return summary
