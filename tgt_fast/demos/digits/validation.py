"""What was found on the validation images when the settings were chosen: ``tuning.json``, written by ``tune.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Rivals:
    """One kind of labeler, and what each side reaches with it. Percent."""

    labeler: str
    accuracy: float
    augmented: float  # by the best augmentation tried with it
    augmentation: str
    gradient: float


def load() -> dict[str, list[dict[str, Any]]]:
    """The trials of each group, the best first; empty where the file is missing."""
    file = resources.files(__package__).joinpath("tuning.json")
    if not file.is_file():
        return {}
    groups: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))["groups"]
    return groups


def rivals(groups: dict[str, list[dict[str, Any]]] | None = None) -> list[Rivals]:
    """By labeler, the most accurate first: that is how the demo's was chosen."""
    groups = load() if groups is None else groups
    if not {"labeler", "labeler-augmented", "labeler-gradient"} <= set(groups):
        return []
    found = []
    for row in groups["labeler"]:
        options = row["options"]
        augmented = [r for r in groups["labeler-augmented"] if options.items() <= r["options"].items()]
        gradient = next(r for r in groups["labeler-gradient"] if r["options"] == options)
        best = max(augmented, key=lambda r: r["accuracy"])
        found.append(
            Rivals(
                labeler=_name(options),
                accuracy=row["accuracy"],
                augmented=best["accuracy"],
                augmentation=best["options"]["augmentation"],
                gradient=gradient["accuracy"],
            )
        )
    return found


def _name(options: dict[str, Any]) -> str:
    normalised = "BatchNorm" if options["labeler_batchnorm"] else "no BatchNorm"
    return f"{normalised}, {'warped' if options['labeler_warp'] else 'plain'} images"


def about_rivals(rows: Sequence[Rivals]) -> str:
    """How far the lead over augmentation is the labeler's doing."""
    chosen, closest = rows[0], min(rows, key=lambda row: row.gradient - row.augmented)
    lead, least = chosen.gradient - chosen.augmented, closest.gradient - closest.augmented
    return (
        "The labeler was chosen by its own accuracy alone. The lead over augmentation depends on it: "
        f"{lead:.1f} points with this one, {least:.1f} with the one that suits augmentation best "
        f"({closest.labeler}; {closest.accuracy:.1f} % right). A labeler that stays sensible on noisy images makes "
        f"{closest.augmentation} an exploration of its own, which works at 64 pixels."
    )
