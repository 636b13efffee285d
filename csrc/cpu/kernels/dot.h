// Dot products of one row with single rows anywhere in memory: nothing is packed, so a row of keys that only one query
// wants is read once and not written.
//
// The order of additions depends on the length alone: whatever rows are scored together, a product has the same bits.
#pragma once

#include "vector.h"

namespace hici::cpu::HICI_PATH {

#if defined(HICI_PATH_AVX512)
// Lane i of the result: the sum of the lanes of a[i].
inline Vec sums_of(const Vec a[16]) {
  Vec s[8], t[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    s[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(s[2 * i]), y = _mm512_castps_pd(s[2 * i + 1]);
    t[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    s[i] = add(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88), _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xdd));
}
#else
inline Vec sums_of(const Vec a[8]) {
  Vec sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = reduce_add(a[i]);
  return sum;
}
#endif

// Rows at equal distances: [4 i + j] for j < 4 is near[i] + j * step, which takes few registers.
template <class T>
struct Spaced {
  const T* near[kLanes / 4];
  int64_t step, three;

  Spaced(const T* base, int64_t apart) : step(apart), three(3 * apart) {
    for (int i = 0; i < kLanes / 4; ++i) near[i] = base + 4 * i * apart;
  }
  const T* operator[](int i) const {
    const T* const base = near[i / 4];
    return i % 4 == 3 ? base + three : base + i % 4 * step;
  }
};

// Asks for the line at element `at` of rows [0, count): a few between products, since a burst of them waits for its turn
// and the products with it.
template <class Rows>
HICI_ASK void ask_for_lines(const Rows& rows, int64_t count, int64_t at) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(rows[i] + at, 0, 3);
}

// Lane i: q . rows[i]. `ahead`: rows [0, ahead_count) that are wanted next. Rows: pointers, or what gives them by number.
template <class T, class Rows, class Ahead = const T* const*>
inline Vec dots_of_lanes(const T* q, const Rows& rows, int64_t d, const Ahead& ahead = {}, int64_t ahead_count = 0) {
  Vec sum[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum[i] = zeros();
  int64_t at = 0;
#if defined(HICI_PATH_AVX512_BF16)
  if constexpr (sizeof(T) == 2 && __is_same(T, bfloat16)) {
    for (; at + 32 <= d; at += 32) {
      ask_for_lines(ahead, ahead_count, at);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(q + at));
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        sum[i] = _mm512_dpbf16_ps(sum[i], left, reinterpret_cast<__m512bh>(_mm512_loadu_si512(rows[i] + at)));
    }
  }
#endif
  for (; at + kLanes <= d; at += kLanes) {
    ask_for_lines(ahead, ahead_count, at);
    const Vec left = widen(q + at);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = fma(left, widen(rows[i] + at), sum[i]);
  }
  if (at < d) {
    const Vec left = widen_part(q + at, d - at);
    for (int i = 0; i < kLanes; ++i) sum[i] = fma(left, widen_part(rows[i] + at, d - at), sum[i]);
  }
  return sums_of(sum);
}

// out[i] = q . rows[i] for i < n; out has room for round_up(n, kLanes). rows likewise; those past n are set.
template <class T>
inline void dots(const T* q, const T** rows, int64_t n, int64_t d, float* out, const T* const* ahead = nullptr,
                 int64_t ahead_count = 0) {
  for (int64_t i = n; i < round_up(n, kLanes); ++i) rows[i] = rows[n - 1];
  for (int64_t i = 0; i < n; i += kLanes)
    store(out + i, i < ahead_count ? dots_of_lanes(q, rows + i, d, ahead + i, smaller(kLanes, ahead_count - i))
                                   : dots_of_lanes(q, rows + i, d));
}

}  // namespace hici::cpu::HICI_PATH
