// What this processor can do at most: loops that do nothing but one kind of work, on operands that stay in registers or
// stream through memory once. Benchmarks divide by them.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace hici::cpu {

enum class Work : int {
  kFma,       // multiply-adds of float vectors, in floating-point operations (2 per lane)
  kBfloat16,  // products of bfloat16 summed in float, in floating-point operations (2 per product)
  kExp,       // the kernels' own polynomial e^x, in values
};

// Runs `rounds` rounds of a loop on every thread and returns the work that was done, over all threads that ran; 0 where
// the path has no instruction for it.
double ceiling_loop(Work work, int64_t rounds, Isa isa, Execution execution);

// What a path multiplies bfloat16 with: "amx", "dpbf16", "" (it computes in float).
const char* bfloat16_products(Isa isa);

// Reads `bytes` (a multiple of 64 is used) once, all threads together, and returns a sum of what was read.
float read_all(const void* data, int64_t bytes, Isa isa, Execution execution);

// Reads `count` runs of `bytes` each (a multiple of 64) at `addresses`, anywhere in memory, all threads together, and
// returns a sum of what was read. One line of every page is asked for kRunsAhead runs early, as the kernels that read
// such runs do: finding a page takes longer than reading it.
float read_runs(const int64_t* addresses, int64_t count, int64_t bytes, Isa isa, Execution execution);
constexpr int64_t kRunsAhead = 10;

// What a path provides.
struct CeilingPath {
  double (*loop)(Work, int64_t rounds);
  const char* products;
  float (*read)(const float*, int64_t count);  // count: a multiple of 16
  float (*read_runs)(const int64_t* addresses, int64_t runs, int64_t count);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  CeilingPath ceiling_path();            \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
