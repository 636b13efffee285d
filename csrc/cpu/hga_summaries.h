// hga_summaries: one key for every closed chunk of a history and one for every group of it.
//
// Chunks are independent and each is read once, so a cache calls this for the chunk it has just closed, while that chunk
// is still in the processor's cache, and gets the bits a call over the whole history gives.
#pragma once

#include "attention.h"

namespace hici::cpu {

struct SummaryProblem {
  Element element;
  int64_t batch, keys, heads, dim;
  int64_t chunk, group;  // tokens; group divides chunk
  Sequence4 k;
  const int64_t* columns = nullptr;  // [batch, keys]: column of every token; null = the token itself
  const double* inv_freq;            // [half]
  int64_t half;
  const int64_t* positions = nullptr;  // null = consecutive
  int64_t position_batch = 0, position_key = 0;
  // [batch, n, heads, dim] and [batch, n, M, heads, dim], strides in elements, contiguous in dim
  void *chunk_keys, *group_keys;
  int64_t chunk_batch, chunk_step, chunk_head;
  int64_t group_batch, group_chunk, group_step, group_head;

  int64_t chunks() const { return keys / chunk; }
  int64_t groups() const { return chunk / group; }
};

// Throws std::bad_alloc before anything is written.
void hga_summaries(const SummaryProblem& problem, Isa isa, Execution execution);

// Rotations of one chunk: cosines, then sines.
struct SummaryTurns {
  const float* token;  // [2][chunk][half] to the anchor of the token's group; 1 and 0 for pairs i < cut
  const float* group;  // [2][M][half] from there to the anchor of the chunk
  int64_t cut;
};

struct SummaryPath {
  int64_t (*scratch)(const SummaryProblem&);
  void (*chunk)(const SummaryProblem&, int64_t batch, int64_t chunk, const SummaryTurns&, void* scratch);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  SummaryPath summary_path();            \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
