// A VQ-GAN's encoder or decoder on a CPU: a list of operations over the feature maps of one
// picture, on threads that meet after each of them.
//
// What convolutions read has a border of zeros, so that a row of a 3x3 kernel is a run of three
// cells and a product's rows are cells side by side.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "convnet_abi.h"
#include "layers.h"
#include "memory.h"
#include "team.h"
#include "vector.h"

namespace nuwa {
namespace {

constexpr int kGroups = 32;
constexpr float kGroupEpsilon = 1e-6f;  // of training/vqgan.py

inline Floats silu(Floats x) {
  const Floats most = all(87.f), minus = -x;
  return x / (1.f + exp(minus > most ? most : minus));
}

// To about four digits, of which bf16 keeps less than three. 2^x is a polynomial on [-.5, .5].
inline Floats silu_for_bfloat(Floats x) {
#if defined(__AVX512F__)
  const Floats least = all(-126.f), most = all(126.f);
  Floats power = x * -1.44269504088896341f;
  power = power > most ? most : power;
  power = power < least ? least : power;
  const __m512 given = reinterpret_cast<__m512>(power);
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, given, 8);  // to the nearest
  const Floats rest = power - reinterpret_cast<Floats>(whole);
  Floats p = all(9.61812910e-3f);
  p = p * rest + 5.55041087e-2f;
  p = p * rest + 2.40226507e-1f;
  p = p * rest + 6.93147181e-1f;
  p = p * rest + 1.f;
  const __m512 scaled = _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), whole);
  const Floats below = 1.f + reinterpret_cast<Floats>(scaled);
  return x * reinterpret_cast<Floats>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(below)));
#else
  return silu(x);
#endif
}

// An operation and its weights: panels of [kernel][kernel][channels][kPanel], or of bf16
// [kernel][kernel][channels / 2][kPanel][2].
struct Op {
  NuwaOp told;
  Array<float> weight, bias;
  Array<BFloat> narrow;
  int panels = 0, channels;  // channels: of what it reads, in whole chunks for bf16

  Op(const NuwaOp& from, bool is_narrow) : told(from), channels(from.in) {
    told.weight = told.bias = nullptr;
    switch (from.kind) {
      case kConvolve:
        if (is_narrow) channels = whole_chunks(from.in);
        pack(from, is_narrow);
        break;
      case kGiveNearest:
        pack_nearest(from);
        break;
      case kNormalize:
        weight = copied(from.weight, from.in);
        bias = copied(from.bias, from.in);
        break;
      default:
        break;
    }
  }

  int to_side() const {
    if (told.kind == kDouble) return 2 * told.side;
    return told.kind == kConvolve ? told.side / told.stride : told.side;
  }
  std::size_t panel_size() const {
    return static_cast<std::size_t>(told.kernel) * told.kernel * channels * kPanel;
  }

 private:
  void make_bias(const float* from) {
    panels = (told.out + kPanel - 1) / kPanel;
    bias = Array<float>(static_cast<std::size_t>(panels) * kPanel);
    if (from) std::memcpy(bias.get(), from, told.out * sizeof(float));
  }

  void pack(const NuwaOp& from, bool is_narrow) {
    make_bias(from.bias);
    const int taps = told.kernel * told.kernel;
    if (is_narrow)
      narrow = Array<BFloat>(panels * panel_size());
    else
      weight = Array<float>(panels * panel_size());
    for (int o = 0; o < told.out; ++o)
      for (int tap = 0; tap < taps; ++tap)
        for (int c = 0; c < told.in; ++c) {
          const float value = from.weight[(static_cast<std::size_t>(o) * told.in + c) * taps + tap];
          const std::size_t input = static_cast<std::size_t>(tap) * channels + c;
          const std::size_t panel = o / kPanel * panel_size();
          if (is_narrow)
            narrow[panel + (input / 2 * kPanel + o % kPanel) * 2 + input % 2] = to_bfloat(value);
          else
            weight[panel + input * kPanel + o % kPanel] = value;
        }
  }

  // The nearest row is the one whose product with a cell less half its square is largest. Beyond
  // the last row nothing is near.
  void pack_nearest(const NuwaOp& from) {
    make_bias(nullptr);
    weight = Array<float>(static_cast<std::size_t>(panels) * told.in * kPanel);
    for (int o = 0; o < panels * kPanel; ++o) {
      if (o >= told.out) {
        bias[o] = -INFINITY;
        continue;
      }
      const float* row = from.weight + static_cast<std::size_t>(o) * told.in;
      double square = 0;
      for (int c = 0; c < told.in; ++c) {
        square += static_cast<double>(row[c]) * row[c];
        weight[(static_cast<std::size_t>(o / kPanel) * told.in + c) * kPanel + o % kPanel] = row[c];
      }
      bias[o] = static_cast<float>(-.5 * square);
    }
  }

  static BFloat to_bfloat(float value) {
    BFloat made[kLanes];
    store(made, all(value));
    return made[0];
  }
};

class ConvNet {
 public:
  virtual ~ConvNet() = default;
  virtual void run(const void* given, int threads, void* made) = 0;
};

// Input: of what convolutions read, and multiply it as: float, or BFloat on tiles.
template <class Input>
class ConvNetOf : public ConvNet {
 public:
  ConvNetOf(const NuwaOp* ops, int count, Team& team) : team_(team), members_(team.size()) {
    for (int i = 0; i < count; ++i) ops_.emplace_back(ops[i], kNarrow);
    std::vector<std::size_t> maps;  // floats of each
    const auto need = [&](int buffer, std::size_t side, int channels) {
      if (buffer >= static_cast<int>(maps.size())) maps.resize(buffer + 1);
      maps[buffer] = std::max(maps[buffer], side * side * channels);
    };
    std::size_t bordered = 0;
    int row = 0, channels = 0, keys = 0;
    for (const Op& op : ops_) {
      const NuwaOp& told = op.told;
      const std::size_t side = std::max(told.side, op.to_side());
      switch (told.kind) {
        case kTakeFeatures:
        case kTakePixels:
        case kTakeClasses: break;
        case kConvolve: need(told.to, op.to_side(), told.out); break;
        case kAttend:
          need(told.keys, told.side, told.in);
          need(told.values, told.side, told.in);
          keys = std::max(keys, told.side * told.side);
          [[fallthrough]];
        default: need(told.from, told.side, told.in);
      }
      if (told.kind != kGivePixels && told.kind != kGiveNearest)
        bordered = std::max(bordered, (side + 2) * (side + 2) * stored(told.in));
      row = std::max(row, told.side * told.in);
      channels = std::max(channels, whole_chunks(told.in));
    }
    for (const std::size_t size : maps) maps_.emplace_back(size);
    input_ = Array<Input>(bordered);
    sums_ = Array<float>(row);
    squares_ = Array<float>(row);
    for (Member& member : members_) {
      member.window.reserve(keys);
      member.cell = Array<float>(channels);
      member.mean = Array<float>(channels);
      member.scale = Array<float>(channels);
    }
  }

  void run(const void* given, int threads, void* made) override {
    team_.employ(threads);
    team_.run([&](int index) {
      for (const Op& op : ops_) {
        run_op(op, index, given, made);
        team_.meet();
      }
    });
  }

 private:
  static constexpr bool kNarrow = !std::is_same<Input, float>::value;

  // A thread's scratch. cell: channels of one; mean, scale: of a norm, by channel.
  struct Member {
    Window window;
    Array<float> cell, mean, scale;
  };

  void run_op(const Op& op, int index, const void* given, void* made) {
    Member& member = members_[index];
    const NuwaOp& told = op.told;
    const int first = share(told.side, index), last = share(told.side, index + 1);
    switch (told.kind) {
      case kTakeFeatures: return take(op, index, 1, [&](int cell, float* to) {
        read(static_cast<const float*>(given), cell, told.in, to);
      });
      case kTakePixels: return take(op, index, 1, [&](int cell, float* to) {
        const auto* from = static_cast<const std::uint8_t*>(given);
        for (int c = 0; c < told.in; ++c)
          to[c] = from[static_cast<std::size_t>(cell) * told.in + c] / 127.5f - 1.f;
      });
      case kTakeClasses: return take(op, index, 1, [&](int cell, float* to) {
        const int chosen = static_cast<const std::uint8_t*>(given)[cell];
        for (int c = 0; c < told.in; ++c) to[c] = c == chosen;
      });
      case kCopy:
      case kDouble: return take(op, index, told.kind == kDouble ? 2 : 1, [&](int cell, float* to) {
        read(maps_[told.from].get(), cell, told.in, to);
      });
      case kNormalize: return normalize(op, first, last, member);
      case kAttend: return attend(op, first, last, member);
      case kConvolve:
        if constexpr (kNarrow)
          return convolve_strips(op, index);
        else
          return convolve(op, index);
      case kGivePixels: return give_pixels(op, first, last, static_cast<std::uint8_t*>(made));
      case kGiveNearest: return give_nearest(op, index, static_cast<std::int32_t*>(made));
    }
  }

  int share(int count, int index) const {
    return static_cast<int>(static_cast<long>(count) * index / team_.working());
  }

  // Channels of a cell of what convolutions read.
  static int stored(int channels) { return kNarrow ? whole_chunks(channels) : channels; }

  static std::size_t place(int y, int x, int side, int channels) {
    return (static_cast<std::size_t>(y + 1) * (side + 2) + x + 1) * channels;
  }

  void put(std::size_t at, Floats value) {
    if constexpr (kNarrow)
      store_fast(input_.get() + at, value);
    else
      store(input_.get() + at, value);
  }

  // Zeros around rows [first, last) of what convolutions read.
  void clear_border(int side, int channels, int first, int last) {
    if (first == last) return;
    const auto clear = [&](std::size_t from, std::size_t size) {
      std::memset(static_cast<void*>(input_.get() + from), 0, size * sizeof(Input));
    };
    const std::size_t row = static_cast<std::size_t>(side + 2) * channels;
    if (!first) clear(0, row);
    if (last == side) clear((side + 1) * row, row);
    for (int y = first; y < last; ++y) {
      clear((y + 1) * row, channels);
      clear((y + 2) * row - channels, channels);
    }
  }

  static void read(const float* from, int cell, int channels, float* to) {
    std::memcpy(to, from + static_cast<std::size_t>(cell) * channels, channels * sizeof(float));
  }

  // What convolutions read from now on, every cell `times` times in both directions. read_cell(cell,
  // to) reads the channels, of any number.
  template <class Read>
  void take(const Op& op, int index, int times, Read read_cell) {
    const int side = times * op.told.side, channels = stored(op.told.in);
    const int first = share(side, index), last = share(side, index + 1);
    clear_border(side, channels, first, last);
    float* cell = members_[index].cell.get();
    std::memset(cell, 0, whole_chunks(op.told.in) * sizeof(float));
    for (int y = first; y < last; ++y)
      for (int x = 0; x < side; ++x) {
        if (x % times == 0) read_cell(y / times * op.told.side + x / times, cell);
        const std::size_t at = place(y, x, side, channels);
        if constexpr (kNarrow)
          for (int c = 0; c < channels; c += kLanes) put(at + c, load(cell + c));
        else
          std::memcpy(input_.get() + at, cell, channels * sizeof(float));
      }
  }

  // Sums are made row by row and these added up in order, so that they do not depend on threads.
  void normalize(const Op& op, int first, int last, Member& member) {
    const NuwaOp& told = op.told;
    const int side = told.side, channels = told.in;
    const std::size_t row = static_cast<std::size_t>(side) * channels;
    const float* from = maps_[told.from].get();
    float *mean = member.mean.get(), *scale = member.scale.get();
    const auto sum_rows = [&](float* to, auto value) {
      for (int y = first; y < last; ++y)
        for (int c = 0; c < channels; c += kLanes) {
          Floats total{};
          const float* x = from + y * row + c;
          for (int i = 0; i < side; ++i, x += channels) total += value(load(x), c);
          store(to + static_cast<std::size_t>(y) * channels + c, total);
        }
      team_.meet();
    };
    sum_rows(sums_.get(), [](Floats x, int) { return x; });
    by_group(sums_.get(), side, channels, mean);
    sum_rows(squares_.get(), [mean](Floats x, int c) {
      const Floats centred = x - load(mean + c);
      return centred * centred;
    });
    by_group(squares_.get(), side, channels, scale);
    for (int c = 0; c < channels; ++c)
      scale[c] = op.weight[c] / std::sqrt(scale[c] + kGroupEpsilon);
    clear_border(side, channels, first, last);
    for (int y = first; y < last; ++y)
      for (int x = 0; x < side; ++x) {
        const float* cell = from + y * row + static_cast<std::size_t>(x) * channels;
        const std::size_t at = place(y, x, side, channels);
        for (int c = 0; c < channels; c += kLanes) {
          const Floats normed = (load(cell + c) - load(mean + c)) * load(scale + c) +
                                load(op.bias.get() + c);
          put(at + c, told.silu ? activated(normed) : normed);
        }
      }
  }

  static Floats activated(Floats x) { return kNarrow ? silu_for_bfloat(x) : silu(x); }

  // Means over all cells and the channels of a group, for each of its channels.
  static void by_group(const float* rows, int side, int channels, float* means) {
    const int each = channels / kGroups;
    const double count = static_cast<double>(side) * side * each;
    for (int group = 0; group < kGroups; ++group) {
      double total = 0;
      for (int y = 0; y < side; ++y)
        for (int c = group * each; c < (group + 1) * each; ++c)
          total += rows[static_cast<std::size_t>(y) * channels + c];
      for (int c = group * each; c < (group + 1) * each; ++c)
        means[c] = static_cast<float>(total / count);
    }
  }

  void attend(const Op& op, int first, int last, Member& member) {
    const NuwaOp& told = op.told;
    const int side = told.side, channels = told.in;
    clear_border(side, channels, first, last);
    member.window.clear();
    for (int cell = 0; cell < side * side; ++cell) member.window.add(cell, 0);
    for (int y = first; y < last; ++y)
      for (int x = 0; x < side; ++x) {
        const std::size_t cell = static_cast<std::size_t>(y) * side + x;
        member.window.attend(maps_[told.from].get() + cell * channels, maps_[told.keys].get(),
                             maps_[told.values].get(), nullptr, 0, 1, channels, member.cell.get());
        const std::size_t at = place(y, x, side, channels);
        for (int c = 0; c < channels; c += kLanes) put(at + c, load(member.cell.get() + c));
      }
  }

  // Where a convolution begins to read for cell x of row y of what it makes.
  std::size_t corner(const Op& op, int y, int x) const {
    const NuwaOp& told = op.told;
    const int edge = told.kernel == 3 && told.stride == 1 ? -1 : 0;
    return place(y * told.stride + edge, x * told.stride + edge, told.side, op.channels);
  }

  void finish(const Op& op, int panel, float* out, Floats low, Floats high) const {
    const int left = op.told.out - panel * kPanel;
    low += load(op.bias.get() + static_cast<std::size_t>(panel) * kPanel);
    high += load(op.bias.get() + static_cast<std::size_t>(panel) * kPanel + kLanes);
    if (left >= kPanel) {
      store(out, op.told.adds ? load(out) + low : low);
      store(out + kLanes, op.told.adds ? load(out + kLanes) + high : high);
      return;
    }
    float both[kPanel];
    store(both, low);
    store(both + kLanes, high);
    for (int c = 0; c < left; ++c) out[c] = op.told.adds ? out[c] + both[c] : both[c];
  }

  // Rows of cells of one panel after another: of many panels each thread has some to itself.
  void convolve(const Op& op, int index) {
    const NuwaOp& told = op.told;
    const int side = op.to_side(), blocks = (side + kTileRows - 1) / kTileRows;
    const int apart = told.stride * op.channels;
    const std::size_t next_run = static_cast<std::size_t>(told.side + 2) * op.channels;
    float* to = maps_[told.to].get();
    Sums sums[kTileRows];
    const int last = share(op.panels * side, index + 1);
    for (int item = share(op.panels * side, index); item < last; ++item) {
      const int panel = item / side, y = item % side;
      for (int block = 0; block < blocks; ++block) {
        const int begin = side * block / blocks, end = side * (block + 1) / blocks;
        const TileRows cells{input_.get() + corner(op, y, begin), apart, told.kernel,
                             told.kernel * op.channels, next_run};
        kTiles[end - begin - 1](cells, op.weight.get() + panel * op.panel_size(), nullptr, sums);
        float* out = to + (static_cast<std::size_t>(y) * side + begin) * told.out + panel * kPanel;
        for (int i = 0; i < end - begin; ++i, out += told.out)
          finish(op, panel, out, sums[i][0], sums[i][1]);
      }
    }
  }

  // The same on tiles. Strips of a row, each for one tile, are taken two by two.
  void convolve_strips(const Op& op, int index) {
    const NuwaOp& told = op.told;
    const int side = op.to_side(), blocks = (side + kTileCells - 1) / kTileCells;
    const int strips = blocks * side, pairs = (strips + 1) / 2;
    const std::size_t next_run = static_cast<std::size_t>(told.side + 2) * op.channels;
    float* to = maps_[told.to].get();
    TileSizes sizes;
    alignas(64) CellSums sums;
    const auto begin = [&](int strip) { return side * (strip % blocks) / blocks; };
    const auto count = [&](int strip) {
      return side * (strip % blocks + 1) / blocks - begin(strip);
    };
    const auto input = [&](int strip) {
      return input_.get() + corner(op, strip / blocks, begin(strip));
    };
    const int last = share(op.panels * pairs, index + 1);
    for (int item = share(op.panels * pairs, index); item < last; ++item) {
      const int panel = item / pairs, strip = 2 * (item % pairs);
      const bool two = strip + 1 < strips;
      const Cells both{input(strip), two ? input(strip + 1) : nullptr, count(strip),
                       two ? count(strip + 1) : 0, told.stride * op.channels, told.kernel,
                       told.kernel * op.channels, next_run};
      const auto product = strip ? multiply<false> : multiply<true>;
      product(both, op.narrow.get() + panel * op.panel_size(), true, sizes, sums);
      for (int half = 0; half < 1 + two; ++half) {
        const int from = strip + half;
        const std::size_t cell = static_cast<std::size_t>(from / blocks) * side + begin(from);
        float* out = to + cell * told.out + panel * kPanel;
        for (int i = 0; i < count(from); ++i, out += told.out) {
          const float* sum = sums[half * kTileCells + i];
          finish(op, panel, out, load(sum), load(sum + kLanes));
        }
      }
    }
  }

  void give_pixels(const Op& op, int first, int last, std::uint8_t* pixels) const {
    const std::size_t row = static_cast<std::size_t>(op.told.side) * op.told.in;
    const float* from = maps_[op.told.from].get();
    for (std::size_t i = first * row; i < last * row; ++i) {
      const float value = std::nearbyint((from[i] + 1.f) * 127.5f);
      pixels[i] = value > 0.f ? static_cast<std::uint8_t>(std::min(value, 255.f)) : 0;
    }
  }

  // Of rows that are as near, the first. Where a cell is no number, row 0.
  void give_nearest(const Op& op, int index, std::int32_t* nearest) const {
    const NuwaOp& told = op.told;
    const int count = told.side * told.side, last = share(count, index + 1);
    Sums sums[kTileRows];
    for (int begin = share(count, index); begin < last; begin += kTileRows) {
      const int here = std::min(last - begin, kTileRows);
      const float* from = maps_[told.from].get() + static_cast<std::size_t>(begin) * told.in;
      const TileRows cells{from, told.in, 1, told.in, 0};
      Floats best[kTileRows][2];
      Ints where[kTileRows][2] = {};
      for (int i = 0; i < here; ++i) best[i][0] = best[i][1] = all(-INFINITY);
      for (int panel = 0; panel < op.panels; ++panel) {
        const std::size_t output = static_cast<std::size_t>(panel) * kPanel;
        kTiles[here - 1](cells, op.weight.get() + output * told.in, nullptr, sums);
        for (int i = 0; i < here; ++i)
          for (int half = 0; half < 2; ++half) {
            const Floats near = sums[i][half] + load(op.bias.get() + output + half * kLanes);
            const Ints nearer = near > best[i][half];
            best[i][half] = nearer ? near : best[i][half];
            where[i][half] = nearer ? where[i][half] - where[i][half] + panel : where[i][half];
          }
      }
      for (int i = 0; i < here; ++i) {
        float top = -INFINITY;
        std::int32_t chosen = 0;
        for (int half = 0; half < 2; ++half)
          for (int lane = 0; lane < kLanes; ++lane) {
            const std::int32_t row = where[i][half][lane] * kPanel + half * kLanes + lane;
            const float near = best[i][half][lane];
            if (near > top || (near == top && row < chosen)) {
              top = near;
              chosen = row;
            }
          }
        nearest[begin + i] = chosen < told.out ? chosen : 0;
      }
    }
  }

  std::vector<Op> ops_;
  std::vector<Array<float>> maps_;
  Array<Input> input_;           // what convolutions read, with its border
  Array<float> sums_, squares_;  // of a norm, by row and channel
  Team& team_;
  std::vector<Member> members_;
};

}  // namespace
}  // namespace nuwa

void* nuwa_team_new(std::int32_t threads) {
  try {
    return new nuwa::Team(threads);
  } catch (...) {
    return nullptr;
  }
}

void nuwa_team_free(void* team) { delete static_cast<nuwa::Team*>(team); }

void* nuwa_convnet_new(const NuwaOp* ops, std::int32_t count, void* team, std::int32_t narrow) {
  try {
    nuwa::Team& threads = *static_cast<nuwa::Team*>(team);
    nuwa::ConvNet* made = nullptr;
    if (narrow && nuwa::has_tiles())
      made = new nuwa::ConvNetOf<nuwa::BFloat>(ops, count, threads);
    else
      made = new nuwa::ConvNetOf<float>(ops, count, threads);
    return made;
  } catch (...) {
    return nullptr;
  }
}

std::int32_t nuwa_convnet_run(void* convnet, const void* given, std::int32_t threads, void* made) {
  try {
    static_cast<nuwa::ConvNet*>(convnet)->run(given, threads, made);
    return 0;
  } catch (...) {
    return 1;
  }
}

void nuwa_convnet_free(void* convnet) { delete static_cast<nuwa::ConvNet*>(convnet); }
