#pragma once
#include <cstdint>
#include <cstring>

static inline float __bfloat162float(uint16_t high) {
    const uint32_t bits = static_cast<uint32_t>(high) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t __float2bfloat16_rn(float value) {  // to nearest, ties to even; the value is finite
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline uint16_t __bfloat16_as_ushort(uint16_t bits) { return bits; }
