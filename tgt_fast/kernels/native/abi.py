"""Calls as the compiled core takes them: the bytes of its structs, packed in the order of their fields.

The fields of a struct are written once here and once in C++ (csrc/common, named by csrc/bind/layout.h); before a first
call is packed, sizes, kinds and places of both are compared.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import BackendError
from tgt_fast.kernels.native import DTYPES
from tgt_fast.kernels.options import DIVERGENCES, REDUCTIONS, TAILS, DistillOptions, TopK

# A field's kind is a letter of struct.Struct, or another struct.
STRUCTS: Final = {
    "DistillOptions": "divergence:i reduction:i beta:d temperature:d teacher_temperature:d soft_weight:d hard_weight:d "
    "label_smoothing:d ignore_index:q unlabeled_index:q",
    "Matrix": "data:P stride:q type:i",
    "DistillCall": "options:DistillOptions rows:q classes:q student:Matrix teacher:Matrix target:P soft_target:Matrix "
    "weight:P divisor:d divisor_at:P workspace:P loss:P row_loss:P d_student:Matrix d_teacher:Matrix row_state:P "
    "stats:P upstream:P upstream_per_row:? bad_row:P",
    "Adjustments": "student_bias:Matrix teacher_bias:Matrix label_margin:P student_temperature:P teacher_temperature:P "
    "of_label:d of_others:d skew:d lead:d standardize:?",
    "AdjustedCall": "base:DistillCall adjust:Adjustments",
    "ScaleCall": "rows:q classes:q grad:Matrix factor:P factor_per_row:?",
    "TopK": "ids:P id_stride:q entries:q log_probs:Matrix tail_log_prob:Matrix form:i",
    "TopKCall": "base:DistillCall topk:TopK row_state:P",
    "NoiseKey": "seed:Q ids:P step:I replica:I op:I truncation:d",
    "Factor": "value:d values:P",
    "PerturbCall": "samples:q size:q type:i z:P out:P sigma:Factor scale:P noise:NoiseKey sphere_radius:d",
    "AscendCall": "samples:q size:q z_type:i grad_type:i anchor_type:i z:P grad:P anchor:P out:P step_size:Factor "
    "sigma:Factor radius:Factor scale:P norm:i radius_norm:i noise:NoiseKey",
    "SampleCall": "rows:q classes:q positions:q logits:Matrix temperature:d top_k:q top_p:d log_min_p:d noise:NoiseKey "
    "tokens:P",
    "SoftCall": "first:q rows:q classes:q positions:q is_fp64:? logits:Matrix tau:d gumbel:? noise:NoiseKey largest:P "
    "sum:P weights:P chosen:P slope:P d_logits:Matrix",
    "ListwiseCall": "rows:q classes:q student:Matrix teacher:Matrix temperature:d ids:P id_stride:q entries:q others:P "
    "label:P factor:P loss:P d_student:Matrix",
}


def fields(name: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, letter) of each number of a struct, and ("", "0q") where one ends: all are aligned to 8 bytes."""
    for field in STRUCTS[name].split():
        part, kind = field.split(":")
        if kind in STRUCTS:
            yield from fields(kind, f"{prefix}{part}.")
        else:
            yield prefix + part, kind
    yield "", "0q"


@functools.cache
def packer(core: Any, name: str) -> Callable[..., bytes]:
    """Makes the bytes of a struct of its numbers, for a core that has the same one.

    Raises:
        BackendError: it has another one.
    """
    letters, digest = "@", ""
    for field, letter in fields(name):
        letters += letter
        if field:
            digest += f"; {field} {letter} {struct.calcsize(letters) - struct.calcsize(letter)}"
    made = struct.Struct(letters)
    if core.LAYOUTS.get(name) != f"{made.size}{digest}":
        raise BackendError(f"{core.__name__} takes another {name} than this tgt_fast packs; reinstall tgt-fast")
    return made.pack


@functools.lru_cache(maxsize=256)
def option_values(options: DistillOptions) -> tuple[Any, ...]:
    """The fields of DistillOptions."""
    return (
        DIVERGENCES.index(options.divergence), REDUCTIONS.index(options.reduction), options.beta, options.temperature,
        options.teacher_temperature, options.soft_weight, options.hard_weight, options.label_smoothing,
        options.ignore_index, options.unlabeled_index,
    )  # fmt: skip


def topk_values(topk: TopK) -> tuple[Any, ...]:
    """The fields of TopK."""
    ids, tail = topk.ids, topk.tail_log_prob
    rest = (0, 0, 0) if tail is None else (tail.data_ptr(), 1, DTYPES[tail.dtype])
    form = TAILS.index(topk.tail_mode)
    return ids.data_ptr(), ids.stride(0), ids.shape[1], *matrix(topk.log_probs), *rest, form


def split_divisor(divisor: float | Tensor | None, on_device: bool) -> tuple[Tensor | None, float]:
    """A divisor that is read on the device, and as a number: -1 where it is read there, or what counts is counted."""
    if on_device and isinstance(divisor, Tensor):
        return divisor.detach().to(torch.float64), -1.0
    return None, -1.0 if divisor is None else float(divisor)


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's data; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    """The fields of Matrix, of a matrix with dense rows; zeros for none."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype])
