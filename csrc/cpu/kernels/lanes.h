// What kernels over any element type need beside vector.h: vectors of double, lane-wise choice, loads and stores of whole
// and partial vectors, stores that go past the caches.
#pragma once

#include <type_traits>

#include "vector.h"

namespace hici::cpu::HICI_PATH {

// Vectors of double and lane-wise choice, beside what vector.h has for float.
#if defined(HICI_PATH_AVX512)

using Wide = __m512d;
constexpr int kWideLanes = 8;
using Mask = __mmask16;

inline Wide get(const double* p) { return _mm512_loadu_pd(p); }
inline Wide get_part(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first(n)), p); }
inline void put(double* p, Wide v) { _mm512_storeu_pd(p, v); }
inline void put_part(double* p, Wide v, int64_t n) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), v); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Wide all(double x) { return _mm512_set1_pd(x); }
// b where one of them is NaN
inline Vec higher(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Wide higher(Wide a, Wide b) { return _mm512_max_pd(a, b); }
inline Vec lower(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Wide lower(Wide a, Wide b) { return _mm512_min_pd(a, b); }
// a or b, whichever `one` is not: units that find extremes are fewer than those that do logic
inline Vec other(Vec a, Vec b, Vec one) {
  const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b), z = _mm512_castps_si512(one);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, y, z, 0x96));
}
inline Wide other(Wide a, Wide b, Wide one) {
  const __m512i x = _mm512_castpd_si512(a), y = _mm512_castpd_si512(b), z = _mm512_castpd_si512(one);
  return _mm512_castsi512_pd(_mm512_ternarylogic_epi64(x, y, z, 0x96));
}
inline Vec root(Vec v) { return _mm512_sqrt_ps(v); }
inline Wide root(Wide v) { return _mm512_sqrt_pd(v); }
// x / by from inverse = 1 / by, rounded, at a quarter of a division's time: by Markstein's theorem the same bits where
// nothing overflows or underflows
inline Vec quotient(Vec x, Vec by, Vec inverse) {
  const Vec q = _mm512_mul_ps(x, inverse);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, by, x), inverse, q);
}
inline Wide quotient(Wide x, Wide by, Wide inverse) {
  const Wide q = _mm512_mul_pd(x, inverse);
  return _mm512_fmadd_pd(_mm512_fnmadd_pd(q, by, x), inverse, q);
}
inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Wide fused(Wide a, Wide b, Wide c) { return _mm512_fmadd_pd(a, b, c); }
inline Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask greater(Wide a, Wide b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
inline Mask at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Mask at_most(Wide a, Wide b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask equal(Wide a, Wide b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
inline Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline Mask is_nan(Wide a) { return _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q); }
inline Vec pick(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
inline Wide pick(Mask m, Wide a, Wide b) { return _mm512_mask_blend_pd(static_cast<__mmask8>(m), b, a); }
inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
inline Mask but_not(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
inline bool any(Mask m) { return m != 0; }

inline void number(int32_t* p, Mask m, int32_t x, Vec) { _mm512_mask_storeu_epi32(p, m, _mm512_set1_epi32(x)); }
inline void number(int32_t* p, Mask m, int32_t x, Wide) {
  _mm256_mask_storeu_epi32(p, static_cast<__mmask8>(m), _mm256_set1_epi32(x));
}
inline Mask equals(const int32_t* p, int32_t x, Vec) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x));
}
inline Mask equals(const int32_t* p, int32_t x, Wide) {
  return _mm256_cmpeq_epi32_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(x));
}

inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
inline void stream(double* p, Wide v) { _mm512_stream_pd(p, v); }
inline void stream(bfloat16* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16(v)); }
inline void stream(float16* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// Sum of products in double: a norm over thousands of channels keeps the precision of its terms.
struct DotSum {
  Wide a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
  void add(Vec x, Vec y) {
    a = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_castps512_ps256(y)), a);
    b = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)),
                        b);
  }
  void add(Wide x, Wide y) { a = _mm512_fmadd_pd(x, y, a); }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(a, b)); }
};

#else

template <class V>
inline V quotient(V x, V by, V) {
  return x / by;
}

using Wide = simd::f64x4;
constexpr int kWideLanes = 4;

inline Wide get(const double* p) { return simd::widen(p); }
inline Wide get_part(const double* p, int64_t n) { return simd::widen_part<Wide>(p, static_cast<int>(n)); }
inline void put(double* p, Wide v) { simd::narrow(p, v); }
inline void put_part(double* p, Wide v, int64_t n) { simd::narrow_part(p, v, static_cast<int>(n)); }
inline Vec all(float x) { return Vec{} + x; }
inline Wide all(double x) { return Wide{} + x; }
#if defined(__AVX__)
// b where one of them is NaN
inline Vec higher(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Wide higher(Wide a, Wide b) { return _mm256_max_pd(a, b); }
inline Vec lower(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Wide lower(Wide a, Wide b) { return _mm256_min_pd(a, b); }
inline Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Wide fused(Wide a, Wide b, Wide c) { return _mm256_fmadd_pd(a, b, c); }
inline Vec root(Vec v) { return _mm256_sqrt_ps(v); }
inline Wide root(Wide v) { return _mm256_sqrt_pd(v); }
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
inline void stream(double* p, Wide v) { _mm256_stream_pd(p, v); }
template <class T>
inline void stream(T* p, Vec v) {
  T half[kLanes];
  simd::narrow(half, v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), simd::read<__m128i>(half));
}
#else
template <class V>
inline V higher(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V lower(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V fused(V a, V b, V c) {
  return a * b + c;
}
inline Vec root(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
inline Wide root(Wide v) {
  for (int i = 0; i < kWideLanes; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
template <class T, class V>
inline void stream(T* p, V v) {
  simd::narrow(p, v);
}
#endif
template <class V>
inline V other(V a, V b, V) {
  return lower(a, b);
}
template <class V>
inline auto greater(V a, V b) {
  return a > b;
}
template <class V>
inline auto at_most(V a, V b) {
  return a <= b;
}
template <class V>
inline auto equal(V a, V b) {
  return a == b;
}
template <class V>
inline auto is_nan(V a) {
  return a != a;
}
template <class M, class V>
inline V pick(M m, V a, V b) {
  return m ? a : b;
}
template <class M>
inline M either(M a, M b) {
  return a | b;
}
template <class M>
inline M but_not(M a, M b) {
  return a & ~b;
}
template <class M>
inline bool any(M m) {
  return simd::any(m);
}

template <class M, class V>
inline void number(int32_t* p, M m, int32_t x, V) {
  for (size_t i = 0; i < sizeof(V) / sizeof(V{}[0]); ++i) p[i] = m[i] ? x : p[i];
}
inline auto equals(const int32_t* p, int32_t x, Vec) { return simd::read<simd::i32x8>(p) == x; }
inline auto equals(const int32_t* p, int32_t x, Wide) {
  const simd::i64x4 at = {p[0], p[1], p[2], p[3]};
  return at == static_cast<int64_t>(x);
}

using DotSum = simd::dot_sum;

#endif

template <class T>
inline Vec get(const T* p) {
  return widen(p);
}
template <class T>
inline Vec get_part(const T* p, int64_t n) {
  return widen_part(p, n);
}
template <class T>
inline void put(T* p, Vec v) {
  narrow(p, v);
}
template <class T>
inline void put_part(T* p, Vec v, int64_t n) {
  narrow_part(p, v, n);
}

inline void settle() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class Acc>
struct lanes;
template <>
struct lanes<float> {
  using value = Vec;
  static constexpr int count = kLanes;
};
template <>
struct lanes<double> {
  using value = Wide;
  static constexpr int count = kWideLanes;
};

// How many lanes of a vector of elements are there: all, known while compiling, or the first n.
struct Whole {};
struct Part {
  int64_t n;
};
template <class T>
inline auto get(const T* p, Whole) {
  return get(p);
}
template <class T>
inline auto get(const T* p, Part part) {
  return get_part(p, part.n);
}
template <class T, class V>
inline void put(T* p, V v, Whole) {
  put(p, v);
}
template <class T, class V>
inline void put(T* p, V v, Part part) {
  put_part(p, v, part.n);
}

// past: past the caches; needs whole vectors and an aligned address
template <class T, class V, class Tail>
inline void leave(T* p, V v, bool past, Tail tail) {
  if (past)
    stream(p, v);
  else
    put(p, v, tail);
}

// As leave(), of values of T, which need no rounding.
template <class T, class V, class Tail>
inline void leave_exact(T* p, V v, bool past, Tail tail) {
  leave(p, v, past, tail);
}
#if defined(HICI_PATH_AVX512_BF16)
// The instruction that rounds to bfloat16 makes 0 of subnormal numbers.
template <class Tail>
inline void leave_exact(bfloat16* p, Vec v, bool past, Tail tail) {
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
  __m256i* const to = reinterpret_cast<__m256i*>(p);
  if constexpr (std::is_same_v<Tail, Part>)
    _mm256_mask_storeu_epi16(p, first(tail.n), half);
  else if (past)
    _mm256_stream_si256(to, half);
  else
    _mm256_storeu_si256(to, half);
}
#endif

// Calls body(channel, vectors, tail) for [0, n): `Many` vectors at a time, then one, then what is left.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int Many, class Acc, class Body>
__attribute__((always_inline)) inline void each_vector(int64_t n, Body&& body) {
  constexpr int L = lanes<Acc>::count;
  int64_t c = 0;
  if (Many > 1)
    for (; c + Many * L <= n; c += Many * L) body(c, Count<Many>{}, Whole{});
  for (; c + L <= n; c += L) body(c, Count<1>{}, Whole{});
  if (c < n) body(c, Count<1>{}, Part{n - c});
}

// Runs body(Count<R>{}, first) for rows [0, n), four at a time, then what is left.
template <class Body>
inline void in_fours(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) body(Count<4>{}, i);
  switch (n - i) {
    case 3:
      return body(Count<3>{}, i);
    case 2:
      return body(Count<2>{}, i);
    case 1:
      return body(Count<1>{}, i);
    default:
      return;
  }
}

// Vectors of T that fill a cache line: what goes past the caches must leave in whole lines.
template <class T>
constexpr int kLine = static_cast<int>(64 / (sizeof(T) * lanes<typename simd::accumulator<T>::type>::count));

}  // namespace hici::cpu::HICI_PATH
