"""The compiled kernels: raw pointers in, a status out. Call them through tgt_fast.kernels.native."""

from typing import Any

Matrix = tuple[int, int, int]  # pointer, row stride in elements, dtype code (csrc/common/dtype.h)
# pointer to ids, their row stride, entries a row, log-probabilities, tail, form
TopK = tuple[int, int, int, Matrix, Matrix, int]
Factor = tuple[float, int]  # a number, or a pointer to one a sample
Noise = tuple[int, int, int, int, int]  # seed, pointer to ids, step, replica, op
Filter = tuple[float, int, float, float]  # temperature, k or 0, p or 1, logarithm of the least ratio to the largest

ROW_STATE: int
BAD_TARGET: int
BAD_WEIGHT: int
BAD_ID: int
BAD_SOFT_TARGET: int

class DistillOptions:
    divergence: int
    reduction: int
    beta: float
    temperature: float
    teacher_temperature: float
    soft_weight: float
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    unlabeled_index: int

class Buffer:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int) -> memoryview: ...

def release_buffers() -> int: ...
def avoid_openmp() -> None: ...
def distill_forward(
    options: DistillOptions,
    rows: int,
    classes: int,
    student: Matrix,
    teacher: Matrix,
    target: int,
    weight: int,
    divisor: float,
    row_loss: int,
    loss: int,
    d_student: Matrix,
    d_teacher: Matrix,
    row_state: int,
    stats: int,
    soft_target: Matrix,
    threads: int,
) -> tuple[int, int]: ...
def distill_backward(
    options: DistillOptions,
    rows: int,
    classes: int,
    student: Matrix,
    teacher: Matrix,
    target: int,
    row_state: int,
    upstream: int,
    upstream_per_row: bool,
    d_student: Matrix,
    d_teacher: Matrix,
    soft_target: Matrix,
    threads: int,
) -> None: ...
def distill_scale(rows: int, classes: int, grad: Matrix, factors: int, per_row: bool, threads: int) -> None: ...
def topk_forward(
    options: DistillOptions,
    rows: int,
    classes: int,
    student: Matrix,
    topk: TopK,
    target: int,
    weight: int,
    divisor: float,
    row_loss: int,
    loss: int,
    d_student: Matrix,
    row_state: int,
    threads: int,
) -> tuple[int, int]: ...
def topk_backward(
    options: DistillOptions,
    rows: int,
    classes: int,
    student: Matrix,
    topk: TopK,
    target: int,
    row_state: int,
    upstream: int,
    upstream_per_row: bool,
    d_student: Matrix,
    threads: int,
) -> None: ...
def latent_perturb(
    samples: int,
    size: int,
    type: int,
    z: int,
    out: int,
    sigma: Factor,
    scale: int,
    key: Noise,
    truncation: float,
    sphere_radius: float,
    threads: int,
) -> None: ...
def latent_ascend(
    samples: int,
    size: int,
    types: tuple[int, int, int],
    z: int,
    grad: int,
    anchor: int,
    out: int,
    step_size: Factor,
    sigma: Factor,
    radius: Factor,
    scale: int,
    norm: int,
    radius_norm: int,
    key: Noise,
    threads: int,
) -> None: ...
def tokens_sample(
    rows: int,
    classes: int,
    positions: int,
    logits: Matrix,
    filter: Filter,
    key: Noise,
    tokens: int,
    threads: int,
) -> None: ...
def tokens_soft_forward(
    first: int,
    rows: int,
    classes: int,
    positions: int,
    is_fp64: bool,
    logits: Matrix,
    tau: float,
    gumbel: bool,
    key: Noise,
    largest: int,
    sum: int,
    weights: int,
    chosen: int,
    threads: int,
) -> None: ...
def tokens_soft_backward(
    first: int,
    rows: int,
    classes: int,
    positions: int,
    is_fp64: bool,
    logits: Matrix,
    tau: float,
    gumbel: bool,
    key: Noise,
    largest: int,
    sum: int,
    weights: int,
    slope: int,
    d_logits: Matrix,
    threads: int,
) -> None: ...
def cuda_set_device(device: int) -> None: ...  # where the core was built with CUDA; of the calling thread
def build_info() -> dict[str, Any]: ...
