#include "decoder.h"

#include <cmath>
#include <cstring>

namespace nuwa {
namespace {

constexpr float kNormEpsilon = 1e-5f;  // NORM_EPS of training/nuwa.py

Array<float> copied(const float* from, std::size_t size) {
  Array<float> made(size);
  std::memcpy(made.get(), from, size * sizeof(float));
  return made;
}

Array<float> copied_if_any(const float* from, std::size_t size) {
  return from ? copied(from, size) : Array<float>();
}

// Rows of ff_in so that a panel holds kLanes hidden values and their kLanes gates.
std::vector<int> gated_order(int hidden) {
  std::vector<int> order;
  for (int first = 0; first < hidden; first += kLanes)
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kLanes; ++i) order.push_back(half * hidden + first + i);
  return order;
}

Layer packed(const NuwaLayer& from, const NuwaShape& shape, int index) {
  const int d = shape.width, f = shape.hidden;
  const auto norm = [d](const float* weight, const float* bias) {
    return Norm{copied(weight, d), copied(bias, d)};
  };
  Layer layer;
  layer.first_column = shape.column_bounds[2 * index];
  layer.last_column = shape.column_bounds[2 * index + 1];
  layer.self_norm = norm(from.self_norm_weight, from.self_norm_bias);
  layer.self_qkv = Linear::pack(from.self_qkv, nullptr, 3 * d, d);
  layer.self_out = Linear::pack(from.self_out_weight, from.self_out_bias, d, d);
  layer.cross_norm = norm(from.cross_norm_weight, from.cross_norm_bias);
  layer.cross_q = Linear::pack(from.cross_q, nullptr, d, d);
  layer.cross_out = Linear::pack(from.cross_out_weight, from.cross_out_bias, d, d);
  layer.ff_norm = norm(from.ff_norm_weight, from.ff_norm_bias);
  layer.ff_in = Linear::pack(from.ff_in_weight, from.ff_in_bias, 2 * f, d, gated_order(f).data());
  layer.ff_out = Linear::pack(from.ff_out_weight, from.ff_out_bias, d, f);
  const std::size_t columns = layer.last_column - layer.first_column;
  layer.bias = copied_if_any(from.bias, shape.heads * columns);
  const std::size_t table = shape.cross_table;
  layer.cross_bias = copied_if_any(from.cross_bias, shape.heads * table);
  return layer;
}

void layer_norm(const float* x, const Norm& norm, int width, float* out) {
  Floats total{};
  for (int i = 0; i < width; i += kLanes) total += load(x + i);
  const float mean = sum(total) / width;
  Floats squares{};
  for (int i = 0; i < width; i += kLanes) {
    const Floats centred = load(x + i) - mean;
    squares += centred * centred;
  }
  const float scale = 1.f / std::sqrt(sum(squares) / width + kNormEpsilon);
  for (int i = 0; i < width; i += kLanes) {
    const Floats normed = (load(x + i) - mean) * scale;
    store(out + i, normed * load(norm.weight.get() + i) + load(norm.bias.get() + i));
  }
}

}  // namespace

Decoder::Decoder(const NuwaShape& shape, const NuwaWeights& weights, int threads)
    : width_(shape.width),
      heads_(shape.heads),
      head_dim_(shape.width / shape.heads),
      hidden_(shape.hidden),
      codebook_(shape.codebook),
      bos_(shape.bos),
      cross_table_(shape.cross_table),
      tokens_(copied(weights.tokens, static_cast<std::size_t>(shape.codebook + 1) * shape.width)),
      positions_(copied(weights.positions, static_cast<std::size_t>(shape.positions) * shape.width)),
      head_norm_{copied(weights.head_norm_weight, width_), copied(weights.head_norm_bias, width_)},
      head_(Linear::pack(weights.head_weight, weights.head_bias, codebook_, width_)),
      logits_stride_(head_.panels * kPanel),
      team_(threads),
      members_(threads) {
  std::memcpy(position_starts_, shape.position_starts, sizeof position_starts_);
  for (int i = 0; i < shape.layers; ++i)
    layers_.push_back(packed(weights.layers[i], shape, i));
}

void Decoder::step(const NuwaStep& call) {
  reserve(call);
  team_.run([&](int member) { run(call, members_[member]); });
}

void Decoder::reserve(const NuwaStep& call) {
  const std::size_t rows = call.rows;
  x_.reserve(rows * width_);
  normed_.reserve(rows * width_);
  query_.reserve(rows * width_);
  attended_.reserve(rows * width_);
  active_.reserve(rows * hidden_);
  logits_.reserve(rows * logits_stride_);
  for (int i = 0; i < team_.size(); ++i) {
    Member& member = members_[i];
    member.index = i;
    member.first_row = static_cast<int>(static_cast<long>(call.rows) * i / team_.size());
    member.last_row = static_cast<int>(static_cast<long>(call.rows) * (i + 1) / team_.size());
    member.attention.reserve(std::max(call.neighbour_columns, call.cross_neighbour_columns));
    member.sampling.reserve(codebook_, logits_stride_);
  }
}

void Decoder::run(const NuwaStep& call, Member& member) {
  embed(call, member);
  for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
    attend_to_cache(call, layer, member);
    attend_to_conditions(call, layer, member);
    feed_forward(call, layers_[layer], member);
  }
  draw_tokens(call, member);
}

void Decoder::embed(const NuwaStep& call, const Member& member) {
  for (int row = member.first_row; row < member.last_row; ++row) {
    float* x = x_.get() + static_cast<std::size_t>(row) * width_;
    const std::size_t token = call.tokens[row];
    std::memcpy(x, tokens_.get() + token * width_, width_ * sizeof(float));
    if (call.tokens[row] == bos_) continue;
    const float* place[3];
    for (int axis = 0; axis < 3; ++axis) {
      const std::size_t entry = call.coordinates[3 * row + axis] + position_starts_[axis];
      place[axis] = positions_.get() + entry * width_;
    }
    for (int i = 0; i < width_; i += kLanes)
      store(x + i, load(x + i) + (load(place[0] + i) + load(place[1] + i) + load(place[2] + i)));
  }
}

void Decoder::attend_to_cache(const NuwaStep& call, int index, Member& member) {
  const Layer& layer = layers_[index];
  float *keys = call.key_caches[index], *values = call.value_caches[index];
  const std::size_t slot_size = static_cast<std::size_t>(call.cache_entries) * width_;
  normalize(layer.self_norm, member);
  team_.meet();
  product(normed_, call, layer.self_qkv, member, [&](int row, int p, Floats low, Floats high) {
    const int column = p * kPanel;
    float* to = query_.get() + static_cast<std::size_t>(row) * width_ + column;
    if (column >= width_) {
      const std::int32_t entry = call.write_index[row];
      if (entry < 0) return;
      const int part = column / width_;
      to = (part == 1 ? keys : values) + call.slot[row] * slot_size +
           static_cast<std::size_t>(entry) * width_ + (column - part * width_);
    }
    store(to, low);
    store(to + kLanes, high);
  });
  team_.meet();
  const int columns = layer.last_column - layer.first_column;
  for (int row = member.first_row; row < member.last_row; ++row) {
    const std::size_t at = static_cast<std::size_t>(row) * width_;
    const std::size_t slot = call.slot[row] * slot_size;
    const std::int32_t* nearby = call.neighbours +
                                 static_cast<std::size_t>(row) * call.neighbour_columns +
                                 layer.first_column;
    const Window window{nearby, columns, layer.bias.get(), columns, nullptr};
    attend(query_.get() + at, keys + slot, values + slot, window, heads_, head_dim_,
           member.attention, attended_.get() + at);
  }
  team_.meet();
  add_product(attended_, call, layer.self_out, member);
  team_.meet();
}

void Decoder::attend_to_conditions(const NuwaStep& call, int index, Member& member) {
  const Layer& layer = layers_[index];
  const std::size_t slot_size = static_cast<std::size_t>(call.condition_entries) * width_;
  normalize(layer.cross_norm, member);
  team_.meet();
  product(normed_, call, layer.cross_q, member, [&](int row, int p, Floats low, Floats high) {
    float* to = query_.get() + static_cast<std::size_t>(row) * width_ + p * kPanel;
    store(to, low);
    store(to + kLanes, high);
  });
  team_.meet();
  for (int row = member.first_row; row < member.last_row; ++row) {
    const std::size_t at = static_cast<std::size_t>(row) * width_;
    const std::size_t slot = call.condition_slot[row] * slot_size;
    const int columns = call.cross_neighbour_columns;
    const std::int32_t* nearby = call.cross_neighbours + static_cast<std::size_t>(row) * columns;
    const Window window{nearby, columns, layer.cross_bias.get(), cross_table_, call.cross_columns};
    attend(query_.get() + at, call.cross_keys[index] + slot, call.cross_values[index] + slot,
           window, heads_, head_dim_, member.attention, attended_.get() + at);
  }
  team_.meet();
  add_product(attended_, call, layer.cross_out, member);
  team_.meet();
}

void Decoder::feed_forward(const NuwaStep& call, const Layer& layer, const Member& member) {
  normalize(layer.ff_norm, member);
  team_.meet();
  product(normed_, call, layer.ff_in, member, [&](int row, int p, Floats value, Floats gate) {
    store(active_.get() + static_cast<std::size_t>(row) * hidden_ + p * kLanes, value * gelu(gate));
  });
  team_.meet();
  add_product(active_, call, layer.ff_out, member);
  team_.meet();
}

void Decoder::draw_tokens(const NuwaStep& call, Member& member) {
  normalize(head_norm_, member);
  team_.meet();
  product(normed_, call, head_, member, [&](int row, int p, Floats low, Floats high) {
    float* to = logits_.get() + static_cast<std::size_t>(row) * logits_stride_ + p * kPanel;
    store(to, low);
    store(to + kLanes, high);
  });
  team_.meet();
  float* guided = member.sampling.guided.get();
  for (int row = member.first_row; row < member.last_row; ++row) {
    const float* logits = logits_.get() + static_cast<std::size_t>(row) * logits_stride_;
    if (call.unconditional_row[row] != row) {
      const std::size_t partner = call.unconditional_row[row];
      const float* other = logits_.get() + partner * logits_stride_;
      for (int i = 0; i < logits_stride_; i += kLanes) {
        const Floats from = load(other + i);
        store(guided + i, from + call.guidance[row] * (load(logits + i) - from));
      }
      logits = guided;
    }
    if (call.logits)
      std::memcpy(call.logits + static_cast<std::size_t>(row) * codebook_, logits,
                  codebook_ * sizeof(float));
    const Drawing drawing{call.temperature[row], call.top_k[row], call.top_p[row],
                          call.uniform[row]};
    call.next_tokens[row] = draw(logits, codebook_, drawing, member.sampling);
  }
}

void Decoder::normalize(const Norm& norm, const Member& member) {
  for (int row = member.first_row; row < member.last_row; ++row) {
    const std::size_t at = static_cast<std::size_t>(row) * width_;
    layer_norm(x_.get() + at, norm, width_, normed_.get() + at);
  }
}

template <class Done>
void Decoder::product(const Array<float>& rows, const NuwaStep& call, const Linear& linear,
                      const Member& member, Done done) {
  const int first = linear.panels * member.index / team_.size();
  const int last = linear.panels * (member.index + 1) / team_.size();
  multiply(rows.get(), call.rows, linear, first, last, done);
}

void Decoder::add_product(const Array<float>& rows, const NuwaStep& call, const Linear& linear,
                          const Member& member) {
  product(rows, call, linear, member, [&](int row, int p, Floats low, Floats high) {
    float* x = x_.get() + static_cast<std::size_t>(row) * width_ + p * kPanel;
    store(x, load(x) + low);
    store(x + kLanes, load(x + kLanes) + high);
  });
}

}  // namespace nuwa

namespace {

// 0 if it worked, 1 without enough memory or threads: nothing else throws here.
template <class Work>
std::int32_t guarded(Work work) {
  try {
    work();
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

std::int32_t nuwa_abi_version() { return kAbiVersion; }

std::int32_t nuwa_lanes() { return nuwa::kLanes; }

std::int32_t nuwa_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__clang__) || __GNUC__ < 12
  const bool has3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#else
  const bool has3 = __builtin_cpu_supports("x86-64-v3");
  const bool has4 = __builtin_cpu_supports("x86-64-v4");
#endif
  return has3 ? (has4 ? 4 : 3) : 0;
#else
  return 0;
#endif
}

void* nuwa_decoder_new(const NuwaShape* shape, const NuwaWeights* weights, std::int32_t threads) {
  nuwa::Decoder* made = nullptr;
  guarded([&] { made = new nuwa::Decoder(*shape, *weights, threads); });
  return made;
}

std::int32_t nuwa_decoder_step(void* decoder, const NuwaStep* step) {
  return guarded([&] { static_cast<nuwa::Decoder*>(decoder)->step(*step); });
}

void nuwa_decoder_free(void* decoder) { delete static_cast<nuwa::Decoder*>(decoder); }
