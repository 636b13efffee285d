// attention, forward. Online softmax over blocks of keys; the query heads of a kv head are rows of one tile, so a block
// of keys and values is packed once for all of them.
//
// Per block of keys: scores S = Q K^T (gemm), then per row the new maximum m, P = e^(scale S - m), and O = O * alpha + P V
// (gemm). Rows are processed kRows at a time, so that S and P stay near the core.

#include "../attention.h"
#include "attention_rows.h"
#include "partials.h"
#if defined(HICI_PATH_AMX)
#include "attention_tiles.h"
#endif

namespace hici::cpu::HICI_PATH {
namespace {

// Whether blocks of keys meet rows in tiles (attention_tiles.h).
#if defined(HICI_PATH_AMX)
template <class Op>
constexpr bool kInTiles = reduction<Op>::pair == 2;
#else
template <class Op>
constexpr bool kInTiles = false;
#endif

// Rows that meet a block of keys together, a multiple of kStrip or of tile rows; rows of a tile, which pay for the packing
// of its keys. Beside tiles, what moves between caches takes longer than products do (csrc/README.md).
template <class Op>
constexpr int64_t kRows = kInTiles<Op> ? 32 : 48;
template <class Op>
constexpr int64_t kTileRows = kInTiles<Op> ? 1152 : 288;
// How far ahead tokens are asked for while queries are copied.
constexpr int64_t kTokensAhead = 8;
// Tiles from which on half as many, of twice the rows, are enough for the cores of a large machine.
constexpr int64_t kManyTiles = 512;

template <class Op>
constexpr float level_of_nothing = -__builtin_inff();
#if defined(HICI_PATH_AMX)
template <>
constexpr float level_of_nothing<bfloat16> = kNoLevel;
static_assert(kRows<bfloat16> == kTileEdge && kTileRows<bfloat16> / 3 * 2 % kTileEdge == 0, "");
#endif

// All heads of one token at least.
int64_t tile_rows(const AttentionProblem& problem) {
  return with_element(problem.element, [&](auto zero) {
    using Op = typename operand<decltype(zero)>::type;
    const bool narrow_heads = problem.dim <= 128;
    const int64_t rows = narrow_heads ? kTileRows<Op> : kTileRows<Op> / 3 * 2;
    const int64_t tiles = problem.batch * problem.queries * problem.heads / rows;
    const bool many = !kInTiles<Op> && narrow_heads && tiles >= kManyTiles;
    return larger(many ? 2 * rows : rows, round_up(problem.group(), kRows<Op>));
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
};

template <class Op>
struct Scratch {
  int64_t depth, width, block;  // padded dim as reduction, padded dim as columns, keys per block (a multiple of 32)
  int64_t stride;               // of rows of weights
  Op *q, *k, *v, *p;
  float *s, *o, *top, *total, *alpha;
  const void **k_rows, **v_rows, **next_k_rows, **next_v_rows;
  int64_t* visible;
#if defined(HICI_PATH_AMX)
  TileStrip* strips;
#endif

  Scratch(const AttentionProblem& problem, const ForwardSizes& sizes, Carve& carve) {
    const int64_t dim = problem.dim, rows = sizes.rows, strip_rows = smaller(rows, kRows<Op>);
    depth = round_up(dim, reduction<Op>::step), width = round_up(dim, kLanes);
    block = smaller(block_keys<Op>(dim), round_up(sizes.keys, 32));
    stride = block * static_cast<int64_t>(sizeof(float) / sizeof(Op));
    // tiles take whole ones, of two strips of weights and two blocks of scores; totals stay in lanes
    const int64_t there = kInTiles<Op> ? round_up(rows, kRows<Op>) : rows;
    q = carve.take<Op>(there * depth);
    k = carve.take<Op>(block * depth);
    v = carve.take<Op>(block * width);
    s = carve.take<float>(kInTiles<Op> ? 2 * kRows<Op> * kRows<Op> : strip_rows * block);
    // weights take the place of their scores, a row in the memory of a row
    p = kInTiles<Op> ? carve.take<Op>(2 * kRows<Op> * block) : reinterpret_cast<Op*>(s);
    o = carve.take<float>(there * width);
    top = carve.take<float>(round_up(rows, kLanes));
    total = carve.take<float>(kInTiles<Op> ? rows * kLanes : round_up(rows, kLanes));
    alpha = carve.take<float>(round_up(strip_rows, kLanes));
    visible = carve.take<int64_t>(rows);
#if defined(HICI_PATH_AMX)
    strips = carve.take<TileStrip>((rows + kRows<Op> - 1) / kRows<Op>);
#endif
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

// S of a strip becomes P; row r sees its first visible[first + r] keys. The rows of O, top and total follow.
template <class T, class Op>
void soften(const Scratch<Op>& scratch, const Strip& strip, float scale, Ahead<T>& ahead) {
  const int64_t first = strip.first, rows = strip.count, n = strip.most, depth = strip.depth;
  const int64_t* const visible = scratch.visible + first;
  const float* const scores = scratch.s;
  Op* const weights = scratch.p;
  float *const top = scratch.top + first, *const total = scratch.total + first, *const alpha = scratch.alpha;
  const float by = Weights<T>::factor_of(scale);
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
    const Vec kept = where_equal(before, splat(-__builtin_inff()), one, Weights<T>::power(sub(before, after)));
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
    Op* const p = weights + r * scratch.stride;
    const int64_t seen = smaller(visible[r], n);
    // where every score has overflowed to -inf, all weights are 0
    const Vec shift = splat(top[r] == -__builtin_inff() ? 0.0f : top[r]);
    Vec sum = zeros();
    int64_t j = 0;
    for (; j + kLanes <= seen; j += kLanes) {
      const Vec weight = weight_of<T>(load(s + j), factor, shift);
      sum = add(sum, weight);
      narrow(p + j, weight);
    }
    if (j < seen) {
      const Vec weight = keep_first(seen - j, weight_of<T>(load(s + j), factor, shift), zeros());
      sum = add(sum, weight);
      narrow_part(p + j, weight, smaller(kLanes, depth - j));
      j += kLanes;
    }
    if (j < depth) __builtin_memset(p + j, 0, (depth - j) * sizeof(Op));
    total[r] += reduce_add(sum);
    ahead.after(1);
  }
}

// What a block of n keys, packed in scratch, does to a strip of rows.
template <class T>
void meet(const Scratch<typename operand<T>::type>& x, int64_t n, const Strip& strip, float scale, Ahead<T>& ahead) {
  using Op = typename operand<T>::type;
  const int64_t columns = smaller(round_up(n, kLanes), round_up(strip.most, kPanel));
  const Op* const q = x.q + strip.first * x.depth;
  float* const o = x.o + strip.first * x.width;
  gemm<false>(strip.count, columns, x.depth, q, x.depth, x.k, x.s, x.block, x.depth, chain_of<T>);
  soften<T>(x, strip, scale, ahead);
  gemm<true>(strip.count, x.width, strip.depth, x.p, x.stride, x.v, o, x.width, round_up(n, reduction<Op>::step),
             chain_of<T>);
}

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

  // rows: token by token within a head, head by head; the heads of a token lie side by side in memory
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < group; ++h) {
      const int64_t head = item.kv_head * group + h;
      const T* const from = query_row<T>(problem, problem.q, segment.batch, item.rank_begin + t, head);
      if (t + kTokensAhead < tokens) {
        const T* const later = query_row<T>(problem, problem.q, segment.batch, item.rank_begin + t + kTokensAhead, head);
        ask_for(&later, 0, 1, 1, problem.dim);
      }
      pack_rows(&from, 1, problem.dim, depth, scratch.q + (h * tokens + t) * depth);
    }
  __builtin_memset(scratch.o, 0, rows * width * sizeof(float));
  for (int64_t r = 0; r < round_up(rows, kLanes); ++r) scratch.top[r] = level_of_nothing<Op>;
  if constexpr (kInTiles<Op>) {
    __builtin_memset(scratch.total, 0, rows * kLanes * sizeof(float));
    __builtin_memset(scratch.q + rows * depth, 0, (round_up(rows, kRows<Op>) - rows) * depth * sizeof(Op));
  } else {
    __builtin_memset(scratch.total, 0, round_up(rows, kLanes) * sizeof(float));
  }

  const T** k_rows = reinterpret_cast<const T**>(scratch.k_rows);
  const T** v_rows = reinterpret_cast<const T**>(scratch.v_rows);
  const T** next_k_rows = reinterpret_cast<const T**>(scratch.next_k_rows);
  const T** next_v_rows = reinterpret_cast<const T**>(scratch.next_v_rows);
  int64_t all_see = -1;  // what scratch.visible holds for every row, if one number
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
    // rows of one head lie far apart, which hardware does not prefetch: the next block's are asked for while this one is
    // computed, the first values while keys are packed
    pack_columns(k_rows, n, problem.dim, scratch.k, v_rows, j0 == item.key_begin ? n : 0);
    pack_depth(v_rows, n, problem.dim, scratch.v);
    Ahead<T> ahead(next_k_rows, next_v_rows, larger(0, next), problem.dim, rows);
    // keys that the first token sees; a token more sees a key more
    const int64_t seen = problem.causal ? seen_keys(segment, slots, item.rank_begin) - j0 : n;
    if (seen < n || n != all_see) {
      for (int64_t h = 0; h < group; ++h)
        for (int64_t t = 0; t < tokens; ++t)
          scratch.visible[h * tokens + t] = larger(0, smaller(n, seen + t));
      all_see = seen < n ? -1 : n;
    }
    [[maybe_unused]] int64_t strips = 0;
    for (int64_t first = 0; first < rows; first += kRows<Op>) {
      const int64_t count = smaller(kRows<Op>, rows - first);
      int64_t most = seen < n ? 0 : n, least = n;
      if (seen < n)
        for (int64_t r = first; r < first + count; ++r)
          most = larger(most, scratch.visible[r]), least = smaller(least, scratch.visible[r]);
      if (most == 0) continue;
#if defined(HICI_PATH_AMX)
      if constexpr (kInTiles<Op>) {
        scratch.strips[strips++] = {first, count, most, least};
        continue;
      }
#endif
      meet<T>(scratch, n, {first, count, most, round_up(most, reduction<Op>::step)}, problem.scale, ahead);
    }
#if defined(HICI_PATH_AMX)
    if constexpr (kInTiles<Op>) {
      const TileRows all{scratch.q, scratch.o, scratch.total, scratch.top, scratch.visible, depth, width};
      BlockInTiles<T>(all, scratch.k, scratch.v, n, problem.scale, scratch.p, scratch.s)
          .meet(scratch.strips, strips, ahead);
    }
#endif
    swap(k_rows, next_k_rows);
    swap(v_rows, next_v_rows);
  }
  tiles_end();

  const auto total = [&](int64_t r) {
    return kInTiles<Op> ? reduce_add(load(scratch.total + r * kLanes)) : scratch.total[r];
  };
  if (item.partial >= 0) {
    float* to = output.partials + item.partial * sizes.rows * (width + 2);
    for (int64_t r = 0; r < rows; ++r, to += width + 2) {
      __builtin_memcpy(to, scratch.o + r * width, width * sizeof(float));
      to[width] = total(r), to[width + 1] = static_cast<float>(Weights<T>::level_of(scratch.top[r]));
    }
    return;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < group; ++h) {
      const int64_t r = h * tokens + t;
      finish<T>(problem, segment, item.rank_begin + t, item.kv_head * group + h, scratch.o + r * width, total(r),
                Weights<T>::level_of(scratch.top[r]), output);
    }
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
