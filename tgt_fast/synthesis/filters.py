"""Filters: which synthetic examples are not worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.explore import LatentSampler, Synthetic
from tgt_fast.explore.draws import over_coordinates
from tgt_fast.ops import _checks
from tgt_fast.teacher import Latents

_LARGE = 1e30


@dataclass(frozen=True)
class Filters:
    r"""Bounds on synthetic examples ``x~ = Dec(z~)``; one beyond a bound is dropped, and counted by its name::

        entropy     H(softmax(h(x~)))                            nats, the mean over an example's positions
        agreement   1 - TV(softmax(h(x~)), softmax(h(second(x~))))    TV the total variation distance, in 0..1
        distance    ||(Enc(x~) - z~) / scale||_2                 as the sampler's radius is measured

    The labeler gives the same answer twice to the same question, so its second pass sees another view of the example:
    by default its reconstruction, ``Dec(Enc(x~))``.

    Args:
        max_entropy: >= 0 or None: drop what the labeler is less sure of.
        min_agreement: in [0, 1] or None: drop what it judges otherwise at the second pass.
        max_distance: >= 0 or None: drop what the encoder does not find again where it was made.
        second: x~ -> another view of it, for ``min_agreement``. Deterministic.

    Raises:
        ArgumentError: a bound out of its range.

    >>> import tgt_fast as tgt
    >>> tgt.synthesis.Filters(max_entropy=0.7).names
    ('entropy',)
    """

    max_entropy: float | None = None
    min_agreement: float | None = None
    max_distance: float | None = None
    second: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name, most in (("max_entropy", _LARGE), ("min_agreement", 1.0), ("max_distance", _LARGE)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checks.number("Filters", name, getattr(self, name), 0, most))
        if self.second is not None and (not callable(self.second) or self.min_agreement is None):
            raise ArgumentError(f"Filters: second is a function, for min_agreement; got {self.second!r:.200}")

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are on, in the order in which they are asked."""
        bounds = {"entropy": self.max_entropy, "agreement": self.min_agreement, "distance": self.max_distance}
        return tuple(name for name, bound in bounds.items() if bound is not None)

    @property
    def bounds(self) -> dict[str, Any]:
        """As options."""
        return {name: value for name, value in asdict(self).items() if name != "second"}

    @torch.no_grad()
    def refused(self, sampler: LatentSampler, made: Synthetic) -> tuple[Tensor, Tensor]:
        """Of each example the place in ``names`` of the first filter that refuses it, or -1, and what it found.

        Returns:
            int64 [M] and float32 [M], on the CPU.
        """
        count = made.ids.shape[0]
        place, value = torch.full((count,), -1, device="cpu"), torch.zeros(count, device="cpu")
        for number, name in enumerate(self.names):
            found, beyond = getattr(self, f"_{name}")(sampler, made)
            new = beyond.cpu() & (place < 0)
            place[new] = number
            value[new] = found.cpu().to(torch.float32)[new]
        return place, value

    def _entropy(self, sampler: LatentSampler, made: Synthetic) -> tuple[Tensor, Tensor]:
        shares = made.teacher_logits.double().log_softmax(-1)
        found = _of_example(-torch.where(shares.isfinite(), shares.exp() * shares, 0.0).sum(-1))
        assert self.max_entropy is not None
        return found, ~(found <= self.max_entropy)

    def _agreement(self, sampler: LatentSampler, made: Synthetic) -> tuple[Tensor, Tensor]:
        teacher = sampler.teacher
        view = teacher.decode(teacher.encode(made.x)) if self.second is None else self.second(made.x)
        again = teacher.label(view)
        if again.shape != made.teacher_logits.shape:
            raise ArgumentError(
                f"Filters: the second pass gives labels {tuple(again.shape)}, the first one "
                f"{tuple(made.teacher_logits.shape)}"
            )
        apart = (made.teacher_logits.double().softmax(-1) - again.double().softmax(-1)).abs().sum(-1) / 2
        found = 1 - _of_example(apart)
        assert self.min_agreement is not None
        return found, ~(found >= self.min_agreement)

    def _distance(self, sampler: LatentSampler, made: Synthetic) -> tuple[Tensor, Tensor]:
        again: Latents = sampler.teacher.encode(made.x)
        if again.z.shape != made.latents.z.shape:
            raise ArgumentError(
                f"Filters: an example is encoded as {tuple(again.z.shape)}, and was made from "
                f"{tuple(made.latents.z.shape)}"
            )
        apart = again.z.double() - made.latents.z.double()
        if sampler.options.needs_scale and sampler.scale is not None:
            scale = over_coordinates(sampler.scale, made.latents.z).double()
            apart = torch.where(scale > 0, apart / scale, apart)
        if made.latents.real is not None:
            apart = torch.where(made.latents.real, apart, 0.0)
        found = apart.flatten(1).norm(dim=1)
        assert self.max_distance is not None
        return found, ~(found <= self.max_distance)


def _of_example(values: Tensor) -> Tensor:
    """[M, ...] -> [M]"""
    return values.flatten(1).mean(1) if values.ndim > 1 else values
