// The highest scores of a stream, equal ones by lowest id: what is kept stands in order of ids, and what cannot be among
// the highest any more is turned away by one comparison.
#pragma once

#include "vector.h"

namespace hici::cpu::HICI_PATH {

constexpr float kLowest = -3.4028234663852886e38f;

// A score that every comparison orders: NaN is the highest, and a real score stays above "none".
inline Vec ordered(Vec s) { return where_equal(s, s, max(splat(kLowest), s), splat(__builtin_inff())); }

#if defined(HICI_PATH_AVX512)
inline int64_t count_at_least(const float* score, int64_t n, float level) {
  const Vec limit = splat(level);
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes)
    count += __builtin_popcount(_mm512_cmp_ps_mask(load(score + i), limit, _CMP_GE_OQ));
  if (i < n) count += __builtin_popcount(_mm512_mask_cmp_ps_mask(first(n - i), load_part(score + i, n - i), limit, _CMP_GE_OQ));
  return count;
}
#else
inline int64_t count_at_least(const float* score, int64_t n, float level) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += score[i] >= level;
  return count;
}
#endif

// Floats as integers of the same order.
inline int32_t rank_of(float x) {
  int32_t bits;
  x += 0.0f;  // one zero
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits >= 0 ? bits : static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits));
}
inline float of_rank(int32_t rank) {
  const int32_t bits = rank >= 0 ? rank : static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(rank));
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Steps in which the middle of two scores is their mean, before it is the middle of their ranks: scores lie much more
// evenly than ranks do, but only halving ranks surely ends.
constexpr int kMeans = 20;

// A level that as few as possible of n > keep >= 1 scores reach, and at least `keep`: more only where some are equal.
inline float level_of(const float* score, int64_t n, int64_t keep) {
  Vec low = splat(score[0]), high = low;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) low = min(load(score + i), low), high = max(load(score + i), high);
  if (i < n) {
    const Vec x = keep_first(n - i, load_part(score + i, n - i), splat(score[0]));
    low = min(x, low), high = max(x, high);
  }
  int64_t lowest = rank_of(reduce_min(low)), highest = rank_of(reduce_max(high));
  for (int step = 0; lowest < highest; ++step) {
    int64_t middle = lowest + (highest - lowest + 1) / 2;
    if (step < kMeans) {
      const float a = of_rank(static_cast<int32_t>(lowest)), b = of_rank(static_cast<int32_t>(highest));
      const int64_t mean = rank_of(0.5f * a + 0.5f * b);
      if (mean > lowest && mean <= highest) middle = mean;
    }
    const int64_t count = count_at_least(score, n, of_rank(static_cast<int32_t>(middle)));
    if (count == keep) return of_rank(static_cast<int32_t>(middle));
    if (count > keep)
      lowest = middle;
    else
      highest = middle - 1;
  }
  return of_rank(static_cast<int32_t>(lowest));
}

// One stream: at most `capacity` entries, ids ascending.
struct Stream {
  float* score;
  int32_t* id;
  int64_t count;
  float floor;  // only scores above it can still be among the highest

  // Keeps the `keep` highest.
  void cut(int64_t keep) {
    if (count <= keep) return;
    if (keep == 0) {
      count = 0;
      return;
    }
    const float level = level_of(score, count, keep);
    int64_t to = 0;
#if defined(HICI_PATH_AVX512)
    if (count_at_least(score, count, level) == keep) {
      const Vec limit = splat(level);
      Vec least = splat(__builtin_inff());
      for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 there = hici::cpu::HICI_PATH::first(smaller(kLanes, count - i));
        const Vec x = _mm512_maskz_loadu_ps(there, score + i);
        const __m512i at = _mm512_maskz_loadu_epi32(there, id + i);
        const __mmask16 taken = _mm512_mask_cmp_ps_mask(there, x, limit, _CMP_GE_OQ);
        const int64_t n = __builtin_popcount(taken);
        least = _mm512_mask_min_ps(least, taken, least, x);
        const __mmask16 places = hici::cpu::HICI_PATH::first(n);
        _mm512_mask_storeu_ps(score + to, places, _mm512_maskz_compress_ps(taken, x));
        _mm512_mask_storeu_epi32(id + to, places, _mm512_maskz_compress_epi32(taken, at));
        to += n;
      }
      count = to;
      floor = reduce_min(least);
      return;
    }
#endif
    // of those that equal the level, the first
    int64_t equal = keep;
    for (int64_t i = 0; i < count; ++i) equal -= score[i] > level;
    float least = __builtin_inff();
    for (int64_t i = 0; i < count; ++i) {
      const float x = score[i];
      const bool taken = x > level || (x == level && equal-- > 0);
      score[to] = x, id[to] = id[i];
      if (taken && x < least) least = x;
      to += taken;
    }
    count = to;
    floor = least;
  }

  // Appends the entries (s[i], first_id + i) that may still be wanted.
  void offer(const float* s, int64_t n, int32_t first_id) {
#if defined(HICI_PATH_AVX512)
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t there = smaller(kLanes, n - i);
      const Vec x = there == kLanes ? load(s + i) : load_part(s + i, there);
      __mmask16 m = _mm512_cmp_ps_mask(x, splat(floor), _CMP_GT_OQ);
      if (there < kLanes) m &= hici::cpu::HICI_PATH::first(there);
      if (!m) continue;
      const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(first_id + static_cast<int32_t>(i)));
      _mm512_storeu_ps(score + count, _mm512_maskz_compress_ps(m, x));
      _mm512_storeu_si512(id + count, _mm512_maskz_compress_epi32(m, at));
      count += __builtin_popcount(m);
    }
#else
    for (int64_t i = 0; i < n; ++i)
      if (s[i] > floor) score[count] = s[i], id[count++] = first_id + static_cast<int32_t>(i);
#endif
  }
};

}  // namespace hici::cpu::HICI_PATH
