"""Tiny texts, tokenizers and randomly initialised models of transformers' own classes; nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from functools import lru_cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import toys
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import tgt_fast as tgt

CLASSES = 3
TEXTS = (
    "the cat sat on the mat",
    "A dog ran in the park, and then it slept",
    "return the sum",
    "good",
    "it was a bad film but the music was good and the cat was not",
    "open the file and read all of its lines",
)

NOUNS, VERBS = ("film", "book", "song", "meal", "game", "park"), ("was", "seemed", "is")
MOODS = (("good", "great", "fine", "lovely"), ("bad", "poor", "awful", "dull"), ("long", "old", "short", "new"))
SENTENCES = tuple(
    f"the {noun} {verb} {word}" + (" to me" if (place + len(noun)) % 3 == 0 else "")
    for noun in NOUNS
    for verb in VERBS
    for place, mood in enumerate(MOODS)
    for word in mood
)
SENTENCE_CLASSES = torch.tensor([place for _ in NOUNS for _ in VERBS for place, mood in enumerate(MOODS) for _ in mood])


@lru_cache
def bart_tokenizer() -> Any:
    """Byte-level BPE, <s> text </s>, as BART and RoBERTa have it."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    t.train_from_iterator(TEXTS * 3 + SENTENCES, trainer)
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=t, **names)


@lru_cache
def t5_tokenizer() -> Any:
    """SentencePiece's way of writing words, text </s>, as T5 has it."""
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    t.train_from_iterator(TEXTS * 3 + SENTENCES, trainer)
    # Pieces that are equally likely come in an order of each process's own.
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(t.to_str())["model"]["vocab"][len(special) :]]
    pieces.sort(key=lambda pair: (-pair[1], pair[0]))
    t.model = models.Unigram([*((name, 0.0) for name in special), *pieces], unk_id=2)
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@lru_cache
def bert_tokenizer() -> Any:
    """WordPiece in lower case, [CLS] text [SEP], as BERT and DistilBERT have it."""
    # Frequent words and pairs of letters; what WordPiece's own trainer finds differs from process to process.
    words = Counter(re.findall(r"[a-z]+|[^a-z ]", " ".join(TEXTS * 3 + SENTENCES).lower()))
    pairs = Counter(word[at : at + 2] for word in words.elements() for at in range(1, len(word) - 1))
    letters = sorted({letter for word in words for letter in word})

    def most(counts: Counter[str], size: int) -> list[str]:
        return sorted((part for part in counts if len(part) > 1), key=lambda part: (-counts[part], part))[:size]

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    names += [*(f"##{pair}" for pair in most(pairs, 60)), *most(words, 60)]
    vocabulary = {name: place for place, name in enumerate(names)}
    t = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=t, mask_token="[MASK]", **special)


def bart(vocabulary: int | None = None, **options: Any) -> Any:
    size = len(bart_tokenizer()) if vocabulary is None else vocabulary
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    # A larger spread than is usual, so that an untrained model does not say the same everywhere.
    config = BartConfig(vocab_size=size, **{"init_std": 0.4, **shape, **options})
    return toys.seeded(lambda: BartForConditionalGeneration(config), 0)


def t5() -> Any:
    config = T5Config(
        vocab_size=len(t5_tokenizer()) + 8,  # more than the tokenizer knows, as T5's own is
        d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, initializer_factor=2.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return toys.seeded(lambda: T5ForConditionalGeneration(config), 0)


def roberta(seed: int = 1, **options: Any) -> Any:
    """Of BART's vocabulary."""
    config = RobertaConfig(
        vocab_size=len(bart_tokenizer()), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=70, pad_token_id=1, num_labels=CLASSES,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return toys.seeded(lambda: RobertaForSequenceClassification(config), seed)


def distilbert(seed: int = 2, tokenizer: Any = None) -> Any:
    config = DistilBertConfig(
        vocab_size=len(bert_tokenizer() if tokenizer is None else tokenizer), dim=24, n_heads=2, n_layers=1,
        hidden_dim=48, max_position_embeddings=80, num_labels=CLASSES, initializer_range=0.3,
    )  # fmt: skip
    return toys.seeded(lambda: DistilBertForSequenceClassification(config), seed)


KINDS = ("bart, roberta, roberta", "bart, distilbert, distilbert", "t5, roberta, distilbert")


def text_teacher(kind: str = KINDS[0], **options: Any) -> tuple[tgt.teacher.Seq2SeqTeacher, tgt.teacher.TextClassifier]:
    """A teacher (generator, labeler) and a student, by name."""
    generator, labeler, student = kind.split(", ")
    tokenizers = {"bart": bart_tokenizer, "t5": t5_tokenizer, "roberta": bart_tokenizer, "distilbert": bert_tokenizer}
    classifiers = {"roberta": roberta, "distilbert": distilbert}
    learner = tgt.teacher.TextClassifier(classifiers[student](seed=5))
    options.setdefault("generation", tgt.teacher.Generation(max_new_tokens=10))
    options.setdefault("max_length", 48)
    teacher = tgt.teacher.Seq2SeqTeacher(
        bart() if generator == "bart" else t5(), tokenizers[generator](), classifiers[labeler](),
        labeler_tokenizer=tokenizers[labeler](), student=learner, student_tokenizer=tokenizers[student](), **options,
    )  # fmt: skip
    return teacher, learner


def one(x: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Example ``row`` alone, without padding."""
    alone = {}
    for name, value in x.items():
        mask = x[name.replace("input_ids", "attention_mask")]
        alone[name] = value[row : row + 1, : int(mask[row].sum())]
    return alone


def trained_teacher(steps: int = 120, **options: Any) -> tuple[tgt.teacher.Seq2SeqTeacher, tgt.teacher.TextClassifier]:
    """A generator that has learned to say again what it read, through noise; a labeler that knows the moods, in tokens
    of its own; a student that knows nothing yet, in tokens of its own. Three tokenizers, seconds of training."""
    x = bart_tokenizer()(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator, labeler = bart(init_std=0.1, d_model=48, dropout=0.0), distilbert()
        optimizer = torch.optim.Adam([*generator.parameters(), *labeler.parameters()], lr=6e-3)
        read = bert_tokenizer()(list(SENTENCES), padding=True, return_tensors="pt")
        labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
        for step in range(steps):
            rows = torch.randperm(len(SENTENCES))[:32]
            mask = x["attention_mask"][rows]
            z = generator.get_encoder()(input_ids=x["input_ids"][rows], attention_mask=mask).last_hidden_state
            z = z + 0.5 * z.std().detach() * torch.randn_like(z)
            loss = generator(encoder_outputs=(z,), attention_mask=mask, labels=labels[rows]).loss
            if step < 60:
                loss = loss + labeler(**{n: v[rows] for n, v in read.items()}, labels=SENTENCE_CLASSES[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learner = tgt.teacher.TextClassifier(roberta(seed=5))
    options.setdefault("generation", tgt.teacher.Generation(max_new_tokens=16, top_p=0.9))
    teacher = tgt.teacher.Seq2SeqTeacher(
        generator, bart_tokenizer(), labeler, labeler_tokenizer=bert_tokenizer(), student=learner, max_length=24,
        **options,
    )  # fmt: skip
    return teacher, learner
