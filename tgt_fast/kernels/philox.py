"""The random words of a sample: Philox in plain PyTorch, on any device.

The kernels have it in their own languages: csrc/common/philox.h, and kernels/triton/philox.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Word = int | Tensor  # an unsigned 32-bit word, kept in an int64 tensor


class NoiseKey(NamedTuple):
    """The key of a sample's noise. Integers that live in a tensor stay there."""

    seed: int | Tensor  # 64 bits; a tensor: 0-d int64
    sample_ids: Tensor  # [B] int64
    step: int | Tensor
    replica: int | Tensor  # of each sample's own: [B], which kernels find in the bits 48 to 63 of its id
    op: int = 0  # one of the OP_ codes of kernels.options
    truncation: float | None = None  # of the normal numbers, in standard deviations


def _multiply(multiplier: int, word: Word) -> tuple[Word, Word]:
    """The high and low 32 bits of a 32 x 32 bit product, in halves so that int64 never overflows."""
    high_part = multiplier * (word >> 16)
    low_part = multiplier * (word & 0xFFFF)
    high = (high_part + (low_part >> 16)) >> 16
    low = (((high_part & 0xFFFF) << 16) + low_part) & _MASK32
    return high, low


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counter: four words in [0, 2^32), Python ints or int64 tensors that broadcast together.
        key: two words.

    Returns:
        Four words in [0, 2^32), int64 tensors where the counter or the key holds tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK32
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def philox_words(seed: Word, sample_ids: Tensor, blocks: int, step: Word, replica: Word, op: int) -> Tensor:
    """The four words of each block of each sample.  [B] -> [B, blocks, 4] int64"""
    block = torch.arange(blocks, dtype=torch.int64, device=sample_ids.device)[None, :]
    ids = sample_ids.to(torch.int64)[:, None]
    counter = (
        block.expand(ids.shape[0], blocks),
        ids & _MASK32,
        ((ids >> 32) & _MASK32) | (replica << 16),
        (op << 28) | step,
    )
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    return torch.stack([torch.as_tensor(word, device=sample_ids.device) for word in words], dim=-1)
