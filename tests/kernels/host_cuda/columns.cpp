// csrc/columns.cu on a CPU, with the launchers of the real library: blocks of one thread, or of some, one after another.
#include "columns.cu"

extern "C" int sarqc_columns_size() { return sizeof(Columns); }
extern "C" const char* sarqc_error(int) { return "none"; }

extern "C" int sarqc_columns(const Columns* call, int threads, void*) {
    const auto kernel = call->fit ? columns<true, true> : call->round ? columns<true, false> : columns<false, false>;
    blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < call->experts; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x * threads < call->rows; ++blockIdx.x) {
            std::fill(std::begin(shared_memory), std::end(shared_memory), NAN);  // nobody has written it
            if (threads == 1)
                kernel(*call);
            else
                run_block(threads, [&] { kernel(*call); });
        }
    }
    return 0;
}
