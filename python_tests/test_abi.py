"""The structs of the compiled core: both sides have the same ones, and a core that has others is refused."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tgt_fast as tgt
from tgt_fast.errors import BackendError
from tgt_fast.kernels.native import abi, core, load
from tgt_fast.kernels.options import DistillOptions

pytestmark = pytest.mark.skipif(isinstance(load(), str), reason="no compiled core")


@pytest.mark.parametrize("name", [name for name in abi.STRUCTS if name.endswith("Call")])
def test_both_sides_have_the_same_struct(name: str) -> None:
    assert callable(abi.packer(core(), name))
    assert set(core().LAYOUTS) == {name for name in abi.STRUCTS if name.endswith("Call")}


@pytest.mark.parametrize(
    ("was", "instead"), [("soft_weight:d hard_weight:d", "hard_weight:d soft_weight:d"), ("reduction:i", "reduction:q")]
)
def test_a_core_with_another_struct_is_refused(monkeypatch: pytest.MonkeyPatch, was: str, instead: str) -> None:
    """Fields in another order, and a field of another size."""
    monkeypatch.setitem(abi.STRUCTS, "DistillOptions", abi.STRUCTS["DistillOptions"].replace(was, instead))
    abi.packer.cache_clear()
    try:
        with pytest.raises(BackendError, match="takes another DistillCall"):
            tgt.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="native")
    finally:
        abi.packer.cache_clear()


def test_bytes_of_another_size_are_refused() -> None:
    for name in ("distill_forward", "topk_forward", "latent_perturb"):
        with pytest.raises(ValueError, match="not the bytes of the call"):
            getattr(core(), name)(b"\0" * 7, 1)


def test_the_stub_has_what_the_core_has() -> None:
    stub = ast.parse(Path(inspect.getfile(tgt)).with_name("_core.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [node.target for node in stub.body if isinstance(node, ast.AnnAssign)]
    named |= {target.id for target in targets if isinstance(target, ast.Name)}
    have = {name for name in vars(core()) if not name.startswith("__")}
    assert named - {"cuda_set_device"} == {name for name in have if not name.startswith("cuda_")}


def test_options_are_packed_in_their_order() -> None:
    options = DistillOptions("jsd", beta=0.25, temperature=3.0, ignore_index=-7)
    names = [field.split(":")[0] for field in abi.STRUCTS["DistillOptions"].split()]
    packed = SimpleNamespace(**dict(zip(names, abi.option_values(options), strict=True)))
    assert (packed.beta, packed.temperature, packed.ignore_index) == (0.25, 3.0, -7)
