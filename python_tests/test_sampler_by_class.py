"""Anchors, replicas and noise by class: of a sampler, of a replay, and of the objective that weighs what they make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError, DTypeError, ShapeError

Y = torch.tensor([0, 0, 0, 0, 1, 1, 2, -1])
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(100, 108)


def teacher() -> tgt.Teacher:
    torch.manual_seed(0)
    return tgt.Teacher(nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(6, 3), prior="normal")


def student() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 3)


def sampler(**options: Any) -> tgt.LatentSampler:
    options = {"mode": "random", "units": "absolute", "sigma": 0.5, **options}
    return tgt.LatentSampler(teacher(), **options).calibrate([(IDS, X, Y.clamp(min=0))])


def made(explorer: Any, **options: Any) -> Any:
    return explorer(X, **{"student": student(), "sample_ids": IDS, "labels": Y, "step": 3, **options})


NUMBERS: dict[str, Any] = {
    "tensor": torch.tensor([0.0, 1.0, 3.0]),
    "array": np.array([0, 1, 3]),
    "list": [0, 1, 3],
    "tuple": (0.0, 1.0, 3.0),
    "dict": {2: 3, 0: 0},  # 1, the default, of what it leaves out
}


@pytest.mark.parametrize("form", NUMBERS)
@pytest.mark.parametrize("mode", ["random", "gradient", "persistent"])
def test_replicas_by_class(form: str, mode: str) -> None:
    """Each example is the one that a sampler with as many replicas for all makes of the same row and replica."""
    found = made(sampler(mode=mode, replicas=NUMBERS[form]))
    assert found.ids.tolist() == [104, 105, 106, 107, 106, 106]  # replica 0 of those that have one, then 1, then 2
    assert found.anchor_labels is not None
    assert found.anchor_labels.tolist() == [1, 1, 2, -1, 2, 2]
    whole = made(sampler(mode=mode, replicas=3))
    rows = [4, 5, 6, 7, 8 + 6, 16 + 6]
    torch.testing.assert_close(found.x, whole.x[rows])
    torch.testing.assert_close(found.teacher_logits, whole.teacher_logits[rows])


@pytest.mark.parametrize("mode", ["random", "gradient", "persistent"])
@pytest.mark.parametrize("units", ["std", "absolute"])
@pytest.mark.parametrize("affine", [False, True])
def test_sigma_by_class(mode: str, units: str, affine: bool) -> None:
    """A row is what a sampler with its sigma for all rows makes of it."""
    if affine and mode == "persistent":
        return
    options: dict[str, Any] = {"mode": mode, "units": units, "affine": affine, "replicas": 2}
    found = made(sampler(sigma={0: 0.25, 1: 0.5, 2: 2.0, None: 0.75}, **options))
    for label, sigma in ((0, 0.25), (1, 0.5), (2, 2.0), (-1, 0.75)):
        rows = torch.eq(Y, label).repeat(2)
        torch.testing.assert_close(found.x[rows], made(sampler(sigma=sigma, **options)).x[rows])


def test_sigma_and_replicas_together_and_by_shares() -> None:
    explorer: Any = sampler(sigma=[0.0, 1.0, 2.0], replicas=[1, 2, 3])
    found = made(explorer)
    hard = made(sampler(sigma=0.0))
    torch.testing.assert_close(found.x[:4], hard.x[:4])
    shares = nn.functional.one_hot(Y[:7], 3).float()
    again = explorer(X[:7], sample_ids=IDS[:7], labels=shares, step=3)
    assert again.anchor_labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["random", "gradient"])
def test_anchors_by_class(mode: str) -> None:
    explorer: Any = sampler(mode=mode, anchors=[0.0, 1.0, 3.0])
    assert not explorer.asks_labels
    labels = torch.cat([explorer(X, student=student(), step=step).anchor_labels for step in range(40)])
    shares = torch.bincount(labels, minlength=3) / len(labels)
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.25, 0.75]), atol=0.08, rtol=0.0)
    explorer.anchors = {1: 0, 2: 0}  # a schedule; class 0 has the default
    labels = explorer(X, student=student()).anchor_labels
    assert set(labels.tolist()) == {0}


def test_equal_weights_are_balanced_anchors_and_sigma_goes_by_theirs() -> None:
    balanced, weighted = (sampler(anchors=anchors) for anchors in ("balanced", [2.0, 2.0, 2.0]))
    first, second = (one(X, step=5) for one in (balanced, weighted))
    assert torch.equal(first.x, second.x)
    still = sampler(anchors="balanced", sigma=[0.0, 1.0, 1.0])
    found = still(X, step=5)
    rows = found.anchor_labels == 0
    torch.testing.assert_close(found.x[rows], sampler(anchors="balanced", sigma=0.0)(X, step=5).x[rows])
    torch.testing.assert_close(found.x[~rows], sampler(anchors="balanced", sigma=1.0)(X, step=5).x[~rows])


def test_a_batch_that_asks_for_nothing() -> None:
    for mode in ("random", "gradient", "persistent"):
        explorer = sampler(mode=mode, replicas=[0, 1, 1])
        assert explorer(X[:4], student=student(), sample_ids=IDS[:4], labels=Y[:4]).x.shape == (0, 6)
    objective = tgt.TGTObjective(teacher(), sampler(replicas=[0, 1, 1]))
    parts = objective(student(), X[:4], Y[:4])["parts"]
    assert parts["synthetic"] == 0
    assert parts["soft"] > 0


@pytest.mark.parametrize("mode", ["random", "gradient", "persistent"])
def test_a_resumed_sampler_goes_on(mode: str) -> None:
    def explorer() -> tgt.LatentSampler:
        return sampler(mode=mode, replicas=[1, 2, 3], sigma=[0.1, 0.2, 0.3])

    def step(one: tgt.LatentSampler) -> Tensor:
        found = one(X, student=student(), sample_ids=IDS, labels=Y)
        if mode == "persistent":
            torch.autograd.backward(student()(found.x).square().sum())
        moved: Tensor = found.x.detach()
        return moved

    first = explorer()
    step(first)
    second = explorer()
    second.load_state_dict(first.state_dict())
    assert torch.equal(step(first), step(second))
    with pytest.raises(CheckpointError, match="replicas=3, here 2"):
        sampler(mode=mode, replicas=2).load_state_dict(first.state_dict())


def test_weighted_anchors_are_saved() -> None:
    first = sampler(anchors=[1.0, 2.0, 3.0])
    second = tgt.LatentSampler(teacher(), units="absolute", sigma=0.5, anchors=[1.0, 2.0, 3.0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(X).x, second(X).x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "prior", "sigma": [1.0, 1.0]}, "sigma by class serves the modes random, gradient and persistent"),
        ({"mode": "prior", "replicas": [1, 2]}, "replicas by class serves"),
        ({"mode": "persistent", "anchors": [1.0, 2.0]}, "anchors by class serves the modes random and gradient"),
        ({"mode": "prior", "anchors": [1.0, 2.0]}, "anchors by class serves"),
        ({"anchors": "balanced", "replicas": [1, 2]}, "replicas by class are of the batch's own examples"),
        ({"anchors": [1.0, 2.0], "replicas": {1: 2}}, "replicas by class are of the batch's own examples"),
        ({"replicas": [0, 0, 0], "sigma": 1.0}, None),
        ({"replicas": {0: 0, None: 0}}, "0 for every class"),
        ({"replicas": [1, 2.5]}, "must be an integer"),
        ({"replicas": [1, -2]}, "replicas of class 1"),
        ({"replicas": [1, 1 << 20]}, "replicas of class 1"),
        ({"replicas": [3, 1], "sigma": [0.0, 1.0]}, "replicas without noise"),
        ({"replicas": 2, "sigma": [0.0, 1.0]}, "replicas without noise"),
        ({"sigma": [1.0, float("nan")]}, "sigma of class 1"),
        ({"sigma": []}, "one class at least"),
        ({"sigma": {}}, "one class at least"),
        ({"sigma": {-1: 1.0}}, "one class at least"),
        ({"sigma": torch.ones(2, 2)}, r"\(classes,\)"),
        ({"sigma": ["a", "b"]}, "sigma of class 0"),
        ({"anchors": {0: 0.0, None: 0.0}}, "weight 0 for every class"),
        ({"anchors": [-1.0, 2.0]}, "anchors of class 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], words: str | None) -> None:
    if words is None:  # rows without a label have one
        tgt.LatentSampler(teacher(), **options)
        return
    with pytest.raises(ArgumentError, match=words):
        tgt.LatentSampler(teacher(), **options)


@pytest.mark.parametrize(
    ("options", "labels", "error", "words"),
    [
        ({"replicas": [1, 2, 3]}, None, ArgumentError, "pass labels="),
        ({"sigma": [1, 2, 3]}, None, ArgumentError, "pass labels="),
        ({"sigma": [1, 2]}, Y, ArgumentError, "numbers for 2 classes, label 2"),
        ({"sigma": [1, 2, 3]}, Y[:3], ShapeError, "one class an example"),
        ({"sigma": [1, 2, 3]}, Y > 0, DTypeError, "classes"),
        ({"sigma": [1, 2, 3]}, Y.tolist(), DTypeError, "classes"),
        ({"anchors": [1.0]}, None, ArgumentError, "numbers for 1 classes"),
        ({"anchors": {0: 0, 1: 0, 2: 0}}, None, ArgumentError, "every class that calibrate met"),
    ],
)
def test_labels_that_do_not_fit(options: Any, labels: Any, error: type[Exception], words: str) -> None:
    explorer = sampler(**options)
    with pytest.raises(error, match=words):
        explorer(X, labels=labels)


def test_options_by_class_are_read_and_changed() -> None:
    explorer = sampler(sigma=[1.0, 2.0])
    assert "sigma=[1, 2]" in repr(explorer)
    explorer.sigma = {3: 4.0}
    assert "sigma=[1, 1, 1, 4] else 1" in repr(explorer)
    explorer.sigma = explorer.sigma
    explorer.sigma = 0.5
    assert not explorer.asks_labels


def objective(weight: Any = 1.0, **options: Any) -> tgt.TGTObjective:
    return tgt.TGTObjective(teacher(), sampler(**options), synthetic_weight=weight)


def test_the_objective_passes_labels_and_counts_what_is_made() -> None:
    given: dict[str, Any] = {"sample_ids": IDS, "step": 3}
    by_class = objective(replicas=[1, 2, 3])
    found = by_class(student(), X, Y, **given)["parts"]["synthetic"]
    made_rows = made(sampler(replicas=[1, 2, 3]))
    loss = tgt.DistillationLoss(temperature=2.0)(student()(made_rows.x), made_rows.teacher_logits)
    torch.testing.assert_close(found, loss.detach())

    n, m = by_class.normalizers([(IDS[:5], X[:5], Y[:5]), (IDS[5:], X[5:], Y[5:])])
    assert (n.item(), m.item()) == (8, 4 + 4 + 3 + 1)
    parts = [
        by_class(student(), X[rows], Y[rows], sample_ids=IDS[rows], step=3, normalizer=n, synthetic_normalizer=m)
        for rows in (slice(0, 5), slice(5, 8))
    ]
    torch.testing.assert_close(sum(part["parts"]["synthetic"] for part in parts), found)
    assert by_class(student(), X, None, **given)["parts"]["synthetic"] > 0  # no labels: one each


def test_a_weight_of_each_synthetic_example() -> None:
    seen: list[tgt.Synthetic] = []

    def of_tail(synthetic: tgt.Synthetic) -> Tensor:
        seen.append(synthetic)
        assert synthetic.anchor_labels is not None
        return torch.where(torch.eq(synthetic.anchor_labels, 2), 3.0, 0.5)

    given: dict[str, Any] = {"sample_ids": IDS, "step": 3}
    options = {"replicas": [1, 2, 3]}
    found = objective(of_tail, **options)(student(), X, Y, **given)
    rows = tgt.DistillationLoss(temperature=2.0, reduction="none")(student()(seen[0].x), seen[0].teacher_logits)
    expected = (rows * of_tail(seen[0])).sum() / len(rows)
    torch.testing.assert_close(found["parts"]["synthetic"], expected.detach())
    total = found["parts"]["hard"] + found["parts"]["soft"] + found["parts"]["synthetic"]
    torch.testing.assert_close(found["loss"].detach(), total)
    halves: Any = (
        lambda s: 0.5,
        lambda s: torch.tensor(0.5),
        lambda s: torch.full_like(s.ids, 0.5, dtype=torch.double),
    )
    for weight in halves:
        half = objective(weight, **options)(student(), X, Y, **given)["parts"]["synthetic"]
        torch.testing.assert_close(half, objective(0.5, **options)(student(), X, Y, **given)["parts"]["synthetic"])


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (lambda s: torch.ones(3), ShapeError, r"\(8,\), one an example"),
        (lambda s: -torch.ones(8), ArgumentError, "synthetic_weight returned"),
        (lambda s: -1.0, ArgumentError, "synthetic_weight returned"),
        (lambda s: "much", ArgumentError, "synthetic_weight returned"),
        (-1.0, ArgumentError, "synthetic_weight"),
    ],
)
def test_weights_that_are_none(weight: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        objective(weight)(student(), X, Y)


def test_fit_explores_by_class_with_prefetch_and_resumes(tmp_path: Any) -> None:
    def trained(steps: int, folder: str, prefetch: int = 0, resume: bool = False) -> Tensor:
        model: Any = student()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        aim: Any = objective(lambda s: torch.ones(len(s.ids)), replicas=[1, 2, 3], sigma={2: 1.0})
        data = [(IDS[:4], X[:4], Y[:4]), (IDS[4:], X[4:], Y[4:])]
        tgt.fit(
            model, aim, data, optimizer=optimizer, steps=steps, seed=0, prefetch=prefetch, progress=False,
            checkpoint_dir=tmp_path / folder, checkpoint_every=3, resume=resume,
        )  # fmt: skip
        return torch.cat([model.weight.flatten(), model.bias]).detach()

    whole = trained(6, "whole")
    assert torch.equal(whole, trained(6, "ahead", prefetch=2))
    trained(3, "parts")
    assert torch.equal(whole, trained(6, "parts", resume=True))


def test_replay_serves_classes_by_weight() -> None:
    explorer = sampler(sigma=2.0)
    replay = tgt.SyntheticReplay(explorer, reuse=2, by_class=[1.0, 2.0, 0.0], capacity=512)
    uniform = tgt.SyntheticReplay(explorer, reuse=1)
    x = torch.randn(64, 6) * 3
    for step in range(3):
        uniform(x, step=step)
    held = torch.tensor(uniform.statistics()["share_by_class"])
    assert bool((held[:2] > 0.05).all())  # there is something to weigh
    labels = []
    for step in range(24):
        served = replay(x, step=step)
        if step >= 8:
            labels.append(served.teacher_logits[32:].argmax(1))
    shares = torch.bincount(torch.cat(labels), minlength=3) / (16 * 32)
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 2 / 3, 0.0]), atol=0.08, rtol=0.0)
    state = replay.state_dict()
    again = tgt.SyntheticReplay(sampler(sigma=2.0), reuse=2, by_class=[1.0, 2.0, 0.0], capacity=512)
    again.load_state_dict(state)
    assert torch.equal(replay(x, step=24).x, again(x, step=24).x)
    assert "by_class=[1, 2, 0]" in repr(again)
    balanced = tgt.SyntheticReplay(explorer, by_class="balanced")
    assert balanced(X).x.shape == X.shape


def test_replay_of_replicas_by_class() -> None:
    replay = tgt.SyntheticReplay(sampler(replicas=[0, 2, 3]), reuse=4)
    for step in range(6):
        served = replay(X, sample_ids=IDS, labels=Y, step=step)
        if step >= 3:  # by then all rows have had their turn
            assert served.x.shape[0] == 2 + 2 + 3 + 1
    assert replay(X[:4], sample_ids=IDS[:4], labels=Y[:4]).x.shape[0] in (0, 1)
    with pytest.raises(ArgumentError, match="pass labels="):
        replay(X)


@pytest.mark.parametrize("by_class", ["alike", [], [0.0, 0.0, 0.0, None], {0: 0.0, None: 0.0}, [-1.0]])
def test_replay_refuses_weights(by_class: Any) -> None:
    with pytest.raises(ArgumentError, match="by_class"):
        tgt.SyntheticReplay(sampler(), by_class=by_class)


def test_replay_needs_a_weight_of_each_class() -> None:
    replay = tgt.SyntheticReplay(sampler(), by_class=[1.0, 1.0], reuse=2)
    with pytest.raises(ArgumentError, match="2 weights, the labeler 3 classes"):
        replay(X)


def test_terms_of_synthetic_rows_have_their_weights() -> None:
    def weight(synthetic: tgt.Synthetic) -> Tensor:
        return torch.arange(len(synthetic.ids)) / 4.0

    loss = tgt.losses.WTTM()
    aim = tgt.TGTObjective(
        teacher(), sampler(), synthetic_weight=weight, terms=[tgt.Term(loss, rows="synthetic", name="wttm")]
    )
    parts: Any = aim(student(), X, Y, sample_ids=IDS, step=3)["parts"]
    synthetic = made(sampler())
    rows = tgt.losses.WTTM(reduction="none")(student()(synthetic.x), synthetic.teacher_logits)
    torch.testing.assert_close(parts["wttm"], (rows * weight(synthetic)).mean().detach())
