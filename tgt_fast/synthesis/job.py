"""A synthesis as a command gives it: names, numbers and a folder, which go to any process."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from tgt_fast._files import new_file, sync
from tgt_fast._rng import isolated_rng
from tgt_fast._threads import threads
from tgt_fast.cache.arguments import as_loader
from tgt_fast.cache.command import factory
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.store import reported
from tgt_fast.errors import ArgumentError, CacheError
from tgt_fast.explore import LatentSampler
from tgt_fast.synthesis.filters import Filters
from tgt_fast.synthesis.folder import DROPPED, beneath
from tgt_fast.synthesis.maker import OP, Maker
from tgt_fast.synthesis.parquet import SUFFIX, ParquetRows, Place
from tgt_fast.synthesis.run import run
from tgt_fast.synthesis.summary import SynthesisSummary
from tgt_fast.synthesis.target import Target
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.batches import Columns

SCALE: Final = "scale.safetensors"


class Parts(NamedTuple):
    """What a worker works with."""

    maker: Maker
    loader: Iterable[Any]


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to know."""

    folder: str
    teacher: str  # package.module:factory, as the others
    data: str
    student: str | None
    options: tuple[tuple[str, Any], ...]  # of the sampler, those that were given
    replicas: int
    k: int | None
    latents: bool
    step: int
    format: str
    shard_bytes: int
    filters: Filters
    calibrate: int  # batches
    threads: int
    gpus: float  # a worker

    def parts(self) -> Parts:
        """The maker and the loader, made by the factories.

        Raises:
            ArgumentError: factories that are not there or give something else, options that cannot be.
        """
        made = factory("--teacher", self.teacher)()
        loader = as_loader("--data", factory("--data", self.data)())
        student = None if self.student is None else factory("--student", self.student)()
        sampler = self._sampler(made, loader)
        if self.gpus > 0:
            sampler.teacher.to("cuda")
            if isinstance(student, nn.Module):
                student.to("cuda")
        if sampler.options.needs_scale and sampler.scale is None:
            sampler.scale = self._scale(sampler, loader)
        maker = Maker.of(
            sampler, replicas=self.replicas, k=self.k, latents=self.latents, student=student, step=self.step,
            filters=self.filters,
        )  # fmt: skip
        return Parts(maker, loader)

    def _sampler(self, made: Any, loader: Iterable[Any]) -> LatentSampler:
        if isinstance(made, LatentSampler):
            if self.options:
                names = ", ".join(f"--{name.replace('_', '-')}" for name, _ in self.options)
                raise ArgumentError(f"{OP}: {self.teacher} gives a sampler with options of its own; leave out {names}")
            return made
        if not isinstance(made, Teacher):
            raise ArgumentError(
                f"{OP}: --teacher {self.teacher} must give a tgt_fast.Teacher or LatentSampler, "
                f"got {type(made).__name__}"
            )
        return LatentSampler(made, **dict(self.options))

    def _scale(self, sampler: LatentSampler, loader: Iterable[Any]) -> torch.Tensor:
        """The unit, which the first worker writes down and all others, and later runs, take from there."""
        where = beneath(self.folder, SCALE)
        known = _read(where)
        if known is None:
            measured = _measured(sampler, loader, self.calibrate)
            _publish(where, save_tensors({"scale": measured.contiguous()}))
            known = _read(where)
        assert known is not None
        try:
            return load_tensors(known)["scale"]
        except Exception as error:  # the library has its own kind
            raise CacheError(f"{OP}: cannot read {where}: {error}") from error

    def target(self, fingerprint: Fingerprint) -> Target:
        names = self.filters.names
        return Target(fingerprint, names, self.folder, format=self.format, shard_bytes=self.shard_bytes)

    def finish(self) -> None:
        """After the last worker: no file of those that others read holds a row that another one holds."""
        for folder in (self.folder, beneath(self.folder, DROPPED)):
            if self.format == "parquet" and any(name.endswith(SUFFIX) for name in Place(OP, folder).names()):
                ParquetRows(OP, folder, None, shard_bytes=1, shard_seconds=0.0).drop_repeated()

    def work(self, share: tuple[int, int], *, progress: bool) -> SynthesisSummary:
        """One worker's share."""
        with threads(self.threads):
            parts = self.parts()
            with self.target(parts.maker.fingerprint) as target:
                columns = Columns(OP, None, needs_ids=True)
                return run(parts.maker, target, parts.loader, columns, share, progress=progress)


def _measured(sampler: LatentSampler, loader: Iterable[Any], batches: int) -> torch.Tensor:
    parts = Columns(OP, None, needs_ids=True)
    with isolated_rng(0):
        some = [(batch.sample_ids, batch.x) for batch in map(parts.split, itertools.islice(loader, batches))]
    own = LatentSampler(sampler.teacher, "random", units="std")
    own.calibrate(some, columns=(0, 1, None), progress=False)
    assert own.scale is not None
    return own.scale.cpu()


def _is_local(place: Any) -> bool:
    return isinstance(place, Path)


def _read(place: Any) -> bytes | None:
    if _is_local(place):
        with reported(place, "read", but=(FileNotFoundError,)):
            try:
                found: bytes = place.read_bytes()
            except FileNotFoundError:
                return None
            return found
    import fsspec

    files, path = fsspec.core.url_to_fs(place)
    return bytes(files.cat_file(path)) if files.exists(path) else None


def _publish(place: Any, content: bytes) -> None:
    """Write a small file unless it is there."""
    if _is_local(place):
        with reported(place.parent, "write to"):
            place.parent.mkdir(parents=True, exist_ok=True)
            with new_file(place.parent) as new:
                new.file.write(content)
                new.sync()
                new.take_free_name(place)
            sync(place.parent)
        return
    import fsspec

    files, path = fsspec.core.url_to_fs(place)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, content)
