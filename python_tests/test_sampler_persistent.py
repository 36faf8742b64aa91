"""Persistent exploration: chains that the user's own backward moves, restarts, and a bank with a bound."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.explore import LatentSampler
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.ops.latent import perturb_latents
from tgt_fast.teacher import Latents, Teacher

X = toys.normal(8, toys.FEATURES)
IDS = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])


def persistent(teacher: Teacher | None = None, **options: Any) -> LatentSampler:
    settings: dict[str, Any] = {"restart_probability": 0.0, "step_size": 0.3, "sigma": 0.5, **options}
    sampler = LatentSampler(teacher or toys.vector_teacher(), "persistent", **settings)
    return sampler.calibrate([toys.normal(64, toys.FEATURES, seed=9)])


def disagreement(student: nn.Module, made: Synthetic) -> Tensor:
    return distillation_loss(student(made.x), made.teacher_logits, reduction="none")


def places(sampler: LatentSampler) -> dict[int, Tensor]:
    """The place of each chain of the bank."""
    state = sampler.state_dict()
    chains, z = state["bank_chains"], state["bank_latents"]
    assert isinstance(chains, Tensor)
    assert isinstance(z, Tensor)
    return dict(zip(chains.tolist(), z.clone(), strict=True))


def standing(sampler: LatentSampler, ids: Tensor = IDS) -> Tensor:
    found = places(sampler)
    return torch.stack([found[i] for i in ids.tolist()])


def test_a_backward_pass_moves_the_chains_up_the_disagreement() -> None:
    sampler, student = persistent(step_size=0.1), toys.student().eval()
    values = []
    for _ in range(6):
        made = sampler(X, sample_ids=IDS)
        value = disagreement(student, made)
        value.mean().backward()
        values.append(value.detach())
    assert all((b > a).all() for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("by_backward", [False, True])
def test_chains_move_where_the_latents_gradient_is_asked_for_alone(by_backward: bool) -> None:
    """As documented: a backward pass for the parameters only passes the latents by."""
    sampler, student = persistent(), toys.student().eval()
    parameters = list(student.parameters())
    made = sampler(X, sample_ids=IDS)
    value, before = disagreement(student, made).mean(), standing(sampler)
    for asked, moves in ((parameters, False), ([*parameters, made.latents.z], True)):
        if by_backward:
            value.backward(inputs=asked, retain_graph=True)
        else:
            torch.autograd.grad(value, asked, retain_graph=True)
        assert bool((standing(sampler) != before).any()) == moves


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_move_is_the_documented_step(norm: str) -> None:
    sampler, student = persistent(norm=norm), toys.student().eval()
    made = sampler(X, sample_ids=IDS)
    assert torch.equal(standing(sampler), made.latents.z.detach())
    value = disagreement(student, made).mean()
    (slope,) = torch.autograd.grad(value, made.latents.z, retain_graph=True)
    value.backward()
    assert sampler.scale is not None
    u = sampler.scale * slope
    direction = u / u.norm(dim=1, keepdim=True) if norm == "l2" else u.sign()
    expected = made.latents.z.detach() + 0.3 * sampler.scale * direction
    torch.testing.assert_close(standing(sampler), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampler(X, sample_ids=IDS).latents.z, expected, rtol=1e-4, atol=1e-5)


def test_one_backward_gives_the_student_the_gradients_it_would_have_had() -> None:
    teacher, student = toys.vector_teacher(), toys.student().eval()
    made = persistent(teacher)(X, sample_ids=IDS)
    disagreement(student, made).mean().backward()
    shared = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    constant = Synthetic(made.x.detach(), made.latents, made.teacher_logits.detach(), "", made.ids)
    disagreement(student, constant).mean().backward()
    for a, b in zip(shared, [p.grad for p in student.parameters()], strict=True):
        torch.testing.assert_close(a, b)
    assert all(t.grad is None for t in teacher.frozen_tensors())


def test_moves_do_not_depend_on_loss_scale_accumulation_or_how_the_backward_is_cut() -> None:
    student = toys.student().eval()

    def losses(made: Synthetic) -> tuple[Tensor, Tensor]:
        """Two that pull in different directions."""
        logits = student(made.x)
        return disagreement(student, made).sum(), 0.3 * logits.square().sum()

    def moved(how: str) -> Tensor:
        sampler = persistent()
        if how == "accumulated":  # micro-batches, one optimizer step
            for rows in torch.arange(8).split(3):
                (sum(losses(sampler(X[rows], sample_ids=IDS[rows], step=0))) / 8).backward()
            return standing(sampler)
        first, second = losses(sampler(X, sample_ids=IDS))
        if how == "cut":  # two losses of the same examples, backpropagated apart
            first.backward(retain_graph=True)
            second.backward()
        else:
            ((first + second) * (65536.0 if how == "scaled" else 1.0)).backward()
        return standing(sampler)

    whole = moved("whole")
    for how in ("scaled", "accumulated", "cut"):
        torch.testing.assert_close(moved(how), whole, rtol=1e-4, atol=1e-5)


def test_without_a_backward_and_with_an_unusable_gradient_the_chains_stay() -> None:
    sampler, student = persistent(), toys.student().eval()
    start = sampler(X, sample_ids=IDS).latents.z.detach().clone()
    made = sampler(X, sample_ids=IDS)
    assert torch.equal(made.latents.z.detach(), start)
    (disagreement(student, made).sum() * float("inf")).backward()
    assert torch.equal(standing(sampler), start)


def test_only_examples_that_start_are_encoded() -> None:
    encoded: list[int] = []

    def encoder(x: Tensor) -> Tensor:
        encoded.append(x.shape[0])
        return x[:, : toys.LATENT]

    teacher = Teacher(encoder, nn.Linear(toys.LATENT, toys.FEATURES), toys.labeler())
    sampler = LatentSampler(teacher, "persistent", restart_probability=0.0, units="absolute")
    sampler(X[:5], sample_ids=IDS[:5])
    sampler(X, sample_ids=IDS)
    sampler(X, sample_ids=IDS)
    assert encoded == [5, 3]


def test_restarts_come_with_their_probability_and_by_id_alone() -> None:
    x, ids = torch.zeros(4000, toys.FEATURES), torch.arange(4000)
    fractions = {}
    teacher = toys.vector_teacher()
    for p in (0.0, 0.3, 1.0):
        sampler = persistent(teacher, restart_probability=p)
        sampler(x, sample_ids=ids, step=0)
        restarted = []
        for step in (1, 2):
            before = standing(sampler, ids)
            z = sampler(x, sample_ids=ids, step=step).latents.z.detach()
            restarted.append((z != before).any(1))
        fractions[p] = [r.double().mean().item() for r in restarted]
        if p == 0.3:
            both = (restarted[0] & restarted[1]).double().mean().item()
            assert both == pytest.approx(0.09, abs=0.02)  # 4 standard deviations: the steps are independent
            other = persistent(teacher, restart_probability=p)
            turned = torch.flip(ids, [0])
            other(x, sample_ids=turned, step=0)
            again = other(x, sample_ids=turned, step=1).latents.z.detach()
            first = persistent(teacher, restart_probability=p)
            first(x, sample_ids=ids, step=0)
            torch.testing.assert_close(again, first(x, sample_ids=ids, step=1).latents.z.detach().flip(0))
    assert fractions[0.0] == [0, 0]
    assert fractions[1.0] == [1, 1]
    assert all(f == pytest.approx(0.3, abs=0.03) for f in fractions[0.3])


def test_a_restart_begins_at_the_encoding_plus_noise_of_its_step() -> None:
    teacher = toys.vector_teacher()
    sampler = persistent(teacher, restart_probability=1.0, sigma=2.0)
    x, ids = toys.normal(1, toys.FEATURES).expand(3000, -1), torch.arange(3000)
    assert sampler.scale is not None
    noise = [(sampler(x, sample_ids=ids).latents.z - teacher.encode(x).z) / sampler.scale for _ in range(2)]
    for z in noise:
        torch.testing.assert_close(z.std(0), torch.full((4,), 2.0), rtol=0.1, atol=0)
    assert abs((noise[0] * noise[1]).mean().item()) < 0.2  # independent from step to step: 4 standard errors


def test_which_chains_restart_says_nothing_about_their_noise() -> None:
    x, ids = torch.zeros(4000, toys.FEATURES), torch.arange(4000)
    sampler = persistent(restart_probability=0.3, sigma=1.0, units="absolute")
    before = sampler(x, sample_ids=ids, step=0).latents.z.detach()
    after = sampler(x, sample_ids=ids, step=1).latents.z.detach()
    noise = (after - sampler.teacher.encode(x).z)[(after != before).any(1)]
    torch.testing.assert_close(noise.std(0), torch.ones(4), rtol=0.08, atol=0)  # 4 standard errors
    torch.testing.assert_close(noise.mean(0), torch.zeros(4), rtol=0, atol=0.12)


def test_restart_noise_is_a_stream_of_its_own() -> None:
    teacher = toys.vector_teacher()
    options: dict[str, Any] = {"seed": 4, "units": "absolute", "sigma": 0.5}
    z = LatentSampler(teacher, "persistent", **options)(X, sample_ids=IDS, step=2).latents.z.detach()
    key: dict[str, Any] = {"seed": 4, "sample_ids": IDS, "step": 2}
    assert torch.equal(z, perturb_latents(teacher.encode(X).z, 0.5, op="restart", **key))
    assert not torch.equal(z, perturb_latents(teacher.encode(X).z, 0.5, **key))


def test_the_bank_is_bounded_and_forgets_the_longest_unvisited() -> None:
    sampler = persistent(bank_size=4)
    for ids in ([0, 1, 2], [3, 0], [7, 8]):  # 1 and 2 are the longest unvisited when 7 and 8 come
        sampler(X[: len(ids)], sample_ids=torch.tensor(ids))
    assert set(places(sampler)) == {3, 0, 7, 8}
    with pytest.raises(ArgumentError, match="one call visits 8 chains, but bank_size is 4"):
        sampler(X, sample_ids=IDS)
    assert set(places(sampler)) == {3, 0, 7, 8}


def test_chains_keep_their_place_through_growth_and_eviction() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler, expected = persistent(bank_size=12), {}
    for _ in range(60):
        ids = torch.randperm(30, generator=generator)[:5]
        known = places(sampler) if expected else {}
        z = sampler(X[:5], sample_ids=ids).latents.z.detach()
        for row, i in enumerate(ids.tolist()):
            assert i not in known or torch.equal(z[row], expected[i])
            expected[i] = z[row].clone()
        assert len(places(sampler)) <= 12


def test_a_late_backward_moves_neither_the_evicted_nor_the_revisited() -> None:
    sampler, student = persistent(bank_size=8), toys.student().eval()
    late = sampler(X[:3], sample_ids=torch.tensor([0, 1, 2]))
    sampler(X[:1], sample_ids=torch.tensor([0]))
    sampler(X[:6], sample_ids=torch.arange(10, 16))  # 8 chains fit: 1 is evicted
    before = places(sampler)
    assert set(before) == {0, 2, *range(10, 16)}
    disagreement(student, late).sum().backward()
    after = places(sampler)
    changed = {i for i in before if not torch.equal(before[i], after[i])}
    assert changed == {2}
    assert after.keys() == before.keys()


def test_each_replica_has_a_chain_of_its_own() -> None:
    sampler, student = persistent(replicas=2), toys.student().eval()
    made = sampler(X, sample_ids=IDS)
    assert len(places(sampler)) == 16
    disagreement(student, made).mean().backward()
    again = sampler(X.flip(0), sample_ids=IDS.flip(0)).latents.z.detach()
    moved = (again.reshape(2, 8, -1).flip(1).reshape(16, -1) - made.latents.z.detach()) / sampler.scale
    torch.testing.assert_close(moved.norm(dim=1), torch.full((16,), 0.3), rtol=1e-3, atol=0)


def test_the_trust_region_is_round_the_encoding_that_the_chain_started_from() -> None:
    teacher, student = toys.vector_teacher(), toys.student().eval()
    sampler = persistent(teacher, radius=0.5, sigma=0.1, step_size=1.0)
    anchors = teacher.encode(X).z
    for _ in range(4):  # the examples change, as under augmentation: the chain's anchor does not
        disagreement(student, sampler(X + 3 * (_ > 0), sample_ids=IDS)).sum().backward()
    assert sampler.scale is not None
    distance = ((standing(sampler) - anchors) / sampler.scale).norm(dim=1)
    assert (distance <= 0.5 + 1e-4).all()
    assert (distance > 0.49).any()


def test_sequences_keep_their_chains_in_batches_of_other_lengths() -> None:
    teacher, student = toys.sequence_teacher(), toys.seeded(toys.SequenceClassifier, 6)
    options: dict[str, Any] = {
        "restart_probability": 0.0,
        "step_size": 0.3,
        "radius": 2.0,
        "units": "absolute",
    }
    batch, ids = toys.sequences([2, 3, 6, 1]), torch.arange(4)

    def run(parts: list[list[int]]) -> Tensor:
        sampler, found = LatentSampler(teacher, "persistent", **options), {}
        for visit in range(3):
            for rows in parts if visit < 2 else [[0, 1, 2, 3]]:
                longest = int(batch["mask"][rows].sum(1).max())
                x = {name: leaf[rows, :longest] for name, leaf in batch.items()}
                made = sampler(x, sample_ids=ids[rows], step=visit)
                (student(made.x) - made.teacher_logits).square().sum().backward()
                found.update(zip(rows, made.latents.z.detach(), strict=True))
        return torch.stack([found[row] for row in range(4)]) * batch["mask"][..., None]

    torch.testing.assert_close(run([[0, 1], [2, 3]]), run([[0, 1, 2, 3]]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run([[2], [3, 1], [0]]), run([[0, 1, 2, 3]]), rtol=1e-4, atol=1e-5)


def test_no_cycle_keeps_a_batch_alive() -> None:
    gc.disable()
    try:
        sampler = persistent()
        made = sampler(X, sample_ids=IDS)
        leaf = weakref.ref(made.latents.z)
        del made
        assert leaf() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "pass sample_ids="),
        (torch.tensor([0, 1, 2, 3, 4, 5, 77, 77]), "sample id 77 occurs twice"),
    ],
)
def test_ids_are_needed_and_unique(ids: Tensor | None, message: str) -> None:
    sampler = persistent(repeats="same")
    with pytest.raises(ArgumentError, match=message):
        sampler(X, sample_ids=ids)


def test_an_encoder_whose_latents_change_shape_is_named() -> None:
    sampler = LatentSampler(Teacher(nn.Identity(), nn.Identity(), lambda x: x[:, :3]), "persistent", units="absolute")
    sampler(torch.ones(2, 4), sample_ids=torch.arange(2))
    for ids in ([5, 6], [1, 5]):
        with pytest.raises(ShapeError, match=r"\(5,\)|\(4,\)"):
            sampler(torch.ones(2, 5), sample_ids=torch.tensor(ids))
    assert sampler(torch.ones(2, 4), sample_ids=torch.arange(2)).latents.z.shape == (2, 4)
    assert isinstance(sampler(torch.ones(2, 4), sample_ids=torch.arange(2)).latents, Latents)
