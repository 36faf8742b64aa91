"""No thread of a CUDA kernel reads or writes what another may be writing: every access, on an emulated device.

Barriers order memory, shuffles do not. With gradients in place a logit is gone once its gradient is written.

Compiling the kernels so takes a minute of a core: they run once for each state of the sources (once.py).
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated_gpu
import pytest
import torch
from cuda_calls import PLANS, Kernels, Plan
from gpu_calls import every_kernel_once
from numerics import logits, targets

import tgt_fast as tgt

CSRC = emulated_gpu.CSRC

of_races = pytest.mark.once("races of the CUDA kernels")


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, native: str) -> ModuleType:
    """The kernels on an emulated device that looks for races."""
    reason = emulated_gpu.why_not()
    if reason:
        pytest.skip(f"no emulated GPU: {reason}")
    return emulated_gpu.build(request.config.cache.mkdir("emulated_gpu"), races=True)  # type: ignore[union-attr]


@of_races
def test_no_kernel_has_a_race(watched: ModuleType) -> None:
    with emulated_gpu.tensors_on_an_emulated_gpu(watched):
        every_kernel_once(torch.device("cpu"))
    assert watched.races() == ""


# 17, 603: lanes without a vector, and a tail
@of_races
@pytest.mark.parametrize("classes", [17, 603])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_gradient_in_place_overwrites_nothing_that_is_yet_to_be_read(
    watched: ModuleType, plan: Plan, classes: int
) -> None:
    """Each class is the label of some row: its logit is read by all threads, and its gradient written by one."""
    rows = classes if classes < 100 and plan[1] <= 1 else 5  # clusters take their time
    for dtype, divergence in ((torch.float32, "jsd"), (torch.bfloat16, "forward_kl")):
        student, teacher = (logits(rows, classes, seed, dtype=dtype) for seed in (0, 1))
        target = torch.arange(rows) if rows == classes else targets(rows, classes, 2)
        student[0, 1] = teacher[1, 1] = float("nan")  # a row of NaN is in place too
        Kernels.emulated(watched).forward(
            plan, student.clone(), teacher, target, hard_weight=1.0, label_smoothing=0.1,
            divergence=divergence, inplace=True, wanted=(True, False),
        )  # fmt: skip
        assert watched.races() == ""


@of_races
@pytest.mark.parametrize("classes", [17, 603])
def test_nor_does_one_of_an_adjusted_loss(watched: ModuleType, classes: int) -> None:
    """A label is read before all passes, and a peak's gradient written after the last."""
    rows = min(classes, 20)
    teacher = logits(rows, classes, 1)
    target = torch.arange(rows) if rows == classes else targets(rows, classes, 2)
    target[2] = -100
    forms: list[dict[str, Any]] = [{"decoupled": (1.0, 2.0)}, {"correct_teacher": 0.2}, {"skew": 0.1}]
    for form in forms:
        for standardize in (False, True):
            leaf = logits(rows, classes, 0)
            leaf[0, 1] = math.nan
            leaf[1, 5] = 30.0
            leaf.requires_grad_()
            with emulated_gpu.tensors_on_an_emulated_gpu(watched):
                loss: Any = tgt.distillation_loss(
                    leaf * 1, teacher, target, hard_weight=1.0, label_margin=torch.ones(classes), inplace=True,
                    standardize=standardize, return_stats=True, backend="native", **form,
                )[0]  # fmt: skip
                loss.backward()
            assert watched.races() == ""


# A warp and a block a row: the last thread writes what all have read.
KERNELS = r"""
#include "cuda/device.h"

namespace tgt::cuda {
inline namespace TGT_ISA {
TGT_DEVICE float in_turn(float value) {  // every lane has something of every other's by then
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
__global__ void behind_a_shuffle(float* x) {
  const float sum = in_turn(x[0]);
  if (thread_in_block() == 31) x[0] = sum;
}
__global__ void behind_a_barrier_of_its_warp(float* x) {
  float sum = x[0];
  warp_barrier();
  sum = in_turn(sum);
  if (thread_in_block() == threads_in_block() - 1) x[0] = sum;
}
__global__ void behind_a_barrier_of_its_block(float* x) {
  const float sum = x[0];
  block_barrier();
  if (thread_in_block() == threads_in_block() - 1) x[0] = sum;
}
__global__ void behind_a_barrier_of_its_cluster(float* x) {
  const float sum = x[0];
  cluster_arrive();
  cluster_wait();
  if (block_in_grid() % cluster_size() == 0 && thread_in_block() == 0) x[block_in_grid()] = sum;
}
__global__ void behind_arrivals_that_publish_nothing(float* x) {
  const float sum = x[0];
  cluster_arrive_relaxed();
  cluster_wait();
  if (block_in_grid() % cluster_size() == 0 && thread_in_block() == 0) x[block_in_grid()] = sum;
}
TGT_DEVICE void first_warp_publishes() {
  thread_in_block() < 32 ? cluster_arrive() : cluster_arrive_relaxed();
  cluster_wait();
}
__global__ void behind_what_one_warp_publishes(float* x) {
  const float sum = x[0];
  first_warp_publishes();
  if (block_in_grid() % cluster_size() == 0 && thread_in_block() == 0) x[block_in_grid()] = sum;
}
__global__ void behind_what_one_warp_publishes_for_its_block(float* x) {
  const float sum = x[0];
  block_barrier();
  first_warp_publishes();
  if (block_in_grid() % cluster_size() == 0 && thread_in_block() == 0) x[block_in_grid()] = sum;
}
__global__ void before_the_others_arrive(float* x) {
  const float sum = x[0];
  cluster_arrive();
  if (block_in_grid() % cluster_size() == 0 && thread_in_block() == 0) x[block_in_grid()] = sum;
  cluster_wait();
}
__global__ void neighbours_in_shared_memory(float* x) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_in_block()] = 1;
  x[thread_in_block()] = shared[(thread_in_block() + 1) % threads_in_block()];
}
}
}
"""

MAIN = r"""
#include <cstdio>
#include "emulator/gpu.h"
#include "emulator/races.h"

namespace tgt::cuda {
inline namespace TGT_ISA {
void behind_a_shuffle(float*);
void behind_a_barrier_of_its_warp(float*);
void behind_a_barrier_of_its_block(float*);
void behind_a_barrier_of_its_cluster(float*);
void behind_arrivals_that_publish_nothing(float*);
void behind_what_one_warp_publishes(float*);
void behind_what_one_warp_publishes_for_its_block(float*);
void before_the_others_arrive(float*);
void neighbours_in_shared_memory(float*);
}
}
using namespace tgt::cuda;

void show(void (*kernel)(float*), int blocks, int threads, int cluster) {
  static float x[64];
  launch(kernel, blocks, threads, 1024, cluster, nullptr, static_cast<float*>(x));
  std::printf("%d", tgt::emulator::take_races().empty() ? 0 : 1);
}

int main() {
  show(behind_a_shuffle, 1, 32, 1);
  show(behind_a_barrier_of_its_warp, 1, 32, 1);
  show(behind_a_barrier_of_its_warp, 1, 64, 1);
  show(behind_a_barrier_of_its_block, 1, 64, 1);
  show(behind_a_barrier_of_its_block, 2, 64, 2);
  show(behind_a_barrier_of_its_block, 2, 64, 1);
  show(behind_a_barrier_of_its_cluster, 2, 64, 2);
  show(behind_arrivals_that_publish_nothing, 2, 64, 2);
  show(behind_what_one_warp_publishes, 2, 64, 2);
  show(behind_what_one_warp_publishes, 2, 32, 2);
  show(behind_what_one_warp_publishes_for_its_block, 2, 64, 2);
  show(before_the_others_arrive, 2, 64, 2);
  show(neighbours_in_shared_memory, 1, 64, 1);
}
"""


def test_what_is_no_barrier_between_two_accesses_is_told(tmp_path: Path) -> None:
    reason = emulated_gpu.why_not()
    if reason:
        pytest.skip(f"no emulated GPU: {reason}")
    (tmp_path / "kernels.cpp").write_text(KERNELS)
    (tmp_path / "main.cpp").write_text(MAIN)
    compiler = [str(emulated_gpu.COMPILER), *emulated_gpu.FLAGS]
    subprocess.run([*compiler, *emulated_gpu.OF_KERNELS, "-c", "kernels.cpp"], cwd=tmp_path, check=True)
    sources = ["main.cpp", "kernels.o", *(str(CSRC / "emulator" / name) for name in ("gpu.cpp", "races.cpp"))]
    subprocess.run([*compiler, *sources, "-o", "program"], cwd=tmp_path, check=True)
    found = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, check=True).stdout
    # a shuffle; warp: of one, of two; block: of one, of two in a cluster, of two; cluster: behind, behind arrivals that
    # none publishes at, one warp, the only one, one behind the block's barrier; cluster: between; shared
    assert found == "1010110" + "1100" + "11"
