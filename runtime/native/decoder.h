// decoder_step on a CPU: what export/graphs.py exports, as one function over packed weights.
//
// Threads share every phase: products by panels of outputs, everything else by rows. They meet
// where a phase reads what another thread wrote. Keys and values go straight from the product into
// the cache.
#pragma once

#include <vector>

#include "attention.h"
#include "decoder_abi.h"
#include "linear.h"
#include "memory.h"
#include "sampling.h"
#include "team.h"
#include "vector.h"

namespace nuwa {

struct Norm {
  Array<float> weight, bias;
};

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

  void step(const NuwaStep& call);

 private:
  // One thread's part of a step: its rows, and what it needs to itself.
  struct Member {
    int index, first_row, last_row;
    AttentionScratch attention;
    SamplingScratch sampling;
  };

  void reserve(const NuwaStep& call);
  void run(const NuwaStep& call, Member& member);
  void embed(const NuwaStep& call, const Member& member);
  void attend_to_cache(const NuwaStep& call, int layer, Member& member);
  void attend_to_conditions(const NuwaStep& call, int layer, Member& member);
  void feed_forward(const NuwaStep& call, const Layer& layer, const Member& member);
  void draw_tokens(const NuwaStep& call, Member& member);

  void normalize(const Norm& norm, const Member& member);
  template <class Done>
  void product(const Array<float>& rows, const NuwaStep& call, const Linear& linear,
               const Member& member, Done done);
  void add_product(const Array<float>& rows, const NuwaStep& call, const Linear& linear,
                   const Member& member);

  const int width_, heads_, head_dim_, hidden_, codebook_, bos_, cross_table_;
  int position_starts_[3];
  Array<float> tokens_, positions_;
  std::vector<Layer> layers_;
  Norm head_norm_;
  Linear head_;
  int logits_stride_;

  Team team_;
  std::vector<Member> members_;
  // By row of a call: the residual stream, its norm, queries, what attention gives, the
  // feed-forward's hidden values, logits.
  Array<float> x_, normed_, query_, attended_, active_, logits_;
};

}  // namespace nuwa
