"""Checkpoints without pickle: one safetensors file, and one JSON file that names it by its hash.

In a checkpoint folder::

    checkpoint.json                      structure and numbers; replacing it makes a checkpoint valid
    checkpoint-<16 digits>.safetensors   every tensor of that checkpoint; the digits begin its SHA-256

A new checkpoint's tensors are written beside the old ones, then ``checkpoint.json`` is replaced in one
rename, then the old tensors are removed: a process killed at any moment leaves a whole checkpoint, the old or
the new.

Of the processes of a distributed :func:`tgt_fast.fit` each writes a tensor file with what differs from the first one's;
``checkpoint.json``, which the first one writes, names them all. What FSDP2 shards is in ``checkpoint-<16 digits>.dcp``,
a folder of ``torch.distributed.checkpoint``, to which each process writes its shards; PyTorch keeps its index pickled,
and the hashes of its files are in ``checkpoint.json``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tgt_fast._files import remove_dead
from tgt_fast._opening import as_path
from tgt_fast._rng import get_rng_state, set_rng_state
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.train import sharded
from tgt_fast.train.codec import decode, encode, sharded_forms
from tgt_fast.train.document import (
    MALFORMED,
    MANIFEST,
    Entry,
    canonical,
    hashes,
    read,
    remove_unnamed,
    write_document,
    write_entry,
)
from tgt_fast.train.files import make_writable, replace_file, write_tensors
from tgt_fast.train.names import under_names_of, under_own_names
from tgt_fast.train.processes import ALONE, Processes

_SHOWN = 5  # how many differing names an error lists


class Stateful(Protocol):
    """Anything with ``state_dict`` and ``load_state_dict``: an optimizer, a schedule, a sampler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


Parts = Mapping[str, Stateful | None]


@dataclass(frozen=True)
class Checkpoint:
    """The rest that :func:`load_checkpoint` hands back beside the objects that it filled."""

    step: int
    extra: Any  # as given to save_checkpoint


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """True if ``directory`` holds a checkpoint, be it a good one or not."""
    return os.path.exists(Path(directory) / MANIFEST)


def save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    student: nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    sampler: Stateful | None = None,
    data: Stateful | None = None,
    objective: Stateful | None = None,
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
        objective: what keeps a state of its own, a :class:`TGTObjective` with ``terms``.
        step: the number of optimizer steps taken.
        extra: anything else of such values.

    Returns:
        The path of ``checkpoint.json``.

    Raises:
        ArgumentError: ``step`` is no integer >= 0.
        CheckpointError: a state cannot be stored without pickle, or the folder cannot be written (full,
            read-only). The previous checkpoint in the folder is then intact.
    """
    parts = {
        "data": data, "sampler": sampler, "scheduler": scheduler, "optimizer": optimizer, "objective": objective
    }  # fmt: skip
    return save_together(ALONE, as_path("save_checkpoint", "directory", directory), student, parts, step, extra)


def save_together(processes: Processes, folder: Path, student: nn.Module, parts: Parts, step: int, extra: Any) -> Path:
    """:func:`save_checkpoint` for processes that share a folder: all of them call it, or none."""
    _check_parts("save_checkpoint", student, parts)
    state: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    shards: dict[str, Tensor] = {}
    note: dict[str, Any] | None = None

    def prepare() -> dict[str, str]:
        nonlocal state, tensors, shards
        state, tensors = _encode_all(student, parts, step, extra)
        shards = {name: tensors.pop(name) for name in list(tensors) if sharded.is_sharded(tensors[name])}
        make_writable(folder)
        return hashes(tensors) if processes.first and processes.count > 1 else {}

    def write() -> Entry:
        mine: Mapping[str, Tensor] = tensors
        if not processes.first:
            mine = {name: tensors[name] for name, digest in hashes(tensors).items() if common.get(name) != digest}
        return write_entry(folder, state, mine)

    def name_them() -> None:
        if processes.first:
            try:
                write_document(folder, entries, note)
            finally:
                remove_unnamed(folder)

    common = processes.together(prepare)[0]
    try:
        if shards:
            note = sharded.write(processes, folder, shards)
        entries = processes.together(write)
        processes.together(name_them)
    except BaseException:
        if processes.first:
            remove_unnamed(folder)
        raise
    return folder / MANIFEST


def load_checkpoint(
    directory: str | os.PathLike[str],
    *,
    student: nn.Module,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    sampler: Stateful | None = None,
    data: Stateful | None = None,
    objective: Stateful | None = None,
    check: Callable[[Checkpoint], None] | None = None,
) -> Checkpoint:
    """Fill the objects of a run from the checkpoint in ``directory``: all of them, or none.

    Hashes, names, shapes, dtypes and the kinds of the objects are checked before anything is touched; if an
    object still refuses its state, those already filled are put back. The global random number generators are
    set as well.

    Args:
        directory: a folder written by :func:`save_checkpoint`.
        student, optimizer, scheduler, sampler, data, objective: built as for the run that saved; None where that run
            had None.
        check: given what will be returned, raises a CheckpointError where your run cannot go on from it.

    Returns:
        The step and ``extra``.

    Raises:
        CheckpointError: no checkpoint, a damaged or foreign one, or one of another student, optimizer,
            schedule, sampler or loader. The message names the file and what differs, and nothing was changed.
    """
    # The data first, since finding its place may move the global generators, which are set last.
    parts = {
        "data": data, "sampler": sampler, "scheduler": scheduler, "optimizer": optimizer, "objective": objective
    }  # fmt: skip
    return load_together(ALONE, as_path("load_checkpoint", "directory", directory), student, parts, check)


def checkpoint_weights(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The student's last ``state_dict`` in a checkpoint of any number of processes, on the CPU, whole.

    What a run on another number of processes can start from: ``student.load_state_dict(...)``, before ``fully_shard``.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
    """
    folder = as_path("checkpoint_weights", "directory", directory)
    state, tensors, note = read(folder, 0, None)
    try:
        if forms := sharded_forms(state["student"]):
            tensors |= sharded.read(ALONE, folder, note, forms, None)
        return dict(decode(state["student"], tensors))
    except MALFORMED as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a training state of tgt_fast ({error!r})") from error


def load_together(
    processes: Processes,
    folder: Path,
    student: nn.Module,
    parts: Parts,
    check: Callable[[Checkpoint], None] | None,
) -> Checkpoint:
    """:func:`load_checkpoint` for processes that share a folder: where one cannot, nothing is changed in any."""
    _check_parts("load_checkpoint", student, parts)
    manifest = folder / MANIFEST
    stored: list[tuple[dict[str, Any], dict[str, Tensor], Any]] = []
    processes.together(lambda: stored.append(read(folder, processes.rank, processes.count)))
    ((state, tensors, note),) = stored
    if forms := sharded_forms(state):
        tensors |= sharded.read(processes, folder, note, forms, student)
    found: list[tuple[Checkpoint, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    processes.together(lambda: found.append(_checked(manifest, state, tensors, student, parts, check)))
    ((checkpoint, weights, rng, states),) = found

    undo = [_restorer(set_rng_state, get_rng_state())]

    def fill() -> None:
        for name, part in parts.items():
            if part is not None:
                undo.append(_restorer(part.load_state_dict, part.state_dict()))
                part.load_state_dict(states[name])
        undo.append(_restorer(student.load_state_dict, student.state_dict()))
        student.load_state_dict(weights)
        set_rng_state(rng)

    try:
        processes.together(fill)
    except BaseException as error:
        for restore in reversed(undo):
            restore()
        if not isinstance(error, Exception):  # an interruption
            raise
        raise CheckpointError(f"{manifest}: its state was refused ({error}); nothing was changed") from error
    return checkpoint


def _checked(
    manifest: Path,
    state: dict[str, Any],
    tensors: Mapping[str, Tensor],
    student: nn.Module,
    parts: Parts,
    check: Callable[[Checkpoint], None] | None,
) -> tuple[Checkpoint, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The values to return, weights, generators and the states of the parts, of a checkpoint that fits them."""
    try:
        weights = under_names_of(student.state_dict(), decode(state["student"], tensors))
        rng = decode(state["rng"], tensors)
        checkpoint = Checkpoint(_steps(state["step"]), decode(state["extra"], tensors))
        # Checkpoints from before objectives had a state hold none.
        saved = {"objective": None, **state}
        states = {name: _decode_part(name, part, saved[name], tensors) for name, part in parts.items()}
        _check_student(student, weights)
        if parts["optimizer"] is not None:
            _check_optimizer(parts["optimizer"], states["optimizer"])
        if check is not None:
            check(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{manifest}: {error}") from None
    except MALFORMED as error:
        raise CheckpointError(f"{manifest}: not a training state of tgt_fast ({error!r})") from error
    return checkpoint, weights, rng, states


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Write a ``state_dict`` as one safetensors file under its own names, replacing ``path`` in one rename.

    ``module.load_state_dict(safetensors.torch.load_file(path))`` loads it again, strictly.

    Raises:
        CheckpointError: an entry is not a tensor, or the file cannot be written; an older file is then
            intact.
    """
    path = as_path("save_weights", "path", path)
    if not isinstance(weights, Mapping):
        raise ArgumentError(f"save_weights: weights must be a state_dict, got {type(weights).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}; a weights file takes tensors only")
        encode(value, name, tensors)
    remove_dead(path.parent)
    replace_file(path, lambda file: write_tensors(file, tensors))


# ---- the parts ----


def _check_parts(op: str, student: Any, parts: Parts) -> None:
    if not isinstance(student, nn.Module):
        raise ArgumentError(f"{op}: student must be a torch.nn.Module, got {type(student).__name__}")
    for name, part in parts.items():
        stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict") and not isinstance(part, type)
        if part is not None and not stateful:
            raise ArgumentError(f"{op}: {name} must have state_dict and load_state_dict, got {type(part).__name__}")


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
        canonical(state)
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
