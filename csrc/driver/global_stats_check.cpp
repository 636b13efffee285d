// global_stats.h against plain loops in double: any strides, packed documents, left-out segments, exact memory, and the
// same bits from any number of threads.

#include "../cpu/global_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "checks.h"

namespace hici::driver {
namespace {

template <class T>
class Case {
 public:
  Case(Random& random, bool large) {
    p_.batch = random.within(1, 3), p_.segments = random.within(0, 9), p_.slots = random.within(1, 9);
    p_.channels = random.within(1, 150);
    if (large) p_.batch = 2, p_.segments = 40, p_.slots = 9, p_.channels = 1500 + random.below(40);
    packed_ = !large && random.chance(0.3);
    if (packed_) p_.batch = 1;
    p_.causal = random.chance(0.5);
    p_.stride_slot = p_.channels + random.below(3);
    p_.stride_segment = p_.stride_slot * p_.slots + random.below(5);
    p_.stride_batch = p_.stride_segment * p_.segments + random.below(5);
    const int64_t rows = p_.batch * p_.segments * p_.slots;
    const int64_t extent = rows ? (p_.batch - 1) * p_.stride_batch + (p_.segments - 1) * p_.stride_segment +
                                      (p_.slots - 1) * p_.stride_slot + p_.channels
                                : 0;
    local_ = std::make_unique<Exact>(extent * static_cast<int64_t>(sizeof(T)));
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t i = 0; i < p_.segments; ++i)
        for (int64_t j = 0; j < p_.slots; ++j)
          for (int64_t c = 0; c < p_.channels; ++c) put(at(b, i, j) + c, 0.5 + random.normal());
    if (random.chance(0.5)) {
      valid_.resize(static_cast<size_t>(p_.batch * p_.segments) + 1);
      for (unsigned char& x : valid_) x = random.chance(0.6);
      p_.valid = reinterpret_cast<const bool*>(valid_.data()), p_.valid_batch = p_.segments, p_.valid_segment = 1;
    }
    offsets_ = {0, static_cast<int32_t>(p_.segments)};
    if (packed_) {
      for (int64_t i = random.below(4); i > 0; --i)
        offsets_.push_back(static_cast<int32_t>(random.within(0, p_.segments)));
      std::sort(offsets_.begin(), offsets_.end());
      p_.offsets = offsets_.data(), p_.documents = static_cast<int64_t>(offsets_.size()) - 1;
    }
  }

  void check(cpu::Isa isa, Random& random) const {
    const int64_t h = p_.channels, groups = p_.causal ? p_.batch * p_.segments : packed_ ? p_.documents : p_.batch;
    const int64_t out_bytes = groups * 5 * h * static_cast<int64_t>(sizeof(T));
    const int64_t grad_bytes = p_.batch * p_.segments * p_.slots * h * static_cast<int64_t>(sizeof(T));
    const Exact grad(out_bytes), out(out_bytes), again(out_bytes), back(grad_bytes), back_again(grad_bytes);
    for (int64_t i = 0; i < groups * 5 * h; ++i) put(static_cast<T*>(grad.data()) + i, random.normal());
    const T* const local = static_cast<const T*>(local_->data());
    const auto run = [&](const Exact& to, const Exact& gradient, int threads) {
      cpu::global_stats_forward<T>(p_, local, static_cast<T*>(to.data()), isa, cpu::Execution{threads});
      cpu::global_stats_backward<T>(p_, local, static_cast<const T*>(grad.data()), static_cast<T*>(gradient.data()), isa,
                                    cpu::Execution{threads});
    };
    run(out, back, 1);
    run(again, back_again, static_cast<int>(random.within(2, 4)));
    if (std::memcmp(out.data(), again.data(), static_cast<size_t>(out_bytes)) != 0 ||
        std::memcmp(back.data(), back_again.data(), static_cast<size_t>(grad_bytes)) != 0)
      fail("global_stats on %s: other bits from more threads", cpu::name(isa));
    const double tolerance = sizeof(T) == 8 ? 1e-12 : std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, bfloat16> ? 2e-2 : 2e-3;
    int64_t group = 0;
    for (int64_t b = 0; b < p_.batch; ++b)
      for (size_t d = 0; d + 1 < offsets_.size(); ++d) {
        const int64_t last = p_.causal ? offsets_[d + 1] : offsets_[d] + 1;
        for (int64_t end = offsets_[d] + 1; end <= last; ++end, ++group)
          check_group(isa, b, offsets_[d], p_.causal ? end : offsets_[d + 1], static_cast<const T*>(out.data()) + group * 5 * h,
                      tolerance);
      }
    // every gradient is written, and those of segments that do not count are 0
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t i = 0; i < p_.segments; ++i)
        for (int64_t c = 0; c < p_.slots * h; ++c) {
          const double g = value(static_cast<const T*>(back.data())[(b * p_.segments + i) * p_.slots * h + c]);
          if (g != g || (!counts(b, i) && g != 0)) fail("global_stats on %s: gradient %g", cpu::name(isa), g);
        }
  }

 private:
  T* at(int64_t b, int64_t i, int64_t j) const {
    return static_cast<T*>(local_->data()) + b * p_.stride_batch + i * p_.stride_segment + j * p_.stride_slot;
  }
  bool counts(int64_t b, int64_t i) const { return !p_.valid || p_.valid[b * p_.segments + i]; }

  void check_group(cpu::Isa isa, int64_t b, int64_t start, int64_t stop, const T* out, double tolerance) const {
    const int64_t h = p_.channels;
    std::vector<double> mean(static_cast<size_t>(h));
    double norm = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t c = 0; c < h; ++c) {
        double sum = 0, squares = 0, top = -INFINITY, low = INFINITY;
        int64_t count = 0;
        for (int64_t i = start; i < stop; ++i)
          for (int64_t j = 0; j < p_.slots && counts(b, i); ++j, ++count) {
            const double x = value(at(b, i, j)[c]);
            sum += x, top = std::max(top, x), low = std::min(low, x);
            squares += (x - mean[c]) * (x - mean[c]);
          }
        if (pass == 0) {
          mean[c] = count ? sum / static_cast<double>(count) : 0;
          norm += mean[c] * mean[c];
          continue;
        }
        const double variance = count ? squares / static_cast<double>(count) : 0;
        const double std = variance <= 1e-12 ? 1e-6 : std::sqrt(variance);
        const double wanted[5] = {mean[c], count ? top : 0, count ? low : 0, count ? std : 0,
                                  mean[c] / std::max(std::sqrt(norm), 1e-6)};
        for (int row = 0; row < 5; ++row) {
          const double found = value(out[row * h + c]);
          if (!(std::fabs(found - wanted[row]) <= tolerance * std::max(1.0, std::fabs(wanted[row]))))
            fail("global_stats on %s, %d-byte elements: row %d of channel %d of segments %d..%d is %g, expected %g",
                 cpu::name(isa), (int)sizeof(T), row, (int)c, (int)start, (int)stop, found, wanted[row]);
        }
      }
    }
  }

  cpu::StatsProblem p_{};
  bool packed_ = false;
  std::unique_ptr<Exact> local_;
  std::vector<unsigned char> valid_;
  std::vector<int32_t> offsets_;
};

template <class T>
void check_case(cpu::Isa isa, Random& random, bool large) {
  const Case<T> one(random, large);
  one.check(isa, random);
}

}  // namespace

void check_global_stats(cpu::Isa isa, uint64_t seed, int cases) {
  Random random(seed + 13);
  for (int i = 0; i < cases; ++i) {
    const bool large = i % 20 == 3;
    check_case<float>(isa, random, large);
    check_case<bfloat16>(isa, random, large);
    check_case<float16>(isa, random, large);
    check_case<double>(isa, random, large);
  }
}

}  // namespace hici::driver
