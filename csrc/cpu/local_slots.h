// local_slots: what a call is, and how it is cut into pieces that can run anywhere in any order.
//
// Two forms of the same function. Absorbed: k_weight is folded into the slot queries and v_weight applied after the
// weighted mean, so each of the `rows` = heads * slots scores is a product with a hidden row itself. Projected: keys
// and values are computed for every token, as the formula is written. absorbed_costs_less() chooses.
#pragma once

#include <cstdint>

#include "attention.h"

namespace hici::cpu {

struct LocalSlotsProblem {
  Element element;
  int64_t batch, length, channels, slots, width, heads;  // hidden [batch, length, channels], queries [slots, width]
  int64_t segment_total;                                 // segments of a row, or of all documents
  const void *hidden, *queries, *k_weight, *v_weight;    // contiguous in the last dimension
  int64_t hidden_batch, hidden_token, queries_row, k_row, v_row;  // strides in elements
  bool uniform;                                          // what a segment without tokens gives: the mean, or zero
  // what the caller of local_slots_forward and local_slots_backward leaves empty
  const int64_t* columns = nullptr;  // [batch, length]: columns of the tokens of a row, in order; null = all of them
};

// Tokens [begin, end) of a row's list of columns. `equal`: a segment without tokens whose value is the mean over all of
// its columns. Its chunks are [chunk_begin, chunk_end).
struct SlotsSegment {
  int64_t batch, segment, begin, end, chunk_begin, chunk_end;
  bool equal;
};

// Part of a segment: long ones are cut, so that few of them use many cores. offset: tokens before it in its wave.
struct SlotsChunk {
  int64_t segment, begin, end, offset;
};

// Segments whose sums are in memory at the same time; place: of its first token in places.
struct SlotsWave {
  int64_t segment_begin, segment_end, chunk_begin, chunk_end, tokens, place;
};

struct LocalSlotsPlan {
  const SlotsSegment* segments;
  const SlotsChunk* chunks;
  const SlotsWave* waves;
  int64_t wave_count;
  const int64_t* places;  // projected: row * length + column of all tokens, segment by segment
  int64_t most_chunks, most_segments, most_tokens;  // of a wave
  bool absorbed;
};

// Segments as the public function takes them.
struct LocalSlotsCut {
  int64_t segment_len = 0;  // 0 = one segment (per document)
  const int32_t* documents = nullptr;  // [document_count + 1] columns
  int64_t document_count = 0;
  // one byte per column, nonzero = token; null = all
  const unsigned char* mask = nullptr;
  int64_t mask_batch = 0, mask_column = 0;
};

// The FLOP rule, for `tokens` tokens in `segments` segments of all rows.
bool absorbed_costs_less(const LocalSlotsProblem& problem, int64_t tokens, int64_t segments);

// out [batch, segment_total, slots, width] of the element type, contiguous, written whole. Throws std::bad_alloc before
// anything is written.
void local_slots_forward(const LocalSlotsProblem& problem, const LocalSlotsCut& cut, void* out, Isa isa,
                         Execution execution);

// Gradients, contiguous, shaped as the inputs, written whole.
struct LocalSlotsGradients {
  void *hidden, *queries, *k_weight, *v_weight;
};
// grad_out like out.
void local_slots_backward(const LocalSlotsProblem& problem, const LocalSlotsCut& cut, const void* grad_out,
                          const LocalSlotsGradients& gradients, Isa isa, Execution execution);

// Calls body(context, item, worker) for item = 0..items-1, as parallel() does: for kernels, which instantiate nothing
// outside their own namespace.
void for_items(Execution execution, int64_t items, void (*body)(void* context, int64_t item, int worker),
               void* context);

// Memory of a call: `shared` once, `scratch` for every worker.
struct LocalSlotsSizes {
  int64_t shared, scratch;
};
struct LocalSlotsMemory {
  void* shared;
  char* scratch;
  int64_t scratch_size;
};

// What a path provides.
struct LocalSlotsPath {
  LocalSlotsSizes (*forward_sizes)(const LocalSlotsProblem&, const LocalSlotsPlan&);
  void (*forward)(const LocalSlotsProblem&, const LocalSlotsPlan&, void* out, const LocalSlotsMemory&, Execution);
  LocalSlotsSizes (*backward_sizes)(const LocalSlotsProblem&, const LocalSlotsPlan&);
  void (*backward)(const LocalSlotsProblem&, const LocalSlotsPlan&, const void* grad_out, const LocalSlotsGradients&,
                   const LocalSlotsMemory&, Execution);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  LocalSlotsPath local_slots_path();     \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
