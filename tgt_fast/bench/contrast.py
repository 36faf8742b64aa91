"""Cases of the op noun contrast: in-batch scores of two pairs of towers against each other, forward and backward.

A case is one of the noun linear whose classes are the batch's passages, with scores divided by a temperature instead of
a squared factor; floor, bytes and checks are its. Of a ``Spec``, ``rows`` are queries and ``classes`` passages: more of
these, for each query brings synthetic ones.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.bench import linear
from tgt_fast.bench.case import Call, Case
from tgt_fast.bench.linear import LinearWork, Spec

TEMPERATURE: Final = 0.5


_F32, _BF16 = torch.float32, torch.bfloat16
_CPU_FULL = (
    Spec(4096, 256, 384, 12288, _F32, peak=True),
    Spec(1024, 256, 384, 3072, _F32, compiled=False),
    Spec(1024, 256, 384, 3072, _F32, "jsd", compiled=False),
    Spec(1024, 256, 384, 3072, _BF16, compiled=False),
    Spec(128, 64, 384, 384, _F32, compiled=False),
)
_CPU_QUICK = (Spec(64, 32, 48, 192, _F32), Spec(64, 32, 48, 192, _BF16, "jsd"))
_CUDA_FULL = (Spec(32768, 768, 768, 98304, _BF16), Spec(8192, 768, 768, 24576, _BF16, compiled=False))
_CUDA_QUICK = (Spec(2048, 768, 768, 6144, _BF16),)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    on_cuda, on_cpu = (_CUDA_QUICK, _CPU_QUICK) if quick else (_CUDA_FULL, _CPU_FULL)
    return [case(spec, device) for spec in (on_cuda if device.type == "cuda" else on_cpu)]


def case(spec: Spec, device: torch.device) -> Case:
    return replace(linear.case(spec, device), noun="contrast", build=lambda: ContrastWork(spec, device))


def our_loss(
    queries: Tensor, passages: Tensor, teacher_q: Tensor, teacher_d: Tensor, target: Tensor, *, spec: Spec, backend: str
) -> Tensor:
    """The work that is timed."""
    return tgt.contrastive_distillation_loss(
        queries, passages, teacher_q, teacher_d, positives=target, divergence=spec.divergence, temperature=TEMPERATURE,
        hard_weight=1.0, backend=backend,
    )  # fmt: skip


class ContrastWork(LinearWork):
    """Towers whose scores have a standard deviation of 2, of 8 in every sixteenth query; passage i is query i's."""

    temperature = 1.0
    scale = 1.0 / TEMPERATURE

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.target = torch.arange(spec.rows, device=device)

    def ours(self, backend: str) -> Call:
        return self._step(functools.partial(our_loss, spec=self.spec, backend=backend))
