// Instructions that CUDA C++ has no name for, and the packed 16-bit constants that go with them.
//
// A host compiler gets the same functions from host_mma.h of the tests, which runs the lanes of a warp in turns.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

// c += a * b on a tensor core: a 16 x 16 (rows g and g + 8 of lane 4 g + t), b 16 x 8, c 16 x 8 in fp32.
template <bool kHalf>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (kHalf)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a * b + c of two 16-bit floats in a register, each rounded once.
template <bool kHalf>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    if (kHalf)
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// (word & mask) | bits: left to itself the compiler takes two instructions, as one holds no more than one constant.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "r"(mask), "r"(bits));
    return d;
}

__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// The compiler takes the value as it finds it: it cannot compute it anew in a loop, or take a sum apart.
template <typename T>
__device__ __forceinline__ void keep(T*& pointer) {
    asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

// Wait for every block of the cluster; what they wrote to shared memory before is then seen.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();  // no clusters: launches have one block in each
#endif
}

// The float at the same place of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float cluster_load(const float* place, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(place)), remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
#else
    return *place;
#endif
}

#else
#include "host_mma.h"
#endif
