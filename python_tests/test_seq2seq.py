"""Texts from noised encodings: a draw belongs to its sample, and labeler and student read it in their own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

pytest.importorskip("transformers")

import text_kit
from text_kit import KINDS, TEXTS, one, text_teacher
from transformers import AutoModelForSeq2SeqLM

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.teacher import Generation, Latents, Seq2SeqTeacher
from tgt_fast.train.rng import get_rng_state

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(10, 10 + len(TEXTS))


def sampler(teacher: Seq2SeqTeacher, **options: Any) -> tgt.LatentSampler:
    return tgt.LatentSampler(teacher, **{"sigma": 0.5, "units": "absolute", "seed": 3, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_out_as_ids_strings_and_labels(kind: str) -> None:
    teacher, student = text_teacher(kind)
    x = teacher.tokenize(TEXTS)
    assert [t.lower().replace(" ", "") for t in teacher.texts(x)] == [t.lower().replace(" ", "") for t in TEXTS]
    synth = sampler(teacher)(x, sample_ids=IDS)
    texts = teacher.texts(synth.x)
    assert len(texts) == len(set(texts)) == len(TEXTS)
    assert not set(texts) & set(TEXTS)
    assert synth.teacher_logits.shape == (len(TEXTS), text_kit.CLASSES)
    again = teacher.tokenize(texts)
    for view in (teacher.student_view(synth.x), teacher.student_view(again)):
        assert set(view) == {"input_ids", "attention_mask"}
        assert student(view).shape == (len(TEXTS), text_kit.CLASSES)
    if kind != KINDS[0]:  # tokenizers differ, so what the labeler saw is the text's own tokens
        torch.testing.assert_close(teacher.label(again), synth.teacher_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["sample", "greedy", "beam"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_a_batch_of_unequal_lengths_equals_its_texts_one_by_one(kind: str, strategy: str) -> None:
    """The attention mask goes with the encoder's output, and noise, draws and lengths belong to the sample."""
    options: dict[str, Any] = {"num_beams": 2} if strategy == "beam" else {}
    teacher, _ = text_teacher(kind, generation=Generation(strategy, max_new_tokens=8, **options))
    x = teacher.tokenize(TEXTS)
    assert len(set(x["attention_mask"].sum(1).tolist())) > 3
    draw = sampler(teacher)
    together = draw(x, sample_ids=IDS, step=4)
    alone = [draw(one(x, row), sample_ids=IDS[row : row + 1], step=4) for row in range(len(TEXTS))]
    assert teacher.texts(together.x) == [teacher.texts(synth.x)[0] for synth in alone]
    logits = torch.cat([synth.teacher_logits for synth in alone])
    torch.testing.assert_close(together.teacher_logits, logits, rtol=1e-4, atol=1e-5)


def test_without_the_mask_unequal_lengths_would_differ() -> None:
    """That the test above can fail: the same latents, all of their positions said to be real."""
    teacher, _ = text_teacher()
    latents = teacher.encode(teacher.tokenize(TEXTS))
    assert latents.mask is not None
    unmasked = Latents(latents.z, torch.ones_like(latents.mask), latents.source)
    key = tgt.teacher.Key(torch.tensor(0), IDS, 0)
    texts = [teacher.texts(teacher.decode(z, key=key)) for z in (latents, unmasked)]
    short = latents.mask.sum(1) < latents.mask.shape[1]
    assert any(a != b for a, b, padded in zip(*texts, short.tolist(), strict=True) if padded)


def test_a_text_belongs_to_its_key_alone() -> None:
    teacher, _ = text_teacher()
    x, draw = teacher.tokenize(TEXTS), sampler(teacher, replicas=2)
    first = teacher.texts(draw(x, sample_ids=IDS, step=1).x)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = teacher.texts(draw({n: v[order] for n, v in x.items()}, sample_ids=IDS[order], step=1).x)
    assert shuffled == [first[r * len(TEXTS) + i] for r in range(2) for i in order.tolist()]
    assert teacher.texts(draw(x, sample_ids=IDS, step=1).x) == first
    assert teacher.texts(draw(x, sample_ids=IDS, step=2).x) != first
    assert first[: len(TEXTS)] != first[len(TEXTS) :]  # replicas draw apart
    assert teacher.texts(sampler(teacher, replicas=2, seed=4)(x, sample_ids=IDS, step=1).x) != first


def test_copies_of_a_text_are_drawn_apart() -> None:
    """Each is a further replica of its id, also where texts that have ended are dropped from the batch."""
    teacher, _ = text_teacher()
    x = teacher.tokenize([TEXTS[0]] * 5 + [TEXTS[3]])
    made = teacher.texts(sampler(teacher, sigma=0.0)(x, sample_ids=IDS[[0, 0, 0, 0, 0, 3]], step=1).x)
    assert len(set(made[:5])) == 5
    one_id = teacher.tokenize([TEXTS[0]])
    replicas = sampler(teacher, sigma=1e-9, replicas=5)(one_id, sample_ids=IDS[:1], step=1)
    assert teacher.texts(replicas.x) == made[:5]
    same = teacher.texts(sampler(teacher, sigma=0.0, repeats="same")(x, sample_ids=IDS[[0] * 6], step=1).x)
    assert len(set(same[:5])) == 1


def test_draws_differ_where_the_latents_do_not() -> None:
    """Tokens are drawn from numbers of their own: the noise on z is not all that is random."""
    teacher, _ = text_teacher()
    x, still = teacher.tokenize(TEXTS), sampler(teacher, sigma=0.0)
    assert teacher.texts(still(x, step=1).x) != teacher.texts(still(x, step=2).x)
    greedy, _ = text_teacher(generation=Generation("greedy", max_new_tokens=8))
    still = sampler(greedy, sigma=0.0)
    assert greedy.texts(still(x, step=1).x) == greedy.texts(still(x, step=2).x)


def test_pieces_of_max_batch_give_what_one_call_gives() -> None:
    whole, pieces = (text_teacher(KINDS[1], max_batch=size)[0] for size in (None, 2))
    x = whole.tokenize(TEXTS)
    a, b = (sampler(teacher)(x, sample_ids=IDS) for teacher in (whole, pieces))
    assert whole.texts(a.x) == pieces.texts(b.x)
    assert toys.same(a.x, b.x)
    torch.testing.assert_close(a.teacher_logits, b.teacher_logits, rtol=1e-4, atol=1e-5)
    a, b = (teacher.decode(teacher.encode(x)) for teacher in (whole, pieces))  # and so without a key
    assert toys.same(a, b)


def test_no_global_random_number_is_drawn() -> None:
    teacher, _ = text_teacher(KINDS[1])
    before = get_rng_state()
    sampler(teacher)(teacher.tokenize(TEXTS))
    assert toys.same(before, get_rng_state())


def test_greedy_texts_are_those_of_transformers_generate() -> None:
    """Its loop and ours, from the same encoder's output: the same tokens."""
    teacher, _ = text_teacher(generation=Generation("greedy", max_new_tokens=12))
    x, model, tokenizer = teacher.tokenize(TEXTS), text_kit.bart().eval(), text_kit.bart_tokenizer()
    start = torch.tensor([[2, 0]]).expand(len(TEXTS), -1)
    theirs = model.generate(
        **x, decoder_input_ids=start, max_new_tokens=12, min_new_tokens=1, do_sample=False,
        suppress_tokens=[0, 1, 3, 4], forced_eos_token_id=None,
    )  # fmt: skip
    expected = tokenizer.batch_decode(theirs, skip_special_tokens=True)
    assert teacher.texts(teacher.decode(teacher.encode(x))) == expected


def test_generation_keeps_its_limits() -> None:
    for strategy in ("sample", "beam"):
        how = Generation(strategy, max_new_tokens=5, min_new_tokens=4)
        teacher, _ = text_teacher(generation=how)
        made = sampler(teacher)(teacher.tokenize(TEXTS)).x
        assert int(made["attention_mask"].sum(1).max()) <= 5 + 2  # and its <s> and </s>
        assert int(made["attention_mask"].sum(1).min()) >= 4 + 2
    teacher, _ = text_teacher(KINDS[2], max_length=6)
    made = sampler(teacher)(teacher.tokenize(TEXTS)).x
    assert all(value.shape[1] <= 6 for value in made.values())


def test_a_text_is_read_in_the_tokens_of_its_reader() -> None:
    """With no tokens beside the generator's, as in a loader that knows of no other, the text is tokenized anew."""
    teacher, _ = text_teacher(KINDS[1])
    x = teacher.tokenize(TEXTS)
    bare = {name: x[name] for name in ("input_ids", "attention_mask")}
    assert toys.same(teacher.student_view(x), teacher.student_view(bare))
    expected = text_kit.bert_tokenizer()(list(TEXTS), padding=True, truncation=True, max_length=48, return_tensors="pt")
    assert torch.equal(teacher.student_view(bare)["input_ids"], expected["input_ids"])
    assert torch.equal(teacher.student_view(bare)["attention_mask"], expected["attention_mask"])


def test_the_teacher_is_made_from_saved_folders(tmp_path: Any) -> None:
    generator, labeler = tmp_path / "generator", tmp_path / "labeler"
    text_kit.bart().save_pretrained(generator)
    text_kit.bart_tokenizer().save_pretrained(generator)
    text_kit.distilbert().save_pretrained(labeler)
    text_kit.bert_tokenizer().save_pretrained(labeler)
    options: dict[str, Any] = {"generation": Generation(max_new_tokens=10), "max_length": 48}
    loaded = Seq2SeqTeacher.from_pretrained(generator, labeler, student_tokenizer=labeler, **options)
    objects, _ = text_teacher(KINDS[1])
    x = objects.tokenize(TEXTS)
    assert toys.same(x, loaded.tokenize(TEXTS))
    a, b = (sampler(teacher)(x, sample_ids=IDS) for teacher in (objects, loaded))
    assert toys.same(a.x, b.x)
    assert torch.equal(a.teacher_logits, b.teacher_logits)
    torch.testing.assert_close(
        AutoModelForSeq2SeqLM.from_pretrained(generator).state_dict(), text_kit.bart().state_dict(), rtol=0, atol=0
    )


def test_nothing_of_the_teacher_trains_or_is_saved() -> None:
    teacher, student = text_teacher(KINDS[1])
    parent = torch.nn.ModuleDict({"teacher": teacher, "student": student}).train()
    sampler(teacher)(teacher.tokenize(TEXTS))
    assert all(key.startswith("student.") for key in parent.state_dict())
    assert not any(t.requires_grad for t in teacher.frozen_tensors())
    assert all(p.requires_grad for p in student.parameters())  # whose table the teacher knows
    assert student.training


def test_arguments_that_make_no_sense_are_refused() -> None:
    teacher, _ = text_teacher()
    with pytest.raises(ArgumentError, match="sequence of one string at least"):
        teacher.tokenize("one string")
    left = {"input_ids": torch.tensor([[1, 0, 9]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ArgumentError, match="padded on the right"):
        teacher.encode(left)
    model = text_kit.roberta()
    with pytest.raises(ArgumentError, match="are they one model"):
        Seq2SeqTeacher(text_kit.bart(), text_kit.bart_tokenizer(), model, student=tgt.teacher.TextClassifier(model))
    with pytest.raises(ArgumentError, match="decoder_start_token_id"):
        Seq2SeqTeacher(text_kit.roberta(), text_kit.bart_tokenizer(), model)
    with pytest.raises(ArgumentError, match="leaves no room"):
        text_teacher(max_length=2)
    with pytest.raises(ArgumentError, match="one of"):
        Generation("nucleus")
    with pytest.raises(ArgumentError, match="does not read \\['top_k'\\]"):
        Generation("greedy", top_k=3)
    with pytest.raises(ArgumentError, match="only a beam search"):
        Generation(options={"no_repeat_ngram_size": 2})
    broken = teacher.encode(teacher.tokenize(TEXTS))
    with pytest.raises(ArgumentError, match="not finite"):
        teacher.decode(Latents(broken.z * torch.nan, broken.mask, broken.source))


NO_DATA: list[Any] = [
    TEXTS, tuple(TEXTS), "a text", torch.ones(2, 4, dtype=torch.int64), [torch.ones(2, 4, dtype=torch.int64)], None,
    {"input_ids": [[1, 2], [1, 2]], "attention_mask": [[1, 1], [1, 1]]},
]  # fmt: skip


@pytest.mark.parametrize("x", NO_DATA, ids=lambda x: type(x).__name__)
def test_what_is_no_data_says_how_to_make_some(x: Any) -> None:
    teacher, student = text_teacher(KINDS[0])
    draw = sampler(teacher)
    calls = [
        lambda: draw(x, sample_ids=IDS[:2]),
        lambda: teacher.encode(x), lambda: teacher.label(x), lambda: teacher.student_view(x), lambda: teacher.texts(x),
        lambda: tgt.TGTObjective(teacher)(student, x),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(DTypeError, match=r"Seq2SeqTeacher: .*teacher\.tokenize\(texts\)"):
            call()
