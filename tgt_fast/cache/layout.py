"""The parts of a row of a cache, and the way between tensors and rows of bytes."""

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

from tgt_fast.cache.keys import KINDS, SAMPLES, Keys
from tgt_fast.errors import CacheError, DTypeError

Bytes = NDArray[np.uint8]  # [rows, bytes of a row]: of any dtype, also of those that numpy does not have
Rows = dict[str, Bytes]  # by the name of the block
CLASS_IDS: Final = "class_ids"  # a field of records

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
class Block:
    """Fields that are read together, and so lie together: a sample is in one place, and not in one a field.

    A field alone is a tensor of its own dtype and shape. Several are a row of bytes: the fields with the widest numbers
    first, filled up with zeros to a multiple of those.
    """

    fields: Mapping[str, Field]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Offsets of the fields in a row."""
        found, at = {}, 0
        for name in sorted(self.fields, key=lambda n: (-self.fields[n].dtype.itemsize, n)):
            found[name] = at
            at += self.fields[name].row_bytes
        return found

    @cached_property
    def stored(self) -> Field:
        """As what a row is stored."""
        if len(self.fields) == 1:
            return next(iter(self.fields.values()))
        widest = max(field.dtype.itemsize for field in self.fields.values())
        used = sum(field.row_bytes for field in self.fields.values())
        return Field(torch.uint8, (-(-used // widest) * widest,))

    def pack(self, tensors: Mapping[str, Tensor]) -> Bytes:
        """Samples, each field [n, ...] -> their bytes, on the host."""
        raw = {}
        for name, field in self.fields.items():
            x = tensors[name].detach().to("cpu").contiguous()
            raw[name] = x.reshape(-1).view(torch.uint8).numpy().reshape(x.shape[0], field.row_bytes)
        if len(raw) == 1:
            return next(iter(raw.values()))
        rows = np.zeros((len(next(iter(raw.values()))), self.stored.row_bytes), np.uint8)
        for name, start in self.offsets.items():
            rows[:, start : start + raw[name].shape[1]] = raw[name]
        return rows

    def unpack(self, rows: Bytes, *, widen: bool) -> dict[str, Tensor]:
        """Bytes, which become a tensor's own memory where there is one field and they may be written to; else copies.

        By numpy, which starts no threads. ``widen``: class ids stored as int32 come as int64, in the same copy.
        """
        found, count = {}, len(rows)
        for name, start in self.offsets.items():
            field = self.fields[name]
            raw = rows[:, start : start + field.row_bytes]
            if widen and name == CLASS_IDS and field.dtype == torch.int32:
                found[name] = torch.from_numpy(raw.view(np.int32).astype(np.int64)).view(count, *field.shape)
            else:
                own = raw if len(self.fields) == 1 and rows.flags.writeable else raw.copy()
                found[name] = torch.from_numpy(own.reshape(-1)).view(field.dtype).view(count, *field.shape)
        return found


def _kind(name: str) -> str:
    """Of a field: of latents, of data, or of what the teacher said."""
    if name.startswith("latents"):
        return "latents"
    return "x" if name == "x" or name.startswith("x.") else ""


@dataclass(frozen=True)
class Layout:
    """The fields of every sample of a cache, the number of classes that its logits had, and how rows are told apart."""

    fields: Mapping[str, Field]
    classes: int
    keys: Keys = SAMPLES
    tree: str = ""  # of data that is no tensor: a pytree's structure, whose leaves the fields of data are

    @cached_property
    def row_bytes(self) -> int:
        return sum(block.stored.row_bytes for block in self.blocks.values())

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """By the name of the tensor in a shard: that of the field, where it is alone."""
        found = {}
        for together, kind in (("labels", ""), ("latents_with_mask", "latents"), ("data", "x")):
            fields = {name: field for name, field in self.fields.items() if _kind(name) == kind}
            if fields:
                found[together if len(fields) > 1 else next(iter(fields))] = Block(fields)
        return found

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor], classes: int, *, op: str = "TeacherCache", keys: Keys = SAMPLES, tree: str = ""
    ) -> Layout:
        """That of some samples.

        Raises:
            DTypeError: a dtype that has no name in a file.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in NAMES:
                raise DTypeError(f"{op}: {name} of dtype {tensor.dtype} cannot be stored")
        fields = {name: Field(x.dtype, tuple(x.shape[1:])) for name, x in sorted(tensors.items())}
        return Layout(fields, classes, keys, tree)

    def difference(self, other: Layout) -> str:
        """The difference of another, in words; empty where there is none."""
        found = [] if self.classes == other.classes else [f"classes: {self.classes} and {other.classes}"]
        for name in sorted({*self.fields, *other.fields}):
            one, two = self.fields.get(name), other.fields.get(name)
            if one != two:
                found.append(f"{name}: {one or 'none'} and {two or 'none'}")
        if self.tree != other.tree:
            found.append("the structure of x")
        return "; ".join(found)

    def pack(self, tensors: Mapping[str, Tensor]) -> Rows:
        """Samples, each field [n, ...] -> their bytes, on the host."""
        return {name: block.pack(tensors) for name, block in self.blocks.items()}

    def unpack(self, rows: Rows, *, widen: bool = False) -> dict[str, Tensor]:
        """The fields of the blocks that are given. ``widen``: class ids as int64."""
        blocks = self.blocks
        return {name: x for block, raw in rows.items() for name, x in blocks[block].unpack(raw, widen=widen).items()}

    def empty(self, count: int, names: Collection[str] | None = None) -> Rows:
        """Rows of these blocks, or of all, to be written to."""
        names = self.blocks if names is None else names
        return {name: np.empty((count, self.blocks[name].stored.row_bytes), np.uint8) for name in names}

    @cached_property
    def _holding(self) -> dict[tuple[str, ...], list[str]]:
        return {}

    def holding(self, fields: tuple[str, ...]) -> list[str]:
        """The names of the blocks with these fields, of which not all need be there."""
        if fields not in self._holding:
            self._holding[fields] = [
                n for n, block in self.blocks.items() if not block.fields.keys().isdisjoint(fields)
            ]
        return self._holding[fields]

    def to_json(self) -> dict[str, Any]:
        fields = {name: {"dtype": NAMES[x.dtype], "shape": list(x.shape)} for name, x in self.fields.items()}
        # Where they begin in a row of several, for other readers of the files; here it follows from the fields.
        rows = {name: block.offsets for name, block in self.blocks.items() if len(block.fields) > 1}
        found = {"classes": self.classes, "fields": fields, "offsets": rows}
        if self.keys != SAMPLES:
            found["keys"] = list(self.keys.columns)
        if self.tree:
            found["tree"] = self.tree
        return found

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
            columns = tuple(found.get("keys", SAMPLES.columns))
            keys = next((kind for kind in KINDS if kind.columns == columns), None)
            if keys is None:
                raise ValueError(f"rows with the keys {columns}")
            return Layout(fields, int(found["classes"]), keys, str(found.get("tree", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(f"a manifest without a readable layout: {error!r}") from error
