"""The teacher: a larger transformer, pretrained on all training text; and its records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tgt_fast.demos.lm.data import Batches, Text, Windows
from tgt_fast.demos.lm.models import LanguageModel
from tgt_fast.demos.lm.settings import Settings
from tgt_fast.demos.lm.training import bits_per_byte, next_token_loss, train
from tgt_fast.demos.networks import Weights, weights_of, with_weights
from tgt_fast.ops.topk import TeacherTopK, topk_teacher

TEACHER_SEED = 1_000_003  # one teacher for all seeds of the students


@dataclass(frozen=True)
class TeacherResult:
    """The pretrained teacher."""

    weights: Weights
    bits_per_byte: float  # of the text it is judged on
    before: float  # untrained
    seconds: float
    curve: tuple[tuple[int, float], ...]

    def build(self, settings: Settings) -> LanguageModel:
        """The model, frozen."""
        return with_weights(teacher_model(settings), self.weights).eval().requires_grad_(False)


def teacher_model(settings: Settings) -> LanguageModel:
    s = settings
    return LanguageModel(s.tokens, s.length, s.teacher_width, s.teacher_layers, s.teacher_heads)


def train_teacher(text: Text, judge: Windows, settings: Settings) -> TeacherResult:
    """Next-token prediction on the training text; ``judge``: the text whose bits per byte are reported."""
    torch.manual_seed(TEACHER_SEED)
    model = teacher_model(settings)
    trained = train(
        model,
        lambda hidden, ids, x, y: next_token_loss(hidden, model.head, y),
        Batches(text.train, settings.batch, settings.teacher_steps, TEACHER_SEED),
        settings.teacher_rate,
        settings.weight_decay,
        lambda model: bits_per_byte(model, judge, text.bytes_of),
        settings.evaluations,
    )
    before, after = trained.curve[0][1], trained.curve[-1][1]
    return TeacherResult(weights_of(model), after, before, trained.seconds, trained.curve)


class Recorder(nn.Module):
    """Tokens ``[B, L]`` -> the teacher's record of the next token, ``[B, L, k]``.

    One window at a time, so that the last bits of a window's record do not depend on the batch it comes in: a record
    that is made again is the same, and a student cannot tell whether its teacher's words are fresh or from a cache.
    """

    def __init__(self, model: LanguageModel, k: int, temperature: float, tail: str) -> None:
        super().__init__()
        self.model, self.k, self.temperature, self.tail = model, k, temperature, tail

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> TeacherTopK:
        made = [self._record(window) for window in torch.split(tokens, 1)]
        return TeacherTopK(
            torch.cat([record.ids for record in made]),
            torch.cat([record.log_probs for record in made]),
            torch.cat([record.tail_log_prob for record in made if record.tail_log_prob is not None]),
            self.temperature,
            made[0].num_classes,
            self.tail,
        )

    def _record(self, window: Tensor) -> TeacherTopK:
        return topk_teacher(self.model(window) @ self.model.head.T, self.k, self.temperature, tail=self.tail)
