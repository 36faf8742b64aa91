"""The host side of the tests that run Triton's kernels on a GPU, on a dry one: what they launch is compiled, nothing is
compared.

    python dry_gpu_tests.py FINDINGS.json          # each test once, compiled as far as Triton's own code
    python dry_gpu_tests.py FINDINGS.json --full   # with all of their parameters, and opcheck; down to machine code

A process of its own: Triton decides at its import whether it interprets. Tensors beyond what a host's memory holds lie
on "meta". The other tests on a GPU have their host side run by test_gpu_tests_host.py.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import test_registration
import test_tokens_soft
import test_triton_gpu
import torch
from dry_gpu import no_machine_code, tensors_on_a_dry_gpu

COMPARISONS = {
    test_triton_gpu: ("assert_matches_truth", "assert_close", "truth", "assert_like_truth", "embedded_truth"),
    test_tokens_soft: ("assert_like_truth", "truth"),
}
Test = Callable[..., None]


def tests(full: bool) -> list[Test]:
    found = [test for name, test in vars(test_triton_gpu).items() if name.startswith("test_")]
    # opcheck calls every op in every form: hundreds of kernels.
    return [*found, test_tokens_soft.test_on_a_gpu, *([test_registration.test_opcheck_on_a_gpu] if full else [])]


def forms(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the tests, by name."""
    for test in tests(full):
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        values = [mark.args[1] for mark in marks]
        chosen = itertools.product(*values) if full else [[each[0] for each in values]]
        fixtures = inspect.signature(test).parameters
        for each in chosen:
            given: dict[str, Any] = dict(zip((mark.args[0] for mark in marks), each, strict=True))
            if given.get("name") == "native":
                continue
            # Nothing chooses a token: on a CPU none could be taken from the table.
            device = "meta" if "room" in fixtures or given.get("hard") else "cpu"
            ours = {"compiled": device, "gpu": device, "room": lambda gigabytes: None}
            given |= {name: value for name, value in ours.items() if name in fixtures}
            yield f"{test.__name__}[{'-'.join(map(str, each))}]", lambda test=test, given=given: test(**given)


@contextmanager
def nothing_compared() -> Iterator[None]:
    """Within it tests take what kernels that never ran have left in memory for right.

    Those are zeros: opcheck looks rows of a table up at the places that kernels chose.
    """
    with ExitStack() as stack:
        for module, names in COMPARISONS.items():
            stack.enter_context(mock.patch.multiple(module, **dict.fromkeys(names, mock.DEFAULT)))
        stack.enter_context(mock.patch.object(torch, "equal", return_value=True))
        stack.enter_context(mock.patch.object(torch.testing, "assert_close"))
        stack.enter_context(mock.patch.object(torch.Tensor, "cpu", lambda self: self))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros))
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("findings", type=Path)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    errors: dict[str, str] = {}
    names: list[str] = []
    manner = nullcontext() if given.full else no_machine_code()
    with tensors_on_a_dry_gpu() as launches, nothing_compared(), manner:
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
