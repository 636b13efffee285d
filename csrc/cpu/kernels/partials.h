// Results over parts of the keys of a row, put together: both attentions cut the keys of few rows among threads.
//
// A partial is width + 2 floats: the sum of e^(s - level) v in `width` of them, a multiple of kLanes; the sum of
// e^(s - level), 0 where no key was seen; the level.
#pragma once

#include "vector.h"

namespace hici::cpu::HICI_PATH {

struct Merged {
  float total, level;
};

// Of the `count` partials at into, into + step, ...; the sum is left at `into`, in their order. A level that is not a
// number makes everything so.
inline Merged merge_partials(float* into, int64_t step, int64_t count, int64_t width) {
  float level = into[width + 1];
  for (int64_t i = 1; i < count; ++i) {
    const float x = into[i * step + width + 1];
    level = x > level || x != x ? x : level;
  }
  float total = 0;
  bool some = false;
  for (int64_t i = 0; i < count; ++i) {
    const float* const from = into + i * step;
    if (from[width] == 0.0f) continue;  // its level is -inf
    alignas(64) float factor[kLanes];
    store(factor, exp(splat(from[width + 1] - level)));
    const Vec a = splat(factor[0]);
    total += from[width] * factor[0];
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec x = mul(load(from + d), a);
      store(into + d, some ? add(load(into + d), x) : x);
    }
    some = true;
  }
  return {total, level};
}

}  // namespace hici::cpu::HICI_PATH
