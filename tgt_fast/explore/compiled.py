"""Gradient exploration as one compiled step: decoder, student, labeler, divergence and the moves in one graph."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tgt_fast.explore.draws import Key
from tgt_fast.explore.gradient import Student, climb, ways_up
from tgt_fast.explore.guard import left_as_found
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.teacher import Latents, Teacher, tree

_LOG = logging.getLogger("tgt_fast")


class CompiledClimb:
    """:func:`tgt_fast.explore.gradient.climb` through ``torch.compile``; as it is where that fails, which is logged.

    On a CUDA device the graph is captured and replayed: it works in buffers that are used again, and what it returns is
    copied out of them. Parameters are constants of the graph, so that no gradient of theirs is computed.
    """

    def __init__(self) -> None:
        self._compiled: Any = None
        self.refused: str | None = None  # why it runs as it is

    def __call__(
        self,
        teacher: Teacher,
        student: Student,
        start: Latents,
        anchors: Latents,
        scale: Tensor | None,
        key: Key,
        options: SamplerOptions,
    ) -> tuple[Latents, list[float]]:
        arguments = (teacher, student, start, anchors, scale, key, options)
        # What is being compiled already is compiled with it; a record of the disagreement is read on the host.
        if self.refused is not None or options.record_disagreement or torch.compiler.is_compiling():
            return climb(*arguments)
        if self._compiled is None:
            captured = start.z.device.type == "cuda"
            self._compiled = torch.compile(ways_up, fullgraph=True, options={"triton.cudagraphs": captured})
        try:
            with left_as_found(student):
                found: Latents = self._compiled(*arguments)
        except Exception as error:  # whatever a compiler may raise; what the student raises comes again below
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            reached = climb(*arguments)
            self.refused = reason
            _LOG.warning("LatentSampler: exploration runs uncompiled from here on, torch.compile failed: %s", reason)
            return reached
        return tree.map_batched(Tensor.clone, found) if start.z.device.type == "cuda" else found, []
