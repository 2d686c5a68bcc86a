// Grams on a CPU: sums of bf16 activations by AMX, and what is made of sums when they are read.
//
// out += left^T right in fp32, whole or on and below the diagonal. torch's bf16 product rounds its result to bf16, which a
// Gram does not bear, and its fp32 product is several times as slow.
//
// Rows are taken kDepth at a time and packed into tiles of 16 columns by 16 pairs of rows, one pair in 32 bits, which is
// what the tile registers multiply. A sum adds its rows in one order, however many parts the work is cut into.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "transpose.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SARQC_X86 1
#endif

namespace {

constexpr int kSide = 16;                // columns, and pairs of rows, of a tile
constexpr int kRows = 2 * kSide;         // rows of a tile
constexpr int kBlock = 2 * kSide;        // columns of a block of the result
constexpr int kTile = kSide * kSide;     // words of a tile
constexpr int64_t kDepth = 512;          // rows at once: 32 columns of them are in the L1 cache
enum Kind : int64_t { kPortable, kTiles };

struct Gram {
    const uint16_t* left;   // [rows][left_stride], `height` columns
    const uint16_t* right;  // [rows][right_stride], `width` columns
    float* out;             // [height][out_stride]
    float* abs_sum;         // [height], gains the sums of |left|; null for none
    int64_t rows, height, width, left_stride, right_stride, out_stride, lower, kind;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Words of two numbers each, of 16 columns. What is read and written lie apart, which a compiler cannot know.
inline void interleave(uint32_t* __restrict to, const uint16_t* __restrict even, const uint16_t* __restrict odd) {
    for (int at = 0; at < kSide; ++at) to[at] = even[at] | static_cast<uint32_t>(odd[at]) << 16;
}

// Tile [pair of rows][column] of up to 32 rows and 16 columns; zeros beyond them.
void pack(uint32_t* tile, const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, float* abs_sum) {
    if (rows < kRows || columns < kSide) std::memset(tile, 0, kTile * sizeof *tile);
    for (int64_t pair = 0; 2 * pair < rows; ++pair) {
        const uint16_t* even = from + 2 * pair * stride;
        uint32_t* to = tile + pair * kSide;
        if (columns == kSide && 2 * pair + 1 < rows) {
            interleave(to, even, even + stride);
        } else {
            for (int at = 0; at < columns; ++at) {
                to[at] = even[at];
                if (2 * pair + 1 < rows) to[at] |= static_cast<uint32_t>(even[stride + at]) << 16;
            }
        }
    }
    if (!abs_sum) return;
    float sum[kSide] = {};
    for (int pair = 0; pair < kSide; ++pair)
        for (int at = 0; at < kSide; ++at) {
            const uint32_t word = tile[pair * kSide + at];
            sum[at] += as_float(word << 16 & 0x7fffffff) + as_float(word & 0x7fff0000);
        }
    for (int at = 0; at < columns; ++at) abs_sum[at] += sum[at];
}

// A block of 32 x 32 sums gains the products of `tiles` tiles of two stripes of columns each: left ones [column][pair],
// right ones [pair][column].
using Block = void (*)(float* out, int64_t stride, const uint32_t* left, const uint32_t* right, int64_t tiles);

void block_portable(float* out, int64_t stride, const uint32_t* left, const uint32_t* right, int64_t tiles) {
    for (int row = 0; row < kBlock; ++row)
        for (int at = 0; at < kBlock; ++at) {
            float sum = out[row * stride + at];
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const uint32_t* one = left + (row / kSide * tiles + tile) * kTile + row % kSide * kSide;
                const uint32_t* other = right + (at / kSide * tiles + tile) * kTile + at % kSide;
                for (int pair = 0; pair < kSide; ++pair) {
                    const uint32_t a = one[pair], b = other[pair * kSide];
                    sum = std::fma(as_float(a << 16), as_float(b << 16), sum);
                    sum = std::fma(as_float(a & 0xffff0000), as_float(b & 0xffff0000), sum);
                }
            }
            out[row * stride + at] = sum;
        }
}

#ifdef SARQC_X86
// The block to the right comes next. Its rows lie pages apart, where a processor does not look ahead by itself.
inline void fetch_next(const float* out, int64_t stride, int64_t tile, int64_t tiles) {
    for (int64_t row = tile * kBlock / tiles; row < (tile + 1) * kBlock / tiles; ++row) {
        __builtin_prefetch(out + row * stride + kBlock, 1);
        __builtin_prefetch(out + row * stride + kBlock + kSide, 1);
    }
}

__attribute__((target("amx-tile,amx-bf16"))) void block_tiles(
    float* out, int64_t stride, const uint32_t* left, const uint32_t* right, int64_t tiles) {
    const int64_t bytes = stride * sizeof(float), row = kSide * sizeof(uint32_t);
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + kSide, bytes);
    _tile_loadd(2, out + kSide * stride, bytes);
    _tile_loadd(3, out + kSide * stride + kSide, bytes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        fetch_next(out, stride, tile, tiles);
        _tile_loadd(4, left + tile * kTile, row);
        _tile_loadd(5, left + (tiles + tile) * kTile, row);
        _tile_loadd(6, right + tile * kTile, row);
        _tile_loadd(7, right + (tiles + tile) * kTile, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + kSide, bytes);
    _tile_stored(2, out + kSide * stride, bytes);
    _tile_stored(3, out + kSide * stride + kSide, bytes);
}

struct alignas(64) TileConfig {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

__attribute__((target("amx-tile"))) void configure(TileConfig& before) {
    TileConfig own = {};
    own.palette = 1;
    for (int tile = 0; tile < 8; ++tile) own.bytes[tile] = 64, own.rows[tile] = kSide;
    asm volatile("" ::"r"(&own), "r"(&before) : "memory");  // compilers see 8 of the 64 bytes used
    _tile_storeconfig(&before);  // another library's, put back afterwards
    _tile_loadconfig(&own);
    asm volatile("" ::"r"(&before) : "memory");
}

__attribute__((target("amx-tile"))) void restore(const TileConfig& before) {
    if (before.palette) {
        _tile_loadconfig(&before);
    } else {
        _tile_release();
    }
}
#endif

// Packs what it needs and fills block row after block row; those of a triangle are dealt so that parts are about equal.
void fill(const Gram& call, Block block, int64_t part, int64_t parts) {
    const int64_t down = (call.height + kBlock - 1) / kBlock, across = (call.width + kBlock - 1) / kBlock;
    std::vector<int64_t> own;
    for (int64_t at = 0; at < down; ++at) {
        const int64_t turn = at % (2 * parts);
        if (std::min(turn, 2 * parts - 1 - turn) == part) own.push_back(at);
    }
    if (own.empty()) return;
    const int64_t wide = call.lower ? std::min(own.back() + 1, across) : across;
    const int64_t most = (std::min(call.rows, kDepth) + kRows - 1) / kRows;
    const std::unique_ptr<uint32_t[]> right(new uint32_t[wide * 2 * most * kTile]), left(new uint32_t[2 * most * kTile]);
    alignas(64) float edge[kBlock * kBlock];
    alignas(64) uint32_t turned[kTile];
    for (int64_t begin = 0; begin < call.rows; begin += kDepth) {
        const int64_t rows = std::min(kDepth, call.rows - begin), tiles = (rows + kRows - 1) / kRows;
        for (int64_t stripe = 0; stripe < 2 * wide; ++stripe)
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = std::min(stripe * kSide, call.width);
                pack(&right[(stripe * tiles + tile) * kTile],
                     call.right + (begin + tile * kRows) * call.right_stride + first, call.right_stride,
                     std::min<int64_t>(kRows, rows - tile * kRows), std::min<int64_t>(kSide, call.width - first), nullptr);
            }
        for (const int64_t at : own) {
            for (int64_t half = 0; half < 2; ++half)
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t first = std::min(at * kBlock + half * kSide, call.height);
                    pack(turned, call.left + (begin + tile * kRows) * call.left_stride + first, call.left_stride,
                         std::min<int64_t>(kRows, rows - tile * kRows), std::min<int64_t>(kSide, call.height - first),
                         call.abs_sum ? call.abs_sum + first : nullptr);
                    transpose(&left[(half * tiles + tile) * kTile], kSide, turned, kSide);
                }
            const int64_t height = std::min<int64_t>(kBlock, call.height - at * kBlock);
            for (int64_t to = 0; to < (call.lower ? std::min(at + 1, across) : across); ++to) {
                const int64_t width = std::min<int64_t>(kBlock, call.width - to * kBlock);
                float* out = call.out + at * kBlock * call.out_stride + to * kBlock;
                const uint32_t* panel = &right[to * 2 * tiles * kTile];
                if (height == kBlock && width == kBlock) {
                    block(out, call.out_stride, left.get(), panel, tiles);
                    continue;
                }
                std::memset(edge, 0, sizeof edge);
                for (int64_t row = 0; row < height; ++row)
                    std::memcpy(edge + row * kBlock, out + row * call.out_stride, width * sizeof(float));
                block(edge, kBlock, left.get(), panel, tiles);
                for (int64_t row = 0; row < height; ++row)
                    std::memcpy(out + row * call.out_stride, edge + row * kBlock, width * sizeof(float));
            }
        }
    }
}

// The mean of each matrix, made symmetric by what is on and below its diagonal.
struct Mean {
    const float* sum;      // [E, K, K]
    const float* divisor;  // [E]
    float* out;            // [E, K, K]
    int64_t experts, size;
};

// A block on or below the diagonal, with its mirror image: both stay in the cache.
void mirror_block(const Mean& call, int64_t expert, int64_t row, int64_t column) {
    const int64_t size = call.size, down = std::min<int64_t>(kBlock, size - row);
    const float* from = call.sum + (expert * size + row) * size + column;
    float* to = call.out + (expert * size + row) * size + column;
    float* mirrored = call.out + (expert * size + column) * size + row;
    const float divisor = call.divisor[expert];
    for (int64_t i = 0; i < down; ++i) {
        const int64_t across = row == column ? i + 1 : kBlock;
        for (int64_t j = 0; j < across; ++j) to[i * size + j] = from[i * size + j] / divisor;
    }
    if (row == column || down < kBlock) {
        for (int64_t i = 0; i < down; ++i)
            for (int64_t j = 0; j < (row == column ? i : kBlock); ++j) mirrored[j * size + i] = to[i * size + j];
        return;
    }
    for (int64_t i = 0; i < kBlock; i += kSide)
        for (int64_t j = 0; j < kBlock; j += kSide) transpose(mirrored + j * size + i, size, to + i * size + j, size);
}

}  // namespace

extern "C" {

int64_t sarqc_mean_size() { return sizeof(Mean); }

void sarqc_mean(const Mean* call, int64_t part, int64_t parts) {
    const int64_t blocks = (call->size + kBlock - 1) / kBlock;
    for (int64_t at = part; at < call->experts * blocks; at += parts)
        for (int64_t column = 0; column <= at % blocks; ++column)
            mirror_block(*call, at / blocks, at % blocks * kBlock, column * kBlock);
}

int64_t sarqc_gram_size() { return sizeof(Gram); }

// Whether this processor and its system have tile registers for bf16.
int64_t sarqc_gram_kind() {
#ifdef SARQC_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    // Linux lets a process use the registers that wants to: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    if (tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return kTiles;
#endif
    return kPortable;
}

void sarqc_gram(const Gram* call, int64_t part, int64_t parts) {
#ifdef SARQC_X86
    if (call->kind == kTiles) {
        TileConfig before = {};
        configure(before);
        fill(*call, block_tiles, part, parts);
        restore(before);
        return;
    }
#endif
    fill(*call, block_portable, part, parts);
}

}  // extern "C"
