"""``vocab_group`` on Triton's kernels, in their interpreter: rows' states are brought into the form that is merged."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import relative_error
from process_kit import all_made, in_processes, needs_processes
from test_vocab_parallel import assert_they_are
from torch import Tensor
from vocab_kit import OFFSETS, Case, evaluated, part_of

import tgt_fast as tgt
from tgt_fast.errors import BackendError
from tgt_fast.kernels.calls import Direct, DistillCall
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops.vocab_parallel import opening, triton_rows

WORLD = 2
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Each divergence, kind of label, pair of dtypes, reduction and shape of the logits, the latter by several divergences.
CASES = (
    Case("forward_kl", "smoothed", (2.0, 2.0), "masked", (FP32, FP32), "mean", True),
    Case("forward_kl", "hard", (1.0, 1.0), "peaked", (FP32, FP32), "sum", False),
    Case("reverse_kl", "hard", (0.5, 4.0), "peaked", (FP32, FP32), "none", True),
    Case("reverse_kl", "spread", (2.0, 3.0), "masked", (FP16, FP16), "mean", False),
    Case("symmetric", "smoothed", (2.0, 3.0), "far", (BF16, FP32), "sum", True),
    Case("jsd", "hard", (1.0, 1.0), "masked", (FP64, FP32), "none", True),
    Case("tvd", "smoothed", (2.0, 2.0), "peaked", (FP32, FP32), "mean", True),
    Case("cross_entropy", "soft", (0.5, 4.0), "far", (FP32, BF16), "mean", False),
    Case("cross_entropy", "hard alone", (2.0, 2.0), "masked", (BF16, BF16), "none", True),
    Case("mse", "hard", (2.0, 3.0), "masked", (FP32, FP32), "mean", True),
)


ON_A_DEVICE = (0, 8)  # by the way that waits for none, and with statistics


@needs_processes
def test_loss_and_gradients_are_those_of_all_classes(
    interpreted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    hidden, head, teacher_head = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (9, 37, 38))

    def of_heads(here: slice, **more: Any) -> list[Tensor]:
        leaf, weight = hidden.clone().requires_grad_(), head[here].clone().requires_grad_()
        tgt.linear_distillation_loss(leaf, weight, hidden, teacher_head[:37][here], **more).backward()
        return [leaf.grad, weight.grad]  # type: ignore[list-item]

    def work(rank: int) -> Any:
        made = []
        more: dict[str, Any] = {"vocab_group": "world", "backend": interpreted}
        for at, case in enumerate(CASES):
            student, teacher, target, weight = case.inputs()
            sides = part_of(student, rank, WORLD), part_of(teacher, rank, WORLD)
            with monkeypatch.context() as patched:
                if at in ON_A_DEVICE:
                    patched.setattr(opening, "on_host", lambda tensor: False)
                made.append(evaluated(case, *sides, target, weight, stats=at in ON_A_DEVICE, **more))
        leaf = sides[0].clone().requires_grad_()
        loss = tgt.distillation_loss(
            leaf * 1.0, sides[1], target, sample_weight=weight, inplace=True, **CASES[-1].options, **more
        )
        loss.backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad.nan_to_num(7), made[-1][1].nan_to_num(7))
        mesh = init_device_mesh("cpu", (WORLD,))
        placed = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in (student, teacher)]
        tgt.distillation_loss(
            *placed, target, sample_weight=weight, backend=interpreted, **CASES[-1].options
        ).full_tensor().backward()  # type: ignore[attr-defined]
        for mine, own in zip(placed, made[-1][1:3], strict=True):
            torch.testing.assert_close(mine.grad.to_local(), own, equal_nan=True)  # type: ignore[union-attr]
        with pytest.raises(BackendError, match="there are no Triton kernels for top-k records"):
            tgt.distillation_loss(sides[0], tgt.topk_teacher(teacher, 3), **more)
        return made, of_heads(slice(*OFFSETS[WORLD][rank : rank + 2]), **more)

    found = all_made(in_processes(WORLD, tmp_path, work))
    for case, *parts in zip(CASES, *(made for made, _ in found), strict=True):
        assert_they_are(case, parts)
    of_hidden, of_head = of_heads(slice(None))
    assert all(relative_error(own, of_hidden, 1e-2) < 2e-5 for _, (own, _) in found)
    assert relative_error(torch.cat([own for _, (_, own) in found]), of_head, 1e-2) < 2e-5


def test_the_columns_are_those_of_the_kernels(interpreted: str) -> None:
    rows = importlib.import_module("tgt_fast.kernels.triton.distill_row")
    assert [getattr(rows, name).value for name in triton_rows.COLUMNS] == list(range(len(triton_rows.COLUMNS)))
    for name in triton_rows.COLUMNS[: triton_rows._SAME]:
        assert getattr(rows, name).value == getattr(opening, name)
    assert (rows.FITS.value, rows.SMALL.value**2) == (triton_rows._FITS, triton_rows._SMALL)


@pytest.mark.parametrize("divergence", ["symmetric", "cross_entropy", "mse"])
def test_a_state_and_back(interpreted: str, divergence: str) -> None:
    """What a forward leaves is what its backward takes, once it has been in the merged form."""
    kernel = Direct(importlib.import_module("tgt_fast.kernels.triton.distill"))
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 20, generator=generator) * 3 for _ in range(2))
    student[1], student[2, 3], student[3, 3], teacher[4, 2] = -torch.inf, torch.nan, -torch.inf, 1e38
    options = DistillOptions(divergence, temperature=2.0, hard_weight=0.5, label_smoothing=0.1, reduction="none")
    call = DistillCall(options, student, teacher, torch.tensor([-100, 1, 2, 3, 4, -1]), want_row_state=True)
    own = kernel.forward(call).row_state
    assert own is not None
    merged = triton_rows.merged_form(own, torch.float32, call)
    # The labels of a row are not of its own state alone.
    merged[4, opening.FLAGS] += opening.HARD
    back = triton_rows.triton_form(merged, call._replace(want_d_student=True, want_d_teacher=True))
    asked = call._replace(want_row_state=False, want_d_student=True, want_d_teacher=True)
    for mine, theirs in zip(*(kernel.backward(asked, x, torch.ones(6)) for x in (own, back)), strict=True):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
