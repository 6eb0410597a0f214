// Sums of products for a tile of R rows and kOutputs outputs, by the best instructions that the compiler may use.
//
// Weights of a tile lie as groups of inputs, [groups][kOutputs][inputs of a group]. Rows are read at rows[r] + offset:
// a convolution is the same sum over several stretches of a row, one for each tap of its kernel, and needs no copy of
// its input for each tap.
//
//     wide == false   4 inputs a group, codes u8:   VNNI sums in 32 bits; AVX2 in 16 bits, flushed into 32 bits at
//                                                   stretches that the caller proved short enough; else plain C++
//     wide == true    2 inputs a group, codes s16:  AVX2 alone, sums in 32 bits, exact for 8-bit codes and weights

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace modiff {

// groups of inputs that lie side by side in a row from `offset` bytes on; 16-bit sums are flushed behind it.
struct Stretch {
  int64_t offset;
  int32_t groups;
  int32_t flush;
};

template <class T>
inline T read(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

#if defined(__AVX512VNNI__) && defined(__AVX512F__)

constexpr int kFamily = 3, kRows = 8, kOutputs = 32;

template <int R, bool wide>
void tile(const uint8_t* const* rows, const Stretch* stretches, int64_t count, const int8_t* weights, int32_t* sums) {
  __m512i total[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    total[r][0] = total[r][1] = _mm512_setzero_si512();
  }
  for (int64_t s = 0; s < count; ++s) {
    const uint8_t* from[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      from[r] = rows[r] + stretches[s].offset;
    }
    const int64_t size = 4 * static_cast<int64_t>(stretches[s].groups);
    for (int64_t at = 0; at < size; at += 4, weights += 128) {
      const __m512i w0 = _mm512_loadu_si512(weights), w1 = _mm512_loadu_si512(weights + 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i codes = _mm512_set1_epi32(read<int32_t>(from[r] + at));
        total[r][0] = _mm512_dpbusd_epi32(total[r][0], codes, w0);
        total[r][1] = _mm512_dpbusd_epi32(total[r][1], codes, w1);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_si512(sums + kOutputs * r, total[r][0]);
    _mm512_storeu_si512(sums + kOutputs * r + 16, total[r][1]);
  }
}

#elif defined(__AVX2__)

inline __m256i load256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store256(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

#if defined(__AVXVNNI__)
constexpr int kFamily = 2, kRows = 6, kOutputs = 16;
inline __m256i dot(__m256i total, __m256i codes, __m256i w) { return _mm256_dpbusd_avx_epi32(total, codes, w); }
#else
constexpr int kFamily = 1, kRows = 6, kOutputs = 16;
inline __m256i dot(__m256i total, __m256i codes, __m256i w) {
  return _mm256_add_epi16(total, _mm256_maddubs_epi16(codes, w));
}
#endif

// 16-bit sums: |lane| <= 32767 by the stretches' bound, so maddubs and add never wrap.
template <int R, bool wide>
void tile(const uint8_t* const* rows, const Stretch* stretches, int64_t count, const int8_t* weights, int32_t* sums) {
  constexpr bool flushes = kFamily == 1 && !wide;
  __m256i total[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    total[r][0] = total[r][1] = _mm256_setzero_si256();
    store256(sums + kOutputs * r, total[r][0]);
    store256(sums + kOutputs * r + 8, total[r][0]);
  }
  for (int64_t s = 0; s < count; ++s) {
    const uint8_t* from[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      from[r] = rows[r] + stretches[s].offset;
    }
    const int64_t size = 4 * static_cast<int64_t>(stretches[s].groups);
    for (int64_t at = 0; at < size; at += 4, weights += wide ? 32 : 64) {
      __m256i w0, w1;
      if (wide) {
        w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
        w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 16)));
      } else {
        w0 = load256(weights);
        w1 = load256(weights + 32);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i codes = _mm256_set1_epi32(read<int32_t>(from[r] + at));
        if (wide) {
          total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(codes, w0));
          total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(codes, w1));
        } else {
          total[r][0] = dot(total[r][0], codes, w0);
          total[r][1] = dot(total[r][1], codes, w1);
        }
      }
    }
    if (flushes && stretches[s].flush != 0) {
      const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          int32_t* to = sums + kOutputs * r + 8 * half;
          store256(to, _mm256_add_epi32(load256(to), _mm256_madd_epi16(total[r][half], ones)));
          total[r][half] = _mm256_setzero_si256();
        }
      }
    }
  }
  if (!flushes) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      store256(sums + kOutputs * r, total[r][0]);
      store256(sums + kOutputs * r + 8, total[r][1]);
    }
  }
}

#else

constexpr int kFamily = 0, kRows = 4, kOutputs = 16;

template <int R, bool wide>
void tile(const uint8_t* const* rows, const Stretch* stretches, int64_t count, const int8_t* weights, int32_t* sums) {
  int32_t total[R][kOutputs] = {};
  for (int64_t s = 0; s < count; ++s) {
    for (int32_t g = 0; g < stretches[s].groups; ++g, weights += 4 * kOutputs) {
      for (int r = 0; r < R; ++r) {
        const uint8_t* codes = rows[r] + stretches[s].offset + 4 * g;
        for (int o = 0; o < kOutputs; ++o) {
          const int8_t* w = weights + 4 * o;
          total[r][o] += codes[0] * w[0] + codes[1] * w[1] + codes[2] * w[2] + codes[3] * w[3];
        }
      }
    }
  }
  std::memcpy(sums, total, sizeof(total));
}

#endif

// The same for any number of rows up to kRows.
template <bool wide, int R = kRows>
inline void tile_of(int64_t number, const uint8_t* const* rows, const Stretch* stretches, int64_t count,
                    const int8_t* weights, int32_t* sums) {
  if (number == R) {
    tile<R, wide>(rows, stretches, count, weights, sums);
  } else if constexpr (R > 1) {
    tile_of<wide, R - 1>(number, rows, stretches, count, weights, sums);
  }
}

}  // namespace modiff
