"""Terms of the objective beside its own: what they see, how they add up, what a checkpoint keeps of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_kit import CLASSES, FEATURES, make_data, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast import losses as L
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.teacher.batches import Batch

X, Y = make_data(9)
IDS = torch.arange(9)


def student() -> nn.Sequential:
    return make_student(batch_norm=False, dropout=0.0)


def sampler_of(teacher: tgt.Teacher, **options: Any) -> tgt.LatentSampler:
    return tgt.LatentSampler(teacher, sigma=0.7, units="absolute", seed=3, **options)


def test_the_terms_are_added_up_with_weights_and_schedules() -> None:
    teacher, model = make_teacher(), student()
    sampler = sampler_of(teacher, replicas=2)
    terms = [
        tgt.Term(L.NKD(), 0.5, L.warmup(8)),
        tgt.Term(L.NKD(), 2.0, rows="real"),
        tgt.Term(L.WTTM(), rows="synthetic", name="unsure"),
        tgt.Term(tgt.DistillationLoss("jsd", hard_weight=1.0), 0.25),
    ]
    objective = tgt.TGTObjective(teacher, sampler, synthetic_weight=0.5, terms=terms)
    made = sampler(X, sample_ids=IDS, step=2)
    s, t, s2, t2 = model(X), teacher.label(X), model(made.x), made.teacher_logits
    expected = {
        "NKD": 0.5 * 0.25 * (L.NKD()(s, t, Y) + 0.5 * L.NKD()(s2, t2)),
        "NKD_2": 2.0 * L.NKD()(s, t, Y),
        "unsure": 0.5 * L.WTTM()(s2, t2),
        "DistillationLoss": 0.25 * (terms[3].loss(s, t, Y) + 0.5 * tgt.distillation_loss(s2, t2, divergence="jsd")),
    }
    out = objective(model, X, Y, sample_ids=IDS, step=2)
    parts: Any = out["parts"]
    assert list(parts) == ["hard", "soft", "synthetic", *expected]
    for name, value in expected.items():
        assert value > 1e-4
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-5, atol=1e-7)
        assert not parts[name].requires_grad
    torch.testing.assert_close(out["loss"].detach(), sum(parts.values()))
    plain: Any = tgt.TGTObjective(teacher, sampler, synthetic_weight=0.5)(model, X, Y, sample_ids=IDS, step=2)
    whole = plain["loss"] + sum(expected.values())
    torch.testing.assert_close(out["loss"], whole)
    by_hand = torch.autograd.grad(whole, list(model.parameters()))
    for found, wanted in zip(torch.autograd.grad(out["loss"], list(model.parameters())), by_hand, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_loss_of_pairs_sees_real_and_synthetic_rows_in_one_batch() -> None:
    teacher, model = make_teacher(), student()
    sampler = sampler_of(teacher)
    loss = L.MLKDBatch()
    made = sampler(X, sample_ids=IDS, step=0)
    y = Y.clone()
    y[3] = -100
    weight = torch.ones(9)
    weight[5] = 0.5
    labels = torch.cat([y, torch.full((9,), -1)])
    weights = torch.cat([weight, torch.ones(9)])
    costs, counted = loss.rows(
        model(torch.cat([X, made.x])), torch.cat([teacher.label(X), made.teacher_logits]), labels, weight=weights
    )
    expected = (costs * counted)[:9].sum() / 7.5 + 0.25 * costs[9:].mean()
    objective = tgt.TGTObjective(teacher, sampler, synthetic_weight=0.25, terms=[tgt.Term(loss)])
    parts: Any = objective(model, X, y, sample_ids=IDS, step=0, sample_weight=weight)["parts"]
    torch.testing.assert_close(parts["MLKDBatch"], expected.detach(), rtol=1e-5, atol=1e-7)


def test_micro_batches_are_one_batch() -> None:
    """By the divisors of the objective, also where rows are ignored."""
    teacher, model = make_teacher(), student()
    y = Y.clone()
    y[:3] = -100
    objective = tgt.TGTObjective(
        teacher, sampler_of(teacher), terms=[tgt.Term(L.WTTM(), 3.0), tgt.Term(L.EmbeddingDistillation("l2"))]
    )
    whole: Any = objective(model, X, y, sample_ids=IDS, step=0)["parts"]
    pieces = [slice(0, 4), slice(4, 9)]
    real, made = objective.normalizers([Batch(IDS[p], X[p], y[p]) for p in pieces])
    found: dict[str, Any] = {}
    for piece in pieces:
        parts: Any = objective(
            model, X[piece], y[piece], sample_ids=IDS[piece], step=0, normalizer=real, synthetic_normalizer=made
        )["parts"]
        found = {name: found.get(name, 0) + part for name, part in parts.items()}
    for name, part in whole.items():
        torch.testing.assert_close(found[name], part, rtol=1e-5, atol=1e-7)


def test_losses_of_the_long_tail_are_terms() -> None:
    """They see labels alone, divide as the hard term does, and micro-batches are one batch."""
    teacher, model = make_teacher(), student()
    y = Y.clone()
    y[0], y[4] = -100, -1
    shares = torch.arange(1.0, CLASSES + 1)
    loss = tgt.long_tail.LogitAdjustmentLoss(range(1, CLASSES + 1), class_weight=shares)
    terms = [tgt.Term(loss, 2.0), tgt.Term(tgt.long_tail.LogitAdjustmentLoss([1] * CLASSES), name="plain")]
    own = tgt.DistillationLoss(hard_weight=1.0)
    objective = tgt.TGTObjective(teacher, sampler_of(teacher), loss=own, terms=terms)
    weight = torch.linspace(0.5, 1.5, 9)
    whole: Any = objective(model, X, y, sample_ids=IDS, step=0, sample_weight=weight)["parts"]
    kept = y >= 0
    logits = model(X)[kept] + (torch.arange(1.0, CLASSES + 1) / sum(range(1, CLASSES + 1))).log()
    costs = nn.functional.cross_entropy(logits, y[kept], reduction="none") * weight[kept] * shares[y[kept]]
    torch.testing.assert_close(whole["LogitAdjustmentLoss"], (2 * costs.sum() / weight[1:].sum()).detach())
    torch.testing.assert_close(whole["plain"], whole["hard"])
    whole = objective(model, X, y, sample_ids=IDS, step=0)["parts"]
    pieces = [slice(0, 5), slice(5, 9)]
    real, made = objective.normalizers([Batch(IDS[p], X[p], y[p]) for p in pieces])
    found = 0.0
    for p in pieces:
        parts: Any = objective(
            model, X[p], y[p], sample_ids=IDS[p], step=0, normalizer=real, synthetic_normalizer=made
        )["parts"]
        found += parts["LogitAdjustmentLoss"]
    torch.testing.assert_close(found, whole["LogitAdjustmentLoss"])


@pytest.mark.parametrize("max_batch", [None, 4])
def test_features_of_both_sides(max_batch: int | None) -> None:
    teacher, model = make_teacher(max_batch=max_batch), student()
    sampler = sampler_of(teacher, mode="gradient", step_size=0.1)
    torch.manual_seed(0)
    hint = L.EmbeddingDistillation(projection=nn.Linear(10, 8))
    labeler: Any = teacher.labeler
    terms = [
        tgt.Term(hint, 0.5, features=("1", "1")), tgt.Term(L.RKDDistance(), features=(model[0], labeler[0])),
        tgt.Term(L.RKDAngle(), features=("1", "1"), rows="real"),
    ]  # fmt: skip
    objective = tgt.TGTObjective(teacher, sampler, terms=terms)
    made = sampler(X, student=model, sample_ids=IDS, step=0)
    ours, theirs = ([side[:2](x) for x in (X, made.x)] for side in (model, labeler))
    first = [side[0](torch.cat([X, made.x])) for side in (model, labeler)]
    expected = {
        "EmbeddingDistillation": 0.5 * (hint(ours[0], theirs[0], Y) + hint(ours[1], theirs[1])),
        "RKDDistance": 2 * L.RKDDistance()(*first),  # n = m: two means of halves
        "RKDAngle": L.RKDAngle()(ours[0], theirs[0]),
    }
    out: Any = objective(model, X, Y, sample_ids=IDS, step=0)
    parts = out["parts"]
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-5, atol=1e-7)
    out["loss"].backward()
    assert {id(p) for p in objective.parameters()} == {id(p) for p in hint.parameters()}
    assert all(p.grad is not None for p in objective.parameters())
    assert not any(module._forward_hooks for module in (*model.modules(), *labeler.modules()))


def test_features_beside_a_cache_are_those_of_the_labeler(tmp_path: Path) -> None:
    teacher, model = make_teacher(), student()
    cache = tgt.TeacherCache(tmp_path / "cache", teacher, k=None, dtype=None)
    term = tgt.Term(L.SimilarityPreserving(), features=("0", "0"))
    plain: Any = tgt.TGTObjective(teacher, terms=[term])(model, X, Y)["parts"]
    objective = tgt.TGTObjective(teacher, cache=cache, terms=[term])
    for _ in range(2):  # the second has every row in the cache
        parts: Any = objective(model, X, Y, sample_ids=IDS)["parts"]
        torch.testing.assert_close(parts["SimilarityPreserving"], plain["SimilarityPreserving"])


def test_what_features_are_refused() -> None:
    teacher, model = make_teacher(), student()
    for features, match in ((("9", "0"), "student has no submodule '9'"), (("0", "head"), "labeler has no submodule")):
        objective = tgt.TGTObjective(teacher, terms=[tgt.Term(L.RKDAngle(), features=features)])
        with pytest.raises(ArgumentError, match=match):
            objective(model, X, Y)
    apart = nn.Linear(2, 2)
    objective = tgt.TGTObjective(teacher, terms=[tgt.Term(L.RKDAngle(), features=(apart, "0"))])
    with pytest.raises(ArgumentError, match="Linear of the student returned no features"):
        objective(model, X, Y)


def test_balance_makes_all_pull_equally() -> None:
    teacher, model = make_teacher(), student()
    balance = L.GradientBalance()
    terms = [tgt.Term(L.WTTM(), name="small"), tgt.Term(L.NKD(gamma=100.0), 2.0, name="large")]
    objective = tgt.TGTObjective(teacher, terms=terms, balance=balance)
    weight: Any = model[-1].weight
    plain = tgt.TGTObjective(teacher)(model, X, Y)["loss"]
    values = [plain, L.WTTM()(model(X), teacher.label(X)), L.NKD(gamma=100.0)(model(X), teacher.label(X), Y)]
    norms = torch.stack([torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in values])
    assert norms.max() > 10 * norms.min()
    factors = (1 / norms) / (1 / norms).sum()
    out: Any = objective(model, X, Y)
    parts = out["parts"]
    torch.testing.assert_close(parts["hard"] + parts["soft"], (factors[0] * values[0]).detach())
    torch.testing.assert_close(parts["small"], (factors[1] * values[1]).detach())
    torch.testing.assert_close(parts["large"], (2 * factors[2] * values[2]).detach())
    torch.testing.assert_close(out["loss"].detach(), sum(parts.values()))
    out["loss"].backward()
    with torch.no_grad():
        objective(model, X, Y)  # nothing to balance by
    w = nn.Linear(2, 2, bias=False)
    first = {"a": w.weight.sum(), "b": 0.0 * w.weight.sum()}
    found = L.GradientBalance(momentum=0.5)
    assert [float(f) for f in found(w, first).values()] == [1.0, 0.5]
    found(w, {"a": 3 * w.weight.sum(), "b": 1 * w.weight.sum()})
    assert found.state_dict()["norms"]["a"].item() == pytest.approx(4.0)


def run(terms: list[tgt.Term], folder: Path, steps: int, resume: bool = False) -> tuple[Any, Any, Any]:
    teacher, model = make_teacher(), make_student()
    objective: Any = tgt.TGTObjective(
        teacher, sampler_of(teacher), terms=terms, balance=L.GradientBalance(momentum=0.9) if terms else None
    )
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=0.02)
    result = tgt.fit(
        model, objective, [(IDS, X, Y)], steps=steps, optimizer=optimizer, progress=False, seed=1, eval_every=2,
        checkpoint_dir=folder, resume=resume,
    )  # fmt: skip
    return result, model, objective


def fresh() -> list[tgt.Term]:
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        hint = L.EmbeddingDistillation(projection=nn.Linear(10, 8))
    return [tgt.Term(hint, features=("0", "0"), schedule=L.warmup(4)), tgt.Term(L.DIST())]


def test_fit_and_its_checkpoints(tmp_path: Path) -> None:
    whole, model, objective = run(fresh(), tmp_path / "whole", 4)
    assert {"EmbeddingDistillation", "DIST"} <= set(whole.history[-1])
    run(fresh(), tmp_path / "parts", 2)
    _, again, resumed = run(fresh(), tmp_path / "parts", 4, resume=True)
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for mine, other in zip(objective.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert objective.state_dict()["terms"]["balance"] == resumed.state_dict()["terms"]["balance"]
    for other in ([], [tgt.Term(L.DIST())]):
        with pytest.raises(CheckpointError, match=r"objective|optimizer"):
            run(other, tmp_path / "parts", 5, resume=True)


def test_calls_are_counted_where_no_step_is_given_and_kept() -> None:
    objective = tgt.TGTObjective(make_teacher(), terms=[tgt.Term(L.WTTM(), schedule=L.warmup(4), name="w")])
    model, found = student(), []
    for _ in range(3):
        parts: Any = objective(model, X, Y)["parts"]
        found.append(float(parts["w"]))
    assert found[0] == 0
    assert found[2] == pytest.approx(2 * found[1])
    other = tgt.TGTObjective(make_teacher(), terms=[tgt.Term(L.WTTM(), schedule=L.warmup(4), name="w")])
    other.load_state_dict(objective.state_dict())
    third: Any = other(model, X, Y)["parts"]
    assert float(third["w"]) == pytest.approx(3 * found[1])
    other.terms = [tgt.Term(L.DIST())]
    assert "DIST" in other(model, X, Y)["parts"]
    with pytest.raises(ArgumentError, match="the state is of the terms"):
        other.load_state_dict(objective.state_dict())


def test_sequences_and_features_of_examples() -> None:
    """Labels a position beside features an example: an example counts if one of its positions does."""
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), Sequences())
    model = Sequences()
    y = torch.randint(CLASSES, (3, 5))
    y[1] = -100
    term = tgt.Term(L.FitNets(), features=("first", "first"))
    parts: Any = tgt.TGTObjective(teacher, terms=[term])(model, torch.randn(3, 5, FEATURES), y)["parts"]
    x = torch.randn(3, 5, FEATURES)
    parts = tgt.TGTObjective(teacher, terms=[term])(model, x, y)["parts"]
    labeler: Any = teacher.labeler
    expected = L.FitNets()(model.first(x), labeler.first(x), weight=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(parts["FitNets"], expected.detach())


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.first(x).tanh())
        return made


def test_terms_and_what_is_refused() -> None:
    teacher, model = make_teacher(), student()
    assert "weight=2.0" in repr(tgt.Term(L.DIST(), 2.0, rows="real", features=("0", "0"), name="d"))
    assert pickle.loads(pickle.dumps(L.warmup(4)))(2) == 0.5
    for bad, match in (
        ({"weight": -1}, "weight"), ({"rows": "both"}, "rows"), ({"schedule": 3}, "schedule"),
        ({"features": "0"}, "features"), ({"name": "a b"}, "name"), ({"loss": L.DIST(reduction="sum")}, "reduction"),
        ({"loss": L.DIST}, "loss"), ({"loss": tgt.DistillationLoss(return_stats=True)}, "statistics"),
    ):  # fmt: skip
        options: dict[str, Any] = {"loss": L.DIST(), **bad}
        with pytest.raises(ArgumentError, match=match):
            tgt.Term(**options)
    inplace = tgt.DistillationLoss(inplace=True)
    for options in (
        {"terms": L.DIST()}, {"terms": [L.DIST()]}, {"balance": 1}, {"terms": [tgt.Term(L.DIST(), name="soft")]},
        {"terms": [tgt.Term(L.DIST(), name="a"), tgt.Term(L.DIST(), name="a")]},
        {"terms": [tgt.Term(L.DIST())], "loss": inplace},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="TGTObjective"):
            tgt.TGTObjective(teacher, **options)
    falling = tgt.TGTObjective(teacher, terms=[tgt.Term(L.DIST(), schedule=lambda step: -1.0)])
    with pytest.raises(ArgumentError, match="schedule"):
        falling(model, X, Y)
    unweighted = tgt.TGTObjective(teacher, terms=[tgt.Term(lambda s, t, y: (s - t).square().mean())])
    with pytest.raises(ArgumentError, match="does not take"):
        unweighted(model, X, Y, sample_weight=torch.ones(9))
    lost = tgt.TGTObjective(teacher, terms=[tgt.Term(L.DIST())], balance=L.GradientBalance("head"))
    with pytest.raises(ArgumentError, match="no parameter 'head'"):
        lost(model, X, Y)
