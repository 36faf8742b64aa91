"""The ops in PyTorch's dispatcher: opcheck, both paths, fakes, autocast, transforms, subclasses, DTensor."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import covering
import pytest
import torch
from numerics import logits, targets
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tgt_fast as tgt
import tgt_fast.testing
from tgt_fast.errors import ArgumentError, BackendError, DTypeError
from tgt_fast.kernels import select
from tgt_fast.kernels import triton as triton_backend
from tgt_fast.kernels.native import cuda as native_cuda
from tgt_fast.kernels.options import DIVERGENCES, ROW_STATE, TAILS
from tgt_fast.ops import library

Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]

SAMPLES = list(tgt_fast.testing.op_samples())
# The others are of classes in several processes, and have a test of their own (test_vocab_compile.py).
NAMES = {name for name in library.NAMES if not name.startswith("vocab_")}


def _name(sample: Sample) -> str:
    return str(sample[0].name()).removeprefix("tgt_fast::")


def _takes_a_record(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, str) and arg in TAILS for arg in args)


def _level(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.requires_grad, value.is_contiguous(), value.numel() == 0, value.dim()
    return type(value), value


def varied(samples: Sequence[Sample]) -> list[Sample]:
    """Few of the samples, of every op: each value that an argument has in some of them, it has in one of these.

    All, where the products of tests are run whole.
    """
    if os.environ.get(covering.FULL) == "1":
        return list(samples)
    of_an_op: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        of_an_op[_name(sample)].append(sample)
    chosen = []
    for group in of_an_op.values():
        rows = [[_level(arg) for arg in args] for _, args, _ in group]
        chosen += [group[place] for place in covering.covering(rows, list(map(str, range(len(group)))), 1)]
    return chosen


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("sample", SAMPLES, ids=_name)
def test_fakes_are_like_the_results(sample: Sample) -> None:
    torch.library.opcheck(*sample, test_utils=("test_autograd_registration", "test_faketensor"))


@pytest.mark.once("torch.compile")
@pytest.mark.parametrize("sample", varied(SAMPLES), ids=_name)
def test_opcheck(sample: Sample) -> None:
    """What the other test of fakes leaves of it."""
    torch.library.opcheck(*sample, test_utils=("test_schema", "test_aot_dispatch_dynamic"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native", "triton"])
def test_opcheck_on_a_gpu(gpu: str, name: str) -> None:
    for sample in tgt_fast.testing.op_samples(gpu, backend=name):
        torch.library.opcheck(*sample)


class _OnAGpu:
    """Answers to a backend's refusal, as of a tensor on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.layout = torch.device("cuda"), tensor.layout
        self.dtype, self.shape, self.is_cpu, self.is_cuda = tensor.dtype, tensor.shape, False, True


@pytest.fixture(params=["native", "triton"])
def refusing_as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that refuses what it refuses on a GPU; the rest the core computes on the CPU."""
    name, core = str(request.param), request.getfixturevalue("native")
    module: Any = select.BACKENDS[name]
    ask, loaded, kernel = module.refusal, triton_backend.load(), select.kernel
    if name == "triton" and isinstance(loaded, str):
        pytest.skip(loaded)

    def refusal(op: str, tensors: Sequence[Tensor]) -> Any:
        with pytest.MonkeyPatch.context() as gpu:
            gpu.setattr(module, "not_plain", lambda tensors: None)
            gpu.setattr(native_cuda, "refusal", lambda device: None)
            if not isinstance(loaded, str):
                gpu.setattr(triton_backend, "load", lambda: loaded._replace(interpreted=False))
            gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
            return ask(op, [_OnAGpu(tensor) for tensor in tensors])

    monkeypatch.setattr(module, "refusal", refusal)
    monkeypatch.setattr(select, "kernel", lambda op, _: kernel(op, core))
    return name


def test_samples_for_a_backend_on_a_gpu_are_calls_that_it_can_run(refusing_as_on_a_gpu: str) -> None:
    served = set()
    for op, args, kwargs in tgt_fast.testing.op_samples(backend=refusing_as_on_a_gpu):
        op(*args, **kwargs)
        served.add(str(op.name()).removeprefix("tgt_fast::"))
    without = {
        "native": {
            "soft_embedding",
            "soft_embedding_forward",
            "soft_embedding_backward",
            "listwise",
            "listwise_forward",
        },
        "triton": {"sample_tokens"},
    }
    assert served == NAMES - without[refusing_as_on_a_gpu]


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("sample", varied(SAMPLES), ids=_name)
def test_another_backend_serves_every_call_the_same(
    sample: tuple[Any, tuple[Any, ...], dict[str, Any]], name: str, request: pytest.FixtureRequest
) -> None:
    """An op with another kernel: same shapes, and the same values to the error of either."""
    op, args, kwargs = sample
    if name == "triton":
        request.getfixturevalue("interpreted")
        if _takes_a_record(args):
            pytest.skip("Triton has no kernels for records")
        if _name(sample) == "sample_tokens":
            pytest.skip("nor any that draw tokens")
    if _name(sample) == "distill_backward":
        pytest.skip("takes a row's state, and every backend keeps its own")
    other = tuple(name if isinstance(arg, str) and arg == "auto" else arg for arg in args)
    copies = [tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in each) for each in (args, other)]
    with torch.no_grad():
        native, other_result = (op(*each, **kwargs) for each in copies)
    if native is None:
        native, other_result = copies[0][0], copies[1][0]
    for a, b in zip(_tensors(native), _tensors(other_result), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if a.shape[-1:] == (ROW_STATE,) and a.dtype == torch.float64:
            continue  # every backend keeps its own of a row
        tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 2e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def test_samples_cover_every_registered_op_and_every_subset_of_gradients() -> None:
    assert {_name(sample) for sample in SAMPLES} == NAMES
    losses = [args for op, args, _ in SAMPLES if op.name() == "tgt_fast::distillation_loss"]
    for rows, wanted in itertools.product((0, 5), itertools.product((False, True), repeat=2)):
        assert any(a[0].shape[0] == rows and (a[0].requires_grad, a[1].requires_grad) == wanted for a in losses)
    assert any(a[0].stride(1) != 1 for a in losses)
    assert any(a[0].stride(0) > a[0].shape[1] for a in losses)


class Watched(TorchDispatchMode):
    """Sees every op, and with it sends each public function through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_doors_give_the_same_bits(divergence: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = (logits((3, 4), 57, seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    target = targets(12, 57, 2).reshape(3, 4)

    def run() -> tuple[Tensor, ...]:
        loss, stats = tgt.distillation_loss(
            student, teacher, target, divergence=divergence, temperature=2.0, hard_weight=0.5, reduction=reduction,
            return_stats=True,
        )  # fmt: skip
        return (loss, *stats, *gradients(loss, student, teacher))

    direct = run()
    with Watched() as watched:
        dispatched = run()
    assert "tgt_fast::distill_forward" in watched.seen
    for a, b in zip(direct, dispatched, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("sphere_radius", [None, 2.0, "keep"])
def test_both_doors_give_the_same_latents(sphere_radius: float | str | None) -> None:
    z, grad = torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 3, 4)

    def run() -> tuple[Tensor, ...]:
        moved = tgt.perturb_latents(z, 0.5, seed=2**64 - 3, step=torch.tensor(4), sphere_radius=sphere_radius)
        climbed = tgt.ascend_latents(z, grad, step_size=0.5, anchor=z, radius=0.2, sigma=torch.rand(5).sign())
        return moved, climbed, *gradients(moved, z)

    direct = run()
    with Watched() as watched:
        dispatched = run()
    assert {"tgt_fast::perturb_latents", "tgt_fast::ascend_latents"} <= set(watched.seen)
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


def test_the_dispatchers_door_backs_up_twice_and_refuses_a_second_derivative() -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    with Watched():
        loss = tgt.distillation_loss(student, teacher)
        (first,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
        (again,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
        # The first is scaled from what forward left, the second is made anew from the rows' state.
        torch.testing.assert_close(first, again, rtol=1e-6, atol=1e-9)
        (slope,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            slope.sum().backward()


def test_a_device_mode_changes_nothing() -> None:
    """torch.set_default_device and `with torch.device(...)` are function modes."""
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    plain = tgt.distillation_loss(student, teacher)
    with torch.device("cpu"):
        assert torch.equal(tgt.distillation_loss(student, teacher), plain)
    with torch.device("meta"):  # the inputs lie where they lie
        assert torch.equal(tgt.distillation_loss(student, teacher), plain)


def test_the_callers_errors_come_through_the_dispatcher() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    with Watched():
        with pytest.raises(ArgumentError, match=r"target\[1\] = 7"):
            tgt.distillation_loss(student, teacher, torch.tensor([0, 7, 1, 1]), hard_weight=1.0)
        with pytest.raises(ArgumentError, match="sample_ids"):
            tgt.perturb_latents(student, 1.0, sample_ids=torch.tensor([0, 1, 2, -1]))
    op, args, _ = next(sample for sample in SAMPLES if _name(sample) == "perturb_latents" and sample[1][0].numel())
    with pytest.raises(ArgumentError, match="sample_ids"):
        op(*(-1 - arg if isinstance(arg, Tensor) and arg.dtype == torch.int64 else arg for arg in args))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_leaves_precision_alone(backend: str) -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5).to(torch.bfloat16)
    z = torch.randn(4, 3, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        loss = tgt.distillation_loss(student, teacher, backend=backend)
        moved = tgt.perturb_latents(z, 0.5, sphere_radius="keep", backend=backend)
        return loss, moved, *gradients(loss, student), *gradients(moved, z)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
        with Watched():
            dispatched = run()
    for a, b, c in zip(plain, inside, dispatched, strict=True):
        assert a.dtype == b.dtype == c.dtype
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_fake_and_meta_tensors_know_shapes() -> None:
    with FakeTensorMode():
        student, teacher = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5, dtype=torch.float64)
        loss, stats = tgt.distillation_loss(student, teacher, reduction="none", return_stats=True)
        assert (loss.shape, loss.dtype, stats.kl.shape) == ((3, 4), torch.float64, (3, 4))
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert (grad.shape, grad.dtype) == (student.shape, student.dtype)
        assert tgt.perturb_latents(student, 1.0).shape == student.shape
        assert tgt.ascend_latents(student, student, step_size=1.0).shape == student.shape
    huge = torch.empty(2**20, 2**14, device="meta")
    assert tgt.distillation_loss(huge, huge, reduction="none").shape == (2**20,)


def test_a_trace_holds_one_op() -> None:
    traced = make_fx(lambda a, b: tgt.distillation_loss(a, b))(torch.randn(4, 5), torch.randn(4, 5))
    assert sum("tgt_fast.distillation_loss" in str(node.target) for node in traced.graph.nodes) == 1
    inputs = (torch.randn(4, 5), torch.randn(4, 5))
    assert torch.equal(traced(*inputs), tgt.distillation_loss(*inputs))


def test_flops_are_counted_around_it() -> None:
    weight, x = torch.randn(5, 5, requires_grad=True), torch.randn(4, 5)
    with FlopCounterMode(display=False) as counter:
        tgt.distillation_loss(x @ weight, x).backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 5 * 5)


CALLS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "distillation_loss": lambda x, backend: tgt.distillation_loss(x[None], x[None] * 0.5, backend=backend),
    "perturb_latents": lambda x, backend: tgt.perturb_latents(x[None], 1.0, backend=backend)[0],
    "ascend_latents": lambda x, backend: tgt.ascend_latents(x[None], x[None], step_size=1.0, backend=backend)[0],
    "soft_embedding": lambda x, backend: tgt.soft_embedding(x[None], x[:, None], gumbel=True, backend=backend)[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_transforms_name_the_reference_on_which_they_work(call: Callable[[Tensor, str], Tensor]) -> None:
    x = torch.randn(4, 5)
    each = torch.stack([call(row, "reference") for row in x])
    torch.testing.assert_close(torch.vmap(lambda row: call(row, "reference"))(x), each)
    torch.testing.assert_close(torch.vmap(lambda row: call(row, "auto"))(x), each)
    with pytest.raises(BackendError, match="backend='reference'"):
        torch.vmap(lambda row: call(row, "native"))(x)
    value, _ = torch.func.jvp(lambda row: call(row, "reference"), (x[0],), (x[1],))
    torch.testing.assert_close(value, each[0])
    with pytest.raises(BackendError, match="backend='reference'"):
        torch.func.jvp(lambda row: call(row, "native"), (x[0],), (x[1],))


def test_an_op_under_vmap_or_forward_mode_is_an_error_not_a_crash() -> None:
    op, args, _ = next(sample for sample in SAMPLES if _name(sample) == "ascend_latents" and sample[1][0].numel())
    with pytest.raises(BackendError, match="backend='reference'"):
        torch.vmap(lambda z: op(z, *args[1:]))(args[0].detach()[None])


def test_functional_gradients_reach_through_the_op() -> None:
    arguments = torch.ops.tgt_fast.distillation_loss.default._schema.arguments
    at = [argument.name for argument in arguments].index("reduction")
    op, args, _ = next(
        sample for sample in SAMPLES if _name(sample) == "distillation_loss" and sample[1][0].requires_grad
        and sample[1][0].numel() and sample[1][at] == "mean"
    )  # fmt: skip
    student = args[0].detach()
    slope = torch.func.grad(lambda s: op(s, *args[1:])[0])(student)
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(op(leaf, *args[1:])[0], leaf)
    assert torch.equal(slope, expected)


class Marked(Tensor):
    """A subclass that knows nothing of the ops."""


def test_a_subclass_goes_to_the_reference_and_is_refused_by_name() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    plain = tgt.distillation_loss(student, teacher)
    marked = tgt.distillation_loss(student.as_subclass(Marked), teacher.as_subclass(Marked))
    torch.testing.assert_close(marked.as_subclass(Tensor), plain)
    with pytest.raises(BackendError, match="Marked is a tensor subclass"):
        tgt.distillation_loss(student.as_subclass(Marked), teacher, backend="native")


def test_a_dtensor_is_refused_with_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for placement in (distributed.Shard(0), distributed.Shard(1), distributed.Replicate()):
            spread = distributed.distribute_tensor(torch.randn(4, 6), mesh, [placement])
            for name, call in CALLS.items():
                if name == "distillation_loss":  # which takes them
                    continue
                with pytest.raises(DTypeError, match=r"DTensor.*to_local"):
                    call(spread, "auto")
            local = tgt.distillation_loss(spread.to_local(), spread.full_tensor())
            assert local.item() == 0.0
    finally:
        torch.distributed.destroy_process_group()


def test_importing_the_package_registers_and_loads_nothing_else() -> None:
    assert all(hasattr(torch.ops.tgt_fast, name) for name in library.NAMES)
    assert os.environ.get("TGT_FAST_BACKEND", "auto") == "auto"
