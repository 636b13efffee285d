// hga_attention, forward, over lists of runs.
//
// Many rows: a run's keys and values are packed once and multiplied with the rows that see it, wherever those lie among
// the rows of the list. Scores are shifted by a level per row that moves only when a score exceeds it by kLag, so that a
// row's sums are hardly ever scaled: with weights up to e^kLag float32 sums lose nothing.
//
// Few rows (decode): a run is read once from memory, and reading is all the time there is: nothing is packed, rows of
// keys are multiplied where they lie (dot.h).

#include "../hga_attention.h"
#include "attention_rows.h"
#include "dot.h"
#include "gather.h"

namespace hici::cpu::HICI_PATH {
namespace {

constexpr float kLag = 8.0f;
constexpr int64_t kStripRows = 96;  // a multiple of kStrip and of tile rows

template <class T>
inline void point(const RunList& list, const Run& run, const T** k, const T** v) {
  const T *const kb = static_cast<const T*>(run.k), *const vb = static_cast<const T*>(run.v);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t at = run.columns ? run.columns[i] : i;
    k[i] = kb + at * list.k_step, v[i] = vb + at * list.v_step;
  }
}

// Sums of a list's rows: o [rows][width], weights added up in lanes, and the level scores are shifted by.
struct Sums {
  float *o, *total, *top;
  int64_t width;

  void clear(int64_t rows) const {
    __builtin_memset(o, 0, rows * width * sizeof(float));
    __builtin_memset(total, 0, rows * kLanes * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) top[r] = -__builtin_inff();
  }

  // Scores s[0, n) become weights; the level of row r moves if it must.
  template <class Op>
  void soften(int64_t r, const float* s, int64_t n, Vec scale, Op* p) const {
    const Vec none = splat(-__builtin_inff()), limit = splat(top[r] + kLag);
    bool above = false;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) above |= any_differs(max(mul(load(s + j), scale), limit), limit);
    if (j < n) above |= any_differs(max(keep_first(n - j, mul(load(s + j), scale), none), limit), limit);
    if (above) {
      Vec m = none;
      for (j = 0; j + kLanes <= n; j += kLanes) m = max(mul(load(s + j), scale), m);
      if (j < n) m = max(keep_first(n - j, mul(load(s + j), scale), none), m);
      const float highest = reduce_max(m);
      if (top[r] != -__builtin_inff()) {  // else there is nothing yet
        const Vec a = exp(splat(top[r] - highest));
        for (int64_t d = 0; d < width; d += kLanes) store(o + r * width + d, mul(load(o + r * width + d), a));
        store(total + r * kLanes, mul(load(total + r * kLanes), a));
      }
      top[r] = highest;
    }
    const Vec shift = splat(top[r]);
    Vec sum = load(total + r * kLanes);
    for (j = 0; j + kLanes <= n; j += kLanes) {
      const Vec w = exp(sub(mul(load(s + j), scale), shift));
      sum = add(sum, w);
      narrow(p + j, w);
    }
    if (j < n) {
      const Vec w = keep_first(n - j, exp(sub(mul(load(s + j), scale), shift)), zeros());
      sum = add(sum, w);
      narrow(p + j, w);
    }
    store(total + r * kLanes, sum);
  }
};

template <class T>
inline void normalise(const RunList& list, int64_t r, const float* o, float total) {
  T* const out = static_cast<T*>(list.out[r]);
  const Vec weight = splat(total == 0.0f ? 1.0f : total);
  int64_t d = 0;
  for (; d + kLanes <= list.dim; d += kLanes) narrow(out + d, div(load(o + d), weight));
  if (d < list.dim) narrow_part(out + d, div(load(o + d), weight), list.dim - d);
}

template <class T>
inline void finish(const RunList& list, int64_t r, const float* o, float total, float top) {
  if (list.wide)
    normalise<float>(list, r, o, total);
  else
    normalise<T>(list, r, o, total);
  *list.lse[r] = static_cast<float>(static_cast<double>(top) + __builtin_log(static_cast<double>(total)));
}

// Tokens of a run that a row sees.
inline int64_t seen_of(const RunList& list, const Run& run, int64_t row) {
  return larger(0, smaller(run.count, list.index[row] - run.start + 1));
}

template <class T>
struct Many {
  using Op = typename operand<T>::type;
  const RunList& list;
  int64_t depth, width;
  Op *q, *k, *v, *p;
  float* s;
  Sums sums;
  const T **k_rows, **v_rows, **next_k, **next_v;
  const Op** a;
  float **s_rows, **o_rows;
  int64_t* seen;

  Many(const RunList& l, const RunSizes& sizes, Carve& carve) : list(l) {
    depth = round_up(l.dim, reduction<Op>::step), width = round_up(l.dim, kLanes);
    const int64_t run_depth = round_up(kRunTokens, reduction<Op>::step);
    q = carve.take<Op>(sizes.rows * depth);
    k = carve.take<Op>(kRunTokens * depth);
    v = carve.take<Op>(run_depth * width);
    s = carve.take<float>(kStripRows * kRunTokens);
    p = carve.take<Op>(kStripRows * run_depth + kLanes);
    sums = {carve.take<float>(sizes.rows * width), carve.take<float>(sizes.rows * kLanes),
            carve.take<float>(sizes.rows), width};
    k_rows = carve.take<const T*>(kRunTokens + 32);
    v_rows = carve.take<const T*>(kRunTokens + 32);
    next_k = carve.take<const T*>(kRunTokens + 32);
    next_v = carve.take<const T*>(kRunTokens + 32);
    a = carve.take<const Op*>(kStripRows);
    s_rows = carve.take<float*>(kStripRows);
    o_rows = carve.take<float*>(kStripRows);
    seen = carve.take<int64_t>(kStripRows);
    for (int64_t i = 0; i < kStripRows && s != nullptr && l.rows > 0; ++i) s_rows[i] = s + i * kRunTokens;
  }

  bool finite(int64_t n) const {
    for (int64_t j = 0; j < n; ++j) {
      Vec sum = zeros();
      int64_t d = 0;
      for (; d + kLanes <= list.dim; d += kLanes) sum = add(sum, mul(widen(v_rows[j] + d), zeros()));
      if (d < list.dim) sum = add(sum, mul(widen_part(v_rows[j] + d, list.dim - d), zeros()));
      if (any_differs(sum, zeros())) return false;
    }
    return true;
  }

  void attend(const Run& run, const Run* following) {
    const int64_t n = run.count, columns = round_up(n, kLanes), run_depth = round_up(n, reduction<Op>::step);
    const int32_t* const ids = list.row_ids + run.rows_begin;
    if (following) point(list, *following, next_k, next_v);
    pack_columns(k_rows, n, list.dim, k, following ? next_k : nullptr, following ? following->count : 0);
    pack_depth(v_rows, n, list.dim, v, following ? next_v : nullptr, following ? following->count : 0);
    const bool causal = seen_of(list, run, ids[0]) < n;
    const bool poisoned = causal && !finite(n);
    const bool adjacent = ids[run.rows_count - 1] - ids[0] == run.rows_count - 1;
    const Vec scale = splat(list.scale);
    for (int64_t first_row = 0; first_row < run.rows_count; first_row += kStripRows) {
      const int64_t count = smaller(kStripRows, run.rows_count - first_row);
      const int32_t* const rows = ids + first_row;
      if (adjacent) {
        gemm<false>(count, columns, depth, q + rows[0] * depth, depth, k, s, kRunTokens, depth);
      } else {
        for (int64_t i = 0; i < count; ++i) a[i] = q + rows[i] * depth;
        gemm_at<false>(count, columns, depth, a, k, s_rows, depth);
      }
      for (int64_t i = 0; i < count; ++i) {
        Op* const to = p + i * run_depth;
        seen[i] = causal ? seen_of(list, run, rows[i]) : n;
        // the vector stored last may reach into the next row, which is formed after it
        if (seen[i] > 0) sums.soften(rows[i], s + i * kRunTokens, seen[i], scale, to);
        if (seen[i] < run_depth) __builtin_memset(to + seen[i], 0, (run_depth - seen[i]) * sizeof(Op));
      }
      if (poisoned) {  // 0 times what a row does not see is not 0
        for (int64_t i = 0; i < count; ++i) {
          if (seen[i] == 0) continue;
          const int64_t own = round_up(seen[i], reduction<Op>::step);
          pack_depth(v_rows, seen[i], list.dim, v);
          gemm<true>(1, width, own, p + i * run_depth, run_depth, v, sums.o + rows[i] * width, width, own);
        }
        pack_depth(v_rows, n, list.dim, v);
      } else if (adjacent) {
        gemm<true>(count, width, run_depth, p, run_depth, v, sums.o + rows[0] * width, width, run_depth);
      } else {
        for (int64_t i = 0; i < count; ++i) a[i] = p + i * run_depth, o_rows[i] = sums.o + rows[i] * width;
        gemm_at<true>(count, width, run_depth, a, v, o_rows, run_depth);
      }
    }
    swap(k_rows, next_k);
    swap(v_rows, next_v);
  }

  void run() {
    for (int64_t r = 0; r < list.rows; ++r) {
      const T* const from = static_cast<const T*>(list.q[r]);
      pack_rows(&from, 1, list.dim, depth, q + r * depth);
    }
    sums.clear(list.rows);
    tiles_begin();
    if (list.run_count > 0) point(list, list.runs[0], k_rows, v_rows);
    for (int64_t i = 0; i < list.run_count; ++i) attend(list.runs[i], i + 1 < list.run_count ? list.runs + i + 1 : nullptr);
    tiles_end();
    for (int64_t r = 0; r < list.rows; ++r)
      finish<T>(list, r, sums.o + r * width, reduce_add(load(sums.total + r * kLanes)), sums.top[r]);
  }
};

// o[r] += sum_j p[r][j] v[j] for R rows
template <int R, class T>
inline void weigh(float* const* o, const float* const* p, const T* const* v, int64_t n, int64_t d,
                  const T* const* ahead = nullptr, int64_t ahead_count = 0) {
  constexpr int kVectors = R >= 4 ? 4 : 8;
  int64_t at = 0;
  for (; at + kVectors * kLanes <= d; at += kVectors * kLanes) {
    Vec sum[R][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[r][i] = zeros();
    for (int64_t j = 0; j < n; ++j) {
      Vec w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = splat(p[r][j]);
      if (j < ahead_count)
        for (int i = 0; i < kVectors * kLanes; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(ahead[j] + at + i, 0, 3);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const Vec x = widen(v[j] + at + i * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][i] = fma(w[r], x, sum[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        float* const to = o[r] + at + i * kLanes;
        store(to, add(load(to), sum[r][i]));
      }
  }
  for (; at < d; at += kLanes) {
    const int64_t there = smaller(kLanes, d - at);
    for (int r = 0; r < R; ++r) {
      Vec sum = zeros();
      for (int64_t j = 0; j < n; ++j)
        sum = fma(splat(p[r][j]), there == kLanes ? widen(v[j] + at) : widen_part(v[j] + at, there), sum);
      store(o[r] + at, add(load(o[r] + at), sum));
    }
  }
}

// Runs between the one attended and the one asked for: what lies apart in memory comes late.
constexpr int64_t kAhead = 1;
// Runs lie anywhere: finding out where their pages of memory are takes longer than reading them, so that one line of each
// is asked for this many runs ahead.
constexpr int64_t kPagesAhead = 10, kPageBytes = 4096;

template <class T>
HICI_ASK void ask_for_pages(const RunList& list, const Run& run) {
  if (run.columns) return;
  const T *const k = static_cast<const T*>(run.k), *const v = static_cast<const T*>(run.v);
  constexpr int64_t page = kPageBytes / static_cast<int64_t>(sizeof(T));
  const int64_t k_rows = larger(1, page / larger(1, list.k_step)), v_rows = larger(1, page / larger(1, list.v_step));
  for (int64_t i = 0; i < run.count; i += k_rows) __builtin_prefetch(k + i * list.k_step, 0, 2);
  for (int64_t i = 0; i < run.count; i += v_rows) __builtin_prefetch(v + i * list.v_step, 0, 2);
}

template <class T>
struct Few {
  const RunList& list;
  int64_t width;
  float *s, *p;
  Sums sums;
  const T **k_rows[kAhead + 1], **v_rows[kAhead + 1];  // of the run attended and the following, in turn

  Few(const RunList& l, Carve& carve) : list(l), width(round_up(l.dim, kLanes)) {
    s = carve.take<float>(kRunTokens);
    p = carve.take<float>(kFewRows * kRunTokens);
    sums = {carve.take<float>(kFewRows * width), carve.take<float>(kFewRows * kLanes), carve.take<float>(kFewRows), width};
    for (const T**& rows : k_rows) rows = carve.take<const T*>(kRunTokens + 32);
    for (const T**& rows : v_rows) rows = carve.take<const T*>(kRunTokens + 32);
  }

  void attend(const Run& run, const T** k, const T** v, const T** next_k, const T** next_v, int64_t ahead) const {
    const int64_t n = run.count;
    const int32_t* const ids = list.row_ids + run.rows_begin;
    const Vec scale = splat(list.scale);
    const bool causal = seen_of(list, run, ids[0]) < n;
    float* o[kFewRows];
    const float* weights[kFewRows];
    for (int64_t i = 0; i < run.rows_count; ++i) {
      const int64_t seen = causal ? seen_of(list, run, ids[i]) : n;
      o[i] = sums.o + ids[i] * width, weights[i] = p + i * kRunTokens;
      if (seen == 0) continue;
      dots(static_cast<const T*>(list.q[ids[i]]), k, seen, list.dim, s, next_k, i == 0 ? ahead : 0);
      sums.soften(ids[i], s, seen, scale, p + i * kRunTokens);
      if (causal) {
        weigh<1>(o + i, weights + i, v, seen, list.dim, next_v, i == 0 ? ahead : 0);
        point(list, run, k, v);  // dots() has filled up its last vector of rows
      }
    }
    if (causal) return;
    int64_t i = 0;
    for (; i + 4 <= run.rows_count; i += 4, ahead = 0) weigh<4>(o + i, weights + i, v, n, list.dim, next_v, ahead);
    if (i + 2 <= run.rows_count) weigh<2>(o + i, weights + i, v, n, list.dim, next_v, ahead), i += 2, ahead = 0;
    if (i < run.rows_count) weigh<1>(o + i, weights + i, v, n, list.dim, next_v, ahead);
  }

  void run(int64_t begin, int64_t end, float* partial) {
    for (int64_t i = begin; i < end && i < begin + kPagesAhead; ++i) ask_for_pages<T>(list, list.runs[i]);
    sums.clear(list.rows);
    for (int64_t i = begin; i < end && i < begin + kAhead; ++i)
      point(list, list.runs[i], k_rows[i % (kAhead + 1)], v_rows[i % (kAhead + 1)]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t now = i % (kAhead + 1), later = (i + kAhead) % (kAhead + 1);
      const bool more = i + kAhead < end;
      if (i + kPagesAhead < end) ask_for_pages<T>(list, list.runs[i + kPagesAhead]);
      if (more) point(list, list.runs[i + kAhead], k_rows[later], v_rows[later]);
      attend(list.runs[i], k_rows[now], v_rows[now], k_rows[later], v_rows[later], more ? list.runs[i + kAhead].count : 0);
    }
    for (int64_t r = 0; r < list.rows; ++r) {
      const float total = reduce_add(load(sums.total + r * kLanes));
      const float* const o = sums.o + r * width;
      if (!partial) {
        finish<T>(list, r, o, total, sums.top[r]);
        continue;
      }
      float* const to = partial + r * (width + 2);
      __builtin_memcpy(to, o, width * sizeof(float));
      to[width] = total, to[width + 1] = sums.top[r];
    }
  }
};

template <class T>
void merge_rows(const RunList& list, float* partials, int64_t count) {
  const int64_t width = round_up(list.dim, kLanes), step = list.rows * (width + 2);
  for (int64_t r = 0; r < list.rows; ++r) {
    float* const into = partials + r * (width + 2);
    float top = into[width + 1];
    for (int64_t i = 1; i < count; ++i) {
      const float x = into[i * step + width + 1];
      top = x > top || x != x ? x : top;
    }
    float total = 0;
    bool some = false;
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = into + i * step;
      if (from[width] == 0.0f) continue;  // saw no key: its level is -inf
      alignas(64) float factor[kLanes];
      store(factor, exp(splat(from[width + 1] - top)));
      const Vec a = splat(factor[0]);
      total += from[width] * factor[0];
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec x = mul(load(from + d), a);
        store(into + d, some ? add(load(into + d), x) : x);
      }
      some = true;
    }
    finish<T>(list, r, into, total, top);
  }
}

int64_t partial_width(int64_t dim) { return round_up(dim, kLanes) + 2; }

int64_t scratch(const RunList& list, const RunSizes& sizes) {
  return with_element(list.element, [&](auto zero) {
    using T = decltype(zero);
    RunList empty = list;
    empty.rows = 0;
    Carve carve(nullptr), few_carve(nullptr);
    Many<T> many(empty, sizes, carve);
    Few<T> few(empty, few_carve);
    return larger(carve.bytes(), few_carve.bytes());
  });
}

void many(const RunList& list, const RunSizes& sizes, void* memory) {
  with_element(list.element, [&](auto zero) {
    Carve carve(memory);
    Many<decltype(zero)>(list, sizes, carve).run();
  });
}

void few(const RunList& list, int64_t begin, int64_t end, float* partial, void* memory) {
  with_element(list.element, [&](auto zero) {
    Carve carve(memory);
    Few<decltype(zero)>(list, carve).run(begin, end, partial);
  });
}

void merge(const RunList& list, float* partials, int64_t count) {
  with_element(list.element, [&](auto zero) { merge_rows<decltype(zero)>(list, partials, count); });
}

}  // namespace

int64_t run_backward_scratch(const RunList& list, const RunSizes& sizes);
void run_backward(const RunList& list, const RunSizes& sizes, const RunGradients& gradients, void* memory);
void run_narrow(Element element, const float* from, int64_t count, void* to);

RunPath run_path() {
  return {partial_width, scratch, many, few, merge, run_backward_scratch, run_backward, run_narrow};
}

}  // namespace hici::cpu::HICI_PATH
