// decoder_step on a CPU: what export/graphs.py exports, as one function over packed weights and the
// streams that it decodes.
//
// Threads share every phase: products by panels of outputs, everything else by rows. They meet
// where a phase reads what another thread wrote. Keys and values go straight from the product into
// the cache.
#pragma once

#include <vector>

#include "attention.h"
#include "decoder_abi.h"
#include "layers.h"
#include "linear.h"
#include "memory.h"
#include "sampling.h"
#include "team.h"
#include "vector.h"

namespace nuwa {

struct Layer {
  Norm self_norm, cross_norm, ff_norm;
  Linear self_qkv, self_out, cross_q, cross_out, ff_in, ff_out;
  Array<float> bias, cross_bias;
  int first_column, last_column;  // of the neighbours that it reads
};

class Decoder {
 public:
  // Sizes must fit: width a multiple of kPanel, hidden and head_dim multiples of kLanes.
  Decoder(const NuwaShape& shape, const NuwaWeights& weights, int threads);

  void step(NuwaStep& step);

 private:
  // A row of a call: a staged row of a stream, in one of its lanes.
  struct Row {
    const NuwaStream* stream;
    const NuwaLane* lane;
    int index;
  };
  // A row whose logits are needed. other: of the draws, the one that its logits are moved away
  // from, or -1; draws: whether a token is drawn from them; finite: whether they are numbers.
  struct Draw {
    int row, other, part;
    bool draws, finite;
  };
  // One thread's part of a step: its rows and draws, and what it needs to itself.
  struct Member {
    Portion portion;
    int first_row, last_row, first_draw, last_draw;
    Window window;
    SamplingScratch sampling;
  };

  void make_room(std::size_t rows, std::size_t draws);
  void make_room(const NuwaStep& step);
  void run_call(const NuwaStep& step, NuwaPart* parts);
  void lay_out(const NuwaPart* parts, int count);
  void run(const NuwaStep& call, Member& member);
  void embed(const Member& member);
  void attend_to_cache(const NuwaStep& call, int layer, Member& member);
  void attend_to_conditions(const NuwaStep& call, int layer, Member& member);
  void feed_forward(const Layer& layer, Member& member);
  void draw_tokens(const NuwaStep& call, Member& member);

  void normalize(const Norm& norm, const Linear& next, const Member& member);

  const int width_, heads_, head_dim_, hidden_, codebook_, bos_, cross_table_;
  int position_starts_[3];
  Array<float> tokens_, positions_;
  std::vector<Layer> layers_;
  Norm head_norm_;
  Linear head_;
  int logits_stride_;

  Team team_;
  std::vector<Member> members_;
  std::vector<Row> rows_;
  std::vector<Draw> draws_;
  // By row of a call: the residual stream, its norm, queries, what attention gives, the
  // feed-forward's hidden values; by draw: logits. normed_ is by draw for the last norm.
  Array<float> x_, query_, logits_;
  Rows normed_, attended_, active_;
};

}  // namespace nuwa
