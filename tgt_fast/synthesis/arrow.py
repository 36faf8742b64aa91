"""Between the fields of rows and the columns of a Parquet file."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tgt_fast._optional import optional
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.index import Ids
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Field, Layout

METADATA: Final = b"tgt_fast"
FORMAT: Final = "1"
_KEYS: Final = dict(zip(SYNTHETIC.columns, ("int64", "int32", "int32"), strict=True))
_HALF: Final = (torch.bfloat16, torch.float16)  # Arrow has no bfloat16, and few readers its half: as float32, exactly


def modules(op: str) -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        DependencyError: they are not installed.
    """
    return optional("pyarrow", "parquet", op), optional("pyarrow.parquet", "parquet", op)


def table_of(
    pa: Any, keys: Ids, tensors: dict[str, Tensor], layout: Layout, fingerprint: Fingerprint, notes: dict[str, Any]
) -> Any:
    """Rows as a table, that says of itself what it is."""
    numbers = SYNTHETIC.unpack(keys)
    columns = {
        name: pa.array(numbers[:, at].astype(kind), getattr(pa, kind)())
        for at, (name, kind) in enumerate(_KEYS.items())
    }
    columns |= {name: _column(pa, tensors[name]) for name in layout.fields}
    about = {
        "format": FORMAT,
        "fingerprint": {"sha256": str(fingerprint), **fingerprint.parts},
        "rows": layout.to_json(),
        "notes": notes,
    }
    return pa.table(columns).replace_schema_metadata({METADATA: json.dumps(about, sort_keys=True).encode()})


def _column(pa: Any, x: Tensor) -> Any:
    x = x.to(torch.float32) if x.dtype in _HALF else x
    made = pa.array(x.reshape(-1).numpy())
    for size in reversed(x.shape[1:]):
        made = pa.FixedSizeListArray.from_arrays(made, size)
    return made


def about(schema: Any) -> tuple[Fingerprint, Layout]:
    """What a file says of itself.

    Raises:
        ValueError: it is none of ours.
        CacheError: its layout is not readable.
    """
    try:
        found = json.loads((schema.metadata or {})[METADATA])
        parts = dict(found["fingerprint"])
        digest, version = parts.pop("sha256"), found["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("it is no file of synthetic examples") from error
    fingerprint = Fingerprint(parts)
    if version != FORMAT or fingerprint != digest:
        raise ValueError("it is of another version, or was changed")
    return fingerprint, Layout.from_json(found["rows"])


def keys_of(table: Any) -> Ids:
    """The keys of a table with their columns."""
    columns = [table.column(name).to_numpy().astype(np.int64) for name in _KEYS]
    return SYNTHETIC.pack(np.stack(columns, axis=1))


def key_columns() -> list[str]:
    return list(_KEYS)


def tensors_of(table: Any, layout: Layout) -> dict[str, Tensor]:
    """The fields of a table's rows."""
    return {name: _tensor(table.column(name).combine_chunks(), field) for name, field in layout.fields.items()}


def _tensor(column: Any, field: Field) -> Tensor:
    if hasattr(column, "chunks"):  # of no rows, or of several pieces
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    count = len(column)
    for _ in field.shape:
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(values)).to(field.dtype).view(count, *field.shape)
