// The products of gemm.h for rows that do not lie one after the other: rows of A and of C are given by pointers.
#pragma once

#include "gemm.h"

namespace hici::cpu::HICI_PATH {

template <int MR, int NV, bool Accumulate>
inline void strip_at(int64_t k, const float* const* a, const float* b, float* const* c, int64_t offset) {
  bool onto = Accumulate;
  for (int64_t t = 0; t < k; onto = true) {
    const int64_t end = smaller(k, t + kChain);
    Vec sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) sum[i][j] = zeros();
    for (; t < end; ++t) {
      Vec right[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) right[j] = load(b + (t * NV + j) * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Vec left = splat(a[i][t]);
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        float* const to = c[i] + offset + j * kLanes;
        store(to, onto ? add(load(to), sum[i][j]) : sum[i][j]);
      }
  }
}

#if defined(HICI_PATH_AVX512_BF16)
template <int MR, int NV, bool Accumulate>
inline void strip_at(int64_t k, const bfloat16* const* a, const bfloat16* b, float* const* c, int64_t offset) {
  Vec sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) sum[i][j] = zeros();
  for (int64_t t = 0; t < k; t += 2) {
    __m512bh right[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j)
      right[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + (t * NV + 2 * j) * kLanes));
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      int32_t two;
      __builtin_memcpy(&two, a[i] + t, sizeof two);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      float* const to = c[i] + offset + j * kLanes;
      store(to, Accumulate ? add(load(to), sum[i][j]) : sum[i][j]);
    }
}
#endif

// MR: as many rows as the registers hold sums of, since a chain of additions waits for itself.
template <int MR, int NV, bool Accumulate, class Op>
inline void panel_at(int64_t m, int64_t k, const Op* const* a, const Op* b, float* const* c, int64_t offset) {
  int64_t i = 0;
  for (; i + MR <= m; i += MR) strip_at<MR, NV, Accumulate>(k, a + i, b, c + i, offset);
  if constexpr (MR > 6)
    for (; i + 6 <= m; i += 6) strip_at<6, NV, Accumulate>(k, a + i, b, c + i, offset);
  for (; i + 3 <= m; i += 3) strip_at<3, NV, Accumulate>(k, a + i, b, c + i, offset);
  if (m - i == 2) return strip_at<2, NV, Accumulate>(k, a + i, b, c + i, offset);
  if (m - i == 1) return strip_at<1, NV, Accumulate>(k, a + i, b, c + i, offset);
}

// C[m, n] (+)= A[m, k] B[k, n] as gemm() does it, rows of A and C anywhere.
template <bool Accumulate, class Op>
inline void gemm_at(int64_t m, int64_t n, int64_t k, const Op* const* a, const Op* b, float* const* c,
                    int64_t k_total) {
  for (int64_t j = 0; j < n; j += kPanel, b += kPanel * k_total) {
    switch (smaller(kPanel, n - j) / kLanes) {
#if defined(HICI_PATH_AVX512)
      case 4:
        panel_at<6, 4, Accumulate>(m, k, a, b, c, j);
        break;
      case 3:
        panel_at<6, 3, Accumulate>(m, k, a, b, c, j);
        break;
      case 2:
        panel_at<12, 2, Accumulate>(m, k, a, b, c, j);
        break;
      default:
        panel_at<12, 1, Accumulate>(m, k, a, b, c, j);
#else
      case 2:
        panel_at<6, 2, Accumulate>(m, k, a, b, c, j);
        break;
      default:
        panel_at<12, 1, Accumulate>(m, k, a, b, c, j);
#endif
    }
  }
}

}  // namespace hici::cpu::HICI_PATH
