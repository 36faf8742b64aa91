"""Tuning of the demos: the choices of a group, what they reached, and the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tgt_fast._threads import cores
from tgt_fast.report import prepare_file, write_json
from tgt_fast.report.numbers import mean

Options = dict[str, Any]
Found = dict[str, list[dict[str, Any]]]  # by group its rows, the best first; a row has "method" and "options"


def each(**values: Sequence[Any]) -> list[Options]:
    """Every combination of the values."""
    return [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]


@dataclass
class Trial:
    """One choice: a method under some settings, and what it reached so far, by seed."""

    method: str
    options: Options  # what it sets
    settings: Any
    reached: dict[int, float] = field(default_factory=dict)


def ranked(trials: Mapping[str, Sequence[Trial]], score: str, *, lowest: bool = False) -> Found:
    """For each group its trials, the best mean over seeds first; it stands under the name ``score``."""
    return {
        group: sorted(
            (
                {
                    "method": trial.method,
                    "options": {name: plain(value) for name, value in trial.options.items()},
                    score: mean(list(trial.reached.values())),
                    "per_seed": [trial.reached[seed] for seed in sorted(trial.reached)],
                }
                for trial in some
            ),
            key=lambda row: row[score] if lowest else -row[score],
        )
        for group, some in trials.items()
    }


def plain(value: Any) -> Any:
    """An option as JSON can hold it."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def tune_command(
    description: str, groups: Sequence[str], seeds: str, tune: Callable[[list[str], list[int], int], Found], row: str
) -> None:
    """Ask the command line for groups, seeds, workers and a file; tune, print, write.

    Args:
        groups: what may be asked for; all by default.
        seeds: the default, with commas.
        tune: groups, seeds, workers -> what was found.
        row: the format of what stands in front of a row's options.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups)} (default: all)")
    parser.add_argument("--seeds", default=seeds)
    parser.add_argument("--workers", type=int, default=min(cores(), 8))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(groups)
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    file = prepare_file(arguments.json) if arguments.json else None
    chosen = [int(seed) for seed in arguments.seeds.split(",")]
    found = tune(arguments.groups or list(groups), chosen, arguments.workers)
    for group, rows in found.items():
        print(group)
        for one in rows:
            options = ", ".join(f"{name}={value}" for name, value in one["options"].items())
            print(f"  {row.format(**one)} {options}")
    if file is not None:
        write_json(file, {"seeds": chosen, "groups": found})
