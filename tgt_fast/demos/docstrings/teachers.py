"""The teacher: BART trained on texts without labels, and the sentence encoder with a head trained on labelled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast.demos.digits.teachers import cosine
from tgt_fast.demos.docstrings.models import Labeler, labeler_head
from tgt_fast.demos.docstrings.settings import Settings
from tgt_fast.demos.networks import Weights, weights_of, with_weights
from tgt_fast.demos.text.generator import load_generator
from tgt_fast.demos.text.sentences import SentenceEncoder, sentence_encoder
from tgt_fast.demos.text.vocabulary import word_pieces
from tgt_fast.teacher import Generation, Seq2SeqTeacher
from tgt_fast.train.rng import isolated_rng


@dataclass(frozen=True)
class TeacherWeights:
    """The parts that travel between processes."""

    vocabulary: Sequence[str]
    generator: Weights
    head: Weights
    classes: int

    def build(self, settings: Settings, student: nn.Module | None = None) -> Seq2SeqTeacher:
        """The frozen teacher; for gradients it needs to know the student's table of embeddings."""
        s = settings
        encoder = sentence_encoder()
        length = s.generator.max_length
        return Seq2SeqTeacher(
            load_generator(self.generator, len(self.vocabulary), s.generator),
            word_pieces(self.vocabulary, length),
            self.labeler(settings, encoder),
            labeler_tokenizer=encoder.tokenizer,
            student=student,
            generation=Generation(
                temperature=s.draw_temperature, top_p=s.draw_top_p, max_new_tokens=length, min_new_tokens=4
            ),
            max_length=length,
            max_batch=None,
        )

    def labeler(self, settings: Settings, encoder: SentenceEncoder) -> Labeler:
        head = labeler_head(self.classes, settings.labeler_hidden, settings.labeler_dropout)
        return Labeler(encoder, with_weights(head, self.head)).eval()


def train_head(embeddings: Tensor, y: Tensor, classes: int, settings: Settings, seed: int) -> Weights:
    """The labeler's head, by cross-entropy with smoothed labels.

    Args:
        embeddings: float32 [N, 384] of the texts for training.
        y: int64 [N], their classes.
    """
    s = settings
    with isolated_rng(seed):
        head = labeler_head(classes, s.labeler_hidden, s.labeler_dropout).train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(head.parameters(), s.labeler_rate, weight_decay=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(s.labeler_steps))
        for _ in range(s.labeler_steps):
            rows = torch.randint(len(y), (s.labeler_batch,), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(head(embeddings[rows]), y[rows], label_smoothing=s.labeler_smoothing)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return weights_of(head)


@torch.no_grad()
def head_logits(head: Weights, embeddings: Tensor, classes: int, settings: Settings) -> Tensor:
    """The labeler's logits of texts whose embeddings are known: float32 [N, C]."""
    module = with_weights(labeler_head(classes, settings.labeler_hidden, settings.labeler_dropout), head).eval()
    logits: Tensor = module(embeddings)
    return logits


Step = Callable[[int, int], None]
