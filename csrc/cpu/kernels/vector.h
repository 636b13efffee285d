// Vectors of floats as wide as the path's registers, exact loads of every element type, and exp.
#pragma once

#include "path.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "hici/simd.h"

namespace hici::cpu::HICI_PATH {

#if defined(HICI_PATH_AVX512)

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// b where one of them is NaN
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
inline float reduce_min(Vec v) { return _mm512_reduce_min_ps(v); }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
// the first n < 16 lanes of v, `other` in the rest
inline Vec keep_first(int64_t n, Vec v, Vec other) { return _mm512_mask_blend_ps(first(n), other, v); }
inline Vec load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_part(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

inline Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), no, yes);
}
inline bool any_differs(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }

inline Vec widen(const float* p) { return load(p); }
// The upper halves of lanes from 16 values, the lower ones 0: one instruction, where widening and shifting are two.
inline Vec upper_halves(__m256i half) {
  const __m512i twice = _mm512_set_epi32(0xf000f, 0xe000e, 0xd000d, 0xc000c, 0xb000b, 0xa000a, 0x90009, 0x80008, 0x70007,
                                         0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, twice, _mm512_castsi256_si512(half)));
}
inline Vec widen(const bfloat16* p) {
  return upper_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec widen(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec widen_part(const float* p, int64_t n) { return load_part(p, n); }
inline Vec widen_part(const bfloat16* p, int64_t n) {
  return upper_halves(_mm256_maskz_loadu_epi16(first(n), p));
}
inline Vec widen_part(const float16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }

// to nearest, ties to even; NaN stays NaN
inline __m256i round_bf16(Vec v) {
#if defined(HICI_PATH_AVX512_BF16)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void narrow(float* p, Vec v) { store(p, v); }
inline void narrow(bfloat16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(v)); }
inline void narrow(float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void narrow_part(float* p, Vec v, int64_t n) { store_part(p, v, n); }
inline void narrow_part(bfloat16* p, Vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), round_bf16(v)); }
inline void narrow_part(float16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// y * 2^floor(n)
inline Vec scale_by_power(Vec y, Vec n) { return _mm512_scalef_ps(y, n); }

#else

constexpr int kLanes = 8;
using Vec = simd::f32x8;

inline Vec zeros() { return Vec{}; }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec load(const float* p) { return simd::read<Vec>(p); }
inline void store(float* p, Vec v) { simd::write(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline float reduce_add(Vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
inline float reduce_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = m > v[i] ? m : v[i];
  return m;
}
inline float reduce_min(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = m < v[i] ? m : v[i];
  return m;
}

inline Vec keep_first(int64_t n, Vec v, Vec other) {
  const simd::i32x8 at = {0, 1, 2, 3, 4, 5, 6, 7};
  return at < static_cast<int32_t>(n) ? v : other;
}
inline Vec load_part(const float* p, int64_t n) { return simd::widen_part<Vec>(p, static_cast<int>(n)); }
inline void store_part(float* p, Vec v, int64_t n) { simd::narrow_part(p, v, static_cast<int>(n)); }

inline Vec where_equal(Vec a, Vec b, Vec yes, Vec no) { return a == b ? yes : no; }
inline bool any_differs(Vec a, Vec b) { return simd::any(a != b); }

template <class T>
inline Vec widen(const T* p) {
  return simd::widen(p);
}
template <class T>
inline Vec widen_part(const T* p, int64_t n) {
  return simd::widen_part<Vec>(p, static_cast<int>(n));
}
template <class T>
inline void narrow(T* p, Vec v) {
  simd::narrow(p, v);
}
template <class T>
inline void narrow_part(T* p, Vec v, int64_t n) {
  simd::narrow_part(p, v, static_cast<int>(n));
}

// adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits
inline Vec round(Vec x) { return (x + 12582912.0f) - 12582912.0f; }
// y * 2^n for integral n; 0 below 2^-126
inline Vec scale_by_power(Vec y, Vec n) {
  const simd::i32x8 power = (reinterpret_cast<simd::i32x8>(n + 12582912.0f) << 23) + (127 << 23);
  return n < -126.0f ? Vec{} : y * reinterpret_cast<Vec>(power);
}

#endif

// e^x for x up to 88; 0 where that is below every float; NaN stays NaN. Relative error below 2^-23: the argument is reduced
// by a logarithm in two parts, since a rounded product with log2(e) alone would err in proportion to x.
inline Vec exp(Vec x) {
  x = max(splat(-104.0f), x);
  const Vec n = round(mul(x, splat(1.44269504f)));
  Vec r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-6f), r);
  Vec y = splat(1.38145984e-3f);
  y = fma(y, r, splat(8.36871693e-3f));
  y = fma(y, r, splat(4.16683881e-2f));
  y = fma(y, r, splat(1.66665206e-1f));
  y = fma(y, r, splat(4.99999934e-1f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  return scale_by_power(y, n);
}

#if defined(HICI_PATH_AVX512)
// 2^t for t up to 127; 0 where that is below every float; NaN stays NaN. Relative error below 2^-22, of the polynomial
// 8e-8; 1 for 0. For weights of results of two bytes.
inline Vec exp2(Vec t) {
  // what t is above the integer below it, 0 if infinite; the last step takes that integer of t itself
  const Vec r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec y = splat(1.86713005e-3f);
  y = fma(y, r, splat(9.01703071e-3f));
  y = fma(y, r, splat(5.57999127e-2f));
  y = fma(y, r, splat(2.40164444e-1f));
  y = fma(y, r, splat(6.93151295e-1f));
  return scale_by_power(fma(y, r, splat(1.0f)), t);
}
#endif

}  // namespace hici::cpu::HICI_PATH
