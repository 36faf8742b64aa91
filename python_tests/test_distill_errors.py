"""Bad input to the distillation loss: typed errors that name the op and the fault, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import logits

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, BackendError, DeviceError, DTypeError, ShapeError, TgtError

S, T = logits(4, 5, 0), logits(4, 5, 1)
Y = torch.tensor([0, 1, 2, 3])
MAPS = logits(30, 4, 0).reshape(2, 5, 3, 4)  # classes in the second dimension
HARD = {"target": Y, "hard_weight": 1.0}


def call(name: str, /, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"student_logits": S, "teacher_logits": T, "backend": name, **changes}
    return tgt.distillation_loss(**arguments)


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"teacher_logits": logits(4, 6, 1)}, "5.*6"),  # classes
    ({"teacher_logits": logits(3, 5, 1)}, r"\(4, 5\).*\(3, 5\)"),  # rows
    ({"teacher_logits": logits((2, 2), 5, 1)}, r"\(4, 5\).*\(2, 2, 5\)"),
    ({"student_logits": torch.tensor(1.0), "teacher_logits": torch.tensor(1.0)}, r"\(\)"),
    ({"student_logits": torch.empty(4, 0), "teacher_logits": torch.empty(4, 0)}, r"\(4, 0\)"),
    ({"target": Y[:3], "hard_weight": 1.0}, r"\(3,\).*\(4,\)"),
    ({"target": Y[:, None], "hard_weight": 1.0}, r"\(4, 1\).*\(4,\)"),
    ({"target": T.softmax(-1)[:, 1:], "hard_weight": 1.0}, "shares of the classes.*as many.*got 4"),
    (
        {"student_logits": MAPS, "teacher_logits": MAPS, "target": MAPS[:, 0].long(), "hard_weight": 1.0},
        r"student_logits\.movedim\(1, -1\)",
    ),
    (
        {"student_logits": MAPS, "teacher_logits": MAPS, "sample_weight": torch.ones(2, 3, 4)},
        r"student_logits\.movedim\(1, -1\)",
    ),
    ({"sample_weight": torch.ones(5)}, r"\(5,\).*\(4,\)"),
    ({"normalizer": torch.ones(2)}, r"\(2,\)"),
]

DTYPES: list[tuple[dict[str, Any], str]] = [
    ({"student_logits": S.long()}, "student_logits.*int64"),
    ({"teacher_logits": T.to(torch.complex64)}, "teacher_logits.*complex64"),
    ({"teacher_logits": T.to(torch.float8_e4m3fn)}, "teacher_logits.*float8"),
    ({"teacher_logits": [[0.0]]}, "teacher_logits.*list"),
    ({"target": Y.float(), "hard_weight": 1.0}, "target.*float32"),
    ({"target": Y.bool(), "hard_weight": 1.0}, "target.*bool"),
]

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature.*0.0"),
    ({"temperature": -2.0}, "temperature.*-2.0"),
    ({"temperature": math.nan}, "temperature.*nan"),
    ({"temperature": math.inf}, "temperature.*inf"),
    ({"temperature": "2"}, "temperature.*'2'"),
    ({"teacher_temperature": 0.0}, "teacher_temperature.*0.0"),
    ({"divergence": "kl"}, "divergence.*'kl'"),
    ({"divergence": "jsd", "beta": 0.0}, "beta.*0.0.*forward_kl.*reverse_kl"),
    ({"divergence": "jsd", "beta": 1.0}, "beta.*1.0.*forward_kl.*reverse_kl"),
    ({"divergence": "jsd", "beta": 1.5}, "beta.*1.5"),
    ({"divergence": "jsd", "beta": math.nan}, "beta.*nan"),
    ({"soft_weight": -1.0}, "soft_weight.*-1.0"),
    ({"soft_weight": math.nan}, "soft_weight.*nan"),
    ({"hard_weight": -1.0, "target": Y}, "hard_weight.*-1.0"),
    ({**HARD, "label_smoothing": 1.5}, "label_smoothing.*1.5"),
    ({**HARD, "label_smoothing": -0.1}, "label_smoothing.*-0.1"),
    ({"reduction": "batchmean"}, "reduction.*'batchmean'"),
    ({"ignore_index": 0.5}, "ignore_index.*0.5"),
    ({"unlabeled_index": True}, "unlabeled_index.*True"),
    ({"hard_weight": 1.0}, "hard_weight.*target.*missing"),
    ({"normalizer": 3.0, "reduction": "sum"}, "normalizer.*'sum'"),
    ({"normalizer": torch.tensor(3.0), "reduction": "none"}, "normalizer.*'none'"),
    ({"normalizer": -1.0}, "normalizer.*-1.0"),
    ({"normalizer": math.nan}, "normalizer.*nan"),
    ({"backend": "cuda"}, "'cuda'"),
    ({"normalizer": torch.tensor(math.nan)}, "normalizer.*nan"),
    ({"normalizer": torch.tensor(-5.0)}, "normalizer.*-5"),
    ({"normalizer": torch.tensor(2.0, requires_grad=True)}, "normalizer.*grad"),
    ({"sample_weight": torch.ones(4, requires_grad=True)}, "sample_weight.*grad"),
    ({"temperature": [2.0]}, r"temperature.*\[2.0\]"),
    ({"temperature": True}, "temperature.*True"),
    ({"temperature": 1e-300}, "temperature.*1e-300"),
    ({"temperature": 100.5}, r"temperature.*\[1e-30, 100\]"),
    ({"teacher_temperature": 1e10}, r"teacher_temperature.*\[1e-30, 100\]"),
    ({"divergence": ["tvd"]}, r"divergence.*\['tvd'\]"),
    ({"beta": "a"}, "beta.*'a'"),
    ({"beta": math.nan}, "beta.*nan"),
    ({"ignore_index": 2**70}, "ignore_index.*1180591620717411303424"),
]

# Not tensors of the kind that is needed.
KINDS: list[tuple[dict[str, Any], str]] = [
    ({"target": [0, 1, 2, 3], "hard_weight": 1.0}, "target.*list"),
    ({"sample_weight": [1.0, 1.0, 1.0, 1.0]}, "sample_weight.*list"),
    ({"sample_weight": torch.ones(4, dtype=torch.complex64)}, "sample_weight.*complex64"),
    ({"normalizer": torch.tensor(1j)}, "normalizer.*complex64"),
    ({"student_logits": S.to_sparse(), "teacher_logits": T.to_sparse()}, "student_logits.*sparse"),
]

# What only the data shows: an error on a CPU.
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"target": torch.tensor([0, 1, 5, 3]), "hard_weight": 1.0}, r"target\[2\].*5"),
    ({"target": torch.tensor([0, -2, 2, 3]), "hard_weight": 1.0}, r"target\[1\].*-2"),
    (
        {"target": torch.tensor([0, -1, 2, 3]), "hard_weight": 1.0, "unlabeled_index": -7},
        r"target\[1\].*-1.*-7",
    ),
    (
        {"target": torch.tensor([0, -100, 2, 3]), "hard_weight": 1.0, "ignore_index": 4},
        r"target\[1\].*-100.*4",
    ),
    ({"sample_weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}, r"sample_weight\[1\].*-1"),
    ({"sample_weight": torch.tensor([1.0, 1.0, math.nan, 1.0])}, r"sample_weight\[2\].*nan"),
    ({"sample_weight": torch.tensor([1.0, 1.0, 1.0, math.inf])}, r"sample_weight\[3\].*inf"),
]


@pytest.mark.parametrize(("changes", "message"), SHAPES, ids=lambda value: value if isinstance(value, str) else "")
def test_shapes_that_do_not_fit(none_chosen: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=f"distillation_loss.*{message}"):
        call(none_chosen, **changes)


@pytest.mark.parametrize(("changes", "message"), DTYPES, ids=lambda value: value if isinstance(value, str) else "")
def test_dtypes_that_are_not_taken(none_chosen: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DTypeError, match=f"distillation_loss.*{message}"):
        call(none_chosen, **changes)


@pytest.mark.parametrize(("changes", "message"), ARGUMENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_options_out_of_range_or_in_contradiction(none_chosen: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(none_chosen, **changes)


@pytest.mark.parametrize(("changes", "message"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_of_another_kind(none_chosen: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DTypeError, match=message):
        call(none_chosen, **changes)


@pytest.mark.parametrize(("changes", "message"), VALUES, ids=lambda value: value if isinstance(value, str) else "")
def test_values_that_only_the_data_shows(host_backend: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(host_backend, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_logits": T.to("meta")},
        {"target": Y.to("meta"), "hard_weight": 1.0},
        {"sample_weight": torch.ones(4, device="meta")},
        {"normalizer": torch.tensor(1.0, device="meta")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tensors_on_two_devices(none_chosen: str, changes: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match=r"meta.*cpu|cpu.*meta"):
        call(none_chosen, **changes)


def test_errors_are_also_what_pytorch_users_catch(none_chosen: str) -> None:
    with pytest.raises(ValueError):
        call(none_chosen, temperature=0.0)
    with pytest.raises(TypeError):
        call(none_chosen, student_logits=S.long())
    with pytest.raises(TgtError):
        call(none_chosen, teacher_logits=T[:, :3])


def test_a_backend_asked_for_by_name_that_cannot_run_says_why(native: str) -> None:
    with pytest.raises(BackendError, match=r"native.*meta"):
        call(native, student_logits=S.to("meta"), teacher_logits=T.to("meta"))


def test_a_failed_call_leaves_no_trace(host_backend: str) -> None:
    """The next call works, and the logits of the failed one are untouched."""
    before = S.clone()
    for changes, _ in [*VALUES, *SHAPES]:
        with pytest.raises(TgtError):
            call(host_backend, **changes)
    assert torch.equal(S, before)
    assert call(host_backend).isfinite()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_integer_targets_of_any_width(backend: str, dtype: torch.dtype) -> None:
    assert torch.equal(call(backend, target=Y.to(dtype), hard_weight=1.0), call(backend, **HARD))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_weights_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([1, 2, 0, 4])
    assert torch.equal(call(backend, sample_weight=weight.to(dtype)), call(backend, sample_weight=weight.float()))
