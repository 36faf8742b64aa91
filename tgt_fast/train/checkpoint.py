"""Checkpoints without pickle: one safetensors file, and one JSON file that names it by its hash.

In a checkpoint folder::

    checkpoint.json                      structure and numbers; replacing it makes a checkpoint valid
    checkpoint-<16 digits>.safetensors   every tensor of that checkpoint; the digits begin its SHA-256

A new checkpoint's tensors are written beside the old ones, then ``checkpoint.json`` is replaced in one
rename, then the old tensors are removed: a process killed at any moment leaves a whole checkpoint, the old or
the new.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from tgt_fast._files import new_file, remove_dead, sync
from tgt_fast._opening import open_file, parse_json
from tgt_fast._rng import get_rng_state, set_rng_state
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.train.codec import decode, encode
from tgt_fast.train.files import make_writable, replace_file, reported, write_tensors
from tgt_fast.train.names import under_names_of, under_own_names

MANIFEST = "checkpoint.json"
_FORMAT, _VERSION = "tgt_fast.checkpoint", 1
_ANY_TENSOR_FILE = "checkpoint-" + "[0-9a-f]" * 16 + ".safetensors"
_LARGEST = 1 << 30  # bytes of JSON
# What the reading of a document raises that is not of the form that its code expects
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, RuntimeError)
_SHOWN = 5  # how many differing names an error lists


class Stateful(Protocol):
    """Anything with ``state_dict`` and ``load_state_dict``: an optimizer, a schedule, a sampler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` hands back beside the objects that it filled."""

    step: int
    extra: Any  # as given to save_checkpoint


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether ``directory`` holds a checkpoint (not whether it is a good one)."""
    return os.path.exists(Path(directory) / MANIFEST)


def save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    student: nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    sampler: Stateful | None = None,
    data: Stateful | None = None,
    step: int = 0,
    extra: Any = None,
) -> Path:
    """Save a training state, so that ``load_checkpoint`` continues it bit for bit on the same machine.

    Saved are ``student.state_dict()``, without the names that ``torch.compile`` puts in, the states of the other
    objects given, those of the global random number generators (torch, numpy, Python), ``step`` and ``extra``. The
    teacher is not: it is frozen, and yours to build again.

    Args:
        directory: the folder; made if it is missing. It holds one checkpoint, the last.
        student: the module that is trained. Tied weights are stored once a name.
        optimizer, scheduler, sampler: whatever of them the run has. Their states must be tensors, numbers,
            strings and containers of them.
        data: what knows the place in the data's order, such as a :class:`tgt_fast.train.data.BatchStream`.
        step: the number of optimizer steps taken.
        extra: anything else of such values.

    Returns:
        The path of ``checkpoint.json``.

    Raises:
        ArgumentError: ``step`` is no integer >= 0.
        CheckpointError: a state cannot be stored without pickle, or the folder cannot be written (full,
            read-only). The previous checkpoint in the folder is then intact.
    """
    folder = Path(directory)
    parts = {"data": data, "sampler": sampler, "scheduler": scheduler, "optimizer": optimizer}
    state, tensors = _encode_all(student, parts, step, extra)
    make_writable(folder)
    manifest = folder / MANIFEST
    try:
        digest = _write_under_hash(folder, tensors)
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "torch": torch.__version__,
            "tensors_sha256": digest,
            "state_sha256": _text_sha256(_canonical(state)),
            "state": state,
        }
        replace_file(manifest, lambda file: file.write(_canonical(document).encode()))
    finally:
        remove_unnamed(folder)
    return manifest


def load_checkpoint(
    directory: str | os.PathLike[str],
    *,
    student: nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    sampler: Stateful | None = None,
    data: Stateful | None = None,
    check: Callable[[Checkpoint], None] | None = None,
) -> Checkpoint:
    """Fill the objects of a run from the checkpoint in ``directory``: all of them, or none.

    Hashes, names, shapes, dtypes and the kinds of the objects are checked before anything is touched; if an
    object still refuses its state, those already filled are put back. The global random number generators are
    set as well.

    Args:
        directory: a folder written by :func:`save_checkpoint`.
        student, optimizer, scheduler, sampler, data: built as for the run that saved; None where that run had
            None.
        check: given what will be returned, raises a CheckpointError where your run cannot go on from it.

    Returns:
        The step and ``extra``.

    Raises:
        CheckpointError: no checkpoint, a damaged or foreign one, or one of another student, optimizer,
            schedule, sampler or loader. The message names the file and what differs, and nothing was changed.
    """
    manifest = Path(directory) / MANIFEST
    state, tensors = _read(manifest)
    # The data first, since finding its place may move the global generators, which are set last.
    parts = {"data": data, "sampler": sampler, "scheduler": scheduler, "optimizer": optimizer}
    try:
        weights = under_names_of(student.state_dict(), decode(state["student"], tensors))
        rng = decode(state["rng"], tensors)
        checkpoint = Checkpoint(_steps(state["step"]), decode(state["extra"], tensors))
        states = {name: _decode_part(name, part, state[name], tensors) for name, part in parts.items()}
        _check_student(student, weights)
        if optimizer is not None:
            _check_optimizer(optimizer, states["optimizer"])
        if check is not None:
            check(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{manifest}: {error}") from None
    except _MALFORMED as error:
        raise CheckpointError(f"{manifest}: not a training state of tgt_fast ({error!r})") from error

    undo = [_restorer(set_rng_state, get_rng_state())]
    try:
        for name, part in parts.items():
            if part is not None:
                undo.append(_restorer(part.load_state_dict, part.state_dict()))
                part.load_state_dict(states[name])
        undo.append(_restorer(student.load_state_dict, student.state_dict()))
        student.load_state_dict(weights)
        set_rng_state(rng)
    except BaseException as error:
        for restore in reversed(undo):
            restore()
        if not isinstance(error, Exception):  # an interruption
            raise
        raise CheckpointError(f"{manifest}: its state was refused ({error}); nothing was changed") from error
    return checkpoint


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Write a ``state_dict`` as one safetensors file under its own names, replacing ``path`` in one rename.

    ``module.load_state_dict(safetensors.torch.load_file(path))`` loads it again, strictly.

    Raises:
        CheckpointError: an entry is not a tensor, or the file cannot be written; an older file is then
            intact.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}; a weights file takes tensors only")
        encode(value, name, tensors)
    remove_dead(Path(path).parent)
    replace_file(Path(path), lambda file: write_tensors(file, tensors))


# ---- the parts ----


def _steps(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"step is {str(value)[:40]}")
    return value


def _encode_all(
    student: nn.Module, parts: Mapping[str, Stateful | None], step: int, extra: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        steps = _steps(step)
    except ValueError as error:
        raise ArgumentError(f"save_checkpoint: step must be an integer >= 0, but {error}") from None
    tensors: dict[str, Tensor] = {}
    try:
        state = {
            "step": steps,
            "student": encode(under_own_names(student.state_dict()), "student", tensors),
            "rng": encode(get_rng_state(), "rng", tensors),
            "extra": encode(extra, "extra", tensors),
        }
        for name, part in parts.items():
            state[name] = None if part is None else _encode_part(name, part, tensors)
        _canonical(state)
    except RecursionError:
        raise CheckpointError("a state is nested too deep for a checkpoint, or holds itself") from None
    except ValueError as error:  # an integer of thousands of digits
        raise CheckpointError(f"a state cannot be stored: {error}") from error
    return state, tensors


def _kind(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _encode_part(name: str, part: Stateful, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"kind": _kind(part), "state": encode(part.state_dict(), name, tensors)}


def _decode_part(name: str, part: Stateful | None, saved: Any, tensors: Mapping[str, Tensor]) -> Any:
    if saved is None and part is None:
        return None
    if saved is None or part is None:
        has, lacks = ("run", "checkpoint") if saved is None else ("checkpoint", "run")
        raise CheckpointError(f"the {has} has a {name}, the {lacks} has none")
    if saved["kind"] != _kind(part):
        raise CheckpointError(f"its {name} is a {saved['kind']}, the run's is a {_kind(part)}")
    return decode(saved["state"], tensors)


def _check_student(student: nn.Module, weights: Mapping[str, Any]) -> None:
    here = student.state_dict()
    missing = [name for name in here if name not in weights]
    unexpected = [name for name in weights if name not in here]
    if missing or unexpected:
        raise CheckpointError(
            f"it is of another student: it lacks {_names(missing)} and has {_names(unexpected)} too many"
        )
    differing = [
        f"{name} (checkpoint {_describe(weights[name])}, student {_describe(value)})"
        for name, value in here.items()
        if _describe(weights[name]) != _describe(value)
    ]
    if differing:
        raise CheckpointError(f"it is of another student: these entries differ: {_names(differing)}")


def _check_optimizer(optimizer: Stateful, saved: Mapping[str, Any]) -> None:
    def sizes(state: Mapping[str, Any]) -> list[int]:
        return [len(group["params"]) for group in state["param_groups"]]

    here = optimizer.state_dict()
    if "param_groups" in here and sizes(here) != sizes(saved):
        raise CheckpointError(
            f"its optimizer has parameter groups of {sizes(saved)} tensors, the run's of {sizes(here)}"
        )


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _names(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _restorer(load: Callable[[Any], Any], state: Any) -> Callable[[], Any]:
    snapshot = copy.deepcopy(state)
    return lambda: load(snapshot)


# ---- the files ----


def _canonical(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _has_hash(state: dict[str, Any], digest: Any) -> bool:
    try:
        return bool(_text_sha256(_canonical(state)) == digest)
    except (ValueError, RecursionError):  # json.loads takes NaN, 1e999 and lone surrogates, which no checkpoint has
        return False


def _tensor_file(digest: str) -> str:
    return f"checkpoint-{digest[:16]}.safetensors"


def _write_under_hash(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write a tensor file named by its hash, which is returned; no other checkpoint's file is touched."""
    with reported(folder, "write to"):
        with new_file(folder) as new:
            digest = write_tensors(new.file, tensors)
            new.sync()
            new.take_name(folder / _tensor_file(digest))
        sync(folder)
    return digest


def remove_unnamed(folder: Path) -> None:
    """Remove the tensor files that ``checkpoint.json`` does not name; where it cannot be read, none."""
    manifest = folder / MANIFEST
    try:
        with open_file(manifest) as file:
            named = _tensor_file(parse_json(file.read())["tensors_sha256"])
        for path in manifest.parent.glob(_ANY_TENSOR_FILE):
            if path.name != named:
                path.unlink()
    except (OSError, *_MALFORMED):
        return  # untidy, but no checkpoint is harmed


def _read(manifest: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The validated content of a checkpoint: its state, still encoded, and its tensors."""
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
    if document.get("version") != _VERSION:
        raise CheckpointError(
            f"{manifest}: version {document.get('version')!r}; this tgt_fast reads version {_VERSION}"
        )
    state, digest = document.get("state"), document.get("tensors_sha256")
    if not isinstance(state, dict) or not _has_hash(state, document.get("state_sha256")):
        raise CheckpointError(f"{manifest}: damaged (its content does not match its hash)")
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
            return state, safetensors.torch.load(data)
        except _MALFORMED as error:
            raise CheckpointError(f"{tensor_file}: not tensors of a checkpoint ({error!r})") from error
