"""Triton's kernels in the forms that benchmarks and tests on a GPU use, compiled for sm_90 and launched, without a GPU.

    python benchmarks/triton_dry_run.py                       # all sets, with the Triton that is installed
    python benchmarks/triton_dry_run.py --only bench
    python benchmarks/triton_dry_run.py --one-of 8 --save     # of tests and of combinations of options one of 8

The sets: what the bench times, at full shapes; the tests on a GPU with all of their parameters; the combinations of
options that Triton 3.5 and 3.6 were once unable to compile, as far as Triton's own code, where they failed; all
combinations of options. A driver takes the launches and starts nothing (python_tests/dry_gpu.py). ``--save`` writes the
findings to benchmarks/results/triton-dry-run.json, where each version of Triton has its place. Exits with 1 when a form
fails.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import tgt_fast
from tgt_fast.bench import explore
from tgt_fast.bench.case import Case
from tgt_fast.bench.nouns import NOUNS

ROOT: Final = Path(__file__).resolve().parent.parent
SETS: Final = ("bench", "tests", "fragile", "options")
RESULT: Final = ROOT / "benchmarks" / "results" / "triton-dry-run.json"
Form = Callable[[], Any]


class OnMeta(TorchFunctionMode):
    """What is made or sent to a GPU lies on "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        there = {name: _meta(value) for name, value in (kwargs or {}).items()}
        return func(*map(_meta, args), **there)


def _meta(value: Any) -> Any:
    is_gpu = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return torch.device("meta") if is_gpu else value


class _NoGenerator:
    """On "meta" nothing is drawn."""

    def __init__(self, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        return None


def bench_forms() -> dict[str, Form]:
    """The calls that are timed, at their full shapes, where Triton has kernels for them."""
    made: dict[str, Form] = {}
    for noun, cases in NOUNS.items():
        for case in (*cases(torch.device("cuda"), True), *cases(torch.device("cuda"), False)):
            if noun == "explore":  # through a network, which computes on a CPU what it is given
                spec = explore.Spec(int(case.numbers["batch"]), False)
                made[f"bench {noun}: {case.title}"] = functools.partial(_timed, explore.case(spec, torch.device("cpu")))
            elif case.kernels_of != "sparse" and "sample" not in case.op:
                made[f"bench {noun}: {case.title}"] = functools.partial(_timed, case)
    return made


def _timed(case: Case) -> None:
    with OnMeta(), mock.patch.object(torch, "Generator", _NoGenerator):
        work = case.build()
    work.ours("triton")()


def forms_of(name: str, one_of: int) -> dict[str, Form]:
    """The calls of a set, by name."""
    if name == "bench":
        return bench_forms()
    if name == "tests":
        return dict(list(test_forms().items())[::one_of])
    forms = _beside_the_tests("dry_forms")
    made: dict[str, Form] = forms.fragile_forwards() if name == "fragile" else forms.every_forward(one_of)
    return made


def test_forms() -> dict[str, Form]:
    """The tests on a GPU with all of their parameters, and the calls that look at a new device first."""
    made: dict[str, Form] = dict(_beside_the_tests("dry_gpu_tests").forms(full=True))
    for name, call in _beside_the_tests("gpu_calls").triton_calls().items():
        # A token that nothing has chosen cannot be taken from a table on a CPU.
        made[name] = functools.partial(call, torch.device("meta" if "hard" in name else "cpu"))
    return made


def _beside_the_tests(name: str) -> Any:
    folder = str(ROOT / "python_tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def run_set(name: str, one_of: int, share: int, shares: int) -> tuple[int, dict[str, str], Counter[str]]:
    """(forms, what went wrong by form, launches of every kernel) of every so many forms of a set."""
    failed: dict[str, str] = {}
    forms = list(forms_of(name, one_of).items())[share::shares]
    gpu, manner = _beside_the_tests("dry_gpu"), nullcontext()
    if name == "tests":
        manner = _beside_the_tests("dry_gpu_tests").nothing_compared()
    elif name == "fragile":
        manner = gpu.no_machine_code()
    with gpu.tensors_on_a_dry_gpu() as launches, manner:
        for number, (form, call) in enumerate(forms):
            before = launches.total()
            try:
                for _ in range(2 if name == "bench" else 1):
                    call()
            except Exception as error:  # whatever it is, the others are to be seen too
                failed[form] = f"{type(error).__name__}: {error}"
            else:
                if launches.total() == before:
                    failed[form] = "it launched nothing"
            if number % 50 == 49:
                print(f"{name} {share}: {number + 1} of {len(forms)}, {len(failed)} failed", flush=True)
    return len(forms), failed, launches


def found(names: list[str], one_of: int, jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The result of each set, from processes of its own with nothing compiled before."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs) as pool:
            os.environ["TRITON_CACHE_DIR"] = folder
            parts = list(pool.map(run_set, [name] * jobs, [one_of] * jobs, range(jobs), [jobs] * jobs))
            failed = {form: why for part in parts for form, why in part[1].items()}
            launches = sum((part[2] for part in parts), Counter[str]())
            yield name, {"forms": sum(part[0] for part in parts), "failed": failed, "launches": dict(launches)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=SETS, help="only this set; may be repeated")
    parser.add_argument("--one-of", type=int, default=1, help="of the tests and of the combinations of options")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.relative_to(ROOT)}")
    given = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    triton = importlib.metadata.version("triton")
    print(f"Triton {triton}, torch {torch.__version__}, Python {platform.python_version()}, sm_90")
    all_failed = 0
    for name, result in found(given.only or list(SETS), given.one_of, given.jobs):
        all_failed += len(result["failed"])
        print(f"{name}: {result['forms']} forms, {len(result['failed'])} failed")
        for form, why in result["failed"].items():
            print(f"  {form}: {why}")
        if given.save:
            save(triton, name, {**result, "one_of": given.one_of if name in ("tests", "options") else 1})
    return 1 if all_failed else 0


def save(triton: str, name: str, result: dict[str, Any]) -> None:
    runs = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    sets = runs.setdefault(triton, {"architecture": "sm_90"}).setdefault("sets", {})
    sets[name] = result | {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "kernels": kernels_digest(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    RESULT.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")


def kernels_digest() -> str:
    """Of the sources that were launched: a result holds for those."""
    folder = Path(tgt_fast.__file__).parent / "kernels" / "triton"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    raise SystemExit(code)
