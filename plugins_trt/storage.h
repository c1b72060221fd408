// Numbers as tensors store them, and sixteen bytes of them, which is what a thread reads at a time.
// Compiles for GPUs and, to the same results, for CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NUWA_BOTH __host__ __device__ __forceinline__
#else
#define NUWA_BOTH inline
#endif

namespace nuwa {

enum class Storage : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

NUWA_BOTH float as_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

NUWA_BOTH std::uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

NUWA_BOTH float to_float(float value) { return value; }
NUWA_BOTH float to_float(BFloat16 value) {
  return as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
NUWA_BOTH float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = value.bits >> 10 & 31u, fraction = value.bits & 1023u;
  if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * (1.f / (1 << 24));  // below the normal ones
  return sign ? -small : small;
#endif
}

// To the nearest, of two equally near ones to the even one.
template <class T>
NUWA_BOTH T from_float(float value);

template <>
NUWA_BOTH float from_float<float>(float value) {
  return value;
}
template <>
NUWA_BOTH BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
NUWA_BOTH Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = as_bits(value), size = bits & 0x7fffffffu;
  const std::uint16_t sign = bits >> 16 & 0x8000u;
  if (size > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (size >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (size < 0x38800000u) {  // below the normal ones: in units of 2^-24, added to one whose unit it is
    const float shifted = as_float(size) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (as_bits(shifted) - as_bits(0.5f)))};
  }
  const std::uint32_t rounded = size + 0xfffu + (size >> 13 & 1) - (112u << 23);
  return {static_cast<std::uint16_t>(sign | rounded >> 13)};
#endif
}

}  // namespace nuwa
