// Attention over disjoint sets of keys, combined by log-sum-exp, and its gradient.
#pragma once

#include <cstdint>

#include "hici/simd.h"
#include "isa.h"
#include "parallel.h"

namespace hici::cpu {

// [batch, seq, heads, dim], contiguous in dim; strides in elements.
template <class T>
struct MergeRows {
  const T* data;
  int64_t batch, seq, head;
};

// [batch, heads, seq], any strides.
template <class Acc>
struct MergeLse {
  const Acc* data;
  int64_t batch, head, seq;
};

// What one part receives, contiguous.
template <class T>
struct MergeGradient {
  T* out;
  typename simd::accumulator<T>::type* lse;
};

template <class T>
struct MergeProblem {
  using Acc = typename simd::accumulator<T>::type;
  int64_t batch, seq, heads, dim, parts;
  const MergeRows<T>* outs;   // [parts]
  const MergeLse<Acc>* lses;  // [parts]
};

// out [batch, seq, heads, dim] and lse [batch, heads, seq], contiguous.
template <class T>
void merge_attention_forward(const MergeProblem<T>& p, T* out, typename simd::accumulator<T>::type* lse, Isa isa,
                             Execution execution);

// grad_lse contiguous [batch, heads, seq]; gradients [parts].
template <class T>
void merge_attention_backward(const MergeProblem<T>& p, const MergeRows<T>& grad_out,
                              const typename simd::accumulator<T>::type* grad_lse, const MergeGradient<T>* gradients,
                              Isa isa, Execution execution);

// Heads [head, head + heads) of positions [seq, seq + positions) of one batch row.
struct MergeItem {
  int64_t batch, seq, positions, head, heads;
};

template <class T>
struct MergePath {
  using Acc = typename simd::accumulator<T>::type;
  // floats of scratch, aligned to 64 bytes, for items of at most so many positions x heads
  int64_t (*scratch)(int64_t parts, int64_t rows);
  void (*forward)(const MergeProblem<T>&, const MergeItem&, T* out, Acc* lse, bool stream, Acc* scratch);
  void (*backward)(const MergeProblem<T>&, const MergeItem&, const MergeRows<T>& grad_out, const Acc* grad_lse,
                   const MergeGradient<T>*, bool stream, Acc* scratch);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  template <class T>                     \
  MergePath<T> merge_path();             \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
