// attention, forward, for few rows a kv head (decode). Every key and value is read once from memory and used little, so
// nothing is packed: rows are multiplied where they lie, in float32 whatever the inputs are.
//
// A block of keys is taken for one kv head after the other, since the rows of a token's heads share pages of memory; the
// rows of the next head, or of the next block, are asked for while these are multiplied.

#include "../attention.h"
#include "attention_rows.h"
#include "dot.h"
#include "lanes.h"
#include "sums.h"
#include "weigh.h"

namespace hici::cpu::HICI_PATH {
namespace {

constexpr int64_t kBlock = 32;  // keys: a chain of additions of values (kChain), and rows near the core

// Rows of a block of keys and values of one kv head.
template <class T>
struct Block {
  const T* k[kBlock];
  const T* v[kBlock];
  int64_t n = 0;
};

template <class T>
struct Scratch {
  int64_t width;
  float *q, *s;
  Sums sums;
  Block<T>* blocks;

  Scratch(const AttentionProblem& problem, const ForwardSizes& sizes, Carve& carve)
      : width(round_up(problem.dim, kLanes)) {
    const int64_t rows = sizes.rows * sizes.heads;
    q = carve.take<float>(rows * width);
    s = carve.take<float>(4 * kBlock);
    sums = {carve.take<float>(rows * width), carve.take<float>(rows * kLanes), carve.take<float>(rows), width};
    blocks = carve.take<Block<T>>(2);
  }
};

// s[r][j] = q[r] . k[j] for j < n; s has room for n rounded up to kLanes. ahead: rows [0, ahead_count) that come next.
template <int R, class T>
inline void score(const float* q, int64_t width, const T* const* k, int64_t n, int64_t dim, float* s,
                  const T* const* ahead, int64_t ahead_count) {
  constexpr int kRows = R == 3 ? 4 : R, kKeys = kLanes / kRows;  // of a register of sums
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < n; j += kKeys) {
    Vec sum[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum[i] = zeros();
    const T* rows[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) rows[i] = k[smaller(j + i, n - 1)];
    const int64_t wanted = smaller(kKeys, ahead_count - j);
    int64_t at = 0;
    for (; at + kLanes <= dim; at += kLanes) {
      if (at % kLine == 0) ask_for_lines(ahead + j, wanted, at);
      Vec left[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) left[r] = load(q + r * width + at);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec right = widen(rows[i] + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r * kKeys + i] = fma(left[r], right, sum[r * kKeys + i]);
      }
    }
    if (at < dim)
      for (int i = 0; i < kKeys; ++i) {
        const Vec right = widen_part(rows[i] + at, dim - at);
        for (int r = 0; r < R; ++r) sum[r * kKeys + i] = fma(load(q + r * width + at), right, sum[r * kKeys + i]);
      }
    alignas(64) float found[kLanes];
    store(found, sums_of(sum));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * kBlock + j, found + r * kKeys, kKeys * sizeof(float));
  }
}

template <class T>
void few(const AttentionProblem& problem, const ForwardItem& item, const ForwardOutput& output,
         const ForwardSizes& sizes, void* memory) {
  Carve carve(memory);
  const Scratch<T> x(problem, sizes, carve);
  const AttentionSegment& segment = problem.segments[item.segment];
  const int64_t tokens = item.rank_end - item.rank_begin, group = problem.group(), dim = problem.dim, width = x.width;
  const int64_t slots = segment.slots ? problem.global.count + problem.local.count : 0;

  // rows: the query heads of a kv head within a token, tokens within a kv head
  const auto each_row = [&](auto&& body) {
    for (int64_t g = 0, r = 0; g < item.heads; ++g)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < group; ++h, ++r) body(r, g, t, (item.kv_head + g) * group + h);
  };
  each_row([&](int64_t r, int64_t, int64_t t, int64_t head) {
    const T* const from = query_row<T>(problem, problem.q, segment.batch, item.rank_begin + t, head);
    for (int64_t d = 0; d < width; d += kLanes)
      store(x.q + r * width + d, d + kLanes <= dim ? widen(from + d) : widen_part(from + d, dim - d));
  });
  x.sums.clear(item.heads * tokens * group);

  const Vec scale = splat(static_cast<float>(problem.scale));
  const int64_t visible = problem.causal ? seen_keys(segment, slots, item.rank_end - 1) : item.key_end;
  const int64_t last = smaller(item.key_end, visible);
  const auto list = [&](int64_t j, int64_t g, Block<T>& to) {
    to.n = larger(0, smaller(kBlock, last - j));
    key_rows<T>(problem, segment, item.kv_head + g, slots, j, j + to.n, to.k, to.v);
  };
  Block<T>*now = x.blocks, *next = x.blocks + 1;
  list(item.key_begin, 0, *now);
  for (int64_t j = item.key_begin; j < last; j += kBlock)
    for (int64_t g = 0; g < item.heads; ++g) {
      if (g + 1 < item.heads)
        list(j, g + 1, *next);
      else
        list(j + kBlock, 0, *next);
      int64_t wanted = next->n;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t rank = item.rank_begin + t;
        const int64_t seen = problem.causal ? smaller(now->n, seen_keys(segment, slots, rank) - j) : now->n;
        if (seen <= 0) continue;
        in_fours(group, [&](auto many, int64_t first) {
          constexpr int R = decltype(many)::value;
          const int64_t row = (g * tokens + t) * group + first;
          score<R>(x.q + row * width, width, now->k, seen, dim, x.s, next->k, wanted);
          float *o[R], *p[R];
          for (int r = 0; r < R; ++r) {
            o[r] = x.sums.o + (row + r) * width, p[r] = x.s + r * kBlock;
            x.sums.raise(row + r, p[r], seen, scale);
          }
          for (int r = 0; r < R; ++r) x.sums.weights(row + r, p[r], seen, scale, p[r]);
          weigh<R>(o, p, now->v, seen, dim, next->v, wanted);
          wanted = 0;
        });
      }
      swap(now, next);
    }

  each_row([&](int64_t r, int64_t g, int64_t t, int64_t head) {
    const float* const o = x.sums.o + r * width;
    const float total = reduce_add(load(x.sums.total + r * kLanes)), top = x.sums.top[r];
    if (item.partial < 0) return finish<T>(problem, segment, item.rank_begin + t, head, o, total, top, output);
    // where merge() looks for it: tokens within a head
    const int64_t at = (item.partial + g) * sizes.rows + head % group * tokens + t;
    float* const to = output.partials + at * (width + 2);
    __builtin_memcpy(to, o, width * sizeof(float));
    to[width] = total, to[width + 1] = top;
  });
}

template <class T>
int64_t scratch_bytes(const AttentionProblem& problem, const ForwardSizes& sizes) {
  Carve carve(nullptr);
  Scratch<T>(problem, sizes, carve);
  return carve.bytes();
}

int64_t few_scratch(const AttentionProblem& problem, const ForwardSizes& sizes) {
  return with_element(problem.element, [&](auto zero) { return scratch_bytes<decltype(zero)>(problem, sizes); });
}

void few_item(const AttentionProblem& problem, const ForwardItem& item, const ForwardOutput& output,
              const ForwardSizes& sizes, void* scratch) {
  with_element(problem.element, [&](auto zero) { few<decltype(zero)>(problem, item, output, sizes, scratch); });
}

}  // namespace

FewPath few_path() { return {few_scratch, few_item}; }

}  // namespace hici::cpu::HICI_PATH
