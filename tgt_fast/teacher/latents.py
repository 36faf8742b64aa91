"""Latents: what an encoder gives and a decoder takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tgt_fast.errors import DTypeError, ShapeError


@dataclass(frozen=True, eq=False)
class Latents:
    """A batch of latents, ``z = Enc(x)``, and which of its positions are real.

    Attributes:
        z: [B, ...] floating point: (B, d), (B, c, h, w), (B, L, d), ...
        mask: None (everything is real), or bool or integer [B, ...] over the leading dimensions of ``z``, for
            example (B, L) for z of (B, L, d); each of its dimensions is z's or 1. True (non-zero) marks a
            real position. Padding goes to the right: then noise, which is numbered position by position, is
            the same for an example alone and for the same example padded.
        source: None, or what z was encoded from, where the decoder asks for it again: integers in the mask's shape,
            such as the tokens (B, L) of a text. Exploration moves z and carries the source along.

    A node of ``torch.utils._pytree``; mask and source are leaves only where there are any.
    """

    z: Tensor
    mask: Tensor | None = None
    source: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """The mask as bool with as many dimensions as z, ready to broadcast; None where all is real."""
        if self.mask is None:
            return None
        return self.mask.bool().reshape(self.mask.shape + (1,) * (self.z.ndim - self.mask.ndim))

    def at_real(self, z: Tensor) -> Latents:
        """The same latents with ``z`` at the real positions; masked ones keep their values, bit for bit."""
        real = self.real
        return replace(self, z=z if real is None else torch.where(real, z, self.z))

    def check(self, batch: int, what: str) -> Latents:
        """Itself, if z and mask make sense for a batch of that size.

        Raises:
            DTypeError: z is not floating point.
            ShapeError: the batch size is another, or the mask does not broadcast over z's leading dimensions.
        """
        if not isinstance(self.z, Tensor) or not self.z.is_floating_point():
            found = self.z.dtype if isinstance(self.z, Tensor) else type(self.z).__name__
            raise DTypeError(f"{what}: latents must be a floating-point tensor, got {found}")
        if self.z.ndim < 2 or self.z.shape[0] != batch:
            raise ShapeError(f"{what}: latents must be [batch={batch}, ...], got {tuple(self.z.shape)}")
        if self.mask is not None:
            over = self.z.shape[: self.mask.ndim]
            fits = 0 < self.mask.ndim <= self.z.ndim and self.mask.shape[0] == batch
            if not fits or any(m not in (1, n) for m, n in zip(self.mask.shape, over, strict=True)):
                raise ShapeError(
                    f"{what}: mask {tuple(self.mask.shape)} does not cover the leading dimensions of "
                    f"latents {tuple(self.z.shape)}"
                )
        if self.source is not None and (self.mask is None or self.source.shape != self.mask.shape):
            of = None if self.mask is None else tuple(self.mask.shape)
            raise ShapeError(f"{what}: source {tuple(self.source.shape)} is not of the mask's shape, {of}")
        return self

    def padded_to(self, shape: torch.Size | tuple[int, ...]) -> Latents:
        """The latents with positions added on the right (zeros, masked) until an example has ``shape``.

        Raises:
            ShapeError: ``shape`` differs where there is no mask to say which positions are real, or is
                smaller.
        """
        have = tuple(self.z.shape[1:])
        if have == tuple(shape):
            return self
        mask = self.mask
        grows = [b - a for a, b in zip(have, shape, strict=False)]
        if mask is None or len(have) != len(shape) or any(g < 0 for g in grows) or any(grows[mask.ndim - 1 :]):
            raise ShapeError(f"latents of shape {have} do not fit where examples have shape {tuple(shape)}")
        widths = [g if mask.shape[1 + i] == have[i] else 0 for i, g in enumerate(grows[: mask.ndim - 1])]
        source = None if self.source is None else _pad_right(self.source, widths)
        return replace(self, z=_pad_right(self.z, grows), mask=_pad_right(mask, widths), source=source)


def _pad_right(x: Tensor, widths: list[int]) -> Tensor:
    """Zeros after the end of the dimensions 1, 2, ... of x."""
    widths = widths + [0] * (x.ndim - 1 - len(widths))
    return F.pad(x, [n for width in reversed(widths) for n in (0, width)])


def _flatten(latents: Latents) -> tuple[list[Any], tuple[bool, bool]]:
    optional = (latents.mask, latents.source)
    return [latents.z, *(x for x in optional if x is not None)], (optional[0] is not None, optional[1] is not None)


def _unflatten(children: Any, has: tuple[bool, bool]) -> Latents:
    z, *rest = children
    return Latents(z, rest[0] if has[0] else None, rest[-1] if has[1] else None)


pytree.register_pytree_node(Latents, _flatten, _unflatten, serialized_type_name="tgt_fast.Latents")
