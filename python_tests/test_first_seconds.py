"""The cost of an import: for a help text nothing of PyTorch, else what a program uses; and everything has its name."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping

import pytest
from programs import ran

import tgt_fast

COMMAND = [sys.executable, "-m", "tgt_fast"]


def run(code: str, environment: Mapping[str, str]) -> str:
    """What a program prints that may find PyTorch imported before it begins."""
    done = ran(code, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def seconds(words: list[str], environment: Mapping[str, str]) -> float:
    """Of a processor, the least of three: other work on the machine only ever adds."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, capture_output=True, check=True, env=dict(environment))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_a_help_text_imports_no_torch(child_environment: dict[str, str]) -> None:
    for words in (["--help"], ["--version"], ["demo", "--help"], ["bench", "--help"], ["cache", "build", "--help"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "tgt_fast", *words],
            capture_output=True, text=True, env=child_environment, check=True,
        )  # fmt: skip
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert "argparse" in imported
        assert not {"torch", "numpy", "safetensors", "rich"} & imported


def test_a_help_text_takes_at_most_four_times_as_long_as_importing_numpy(child_environment: dict[str, str]) -> None:
    numpy = seconds([sys.executable, "-c", "import numpy"], child_environment)
    assert seconds([*COMMAND, "--help"], child_environment) <= 4 * numpy


def test_importing_the_package_imports_little(child_environment: dict[str, str]) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import tgt_fast
dear = {"sympy", "rich", "tqdm", "torch.distributed.fsdp", "torch.fx.experimental.symbolic_shapes"}
unused = {"tgt_fast.train", "tgt_fast.cache", "tgt_fast.explore", "tgt_fast.teacher"}
print(sorted((set(sys.modules) - before) & (dear | unused)))
"""
    assert run(code, child_environment) == "[]"


def test_using_everything_imports_no_compiler(child_environment: dict[str, str]) -> None:
    code = "import sys, tgt_fast; tgt_fast._import_all(); print({'sympy', 'torch.distributed.fsdp'} & set(sys.modules))"
    assert run(code, child_environment) == "set()"


@pytest.mark.parametrize("first", ["import tgt_fast, torch", "import tgt_fast.errors, torch"])
def test_the_ops_are_registered(first: str, child_environment: dict[str, str]) -> None:
    code = f"{first}\nprint(torch.ops.tgt_fast.distillation_loss.default._schema.name)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=child_environment, check=True)
    assert done.stdout.strip() == "tgt_fast::distillation_loss"


def test_parts_are_there_after_importing_the_package_alone(child_environment: dict[str, str]) -> None:
    names = ("errors", "losses", "cache", "teacher", "train", "explore", "ops", "kernels", "testing")
    code = f"import tgt_fast as tgt; print(*(getattr(tgt, name).__name__ for name in {names}))"
    assert run(code, child_environment).split() == [f"tgt_fast.{name}" for name in names]


def test_every_name_is_found_and_listed(child_environment: dict[str, str]) -> None:
    code = (
        "import tgt_fast as t; print(all(getattr(t, n) is not None for n in t.__all__), set(t.__all__) <= set(dir(t)))"
    )
    assert run(code, child_environment) == "True True"
    assert run("from tgt_fast import *; print(fit.__name__)", child_environment) == "fit"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tgt_fast.nothing


def test_the_losses_are_named_in_their_package() -> None:
    assert tgt_fast.losses.DistillationLoss is tgt_fast.DistillationLoss
    assert tgt_fast.losses.LinearDistillationLoss is tgt_fast.LinearDistillationLoss
    assert tgt_fast.losses.ContrastiveDistillationLoss is tgt_fast.ContrastiveDistillationLoss
