// Few tokens times a packed weight on tensor cores: y = W x for 1 to 16 rows of x at a time, dense or by expert.
//
// Swap-AB: the weight is the first operand of mma.sync m16n8k16, so that 16 of its rows meet 8 tokens, and one token
// costs what eight cost. A warp owns 32 rows; per step it takes 128 inputs of them, half of a packed tile of 64 x 128
// (sarqc_kernels/w4a16/layout.py), 2 KiB in one piece at 4 bits. The next step's words are under way meanwhile: 16
// warps on a processor have 32 KiB in flight, where bandwidth times latency asks for 26. The warps of a block divide
// its rows and its inputs among them (warps_n); the blocks of a cluster divide the inputs (split-K).
//
// Registers: a code never changes its lane. Field s of a word and field s + 16 bits are one pair of 16-bit floats: one
// AND-OR puts them under the exponent of 2^7 (bf16) or 2^10 (fp16), where a mantissa bit is worth 1, and one packed FMA
// takes 2^7 + zero away again, exactly; where fields of 2 or 3 bits stand higher in the mantissa it also scales them
// down. Which inputs meet in a pair does not matter as long as x has the same order: x is permuted once, on its way
// into shared memory (`slot`). Groups of less than a tile need pairs from one slice of 16 inputs: there the halves
// of two words are joined first (kWhole = false).
//
// Counted for sm_90a, 4 bits, bf16, symmetric, groups of 128: see benchmarks/NOTES.md.
//
// Sums of a group are scaled in fp32. Warps are added in order through shared memory, blocks of a cluster through
// distributed shared memory, in order as well: the same call gives the same bits, with no workspace and no atomics.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "mma.cuh"

#ifndef SARQC_BITS
#define SARQC_BITS 4
#endif
#ifndef SARQC_HALF
#define SARQC_HALF 0
#endif
#ifndef SARQC_SCALE
#define SARQC_SCALE 2
#endif

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpRows = 32;    // two blocks of 16 rows, as an mma has
constexpr int kTileK = 128;      // inputs of a packed tile
constexpr int kSteps = 8;        // of 16 inputs in a tile
constexpr int kTileX = 64;       // words of x that a token has in a tile
constexpr int kPadX = 16;        // between tokens: their banks differ

// What a launch gets; sarqc_kernels/w4a16/cuda.py has the same fields in the same order.
struct Gemv {
    const uint16_t* x;       // [tokens, inputs] bf16 or fp16
    const uint8_t* words;    // packed tiles [experts, padded / 64, k_tiles]
    const void* scales;      // [experts, groups, padded]
    const uint8_t* zeros;    // [experts, groups, padded] or null: half of the codes everywhere
    const uint16_t* bias;    // [experts, outputs] in x's dtype, or null
    uint16_t* out;           // [rows, outputs]
    const int64_t* offsets;  // [experts + 1], or null: one expert has all rows
    const int64_t* index;    // [rows], row of x behind each row, or null: in order
    int32_t rows, outputs, inputs, k_tiles, padded, groups, experts;
    int32_t slices_per_group;  // 8 where a group is a tile or more
    uint32_t scale_bytes, zero_bytes;           // of a group: padded scales, padded zeros
    uint32_t place_of_tile;  // 2^20 / (tiles of a group), rounded up; groups of a tile where those are more than one
    int32_t gated;    // rows of the weight are gate, then up; out is silu(gate) * up
    int32_t warps_n;  // warps side by side on rows; the others share their inputs: 1, 2, 4, 8
    int32_t splits;   // blocks of a cluster, which share the inputs
    int32_t chunk;    // tiles whose x is in shared memory at a time, a multiple of kWarps / warps_n
};

// Rows of one expert that a block multiplies.
struct Rows {
    int expert, first, count;
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

#if SARQC_SCALE == 0
using Scale = float;
__device__ float scale_of(Scale scale) { return scale; }
#else
using Scale = uint16_t;
__device__ float scale_of(Scale scale) { return value_of<SARQC_SCALE == 1>(scale); }
#endif

// How codes of so many bits lie: parts are multiplied apart (8 bits are two of 4), fields are what a register yields.
template <int kBits>
struct Form {
    static constexpr int parts = kBits == 8 ? 2 : 1;
    static constexpr int width = kBits == 8 ? 4 : kBits;
    static constexpr int unit = width == 4 ? 4 : 2;             // bits between fields of a word
    static constexpr int words = width;                         // of a row, a lane and a part
    static constexpr int tile_bytes = 1024 * kBits;
};

// Where a field goes: the mantissa of 2^bits holds it at `place` after a shift.
template <int kBits, bool kHalf>
struct Mantissa {
    using F = Form<kBits>;
    static constexpr int bits = kHalf ? 10 : 7;
    static constexpr int bias = kHalf ? 15 : 127;
    static constexpr int places = (bits - F::width) / F::unit + 1;  // that need no shift of their own
    static constexpr int span = places * F::unit;
    static constexpr uint32_t base = static_cast<uint32_t>((bias + bits) << bits) * 0x10001u;
};

// 2^(up - place), twice.
template <bool kHalf>
__device__ constexpr uint32_t factor_of(int place, int up) {
    return static_cast<uint32_t>(((kHalf ? 15 : 127) + up - place) << (kHalf ? 10 : 7)) * 0x10001u;
}

// -(2^bits + zero * 2^place) * 2^(up - place), twice: bits of the mantissa, below which the zero stands.
template <bool kHalf>
__device__ constexpr uint32_t minus_of(uint32_t zero, int place, int up) {
    return (0x8000u | static_cast<uint32_t>(((kHalf ? 25 : 134) + up - place) << (kHalf ? 10 : 7))) * 0x10001u +
           zero * (0x10001u << place);
}

// The word of a row that has input `ab` (0, 1) of mma step `step`, and the bit where its field begins.
template <int kBits, bool kWhole>
__device__ constexpr int word_of(int step, int ab) {
    const int half = step / 4;
    return Form<kBits>::width == 4 ? 2 * half + ab : kWhole ? ab : half;
}
template <int kBits, bool kWhole>
__device__ constexpr int position_of(int step, int ab) {
    return 4 * (step % 4) + (Form<kBits>::width == 4 ? 0 : 2 * (kWhole ? step / 4 : ab));
}

// The input (below 16) of a slice behind word `ab` of a lane in half `half` of the steps.
template <int kBits>
__device__ constexpr int input_of(int t, int half, int ab) {
    return Form<kBits>::width == 4 ? 4 * t + 2 * half + ab : 2 * t + 8 * half + ab;
}

// Two fields of `row` under the exponent of 2^bits, at `place`.
template <int kBits, bool kHalf, bool kWhole>
__device__ __forceinline__ uint32_t lifted(const uint32_t* row, int step, int ab) {
    using F = Form<kBits>;
    using M = Mantissa<kBits, kHalf>;
    const int position = position_of<kBits, kWhole>(step, ab);
    const int shift = position / M::span * M::span, place = position - shift;
    const uint32_t mask = ((1u << (F::width == 3 ? 2 : F::width)) - 1u) << place;
    const uint32_t low = and_or(row[word_of<kBits, kWhole>(step, ab)] >> shift, mask * 0x10001u, M::base);
    if (F::width != 3) return low;
    // the third bit, from the plane of one bit: in word 2 at position + ab, or joined in words 2 and 3 at position
    const uint32_t high = kWhole ? row[2] : row[2 + step / 4];
    const int right = shift - 2 + (kWhole ? ab : 0);
    return and_or(right >= 0 ? high >> (right & 31) : high << (-right & 31), (4u << place) * 0x10001u, low);
}

// code - zero of two inputs, in the dtype of x. zero: of the part, for kAsym.
template <int kBits, bool kHalf, bool kWhole, bool kAsym>
__device__ __forceinline__ uint32_t weights(const uint32_t* row, int step, int ab, int part, uint32_t zero) {
    using F = Form<kBits>;
    using M = Mantissa<kBits, kHalf>;
    const int position = position_of<kBits, kWhole>(step, ab), place = position % M::span, up = 4 * part;
    const uint32_t middle = F::parts == 2 && part == 0 ? 0u : 1u << (F::width - 1);
    return fma_pair<kHalf>(lifted<kBits, kHalf, kWhole>(row, step, ab), factor_of<kHalf>(place, up),
                           minus_of<kHalf>(kAsym ? zero : middle, place, up));
}

// Rows g and g + 8 of a block of 16: `words` is the lane's place of row g in the first plane; of 3 bits, `bit` is that
// in the plane of one bit.
template <int kBits>
__device__ __forceinline__ void fetch(const uint8_t* words, const uint8_t* bit, uint32_t (&first)[kBits],
                                      uint32_t (&second)[kBits]) {
#pragma unroll
    for (int own = 0; own < 2; ++own) {
        uint32_t(&into)[kBits] = own ? second : first;
        if (Form<kBits>::width == 4) {
#pragma unroll
            for (int part = 0; part < Form<kBits>::parts; ++part) {
                const uint4 four = __ldcs(reinterpret_cast<const uint4*>(words + 4096 * part + 512 * own));
                into[4 * part] = four.x, into[4 * part + 1] = four.y;
                into[4 * part + 2] = four.z, into[4 * part + 3] = four.w;
            }
        } else {
            const uint2 two = __ldcs(reinterpret_cast<const uint2*>(words + 256 * own));
            into[0] = two.x, into[1] = two.y;
            if (kBits == 3) into[kBits - 1] = __ldcs(reinterpret_cast<const uint32_t*>(bit + 128 * own));
        }
    }
}

// The words of a row in the form that `lifted` reads: as they are, or halves of neighbours joined.
template <int kBits, bool kWhole>
__device__ __forceinline__ void joined(const uint32_t* word, uint32_t (&out)[4]) {
    constexpr int width = Form<kBits>::width;
    if (kWhole) {
#pragma unroll
        for (int i = 0; i < width; ++i) out[i] = word[i];
    } else if (width == 4) {
        out[0] = byte_permute(word[0], word[1], 0x5410), out[1] = byte_permute(word[2], word[3], 0x5410);
        out[2] = byte_permute(word[0], word[1], 0x7632), out[3] = byte_permute(word[2], word[3], 0x7632);
    } else {
        out[0] = byte_permute(word[0], word[1], 0x5410), out[1] = byte_permute(word[0], word[1], 0x7632);
        if (width == 3) {
            out[2] = byte_permute(word[2], word[2] >> 1, 0x5410);
            out[3] = byte_permute(word[2], word[2] >> 1, 0x7632);
        }
    }
}

// The grid of a lane's rows: bytes where the scale of row g of both blocks of 16 is in the first group, and the zero of
// the first block; those of row g + 8 are 8 behind, zeros of the second block `apart` (a register less than a pointer).
struct Grid {
    const uint8_t* scales[2];
    const uint8_t* zeros;
    int apart;
};

// What a lane has of a tile: words of the rows g, g + 8, g + 16, g + 24, and their grid where a group is a tile or more.
template <int kBits>
struct Tile {
    uint32_t row[4][kBits];
    Scale scale[4];
    uint8_t zero[4];
};

template <bool kAsym>
__device__ __forceinline__ void load_grid(const Gemv& call, const Grid& grid, uint32_t group, Scale (&scale)[4],
                                          uint8_t (&zero)[4]) {
    const uint8_t* const zeros = grid.zeros + static_cast<uint64_t>(group) * call.zero_bytes;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        const uint64_t scales = static_cast<uint64_t>(group) * call.scale_bytes;
        const Scale* const of_group = reinterpret_cast<const Scale*>(grid.scales[block] + scales);
        scale[2 * block] = __ldg(of_group), scale[2 * block + 1] = __ldg(of_group + 8);
        if (kAsym) {
            const uint8_t* const own = zeros + (block ? grid.apart : 0);
            zero[2 * block] = __ldg(own), zero[2 * block + 1] = __ldg(own + 8);
        }
    }
}

// One tile: sums[block][column of 8 tokens][c] += scale * (code - zero) x. x: the lane's first word of each column.
template <int kBits, bool kHalf, int kColumns, bool kWhole, bool kAsym>
__device__ __forceinline__ void multiply(const Gemv& call, Tile<kBits>& tile, const uint32_t* const (&x)[kColumns],
                                         const Grid& grid, uint32_t group, float (&sums)[2][kColumns][4]) {
    constexpr int parts = Form<kBits>::parts;
    float products[2][kColumns][4] = {};
    uint32_t row[parts][4][4];
#pragma unroll
    for (int part = 0; part < parts; ++part)
#pragma unroll
        for (int own = 0; own < 4; ++own) joined<kBits, kWhole>(tile.row[own] + 4 * part, row[part][own]);
    uint4 pairs[kColumns];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (!kWhole && (step & (call.slices_per_group - 1)) == 0) {
            load_grid<kAsym>(call, grid, group++, tile.scale, tile.zero);
        }
        if (step % 2 == 0) {
#pragma unroll
            for (int column = 0; column < kColumns; ++column)
                pairs[column] = *reinterpret_cast<const uint4*>(x[column] + step / 2 * 16);
        }
#pragma unroll
        for (int block = 0; block < 2; ++block) {
#pragma unroll
            for (int part = 0; part < parts; ++part) {
                uint32_t a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int own = 2 * block + i % 2;
                    const uint32_t zero = tile.zero[own];
                    const uint32_t of_part = parts == 1 ? zero : part ? zero >> 4 : zero & 15u;
                    a[i] = weights<kBits, kHalf, kWhole, kAsym>(row[part][own], step, i / 2, part, of_part);
                }
#pragma unroll
                for (int column = 0; column < kColumns; ++column)
                    mma_m16n8k16<kHalf>(products[block][column], a, step % 2 ? pairs[column].z : pairs[column].x,
                                        step % 2 ? pairs[column].w : pairs[column].y);
            }
        }
        if (kWhole ? step == kSteps - 1 : ((step + 1) & (call.slices_per_group - 1)) == 0) {
#pragma unroll
            for (int block = 0; block < 2; ++block)
#pragma unroll
                for (int column = 0; column < kColumns; ++column)
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        float& sum = sums[block][column][c];
                        sum = fmaf(products[block][column][c], scale_of(tile.scale[2 * block + c / 2]), sum);
                        products[block][column][c] = 0.f;
                    }
        }
    }
}

// Which expert has the tile of rows that begins at row `start`, and how many of its rows; count 0: none does.
__device__ Rows rows_at(const Gemv& call, int start, int most, Rows* shared) {
    if (!call.offsets) return {0, start, min(most, call.rows - start)};
    if (threadIdx.x == 0) *shared = {0, start, 0};
    __syncthreads();
    for (int expert = threadIdx.x; expert < call.experts; expert += kThreads) {
        const int begin = static_cast<int>(call.offsets[expert]), end = static_cast<int>(call.offsets[expert + 1]);
        if (begin <= start && start < end && (start - begin) % most == 0) *shared = {expert, start, min(most, end - start)};
    }
    __syncthreads();
    return *shared;
}

// x of tiles first .. last - 1 into shared memory, in the order of the lanes' pairs.
template <int kBits, bool kWhole>
__device__ void stage(const Gemv& call, uint32_t* x, const Rows& rows, int first, int last) {
    const int tiles = last - first, stride = call.chunk * kTileX + kPadX;
    for (int item = threadIdx.x; item < rows.count * tiles * 8; item += kThreads) {
        // eight inputs of slice i and eight of slice i + 4
        const int half = item & 1, i = item / 2 & 3, tile = item / 8 % tiles, token = item / 8 / tiles;
        const int row = rows.first + token;
        const int64_t source = call.index ? call.index[row] : row;
        const int column = (first + tile) * kTileK + 16 * i + 8 * half;
        uint4 part[2] = {};
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            if (column + 64 * side < call.inputs)  // inputs are a multiple of 8
                part[side] = *reinterpret_cast<const uint4*>(call.x + source * call.inputs + column + 64 * side);
        }
        const uint32_t low[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
        const uint32_t high[4] = {part[1].x, part[1].y, part[1].z, part[1].w};
        uint32_t* into = x + token * stride + tile * kTileX;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // inputs p and p + 1 of both slices
            const int p = 8 * half + 2 * pair;
            const int t = Form<kBits>::width == 4 ? p / 4 : p / 2 % 4, second = Form<kBits>::width == 4 ? p / 2 % 2 : p / 8;
            if (kWhole) {  // step i + 4 second: (low p, high p), (low p + 1, high p + 1)
                const int step = 4 * second + i;
                uint32_t* to = into + step / 2 * 16 + 4 * t + step % 2 * 2;
                to[0] = byte_permute(low[pair], high[pair], 0x5410), to[1] = byte_permute(low[pair], high[pair], 0x7632);
            } else {  // step i: low p, p + 1; step i + 4: high
                into[i / 2 * 16 + 4 * t + i % 2 * 2 + second] = low[pair];
                into[(i + 4) / 2 * 16 + 4 * t + i % 2 * 2 + second] = high[pair];
            }
        }
    }
}

// First row of the weight in a warp's block of 16; gated: gate in the first block, up in the second.
__device__ int weight_row(const Gemv& call, int warp_n, int block, int row_block) {
    if (call.gated) return (row_block * call.warps_n + warp_n) * 16 + block * call.outputs;
    return (row_block * call.warps_n + warp_n) * kWarpRows + 16 * block;
}

// A block: its tiles of the inputs, its rows, into sums of its own in `reduced` [rows of the block][tokens].
template <int kBits, bool kHalf, int kColumns, bool kWhole, bool kAsym>
__device__ void accumulate(const Gemv& call, const Rows& rows, uint32_t* x, float* reduced, int rank, int row_block) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_n = warp % call.warps_n, warp_k = warp / call.warps_n, every = kWarps / call.warps_n;
    const int begin = call.k_tiles * rank / call.splits, end = call.k_tiles * (rank + 1) / call.splits;
    Grid grid = {};
    const uint8_t* words[2];
    int bit[2];  // from there to the plane of one bit
    const int64_t expert_rows = static_cast<int64_t>(rows.expert) * call.padded;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
        int row = weight_row(call, warp_n, block, row_block);
        if (row >= call.padded) row = 0;  // nothing there: what comes out is not written
        const int64_t at = expert_rows * call.groups + row + g;
        grid.scales[block] = static_cast<const uint8_t*>(call.scales) + at * sizeof(Scale);
        if (block == 0) grid.zeros = call.zeros + at;
        grid.apart = block == 0 ? -row : grid.apart + row;
        const uint8_t* const tile =
            call.words + ((expert_rows + row) / 64 * call.k_tiles + begin + warp_k) * Form<kBits>::tile_bytes;
        const int in_tile = row % 64 + g;
        words[block] = tile + (Form<kBits>::width == 4 ? in_tile * 64 + t * 16 : in_tile * 32 + t * 8);
        bit[block] = 2048 - in_tile * 16 - t * 4;
        keep(grid.scales[block]);
    }
    const int stride = call.chunk * kTileX + kPadX;
    uint32_t step_bytes = every * Form<kBits>::tile_bytes;
    keep(step_bytes);
    float sums[2][kColumns][4] = {};
    // Tiles are counted in places: place >> 20 is the group of a tile, or place itself the first of several groups.
    const uint32_t unit = call.place_of_tile, step = every * unit, behind = end * unit;
    const auto load = [&](uint32_t place, Tile<kBits>& tile) {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            fetch<kBits>(words[block], words[block] + bit[block], tile.row[2 * block], tile.row[2 * block + 1]);
            words[block] += step_bytes;
        }
        if (kWhole) load_grid<kAsym>(call, grid, place >> 20, tile.scale, tile.zero);
    };
    const uint32_t* mine[kColumns];
    const auto product = [&](uint32_t place, Tile<kBits>& tile) {
        multiply<kBits, kHalf, kColumns, kWhole, kAsym>(call, tile, mine, grid, place, sums);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) mine[column] += every * kTileX;
    };
    Tile<kBits> even, odd;
    uint32_t place = (begin + warp_k) * unit;
    if (place < behind) load(place, even);
    for (int first = begin; first < end; first += call.chunk) {
        const int last = min(first + call.chunk, end);
        if (first != begin) __syncthreads();
        stage<kBits, kWhole>(call, x, rows, first, last);
        __syncthreads();
#pragma unroll
        for (int column = 0; column < kColumns; ++column)
            mine[column] = x + min(g + 8 * column, rows.count - 1) * stride + 4 * t + warp_k * kTileX;
        // the next tile is under way while one is multiplied
        // Two at a time: no word changes its register. With zeros and 2 bits there are not enough of them.
        if (kColumns == 1 && kWhole && (kBits == 4 || (kBits == 2 && !kAsym))) {
            const int stop = min(last, end - every) - every;
            for (const uint32_t until = stop > 0 ? stop * unit : 0; place < until; place += step) {
                load(place + step, odd);
                product(place, even);
                place += step;
                load(place + step, even);
                product(place, odd);
            }
        }
        for (; place < last * unit; place += step) {
            if (place + step < behind) load(place + step, odd);
            product(place, even);
            even = odd;
        }
    }
    // each warp leaves [32 rows][8 kColumns tokens]; those that share rows are added in order
    float* own_part = reduced + warp * kWarpRows * 8 * kColumns;
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
        for (int column = 0; column < kColumns; ++column)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                own_part[(16 * block + g + c / 2 * 8) * 8 * kColumns + 8 * column + 2 * t + c % 2] =
                    sums[block][column][c];
    __syncthreads();
    const int size = call.warps_n * kWarpRows * 8 * kColumns;
    for (int item = threadIdx.x; item < size; item += kThreads) {
        float sum = reduced[item];
        for (int part = 1; part < every; ++part) sum += reduced[part * size + item];
        reduced[item] = sum;
    }
}

// The sum over the cluster of what stands at `item` of each block's sums.
__device__ float clustered(const Gemv& call, const float* item) {
    float sum = 0.f;
    for (int rank = 0; rank < call.splits; ++rank) sum += cluster_load(item, rank);
    return sum;
}

// Outputs of a row block, dealt out to the blocks of the cluster.
template <bool kHalf, int kColumns>
__device__ void finish(const Gemv& call, const Rows& rows, const float* reduced, int rank, int row_block) {
    const int lanes = call.gated ? 16 : kWarpRows, size = call.warps_n * lanes;
    for (int item = threadIdx.x + kThreads * rank; item < size * rows.count; item += kThreads * call.splits) {
        const int row = item % size, token = item / size, output = row_block * size + row;
        if (output >= call.outputs) continue;
        const float* place = reduced + ((row / lanes * kWarpRows) + row % lanes) * 8 * kColumns + token;
        float sum = clustered(call, place);
        if (call.gated) {
            const float up = clustered(call, place + 16 * 8 * kColumns);
            sum = sum / (1.f + expf(-sum)) * up;
        }
        if (call.bias) sum += value_of<kHalf>(call.bias[static_cast<int64_t>(rows.expert) * call.outputs + output]);
        call.out[static_cast<int64_t>(rows.first + token) * call.outputs + output] = bits_of<kHalf>(sum);
    }
}

// Floats of the sums that warps leave for each other.
template <int kColumns>
constexpr int kReduced = kWarps * kWarpRows * 8 * kColumns;

// Grid (splits, blocks of rows, tiles of tokens), clusters of splits. x, reduced and found are shared memory.
template <int kBits, bool kHalf, int kColumns, bool kWhole, bool kAsym>
__device__ void run(const Gemv& call, uint32_t* x, float* reduced, Rows* found) {
    const int most = 8 * kColumns, rank = blockIdx.x, row_block = blockIdx.y;
    // of experts every row may be the first of a tile
    const Rows rows = rows_at(call, call.offsets ? blockIdx.z : blockIdx.z * most, most, found);
    if (rows.count <= 0) return;  // so for every block of a cluster
    accumulate<kBits, kHalf, kColumns, kWhole, kAsym>(call, rows, x, reduced, rank, row_block);
    if (call.splits > 1)
        cluster_sync();
    else
        __syncthreads();
    finish<kHalf, kColumns>(call, rows, reduced, rank, row_block);
    if (call.splits > 1) cluster_sync();  // nobody leaves while others read
}

#ifdef __CUDACC__
// Blocks on a processor: two take 128 registers of each thread, which does where one thing at most needs more of them.
// On sm_100 8 bits in fp16 alone need more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kMore = 2;
#else
constexpr int kMore = 1;
#endif
template <int kBits, bool kHalf, int kColumns, bool kWhole, bool kAsym>
constexpr int kBlocks = (kBits == 3) + (kBits == 8) * (kHalf ? kMore : 1) + (kColumns == 2) + !kWhole + kAsym < 2 ? 2 : 1;

template <int kBits, bool kHalf, int kColumns, bool kWhole, bool kAsym>
__global__ void __launch_bounds__(kThreads, (kBlocks<kBits, kHalf, kColumns, kWhole, kAsym>)) gemv(const __grid_constant__ Gemv call) {
    extern __shared__ __align__(16) uint32_t x[];
    __shared__ float reduced[kReduced<kColumns>];
    __shared__ Rows found;
    run<kBits, kHalf, kColumns, kWhole, kAsym>(call, x, reduced, &found);
}

constexpr int kMostShared = 98304;  // bytes of x, so that two blocks fit on a processor of sm_90

extern "C" int sarqc_gemv_size() { return sizeof(Gemv); }

extern "C" const char* sarqc_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template <int kColumns>
static auto kernel_for(bool whole, bool asym) {
    constexpr bool kHalf = SARQC_HALF;
    return whole ? (asym ? gemv<SARQC_BITS, kHalf, kColumns, true, true> : gemv<SARQC_BITS, kHalf, kColumns, true, false>)
                 : (asym ? gemv<SARQC_BITS, kHalf, kColumns, false, true>
                         : gemv<SARQC_BITS, kHalf, kColumns, false, false>);
}

// 0 where a kernel of this library can run on the current device, which is then ready for launches; versions: of CUDA
// here, and the driver's latest.
extern "C" int sarqc_ready(int* versions) {
    cudaRuntimeGetVersion(versions);
    cudaDriverGetVersion(versions + 1);
    int device = 0, shared = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    for (int kind = 0; kind < 8 && !error; ++kind) {
        const auto kernel = kind & 4 ? kernel_for<2>(kind & 2, kind & 1) : kernel_for<1>(kind & 2, kind & 1);
        cudaFuncAttributes found;
        error = cudaFuncGetAttributes(&found, kernel);
        if (error) break;
        const int rest = shared - static_cast<int>(found.sharedSizeBytes);
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, min(kMostShared, rest));
    }
    return error;
}

// A launcher for ctypes: plain C, no torch. Returns 0 or a CUDA error and waits for nothing. columns: 1, 2 times eight
// tokens to a tile. blocks: of rows. tiles: of tokens.
extern "C" int sarqc_gemv(const Gemv* call, int columns, int blocks, int tiles, void* stream) {
    const bool whole = call->slices_per_group == kSteps, asym = call->zeros;
    const auto kernel = columns == 1 ? kernel_for<1>(whole, asym) : kernel_for<2>(whole, asym);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(call->splits, blocks, tiles);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = min(8 * columns, call->rows) * (call->chunk * kTileX + kPadX) * sizeof(uint32_t);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(call->splits), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = call->splits > 1;
    return cudaLaunchKernelEx(&config, kernel, *call);
}
#endif
