"""The memory of large gradients: used again once it is free, never before, and given back when asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tgt_fast as tgt

LARGE = (1024, 2048)  # 8 MiB of float32
NEARLY = (1000, 2048)
SMALL = (16, 64)


@pytest.fixture(autouse=True)
def _no_kept_buffers(native: str) -> None:
    tgt.release_buffers()


def gradient(shape: tuple[int, int], value: float = 1.0) -> Tensor:
    student = torch.full(shape, value, requires_grad=True)
    teacher = torch.zeros(shape)
    teacher[:, 0] = value
    loss = tgt.distillation_loss(student, teacher, backend="native")
    (d_student,) = torch.autograd.grad(loss, student)
    return d_student


def test_a_freed_gradients_memory_serves_the_next_one() -> None:
    first = gradient(LARGE)
    address = first.data_ptr()
    del first
    assert gradient(LARGE).data_ptr() == address
    assert gradient(NEARLY).data_ptr() == address


def test_memory_in_use_is_never_handed_out() -> None:
    held = [gradient(LARGE, 1.0 + k) for k in range(4)]
    assert len({grad.data_ptr() for grad in held}) == 4
    for k, grad in enumerate(held):
        torch.testing.assert_close(grad, gradient(LARGE, 1.0 + k), rtol=0, atol=0)


def test_a_view_keeps_the_memory_in_use() -> None:
    row = gradient(LARGE)[3]
    expected = row.clone()
    gradient(LARGE, 5.0)
    assert torch.equal(row, expected)


def test_at_most_two_are_kept_and_release_gives_them_back() -> None:
    held = [gradient(LARGE) for _ in range(4)]
    assert tgt.release_buffers() == 0
    del held
    assert tgt.release_buffers() == 2 * 8 * 2**20
    assert tgt.release_buffers() == 0


def test_another_size_frees_what_was_kept_for_the_old_one() -> None:
    gradient(LARGE)
    gradient((4096, 2048))
    assert tgt.release_buffers() == 32 * 2**20


def test_small_gradients_are_left_to_the_allocator() -> None:
    gradient(SMALL)
    assert tgt.release_buffers() == 0


def test_an_optimizer_may_keep_and_change_the_gradient() -> None:
    student = torch.zeros(LARGE, requires_grad=True)
    optimizer = torch.optim.SGD([student], lr=1.0, momentum=0.9)
    teacher = torch.randn(LARGE)
    for _ in range(3):
        optimizer.zero_grad()
        tgt.distillation_loss(student, teacher, reduction="sum").backward()
        torch.nn.utils.clip_grad_norm_([student], 0.5)
        optimizer.step()
    reference = torch.zeros(LARGE, requires_grad=True)
    optimizer = torch.optim.SGD([reference], lr=1.0, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        tgt.distillation_loss(reference, teacher, reduction="sum", backend="reference").backward()
        torch.nn.utils.clip_grad_norm_([reference], 0.5)
        optimizer.step()
    torch.testing.assert_close(student, reference)
