"""Trainers for models of transformers: ``transformers.Trainer`` with a teacher, or with a whole objective."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tgt_fast._optional import optional

if TYPE_CHECKING:
    from tgt_fast.integrations.transformers.distillation import DistillationTrainer
    from tgt_fast.integrations.transformers.guided import TGTTrainer

__all__ = ["DistillationTrainer", "TGTTrainer"]

_WHERE = {"DistillationTrainer": "distillation", "TGTTrainer": "guided"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("transformers", "accelerate"):
        optional(package, "trainer", name)
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
