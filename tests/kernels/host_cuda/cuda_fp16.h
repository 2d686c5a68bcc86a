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
static inline float __ushort_as_half(uint16_t bits) {  // 0 and normal halves
    const uint32_t wide = (bits & 0x8000u) << 16 | ((bits & 0x7fffu) ? ((bits & 0x7fffu) << 13) + (112u << 23) : 0u);
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
static inline uint16_t __half_as_ushort(float value) {  // 0 and values of normal halves
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude ? (magnitude - (112u << 23)) >> 13 : 0u));
}
