// local_slots, forward.
//
// Absorbed form, R = heads * slots rows, T tokens of H channels in N segments, width E. Once per call the queries are
// folded, Q[r] = scale * queries[m, h] k_weight[h]. Per block of tokens X: scores S = X Q^T with the tokens as rows, so
// that X is the left operand where it lies and the softmax runs down columns, lane by lane; then Y += P^T X, for which
// a panel of X (block x kPanel) is packed into the first-level cache: columns are copied, or pairs of rows interleaved,
// and nothing of X is ever transposed. Only P is, R numbers a token. Once per segment out[h] = v_weight[h] Y[h] /
// total, in float, v_weight read once for several segments. The projected form packs both weights, computes keys and
// values of a block of tokens of any segments, and does the rest per head in float.
//
// Roofline. Absorbed: 4 T R H + 2 (N + 1) M E H FLOPs; bytes: hidden once, both weights once, sums of every chunk
// (4 R H) written and read once; at 4096 x 4096, 8 heads, 8 slots, E 512: 4.3 GFLOP against 34.4 of the projected form,
// 32 MiB of bfloat16 hidden: 128 FLOPs a byte, so products are the limit, not memory, up to 0.5 TFLOP/s per 4 GB/s.
// The exponentials are R a token, 1 for every 4 H FLOPs.
//
// Measured on one Zen 5 core shared with other work (processor time; products alone reach 247 GFLOP/s in float and 485
// with bfloat16 pairs), 4096 tokens, E 512, 8 heads, 8 slots, against F.linear twice and scaled_dot_product_attention:
//   float      H 4096: 25.8 ms (167 GFLOP/s), 13.7x; H 512: 3.5 ms, 12.7x
//   bfloat16   H 4096: 14 ms (310 GFLOP/s),   5.8x;  H 512: 2.0 ms, 6.1x
// Tried:
//   - requests for the rows of the next strip (scores) and for the next panel of every row (sums): 5 to 15 %. A panel
//     is 128 bytes of rows that lie 8 KiB apart, which hardware does not prefetch.
//   - passes over 256 / 128 channels instead of 512 / 256, blocks of 288 / 192 tokens instead of 192 / 96: within the
//     noise, but 5 % slower for float blocks of 192, whose panel leaves the first-level cache.
//   - folded queries in one bfloat16: error up to 1.5 times the budget where scores differ by tens; in two parts
//     always: a fifth of the budget, 40 % slower (4.4x, 4.8x). Hence two parts only where scores lie far apart:
//     score().
// AMX tiles: not measured.
#include "local_slots_blocks.h"

namespace hici::cpu::HICI_PATH {

LocalSlotsSizes local_slots_backward_sizes(const LocalSlotsProblem&, const LocalSlotsPlan&);
void local_slots_backward_run(const LocalSlotsProblem&, const LocalSlotsPlan&, const void* grad_out,
                              const LocalSlotsGradients&, const LocalSlotsMemory&, Execution);

namespace {

// What a chunk leaves: largest score and weight of every row, then the sums of its rows.
template <class Op>
struct Partial {
  float *top, *total, *sums;

  Partial(float* base, const Layout<Op>& layout) {
    top = base, total = base + layout.padded, sums = base + 2 * layout.padded;
  }
  static int64_t size(const Layout<Op>& layout, int64_t width) {
    return round_up(2 * layout.padded + layout.rows * width, 16);
  }
};

// A top follows the scores only where they exceed it by this much: weights up to e^8 are as exact as weights up to 1,
// and the sums are hardly ever rescaled.
constexpr float kSlack = 8;

// Scores [n, columns] become weights. Columns whose top moves have their total scaled, and factor[column] != 1: returns
// whether there are any.
template <class Op>
bool soften(int64_t n, int64_t columns, const float* scores, float* top, float* total, float* factor, Op* weights) {
  bool moved = false;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec m0 = splat(-__builtin_inff()), m1 = m0;
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
      m0 = max(m0, load(scores + i * columns + j));
      m1 = max(m1, load(scores + (i + 1) * columns + j));
    }
    if (i < n) m0 = max(m0, load(scores + i * columns + j));
    alignas(64) float peak[kLanes], shift[kLanes];
    store(peak, max(m0, m1));
    const Vec before = load(top + j);
    bool here = false;
    for (int64_t c = 0; c < kLanes; ++c) {
      if (peak[c] > top[j + c] + kSlack) top[j + c] = peak[c], here = true;
      shift[c] = top[j + c] == -__builtin_inff() ? 0.0f : top[j + c];
    }
    const Vec by = load(shift);
    if (here) {
      moved = true;
      const Vec f = exp(sub(before, by));
      store(factor + j, f);
      store(total + j, mul(load(total + j), f));
    } else {
      store(factor + j, splat(1.0f));
    }
    Vec sum = load(total + j);
    for (i = 0; i < n;) {
      Vec part = zeros();
      for (const int64_t end = smaller(n, i + kChain); i < end; ++i) {
        Op* const w = weights + i * columns + j;
        narrow(w, exp(sub(load(scores + i * columns + j), by)));
        part = add(part, widen(w));  // as rounded: the weights of the mean then add up to 1
      }
      sum = add(sum, part);
    }
    store(total + j, sum);
  }
  return moved;
}

template <class Op, class T>
struct ChunkScratch {
  Tokens<T> tokens;
  const T** at;
  const void** weight_rows;
  Op *copy, *panel;
  void *weights, *turned;  // of Op absorbed, of float projected
  float *scores, *factor;
  float* values;  // projected: values of a head, packed

  ChunkScratch(const Layout<Op>& layout, bool absorbed, Carve& carve) {
    constexpr int64_t block = kBlock<Op>;  // a multiple of every padding of a reduction
    tokens.rows = carve.take<const T*>(block);
    at = carve.take<const T*>(block);
    weight_rows = carve.take<const void*>(block);
    copy = carve.take<Op>(block * kCut<Op>);
    panel = carve.take<Op>(block * kPanel);
    scores = carve.take<float>(block * layout.padded);
    factor = carve.take<float>(layout.padded);
    weights = carve.take<float>(block * layout.padded);
    turned = carve.take<float>(block * layout.padded);
    values = carve.take<float>(absorbed ? 0 : block * layout.wide_dim);
  }
};

inline void rescale(int64_t rows, int64_t width, const float* factor, float* sums) {
  for (int64_t r = 0; r < rows; ++r, sums += width) {
    if (factor[r] == 1.0f) continue;
    const Vec f = splat(factor[r]);
    for (int64_t j = 0; j < width; j += kLanes) store(sums + j, mul(load(sums + j), f));
  }
}

template <class Op, class T>
void absorbed_chunk(const LocalSlotsProblem& problem, const Layout<Op>& layout, const SlotsSegment& segment,
                    const SlotsChunk& chunk, const Op* folded, const Partial<Op>& partial,
                    ChunkScratch<Op, T>& scratch) {
  Op *const weights = static_cast<Op*>(scratch.weights), *const turned = static_cast<Op*>(scratch.turned);
  const int64_t columns = layout.padded;
  for (int64_t c = 0; c < columns; ++c) partial.top[c] = -__builtin_inff(), partial.total[c] = 0;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock<Op>) {
    const int64_t n = smaller(kBlock<Op>, chunk.end - begin);
    list_tokens(problem, segment.batch, begin, n, scratch.tokens);
    if (segment.equal)
      __builtin_memset(scratch.scores, 0, n * columns * sizeof(float));
    else
      score(scratch.tokens, layout.channels, columns, folded, scratch.scores, scratch.copy, scratch.at);
    const bool first = begin == chunk.begin;
    if (soften(n, columns, scratch.scores, partial.top, partial.total, scratch.factor, weights) && !first)
      rescale(layout.rows, layout.wide, scratch.factor, partial.sums);
    const Op** const rows = reinterpret_cast<const Op**>(scratch.weight_rows);
    for (int64_t i = 0; i < n; ++i) rows[i] = weights + i * columns;
    pack_rows_transposed(rows, n, layout.rows, round_up(n, reduction<Op>::step), turned);
    add_weighted(scratch.tokens, layout.channels, layout.rows, turned, !first, partial.sums, layout.wide, scratch.panel,
                 scratch.at, [](int64_t, int64_t) {});
  }
}

// projected: keys and values of the chunk's tokens, rows of 2 * wide_width.
template <class Op, class T>
void projected_chunk(const Layout<Op>& layout, const SlotsSegment& segment, const SlotsChunk& chunk,
                     const float* projected, const float* queries, const Partial<Op>& partial,
                     ChunkScratch<Op, T>& scratch) {
  float *const weights = static_cast<float*>(scratch.weights), *const turned = static_cast<float*>(scratch.turned);
  const int64_t columns = layout.padded, dim = layout.dim, width = 2 * layout.wide_width;
  const float** const rows = reinterpret_cast<const float**>(scratch.weight_rows);
  for (int64_t c = 0; c < columns; ++c) partial.top[c] = -__builtin_inff(), partial.total[c] = 0;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock<Op>, projected += kBlock<Op> * width) {
    const int64_t n = smaller(kBlock<Op>, chunk.end - begin);
    if (segment.equal || columns > layout.rows) __builtin_memset(scratch.scores, 0, n * columns * sizeof(float));
    for (int64_t h = 0; h < layout.heads && !segment.equal; ++h)
      gemm<false>(n, layout.slot_stride, dim, projected + h * dim, width, queries + h * dim * layout.slot_stride,
                  scratch.scores + layout.row(h, 0), columns);
    const bool first = begin == chunk.begin;
    if (soften(n, columns, scratch.scores, partial.top, partial.total, scratch.factor, weights) && !first)
      rescale(layout.rows, layout.wide_dim, scratch.factor, partial.sums);
    for (int64_t i = 0; i < n; ++i) rows[i] = weights + i * columns;
    pack_rows_transposed(rows, n, layout.rows, n, turned);
    for (int64_t h = 0; h < layout.heads; ++h) {
      for (int64_t i = 0; i < n; ++i) rows[i] = projected + i * width + layout.wide_width + h * dim;
      pack_depth(rows, n, dim, scratch.values);
      const int64_t row = layout.row(h, 0), wide = layout.wide_dim;
      if (first)
        gemm<false>(layout.slots, wide, n, turned + row * n, n, scratch.values, partial.sums + row * wide, wide);
      else
        gemm<true>(layout.slots, wide, n, turned + row * n, n, scratch.values, partial.sums + row * wide, wide);
    }
  }
}

// Weighted means of the sums of a segment's chunks: factors[i * rows + row] for chunk i.
template <class Op>
void chunk_factors(const Layout<Op>& layout, const float* partials, int64_t size, int64_t count, int64_t row,
                   float* factors) {
  float top = -__builtin_inff(), total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = partials[i * size + row];
    top = x > top || x != x ? x : top;
  }
  if (top == -__builtin_inff()) top = 0;
  for (int64_t i = 0; i < count; ++i) {
    alignas(64) float f[kLanes];
    store(f, exp(splat(partials[i * size + row] - top)));
    factors[i] = f[0];
    total += f[0] * partials[i * size + layout.padded + row];
  }
  const float inverse = total == 0.0f ? 0.0f : 1 / total;
  for (int64_t i = 0; i < count; ++i) factors[i] *= inverse;
}

// to[j] = sum over chunks of factors[i] sums_i[row][j]
inline void merge_rows(const float* sums, int64_t size, int64_t count, const float* factors, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t there = smaller(kLanes, n - j);
    Vec x = zeros();
    for (int64_t i = 0; i < count; ++i) x = fma(splat(factors[i]), load_part(sums + i * size + j, there), x);
    store_part(to + j, x, there);
  }
}

template <class T>
struct Forward {
  using Op = typename operand<T>::type;
  static constexpr int64_t kParts = sizeof(Op) == 2 ? 2 : 1;  // of folded queries: see score()
  const LocalSlotsProblem& problem;
  const LocalSlotsPlan& plan;
  const Layout<Op> layout;
  Op* operand_of_hidden;  // folded queries, or both weights
  float* queries;         // projected: [head][dim x slot_stride] packed
  float* projected;       // keys and values of the tokens of a wave
  float* partials;
  int64_t partial_size;

  Forward(const LocalSlotsProblem& given, const LocalSlotsPlan& p, Carve& carve)
      : problem(given), plan(p), layout(given, p.absorbed) {
    operand_of_hidden = carve.take<Op>(layout.depth() * (p.absorbed ? layout.padded * kParts : 2 * layout.wide_width));
    queries = carve.take<float>(p.absorbed ? 0 : layout.dim * layout.padded);
    projected = carve.take<float>(p.absorbed ? 0 : p.most_tokens * 2 * layout.wide_width);
    partial_size = Partial<Op>::size(layout, p.absorbed ? layout.wide : layout.wide_dim);
    partials = carve.take<float>(p.most_chunks * partial_size);
  }

  Matrix<T> slot_queries() const { return {static_cast<const T*>(problem.queries), problem.queries_row}; }
  Matrix<T> k_weight() const { return {static_cast<const T*>(problem.k_weight), problem.k_row}; }
  Matrix<T> v_weight() const { return {static_cast<const T*>(problem.v_weight), problem.v_row}; }
  int64_t group() const { return larger(1, 64 / larger(1, layout.slots)); }  // segments per item of finish()

  struct PrepareScratch {
    FoldScratch<T> fold;
    float* rows;
    Op* low;
    const Op** at;
    T* zeros;
    PrepareScratch(const Layout<Op>& layout, Carve& carve) : fold(layout, carve) {
      rows = carve.take<float>(layout.padded * kFold);
      low = carve.take<Op>(layout.padded * kFold);
      at = carve.take<const Op*>(kPanel);
      zeros = carve.take<T>(kFold);
    }
  };
  void prepare(int64_t item, void* memory) const {
    Carve carve(memory);
    const PrepareScratch scratch(layout, carve);
    if (item * kFold >= layout.channels) return pack_queries(scratch);
    const int64_t k0 = item * kFold;
    if (!plan.absorbed)
      return pack_weights(layout, k_weight(), v_weight(), k0, scratch.zeros, scratch.fold.at, operand_of_hidden);
    fold(layout, slot_queries(), k_weight(), layout.scale(), k0, scratch.rows, scratch.fold);
    const Op* const rows = rounded(scratch.rows, layout.padded, scratch.low);
    pack_score(layout.channels, layout.padded, rows, k0, scratch.at, operand_of_hidden);
    if constexpr (kParts == 2) {
      subtract(scratch.rows, layout.padded, rows);
      pack_score(layout.channels, layout.padded, rounded(scratch.rows, layout.padded, scratch.low), k0, scratch.at,
                 operand_of_hidden + layout.depth() * layout.padded);
    }
  }
  int64_t prepare_items() const { return (layout.channels + kFold - 1) / kFold + !plan.absorbed; }

  void pack_queries(const PrepareScratch& scratch) const {
    scaled_rows(layout, slot_queries(), layout.scale(), scratch.fold.left);
    pack_heads(layout, scratch.fold.left, queries);
  }

  // keys and values of tokens of any segments: the weights are read once for a whole block
  void project_block(const SlotsWave& wave, int64_t first, void* memory) const {
    Carve carve(memory);
    ChunkScratch<Op, T> scratch(layout, plan.absorbed, carve);
    const int64_t width = 2 * layout.wide_width;
    list_places(problem, plan.places + wave.place + first, smaller(kBlock<Op>, wave.tokens - first), scratch.tokens);
    products<false>(scratch.tokens, layout.channels, width, operand_of_hidden, projected + first * width, width,
                    scratch.copy, scratch.at);
  }

  void chunk(int64_t number, int64_t in_wave, void* memory) const {
    Carve carve(memory);
    ChunkScratch<Op, T> scratch(layout, plan.absorbed, carve);
    const SlotsChunk& c = plan.chunks[number];
    const Partial<Op> partial(partials + in_wave * partial_size, layout);
    const SlotsSegment& segment = plan.segments[c.segment];
    if (plan.absorbed)
      absorbed_chunk(problem, layout, segment, c, operand_of_hidden, partial, scratch);
    else
      projected_chunk(layout, segment, c, projected + c.offset * 2 * layout.wide_width, queries, partial, scratch);
  }

  struct FinishScratch {
    ProjectScratch<T> project;
    float *factors, *result;
    FinishScratch(const Layout<Op>& layout, int64_t group, int64_t most_chunks, Carve& carve)
        : project(round_up(group * layout.slots, kLanes), carve) {
      factors = carve.take<float>(layout.slots * (most_chunks + 1));
      result = carve.take<float>(layout.dim * round_up(group * layout.slots, kLanes));
    }
  };
  // one head of up to group() segments
  void finish(const SlotsWave& wave, int64_t item, T* out, void* memory) const {
    Carve carve(memory);
    const FinishScratch scratch(layout, group(), plan.most_chunks, carve);
    const int64_t h = item % layout.heads, first = wave.segment_begin + item / layout.heads * group();
    const int64_t last = smaller(wave.segment_end, first + group()), slots = layout.slots;
    const int64_t first_chunk = plan.segments[first].chunk_begin;
    for (int64_t s = first; s < last; ++s) {
      const SlotsSegment& x = plan.segments[s];
      const int64_t count = x.chunk_end - x.chunk_begin;
      for (int64_t m = 0; m < slots; ++m)
        chunk_factors(layout, partials + (x.chunk_begin - wave.chunk_begin) * partial_size, partial_size, count,
                      layout.row(h, m), scratch.factors + (x.chunk_begin - first_chunk) * slots + m * count);
    }
    const int64_t columns = (last - first) * slots, ldo = round_up(columns, kLanes), dim = layout.dim;
    project(v_weight(), h * dim, dim, layout.channels, columns, scratch.result, scratch.project,
            [&](int64_t k0, int64_t k, float* to) {
              for (int64_t s = first; s < last; ++s) {
                const SlotsSegment& x = plan.segments[s];
                const int64_t count = x.chunk_end - x.chunk_begin;
                const Partial<Op> p(partials + (x.chunk_begin - wave.chunk_begin) * partial_size, layout);
                for (int64_t m = 0; m < slots; ++m)
                  merge_rows(p.sums + layout.row(h, m) * layout.wide + k0, partial_size, count,
                             scratch.factors + (x.chunk_begin - first_chunk) * slots + m * count, k,
                             to + ((s - first) * slots + m) * kPiece);
              }
            });
    for (int64_t s = first; s < last; ++s) {
      const SlotsSegment& x = plan.segments[s];
      for (int64_t m = 0; m < slots; ++m) {
        T* const to = out + ((x.batch * problem.segment_total + x.segment) * slots + m) * layout.width + h * dim;
        const float* const from = scratch.result + (s - first) * slots + m;
        for (int64_t e = 0; e < dim; e += kLanes) {
          alignas(64) float row[kLanes];
          const int64_t n = smaller(kLanes, dim - e);
          for (int64_t i = 0; i < n; ++i) row[i] = from[(e + i) * ldo];
          narrow_part(to + e, load(row), n);
        }
      }
    }
  }

  void finish_projected(const SlotsWave& wave, int64_t segment, T* out, void* memory) const {
    Carve carve(memory);
    const FinishScratch scratch(layout, group(), plan.most_chunks, carve);
    const SlotsSegment& x = plan.segments[segment];
    const int64_t count = x.chunk_end - x.chunk_begin;
    const float* const base = partials + (x.chunk_begin - wave.chunk_begin) * partial_size;
    for (int64_t r = 0; r < layout.slots * layout.heads; ++r) {
      const int64_t m = r / layout.heads, h = r % layout.heads, row = layout.row(h, m);
      chunk_factors(layout, base, partial_size, count, row, scratch.factors);
      const Partial<Op> first(const_cast<float*>(base), layout);
      merge_rows(first.sums + row * layout.wide_dim, partial_size, count, scratch.factors, layout.dim, scratch.result);
      T* const to = out + ((x.batch * problem.segment_total + x.segment) * layout.slots + m) * layout.width;
      for (int64_t e = 0; e < layout.dim; e += kLanes) {
        const int64_t n = smaller(kLanes, layout.dim - e);
        narrow_part(to + h * layout.dim + e, load_part(scratch.result + e, n), n);
      }
    }
  }

  static int64_t scratch_bytes(const LocalSlotsProblem& problem, const LocalSlotsPlan& plan) {
    Carve shared(nullptr);
    const Forward call(problem, plan, shared);
    Carve a(nullptr), b(nullptr), c(nullptr);
    PrepareScratch(call.layout, a);
    ChunkScratch<Op, T>(call.layout, plan.absorbed, b);
    FinishScratch(call.layout, call.group(), plan.most_chunks, c);
    return larger(a.bytes(), larger(b.bytes(), c.bytes()));
  }

  void run(T* out, const LocalSlotsMemory& memory, Execution execution) const {
    const auto mine = [&](int worker) { return memory.scratch + worker * memory.scratch_size; };
    each(execution, prepare_items(), [&](int64_t i, int worker) { prepare(i, mine(worker)); });
    for (int64_t w = 0; w < plan.wave_count; ++w) {
      const SlotsWave& wave = plan.waves[w];
      if (!plan.absorbed)
        each(execution, (wave.tokens + kBlock<Op> - 1) / kBlock<Op>,
             [&](int64_t i, int worker) { project_block(wave, i * kBlock<Op>, mine(worker)); });
      each(execution, wave.chunk_end - wave.chunk_begin,
           [&](int64_t i, int worker) { chunk(wave.chunk_begin + i, i, mine(worker)); });
      if (!plan.absorbed) {
        each(execution, wave.segment_end - wave.segment_begin,
             [&](int64_t i, int worker) { finish_projected(wave, wave.segment_begin + i, out, mine(worker)); });
        continue;
      }
      const int64_t groups = (wave.segment_end - wave.segment_begin + group() - 1) / group();
      each(execution, groups * layout.heads, [&](int64_t i, int worker) { finish(wave, i, out, mine(worker)); });
    }
  }
};

LocalSlotsSizes forward_sizes(const LocalSlotsProblem& problem, const LocalSlotsPlan& plan) {
  return with_element(problem.element, [&](auto zero) {
    using T = decltype(zero);
    Carve shared(nullptr);
    const Forward<T> call(problem, plan, shared);
    return LocalSlotsSizes{shared.bytes(), Forward<T>::scratch_bytes(problem, plan)};
  });
}

void forward(const LocalSlotsProblem& problem, const LocalSlotsPlan& plan, void* out, const LocalSlotsMemory& memory,
             Execution execution) {
  with_element(problem.element, [&](auto zero) {
    using T = decltype(zero);
    Carve shared(memory.shared);
    Forward<T>(problem, plan, shared).run(static_cast<T*>(out), memory, execution);
  });
}

}  // namespace

LocalSlotsPath local_slots_path() {
  return {forward_sizes, forward, local_slots_backward_sizes, local_slots_backward_run};
}

}  // namespace hici::cpu::HICI_PATH
