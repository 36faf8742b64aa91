"""Exploration as compiled steps: decoder, student, labeler, divergence and the moves in one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgt_fast.explore.draws import decoded
from tgt_fast.explore.gradient import Student, ascend, ascent_steps
from tgt_fast.explore.guard import preserve_student
from tgt_fast.explore.options import SamplerOptions
from tgt_fast.explore.prepared import Prepared
from tgt_fast.teacher import Latents, Teacher, tree
from tgt_fast.teacher.key import Key

_LOG = logging.getLogger("tgt_fast")


class Compiled:
    """A function through ``torch.compile``; as it is where that fails, which is logged.

    On a CUDA device the graph is captured and replayed: it works in buffers that are used again, and what it returns is
    copied out of them. Parameters are constants of the graph, so that no gradient of theirs is computed.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._compiled: Callable[..., Any] | None = None
        self.refused: str | None = None  # why it runs as it is
        self.ran = False

    def __call__(self, *arguments: Any, device: torch.device) -> Any:
        if (
            self.refused is not None or torch.compiler.is_compiling()
        ):  # what is traced already is compiled with the rest
            return self._plain(*arguments)
        self.ran = True
        captured = device.type == "cuda"
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, fullgraph=True, options={"triton.cudagraphs": captured})
        try:
            made = self._compiled(*arguments)
        except Exception as error:  # whatever a compiler may raise; what the user's modules raise comes again below
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            made = self._plain(*arguments)
            self.refused = reason
            _LOG.warning("LatentSampler: exploration runs uncompiled from here on, torch.compile failed: %s", reason)
            return made
        return tree.map_batched(Tensor.clone, made) if captured else made


class CompiledExploration:
    """The compiled steps of :class:`tgt_fast.LatentSampler` with ``compile=True``."""

    def __init__(self) -> None:
        self._prepared = Prepared()
        self._up = Compiled(ascent_steps)
        self._examples = Compiled(examples)

    def report(self) -> list[str]:
        """What was done, in words, a line a part; nothing before the first call."""
        lines = list(self._prepared.report)
        for name, step in (("steps", self._up), ("examples", self._examples)):
            if step.refused is not None:
                lines.append(f"{name}: uncompiled, torch.compile failed: {step.refused}")
            elif step.ran:
                lines.append(f"{name}: one compiled graph")
        return lines

    def ascend(
        self,
        teacher: Teacher,
        student: Student,
        start: Latents,
        anchors: Latents,
        scale: Tensor | None,
        key: Key,
        options: SamplerOptions,
    ) -> tuple[Latents, list[float]]:
        """:func:`tgt_fast.explore.gradient.ascend`."""
        if options.record_disagreement:  # which is read on the host
            return ascend(teacher, student, start, anchors, scale, key, options)
        arguments = (self._prepared(teacher, start), student, start, anchors, scale, key, options)
        with preserve_student(student):
            found: Latents = self._up(*arguments, device=start.z.device)
        return found, []

    def examples(self, teacher: Teacher, latents: Latents, key: Key, replicas: int) -> tuple[Any, Tensor]:
        """:func:`examples`."""
        made: tuple[Any, Tensor] = self._examples(
            self._prepared(teacher, latents), latents, key, replicas, device=latents.z.device
        )
        return made


def examples(teacher: Teacher, latents: Latents, key: Key, replicas: int) -> tuple[Any, Tensor]:
    """``Dec(z)`` and its labels, without a graph."""
    with torch.no_grad():
        made = decoded(teacher, latents, key, replicas)
        return made, teacher.label(made)
