#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace nuwa {
namespace {

Layer packed(const NuwaLayer& from, const NuwaShape& shape, int index) {
  const int d = shape.width, f = shape.hidden;
  Layer layer;
  layer.first_column = shape.column_bounds[2 * index];
  layer.last_column = shape.column_bounds[2 * index + 1];
  layer.self_norm = copied_norm(from.self_norm_weight, from.self_norm_bias, d);
  layer.self_qkv = Linear::pack(from.self_qkv, nullptr, 3 * d, d);
  layer.self_out = Linear::pack(from.self_out, from.self_out_bias, d, d);
  layer.cross_norm = copied_norm(from.cross_norm_weight, from.cross_norm_bias, d);
  layer.cross_q = Linear::pack(from.cross_q, nullptr, d, d);
  layer.cross_out = Linear::pack(from.cross_out, from.cross_out_bias, d, d);
  layer.ff_norm = copied_norm(from.ff_norm_weight, from.ff_norm_bias, d);
  layer.ff_in = Linear::pack(from.ff_in, from.ff_in_bias, 2 * f, d, gated_order(f).data());
  layer.ff_out = Linear::pack(from.ff_out, from.ff_out_bias, d, f);
  const std::size_t columns = layer.last_column - layer.first_column;
  layer.bias = copied_if_any(from.bias, shape.heads * columns);
  const std::size_t table = shape.cross_table;
  layer.cross_bias = copied_if_any(from.cross_bias, shape.heads * table);
  return layer;
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
      positions_(
          copied(weights.positions, static_cast<std::size_t>(shape.positions) * shape.width)),
      head_norm_(copied_norm(weights.head_norm_weight, weights.head_norm_bias, width_)),
      head_(Linear::pack(weights.head, weights.head_bias, codebook_, width_)),
      logits_stride_(head_.panels * kPanel),
      team_(threads),
      members_(threads) {
  std::memcpy(position_starts_, shape.position_starts, sizeof position_starts_);
  for (int i = 0; i < shape.layers; ++i)
    layers_.push_back(packed(weights.layers[i], shape, i));
  for (Member& member : members_)
    member.portion.unpacked.reserve(static_cast<std::size_t>(std::max(width_, hidden_)) * kPanel);
  make_room(shape.rows, shape.rows);
}

void Decoder::step(NuwaStep& step) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::duration taken) {
    return std::chrono::duration<double>(taken).count();
  };
  make_room(step);
  const Clock::time_point began = Clock::now();
  Clock::time_point before = began;
  for (step.done = 0; step.done < step.call_count;) {
    run_call(step, step.parts + static_cast<std::size_t>(step.done) * step.part_count);
    const Clock::time_point now = Clock::now();
    step.seconds[step.done++] = seconds(now - before);
    before = now;
    if (seconds(now - began) >= step.most_seconds) return;
    if (step.stop && __atomic_load_n(step.stop, __ATOMIC_RELAXED)) return;
  }
}

void Decoder::run_call(const NuwaStep& step, NuwaPart* parts) {
  team_.employ(__atomic_load_n(step.threads, __ATOMIC_RELAXED));
  lay_out(parts, step.part_count);
  team_.run([&](int member) { run(step, members_[member]); });
  std::size_t draw = 0;
  for (int i = 0; i < step.part_count; ++i) {
    parts[i].finite = 1;
    for (; draw < draws_.size() && draws_[draw].part == i; ++draw)
      parts[i].finite &= draws_[draw].finite;
  }
}

void Decoder::make_room(std::size_t rows, std::size_t draws) {
  x_.reserve(rows * width_);
  query_.reserve(rows * width_);
  const Layer& layer = layers_.front();  // all have matrices of the same types
  normed_.reserve(rows, width_, {&layer.self_qkv, &layer.cross_q, &layer.ff_in, &head_});
  attended_.reserve(rows, width_, {&layer.self_out, &layer.cross_out});
  active_.reserve(rows, hidden_, {&layer.ff_out});
  logits_.reserve(draws * logits_stride_);
}

// Room for the widest of the calls, before anything is written.
void Decoder::make_room(const NuwaStep& step) {
  std::size_t most = 0;
  int text = 0;
  for (int call = 0; call < step.call_count; ++call) {
    std::size_t rows = 0;
    for (int i = 0; i < step.part_count; ++i) {
      const NuwaPart& part = step.parts[static_cast<std::size_t>(call) * step.part_count + i];
      rows += static_cast<std::size_t>(part.count) * part.stream->lane_count;
      for (int lane = 0; lane < part.stream->lane_count; ++lane)
        text = std::max(text, part.stream->lanes[lane].text_length);
    }
    most = std::max(most, rows);
  }
  rows_.reserve(most);
  draws_.reserve(most);
  make_room(most, most);
  for (Member& member : members_) {
    member.window.reserve(std::max(step.neighbour_columns, text + step.visual_columns));
    member.sampling.reserve(codebook_, logits_stride_);
  }
}

// Which rows the call has, which of them are drawn, and whose they are.
void Decoder::lay_out(const NuwaPart* parts, int count) {
  rows_.clear();
  draws_.clear();
  for (int i = 0; i < count; ++i) {
    const NuwaPart& part = parts[i];
    const NuwaStream& stream = *part.stream;
    int drawn = 0;  // a lane
    for (int row = part.first; row < part.first + part.count; ++row) drawn += stream.given[row] < 0;
    for (int lane = 0; lane < stream.lane_count; ++lane) {
      const bool guided = stream.lane_count > 1 && !lane;
      for (int row = part.first; row < part.first + part.count; ++row) {
        if (stream.given[row] < 0) {
          const int here = static_cast<int>(draws_.size());
          const int row_of_call = static_cast<int>(rows_.size());
          draws_.push_back({row_of_call, guided ? here + drawn : -1, i, !lane, true});
        }
        rows_.push_back({&stream, &stream.lanes[lane], row});
      }
    }
  }
  const int rows = static_cast<int>(rows_.size()), draws = static_cast<int>(draws_.size());
  for (int i = 0; i < team_.working(); ++i) {
    Member& member = members_[i];
    member.portion.index = i;
    member.portion.working = team_.working();
    member.first_row = member.portion.first(rows);
    member.last_row = member.portion.last(rows);
    member.first_draw = member.portion.first(draws);
    member.last_draw = member.portion.last(draws);
  }
}

void Decoder::run(const NuwaStep& call, Member& member) {
  embed(member);
  for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
    attend_to_cache(call, layer, member);
    attend_to_conditions(call, layer, member);
    feed_forward(layers_[layer], member);
  }
  draw_tokens(call, member);
}

void Decoder::embed(const Member& member) {
  for (int row = member.first_row; row < member.last_row; ++row) {
    const NuwaStream& stream = *rows_[row].stream;
    const int index = rows_[row].index;
    const std::int32_t fed = stream.fed[index];
    const std::int32_t token = fed < 0 ? -1 - fed : stream.tokens[fed];
    float* x = x_.get() + static_cast<std::size_t>(row) * width_;
    std::memcpy(x, tokens_.get() + static_cast<std::size_t>(token) * width_,
                width_ * sizeof(float));
    if (token == bos_) continue;
    const float* place[3];
    for (int axis = 0; axis < 3; ++axis) {
      const std::size_t entry = stream.coordinates[3 * index + axis] + position_starts_[axis];
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
  normalize(layer.self_norm, layer.self_qkv, member);
  team_.meet();
  const int rows = static_cast<int>(rows_.size());
  const auto keep = [&](int row, int p, Floats low, Floats high) {
    const int column = p * kPanel;
    float* to = query_.get() + static_cast<std::size_t>(row) * width_ + column;
    if (column >= width_) {
      const Row& at = rows_[row];
      const std::int32_t entry = at.stream->write_index[at.index];
      if (entry < 0) return;
      const int part = column / width_;
      to = (part == 1 ? keys : values) + at.lane->cache_slot * slot_size +
           static_cast<std::size_t>(entry) * width_ + (column - part * width_);
    }
    store(to, low);
    store(to + kLanes, high);
  };
  product(normed_, rows, layer.self_qkv, member.portion, keep);
  team_.meet();
  const int columns = layer.last_column - layer.first_column;
  for (int row = member.first_row; row < member.last_row; ++row) {
    const Row& at = rows_[row];
    const std::size_t slot = at.lane->cache_slot * slot_size;
    const std::size_t nearby = static_cast<std::size_t>(at.index) * call.neighbour_columns;
    member.window.clear();
    member.window.add_all(at.stream->neighbours + nearby + layer.first_column, columns, 0);
    member.window.attend(query_.get() + static_cast<std::size_t>(row) * width_, keys + slot,
                         values + slot, layer.bias.get(), columns, heads_, head_dim_,
                         attended_.row(row));
    attended_.finish(row, layer.self_out);
  }
  team_.meet();
  add_product(attended_, rows, layer.self_out, member.portion, x_.get(), width_);
  team_.meet();
}

void Decoder::attend_to_conditions(const NuwaStep& call, int index, Member& member) {
  const Layer& layer = layers_[index];
  const std::size_t slot_size = static_cast<std::size_t>(call.condition_entries) * width_;
  normalize(layer.cross_norm, layer.cross_q, member);
  team_.meet();
  const int rows = static_cast<int>(rows_.size());
  const auto ask = [&](int row, int p, Floats low, Floats high) {
    float* to = query_.get() + static_cast<std::size_t>(row) * width_ + p * kPanel;
    store(to, low);
    store(to + kLanes, high);
  };
  product(normed_, rows, layer.cross_q, member.portion, ask);
  team_.meet();
  const int text_column = cross_table_ - 1;
  for (int row = member.first_row; row < member.last_row; ++row) {
    const Row& at = rows_[row];
    const std::size_t slot = at.lane->condition_slot * slot_size;
    member.window.clear();
    for (int j = 0; j < at.lane->text_length; ++j)
      member.window.add(at.lane->text_first + j, text_column);
    if (at.stream->visual) {
      const std::size_t seen = static_cast<std::size_t>(at.index) * call.visual_columns;
      member.window.add_all(at.stream->visual + seen, call.visual_columns, 0);
    }
    member.window.attend(query_.get() + static_cast<std::size_t>(row) * width_,
                         call.cross_keys[index] + slot, call.cross_values[index] + slot,
                         layer.cross_bias.get(), cross_table_, heads_, head_dim_,
                         attended_.row(row));
    attended_.finish(row, layer.cross_out);
  }
  team_.meet();
  add_product(attended_, rows, layer.cross_out, member.portion, x_.get(), width_);
  team_.meet();
}

void Decoder::feed_forward(const Layer& layer, Member& member) {
  normalize(layer.ff_norm, layer.ff_in, member);
  team_.meet();
  const int rows = static_cast<int>(rows_.size());
  const auto gated = [&](int row, int p, Floats value, Floats gate) {
    store(active_.row(row) + p * kLanes, value * gelu(gate));
  };
  product(normed_, rows, layer.ff_in, member.portion, gated);
  team_.meet();
  if (layer.ff_out.needs_finished()) {
    for (int row = member.first_row; row < member.last_row; ++row)
      active_.finish(row, layer.ff_out);
    team_.meet();
  }
  add_product(active_, rows, layer.ff_out, member.portion, x_.get(), width_);
  team_.meet();
}

void Decoder::draw_tokens(const NuwaStep& call, Member& member) {
  for (int draw = member.first_draw; draw < member.last_draw; ++draw) {
    const float* x = x_.get() + static_cast<std::size_t>(draws_[draw].row) * width_;
    layer_norm(x, head_norm_, width_, normed_.row(draw));
    normed_.finish(draw, head_);
  }
  team_.meet();
  const int draws = static_cast<int>(draws_.size());
  product(normed_, draws, head_, member.portion, [&](int draw, int p, Floats low, Floats high) {
    float* to = logits_.get() + static_cast<std::size_t>(draw) * logits_stride_ + p * kPanel;
    store(to, low);
    store(to + kLanes, high);
  });
  team_.meet();
  float* guided = member.sampling.guided.get();
  for (int draw = member.first_draw; draw < member.last_draw; ++draw) {
    Draw& at = draws_[draw];
    const Row& row = rows_[at.row];
    const NuwaStream& stream = *row.stream;
    const float* logits = logits_.get() + static_cast<std::size_t>(draw) * logits_stride_;
    if (at.other >= 0) {
      const float* other = logits_.get() + static_cast<std::size_t>(at.other) * logits_stride_;
      for (int i = 0; i < logits_stride_; i += kLanes) {
        const Floats from = load(other + i);
        store(guided + i, from + stream.guidance * (load(logits + i) - from));
      }
      logits = guided;
    }
    if (call.logits)
      std::memcpy(call.logits + static_cast<std::size_t>(at.row) * codebook_, logits,
                  codebook_ * sizeof(float));
    if (!at.draws) continue;
    const Drawing drawing{stream.temperature, stream.top_k, stream.top_p,
                          stream.uniform[row.index]};
    at.finite = all_finite(logits, logits_stride_);
    stream.tokens[stream.place[row.index]] =
        nuwa::draw(logits, codebook_, drawing, member.sampling);
  }
  // Like what is drawn, what is given is put in its place when all rows have been fed.
  for (int row = member.first_row; row < member.last_row; ++row) {
    const NuwaStream& stream = *rows_[row].stream;
    const int index = rows_[row].index;
    if (rows_[row].lane == stream.lanes && stream.given[index] >= 0)
      stream.tokens[stream.place[index]] = stream.given[index];
  }
}

void Decoder::normalize(const Norm& norm, const Linear& next, const Member& member) {
  for (int row = member.first_row; row < member.last_row; ++row) {
    layer_norm(x_.get() + static_cast<std::size_t>(row) * width_, norm, width_, normed_.row(row));
    normed_.finish(row, next);
  }
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

std::int32_t nuwa_has_int8() { return nuwa::has_whole(); }

std::int32_t nuwa_has_tiles() { return nuwa::has_tiles(); }

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

std::int32_t nuwa_decoder_step(void* decoder, NuwaStep* step) {
  return guarded([&] { static_cast<nuwa::Decoder*>(decoder)->step(*step); });
}

std::int32_t nuwa_multiply(const float* from, std::int32_t rows, std::int32_t in, std::int32_t out,
                           const NuwaMatrix* matrix, float* to) {
  return guarded([&] {
    const nuwa::Linear linear = nuwa::Linear::pack(*matrix, nullptr, out, in);
    nuwa::Rows given;
    given.reserve(rows, in, {&linear});
    std::memcpy(given.row(0), from, static_cast<std::size_t>(rows) * in * sizeof(float));
    for (int row = 0; row < rows; ++row) given.finish(row, linear);
    nuwa::Array<float> unpacked(static_cast<std::size_t>(in) * nuwa::kPanel);
    nuwa::multiply(given, rows, linear, 0, linear.panels, unpacked.get(),
                   [&](int row, int p, nuwa::Floats low, nuwa::Floats high) {
                     float sums[nuwa::kPanel];
                     nuwa::store(sums, low);
                     nuwa::store(sums + nuwa::kLanes, high);
                     for (int i = 0; i < nuwa::kPanel && p * nuwa::kPanel + i < out; ++i)
                       to[static_cast<std::size_t>(row) * out + p * nuwa::kPanel + i] = sums[i];
                   });
  });
}

void nuwa_decoder_free(void* decoder) { delete static_cast<nuwa::Decoder*>(decoder); }
