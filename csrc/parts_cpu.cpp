// Independent parts of a call on the threads that torch's OpenMP has already, which may still be awake from its last
// loop: they start at once, and do not hold the cores that new threads would need.

#include <cstdint>

namespace {

struct Parts {
    int (*number)();  // omp_get_thread_num
    int (*count)();   // omp_get_num_threads: there may be fewer than were wanted
    void (*work)(const void* call, int64_t part, int64_t parts);
    const void* call;
    int64_t parts;
};

void own_parts(void* data) {
    const Parts& all = *static_cast<const Parts*>(data);
    for (int64_t part = all.number(); part < all.parts; part += all.count()) all.work(all.call, part, all.parts);
}

}  // namespace

// start: GOMP_parallel, which GNU's compiler calls for `#pragma omp parallel`.
extern "C" void sarqc_in_parts(void (*start)(void (*)(void*), void*, unsigned, unsigned), int (*number)(),
                               int (*count)(), void (*work)(const void*, int64_t, int64_t), const void* call,
                               int64_t parts) {
    Parts all{number, count, work, call, parts};
    start(own_parts, &all, static_cast<unsigned>(parts), 0);
}
