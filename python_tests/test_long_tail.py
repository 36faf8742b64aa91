"""Counts, priors and weights of classes, and the samplers that go by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.long_tail import (
    ClassBalancedSampler,
    DeferredReweighting,
    SquareRootSampler,
    class_counts,
    class_priors,
    effective_number_weights,
    effective_numbers,
    log_priors,
)

Y = torch.tensor([0, 3, -1, 0, 1, -100, 0])
COUNTS = [3, 1, 0, 1]
X, IDS = torch.zeros(7, 2), torch.arange(7)


class Named(Dataset[Any]):
    """A data set with labels of its own, whose items must not be read."""

    def __init__(self, name: str) -> None:
        setattr(self, name, Y.tolist())

    def __len__(self) -> int:
        return 7

    def __getitem__(self, place: int) -> Any:
        raise AssertionError("an item was read")


class Items(Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, place: int) -> Any:
        return {"image": X[place], "label": int(Y[place])}


SOURCES: dict[str, Any] = {
    "a list": Y.tolist(),
    "an array": Y.numpy(),
    "a loader of (x, y)": DataLoader(TensorDataset(X, Y), batch_size=3),
    "batches (ids, x, y)": [(IDS[:4], X[:4], Y[:4]), (IDS[4:], X[4:], Y[4:])],
    "batches of dicts": [{"x": X[:4], "labels": Y[:4]}, {"x": X[4:], "labels": Y[4:]}],
    "some without labels": [(X, Y), X, (X, torch.full((7,), -1))],
    "a loader of dicts": DataLoader(Items(), batch_size=2),
    "a data set of tuples": TensorDataset(IDS, X, Y),
    "a data set of dicts": Items(),
    "labels of its own": Named("labels"),
    "targets of its own": Named("targets"),
    "a part of one": Subset(Named("targets"), range(7)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_counts_of_every_source(name: str) -> None:
    assert class_counts(SOURCES[name]).tolist() == COUNTS
    assert class_counts(SOURCES[name], 6).tolist() == [*COUNTS, 0, 0]
    assert class_priors(SOURCES[name]).tolist() == [0.6, 0.2, 0.0, 0.2]


def test_counts_by_columns_and_of_positions() -> None:
    batches = [{"a": X, "b": Y, "y": IDS}]
    assert class_counts(batches, columns=(None, "a", "b")).tolist() == COUNTS
    assert class_counts([(X[:2], torch.tensor([[0, 1], [1, -100]]))]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ([], {}, ArgumentError, "no labelled example"),
        ([-1, -100], {}, ArgumentError, "no labelled example"),
        ([0, 5], {"num_classes": 5}, ArgumentError, "label 5 is beyond num_classes=5"),
        ([0, 1 << 40], {}, ArgumentError, "no label of a class"),
        (torch.rand(3), {}, DTypeError, "integers"),
        ([(torch.zeros(2, 3), torch.rand(2, 4))], {}, ArgumentError, "integers"),
        ([{"x": X, "y": Y, "label": Y}], {}, ArgumentError, "columns="),
        (3, {}, ArgumentError, "iterate over"),
        ([0], {"num_classes": 0}, ArgumentError, "num_classes"),
    ],
)
def test_what_cannot_be_counted(source: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        class_counts(source, **options)


def test_no_labels_but_a_number_of_classes() -> None:
    assert class_counts([-1], 2).tolist() == [0, 0]
    with pytest.raises(ArgumentError, match="not all 0"):
        class_priors([-1], 2)


def test_effective_numbers_by_hand_and_in_plain_float64() -> None:
    assert effective_numbers([1, 2, 3], 0.5).tolist() == [1.0, 1.5, 1.75]
    counts, beta = torch.tensor([1, 10, 100, 5000]), 0.999
    plain = (1 - beta ** counts.double()) / (1 - beta)
    torch.testing.assert_close(effective_numbers(counts, beta), plain, rtol=1e-12, atol=0.0)
    weights = effective_number_weights(counts, beta)
    torch.testing.assert_close(weights.double(), 4 / plain / (1 / plain).sum(), rtol=1e-6, atol=0.0)


def test_effective_numbers_between_their_limits() -> None:
    """0: every class alike; towards 1: the inverse frequency, where a difference of powers would be all rounding."""
    counts = [4000, 40, 4]
    assert effective_number_weights(counts, 0.0).tolist() == [1, 1, 1]
    exact = effective_numbers(counts, 1.0)
    torch.testing.assert_close(effective_numbers(counts, 1 - 1e-15), exact, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(effective_numbers(counts, 1 - 1e-9), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1.0])
def test_weights_of_absent_and_of_huge_classes(beta: float) -> None:
    for counts in ([0, 5, 1], torch.tensor([0.0, 3e38, 1.0]), np.array([0, 2**62, 7]), torch.tensor([0, 3, 3]).half()):
        weights = effective_number_weights(counts, beta)
        assert weights[0] == 0
        assert bool((weights[1:] > 0).all() & weights.isfinite().all())
        assert weights.sum().item() == pytest.approx(2)
    assert effective_number_weights([7], beta).tolist() == [1.0]


def test_priors_of_huge_counts() -> None:
    """In float32 the sum of these overflows."""
    found = log_priors(torch.tensor([3e38, 3e38, 3e37]))
    torch.testing.assert_close(found.exp(), torch.tensor([10, 10, 1], dtype=torch.float64) / 21, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "counts", [[], [0, 0], [1, -1], [1.0, float("nan")], [[1, 2]], "ab", None, [True, False], [1, float("inf")]]
)
def test_counts_that_are_none(counts: Any) -> None:
    with pytest.raises(ArgumentError, match="class_counts"):
        effective_number_weights(counts)


def test_reweighting_is_deferred() -> None:
    reweighting = DeferredReweighting([3, 1], 2, beta=1.0)
    assert [reweighting(step).tolist() for step in range(4)] == [[1, 1]] * 2 + [[0.5, 1.5]] * 2


LABELS = [0] * 60 + [1] * 30 + [2] * 9 + [4] + [-1] * 5


def test_shares_of_what_is_drawn() -> None:
    labels = torch.tensor(LABELS)
    for kind, shares in ((ClassBalancedSampler, [0.25] * 4), (SquareRootSampler, [0.414, 0.293, 0.160, 0.053])):
        sampler = kind(LABELS, num_samples=8000)
        drawn = labels[torch.tensor(list(sampler))]
        found = torch.bincount(drawn, minlength=5)[[0, 1, 2, 4]] / 8000
        expected = torch.tensor(shares) / sum(shares)
        torch.testing.assert_close(sampler.probabilities.float(), expected, atol=1e-3, rtol=0.0)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)  # four standard deviations


def test_every_example_of_a_class_comes_before_one_comes_again() -> None:
    drawn = torch.bincount(torch.tensor(list(ClassBalancedSampler(LABELS, num_samples=1000))), minlength=105)
    for members in (range(60), range(60, 90), range(90, 99)):
        of_class = drawn[list(members)]
        assert int(of_class.max() - of_class.min()) <= 1
    assert int(drawn[100:].sum()) == 0


def test_draws_are_those_of_seed_and_epoch() -> None:
    sampler = ClassBalancedSampler(LABELS, seed=3)
    torch.manual_seed(0)
    first, state = list(sampler), torch.get_rng_state()
    assert first == list(sampler) == list(ClassBalancedSampler(torch.tensor(LABELS), seed=3))
    assert torch.equal(state, torch.get_rng_state())
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert len(first) == len(sampler) == len(LABELS)


@pytest.mark.parametrize(("drop_last", "each"), [(False, 4), (True, 3)])
def test_processes_share_the_draws(drop_last: bool, each: int) -> None:
    options: dict[str, Any] = {"num_samples": 11, "drop_last": drop_last}
    parts = [list(SquareRootSampler(LABELS, num_replicas=3, rank=r, **options)) for r in range(3)]
    assert [len(part) for part in parts] == [each] * 3
    alone = list(SquareRootSampler(LABELS, num_replicas=1, rank=0, num_samples=3 * each))
    assert [parts[i % 3][i // 3] for i in range(3 * each)] == alone


def test_a_loader_takes_a_sampler() -> None:
    data = TensorDataset(torch.rand(105, 1), torch.tensor(LABELS))
    loader = DataLoader(data, batch_size=50, sampler=ClassBalancedSampler(LABELS, num_samples=400))
    assert min(class_counts(loader)[[0, 1, 2, 4]].tolist()) > 60


@pytest.mark.parametrize(
    "options",
    [{"labels": [-1]}, {"num_samples": 0}, {"rank": 2, "num_replicas": 2}, {"seed": -1}, {"drop_last": 2}],
)
def test_samplers_refuse(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="ClassBalancedSampler"):
        ClassBalancedSampler(**{"labels": LABELS, **options})
