"""Terms of an objective beside its own: a loss, its weight and its course; and what weighs them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _checks
from tgt_fast.ops.counts import over_processes

Schedule = Callable[[int], float]
_ROWS: Final = ("all", "real", "synthetic")


class Term:
    r"""``weight * schedule(step) * loss``, a term of a :class:`tgt_fast.TGTObjective` beside its own three.

    Args:
        loss: one of ``tgt_fast.losses`` or ``tgt_fast.long_tail``, or any callable ``loss(student, teacher,
            target=None, *, weight=None)`` that gives the mean over rows, 0-d; one without a ``weight`` takes no
            weighted batches. Those of ``tgt_fast.long_tail`` see labels alone: give the objective's own loss
            ``hard_weight=0`` where they stand in the place of its hard term.
        weight: a factor >= 0.
        schedule: step -> another factor >= 0, such as :func:`tgt_fast.losses.warmup`; None: 1 throughout.
        rows: "real" examples, "synthetic" ones, or "all": the mean over real rows, and the objective's
            ``synthetic_weight`` times the mean over synthetic ones, which have no labels. A loss that compares rows
            with each other sees both in one batch then.
        features: None: the loss sees logits. Or (of the student, of the labeler), each the name of a submodule or the
            module itself: the loss sees what they return in the same passes, at any width. A labeler whose logits come
            from a cache, or from the sampler, is run once more for them.
        name: that in ``parts``; by default the class of the loss, with a number from the second of a kind on.

    Raises:
        ArgumentError: an option out of range, a loss that cannot be called like one or has another reduction.

    >>> import tgt_fast as tgt
    >>> tgt.Term(tgt.losses.DIST(), weight=2.0, schedule=tgt.losses.warmup(100))
    Term(DIST(beta=1.0, gamma=1.0, temperature=1.0), weight=2.0)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        weight: float = 1.0,
        schedule: Schedule | None = None,
        *,
        rows: str = "all",
        features: tuple[Any, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.loss = loss
        self.weight = _checks.number("Term", "weight", weight, 0, sys.float_info.max)
        self.rows = _checks.choice("Term", "rows", rows, _ROWS)
        if schedule is not None and not callable(schedule):
            raise ArgumentError(f"Term: schedule must be a function of the step, got {schedule!r:.100}")
        self.schedule = schedule
        if features is not None and not (
            isinstance(features, (tuple, list))
            and len(features) == 2
            and all(isinstance(side, (str, nn.Module)) for side in features)
        ):
            raise ArgumentError(
                "Term: features must be (of the student, of the labeler), each the name of a submodule or a module, "
                f"got {features!r:.100}"
            )
        self.features = features
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise ArgumentError(f"Term: name must be a name like 'hint', got {name!r:.100}")
        self.name = name
        if not callable(loss) or isinstance(loss, type):
            raise ArgumentError(f"Term: loss must be a module of tgt_fast.losses or a function, got {loss!r:.100}")
        reduction = getattr(loss, "reduction", "mean")
        if reduction != "mean" or getattr(loss, "return_stats", False):
            raise ArgumentError(f"Term: the loss must have reduction='mean' and no statistics, got {loss}")
        called: Callable[..., Any] = getattr(loss, "term", getattr(loss, "forward", loss))
        try:
            self._takes = set(inspect.signature(called).parameters)
        except (TypeError, ValueError):  # a built-in
            self._takes = set()

    def factor(self, step: Callable[[], int]) -> float:
        """``weight * schedule(step)``. Raises ArgumentError where the schedule gives no factor."""
        if self.schedule is None:
            return self.weight
        found = _checks.number("Term", "schedule(step)", self.schedule(step()), 0, sys.float_info.max)
        return self.weight * found

    def mean(self, student: Tensor, teacher: Any, target: Tensor | None, weight: Tensor | None) -> Tensor:
        """The loss of some rows."""
        loss: Any = self.loss
        if target is None and hasattr(loss, "soft"):  # without the hard term, which needs labels
            loss = loss.soft
        loss = getattr(loss, "term", loss)
        named = next((name for name in ("weight", "sample_weight") if name in self._takes), None)
        if weight is not None and named is None:
            raise ArgumentError(f"Term: the batch has weights, which {self.loss!r:.100} does not take")
        more = {} if weight is None or named is None else {named: weight}
        labels = () if target is None else (target,)
        made: Tensor = loss(student, teacher, *labels, **more)
        return made

    def __repr__(self) -> str:
        shown = [repr(self.loss), f"weight={self.weight}"]
        shown += [f"rows={self.rows!r}"] if self.rows != "all" else []
        shown += [f"features={self.features!r}"] if self.features is not None else []
        shown += [f"name={self.name!r}"] if self.name is not None else []
        return f"Term({', '.join(shown)})"


def warmup(steps: int, *, start: float = 0.0) -> Schedule:
    """``step -> min(1, start + (1 - start) * step / steps)``, a schedule for :class:`tgt_fast.Term`.

    Source: the warm-up of DKD (Zhao et al., CVPR 2022), whose ``steps`` are 20 epochs.

    >>> import tgt_fast as tgt
    >>> [tgt.losses.warmup(4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    steps = _checks.integer("warmup", "steps", steps, 1, 2**62)
    return functools.partial(_risen, _checks.number("warmup", "start", start, 0, 1), steps)


def _risen(start: float, steps: int, step: int) -> float:
    return min(1.0, start + (1 - start) * step / steps)


class GradientBalance:
    r"""``w_k = (1 / |g_k|) / sum_m (1 / |g_m|)``, g_k the gradient of the k-th loss in one of the student's parameters.

    For ``TGTObjective(terms=..., balance=GradientBalance())``: the objective's own three terms are one loss, each
    further term another, all without their weights; ``weight`` and ``schedule`` come on top. All then pull equally hard
    at that parameter. A loss whose gradient there is 0 gets 1 / (their number). The factors are detached. It costs a
    backward pass from each loss down to the parameter, and does not serve parameters that FSDP2 shards.

    Args:
        parameter: its name in the student; by default the last matrix that is trained, which the last layer's weight
            usually is.
        momentum: in [0, 1), the share of the gradients' norms before in those that are used.

    Source: the balancing of approximate likelihood matching (Minixhofer et al., "Universal Cross-Tokenizer Distillation
    via Approximate Likelihood Matching", 2025), as in its official code.

    >>> import torch, tgt_fast as tgt
    >>> w = torch.nn.Linear(2, 1, bias=False)
    >>> losses = {"a": w.weight.sum(), "b": 3 * w.weight.sum()}
    >>> {name: round(float(value), 4) for name, value in tgt.losses.GradientBalance()(w, losses).items()}
    {'a': 0.75, 'b': 0.25}
    """

    def __init__(self, parameter: str | None = None, *, momentum: float = 0.0) -> None:
        if parameter is not None and not isinstance(parameter, str):
            raise ArgumentError(f"GradientBalance: parameter must be a name, got {type(parameter).__name__}")
        self.parameter = parameter
        self.momentum = _checks.number("GradientBalance", "momentum", momentum, 0, 1)
        if self.momentum == 1:
            raise ArgumentError("GradientBalance: momentum must be below 1")
        self._norms: dict[str, Tensor] = {}

    def __call__(self, student: nn.Module, losses: Mapping[str, Tensor], group: Any = None) -> dict[str, Tensor]:
        """The factor of each loss; ``group``: processes that share their mean norms."""
        parameter = self._found(student)
        found = []
        for loss in losses.values():
            gradient = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
            norm = torch.zeros((), device=parameter.device) if gradient is None else gradient.float().norm()
            found.append(norm.double())
        if group is not None:
            found = list(over_processes(group, *found))
        norms = []
        for name, norm in zip(losses, found, strict=True):
            before = self._norms.get(name)
            if before is not None:
                norm = self.momentum * before.to(norm.device) + (1 - self.momentum) * norm
            norms.append(norm)
        self._norms = dict(zip(losses, norms, strict=True))
        all_norms = torch.stack(norms)
        live = all_norms > 0
        inverse = torch.where(live, 1 / torch.where(live, all_norms, 1.0), 0.0)
        share = inverse / inverse.sum().clamp(min=torch.finfo(inverse.dtype).tiny)
        factors = torch.where(live, share, 1 / len(norms))
        return dict(zip(losses, factors.unbind(), strict=True))

    def _found(self, student: nn.Module) -> nn.Parameter:
        named = dict(student.named_parameters())
        if self.parameter is not None:
            if self.parameter not in named or not named[self.parameter].requires_grad:
                raise ArgumentError(f"GradientBalance: the student trains no parameter {self.parameter!r}")
            return named[self.parameter]
        matrices = [parameter for parameter in named.values() if parameter.requires_grad and parameter.dim() > 1]
        if not matrices:
            raise ArgumentError("GradientBalance: the student trains no matrix; name a parameter")
        return matrices[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"norms": dict(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = dict(state["norms"])
