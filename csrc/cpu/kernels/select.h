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

// The `keep`-th highest of n > keep >= 1 scores.
inline float level_of(const float* score, int64_t n, int64_t keep, float* least) {
  float low = score[0], high = score[0];
  for (int64_t i = 1; i < n; ++i) low = score[i] < low ? score[i] : low, high = score[i] > high ? score[i] : high;
  *least = low;
  int64_t lowest = rank_of(low), highest = rank_of(high);
  while (lowest < highest) {
    const int64_t middle = lowest + (highest - lowest + 1) / 2;
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
    float least;
    const float level = level_of(score, count, keep, &least);
    // above the level all, at the level the first
    int64_t above = 0;
    for (int64_t i = 0; i < count; ++i) above += score[i] > level;
    const int64_t reached = count_at_least(score, count, level);
    int64_t equal = keep - above;
    if (reached == keep) equal = keep;
    int64_t to = 0;
    float kept_least = __builtin_inff();
    for (int64_t i = 0; i < count; ++i) {
      const float x = score[i];
      const bool taken = x > level || (x == level && equal-- > 0);
      score[to] = x, id[to] = id[i];
      if (taken && x < kept_least) kept_least = x;
      to += taken;
    }
    count = to;
    floor = kept_least;
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
