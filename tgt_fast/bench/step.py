"""Cases of a whole training step: a convolutional autoencoder and a residual labeler teach a convolutional student.

The rival is the same step as one writes it by hand in plain PyTorch: a frozen teacher in eval mode, no graph where
none is needed, the gradient in the latents alone. It explores from each example and asks the teacher each time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast._ranges import named_range
from tgt_fast.bench import rivals
from tgt_fast.bench.case import Call, Case, Check, Result, UnfitError, Work
from tgt_fast.bench.check import relative_error
from tgt_fast.bench.ranges import ELSEWHERE, tree

SIGMA, STEP, TEMPERATURE, REUSE = 0.5, 0.5, 2.0, 8
LATENTS, CLASSES, EPOCH = 64, 100, 4  # EPOCH: batches of the data set
FORMS: Final = {
    "random": ((), ("cache",), ("replay",), ("prefetch",), ("cache", "replay"), ("cache", "replay", "prefetch")),
    "gradient": ((), ("cache",), ("replay",), ("cache", "replay")),
}
_BAR: Final = 2e-3  # float32 through some fifty layers and back
_SAME: Final = 0.05
_CALLED: Final = {"encode": "encoder", "decode": "decoder", "label": "labeler"} | {
    name: name.removesuffix(" (synthetic)")
    for name in ("student", "student (synthetic)", "slope", "loss", "loss (synthetic)", "optimizer")
}
_CALLED["backward"] = "student"


@dataclass(frozen=True)
class Spec:
    mode: str
    parts: tuple[str, ...]  # of cache, replay, prefetch
    batch: int
    side: int
    width: int  # of the labeler; 64 is a ResNet-50's
    blocks: tuple[int, ...] = (3, 4, 6, 3)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    size: tuple[Any, ...] = (128, 64, 16, (2, 2, 2, 2)) if device.type == "cpu" else (256, 128, 64)
    if quick:
        size = (4, 16, 4, (1, 1, 1, 1))
        chosen = [("random", ("cache", "replay")), ("gradient", ())]
    else:
        chosen = [(mode, parts) for mode, forms in FORMS.items() for parts in forms]
    return [case(Spec(mode, parts, *size), device) for mode, parts in chosen]


def case(spec: Spec, device: torch.device) -> Case:
    pixels = spec.batch * 3 * spec.side**2 * 4
    return Case(
        noun="step",
        op=f"{spec.mode}, {' + '.join(spec.parts) or 'plain'}",
        shape=f"{spec.batch} x 3 x {spec.side} x {spec.side}",
        dtype=torch.float32,
        device=device,
        bytes_moved=2 * pixels,
        bytes_needed=(2 if device.type == "cpu" else 24) << 30,
        unit_bytes=pixels,
        build=lambda: StepWork(spec, device),
        rivals=(rivals.EAGER,),
        numbers={"mode": spec.mode, "parts": "+".join(spec.parts), "batch": spec.batch, "side": spec.side},
        kernels="distill",
    )


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1, *, relu: bool = True) -> list[nn.Module]:
    made: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]
    return [*made, nn.ReLU()] if relu else made


class Bottleneck(nn.Module):
    """The block of a ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *convolution(inputs, width, 1), *convolution(width, width, 3, stride),
            *convolution(width, 4 * width, 1, relu=False),
        )  # fmt: skip
        same = stride == 1 and inputs == 4 * width
        self.outer = nn.Identity() if same else nn.Sequential(*convolution(inputs, 4 * width, 1, stride, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.outer(x))


def residual(width: int, blocks: tuple[int, ...]) -> nn.Sequential:
    """A ResNet-50 for small images, of that width."""
    made, inputs = convolution(3, width, 3, 2), width
    for stage, count in enumerate(blocks):
        for number in range(count):
            made.append(Bottleneck(inputs, width << stage, 2 if stage and not number else 1))
            inputs = 4 * width << stage
    return nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Networks(nn.Module):
    """The networks that take part: for one of its products the student has the labeler a dozen."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        w, low = 2 * spec.width, spec.side // 8
        self.encoder = nn.Sequential(
            *convolution(3, w, 3, 2), *convolution(w, 2 * w, 3, 2), *convolution(2 * w, 4 * w, 3, 2), nn.Flatten(),
            nn.Linear(4 * w * low**2, LATENTS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 4 * w * low**2), nn.Unflatten(1, (4 * w, low, low)),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.labeler = residual(spec.width, spec.blocks)
        s = spec.width + spec.width // 2
        self.student = nn.Sequential(
            *convolution(3, s, 3, 2), *convolution(s, 2 * s, 3, 2), *convolution(2 * s, 4 * s, 3, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * s, CLASSES),
        )  # fmt: skip


def soft(ours: Tensor, theirs: Tensor, reduction: str = "batchmean", temperature: float = TEMPERATURE) -> Tensor:
    log_q, log_p = (F.log_softmax(logits / temperature, -1) for logits in (ours, theirs))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction=reduction)


def naive_explored(networks: Networks, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Examples, and what the labeler says of them."""
    with torch.no_grad():
        with named_range("encode"):
            z = networks.encoder(x)
        z = z + SIGMA * torch.randn_like(z)
    if mode == "gradient":
        networks.student.eval()
        with named_range("slope"):
            z.requires_grad_()
            made = networks.decoder(z)
            disagreement = soft(networks.student(made), networks.labeler(made), "sum", 1.0)
            (slope,) = torch.autograd.grad(disagreement, z)
        z = z.detach() + STEP * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-20)
        networks.student.train()
    with torch.no_grad():
        with named_range("decode"):
            made = networks.decoder(z)
        with named_range("label"):
            return made, networks.labeler(made)


def naive(networks: Networks, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], mode: str) -> Tensor:
    """A training step as one writes it down."""
    _, x, y = batch
    with torch.no_grad(), named_range("label"):
        theirs = networks.labeler(x)
    made, of_made = naive_explored(networks, x, mode)
    with named_range("student"):
        ours, on_made = networks.student(x), networks.student(made)
    with named_range("loss"):
        loss = F.cross_entropy(ours, y) + soft(ours, theirs) + soft(on_made, of_made)
    _learn(optimizer, loss)
    return loss.detach()


def _learn(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    with named_range("backward"):
        torch.autograd.backward(loss)
    with named_range("optimizer"):
        optimizer.step()


class StepWork(Work):
    """A data set of some batches, the networks, and who trains the student."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            networks = Networks(spec).to(device)
            data = torch.rand(EPOCH * spec.batch, 3, spec.side, spec.side).to(device)
            labels = torch.randint(0, CLASSES, (len(data),)).to(device)
            with torch.no_grad():  # statistics of the data, as after training
                for name in ("encoder", "labeler"):
                    getattr(networks, name).train()(data[: spec.batch])
                networks.decoder(networks.encoder(data[: spec.batch]))
        networks.eval().requires_grad_(False)
        networks.student.train().requires_grad_(True)
        self.networks = networks
        rows = [slice(at, at + spec.batch) for at in range(0, len(data), spec.batch)]
        self.batches = [(torch.arange(len(data))[row], data[row], labels[row]) for row in rows]
        self.operands = (torch.empty(1, CLASSES, device=device),)
        self.result_bytes = sum(p.numel() * p.element_size() for p in networks.student.parameters())
        self._seen: list[Tensor] = []  # what the student of the last call saw in train mode
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def _student(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """One of the weights that all begin with."""
        student = copy.deepcopy(self.networks.student)
        student.register_forward_pre_hook(self._note)
        return student, torch.optim.Adam(student.parameters(), lr=1e-3)

    def _note(self, student: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if student.training:
            self._seen = [*self._seen[-1:], inputs[0].detach()]

    def _result(self, student: nn.Module, loss: Tensor) -> Result:
        first, *_, last = student.parameters()
        assert first.grad is not None
        assert last.grad is not None
        return {"loss": loss, "first gradient": first.grad, "last gradient": last.grad}

    def ours(self, backend: str) -> Call:
        spec, (student, optimizer) = self.spec, self._student()
        networks = self.networks
        teacher = tgt.Teacher(networks.encoder, networks.decoder, networks.labeler)
        sampler: Any = tgt.LatentSampler(
            teacher, spec.mode, units="absolute", sigma=SIGMA, step_size=STEP, backend=backend
        )
        if "replay" in spec.parts:
            sampler = tgt.SyntheticReplay(sampler, reuse=REUSE, capacity=EPOCH * spec.batch)
        cache = None
        if "cache" in spec.parts:
            cache = tgt.TeacherCache(self._folder.name, teacher, k=None, latents=True, version="bench")
            cache.fill(self.batches, progress=False)
        loss = tgt.DistillationLoss(temperature=TEMPERATURE, hard_weight=1.0, backend=backend)
        objective = tgt.TGTObjective(teacher, sampler, loss=loss, cache=cache)
        pairs = self._pairs(sampler, cache)

        def call() -> Result:
            (ids, x, y), made = next(pairs)
            loss = objective(student, x, y, sample_ids=ids, synthetic=made)["loss"]
            _learn(optimizer, loss)
            return self._result(student, loss.detach())

        return call

    def _pairs(self, sampler: Any, cache: Any) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        batches = itertools.cycle(self.batches)
        if "prefetch" in self.spec.parts:
            yield from sampler.prefetch(batches, cache=cache)
        for batch in batches:
            yield batch, None

    def rival(self, name: str) -> Call:
        if name != rivals.EAGER:
            raise UnfitError("has no exploration")
        networks = copy.copy(self.networks)
        networks._modules = dict(networks._modules)
        networks.student, optimizer = self._student()  # type: ignore[assignment]
        batches = itertools.cycle(self.batches)

        def call() -> Result:
            return self._result(networks.student, naive(networks, optimizer, next(batches), self.spec.mode))

        return call

    def check(self, result: Result) -> Check:
        return Check(self._errors(result), dict.fromkeys(result, _BAR))

    def compare(self, result: Result) -> Check:
        return Check(self._errors(result), dict.fromkeys(result, _SAME))

    def _errors(self, result: Result) -> dict[str, float]:
        """Of a first step: against float64, with the examples that were explored."""
        truth = self._truth(*self._seen)
        return {name: relative_error(value, truth[name], 1e-2) for name, value in result.items()}

    def _truth(self, real: Tensor, made: Tensor) -> Result:
        student = copy.deepcopy(self.networks.student).double()
        ours, on_made = (student(x.double()) for x in (real, made))
        with torch.no_grad():
            theirs, of_made = (self._labeler(x.double()) for x in (real, made))
        loss = F.cross_entropy(ours, self.batches[0][2]) + soft(ours, theirs) + soft(on_made, of_made)
        torch.autograd.backward(loss)
        return self._result(student, loss.detach())

    @functools.cached_property
    def _labeler(self) -> nn.Module:
        return copy.deepcopy(self.networks.labeler).double()

    @property
    def _activities(self) -> list[Any]:
        kinds = torch.profiler.ProfilerActivity
        return [kinds.CPU, kinds.CUDA] if self.device.type == "cuda" else [kinds.CPU]

    def parts(self, calls: Mapping[str, Call]) -> dict[str, dict[str, float]]:
        """Milliseconds of a step by network, of each contender; of the student with its backward pass."""
        found = {}
        for name, call in calls.items():
            with torch.profiler.profile(activities=self._activities) as profiler:
                with named_range(ELSEWHERE):
                    call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            times: dict[str, float] = {}
            for _, node in tree(profiler.events()).walk():
                called = _CALLED.get(node.name, "else")
                times[called] = times.get(called, 0.0) + (node.own_device if self.device.type == "cuda" else node.own)
            found[name] = {called: round(value, 3) for called, value in times.items()}
        return found
