// hga_attention, backward, over lists of runs.
//
//   S = Q K^T   P = exp(scale S - lse)   dP = dO V^T   dS = P (dP - delta)   delta = dO . O - grad_lse
//   dV += P^T dO   dK += scale dS^T Q   dQ = scale dS K
//
// In float32 the rounding of lse and of O shows where gradients cancel, and scores come out of other orders of additions
// than in the forward pass: there, sum and delta = sum_j P dP of every row are formed once more, two products more.
//
// Rows are copied together strip by strip, so that every product runs on adjacent memory. dK and dV of a kv head are kept
// in float for all its tokens and added to in order of lists, runs and strips.

#include "../hga_attention.h"
#include "attention_rows.h"

namespace hici::cpu::HICI_PATH {
namespace {

constexpr int64_t kStripRows = 64;

template <class T>
struct Backward {
  using Op = typename operand<T>::type;
  static constexpr bool kAnew = sizeof(T) == 4;
  const RunList& list;
  int64_t depth, width, run_depth_most;
  Op *q, *grad, *k_columns, *v_columns, *k_depth, *q_depth, *grad_depth, *p, *ds, *transposed;
  float *s, *dp, *dq, *delta, *level, *factor, *sum, *row_total, *row_delta;
  unsigned char* alive;
  const T **k_rows, **v_rows, **q_rows, **grad_rows;
  T* nothing;
  const Op** p_rows;
  int64_t* seen;

  Backward(const RunList& l, const RunSizes& sizes, Carve& carve) : list(l) {
    depth = round_up(l.dim, reduction<Op>::step), width = round_up(l.dim, kLanes);
    run_depth_most = round_up(kRunTokens, reduction<Op>::step);
    const int64_t strip_depth = round_up(kStripRows, reduction<Op>::step);
    q = carve.take<Op>(kStripRows * depth);
    grad = carve.take<Op>(kStripRows * depth);
    k_columns = carve.take<Op>(kRunTokens * depth);
    v_columns = carve.take<Op>(kRunTokens * depth);
    k_depth = carve.take<Op>(run_depth_most * width);
    q_depth = carve.take<Op>(strip_depth * width);
    grad_depth = carve.take<Op>(strip_depth * width);
    p = carve.take<Op>(kStripRows * run_depth_most + 2 * kLanes);
    ds = carve.take<Op>(kStripRows * run_depth_most + 2 * kLanes);
    transposed = carve.take<Op>((kRunTokens + 32) * strip_depth);
    s = carve.take<float>(kStripRows * kRunTokens);
    dp = carve.take<float>(kStripRows * kRunTokens);
    sum = carve.take<float>(kRunTokens * width);
    dq = carve.take<float>(sizes.rows * width);
    delta = carve.take<float>(sizes.rows);
    level = carve.take<float>(sizes.rows);
    factor = carve.take<float>(sizes.rows);
    row_total = carve.take<float>(kAnew ? sizes.rows * kLanes : 0);
    row_delta = carve.take<float>(kAnew ? sizes.rows * kLanes : 0);
    alive = carve.take<unsigned char>(sizes.rows);
    k_rows = carve.take<const T*>(kRunTokens + 32);
    v_rows = carve.take<const T*>(kRunTokens + 32);
    q_rows = carve.take<const T*>(kStripRows + 32);
    grad_rows = carve.take<const T*>(kStripRows + 32);
    nothing = carve.take<T>(l.dim);
    p_rows = carve.take<const Op*>(kStripRows + 32);
    seen = carve.take<int64_t>(kStripRows);
  }

  static Vec part(const T* x, int64_t d, int64_t at) {
    return at + kLanes <= d ? widen(x + at) : widen_part(x + at, d - at);
  }

  bool finite(int64_t n) const {
    for (int64_t j = 0; j < n; ++j) {
      Vec total = zeros();
      for (int64_t d = 0; d < list.dim; d += kLanes) total = add(total, mul(part(k_rows[j], list.dim, d), zeros()));
      if (any_differs(total, zeros())) return false;
    }
    return true;
  }

  // A row of which nothing is asked passes nothing on, whatever its numbers are.
  void prepare(const RunGradients& g) const {
    __builtin_memset(nothing, 0, list.dim * sizeof(T));
    __builtin_memset(dq, 0, list.rows * width * sizeof(float));
    for (int64_t r = 0; r < list.rows; ++r) {
      const T *const from = static_cast<const T*>(g.grad_out[r]), *const out = static_cast<const T*>(list.out[r]);
      Vec total = zeros();
      bool asked = *g.grad_lse[r] != 0.0f;
      for (int64_t d = 0; d < list.dim; d += kLanes) {
        const Vec x = part(from, list.dim, d);
        asked |= any_differs(x, zeros());
        total = fma(x, part(out, list.dim, d), total);
      }
      alive[r] = asked, delta[r] = reduce_add(total) - *g.grad_lse[r], level[r] = *list.lse[r], factor[r] = 1.0f;
    }
  }

  void point(const Run& run) const {
    const T *const kb = static_cast<const T*>(run.k), *const vb = static_cast<const T*>(run.v);
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t at = run.columns ? run.columns[i] : i;
      k_rows[i] = kb + at * list.k_step, v_rows[i] = vb + at * list.v_step;
    }
    pack_columns(k_rows, run.count, list.dim, k_columns);
    pack_columns(v_rows, run.count, list.dim, v_columns);
  }

  // s and dp of `count` rows, and what each of them sees
  void multiply(const Run& run, const int32_t* rows, int64_t count, const RunGradients& g) const {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t r = rows[i];
      q_rows[i] = alive[r] ? static_cast<const T*>(list.q[r]) : nothing;
      grad_rows[i] = alive[r] ? static_cast<const T*>(g.grad_out[r]) : nothing;
      seen[i] = alive[r] ? larger(0, smaller(run.count, list.index[r] - run.start + 1)) : 0;
    }
    pack_rows(q_rows, count, list.dim, depth, q);
    pack_rows(grad_rows, count, list.dim, depth, grad);
    gemm<false>(count, round_up(run.count, kLanes), depth, q, depth, k_columns, s, kRunTokens, depth);
    gemm<false>(count, round_up(run.count, kLanes), depth, grad, depth, v_columns, dp, kRunTokens, depth);
  }

  void normalise(const RunGradients& g) const {
    __builtin_memset(row_total, 0, list.rows * kLanes * sizeof(float));
    __builtin_memset(row_delta, 0, list.rows * kLanes * sizeof(float));
    const Vec scale = splat(list.scale);
    for (int64_t x = 0; x < list.run_count; ++x) {
      const Run& run = list.runs[x];
      point(run);
      for (int64_t first_row = 0; first_row < run.rows_count; first_row += kStripRows) {
        const int64_t count = smaller(kStripRows, run.rows_count - first_row);
        const int32_t* const rows = list.row_ids + run.rows_begin + first_row;
        multiply(run, rows, count, g);
        for (int64_t i = 0; i < count; ++i) {
          float *const total = row_total + rows[i] * kLanes, *const products = row_delta + rows[i] * kLanes;
          for (int64_t j = 0; j < seen[i]; j += kLanes) {
            const int64_t there = smaller(kLanes, seen[i] - j);
            Vec w = exp(sub(mul(load(s + i * kRunTokens + j), scale), splat(level[rows[i]])));
            Vec y = mul(w, load(dp + i * kRunTokens + j));
            if (there < kLanes) w = keep_first(there, w, zeros()), y = keep_first(there, y, zeros());
            store(total, add(load(total), w));
            store(products, add(load(products), y));
          }
        }
      }
    }
    for (int64_t r = 0; r < list.rows; ++r) {
      const float total = reduce_add(load(row_total + r * kLanes));
      if (!alive[r] || total == 0.0f) continue;
      factor[r] = 1.0f / total;
      delta[r] = reduce_add(load(row_delta + r * kLanes)) / total - *g.grad_lse[r];
    }
  }

  void attend(const Run& run, const RunGradients& g) const {
    const int64_t n = run.count, run_depth = round_up(n, reduction<Op>::step), dim = list.dim;
    point(run);
    pack_depth(k_rows, n, dim, k_depth);
    const int32_t* const ids = list.row_ids + run.rows_begin;
    const bool causal = list.index[ids[0]] - run.start + 1 < n;
    const bool poisoned = causal && !finite(n);
    for (int64_t first_row = 0; first_row < run.rows_count; first_row += kStripRows) {
      const int64_t count = smaller(kStripRows, run.rows_count - first_row);
      const int64_t strip_depth = round_up(count, reduction<Op>::step);
      const int32_t* const rows = ids + first_row;
      multiply(run, rows, count, g);
      pack_depth(q_rows, count, dim, q_depth);
      pack_depth(grad_rows, count, dim, grad_depth);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t r = rows[i];
        Op *const to_p = p + i * run_depth, *const to_ds = ds + i * run_depth;
        const Vec shift = splat(level[r]), less = splat(delta[r]), scale = splat(list.scale), by = splat(factor[r]);
        for (int64_t j = 0; j < seen[i]; j += kLanes) {
          const int64_t there = smaller(kLanes, seen[i] - j);
          Vec w = mul(exp(sub(mul(load(s + i * kRunTokens + j), scale), shift)), by);
          Vec x = mul(w, sub(load(dp + i * kRunTokens + j), less));
          if (there < kLanes) w = keep_first(there, w, zeros()), x = keep_first(there, x, zeros());
          narrow(to_p + j, w);
          narrow(to_ds + j, x);
        }
        if (seen[i] < run_depth) {
          __builtin_memset(to_p + seen[i], 0, (run_depth - seen[i]) * sizeof(Op));
          __builtin_memset(to_ds + seen[i], 0, (run_depth - seen[i]) * sizeof(Op));
        }
      }
      for (int64_t i = 0; i < count; ++i) {  // rows of dQ lie apart
        if (seen[i] == 0) continue;
        int64_t last = i + 1;
        while (last < count && rows[last] == rows[last - 1] + 1 && seen[last] > 0 && !poisoned) ++last;
        int64_t own = run_depth;
        if (poisoned) own = round_up(seen[i], reduction<Op>::step), pack_depth(k_rows, seen[i], dim, k_depth);
        gemm<true>(last - i, width, own, ds + i * run_depth, run_depth, k_depth, dq + rows[i] * width, width, own);
        i = last - 1;
      }
      if (poisoned) pack_depth(k_rows, n, dim, k_depth);
      for (int64_t i = 0; i < count; ++i) p_rows[i] = p + i * run_depth;
      pack_rows_transposed(p_rows, count, n, strip_depth, transposed);
      gemm<false>(n, width, strip_depth, transposed, strip_depth, grad_depth, sum, width, strip_depth);
      add_rows(sum, n, g.v + run.start * dim, splat(1.0f));
      for (int64_t i = 0; i < count; ++i) p_rows[i] = ds + i * run_depth;
      pack_rows_transposed(p_rows, count, n, strip_depth, transposed);
      gemm<false>(n, width, strip_depth, transposed, strip_depth, q_depth, sum, width, strip_depth);
      add_rows(sum, n, g.k + run.start * dim, splat(list.scale));
    }
  }

  void add_rows(const float* from, int64_t n, float* to, Vec factor) const {
    for (int64_t j = 0; j < n; ++j, from += width, to += list.dim) {
      int64_t d = 0;
      for (; d + kLanes <= list.dim; d += kLanes) store(to + d, add(load(to + d), mul(load(from + d), factor)));
      if (d < list.dim) {
        const int64_t there = list.dim - d;
        store_part(to + d, add(load_part(to + d, there), mul(load(from + d), factor)), there);
      }
    }
  }

  void run(const RunGradients& g) const {
    prepare(g);
    tiles_begin();
    if (kAnew) normalise(g);
    for (int64_t i = 0; i < list.run_count; ++i) attend(list.runs[i], g);
    tiles_end();
    const Vec scale = splat(list.scale);
    for (int64_t r = 0; r < list.rows; ++r) {
      T* const to = static_cast<T*>(g.q[r]);
      const float* const from = dq + r * width;
      for (int64_t d = 0; d < list.dim; d += kLanes) {
        const Vec x = alive[r] ? mul(load(from + d), scale) : zeros();
        const int64_t there = smaller(kLanes, list.dim - d);
        if (there == kLanes)
          hici::cpu::HICI_PATH::narrow(to + d, x);
        else
          narrow_part(to + d, x, there);
      }
    }
  }
};

}  // namespace

int64_t run_backward_scratch(const RunList& list, const RunSizes& sizes) {
  return with_element(list.element, [&](auto zero) {
    Carve carve(nullptr);
    Backward<decltype(zero)> backward(list, sizes, carve);
    return carve.bytes();
  });
}

void run_backward(const RunList& list, const RunSizes& sizes, const RunGradients& gradients, void* memory) {
  with_element(list.element, [&](auto zero) {
    Carve carve(memory);
    Backward<decltype(zero)>(list, sizes, carve).run(gradients);
  });
}

void run_narrow(Element element, const float* from, int64_t count, void* to) {
  with_element(element, [&](auto zero) {
    auto* const out = static_cast<decltype(zero)*>(to);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) narrow(out + i, load(from + i));
    if (i < count) narrow_part(out + i, load_part(from + i, count - i), count - i);
  });
}

}  // namespace hici::cpu::HICI_PATH
