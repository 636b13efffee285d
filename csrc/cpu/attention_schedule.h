// attention: the cutting of a call into items, from its shape (and masks) alone.
#pragma once

#include <vector>

#include "attention.h"
#include "memory.h"

namespace hici::cpu {

// The segments of every row in ranks, and the columns behind the ranks where tokens are masked.
class Ranks {
 public:
  Ranks(const AttentionProblem& given, const AttentionCut& cut);
  AttentionProblem problem() const;
  bool some_masked() const { return !columns_.empty(); }

 private:
  AttentionProblem problem_;
  std::vector<int64_t> columns_;
  std::vector<AttentionSegment> segments_;
};

struct ForwardSchedule {
  ForwardSchedule(const AttentionProblem& problem, int64_t tile_rows);

  // the partial sums of a tile and kv head
  struct Merge {
    ForwardItem first;
    int64_t count;
  };
  bool few = false;  // items are for FewPath
  std::vector<ForwardItem> items;
  std::vector<Merge> merges;
  ForwardSizes sizes;
  int64_t partials = 0;
  double work = 0;  // multiplications
};

struct BackwardSchedule {
  // anew: facts are to be formed from scores where a segment has more than kExactKeys keys
  BackwardSchedule(const AttentionProblem& problem, int64_t block, bool anew);

  std::vector<BackwardItem> items;  // long ones first
  std::vector<BackwardItem> later;  // after all of those: kKeys items that want the facts kQueries items form
  std::vector<int64_t> tail_begin;   // per segment: the rank from which the next segment sees its tokens again
  BackwardSizes sizes;
  double work = 0;
};

}  // namespace hici::cpu
