// What the checks share: a source of numbers, exact conversions, heap memory of exact size, and how a check fails.
//
// Nothing here is inline or a template: files under kernels/ are compiled per path, and csrc/cpu/kernels/path.h says what
// an inline function would do there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hici/simd.h"

namespace hici::driver {

// Prints the message and ends the program with status 1.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

class Random {
 public:
  explicit Random(uint64_t seed);
  uint32_t bits();
  int64_t below(int64_t n);               // 0..n-1
  int64_t within(int64_t low, int64_t high);  // both included
  bool chance(double p);
  double normal();  // roughly, within +-6

 private:
  uint64_t state_;
};

double value(float x);
double value(double x);
double value(bfloat16 x);
double value(float16 x);
// to nearest, ties to even
void put(float* p, double x);
void put(double* p, double x);
void put(bfloat16* p, double x);
void put(float16* p, double x);

// Memory that ends with its last byte, so that a sanitizer sees the next one touched; filled with 0xff, which is NaN in
// every element type.
class Exact {
 public:
  explicit Exact(int64_t bytes);
  ~Exact();
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace hici::driver
