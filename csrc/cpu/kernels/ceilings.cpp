// Loops for csrc/cpu/ceilings.h. A compiler may neither drop them nor hold a sum in memory: empty assembly makes it
// believe that registers are read and changed in every round.
#include "../ceilings.h"

#include "vector.h"
#if defined(HICI_PATH_AMX)
#include "tiles.h"
#endif

namespace hici::cpu::HICI_PATH {
namespace {

// Independent chains: more than latency x instructions per cycle of any processor known, fewer than its registers. An
// assembly statement takes 30 operands, and "+v" counts twice.
#if defined(HICI_PATH_AVX512)
constexpr int kChains = 14;
#else
constexpr int kChains = 12;
#endif
constexpr int kSteps = 8;

// x86-64 alone can name these vectors in assembly; elsewhere the value that the loop returns must do.
#if defined(__x86_64__)
#define HICI_REGISTER "+v"
template <class V>
inline void touch(V& x) {
  __asm__ volatile("" : HICI_REGISTER(x));
}
template <class V>
inline void touch(V (&x)[12]) {
  __asm__ volatile(""
                   : HICI_REGISTER(x[0]), HICI_REGISTER(x[1]), HICI_REGISTER(x[2]), HICI_REGISTER(x[3]),
                     HICI_REGISTER(x[4]), HICI_REGISTER(x[5]), HICI_REGISTER(x[6]), HICI_REGISTER(x[7]),
                     HICI_REGISTER(x[8]), HICI_REGISTER(x[9]), HICI_REGISTER(x[10]), HICI_REGISTER(x[11]));
}
template <class V>
inline void touch(V (&x)[14]) {
  __asm__ volatile(""
                   : HICI_REGISTER(x[0]), HICI_REGISTER(x[1]), HICI_REGISTER(x[2]), HICI_REGISTER(x[3]),
                     HICI_REGISTER(x[4]), HICI_REGISTER(x[5]), HICI_REGISTER(x[6]), HICI_REGISTER(x[7]),
                     HICI_REGISTER(x[8]), HICI_REGISTER(x[9]), HICI_REGISTER(x[10]), HICI_REGISTER(x[11]),
                     HICI_REGISTER(x[12]), HICI_REGISTER(x[13]));
}
#undef HICI_REGISTER
#else
template <class V>
inline void touch(V&) {}
#endif

// A place that the compiler must believe is read.
inline void keep(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  __asm__ volatile("" : : "r"(lanes) : "memory");
}

double multiply_adds(int64_t rounds) {
  Vec sum[kChains], left = splat(0.5f), right = splat(0.25f);  // the chains settle at 0.5: no infinities, no denormals
  touch(left), touch(right);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = splat(static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], left, right);
      touch(sum);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) keep(sum[i]);
  return 2.0 * kLanes * kChains * kSteps * static_cast<double>(rounds);
}

double exponentials(int64_t rounds) {
  Vec x = splat(-0.3f), y = zeros();
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int step = 0; step < kSteps; ++step) {
      touch(x);  // another argument, for all the compiler knows; one value does not wait for the one before
      y = exp(x);
      touch(y);
    }
  }
  keep(y);
  return static_cast<double>(kLanes) * kSteps * static_cast<double>(rounds);
}

#if defined(HICI_PATH_AMX)
constexpr const char* kProducts = "amx";
double products(int64_t rounds) {
  alignas(64) bfloat16 ones[16 * 32];
  for (bfloat16& x : ones) x.bits = 0x3f80;
  tiles_begin();
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(ones, 64), tile_load<5>(ones, 64), tile_load<6>(ones, 64), tile_load<7>(ones, 64);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int step = 0; step < kSteps; ++step) {
      tile_product<0, 4, 6>();
      tile_product<1, 4, 7>();
      tile_product<2, 5, 6>();
      tile_product<3, 5, 7>();
    }
  }
  alignas(64) float sums[16 * 16];
  tile_store<0>(sums, 64);
  keep(load(sums));
  tiles_end();
  return 4.0 * kSteps * 2 * 16 * 16 * 32 * static_cast<double>(rounds);
}
#elif defined(HICI_PATH_AVX512_BF16)
constexpr const char* kProducts = "dpbf16";
double products(int64_t rounds) {
  Vec sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = zeros();
  __m512i left = _mm512_set1_epi16(0x3f80), right = left;
  touch(left), touch(right);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i)
        sum[i] = _mm512_dpbf16_ps(sum[i], reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
      touch(sum);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) keep(sum[i]);
  return 4.0 * kLanes * kChains * kSteps * static_cast<double>(rounds);
}
#else
constexpr const char* kProducts = "";
double products(int64_t) { return 0; }
#endif

double loop(Work work, int64_t rounds) {
  switch (work) {
    case Work::kFma:
      return multiply_adds(rounds);
    case Work::kBfloat16:
      return products(rounds);
    case Work::kExp:
      return exponentials(rounds);
  }
  return 0;
}

float read(const float* p, int64_t count) {
  constexpr int kStreams = 8;
  Vec sum[kStreams];
#pragma GCC unroll 16
  for (int i = 0; i < kStreams; ++i) sum[i] = zeros();
  int64_t t = 0;
  for (; t + kStreams * kLanes <= count; t += kStreams * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kStreams; ++i) sum[i] = add(sum[i], load(p + t + i * kLanes));
  }
  for (; t < count; t += kLanes) sum[0] = add(sum[0], load(p + t));
#pragma GCC unroll 16
  for (int i = 1; i < kStreams; ++i) sum[0] = add(sum[0], sum[i]);
  return reduce_add(sum[0]);
}

float read_runs(const int64_t* addresses, int64_t runs, int64_t count) {
  constexpr int64_t kPage = 4096;
  float total = 0;
  for (int64_t i = 0; i < runs; ++i) {
    if (i + kRunsAhead < runs) {
      const char* next = reinterpret_cast<const char*>(addresses[i + kRunsAhead]);
      for (int64_t at = 0; at < count * 4; at += kPage) __builtin_prefetch(next + at);
    }
    total += read(reinterpret_cast<const float*>(addresses[i]), count);
  }
  return total;
}

}  // namespace

CeilingPath ceiling_path() { return {loop, kProducts, read, read_runs}; }

}  // namespace hici::cpu::HICI_PATH
