// What an attention keeps of a row while keys pass: weighted values, weights, and the level they are taken at.
//
// Scores are shifted by a level per row that moves only when a score exceeds it by kLag, so that a row's sums are hardly
// ever scaled: with weights up to e^kLag float32 sums lose nothing.
#pragma once

#include "vector.h"

namespace hici::cpu::HICI_PATH {

constexpr float kLag = 8.0f;

// Sums of rows: o [rows][width], weights added up in lanes, and the level scores are shifted by.
struct Sums {
  float *o, *total, *top;
  int64_t width;

  void clear(int64_t rows) const {
    __builtin_memset(o, 0, rows * width * sizeof(float));
    __builtin_memset(total, 0, rows * kLanes * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) top[r] = -__builtin_inff();
  }

  // Moves the level of row r if scores s[0, n) are too far above it. What the row has summed is scaled, so that nothing may
  // be weighted by the old level and not yet be summed.
  void raise(int64_t r, const float* s, int64_t n, Vec scale) const {
    const Vec none = splat(-__builtin_inff()), limit = splat(top[r] + kLag);
    bool above = false;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) above |= any_differs(max(mul(load(s + j), scale), limit), limit);
    if (j < n) above |= any_differs(max(keep_first(n - j, mul(load(s + j), scale), none), limit), limit);
    if (!above) return;
    Vec m = none;
    for (j = 0; j + kLanes <= n; j += kLanes) m = max(mul(load(s + j), scale), m);
    if (j < n) m = max(keep_first(n - j, mul(load(s + j), scale), none), m);
    const float highest = reduce_max(m);
    if (top[r] != -__builtin_inff()) {  // else there is nothing yet
      const Vec a = exp(splat(top[r] - highest));
      for (int64_t d = 0; d < width; d += kLanes) store(o + r * width + d, mul(load(o + r * width + d), a));
      store(total + r * kLanes, mul(load(total + r * kLanes), a));
    }
    top[r] = highest;
  }

  // Scores s[0, n) as weights p, by the level of row r.
  template <class Op>
  void weights(int64_t r, const float* s, int64_t n, Vec scale, Op* p) const {
    // where every score has overflowed to -inf, all weights are 0
    const Vec shift = splat(top[r] == -__builtin_inff() ? 0.0f : top[r]);
    Vec sum = load(total + r * kLanes);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const Vec w = exp(sub(mul(load(s + j), scale), shift));
      sum = add(sum, w);
      narrow(p + j, w);
    }
    if (j < n) {
      const Vec w = keep_first(n - j, exp(sub(mul(load(s + j), scale), shift)), zeros());
      sum = add(sum, w);
      narrow(p + j, w);
    }
    store(total + r * kLanes, sum);
  }
};

}  // namespace hici::cpu::HICI_PATH
