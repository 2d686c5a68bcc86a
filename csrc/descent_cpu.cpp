// Coordinate descent on a CPU: sarqc_kernels/columns/descent_reference.py says what and why, step by step the same, and
// with the same bits.

#include "lanes.h"

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
    const int64_t columns = call.columns, groups = call.groups, size = columns / groups, at = expert * call.rows + row;
    const float* hessian = call.hessian + expert * columns * columns;
    take_across(call.scales + at * groups, groups, rows, groups, nullptr, 1.f, own.scales);
    take_across(call.zeros + at * groups, groups, rows, groups, nullptr, 0.f, own.zeros);
    const auto take_levels = [&] {
        take_across(call.codes + at * columns, columns, rows, columns, nullptr, 0.f, own.levels);
        for (int64_t j = 0; j < columns; ++j)
            each([&](int lane) { own.levels[j][lane] -= own.zeros[j / size][lane]; });
    };
    take_levels();
    take_across(call.weight + at * columns, columns, rows, columns, nullptr, 0.f, own.gradient);
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
        for (int64_t group = 0; group < groups; ++group)
            improve_group(call, hessian, group, pass + 1 == call.passes, own);
    for (int64_t j = 0; j < columns; ++j)
        each([&](int lane) { own.levels[j][lane] += own.zeros[j / size][lane]; });
    give_across(own.levels, columns, rows, columns, nullptr, call.codes + at * columns);
    give_across(own.scales, groups, rows, groups, nullptr, call.scales + at * groups);
}

}  // namespace

// For ctypes: plain C. Tiles of rows are independent; `part` of `parts` takes each parts-th of them.
extern "C" int64_t sarqc_descent_size() { return sizeof(Descent); }

extern "C" void sarqc_descent(const Descent* call, int64_t part, int64_t parts) {
    const int64_t size = call->columns / call->groups;
    Pieces memory(2 * call->columns + 4 * size + 2 * call->groups);
    Buffers own;
    own.gradient = memory.next(call->columns), own.levels = memory.next(call->columns);
    own.before = memory.next(size), own.found = memory.next(size);
    own.rest = memory.next(size), own.curved = memory.next(size);
    own.scales = memory.next(call->groups), own.zeros = memory.next(call->groups);
    each_tile(call->experts, call->rows, part, parts, [&](int64_t expert, int64_t row, int rows) {
        if (call->usable[expert]) descend_rows(*call, expert, row, rows, own);
    });
}
