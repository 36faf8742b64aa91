// A device in software, for tests where there is no GPU: what cuda/device.h offers, with the threads of a cluster as
// fibers of one host thread. Slow, but every barrier, shuffle and exchange between blocks does what the kernel asks
// for, and a barrier that not every thread reaches is an error rather than a hang.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "../common/math.h"

#define TGT_DEVICE inline
#define TGT_GRID_CONSTANT
#define TGT_BOUNDS(threads, blocks)
#define __global__
#define TGT_UNWATCHED __attribute__((no_sanitize("thread")))  // what it touches is no access of a kernel
#define TGT_OF_THE_DEVICE TGT_UNWATCHED inline
#define TGT_PACKED_EXTREMES 1
#define TGT_BULK_COPIES 1

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace tgt::emulator {

struct Place {
  int thread = 0, threads = 0, rank = 0, ranks = 0;
  int64_t block = 0, blocks = 0;
  unsigned char* shared = nullptr;          // of this block
  unsigned char* cluster_shared = nullptr;  // of all blocks of the cluster
  int64_t shared_bytes = 0;
  int warp_barriers = 0, block_barriers = 0, arrivals = 0, waits = 0;  // that the thread has left behind
};
extern const Place* here;

void block_barrier();
void warp_barrier();
void cluster_arrive(bool publishes);
void cluster_wait();
void let_others_run();
// Gives every live lane of a warp the bytes of its partner.
void exchange(const void* mine, void* partner, int bytes, int mask);
// Runs a grid; false when its threads wait for each other for ever.
bool run(const std::function<void()>& kernel, int64_t blocks, int threads, int shared_bytes, int cluster);

}  // namespace tgt::emulator

namespace tgt::cuda {
inline namespace TGT_ISA {

TGT_OF_THE_DEVICE unsigned char* shared_memory() { return emulator::here->shared; }
TGT_OF_THE_DEVICE int thread_in_block() { return emulator::here->thread; }
TGT_OF_THE_DEVICE int threads_in_block() { return emulator::here->threads; }
TGT_OF_THE_DEVICE int64_t block_in_grid() { return emulator::here->block; }
TGT_OF_THE_DEVICE int64_t blocks_in_grid() { return emulator::here->blocks; }
inline void block_barrier() { emulator::block_barrier(); }
inline void warp_barrier() { emulator::warp_barrier(); }

template <class T>
T shuffle_xor(const T& value, int mask) {
  T other;
  emulator::exchange(&value, &other, sizeof(T), mask);
  return other;
}

inline bool any_in_warp(bool mine) {
  int any = mine;
  for (int mask = 16; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
  return any != 0;
}

TGT_OF_THE_DEVICE int exchange_if_equal(int* at, int expected, int value) {
  const int before = *at;
  if (before == expected) *at = value;
  return before;
}
TGT_OF_THE_DEVICE void lower(int* at, int value) { *at = value < *at ? value : *at; }
TGT_OF_THE_DEVICE uint32_t fetch_and_add(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}

// With errors as large as a chip's may be: -2 to 2, by the bits of the argument.
inline int approximation_error(float x) { return static_cast<int>(bit_cast<uint32_t>(x) * 2654435761u >> 29) % 5 - 2; }
inline float exp2_fast(float x) {
  if (x == 0 || !(x >= -126.0f)) return x < -126.0f ? 0.0f : exp2f(x);
  return bit_cast<float>(bit_cast<int32_t>(exp2f(x)) + approximation_error(x));
}
inline float reciprocal_fast(float x) {
  const int error = approximation_error(x);
  return bit_cast<float>(bit_cast<int32_t>(1 / x) + (error > 0) - (error < 0));
}
inline float log2_fast(float x) {
  return x == 1 ? 0.0f : log2f(x) + static_cast<float>(approximation_error(x)) * 0x1p-23f;
}
// By -2^-20.5 to 2^-20.5.
inline float sine_fast(float x) { return sinf(x) + static_cast<float>(approximation_error(x)) * 3.37e-7f; }
inline float cosine_fast(float x) { return cosf(x) - static_cast<float>(approximation_error(x)) * 3.37e-7f; }

inline float widened_fp16(uint16_t half) { return cast<float>(Float16{half}); }

template <class Stored, class Choose>
uint32_t by_halves(uint32_t a, uint32_t b, Choose choose) {
  uint32_t result = 0;
  for (int shift : {0, 16}) {
    const Stored x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    const float fx = cast<float>(x), fy = cast<float>(y);
    const float chosen = fx != fx || fy != fy ? NAN : choose(fx, fy) ? fx : fy;
    result |= static_cast<uint32_t>(cast<Stored>(chosen).bits) << shift;
  }
  return result;
}
inline bool is_more(float x, float y) { return x > y; }
inline bool is_less(float x, float y) { return x < y; }
inline uint32_t packed_max_bf16(uint32_t a, uint32_t b) { return by_halves<BFloat16>(a, b, is_more); }
inline uint32_t packed_min_bf16(uint32_t a, uint32_t b) { return by_halves<BFloat16>(a, b, is_less); }
inline uint32_t packed_max_fp16(uint32_t a, uint32_t b) { return by_halves<Float16>(a, b, is_more); }
inline uint32_t packed_min_fp16(uint32_t a, uint32_t b) { return by_halves<Float16>(a, b, is_less); }

struct alignas(16) Bytes16 {
  uint32_t words[4];
};
void check_aligned(const void* p);
inline Bytes16 load16(const void* from) {
  check_aligned(from);
  Bytes16 b;
  memcpy(&b, from, 16);
  return b;
}
inline void store16(void* to, const Bytes16& b) {
  check_aligned(to);
  memcpy(to, &b, 16);
}
inline void store16_streaming(void* to, const Bytes16& b) { store16(to, b); }
inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) abort();
}

TGT_OF_THE_DEVICE int cluster_size() { return emulator::here->ranks; }
TGT_OF_THE_DEVICE int cluster_rank() { return emulator::here->rank; }
TGT_OF_THE_DEVICE int cluster_in_grid() { return static_cast<int>(emulator::here->block / emulator::here->ranks); }
inline void cluster_arrive() { emulator::cluster_arrive(true); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(false); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void store_remote(void* at, int rank, uint64_t value) {
  const emulator::Place& p = *emulator::here;
  memcpy(p.cluster_shared + rank * p.shared_bytes + (static_cast<unsigned char*>(at) - p.shared), &value, 8);
}

// A copy is over when it starts, so that only its bookkeeping is emulated: the barrier counts the bytes to come. What
// copies do is ordered by that, and no thread's access.
TGT_OF_THE_DEVICE void copy_barrier_init(uint64_t* barrier) { *barrier = 0; }
inline void copy_barriers_ready() {}
TGT_OF_THE_DEVICE void copy_expect(uint64_t* barrier, uint32_t bytes) { *barrier += bytes + (uint64_t{1} << 32); }
TGT_OF_THE_DEVICE void copy_start(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  check_aligned(to);
  check_aligned(from);
  if (bytes % 16) abort();
  memcpy(to, from, bytes);
  *barrier -= bytes;
}
TGT_OF_THE_DEVICE void copy_wait(const uint64_t* barrier) {
  while (*barrier != uint64_t{1} << 32) emulator::let_others_run();
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int cluster,
                   cudaStream_t, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return 1;
  const auto thread = [&]() TGT_UNWATCHED { kernel(arguments...); };  // each has the arguments on its stack
  return emulator::run(thread, blocks, threads, shared_bytes, cluster) ? cudaSuccess : 1;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda

constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
constexpr int cudaDevAttrComputeCapabilityMajor = 75;
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "too many blocks, or threads that wait for ever"; }
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);

struct cudaFuncAttributes {
  int ptxVersion = 90;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return *attributes = {}, cudaSuccess;
}
