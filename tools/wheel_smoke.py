"""One call of everything that a wheel must be able to do, by the package installed in SITE; for tools/check_wheel.py.

python -I wheel_smoke.py SITE

The last line of its output is JSON: what ran, versions, and what the core says of itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
from pathlib import Path

import numpy
import torch

import tgt_fast as tgt

CLASSES, WIDTH = 7, 6


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"wheel_smoke: {message}")


def rows(count: int, width: int, *, grad: bool = False) -> torch.Tensor:
    return torch.randn(count, width, requires_grad=grad)


def every_op() -> None:
    """Each op, on the compiled core by name; gradients where there are any."""
    native = {"backend": "native"}
    labels = torch.tensor([0, 1, -1, -100])
    student, teacher = rows(4, CLASSES, grad=True), rows(4, CLASSES)
    record = tgt.topk_teacher(teacher, k=3, temperature=2.0)
    hidden, head = rows(4, WIDTH, grad=True), rows(CLASSES, WIDTH, grad=True)
    loss = sum(
        tgt.distillation_loss(student, teacher, labels, divergence=divergence, hard_weight=1.0, **native)
        for divergence in ("forward_kl", "reverse_kl", "jsd")
    )
    loss = loss + tgt.distillation_loss(student, record, temperature=2.0, **native)
    loss = loss + tgt.linear_distillation_loss(hidden, head, rows(4, 5), rows(CLASSES, 5), temperature=2.0, **native)
    loss = loss + tgt.linear_distillation_loss(hidden, head, teacher_logits=record, temperature=2.0, **native)
    query, passage = rows(4, WIDTH, grad=True), rows(5, WIDTH, grad=True)
    loss = loss + tgt.contrastive_distillation_loss(query, passage, rows(4, 5), rows(5, 5), temperature=0.5, **native)
    soft = tgt.soft_embedding(student, rows(CLASSES, WIDTH), **native)
    (loss + soft.square().sum()).backward()
    for name, leaf in {"logits": student, "hidden": hidden, "head": head, "query": query, "passage": passage}.items():
        check(leaf.grad is not None and bool(leaf.grad.isfinite().all()), f"no gradient of {name}")
    z, ids = rows(4, WIDTH), torch.arange(4)
    moved = tgt.perturb_latents(z, 0.5, seed=1, sample_ids=ids, **native)
    check(torch.equal(moved, tgt.perturb_latents(z, 0.5, seed=1, sample_ids=ids, **native)), "noise does not repeat")
    moved = tgt.ascend_latents(moved, rows(4, WIDTH), step_size=0.1, anchor=z, radius=1.0, **native)
    check(bool(((moved - z).norm(dim=1) <= 1 + 1e-5).all()), "an ascent left its ball")
    tokens = tgt.sample_tokens(student.detach(), seed=1, sample_ids=ids, **native)
    check(bool(((tokens >= 0) & (tokens < CLASSES)).all()), f"tokens {tokens.tolist()}")


def training(folder: Path) -> None:
    """The sampler's modes, a cache, and fit."""
    teacher = tgt.Teacher(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8), torch.nn.Linear(8, CLASSES), prior="normal")
    x, y, ids = rows(12, 8), torch.randint(0, CLASSES, (12,)), torch.arange(12)
    student = torch.nn.Linear(8, CLASSES)
    sampler = None
    for mode in ("prior", "random", "persistent", "gradient"):
        sampler = tgt.LatentSampler(teacher, mode=mode, sigma=0.5, units="absolute")
        made = sampler(x, sample_ids=ids, student=student)
        check(bool(made.x.isfinite().all()) and made.teacher_logits.shape[1] == CLASSES, f"the mode {mode}")
    batches = [(ids[i : i + 4], x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    label = torch.nn.Linear(8, CLASSES)
    with tgt.TeacherCache(folder / "cache", label, k=3) as cache:
        for batch_ids, batch_x, _ in batches:
            cache.label(batch_x, batch_ids)
    with tgt.TeacherCache(folder / "cache", label, k=3) as cache:
        check(len(cache) == 12, f"the cache kept {len(cache)} records of 12")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    result = tgt.fit(student, tgt.TGTObjective(teacher, sampler), batches, steps=4, optimizer=optimizer, progress=False)
    check(result.steps == 4, f"fit took {result.steps} steps")


def command() -> str:
    """``tgt-fast doctor``, as it prints."""
    from tgt_fast.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        check(main(["doctor"]) == 0, "tgt-fast doctor failed")
    return said.getvalue()


def main() -> None:
    site, folder = Path(sys.argv[1]).resolve(), Path.cwd()
    check(Path(tgt.__file__).resolve().is_relative_to(site), f"tested {tgt.__file__}, not the wheel")
    check("tgt_fast._core" not in sys.modules, "importing the package loaded the core")
    torch.manual_seed(0)
    every_op()
    training(folder)
    doctor = command()
    check(site.joinpath("..", "..", "..", "bin", "tgt-fast").exists(), "the command tgt-fast is missing")

    from importlib.metadata import version

    from tgt_fast.bench.record import hardware
    from tgt_fast.kernels.native import core

    check(version("tgt-fast") in doctor, f"tgt-fast doctor does not name {version('tgt-fast')}:\n{doctor}")
    print(
        json.dumps(
            {
                "ran": "every op, the sampler's modes, a cache, fit",
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "numpy": numpy.__version__,
                    "tgt-fast": version("tgt-fast"),
                },
                "hardware": hardware(torch.device("cpu")),
                "core": core().build_info(),
            }
        )
    )


if __name__ == "__main__":
    main()
