// Column quantization with error feedback, a row of the weight per thread.
//
// One launch takes a panel of columns (at most 128) of all rows and experts, as `_columns` in
// sarqc_kernels/columns/triton_impl.py does; sarqc_kernels/columns/panels.py says what the buffers hold. A thread owns
// its row from the first column to the last, so what it reads of weight, delta and grids only it has written. Memory is
// [column][row]: neighbours read neighbours.
//
// Threads share M alone: the strip of the 16 columns that are needed next, [rows of M up to them][16], read by all lanes
// at one address. While these columns are taken, asynchronous copies bring the strip after it, and the thread's own
// loads (weight, sums, grid) of the next 16 columns are under way. Deltas of the panel stay in shared memory, as do
// 1 / diag(M) and diag(M)^2: nothing in the chain from column to column waits for memory.
//
// Per row and column of a panel of P: P flops on average, 5 words of memory, P / 2 words of shared memory.
//
// Every rounding is spelled: __fmul_rn, __fsub_rn and __fdiv_rn round once and are never contracted, fmaf is one fused
// operation. No flag of the compiler changes a code.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int kMicro = 16;     // columns whose sums are in registers at once
constexpr int kPanel = 128;    // the most columns of a launch: rows of the shared strip
constexpr int kTogether = 8;   // trials of the search that share a pass over the group
constexpr int kThreads = 128;  // the most rows of a block

// What a launch gets; sarqc_kernels/columns/cuda_impl.py has the same fields in the same order.
struct Columns {
    const float* weight;        // [E, K, N], as all the rest in processing order
    float* delta;               // [E, K, N]
    uint8_t* codes;             // [E, K, N]
    const float* pull;          // [E, pull_columns, N]: what the columns before the panel ask
    const float* factor;        // [., K, K], factor_expert elements from one expert to the next
    const int32_t* usable;      // [E]: 0 where the expert has no factor
    const float* inverse;       // [E, K]: 1 / diag(M), 0 without a factor
    const float* importance;    // [E, K]: diag(M)^2
    const int32_t* group_of;    // [E, K]
    float* scales;              // [E, G, N]
    float* zeros;               // [E, G, N]
    const float* table;         // [trials, 2]: multiple of the span that gives the scale, and minus the factor
    int64_t factor_expert;
    int32_t pull_columns, first, last, stretch, experts, rows, columns, groups;
    int32_t round, fit, sym, trials, scale_kind;  // trials 1: no search; scale_kind 0 fp32, 1 fp16, 2 bf16
    float top, middle, tiny, most;                // largest code, code of zero, limits of the scale's dtype
};

// The thread's row within one expert and one panel: every pointer stands at the panel's first column.
struct Row {
    const float* weight;
    float* delta;
    uint8_t* codes;
    const float* pull;
    const float* factor;
    const int32_t* group_of;
    float* scales;
    float* zeros;
    int rows, columns, width;  // width: columns of the panel
    bool live, good, whole;    // the row exists; the expert has a factor; M can be copied 16 bytes at a time
};

// Shared memory of a block of T threads: two strips [kPanel][kMicro], 1 / diag(M) and diag(M)^2 [kPanel], and for each
// thread a column of what it keeps [kPanel][T]: deltas, or between free pass and fit the group. Always named from the
// array itself: through a pointer that was stored, the compiler would not know that it is shared memory.
__host__ __device__ constexpr int shared_floats(int threads) { return 2 * kPanel * kMicro + 2 * kPanel + kPanel * threads; }

#ifdef __CUDACC__
extern __shared__ __align__(16) float shared_memory[];
#else
alignas(16) static float shared_memory[shared_floats(8)];  // a block on a host has up to 8 threads
#endif

__device__ float* strip_row(int which, int i) { return shared_memory + (which * kPanel + i) * kMicro; }
__device__ float* inverses() { return shared_memory + 2 * kPanel * kMicro; }
__device__ float* importances() { return inverses() + kPanel; }
__device__ float& kept(int j) { return importances()[kPanel + j * blockDim.x + threadIdx.x]; }

struct Grid {
    float scale, zero;
};

__device__ float clamped(float value, float low, float high) { return fminf(fmaxf(value, low), high); }

#ifdef __CUDACC__
__device__ void copy_async(float* to, const float* from, int bytes) {
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(from) : "memory");
}
__device__ void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ void copies_done() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
// The compiler may not compute `value` again where it is used: it would put a division into a loop.
__device__ float pinned(float value) {
    asm volatile("" : "+f"(value));
    return value;
}
#else
static void copy_async(float* to, const float* from, int bytes) { std::memcpy(to, from, bytes); }
static void copies_issued() {}
static void copies_done() {}
static float pinned(float value) { return value; }
#endif

// Begin to bring M from row 0 of the panel to the micro-panel start .. start + 15. What lies on and below the diagonal
// comes along and is not used; columns from the panel's end on are zero, and all is where the expert has no factor.
__device__ void fetch_strip(const Row& row, int which, int start) {
    const int height = min(start + kMicro, row.width);
    if (!row.good) {
        for (int at = threadIdx.x; at < height * kMicro; at += blockDim.x) strip_row(which, at / kMicro)[at % kMicro] = 0.f;
    } else if (row.whole && start + kMicro <= row.width) {
        for (int at = threadIdx.x; at < height * (kMicro / 4); at += blockDim.x) {
            const int i = at / (kMicro / 4), k = at % (kMicro / 4) * 4;
            copy_async(strip_row(which, i) + k, row.factor + static_cast<int64_t>(i) * row.columns + start + k, 16);
        }
    } else {
        for (int at = threadIdx.x; at < height * kMicro; at += blockDim.x) {
            const int i = at / kMicro, k = at % kMicro;
            if (start + k < row.width)
                copy_async(strip_row(which, i) + k, row.factor + static_cast<int64_t>(i) * row.columns + start + k, 4);
            else
                strip_row(which, i)[k] = 0.f;
        }
    }
    copies_issued();
}

// What the thread itself needs of a micro-panel.
struct Columns16 {
    float asked[kMicro], value[kMicro], scale[kMicro], zero[kMicro];
};

template <bool kRound>
__device__ void fetch_columns(const Row& row, Columns16& own, int start, int end) {
#pragma unroll
    for (int k = 0; k < kMicro; ++k) {
        const bool inside = row.live && start + k < end;
        const int at = (start + k) * row.rows;
        own.asked[k] = inside ? row.pull[at] : 0.f;
        if (kRound) {
            const int group = inside ? row.group_of[start + k] * row.rows : 0;
            own.value[k] = inside ? row.weight[at] : 0.f;
            own.scale[k] = inside ? row.scales[group] : 1.f;
            own.zero[k] = inside ? row.zeros[group] : 0.f;
        }
    }
}

// Columns start .. start + 15 of the panel, those from `end` on left out. kRound: write codes; otherwise a free pass.
template <bool kRound>
__device__ void micro_panel(const Row& row, const Columns& call, Columns16& own, int which, int start, int end) {
    const int before = row.good ? start : 0;
#pragma unroll 4
    for (int i = 0; i < before; ++i) {
        const float delta = kept(i);
#pragma unroll
        for (int k = 0; k < kMicro; ++k) own.asked[k] = fmaf(delta, strip_row(which, i)[k], own.asked[k]);
    }
#pragma unroll
    for (int k = 0; k < kMicro; ++k) {
        const int j = start + k;
        if (j >= end) break;
        const float moved = __fmul_rn(own.asked[k], inverses()[j]);
        float error = -moved;
        if (kRound) {
            const float level = clamped(rintf(__fdiv_rn(__fadd_rn(own.value[k], moved), own.scale[k])), -own.zero[k],
                                        call.top - own.zero[k]);
            error = __fsub_rn(own.value[k], __fmul_rn(level, own.scale[k]));
            if (row.live) row.codes[j * row.rows] = static_cast<uint8_t>(level + own.zero[k]);
        }
        kept(j) = error;
        if (row.live) row.delta[j * row.rows] = error;
#pragma unroll
        for (int n = k + 1; n < kMicro; ++n) own.asked[n] = fmaf(error, strip_row(which, j)[n], own.asked[n]);
    }
}

template <bool kRound>
__device__ void advance(const Row& row, const Columns& call, int begin, int end) {
    Columns16 now, next;
    __syncthreads();  // everyone has done with the strips of what went before
    fetch_strip(row, 0, begin);
    fetch_columns<kRound>(row, now, begin, end);
    for (int start = begin, at = 0; start < end; start += kMicro, at ^= 1) {
        copies_done();
        __syncthreads();  // the strip of these columns is there, and everyone has done with the one before it
        if (start + kMicro < end) {
            fetch_strip(row, at ^ 1, start + kMicro);
            fetch_columns<kRound>(row, next, start + kMicro, end);
        }
        micro_panel<kRound>(row, call, now, at, start, end);
        now = next;
    }
}

// An fp32 scale as its dtype will hold it: finite, no smaller than the smallest normal number.
__device__ float storable(const Columns& call, float scale) {
    float size = clamped(fabsf(scale), call.tiny, call.most);
    if (call.scale_kind == 1) size = __half2float(__float2half_rn(size));
    if (call.scale_kind == 2) size = __bfloat162float(__float2bfloat16_rn(size));
    return scale < 0.f ? -size : size;
}

__device__ Grid grid_of(const Columns& call, float span, float low, int trial) {
    const float scale = storable(call, __fmul_rn(span, call.table[2 * trial]));
    if (call.sym) return {scale, call.middle};
    return {scale, clamped(rintf(__fdiv_rn(__fmul_rn(low, call.table[2 * trial + 1]), scale)), 0.f, call.top)};
}

// The grid of the group begin .. end - 1 from what a free pass left: sarqc_kernels/columns/grid.py says what and why.
__device__ Grid fitted(const Row& row, const Columns& call, int begin, int end) {
    float low = INFINITY, high = -INFINITY;
#pragma unroll 4
    for (int j = begin; j < end; ++j) {
        const float value = row.live ? __fsub_rn(row.weight[j * row.rows], kept(j)) : 0.f;
        kept(j) = value;
        low = fminf(low, value);
        high = fmaxf(high, value);
    }
    float span = fmaxf(-low, high);
    if (!call.sym) {
        low = fminf(low, 0.f);
        span = __fsub_rn(fmaxf(high, 0.f), low);
    }
    Grid best = grid_of(call, span, low, 0);
    const float turned = call.sym && high > -low ? -span : span;
    float least = INFINITY;
    for (int trial = 0; trial < call.trials && call.trials > 1; trial += kTogether) {
        Grid grid[kTogether];
        float per_scale[kTogether], total[kTogether];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
            grid[t] = grid_of(call, trial + t ? turned : span, low, min(trial + t, call.trials - 1));
            per_scale[t] = pinned(__fdiv_rn(1.f, grid[t].scale));
            total[t] = 0.f;
        }
        for (int j = begin; j < end; ++j) {
            const float value = kept(j), count = importances()[j];
#pragma unroll
            for (int t = 0; t < kTogether; ++t) {
                const float steps = __fmul_rn(value, per_scale[t]);
                const float level = clamped(rintf(steps), -grid[t].zero, call.top - grid[t].zero);
                const float error = __fsub_rn(level, steps);
                total[t] = fmaf(__fmul_rn(error, count), error, total[t]);
            }
        }
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {  // in the order of the trials: the first of equals wins
            const float loss = total[t] * grid[t].scale * grid[t].scale;
            if (loss < least) {
                least = loss;
                best = grid[t];
            }
        }
    }
    return best;
}

template <bool kRound, bool kFit>
__global__ void __launch_bounds__(kThreads) columns(const Columns call) {
    const int64_t expert = blockIdx.y;
    const int own = blockIdx.x * blockDim.x + threadIdx.x, width = call.last - call.first;
    const int64_t vector = expert * call.columns + call.first, matrix = vector * call.rows + own;
    const int64_t grids = expert * call.groups * call.rows + own;
    const float* factor = call.factor + expert * call.factor_expert + static_cast<int64_t>(call.first) * (call.columns + 1);
    const Row row = {
        call.weight + matrix,
        call.delta + matrix,
        call.codes + matrix,
        call.pull + expert * call.pull_columns * call.rows + own,
        factor,
        call.group_of + vector,
        call.scales + grids,
        call.zeros + grids,
        call.rows,
        call.columns,
        width,
        own < call.rows,
        call.usable[expert] != 0,
        call.columns % 4 == 0 && call.stretch % 4 == 0 && reinterpret_cast<uintptr_t>(factor) % 16 == 0,
    };
    for (int j = threadIdx.x; j < width; j += blockDim.x) {
        inverses()[j] = call.inverse[vector + j];
        importances()[j] = call.importance[vector + j];
    }
    for (int begin = 0; begin < width; begin += call.stretch) {
        const int end = min(begin + call.stretch, width);
        if (kFit) {
            advance<false>(row, call, begin, end);
            const Grid grid = fitted(row, call, begin, end);
            const int group = row.group_of[begin] * row.rows;
            if (row.live) {
                row.scales[group] = grid.scale;
                row.zeros[group] = grid.zero;
            }
        }
        advance<kRound>(row, call, begin, end);
    }
}

#ifdef __CUDACC__
// Launchers for ctypes: plain C, no torch. They return 0 or a CUDA error and wait for nothing.
extern "C" int sarqc_columns_size() { return sizeof(Columns); }

extern "C" const char* sarqc_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// `error`, which the runtime then forgets: the next launch asks for the last error, and would be told this one again.
static int reported(cudaError_t error) {
    cudaGetLastError();
    return error;
}

// 0 where a kernel of this library can run on the current card; versions: of CUDA here, and the driver's latest.
extern "C" int sarqc_ready(int* versions) {
    cudaRuntimeGetVersion(versions);
    cudaDriverGetVersion(versions + 1);
    cudaFuncAttributes found;
    return reported(cudaFuncGetAttributes(&found, columns<false, false>));
}

extern "C" int sarqc_columns(const Columns* call, int threads, void* stream) {
    const dim3 blocks((call->rows + threads - 1) / threads, call->experts);
    const auto kernel = call->fit ? columns<true, true> : call->round ? columns<true, false> : columns<false, false>;
    const int bytes = shared_floats(threads) * static_cast<int>(sizeof(float));
    if (bytes > 48 * 1024) {  // more than a kernel has without being asked for
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error) return reported(error);
    }
    kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(*call);
    return cudaGetLastError();
}
#endif
