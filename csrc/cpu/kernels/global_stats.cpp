// Statistics of rows, block of channels by block of channels; each lane of a vector is one channel.
//
// Eight rows at a time are read once, as distances from the mean of all before them; those of the first segment find their
// squared deviations by themselves (`look`). What they give is merged into the running state by Chan's rule, relative to
// the mean of the sequence's first segment. So memory is read once, and neither mean nor variance is ever a difference of
// large numbers. The gradient needs no positions of extremes: going through the rows in order, the first one that equals
// the extreme takes its gradient; in the running form a segment holds the extreme first if the previous group's was
// another.
//
// Roofline. An element costs 5 operations forward (a distance, its sum, its square, the maximum and the minimum, of which a
// quarter is logic) and a quarter more for the state, 16-bit elements a widening, so memory bounds all forms that are not
// in a cache. Bytes: shared forward, local once; causal forward, local once plus 5 rows per segment written; backward,
// local twice and its gradient once, in the running form also 5 rows of gradient and 4 rows of facts per segment (mean,
// slope in float; extremes in the element type), written and read.
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
//   - then, native call, a loop not kept, builds mostly side by side in one process, fastest window, float32, one thread: 17.0
//     shared, 22.7 causal. Of each pair of rows only the maximum by comparison and the minimum by logic, which more units
//     do, and shorter chains of additions: 13.7 and 18.0 (bfloat16 13.9 to 13.4). Distances from the first of 8 rows had
//     made means err by more than our budget where that row was far off, at this very shape; from the middle one of three
//     16.1 and 20.3; from the running mean, with one sweep, 14.1 and 18.3 (bfloat16 13.8, and 256 MiB of it 4 % slower).
//     The mean in two numbers, without which a first segment far from the others cost up to 3 budgets: 0.3 more. The tree
//     of sums as a template instead of a loop that is unrolled: slower by 0.9, by the order of instructions alone.
//   - 2 threads had gained 3 us in the shared form and nothing in the causal one: whoever was free took a block, and the
//     rows it left in its cache were the other's the next time, and in the norm. With a share for every worker, the same in
//     every call, and the norm in the same parallel region: about 9 and 12 us, bfloat16 too. Where the other core
//     does not come, as happens on a virtual machine, the first one does all in 0.6 us more than alone.
//   - left: results written by the loop that absorbs their rows, 18.0 to 21.6 causal, perhaps because square roots keep a
//     multiplier busy; looking for NaN once a block instead of once a vector, slower by 0.3; sums of a thread on cache
//     lines of their own, slower by 0.3; blocks of 256 or 1,024 channels, slower by 0.6 to 2. All rows in the first cache
//     would give 9.2 of the 11.4 that the loops take in the shared form.
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

  struct Weights {
    Acc own, share, rest, between;  // 1 / added; added / total, rounded, and what that has lost; count * added / total
  };

  // sum += more, and what rounding adds to it goes to excess (Kahan)
  static inline void gather(Acc* sum, Acc* excess, V more) {
    const V old = get(sum), exact = more - get(excess), total = old + exact;
    put(excess, (total - old) - exact);
    put(sum, total);
  }

  // A state of rows whose mean seen from `from` and squared deviations are known.
  static inline void found(Planes planes, int64_t c, V from, V own, V spread) {
    const V mean = from + own, none = all(Acc(0));
    put(planes.shift + c, mean);
    put(planes.mean + c, mean);
    put(planes.rest + c, own + (from - mean));
    put(planes.squares + c, spread);
    if (planes.excess) put(planes.excess + c, none);
  }

  // Chan's rule for one more set of rows, whose mean, as it is above that of the state, and squared deviations are known.
  static inline void join(Planes planes, int64_t c, Weights w, V above, V spread) {
    const V old = get(planes.mean + c);
    const V more = fused(above, all(w.share), fused(above, all(w.rest), get(planes.rest + c))), mean = old + more;
    put(planes.mean + c, mean);
    put(planes.rest + c, more - (mean - old));
    if (planes.excess)
      gather(planes.squares + c, planes.excess + c, spread + above * above * w.between);
    else
      put(planes.squares + c, fused(above * above, all(w.between), get(planes.squares + c) + spread));
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

  // Squared deviations that are not a number: infinite where it is the difference of two infinities, else there is none,
  // as the mean is not finite.
  static inline V mend(V own, V spread) {
    return pick(is_nan(spread), all(static_cast<Acc>(__builtin_inf())) + (own - own), spread);
  }

  // R rows of U vectors: their mean seen from `from`, their squared deviations and all extremes so far.
  template <int U>
  struct Piece {
    V from[U], own[U], spread[U], top[U], low[U];
  };

  // Two rows at a time, so that few of them stay in registers. Vectors of a line inside, rows outside: rows that lie a
  // power of two apart push each other out of the first cache.
  //
  // With `Alone`, the rows must give their squared deviations by themselves. They are half the squared differences of
  // pairs, a quarter of those of the pairs' sums, and so on (a Haar transform): sums of squares, of which nothing is
  // taken away. Distances are from the middle one of three rows, lest they are all from a value far off.
  //
  // Otherwise there is a state of `count` rows, whose mean is `from` (rounded), and the distances d give
  //     sum d^2 - (sum d)^2 / R, to which join() adds (sum d)^2 / R * count / (count + R).
  // At most half of sum d^2 goes away: one sweep is enough, to whatever values rows may drift.
  template <int R, bool Alone, bool Ahead, int U, class Tail>
  __attribute__((always_inline)) static inline void look(const T* x, int64_t stride, int64_t ahead, Piece<U>& seen,
                                                         Tail tail) {
    static_assert(R >= 4 && (R & (R - 1)) == 0);
    V sum[U][R / 2], squares[U], more[U];
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
      const T* const p = x + r * stride;
      if (Ahead) __builtin_prefetch(p + ahead, 0, kSecondLevel);
      if (Ahead) __builtin_prefetch(p + stride + ahead, 0, kSecondLevel);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const V a = get(p + u * L, tail), b = get(p + stride + u * L, tail), high = higher(a, b);
        const V low = other(a, b, high);
        seen.top[u] = higher(high, seen.top[u]);
        seen.low[u] = lower(low, seen.low[u]);
        if (Alone && r == 0) seen.from[u] = higher(low, lower(high, get(p + 2 * stride + u * L, tail)));
        const V d = a - seen.from[u], e = b - seen.from[u], gap = d - e;
        sum[u][r / 2] = d + e;
        if (Alone) {
          squares[u] = r == 0 ? gap * gap : fused(gap, gap, squares[u]);
        } else {
          squares[u] = r == 0 ? d * d : fused(d, d, squares[u]);
          more[u] = r == 0 ? e * e : fused(e, e, more[u]);
        }
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      V spread = Alone ? squares[u] * all(Acc(0.5)) : squares[u] + more[u];
      Acc share = Acc(0.25);
#pragma GCC unroll 4
      for (int n = R / 2; n > 1; n /= 2, share /= 2) {
        // nothing has a distance from an infinite mean: the sum of all adds 0, or NaN
        V level = n > 2 ? all(Acc(0)) : (sum[u][0] + sum[u][1]) * all(Acc(0));
        for (int i = 0; i < n / 2; ++i) {
          const V a = sum[u][2 * i], b = sum[u][2 * i + 1], gap = a - b;
          if (Alone) level = fused(gap, gap, level);
          sum[u][i] = a + b;
        }
        if (Alone) spread = fused(level, all(share), spread);
      }
      seen.own[u] = sum[u][0] * all(Acc(1) / R);
      if (!Alone) spread = fused(-seen.own[u], sum[u][0], spread);
      seen.spread[u] = spread;
    }
  }

  // Adds R rows to a state, or makes it of them (Alone).
  template <int R, bool Alone, bool Ahead, int U, class Tail>
  __attribute__((always_inline)) static inline void absorb_rows(const T* x, int64_t stride, int64_t ahead,
                                                                Planes planes, Weights w, int64_t c, Tail tail) {
    const V highest = all(static_cast<Acc>(__builtin_inf()));
    Piece<U> seen;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int64_t at = c + u * L;
      seen.top[u] = Alone ? -highest : get(planes.top + at), seen.low[u] = Alone ? highest : get(planes.low + at);
      if (!Alone) seen.from[u] = get(planes.mean + at);
    }
    look<R, Alone, Ahead>(x + c, stride, ahead, seen, tail);
    V bad = seen.spread[0];
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) bad = bad + seen.spread[u];
    const bool odd = __builtin_expect(any(is_nan(bad)), 0);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int64_t at = c + u * L;
      if (odd) seen.spread[u] = mend(seen.own[u], seen.spread[u]);
      if (Alone)
        found(planes, at, seen.from[u], seen.own[u], seen.spread[u]);
      else
        join(planes, at, w, seen.own[u] - get(planes.rest + at), seen.spread[u]);
      put(planes.top + at, seen.top[u]);
      put(planes.low + at, seen.low[u]);
      if (odd) spoil(x + at, stride, R, planes.top + at, planes.low + at, tail);
    }
  }

  // Any number of rows, read twice or thrice; after the first time from the first-level cache.
  template <bool Alone, class Tail>
  static inline void absorb_some(const T* x, int64_t stride, int64_t rows, Planes planes, Weights w, int64_t c,
                                 Tail tail) {
    const V highest = all(static_cast<Acc>(__builtin_inf())), none = all(Acc(0));
    V from = none, top = -highest, low = highest, sum = none, spread = none;
    if (Alone) {
      for (int64_t r = 0; r < rows; ++r) from = from + get(x + r * stride + c, tail);
      from = from * w.own;
    } else {
      from = get(planes.mean + c), top = get(planes.top + c), low = get(planes.low + c);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const V v = get(x + r * stride + c, tail);
      sum = sum + (v - from);
      top = higher(v, top);
      low = lower(v, low);
    }
    const V own = sum * w.own;
    for (int64_t r = 0; r < rows; ++r) {
      const V e = get(x + r * stride + c, tail) - from - own;
      spread = spread + e * e;
    }
    if (Alone)
      found(planes, c, from, own, spread);
    else
      join(planes, c, w, own - get(planes.rest + c), spread);
    put(planes.top + c, top);
    put(planes.low + c, low);
    if (__builtin_expect(any(is_nan(sum)), 0)) spoil(x + c, stride, rows, planes.top + c, planes.low + c, tail);
  }

  static Weights weights(int64_t count, int64_t added) {
    const double total = static_cast<double>(count) + static_cast<double>(added);
    const double share = static_cast<double>(added) / total;
    const Acc rounded = static_cast<Acc>(share);
    return {static_cast<Acc>(1 / static_cast<double>(added)), rounded,
            static_cast<Acc>(share - static_cast<double>(rounded)),
            static_cast<Acc>(static_cast<double>(count) * share)};
  }

  template <bool Alone, bool Ahead>
  static void absorb_piece(const T* x, int64_t stride, int64_t ahead, int64_t n, Planes planes, Weights w) {
    // a whole line at a time, and its rows ahead once; what is in cache needs neither, and more registers are left
    each_vector<Ahead ? kLine<T> : 1, Acc>(n, [&](int64_t c, auto many, auto tail) __attribute__((always_inline)) {
      absorb_rows<kStatsPiece, Alone, Ahead, decltype(many)::value>(x, stride, ahead, planes, w, c, tail);
    });
  }

  template <bool Alone>
  static void absorb_any(const T* x, int64_t stride, int64_t rows, int64_t ahead, int64_t n, Planes planes, Weights w) {
    if (rows != kStatsPiece)
      each_vector<1, Acc>(n, [&](int64_t c, auto, auto tail) { absorb_some<Alone>(x, stride, rows, planes, w, c, tail); });
    else if (ahead)
      absorb_piece<Alone, true>(x, stride, ahead, n, planes, w);
    else
      absorb_piece<Alone, false>(x, stride, 0, n, planes, w);
  }

  static void absorb(const T* x, int64_t stride, int64_t rows, int64_t ahead, int64_t n, const Planes& planes,
                     int64_t count) {
    const Weights w = weights(count, rows);
    if (count == 0)
      absorb_any<true>(x, stride, rows, ahead, n, planes, w);
    else
      absorb_any<false>(x, stride, rows, ahead, n, planes, w);
  }

  static void merge(const Planes& into, int64_t count, const Planes& from, int64_t added, int64_t n,
                    int32_t* top_owner, int32_t* low_owner, int32_t id) {
    const Weights w = weights(count, added);
    for (int64_t c = 0; c < n; c += L) {
      const V above = (get(from.mean + c) - get(into.mean + c)) + (get(from.rest + c) - get(into.rest + c));
      const V spread = get(from.squares + c);
      join(into, c, w, above, from.excess ? spread - get(from.excess + c) : spread);
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
      const V mean = get(planes.mean + c);
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
      const V mean = get(planes.mean + c), own = (mean - get(planes.shift + c)) + get(planes.rest + c);
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

  static StatsPath<T> path() { return {absorb, merge, emit, finish, facts, spread, settle}; }
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
