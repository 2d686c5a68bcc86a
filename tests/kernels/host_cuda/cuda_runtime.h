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

struct uint4 {
    uint32_t x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct Index {
    int x = 0, y = 0;
};
static Index threadIdx, blockIdx, blockDim;

static inline void __syncthreads() {}
static inline void __syncwarp() {}
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
template <typename T>
static inline T __ldcs(const T* place) {
    return *place;
}
static inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
using std::min;
