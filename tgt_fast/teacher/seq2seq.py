"""Seq2SeqTeacher: an encoder-decoder of transformers as the generator of texts, a classifier as their labeler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tgt_fast._optional import optional
from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.ops import _checks
from tgt_fast.teacher.consumer import Consumer, Relaxation, TextClassifier
from tgt_fast.teacher.generation import Generation
from tgt_fast.teacher.teacher import Teacher
from tgt_fast.teacher.text_generator import TextData, TextGenerator
from tgt_fast.teacher.token_space import TokenSpace

_OP = "Seq2SeqTeacher"


class Seq2SeqTeacher(Teacher):
    r"""A teacher of texts: ``z = Enc(tokens)``, ``tokens~ = Dec(z)``, ``logits = h(tokens~)``::

        random      tokens~ drawn from the decoder, one after the other, given z = Enc(tokens) + noise
        gradient    p = softmax(Dec(z | tokens)) at all positions at once, the decoder fed the anchor's own tokens;
                    labeler and student read p @ table, each of its own table, so that a gradient reaches z;
                    tokens~ are then decoded from the z that was reached

    Any encoder-decoder of Hugging Face's transformers (BART, T5) with any classifier of a dict of tokens. Generator,
    labeler and student may have three tokenizers. Noise acts on the encoder's output at the real positions alone.

    *Data* is a dict of int64 tensors [B, L], padded on the right: ``input_ids`` and ``attention_mask`` in the
    generator's tokens, which :meth:`tokenize` makes of strings, and, where a tokenizer differs, ``labeler_input_ids``
    and so on beside them (without these a text is decoded and tokenized anew). The sampler's ``synth.x`` is such data
    and ``teacher.texts(synth.x)`` its strings; ``teacher.student_view(x)`` is what the student is called with, a dict
    of ``input_ids``, or of relaxed ``inputs_embeds``, and ``attention_mask``.

    Args:
        generator: an encoder-decoder such as ``BartForConditionalGeneration``.
        tokenizer: the generator's.
        labeler: a classifier of transformers, or a callable: such a dict -> logits [B, C].
        labeler_tokenizer: the generator's by default.
        student: the model in training, a :class:`TextClassifier` or a module with ``get_input_embeddings()``. It is
            read for its table of embeddings alone, and only gradient and persistent exploration need it.
        student_tokenizer: the generator's by default.
        labeler_embedding, student_embedding: the tables, modules with a ``weight``, of models that have no
            ``get_input_embeddings()``.
        generation: how texts are decoded: drawn, greedily or by beam search; :class:`Generation`.
        max_length: >= 1, the most tokens of a text, special ones included, for each of the three.
        tau, gumbel, hard: of the relaxation, see :func:`tgt_fast.soft_embedding`. Noise is keyed as the sampler's.
        minimum_overlap: in [0, 1], see :func:`align_vocabularies`; looked at when a relaxed text is first needed. A
            token that a reader lacks is read as the mean of its pieces there.
        max_batch: texts that go through a model at a time.
        backend: of ``sample_tokens`` and ``soft_embedding``.

    A text that is drawn depends on its anchor and its key (seed, sample id, step, replica) alone, not on the texts
    beside it, up to the rounding of the models' own arithmetic. Each token takes a step of the noise: the sampler's own
    may go up to 2**28 / (tokens a text). Decoding runs from the host, which waits for the device after each token. Not
    yet run on a GPU.

    Raises:
        ArgumentError: an option out of range, a labeler that is the student, or a tokenizer without tokens.
        DependencyError: transformers is not installed.

    >>> import torch, tgt_fast as tgt
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
    >>> vocabulary = {word: place for place, word in enumerate("<s> <pad> </s> ? a good bad film".split())}
    >>> words = Tokenizer(models.WordLevel(vocabulary, "?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="?")
    >>> sizes = dict(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1, max_position_embeddings=32)
    >>> heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8)
    >>> generator = BartForConditionalGeneration(BartConfig(**sizes, **heads))
    >>> labeler = lambda text: torch.stack([(text["input_ids"] == k).sum(1) for k in (5, 6)], 1).float()
    >>> options = tgt.teacher.Generation(max_new_tokens=6)
    >>> teacher = tgt.teacher.Seq2SeqTeacher(generator, tokenizer, labeler, generation=options, max_length=16)
    >>> sampler = tgt.LatentSampler(teacher, sigma=1.0, units="absolute")
    >>> synth = sampler(teacher.tokenize(["a good film", "bad"]), sample_ids=torch.tensor([7, 8]))
    >>> len(teacher.texts(synth.x)), synth.teacher_logits.shape
    (2, torch.Size([2, 2]))
    """

    def __init__(
        self,
        generator: nn.Module,
        tokenizer: Any,
        labeler: Callable[..., Any],
        *,
        labeler_tokenizer: Any = None,
        student: nn.Module | None = None,
        student_tokenizer: Any = None,
        labeler_embedding: nn.Module | None = None,
        student_embedding: nn.Module | None = None,
        generation: Generation | None = None,
        max_length: int = 128,
        tau: float = 1.0,
        gumbel: bool = False,
        hard: bool = False,
        minimum_overlap: float = 0.25,
        max_batch: int | None = None,
        backend: str = "auto",
    ) -> None:
        transformers = optional("transformers", "hf", _OP)
        if isinstance(labeler, transformers.PreTrainedModel):
            labeler = TextClassifier(labeler)
        tables = [_table(labeler, labeler_embedding), _table(student, student_embedding)]
        if tables[0] is not None and tables[0] is tables[1]:
            raise ArgumentError(f"{_OP}: student and labeler share a table of embeddings: are they one model?")
        max_length = _checks.integer(_OP, "max_length", max_length, 1, 1 << 20)
        relaxation = Relaxation(tau, gumbel, hard, minimum_overlap, backend)
        space = TokenSpace(tokenizer, max_length, "generator")
        sides = []
        for name, own, table in zip(
            ("labeler", "student"), (labeler_tokenizer, student_tokenizer), tables, strict=True
        ):
            tokens = space if own is None else TokenSpace(own, max_length, name)
            sides.append(Consumer(name, tokens, space, table, relaxation))
        text = TextGenerator(generator, space, (sides[0], sides[1]), Generation() if generation is None else generation)
        super().__init__(
            text.encode,
            text.decode,
            labeler,
            labeler_transform=sides[0],
            student_transform=sides[1],
            max_batch=max_batch,
            modules=[generator, *([] if tables[0] is None else [tables[0]])],
        )
        self._generator = text

    @classmethod
    def from_pretrained(
        cls,
        generator: str | os.PathLike[str],
        labeler: str | os.PathLike[str] | Callable[..., Any],
        *,
        labeler_tokenizer: Any = None,
        student_tokenizer: Any = None,
        model_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Seq2SeqTeacher:
        """The teacher from folders or names that transformers' ``from_pretrained`` takes.

        Args:
            generator: of an encoder-decoder and its tokenizer.
            labeler: of a sequence classifier and its tokenizer; or a callable, with ``labeler_tokenizer=``.
            labeler_tokenizer, student_tokenizer: tokenizers, or folders or names of ones; by default the labeler's own,
                and the generator's.
            model_options: for ``from_pretrained`` of both models, such as ``{"dtype": torch.bfloat16}``.
            options: of :class:`Seq2SeqTeacher`.

        Raises:
            DependencyError: transformers is not installed. Its own errors are passed on.
        """
        transformers = optional("transformers", "hf", _OP)
        model_options = {} if model_options is None else model_options
        if isinstance(labeler, (str, os.PathLike)):
            labeler_tokenizer = labeler if labeler_tokenizer is None else labeler_tokenizer
            classifier: Any = transformers.AutoModelForSequenceClassification.from_pretrained(labeler, **model_options)
        else:
            classifier = labeler
        tokenizers = [
            transformers.AutoTokenizer.from_pretrained(given) if isinstance(given, (str, os.PathLike)) else given
            for given in (generator, labeler_tokenizer, student_tokenizer)
        ]
        return cls(
            transformers.AutoModelForSeq2SeqLM.from_pretrained(generator, **model_options),
            tokenizers[0],
            classifier,
            labeler_tokenizer=tokenizers[1],
            student_tokenizer=tokenizers[2],
            **options,
        )

    def tokenize(self, texts: Sequence[str]) -> TextData:
        """B strings -> data, on the CPU: the generator's tokens, and beside them the other tokenizers' own.

        Raises:
            ArgumentError: no text, or one string instead of a sequence.
        """
        space = self._generator.space
        made: TextData = {**space.tokenize(texts)}
        return made | self._generator.tokens_beside(list(texts))

    def check_data(self, x: TextData) -> None:
        """
        Raises:
            DTypeError: strings, a tensor, or tokens that are no tensors.
        """
        if not isinstance(x, Mapping):
            found = f"{type(x).__name__} of strings" if _holds_strings(x) else type(x).__name__
            raise DTypeError(
                f"{_OP}: data are a dict of tensors, input_ids and attention_mask, got {found}; pass "
                "teacher.tokenize(texts), or what the tokenizer gives with padding=True, return_tensors='pt'"
            )
        for name in ("input_ids", "attention_mask"):
            if name in x and not isinstance(x[name], Tensor):
                raise DTypeError(
                    f"{_OP}: {name} must be a tensor, got {type(x[name]).__name__}; pass teacher.tokenize(texts), or "
                    "call the tokenizer with padding=True, return_tensors='pt'"
                )

    def texts(self, x: TextData) -> list[str]:
        """The strings of a batch of data, from the generator's tokens; special tokens are left out.

        Raises:
            ArgumentError: relaxed data, which stand for no one text.
        """
        self.check_data(x)
        return self._generator.texts(x)

    def changes(self, before: TextData, after: TextData) -> dict[str, float]:
        """The share of decoded texts that differ: ``{"texts": share of texts, "tokens": share of places}`` that do.

        Exploration moves latents; whether their texts move, too, is seen only by decoding both. Compare what one
        sampler makes in mode "random" with what another one makes in mode "gradient", of the same seed, scale, sample
        ids and step: the same start, before and after its steps.

        Args:
            before, after: two batches of data of one size, in the same order. A place is one of the longer text's.

        Raises:
            ArgumentError: batches of different size, or relaxed data.
        """
        return self._generator.changes(before, after)

    def join(self, pieces: Sequence[TextData]) -> TextData:
        """Batches one after the other, padded on the right to the longest."""
        return self._generator.join(pieces)


def _holds_strings(x: Any) -> bool:
    return isinstance(x, str) or (isinstance(x, (list, tuple)) and all(isinstance(one, str) for one in x))


def _table(model: Any, given: nn.Module | None) -> nn.Module | None:
    """A model's input embeddings, as given or as it says itself."""
    if given is not None or not hasattr(model, "get_input_embeddings"):
        return given
    found: nn.Module = model.get_input_embeddings()
    return found
