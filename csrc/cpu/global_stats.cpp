#include "global_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "memory.h"

namespace hici::cpu {
namespace {

constexpr double kNormFloor = 1e-6;

// How work is cut: by shape alone.
constexpr int64_t kBlock = 512;      // channels, of what is in cache: the state of a block lies in the first-level cache
constexpr int64_t kWide = 8 << 10;   // bytes of a row, of what is not: shorter ones leave memory waiting
constexpr int64_t kNarrow = 128;     // fewest channels of a block
// Pieces merged without keeping what rounding adds, 2^-25 each at most: an eighth of what the element type rounds away.
template <class T>
constexpr int64_t kShort = std::is_same_v<T, bfloat16> ? 1 << 13 : std::is_same_v<T, float16> ? 1 << 10 : 16;
constexpr int64_t kTasks = 64;       // enough for any number of threads we expect to matter on memory-bound work
constexpr int64_t kSequences = 64;   // whose states are in memory at a time
constexpr int64_t kLeast = 1 << 20;  // bytes: of less, one task reads all segments of its channels
constexpr int64_t kWorthThreads = 1 << 16;  // elements: fewer gain nothing by two threads, which are asleep at worst
constexpr int64_t kNear = 1 << 20;   // bytes: of less, what comes next is in the second-level cache or soon is
constexpr int64_t kWave = 4 << 20;   // bytes of local between two meetings of the threads; its means stay in cache
constexpr int64_t kFar = 16 << 20;   // bytes written: more will not be in cache when it is read

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

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory, cut from one allocation: 64-byte aligned pieces.
class Carve {
 public:
  explicit Carve(void* base) : base_(static_cast<char*>(base)) {}
  template <class X>
  X* take(int64_t count) {
    X* const p = reinterpret_cast<X*>(base_ + used_);
    used_ += divide_up(count * static_cast<int64_t>(sizeof(X)), 64) * 64;
    return p;
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class T>
StatsPath<T> path_of(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::stats_path<T>();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::stats_path<T>();
  }
}

// What forward and backward share: the way the problem is cut, and the running state of a block of channels.
template <class T>
class Call {
 public:
  using Acc = typename simd::accumulator<T>::type;
  using Planes = StatsPlanes<Acc>;

  Call(const StatsProblem& problem, const T* local, Isa isa, Execution execution)
      : p(problem), path(path_of<T>(isa)), local_(local), all(sequences(problem)) {
    segment_bytes = p.slots * p.channels * static_cast<int64_t>(sizeof(T));
    const int64_t total = p.batch * p.segments * segment_bytes;
    threads = total / static_cast<int64_t>(sizeof(T)) < kWorthThreads ? Execution{} : execution;
    near = total <= kNear;
    block = near ? kBlock : kWide / static_cast<int64_t>(sizeof(T));
    if (p.causal && total >= kLeast)
      while (block > kNarrow && divide_up(p.channels, block) * static_cast<int64_t>(all.size()) < 16) block /= 2;
    blocks = divide_up(p.channels, block);
    // planes whose sizes are powers of two would lie on the same few lines of the first-level cache
    const int64_t widest = std::min(p.channels, block);
    ld = divide_up(widest, 16) * 16 + 16;
    int64_t longest = 0;
    for (const Sequence& s : all) longest = std::max(longest, s.stop - s.start);
    careful = longest * divide_up(p.slots, kStatsPiece) > kShort<T>;
  }

  int64_t width(int64_t b) const { return std::min(block, p.channels - b * block); }
  bool counts(const Sequence& s, int64_t segment) const {
    return !p.valid || p.valid[s.batch * p.valid_batch + segment * p.valid_segment];
  }
  int64_t first_counting(const Sequence& s) const {
    int64_t i = s.start;
    while (i < s.stop && !counts(s, i)) ++i;
    return i;
  }
  const T* rows(const Sequence& s, int64_t segment) const {
    return local_ + s.batch * p.stride_batch + segment * p.stride_segment;
  }

  static constexpr int64_t kPlanes = 7;
  Planes planes(Acc* at) const {
    return {at, at + ld, at + 2 * ld, at + 3 * ld, at + 4 * ld, at + 5 * ld, careful ? at + 6 * ld : nullptr};
  }

  // How far beyond this block of this segment the one lies that is likely to be read next.
  int64_t next(const Sequence& s, int64_t segment, int64_t b) const {
    if (near) return 0;
    if (segment + 1 < s.stop) return p.stride_segment;
    return b + 1 < blocks ? block - (segment - s.start) * p.stride_segment : 0;
  }
  // Adds one segment to a set of `count` rows; returns the new count.
  int64_t absorb(const Sequence& s, int64_t segment, int64_t b, const Planes& to, int64_t count) const {
    const T* const x = rows(s, segment) + b * block;
    for (int64_t r = 0; r < p.slots; r += kStatsPiece) {
      const int64_t n = std::min(int64_t{kStatsPiece}, p.slots - r);
      int64_t ahead = kStatsPiece * p.stride_slot;
      if (r + kStatsPiece >= p.slots) ahead = next(s, segment, b) - (near ? 0 : r * p.stride_slot);
      path.absorb(x + r * p.stride_slot, p.stride_slot, n, ahead, width(b), to, count);
      count += n;
    }
    return count;
  }

  const StatsProblem& p;
  const StatsPath<T> path;

 private:
  const T* const local_;

 public:
  const std::vector<Sequence> all;
  Execution threads;
  int64_t segment_bytes, block, blocks, ld;
  bool careful, near;
};

// Segments of one sequence that one task of the shared form reads.
int64_t chunk_segments(int64_t longest, int64_t tasks, int64_t block_bytes) {
  const int64_t chunks = std::max<int64_t>(1, kTasks / std::max<int64_t>(1, tasks));
  const int64_t worth = std::max<int64_t>(1, kLeast / 4 / std::max<int64_t>(1, block_bytes));
  return std::max(divide_up(longest, chunks), worth);
}

bool far(const void* out, int64_t row_bytes, int64_t total) {
  return total >= kFar && reinterpret_cast<uintptr_t>(out) % 64 == 0 && row_bytes % 64 == 0;
}

void zero(void* p, int64_t bytes) {
  if (bytes > 0) std::memset(p, 0, bytes);
}

// Zeros in one block of channels of `rows` rows.
template <class T>
void clear(const Call<T>& call, T* to, int64_t rows, int64_t b) {
  for (int64_t r = 0; r < rows; ++r) zero(to + r * call.p.channels + b * call.block, call.width(b) * sizeof(T));
}

// Where the means of a sequence or segment are kept: its first row of results, if that rounds nothing and stays in the
// caches, else scratch.
template <class T, class Acc>
Acc* means_at(T* row, Acc* scratch, bool stream) {
  if constexpr (std::is_same_v<T, Acc>)
    if (!stream) return row;
  return scratch;
}

double norm_of(double square) { return std::sqrt(square); }

// A group of sequences, statistics over all their segments: chunks of segments are summarised side by side, then merged
// in order of chunks.
template <class T>
struct Shared {
  using Acc = typename Call<T>::Acc;
  const Call<T>& call;
  const Sequence* const s;
  const int64_t count;
  int64_t chunk = 1, chunks = 0;
  std::vector<int64_t> first, rows;  // [count]; [count][chunks] rows that count
  std::vector<double> square;        // [count][blocks]

  Shared(const Call<T>& c, const Sequence* sequences, int64_t n) : call(c), s(sequences), count(n) {
    int64_t longest = 0;
    for (int64_t i = 0; i < n; ++i) longest = std::max(longest, s[i].stop - s[i].start);
    const int64_t bytes = c.p.slots * std::min(c.block, c.p.channels) * static_cast<int64_t>(sizeof(T));
    chunk = chunk_segments(longest, n * c.blocks, bytes);
    chunks = divide_up(longest, chunk);
    first.resize(n), rows.resize(n * chunks), square.resize(n * c.blocks);
    for (int64_t i = 0; i < n; ++i) {
      first[i] = c.first_counting(s[i]);
      for (int64_t j = first[i]; j < s[i].stop; ++j)
        if (c.counts(s[i], j)) rows[i * chunks + (j - s[i].start) / chunk] += c.p.slots;
    }
  }

  bool empty(int64_t i) const { return first[i] == s[i].stop; }
  int64_t total(int64_t i) const {
    int64_t sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += rows[i * chunks + k];
    return sum;
  }
  int64_t state_size() const { return count * call.blocks * chunks * Call<T>::kPlanes * call.ld; }
  StatsPlanes<Acc> state(Acc* states, int64_t i, int64_t b, int64_t k) const {
    return call.planes(states + ((i * call.blocks + b) * chunks + k) * Call<T>::kPlanes * call.ld);
  }
  int64_t begin(int64_t i, int64_t k) const { return s[i].start + k * chunk; }
  int64_t end(int64_t i, int64_t k) const { return std::min(s[i].stop, begin(i, k) + chunk); }

  void summarise(Acc* states) const {
    parallel(call.threads, count * chunks * call.blocks, [&](int64_t task, int) {
      summarise_chunk(states, task / call.blocks / chunks, task % call.blocks, task / call.blocks % chunks);
    });
  }
  void summarise_chunk(Acc* states, int64_t i, int64_t b, int64_t k) const {
    if (rows[i * chunks + k] == 0) return;
    const auto to = state(states, i, b, k);
    int64_t done = 0;
    for (int64_t j = begin(i, k); j < end(i, k); ++j)
      if (call.counts(s[i], j)) done = call.absorb(s[i], j, b, to, done);
  }

  // The state of the whole sequence, in the place of its first chunk that has one. Owners [ld] may be null.
  StatsPlanes<Acc> merged(Acc* states, int64_t i, int64_t b, int32_t* top_owner, int32_t* low_owner) const {
    int64_t k = 0;
    while (rows[i * chunks + k] == 0) ++k;
    const auto into = state(states, i, b, k);
    if (top_owner) {
      std::fill_n(top_owner, call.ld, static_cast<int32_t>(k));
      std::fill_n(low_owner, call.ld, static_cast<int32_t>(k));
    }
    int64_t done = rows[i * chunks + k];
    for (++k; k < chunks; ++k) {
      const int64_t more = rows[i * chunks + k];
      if (more == 0) continue;
      call.path.merge(into, done, state(states, i, b, k), more, call.width(b), top_owner, low_owner,
                      static_cast<int32_t>(k));
      done += more;
    }
    return into;
  }

  double total_square(int64_t i) const {
    double sum = 0;
    for (int64_t b = 0; b < call.blocks; ++b) sum += square[i * call.blocks + b];
    return sum;
  }
};

template <class T>
void shared_forward(const Call<T>& call, const Sequence* s, int64_t count, T* out) {
  using Acc = typename Call<T>::Acc;
  Shared<T> g(call, s, count);
  const int64_t h = call.p.channels;
  Acc *states, *means;
  const auto layout = [&](void* base) {
    Carve carve(base);
    states = carve.take<Acc>(g.state_size());
    means = carve.take<Acc>(count * h);
    return carve.bytes();
  };
  const Memory memory(layout(nullptr));
  layout(memory.data());
  if (g.chunks > 1) g.summarise(states);
  const auto summarise = [&](int64_t task, int) {
    const int64_t b = task % call.blocks, i = task / call.blocks;
    if (g.empty(i)) return;
    if (g.chunks == 1) g.summarise_chunk(states, i, b, 0);
    const auto whole = g.merged(states, i, b, nullptr, nullptr);
    T* const rows_out = out + s[i].out * 5 * h;
    g.square[task] = call.path.emit(whole, g.total(i), call.width(b), rows_out + b * call.block, h,
                                    means_at(rows_out, means + i * h, false) + b * call.block, false);
  };
  const auto finish = [&](int64_t task, int) {
    const int64_t b = task % call.blocks, i = task / call.blocks;
    T* const rows_out = out + s[i].out * 5 * h;
    if (g.empty(i)) return clear(call, rows_out, 5, b);
    const double norm = std::max(norm_of(g.total_square(i)), kNormFloor);
    call.path.finish(means_at(rows_out, means + i * h, false) + b * call.block, static_cast<Acc>(norm), call.width(b),
                     rows_out + 4 * h + b * call.block, false);
  };
  parallel_twice(call.threads, count * call.blocks, summarise, count * call.blocks, finish);
}

// Running statistics: a block of channels walks through the segments in order. The norm couples blocks, so threads meet
// after every wave of segments, whose means are then still in cache.
template <class T>
void causal_forward(const Call<T>& call, const Sequence* s, int64_t count, T* out, bool stream) {
  using Acc = typename Call<T>::Acc;
  const int64_t h = call.p.channels, blocks = call.blocks;
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = std::max(longest, s[i].stop - s[i].start);
  const int64_t wave = std::max<int64_t>(1, std::min(longest, kWave / std::max<int64_t>(1, call.segment_bytes) / count));
  const auto layout = [&](void* base, Acc*& states, Acc*& means) {
    Carve carve(base);
    states = carve.take<Acc>(count * blocks * Call<T>::kPlanes * call.ld);
    means = carve.take<Acc>(count * wave * h);
    return carve.bytes();
  };
  Acc *states, *means;
  const Memory memory(layout(nullptr, states, means));
  layout(memory.data(), states, means);
  std::vector<int64_t> first(count), rows(count * blocks);
  std::vector<double> square(count * wave * blocks);
  for (int64_t i = 0; i < count; ++i) first[i] = call.first_counting(s[i]);

  for (int64_t at = 0; at < longest; at += wave) {
    const auto summarise = [&](int64_t task, int) {
      const int64_t b = task % blocks, i = task / blocks;
      const auto state = call.planes(states + task * Call<T>::kPlanes * call.ld);
      const int64_t end = std::min(s[i].stop, s[i].start + at + wave);
      int64_t done = rows[task];
      for (int64_t j = std::max(s[i].start + at, first[i]); j < end; ++j) {
        if (call.counts(s[i], j)) done = call.absorb(s[i], j, b, state, done);
        const int64_t place = i * wave + (j - s[i].start - at);
        T* const rows_out = out + (s[i].out + j - s[i].start) * 5 * h;
        square[place * blocks + b] =
            call.path.emit(state, done, call.width(b), rows_out + b * call.block, h,
                           means_at(rows_out, means + place * h, stream) + b * call.block, stream);
      }
      rows[task] = done;
      if (stream) call.path.settle();
    };
    const auto finish = [&](int64_t task, int) {
      const int64_t b = task % blocks, i = task / blocks, end = std::min(s[i].stop, s[i].start + at + wave);
      for (int64_t j = s[i].start + at; j < end; ++j) {
        T* const rows_out = out + (s[i].out + j - s[i].start) * 5 * h;
        if (j < first[i]) {
          clear(call, rows_out, 5, b);
          continue;
        }
        const int64_t place = i * wave + (j - s[i].start - at);
        double sum = 0;
        for (int64_t k = 0; k < blocks; ++k) sum += square[place * blocks + k];
        const double norm = std::max(norm_of(sum), kNormFloor);
        const Acc* const from = means_at(rows_out, means + place * h, stream) + b * call.block;
        call.path.finish(from, static_cast<Acc>(norm), call.width(b), rows_out + 4 * h + b * call.block, stream);
      }
      if (stream) call.path.settle();
    };
    parallel_twice(call.threads, count * blocks, summarise, count * blocks, finish);
  }
}

// Factors of the normalised mean's gradient, from sums over all channels.
template <class Acc>
struct Unit {
  Acc inverse, project;
};

template <class Acc>
Unit<Acc> unit_of(const StatsNorm* parts, int64_t count) {
  double square = 0, along = 0;
  for (int64_t b = 0; b < count; ++b) square += parts[b].square, along += parts[b].along;
  const double norm = std::sqrt(square);
  const bool floored = norm <= kNormFloor;
  return {static_cast<Acc>(1 / (floored ? kNormFloor : norm)), static_cast<Acc>(floored ? 0 : along / square)};
}

template <class T>
StatsSpread<T> spread_of(const Call<T>& call, const Sequence& s, int64_t segment, int64_t b, T* grad_local) {
  StatsSpread<T> a{};
  const int64_t h = call.p.channels;
  a.channels = call.width(b);
  a.x = call.rows(s, segment) + b * call.block;
  a.stride = call.p.stride_slot;
  a.rows = call.counts(s, segment) ? call.p.slots : 0;
  a.dx = grad_local + (s.batch * call.p.segments + segment) * call.p.slots * h + b * call.block;
  a.dx_stride = a.grad_stride = h;
  return a;
}

template <class T>
void shared_backward(const Call<T>& call, const Sequence* s, int64_t count, const T* grad_out, T* grad_local,
                     bool stream) {
  using Acc = typename Call<T>::Acc;
  Shared<T> g(call, s, count);
  const int64_t h = call.p.channels, blocks = call.blocks, ld = call.ld, parts = count * blocks;
  Acc *states, *means, *slopes, *sums;
  T *tops, *lows;
  int32_t *top_owners, *low_owners;
  const auto layout = [&](void* base) {
    Carve carve(base);
    states = carve.take<Acc>(g.state_size());
    means = carve.take<Acc>(parts * ld), slopes = carve.take<Acc>(parts * ld);
    tops = carve.take<T>(parts * ld), lows = carve.take<T>(parts * ld);
    top_owners = carve.take<int32_t>(parts * ld), low_owners = carve.take<int32_t>(parts * ld);
    sums = carve.take<Acc>(call.threads.threads * 5 * ld);
    return carve.bytes();
  };
  const Memory memory(layout(nullptr));
  layout(memory.data());
  std::vector<StatsNorm> norms(parts);
  std::vector<StatsPlanes<Acc>> whole(parts);

  if (g.chunks > 1) g.summarise(states);
  const auto facts = [&](int64_t part, int) {
    const int64_t b = part % blocks, i = part / blocks;
    if (g.empty(i)) return;
    if (g.chunks == 1) g.summarise_chunk(states, i, b, 0);
    whole[part] = g.merged(states, i, b, top_owners + part * ld, low_owners + part * ld);
    norms[part] =
        call.path.facts(whole[part], g.total(i), call.width(b), grad_out + (s[i].out * 5 + 4) * h + b * call.block,
                        {means + part * ld, slopes + part * ld, tops + part * ld, lows + part * ld});
  };
  const auto spread = [&](int64_t task, int worker) {
    const int64_t k = task % g.chunks, part = task / g.chunks, b = part % blocks, i = part / blocks;
    Acc* const at = sums + worker * 5 * ld;
    bool arrived = false;
    for (int64_t j = g.begin(i, k); j < g.end(i, k); ++j) {
      StatsSpread<T> a = spread_of(call, s[i], j, b, grad_local);
      if (a.rows == 0) {
        clear(call, grad_local + (s[i].batch * call.p.segments + j) * call.p.slots * h, call.p.slots, b);
        continue;
      }
      a.stream = stream;
      a.shift = whole[part].shift;
      a.group = {means + part * ld, slopes + part * ld, tops + part * ld, lows + part * ld};
      a.sums = {at, at + ld, at + 2 * ld, at + 3 * ld, at + 4 * ld};
      if (!arrived) {
        arrived = true;
        zero(at, 5 * ld * sizeof(Acc));
        const Unit<Acc> unit = unit_of<Acc>(norms.data() + i * blocks, blocks);
        a.grad = grad_out + s[i].out * 5 * h + b * call.block;
        a.inverse = unit.inverse, a.project = unit.project, a.each = 1 / static_cast<Acc>(g.total(i));
        a.top_owner = top_owners + part * ld, a.low_owner = low_owners + part * ld;
        a.number = static_cast<int32_t>(k);
      }
      call.path.spread(a);
    }
    if (stream) call.path.settle();
  };
  parallel_twice(call.threads, parts, facts, parts * g.chunks, spread);
}

// What a group gives to its rows depends on all groups after it: facts are gathered in order of segments, then every
// block of channels walks back.
template <class T>
void causal_backward(const Call<T>& call, const Sequence* s, int64_t count, const T* grad_out, T* grad_local,
                     bool stream) {
  using Acc = typename Call<T>::Acc;
  const int64_t h = call.p.channels, blocks = call.blocks, ld = call.ld;
  std::vector<int64_t> base(count + 1), first(count);
  for (int64_t i = 0; i < count; ++i) {
    first[i] = call.first_counting(s[i]);
    base[i + 1] = base[i] + s[i].stop - s[i].start;
  }
  const int64_t groups = base[count], parts = groups * blocks;
  Acc *states, *means, *slopes, *sums;
  T *tops, *lows;
  const auto layout = [&](void* memory) {
    Carve carve(memory);
    states = carve.take<Acc>(count * blocks * Call<T>::kPlanes * ld);
    means = carve.take<Acc>(parts * ld), slopes = carve.take<Acc>(parts * ld);
    tops = carve.take<T>(parts * ld), lows = carve.take<T>(parts * ld);
    sums = carve.take<Acc>(call.threads.threads * 5 * ld);
    return carve.bytes();
  };
  const Memory memory(layout(nullptr));
  layout(memory.data());
  std::vector<StatsNorm> norms(parts);
  std::vector<int64_t> rows(groups);
  const auto facts = [&](int64_t group, int64_t b) {
    const int64_t at = (group * blocks + b) * ld;
    return StatsFacts<T>{means + at, slopes + at, tops + at, lows + at};
  };

  for (int64_t i = 0; i < count; ++i) {
    int64_t done = 0;
    for (int64_t j = first[i]; j < s[i].stop; ++j) {
      if (call.counts(s[i], j)) done += call.p.slots;
      rows[base[i] + j - s[i].start] = done;
    }
  }
  const auto summarise = [&](int64_t task, int) {
    const int64_t b = task % blocks, i = task / blocks;
    const auto state = call.planes(states + task * Call<T>::kPlanes * ld);
    int64_t done = 0;
    for (int64_t j = first[i]; j < s[i].stop; ++j) {
      if (call.counts(s[i], j)) done = call.absorb(s[i], j, b, state, done);
      const int64_t group = base[i] + j - s[i].start;
      const T* const unit = grad_out + ((s[i].out + j - s[i].start) * 5 + 4) * h + b * call.block;
      norms[group * blocks + b] = call.path.facts(state, done, call.width(b), unit, facts(group, b));
    }
  };
  const auto spread = [&](int64_t task, int worker) {
    const int64_t b = task % blocks, i = task / blocks;
    Acc* const at = sums + worker * 5 * ld;
    zero(at, 5 * ld * sizeof(Acc));
    for (int64_t j = s[i].stop - 1; j >= s[i].start; --j) {
      StatsSpread<T> a = spread_of(call, s[i], j, b, grad_local);
      if (a.rows == 0) clear(call, grad_local + (s[i].batch * call.p.segments + j) * call.p.slots * h, call.p.slots, b);
      if (j < first[i]) continue;
      const int64_t group = base[i] + j - s[i].start;
      a.stream = stream;
      a.shift = call.planes(states + task * Call<T>::kPlanes * ld).shift;
      a.group = facts(group, b);
      if (j + 1 < s[i].stop) a.next_mean = facts(group + 1, b).mean;
      if (j > first[i]) a.before_top = facts(group - 1, b).top, a.before_low = facts(group - 1, b).low;
      a.grad = grad_out + (s[i].out + j - s[i].start) * 5 * h + b * call.block;
      const Unit<Acc> unit = unit_of<Acc>(norms.data() + group * blocks, blocks);
      a.inverse = unit.inverse, a.project = unit.project;
      a.each = 1 / static_cast<Acc>(rows[group]);
      a.sums = {at, at + ld, at + 2 * ld, at + 3 * ld, at + 4 * ld};
      call.path.spread(a);
    }
    if (stream) call.path.settle();
  };
  parallel_twice(call.threads, count * blocks, summarise, count * blocks, spread);
}

}  // namespace

template <class T>
void global_stats_forward(const StatsProblem& p, const T* local, T* out, Isa isa, Execution execution) {
  const Call<T> call(p, local, isa, execution);
  const int64_t count = static_cast<int64_t>(call.all.size()), row = p.channels * static_cast<int64_t>(sizeof(T));
  const int64_t written = p.causal ? p.batch * p.segments * 5 * row : 0;
  const bool stream = far(out, row, written);
  prefer_large_pages(out, written);
  for (int64_t i = 0; i < count; i += kSequences) {
    const int64_t n = std::min(kSequences, count - i);
    if (p.causal)
      causal_forward(call, call.all.data() + i, n, out, stream);
    else
      shared_forward(call, call.all.data() + i, n, out);
  }
}

template <class T>
void global_stats_backward(const StatsProblem& p, const T* local, const T* grad_out, T* grad_local, Isa isa,
                           Execution execution) {
  const Call<T> call(p, local, isa, execution);
  const int64_t count = static_cast<int64_t>(call.all.size()), row = p.channels * static_cast<int64_t>(sizeof(T));
  const int64_t written = p.batch * p.segments * p.slots * row;
  const bool stream = far(grad_local, row, written);
  prefer_large_pages(grad_local, written);
  for (int64_t i = 0; i < count;) {
    // running statistics keep every group in memory: no more sequences at a time than keep threads busy
    int64_t n = 1;
    int64_t bytes = (call.all[i].stop - call.all[i].start) * call.segment_bytes;
    while (i + n < count && n < kSequences && (!p.causal || n * call.blocks < 16 || bytes < kWave)) {
      bytes += (call.all[i + n].stop - call.all[i + n].start) * call.segment_bytes;
      ++n;
    }
    if (p.causal)
      causal_backward(call, call.all.data() + i, n, grad_out, grad_local, stream);
    else
      shared_backward(call, call.all.data() + i, n, grad_out, grad_local, stream);
    i += n;
  }
}

#define HICI_INSTANTIATE(T)                                                                           \
  template void global_stats_forward<T>(const StatsProblem&, const T*, T*, Isa, Execution);           \
  template void global_stats_backward<T>(const StatsProblem&, const T*, const T*, T*, Isa, Execution);
HICI_INSTANTIATE(float)
HICI_INSTANTIATE(double)
HICI_INSTANTIATE(bfloat16)
HICI_INSTANTIATE(float16)
#undef HICI_INSTANTIATE

}  // namespace hici::cpu
