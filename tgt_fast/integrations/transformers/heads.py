"""The vocabulary head of a language model of transformers, met inside the model's own forward.

Families differ in where their hidden states come from, what they do to them before the head, and to the logits after
it. None of that is written down here. The model runs as it always does, through whatever wraps it; where it would call
its head, the loss is taken in the head's place, of the hidden states that arrive there. What the model does to logits
is read off a few known numbers that are handed on instead of them: a factor, a bound ``c * tanh(x / c)``, or something
else, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError
from tgt_fast.explore.guard import preserve_student
from tgt_fast.integrations.terms import Projection
from tgt_fast.ops._heads import is_adapted, with_adapters
from tgt_fast.ops.library import without_autocast
from tgt_fast.teacher import tree

# What is handed on in the place of logits: the smallest tells the factor, the largest the bound, the others check both.
_PROBE: Final = (0.0, 2.0**-10, 1.0, -1.0, 8.0, -64.0, 2.0**20, -(2.0**20))
_CLOSE: Final = 1e-4  # relative
_ADVICE: Final = 'pass loss="logits"'


class VocabularyHead:
    """The head of one model: what arrives at it, what it multiplies by, and what the model does to its logits.

    Args:
        model: as the trainer knows it, without what wraps it for several processes; PEFT may be around the model.
        who: whose head it is, for messages.

    Raises:
        ArgumentError: a model without a vocabulary head, or with one that is no matrix.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.model, self.who = model, who
        self.projection: Projection | None = None
        self._matrix(self._layer())

    def _refusal(self, reason: str) -> ArgumentError:
        return ArgumentError(f"the {self.who}, a {_named(self.model)}, {reason}; {_ADVICE}")

    def _layer(self) -> nn.Module:
        """The module that the model calls with hidden states. Anew each time: adapters may be put round it."""
        layer: Any = output_layer(self.model)
        if layer is None:
            raise self._refusal("has no vocabulary head that it names (get_output_embeddings)")
        if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):  # PEFT's copy that is trained
            own = layer.active_adapters
            layer = layer.modules_to_save[own[0]] if own and not layer.disable_adapters else layer.original_module
        found: nn.Module = layer
        return found

    def _matrix(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that the layer multiplies by and adds, differentiable, with its adapters."""
        base = layer.get_base_layer() if is_adapted(layer) else layer  # type: ignore[operator]
        weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise self._refusal(f"has a head, {type(base).__name__}, that is no matrix of floating-point numbers")
        return with_adapters(layer, weight), bias

    def matrix(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias, to be called where the head would be; in autocast's dtype, where it is on."""
        weight, bias = self._matrix(self._layer())
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return hidden, weight, bias

    @contextmanager
    def instead(self, work: Callable[[Tensor], None], *, keep_logits: bool = False) -> Iterator[None]:
        """Inside, the model calls ``work(hidden)`` where it would call its head.

        Args:
            work: is given the hidden states. With FSDP the head's numbers are there in this moment, and in no other.
            keep_logits: call the head as well. Else its place is taken by a few numbers, whatever the vocabulary.

        Raises:
            ArgumentError: the model did not call its head, or did so more than once.
        """
        layer, calls = self._layer(), 0
        forward, own = layer.forward, layer.__dict__.get("forward")

        def met(hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise self._refusal("calls its head more than once in a forward pass")
            work(hidden)
            return forward(hidden, *arguments, **keywords) if keep_logits else _stand_in(hidden)

        layer.forward = met  # type: ignore[method-assign]
        try:
            yield
        finally:
            if own is None:
                del layer.forward
            else:
                layer.forward = own
        if not calls:
            raise self._refusal(f"does not call the head that it names ({type(layer).__name__})")

    def learn(self, inputs: Mapping[str, Any]) -> Projection:
        """The treatment of the model's logits, from one pass without a trace; once, and then known.

        Raises:
            ArgumentError: something that no factor and bound can say, a head that adds more than a matrix and a bias,
                or adapters on it that the matrix does not hold.
        """
        if self.projection is not None:
            return self.projection
        with preserve_student(self.model), torch.no_grad(), self.instead(self._check):
            made = self.model(**_first(inputs))
        logits = made.get("logits") if isinstance(made, Mapping) else getattr(made, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[-1:] != (len(_PROBE),):
            raise self._refusal("gives no .logits, or makes something of them that depends on the class")
        seen = logits.reshape(-1, len(_PROBE))
        if not bool((seen == seen[:1]).all()):
            raise self._refusal("treats the logits of positions differently")
        self.projection = self._read(seen[0].double().tolist())
        return self.projection

    def _read(self, seen: list[float]) -> Projection:
        largest = abs(seen[6])
        bounded = largest < 0.5 * abs(seen[1]) * 2.0**30
        softcap = largest if bounded else None
        scale = seen[1] * 2.0**10 if bounded else seen[2]
        expected = torch.tensor(_PROBE, dtype=torch.float64) * scale
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        if not scale > 0 or not torch.allclose(torch.tensor(seen, dtype=torch.float64), expected, rtol=_CLOSE, atol=0):
            pairs = ", ".join(f"{a:g} -> {b:g}" for a, b in zip(_PROBE, seen, strict=True))
            raise self._refusal(f"makes of its head's logits what is no scale and softcap ({pairs})")
        if abs(scale - 1) < 1e-6:
            scale = 1.0
        return Projection(scale, softcap)

    def _check(self, hidden: Tensor) -> None:
        """That the head is its matrix and bias, for the few first hidden states."""
        layer = self._layer()
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in layer.modules()):
            raise self._refusal("has a dropout in its head's adapters, which no matrix can say (lora_dropout=0 would)")
        with without_autocast(), torch.enable_grad():
            weight, bias = self._matrix(layer)
            few = hidden.detach().reshape(-1, hidden.shape[-1])[:2].to(weight.dtype)
            made = nn.functional.linear(few, weight, bias)
            named = {name: one for name, one in layer.named_parameters() if one.requires_grad}
            if named:
                found = torch.autograd.grad(made.sum(), list(named.values()), retain_graph=True, allow_unused=True)
                lost = [name for name, grad in zip(named, found, strict=True) if grad is None]
                if lost:
                    raise self._refusal(f"has parameters in its head that its matrix does not hold ({lost[0]})")
            forward = type(layer).forward
            own = forward(layer, few)
        narrow = weight.dtype not in (torch.float32, torch.float64)
        close = (0.03 if narrow else 1e-3) * own.abs().max().clamp(min=1e-6)
        if own.shape != made.shape or not bool(((own - made).abs() <= close).all()):
            raise self._refusal(f"has a head, {type(layer).__name__}, that is more than a matrix and a bias")


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that a model of transformers names as its vocabulary head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    named = getattr(base, "get_output_embeddings", None)
    return None if named is None else named()


def _named(model: nn.Module) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return type(base).__name__


def _stand_in(hidden: Tensor) -> Tensor:
    probe = torch.tensor(_PROBE, dtype=torch.float32, device=hidden.device)
    return probe.expand(*hidden.shape[:-1], len(_PROBE))


def _first(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first example, where all tensors agree on what an example is."""
    sizes = {leaf.shape[0] for leaf in tree.batched_leaves(inputs)}
    if len(sizes) != 1:
        return dict(inputs)
    return {name: part[:1] if isinstance(part, Tensor) and part.ndim else part for name, part in inputs.items()}
