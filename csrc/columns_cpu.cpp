// Column quantization on a CPU: sarqc_kernels/columns/reference.py, a tile of rows after another, each in one piece.
// Codes, scales and zeros equal the reference's bit for bit.
//
// The order of every sum is the reference's: a column takes the columns of its micro-panel one by one, each with one
// fused multiply-add (what torch's addcmul_ compiles to), then the sum of a whole micro-panel before it at once; columns
// before the panel come kDepth at a time (products of so few terms BLAS adds in order). Losses are added in torch.sum's
// order, see `Cascade`. sarqc_kernels/columns/cpu_impl.py compares with torch once, on the machine it runs on, and
// leaves the work to the reference where a bit differs.

#include "lanes.h"

// What a grid may be; cpu_impl.py has the same fields in the same order, as of all structures here.
struct Rule {
    const float* table;         // [trials, 2]: multiple of the span that gives the scale, and minus the factor
    int64_t trials, sym, cut;   // trials 1: no search. cut: bits of mantissa that a stored scale has less than fp32
    float top, middle, tiny, most;
};

// Groups [members, blocks, rows] that get a grid each.
struct Fit {
    const float* groups;      // [g, B, N]
    const float* importance;  // [g, B], or null for all ones
    float* scales;            // [B, N]
    float* zeros;             // [B, N]
    int64_t members, blocks, rows;
    Rule rule;
};

namespace {

void grid_of(const Rule& rule, const Lanes& span, const Lanes& low, const float* pair, Lanes& scale, Lanes& zero) {
    each([&](int lane) {
        const float wanted = span[lane] * pair[0];
        float size = clamped(std::fabs(wanted), rule.tiny, rule.most);
        size = rule.cut ? shortened(size, static_cast<uint32_t>(rule.cut)) : size;
        scale[lane] = wanted < 0.f ? -size : size;
    });
    if (rule.sym) {
        each([&](int lane) { zero[lane] = rule.middle; });
    } else {
        each([&](int lane) { zero[lane] = clamped(std::rint(low[lane] * pair[1] / scale[lane]), 0.f, rule.top); });
    }
}

// A group of columns and what each counts: importance[j * stride], or 1 where it is null.
struct Group {
    const Lanes* columns;
    int64_t members;
    const float* importance;
    int64_t stride;
};

void loss_of(const Rule& rule, const Group& group, const Lanes& scale, const Lanes& zero, Lanes& loss) {
    Lanes per_scale, term;
    each([&](int lane) { per_scale[lane] = 1.f / scale[lane]; });
    Cascade sum;
    for (int64_t j = 0; j < group.members; ++j) {
        const float count = group.importance ? group.importance[j * group.stride] : 1.f;
        each([&](int lane) {
            const float steps = group.columns[j][lane] * per_scale[lane];
            const float error = clamped(std::rint(steps), -zero[lane], rule.top - zero[lane]) - steps;
            term[lane] = error * count * error;
        });
        sum.add(term);
    }
    sum.total(loss);
    each([&](int lane) { loss[lane] = loss[lane] * scale[lane] * scale[lane]; });
}

void fit_group(const Rule& rule, const Group& group, Lanes& scale, Lanes& zero) {
    Lanes low, high, span, trial, trial_zero, loss, least;
    each([&](int lane) { low[lane] = INFINITY, high[lane] = -INFINITY; });
    for (int64_t j = 0; j < group.members; ++j) {
        each([&](int lane) {
            const float value = group.columns[j][lane];
            low[lane] = value < low[lane] || value != value ? value : low[lane];
            high[lane] = value > high[lane] || value != value ? value : high[lane];
        });
    }
    if (rule.sym) {
        each([&](int lane) { span[lane] = -low[lane] > high[lane] ? -low[lane] : high[lane]; });
    } else {
        each([&](int lane) {
            low[lane] = low[lane] > 0.f ? 0.f : low[lane];
            span[lane] = (high[lane] < 0.f ? 0.f : high[lane]) - low[lane];
        });
    }
    grid_of(rule, span, low, rule.table, scale, zero);
    if (rule.trials <= 1) return;
    loss_of(rule, group, scale, zero, least);
    if (rule.sym) each([&](int lane) { span[lane] = high[lane] > -low[lane] ? -span[lane] : span[lane]; });
    for (int64_t at = 1; at < rule.trials; ++at) {
        grid_of(rule, span, low, rule.table + 2 * at, trial, trial_zero);
        loss_of(rule, group, trial, trial_zero, loss);
        each([&](int lane) {
            const bool better = loss[lane] < least[lane];
            least[lane] = better ? loss[lane] : least[lane];
            scale[lane] = better ? trial[lane] : scale[lane];
            zero[lane] = better ? trial_zero[lane] : zero[lane];
        });
    }
}

}  // namespace

// Columns quantized one after another.
struct Columns {
    const float* weight;      // [E, N, K]
    uint8_t* codes;           // [E, N, K], out
    float* scales;            // [E, N, G], out; in where they are given, and none is 0
    float* zeros;             // [E, N, G], the same
    const float* factor;      // [E, K, K]: M', the factor with every column divided by its diagonal element
    const float* importance;  // [E, K], in processing order
    const int64_t* order;     // [E, K]: the column that is taken first, second, ...
    int64_t experts, rows, columns, group_size, given;
    Rule rule;
};

namespace {

constexpr int kPanel = 128;  // the most columns of a panel

// One tile of rows, its columns in processing order.
class Tile {
   public:
    Tile(const Columns& call, Pieces& memory)
        : call_(call),
          weight_(memory.next(call.columns)),
          delta_(memory.next(call.columns)),
          codes_(memory.next(call.columns)),
          pull_(memory.next(widest(call))),
          group_(memory.next(widest(call))),
          scales_(memory.next(call.columns / call.group_size)),
          zeros_(memory.next(call.columns / call.group_size)) {}

    static int64_t lanes(const Columns& call) {
        return 3 * call.columns + 2 * widest(call) + 2 * (call.columns / call.group_size);
    }

    void quantize(int64_t expert, int64_t row, int rows) {
        const int64_t columns = call_.columns, groups = columns / call_.group_size, at = expert * call_.rows + row;
        order_ = call_.order + expert * columns;
        factor_ = call_.factor + expert * columns * columns;
        importance_ = call_.importance + expert * columns;
        take_across(call_.weight + at * columns, columns, rows, columns, order_, 0.f, weight_);
        if (call_.given) {
            take_across(call_.scales + at * groups, groups, rows, groups, nullptr, 1.f, scales_);
            take_across(call_.zeros + at * groups, groups, rows, groups, nullptr, 0.f, zeros_);
        }
        walk();
        give_across(codes_, columns, rows, columns, order_, call_.codes + at * columns);
        if (!call_.given) {
            give_across(scales_, groups, rows, groups, nullptr, call_.scales + at * groups);
            give_across(zeros_, groups, rows, groups, nullptr, call_.zeros + at * groups);
        }
    }

   private:
    // The most columns that are pulled or fitted at once.
    static int64_t widest(const Columns& call) { return call.group_size > kPanel ? call.group_size : kPanel; }

    // Panel by panel. A panel holds whole groups, or lies inside of one.
    void walk() {
        const int64_t size = call_.group_size, columns = call_.columns;
        const bool wide = !call_.given && size > kPanel, narrow = !call_.given && size <= kPanel;
        const int64_t width = narrow ? size * (kPanel / size) : kPanel, stretch = wide ? size : width;
        for (int64_t begin = 0; begin < columns; begin += stretch) {
            const int64_t end = begin + stretch < columns ? begin + stretch : columns;
            if (wide) {
                pull_before(begin, end);
                fit(begin, pull_);
            }
            for (int64_t first = begin; first < end; first += width) {
                const int64_t last = first + width < end ? first + width : end;
                pull_before(first, last);
                for (int64_t at = first; at < last; at += narrow ? size : width) {
                    if (narrow) fit(at, pull_ + (at - first));
                    take(first, at, narrow ? at + size : last, last);
                }
            }
        }
    }

    // pull_: what the columns before `first` ask of columns first .. last - 1.
    void pull_before(int64_t first, int64_t last) {
        std::memset(pull_, 0, (last - first) * sizeof(Lanes));
        for (int64_t at = 0; at < first; at += kDepth) {
            const int depth = static_cast<int>(first - at < kDepth ? first - at : kDepth);
            product<false>(factor_ + at * call_.columns + first, call_.columns, depth, delta_ + at, last - first, pull_);
        }
    }

    // The grid of the group that begins at `first`, on the weights as all columns before it compensate them: every pull
    // goes back through the columns of its own group.
    void fit(int64_t first, const Lanes* pull) {
        const int64_t size = call_.group_size, columns = call_.columns;
        if (first == 0) {
            std::memcpy(group_, weight_, size * sizeof(Lanes));
        } else {
            const float* square = factor_ + first * columns + first;
            std::memcpy(group_, pull, size * sizeof(Lanes));
            for (int64_t start = 0; start < size; start += kMicro) {
                const int64_t stop = start + kMicro < size ? start + kMicro : size;
                for (int64_t i = start; i < stop; ++i) {
                    for (int64_t next = i + 1; next < stop; ++next) {
                        const float factor = -square[i * columns + next];
                        each([&](int lane) {
                            group_[next][lane] = std::fma(factor, group_[i][lane], group_[next][lane]);
                        });
                    }
                }
                product<true>(square + start * columns + stop, columns, static_cast<int>(stop - start), group_ + start,
                              size - stop, group_ + stop);
            }
            for (int64_t j = 0; j < size; ++j)
                each([&](int lane) { group_[j][lane] = weight_[first + j][lane] + group_[j][lane]; });
        }
        const int64_t group = order_[first] / size;
        fit_group(call_.rule, {group_, size, importance_ + first, 1}, scales_[group], zeros_[group]);
    }

    // Columns begin .. end - 1 of the panel first .. last - 1, whose later columns' pull gains what these ask of them.
    void take(int64_t first, int64_t begin, int64_t end, int64_t last) {
        const float top = call_.rule.top;
        for (int64_t start = begin; start < end; start += kMicro) {
            const int64_t stop = start + kMicro < end ? start + kMicro : end;
            for (int64_t j = start; j < stop; ++j) {
                const int64_t group = order_[j] / call_.group_size;
                const Lanes &weight = weight_[j], &asked = pull_[j - first];
                const Lanes &scale = scales_[group], &zero = zeros_[group];
                Lanes &delta = delta_[j], &code = codes_[j];
                each([&](int lane) {
                    const float steps = std::rint((weight[lane] + asked[lane]) / scale[lane]);
                    const float level = clamped(steps, -zero[lane], top - zero[lane]);
                    const float nearest = level * scale[lane];
                    delta[lane] = weight[lane] - nearest;
                    code[lane] = level + zero[lane];
                });
                const float* line = factor_ + j * call_.columns;
                for (int64_t next = j + 1; next < stop; ++next) {
                    Lanes& later = pull_[next - first];
                    each([&](int lane) { later[lane] = std::fma(line[next], delta[lane], later[lane]); });
                }
            }
            product<false>(factor_ + start * call_.columns + stop, call_.columns, static_cast<int>(stop - start),
                           delta_ + start, last - stop, pull_ + (stop - first));
        }
    }

    const Columns& call_;
    Lanes *weight_, *delta_, *codes_, *pull_, *group_, *scales_, *zeros_;
    const int64_t* order_ = nullptr;
    const float *factor_ = nullptr, *importance_ = nullptr;
};

}  // namespace

// For ctypes: plain C. Tiles of rows are independent; `part` of `parts` takes each parts-th of them.
extern "C" int64_t sarqc_columns_size() { return sizeof(Columns); }
extern "C" int64_t sarqc_fit_size() { return sizeof(Fit); }

extern "C" void sarqc_columns(const Columns* call, int64_t part, int64_t parts) {
    Pieces memory(Tile::lanes(*call));
    Tile tile(*call, memory);
    each_tile(call->experts, call->rows, part, parts,
              [&](int64_t expert, int64_t row, int rows) { tile.quantize(expert, row, rows); });
}

extern "C" void sarqc_fit(const Fit* call, int64_t part, int64_t parts) {
    Pieces memory(call->members);
    Lanes* group = memory.next(call->members);
    each_tile(call->blocks, call->rows, part, parts, [&](int64_t block, int64_t row, int rows) {
        Lanes scale, zero;
        for (int64_t j = 0; j < call->members; ++j)
            load(group[j], call->groups + (j * call->blocks + block) * call->rows + row, rows, 0.f);
        const float* importance = call->importance ? call->importance + block : nullptr;
        fit_group(call->rule, {group, call->members, importance, call->blocks}, scale, zero);
        store(call->scales + block * call->rows + row, scale, rows);
        store(call->zeros + block * call->rows + row, zero, rows);
    });
}
