// Packing of rows of a tensor into the operands of gemm.h.
//
// Rows are given by an array of pointers, so that a block of keys may be gathered from anywhere; what is not pointed at
// is never read. Padding is zero.
#pragma once

#include "gemm.h"

namespace hici::cpu::HICI_PATH {

// Words: what a transposition moves: a float, or a pair of bfloat16.
#if defined(HICI_PATH_AVX512)
using Words = __m512i;

__attribute__((always_inline)) inline void transpose(Words r[16]) {
  Words s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd);
  }
}

template <class Op, class T>
inline Words words(const T* p) {
  if constexpr (sizeof(Op) == 2)
    return _mm512_loadu_si512(p);
  else
    return _mm512_castps_si512(widen(p));
}
template <class Op, class T>
inline Words words_part(const T* p, int64_t n) {
  if constexpr (sizeof(Op) == 2)
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  else
    return _mm512_castps_si512(widen_part(p, n));
}
inline Words no_words() { return _mm512_setzero_si512(); }
inline void store_words(void* p, Words w) { _mm512_storeu_si512(p, w); }
// the first and second elements of all pairs
inline void store_halves(bfloat16* even, bfloat16* odd, Words w) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(w));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)));
}
// pairs (a[i], b[i]) of two rows of 32 elements: 16 pairs at p, 16 at p + 32
inline void store_interleaved(bfloat16* p, bfloat16* q, __m512i a, __m512i b) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(q, _mm512_permutex2var_epi16(a, high, b));
}
#else
using Words = Vec;

__attribute__((always_inline)) inline void transpose(Words r[8]) {
  Words s[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shuffle(r[i], r[i + 1], simd::i32x8{0, 8, 1, 9, 4, 12, 5, 13});
    s[i + 1] = __builtin_shuffle(r[i], r[i + 1], simd::i32x8{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = __builtin_shuffle(s[i], s[i + 2], simd::i32x8{0, 1, 8, 9, 4, 5, 12, 13});
    r[i + 1] = __builtin_shuffle(s[i], s[i + 2], simd::i32x8{2, 3, 10, 11, 6, 7, 14, 15});
    r[i + 2] = __builtin_shuffle(s[i + 1], s[i + 3], simd::i32x8{0, 1, 8, 9, 4, 5, 12, 13});
    r[i + 3] = __builtin_shuffle(s[i + 1], s[i + 3], simd::i32x8{2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = __builtin_shuffle(r[i], r[i + 4], simd::i32x8{0, 1, 2, 3, 8, 9, 10, 11});
    s[i + 4] = __builtin_shuffle(r[i], r[i + 4], simd::i32x8{4, 5, 6, 7, 12, 13, 14, 15});
  }
  for (int i = 0; i < 8; ++i) r[i] = s[i];
}

template <class Op, class T>
inline Words words(const T* p) {
  return widen(p);
}
template <class Op, class T>
inline Words words_part(const T* p, int64_t n) {
  return widen_part(p, n);
}
inline Words no_words() { return zeros(); }
inline void store_words(void* p, Words w) { store(static_cast<float*>(p), w); }
#endif

// Calls run(t, words) for t = 0, kLanes words' worth of elements per call: the transposed tile of up to kLanes rows at
// elements [at, at + kLanes * pair) of d.
template <class Op, class T, class Run>
inline void transposed_tile(const T* const* rows, int64_t n, int64_t at, int64_t d, Run&& run) {
  constexpr int64_t width = kLanes * reduction<Op>::pair;
  Words w[kLanes];
  const int64_t there = smaller(width, d - at);
  if (n >= kLanes && there == width) {  // the usual tile stays in registers
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) w[i] = words<Op>(rows[i] + at);
    transpose(w);
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) run(t, w[t]);
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i >= n || there <= 0)
      w[i] = no_words();
    else if (there == width)
      w[i] = words<Op>(rows[i] + at);
    else
      w[i] = words_part<Op>(rows[i] + at, there);
  }
  transpose(w);
  for (int t = 0; t < kLanes; ++t) run(t, w[t]);
}

// Asks for rows [i, i + count) of `ahead`, of which there are `total`, to come into the cache.
template <class T>
HICI_ASK void ask_for(const T* const* ahead, int64_t i, int64_t count, int64_t total, int64_t d) {
  for (const int64_t end = smaller(i + count, total); i < end; ++i)
    for (int64_t at = 0; at < d; at += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(ahead[i] + at, 0, 2);
}

// Two lists of rows wanted next, asked for one row at a time while `work` units of other work are done: asked for all at
// once they would be waited for, since a core has few loads from memory on their way.
template <class T>
class Ahead {
 public:
  Ahead(const T* const* first, const T* const* second, int64_t count, int64_t d, int64_t work)
      : first_(first), second_(second), count_(count), d_(d), work_(work) {}
  HICI_ASK void after(int64_t units) {
    for (owed_ += units * 2 * count_; owed_ >= work_ && at_ < 2 * count_; owed_ -= work_, ++at_) {
      if (at_ < count_)
        ask_for(first_, at_, 1, count_, d_);
      else
        ask_for(second_, at_ - count_, 1, count_, d_);
    }
  }

 private:
  const T *const *const first_, *const *const second_;
  const int64_t count_, d_, work_;
  int64_t owed_ = 0, at_ = 0;
};

// Memory wanted soon, to be asked for in so many parts.
class Wanted {
 public:
  void add(const void* at, int64_t bytes) {
    if (bytes > 0) stretches_[count_++] = {static_cast<const char*>(at), (bytes + kLine - 1) / kLine};
  }
  void divide(int64_t parts) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += stretches_[i].lines;
    part_ = (lines + parts - 1) / larger(parts, 1);
  }
  HICI_ASK void ask() {
    for (int64_t left = part_; left > 0 && at_ < count_;) {
      Stretch& x = stretches_[at_];
      for (; left > 0 && x.lines > 0; --left, --x.lines, x.next += kLine) __builtin_prefetch(x.next, 0, 2);
      if (x.lines == 0) ++at_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Stretch {
    const char* next;
    int64_t lines;
  };
  Stretch stretches_[5];
  int count_ = 0, at_ = 0;
  int64_t part_ = 0;
};

// B with the rows as columns: B(k, j) = rows[j][k], k < d. k_total = round_up(d, step), columns = round_up(n, kLanes).
template <class Op, class T>
inline void pack_columns(const T* const* rows, int64_t n, int64_t d, Op* out, const T* const* ahead = nullptr,
                         int64_t ahead_count = 0) {
  constexpr int pair = reduction<Op>::pair;
  const int64_t k_total = round_up(d, reduction<Op>::step), columns = round_up(n, kLanes);
  for (int64_t j = 0; j < columns; j += kLanes) {
    ask_for(ahead, j, kLanes, ahead_count, d);
    for (int64_t k = 0; k < k_total; k += kLanes * pair) {
      const int64_t present = smaller(kLanes, (k_total - k) / pair);
      Op* const to = out + packed_at<Op>(k_total, columns, k, j);
      const int64_t row = smaller(kPanel, columns - j / kPanel * kPanel) * pair;
      transposed_tile<Op>(rows + j, n - j, k, d, [&](int64_t t, Words w) {
        if (t < present) store_words(to + t * row, w);
      });
    }
  }
}

// B with the rows as reduction: B(k, j) = rows[k][j], j < d. k_total = round_up(n, step), columns = round_up(d, kLanes).
template <class Op, class T>
inline void pack_depth(const T* const* rows, int64_t n, int64_t d, Op* out, const T* const* ahead = nullptr,
                       int64_t ahead_count = 0) {
  const int64_t k_total = round_up(n, reduction<Op>::step), columns = round_up(d, kLanes);
  for (int64_t p = 0; p < columns; p += kPanel) {
    const int64_t width = smaller(kPanel, columns - p);
    Op* const to = out + p * k_total;
    if constexpr (sizeof(Op) == 4) {
      for (int64_t k = 0; k < k_total; ++k) {
        if (p == 0) ask_for(ahead, k, 1, ahead_count, d);
        for (int64_t j = 0; j < width; j += kLanes) {
          const int64_t there = smaller(kLanes, d - p - j);
          Vec v = zeros();
          if (k < n && there == kLanes)
            v = widen(rows[k] + p + j);
          else if (k < n && there > 0)
            v = widen_part(rows[k] + p + j, there);
          store(to + k * width + j, v);
        }
      }
    } else {
#if defined(HICI_PATH_AVX512)
      for (int64_t k = 0; k < k_total; k += 2) {
        if (p == 0) ask_for(ahead, k, 2, ahead_count, d);
        for (int64_t j = 0; j < width; j += 2 * kLanes) {
          const int64_t there = smaller(2 * kLanes, d - p - j);
          __m512i a = no_words(), b = no_words();
          if (k < n) a = there == 32 ? words<Op>(rows[k] + p + j) : words_part<Op>(rows[k] + p + j, there);
          if (k + 1 < n) b = there == 32 ? words<Op>(rows[k + 1] + p + j) : words_part<Op>(rows[k + 1] + p + j, there);
          Op* const at = to + (k * width + 2 * j);
          if (j + kLanes < width)
            store_interleaved(at, at + 2 * kLanes, a, b);
          else
            store_words(at, _mm512_permutex2var_epi16(
                                a,
                                _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                                 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0),
                                b));
        }
      }
#endif
    }
  }
}

// `ahead`, of pack_columns and pack_depth: rows wanted next.

// A: row-major copies of the rows, ld >= d elements apart, [d, ld) zero.
template <class Op, class T>
inline void pack_rows(const T* const* rows, int64_t n, int64_t d, int64_t ld, Op* out) {
  for (int64_t i = 0; i < n; ++i) {
    Op* const to = out + i * ld;
    if constexpr (sizeof(Op) == sizeof(T)) {
      __builtin_memcpy(to, rows[i], d * sizeof(T));
    } else {
      int64_t j = 0;
      for (; j + kLanes <= d; j += kLanes) store(reinterpret_cast<float*>(to + j), widen(rows[i] + j));
      if (j < d) store_part(reinterpret_cast<float*>(to + j), widen_part(rows[i] + j, d - j), d - j);
    }
    __builtin_memset(to + d, 0, (ld - d) * sizeof(Op));
  }
}

// A with the rows as reduction: out[i][k] = rows[k][i], i < d, ld = round_up(n, step) or more; [n, ld) zero.
template <class Op, class T>
inline void pack_rows_transposed(const T* const* rows, int64_t n, int64_t d, int64_t ld, Op* out) {
  constexpr int pair = reduction<Op>::pair;
  for (int64_t i = 0; i < d; i += kLanes * pair) {
    for (int64_t k = 0; k < ld; k += kLanes) {
      const int64_t columns = smaller(kLanes, ld - k);
      transposed_tile<Op>(rows + k, n - k, i, d, [&](int64_t t, Words w) {
        const int64_t row = i + t * pair;
        if (row >= d) return;
        alignas(64) Op lane[kLanes * pair];
        Op* const even = columns == kLanes ? out + row * ld + k : lane;
        Op* const odd = columns == kLanes && row + 1 < d ? out + (row + 1) * ld + k : lane + kLanes * (pair - 1);
        if constexpr (pair == 2) {
#if defined(HICI_PATH_AVX512)
          store_halves(even, odd, w);
#endif
          if (columns < kLanes && row + 1 < d) __builtin_memcpy(out + (row + 1) * ld + k, odd, columns * sizeof(Op));
        } else {
          store_words(even, w);
        }
        if (columns < kLanes) __builtin_memcpy(out + row * ld + k, even, columns * sizeof(Op));
      });
    }
  }
}

}  // namespace hici::cpu::HICI_PATH
