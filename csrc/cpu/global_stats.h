// Multi-view statistics of slots: mean, max, min, std, normalised mean, and their gradient.
#pragma once

#include <cstdint>

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
template <class T>
void global_stats_forward(const StatsProblem& p, const T* local, T* out);

// grad_out as out; grad_local contiguous [batch, segments, slots, channels].
template <class T>
void global_stats_backward(const StatsProblem& p, const T* local, const T* grad_out, T* grad_local);

}  // namespace hici::cpu
