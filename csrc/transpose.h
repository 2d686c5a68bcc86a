// A square of 16 x 16 words of 32 bits, rows and columns exchanged. Word by word, a compiler makes 256 loads of it.

#pragma once

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// to[i * to_stride + j] = from[j * from_stride + i]; strides in words.
template <typename Word>
inline void transpose(Word* __restrict to, int64_t to_stride, const Word* __restrict from, int64_t from_stride) {
    static_assert(sizeof(Word) == 4, "words of 32 bits");
#ifdef __AVX512F__
    __m512i row[16], next[16];
    for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {  // pairs of words, of rows i and i + 1
        next[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        next[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // four words of four rows: column c % 4 of each quarter c / 4
        row[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {  // quarters of rows 0 to 7 and of rows 8 to 15
        next[c] = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
        next[4 + c] = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
        next[8 + c] = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
        next[12 + c] = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
        _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(next[c], next[8 + c], 0x88));
        _mm512_storeu_si512(to + (4 + c) * to_stride, _mm512_shuffle_i32x4(next[4 + c], next[12 + c], 0x88));
        _mm512_storeu_si512(to + (8 + c) * to_stride, _mm512_shuffle_i32x4(next[c], next[8 + c], 0xdd));
        _mm512_storeu_si512(to + (12 + c) * to_stride, _mm512_shuffle_i32x4(next[4 + c], next[12 + c], 0xdd));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[i * to_stride + j] = from[j * from_stride + i];
#endif
}

}  // namespace
