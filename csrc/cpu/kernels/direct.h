// Small calls in double, straight from the formula: nothing is packed, and nothing but results is rounded. Rows of
// doubles are `round_up(dim, kLanes)` long, zero behind dim.
#pragma once

#include "lanes.h"

namespace hici::cpu::HICI_PATH {

// kLanes elements.
struct Pair {
  Wide low, high;
};

inline Pair pair_of(Vec v) {
#if defined(HICI_PATH_AVX512)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#else
  Pair p;
  for (int i = 0; i < kWideLanes; ++i) p.low[i] = v[i], p.high[i] = v[i + kWideLanes];
  return p;
#endif
}

inline Vec vec_of(const double* p) {
#if defined(HICI_PATH_AVX512)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(get(p))), _mm512_cvtpd_ps(get(p + kWideLanes)), 1);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline double sum_of(Wide v) {
  alignas(64) double x[kWideLanes];
  put(x, v);
  double s = 0;
  for (int i = 0; i < kWideLanes; i += 2) s += x[i] + x[i + 1];
  return s;
}

template <class T>
inline Pair pair_at(const T* row, int64_t d, int64_t dim) {
  return pair_of(d + kLanes <= dim ? widen(row + d) : widen_part(row + d, dim - d));
}

template <class T>
inline void widen_row(const T* from, int64_t dim, double* to) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Pair x = pair_at(from, d, dim);
    put(to + d, x.low);
    put(to + d + kWideLanes, x.high);
  }
}

template <class T>
inline void narrow_row(const double* from, int64_t dim, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) narrow(to + d, vec_of(from + d));
  if (d < dim) narrow_part(to + d, vec_of(from + d), dim - d);
}

// out[r * step] = factor * rows[r] . row; rows `width` apart.
template <int R, class T>
inline void dots(const double* rows, int64_t width, const T* row, int64_t dim, double factor, double* out,
                 int64_t step) {
  Wide sum[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = all(0.0);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Pair x = pair_at(row, d, dim);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[r][0] = fused(get(rows + r * width + d), x.low, sum[r][0]);
      sum[r][1] = fused(get(rows + r * width + d + kWideLanes), x.high, sum[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out[r * step] = factor * sum_of(sum[r][0] + sum[r][1]);
}

// sums[r] (+)= sum_j factors[r * step + j] * rows[j]; sums `width` apart.
template <int R, class T>
inline void combine(const double* factors, int64_t step, const T* const* rows, int64_t count, int64_t dim, double* sums,
                    int64_t width) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    Wide sum[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = all(0.0);
    for (int64_t j = 0; j < count; ++j) {
      const Pair x = pair_at(rows[j], d, dim);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Wide f = all(factors[r * step + j]);
        sum[r][0] = fused(f, x.low, sum[r][0]);
        sum[r][1] = fused(f, x.high, sum[r][1]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      put(sums + r * width + d, sum[r][0]);
      put(sums + r * width + d + kWideLanes, sum[r][1]);
    }
  }
}

// to += sum_r factors[r * step] * rows[r], all of them doubles.
template <int R>
inline void add_rows(const double* factors, int64_t step, const double* rows, int64_t width, double* to) {
  for (int64_t d = 0; d < width; d += kWideLanes) {
    Wide sum = get(to + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum = fused(all(factors[r * step]), get(rows + r * width + d), sum);
    put(to + d, sum);
  }
}

// e^x for x <= 0, to a few units of the last place.
inline Wide exp_wide(Wide x) {
  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const Wide magic = all(6755399441055744.0);
  x = pick(greater(all(-700.0), x), all(-700.0), x);
  const Wide shifted = x * all(1.4426950408889634) + magic, n = shifted - magic;
  Wide r = fused(n, all(-0.693147180369123816490), x);
  r = fused(n, all(-1.90821492927058770002e-10), r);
  Wide y = all(1.0 / 479001600);
  for (const double c : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                         1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    y = fused(y, r, all(c));
#if defined(HICI_PATH_AVX512)
  return _mm512_scalef_pd(y, n);
#else
  int64_t bits[kWideLanes];
  double power[kWideLanes];
  alignas(32) double integer[kWideLanes];
  put(integer, n);
  for (int i = 0; i < kWideLanes; ++i) {
    // a NaN is kept by y
    bits[i] = ((integer[i] == integer[i] ? static_cast<int64_t>(integer[i]) : 0) + 1023) << 52;
    __builtin_memcpy(power + i, bits + i, sizeof(double));
  }
  return y * get(power);
#endif
}

// Scores become their exponentials over the largest; returns it, and the sum in total. Where even the largest is -inf in
// float32, they become 0, as those of a row that sees nothing. x may be written up to a multiple of kWideLanes.
inline double soften_row(double* x, int64_t count, double* total) {
  double top = -__builtin_inf();
  for (int64_t j = 0; j < count; ++j) top = x[j] > top || x[j] != x[j] ? x[j] : top;
  if (static_cast<float>(top) == -__builtin_inff()) {
    for (int64_t j = 0; j < count; ++j) x[j] = 0;
    *total = 1;
    return top;
  }
  for (int64_t j = count; j < round_up(count, kWideLanes); ++j) x[j] = top;
  double sum = 0;
  for (int64_t j = 0; j < count; j += kWideLanes) {
    put(x + j, exp_wide(get(x + j) - all(top)));
    for (int64_t i = j; i < smaller(count, j + kWideLanes); ++i) sum += x[i];
  }
  *total = sum;
  return top;
}

}  // namespace hici::cpu::HICI_PATH
