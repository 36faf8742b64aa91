"""TimmLabeler: an image classifier of timm that normalises its own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast._optional import optional
from tgt_fast.errors import ArgumentError
from tgt_fast.teacher.value_range import Range, checked_images, checked_range, moved

_OP: Final = "TimmLabeler"
_MODES: Final = {"bilinear", "bicubic"}  # the differentiable ones that can be antialiased


class TimmLabeler(nn.Module):
    r"""``logits = model((x - mean) / std)``: a classifier for images as they are, whatever it was trained on.

    Teacher and student may each be one, with means of their own: both then take the same images.

    Args:
        model: of timm, or a classifier with a ``pretrained_cfg`` like timm's.
        mean, std: a number a channel, of images in 0..1; by default those of ``model.pretrained_cfg``.
        value_range: black and white of the images, as in :class:`DiffusersTeacher`.
        size: resize images to (h, w), with the interpolation that the model was trained with, antialiased; True: to
            the size of ``model.pretrained_cfg``; None: take them as they are.

    Raises:
        ArgumentError: a mean or deviation that is neither given nor known, or is none.

    >>> import torch, tgt_fast as tgt
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    >>> labeler = tgt.teacher.TimmLabeler(net, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> labeler(torch.rand(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: Range = (0.0, 1.0),
        size: tuple[int, int] | bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.value_range = checked_range(_OP, value_range)
        config = getattr(model, "pretrained_cfg", None) or {}
        config = config if isinstance(config, Mapping) else vars(config)
        for name, given in (("mean", mean), ("std", std)):
            values = config.get(name) if given is None else given
            if values is None:
                raise ArgumentError(f"{_OP}: {type(model).__name__} has no pretrained_cfg with a {name}: give {name}=")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1), persistent=False)
        if not bool((self.std > 0).all()) or not bool(self.mean.isfinite().all()):
            raise ArgumentError(f"{_OP}: mean must be finite and std > 0, got {mean!r} and {std!r}")
        self.size = _size(config, size)
        mode = config.get("interpolation", "bicubic")
        self.mode = mode if mode in _MODES else "bicubic"

    @classmethod
    def create(cls, name: str, *, model_options: Mapping[str, Any] | None = None, **options: Any) -> TimmLabeler:
        """The labeler from a model's name, by ``timm.create_model(name, **model_options)``.

        Args:
            model_options: such as ``{"pretrained": True, "num_classes": 5, "checkpoint_path": "labeler.safetensors"}``.
            options: of :class:`TimmLabeler`.

        Raises:
            DependencyError: timm is not installed. Its own errors are passed on.
        """
        return cls(optional("timm", "timm", _OP).create_model(name, **(model_options or {})), **options)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, c, h, w] -> logits [B, C]; differentiable.

        Raises:
            DTypeError: images of integers.
        """
        checked_images(_OP, x, self.value_range, slack=8.0)  # unclamped images of a decoder that is pushed go far
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode=self.mode, antialias=True)
        x = moved(x, self.value_range, (0.0, 1.0))
        logits: Tensor = self.model((x - self.mean.to(x.dtype)) / self.std.to(x.dtype))
        return logits


def _size(config: Mapping[str, Any], size: tuple[int, int] | bool | None) -> tuple[int, int] | None:
    if size is None or size is False:
        return None
    if size is True:
        known = config.get("input_size")
        if known is None:
            raise ArgumentError(f"{_OP}: the model has no pretrained_cfg with an input_size: give size=(h, w)")
        size = tuple(known[-2:])
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ArgumentError(f"{_OP}: size must be (h, w), True or None, got {size!r}")
    return size
