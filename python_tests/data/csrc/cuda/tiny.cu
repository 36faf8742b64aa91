#include <cstdint>

__device__ __forceinline__ float fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sums of exponentials of a row of floats, four at a time, by a block; its last step in double.
__global__ void tiny(const float4* in, double* out, int vectors, bool twice) {
  __shared__ float sums[32];
  float sum = 0;
#pragma unroll 1
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    const float4 v = in[k];
    sum += fast(v.x) + fast(v.y) + fast(v.z) + fast(v.w);  // exponentials
    if (twice) sum += fast(v.x * v.y);                       // another
  }
  if (threadIdx.x < 32) sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<double>(sums[0]) * sums[1];  // the end
}
