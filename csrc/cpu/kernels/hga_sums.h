// What hga_attention makes of the sums of a row (sums.h) in the end, and which tokens of a run a row sees.
#pragma once

#include "../hga_attention.h"
#include "sums.h"

namespace hici::cpu::HICI_PATH {

template <class T>
inline void normalise(const RunList& list, int64_t r, const float* o, float total) {
  T* const out = static_cast<T*>(list.out[r]);
  const Vec weight = splat(total == 0.0f ? 1.0f : total);
  int64_t d = 0;
  for (; d + kLanes <= list.dim; d += kLanes) narrow(out + d, div(load(o + d), weight));
  if (d < list.dim) narrow_part(out + d, div(load(o + d), weight), list.dim - d);
}

template <class T>
inline void finish(const RunList& list, int64_t r, const float* o, float total, float top) {
  if (list.wide)
    normalise<float>(list, r, o, total);
  else
    normalise<T>(list, r, o, total);
  *list.lse[r] = static_cast<float>(static_cast<double>(top) + __builtin_log(static_cast<double>(total)));
}

// Tokens of a run that a row sees.
inline int64_t seen_of(const RunList& list, const Run& run, int64_t row) {
  return larger(0, smaller(run.count, list.index[row] - run.start + 1));
}

}  // namespace hici::cpu::HICI_PATH
