// Enough of CUDA for a host compiler to run csrc/*.cu with one thread to a block: barriers are nothing, intrinsics are
// plain IEEE operations (compile with -ffp-contract=off). Shows what a kernel computes, not that its threads agree.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__ static inline
#define __global__ static
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)

struct Index {
    int x = 0, y = 0;
};
static Index threadIdx, blockIdx, blockDim;

static inline void __syncthreads() {}
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
using std::min;
