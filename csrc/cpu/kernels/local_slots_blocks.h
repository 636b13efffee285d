// What the forward and backward passes of local_slots share: sizes, and the two products with blocks of hidden rows.
#pragma once

#include "../local_slots.h"
#include "attention_rows.h"

namespace hici::cpu::HICI_PATH {

// Calls body(item, worker) for item = 0..items-1.
template <class Body>
inline void each(Execution execution, int64_t items, const Body& body) {
  for_items(
      execution, items,
      [](void* context, int64_t item, int worker) {
        tiles_begin();
        (*static_cast<const Body*>(context))(item, worker);
        tiles_end();
      },
      const_cast<Body*>(&body));
}

// Columns of an operand that is also a reduction, and rows of sums, are padded to this.
template <class Op>
constexpr int64_t kAlign = reduction<Op>::step > kLanes ? reduction<Op>::step : kLanes;

// Tokens per block. A packed panel of hidden (block x kPanel) stays in the first-level cache.
template <class Op>
constexpr int64_t kBlock = sizeof(Op) == 2 ? 192 : 96;

// Channels per pass over a block for scores: what is packed of the other operand stays in the second-level cache.
template <class Op>
constexpr int64_t kCut = sizeof(Op) == 2 ? 512 : 256;

// Rows of A between two requests for memory: what the registers of a product hold.
#if defined(HICI_PATH_AMX)
constexpr int64_t kGroup = 32;
#else
constexpr int64_t kGroup = kStrip;
#endif

// Rows (head, slot) lie slot_stride apart per head. absorbed: they are the columns of one product, so heads follow each
// other closely; projected: each head is a product of its own.
template <class Op>
struct Layout {
  int64_t channels, slots, heads, width, dim;
  int64_t slot_stride, rows, padded;  // padded: rows as columns of scores
  int64_t wide;                       // channels as columns
  int64_t wide_dim, wide_width;       // dim and width as columns

  Layout(const LocalSlotsProblem& p, bool absorbed)
      : channels(p.channels), slots(p.slots), heads(p.heads), width(p.width), dim(p.width / p.heads) {
    slot_stride = absorbed ? slots : round_up(slots, kLanes);
    rows = heads * slot_stride;
    padded = round_up(rows, kAlign<Op>);
    wide = round_up(channels, kLanes);
    wide_dim = round_up(dim, kLanes);
    wide_width = round_up(width, kAlign<Op>);
  }
  int64_t depth() const { return round_up(channels, reduction<Op>::step); }
  int64_t row(int64_t head, int64_t slot) const { return head * slot_stride + slot; }
  float scale() const { return static_cast<float>(1 / __builtin_sqrt(static_cast<double>(dim))); }
};

// A block of hidden rows. step: elements between neighbours if that is the same for all of them, else 0.
template <class T>
struct Tokens {
  const T** rows;
  int64_t count, step;
};

template <class T>
inline void list_tokens(const LocalSlotsProblem& p, int64_t batch, int64_t begin, int64_t count, Tokens<T>& tokens) {
  const T* const base = static_cast<const T*>(p.hidden) + batch * p.hidden_batch;
  if (!p.columns) {
    for (int64_t i = 0; i < count; ++i) tokens.rows[i] = base + (begin + i) * p.hidden_token;
  } else {
    const int64_t* const columns = p.columns + batch * p.length + begin;
    for (int64_t i = 0; i < count; ++i) tokens.rows[i] = base + columns[i] * p.hidden_token;
  }
  tokens.count = count;
  const bool adjacent = !p.columns || p.columns[batch * p.length + begin + count - 1] -
                                              p.columns[batch * p.length + begin] == count - 1;
  tokens.step = adjacent ? p.hidden_token : 0;
}

// Tokens by place: row * length + column.
template <class T>
inline void list_places(const LocalSlotsProblem& p, const int64_t* places, int64_t count, Tokens<T>& tokens) {
  bool regular = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = places[i] / p.length, column = places[i] % p.length;
    tokens.rows[i] = static_cast<const T*>(p.hidden) + row * p.hidden_batch + column * p.hidden_token;
    regular &= places[i] == places[0] + i && row == places[0] / p.length;
  }
  tokens.count = count;
  tokens.step = regular ? p.hidden_token : 0;
}

template <class T>
inline void offset_rows(const T* const* rows, int64_t count, int64_t by, const T** out) {
  for (int64_t i = 0; i < count; ++i) out[i] = rows[i] + by;
}

HICI_ASK void ask_for_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// An operand over the channels, columns x channels, packed in pieces of kCut channels: piece k0 begins at k0 * columns.
//
// out[i][j] (+)= sum_k tokens[i][k] packed[k][j]: hidden rows are read in place wherever they are what the product
// takes. copy: kBlock x kCut; at: kBlock.
template <bool Accumulate, class Op, class T>
inline void products(const Tokens<T>& tokens, int64_t channels, int64_t columns, const Op* packed, float* out,
                     int64_t ldo, Op* copy, const T** at) {
  const int64_t n = tokens.count;
  for (int64_t k0 = 0; k0 < channels; k0 += kCut<Op>) {
    const int64_t there = smaller(kCut<Op>, channels - k0), k = round_up(there, reduction<Op>::step);
    const Op* a = copy;
    int64_t lda = kCut<Op>;
    bool in_place = false;
    if constexpr (sizeof(Op) == sizeof(T)) {
      if (there == k && (tokens.step != 0 || n == 1)) {
        in_place = true;
        a = reinterpret_cast<const Op*>(tokens.rows[0] + k0);
        lda = tokens.step;
      }
    }
    if (!in_place) {
      offset_rows(tokens.rows, n, k0, at);
      pack_rows<Op>(at, n, there, lda, copy);
    }
    const Op* b = packed + k0 * columns;
    for (int64_t j = 0; j < columns; j += kPanel, b += kPanel * k) {
      const int64_t panel = smaller(kPanel, columns - j);
      for (int64_t i = 0; i < n; i += kGroup) {
        const int64_t m = smaller(kGroup, n - i);
        if (j == 0 && in_place) {
          for (int64_t r = i + kGroup; r < smaller(n, i + 2 * kGroup); ++r)
            for (int64_t c = 0; c < there; c += 64 / static_cast<int64_t>(sizeof(Op)))
              ask_for_line(a + r * lda + c);
        }
        float* const to = out + i * ldo + j;
        if (k0 == 0 && !Accumulate) {
          gemm<false>(m, panel, k, a + i * lda, lda, b, to, ldo);
        } else if constexpr (sizeof(Op) == sizeof(float)) {
          // in parts: a chain of additions over thousands of channels would err more than a score may
          alignas(64) float part[kGroup * kPanel];
          gemm<false>(m, panel, k, a + i * lda, lda, b, part, panel);
          for (int64_t r = 0; r < m; ++r)
            for (int64_t c = 0; c < panel; c += kLanes)
              store(to + r * ldo + c, add(load(to + r * ldo + c), load(part + r * panel + c)));
        } else {
          gemm<true>(m, panel, k, a + i * lda, lda, b, to, ldo);
        }
      }
    }
  }
}

// Largest difference between two scores of a column.
inline float spread(int64_t n, int64_t columns, const float* scores) {
  Vec most = zeros();
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec high = load(scores + j), low = sub(zeros(), high);
    for (int64_t i = 1; i < n; ++i) {
      const Vec x = load(scores + i * columns + j);
      high = max(high, x), low = max(low, sub(zeros(), x));
    }
    most = max(most, add(high, low));
  }
  return reduce_max(most);
}

// Scores of hidden rows against folded queries. bfloat16: the folded queries are kept in two parts, their rounding and
// what it left, the second depth * columns elements after the first. Rounding errs in proportion to the differences
// between scores, and only large ones shift weights by more than the weights' own rounding: then both parts are used.
constexpr float kPlainSpread = 12;
template <class Op, class T>
inline void score(const Tokens<T>& tokens, int64_t channels, int64_t columns, const Op* packed, float* out, Op* copy,
                  const T** at) {
  products<false>(tokens, channels, columns, packed, out, columns, copy, at);
  if constexpr (sizeof(Op) == 2) {
    if (!(spread(tokens.count, columns, out) <= kPlainSpread))
      products<true>(tokens, channels, columns, packed + round_up(channels, reduction<Op>::step) * columns, out,
                     columns, copy, at);
  }
}

// Columns [j, j + kPanel) of the rows as reduction, packed. panel: kBlock x kPanel.
template <class Op, class T>
inline void pack_panel(const Tokens<T>& tokens, int64_t channels, int64_t j, Op* panel, const T** at) {
  offset_rows(tokens.rows, tokens.count, j, at);
  pack_depth(at, tokens.count, smaller(kPanel, channels - j), panel);
}

// sums[r][j] (+)= sum_i weights[r][i] tokens[i][j]; weights of `rows` rows, round_up(tokens.count, step) apart. Columns
// in panels, and after each of them also(j, columns), while it is near.
template <class Op, class T, class Also>
inline void add_weighted(const Tokens<T>& tokens, int64_t channels, int64_t rows, const Op* weights, bool onto,
                         float* sums, int64_t lds, Op* panel, const T** at, const Also& also) {
  const int64_t n = tokens.count, k = round_up(n, reduction<Op>::step);
  for (int64_t j = 0; j < channels; j += kPanel) {
    const int64_t columns = smaller(kPanel, round_up(channels - j, kLanes));
    pack_panel(tokens, channels, j, panel, at);
    // the next panel is far away in every row: asked for while this one is multiplied
    const int64_t next = j + kPanel, bytes = smaller(kPanel, channels - next) * static_cast<int64_t>(sizeof(T));
    const int64_t groups = (rows + kGroup - 1) / kGroup, share = (n + groups - 1) / groups;
    int64_t token = 0;
    for (int64_t i = 0; i < rows; i += kGroup) {
      for (int64_t end = smaller(n, token + share); token < end; ++token)
        for (int64_t c = 0; c < bytes; c += 64)
          ask_for_line(reinterpret_cast<const char*>(tokens.rows[token] + next) + c);
      const int64_t m = smaller(kGroup, rows - i);
      if (onto) {
        for (int64_t r = i; next < channels && r < i + m; ++r)
          for (int64_t c = 0; c < columns; c += 16) ask_for_line(sums + r * lds + next + c);
        gemm<true>(m, columns, k, weights + i * k, k, panel, sums + i * lds + j, lds);
      } else {
        gemm<false>(m, columns, k, weights + i * k, k, panel, sums + i * lds + j, lds);
      }
    }
    also(j, columns);
  }
}

// The small products, with weights and in float: few multiplications, and nothing is rounded on the way.

// Channels that an item of a fold covers: whole panels, a part of kCut.
constexpr int64_t kFold = 128;
// Reduction per piece of a small product.
constexpr int64_t kPiece = 256;

template <class T>
struct Matrix {
  const T* data;
  int64_t row;  // elements
};

template <class T>
struct FoldScratch {
  const T** at;
  float *left, *right;

  template <class Op>
  FoldScratch(const Layout<Op>& layout, Carve& carve) {
    at = carve.take<const T*>(kPiece);
    left = carve.take<float>(layout.slots * layout.width);
    right = carve.take<float>(kPiece * kFold);
  }
};

// out[row(h, m)][k] = scale * sum_e left[m][h dim + e] weight[h dim + e][k0 + k], k < kFold; other rows and channels
// are set to zero. left: [slots, width].
template <class Op, class T>
inline void fold(const Layout<Op>& layout, const Matrix<T>& left, const Matrix<T>& weight, float scale, int64_t k0,
                 float* out, const FoldScratch<T>& scratch) {
  const int64_t there = smaller(kFold, layout.channels - k0), columns = round_up(there, kLanes), dim = layout.dim;
  __builtin_memset(out, 0, layout.padded * kFold * sizeof(float));
  for (int64_t m = 0; m < layout.slots; ++m) {
    const T* const from = left.data + m * left.row;
    pack_rows<float>(&from, 1, layout.width, layout.width, scratch.left + m * layout.width);
  }
  for (int64_t h = 0; h < layout.heads; ++h) {
    float* const to = out + layout.row(h, 0) * kFold;
    for (int64_t e = 0; e < dim; e += kPiece) {
      const int64_t k = smaller(kPiece, dim - e);
      for (int64_t i = 0; i < k; ++i) scratch.at[i] = weight.data + (h * dim + e + i) * weight.row + k0;
      pack_depth(scratch.at, k, there, scratch.right);
      gemm<true>(layout.slots, columns, k, scratch.left + h * dim + e, layout.width, scratch.right, to, kFold);
    }
  }
  const Vec factor = splat(scale);
  for (int64_t i = 0; i < layout.padded * kFold; i += kLanes) store(out + i, mul(load(out + i), factor));
}

// What rounding leaves of rows of floats, kFold apart.
template <class Op>
inline void subtract(float* rows, int64_t count, const Op* low) {
  for (int64_t i = 0; i < count * kFold; i += kLanes) store(rows + i, sub(load(rows + i), widen(low + i)));
}

// Rows of floats, kFold apart, in the operand's type. Without a change of type, the rows themselves.
template <class Op>
inline const Op* rounded(const float* rows, int64_t count, Op* out) {
  if constexpr (sizeof(Op) == sizeof(float)) {
    return rows;
  } else {
    for (int64_t i = 0; i < count * kFold; i += kLanes) narrow(out + i, load(rows + i));
    return out;
  }
}

// Channels [k0, k0 + kFold) of `columns` rows (kFold apart) into the operand that score() takes.
template <class Op>
inline void pack_score(int64_t channels, int64_t columns, const Op* rows, int64_t k0, const Op** at, Op* packed) {
  const int64_t piece = k0 / kCut<Op> * kCut<Op>;
  const int64_t depth = smaller(kCut<Op>, round_up(channels, reduction<Op>::step) - piece);
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t panel = smaller(kPanel, columns - j);
    for (int64_t i = 0; i < panel; ++i) at[i] = rows + (j + i) * kFold;
    pack_columns(at, panel, smaller(kFold, channels - k0), packed + piece * columns + j * depth + (k0 - piece) * panel);
  }
}

// to[m][e] = scale * from[m][e], rows of `width` floats.
template <class Op, class T>
inline void scaled_rows(const Layout<Op>& layout, const Matrix<T>& from, float scale, float* to) {
  for (int64_t m = 0; m < layout.slots; ++m) {
    const T* const row = from.data + m * from.row;
    pack_rows<float>(&row, 1, layout.width, layout.width, to + m * layout.width);
  }
  for (int64_t i = 0; i < layout.slots * layout.width; ++i) to[i] *= scale;
}

// Each head of rows [slots, width] as columns: head h begins at h * dim * slot_stride.
template <class Op>
inline void pack_heads(const Layout<Op>& layout, const float* rows, float* packed) {
  for (int64_t h = 0; h < layout.heads; ++h) {
    const int64_t dim = layout.dim;
    float* to = packed + h * dim * layout.slot_stride;
    for (int64_t m = 0; m < layout.slots; m += kPanel) {
      const float* at[kPanel];
      const int64_t n = smaller(kPanel, layout.slots - m);
      for (int64_t i = 0; i < n; ++i) at[i] = rows + (m + i) * layout.width + h * dim;
      pack_columns(at, n, dim, to + m * dim);
    }
  }
}

// Columns [j, j + count) of both weights, wide_width of each: their rows at channel k0, and `none` (kFold elements)
// where one is padded.
template <class Op, class T>
inline void list_weights(const Layout<Op>& layout, const Matrix<T>& k_weight, const Matrix<T>& v_weight, int64_t k0,
                         int64_t j, int64_t count, T* none, const T** at) {
  __builtin_memset(none, 0, kFold * sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    const bool second = j + i >= layout.wide_width;
    const Matrix<T>& weight = second ? v_weight : k_weight;
    const int64_t e = j + i - (second ? layout.wide_width : 0);
    at[i] = e < layout.width ? weight.data + e * weight.row + k0 : none;
  }
}

// Channels [k0, k0 + kFold) of both weights into the operand that products() takes. at: kPanel.
template <class Op, class T>
inline void pack_weights(const Layout<Op>& layout, const Matrix<T>& k_weight, const Matrix<T>& v_weight, int64_t k0,
                         T* none, const T** at, Op* packed) {
  const int64_t columns = 2 * layout.wide_width, piece = k0 / kCut<Op> * kCut<Op>;
  const int64_t depth = smaller(kCut<Op>, layout.depth() - piece);
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t panel = smaller(kPanel, columns - j);
    list_weights(layout, k_weight, v_weight, k0, j, panel, none, at);
    pack_columns(at, panel, smaller(kFold, layout.channels - k0),
                 packed + piece * columns + j * depth + (k0 - piece) * panel);
  }
}

template <class T>
struct ProjectScratch {
  const T** at;
  const float** rows;
  float *weight, *piece, *packed;

  // columns: of the product, padded
  ProjectScratch(int64_t columns, Carve& carve) {
    at = carve.take<const T*>(kLanes);
    rows = carve.take<const float*>(columns);
    weight = carve.take<float>(kRowsAtOnce * kPiece);
    piece = carve.take<float>(columns * kPiece);
    packed = carve.take<float>(columns * kPiece);
  }
  static constexpr int64_t kRowsAtOnce = 48;
};

// out[e][c] = sum_k weight[first + e][k] x(c, k), e < count, c < columns: fill(k0, n, to) writes x(c, k0 + k) to
// to[c * kPiece + k]. out: rows ldo = round_up(columns, kLanes) apart.
template <class T, class Fill>
inline void project(const Matrix<T>& weight, int64_t first, int64_t count, int64_t channels, int64_t columns,
                    float* out, const ProjectScratch<T>& scratch, const Fill& fill) {
  const int64_t ldo = round_up(columns, kLanes);
  for (int64_t k0 = 0; k0 < channels; k0 += kPiece) {
    const int64_t k = smaller(kPiece, channels - k0);
    fill(k0, k, scratch.piece);
    for (int64_t c = 0; c < columns; ++c) scratch.rows[c] = scratch.piece + c * kPiece;
    pack_columns(scratch.rows, columns, k, scratch.packed);
    for (int64_t e = 0; e < count; e += scratch.kRowsAtOnce) {
      const int64_t m = smaller(scratch.kRowsAtOnce, count - e);
      for (int64_t i = 0; i < m; ++i) {
        const T* const from = weight.data + (first + e + i) * weight.row + k0;
        pack_rows<float>(&from, 1, k, k, scratch.weight + i * k);
      }
      if (k0 == 0)
        gemm<false>(m, ldo, k, scratch.weight, k, scratch.packed, out + e * ldo, ldo);
      else
        gemm<true>(m, ldo, k, scratch.weight, k, scratch.packed, out + e * ldo, ldo);
    }
  }
}

}  // namespace hici::cpu::HICI_PATH
