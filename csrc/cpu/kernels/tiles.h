// Products on AMX tiles: 16 rows of 64 bytes, bfloat16 pairs in, float out.
//
// With HICI_EMULATE_TILES the same code runs on plain loops, so that its addressing can be tested on any machine with
// AVX-512 and bfloat16 instructions. With HICI_TILES_ONLY_MOVE tiles are moved between memory and vector registers, and
// products are only counted: results are wrong, and the time is that of everything else (benchmarks/tiles). With
// HICI_TILES_STAY too they are not even moved.
#pragma once

#include "vector.h"
#if defined(HICI_TILES_ONLY_MOVE)
#include <atomic>
#endif

namespace hici::cpu::HICI_PATH {

#if defined(HICI_EMULATE_TILES)

struct Tile {
  alignas(64) unsigned char row[16][64];
};
// one set of registers per thread, as on the processor; NaN until loaded
inline Tile* tile_registers() {
  static thread_local Tile registers[8];
  return registers;
}
inline void tiles_begin() { __builtin_memset(tile_registers(), 0xff, 8 * sizeof(Tile)); }
inline void tiles_end() {}
template <int R>
inline void tile_zero() {
  __builtin_memset(&tile_registers()[R], 0, sizeof(Tile));
}
template <int R>
inline void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    __builtin_memcpy(tile_registers()[R].row[i], static_cast<const char*>(p) + i * stride, 64);
}
template <int R>
inline void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(static_cast<char*>(p) + i * stride, tile_registers()[R].row[i], 64);
}
template <int C, int A, int B>
inline void tile_product() {
  Tile* const t = tile_registers();
  for (int i = 0; i < 16; ++i) {
    Vec sum = load(reinterpret_cast<const float*>(t[C].row[i]));
    for (int k = 0; k < 16; ++k) {
      int32_t two;
      __builtin_memcpy(&two, t[A].row[i] + 4 * k, 4);
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)),
                             reinterpret_cast<__m512bh>(_mm512_load_si512(t[B].row[k])));
    }
    store(reinterpret_cast<float*>(t[C].row[i]), sum);
  }
}

#elif defined(HICI_TILES_ONLY_MOVE)

std::atomic<int64_t>& tile_products();
inline int64_t& products_here() {
  static thread_local int64_t count = 0;
  return count;
}
inline void tiles_begin() { products_here() = 0; }
inline void tiles_end() { tile_products() += products_here(); }
template <int R>
inline void tile_zero() {}
#if defined(HICI_TILES_STAY)
template <int R>
inline void tile_load(const void*, int64_t) {}
template <int R>
inline void tile_store(void*, int64_t) {}
#else
// in assembly: compilers keep 16 addresses in registers that there are not
#define HICI_FOUR_ROWS(load, store)                                                                         \
  "vmovdqu64 " load "(%0)" store "\n\tvmovdqu64 " load "(%0,%1)" store "\n\tvmovdqu64 " load "(%0,%1,2)" store \
  "\n\tvmovdqu64 " load "(%0,%2)" store "\n\tlea (%0,%1,4), %0\n\t"
template <int R>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile(HICI_FOUR_ROWS("", ", %%zmm31") HICI_FOUR_ROWS("", ", %%zmm31") HICI_FOUR_ROWS("", ", %%zmm31")
                       HICI_FOUR_ROWS("", ", %%zmm31")
                   : "+r"(p)
                   : "r"(stride), "r"(3 * stride)
                   : "memory", "xmm31");
}
template <int R>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("vpxord %%zmm31, %%zmm31, %%zmm31\n\t" HICI_FOUR_ROWS("%%zmm31, ", "")
                       HICI_FOUR_ROWS("%%zmm31, ", "") HICI_FOUR_ROWS("%%zmm31, ", "") HICI_FOUR_ROWS("%%zmm31, ", "")
                   : "+r"(p)
                   : "r"(stride), "r"(3 * stride)
                   : "memory", "xmm31");
}
#undef HICI_FOUR_ROWS
#endif
template <int C, int A, int B>
inline void tile_product() {}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline void tiles_begin() {
  const TileConfig config;
  _tile_loadconfig(&config);
}
// Until this, every switch of threads saves 8 KiB of tiles.
inline void tiles_end() { _tile_release(); }
// the intrinsics take register numbers as literals
template <int R>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int R>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int C, int A, int B>
inline void tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// A block of up to 2 x 2 tiles of C. Registers: 0-3 sums, 4-5 rows of A, 6-7 columns of B: each loaded tile is used twice.
template <int ROWS, int COLUMNS, bool Accumulate>
inline void tile_open(const float* c, int64_t ldc) {
  const int64_t row = ldc * 4;
  if constexpr (Accumulate) {
    tile_load<0>(c, row);
    if constexpr (COLUMNS == 2) tile_load<1>(c + 16, row);
    if constexpr (ROWS == 2) tile_load<2>(c + 16 * ldc, row);
    if constexpr (ROWS == 2 && COLUMNS == 2) tile_load<3>(c + 16 * ldc + 16, row);
  } else {
    tile_zero<0>();
    if constexpr (COLUMNS == 2) tile_zero<1>();
    if constexpr (ROWS == 2) tile_zero<2>();
    if constexpr (ROWS == 2 && COLUMNS == 2) tile_zero<3>();
  }
}

// 32 steps of the reduction
template <int ROWS, int COLUMNS>
inline void tile_step(const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb) {
  const int64_t a_row = lda * 2, b_row = ldb * 2;
#if defined(HICI_TILES_ONLY_MOVE)
  products_here() += ROWS * COLUMNS;
#endif
  tile_load<6>(b, b_row);
  tile_load<4>(a, a_row);
  tile_product<0, 4, 6>();
  if constexpr (ROWS == 2) {
    tile_load<5>(a + 16 * lda, a_row);
    tile_product<2, 5, 6>();
  }
  if constexpr (COLUMNS == 2) {
    tile_load<7>(b + 32, b_row);
    tile_product<1, 4, 7>();
  }
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_product<3, 5, 7>();
}

template <int ROWS, int COLUMNS>
inline void tile_close(float* c, int64_t ldc) {
  const int64_t row = ldc * 4;
  tile_store<0>(c, row);
  if constexpr (COLUMNS == 2) tile_store<1>(c + 16, row);
  if constexpr (ROWS == 2) tile_store<2>(c + 16 * ldc, row);
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_store<3>(c + 16 * ldc + 16, row);
}

template <int ROWS, int COLUMNS, bool Accumulate>
inline void tile_block(int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb, float* c,
                       int64_t ldc) {
  tile_open<ROWS, COLUMNS, Accumulate>(c, ldc);
  for (int64_t t = 0; t < k; t += 32) tile_step<ROWS, COLUMNS>(a + t, lda, b + t / 2 * ldb, ldb);
  tile_close<ROWS, COLUMNS>(c, ldc);
}

}  // namespace hici::cpu::HICI_PATH
