// Weighted sums of rows anywhere in memory, the other product of an attention of few queries: nothing is packed.
#pragma once

#include "vector.h"

namespace hici::cpu::HICI_PATH {

// Weighted with bfloat16, values of bfloat16 are multiplied in pairs of tokens, as the processor has it: a pair of rows is interleaved in
// quarters of a register, and the sums of 32 values stand in that order until they are written.
template <class T>
constexpr bool kPaired = false;
#if defined(HICI_PATH_AVX512_BF16)
template <>
constexpr bool kPaired<bfloat16> = true;

// o[r] += sum_j p[r][j] v[j] for R rows, values [at, at + 32 * B)
template <int R, int B, class V, class Ahead>
inline void weigh_pairs(float* const* o, const bfloat16* const* p, const V& v, int64_t n, int64_t at, const Ahead& ahead,
                        int64_t ahead_count) {
  Vec low[R][B], high[R][B];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) low[r][i] = high[r][i] = zeros();
  const auto take = [&](int64_t j, const bfloat16* even, const bfloat16* odd) __attribute__((always_inline)) {
    __m512bh w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t two;
      __builtin_memcpy(&two, p[r] + j, sizeof two);
      w[r] = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
    }
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) {
      const __m512i a = _mm512_loadu_si512(even + at + 32 * i);
      const __m512i b = odd ? _mm512_loadu_si512(odd + at + 32 * i) : _mm512_setzero_si512();
      const __m512bh first = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
      const __m512bh second = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        low[r][i] = _mm512_dpbf16_ps(low[r][i], w[r], first);
        high[r][i] = _mm512_dpbf16_ps(high[r][i], w[r], second);
      }
    }
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
    if (j < ahead_count)
#pragma GCC unroll 4
      for (int i = 0; i < B; ++i) {
        __builtin_prefetch(ahead[j] + at + 32 * i, 0, 3);
        __builtin_prefetch(ahead[j + 1] + at + 32 * i, 0, 3);
      }
    take(j, v[j], v[j + 1]);
  }
  if (j < n) take(j, v[j], nullptr);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) {
      float* const to = o[r] + at + 32 * i;
      store(to, add(load(to), low[r][i]));
      store(to + kLanes, add(load(to + kLanes), high[r][i]));
    }
}

// The first values of a row that weigh_pairs sums, from its order into theirs.
inline void unpair(float* o, int64_t d) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t at = 0; at + 32 <= d; at += 32) {
    const Vec a = load(o + at), b = load(o + at + kLanes);
    store(o + at, _mm512_permutex2var_ps(a, first, b));
    store(o + at + kLanes, _mm512_permutex2var_ps(a, second, b));
  }
}
#endif

inline float weight(float x) { return x; }
inline float weight(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float w;
  __builtin_memcpy(&w, &bits, sizeof w);
  return w;
}

// o[r] += sum_j p[r][j] v[j] for R rows. With bfloat16 weights an odd number of them is followed by one that is 0.
template <int R, class Op, class V, class Ahead>
inline void weigh(float* const* o, const Op* const* p, const V& v, int64_t n, int64_t d, const Ahead& ahead,
                  int64_t ahead_count) {
  int64_t at = 0;
#if defined(HICI_PATH_AVX512_BF16)
  if constexpr (kPaired<Op>) {
    constexpr int kBlocks = R >= 4 ? 2 : 4;
    for (; at + 32 * kBlocks <= d; at += 32 * kBlocks) weigh_pairs<R, kBlocks>(o, p, v, n, at, ahead, ahead_count);
    for (; at + 32 <= d; at += 32) weigh_pairs<R, 1>(o, p, v, n, at, ahead, ahead_count);
  }
#endif
  constexpr int kVectors = R >= 4 ? 4 : 8;
  for (; at + kVectors * kLanes <= d; at += kVectors * kLanes) {
    Vec sum[R][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[r][i] = zeros();
    for (int64_t j = 0; j < n; ++j) {
      Vec w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = splat(weight(p[r][j]));
      if (j < ahead_count)
        for (int i = 0; i < kVectors * kLanes; i += 64 / static_cast<int64_t>(sizeof(*ahead[j]))) __builtin_prefetch(ahead[j] + at + i, 0, 3);
      const auto* const x = v[j] + at;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const Vec y = widen(x + i * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][i] = fma(w[r], y, sum[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        float* const to = o[r] + at + i * kLanes;
        store(to, add(load(to), sum[r][i]));
      }
  }
  for (; at < d; at += kLanes) {
    const int64_t there = smaller(kLanes, d - at);
    for (int r = 0; r < R; ++r) {
      Vec sum = zeros();
      for (int64_t j = 0; j < n; ++j)
        sum = fma(splat(weight(p[r][j])), there == kLanes ? widen(v[j] + at) : widen_part(v[j] + at, there), sum);
      store(o[r] + at, add(load(o[r] + at), sum));
    }
  }
}

}  // namespace hici::cpu::HICI_PATH
