// hga_attention, forward, over lists of runs for many rows: a run's keys and values are packed once and multiplied with the
// rows that see it, wherever those lie among the rows of the list. Few rows: hga_attention_few.cpp.

#include "../hga_attention.h"
#include "attention_rows.h"
#include "gather.h"
#include "hga_sums.h"

namespace hici::cpu::HICI_PATH {

int64_t run_few_scratch(const RunList& list);

namespace {

constexpr int64_t kStripRows = 96;  // a multiple of kStrip and of tile rows

template <class T>
inline void point(const RunList& list, const Run& run, const T** k, const T** v) {
  const T *const kb = static_cast<const T*>(run.k), *const vb = static_cast<const T*>(run.v);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t at = run.columns ? run.columns[i] : i;
    k[i] = kb + at * list.k_step, v[i] = vb + at * list.v_step;
  }
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
        if (seen[i] > 0) {
          sums.raise(rows[i], s + i * kRunTokens, seen[i], scale);
          sums.weights(rows[i], s + i * kRunTokens, seen[i], scale, to);
        }
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

int64_t scratch(const RunList& list, const RunSizes& sizes) {
  return with_element(list.element, [&](auto zero) {
    RunList empty = list;
    empty.rows = 0;
    Carve carve(nullptr);
    Many<decltype(zero)> many(empty, sizes, carve);
    return larger(carve.bytes(), run_few_scratch(list));
  });
}

void many(const RunList& list, const RunSizes& sizes, void* memory) {
  with_element(list.element, [&](auto zero) {
    Carve carve(memory);
    Many<decltype(zero)>(list, sizes, carve).run();
  });
}

}  // namespace

int64_t run_partial_width(int64_t dim);
void run_few(const RunList& list, int64_t begin, int64_t end, float* partial, void* memory);
void run_merge(const RunList& list, float* partials, int64_t count);
int64_t run_backward_scratch(const RunList& list, const RunSizes& sizes);
void run_backward(const RunList& list, const RunSizes& sizes, const RunGradients& gradients, void* memory);
void run_narrow(Element element, const float* from, int64_t count, void* to);

RunPath run_path() {
  return {run_partial_width, scratch, many, run_few, run_merge, run_backward_scratch, run_backward, run_narrow};
}

}  // namespace hici::cpu::HICI_PATH
