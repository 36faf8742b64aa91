"""The random stream: published vectors, distribution, independence, and the key it is a function of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.philox import philox4x32
from tgt_fast.kernels.reference import standard_normal

# Random123 1.14, examples/kat_vectors: philox4x32-10, (counter, key, result).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
COUNT = 200_000
LEVEL = 1e-4  # the inputs are fixed: a failure is a bug or a choice of seed, never chance


def noise(backend: str, samples: int, count: int, **options: Any) -> Tensor:
    """The standard normal numbers themselves.  -> [samples, count]"""
    return tgt.perturb_latents(torch.zeros(samples, count), 1.0, backend=backend, **options)


def box_muller(words: tuple[int, int, int, int]) -> list[float]:
    """Four normal numbers of a block, by the textbook in Python's own floats; u is a float32."""
    out = []
    for even, odd in (words[:2], words[2:]):
        u = float(torch.tensor((even + 0.5) / 2**32, dtype=torch.float32))
        radius = math.sqrt(-2.0 * math.log(u))
        angle = 2.0 * math.pi * odd / 2**32
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert philox4x32(counter, key) == expected  # type: ignore[arg-type]
    tensors = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))  # type: ignore[arg-type]
    assert tuple(int(word) for word in tensors) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS[:1])
def test_noise_of_a_known_block(backend: str, counter: tuple[int, ...], key: tuple[int, ...], expected: Any) -> None:
    """Seed 0, id 0, step 0, replica 0 is counter 0 under key 0: the first published vector, end to end."""
    torch.testing.assert_close(noise(backend, 1, 4)[0], torch.tensor(box_muller(expected)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "key",
    [
        {
            "seed": 0x299F31D0A4093822,
            "sample_id": (0x1A2E << 32) | 0x85A308D3,
            "replica": 0x1319,
            "step": 0x3707344,
        },
        {"seed": -1, "sample_id": 2**48 - 1, "replica": 2**16 - 1, "step": 2**28 - 1},
    ],
)
def test_every_field_lands_in_its_place_of_the_counter(backend: str, key: dict[str, int]) -> None:
    ids, replica, step = key["sample_id"], key["replica"], key["step"]
    seed = key["seed"] % 2**64
    blocks = 3
    expected: list[float] = []
    for block in range(blocks):
        counter = (block, ids & 0xFFFFFFFF, (ids >> 32) | (replica << 16), (0 << 28) | step)
        expected += box_muller(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)))  # type: ignore[arg-type]
    actual = noise(backend, 1, 4 * blocks, seed=key["seed"], sample_ids=torch.tensor([ids]), replica=replica, step=step)
    torch.testing.assert_close(actual[0], torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 1001])  # within a block, its tails, vectors and their tails
@pytest.mark.parametrize("truncation", [None, 0.5, 2.0])
def test_native_noise_equals_the_reference(native: str, count: int, truncation: float | None) -> None:
    ids = torch.tensor([0, 1, 77, 2**32, 2**48 - 1])
    key = {"seed": 1234567890123, "step": 5, "replica": 2}
    expected = standard_normal(key["seed"], ids, count, step=5, replica=2, truncation=truncation)
    actual = noise(native, 5, count, sample_ids=ids, truncation=truncation, **key)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# Distribution


def flat_noise(backend: str, **options: Any) -> Tensor:
    return noise(backend, 400, COUNT // 400, seed=11, **options).flatten().double()


def test_noise_is_normal_by_kolmogorov_smirnov(backend: str) -> None:
    values = flat_noise(backend)
    assert stats.kstest(values.numpy(), "norm", method="asymp").pvalue > LEVEL
    assert stats.kstest((values * 1.02).numpy(), "norm", method="asymp").pvalue < LEVEL  # the test can fail


@pytest.mark.parametrize("bound", [0.3, 1.0, 2.5])
def test_truncated_noise_is_the_truncated_normal(backend: str, bound: float) -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    below, inside = float(normal.cdf(torch.tensor(-bound))), math.erf(bound / math.sqrt(2.0))

    def uniform(values: Tensor) -> Any:
        return ((normal.cdf(values) - below) / inside).numpy()

    values = flat_noise(backend, truncation=bound)
    assert values.abs().max() <= bound
    assert stats.kstest(uniform(values), "uniform", method="asymp").pvalue > LEVEL
    clipped = flat_noise(backend).clamp(-bound, bound)
    assert stats.kstest(uniform(clipped), "uniform", method="asymp").pvalue < LEVEL


def test_each_place_of_a_block_is_normal_by_chi_square(backend: str) -> None:
    """20 cells of equal probability, for each of a block's four numbers and for pairs of them."""
    cells = torch.distributions.Normal(0.0, 1.0).cdf(flat_noise(backend)).mul(20).long().clamp(0, 19).view(-1, 4)
    for place in range(4):
        assert stats.chisquare(torch.bincount(cells[:, place], minlength=20).numpy()).pvalue > LEVEL
    for first, second in ((0, 1), (0, 2), (1, 3), (2, 3)):
        pairs = torch.bincount(cells[:, first] * 20 + cells[:, second], minlength=400)
        assert stats.chisquare(pairs.numpy()).pvalue > LEVEL


def test_words_are_uniform_in_every_bit() -> None:
    words = torch.stack([torch.as_tensor(w) for w in philox4x32((torch.arange(50_000), 3, 0, 0), (7, 0))])
    for bit in range(32):
        ones = float(((words >> bit) & 1).double().mean())
        assert abs(ones - 0.5) * 2.0 * math.sqrt(words.numel()) < 4.0


@pytest.mark.parametrize("what", ["sample_ids", "step", "replica", "seed", "op"])
def test_streams_that_differ_in_one_field_are_independent(backend: str, what: str) -> None:
    """Neighbours in one field: no correlation of values, squares (radii) or signs, at 4 sigma."""
    samples, count = 64, 1024
    base: dict[str, Any] = {"seed": 3, "sample_ids": torch.arange(samples) * 2, "step": 8, "replica": 4}
    other = dict(base)
    if what == "sample_ids":
        other[what] = base[what] + 1
    elif what == "op":
        other[what] = "restart"
    else:
        other[what] = base[what] + 1
    first, second = (noise(backend, samples, count, **key).double().flatten() for key in (base, other))
    assert not torch.equal(first, second)
    bound = 4.0 / math.sqrt(samples * count)
    for f in (lambda x: x, torch.square, torch.sign):
        correlation = torch.corrcoef(torch.stack([f(first), f(second)]))[0, 1]
        assert abs(float(correlation)) < bound


def test_samples_of_one_batch_are_independent_of_each_other(backend: str) -> None:
    samples, count = 128, 2048
    values = noise(backend, samples, count, seed=5).double()
    correlation = torch.corrcoef(values)
    off_diagonal = correlation[~torch.eye(samples, dtype=torch.bool)].abs() * math.sqrt(count)
    assert off_diagonal.max() < 5.0  # 8128 pairs: a maximum near 4.2 is expected
    assert abs(float(off_diagonal.square().mean()) - 1.0) < 0.1


# The key


def test_permuted_and_split_batches_are_equal_bit_for_bit(backend: str) -> None:
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:37]
    options: dict[str, Any] = {"seed": 9, "step": 3}
    whole = noise(backend, 37, 50, sample_ids=ids, **options)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise(backend, 37, 50, sample_ids=ids[order], **options), whole[order])
    parts = [noise(backend, len(part), 50, sample_ids=part, **options) for part in ids.split([1, 16, 20])]
    assert torch.equal(torch.cat(parts), whole)
    alone = noise(backend, 1, 50, sample_ids=ids[5:6], **options)
    assert torch.equal(alone[0], whole[5])


def test_a_longer_latent_starts_with_the_same_numbers(backend: str) -> None:
    assert torch.equal(noise(backend, 3, 103)[:, :50], noise(backend, 3, 50))


def test_default_ids_count_from_zero(backend: str) -> None:
    assert torch.equal(noise(backend, 4, 8, seed=1), noise(backend, 4, 8, seed=1, sample_ids=torch.arange(4)))


def test_seed_and_step_may_live_in_tensors(backend: str) -> None:
    expected = noise(backend, 4, 8, seed=2**40 + 1, step=77)
    assert torch.equal(noise(backend, 4, 8, seed=torch.tensor(2**40 + 1), step=torch.tensor(77)), expected)


def test_no_global_random_state_is_read_or_written(backend: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = noise(backend, 4, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise(backend, 4, 8), first)


@pytest.mark.parametrize("ids", [[-1], [2**48], [0, 2**50]])
def test_ids_out_of_range_are_errors(none_chosen: str, ids: list[int]) -> None:
    with pytest.raises(ArgumentError, match=str(ids[-1])):
        noise(none_chosen, len(ids), 4, sample_ids=torch.tensor(ids))


@pytest.mark.parametrize("key", [{"step": -1}, {"step": 2**28}, {"replica": -1}, {"replica": 2**16}])
def test_step_and_replica_out_of_range_are_errors(none_chosen: str, key: dict[str, int]) -> None:
    (value,) = key.values()
    with pytest.raises(ArgumentError, match=str(value)):
        noise(none_chosen, 1, 4, **key)
