#pragma once
#include <cstdint>
#include <cstring>

// A half is kept as the fp32 of its value: to nearest, ties to even, in the range of normal halves.
static inline float __float2half_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float __half2float(float value) { return value; }
