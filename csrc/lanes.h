// Tiles of rows on a CPU, for csrc/columns_cpu.cpp and csrc/descent_cpu.cpp.
//
// Rows of a weight are independent. A tile has kLanes of them side by side ([column][row]), so the compiler turns loops
// over lanes into vector instructions, and all that a tile needs stays in a core's own cache.
//
// Compile with -ffp-contract=off: what is fused is spelled.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 64;   // rows at once: a multiple of every vector width
constexpr int kMicro = 16;   // columns of a micro-panel

using Lanes = float[kLanes];

template <typename F>
inline void each(F&& f) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
}

// NaN passes, as it does through torch.clamp
inline float clamped(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

inline void load(Lanes& to, const float* from, int rows, float fill) {
    std::memcpy(to, from, rows * sizeof(float));
    for (int lane = rows; lane < kLanes; ++lane) to[lane] = fill;
}

inline void store(float* to, const Lanes& from, int rows) { std::memcpy(to, from, rows * sizeof(float)); }

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// To nearest, ties to even, at `cut` bits less of mantissa. The value is normal in the narrow type, or NaN.
inline float shortened(float value, uint32_t cut) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + (1u << (cut - 1)) - 1 + ((bits >> cut) & 1)) & ~((1u << cut) - 1);
    return value == value ? as_float(rounded) : value;
}

// A scale as its dtype holds it, whatever its size: with subnormal numbers, and Inf beyond the largest.
inline float stored(float value, uint32_t cut) {
    const float size = std::fabs(value);
    float kept = cut ? shortened(size, cut) : size;
    if (cut == 13) {  // fp16: below 2^-14 in steps of 2^-24, which is the last place of numbers around 1/2
        kept = size < 6.103515625e-5f ? (size + 0.5f) - 0.5f : kept;
        kept = kept > 65504.f ? INFINITY : kept;
    }
    return value < 0.f ? -kept : kept;
}

// The widest vector that this is compiled for.
#if defined(__AVX512F__)
struct Vector {
    static constexpr int kWidth = 16, kTogether = 4, kTile = 6;  // vectors at once, times columns that share them
    __m512 value;
    static Vector of(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Vector all(float number) { return {_mm512_set1_ps(number)}; }
    void to(float* place) const { _mm512_storeu_ps(place, value); }
    void add(Vector a, Vector b) { value = _mm512_fmadd_ps(a.value, b.value, value); }
    Vector plus(Vector other) const { return {_mm512_add_ps(value, other.value)}; }
    Vector less(Vector other) const { return {_mm512_sub_ps(value, other.value)}; }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Vector {
    static constexpr int kWidth = 8, kTogether = 2, kTile = 6;
    __m256 value;
    static Vector of(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Vector all(float number) { return {_mm256_set1_ps(number)}; }
    void to(float* place) const { _mm256_storeu_ps(place, value); }
    void add(Vector a, Vector b) { value = _mm256_fmadd_ps(a.value, b.value, value); }
    Vector plus(Vector other) const { return {_mm256_add_ps(value, other.value)}; }
    Vector less(Vector other) const { return {_mm256_sub_ps(value, other.value)}; }
};
#else
struct Vector {
    static constexpr int kWidth = 1, kTogether = 8, kTile = 4;
    float value;
    static Vector of(const float* from) { return {*from}; }
    static Vector all(float number) { return {number}; }
    void to(float* place) const { *place = value; }
    void add(Vector a, Vector b) { value = std::fma(a.value, b.value, value); }
    Vector plus(Vector other) const { return {value + other.value}; }
    Vector less(Vector other) const { return {value - other.value}; }
};
#endif

constexpr int kBlock = Vector::kTile * (24 / Vector::kTile);  // columns whose coefficients are packed together
constexpr int kDepth = 64;                                   // the most terms of one product
constexpr int kAhead = kDepth * Vector::kTile * Vector::kTogether * Vector::kWidth / (kBlock * kLanes);

// out[c] += the sum over i < depth of matrix[i * stride + c] x[i], or -= it, for `count` columns c; the sum is made one
// fused step after another from zero. Rows of a large matrix are pages apart, so the next block is fetched ahead.
template <bool minus>
inline void product(const float* matrix, int64_t stride, int depth, const Lanes* x, int64_t count, Lanes* out) {
    float packed[kDepth][kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
        const int block = static_cast<int>(count - first < kBlock ? count - first : kBlock);
        for (int i = 0; i < depth; ++i) {
            const float* line = matrix + i * stride + first;
            if (block == kBlock) {
                std::memcpy(packed[i], line, sizeof packed[i]);
            } else {
                for (int c = 0; c < kBlock; ++c) packed[i][c] = c < block ? line[c] : 0.f;
            }
        }
        int fetched = 0;  // rows of the next block, a few between any two sums
        for (int tile = 0; tile < block; tile += Vector::kTile) {
            const int columns = block - tile < Vector::kTile ? block - tile : Vector::kTile;
            for (int lane = 0; lane < kLanes; lane += Vector::kTogether * Vector::kWidth) {
                for (const int end = fetched + kAhead; fetched < end && fetched < depth; ++fetched) {
                    __builtin_prefetch(matrix + fetched * stride + first + kBlock);
                    __builtin_prefetch(matrix + fetched * stride + first + 2 * kBlock - 1);
                }
                Vector sum[Vector::kTile][Vector::kTogether];
                for (auto& row : sum)
                    for (auto& each_of : row) each_of = Vector::all(0.f);
                for (int i = 0; i < depth; ++i) {
                    Vector value[Vector::kTogether];
                    for (int v = 0; v < Vector::kTogether; ++v) value[v] = Vector::of(x[i] + lane + v * Vector::kWidth);
                    for (int c = 0; c < Vector::kTile; ++c) {
                        const Vector factor = Vector::all(packed[i][tile + c]);
                        for (int v = 0; v < Vector::kTogether; ++v) sum[c][v].add(factor, value[v]);
                    }
                }
                float* place = out[first + tile] + lane;
                const auto take = [&](int c) {
                    for (int v = 0; v < Vector::kTogether; ++v) {
                        float* at = place + c * kLanes + v * Vector::kWidth;
                        (minus ? Vector::of(at).less(sum[c][v]) : Vector::of(at).plus(sum[c][v])).to(at);
                    }
                };
                if (columns == Vector::kTile) {  // a bound that is known keeps the sums in registers
                    for (int c = 0; c < Vector::kTile; ++c) take(c);
                } else {
                    for (int c = 0; c < columns; ++c) take(c);
                }
            }
        }
    }
}

// Sums in torch.sum's order over an outer axis: runs of 16 first, those added in runs of 16, and so on, four levels.
struct Cascade {
    Lanes level[4] = {};
    int64_t count = 0;

    inline void add(const Lanes& value) {
        each([&](int lane) { level[0][lane] += value[lane]; });
        ++count;
        for (int at = 1; at < 4 && count % (int64_t{1} << 4 * at) == 0; ++at) {
            each([&](int lane) {
                level[at][lane] += level[at - 1][lane];
                level[at - 1][lane] = 0.f;
            });
        }
    }

    inline void total(Lanes& out) const {
        each([&](int lane) { out[lane] = level[0][lane] + level[1][lane] + level[2][lane] + level[3][lane]; });
    }
};

// Memory of a tile, dealt out in pieces.
class Pieces {
   public:
    explicit Pieces(int64_t lanes) : memory_(static_cast<size_t>(lanes) * kLanes) {}
    Lanes* next(int64_t count) {
        Lanes* own = reinterpret_cast<Lanes*>(memory_.data()) + taken_;
        taken_ += count;
        return own;
    }

   private:
    std::vector<float> memory_;
    int64_t taken_ = 0;
};

// work(expert, row, rows) for each parts-th tile of at most kLanes rows of an expert.
template <typename F>
void each_tile(int64_t experts, int64_t all, int64_t part, int64_t parts, F&& work) {
    const int64_t tiles = (all + kLanes - 1) / kLanes;
    for (int64_t at = part; at < tiles * experts; at += parts) {
        const int64_t row = at % tiles * kLanes, left = all - row;
        work(at / tiles, row, static_cast<int>(left < kLanes ? left : kLanes));
    }
}

// A tile across: to[c] has column order[c], or c, of `rows` rows that lie `stride` apart, and `fill` in other lanes.
template <typename T>
void take_across(const T* from, int64_t stride, int rows, int64_t columns, const int64_t* order, float fill,
                 Lanes* to) {
    for (int64_t first = 0; first < columns; first += kMicro) {  // a few columns of all rows stay in the first cache
        const int64_t last = first + kMicro < columns ? first + kMicro : columns;
        for (int lane = 0; lane < rows; ++lane)
            for (int64_t c = first; c < last; ++c)
                to[c][lane] = static_cast<float>(from[lane * stride + (order ? order[c] : c)]);
        for (int64_t c = first; c < last; ++c)
            for (int lane = rows; lane < kLanes; ++lane) to[c][lane] = fill;
    }
}

// The way back, as `T`.
template <typename T>
void give_across(const Lanes* from, int64_t stride, int rows, int64_t columns, const int64_t* order, T* to) {
    for (int64_t first = 0; first < columns; first += kMicro) {
        const int64_t last = first + kMicro < columns ? first + kMicro : columns;
        for (int lane = 0; lane < rows; ++lane)
            for (int64_t c = first; c < last; ++c)
                to[lane * stride + (order ? order[c] : c)] = static_cast<T>(from[c][lane]);
    }
}

}  // namespace
