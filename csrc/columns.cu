// Column quantization with error feedback, a row of the weight per thread.
//
// One launch takes a panel of columns (at most 128) of all rows and experts, as `_columns` in
// sarqc_kernels/columns/triton_impl.py does; sarqc_kernels/columns/panels.py says what the buffers hold. A thread owns
// its row from the first column to the last, so what it reads of weight, delta and grids only it has written, and the
// only thing that threads share is M: the strip of 16 columns that is needed next, in shared memory (8 KB), read by all
// lanes at one address. Those 16 columns' sums live in registers. Memory is [column][row]: neighbours read neighbours.
//
// Per row and column of a panel of P: P flops on average and P / 32 + 5 words, mostly from the first-level cache.
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
    const float* inverse;
    const float* importance;
    const int32_t* group_of;
    float* scales;
    float* zeros;
    int rows, columns;
    bool live, good;  // the row exists; the expert has a factor
};

struct Grid {
    float scale, zero;
};

__device__ float clamped(float value, float low, float high) { return fminf(fmaxf(value, low), high); }

// M from row 0 of the panel to the micro-panel start .. start + 15, which ends before `end`; zero elsewhere.
__device__ void load_strip(const Row& row, float (*strip)[kMicro], int start, int end) {
    __syncthreads();  // everyone has done with the strip before
    const int height = min(start + kMicro, end);
    for (int at = threadIdx.x; at < height * kMicro; at += blockDim.x) {
        const int i = at / kMicro, j = start + at % kMicro;
        strip[i][j - start] = row.good && i < j && j < end ? row.factor[static_cast<int64_t>(i) * row.columns + j] : 0.f;
    }
    __syncthreads();
}

// Columns start .. start + 15 of the panel, those from `end` on left out. kRound: write codes; otherwise a free pass.
template <bool kRound>
__device__ void micro_panel(const Row& row, const Columns& call, const float (*strip)[kMicro], int start, int end) {
    float asked[kMicro], value[kMicro], scale[kMicro], zero[kMicro];
#pragma unroll
    for (int k = 0; k < kMicro; ++k) {  // all loads of the micro-panel fly together, ahead of the chain
        const bool inside = row.live && start + k < end;
        const int at = (start + k) * row.rows;
        asked[k] = inside ? row.pull[at] : 0.f;
        if (kRound) {
            const int group = inside ? row.group_of[start + k] * row.rows : 0;
            value[k] = inside ? row.weight[at] : 0.f;
            scale[k] = inside ? row.scales[group] : 1.f;
            zero[k] = inside ? row.zeros[group] : 0.f;
        }
    }
    const int before = row.good ? start : 0;
#pragma unroll 4
    for (int i = 0; i < before; ++i) {
        const float delta = row.live ? row.delta[i * row.rows] : 0.f;
#pragma unroll
        for (int k = 0; k < kMicro; ++k) asked[k] = fmaf(delta, strip[i][k], asked[k]);
    }
#pragma unroll
    for (int k = 0; k < kMicro; ++k) {
        const int j = start + k;
        if (j >= end) break;
        const float moved = __fmul_rn(asked[k], row.inverse[j]);
        float error = -moved;
        if (kRound) {
            const float level = clamped(rintf(__fdiv_rn(__fadd_rn(value[k], moved), scale[k])), -zero[k],
                                        call.top - zero[k]);
            error = __fsub_rn(value[k], __fmul_rn(level, scale[k]));
            if (row.live) row.codes[j * row.rows] = static_cast<uint8_t>(level + zero[k]);
        }
        if (row.live) row.delta[j * row.rows] = error;
#pragma unroll
        for (int n = k + 1; n < kMicro; ++n) asked[n] = fmaf(error, strip[j][n], asked[n]);
    }
}

template <bool kRound>
__device__ void advance(const Row& row, const Columns& call, float (*strip)[kMicro], int begin, int end) {
    for (int start = begin; start < end; start += kMicro) {
        load_strip(row, strip, start, end);
        micro_panel<kRound>(row, call, strip, start, end);
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
    for (int j = begin; j < end; ++j) {
        const float value = row.live ? __fsub_rn(row.weight[j * row.rows], row.delta[j * row.rows]) : 0.f;
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
            per_scale[t] = __fdiv_rn(1.f, grid[t].scale);
            total[t] = 0.f;
        }
        for (int j = begin; j < end; ++j) {
            const float value = row.live ? __fsub_rn(row.weight[j * row.rows], row.delta[j * row.rows]) : 0.f;
            const float count = row.importance[j];
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
    __shared__ __align__(16) float strip[kPanel][kMicro];
    const int64_t expert = blockIdx.y;
    const int own = blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t vector = expert * call.columns + call.first, matrix = vector * call.rows + own;
    const int64_t grids = expert * call.groups * call.rows + own;
    const Row row = {
        call.weight + matrix,
        call.delta + matrix,
        call.codes + matrix,
        call.pull + expert * call.pull_columns * call.rows + own,
        call.factor + expert * call.factor_expert + static_cast<int64_t>(call.first) * (call.columns + 1),
        call.inverse + vector,
        call.importance + vector,
        call.group_of + vector,
        call.scales + grids,
        call.zeros + grids,
        call.rows,
        call.columns,
        own < call.rows,
        call.usable[expert] != 0,
    };
    for (int begin = 0; begin < call.last - call.first; begin += call.stretch) {
        const int end = min(begin + call.stretch, call.last - call.first);
        if (kFit) {
            advance<false>(row, call, strip, begin, end);
            const Grid grid = fitted(row, call, begin, end);
            const int group = row.group_of[begin] * row.rows;
            if (row.live) {
                row.scales[group] = grid.scale;
                row.zeros[group] = grid.zero;
            }
        }
        advance<kRound>(row, call, strip, begin, end);
    }
}

#ifdef __CUDACC__
// Launchers for ctypes: plain C, no torch. They return 0 or a CUDA error and wait for nothing.
extern "C" int sarqc_columns_size() { return sizeof(Columns); }

extern "C" const char* sarqc_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// 0 where a kernel of this library can run on the current card; versions: of CUDA here, and the driver's latest.
extern "C" int sarqc_ready(int* versions) {
    cudaRuntimeGetVersion(versions);
    cudaDriverGetVersion(versions + 1);
    cudaFuncAttributes found;
    return cudaFuncGetAttributes(&found, columns<false, false>);
}

extern "C" int sarqc_columns(const Columns* call, int threads, void* stream) {
    const dim3 blocks((call->rows + threads - 1) / threads, call->experts);
    const auto kernel = call->fit ? columns<true, true> : call->round ? columns<true, false> : columns<false, false>;
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(*call);
    return cudaGetLastError();
}
#endif
