// attention, forward. Online softmax over blocks of keys; the query heads of a kv head are rows of one tile, so a block
// of keys and values is packed once for all of them.
//
// Per block of keys: scores S = Q K^T (gemm), then per row the new maximum m, P = e^(scale S - m), and O = O * alpha + P V
// (gemm). Rows are processed kRows at a time, so that S and P stay near the core.

#include "../attention.h"
#include "attention_rows.h"
#include "partials.h"

namespace hici::cpu::HICI_PATH {
namespace {

// Whether products of one strip of rows run between the exponentials of another: tiles do, beside the vector units.
#if defined(HICI_PATH_AMX)
template <class Op>
constexpr bool kBetween = reduction<Op>::pair == 2;
#else
template <class Op>
constexpr bool kBetween = false;
#endif

// Rows that meet a block of keys together, a multiple of kStrip or of tile rows; rows of a tile, which pay for the packing
// of its keys. Beside tiles, what moves between caches takes longer than products do (csrc/README.md).
template <class Op>
constexpr int64_t kRows = kBetween<Op> ? 32 : 96;
template <class Op>
constexpr int64_t kTileRows = kBetween<Op> ? 1152 : 288;

// All heads of one token at least.
int64_t tile_rows(const AttentionProblem& problem) {
  return with_element(problem.element, [&](auto zero) {
    using Op = typename operand<decltype(zero)>::type;
    return larger(problem.dim <= 128 ? kTileRows<Op> : kTileRows<Op> / 3 * 2, round_up(problem.group(), kRows<Op>));
  });
}

// Keys per block: packed keys and values take about 128 KiB.
template <class Op>
int64_t block_keys(int64_t dim) {
  return larger(64, smaller(256, 65536 / static_cast<int64_t>(sizeof(Op)) / round_up(dim, 32) / 64 * 64));
}

// Rows of a tile that meet a block of keys together.
struct Strip {
  int64_t first = 0, count = 0;
  int64_t most = 0;   // keys of the block that any of them sees
  int64_t depth = 0;  // of the product of P with V
  int buffer = 0;     // which S and P
};

template <class Op>
struct Scratch {
  int64_t depth, width, block;  // padded dim as reduction, padded dim as columns, keys per block (a multiple of 32)
  Op *q, *k, *v, *p[2];
  float *s[2], *o, *top, *total, *alpha;
  const void **k_rows, **v_rows, **next_k_rows, **next_v_rows;
  int64_t* visible;
  Strip* strips;

  Scratch(const AttentionProblem& problem, const ForwardSizes& sizes, Carve& carve) {
    const int64_t dim = problem.dim, rows = sizes.rows, strip_rows = smaller(rows, kRows<Op>);
    depth = round_up(dim, reduction<Op>::step), width = round_up(dim, kLanes);
    block = smaller(block_keys<Op>(dim), round_up(sizes.keys, 32));
    q = carve.take<Op>(rows * depth);
    k = carve.take<Op>(block * depth);
    v = carve.take<Op>(block * width);
    s[0] = carve.take<float>(strip_rows * block);
    p[0] = carve.take<Op>(strip_rows * block);
    s[1] = kBetween<Op> ? carve.take<float>(strip_rows * block) : s[0];
    p[1] = kBetween<Op> ? carve.take<Op>(strip_rows * block) : p[0];
    o = carve.take<float>(rows * width);
    top = carve.take<float>(round_up(rows, kLanes));
    total = carve.take<float>(round_up(rows, kLanes));
    alpha = carve.take<float>(round_up(strip_rows, kLanes));
    visible = carve.take<int64_t>(rows);
    strips = carve.take<Strip>((rows + kRows<Op> - 1) / kRows<Op>);
    k_rows = carve.take<const void*>(block);
    v_rows = carve.take<const void*>(block);
    next_k_rows = carve.take<const void*>(block);
    next_v_rows = carve.take<const void*>(block);
  }
};

// The largest of n > 0 scores, or the smallest.
template <bool Largest>
inline float extreme(const float* s, int64_t n) {
  constexpr int kChains = 4;  // a maximum waits for the one before
  const Vec none = splat(Largest ? -__builtin_inff() : __builtin_inff());
  const auto better = [](Vec a, Vec b) { return Largest ? max(a, b) : min(a, b); };
  Vec m[kChains] = {none, none, none, none};
  int64_t j = 0;
  for (; j + kChains * kLanes <= n; j += kChains * kLanes)
    for (int i = 0; i < kChains; ++i) m[i] = better(m[i], load(s + j + i * kLanes));
  for (; j + kLanes <= n; j += kLanes) m[0] = better(m[0], load(s + j));
  if (j < n) m[1] = better(m[1], keep_first(n - j, load(s + j), none));
  const Vec all = better(better(m[0], m[1]), better(m[2], m[3]));
  return Largest ? reduce_max(all) : reduce_min(all);
}

// S of a strip becomes P; row r sees its first visible[first + r] keys. The rows of O, top and total follow. between(r) is
// called after each row of exponentials.
template <class Op, class Between>
void soften(const Scratch<Op>& scratch, const Strip& strip, float scale, const Between& between) {
  const int64_t first = strip.first, rows = strip.count, n = strip.most, depth = strip.depth;
  const int64_t* const visible = scratch.visible + first;
  const float* const scores = scratch.s[strip.buffer];
  Op* const weights = scratch.p[strip.buffer];
  float *const top = scratch.top + first, *const total = scratch.total + first, *const alpha = scratch.alpha;
  const float by = Weights<Op>::factor_of(scale);
  const Vec factor = splat(by);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = smaller(visible[r], n);
    alpha[r] = top[r];
    if (seen == 0) continue;
    const float* const s = scores + r * scratch.block;
    // the largest product is that of the largest score, or of the smallest
    const float most = by >= 0 ? extreme<true>(s, seen) * by : extreme<false>(s, seen) * by;
    if (!(most < top[r])) alpha[r] = most;
  }
  for (int64_t r = rows; r < round_up(rows, kLanes); ++r) alpha[r] = -__builtin_inff();
  bool moved = false;
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec before = load(top + r), after = load(alpha + r), one = splat(1.0f);
    store(top + r, after);
    // a row that has seen nothing yet: its sums are 0, and -inf - -inf is not a number
    const Vec kept = where_equal(before, splat(-__builtin_inff()), one, Weights<Op>::power(sub(before, after)));
    store(alpha + r, kept);
    moved |= any_differs(kept, one);
  }
  if (moved) {
    for (int64_t r = 0; r < rows; ++r) {
      if (alpha[r] == 1.0f) continue;
      const Vec a = splat(alpha[r]);
      float* const o = scratch.o + (first + r) * scratch.width;
      for (int64_t d = 0; d < scratch.width; d += kLanes) store(o + d, mul(load(o + d), a));
      total[r] *= alpha[r];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* const s = scores + r * scratch.block;
    Op* const p = weights + r * depth;
    const int64_t seen = smaller(visible[r], n);
    // where every score has overflowed to -inf, all weights are 0
    const Vec shift = splat(top[r] == -__builtin_inff() ? 0.0f : top[r]);
    Vec sum = zeros();
    int64_t j = 0;
    for (; j + kLanes <= seen; j += kLanes) {
      const Vec weight = weight_of<Op>(load(s + j), factor, shift);
      sum = add(sum, weight);
      narrow(p + j, weight);
    }
    if (j < seen) {
      const Vec weight = keep_first(seen - j, weight_of<Op>(load(s + j), factor, shift), zeros());
      sum = add(sum, weight);
      narrow_part(p + j, weight, smaller(kLanes, depth - j));
      j += kLanes;
    }
    if (j < depth) __builtin_memset(p + j, 0, (depth - j) * sizeof(Op));
    total[r] += reduce_add(sum);
    between(r);
  }
}

// What a block of keys does to a tile's rows, strip by strip.
template <class Op>
class BlockOfKeys {
 public:
  // n keys are packed in scratch
  BlockOfKeys(const Scratch<Op>& scratch, int64_t n, float scale)
      : x_(scratch), columns_(round_up(n, kLanes)), depth_(round_up(n, reduction<Op>::step)), scale_(scale) {}

  void meet(const Strip& strip) const {
    gemm<false>(scores(strip));
    soften(x_, strip, scale_, [](int64_t) {});
    gemm<true>(values(strip));
  }

#if defined(HICI_PATH_AMX)
  // As meet() for each strip in turn, to the same bits: while the exponentials of one are formed, tiles form the scores of
  // the next one and add the values of the one before, evenly spread over its rows.
  void meet_all(const Strip* strips, int64_t count) const {
    if (count > 0) gemm<false>(scores(strips[0]));
    for (int64_t i = 0; i < count; ++i) {
      const Product<Op> before = values(i > 0 ? strips[i - 1] : Strip{});
      const Product<Op> after = scores(i + 1 < count ? strips[i + 1] : Strip{});
      TileSteps<true> first(before);
      TileSteps<false> second(after);
      const int64_t steps = first.count() + second.count(), rows = strips[i].count;
      int64_t done = 0;
      soften(x_, strips[i], scale_, [&](int64_t row) {
        for (; done * rows < steps * (row + 1); ++done)
          if (!first.step()) second.step();
      });
      gemm_rest<true>(before);
      gemm_rest<false>(after);
    }
    if (count > 0) gemm<true>(values(strips[count - 1]));
  }
#endif

 private:
  Product<Op> scores(const Strip& strip) const {
    const int64_t columns = smaller(columns_, round_up(strip.most, kPanel));
    const Op* const rows = x_.q + strip.first * x_.depth;
    return {strip.count, columns, x_.depth, rows, x_.depth, x_.k, x_.s[strip.buffer], x_.block, x_.depth};
  }
  Product<Op> values(const Strip& strip) const {
    float* const rows = x_.o + strip.first * x_.width;
    return {strip.count, x_.width, strip.depth, x_.p[strip.buffer], strip.depth, x_.v, rows, x_.width, depth_};
  }

  const Scratch<Op>& x_;
  const int64_t columns_, depth_;
  const float scale_;
};

template <class T>
void forward(const AttentionProblem& problem, const ForwardItem& item, const ForwardOutput& output,
             const ForwardSizes& sizes, void* memory) {
  using Op = typename operand<T>::type;
  Carve carve(memory);
  Scratch<Op> scratch(problem, sizes, carve);
  const AttentionSegment& segment = problem.segments[item.segment];
  const int64_t tokens = item.rank_end - item.rank_begin, group = problem.group(), rows = tokens * group;
  const int64_t slots = segment.slots ? problem.global.count + problem.local.count : 0;
  const int64_t width = scratch.width, depth = scratch.depth;

  // rows: token by token within a head, head by head
  for (int64_t h = 0; h < group; ++h)
    for (int64_t t = 0; t < tokens; ++t) {
      const T* const from = query_row<T>(problem, problem.q, segment.batch, item.rank_begin + t, item.kv_head * group + h);
      pack_rows(&from, 1, problem.dim, depth, scratch.q + (h * tokens + t) * depth);
    }
  __builtin_memset(scratch.o, 0, rows * width * sizeof(float));
  for (int64_t r = 0; r < round_up(rows, kLanes); ++r) scratch.top[r] = -__builtin_inff(), scratch.total[r] = 0;

  const T** k_rows = reinterpret_cast<const T**>(scratch.k_rows);
  const T** v_rows = reinterpret_cast<const T**>(scratch.v_rows);
  const T** next_k_rows = reinterpret_cast<const T**>(scratch.next_k_rows);
  const T** next_v_rows = reinterpret_cast<const T**>(scratch.next_v_rows);
  tiles_begin();
  const int64_t visible = problem.causal ? seen_keys(segment, slots, item.rank_end - 1) : item.key_end;
  const int64_t last = smaller(item.key_end, visible);
  if (item.key_begin < last)
    key_rows<T>(problem, segment, item.kv_head, slots, item.key_begin,
                smaller(item.key_begin + scratch.block, last), k_rows, v_rows);
  for (int64_t j0 = item.key_begin; j0 < last; j0 += scratch.block) {
    const int64_t j1 = smaller(j0 + scratch.block, last), n = j1 - j0;
    const int64_t next = smaller(scratch.block, last - j1);
    if (next > 0) key_rows<T>(problem, segment, item.kv_head, slots, j1, j1 + next, next_k_rows, next_v_rows);
    // rows of one head lie far apart, which hardware does not prefetch: values are asked for while keys are packed, and
    // the next block's keys while values are
    pack_columns(k_rows, n, problem.dim, scratch.k, v_rows, n);
    pack_depth(v_rows, n, problem.dim, scratch.v, next_k_rows, next);
    const BlockOfKeys<Op> block(scratch, n, problem.scale);
    int64_t strips = 0;
    for (int64_t first = 0; first < rows; first += kRows<Op>) {
      const int64_t count = smaller(kRows<Op>, rows - first);
      int64_t most = 0;
      for (int64_t r = first; r < first + count; ++r) {
        const int64_t rank = item.rank_begin + r % tokens;
        scratch.visible[r] = problem.causal ? larger(0, smaller(n, seen_keys(segment, slots, rank) - j0)) : n;
        most = larger(most, scratch.visible[r]);
      }
      if (most == 0) continue;
      const Strip strip{first, count, most, round_up(most, reduction<Op>::step), static_cast<int>(strips % 2)};
      if constexpr (!kBetween<Op>) block.meet(strip);
      scratch.strips[strips++] = strip;
    }
#if defined(HICI_PATH_AMX)
    if constexpr (kBetween<Op>) block.meet_all(scratch.strips, strips);
#endif
    swap(k_rows, next_k_rows);
    swap(v_rows, next_v_rows);
  }
  tiles_end();

  if (item.partial >= 0) {
    float* to = output.partials + item.partial * sizes.rows * (width + 2);
    for (int64_t r = 0; r < rows; ++r, to += width + 2) {
      __builtin_memcpy(to, scratch.o + r * width, width * sizeof(float));
      to[width] = scratch.total[r], to[width + 1] = static_cast<float>(Weights<Op>::level_of(scratch.top[r]));
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    finish<T>(problem, segment, item.rank_begin + r % tokens, item.kv_head * group + r / tokens, scratch.o + r * width,
              scratch.total[r], Weights<Op>::level_of(scratch.top[r]), output);
}

template <class T>
void merge(const AttentionProblem& problem, const ForwardItem& item, int64_t count, const ForwardOutput& output,
           const ForwardSizes& sizes) {
  const AttentionSegment& segment = problem.segments[item.segment];
  const int64_t tokens = item.rank_end - item.rank_begin, group = problem.group();
  const int64_t width = round_up(problem.dim, kLanes), size = sizes.rows * (width + 2), step = problem.kv_heads * size;
  float* const base = output.partials + item.partial * size;
  for (int64_t r = 0; r < tokens * group; ++r) {
    float* const into = base + r * (width + 2);
    const Merged found = merge_partials(into, step, count, width);
    finish<T>(problem, segment, item.rank_begin + r % tokens, item.kv_head * group + r / tokens, into, found.total,
              found.level, output);
  }
}

template <class T>
int64_t scratch_bytes(const AttentionProblem& problem, const ForwardSizes& sizes) {
  Carve carve(nullptr);
  Scratch<typename operand<T>::type>(problem, sizes, carve);
  return carve.bytes();
}

int64_t partial_width(const AttentionProblem& problem) { return round_up(problem.dim, kLanes) + 2; }

int64_t forward_scratch(const AttentionProblem& problem, const ForwardSizes& sizes) {
  return with_element(problem.element, [&](auto zero) { return scratch_bytes<decltype(zero)>(problem, sizes); });
}

void forward_item(const AttentionProblem& problem, const ForwardItem& item, const ForwardOutput& output,
                  const ForwardSizes& sizes, void* scratch) {
  with_element(problem.element, [&](auto zero) { forward<decltype(zero)>(problem, item, output, sizes, scratch); });
}

void merge_item(const AttentionProblem& problem, const ForwardItem& item, int64_t count, const ForwardOutput& output,
                const ForwardSizes& sizes) {
  with_element(problem.element, [&](auto zero) { merge<decltype(zero)>(problem, item, count, output, sizes); });
}

}  // namespace

ForwardPath forward_path() { return {tile_rows, partial_width, forward_scratch, forward_item, merge_item}; }

}  // namespace hici::cpu::HICI_PATH
