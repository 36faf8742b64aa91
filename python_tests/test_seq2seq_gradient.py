"""Climbing a text's disagreement: one decoder call, soft embeddings in two vocabularies, a gradient to the latents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import toys

pytest.importorskip("transformers")

import text_kit
from text_kit import KINDS, SENTENCES, TEXTS, one, text_teacher
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError
from tgt_fast.teacher import Key, Latents, Seq2SeqTeacher, TextClassifier, generation
from tgt_fast.train.rng import get_rng_state

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(10, 10 + len(TEXTS))
KEY = Key(torch.tensor(3), IDS, 0)


def climber(teacher: Seq2SeqTeacher, **options: Any) -> tgt.LatentSampler:
    return tgt.LatentSampler(teacher, "gradient", **{"sigma": 0.5, "units": "absolute", "seed": 3, **options})


def disagreement(teacher: Seq2SeqTeacher, student: TextClassifier, latents: Latents, key: Key | None = None) -> Tensor:
    x = teacher.decode(latents, relaxed=True, key=key)
    return tgt.distillation_loss(student.eval()(teacher.student_view(x)), teacher.label(x), reduction="none")


@pytest.fixture(scope="module")
def trained() -> tuple[Seq2SeqTeacher, TextClassifier]:
    torch.set_num_threads(1)
    return text_kit.trained_teacher()


def test_one_step_of_the_default_size_raises_the_disagreement(trained: Any, record_property: Any) -> None:
    """On models that have learned something: an untrained generator's logits bend too much for a step of any meaning.
    Sigma, step and units are the defaults."""
    teacher, student = trained
    texts = SENTENCES[::2]
    x, ids = teacher.tokenize(texts), torch.arange(len(texts))
    assert teacher.texts(teacher.decode(teacher.encode(x))) == list(texts)
    up = tgt.LatentSampler(teacher, "gradient", record_disagreement=True).calibrate([x])
    start = tgt.LatentSampler(teacher, "random").calibrate([x])
    before, after = start(x, sample_ids=ids, step=0), up(x, sample_ids=ids, step=0, student=student)
    rose = disagreement(teacher, student, after.latents) > disagreement(teacher, student, before.latents)
    assert rose.float().mean() >= 0.9
    assert up.last_disagreement[1] > up.last_disagreement[0]
    changes = teacher.changes(before.x, after.x)
    record_property("texts that changed", changes["texts"])
    assert 0 < changes["texts"] < 1
    assert 0 < changes["tokens"] < changes["texts"]  # a text has more tokens than the one that moved
    assert teacher.changes(after.x, after.x) == {"texts": 0, "tokens": 0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in KINDS), (KINDS[2], {"gumbel": True, "tau": 0.5}), (KINDS[1], {"hard": True})],
)
def test_a_batch_of_unequal_lengths_climbs_as_its_texts_alone(kind: str, options: dict[str, Any]) -> None:
    teacher, student = text_teacher(kind, **options)
    # Untrained models bend so much that two steps can make a thousandth of a rounding in float32.
    teacher.double()
    student.double()
    x, up = teacher.tokenize(TEXTS), climber(teacher, steps=2)
    together = up(x, sample_ids=IDS, step=2, student=student).latents
    assert together.mask is not None
    moved = (
        together.z
        - tgt.LatentSampler(teacher, sigma=0.5, units="absolute", seed=3)(x, sample_ids=IDS, step=2).latents.z
    )
    assert (moved.flatten(1).norm(dim=1) > 0.05).all()
    assert (moved[together.mask == 0] == 0).all()
    for row in range(len(TEXTS)):
        alone = up(one(x, row), sample_ids=IDS[row : row + 1], step=2, student=student).latents
        torch.testing.assert_close(together.z[row : row + 1, : alone.z.shape[1]], alone.z, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_tokens_are_read_as_the_tokens_themselves(kind: str) -> None:
    """A relaxed text of probability 1 a token: the reader's own beginning, end, order, mask and padding."""
    teacher, student = text_teacher(kind)
    x = teacher.tokenize(["the cat sat", "good", "the dog was in the park and the cat was on the mat"])
    ids, mask = x["input_ids"], x["attention_mask"]
    spaces = {"bart": text_kit.bart_tokenizer(), "t5": text_kit.t5_tokenizer(), "distilbert": text_kit.bert_tokenizer()}
    names = kind.split(", ")
    source = spaces[names[0]]
    special = torch.tensor(source.all_special_ids)
    content = mask.bool() & ~torch.isin(ids, special)
    logits = 200.0 * torch.nn.functional.one_hot(
        ids, teacher.decode(teacher.encode(x), relaxed=True)["token_logits"].shape[-1]
    )
    relaxed = {"token_logits": logits.float(), "content": content, "source": ids}
    for name, side, model in zip(names[1:], teacher._generator.sides, (teacher.labeler, student), strict=True):
        reader = spaces["bart" if name == "roberta" else name]
        spelled = [(token,) for token in range(len(source))]
        if reader is not source:
            spelled = list(tgt.teacher.align_vocabularies(source, reader).spelled)
        opens, closes = reader("a")["input_ids"][:1], reader("a")["input_ids"][-1:]
        for row in range(len(ids)):
            inner = [spelled[token] for token in ids[row][content[row]].tolist()]
            assert max(map(len, inner)) == 1  # no token of these texts is read as several; a lone space as none
            tokens = [*opens, *(token for stands in inner for token in stands), *closes]
            assert len(tokens) > 2
            expected = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens))}
            mine = {n: v[row : row + 1] for n, v in side(relaxed).items()}
            assert int(mine["attention_mask"].sum()) == len(tokens)
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(mine), model.eval()(expected), rtol=1e-3, atol=1e-4)


def test_the_slope_is_that_of_plain_pytorch() -> None:
    """softmax(logits) @ table into both models, written out; the same vocabulary, one text, so without padding."""
    teacher, student = text_teacher()
    x = teacher.tokenize(TEXTS[:1])
    latents = teacher.encode(x)
    slopes = []
    for plain in (False, True):
        z = latents.z.clone().requires_grad_()
        moving = Latents(z, latents.mask, latents.source)
        if not plain:
            value = disagreement(teacher, student, moving)
        else:
            model = text_kit.bart().eval()
            fed = torch.cat([torch.tensor([[2]]), x["input_ids"][:, :-1]], 1)
            logits = model(encoder_outputs=(z,), attention_mask=x["attention_mask"], decoder_input_ids=fed).logits
            logits = logits[:, 1:-1].clone()
            logits[..., [0, 1, 2, 3, 4]] = -torch.inf
            both = []
            for reader in (teacher.labeler, student):
                table = reader.get_input_embeddings().weight  # type: ignore[attr-defined]
                ends = table[torch.tensor([[0], [2]])]
                embeds = torch.cat([ends[:1], logits.softmax(-1) @ table, ends[1:]], 1)
                both.append(reader.eval()({"inputs_embeds": embeds, "attention_mask": x["attention_mask"]}))  # type: ignore[attr-defined]
            p, q = both[0].log_softmax(-1), both[1].log_softmax(-1)
            value = (p.exp() * (p - q)).sum(-1)
        (slope,) = torch.autograd.grad(value.sum(), z)
        slopes.append(slope)
    assert slopes[1].norm() > 1e-3
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_left_as_it_was_found(kind: str) -> None:
    teacher, student = text_teacher(kind)
    student.train()
    table = student.get_input_embeddings().weight
    assert isinstance(table, torch.nn.Parameter)
    table.grad = torch.full_like(table, 0.5)
    before, rng = toys.snapshot(student), get_rng_state()
    synth = climber(teacher, steps=2, record_disagreement=True)(teacher.tokenize(TEXTS), student=student)
    assert toys.same(before, toys.snapshot(student))
    assert toys.same(rng, get_rng_state())
    assert not synth.teacher_logits.requires_grad
    assert len(teacher.texts(synth.x)) == len(TEXTS)
    assert toys.same(toys.snapshot(student), before)


def test_gumbel_noise_is_one_sample_for_both_readers_keyed_by_id() -> None:
    teacher, _ = text_teacher(gumbel=True, hard=True)
    latents = teacher.encode(teacher.tokenize(TEXTS))
    x = teacher.decode(latents, relaxed=True, key=KEY)
    sides = teacher._generator.sides
    drawn = []
    for side in sides:
        embeds, weight = side(x)["inputs_embeds"], side.embedding.weight  # type: ignore[union-attr]
        drawn.append(torch.cdist(embeds, weight[None]).argmin(-1)[side(x)["attention_mask"].bool()])
    assert torch.equal(*drawn)  # the tokens that were drawn
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    turned = teacher.decode(
        Latents(latents.z[order], latents.mask[order], latents.source[order]),
        relaxed=True,
        key=KEY.take(order),  # type: ignore[index]
    )
    torch.testing.assert_close(sides[0](turned)["inputs_embeds"], sides[0](x)["inputs_embeds"][order])
    later = teacher.decode(latents, relaxed=True, key=Key(KEY.seed, IDS, 1))
    assert not torch.equal(sides[0](later)["inputs_embeds"], sides[0](x)["inputs_embeds"])


def test_relaxed_texts_of_several_replicas_and_copies_are_drawn_apart() -> None:
    """As persistent exploration asks for them: each row's noise is that of its replica."""
    teacher, _ = text_teacher(gumbel=True)
    x = teacher.tokenize(TEXTS[:1] * 2)
    sampler = tgt.LatentSampler(teacher, "persistent", sigma=0.0, step_size=0.1, units="absolute")
    ids = IDS[[0, 0]]
    single = sampler(x, sample_ids=ids, step=0)
    assert not torch.allclose(single.teacher_logits[0], single.teacher_logits[1])
    noisy = tgt.LatentSampler(teacher, "persistent", sigma=1e-9, replicas=2, units="absolute")
    four = noisy(x, sample_ids=ids, step=0)
    assert len(four.teacher_logits.unique(dim=0)) == 4
    for row, replica in enumerate((0, 2, 1, 3)):
        key = Key(torch.tensor(0), ids[:1], 0, replica)
        latents = teacher.encode(teacher.tokenize(TEXTS[:1]))
        alone = teacher.label(teacher.decode(latents, relaxed=True, key=key))
        torch.testing.assert_close(four.teacher_logits[row : row + 1], alone, rtol=1e-3, atol=1e-4)


def test_exploring_in_pieces_changes_nothing() -> None:
    whole, pieces = (text_teacher(KINDS[1], max_batch=size, gumbel=True)[0] for size in (None, 4))
    student = text_teacher(KINDS[1])[1]
    student.double()  # else roundings grow, as above
    for teacher in (whole, pieces):
        teacher.double()
        teacher._generator.sides[1].embedding = student.get_input_embeddings()
    x = whole.tokenize(TEXTS)
    a, b = (climber(teacher)(x, sample_ids=IDS, student=student) for teacher in (whole, pieces))
    torch.testing.assert_close(a.latents.z, b.latents.z, rtol=1e-6, atol=1e-8)
    assert whole.texts(a.x) == pieces.texts(b.x)


def test_persistent_chains_remember_the_tokens_they_began_at() -> None:
    """The user's own backward moves them; a batch of other lengths meets the same chains; a saved bank goes on."""
    teacher, student = text_teacher(KINDS[1])
    options: dict[str, Any] = {"sigma": 0.2, "units": "absolute", "restart_probability": 0.0, "step_size": 0.5}
    sampler = tgt.LatentSampler(teacher, "persistent", **options)
    x = teacher.tokenize(TEXTS)

    def visit(sampler: tgt.LatentSampler, rows: list[int]) -> tgt.Synthetic:
        part = {name: value[rows] for name, value in x.items()}
        synth = sampler(part, sample_ids=IDS[rows])
        student.train()
        logits = student(teacher.student_view(synth.x))
        tgt.distillation_loss(logits, synth.teacher_logits).backward()
        return synth

    first = visit(sampler, list(range(len(TEXTS))))
    table = student.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    assert table.grad is not None  # the student's own pass: its table trains with it
    assert table.grad.abs().sum() > 0
    again = tgt.LatentSampler(teacher, "persistent", **options)
    again.load_state_dict(copy.deepcopy(sampler.state_dict()))
    for each in (sampler, again):
        second = visit(each, [3, 0])
        assert second.latents.source is not None
        assert first.latents.source is not None
        assert torch.equal(second.latents.source, first.latents.source[[3, 0]])
        moved = (second.latents.z - first.latents.z[[3, 0]]).flatten(1).norm(dim=1)
        torch.testing.assert_close(moved.detach(), torch.full((2,), 0.5), rtol=1e-3, atol=1e-4)


def test_balanced_anchors_of_unequal_length_keep_their_tokens() -> None:
    teacher, student = text_teacher()
    parts = [teacher.tokenize(TEXTS[:3]), teacher.tokenize(TEXTS[3:])]
    labels = [torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])]
    loader = list(zip(parts, labels, strict=True))
    one_state = None
    for mode in ("random", "gradient"):
        sampler = tgt.LatentSampler(teacher, mode, anchors="balanced", sigma=0.1).calibrate(loader)
        if one_state is not None:
            sampler.load_state_dict({**sampler.state_dict(), **{k: v for k, v in one_state.items() if "pool" in k}})
        one_state = sampler.state_dict()
        synth = sampler(parts[0], student=student)
        assert synth.latents.source is not None
        assert synth.latents.mask is not None
        texts = teacher.texts({"input_ids": synth.latents.source, "attention_mask": synth.latents.mask})
        assert set(texts) <= set(TEXTS)


def test_what_a_gradient_needs_is_asked_for_by_name() -> None:
    teacher, student = text_teacher()
    x = teacher.tokenize(TEXTS)
    blind = Seq2SeqTeacher(
        text_kit.bart(), text_kit.bart_tokenizer(), lambda view: student(view), max_length=48, student=student
    )
    with pytest.raises(ArgumentError, match="give labeler_embedding="):
        climber(blind)(x, student=student)
    alone = Seq2SeqTeacher(text_kit.bart(), text_kit.bart_tokenizer(), text_kit.roberta(), max_length=48)
    with pytest.raises(ArgumentError, match="give student_embedding="):
        climber(alone)(x, student=student)
    with pytest.raises(
        ArgumentError, match=rf"labeler embeds {len(text_kit.bert_tokenizer())} tokens.*give labeler_tokenizer="
    ):
        Seq2SeqTeacher(text_kit.bart(), text_kit.bart_tokenizer(), text_kit.distilbert())
    with pytest.raises(ArgumentError, match="need input_ids and attention_mask"):
        teacher.encode({"input_ids": x["input_ids"]})
    for wrong in ({"tau": 0.0}, {"gumbel": 1}, {"minimum_overlap": 2.0}, {"backend": "fast"}, {"max_length": 0}):
        with pytest.raises(ArgumentError, match=f"Seq2SeqTeacher: {next(iter(wrong))} must"):
            text_teacher(**wrong)  # type: ignore[arg-type]
    strict, learner = text_teacher(KINDS[1], minimum_overlap=0.95)
    strict.texts(
        tgt.LatentSampler(strict, sigma=0.1, units="absolute")(strict.tokenize(TEXTS)).x
    )  # no gradient, no map
    with pytest.raises(ArgumentError, match="have a counterpart"):
        climber(strict)(strict.tokenize(TEXTS), student=learner)
    relaxed = teacher.decode(teacher.encode(x), relaxed=True)
    with pytest.raises(ArgumentError, match="relaxed text has no one string"):
        teacher.texts(relaxed)
    with pytest.raises(ArgumentError, match="know their tokens"):
        teacher.decode(Latents(teacher.encode(x).z, x["attention_mask"]), relaxed=True)
    with pytest.raises(ArgumentError, match="6 texts before and 1 after"):
        teacher.changes(x, teacher.tokenize(["good"]))


def test_dropping_texts_that_have_ended_changes_no_other(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, _ = trained
    x = teacher.tokenize(SENTENCES[:24])
    made = []
    for share in (0.0, generation._DROP, 1.0):  # none, the usual, each text at once
        monkeypatch.setattr(generation, "_DROP", share)
        made.append(
            tgt.LatentSampler(teacher, sigma=1.0, units="absolute", seed=1)(x, sample_ids=torch.arange(24), step=0).x
        )
    lengths = made[0]["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    assert toys.same(made[0], made[1])
    assert toys.same(made[0], made[2])
