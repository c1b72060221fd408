// int8: rows quantized one by one, and the dot products of whole numbers.
//
// Sums of whole numbers are exact, so they have the same bits on every instruction set and in every
// order. Weights lie in groups of kGroup inputs, as many as one instruction sums up.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nuwa {

#if defined(__AVX512F__)
// VNNI multiplies unsigned with signed bytes: rows are kept 128 higher (kRaised), which the sums
// are rid of by where they start (Linear::start).
typedef std::uint8_t WholeRow;
typedef std::int8_t WholeWeight;
constexpr int kGroup = 4, kRaised = 128;
#define NUWA_WHOLE __attribute__((target("avx512vnni")))
#else
typedef std::int16_t WholeRow;
typedef std::int16_t WholeWeight;
constexpr int kGroup = 2, kRaised = 0;
#define NUWA_WHOLE
#endif

inline bool has_whole() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return true;
#endif
}

typedef WholeRow NarrowRow __attribute__((vector_size(kLanes * sizeof(WholeRow))));
typedef std::int32_t LooseGroup __attribute__((aligned(1), may_alias));

// sum + the products of kGroup inputs, the same ones for every lane, with each lane's weights.
NUWA_WHOLE inline Ints add_group(Ints sum, const WholeRow* inputs, const WholeWeight* weights) {
  const std::int32_t group = *reinterpret_cast<const LooseGroup*>(inputs);
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(group),
                          _mm512_loadu_si512(weights)));
#elif defined(__AVX2__)
  const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(_mm256_set1_epi32(group), given));
#elif defined(__SSE2__) && !defined(__AVX__)
  const __m128i given = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights));
  return sum + reinterpret_cast<Ints>(_mm_madd_epi16(_mm_set1_epi32(group), given));
#else
  static_assert(kGroup == 2, "a lane has two int16");
  const Ints given = *reinterpret_cast<const LooseInts*>(weights);
  const std::int32_t even = static_cast<std::int16_t>(group), odd = group >> 16;
  return sum + ((given << 16) >> 16) * even + (given >> 16) * odd;
#endif
}

// A row as whole numbers in units of the scale returned, the largest being 127. A row that has what
// is no finite number has the scale NaN.
inline float quantize(const float* row, int width, WholeRow* out) {
  Floats most{}, odd{};
  for (int i = 0; i < width; i += kLanes) {
    const Floats x = load(row + i);
    most = max(most, x < 0.f ? -x : x);
    odd += x * 0.f;
  }
  const float scale = highest(most) * (1.f / 127.f) + sum(odd);
  if (!(scale > 1e-30f)) {
    for (int i = 0; i < width; ++i) out[i] = kRaised;
    return scale;
  }
  constexpr float kRounds = 12582912.f;  // 1.5 x 2^23: what is added to it loses its fraction
  for (int i = 0; i < width; i += kLanes) {
    const Floats units = load(row + i) / scale;
    const Ints whole = __builtin_convertvector((units + kRounds) - kRounds, Ints) + kRaised;
    const NarrowRow narrow = __builtin_convertvector(whole, NarrowRow);
    std::memcpy(out + i, &narrow, sizeof narrow);
  }
  return scale;
}

}  // namespace nuwa
