"""Files that appear whole or not at all, and the file system's errors as ``CheckpointError``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from tgt_fast._files import new_file, remove_dead, sync
from tgt_fast.errors import CheckpointError

# As safetensors calls them
_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_NAMES: Final = {getattr(torch, dtype): name for name, dtype in _DTYPES.items() if hasattr(torch, dtype)}


@contextmanager
def reported(path: Path, verb: str) -> Iterator[None]:
    """Inside ``with reported(path, "write"):`` an error of the file system becomes a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot {verb} {path}: {getattr(error, 'strerror', None) or error}") from error


def make_writable(folder: Path) -> None:
    """Make ``folder`` and prove that it can be written to, before work is spent that could not be saved.

    What killed writers left half written in it is removed.

    Raises:
        CheckpointError: it cannot.
    """
    with reported(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder) as probe:
            probe.file.write(b"\0")
            probe.file.flush()
    remove_dead(folder)


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside ``path``, then rename over it: a reader, or a crash, meets the old file or the new, whole.

    Raises:
        CheckpointError: it cannot be written; an older file of that name is then intact.
    """
    with reported(path, "write"):
        with new_file(path.parent) as new:
            write(new.file)
            new.sync()
            new.take_name(path)
        sync(path.parent)


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> str:
    """Write CPU tensors in the format of safetensors, no second copy of them in memory; the SHA-256 of the file.

    Raises:
        CheckpointError: the format has no word for a dtype or a name.
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # the widest first: all are aligned
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} is of {tensor.dtype}, which safetensors does not store")
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    if "__metadata__" in header:
        raise CheckpointError("a tensor is called __metadata__, which safetensors keeps for itself")
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the name of a tensor is no Unicode text ({error})") from error
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text):
        digest.update(part)
        file.write(part)
    for name in header:
        data = bytes_of(tensors[name])
        digest.update(data)
        file.write(data)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor on the CPU, as they are stored."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def standard_json(value: Any) -> Any:
    """The value with null for NaN and infinities, which standard JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): standard_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [standard_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
