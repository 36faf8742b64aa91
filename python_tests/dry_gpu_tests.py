"""The host side of test_triton_gpu.py on a dry GPU: all that is launched is compiled and launched, nothing is compared.

    python dry_gpu_tests.py FINDINGS.json          # each test once
    python dry_gpu_tests.py FINDINGS.json --full   # with all of its parameters

A process of its own: Triton decides at its import whether it interprets. Tensors beyond what a host's memory holds lie
on "meta".
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import test_triton_gpu
import torch
from dry_gpu import tensors_on_a_dry_gpu

COMPARISONS = ("assert_matches_truth", "truth", "assert_like_truth", "embedded_truth")


def forms(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the tests, by name."""
    for name, test in vars(test_triton_gpu).items():
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        values = [mark.args[1] for mark in marks]
        chosen = itertools.product(*values) if full else [[each[0] for each in values]]
        for each in chosen:
            given: dict[str, Any] = dict(zip((mark.args[0] for mark in marks), each, strict=True))
            large = "room" in inspect.signature(test).parameters
            # Nothing chooses a token: on a CPU none could be taken from the table.
            given["compiled"] = "meta" if large or given.get("hard") else "cpu"
            if large:
                given["room"] = lambda gigabytes: None
            yield f"{name}[{'-'.join(map(str, each))}]", lambda test=test, given=given: test(**given)


@contextmanager
def nothing_compared() -> Iterator[None]:
    """Within it tests take whatever kernels that never ran have left in memory for right."""
    with (
        mock.patch.multiple(test_triton_gpu, **dict.fromkeys(COMPARISONS, mock.DEFAULT)),
        mock.patch.object(torch, "equal", return_value=True),
        mock.patch.object(torch.testing, "assert_close"),
        mock.patch.object(torch.Tensor, "cpu", lambda self: self),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("findings", type=Path)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    errors: dict[str, str] = {}
    names: list[str] = []
    with tensors_on_a_dry_gpu() as launches, nothing_compared():
        for name, call in forms(given.full):
            names.append(name)
            before = launches.total()
            try:
                call()
            except Exception:
                errors[name] = traceback.format_exc(limit=-3)
            else:
                if launches.total() == before:
                    errors[name] = "it launched nothing"
    given.findings.write_text(json.dumps({"errors": errors, "names": names, "launches": launches}))


if __name__ == "__main__":
    main()
