"""Tensors whose numbers cannot be read, as any argument of any op: a typed error that says what to do, and no crash."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from public_calls import public_calls, rows
from torch import Tensor
from torch._subclasses import FakeTensorMode

import tgt_fast as tgt
import tgt_fast.testing
from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError, ShapeError, TgtError
from tgt_fast.kernels import select

CALLS = public_calls()
ARGUMENTS = [(call, name) for call, (_, given) in CALLS.items() for name in given if isinstance(given[name], Tensor)]


def freed(tensor: Tensor) -> Tensor:
    gone = tensor.clone()
    gone.untyped_storage().resize_(0)
    return gone


def freed_view(tensor: Tensor) -> Tensor:
    """Does not begin where its storage does, so that its address is not 0."""
    gone = torch.stack([tensor, tensor])[1]
    gone.untyped_storage().resize_(0)
    return gone


def cut_short(tensor: Tensor) -> Tensor:
    """Has an address, but not for all of its elements."""
    gone = torch.stack([tensor, tensor], dim=-1)[..., 1]
    gone.untyped_storage().resize_(tensor.nbytes)
    return gone


def zeros(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)  # type: ignore[attr-defined,no-any-return]


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor.reshape(-1), tensor.reshape(-1)])


def jagged(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor.reshape(-1), tensor.reshape(-1)], layout=torch.jagged)


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def compressed(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1).to_sparse_csr()


def opaque(tensor: Tensor) -> Tensor:
    return tensor.float().to_mkldnn()


def narrow(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


WITHOUT_MEMORY = [(freed, r"freed.*0 bytes"), (freed_view, "freed"), (cut_short, "freed"), (zeros, r"clone\(\)")]
OTHER_KINDS = [
    (Tensor.to_sparse, "dense.*sparse"),
    (compressed, "dense.*sparse_csr"),
    (opaque, "dense.*mkldnn"),
    (nested, "dense.*nested"),
    (jagged, "dense.*nested"),
    (quantised, r"dense.*quantised.*dequantize\(\)"),
]


def refusal(function: Callable[..., Any], *args: Any, **given: Any) -> tuple[type | None, str]:
    """The error of a call, as a type and words: pytest would show the arguments, and to show them is to read them."""
    try:
        function(*args, **given)
    except Exception as error:
        return type(error), str(error)
    return None, "no error"


def _id(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("make", "message"), WITHOUT_MEMORY, ids=_id)
@pytest.mark.parametrize(("call", "argument"), ARGUMENTS)
def test_a_tensor_without_memory(
    call: str, argument: str, make: Callable[[Tensor], Tensor], message: str, backend: str
) -> None:
    function, given = CALLS[call]
    made = make(given[argument])
    if call not in ("topk_teacher", "align_logits"):
        given = {**given, "backend": backend}
    kind, said = refusal(function, **{**given, argument: made})
    assert kind is ArgumentError
    assert re.search(message, said)
    assert _said(argument) in said


@pytest.mark.parametrize(("make", "message"), OTHER_KINDS, ids=_id)
@pytest.mark.parametrize(("call", "argument"), [(c, a) for c, a in ARGUMENTS if CALLS[c][1][a].dim()])
def test_a_tensor_that_holds_other_things_than_its_numbers(
    call: str, argument: str, make: Callable[[Tensor], Tensor], message: str
) -> None:
    function, given = CALLS[call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of prototypes
        made = make(given[argument])
    kind, said = refusal(function, **{**given, argument: made})
    assert kind is DTypeError
    assert re.search(f"{_said(argument)}.*{message}", said), said


NUMBERS = [(c, a) for c, a in ARGUMENTS if CALLS[c][1][a].is_floating_point()]


@pytest.mark.parametrize(
    ("call", "argument"), [(c, a) for c, a in NUMBERS if a not in ("sample_weight", "normalizer")]
)  # which are converted
def test_float8(call: str, argument: str) -> None:
    function, given = CALLS[call]
    with pytest.raises(DTypeError, match=rf"{_said(argument)}.*float8.*to\(torch.bfloat16\)"):
        function(**{**given, argument: narrow(given[argument])})


def _said(argument: str) -> str:
    return "tail_log_prob" if argument == "tail" else argument


def test_the_calls_are_right_as_they_are() -> None:
    for function, given in CALLS.values():
        function(**given)


def test_views_and_expanded_tensors_have_memory() -> None:
    wide = rows(6, 10)
    views = [wide[1:4, :5], wide.T[:3, :5], wide[:3, ::2], rows(1, 5).expand(3, 5), rows(3, 5)[:0], rows(5, 3).T]
    for student in views:
        teacher = torch.zeros(student.shape)
        ours = tgt.distillation_loss(student, teacher, reduction="none")
        assert torch.equal(ours, tgt.distillation_loss(student.clone(), teacher, reduction="none"))
    assert tgt.distillation_loss(rows(3, 5).to("meta"), rows(3, 5).to("meta")).is_meta


def registered_arguments() -> Iterator[tuple[Any, tuple[Any, ...], int]]:
    """One call of each registered op with each of its tensors."""
    seen = set()
    for op, args, _ in tgt_fast.testing.op_samples():
        for at, argument in enumerate(args):
            if isinstance(argument, Tensor) and argument.numel() and (op.name(), at) not in seen:
                seen.add((op.name(), at))
                yield op, args, at


@pytest.mark.parametrize(
    ("op", "args", "at"),
    list(registered_arguments()),
    ids=lambda value: value.name().removeprefix("tgt_fast::") if hasattr(value, "name") else "",
)
def test_a_freed_tensor_in_a_registered_op(op: Any, args: tuple[Any, ...], at: int) -> None:
    name = op._schema.arguments[at].name
    given = [value.detach() if isinstance(value, Tensor) else value for value in args]
    for make in (freed, freed_view, cut_short):
        kind, said = refusal(op, *given[:at], make(given[at]), *given[at + 1 :])
        assert (kind, f"the memory of {name} was freed" in said) == (ArgumentError, True), said


def test_memory_that_is_freed_before_backward() -> None:
    student, teacher = rows(3, 5).half(), rows(3, 5).half()
    hidden, weight = rows(3, 4), rows(5, 4).requires_grad_()
    z, table = rows(3, 5), rows(5, 2)
    losses: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [
        (student, lambda s: tgt.distillation_loss(s, teacher)),
        (student, lambda s: tgt.distillation_loss(s, tgt.topk_teacher(teacher, 2))),
        (hidden, lambda h: tgt.linear_distillation_loss(h, weight, teacher_logits=z, reduction="none").sum()),
        (z, lambda x: tgt.perturb_latents(x, 1.0, sphere_radius="keep").sum()),
        (z, lambda x: tgt.soft_embedding(x, table).sum()),
    ]
    for leaf, function in losses:
        inner = leaf.clone().requires_grad_()
        middle = inner * 1  # what is freed is no leaf, so that autograd knows nothing of it
        result = function(middle)
        middle.untyped_storage().resize_(0)
        kind, said = refusal(result.backward)
        assert kind is ArgumentError
        assert re.search(r"backward.*freed", said)


def test_an_upstream_gradient_that_stands_for_zeros() -> None:
    student = rows(3, 5).requires_grad_()
    loss = tgt.distillation_loss(student, -rows(3, 5))
    loss.backward(torch._efficientzerotensor(()))  # type: ignore[attr-defined]
    assert student.grad is not None
    assert bool((student.grad == 0).all())


@pytest.mark.parametrize("call", [name for name in CALLS if "loss" in name] + ["soft_embedding", "perturb_latents"])
def test_a_batch_of_gradients(call: str) -> None:
    """The old vmap of ``jacobian(vectorize=True)``, inside which tensors have no memory of their own."""
    function, given = CALLS[call]
    name = next(iter(given))
    options = {"reduction": "none", "normalizer": None} if "loss" in call else {}
    options |= {"sphere_radius": 2.0} if "perturb" in call else {}

    def of(x: Tensor, **more: Any) -> Tensor:
        made: Tensor = function(**{**given, **options, name: x, **more})
        return made

    with pytest.raises(TgtError, match="vectorize=False"):
        torch.autograd.functional.jacobian(of, given[name], vectorize=True)
    torch.autograd.functional.jacobian(of, given[name])
    torch.autograd.functional.jacobian(lambda x: of(x, backend="reference"), given[name], vectorize=True)


def test_devices_without_float64_are_refused() -> None:
    with FakeTensorMode():
        for device, name in itertools.product(("mps", "xpu"), ("distill", "latent", "linear", "tokens")):
            there = torch.empty(3, 5, device=device)
            assert all(not row.chosen for row in tgt.explain(name, there))
            with pytest.raises(BackendError, match=f"reference computes in float64, which {device} .*CPU"):
                tgt.distillation_loss(there, there, backend="reference")


def test_explain_of_a_record() -> None:
    """A form of teacher, about which Triton says by itself that it has no kernels for it."""
    student, record = torch.zeros(2, 5), tgt.topk_teacher(torch.zeros(2, 5), 2)
    for op in ("distill", "linear"):
        assert [row.backend for row in tgt.explain(op, student, record) if row.chosen] == ["native"]
    reason = select.BACKENDS["triton"].refusal(select.TOPK, [student, record.log_probs])
    assert reason is not None
    assert "top-k records" in reason
    with pytest.raises(DTypeError, match="'latent' is asked about tensors"):
        tgt.explain("latent", record)
    with pytest.raises(ArgumentError, match="'sparse' is a form of 'distill'"):
        tgt.explain("sparse", student)


def test_explain_of_no_tensor() -> None:
    with pytest.raises(DTypeError, match=r"explain.*1\.0"):
        tgt.explain("distill", 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["grad", "z"])
def test_ascent_without_its_tensors(argument: str) -> None:
    given: dict[str, Any] = {"z": rows(3, 5), "grad": rows(3, 5), argument: None}
    with pytest.raises(DTypeError, match=f"{argument} must be a tensor, got NoneType"):
        tgt.ascend_latents(**given, step_size=1.0)


LINEAR = ["linear_distillation_loss", "linear_distillation_loss of logits"]


@pytest.mark.parametrize("argument", ["student_hidden", "student_weight"])
@pytest.mark.parametrize("call", LINEAR)
def test_a_linear_loss_without_its_tensors(call: str, argument: str) -> None:
    function, given = CALLS[call]
    with pytest.raises(DTypeError, match=f"{argument} must be a tensor, got NoneType"):
        function(**{**given, argument: None})


@pytest.mark.parametrize(("call", "argument"), [(c, a) for c, a in NUMBERS if CALLS[c][1][a].dim() == 2])
def test_masked_tensors_and_parameters_of_lazy_modules(call: str, argument: str) -> None:
    function, given = CALLS[call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of prototypes
        masked = torch.masked.masked_tensor(given[argument], given[argument] > 0)
    kind, said = refusal(function, **{**given, argument: masked})
    assert kind is DTypeError
    assert re.search(rf"{argument}.*masked.*to_tensor\(value\)", said), said
    with pytest.raises(ArgumentError, match=f"{argument} is of a lazy module"):
        function(**{**given, argument: torch.nn.parameter.UninitializedParameter()})


@pytest.mark.parametrize(
    ("call", "argument"),
    [(c, a) for c, a in ARGUMENTS if a in ("seed", "step", "sample_ids", "replica") or c == "align_logits"],
)
def test_tensors_of_two_devices(call: str, argument: str) -> None:
    function, given = CALLS[call]
    with pytest.raises(DeviceError, match="is on "):
        function(**{**given, argument: given[argument].to("meta")})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_unsigned_weights_and_maps(backend: str) -> None:
    student, teacher, weight = rows(3, 5), -rows(3, 5), torch.tensor([0, 2, 1])
    wanted = tgt.distillation_loss(student, teacher, sample_weight=weight, backend=backend)
    shared = tgt.align_logits(student, teacher, vocab_map=torch.arange(5))
    for dtype in (torch.uint16, torch.uint64):
        unsigned = weight.to(dtype)
        assert torch.equal(tgt.distillation_loss(student, teacher, sample_weight=unsigned, backend=backend), wanted)
        made = tgt.align_logits(student, teacher, vocab_map=torch.arange(5).to(dtype))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, shared, strict=True))


@pytest.mark.parametrize(
    "call", ["distillation_loss", "linear_distillation_loss", "linear_distillation_loss of logits"]
)
def test_targets_that_are_no_indices(call: str) -> None:
    function, given = CALLS[call]
    target = given["target"]
    one_hot = torch.nn.functional.one_hot(target, 5)
    with pytest.raises(ShapeError, match="shares of the classes need as many as there are, got 4"):
        function(**{**given, "target": one_hot[:, :4]})
    with pytest.raises(ShapeError, match=r"target\.squeeze\(-1\)"):
        function(**{**given, "target": target[:, None]})
