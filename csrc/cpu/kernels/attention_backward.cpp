// attention, backward. Blocks of scores are recomputed transposed, keys by queries, so that weights and their gradients
// come out as rows of keys: the left operands of dV += P^T dO and dK += dS^T Q as they stand. lse and delta then run
// along the lanes of a vector.
//
//   S^T = K Q^T    P = exp(scale S - m) / l    dP^T = V dO^T    dS = P (dP - delta)    delta = dO . O - grad_lse
//   dV += P^T dO   dK += scale dS^T Q        dQ^T += scale K^T dS^T
//
// An item takes its query heads one after the other. For each, its queries are packed once and stay in scratch while
// blocks of keys pass; sums over queries (dK, dV) and over keys (dQ^T) stay there too, added in order of heads and blocks.
// (m, l) is (lse, 1) where the rounding of lse does not show in the element type. In float32, or for very large lse, it
// does, and so does the rounding of O in delta where one key has nearly all the weight: there, maximum, sum and
// delta = sum_j P dP of every query are formed once more (normalise), two products more.
//
// kKeys has few keys and may have any number of queries, so it packs each block of queries when it is used.

#include "../attention.h"
#include "attention_rows.h"

namespace hici::cpu::HICI_PATH {
namespace {

// Keys and queries per block: what a block touches should fit the second-level cache.
template <class Op>
constexpr int64_t keys_of(int64_t dim) {
  return dim <= 128 ? (sizeof(Op) == 2 ? 128 : 64) : 64;
}
constexpr int64_t kQueryBlock = 64;

// Sums over queries are formed of parts over this many blocks: the rounding of a chain grows with its length. Products of
// bfloat16 operands are rounded worse.
constexpr int64_t kTogether = 16;
template <class Op>
constexpr bool grouped = reduction<Op>::pair == 1;

// A block of queries.
template <class Op>
struct Queries {
  // queries and output gradients as columns, and as reduction
  Op *q_columns, *do_columns, *q_depth, *do_depth;
  float *shift, *factor;  // m and 1 / l
  float* delta;           // where all keys are in one block: minus grad_lse
  float *lost[2];         // normalise: what the sums behind factor and delta have rounded away
  float* dqt;

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
  }
};

template <class Op>
struct Scratch {
  int64_t key_block, query_block;  // the most of a block, multiples of 32
  int64_t depth, width;            // padded dim as reduction, as columns
  // keys: rows, values: rows, keys transposed; outputs as columns
  Op *k, *v, *kt, *o_columns;
  // weights and their gradients: rows of keys; gradients again as reduction over keys
  Op *p, *ds, *ds_depth;
  float *s, *dp;
  const void **k_rows, **v_rows, **q_rows, **do_rows, **o_rows;
  float *dk, *dv;            // of all keys of the item
  float *dk_part, *dv_part;  // of one block of keys, over kTogether blocks of queries
  char* queries;   // blocks of Queries
  int64_t queries_size;

  Scratch(const AttentionProblem& problem, const BackwardSizes& sizes, Carve& carve) {
    const int64_t dim = problem.dim;
    key_block = larger(keys_of<Op>(dim), round_up(sizes.exact, 32)), query_block = kQueryBlock;
    depth = round_up(dim, reduction<Op>::step), width = round_up(dim, kLanes);
    k = carve.take<Op>(key_block * depth);
    v = carve.take<Op>(key_block * depth);
    kt = carve.take<Op>(dim * key_block);
    o_columns = carve.take<Op>(query_block * depth);
    p = carve.take<Op>(key_block * query_block);
    ds = carve.take<Op>(key_block * query_block);
    ds_depth = carve.take<Op>(key_block * query_block);
    s = carve.take<float>(key_block * query_block);
    dp = carve.take<float>(key_block * query_block);
    k_rows = carve.take<const void*>(key_block);
    v_rows = carve.take<const void*>(key_block);
    q_rows = carve.take<const void*>(query_block);
    do_rows = carve.take<const void*>(query_block);
    o_rows = carve.take<const void*>(query_block);
    dk = carve.take<float>(sizes.keys * width);
    dv = carve.take<float>(sizes.keys * width);
    dk_part = carve.take<float>(grouped<Op> ? key_block * width : 0);
    dv_part = carve.take<float>(grouped<Op> ? key_block * width : 0);
    Carve one(nullptr);
    Queries<Op>(problem, one);
    queries_size = one.bytes();
    queries = carve.take<char>((sizes.queries + query_block - 1) / query_block * queries_size);
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
};

template <class T>
void load_keys(const Context<T>& c, int64_t j0, int64_t n, bool transposed) {
  auto& x = c.scratch;
  const T** const k = reinterpret_cast<const T**>(x.k_rows);
  const T** const v = reinterpret_cast<const T**>(x.v_rows);
  key_rows<T>(c.problem, c.segment, c.item.kv_head, c.slots, j0, j0 + n, k, v);
  pack_rows(k, n, c.problem.dim, x.depth, x.k);
  pack_rows(v, n, c.problem.dim, x.depth, x.v);
  if (transposed) pack_rows_transposed(k, n, c.problem.dim, x.key_block, x.kt);
}

template <class T>
void load_queries(const Context<T>& c, int64_t head, int64_t rank0, int64_t n, bool as_depth,
                  const Queries<typename operand<T>::type>& to) {
  auto& x = c.scratch;
  const AttentionProblem& p = c.problem;
  const int64_t b = c.segment.batch;
  const T** const q = reinterpret_cast<const T**>(x.q_rows);
  const T** const g = reinterpret_cast<const T**>(x.do_rows);
  const T** const o = reinterpret_cast<const T**>(x.o_rows);
  const int64_t dim = p.dim, columns = round_up(n, kLanes);
  for (int64_t t = 0; t < n; ++t) {
    const int64_t query = p.column(b, rank0 + t) - (p.keys - p.queries);
    q[t] = query_row<T>(p, p.q, b, rank0 + t, head);
    g[t] = query_row<T>(p, c.input.grad_out, b, rank0 + t, head);
    o[t] = static_cast<const T*>(c.input.out) + ((b * p.queries + query) * p.heads + head) * dim;
  }
  pack_columns(q, n, dim, to.q_columns);
  pack_columns(g, n, dim, to.do_columns);
  if (as_depth) {
    pack_depth(q, n, dim, to.q_depth);
    pack_depth(g, n, dim, to.do_depth);
  }
  if (c.all_keys) {
    for (int64_t t = 0; t < columns; ++t) to.delta[t] = 0;
  } else if (!c.input.delta) {
    pack_columns(o, n, dim, x.o_columns);
    column_dots(columns, x.depth, to.do_columns, x.o_columns, to.delta);
  }
  for (int64_t t = 0; t < n; ++t) {
    const int64_t query = p.column(b, rank0 + t) - (p.keys - p.queries);
    const int64_t at = (b * p.heads + head) * p.queries + query;
    to.shift[t] = c.input.shift[at];
    to.factor[t] = c.input.factor ? c.input.factor[at] : 1.0f;
    if (c.input.delta && !c.all_keys) to.delta[t] = c.input.delta[at];
    to.delta[t] -= c.input.grad_lse[at];
  }
  // columns of padding: some weight of zero keys, gradient 0
  for (int64_t t = n; t < columns; ++t) to.shift[t] = 0, to.factor[t] = 1, to.delta[t] = 0;
}

// Rows of S and dP become P and dS; query t sees row i if t >= first + i.
template <class Op>
void weigh(const Scratch<Op>& x, const Queries<Op>& of, int64_t keys, int64_t columns, int64_t first, float scale) {
  const Vec factor = splat(scale);
  const int64_t ld = x.query_block;
  for (int64_t i = 0; i < keys; ++i) {
    const float *const s = x.s + i * ld, *const dp = x.dp + i * ld;
    Op *const p = x.p + i * ld, *const ds = x.ds + i * ld;
    const int64_t hidden = smaller(larger(first + i, 0), columns);
    int64_t t = 0;
    for (; t + kLanes <= hidden; t += kLanes) {
      narrow(p + t, zeros());
      narrow(ds + t, zeros());
    }
    for (; t < columns; t += kLanes) {
      Vec weight = mul(exp(sub(mul(load(s + t), factor), load(of.shift + t))), load(of.factor + t));
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

// Which lanes of row i of a vector of queries from t on are hidden, and what they get.
struct Causality {
  int64_t first, t;
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
template <class Op>
void weigh_all(const Scratch<Op>& x, const Queries<Op>& of, int64_t keys, int64_t columns, int64_t first, float scale) {
  const Vec factor = splat(scale), least = splat(-__builtin_inff());
  const int64_t ld = x.query_block;
  for (int64_t t = 0; t < columns; t += kLanes) {
    const Causality seen{first, t};
    Vec top = least;
    for (int64_t i = 0; i < keys; ++i) top = max(top, seen(i, mul(load(x.s + i * ld + t), factor), top));
    top = where_equal(top, least, zeros(), top);
    RowSum sum, dot;
    for (int64_t i = 0; i < keys; ++i) {
      float* const s = x.s + i * ld + t;
      const Vec weight = seen(i, exp(sub(mul(load(s), factor), top)), zeros());
      sum.add_row(i, weight);
      store(s, weight);
    }
    const Vec all = sum.total(), total = where_equal(all, zeros(), splat(1.0f), all);
    for (int64_t i = 0; i < keys; ++i) {
      float* const s = x.s + i * ld + t;
      const Vec weight = div(load(s), total);
      dot.add_row(i, mul(weight, load(x.dp + i * ld + t)));
      store(s, weight);
    }
    const Vec delta = add(dot.total(), load(of.delta + t));
    for (int64_t i = 0; i < keys; ++i) {
      const Vec weight = load(x.s + i * ld + t);
      narrow(x.p + i * ld + t, weight);
      narrow(x.ds + i * ld + t, mul(weight, sub(load(x.dp + i * ld + t), delta)));
    }
  }
}

// dS once more, as the right operand of dQ^T: rows of keys are the reduction.
template <class Op>
void interleave(const Scratch<Op>& x, int64_t keys, int64_t columns) {
  const int64_t ld = x.query_block;
  const int64_t k_total = round_up(keys, reduction<Op>::step);
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t panel = smaller(kPanel, columns - j);
    Op* const to = x.ds_depth + j * k_total;
    for (int64_t i = 0; i < k_total; i += reduction<Op>::pair) {
      if constexpr (reduction<Op>::pair == 1) {
        for (int64_t t = 0; t < panel; t += kLanes) store(to + i * panel + t, load(x.ds + i * ld + j + t));
      } else {
#if defined(HICI_PATH_AVX512)
        for (int64_t t = 0; t < panel; t += kLanes) {
          const auto row = [&](int64_t r) {
            const Op* const at = x.ds + r * ld + j + t;
            return r < keys ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)) : _mm256_setzero_si256();
          };
          const __m512i even = _mm512_cvtepu16_epi32(row(i)), odd = _mm512_cvtepu16_epi32(row(i + 1));
          store_words(to + i * panel + 2 * t, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
#endif
      }
    }
  }
}

// Keys j0.. in scratch against a block of queries; dk, dv: their sums, or null where not wanted.
template <class T>
void block(const Context<T>& c, int64_t j0, int64_t keys, int64_t rank0, int64_t queries,
           const Queries<typename operand<T>::type>& of, float* dk, float* dv, bool for_queries) {
  auto& x = c.scratch;
  constexpr int kStep = reduction<typename operand<T>::type>::step;
  const int64_t columns = round_up(queries, kLanes), query_depth = round_up(queries, kStep);
  const int64_t key_depth = round_up(keys, kStep), dim = c.problem.dim, ld = x.query_block;
  gemm<false>(keys, columns, x.depth, x.k, x.depth, of.q_columns, x.s, ld);
  gemm<false>(keys, columns, x.depth, x.v, x.depth, of.do_columns, x.dp, ld);
  const int64_t rank_of_first = c.segment.key_begin + j0 - c.slots;  // of row 0, were it a token
  const int64_t first = c.problem.causal ? rank_of_first - rank0 : -keys;
  if (c.all_keys)
    weigh_all(x, of, keys, columns, first, c.problem.scale);
  else
    weigh(x, of, keys, columns, first, c.problem.scale);
  // padding of the reduction over queries
  for (int64_t i = 0; i < keys && columns < query_depth; ++i) {
    narrow(x.p + i * ld + columns, zeros());
    narrow(x.ds + i * ld + columns, zeros());
  }
  if (dk) {
    gemm<true>(keys, x.width, query_depth, x.p, ld, of.do_depth, dv, x.width);
    gemm<true>(keys, x.width, query_depth, x.ds, ld, of.q_depth, dk, x.width);
  }
  if (for_queries) {
    interleave(x, keys, columns);
    gemm<true>(dim, columns, key_depth, x.kt, x.key_block, x.ds_depth, of.dqt, ld);
  }
}

template <class T>
void write_row(T* to, const float* from, int64_t dim, float factor) {
  const Vec f = splat(factor);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) narrow(to + d, mul(load(from + d), f));
  if (d < dim) narrow_part(to + d, mul(load_part(from + d, dim - d), f), dim - d);
}

// dK and dV of all keys of the item leave the scratch.
template <class T>
void write_keys(const Context<T>& c) {
  const AttentionProblem& p = c.problem;
  const BackwardOutput& o = c.output;
  const auto& x = c.scratch;
  const int64_t dim = p.dim, b = c.segment.batch, h = c.item.kv_head;
  const int64_t place = (c.item.segment * p.kv_heads + h) * 2;
  const auto slot = [&](const Slots& s, void* gradient, int64_t index) {
    const int64_t row = s.per_segment ? b * p.segment_total + c.segment.segment : b;
    return static_cast<T*>(gradient) + ((row * s.count + index) * p.kv_heads + h) * dim;
  };
  for (int64_t j = c.item.key_begin; j < c.item.key_end; ++j) {
    const int64_t i = j - c.item.key_begin;
    const float *const dk = x.dk + i * x.width, *const dv = x.dv + i * x.width;
    // what is summed later stays in float
    const auto keep = [&](float* base, int64_t rows, int64_t row) {
      write_row(base + (place * rows + row) * dim, dk, dim, p.scale);
      write_row(base + ((place + 1) * rows + row) * dim, dv, dim, 1.0f);
    };
    T *to_k, *to_v;
    if (j < c.slots) {
      const bool is_global = j < p.global.count;
      if (is_global && o.shared_slots) {
        keep(o.shared_slots, p.global.count, j);
        continue;
      }
      const int64_t index = is_global ? j : j - p.global.count;
      to_k = slot(is_global ? p.global : p.local, is_global ? o.gradients.global_k : o.gradients.local_k, index);
      to_v = slot(is_global ? p.global : p.local, is_global ? o.gradients.global_v : o.gradients.local_v, index);
    } else {
      const int64_t rank = c.segment.key_begin + j - c.slots;
      if (rank < c.segment.own_begin) {
        keep(o.carried, o.recurrence, rank - c.segment.key_begin);
        continue;
      }
      if (o.tail_begin && rank >= o.tail_begin[c.item.segment]) {
        keep(o.tail, o.recurrence, rank - o.tail_begin[c.item.segment]);
        continue;
      }
      const int64_t at = ((b * p.keys + p.column(b, rank)) * p.kv_heads + h) * dim;
      to_k = static_cast<T*>(o.gradients.k) + at, to_v = static_cast<T*>(o.gradients.v) + at;
    }
    write_row(to_k, dk, dim, p.scale);
    write_row(to_v, dv, dim, 1.0f);
  }
}

// dQ^T of one block of queries becomes rows of dQ.
template <class T>
void write_queries(const Context<T>& c, int64_t head, int64_t rank0, int64_t queries, const float* dqt) {
  const AttentionProblem& p = c.problem;
  const int64_t dim = p.dim, b = c.segment.batch;
  const float* rows[kLanes];
  for (int64_t t0 = 0; t0 < queries; t0 += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t there = smaller(kLanes, dim - d);
      for (int64_t i = 0; i < there; ++i) rows[i] = dqt + (d + i) * c.scratch.query_block + t0;
      // a tile of dQ^T is read as rows of d and comes out as rows of queries
      transposed_tile<float>(rows, there, 0, kLanes, [&](int64_t t, Words w) {
        if (t0 + t >= queries) return;
        const int64_t query = p.column(b, rank0 + t0 + t) - (p.keys - p.queries);
        T* const to = static_cast<T*>(c.output.gradients.q) + ((b * p.queries + query) * p.heads + head) * dim + d;
        alignas(64) float row[kLanes];
        store_words(row, w);
        write_row(to, row, there, p.scale);
      });
    }
  }
}

inline void add_rows(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, add(load(to + i), load(from + i)));
}

template <class T>
void backward(const AttentionProblem& problem, const BackwardItem& item, const BackwardInput& input,
              const BackwardOutput& output, const BackwardSizes& sizes, void* memory) {
  using Op = typename operand<T>::type;
  Carve carve(memory);
  Scratch<Op> scratch(problem, sizes, carve);
  const AttentionSegment& segment = problem.segments[item.segment];
  const int64_t slots = segment.slots ? problem.global.count + problem.local.count : 0;
  const int64_t all = slots + segment.key_end - segment.key_begin;
  const Context<T> c{problem, segment, input, output, item, scratch, slots, all <= kExactKeys};
  const int64_t key_step = c.all_keys ? all : keys_of<Op>(problem.dim);
  const int64_t step = scratch.query_block, dim = problem.dim, width = scratch.width;
  const bool for_queries = item.part != BackwardPart::kKeys, for_keys = item.part != BackwardPart::kQueries;
  const int64_t blocks = (item.rank_end - item.rank_begin + step - 1) / step;
  const bool in_parts = grouped<Op> && blocks * problem.group() > kTogether;
  const auto rank_of = [&](int64_t i) { return item.rank_begin + i * step; };
  const auto count_of = [&](int64_t i) { return smaller(step, item.rank_end - rank_of(i)); };
  if (for_keys) {
    __builtin_memset(scratch.dk, 0, (item.key_end - item.key_begin) * width * sizeof(float));
    __builtin_memset(scratch.dv, 0, (item.key_end - item.key_begin) * width * sizeof(float));
  }

  tiles_begin();
  for (int64_t h = 0; h < problem.group(); ++h) {
    const int64_t head = item.kv_head * problem.group() + h;
    for (int64_t i = 0; i < blocks && for_queries; ++i) {
      const Queries<Op> of = scratch.at(problem, i);
      load_queries(c, head, rank_of(i), count_of(i), for_keys, of);
      __builtin_memset(of.dqt, 0, dim * step * sizeof(float));
    }
    for (int64_t j0 = item.key_begin; j0 < item.key_end; j0 += key_step) {
      const int64_t keys = smaller(key_step, item.key_end - j0);
      load_keys(c, j0, keys, for_queries);
      float* const dk = for_keys ? scratch.dk + (j0 - item.key_begin) * width : nullptr;
      float* const dv = for_keys ? scratch.dv + (j0 - item.key_begin) * width : nullptr;
      // under causality, queries before the first key of the block see none of it
      const int64_t first = segment.key_begin + j0 - slots - item.rank_begin;
      const int64_t start = problem.causal ? larger(0, first) / step : 0;
      for (int64_t i = start; i < blocks; ++i) {
        const Queries<Op> of = scratch.at(problem, for_queries ? i : 0);
        if (!for_queries) load_queries(c, head, rank_of(i), count_of(i), true, of);
        if (!for_keys || !in_parts) {
          block(c, j0, keys, rank_of(i), count_of(i), of, dk, dv, for_queries);
          continue;
        }
        const bool opens = (i - start) % kTogether == 0, closes = (i - start + 1) % kTogether == 0 || i + 1 == blocks;
        if (opens)
          for (float* const part : {scratch.dk_part, scratch.dv_part})
            __builtin_memset(part, 0, keys * width * sizeof(float));
        block(c, j0, keys, rank_of(i), count_of(i), of, scratch.dk_part, scratch.dv_part, for_queries);
        if (closes) {
          add_rows(dk, scratch.dk_part, keys * width);
          add_rows(dv, scratch.dv_part, keys * width);
        }
      }
    }
    for (int64_t i = 0; i < blocks && for_queries; ++i)
      write_queries(c, head, rank_of(i), count_of(i), scratch.at(problem, i).dqt);
  }
  tiles_end();
  if (for_keys) write_keys(c);
}

// sum += x, with what rounding takes from it kept in `lost`, which the next call gives back.
inline void add_exactly(float* sum, float* lost, Vec x) {
  const Vec before = load(sum), y = sub(x, load(lost)), after = add(before, y);
  store(lost, sub(sub(after, before), y));
  store(sum, after);
}

// shift, factor and delta of queries [rank_begin, rank_end) from their own scores.
template <class T>
void normalise(const AttentionProblem& problem, const BackwardItem& item, const BackwardInput& input,
               const Normalised& to, const BackwardSizes& sizes, void* memory) {
  using Op = typename operand<T>::type;
  Carve carve(memory);
  Scratch<Op> x(problem, sizes, carve);
  const AttentionSegment& segment = problem.segments[item.segment];
  const int64_t slots = segment.slots ? problem.global.count + problem.local.count : 0;
  const int64_t b = segment.batch, step = x.query_block, ld = x.query_block, key_step = keys_of<Op>(problem.dim);
  const BackwardOutput none{};
  const Context<T> c{problem, segment, input, none, item, x, slots, false};
  const int64_t blocks = (item.rank_end - item.rank_begin + step - 1) / step;
  const Vec least = splat(-__builtin_inff()), scale = splat(problem.scale);
  const T** const q = reinterpret_cast<const T**>(x.q_rows);
  const T** const g = reinterpret_cast<const T**>(x.do_rows);
  const auto rank_of = [&](int64_t i) { return item.rank_begin + i * step; };
  const auto count_of = [&](int64_t i) { return smaller(step, item.rank_end - rank_of(i)); };
  tiles_begin();
  for (int64_t h = 0; h < problem.group(); ++h) {
    const int64_t head = item.kv_head * problem.group() + h;
    for (int64_t i = 0; i < blocks; ++i) {
      const Queries<Op> of = x.at(problem, i);
      for (int64_t t = 0; t < count_of(i); ++t) {
        q[t] = query_row<T>(problem, problem.q, b, rank_of(i) + t, head);
        g[t] = query_row<T>(problem, input.grad_out, b, rank_of(i) + t, head);
      }
      pack_columns(q, count_of(i), problem.dim, of.q_columns);
      pack_columns(g, count_of(i), problem.dim, of.do_columns);
      for (int64_t t = 0; t < step; t += kLanes) {
        store(of.shift + t, least);
        for (float* const sum : {of.factor, of.delta, of.lost[0], of.lost[1]}) store(sum + t, zeros());
      }
    }
    for (int64_t j0 = 0; j0 < item.key_end; j0 += key_step) {
      const int64_t keys = smaller(key_step, item.key_end - j0), rank_of_first = segment.key_begin + j0 - slots;
      load_keys(c, j0, keys, false);
      const int64_t start = problem.causal ? larger(0, rank_of_first - item.rank_begin) / step : 0;
      for (int64_t i = start; i < blocks; ++i) {
        const Queries<Op> of = x.at(problem, i);
        const int64_t columns = round_up(count_of(i), kLanes);
        gemm<false>(keys, columns, x.depth, x.k, x.depth, of.q_columns, x.s, ld);
        gemm<false>(keys, columns, x.depth, x.v, x.depth, of.do_columns, x.dp, ld);
        for (int64_t t = 0; t < columns; t += kLanes) {
          const Causality seen{problem.causal ? rank_of_first - rank_of(i) : -keys, t};
          const Vec before = load(of.shift + t);
          Vec top = before;
          for (int64_t r = 0; r < keys; ++r) top = max(top, seen(r, mul(load(x.s + r * ld + t), scale), top));
          RowSum sum, dot;
          for (int64_t r = 0; r < keys; ++r) {
            const Vec weight = seen(r, exp(sub(mul(load(x.s + r * ld + t), scale), top)), zeros());
            sum.add_row(r, weight);
            dot.add_row(r, mul(weight, load(x.dp + r * ld + t)));
          }
          const Vec kept = where_equal(before, least, zeros(), exp(sub(before, top)));
          for (float* const part : {of.factor, of.delta, of.lost[0], of.lost[1]})
            store(part + t, mul(load(part + t), kept));
          add_exactly(of.factor + t, of.lost[0] + t, sum.total());
          add_exactly(of.delta + t, of.lost[1] + t, dot.total());
          store(of.shift + t, top);
        }
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const Queries<Op> of = x.at(problem, i);
      for (int64_t t = 0; t < count_of(i); ++t) {
        const int64_t query = problem.column(b, rank_of(i) + t) - (problem.keys - problem.queries);
        const int64_t at = (b * problem.heads + head) * problem.queries + query;
        to.shift[at] = of.shift[t], to.factor[at] = 1.0f / of.factor[t], to.delta[at] = of.delta[t] / of.factor[t];
      }
    }
  }
  tiles_end();
}

template <class T>
void collect(const AttentionProblem& p, int64_t batch, int64_t kv_head, const BackwardOutput& o) {
  const int64_t dim = p.dim;
  alignas(64) float sum[kLanes];
  for (int which = 0; which < 2; ++which) {
    if (o.shared_slots) {
      T* const to = static_cast<T*>(which ? o.gradients.global_v : o.gradients.global_k);
      for (int64_t row = 0; row < p.global.count; ++row)
        for (int64_t d = 0; d < dim; d += kLanes) {
          const int64_t there = smaller(kLanes, dim - d);
          Vec total = zeros();
          for (int64_t i = 0; i < p.segment_count; ++i) {
            if (p.segments[i].batch != batch || !p.segments[i].slots) continue;
            const int64_t place = (i * p.kv_heads + kv_head) * 2 + which;
            const float* const from = o.shared_slots + (place * p.global.count + row) * dim + d;
            total = add(total, there == kLanes ? load(from) : load_part(from, there));
          }
          store(sum, total);
          write_row(to + ((batch * p.global.count + row) * p.kv_heads + kv_head) * dim + d, sum, there, 1.0f);
        }
    }
    if (!o.tail_begin) continue;
    T* const to = static_cast<T*>(which ? o.gradients.v : o.gradients.k);
    for (int64_t i = 0; i < p.segment_count; ++i) {
      const AttentionSegment& s = p.segments[i];
      if (s.batch != batch) continue;
      // the segment before it may hold no queries; then its tokens get gradients from this one alone
      const bool before = i > 0 && p.segments[i - 1].batch == batch && p.segments[i - 1].key_end == s.own_begin &&
                          o.tail_begin[i - 1] == s.key_begin;
      for (int64_t rank = s.key_begin; rank < s.own_begin; ++rank) {
        const int64_t row = rank - s.key_begin;
        for (int64_t d = 0; d < dim; d += kLanes) {
          const int64_t there = smaller(kLanes, dim - d);
          const auto part = [&](const float* base, int64_t at) {
            const int64_t place = (at * p.kv_heads + kv_head) * 2 + which;
            return load_part(base + (place * o.recurrence + row) * dim + d, there);
          };
          Vec total = part(o.carried, i);
          if (before) total = add(part(o.tail, i - 1), total);
          store(sum, total);
          const int64_t at = ((batch * p.keys + p.column(batch, rank)) * p.kv_heads + kv_head) * dim + d;
          write_row(to + at, sum, there, 1.0f);
        }
      }
    }
  }
}

template <class T>
int64_t scratch_bytes(const AttentionProblem& problem, const BackwardSizes& sizes) {
  Carve carve(nullptr);
  Scratch<typename operand<T>::type>(problem, sizes, carve);
  return carve.bytes();
}

int64_t backward_block(const AttentionProblem& problem) {
  return with_element(problem.element, [&](auto zero) {
    using Op = typename operand<decltype(zero)>::type;
    return larger(keys_of<Op>(problem.dim), kQueryBlock);
  });
}

int64_t backward_scratch(const AttentionProblem& problem, const BackwardSizes& sizes) {
  return with_element(problem.element, [&](auto zero) { return scratch_bytes<decltype(zero)>(problem, sizes); });
}

void backward_item(const AttentionProblem& problem, const BackwardItem& item, const BackwardInput& input,
                   const BackwardOutput& output, const BackwardSizes& sizes, void* scratch) {
  with_element(problem.element,
               [&](auto zero) { backward<decltype(zero)>(problem, item, input, output, sizes, scratch); });
}

void normalise_item(const AttentionProblem& problem, const BackwardItem& item, const BackwardInput& input,
                    const Normalised& to, const BackwardSizes& sizes, void* scratch) {
  with_element(problem.element, [&](auto zero) { normalise<decltype(zero)>(problem, item, input, to, sizes, scratch); });
}

void collect_rows(const AttentionProblem& problem, int64_t batch, int64_t kv_head, const BackwardOutput& output) {
  with_element(problem.element, [&](auto zero) { collect<decltype(zero)>(problem, batch, kv_head, output); });
}

}  // namespace

BackwardPath backward_path() { return {backward_block, backward_scratch, normalise_item, backward_item, collect_rows}; }

}  // namespace hici::cpu::HICI_PATH
