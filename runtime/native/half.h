// f16: weights of half the bytes, which become f32 as they are read.
//
// What is computed with them is what f32 weights of the same values give, bit by bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nuwa {

struct Half {
  std::uint16_t bits;
};

// Whether this instruction set reads them as fast as floats. Else they are unpacked when packed.
#if defined(__AVX512F__) || defined(__F16C__) || defined(__aarch64__)
constexpr bool kReadsHalves = true;
#else
constexpr bool kReadsHalves = false;
#endif

inline float to_float(Half half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half.bits & 0x8000) << 16;
  const std::uint32_t magnitude = half.bits & 0x7fff;
  std::uint32_t bits = sign;
  if (magnitude >= 0x7c00) {
    bits |= 0x7f800000 | (magnitude & 0x3ff) << 13;  // infinite, or no number
  } else if (magnitude >= 0x400) {
    bits |= (magnitude << 13) + ((127 - 15) << 23);
  } else {
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::uint32_t small;
    std::memcpy(&small, &value, sizeof small);
    bits |= small;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Floats load(const Half* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  // Not _mm512_cvtph_ps, for which GCC 12 warns of its own header.
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, halves));
#elif defined(__F16C__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(halves));
#elif defined(__aarch64__)
  const uint16x4_t halves = vld1_u16(reinterpret_cast<const std::uint16_t*>(from));
  return reinterpret_cast<Floats>(vcvt_f32_f16(vreinterpret_f16_u16(halves)));
#else
  Floats value;
  for (int i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
  return value;
#endif
}

}  // namespace nuwa
