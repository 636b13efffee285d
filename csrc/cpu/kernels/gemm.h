// C (+)= A B on small blocks, the product every kernel here is made of.
//
// A is row-major, rows `lda` elements apart. B is packed: panels of kPanel columns (the last one narrower, a multiple
// of kLanes), each panel `k / pair` rows of (columns * pair) elements, where `pair` consecutive values of the reduction
// stand side by side: 1 for float, 2 for bfloat16. Tile registers read the same layout. C is float, row-major. Element
// (k, j) of a B with n columns lies at packed_at<Op>(k_total, n, k, j).
//
// Each element of C is a sum of chains of additions in order of k, cut in the same places whatever m and n are: of float
// products every kChain, since the rounding of a chain grows with its length. Where what comes of them has two bytes they
// are not cut (chain_of): it is rounded worse, as products of bfloat16 are.
#pragma once

#include "vector.h"
#if defined(HICI_PATH_AMX)
#include "tiles.h"
#endif

namespace hici::cpu::HICI_PATH {

#if defined(HICI_PATH_AVX512)
constexpr int kPanelVectors = 4, kStrip = 6;
#else
constexpr int kPanelVectors = 2, kStrip = 6;
#endif
constexpr int kPanel = kPanelVectors * kLanes;
constexpr int64_t kChain = 32;
// Chains of products for results of type T.
template <class T>
constexpr int64_t chain_of = sizeof(T) == 4 ? kChain : int64_t{1} << 40;

// What products of tensors of type T are computed from.
template <class T>
struct operand {
  using type = float;
};
#if defined(HICI_PATH_AVX512_BF16)
template <>
struct operand<bfloat16> {
  using type = bfloat16;
};
#endif

template <class Op>
struct reduction;
template <>
struct reduction<float> {
  static constexpr int pair = 1, step = 1;  // step: k is padded with zeros to a multiple of it
};
template <>
struct reduction<bfloat16> {
  static constexpr int pair = 2;
#if defined(HICI_PATH_AMX)
  static constexpr int step = 32;
#else
  static constexpr int step = 2;
#endif
};

template <class Op>
inline int64_t packed_at(int64_t k_total, int64_t n, int64_t k, int64_t j) {
  constexpr int pair = reduction<Op>::pair;
  const int64_t panel = j / kPanel, columns = smaller(kPanel, n - panel * kPanel);
  return panel * kPanel * k_total + (k / pair) * columns * pair + (j % kPanel) * pair + k % pair;
}

template <int MR, int NV, bool Accumulate>
inline void strip(int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t chain) {
  bool onto = Accumulate;
  for (int64_t t = 0; t < k; onto = true) {
    const int64_t end = smaller(k, t + chain);
    Vec sum[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] = zeros();
#pragma GCC unroll 2
    for (; t < end; ++t) {
      Vec right[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) right[j] = load(b + (t * NV + j) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec left = splat(a[i * lda + t]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        float* const to = c + i * ldc + j * kLanes;
        store(to, onto ? add(load(to), sum[i][j]) : sum[i][j]);
      }
  }
}

#if defined(HICI_PATH_AVX512_BF16)
template <int MR, int NV, bool Accumulate>
inline void strip(int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, float* c, int64_t ldc, int64_t) {
  Vec sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sum[i][j] = zeros();
  for (int64_t t = 0; t < k; t += 2) {
    __m512bh right[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
      right[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + (t * NV + 2 * j) * kLanes));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      int32_t two;
      __builtin_memcpy(&two, a + i * lda + t, sizeof two);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      float* const to = c + i * ldc + j * kLanes;
      store(to, Accumulate ? add(load(to), sum[i][j]) : sum[i][j]);
    }
}
#endif

// What a product does besides, each time about kBetween<Op> elements of C are done: nothing.
struct Nothing {
  void operator()() const {}
};
template <class Op>
#if defined(HICI_PATH_AMX)
constexpr int64_t kBetween = reduction<Op>::pair == 2 ? 32 * 32 : kStrip * kPanel;
#else
constexpr int64_t kBetween = kStrip * kPanel;
#endif

template <int NV, bool Accumulate, class Op, class Between>
inline void panel(int64_t m, int64_t k, const Op* a, int64_t lda, const Op* b, float* c, int64_t ldc, int64_t chain,
                  const Between& between) {
  int64_t i = 0;
  for (; i + kStrip <= m; i += kStrip) {
    strip<kStrip, NV, Accumulate>(k, a + i * lda, lda, b, c + i * ldc, ldc, chain);
    between();
  }
  a += i * lda, c += i * ldc;
  switch (m - i) {
    case 5:
      return strip<5, NV, Accumulate>(k, a, lda, b, c, ldc, chain);
    case 4:
      return strip<4, NV, Accumulate>(k, a, lda, b, c, ldc, chain);
    case 3:
      return strip<3, NV, Accumulate>(k, a, lda, b, c, ldc, chain);
    case 2:
      return strip<2, NV, Accumulate>(k, a, lda, b, c, ldc, chain);
    case 1:
      return strip<1, NV, Accumulate>(k, a, lda, b, c, ldc, chain);
    default:
      return;
  }
}

template <bool Accumulate, class Op, class Between = Nothing>
inline void panel_of(int64_t columns, int64_t m, int64_t k, const Op* a, int64_t lda, const Op* b, float* c,
                     int64_t ldc, int64_t chain, const Between& between = {}) {
  switch (columns / kLanes) {
#if defined(HICI_PATH_AVX512)
    case 4:
      return panel<4, Accumulate>(m, k, a, lda, b, c, ldc, chain, between);
    case 3:
      return panel<3, Accumulate>(m, k, a, lda, b, c, ldc, chain, between);
#endif
    case 2:
      return panel<2, Accumulate>(m, k, a, lda, b, c, ldc, chain, between);
    default:
      return panel<1, Accumulate>(m, k, a, lda, b, c, ldc, chain, between);
  }
}

// C[m, n] (+)= A[m, k] B[k, n]; n a multiple of kLanes, k of reduction<Op>::step.
// B may be the first whole panels, and the first k of k_total rows, of a larger packed matrix.
template <class Op>
struct Product {
  int64_t m, n, k;
  const Op* a;
  int64_t lda;
  const Op* b;
  float* c;
  int64_t ldc, k_total;
  int64_t chain = kChain;

  // the others are computed as on the path without tiles
  int64_t rows_in_tiles() const {
#if defined(HICI_PATH_AMX)
    if (reduction<Op>::pair == 2) return m / 16 * 16;
#endif
    return 0;
  }
};

#if defined(HICI_PATH_AMX)
// The rows that are in tiles, by blocks of 2 x 2.
template <bool Accumulate, class Between>
inline void gemm_tiles(const Product<bfloat16>& p, const Between& between) {
  const int64_t rows = p.rows_in_tiles();
  for (int64_t j = 0; j < p.n; j += 32) {
    const int64_t start = j / kPanel * kPanel, ldb = 2 * smaller(kPanel, p.n - start);  // elements per row of pairs
    const bfloat16* const b = p.b + start * p.k_total + 2 * (j - start);
    const bool wide = j + 32 <= p.n;
    for (int64_t i = 0; i < rows; i += 32) {
      const bfloat16* const a = p.a + i * p.lda;
      float* const c = p.c + i * p.ldc + j;
      const bool tall = i + 32 <= rows;
      if (tall && wide)
        tile_block<2, 2, Accumulate>(p.k, a, p.lda, b, ldb, c, p.ldc);
      else if (tall)
        tile_block<2, 1, Accumulate>(p.k, a, p.lda, b, ldb, c, p.ldc);
      else if (wide)
        tile_block<1, 2, Accumulate>(p.k, a, p.lda, b, ldb, c, p.ldc);
      else
        tile_block<1, 1, Accumulate>(p.k, a, p.lda, b, ldb, c, p.ldc);
      between();
    }
  }
}
#endif

// The rows that are not in tiles.
template <bool Accumulate, class Op, class Between = Nothing>
inline void gemm_rest(const Product<Op>& p, const Between& between = {}) {
  const int64_t done = p.rows_in_tiles();
  if (done == p.m) return;
  for (int64_t j = 0; j < p.n; j += kPanel)
    panel_of<Accumulate>(smaller(kPanel, p.n - j), p.m - done, p.k, p.a + done * p.lda, p.lda, p.b + j * p.k_total,
                         p.c + done * p.ldc + j, p.ldc, p.chain, between);
}

// Between tiles_begin() and tiles_end().
template <bool Accumulate, class Op, class Between = Nothing>
inline void gemm(const Product<Op>& p, const Between& between = {}) {
#if defined(HICI_PATH_AMX)
  if constexpr (reduction<Op>::pair == 2) gemm_tiles<Accumulate>(p, between);
#endif
  gemm_rest<Accumulate>(p, between);
}

template <bool Accumulate, class Op>
inline void gemm(int64_t m, int64_t n, int64_t k, const Op* a, int64_t lda, const Op* b, float* c, int64_t ldc,
                 int64_t k_total, int64_t chain = kChain) {
  gemm<Accumulate>(Product<Op>{m, n, k, a, lda, b, c, ldc, k_total, chain});
}

template <bool Accumulate, class Op>
inline void gemm(int64_t m, int64_t n, int64_t k, const Op* a, int64_t lda, const Op* b, float* c, int64_t ldc) {
  gemm<Accumulate>(Product<Op>{m, n, k, a, lda, b, c, ldc, k});
}

// sum_k A(k, j) B(k, j) for every column j of two packed matrices, added in the order in which gemm adds: where a row of
// A equals column j of one operand, the result equals gemm's to the bit.
template <class Op>
inline void column_dots(int64_t n, int64_t k, const Op* a, const Op* b, float* out, int64_t chain_length) {
  for (int64_t p = 0; p < n; p += kPanel, a += kPanel * k, b += kPanel * k) {
    const int64_t columns = smaller(kPanel, n - p);
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec total = zeros();
      if constexpr (reduction<Op>::pair == 1) {
        for (int64_t t = 0; t < k; t += chain_length) {
          Vec chain = zeros();
          for (int64_t u = t; u < smaller(k, t + chain_length); ++u)
            chain = fma(load(a + u * columns + j), load(b + u * columns + j), chain);
          total = t == 0 ? chain : add(total, chain);
        }
      } else {
#if defined(HICI_PATH_AVX512_BF16)
        for (int64_t t = 0; t < k; t += 2) {
          const int64_t at = t * columns + 2 * j;
          total = _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a + at)),
                                   reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + at)));
        }
#endif
      }
      store(out + p + j, total);
    }
  }
}

#if !defined(HICI_PATH_AMX)
inline void tiles_begin() {}
inline void tiles_end() {}
#endif

}  // namespace hici::cpu::HICI_PATH
