"""Tensors that no kernel of ours can see through, whichever backend it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


# Held here, for this runs at every call.
_transformed = torch._C._are_functorch_transforms_active
_STRIDED: Final = torch.strided


def not_plain(tensors: Sequence[Tensor]) -> str | None:
    """Why only the reference can run a call on ``tensors``; None when they are plain and no transform is active."""
    if _transformed():
        return "torch.func transforms (vmap, jvp, ...) do not reach compiled code; backend='reference' works under them"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives do not reach compiled code; backend='reference' carries them"
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return f"{type(tensor).__name__} is a tensor subclass; pass a plain tensor, or use backend='reference'"
        if tensor.layout is not _STRIDED:
            return f"tensors of layout {tensor.layout} are not dense"
    return None
