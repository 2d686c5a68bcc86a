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
        for (int64_t next = stop; next < call.last; ++next) {
            Lanes sum = {};
            for (int k = 0; k < depth; ++k) {
                const float factor = inside[(start + k - call.first) * width + next - call.first];
                each([&](int lane) { sum[lane] = std::fma(factor, delta[k][lane], sum[lane]); });
            }
            Lanes& later = pull[next - call.first];
            each([&](int lane) { later[lane] += sum[lane]; });
        }
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

// For ctypes: plain C. Blocks of kLanes rows are independent; `part` of `parts` takes each parts-th of them.
extern "C" int64_t sarqc_stretch_size() { return sizeof(Stretch); }
extern "C" int64_t sarqc_fit_size() { return sizeof(Fit); }

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
