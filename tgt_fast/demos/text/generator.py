"""A small BART, trained on texts without labels to write again what it is shown masked and through noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast._optional import optional
from tgt_fast.demos.networks import Weights, weights_of, with_weights
from tgt_fast.demos.text.precision import fast_dtype
from tgt_fast.demos.text.vocabulary import SPECIAL
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.train.rng import isolated_rng

PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))


@dataclass(frozen=True)
class GeneratorSettings:
    """Hyper-parameters."""

    max_length: int = 40  # tokens of a text, the one that ends it included
    width: int = 192
    layers: int = 2  # of the encoder, and of the decoder
    hidden: int = 384
    head_width: int = 32
    dropout: float = 0.1
    initial: float = 0.06  # standard deviation of the weights: BART's 0.02 is for models several times as wide
    steps: int = 900
    batch: int = 64
    rate: float = 2e-3
    warm_up: float = 0.06  # share of the steps
    masked: float = 0.15  # most tokens of a text that are masked
    noise: float = 4.0  # most noise on the encoder's output, in its standard deviations


def build_generator(vocabulary: int, settings: GeneratorSettings) -> Any:
    """transformers' BART for conditional generation, with its initial weights."""
    transformers = optional("transformers", "hf", "the demo")
    s = settings
    config = transformers.BartConfig(
        vocab_size=vocabulary, d_model=s.width, encoder_layers=s.layers, decoder_layers=s.layers,
        encoder_ffn_dim=s.hidden, decoder_ffn_dim=s.hidden, encoder_attention_heads=s.width // s.head_width,
        decoder_attention_heads=s.width // s.head_width, max_position_embeddings=s.max_length + 2, dropout=s.dropout,
        pad_token_id=PAD, bos_token_id=CLS, eos_token_id=SEP, decoder_start_token_id=CLS, forced_eos_token_id=None,
        attention_dropout=0.0, init_std=s.initial,
    )  # fmt: skip
    # On a CPU the fused attention's backward pass is, for texts this short, half of a step.
    config._attn_implementation = "eager"
    return transformers.BartForConditionalGeneration(config)


def train_generator(
    rows: Sequence[Sequence[int]],
    vocabulary: int,
    settings: GeneratorSettings,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """``-log p(tokens | Enc(masked tokens) + noise)``, a mean over tokens, minimised.

    The share of masked tokens and the size of the noise are drawn for each text, from none to the settings' most. So
    the decoder learns what texts look like for any size of noise: near the text where there is little, and ever more of
    its own making where there is much.

    Args:
        rows: the tokens of each text, without any special ones.
        vocabulary: how many tokens there are.
        seed: of everything that is drawn.
    """
    with isolated_rng(seed):
        model = build_generator(vocabulary, settings).train()
        _look_straight_ahead(model)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), settings.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        steps = settings.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmed_cosine(steps, settings.warm_up))
        batches = _batches(rows, settings, order)
        for step in range(steps):
            ids = next(batches)
            optimizer.zero_grad()
            torch.autograd.backward(denoising_loss(model, ids, settings, order))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(step + 1, steps)
    return weights_of(model)


@torch.no_grad()
def _look_straight_ahead(model: Any) -> None:
    """Begin where each place of the decoder looks at the same place of the encoder's output and passes it on.

    Else the first hundreds of steps teach the frequencies of tokens and hardly anything more: after 150 the loss is 6.2
    nats a token, against 4.3 this way.
    Both sides' places begin as the same waves, a little louder than the tokens; a cross-attention asks with the matrix
    that it is answered with, and hands on what it finds. All of it is trained like the rest.
    """
    encoder, decoder = model.get_encoder(), model.get_decoder()
    count, width = encoder.embed_positions.weight.shape
    waves = torch.arange(count)[:, None] * torch.exp(-math.log(200.0) * torch.arange(width // 2) / (width // 2))
    for side in (encoder, decoder):
        side.embed_positions.weight.copy_(0.05 * torch.cat([waves.sin(), waves.cos()], 1))
    for layer in decoder.layers:
        turned = torch.linalg.qr(torch.randn(width, width))[0]
        for projection, start in (
            ("q_proj", turned), ("k_proj", turned), ("v_proj", torch.eye(width)), ("out_proj", torch.eye(width)),
        ):  # fmt: skip
            getattr(layer.encoder_attn, projection).weight.copy_(start)


def load_generator(weights: Weights, vocabulary: int, settings: GeneratorSettings) -> Any:
    """The trained model, in eval mode."""
    return with_weights(build_generator(vocabulary, settings), weights)


def denoising_loss(model: Any, ids: Tensor, settings: GeneratorSettings, generator: torch.Generator) -> Tensor:
    """ids: int64 [B, L], each text ended by ``SEP`` and padded on the right."""
    real = ids != PAD
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16):
        z = model.get_encoder()(input_ids=masked(ids, settings, generator), attention_mask=real.long())
        z = noised(z.last_hidden_state, real, settings, generator)
        fed = model.prepare_decoder_input_ids_from_labels(labels=ids)
        hidden = model.model(
            encoder_outputs=(z,), attention_mask=real.long(), decoder_input_ids=fed, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[real])
    # The fused loss, its soft term left out: it widens the numbers on their way, and keeps no copies of the logits.
    return distillation_loss(logits, logits.detach(), ids[real], soft_weight=0.0, hard_weight=1.0, inplace=True)


def masked(ids: Tensor, settings: GeneratorSettings, generator: torch.Generator) -> Tensor:
    """The same texts, up to ``settings.masked`` of each one's tokens replaced by ``MASK``."""
    share = settings.masked * torch.rand(len(ids), 1, generator=generator)
    hidden = (torch.rand(ids.shape, generator=generator) < share) & (ids >= len(SPECIAL))
    return ids.masked_fill(hidden, MASK)


def noised(z: Tensor, real: Tensor, settings: GeneratorSettings, generator: torch.Generator) -> Tensor:
    """z [B, L, D] with normal noise: of each text's own size, in standard deviations of each coordinate of z.

    In these units a model gains nothing by making its latents large.
    """
    scale = z.detach()[real].float().std(0)
    size = settings.noise * torch.rand(len(z), 1, 1, generator=generator)
    return z + (torch.randn(z.shape, generator=generator) * size * scale).to(z.dtype)


def _batches(rows: Sequence[Sequence[int]], settings: GeneratorSettings, generator: torch.Generator) -> Any:
    """Texts in random order, those of a batch about as long as each other: little padding."""
    texts = [[*row[: settings.max_length - 1], SEP] for row in rows]
    size = settings.batch
    while True:
        order = torch.randperm(len(texts), generator=generator).tolist()
        pools = [sorted(order[start : start + 16 * size], key=lambda place: len(texts[place]))
                 for start in range(0, len(order), 16 * size)]  # fmt: skip
        batches = [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            chosen = [texts[text] for text in batches[place]]
            longest = max(map(len, chosen))
            yield torch.tensor([text + [PAD] * (longest - len(text)) for text in chosen])


def _warmed_cosine(steps: int, share: float) -> Callable[[int], float]:
    warm = max(1, round(share * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return factor
