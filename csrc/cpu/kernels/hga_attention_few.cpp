// hga_attention, forward, for few rows (decode): a run is read once from memory, so nothing is packed, and rows of keys are
// multiplied where they lie (dot.h). What it costs is instructions and waiting: csrc/README.md counts both.

#include "attention_rows.h"
#include "dot.h"
#include "hga_sums.h"
#include "partials.h"
#include "weigh.h"

namespace hici::cpu::HICI_PATH {
namespace {

// Runs lie anywhere: finding out where their pages of memory are takes longer than reading them, so that one line of each
// is asked for this many runs ahead.
constexpr int64_t kPagesAhead = 10;

// Runs whose scores, weights and sums are formed together: of one run each would wait for the other. Lines are asked for
// this many runs ahead.
constexpr int64_t kBatch = 3, kAhead = 1;

// Rows of keys or values of a run; what is past the last one stands for the last one, so that no memory is read that the
// run does not hold.
template <class T, bool kColumns>
struct Rows {
  const T* base;
  int64_t step;
  const int64_t* columns;
  int64_t last;

  const T* operator[](int64_t i) const {
    i = smaller(i, last);
    return base + (kColumns ? columns[i] : i) * step;
  }
  Rows from(int64_t i) const { return {kColumns ? base : base + i * step, step, kColumns ? columns + i : nullptr, last - i}; }
};

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
  using Op = typename operand<T>::type;
  const RunList& list;
  int64_t width;
  float* s;
  Op* p;
  int64_t* seen;
  Sums sums;

  Few(const RunList& l, Carve& carve) : list(l), width(round_up(l.dim, kLanes)) {
    constexpr int64_t rows = kBatch * kFewRows;
    s = carve.take<float>(rows * kFewTokens);
    p = carve.take<Op>(rows * kFewTokens);
    seen = carve.take<int64_t>(rows);
    sums = {carve.take<float>(kFewRows * width), carve.take<float>(kFewRows * kLanes), carve.take<float>(kFewRows), width};
  }

  // s[i][0, seen[i]): scores of the rows that see a run. `ahead`: a run of which keys are asked for.
  template <bool kColumns>
  void score(const Run& run, const Run* ahead, float* to, int64_t* rows_see) const {
    const int32_t* const ids = list.row_ids + run.rows_begin;
    const bool causal = seen_of(list, run, ids[0]) < run.count;
    const T* const base = static_cast<const T*>(run.k);
    const bool spaced = !kColumns && run.count == kFewTokens && !causal && (!ahead || ahead->count == kFewTokens);
    for (int64_t i = 0; i < run.rows_count; ++i, to += kFewTokens, ahead = nullptr) {
      rows_see[i] = causal ? seen_of(list, run, ids[i]) : run.count;
      const T* const q = static_cast<const T*>(list.q[ids[i]]);
      if (spaced) {
        for (int64_t j = 0; j < kFewTokens; j += kLanes) {
          const Spaced<T> k(base + j * list.k_step, list.k_step);
          if (ahead)
            store(to + j, dots_of_lanes(q, k, list.dim, Spaced<T>(static_cast<const T*>(ahead->k) + j * list.k_step, list.k_step), kLanes));
          else
            store(to + j, dots_of_lanes(q, k, list.dim));
        }
        continue;
      }
      const Rows<T, kColumns> k{base, list.k_step, run.columns, run.count - 1};
      for (int64_t j = 0; j < rows_see[i]; j += kLanes) {
        if (ahead && j < ahead->count) {
          const Rows<T, kColumns> next{static_cast<const T*>(ahead->k), list.k_step, ahead->columns, ahead->count - 1};
          store(to + j, dots_of_lanes(q, k.from(j), list.dim, next.from(j), smaller(kLanes, ahead->count - j)));
        } else {
          store(to + j, dots_of_lanes(q, k.from(j), list.dim));
        }
      }
    }
  }

  template <bool kColumns>
  void sum(const Run& run, const Run* ahead, const Op* from, const int64_t* rows_see) const {
    const Rows<T, kColumns> v{static_cast<const T*>(run.v), list.v_step, run.columns, run.count - 1};
    const Run& following = ahead ? *ahead : run;
    const Rows<T, kColumns> next{static_cast<const T*>(following.v), list.v_step, following.columns, following.count - 1};
    int64_t wanted = ahead ? ahead->count : 0;
    const int32_t* const ids = list.row_ids + run.rows_begin;
    float* o[kFewRows];
    const Op* weights[kFewRows];
    for (int64_t i = 0; i < run.rows_count; ++i) o[i] = sums.o + ids[i] * width, weights[i] = from + i * kFewTokens;
    int64_t i = 0;
    if (rows_see[0] < run.count)  // the rows that see less of a run come first
      for (; i < run.rows_count; ++i, wanted = 0) weigh<1>(o + i, weights + i, v, rows_see[i], list.dim, next, wanted);
    for (; i + 4 <= run.rows_count; i += 4, wanted = 0) weigh<4>(o + i, weights + i, v, run.count, list.dim, next, wanted);
    if (i + 2 <= run.rows_count) weigh<2>(o + i, weights + i, v, run.count, list.dim, next, wanted), i += 2, wanted = 0;
    if (i < run.rows_count) weigh<1>(o + i, weights + i, v, run.count, list.dim, next, wanted);
  }

  template <bool kColumns>
  void pass(int64_t begin, int64_t end) const {
    const Vec scale = splat(list.scale);
    for (int64_t i = begin; i < end && i < begin + kPagesAhead; ++i) ask_for_pages<T>(list, list.runs[i]);
    for (int64_t first = begin; first < end; first += kBatch) {
      const int64_t count = smaller(kBatch, end - first);
      const Run* const runs = list.runs + first;
      const auto later = [&](int64_t i) { return first + i + kAhead < end ? runs + i + kAhead : nullptr; };
      const auto each = [&](auto&& body) {
        for (int64_t i = 0, at = 0; i < count; at += runs[i++].rows_count) body(i, at);
      };
      const auto each_row = [&](auto&& body) {
        each([&](int64_t i, int64_t at) {
          for (int64_t j = 0; j < runs[i].rows_count; ++j)
            if (seen[at + j] > 0) body(list.row_ids[runs[i].rows_begin + j], at + j);
        });
      };
      each([&](int64_t i, int64_t at) {
        if (first + i + kPagesAhead < end) ask_for_pages<T>(list, runs[i + kPagesAhead]);
        score<kColumns>(runs[i], later(i), s + at * kFewTokens, seen + at);
      });
      each_row([&](int64_t row, int64_t at) { sums.raise(row, s + at * kFewTokens, seen[at], scale); });
      each_row([&](int64_t row, int64_t at) {
        sums.weights(row, s + at * kFewTokens, seen[at], scale, p + at * kFewTokens);
      });
      each([&](int64_t i, int64_t at) { sum<kColumns>(runs[i], later(i), p + at * kFewTokens, seen + at); });
    }
  }

  void run(int64_t begin, int64_t end, float* partial) const {
    sums.clear(list.rows);
    if (begin < end && list.runs[begin].columns)
      pass<true>(begin, end);
    else
      pass<false>(begin, end);
    for (int64_t r = 0; r < list.rows; ++r) {
      const float total = reduce_add(load(sums.total + r * kLanes));
      float* const o = sums.o + r * width;
      if (!partial) {
        write(list, r, o, total, sums.top[r]);
        continue;
      }
      float* const to = partial + r * (width + 2);
      __builtin_memcpy(to, o, width * sizeof(float));
      to[width] = total, to[width + 1] = sums.top[r];
    }
  }

  static void write(const RunList& list, int64_t r, float* o, float total, float top) {
#if defined(HICI_PATH_AVX512_BF16)
    if constexpr (kPaired<T>) unpair(o, list.dim);
#endif
    finish<T>(list, r, o, total, top);
  }
};

template <class T>
void merge_rows(const RunList& list, float* partials, int64_t count) {
  const int64_t width = round_up(list.dim, kLanes), step = list.rows * (width + 2);
  for (int64_t r = 0; r < list.rows; ++r) {
    float* const into = partials + r * (width + 2);
    const Merged found = merge_partials(into, step, count, width);
    Few<T>::write(list, r, into, found.total, found.level);
  }
}

}  // namespace

int64_t run_partial_width(int64_t dim) { return round_up(dim, kLanes) + 2; }

int64_t run_few_scratch(const RunList& list) {
  return with_element(list.element, [&](auto zero) {
    Carve carve(nullptr);
    Few<decltype(zero)> few(list, carve);
    return carve.bytes();
  });
}

void run_few(const RunList& list, int64_t begin, int64_t end, float* partial, void* memory) {
  with_element(list.element, [&](auto zero) {
    Carve carve(memory);
    Few<decltype(zero)>(list, carve).run(begin, end, partial);
  });
}

void run_merge(const RunList& list, float* partials, int64_t count) {
  with_element(list.element, [&](auto zero) { merge_rows<decltype(zero)>(list, partials, count); });
}

}  // namespace hici::cpu::HICI_PATH
