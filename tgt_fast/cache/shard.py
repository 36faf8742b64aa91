"""A shard: some rows of a cache in one safetensors file, written once, whole, and read through a memory map.

Why safetensors and not Parquet: a row is a few arrays of fixed size, so its place in the file is a multiplication, and
reading it is a copy out of the page cache; Parquet would decode pages of rows to give one. The format is documented,
other tools read it, and the library is a dependency already. The map is read here and not through ``safe_open``, which
gives slices and no rows in a given order: a call a row, a hundred times slower (``benchmarks/bench_cache.py``).

What is read together lies together (``layout.Block``): the tensor ``labels`` holds a record a row, as bytes, in which
the fields begin where ``manifest.json`` says. So a sample that is not in memory costs one read and not one a field.

The checksums of the data (``checksums.py``) lie in the header, and one of their own covers them, names, dtypes, shapes
and fingerprint. So a shard is one file, and the rename that gives it its name is the only moment at which it comes to
be.
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
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from tgt_fast._files import MARK, new_file, sync
from tgt_fast._opening import open_file, parse_json
from tgt_fast.cache.checksums import Checked, TornError, crcs
from tgt_fast.cache.index import Places
from tgt_fast.cache.keys import Packed
from tgt_fast.cache.layout import DTYPES, NAMES, Bytes, Field, Layout, Rows

SUFFIX: Final = ".safetensors"
TORN: Final = ".torn"  # added to the name of a shard that was set aside
_OURS: Final = re.compile(rf"\d{{20}}-{MARK}.*{re.escape(SUFFIX)}")
FORMAT: Final = "3"
_CRC: Final = "crc32."  # in front of the name of a tensor
_CUT: Final = "it was cut short since it was opened"
_LARGEST_HEADER: Final = 100 << 20  # as in the library


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
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start, header = _read_header(file.read(8), file, size)
            metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            spans = _spans(header, size - start)
            keys = layout.keys
            shape = header[keys.tensor]["shape"] if keys.tensor in header else []
            self.rows = int(shape[0]) if shape else -1
            kinds = {name: _kind(entry) for name, entry in header.items()}
            if kinds != _kinds(layout, self.rows):
                raise TornError("its tensors are not those of the manifest")
            self.fingerprint = metadata.get("fingerprint", "")
            expected = {name: metadata.get(_CRC + name, "") for name in kinds}
            if metadata != _metadata(kinds, self.fingerprint, expected):
                raise TornError("the checksum of its header is wrong")
            self.bytes = size
            try:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except ValueError as error:  # it is shorter by now
                raise TornError(_CUT) from error
        whole: Bytes = np.frombuffer(self._map, np.uint8)
        widths = {
            keys.tensor: 8 * len(keys.columns),
            **{name: block.stored.row_bytes for name, block in layout.blocks.items()},
        }
        parts = {name: whole[start + a : start + b].reshape(self.rows, widths[name]) for name, (a, b) in spans.items()}
        self._checked = {name: Checked(part, expected[name]) for name, part in parts.items()}
        self._checked.pop(keys.tensor).check()
        numbers = np.frombuffer(parts.pop(keys.tensor).tobytes(), "<i8").reshape(self.rows, len(keys.columns))
        self.ids: Packed = keys.pack(numbers)
        self.blocks: Rows = parts

    @property
    def checked(self) -> bool:
        """All of it."""
        return all(part.done for part in self._checked.values())

    def check_size(self) -> None:
        """To be called before rows are copied: what is missing of a file ends the process where a map is read there.

        Raises:
            TornError: another process has cut the file.
        """
        if self._map.size() < self.bytes:
            raise TornError(_CUT)

    def check(self, rows: slice | Places | None = None) -> None:
        """Compare the checksums of these rows, or of all, unless that was done.

        Raises:
            TornError: one is another.
        """
        for part in self._checked.values():
            part.check(rows)


def is_shard(name: str) -> bool:
    """True if a file is one of ours, by its name."""
    return _OURS.fullmatch(name) is not None


def write_shard(folder: Path, ids: Packed, rows: Rows, layout: Layout, fingerprint: str) -> Path:
    """Write rows, have them on the disk, and only then give the file its name; returns that.

    The name begins with the time, so that the shards of all writers have one order, and no two writers share one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    numbers = np.ascontiguousarray(layout.keys.unpack(ids).astype("<i8"))
    parts: Rows = {layout.keys.tensor: numbers.view(np.uint8), **rows}
    kinds = _kinds(layout, len(ids))
    sums = {name: crcs(parts[name]).tobytes().hex() for name in kinds}
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(kinds, key=lambda n: (-_itemsize(kinds[n]), n)):  # the widest first: all are aligned
        header[name] = {**kinds[name], "data_offsets": [at, at + parts[name].nbytes]}
        at += parts[name].nbytes
    header["__metadata__"] = _metadata(kinds, fingerprint, sums)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer = f"{MARK}{re.sub('[^A-Za-z0-9]+', '', platform.node())[:20]}-{os.getpid()}-{secrets.token_hex(4)}"
    with new_file(folder) as new:
        new.file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            if name in parts:
                new.file.write(np.ascontiguousarray(parts[name]).data)
        new.sync()
        path = folder / f"{time.time_ns():020d}-{writer}{SUFFIX}"
        new.take_name(path)
    sync(folder)
    return path


def _read_header(first: bytes, file: Any, size: int) -> tuple[int, dict[str, Any]]:
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
    if not 0 < length <= min(size - 8, _LARGEST_HEADER):
        raise TornError("it is too short for its header")
    try:
        header = parse_json(file.read(length))
    except ValueError as error:
        raise TornError("its header is not readable") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise TornError("its header is not that of a shard")
    return 8 + length, header


def _spans(header: dict[str, Any], available: int) -> dict[str, tuple[int, int]]:
    """Places of the data of each tensor, if together they are exactly what the file holds."""
    spans: dict[str, tuple[int, int]] = {}
    try:
        for name, entry in header.items():
            a, b = (int(at) for at in entry["data_offsets"])
            if b - a != _itemsize(entry) * math.prod(int(n) for n in entry["shape"]):
                raise TornError(f"the data of {name} has the wrong size")
            spans[name] = (a, b)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise TornError("its header is not that of a shard") from error
    at = 0
    for a, b in sorted(spans.values()):
        if a != at:
            raise TornError("its data has gaps")
        at = b
    if at != available:
        raise TornError(f"it holds {available} bytes of data in the place of {at}")
    return spans


def _kinds(layout: Layout, rows: int) -> dict[str, Any]:
    """Tensors by the header of a shard, apart from where they lie."""

    def stored(field: Field) -> dict[str, Any]:
        return {"dtype": NAMES[field.dtype], "shape": [rows, *field.shape]}

    ids = {"dtype": "I64", "shape": [rows, *layout.keys.shape]}
    return {layout.keys.tensor: ids, **{name: stored(block.stored) for name, block in layout.blocks.items()}}


def _kind(entry: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": entry["dtype"], "shape": entry["shape"]}


def _itemsize(entry: dict[str, Any]) -> int:
    return DTYPES[entry["dtype"]].itemsize


def _metadata(kinds: dict[str, Any], fingerprint: str, sums: dict[str, str]) -> dict[str, str]:
    return {
        "format": "tgt_fast.cache " + FORMAT,
        "fingerprint": fingerprint,
        "checksum": _checksum(kinds, fingerprint, sums),
        **{_CRC + name: digits for name, digits in sums.items()},
    }


def _checksum(kinds: dict[str, Any], fingerprint: str, sums: dict[str, str]) -> str:
    """SHA-256 of what the header says; the CRCs of the data are part of that."""
    return hashlib.sha256(json.dumps([FORMAT, fingerprint, kinds, sums], sort_keys=True).encode()).hexdigest()
