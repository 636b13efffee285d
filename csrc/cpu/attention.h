// attention: what a call is, and how it is cut into items that can run anywhere in any order.
//
// Tokens are numbered by rank: the position among the unmasked tokens of their row (the column where nothing is masked),
// so masks cost nothing inside the kernels and masked memory is never read. The keys of a segment form one list: global
// slots, local slots, then tokens in order of rank; an index into it is called j.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace hici::cpu {

enum class Element : int { kFloat32, kBfloat16, kFloat16 };

// [batch, seq, heads, dim], strides in elements, contiguous in dim.
struct Sequence4 {
  const void* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;
};

// Slots: [batch, (segments,) count, kv_heads, dim]; stride `segment` 0 = one set for all segments.
struct Slots {
  const void *k = nullptr, *v = nullptr;
  int64_t count = 0;
  int64_t k_batch = 0, k_segment = 0, k_slot = 0, k_head = 0;
  int64_t v_batch = 0, v_segment = 0, v_slot = 0, v_head = 0;
  bool per_segment = false;
};

// One segment of one row. Queries are the ranks [query_begin, query_end) of its tokens; it sees the tokens of ranks
// [key_begin, key_end), its own starting at own_begin (before it: recurrence).
struct AttentionSegment {
  int64_t batch, segment;
  int64_t query_begin, query_end;
  int64_t key_begin, own_begin, key_end;
  bool slots;
};

struct AttentionProblem {
  Element element;
  int64_t batch, queries, keys, heads, kv_heads, dim;  // queries: the last of the `keys` positions
  int64_t segment_total;                               // segments of a row, or of all documents
  Sequence4 q, k, v;
  Slots global, local;
  bool causal;
  double scale;
  // what the caller of attention_forward and attention_backward leaves empty
  const int64_t* columns = nullptr;  // [batch, keys]: column of every rank; null = the rank itself
  const AttentionSegment* segments = nullptr;
  int64_t segment_count = 0;

  int64_t group() const { return heads / kv_heads; }  // query heads of a kv head
  int64_t column(int64_t row, int64_t rank) const { return columns ? columns[row * keys + rank] : rank; }
};

// How the sequence is cut, as the public function takes it.
struct AttentionCut {
  int64_t segment_len = 0;     // 0 = one segment (per document)
  int64_t recurrence_len = 0;
  const int32_t* documents = nullptr;  // [document_count + 1] columns
  int64_t document_count = 0;
  const bool* prefix_mask = nullptr;  // [batch or 1, segments]
  int64_t prefix_batch = 0, prefix_segment = 0;
  // one byte per column, nonzero = token; null = all
  const unsigned char* mask = nullptr;
  int64_t mask_batch = 0, mask_column = 0;
};

// out [batch, queries, heads, dim] of the element type and lse [batch, heads, queries], both contiguous and written
// whole. Throws std::bad_alloc before anything is written.
void attention_forward(const AttentionProblem& problem, const AttentionCut& cut, void* out, float* lse, Isa isa,
                       Execution execution);

// Gradients, contiguous and written whole. Of slots: shaped as the inputs. Null = not wanted (absent input).
struct AttentionGradients {
  void *q, *k, *v, *global_k, *global_v, *local_k, *local_v;
};
// grad_out like q with its strides; grad_lse and lse [batch, heads, queries] contiguous; out contiguous.
void attention_backward(const AttentionProblem& problem, const AttentionCut& cut, const Sequence4& grad_out,
                        const float* grad_lse, const void* out, const float* lse, const AttentionGradients& gradients,
                        Isa isa, Execution execution);

// Queries of ranks [rank_begin, rank_end) of a segment, all query heads of kv heads [kv_head, kv_head + heads), over keys j
// in [key_begin, key_end). partial < 0: all its keys, the results are final; else the state of kv_head goes to partial sums
// number `partial`, that of the next one to the next.
struct ForwardItem {
  int64_t segment, kv_head, heads;
  int64_t rank_begin, rank_end;
  int64_t key_begin, key_end;
  int64_t partial;
};

// The most rows of a kv head and keys of any item, and kv heads.
struct ForwardSizes {
  int64_t rows = 0, keys = 0, heads = 1;
};

// Forward state of one row: unnormalised sums, then their weight and the largest score.
struct ForwardOutput {
  void* out;
  float* lse;
  float* partials;  // [numbers in use][sizes.rows][partial_width]
};

// Backward: which products an item computes.
enum class BackwardPart : int { kAll, kKeys, kQueries };

// kAll and kKeys: keys j in [key_begin, key_end) of one kv head against all its queries. kQueries: queries of ranks
// [rank_begin, rank_end) against all their keys. kAll covers every key of the segment, and so completes its queries too.
// Where facts are formed anew, kAll and kQueries form those of their queries, and kKeys finds what kQueries has formed.
struct BackwardItem {
  BackwardPart part;
  int64_t segment, kv_head;
  int64_t key_begin, key_end;
  int64_t rank_begin, rank_end;
};

// A segment with at most this many keys has them in one block, which forms its softmax anew from its own scores.
constexpr int64_t kExactKeys = 256;
// Queries that meet all their keys before the next ones do.
constexpr int64_t kQueriesAhead = 512;
static_assert(kQueriesAhead >= kExactKeys, "");  // the most queries of a segment with so few keys

// The most that any item keeps in scratch: keys with sums, packed queries, the keys of a segment with at most kExactKeys,
// packed keys (of an item with more, a block).
struct BackwardSizes {
  int64_t keys = 0, queries = 0, exact = 0, packed = 0;
  bool anew = false;  // facts are formed from scores, in segments of more than kExactKeys keys
  bool kept = false;  // scores stay until gradients are made of them, else they are formed twice
};

// Facts of a query: weights are exp(score - shift) * factor, delta = sum_j P dP. All [batch, heads, queries]. A shift with a
// factor comes from Normalised, in whatever units the path has for it.
struct BackwardInput {
  Sequence4 grad_out;
  const float* grad_lse;
  const float *shift, *factor;  // factor null = 1
  const float* delta;           // null = grad_out . out
  const void* out;              // contiguous
};

// Where facts formed anew are kept for kKeys; null: not at all.
struct Normalised {
  float *shift = nullptr, *factor = nullptr, *delta = nullptr;
};

// Rows of gradients that more than one segment adds to are kept apart in float and summed in order of segments: of
// shared global slots, and of the tokens that the next segment sees again. All are [segment][kv_head][k, v][rows][dim].
struct BackwardOutput {
  AttentionGradients gradients;
  float* shared_slots;  // rows: global.count; null unless global slots are shared
  float* carried;       // rows: recurrence; what segment i adds to tokens before its own
  float* tail;          // rows: recurrence; what a segment adds to its tokens from tail_begin on
  const int64_t* tail_begin;  // [segment] ranks
  int64_t recurrence;
};

// What a path provides.
struct ForwardPath {
  int64_t (*tile_rows)(const AttentionProblem&);  // the most rows of an item
  int64_t (*partial_width)(const AttentionProblem&);
  int64_t (*scratch)(const AttentionProblem&, const ForwardSizes&);
  // items of one kv head
  void (*forward)(const AttentionProblem&, const ForwardItem&, const ForwardOutput&, const ForwardSizes&,
                  void* scratch);
  // merges `count` partial sums of one tile and kv head, `kv_heads` apart, the first described by `item`
  void (*merge)(const AttentionProblem&, const ForwardItem& item, int64_t count, const ForwardOutput&,
                const ForwardSizes&);
};

// As ForwardPath, items of few rows a kv head that nothing is packed for; ForwardPath::merge merges them.
struct FewPath {
  int64_t (*scratch)(const AttentionProblem&, const ForwardSizes&);
  void (*forward)(const AttentionProblem&, const ForwardItem&, const ForwardOutput&, const ForwardSizes&,
                  void* scratch);
};

struct BackwardPath {
  int64_t (*block)(const AttentionProblem&);  // the larger of queries and keys per block, a multiple of both
  int64_t (*scratch)(const AttentionProblem&, const BackwardSizes&);
  void (*backward)(const AttentionProblem&, const BackwardItem&, const BackwardInput&, const Normalised&,
                   const BackwardOutput&, const BackwardSizes&, void* scratch);
  // after all items: rows kept apart become gradients. One kv head of one batch row.
  void (*collect)(const AttentionProblem&, int64_t batch, int64_t kv_head, const BackwardOutput&);
};

// Small calls: in double, on one thread, without items.
struct DirectPath {
  int64_t (*scratch)(const AttentionProblem&, bool backward);
  // rows of masked queries are left as they are
  void (*forward)(const AttentionProblem&, void* out, float* lse, void* scratch);
  void (*backward)(const AttentionProblem&, const Sequence4& grad_out, const float* grad_lse,
                   const AttentionGradients&, void* scratch);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  FewPath few_path();                    \
  DirectPath direct_path();              \
  ForwardPath forward_path();            \
  BackwardPath backward_path();          \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
