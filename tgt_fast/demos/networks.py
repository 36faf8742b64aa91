"""Networks and their weights on the way to another process."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Weights = dict[str, npt.NDArray[np.generic]]
Module = TypeVar("Module", bound=nn.Module)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def weights_of(module: nn.Module) -> Weights:
    """The weights alone. As numpy arrays, because a tensor would be sent to another process as shared memory."""
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def with_weights(module: Module, weights: Weights) -> Module:
    """The module itself, with these weights."""
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return module
