#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// A half is kept as the fp32 of its value, rounded to nearest, ties to even; what is too large for a half is not met.
static inline float __float2half_rn(float value) {
    if (std::fabs(value) < 0x1p-14f) return std::nearbyint(value * 0x1p24f) * 0x1p-24f;  // subnormal
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float __half2float(float value) { return value; }
static inline float __ushort_as_half(uint16_t bits) {
    const float sign = bits & 0x8000u ? -1.f : 1.f;
    const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    return sign * (exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : mantissa * 0x1p-24f);
}
static inline uint16_t __half_as_ushort(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (std::fabs(value) < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::fabs(value) * 0x1p24f));
    return static_cast<uint16_t>(sign | (magnitude - (112u << 23)) >> 13);
}
