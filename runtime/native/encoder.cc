// The text and the visual encoder on a CPU: transformer blocks over rows that see each other, and
// the keys and values that the decoder's cross attention makes of the result.
#include "encoder_abi.h"

#include <algorithm>
#include <vector>

#include "attention.h"
#include "layers.h"
#include "team.h"

namespace nuwa {
namespace {

struct Block {
  Norm norm, ff_norm;
  Linear qkv, attended, ff_in, ff_out;
  Array<float> bias;
};

class Encoder {
 public:
  Encoder(const NuwaEncoderShape& shape, const NuwaEncoderWeights& weights, Team& team)
      : shape_(shape),
        ids_(copied(weights.ids, static_cast<std::size_t>(shape.ids) * shape.width)),
        positions_(
            copied(weights.positions, static_cast<std::size_t>(shape.positions) * shape.width)),
        norm_(copied_norm(weights.norm_weight, weights.norm_bias, shape.width)),
        project_(Linear::pack(weights.project, weights.project_bias, shape.out, shape.width)),
        team_(team),
        members_(team.size()) {
    for (int i = 0; i < shape.blocks; ++i) blocks_.push_back(packed(weights.blocks[i]));
    for (int i = 0; i < shape.layers; ++i)
      memory_.push_back(Linear::pack(weights.memory[i], nullptr, 2 * shape.out, shape.out));
    const int widest = std::max({shape.width, shape.hidden, shape.out});
    for (Member& member : members_)
      member.portion.unpacked.reserve(static_cast<std::size_t>(widest) * kPanel);
  }

  void run(const NuwaEncoding& call) {
    const std::size_t rows = call.rows, width = shape_.width;
    for (Array<float>* each : {&x_, &query_, &key_, &value_}) each->reserve(rows * width);
    const Block& block = blocks_.front();  // all have matrices of the same types
    normed_.reserve(rows, shape_.width, {&block.qkv, &block.ff_in, &project_});
    attended_.reserve(rows, shape_.width, {&block.attended});
    active_.reserve(rows, shape_.hidden, {&block.ff_out});
    projected_.reserve(rows, shape_.out, {&memory_.front()});
    const int seen = call.neighbours ? shape_.columns : call.rows;
    for (Member& member : members_) member.window.reserve(seen);
    team_.employ(call.threads);
    team_.run([&](int index) {
      Member& member = members_[index];
      member.portion.index = index;
      member.portion.working = team_.working();
      run(call, member);
    });
  }

 private:
  struct Member {
    Portion portion;
    Window window;
  };

  Block packed(const NuwaEncoderBlock& from) const {
    const int w = shape_.width, f = shape_.hidden;
    Block block;
    block.norm = copied_norm(from.norm_weight, from.norm_bias, w);
    block.ff_norm = copied_norm(from.ff_norm_weight, from.ff_norm_bias, w);
    block.qkv = Linear::pack(from.qkv, from.qkv_bias, 3 * w, w);
    block.attended = Linear::pack(from.attended, from.attended_bias, w, w);
    block.ff_in = shape_.gated
                      ? Linear::pack(from.ff_in, from.ff_in_bias, 2 * f, w, gated_order(f).data())
                      : Linear::pack(from.ff_in, from.ff_in_bias, f, w);
    block.ff_out = Linear::pack(from.ff_out, from.ff_out_bias, w, f);
    block.bias = copied_if_any(from.bias, static_cast<std::size_t>(shape_.heads) * shape_.columns);
    return block;
  }

  void run(const NuwaEncoding& call, Member& member) {
    const int first = member.portion.first(call.rows), last = member.portion.last(call.rows);
    embed(call, first, last);
    for (const Block& block : blocks_) {
      attend(call, block, member, first, last);
      feed_forward(call, block, member, first, last);
    }
    remember(call, member, first, last);
  }

  float* row(Array<float>& of, int index) const {
    return of.get() + static_cast<std::size_t>(index) * shape_.width;
  }

  void embed(const NuwaEncoding& call, int first, int last) {
    const int width = shape_.width;
    for (int index = first; index < last; ++index) {
      float* x = row(x_, index);
      std::memcpy(x, row(ids_, call.ids[index]), width * sizeof(float));
      const float* place[3] = {row(positions_, index), nullptr, nullptr};
      const int axes = call.coordinates ? 3 : 1;
      for (int axis = 0; axis < 3 && call.coordinates; ++axis)
        place[axis] = row(positions_, call.coordinates[3 * index + axis] +
                                          shape_.position_starts[axis]);
      for (int i = 0; i < width; i += kLanes) {
        Floats position = load(place[0] + i);
        for (int axis = 1; axis < axes; ++axis) position += load(place[axis] + i);
        store(x + i, load(x + i) + position);
      }
    }
  }

  void normalize(const Norm& norm, const Linear& next, int first, int last) {
    for (int index = first; index < last; ++index) {
      layer_norm(row(x_, index), norm, shape_.width, normed_.row(index));
      normed_.finish(index, next);
    }
    team_.meet();
  }

  void attend(const NuwaEncoding& call, const Block& block, Member& member, int first, int last) {
    const int width = shape_.width, columns = shape_.columns;
    normalize(block.norm, block.qkv, first, last);
    Array<float>* const parts[3] = {&query_, &key_, &value_};
    product(normed_, call.rows, block.qkv, member.portion,
            [&](int index, int p, Floats low, Floats high) {
              const int part = p * kPanel / width;
              float* to = row(*parts[part], index) + p * kPanel - part * width;
              store(to, low);
              store(to + kLanes, high);
            });
    team_.meet();
    Window& window = member.window;
    if (!call.neighbours) {
      window.clear();
      for (int i = 0; i < call.rows; ++i) window.add(i, 0);
    }
    for (int index = first; index < last; ++index) {
      if (call.neighbours) {
        window.clear();
        window.add_all(call.neighbours + static_cast<std::size_t>(index) * columns, columns, 0);
      }
      window.attend(row(query_, index), key_.get(), value_.get(), block.bias.get(), columns,
                    shape_.heads, width / shape_.heads, attended_.row(index));
      attended_.finish(index, block.attended);
    }
    team_.meet();
    add_product(attended_, call.rows, block.attended, member.portion, x_.get(), width);
    team_.meet();
  }

  void feed_forward(const NuwaEncoding& call, const Block& block, Member& member, int first,
                    int last) {
    normalize(block.ff_norm, block.ff_in, first, last);
    product(normed_, call.rows, block.ff_in, member.portion,
            [&](int index, int p, Floats low, Floats high) {
              if (shape_.gated) {
                store(active_.row(index) + p * kLanes, low * gelu(high));
              } else {
                store(active_.row(index) + p * kPanel, gelu(low));
                store(active_.row(index) + p * kPanel + kLanes, gelu(high));
              }
            });
    team_.meet();
    if (block.ff_out.needs_finished()) {
      for (int index = first; index < last; ++index) active_.finish(index, block.ff_out);
      team_.meet();
    }
    add_product(active_, call.rows, block.ff_out, member.portion, x_.get(), shape_.width);
    team_.meet();
  }

  void remember(const NuwaEncoding& call, Member& member, int first, int last) {
    const int out = shape_.out;
    normalize(norm_, project_, first, last);
    product(normed_, call.rows, project_, member.portion,
            [&](int index, int p, Floats low, Floats high) {
              store(projected_.row(index) + p * kPanel, low);
              store(projected_.row(index) + p * kPanel + kLanes, high);
            });
    team_.meet();
    for (int index = first; index < last; ++index) projected_.finish(index, memory_.front());
    team_.meet();
    for (std::size_t layer = 0; layer < memory_.size(); ++layer)
      product(projected_, call.rows, memory_[layer], member.portion,
              [&](int index, int p, Floats low, Floats high) {
                const bool is_value = p * kPanel >= out;
                float* to = is_value ? call.values[layer] : call.keys[layer];
                to += static_cast<std::size_t>(call.entries[index]) * out + p * kPanel -
                      (is_value ? out : 0);
                store(to, low);
                store(to + kLanes, high);
              });
  }

  const NuwaEncoderShape shape_;
  Array<float> ids_, positions_;
  std::vector<Block> blocks_;
  Norm norm_;
  Linear project_;
  std::vector<Linear> memory_;
  Team& team_;
  std::vector<Member> members_;
  Array<float> x_, query_, key_, value_;
  Rows normed_, attended_, active_, projected_;
};

}  // namespace
}  // namespace nuwa

void* nuwa_encoder_new(const NuwaEncoderShape* shape, const NuwaEncoderWeights* weights,
                       void* team) {
  try {
    return new nuwa::Encoder(*shape, *weights, *static_cast<nuwa::Team*>(team));
  } catch (...) {
    return nullptr;
  }
}

std::int32_t nuwa_encoder_run(void* encoder, const NuwaEncoding* encoding) {
  try {
    static_cast<nuwa::Encoder*>(encoder)->run(*encoding);
    return 0;
  } catch (...) {
    return 1;
  }
}

void nuwa_encoder_free(void* encoder) { delete static_cast<nuwa::Encoder*>(encoder); }
