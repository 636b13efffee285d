// Statistics of rows, block of channels by block of channels; each lane of a vector is one channel.
//
// Eight rows at a time are read once, as distances from the first of them. These stay in registers between two sweeps: their
// mean first, then squared deviations from it; 16-bit elements need one sweep only (`look`). The result is merged into the
// running state by Chan's rule, relative to the mean of the sequence's first segment. So memory is read once, and neither
// mean nor variance is ever a difference of large numbers. The gradient needs no positions of extremes: going through the
// rows in order, the first one that equals the extreme takes its gradient; in the running form a segment holds the extreme
// first if the previous group's was another.
//
// Roofline. An element costs 6 operations forward (subtract, add, maximum, minimum, subtract, multiply-add), so memory
// bounds all forms. Bytes: shared forward, local once; causal forward, local once plus 5 rows per segment written;
// backward, local twice and its gradient once, in the running form also 5 rows of gradient and 4 rows of facts per
// segment (mean, slope in float; extremes in the element type), written and read.
//
// What was tried, and what it gave on one core of a Zen 5 (copy: 37 GB/s read + written in the same runs, 256 MiB, slots
// 8, H 4096; processor time of the thread, since the machine was shared; bytes are local plus result):
//   - two sweeps over rows in the first-level cache: AVX-512 16 GB/s float32, 15 GB/s bfloat16. Blocks of 1024 channels
//     fill that cache with rows, state and rows prefetched; 512 channels gave 18, 256 gave 20, but lost as much backward.
//   - rows in registers instead, 512 channels: AVX-512 28 GB/s float32, 23 bfloat16; AVX2 24 and 13.
//   - causal, stored past the caches: AVX-512 32 GB/s float32, 22 bfloat16; AVX2 19 and 9. bfloat16 is bound by
//     instructions on one core: widening is a quarter of them.
//   - a prefetch of the next segment's same channels is part of all of these: a row of a block is at most a page, and the
//     processor's own prefetching starts anew at every page. Below a megabyte it costs 1 us and is left out.
//   - [1, 4, 8, 4096], one thread, native call: 13.4 us shared, 17.5 causal in float32; with the first segment read once
//     (its rows are their own shift), means read back from the result, and no division per element 12.8 and 16.7; without
//     the prefetch 11.3 and 15.1 (bfloat16 12.2 and 14.7). Leaving out square roots or the norm changes nothing: the
//     causal form is bound by writing its 320 KB.
//   - the same on a Zen 4, whole call, fastest of 25 windows of a loop not kept: 28.4 us shared, 33.5 causal; with sums as
//     trees, fused squares and the loop inlined where its pointers are known 25.6 and 31.4, of which 7 are the way through
//     Python. Smaller blocks and the prefetch change nothing. By llvm-mca (-mcpu=znver4) the loop takes 5.1 cycles a
//     vector and row, 11 us at 3.66 GHz.
// And on one core of a Zen 4, 256 MiB, shared, milliseconds of thread time beside other work (medians of 7 to 11 calls,
// alternating with a copy of as many bytes, which took 15 to 19):
//   - 512 channels of a row at a time: 26 float32, 39 bfloat16. A row of 1 KB is a quarter of a page, and neither address
//     translation nor the processor's own prefetching gets going. 8 KB of a row: 24 and 28.
//   - distances from the first of eight rows, widening in one instruction, one sweep for 16-bit elements: 20 and 26 (a loop
//     in the first cache, 16 bfloat16: 1.78 ns, with that widening 1.50, with one sweep 1.17). One sweep of float32 lost
//     what the standard deviation of 8 rows may not lose (1.13 budgets).
//   - both vectors of a line of bfloat16 at once: no difference. Prefetch into the second-level cache instead of the first,
//     which the rows ahead do not fit: 18 and 24. From there on two threads read float32 as fast as a copy.
//   - without the sums of what rounding takes, where 16 bits do not show it: 13.4 to 11.6 for two threads, bfloat16.
//   - left: 16 or 32 rows of the next segments merged at once 43 and 33 float32, 54 and 43 bfloat16 (so many streams of
//     reads defeat every prefetch); all channels of a segment before the next, in narrow blocks: as 8 KB or worse; lines
//     asked for 256 bytes to 2 KB ahead in the same row: none better.
#include "../global_stats.h"

#include "lanes.h"

namespace hici::cpu::HICI_PATH {
namespace {

// Where rows that come next are brought: a block of them would not fit the first cache beside the present one.
constexpr int kSecondLevel = 2;

constexpr double kStdFloor = 1e-6, kVarianceFloor = 1e-12;

template <class T>
struct Kernel {
  using Acc = typename simd::accumulator<T>::type;
  using V = typename lanes<Acc>::value;
  using Planes = StatsPlanes<Acc>;
  static constexpr int L = lanes<Acc>::count;

  static void start(const T* x, int64_t stride, int64_t rows, int64_t n, const Planes& planes) {
    const Acc share = 1 / static_cast<Acc>(rows);
    each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) {
      if (rows == kStatsPiece) {  // as begin_rows(): states of one sequence must have the same shift
        Piece<1> seen;
        seen.top[0] = seen.low[0] = all(Acc(0));
        look<kStatsPiece, false>(x + c, stride, 0, seen, tail);
        put(planes.shift + c, seen.from[0] + seen.own[0]);
      } else {
        V sum = all(Acc(0));
        for (int64_t r = 0; r < rows; ++r) sum = sum + get(x + r * stride + c, tail);
        put(planes.shift + c, sum * share);
      }
      put(planes.mean + c, all(Acc(0)));
      put(planes.squares + c, all(Acc(0)));
      if (planes.mean_excess) {
        put(planes.mean_excess + c, all(Acc(0)));
        put(planes.squares_excess + c, all(Acc(0)));
      }
      put(planes.top + c, all(-static_cast<Acc>(__builtin_inf())));
      put(planes.low + c, all(static_cast<Acc>(__builtin_inf())));
    });
  }

  struct Weights {
    Acc own, share, between;  // 1 / added; added / total; count * added / total
  };

  // sum += more, and what rounding adds to it goes to excess (Kahan)
  static inline void gather(Acc* sum, Acc* excess, V more) {
    const V old = get(sum), exact = more - get(excess), total = old + exact;
    put(excess, (total - old) - exact);
    put(sum, total);
  }

  // Chan's rule for one set of rows whose mean and squared deviations are known.
  static inline void join(Planes planes, int64_t c, Weights w, V own, V spread) {
    V gap = own - get(planes.mean + c);
    if (planes.mean_excess) {
      gap = gap + get(planes.mean_excess + c);
      gather(planes.mean + c, planes.mean_excess + c, gap * w.share);
      gather(planes.squares + c, planes.squares_excess + c, spread + gap * gap * w.between);
    } else {
      put(planes.mean + c, get(planes.mean + c) + gap * w.share);
      put(planes.squares + c, get(planes.squares + c) + spread + gap * gap * w.between);
    }
  }

  static inline V mean_of(Planes planes, int64_t c) {
    const V mean = get(planes.shift + c) + get(planes.mean + c);
    return planes.mean_excess ? mean - get(planes.mean_excess + c) : mean;
  }

  // Comparisons are false for NaN, but a set that holds one has no maximum, as in torch.amax.
  template <class Tail>
  static __attribute__((noinline, cold)) void spoil(const T* x, int64_t stride, int64_t rows, Acc* top, Acc* low,
                                                    Tail tail) {
    for (int64_t r = 0; r < rows; ++r) {
      const V v = get(x + r * stride, tail);
      const auto bad = is_nan(v);
      put(top, pick(bad, v, get(top)));
      put(low, pick(bad, v, get(low)));
    }
  }

  // R rows of U vectors: their first one, their mean seen from it, their squared deviations and all extremes so far.
  template <int U>
  struct Piece {
    V from[U], own[U], spread[U], top[U], low[U];
  };

  // The sum of R values as a tree: a chain would be waited for.
  template <int R>
  __attribute__((always_inline)) static inline V sum_of(const V* d) {
    V part[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = d[r];
#pragma GCC unroll 4
    for (int half = R / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int r = 0; r < half; ++r) part[r] = part[r] + part[r + half];
    return part[0];
  }

  // Vectors of a line inside, rows outside: rows that lie a power of two apart push each other out of the first cache.
  template <int R, bool Ahead, int U, class Tail>
  __attribute__((always_inline)) static inline void look(const T* x, int64_t stride, int64_t ahead, Piece<U>& seen,
                                                         Tail tail) {
    // Squared deviations as a difference, sum d^2 - (sum d)^2 / R. Since d of the first row is 0, (sum d)^2 / R is at most
    // (R - 1) / R of the squares, and three bits are lost, which distances of numbers of 8 or 11 bits do not need.
    constexpr bool kOneSweep = sizeof(T) == 2;
    V d[U][R], sum[U], squares[U];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T* const p = x + r * stride;
      if (Ahead) __builtin_prefetch(p + ahead, 0, kSecondLevel);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const V v = get(p + u * L, tail);
        seen.top[u] = higher(v, seen.top[u]);
        seen.low[u] = lower(v, seen.low[u]);
        if (r == 0) seen.from[u] = v;
        d[u][r] = r == 0 ? all(Acc(0)) : v - seen.from[u];
        if (!kOneSweep || r == 0) continue;
        sum[u] = r == 1 ? d[u][r] : sum[u] + d[u][r];
        squares[u] = r == 1 ? d[u][r] * d[u][r] : fused(d[u][r], d[u][r], squares[u]);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      if (!kOneSweep) sum[u] = sum_of<R>(d[u]);
      seen.own[u] = sum[u] * (Acc(1) / R);
      if (kOneSweep) {
        // the second is never the larger one, but still infinite where the first is the difference of two infinities
        seen.spread[u] = higher(squares[u] - sum[u] * seen.own[u], squares[u] * (Acc(1) / R));
        continue;
      }
      V part[R / 2];
#pragma GCC unroll 4
      for (int r = 0; r < R / 2; ++r) {
        const V e = d[u][r] - seen.own[u], f = d[u][r + R / 2] - seen.own[u];
        part[r] = fused(f, f, e * e);
      }
      seen.spread[u] = sum_of<R / 2>(part);
    }
  }

  template <int R, bool Ahead, int U, class Tail>
  __attribute__((always_inline)) static inline void absorb_rows(const T* x, int64_t stride, int64_t ahead,
                                                                Planes planes, Weights w, int64_t c, Tail tail) {
    Piece<U> seen;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) seen.top[u] = get(planes.top + c + u * L), seen.low[u] = get(planes.low + c + u * L);
    look<R, Ahead>(x + c, stride, ahead, seen, tail);
    V bad = all(Acc(0));
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int64_t at = c + u * L;
      bad = bad + seen.own[u];
      join(planes, at, w, seen.own[u] + (seen.from[u] - get(planes.shift + at)), seen.spread[u]);
      put(planes.top + at, seen.top[u]);
      put(planes.low + at, seen.low[u]);
    }
    if (__builtin_expect(any(is_nan(bad)), 0))
      for (int u = 0; u < U; ++u)
        spoil(x + c + u * L, stride, R, planes.top + c + u * L, planes.low + c + u * L, tail);
  }

  // The first R rows of a sequence whose segments have no more: start() and absorb_rows() in one, to the same bits.
  template <int R, bool Ahead, int U, class Tail>
  __attribute__((always_inline)) static inline void begin_rows(const T* x, int64_t stride, int64_t ahead,
                                                               Planes planes, int64_t c, Tail tail) {
    const V highest = all(static_cast<Acc>(__builtin_inf())), none = all(Acc(0));
    Piece<U> seen;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) seen.top[u] = none - highest, seen.low[u] = highest;
    look<R, Ahead>(x + c, stride, ahead, seen, tail);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int64_t at = c + u * L;
      const V shift = seen.from[u] + seen.own[u];
      put(planes.shift + at, shift);
      put(planes.mean + at, seen.own[u] + (seen.from[u] - shift));
      put(planes.squares + at, seen.spread[u]);
      if (planes.mean_excess) {
        put(planes.mean_excess + at, none);
        put(planes.squares_excess + at, none);
      }
      put(planes.top + at, seen.top[u]);
      put(planes.low + at, seen.low[u]);
      if (__builtin_expect(any(is_nan(seen.own[u])), 0))
        spoil(x + at, stride, R, planes.top + at, planes.low + at, tail);
    }
  }

  // Any number of rows, read twice; the second time from the first-level cache.
  template <class Tail>
  static inline void absorb_some(const T* x, int64_t stride, int64_t rows, Planes planes, Weights w, int64_t c,
                                 Tail tail) {
    const V shift = get(planes.shift + c);
    V top = get(planes.top + c), low = get(planes.low + c), sum = all(Acc(0)), spread = sum;
    for (int64_t r = 0; r < rows; ++r) {
      const V v = get(x + r * stride + c, tail);
      sum = sum + (v - shift);
      top = higher(v, top);
      low = lower(v, low);
    }
    const V own = sum * w.own;
    for (int64_t r = 0; r < rows; ++r) {
      const V e = get(x + r * stride + c, tail) - shift - own;
      spread = spread + e * e;
    }
    join(planes, c, w, own, spread);
    put(planes.top + c, top);
    put(planes.low + c, low);
    if (__builtin_expect(any(is_nan(sum)), 0)) spoil(x + c, stride, rows, planes.top + c, planes.low + c, tail);
  }

  static Weights weights(int64_t count, int64_t added) {
    const double total = static_cast<double>(count) + static_cast<double>(added);
    const double share = static_cast<double>(added) / total;
    return {static_cast<Acc>(1 / static_cast<double>(added)), static_cast<Acc>(share),
            static_cast<Acc>(static_cast<double>(count) * share)};
  }

  static void absorb(const T* x, int64_t stride, int64_t rows, int64_t ahead, int64_t n, const Planes& planes,
                     int64_t count) {
    const Weights w = weights(count, rows);
    const Planes local = planes;
    if (rows == kStatsPiece && ahead)
      each_vector<kLine<T>, Acc>(n, [&](int64_t c, auto many, auto tail) __attribute__((always_inline)) {
        absorb_rows<kStatsPiece, true, decltype(many)::value>(x, stride, ahead, local, w, c, tail);
      });
    else if (rows == kStatsPiece)
      each_vector<kLine<T>, Acc>(n, [&](int64_t c, auto many, auto tail) __attribute__((always_inline)) {
        absorb_rows<kStatsPiece, false, decltype(many)::value>(x, stride, 0, local, w, c, tail);
      });
    else
      each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) { absorb_some(x, stride, rows, local, w, c, tail); });
  }

  static void begin(const T* x, int64_t stride, int64_t rows, int64_t ahead, int64_t n, const Planes& planes) {
    if (rows != kStatsPiece) {
      start(x, stride, rows, n, planes);
      return absorb(x, stride, rows, ahead, n, planes, 0);
    }
    const Planes local = planes;
    if (ahead)
      each_vector<kLine<T>, Acc>(n, [&](int64_t c, auto many, auto tail) __attribute__((always_inline)) {
        begin_rows<kStatsPiece, true, decltype(many)::value>(x, stride, ahead, local, c, tail);
      });
    else
      each_vector<kLine<T>, Acc>(n, [&](int64_t c, auto many, auto tail) __attribute__((always_inline)) {
        begin_rows<kStatsPiece, false, decltype(many)::value>(x, stride, 0, local, c, tail);
      });
  }

  static void merge(const Planes& into, int64_t count, const Planes& from, int64_t added, int64_t n,
                    int32_t* top_owner, int32_t* low_owner, int32_t id) {
    const Weights w = weights(count, added);
    for (int64_t c = 0; c < n; c += L) {
      if (from.mean_excess) {
        join(into, c, w, get(from.mean + c), get(from.squares + c) - get(from.squares_excess + c));
        put(into.mean_excess + c, get(into.mean_excess + c) + get(from.mean_excess + c) * w.share);
      } else {
        join(into, c, w, get(from.mean + c), get(from.squares + c));
      }
      const V top = get(into.top + c), low = get(into.low + c), high = get(from.top + c), deep = get(from.low + c);
      const auto up = either(greater(high, top), but_not(is_nan(high), is_nan(top)));
      const auto down = either(greater(low, deep), but_not(is_nan(deep), is_nan(low)));
      put(into.top + c, pick(up, high, top));
      put(into.low + c, pick(down, deep, low));
      if (top_owner) {
        number(top_owner + c, up, id, top);
        number(low_owner + c, down, id, low);
      }
    }
  }

  static double emit(const Planes& planes, int64_t count, int64_t n, T* out, int64_t stride, Acc* means, bool past) {
    const Acc each = 1 / static_cast<Acc>(count);
    const bool keep = static_cast<const void*>(means) != static_cast<const void*>(out);
    DotSum norm;
    each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) {
      const V mean = mean_of(planes, c);
      const V variance = get(planes.squares + c) * each;
      if (keep) put(means + c, mean, tail);
      leave(out + c, mean, past, tail);
      leave_exact(out + stride + c, get(planes.top + c), past, tail);
      leave_exact(out + 2 * stride + c, get(planes.low + c), past, tail);
      const auto flat = at_most(variance, all(Acc(kVarianceFloor)));
      leave(out + 3 * stride + c, pick(flat, all(Acc(kStdFloor)), root(variance)), past, tail);
      norm.add(mean, mean);
    });
    return norm.total();
  }

  static void finish(const Acc* means, Acc norm, int64_t n, T* out, bool past) {
    // outside, 1 / norm or what is left of a mean may not be a normal number
    if (!(norm >= Acc(1e-6) && norm <= Acc(1e30))) {
      each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) { leave(out + c, get(means + c, tail) / norm, past, tail); });
      return;
    }
    const V by = all(norm), inverse = all(1 / norm);
    each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) {
      leave(out + c, quotient(get(means + c, tail), by, inverse), past, tail);
    });
  }

  static StatsNorm facts(const Planes& planes, int64_t count, int64_t n, const T* unit, const StatsFacts<T>& to) {
    const Acc each = 1 / static_cast<Acc>(count), rows = static_cast<Acc>(count);
    DotSum norm, along;
    each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) {
      const V own = get(planes.mean + c), mean = mean_of(planes, c);
      const V variance = get(planes.squares + c) * each;
      const auto flat = at_most(variance, all(Acc(kVarianceFloor)));
      put(to.mean + c, own);
      put(to.slope + c, pick(flat, all(Acc(0)), all(Acc(1)) / (root(variance) * rows)));
      leave_exact(to.top + c, get(planes.top + c), false, tail);
      leave_exact(to.low + c, get(planes.low + c), false, tail);
      norm.add(mean, mean);
      along.add(mean, get(unit + c, tail));
    });
    return {norm.total(), along.total()};
  }

  template <int U, class Tail>
  static inline void spread_rows(const StatsSpread<T>& a, int64_t at, Tail tail) {
    V base[U], slope[U], centre[U], top_value[U], low_value[U], top[U], low[U];
    for (int u = 0; u < U; ++u) {
      const int64_t c = at + u * L;
      const V mean = get(a.group.mean + c), shift = get(a.shift + c);
      V constant = get(a.sums.constant + c), drift = get(a.sums.drift + c);
      slope[u] = get(a.sums.slope + c), top[u] = get(a.sums.top + c), low[u] = get(a.sums.low + c);
      // drift = sum over later groups of slope_i * (mean - mean_i), kept relative to the present mean
      if (a.next_mean) drift = drift + slope[u] * (mean - get(a.next_mean + c));
      if (a.grad) {
        const T* const g = a.grad + c;
        const V unit = get(g + 4 * a.grad_stride, tail);
        constant = constant + (get(g, tail) + (unit - (mean + shift) * a.project) * a.inverse) * a.each;
        slope[u] = slope[u] + get(g + 3 * a.grad_stride, tail) * get(a.group.slope + c);
        V more = get(g + a.grad_stride, tail), less = get(g + 2 * a.grad_stride, tail);
        if (a.top_owner) {
          more = pick(equals(a.top_owner + c, a.number, more), more, all(Acc(0)));
          less = pick(equals(a.low_owner + c, a.number, less), less, all(Acc(0)));
        }
        top[u] = top[u] + more, low[u] = low[u] + less;
      }
      put(a.sums.constant + c, constant);
      put(a.sums.drift + c, drift);
      put(a.sums.slope + c, slope[u]);
      base[u] = constant + drift;
      centre[u] = mean, top_value[u] = get(a.group.top + c, tail), low_value[u] = get(a.group.low + c, tail);
      put(a.sums.top + c, top[u]);
      put(a.sums.low + c, low[u]);
    }
    if (a.rows == 0) return;
    V top_later[U], low_later[U], shift[U];
    for (int u = 0; u < U; ++u) {
      const int64_t c = at + u * L;
      shift[u] = get(a.shift + c);
      top_later[u] = low_later[u] = all(Acc(0));
      if (a.before_top) {
        // an extreme that the previous group has too lies in an earlier segment
        const V top_before = get(a.before_top + c, tail), low_before = get(a.before_low + c, tail);
        const auto top_kept = either(equal(top_before, top_value[u]), is_nan(top_before));
        const auto low_kept = either(equal(low_before, low_value[u]), is_nan(low_before));
        top_later[u] = pick(top_kept, top[u], top_later[u]), top[u] = pick(top_kept, all(Acc(0)), top[u]);
        low_later[u] = pick(low_kept, low[u], low_later[u]), low[u] = pick(low_kept, all(Acc(0)), low[u]);
      }
    }
    for (int64_t r = 0; r < a.rows; ++r) {
      const T* const x = a.x + r * a.stride + at;
      T* const dx = a.dx + r * a.dx_stride + at;
      for (int u = 0; u < U; ++u) {
        const V v = get(x + u * L, tail), none = all(Acc(0));
        // the first row that holds the extreme takes all that is left of its gradient
        const auto bad = is_nan(v), highest = either(equal(v, top_value[u]), bad);
        const auto lowest = either(equal(v, low_value[u]), bad);
        V d = base[u] + slope[u] * (v - shift[u] - centre[u]);
        d = d + pick(highest, top[u], none);
        d = d + pick(lowest, low[u], none);
        top[u] = pick(highest, none, top[u]);
        low[u] = pick(lowest, none, low[u]);
        leave(dx + u * L, d, a.stream, tail);
      }
    }
    for (int u = 0; u < U; ++u) {
      const int64_t c = at + u * L;
      put(a.sums.top + c, top_later[u] + top[u]);
      put(a.sums.low + c, low_later[u] + low[u]);
    }
  }

  static void spread(const StatsSpread<T>& a) {
    each_vector<kLine<T>, Acc>(a.channels, [&](int64_t c, auto many, auto tail) {
      spread_rows<decltype(many)::value>(a, c, tail);
    });
  }

  static StatsPath<T> path() { return {start, begin, absorb, merge, emit, finish, facts, spread, settle}; }
};

}  // namespace

template <class T>
StatsPath<T> stats_path() {
  return Kernel<T>::path();
}
template StatsPath<float> stats_path<float>();
template StatsPath<double> stats_path<double>();
template StatsPath<bfloat16> stats_path<bfloat16>();
template StatsPath<float16> stats_path<float16>();

}  // namespace hici::cpu::HICI_PATH
