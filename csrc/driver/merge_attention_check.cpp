// merge_attention.h against plain loops in double: any number of parts, rows that saw nothing, any strides, exact memory,
// and the same bits from any number of threads. The gradient is checked for being written whole and finite.

#include "../cpu/merge_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "checks.h"

namespace hici::driver {
namespace {

template <class T>
void check_case(cpu::Isa isa, Random& random) {
  using Acc = typename simd::accumulator<T>::type;
  const int64_t batch = random.within(1, 2), seq = random.within(1, random.chance(0.1) ? 400 : 20);
  const int64_t heads = random.within(1, 5), dim = random.within(1, random.chance(0.3) ? 130 : 40);
  const int64_t parts = random.within(1, 5), rows = batch * seq * heads;
  const int64_t head = dim + random.below(4), step = head * heads + random.below(4), row = step * seq + random.below(4);
  const int64_t extent = (batch - 1) * row + (seq - 1) * step + (heads - 1) * head + dim;
  std::vector<std::unique_ptr<Exact>> memory;
  const auto take = [&](int64_t bytes) {
    memory.push_back(std::make_unique<Exact>(bytes));
    return memory.back()->data();
  };
  const auto rows_of = [&] {
    T* const data = static_cast<T*>(take(extent * static_cast<int64_t>(sizeof(T))));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < seq; ++t)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t d = 0; d < dim; ++d) put(data + b * row + t * step + h * head + d, random.normal());
    return cpu::MergeRows<T>{data, row, step, head};
  };
  std::vector<cpu::MergeRows<T>> outs;
  std::vector<cpu::MergeLse<Acc>> lses;
  for (int64_t i = 0; i < parts; ++i) {
    outs.push_back(rows_of());
    Acc* const lse = static_cast<Acc*>(take(rows * static_cast<int64_t>(sizeof(Acc))));
    for (int64_t j = 0; j < rows; ++j) put(lse + j, random.chance(0.3) ? -INFINITY : 3 * random.normal());
    lses.push_back({lse, heads * seq, seq, 1});
  }
  const cpu::MergeProblem<T> problem{batch, seq, heads, dim, parts, outs.data(), lses.data()};
  const cpu::MergeRows<T> grad_out = rows_of();
  Acc* const grad_lse = static_cast<Acc*>(take(rows * static_cast<int64_t>(sizeof(Acc))));
  for (int64_t j = 0; j < rows; ++j) put(grad_lse + j, random.normal());

  struct Written {
    T* out;
    Acc* lse;
    std::vector<cpu::MergeGradient<T>> gradients;
  };
  const int64_t out_bytes = rows * dim * static_cast<int64_t>(sizeof(T));
  const int64_t lse_bytes = rows * static_cast<int64_t>(sizeof(Acc));
  const auto run = [&](int threads) {
    Written w{static_cast<T*>(take(out_bytes)), static_cast<Acc*>(take(lse_bytes)), {}};
    for (int64_t i = 0; i < parts; ++i)
      w.gradients.push_back({static_cast<T*>(take(out_bytes)), static_cast<Acc*>(take(lse_bytes))});
    cpu::merge_attention_forward<T>(problem, w.out, w.lse, isa, cpu::Execution{threads});
    cpu::merge_attention_backward<T>(problem, grad_out, grad_lse, w.gradients.data(), isa, cpu::Execution{threads});
    return w;
  };
  const Written found = run(1), again = run(static_cast<int>(random.within(2, 4)));
  const auto same = [&](const void* a, const void* b, int64_t bytes) {
    if (std::memcmp(a, b, static_cast<size_t>(bytes)) != 0)
      fail("merge_attention on %s: other bits from more threads", cpu::name(isa));
  };
  same(found.out, again.out, out_bytes);
  same(found.lse, again.lse, lse_bytes);
  for (int64_t i = 0; i < parts; ++i) {
    same(found.gradients[i].out, again.gradients[i].out, out_bytes);
    same(found.gradients[i].lse, again.gradients[i].lse, lse_bytes);
    for (int64_t j = 0; j < rows * dim; ++j)
      if (!std::isfinite(value(found.gradients[i].out[j]))) fail("merge_attention on %s: gradient of out", cpu::name(isa));
    for (int64_t j = 0; j < rows; ++j)
      if (!std::isfinite(value(found.gradients[i].lse[j]))) fail("merge_attention on %s: gradient of lse", cpu::name(isa));
  }
  const double tolerance = sizeof(T) == 8 ? 1e-12 : std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, bfloat16> ? 2e-2 : 2e-3;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < seq; ++t) {
        const int64_t at = (b * heads + h) * seq + t;
        double total = 0;
        for (int64_t i = 0; i < parts; ++i) total += std::exp(static_cast<double>(lses[i].data[at]));
        const double lse = std::log(total), got = value(found.lse[at]);
        if (total == 0 ? got != -INFINITY : !(std::fabs(got - lse) <= 1e-5 * std::max(1.0, std::fabs(lse))))
          fail("merge_attention on %s: lse %g, expected %g", cpu::name(isa), got, lse);
        for (int64_t d = 0; d < dim; ++d) {
          double sum = 0;
          for (int64_t i = 0; i < parts && total > 0; ++i) {
            const double weight = std::exp(static_cast<double>(lses[i].data[at])) / total;
            if (weight > 0) sum += weight * value(outs[i].data[b * row + t * step + h * head + d]);
          }
          const double y = value(found.out[((b * seq + t) * heads + h) * dim + d]);
          if (!(std::fabs(y - sum) <= tolerance * std::max(1.0, std::fabs(sum))))
            fail("merge_attention on %s, %d-byte elements: out %g, expected %g (%d parts, dim %d)", cpu::name(isa),
                 (int)sizeof(T), y, sum, (int)parts, (int)dim);
        }
      }
}

}  // namespace

void check_merge_attention(cpu::Isa isa, uint64_t seed, int cases) {
  Random random(seed + 17);
  for (int i = 0; i < cases; ++i) {
    check_case<float>(isa, random);
    check_case<bfloat16>(isa, random);
    check_case<float16>(isa, random);
    check_case<double>(isa, random);
  }
}

}  // namespace hici::driver
