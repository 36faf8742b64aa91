"""The choice of a backend: its order, its reasons, its typed errors, and what importing the package must not do."""

from __future__ import annotations

import os

import pytest
import torch
from programs import ran

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError
from tgt_fast.kernels import native, select

LOGITS = torch.zeros(2, 3)

needs_native = pytest.mark.skipif(isinstance(native.load(), str), reason="the compiled core is not installed")


def run_python(code: str, **environment: str) -> str:
    done = ran(code, environment={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_no_core_no_triton_and_no_framework() -> None:
    heavy = "'tgt_fast._core', 'triton', 'sklearn', 'matplotlib', 'rich', 'transformers', 'diffusers', 'timm'"
    heavy += ", 'accelerate', 'lightning'"
    ours = "import tgt_fast, tgt_fast.integrations.transformers"
    code = f"import sys, torch; old = set(sys.modules); {ours}; print({{{heavy}}} & (set(sys.modules) - old))"
    assert run_python(code) == "set()"


def test_every_backend_has_a_row_and_a_reason_when_it_cannot_run() -> None:
    rows = {row.name: row for row in tgt.backends()}
    assert set(rows) == set(select.BACKENDS)
    assert rows["reference"].available
    for row in rows.values():
        assert row.available == (row.reason == "")
        assert row.available == bool(row.devices)


@needs_native
def test_auto_takes_the_compiled_core_on_a_cpu_and_says_so() -> None:
    verdicts = {row.backend: row for row in tgt.explain("distill", LOGITS)}
    assert verdicts["native"].chosen
    assert not verdicts["reference"].chosen
    assert "faster" in verdicts["reference"].reason


@needs_native
def test_the_environment_sets_the_default_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.DEFAULT_VARIABLE, "reference")
    assert [row.backend for row in tgt.explain("distill", LOGITS) if row.chosen] == ["reference"]
    assert select.choose("distill", "auto", (LOGITS,)) == "reference"
    assert select.choose("distill", "native", (LOGITS,)) == "native"
    monkeypatch.setenv(select.DEFAULT_VARIABLE, "no-such-thing")
    with pytest.raises(ArgumentError, match="no-such-thing"):
        select.choose("distill", "auto", (LOGITS,))


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"'native', 'reference'.*'fast'"):
        tgt.distillation_loss(LOGITS, LOGITS, backend="fast")


@pytest.mark.parametrize("backend", [{"native"}, {}, ["native"], None, 3, LOGITS], ids=lambda x: type(x).__name__)
def test_a_backend_is_a_name(backend: object) -> None:
    for call in (
        lambda: tgt.distillation_loss(LOGITS, LOGITS, backend=backend),  # type: ignore[arg-type]
        lambda: tgt.perturb_latents(LOGITS, 0.1, backend=backend),  # type: ignore[arg-type]
        lambda: tgt.sample_tokens(LOGITS, backend=backend),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match="backend must be 'auto' or one of"):
            call()


@needs_native
def test_what_the_core_cannot_run_is_refused_by_name_and_served_by_auto() -> None:
    class Marked(torch.Tensor):
        pass

    marked = torch.randn(2, 3).as_subclass(Marked)
    with pytest.raises(BackendError, match="Marked is a tensor subclass"):
        tgt.distillation_loss(marked, LOGITS, backend="native")
    assert torch.isfinite(tgt.distillation_loss(marked, LOGITS))


@needs_native
def test_under_vmap_auto_serves_the_reference_and_the_core_names_it() -> None:
    student, teacher = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    mapped = torch.func.vmap(lambda s, t: tgt.distillation_loss(s, t))(student, teacher)
    one_by_one = torch.stack([tgt.distillation_loss(s, t) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(mapped, one_by_one)
    with pytest.raises(BackendError, match="backend='reference'"):
        torch.func.vmap(lambda s, t: tgt.distillation_loss(s, t, backend="native"))(student, teacher)


def test_a_core_that_does_not_load_is_remembered_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: "tgt_fast._core does not load (undefined symbol); reinstall tgt-fast")
    row = tgt.backends()[0]
    assert (row.name, row.available) == ("native", False)
    assert "undefined symbol" in row.reason
    with pytest.raises(BackendError, match="undefined symbol"):
        tgt.distillation_loss(LOGITS, LOGITS, backend="native")
    assert torch.isfinite(tgt.distillation_loss(LOGITS, LOGITS))


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "x86_v3", "x86_v4"])
def test_every_instruction_set_gives_the_reference_result(isa: str) -> None:
    if isa not in native.core().build_info()["isas"]:
        pytest.skip(f"{isa} was not built for this processor")
    code = """
import torch, tgt_fast as tgt
from tgt_fast.kernels import native
torch.manual_seed(0)
worst = 0.0
for classes in (3, 67, 5000):
    for divergence in ("forward_kl", "jsd", "tvd"):
        s, t = (4 * torch.randn(3, classes)).requires_grad_(), 4 * torch.randn(3, classes)
        y = torch.tensor([0, -100, 2])
        results = []
        for backend in ("native", "reference"):
            options = dict(divergence=divergence, temperature=3.0, hard_weight=1.0, backend=backend)
            loss = tgt.distillation_loss(s, t, y, **options)
            results.append((loss, *torch.autograd.grad(loss, s)))
        worst = max(worst, *(float((a - b).norm() / b.norm()) for a, b in zip(*results)))
z, g = torch.randn(5, 3000), torch.randn(5, 3000)
for backend in ("native", "reference"):
    moved = tgt.ascend_latents(z, g, step_size=1.0, anchor=z, radius=0.5, sigma=0.2, seed=3, backend=backend)
    noisy = tgt.perturb_latents(z, 1.0, seed=5, backend=backend)
    first = (moved, noisy) if backend == "native" else first
worst_latent = max(float((a - b).abs().max()) for a, b in zip(first, (moved, noisy)))
print(native.core().build_info()["isa"], worst < 1e-5, worst_latent < 3e-6)
"""
    found, distill, latent = run_python(code, TGT_FAST_ISA=isa).split()
    order = ["baseline", "x86_v3", "x86_v4"]
    assert order.index(found) <= order.index(isa)  # this processor may lack the set
    assert (distill, latent) == ("True", "True")
