"""A shard: some rows of a cache in one safetensors file, written once, whole, and read through a memory map.

Why safetensors and not Parquet: a row is a few arrays of fixed size, so its place in the file is a multiplication, and
reading it is a copy out of the page cache; Parquet would decode pages of rows to give one. The format is documented,
other tools read it, and the library is a dependency already. The map is read here and not through ``safe_open``, which
gives slices and no rows in a given order: a call a row, a hundred times slower (``benchmarks/bench_cache.py``).

What is read together lies together (``layout.Block``): the tensor ``labels`` holds a record a row, as bytes, in which
the fields begin where ``manifest.json`` says. So a sample that is not in memory costs one read and not one a field.

The checksum lies in the header, and covers names, dtypes, shapes, fingerprint and data. So a shard is one file, and the
rename that gives it its name is the only moment at which it comes to be.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import platform
import re
import secrets
import struct
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tgt_fast._files import sync
from tgt_fast.cache.layout import DTYPES, NAMES, Bytes, Field, Layout, Rows

SUFFIX: Final = ".safetensors"
TORN: Final = ".torn"  # added to the name of a shard that was set aside
TEMPORARY: Final = ".tmp"
IDS: Final = "sample_ids"
FORMAT: Final = "1"
_PIECE: Final = 1 << 20  # bytes of a CRC
_LARGEST_HEADER: Final = 100 << 20  # as in the library


class TornError(Exception):
    """A file that is no whole shard; the message says what is wrong with it."""


class Shard:
    """The rows of one file.

    Args:
        path: of a file that :func:`write_shard` made.
        layout: of its rows.

    Raises:
        TornError: the file is too short, too long, or not of that layout.
        FileNotFoundError: it has gone.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.checked = False
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, header = _read_header(file.read(8), file, size)
            self._metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self._header = header
            spans = _spans(header, size - start)
            shape = header[IDS]["shape"] if IDS in header else []
            self.rows = int(shape[0]) if shape else -1
            expected = {IDS: {"dtype": "I64", "shape": [self.rows]}}
            expected |= {name: _stored(block.stored, self.rows) for name, block in layout.blocks.items()}
            if {name: _kind(entry) for name, entry in header.items()} != expected:
                raise TornError("its tensors are not those of the manifest")
            self._map: Bytes = np.memmap(file, np.uint8, mode="r")
        self._parts = {name: self._map[start + a : start + b] for name, (a, b) in spans.items()}
        self.ids: NDArray[np.int64] = np.frombuffer(self._parts[IDS].tobytes(), "<i8")
        self.blocks: Rows = {
            name: np.asarray(self._parts[name]).reshape(self.rows, block.stored.row_bytes)
            for name, block in layout.blocks.items()
        }

    @property
    def fingerprint(self) -> str:
        return self._metadata.get("fingerprint", "")

    @property
    def bytes(self) -> int:
        return int(self._map.size)

    def read_ahead(self) -> None:
        """Tell the system that all of it will be wanted, where one can."""
        with suppress(AttributeError, ValueError, OSError):
            self._map._mmap.madvise(mmap.MADV_WILLNEED)  # type: ignore[attr-defined]

    def check(self) -> None:
        """Read all of it, once, and compare its checksum.

        Raises:
            TornError: it is another.
        """
        if not self.checked:
            self.read_ahead()
            kinds = {name: _kind(entry) for name, entry in self._header.items()}
            if _checksum(kinds, self.fingerprint, self._parts) != self._metadata.get("checksum"):
                raise TornError("its checksum is wrong")
            self.checked = True


class Checks:
    """Shards checked ahead of their use: a thread reads the next one while the rows of this one are copied.

    Reading a file and its CRC leave Python's lock to others, so an epoch takes about the time of its slower half.
    """

    def __init__(self) -> None:
        self._running: dict[Path, tuple[threading.Thread, list[BaseException]]] = {}
        self._process = os.getpid()

    def start(self, shard: Shard) -> None:
        """Begin to check it, if nobody has."""
        self._own()
        if shard.checked or shard.path in self._running:
            return
        errors: list[BaseException] = []

        def run() -> None:
            try:
                shard.check()
            except BaseException as error:  # for finish() to raise
                errors.append(error)

        thread = threading.Thread(target=run, name="tgt_fast-cache-check", daemon=True)
        self._running[shard.path] = thread, errors
        thread.start()

    def finish(self, shard: Shard) -> None:
        """Have it checked when this returns.

        Raises:
            TornError: its checksum is wrong.
        """
        self._own()
        thread, errors = self._running.pop(shard.path, (None, []))
        if thread is not None:
            thread.join()
        if errors:
            raise errors[0]
        shard.check()

    def _own(self) -> None:
        """A fork has no threads but the one that forked."""
        if os.getpid() != self._process:
            self._running, self._process = {}, os.getpid()


def write_shard(folder: Path, ids: NDArray[np.int64], rows: Rows, layout: Layout, fingerprint: str) -> Path:
    """Write rows, have them on the disk, and only then give the file its name; returns that.

    The name begins with the time, so that the shards of all writers have one order, and no two writers share one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    parts: Rows = {IDS: ids.astype("<i8").view(np.uint8)[:, None], **rows}
    kinds = {IDS: {"dtype": "I64", "shape": [len(ids)]}}
    kinds |= {name: _stored(block.stored, len(ids)) for name, block in layout.blocks.items()}
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(kinds, key=lambda n: (-_itemsize(kinds[n]), n)):  # the widest first: all are aligned
        header[name] = {**kinds[name], "data_offsets": [at, at + parts[name].nbytes]}
        at += parts[name].nbytes
    header["__metadata__"] = {
        "format": "tgt_fast.cache " + FORMAT,
        "fingerprint": fingerprint,
        "checksum": _checksum(kinds, fingerprint, parts),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer = f"{re.sub('[^A-Za-z0-9]+', '', platform.node())[:20]}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = folder / f".{writer}{TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in header:
                if name in parts:
                    file.write(np.ascontiguousarray(parts[name]).data)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"{time.time_ns():020d}-{writer}{SUFFIX}"
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(folder)
    return path


def _read_header(first: bytes, file: Any, size: int) -> tuple[int, dict[str, Any]]:
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
    if not 0 < length <= min(size - 8, _LARGEST_HEADER):
        raise TornError("it is too short for its header")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise TornError("its header is not readable") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise TornError("its header is not that of a shard")
    return 8 + length, header


def _spans(header: dict[str, Any], available: int) -> dict[str, tuple[int, int]]:
    """Where the data of each tensor lies, if together they are exactly what the file holds."""
    spans: dict[str, tuple[int, int]] = {}
    try:
        for name, entry in header.items():
            a, b = (int(at) for at in entry["data_offsets"])
            if b - a != _itemsize(entry) * math.prod(int(n) for n in entry["shape"]):
                raise TornError(f"the data of {name} has the wrong size")
            spans[name] = (a, b)
    except (KeyError, TypeError, ValueError) as error:
        raise TornError("its header is not that of a shard") from error
    at = 0
    for a, b in sorted(spans.values()):
        if a != at:
            raise TornError("its data has gaps")
        at = b
    if at != available:
        raise TornError(f"it holds {available} bytes of data in the place of {at}")
    return spans


def _stored(field: Field, rows: int) -> dict[str, Any]:
    return {"dtype": NAMES[field.dtype], "shape": [rows, *field.shape]}


def _kind(entry: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": entry["dtype"], "shape": entry["shape"]}


def _itemsize(entry: dict[str, Any]) -> int:
    return DTYPES[entry["dtype"]].itemsize


def _checksum(kinds: dict[str, Any], fingerprint: str, parts: Rows) -> str:
    """SHA-256 over the description and a CRC-32 of each MiB of data, which takes a third of the time of hashing it."""
    digest = hashlib.sha256(json.dumps([FORMAT, fingerprint, kinds], sort_keys=True).encode())
    for name in sorted(parts):
        flat = parts[name].reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece = np.ascontiguousarray(flat[start : start + _PIECE])
            digest.update(struct.pack("<I", zlib.crc32(piece.data)))
    return digest.hexdigest()
