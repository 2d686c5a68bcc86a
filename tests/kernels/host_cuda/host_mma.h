// csrc/mma.cuh for a host compiler: the threads of a cluster as fibers, which run in turns until they wait for each
// other. Barriers are real, warps multiply together, and a block reads the shared memory of its neighbours.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <functional>
#include <vector>

#define __forceinline__

namespace fibers {

constexpr size_t kStack = 1 << 18;

struct Dimensions {
    int x = 0, y = 0, z = 0;
};

struct Barrier {
    int waiting = 0;
    long generation = 0;
};

struct Warp {
    Barrier barrier;
    float c[32][4];
    uint32_t a[32][4], b[32][2];
};

struct Block {
    Dimensions index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<char> shared;
};

struct Fiber {
    ucontext_t context;
    Dimensions thread;
    Block* block;
    int rank;
    bool done = false;
    std::vector<char> stack;
};

static std::vector<Block> blocks;  // of the cluster that runs
static std::vector<Fiber> threads;
static Fiber* current;
static ucontext_t scheduler;
static Barrier cluster;
static std::function<void(char*)> body;

inline void wait(Barrier& barrier, int of, const std::function<void()>& last = {}) {
    const long generation = barrier.generation;
    if (++barrier.waiting == of) {
        if (last) last();
        barrier.waiting = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

inline void start() {
    body(current->block->shared.data());
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// Runs work(shared memory of the block) on every thread of `size` blocks side by side, blocks first .. along x.
inline void run_cluster(int size, int count, int y, int z, size_t bytes, const std::function<void(char*)>& work) {
    body = work;
    cluster = {};
    blocks.assign(size, {});
    threads.assign(static_cast<size_t>(size) * count, {});
    for (int rank = 0; rank < size; ++rank) {
        blocks[rank].index.x = rank, blocks[rank].index.y = y, blocks[rank].index.z = z;
        blocks[rank].warps.resize(count / 32);
        blocks[rank].shared.assign(bytes, static_cast<char>(0xff));  // a float of these is no number
        for (int thread = 0; thread < count; ++thread) {
            Fiber& fiber = threads[static_cast<size_t>(rank) * count + thread];
            fiber.thread.x = thread, fiber.block = &blocks[rank], fiber.rank = rank;
            fiber.stack.resize(kStack);
            getcontext(&fiber.context);
            fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
            makecontext(&fiber.context, start, 0);
        }
    }
    for (bool any = true; any;) {
        any = false;
        for (Fiber& fiber : threads) {
            if (fiber.done) continue;
            any = true;
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
        }
    }
}

}  // namespace fibers

#define threadIdx (fibers::current->thread)
#define blockIdx (fibers::current->block->index)
#define __syncthreads() \
    fibers::wait(fibers::current->block->barrier, static_cast<int>(fibers::current->block->warps.size()) * 32)

static inline void cluster_sync() { fibers::wait(fibers::cluster, static_cast<int>(fibers::threads.size())); }

static inline float cluster_load(const float* place, int rank) {
    const auto offset = reinterpret_cast<const char*>(place) - fibers::current->block->shared.data();
    return *reinterpret_cast<const float*>(fibers::blocks[rank].shared.data() + offset);
}

template <bool kHalf>
static inline float half_of(uint32_t pair, int high) {
    const uint16_t bits = static_cast<uint16_t>(high ? pair >> 16 : pair);
    return kHalf ? __half2float(__ushort_as_half(bits)) : __bfloat162float(bits);
}

template <bool kHalf>
static inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int high = 0; high < 2; ++high) {
        const float value = std::fma(half_of<kHalf>(a, high), half_of<kHalf>(b, high), half_of<kHalf>(c, high));
        const uint16_t bits =
            kHalf ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
        out |= static_cast<uint32_t>(bits) << (16 * high);
    }
    return out;
}

// Lane 4 g + t holds of a: rows g and g + 8 (elements 0, 1 and 2, 3), inputs 2 t, 2 t + 1 and eight more (2, 3); of b:
// inputs as of a, column g; of c: rows g and g + 8 (0, 1 and 2, 3), columns 2 t and 2 t + 1.
template <bool kHalf>
static inline void multiply_warp(fibers::Warp& warp) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float& sum = warp.c[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
            for (int k = 0; k < 16; ++k) {
                const int lane = k % 8 / 2, high = k % 2, later = k / 8;
                sum += half_of<kHalf>(warp.a[row % 8 * 4 + lane][2 * later + row / 8], high) *
                       half_of<kHalf>(warp.b[4 * column + lane][later], high);
            }
        }
}

template <bool kHalf>
static inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    fibers::Warp& warp = fibers::current->block->warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) warp.a[lane][i] = a[i], warp.c[lane][i] = c[i];
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    fibers::wait(warp.barrier, 32, [&] { multiply_warp<kHalf>(warp); });
    for (int i = 0; i < 4; ++i) c[i] = warp.c[lane][i];
}

static inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

static inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int byte = 0; byte < 4; ++byte)
        out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * byte) & 7)) & 0xff) << (8 * byte);
    return out;
}

template <typename T>
static inline void keep(T&) {}

template <typename T>
static inline T __ldg(const T* place) {
    return *place;
}
