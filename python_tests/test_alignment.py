"""Vocabularies aligned by token text: four ways of spelling, shared rows, tokens that only one side has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import text_kit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tgt_fast.errors import ArgumentError
from tgt_fast.teacher import align_vocabularies
from tgt_fast.teacher.consumer import Consumer, Relaxation
from tgt_fast.teacher.token_space import TokenSpace

BYTES = [
    "<pad>",
    "</s>",
    "<unk>",
    "\u0120cat",
    "cat",
    "\u0120Film",
    "s",
    ",",
    "\u0120caf\u00c3\u00a9",
    "\u00c3",
    "\u0120",
]
UNDERSCORES = ["<pad>", "</s>", "<unk>", "\u2581cat", "cat", "\u2581Film", "s", ",", "\u2581caf\u00e9", "\u2581"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat", "##cat", "film", "##s", ",", "caf\u00e9", "##x"]


def tokenizer(words: list[str], unknown: str, **roles: str) -> Any:
    """As much of a tokenizer as its vocabulary, spelling and special tokens."""
    vocabulary = {word: place for place, word in enumerate(words)}
    if unknown == "[UNK]":
        made = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, **roles)


def byte_level() -> Any:
    return tokenizer(BYTES, "<unk>", pad_token="<pad>", eos_token="</s>")


def metaspace() -> Any:
    return tokenizer(UNDERSCORES, "<unk>", pad_token="<pad>", eos_token="</s>")


def word_piece() -> Any:
    return tokenizer(PIECES, "[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def named(source: list[str], target: list[str], ids: torch.Tensor) -> dict[str, str]:
    return {word: target[match] for word, match in zip(source, ids.tolist(), strict=True) if match >= 0}


def test_the_same_text_is_found_however_it_is_spelled() -> None:
    roles = {"<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]"}
    found = align_vocabularies(byte_level(), word_piece())
    assert named(BYTES, PIECES, found.ids) == {
        **roles, "\u0120cat": "cat", "cat": "##cat", "\u0120Film": "film", "s": "##s", ",": ",",
        "\u0120caf\u00c3\u00a9": "caf\u00e9",
    }  # fmt: skip
    assert found.overlap == 6 / 8  # not the lone space, nor half of a character
    found = align_vocabularies(metaspace(), word_piece())
    assert named(UNDERSCORES, PIECES, found.ids)["\u2581caf\u00e9"] == "caf\u00e9"
    found = align_vocabularies(byte_level(), metaspace())
    assert named(BYTES, UNDERSCORES, found.ids)["\u0120"] == "\u2581"
    assert named(BYTES, UNDERSCORES, found.ids)["\u0120Film"] == "\u2581Film"
    back = align_vocabularies(word_piece(), byte_level(), minimum_overlap=0.0)
    assert named(PIECES, BYTES, back.ids) == {
        "[PAD]": "<pad>", "[UNK]": "<unk>", "[SEP]": "</s>", "cat": "\u0120cat", "##cat": "cat", "##s": "s", ",": ",",
        "caf\u00e9": "\u0120caf\u00c3\u00a9",
    }  # fmt: skip


def test_too_small_an_overlap_is_an_error_that_says_how_small() -> None:
    with pytest.raises(ArgumentError, match=r"6 of 8 tokens \(75.0%\).*minimum_overlap=80.0%"):
        align_vocabularies(byte_level(), word_piece(), minimum_overlap=0.8)
    foreign = tokenizer(["<unk>", "<pad>", "qqq", "zzz"], "<unk>", pad_token="<pad>")
    with pytest.raises(ArgumentError, match=r"0 of 8 tokens"):
        align_vocabularies(byte_level(), foreign)
    with pytest.raises(ArgumentError, match="in \\[0, 1\\]"):
        align_vocabularies(byte_level(), foreign, minimum_overlap=2.0)


def test_real_tokenizers_of_three_kinds_overlap_in_both_directions() -> None:
    made = [text_kit.bart_tokenizer(), text_kit.t5_tokenizer(), text_kit.bert_tokenizer()]
    for source in made:
        for target in made:
            found = align_vocabularies(source, target, minimum_overlap=0.0)
            assert found.ids.shape == (max(source.get_vocab().values()) + 1,)
            assert int(found.ids.max()) < len(target)
            if source is target:
                assert found.overlap == 1.0
                assert torch.equal(found.ids, torch.arange(len(source)))
            for word, place in source.get_vocab().items():
                if len(word) > 3 and found.ids[place] >= 0 and place not in source.all_special_ids:
                    theirs = target.convert_ids_to_tokens(int(found.ids[place]))
                    strip = str.maketrans("", "", "\u0120\u2581#")
                    assert word.translate(strip).lower() == theirs.translate(strip).lower()


def reader(embedding: nn.Embedding) -> tuple[Consumer, TokenSpace]:
    generator = TokenSpace(byte_level(), 16, "generator")
    return Consumer("labeler", TokenSpace(word_piece(), 16, "labeler"), generator, embedding, Relaxation()), generator


def test_tokens_of_one_counterpart_share_its_row_and_its_gradient() -> None:
    """ "cat" within a word has its own row here; of the two "film" the capital is read as the other."""
    embedding = nn.Embedding(len(PIECES), 3)
    side, _ = reader(embedding)
    table, readable = side._table(len(BYTES) + 2, torch.device("cpu"))  # a model of more columns than tokens
    assert table.shape == (len(BYTES) + 2, 3)
    assert torch.equal(table[BYTES.index("\u0120Film")], embedding.weight[PIECES.index("film")])
    lost = [word for word, can in zip(BYTES, readable.tolist(), strict=False) if not can]
    assert lost == ["<pad>", "</s>", "<unk>", "\u00c3", "\u0120"]
    assert not readable[len(BYTES) :].any()
    table.sum().backward()
    assert embedding.weight.grad is not None
    assert (embedding.weight.grad[PIECES.index("film")] == 1).all()
    assert (embedding.weight.grad[PIECES.index("##x")] == 0).all()


def test_a_token_without_counterpart_is_read_as_the_mean_of_its_pieces() -> None:
    words = [*BYTES, "\u0120cats", "\u0120catscatx"]
    source = tokenizer(words, "<unk>", pad_token="<pad>", eos_token="</s>")
    found = align_vocabularies(source, word_piece())
    assert found.ids[-2:].tolist() == [-1, -1]
    assert [[PIECES[token] for token in found.spelled[place]] for place in (-2, -1)] == [
        ["cat", "##s"], ["cat", "##s", "##cat", "##x"],
    ]  # fmt: skip
    embedding = nn.Embedding(len(PIECES), 3)
    generator = TokenSpace(source, 16, "generator")
    side = Consumer("labeler", TokenSpace(word_piece(), 16, "labeler"), generator, embedding, Relaxation())
    table, readable = side._table(len(words), torch.device("cpu"))
    assert readable[-2:].all()
    torch.testing.assert_close(table[-2], (embedding.weight[4] + embedding.weight[7]) / 2)


def test_what_a_reader_cannot_read_has_no_place_and_no_probability() -> None:
    embedding = nn.Embedding(len(PIECES), 3).eval()
    side, generator = reader(embedding)
    source = torch.tensor([[3, 10, 6, 1]])  # " cat", a lone space, "s", the end
    logits = torch.zeros(1, 4, len(BYTES), requires_grad=True)
    content = torch.tensor([[True, True, True, False]])
    assert generator.special >= {0, 1, 2}
    made = side({"token_logits": logits, "content": content, "source": source})
    assert made["attention_mask"].tolist() == [[1, 1, 0, 0]]  # this tokenizer adds neither [CLS] nor [SEP]
    readable = [4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(made["inputs_embeds"][0, 0], embedding.weight[readable].mean(0))
    made["inputs_embeds"][0, :2].square().sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, 1] == 0).all()
    assert (logits.grad[0, :, [0, 1, 2, 9, 10]] == 0).all()
    assert (logits.grad[0, [0, 2]].abs().sum(1) > 0).all()
    nothing = side({"token_logits": logits, "content": content & False, "source": source})
    assert nothing["attention_mask"].tolist() == [[1, 0, 0, 0]]
    assert torch.equal(nothing["inputs_embeds"][0, 0], embedding.weight[0])  # padding, as such a text's tokens are
    assert side.space.batch([[]])["input_ids"].tolist() == [[0]]
