"""Launches of CUDA kernels, without a device: csrc/cuda/device.h against a runtime that only keeps books.

A kernel's limit of shared memory belongs to the kernel and to a device, not to a launch or a thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tgt_fast.kernels.native import cuda

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

# As much of the CUDA runtime as device.h uses. The limits are a device's; the current device is a thread's.
RUNTIME = r"""
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __align__(n)
#define __grid_constant__
#define __launch_bounds__(threads, blocks)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static const dim3 threadIdx, blockIdx, blockDim, gridDim;
inline void __syncthreads() {}
inline void __syncwarp() {}
inline int __any_sync(unsigned, int mine) { return mine; }
template <class T>
inline T atomicCAS(T* at, T, T) { return *at; }
template <class T>
inline T atomicMin(T* at, T) { return *at; }
template <class T>
inline T atomicAdd(T* at, T) { return *at; }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int) { return value; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum { cudaLaunchAttributeClusterDimension = 4 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

constexpr int kMost = 232448, kStatic = 48;  // bytes a block may ask for; what every kernel here has of its own
inline thread_local int current_device = 0;
inline std::mutex books;
inline std::map<std::pair<const void*, int>, int> limits;
inline int times_set = 0, refused = 0;

inline cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = kMost, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->sharedSizeBytes = kStatic, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;  // a hint, refused
  const std::lock_guard<std::mutex> lock(books);
  if (value > kMost - kStatic) return cudaErrorInvalidValue;
  limits[{kernel, current_device}] = value;
  ++times_set;
  return cudaSuccess;
}
template <class Kernel, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, Arguments...) {
  std::this_thread::yield();  // others get their turn between a thread's limit and its launch
  const std::lock_guard<std::mutex> lock(books);
  const auto found = limits.find({reinterpret_cast<const void*>(kernel), current_device});
  const size_t limit = found == limits.end() ? 48 << 10 : static_cast<size_t>(found->second);
  if (config->dynamicSmemBytes <= limit) return cudaSuccess;
  ++refused;
  return cudaErrorInvalidValue;
}
"""

PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>
#include "cuda/device.h"
using tgt::cuda::launch;

void first(int) {}
void second(int) {}

int limit(void (*kernel)(int)) { return limits[{reinterpret_cast<const void*>(kernel), current_device}]; }

int main(int, char** argv) {
  if (!std::strcmp(argv[1], "threads")) {  // large and small launches of the same kernel
    std::vector<std::thread> threads;
    for (const int bytes : {200 << 10, 60 << 10, 1 << 10, 120 << 10}) {
      threads.emplace_back([=] {
        for (int i = 0; i < 5000; ++i) launch(first, 1, 32, bytes, 1, nullptr, 0);
      });
    }
    for (std::thread& thread : threads) thread.join();
    std::printf("%d %d %d\n", refused, times_set, limit(first));
    return 0;
  }
  launch(first, 1, 32, 1 << 10, 1, nullptr, 0);  // what every device grants is not asked for
  std::printf("%d\n", times_set);
  for (const int device : {0, 1}) {
    current_device = device;
    for (const int bytes : {100 << 10, 49 << 10, 200 << 10, 1 << 10}) {
      launch(first, 1, 32, bytes, 1, nullptr, 0);
      launch(second, 1, 32, bytes, 2, nullptr, 0);
    }
    std::printf("%d %d %d %d\n", refused, times_set, limit(first), limit(second));
  }
  std::printf("%d\n", launch(first, 1, 32, 300 << 10, 1, nullptr, 0) == cudaSuccess);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler, or no sources")
    folder = tmp_path_factory.mktemp("launch")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "program.cpp").write_text(PROGRAM)
    built = folder / "program"
    flags = ["-std=c++17", "-O1", "-pthread", "-Wno-attributes", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, str(folder / "program.cpp"), "-o", str(built)], check=True)
    return built


def numbers(program: Path, what: str) -> list[list[int]]:
    run = subprocess.run([str(program), what], capture_output=True, check=True, text=True, timeout=120)
    return [[int(number) for number in line.split()] for line in run.stdout.splitlines()]


MOST = 232448 - 48  # of the device, less what the kernel has of its own


def test_a_kernels_shared_memory_is_allowed_once_on_each_device_and_never_lowered(program: Path) -> None:
    assert numbers(program, "one thread") == [[0], [0, 2, MOST, MOST], [0, 4, MOST, MOST], [0]]


def test_threads_do_not_take_shared_memory_from_each_others_launches(program: Path) -> None:
    assert numbers(program, "threads") == [[0, 1, MOST]]


def test_the_core_is_told_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a CUDA runtime of its own, for which torch's notion of a current device need not hold."""
    events: list[Any] = []

    class Core:
        @staticmethod
        def cuda_set_device(index: int) -> None:
            events.append(("core", index))

    class Stream:
        cuda_stream = 77

    class There:  # a tensor of the second device
        device = torch.device("cuda", 1)
        is_cuda = True

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        events.append(("torch", device.index))
        yield
        events.append("torch is back")

    def stream(device: torch.device) -> Stream:
        events.append(("stream", device.index))
        return Stream()

    monkeypatch.setattr(cuda, "core", Core)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    found = cuda.engine(There())  # type: ignore[arg-type]
    assert found is not None
    with found.current(There()) as handle:  # type: ignore[arg-type]
        assert handle == 77
        events.append("launch")
    assert events == [("torch", 1), ("core", 1), ("stream", 1), "launch", "torch is back"]
