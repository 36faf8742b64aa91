// What lets one header serve g++, clang++ and nvcc.
#pragma once

#include <cstdint>

// Inline code is compiled once per instruction set. Each copy lives in an inline namespace of its own, so that the
// linker can never hand the AVX-512 copy to a CPU without it. CMake defines TGT_ISA for every such translation unit.
#ifndef TGT_ISA
#define TGT_ISA portable
#endif

#if defined(__CUDACC__)
#define TGT_HD __host__ __device__ __forceinline__
#if defined(TGT_SHORT_CODE)  // for what is there to check others, not to be fast
#define TGT_UNROLL _Pragma("unroll 1")
#else
#define TGT_UNROLL _Pragma("unroll")
#endif
#define TGT_UNROLL4 _Pragma("unroll 4")
#define TGT_NO_UNROLL _Pragma("unroll 1")
#else
#define TGT_HD inline __attribute__((always_inline))
#define TGT_UNROLL _Pragma("GCC unroll 16")
#define TGT_UNROLL4 _Pragma("GCC unroll 4")
#define TGT_NO_UNROLL
#endif
