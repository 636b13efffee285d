// Multi-view statistics of slots: mean, max, min, std, normalised mean, and their gradient.
#pragma once

#include <cstdint>

#include "hici/simd.h"
#include "isa.h"
#include "parallel.h"

namespace hici::cpu {

// local [batch, segments, slots, channels], channels contiguous, other strides free (in elements).
struct StatsProblem {
  int64_t batch, segments, slots, channels;
  int64_t stride_batch, stride_segment, stride_slot;
  const bool* valid;  // [batch, segments] or null = all
  int64_t valid_batch, valid_segment;
  const int32_t* offsets;  // [documents + 1] ascending from 0 to segments, or null = no packing; needs batch 1
  int64_t documents;
  bool causal;
};

// out, contiguous: [batch, 5, channels]; packed [documents, 5, channels]; causal [batch, segments, 5, channels].
// Throws std::bad_alloc before anything is written.
template <class T>
void global_stats_forward(const StatsProblem& p, const T* local, T* out, Isa isa, Execution execution);

// grad_out as out; grad_local contiguous [batch, segments, slots, channels].
template <class T>
void global_stats_backward(const StatsProblem& p, const T* local, const T* grad_out, T* grad_local, Isa isa,
                           Execution execution);

// Statistics of a set of rows, one value per channel. The mean is mean + rest, mean being the sum rounded; squares = sum
// of squared deviations; excess (null = not kept) = what rounding has added to it: many merges would lose digits
// otherwise. shift: the mean of the first rows.
template <class Acc>
struct StatsPlanes {
  Acc *shift, *mean, *rest, *squares, *top, *low, *excess;
};

// Sums over the groups of a sequence from its last one down to the present, one value per channel: what every row of an
// earlier segment receives is constant + drift + slope * (its distance from the present mean).
template <class Acc>
struct StatsSums {
  Acc *constant, *slope, *drift, *top, *low;
};

// What the gradient needs of one group. Extremes are values of T: they lose nothing.
template <class T>
struct StatsFacts {
  using Acc = typename simd::accumulator<T>::type;
  Acc *mean, *slope;  // relative to the shift; 1 / (count * std), 0 at the floor
  T *top, *low;
};

// One segment of the backward pass, `channels` of it.
template <class T>
struct StatsSpread {
  using Acc = typename simd::accumulator<T>::type;
  int64_t channels;
  const T* x;
  int64_t stride, rows;  // rows = 0: a segment that does not count
  T* dx;
  int64_t dx_stride;
  bool stream;
  const Acc* shift;
  StatsFacts<T> group;   // that the segment is the last of, or the only one
  const Acc* next_mean;  // of the next group; null = there is none
  const T *before_top, *before_low;  // of the previous group; null = there is none
  // the group's gradient [5][grad_stride], null = it has arrived already
  const T* grad;
  int64_t grad_stride;
  Acc inverse, project, each;  // 1 / norm; <unit gradient, mean> / norm^2; 1 / count
  // which piece of the sequence holds an extreme first, and this piece's number; null = this one
  const int32_t *top_owner, *low_owner;
  int32_t number;
  StatsSums<Acc> sums;
};

constexpr int kStatsPiece = 8;  // rows merged into a state at a time

struct StatsNorm {
  double square, along;  // sums over channels: mean^2; mean * gradient of the unit vector
};

// What a path provides: blocks of `n` channels. `stream`: stores go past the caches (aligned to 64 bytes); settle()
// makes them visible to other threads.
template <class T>
struct StatsPath {
  using Acc = typename simd::accumulator<T>::type;
  using Planes = StatsPlanes<Acc>;
  // adds rows to a set of `count`; those `ahead` elements further on come next. With count = 0 nothing of it is read
  void (*absorb)(const T* x, int64_t stride, int64_t rows, int64_t ahead, int64_t n, const Planes&, int64_t count);
  // adds a later set to an earlier one, whose shift stays; owners, if not null, take `number` where its extreme wins
  void (*merge)(const Planes& into, int64_t count, const Planes& from, int64_t from_count, int64_t n,
                int32_t* top_owner, int32_t* low_owner, int32_t number);
  // rows mean, max, min, std of the result, `stride` apart, and the means before rounding, for which the first row may
  // be named where it rounds nothing; their sum of squares
  double (*emit)(const Planes&, int64_t count, int64_t n, T* out, int64_t stride, Acc* means, bool stream);
  // the normalised mean
  void (*finish)(const Acc* means, Acc norm, int64_t n, T* out, bool stream);
  StatsNorm (*facts)(const Planes&, int64_t count, int64_t n, const T* grad_unit, const StatsFacts<T>&);
  void (*spread)(const StatsSpread<T>&);
  void (*settle)();
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  template <class T>                     \
  StatsPath<T> stats_path();             \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
