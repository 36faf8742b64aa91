"""What a row of a cache consists of, and the way between tensors and rows of bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgt_fast.errors import CacheError, DTypeError

Bytes = NDArray[np.uint8]  # [rows, bytes of a row]: of any dtype, also of those that numpy does not have
Rows = dict[str, Bytes]  # by the name of the field

# The names that safetensors gives to dtypes
NAMES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES: Final = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Field:
    """One tensor of a sample."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of one sample

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


@dataclass(frozen=True)
class Layout:
    """The fields of every sample of a cache, and the number of classes that its logits had."""

    fields: Mapping[str, Field]
    classes: int

    @cached_property
    def row_bytes(self) -> int:
        return sum(field.row_bytes for field in self.fields.values())

    @staticmethod
    def of(tensors: Mapping[str, Tensor], classes: int) -> Layout:
        """That of some samples.

        Raises:
            DTypeError: a dtype that has no name in a file.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in NAMES:
                raise DTypeError(f"TeacherCache: {name} of dtype {tensor.dtype} cannot be stored")
        return Layout({name: Field(x.dtype, tuple(x.shape[1:])) for name, x in sorted(tensors.items())}, classes)

    def difference(self, other: Layout) -> str:
        """Where another differs, in words; empty where it does not."""
        found = [] if self.classes == other.classes else [f"classes: {self.classes} and {other.classes}"]
        for name in sorted({*self.fields, *other.fields}):
            one, two = self.fields.get(name), other.fields.get(name)
            if one != two:
                found.append(f"{name}: {one or 'none'} and {two or 'none'}")
        return "; ".join(found)

    def pack(self, tensors: Mapping[str, Tensor]) -> Rows:
        """Samples, each field [n, ...] -> their bytes, on the host."""
        rows: Rows = {}
        for name, field in self.fields.items():
            x = tensors[name].detach().to("cpu").contiguous()
            flat = x.reshape(x.shape[0], math.prod(field.shape)).view(torch.uint8)
            rows[name] = flat.numpy()
        return rows

    def unpack(self, rows: Rows) -> dict[str, Tensor]:
        """Bytes, which become the tensors' own memory."""
        return {
            name: torch.from_numpy(raw).view(self.fields[name].dtype).reshape(raw.shape[0], *self.fields[name].shape)
            for name, raw in rows.items()
        }

    def empty(self, count: int, names: Collection[str] | None = None) -> Rows:
        """Rows of these fields, or of all, to be written to."""
        names = self.fields if names is None else names
        return {name: np.empty((count, self.fields[name].row_bytes), np.uint8) for name in names}

    def to_json(self) -> dict[str, Any]:
        fields = {name: {"dtype": NAMES[x.dtype], "shape": list(x.shape)} for name, x in self.fields.items()}
        return {"classes": self.classes, "fields": fields}

    @staticmethod
    def from_json(found: Any) -> Layout:
        """
        Raises:
            CacheError: it is none.
        """
        try:
            fields = {
                str(name): Field(DTYPES[x["dtype"]], tuple(int(n) for n in x["shape"]))
                for name, x in sorted(found["fields"].items())
            }
            return Layout(fields, int(found["classes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(f"a manifest without a readable layout: {error!r}") from error
