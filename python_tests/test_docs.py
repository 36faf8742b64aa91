"""No example that nobody runs: the README's Python, and every docstring's."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import tgt_fast

README = Path(__file__).parents[1] / "README.md"
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(tgt_fast.__path__, "tgt_fast.") if "_core" not in module.name
)


@pytest.mark.skipif(not README.exists(), reason="the tests run outside a checkout")
def test_the_readmes_python_runs_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    loss = namespace["loss"]
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    if name.startswith("tgt_fast.integrations."):
        module = pytest.importorskip(name, exc_type=ImportError)  # needs the framework
    else:
        module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_main_docstrings_hold_examples() -> None:
    for thing in (
        tgt_fast.distillation_loss,
        tgt_fast.DistillationLoss,
        tgt_fast.linear_distillation_loss,
        tgt_fast.LinearDistillationLoss,
        tgt_fast.align_logits,
        tgt_fast.perturb_latents,
        tgt_fast.ascend_latents,
        tgt_fast.sample_tokens,
        tgt_fast.soft_embedding,
        tgt_fast.Teacher,
        tgt_fast.teacher.Seq2SeqTeacher,
        tgt_fast.teacher.DiffusersTeacher,
        tgt_fast.teacher.TimmLabeler,
        tgt_fast.LatentSampler,
        tgt_fast.SyntheticReplay,
        tgt_fast.TeacherCache,
        tgt_fast.synthesize,
        tgt_fast.SyntheticDataset,
        tgt_fast.teacher_fingerprint,
        tgt_fast.TGTObjective,
        tgt_fast.Term,
        tgt_fast.explain,
    ):
        assert ">>>" in (thing.__doc__ or ""), thing
