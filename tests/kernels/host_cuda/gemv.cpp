// csrc/gemv.cu on a CPU, with the launcher of the real library: the same threads, blocks and clusters, in turns.
#include "gemv.cu"

extern "C" int sarqc_gemv_size() { return sizeof(Gemv); }
extern "C" const char* sarqc_error(int) { return "none"; }

template <int kColumns, bool kWhole, bool kAsym>
static void launch(const Gemv& call, int blocks, int tiles) {
    const size_t sums = sizeof(float) * kReduced<kColumns>, found = 16;
    const size_t x = sizeof(uint32_t) * std::min(8 * kColumns, call.rows) * (call.chunk * kTileX + kPadX);
    const auto work = [&](char* shared) {
        run<SARQC_BITS, SARQC_HALF, kColumns, kWhole, kAsym>(call, reinterpret_cast<uint32_t*>(shared + sums + found),
                                                            reinterpret_cast<float*>(shared),
                                                            reinterpret_cast<Rows*>(shared + sums));
    };
    for (int z = 0; z < tiles; ++z)
        for (int y = 0; y < blocks; ++y) fibers::run_cluster(call.splits, kThreads, y, z, sums + found + x, work);
}

template <int kColumns>
static void launch_for(const Gemv& call, int blocks, int tiles) {
    const bool whole = call.slices_per_group == kSteps;
    const auto kernel = whole ? (call.zeros ? launch<kColumns, true, true> : launch<kColumns, true, false>)
                              : (call.zeros ? launch<kColumns, false, true> : launch<kColumns, false, false>);
    kernel(call, blocks, tiles);
}

extern "C" int sarqc_gemv(const Gemv* call, int columns, int blocks, int tiles, void*) {
    columns == 1 ? launch_for<1>(*call, blocks, tiles) : launch_for<2>(*call, blocks, tiles);
    return 0;
}
