"""Values that are what they look like, and the bytes of tensors and arrays."""

from __future__ import annotations

import datetime
import decimal
import fractions
import json
import re
import uuid
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tgt_fast.errors import DTypeError

_BUILT_IN: Final = (bool, int, float, complex, str, bytes, bytearray)
_PRINTED: Final = (
    type(None),
    type(...),
    type(NotImplemented),
    range,
    slice,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.Size,
    np.generic,
    np.dtype,
    PurePath,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
)
_PIECE: Final = 16 << 20  # elements brought to the host at a time
_DEEPEST: Final = 8  # levels of containers that together are one value


def plain(thing: Any, depth: int = 0) -> str | None:
    """A value with its type in words, the same in every process; None where it is more than a value.

    Tuples, lists, sets and frozen sets of values are values: equal ones are equal, be they one object or two. So are
    devices: what is computed does not depend on where, and each process of several may have one of its own.
    """
    if isinstance(thing, Enum):
        held = plain(thing.value)  # of a member that is a function, the name says which
        return f"{type(thing).__qualname__}.{thing.name} {held or ''}"
    for kind in _BUILT_IN:
        if isinstance(thing, kind):
            return f"{type(thing).__qualname__} {kind.__repr__(thing)}"
    if isinstance(thing, _PRINTED):
        return f"{type(thing).__qualname__} {thing!r}"
    if isinstance(thing, re.Pattern):  # which prints its beginning
        return f"pattern {thing.pattern!r} {thing.flags}"
    if isinstance(thing, torch.device):
        return "device"
    if isinstance(thing, torch.Generator):  # its state moves with each draw
        return f"generator {thing.initial_seed()}"
    if type(thing) in (tuple, list, set, frozenset) and depth < _DEEPEST:
        parts = [plain(value, depth + 1) for value in thing]
        if None not in parts:
            found = [str(part) for part in parts]
            return f"{type(thing).__qualname__} {sorted(found) if isinstance(thing, (set, frozenset)) else found}"
    return None


def parts_of_tensor(tensor: Tensor) -> Iterator[tuple[str, Any]] | None:
    """The tensors and the context that a tensor consists of; None where it holds its numbers itself."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return iter([("context", context), *((name, getattr(tensor, name)) for name in names)])
    if tensor.is_mkldnn:
        return iter([("dense", tensor.detach().to_dense())])
    if tensor.is_nested:
        return ((str(i), part) for i, part in enumerate(tensor.detach().unbind()))
    if tensor.layout == torch.sparse_coo:
        whole = tensor.detach().coalesce()
        return iter([("indices", whole.indices()), ("values", whole.values())])
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        whole = tensor.detach()
        return iter([("rows", whole.crow_indices()), ("columns", whole.col_indices()), ("values", whole.values())])
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        whole = tensor.detach()
        return iter([("columns", whole.ccol_indices()), ("rows", whole.row_indices()), ("values", whole.values())])
    return None


def refuse_unusable(path: str, tensor: Tensor) -> None:
    """
    Raises:
        DTypeError: of a tensor's numbers this process holds a part, or there are none yet.
    """
    if type(tensor).__name__ == "DTensor":
        raise DTypeError(
            f"teacher_fingerprint: {path} is a DTensor, of which a process holds a part; name the teacher by "
            "version= and give no teacher, or take the fingerprint before it is sharded"
        )
    if is_lazy(tensor):
        raise DTypeError(
            f"teacher_fingerprint: {path} holds no numbers (its lazy module has met no batch yet); take the "
            "fingerprint after a first batch"
        )


def tensor_bytes(path: str, tensor: Tensor) -> Iterator[Any]:
    """Buffers that together tell a tensor's numbers.

    Raises:
        DTypeError: it holds none.
    """
    tensor = tensor.detach()
    lacks = tensor.device.type == "meta" or (tensor.numel() and not tensor.untyped_storage().nbytes())
    if lacks:
        raise DTypeError(
            f"teacher_fingerprint: {path} holds no numbers (it is on the meta device, or its storage was freed, as "
            "offloading does); take the fingerprint where they are loaded"
        )
    yield f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    if tensor.is_quantized:
        yield _quantization(tensor).encode()
        tensor = tensor.int_repr()
    if tensor._is_zerotensor():  # which has no memory, either
        tensor = tensor.clone()
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        yield piece.to("cpu").contiguous().view(torch.uint8).numpy().data


def array_bytes(array: np.ndarray[Any, Any]) -> Iterator[Any]:
    """As of a tensor; of an array without Python objects in it."""
    yield f"numpy {array.dtype.descr if array.dtype.names else array.dtype.str} {array.shape} ".encode()
    yield np.ascontiguousarray(array).tobytes()


def tokenizer_state(tokenizer: Any) -> str:
    """Of one written in Rust, without the padding and truncation that the last call asked for."""
    found = json.loads(tokenizer.to_str())
    return json.dumps({key: found[key] for key in sorted(found) if key not in ("padding", "truncation")})


def refuse_sharded(path: str, module: nn.Module) -> None:
    """
    Raises:
        DTypeError: its weights are shards that look like whole tensors.
    """
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
        raise DTypeError(
            f"teacher_fingerprint: {path} is sharded, and a process holds a part of its weights; name the teacher by "
            "version= and give no teacher, or take the fingerprint before it is sharded"
        )


def _quantization(tensor: Tensor) -> str:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return f"{tensor.qscheme()} {tensor.q_scale()!r} {tensor.q_zero_point()} "
    scales, zeros = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
    return f"{tensor.qscheme()} {scales} {zeros} {tensor.q_per_channel_axis()} "
