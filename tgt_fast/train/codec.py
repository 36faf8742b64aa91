"""Nested Python state <-> plain JSON plus a flat dict of tensors: how a checkpoint does without pickle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgt_fast.errors import CheckpointError
from tgt_fast.train.sharded import form, is_sharded

# JSON knows lists, and objects with string keys. Anything else is an object of one key, one of these tags.
_TENSOR, _TUPLE, _DICT, _COUNTER, _FLOAT = "tensor", "tuple", "dict", "counter", "float"
_SHARDED = "sharded"


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``decode(encode(value, path, tensors), tensors) == value``, for state of numbers, strings and tensors.

    Args:
        value: None, bool, int, float, str, tensors, numpy scalars; lists, tuples, dicts and Counters of them.
        path: where ``value`` sits, such as ``"optimizer/state"``: the prefix of its tensors' names.
        tensors: receives every tensor: detached, on the CPU, contiguous, sharing no memory with the original.

    Returns:
        What ``json.dumps(..., allow_nan=False)`` takes.

    Raises:
        CheckpointError: something else is in there (a function, an object); the message names place and type.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int:
        return value
    if isinstance(value, float):
        # repr round-trips every finite double exactly; JSON has no word for the others.
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Tensor):
        name = _unused(path, tensors)
        if is_sharded(value):  # stays as it is; whoever writes the others leaves it to what knows its processes
            tensors[name] = value.detach()
            return {_SHARDED: [name, *form(value)]}
        tensors[name] = _portable(value, path)
        return {_TENSOR: name}
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        tag = _COUNTER if isinstance(value, Counter) else _DICT
        return {tag: [[_key(k, path), encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    raise CheckpointError(
        f"{path} holds a {type(value).__module__}.{type(value).__qualname__}: a checkpoint, which is never "
        "pickled, takes tensors, numbers, strings and lists, tuples and dicts of them"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`encode`. Each tensor is a copy with memory of its own.

    Raises:
        CheckpointError: ``value`` was not made by ``encode``, or one of its tensors is missing.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        tag, content = next(iter(value.items()))
        if tag == _TENSOR:
            if content not in tensors:
                raise CheckpointError(f"its tensor {content!r} is missing")
            return tensors[content].clone()
        if tag == _SHARDED:
            if content[0] not in tensors:
                raise CheckpointError(f"its tensor {content[0]!r} is missing")
            return tensors[content[0]].clone()
        if tag == _FLOAT:
            return float(content)
        if tag == _TUPLE:
            return tuple(decode(item, tensors) for item in content)
        if tag in (_DICT, _COUNTER):
            items = {key: decode(item, tensors) for key, item in content}
            return Counter(items) if tag == _COUNTER else items
    raise CheckpointError(f"it holds an entry of unknown form: {str(value)[:80]!r}")


def sharded_forms(value: Any) -> dict[str, Any]:
    """Of what :func:`encode` returned: the sharded tensors in it, by name, and their forms."""
    found: dict[str, Any] = {}
    if isinstance(value, list):
        for item in value:
            found.update(sharded_forms(item))
    elif isinstance(value, dict):
        for tag, content in value.items():
            found.update(
                {content[0]: content[1:]} if tag == _SHARDED and isinstance(content, list) else sharded_forms(content)
            )
    return found


def _key(key: Any, path: str) -> Any:
    if key is None or isinstance(key, (bool, int, str)):
        return key
    raise CheckpointError(f"{path} has a key of type {type(key).__name__}; a checkpoint takes strings and integers")


def _unused(name: str, tensors: Mapping[str, Tensor]) -> str:
    while name in tensors:  # a dict may hold both 1 and "1"
        name += "_"
    return name


def _portable(tensor: Tensor, path: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"{path} is a {tensor.layout} tensor on {tensor.device}; a checkpoint takes dense ones with data"
        )
    return tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True).contiguous()
