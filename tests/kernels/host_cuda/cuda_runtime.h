// Enough of CUDA for a host compiler to run csrc/*.cu: intrinsics are plain IEEE operations (compile with
// -ffp-contract=off). A block has one thread, and barriers are nothing, or it is run by `run_block` with threads of the
// host that meet at its barriers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <pthread.h>
#include <thread>
#include <vector>

#define __device__ static inline
#define __global__ static
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)
#define __host__

struct uint4 {
    uint32_t x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct Index {
    int x = 0, y = 0;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim;
static pthread_barrier_t* block_barrier = nullptr;

static inline void __syncthreads() {
    if (block_barrier) pthread_barrier_wait(block_barrier);
}

// The block that blockIdx names, by `threads` threads at once: run(kernel) calls the kernel.
template <typename Run>
static void run_block(int threads, Run&& run) {
    const Index block = blockIdx;
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, threads);
    block_barrier = &barrier;
    std::vector<std::thread> all;
    for (int thread = 0; thread < threads; ++thread) {
        all.emplace_back([&, thread] {
            threadIdx.x = thread;
            blockIdx = block;
            run();
        });
    }
    for (auto& one : all) one.join();
    block_barrier = nullptr;
    pthread_barrier_destroy(&barrier);
}
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
