"""Triton's interpreter itself: what runs in it bit for bit, and which versions of it do not run."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import pytest
import torch

import tgt_fast as tgt
from tgt_fast.kernels import triton as backend_module
from tgt_fast.kernels.philox import philox4x32

pytestmark = pytest.mark.always  # few and short: that the interpreter works at all


def test_the_words_of_the_stream_are_those_of_the_reference(interpreted: str) -> None:
    from triton_words import words_kernel

    generator = torch.Generator().manual_seed(0)
    counters, keys = (torch.randint(0, 2**32, (n, 64), generator=generator) for n in (4, 2))
    counters[:, 0] = keys[:, 0] = 2**32 - 1
    out = torch.empty(4, 64, dtype=torch.int64)
    words_kernel[(1,)](counters, keys, out)
    assert torch.equal(out, torch.stack(philox4x32(tuple(counters), tuple(keys))))  # type: ignore[arg-type]


def test_the_gumbel_numbers_of_the_stream_are_exact_at_both_ends(interpreted: str) -> None:
    from test_headers import exact_gumbels, gumbel_words
    from triton_words import gumbel_kernel

    words = gumbel_words()
    out = torch.empty(4096)
    gumbel_kernel[(1,)](torch.from_numpy(words.astype("int64")), out)
    torch.testing.assert_close(out.double(), torch.from_numpy(exact_gumbels(words)), rtol=5e-7, atol=5e-7)


def test_no_kernel_inverts_unsigned_words(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 cannot: its NumPy knows no unsigned word of -1."""
    import triton.language as tl
    from triton_words import gumbel_kernel

    plain = tl.tensor.__invert__

    @functools.wraps(plain)  # it stays one of Triton's own functions
    def careful(self: Any, **rest: Any) -> Any:
        assert self.dtype.is_int1() or not self.dtype.is_int_unsigned()
        return plain(self, **rest)

    monkeypatch.setattr(tl.tensor, "__invert__", careful)
    gumbel_kernel[(1,)](torch.arange(4096), torch.empty(4096))
    logits, table = torch.zeros(3, 40), torch.zeros(40, 16)
    tgt.soft_embedding(logits, table, gumbel=True, seed=1, backend=interpreted)
    tgt.perturb_latents(torch.zeros(3, 40), 1.0, truncation=2.0, seed=1, backend=interpreted)


@pytest.mark.parametrize(
    ("triton", "numpy", "refused"),
    [
        ("3.6.0", "2.4.0", True), ("3.6.1+git1234", "2.5.5", True), ("3.6.0", "2.3.9", False),
        ("3.6.0", "1.26.4", False), ("3.9.0", "2.4.6", False), ("3.5.1", "2.4.0", False), ("3.7.0", "2.10.0", False),
    ],
)  # fmt: skip
def test_an_interpreter_that_this_numpy_breaks_is_refused(triton: str, numpy: str, refused: bool) -> None:
    reason = backend_module.interpreter_trouble(triton, numpy)
    assert (reason is not None) == refused
    if reason is not None:
        assert triton in reason
        assert numpy in reason
        assert "numpy<2.4" in reason


def test_the_tests_are_skipped_with_that_reason(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    old = {"triton": "3.6.0", "numpy": "2.5.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or version(name))
    monkeypatch.setattr(backend_module, "load", backend_module.load.__wrapped__)
    reason = backend_module.refusal("distill", (torch.empty(0),))  # what the fixture skips with
    assert reason is not None
    assert "Triton 3.6.0 cannot run loops with NumPy 2.5.0" in reason
