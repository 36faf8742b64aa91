"""Every Triton kernel in its main forms, launched twice on a dry GPU. As a script: a process of its own, whose findings
go to a file; Triton decides at its import whether it interprets, so the tests' own process will not do.

Down to machine code go the forms that may ask for more of the chip than there is, and one of every kernel; the others
go as far as Triton's own code, in a third of the time. benchmarks/triton_report.py makes all machine code.

    python dry_forms.py FINDINGS.json
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from dry_gpu import no_machine_code, resources, tensors_on_a_dry_gpu
from kernel_calls import backward, forward

import tgt_fast as tgt
from tgt_fast.kernels.options import DIVERGENCES, DistillOptions
from tgt_fast.kernels.triton import distill
from tgt_fast.kernels.triton.tuning import Plan, shipped_plan

MODULES: Final = (
    "distill_kernels", "distill_finish", "latent_kernels", "tokens_kernels", "listwise_kernels", "adjusted_kernels",
    "adjusted_statistics",
)  # fmt: skip
LABELS: Final = {"no labels": (0.0, 0.0), "labels": (0.7, 0.0), "smoothed": (0.7, 0.1)}

ADJUSTED: Final[dict[str, dict[str, Any]]] = {
    "biased": {"divergence": "jsd", "hard_weight": 0.0, "teacher": False},
    "decoupled": {"decoupled": (1.0, 2.0), "standardize": True, "label_smoothing": 0.1},
    "corrected": {"correct_teacher": 0.2, "temperature": 2.0},
    "skewed": {"skew": 0.1, "standardize": True},
    "skewed back": {"skew": 0.1, "divergence": "reverse_kl", "teacher": False, "hard_weight": 0.0},
    "mse": {"divergence": "mse", "standardize": True},
    "hard": {"soft_weight": 0.0},
}

ACCESS: Final = re.compile(r"(?:ld|st)\.global\S*|cp\.async\S*global.*, (?:0x)?\w+,")

Form = Callable[..., Any]


def main_forms() -> dict[str, Form]:
    """Few enough to compile in a minute."""
    made: dict[str, Form] = {}
    kinds = [(label, dtype) for label in LABELS for dtype in (torch.float32, torch.bfloat16)]
    calls = itertools.product(("none", *DIVERGENCES), (100, 5000))  # several rows a program, and streamed rows
    for number, (divergence, classes) in enumerate(calls):
        whole = number < 2
        labels, dtype = kinds[number % len(kinds)]
        if divergence == "none" and labels == "no labels":
            labels = "labels"
        made[f"distill: {divergence}, {classes} classes, {labels}, {dtype}"] = functools.partial(
            distill_form if whole else _as_triton_code(distill_form), divergence, classes, dtype, labels,
            1.0 + number // 2 % 2, wanted=(True, number % 3 == 0), again=classes == 100,
        )  # fmt: skip
    made["distill: float64"] = functools.partial(
        distill_form, "forward_kl", 100, torch.float64, "smoothed", again=False
    )
    made["distill: a row a program"] = functools.partial(distill_form, "forward_kl", 1000, torch.bfloat16, "labels")
    for warps in (16, 32):
        plan = Plan("stream", 1, 4096, warps)
        made[f"distill: {warps} warps"] = functools.partial(
            distill_form, "forward_kl", 5000, torch.float32, "labels", plan=plan, again=False
        )
    for reduction in ("mean", "none"):
        made[f"distill: {reduction}"] = functools.partial(
            _reduced if reduction == "mean" else _as_triton_code(_reduced), reduction
        )
    for form, options in ADJUSTED.items():
        for classes in (10, 5000):
            whole = form == "decoupled" and classes == 5000
            made[f"adjusted: {form}, {classes} classes"] = functools.partial(
                _adjusted if whole else _as_triton_code(_adjusted), classes, **options
            )
    for size in (64, 20_001):
        made[f"latent: {size}"] = functools.partial(_latents, size)
    for dtype, gumbel, hard in (
        (torch.float32, False, False), (torch.bfloat16, True, True)
    ):  # fmt: skip
        made[f"soft embedding: {'hard' if hard else 'soft'}, {dtype}"] = functools.partial(
            _as_triton_code(_soft) if hard else _soft, dtype, gumbel, hard
        )
    made["listwise"] = _listwise
    return made


def every_forward(one_of: int = 1) -> dict[str, Form]:
    """The loss's forward in all combinations of the options that are constants of its kernels, or one of so many."""
    return {name: form for number, (name, form, _) in enumerate(_forwards()) if number % one_of == 0}


def fragile_forwards() -> dict[str, Form]:
    """All combinations among which Triton 3.5 and 3.6 were once unable to compile most."""
    return {name: form for name, form, fragile in _forwards() if fragile}


def _forwards() -> Iterator[tuple[str, Form, bool]]:
    for classes, divergence, labels, dtype, temperature, wanted, keep in itertools.product(
        (100, 4096, 5000), ("none", *DIVERGENCES), LABELS, (torch.float32, torch.bfloat16, torch.float64), (1.0, 2.0),
        ((False, False), (True, False), (False, True), (True, True)), (False, True),
    ):  # fmt: skip
        if divergence == "none" and labels == "no labels":
            continue
        name = f"{divergence}, {classes} classes, {labels}, {dtype}, T {temperature}, gradients {wanted}"
        form = functools.partial(
            distill_form, divergence, classes, dtype, labels, temperature, wanted=wanted, keep=keep, again=False
        )
        whole = shipped_plan(classes, dtype == torch.float64).kernel == "rows"
        yield name + (", state" if keep else ""), form, whole and keep and labels != "smoothed"


def distill_form(
    divergence: str, classes: int, dtype: torch.dtype, labels: str, temperature: float = 1.0, *,
    wanted: tuple[bool, bool] = (True, True), keep: bool = True, again: bool = True, plan: Plan | None = None,
) -> None:  # fmt: skip
    """A forward, and the backward from its state."""
    hard, smoothing = LABELS[labels]
    soft = {"soft_weight": 0.0} if divergence == "none" else {"divergence": divergence}
    options = DistillOptions(
        **soft, temperature=temperature, teacher_temperature=temperature, hard_weight=hard, label_smoothing=smoothing,
        reduction="none",
    )  # type: ignore[arg-type]  # fmt: skip
    student, teacher = torch.zeros(2, 6, classes, dtype=dtype)
    target = torch.zeros(6, dtype=torch.int64) if hard else None
    out = forward(
        distill.forward, student, teacher, target, None, None, options, wanted=wanted, keep=keep, inplace=True,
        plan=plan,
    )  # fmt: skip
    if again and out.row_state is not None:
        d_loss = out.loss if labels == "smoothed" else torch.ones(())
        backward(distill.backward, student, teacher, target, out.row_state, d_loss, options, wanted=wanted, plan=plan)


def _as_triton_code(form: Form) -> Form:
    """The form without its kernels' machine code."""

    def run(*given: Any, **options: Any) -> None:
        with no_machine_code():
            form(*given, **options)

    return run


def _reduced(reduction: str) -> None:
    """As users call it: means over labels and weights, statistics, and factors in backward."""
    student, teacher = torch.zeros(2, 6, 100)
    target = torch.zeros(6, dtype=torch.int64)
    loss, _ = tgt.distillation_loss(
        student.requires_grad_(), teacher, target, sample_weight=torch.ones(6), reduction=reduction, hard_weight=0.5,
        return_stats=True, backend="triton",
    )  # fmt: skip
    torch.autograd.grad(loss, student, torch.ones_like(loss))
    if reduction == "mean":
        tgt.distillation_loss(student, teacher, normalizer=torch.ones(()), backend="triton")


def _adjusted(classes: int, *, teacher: bool = True, **options: Any) -> None:
    """An adjusted loss with its statistics, and its gradients: at once, and again from its state."""
    student, other = torch.zeros(2, 6, classes)
    ones = torch.ones(classes)
    given: dict[str, Any] = {"temperature": torch.ones(6), "hard_weight": 0.5, **options}
    if given["hard_weight"]:
        given["label_margin"] = ones
    loss, _ = tgt.distillation_loss(
        student.requires_grad_(), other.requires_grad_(teacher), torch.zeros(6, dtype=torch.int64), student_bias=ones,
        teacher_bias=ones, return_stats=True, backend="triton", **given,
    )  # fmt: skip
    sides = (student, other) if teacher else (student,)
    for _ in range(2):
        torch.autograd.grad(loss, sides, torch.ones_like(loss), retain_graph=True)


def _latents(size: int) -> None:
    z, ids = torch.zeros(3, size), torch.arange(3)
    tgt.perturb_latents(z, 1.0, seed=3, sample_ids=ids, backend="triton")
    tgt.perturb_latents(z, 1.0, sphere_radius="keep" if size > 64 else 2.0, truncation=1.5, backend="triton")
    for norm, radius_norm, sigma in (("l2", "l2", 0.1), ("linf", "linf", 0.0))[: 1 if size > 64 else 2]:
        tgt.ascend_latents(
            z, z, step_size=torch.ones(3), norm=norm, sigma=sigma, anchor=z, radius=0.5, radius_norm=radius_norm,
            seed=torch.tensor(3), step=torch.tensor(4), backend="triton",
        )  # fmt: skip
    tgt.ascend_latents(z, z, step_size=1.0, backend="triton")


def _soft(dtype: torch.dtype, gumbel: bool, hard: bool) -> None:
    device = "meta" if hard else "cpu"  # nothing has chosen a token: on a CPU none could be taken from the table
    rows, table = (torch.zeros(shape, dtype=dtype, device=device).requires_grad_() for shape in ((70, 600), (600, 96)))
    out = tgt.soft_embedding(rows, table, gumbel=gumbel, hard=hard, backend="triton")
    torch.autograd.grad(out, (rows, table), torch.ones_like(out))


def _listwise() -> None:
    student, teacher = torch.zeros(4, 50, requires_grad=True), torch.zeros(4, 50)
    loss = tgt.listwise_distillation_loss(student, teacher, torch.zeros(4, dtype=torch.int64), backend="triton")
    torch.autograd.grad(loss, student)


def functions() -> dict[str, Any]:
    """Triton's kernels, by name."""
    modules = (importlib.import_module(f"tgt_fast.kernels.triton.{module}") for module in MODULES)
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


def run(forms: dict[str, Form], times: int = 2) -> dict[str, str]:
    """Faults, by form."""
    errors = {}
    for name, form in forms.items():
        for time in range(times):
            try:
                form()
            except Exception as error:  # whatever it is, the others are to be seen too
                errors[name] = f"launch {time + 1}: {type(error).__name__}: {error}"
                break
    return errors


def compiled() -> list[dict[str, Any]]:
    """The fate of the kernels, those that did not load included."""
    return [
        {
            "name": name, "code": kernel.asm["ttir"], "warps": kernel.metadata.num_warps,
            "constants": {function.arg_names[place]: value for (place,), value in kernel.src.constants.items()},
            "registers": resources(kernel.asm["cubin"])[0] if kernel.asm["cubin"] else None,
            "limit": kernel.metadata.maxnreg, "accesses": ACCESS.findall(kernel.asm.get("ptx", "")),
        }
        for name, function in functions().items()
        for kernel in function.device_caches[0][0].values()
    ]  # fmt: skip


def main() -> None:
    with tensors_on_a_dry_gpu() as launches:
        errors = run(main_forms())
        findings = {"errors": errors, "launches": launches, "names": list(functions()), "kernels": compiled()}
    Path(sys.argv[1]).write_text(json.dumps(findings))


if __name__ == "__main__":
    main()
