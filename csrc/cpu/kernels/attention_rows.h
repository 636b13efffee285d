// Where the rows of an attention problem lie, shared by forward and backward.
#pragma once

#include "../attention.h"
#include "pack.h"

namespace hici::cpu::HICI_PATH {

template <class Run>
inline auto with_element(Element element, Run&& run) {
  switch (element) {
    case Element::kBfloat16:
      return run(bfloat16{});
    case Element::kFloat16:
      return run(float16{});
    default:
      return run(float{});
  }
}

// Row of q, or of a tensor shaped like it, of the token of this rank.
template <class T>
inline const T* query_row(const AttentionProblem& problem, const Sequence4& x, int64_t batch, int64_t rank,
                          int64_t head) {
  const int64_t query = problem.column(batch, rank) - (problem.keys - problem.queries);
  return static_cast<const T*>(x.data) + batch * x.batch + query * x.seq + head * x.head;
}

// Keys j < seen_keys are visible to the token of this rank under causality.
inline int64_t seen_keys(const AttentionSegment& segment, int64_t slots, int64_t rank) {
  return slots + rank - segment.key_begin + 1;
}

// Rows of keys and values j in [j0, j1) of a segment's list.
template <class T>
inline void key_rows(const AttentionProblem& problem, const AttentionSegment& segment, int64_t kv_head, int64_t slots,
                     int64_t j0, int64_t j1, const T** k, const T** v) {
  const int64_t b = segment.batch;
  int64_t j = j0;
  const auto from = [&](const Slots& s, int64_t offset) {
    const T* const sk = static_cast<const T*>(s.k) + b * s.k_batch + segment.segment * s.k_segment + kv_head * s.k_head;
    const T* const sv = static_cast<const T*>(s.v) + b * s.v_batch + segment.segment * s.v_segment + kv_head * s.v_head;
    for (; j < j1 && j - offset < s.count; ++j) {
      *k++ = sk + (j - offset) * s.k_slot;
      *v++ = sv + (j - offset) * s.v_slot;
    }
  };
  if (j < slots) {
    from(problem.global, 0);
    from(problem.local, problem.global.count);
  }
  const T* const tk = static_cast<const T*>(problem.k.data) + b * problem.k.batch + kv_head * problem.k.head;
  const T* const tv = static_cast<const T*>(problem.v.data) + b * problem.v.batch + kv_head * problem.v.head;
  for (; j < j1; ++j) {
    const int64_t column = problem.column(b, segment.key_begin + j - slots);
    *k++ = tk + column * problem.k.seq;
    *v++ = tv + column * problem.v.seq;
  }
}

// The results of one row, from its unnormalised sums.
template <class T>
inline void finish(const AttentionProblem& problem, const AttentionSegment& segment, int64_t rank, int64_t head,
            const float* o, float total, double level, const ForwardOutput& output) {
  const int64_t b = segment.batch, dim = problem.dim;
  const int64_t query = problem.column(b, rank) - (problem.keys - problem.queries);
  T* const out = static_cast<T*>(output.out) + ((b * problem.queries + query) * problem.heads + head) * dim;
  const float weight = total == 0.0f ? 1.0f : total;
  const Vec by = splat(sizeof(T) == 2 ? 1.0f / weight : weight);
  // float32 is divided, not multiplied by a rounded reciprocal
  const auto result = [&](const float* sums) { return sizeof(T) == 2 ? mul(load(sums), by) : div(load(sums), by); };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) narrow(out + d, result(o + d));
  if (d < dim) narrow_part(out + d, result(o + d), dim - d);
  // in double: the sum of a large maximum and a small logarithm is rounded once
  const double lse = level + __builtin_log(static_cast<double>(total));
  output.lse[(b * problem.heads + head) * problem.queries + query] = static_cast<float>(lse);
}

// How scores of an attention over elements of type T become weights e^(scale * score - top). Inside a kernel tops are in the
// units of factor_of(scale); levels, like lse, are in units of e.
template <class T>
struct Weights {
  static float factor_of(float scale) { return scale; }
  static float top_of(float level) { return level; }
  static double level_of(float top) { return top; }
  static Vec power(Vec x) { return exp(x); }
};

#if defined(HICI_PATH_AVX512)
// In powers of 2, with scale and log2(e) in one factor and a third of the instructions saved. Only where results have two
// bytes: the rounding of that factor shows in gradients of float32, and scales like 1/8 would no longer be exact.
struct PowersOfTwo {
  static constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
  static float factor_of(float scale) { return static_cast<float>(scale * kLog2E); }
  static float top_of(float level) { return static_cast<float>(level * kLog2E); }
  static double level_of(float top) { return top * kLn2; }
  static Vec power(Vec x) { return exp2(x); }
};
template <>
struct Weights<bfloat16> : PowersOfTwo {};
template <>
struct Weights<float16> : PowersOfTwo {};
#endif

// The product is rounded before top, another such product, is taken from it: of scores beyond 2^23 the largest would not
// be 0 otherwise.
template <class T>
inline Vec weight_of(Vec score, Vec factor, Vec top) {
  return Weights<T>::power(sub(mul(score, factor), top));
}

}  // namespace hici::cpu::HICI_PATH
