"""Results and arguments of models, by one rule: teachers, objectives, samplers, fit, evaluate and caches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import toys
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, StaleCacheError
from tgt_fast.teacher import returned
from tgt_fast.train import evaluate

IMAGE, CLASSES = 8, 5


class Named(NamedTuple):
    aux: Tensor
    logits: Tensor


@dataclasses.dataclass
class Holder:
    loss: Tensor
    scores: Tensor


def bare(z: Tensor) -> Tensor:
    return z


# What a model returns, and where in it the logits are (None: by the rule); what else there is would be wrong.
FORMS: list[tuple[Callable[[Tensor], Any], Any]] = [
    (bare, None),
    (lambda z: (z.sum(), z), None),  # a loss in front has no classes
    (lambda z: (z.argmax(-1), z, z * 0), None),
    (lambda z: {"logits": z, "aux": z * 0}, None),
    (lambda z: {"aux": z * 0, "logits": z}, None),
    (lambda z: {"out": z, "aux": z * 0}, None),
    (lambda z: Named(z * 0, z), None),
    (lambda z: Holder(z.sum(), z), None),
    (lambda z: (z * 0, z), 1),
    (lambda z: (z * 0, z), -1),
    (lambda z: {"a": z * 0, "b": z}, 1),
    (lambda z: {"a": z * 0, "b": z}, "b"),
    (lambda z: Named(z, z * 0), "aux"),
    (lambda z: {"deep": (z * 0, z)}, lambda made: made["deep"][1]),
    (bare, "b"),  # as where a model returns more in train mode
    (bare, lambda made: made),
]


class Returning(nn.Module):
    def __init__(self, inner: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.inner(x))


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_every_form_gives_what_a_bare_tensor_gives(number: int, tmp_path: Path) -> None:
    """The values and gradients of all who ask a model are those of the same model that returns a tensor."""
    form, logits_of = FORMS[number]
    x, y = toys.normal(6, toys.FEATURES), torch.arange(6) % toys.CLASSES

    def outcome(form: Callable[[Tensor], Any], logits_of: Any, folder: Path) -> list[Tensor]:
        judge, student = Returning(toys.labeler(), form), Returning(toys.student(), form).eval()
        parts = toys.vector_teacher()
        teacher = tgt.Teacher(parts.encoder, parts.decoder, judge, logits_of=logits_of)
        sampler = tgt.LatentSampler(teacher, "gradient", sigma=0.3, units="absolute", logits_of=logits_of)
        synth = sampler(x, student=student)
        plain = tgt.LatentSampler(teacher, "gradient", sigma=0.3, units="absolute")
        objective = tgt.TGTObjective(teacher, plain, logits_of=logits_of)
        loss = objective(student, x, y)["loss"]
        (grad, *_) = torch.autograd.grad(loss, list(student.parameters()))
        with tgt.TeacherCache(folder, judge, k=None, logits_of=logits_of, version="1") as cache:
            stored = cache.label(x, torch.arange(6))
        scores = evaluate(student, teacher, [(x, y)], logits_of=logits_of)
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        loader = [(torch.arange(6), x, y)] * 2
        fitted = tgt.fit(
            student, tgt.TGTObjective(teacher, plain), loader, steps=2, optimizer=optimizer, progress=False,
            logits_of=logits_of, seed=0,
        )  # fmt: skip
        assert isinstance(stored, Tensor)
        numbers = [*scores.values(), fitted.history[-1]["loss"]]
        weights = [p.detach() for p in student.parameters()]
        return [synth.x, synth.teacher_logits, loss, grad, stored, torch.tensor(numbers), *weights]

    expected, found = outcome(bare, None, tmp_path / "bare"), outcome(form, logits_of, tmp_path / "form")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any(bool((value == 0).all()) for value in expected[:6])


@pytest.mark.parametrize(
    ("made", "logits_of", "match"),
    [
        (lambda z: None, None, "got NoneType; say by logits_of="),
        (lambda z: (z.argmax(-1), z.sum()), None, "got tuple of 2"),
        (lambda z: {"a": z}, "b", r"got dict of \['a'\], where logits_of='b' finds nothing"),
        (lambda z: (z,), 3, "logits_of=3 finds nothing"),
        (lambda z: {"a": z}, lambda made: [made["a"]], "finds list"),
    ],
)
def test_where_there_are_no_logits_the_error_says_what_there_is(made: Any, logits_of: Any, match: str) -> None:
    x, teacher = toys.normal(4, toys.FEATURES), toys.vector_teacher()
    student = Returning(toys.student(), made)
    with pytest.raises(DTypeError, match=f"TGTObjective: the student must return.*{match}"):
        tgt.TGTObjective(teacher, logits_of=logits_of)(student, x)
    with pytest.raises(DTypeError, match=f"evaluate: the student must return.*{match}"):
        evaluate(student, teacher, [x], logits_of=logits_of)
    with pytest.raises(DTypeError, match=f"labeler must return.*{match}"):
        tgt.Teacher(nn.Identity(), nn.Identity(), student, logits_of=logits_of).label(x)


@pytest.mark.parametrize("wrong", [True, 1.5, ["logits"]])
def test_a_place_that_is_none_is_refused_at_once(wrong: Any) -> None:
    teacher, student = toys.vector_teacher(), toys.student()
    optimizer, batch = torch.optim.SGD(student.parameters(), 0.1), toys.normal(4, toys.FEATURES)
    calls: list[Callable[[], Any]] = [
        lambda: tgt.Teacher(nn.Identity(), nn.Identity(), student, logits_of=wrong),
        lambda: tgt.TGTObjective(teacher, logits_of=wrong),
        lambda: tgt.LatentSampler(teacher, logits_of=wrong),
        lambda: evaluate(student, teacher, [batch], logits_of=wrong),
        lambda: tgt.fit(student, tgt.TGTObjective(teacher), [batch], steps=1, optimizer=optimizer, logits_of=wrong),
        lambda: tgt.teacher_fingerprint(student, logits_of=wrong),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="logits_of must be a name, an index or a function"):
            call()


def test_an_objective_that_knows_no_place_is_refused_before_the_first_step() -> None:
    student = toys.student()
    objective = lambda student, x, y, *, sample_ids, step: {"loss": student(x).sum()}  # noqa: E731
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with pytest.raises(ArgumentError, match=r"is no objective: it cannot be called with.*logits_of="):
        tgt.fit(student, objective, [toys.normal(4, 8)], steps=1, optimizer=optimizer, logits_of=0)


def test_a_cache_tells_places_apart_and_takes_them_along(tmp_path: Path) -> None:
    judge, x = Returning(toys.labeler(), _pair), toys.normal(4, toys.FEATURES)
    with tgt.TeacherCache(tmp_path, judge, k=None, logits_of=1) as cache:
        method, arguments = cache.__reduce__()[:2]
        again = method(*arguments)  # as in a worker
        assert torch.equal(again.label(x, [1, 2, 3, 4]), judge.inner.eval()(x) * 2)
        again.close()
    with pytest.raises(StaleCacheError):
        tgt.TeacherCache(tmp_path, judge, k=None)
    one, other = (tgt.Teacher(nn.Identity(), nn.Identity(), judge, logits_of=place) for place in (0, 1))
    assert tgt.teacher_fingerprint(one) != tgt.teacher_fingerprint(other)
    with pytest.raises(ArgumentError, match="a Teacher has its own"):
        tgt.TeacherCache(tmp_path / "other", one, logits_of=0)


def _pair(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, z * 2


# ---- what goes in ----


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None, **more: Tensor) -> Tensor:
        return a if b is None else a + b


class Whole(nn.Module):
    def forward(self, a: dict[str, Tensor]) -> Tensor:
        return a["a"]


class Anything(nn.Module):
    def forward(self, **parts: Tensor) -> Tensor:
        return sum(parts.values())  # type: ignore[return-value]


class Wrapping(nn.Module):
    def forward(self, *inputs: Any, **parts: Any) -> Tensor:
        return inputs[0]["a"]  # type: ignore[no-any-return]


def test_a_dict_goes_in_as_keywords_where_they_are_named() -> None:
    one, two = torch.ones(2, 3), torch.full((2, 3), 2.0)
    whole, both = {"a": one}, {"a": one, "b": two}
    named: list[tuple[Any, dict[str, Tensor], Tensor]] = [
        (Two(), whole, one),
        (Two(), both, one + two),
        (Two(), {**both, "c": two}, one + two),
        (Two().forward, both, one + two),
        (functools.partial(Two(), b=two), whole, one + two),
        (torch.compile(Two(), backend="eager"), both, one + two),
        (Anything(), both, one + two),
        (lambda a, b: a + b, both, one + two),
        (Whole(), whole, one),
        (Whole(), both, one),
        (lambda a: a["a"], whole, one),
        (lambda batch, scale=2: batch["a"] * scale, both, two),
        (Wrapping(), both, one),
    ]
    for model, x, expected in named:
        assert torch.equal(returned.call(model, x), expected)


# ---- models of transformers and diffusers, as they are ----


def vae() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    made: nn.Module = toys.seeded(
        lambda: diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, **blocks), 0
    )
    return made


def vit(seed: int = 1) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=IMAGE, patch_size=4,
        num_labels=CLASSES,
    )  # fmt: skip
    return toys.seeded(lambda: transformers.ViTForImageClassification(config), seed)


@pytest.mark.parametrize("mode", ["random", "gradient"])
def test_an_autoencoder_and_classifiers_as_they_come(mode: str) -> None:
    """Encoder, decoder, labeler and student of two libraries without a wrapper, through the whole of training."""
    autoencoder, labeler, student = vae(), vit(), vit(seed=2)
    teacher = tgt.Teacher(autoencoder.encode, autoencoder.decode, labeler)  # type: ignore[arg-type]
    x = toys.normal(4, 3, IMAGE, IMAGE)
    z = teacher.encode(x).z
    assert torch.equal(z, autoencoder.encode(x).latent_dist.mean)  # type: ignore[operator]
    assert torch.equal(teacher.decode(z), autoencoder.decode(z).sample)  # type: ignore[operator]
    assert torch.equal(teacher.label(x), labeler(x).logits)
    sampler = tgt.LatentSampler(teacher, mode, sigma=0.5, units="absolute", seed=1)
    rows = [{"id": torch.arange(4), "pixel_values": x, "labels": torch.arange(4) % CLASSES}]
    before = [p.detach().clone() for p in student.parameters()]
    result = tgt.fit(
        student, tgt.TGTObjective(teacher, sampler), rows, steps=2,
        optimizer=torch.optim.SGD(student.parameters(), 0.1), progress=False,
        columns=("id", "pixel_values", "labels"),
        evaluate=lambda s: evaluate(s, teacher, rows, columns=("id", "pixel_values", "labels")),
    )  # fmt: skip
    assert result.steps == 2
    assert result.history[-1]["synthetic"] > 0
    assert result.best_score is not None
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_tuples_of_the_same_models() -> None:
    autoencoder, labeler = vae(), vit()
    encode = functools.partial(autoencoder.encode, return_dict=False)  # type: ignore[arg-type]
    teacher = tgt.Teacher(encode, autoencoder.decode, functools.partial(labeler, return_dict=False))  # type: ignore[arg-type]
    x = toys.normal(2, 3, IMAGE, IMAGE)
    assert torch.equal(teacher.encode(x).z, autoencoder.encode(x).latent_dist.mean)  # type: ignore[operator]
    assert torch.equal(teacher.label(x), labeler.eval()(x).logits)


def test_batches_of_a_tokenizer_into_classifiers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "dim": 8, "n_heads": 1, "n_layers": 1, "hidden_dim": 8, "num_labels": CLASSES}

    def classifier(seed: int) -> nn.Module:
        config = transformers.DistilBertConfig(**sizes)
        return toys.seeded(lambda: transformers.DistilBertForSequenceClassification(config), seed)

    labeler, student = classifier(1), classifier(2)
    teacher = tgt.Teacher(nn.Identity(), nn.Identity(), labeler)
    batch = transformers.BatchEncoding(
        {"input_ids": torch.arange(12).reshape(4, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]] * 2)}
    )
    assert torch.equal(teacher.label(batch), labeler(**batch).logits)
    rows = [{**batch, "id": torch.arange(4), "labels": torch.arange(4)}]
    columns = ("id", ("input_ids", "attention_mask"), "labels")
    with tgt.TeacherCache(tmp_path, labeler, k=None) as cache:
        assert cache.fill(rows, columns=columns, progress=False) == 4
        assert torch.equal(cache.read([0, 1, 2, 3]), teacher.label(batch))  # type: ignore[arg-type]
    for model in (student, torch.compile(student, backend="eager")):
        result = tgt.fit(
            model, tgt.TGTObjective(teacher), rows, steps=1, columns=columns,  # type: ignore[arg-type]
            optimizer=torch.optim.SGD(student.parameters(), 0.1), progress=False,
        )  # fmt: skip
        assert result.steps == 1
    scores = evaluate(labeler, teacher, rows, columns=columns)
    assert scores["agreement"] == 1.0
