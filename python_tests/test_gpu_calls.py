"""The calls that reach every kernel: on the emulated device and in Triton's interpreter, before they meet a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from emulated_gpu import tensors_on_an_emulated_gpu
from gpu_calls import calls, native_calls, triton_calls

CPU = torch.device("cpu")
MODULES = (
    "distill_kernels", "distill_finish", "latent_kernels", "tokens_kernels", "adjusted_kernels", "adjusted_statistics",
)  # fmt: skip


@pytest.mark.once("emulated")
@pytest.mark.parametrize("name", native_calls())
def test_a_native_call_gives_numbers(request: pytest.FixtureRequest, name: str) -> None:
    with tensors_on_an_emulated_gpu(request.getfixturevalue("emulated")):
        found = native_calls()[name](CPU)
    assert found
    assert not any(result.isnan().any() for result in found)


def test_the_triton_calls_launch_every_kernel(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    kernels = {
        name
        for module in MODULES
        for name, value in vars(importlib.import_module(f"tgt_fast.kernels.triton.{module}")).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }
    launched: set[str] = set()
    plain = InterpretedFunction.run

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        launched.add(self.fn.__name__)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    for name, call in triton_calls().items():
        # In place it is the same kernels; and each divergence meets rows that take an interpreter no time.
        long = name.startswith("triton distill: ") and not name.endswith(", 10")
        if "in place" in name or (
            long and not any(each in name for each in ("forward_kl", "jsd, 4096", "gradients", "a row"))
        ):
            continue
        found = call(CPU)
        assert found, name
        assert not any(result.isnan().any() for result in found), name
    assert len(kernels) > 10
    assert launched == kernels


def test_names_say_the_backend() -> None:
    assert {name.split()[0] for name in calls()} == {"native", "triton"}
