// One to four tokens times a packed weight of 4 bits: a row of outputs is a sum that only memory can hold up.
//
// A block of 16 warps owns 32 rows; each warp takes every 16th brick (128 inputs) of them. Within a brick a row is 16
// words (sarqc_kernels/w4a16/layout.py): a lane reads 16 bytes of each of 4 rows, so a warp's load is 512 bytes in one
// piece, and the next brick's loads are under way while this one is multiplied: 4 rows x 16 bytes x 2 x 512 threads =
// 64 KiB in flight on a processor, where bandwidth times latency asks for about 26. Nibble i of word p is the code of
// input 16 i + p: a lane's four words need x at four neighbouring inputs, eight times, from the first-level cache.
//
// A code becomes fp32 without a conversion: OR-ed into the bits of 2^23 it is 2^23 + code, and subtracting 2^23 + zero
// is exact. Per weight: shift, OR, subtract, and a multiply-add for each token. Scales multiply the sums of a group.
//
// Lanes and warps meet once, in shared memory, and are added in one order: the same call gives the same bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 32;             // of a block
constexpr int kOwn = kRows / 8;       // rows of a lane: row lane / 4 of every eight
constexpr int kBrick = 256;           // 16-byte vectors of a brick of 64 rows
constexpr int kSlices = 8;            // slices of 16 inputs in a brick
constexpr int kPad = 8;               // floats between the quarters' sums: their banks differ

// What a launch gets; sarqc_kernels/w4a16/cuda_impl.py has the same fields in the same order.
struct Gemv {
    const uint16_t* x;      // [tokens, inputs] bf16 or fp16
    const uint4* words;     // bricks
    const void* scales;     // [groups, padded]
    const uint8_t* zeros;   // [groups, padded] or null: 8 everywhere
    const uint16_t* bias;   // [outputs] in x's dtype, or null
    uint16_t* out;          // [tokens, outputs]
    int32_t tokens, outputs, inputs, bricks, padded;
    int32_t slices_per_group, bricks_per_group;  // slices: 8 where a group is a brick or more
    int32_t half, scale_kind;                    // x is fp16; scales: 0 fp32, 1 fp16, 2 bf16
};

template <bool kHalf>
__device__ float value_of(uint16_t bits) {
    if (kHalf) return __half2float(__ushort_as_half(bits));
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <bool kHalf>
__device__ uint16_t bits_of(float value) {
    if (kHalf) return __half_as_ushort(__float2half_rn(value));
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ float scale_at(const Gemv& call, int64_t at) {
    if (call.scale_kind == 0) return static_cast<const float*>(call.scales)[at];
    const uint16_t bits = static_cast<const uint16_t*>(call.scales)[at];
    return call.scale_kind == 1 ? value_of<true>(bits) : value_of<false>(bits);
}

// The lane's vector of each of its rows of a brick; nothing beyond the last brick.
__device__ void fetch(const Gemv& call, const uint4* words, int brick, uint4 (&packed)[kOwn]) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
        packed[own] = brick < call.bricks ? __ldcs(words + static_cast<int64_t>(brick) * kBrick + own * 32)
                                          : uint4{0, 0, 0, 0};
    }
}

// A brick: sums[own][token] += scale * sum (code - zero) * x.
template <bool kHalf, int kTokens>
__device__ void multiply(const Gemv& call, const uint4 (&packed)[kOwn], int brick, int row, int quarter,
                         float (&sums)[kOwn][kTokens]) {
    float part[kOwn][kTokens] = {}, scale[kOwn], zero[kOwn];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        if (slice % call.slices_per_group == 0) {
            const int group = call.slices_per_group == kSlices
                                  ? brick / call.bricks_per_group
                                  : (brick * kSlices + slice) / call.slices_per_group;
#pragma unroll
            for (int own = 0; own < kOwn; ++own) {
                const int64_t at = static_cast<int64_t>(group) * call.padded + row + 8 * own;
                scale[own] = scale_at(call, at);
                zero[own] = 8388608.f + (call.zeros ? static_cast<float>(call.zeros[at]) : 8.f);
            }
        }
        const int column = brick * 128 + 16 * slice + 4 * quarter;
        float x[kTokens][4];
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
            ushort4 four = {0, 0, 0, 0};
            if (column < call.inputs) {  // inputs are a multiple of 4
                four = *reinterpret_cast<const ushort4*>(call.x + static_cast<int64_t>(token) * call.inputs + column);
            }
            x[token][0] = value_of<kHalf>(four.x);
            x[token][1] = value_of<kHalf>(four.y);
            x[token][2] = value_of<kHalf>(four.z);
            x[token][3] = value_of<kHalf>(four.w);
        }
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            const uint32_t word[4] = {packed[own].x, packed[own].y, packed[own].z, packed[own].w};
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const float weight = __uint_as_float(((word[p] >> (4 * slice)) & 15u) | 0x4B000000u) - zero[own];
#pragma unroll
                for (int token = 0; token < kTokens; ++token)
                    part[own][token] = fmaf(weight, x[token][p], part[own][token]);
            }
        }
        if ((slice + 1) % call.slices_per_group == 0) {
#pragma unroll
            for (int own = 0; own < kOwn; ++own) {
#pragma unroll
                for (int token = 0; token < kTokens; ++token) {
                    sums[own][token] = fmaf(part[own][token], scale[own], sums[own][token]);
                    part[own][token] = 0.f;
                }
            }
        }
    }
}

// Where a quarter of a warp leaves the sum of a row and token.
template <int kTokens>
__device__ int place(int warp, int quarter, int token, int row) {
    return (warp * 4 + quarter) * (kTokens * kRows + kPad) + token * kRows + row;
}

// First half of the kernel: a thread's sums, into shared memory.
template <bool kHalf, int kTokens>
__device__ void accumulate(const Gemv& call, float* shared, int block, int thread) {
    const int warp = thread / 32, row = thread % 32 / 4, quarter = thread % 4;
    const int first = block * kRows;
    const uint4* words = call.words + static_cast<int64_t>(first / 64) * call.bricks * kBrick +
                         (first % 64 + row) * 4 + quarter;
    float sums[kOwn][kTokens] = {};
    uint4 now[kOwn], next[kOwn];
    fetch(call, words, warp, now);
    for (int brick = warp; brick < call.bricks; brick += kWarps) {
        fetch(call, words, brick + kWarps, next);
        multiply<kHalf, kTokens>(call, now, brick, first + row, quarter, sums);
#pragma unroll
        for (int own = 0; own < kOwn; ++own) now[own] = next[own];
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
#pragma unroll
        for (int token = 0; token < kTokens; ++token)
            shared[place<kTokens>(warp, quarter, token, row + 8 * own)] = sums[own][token];
    }
}

// Second half: one thread for each output of the block.
template <bool kHalf, int kTokens>
__device__ void finish(const Gemv& call, const float* shared, int block, int thread) {
    const int token = thread / kRows, row = thread % kRows, output = block * kRows + row;
    if (token >= kTokens || output >= call.outputs) return;
    float sum = 0.f;
#pragma unroll 16
    for (int part = 0; part < 4 * kWarps; ++part) sum += shared[place<kTokens>(part / 4, part % 4, token, row)];
    if (call.bias) sum += value_of<kHalf>(call.bias[output]);
    call.out[static_cast<int64_t>(token) * call.outputs + output] = bits_of<kHalf>(sum);
}

template <int kTokens>
constexpr int kShared = 4 * kWarps * (kTokens * kRows + kPad);  // floats

#ifdef __CUDACC__
template <bool kHalf, int kTokens>
__global__ void __launch_bounds__(kThreads) gemv(const Gemv call) {
    __shared__ float shared[kShared<kTokens>];
    accumulate<kHalf, kTokens>(call, shared, blockIdx.x, threadIdx.x);
    __syncthreads();
    finish<kHalf, kTokens>(call, shared, blockIdx.x, threadIdx.x);
}

// Launchers for ctypes: plain C, no torch. They return 0 or a CUDA error and wait for nothing.
extern "C" int sarqc_gemv_size() { return sizeof(Gemv); }

extern "C" const char* sarqc_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" int sarqc_gemv(const Gemv* call, void* stream) {
    const auto kernel = call->half ? (call->tokens == 1   ? gemv<true, 1>
                                      : call->tokens == 2 ? gemv<true, 2>
                                      : call->tokens == 3 ? gemv<true, 3>
                                                          : gemv<true, 4>)
                                   : (call->tokens == 1   ? gemv<false, 1>
                                      : call->tokens == 2 ? gemv<false, 2>
                                      : call->tokens == 3 ? gemv<false, 3>
                                                          : gemv<false, 4>);
    const int blocks = (call->outputs + kRows - 1) / kRows;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*call);
    return cudaGetLastError();
}
#endif
