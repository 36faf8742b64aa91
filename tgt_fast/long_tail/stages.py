"""Decoupled training: what is done to the classifier once the representation is learned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _checks
from tgt_fast.train.rng import isolated_rng


@torch.no_grad()
def tau_normalize(classifier: nn.Linear, tau: float = 1.0) -> nn.Linear:
    r"""A new layer of weights ``w_c / ||w_c||_2**tau``, without a bias: tau-normalisation.

    Frequent classes have longer weights after training; tau 0 leaves them, tau 1 makes all of length 1. Choose tau on
    validation data (Kang et al. look at 21 values in [0, 2]). A weight of length 0 stays.

    Source: Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020, equation 2.
    Evidence there: ResNeXt-50 on ImageNet-LT, 44.4 % to 49.4 %; few-shot classes 7.7 % to 30.7 %.

    Args:
        classifier: the last layer of a trained model.
        tau: in [0, 1000].

    Raises:
        ArgumentError: no linear layer, or tau outside its range.

    >>> import torch, tgt_fast as tgt
    >>> head = tgt.long_tail.tau_normalize(torch.nn.Linear(4, 3))
    >>> head.bias is None, [round(length, 4) for length in head.weight.norm(dim=1).tolist()]
    (True, [1.0, 1.0, 1.0])
    """
    if not isinstance(classifier, nn.Linear):
        raise ArgumentError(f"tau_normalize: classifier must be an nn.Linear, got {type(classifier).__name__}")
    tau = _checks.number("tau_normalize", "tau", tau, 0, 1000)
    weight = classifier.weight
    exact = weight.double()
    length = exact.norm(dim=1, keepdim=True)
    made = nn.Linear(
        classifier.in_features, classifier.out_features, bias=False, device=weight.device, dtype=weight.dtype
    )
    made.weight.copy_(torch.where(length > 0, exact / length**tau, exact))
    return made


class _SecondStage(nn.Module):
    """A trained model of which the classifier alone learns; the rest is frozen, and stays in eval mode."""

    def __init__(self, model: nn.Module, classifier: str) -> None:
        super().__init__()
        op = type(self).__name__
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
        names = dict(model.named_modules())
        if not isinstance(classifier, str) or classifier not in names or not classifier:
            raise ArgumentError(
                f"{op}: classifier must name a layer of the model, {[name for name in names if name][-8:]}, got "
                f"{classifier!r}"
            )
        self.model = copy.deepcopy(model)
        self.classifier = classifier
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.model.zero_grad(set_to_none=True)
        head = self._begun(self.model.get_submodule(classifier))
        parent, _, name = classifier.rpartition(".")
        setattr(self.model.get_submodule(parent), name, head)
        self.train(model.training)

    def _begun(self, head: nn.Module) -> nn.Module:
        """The classifier as it begins."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        """The classifier."""
        return self.model.get_submodule(self.classifier)

    def train(self, mode: bool = True) -> _SecondStage:
        super().train(False)
        self.training = mode
        self.head.train(mode)
        return self

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that learn, for the optimizer."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.model(*inputs, **keywords)


class ClassifierRetraining(_SecondStage):
    r"""cRT: ``f(x) = W' phi(x) + b'`` with phi trained and frozen, and W', b' begun anew.

    A copy of the model, whose other layers need no gradient and stay in eval mode; train it on batches of a
    :class:`ClassBalancedSampler` with ``optimizer = SGD(stage.trainable(), lr)``.

    Source: Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020, section 4.1;
    there for 10 epochs. Evidence there: ResNeXt-50 on ImageNet-LT, 44.4 % to 49.6 %; few-shot classes 7.7 % to 27.4 %.

    Args:
        model: a trained student.
        classifier: the name of its last layer, as ``model.named_modules()`` has it; one with ``reset_parameters``.
        seed: of the new parameters; no global generator is moved.

    Raises:
        ArgumentError: there is no such layer, or it cannot begin anew.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> stage = tgt.long_tail.ClassifierRetraining(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), "2")
    >>> [tuple(parameter.shape) for parameter in stage.trainable()]
    [(3, 4), (3,)]
    """

    def __init__(self, model: nn.Module, classifier: str, *, seed: int = 0) -> None:
        self._seed = _checks.integer("ClassifierRetraining", "seed", seed, 0, 1 << 62)
        super().__init__(model, classifier)

    def _begun(self, head: nn.Module) -> nn.Module:
        reset: Any = getattr(head, "reset_parameters", None)
        if not callable(reset):
            raise ArgumentError(
                f"ClassifierRetraining: classifier {self.classifier!r} is a {type(head).__name__} without "
                "reset_parameters(), so it cannot begin anew"
            )
        with isolated_rng(self._seed):
            reset()
        return head.requires_grad_(True)


class LearnableWeightScaling(_SecondStage):
    r"""LWS: ``f(x)_c = s_c (W phi(x) + b)_c`` with all trained and frozen but ``s``, which begins at 1.

    Otherwise as :class:`ClassifierRetraining`.

    Source: Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020, section 4.3;
    there for 5 epochs of class-balanced batches. Evidence there: ResNeXt-50 on ImageNet-LT, 44.4 % to 49.9 %; few-shot
    classes 7.7 % to 30.4 %.

    Args:
        model: a trained student.
        classifier: the name of its last layer, an ``nn.Linear``.

    Raises:
        ArgumentError: there is no such layer, or it is not linear.

    >>> import torch, tgt_fast as tgt
    >>> from torch import nn
    >>> stage = tgt.long_tail.LearnableWeightScaling(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), "2")
    >>> [tuple(parameter.shape) for parameter in stage.trainable()]
    [(3,)]
    """

    def __init__(self, model: nn.Module, classifier: str) -> None:
        super().__init__(model, classifier)

    def _begun(self, head: nn.Module) -> nn.Module:
        if not isinstance(head, nn.Linear):
            raise ArgumentError(
                f"LearnableWeightScaling: classifier {self.classifier!r} must be an nn.Linear, got "
                f"{type(head).__name__}"
            )
        return _Scaled(head)


class _Scaled(nn.Module):
    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.classifier = classifier
        like = classifier.weight
        self.scale = nn.Parameter(torch.ones(classifier.out_features, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.classifier(x) * self.scale
        return made
