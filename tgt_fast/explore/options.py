"""The options of a sampler: one frozen dataclass that checks itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Final

from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.explore.by_class import ByClass, is_by_class, labels_of_rows
from tgt_fast.explore.scores import Score, check_score
from tgt_fast.kernels.options import DIVERGENCES, MAX_REPLICA, RADIUS_NORMS, STEP_NORMS
from tgt_fast.kernels.select import BACKENDS
from tgt_fast.ops import _checks
from tgt_fast.teacher.returned import LogitsOf, check_logits_of

MODES: Final = ("prior", "random", "gradient", "persistent")
UNITS: Final = ("std", "absolute")
ANCHORS: Final = ("batch", "balanced")
REPEATS: Final = ("distinct", "same", "error")
NAMED: Final = {"mode": MODES, "units": UNITS, "norm": STEP_NORMS}
_OP: Final = "LatentSampler"
_LARGE: Final = 1e30


@dataclass(frozen=True)
class SamplerOptions:
    """See :class:`tgt_fast.explore.LatentSampler`, which documents every option."""

    mode: str = "random"
    sigma: float | ByClass = 1.0
    step_size: float = 1.0
    steps: int = 1
    radius: float | None = None
    norm: str = "l2"
    step_noise: float = 0.0
    units: str = "std"
    anchors: str | ByClass = "batch"
    replicas: int | ByClass = 1
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    restart_probability: float = 0.1
    bank_size: int = 65536
    truncation: float | None = None
    backend: str = "auto"
    record_disagreement: bool = False
    repeats: str = "distinct"
    logits_of: LogitsOf = None
    score: Score | None = None
    ball: str = "l2"
    affine: bool = False

    def __post_init__(self) -> None:
        for name, most, whole in (
            ("sigma", _LARGE, False), ("anchors", _LARGE, False), ("replicas", MAX_REPLICA // 2, True)
        ):  # fmt: skip
            if is_by_class(given := getattr(self, name)):
                object.__setattr__(self, name, ByClass.of(name, given, 0, most, whole=whole))
        for name, allowed in (
            ("mode", MODES),
            ("norm", STEP_NORMS),
            ("ball", RADIUS_NORMS),
            ("units", UNITS),
            ("anchors", ANCHORS),
            ("repeats", REPEATS),
            ("divergence", DIVERGENCES),
            ("backend", ("auto", *BACKENDS)),
        ):
            if not isinstance(getattr(self, name), ByClass):
                _checks.choice(_OP, name, getattr(self, name), allowed)
        for name in ("sigma", "step_size", "step_noise"):
            if not isinstance(getattr(self, name), ByClass):
                _checks.number(_OP, name, getattr(self, name), 0, _LARGE)
        _checks.number(_OP, "restart_probability", self.restart_probability, 0, 1)
        _checks.number(_OP, "temperature", self.temperature, 0, _LARGE, open_low=True)
        _checks.number(_OP, "beta", self.beta, 0, 1)
        for name in ("record_disagreement", "affine"):
            object.__setattr__(self, name, _checks.flag(_OP, name, getattr(self, name)))
        for name in ("radius", "truncation"):
            if getattr(self, name) is not None:
                _checks.number(_OP, name, getattr(self, name), 0, _LARGE, open_low=True)
        for name, most in (("steps", 1 << 20), ("replicas", MAX_REPLICA // 2), ("bank_size", 1 << 40)):
            if not isinstance(getattr(self, name), ByClass):
                object.__setattr__(self, name, checked_integer(name, getattr(self, name), 1, most))
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise ArgumentError(f"{_OP}: jsd needs 0 < beta < 1, got {self.beta!r}; see forward_kl and reverse_kl")
        check_logits_of(_OP, self.logits_of)
        check_score(_OP, self.score)
        self._check_together()

    def _check_together(self) -> None:
        if self.pooled and self.mode not in ("random", "gradient"):
            given = 'anchors="balanced"' if self.anchors == "balanced" else "anchors by class"
            raise ArgumentError(
                f"{_OP}: {given} serves the modes random and gradient, not {self.mode!r}: "
                "prior has no anchors, persistent keeps one chain a training example"
            )
        self._check_by_class()
        if self.affine and self.mode not in ("random", "gradient"):
            raise ArgumentError(f"{_OP}: affine=True serves the modes random and gradient, not {self.mode!r}")
        if self.mode == "persistent" and self.norm == "raw":
            raise ArgumentError(f'{_OP}: norm="raw" in persistent mode would make the steps depend on the loss scale')
        noisy = self.step_noise > 0 and self.mode == "gradient"
        for replicas, sigma in () if noisy else self._together():
            if replicas > 1 and not sigma > 0:
                raise ArgumentError(
                    f"{_OP}: {replicas:g} replicas without noise would be copies of each other; set sigma > 0"
                )

    def _together(self) -> Iterable[tuple[float, float]]:
        """The replicas and the noise of each class, and of rows without one."""
        replicas, sigma = self.replicas, self.sigma
        if not isinstance(replicas, ByClass) and not isinstance(sigma, ByClass):
            return ((replicas, sigma),)
        sides = [one if isinstance(one, ByClass) else ByClass((), one, False) for one in (replicas, sigma)]
        longest = max(len(side.values) for side in sides)
        if any(side.closed and len(side.values) < longest for side in sides):
            longest = min(len(side.values) for side in sides if side.closed)
        numbers = [[*[*side.values, *[side.default] * longest][:longest], side.default] for side in sides]
        return zip(*numbers, strict=True)

    def _check_by_class(self) -> None:
        for name in ("sigma", "replicas"):
            if isinstance(getattr(self, name), ByClass) and self.mode == "prior":
                raise ArgumentError(
                    f"{_OP}: {name} by class serves the modes random, gradient and persistent, not 'prior', whose "
                    "examples start from no example and have no class"
                )
        if isinstance(self.replicas, ByClass):
            if self.pooled:
                raise ArgumentError(
                    f"{_OP}: replicas by class are of the batch's own examples; with anchors that are drawn, "
                    "anchors=weights by class says how often a class comes"
                )
            if not self.replicas.largest:
                raise ArgumentError(f"{_OP}: replicas by class are 0 for every class")
        if isinstance(self.anchors, ByClass) and not self.anchors.largest:
            raise ArgumentError(f"{_OP}: anchors by class have weight 0 for every class")

    @property
    def pooled(self) -> bool:
        """True if anchors are drawn by class, not those of the batch."""
        return self.anchors != "batch"

    @property
    def most_replicas(self) -> int:
        """Of the class that has the most."""
        return int(self.replicas.largest) if isinstance(self.replicas, ByClass) else self.replicas

    @property
    def asks_labels(self) -> bool:
        """True if a number of a row depends on the label that the caller knows."""
        return isinstance(self.replicas, ByClass) or (isinstance(self.sigma, ByClass) and not self.pooled)

    def of_rows(self) -> SamplerOptions:
        """The options of rows that know their own sigma and replica, as their key tells them."""
        changes: dict[str, Any] = {}
        if isinstance(self.sigma, ByClass):
            changes["sigma"] = 1.0
        if isinstance(self.replicas, ByClass):
            changes["replicas"] = 1
        return replace(self, **changes) if changes else self

    def rows_made(self, count: int, labels: Any, device: Any) -> int | Tensor:
        """The synthetic examples of a batch of so many; ``labels``: theirs, or None."""
        if not isinstance(self.replicas, ByClass):
            return count * self.replicas
        if labels is None:
            return count * int(self.replicas.default)
        return self.replicas.at(labels_of_rows(labels, count, device)).sum()

    def fingerprint(self) -> dict[str, int]:
        """Settings that decide which numbers a sampler draws and what its stored latents mean, as integers.

        A name is saved as its place in ``NAMED``, whose lists may therefore only grow at their ends.
        """
        places = {name: allowed.index(getattr(self, name)) for name, allowed in NAMED.items()}
        return {**places, "replicas": self.most_replicas}

    @property
    def needs_scale(self) -> bool:
        """True if sigma, step_size and radius are measured in the latents' standard deviations."""
        return self.units == "std" and self.mode != "prior"


def option(name: str) -> Any:
    """A property for one of the options."""

    def get(sampler: Adjustable) -> Any:
        return getattr(sampler.options, name)

    def change(sampler: Adjustable, value: Any) -> None:
        sampler.options = replace(sampler.options, **{name: value})

    return property(get, change)


def fixed(name: str, get: Callable[[Any], Any]) -> Any:
    """A property for what other parts of a sampler are built from."""

    def refuse(sampler: object, value: object) -> None:
        raise ArgumentError(f"{_OP}: {name} is fixed at construction; make another sampler")

    return property(get, refuse)


class Adjustable:
    """Every option of a sampler as an attribute, to read and, most of them, to assign: ``sampler.sigma = 0.0``.

    An assignment is checked as at construction, changes nothing if it is refused, and takes effect at the next call.
    """

    options: SamplerOptions

    mode = fixed("mode", lambda sampler: sampler.options.mode)
    bank_size = fixed("bank_size", lambda sampler: sampler.options.bank_size)
    sigma = option("sigma")
    step_size = option("step_size")
    steps = option("steps")
    radius = option("radius")
    norm = option("norm")
    step_noise = option("step_noise")
    units = option("units")
    anchors = option("anchors")
    replicas = option("replicas")
    divergence = option("divergence")
    beta = option("beta")
    temperature = option("temperature")
    restart_probability = option("restart_probability")
    truncation = option("truncation")
    backend = option("backend")
    record_disagreement = option("record_disagreement")
    repeats = option("repeats")
    logits_of = option("logits_of")
    score = option("score")
    ball = option("ball")
    affine = option("affine")


def checked_integer(name: str, value: object, low: int, high: int, op: str = _OP) -> int:
    """The value as an int in [low, high]; numpy's integers are integers, too.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ArgumentError(f"{op}: {name} must be an integer in [{low}, {high}], got {value!r}")
    return int(value)
