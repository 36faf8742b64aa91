"""The teacher: a pretrained sentence encoder, and BART trained on texts without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tgt_fast.demos.networks import Weights
from tgt_fast.demos.retrieval.data import token_rows
from tgt_fast.demos.retrieval.settings import Settings
from tgt_fast.demos.text.generator import PAD, load_generator
from tgt_fast.demos.text.sentences import SentenceEncoder, load_sentence_encoder
from tgt_fast.demos.text.vocabulary import word_pieces
from tgt_fast.explore import LatentSampler
from tgt_fast.teacher import Generation, Seq2SeqTeacher

Array = npt.NDArray[np.generic]  # a tensor would be sent to another process as shared memory
_BATCH = 128


@lru_cache(maxsize=1)
def sentence_encoder() -> SentenceEncoder:
    """The sentence encoder, loaded once a process."""
    return load_sentence_encoder()


@dataclass(frozen=True)
class Synthetic:
    """M passages made of each of n."""

    ids: Array  # [n, M, L] int64, as the student reads them
    vectors: Array  # [n, M, 384] float32, the teacher's
    texts: tuple[str, ...]  # the first one of each


def build_teacher(vocabulary: Sequence[str], generator: Weights, settings: Settings) -> Seq2SeqTeacher:
    """The frozen teacher; what it says of a text is the sentence encoder's vector."""
    s, encoder = settings, sentence_encoder()
    return Seq2SeqTeacher(
        load_generator(generator, len(vocabulary), s.generator),
        word_pieces(vocabulary, s.length),
        encoder,
        labeler_tokenizer=encoder.tokenizer,
        generation=Generation(
            temperature=s.draw_temperature, top_p=s.draw_top_p, max_new_tokens=s.length, min_new_tokens=4
        ),
        max_length=s.length,
    )


def explore(
    teacher: Seq2SeqTeacher,
    passages: Sequence[str],
    settings: Settings,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Synthetic:
    """``settings.variants`` passages of each one, decoded from its noised encoding, and the teacher's vectors of them."""
    s = settings
    ids = token_rows(passages, word_pieces_of(teacher))
    made = torch.zeros(len(ids), s.variants, s.length, dtype=torch.int64)
    vectors: Tensor | None = None
    texts = [""] * len(ids)
    sampler = LatentSampler(teacher, mode="random", sigma=s.sigma, seed=seed)
    order = (ids != PAD).sum(1).argsort(stable=True)  # texts of about one length together: little padding
    sampler.calibrate(_data(ids[rows]) for rows in order.split(_BATCH))
    for variant in range(s.variants):
        for rows in order.split(_BATCH):
            synthetic = sampler(_data(ids[rows]), sample_ids=rows, step=variant)
            found = synthetic.x["input_ids"][:, : s.length]
            made[rows, variant] = F.pad(found, (0, s.length - found.shape[1]), value=PAD)
            if vectors is None:
                vectors = torch.zeros(len(ids), s.variants, synthetic.teacher_logits.shape[1])
            vectors[rows, variant] = synthetic.teacher_logits.float()
            if not variant:
                for row, text in zip(rows.tolist(), teacher.texts(synthetic.x), strict=True):
                    texts[row] = text
        progress(variant + 1)
    assert vectors is not None
    return Synthetic(made.numpy(), vectors.numpy(), tuple(texts))


def word_pieces_of(teacher: Seq2SeqTeacher) -> object:
    """The generator's tokenizer, which is the student's too."""
    return teacher._generator.space.tokenizer


def _data(ids: Tensor) -> dict[str, Tensor]:
    real = ids != PAD
    longest = int(real.sum(1).max())
    return {"input_ids": ids[:, :longest], "attention_mask": real[:, :longest].long()}
