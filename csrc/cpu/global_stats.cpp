// Each lane of a vector is one channel. A segment is reduced in two sweeps over its rows, which the first sweep brings
// into the first-level cache, and merged into the running state by Chan's rule; values are taken relative to the mean
// of the first segment. So memory is read once, and neither mean nor variance is ever a difference of large numbers.
//
// Channels are walked in blocks, so that the running state of a block stays in the first-level cache while rows stream
// through. Only the norm couples channels: its sums are collected per block and finished in block order.

#include "global_stats.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "hici/simd.h"

namespace hici::cpu {
namespace {

using namespace simd;

constexpr double kStdFloor = 1e-6, kNormFloor = 1e-6, kVarianceFloor = 1e-12;
constexpr int64_t kBlock = 1024;  // channels

// Segments [start, stop) that share statistics; `out` = first row group of the result they write.
struct Sequence {
  int64_t batch, start, stop, out;
};

std::vector<Sequence> sequences(const StatsProblem& p) {
  std::vector<Sequence> found;
  if (p.offsets) {
    for (int64_t d = 0; d < p.documents; ++d)
      found.push_back({0, p.offsets[d], p.offsets[d + 1], p.causal ? p.offsets[d] : d});
  } else {
    for (int64_t b = 0; b < p.batch; ++b) found.push_back({b, 0, p.segments, p.causal ? b * p.segments : b});
  }
  return found;
}

inline bool counts(const StatsProblem& p, const Sequence& s, int64_t segment) {
  return !p.valid || p.valid[s.batch * p.valid_batch + segment * p.valid_segment];
}

int64_t first_counting(const StatsProblem& p, const Sequence& s) {
  int64_t i = s.start;
  while (i < s.stop && !counts(p, s, i)) ++i;
  return i;
}

template <class T>
inline const T* segment_rows(const StatsProblem& p, const Sequence& s, const T* local, int64_t segment) {
  return local + s.batch * p.stride_batch + segment * p.stride_segment;
}

// Scratch of whole vectors, uninitialised.
template <class Acc>
class Plane {
 public:
  Plane() = default;
  explicit Plane(int64_t count) : data_(new Acc[count]) {}
  Acc* operator+(int64_t i) const { return data_.get() + i; }

 private:
  std::unique_ptr<Acc[]> data_;
};

inline int64_t padded(int64_t channels) { return (channels + 7) / 8 * 8; }

// Calls body(channel, tail) for every vector of channels [begin, end); tail = 0 for a whole vector, else its length.
template <class Acc, class Body>
inline void each_vector(int64_t begin, int64_t end, Body&& body) {
  constexpr int L = lanes<Acc>::count;
  int64_t c = begin;
  for (; c + L <= end; c += L) body(c, std::integral_constant<int, 0>{});
  if (c < end) body(c, static_cast<int>(end - c));
}

template <class V, class T>
inline V load(const T* p, std::integral_constant<int, 0>) {
  return widen(p);
}
template <class V, class T>
inline V load(const T* p, int tail) {
  return widen_part<V>(p, tail);
}
template <class V, class T>
inline void store(T* p, V v, std::integral_constant<int, 0>) {
  narrow(p, v);
}
template <class V, class T>
inline void store(T* p, V v, int tail) {
  narrow_part(p, v, tail);
}

template <class V>
inline V root(V v) {
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}

template <class V>
inline V deviation(V squares, V count) {
  const V variance = squares / count;
  return pick(variance <= splat<V>(kVarianceFloor), splat<V>(kStdFloor), root(variance));
}

// Running statistics of one block of channels; mean and squares are relative to `shift`.
template <class T, bool Track>
struct Running {
  using Acc = typename accumulator<T>::type;
  using V = typename lanes<Acc>::value;
  using I = typename lanes<Acc>::index;
  using Index = std::decay_t<decltype(I{}[0])>;

  alignas(64) Acc shift[kBlock], mean[kBlock], squares[kBlock], top[kBlock], low[kBlock];
  alignas(64) Index top_at[Track ? kBlock : 1], low_at[Track ? kBlock : 1];
  Acc count = 0;

  // rows of the first segment that counts: their mean is the origin
  void start(const T* rows, int64_t stride, int64_t slots, int64_t channels) {
    count = 0;
    each_vector<Acc>(0, channels, [&](int64_t c, auto tail) {
      V sum = {}, zero = {};
      for (int64_t r = 0; r < slots; ++r) sum += load<V>(rows + r * stride + c, tail);
      write(shift + c, sum / static_cast<Acc>(slots));
      write(mean + c, zero);
      write(squares + c, zero);
      write(top + c, splat<V>(-std::numeric_limits<Acc>::infinity()));
      write(low + c, splat<V>(std::numeric_limits<Acc>::infinity()));
      if constexpr (Track) {
        write(top_at + c, I{});
        write(low_at + c, I{});
      }
    });
  }

  void absorb(const T* rows, int64_t stride, int64_t slots, int64_t channels, int64_t first_row) {
    const Acc added = static_cast<Acc>(slots), total = count + added;
    const Rows from{rows, stride, slots, first_row};
    const Weights w{added, added / total, count * (added / total)};
    // two vectors at a time: the sums of one alone are a chain of dependent additions
    constexpr int L = lanes<Acc>::count;
    constexpr auto whole = std::integral_constant<int, 0>{};
    int64_t c = 0;
    for (; c + 2 * L <= channels; c += 2 * L) merge<2>(from, w, c, whole);
    each_vector<Acc>(c, channels, [&](int64_t at, auto tail) { merge<1>(from, w, at, tail); });
    count = total;
  }

 private:
  struct Rows {
    const T* data;
    int64_t stride, count, first;
  };
  struct Weights {
    Acc added, share, between;
  };

  template <int U, class Tail>
  inline void merge(const Rows& rows, const Weights& w, int64_t c, Tail tail) {
    constexpr int L = lanes<Acc>::count;
    V moved[U], sum[U], high[U], bottom[U], own[U], spread[U];
    I high_at[U], bottom_at[U];
    for (int u = 0; u < U; ++u) {
      moved[u] = read<V>(shift + c + u * L);
      sum[u] = spread[u] = V{};
      high[u] = read<V>(top + c + u * L);
      bottom[u] = read<V>(low + c + u * L);
      if constexpr (Track) {
        high_at[u] = read<I>(top_at + c + u * L);
        bottom_at[u] = read<I>(low_at + c + u * L);
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int u = 0; u < U; ++u) {
        const V x = load<V>(rows.data + r * rows.stride + c + u * L, tail);
        sum[u] += x - moved[u];
        if constexpr (Track) {
          const I at = splat<I>(rows.first + r), nan = x != x;
          const I higher = (x > high[u]) | (nan & (high[u] == high[u]));
          const I lower = (x < bottom[u]) | (nan & (bottom[u] == bottom[u]));
          high[u] = pick(higher, x, high[u]);
          high_at[u] = pick(higher, at, high_at[u]);
          bottom[u] = pick(lower, x, bottom[u]);
          bottom_at[u] = pick(lower, at, bottom_at[u]);
        } else {
          high[u] = x > high[u] ? x : high[u];
          bottom[u] = x < bottom[u] ? x : bottom[u];
        }
      }
    }
    for (int u = 0; u < U; ++u) own[u] = sum[u] / w.added;
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int u = 0; u < U; ++u) {
        const V d = load<V>(rows.data + r * rows.stride + c + u * L, tail) - moved[u] - own[u];
        spread[u] += d * d;
      }
    }
    for (int u = 0; u < U; ++u) {
      if constexpr (Track) {
        write(top_at + c + u * L, high_at[u]);
        write(low_at + c + u * L, bottom_at[u]);
      } else if (any(sum[u] != sum[u])) {
        // comparisons are false for NaN, but a set that holds one has no maximum, as in torch.amax
        I bad = {};
        for (int64_t r = 0; r < rows.count; ++r) {
          const V x = load<V>(rows.data + r * rows.stride + c + u * L, tail);
          bad |= x != x;
        }
        const V nan = splat<V>(std::numeric_limits<Acc>::quiet_NaN());
        high[u] = pick(bad, nan, high[u]);
        bottom[u] = pick(bad, nan, bottom[u]);
      }
      const V old = read<V>(mean + c + u * L), gap = own[u] - old;
      write(mean + c + u * L, old + gap * w.share);
      write(squares + c + u * L, read<V>(squares + c + u * L) + spread[u] + gap * gap * w.between);
      write(top + c + u * L, high[u]);
      write(low + c + u * L, bottom[u]);
    }
  }
};

}  // namespace

template <class T>
void global_stats_forward(const StatsProblem& p, const T* local, T* out) {
  using Acc = typename accumulator<T>::type;
  using V = typename lanes<Acc>::value;
  constexpr bool kSame = std::is_same_v<T, Acc>;
  const int64_t h = p.channels, width = 5 * h;
  const auto all = sequences(p);
  const int64_t longest = p.causal ? p.segments : 1;
  std::vector<double> square(longest);
  // means before rounding, for the norm; where out has the precision of sums they are read back from there
  const Plane<Acc> exact = kSame ? Plane<Acc>() : Plane<Acc>(longest * h);
  auto state = std::make_unique<Running<T, false>>();

  for (const Sequence& s : all) {
    const int64_t first = first_counting(p, s), groups = p.causal ? s.stop - s.start : 1;
    T* const rows_out = out + s.out * width;
    const int64_t unseen = p.causal ? first - s.start : first == s.stop;
    std::fill_n(reinterpret_cast<unsigned char*>(rows_out), unseen * width * sizeof(T), 0);
    if (first == s.stop) continue;
    std::fill(square.begin(), square.end(), 0.0);

    for (int64_t block = 0; block < h; block += kBlock) {
      const int64_t n = std::min(kBlock, h - block);
      const auto emit = [&](int64_t group) {
        T* const row = rows_out + group * width + block;
        dot_sum norm;
        each_vector<Acc>(0, n, [&](int64_t c, auto tail) {
          const V mean = read<V>(state->shift + c) + read<V>(state->mean + c);
          store(row + c, mean, tail);
          if constexpr (!kSame) store(exact + (group * h + block + c), mean, tail);
          store(row + h + c, read<V>(state->top + c), tail);
          store(row + 2 * h + c, read<V>(state->low + c), tail);
          store(row + 3 * h + c, deviation(read<V>(state->squares + c), splat<V>(state->count)), tail);
          norm.add(mean, mean);
        });
        square[group] += norm.total();
      };
      state->start(segment_rows(p, s, local, first) + block, p.stride_slot, p.slots, n);
      for (int64_t i = first; i < s.stop; ++i) {
        if (counts(p, s, i)) state->absorb(segment_rows(p, s, local, i) + block, p.stride_slot, p.slots, n, 0);
        if (p.causal) emit(i - s.start);
      }
      if (!p.causal) emit(0);
    }

    for (int64_t group = unseen; group < groups; ++group) {
      const double norm = std::sqrt(square[group]);
      const Acc divisor = static_cast<Acc>(norm <= kNormFloor ? kNormFloor : norm);
      T* const row = rows_out + group * width;
      each_vector<Acc>(0, h, [&](int64_t c, auto tail) {
        V mean;
        if constexpr (kSame) {
          mean = load<V>(row + c, tail);
        } else {
          mean = load<V>(exact + (group * h + c), tail);
        }
        store(row + 4 * h + c, mean / divisor, tail);
      });
    }
  }
}

template <class T>
void global_stats_backward(const StatsProblem& p, const T* local, const T* grad_out, T* grad_local) {
  using State = Running<T, true>;
  using Acc = typename State::Acc;
  using V = typename State::V;
  using I = typename State::I;
  using Index = typename State::Index;
  const int64_t h = p.channels, width = 5 * h, per_segment = p.slots * h, ld = padded(h);
  const int64_t longest = p.causal ? p.segments : 1;
  // per group with a gradient: shifted mean, 1 / (count * std) (0 at the floor), first maximum and minimum
  const Plane<Acc> means(longest * ld), slopes(longest * ld), shifts(ld);
  const Plane<Index> tops(longest * ld), lows(longest * ld);
  std::vector<double> square(longest), along(longest);
  std::vector<Acc> count(longest);
  auto state = std::make_unique<State>();
  // per channel of a block, summed over the groups from the last one down to the current segment
  struct Sums {
    alignas(64) Acc constant[kBlock], slope[kBlock], drift[kBlock], top[kBlock], low[kBlock];
  };
  auto sums = std::make_unique<Sums>();

  for (const Sequence& s : sequences(p)) {
    T* const result = grad_local + (s.batch * p.segments) * per_segment;
    const int64_t first = first_counting(p, s);
    for (int64_t i = s.start; i < s.stop; ++i)
      if (!counts(p, s, i))
        std::fill_n(reinterpret_cast<unsigned char*>(result + i * per_segment), per_segment * sizeof(T), 0);
    if (first == s.stop) continue;
    const T* const grads = grad_out + s.out * width;
    std::fill(square.begin(), square.end(), 0.0);
    std::fill(along.begin(), along.end(), 0.0);

    for (int64_t block = 0; block < h; block += kBlock) {
      const int64_t n = std::min(kBlock, h - block);
      const auto keep = [&](int64_t group) {
        const T* const g = grads + group * width + block;
        const int64_t at = group * ld + block;
        dot_sum norm, with;
        each_vector<Acc>(0, n, [&](int64_t c, auto tail) {
          const V own = read<V>(state->mean + c), mean = read<V>(state->shift + c) + own;
          const V k = splat<V>(state->count), variance = read<V>(state->squares + c) / k;
          write(means + (at + c), own);
          write(slopes + (at + c),
                pick(variance <= splat<V>(kVarianceFloor), V{}, splat<V>(1) / (k * root(variance))));
          write(tops + (at + c), read<I>(state->top_at + c));
          write(lows + (at + c), read<I>(state->low_at + c));
          const V unit = load<V>(g + 4 * h + c, tail);
          // lanes past the end hold what the state started with, 0, as the tail of every row loads as 0
          norm.add(mean, mean);
          with.add(mean, unit);
        });
        square[group] += norm.total();
        along[group] += with.total();
        count[group] = state->count;
      };
      state->start(segment_rows(p, s, local, first) + block, p.stride_slot, p.slots, n);
      for (int64_t i = first; i < s.stop; ++i) {
        if (counts(p, s, i))
          state->absorb(segment_rows(p, s, local, i) + block, p.stride_slot, p.slots, n, i * p.slots);
        if (p.causal) keep(i - s.start);
      }
      if (!p.causal) keep(0);
      std::copy_n(state->shift, padded(n), shifts + block);
    }

    for (int64_t block = 0; block < h; block += kBlock) {
      const int64_t n = std::min(kBlock, h - block);
      std::fill_n(reinterpret_cast<unsigned char*>(sums.get()), sizeof(Sums), 0);
      for (int64_t i = s.stop - 1; i >= first; --i) {
        const int64_t group = p.causal ? i - s.start : 0, at = group * ld + block;
        const bool arrives = p.causal || i == s.stop - 1, later = p.causal && i < s.stop - 1, here = counts(p, s, i);
        const double norm = std::sqrt(square[group]);
        const bool floored = norm <= kNormFloor;
        const Acc inverse = static_cast<Acc>(1 / (floored ? kNormFloor : norm));
        const Acc project = static_cast<Acc>(floored ? 0 : along[group] / square[group]);
        const Acc each = 1 / count[group];
        const T* const g = grads + group * width + block;
        const T* const x = segment_rows(p, s, local, i) + block;
        T* const dx = result + i * per_segment + block;
        each_vector<Acc>(0, n, [&](int64_t c, auto tail) {
          const V mean = read<V>(means + (at + c)), moved = read<V>(shifts + (block + c));
          V constant = read<V>(sums->constant + c), slope = read<V>(sums->slope + c);
          V drift = read<V>(sums->drift + c), top = read<V>(sums->top + c), low = read<V>(sums->low + c);
          // drift = sum over later groups of slope_i * (mean - mean_i), kept relative to the current mean
          if (later) drift += slope * (mean - read<V>(means + (at + ld + c)));
          if (arrives) {
            const V unit = load<V>(g + 4 * h + c, tail);
            constant += (load<V>(g + c, tail) + (unit - (mean + moved) * project) * inverse) * each;
            slope += load<V>(g + 3 * h + c, tail) * read<V>(slopes + (at + c));
            top += load<V>(g + h + c, tail);
            low += load<V>(g + 2 * h + c, tail);
          }
          if (here) {
            const I top_at = read<I>(tops + (at + c)), low_at = read<I>(lows + (at + c));
            const V base = constant + drift;
            for (int64_t r = 0; r < p.slots; ++r) {
              const I row = splat<I>(i * p.slots + r);
              V d = base + slope * (load<V>(x + r * p.stride_slot + c, tail) - moved - mean);
              d += pick(top_at == row, top, V{});
              d += pick(low_at == row, low, V{});
              store(dx + r * h + c, d, tail);
            }
            // an extreme that this segment has set was not yet the extreme of earlier groups
            const I begin = splat<I>(i * p.slots);
            top = pick(top_at >= begin, V{}, top);
            low = pick(low_at >= begin, V{}, low);
          }
          write(sums->constant + c, constant);
          write(sums->slope + c, slope);
          write(sums->drift + c, drift);
          write(sums->top + c, top);
          write(sums->low + c, low);
        });
      }
    }
  }
}

#define HICI_INSTANTIATE(T)                                                      \
  template void global_stats_forward<T>(const StatsProblem&, const T*, T*);      \
  template void global_stats_backward<T>(const StatsProblem&, const T*, const T*, T*);
HICI_INSTANTIATE(float)
HICI_INSTANTIATE(double)
HICI_INSTANTIATE(bfloat16)
HICI_INSTANTIATE(float16)
#undef HICI_INSTANTIATE

}  // namespace hici::cpu
