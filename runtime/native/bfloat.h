// bf16: products of rows and weights that are the upper halves of floats, on the processor's tiles
// (AMX) where it has them.
//
// Products of two such numbers are exact in f32, so what is left to agree upon is the order of the
// sums. All instruction sets keep to that of the tiles: of every kChunk inputs those of even and
// those of odd place are summed up by themselves, in order, and what both come to is added to the
// output. Only numbers below f32's normal ones (1e-38) are 0 to tiles and not to others.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__AVX512F__) && defined(__linux__) && !defined(__clang__)
#define NUWA_TILES __attribute__((target("amx-tile,amx-bf16")))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nuwa {

struct BFloat {
  std::uint16_t bits;
};

constexpr int kChunk = 32;     // inputs that a tile multiplies at once; rows are zero beyond theirs
constexpr int kTileCells = 16;  // rows of a tile

constexpr int whole_chunks(int inputs) { return (inputs + kChunk - 1) / kChunk * kChunk; }

inline float to_float(BFloat value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float made;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

// To the nearest, of two as near to the one whose last bit is 0. What is no number stays none.
inline void store(BFloat* to, Floats value) {
  typedef std::uint16_t Narrow __attribute__((vector_size(kLanes * 2)));
  Ints bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Ints chosen = value == value ? rounded : (bits | 0x400000);
  const Narrow narrow = __builtin_convertvector((chosen >> 16) & 0xffff, Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

#if defined(NUWA_TILES)
// The same by an instruction that processors with tiles have, all but what is below f32's normal
// numbers, which becomes 0 (and is 0 to tiles).
inline void store_fast(BFloat* to, Floats value) {
  typedef std::uint16_t Narrow __attribute__((vector_size(kLanes * 2)));
  Narrow narrow;
  asm("vcvtneps2bf16 %1, %0" : "=v"(narrow) : "v"(value));
  std::memcpy(to, &narrow, sizeof narrow);
}
#else
inline void store_fast(BFloat* to, Floats value) { store(to, value); }
#endif

// Where a product's rows lie: first_count of them from `first` on and second_count from `second`
// on, at most kTileCells each, `apart` numbers from one to the next, every row of `runs` runs of
// `length` numbers, a multiple of kChunk, with next_run from one run to the next.
struct Cells {
  const BFloat *first, *second;
  int first_count, second_count, apart, runs, length;
  std::size_t next_run;
};

// Sums of `first` and, from kTileCells on, of `second`. A panel of bf16 is [inputs / 2][kPanel][2].
typedef float CellSums[2 * kTileCells][kPanel];

#if defined(NUWA_TILES)

// Whether processor and system let this process have tiles.
inline bool has_tiles() {
  static const bool has = [] {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
      return false;
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
}

// What a thread's tiles are for: 0 to 3 the sums of the rows in 4 and 5 with the columns in 6 and
// 7.
class TileSizes {
 public:
  TileSizes() = default;
  TileSizes(const TileSizes&) = delete;
  TileSizes& operator=(const TileSizes&) = delete;
  NUWA_TILES ~TileSizes() {
    if (first_) _tile_release();
  }

  // So many rows in tiles 0, 1, 4 and in tiles 2, 3, 5.
  NUWA_TILES void set(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first;
    second_ = second;
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } wanted;
    const int rows[8] = {first, first, second, second, first, second, kTileCells, kTileCells};
    for (int i = 0; i < 8; ++i) {
      wanted.bytes[i] = rows[i] ? 64 : 0;
      wanted.rows[i] = static_cast<std::uint8_t>(rows[i]);
    }
    asm volatile("" : : "r"(&wanted) : "memory");  // GCC 12 thinks that only some of it is read
    _tile_loadconfig(&wanted);
  }

 private:
  int first_ = 0, second_ = 0;
};

// sums = cells x panel. Afar: the panel is in no near cache, so it is fetched ahead.
template <bool Both, bool Afar>
NUWA_TILES __attribute__((noinline)) void multiply_tiles(const Cells& cells, const BFloat* panel,
                                                         CellSums& sums) {
  constexpr int kAhead = 4 * kChunk * kPanel;
  constexpr int kStep = kChunk * kPanel, kLine = 32;
  const long apart = cells.apart * static_cast<long>(sizeof(BFloat));
  constexpr long kPairs = 2 * kPanel * sizeof(BFloat);  // bytes of a panel's row of pairs
  _tile_zero(0);
  _tile_zero(1);
  if (Both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const BFloat *first = cells.first, *second = cells.second;
  for (int run = 0; run < cells.runs; ++run, first += cells.next_run, second += cells.next_run) {
    for (int k = 0; k < cells.length; k += kChunk, panel += kStep) {
      if (Afar)
        for (int i = 0; i < kStep; i += kLine) __builtin_prefetch(panel + kAhead + i);
      _tile_loadd(6, panel, kPairs);
      _tile_loadd(7, panel + 2 * kLanes, kPairs);
      _tile_loadd(4, first + k, apart);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (Both) {
        _tile_loadd(5, second + k, apart);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  constexpr long kRow = kPanel * sizeof(float);
  _tile_stored(0, sums[0], kRow);
  _tile_stored(1, sums[0] + kLanes, kRow);
  if (Both) {
    _tile_stored(2, sums[kTileCells], kRow);
    _tile_stored(3, sums[kTileCells] + kLanes, kRow);
  }
}

#else

inline bool has_tiles() { return false; }

class TileSizes {
 public:
  void set(int, int) {}
};

template <bool Both, bool Afar>
void multiply_tiles(const Cells&, const BFloat*, CellSums&) {}

#endif

// The same in vectors, of M rows.
template <int M, bool Afar>
__attribute__((noinline)) void multiply_vectors(const BFloat* first, const Cells& cells,
                                                const BFloat* panel, float (*sums)[kPanel]) {
  typedef std::uint32_t Loose __attribute__((aligned(1), may_alias));
  const auto floats = [](Ints bits) {
    Floats value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto one = [](std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return all(value);
  };
  constexpr std::int32_t kUpper = -0x10000;
  constexpr int kAhead = 8 * kPanel * 2;
  Floats total[M][2] = {};
  for (int run = 0; run < cells.runs; ++run, first += cells.next_run) {
    for (int chunk = 0; chunk < cells.length; chunk += kChunk) {
      Floats even[M][2] = {}, odd[M][2] = {};
      for (int k = chunk; k < chunk + kChunk; k += 2, panel += 2 * kPanel) {
        if (Afar)
          for (int i = 0; i < 2 * kPanel; i += 32) __builtin_prefetch(panel + kAhead + i);
        const std::int32_t* pairs = reinterpret_cast<const std::int32_t*>(panel);
        const Ints low = load(pairs), high = load(pairs + kLanes);
        const Floats low_even = floats(low << 16), low_odd = floats(low & kUpper);
        const Floats high_even = floats(high << 16), high_odd = floats(high & kUpper);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          const std::uint32_t pair = *reinterpret_cast<const Loose*>(
              first + static_cast<std::size_t>(i) * cells.apart + k);
          const Floats x_even = one(pair << 16), x_odd = one(pair & 0xffff0000);
          even[i][0] += x_even * low_even;
          even[i][1] += x_even * high_even;
          odd[i][0] += x_odd * low_odd;
          odd[i][1] += x_odd * high_odd;
        }
      }
      for (int i = 0; i < M; ++i)
        for (int half = 0; half < 2; ++half) total[i][half] += even[i][half] + odd[i][half];
    }
  }
  for (int i = 0; i < M; ++i) {
    store(sums[i], total[i][0]);
    store(sums[i] + kLanes, total[i][1]);
  }
}

template <bool Afar>
void multiply_vectors(const Cells& cells, const BFloat* panel, CellSums& sums) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;  // rows that leave all sums in registers
  const auto some = [&](const BFloat* first, int count, float(*to)[kPanel], bool afar) {
    for (; count >= kMost; count -= kMost, to += kMost, afar = false) {
      (afar ? multiply_vectors<kMost, true> : multiply_vectors<kMost, false>)(first, cells, panel,
                                                                             to);
      first += static_cast<std::size_t>(kMost) * cells.apart;
    }
    for (; count; --count, ++to, afar = false) {
      (afar ? multiply_vectors<1, true> : multiply_vectors<1, false>)(first, cells, panel, to);
      first += cells.apart;
    }
  };
  some(cells.first, cells.first_count, sums, Afar);
  some(cells.second, cells.second_count, sums + kTileCells, false);
}

// sums = cells x panel. Afar: the panel is in no near cache. `sizes` is the thread's.
template <bool Afar>
void multiply(const Cells& cells, const BFloat* panel, bool tiles, TileSizes& sizes,
              CellSums& sums) {
  if (!tiles) return multiply_vectors<Afar>(cells, panel, sums);
  sizes.set(cells.first_count, cells.second_count);
  if (cells.second_count)
    multiply_tiles<true, Afar>(cells, panel, sums);
  else
    multiply_tiles<false, Afar>(cells, panel, sums);
}

}  // namespace nuwa
