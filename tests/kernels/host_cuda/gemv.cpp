// csrc/gemv.cu on a CPU, with the launcher of the real library: the threads of a block one after another, first half
// before second half, which is all that its one barrier promises.
#include "gemv.cu"

extern "C" int sarqc_gemv_size() { return sizeof(Gemv); }
extern "C" const char* sarqc_error(int) { return "none"; }

template <bool kHalf, int kTokens, bool kWhole>
static void run(const Gemv& call) {
    static float shared[kShared<kTokens>];
    for (int block = 0; block * kRows < call.outputs; ++block) {
        for (int thread = 0; thread < kThreads; ++thread)
            accumulate<kHalf, kTokens, kWhole>(call, shared, block, thread);
        for (int thread = 0; thread < kThreads; ++thread) finish<kHalf, kTokens>(call, shared, block, thread);
    }
}

template <bool kHalf, bool kWhole>
static void run_for(const Gemv& call) {
    using Run = void (*)(const Gemv&);
    const Run runs[] = {run<kHalf, 1, kWhole>, run<kHalf, 2, kWhole>, run<kHalf, 3, kWhole>, run<kHalf, 4, kWhole>};
    runs[call.tokens - 1](call);
}

extern "C" int sarqc_gemv(const Gemv* call, void*) {
    const bool whole = call->slices_per_group == kSlices;
    const auto run = call->half ? (whole ? run_for<true, true> : run_for<true, false>)
                                : (whole ? run_for<false, true> : run_for<false, false>);
    run(*call);
    return 0;
}
