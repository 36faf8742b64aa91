// What the kernels use of a device beyond C++: intrinsics, shared memory, clusters, bulk copies, launches.
//
// Everything that is an instruction or a call of the CUDA runtime goes through here, so that the kernels can also be
// compiled for the host against an emulation of a device (csrc/emulator) and tested where there is no GPU.
#pragma once

#include "../common/math.h"

#if defined(TGT_EMULATED_GPU)
#include "../emulator/gpu.h"
#else
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#define TGT_DEVICE __device__ __forceinline__
#define TGT_GRID_CONSTANT __grid_constant__
#define TGT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr unsigned kWholeWarp = 0xffffffffu;

TGT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

TGT_DEVICE int thread_in_block() { return static_cast<int>(threadIdx.x); }
TGT_DEVICE int threads_in_block() { return static_cast<int>(blockDim.x); }
TGT_DEVICE int64_t block_in_grid() { return blockIdx.x; }
TGT_DEVICE int64_t blocks_in_grid() { return gridDim.x; }
TGT_DEVICE void block_barrier() { __syncthreads(); }
TGT_DEVICE bool any_in_warp(bool mine) { return __any_sync(kWholeWarp, mine) != 0; }
TGT_DEVICE void warp_barrier() { __syncwarp(); }

// Integers in shared memory, which threads change one after the other: what was there before, and nothing.
TGT_DEVICE int exchange_if_equal(int* at, int expected, int value) { return atomicCAS(at, expected, value); }
TGT_DEVICE void lower(int* at, int value) { atomicMin(at, value); }
TGT_DEVICE uint32_t fetch_and_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }

// The value of the lane whose number differs in the bits of `mask`; any type made of 4-byte words.
template <class T>
TGT_DEVICE T shuffle_xor(const T& value, int mask) {
  static_assert(sizeof(T) % 4 == 0, "shuffled by words");
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
  TGT_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kWholeWarp, words[i], mask);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// 2^x to 2 units in the last place; subnormal results become 0. One instruction of the special function unit, where
// the polynomial of common/math.h would take 16: at the speed of memory there are 40 for all of a class.
TGT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x of a normal number, to a unit in the last place.
TGT_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 of a normal number, to 2^-22 between 1/2 and 2 and to 2 units in the last place beyond; 0 at 1.
TGT_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sine and cosine of an angle between -pi and pi, to 2^-20.5.
TGT_DEVICE float sine_fast(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TGT_DEVICE float cosine_fast(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A half as a float, by the chip's own conversion.
TGT_DEVICE float widened_fp16(uint16_t half) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
  return wide;
}

// Largest and smallest of two pairs of 16-bit numbers; a NaN wins.
#if __CUDA_ARCH__ >= 800
#define TGT_PACKED_EXTREMES 1
TGT_DEVICE uint32_t packed_max_bf16(uint32_t a, uint32_t b) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
TGT_DEVICE uint32_t packed_min_bf16(uint32_t a, uint32_t b) {
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
TGT_DEVICE uint32_t packed_max_fp16(uint32_t a, uint32_t b) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
TGT_DEVICE uint32_t packed_min_fp16(uint32_t a, uint32_t b) {
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
#endif

// Two floats rounded to nearest even, the first in the low half.
#if __CUDA_ARCH__ >= 800
#define TGT_PACKED_ROUNDING 1
TGT_DEVICE uint32_t packed_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
TGT_DEVICE uint32_t packed_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

struct alignas(16) Bytes16 {
  uint32_t words[4];
};
TGT_DEVICE Bytes16 load16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
TGT_DEVICE void store16(void* to, const Bytes16& b) {
  *static_cast<uint4*>(to) = make_uint4(b.words[0], b.words[1], b.words[2], b.words[3]);
}
// A result that nobody on this chip reads next should not push out what somebody does.
TGT_DEVICE void store16_streaming(void* to, const Bytes16& b) {
  __stcs(static_cast<uint4*>(to), make_uint4(b.words[0], b.words[1], b.words[2], b.words[3]));
}

// Clusters of blocks, from compute capability 9.0 on; a lone block before.
#if __CUDA_ARCH__ >= 900
TGT_DEVICE int cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return static_cast<int>(n);
}
TGT_DEVICE int cluster_rank() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
  return static_cast<int>(n);
}
TGT_DEVICE int cluster_in_grid() {
  uint32_t n;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(n));
  return static_cast<int>(n);
}
TGT_DEVICE void cluster_arrive() {
  __syncwarp();  // the instruction is for warps whose lanes arrive together
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same of a warp that has written nothing which another block is to read: no fence.
TGT_DEVICE void cluster_arrive_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
TGT_DEVICE void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
TGT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// Stores 8 bytes at the place of `here` in the shared memory of block `rank` of the cluster.
TGT_DEVICE void store_remote(void* here, int rank, uint64_t value) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(here)), "r"(rank));
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote), "l"(value) : "memory");
}

// Bulk copies from global to shared memory that complete on a barrier in shared memory. Addresses and sizes are
// multiples of 16.
#define TGT_BULK_COPIES 1
TGT_DEVICE void copy_barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
TGT_DEVICE void copy_barriers_ready() {  // for the copy engine, which is not ordered with a thread's own accesses
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
TGT_DEVICE void copy_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
TGT_DEVICE void copy_start(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
TGT_DEVICE void copy_wait(uint64_t* barrier) {  // for the first phase of the barrier
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}" ::"r"(shared_address(barrier))
      : "memory");
}
#else
TGT_DEVICE int cluster_size() { return 1; }
TGT_DEVICE int cluster_rank() { return 0; }
TGT_DEVICE int cluster_in_grid() { return static_cast<int>(blockIdx.x); }
TGT_DEVICE void cluster_arrive() {}
TGT_DEVICE void cluster_arrive_relaxed() {}
TGT_DEVICE void cluster_wait() {}
TGT_DEVICE void store_remote(void*, int, uint64_t) {}
#endif

// Lets blocks of a kernel ask for all the shared memory that the current device has. The limit belongs to the kernel,
// not to a launch: set to the size of one launch, it could be lowered by another thread before the launch happens.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;  // kernels, each on a device
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes code = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(code.sharedSizeBytes));
  }
  if (error != cudaSuccess) return error;
  // Room for as many blocks as registers allow, where the default may be room for one. A hint: if it cannot be taken,
  // that is no error of the launch.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
      cudaSuccess) {
    cudaGetLastError();
  }
  allowed.insert({kernel, device});
  return cudaSuccess;
}

// Launches on the given stream; clusters of one block are no clusters.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int cluster,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 << 10) {  // more than every chip has must be asked for
    const cudaError_t error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  const cudaError_t last = cudaGetLastError();  // of this runtime, which others in the process do not see
  return error != cudaSuccess ? error : last;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
#endif
