// attention, backward: blocks of scores and what is made of them, keys by queries. Used by attention_backward.cpp, which
// has the formulas.
#pragma once

#include "../attention.h"
#include "attention_rows.h"

namespace hici::cpu::HICI_PATH {

// Keys and queries per block: what a block touches should fit the second-level cache.
template <class Op>
constexpr int64_t keys_of(int64_t dim) {
  return dim <= 128 ? (sizeof(Op) == 2 ? 128 : 64) : 64;
}
constexpr int64_t kQueryBlock = 64;

// Sums over queries and over keys are formed of parts over this many blocks where it shows that the rounding of a chain
// grows with its length: results of two bytes are rounded worse.
constexpr int64_t kTogether = 16;
inline bool summed_in_parts(const AttentionProblem& problem) { return problem.element == Element::kFloat32; }

// Blocks of queries that meet all their keys together: groups of them make up the parts of sums.
constexpr int64_t kAhead = kQueriesAhead / kQueryBlock;
static_assert(kQueriesAhead % kQueryBlock == 0 && kTogether % kAhead == 0, "");

// A block of queries.
template <class Op>
struct Queries {
  // queries and output gradients as columns, and as reduction
  Op *q_columns, *do_columns, *q_depth, *do_depth;
  float *shift, *factor;  // m and 1 / l
  float* delta;           // where all keys are in one block: minus grad_lse
  float* lost[2];         // what the sums behind factor and delta have rounded away while they are formed
  float *dqt, *dqt_parts;  // the part that is being summed, the sum of those before it

  Queries(const AttentionProblem& problem, Carve& carve) {
    const int64_t block = kQueryBlock, dim = problem.dim;
    const int64_t depth = round_up(dim, reduction<Op>::step), width = round_up(dim, kLanes);
    q_columns = carve.take<Op>(block * depth);
    do_columns = carve.take<Op>(block * depth);
    q_depth = carve.take<Op>(block * width);
    do_depth = carve.take<Op>(block * width);
    shift = carve.take<float>(block);
    factor = carve.take<float>(block);
    delta = carve.take<float>(block);
    for (float*& x : lost) x = carve.take<float>(block);
    dqt = carve.take<float>(dim * block);
    dqt_parts = carve.take<float>(summed_in_parts(problem) ? dim * block : 0);
  }
};

inline void add_rows(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, add(load(to + i), load(from + i)));
}

// A block of keys: rows of keys, rows of values, keys transposed.
template <class Op>
struct Keys {
  Op *k, *v, *kt;
};

// A block of S^T and dP^T. Where the facts of their queries were formed of them and they are kept, e^(S - level) is in the
// place of S: the level of these keys and those before.
struct Scores {
  float *s, *dp, *level;
};

// P and dS: rows of keys.
template <class Op>
struct Slopes {
  Op *p, *ds;
};

template <class Op>
struct Scratch {
  int64_t key_block, query_block;  // the most of a block, multiples of 32
  int64_t depth, width;            // padded dim as reduction, as columns
  int64_t dim;
  int64_t key_step, key_blocks;    // keys of a block that is one of several; such blocks that there is room for
  int64_t packed;                  // keys that stay packed
  bool kept;                       // and their scores with kAhead blocks of queries
  Op *k, *v, *kt, *o_columns;      // blocks of Keys; outputs as columns
  Op *p, *ds, *ds_depth;           // a block of Slopes, where these are no floats; dS again as reduction over keys
  float *s, *dp, *level;           // blocks of Scores
  float* turned;                   // rows of dQ
  const void **k_rows, **v_rows, **q_rows, **do_rows, **o_rows;
  float *dk, *dv;            // of all keys of the item
  float *dk_part, *dv_part;  // over kTogether blocks of queries
  char* queries;             // blocks of Queries
  int64_t queries_size;

  Scratch(const AttentionProblem& problem, const BackwardSizes& sizes, Carve& carve) {
    dim = problem.dim;
    key_block = larger(keys_of<Op>(dim), round_up(sizes.exact, 32)), query_block = kQueryBlock;
    depth = round_up(dim, reduction<Op>::step), width = round_up(dim, kLanes);
    key_step = keys_of<Op>(dim), key_blocks = round_up(sizes.packed, key_step) / key_step;
    packed = sizes.packed, kept = sizes.kept;
    const int64_t rows = larger(key_block, key_blocks * key_step);
    const int64_t scores = kept ? kAhead * rows : key_block;
    k = carve.take<Op>(rows * depth);
    v = carve.take<Op>(rows * depth);
    kt = carve.take<Op>(rows * dim);
    o_columns = carve.take<Op>(query_block * depth);
    const int64_t slopes = sizeof(Op) == sizeof(float) ? 0 : key_block * query_block;
    p = carve.take<Op>(slopes);
    ds = carve.take<Op>(slopes);
    ds_depth = carve.take<Op>(key_block * query_block);
    s = carve.take<float>(scores * query_block);
    dp = carve.take<float>(scores * query_block);
    level = carve.take<float>(kept ? kAhead * key_blocks * query_block : 0);
    turned = carve.take<float>(kLanes * width);
    k_rows = carve.take<const void*>(key_block);
    v_rows = carve.take<const void*>(key_block);
    for (const void*** const rows : {&q_rows, &do_rows, &o_rows}) *rows = carve.take<const void*>(2 * query_block);
    dk = carve.take<float>(sizes.keys * width);
    dv = carve.take<float>(sizes.keys * width);
    const int64_t part_rows = summed_in_parts(problem) ? sizes.keys : 0;
    dk_part = carve.take<float>(part_rows * width);
    dv_part = carve.take<float>(part_rows * width);
    Carve one(nullptr);
    Queries<Op>(problem, one);
    queries_size = one.bytes();
    queries = carve.take<char>((sizes.queries + query_block - 1) / query_block * queries_size);
  }
  Keys<Op> keys_at(int64_t block) const {
    return {k + block * key_step * depth, v + block * key_step * depth, kt + block * key_step * dim};
  }
  // in the order in which blocks are computed
  Scores scores_at(int64_t query, int64_t key) const {
    const int64_t i = key * kAhead + query, at = i * key_step * query_block;
    return {s + at, dp + at, kept ? level + i * query_block : nullptr};
  }
  // what becomes of scores: floats take their place
  Slopes<Op> slopes_of(const Scores& of) const {
    if constexpr (sizeof(Op) == sizeof(float))
      return {of.s, of.dp};
    else
      return {p, ds};
  }
  Queries<Op> at(const AttentionProblem& problem, int64_t block) const {
    Carve carve(queries + block * queries_size);
    return Queries<Op>(problem, carve);
  }
};

// One call's worth of context for the functions below.
template <class T>
struct Context {
  using Op = typename operand<T>::type;
  const AttentionProblem& problem;
  const AttentionSegment& segment;
  const BackwardInput& input;
  const BackwardOutput& output;
  const BackwardItem& item;
  Scratch<Op>& scratch;
  int64_t slots;
  bool all_keys;  // every key of the segment lies in one block

  int64_t most_keys() const { return all_keys ? scratch.key_block : scratch.key_step; }
};

template <class T>
void load_keys(const Context<T>& c, int64_t j0, int64_t n, bool transposed,
               const Keys<typename operand<T>::type>& to) {
  auto& x = c.scratch;
  const T** const k = reinterpret_cast<const T**>(x.k_rows);
  const T** const v = reinterpret_cast<const T**>(x.v_rows);
  key_rows<T>(c.problem, c.segment, c.item.kv_head, c.slots, j0, j0 + n, k, v);
  pack_rows(k, n, c.problem.dim, x.depth, to.k);
  pack_rows(v, n, c.problem.dim, x.depth, to.v);
  if (transposed) pack_rows_transposed(k, n, c.problem.dim, c.most_keys(), to.kt);
}

// Queries and output gradients, packed; `more`: how many queries after them are packed next.
template <class T>
void pack_queries(const Context<T>& c, int64_t head, int64_t rank0, int64_t n, int64_t more, bool as_depth,
                  const Queries<typename operand<T>::type>& to) {
  const AttentionProblem& p = c.problem;
  const T** const q = reinterpret_cast<const T**>(c.scratch.q_rows);
  const T** const g = reinterpret_cast<const T**>(c.scratch.do_rows);
  for (int64_t t = 0; t < n + more; ++t) {
    q[t] = query_row<T>(p, p.q, c.segment.batch, rank0 + t, head);
    g[t] = query_row<T>(p, c.input.grad_out, c.segment.batch, rank0 + t, head);
  }
  pack_columns(q, n, p.dim, to.q_columns, q + n, more);
  pack_columns(g, n, p.dim, to.do_columns, g + n, more);
  if (!as_depth) return;
  pack_depth(q, n, p.dim, to.q_depth);
  pack_depth(g, n, p.dim, to.do_depth);
}

// Where a query's facts stand: [batch, heads, queries].
template <class T>
int64_t fact_at(const Context<T>& c, int64_t head, int64_t rank) {
  const AttentionProblem& p = c.problem;
  const int64_t query = p.column(c.segment.batch, rank) - (p.keys - p.queries);
  return (c.segment.batch * p.heads + head) * p.queries + query;
}

// With shift, factor and delta, which are known.
template <class T>
void load_queries(const Context<T>& c, int64_t head, int64_t rank0, int64_t n, int64_t more, bool as_depth,
                  const Queries<typename operand<T>::type>& to) {
  auto& x = c.scratch;
  const AttentionProblem& p = c.problem;
  const int64_t dim = p.dim, columns = round_up(n, kLanes);
  pack_queries(c, head, rank0, n, more, as_depth, to);
  if (c.all_keys) {
    for (int64_t t = 0; t < columns; ++t) to.delta[t] = 0;
  } else if (!c.input.delta) {
    const T** const o = reinterpret_cast<const T**>(x.o_rows);
    for (int64_t t = 0; t < n + more; ++t) {
      const int64_t query = p.column(c.segment.batch, rank0 + t) - (p.keys - p.queries);
      o[t] = static_cast<const T*>(c.input.out) + ((c.segment.batch * p.queries + query) * p.heads + head) * dim;
    }
    pack_columns(o, n, dim, x.o_columns, o + n, more);
    column_dots(columns, x.depth, to.do_columns, x.o_columns, to.delta, chain_of<T>);
  }
  for (int64_t t = 0; t < n; ++t) {
    const int64_t at = fact_at(c, head, rank0 + t);
    const float shift =
        c.input.factor ? c.input.shift[at] : Weights<T>::top_of(c.input.shift[at]);
    // lse is -inf where every score has overflowed: weights are 0
    to.shift[t] = shift == -__builtin_inff() ? 0.0f : shift;
    to.factor[t] = c.input.factor ? c.input.factor[at] : 1.0f;
    if (c.input.delta && !c.all_keys) to.delta[t] = c.input.delta[at];
    to.delta[t] -= c.input.grad_lse[at];
  }
  // columns of padding: some weight of zero keys, gradient 0
  for (int64_t t = n; t < columns; ++t) to.shift[t] = 0, to.factor[t] = 1, to.delta[t] = 0;
}

// Rows of S and dP become P = weight(row of S, t) and dS; query t sees row i if t >= first + i.
template <class Op, class Weight>
inline void weigh_by(const Scratch<Op>& x, const Scores& from, const Queries<Op>& of, int64_t keys, int64_t columns,
                     int64_t first, const Weight& weight_at) {
  const Slopes<Op> to = x.slopes_of(from);
  const int64_t ld = x.query_block;
  for (int64_t i = 0; i < keys; ++i) {
    const float *const s = from.s + i * ld, *const dp = from.dp + i * ld;
    Op *const p = to.p + i * ld, *const ds = to.ds + i * ld;
    const int64_t hidden = smaller(larger(first + i, 0), columns);
    int64_t t = 0;
    for (; t + kLanes <= hidden; t += kLanes) {
      narrow(p + t, zeros());
      narrow(ds + t, zeros());
    }
    for (; t < columns; t += kLanes) {
      Vec weight = weight_at(s, t);
      Vec slope = mul(weight, sub(load(dp + t), load(of.delta + t)));
      if (t < hidden) {
        weight = keep_first(hidden - t, zeros(), weight);
        slope = keep_first(hidden - t, zeros(), slope);
      }
      narrow(p + t, weight);
      narrow(ds + t, slope);
    }
  }
}

// Rows of S and dP become P and dS; query t sees row i if t >= first + i.
template <class T, class Op>
void weigh(const Scratch<Op>& x, const Scores& from, const Queries<Op>& of, int64_t keys, int64_t columns,
           int64_t first, float scale) {
  const Vec factor = splat(Weights<T>::factor_of(scale));
  weigh_by(x, from, of, keys, columns, first, [&](const float* s, int64_t t) __attribute__((always_inline)) {
    return mul(weight_of<T>(load(s + t), factor, load(of.shift + t)), load(of.factor + t));
  });
}

// The same where these have been weighed by levels of their own.
template <class T, class Op>
void weigh_kept(const Scratch<Op>& x, const Scores& from, const Queries<Op>& of, int64_t keys, int64_t columns,
                int64_t first) {
  const Vec least = splat(-__builtin_inff());
  alignas(64) float by[kQueryBlock];
  for (int64_t t = 0; t < columns; t += kLanes) {
    const Vec level = load(from.level + t), power = Weights<T>::power(sub(level, load(of.shift + t)));
    store(by + t, mul(where_equal(level, least, zeros(), power), load(of.factor + t)));
  }
  weigh_by(x, from, of, keys, columns, first, [&](const float* s, int64_t t) __attribute__((always_inline)) {
    return mul(load(s + t), load(by + t));
  });
}

// Which lanes of row i of a vector of queries from t on are hidden, and what they get.
struct Causality {
  int64_t first, t;
  // so many rows are seen by every lane, by some lane
  int64_t whole() const { return larger(t - first + 1, 0); }
  int64_t some() const { return larger(t - first + kLanes, 0); }
  Vec operator()(int64_t i, Vec v, Vec hidden) const {
    const int64_t n = smaller(larger(first + i - t, 0), kLanes);
    return n == 0 ? v : n == kLanes ? hidden : keep_first(n, hidden, v);
  }
};

// A sum down rows in four chains: the rounding of one would grow with the number of rows.
struct RowSum {
  Vec part[4] = {zeros(), zeros(), zeros(), zeros()};
  void add_row(int64_t i, Vec v) { part[i & 3] = add(part[i & 3], v); }
  Vec total() const { return add(add(part[0], part[2]), add(part[1], part[3])); }
};

// As weigh, where these rows are all the keys there are: the softmax and its sums are formed anew, without the rounding
// of lse and of the outputs, which a gradient that almost cancels would show.
template <class T, class Op>
void weigh_all(const Scratch<Op>& x, const Scores& from, const Queries<Op>& of, int64_t keys, int64_t columns,
               int64_t first, float scale) {
  const Vec factor = splat(Weights<T>::factor_of(scale)), least = splat(-__builtin_inff());
  const Slopes<Op> to = x.slopes_of(from);
  const int64_t ld = x.query_block;
  for (int64_t t = 0; t < columns; t += kLanes) {
    const Causality seen{first, t};
    Vec top = least;
    for (int64_t i = 0; i < keys; ++i) top = max(top, seen(i, mul(load(from.s + i * ld + t), factor), top));
    top = where_equal(top, least, zeros(), top);
    RowSum sum, dot;
    for (int64_t i = 0; i < keys; ++i) {
      float* const s = from.s + i * ld + t;
      const Vec weight = seen(i, weight_of<T>(load(s), factor, top), zeros());
      sum.add_row(i, weight);
      store(s, weight);
    }
    const Vec all = sum.total(), total = where_equal(all, zeros(), splat(1.0f), all);
    for (int64_t i = 0; i < keys; ++i) {
      float* const s = from.s + i * ld + t;
      const Vec weight = div(load(s), total);
      dot.add_row(i, mul(weight, load(from.dp + i * ld + t)));
      store(s, weight);
    }
    const Vec delta = add(dot.total(), load(of.delta + t));
    for (int64_t i = 0; i < keys; ++i) {
      const Vec weight = load(from.s + i * ld + t);
      narrow(to.p + i * ld + t, weight);
      narrow(to.ds + i * ld + t, mul(weight, sub(load(from.dp + i * ld + t), delta)));
    }
  }
}

// sum += x, with what rounding takes from it kept in `lost`, which the next call gives back.
inline void add_exactly(float* sum, float* lost, Vec x) {
  const Vec before = load(sum), y = sub(x, load(lost)), after = add(before, y);
  store(lost, sub(sub(after, before), y));
  store(sum, after);
}

// Before the first block of keys of queries whose facts are formed from their scores.
template <class Op>
void open_facts(const Queries<Op>& of) {
  for (int64_t t = 0; t < kQueryBlock; t += kLanes) {
    store(of.shift + t, splat(-__builtin_inff()));
    for (float* const sum : {of.factor, of.delta, of.lost[0], of.lost[1]}) store(sum + t, zeros());
  }
}

// shift, factor and delta, so far the sums of weights and of weights times dP, take in one more block of keys. Scores that
// are kept become weights.
template <class T, class Op>
void add_facts(const Scores& from, const Queries<Op>& of, int64_t ld, int64_t keys, int64_t columns, int64_t first,
               float scale) {
  const Vec least = splat(-__builtin_inff()), by = splat(Weights<T>::factor_of(scale));
  for (int64_t t = 0; t < columns; t += kLanes) {
    const Causality seen{first, t};
    const int64_t whole = smaller(seen.whole(), keys) / 4 * 4, some = smaller(seen.some(), keys);
    const Vec before = load(of.shift + t);
    Vec tops[4] = {before, before, before, before};
    for (int64_t i = 0; i < whole; i += 4)
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) tops[r] = max(tops[r], mul(load(from.s + (i + r) * ld + t), by));
    Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    for (int64_t i = whole; i < some; ++i) top = max(top, seen(i, mul(load(from.s + i * ld + t), by), top));
    const Vec level = where_equal(top, least, zeros(), top);
    RowSum sum, dot;
    const auto take = [&](int64_t i, int64_t r, Vec weight) __attribute__((always_inline)) {
      if (from.level) store(from.s + i * ld + t, weight);
      sum.part[r] = add(sum.part[r], weight);
      dot.part[r] = add(dot.part[r], mul(weight, load(from.dp + i * ld + t)));
    };
    for (int64_t i = 0; i < whole; i += 4)
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) take(i + r, r, weight_of<T>(load(from.s + (i + r) * ld + t), by, level));
    for (int64_t i = whole; i < some; ++i)
      take(i, 0, seen(i, weight_of<T>(load(from.s + i * ld + t), by, level), zeros()));
    const Vec kept = where_equal(before, least, zeros(), Weights<T>::power(sub(before, top)));
    for (float* const part : {of.factor, of.delta, of.lost[0], of.lost[1]})
      store(part + t, mul(load(part + t), kept));
    add_exactly(of.factor + t, of.lost[0] + t, sum.total());
    add_exactly(of.delta + t, of.lost[1] + t, dot.total());
    store(of.shift + t, top);
    if (from.level) store(from.level + t, top);
  }
}

// After the last one: the facts of n queries are what they are called, and stand in `to` where others want them.
template <class T>
void close_facts(const Context<T>& c, int64_t head, int64_t rank0, int64_t n,
                 const Queries<typename operand<T>::type>& of, const Normalised& to) {
  for (int64_t t = 0; t < n; ++t) {
    const int64_t at = fact_at(c, head, rank0 + t);
    const bool none = of.factor[t] == 0.0f;  // every score has overflowed to -inf
    const float factor = none ? 0.0f : 1.0f / of.factor[t], delta = none ? 0.0f : of.delta[t] / of.factor[t];
    if (none) of.shift[t] = 0;
    if (to.shift) to.shift[at] = of.shift[t], to.factor[at] = factor, to.delta[at] = delta;
    of.factor[t] = factor, of.delta[t] = delta - c.input.grad_lse[at];
  }
  for (int64_t t = n; t < round_up(n, kLanes); ++t) of.shift[t] = 0, of.factor[t] = 1, of.delta[t] = 0;
}

// dS as the right operand of dQ^T: rows of keys are the reduction.
template <class Op>
const Op* interleave(const Scratch<Op>& x, const Op* ds, int64_t keys, int64_t columns) {
  const int64_t ld = x.query_block;
  if (reduction<Op>::pair == 1 && columns == ld && ld == kPanel) return ds;
  const int64_t k_total = round_up(keys, reduction<Op>::step);
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t panel = smaller(kPanel, columns - j);
    Op* const to = x.ds_depth + j * k_total;
    for (int64_t i = 0; i < k_total; i += reduction<Op>::pair) {
      if constexpr (reduction<Op>::pair == 1) {
        for (int64_t t = 0; t < panel; t += kLanes) store(to + i * panel + t, load(ds + i * ld + j + t));
      } else {
#if defined(HICI_PATH_AVX512)
        for (int64_t t = 0; t < panel; t += kLanes) {
          const auto row = [&](int64_t r) {
            const Op* const at = ds + r * ld + j + t;
            return r < keys ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)) : _mm256_setzero_si256();
          };
          const __m512i even = _mm512_cvtepu16_epi32(row(i)), odd = _mm512_cvtepu16_epi32(row(i + 1));
          store_words(to + i * panel + 2 * t, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
#endif
      }
    }
  }
  return x.ds_depth;
}

// S^T and dP^T of a block of keys and a block of queries.
template <class T, class Between>
void form_scores(const Context<T>& c, const Keys<typename operand<T>::type>& from, int64_t keys,
                 const Queries<typename operand<T>::type>& of, int64_t columns, const Scores& to,
                 const Between& between) {
  using Op = typename operand<T>::type;
  const int64_t depth = c.scratch.depth, ld = c.scratch.query_block;
  const auto product = [&](const Op* a, const Op* b, float* s) {
    gemm<false>(Product<Op>{keys, columns, depth, a, depth, b, s, ld, depth, chain_of<T>}, between);
  };
  product(from.k, of.q_columns, to.s);
  product(from.v, of.do_columns, to.dp);
}

// Row 0 of the block of keys j0.. is hidden from this many queries, the first of rank rank0; less than one: from none.
template <class T>
int64_t hidden_from(const Context<T>& c, int64_t j0, int64_t keys, int64_t rank0) {
  return c.problem.causal ? c.segment.key_begin + j0 - c.slots - rank0 : -keys;
}

// What P and dS add to gradients; dk, dv: sums of these keys, or null where not wanted.
template <class T, class Between>
void add_gradients(const Context<T>& c, const Keys<typename operand<T>::type>& from, int64_t keys, int64_t queries,
                   const Slopes<typename operand<T>::type>& slopes, const Queries<typename operand<T>::type>& of,
                   float* dk, float* dv, bool for_queries, const Between& between) {
  using Op = typename operand<T>::type;
  auto& x = c.scratch;
  constexpr int kStep = reduction<Op>::step;
  const int64_t columns = round_up(queries, kLanes), query_depth = round_up(queries, kStep), ld = x.query_block;
  // padding of the reduction over queries
  for (int64_t i = 0; i < keys && columns < query_depth; ++i) {
    narrow(slopes.p + i * ld + columns, zeros());
    narrow(slopes.ds + i * ld + columns, zeros());
  }
  if (dk) {
    const auto product = [&](const Op* a, const Op* b, float* sums) {
      gemm<true>(Product<Op>{keys, x.width, query_depth, a, ld, b, sums, x.width, query_depth, chain_of<T>}, between);
    };
    product(slopes.p, of.do_depth, dv);
    product(slopes.ds, of.q_depth, dk);
  }
  if (for_queries) {
    const int64_t key_depth = round_up(keys, kStep);
    const Op* const ds = interleave(x, slopes.ds, keys, columns);
    gemm<true>(Product<Op>{x.dim, columns, key_depth, from.kt, c.most_keys(), ds, of.dqt, ld, key_depth, chain_of<T>},
               between);
  }
}

}  // namespace hici::cpu::HICI_PATH
