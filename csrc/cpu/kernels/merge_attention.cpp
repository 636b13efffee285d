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
inline float sum_lanes(Vec v) { return reduce_add(v); }
inline double sum_lanes(Wide v) {
  double lane[kWideLanes], sum = 0;
  put(lane, v);
  for (int i = 0; i < kWideLanes; ++i) sum += lane[i];
  return sum;
}

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
  // share and dot of every part, then the largest lse, the total and the weighted dot
  static int64_t scratch(int64_t parts, int64_t rows) { return (2 * parts + 3) * padded(rows); }

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
        const V weight = power(get(share + part * ld + r) - shift);
        put(share + part * ld + r, weight);
        sum = sum + weight;
      }
      const V divisor = pick(greater(sum, zero), one / pick(greater(sum, zero), sum, one), zero);
      for (int64_t part = 0; part < p.parts; ++part)
        put(share + part * ld + r, get(share + part * ld + r) * divisor);
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
      if (!(own > 0)) continue;  // an unseen part may hold anything, NaN included
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
    Acc *const share = scratch, *const top = scratch + 2 * p.parts * ld, *const total = top + ld;
    weigh(p, item, share, top, total);
    for (int64_t h = 0; h < item.heads; ++h) {
      Acc* const to = lse + (item.batch * p.heads + item.head + h) * p.seq + item.seq;
      for (int64_t t = 0; t < item.positions; ++t) {
        const int64_t r = h * item.positions + t;
        to[t] = total[r] > 0 ? logarithm(total[r]) + top[r] : -static_cast<Acc>(__builtin_inf());
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
                                const MergeGradient<T>* to, const Acc* share, Acc* dot, int64_t ld, int64_t c,
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
      V even = all(Acc(0)), odd = even;
      const V factor = all(own);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        if (u % kLine<T> == 0) __builtin_prefetch(x + u * L + kAhead);
        (u % 2 ? odd : even) = (u % 2 ? odd : even) + g[u] * get(x + u * L, tail);
        leave(dx + u * L, g[u] * factor, past, tail);
      }
      dot[part * ld] += sum_lanes(even + odd);
    }
  }

  static void backward(const Problem& p, const MergeItem& item, const MergeRows<T>& grad_out, const Acc* grad_lse,
                       const MergeGradient<T>* to, bool past, Acc* scratch) {
    const int64_t rows = item.heads * item.positions, ld = padded(rows);
    Acc *const share = scratch, *const dot = scratch + p.parts * ld, *const top = dot + p.parts * ld;
    Acc *const total = top + ld, *const mean = total + ld;
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
    for (int64_t r = 0; r < ld; r += L) {
      V sum = all(Acc(0));
      for (int64_t part = 0; part < p.parts; ++part) sum = sum + get(share + part * ld + r) * get(dot + part * ld + r);
      put(mean + r, sum);
    }
    for (int64_t part = 0; part < p.parts; ++part) {
      for (int64_t h = 0; h < item.heads; ++h) {
        const int64_t at = (item.batch * p.heads + item.head + h) * p.seq + item.seq;
        for (int64_t t = 0; t < item.positions; ++t) {
          const int64_t r = h * item.positions + t;
          const Acc own = share[part * ld + r];
          to[part].lse[at + t] = own > 0 ? own * (dot[part * ld + r] - mean[r] + grad_lse[at + t]) : Acc(0);
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
