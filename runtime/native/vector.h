// Vectors of floats as wide as the instruction set that this file is compiled for.
//
// GCC and Clang vector extensions: one source for AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace nuwa {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // x 2 vectors of sums: 24 of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 12 of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kTileRows = 12;
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // outputs of a packed panel of weights (linear.h)

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float LooseFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef std::int32_t LooseInts __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline Ints load(const std::int32_t* from) { return *reinterpret_cast<const LooseInts*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }
inline void store(std::int32_t* to, Ints value) { *reinterpret_cast<LooseInts*>(to) = value; }
inline Floats all(float value) { return value - Floats{}; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats value) {
  // Pairwise, in one fixed order.
  float lane[kLanes];
  std::memcpy(lane, &value, sizeof lane);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// Of what two vectors hold, the lanes that a stage of sums() adds up: blocks of `Stride` lanes in
// turn from the one and from the other, the first of every two (Half 0) or the second (Half 1).
template <int Stride, int Half, int... Lane>
inline Floats blocks_of(Floats a, Floats b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(
      a, b,
      (Lane / (2 * Stride) * 2 * Stride + Half * Stride + Lane % Stride +
       (Lane / Stride % 2 ? kLanes : 0))...);
}

// Lane i: the sum of the lanes of values[i]. As many vectors as there are lanes, each summed up in
// the same order whatever the others hold.
template <int Stride = 1>
inline Floats sums(const Floats* values) {
  if constexpr (Stride == kLanes) {
    return values[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    Floats halved[kLanes / Stride / 2];
    for (int i = 0; i < kLanes / Stride / 2; ++i) {
      const Floats a = values[2 * i], b = values[2 * i + 1];
      halved[i] = blocks_of<Stride, 0>(a, b, lanes) + blocks_of<Stride, 1>(a, b, lanes);
    }
    return sums<2 * Stride>(halved);
  }
}

inline float highest(Floats value) {
  float best = value[0];
  for (int i = 1; i < kLanes; ++i) best = value[i] > best ? value[i] : best;
  return best;
}

// exp(x) to about one unit in the last place; 0 below -87, and x is at most 88 or not a number.
// Range reduction and polynomial as in the Cephes library.
inline Floats exp(Floats x) {
  const Floats low = all(-87.33654f);
  const Ints under = x < low;
  x = under ? low : x;  // keeps what is not a number
  Floats n = x * 1.44269504088896341f;
  n += n < 0.f ? all(-.5f) : all(.5f);
  const Ints power = __builtin_convertvector(n, Ints);
  n = __builtin_convertvector(power, Floats);
  Floats r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Ints exponent = (power + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  p = p * scale;
  return under ? Floats{} : p;
}

// The error function, |error| < 2e-7 (Abramowitz and Stegun, 7.1.26).
inline Floats erf(Floats x) {
  const Floats a = x < 0.f ? -x : x;
  const Floats t = 1.f / (1.f + 0.3275911f * a);
  Floats p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats y = 1.f - p * t * exp(-a * a);
  return x < 0.f ? -y : y;
}

// The exact form, x times the normal distribution function.
inline Floats gelu(Floats x) { return 0.5f * x * (1.f + erf(x * 0.70710678118654752f)); }

}  // namespace nuwa
