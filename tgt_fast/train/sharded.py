"""Tensors that FSDP2 spreads over processes: kept in a checkpoint by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast.errors import CheckpointError
from tgt_fast.train.processes import Processes

_FOLDER: Final = re.compile("checkpoint-[0-9a-f]{16}.dcp")
_PATTERN: Final = "checkpoint-*.dcp"


def is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def gathered(weights: Mapping[str, Any], wanted: bool) -> dict[str, Any] | None:
    """The whole of each, on the CPU, in the process that wants them. All processes call this."""
    if not any(is_sharded(value) for value in weights.values()):
        return dict(weights) if wanted else None
    found: dict[str, Any] = {}
    for name, value in weights.items():
        whole = value.full_tensor() if is_sharded(value) else value  # one at a time is in memory
        if wanted:
            found[name] = whole.to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    return found if wanted else None


def take_whole_weights(model: nn.Module) -> None:
    """``load_state_dict`` of a sharded model takes whole tensors from now on, too: a weights file fits any number."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        hooks = [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]
        if not any(isinstance(hook, _Share) for hook in hooks):
            model._register_load_state_dict_pre_hook(_Share(model))  # type: ignore[no-untyped-call]


class _Share:
    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        from torch.distributed.tensor import distribute_tensor

        parameter: Any
        for name, parameter in self._model.named_parameters():
            value = state.get(prefix + name)
            if is_sharded(parameter) and isinstance(value, Tensor) and not is_sharded(value):
                value = value.to(parameter.device)
                state[prefix + name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)

    def __deepcopy__(self, memo: Any) -> _Share:
        return self  # of a model that cannot be copied


def form(value: Any) -> list[Any]:
    """A sharded tensor in a checkpoint's document: dtype, shape and, by mesh dimension, what is split."""
    placements = [getattr(placement, "dim", None) for placement in value.placements]
    return [str(value.dtype).removeprefix("torch."), list(value.shape), placements]


def write(processes: Processes, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write each process's shards into a folder of their own; what the document says of it."""
    from torch.distributed import checkpoint as dcp

    name = f"checkpoint-{processes.together(lambda: secrets.token_hex(8))[0]}.dcp"
    try:
        with _quiet():
            dcp.save(dict(tensors), checkpoint_id=folder / name)  # type: ignore[attr-defined]
    except Exception as error:  # every process raises it
        raise CheckpointError(f"cannot write {folder / name}: {error}") from error
    own = processes.together(lambda: _hashes(folder / name, processes))
    return {"folder": name, "files": {file: digest for of_process in own for file, digest in of_process.items()}}


def _hashes(folder: Path, processes: Processes) -> dict[str, str]:
    """Of the files that this process is to look after."""
    names = sorted(path.name for path in folder.iterdir())
    return {name: _sha256(folder / name) for name in names[processes.rank :: processes.count]}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read(
    processes: Processes, folder: Path, note: Any, forms: Mapping[str, Any], student: nn.Module | None
) -> dict[str, Tensor]:
    """The tensors of these forms: sharded as the student's parameters are, or whole without a student.

    Raises:
        CheckpointError: files are missing or altered, or the student is not sharded.
    """
    from torch.distributed import checkpoint as dcp

    made: list[tuple[Path, dict[str, Tensor]]] = []
    processes.together(lambda: made.append(_prepared(processes, folder, note, forms, student)))
    ((place, tensors),) = made
    try:
        with _quiet():
            dcp.load(tensors, checkpoint_id=place, no_dist=student is None)  # type: ignore[attr-defined]
    except Exception as error:
        raise CheckpointError(f"cannot read {place}: {error}") from error
    return tensors


def _prepared(
    processes: Processes, folder: Path, note: Any, forms: Mapping[str, Any], student: nn.Module | None
) -> tuple[Path, dict[str, Tensor]]:
    """Places of the tensors, after a look at this process's part of the files; and tensors to read into."""
    if not isinstance(note, dict) or not _FOLDER.fullmatch(str(note.get("folder"))):
        raise CheckpointError(f"{folder}: damaged (it has sharded tensors, and does not say where)")
    place = folder / note["folder"]
    for name in sorted(note["files"])[processes.rank :: processes.count]:
        try:
            intact = _sha256(place / Path(name).name) == note["files"][name]
        except OSError as error:
            raise CheckpointError(f"cannot read {place / name}: {error.strerror}") from error
        if not intact:
            raise CheckpointError(f"{place / name}: damaged (truncated or altered: its hash does not match)")
    meshes = {} if student is None else _meshes(student)
    return place, {name: _empty(name, one, meshes, student is None) for name, one in forms.items()}


def _meshes(student: nn.Module) -> dict[int, Any]:
    """By its number of dimensions."""
    found: list[Any] = [parameter for parameter in student.parameters() if is_sharded(parameter)]
    return {parameter.device_mesh.ndim: parameter.device_mesh for parameter in found}


def _empty(name: str, one: Any, meshes: Mapping[int, Any], whole: bool) -> Tensor:
    dtype, shape, placements = one
    if whole:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    from torch.distributed.tensor import Replicate, Shard, empty

    if len(placements) not in meshes:
        raise CheckpointError(
            f"its {name} is sharded over processes, and the student is not: call fully_shard as for the run that "
            "was saved"
        )
    split = [Replicate() if dim is None else Shard(dim) for dim in placements]
    made: Tensor = empty(*shape, dtype=getattr(torch, dtype), device_mesh=meshes[len(placements)], placements=split)
    return made


def remove_unnamed(folder: Path, named: str | None) -> None:
    for path in folder.glob(_PATTERN):
        if path.name != named and _FOLDER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the folder's not being on a shared disk, and of what torch has deprecated
        yield
