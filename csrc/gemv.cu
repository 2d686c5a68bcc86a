// One to four tokens times a packed weight of 4 bits: a row of outputs is a sum that only memory can hold up.
//
// A block of 16 warps owns 32 rows; each warp takes every 16th k_tile (128 inputs) of them. Within a k_tile a row is 16
// words (sarqc_kernels/w4a16/layout.py): a lane reads 16 bytes of each of 4 rows, so a warp's load is 512 bytes in one
// piece, and the next k_tile's loads are under way while this one is multiplied: 4 rows x 16 bytes x 2 x 512 threads =
// 64 KiB in flight on a processor, where bandwidth times latency asks for about 26. Nibble i of word p is the code of
// input 16 i + p: a lane's four words need x at four neighbouring inputs, eight times, from the first-level cache.
//
// A code becomes fp32 without a conversion, and where it stands: nibble t of a word under the exponent of 2^(23 - 4t)
// is 2^(23 - 4t) + code, and subtracting 2^(23 - 4t) + zero is exact. Nibbles 5 to 7 lie too high for that and come
// down first, three with one shift. Per weight: AND-OR, subtract, and a multiply-add for each token. Scales multiply
// the sums of a group. Counted for sm_90a with one token in bf16, symmetric, groups of 128: 600 instructions for the
// 128 weights that a lane has of a k_tile, 384 of them these three.
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
constexpr int kTile = 256;           // 16-byte vectors of a k_tile of 64 rows
constexpr int kSlices = 8;            // slices of 16 inputs in a k_tile
constexpr int kScales = 6;            // slice at which a whole group's scales come: earlier, and four tokens spill
constexpr int kPad = 8;               // floats between the quarters' sums: their banks differ

// What a launch gets; sarqc_kernels/w4a16/cuda.py has the same fields in the same order.
struct Gemv {
    const uint16_t* x;      // [tokens, inputs] bf16 or fp16
    const uint4* words;     // k_tiles
    const void* scales;     // [groups, padded]
    const uint8_t* zeros;   // [groups, padded] or null: 8 everywhere
    const uint16_t* bias;   // [outputs] in x's dtype, or null
    uint16_t* out;          // [tokens, outputs]
    int32_t tokens, outputs, inputs, k_tiles, padded;
    int32_t slices_per_group, tiles_per_group;  // slices: 8 where a group is a k_tile or more
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

// The scales of a lane's rows in a group: those at `at`, at + 8 and so on.
__device__ void scales_at(const Gemv& call, int64_t at, float (&scale)[kOwn]) {
    if (call.scale_kind == 0) {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) scale[own] = static_cast<const float*>(call.scales)[at + 8 * own];
    } else {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            const uint16_t bits = static_cast<const uint16_t*>(call.scales)[at + 8 * own];
            scale[own] = call.scale_kind == 1 ? value_of<true>(bits) : value_of<false>(bits);
        }
    }
}

// The zeros of the same rows.
__device__ void zeros_at(const Gemv& call, int64_t at, float (&zero)[kOwn]) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) zero[own] = call.zeros ? static_cast<float>(call.zeros[at + 8 * own]) : 8.f;
}

// 2^(23 - 4 place) + the code at `place` of a word, 0 to 4: the code stands where that power of two has its units.
__device__ float lifted(uint32_t word, int place) {
    const uint32_t mask = 15u << (4 * place), power = (150u - 4 * place) << 23;
#ifdef __CUDACC__
    uint32_t bits;  // left to itself the compiler takes two instructions, as one holds no more than one constant
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(bits) : "r"(word), "r"(mask), "r"(power));
    return __uint_as_float(bits);
#else
    return __uint_as_float((word & mask) | power);
#endif
}

// The lane's vector of each of its rows of a k_tile; nothing beyond the last k_tile.
__device__ void fetch(const Gemv& call, const uint4* words, int k_tile, uint4 (&packed)[kOwn]) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
        packed[own] = k_tile < call.k_tiles ? __ldcs(words + static_cast<int64_t>(k_tile) * kTile + own * 32)
                                          : uint4{0, 0, 0, 0};
    }
}

// A k_tile: sums[own][token] += scale * sum (code - zero) * x. kWhole: a group is a k_tile or more.
template <bool kHalf, int kTokens, bool kWhole>
__device__ void multiply(const Gemv& call, const uint4 (&packed)[kOwn], int k_tile, int row, int quarter,
                         float (&sums)[kOwn][kTokens]) {
    const int every = kWhole ? kSlices : call.slices_per_group;  // a power of two
    const int before = !kWhole                      ? k_tile * (kSlices / every)
                       : call.tiles_per_group == 1 ? k_tile  // a division takes 24 instructions
                                                    : k_tile / call.tiles_per_group;
    int64_t at = static_cast<int64_t>(before) * call.padded + row;
    float part[kOwn][kTokens] = {}, scale[kOwn], zero[kOwn];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        if ((slice & (every - 1)) == 0) zeros_at(call, at, zero);
        if (kWhole ? slice == kScales : (slice & (every - 1)) == 0) scales_at(call, at, scale);
        const int column = k_tile * 128 + 16 * slice + 4 * quarter;
        float x[kTokens][4];
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
            uint2 four = {0, 0};
            if (column < call.inputs) {  // inputs are a multiple of 4
                four = *reinterpret_cast<const uint2*>(call.x + static_cast<int64_t>(token) * call.inputs + column);
            }
            x[token][0] = value_of<kHalf>(four.x & 0xffffu);
            x[token][1] = value_of<kHalf>(four.x >> 16);
            x[token][2] = value_of<kHalf>(four.y & 0xffffu);
            x[token][3] = value_of<kHalf>(four.y >> 16);
        }
        const int shift = slice < 5 ? 0 : 12, place = slice - shift / 4;
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
            const uint32_t word[4] = {packed[own].x, packed[own].y, packed[own].z, packed[own].w};
            const float above = zero[own] + static_cast<float>(1 << (23 - 4 * place));
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const float weight = lifted(word[p] >> shift, place) - above;
#pragma unroll
                for (int token = 0; token < kTokens; ++token)
                    part[own][token] = fmaf(weight, x[token][p], part[own][token]);
            }
        }
        if (((slice + 1) & (every - 1)) == 0) {
#pragma unroll
            for (int own = 0; own < kOwn; ++own) {
#pragma unroll
                for (int token = 0; token < kTokens; ++token) {
                    sums[own][token] = fmaf(part[own][token], scale[own], sums[own][token]);
                    part[own][token] = 0.f;
                }
            }
            at += call.padded;
        }
    }
}

// Where a quarter of a warp leaves the sum of a row and token.
template <int kTokens>
__device__ int place(int warp, int quarter, int token, int row) {
    return (warp * 4 + quarter) * (kTokens * kRows + kPad) + token * kRows + row;
}

// First half of the kernel: a thread's sums, into shared memory.
template <bool kHalf, int kTokens, bool kWhole>
__device__ void accumulate(const Gemv& call, float* shared, int block, int thread) {
    const int warp = thread / 32, row = thread % 32 / 4, quarter = thread % 4;
    const int first = block * kRows;
    const uint4* words = call.words + static_cast<int64_t>(first / 64) * call.k_tiles * kTile +
                         (first % 64 + row) * 4 + quarter;
    float sums[kOwn][kTokens] = {};
    uint4 now[kOwn], next[kOwn];
    fetch(call, words, warp, now);
    for (int k_tile = warp; k_tile < call.k_tiles; k_tile += kWarps) {
        fetch(call, words, k_tile + kWarps, next);
        __syncwarp();  // or the compiler moves these loads down into the products
        multiply<kHalf, kTokens, kWhole>(call, now, k_tile, first + row, quarter, sums);
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
template <bool kHalf, int kTokens, bool kWhole>
__global__ void __launch_bounds__(kThreads) gemv(const Gemv call) {
    __shared__ float shared[kShared<kTokens>];
    accumulate<kHalf, kTokens, kWhole>(call, shared, blockIdx.x, threadIdx.x);
    __syncthreads();
    finish<kHalf, kTokens>(call, shared, blockIdx.x, threadIdx.x);
}

// Launchers for ctypes: plain C, no torch. They return 0 or a CUDA error and wait for nothing.
extern "C" int sarqc_gemv_size() { return sizeof(Gemv); }

extern "C" const char* sarqc_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// 0 where a kernel of this library can run on the current card; versions: of CUDA here, and the driver's latest.
extern "C" int sarqc_ready(int* versions) {
    cudaRuntimeGetVersion(versions);
    cudaDriverGetVersion(versions + 1);
    cudaFuncAttributes found;
    return cudaFuncGetAttributes(&found, gemv<false, 1, true>);
}

template <bool kHalf, bool kWhole>
static auto kernel_for(int tokens) {
    return tokens == 1   ? gemv<kHalf, 1, kWhole>
           : tokens == 2 ? gemv<kHalf, 2, kWhole>
           : tokens == 3 ? gemv<kHalf, 3, kWhole>
                         : gemv<kHalf, 4, kWhole>;
}

extern "C" int sarqc_gemv(const Gemv* call, void* stream) {
    const bool whole = call->slices_per_group == kSlices;
    const auto kernel = call->half ? (whole ? kernel_for<true, true> : kernel_for<true, false>)(call->tokens)
                                   : (whole ? kernel_for<false, true> : kernel_for<false, false>)(call->tokens);
    const int blocks = (call->outputs + kRows - 1) / kRows;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*call);
    return cudaGetLastError();
}
#endif
