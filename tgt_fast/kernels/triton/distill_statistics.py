"""The statistics of a row from its sums, in Triton."""

import triton
import triton.language as tl

from tgt_fast.kernels.triton.numbers import INFINITY


@triton.jit
def write_statistics(
    stats, rows, row, live, active, student_sum, teacher_sum, qb_sum, pa_sum, kl_sum, unit,
    s_peak, t_peak,  # the largest logits, tempered
    same,  # whether they are at one class
    problem, bad_student, bad_teacher,
):  # fmt: skip
    """Zeros for a row that does not count, NaN for what is no distribution."""
    log_student = tl.log(student_sum)
    log_teacher = tl.log(teacher_sum)
    kl = kl_sum / teacher_sum * unit - tl.log(teacher_sum / student_sum)
    student_entropy = log_student - qb_sum / student_sum * unit
    teacher_entropy = log_teacher - pa_sum / teacher_sum * unit
    kl = tl.where(problem == 1, INFINITY, tl.where(kl < 0, 0.0, kl))
    agreement = (same & ~bad_student & ~bad_teacher).to(tl.int32).to(kl.dtype)
    no_student = tl.where(bad_student, float("nan"), 0.0)
    no_teacher = tl.where(bad_teacher, float("nan"), 0.0)
    zero = (row * 0).to(kl.dtype)
    at = stats + row
    tl.store(at, tl.where(active, tl.where(student_entropy < 0, 0.0, student_entropy) + no_student, zero), mask=live)
    at += rows
    tl.store(at, tl.where(active, tl.where(teacher_entropy < 0, 0.0, teacher_entropy) + no_teacher, zero), mask=live)
    at += rows
    tl.store(at, tl.where(active, kl + no_student + no_teacher, zero), mask=live)
    at += rows
    tl.store(at, tl.where(active, agreement, zero), mask=live)
    at += rows
    tl.store(at, tl.where(active, s_peak + log_student + no_student, zero), mask=live)
    at += rows
    tl.store(at, tl.where(active, t_peak + log_teacher + no_teacher, zero), mask=live)
