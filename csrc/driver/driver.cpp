#include "driver.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace hici::driver {

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("FAILED: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  va_end(arguments);
  std::exit(1);
}

Random::Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

uint32_t Random::bits() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(z >> 32);
}

int64_t Random::below(int64_t n) { return n <= 1 ? 0 : static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
int64_t Random::within(int64_t low, int64_t high) { return low + below(high - low + 1); }
bool Random::chance(double p) { return bits() < p * 4294967296.0; }

double Random::normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += bits() / 4294967296.0;
  return sum;
}

double value(float x) { return x; }
double value(double x) { return x; }
double value(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
double value(float16 x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  double magnitude;
  if (exponent == 31)
    magnitude = mantissa ? NAN : INFINITY;
  else
    magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return sign ? -magnitude : magnitude;
}

void put(float* p, double x) { *p = static_cast<float>(x); }
void put(double* p, double x) { *p = x; }
// from a float: rounding twice would not be rounding to nearest
void put(bfloat16* p, double x) {
  const float f = static_cast<float>(x);
  if (f != f) {
    p->bits = 0x7fc0;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t low = bits & 0xffff, high = bits >> 16;
  p->bits = static_cast<uint16_t>(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}
void put(float16* p, double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (a != a) {
    p->bits = 0x7e00;
  } else if (a >= 65520.0) {
    p->bits = sign | 0x7c00;
  } else {
    int exponent = 0;
    if (a > 0) std::frexp(a, &exponent);
    if (exponent < -13) exponent = -13;
    // the last place of a number in [2^(e-1), 2^e) is 2^(e-11); a carry moves on into the exponent by itself
    const int place = exponent - 11;
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, -place)));
    p->bits = static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps));
  }
}

Exact::Exact(int64_t bytes) : data_(std::malloc(static_cast<size_t>(bytes > 0 ? bytes : 1))) {
  if (!data_) fail("no memory for %lld bytes", static_cast<long long>(bytes));
  std::memset(data_, 0xff, static_cast<size_t>(bytes > 0 ? bytes : 1));
}
Exact::~Exact() { std::free(data_); }

}  // namespace hici::driver
