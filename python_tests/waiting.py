"""Calls for which the host would wait on a device, found without one."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NothingWaits(TorchDispatchMode):
    """Lets no op run for which the host would wait on a device, or send it a list of columns."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "index", "index_put", "_index_put_impl", "equal", "masked_select")

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert op.overloadpacket._qualified_op_name.split("::")[1].rstrip("_") not in self.FORBIDDEN, op
        return op(*arguments, **(keywords or {}))
