// csrc/columns.cu on a CPU, with the launchers of the real library: a block for every row, one after another.
#include "columns.cu"

extern "C" int sarqc_columns_size() { return sizeof(Columns); }
extern "C" const char* sarqc_error(int) { return "none"; }

extern "C" int sarqc_columns(const Columns* call, int, void*) {
    const auto kernel = call->fit ? columns<true, true> : call->round ? columns<true, false> : columns<false, false>;
    blockDim.x = 1;
    for (blockIdx.y = 0; blockIdx.y < call->experts; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < call->rows; ++blockIdx.x) kernel(*call);
    return 0;
}
