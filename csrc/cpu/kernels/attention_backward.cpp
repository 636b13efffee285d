// attention, backward. Blocks of scores are recomputed transposed, keys by queries, so that weights and their gradients
// come out as rows of keys: the left operands of dV += P^T dO and dK += dS^T Q as they stand. lse and delta then run
// along the lanes of a vector.
//
//   S^T = K Q^T    P = e^(scale S - m) / l    dP^T = V dO^T    dS = P (dP - delta)    delta = dO . O - grad_lse
//   dV += P^T dO   dK += scale dS^T Q        dQ^T += scale K^T dS^T
//
// An item takes its query heads one after the other, and of a head kAhead blocks of queries at a time, as many as stay in
// the second-level cache while blocks of keys pass. Sums over queries (dK, dV) and over keys (dQ^T) stay in scratch, added
// in order of heads and blocks, and so do packed keys, if there is room. (m, l) is (lse, 1) where the rounding of lse does
// not show in the element type. In float32, or for very large lse, it does, and so does the rounding of O in delta where
// one key has nearly all the weight: there, maximum, sum and delta = sum_j P dP of every query are formed anew from its
// scores: the queries meet all their keys twice, and the gradients are made of the weights that the first time has left.
// Where there is no room for them scores are formed twice, two products more.
//
// What the next block of keys and the next scores need is in the third-level cache: it is asked for a few lines at a time
// between the products of the present ones.

#include "attention_blocks.h"

namespace hici::cpu::HICI_PATH {
namespace {

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

// dQ^T of one block of queries becomes rows of dQ, written whole: they lie in pages of their own.
template <class T>
void write_queries(const Context<T>& c, int64_t head, int64_t rank0, int64_t queries, const float* dqt) {
  const AttentionProblem& p = c.problem;
  const int64_t dim = p.dim, b = c.segment.batch, width = c.scratch.width;
  float* const turned = c.scratch.turned;
  const float* rows[kLanes];
  for (int64_t t0 = 0; t0 < queries; t0 += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t there = smaller(kLanes, dim - d);
      for (int64_t i = 0; i < there; ++i) rows[i] = dqt + (d + i) * c.scratch.query_block + t0;
      // a tile of dQ^T is read as rows of d and comes out as rows of queries
      transposed_tile<float>(rows, there, 0, kLanes,
                             [&](int64_t t, Words w) { store_words(turned + t * width + d, w); });
    }
    for (int64_t t = 0; t < smaller(kLanes, queries - t0); ++t) {
      const int64_t query = p.column(b, rank0 + t0 + t) - (p.keys - p.queries);
      T* const to = static_cast<T*>(c.output.gradients.q) + ((b * p.queries + query) * p.heads + head) * dim;
      write_row(to, turned + t * width, dim, p.scale);
    }
  }
}

template <class T>
void clear_rows(float* rows, int64_t n, const Context<T>& c) {
  __builtin_memset(rows, 0, n * c.scratch.width * sizeof(float));
}

// Blocks of queries of an item.
struct Blocks {
  int64_t begin, end, step;
  int64_t count() const { return (end - begin + step - 1) / step; }
  int64_t rank(int64_t i) const { return begin + i * step; }
  int64_t size(int64_t i) const { return smaller(step, end - rank(i)); }
  // the first block with a query that is not before this rank
  int64_t first_seeing(int64_t rank) const { return larger(0, rank - begin) / step; }
};

// The gradients of an item: kAhead blocks of queries at a time meet all their keys, block by block, once where facts are
// known or formed of all keys at once, else twice, first for facts.
template <class T>
void form_gradients(const Context<T>& c, bool anew, const Normalised& facts) {
  using Op = typename operand<T>::type;
  const AttentionProblem& problem = c.problem;
  const BackwardItem& item = c.item;
  const Scratch<Op>& x = c.scratch;
  const int64_t width = x.width, step = c.all_keys ? item.key_end - item.key_begin : x.key_step;
  const bool for_queries = item.part != BackwardPart::kKeys, for_keys = item.part != BackwardPart::kQueries;
  const bool packed = item.key_end - item.key_begin <= x.packed, kept = anew && x.kept;
  const Blocks blocks{item.rank_begin, item.rank_end, x.query_block};
  const bool in_parts = for_keys && summed_in_parts(problem) && blocks.count() * problem.group() > kTogether;
  const auto first_seeing = [&](int64_t key) {
    return problem.causal ? blocks.first_seeing(c.segment.key_begin + key - c.slots) : 0;
  };
  const int64_t first = first_seeing(item.key_begin) / kAhead * kAhead, dq_size = x.dim * x.query_block;
  int64_t loaded = 0;  // blocks of keys that are packed
  for (int64_t h = 0; h < problem.group(); ++h) {
    const int64_t head = item.kv_head * problem.group() + h;
    for (int64_t i0 = first; i0 < blocks.count(); i0 += kAhead) {
      const int64_t i1 = smaller(i0 + kAhead, blocks.count());
      const int64_t last = blocks.rank(i1 - 1) + blocks.size(i1 - 1) - 1;
      int64_t end = item.key_end;
      if (problem.causal) end = smaller(end, seen_keys(c.segment, c.slots, last));
      const int64_t seen = end - item.key_begin;
      const bool dq_in_parts = for_queries && summed_in_parts(problem) && seen > kTogether * step;
      const auto of = [&](int64_t i) { return x.at(problem, i - i0); };
      const auto scores_of = [&](int64_t i, int64_t j) { return kept ? x.scores_at(i - i0, j) : x.scores_at(0, 0); };
      // run(i, block of keys, its first key, keys, first query's rank, queries, what to do between products) for pairs of
      // blocks, each of so many elements of products; soon(j, wanted): what the j-th block of keys will need
      const auto each_block = [&](int64_t elements, auto&& soon, auto&& run) {
        const auto first_of = [&](int64_t j) { return larger(i0, first_seeing(item.key_begin + j * step)); };
        const int64_t parts = larger(elements / kBetween<Op>, 1);
        for (int64_t j = 0; j * step < seen; ++j) {
          const int64_t j0 = item.key_begin + j * step, keys = smaller(step, item.key_end - j0);
          if (!packed || j == loaded) {
            load_keys(c, j0, keys, for_queries, x.keys_at(packed ? j : 0));
            loaded = j + 1;
          }
          const bool more = (j + 1) * step < seen;
          Wanted next_keys;
          if (more) soon(j + 1, next_keys);
          next_keys.divide((i1 - first_of(j)) * parts);
          for (int64_t i = first_of(j); i < i1; ++i) {
            Wanted next_scores;
            if (kept && (more || i + 1 < i1)) {
              const Scores next = i + 1 < i1 ? scores_of(i + 1, j) : scores_of(first_of(j + 1), j + 1);
              for (const float* const block : {next.s, next.dp})
                next_scores.add(block, step * x.query_block * sizeof(float));
            }
            next_scores.divide(parts);
            run(i, j, j0, keys, blocks.rank(i), blocks.size(i), [&] {
              next_keys.ask();
              next_scores.ask();
            });
          }
        }
      };
      const int64_t score_elements = 2 * step * x.query_block;
      const auto soon_packed = [&](int64_t j, Wanted& wanted, bool rows, bool transposed) {
        if (!packed || j >= loaded) return;
        const Keys<Op> keys = x.keys_at(j);
        if (rows)
          for (const Op* const block : {keys.k, keys.v}) wanted.add(block, step * x.depth * sizeof(Op));
        if (transposed) wanted.add(keys.kt, step * x.dim * sizeof(Op));
      };
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t more = i + 1 < i1 ? blocks.size(i + 1) : 0;
        if (anew) {
          pack_queries(c, head, blocks.rank(i), blocks.size(i), more, for_keys, of(i));
          open_facts(of(i));
        } else {
          load_queries(c, head, blocks.rank(i), blocks.size(i), more, for_keys, of(i));
        }
        if (for_queries) __builtin_memset(of(i).dqt, 0, dq_size * sizeof(float));
        if (dq_in_parts) __builtin_memset(of(i).dqt_parts, 0, dq_size * sizeof(float));
      }
      if (anew) {
        const auto soon = [&](int64_t j, Wanted& wanted) { soon_packed(j, wanted, true, false); };
        each_block(score_elements, soon, [&](int64_t i, int64_t j, int64_t j0, int64_t keys, int64_t rank, int64_t count,
                                             const auto& between) {
          const int64_t columns = round_up(count, kLanes);
          const Scores scores = scores_of(i, j);
          form_scores(c, x.keys_at(packed ? j : 0), keys, of(i), columns, scores, between);
          add_facts<T>(scores, of(i), x.query_block, keys, columns, hidden_from(c, j0, keys, rank), problem.scale);
        });
        for (int64_t i = i0; i < i1; ++i) close_facts(c, head, blocks.rank(i), blocks.size(i), of(i), facts);
      }
      if (in_parts && (i0 == first || i0 % kTogether == 0))
        for (float* const part : {x.dk_part, x.dv_part}) clear_rows(part, item.key_end - item.key_begin, c);
      float* const dk = !for_keys ? nullptr : in_parts ? x.dk_part : x.dk;
      float* const dv = !for_keys ? nullptr : in_parts ? x.dv_part : x.dv;
      const auto soon = [&](int64_t j, Wanted& wanted) {
        const int64_t keys = smaller(step, item.key_end - item.key_begin - j * step);
        if (dk)
          for (const float* const sums : {dk, dv}) wanted.add(sums + j * step * width, keys * width * sizeof(float));
        soon_packed(j, wanted, !kept, for_queries);
      };
      const int64_t elements = (kept ? 0 : score_elements) + (for_keys ? 2 * step * width : 0) +
                               (for_queries ? x.dim * x.query_block : 0);
      each_block(elements, soon, [&](int64_t i, int64_t j, int64_t j0, int64_t keys, int64_t rank, int64_t count,
                                     const auto& between) {
        const int64_t columns = round_up(count, kLanes), at = j * step * width;
        const int64_t hidden = hidden_from(c, j0, keys, rank);
        const Keys<Op> from = x.keys_at(packed ? j : 0);
        const Scores scores = scores_of(i, j);
        if (!kept) form_scores(c, from, keys, of(i), columns, scores, between);
        if (c.all_keys)
          weigh_all<T>(x, scores, of(i), keys, columns, hidden, problem.scale);
        else if (kept)
          weigh_kept<T>(x, scores, of(i), keys, columns, hidden);
        else
          weigh<T>(x, scores, of(i), keys, columns, hidden, problem.scale);
        add_gradients(c, from, keys, count, x.slopes_of(scores), of(i), dk ? dk + at : nullptr, dv ? dv + at : nullptr,
                      for_queries, between);
        if (!dq_in_parts || (j + 1) % kTogether != 0) return;
        add_rows(of(i).dqt_parts, of(i).dqt, dq_size);
        __builtin_memset(of(i).dqt, 0, dq_size * sizeof(float));
      });
      for (int64_t i = i0; i < i1 && for_queries; ++i) {
        if (dq_in_parts) add_rows(of(i).dqt, of(i).dqt_parts, dq_size);
        write_queries(c, head, blocks.rank(i), blocks.size(i), of(i).dqt);
      }
      if (in_parts && (i1 % kTogether == 0 || i1 == blocks.count())) {
        add_rows(x.dk, x.dk_part, seen * width);
        add_rows(x.dv, x.dv_part, seen * width);
      }
    }
  }
}

template <class T>
void backward(const AttentionProblem& problem, const BackwardItem& item, const BackwardInput& input,
              const Normalised& facts, const BackwardOutput& output, const BackwardSizes& sizes, void* memory) {
  Carve carve(memory);
  Scratch<typename operand<T>::type> scratch(problem, sizes, carve);
  const AttentionSegment& segment = problem.segments[item.segment];
  const int64_t slots = segment.slots ? problem.global.count + problem.local.count : 0;
  const int64_t all = slots + segment.key_end - segment.key_begin;
  const Context<T> c{problem, segment, input, output, item, scratch, slots, all <= kExactKeys};
  const bool for_keys = item.part != BackwardPart::kQueries;
  if (for_keys)
    for (float* const sums : {scratch.dk, scratch.dv}) clear_rows(sums, item.key_end - item.key_begin, c);
  tiles_begin();
  form_gradients(c, sizes.anew && !c.all_keys && item.part != BackwardPart::kKeys, facts);
  tiles_end();
  if (for_keys) write_keys(c);
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
                   const Normalised& facts, const BackwardOutput& output, const BackwardSizes& sizes, void* scratch) {
  with_element(problem.element,
               [&](auto zero) { backward<decltype(zero)>(problem, item, input, facts, output, sizes, scratch); });
}

void collect_rows(const AttentionProblem& problem, int64_t batch, int64_t kv_head, const BackwardOutput& output) {
  with_element(problem.element, [&](auto zero) { collect<decltype(zero)>(problem, batch, kv_head, output); });
}

}  // namespace

BackwardPath backward_path() { return {backward_block, backward_scratch, backward_item, collect_rows}; }

}  // namespace hici::cpu::HICI_PATH
