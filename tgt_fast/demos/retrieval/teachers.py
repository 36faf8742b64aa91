"""The teacher: a pretrained sentence encoder, and BART trained on texts without labels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tgt_fast.demos.networks import Weights
from tgt_fast.demos.retrieval.data import Vectors
from tgt_fast.demos.retrieval.settings import Settings
from tgt_fast.demos.text.generator import PAD, load_generator
from tgt_fast.demos.text.sentences import WIDTH, sentence_encoder
from tgt_fast.demos.text.vocabulary import word_pieces
from tgt_fast.explore import LatentSampler
from tgt_fast.teacher import Generation, Seq2SeqTeacher

_BATCH = 128


@dataclass(frozen=True)
class Written:
    """Synthetic passages, M of each of n."""

    passages: Vectors  # [n M]
    texts: tuple[str, ...]  # the first one of each of the n
    seconds: float  # to write and to label them


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


@torch.no_grad()
def explore(teacher: Seq2SeqTeacher, passages: Tensor, settings: Settings, seed: int) -> Written:
    """``settings.variants`` texts of each passage, decoded from its noised encoding, and what the teacher says of them.

    Args:
        passages: int64 [n, L], in the generator's tokens.
    """
    s, ids = settings, passages
    begun = time.perf_counter()
    made = torch.zeros(len(ids), s.variants, s.length, dtype=torch.int64)
    vectors = torch.zeros(len(ids), s.variants, WIDTH)
    texts = [""] * len(ids)
    sampler = LatentSampler(teacher, mode="random", sigma=s.sigma, seed=seed)
    order = (ids != PAD).sum(1).argsort(stable=True)  # texts of about one length together: little padding
    batches = torch.split(order, _BATCH)
    sampler.calibrate(_data(ids[rows]) for rows in batches)
    for variant in range(s.variants):
        for rows in batches:
            synthetic = sampler(_data(ids[rows]), sample_ids=rows, step=variant)
            found = synthetic.x["input_ids"][:, : s.length]
            made[rows, variant] = F.pad(found, (0, s.length - found.shape[1]), value=PAD)
            vectors[rows, variant] = synthetic.teacher_logits.float()
            if not variant:
                for row, text in zip(rows.tolist(), teacher.texts(synthetic.x), strict=True):
                    texts[row] = text
    return Written(Vectors(made.flatten(0, 1), vectors.flatten(0, 1)), tuple(texts), time.perf_counter() - begun)


def _data(ids: Tensor) -> dict[str, Tensor]:
    real = ids != PAD
    longest = int(real.sum(1).max())
    return {"input_ids": ids[:, :longest], "attention_mask": real[:, :longest].long()}
