"""Teacher: frozen for ever, invisible to checkpoints, and still a path for gradients."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError, DTypeError, ShapeError
from tgt_fast.teacher import Latents, Teacher, tree


class Parent(nn.Module):
    """A training module that holds a teacher, as a Lightning module would."""

    def __init__(self) -> None:
        super().__init__()
        self.student = toys.student()
        self.teacher = toys.vector_teacher()


def tensors_of(teacher: Teacher) -> list[Tensor]:
    return [t.detach().clone() for t in teacher.frozen_tensors()]


def test_teacher_stays_frozen_through_an_epoch_in_train_mode() -> None:
    parent = Parent()
    before = tensors_of(parent.teacher)
    optimizer = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.1)
    parent.train()
    for seed in range(5):
        x = toys.normal(16, toys.FEATURES, seed=seed)
        parent.train()
        rebuilt = parent.teacher.decode(parent.teacher.encode(x))
        loss = (parent.student(rebuilt) - parent.teacher.label(rebuilt)).square().mean()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parent.teacher.frozen_tensors(), strict=True))
    judge = parent.teacher.labeler
    assert isinstance(judge, nn.Module)
    assert not any(m.training for m in judge.modules())
    assert not parent.teacher.training
    assert parent.student.training


def test_a_part_shared_with_a_parent_is_put_back_into_eval_mode() -> None:
    judge = toys.labeler()
    parent = nn.ModuleDict({"judge": judge})
    teacher = Teacher(nn.Identity(), nn.Identity(), judge)
    parent.train()
    parent.requires_grad_(True)
    before = {name: b.clone() for name, b in judge.named_buffers()}
    first, second = (teacher.label(toys.normal(6, toys.FEATURES)) for _ in range(2))
    assert torch.equal(first, second)
    assert not judge.training
    assert not any(p.requires_grad for p in judge.parameters())
    assert toys.same(before, dict(judge.named_buffers()))


def test_checkpoints_of_a_parent_hold_nothing_of_the_teacher() -> None:
    parent = Parent()
    assert all(key.startswith("student.") for key in parent.state_dict())
    assert list(parent.teacher.parameters()) == []
    assert list(parent.teacher.buffers()) == []
    assert list(parent.teacher.modules()) == [parent.teacher]
    Parent().load_state_dict(parent.state_dict(), strict=True)


def test_moving_the_parent_moves_the_teacher() -> None:
    parent = Parent().double()
    assert {t.dtype for t in parent.teacher.frozen_tensors() if t.is_floating_point()} == {torch.float64}
    assert parent.teacher.label(toys.normal(2, toys.FEATURES).double()).dtype == torch.float64
    assert parent.to("meta").teacher.device == torch.device("meta")


def test_gradients_reach_the_latents_and_no_teacher_parameter() -> None:
    teacher = toys.vector_teacher()
    z = teacher.encode(toys.normal(5, toys.FEATURES)).z.requires_grad_()
    teacher.label(teacher.decode(Latents(z))).square().sum().backward()
    assert z.grad is not None
    assert (z.grad.abs().sum(1) > 0).all()
    assert all(t.grad is None and not t.requires_grad for t in teacher.frozen_tensors())


def test_encode_has_no_graph_and_label_has_one_only_for_inputs_that_need_it() -> None:
    teacher = toys.vector_teacher()
    x = toys.normal(5, toys.FEATURES)
    assert not teacher.encode(x.clone().requires_grad_()).z.requires_grad
    assert not teacher.label(x).requires_grad
    assert teacher.label(x.clone().requires_grad_()).requires_grad


def test_two_normalisations_of_the_same_pixels_give_the_same_teacher_logits() -> None:
    """Loaders of two users: one gives pixels in 0..1, the other pixels that were standardised for its student."""
    judge, pixels = toys.labeler(), torch.rand(7, toys.FEATURES, generator=torch.Generator().manual_seed(0))
    mean, std = torch.linspace(0.2, 0.6, toys.FEATURES), torch.linspace(0.1, 0.4, toys.FEATURES)
    raw = Teacher(
        nn.Identity(), nn.Identity(), judge,
        labeler_transform=lambda x: (x - 0.5) / 0.5, student_transform=lambda x: (x - mean) / std,
    )  # fmt: skip
    standardised = Teacher(
        nn.Identity(), nn.Identity(), judge, labeler_transform=lambda x: (x * std + mean - 0.5) / 0.5
    )
    view = raw.student_view(pixels)
    torch.testing.assert_close(raw.label(pixels), standardised.label(view), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(standardised.student_view(view), (pixels - mean) / std)
    assert not torch.allclose(raw.label(pixels), standardised.label(pixels), atol=1e-2)


@pytest.mark.parametrize("max_batch", [1, 3, 7, 100])
def test_pieces_of_max_batch_give_what_one_call_gives(max_batch: int) -> None:
    whole, pieces = toys.vector_teacher(), toys.vector_teacher(max_batch=max_batch)
    x = toys.normal(7, toys.FEATURES)
    gradients = []
    for teacher in (whole, pieces):
        z = teacher.encode(x).z.requires_grad_()
        teacher.label(teacher.decode(Latents(z))).square().sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(whole.encode(x).z, pieces.encode(x).z)
    torch.testing.assert_close(whole.label(x), pieces.label(x))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_no_part_sees_more_than_max_batch_examples() -> None:
    seen: list[int] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return x

    teacher = Teacher(spy, spy, spy, max_batch=3)
    teacher.label(teacher.decode(teacher.encode(toys.normal(7, 4))))
    assert seen == [3, 3, 1] * 3


def test_dicts_and_masks_pass_through() -> None:
    teacher, x = toys.sequence_teacher(max_batch=2), toys.sequences([5, 2, 3])
    latents = teacher.encode(x)
    assert latents.mask is not None
    assert torch.equal(latents.mask, x["mask"])
    rebuilt = teacher.decode(latents)
    assert rebuilt.keys() == x.keys()
    assert rebuilt["features"].shape == x["features"].shape
    assert teacher.label(rebuilt).shape == (3, toys.CLASSES)


def test_empty_batches_are_legal() -> None:
    teacher = toys.vector_teacher(max_batch=2)
    assert teacher.label(teacher.decode(teacher.encode(torch.zeros(0, toys.FEATURES)))).shape == (0, 3)


def test_methods_and_partials_are_frozen_through_their_module() -> None:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(4, 8)

        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x)

        def decode(self, z: Tensor, gain: float = 1.0) -> Tensor:
            return gain * self.decoder(z)

    vae, hidden = Vae(), nn.Linear(8, 3)
    teacher = Teacher(vae.encode, functools.partial(vae.decode, gain=2.0), lambda x: hidden(x), modules=[hidden])
    assert not vae.training
    assert not any(p.requires_grad for m in (vae, hidden) for p in m.parameters())
    teacher.double()
    assert teacher.label(teacher.decode(teacher.encode(torch.zeros(2, 8).double()))).dtype == torch.float64


def test_a_decoder_that_asks_is_told_whether_to_relax() -> None:
    calls: list[bool] = []

    def decoder(z: Tensor, relaxed: bool = False) -> Tensor:
        calls.append(relaxed)
        return z

    teacher = Teacher(nn.Identity(), decoder, nn.Identity())
    teacher.decode(torch.zeros(2, 3))
    teacher.decode(torch.zeros(2, 3), relaxed=True)
    assert calls == [False, True]


def test_priors() -> None:
    noise = Latents(toys.normal(4, toys.LATENT))
    assert toys.vector_teacher(prior="normal").from_prior(noise) is noise
    assert toys.vector_teacher(prior=[toys.LATENT]).prior == (toys.LATENT,)
    shifted = toys.vector_teacher(prior=lambda n: 2 * n + 1).from_prior(noise)
    torch.testing.assert_close(shifted.z, 2 * noise.z + 1)
    with pytest.raises(ArgumentError, match="no prior"):
        toys.vector_teacher().from_prior(noise)
    mapper = nn.Linear(toys.LATENT, toys.LATENT)
    parent = nn.ModuleDict({"teacher": toys.vector_teacher(prior=mapper)})
    assert not parent.state_dict()
    assert not mapper.training
    assert not mapper.weight.requires_grad


def test_a_copy_works_and_the_repr_says_what_it_is_made_of() -> None:
    teacher = toys.vector_teacher(max_batch=4)
    x = toys.normal(3, toys.FEATURES)
    assert torch.equal(copy.deepcopy(teacher).label(x), teacher.label(x))
    assert "encoder=Linear" in repr(teacher)
    assert "max_batch=4" in repr(teacher)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": 3}, ArgumentError, "encoder must be callable"),
        ({"labeler": None}, ArgumentError, "labeler must be callable"),
        ({"student_transform": "norm"}, ArgumentError, "student_transform must be callable"),
        ({"max_batch": 0}, ArgumentError, "max_batch"),
        ({"prior": "uniform"}, ArgumentError, "prior"),
        ({"prior": (0,)}, ArgumentError, "prior"),
    ],
)
def test_bad_parts_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    parts: dict[str, Any] = {"encoder": nn.Identity(), "decoder": nn.Identity(), "labeler": nn.Identity()}
    with pytest.raises(error, match=message):
        Teacher(**{**parts, **options})


@pytest.mark.parametrize(
    ("part", "made", "error", "message"),
    [
        ("encoder", lambda x: (x, x), DTypeError, "encoder: expected a tensor or Latents, got tuple"),
        ("encoder", lambda x: x.long(), DTypeError, "floating-point tensor, got torch.int64"),
        ("encoder", lambda x: x[:2], ShapeError, r"batch=4.*\(2, 6\)"),
        ("encoder", lambda x: Latents(x, torch.ones(4, 5)), ShapeError, r"mask \(4, 5\).*\(4, 6\)"),
        ("decoder", lambda z: z[:3], ShapeError, "decoder changed the batch size.* 4 .* 3"),
        (
            "decoder",
            lambda z: {"a": z, "b": z[:1]},
            ShapeError,
            r"differ within one batch: \(4, 6\), \(1, 6\)",
        ),
        ("decoder", lambda z: None, ArgumentError, "no tensor with a batch dimension"),
        ("labeler", lambda x: x[:, 0], ShapeError, r"logits must be \[batch, ..., classes\], got \(4,\)"),
        ("labeler", lambda x: x.argmax(1), DTypeError, "got torch.int64"),
        ("labeler", lambda x: {"classes": x.argmax(1)}, DTypeError, r"got dict of \['classes'\]; say by logits_of="),
        ("labeler", lambda x: x[:3], ShapeError, "labeler changed the batch size"),
        ("student_transform", lambda x: x[:3], ShapeError, "student_transform changed the batch size"),
    ],
)
def test_parts_that_return_nonsense_are_named(part: str, made: Any, error: type[Exception], message: str) -> None:
    parts: dict[str, Any] = {"encoder": nn.Identity(), "decoder": nn.Identity(), "labeler": nn.Identity()}
    teacher, x = Teacher(**{**parts, part: made}), torch.zeros(4, 6)
    with pytest.raises(error, match=message):
        teacher.student_view(x), teacher.label(teacher.decode(teacher.encode(x)))


def test_latents_are_a_pytree_node() -> None:
    masked = Latents(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    taken = tree.take(masked, torch.tensor([1]))
    assert isinstance(taken, Latents)
    assert taken.mask is not None
    assert taken.mask.shape == (1, 3)
    bare = tree.map_batched(lambda t: t + 1, Latents(torch.zeros(2, 3)))
    assert bare.mask is None
    assert torch.equal(bare.z, torch.ones(2, 3))


def test_latents_are_padded_only_where_a_mask_allows_it() -> None:
    latents = Latents(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64))
    padded = latents.padded_to((5, 4))
    assert padded.z.shape == (2, 5, 4)
    assert padded.mask is not None
    assert padded.mask.sum(1).tolist() == [3, 3]
    assert not padded.z[:, 3:].any()
    for shape in ((2, 4), (3, 5)):
        with pytest.raises(ShapeError, match="do not fit"):
            latents.padded_to(shape)
    with pytest.raises(ShapeError, match="do not fit"):
        Latents(torch.ones(2, 3)).padded_to((4,))


def test_trees_join_what_belongs_together_and_refuse_the_rest() -> None:
    a = {"x": torch.zeros(2, 3), "name": "kept", "scale": torch.tensor(2.0)}
    joined = tree.concat([a, {**a, "x": torch.ones(1, 3)}])
    assert joined["x"].shape == (3, 3)
    assert joined["name"] == "kept"
    assert joined["scale"] == 2
    assert [piece["x"].shape[0] for piece in tree.chunks(joined, 2)] == [2, 1]
    with pytest.raises(ShapeError, match="structure"):
        tree.concat([a, {"x": a["x"]}])
    with pytest.raises(ShapeError, match="differ in shape"):
        tree.concat([a, {**a, "x": torch.ones(1, 4)}])
