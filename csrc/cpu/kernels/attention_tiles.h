// attention, forward, on tiles: what a block of keys does to a tile of rows.
//
// Scores are formed for 32 rows and 32 keys at a time, four tiles, and become weights at once, so that they are never in
// more than the first cache. A row's weights, powers of 2, are taken at a level that moves only when a score is kTileLag
// above it, and then to an integer: what the row has summed, and the weights that wait for their values, are scaled by a
// power of two, exactly.
//
// Tiles work beside the vector units, as far as a processor looks ahead. So while weights of some keys are formed, a row at
// a time, tiles form the scores of the next ones and add up the values of the rows before, a few products at a time.
#pragma once

#include "attention_rows.h"

namespace hici::cpu::HICI_PATH {

constexpr int64_t kTileEdge = 32;  // rows, keys and values of a block of 2 x 2 tiles
constexpr int kTogether = 4;       // rows whose weights are formed together: one alone waits for itself
constexpr float kTileLag = 8.0f;   // weights up to 2^8: float32 sums lose nothing
// The level of a row that has seen nothing: finite, since -inf less -inf is not a number.
constexpr float kNoLevel = -__FLT_MAX__;

// Rows of a tile that meet a block of keys together.
struct TileStrip {
  int64_t first, count;  // rows, up to kTileEdge
  int64_t most, least;   // keys of the block that any of them sees, that all of them see
};

// Rows of a tile. q and o have memory for a multiple of kTileEdge of them; those beyond are zero in q.
struct TileRows {
  const bfloat16* q;
  float *o, *total, *top;  // sums of values; of weights, in lanes; levels
  const int64_t* visible;  // keys of the block that a row sees
  int64_t depth, width;    // padded dim as reduction, as columns
};

template <class T>
class BlockInTiles {
 public:
  // n keys are packed in k and v; p [2][kTileEdge][round_up(n, kTileEdge)], s [2][kTileEdge][kTileEdge]
  BlockInTiles(const TileRows& rows, const bfloat16* k, const bfloat16* v, int64_t n, float scale, bfloat16* p, float* s)
      : x_(rows), k_(k), v_(v), columns_(round_up(n, kLanes)), keys_(round_up(n, kTileEdge)), p_(p), s_(s),
        factor_(splat(Weights<T>::factor_of(scale))) {}

  void meet(const TileStrip* strips, int64_t count, Ahead<T>& ahead) {
    if (count == 0) return;
    const int64_t blocks = (x_.width + kTileEdge - 1) / kTileEdge;
    int buffer = 0;
    start_scores(strips[0], 0, buffer);
    finish();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t chunks = (strips[i].most + kTileEdge - 1) / kTileEdge, rows = strips[i].count;
      const int64_t late = i > 0 ? blocks : 0;  // of values, which the strip before waits for
      const int64_t value_steps = i > 0 ? round_up(strips[i - 1].most, kTileEdge) / kTileEdge + 2 : 0;
      const int64_t steps = chunks * (x_.depth / kTileEdge + 2) + late * value_steps;
      int64_t owed = 0, added = 0;  // steps times chunks times rows; blocks of values
      for (int64_t c = 0; c < chunks; ++c, buffer ^= 1) {
        const bool last = c + 1 == chunks, wanted = !last || i + 1 < count;
        bool scores = false;
        // the next step of tiles; false where there is none for now
        const auto advance = [&] {
          if (!job_.open()) {
            if (wanted && !scores) {
              start_scores(strips[last ? i + 1 : i], last ? 0 : c + 1, buffer ^ 1), scores = true;
            } else if (added * chunks < late * (c + 1)) {
              start_values(strips[i - 1], (i - 1) % 2, added++);
            } else {
              return false;
            }
          }
          job_.step();
          return true;
        };
        weigh(strips[i], i % 2, c, buffer, [&](int64_t done) {
          if (c == 0) ahead.after(done);
          for (owed += done * steps; owed >= chunks * rows; owed -= chunks * rows)
            if (!advance()) break;
        });
        // the next scores must be there; values may go on
        while (wanted && (!scores || job_.of_scores())) advance();
      }
      finish();
      for (; added < late; ++added) start_values(strips[i - 1], (i - 1) % 2, added), finish();
    }
    for (int64_t b = 0; b < blocks; ++b) start_values(strips[count - 1], (count - 1) % 2, b), finish();
  }

 private:
  // A block of 2 x 2 tiles, or 2 x 1, on its way.
  class Job {
   public:
    bool open() const { return c_ != nullptr; }
    bool of_scores() const { return open() && !onto_; }
    void start(bool onto, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb, float* c, int64_t ldc,
               bool wide) {
      onto_ = onto, wide_ = wide, t_ = -kTileEdge, k_ = k, lda_ = lda, ldb_ = ldb, ldc_ = ldc, a_ = a, b_ = b, c_ = c;
    }
    void step() { wide_ ? step<2>() : step<1>(); }

   private:
    template <int COLUMNS>
    void step() {
      if (t_ < 0) {
        onto_ ? tile_open<2, COLUMNS, true>(c_, ldc_) : tile_open<2, COLUMNS, false>(c_, ldc_);
      } else if (t_ < k_) {
        tile_step<2, COLUMNS>(a_ + t_, lda_, b_ + t_ / 2 * ldb_, ldb_);
      } else {
        tile_close<2, COLUMNS>(c_, ldc_);
        c_ = nullptr;
      }
      t_ += kTileEdge;
    }

    bool onto_ = false, wide_ = false;
    int64_t t_ = 0, k_ = 0, lda_ = 0, ldb_ = 0, ldc_ = 0;
    const bfloat16 *a_ = nullptr, *b_ = nullptr;
    float* c_ = nullptr;
  };

  bfloat16* weights(int64_t which) const { return p_ + which * kTileEdge * keys_; }

  void finish() {
    while (job_.open()) job_.step();
  }

  void start_scores(const TileStrip& strip, int64_t chunk, int buffer) {
    float* const to = s_ + buffer * kTileEdge * kTileEdge;
    start(false, x_.depth, x_.q + strip.first * x_.depth, x_.depth, k_, x_.depth, columns_, chunk * kTileEdge, to, kTileEdge);
  }

  void start_values(const TileStrip& strip, int64_t which, int64_t block) {
    const int64_t j = block * kTileEdge;
    float* const to = x_.o + strip.first * x_.width + j;
    start(true, round_up(strip.most, kTileEdge), weights(which), keys_, v_, keys_, x_.width, j, to, x_.width);
  }

  // Columns [j, j + kTileEdge) of C (+)= A B, B packed with `columns` of them.
  void start(bool onto, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t k_total, int64_t columns,
             int64_t j, float* c, int64_t ldc) {
    const int64_t from = j / kPanel * kPanel, ldb = 2 * smaller(kPanel, columns - from);
    job_.start(onto, k, a, lda, b + from * k_total + 2 * (j - from), ldb, c, ldc, j + kTileEdge <= columns);
  }

  // Scores of a chunk of keys become weights. between(n) is called after every n rows.
  template <class Between>
  void weigh(const TileStrip& strip, int64_t which, int64_t chunk, int buffer, const Between& between) const {
    const float* const s = s_ + buffer * kTileEdge * kTileEdge;
    bfloat16* const p = weights(which);
    const int64_t j = chunk * kTileEdge;
    int64_t r = 0;
    if (strip.least >= j + kTileEdge)
      for (; r + kTogether <= strip.count; r += kTogether) {
        weigh_rows<kTogether>(strip.first + r, j, s + r * kTileEdge, p + r * keys_, kTileEdge);
        between(kTogether);
      }
    for (; r < strip.count; ++r) {
      const int64_t seen = x_.visible[strip.first + r] - j;
      if (seen > 0)
        weigh_rows<1>(strip.first + r, j, s + r * kTileEdge, p + r * keys_, seen);
      else
        __builtin_memset(p + r * keys_ + j, 0, kTileEdge * sizeof(bfloat16));
      between(1);
    }
  }

  // R rows from `row` on, of whose keys from j on the first `seen` are seen; s [R][kTileEdge], p [R][keys_].
  template <int R>
  __attribute__((always_inline)) void weigh_rows(int64_t row, int64_t j, const float* s, bfloat16* p, int64_t seen) const {
    Vec low[R], high[R];
    bool above = false;
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      low[i] = mul(load(s + i * kTileEdge), factor_), high[i] = mul(load(s + i * kTileEdge + kLanes), factor_);
      if (R == 1 && seen < kTileEdge) {
        const Vec none = splat(-__builtin_inff());
        low[i] = seen < kLanes ? keep_first(seen, low[i], none) : low[i];
        high[i] = seen <= kLanes ? none : keep_first(seen - kLanes, high[i], none);
      }
      above |= any_above(max(low[i], high[i]), x_.top[row + i] + kTileLag);
    }
    if (__builtin_expect(above, 0))
      for (int i = 0; i < R; ++i) {
        const Vec most = max(low[i], high[i]);
        if (any_above(most, x_.top[row + i] + kTileLag)) raise(row + i, most, p + i * keys_, j);
      }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Vec level = splat(x_.top[row + i]);
      low[i] = Weights<T>::power(sub(low[i], level)), high[i] = Weights<T>::power(sub(high[i], level));
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      float* const total = x_.total + (row + i) * kLanes;
      store(total, add(load(total), add(low[i], high[i])));
      _mm512_storeu_si512(p + i * keys_ + j, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high[i], low[i])));
    }
  }

  static bool any_above(Vec x, float limit) { return _mm512_cmp_ps_mask(x, splat(limit), _CMP_GT_OQ) != 0; }

  // Apart from the loop of weights, whose registers it would take.
  __attribute__((noinline)) void raise(int64_t row, Vec scores, bfloat16* p, int64_t waiting) const {
    const float level = __builtin_roundf(reduce_max(scores)), before = x_.top[row];
    x_.top[row] = level;
    const Vec by = Weights<T>::power(splat(before - level));
    float *const o = x_.o + row * x_.width, *const total = x_.total + row * kLanes;
    for (int64_t d = 0; d < x_.width; d += kLanes) store(o + d, mul(load(o + d), by));
    store(total, mul(load(total), by));
    for (int64_t i = 0; i < waiting; i += kLanes) narrow(p + i, mul(widen(p + i), by));
  }

  const TileRows x_;
  const bfloat16 *const k_, *const v_;
  const int64_t columns_, keys_;  // padded keys as columns, as reduction
  bfloat16* const p_;
  float* const s_;
  const Vec factor_;
  Job job_;
};

}  // namespace hici::cpu::HICI_PATH
