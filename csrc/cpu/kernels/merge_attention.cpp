// Weights of the parts by their log-sum-exp, then one weighted sum per row. The weights of some positions and heads are
// formed together, vector by vector, since lse lies [head][position] while rows lie [position][head].
//
// Gradient: with dot_p = <grad_out, out_p>, part p receives share_p grad_out and
// share_p (dot_p - sum_q share_q dot_q + grad_lse). Nothing of the forward pass is kept; one sweep over the parts gives
// both, grad_out staying in registers between them.
//
// Roofline: 2 operations per element read, so memory bounds it: forward P + 1 rows (P parts read, one result written),
// backward 2 P + 1. A part of weight 0 is not read.
//
// What was tried, and what it gave on one core of a Zen 5 (copy: 37 GB/s read + written in the same runs; 3 parts, 4096
// rows, 32 heads, D 128; processor time of the thread, since the machine was shared):
//   - weights and sums as above need 20 to 25 ns per row from cache, where memory needs 54 (float32) and 27 (bfloat16).
//   - from memory, without prefetching: 107 ns float32 (19 GB/s), 115 bfloat16 (9 GB/s); one part alone ran at 30 GB/s,
//     so it is the number of streams. Prefetching every part 4 KiB ahead: 87 ns (24 GB/s) and 57 (18 GB/s); one part 38.
//   - results in fresh memory cost more than all of this: first writing 64 MiB in 4 KiB pages brought a call to 5.7 GB/s;
//     asking for large pages (csrc/cpu/memory.h), 15.
#include "../merge_attention.h"

#include "lanes.h"

namespace hici::cpu::HICI_PATH {
namespace {

inline Vec power(Vec x) { return exp(x); }
inline Wide power(Wide x) {
  double lane[kWideLanes];
  put(lane, x);
  for (int i = 0; i < kWideLanes; ++i) lane[i] = __builtin_exp(lane[i]);
  return get(static_cast<const double*>(lane));
}
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }
// in double: the gradient of lse is a difference of such sums
#if defined(HICI_PATH_AVX512)
inline double sum_lanes(Vec v) {
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                                            _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}
inline double sum_lanes(Wide v) { return _mm512_reduce_add_pd(v); }
#else
inline double sum_lanes(Vec v) {
  const simd::f64x8 w = __builtin_convertvector(v, simd::f64x8);
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}
inline double sum_lanes(Wide v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

template <class T>
struct Kernel {
  using Acc = typename simd::accumulator<T>::type;
  using V = typename lanes<Acc>::value;
  static constexpr int L = lanes<Acc>::count;
  static constexpr int kTogether = 8;  // vectors of a row in registers
  // Elements: the processor's own prefetching does not keep up with several streams. Past the end it costs nothing.
  static constexpr int64_t kAhead = 4096 / sizeof(T);
  using Problem = MergeProblem<T>;

  static int64_t padded(int64_t rows) { return round_up(rows, 16); }
  // the share of every part, the largest lse and the total; in double, dot of every part and the weighted dot
  static int64_t scratch(int64_t parts, int64_t rows) {
    return (parts + 2 + (parts + 1) * static_cast<int64_t>(sizeof(double) / sizeof(Acc))) * padded(rows);
  }

  // Row r = head * positions + position of an item: weights of the parts, their log-sum-exp.
  static void weigh(const Problem& p, const MergeItem& item, Acc* share, Acc* top, Acc* total) {
    const int64_t rows = item.heads * item.positions, ld = padded(rows);
    const Acc infinity = static_cast<Acc>(__builtin_inf());
    for (int64_t part = 0; part < p.parts; ++part) {
      const MergeLse<Acc>& lse = p.lses[part];
      Acc* to = share + part * ld;
      for (int64_t h = 0; h < item.heads; ++h) {
        const Acc* const from = lse.data + item.batch * lse.batch + (item.head + h) * lse.head + item.seq * lse.seq;
        for (int64_t t = 0; t < item.positions; ++t) *to++ = from[t * lse.seq];
      }
      for (int64_t r = rows; r < ld; ++r) *to++ = -infinity;
    }
    const V unseen = all(-infinity), zero = all(Acc(0)), one = all(Acc(1));
    for (int64_t r = 0; r < ld; r += L) {
      V most = get(share + r);
      for (int64_t part = 1; part < p.parts; ++part) most = higher(get(share + part * ld + r), most);
      // exp(-inf - -inf) is NaN: a row that no part has seen is shifted by 0 instead of its maximum
      const V shift = pick(equal(most, unseen), zero, most);
      V sum = zero;
      for (int64_t part = 0; part < p.parts; ++part) {
        const V level = get(share + part * ld + r);
        const V weight = pick(equal(level, level), power(level - shift), level);  // NaN stays NaN
        put(share + part * ld + r, weight);
        sum = sum + weight;
      }
      const V divisor = pick(equal(sum, zero), one, sum);
      for (int64_t part = 0; part < p.parts; ++part)
        put(share + part * ld + r, get(share + part * ld + r) / divisor);
      put(top + r, shift);
      put(total + r, sum);
    }
  }

  static inline const T* row(const MergeRows<T>& x, const MergeItem& item, int64_t t, int64_t h) {
    return x.data + item.batch * x.batch + (item.seq + t) * x.seq + (item.head + h) * x.head;
  }

  template <int U, class Tail>
  static inline void combine(const Problem& p, const MergeItem& item, int64_t t, int64_t h, const Acc* share,
                             int64_t ld, int64_t c, T* out, bool past, Tail tail) {
    V sum[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) sum[u] = all(Acc(0));
    for (int64_t part = 0; part < p.parts; ++part) {
      const Acc own = share[part * ld];
      if (own == 0) continue;  // an unseen part may hold anything, NaN included
      const V factor = all(own);
      const T* const x = row(p.outs[part], item, t, h) + c;
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        if (u % kLine<T> == 0) __builtin_prefetch(x + u * L + kAhead);
        sum[u] = sum[u] + factor * get(x + u * L, tail);
      }
    }
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) leave(out + c + u * L, sum[u], past, tail);
  }

  static void forward(const Problem& p, const MergeItem& item, T* out, Acc* lse, bool past, Acc* scratch) {
    const int64_t rows = item.heads * item.positions, ld = padded(rows);
    Acc *const share = scratch, *const top = scratch + p.parts * ld, *const total = top + ld;
    weigh(p, item, share, top, total);
    for (int64_t h = 0; h < item.heads; ++h) {
      Acc* const to = lse + (item.batch * p.heads + item.head + h) * p.seq + item.seq;
      for (int64_t t = 0; t < item.positions; ++t) {
        const int64_t r = h * item.positions + t;
        to[t] = total[r] == 0 ? -static_cast<Acc>(__builtin_inf()) : logarithm(total[r]) + top[r];
      }
    }
    for (int64_t t = 0; t < item.positions; ++t) {
      for (int64_t h = 0; h < item.heads; ++h) {
        T* const to = out + ((item.batch * p.seq + item.seq + t) * p.heads + item.head + h) * p.dim;
        const Acc* const own = share + h * item.positions + t;
        each_vector<kTogether, Acc>(p.dim, [&](int64_t c, auto many, auto tail) {
          combine<decltype(many)::value>(p, item, t, h, own, ld, c, to, past, tail);
        });
      }
    }
    if (past) settle();
  }

  // share * grad_out to every part; its product with the part's values joins `dot`
  template <int U, class Tail>
  static inline void distribute(const Problem& p, const MergeItem& item, int64_t t, int64_t h, const T* grad,
                                const MergeGradient<T>* to, const Acc* share, double* dot, int64_t ld, int64_t c,
                                bool past, Tail tail) {
    const int64_t at = ((item.batch * p.seq + item.seq + t) * p.heads + item.head + h) * p.dim + c;
    V g[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) g[u] = get(grad + c + u * L, tail);
    for (int64_t part = 0; part < p.parts; ++part) {
      const Acc own = share[part * ld];
      T* const dx = to[part].out + at;
      if (!(own > 0)) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) leave(dx + u * L, all(Acc(0)), past, tail);
        continue;
      }
      const T* const x = row(p.outs[part], item, t, h) + c;
      V sum[4] = {all(Acc(0)), all(Acc(0)), all(Acc(0)), all(Acc(0))};  // short chains lose fewer digits
      const V factor = all(own);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        if (u % kLine<T> == 0) __builtin_prefetch(x + u * L + kAhead);
        sum[u % 4] = sum[u % 4] + g[u] * get(x + u * L, tail);
        leave(dx + u * L, g[u] * factor, past, tail);
      }
      dot[part * ld] += sum_lanes((sum[0] + sum[2]) + (sum[1] + sum[3]));
    }
  }

  static void backward(const Problem& p, const MergeItem& item, const MergeRows<T>& grad_out, const Acc* grad_lse,
                       const MergeGradient<T>* to, bool past, Acc* scratch) {
    const int64_t rows = item.heads * item.positions, ld = padded(rows);
    Acc *const share = scratch, *const top = scratch + p.parts * ld, *const total = top + ld;
    double *const dot = reinterpret_cast<double*>(total + ld), *const mean = dot + p.parts * ld;
    weigh(p, item, share, top, total);
    for (int64_t i = 0; i < p.parts * ld; ++i) dot[i] = 0;
    for (int64_t t = 0; t < item.positions; ++t) {
      for (int64_t h = 0; h < item.heads; ++h) {
        const int64_t r = h * item.positions + t;
        const T* const g = row(grad_out, item, t, h);
        each_vector<kTogether, Acc>(p.dim, [&](int64_t c, auto many, auto tail) {
          distribute<decltype(many)::value>(p, item, t, h, g, to, share + r, dot + r, ld, c, past, tail);
        });
      }
    }
    for (int64_t r = 0; r < rows; ++r) mean[r] = 0;
    for (int64_t part = 0; part < p.parts; ++part)
      for (int64_t r = 0; r < rows; ++r) mean[r] += static_cast<double>(share[part * ld + r]) * dot[part * ld + r];
    for (int64_t part = 0; part < p.parts; ++part) {
      for (int64_t h = 0; h < item.heads; ++h) {
        const int64_t at = (item.batch * p.heads + item.head + h) * p.seq + item.seq;
        for (int64_t t = 0; t < item.positions; ++t) {
          const int64_t r = h * item.positions + t;
          const Acc own = share[part * ld + r];
          to[part].lse[at + t] = own > 0 ? own * static_cast<Acc>(dot[part * ld + r] - mean[r] + grad_lse[at + t]) : Acc(0);
        }
      }
    }
    if (past) settle();
  }

  static MergePath<T> path() { return {scratch, forward, backward}; }
};

}  // namespace

template <class T>
MergePath<T> merge_path() {
  return Kernel<T>::path();
}
template MergePath<float> merge_path<float>();
template MergePath<double> merge_path<double>();
template MergePath<bfloat16> merge_path<bfloat16>();
template MergePath<float16> merge_path<float16>();

}  // namespace hici::cpu::HICI_PATH
