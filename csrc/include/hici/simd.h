// Vectors of the accumulation type, and exact loads and rounding stores of every element type.
//
// GCC/Clang vector extensions: one source serves AVX2, AVX-512 and NEON, and each lane is an independent channel, so
// results do not depend on the width the compiler chooses.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace hici {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace simd {

using f32x8 = float __attribute__((vector_size(32)));
using f64x4 = double __attribute__((vector_size(32)));
using f64x8 = double __attribute__((vector_size(64)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using u32x8 = uint32_t __attribute__((vector_size(32)));
using i64x4 = int64_t __attribute__((vector_size(32)));
using u16x8 = uint16_t __attribute__((vector_size(16)));

template <class Acc>
struct lanes;
template <>
struct lanes<float> {
  using value = f32x8;
  using index = i32x8;
  static constexpr int count = 8;
};
template <>
struct lanes<double> {
  using value = f64x4;
  using index = i64x4;
  static constexpr int count = 4;
};

// Sums are kept in float at least.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};

template <class V, class P>
inline V read(const P* p) {
  static_assert(sizeof(V) % sizeof(P) == 0, "whole elements");
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
inline void write(P* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline f32x8 widen(const float* p) { return read<f32x8>(p); }
inline f64x4 widen(const double* p) { return read<f64x4>(p); }
inline f32x8 widen(const bfloat16* p) {
#if defined(__AVX2__)
  // one instruction, where GCC 12 turns the generic conversion into shuffles of halves
  return reinterpret_cast<f32x8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(p)), 16));
#else
  return reinterpret_cast<f32x8>(__builtin_convertvector(read<u16x8>(p), u32x8) << 16);
#endif
}
inline f32x8 widen(const float16* p) {
#if defined(__F16C__)
  return reinterpret_cast<f32x8>(_mm256_cvtph_ps(read<__m128i>(p)));
#else
  const u32x8 half = __builtin_convertvector(read<u16x8>(p), u32x8);
  const u32x8 sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  const u32x8 special = reinterpret_cast<u32x8>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  // the exponent bias is moved by a multiplication, which is exact and normalises subnormals on the way
  const u32x8 finite = reinterpret_cast<u32x8>(reinterpret_cast<f32x8>(magnitude) * 0x1p112f);
  return reinterpret_cast<f32x8>(sign | finite | special);
#endif
}

inline void narrow(float* p, f32x8 v) { write(p, v); }
inline void narrow(double* p, f64x4 v) { write(p, v); }
inline void narrow(bfloat16* p, f32x8 v) {
  const u32x8 bits = reinterpret_cast<u32x8>(v);
  const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const u32x8 nan = reinterpret_cast<u32x8>(v != v);
  write(p, __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), u16x8));
}
inline void narrow(float16* p, f32x8 v) {
#if defined(__F16C__)
  write(p, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const u32x8 bits = reinterpret_cast<u32x8>(v);
  const u32x8 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const u32x8 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 0.5 makes the hardware round a result below 2^-14 at the place of its last subnormal bit
  const u32x8 small = reinterpret_cast<u32x8>(reinterpret_cast<f32x8>(magnitude) + 0.5f) - 0x3f000000u;
  const u32x8 is_small = reinterpret_cast<u32x8>(magnitude < 0x38800000u);
  const u32x8 is_large = reinterpret_cast<u32x8>(magnitude >= 0x477ff000u);
  const u32x8 nan = reinterpret_cast<u32x8>(v != v);
  u32x8 half = (is_small & small) | (~is_small & normal);
  half = (is_large & 0x7c00u) | (~is_large & half);
  half = (nan & 0x7e00u) | (~nan & half);
  write(p, __builtin_convertvector(half | sign, u16x8));
#endif
}

// The first n elements of a vector; the others load as 0 and are not stored.
template <class V, class T>
inline V widen_part(const T* p, int n) {
  T part[sizeof(V) / sizeof(typename accumulator<T>::type)] = {};
  std::memcpy(part, p, n * sizeof(T));
  return widen(part);
}
template <class V, class T>
inline void narrow_part(T* p, V v, int n) {
  T part[sizeof(V) / sizeof(typename accumulator<T>::type)];
  narrow(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// whether any lane of a mask is set
template <class M>
inline bool any(M mask) {
#if defined(__AVX__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  const i64x4 words = reinterpret_cast<i64x4>(mask);
  return (words[0] | words[1] | words[2] | words[3]) != 0;
#endif
}

// lane-wise mask ? a : b
template <class M, class V>
inline V pick(M mask, V a, V b) {
  return mask ? a : b;
}

template <class V>
inline V splat(decltype(V{}[0] + 0) x) {
  return V{} + static_cast<std::decay_t<decltype(V{}[0])>>(x);
}

// Sum of squares or products in double: a norm over thousands of channels keeps the precision of its terms.
struct dot_sum {
  f64x8 wide = {};
  f64x4 narrow_lanes = {};

  void add(f32x8 a, f32x8 b) { wide += __builtin_convertvector(a, f64x8) * __builtin_convertvector(b, f64x8); }
  void add(f64x4 a, f64x4 b) { narrow_lanes += a * b; }
  double total() const {
    double sum = 0;
    for (int i = 0; i < 8; ++i) sum += wide[i];
    for (int i = 0; i < 4; ++i) sum += narrow_lanes[i];
    return sum;
  }
};

}  // namespace simd
}  // namespace hici
