"""Cases of gradient exploration: one step of a whole sampler, with a convolutional decoder, labeler and student.

The networks take most of the time: the bytes of the floor, latents and examples, say little here. The rival does: the
same step as one writes it in eager PyTorch, with modules in eval mode and ``loss.backward()``, which computes the
gradients of all weights on its way to the latents.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tgt_fast as tgt
from tgt_fast.bench import rivals
from tgt_fast.bench.case import Call, Case, Check, Result, UnfitError, Work
from tgt_fast.bench.check import relative_error

STEP: Final = 0.5
LATENTS, SIDE, CLASSES, WIDTH = 16, 8, 10, 16
_BAR: Final = 1e-4  # float32 through some ten layers and back
_SAME: Final = 0.05


@dataclass(frozen=True)
class Spec:
    batch: int
    compiled: bool


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of this noun, for a device."""
    batches = (32,) if quick else (256,) if device.type == "cpu" else (256, 4096)
    return [
        case(Spec(batch, compiled), device) for batch in batches for compiled in ((False,) if quick else (False, True))
    ]


def case(spec: Spec, device: torch.device) -> Case:
    latents, examples = spec.batch * LATENTS * 4, spec.batch * SIDE * SIDE * 4
    return Case(
        noun="explore",
        op="gradient step, compiled" if spec.compiled else "gradient step",
        shape=f"{spec.batch} x {LATENTS}",
        dtype=torch.float32,
        device=device,
        bytes_moved=latents + 2 * examples,
        bytes_needed=1 << 30,
        unit_bytes=examples,
        build=lambda: ExploreWork(spec, device),
        rivals=(rivals.EAGER,),
        numbers={"batch": spec.batch, "compiled": spec.compiled},
    )


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Networks(nn.Module):
    """The networks that take part, of the size of the digits demo's labeler."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, LATENTS))
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 8 * WIDTH), nn.ReLU(), nn.Unflatten(1, (2 * WIDTH, 2, 2)),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1),
            nn.Sigmoid(),
        )  # fmt: skip
        self.labeler = nn.Sequential(
            *convolution(1, WIDTH), *convolution(WIDTH, 2 * WIDTH, 2), *convolution(2 * WIDTH, 2 * WIDTH),
            *convolution(2 * WIDTH, 2 * WIDTH, 2), nn.Flatten(), nn.Linear(2 * WIDTH * (SIDE // 4) ** 2, CLASSES),
        )  # fmt: skip
        self.student = nn.Sequential(
            *convolution(1, WIDTH // 2), *convolution(WIDTH // 2, WIDTH // 2, 2), nn.Flatten(),
            nn.Linear(WIDTH // 2 * (SIDE // 2) ** 2, CLASSES),
        )  # fmt: skip


def naive(networks: Networks, x: Tensor) -> Result:
    """A gradient step as one writes it down, and the examples and labels that it finds."""
    networks.eval()
    with torch.no_grad():
        z = networks.encoder(x)
    z.requires_grad_()
    made = networks.decoder(z)
    theirs, ours = F.log_softmax(networks.labeler(made), -1), F.log_softmax(networks.student(made), -1)
    loss: Tensor = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    torch.autograd.backward(loss)
    assert z.grad is not None
    length = z.grad.norm(dim=1, keepdim=True)
    found = z.detach() + STEP * torch.where(length > 0, z.grad / length, 0.0)
    networks.zero_grad()
    networks.student.train()
    with torch.no_grad():
        return {"latents": found, "logits": networks.labeler(networks.decoder(found))}


class ExploreWork(Work):
    """A batch, the networks, and a sampler."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            self.networks = Networks().to(device)
            self.x = torch.rand(spec.batch, 1, SIDE, SIDE).to(device)
        self.theirs = copy.deepcopy(self.networks)  # a Teacher freezes what it is made of
        self.teacher = tgt.Teacher(self.networks.encoder, self.networks.decoder, self.networks.labeler)
        self.operands = (self.x,)
        self.result_bytes = spec.batch * (LATENTS + SIDE * SIDE + CLASSES) * 4

    def ours(self, backend: str) -> Call:
        sampler = tgt.LatentSampler(
            self.teacher, "gradient", units="absolute", sigma=0.0, step_size=STEP, backend=backend,
            compile=self.spec.compiled,
        )  # fmt: skip

        def call() -> Result:
            made = sampler(self.x, student=self.networks.student, step=0)
            return {"latents": made.latents.z, "logits": made.teacher_logits}

        return call

    def rival(self, name: str) -> Call:
        if name != rivals.EAGER:
            raise UnfitError("has no exploration")
        return lambda: naive(self.theirs, self.x)

    def check(self, result: Result) -> Check:
        return Check(self._errors(result), dict.fromkeys(result, _BAR))

    def compare(self, result: Result) -> Check:
        return Check(self._errors(result), dict.fromkeys(result, _SAME))

    def _errors(self, result: Result) -> dict[str, float]:
        return {name: relative_error(value, self._truth[name], 1e-2) for name, value in result.items()}

    @functools.cached_property
    def _truth(self) -> Result:
        return naive(copy.deepcopy(self.theirs).double(), self.x.double())
