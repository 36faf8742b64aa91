"""A run's settings in words, for its log and its report."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from tgt_fast._processes import place
from tgt_fast.train.run import Run
from tgt_fast.train.synthetic_weights import shown

_GROUP: Final = ("lr", "weight_decay", "momentum", "betas", "eps")  # of an optimizer's first group of parameters
_LONG: Final = 300  # characters


def settings_of(run: Run, **options: Any) -> dict[str, str]:
    """Of a run: its parts, and those ``options`` of ``fit`` that are given."""
    model, objective = run.model, run.objective
    found = {"student": f"{type(model).__name__}, {_parameters(model)}", "objective": type(objective).__name__}
    for name in ("loss", "synthetic_weight", "sampler"):
        if (part := getattr(objective, name, None)) is not None:
            found[name.replace("_", " ")] = shown(part) if name == "synthetic_weight" else str(part)
    if (teacher := getattr(objective, "teacher", None)) is not None:
        parts = ", ".join(
            f"{name} {type(part).__name__}"
            for name in ("encoder", "decoder", "labeler")
            if (part := getattr(teacher, name, None)) is not None
        )
        found["teacher"] = f"{type(teacher).__name__}{' of ' if parts else ''}{parts}"
    group = run.optimizer.param_groups[0]
    numbers = ", ".join(f"{name}={group[name]}" for name in _GROUP if group.get(name) is not None)
    found["optimizer"] = f"{type(run.optimizer).__name__}({numbers})"
    if run.scheduler is not None:
        found["scheduler"] = type(run.scheduler).__name__
    found |= {name.replace("_", " "): str(value) for name, value in options.items() if value is not None}
    found["device"] = _device(run.device)
    found["processes"] = str(place()[1])
    return {name: value if len(value) <= _LONG else value[:_LONG] + "..." for name, value in found.items()}


def _parameters(model: nn.Module) -> str:
    every = list(model.parameters())
    trained = sum(one.numel() for one in every if one.requires_grad)
    whole = sum(one.numel() for one in every)
    return f"{whole:,} parameters" + (f", {trained:,} of them trained" if trained != whole else "")


def _device(device: torch.device | None) -> str:
    if device is not None and device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device or 'cpu'}, {torch.get_num_threads()} threads"
