"""The two files of a checkpoint: tensors under a name that is their hash, and a document that names them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tgt_fast._files import new_file, sync
from tgt_fast._opening import open_file, parse_json
from tgt_fast.errors import CheckpointError
from tgt_fast.train import sharded
from tgt_fast.train.files import bytes_of, replace_file, reported, write_tensors

MANIFEST: Final = "checkpoint.json"
_FORMAT: Final = "tgt_fast.checkpoint"
_ALONE, _SEVERAL = 1, 2  # versions: of one process, and of several
_ANY_TENSOR_FILE: Final = "checkpoint-" + "[0-9a-f]" * 16 + ".safetensors"
_LARGEST: Final = 1 << 30  # bytes of JSON
# What the reading of a document raises that is not of the form that its code expects
MALFORMED: Final = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, RuntimeError)

Tensors = Mapping[str, Tensor]


class Entry(NamedTuple):
    """The part of a checkpoint that one process wrote."""

    tensors_sha256: str
    state_sha256: str
    state: dict[str, Any]


def canonical(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def hashes(tensors: Tensors) -> dict[str, str]:
    """Of each tensor, dtype and shape included."""
    found = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
        found[name] = digest.hexdigest()
    return found


def write_entry(folder: Path, state: dict[str, Any], tensors: Tensors) -> Entry:
    """Write the tensors, which count once a document names them; no other checkpoint's file is touched.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    with reported(folder, "write to"):
        with new_file(folder) as new:
            digest = write_tensors(new.file, tensors)
            new.sync()
            new.take_name(folder / _tensor_file(digest))
        sync(folder)
    return Entry(digest, _text_sha256(canonical(state)), state)


def write_document(folder: Path, entries: list[Entry], shards: dict[str, Any] | None = None) -> None:
    """Name the tensors of all processes, which makes them the checkpoint of the folder.

    Raises:
        CheckpointError: it cannot be written, or tensors that another process wrote are not here.
    """
    for rank, entry in enumerate(entries):
        path = folder / _tensor_file(entry.tensors_sha256)
        if not path.exists():
            raise CheckpointError(
                f"{path}, which process {rank} wrote, is not here: the folder must be on a file system that all share"
            )
    first, *others = ({**entry._asdict()} for entry in entries)
    document = {
        "format": _FORMAT,
        "version": _SEVERAL if others else _ALONE,
        "torch": torch.__version__,
        **first,
        **({"others": others} if others else {}),
        **({} if shards is None else {"sharded": shards}),
    }
    replace_file(folder / MANIFEST, lambda file: file.write(canonical(document).encode()))


def remove_unnamed(folder: Path) -> None:
    """Remove the tensor files that ``checkpoint.json`` does not name; where it cannot be read, none."""
    try:
        with open_file(folder / MANIFEST) as file:
            document = parse_json(file.read())
        named = {_tensor_file(entry["tensors_sha256"]) for entry in _entries(document)}
        for path in folder.glob(_ANY_TENSOR_FILE):
            if path.name not in named:
                path.unlink()
        sharded.remove_unnamed(folder, document.get("sharded", {}).get("folder"))
    except (OSError, *MALFORMED):
        return  # untidy, but no checkpoint is harmed


def read(folder: Path, rank: int, count: int | None) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """The validated content of a checkpoint for one of so many processes (None: of whichever number).

    Its state, still encoded, its tensors, and what it says of those that are sharded.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another number of processes.
    """
    manifest = folder / MANIFEST
    document = _read_document(manifest)
    entries = _entries(document)
    if count is not None and len(entries) != count:
        raise CheckpointError(
            f"{manifest}: saved by {len(entries)} processes, each with its own generators, place in the data and "
            f"sampler; the run has {count}. To go on from its weights, call "
            f"student.load_state_dict(tgt_fast.train.checkpoint_weights({str(folder)!r})) and start a run in another "
            "checkpoint_dir"
        )
    for entry in entries:
        if not isinstance(entry, dict):
            raise CheckpointError(f"{manifest}: damaged (the part of a process is a {type(entry).__name__})")
    state = entries[rank].get("state")
    if not isinstance(state, dict) or not _has_hash(state, entries[rank].get("state_sha256")):
        raise CheckpointError(f"{manifest}: damaged (its content does not match its hash)")
    tensors: dict[str, Tensor] = {}
    for number in sorted({0, rank}):  # what it has in common with the first is stored there alone
        tensors.update(_read_tensors(manifest, entries[number].get("tensors_sha256")))
    return state, tensors, document.get("sharded")


def _entries(document: dict[str, Any]) -> list[Any]:
    others = document.get("others", [])
    return [document, *(others if isinstance(others, list) else [others])]


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _has_hash(state: dict[str, Any], digest: Any) -> bool:
    try:
        return bool(_text_sha256(canonical(state)) == digest)
    except (ValueError, RecursionError):  # json.loads takes NaN, 1e999 and lone surrogates, which no checkpoint has
        return False


def _tensor_file(digest: str) -> str:
    return f"checkpoint-{digest[:16]}.safetensors"


def _read_document(manifest: Path) -> dict[str, Any]:
    with reported(manifest, "read"):
        try:
            with open_file(manifest) as file:
                size = os.fstat(file.fileno()).st_size
                raw = file.read() if size <= _LARGEST else b""
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{manifest.parent}: no checkpoint there (no {manifest.name})") from None
    try:
        if size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST} bytes")
        document = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{manifest}: damaged, not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{manifest}: not a checkpoint of tgt_fast (no format {_FORMAT!r})")
    version = _SEVERAL if "others" in document else _ALONE
    if document.get("version") != version:
        raise CheckpointError(f"{manifest}: version {document.get('version')!r}; this tgt_fast reads version {version}")
    return document


def _read_tensors(manifest: Path, digest: Any) -> dict[str, Tensor]:
    # The file's name comes from a hash, checked to be one, never from a path in the document.
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise CheckpointError(f"{manifest}: damaged (tensors_sha256 is no hash)")
    tensor_file = manifest.parent / _tensor_file(digest)
    with reported(tensor_file, "read"):
        try:
            with open_file(tensor_file) as file:
                data = file.read()
        except FileNotFoundError:
            raise CheckpointError(f"{tensor_file}: missing, though {manifest.name} names it") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{tensor_file}: damaged (truncated or altered: its hash does not match)")
        try:
            return safetensors.torch.load(data)
        except MALFORMED as error:
            raise CheckpointError(f"{tensor_file}: not tensors of a checkpoint ({error!r})") from error
