// local_slots, backward.
//
// Nothing but the inputs is saved: everything is computed anew, with Q and Y as in the forward pass, D[r] =
// v_weight[h]^T grad_out[m, h] folded once per segment, P the weights with total 1.
//   scan     S = X Q^T and dP = X D^T, kept (8 R bytes a token); largest score, weight and sum_t P dP of every chunk
//   apply    dS = P (dP - sum_t P dP); dX = [dS | P] [Q; D]; [sum dS X; Y] = [dS | P]^T X: both products while a panel
//            of X is near; sums stay apart per chunk
//   collect  grad v_weight = sum over segments grad_out^T Y; grad k_weight = scale queries^T (sum dS X);
//            grad queries = scale k_weight (sum dS X)
// The mean of dP is taken from the same rounded dP, so that an error common to all tokens cancels and a segment of one
// token has exactly no gradient of scores. Projected: keys and values take the place of X, dX = [dK | dV] [k_weight;
// v_weight], gradients of the weights [dK | dV]^T X over blocks of tokens of any segments.
//
// Roofline, absorbed: 12 T R H + (4 N + 6) M E H FLOPs; hidden read twice, its gradient written once, sums of every
// chunk (8 R H bytes) written once and read once.
//
// Measured as in local_slots.cpp, forward and backward together, against PyTorch's own:
//   float      H 4096: 137 to 148 ms, 8.1x to 8.4x; H 512: 14.7 ms, 9.8x
//   bfloat16   H 4096: 53 to 73 ms, 4.3x to 5.6x;  H 512: 7.1 to 8.0 ms, 5.3x to 5.9x
// AMX tiles: not measured.
#include "local_slots_blocks.h"

namespace hici::cpu::HICI_PATH {
namespace {

// Of the softmax of a chunk: largest score, weight, and weighted sum of the weights' gradients of every row.
struct Statistics {
  float *top, *total, *dot;
  Statistics(float* base, int64_t columns) : top(base), total(base + columns), dot(base + 2 * columns) {}
};

void measure(int64_t n, int64_t columns, const float* scores, const float* gradients, const Statistics& found) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec top = splat(-__builtin_inff());
    for (int64_t i = 0; i < n; ++i) top = max(top, load(scores + i * columns + j));
    store(found.top + j, top);
    top = where_equal(top, splat(-__builtin_inff()), zeros(), top);
    Vec total = zeros(), dot = zeros();
    for (int64_t i = 0; i < n;) {
      Vec part = zeros(), part_dot = zeros();
      for (const int64_t end = smaller(n, i + kChain); i < end; ++i) {
        const Vec weight = exp(sub(load(scores + i * columns + j), top));
        part = add(part, weight);
        part_dot = fma(weight, load(gradients + i * columns + j), part_dot);
      }
      total = add(total, part), dot = add(dot, part_dot);
    }
    store(found.total + j, total);
    store(found.dot + j, dot);
  }
}

// Of the whole segment, into `all`: total becomes its inverse, dot the mean.
void merge_statistics(const float* base, int64_t count, int64_t columns, const Statistics& all) {
  const Vec none = splat(-__builtin_inff());
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec top = none;
    for (int64_t i = 0; i < count; ++i) top = max(top, load(base + i * 3 * columns + j));
    top = where_equal(top, none, zeros(), top);
    Vec total = zeros(), dot = zeros();
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = base + i * 3 * columns + j;
      const Vec factor = exp(sub(load(from), top));
      total = fma(factor, load(from + columns), total);
      dot = fma(factor, load(from + 2 * columns), dot);
    }
    const Vec inverse = where_equal(total, zeros(), zeros(), div(splat(1.0f), total));
    store(all.top + j, top);
    store(all.total + j, inverse);
    store(all.dot + j, mul(dot, inverse));
  }
}

// Rows [score gradients | weights] of n tokens, `columns` each.
template <class Op>
void differentiate(int64_t n, int64_t columns, const float* scores, const float* gradients, const Statistics& all,
                   bool equal, Op* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec weight = mul(exp(sub(load(scores + i * columns + j), load(all.top + j))), load(all.total + j));
      // equal weights do not depend on the scores
      const Vec change = equal ? zeros() : mul(weight, sub(load(gradients + i * columns + j), load(all.dot + j)));
      narrow(out + i * 2 * columns + j, change);
      narrow(out + i * 2 * columns + columns + j, weight);
    }
  }
}

// Columns of hidden that an item of a reduction covers.
static_assert(kFold % kPanel == 0, "whole panels");

template <class T>
struct Backward {
  using Op = typename operand<T>::type;
  static constexpr int64_t kParts = sizeof(Op) == 2 ? 2 : 1;  // of folded queries: see score()
  const LocalSlotsProblem& problem;
  const LocalSlotsPlan& plan;
  const Layout<Op> layout;
  int64_t width;  // columns of keys and values together

  // absorbed: folded queries and, for every segment of a wave, folded gradients, as columns and as reduction.
  // projected: both weights.
  Op *columns, *reduction_, *segment_columns, *segment_reduction;
  // projected: queries (scaled) and gradients of every segment, heads as columns and as reduction
  float *query_columns, *query_rows, *grad_columns, *grad_rows;
  float *scores, *gradients;  // of the tokens of a wave: rows of layout.padded
  float *statistics;          // of the chunks of a wave
  float *projected;           // of the tokens of a wave: keys and values
  Op *change, *turned;        // and their gradients, by row, and by column in blocks
  float *sums;                // of the chunks of a wave: absorbed [2 padded][wide], projected [rows][wide_dim]
  float *sum_queries;         // of all: absorbed [rows][wide], projected [rows][wide_dim]
  float *sum_weights;         // of all: absorbed [width][wide], projected [2 wide_width][wide]
  int64_t segment_size, reduction_size, head_columns, head_rows, sums_size;

  Backward(const LocalSlotsProblem& given, const LocalSlotsPlan& p, Carve& carve)
      : problem(given), plan(p), layout(given, p.absorbed), width(2 * layout.wide_width) {
    const bool a = p.absorbed;
    const int64_t padded = layout.padded, wide = layout.wide;
    segment_size = layout.depth() * padded, reduction_size = padded * wide;
    head_columns = layout.dim * layout.rows, head_rows = layout.heads * layout.slots * layout.wide_dim;
    sums_size = a ? 2 * padded * wide : layout.rows * layout.wide_dim;
    columns = carve.take<Op>(layout.depth() * (a ? padded * kParts : width));
    reduction_ = carve.take<Op>((a ? padded : width) * wide);
    segment_columns = carve.take<Op>(a ? p.most_segments * segment_size : 0);
    segment_reduction = carve.take<Op>(a ? p.most_segments * reduction_size : 0);
    query_columns = carve.take<float>(a ? 0 : head_columns);
    query_rows = carve.take<float>(a ? 0 : head_rows);
    grad_columns = carve.take<float>(a ? 0 : p.most_segments * head_columns);
    grad_rows = carve.take<float>(a ? 0 : p.most_segments * head_rows);
    scores = carve.take<float>(p.most_tokens * padded);
    gradients = carve.take<float>(p.most_tokens * padded);
    statistics = carve.take<float>(p.most_chunks * 3 * padded);
    projected = carve.take<float>(a ? 0 : p.most_tokens * width);
    change = carve.take<Op>(a ? 0 : p.most_tokens * width);
    turned = carve.take<Op>(a ? 0 : round_up(p.most_tokens, reduction<Op>::step) * width);
    sums = carve.take<float>(p.most_chunks * sums_size);
    sum_queries = carve.take<float>(layout.rows * (a ? wide : layout.wide_dim));
    sum_weights = carve.take<float>((a ? layout.width : width) * wide);
  }

  // scratch of every kind of item; sized by running over a null Carve
  struct Scratch {
    Tokens<T> tokens;
    const T** at;
    const void** rows;
    Op *copy, *panel, *both, *turned;
    float *tile, *packed, *all, *pieces;
    FoldScratch<T> fold;
    float* folded;
    Op* low;
    T* none;
    ProjectScratch<T> project;
    float* result;

    Scratch(const Layout<Op>& layout, Carve& carve)
        : fold(layout, carve), project(round_up(layout.slots, kLanes), carve) {
      constexpr int64_t block = kBlock<Op>;
      const int64_t most = larger(larger(block, kPiece), larger(2 * layout.padded, 2 * layout.wide_width));
      tokens.rows = carve.take<const T*>(block);
      at = carve.take<const T*>(most);
      rows = carve.take<const void*>(most);
      copy = carve.take<Op>(block * kCut<Op>);
      panel = carve.take<Op>(block * kPanel);
      both = reinterpret_cast<Op*>(carve.take<float>(block * 2 * layout.padded));
      turned = reinterpret_cast<Op*>(carve.take<float>(block * 2 * layout.padded));
      tile = carve.take<float>(kTileRows * larger(kPanel, layout.wide_dim));
      packed = carve.take<float>(larger(kPiece * kFold, block * layout.wide_dim));
      all = carve.take<float>(3 * layout.padded);
      pieces = carve.take<float>(larger(kPiece * kFold, kPiece * kPiece) + kPiece * layout.dim);
      folded = carve.take<float>(layout.padded * kFold);
      low = carve.take<Op>(layout.padded * kFold);
      none = carve.take<T>(kFold);
      result = carve.take<float>(layout.dim * round_up(layout.slots, kLanes));
    }
  };
  static constexpr int64_t kTileRows = 48;

  Matrix<T> slot_queries() const { return {static_cast<const T*>(problem.queries), problem.queries_row}; }
  Matrix<T> k_weight() const { return {static_cast<const T*>(problem.k_weight), problem.k_row}; }
  Matrix<T> v_weight() const { return {static_cast<const T*>(problem.v_weight), problem.v_row}; }
  Matrix<T> grad_of(const T* grad_out, const SlotsSegment& x) const {
    const int64_t size = layout.slots * layout.width;
    return {grad_out + (x.batch * problem.segment_total + x.segment) * size, layout.width};
  }
  int64_t folds() const { return (layout.channels + kFold - 1) / kFold; }
  int64_t folded_channels(int64_t k0) const { return smaller(kFold, layout.channels - k0); }

  // Folded rows, kFold apart, as reduction.
  void pack_folded(const Op* rows, int64_t k0, Op* to, const Scratch& scratch) const {
    const Op** const at = reinterpret_cast<const Op**>(scratch.rows);
    for (int64_t i = 0; i < layout.padded; ++i) at[i] = rows + i * kFold;
    pack_depth(at, layout.padded, folded_channels(k0), to + k0 * layout.padded);
  }

  void prepare(int64_t item, const Scratch& scratch) const {
    const int64_t k0 = item * kFold;
    const Op** const at = reinterpret_cast<const Op**>(scratch.rows);
    if (plan.absorbed) {
      fold(layout, slot_queries(), k_weight(), layout.scale(), k0, scratch.folded, scratch.fold);
      const Op* const rows = rounded(scratch.folded, layout.padded, scratch.low);
      pack_score(layout.channels, layout.padded, rows, k0, at, columns);
      pack_folded(rows, k0, reduction_, scratch);
      if constexpr (kParts == 2) {
        subtract(scratch.folded, layout.padded, rows);
        pack_score(layout.channels, layout.padded, rounded(scratch.folded, layout.padded, scratch.low), k0, at,
                   columns + segment_size);
      }
      return;
    }
    if (k0 < layout.channels) {
      pack_weights(layout, k_weight(), v_weight(), k0, scratch.none, scratch.at, columns);
      list_weights(layout, k_weight(), v_weight(), k0, 0, width, scratch.none, scratch.at);
      return pack_depth(scratch.at, width, folded_channels(k0), reduction_ + k0 * width);
    }
    pack_slots(slot_queries(), layout.scale(), query_columns, query_rows, scratch);
  }

  // Rows [slots, width], times scale: heads as columns and as reduction.
  void pack_slots(const Matrix<T>& from, float scale, float* to_columns, float* to_rows, const Scratch& scratch) const {
    float* const rows = scratch.fold.left;
    scaled_rows(layout, from, scale, rows);
    pack_heads(layout, rows, to_columns);
    for (int64_t h = 0; h < layout.heads; ++h) {
      // in panels of columns, each of all slots
      for (int64_t j = 0; j < layout.wide_dim; j += kPanel) {
        const int64_t panel = smaller(kPanel, layout.wide_dim - j);
        float* const to = to_rows + h * layout.slots * layout.wide_dim + j * layout.slots;
        for (int64_t m = 0; m < layout.slots; ++m)
          for (int64_t c = 0; c < panel; ++c)
            to[m * panel + c] = j + c < layout.dim ? rows[m * layout.width + h * layout.dim + j + c] : 0.0f;
      }
    }
  }

  void fold_gradient(const T* grad_out, const SlotsSegment& segment, int64_t in_wave, int64_t k0,
                     const Scratch& scratch) const {
    fold(layout, grad_of(grad_out, segment), v_weight(), 1.0f, k0, scratch.folded, scratch.fold);
    const Op* const rows = rounded(scratch.folded, layout.padded, scratch.low);
    pack_score(layout.channels, layout.padded, rows, k0, reinterpret_cast<const Op**>(scratch.rows),
               segment_columns + in_wave * segment_size);
    pack_folded(rows, k0, segment_reduction + in_wave * reduction_size, scratch);
  }

  // Scores of a chunk's tokens, gradients of their weights, and what the softmax needs of both.
  void scan(const SlotsWave& wave, int64_t in_wave, Scratch& scratch) const {
    const SlotsChunk& chunk = plan.chunks[wave.chunk_begin + in_wave];
    const SlotsSegment& segment = plan.segments[chunk.segment];
    const int64_t padded = layout.padded, dim = layout.dim, n = chunk.end - chunk.begin;
    float* const s = scores + chunk.offset * padded;
    float* const g = gradients + chunk.offset * padded;
    if (segment.equal || padded > layout.rows) __builtin_memset(s, 0, n * padded * sizeof(float));
    if (plan.absorbed) {
      for (int64_t begin = 0; begin < n; begin += kBlock<Op>) {
        list_tokens(problem, segment.batch, chunk.begin + begin, smaller(kBlock<Op>, n - begin), scratch.tokens);
        if (!segment.equal)
          score(scratch.tokens, layout.channels, padded, columns, s + begin * padded, scratch.copy, scratch.at);
        products<false>(scratch.tokens, layout.channels, padded,
                        segment_columns + (chunk.segment - wave.segment_begin) * segment_size, g + begin * padded,
                        padded, scratch.copy, scratch.at);
      }
    } else {
      if (padded > layout.rows) __builtin_memset(g, 0, n * padded * sizeof(float));
      const float* const keys = projected + chunk.offset * width;
      const float* const grad = grad_columns + (chunk.segment - wave.segment_begin) * head_columns;
      for (int64_t h = 0; h < layout.heads; ++h) {
        const int64_t at = h * dim * layout.slot_stride, row = layout.row(h, 0);
        if (!segment.equal)
          gemm<false>(n, layout.slot_stride, dim, keys + h * dim, width, query_columns + at, s + row, padded);
        gemm<false>(n, layout.slot_stride, dim, keys + layout.wide_width + h * dim, width, grad + at, g + row, padded);
      }
    }
    measure(n, padded, s, g, Statistics(statistics + in_wave * 3 * padded, padded));
  }

  Statistics of_segment(const SlotsWave& wave, const SlotsSegment& segment, const Scratch& scratch) const {
    const Statistics all(scratch.all, layout.padded);
    merge_statistics(statistics + (segment.chunk_begin - wave.chunk_begin) * 3 * layout.padded,
                     segment.chunk_end - segment.chunk_begin, layout.padded, all);
    return all;
  }

  // Rows of change [n, 2 columns] times two operands packed as reduction, columns [j, j + count): gradients of hidden.
  // hidden_gradient(i): the row of token i.
  template <class Row>
  void write_hidden(int64_t n, int64_t j, int64_t count, const Op* rows, int64_t ld, int64_t depth, const Op* first,
                    const Op* second, const Scratch& scratch, const Row& hidden_gradient) const {
    for (int64_t i = 0; i < n; i += kTileRows) {
      const int64_t m = smaller(kTileRows, n - i);
      gemm<false>(m, count, depth, rows + i * ld, ld, first + j * depth, scratch.tile, kPanel);
      if (second) gemm<true>(m, count, depth, rows + i * ld + depth, ld, second + j * depth, scratch.tile, kPanel);
      for (int64_t r = 0; r < m; ++r) {
        T* const to = hidden_gradient(i + r) + j;
        const float* const from = scratch.tile + r * kPanel;
        for (int64_t c = 0; c < count; c += kLanes) {
          const int64_t there = smaller(kLanes, layout.channels - j - c);
          if (there == kLanes)
            narrow(to + c, load(from + c));
          else if (there > 0)
            narrow_part(to + c, load(from + c), there);
        }
      }
    }
  }

  void apply_absorbed(const SlotsWave& wave, int64_t in_wave, T* grad_hidden, Scratch& scratch) const {
    const SlotsChunk& chunk = plan.chunks[wave.chunk_begin + in_wave];
    const SlotsSegment& segment = plan.segments[chunk.segment];
    const int64_t padded = layout.padded, n = chunk.end - chunk.begin;
    const Statistics all = of_segment(wave, segment, scratch);
    const Op* const second = segment_reduction + (chunk.segment - wave.segment_begin) * reduction_size;
    const Op** const at = reinterpret_cast<const Op**>(scratch.rows);
    for (int64_t begin = 0; begin < n; begin += kBlock<Op>) {
      const int64_t count = smaller(kBlock<Op>, n - begin), first = chunk.begin + begin;
      const int64_t token = (chunk.offset + begin) * padded;
      differentiate(count, padded, scores + token, gradients + token, all, segment.equal, scratch.both);
      for (int64_t i = 0; i < count; ++i) at[i] = scratch.both + i * 2 * padded;
      pack_rows_transposed(at, count, 2 * padded, round_up(count, reduction<Op>::step), scratch.turned);
      list_tokens(problem, segment.batch, first, count, scratch.tokens);
      add_weighted(scratch.tokens, layout.channels, 2 * padded, scratch.turned, begin > 0, sums + in_wave * sums_size,
                   layout.wide, scratch.panel, scratch.at, [&](int64_t j, int64_t columns_here) {
                     write_hidden(count, j, columns_here, scratch.both, 2 * padded, padded, reduction_, second, scratch,
                                  [&](int64_t i) {
                                    const int64_t row = segment.batch * problem.length, at = first + i;
                                    const int64_t column = problem.columns ? problem.columns[row + at] : at;
                                    return grad_hidden + (row + column) * layout.channels;
                                  });
                   });
    }
  }

  // Gradients of a chunk's keys and values, and its part of those of the queries.
  void apply_projected(const SlotsWave& wave, int64_t in_wave, Scratch& scratch) const {
    const SlotsChunk& chunk = plan.chunks[wave.chunk_begin + in_wave];
    const SlotsSegment& segment = plan.segments[chunk.segment];
    const int64_t padded = layout.padded, n = chunk.end - chunk.begin, dim = layout.dim, wide = layout.wide_dim;
    const Statistics all = of_segment(wave, segment, scratch);
    const float* const grads = grad_rows + (chunk.segment - wave.segment_begin) * head_rows;
    const float** const at = reinterpret_cast<const float**>(scratch.rows);
    float* const both = reinterpret_cast<float*>(scratch.both);
    float* const both_turned = reinterpret_cast<float*>(scratch.turned);
    for (int64_t begin = 0; begin < n; begin += kBlock<Op>) {
      const int64_t count = smaller(kBlock<Op>, n - begin), token = chunk.offset + begin;
      differentiate(count, padded, scores + token * padded, gradients + token * padded, all, segment.equal, both);
      for (int64_t i = 0; i < count; ++i) at[i] = both + i * 2 * padded;
      pack_rows_transposed(at, count, layout.rows, count, both_turned);
      for (int64_t h = 0; h < layout.heads; ++h) {
        const int64_t row = layout.row(h, 0);
        for (int64_t i = 0; i < count; ++i) at[i] = projected + (token + i) * width + h * dim;
        pack_depth(at, count, dim, scratch.packed);
        float* const to = sums + in_wave * sums_size + row * wide;
        if (begin == 0)
          gemm<false>(layout.slots, wide, count, both_turned + row * count, count, scratch.packed, to, wide);
        else
          gemm<true>(layout.slots, wide, count, both_turned + row * count, count, scratch.packed, to, wide);
        for (int64_t part = 0; part < 2; ++part) {
          const float* const right = (part ? grads : query_rows) + h * layout.slots * wide;
          for (int64_t i = 0; i < count; i += kTileRows) {
            const int64_t m = smaller(kTileRows, count - i);
            gemm<false>(m, wide, layout.slots, both + i * 2 * padded + part * padded + row, 2 * padded, right,
                        scratch.tile, wide);
            for (int64_t r = 0; r < m; ++r) {
              Op* const out = change + (token + i + r) * width + part * layout.wide_width + h * dim;
              for (int64_t c = 0; c < dim; c += kLanes)
                narrow_part(out + c, load(scratch.tile + r * wide + c), smaller(kLanes, dim - c));
            }
          }
        }
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t part = 0; part < 2; ++part)
          __builtin_memset(change + (token + i) * width + part * layout.wide_width + layout.width, 0,
                           (layout.wide_width - layout.width) * sizeof(Op));
    }
  }

  // Keys and values of a block of tokens of any segments.
  void project_block(const SlotsWave& wave, int64_t first, Scratch& scratch) const {
    list_places(problem, plan.places + wave.place + first, smaller(kBlock<Op>, wave.tokens - first), scratch.tokens);
    products<false>(scratch.tokens, layout.channels, width, columns, projected + first * width, width, scratch.copy,
                    scratch.at);
  }

  // What the gradients of a block's keys and values send to hidden; and those gradients, by column.
  void hidden_block(const SlotsWave& wave, int64_t first, T* grad_hidden, const Scratch& scratch) const {
    const int64_t n = smaller(kBlock<Op>, wave.tokens - first);
    const int64_t* const places = plan.places + wave.place + first;
    const Op* const rows = change + first * width;
    for (int64_t j = 0; j < layout.wide; j += kPanel)
      write_hidden(n, j, smaller(kPanel, layout.wide - j), rows, width, width, reduction_, nullptr, scratch,
                   [&](int64_t i) { return grad_hidden + places[i] * layout.channels; });
    const Op** const at = reinterpret_cast<const Op**>(scratch.rows);
    for (int64_t i = 0; i < n; ++i) at[i] = rows + i * width;
    pack_rows_transposed(at, n, width, round_up(n, reduction<Op>::step), turned + first * width);
  }

  // Gradients of both weights, a panel of channels: all tokens of the wave in order.
  void weigh_panel(const SlotsWave& wave, int64_t j, bool onto, Scratch& scratch) const {
    const int64_t count = smaller(kPanel, layout.wide - j);
    for (int64_t first = 0; first < wave.tokens; first += kBlock<Op>, onto = true) {
      const int64_t n = smaller(kBlock<Op>, wave.tokens - first), k = round_up(n, reduction<Op>::step);
      list_places(problem, plan.places + wave.place + first, n, scratch.tokens);
      pack_panel(scratch.tokens, layout.channels, j, scratch.panel, scratch.at);
      if (onto)
        gemm<true>(width, count, k, turned + first * width, k, scratch.panel, sum_weights + j, layout.wide);
      else
        gemm<false>(width, count, k, turned + first * width, k, scratch.panel, sum_weights + j, layout.wide);
    }
  }

  // One row of the sums for the queries over the chunks of a wave.
  void add_queries(const SlotsWave& wave, int64_t row, bool onto) const {
    const int64_t n = plan.absorbed ? layout.wide : layout.wide_dim;
    float* const to = sum_queries + row * n;
    for (int64_t j = 0; j < n; j += kLanes) {
      Vec x = onto ? load(to + j) : zeros();
      for (int64_t c = 0; c < wave.chunk_end - wave.chunk_begin; ++c)
        x = add(x, load(sums + c * sums_size + row * n + j));
      store(to + j, x);
    }
  }

  // Absorbed: sum over segments of grad_out^T (weighted means), channels [k0, k0 + kFold) of one head.
  void add_values(const SlotsWave& wave, const T* grad_out, int64_t h, int64_t k0, bool onto,
                  const Scratch& scratch) const {
    const int64_t slots = layout.slots, dim = layout.dim, wide = layout.wide, there = folded_channels(k0);
    const int64_t total = (wave.segment_end - wave.segment_begin) * slots;
    const float** const rows = reinterpret_cast<const float**>(scratch.rows);
    float *const left = scratch.pieces, *const means = left + kPiece * dim;
    for (int64_t first = 0; first < total; first += kPiece, onto = true) {
      const int64_t k = smaller(kPiece, total - first);
      for (int64_t i = 0; i < k; ++i) {
        const SlotsSegment& x = plan.segments[wave.segment_begin + (first + i) / slots];
        const int64_t m = (first + i) % slots;
        scratch.at[i] = grad_of(grad_out, x).data + m * layout.width + h * dim;
        const float* const from =
            sums + (x.chunk_begin - wave.chunk_begin) * sums_size + (layout.padded + layout.row(h, m)) * wide + k0;
        for (int64_t j = 0; j < round_up(there, kLanes); j += kLanes) {
          Vec v = zeros();
          for (int64_t c = 0; c < x.chunk_end - x.chunk_begin; ++c) v = add(v, load(from + c * sums_size + j));
          store(means + i * kFold + j, v);
        }
        rows[i] = means + i * kFold;
      }
      pack_depth(rows, k, there, scratch.packed);
      pack_rows_transposed<float>(scratch.at, k, dim, k, left);
      float* const to = sum_weights + h * dim * wide + k0;
      if (onto)
        gemm<true>(dim, round_up(there, kLanes), k, left, k, scratch.packed, to, wide);
      else
        gemm<false>(dim, round_up(there, kLanes), k, left, k, scratch.packed, to, wide);
    }
  }

  void write_rows(const float* from, int64_t ldf, int64_t rows, int64_t k0, T* to) const {
    const int64_t there = folded_channels(k0);
    for (int64_t e = 0; e < rows; ++e)
      for (int64_t c = 0; c < there; c += kLanes)
        narrow_part(to + e * layout.channels + k0 + c, load(from + e * ldf + c), smaller(kLanes, there - c));
  }

  // Absorbed: gradient of k_weight = scale * queries^T (sums), of v_weight the sums; one head, kFold channels.
  void write_weights(int64_t h, int64_t k0, const LocalSlotsGradients& out, const Scratch& scratch) const {
    const int64_t slots = layout.slots, dim = layout.dim, there = folded_channels(k0);
    const float** const rows = reinterpret_cast<const float**>(scratch.rows);
    float *const left = scratch.pieces, *const result = left + kPiece * dim;
    const Matrix<T> q = slot_queries();
    constexpr int64_t kRows = kPiece;  // of the result at a time
    for (int64_t e = 0; e < dim; e += kRows) {
      const int64_t m = smaller(kRows, dim - e);
      for (int64_t first = 0; first < slots; first += kPiece) {
        const int64_t k = smaller(kPiece, slots - first);
        for (int64_t i = 0; i < k; ++i) {
          scratch.at[i] = q.data + (first + i) * q.row + h * dim + e;
          rows[i] = sum_queries + layout.row(h, first + i) * layout.wide + k0;
        }
        pack_depth(rows, k, there, scratch.packed);
        pack_rows_transposed<float>(scratch.at, k, m, k, left);
        if (first > 0)
          gemm<true>(m, round_up(there, kLanes), k, left, k, scratch.packed, result, kFold);
        else
          gemm<false>(m, round_up(there, kLanes), k, left, k, scratch.packed, result, kFold);
      }
      const Vec scale = splat(layout.scale());
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < round_up(there, kLanes); c += kLanes)
          store(result + i * kFold + c, mul(load(result + i * kFold + c), scale));
      write_rows(result, kFold, m, k0, static_cast<T*>(out.k_weight) + (h * dim + e) * layout.channels);
    }
    write_rows(sum_weights + h * dim * layout.wide + k0, layout.wide, dim, k0,
               static_cast<T*>(out.v_weight) + h * dim * layout.channels);
  }

  void write_queries(int64_t h, T* out, const Scratch& scratch) const {
    const int64_t slots = layout.slots, dim = layout.dim, ldo = round_up(slots, kLanes);
    if (plan.absorbed)
      project(k_weight(), h * dim, dim, layout.channels, slots, scratch.result, scratch.project,
              [&](int64_t k0, int64_t k, float* to) {
                for (int64_t m = 0; m < slots; ++m)
                  __builtin_memcpy(to + m * kPiece, sum_queries + layout.row(h, m) * layout.wide + k0,
                                   k * sizeof(float));
              });
    for (int64_t m = 0; m < slots; ++m) {
      for (int64_t e = 0; e < dim; e += kLanes) {
        alignas(64) float row[kLanes];
        const int64_t n = smaller(kLanes, dim - e);
        for (int64_t i = 0; i < n; ++i)
          row[i] = layout.scale() * (plan.absorbed ? scratch.result[(e + i) * ldo + m]
                                                   : sum_queries[layout.row(h, m) * layout.wide_dim + e + i]);
        narrow_part(out + m * layout.width + h * dim + e, load_part(row, n), n);
      }
    }
  }

  static LocalSlotsSizes sizes(const LocalSlotsProblem& problem, const LocalSlotsPlan& plan) {
    Carve shared(nullptr), scratch(nullptr);
    const Backward call(problem, plan, shared);
    Scratch(call.layout, scratch);
    return {shared.bytes(), scratch.bytes()};
  }

  void run(const T* grad_out, const LocalSlotsGradients& out, const LocalSlotsMemory& memory,
           Execution execution) const {
    T* const grad_hidden = static_cast<T*>(out.hidden);
    const auto on = [&](int64_t items, const auto& body) {
      each(execution, items, [&](int64_t item, int worker) {
        Carve carve(memory.scratch + worker * memory.scratch_size);
        Scratch scratch(layout, carve);
        body(item, scratch);
      });
    };
    on(folds() + !plan.absorbed, [&](int64_t i, Scratch& s) { prepare(i, s); });
    for (int64_t w = 0; w < plan.wave_count; ++w) {
      const SlotsWave& wave = plan.waves[w];
      const int64_t segments = wave.segment_end - wave.segment_begin, chunks = wave.chunk_end - wave.chunk_begin;
      const int64_t blocks = (wave.tokens + kBlock<Op> - 1) / kBlock<Op>;
      if (plan.absorbed) {
        on(segments * folds(), [&](int64_t i, Scratch& s) {
          const int64_t x = i / folds();
          fold_gradient(grad_out, plan.segments[wave.segment_begin + x], x, i % folds() * kFold, s);
        });
        on(chunks, [&](int64_t i, Scratch& s) { scan(wave, i, s); });
        on(chunks, [&](int64_t i, Scratch& s) { apply_absorbed(wave, i, grad_hidden, s); });
        on(layout.heads * folds(), [&](int64_t i, Scratch& s) {
          add_values(wave, grad_out, i / folds(), i % folds() * kFold, w > 0, s);
        });
      } else {
        on(blocks, [&](int64_t i, Scratch& s) { project_block(wave, i * kBlock<Op>, s); });
        on(segments, [&](int64_t i, Scratch& s) {
          pack_slots(grad_of(grad_out, plan.segments[wave.segment_begin + i]), 1.0f, grad_columns + i * head_columns,
                     grad_rows + i * head_rows, s);
        });
        on(chunks, [&](int64_t i, Scratch& s) { scan(wave, i, s); });
        on(chunks, [&](int64_t i, Scratch& s) { apply_projected(wave, i, s); });
        on(blocks, [&](int64_t i, Scratch& s) { hidden_block(wave, i * kBlock<Op>, grad_hidden, s); });
        on((layout.wide + kPanel - 1) / kPanel,
           [&](int64_t i, Scratch& s) { weigh_panel(wave, i * kPanel, w > 0, s); });
      }
      on(layout.heads * layout.slots, [&](int64_t i, Scratch&) {
        add_queries(wave, layout.row(i / layout.slots, i % layout.slots), w > 0);
      });
    }
    on(layout.heads * folds(), [&](int64_t i, Scratch& s) {
      const int64_t h = i / folds(), k0 = i % folds() * kFold;
      if (plan.absorbed) return write_weights(h, k0, out, s);
      const float* const from = sum_weights + h * layout.dim * layout.wide + k0;
      const int64_t to = h * layout.dim * layout.channels;
      write_rows(from, layout.wide, layout.dim, k0, static_cast<T*>(out.k_weight) + to);
      write_rows(from + layout.wide_width * layout.wide, layout.wide, layout.dim, k0,
                 static_cast<T*>(out.v_weight) + to);
    });
    on(layout.heads, [&](int64_t h, Scratch& s) { write_queries(h, static_cast<T*>(out.queries), s); });
  }
};

}  // namespace

LocalSlotsSizes local_slots_backward_sizes(const LocalSlotsProblem& problem, const LocalSlotsPlan& plan) {
  return with_element(problem.element,
                      [&](auto zero) { return Backward<decltype(zero)>::sizes(problem, plan); });
}

void local_slots_backward_run(const LocalSlotsProblem& problem, const LocalSlotsPlan& plan, const void* grad_out,
                              const LocalSlotsGradients& gradients, const LocalSlotsMemory& memory,
                              Execution execution) {
  with_element(problem.element, [&](auto zero) {
    using T = decltype(zero);
    Carve shared(memory.shared);
    Backward<T>(problem, plan, shared).run(static_cast<const T*>(grad_out), gradients, memory, execution);
  });
}

}  // namespace hici::cpu::HICI_PATH
