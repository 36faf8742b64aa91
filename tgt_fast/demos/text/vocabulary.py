"""A small vocabulary: the pieces of a pretrained tokenizer's that a set of texts uses most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tgt_fast._optional import optional

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4


def common_pieces(texts: Sequence[str], tokenizer: Any, size: int) -> list[str]:
    """The vocabulary: special tokens, then the ``size`` - 5 most frequent pieces, by frequency.

    Being pieces of ``tokenizer`` as well, a soft choice among them is one among its embeddings too.
    """
    made = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    counts = Counter(piece for row in made for piece in row)
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    names = tokenizer.convert_ids_to_tokens(ranked)
    return [*SPECIAL, *(name for name in names if name not in SPECIAL)][:size]


def word_pieces(vocabulary: Sequence[str], max_length: int) -> Any:
    """The tokenizer of a vocabulary, lower-case, that ends a text with ``[SEP]``: what BART's models expect."""
    tokenizers = optional("tokenizers", "hf", "the demo")
    transformers = optional("transformers", "hf", "the demo")
    ids = {piece: place for place, piece in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", ids["[SEP]"])]
    )
    made.decoder = tokenizers.decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        mask_token="[MASK]", model_max_length=max_length,
    )  # fmt: skip
