// attention of small calls, forward and backward, in double. A call of a few thousand scores is over before packed
// operands pay for themselves; and where there are few numbers, nothing averages roundings out.
//
// The query heads of a kv head are taken four at a time, so that a row of keys or values is read once for all of them.
#include "../attention.h"
#include "attention_rows.h"
#include "direct.h"

namespace hici::cpu::HICI_PATH {
namespace {

constexpr int64_t kHeads = 4;

struct Sizes {
  int64_t width, keys;  // of a row of doubles; keys of the longest segment, rounded up

  explicit Sizes(const AttentionProblem& p) : width(round_up(p.dim, kLanes)), keys(0) {
    for (int64_t i = 0; i < p.segment_count; ++i)
      keys = larger(keys, p.segments[i].key_end - p.segments[i].key_begin);
    keys = round_up(keys + p.global.count + p.local.count, kWideLanes);
  }
};

template <class T>
struct Rows {
  const T **k, **v;
  double *q, *s, *o;
  double *grad, *dp;  // backward

  Rows(const Sizes& sizes, Carve& carve, bool backward) {
    k = carve.take<const T*>(sizes.keys);
    v = carve.take<const T*>(sizes.keys);
    q = carve.take<double>(kHeads * sizes.width);
    s = carve.take<double>(kHeads * sizes.keys);
    o = carve.take<double>(kHeads * sizes.width);
    grad = carve.take<double>(backward ? kHeads * sizes.width : 0);
    dp = carve.take<double>(backward ? kHeads * sizes.keys : 0);
  }
};

// Calls body(Count<R>{}, segment, slots, kv_head, rank, first head, keys it sees) for everything there is; the rows of
// keys and values of the segment and kv head are listed.
template <class T, class List, class Body>
void each_query(const AttentionProblem& p, const Rows<T>& rows, const List& list, const Body& body) {
  for (int64_t i = 0; i < p.segment_count; ++i) {
    const AttentionSegment& x = p.segments[i];
    const int64_t slots = x.slots ? p.global.count + p.local.count : 0, n = slots + x.key_end - x.key_begin;
    for (int64_t g = 0; g < p.kv_heads; ++g) {
      key_rows<T>(p, x, g, slots, 0, n, rows.k, rows.v);
      list(x, slots, g, n);
      for (int64_t rank = x.query_begin; rank < x.query_end; ++rank) {
        const int64_t seen = p.causal ? seen_keys(x, slots, rank) : n;
        in_fours(p.group(), [&](auto many, int64_t first) { body(many, x, rank, g * p.group() + first, seen); });
      }
    }
  }
}

template <class T>
void forward(const AttentionProblem& p, void* out, float* lse, void* scratch) {
  const Sizes sizes(p);
  Carve carve(scratch);
  const Rows<T> rows(sizes, carve, false);
  each_query(p, rows, [](auto&&...) {}, [&](auto many, const AttentionSegment& x, int64_t rank, int64_t head,
                                            int64_t seen) {
    constexpr int R = decltype(many)::value;
    for (int r = 0; r < R; ++r)
      widen_row(query_row<T>(p, p.q, x.batch, rank, head + r), p.dim, rows.q + r * sizes.width);
    for (int64_t j = 0; j < seen; ++j) dots<R>(rows.q, sizes.width, rows.k[j], p.dim, p.scale, rows.s + j, sizes.keys);
    const int64_t query = p.column(x.batch, rank) - (p.keys - p.queries);
    double total[R];
    for (int r = 0; r < R; ++r) {
      const double top = soften_row(rows.s + r * sizes.keys, seen, total + r);
      lse[(x.batch * p.heads + head + r) * p.queries + query] = static_cast<float>(top + __builtin_log(total[r]));
    }
    combine<R>(rows.s, sizes.keys, rows.v, seen, p.dim, rows.o, sizes.width);
    for (int r = 0; r < R; ++r) {
      double* const o = rows.o + r * sizes.width;
      const double share = 1.0 / total[r];  // in double one more rounding is nothing, and dividing took a third of a call
      for (int64_t d = 0; d < p.dim; ++d) o[d] *= share;
      narrow_row(o, p.dim, static_cast<T*>(out) + ((x.batch * p.queries + query) * p.heads + head + r) * p.dim);
    }
  });
}

// Sums of one kind of keys: rows [count][dim] of the gradients of keys and values.
struct Sums {
  double *k, *v;
  int64_t count;
  Sums(int64_t rows, int64_t width, Carve& carve)
      : k(carve.take<double>(rows * width)), v(carve.take<double>(rows * width)), count(rows) {}
};

struct AllSums {
  Sums tokens, global, local;

  AllSums(const AttentionProblem& p, int64_t width, Carve& carve)
      : tokens(p.batch * p.keys * p.kv_heads, width, carve),
        global(sets(p, p.global) * p.global.count * p.kv_heads, width, carve),
        local(sets(p, p.local) * p.local.count * p.kv_heads, width, carve) {}
  static int64_t sets(const AttentionProblem& p, const Slots& s) {
    return p.batch * (s.per_segment ? p.segment_total : 1);
  }
};

template <class T>
void backward(const AttentionProblem& p, const Sequence4& grad_out, const float* grad_lse,
              const AttentionGradients& gradients, void* scratch) {
  const Sizes sizes(p);
  Carve carve(scratch);
  const Rows<T> rows(sizes, carve, true);
  double** const dk = carve.take<double*>(sizes.keys);
  double** const dv = carve.take<double*>(sizes.keys);
  const AllSums sums(p, sizes.width, carve);
  for (const Sums* const kind : {&sums.tokens, &sums.global, &sums.local})
    for (double* const x : {kind->k, kind->v}) __builtin_memset(x, 0, kind->count * sizes.width * sizeof(double));

  const auto list = [&](const AttentionSegment& x, int64_t slots, int64_t g, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const bool is_global = j < p.global.count;
      const Sums& kind = j >= slots ? sums.tokens : is_global ? sums.global : sums.local;
      int64_t row;
      if (j >= slots) {
        row = x.batch * p.keys + p.column(x.batch, x.key_begin + j - slots);
      } else {
        const Slots& s = is_global ? p.global : p.local;
        row = (s.per_segment ? x.batch * p.segment_total + x.segment : x.batch) * s.count +
              (is_global ? j : j - p.global.count);
      }
      dk[j] = kind.k + (row * p.kv_heads + g) * sizes.width, dv[j] = kind.v + (row * p.kv_heads + g) * sizes.width;
    }
  };
  each_query(p, rows, list, [&](auto many, const AttentionSegment& x, int64_t rank, int64_t head, int64_t seen) {
    constexpr int R = decltype(many)::value;
    const int64_t query = p.column(x.batch, rank) - (p.keys - p.queries);
    for (int r = 0; r < R; ++r) {
      widen_row(query_row<T>(p, p.q, x.batch, rank, head + r), p.dim, rows.q + r * sizes.width);
      widen_row(query_row<T>(p, grad_out, x.batch, rank, head + r), p.dim, rows.grad + r * sizes.width);
    }
    for (int64_t j = 0; j < seen; ++j) {
      dots<R>(rows.q, sizes.width, rows.k[j], p.dim, p.scale, rows.s + j, sizes.keys);
      dots<R>(rows.grad, sizes.width, rows.v[j], p.dim, 1.0, rows.dp + j, sizes.keys);
    }
    for (int r = 0; r < R; ++r) {
      double *const s = rows.s + r * sizes.keys, *const dp = rows.dp + r * sizes.keys, total, delta = 0;
      soften_row(s, seen, &total);
      for (int64_t j = 0; j < seen; ++j) s[j] /= total, delta += s[j] * dp[j];
      delta -= grad_lse[(x.batch * p.heads + head + r) * p.queries + query];
      for (int64_t j = 0; j < seen; ++j) dp[j] = p.scale * s[j] * (dp[j] - delta);
    }
    combine<R>(rows.dp, sizes.keys, rows.k, seen, p.dim, rows.o, sizes.width);
    for (int r = 0; r < R; ++r)
      narrow_row(rows.o + r * sizes.width, p.dim,
                 static_cast<T*>(gradients.q) + ((x.batch * p.queries + query) * p.heads + head + r) * p.dim);
    for (int64_t j = 0; j < seen; ++j) {
      add_rows<R>(rows.dp + j, sizes.keys, rows.q, sizes.width, dk[j]);
      add_rows<R>(rows.s + j, sizes.keys, rows.grad, sizes.width, dv[j]);
    }
  });

  const auto write = [&](const Sums& kind, void* k, void* v) {
    for (int64_t i = 0; i < kind.count; ++i) {
      if (k) narrow_row(kind.k + i * sizes.width, p.dim, static_cast<T*>(k) + i * p.dim);
      if (v) narrow_row(kind.v + i * sizes.width, p.dim, static_cast<T*>(v) + i * p.dim);
    }
  };
  write(sums.tokens, gradients.k, gradients.v);
  write(sums.global, gradients.global_k, gradients.global_v);
  write(sums.local, gradients.local_k, gradients.local_v);
}

template <class T>
int64_t bytes(const AttentionProblem& p, bool backward) {
  const Sizes sizes(p);
  Carve carve(nullptr);
  const Rows<T> rows(sizes, carve, backward);
  if (backward) {
    carve.take<double*>(2 * sizes.keys + 8);
    AllSums(p, sizes.width, carve);
  }
  return carve.bytes();
}

int64_t direct_scratch(const AttentionProblem& p, bool backward) {
  return with_element(p.element, [&](auto zero) { return bytes<decltype(zero)>(p, backward); });
}

void direct_forward(const AttentionProblem& p, void* out, float* lse, void* scratch) {
  with_element(p.element, [&](auto zero) { forward<decltype(zero)>(p, out, lse, scratch); });
}

void direct_backward(const AttentionProblem& p, const Sequence4& grad_out, const float* grad_lse,
                     const AttentionGradients& gradients, void* scratch) {
  with_element(p.element,
               [&](auto zero) { backward<decltype(zero)>(p, grad_out, grad_lse, gradients, scratch); });
}

}  // namespace

DirectPath direct_path() { return {direct_scratch, direct_forward, direct_backward}; }

}  // namespace hici::cpu::HICI_PATH
