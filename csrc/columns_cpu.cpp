// Column quantization on a CPU: the parts of sarqc_kernels/columns/reference.py that torch does with thousands of small
// calls, in one call for a stretch of columns. Codes, scales and zeros equal the reference's bit for bit.
//
// Rows are independent and lie side by side in memory ([column][expert][row]), so everything works on kLanes rows at
// once, and the compiler turns the loops over lanes into vector instructions. The order of every sum is the
// reference's: a column takes the columns of its micro-panel one by one, each with one fused multiply-add (what torch's
// addcmul_ compiles to), then the sum of a whole micro-panel before it at once (a product of depth 16, which BLAS adds
// in order). Losses are added in torch.sum's order, see `Cascade`. sarqc_kernels/columns/cpu_impl.py compares with torch
// once, on the machine it runs on, and leaves the work to the reference where a bit differs.
//
// Compile with -ffp-contract=off: what is fused is spelled.

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
constexpr int kPanel = 128;  // the most columns of a panel

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

}  // namespace

// Columns begin .. end - 1 of a panel first .. last - 1; cpu_impl.py has the same fields in the same order.
struct Stretch {
    const float* weight;      // [K, E, N], as all of these
    float* delta;             // [K, E, N]
    uint8_t* codes;           // [K, E, N]
    float* pull;              // [last - first, E, N]: what the columns before `begin` ask of the panel's
    const float* inside;      // [E, last - first, last - first]: M' between the panel's columns
    const float* scales;      // [G, E, N]
    const float* zeros;       // [G, E, N]
    const int64_t* group_of;  // [E, K]
    int64_t experts, rows, columns, first, begin, end, last;
    int64_t group;            // of all these columns, or -1: as group_of says
    float top;
};

namespace {

void quantize_rows(const Stretch& call, int64_t expert, int64_t row, int rows) {
    const int64_t line = call.experts * call.rows, own = expert * call.rows + row, width = call.last - call.first;
    const float* inside = call.inside + expert * width * width;
    Lanes pull[kPanel], delta[kMicro], value, level, scale, zero;
    for (int64_t j = call.begin; j < call.last; ++j)
        load(pull[j - call.first], call.pull + (j - call.first) * line + own, rows, 0.f);
    for (int64_t start = call.begin; start < call.end; start += kMicro) {
        const int64_t stop = start + kMicro < call.end ? start + kMicro : call.end;
        const int depth = static_cast<int>(stop - start);
        for (int k = 0; k < depth; ++k) {
            const int64_t j = start + k, at = j * line + own;
            const int64_t group = call.group < 0 ? call.group_of[expert * call.columns + j] : call.group;
            load(value, call.weight + at, rows, 0.f);
            load(scale, call.scales + group * line + own, rows, 1.f);
            load(zero, call.zeros + group * line + own, rows, 0.f);
            const Lanes& asked = pull[j - call.first];
            each([&](int lane) {
                const float steps = std::rint((value[lane] + asked[lane]) / scale[lane]);
                level[lane] = clamped(steps, -zero[lane], call.top - zero[lane]);
                const float nearest = level[lane] * scale[lane];
                delta[k][lane] = value[lane] - nearest;
                level[lane] += zero[lane];
            });
            store(call.delta + at, delta[k], rows);
            for (int lane = 0; lane < rows; ++lane) call.codes[at + lane] = static_cast<uint8_t>(level[lane]);
            const float* weights = inside + (j - call.first) * width;
            for (int64_t next = j + 1; next < stop; ++next) {
                Lanes& later = pull[next - call.first];
                const float factor = weights[next - call.first];
                each([&](int lane) { later[lane] = std::fma(factor, delta[k][lane], later[lane]); });
            }
        }
        const int64_t done = stop - call.first;
        product<false>(inside + (start - call.first) * width + done, width, depth, delta, call.last - stop, pull + done);
    }
    for (int64_t j = call.end; j < call.last; ++j)
        store(call.pull + (j - call.first) * line + own, pull[j - call.first], rows);
}

}  // namespace

// Groups [members, blocks, rows] that get a grid each; cpu_impl.py has the same fields in the same order.
struct Fit {
    const float* groups;      // [g, B, N]
    const float* importance;  // [g, B], or null for all ones
    const float* table;       // [trials, 2]: multiple of the span that gives the scale, and minus the factor
    float* scales;            // [B, N]
    float* zeros;             // [B, N]
    int64_t members, blocks, rows, trials;  // trials 1: no search
    int64_t sym, cut;                       // cut: bits of mantissa that a stored scale has less than fp32
    float top, middle, tiny, most;
};

namespace {

void grid_of(const Fit& call, const Lanes& span, const Lanes& low, const float* pair, Lanes& scale, Lanes& zero) {
    each([&](int lane) {
        const float wanted = span[lane] * pair[0];
        float size = clamped(std::fabs(wanted), call.tiny, call.most);
        size = call.cut ? shortened(size, static_cast<uint32_t>(call.cut)) : size;
        scale[lane] = wanted < 0.f ? -size : size;
    });
    if (call.sym) {
        each([&](int lane) { zero[lane] = call.middle; });
    } else {
        each([&](int lane) { zero[lane] = clamped(std::rint(low[lane] * pair[1] / scale[lane]), 0.f, call.top); });
    }
}

void loss_of(const Fit& call, const Lanes* group, int64_t block, const Lanes& scale, const Lanes& zero, Lanes& loss) {
    Lanes per_scale, term;
    each([&](int lane) { per_scale[lane] = 1.f / scale[lane]; });
    Cascade sum;
    for (int64_t j = 0; j < call.members; ++j) {
        const float count = call.importance ? call.importance[j * call.blocks + block] : 1.f;
        each([&](int lane) {
            const float steps = group[j][lane] * per_scale[lane];
            const float error = clamped(std::rint(steps), -zero[lane], call.top - zero[lane]) - steps;
            term[lane] = error * count * error;
        });
        sum.add(term);
    }
    sum.total(loss);
    each([&](int lane) { loss[lane] = loss[lane] * scale[lane] * scale[lane]; });
}

void fit_rows(const Fit& call, Lanes* group, int64_t block, int64_t row, int rows) {
    Lanes low, high, span, scale, zero, trial, trial_zero, loss, least;
    each([&](int lane) { low[lane] = INFINITY, high[lane] = -INFINITY; });
    for (int64_t j = 0; j < call.members; ++j) {
        load(group[j], call.groups + (j * call.blocks + block) * call.rows + row, rows, 0.f);
        each([&](int lane) {
            const float value = group[j][lane];
            low[lane] = value < low[lane] || value != value ? value : low[lane];
            high[lane] = value > high[lane] || value != value ? value : high[lane];
        });
    }
    if (call.sym) {
        each([&](int lane) { span[lane] = -low[lane] > high[lane] ? -low[lane] : high[lane]; });
    } else {
        each([&](int lane) {
            low[lane] = low[lane] > 0.f ? 0.f : low[lane];
            span[lane] = (high[lane] < 0.f ? 0.f : high[lane]) - low[lane];
        });
    }
    grid_of(call, span, low, call.table, scale, zero);
    if (call.trials > 1) {
        loss_of(call, group, block, scale, zero, least);
        if (call.sym) each([&](int lane) { span[lane] = high[lane] > -low[lane] ? -span[lane] : span[lane]; });
        for (int64_t at = 1; at < call.trials; ++at) {
            grid_of(call, span, low, call.table + 2 * at, trial, trial_zero);
            loss_of(call, group, block, trial, trial_zero, loss);
            each([&](int lane) {
                const bool better = loss[lane] < least[lane];
                least[lane] = better ? loss[lane] : least[lane];
                scale[lane] = better ? trial[lane] : scale[lane];
                zero[lane] = better ? trial_zero[lane] : zero[lane];
            });
        }
    }
    store(call.scales + block * call.rows + row, scale, rows);
    store(call.zeros + block * call.rows + row, zero, rows);
}

}  // namespace

// Coordinate descent: sarqc_kernels/columns/descent_reference.py says what and why, step by step the same.
// cpu_impl.py has the same fields in the same order.
struct Descent {
    const float* weight;    // [E, N, K]
    uint8_t* codes;         // [E, N, K], in and out
    float* scales;          // [E, N, G], in and out
    const uint8_t* zeros;   // [E, N, G]
    const float* hessian;   // [E, K, K]
    const uint8_t* usable;  // [E]
    int64_t experts, rows, columns, groups, passes, cut;
    float top, reach;
};

namespace {

// What a tile of rows works in: two of [K], four of [g] and two of [G].
struct Buffers {
    Lanes *gradient, *levels, *before, *found, *rest, *curved, *scales, *zeros;
};

// A tile across: to[c] has column c of `rows` rows that lie `stride` apart, and `fill` in the lanes behind them.
template <typename T>
void take_across(const T* from, int64_t stride, int rows, int64_t columns, float fill, Lanes* to) {
    for (int64_t first = 0; first < columns; first += kMicro) {  // a few columns of all rows stay in the first cache
        const int64_t last = first + kMicro < columns ? first + kMicro : columns;
        for (int lane = 0; lane < rows; ++lane)
            for (int64_t c = first; c < last; ++c) to[c][lane] = static_cast<float>(from[lane * stride + c]);
        for (int64_t c = first; c < last; ++c)
            for (int lane = rows; lane < kLanes; ++lane) to[c][lane] = fill;
    }
}

void better_codes(const Descent& call, const float* square, int size, const Lanes& scale, const Lanes& zero,
                  const Buffers& own) {
    Lanes delta[kMicro];
    for (int start = 0; start < size; start += kMicro) {
        const int stop = start + kMicro < size ? start + kMicro : size, depth = stop - start;
        for (int j = start; j < stop; ++j) {
            const float* line = square + j * call.columns;
            Lanes& error = delta[j - start];
            each([&](int lane) {
                const float wanted = own.before[j][lane] + own.rest[j][lane] / line[j];
                const float level = clamped(std::rint(wanted / scale[lane]), -zero[lane], call.top - zero[lane]);
                own.found[j][lane] = level;
                error[lane] = own.before[j][lane] - level * scale[lane];
            });
            for (int i = start; i < stop; ++i)
                each([&](int lane) { own.rest[i][lane] = std::fma(line[i], error[lane], own.rest[i][lane]); });
        }
        const float* lines = square + start * call.columns;
        product<false>(lines, call.columns, depth, delta, start, own.rest);
        product<false>(lines + stop, call.columns, depth, delta, size - stop, own.rest + stop);
    }
}

// The new scale of a group and whether a row takes it; `before` becomes the change of the weights.
void better_scale(const Descent& call, int size, const Lanes* gradient, const Buffers& own, const Lanes& old,
                  Lanes& scale, Lanes& better) {
    Cascade above, below, saved;
    Lanes term, over, under;
    for (int j = 0; j < size; ++j) {
        each([&](int lane) { term[lane] = own.found[j][lane] * own.rest[j][lane]; });
        above.add(term);
        each([&](int lane) { term[lane] = own.found[j][lane] * own.curved[j][lane]; });
        below.add(term);
    }
    above.total(over);
    below.total(under);
    each([&](int lane) {
        const float wanted = stored(old[lane] + over[lane] / under[lane], static_cast<uint32_t>(call.cut));
        const float growth = wanted / old[lane];
        scale[lane] = growth > 1.f / call.reach && growth < call.reach ? wanted : old[lane];
    });
    for (int j = 0; j < size; ++j) {
        each([&](int lane) {
            const float change = own.found[j][lane] * scale[lane] - own.before[j][lane];
            const float bend = (scale[lane] - old[lane]) * own.curved[j][lane];
            own.before[j][lane] = change;
            term[lane] = change * (gradient[j][lane] + own.rest[j][lane] - bend);
        });
        saved.add(term);
    }
    saved.total(better);
}

void improve_group(const Descent& call, const float* hessian, int64_t group, bool last, const Buffers& own) {
    const int size = static_cast<int>(call.columns / call.groups);
    const int64_t first = group * size, columns = call.columns;
    const float* square = hessian + first * columns + first;
    const Lanes& zero = own.zeros[group];
    Lanes old, scale, better;
    std::memcpy(old, own.scales[group], sizeof old);
    for (int j = 0; j < size; ++j) {
        each([&](int lane) {
            own.before[j][lane] = own.levels[first + j][lane] * old[lane];
            own.rest[j][lane] = own.gradient[first + j][lane];
            own.curved[j][lane] = 0.f;
        });
    }
    better_codes(call, square, size, old, zero, own);
    for (int begin = 0; begin < size; begin += kDepth) {
        const int depth = size - begin < kDepth ? size - begin : kDepth;
        product<false>(square + begin * columns, columns, depth, own.found + begin, size, own.curved);
    }
    better_scale(call, size, own.gradient + first, own, old, scale, better);
    each([&](int lane) { own.scales[group][lane] = better[lane] > 0.f ? scale[lane] : old[lane]; });
    for (int j = 0; j < size; ++j) {
        each([&](int lane) {
            const bool takes = better[lane] > 0.f;
            own.levels[first + j][lane] = takes ? own.found[j][lane] : own.levels[first + j][lane];
            own.before[j][lane] = takes ? own.before[j][lane] : 0.f;
        });
    }
    const int64_t from = last ? first + size : 0;  // in the last pass nobody reads what lies before
    for (int begin = 0; begin < size; begin += kDepth) {
        const int depth = size - begin < kDepth ? size - begin : kDepth;
        product<true>(hessian + (first + begin) * columns + from, columns, depth, own.before + begin, columns - from,
                      own.gradient + from);
    }
}

void descend_rows(const Descent& call, int64_t expert, int64_t row, int rows, const Buffers& own) {
    const int64_t columns = call.columns, size = columns / call.groups, at = expert * call.rows + row;
    const float* hessian = call.hessian + expert * columns * columns;
    uint8_t* codes = call.codes + at * columns;
    float* scales = call.scales + at * call.groups;
    take_across(scales, call.groups, rows, call.groups, 1.f, own.scales);
    take_across(call.zeros + at * call.groups, call.groups, rows, call.groups, 0.f, own.zeros);
    const auto take_levels = [&] {
        take_across(codes, columns, rows, columns, 0.f, own.levels);
        for (int64_t j = 0; j < columns; ++j)
            each([&](int lane) { own.levels[j][lane] -= own.zeros[j / size][lane]; });
    };
    take_levels();
    take_across(call.weight + at * columns, columns, rows, columns, 0.f, own.gradient);
    for (int64_t j = 0; j < columns; ++j)  // the error takes the levels' place until the gradient is made of it
        each([&](int lane) {
            const float nearest = own.levels[j][lane] * own.scales[j / size][lane];
            own.levels[j][lane] = own.gradient[j][lane] - nearest;
        });
    std::memset(own.gradient, 0, columns * sizeof(Lanes));
    for (int64_t begin = 0; begin < columns; begin += kDepth) {
        const int depth = static_cast<int>(columns - begin < kDepth ? columns - begin : kDepth);
        product<false>(hessian + begin * columns, columns, depth, own.levels + begin, columns, own.gradient);
    }
    take_levels();
    for (int64_t pass = 0; pass < call.passes; ++pass)
        for (int64_t group = 0; group < call.groups; ++group)
            improve_group(call, hessian, group, pass + 1 == call.passes, own);
    for (int64_t first = 0; first < columns; first += kMicro) {
        const int64_t last = first + kMicro < columns ? first + kMicro : columns;
        for (int lane = 0; lane < rows; ++lane)
            for (int64_t c = first; c < last; ++c)
                codes[lane * columns + c] = static_cast<uint8_t>(own.levels[c][lane] + own.zeros[c / size][lane]);
    }
    for (int64_t group = 0; group < call.groups; ++group)
        for (int lane = 0; lane < rows; ++lane) scales[lane * call.groups + group] = own.scales[group][lane];
}

}  // namespace

// For ctypes: plain C. Blocks of kLanes rows are independent; `part` of `parts` takes each parts-th of them.
extern "C" int64_t sarqc_stretch_size() { return sizeof(Stretch); }
extern "C" int64_t sarqc_fit_size() { return sizeof(Fit); }
extern "C" int64_t sarqc_descent_size() { return sizeof(Descent); }

extern "C" void sarqc_stretch(const Stretch* call, int64_t part, int64_t parts) {
    const int64_t tiles = (call->rows + kLanes - 1) / kLanes;
    for (int64_t at = part; at < tiles * call->experts; at += parts) {
        const int64_t row = at % tiles * kLanes, left = call->rows - row;
        quantize_rows(*call, at / tiles, row, static_cast<int>(left < kLanes ? left : kLanes));
    }
}

extern "C" void sarqc_fit(const Fit* call, int64_t part, int64_t parts) {
    std::vector<float> memory(static_cast<size_t>(call->members) * kLanes);
    const int64_t tiles = (call->rows + kLanes - 1) / kLanes;
    for (int64_t at = part; at < tiles * call->blocks; at += parts) {
        const int64_t row = at % tiles * kLanes, left = call->rows - row;
        fit_rows(*call, reinterpret_cast<Lanes*>(memory.data()), at / tiles, row,
                 static_cast<int>(left < kLanes ? left : kLanes));
    }
}

extern "C" void sarqc_descent(const Descent* call, int64_t part, int64_t parts) {
    const int64_t size = call->columns / call->groups, tiles = (call->rows + kLanes - 1) / kLanes;
    std::vector<float> memory(static_cast<size_t>(2 * call->columns + 4 * size + 2 * call->groups) * kLanes);
    Lanes* free = reinterpret_cast<Lanes*>(memory.data());
    const auto next = [&](int64_t count) {
        Lanes* own = free;
        free += count;
        return own;
    };
    Buffers own;
    own.gradient = next(call->columns), own.levels = next(call->columns);
    own.before = next(size), own.found = next(size), own.rest = next(size), own.curved = next(size);
    own.scales = next(call->groups), own.zeros = next(call->groups);
    for (int64_t at = part; at < tiles * call->experts; at += parts) {
        const int64_t row = at % tiles * kLanes, left = call->rows - row;
        if (call->usable[at / tiles])
            descend_rows(*call, at / tiles, row, static_cast<int>(left < kLanes ? left : kLanes), own);
    }
}
