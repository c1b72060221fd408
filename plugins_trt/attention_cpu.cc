// The kernels of attention.cu on a CPU: lane by lane what they do, in the same order. For tests on
// machines without a GPU, not for speed.
#include "attention_cpu.h"

#include "attention_core.h"

namespace nuwa {
namespace {

template <class T, int kHeadDim>
class Emulation {
 public:
  explicit Emulation(const AttentionCall& call)
      : call_(call), width_(static_cast<std::int64_t>(call.heads) * kHeadDim) {}

  void run() const {
    for (int row = 0; call_.writes() && row < call_.rows; ++row) write(row);
    for (int row = 0; row < call_.rows; ++row)
      for (int head = 0; head < call_.heads; ++head) attend(row, head);
  }

 private:
  static constexpr int kLanes = Split<T, kHeadDim>::kLanes, kGroups = Split<T, kHeadDim>::kGroups;
  static constexpr int kChannels = Split<T, kHeadDim>::kChannels;
  using Channels = float[kChannels];

  static bool within(std::int32_t index, std::int32_t size) { return index >= 0 && index < size; }
  // Whether a row may use an entry of its slot; as on a GPU, what is outside is as good as masked.
  bool usable(int row, std::int32_t index) const {
    return within(call_.slot[row], call_.slots) && within(index, call_.entries);
  }
  std::int64_t entry(int row, std::int32_t index) const {
    return (static_cast<std::int64_t>(call_.slot[row]) * call_.entries + index) * width_;
  }

  void write(int row) const {
    const std::int32_t index = call_.write_index[row];
    if (!usable(row, index)) return;
    const std::int64_t to = entry(row, index), from = row * width_;
    for (std::int64_t i = 0; i < width_; ++i) {
      static_cast<T*>(call_.key)[to + i] = static_cast<const T*>(call_.key_new)[from + i];
      static_cast<T*>(call_.value)[to + i] = static_cast<const T*>(call_.value_new)[from + i];
    }
  }

  static void load(const void* tensor, std::int64_t at, Channels& to) {
    Chunk<T> chunk;
    std::memcpy(&chunk, static_cast<const T*>(tensor) + at, sizeof chunk);
    unpack(chunk, to);
  }

  void attend(int row, int head) const {
    const std::int64_t at = static_cast<std::int64_t>(head) * kHeadDim;
    const float scale = kLog2E / std::sqrt(static_cast<float>(kHeadDim));
    Channels query[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      load(call_.query, row * width_ + at + lane * kChannels, query[lane]);
      for (float& channel : query[lane]) channel *= scale;
    }
    Partial<kChannels> partial[kGroups][kLanes];
    const std::int64_t first = static_cast<std::int64_t>(row) * call_.neighbours;
    for (int j = 0; j < call_.neighbours; ++j) {
      const std::int32_t index = call_.neighbour[first + j];
      if (!usable(row, index)) continue;
      Channels key, value;
      float scores[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        load(call_.key, entry(row, index) + at + lane * kChannels, key);
        scores[lane] = dot(query[lane], key);
      }
      for (int half = kLanes / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) scores[lane] += scores[lane + half];
      float score = scores[0];
      if (call_.bias)
        score += kLog2E * to_float(static_cast<const T*>(call_.bias)[head * call_.neighbours + j]);
      for (int lane = 0; lane < kLanes; ++lane) {
        load(call_.value, entry(row, index) + at + lane * kChannels, value);
        partial[j % kGroups][lane].add(score, value);
      }
    }
    for (int step = 1; step < kGroups; step *= 2)
      for (int group = 0; group < kGroups; group += 2 * step)
        for (int lane = 0; lane < kLanes; ++lane)
          partial[group][lane].merge(partial[group + step][lane]);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < kChannels; ++i)
        static_cast<T*>(call_.out)[row * width_ + at + lane * kChannels + i] =
            from_float<T>(partial[0][lane].mean(i));
  }

  const AttentionCall& call_;
  const std::int64_t width_;
};

template <class T>
void run(const AttentionCall& call) {
  if (call.head_dim == 32) Emulation<T, 32>(call).run();
  if (call.head_dim == 64) Emulation<T, 64>(call).run();
  if (call.head_dim == 128) Emulation<T, 128>(call).run();
}

}  // namespace

const char* attend_on_cpu(const AttentionCall& call) {
  if (const char* reason = unsupported(call)) return reason;
  switch (call.storage) {
    case Storage::kFloat32: run<float>(call); break;
    case Storage::kFloat16: run<Half>(call); break;
    case Storage::kBFloat16: run<BFloat16>(call); break;
    default: return "the storage type is none of fp32, fp16 and bf16";
  }
  return nullptr;
}

}  // namespace nuwa

extern "C" {

__attribute__((visibility("default"))) const char* nuwa_attend_on_cpu(
    const nuwa::AttentionCall* call) {
  return nuwa::attend_on_cpu(*call);
}

// `count` numbers there and back; storage as in nuwa::Storage, 16-bit ones.
__attribute__((visibility("default"))) void nuwa_convert(std::int32_t storage, std::int64_t count,
                                                         const float* from, std::uint16_t* stored,
                                                         float* back) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (storage == static_cast<std::int32_t>(nuwa::Storage::kFloat16)) {
      const nuwa::Half half = nuwa::from_float<nuwa::Half>(from[i]);
      stored[i] = half.bits, back[i] = nuwa::to_float(half);
    } else {
      const nuwa::BFloat16 half = nuwa::from_float<nuwa::BFloat16>(from[i]);
      stored[i] = half.bits, back[i] = nuwa::to_float(half);
    }
  }
}
}
